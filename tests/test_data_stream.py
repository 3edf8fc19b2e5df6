from __future__ import annotations

import gc
import multiprocessing
import random
import threading
import warnings
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from oneshot.data import BatchStream, mix_seed
from oneshot.errors import ConfigurationError


class Noisy(Dataset[Any]):
    """(index, one random number of each of the three global generators)."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        if not 0 <= index < self.n:
            raise IndexError(index)
        self.read.append(index)
        numpy_number = np.random.rand()
        return index, torch.tensor([float(torch.rand(())), random.random(), numpy_number], dtype=torch.float64)


class Broken(Noisy):
    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        torch.rand(())
        raise OSError("sample cannot be read")


def take(stream: BatchStream, position: int, count: int) -> list[tuple[list[int], list[list[float]]]]:
    batches = stream.iterate(position)
    taken = [(index.tolist(), noise.tolist()) for index, noise in islice(batches, count)]
    batches.close()
    return taken


def global_states() -> tuple[list[int], Any, list[int]]:
    numpy_state: Any = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), [*numpy_state[1].tolist(), numpy_state[2]]


def test_batches_are_the_same_bit_for_bit_with_any_number_of_workers() -> None:
    # 3 batches per pass: 8 batches from number 2 on go over the ends of three passes.
    streams = [BatchStream(Noisy(23), range(1, 22), batch_size=6, seed=4, workers=w) for w in (0, 1, 2)]
    alone, one, two = (take(stream, 2, 8) for stream in streams)
    assert alone == one == two


def test_a_later_start_is_the_tail_of_the_whole_stream() -> None:
    stream = BatchStream(Noisy(14), range(14), batch_size=4, seed=0)
    whole = take(stream, 0, 10)
    for position in range(7):
        assert take(stream, position, 10 - position) == whole[position:]


def test_skipped_batches_are_not_loaded() -> None:
    dataset = Noisy(12)
    take(BatchStream(dataset, range(12), batch_size=4, seed=0), 3000, 1)
    assert len(dataset.read) == 4


def test_a_sample_changes_between_passes_and_with_the_seed_and_not_with_the_batch_size() -> None:
    def noise_of_pass(number: int, batch_size: int, seed: int) -> dict[int, list[float]]:
        stream = BatchStream(Noisy(8), range(8), batch_size=batch_size, seed=seed)
        per_pass = 8 // batch_size
        return {
            index: noise
            for batch in take(stream, number * per_pass, per_pass)
            for index, noise in zip(*batch, strict=True)
        }

    first = noise_of_pass(0, 4, seed=0)
    assert sorted(first) == list(range(8))
    assert noise_of_pass(0, 2, seed=0) == first
    for other in (noise_of_pass(1, 4, seed=0), noise_of_pass(0, 4, seed=1)):
        # All 3 x 8 numbers differ: no generator was left out of the seeding.
        assert all(a != b for i in range(8) for a, b in zip(first[i], other[i], strict=True))


def test_the_generators_do_not_return_the_same_bits() -> None:
    # torch and numpy run one algorithm: with equal seeds the first 32-bit word of torch.randint is the
    # second of numpy's randint.
    seen: list[int] = []

    class Words(Noisy):
        def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
            seen.extend(torch.randint(2**32, (2,)).tolist())
            seen.extend(np.random.randint(2**32, size=2, dtype=np.uint64).tolist())
            return super().__getitem__(index)

    take(BatchStream(Words(20), range(20), batch_size=20, seed=0), 0, 1)
    assert len(set(seen)) == len(seen) == 80  # 20 samples, 4 words each


def test_each_pass_is_a_permutation_of_the_given_samples() -> None:
    indices = [3, 5, 8, 13, 21, 34]
    stream = BatchStream(Noisy(40), indices, batch_size=2, seed=9)
    assert stream.batches_per_pass == 3  # 6 // 2
    orders = []
    for number in range(5):
        order = [index for batch, _ in take(stream, number * 3, 3) for index in batch]
        assert sorted(order) == indices
        orders.append(tuple(order))
    # 5 of 720 orders: equal ones have chance 1.4 %, and the seed is fixed.
    assert len(set(orders)) == 5


def test_the_left_over_samples_change_from_pass_to_pass() -> None:
    stream = BatchStream(Noisy(7), range(7), batch_size=3, seed=1)
    assert stream.batches_per_pass == 2  # 7 // 3, one sample is left over
    seen: set[int] = set()
    for number in range(6):
        in_pass = [index for batch, _ in take(stream, number * 2, 2) for index in batch]
        assert len(set(in_pass)) == 6
        seen |= set(in_pass)
    assert seen == set(range(7))


def test_the_ranks_share_the_global_batch_in_order() -> None:
    def stream(batch_size: int, rank: int, world_size: int) -> BatchStream:
        return BatchStream(Noisy(20), range(20), batch_size=batch_size, seed=6, rank=rank, world_size=world_size)

    whole = take(stream(6, 0, 1), 1, 7)
    first, second = take(stream(3, 0, 2), 1, 7), take(stream(3, 1, 2), 1, 7)
    joined = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(first, second, strict=True)]
    assert joined == whole
    assert stream(3, 1, 2).batches_per_pass == 3  # 20 // (3 * 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_global_generators_alone(workers: int) -> None:
    before = global_states()
    take(BatchStream(Noisy(9), range(9), batch_size=3, seed=0, workers=workers), 0, 5)
    assert global_states() == before


def test_the_global_generators_come_back_after_a_failing_sample() -> None:
    before = global_states()
    with pytest.raises(OSError, match="sample cannot be read"):
        next(BatchStream(Broken(4), range(4), batch_size=2, seed=0).iterate(0))
    assert global_states() == before


def test_the_training_random_numbers_do_not_change_the_batches() -> None:
    stream = BatchStream(Noisy(9), range(9), batch_size=3, seed=0)
    quiet = take(stream, 0, 6)
    disturbed = []
    for index, noise in islice(stream.iterate(0), 6):
        torch.rand(5), random.random(), np.random.rand(5)
        disturbed.append((index.tolist(), noise.tolist()))
    assert disturbed == quiet


def test_a_tensor_dataset_is_read_without_seeding_and_in_the_same_order() -> None:
    plain = BatchStream(TensorDataset(torch.arange(10)), range(10), batch_size=4, seed=2)
    noisy = BatchStream(Noisy(10), range(10), batch_size=4, seed=2)
    before = global_states()
    orders = [batch.tolist() for (batch,) in islice(plain.iterate(0), 6)]
    assert orders == [index for index, _ in take(noisy, 0, 6)]
    assert global_states() == before


def test_close_and_garbage_collection_end_the_workers() -> None:
    stream = BatchStream(Noisy(9), range(9), batch_size=3, seed=0, workers=1)
    assert stream.workers == 1
    others = set(multiprocessing.active_children())
    batches = stream.iterate(0)
    assert set(multiprocessing.active_children()) == others  # nothing starts before the first batch
    next(batches)
    assert len(set(multiprocessing.active_children()) - others) == 1
    batches.close()
    assert set(multiprocessing.active_children()) == others
    forgotten = stream.iterate(0)
    next(forgotten)
    assert len(set(multiprocessing.active_children()) - others) == 1
    del forgotten
    gc.collect()
    assert set(multiprocessing.active_children()) == others


def test_workers_start_without_a_warning_while_other_threads_run() -> None:
    # Python 3.12 and later warn about fork() in a process with threads, and training always has some.
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            take(BatchStream(Noisy(4), range(4), batch_size=2, seed=0, workers=1), 0, 3)
    finally:
        stop.set()
        thread.join()
    assert [str(warning.message) for warning in caught] == []


def test_more_workers_than_cores_are_not_started() -> None:
    # DataLoader warns about more workers than cores, and a warning fails this test.
    stream = BatchStream(TensorDataset(torch.arange(4)), range(4), batch_size=2, seed=0, workers=1000)
    assert 1 <= stream.workers <= torch.multiprocessing.cpu_count()


def test_too_few_samples_for_one_batch() -> None:
    with pytest.raises(ConfigurationError, match=r"7 samples do not fill one batch of 8 .* at most 3"):
        BatchStream(Noisy(9), range(7), batch_size=4, seed=0, world_size=2)


@pytest.mark.parametrize(
    ("indices", "arguments", "message"),
    [
        (range(4), {"batch_size": 0}, "batch_size is 0; allowed is 1"),
        (range(4), {"workers": -1}, "workers is -1; allowed is 0"),
        (range(4), {"world_size": 0}, "world_size is 0; allowed is 1"),
        (range(4), {"rank": 2, "world_size": 2}, "rank is 2 with world_size 2; allowed is 0 to 1"),
        ([0, 1, 4], {}, "from 0 to 4; Noisy allows 0 to 3"),
        ([-1, 1, 2], {}, "from -1 to 2; Noisy allows 0 to 3"),
    ],
)
def test_wrong_arguments(indices: Any, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        BatchStream(Noisy(4), indices, **{"batch_size": 1, "seed": 0, **arguments})


def test_an_iterable_dataset_is_an_error() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(())

    with pytest.raises(ConfigurationError, match="Stream is an IterableDataset"):
        BatchStream(Stream(), range(4), batch_size=1, seed=0)


def test_a_negative_position_is_an_error_at_the_call() -> None:
    stream = BatchStream(Noisy(4), range(4), batch_size=2, seed=0)
    with pytest.raises(ConfigurationError, match="position is -1"):
        stream.iterate(-1)


def test_mixed_seeds_have_63_bits_and_do_not_collide() -> None:
    seeds = [mix_seed(a, b) for a in range(30) for b in range(30)] + [mix_seed(a) for a in range(30)]
    assert len(set(seeds)) == 930
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mix_seed(1, 23) != mix_seed(12, 3)  # the digits are the same, the numbers are not
