"""Latency of phones and other devices by the kernel predictors of nn-Meter (Zhang et al., MobiSys 2021)."""

from .forest import Forest as Forest
from .latency import NNMeterLatency as NNMeterLatency
from .latency import check_missing as check_missing
from .latency import nn_meter_graph as nn_meter_graph
from .latency import nn_meter_latency as nn_meter_latency
from .package import nn_meter_package as nn_meter_package
from .predictors import PredictorSet as PredictorSet
from .predictors import check_hardware as check_hardware
from .predictors import load_predictor_set as load_predictor_set
