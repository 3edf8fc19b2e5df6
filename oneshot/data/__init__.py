"""Data: the weight/architecture split, the endless batch stream, and real image data in small."""

from .embedded import ArrayDataset as ArrayDataset
from .embedded import cifar10 as cifar10
from .embedded import digits as digits
from .embedded import fashion_mnist as fashion_mnist
from .embedded import holdout as holdout
from .embedded import mnist as mnist
from .embedded import mnist5k as mnist5k
from .split import Split as Split
from .split import stratified_split as stratified_split
from .split import targets_of as targets_of
from .stream import BatchStream as BatchStream
from .stream import mix_seed as mix_seed

__all__ = [
    "ArrayDataset",
    "BatchStream",
    "Split",
    "cifar10",
    "digits",
    "fashion_mnist",
    "holdout",
    "mix_seed",
    "mnist",
    "mnist5k",
    "stratified_split",
    "targets_of",
]
