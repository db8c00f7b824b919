"""Loading a recipe's base: what is refused, by name, before anything is trained, and what is loaded all the same."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.small_run import read_json, small_recipe
from support.tiny_models import tiny_bert, tiny_gpt_neo, tiny_llama, tiny_mixtral, tiny_t5
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from seekr_peft import run_recipe
from seekr_peft.demo import BASE_PATH
from seekr_peft.errors import ConfigError
from seekr_peft.model.kind import stored_quantization
from seekr_peft.recipe import Recipe, load_recipe
from seekr_peft.recipe.base_config import attention_implementation, read_config
from seekr_peft.recipe.base_model import load_model
from seekr_peft.recipe.base_weights import check_tokens

QUERY = "model.layers.1.self_attn.q_proj.weight"
QUANTIZATIONS = ["none", "nf4", "int8"]
Edit = Callable[[dict[str, Tensor]], Any]


def recipe_of(base: Path, quantization: str = "none", **sections: Any) -> Recipe:
    """Its base is not looked at yet."""
    model = {"name_or_path": "demo", "quantization": quantization, **sections.pop("model", {})}
    recipe = load_recipe(small_recipe(base.parent / "run", n_tasks=2, model=model, **sections))
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"name_or_path": str(base)})})


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
    start = r"^model\.name_or_path: .*shards cannot be loaded: "
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234567\n"
    for content, what in (
        (whole[: len(whole) // 2], "is cut off or damaged"),
        (whole[:-1], "is cut off or damaged"),
        (b"", "is cut off or damaged"),
        (pointer, "only points to a file that Git LFS keeps elsewhere"),
    ):
        shard.write_bytes(content)
        refused(recipe_of(base, quantization), rf"{start}.*; {shard.name} {what}: was it downloaded whole\?$")
    shard.unlink()
    refused(recipe_of(base, quantization), rf"{start}.*; {shard.name} is missing: was it downloaded whole\?$")
    shard.write_bytes(whole)
    load_model(recipe_of(base, quantization))


@pytest.mark.parametrize("file", ["tokenizer.json", "model.safetensors"])
def test_a_pointer_in_place_of_a_file_is_named(tmp_path: Path, file: str) -> None:
    base = shutil.copytree(BASE_PATH, tmp_path / "base")
    (base / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", encoding="utf-8")
    refused(recipe_of(base), rf"cannot be loaded: .*; {file} only points to .*: was it downloaded whole\?$")


def test_what_is_whole_is_not_asked_whether_it_was_downloaded(tmp_path: Path) -> None:
    base = shutil.copytree(BASE_PATH, tmp_path / "base")
    (base / "tokenizer_config.json").write_text("{", encoding="utf-8")
    assert "downloaded" not in refused(recipe_of(base), "cannot be loaded: ")


def mixture(tmp_path: Path, edit: Edit) -> Path:
    base = saved(tiny_mixtral(vocab_size=256), tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    edit(weights)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return base


def without(pattern: str) -> Edit:
    return lambda weights: [weights.pop(key) for key in list(weights) if re.search(pattern, key)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        (r"layers\.1\..*experts\.2\.w1", r"experts\.2\.w1\.weight\)"),
        (r"layers\.1\..*experts\.2\.w2", r"experts\.2\.w2\.weight\)"),
        (
            r"layers\.1\..*experts\.(2\.w1|1\.w3)",
            r"experts\.1\.w3\.weight, model\.layers\.1\..*experts\.2\.w1\.weight\)",
        ),
        (r"layers\.1\..*experts\.2\.", r"experts\.2\.w1\.weight, .*2\.w2\.weight, .*2\.w3\.weight\)"),
        (r"layers\.1\..*experts\.3\.", r"experts\.3\.w1\.weight, .*3\.w2\.weight, .*3\.w3\.weight\)"),
        (r"layers\.1\..*experts\.\d\.w1", r"experts\.0\.w1\.weight, .*2\.w1\.weight and 1 more\)"),
    ],
)
def test_a_missing_weight_of_an_expert_is_refused_by_its_name_in_the_file(
    tmp_path: Path, pattern: str, named: str, quantization: str
) -> None:
    base = mixture(tmp_path, without(pattern))
    refused(
        recipe_of(base, quantization), rf"lacks weights of its model, .*\(model\.layers\.1\.block_sparse_moe\.{named}"
    )


def test_a_weight_that_no_expert_has_is_refused_by_what_would_be_made_of_it(tmp_path: Path) -> None:
    base = mixture(tmp_path, without(r"experts\.\d\.w1"))
    refused(recipe_of(base), r"lacks tensors to make weights of its model of, .*mlp\.experts\.gate_up_proj\)")


def test_an_expert_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    key = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    base = mixture(tmp_path, lambda weights: weights.update({key: weights[key][:-8].contiguous()}))
    refused(recipe_of(base), rf"other shapes than its configuration says \({key} is \(56, 48\), not \(64, 48\)\)")


def test_whole_experts_are_loaded_and_fewer_than_the_configuration_says_are_refused(tmp_path: Path) -> None:
    base = mixture(tmp_path, lambda weights: None)
    model, _ = load_model(recipe_of(base, adapter={"target_modules": ["q_proj"]}))
    assert torch.equal(
        model.get_base_model().model.layers[1].mlp.experts.down_proj[2],
        load_file(base / "model.safetensors")["model.layers.1.block_sparse_moe.experts.2.w2.weight"],
    )
    refused(
        recipe_of(reconfigured(base, num_local_experts=5)), r"experts\.down_proj is \(4, 48, 64\), not \(5, 48, 64\)"
    )


def test_what_transformers_logs_of_loading_is_as_before_and_after(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers.modeling_utils")
    before = (logger.level, list(logger.filters), transformers.logging.get_verbosity())
    load_model(recipe_of(BASE_PATH))
    assert (logger.level, list(logger.filters), transformers.logging.get_verbosity()) == before


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


# Quantised in its files -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prequantised(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The demo's base as bitsandbytes stores it, once for each kind."""
    folder = tmp_path_factory.mktemp("prequantised")
    kinds = {
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
        "double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        "int8": {"load_in_8bit": True},
    }

    def stored(kind: str) -> Path:
        base = folder / kind / "base"
        if not base.exists():
            config = BitsAndBytesConfig(**kinds[kind])
            saved(AutoModelForCausalLM.from_pretrained(BASE_PATH, quantization_config=config), base)
        return base

    return stored


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        ("nf4", "none"),
        ("nf4", "nf4"),
        ("double", "none"),
        ("double", "nf4"),
        ("fp4", "none"),
        ("int8", "none"),
        ("int8", "int8"),
    ],
)
def test_a_checkpoint_that_is_quantised_in_its_files_is_loaded_as_it_is(
    prequantised: Callable[[str], Path], kind: str, asked: str
) -> None:
    model, _ = load_model(recipe_of(prequantised(kind), asked))
    wanted = AutoModelForCausalLM.from_pretrained(prequantised(kind), dtype=torch.float32)
    layer, same = model.get_base_model().model.layers[1].mlp.up_proj.base_layer, wanted.model.layers[1].mlp.up_proj
    assert type(layer) is type(same) and type(layer).__name__ == ("Linear8bitLt" if kind == "int8" else "Linear4bit")
    assert torch.equal(layer.weight, same.weight)
    # As any other quantised base: nothing but the adapter trains, and what is not quantised is in float32.
    assert all(parameter.requires_grad is ("lora_" in name) for name, parameter in model.named_parameters())
    assert model.get_base_model().model.norm.weight.dtype == torch.float32
    if kind == "nf4":
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.compute_dtype == (torch.float32 if asked == "nf4" else torch.bfloat16)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_one_that_is_quantised_in_its_files_is_prepared_like_one_that_is_quantised_now(
    prequantised: Callable[[str], Path], kind: str
) -> None:
    ids = {"input_ids": torch.arange(3, 12)[None]}
    logits = []
    for recipe in (
        recipe_of(prequantised(kind), "none"),
        recipe_of(BASE_PATH, kind, model={"bnb_4bit_use_double_quant": False}),
    ):
        model, _ = load_model(recipe)
        logits.append(model(**ids).logits)
    assert float((logits[0] - logits[1]).norm() / logits[1].norm()) < 0.02


@pytest.mark.parametrize(
    ("kind", "asked", "way"),
    [("nf4", "int8", "nf4 or none"), ("int8", "nf4", "int8 or none"), ("fp4", "nf4", "none"), ("fp4", "int8", "none")],
)
def test_another_quantisation_than_the_stored_one_is_refused_before_the_weights_are_loaded(
    prequantised: Callable[[str], Path], kind: str, asked: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(prequantised(kind), asked)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    message = (
        rf"^model\.quantization: {asked} cannot be made of .*, whose weights are stored in {kind}; set .*: {way}, which"
    )
    refused(recipe, message)


@pytest.mark.parametrize("asked", ["nf4", "int8"])
@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "mxfp4", "of_tomorrow"])
def test_another_method_of_quantisation_is_refused_where_one_is_asked_for(
    tmp_path: Path, method: str, asked: str
) -> None:
    base = reconfigured(shutil.copytree(BASE_PATH, tmp_path / "base"), quantization_config={"quant_method": method})
    refused(recipe_of(base, asked), rf"^model\.quantization: {asked} cannot be made of .* stored in {method}; set")


@pytest.mark.parametrize("stored", [None, {}])
def test_a_configuration_whose_quantisation_is_empty_is_that_of_plain_weights(tmp_path: Path, stored: Any) -> None:
    config = AutoConfig.from_pretrained(BASE_PATH)
    config.quantization_config = stored
    assert stored_quantization(config) == {}


@pytest.mark.filterwarnings("ignore")
def test_a_stored_quantisation_that_cannot_be_trained_through_is_refused(
    prequantised: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    monkeypatch.setattr(Bnb4BitHfQuantizer, "is_trainable", False)
    refused(recipe_of(prequantised("nf4"), "none"), r"through which nothing can be trained \(BitsAndBytesConfig\); use")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "scales", "named"),
    [
        ("nf4", f"{QUERY}.absmax", QUERY),
        ("double", f"{QUERY}.absmax", QUERY),
        ("double", f"{QUERY}.nested_absmax", f"{QUERY}.nested_absmax"),
        ("double", f"{QUERY}.quant_state.bitsandbytes__nf4", QUERY),
        ("int8", QUERY.replace("weight", "SCB"), QUERY),
    ],
)
def test_stored_scales_that_are_missing_are_refused_by_name(
    prequantised: Callable[[str], Path], kind: str, scales: str, named: str, tmp_path: Path
) -> None:
    base = shutil.copytree(prequantised(kind), tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights.pop(scales)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    refused(recipe_of(base), rf"lacks (weights|tensors) .*\({re.escape(named)}\); download")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("tensor", [QUERY, "model.norm.weight"])
def test_what_a_stored_quantisation_lacks_is_refused_by_name(
    prequantised: Callable[[str], Path], kind: str, tensor: str, tmp_path: Path
) -> None:
    base = shutil.copytree(prequantised(kind), tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    for key in [key for key in weights if key.startswith(tensor.removesuffix("weight"))]:
        weights.pop(key)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    refused(recipe_of(base), rf"lacks weights .*{tensor}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "scales"), [("nf4", f"{QUERY}.absmax"), ("int8", QUERY.replace("weight", "SCB"))])
def test_a_stored_scale_that_is_not_finite_is_refused(
    prequantised: Callable[[str], Path], kind: str, scales: str, tmp_path: Path
) -> None:
    base = shutil.copytree(prequantised(kind), tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights[scales].view(-1)[3] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    refused(recipe_of(base), rf"the weight {QUERY.removesuffix('.weight')}\S* holds NaN or infinite")


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
