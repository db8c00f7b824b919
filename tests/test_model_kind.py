"""Which models can be trained: the decision by configuration and class, against what tiny models do when asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from support.core_models import fresh_peft, make_dataset
from support.tiny_models import (
    VOCABULARY,
    nf4_llama,
    tiny_bert,
    tiny_gpt_neo,
    tiny_llama,
    tiny_mamba,
    tiny_t5,
    with_lora,
)
from torch import Tensor, nn
from transformers import AutoConfig

from seekr_peft.errors import AdapterError, ConfigError, DataError
from seekr_peft.methods import Replay, Seekr, Sequential, get_method
from seekr_peft.methods.registry import OWN_METHODS
from seekr_peft.model.kind import check_checkpoint, check_model, is_finite

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_buckets": 4,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 28,
    "decoder_ffn_dim": 28,
    "init_std": 0.2,
    "max_position_embeddings": 64,
    "max_target_positions": 64,
    "forced_eos_token_id": None,
    "pad_token_id": 0,
}
BOTH_WAYS = [
    "Albert", "BertGeneration", "Bert", "Camembert", "DebertaV2", "Deberta", "DistilBert", "Electra", "Ernie", "MPNet",
    "MegatronBert", "ModernBert", "RemBert", "RoFormer", "Roberta", "RobertaPreLayerNorm", "XLMRoberta",
]  # fmt: skip
SEEING_BACK_WITH_IS_DECODER = ["BertGeneration", "Bert", "Electra", "MegatronBert", "RemBert", "Roberta", "XLMRoberta"]
LABELS_IN_PLACE = ["Bart", "MBart", "Pegasus", "Marian", "Blenderbot", "PLBart", "TrOCR", "ProphetNet", "XLM", "XLNet"]
DECODERS = ["Llama", "GPT2", "GPTNeoX", "OPT", "Bloom", "GPTJ", "Mamba", "ModernBertDecoder"]


def configuration(family: str, **changes: Any) -> Any:
    config_class = getattr(transformers, f"{family}Config")
    sizes = {"DistilBert": {"dim": 24, "n_heads": 2, "n_layers": 2, "hidden_dim": 28, "vocab_size": VOCABULARY}}
    sizes |= {"XLM": {"emb_dim": 24, "n_heads": 2, "n_layers": 2, "n_words": VOCABULARY}}
    sizes |= {"XLNet": {"d_model": 24, "n_head": 2, "n_layer": 2, "d_inner": 28, "vocab_size": VOCABULARY}}
    if family in ("Bart", "MBart", "Pegasus", "Marian", "Blenderbot", "PLBart", "TrOCR"):
        sizes[family] = BART
    if family == "ProphetNet":
        sizes[family] = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_decoder_layers": 2, "decoder_ffn_dim": 28}
        sizes[family] |= {"num_decoder_attention_heads": 2, "init_std": 0.2, "is_decoder": True}
    if family == "GPTJ":
        sizes[family] = {**SMALL, "rotary_dim": 4, "n_embd": 24, "n_head": 2, "n_layer": 2}
    if family == "Marian":
        sizes[family] = {**BART, "decoder_vocab_size": VOCABULARY, "decoder_start_token_id": 1}
    if family == "OPT":
        sizes[family] = {**SMALL, "word_embed_proj_dim": 24, "ffn_dim": 28}
    return config_class(**{**sizes.get(family, SMALL), **changes})


def built(config: Any, head: str) -> Any:
    """A tiny model with the class of the family's ``head``."""
    family = type(config).__name__.removesuffix("Config")
    names = [f"{family}{head}", f"{family}LMHeadModel", f"{family}Decoder", f"{family}WithLMHeadModel"]
    model_class = next(getattr(transformers, name) for name in names if hasattr(transformers, name))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class._from_config(config).eval()


def looks_ahead(model: Any) -> bool:
    """Whether the last token changes what is said before it."""
    ids = torch.arange(3, 12)[None]
    other = torch.cat([ids[:, :-1], torch.tensor([[40]])], dim=1)
    with torch.no_grad():
        difference = model(input_ids=ids).logits[:, :-1] - model(input_ids=other).logits[:, :-1]
    return float(difference.abs().max()) > 1e-4


def shifts_labels(model: Any) -> bool:
    """Whether the model's own loss is that of the label one place on."""
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids)
    wanted = F.cross_entropy(output.logits[0, :-1].float(), ids[0, 1:])
    return abs(float(output.loss - wanted)) < 1e-3


def adapted(model: Any, **lora: Any) -> Any:
    return with_lora(model, task_type=None, **lora)


# The decision and the truth ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", BOTH_WAYS)
def test_a_family_that_looks_in_both_directions_is_refused_by_configuration_and_by_model(family: str) -> None:
    config = configuration(family)
    model = built(config, "ForMaskedLM")
    assert looks_ahead(model)
    with pytest.raises(ConfigError, match=rf"^model\.name_or_path: X \(model_type {config.model_type}\) looks in both"):
        check_checkpoint(config, "X")
    with pytest.raises(AdapterError, match=rf"^{type(model).__name__} \(model_type .*\) looks in both directions"):
        check_model(model)


@pytest.mark.parametrize("family", SEEING_BACK_WITH_IS_DECODER)
def test_the_same_family_as_a_decoder_is_trained(family: str) -> None:
    config = configuration(family, is_decoder=True)
    model = built(config, "ForCausalLM")
    assert not looks_ahead(model) and shifts_labels(model)
    check_checkpoint(config, "X")
    check_model(model)


@pytest.mark.parametrize("family", LABELS_IN_PLACE)
def test_a_loss_that_does_not_shift_its_labels_is_refused(family: str) -> None:
    model = built(configuration(family), "ForCausalLM")
    assert not shifts_labels(model)
    with pytest.raises(AdapterError, match=r"(at its own place|looks in both directions)"):
        check_model(model)
    with pytest.raises(ConfigError, match=r"(at its own place|looks in both directions)"):
        check_checkpoint(model.config, "X")


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_passes_with_architectures_and_without(family: str) -> None:
    model = built(configuration(family), "ForCausalLM")
    assert not looks_ahead(model) and shifts_labels(model)
    check_model(model)
    for architectures in (None, [type(model).__name__], [f"{family}Model"]):
        model.config.architectures = architectures
        check_checkpoint(model.config, "X")


@pytest.mark.parametrize("switch", [{"is_causal": False}, {"use_bidirectional_attention": True}])
def test_a_decoder_whose_configuration_turns_it_round_is_refused(switch: dict[str, bool]) -> None:
    config = configuration("Llama", **switch)
    with pytest.raises(ConfigError, match="looks in both directions"):
        check_checkpoint(config, "X")


def test_layers_that_say_they_look_ahead_are_refused_whatever_the_configuration_says() -> None:
    model = tiny_llama()
    model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(AdapterError, match=r"LlamaForCausalLM .* looks in both directions"):
        check_model(with_lora(model))


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("bart", "BartForConditionalGeneration"),
        ("mbart", "MBartForConditionalGeneration"),
        ("pegasus", "PegasusForConditionalGeneration"),
        ("marian", "MarianMTModel"),
        ("t5", "T5ForConditionalGeneration"),
        ("whisper", "WhisperForConditionalGeneration"),
        ("blenderbot", "BlenderbotForConditionalGeneration"),
    ],
)
def test_an_encoder_decoder_is_refused_with_its_name(model_type: str, architecture: str) -> None:
    config = AutoConfig.for_model(model_type)
    config.architectures = [architecture]
    with pytest.raises(ConfigError, match=rf"X \(model_type {model_type}, {architecture}\) is an encoder-decoder"):
        check_checkpoint(config, "X")


@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl", "gemma3", "fuyu", "git", "llava_next"])
def test_a_model_that_sees_is_refused(model_type: str) -> None:
    with pytest.raises(ConfigError, match=rf"model_type {model_type}\) sees or hears"):
        check_checkpoint(AutoConfig.for_model(model_type), "X")


@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen3_5"])
def test_a_text_model_of_a_family_that_sees_passes(model_type: str) -> None:
    check_checkpoint(AutoConfig.for_model(model_type), "X")


@pytest.mark.parametrize(
    ("architecture", "head"),
    [
        ("LlamaForSequenceClassification", "SequenceClassification"),
        ("LlamaForTokenClassification", "TokenClassification"),
        ("LlamaForQuestionAnswering", "QuestionAnswering"),
        ("LlamaForRewardModel", "RewardModel"),
    ],
)
def test_another_head_is_refused(architecture: str, head: str) -> None:
    config = configuration("Llama", architectures=[architecture])
    with pytest.raises(ConfigError, match=rf"{architecture}\) has a head for {head}"):
        check_checkpoint(config, "X")


def test_a_loaded_model_with_another_head_or_none_is_refused() -> None:
    config = configuration("Llama")
    with pytest.raises(AdapterError, match="has a head for SequenceClassification"):
        check_model(transformers.LlamaForSequenceClassification(config))
    with pytest.raises(AdapterError, match=r"LlamaModel .* has no language-model head"):
        check_model(transformers.LlamaModel(config))
    # As a decoder its heads for masked tokens would be trained one place off.
    masked = transformers.BertForMaskedLM(configuration("Bert", is_decoder=True))
    with pytest.raises(AdapterError, match="has a head for MaskedLM"):
        check_model(masked)


def test_a_family_without_a_language_model_is_refused_unless_its_own_code_has_one() -> None:
    config = AutoConfig.for_model("vit")
    with pytest.raises(ConfigError, match=r"model_type vit\) is of a family that has no causal language model"):
        check_checkpoint(config, "X")
    config.auto_map = {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    check_checkpoint(config, "X")


@pytest.mark.parametrize("remote_code", [False, True])
@pytest.mark.parametrize(
    ("family", "architecture", "taken"),
    [
        ("Llama", "LlamaBiModel", "LlamaForCausalLM"),
        ("Llama", "LLaDAModelLM", "LlamaForCausalLM"),
        ("Llama", "FooForCausalLM", "LlamaForCausalLM"),
        ("Mistral", "BidirectionalMistralModel", "MistralForCausalLM"),
        ("GPT2", "MyGPT2LMHeadModel", "GPT2LMHeadModel"),
    ],
)
def test_a_checkpoint_of_a_class_that_transformers_has_not_is_not_loaded_as_another(
    family: str, architecture: str, taken: str, remote_code: bool
) -> None:
    config = configuration(family, architectures=[architecture])
    with pytest.raises(ConfigError) as caught:
        check_checkpoint(config, "X", remote_code)
    trust = "" if remote_code else "set model.trust_remote_code if it brings code that you trust, or "
    assert str(caught.value) == (
        f"model.name_or_path: X (model_type {config.model_type}, {architecture}) is a model of the class "
        f"{architecture}, which transformers does not have, and would be loaded as {taken}; {trust}use a checkpoint of "
        f"a class that transformers has."
    )


def test_a_class_of_its_own_is_taken_where_its_code_is_trusted() -> None:
    config = configuration("Llama", architectures=["FooForCausalLM"])
    config.auto_map = {"AutoModelForCausalLM": "modeling_foo.FooForCausalLM"}
    check_checkpoint(config, "X", remote_code=True)
    with pytest.raises(ConfigError, match=r"FooForCausalLM\) .* loaded as LlamaForCausalLM; set model\.trust_remote"):
        check_checkpoint(config, "X")
    # Code for something else is no language model.
    config.auto_map = {"AutoModel": "modeling_foo.FooModel"}
    with pytest.raises(ConfigError, match="would be loaded as LlamaForCausalLM"):
        check_checkpoint(config, "X", remote_code=True)


@pytest.mark.parametrize(
    ("family", "architecture"),
    [
        ("Llama", None),
        ("Llama", "LlamaModel"),
        ("Llama", "LLaMAForCausalLM"),
        ("GPT2", "GPT2Model"),
        ("GPT2", "GPT2LMHeadModel"),
        ("Phi3", "Phi3ForCausalLM"),
        ("Falcon", "FalconForCausalLM"),
        ("Mpt", "MPTForCausalLM"),
        ("GPTBigCode", "GPTBigCodeForCausalLM"),
    ],
)
@pytest.mark.parametrize("auto_map", [None, {"AutoModelForCausalLM": "modeling_own.Own"}])
def test_a_class_of_transformers_passes_with_code_left_beside_it(family: str, architecture: Any, auto_map: Any) -> None:
    config = getattr(transformers, f"{family}Config")(architectures=[architecture] if architecture else None)
    if auto_map:
        config.auto_map = auto_map
    check_checkpoint(config, "X")


def test_a_class_that_the_user_has_registered_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    class OwnConfig(transformers.LlamaConfig):
        model_type = "own"

    class OwnForCausalLM(transformers.LlamaForCausalLM):
        config_class = OwnConfig

    extra = transformers.MODEL_FOR_CAUSAL_LM_MAPPING._extra_content
    monkeypatch.setitem(extra, OwnConfig, OwnForCausalLM)
    check_checkpoint(OwnConfig(architectures=["OwnForCausalLM"]), "X")
    with pytest.raises(ConfigError, match="would be loaded as OwnForCausalLM"):
        check_checkpoint(OwnConfig(architectures=["OtherForCausalLM"]), "X")


@pytest.mark.parametrize("padding", [VOCABULARY, VOCABULARY + 5])
def test_a_configuration_that_pads_beyond_its_embeddings_is_refused(padding: int) -> None:
    config = configuration("Llama", pad_token_id=padding)
    with pytest.raises(ConfigError, match=rf"pads with token id {padding}, but has 61 embeddings \(0\.\.60\)"):
        check_checkpoint(config, "X")
    check_checkpoint(configuration("Llama", pad_token_id=VOCABULARY - 1), "X")


# Methods ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(OWN_METHODS))
@pytest.mark.parametrize("build", [tiny_bert, tiny_t5])
def test_no_method_is_made_around_a_model_that_it_cannot_train(method: str, build: Any) -> None:
    with pytest.raises(AdapterError, match=r"looks in both directions|is an encoder-decoder"):
        get_method(method)(adapted(build()), adapter_mode=get_method(method).adapter_modes[0])


@pytest.mark.parametrize("method", ["sequential", "replay", "seekr"])
@pytest.mark.parametrize("family", ["DebertaV2", "DistilBert", "XLMRoberta"])
def test_encoders_whose_layers_do_not_say_so_are_refused_by_every_method(method: str, family: str) -> None:
    model = adapted(built(configuration(family), "ForMaskedLM"))
    with pytest.raises(AdapterError, match="looks in both directions"):
        get_method(method)(model)


def test_a_state_space_model_is_replayed() -> None:
    Replay(adapted(tiny_mamba(), target_modules=["in_proj"]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "tensor", ["model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"]
)
def test_a_weight_that_is_not_finite_is_refused_by_name(tensor: str, value: float) -> None:
    model = fresh_peft()
    model.get_base_model().get_parameter(tensor.replace("q_proj.", "q_proj.base_layer.")).data.view(-1)[7] = value
    with pytest.raises(AdapterError, match=rf"^LlamaForCausalLM: the weight {tensor} holds NaN or infinite values"):
        Sequential(model)


def test_a_4_bit_weight_made_of_nan_is_refused_by_its_scales(tmp_path: Any) -> None:
    import bitsandbytes

    for double in (True, False):
        model = nf4_llama(tmp_path / str(double), double_quant=double)
        layer = model.model.layers[2].mlp.up_proj
        weight = torch.randn(layer.out_features, layer.in_features)
        weight[3, 5] = float("nan")
        packed, layer.weight.quant_state = bitsandbytes.functional.quantize_4bit(
            weight, quant_type="nf4", compress_statistics=double
        )
        layer.weight.data = packed
        with pytest.raises(AdapterError, match=r"the weight model\.layers\.2\.mlp\.up_proj\.weight holds NaN"):
            check_model(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_finiteness_is_that_of_every_value(dtype: torch.dtype) -> None:
    for place in (None, 0, 500, 999):
        values = torch.linspace(-3, 3, 1000)
        if place is not None:
            values[place] = float("nan")
        assert is_finite(values.to(dtype)) is (place is None)
        assert is_finite(values.to(dtype)) is bool(values.to(dtype).float().isfinite().all())
    assert is_finite(torch.tensor([3])) and is_finite(torch.empty(0)) and is_finite(torch.empty(3, device="meta"))


# Token ids ----------------------------------------------------------------------------------------------------------


def test_padding_beyond_the_embeddings_is_refused_when_the_method_is_made() -> None:
    model = fresh_peft()
    model.config.pad_token_id = VOCABULARY
    with pytest.raises(AdapterError, match=r"^LlamaForCausalLM pads with token id 61, but has 61 embeddings"):
        Replay(model)
    model.config.pad_token_id = -1
    Replay(model)


@pytest.mark.parametrize("key", ["input_ids", "labels"])
def test_samples_with_tokens_beyond_the_embeddings_are_refused_before_training(key: str) -> None:
    method, data = Seekr(fresh_peft()), make_dataset(4)
    data[2][key][-1] = VOCABULARY
    method = Replay(fresh_peft(), method.config, select_samples=lambda dataset, count, seed: [0, 2])
    message = rf"replay sample 1 has token id 61 in its {key}, but the model has 61 embeddings"
    with pytest.raises(DataError, match=message), method.task("first", replay_from=data):
        raise AssertionError("the training began")


def test_a_head_with_fewer_rows_than_the_embeddings_counts() -> None:
    model = tiny_llama()
    model.lm_head = nn.Linear(48, 50, bias=False)
    method = Replay(with_lora(model), select_samples=lambda *_: [0])
    sample: dict[str, list[int]] = {"input_ids": [3, 55], "labels": [-100, 4]}
    with (
        pytest.raises(DataError, match="has token id 55 in its input_ids, but the model has 50"),
        method.task("a", replay_from=[sample]),
    ):
        pass


def test_the_decision_needs_no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_gpt_neo()

    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("a forward ran")

    monkeypatch.setattr(type(model), "forward", refuse)
    check_model(model)
