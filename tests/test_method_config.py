"""Each method's own configuration: which one it takes, one ``method`` section for several methods, and the knobs of
methods that other packages register."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

import pytest
import torch
from pydantic import Field
from support.core_models import fresh_peft, make_dataset, train_by_hand
from support.small_run import small_recipe
from torch import Tensor, nn
from transformers import TrainingArguments

import seekr_peft.methods.registry as names_module
from seekr_peft import cli
from seekr_peft.compare import plan_comparison
from seekr_peft.config import MethodConfig, ReplayConfig, SeekrConfig
from seekr_peft.errors import ConfigError
from seekr_peft.losses import ReplayTerms, Term
from seekr_peft.methods import Ewc, Replay, Seekr, Sequential, get_method
from seekr_peft.methods.registry import OWN_CONFIGS, OWN_METHODS
from seekr_peft.methods.settings import EwcConfig, LwfConfig, OLoraConfig
from seekr_peft.recipe import load_recipe, recipe_text, stored_recipe
from seekr_peft.run.progress import describe_terms
from seekr_peft.training.trainer import ContinualTrainer

FORMER = {
    "replay_ratio": 0.01, "layer_budget": 0.75, "head_budget": 0.125, "query_budget": 100, "query_choice": "random",
    "lambda1": 0.5, "lambda2": 1.0, "head_choice": "importance", "layer_choice": "anywhere", "norm": "frobenius",
    "accumulate": "product_of_sums", "sensitivity_queries": "all", "attention_distillation": True,
    "logits_distillation": True, "replay_step": "added", "replay_every": None, "min_replay_passes": 30,
    "replay_batch_size": 8, "row_top_k": 32, "logit_top_k": 1024, "kept_mass": 0.995, "storage_dtype": "uint8",
    "lwf_lambda": 1.0, "lwf_temperature": 2.0, "ewc_lambda": 1.0, "ewc_samples": 64, "olora_lambda": 0.5,
    "sample_selection": "random", "teacher_loss_limit": 0.7, "teacher_entropy_limit": 1.0, "seed": 0,
}  # fmt: skip
"""What ``SeekrConfig().to_dict()`` was while it held the settings of all methods."""


# The package's own --------------------------------------------------------------------------------------------------


def test_the_configurations_that_a_recipe_is_checked_against_are_the_methods_own() -> None:
    assert {name: get_method(name).config_class for name in OWN_METHODS} == OWN_CONFIGS
    homes = {key: name for name, kind in OWN_CONFIGS.items() for key in kind.setting_names()}
    assert {homes[key] for key in ("lwf_lambda", "lwf_temperature")} == {"lwf"} and homes["olora_lambda"] == "olora"
    assert not {key for key in SeekrConfig.setting_names() if key.startswith(("lwf_", "ewc_", "olora_"))}


def test_a_setting_that_methods_share_has_one_rule_and_one_default() -> None:
    rules: dict[str, set[Any]] = {}
    for kind in OWN_CONFIGS.values():
        hints = get_type_hints(kind, include_extras=True)
        for key, value in kind().to_dict().items():
            rules.setdefault(key, set()).add((str(hints[key]), value))
    assert all(len(found) == 1 for found in rules.values())
    assert {key: value for key, ((_, value),) in rules.items()} == FORMER


def test_a_method_takes_its_own_configuration_a_seekr_config_and_none() -> None:
    assert Ewc(fresh_peft(), adapter_mode="continue").config == EwcConfig()
    own = EwcConfig(ewc_lambda=3.0, seed=5)
    assert Ewc(fresh_peft(), own, adapter_mode="continue").config is own
    assert Ewc(fresh_peft(), SeekrConfig(seed=5, lambda2=7.0), adapter_mode="continue").config == EwcConfig(seed=5)
    assert Replay(fresh_peft(), SeekrConfig(replay_ratio=0.5)).config == ReplayConfig(replay_ratio=0.5)
    with pytest.raises(ConfigError, match=r"config is a EwcConfig, but the method needs a SeekrConfig, which also has"):
        Seekr(fresh_peft(), own)
    with pytest.raises(ConfigError, match=r"config is a dict, but the method needs a ReplayConfig"):
        Replay(fresh_peft(), {"replay_ratio": 0.5})  # type: ignore[arg-type]


def test_what_an_earlier_version_saved_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**FORMER, "lambda2": 3.0}))
    assert SeekrConfig.load(tmp_path / "config.json") == SeekrConfig(lambda2=3.0)
    method = Sequential(fresh_peft(), directory=tmp_path)
    with method.task("first"):
        train_by_hand(method, make_dataset(8, seed=1), 2)
    method.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "method.json"
    state = json.loads(path.read_text())
    assert state["config"] == {"seed": 0}
    del state["manifests"]
    path.write_text(json.dumps({**state, "config": {**FORMER, "seed": 4}}))
    (tmp_path / "saved" / "manifest.json").unlink()
    for manifest in (tmp_path / "saved").glob("tasks/*/manifest.json"):
        manifest.unlink()
    assert Sequential.from_pretrained(fresh_peft(), tmp_path / "saved").config == MethodConfig(seed=4)


# One section for several methods ------------------------------------------------------------------------------------


def recipe(**method: Any) -> dict[str, Any]:
    return {"model": {"name_or_path": "demo"}, "tasks": {"format": "demo"}, "method": {"name": "seekr", **method}}


def test_the_settings_of_all_own_methods_may_stand_in_one_section() -> None:
    shared = recipe(lambda2=3.0, ewc_samples=7, lwf_temperature=4.0)
    assert load_recipe(shared).method_config() == SeekrConfig(lambda2=3.0)
    assert load_recipe(shared, ["method.name=lwf"]).method_config() == LwfConfig(lwf_temperature=4.0)
    other = load_recipe(shared, ["method.name=ewc", "adapter.mode=continue", "seed=9"])
    assert other.method_config() == EwcConfig(ewc_samples=7, seed=9)
    assert other.method_config_as(SeekrConfig) == SeekrConfig(lambda2=3.0, seed=9)
    assert load_recipe(shared, ["method.name=olora"]).method_config() == OLoraConfig()
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe(ewc_samples=0, lwf_lambda="much"), ["method.name=sequential", "method.olora_lamda=1"])
    assert caught.value.problems == [
        "method.olora_lamda is an unknown key; did you mean method.olora_lambda?",
        "method.ewc_samples must be at least 1, got 0.",
        "method.lwf_lambda must be a number, got 'much'.",
    ]


@pytest.mark.parametrize("name", OWN_METHODS)
def test_a_stored_recipe_says_what_it_always_said(name: str, tmp_path: Path) -> None:
    settings = {**recipe(name=name), "adapter": {"mode": "continue" if name == "ewc" else "stack"}}
    found = load_recipe(settings)
    assert found.method == {"name": name, **{key: value for key, value in FORMER.items() if key != "seed"}}
    (tmp_path / "recipe.yaml").write_text(recipe_text(found))
    assert stored_recipe(tmp_path / "recipe.yaml") == found


# Methods of other packages ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutsideConfig(ReplayConfig):
    strength: Annotated[float, Field(ge=0, le=10)] = 0.5
    """What another package's method may need."""

    shape: Literal["round", "square"] = "round"


class Outside(Replay):
    """Replay with one more term of the loss: the size of the logits."""

    name: ClassVar[str] = "outside"
    config_class: ClassVar[type[MethodConfig]] = OutsideConfig
    adapter_modes: ClassVar[tuple[str, ...]] = ("stack",)

    config: OutsideConfig

    @contextmanager
    def replay_terms(self, model: nn.Module) -> Iterator[ReplayTerms]:
        with super().replay_terms(model) as own:
            size: Tensor = torch.stack([p.square().sum() for p in self.stack.parameters().values()]).sum()
            yield ReplayTerms({**own.parts, "size": Term(self.config.strength, size)})


class WrongConfig(Sequential):
    name: ClassVar[str] = "wrong_config"
    config_class: ClassVar[Any] = dict


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    points = {"outside": f"{__name__}:Outside", "wrong_config": f"{__name__}:WrongConfig", "gone": "no_such_module:X"}
    found = [EntryPoint(name, value, names_module.ENTRY_POINT_GROUP) for name, value in points.items()]
    monkeypatch.setattr(names_module, "entry_points", lambda group: found)


@pytest.mark.usefixtures("outside")
def test_a_knob_of_another_packages_method_is_checked_like_ours() -> None:
    found = load_recipe(recipe(name="outside", strength=2, replay_ratio=0.5))
    assert found.method_config() == OutsideConfig(strength=2, replay_ratio=0.5)
    assert found.method["shape"] == "round" and found.settings_of_others() == {"strength": 2, "shape": "round"}
    assert load_recipe(found) == found
    with pytest.raises(ConfigError) as caught:
        load_recipe(
            {
                **recipe(name="outside", strength=11, shape="flat", strenght=1, lambda2=-1),
                "adapter": {"mode": "continue"},
            }
        )
    assert caught.value.problems == [
        "adapter.mode must be stack for method outside, got 'continue'.",
        "method.strenght is an unknown key; did you mean method.strength?",
        "method.strength must be in [0, 10], got 11.",
        "method.shape must be one of round, square, got 'flat'.",
        "method.lambda2 must be at least 0 and finite, got -1.",
    ]


@pytest.mark.usefixtures("outside")
def test_check_shows_the_knobs_of_another_packages_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {name_or_path: demo}\ntasks: {format: demo}\nmethod: {name: outside, strength: 3}\n")
    monkeypatch.setattr(sys, "argv", ["seekr-peft", "run", str(path), "--check"])
    with pytest.raises(SystemExit) as exited:
        cli.main()
    assert exited.value.code in (0, None)
    assert capsys.readouterr().out.splitlines() == [
        f"{path} is fine.", "settings of other packages' methods: strength 3, shape round",
    ]  # fmt: skip


@pytest.mark.usefixtures("outside")
def test_methods_are_compared_over_one_section_with_another_packages_knob(tmp_path: Path) -> None:
    for first in ("outside", "seekr"):
        settings = {**recipe(name=first, strength=3, lambda2=2.0, ewc_samples=9), "output_dir": str(tmp_path)}
        plan = plan_comparison(settings, methods=["outside", "replay", "ewc"], seeds=[0])
        configs = {job.variant.label: job.recipe.method_config() for job in plan.jobs}
        assert configs == {
            "outside": OutsideConfig(strength=3),
            "replay": ReplayConfig(),
            "ewc": EwcConfig(ewc_samples=9),
        }
    with pytest.raises(ConfigError, match=r"method\.strength must be in \[0, 10\], got -3"):
        load_recipe(recipe(name="replay", strength=-3))


@pytest.mark.usefixtures("outside")
def test_a_method_that_cannot_be_loaded_is_one_sentence_and_only_where_it_is_asked_for() -> None:
    for name, message in (
        ("gone", "method 'gone' of the entry point no_such_module:X cannot be loaded (ModuleNotFoundError: "),
        ("wrong_config", "the config_class of method 'wrong_config' is <class 'dict'>, not a class that derives from"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_recipe(recipe(name=name))
        (problem,) = caught.value.problems
        assert problem.startswith(message)
    with pytest.raises(ConfigError, match=r"method\.nothing is an unknown key; known keys are"):
        load_recipe(recipe(nothing=1))


def test_the_packages_own_settings_are_checked_without_loading_torch() -> None:
    code = (
        "import sys; from seekr_peft.recipe import load_recipe; "
        "load_recipe({'model': {'name_or_path': 'demo'}, 'tasks': {'format': 'demo'}, 'method': {'name': 'lwf', "
        "'ewc_samples': 3, 'lwf_lambda': 2, 'head_budget': 0.5}}).method_config(); "
        "loaded = {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules); assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# A term of the loss -------------------------------------------------------------------------------------------------


def test_a_term_of_another_packages_method_is_trained_on_logged_and_shown(tmp_path: Path) -> None:
    first, second = make_dataset(12, seed=1), make_dataset(12, seed=2)
    method = Outside(fresh_peft(), OutsideConfig(strength=0.25, replay_ratio=0.5, replay_every=1, replay_batch_size=2))
    with method.task("first", replay_from=first, optimizer_steps=4):
        train_by_hand(method, first, 4)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, logging_steps=1, use_cpu=True, report_to=[], save_strategy="no"
    )
    with method.task("second", replay_from=second):
        with method.replay_terms(method.model) as terms:
            values = {name: float(value) for name, value in terms.values().items()}
            expected = values["replay_loss"] + 0.25 * values["size_loss"]
            assert float(terms.total.detach()) == pytest.approx(expected, rel=1e-6)
        trainer = ContinualTrainer(model=method.model, method=method, args=arguments, train_dataset=second)
        trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["size_loss"] > 0
    assert (
        describe_terms(logged)
        == f"new {logged['loss']:.3f}  replay {logged['replay_loss']:.3f}  size {logged['size_loss']:.3f}"
    )


def test_small_recipes_of_tests_are_recipes(tmp_path: Path) -> None:
    assert load_recipe(small_recipe(tmp_path)).method_config().to_dict()["replay_every"] == 2
