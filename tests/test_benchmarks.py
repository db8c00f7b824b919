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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_other_figures_are_measured_and_told_from_their_goals(tmp_path):
    from benchmarks import scoring, storage, task_count, whole_task
    from benchmarks.__main__ import Figure

    assert Figure("time", 1.2, 1.0, "x").row() == ("time", "x 1.200", "1", "+20 %")
    assert Figure("size", 0.9, 1.0, "MB").row() == ("size", "0.9 MB", "1", "reached")
    found = scoring.measure(32, 1, "cpu")
    assert found["ratio"] > 0.5 and found["scoring_peak"] > found["bare_peak"] > 0
    assert 0.8e6 < storage.bytes_7b(32_000) < 1e6
    resident = storage.resident_growth(4)
    assert resident["bytes"] > 1e6
    whole = whole_task.measure(16, 4, "cpu", repeats=1)
    assert whole["to_replay"] == whole["seekr"] / whole["replay"] > 0
    counted = task_count.measure(2, rank_limit=8)
    assert counted["tasks"] == 2 and counted["disk_per_task"] > 0 and counted["step_last"] > 0


def test_the_kl_of_what_is_stored_is_that_of_a_hand_made_row():
    from benchmarks.storage import _spread_kl
    from seekr_peft.attention import TeacherRows

    exact = torch.tensor([[0.5, 0.3, 0.2, 0.0]])
    stored = TeacherRows(torch.tensor([[0]]), torch.tensor([[0.5]]), torch.tensor([0.5]))
    # Key 3 lies in the future: the remaining half is spread over keys 1 and 2.
    expected = 0.3 * torch.tensor(0.3 / 0.25).log() + 0.2 * torch.tensor(0.2 / 0.25).log()
    torch.testing.assert_close(_spread_kl(exact, stored, torch.tensor([3])).float(), expected[None])
