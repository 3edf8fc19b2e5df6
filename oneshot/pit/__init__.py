"""PIT: masks over the channels, kernels and dilations of any network."""

from .model import PIT as PIT
from .report import PITReport as PITReport
