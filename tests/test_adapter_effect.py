"""A consolidation is judged by what it does: whatever makes the sum of two adapters another function drops the task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.config import BdLoraConfig
from support.adapters import relative
from support.core_models import fresh_peft, logits_of, make_dataset, randomise
from support.tiny_models import (
    VOCABULARY,
    nf4_llama,
    tiny_gemma2,
    tiny_gpt2,
    tiny_gpt_oss,
    tiny_llama,
    tiny_mamba,
    tiny_mixtral,
)

from seekr_peft import SeekrConfig
from seekr_peft.errors import AdapterError, DivergenceError
from seekr_peft.methods import Seekr, Sequential
from seekr_peft.model.adapter_effect import LENGTH, LOOSE, ROWS, TIGHT, _differences, probe_tokens, unchanged_outputs
from seekr_peft.model.adapter_stack import AdapterStack

DATA = make_dataset(6)


def run_task(method: Any, name: str, seed: int = 0) -> None:
    with method.task(name, replay_from=DATA):
        randomise(method.stack.parameters(), seed)


# What breaks a sum ----------------------------------------------------------------------------------------------


def scaled_branch(model: Any, patch: pytest.MonkeyPatch) -> None:
    """A hook on one factor of one layer of the task's own adapter."""
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    layer.lora_B[model.active_adapter].register_forward_hook(lambda module, args, output: 1.5 * output)


def bent_input(model: Any, patch: pytest.MonkeyPatch) -> None:
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    layer.lora_A[model.active_adapter].register_forward_pre_hook(lambda module, args: (args[0].clamp(min=0),))


def counting_layer(model: Any, patch: pytest.MonkeyPatch) -> None:
    """A layer that does something for each adapter that acts, not for their sum."""
    layer = model.base_model.model.model.layers[2].mlp.down_proj
    layer.register_forward_hook(lambda module, args, output: output + 0.1 * len(module.active_adapters))


def named_outputs(model: Any, patch: pytest.MonkeyPatch) -> None:
    """Around the whole model, by the adapter's name."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        if any(name.startswith("task") for name in module.active_adapters):
            output.logits = 2 * output.logits
        return output

    model.register_forward_hook(hook)


def late_tokens(model: Any, patch: pytest.MonkeyPatch) -> None:
    """Only the last token of each sample."""
    name = model.active_adapter

    def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, -1] *= 2
        return output

    model.base_model.model.model.layers[1].self_attn.q_proj.lora_B[name].register_forward_hook(hook)


def own_forward(model: Any, patch: pytest.MonkeyPatch) -> None:
    """A variant of LoRA, patched into PEFT's own layer: each adapter's change is bounded."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(x)
        for name in self.active_adapters:
            result = result + torch.tanh(self.lora_B[name](self.lora_A[name](x)) * self.scaling[name])
        return result

    patch.setattr(LoraLinear, "forward", forward)


def swapped_factor(model: Any, patch: pytest.MonkeyPatch) -> None:
    """Another forward on one factor alone, of the class that a plain one has."""
    factor = model.base_model.model.model.layers[0].mlp.gate_proj.lora_A[model.active_adapter]
    patch.setattr(factor, "forward", lambda x: torch.nn.functional.linear(x, factor.weight).abs())


BREAKS: list[Callable[[Any, pytest.MonkeyPatch], None]] = [
    scaled_branch,
    bent_input,
    counting_layer,
    named_outputs,
    late_tokens,
    own_forward,
    swapped_factor,
]


@pytest.mark.parametrize("rank_limit", [None, 6], ids=["exact", "cut"])
@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: broken.__name__)
def test_whatever_makes_the_sum_another_function_drops_the_task_and_keeps_the_earlier_ones(
    broken: Any, rank_limit: int | None, tmp_path: Path
) -> None:
    method = Sequential(fresh_peft(), directory=tmp_path, rank_limit=rank_limit)
    run_task(method, "first")
    before, adapters = logits_of(method.model), list(method.model.peft_config)
    with pytest.MonkeyPatch.context() as patch:
        with pytest.raises(AdapterError, match=r"^task 'second' is refused: .* 0\.001 is the most that rounding"):
            with method.task("second", replay_from=DATA):
                randomise(method.stack.parameters(), 1)
                broken(method.model, patch)
        for module in method.model.modules():
            module._forward_hooks.clear()
    assert torch.equal(logits_of(method.model), before)
    assert list(method.model.peft_config) == adapters and method.stack.current is None
    assert method.task_names == ["first"] and not (tmp_path / "tasks" / "02-second").exists()
    assert not any(parameter.requires_grad for parameter in method.model.parameters())
    run_task(method, "second", 1)
    assert method.task_names == ["first", "second"]


def test_the_very_first_task_is_checked_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = Sequential(fresh_peft(), directory=tmp_path)
    before = logits_of(method.model)
    with pytest.raises(AdapterError, match=r"^task 'first' is refused"), method.task("first"):
        randomise(method.stack.parameters(), 0)
        scaled_branch(method.model, monkeypatch)
    assert torch.equal(logits_of(method.model), before) and method.task_names == []


def test_block_diagonal_lora_is_caught_by_its_effect_where_its_name_and_layers_are_not_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("seekr_peft.model.adapter_checks._check_settings", lambda *_: None)
    monkeypatch.setattr("seekr_peft.model.adapter_checks._check_layer", lambda *_: None)
    config = BdLoraConfig(target_modules_bd_a=["q_proj", "v_proj"], target_modules_bd_b=["o_proj"], nblocks=2)
    method = Sequential(fresh_peft(target_modules=["q_proj", "v_proj", "o_proj"], use_bdlora=config))
    with pytest.raises((AdapterError, RuntimeError)) as caught:
        run_task(method, "first")
        run_task(method, "second", 1)
    assert isinstance(caught.value, AdapterError) and "is refused: on " in str(caught.value)


def test_an_adapter_that_becomes_another_kind_while_it_trains_is_refused_at_the_end() -> None:
    method = Sequential(fresh_peft())
    with pytest.raises(AdapterError, match="'task_01' has use_dora=True"), method.task("first"):
        method.model.peft_config["task_01"].use_dora = True
    with pytest.raises(AdapterError, match="'task_01' is merged into the base"), method.task("first"):
        randomise(method.stack.parameters(), 0)
        before = logits_of(method.model)
        method.model.merge_adapter()
    assert relative(logits_of(method.model), logits_of(tiny_llama())) < 1e-6 < relative(before, logits_of(tiny_llama()))


def test_a_model_that_diverged_is_refused_before_it_spoils_the_earlier_tasks() -> None:
    method = Sequential(fresh_peft())
    run_task(method, "first")
    before = logits_of(method.model)
    with pytest.raises(DivergenceError, match=r"^task 'second' diverged: the model's outputs are not finite"):
        with method.task("second"):
            for parameter in method.stack.parameters().values():
                parameter.data.fill_(1e37)
    assert torch.equal(logits_of(method.model), before)


# What does not --------------------------------------------------------------------------------------------------

ATTENTION = {"target_modules": ["q_proj", "v_proj", "o_proj"]}


def in_nf4(folder: Path) -> Any:
    return nf4_llama(folder / "nf4")


def checkpointed(folder: Path) -> Any:
    base = tiny_llama()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
    return base


SOUND: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "float32": (lambda folder: tiny_llama(), {"target_modules": "all-linear"}),
    "bfloat16": (lambda folder: tiny_llama().bfloat16(), {"target_modules": "all-linear"}),
    "float16": (lambda folder: tiny_llama().half(), {"target_modules": "all-linear"}),
    "nf4": (in_nf4, {"target_modules": "all-linear"}),
    "checkpointed": (checkpointed, {"target_modules": "all-linear"}),
    "experts": (lambda folder: tiny_mixtral(), ATTENTION),
    "experts in bfloat16": (lambda folder: tiny_mixtral().bfloat16(), ATTENTION),
    "sinks": (lambda folder: tiny_gpt_oss(), ATTENTION),
    "gemma2": (lambda folder: tiny_gemma2(), ATTENTION),
    "gpt2": (lambda folder: tiny_gpt2(), {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "state space": (lambda folder: tiny_mamba(), {"target_modules": ["x_proj", "in_proj"]}),
}


@pytest.mark.parametrize("kind", SOUND)
def test_a_sound_task_passes_whatever_the_model_is(kind: str, tmp_path: Path) -> None:
    make, lora = SOUND[kind]
    settings = {"r": 4, "lora_alpha": 10, "task_type": "CAUSAL_LM", "lora_dropout": 0.2, **lora}
    method = Sequential(
        get_peft_model(make(tmp_path), LoraConfig(**settings)), directory=tmp_path / "run", rank_limit=6
    )
    method.model.train()
    for number in range(2):
        run_task(method, str(number), number)
    assert method.task_names == ["0", "1"] and method.model.training


def test_a_task_of_the_method_itself_passes_and_the_cut_that_changes_the_outputs_does_not_count() -> None:
    method = Seekr(fresh_peft(), SeekrConfig(replay_ratio=0.5), rank_limit=4)
    run_task(method, "first")
    with method.task("second", replay_from=DATA):
        randomise(method.stack.parameters(), 1)
        before = logits_of(method.model)
    assert relative(logits_of(method.model), before) > 0.05, "rank 8 was cut to 4"
    assert list(method.model.peft_config) == ["earlier_02"]


def test_the_exact_sum_that_is_only_looked_at_leaves_the_draws_of_the_next_task_alone() -> None:
    def start_of_a_third_task(checked: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        stack = AdapterStack(fresh_peft(), rank_limit=4)
        rows = probe_tokens(DATA, VOCABULARY)
        for task in range(2):
            stack.begin()
            randomise(stack.parameters(), task)
            stack.finish(unchanged_outputs(stack.model, rows, "it") if checked else None)
        stack.begin()
        return {key: value.clone() for key, value in stack.parameters().items()}

    first, second = start_of_a_third_task(True), start_of_a_third_task(False)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_one_continued_adapter_is_never_summed_so_nothing_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    method = Sequential(fresh_peft(), adapter_mode="continue")
    with method.task("first"):
        randomise(method.stack.parameters(), 0)
        monkeypatch.setattr(type(method.model), "forward", None)
    assert method.task_names == ["first"]


def test_restoring_compares_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = Sequential(fresh_peft(), directory=tmp_path)
    for number in range(2):
        run_task(method, str(number), number)
    again = Sequential(fresh_peft(seed=9), directory=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(type(again.model), "forward", None)
        again.restore(["0", "1"])
    assert torch.equal(logits_of(again.model), logits_of(method.model))


# The measure ----------------------------------------------------------------------------------------------------


def test_the_differences_are_those_of_the_formula() -> None:
    before, after = torch.randn(7, 11), torch.randn(7, 11)
    b = [[float(x) - sum(row) / len(row) for x in row] for row in before.tolist()]
    a = [[float(x) - sum(row) / len(row) for x in row] for row in after.tolist()]
    change = [sum((x - y) ** 2 for x, y in zip(*rows, strict=True)) ** 0.5 for rows in zip(a, b, strict=True)]
    size = [sum(x * x for x in row) ** 0.5 for row in b]
    middle = sorted(size)[3]
    worst, typical, whole = _differences(before, after)
    assert worst == pytest.approx(max(change) / middle, rel=1e-5)
    assert typical == pytest.approx(sorted(change)[3] / middle, rel=1e-5)
    assert whole == pytest.approx((sum(x * x for x in change) / sum(x * x for x in size)) ** 0.5, rel=1e-5)
    moved = before + torch.arange(7.0)[:, None]
    assert max(_differences(before, moved)) < 1e-6, "one number added to all logits of a token means nothing"


def scaled_head(model: Any, share: float) -> None:
    model.get_base_model().lm_head.weight.data *= 1 + share


@pytest.mark.parametrize(
    ("make", "passes", "fails", "limit"),
    [
        (tiny_llama, TIGHT / 3, TIGHT * 3, TIGHT),
        (lambda: tiny_llama().bfloat16(), LOOSE / 2, LOOSE * 2, LOOSE),
        (lambda: tiny_llama().half(), LOOSE / 2, LOOSE * 2, LOOSE),
        (tiny_mixtral, TIGHT / 3, TIGHT * 3, TIGHT),
    ],
    ids=["float32", "bfloat16", "float16", "experts"],
)
def test_the_tolerance_is_that_of_the_models_arithmetic(make: Any, passes: float, fails: float, limit: float) -> None:
    rows = probe_tokens(DATA, VOCABULARY)
    for share in (passes, fails):
        model = get_peft_model(make(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        if share == passes:
            with unchanged_outputs(model, rows, "it"):
                scaled_head(model, share)
            continue
        with pytest.raises(AdapterError, match=rf"^it is refused: .*and {limit:g} is the most that rounding"):
            with unchanged_outputs(model, rows, "it"):
                scaled_head(model, share)


def test_an_autocast_that_accelerate_left_around_the_forward_counts_as_half_precision() -> None:
    model = fresh_peft()
    inner = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return inner(*args, **kwargs)

    model.forward = forward
    rows = probe_tokens(DATA, VOCABULARY)
    with unchanged_outputs(model, rows, "it"):
        scaled_head(model, LOOSE / 2)
    with pytest.raises(AdapterError, match=f"and {LOOSE:g} is the most"), unchanged_outputs(model, rows, "it"):
        scaled_head(model, LOOSE * 3)


def test_one_token_sent_to_another_expert_is_rounding_and_half_of_them_are_not() -> None:
    """With routed experts a rounding can change one token's outputs by much."""
    rows = [torch.arange(1, 21), torch.arange(21, 41)]
    for count, passes in ((1, True), (11, False)):
        model = get_peft_model(tiny_mixtral(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))

        def hook(module: Any, args: Any, output: torch.Tensor, count: int = count) -> torch.Tensor:
            output = output.clone()
            output[:, -count:] *= 1.05
            return output

        with unchanged_outputs(model, rows, "it") if passes else pytest.raises(AdapterError, match="it is refused"):
            if passes:
                model.get_base_model().lm_head.register_forward_hook(hook)
            else:
                with unchanged_outputs(model, rows, "it"):
                    model.get_base_model().lm_head.register_forward_hook(hook)


def test_the_tokens_are_the_ends_of_the_first_samples_without_their_padding() -> None:
    long = list(range(1, 51))
    dataset = [
        {"input_ids": long, "labels": long},
        {"input_ids": [0, 0, 5, 6], "labels": [1, 1, 1, 1], "attention_mask": [0, 0, 1, 1]},
        {"input_ids": torch.tensor([7, 8]), "labels": torch.tensor([7, 8])},
        {"input_ids": [], "labels": []},
        {"input_ids": [9], "labels": [9]},
    ]
    assert [row.tolist() for row in probe_tokens(dataset, 61)] == [long[-LENGTH:], [5, 6], [7, 8]]


SHOWS_NO_TOKENS = [None, [], iter([1]), [{"text": "x"}], ["x"], [{"input_ids": [[1, 2]]}]]


@pytest.mark.parametrize("dataset", SHOWS_NO_TOKENS, ids=range(len(SHOWS_NO_TOKENS)))
def test_where_no_tokens_are_shown_random_ones_are_taken_the_same_each_time(dataset: Any) -> None:
    rows = probe_tokens(dataset, 61)
    assert len(rows) == ROWS and all(int(row.min()) >= 0 and int(row.max()) < 61 for row in rows)
    assert len({int(token) for row in rows for token in row}) > 20
    assert all(torch.equal(a, b) for a, b in zip(rows, probe_tokens(None, 61), strict=True))
