"""The folder of a base model, before it is loaded: damaged files, formats that run code, sizes beyond the weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_run import small_recipe
from stress.bases import FILES, KINDS, Case, look, mutations
from tiny_models import tiny_llama

from seekr_peft.base_files import folder_problem, size_problem
from seekr_peft.demo import BASE_PATH
from seekr_peft.errors import ConfigError
from seekr_peft.footprint import estimate_footprint
from seekr_peft.modeling import load_model
from seekr_peft.recipe import Recipe, load_recipe


@pytest.fixture
def base(tmp_path: Path) -> Path:
    shutil.copytree(BASE_PATH, tmp_path / "base")
    return tmp_path / "base"


def recipe_of(base: Path, **model: Any) -> dict[str, Any]:
    return small_recipe(base.parent / "run", model={"name_or_path": str(base), "quantization": "none", **model})


def test_a_whole_base_has_no_problem() -> None:
    assert folder_problem(Path(BASE_PATH)) is None


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("generation_config.json", "null", "has a generation_config.json that holds no JSON object but None"),
        ("generation_config.json", "", "has a generation_config.json that is no JSON"),
        ("config.json", "[]", r"has a config\.json that holds no JSON object but \[\]"),
        ("config.json", "{", "has a config.json that is no JSON"),
        ("tokenizer.json", "[" * 100_000, "has a tokenizer.json that is nested too deeply"),
        ("tokenizer_config.json", '{"a": ' + "9" * 5000 + "}", "has a tokenizer_config.json that is no JSON"),
        ("special_tokens_map.json", "\x00", "has a special_tokens_map.json that is no JSON"),
        ("vocab.json", "\ufeff{}", "has a vocab.json that is no JSON"),
        ("model.safetensors.index.json", "{}", "index.json without a weight_map"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 1}}', "index.json without a weight_map"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "../x"}}',
            "names '../x', which is no file of the folder",
        ),
        ("model.safetensors.index.json", '{"weight_map": {"a": "/etc/x"}}', "which is no file of the folder"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "b"}}',
            "has no b, which its model.safetensors.index.json",
        ),
    ],
)
def test_a_damaged_file_is_named_before_anything_is_loaded(name: str, text: str, problem: str, base: Path) -> None:
    (base / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=problem) as caught:
        load_recipe(recipe_of(base))
    (sentence,) = caught.value.problems
    assert sentence.startswith(f"model.name_or_path: {base} ") and len(sentence) < 600
    for load in (load_model, estimate_footprint):
        with pytest.raises(ConfigError, match=problem):
            load(Recipe.model_validate(recipe_of(base)))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "consolidated.00.pth"])
def test_weights_that_can_run_code_are_refused_unless_asked_for(name: str, base: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(base / "model.safetensors"), base / name)
    load_recipe(recipe_of(base))
    (base / "model.safetensors").unlink()
    message = rf"has its weights in {name} alone, a format that can run code .* model\.use_safetensors: false"
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe_of(base))
    with pytest.raises(ConfigError, match=message):
        load_model(Recipe.model_validate(recipe_of(base)))
    recipe = load_recipe(recipe_of(base, use_safetensors=False))
    if name == "pytorch_model.bin":
        model, _ = load_model(recipe)
        assert float(next(model.parameters()).abs().sum()) > 0
    with pytest.raises(ConfigError, match="use_safetensors"):
        load_recipe(recipe_of(base, use_safetensors="no"))


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "intermediate_size", "num_hidden_layers"])
def test_sizes_beyond_the_weights_are_refused_before_memory_is_asked_for(name: str, base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, name: 10**9}))
    with pytest.raises(
        ConfigError, match=rf"{name}=1000000000 .*in its config\.json, for which its \d+ bytes of weights"
    ):
        load_model(Recipe.model_validate(recipe_of(base)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_of_a_real_model_fit_its_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_llama().to(dtype)
    model.save_pretrained(tmp_path)
    assert size_problem(tmp_path, model.config) is None
    assert folder_problem(tmp_path) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", FILES)
def test_every_damage_of_every_file_is_refused_by_name_or_harmless(file: str, kind: str, tmp_path: Path) -> None:
    verdict, message = look(Case(file, kind, seed=7), tmp_path)
    assert verdict in ("refused", "accepted"), message


def test_the_same_seed_damages_the_same() -> None:
    assert list(mutations(3, 20)) == list(mutations(3, 20)) != list(mutations(4, 20))


def test_the_command_tells_it_in_one_line(base: Path) -> None:
    (base / "config.json").write_text("null")
    (base.parent / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(base)))
    for arguments in (["run", "--check"], ["run"], ["doctor"]):
        done = subprocess.run(
            [sys.executable, "-m", "seekr_peft", *arguments, str(base.parent / "recipe.yaml")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            f"seekr-peft: model.name_or_path: {base} has a config.json that holds no JSON object but None: was it "
            f"downloaded whole?\n"
        )
