"""Networks under search: masks over channels, kernels and dilations, choices between layers, or both."""

from .model import PIT as PIT
from .report import PITReport as PITReport
from .supernet import SuperNet as SuperNet

PITSuperNet = PIT
