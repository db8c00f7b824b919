"""The benchmark's own instruments, and that it runs."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from support.core_models import fresh_peft  # noqa: E402

from benchmarks.adversarial_tasks import write_tasks  # noqa: E402
from benchmarks.architecture_bases import ARCHITECTURES, build_model  # noqa: E402
from benchmarks.forgettability import _GRAFT, grafting, permutation_p, spearman  # noqa: E402
from seekr_peft.attention.models import attention_modules, head_shape  # noqa: E402
from seekr_peft.demo.train_base import train  # noqa: E402
from seekr_peft.model.peak_memory import PeakMemory  # noqa: E402


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
    from benchmarks import replay_step, scoring, storage, task_count, whole_task
    from benchmarks.__main__ import Figure

    assert Figure("time", 1.2, 1.0, "x").row() == ("time", "x 1.200", "1", "+20 %")
    assert Figure("size", 0.9, 1.0, "MB").row() == ("size", "0.9 MB", "1", "reached")
    mixed = replay_step.mixed_batch(32, 1, "cpu", n_tasks=2)
    assert mixed["time"] > 0 and mixed["peak"] > 1
    found = scoring.measure(32, 1, "cpu")
    assert found["scoring_ratio"] > 0.5 and found["drawn_ratio"] > 0.5 and found["bare_peak"] > 0
    assert found["scoring_peak_ratio"] > 1 and found["drawn_peak_ratio"] > 1
    assert 0.8e6 < storage.bytes_7b(32_000) < 1e6
    resident = storage.resident_growth(4)
    assert resident["bytes"] > 1e6
    whole = whole_task.measure(16, 4, "cpu", repeats=1)
    assert whole["to_replay"] == whole["seekr"] / whole["replay"] > 0
    counted = task_count.measure((1, 2), rank_limit=8, step_rounds=1, task_rounds=1)
    assert list(counted) == [1, 2]
    assert all(min(of_one.values()) > 0 and len(of_one) == 4 for of_one in counted.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_large_models_benchmark_runs_on_a_small_one_and_the_doctor_is_near():
    from benchmarks import large_model

    found = large_model.measure("small", 128, 1, "cpu")
    resident, predicted = found["resident"], found["predicted"]
    assert predicted["resident"] == pytest.approx(resident, rel=0.01)
    for step, phase in large_model.PHASES.items():
        assert predicted["resident"] + predicted[phase] == pytest.approx(resident + found["peak"][step], rel=0.1), step
    assert found["peak"]["replay + logits"] < found["peak"]["with attention"] < found["peak"]["eager attention"]
    assert found["seconds"].keys() == found["peak"].keys() - {"evaluation"}
    assert 0.5 * found["predicted_sample_bytes"] < found["sample_bytes"] < 1.05 * found["predicted_sample_bytes"]
    assert "with attention" in render(large_model.table(found, "CPU"))


@pytest.mark.filterwarnings("ignore")
def test_the_random_quantised_base_is_made_as_from_pretrained_loads_one(tmp_path):
    from transformers import LlamaForCausalLM

    from benchmarks import large_model
    from seekr_peft.recipe.quantization import bitsandbytes_config

    config = large_model.shape("small", 32)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    recipe = large_model.recipe_of(str(tmp_path), 32, "cpu")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=bitsandbytes_config(recipe.model))
    made = large_model.random_base(config, recipe, "cpu")
    described = [
        {
            name: (type(value).__name__, value.dtype, value.shape)
            for name, value in model.state_dict(keep_vars=True).items()
            if not name.endswith("bitsandbytes__nf4")  # settings as a text, as long as the numbers in it
        }
        for model in (loaded, made)
    ]
    assert described[0] == described[1]
    assert large_model.weight_bytes(loaded) == large_model.weight_bytes(made)
    ids = torch.arange(8)[None]
    assert made(ids).logits.std() > 1e-3


def render(table):
    console = Console(width=120, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_the_kl_of_what_is_stored_is_that_of_a_hand_made_row():
    from benchmarks.storage import _spread_kl
    from seekr_peft.sparse import SparseDistribution

    exact = torch.tensor([[0.5, 0.3, 0.2, 0.0]])
    stored = SparseDistribution(torch.tensor([[0]]), torch.tensor([[0.5]]), torch.tensor([0.5]))
    # Key 3 lies in the future: the remaining half is spread over keys 1 and 2.
    expected = 0.3 * torch.tensor(0.3 / 0.25).log() + 0.2 * torch.tensor(0.2 / 0.25).log()
    torch.testing.assert_close(_spread_kl(exact, stored, torch.tensor([3])).float(), expected[None])


def test_rank_correlation_and_its_p_value_by_hand():
    assert spearman(np.array([1.0, 5, 2, 9]), np.array([10.0, 30, 20, 40])) == pytest.approx(1.0)
    # Ranks 1 2 3 against 2 1 3: 1 - 6 * 2 / (3 * 8).
    assert spearman(np.array([1.0, 2, 3]), np.array([5.0, 4, 9])) == pytest.approx(0.5)
    # Ties share their mean rank: 1.5 1.5 3 against 1 2 3.
    assert spearman(np.array([7.0, 7, 8]), np.array([1.0, 2, 3])) == pytest.approx(3**0.5 / 2)
    rising = np.arange(6.0)
    mean, p = permutation_p([(rising, rising)])
    # One of 720 orders reaches a correlation of 1.
    assert mean == pytest.approx(1.0) and 0 < p < 0.006
    mean, p = permutation_p([(rising, -rising), (rising, rising)])
    assert mean == pytest.approx(0.0, abs=1e-12) and 0.4 < p < 0.6


def test_a_grafted_head_reads_the_rows_it_is_given_and_the_others_stay():
    """With rows that look at themselves alone, a head's output is its own value."""
    model = fresh_peft().eval()
    attention = attention_modules(model)[1]
    size = attention.head_dim
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    seen = {}
    handles = [
        attention.v_proj.register_forward_hook(lambda module, args, output: seen.update(value=output[0])),
        attention.o_proj.register_forward_pre_hook(lambda module, args: seen.update(heads=args[0][0])),
    ]
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        plain = model(ids).logits
        before = seen["heads"].clone()
        with grafting(model):
            assert torch.equal(model(ids).logits, plain)
            _GRAFT.rows, _GRAFT.heads = {1: torch.eye(7).expand(model.config.num_attention_heads, 7, 7)}, {1: [2]}
            model(ids)
    for handle in handles:
        handle.remove()
    own = slice(2 * size, 3 * size)
    value = slice(2 // groups * size, (2 // groups + 1) * size)
    torch.testing.assert_close(seen["heads"][:, own], seen["value"][:, value])
    others = [i for i in range(before.shape[1]) if not own.start <= i < own.stop]
    assert torch.equal(seen["heads"][:, others], before[:, others])
    assert torch.equal(model(ids).logits, plain)


def test_the_adversarial_tasks_contradict_one_another(shared, tmp_path):
    assert write_tasks(shared / "data" / "long_sequence", tmp_path) == ["news", "letters", "mirror", "flipped"]
    rows = {
        name: [json.loads(line) for line in (tmp_path / name / "test.jsonl").read_text().splitlines()]
        for name in ("news", "letters", "mirror", "flipped")
    }
    for news, letters, mirror, flipped in zip(*rows.values(), strict=True):
        assert flipped["prompt"] == news["prompt"] and flipped["answer"] != news["answer"] == news["answer"]
        assert mirror["answer"] == flipped["answer"] and mirror["prompt"].endswith(news["prompt"])
        assert f"{letters['answer']} is {news['answer']}" in letters["prompt"]
        assert all(row["prompt"].startswith(row["instruction"]) for row in (news, letters, mirror, flipped))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_other_bases_have_the_shape_of_the_demos_and_can_be_trained(architecture, capsys):
    model = build_model(architecture)
    assert model.config.model_type == architecture
    assert head_shape(model) == (4, 8) and model.config.hidden_size == 128
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train(model, 3, batch_size=4, peak_rate=1e-3, seed=0)
    assert "step 3/3  loss" in capsys.readouterr().out
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
