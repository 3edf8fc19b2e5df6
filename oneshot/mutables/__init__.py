"""Choices of a network and the samplers that decide them."""

from .base import Decision as Decision
from .base import Mutable as Mutable
from .base import after_step as after_step
from .base import arch_parameters as arch_parameters
from .base import decisions as decisions
from .base import draw as draw
from .base import lead_ as lead_
from .base import set_sampler as set_sampler
from .base import weight_parameters as weight_parameters
from .input_choice import InputChoice as InputChoice
from .layer_choice import LayerChoice as LayerChoice
from .masked import MaskedConv1d as MaskedConv1d
from .masked import MaskedConv2d as MaskedConv2d
from .masked import MaskedConv3d as MaskedConv3d
from .masked import MaskedLinear as MaskedLinear
from .masks import ChannelMask as ChannelMask
from .masks import DilationMask as DilationMask
from .masks import KernelMask as KernelMask
from .repeat import Repeat as Repeat
from .samplers import Argmax as Argmax
from .samplers import BinaryGates as BinaryGates
from .samplers import EveryPath as EveryPath
from .samplers import Gate as Gate
from .samplers import GumbelSoftmax as GumbelSoftmax
from .samplers import OnePath as OnePath
from .samplers import Sampler as Sampler
from .samplers import Softmax as Softmax
from .samplers import UniformPath as UniformPath
from .temperature import Temperature as Temperature

PITSuperNetModule = LayerChoice
