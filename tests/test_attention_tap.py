"""The tap: what it captures equals eager attention, and nobody but its owner can tell that it is there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTuner
from support.tiny_models import (
    HEAD_DIM,
    N_HEADS,
    N_LAYERS,
    VOCABULARY,
    LargestOutput,
    nf4_llama,
    padded_batch,
    tiny_bert,
    tiny_gemma2,
    tiny_gpt2,
    tiny_llama,
    tiny_mamba,
    tiny_mistral,
    tiny_qwen3,
    with_lora,
)
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from seekr_peft.attention import AttentionTap, TeacherRows
from seekr_peft.attention.capture import KINDS_OF_MASK, AttentionCall, InterfaceCall, QuerySelection
from seekr_peft.attention.row_math import HeadPairs
from seekr_peft.errors import CaptureError
from seekr_peft.heads import HeadSelection

BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "llama": tiny_llama,
    "qwen3": tiny_qwen3,
    "mistral": tiny_mistral,
    "gpt2": tiny_gpt2,
    "bert": tiny_bert,
}
EVERY_HEAD = HeadSelection.all(N_LAYERS, N_HEADS)
SOME_HEADS = HeadSelection({0: [1, 4], 2: [0, 3, 5]})
# Of each of the five samples of ``padded_batch``; -19 is position 0.
QUERIES = torch.tensor([[0, 18, -2, 5], [7, -1, -19, 12], [3, 0, 16, -4], [9, 9, 1, 17], [10, 2, -8, 6]])

families = pytest.mark.parametrize("family", BUILDERS)
paddings = pytest.mark.parametrize("padding", ["none", "left", "right", "mixed"])


def eager_rows(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    """(batch, heads, T, T) of each layer, as the model itself reports them."""
    with torch.no_grad():
        attentions = model(**batch, **options, output_attentions=True).attentions
    assert attentions and all(attention.dim() == 4 for attention in attentions)
    return attentions


def tapped_rows(model: nn.Module, batch: dict[str, Tensor], *args: Any, **options: Any) -> dict[int, Tensor]:
    with torch.no_grad(), AttentionTap(model, *args, **options) as tap:
        model(**batch)
    return tap.rows


def expected_rows(eager: Tensor, batch: dict[str, Tensor], heads: tuple[int, ...], queries: Tensor | None) -> Tensor:
    """The chosen rows one by one, 0 where the query is padding."""
    mask = batch["attention_mask"]
    n_samples, _, length, _ = eager.shape
    if queries is None:
        queries = torch.arange(length).repeat(n_samples, 1)
    rows = torch.zeros(n_samples, len(heads), queries.shape[1], length)
    for sample in range(n_samples):
        for i, head in enumerate(heads):
            for j, query in enumerate(queries[sample].tolist()):
                if mask[sample, query]:
                    rows[sample, i, j] = eager[sample, head, query]
    return rows


def snapshot(model: nn.Module) -> list[Any]:
    """Hooks and attention names of every module."""
    tables = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_backward_hooks",
    )
    state: list[Any] = [dict(ALL_ATTENTION_FUNCTIONS)]
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        state.append((name, [list(getattr(module, table)) for table in tables], "forward" in vars(module)))
        state.append(getattr(config, "_attn_implementation", None))
    return state


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
    teacher = TeacherRows.from_dense(tapped_rows(model, padded_batch("mixed", seed=9), heads, QUERIES)[1])

    def observe(layer: int, call: Any) -> Tensor:
        seen.append(call)
        return call.row_kl(teacher)

    def results() -> tuple[Tensor, ...]:
        (call,) = seen
        loss = call.row_kl(teacher)
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


# --- eager kernels ---


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
    teachers = {layer: TeacherRows.from_dense(rows, 5) for layer, rows in other.items()}
    losses, gradients = [], []
    for attention in ("eager", "sdpa"):
        model = tiny_llama(attention)
        with AttentionTap(model, SOME_HEADS, QUERIES, observe=lambda layer, call: call.row_kl(teachers[layer])) as tap:
            model(**batch)
            loss = tap.values[0] + tap.values[2]
            losses.append(loss)
            gradients.append(torch.autograd.grad(loss, model.model.layers[1].self_attn.v_proj.weight)[0])
    assert losses[1].item() > 0.1
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


# --- samples with heads of their own ---


def pairs_of(chosen: list[list[int]], tapped: list[int]) -> HeadPairs:
    """By hand: one pair for each of ``chosen`` heads of each sample."""
    pairs = [(sample, head) for sample, heads in enumerate(chosen) for head in heads]
    counts = [len(heads) for heads in chosen]
    return HeadPairs(
        torch.tensor([sample for sample, _ in pairs]),
        torch.tensor([head for _, head in pairs]),
        torch.tensor([tapped.index(head) for _, head in pairs]),
        torch.tensor([sum(counts[:i]) for i in range(len(counts) + 1)]),
        tuple(counts),
    )


CHOSEN = {0: [[1, 4], [], [4], [0], [0, 1, 4]], 2: [[3], [0, 5], [], [], [0, 3, 5]]}
TAPPED = HeadSelection({0: [0, 1, 4], 2: [0, 3, 5]})


@families
@paddings
def test_the_loss_of_pairs_and_its_gradient_equal_eager_attention(family: str, padding: str) -> None:
    """The whole way down to every weight, by plain autograd through the attention that the model reports."""
    batch = padded_batch(padding)
    # Flatter than the student's own rows, and nowhere where those may not look.
    other = tapped_rows(BUILDERS[family](), batch, TAPPED, queries=QUERIES)
    flat = {layer: rows**0.2 / (rows**0.2).sum(-1, keepdim=True).clamp_min(1e-9) for layer, rows in other.items()}
    pairs = {layer: pairs_of(CHOSEN[layer], list(TAPPED[layer])) for layer in CHOSEN}
    teacher = {layer: flat[layer][pairs[layer].samples, pairs[layer].slots] for layer in pairs}
    stored = {layer: TeacherRows.from_dense(rows[None]) for layer, rows in teacher.items()}
    real = batch["attention_mask"].gather(1, QUERIES % 19)
    weights = {
        layer: torch.rand(1, len(own.heads), QUERIES.shape[1]) * real[own.samples] for layer, own in pairs.items()
    }
    twin = BUILDERS[family]("eager")
    attentions, slow = twin(**batch, output_attentions=True).attentions, torch.zeros(())
    for layer, own in pairs.items():
        for i, (sample, head) in enumerate(zip(own.samples.tolist(), own.heads.tolist(), strict=True)):
            for j, query in enumerate(QUERIES[sample].tolist()):
                if real[sample, j]:
                    student = attentions[layer][sample, head, query]
                    wanted = teacher[layer][i, j]
                    log_ratio = torch.where(wanted > 0, wanted, 1).log() - torch.where(student > 0, student, 1).log()
                    slow = slow + weights[layer][0, i, j] * (wanted * log_ratio).sum()
    slow.backward()

    def observe(layer: int, call: AttentionCall) -> Tensor:
        return call.pair_kl(pairs[layer], stored[layer], weights[layer])

    for attention in ("sdpa", "eager"):
        model = BUILDERS[family](attention)
        with AttentionTap(model, TAPPED, QUERIES, observe=observe) as tap:
            model(**batch, **({"output_attentions": True} if attention == "eager" else {}))
            loss = tap.values[0] + tap.values[2]
            loss.backward()
        assert slow.item() > 0.1
        torch.testing.assert_close(loss, slow, rtol=1e-5, atol=0)
        for (name, mine), exact in zip(model.named_parameters(), twin.parameters(), strict=True):
            if exact.grad is None or float(exact.grad.norm()) == 0:
                assert mine.grad is None or float(mine.grad.norm()) == 0, name
                continue
            assert float((mine.grad - exact.grad).norm()) <= 1e-4 * float(exact.grad.norm()) + 1e-6, name


@pytest.mark.parametrize("mask", ["none", "bool", "one head", "every head", "one sample", "bias"])
@pytest.mark.parametrize("n_kv", [2, 6])
@pytest.mark.parametrize("n_samples", [1, 3])
def test_pairs_read_their_own_sample_and_head_of_any_mask(mask: str, n_kv: int, n_samples: int) -> None:
    torch.manual_seed(0)
    length, heads = 9, [0, 2, 5]
    query, key, value = (
        torch.randn(n_samples, length, n, 4, dtype=torch.double).transpose(1, 2).requires_grad_()
        for n in (6, n_kv, n_kv)
    )
    positions = torch.stack([torch.randperm(length)[:4] for _ in range(n_samples)])
    shapes = {"one head": (n_samples, 1), "every head": (n_samples, 6), "one sample": (1, 6)}
    given, bias = None, None
    if mask == "bool":
        given = torch.rand(n_samples, 1, length, length) > 0.4
        given[..., 0] = True
    elif mask == "bias":
        bias = torch.randn(1, 6, length, length, dtype=torch.double)
    elif mask != "none":
        given = torch.randn(*shapes[mask], length, length, dtype=torch.double)
        given[..., 1:].masked_fill_(torch.rand_like(given[..., 1:]) > 0.6, torch.finfo(torch.double).min)
    call = InterfaceCall(
        query,
        key,
        value,
        given,
        bias,
        0.5,
        causal=True,
        sliding_window=None,
        heads=torch.tensor(heads),
        queries=QuerySelection(positions, torch.ones_like(positions, dtype=torch.bool), every=False),
    )
    pairs = pairs_of([[0, 5], [], [2]][:n_samples], heads)
    teacher = torch.softmax(torch.randn(1, len(pairs.heads), 4, length, dtype=torch.double), -1)
    weights = torch.rand(1, len(pairs.heads), 4, dtype=torch.double)
    slow = torch.zeros((), dtype=torch.double)
    for i, (sample, head) in enumerate(zip(pairs.samples.tolist(), pairs.heads.tolist(), strict=True)):
        logits = query[sample, head, positions[sample]] @ key[sample, head // (6 // n_kv)].T * 0.5
        if given is None:
            allowed = torch.arange(length) <= positions[sample][:, None]
            logits = logits + (0 if bias is None else bias[0, head, positions[sample]])
        else:
            own = given.expand(n_samples, 6, length, length)[sample, head, positions[sample]]
            allowed = own if mask == "bool" else own > torch.finfo(torch.double).min
            logits = logits if mask == "bool" else logits + own
        logs = torch.log_softmax(logits.masked_fill(~allowed, float("-inf")), -1)
        wanted = torch.where(allowed, teacher[0, i], 0)
        teacher[0, i] = wanted = wanted / wanted.sum(-1, keepdim=True)
        kl = torch.where(allowed, wanted * (torch.where(allowed, wanted, 1).log() - torch.where(allowed, logs, 0)), 0)
        slow = slow + (kl.sum(-1) * weights[0, i]).sum()
    found = call.pair_kl(pairs, TeacherRows.from_dense(teacher), weights)
    torch.testing.assert_close(found, slow, rtol=1e-9, atol=0)
    for one, other in zip(
        torch.autograd.grad(found, (query, key)), torch.autograd.grad(slow, (query, key)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


# --- nobody notices ---


@families
@paddings
def test_logits_are_bitwise_unchanged_under_the_tap(family: str, padding: str) -> None:
    model, batch = BUILDERS[family](), padded_batch(padding)
    before = snapshot(model)
    with torch.no_grad():
        plain = model(**batch).logits
        with AttentionTap(model, SOME_HEADS, queries=QUERIES):
            tapped = model(**batch).logits
        after = model(**batch).logits
    assert torch.equal(plain, tapped) and torch.equal(plain, after)
    assert snapshot(model) == before


@pytest.mark.parametrize("squares", [None, "selected"])
def test_the_gradient_of_the_models_own_loss_is_bitwise_unchanged(squares: Any) -> None:
    batch = padded_batch("mixed")

    def gradient(tap: bool) -> Tensor:
        model = with_lora(tiny_llama()).train()
        heads = SOME_HEADS if tap else HeadSelection({})
        with AttentionTap(model, heads, squares=squares) as tap:
            model(**batch, labels=batch["input_ids"]).loss.backward()
        assert set(tap.squares) == (set(heads) if squares else set())
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    plain = gradient(False)
    assert plain.norm() > 0
    assert torch.equal(plain, gradient(True))


def test_other_peoples_hooks_survive_and_see_the_stock_name() -> None:
    model, names = tiny_llama(), []
    attention = model.model.layers[0].self_attn
    attention.register_forward_hook(lambda module, args, output: names.append(module.config._attn_implementation))
    tapped_rows(model, padded_batch("none"), SOME_HEADS)
    model(**padded_batch("none"))
    assert names == ["sdpa", "sdpa"]


def test_an_exception_inside_the_block_leaves_no_trace() -> None:
    model = with_lora(tiny_llama())
    before = snapshot(model)

    def run_and_fail() -> None:
        with AttentionTap(model, SOME_HEADS):
            model(**padded_batch("none"))
            assert snapshot(model) != before  # the comparison sees hooks
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_and_fail()
    assert snapshot(model) == before


@pytest.mark.parametrize("where", ["q_proj", "o_proj", "mlp", "kernel"])
def test_an_exception_inside_the_forward_leaves_no_trace(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_llama(), padded_batch("none")
    plain = tapped_rows(model, batch, SOME_HEADS)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    layer = model.model.layers[2]
    with monkeypatch.context() as patch:
        if where == "kernel":
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", fail)
        else:
            patch.setattr(layer.mlp if where == "mlp" else getattr(layer.self_attn, where), "forward", fail)
        before = snapshot(model)
        with pytest.raises(ZeroDivisionError), AttentionTap(model, SOME_HEADS):
            model(**batch)
        assert snapshot(model) == before
    assert torch.equal(tapped_rows(model, batch, SOME_HEADS)[2], plain[2])


def test_a_forward_after_a_failed_one_in_the_same_block_is_captured() -> None:
    model, batch = tiny_llama(), padded_batch("none")
    with torch.no_grad(), AttentionTap(model, SOME_HEADS) as tap:
        with pytest.raises(IndexError):
            model(input_ids=torch.full((1, 3), VOCABULARY))
        model(**batch)
    assert torch.equal(tap.rows[2], tapped_rows(model, batch, SOME_HEADS)[2])


def test_a_failing_entry_undoes_what_it_had_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    before = snapshot(model)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(model.model.layers[2].self_attn, "register_forward_hook", fail)
    with pytest.raises(ZeroDivisionError), AttentionTap(model, SOME_HEADS):
        pass
    monkeypatch.undo()
    assert snapshot(model) == before


def test_nested_taps_each_see_their_own_heads_and_queries() -> None:
    model, batch = tiny_llama(), padded_batch("mixed")
    inner_heads = HeadSelection({0: [2], 1: [0, 5]})
    before = snapshot(model)
    with torch.no_grad(), AttentionTap(model, SOME_HEADS) as outer:
        with AttentionTap(model, inner_heads, queries=QUERIES) as inner:
            model(**batch)
        both, between = dict(outer.rows), snapshot(model)
        model(**batch)
    assert between != before and snapshot(model) == before
    for layer, rows in tapped_rows(model, batch, SOME_HEADS).items():
        assert torch.equal(both[layer], rows) and torch.equal(outer.rows[layer], rows)
    for layer, rows in tapped_rows(model, batch, inner_heads, queries=QUERIES).items():
        assert torch.equal(inner.rows[layer], rows)


def test_an_exception_in_a_nested_tap_leaves_the_outer_one_working() -> None:
    model, batch = tiny_llama(), padded_batch("mixed")
    with torch.no_grad(), AttentionTap(model, SOME_HEADS) as outer:
        inside = snapshot(model)
        with pytest.raises(CaptureError, match="query position 99"):
            with AttentionTap(model, SOME_HEADS, queries=torch.tensor([99])):
                model(**batch)
        assert snapshot(model) == inside
        model(**batch)
    assert torch.equal(outer.rows[2], tapped_rows(model, batch, SOME_HEADS)[2])


@pytest.mark.parametrize("one_configuration", [False, True])
def test_another_model_of_the_same_class_is_not_touched(one_configuration: bool) -> None:
    model, other, batch = tiny_llama(), tiny_llama(), padded_batch("mixed")
    if one_configuration:
        for module in other.modules():
            if hasattr(module, "config"):
                module.config = model.config
    before = snapshot(other)
    with torch.no_grad(), AttentionTap(model, SOME_HEADS) as tap:
        model(**batch)
        rows = dict(tap.rows)
        assert snapshot(other) == before
        other(**padded_batch("none", seed=5))
    assert tap.rows.keys() == rows.keys() and all(tap.rows[layer] is rows[layer] for layer in rows)


def test_layers_without_selected_heads_keep_the_stock_function() -> None:
    model = tiny_llama()
    stock, functions, names = ALL_ATTENTION_FUNCTIONS["sdpa"], {}, set()
    for layer, block in enumerate(model.model.layers):

        def note(module: nn.Module, args: Any, output: Any, layer: int = layer) -> None:
            functions[layer] = ALL_ATTENTION_FUNCTIONS["sdpa"]
            names.add(model.config._attn_implementation)

        block.self_attn.q_proj.register_forward_hook(note)
    tapped_rows(model, padded_batch("none"), SOME_HEADS)
    assert [functions[layer] is stock for layer in range(N_LAYERS)] == [False, True, False]
    # Some models do other things under another name.
    assert names == {"sdpa"}


def test_a_model_that_asks_for_its_attentions_name_is_unchanged() -> None:
    """DeepSeek-V3.2 leaves out its choice of keys where the name is none of transformers' own."""
    deepseek = pytest.importorskip("transformers.models.deepseek_v32", reason="this transformers has no DeepSeek-V3.2")
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 52, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "index_n_heads": 2, "index_head_dim": 16}
    ranks = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 12}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    model = deepseek.DeepseekV32ForCausalLM(
        deepseek.DeepseekV32Config(
            vocab_size=VOCABULARY,
            **sizes,
            **heads,
            **ranks,
            **experts,
            first_k_dense_replace=2,
            mlp_layer_types=["dense"] * 2,
            index_topk=5,
            pad_token_id=0,
        )
    ).eval()
    batch = padded_batch("none")
    with torch.no_grad():
        plain = model(**batch, use_cache=False).logits
        with AttentionTap(model, HeadSelection({0: [0, 3], 1: [2]})) as tap:
            tapped = model(**batch, use_cache=False).logits
    assert torch.equal(plain, tapped)
    for rows in tap.rows.values():
        assert (rows > 0).sum(dim=-1).max() == 5
        torch.testing.assert_close(rows.sum(dim=-1), torch.ones(rows.shape[:3]))


def test_an_interrupted_forward_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch runs no hook after what is no Exception."""
    model, batch = tiny_llama(), padded_batch("none")

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[2].self_attn.q_proj, "forward", interrupt)
        before = snapshot(model)
        with pytest.raises(KeyboardInterrupt), AttentionTap(model, SOME_HEADS):
            model(**batch)
        assert snapshot(model) == before


def test_a_modelling_files_own_function_is_put_back() -> None:
    library = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def own(*args: Any, **kwargs: Any) -> Any:
        return library(*args, **kwargs)

    model, batch = tiny_llama(), padded_batch("mixed")
    expected = tapped_rows(model, batch, SOME_HEADS)
    ALL_ATTENTION_FUNCTIONS["sdpa"] = own
    try:
        rows = tapped_rows(model, batch, SOME_HEADS)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert all(torch.equal(rows[layer], expected[layer]) for layer in expected)
    tapped_rows(model, batch, SOME_HEADS)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is library and "sdpa" not in ALL_ATTENTION_FUNCTIONS._local_mapping


def test_models_in_several_threads_do_not_disturb_one_another() -> None:
    batches = [padded_batch("mixed", seed=seed) for seed in range(4)]
    expected = [tapped_rows(tiny_llama(), batch, SOME_HEADS) for batch in batches]
    failures: list[BaseException] = []

    def work(number: int, tapped: bool) -> None:
        try:
            model = models[number]
            for _ in range(25):
                if not tapped:
                    with torch.no_grad():
                        model(**batches[number])
                    continue
                rows = tapped_rows(model, batches[number], SOME_HEADS)
                assert all(torch.equal(rows[layer], expected[number][layer]) for layer in rows)
        except BaseException as error:
            failures.append(error)

    models = [tiny_llama() for _ in range(4)]
    threads = [threading.Thread(target=work, args=(number, number < 3)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert "sdpa" not in ALL_ATTENTION_FUNCTIONS._local_mapping


def test_a_mask_for_each_layer_is_not_kept_for_all_of_them() -> None:
    model, batch = tiny_llama(), padded_batch("mixed")
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "attention_mask": kwargs["attention_mask"].clone()}),
            with_kwargs=True,
        )
    expected = tapped_rows(tiny_llama(), batch, EVERY_HEAD)
    with torch.no_grad(), AttentionTap(model, EVERY_HEAD) as tap:
        model(**batch)
        assert [len(queries.masks) for queries in tap._selections.values()] == [KINDS_OF_MASK] and N_LAYERS > 2
    assert all(torch.equal(tap.rows[layer], expected[layer]) for layer in expected)


def test_a_tap_without_heads_does_nothing_on_any_model() -> None:
    for model in (tiny_llama(), tiny_mamba()):
        assert tapped_rows(model, padded_batch("none"), HeadSelection({})) == {}
    with AttentionTap(checkpointed(tiny_llama(), True), HeadSelection({})) as tap:
        tap.model(**padded_batch("none"), use_cache=False).logits.sum().backward()


def test_a_tap_that_wants_no_gradient_gives_a_frozen_model_none() -> None:
    model = tiny_llama().requires_grad_(False)
    with AttentionTap(model, SOME_HEADS) as tap:
        assert not model(**padded_batch("none")).logits.requires_grad
    assert not tap.rows[0].requires_grad


# --- gradients and checkpointing ---


def checkpointed(model: Any, reentrant: bool | None) -> Any:
    model = with_lora(model).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def rows_loss(rows: dict[int, Tensor]) -> Tensor:
    """Some number that depends on every entry."""
    generator = torch.Generator().manual_seed(4)
    return torch.stack([(row * torch.randn(row.shape, generator=generator)).sum() for row in rows.values()]).sum()


def lora_gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def slow_row_loss(layer: int, call: AttentionCall) -> Tensor:
    return call.row_kl(TeacherRows.from_dense(torch.full_like(call.rows(), 1 / 19).detach(), 6))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("observe", [None, slow_row_loss])
def test_checkpointing_does_not_change_the_gradient_of_captured_values(attention: str, observe: Any) -> None:
    gradients = []
    for reentrant in (None, False):
        model = checkpointed(tiny_llama(attention), reentrant)
        with AttentionTap(model, SOME_HEADS, QUERIES, observe=observe, keep_graph=True) as tap:
            logits = model(**padded_batch("mixed"), use_cache=False).logits
            (rows_loss(tap.values) + logits.square().mean()).backward()
        gradients.append(lora_gradient(model))
    assert gradients[0].norm() > 1e-2
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


def test_a_recomputation_is_not_captured_again() -> None:
    model, calls = checkpointed(tiny_llama(), False), []

    def observe(layer: int, call: AttentionCall) -> Tensor:
        calls.append(layer)
        return call.rows()

    with AttentionTap(model, SOME_HEADS, QUERIES, observe=observe, keep_graph=True) as tap:
        model(**padded_batch("mixed"), use_cache=False)
        first = dict(tap.values)
        assert calls == [0, 2]
        rows_loss(tap.rows).backward()
    assert sorted(calls) == [0, 0, 2, 2]  # recomputed once
    assert all(tap.values[layer] is first[layer] for layer in first)


def test_a_recomputation_after_a_failed_forward_is_not_taken_for_its_capture() -> None:
    model = checkpointed(tiny_llama(), False)
    with AttentionTap(model, SOME_HEADS, QUERIES, keep_graph=True) as tap:
        model(**padded_batch("none"), use_cache=False)
        loss = rows_loss(tap.rows)
        with pytest.raises(IndexError):
            model(input_ids=torch.full((5, 19), VOCABULARY), use_cache=False)
        loss.backward()
        assert tap.rows == {}
    assert lora_gradient(model).norm() > 0


def test_backward_outside_the_block_fails_under_checkpointing() -> None:
    """The rule that it documents: open the tap around backward, in ``training_step`` of a Trainer."""
    model = checkpointed(tiny_llama(), False)
    with AttentionTap(model, SOME_HEADS, keep_graph=True) as tap:
        model(**padded_batch("none"), use_cache=False)
    with pytest.raises(torch.utils.checkpoint.CheckpointError, match="different number of tensors"):
        rows_loss(tap.rows).backward()


def test_backward_outside_the_block_is_fine_without_checkpointing() -> None:
    gradients = []
    for inside in (True, False):
        model = checkpointed(tiny_llama(), None)
        with AttentionTap(model, SOME_HEADS, keep_graph=True) as tap:
            model(**padded_batch("none"))
            if inside:
                rows_loss(tap.rows).backward()
        if not inside:
            rows_loss(tap.rows).backward()
        gradients.append(lora_gradient(model))
    assert torch.equal(*gradients)


def test_reentrant_checkpointing_is_refused_where_a_gradient_is_wanted() -> None:
    model = checkpointed(tiny_llama(), True)
    before = snapshot(model)
    with pytest.raises(CaptureError, match="'use_reentrant': False"), AttentionTap(model, SOME_HEADS):
        pass
    assert snapshot(model) == before
    # Without a gradient, or in evaluation mode where nothing is recomputed, there is nothing to lose.
    with torch.no_grad(), pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        assert tapped_rows(model, padded_batch("none"), SOME_HEADS).keys() == {0, 2}
    with AttentionTap(model.eval(), SOME_HEADS, keep_graph=True) as tap:
        model(**padded_batch("none"))
    assert tap.rows.keys() == {0, 2}


def test_keep_graph_refuses_rows_without_a_gradient() -> None:
    model = tiny_llama().requires_grad_(False)
    with pytest.raises(CaptureError, match=r"layer 0 has no gradient.*use_reentrant=False"):
        with AttentionTap(model, SOME_HEADS, keep_graph=True):
            model(**padded_batch("none"))
    with pytest.raises(CaptureError, match="layer 0 has no gradient"), torch.no_grad():
        with AttentionTap(tiny_llama(), SOME_HEADS, keep_graph=True) as tap:
            tap.model(**padded_batch("none"))


def test_the_gradient_of_the_row_kl_equals_that_of_eager_attention_and_kl_div() -> None:
    """The whole way down to the weights of every layer."""
    batch = padded_batch("mixed")
    teacher = tapped_rows(tiny_llama(), padded_batch("mixed", seed=9), SOME_HEADS, queries=QUERIES)
    dense = {layer: TeacherRows.from_dense(rows) for layer, rows in teacher.items()}
    real = batch["attention_mask"].gather(1, QUERIES % 19)
    model, twin = tiny_llama(), tiny_llama("eager")
    with AttentionTap(model, SOME_HEADS, QUERIES, observe=lambda layer, call: call.row_kl(dense[layer])) as tap:
        model(**batch)
        loss = tap.values[0] + tap.values[2]
        loss.backward()
    attentions = twin(**batch, output_attentions=True).attentions
    slow = torch.zeros(())
    for layer, heads in SOME_HEADS.items():
        for sample in range(5):
            for j, query in enumerate(QUERIES[sample].tolist()):
                if real[sample, j]:
                    student = attentions[layer][sample, list(heads), query]
                    log_student = torch.where(student > 0, student, 1).log()
                    kl = torch.nn.functional.kl_div(log_student, teacher[layer][sample, :, j], reduction="sum")
                    slow = slow + kl / (len(heads) * real[sample].sum() * 5)
    slow.backward()
    torch.testing.assert_close(loss, slow, rtol=1e-5, atol=0)
    for (name, mine), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if other.grad is None or other.grad.norm() == 0:
            assert mine.grad is None or mine.grad.norm() == 0, name
            continue
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-5 * float(other.grad.abs().max() + 1))


# --- gradient norms ---


def eager_squares(
    model: nn.Module, batch: dict[str, Tensor], loss: Callable[[Tensor], Tensor], queries: Tensor | None, causal: bool
) -> Tensor:
    """(layers, batch, heads): squares of dL/dA over the allowed entries of the real selected queries, from eager A."""
    mask = batch["attention_mask"].bool()
    output = model(**batch, output_attentions=True)
    gradients = torch.autograd.grad(loss(output.logits), output.attentions)
    allowed = mask[:, None, :].expand(-1, 19, -1)
    if causal:
        allowed = allowed & torch.ones(19, 19, dtype=torch.bool).tril()
    squares = torch.zeros(N_LAYERS, len(mask), N_HEADS)
    for layer, gradient in enumerate(gradients):
        for sample in range(len(mask)):
            chosen = range(19) if queries is None else (queries[sample] % 19).tolist()
            for query in chosen:
                if mask[sample, query]:
                    kept = gradient[sample, :, query] * allowed[sample, query]
                    squares[layer, sample] += kept.square().sum(dim=-1)
    return squares


def label_loss(batch: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """A loss that only real positions enter."""
    real = batch["attention_mask"].bool()
    return lambda logits: torch.nn.functional.cross_entropy(logits[real], batch["input_ids"][real])


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["none", "left", "mixed"])
@pytest.mark.parametrize("every_query", [False, True])
def test_gradient_squares_equal_the_gradient_of_eager_attention(
    family: str, attention: str, padding: str, every_query: bool
) -> None:
    batch = padded_batch(padding)
    loss = label_loss(batch)
    queries = None if every_query else QUERIES
    expected = eager_squares(BUILDERS[family]("eager"), batch, loss, queries, causal=family == "llama")
    model = BUILDERS[family](attention)
    with AttentionTap(model, SOME_HEADS, QUERIES, squares="every" if every_query else "selected") as tap:
        output = model(**batch, **({"output_attentions": True} if attention == "eager" else {}))
        squares = tap.gradient_squares(loss(output.logits))
    for layer, heads in SOME_HEADS.items():
        assert expected[layer].min() > 0
        torch.testing.assert_close(squares[layer], expected[layer][:, list(heads)], rtol=2e-4, atol=1e-9)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradient_squares_respect_the_sliding_window() -> None:
    batch = padded_batch("none")
    loss = label_loss(batch)
    model, twin = tiny_mistral(), tiny_mistral("eager")
    output = twin(**batch, output_attentions=True)
    gradient = torch.autograd.grad(loss(output.logits), output.attentions)[1]
    expected = (gradient * (output.attentions[1] > 0)).square().sum(dim=(-1, -2))
    with AttentionTap(model, EVERY_HEAD, squares="every") as tap:
        mine = tap.gradient_squares(loss(model(**batch).logits))[1]
    torch.testing.assert_close(mine, expected, rtol=2e-4, atol=0)


def test_watched_outputs_make_a_frozen_model_differentiable() -> None:
    batch = padded_batch("none")
    loss = label_loss(batch)
    squares = []
    for frozen in (False, True):
        model = tiny_llama().requires_grad_(not frozen)
        with AttentionTap(model, EVERY_HEAD, QUERIES, squares="selected") as tap:
            squares.append(tap.gradient_squares(loss(model(**batch).logits))[0])
    assert torch.equal(*squares) and squares[0].min() > 0


def counted(counts: dict[str, int], name: str) -> Callable[..., None]:
    def count(*args: Any) -> None:
        counts[name] = counts.get(name, 0) + 1

    return count


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_squares_backward_ends_at_the_lowest_selected_layer(attention: str, checkpointing: bool) -> None:
    batch, counts = padded_batch("none"), {}
    model = tiny_llama(attention).requires_grad_(False).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: output.requires_grad_())
    for layer in (0, 1, 2):
        norm = model.model.layers[layer].input_layernorm
        norm.register_forward_pre_hook(
            lambda module, args, layer=layer: args[0].register_hook(counted(counts, f"below {layer}")) and None
        )
    selected = HeadSelection({1: [0, 3], 2: [5]})
    with AttentionTap(model, selected, QUERIES, squares="selected") as tap:
        squares = tap.gradient_squares(label_loss(batch)(model(**batch).logits))
    assert set(squares) == {1, 2} and "below 2" in counts and not {"below 0", "below 1"} & set(counts)


def test_a_layer_that_no_gradient_reaches_is_named() -> None:
    model, batch = tiny_llama().requires_grad_(False), padded_batch("none")
    with AttentionTap(model, HeadSelection({0: [1], 1: [2]}), squares="selected") as tap:
        seen = model(**batch, output_hidden_states=True).hidden_states
        with pytest.raises(CaptureError, match=r"arrived at the attention of layers \[1\]"):
            tap.gradient_squares(seen[1].sum())


def test_nothing_of_q_and_k_is_alive_after_a_layer_ran() -> None:
    """Under checkpointing nobody else keeps them, so their memory is free as soon as the next layer runs."""
    model, batch = tiny_llama().requires_grad_(False).train(), padded_batch("none")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    alive: dict[int, list[StorageWeakRef]] = {}

    def observe(layer: int, call: Any) -> Tensor:
        others = [found for other, found in alive.items() if other != layer]
        assert all(tensor.expired() for found in others for tensor in found)
        # v is computed again with them.
        tensors = call.query, call.key, call.value, call.inputs.query, call.inputs.key
        alive[layer] = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        return call.rows()[0].detach()

    with AttentionTap(model, EVERY_HEAD, QUERIES, observe=observe, squares="selected") as tap:
        loss = label_loss(batch)(model(**batch).logits)
        assert set(alive) == set(EVERY_HEAD)
        assert all(tensor.expired() for found in alive.values() for tensor in found)
        assert min(squares.min() for squares in tap.gradient_squares(loss).values()) > 0
        del loss  # what the lowest layer computed again and nobody asked for is its graph's
        assert all(tensor.expired() for found in alive.values() for tensor in found)


# --- memory ---


def test_a_tapped_training_step_never_makes_a_square_tensor() -> None:
    """T x T appears neither in the model's own sdpa kernel (there is no padding) nor in what the tap adds."""
    length = 512
    model = with_lora(tiny_llama(max_position_embeddings=length)).train()
    input_ids = torch.randint(1, VOCABULARY, (1, length))
    teacher = torch.softmax(torch.randn(1, 2, 7, length), dim=-1)
    teacher[..., 20:] = 0  # seen by every query below
    rows = TeacherRows.from_dense(teacher / teacher.sum(dim=-1, keepdim=True), 8)
    queries = torch.tensor([[30, 100, 200, 300, 400, 500, -1]])
    with LargestOutput() as largest:
        heads = HeadSelection({1: [0, 5]})
        with AttentionTap(model, heads, queries, observe=lambda layer, call: call.row_kl(rows), keep_graph=True) as tap:
            (model(input_ids=input_ids).logits.square().mean() + tap.values[1]).backward()
    assert tap.values[1].item() > 0
    assert 2 * 7 * length <= largest.numel < length * length


# --- refusals ---


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({7: [0]}, r"layer 7 of the selection does not exist; the attention layers are 0\.\.2"),
        ({1: [0, 6]}, r"head 6 of layer 1 does not exist; the model has heads 0\.\.5"),
    ],
)
def test_a_selection_that_does_not_fit_the_model_is_refused(heads: dict[int, list[int]], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        AttentionTap(tiny_llama(), HeadSelection(heads))


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        (torch.tensor([[3, 19]] * 5), r"query position 19 is outside the batch, which has positions 0\.\.18"),
        (torch.tensor([-20, 3]), r"query position -20 is outside .* \(or -19\.\.-1 from the right\)"),
        (torch.tensor([[3, 4]] * 2), "queries are for 2 samples but the forward has 5"),
        (torch.tensor([[3, 4]]), "queries are for 1 samples but the forward has 5"),
    ],
)
def test_queries_that_do_not_fit_the_forward_are_refused(queries: Tensor, message: str) -> None:
    model = tiny_llama()
    with pytest.raises(CaptureError, match=message):
        tapped_rows(model, padded_batch("none"), SOME_HEADS, queries=queries)


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        (torch.tensor([[0.5]]), "float32 of shape \\(1, 1\\)"),
        (torch.zeros(1, 2, 3, dtype=torch.long), "int64 of shape \\(1, 2, 3\\)"),
        (torch.zeros(2, 0, dtype=torch.long), "int64 of shape \\(2, 0\\)"),
    ],
)
def test_queries_that_are_no_positions_are_refused(queries: Tensor, message: str) -> None:
    with pytest.raises(CaptureError, match=f"whole numbers of shape .*{message}"):
        AttentionTap(tiny_llama(), SOME_HEADS, queries=queries)


class HomemadeAttention(nn.Module):
    """Computes something without asking transformers which function to use."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        return hidden_states, None


def test_a_module_that_does_not_use_the_interface_is_refused() -> None:
    model = tiny_llama()
    model.model.layers[2].self_attn = HomemadeAttention(model.config, 2)
    before = snapshot(model)
    with pytest.raises(
        CaptureError, match=r"layer 2 \(HomemadeAttention\) .* without transformers' attention interface"
    ):
        tapped_rows(model, padded_batch("none"), SOME_HEADS)
    assert snapshot(model) == before
    # The other layers are still fine.
    assert tapped_rows(model, padded_batch("none"), HeadSelection({0: [1]})).keys() == {0}
