"""What a method refuses, what it warns of, and what an error leaves behind."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.core_models import fresh_peft, logits_of, randomise, train_by_hand
from support.tiny_methods import FIRST, SECOND, do_task, make_method
from support.tiny_models import (
    N_LAYERS,
    VOCABULARY,
    padded_batch,
    tiny_bert,
    tiny_falcon,
    tiny_gpt_neo,
    tiny_gpt_oss,
    tiny_minimax,
    tiny_openai_gpt,
    with_lora,
)

from seekr_peft.attention import AttentionTap
from seekr_peft.errors import (
    AdapterError,
    CaptureError,
    ConfigError,
    DataError,
    RunError,
    SeekrError,
)
from seekr_peft.heads import HeadSelection
from seekr_peft.methods import Replay, Seekr, Sequential

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
