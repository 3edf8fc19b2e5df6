"""Where the searches of a sweep run: here one after the other, in processes of this machine, or under Ray."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, TypeVar

import torch

from ..errors import ConfigurationError

__all__ = ["check_backend", "check_travels", "run_all"]

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")
_BACKENDS = ("process", "ray")


def check_backend(backend: str, workers: int) -> None:
    """ConfigurationError for a number or name that cannot be used here."""
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise ConfigurationError(f"sweep: workers={workers!r}; an integer of at least 1 is needed")
    if backend not in _BACKENDS:
        raise ConfigurationError(f"sweep: backend={backend!r}; allowed are {list(_BACKENDS)}")
    if backend == "ray":
        _ray()


def check_travels(what: str, value: Any) -> None:
    """ConfigurationError for what cannot be sent to another process; functions inside of others can."""
    import joblib

    try:
        pickle.dumps(joblib.wrap_non_picklable_objects(value))
    except Exception as error:  # a pickler raises whatever the objects inside do
        raise ConfigurationError(
            f"sweep: {what} cannot be sent to other processes ({type(error).__name__}: {error}). It, and all it uses "
            "from outside, is copied there: make generators, open files, locks and the like inside of it, or give "
            "workers=1"
        ) from error


def run_all(
    function: Callable[[_Task], _Result], tasks: Sequence[_Task], *, backend: str, workers: int
) -> Generator[_Result, None, None]:
    """The results as they come, in any order."""
    if backend == "ray":
        yield from _under_ray(function, tasks, workers)
    elif workers == 1:
        yield from map(function, tasks)
    elif len(tasks) < 2:  # not worth a process
        yield from map(partial(_on_one_thread, function), tasks)
    else:
        yield from _in_processes(function, tasks, workers)


def _in_processes(
    function: Callable[[_Task], _Result], tasks: Sequence[_Task], workers: int
) -> Generator[_Result, None, None]:
    import joblib

    # Without max_nbytes: large arrays of a dataset would become read-only files.
    pool = joblib.Parallel(
        n_jobs=workers, backend="loky", return_as="generator_unordered", batch_size=1, max_nbytes=None
    )
    alone = joblib.delayed(_on_one_thread)
    with closing(pool(alone(function, task) for task in tasks)) as results:
        yield from results


def _under_ray(
    function: Callable[[_Task], _Result], tasks: Sequence[_Task], workers: int
) -> Generator[_Result, None, None]:
    ray = _ray()
    remote = ray.remote(partial(_on_one_thread, function))
    waiting, running = list(tasks), list[Any]()
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(remote.remote(waiting.pop(0)))
        done, running = ray.wait(running, num_returns=1)
        yield from ray.get(done)


def _on_one_thread(function: Callable[[_Task], _Result], task: _Task) -> _Result:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function(task)
    finally:
        torch.set_num_threads(before)


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigurationError("sweep: Ray is not installed: pip install 'oneshot-nas[ray]'") from error
