"""Logs are read back: JSON lines by the json module, event files by TensorBoard's own reader."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.data_compat import migrate_value
from tensorboard.util.tensor_util import make_ndarray

from oneshot.errors import ConfigurationError
from oneshot.loggers import JsonLines, Progress, TensorBoard, markdown_table, read_json_lines


def log_of(path: Path, *records: dict[str, object]) -> int:
    with JsonLines(path) as log:
        for record in records:
            log.write(record)
        return log.size


def test_a_line_is_written_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    record = {"step": 3, "acc": 0.1, "arch": {"b": [1, 2], "a": "x\ny"}, "ok": True, "none": None}
    size = log_of(path, record)
    # By hand: keys in the given order, no line end inside a line.
    expected = b'{"step": 3, "acc": 0.1, "arch": {"b": [1, 2], "a": "x\\ny"}, "ok": true, "none": null}\n'
    assert path.read_bytes() == expected
    assert size == len(expected)


def test_a_line_can_be_read_while_the_log_is_open(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with JsonLines(path) as log:
        log.write({"step": 0})
        assert read_json_lines(path) == [{"step": 0}]
        assert log.size == path.stat().st_size
        log.sync()
    with pytest.raises(ValueError, match="closed"):
        log.write({"step": 1})


def test_tensors_and_numpy_numbers_become_numbers(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    third = torch.tensor(1 / 3, requires_grad=True)
    log_of(
        path,
        {
            "tensor": third,
            "count": torch.tensor(2**60 + 1),
            "float32": np.float32(0.1),
            "float64": np.float64(0.1),
            "int64": np.int64(7),
            "flag": np.bool_(True),
            "nested": [torch.tensor(0.5), (np.array(2.0),)],
        },
    )
    (record,) = read_json_lines(path)
    # 0.1 in float32 is 13421773 / 2**27.
    assert record["tensor"] == float(third.detach())
    assert record["float32"] == 13421773 / 2**27
    assert record["count"] == 2**60 + 1
    assert record["float64"] == 0.1
    assert record["int64"] == 7
    assert record["flag"] is True
    assert record["nested"] == [0.5, [2.0]]


def test_every_line_is_strict_json_also_with_nan_and_inf(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    values = [math.nan, math.inf, -math.inf, torch.tensor(math.nan), np.float64(-math.inf)]
    log_of(path, {"loss": values})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record == {"loss": ["nan", "inf", "-inf", "nan", "-inf"]}
    assert [float(text) for text in record["loss"]][1:3] == [math.inf, -math.inf]


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
inner = st.lists(plain, max_size=2)
nested = plain | inner | st.dictionaries(st.text(max_size=5), inner, max_size=2)
records = st.dictionaries(st.text(max_size=5), nested, max_size=3)


@settings(deadline=None, max_examples=50)
@given(st.lists(records, max_size=4), st.data())
def test_what_is_written_is_read_and_any_tail_can_be_lost(written: list[dict[str, Any]], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "log.jsonl")
        ends = [0]
        with JsonLines(path) as log:
            for record in written:
                log.write(record)
                ends.append(log.size)
        read = read_json_lines(path)
        assert read == written
        assert [list(record) for record in read] == [list(record) for record in written]
        # A killed process leaves any prefix behind: its complete lines are there, and the log goes on.
        cut = data.draw(st.integers(0, ends[-1]))
        os.truncate(path, cut)
        complete = sum(end <= cut for end in ends[1:])
        assert read_json_lines(path) == written[:complete]
        log_of(path, {"next": 1})
        assert read_json_lines(path) == [*written[:complete], {"next": 1}]


def test_resume_cuts_the_log_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with JsonLines(path) as log:
        log.write({"step": 0})
        at_checkpoint = log.size
        log.write({"step": 1})
    path.write_bytes(path.read_bytes() + b'{"st')
    with JsonLines(path, size=at_checkpoint) as log:
        assert log.size == at_checkpoint == len(b'{"step": 0}\n')
        log.write({"step": 1, "again": True})
        assert log.size == path.stat().st_size
    assert read_json_lines(path) == [{"step": 0}, {"step": 1, "again": True}]
    with JsonLines(path, size=0):
        assert path.read_bytes() == b""


@pytest.mark.parametrize("size", [13, -1])
def test_a_log_shorter_than_the_checkpoint_says(tmp_path: Path, size: int) -> None:
    path = tmp_path / "log.jsonl"
    log_of(path, {"step": 0})  # 12 bytes
    with pytest.raises(ConfigurationError, match=rf"has 12 bytes and is to be cut back to {size}"):
        JsonLines(path, size=size)
    assert read_json_lines(path) == [{"step": 0}]


def test_a_missing_log_has_no_bytes(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="has 0 bytes and is to be cut back to 5"):
        JsonLines(tmp_path / "absent.jsonl", size=5)
    assert not (tmp_path / "absent.jsonl").exists()
    with pytest.raises(ConfigurationError, match=r"there is no folder .*absent.*Make it first"):
        JsonLines(tmp_path / "absent" / "log.jsonl")


def test_a_log_is_not_cut_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log_of(path, {"step": 0})
    with pytest.raises(ConfigurationError, match="cut back to 5 of its 12 bytes, but no line ends there"):
        JsonLines(path, size=5)
    assert read_json_lines(path) == [{"step": 0}]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"alpha": torch.zeros(2, 3)}, r"record\['alpha'\] is a Tensor of shape \(2, 3\)"),
        ({"a": [0, {"b": np.zeros(4)}]}, r"record\['a'\]\[1\]\['b'\] is a ndarray of shape \(4,\)"),
        ({"path": Path("x")}, r"record\['path'\] is a \w*Path; allowed are numbers"),
        ({"z": 1j}, r"record\['z'\] is a complex"),
        ({"counts": {3: 1}}, r"record\['counts'\] has the key 3 of type int; allowed are strings"),
    ],
)
def test_what_json_cannot_hold_is_refused_and_nothing_is_written(
    tmp_path: Path, record: dict[str, object], message: str
) -> None:
    path = tmp_path / "log.jsonl"
    with JsonLines(path) as log:
        log.write({"step": 0})
        with pytest.raises(ConfigurationError, match=message):
            log.write({"first": 1, **record})
        assert log.size == 12
    assert read_json_lines(path) == [{"step": 0}]


@pytest.mark.parametrize(("line", "message"), [(b'{"a": ', "not JSON"), (b"[1]", "a JSON list"), (b"\xff", "not JSON")])
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(ConfigurationError, match=rf"log\.jsonl, line 2: {message}"):
        read_json_lines(path)


def read_events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def test_scalars_and_text_are_read_back(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.scalars(1, {"loss": 0.5, "cost/latency": 3.25})
    board.scalars(7, {"loss": 0.125})
    board.text("arch", "**conv3** then skip", step=7)
    board.close()
    events = read_events(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (7, 0.125)]
    assert [(event.step, event.value) for event in events.Scalars("cost/latency")] == [(1, 3.25)]
    (tag,) = [tag for tag in events.Tags()["tensors"] if tag.startswith("arch")]
    (event,) = events.Tensors(tag)
    assert event.step == 7
    assert make_ndarray(event.tensor_proto).item() == b"**conv3** then skip"


def test_flush_makes_the_values_readable_before_close(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.scalars(0, {"loss": 0.5})
    board.flush()
    assert [event.value for event in read_events(tmp_path).Scalars("loss")] == [0.5]
    board.close()


def test_each_option_is_one_bar(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.probabilities(4, {"stage1.op": [0.25, 0.125, 0.625], "depth": [0.5, 0.5]})
    board.close()
    events = read_events(tmp_path)
    assert set(events.Tags()["histograms"]) == {"probabilities/stage1.op", "probabilities/depth"}
    (event,) = events.Histograms("probabilities/stage1.op")
    histogram = event.histogram_value
    assert event.step == 4
    assert list(histogram.bucket) == [0.25, 0.125, 0.625]
    assert list(histogram.bucket_limit) == [0.5, 1.5, 2.5]
    assert (histogram.min, histogram.max) == (-0.5, 2.5)
    # 0·0.25 + 1·0.125 + 2·0.625 = 1.375 and 0·0.25 + 1·0.125 + 4·0.625 = 2.625
    assert (histogram.num, histogram.sum, histogram.sum_squares) == (1, 1.375, 2.625)


@pytest.mark.parametrize("p", [[0.0, 0.25, 0.0, 0.75, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0], [0.25, 0.75]])
def test_the_bars_that_tensorboard_draws_keep_their_place(tmp_path: Path, p: list[float]) -> None:
    board = TensorBoard(tmp_path)
    board.probabilities(0, {"op": p})
    board.close()
    (event_file,) = tmp_path.iterdir()
    accumulator = EventAccumulator(str(event_file))
    drawn = []
    for event in accumulator._generator.Load():  # the proto, which Histograms() has already taken apart
        for value in event.summary.value:
            drawn += make_ndarray(migrate_value(value).tensor).tolist()
    used = [i for i, p_i in enumerate(p) if p_i > 0]
    assert drawn == [[i - 0.5, i + 0.5, p[i]] for i in range(used[0], used[-1] + 1)]


def test_resume_hides_the_steps_that_are_written_again(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    for step in range(5):
        board.scalars(step, {"loss": float(step)})
    board.close()
    # Event files are read in the order of their names, which only tell the second of their making.
    (first,) = tmp_path.iterdir()
    first.rename(tmp_path / "events.out.tfevents.0000000001.first")
    board = TensorBoard(tmp_path, purge_step=3)
    board.scalars(3, {"loss": 30.0})
    board.close()
    found = [(event.step, event.value) for event in read_events(tmp_path).Scalars("loss")]
    assert found == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]


def test_progress_shows_steps_and_compact_values(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(10, "search", initial=4, enabled=True)
    progress.update({"loss": 0.41234, "acc": 0.97, "latency": "3.21/2.50 ms", "params": 12345.6})
    progress.message("epoch 1 done")
    progress.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.strip().split("\r")[-1]
    assert "search" in last
    assert "5/10" in last
    assert "loss 0.412 acc 0.97 latency 3.21/2.50 ms params 12346" in last
    assert "epoch 1 done\n" in captured.err


@pytest.mark.parametrize(("enabled", "shown"), [(None, "a message\n"), (False, "")])
def test_progress_without_a_terminal(capsys: pytest.CaptureFixture[str], enabled: bool | None, shown: str) -> None:
    progress = Progress(2, "search", enabled=enabled)
    progress.update({"loss": 0.5})
    progress.message("a message")
    progress.close()
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", shown)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (999.4, "999"), (999.7, "1000"), (999_999.0, "999999"), (1e6, "1e+06"), (1.234e-5, "1.23e-05")],
)
def test_progress_numbers_have_three_digits(capsys: pytest.CaptureFixture[str], value: float, shown: str) -> None:
    progress = Progress(1, "search", enabled=True)
    progress.update({"x": value})
    progress.close()
    assert f"x {shown}]" in capsys.readouterr().err


def test_a_table_with_missing_cells() -> None:
    rows: list[dict[str, object]] = [
        {"arch": "ours", "MACs": 1234567, "acc": 0.98765, "found": True},
        {"arch": "all|of\nit", "acc": None},
    ]
    assert markdown_table(rows).split("\n") == [
        "| arch       |    MACs |    acc | found |",
        "| ---------- | ------: | -----: | ----- |",
        "| ours       | 1234567 | 0.9877 | True  |",
        "| all\\|of it |         |        |       |",
    ]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.dictionaries(st.sampled_from("abc"), plain, max_size=3), max_size=4))
def test_every_line_of_a_table_has_the_same_cells_and_width(rows: list[dict[str, object]]) -> None:
    table = markdown_table(rows)
    columns = {name for row in rows for name in row}
    if not columns:
        assert table == ""
        return
    lines = table.split("\n")
    assert len(lines) == len(rows) + 2
    assert len({len(line) for line in lines}) == 1
    assert {line.replace("\\|", "").count("|") for line in lines} == {len(columns) + 1}
