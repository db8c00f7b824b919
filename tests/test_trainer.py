"""ContinualTrainer: which gradient an optimiser step applies, what it logs, and what it refuses.

The models are tiny random Llamas in float64, so that equal arithmetic in another order stays equal to ten digits.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import nf4_llama, tiny_llama
from support.trainers import NEW, OLD, adapted, arguments, assert_close, copied, perturb, trained
from torch import Tensor

from seekr_peft import ContinualTrainer, Replay, Seekr, SeekrConfig, Sequential
from seekr_peft.errors import AdapterError, CaptureError, ConfigError
from seekr_peft.losses import ReplayTerms, Term
from seekr_peft.methods.rhythm import Rhythm

TERMS = ("replay_loss", "logits_loss", "attention_loss")


@pytest.fixture
def after_one_task(tmp_path: Path) -> Callable[..., Any]:
    """Makes a method with one finished task, whose adapter is random instead of trained; the same at every call."""
    folders = (tmp_path / f"method-{number}" for number in count())

    def make(method_class: type = Seekr, model: Any = None, **config: Any) -> Any:
        settings = {"replay_ratio": 0.25, "replay_every": 1, "replay_batch_size": 2, "lambda2": 2.0, **config}
        method = method_class(adapted(model), SeekrConfig(**settings), directory=next(folders))
        with method.task("old", replay_from=OLD):
            perturb(method)
        torch.manual_seed(4)
        return method

    return make


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# The gradient of one optimiser step -------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_batches_of_8_and_micro_batches_of_2_by_4_train_the_same_parameters(
    tmp_path: Path, optim: str, after_one_task: Any
) -> None:
    # 22 samples: the last step of an epoch has 6 samples, so 3 micro-batches instead of 4. A large epsilon, since
    # Adam divides the rounding noise of a zero gradient by itself otherwise.
    changes = {"optim": optim, "adam_epsilon": 1e-3, "learning_rate": 0.05 if optim == "sgd" else 1e-2}
    whole, trainer = trained(after_one_task(), arguments(tmp_path, **changes))
    parts, _ = trained(
        after_one_task(),
        arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **changes),
    )
    assert trainer.state.global_step == 6
    assert trainer.method.rhythm == Rhythm.every(1)
    assert_close(whole, parts)


def test_dividing_the_replay_loss_by_the_accumulation_steps_would_be_noticed(
    tmp_path: Path, after_one_task: Any
) -> None:
    args = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    right, _ = trained(after_one_task(), args)
    wrong, _ = trained(after_one_task(_QuarterOfReplay), args)
    assert largest_difference(right, wrong) > 1e-4


class _Scaled(Seekr):
    factor = 1.0

    @contextmanager
    def replay_terms(self, model: Any) -> Any:
        with super().replay_terms(model) as terms:
            parts = {name: Term(self.factor * weight, value) for name, (weight, value) in terms.parts.items()}
            yield ReplayTerms(parts)


class _QuarterOfReplay(_Scaled):
    factor = 0.25


class _NothingOfReplay(_Scaled):
    factor = 0.0


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("method_class", [Replay, Seekr])
def test_the_applied_gradient_is_the_plain_trainers_plus_the_replay_losss(
    tmp_path: Path, method_class: type, accumulation: int, after_one_task: Any
) -> None:
    args = arguments(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    # A fresh adapter (B = 0) changes nothing, so its teacher terms would have no gradient: start from a random one.
    spy, method = _gradient_spy(), after_one_task(method_class)
    with method.task("new", replay_from=NEW):
        perturb(method)
        ContinualTrainer(model=method.model, method=method, args=args, train_dataset=NEW, callbacks=[spy]).train()
    both = spy.gradients

    plain = after_one_task(method_class)
    with plain.task("new", replay_from=NEW):
        perturb(plain)
        spy = _gradient_spy()
        _plain_trainer(plain.model, args, callbacks=[spy]).train()

    direct = after_one_task(method_class)
    with direct.task("new", replay_from=NEW):
        perturb(direct)
        direct.start_training(1)
        direct.model.train()
        with direct.replay_terms(direct.model) as terms:
            terms.total.backward()
        replay = {name: p.grad.clone() for name, p in direct.model.named_parameters() if p.grad is not None}

    assert both.keys() == spy.gradients.keys() == replay.keys()
    assert max(float(gradient.abs().max()) for gradient in replay.values()) > 1e-3
    assert_close(both, {name: spy.gradients[name] + replay[name] for name in both}, 1e-12)


def _plain_trainer(model: Any, args: Any, **kwargs: Any) -> Any:
    from transformers import Trainer

    from seekr_peft.tasks import AnswerCollator

    return Trainer(model=model, args=args, train_dataset=NEW, data_collator=AnswerCollator(0), **kwargs)


def _gradient_spy() -> Any:
    from transformers import TrainerCallback

    class Spy(TrainerCallback):
        gradients: dict[str, Tensor]

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    return Spy()


def test_sequential_trains_bitwise_what_a_plain_trainer_trains_on_plain_peft(tmp_path: Path) -> None:
    args = arguments(tmp_path, optim="adamw_torch", max_grad_norm=1.0)
    method = Sequential(adapted(), directory=tmp_path / "method")
    with method.task("only"):
        start = copied(method.stack.parameters())
        ContinualTrainer(model=method.model, method=method, args=args, train_dataset=NEW).train()
        ours = copied(method.stack.parameters())
    plain = adapted()
    theirs = {name.removesuffix(".default.weight"): p for name, p in plain.named_parameters() if "lora_" in name}
    theirs = {name: theirs[name] for name in start}
    for name, parameter in theirs.items():
        parameter.data.copy_(start[name])
    _plain_trainer(plain, args).train()
    assert largest_difference(ours, start) > 1e-3
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_replay_loss_of_weight_zero_changes_nothing(tmp_path: Path, after_one_task: Any) -> None:
    args = arguments(tmp_path, optim="adamw_torch")
    ours, trainer = trained(after_one_task(_NothingOfReplay), args)
    plain = after_one_task()
    with plain.task("new", replay_from=NEW):
        _plain_trainer(plain.model, args).train()
        theirs = copied(plain.stack.parameters())
    assert trainer.state.log_history[0]["replay_loss"] > 0.1
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_first_task_has_no_replay(tmp_path: Path) -> None:
    method = Seekr(adapted(), SeekrConfig(replay_ratio=0.5), directory=tmp_path / "method")
    _, trainer = trained(method, arguments(tmp_path, max_steps=3))
    assert all("replay_loss" not in entry for entry in trainer.state.log_history)


# A step of its own ------------------------------------------------------------------------------------------------


def test_separate_replay_steps_are_those_of_a_hand_written_loop(tmp_path: Path, after_one_task: Any) -> None:
    # One batch is the whole set, so the order of the samples does not matter; the rate decays linearly to zero.
    args = arguments(tmp_path, per_device_train_batch_size=22, num_train_epochs=4, learning_rate=0.1)
    ours, _ = trained(after_one_task(replay_step="separate", replay_every=2), args)

    from seekr_peft.tasks import AnswerCollator

    method = after_one_task(replay_step="separate", replay_every=2)
    with method.task("new", replay_from=NEW):
        method.start_training(4, 4)
        method.model.train()
        batch = AnswerCollator(0)(NEW)
        parameters = list(method.stack.parameters().values())
        for step, rate in enumerate([0.1, 0.075, 0.05, 0.025]):
            _descend(method.model(**batch).loss, parameters, rate)
            if step in (1, 3):
                with method.replay_terms(method.model) as terms:
                    _descend(terms.total, parameters, rate)
        by_hand = copied(method.stack.parameters())
    assert_close(ours, by_hand)


def _descend(loss: Tensor, parameters: list[Any], rate: float) -> None:
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.data -= rate * gradient


def test_separate_replay_takes_steps_of_its_own_and_leaves_the_schedule_alone(
    tmp_path: Path, after_one_task: Any
) -> None:
    args = arguments(tmp_path, max_steps=7)
    rates: list[float] = []
    method = after_one_task(replay_step="separate", replay_every=3)
    with method.task("new", replay_from=NEW):
        trainer = ContinualTrainer(model=method.model, method=method, args=args, train_dataset=NEW)
        optimizer = trainer.create_optimizer()
        optimizer.register_step_post_hook(lambda o, a, k: rates.append(o.param_groups[0]["lr"]))
        trainer.train()
    # Steps 2 and 5 (from 0) replay once more at the rate of their own step; never at the zero after the last one.
    expected = [0.05 * (1 - step / 7) for step in (0, 1, 2, 2, 3, 4, 5, 5, 6)]
    assert rates == pytest.approx(expected)
    assert trainer.state.global_step == 7
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx([0.05 * (1 - step / 7) for step in range(7)])


def test_a_single_separate_replay_step_at_the_end_of_the_task_is_not_lost(tmp_path: Path, after_one_task: Any) -> None:
    args = arguments(tmp_path, max_steps=2)
    replayed, _ = trained(after_one_task(replay_step="separate", replay_every=100), args)
    plain, _ = trained(after_one_task(_NothingOfReplay, replay_step="separate", replay_every=100), args)
    assert largest_difference(replayed, plain) > 1e-4


# Logs -------------------------------------------------------------------------------------------------------------


def test_each_loss_term_is_logged_apart_as_its_mean_since_the_last_log(tmp_path: Path, after_one_task: Any) -> None:
    method = after_one_task(_Recording, replay_every=2)
    with method.task("new", replay_from=NEW):
        trainer = ContinualTrainer(
            model=method.model, method=method, args=arguments(tmp_path, max_steps=8, logging_steps=4), train_dataset=NEW
        )
        new_task: list[float] = []
        original = trainer.compute_loss
        trainer.compute_loss = lambda *a, **k: _kept(original(*a, **k), new_task)
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(method.seen) == 4 and len(new_task) == 8
    for index, entry in enumerate(logs):
        pair = method.seen[2 * index : 2 * index + 2]
        for name in TERMS:
            assert entry[name] == pytest.approx(sum(terms[name] for terms in pair) / 2, abs=1e-6)
        assert entry["loss"] == pytest.approx(sum(new_task[4 * index : 4 * index + 4]) / 4, abs=1e-4)
    assert len(logs) == 2


def _kept(loss: Tensor, into: list[float]) -> Tensor:
    into.append(loss.item())
    return loss


class _Recording(Seekr):
    """Keeps the value of each term of each replay batch."""

    @contextmanager
    def replay_terms(self, model: Any) -> Any:
        with super().replay_terms(model) as terms:
            self.seen = [*getattr(self, "seen", []), {name: float(value) for name, value in terms.values().items()}]
            yield terms


def test_the_logged_total_is_the_weighted_sum_that_was_trained_on(after_one_task: Any) -> None:
    method = after_one_task(lambda1=0.25, lambda2=3.0)
    with method.task("new", replay_from=NEW):
        perturb(method)
        method.start_training(1)
        with method.replay_terms(method.model) as terms:
            values = {name: float(value) for name, value in terms.values().items()}
            total = float(terms.total.detach())
    assert set(values) == set(TERMS)
    expected = 0.25 * values["replay_loss"] + 0.75 * values["logits_loss"] + 3 * values["attention_loss"]
    assert total == pytest.approx(expected, rel=1e-5)


# Which parameters move --------------------------------------------------------------------------------------------


def test_only_the_new_adapter_moves(tmp_path: Path, after_one_task: Any) -> None:
    method = after_one_task()
    with method.task("new", replay_from=NEW):
        own = {id(parameter) for parameter in method.stack.parameters().values()}
        before = [(name, tensor, tensor.detach().clone()) for name, tensor in _all_tensors(method.model)]
        trainer = ContinualTrainer(
            model=method.model, method=method, args=arguments(tmp_path, max_steps=3), train_dataset=NEW
        )
        trainer.train()
        moved = {name for name, tensor, old in before if not torch.equal(tensor, old)}
        assert moved == {name for name, tensor, _ in before if id(tensor) in own}


def _all_tensors(model: Any) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def test_nf4_on_a_cpu_trains_the_adapter_and_leaves_the_packed_weights_alone(
    tmp_path: Path, after_one_task: Any
) -> None:
    method = after_one_task(model=nf4_llama(tmp_path / "base"))
    with method.task("new", replay_from=NEW):
        packed = [(p, p.detach().clone()) for p in method.model.parameters() if p.dtype == torch.uint8]
        start = copied(method.stack.parameters())
        trainer = ContinualTrainer(
            model=method.model, method=method, args=arguments(tmp_path / "out", max_steps=4), train_dataset=NEW
        )
        trainer.train()
        end = copied(method.stack.parameters())
    assert len(packed) == 21
    assert all(torch.equal(p, old) for p, old in packed)
    assert all(float((end[name] - start[name]).abs().max()) > 0 for name in start)
    # At the first step the fresh adapter changes nothing, so the teacher is met exactly.
    assert all(trainer.state.log_history[3][name] > 0 for name in TERMS)


@pytest.mark.parametrize("harm", ["unfreeze the earlier one", "freeze all", "unfreeze the base"])
def test_a_model_that_would_train_other_parameters_is_refused_before_the_first_step(
    tmp_path: Path, harm: str, after_one_task: Any
) -> None:
    method = after_one_task()
    frozen_norm = method.model.get_base_model().model.norm.weight
    with method.task("new", replay_from=NEW):
        trainer = ContinualTrainer(model=method.model, method=method, args=arguments(tmp_path), train_dataset=NEW)
        if harm == "unfreeze the earlier one":
            method.model.base_model.set_adapter([method.stack.earlier, method.stack.current])
        elif harm == "freeze all":
            method.model.requires_grad_(False)
        else:
            frozen_norm.requires_grad_(True)
        with pytest.raises(AdapterError, match="exactly the 28 tensors of adapter"):
            trainer.train()
        assert trainer.state.global_step == 0


# Activation checkpointing -----------------------------------------------------------------------------------------


def test_checkpointed_training_with_replay_gives_the_same_parameters(tmp_path: Path, after_one_task: Any) -> None:
    plain, _ = trained(after_one_task(), arguments(tmp_path, max_steps=4))
    kwargs = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    checkpointed, trainer = trained(after_one_task(), arguments(tmp_path, max_steps=4, **kwargs))
    assert trainer.model.get_base_model().model.gradient_checkpointing or trainer.model.is_gradient_checkpointing
    assert_close(plain, checkpointed)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused_since_its_attention_has_no_gradient(
    tmp_path: Path, after_one_task: Any
) -> None:
    kwargs = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    method = after_one_task()
    method.model.enable_input_require_grads()
    with pytest.raises(CaptureError, match="reentrant"):
        trained(method, arguments(tmp_path, max_steps=1, **kwargs))


# What is refused, and defaults ------------------------------------------------------------------------------------


def test_a_trainer_outside_of_a_task_is_refused(tmp_path: Path, after_one_task: Any) -> None:
    method = after_one_task()
    with pytest.raises(AdapterError, match="outside of a task"):
        ContinualTrainer(model=method.model, method=method, args=arguments(tmp_path), train_dataset=NEW)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([{"prompt": "a", "answer": "b"}], r"no 'input_ids' \(it has answer, prompt\); tokenise the task first"),
        ([[1, 2, 3]], "holds list items"),
    ],
)
def test_a_dataset_that_is_not_tokenised_is_refused(
    tmp_path: Path, dataset: Any, message: str, after_one_task: Any
) -> None:
    method = after_one_task()
    with method.task("new", replay_from=NEW), pytest.raises(ConfigError, match=message):
        ContinualTrainer(model=method.model, method=method, args=arguments(tmp_path), train_dataset=dataset)


def test_a_dataset_without_labels_is_refused_with_what_it_has(after_one_task: Any) -> None:
    method = after_one_task()
    dataset = [{"input_ids": [1, 2, 3]}]
    with method.task("new", replay_from=NEW), pytest.raises(ConfigError, match=r"no 'labels' \(it has input_ids\)"):
        ContinualTrainer(model=method.model, method=method, train_dataset=dataset)


@pytest.mark.parametrize("bf16", [False, True])
def test_mixed_precision_stays_around_the_forward_after_a_training_but_not_around_generate(
    tmp_path: Path, after_one_task: Any, bf16: bool
) -> None:
    method = after_one_task(model=tiny_llama(num_hidden_layers=2))
    trained(method, arguments(tmp_path, max_steps=1, bf16=bf16))
    lowered, ids = [], torch.arange(1, 9)[None]
    projection = method.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    projection.register_forward_hook(lambda module, args, output: lowered.append(output.dtype == torch.bfloat16))
    method.model(input_ids=ids)
    assert lowered == [bf16]
    method.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
    assert lowered == [bf16, False]


def test_a_streamed_dataset_trains(tmp_path: Path, after_one_task: Any) -> None:
    from datasets import IterableDataset

    method = after_one_task()
    stream = IterableDataset.from_generator(lambda: iter(NEW))
    with method.task("new", replay_from=NEW):
        trainer = ContinualTrainer(
            model=method.model, method=method, args=arguments(tmp_path, max_steps=2), train_dataset=stream
        )
        trainer.train()
    assert trainer.state.global_step == 2


def test_text_columns_beside_the_tokens_are_left_out(tmp_path: Path, after_one_task: Any) -> None:
    from datasets import Dataset

    dataset = Dataset.from_list([{**sample, "prompt": "p", "answer": "a"} for sample in NEW])
    ours, _ = trained(after_one_task(), arguments(tmp_path, max_steps=2), dataset)
    without, _ = trained(after_one_task(), arguments(tmp_path, max_steps=2))
    assert_close(ours, without)


@pytest.mark.parametrize(("pad", "filled"), [(7, 7), (None, 0)])
def test_the_default_collator_pads_with_the_models_pad_id(tmp_path: Path, pad: int | None, filled: int) -> None:
    method = Sequential(adapted(tiny_llama(pad_token_id=pad)), directory=tmp_path / "method")
    with method.task("only"):
        trainer = ContinualTrainer(model=method.model, method=method, args=arguments(tmp_path), train_dataset=NEW)
        batch = trainer.data_collator(
            [{"input_ids": [4, 5, 6], "labels": [-100, 5, 6]}, {"input_ids": [8], "labels": [8]}]
        )
    assert batch["input_ids"].tolist() == [[4, 5, 6], [8, filled, filled]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 5, 6], [8, -100, -100]]
