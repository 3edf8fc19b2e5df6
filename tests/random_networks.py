"""Random small plain networks for property tests: convert to masks, prune at random, export, compare outputs.

A network is a list of steps over a pool of live tensors: each step reads some of them and appends its results, so
branches, fan-outs and dead ends come by themselves. ``random_networks()`` draws the steps, hypothesis shrinks them,
and ``program`` shows them as text, one line for each tensor. Steps of the common lists leave channels that
can be pruned; those of the odd lists may tie or freeze what they touch.

Tensors have one of four kinds: image (B, C, H, W), sequence (B, C, T), tokens (B, T, F) and vector (B, F).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 2
MOST_CHANNELS, MOST_SPACE, MOST_FEATURES = 24, 16, 400
LARGEST_VALUE = 30.0  # products of products would overflow

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """``run(*tensors, *layers, **options)`` on tensors of the pool; a tuple of results gives several tensors."""

    run: Callable[..., Any]
    sources: tuple[int, ...]
    layers: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [*(f"t{i}" for i in self.sources), *self.layers, *(f"{k}={v!r}" for k, v in self.options.items())]
        return f"{self.run.__name__}({', '.join(words)})"


class DrawnNetwork(nn.Module):
    """Runs its steps one after the other and returns the tensors numbered ``ends``."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.ends: tuple[int, ...] = ()

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        pool = list(inputs)
        for step in self.steps:
            pool += self.results(step, pool)
        ends = tuple(pool[i] for i in self.ends)
        return ends[0] if len(ends) == 1 else ends

    def results(self, step: Step, pool: Sequence[Tensor]) -> tuple[Tensor, ...]:
        layers = (getattr(self, name) for name in step.layers)
        result = step.run(*(pool[i] for i in step.sources), *layers, **step.options)
        return result if isinstance(result, tuple) else (result,)


@dataclass(repr=False)
class RandomNetwork:
    model: nn.Module  # in eval mode
    inputs: tuple[Tensor, ...]  # float32, batch 2
    program: str

    def __repr__(self) -> str:
        return f"RandomNetwork:\n{self.program}\n"


@st.composite
def random_networks(draw: st.DrawFn) -> RandomNetwork:
    """A network of up to 14 drawn instructions, mostly more than 7, and a linear head for each of its 1 or 2 outputs.

    Two thirds are easy: they begin with a learned layer, and one instruction in eight is odd. Of the others, half
    of the instructions are odd.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # constructors draw initial weights
        # not draw() for each choice: hypothesis would make most examples by copying parts of an earlier one
        w = Writer(draw(st.randoms(use_true_random=False)), draw(st.integers(0, 2**31 - 1)))
        odd_one_in = w.pick([8, 8, 2])
        w.input(w.pick(KINDS))
        if w.chance(5):
            w.input(w.pick(KINDS))
        if odd_one_in > 2:
            learned(w, w.live[0])
        for _ in range(14):
            if w.rng.randint(0, 19) == 0:  # a number of steps, drawn first, would be harder to shrink
                break
            x = w.source()
            lists = ODD if w.chance(odd_one_in) else COMMON
            if not w.pick(lists[x.kind])(w, x):
                learned(w, x)
        if w.chance(6):
            unused = w.layer("unused", nn.Linear(w.width(), w.width()))
            w.lines.append(f"# never called: {w.shape_of(unused)}")
        heads(w)
    return RandomNetwork(w.model.eval(), tuple(w.inputs), "\n".join([f"seed {w.seed}", *w.lines]))


# ---- writing a program ---------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Live:
    """A tensor of the pool."""

    number: int
    kind: str
    value: Tensor
    used: bool = False
    overwritable: bool = False  # nothing keeps it for its backward

    @property
    def axis(self) -> int:
        return 1 if self.kind in ("image", "sequence") else self.value.ndim - 1

    @property
    def width(self) -> int:
        return self.value.shape[self.axis]

    @property
    def space(self) -> tuple[int, ...]:
        """The sizes between batch and channels or behind them; () of a vector."""
        return tuple(n for dim, n in enumerate(self.value.shape) if dim not in (0, self.axis))

    @property
    def narrowest(self) -> int:
        return min(self.space, default=1)


class Writer:
    """The program so far, and the values of its tensors on one batch."""

    def __init__(self, rng: random.Random, seed: int) -> None:
        self.rng, self.seed = rng, seed
        self.generator = torch.Generator().manual_seed(seed)
        self.model = DrawnNetwork().eval()
        self.inputs: list[Tensor] = []
        self.live: list[Live] = []
        self.lines: list[str] = []
        self.shown: set[str] = set()
        self.calls: list[tuple[str, Live]] = []  # learned layers, and what each was called on
        self.usual_width = rng.randint(2, 12)

    def pick(self, options: Sequence[T]) -> T:
        return self.rng.choice(options)

    def chance(self, one_in: int) -> bool:
        return self.rng.randint(1, one_in) == one_in

    def width(self) -> int:
        return self.rng.randint(2, 12) if self.chance(2) else self.usual_width

    def source(self) -> Live:
        """Mostly the newest tensor that nothing reads yet."""
        unused = [x for x in reversed(self.live) if not x.used]
        if not unused or self.chance(4):
            return self.pick(self.live[::-1])
        return self.pick([unused[0], *unused])

    def like(self, x: Live, fits: Callable[[Live], bool]) -> list[Live]:
        """Other tensors of its kind, the newest first."""
        return [y for y in reversed(self.live) if y is not x and y.kind == x.kind and fits(y)]

    def input(self, kind: str) -> None:
        sizes = {
            "image": lambda: (self.pick([3, 1, 2, 4]), self.pick([8, 6, 9, 12]), self.pick([8, 6, 7, 12])),
            "sequence": lambda: (self.pick([3, 1, 2, 4]), self.pick([8, 6, 9, 12])),
            "tokens": lambda: (self.pick([4, 3, 6, 8]), self.width()),
            "vector": lambda: (self.width(),),
        }
        value = torch.randn(BATCH, *sizes[kind](), generator=self.generator)
        self.inputs.append(value)
        self.live.append(Live(len(self.live), kind, value))
        self.lines.append(f"t{len(self.live) - 1} = input()  # {kind} {tuple(value.shape)}")

    def layer(self, name: str, layer: nn.Module | nn.Parameter) -> str:
        """Keep a layer or parameter under a new name, with random numbers in it."""
        name = f"{name}{len(self.model.steps)}"
        while hasattr(self.model, name):
            name += "_"
        if isinstance(layer, nn.Parameter):
            layer.normal_(1.0, 0.3, generator=self.generator)
        else:
            randomize(layer.eval(), self.generator)
        setattr(self.model, name, layer)
        return name

    def add(
        self, run: Callable[..., Any], sources: Iterable[Live], *layers: str, kind: str = "", **options: Any
    ) -> list[Live]:
        """Write one step and run it; its results have the kind of the first source, or ``kind``."""
        sources = list(sources)
        step = Step(run, tuple(x.number for x in sources), layers, options)
        values = self.model.results(step, [x.value for x in self.live])
        self.model.steps.append(step)
        for x in sources:
            x.used = True
        new = [Live(len(self.live) + i, kind or sources[0].kind, value) for i, value in enumerate(values)]
        self.live += new
        notes = [f"{x.kind} {tuple(x.value.shape)}" for x in new] + [self.shape_of(n) for n in layers]
        names = ", ".join(f"t{x.number}" for x in new)
        self.lines.append(f"{names} = {step}  # {'; '.join(note for note in notes if note)}")
        return [self.small(x) for x in new]

    def one(
        self, run: Callable[..., Any], sources: Iterable[Live], *layers: str, kind: str = "", **options: Any
    ) -> Live:
        return self.add(run, sources, *layers, kind=kind, **options)[0]

    def call(self, x: Live, layer: nn.Module, *, weight_of: str = "") -> Live:
        """Write the call of a new layer, its weight perhaps that of another layer."""
        name = self.layer(type(layer).__name__.lower(), layer)
        if weight_of:
            layer.weight = self.model.get_submodule(weight_of).weight
            self.lines.append(f"{name}.weight = {weight_of}.weight")
        if next(layer.parameters(), None) is not None:
            self.calls.append((name, x))
        y = self.one(call, [x], name)
        y.overwritable = isinstance(layer, CONVS | nn.Linear | nn.BatchNorm1d | nn.BatchNorm2d)
        return y

    def runnable_on(self, x: Live) -> list[str]:
        """Learned layers that ran on such a tensor, of at most its size; the newest first."""
        return [
            name
            for name, at in reversed(self.calls)
            if (at.kind, at.width) == (x.kind, x.width) and all(a <= b for a, b in zip(at.space, x.space, strict=True))
        ]

    def small(self, x: Live) -> Live:
        return self.one(times, [x], by=0.05) if float(x.value.abs().max()) > LARGEST_VALUE else x

    def shape_of(self, name: str) -> str:
        if name in self.shown:
            return ""
        self.shown.add(name)
        layer = getattr(self.model, name)
        text = str(layer) if isinstance(layer, nn.Module) else f"Parameter{tuple(layer.shape)}"
        return f"{name} = {' '.join(text.split())}"


def randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Random parameters and statistics, so that nothing is 0 or 1 by chance and activations stay of order 1."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if isinstance(module, nn.PReLU):
                p.uniform_(0.1, 0.6, generator=generator)
            elif not name.endswith("weight"):
                p.normal_(0.0, 0.3, generator=generator)
            elif p.ndim == 1:
                p.uniform_(0.5, 1.5, generator=generator)
            else:
                out = 1 if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d) else 0
                p.normal_(0.0, (p.numel() / p.shape[out]) ** -0.5, generator=generator)
        for name, buffer in module.named_buffers(recurse=False):
            if name == "running_mean":
                buffer.normal_(0.0, 0.3, generator=generator)
            elif name == "running_var":
                buffer.uniform_(0.5, 2.0, generator=generator)


# ---- what steps run ------------------------------------------------------------------------------------------------


def call(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x)


def plus(x: Tensor, constant: float) -> Tensor:
    return x + constant


def times(x: Tensor, by: float) -> Tensor:
    return by * x


def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def sub(x: Tensor, y: Tensor) -> Tensor:
    return x - y


def mul(x: Tensor, y: Tensor) -> Tensor:
    return x * y


def maximum(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x, y)


def stack_sum(x: Tensor, y: Tensor, dim: int) -> Tensor:
    return torch.stack([x, y], dim).sum(dim)


def cat(*xs: Tensor, dim: int) -> Tensor:
    return torch.cat(xs, dim)


def chunk(x: Tensor, n: int, dim: int) -> tuple[Tensor, ...]:
    return torch.chunk(x, n, dim)


def split(x: Tensor, n: int, dim: int) -> tuple[Tensor, ...]:
    return torch.split(x, x.shape[dim] // n, dim)


def gate(x: Tensor, dim: int) -> Tensor:
    a, b = x.chunk(2, dim)
    return a * torch.sigmoid(b)


def glu(x: Tensor, dim: int) -> Tensor:
    return F.glu(x, dim)


def relu_(x: Tensor) -> Tensor:
    return F.relu(x, inplace=True)


def squeeze_excite(x: Tensor, down: nn.Module, up: nn.Module) -> Tensor:
    means = x.mean(tuple(range(2, x.ndim)), keepdim=True)
    return x * torch.sigmoid(up(F.relu(down(means))))


def linear_transposed(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight.t())


def pad(x: Tensor, width: tuple[int, ...], value: float) -> Tensor:
    return F.pad(x, width, value=value)


def adaptive_pool(x: Tensor, size: int, largest: bool) -> Tensor:
    if x.ndim == 4:
        return F.adaptive_max_pool2d(x, size) if largest else F.adaptive_avg_pool2d(x, size)
    return F.adaptive_max_pool1d(x, size) if largest else F.adaptive_avg_pool1d(x, size)


def interpolate(x: Tensor, mode: str) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode=mode)


def resize_like(x: Tensor, y: Tensor) -> Tensor:
    return F.interpolate(x, size=y.shape[2:])


def pixel_shuffle(x: Tensor) -> Tensor:
    return F.pixel_shuffle(x, 2)


def pixel_unshuffle(x: Tensor) -> Tensor:
    return F.pixel_unshuffle(x, 2)


def every_second(x: Tensor, dim: int, start: int) -> Tensor:
    return x[(slice(None),) * dim + (slice(start, None, 2),)]


def without_first(x: Tensor) -> Tensor:
    return x[..., 1:] if x.ndim == 4 else x[:, :, 1:]


def halve_if_longer(x: Tensor, dim: int, than: int) -> Tensor:
    if x.shape[dim] > than:
        return every_second(x, dim, 0)
    return x


def first_channels(x: Tensor, n: int, dim: int) -> Tensor:
    return x.narrow(dim, 0, n)


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    b, c, *space = x.shape
    return x.view(b, groups, c // groups, *space).transpose(1, 2).reshape(b, c, *space)


def multiply_by(x: Tensor, parameter: Tensor) -> Tensor:
    return x * parameter


def add_to(x: Tensor, parameter: Tensor) -> Tensor:
    return x + parameter


def flatten(x: Tensor) -> Tensor:
    return torch.flatten(x, 1)


def view_flat(x: Tensor) -> Tensor:
    return x.contiguous().view(x.shape[0], -1)


def reshape_written(x: Tensor, size: tuple[int, ...]) -> Tensor:
    return x.reshape(-1, *size)


def mean(x: Tensor, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    return x.mean(dim, keepdim=keepdim)


def amax(x: Tensor, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    return x.amax(dim, keepdim=keepdim)


def take(x: Tensor, position: int) -> Tensor:
    return x[:, position]


def image_to_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def tokens_to_image(x: Tensor, height: int) -> Tensor:
    b, t, f = x.shape
    return x.transpose(1, 2).reshape(b, f, height, t // height)


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def swap(x: Tensor) -> Tensor:
    return x.permute(0, 2, 1)


def attention(x: Tensor, qkv: nn.Module, project: nn.Module, heads: int) -> Tensor:
    b, t, _ = x.shape
    q, k, v = (y.reshape(b, t, heads, -1).transpose(1, 2) for y in qkv(x).chunk(3, -1))
    return project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))


def attention_unbound(x: Tensor, qkv: nn.Module, project: nn.Module, heads: int) -> Tensor:
    b, t, _ = x.shape
    y = qkv(x)
    q, k, v = y.view(b, t, 3, heads, y.shape[-1] // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return project(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def attention_apart(
    x: Tensor, y: Tensor, query: nn.Module, key: nn.Module, value: nn.Module, project: nn.Module, heads: int
) -> Tensor:
    """Tokens x look at tokens y; softmax by hand."""
    q, k, v = (
        z.view(z.shape[0], z.shape[1], heads, z.shape[2] // heads).permute(0, 2, 1, 3)
        for z in (query(x), key(y), value(y))
    )
    weights = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, -1)
    mixed = weights @ v
    return project(mixed.permute(0, 2, 1, 3).reshape(x.shape[0], x.shape[1], -1))


def self_attention(x: Tensor, layer: nn.MultiheadAttention) -> Tensor:
    return layer(x, x, x, need_weights=False)[0]


# ---- instructions: each writes steps behind x, or returns False where x does not fit -------------------------------

CONVS = nn.Conv1d | nn.Conv2d
ACTIVATIONS: tuple[Callable[..., Tensor], ...] = (
    F.relu,
    F.gelu,
    F.silu,
    F.sigmoid,
    F.tanh,
    F.hardswish,
    F.leaky_relu,
    F.elu,
    F.softplus,
)


def conv_class(x: Live) -> type[nn.Conv1d] | type[nn.Conv2d]:
    return nn.Conv2d if x.kind == "image" else nn.Conv1d


def conv_options(w: Writer, x: Live) -> dict[str, Any]:
    kernel, dilation = (w.pick([3, 1, 2, 5]),) * len(x.space), 2 if w.chance(4) else 1
    if x.kind == "image" and w.chance(6):
        kernel = w.pick([(3, 1), (1, 5), (3, 5)])
    reach = [(k - 1) * dilation + 1 for k in kernel]
    paddings: list[tuple[int, ...] | str] = [tuple(r // 2 for r in reach)]
    if all(r % 2 for r in reach):  # of other sizes torch warns
        paddings.insert(0, "same")
    if all(r <= n for r, n in zip(reach, x.space, strict=True)):
        paddings.append((0,) * len(kernel))
    padding, stride = w.pick(paddings), 1
    if padding != "same" and w.chance(2) and x.narrowest > 2:
        stride = 2
    return {"kernel_size": kernel, "dilation": dilation, "padding": padding, "stride": stride, "bias": w.chance(2)}


def to_width(w: Writer, x: Live, width: int) -> Live:
    """A convolution that looks at single pixels, or a linear layer."""
    if x.kind in ("image", "sequence"):
        return w.call(x, conv_class(x)(x.width, width, 1))
    return w.call(x, nn.Linear(x.width, width, bias=not w.chance(3)))


def conv(w: Writer, x: Live) -> bool:
    w.call(x, conv_class(x)(x.width, w.width(), **conv_options(w, x)))
    return True


def linear(w: Writer, x: Live) -> bool:
    to_width(w, x, w.width())
    return True


def learned(w: Writer, x: Live) -> bool:
    return conv(w, x) if x.kind in ("image", "sequence") else linear(w, x)


def block(w: Writer, x: Live) -> bool:
    """Layer, norm, activation."""
    learned(w, x)
    norm(w, w.live[-1])
    return activation(w, w.live[-1])


def depthwise(w: Writer, x: Live) -> bool:
    many = 2 if w.chance(3) and x.width <= 8 else 1
    w.call(x, conv_class(x)(x.width, many * x.width, groups=x.width, **conv_options(w, x)))
    return True


def grouped(w: Writer, x: Live) -> bool:
    groups = [g for g in (2, 3, 4) if x.width % g == 0]
    if not groups:
        return False
    g = w.pick(groups)
    w.call(x, conv_class(x)(x.width, g * w.pick([2, 1, 3]), groups=g, **conv_options(w, x)))
    return True


def transposed(w: Writer, x: Live) -> bool:
    kernel, stride = w.pick([2, 3]), w.pick([2, 1])
    if (max(x.space) - 1) * stride + kernel > MOST_SPACE:
        return False
    make = nn.ConvTranspose2d if x.kind == "image" else nn.ConvTranspose1d
    groups = 2 if w.chance(4) and x.width % 2 == 0 else 1
    w.call(x, make(x.width, groups * w.pick([3, 2, 4]), kernel, stride, groups=groups, bias=w.chance(2)))
    return True


def causal_conv(w: Writer, x: Live) -> bool:
    kernel, dilation = w.pick([3, 2, 5]), w.pick([1, 2])
    padded = w.one(pad, [x], width=((kernel - 1) * dilation, 0), value=0.0)
    w.call(padded, nn.Conv1d(x.width, w.width(), kernel, dilation=dilation))
    return True


def norm(w: Writer, x: Live) -> bool:
    if x.kind == "tokens":
        return layer_norm(w, x)
    make = nn.BatchNorm2d if x.kind == "image" else nn.BatchNorm1d
    rare = w.chance(8)
    w.call(x, make(x.width, affine=not rare, track_running_stats=not (rare and w.chance(2))))
    return True


def layer_norm(w: Writer, x: Live) -> bool:
    plain = w.chance(4)
    w.call(x, nn.LayerNorm(x.width, elementwise_affine=not plain, bias=not plain and not w.chance(3)))
    return True


def group_norm(w: Writer, x: Live) -> bool:
    groups = [g for g in (2, 1, 3, 4, x.width) if x.width % g == 0 and x.width // g * max(x.space) > 1]
    in_order = x.value.stride() == torch.empty(x.value.shape).stride()
    if not groups or not in_order:  # torch 2.13 crashes in the backward of a channels_last input without a gradient
        return False
    w.call(x, nn.GroupNorm(w.pick(groups), x.width))
    return True


def instance_norm(w: Writer, x: Live) -> bool:
    if max(x.space) < 2:
        return False
    make = nn.InstanceNorm2d if x.kind == "image" else nn.InstanceNorm1d
    w.call(x, make(x.width, affine=w.chance(2), track_running_stats=w.chance(2)))
    return True


def activation(w: Writer, x: Live) -> bool:
    if x.overwritable and not x.used and w.chance(4):
        w.one(relu_, [x])
    else:
        w.one(w.pick(ACTIVATIONS), [x])
    return True


def prelu(w: Writer, x: Live) -> bool:
    w.call(x, nn.PReLU(x.width if x.axis == 1 and w.chance(2) else 1))
    return True


def constant(w: Writer, x: Live) -> bool:
    if w.chance(2):
        w.one(plus, [x], constant=w.pick([1.0, -0.5]))
    else:
        w.one(times, [x], by=w.pick([0.5, -2.0]))
    return True


def pool(w: Writer, x: Live) -> bool:
    kernels = [k for k in (2, 3) if k <= x.narrowest]
    if not kernels or w.chance(5):
        w.one(adaptive_pool, [x], size=w.pick([2, 1, 3]), largest=w.chance(3))
        return True
    pools = (nn.MaxPool2d, nn.AvgPool2d) if x.kind == "image" else (nn.MaxPool1d, nn.AvgPool1d)
    w.call(x, w.pick(pools)(w.pick(kernels), stride=w.pick([2, 1]), padding=w.pick([0, 1])))
    return True


def dropout(w: Writer, x: Live) -> bool:
    w.call(x, nn.Dropout2d(0.2) if x.kind == "image" and w.chance(2) else nn.Dropout(0.2))
    return True


def pad_space(w: Writer, x: Live) -> bool:
    if max(x.space) + 2 > MOST_SPACE:
        return False
    w.one(pad, [x], width=w.pick([(1, 1), (0, 1)]) * len(x.space), value=w.pick([0.0, 1.0]))
    return True


def pad_channels(w: Writer, x: Live) -> bool:
    w.one(pad, [x], width=(0, 0) * len(x.space) + w.pick([(0, 2), (1, 1)]), value=0.0)
    return True


def partner(w: Writer, x: Live) -> Live:
    """Another tensor of its shape: one from the pool, or a new branch."""
    others = w.like(x, lambda y: y.value.shape == x.value.shape)
    if others and not w.chance(5):
        return w.pick(others)
    return to_width(w, w.pick(w.like(x, lambda y: y.space == x.space) or [x]), x.width)


def two(w: Writer, x: Live) -> bool:
    w.one(w.pick([add, add, sub, mul, maximum]), [x, partner(w, x)])
    return True


def stacked(w: Writer, x: Live) -> bool:
    w.one(stack_sum, [x, partner(w, x)], dim=w.pick([0, 1, -1]))
    return True


def concat(w: Writer, x: Live) -> bool:
    """Mostly of different tensors, newest first."""
    others = [*w.like(x, lambda y: y.space == x.space), x]
    parts = [x, *(w.pick(others) for _ in range(w.pick([1, 2])))]
    if sum(y.width for y in parts) > MOST_CHANNELS:
        return False
    w.one(cat, parts, dim=w.pick([x.axis, x.axis - x.value.ndim]))
    return True


def pieces(w: Writer, x: Live) -> bool:
    n = [n for n in (2, 3, 4) if x.width % n == 0 and x.width > n]
    if not n:
        x, n = to_width(w, x, 6), [2, 3]
    w.add(w.pick([chunk, split]), [x], n=w.pick(n), dim=x.axis)
    return True


def gated(w: Writer, x: Live) -> bool:
    if x.width % 2:
        x = to_width(w, x, 2 * w.pick([3, 2, 4]))
    w.one(w.pick([gate, glu]), [x], dim=w.pick([x.axis, x.axis - x.value.ndim]))
    return True


def excite(w: Writer, x: Live) -> bool:
    inner, make = w.pick([2, 3, 4]), conv_class(x)
    w.one(squeeze_excite, [x], w.layer("down", make(x.width, inner, 1)), w.layer("up", make(inner, x.width, 1)))
    return True


def residual(w: Writer, x: Live) -> bool:
    """x + layer(activation(norm(layer(x)))), the norm in front for tokens."""
    y = x
    if x.kind == "tokens":
        layer_norm(w, x)
        y = w.live[-1]
    elif w.chance(2):
        norm(w, x)
        y = w.live[-1]
    y = to_width(w, y, w.width())
    if x.kind in ("image", "sequence"):
        inner = 1 if w.chance(2) else y.width
        y = w.call(y, conv_class(x)(y.width, y.width, 3, padding="same", groups=inner, bias=w.chance(2)))
        norm(w, y)
        y = w.live[-1]
    activation(w, y)
    w.one(add, [x, to_width(w, w.live[-1], x.width)])
    return True


def scaled(w: Writer, x: Live) -> bool:
    """A learned number for each channel, or for each position."""
    if x.kind == "tokens" and w.chance(2):
        size: tuple[int, ...] = (1, *x.value.shape[1:])
    else:
        size = (x.width,) + (1,) * (x.value.ndim - 1 - x.axis)
        size = (1, *size) if w.chance(2) else size
    w.one(w.pick([multiply_by, add_to]), [x], w.layer("parameter", nn.Parameter(torch.empty(size))))
    return True


def again(w: Writer, x: Live) -> bool:
    """A layer that already ran, called on another tensor or on its own result."""
    fits = w.runnable_on(x)
    if fits:
        w.one(call, [x], w.pick(fits))
        return True
    y = to_width(w, x, x.width)  # d(d(x))
    w.one(call, [y], w.calls[-1][0])
    return True


def tied(w: Writer, x: Live) -> bool:
    """A new layer with the weight of an old one."""
    fits = [name for name in w.runnable_on(x) if isinstance(w.model.get_submodule(name), CONVS | nn.Linear)]
    if not fits:
        x = to_width(w, x, x.width)
        fits = [w.calls[-1][0]]
    name = w.pick(fits)
    w.call(x, copy.deepcopy(getattr(w.model, name)), weight_of=name)
    return True


def tied_transposed(w: Writer, x: Live) -> bool:
    layers = ((n, getattr(w.model, n)) for n, _ in w.calls)
    fits = [n for n, layer in layers if isinstance(layer, nn.Linear) and layer.out_features == x.width]
    if not fits:
        return False
    w.one(linear_transposed, [x], w.pick(fits[::-1]))
    return True


def attend(w: Writer, x: Live) -> bool:
    heads, size = w.pick([2, 1, 3]), w.pick([2, 3, 4])
    inner, out = heads * size, nn.Linear(heads * size, x.width)
    if w.chance(3):
        y = w.pick([*w.like(x, lambda _: True), x])
        parts = [nn.Linear(x.width, inner), nn.Linear(y.width, inner), nn.Linear(y.width, inner), out]
        names = [w.layer(n, p) for n, p in zip(("query", "key", "value", "project"), parts, strict=True)]
        w.one(attention_apart, [x, y], *names, heads=heads)
    else:
        names = [w.layer("qkv", nn.Linear(x.width, 3 * inner, bias=w.chance(2))), w.layer("project", out)]
        w.one(w.pick([attention, attention_unbound]), [x], *names, heads=heads)
    if w.chance(2):
        w.one(add, [x, w.live[-1]])
    return True


def multihead(w: Writer, x: Live) -> bool:
    heads = w.pick([h for h in (2, 1, 3) if x.width % h == 0])
    w.one(self_attention, [x], w.layer("multihead", nn.MultiheadAttention(x.width, heads, batch_first=True)))
    return True


def interpolated(w: Writer, x: Live) -> bool:
    if w.chance(2):
        w.one(resize_like, [x, w.pick([*w.like(x, lambda _: True), x])])
        return True
    if 2 * max(x.space) > MOST_SPACE:
        return False
    w.one(interpolate, [x], mode=w.pick(["nearest", "bilinear" if x.kind == "image" else "linear"]))
    return True


def pixels(w: Writer, x: Live) -> bool:
    """Channels become pixels, or pixels channels."""
    if x.kind == "image" and 4 * x.width <= MOST_CHANNELS and all(n % 2 == 0 for n in x.space):
        w.one(pixel_unshuffle, [x])
        return True
    if x.kind != "image" or 2 * max(x.space) > MOST_SPACE:
        return False
    w.one(pixel_shuffle, [x if x.width % 4 == 0 else to_width(w, x, w.pick([8, 4, 12]))])
    return True


def shuffled(w: Writer, x: Live) -> bool:
    groups = w.pick([2, 3])
    w.one(shuffle_channels, [x if x.width % groups == 0 else to_width(w, x, 2 * groups)], groups=groups)
    return True


def sliced(w: Writer, x: Live) -> bool:
    """Some of the pixels, steps or tokens."""
    dim = w.pick([dim for dim in range(1, x.value.ndim) if dim != x.axis])
    if x.value.shape[dim] < 2:
        return False
    if w.chance(3):
        w.one(halve_if_longer, [x], dim=dim, than=4)
    else:
        w.one(every_second, [x], dim=dim, start=w.pick([0, 1]))
    return True


def narrowed(w: Writer, x: Live) -> bool:
    if x.width < 3:
        return False
    w.one(first_channels, [x], n=x.width - w.pick([1, 2]), dim=x.axis)
    return True


def to_tokens(w: Writer, x: Live) -> bool:
    if x.kind == "sequence":
        w.one(swap, [x], kind="tokens")
    else:
        w.one(w.pick([image_to_tokens, channels_last]), [x], kind="tokens")
    return True


def from_tokens(w: Writer, x: Live) -> bool:
    length = x.space[0]
    if w.chance(2) and length <= MOST_SPACE**2:
        heights = [h for h in (2, 1, 3, 4) if length % h == 0 and length // h <= MOST_SPACE]
        if not heights:
            return False
        w.one(tokens_to_image, [x], height=w.pick(heights), kind="image")
    else:
        w.one(swap, [x], kind="sequence")
    return True


def written(w: Writer, x: Live) -> bool:
    """Another shape, its sizes written as numbers."""
    if x.kind == "vector":
        n = [n for n in (2, 3, 4) if x.width % n == 0]
        if not n:
            return False
        parts = w.pick(n)
        w.one(reshape_written, [x], size=(parts, x.width // parts), kind=w.pick(["sequence", "tokens"]))
    else:
        w.one(reshape_written, [x], size=tuple(x.value.shape[1:]))
    return True


def to_vector(w: Writer, x: Live) -> Live:
    if x.kind == "vector":
        return x
    numel = x.value[0].numel()
    ways = ["mean", "flatten", "amax", "view", "take"] if numel <= MOST_FEATURES else ["mean", "amax"]
    way, dim = w.pick(ways), tuple(d for d in range(1, x.value.ndim) if d != x.axis)
    if way in ("flatten", "view"):
        return w.one(flatten if way == "flatten" else view_flat, [x], kind="vector")
    if way == "take" and x.kind == "tokens":
        return w.one(take, [x], position=w.pick([0, -1]), kind="vector")
    if way == "take":
        pooled = w.one(adaptive_pool, [x], size=w.pick([1, 2]), largest=False)
        return w.one(flatten, [pooled], kind="vector")
    return w.one(mean if way == "mean" else amax, [x], dim=dim, keepdim=False, kind="vector")


def vector(w: Writer, x: Live) -> bool:
    to_vector(w, x)
    return True


def mean_image(w: Writer, x: Live) -> bool:
    """Mean over the width of an image, which leaves a sequence, or over all of the space, which stays 1x1."""
    if x.kind == "image" and w.chance(2):
        w.one(mean, [x], dim=(w.pick([3, 2]),), keepdim=False, kind="sequence")
    else:
        w.one(mean, [x], dim=tuple(range(2, x.value.ndim)), keepdim=True)
    return True


def heads(w: Writer) -> None:
    """One or two linear heads on what no step has read, so that most steps matter."""
    unused = [x for x in reversed(w.live) if not x.used][:4]
    vectors = [to_vector(w, x) for x in unused]
    if len(vectors) > 1 and not w.chance(3):
        vectors = [w.one(cat, vectors, dim=1)]
    elif len(vectors) == 1 and w.chance(4):
        vectors *= 2
    w.model.ends = tuple(w.call(x, nn.Linear(x.width, w.pick([3, 2, 5]))).number for x in vectors[:2])
    w.lines.append(f"return {', '.join(f't{i}' for i in w.model.ends)}")


Instruction = Callable[[Writer, Live], bool]
KINDS = ("image", "sequence", "tokens", "image", "sequence", "tokens", "vector")
SPATIAL: list[Instruction] = [
    *(conv, conv, block, block, block, residual, residual, depthwise, depthwise, activation, activation, norm),
    *(two, two, two, concat, concat, pool, pool, pool, pool, grouped, transposed, prelu, constant, dropout, pad_space),
    *(pieces, gated, excite, scaled, again, instance_norm, group_norm, sliced, vector, to_tokens, to_tokens),
]
ODD_SPATIAL: list[Instruction] = [
    *(interpolated, pixels, pixels, shuffled, stacked, pad_channels, tied, narrowed, written, mean_image, again),
    *(group_norm, excite, pieces, to_tokens),
]
COMMON: dict[str, list[Instruction]] = {
    "image": SPATIAL,
    "sequence": [*SPATIAL, *[causal_conv] * 6],
    "tokens": [
        *(linear, linear, block, residual, residual, attend, attend, attend, layer_norm, activation, activation, two),
        *(
            two,
            concat,
            constant,
            dropout,
            pieces,
            gated,
            scaled,
            again,
            prelu,
            sliced,
            vector,
            from_tokens,
            from_tokens,
        ),
    ],
    "vector": [
        *(linear, linear, block, block, residual, activation, norm, two, two, concat, concat, constant, dropout),
        *(pieces, gated, scaled, again, prelu, layer_norm),
    ],
}
ODD: dict[str, list[Instruction]] = {
    "image": ODD_SPATIAL,
    "sequence": ODD_SPATIAL,
    "tokens": [tied, tied_transposed, stacked, narrowed, written, multihead, from_tokens, pieces],
    "vector": [tied, tied_transposed, stacked, narrowed, written, written, pieces],
}
