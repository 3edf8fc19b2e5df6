"""Several searches from one warm-up, and which of the networks found are worth having."""

from .domination import dominated as dominated
from .front import Front as Front
from .front import FrontRow as FrontRow
from .run import sweep as sweep
