"""``AdapterStack``, and the ways of PEFT, bitsandbytes and the Trainer that it exists to avoid, each measured."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.core_models import fresh_peft, logits_of, make_dataset, randomise, trained_stack
from support.tiny_models import N_LAYERS, nf4_llama, padded_batch, tiny_llama, tiny_mixtral, with_lora
from torch import Tensor, nn

from seekr_peft.errors import AdapterError
from seekr_peft.methods import get_method
from seekr_peft.model.adapter_stack import AdapterStack, Consolidation, _truncate
from seekr_peft.model.bitsandbytes_cpu import keep_differentiable

MODES = ["stack", "continue"]


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapter_change(model: Any, names: list[str]) -> dict[str, Tensor]:
    """Sum over adapters of scaling * B A, dense, float64, by module."""
    changes = {}
    for path, module in model.named_modules():
        if hasattr(module, "lora_A"):
            present = [name for name in names if name in module.lora_A]
            parts = [
                module.scaling[name] * module.lora_B[name].weight.double() @ module.lora_A[name].weight.double()
                for name in present
            ]
            changes[path] = torch.stack(parts).sum(dim=0).detach()
    return changes


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def train_step(stack: AdapterStack, optimizer: torch.optim.Optimizer | None = None) -> None:
    optimizer = optimizer or torch.optim.AdamW([p for p in stack.model.parameters() if p.requires_grad], lr=1e-2)
    for item in make_dataset(3):
        ids, labels = torch.tensor([item["input_ids"]]), torch.tensor([item["labels"]])
        stack.model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# One task -------------------------------------------------------------------------------------------------------


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


# Consolidation --------------------------------------------------------------------------------------------------

SUMMABLE = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 7, "down_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    {"use_rslora": True, "rank_pattern": {"v_proj": 6}, "target_modules": ["q_proj", "v_proj"]},
    {"lora_dropout": 0.3},
]


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


def two_adapters() -> Any:
    model = fresh_peft()
    model.add_adapter("second", LoraConfig(r=4, lora_alpha=20, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.base_model.set_adapter(["default", "second"])
    return model


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
    new_a, new_b, lost, total = _truncate(a, b, limit)
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
        patch.setattr("seekr_peft.model.adapter_stack._summed_factors", out_of_memory)
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


# What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "key"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices=\[3\]"),
    ],
)
def test_an_adapter_that_is_no_plain_sum_is_refused_by_its_key(lora: dict, key: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = fresh_peft(**{**lora, "target_modules": ["q_proj"]})
    with pytest.raises(AdapterError, match=f"adapter 'default' has {key}"):
        AdapterStack(model)


def test_an_adapter_on_the_embeddings_is_refused() -> None:
    with pytest.raises(AdapterError, match="embed_tokens, which is no linear layer"):
        AdapterStack(fresh_peft(target_modules=["embed_tokens", "q_proj"]))


# PEFT's own pattern of ranks for experts.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_an_adapter_on_experts_is_refused_and_one_on_the_attention_beside_them_adds_up() -> None:
    """On the experts the sum of two tasks was 46 % off: their factors lie in one A and one B."""
    with pytest.raises(AdapterError, match=r"on the experts or their router, .*layers\.0\.mlp\..*'o_proj'\]"):
        AdapterStack(with_lora(tiny_mixtral()))
    with pytest.raises(AdapterError, match=r"on the experts or their router, .*layers\.0\.mlp\.gate,"):
        AdapterStack(with_lora(tiny_mixtral(), target_modules=["gate", "q_proj"]))
    model = with_lora(tiny_mixtral(), target_modules=["q_proj", "v_proj", "o_proj"])
    stack = AdapterStack(model)
    for _ in range(2):
        stack.begin()
        for parameter in stack.parameters().values():
            parameter.data += 0.05 * torch.randn_like(parameter)
        before = logits_of(model)
        stack.finish()
        assert relative(logits_of(model), before) < 1e-5


def test_a_second_adapter_is_checked_as_well() -> None:
    model = fresh_peft(target_modules=["q_proj"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    with pytest.raises(AdapterError, match="sit on different modules"):
        AdapterStack(model)
    model.delete_adapter("other")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(AdapterError, match="'other' has use_dora=True"):
        AdapterStack(model)


def test_a_model_without_lora_is_refused_with_what_it_is() -> None:
    from peft import IA3Config

    with pytest.raises(AdapterError, match="the model is a LlamaForCausalLM, not a PeftModel"):
        AdapterStack(tiny_llama())  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="the model is a str, not a PeftModel"):
        AdapterStack("some/model")  # type: ignore[arg-type]
    model = get_peft_model(tiny_llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(AdapterError, match="is IA3Config; only LoRA adapters"):
        AdapterStack(model)


def compiled(model: nn.Module) -> Any:
    # Inductor, the default, takes seconds to be imported and warns of itself.
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("method", ["sequential", "replay", "seekr"])
@pytest.mark.parametrize("wrapper", [compiled, nn.DataParallel, lambda model: compiled(nn.DataParallel(model))])
def test_a_wrapper_around_a_peft_model_is_refused_with_where_it_belongs(wrapper: Any, method: str) -> None:
    wrapped = wrapper(fresh_peft())
    message = (
        rf"^the model is a {type(wrapped).__name__} around a PeftModel; give the PeftModel itself, before "
        r"torch\.compile or .*TrainingArguments\(torch_compile=True\)"
    )
    with pytest.raises(AdapterError, match=message):
        get_method(method)(wrapped)


def test_by_default_eight_tasks_are_summed_exactly_and_a_ninth_is_not() -> None:
    stack = trained_stack(n_tasks=8, open_task=False, rank_limit="auto")
    assert stack.rank_limit == 8 * 4
    assert stack.last_consolidation == Consolidation(32, 0.0, 0.0)
    stack.begin()
    randomise(stack.parameters(), seed=99)
    consolidation = stack.finish()
    assert consolidation is not None and consolidation.rank == 32 and consolidation.discarded_energy > 0


def test_settings_out_of_range_are_refused_with_their_value() -> None:
    with pytest.raises(AdapterError, match="'stack' or 'continue', got 'pile'"):
        AdapterStack(fresh_peft(), mode="pile")  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="at least 1, got 0"):
        AdapterStack(fresh_peft(), rank_limit=0)
    with pytest.raises(AdapterError, match="at least 1, got 'much'"):
        AdapterStack(fresh_peft(), rank_limit="much")  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match=r"one adapter, got \['default', 'second'\]"):
        AdapterStack(two_adapters(), mode="continue")


# Traps of the libraries below -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nf4_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nf4")


def bitsandbytes_repacks() -> bool:
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


def nf4_peft(folder: Path, double_quant: bool = True, **lora: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
        return get_peft_model(nf4_llama(folder, double_quant=double_quant), LoraConfig(**options))


@torch.no_grad()
def test_merging_into_nf4_rounds_most_of_the_update_away(nf4_folder: Path) -> None:
    """Why consolidation never merges into the base: of an update of 1 % of |W| less than a quarter arrives."""
    import bitsandbytes as bnb

    model = nf4_peft(nf4_folder, target_modules=["down_proj"])
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    assert isinstance(layer.get_base_layer(), bnb.nn.Linear4bit)

    def weight() -> Tensor:
        base = layer.get_base_layer().weight
        return bnb.functional.dequantize_4bit(base.data, base.quant_state).clone()

    before = weight()
    for matrices in (layer.lora_A, layer.lora_B):
        matrices["default"].weight.data.normal_()
    size = float(layer.get_delta_weight("default").norm() / before.norm())
    layer.lora_B["default"].weight.data *= 0.01 / size
    update = layer.get_delta_weight("default").detach()
    assert float(update.norm() / before.norm()) == pytest.approx(0.01, rel=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says so itself
        layer.merge()
        arrived = weight() - before
        layer.unmerge()
    survived = float((arrived * update).sum() / update.square().sum())
    assert survived < 0.25, f"{survived:.0%} of the update survived"
    assert not torch.equal(weight(), before), "and unmerging does not give the base back"


@pytest.mark.parametrize("mode", MODES)
def test_the_stack_works_on_an_nf4_base_without_touching_it(nf4_folder: Path, tmp_path: Path, mode: Any) -> None:
    stack = AdapterStack(nf4_peft(nf4_folder), mode=mode)
    packed = {name: p.clone() for name, p in stack.model.named_parameters() if p.dtype == torch.uint8}
    assert len(packed) == 7 * N_LAYERS
    for task in range(2):
        stack.begin()
        randomise(stack.parameters(), task)
        train_step(stack)
        before = logits_of(stack.model)
        stack.finish()
        assert relative(logits_of(stack.model), before) < 1e-5
    assert all(torch.equal(dict(stack.model.named_parameters())[name], value) for name, value in packed.items())
    stack.export(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(nf4_llama(nf4_folder), tmp_path / "adapter")
    keep_differentiable(loaded)  # otherwise CPUs with AVX512-BF16 round in eval mode: 2 % here
    assert relative(logits_of(loaded), logits_of(stack.model)) < 1e-6


def gradients_after_a_generation(model: Any) -> dict[str, Tensor]:
    """Gradients of the adapters in training mode, after one forward in eval mode as every evaluation does it."""
    batch = padded_batch("right")
    with torch.no_grad():
        model.eval()(**batch)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_generation_between_two_tasks_leaves_the_gradient_of_4_bit_layers_right(nf4_folder: Path) -> None:
    """Against the gradient of a model that never was in eval mode; CPUs with AVX512-BF16 get it wrong by themselves."""
    reference = nf4_peft(nf4_folder).train()
    batch = padded_batch("right")
    reference(**batch, labels=batch["input_ids"]).loss.backward()
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    stack = AdapterStack(nf4_peft(nf4_folder), mode="continue")
    stack.begin()
    found = gradients_after_a_generation(stack.model)
    assert len(found) == 2 * 7 * N_LAYERS
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.skipif(not bitsandbytes_repacks(), reason="bitsandbytes repacks only on CPUs with AVX512-BF16")
def test_bitsandbytes_alone_loses_the_gradient_after_a_generation(nf4_folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # autograd's only sign of it
        lost = gradients_after_a_generation(nf4_peft(nf4_folder))
    assert (
        any(float(gradient.abs().max()) == 0.0 for gradient in lost.values() if gradient is not None)
        or len(lost) < 2 * 7 * N_LAYERS
    ), "bitsandbytes keeps the gradient now: model/bitsandbytes_cpu.py is no longer needed"


@pytest.mark.skipif(not bitsandbytes_repacks(), reason="bitsandbytes repacks only on CPUs with AVX512-BF16")
@pytest.mark.parametrize("double_quant", [True, False])
def test_4_bit_layers_that_were_repacked_are_unpacked_to_train(
    nf4_folder: Path, double_quant: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Against a model that never generated: all that remains is the scales' rounding to bfloat16."""
    model, untouched = (nf4_peft(nf4_folder, double_quant=double_quant) for _ in range(2))
    expected = logits_of(AdapterStack(untouched).model)
    assert relative(logits_of(model), expected) > 1e-4, "the eval forward no longer repacks"
    stack = AdapterStack(model)
    assert f"{7 * N_LAYERS} 4-bit layers had been repacked" in caplog.text
    assert relative(logits_of(stack.model), expected) < 0.02
    stack.begin()
    gradients = gradients_after_a_generation(stack.model)
    assert len(gradients) == 2 * 7 * N_LAYERS
    assert all(float(gradient.abs().max()) > 0 for name, gradient in gradients.items() if "lora_B" in name)


def test_disable_adapter_unfreezes_the_earlier_adapter_and_the_optimizer_check_says_what_to_do() -> None:
    stack = trained_stack()
    optimizer = torch.optim.SGD(stack.parameters().values(), lr=0.1)
    stack.check_optimizer(optimizer)
    with stack.model.disable_adapter():
        pass
    thawed = {name for name in trainable(stack.model) if f".{stack.earlier}." in name}
    assert len(thawed) == 2 * 7 * N_LAYERS, "PEFT restores gradients by itself now: the stack needs no repair"
    with pytest.raises(AdapterError, match=r"42 frozen tensors became trainable.*call method.stack.activate\(\)"):
        stack.check_optimizer(optimizer)
    stack.activate()
    stack.check_optimizer(optimizer)


def test_set_adapter_takes_no_list_and_the_tuners_own_makes_them_all_trainable() -> None:
    stack = trained_stack()
    names = [stack.earlier, stack.current]
    with pytest.raises(TypeError):
        stack.model.set_adapter(names)
    stack.model.base_model.set_adapter(names)
    assert len(trainable(stack.model)) == 2 * 2 * 7 * N_LAYERS
    stack.activate()
    assert len(trainable(stack.model)) == 2 * 7 * N_LAYERS
    assert stack.model.base_model.active_adapter == names


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda stack: [nn.Parameter(torch.zeros(1))], "42 of them are missing and 1 others are in it"),
        (lambda stack: list(stack.parameters().values())[:-1], "1 of them are missing and 0 others"),
        (lambda stack: [p for p in stack.model.parameters() if p.is_floating_point()], "0 of them are missing and"),
    ],
    ids=["a foreign tensor", "one missing", "everything"],
)
def test_an_optimizer_with_other_tensors_is_refused(choose: Any, message: str) -> None:
    stack = trained_stack()
    with pytest.raises(AdapterError, match=message):
        stack.check_optimizer(torch.optim.SGD(choose(stack), lr=0.1))


def test_an_empty_optimizer_is_refused() -> None:
    stack = trained_stack()
    optimizer = torch.optim.SGD(stack.parameters().values(), lr=0.1)
    optimizer.param_groups[0]["params"] = []
    with pytest.raises(AdapterError, match="exactly the 42 tensors of adapter 'task_02', but 42 of them are missing"):
        stack.check_optimizer(optimizer)


# Files ----------------------------------------------------------------------------------------------------------


def sequence(tmp_path: Path, mode: Any, rank_limit: int | None, lora: dict) -> tuple[AdapterStack, list[Path]]:
    stack = AdapterStack(fresh_peft(**lora), mode=mode, rank_limit=rank_limit)
    directories = []
    for task in range(3):
        stack.begin()
        randomise(stack.parameters(), seed=task)
        directories.append(tmp_path / str(task) / "adapter")
        stack.save_current(directories[-1])
        stack.finish()
    return stack, directories


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank_limit", [None, 6])
@pytest.mark.parametrize("lora", [SUMMABLE[0], SUMMABLE[2]], ids=str)
def test_restoring_gives_bitwise_the_uninterrupted_adapters(
    tmp_path: Path, mode: Any, rank_limit: int | None, lora: dict
) -> None:
    stack, directories = sequence(tmp_path, mode, rank_limit, lora)
    again = AdapterStack(fresh_peft(seed=99, **lora), mode=mode, rank_limit=rank_limit)
    again.restore(directories)
    assert (again.n_tasks, again.earlier) == (3, stack.earlier)
    assert torch.equal(logits_of(again.model), logits_of(stack.model))
    wanted, found = stack._parameters_of(stack.earlier), again._parameters_of(again.earlier)
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[key], found[key]) for key in wanted)


@pytest.mark.parametrize("mode", MODES)
def test_an_export_is_a_plain_adapter_with_the_same_logits(tmp_path: Path, mode: Any) -> None:
    stack, directories = sequence(tmp_path, mode, None, SUMMABLE[2])
    stack.export(tmp_path / "out" / "deep" / "adapter")
    assert {path.name for path in (tmp_path / "out" / "deep" / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out" / "deep" / "adapter")
    assert relative(logits_of(loaded), logits_of(stack.model)) < 1e-6
    assert relative(logits_of(loaded), logits_of(tiny_llama())) > 0.1
    alone = PeftModel.from_pretrained(tiny_llama(), directories[0])
    assert relative(logits_of(alone), logits_of(tiny_llama())) > 0.1


def test_exporting_twice_overwrites_and_leaves_nothing_behind(tmp_path: Path) -> None:
    stack, _ = sequence(tmp_path, "stack", None, {})
    for _ in range(2):
        stack.export(tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "adapter"]


def test_nothing_can_be_exported_before_a_task_is_finished(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="nothing to export before the first task"):
        AdapterStack(fresh_peft()).export(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"r": 5}, "was trained with r=4, the model has 5"),
        ({"lora_alpha": 16}, "was trained with lora_alpha=8, the model has 16"),
        ({"use_rslora": True}, "was trained with use_rslora=False, the model has True"),
        ({"target_modules": ["q_proj"]}, "was trained with target_modules="),
    ],
)
def test_an_adapter_of_other_settings_is_refused(tmp_path: Path, lora: dict, message: str) -> None:
    _, directories = sequence(tmp_path, "stack", None, {})
    with pytest.raises(AdapterError, match=message):
        AdapterStack(fresh_peft(**lora)).restore(directories)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    _, directories = sequence(tmp_path, "stack", None, {})
    wider = get_peft_model(
        tiny_llama(hidden_size=36),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    with pytest.raises(AdapterError, match="does not fit the model"):
        AdapterStack(wider).restore(directories)


@pytest.mark.parametrize("damage", ["missing weights", "missing config", "cut off", "pickle instead"])
def test_a_damaged_adapter_directory_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    _, directories = sequence(tmp_path, "stack", None, {})
    weights = directories[1] / "adapter_model.safetensors"
    if damage == "missing config":
        (directories[1] / "adapter_config.json").unlink()
    elif damage == "cut off":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        if damage == "pickle instead":
            shutil.copy(weights, directories[1] / "adapter_model.bin")
        weights.unlink()
    with pytest.raises(AdapterError, match=r"1.adapter"):
        AdapterStack(fresh_peft()).restore(directories)
