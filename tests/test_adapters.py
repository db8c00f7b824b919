"""AdapterStack: what trains, what stays frozen, and the sum of the earlier adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.adapters import MODES, SUMMABLE, adapter_change, relative, train_step, trainable, two_adapters
from support.core_models import fresh_peft, logits_of, randomise, trained_stack
from support.tiny_models import N_LAYERS, tiny_llama, with_lora

from seekr_peft.errors import AdapterError
from seekr_peft.model.adapter_stack import AdapterStack
from seekr_peft.model.low_rank_sum import cut_to_rank


@pytest.mark.parametrize("mode", MODES)
def test_exactly_the_current_adapter_trains(mode: Any) -> None:
    stack = trained_stack(mode=mode)
    current = {name for name, _ in stack.model.named_parameters() if f".{stack.current}." in name}
    assert len(current) == 2 * 7 * N_LAYERS == len(stack.parameters())
    assert trainable(stack.model) == current


@pytest.mark.parametrize("mode", MODES)
def test_nothing_trains_between_tasks(mode: Any) -> None:
    assert trainable(trained_stack(open_task=False, mode=mode).model) == set()
    stack = AdapterStack(fresh_peft(), mode=mode)
    assert trainable(stack.model) == set()
    with pytest.raises(AdapterError, match="no task is being trained"):
        stack.parameters()


def test_a_new_task_starts_where_the_last_one_ended() -> None:
    for mode in MODES:
        stack = trained_stack(open_task=False, mode=mode)
        before = logits_of(stack.model)
        stack.begin()
        assert torch.equal(logits_of(stack.model), before)


def test_a_fresh_model_is_the_bare_base_before_and_after_the_stack() -> None:
    base = logits_of(tiny_llama())
    stack = AdapterStack(fresh_peft())
    assert torch.equal(logits_of(stack.model), base)
    stack.begin()
    assert torch.equal(logits_of(stack.model), base)


def test_tasks_cannot_overlap() -> None:
    stack = trained_stack()
    with pytest.raises(AdapterError, match=r"'task_02' is still being trained"):
        stack.begin()


def test_the_earlier_adapter_is_bitwise_unchanged_by_training_and_its_own_adapter_is_not() -> None:
    stack = trained_stack()
    frozen = {k: v.clone() for k, v in stack.model.named_parameters() if f".{stack.earlier}." in k or "lora" not in k}
    current = {key: value.detach().clone() for key, value in stack.parameters().items()}
    assert any(bool(value.any()) for key, value in frozen.items() if "lora_B" in key)
    train_step(stack)
    now = dict(stack.model.named_parameters())
    assert all(torch.equal(now[key], value) for key, value in frozen.items())
    assert not any(torch.equal(value, current[key]) for key, value in stack.parameters().items())
    stack.check_frozen_unchanged()


@pytest.mark.parametrize("size", [1.0, 1e-7])
def test_a_tampered_earlier_adapter_is_noticed_before_the_task_is_finished(size: float) -> None:
    stack = trained_stack()
    weight = next(p for name, p in stack.model.named_parameters() if f"lora_B.{stack.earlier}" in name)
    weight.data[0, 0] += size * weight.data[0, 0]
    with pytest.raises(AdapterError, match="frozen adapter 'earlier_01' changed while 'task_02' was trained"):
        stack.finish()
    assert stack.current == "task_02"


@pytest.mark.parametrize("mode", MODES)
def test_abandoning_a_task_restores_the_model_bitwise(mode: Any) -> None:
    stack = trained_stack(open_task=False, mode=mode)
    before, n_parameters = logits_of(stack.model), len(list(stack.model.parameters()))
    names = list(stack.model.peft_config)
    stack.begin()
    train_step(stack)
    assert not torch.equal(logits_of(stack.model), before)
    stack.abandon()
    assert torch.equal(logits_of(stack.model), before)
    assert list(stack.model.peft_config) == names and len(list(stack.model.parameters())) == n_parameters
    assert stack.current is None and stack.n_tasks == 1 and trainable(stack.model) == set()
    stack.begin()
    assert torch.equal(logits_of(stack.model), before)


@pytest.mark.parametrize("mode", MODES)
def test_abandoning_the_very_first_task_leaves_a_working_base(mode: Any) -> None:
    stack = AdapterStack(fresh_peft(), mode=mode)
    before = logits_of(stack.model)
    stack.begin()
    randomise(stack.parameters(), 0)
    stack.abandon()
    assert torch.equal(logits_of(stack.model), before)
    assert stack.model.generate(input_ids=torch.ones(1, 3, dtype=torch.long), max_new_tokens=2).shape == (1, 5)
    stack.begin()
    randomise(stack.parameters(), 0)
    stack.finish()
    assert not torch.equal(logits_of(stack.model), before)


@pytest.mark.parametrize("mode", MODES)
def test_before_task_shows_the_model_before_the_task_and_restores_it_after_an_exception(mode: Any) -> None:
    stack = trained_stack(open_task=False, mode=mode)
    before = logits_of(stack.model)
    stack.begin()
    train_step(stack)
    after, training = logits_of(stack.model), trainable(stack.model)
    assert not torch.equal(after, before)
    with pytest.raises(RuntimeError, match="boom"), stack.before_task():
        assert torch.equal(logits_of(stack.model), before)
        raise RuntimeError("boom")
    assert torch.equal(logits_of(stack.model), after)
    assert trainable(stack.model) == training and len(training) > 0


def test_frozen_stops_every_gradient_and_restores_each_flag_after_an_exception() -> None:
    stack = trained_stack()
    before = trainable(stack.model)
    with pytest.raises(RuntimeError, match="boom"), stack.frozen():
        assert trainable(stack.model) == set()
        raise RuntimeError("boom")
    assert trainable(stack.model) == before and len(before) > 0


@pytest.mark.parametrize("lora", SUMMABLE, ids=str)
def test_concatenation_is_the_exact_sum_of_the_adapters(lora: dict) -> None:
    stack = trained_stack(n_tasks=1, lora=lora)
    wanted = adapter_change(stack.model, [stack.earlier, stack.current])
    before = logits_of(stack.model)
    consolidation = stack.finish()
    found = adapter_change(stack.model, [stack.earlier])
    assert relative(logits_of(stack.model), before) < 1e-5
    assert relative(logits_of(stack.model), logits_of(tiny_llama())) > 0.1
    for path, change in wanted.items():
        assert relative(found[path], change) < 1e-6
    assert consolidation.discarded_energy == consolidation.worst_module_energy == 0.0
    assert list(stack.model.peft_config) == ["earlier_02"]


def test_ranks_add_up_without_a_limit() -> None:
    stack = trained_stack(n_tasks=3, open_task=False)
    assert stack.last_consolidation.rank == 12 == stack.model.peft_config["earlier_03"].r
    assert stack.model.peft_config["earlier_03"].lora_alpha == 12, "a scaling of 1"


def test_concatenation_has_the_factors_of_pefts_own_and_linear_would_be_wrong() -> None:
    model = two_adapters()
    wanted = adapter_change(model, ["default", "second"])
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "cat", combination_type="cat")
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "linear", combination_type="linear")
    theirs = adapter_change(model, ["cat"])
    linear = adapter_change(model, ["linear"])
    # (A1 + A2)(B1 + B2) has cross terms as large as the sum itself.
    assert min(relative(linear[path], wanted[path]) for path in wanted) > 0.5
    factors = {
        path: (module.lora_A["cat"].weight * module.scaling["cat"], module.lora_B["cat"].weight)
        for path, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    for name in ("cat", "linear"):
        model.delete_adapter(name)
    stack = AdapterStack(model)
    ours = adapter_change(model, [stack.earlier])
    for path, module in model.named_modules():
        if hasattr(module, "lora_A"):
            assert relative(ours[path], theirs[path]) < 1e-6
            torch.testing.assert_close(module.lora_A[stack.earlier].weight, factors[path][0], rtol=1e-5, atol=0)
            torch.testing.assert_close(module.lora_B[stack.earlier].weight, factors[path][1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("n_tasks", [1, 2, 3])
def test_a_rank_limit_that_is_not_passed_discards_nothing(n_tasks: int) -> None:
    stack = trained_stack(n_tasks, open_task=False, rank_limit=12)
    assert (stack.last_consolidation.rank, stack.last_consolidation.discarded_energy) == (4 * n_tasks, 0.0)


@pytest.mark.parametrize("lora", [{}, SUMMABLE[2]], ids=str)
def test_above_the_rank_limit_the_discarded_energy_is_that_of_a_dense_svd(lora: dict) -> None:
    stack = trained_stack(n_tasks=1, rank_limit=5, lora=lora)
    wanted = adapter_change(stack.model, [stack.earlier, stack.current])
    consolidation = stack.finish()
    found = adapter_change(stack.model, [stack.earlier])
    lost, total = {}, {}
    for path, change in wanted.items():
        energy = torch.linalg.svdvals(change).square()
        lost[path], total[path] = float(energy[5:].sum()), float(energy.sum())
        # No rank-5 matrix is nearer (Eckart and Young).
        assert float((found[path] - change).square().sum()) == pytest.approx(lost[path], rel=1e-4, abs=1e-9)
        assert int(torch.linalg.matrix_rank(found[path], rtol=1e-5)) <= 5
    assert consolidation.rank == 5
    assert consolidation.discarded_energy == pytest.approx(sum(lost.values()) / sum(total.values()), rel=1e-4)
    worst = max(lost[path] / total[path] for path in lost)
    assert consolidation.worst_module_energy == pytest.approx(worst, rel=1e-4)
    assert worst > consolidation.discarded_energy > 0.01


@pytest.mark.parametrize(
    ("out", "inside", "rank", "limit"), [(48, 52, 12, 12), (48, 8, 12, 10), (6, 52, 12, 10), (6, 5, 4, 3)]
)
def test_truncation_is_exact_where_the_limit_covers_the_rank_of_the_change(
    out: int, inside: int, rank: int, limit: int
) -> None:
    a, b = torch.randn(rank, inside), torch.randn(out, rank)
    new_a, new_b, lost, total = cut_to_rank(a, b, limit)
    singular = torch.linalg.svdvals(b.double() @ a.double())
    assert new_a.shape[0] == new_b.shape[1] <= limit
    assert lost == pytest.approx(float(singular[limit:].square().sum()), rel=1e-6, abs=1e-12)
    assert total == pytest.approx(float(singular.square().sum()), rel=1e-6)
    if limit >= min(out, inside, rank):
        assert relative(new_b.double() @ new_a.double(), b.double() @ a.double()) < 1e-6


def test_a_failing_consolidation_leaves_the_task_open_to_be_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = trained_stack(n_tasks=1)
    with stack.before_task():
        before = logits_of(stack.model)

    def out_of_memory(*args: Any) -> None:
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr("seekr_peft.model.adapter_stack.summed_factors", out_of_memory)
        with pytest.raises(MemoryError):
            stack.finish()
    assert (stack.current, stack.n_tasks) == ("task_02", 1)
    stack.abandon()
    assert torch.equal(logits_of(stack.model), before)


def test_a_trained_adapter_that_the_model_already_carries_counts_as_an_earlier_one() -> None:
    model = with_lora(tiny_llama())
    before = logits_of(model)
    stack = AdapterStack(model)
    assert list(model.peft_config) == ["earlier_00"] and stack.n_tasks == 0
    assert relative(logits_of(model), before) < 1e-5
    stack.begin()
    assert relative(logits_of(model), before) < 1e-5
    assert relative(before, logits_of(tiny_llama())) > 0.1
