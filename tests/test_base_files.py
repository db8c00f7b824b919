"""What is wrong with the files of a base model's folder is said by name before anything of it is loaded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stress.bases import check_one, mutations
from support.small_run import small_recipe
from transformers import AutoConfig, AutoModelForCausalLM

from seekr_peft.demo import BASE_PATH
from seekr_peft.doctor.estimate import estimate_footprint
from seekr_peft.errors import ConfigError
from seekr_peft.model.base_files import check_base_files
from seekr_peft.recipe import Recipe, load_recipe
from seekr_peft.recipe.base_model import load_model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return shutil.copytree(BASE_PATH, tmp_path / "base")


def recipe_of(base: Path | str, **model: Any) -> Recipe:
    """Its base is not looked at yet."""
    recipe = load_recipe(small_recipe(Path("run"), n_tasks=2, method={"name": "sequential"}))
    section = recipe.model.model_copy(update={"name_or_path": str(base), **model})
    return recipe.model_copy(update={"model": section})


def refused(base: Path, message: str, **model: Any) -> None:
    """By the check of a recipe, by the prediction of its memory and by loading, in the same words."""
    recipe = recipe_of(base, **model)
    named = small_recipe(base.parent / "run", n_tasks=2, model={**recipe.model.model_dump(mode="json")})
    said = set()
    for call in (lambda: load_recipe(named), lambda: estimate_footprint(recipe, 10), lambda: load_model(recipe)):
        with pytest.raises(ConfigError, match=message) as caught:
            call()
        said.add(str(caught.value))
    assert len(said) == 1 and "\n" not in said.pop()


# Formats that can run code ------------------------------------------------------------------------------------------


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def without_safetensors(base: Path, content: Any, name: str = "pytorch_model.bin") -> Path:
    (base / "model.safetensors").unlink()
    torch.save(content, base / name)
    return base


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "adapter_model.bin"],
)
def test_weights_in_a_format_that_can_run_code_are_refused_with_what_to_do(base: Path, name: str) -> None:
    without_safetensors(base, {"weights": Touch(base / "it ran")}, name)
    refused(
        base, rf"base has its weights in {name} alone, .* convert it once, .*, or set model\.use_safetensors: false"
    )
    assert not (base / "it ran").exists()


def test_they_are_read_when_that_is_asked_for(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    without_safetensors(base, weights)
    model, _ = load_model(recipe_of(base, use_safetensors=False))
    stored = weights["model.embed_tokens.weight"]
    assert torch.equal(model.get_base_model().get_input_embeddings().weight.float(), stored.float())


def test_safetensors_are_taken_where_both_are_there_whatever_is_asked_for(base: Path) -> None:
    torch.save({"weights": Touch(base / "it ran")}, base / "pytorch_model.bin")
    for asked in (True, False):
        load_model(recipe_of(base, use_safetensors=asked))
    assert not (base / "it ran").exists()


def test_what_cannot_be_read_as_weights_alone_is_one_sentence_even_then(base: Path) -> None:
    without_safetensors(base, {"weights": Touch(base / "it ran")})
    with pytest.raises(ConfigError, match=r"base cannot be loaded: ") as caught:
        load_model(recipe_of(base, use_safetensors=False))
    assert "\n" not in str(caught.value) and not (base / "it ran").exists()


def test_a_model_of_the_hub_without_safetensors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "models--someone--model"
    shutil.copytree(BASE_PATH, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    load_model(recipe_of("someone/model"))
    without_safetensors(cached / "snapshots" / "abc", {"weights": Touch(tmp_path / "it ran")})
    with pytest.raises(ConfigError, match=r"someone/model has its weights in pytorch_model\.bin alone, .* convert it"):
        load_model(recipe_of("someone/model"))
    assert not (tmp_path / "it ran").exists()


# Damaged files ------------------------------------------------------------------------------------------------------

DAMAGED = {
    "null": b"null",
    "a list": b"[]",
    "text": b'"x"',
    "nothing": b"",
    "cut off": b'{"a": ',
    "not UTF-8": b'{"a": "\xff"}',
    "a byte-order mark": b"\xef\xbb\xbf{}",
    "deep": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "5000 digits": b'{"a": ' + b"7" * 5000 + b"}",
    "NUL": b"\0{}",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "added_tokens.json"]
)
def test_a_json_file_that_is_no_object_is_refused_by_name(base: Path, name: str, content: bytes) -> None:
    (base / name).write_bytes(content)
    refused(base, rf"^model\.name_or_path: .*base.*(loaded|read): {name} is ")


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_an_adapters_configuration_beside_the_base_is_refused_whatever_it_holds(base: Path, content: bytes) -> None:
    (base / "adapter_config.json").write_bytes(content)
    refused(base, r"base holds an adapter beside the model")
    (base / "config.json").unlink()
    refused(base, r"base is an adapter without its model")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
def test_what_is_no_file_is_refused_by_name_and_not_waited_for(base: Path, name: str, kind: str) -> None:
    (base / name).unlink(missing_ok=True)
    make = {"pipe": os.mkfifo, "folder": os.mkdir, "loop": lambda path: os.symlink(path, path)}
    make[kind](base / name)
    refused(base, rf"base.* {name} (is|cannot)")


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 500, -1])
def test_weights_cut_at_any_byte_are_refused_by_name(base: Path, length: int) -> None:
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[:length])
    refused(base, r"base cannot be loaded: .*; model\.safetensors is cut off or damaged: was it downloaded whole\?")


def test_a_configuration_alone_is_no_mistake_until_its_weights_are_loaded(base: Path) -> None:
    """The doctor needs no more."""
    (base / "model.safetensors").unlink()
    check_base_files(base, "base")
    with pytest.raises(ConfigError, match=r"base cannot be loaded: .*model\.safetensors"):
        load_model(recipe_of(base))


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, rf"{INDEX} has no weight_map"),
        ({"weight_map": []}, rf"{INDEX} has no weight_map"),
        ({"weight_map": {}}, rf"{INDEX} has no weight_map"),
        ({"weight_map": {"a": "whole.safetensors"}, "metadata": 5}, rf"{INDEX} has no metadata"),
        ({"weight_map": {"a": "whole.safetensors"}}, rf"{INDEX} has no metadata"),
        ({"weight_map": {"a": 5}}, rf"{INDEX} names 5, which is no safetensors file of its folder"),
        ({"weight_map": {"a": "../elsewhere.safetensors"}}, r"names '\.\./elsewhere\.safetensors', which is no"),
        ({"weight_map": {"a": "/elsewhere.safetensors"}}, r"names '/elsewhere\.safetensors', which is no"),
        ({"weight_map": {"a": "x" * 300 + ".safetensors"}}, r"names 'xxx.*\.\.\..*, which is no safetensors file"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, r"names 'pytorch_model\.bin', which is no safetensors file"),
        ({"weight_map": {"a": "gone.safetensors"}, "metadata": {}}, r"gone\.safetensors is missing"),
    ],
)
def test_a_damaged_list_of_shards_is_refused_by_name(base: Path, index: Any, message: str) -> None:
    (base / "model.safetensors").rename(base / "whole.safetensors")
    (base / INDEX).write_text(json.dumps(index))
    refused(base, message)


@pytest.mark.parametrize("name", ["other.bin", "../model.safetensors", 5, "gone.safetensors"])
def test_weights_that_the_configuration_names_are_looked_at_too(base: Path, name: Any) -> None:
    change(base, transformers_weights=name)
    refused(base, r"transformers_weights: |gone\.safetensors is missing")
    (base / "model.safetensors").rename(base / "other.safetensors")
    change(base, transformers_weights="other.safetensors")
    load_model(recipe_of(base))


def change(base: Path, **values: Any) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **values}))


BOMBS = [
    *({key: 10**9} for key in ("hidden_size", "vocab_size", "intermediate_size", "num_attention_heads", "head_dim")),
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 90_000},
    {"hidden_size": 10**30},
    {"hidden_size": 40_000, "head_dim": 5000, "intermediate_size": 100_000},
]


@pytest.mark.parametrize("values", BOMBS, ids=str)
def test_a_configuration_of_a_far_larger_model_is_refused_before_room_is_made(
    base: Path, values: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*arguments: Any, **options: Any) -> None:
        raise AssertionError("room would be made")

    change(base, **values)
    if values != {"hidden_size": 10**30}:
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    with pytest.raises(ConfigError, match=r"base.*(far larger model|which no model has|cannot be loaded|read)"):
        load_model(recipe_of(base))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"num_labels": 10**9}, "num_labels: 1000000000"),
        (
            {"model_type": "gpt_neo", "attention_types": [[["global", "local"], 10**9]]},
            "attention_types with 1000000000",
        ),
        ({"nested": {"deeper": [{"num_labels": 10**9}]}}, "num_labels: 1000000000"),
    ],
    ids=str,
)
def test_a_number_that_a_configuration_would_write_a_list_of_is_refused_before_it_is_made(
    base: Path, values: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the list would be made")

    monkeypatch.setattr(AutoConfig, "from_pretrained", made)
    change(base, **values)
    refused(base, rf"base cannot be read: config\.json says {named}( in it)?, which no model has; correct it")


@pytest.mark.parametrize("part", ["bert", {}, {"model_type": "llama"}, [], 5], ids=str)
def test_a_part_about_text_that_the_family_does_not_have_is_refused(base: Path, part: Any) -> None:
    change(base, text_config=part)
    for call in (lambda: estimate_footprint(recipe_of(base), 10), lambda: load_model(recipe_of(base))):
        with pytest.raises(
            ConfigError, match=r"base cannot be read: it has .* in the place of the part about text"
        ) as no:
            call()
        assert "\n" not in str(no.value)


def test_a_token_beyond_the_embeddings_is_named_in_bounded_length(base: Path) -> None:
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "unk_token": "x" * 5000}))
    with pytest.raises(ConfigError, match=r"has token ids beyond the model's 256 embeddings \('xxx") as caught:
        load_model(recipe_of(base))
    assert len(str(caught.value)) < 1000


WRONG = [None, [], "", "x", -1, 0, 1.5, 10**30, {}, [None], True]


@pytest.mark.parametrize(
    "key",
    [
        "architectures",
        "model_type",
        "quantization_config",
        "hidden_size",
        "vocab_size",
        "rope_parameters",
        "hidden_act",
    ],
)
def test_a_configuration_of_wrong_types_is_refused_or_means_what_its_default_does(base: Path, key: str) -> None:
    said = []
    for value in WRONG:
        change(base, **{key: value})
        try:
            load_model(recipe_of(base))
        except ConfigError as error:
            said.append(str(error))
    assert len(said) > 3
    assert all("base" in text and "\n" not in text and len(text) < 1500 for text in said)


def test_a_tokenizer_that_fails_only_in_use_is_refused(base: Path) -> None:
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": [1]}))
    with pytest.raises(ConfigError, match=r"base cannot be loaded: TypeError: ") as caught:
        load_model(recipe_of(base))
    assert "\n" not in str(caught.value)


def test_damage_drawn_at_random_is_refused_in_one_sentence_or_loads(tmp_path: Path) -> None:
    cases = list(mutations(3, 12))
    assert cases == list(mutations(3, 12)) and cases != list(mutations(4, 12))
    outcomes = [check_one(case, tmp_path / "base") for case in cases]
    assert "traceback" not in outcomes and outcomes.count("refused") > 5
