"""Endless, seeded batches that can be taken up again at any batch number."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import warnings
from collections.abc import Generator, Iterator, Sequence, Sized
from contextlib import contextmanager, nullcontext
from functools import partial
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, get_worker_info

from ..errors import ConfigurationError, WorkerDiedError

__all__ = ["BatchStream", "mix_seed", "worker_deaths_named"]


def mix_seed(*parts: int) -> int:
    """One seed in 0 … 2⁶³-1 out of several integers, the same on every machine and in every process.

    It is the first 63 bits of the 8-byte BLAKE2b digest of the decimal numbers, joined by commas.
    Neighbouring numbers give unrelated seeds, and the order counts; seed + pass would make pass 1
    of seed 0 equal to pass 0 of seed 1.

    >>> mix_seed(0, 1)
    1506311409109703068
    >>> mix_seed(0, 1) == mix_seed(1, 0)
    False
    """
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class BatchStream:
    """Endless random batches of some samples of a dataset.

    The batches are numbered 0, 1, 2, …; batch j belongs to pass k = j // ``batches_per_pass``. Pass k
    goes through the indices in the order of a permutation that depends on (seed, k) only, so no
    earlier batch has to be drawn to know a later one. With several processes a permutation is cut into
    global batches of batch_size · world_size samples, and rank r takes the r-th slice of each.

    The samples left over at the end of a pass are dropped, because BatchNorm needs whole batches; the
    next pass has another permutation, so no sample is left out for good.

    Before a sample is read, the generators that augmentation draws from (torch's default CPU
    generator, ``random``, and numpy's legacy global one) are seeded from (seed, pass, sample index).
    A sample therefore does not depend on the number of workers nor on where the stream started. A
    dataset that keeps a generator of its own is outside of this promise.

    Attributes:
        batches_per_pass: floor(len(indices) / (batch_size · world_size)).
        workers: number of loader processes in use, at most the CPU cores this process may use; the
            batches do not depend on it. 0 loads in the training process, and then leaves the three
            global generators as they were.

    Raises:
        ConfigurationError: an argument is out of range, or the samples do not fill one global batch.

    >>> data = TensorDataset(torch.arange(10))
    >>> stream = BatchStream(data, range(10), batch_size=4, seed=0)
    >>> stream.batches_per_pass  # 10 // 4, two samples are left over
    2
    >>> from itertools import islice
    >>> [first], [second] = islice(stream.iterate(0), 2)
    >>> len({*first.tolist(), *second.tolist()})
    8
    >>> [again] = next(stream.iterate(1))
    >>> bool((again == second).all())
    True
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        indices: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("workers", workers, 0),
            ("world_size", world_size, 1),
        ):
            if value < least:
                raise ConfigurationError(f"BatchStream: {name} is {value}; allowed is {least} or more.")
        if not 0 <= rank < world_size:
            raise ConfigurationError(
                f"BatchStream: rank is {rank} with world_size {world_size}; allowed is 0 to {world_size - 1}."
            )
        if isinstance(dataset, IterableDataset):
            raise ConfigurationError(
                f"BatchStream: {type(dataset).__name__} is an IterableDataset and cannot be read by sample "
                "index. Use a map-style dataset (__len__ and __getitem__)."
            )
        global_batch = batch_size * world_size
        self.batches_per_pass = len(indices) // global_batch
        if self.batches_per_pass == 0:
            raise ConfigurationError(
                f"BatchStream: {len(indices)} samples do not fill one batch of {global_batch} (batch_size "
                f"{batch_size} x world_size {world_size}), and incomplete batches are dropped. Use a "
                f"batch_size of at most {len(indices) // world_size}, or more samples."
            )
        self.workers = min(workers, _available_cores())
        self._dataset = dataset
        self._indices = _checked_indices(dataset, indices)
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._world_size = world_size

    def iterate(self, position: int) -> Generator[Any, None, None]:
        """The batches number ``position``, ``position`` + 1, … without end, collated as DataLoader does.

        Skipped batches are not loaded. Loader processes start at the first batch, serve all passes,
        and end when the generator is closed or garbage-collected. Until then a SIGTERM does not end them: a
        scheduler sends it to every process, and the step that this process still makes may need a batch.

        Raises:
            ConfigurationError: position is negative.
            WorkerDiedError: a loader process has died. What the dataset raises in one comes out as that type,
                with the traceback from there in its text.
        """
        if position < 0:
            raise ConfigurationError(f"BatchStream.iterate: position is {position}; allowed is 0 or more.")
        return self._load(position)

    def _load(self, position: int) -> Generator[Any, None, None]:
        is_over = multiprocessing.RawValue("b", 0)  # in memory that the loader processes share
        loader: DataLoader[Any] = DataLoader(
            _SeededSamples(self._dataset, self._seed),
            batch_sampler=self._batch_keys(position),
            num_workers=self.workers,
            # Without a generator of its own the loader draws one number from torch's global one.
            generator=torch.Generator().manual_seed(0),
            worker_init_fn=partial(_outlive_sigterm, is_over),
        )
        with warnings.catch_warnings():
            # From Python 3.12 on fork() warns when torch's compute threads run, that is always; the
            # workers never call into those threads, they compute with one.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            batches = iter(loader)
        # Also at the end of the interpreter, which ends and awaits what is still there.
        at_end = Finalize(None, _tell, args=(is_over,), exitpriority=0)
        try:
            with worker_deaths_named(), _broken_connections_named() if self.workers else nullcontext():
                yield from batches
        finally:
            at_end()

    def _batch_keys(self, position: int) -> Iterator[list[tuple[int, int]]]:
        """(pass number, sample index) of every sample of this rank, batch by batch from ``position``."""
        number, batch = divmod(position, self.batches_per_pass)
        while True:
            order = self._order(number)
            for j in range(batch, self.batches_per_pass):
                start = (j * self._world_size + self._rank) * self._batch_size
                yield [(number, index) for index in order[start : start + self._batch_size].tolist()]
            number, batch = number + 1, 0

    def _order(self, number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(mix_seed(self._seed, number))
        return self._indices[torch.randperm(len(self._indices), generator=generator)]


class _SeededSamples(Dataset[Any]):
    """Samples by (pass number, sample index), each read with generators seeded from both."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        # The exact class: a subclass may add augmentation.
        self.is_random = type(dataset) is not TensorDataset

    def __getitem__(self, key: tuple[int, int]) -> Any:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Any]:
        if not self.is_random:
            return [self.dataset[index] for _, index in keys]
        if get_worker_info() is not None:  # a worker's generators serve nothing else
            return [self._read(*key) for key in keys]
        with _global_generators_kept():
            return [self._read(*key) for key in keys]

    def _read(self, number: int, index: int) -> Any:
        seed = mix_seed(self.seed, number, index)
        # torch and numpy both start a Mersenne Twister from 32 bits: from the same 32 bits torch.rand
        # and numpy.random.rand would return related numbers. So they get different ones.
        torch.default_generator.manual_seed(seed)  # uses the low 32 bits
        np.random.seed(seed >> 31)  # noqa: NPY002 - augmentation code uses the legacy generator
        random.seed(seed)
        return self.dataset[index]


def _outlive_sigterm(is_over: Any, worker: int) -> None:
    """In a loader process: SIGTERM ends it only when no more batches are wanted, as torch does when it gets stuck."""

    def handler(number: int, frame: FrameType | None) -> None:
        if is_over.value:
            os._exit(0)

    signal.signal(signal.SIGTERM, handler)


def _tell(is_over: Any) -> None:
    is_over.value = 1


@contextmanager
def worker_deaths_named() -> Iterator[None]:
    """Inside, the death of a loader process is a WorkerDiedError. torch reports it wherever the program then is.

    >>> with worker_deaths_named():
    ...     raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    oneshot.errors.WorkerDiedError: a loader process has died: DataLoader worker (pid 7) is killed by signal: Killed...
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise _death(error) from error


@contextmanager
def _broken_connections_named() -> Iterator[None]:
    """Likewise where it is first seen as a connection that ends; what a dataset raises in a worker is "Caught ..."."""
    try:
        yield
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        if str(error).startswith("Caught "):
            raise
        raise _death(error) from error


def _death(error: Exception) -> WorkerDiedError:
    return WorkerDiedError(
        f"a loader process has died: {str(error).strip().rstrip('.') or type(error).__name__}. If the memory was full, "
        "use fewer workers; with workers=0 an error of the dataset shows itself. Resume from the last checkpoint"
    )


@contextmanager
def _global_generators_kept() -> Iterator[None]:
    torch_state = torch.default_generator.get_state()
    numpy_state = np.random.get_state()  # noqa: NPY002 - augmentation code uses the legacy generator
    python_state = random.getstate()
    try:
        yield
    finally:
        torch.default_generator.set_state(torch_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)


def _checked_indices(dataset: Dataset[Any], indices: Sequence[int]) -> torch.Tensor:
    checked = torch.tensor(list(indices), dtype=torch.int64)
    low, high = int(checked.min()), int(checked.max())
    if low < 0 or (isinstance(dataset, Sized) and high >= len(dataset)):
        allowed = f"0 to {len(dataset) - 1}" if isinstance(dataset, Sized) else "0 or more"
        raise ConfigurationError(
            f"BatchStream: the indices go from {low} to {high}; {type(dataset).__name__} allows {allowed}. "
            "Was the split made for another dataset?"
        )
    return checked


def _available_cores() -> int:
    # The same count as DataLoader's own, which warns about more workers than that.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
