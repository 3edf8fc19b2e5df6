"""Damaged latency tables, width grids, and what is kept between runs: numbers, or an error that names the file."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fuzzing import damaged_bytes, damaged_json, damaged_yaml, dumped, examples, judged, randoms
from hypothesis import given

from oneshot.cost import LatencyTable
from oneshot.cost.grid import WidthGrid
from oneshot.cost.hardware import check_latency_source
from oneshot.cost.timing_cache import TimingCache
from oneshot.errors import CheckpointError, ConfigurationError
from oneshot.loggers import read_json_lines
from oneshot.sweep.checks import _compare
from oneshot.sweep.point_run import read_result

DATA = Path(__file__).resolve().parent / "data"
ROW = {"median": 0.093, "iqr": 0.002, "n": 180}
TABLES: list[dict[str, Any]] = [
    {"conv3": 0.8, "conv5": 1.4, "fixed": 0.1, "block1": {"conv3": 0.5, "conv5": 1.1}},
    {"Conv-input:224x224x3-output:112x112x32": {"count": 28, "mean": 5.1, "std": 0.5}, "x-input:1": 2, "fixed": 0.5},
    {
        "format": "oneshot-latency",
        "version": 2,
        "unit": "ms",
        "runtime": {"runtime": "torch 2.13.0", "threads": "1"},
        "fixed": 0.21,
        "places": {"blocks.1": {"k3e3": ROW, "skip": 0.0}, "blocks.2": {"k3e3": {**ROW, "n": 3}, "1": ROW}},
    },
    {
        "format": "oneshot-latency",
        "version": 1,
        "unit": "ms",
        "runtime": None,
        "fixed": None,
        "places": {"a": {"b": 1}},
    },
]
GRID = {
    "format": "oneshot-width-grid",
    "version": 1,
    "unit": "ms",
    "runtime": {"device": "Pixel 4"},
    "in_channels": [8, 16],
    "out_channels": [8, 16, 32],
    "kernel": [3],
    "values": [[[0.1], [0.2], [0.3]], [[0.2], [0.4], [0.6]]],
}
BLOCKS = [
    b"block1:\n  conv3: 0.5\n  conv5: 1.1   # ms\nfixed: 1e-3\n",
    b"base: &base {k3: 1.0, k5: 2.0}\none:\n  <<: *base\n  k7: 3\ntwo: *base\n",
    (DATA / "proxyless_mobile_trim.yaml").read_bytes()[:700],
]


def sound(table: LatencyTable) -> None:
    rows = [*table.anywhere.values(), *(ms for row in table.by_place.values() for ms in row.values())]
    spread = [n for row in table.spread.values() for one in row.values() for n in one.values()]
    assert all(type(ms) is float and 0 <= ms < math.inf for ms in (*rows, table.fixed or 0.0))
    assert all(0 <= n < math.inf for n in spread)
    assert all(type(key) is str for key in (*table.anywhere, *table.by_place, *table.runtime))


def there_and_back(table: LatencyTable, path: Path) -> None:
    """What was read is what is written and read again."""
    if not table.by_key and not table.anywhere:
        table.write(path)
        again = LatencyTable.read(path)
        assert (again.by_place, again.fixed, again.spread) == (table.by_place, table.fixed, table.spread)


@examples(600)
@given(random=randoms)
def test_a_damaged_table_in_yaml(tmp_path: Path, random: Random) -> None:
    path = tmp_path / random.choice(("table.yaml", "table.yml"))
    path.write_bytes(damaged_yaml(random.choice(TABLES), BLOCKS, random))
    table = judged(path, lambda: LatencyTable.read(path))
    if table is not None:
        sound(table)


@examples(600)
@given(random=randoms)
def test_a_damaged_table_in_json(tmp_path: Path, random: Random) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(damaged_json(random.choice(TABLES), [dumped(one).encode() for one in TABLES], random))
    table = judged(path, lambda: check_latency_source(path))
    if table is not None:
        sound(table)
        there_and_back(table, tmp_path / "again.json")


@examples(300)
@given(random=randoms)
def test_a_damaged_width_grid(tmp_path: Path, random: Random) -> None:
    ends = {"grid.json": damaged_json, "grid.yaml": damaged_yaml}
    path = tmp_path / random.choice(list(ends))
    path.write_bytes(ends[path.name](GRID, BLOCKS, random))
    grid = judged(path, lambda: WidthGrid.read(path))
    if grid is not None:
        assert grid.values.shape == grid.shape
        assert bool(grid.values.isfinite().all())


TIMING = {
    "format": "oneshot-timing",
    "version": 1,
    "runtime": {"runtime": "torch"},
    "operators": ["input(float32[1, 3])"],
    "rounds": [{"min_run_time": 0.02, "repetitions": [[0.5, 0.9, 0.1], [0.6, 1.0, 0.1]]}] * 2,
}


@examples(200)
@given(random=randoms)
def test_a_damaged_measurement_is_made_again(tmp_path: Path, random: Random) -> None:
    cache = TimingCache(tmp_path, {"runtime": "torch"})
    assert cache.folder is not None
    cache.folder.mkdir(parents=True, exist_ok=True)
    path = cache.folder / "key.json"
    path.write_bytes(damaged_json(TIMING, [b"{}"], random))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rounds = judged(path, lambda: cache.rounds("key", 0.01))
    assert rounds is not None
    assert all(str(path) in str(one.message) for one in caught)
    assert all(0 <= one.ms < math.inf and one.probe_ms > 0 for repetitions in rounds for one in repetitions)


POINT = {"targets": {"params": 100.0}}
RESULT = {
    "format": "oneshot-sweep-point",
    "version": 1,
    "point": POINT,
    "costs": {"params": 90.0, "macs": 1e4},
    "metrics": {"loss": 0.5, "acc": "nan"},
}
IDENTITY = {"format": "oneshot-sweep", "version": 1, "epochs": [1, 2, 0], "costs": {"macs": "macs"}, "warmup": "own"}


@examples(250)
@given(random=randoms)
def test_a_damaged_result_of_a_sweep(tmp_path: Path, random: Random) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(damaged_json(RESULT, [dumped(IDENTITY).encode()], random))
    row = judged(path, lambda: read_result(tmp_path, POINT, costs_of=("params",), metrics_of=("loss",)))
    if row is not None:
        assert type(row.costs["params"]) is float
        assert type(row.metrics["loss"]) is float


@examples(150)
@given(random=randoms)
def test_a_damaged_description_of_a_sweep(tmp_path: Path, random: Random) -> None:
    path = tmp_path / "sweep.json"
    path.write_bytes(damaged_json(IDENTITY, [dumped(RESULT).encode()], random))
    judged(path, lambda: _compare(path, json.loads(json.dumps(IDENTITY))))


@examples(150)
@given(random=randoms)
def test_a_damaged_log(tmp_path: Path, random: Random) -> None:
    path = tmp_path / "log.jsonl"
    line = {"kind": "epoch", "step": 3, "loss": 0.5, "acc": "nan"}
    lines = [dumped(line).encode(), damaged_json(line, [b"\n"], random), b""]
    path.write_bytes(b"\n".join(lines) if random.random() < 0.7 else damaged_bytes(b"\n".join(lines), lines, random))
    records = judged(path, lambda: read_json_lines(path))
    assert records is None or all(type(record) is dict for record in records)


# ---- what was found, by hand ---------------------------------------------------------------------------------------


def refused(path: Path, text: str, words: str, read: Callable[[Path], Any] = LatencyTable.read) -> None:
    path.write_text(text, encoding="utf-8")
    before = time.process_time()
    with pytest.raises((ConfigurationError, CheckpointError), match=words):
        read(path)
    assert time.process_time() - before < 5


def test_aliases_are_counted_before_they_are_built(tmp_path: Path) -> None:
    """2**40 rows by merge keys, and a thousand places with the same thousand rows each, in some kB."""
    path = tmp_path / "table.yaml"
    lines = ["a0: &a0 {x: 1}", *(f"a{k}: &a{k} {{<<: [*a{k - 1}, *a{k - 1}]}}" for k in range(1, 41))]
    refused(path, "\n".join(lines), "more than 1,000,000 values")
    rows = ", ".join(f"r{k}: 1" for k in range(1000))
    lines = [f"p0: &p {{{rows}}}", *(f"p{k}: *p" for k in range(1, 1000))]
    refused(path, "\n".join(lines), "more than 1,000,000 values")
    path.write_text("\n".join(lines[:300]))
    assert LatencyTable.read(path).by_place["p299"]["r999"] == 1


def test_a_number_to_base_60_is_short(tmp_path: Path) -> None:
    refused(tmp_path / "table.yaml", "a: 1" + ":59" * 300_000, "a number of 900,001 characters")


def test_a_key_that_stands_twice_is_found_at_once(tmp_path: Path) -> None:
    rows = ", ".join(f'"r{k}": 1' for k in range(100_000))
    refused(tmp_path / "table.json", f'{{{rows}, "r99999": 2}}', "key 'r99999' stands twice")


def test_a_log_line_of_lists_in_lists(tmp_path: Path) -> None:
    refused(tmp_path / "log.jsonl", "[" * 100_000 + "\n", "line 1: not JSON", read_json_lines)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"costs": {}}, r"without \['params'\]"),
        ({"metrics": {"acc": 1.0}}, r"without \['loss'\]"),
        ({"costs": {"params": 10**400}}, "int too large"),
        ({"metrics": {"loss": []}}, "not the result of a search"),
    ],
)
def test_a_result_without_what_is_compared(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    def read(path: Path) -> Any:
        return read_result(path.parent, POINT, costs_of=("params",), metrics_of=("loss",))

    refused(tmp_path / "result.json", json.dumps({**RESULT, **changes}), words, read)
