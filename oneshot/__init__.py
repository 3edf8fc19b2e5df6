"""One-shot neural architecture search for PyTorch: the network that is exported is the one that was searched."""

from .cost import CostModel as CostModel
from .cost import CostSpec as CostSpec
from .cost import LatencyTable as LatencyTable
from .cost import WidthGrid as WidthGrid
from .cost import count as count
from .cost import count_macs as count_macs
from .cost import count_params as count_params
from .cost import count_peak_memory as count_peak_memory
from .cost import counted_cost as counted_cost
from .cost import latency_on as latency_on
from .cost import layer_latency as layer_latency
from .cost import measure_table as measure_table
from .cost import nn_meter_latency as nn_meter_latency
from .cost import price as price
from .cost import weight_bytes as weight_bytes
from .export import as_graph as as_graph
from .export import export_onnx as export_onnx
from .export import fixed as fixed
from .export import fixed_arch as fixed_arch
from .export import load_fixed as load_fixed
from .export import table_error as table_error
from .losses import LabelSmoothingLoss as LabelSmoothingLoss
from .losses import accuracy as accuracy
from .mutables import Argmax as Argmax
from .mutables import BinaryGates as BinaryGates
from .mutables import EveryPath as EveryPath
from .mutables import GumbelSoftmax as GumbelSoftmax
from .mutables import InputChoice as InputChoice
from .mutables import LayerChoice as LayerChoice
from .mutables import OnePath as OnePath
from .mutables import Repeat as Repeat
from .mutables import Softmax as Softmax
from .mutables import UniformPath as UniformPath
from .mutables import after_step as after_step
from .mutables import arch_parameters as arch_parameters
from .mutables import decisions as decisions
from .mutables import draw as draw
from .mutables import set_sampler as set_sampler
from .mutables import weight_parameters as weight_parameters
from .trainers import ProxylessTrainer as ProxylessTrainer
from .trainers import Trainer as Trainer

__version__ = "0.1.0"
