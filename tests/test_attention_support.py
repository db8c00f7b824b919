"""Which models can be tapped and through which door: flash and flex masks, refusals, and transformers' internals."""

from __future__ import annotations

import copy
import gc
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny_models import (
    N_HEADS,
    N_LAYERS,
    SLIDING_WINDOW,
    VOCABULARY,
    padded_batch,
    tiny_bert,
    tiny_falcon,
    tiny_gemma2,
    tiny_gpt2,
    tiny_gpt_neo,
    tiny_gpt_oss,
    tiny_llama,
    tiny_mamba,
    tiny_minimax,
    tiny_mistral,
    tiny_openai_gpt,
    tiny_qwen3,
    tiny_t5,
    with_lora,
)
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from seekr_peft.attention import AttentionTap
from seekr_peft.attention import models as support
from seekr_peft.attention.capture import EagerCall, InterfaceCall, QuerySelection
from seekr_peft.attention.row_math import TeacherRows
from seekr_peft.errors import CaptureError
from seekr_peft.heads import HeadSelection

EVERY_HEAD = HeadSelection.all(N_LAYERS, N_HEADS)
QUERIES = torch.tensor([[0, 18, -2, 5], [7, -1, -19, 12], [3, 0, 16, -4], [9, 9, 1, 17], [10, 2, -8, 6]])

dispatching = pytest.mark.parametrize("build", [tiny_llama, tiny_qwen3, tiny_mistral, tiny_gpt2, tiny_bert])


def tapped_rows(model: nn.Module, batch: dict[str, Tensor], queries: Tensor | None = None) -> dict[int, Tensor]:
    with torch.no_grad(), AttentionTap(model, EVERY_HEAD, queries=queries) as tap:
        model(**batch)
    return tap.rows


def assert_rows_equal_eager(
    model: nn.Module, eager: nn.Module, batch: dict[str, Tensor], queries: Tensor | None
) -> None:
    """Real rows equal the eager twin's, padded ones are 0, and so are the logits at real positions."""
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = eager(**batch, output_attentions=True)
        torch.testing.assert_close(model(**batch).logits[real], expected.logits[real], rtol=1e-4, atol=1e-4)
    positions = torch.arange(19).repeat(5, 1) if queries is None else queries % 19
    for layer, rows in tapped_rows(model, batch, queries).items():
        wanted = expected.attentions[layer].gather(2, positions[:, None, :, None].expand(-1, N_HEADS, -1, 19))
        wanted = torch.where(real.gather(1, positions)[:, None, :, None], wanted, 0)
        torch.testing.assert_close(rows, wanted, rtol=0, atol=5e-6)


# --- families with ways of their own ---


@pytest.mark.parametrize("build", [tiny_gpt_neo, tiny_openai_gpt, tiny_falcon])
@pytest.mark.parametrize("padding", ["none", "left", "right", "mixed"])
@pytest.mark.parametrize("queries", [None, QUERIES])
def test_rows_of_eager_families_equal_their_own_weights(
    build: Callable[..., nn.Module], padding: str, queries: Tensor | None
) -> None:
    """Also without output_attentions, which no training passes."""
    model = build()
    assert list(support.attention_modules(model)) == list(range(N_LAYERS))
    assert_rows_equal_eager(model, build(), padded_batch(padding), queries)


@pytest.mark.parametrize("build", [tiny_gpt_neo, tiny_openai_gpt])
def test_an_eager_tap_leaves_the_logits_and_the_outputs_as_they_were(build: Callable[..., nn.Module]) -> None:
    model, batch = build(), padded_batch("none")
    with torch.no_grad():
        plain = model(**batch)
        with AttentionTap(model, EVERY_HEAD):
            tapped = model(**batch)
    assert torch.equal(plain.logits, tapped.logits) and plain.keys() == tapped.keys()


def test_local_layers_of_gpt_neo_see_their_window_and_nothing_else() -> None:
    rows = tapped_rows(tiny_gpt_neo(), padded_batch("none"))
    distance = torch.arange(19)[:, None] - torch.arange(19)
    seen = (distance >= 0) & (distance < SLIDING_WINDOW)
    assert (rows[1][..., ~seen] == 0).all() and (rows[1][..., seen] > 0).all()
    for layer in (0, 2):
        assert (rows[layer][..., distance >= 0] > 0).all() and (rows[layer][..., distance < 0] == 0).all()
    torch.testing.assert_close(rows[1].sum(-1), torch.ones(5, N_HEADS, 19))


@pytest.mark.parametrize("build", [tiny_gpt_neo, tiny_openai_gpt])
@pytest.mark.parametrize("every", [True, False])
def test_gradient_squares_of_eager_families_equal_autograd(build: Callable[..., nn.Module], every: bool) -> None:
    batch = padded_batch("none")
    output = build()(**batch, output_attentions=True)
    loss = output.logits.float().log_softmax(-1)[..., 3].mean()
    gradients = torch.autograd.grad(loss, output.attentions)
    positions = torch.arange(19).repeat(5, 1) if every else QUERIES % 19
    model = build()
    with AttentionTap(model, EVERY_HEAD, QUERIES, squares="every" if every else "selected") as tap:
        squares = tap.gradient_squares(model(**batch).logits.float().log_softmax(-1)[..., 3].mean())
    distance = torch.arange(19)[:, None] - torch.arange(19)
    for layer, gradient in enumerate(gradients):
        window = SLIDING_WINDOW if build is tiny_gpt_neo and layer == 1 else 19
        found = (
            (gradient * ((distance >= 0) & (distance < window)))
            .square()
            .sum(-1)
            .gather(2, positions[:, None].expand(-1, N_HEADS, -1))
            .sum(-1)
        )
        assert found.min() > 0
        torch.testing.assert_close(squares[layer], found, rtol=2e-4, atol=1e-12)


def test_linear_attention_among_softmax_attention_has_no_rows() -> None:
    model = tiny_minimax()
    assert list(support.attention_modules(model)) == [0, 2]
    heads = HeadSelection({layer: range(N_HEADS) for layer in (0, 2)})
    with torch.no_grad(), AttentionTap(model, heads) as tap:
        model(**padded_batch("none"))
        attentions = tiny_minimax("eager")(**padded_batch("none"), output_attentions=True).attentions
    torch.testing.assert_close(tap.rows[0], attentions[0], rtol=0, atol=5e-6)
    torch.testing.assert_close(tap.rows[2], attentions[-1], rtol=0, atol=5e-6)
    with pytest.raises(CaptureError, match="layer 1 of the selection does not exist; the attention layers are 0, 2"):
        AttentionTap(model, HeadSelection({1: [0]}))


def test_what_is_called_attention_but_has_no_heads_is_none() -> None:
    from transformers import RwkvConfig, RwkvForCausalLM

    model = RwkvForCausalLM(RwkvConfig(vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2))
    assert not support.has_attention(model) and support.has_attention(tiny_gpt_neo())
    with pytest.raises(CaptureError, match="RwkvForCausalLM has no softmax attention module"):
        support.attention_modules(model)


def test_weights_of_another_shape_than_the_heads_are_refused() -> None:
    model = tiny_gpt_neo()
    attention = support.attention_modules(model)[1]
    attention.register_forward_hook(lambda module, args, output: (output[0], output[1].transpose(1, 2)))
    message = (
        r"layer 1 \(GPTNeoSelfAttention\) returned attention weights of shape \(5, 19, 6, 19\), not \(batch, 6 heads"
    )
    with pytest.raises(CaptureError, match=message):
        tapped_rows(model, padded_batch("none"))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: tiny_falcon("sdpa"), r"layer 0 \(FalconAttention\) computes its attention without .*'eager'"),
        (lambda: tiny_gpt_neo(attention_dropout=0.1), r"layer 0 \(GPTNeoSelfAttention\) applies attention dropout"),
        (lambda: tiny_openai_gpt(attn_pdrop=0.1), r"layer 0 \(Attention\) applies attention dropout"),
        (lambda: tiny_llama("eager", attention_dropout=0.1), r"layer 0 \(LlamaAttention\) applies attention dropout"),
    ],
)
def test_what_cannot_be_captured_in_training_is_refused_before_it(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        support.check_capture(build().eval())


@pytest.mark.parametrize(
    "build", [tiny_llama, tiny_gpt_neo, tiny_openai_gpt, tiny_falcon, tiny_minimax, tiny_gemma2, tiny_gpt_oss]
)
def test_what_can_be_captured_passes(build: Callable[..., nn.Module]) -> None:
    support.check_capture(build())


def test_dropout_after_a_fused_kernel_is_no_matter() -> None:
    support.check_capture(tiny_llama(attention_dropout=0.1))


# --- flash ---


def eager_kernel(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scaling: float | None
) -> tuple[Tensor, None]:
    """What every kernel computes, in plain steps; (batch, T, heads, d) like transformers' own functions."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    logits = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    weights = torch.softmax(logits.masked_fill(~allowed, -1e9), dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


def stub_flash(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """A stand-in with flash attention's contract: a 2D padding mask or None; causality and window inside the kernel,
    the window reaching as far to the right as to the left where there is no causality."""
    assert attention_mask is None or attention_mask.dim() == 2
    positions = torch.arange(query.shape[2])
    distance = positions[:, None] - positions
    allowed = torch.ones(1, 1, *distance.shape, dtype=torch.bool)
    if module.is_causal if is_causal is None else is_causal:
        allowed = allowed & (distance >= 0)
    if sliding_window is not None:
        allowed = allowed & (distance.abs() <= sliding_window - 1)
    if attention_mask is not None:
        allowed = allowed & attention_mask[:, None, None].bool()
    return eager_kernel(module, query, key, value, allowed, scaling)


def stub_flex(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """A stand-in with flex attention's contract: a BlockMask."""
    assert isinstance(attention_mask, BlockMask)
    return eager_kernel(module, query, key, value, dense_mask(attention_mask, *query.shape[:3]), scaling)


def dense_mask(block_mask: BlockMask, batch: int, heads: int, length: int) -> Tensor:
    """Ask the mask about every (sample, head, query, key), one by one along the queries."""
    axes = [torch.arange(size) for size in (batch, heads, length, length)]
    sample, head, query, key = torch.meshgrid(*axes, indexing="ij")
    return block_mask.mask_mod(sample, head, query, key).expand(batch, heads, length, length)


@pytest.fixture
def doors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Register the stand-ins with the masks of the kernels that they stand for, and forget them afterwards."""
    # transformers compiles its block masks, which takes a minute and changes nothing.
    monkeypatch.setattr(
        masking_utils, "create_block_mask", lambda _compile=None, **arguments: create_block_mask(**arguments)
    )
    kept = [(table, dict(table._global_mapping)) for table in (AttentionInterface, AttentionMaskInterface)]
    AttentionInterface.register("stub_flash", stub_flash)
    AttentionMaskInterface.register("stub_flash", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    AttentionInterface.register("stub_flex", stub_flex)
    AttentionMaskInterface.register("stub_flex", ALL_MASK_ATTENTION_FUNCTIONS["flex_attention"])
    yield
    for table, mapping in kept:
        table._global_mapping.clear()
        table._global_mapping.update(mapping)


def through(model: nn.Module, door: str) -> nn.Module:
    """``model`` with another attention function, and proof that it is used."""
    model.config._attn_implementation = door
    return model


def tiny_modernbert(attention: str) -> nn.Module:
    """An encoder with a sliding window in its second layer: three keys to either side."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=60,
        intermediate_size=52,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        local_attention=6,
        global_attn_every_n_layers=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    model = ModernBertForMaskedLM._from_config(config, attn_implementation=attention).eval()
    for layer in model.model.layers:
        layer.attn.Wqkv.weight.data *= 10  # its initialisation is too small for a map with a shape
    return model


@pytest.mark.parametrize("build", [tiny_mistral, tiny_llama, tiny_modernbert])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("queries", [None, QUERIES])
def test_flash_rows_equal_eager_attention(
    doors: None, build: Callable[..., nn.Module], padding: str, queries: Tensor | None
) -> None:
    assert SLIDING_WINDOW < 19
    model = through(build("sdpa"), "stub_flash")
    assert_rows_equal_eager(model, build("eager"), padded_batch(padding), queries)


@pytest.mark.parametrize("padding", ["none", "mixed"])
def test_sdpa_rows_of_a_windowed_encoder_equal_eager_attention(padding: str) -> None:
    batch = padded_batch(padding)
    assert_rows_equal_eager(tiny_modernbert("sdpa"), tiny_modernbert("eager"), batch, QUERIES)
    rows = tapped_rows(tiny_modernbert("sdpa"), padded_batch("none"))
    distance = (torch.arange(19)[:, None] - torch.arange(19)).abs()
    assert (rows[1][..., distance > 3] == 0).all() and (rows[1][..., distance <= 3] > 0).all()
    assert (rows[0] > 0).all()


def test_the_flash_door_is_the_one_that_was_used(doors: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard for the tests above: masks of two dimensions and the window as an argument."""
    seen = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append((args[4].dim(), kwargs["sliding_window"]))
        return stub_flash(*args, **kwargs)

    AttentionInterface.register("stub_flash", spy)
    tapped_rows(through(tiny_mistral(), "stub_flash"), padded_batch("left"))
    assert seen == [(2, SLIDING_WINDOW)] * N_LAYERS


def test_a_soft_cap_inside_the_kernel_is_refused(doors: None) -> None:
    model = through(tiny_gemma2(), "stub_flash")
    with pytest.raises(CaptureError, match=r"Gemma2Attention uses softcap.*attn_implementation='eager'"):
        tapped_rows(model, padded_batch("none"))
    assert model.config._attn_implementation == "stub_flash"


# --- flex ---


@pytest.mark.parametrize("build", [tiny_llama, tiny_mistral])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_flex_rows_equal_eager_attention(doors: None, build: Callable[..., nn.Module], padding: str) -> None:
    model = through(build(), "stub_flex")
    assert_rows_equal_eager(model, build("eager"), padded_batch(padding), QUERIES)


def test_flex_allowed_equals_the_dense_mask_at_the_chosen_queries() -> None:
    padding = padded_batch("left")["attention_mask"].bool()

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    def real(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return padding[batch, key]

    block_mask = create_block_mask(and_masks(causal, real), 5, None, 19, 19, device="cpu")
    dense = torch.ones(19, 19, dtype=torch.bool).tril() & padding[:, None, :]
    queries = QUERIES % 19
    allowed = support.flex_allowed(block_mask, queries, N_HEADS, 19)
    assert allowed.shape == (5, 1, 4, 19)
    assert 0 < dense.sum() < dense.numel()
    for sample in range(5):
        for j, query in enumerate(queries[sample].tolist()):
            assert torch.equal(allowed[sample, 0, j], dense[sample, query])


def test_flex_allowed_of_a_mask_that_ignores_samples_has_every_sample() -> None:
    block_mask = create_block_mask(lambda batch, head, query, key: query >= key, None, None, 19, 19, device="cpu")
    allowed = support.flex_allowed(block_mask, QUERIES % 19, N_HEADS, 19)
    assert torch.equal(allowed[:, 0], torch.arange(19) <= (QUERIES % 19)[..., None])


# --- masks handed to the kernel ---


def interface_call(attention_mask: object, **changes: Any) -> InterfaceCall:
    query, key, value = torch.randn(3, 2, 4, 5, 6).unbind()
    positions = torch.arange(5).repeat(2, 1)
    fields: dict[str, Any] = {
        "query": query,
        "key": key,
        "value": value,
        "attention_mask": attention_mask,
        "position_bias": None,
        "scaling": 0.5,
        "causal": True,
        "sliding_window": None,
        "heads": torch.tensor([1, 3]),
        "queries": QuerySelection(positions, torch.ones(2, 5, dtype=torch.bool), every=True),
    }
    return InterfaceCall(**{**fields, **changes})


def test_a_mask_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(CaptureError, match="cannot read an attention mask of type SimpleNamespace"):
        interface_call(SimpleNamespace()).rows()


@pytest.mark.parametrize("lowest", [float("-inf"), torch.finfo(torch.float32).min])
def test_an_additive_mask_forbids_its_lowest_values_and_adds_the_others(lowest: float) -> None:
    mask = torch.randn(2, 4, 5, 5)
    forbidden = torch.rand(2, 4, 5, 5) < 0.4
    forbidden[..., 0] = False
    mask = mask.masked_fill(forbidden, lowest)
    call = interface_call(mask, causal=False)
    logits = call.query @ call.key.transpose(-1, -2) * 0.5 + mask
    torch.testing.assert_close(call.rows(), torch.softmax(logits, dim=-1)[:, [1, 3]], rtol=1e-5, atol=1e-7)
    assert (call.rows()[forbidden[:, [1, 3]]] == 0).all()


def test_a_position_bias_is_added_to_the_logits_beside_the_mask() -> None:
    bias = torch.randn(1, 4, 5, 5)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    for attention_mask in (None, mask, torch.zeros(1, 1, 5, 5).masked_fill(~mask, float("-inf"))):
        call = interface_call(attention_mask, position_bias=bias)
        logits = (call.query @ call.key.transpose(-1, -2) * 0.5 + bias).masked_fill(~mask, float("-inf"))
        expected = torch.softmax(logits, dim=-1)[:, [1, 3]]
        torch.testing.assert_close(call.rows(), expected, rtol=1e-5, atol=1e-7)


def test_the_queries_of_a_kernel_that_is_causal_itself_stand_behind_the_cached_keys() -> None:
    call = interface_call(None)
    late = QuerySelection(torch.arange(2).repeat(2, 1), torch.ones(2, 2, dtype=torch.bool), every=True)
    cached = interface_call(None, query=call.query[:, :, 3:], key=call.key, value=call.value, queries=late)
    torch.testing.assert_close(cached.rows(), call.rows()[:, :, 3:], rtol=1e-6, atol=1e-7)
    assert (call.rows()[:, :, 3, 4] == 0).all() and (call.rows()[:, :, 4] > 0).all()


@pytest.mark.parametrize("kind", ["interface", "eager"])
def test_the_gradient_of_a_padded_query_does_not_count(kind: str) -> None:
    positions = torch.tensor([[4, 1, 3], [0, 2, 4]])
    real = torch.tensor([[True, False, True], [True, True, False]])
    queries, heads = QuerySelection(positions, real, every=False), torch.tensor([1, 3])
    call: Any = interface_call(None, queries=queries)
    attention_gradient = gradient = torch.randn(2, 4, 5, 5)
    if kind == "interface":
        gradient = torch.randn(2, 5, 4, 6)  # of the output, (batch, T, heads, d)
        attention_gradient = gradient.transpose(1, 2) @ call.value.transpose(-1, -2)
    else:
        call = EagerCall(torch.ones(5, 5).tril().expand(2, 4, 5, 5), heads, queries)
    squares = call.gradient_squares(gradient, every_query=False)
    for sample, (i, j) in enumerate([(4, 3), (0, 2)]):
        rows = [attention_gradient[sample, heads, query, : query + 1].square().sum(dim=-1) for query in (i, j)]
        torch.testing.assert_close(squares[sample], rows[0] + rows[1], rtol=1e-5, atol=0)


# --- why there is a tap ---


def test_output_attentions_under_sdpa_gives_no_weights() -> None:
    output = tiny_llama()(**padded_batch("none"), output_attentions=True)
    assert not output.attentions


def test_a_new_name_without_a_mask_function_would_lose_padding_and_causality(doors: None) -> None:
    """What the tap does not do: it switches the name only after the model has made its mask under the stock name."""
    masks = []

    def nosy(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        masks.append(attention_mask)
        return query.transpose(1, 2), None

    AttentionInterface.register("nosy", nosy)
    tiny = through(tiny_llama(), "nosy")
    tiny(**padded_batch("left"))
    assert masks == [None] * N_LAYERS

    AttentionInterface.register("stub_sdpa", lambda *args, **kwargs: nosy(*args, **kwargs))
    AttentionMaskInterface.register("stub_sdpa", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    masks.clear()
    tapped_rows(through(tiny_llama(), "stub_sdpa"), padded_batch("left"))
    assert [mask.shape for mask in masks] == [(5, 1, 19, 19)] * N_LAYERS


# --- which models ---


@dispatching
def test_a_models_attention_modules_are_found_by_layer(build: Callable[..., nn.Module]) -> None:
    model = build()
    modules = support.attention_modules(model)
    assert list(modules) == list(range(N_LAYERS))
    assert all("Attention" in type(module).__name__ for module in modules.values())
    assert support.head_shape(model) == (N_LAYERS, N_HEADS)


def test_a_peft_model_is_looked_through() -> None:
    model = tiny_llama()
    peft_model = with_lora(model)
    assert support.base_transformer(peft_model) is model
    assert support.attention_modules(peft_model) == support.attention_modules(model)


# torch's own compiler still uses TorchScript.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_compiled_model_is_looked_through() -> None:
    model = tiny_llama()
    assert support.base_transformer(torch.compile(with_lora(model))) is model


def test_a_model_without_attention_is_refused_by_name() -> None:
    with pytest.raises(CaptureError, match="MambaForCausalLM has no softmax attention module"):
        AttentionTap(tiny_mamba(), HeadSelection({0: [0]}))


def test_an_encoder_decoder_is_refused_by_name() -> None:
    message = r"T5ForConditionalGeneration has more than one .* layer index 0 \(the second is decoder\.block"
    with pytest.raises(CaptureError, match=message):
        AttentionTap(tiny_t5(), HeadSelection({0: [0]}))


def test_a_model_is_walked_once_until_its_layers_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model, walks = tiny_llama(), []
    walk = support._walk
    monkeypatch.setattr(support, "_walk", lambda root: walks.append(root) or walk(root))
    first = support.attention_modules(model)
    with AttentionTap(model, HeadSelection({0: [0]})):
        assert support.attention_modules(with_lora(model)) == first
    assert len(walks) == 1

    layers = model.model.layers
    layers[1].self_attn = copy.deepcopy(layers[1].self_attn)
    assert support.attention_modules(model)[1] is layers[1].self_attn is not first[1]
    layers.append(copy.deepcopy(layers[-1]))
    layers[-1].self_attn.layer_idx = len(layers) - 1
    assert support.attention_modules(model)[len(layers) - 1] is layers[-1].self_attn
    del layers[0]
    assert 0 not in support.attention_modules(model)
    model.model.layers = nn.ModuleList([*layers, copy.deepcopy(layers[-1])])
    model.model.layers[-1].self_attn.layer_idx = 9
    assert list(support.attention_modules(model)) == [*range(1, N_LAYERS + 1), 9]
    model.model.layers[-1].self_attn.layer_idx = 8
    assert list(support.attention_modules(model)) == [*range(1, N_LAYERS + 1), 8]


def test_a_layer_that_is_replaced_around_its_attention_is_asked_about_checkpointing() -> None:
    model = with_lora(tiny_llama()).train()
    assert not support.uses_reentrant_checkpointing(model)
    layers = support.base_transformer(model).model.layers
    layers[1] = copy.copy(layers[1])
    layers[1].gradient_checkpointing = True
    layers[1]._gradient_checkpointing_func = partial(torch.utils.checkpoint.checkpoint)
    assert support.uses_reentrant_checkpointing(model)


@pytest.mark.parametrize("bare", [False, True])
def test_what_was_looked_up_does_not_keep_a_model_alive(bare: bool) -> None:
    model = tiny_llama()
    model = model.model if bare else model
    # A way from a layer back to the model, as a hook's closure is.
    attention = next(iter(support.attention_modules(model).values()))
    attention.register_forward_hook(lambda module, args, output, model=model: None)
    gone = weakref.ref(model)
    del model, attention
    gc.collect()
    assert gone() is None


# --- checkpointing and dropout ---


@pytest.mark.parametrize(
    ("keywords", "reentrant"),
    [({"use_reentrant": True}, True), ({"use_reentrant": False}, False), ({"preserve_rng_state": False}, True)],
)
def test_reentrant_checkpointing_is_recognised(keywords: dict[str, bool], reentrant: bool) -> None:
    """Where nothing is said, torch's own default is reentrant."""
    model = with_lora(tiny_llama()).train()
    assert not support.uses_reentrant_checkpointing(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keywords)
    assert support.uses_reentrant_checkpointing(model) is reentrant
    assert not support.uses_reentrant_checkpointing(model.eval())
    support.base_transformer(model.train()).activation_checkpointing_disable()
    assert not support.uses_reentrant_checkpointing(model)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (tiny_llama, "attention_dropout"),
        (tiny_gpt2, "attn_pdrop"),
        (tiny_gpt_neo, "attention_dropout"),
        (tiny_openai_gpt, "attn_pdrop"),
        (tiny_bert, "attention_probs_dropout_prob"),
    ],
)
def test_attention_dropout_is_recognised_in_training_only(build: Callable[..., nn.Module], name: str) -> None:
    for rate in (0.0, 0.2):
        attention = support.attention_modules(build("eager", **{name: rate}))[1]
        assert support.drops_attention(attention.train()) is (rate > 0)
        assert support.drops_attention(attention.eval()) is False


@pytest.mark.parametrize(("flag", "attribute", "expected"), [(None, False, False), (None, True, True)])
def test_a_modules_own_causality_is_used_where_the_call_is_silent(
    flag: bool | None, attribute: bool, expected: bool
) -> None:
    module = nn.Module()
    module.is_causal = attribute
    assert support.is_causal(module, flag) is expected
    assert support.is_causal(module, not attribute) is not expected
    assert support.is_causal(nn.Module(), None) is True


# --- the internals of transformers that all of this relies on ---


@dispatching
def test_transformers_attention_modules_carry_a_layer_index_and_the_shared_configuration(
    build: Callable[..., nn.Module],
) -> None:
    model = build()
    for layer, module in support.attention_modules(model).items():
        assert module.layer_idx == layer
        assert module.config is model.config


@dispatching
def test_transformers_modelling_files_look_functions_up_in_their_own_table(build: Callable[..., nn.Module]) -> None:
    module = support.attention_modules(build())[0]
    functions = support.attention_functions(module)
    assert functions is sys.modules[type(module).__module__].ALL_ATTENTION_FUNCTIONS
    assert callable(functions["sdpa"]) and "eager" not in functions


@dispatching
def test_transformers_reads_the_attention_name_at_call_time(doors: None, build: Callable[..., nn.Module]) -> None:
    """And a function that is registered after the model was built is found."""
    model, calls = build(), []

    def recorder(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        calls.append((module.layer_idx, query.shape[1:3], key.shape[2], value.dim()))
        return query.transpose(1, 2), None

    AttentionInterface.register("recorder", recorder)
    modules = support.attention_modules(model)
    assert {support.implementation(module) for module in modules.values()} == {"sdpa"}
    modules[0].config._attn_implementation = "recorder"
    model(**padded_batch("none"))
    assert calls == [(layer, (N_HEADS, 19), 19, 4) for layer in range(N_LAYERS)]


def test_transformers_checkpointed_layers_keep_their_function_and_flag() -> None:
    model = tiny_llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in model.model.layers:
        assert layer.gradient_checkpointing is True
        assert isinstance(layer._gradient_checkpointing_func, partial)
        assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": False}


def test_transformers_kernels_take_the_arguments_that_the_tap_reads() -> None:
    for name in ("sdpa", "flash_attention_2", "flex_attention"):
        function = support.attention_functions(support.attention_modules(tiny_llama())[0])[name]
        parameters = inspect.signature(function).parameters
        assert list(parameters)[:5] == ["module", "query", "key", "value", "attention_mask"]
        assert "scaling" in parameters


def test_eager_rows_of_a_uniform_teacher_are_what_the_interface_gives() -> None:
    """The two kinds of call agree on every question that an observer may ask."""
    batch, heads = padded_batch("right"), HeadSelection({1: [0, 5]})
    teacher = TeacherRows.from_dense(torch.ones(5, 2, 19, 19).tril() / torch.arange(1, 20)[:, None], 3)
    results = []
    for attention in ("eager", "sdpa"):
        model = tiny_llama(attention)
        observe = lambda layer, call: torch.cat([call.rows().sum((1, 2, 3)), call.row_kl(teacher)[None]])  # noqa: E731
        with torch.no_grad(), AttentionTap(model, heads, observe=observe) as tap:
            model(**batch)
        results.append(tap.values[1])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
