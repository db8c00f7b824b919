"""Families with ways of their own, flash and flex attention, and masks handed to the kernel."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.attention_doors import EVERY_HEAD, stub_flash, tapped_rows, through
from support.tiny_models import (
    N_HEADS,
    N_LAYERS,
    SLIDING_WINDOW,
    VOCABULARY,
    padded_batch,
    tiny_falcon,
    tiny_gemma2,
    tiny_gpt_neo,
    tiny_gpt_oss,
    tiny_llama,
    tiny_minimax,
    tiny_mistral,
    tiny_openai_gpt,
)
from torch import Tensor, nn
from torch.nn.attention.flex_attention import and_masks, create_block_mask
from transformers import AttentionInterface

from seekr_peft.attention import AttentionTap
from seekr_peft.attention import models as support
from seekr_peft.attention.capture import EagerCall, InterfaceCall, QuerySelection
from seekr_peft.errors import CaptureError
from seekr_peft.heads import HeadSelection

QUERIES = torch.tensor([[0, 18, -2, 5], [7, -1, -19, 12], [3, 0, 16, -4], [9, 9, 1, 17], [10, 2, -8, 6]])


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


# --- flash ---


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


# --- masks handed to the kernel ---


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
