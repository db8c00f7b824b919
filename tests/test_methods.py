"""The methods on two tiny tasks: the life of a task, the replay loss, what an error leaves behind, and the files."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.core_models import fresh_peft, logits_of, make_dataset, randomise, train_by_hand
from support.tiny_models import (
    N_HEADS,
    N_LAYERS,
    VOCABULARY,
    padded_batch,
    tiny_bert,
    tiny_falcon,
    tiny_gpt_neo,
    tiny_gpt_oss,
    tiny_llama,
    tiny_minimax,
    tiny_openai_gpt,
    with_lora,
)
from torch import Tensor

from seekr_peft.attention import AttentionTap
from seekr_peft.config import SeekrConfig
from seekr_peft.errors import (
    AdapterError,
    CaptureError,
    ConfigError,
    DataError,
    MemoryFormatError,
    RunError,
    SeekrError,
)
from seekr_peft.heads import HeadSelection, ImportanceRecord
from seekr_peft.memory import choose_samples
from seekr_peft.methods import Replay, Seekr, Sequential
from seekr_peft.methods.head_scores import score_heads
from seekr_peft.methods.replay import SELECTORS

FIRST, SECOND = make_dataset(20, seed=1), make_dataset(20, seed=2)


def make_config(**changes: Any) -> SeekrConfig:
    settings = {
        "replay_ratio": 0.2,
        "layer_budget": 2,
        "head_budget": 5,
        "query_budget": 5,
        "replay_every": 2,
        "replay_batch_size": 3,
        "storage_dtype": "float32",
        "row_top_k": 99,
        "logit_top_k": VOCABULARY,
        "teacher_loss_limit": 1e9,
        "teacher_entropy_limit": 1e9,
    }
    return SeekrConfig(**{**settings, **changes})


def make_method(kind: type = Seekr, model: Any = None, directory: Path | None = None, **changes: Any) -> Any:
    options = {key: changes.pop(key) for key in ("adapter_mode", "rank_limit", "select_samples") if key in changes}
    return kind(model or fresh_peft(), make_config(**changes), directory=directory, **options)


def do_task(method: Any, name: str, dataset: list, steps: int = 4) -> list[bool]:
    with method.task(name, replay_from=dataset, optimizer_steps=steps):
        return train_by_hand(method, dataset, steps)


def open_second(kind: type = Seekr, **changes: Any) -> Any:
    """A method whose first task is learnt; its second one is open, with an adapter that already changed."""
    torch.manual_seed(0)
    method = make_method(kind, **changes)
    do_task(method, "first", FIRST)
    block = method.task("second", replay_from=SECOND, optimizer_steps=100)
    block.__enter__()
    method.open_block = block  # an open generator that is collected would close the task
    randomise(method.stack.parameters(), 5, scale=0.03)
    return method


def gradients(method: Any) -> dict[str, Tensor]:
    found = {key: p.grad.clone() for key, p in method.stack.parameters().items() if p.grad is not None}
    method.model.zero_grad()
    return found


def next_loss(method: Any) -> Tensor:
    """The replay loss of the next step that has one."""
    for _ in range(100):
        loss = method.replay_loss()
        if loss is not None:
            return loss
    raise AssertionError("no replay fell due in 100 steps")


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


# What is refused, and what an error leaves behind -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a/b", "../up", ".hidden", "-x", "with space", "ü", 3])
def test_a_task_name_that_is_no_folder_name_is_refused(name: Any) -> None:
    with pytest.raises(ConfigError, match="must be a folder name"), make_method().task(name, replay_from=FIRST):
        pass


def test_a_task_name_is_used_once_and_tasks_are_not_nested() -> None:
    method = make_method()
    do_task(method, "first", FIRST, steps=1)
    with pytest.raises(ConfigError, match="'first' is already used"), method.task("first", replay_from=FIRST):
        pass
    with method.task("second", replay_from=FIRST):
        with pytest.raises(RunError, match="'second' is still open"), method.task("third", replay_from=FIRST):
            pass
        assert method.current_task == "second"


@pytest.mark.parametrize("kind", [Seekr, Replay])
def test_a_method_with_a_memory_asks_for_its_samples(kind: type) -> None:
    method = make_method(kind)
    with pytest.raises(ConfigError, match=r"task 'first': method '\w+' keeps a replay memory, so pass replay_from="):
        with method.task("first"):
            pass
    assert method.stack.current is None


def test_a_training_set_that_cannot_be_replayed_is_refused_before_training() -> None:
    method = make_method()
    with pytest.raises(SeekrError, match="has no 'input_ids'"), method.task("first", replay_from=[{"text": "a"}]):
        raise AssertionError("the block must not run")
    assert method.stack.current is None and method.current_task is None


@pytest.mark.parametrize("where", ["in the block", "score_heads", "teach", "save", "finish", "interrupt"])
@pytest.mark.parametrize("adapter_mode", ["stack", "continue"])
def test_an_error_leaves_the_earlier_state_as_it_was(
    where: str, adapter_mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = make_method(directory=tmp_path, adapter_mode=adapter_mode)
    do_task(method, "first", FIRST)
    logits, importance = logits_of(method.model), method.importance.importance()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    error: type[BaseException] = KeyboardInterrupt if where == "interrupt" else RuntimeError

    def fail(*args: Any, **options: Any) -> None:
        raise error("boom")

    target = {
        "score_heads": "seekr_peft.methods.seekr.score_heads",
        "teach": "seekr_peft.methods.seekr.teach",
        "save": "seekr_peft.model.adapter_stack.AdapterStack.save_current",
        "finish": "seekr_peft.model.adapter_stack.AdapterStack.check_frozen_unchanged",
    }.get(where)
    with monkeypatch.context() as patch, pytest.raises(error, match="boom"):
        if target:
            patch.setattr(target, fail)
        with method.task("second", replay_from=SECOND, optimizer_steps=4):
            train_by_hand(method, SECOND, 4)
            assert not torch.equal(logits_of(method.model), logits)
            if not target:
                fail()
    assert torch.equal(logits_of(method.model), logits)
    assert method.task_names == ["first"] and len(method.memory) == 4 and len(method.selections) == 1
    assert torch.equal(method.importance.importance(), importance)
    now = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and ".partial" not in str(path)}
    assert now == files
    assert do_task(method, "second", SECOND) == [False, True, False, True]
    assert method.task_names == ["first", "second"] and len(method.memory) == 8
    assert sorted(path.name for path in (tmp_path / "tasks").iterdir()) == ["01-first", "02-second"]


def test_a_cut_of_the_earlier_adapters_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    method = make_method(Sequential, rank_limit=5)
    do_task(method, "first", FIRST)
    assert not caplog.records
    do_task(method, "second", SECOND)
    (record,) = caplog.records
    assert "task second: the earlier adapters were cut to rank 5" in record.getMessage()


@pytest.mark.parametrize(
    ("limits", "poor"),
    [
        ({"teacher_loss_limit": 1e-3}, True),
        ({"teacher_entropy_limit": 1e-6}, True),
        ({}, False),
    ],
)
def test_a_poor_teacher_is_reported_and_a_good_one_is_not(
    limits: dict, poor: bool, caplog: pytest.LogCaptureFixture
) -> None:
    method = make_method(**limits)
    with caplog.at_level(logging.WARNING, logger="seekr_peft"):
        do_task(method, "first", FIRST)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == poor and all("task first: its teacher is a poor one" in text for text in messages)
    quality = method.memory.tasks[0].quality
    assert quality.worth_imitating is not poor and quality.loss > 0.01 and quality.answer_entropy > 0.01
    if poor:
        assert (
            f"{quality.loss:.2f} nats a token" in messages[0] and f"entropy {quality.answer_entropy:.2f}" in messages[0]
        )


def test_the_default_limits_tell_an_untrained_teacher_from_a_trained_one(caplog: pytest.LogCaptureFixture) -> None:
    defaults = {"teacher_loss_limit": 0.7, "teacher_entropy_limit": 1.0, "replay_ratio": 1.0}
    untrained, trained = make_method(**defaults), make_method(**defaults)
    do_task(untrained, "first", FIRST[:3], steps=1)
    assert len(caplog.records) == 1 and not untrained.memory.tasks[0].quality.worth_imitating
    caplog.clear()
    do_task(trained, "first", FIRST[:3], steps=60)
    assert not caplog.records and trained.memory.tasks[0].quality.worth_imitating


def test_a_model_without_attention_is_refused_when_the_method_is_made() -> None:
    from support.tiny_models import tiny_mamba

    model = get_peft_model(tiny_mamba(), LoraConfig(r=2, target_modules=["in_proj"]))
    with pytest.raises(CaptureError, match="Mamba"):
        Seekr(model)


@pytest.mark.parametrize("head_choice", ["all", "importance", "random"])
def test_layers_below_the_adapter_are_never_distilled(head_choice: Any) -> None:
    """Their attention cannot move, so it has no gradient; layer 1's adapter on v moves that from layer 2 on."""
    lora = {"target_modules": ["v_proj"], "layers_to_transform": [1]}
    method = make_method(model=fresh_peft(**lora), head_choice=head_choice)
    do_task(method, "first", FIRST)
    assert set(method.selections[0]) == set(range(2, N_LAYERS))
    assert do_task(method, "second", SECOND) == [False, True, False, True]


def test_a_training_that_moves_no_attention_is_reported_and_replays_without_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lora = {"target_modules": ["v_proj"], "layers_to_transform": [N_LAYERS - 1]}
    method = make_method(model=fresh_peft(**lora))
    do_task(method, "first", FIRST)
    assert "changed no attention at all" in caplog.text and not method.selections[0]
    with method.task("second", replay_from=SECOND), method.replay_terms(method.model) as terms:
        assert set(terms.values()) == {"replay_loss", "logits_loss"}


def test_a_task_without_any_replay_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    method = make_method(replay_every=50)
    do_task(method, "first", FIRST)
    assert "no replay batch" not in caplog.text
    with method.task("second", replay_from=SECOND):
        train_by_hand(method, SECOND, 3)
    assert "task second: no replay batch was used" in caplog.text


def test_attention_sinks_leave_a_distribution_over_the_keys() -> None:
    """gpt-oss: eager rows sum to less than 1; teacher and student are compared on what the keys hold."""
    model = with_lora(tiny_gpt_oss())
    method = make_method(model=model)
    with AttentionTap(model, HeadSelection({0: [0]})) as tap:
        model(**padded_batch("none"), output_attentions=True)
    assert float(tap.rows[0].sum(-1).min()) < 0.9
    do_task(method, "first", FIRST)
    with method.task("second", replay_from=SECOND):
        with method.replay_terms(method.model) as terms:
            parts = terms.values()
        assert abs(parts["attention_loss"]) < 1e-5
        randomise(method.stack.parameters(), 5)
        with method.replay_terms(method.model) as terms:
            assert terms.values()["attention_loss"] > 1e-3


def test_a_model_that_looks_in_both_directions_is_refused() -> None:
    with pytest.raises(AdapterError, match="looks in both directions"):
        make_method(Replay, model=with_lora(tiny_bert(), task_type=None))


@pytest.mark.parametrize("build", [tiny_gpt_neo, tiny_openai_gpt, tiny_minimax])
def test_families_with_attention_of_their_own_are_trained_task_after_task(build: Any) -> None:
    """Adapters on the attention alone: those of experts cannot be added up."""
    targets = {tiny_gpt_neo: ["q_proj", "v_proj"], tiny_openai_gpt: ["c_attn"], tiny_minimax: ["q_proj", "v_proj"]}
    lora = {"target_modules": targets[build], "fan_in_fan_out": build is tiny_openai_gpt}
    model = get_peft_model(build(), LoraConfig(r=4, lora_alpha=8, **lora))
    method = make_method(model=model)
    do_task(method, "first", FIRST)
    assert sum(len(heads) for heads in method.selections[0].values()) == 5
    before = logits_of(model)
    with method.task("second", replay_from=SECOND, optimizer_steps=4):
        with method.replay_terms(model) as terms:
            # As the teacher was.
            assert abs(terms.values()["attention_loss"]) < 1e-5
        randomise(method.stack.parameters(), 5)
        with method.replay_terms(model) as terms:
            assert terms.values()["attention_loss"] > 1e-3
            terms.total.backward()
        gradients = [parameter.grad for parameter in method.stack.parameters().values()]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
        train_by_hand(method, SECOND, 4)
    assert not torch.allclose(logits_of(model), before)


def test_a_model_that_scales_its_embeddings_in_place_is_scored() -> None:
    from transformers import CTRLConfig, CTRLLMHeadModel

    sizes = {"vocab_size": VOCABULARY, "n_embd": 24, "dff": 28, "n_layer": 2, "n_head": 2, "n_positions": 64}
    base = CTRLLMHeadModel(CTRLConfig(**sizes))
    method = make_method(model=get_peft_model(base, LoraConfig(r=4, target_modules=["Wq", "Wv"])), head_budget=2)
    do_task(method, "first", FIRST)
    assert float(method.importance.total_sensitivity().sum()) > 0


@pytest.mark.parametrize("build", [lambda: tiny_falcon("sdpa"), lambda: tiny_gpt_neo(attention_dropout=0.1)])
def test_attention_that_could_only_fail_after_the_first_task_is_refused_before_it(build: Any) -> None:
    model = with_lora(build())
    with pytest.raises(CaptureError, match=r"attn_implementation='eager'|applies attention dropout"):
        Seekr(model)
    Replay(model)


def test_a_selector_that_chooses_nothing_is_refused() -> None:
    method = make_method(select_samples=lambda dataset, count, seed: [])
    with pytest.raises(DataError, match="chose none of 20 samples"), method.task("first", replay_from=FIRST):
        pass


# Files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter_mode", ["stack", "continue"])
@pytest.mark.parametrize("kind", [Seekr, Replay, Sequential])
def test_a_saved_method_goes_on_exactly_as_if_it_had_never_stopped(
    kind: type, adapter_mode: Any, tmp_path: Path
) -> None:
    method = make_method(kind, adapter_mode=adapter_mode, lambda1=0.25, rank_limit=6)
    for name, dataset in (("first", FIRST), ("second", SECOND)):
        do_task(method, name, dataset)
    method.save_pretrained(tmp_path / "out")
    again = kind.from_pretrained(fresh_peft(), tmp_path / "out")
    assert again.config == method.config and again.task_names == ["first", "second"]
    assert (again.stack.mode, again.stack.rank_limit, again.stack.n_tasks) == (adapter_mode, 6, 2)
    assert torch.equal(logits_of(again.model), logits_of(method.model))
    if kind is Seekr:
        assert again.selections == method.selections and len(again.selections) == 2
        assert torch.equal(again.importance.importance(), method.importance.importance())
    third, losses = make_dataset(20, seed=3), []
    for one in (method, again):
        torch.manual_seed(0)  # the new adapter's A is random
        due = do_task(one, "third", third)
        losses.append((due, logits_of(one.model)))
    assert losses[0][0] == losses[1][0] == [False, kind is not Sequential] * 2
    assert torch.equal(losses[0][1], losses[1][1])
    if kind is Seekr:
        assert again.selections == method.selections and len(again.selections) == 3
        assert again.memory.bytes == method.memory.bytes > 0
        assert (tmp_path / "out" / "tasks" / "03-third").is_dir(), "later tasks are written beside the earlier ones"


def test_a_folder_with_another_sequence_is_not_mixed_with_this_one(tmp_path: Path) -> None:
    for names in (["first", "second"], ["other"]):
        method = make_method()
        for name in names:
            do_task(method, name, FIRST)
        if names == ["other"]:
            with pytest.raises(RunError, match="holds the tasks first, second of another sequence"):
                method.save_pretrained(tmp_path)
        else:
            method.save_pretrained(tmp_path)
            method.save_pretrained(tmp_path)
    assert not (tmp_path / "tasks" / "01-other").exists()


@pytest.mark.parametrize("adapter_mode", ["stack", "continue"])
def test_an_adapter_that_was_trained_before_the_first_task_is_saved_too(adapter_mode: Any, tmp_path: Path) -> None:
    method = make_method(model=with_lora(tiny_llama()), adapter_mode=adapter_mode)
    do_task(method, "first", FIRST)
    do_task(method, "second", SECOND)
    method.save_pretrained(tmp_path / "out")
    again = Seekr.from_pretrained(fresh_peft(), tmp_path / "out")
    assert torch.equal(logits_of(again.model), logits_of(method.model))
    carried = Seekr.from_pretrained(with_lora(tiny_llama()), tmp_path / "out")
    assert torch.equal(logits_of(carried.model), logits_of(method.model)), "it must not be added a second time"


def test_a_saved_method_has_a_plain_adapter_that_needs_no_package(tmp_path: Path) -> None:
    method = make_method()
    do_task(method, "first", FIRST)
    method.save_pretrained(tmp_path / "out")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out" / "adapter")
    torch.testing.assert_close(logits_of(loaded), logits_of(method.model), rtol=1e-5, atol=1e-5)
    assert not torch.equal(logits_of(loaded), logits_of(tiny_llama()))


def test_only_open_formats_are_written(tmp_path: Path) -> None:
    method = make_method(directory=tmp_path)
    do_task(method, "first", FIRST)
    method.save_pretrained(tmp_path)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}


def test_restoring_fewer_tasks_drops_the_later_ones(tmp_path: Path) -> None:
    method = make_method(directory=tmp_path)
    do_task(method, "first", FIRST)
    logits = logits_of(method.model)
    do_task(method, "second", SECOND)
    again = make_method(directory=tmp_path)
    again.restore(["first"])
    assert torch.equal(logits_of(again.model), logits)
    assert [path.name for path in (tmp_path / "tasks").iterdir()] == ["01-first"]
    assert len(again.memory) == 4 and len(again.importance.forgettability) == 1


def saved(tmp_path: Path, kind: type = Seekr) -> Path:
    method = make_method(kind)
    do_task(method, "first", FIRST)
    method.save_pretrained(tmp_path / "out")
    return tmp_path / "out"


def test_a_run_of_another_method_or_none_is_refused(tmp_path: Path) -> None:
    out = saved(tmp_path, Replay)
    with pytest.raises(RunError, match="written by method 'replay', not 'seekr'"):
        Seekr.from_pretrained(fresh_peft(), out)
    with pytest.raises(RunError, match=r"method\.json cannot be read"):
        Seekr.from_pretrained(fresh_peft(), tmp_path)


def test_a_run_of_another_model_is_refused(tmp_path: Path) -> None:
    out = saved(tmp_path)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(AdapterError, match="does not fit the model"):
        Seekr.from_pretrained(get_peft_model(tiny_llama(hidden_size=36), lora), out)
    # Every LoRA matrix fits, but the vocabulary is another one.
    with pytest.raises(MemoryFormatError, match=rf"'vocabulary': {VOCABULARY}.*'vocabulary': 71"):
        Seekr.from_pretrained(get_peft_model(tiny_llama(vocab_size=71), lora), out)


@pytest.mark.parametrize(
    "name", ["memory.safetensors", "memory.json", "importance.safetensors", "adapter_model.safetensors"]
)
def test_a_damaged_run_is_refused_and_the_file_is_named(name: str, tmp_path: Path) -> None:
    out = saved(tmp_path)
    path = next(path for path in out.rglob(name) if path.parent != out / "adapter")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(SeekrError, match=name if "adapter" not in name else "01-first.adapter"):
        Seekr.from_pretrained(fresh_peft(), out)


def test_importance_on_disk_has_the_documented_names(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    method = make_method(directory=tmp_path)
    do_task(method, "first", FIRST)
    do_task(method, "second", SECOND)
    tensors = load_file(tmp_path / "importance.safetensors")
    assert set(tensors) == {"forgettability", "sensitivity", "importance"} | {
        f"{kind}.{task}" for kind in ("forgettability", "sensitivity", "selected") for task in ("01-first", "02-second")
    }
    assert all(tensor.shape == (N_LAYERS, N_HEADS) for tensor in tensors.values())
    total = tensors["forgettability.01-first"] + tensors["forgettability.02-second"]
    torch.testing.assert_close(tensors["forgettability"], total.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        tensors["importance"], tensors["sensitivity"] * tensors["forgettability"], rtol=1e-5, atol=0
    )
    assert torch.equal(tensors["selected.02-second"], method.selections[1].mask(N_LAYERS, N_HEADS))


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
                found = torch.autograd.grad(terms.attention, parameters, allow_unused=True)
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


def test_a_new_method_does_not_write_over_an_older_ones_tasks(tmp_path: Path) -> None:
    do_task(make_method(directory=tmp_path), "first", FIRST)
    again = make_method(directory=tmp_path)
    with pytest.raises(RunError, match=r"holds the tasks first already, .* go on with Seekr\.from_pretrained"):
        do_task(again, "second", SECOND)
    assert Seekr.from_pretrained(fresh_peft(), tmp_path).task_names == ["first"]


def test_only_what_the_method_wrote_is_saved(tmp_path: Path) -> None:
    method = make_method(directory=tmp_path / "own")
    do_task(method, "first", FIRST)
    (tmp_path / "own" / "my_data.csv").write_text("x")
    (tmp_path / "own" / "checkpoint-5").mkdir()
    (tmp_path / "own" / "checkpoint-5" / "manifest.json").write_text("{}")
    for _ in range(2):
        method.save_pretrained(tmp_path / "own" / "final")
    names = {path.name for path in (tmp_path / "own" / "final").iterdir()}
    assert names == {"tasks", "adapter", "importance.safetensors", "manifest.json", "method.json"}
    assert Seekr.from_pretrained(fresh_peft(), tmp_path / "own" / "final").task_names == ["first"]


def test_another_sequence_of_the_same_names_is_not_written_over(tmp_path: Path) -> None:
    one, other = make_method(), make_method()
    do_task(one, "first", FIRST)
    do_task(other, "first", SECOND)
    one.save_pretrained(tmp_path / "out")
    with pytest.raises(RunError, match="holds the tasks first of another sequence"):
        other.save_pretrained(tmp_path / "out")
    do_task(one, "second", SECOND)
    one.save_pretrained(tmp_path / "out")
    fewer = Seekr.from_pretrained(fresh_peft(), saved(tmp_path / "fewer"))
    with pytest.raises(RunError, match="holds the tasks first, second"):
        fewer.save_pretrained(tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"file.* (cannot be made|cannot be used|is)"):
        one.save_pretrained(tmp_path / "file")


def test_a_directory_that_cannot_be_written_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = make_method(directory=tmp_path / "own")
    do_task(method, "first", FIRST)
    mkdir = Path.mkdir

    def read_only(self: Path, *args: Any, **options: Any) -> None:
        if self.name == ".scratch":
            raise OSError(30, "Read-only file system", str(self))
        mkdir(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", read_only)
    with (
        pytest.raises(RunError, match=r"tasks cannot be written \(Read-only file system\)"),
        method.task("second", SECOND),
    ):
        raise AssertionError("it was begun")
