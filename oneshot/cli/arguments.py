"""What the arguments of the command line say."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..cost import COUNTED
from ..errors import ConfigurationError

__all__ = ["COSTS", "cost_names", "made", "missing_kernels", "sizes_of"]

COSTS = (*COUNTED, "peak_memory", "latency")
DTYPES = ("float32", "int64")


def cost_names(text: str | None, hardware: str | None) -> list[str]:
    if text is None:
        return ["params", "macs", *(["latency"] if hardware is not None else [])]
    names = ["latency" if name == "latency_ms" else name for name in text.split(",")]
    unknown = [name for name in names if name not in COSTS]
    if unknown:
        raise ConfigurationError(f"--cost {text}: {unknown} are not known; some of {list(COSTS)}, with commas")
    if "latency" in names and hardware is None:
        raise ConfigurationError(f"--cost {text}: latency is that of a hardware; say which, --hardware NAME-OR-PATH")
    if "latency" not in names and hardware is not None:
        raise ConfigurationError(f"--hardware {hardware}: --cost {text} asks for no latency; add latency to it")
    return list(dict.fromkeys(names))


def sizes_of(text: str) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of an input.

    >>> sizes_of("1,3,32,32"), sizes_of("1,16:int64")
    (((1, 3, 32, 32), 'float32'), ((1, 16), 'int64'))
    """
    sizes, _, dtype = (part.strip() for part in text.partition(":"))
    parts = [part.strip() for part in sizes.split(",")]
    if not all(part.isdecimal() and len(part) < 10 and int(part) > 0 for part in parts):
        raise ConfigurationError(f"--input {text!r}: whole numbers above 0 are needed, such as 1,3,224,224")
    if (dtype or "float32") not in DTYPES:
        raise ConfigurationError(f"--input {text!r}: {dtype!r} is not one of {DTYPES}")
    return tuple(int(part) for part in parts), dtype or "float32"


def missing_kernels(text: str | None) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in [] if text is None else text.split(","):
        name, _, ms = (piece.strip() for piece in part.rpartition("="))
        try:
            found[name] = float(ms)
        except ValueError:
            name = ""
        if not name:
            raise ConfigurationError(f"--missing {text}: {part!r} is not KERNEL=MS, such as fc=0.0,add=0.1")
    return found


@contextmanager
def made(target: str) -> Iterator[nn.Module]:
    """What the factory named by ``module:factory`` returns. A file's own folder can be imported from meanwhile."""
    where, _, attribute = target.rpartition(":")
    if not (where and attribute):
        raise ConfigurationError(
            f"{target!r} is not MODULE:FACTORY, such as search_spaces.mobilenet:proxylessnas or net.py:space"
        )
    before = list(sys.path)
    try:
        module = _file(Path(where)) if where.endswith(".py") else _module(where)
        model = _factory(module, where, attribute)()
        if not isinstance(model, nn.Module):
            raise ConfigurationError(f"{target}() returned a {type(model).__name__}; a torch.nn.Module is needed")
        yield model
    finally:
        sys.path[:] = before


def _module(name: str) -> Any:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ConfigurationError(f"{name!r} is neither the name of a module nor the path of a .py file")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and what it imports is not
        raise ConfigurationError(
            f"there is no module {error.name!r} here. The current folder is {os.getcwd()}; give the path of a .py "
            "file, or set PYTHONPATH"
        ) from error


def _file(path: Path) -> Any:
    name = f"_oneshot_cost_{path.stem}"  # no name of a module that is imported elsewhere
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigurationError(f"there is no file {str(path)!r}. The current folder is {os.getcwd()}")
    sys.path.insert(0, str(path.resolve().parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there for the module they are in
    spec.loader.exec_module(module)
    return module


def _factory(module: Any, where: str, attribute: str) -> Callable[[], Any]:
    found = module
    for name in attribute.split("."):
        if not hasattr(found, name):
            known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
            raise ConfigurationError(f"{where} has no {attribute!r}; what can be called there: {sorted(known)[:20]}")
        found = getattr(found, name)
    if isinstance(found, nn.Module) or not callable(found):
        raise ConfigurationError(
            f"{where}:{attribute} is a {type(found).__name__}; a function or class is needed that returns the network "
            "when it is called without arguments"
        )
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise ConfigurationError(
            f"{where}:{attribute} cannot be called without arguments: {error}. Write a function that gives them, in a "
            f"file of your own: def space(): return {attribute}(...)"
        ) from error
    except ValueError:
        pass  # something in C that does not say what it takes
    return found
