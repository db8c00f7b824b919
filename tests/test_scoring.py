"""Forgettability, sensitivity and the teacher's signals, each against two plain eager forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.core_models import fresh_peft, make_samples, randomise
from support.tiny_models import N_HEADS, N_LAYERS, VOCABULARY, tiny_llama
from torch import Tensor

from seekr_peft.heads import HeadSelection
from seekr_peft.memory import ReplaySample
from seekr_peft.methods.head_scores import attention_rows, score_heads, teach
from seekr_peft.model.adapter_stack import AdapterStack
from seekr_peft.model.answers import count_answers
from seekr_peft.model.peak_memory import PeakMemory
from seekr_peft.sparse import sparse_rows

EVERY_HEAD = HeadSelection.all(N_LAYERS, N_HEADS)


def make_stack(attention: str = "sdpa", mode: Any = "stack", open_changed: bool = True) -> AdapterStack:
    """One finished task and one open one whose adapter changes the attention (unless it is untrained)."""
    stack = AdapterStack(fresh_peft(attention), mode=mode)
    stack.begin()
    randomise(stack.parameters(), 0)
    stack.finish()
    stack.begin()
    if open_changed:
        randomise(stack.parameters(), 1)
    return stack


def eager_rows(model: Any, sample: ReplaySample) -> Tensor:
    """(layers, heads, queries, keys) float64 from the weights that an eager model returns."""
    with torch.no_grad():
        attentions = model(input_ids=sample.input_ids[None], output_attentions=True).attentions
    return torch.stack([weights[0, :, sample.queries] for weights in attentions]).double()


def slow_forgettability(stack: AdapterStack, samples: list[ReplaySample], norm: str) -> Tensor:
    total = torch.zeros(N_LAYERS, N_HEADS, dtype=torch.float64)
    for sample in samples:
        after = eager_rows(stack.model, sample)
        with stack.before_task():
            before = eager_rows(stack.model, sample)
        for layer in range(N_LAYERS):
            for head in range(N_HEADS):
                change = after[layer, head] - before[layer, head]
                frobenius = sum(float(x) ** 2 for x in change.flatten()) ** 0.5
                total[layer, head] += frobenius if norm == "frobenius" else frobenius**2 / change.numel()
    return total / len(samples)


def slow_sensitivity(stack: AdapterStack, samples: list[ReplaySample], norm: str, every_query: bool) -> Tensor:
    """From ``retain_grad`` on the eager attention weights, at the entries that causality allows."""
    model, total = stack.model, torch.zeros(N_LAYERS, N_HEADS, dtype=torch.float64)
    for sample in samples:
        length = len(sample.input_ids)
        output = model(input_ids=sample.input_ids[None], labels=sample.labels[None], output_attentions=True)
        for weights in output.attentions:
            weights.retain_grad()
        output.loss.backward()
        queries = torch.arange(length) if every_query else sample.queries
        allowed = torch.ones(length, length).tril()
        for layer, weights in enumerate(output.attentions):
            gradient = (weights.grad[0] * allowed)[:, queries].double()
            squares = gradient.square().sum(dim=(1, 2))
            total[layer] += squares.sqrt() if norm == "frobenius" else squares / (len(queries) * length)
        model.zero_grad()
    return total / len(samples)


@pytest.mark.parametrize("mode", ["stack", "continue"])
@pytest.mark.parametrize("norm", ["frobenius", "mean_square"])
def test_forgettability_is_the_change_between_two_eager_forwards(norm: Any, mode: Any) -> None:
    samples = make_samples(3)
    expected = slow_forgettability(make_stack("eager", mode), samples, norm)
    scores = score_heads(make_stack(mode=mode), samples, norm)
    assert expected.min() > 0 and expected.max() > 2 * expected.min()
    torch.testing.assert_close(scores.forgettability, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("every_query", [False, True])
@pytest.mark.parametrize("norm", ["frobenius", "mean_square"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sensitivity_is_the_gradient_at_the_eager_attention_weights(
    attention: str, norm: Any, every_query: bool
) -> None:
    samples = make_samples(3)
    expected = slow_sensitivity(make_stack("eager"), samples, norm, every_query)
    scores = score_heads(make_stack(attention), samples, norm, every_query)
    assert expected.min() > 0 and expected.max() > 2 * expected.min()
    torch.testing.assert_close(scores.sensitivity, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("mode", ["stack", "continue"])
def test_a_task_that_changed_nothing_forgets_nothing_but_still_leans_on_its_heads(mode: Any) -> None:
    scores = score_heads(make_stack(mode=mode, open_changed=False), make_samples(2))
    assert not scores.forgettability.any()
    assert scores.sensitivity.min() > 0


def test_scores_are_means_over_the_samples() -> None:
    stack, samples = make_stack(), make_samples(3)
    each = [score_heads(stack, [sample]) for sample in samples]
    together = score_heads(stack, samples)
    torch.testing.assert_close(together.forgettability, torch.stack([one.forgettability for one in each]).mean(0))
    torch.testing.assert_close(together.sensitivity, torch.stack([one.sensitivity for one in each]).mean(0))


def state_of(stack: AdapterStack) -> tuple:
    """Everything that scoring must leave alone: values, flags, modes, gradients, active adapters."""
    model = stack.model
    return (
        {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        [module.training for module in model.modules()],
        {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        list(model.base_model.active_adapters),
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    )


def assert_same_state(before: tuple, after: tuple) -> None:
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[0].keys() == after[0].keys() and before[1] == after[1]
    assert before[2] == after[2] and before[4:] == after[4:]
    for name, gradient in before[3].items():
        assert (gradient is None) == (after[3][name] is None)
        assert gradient is None or torch.equal(gradient, after[3][name])


def used_stack(mode: Any) -> AdapterStack:
    """In training mode (one layer is not), with gradients of a step that has not been taken yet."""
    stack = make_stack(mode=mode)
    model = stack.model.train()
    model.base_model.model.model.layers[1].eval()
    (sample,) = make_samples(1)
    model(input_ids=sample.input_ids[None], labels=sample.labels[None]).loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
    return stack


@pytest.mark.parametrize("mode", ["stack", "continue"])
def test_scoring_and_teaching_leave_no_trace(mode: Any) -> None:
    stack = used_stack(mode)
    before = state_of(stack)
    score_heads(stack, make_samples(2))
    teach(stack.model, make_samples(2), EVERY_HEAD, 4, 4)
    assert_same_state(before, state_of(stack))


@pytest.mark.parametrize("mode", ["stack", "continue"])
@pytest.mark.parametrize("where", ["changes_and_gradients", "attention_rows", "label_loss"])
def test_scoring_leaves_no_trace_after_an_exception(mode: Any, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = used_stack(mode)
    before = state_of(stack)

    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(f"seekr_peft.methods.head_scores.{where}", fail)
    with pytest.raises(RuntimeError, match="boom"):
        score_heads(stack, make_samples(2))
    assert_same_state(before, state_of(stack))


def test_scores_do_not_depend_on_the_mode_that_the_model_was_in() -> None:
    stack = AdapterStack(fresh_peft(lora_dropout=0.5))
    stack.begin()
    randomise(stack.parameters(), 0)
    samples = make_samples(2)
    evaluating = score_heads(stack, samples)
    stack.model.train()
    training = score_heads(stack, samples)
    assert torch.equal(training.forgettability, evaluating.forgettability)
    assert torch.equal(training.sensitivity, evaluating.sensitivity)


def test_progress_is_called_once_a_sample() -> None:
    calls: list[int] = []
    stack = make_stack()
    score_heads(stack, make_samples(3), progress=lambda: calls.append(1))
    teach(stack.model, make_samples(2), EVERY_HEAD, 4, 4, progress=lambda: calls.append(1))
    assert len(calls) == 5


def test_rows_of_a_sample_are_the_eager_ones() -> None:
    (sample,) = make_samples(1)
    rows = attention_rows(make_stack().model, sample, EVERY_HEAD)
    expected = eager_rows(make_stack("eager").model, sample)
    for layer in range(N_LAYERS):
        torch.testing.assert_close(rows[layer].double(), expected[layer], rtol=1e-4, atol=1e-6)


# The teacher ----------------------------------------------------------------------------------------------------


def test_under_checkpointing_the_scores_are_the_same_for_less_memory() -> None:
    found, peaks = [], []
    for checkpointing in (False, True):
        stack = make_stack()
        if checkpointing:
            stack.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        modes = [module.training for module in stack.model.modules()]
        with PeakMemory() as memory:
            found.append(score_heads(stack, make_samples(2)))
        peaks.append(memory.peak)
        assert modes == [module.training for module in stack.model.modules()]
    for name in ("forgettability", "sensitivity"):
        torch.testing.assert_close(getattr(found[1], name), getattr(found[0], name), rtol=1e-5, atol=0)
    assert found[0].sensitivity.min() > 0
    assert peaks[1] < 0.95 * peaks[0], "on so small a model the rows are most of it"


def test_between_forward_and_backward_a_layer_keeps_one_input() -> None:
    """Under checkpointing: its input (T x 48 numbers), not q, k (T x 60, T x 20), v, k by head and the gradient of its
    output (T x 60) besides."""
    length = 1024

    def peak(n_layers: int, every_query: bool) -> int:
        lora = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        base = tiny_llama(num_hidden_layers=n_layers, max_position_embeddings=length)
        model = get_peft_model(base, LoraConfig(**lora))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        stack = AdapterStack(model)
        stack.begin()
        ids = torch.arange(length) % (VOCABULARY - 1) + 1
        labels = torch.full((length,), -100)
        labels[-4:] = ids[-4:]
        sample = ReplaySample(ids, labels, torch.tensor([100, 500]))
        score_heads(stack, [sample])
        with PeakMemory() as memory:
            score_heads(stack, [sample], every_query=every_query)
        return memory.peak

    for every_query in (False, True):
        a_layer = (peak(12, every_query) - peak(4, every_query)) / 8
        rows = N_HEADS * 2 * length * 4  # from before the task
        assert a_layer < 1.2 * length * 48 * 4 + rows


def test_scoring_needs_no_more_memory_for_more_samples() -> None:
    peaks = []
    for n in (1, 6):
        samples = [make_samples(1)[0]] * n
        stack = make_stack()
        with PeakMemory() as memory:
            scores = score_heads(stack, samples)
        peaks.append(memory.peak)
        assert not scores.forgettability.requires_grad and not scores.sensitivity.requires_grad
    assert peaks[1] < 1.05 * peaks[0]


@torch.no_grad()
def test_the_teachers_loss_is_the_models_own_over_all_answer_tokens() -> None:
    stack, samples = make_stack(), make_samples(4)
    samples[0].labels[-2:] = -100
    assert {count_answers(sample.labels) for sample in samples} == {1, 3}, "a mean over samples would be another number"
    total, count = 0.0, 0
    for sample in samples:
        n_answer = int((sample.labels[1:] != -100).sum())
        total += float(stack.model(input_ids=sample.input_ids[None], labels=sample.labels[None]).loss) * n_answer
        count += n_answer
    _, loss, _ = teach(stack.model, samples, EVERY_HEAD, 4, 4)
    assert loss > 1 and loss == pytest.approx(total / count, rel=1e-5)


@torch.no_grad()
def test_the_teachers_entropy_and_its_top_k_are_those_of_its_answer_distributions() -> None:
    stack, (sample,) = make_stack(), make_samples(1)
    logits = stack.model(input_ids=sample.input_ids[None]).logits[0].double()
    positions = [i - 1 for i, label in enumerate(sample.labels.tolist()) if label != -100]
    probabilities = logits[positions].softmax(-1)
    expected = float(torch.tensor([-sum(p * p.log() for p in row) for row in probabilities]).mean())
    (signals,), _, entropy = teach(stack.model, [sample], EVERY_HEAD, 4, logit_top_k=6)
    assert entropy > 0.1 and entropy == pytest.approx(expected, rel=1e-4)
    assert len(positions) == 3 == count_answers(sample.labels)
    entries = sparse_rows({0: probabilities}, 6)[0]
    wanted = torch.zeros_like(probabilities).scatter_add(-1, entries.indices, entries.probabilities)
    assert int((wanted > 0).sum()) == 6 * 3
    found = torch.zeros_like(probabilities).scatter_add(-1, signals.logits.indices, signals.logits.probabilities)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(signals.logits.remaining, 1 - wanted.sum(-1), rtol=1e-3, atol=1e-5)
    assert signals.logits.remaining.min() > 0


@torch.no_grad()
def test_no_more_of_an_answer_distribution_is_kept_than_holds_the_mass() -> None:
    stack, (sample,) = make_stack(), make_samples(1)
    (signals,), _, _ = teach(stack.model, [sample], EVERY_HEAD, 4, VOCABULARY - 1, kept_mass=0.8)
    positions = [i - 1 for i, label in enumerate(sample.labels.tolist()) if label != -100]
    probabilities = stack.model(input_ids=sample.input_ids[None]).logits[0, positions].double().softmax(-1)
    ordered = probabilities.sort(dim=-1, descending=True).values.cumsum(-1)
    needed = 1 + (ordered < 0.8).sum(dim=-1)
    assert (needed < VOCABULARY // 2).all()
    assert torch.equal((signals.logits.probabilities > 0).sum(dim=-1), needed)


def test_what_is_kept_of_each_samples_signals_is_what_keep_gives() -> None:
    samples = make_samples(2)
    kept, _, _ = teach(
        make_stack().model, samples, EVERY_HEAD, 4, 4, keep=lambda signals: len(signals.logits.remaining)
    )
    assert kept == [count_answers(sample.labels) for sample in samples]


@pytest.mark.parametrize("kept_mass", [1.0, 0.9])
def test_the_teachers_rows_share_one_budget_over_all_the_selected_heads(kept_mass: float) -> None:
    """The tap's rows as eager attention's are made sparse, all layers and heads at once."""
    stack, samples = make_stack(), make_samples(2)
    selection = HeadSelection({0: [5], 2: [1, 3]})
    signals, _, _ = teach(stack.model, samples, selection, 3, VOCABULARY, kept_mass)
    twin = make_stack("eager").model
    for sample, signal in zip(samples, signals, strict=True):
        assert set(signal.rows) == {0, 2}
        expected = eager_rows(twin, sample)
        exact = torch.cat([expected[layer, list(heads)].flatten(0, 1) for layer, heads in selection.items()])
        entries = sparse_rows({0: exact}, 3, kept_mass)[0]
        wanted = torch.zeros_like(exact).scatter_add(-1, entries.indices, entries.probabilities)
        found, remaining = [], []
        for layer in selection:
            rows = signal.rows[layer]
            flat = torch.zeros(*rows.indices.shape[:-1], exact.shape[-1], dtype=torch.float64)
            found.append(flat.scatter_add(-1, rows.indices, rows.probabilities.double()).flatten(0, 1))
            remaining.append(rows.remaining.double().flatten())
        assert 2 * len(exact) < int((torch.cat(found) > 0).sum()) <= 3 * len(exact)
        torch.testing.assert_close(torch.cat(found), wanted, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(torch.cat(remaining), 1 - wanted.sum(-1), rtol=1e-3, atol=1e-5)
        assert float(signal.logits.remaining.abs().max()) == 0.0


def test_a_teacher_may_be_asked_for_neither_rows_nor_logits() -> None:
    (signals,), loss, entropy = teach(make_stack().model, make_samples(1), HeadSelection({}), 4, logit_top_k=0)
    assert signals.rows == {} and signals.logits is None
    assert loss > 0 and entropy > 0


def test_signals_hold_no_graph_and_lie_on_the_cpu() -> None:
    (signals,), _, _ = teach(make_stack().model, make_samples(1), EVERY_HEAD, 4, 4)
    tensors = [part for rows in signals.rows.values() for part in vars(rows).values()] + list(
        vars(signals.logits).values()
    )
    assert len(tensors) == 3 * N_LAYERS + 3
    assert not any(tensor.requires_grad for tensor in tensors)
    assert all(tensor.device.type == "cpu" for tensor in tensors)
