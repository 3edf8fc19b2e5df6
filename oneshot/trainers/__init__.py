"""Trainers: they own the data split, the optimizers, the phases, and the files of a run."""

from .base import Trainer as Trainer
from .pit import PITTrainer as PITTrainer
from .proxyless import ProxylessTrainer as ProxylessTrainer
