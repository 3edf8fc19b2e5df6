"""The same weights and alphas in two gloo processes on the CPU, whatever they began with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_two_processes_stay_one_model(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    command = [sys.executable, str(HERE / "two_processes_run.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, check=False, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    # 205 samples of the weight split, 2 x 16 per step: 6 steps in each of 3 epochs
    assert (tmp_path / "result.txt").read_text() == "2 True 18"
    assert (tmp_path / "last.ckpt").exists()
