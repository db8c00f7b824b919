"""AdapterStack on a 4-bit base, and on disk."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.adapters import MODES, SUMMABLE, relative, train_step, trainable
from support.core_models import fresh_peft, logits_of, randomise, trained_stack
from support.tiny_models import N_LAYERS, nf4_llama, padded_batch, tiny_llama
from torch import Tensor, nn

from seekr_peft.errors import AdapterError
from seekr_peft.model.adapter_stack import AdapterStack
from seekr_peft.model.bitsandbytes_cpu import keep_differentiable


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
