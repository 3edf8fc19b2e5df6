"""What runs in a search model, and under which decisions."""

from .trace import Call as Call
from .trace import Condition as Condition
from .trace import evaluated as evaluated
from .trace import intersect as intersect
from .trace import parameter_conditions as parameter_conditions
from .trace import trace_calls as trace_calls
from .trace import undecided_inside as undecided_inside
