"""What an architecture costs: counted, priced by a table, or measured."""

from .counts import MAC_RULES as MAC_RULES
from .counts import LayerSpec as LayerSpec
from .counts import count_macs as count_macs
from .counts import count_params as count_params
from .decode import best_under_budget as best_under_budget
from .decode import cost_range as cost_range
from .measure import measure_latency as measure_latency
from .measure import time_module as time_module
from .model import CostModel as CostModel
from .model import Term as Term
from .table import LatencyTable as LatencyTable
from .table import price as price
