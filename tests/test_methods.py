"""The methods on two tiny tasks: the life of a task, the replay loss, and the signals it needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.core_models import randomise, train_by_hand
from support.tiny_methods import FIRST, SECOND, do_task, gradients, make_method, next_loss, open_second
from support.tiny_models import (
    N_HEADS,
    N_LAYERS,
    VOCABULARY,
)
from torch import Tensor

from seekr_peft.errors import (
    CaptureError,
    RunError,
)
from seekr_peft.heads import HeadSelection, ImportanceRecord
from seekr_peft.memory import choose_samples
from seekr_peft.methods import Replay, Seekr, Sequential
from seekr_peft.methods.head_scores import score_heads
from seekr_peft.methods.replay import SELECTORS

# The life of a task ---------------------------------------------------------------------------------------------


def test_two_tasks_from_end_to_end(tmp_path: Path) -> None:
    method = make_method(directory=tmp_path)
    assert do_task(method, "first", FIRST) == [False] * 4, "there is nothing to replay in the first task"
    assert do_task(method, "second", SECOND, steps=7) == [False, True, False, True, False, True, False]
    assert method.task_names == ["first", "second"] and method.current_task is None
    assert [len(task) for task in method.memory.tasks] == [4, 4] and len(method.memory) == 8
    for selection, task in zip(method.selections, method.memory.tasks, strict=True):
        assert selection.n_heads == 5 and len(selection) <= 2
        assert task.selection == selection and task.header["model"]["n_heads"] == N_HEADS
    assert sorted(path.name for path in (tmp_path / "tasks").iterdir()) == ["01-first", "02-second"]
    assert sorted(path.name for path in (tmp_path / "tasks" / "01-first").iterdir()) == [
        "adapter",
        "importance.safetensors",
        "manifest.json",
        "memory.json",
        "memory.safetensors",
    ]
    assert not list(tmp_path.rglob(".*")), "nothing half-written stays"
    assert json.loads((tmp_path / "method.json").read_text())["tasks"] == ["first", "second"]


def test_the_memory_holds_the_rows_that_the_setting_names() -> None:
    method = make_method(query_choice="answer", query_budget=2)
    do_task(method, "first", FIRST)
    samples = [method.memory.tasks[0].sample(index) for index in range(4)]
    assert {len(sample.queries) for sample in samples} == {2}
    for sample in samples:
        answers = (sample.labels[1:] != -100).nonzero().flatten().tolist()
        assert len(answers) == 3 and set(sample.queries.tolist()) <= set(answers)


def test_training_with_replay_lowers_the_replay_loss() -> None:
    method = make_method(lambda2=1.0, replay_every=1)
    do_task(method, "first", FIRST, steps=20)
    with method.task("second", replay_from=SECOND, optimizer_steps=20):
        randomise(method.stack.parameters(), 5, scale=0.05)
        first = next_loss(method).item()
        assert train_by_hand(method, SECOND, steps=20, lr=3e-3) == [True] * 20
        assert next_loss(method).item() < 0.9 * first


def test_the_stored_selection_is_that_of_the_scores_of_all_tasks_so_far() -> None:
    method = make_method()
    record = ImportanceRecord()
    for name, dataset in (("first", FIRST), ("second", SECOND)):
        with method.task(name, replay_from=dataset):
            train_by_hand(method, dataset, 3)
            seed = method.config.seed + len(method.task_names)
            samples = choose_samples(dataset, 0.2, 5, seed)
            scores = score_heads(method.stack, samples)
            record = record.extended(scores.forgettability, scores.sensitivity)
        expected = HeadSelection.top(record.importance(), 2, 5)
        assert method.selections[-1] == expected == method.memory.tasks[-1].selection
        torch.testing.assert_close(method.importance.importance(), record.importance(), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("choice", "n_heads"), [("all", N_LAYERS * N_HEADS), ("random", 5), ("sensitivity", 5), ("forgettability", 5)]
)
def test_every_head_choice_runs_and_spends_its_budget(choice: Any, n_heads: int) -> None:
    method = make_method(head_choice=choice)
    do_task(method, "first", FIRST)
    assert method.selections[0].n_heads == n_heads


def test_nothing_is_scored_or_stored_before_the_task_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def noted(name: str, function: Any) -> Any:
        return lambda *args, **options: (calls.append(name), function(*args, **options))[1]

    from seekr_peft.methods import seekr

    monkeypatch.setattr(seekr, "score_heads", noted("score", seekr.score_heads))
    monkeypatch.setattr(seekr, "teach", noted("teach", seekr.teach))
    method = make_method(directory=tmp_path)
    with method.task("first", replay_from=FIRST, optimizer_steps=4):
        train_by_hand(method, FIRST, 4)
        assert calls == [] and len(method.memory) == 0 and not list(tmp_path.rglob("*"))
    assert calls == ["score", "teach"] and len(method.memory) == 4


def test_replay_draws_only_samples_of_finished_tasks_and_never_of_the_present_or_a_future_one() -> None:
    method = make_method(Replay, replay_every=1)
    datasets = {
        f"task{t}": [{"input_ids": [10 * t + 1, i + 1, 3], "labels": [-100, -100, 3]} for i in range(5)]
        for t in range(3)
    }
    for t, (name, dataset) in enumerate(datasets.items()):
        with method.task(name, replay_from=dataset, optimizer_steps=9):
            batches = [batch for _, batch in zip(range(6), method._stream, strict=False)]
            assert len(batches) == (6 if t else 0)
            seen = {token for batch in batches for token in batch.input_ids[:, 0].tolist()}
            assert seen == {10 * earlier + 1 for earlier in range(t)}


def test_the_sample_selector_may_be_any_function_or_the_first_samples() -> None:
    method = make_method(Replay, select_samples=lambda data, count, seed: range(len(data) - count, len(data)))
    do_task(method, "first", FIRST)
    assert method.memory.tasks[0].sample(0).input_ids.tolist() == FIRST[16]["input_ids"]
    method = make_method(Replay, sample_selection="first")
    do_task(method, "first", FIRST)
    assert method.memory.tasks[0].sample(0).input_ids.tolist() == FIRST[0]["input_ids"]
    assert set(SELECTORS) == {"random", "first"}


def test_each_task_draws_with_its_own_seed() -> None:
    method = make_method(Replay)
    for name in ("a", "b"):
        do_task(method, name, FIRST, steps=1)
    samples = [[task.sample(i).input_ids.tolist() for i in range(4)] for task in method.memory.tasks]
    assert samples[0] != samples[1]


def test_sequential_keeps_nothing_and_needs_no_data(tmp_path: Path) -> None:
    method = make_method(Sequential, directory=tmp_path)
    for name in ("first", "second"):
        with method.task(name):
            assert train_by_hand(method, FIRST, 3) == [False] * 3
    assert not list(tmp_path.rglob("memory.*"))


def test_the_estimated_size_is_that_of_the_file() -> None:
    for kind, changes in ((Seekr, {}), (Seekr, {"row_top_k": 4, "logits_distillation": False}), (Replay, {})):
        method = make_method(kind, replay_ratio=1.0, **changes)
        do_task(method, "first", FIRST)
        task = method.memory.tasks[0]
        assert abs(task.header["estimated_bytes"] - task.bytes) < 0.05 * task.bytes


def test_a_method_without_a_directory_keeps_its_files_as_long_as_it_lives() -> None:
    method = make_method(Replay)
    do_task(method, "first", FIRST)
    directory = method.directory
    assert (directory / "tasks" / "01-first" / "memory.json").is_file()
    del method
    assert not directory.exists()


# The replay loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [Seekr, Replay])
def test_the_handed_over_gradient_is_that_of_the_terms(kind: type, checkpointing: bool) -> None:
    method = open_second(kind, lambda2=3.0)
    # Without checkpointing: the reference, computed directly from a batch of its own.
    stream = method.memory.stream(3, seed=7)
    batches = [next(stream)] * 2
    method._stream = iter(batches)
    with method.replay_terms(method.model) as terms:
        terms.total.backward()
    expected, value = gradients(method), terms.total.item()
    assert len(expected) == 2 * 7 * N_LAYERS and min(float(g.abs().max()) for g in expected.values()) > 0

    if checkpointing:
        method.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        method.model.enable_input_require_grads()
        method.model.train()
    method._stream = iter(batches)
    loss = next_loss(method)
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert gradients(method) == {}, "the parameters' own gradients are not touched before backward"
    (2 * loss).backward()
    found = gradients(method)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], 2 * gradient, rtol=1e-4, atol=1e-7)


def test_the_replay_loss_adds_to_the_new_tasks_gradient() -> None:
    method = open_second()
    ids, labels = torch.tensor([SECOND[0]["input_ids"]]), torch.tensor([SECOND[0]["labels"]])
    batch = next(method.memory.stream(3, seed=7))

    def new_task() -> Tensor:
        return method.model(input_ids=ids, labels=labels).loss

    new_task().backward()
    new = gradients(method)
    method._stream = iter([batch])
    next_loss(method).backward()
    replayed = gradients(method)
    method._stream = iter([batch])
    (new_task() + next_loss(method)).backward()
    together = gradients(method)
    for key in new:
        torch.testing.assert_close(together[key], new[key] + replayed[key], rtol=1e-5, atol=1e-7)


def test_reentrant_checkpointing_is_refused_and_not_silently_wrong() -> None:
    method = open_second()
    method.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    method.model.train()
    with pytest.raises(CaptureError, match="use_reentrant"):
        next_loss(method)


def test_reentrant_checkpointing_is_refused_before_the_first_task_is_trained() -> None:
    method = make_method()
    method.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    method.model.eval()  # as from_pretrained leaves it
    with pytest.raises(CaptureError, match="prepare_model_for_kbit_training"), method.task("a", replay_from=FIRST):
        pytest.fail("the task began")
    assert method.current_task is None and method.stack.current is None


def test_the_terms_are_weighted_by_lambda1_and_lambda2() -> None:
    method = open_second(lambda1=0.3, lambda2=7.0)
    with method.replay_terms(method.model) as terms:
        parts = terms.values()
    assert set(parts) == {"replay_loss", "logits_loss", "attention_loss"} and all(
        part > 1e-4 for part in parts.values()
    )
    expected = 0.3 * parts["replay_loss"] + 0.7 * parts["logits_loss"] + 7.0 * parts["attention_loss"]
    torch.testing.assert_close(terms.total.detach(), expected, rtol=1e-6, atol=0)


def test_the_teacher_itself_has_no_distillation_loss() -> None:
    """Right after the first task the student is the teacher: only rounding is left of both divergences."""
    method = make_method()
    do_task(method, "first", FIRST, steps=10)
    with method.task("second", replay_from=SECOND):
        with method.replay_terms(method.model) as terms:
            parts = terms.values()
        assert parts["replay_loss"] > 0.1
        assert abs(parts["logits_loss"]) < 1e-5 and abs(parts["attention_loss"]) < 1e-5


def test_without_attention_weight_and_logits_it_is_replay_exactly() -> None:
    results = []
    for kind, changes in ((Replay, {}), (Seekr, {"lambda2": 0.0, "logits_distillation": False})):
        method = open_second(kind, **changes)
        loss = next_loss(method)
        loss.backward()
        results.append((loss.detach(), gradients(method)))
    assert torch.equal(results[0][0], results[1][0]) and results[0][0] > 0.1
    for key, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][key], gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("attention_distillation", [True, False])
@pytest.mark.parametrize("logits_distillation", [True, False])
def test_each_term_can_be_left_out(attention_distillation: bool, logits_distillation: bool) -> None:
    method = open_second(attention_distillation=attention_distillation, logits_distillation=logits_distillation)
    with method.replay_terms(method.model) as terms:
        assert ("attention_loss" in terms.values()) == attention_distillation
        assert ("logits_loss" in terms.values()) == logits_distillation
    assert (len(method.selections[0]) if attention_distillation else 0) == len(method.memory.tasks[0].selection)


def test_the_replay_loss_belongs_into_a_task() -> None:
    method = make_method()
    with pytest.raises(RunError, match=r"outside `with method.task\(...\)`"):
        method.replay_loss()


def test_a_hybrid_model_selects_only_layers_that_have_attention() -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "Qwen3NextConfig"):
        pytest.skip("this transformers has no Qwen3-Next")
    config = transformers.Qwen3NextConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=52, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, full_attention_interval=2, pad_token_id=0,
    )  # fmt: skip
    base = transformers.Qwen3NextForCausalLM._from_config(config, attn_implementation="sdpa")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "in_proj_qkvz"]))
    method = make_method(model=model, layer_budget=0.75, head_budget=None)
    do_task(method, "first", FIRST, steps=2)
    assert dict(method.selections[0]) == {1: tuple(range(6)), 3: tuple(range(6))}
    assert any(do_task(method, "second", SECOND, steps=2))


def test_eight_bit_rows_pull_at_a_student_that_is_its_teacher_and_sixteen_hardly_do() -> None:
    norms = {}
    for dtype in ("uint8", "float16", "float32"):
        torch.manual_seed(0)
        method = make_method(storage_dtype=dtype, replay_every=1)
        do_task(method, "first", FIRST)
        with method.task("second", replay_from=SECOND):
            parameters = list(method.stack.parameters().values())
            with method.replay_terms(method.model) as terms:
                found = torch.autograd.grad(terms.parts["attention"].value, parameters, allow_unused=True)
        norms[dtype] = float(torch.stack([g.norm() for g in found if g is not None]).norm())
    assert 1e-5 < norms["uint8"] < 1e-2
    assert norms["float16"] < norms["uint8"] / 20 and norms["float32"] < norms["uint8"] / 1000


@pytest.mark.parametrize(
    ("lambda2", "dtype", "on", "warned"),
    [
        (100.0, "uint8", True, True),
        (1000.0, "uint8", True, True),
        (99.0, "uint8", True, False),
        (1000.0, "float16", True, False),
        (1000.0, "uint8", False, False),
    ],
)
def test_a_large_lambda2_over_eight_bit_rows_is_told(
    lambda2: float, dtype: str, on: bool, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    make_method(lambda2=lambda2, storage_dtype=dtype, attention_distillation=on)
    assert ("set storage_dtype to float16" in caplog.text) == warned
