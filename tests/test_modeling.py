"""Loading a recipe's base: what is refused, by name, before anything is trained, and what is loaded all the same."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import read_json, small_recipe
from tiny_models import tiny_bert, tiny_gpt_neo, tiny_llama, tiny_t5
from torch import Tensor, nn
from transformers import AutoTokenizer

from seekr_peft import run_recipe
from seekr_peft.demo import BASE_PATH
from seekr_peft.errors import ConfigError
from seekr_peft.modeling import attention_implementation, check_tokens, load_model, read_config
from seekr_peft.recipe import Recipe, load_recipe

QUERY = "model.layers.1.self_attn.q_proj.weight"
QUANTIZATIONS = ["none", "nf4", "int8"]
Edit = Callable[[dict[str, Tensor]], Any]


def recipe_of(base: Path, quantization: str = "none", **sections: Any) -> Recipe:
    model = {"name_or_path": str(base), "quantization": quantization}
    return load_recipe(small_recipe(base.parent / "run", n_tasks=2, model=model, **sections))


def edited(tmp_path: Path, edit: Edit) -> Path:
    """The demo's base with other weights in its file."""
    base = shutil.copytree(BASE_PATH, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    edit(weights)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return base


def saved(model: nn.Module, path: Path) -> Path:
    """``model`` with the demo's tokenizer."""
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(BASE_PATH).save_pretrained(path)
    return path


def reconfigured(base: Path, **changes: Any) -> Path:
    config = read_json(base / "config.json")
    (base / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    return base


def refused(recipe: Recipe, message: str) -> str:
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(recipe)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Weights ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_whole_base_is_loaded_as_it_is_in_its_file(quantization: str) -> None:
    model, tokenizer = load_model(recipe_of(BASE_PATH, quantization))
    embeddings = model.get_base_model().get_input_embeddings().weight
    stored = load_file(BASE_PATH / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(embeddings.float(), stored.float())
    assert max(tokenizer.get_vocab().values()) < len(embeddings)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("tensor", [QUERY, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_a_missing_weight_is_refused_by_name(tmp_path: Path, quantization: str, tensor: str) -> None:
    base = edited(tmp_path, lambda weights: weights.pop(tensor))
    refused(recipe_of(base, quantization), rf"^model\.name_or_path: .*base lacks weights .* \({tensor}\); download")


def test_many_missing_weights_are_counted(tmp_path: Path) -> None:
    base = edited(tmp_path, lambda weights: [weights.pop(name) for name in list(weights) if ".layers.2." in name])
    refused(recipe_of(base), r"\(model\.layers\.2\.\S+, model\.layers\.2\.\S+, model\.layers\.2\.\S+ and 6 more\)")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("tensor", [QUERY, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(
    tmp_path: Path, quantization: str, tensor: str, value: float
) -> None:
    base = edited(tmp_path, lambda weights: weights[tensor].view(-1)[5:6].fill_(value))
    refused(recipe_of(base, quantization), rf"^model\.name_or_path: .*base: the weight {tensor} holds NaN or infinite")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_weight_of_another_shape_is_refused_by_name(tmp_path: Path, quantization: str) -> None:
    base = edited(tmp_path, lambda weights: weights.update({QUERY: weights[QUERY][:-64].contiguous()}))
    cut, whole = (load_file(folder / "model.safetensors")[QUERY].shape for folder in (base, BASE_PATH))
    shapes = rf"{QUERY} is \({cut[0]}, {cut[1]}\), not \({whole[0]}, {whole[1]}\)"
    message = rf"other shapes than its configuration says \({shapes}\)"
    refused(recipe_of(base, quantization), message)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("model.layers.0.self_attn.o_proj.bias", "model.norm.weight"),
        ("model.layers.0.self_attn.q_norm.weight", "model.norm.weight"),
        ("model.layers.9.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_weights_that_the_model_would_compute_without_are_refused(tmp_path: Path, name: str, size: str) -> None:
    base = edited(tmp_path, lambda weights: weights.update({name: weights[size].clone()}))
    refused(recipe_of(base), rf"base holds weights that the model of its configuration leaves out \({name}\)")


@pytest.mark.parametrize(
    "name",
    ["v_head.summary.weight", "model.layers.0.self_attn.masked_bias", "model.layers.0.self_attn.bias", "score.weight"],
)
def test_what_hangs_beside_the_model_is_told_and_loaded(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    base = edited(tmp_path, lambda weights: weights.update({name: torch.tensor([float("-inf")])}))
    with caplog.at_level(logging.WARNING, logger="seekr_peft"):
        load_model(recipe_of(base))
    assert f"holds weights that its model does not use ({name})" in caplog.text


def sharded(tmp_path: Path) -> Path:
    model = tiny_llama(vocab_size=256, num_hidden_layers=3)
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    AutoTokenizer.from_pretrained(BASE_PATH).save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    return tmp_path / "shards"


def shard_of(base: Path, tensor: str) -> Path:
    return base / read_json(base / "model.safetensors.index.json")["weight_map"][tensor]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_shard_that_is_missing_cut_off_or_broken_is_one_sentence(tmp_path: Path, quantization: str) -> None:
    base = sharded(tmp_path)
    shard = shard_of(base, QUERY)
    whole = shard.read_bytes()
    weights = load_file(shard)
    weights[QUERY].view(-1)[0] = float("nan")
    save_file(weights, shard, metadata={"format": "pt"})
    refused(recipe_of(base, quantization), rf"the weight {QUERY} holds NaN")
    shard.write_bytes(whole[: len(whole) // 2])
    refused(recipe_of(base, quantization), r"^model\.name_or_path: .*shards cannot be loaded: ")
    shard.unlink()
    refused(recipe_of(base, quantization), r"^model\.name_or_path: .*shards cannot be loaded: ")
    shard.write_bytes(whole)
    load_model(recipe_of(base, quantization))


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    base = saved(tiny_llama(vocab_size=256, tie_word_embeddings=True), tmp_path / "tied")
    assert "lm_head.weight" not in load_file(base / "model.safetensors")
    load_model(recipe_of(base))


def test_a_model_saved_without_its_head_is_refused_by_the_heads_name(tmp_path: Path) -> None:
    base = saved(tiny_llama(vocab_size=256).model, tmp_path / "headless")
    refused(recipe_of(base), r"headless lacks weights of its model, .*\(lm_head\.weight\)")


# Kinds --------------------------------------------------------------------------------------------------------------


def classifier() -> nn.Module:
    from transformers import LlamaForSequenceClassification

    return LlamaForSequenceClassification(tiny_llama(vocab_size=256).config)


@pytest.mark.parametrize("method", ["sequential", "replay", "seekr"])
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (tiny_bert, r"base \(model_type bert, BertForMaskedLM\) looks in both directions"),
        (tiny_t5, r"base \(model_type t5, T5ForConditionalGeneration\) is an encoder-decoder"),
        (
            classifier,
            r"base \(model_type llama, LlamaForSequenceClassification\) has a head for SequenceClassification",
        ),
    ],
)
def test_a_run_of_another_kind_of_model_ends_before_its_weights_are_loaded(
    tmp_path: Path, method: str, build: Callable[[], nn.Module], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    base = saved(build(), tmp_path / "base")
    with pytest.raises(ConfigError, match=message):
        run_recipe(recipe_of(base, method={"name": method}), report=False)


def test_a_decoder_of_an_encoders_family_is_loaded(tmp_path: Path) -> None:
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"vocab_size": 256, "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2}
    config = BertConfig(**sizes, num_attention_heads=2, is_decoder=True)
    model, _ = load_model(recipe_of(saved(BertLMHeadModel(config), tmp_path / "base")))
    assert type(model.get_base_model()).__name__ == "BertLMHeadModel"


def test_a_configuration_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    base = shutil.copytree(BASE_PATH, tmp_path / "base")
    for text in ("{", '{"model_type": "no_such_family"}', "{}", '{"model_type": "llama", "hidden_size": "wide"}'):
        (base / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(
            ConfigError, match=r"^model\.name_or_path: the configuration of .*base cannot be read: "
        ) as caught:
            read_config(recipe_of(base).model)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wanted", "taken"), [("sdpa", "eager"), ("eager", "eager"), ("flash_attention_2", "flash_attention_2")]
)
def test_a_family_without_sdpa_takes_eager_attention_by_default(wanted: str, taken: str) -> None:
    assert attention_implementation(wanted, tiny_gpt_neo().config) == taken
    assert attention_implementation(wanted, tiny_llama().config) == wanted


@pytest.mark.filterwarnings("ignore")
def test_a_run_on_gpt_neo_by_the_default_recipe(tmp_path: Path) -> None:
    base = saved(tiny_gpt_neo(vocab_size=256), tmp_path / "neo")
    result = run_recipe(recipe_of(base), report=False)
    header = read_json(result.directory / "tasks/01-first/memory.json")
    assert header["model"] == {"model_type": "gpt_neo", "n_layers": 3, "n_heads": 6, "vocabulary": 256}
    lines = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    distances = [line["attention_loss"] for line in lines if "attention_loss" in line]
    assert distances and all(distance >= 0 for distance in distances) and max(distances) > 0


# Token ids ----------------------------------------------------------------------------------------------------------


def retokenised(tmp_path: Path, edit: Callable[[Any], Any]) -> Path:
    base = shutil.copytree(BASE_PATH, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
    edit(tokenizer)
    tokenizer.save_pretrained(base)
    return base


def filled(tokenizer: Any) -> None:
    """As many tokens as the base has embeddings."""
    rows = read_json(BASE_PATH / "config.json")["vocab_size"]
    tokenizer.add_tokens([f"<filler {i}>" for i in range(rows - len(tokenizer))])
    assert len(tokenizer) == rows


@pytest.mark.parametrize(
    ("edit", "token"),
    [
        (lambda tokenizer: tokenizer.add_tokens(["<new>"]), "<new>"),
        (lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "<the pad>"}), "<the pad>"),
        (lambda tokenizer: tokenizer.add_special_tokens({"eos_token": "<the end>"}), "<the end>"),
        (lambda tokenizer: tokenizer.add_special_tokens({"bos_token": "<the start>"}), "<the start>"),
        (lambda tokenizer: tokenizer.add_special_tokens({"additional_special_tokens": ["<role>"]}), "<role>"),
    ],
)
def test_tokens_beyond_the_embeddings_are_refused_when_the_model_is_loaded(
    tmp_path: Path, edit: Callable[[Any], Any], token: str
) -> None:
    base = retokenised(tmp_path, lambda tokenizer: (filled(tokenizer), edit(tokenizer)))
    rows = read_json(BASE_PATH / "config.json")["vocab_size"]
    message = rf"the tokenizer of .*base has token ids beyond the model's {rows} embeddings \('{token}' is {rows}\)"
    refused(recipe_of(base), message)


def test_tokens_within_the_embeddings_are_no_matter(tmp_path: Path) -> None:
    load_model(recipe_of(retokenised(tmp_path, filled)))


def test_a_resized_model_takes_its_new_token(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
    filled(tokenizer)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ConfigError, match="'<new>' is"):
        check_tokens(tokenizer, len(tokenizer) - 1, "X")
    check_tokens(tokenizer, len(tokenizer), "X")


def test_many_tokens_are_counted() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
    count = len(tokenizer)
    tokenizer.add_tokens([f"<new {i}>" for i in range(7)])
    with pytest.raises(ConfigError, match=rf"'<new 0>' is {count}, .*'<new 2>' is {count + 2} and 4 more\)"):
        check_tokens(tokenizer, count, "X")


def test_a_place_for_an_image_in_a_shared_tokenizer_is_no_matter() -> None:
    """As of Gemma 3's text model, whose tokenizer has one token more than it has embeddings."""
    tokenizer = AutoTokenizer.from_pretrained(BASE_PATH, extra_special_tokens={"image_token": "<image here>"})
    place = tokenizer.convert_tokens_to_ids("<image here>")
    assert place == len(tokenizer) - 1
    check_tokens(tokenizer, place, "X")
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ConfigError, match=rf"\('<new>' is {place + 1}\)"):
        check_tokens(tokenizer, place, "X")


def test_a_pad_id_equal_to_the_number_of_rows_is_refused(tmp_path: Path) -> None:
    rows = read_json(BASE_PATH / "config.json")["vocab_size"]
    base = reconfigured(shutil.copytree(BASE_PATH, tmp_path / "base"), pad_token_id=rows)
    refused(
        recipe_of(base), rf"base \(model_type llama, LlamaForCausalLM\) pads with token id {rows}, but has {rows} emb"
    )
