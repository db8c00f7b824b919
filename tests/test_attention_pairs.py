"""Samples with heads of their own in one forward: each pair's rows, loss and gradient."""

from __future__ import annotations

import pytest
import torch
from support.tapped import BUILDERS, QUERIES, families, paddings, tapped_rows
from support.tiny_models import (
    padded_batch,
)
from torch import Tensor

from seekr_peft.attention import AttentionTap
from seekr_peft.attention.capture import AttentionCall, InterfaceCall, QuerySelection
from seekr_peft.attention.pairs import HeadPairs
from seekr_peft.heads import HeadSelection
from seekr_peft.sparse import SparseDistribution


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


# --- samples with heads of their own ---


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
    stored = {layer: SparseDistribution.from_dense(rows[None]) for layer, rows in teacher.items()}
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
    found = call.pair_kl(pairs, SparseDistribution.from_dense(teacher), weights)
    torch.testing.assert_close(found, slow, rtol=1e-9, atol=0)
    for one, other in zip(
        torch.autograd.grad(found, (query, key)), torch.autograd.grad(slow, (query, key)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
