"""What runs in a search model, and under which decisions."""

from .operators import Junction as Junction
from .operators import Operator as Operator
from .operators import Program as Program
from .operators import Run as Run
from .operators import Value as Value
from .operators import plain_attention as plain_attention
from .operators import trace_operators as trace_operators
from .trace import Call as Call
from .trace import Condition as Condition
from .trace import Operation as Operation
from .trace import evaluated as evaluated
from .trace import intersect as intersect
from .trace import parameter_conditions as parameter_conditions
from .trace import tensor_conditions as tensor_conditions
from .trace import tensors_of as tensors_of
from .trace import trace_calls as trace_calls
from .trace import trace_operations as trace_operations
from .trace import undecided_inside as undecided_inside
