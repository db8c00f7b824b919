"""Gradients through and of what the tap captures, with and without activation checkpointing; memory; refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tapped import BUILDERS, EVERY_HEAD, QUERIES, SOME_HEADS, checkpointed, snapshot, tapped_rows
from support.teachers import all_heads_kl
from support.tiny_models import (
    N_HEADS,
    N_LAYERS,
    VOCABULARY,
    LargestOutput,
    padded_batch,
    tiny_llama,
    tiny_mistral,
    with_lora,
)
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from seekr_peft.attention import AttentionTap
from seekr_peft.attention.capture import AttentionCall
from seekr_peft.errors import CaptureError
from seekr_peft.heads import HeadSelection
from seekr_peft.sparse import SparseDistribution


def rows_loss(rows: dict[int, Tensor]) -> Tensor:
    """Some number that depends on every entry."""
    generator = torch.Generator().manual_seed(4)
    return torch.stack([(row * torch.randn(row.shape, generator=generator)).sum() for row in rows.values()]).sum()


def lora_gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def slow_row_loss(layer: int, call: AttentionCall) -> Tensor:
    return all_heads_kl(call, SparseDistribution.from_dense(torch.full_like(call.rows(), 1 / 19).detach(), 6))


# --- gradients and checkpointing ---


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
    dense = {layer: SparseDistribution.from_dense(rows) for layer, rows in teacher.items()}
    real = batch["attention_mask"].gather(1, QUERIES % 19)
    model, twin = tiny_llama(), tiny_llama("eager")
    with AttentionTap(model, SOME_HEADS, QUERIES, observe=lambda layer, call: all_heads_kl(call, dense[layer])) as tap:
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


# --- gradient norms ---


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
    rows = SparseDistribution.from_dense(teacher / teacher.sum(dim=-1, keepdim=True), 8)
    queries = torch.tensor([[30, 100, 200, 300, 400, 500, -1]])
    with LargestOutput() as largest:
        heads = HeadSelection({1: [0, 5]})
        with AttentionTap(
            model, heads, queries, observe=lambda layer, call: all_heads_kl(call, rows), keep_graph=True
        ) as tap:
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
