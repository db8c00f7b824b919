"""The tap: what it captures is what eager attention computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTuner
from support.eager import eager_rows, expected_rows
from support.tapped import BUILDERS, EVERY_HEAD, QUERIES, SOME_HEADS, families, paddings, snapshot, tapped_rows
from support.teachers import all_heads_kl
from support.tiny_models import (
    HEAD_DIM,
    N_HEADS,
    N_LAYERS,
    VOCABULARY,
    nf4_llama,
    padded_batch,
    tiny_bert,
    tiny_gemma2,
    tiny_gpt2,
    tiny_llama,
    tiny_mistral,
    with_lora,
)
from torch import Tensor, nn

from seekr_peft.attention import AttentionTap
from seekr_peft.attention.capture import InterfaceCall
from seekr_peft.errors import CaptureError
from seekr_peft.heads import HeadSelection
from seekr_peft.sparse import SparseDistribution

# --- what is captured ---


@families
@paddings
def test_rows_equal_eager_attention(family: str, padding: str) -> None:
    batch = padded_batch(padding)
    eager = eager_rows(BUILDERS[family]("eager"), batch)
    rows = tapped_rows(BUILDERS[family](), batch, EVERY_HEAD)
    assert list(rows) == list(range(N_LAYERS))
    for layer in rows:
        expected = expected_rows(eager[layer], batch, tuple(range(N_HEADS)), None)
        # A uniform map would hide a wrong head, query or scale.
        assert expected.std() > 0.03
        assert rows[layer].dtype == torch.float32
        torch.testing.assert_close(rows[layer], expected, rtol=0, atol=5e-6)


@families
@paddings
def test_rows_of_real_queries_sum_to_one_and_those_of_padding_are_exactly_zero(family: str, padding: str) -> None:
    batch = padded_batch(padding)
    for rows in tapped_rows(BUILDERS[family](), batch, EVERY_HEAD).values():
        sums = rows.sum(dim=-1).transpose(1, 2)
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(sums[real], torch.ones_like(sums[real]), rtol=0, atol=1e-5)
        assert (rows.transpose(1, 2)[~real] == 0).all()
        # Nor does any row look at padding.
        assert (rows.transpose(1, 3)[~real] == 0).all()


@families
@paddings
def test_selected_heads_and_queries_equal_those_rows_of_eager_attention(family: str, padding: str) -> None:
    batch = padded_batch(padding)
    eager = eager_rows(BUILDERS[family]("eager"), batch)
    rows = tapped_rows(BUILDERS[family](), batch, SOME_HEADS, queries=QUERIES)
    assert {layer: tuple(value.shape) for layer, value in rows.items()} == {0: (5, 2, 4, 19), 2: (5, 3, 4, 19)}
    for layer, heads in SOME_HEADS.items():
        expected = expected_rows(eager[layer], batch, heads, QUERIES)
        torch.testing.assert_close(rows[layer], expected, rtol=0, atol=5e-6)


def test_the_sliding_window_hides_older_keys() -> None:
    rows = tapped_rows(tiny_mistral(), padded_batch("none"), EVERY_HEAD)[1]
    distance = torch.arange(19)[:, None] - torch.arange(19)
    assert (rows[..., (distance < 0) | (distance >= 7)] == 0).all()
    assert (rows[..., (distance >= 0) & (distance < 7)] > 0).all()


def test_one_list_of_queries_serves_every_sample() -> None:
    batch = padded_batch("left")
    rows = tapped_rows(tiny_llama(), batch, SOME_HEADS, queries=torch.tensor([-1, 4]))
    repeated = tapped_rows(tiny_llama(), batch, SOME_HEADS, queries=torch.tensor([[18, 4]] * 5))
    for layer in SOME_HEADS:
        assert torch.equal(rows[layer], repeated[layer])


@families
def test_a_mask_is_made_once_for_the_layers_of_a_forward_and_anew_for_the_next(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, make = [], InterfaceCall._make_mask
    monkeypatch.setattr(InterfaceCall, "_make_mask", lambda call, queries: made.append(call) or make(call, queries))
    model = BUILDERS[family]()
    with torch.no_grad(), AttentionTap(model, EVERY_HEAD, QUERIES) as tap:
        for padding in ("right", "left", "none", "right"):
            made.clear()
            batch = padded_batch(padding)
            model(**batch)
            kinds = {(id(call.attention_mask), call.sliding_window) for call in made}
            assert len(made) == len(kinds) < N_LAYERS
            expected = tapped_rows(BUILDERS[family](), batch, EVERY_HEAD, QUERIES)
            assert all(torch.equal(tap.rows[layer], expected[layer]) for layer in expected)


def test_a_positional_attention_mask_is_seen() -> None:
    batch = padded_batch("right")  # where padding can look at real keys, unlike on the left
    model = tiny_llama()
    with torch.no_grad(), AttentionTap(model, SOME_HEADS) as tap:
        model(batch["input_ids"], batch["attention_mask"])
    assert (tap.rows[0].transpose(1, 2)[~batch["attention_mask"].bool()] == 0).all()
    expected = tapped_rows(model, batch, SOME_HEADS)
    torch.testing.assert_close(tap.rows[0], expected[0], rtol=0, atol=0)


def test_rows_in_float64_equal_the_softmax_of_q_and_k() -> None:
    """Recomputed by hand from the projections of the first layer, rotary embedding included."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = tiny_llama().double()
    input_ids = padded_batch("none")["input_ids"]
    rows = tapped_rows(model, {"input_ids": input_ids}, HeadSelection({0: [5]}))[0]
    decoder = model.model
    hidden = decoder.layers[0].input_layernorm(decoder.embed_tokens(input_ids))
    attention = decoder.layers[0].self_attn
    query = attention.q_proj(hidden).view(5, 19, N_HEADS, HEAD_DIM).transpose(1, 2)
    key = attention.k_proj(hidden).view(5, 19, 2, HEAD_DIM).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, *decoder.rotary_emb(hidden, torch.arange(19)[None]))
    logits = query[:, 5] @ key[:, 1].transpose(-1, -2) / HEAD_DIM**0.5
    expected = torch.softmax(logits.masked_fill(torch.ones(19, 19).triu(1).bool(), float("-inf")), dim=-1)
    assert rows.dtype == torch.float64
    torch.testing.assert_close(rows[:, 0], expected, rtol=1e-12, atol=1e-14)


def test_rows_of_a_bfloat16_model_are_float32_and_near_those_of_its_eager_twin() -> None:
    batch = padded_batch("mixed")
    eager = eager_rows(tiny_llama("eager").bfloat16(), batch)[0]
    rows = tapped_rows(tiny_llama().bfloat16(), batch, HeadSelection({0: [2]}))[0]
    assert rows.dtype == torch.float32
    # Eager rounds its logits to bfloat16.
    torch.testing.assert_close(rows, expected_rows(eager.float(), batch, (2,), None), rtol=0, atol=0.03)


def test_rows_are_those_of_the_latest_forward() -> None:
    model = tiny_llama()
    first, second = padded_batch("left"), padded_batch("right", lengths=(8, 6), seed=3)
    with torch.no_grad(), AttentionTap(model, SOME_HEADS) as tap:
        model(**first)
        model(**second)
    assert torch.equal(tap.rows[2], tapped_rows(model, second, SOME_HEADS)[2])
    assert tap.rows[2].shape == (2, 3, 8, 8)


def test_rows_with_a_key_value_cache_equal_those_of_one_long_forward() -> None:
    batch = padded_batch("left")
    model = tiny_llama()
    whole = tapped_rows(model, batch, SOME_HEADS)
    with torch.no_grad():
        past = model(batch["input_ids"][:, :-1], attention_mask=batch["attention_mask"][:, :-1]).past_key_values
        with AttentionTap(model, SOME_HEADS) as tap:
            model(batch["input_ids"][:, -1:], attention_mask=batch["attention_mask"], past_key_values=past)
    for layer in SOME_HEADS:
        torch.testing.assert_close(tap.rows[layer], whole[layer][:, :, -1:], rtol=0, atol=5e-6)


@paddings
def test_rows_through_a_peft_model_equal_eager_attention(padding: str) -> None:
    batch = padded_batch(padding)
    eager = eager_rows(with_lora(tiny_llama("eager")), batch)
    peft_model = with_lora(tiny_llama())
    rows = tapped_rows(peft_model, batch, SOME_HEADS, queries=QUERIES)
    with peft_model.disable_adapter():
        without = tapped_rows(peft_model, batch, SOME_HEADS, queries=QUERIES)
    for layer, heads in SOME_HEADS.items():
        torch.testing.assert_close(rows[layer], expected_rows(eager[layer], batch, heads, QUERIES), rtol=0, atol=5e-6)
        assert (rows[layer] - without[layer]).abs().max() > 0.05  # the adapter matters


def test_rows_are_captured_when_peft_calls_forward_past_the_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT up to 0.20 runs ``self.model.forward(...)``, so the hooks of the model itself never fire."""
    monkeypatch.setattr(BaseTuner, "forward", lambda self, *args, **kwargs: self.model.forward(*args, **kwargs))
    peft_model, batch = with_lora(tiny_llama()), padded_batch("left")
    rows = tapped_rows(peft_model, batch, SOME_HEADS)
    monkeypatch.undo()
    expected = tapped_rows(peft_model, batch, SOME_HEADS)
    assert torch.equal(rows[0], expected[0]) and torch.equal(rows[2], expected[2])
    assert rows[0].abs().sum() > 0


def test_rows_on_an_nf4_model_equal_its_eager_twin(tmp_path: Path) -> None:
    batch = padded_batch("mixed")
    eager = eager_rows(with_lora(nf4_llama(tmp_path, "eager")), batch)
    model = nf4_llama(tmp_path)
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    rows = tapped_rows(with_lora(model), batch, SOME_HEADS, queries=QUERIES)
    for layer, heads in SOME_HEADS.items():
        expected = expected_rows(eager[layer], batch, heads, QUERIES)
        torch.testing.assert_close(rows[layer], expected, rtol=0, atol=1e-5)


def test_rows_in_training_are_taken_before_attention_dropout() -> None:
    model, batch = tiny_llama(attention_dropout=0.5), padded_batch("none")
    calm = tapped_rows(model, batch, HeadSelection({0: [1, 4]}))
    noisy = tapped_rows(model.train(), batch, EVERY_HEAD)
    # The first layer's input has no dropout before it; later layers see changed inputs.
    assert torch.equal(noisy[0][:, [1, 4]], calm[0])
    for rows in noisy.values():
        torch.testing.assert_close(rows.sum(dim=-1), torch.ones(5, N_HEADS, 19), rtol=0, atol=1e-5)


def test_rows_and_their_kl_under_autocast_are_computed_in_float32() -> None:
    """Autocast rounds every product to bfloat16; rows must not be rounded so."""
    model, batch, seen = tiny_llama(), padded_batch("mixed"), []
    heads = HeadSelection({1: [0, 5]})
    teacher = SparseDistribution.from_dense(tapped_rows(model, padded_batch("mixed", seed=9), heads, QUERIES)[1])

    def observe(layer: int, call: Any) -> Tensor:
        seen.append(call)
        return all_heads_kl(call, teacher)

    def results() -> tuple[Tensor, ...]:
        (call,) = seen
        loss = all_heads_kl(call, teacher)
        gradient = torch.autograd.grad(loss, (call.query, call.key), retain_graph=True)
        output_gradient = call.query.detach().transpose(1, 2).bfloat16()  # of its form and dtype
        return call.rows(), loss, *gradient, call.gradient_squares(output_gradient, False)

    with AttentionTap(model, heads, QUERIES, observe=observe):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(**batch).logits.dtype == torch.bfloat16
            inside = results()
        outside = results()
    assert inside[0].dtype == inside[1].dtype == torch.float32
    for mine, other in zip(inside, outside, strict=True):
        assert torch.equal(mine, other) and other.abs().sum() > 0


def tiny_bloom() -> nn.Module:
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=60, n_layer=N_LAYERS, n_head=N_HEADS, initializer_range=0.2)
    return BloomForCausalLM._from_config(config, attn_implementation="eager").eval()


def tiny_falcon() -> nn.Module:
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 60, "num_hidden_layers": N_LAYERS, "num_attention_heads": N_HEADS, "vocab_size": VOCABULARY}
    config = FalconConfig(**sizes, initializer_range=0.2)
    return FalconForCausalLM._from_config(config, attn_implementation="eager").eval()


# --- eager kernels ---


@pytest.mark.parametrize("build", [tiny_gemma2, tiny_bloom, tiny_falcon, lambda: tiny_gpt2("eager")])
@paddings
def test_eager_models_give_the_rows_that_they_report(build: Callable[[], nn.Module], padding: str) -> None:
    model, batch = build(), padded_batch(padding)
    eager = eager_rows(model, batch)
    rows = tapped_rows(model, batch, SOME_HEADS, queries=QUERIES)
    whole = tapped_rows(model, batch, SOME_HEADS)
    for layer, heads in SOME_HEADS.items():
        assert torch.equal(rows[layer], expected_rows(eager[layer], batch, heads, QUERIES))
        assert torch.equal(whole[layer], expected_rows(eager[layer], batch, heads, None))


def test_the_soft_cap_of_gemma2_changes_its_rows() -> None:
    batch = padded_batch("none")
    capped, free = tiny_gemma2(), tiny_gemma2(attn_logit_softcapping=None)
    difference = tapped_rows(capped, batch, EVERY_HEAD)[0] - tapped_rows(free, batch, EVERY_HEAD)[0]
    assert difference.abs().max() > 0.05


@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma2, tiny_gpt2, tiny_bert])
def test_eager_attention_dropout_in_training_is_refused(build: Callable[..., nn.Module]) -> None:
    names = {tiny_gpt2: "attn_pdrop", tiny_bert: "attention_probs_dropout_prob"}
    model = build("eager", **{names.get(build, "attention_dropout"): 0.3})
    with AttentionTap(model, SOME_HEADS):
        model(**padded_batch("none"))  # evaluation mode has no dropout
    before = snapshot(model.train())
    with pytest.raises(CaptureError, match=r"layer 0 \(\w+Attention\) applies attention dropout"):
        with AttentionTap(model, SOME_HEADS):
            model(**padded_batch("none"))
    assert snapshot(model) == before


def test_an_eager_attention_without_weights_is_refused() -> None:
    model = tiny_llama("eager")
    model.model.layers[2].self_attn.register_forward_hook(lambda module, args, output: (output[0], None))
    with pytest.raises(CaptureError, match=r"layer 2 \(LlamaAttention\) returned no attention weights"):
        tapped_rows(model, padded_batch("none"), SOME_HEADS)


def test_eager_row_kl_equals_the_row_kl_of_the_tapped_kernel() -> None:
    batch = padded_batch("mixed")
    other = tapped_rows(tiny_llama(), padded_batch("mixed", seed=9), SOME_HEADS, queries=QUERIES)
    teachers = {layer: SparseDistribution.from_dense(rows, 5) for layer, rows in other.items()}
    losses, gradients = [], []
    for attention in ("eager", "sdpa"):
        model = tiny_llama(attention)
        with AttentionTap(
            model, SOME_HEADS, QUERIES, observe=lambda layer, call: all_heads_kl(call, teachers[layer])
        ) as tap:
            model(**batch)
            loss = tap.values[0] + tap.values[2]
            losses.append(loss)
            gradients.append(torch.autograd.grad(loss, model.model.layers[1].self_attn.v_proj.weight)[0])
    assert losses[1].item() > 0.1
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)
