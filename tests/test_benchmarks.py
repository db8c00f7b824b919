"""The benchmark's own instruments, and that it runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from seekr_peft.peak_memory import PeakMemory  # noqa: E402


def test_peak_memory_counts_what_is_alive_at_the_same_time():
    with PeakMemory() as memory:
        a = torch.zeros(1000)
        b = a + 1  # 8000 bytes alive
        del a
        c = b * 2  # 8000 again
        del b, c
        d = torch.zeros(500)
    assert memory.peak == 8000
    assert d.sum() == 0


def test_peak_memory_counts_a_view_once_and_saved_tensors_as_alive():
    weight = torch.ones(1000, requires_grad=True)
    with PeakMemory() as memory:
        view = torch.zeros(1000).view(10, 100)
        product = weight.exp().exp()  # each exp keeps its result for the backward
        assert product.requires_grad
        assert view.shape == (10, 100)
    assert memory.peak == 12000


@pytest.mark.slow
def test_the_benchmark_prints_ratios_and_writes_json(tmp_path):
    out = tmp_path / "figures.json"
    command = ["-m", "benchmarks.replay_step", "--lengths", "64", "--repeats", "1", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads(out.read_text())["rows"]
    assert row["length"] == 64
    assert set(row["seconds"]) == {"replay + logits", "with attention", "eager attention"}
    assert row["sample_bytes"] > 0
    assert "x " in done.stdout
