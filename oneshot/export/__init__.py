"""From decisions to a file, and from a file to the fixed model."""

from .accuracy import TableError as TableError
from .accuracy import table_error as table_error
from .arch import arch_of as arch_of
from .arch import argmax_choices as argmax_choices
from .arch import choices_of as choices_of
from .arch import fingerprint as fingerprint
from .arch import fixed_arch as fixed_arch
from .arch import read_arch as read_arch
from .arch import write_arch as write_arch
from .fixed import as_graph as as_graph
from .fixed import fixed as fixed
from .fixed import load_fixed as load_fixed
from .fixed import verified_fixed as verified_fixed
from .onnx import export_onnx as export_onnx
