"""Two processes on the CPU are one search: the same bits in both, and what one process finds on the same batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes_run
import pytest
import torch
from processes_run import SEARCHES, STEPS

HERE = Path(__file__).parent


def torchrun(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(HERE / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, check=False, timeout=400, capture_output=True, text=True)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    done = torchrun("processes_run.py", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"process{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", SEARCHES)
def test_both_have_the_same_bits_after_every_step(of_two: list[dict[str, Any]], name: str) -> None:
    first, second = (found[name] for found in of_two)
    assert torch.equal(first["alphas"], second["alphas"])
    assert len(first["alphas"]) >= STEPS == first["steps"]
    assert torch.equal(first["weights"], second["weights"])
    for what in ("history", "arch", "evaluated", "steps"):
        assert first[what] == second[what]


@pytest.mark.parametrize("name", SEARCHES)
def test_two_times_32_is_one_time_64(of_two: list[dict[str, Any]], name: str) -> None:
    """Loss, metrics and gradients are means over as many samples of the same global batches, 20 times."""
    found, expected = of_two[0][name], processes_run.search(name, 64)
    assert found["steps"] == expected["steps"] == STEPS
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=0, atol=1e-5)
    torch.testing.assert_close(found["alphas"][-1], expected["alphas"][-1], rtol=0, atol=1e-5)
    assert found["arch"] == expected["arch"]
    # 77 samples: 3 batches of 32, of which the second process has one; 2 of 64
    assert found["evaluated"].keys() == expected["evaluated"].keys()
    for key, value in expected["evaluated"].items():
        assert found["evaluated"][key] == pytest.approx(value, abs=1e-5)
    for record, other in zip(found["history"], expected["history"], strict=True):
        assert record.keys() == other.keys()
        for key, value in other.items():
            assert record[key] == (pytest.approx(value, rel=1e-4, abs=1e-4) if isinstance(value, float) else value), key


def test_a_checkpoint_of_two_processes_is_taken_up_bit_for_bit(of_two: list[dict[str, Any]]) -> None:
    first, second = (found["in the middle"] for found in of_two)
    assert first["resumed"] == first["history"] == second["history"] == second["resumed"]
    assert first["same"] is second["same"] is True
    assert first["table"] == second["table"]  # the first one has measured it
    # 205 samples of the weights' part, 2 x 16 per step: 6 steps in each of 3 epochs
    assert first["steps"] == 18


def test_a_sweep_by_two_processes(of_two: list[dict[str, Any]]) -> None:
    """The whole network, 8 * 10 + 8 * 73 + 90 parameters, and one unit and tap of each layer: 2 + 2 + 20."""
    assert of_two[0]["sweep"] == of_two[1]["sweep"]
    assert [costs["params"] for costs in of_two[0]["sweep"]] == [754.0, 24.0]


def test_what_is_of_one_process_alone_is_of_all(of_two: list[dict[str, Any]]) -> None:
    """Averages begin with the weights of the first; layers left out by chance, and a loss that is no number in one."""
    first, second = (found["alone"] for found in of_two)
    assert first == second
    assert first["names before"] == ["acc1", "acc5", "loss"]
    assert first["history"][-1]["phase"] == "finetune"
    assert first["started"] == 4  # 128 samples, 2 x 16 in a step
    assert "step 3 (warmup, epoch 0): loss = nan" in first["error"]  # the first call is of the trial batch
