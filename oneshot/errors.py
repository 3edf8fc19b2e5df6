"""Every error of the library. Each message says what, where, got, allowed and what to do."""

from __future__ import annotations

__all__ = [
    "ArchMismatchError",
    "CheckpointError",
    "ConfigurationError",
    "DrawError",
    "ExportError",
    "InfeasibleTargetError",
    "InputTypeError",
    "LabelError",
    "OneshotError",
    "ShapeMismatchError",
    "TrainingDivergedError",
    "UnknownCostError",
    "UnsafePickleError",
    "UnsupportedModelError",
    "WorkerDiedError",
]


class OneshotError(Exception):
    """Base of all errors of the library, so that one ``except`` catches them."""


class ConfigurationError(OneshotError, ValueError):
    """An argument, or a combination of arguments, that cannot work; raised before any training."""


class LabelError(OneshotError, ValueError):
    """Two mutables carry one label and do not offer the same candidates, or a label cannot be used."""


class ShapeMismatchError(OneshotError, ValueError):
    """Candidates of one choice return outputs of different shape."""


class DrawError(OneshotError, RuntimeError):
    """A forward needs a random draw that has not been made: ``draw(model, generator)`` comes first."""


class ArchMismatchError(OneshotError, ValueError):
    """An architecture file or dict does not belong to this search space, or is damaged."""


class UnsupportedModelError(OneshotError, ValueError):
    """The network cannot be handled: it does not run, or has nothing to search."""


class UnknownCostError(OneshotError, KeyError):
    """No rule or table row prices a layer. Unknown is never 0."""

    def __str__(self) -> str:  # KeyError would print the repr, with escaped line ends
        return str(self.args[0])


class UnsafePickleError(OneshotError, ValueError):
    """A predictor file holds, or claims, something a random forest does not need; nothing of it was run."""


class InfeasibleTargetError(OneshotError, ValueError):
    """No architecture of the space meets the budget; the message carries the reachable minimum."""


class ExportError(OneshotError, RuntimeError):
    """The rebuilt network does not compute what the searched one computes; nothing was written."""


class CheckpointError(OneshotError, RuntimeError):
    """A checkpoint is missing, damaged, or belongs to something else."""


class TrainingDivergedError(OneshotError, ArithmeticError):
    """A loss became NaN or infinite; the message carries step, terms and the last good checkpoint."""


class WorkerDiedError(OneshotError, RuntimeError):
    """A process that loads data has died, killed by the system or by code in the dataset."""


class InputTypeError(OneshotError, TypeError):
    """An argument of a type that cannot work."""
