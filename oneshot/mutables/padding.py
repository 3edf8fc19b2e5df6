"""Candidates of different widths: zeros behind the outputs of the narrower ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor
from torch.nn import functional as F

__all__ = ["Padding"]


@final
class Padding:
    """Pads every output with zeros along ``dim`` up to ``width``, that of the widest; called on an output.

    Both are ``learn``ed from the outputs of all candidates, of one input. Outputs that are no single tensors, or that
    differ in the batch or in several dimensions, are left as they are.

    >>> import torch
    >>> padding = Padding()
    >>> padding.learn([torch.ones(1, 2, 4), torch.ones(1, 3, 4)])
    >>> padding(torch.ones(1, 2, 4)).sum((0, 2))
    tensor([4., 4., 0.])
    """

    def __init__(self) -> None:
        self.dim, self.width = 1, -1

    @property
    def is_known(self) -> bool:
        return self.width >= 0

    @property
    def is_needed(self) -> bool:
        return self.width > 0

    def learn(self, outputs: Sequence[Any]) -> None:
        shapes = [tuple(output.shape) for output in outputs if isinstance(output, Tensor)]
        self.width = 0
        if len(shapes) == len(outputs) and len({len(shape) for shape in shapes}) == 1:
            differing = [d for d, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
            if len(differing) == 1 and differing[0] > 0:
                self.dim = differing[0]
                self.width = max(shape[self.dim] for shape in shapes)

    def forget(self) -> None:
        """Learn the width anew at the next call: the candidates have been cut."""
        self.width = -1

    def __call__(self, output: Any) -> Any:
        if not self.is_needed or not isinstance(output, Tensor) or output.shape[self.dim] == self.width:
            return output
        behind = [0, 0] * (output.dim() - 1 - self.dim)
        return F.pad(output, [*behind, 0, self.width - output.shape[self.dim]])
