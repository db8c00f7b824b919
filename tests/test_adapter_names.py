"""Whatever a model carries already: names that the stack would use itself, earlier methods' adapters, hidden ones"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.adapters import relative
from support.core_models import fresh_peft, logits_of, make_dataset, randomise, trained_stack
from support.tiny_models import save_llama, tiny_llama, with_lora
from transformers import AutoModelForCausalLM

from seekr_peft import SeekrConfig
from seekr_peft.errors import AdapterError
from seekr_peft.methods import Seekr, Sequential, get_method
from seekr_peft.model.adapter_stack import AdapterStack
from seekr_peft.recipe import load_recipe
from seekr_peft.recipe.base_model import load_model

OWN_NAMES = ["default", "task_01", "task_02", "earlier_00", "earlier_01", "earlier_02", "sum", "task_01_2"]
DATA = make_dataset(4)


def carrying(name: str, trained: bool) -> Any:
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config, adapter_name=name)
    if trained:
        randomise({key: p for key, p in model.named_parameters() if "lora_" in key}, seed=5)
    return model


def two_tasks(method: Any, rank_limit_passed: bool = False) -> None:
    for number in range(2):
        with method.task(f"task_{number}", replay_from=DATA):
            randomise(method.stack.parameters(), number)
            before = logits_of(method.model)
        if not rank_limit_passed:
            assert relative(logits_of(method.model), before) < 1e-5


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("mode", ["stack", "continue"])
@pytest.mark.parametrize("name", OWN_NAMES)
def test_an_adapter_of_any_name_is_kept_through_tasks_and_through_a_restart(
    name: str, mode: Any, trained: bool, tmp_path: Path
) -> None:
    model = carrying(name, trained)
    before = logits_of(model)
    method = Sequential(model, adapter_mode=mode, directory=tmp_path)
    assert relative(logits_of(model), before) < 1e-5
    two_tasks(method)
    again = Sequential(fresh_peft(lora_dropout=0.1), adapter_mode=mode, directory=tmp_path)
    again.restore(["task_0", "task_1"])
    assert torch.equal(logits_of(again.model), logits_of(model))


@pytest.mark.parametrize("rank_limit", [6, None])
def test_several_adapters_of_the_stacks_own_names_become_one_that_is_their_sum(rank_limit: int | None) -> None:
    model = carrying("task_01", trained=True)
    config = model.peft_config["task_01"]
    for name in ("earlier_00", "earlier_01", "sum", "task_02"):
        model.add_adapter(name, config)
    # Some trained, the others not.
    for seed, name in enumerate(("earlier_00", "task_02")):
        randomise({key: p for key, p in model.named_parameters() if f".{name}." in key}, seed)
    trained = ["task_01", "earlier_00", "task_02"]
    model.base_model.set_adapter(trained)
    before = logits_of(model)
    method = Sequential(model, rank_limit=rank_limit)
    assert method.stack.adopted
    if rank_limit is None:
        assert relative(logits_of(model), before) < 1e-5
    two_tasks(method, rank_limit_passed=rank_limit is not None)
    assert list(model.peft_config) == [method.stack.earlier]


def with_reference(trained: bool, active: list[str]) -> Any:
    """The layout of preference training: beside the trained adapter a copy of it that is only asked now and then."""
    model = carrying("default", trained=True)
    model.add_adapter("ref", model.peft_config["default"])
    parameters = dict(model.named_parameters())
    for key, parameter in parameters.items():
        if trained and ".ref." in key:
            parameter.data.copy_(parameters[key.replace(".ref.", ".default.")])
    model.base_model.set_adapter(active)
    return model


@pytest.mark.parametrize(("active", "inactive"), [("default", "ref"), ("ref", "default")])
@pytest.mark.parametrize("method", ["sequential", "seekr"])
def test_a_trained_adapter_that_is_not_active_is_refused_by_name(active: str, inactive: str, method: str) -> None:
    model = with_reference(trained=True, active=[active])
    before = logits_of(model)
    with pytest.raises(AdapterError) as caught:
        get_method(method)(model)
    text = str(caught.value)
    assert text.startswith(f"adapter '{inactive}' is trained, but not active at base_model.model.model.layers.0.")
    assert (
        f"call model.delete_adapter('{inactive}'), or model.base_model.set_adapter(['{active}', '{inactive}'])" in text
    )
    assert torch.equal(logits_of(model), before) and set(model.peft_config) == {"default", "ref"}


@pytest.mark.parametrize("way", ["deleted", "activated"])
def test_both_ways_on_that_the_refusal_names_keep_the_outputs(way: str) -> None:
    model = with_reference(trained=True, active=["default"])
    alone = logits_of(model)
    if way == "deleted":
        model.delete_adapter("ref")
    else:
        model.base_model.set_adapter(["default", "ref"])
    before = logits_of(model)
    assert (relative(before, alone) > 0.1) is (way == "activated")
    method = Sequential(model)
    assert method.stack.adopted and relative(logits_of(model), before) < 1e-5
    two_tasks(method)


def test_an_untrained_adapter_that_is_not_active_is_harmless() -> None:
    model = with_reference(trained=False, active=["default"])
    before = logits_of(model)
    method = Sequential(model)
    assert method.stack.adopted and relative(logits_of(model), before) < 1e-5
    two_tasks(method)


def test_an_adapter_that_is_switched_off_in_one_layer_only_is_refused_with_the_layer() -> None:
    model = carrying("default", trained=True)
    model.get_submodule("base_model.model.model.layers.1.mlp.up_proj").set_adapter([])
    with pytest.raises(AdapterError, match=r"'default' is trained, but not active at .*layers\.1\.mlp\.up_proj,"):
        AdapterStack(model)


def test_going_on_with_an_adapter_that_is_not_active_is_refused() -> None:
    model = carrying("default", trained=True)
    model.base_model.set_adapter([])
    with pytest.raises(AdapterError, match="'default' is trained, but not active"):
        AdapterStack(model, mode="continue")


@pytest.mark.parametrize("mode", ["stack", "continue"])
def test_a_second_method_over_the_same_model_takes_over_what_the_first_one_learnt(mode: Any, tmp_path: Path) -> None:
    model = fresh_peft(lora_dropout=0.1)
    first = Seekr(model, SeekrConfig(replay_ratio=0.5), adapter_mode=mode)
    two_tasks(first)
    before = logits_of(model)
    for _ in range(3):
        second = Seekr(model, SeekrConfig(replay_ratio=0.5), adapter_mode=mode, directory=tmp_path)
        assert relative(logits_of(model), before) < 1e-5
    two_tasks(second)
    if mode == "stack":
        with pytest.raises(AdapterError, match=r"of this stack is gone: .*go on with the later one"):
            with first.task("late", replay_from=DATA):
                pass
    restored = Seekr(fresh_peft(lora_dropout=0.1), SeekrConfig(replay_ratio=0.5), adapter_mode=mode, directory=tmp_path)
    restored.restore(["task_0", "task_1"])
    assert torch.equal(logits_of(restored.model), logits_of(model))


def test_a_second_methods_tasks_get_adapters_like_the_first_ones_and_not_like_their_sum() -> None:
    lora = {"r": 3, "lora_alpha": 7, "lora_dropout": 0.25, "rank_pattern": {"q_proj": 5}}
    first = trained_stack(3, open_task=False, lora=lora)
    second = AdapterStack(first.model)
    assert second.rank_limit == first.rank_limit == 8 * 5
    config = second.model.peft_config[second.begin()]
    assert {key: getattr(config, key) for key in lora} == lora


def test_a_second_method_inside_an_open_task_ends_the_first_ones_task_in_one_sentence() -> None:
    method = Sequential(fresh_peft())
    with pytest.raises(AdapterError, match="'task_01' of this stack is gone"), method.task("a"):
        randomise(method.stack.parameters(), 0)
        before = logits_of(method.model)
        other = Sequential(method.model)
    assert relative(logits_of(other.model), before) < 1e-5
    two_tasks(other)


# Scalings -------------------------------------------------------------------------------------------------------


def rescale(model: Any, name: str, factor: float) -> None:
    for module in model.modules():
        if hasattr(module, "lora_A") and name in module.scaling:
            module.set_scale(name, factor)


def test_an_adapter_that_was_rescaled_before_the_first_task_counts_as_it_acts(tmp_path: Path) -> None:
    model = with_lora(tiny_llama())
    rescale(model, "default", 1.7)
    before = logits_of(model)
    assert relative(before, logits_of(with_lora(tiny_llama()))) > 0.01
    method = Sequential(model, directory=tmp_path)
    assert relative(logits_of(model), before) < 1e-5
    two_tasks(method)
    again = Sequential(fresh_peft(), directory=tmp_path)
    again.restore(["task_0", "task_1"])
    assert torch.equal(logits_of(again.model), logits_of(model))


@pytest.mark.parametrize("mode", ["stack", "continue"])
def test_a_task_whose_adapter_is_rescaled_is_refused_since_its_files_could_not_say_so(mode: Any) -> None:
    method = Sequential(fresh_peft(), adapter_mode=mode)
    before = logits_of(method.model)
    with pytest.raises(AdapterError, match=r"has a scaling of 3 at .*q_proj and 2 by its configuration"):
        with method.task("a"):
            randomise(method.stack.parameters(), 0)
            rescale(method.model, str(method.stack.current), 1.5)
    assert method.task_names == []
    rescale(method.model, str(method.stack.earlier), 1.0)
    assert torch.equal(logits_of(method.model), before)


def test_rescaling_the_earlier_tasks_is_refused_like_any_other_change_of_them() -> None:
    method = Sequential(fresh_peft())
    two_tasks(method)
    with pytest.raises(AdapterError, match="the frozen adapter 'earlier_02' changed"), method.task("third"):
        rescale(method.model, "earlier_02", 0.5)


# A base with an adapter of its own --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder that also holds a trained adapter."""
    # As many tokens as the tokenizer that a recipe's copy gets.
    path = save_llama(tmp_path / "base", vocab_size=256)
    adapted = with_lora(AutoModelForCausalLM.from_pretrained(path), target_modules=["q_proj", "v_proj"])
    adapted.save_pretrained(path)
    return path


def recipe_for(path: Path) -> dict[str, Any]:
    return {"model": {"name_or_path": str(path), "quantization": "none"}, "tasks": {"format": "demo"}}


def a_lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("way", ["get_peft_model", "another name", "from_pretrained", "load_adapter", "add_adapter"])
def test_a_base_that_was_loaded_with_an_adapter_is_refused_with_how_to_go_on(folder: Path, way: str) -> None:
    if way in ("load_adapter", "add_adapter"):
        base = tiny_llama(hidden_size=64, intermediate_size=128, head_dim=16, num_attention_heads=8)
        base.load_adapter(str(folder)) if way == "load_adapter" else base.add_adapter(a_lora())
    else:
        base = AutoModelForCausalLM.from_pretrained(folder)
    if way == "from_pretrained":
        model = PeftModel.from_pretrained(base, folder, is_trainable=True)
    else:
        model = get_peft_model(base, a_lora(), adapter_name="mine" if way == "another name" else "default")
    with pytest.raises(AdapterError) as caught:
        AdapterStack(model)
    text = str(caught.value)
    assert "was loaded with an adapter of its own (adapter_config.json beside the weights" in text
    assert "move adapter_config.json and adapter_model.safetensors into a folder of their own" in text


@pytest.mark.parametrize("way", ["as the model", "merged"])
def test_the_ways_that_the_refusal_names_keep_what_the_adapter_knows(folder: Path, tmp_path: Path, way: str) -> None:
    wanted = logits_of(AutoModelForCausalLM.from_pretrained(folder))
    apart = tmp_path / "adapter"
    apart.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.move(folder / name, apart / name)
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert relative(logits_of(base), wanted) > 0.01
    model = PeftModel.from_pretrained(base, apart)
    if way == "merged":
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
        recipe = load_recipe(recipe_for(tmp_path / "merged"))
        shutil.copytree(tokenizer_folder(), tmp_path / "merged", dirs_exist_ok=True, ignore=only_tokenizers)
        model, _ = load_model(recipe)
    stack = AdapterStack(model)
    assert stack.adopted == (way == "as the model")
    assert relative(logits_of(stack.model), wanted) < 1e-5


def tokenizer_folder() -> Path:
    from seekr_peft.demo import BASE_PATH

    return Path(BASE_PATH)


def only_tokenizers(directory: str, names: list[str]) -> list[str]:
    return [name for name in names if not name.startswith(("tokenizer", "special"))]


def test_a_recipe_refuses_such_a_folder_before_anything_is_loaded(folder: Path) -> None:
    from seekr_peft.errors import ConfigError

    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe_for(folder))
    (problem,) = caught.value.problems
    assert problem.startswith(f"model.name_or_path: {folder} holds an adapter beside the model (adapter_config.json)")
    assert "move adapter_config.json" in problem
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="is an adapter without its model; give the base model it was trained on, "):
        load_recipe(recipe_for(folder))


def test_a_model_of_the_hub_with_an_adapter_is_refused_once_it_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are not looked at before: the folder stands for what transformers would find under the name."""
    recipe = load_recipe({**recipe_for(folder), "model": {"name_or_path": "some/base", "quantization": "none"}})
    shutil.copytree(tokenizer_folder(), folder, dirs_exist_ok=True, ignore=only_tokenizers)
    for module in ("base_config", "base_model", "base_weights"):
        monkeypatch.setattr(f"seekr_peft.recipe.{module}.resolve_name", lambda model: str(folder), raising=False)
    monkeypatch.setattr("seekr_peft.recipe.base_config.check_base_files", lambda *arguments: None)
    with pytest.raises(AdapterError, match="was loaded with an adapter of its own"):
        load_model(recipe)


@pytest.mark.parametrize("name", ["default", "second"])
def test_a_peft_model_around_a_peft_model_is_refused(name: str) -> None:
    inner = with_lora(tiny_llama(), target_modules=["q_proj", "v_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outer = get_peft_model(inner, a_lora(), adapter_name=name)
    with pytest.raises(AdapterError, match="a PeftModel around another PeftModel, whose adapter PEFT replaces"):
        AdapterStack(outer)


def test_two_adapters_under_one_name_in_one_base_are_refused_when_the_first_task_would_begin() -> None:
    """PEFT puts the second one beside the first, on other layers, and its configuration names its own layers only."""
    inner = with_lora(tiny_llama(), target_modules=["q_proj", "v_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            inner.get_base_model(), LoraConfig(r=4, target_modules=["k_proj"], task_type="CAUSAL_LM")
        )
    with pytest.raises(AdapterError, match=r"sits on other layers than its configuration names, such as .*q_proj"):
        AdapterStack(model).begin()
