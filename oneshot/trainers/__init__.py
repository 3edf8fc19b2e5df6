"""Trainers: they own the data split, the optimizers, the phases, and the files of a run."""

from .base import Trainer as Trainer
from .collapse import EarlyStop as EarlyStop
from .darts import DARTSTrainer as DARTSTrainer
from .pit import PITTrainer as PITTrainer
from .pit_supernet import PITSuperNetTrainer as PITSuperNetTrainer
from .presets import fbnet as fbnet
from .presets import gdas as gdas
from .proxyless import ProxylessTrainer as ProxylessTrainer
from .random_search import RandomSearch as RandomSearch
from .recalibration import recalibrate_ as recalibrate_
from .spos import SPOSTrainer as SPOSTrainer
from .supernet import SuperNetTrainer as SuperNetTrainer
