"""Replay batches: the order in which samples come, and what a padded batch holds."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.core_models import make_samples
from support.memories import SELECTION, drawn, make_signals, write
from support.tiny_models import VOCABULARY, tiny_llama

from seekr_peft.attention import AttentionTap
from seekr_peft.errors import MemoryFormatError
from seekr_peft.heads import HeadSelection
from seekr_peft.memory import (
    ReplayMemory,
    ReplaySample,
    TaskMemory,
    collate,
)
from seekr_peft.memory.batch import ReplayBatch


def memory_of(tmp_path: Path, sizes: tuple[int, ...]) -> ReplayMemory:
    """Tasks whose samples can be told apart: every token of task t, sample i is 10 t + i + 1."""
    tasks = []
    for t, size in enumerate(sizes):
        samples = [
            ReplaySample(torch.full((5,), 10 * t + i + 1), torch.tensor([-100] * 4 + [1]), torch.arange(5))
            for i in range(size)
        ]
        tasks.append(TaskMemory.write(tmp_path / str(t), f"task{t}", samples))
    return ReplayMemory(tasks)


@pytest.mark.parametrize(("sizes", "batch_size"), [((3, 4), 2), ((3, 4), 7), ((2, 1), 8), ((6,), 4), ((1,), 1)])
def test_every_sample_is_replayed_equally_often(tmp_path: Path, sizes: tuple[int, ...], batch_size: int) -> None:
    memory = memory_of(tmp_path, sizes)
    n, size = sum(sizes), min(batch_size, sum(sizes))
    counts = Counter(token for batch in drawn(memory, batch_size, n_batches=3 * n) for token in batch)
    assert counts == {10 * t + i + 1: 3 * size for t, count in enumerate(sizes) for i in range(count)}


def test_the_order_is_that_of_its_seed_and_changes_from_pass_to_pass(tmp_path: Path) -> None:
    memory = memory_of(tmp_path, (6, 6))
    first = drawn(memory, 12, 4, seed=1)
    assert first == drawn(memory, 12, 4, seed=1) != drawn(memory, 12, 4, seed=2)
    assert len({tuple(batch) for batch in first}) == 4
    assert all(sorted(batch) == sorted(first[0]) for batch in first)


def test_an_empty_memory_streams_nothing() -> None:
    assert list(ReplayMemory().stream(4, 0)) == [] and len(ReplayMemory()) == 0


def test_a_memory_never_holds_a_task_that_was_not_added(tmp_path: Path) -> None:
    memory = memory_of(tmp_path, (3, 4, 5))
    two = ReplayMemory(memory.tasks[:2])
    assert len(two) == 7 and max(token for batch in drawn(two, 3, 30) for token in batch) < 20
    two.add(memory.tasks[2])
    assert len(two) == 12 and max(token for batch in drawn(two, 3, 30) for token in batch) > 20
    assert two.bytes == sum(task.bytes for task in memory.tasks) > 0


def test_the_memory_of_a_run_is_opened_in_the_order_of_its_directories(tmp_path: Path) -> None:
    memory_of(tmp_path, (3, 4))
    memory = ReplayMemory.open([tmp_path / "0", tmp_path / "1"])
    assert [task.name for task in memory.tasks] == ["task0", "task1"]
    with pytest.raises(MemoryFormatError, match=r"7.memory\.json"):
        ReplayMemory.open([tmp_path / "7"])


SELECTIONS = [SELECTION, HeadSelection({0: [0, 1, 2], 1: [5]}), HeadSelection({1: [3, 5]})]


BUDGETS = [5, 3, None]


def mixed_batch(row_top_k: int = 99, logit_top_k: int = VOCABULARY) -> tuple[ReplayBatch, list[ReplayBatch]]:
    """One sample of each of three tasks, with other heads, lengths and numbers of queries; joined and each alone."""
    samples = [make_samples(1, seed=seed, budget=budget)[0] for seed, budget in enumerate(BUDGETS)]
    signals = [
        make_signals([sample], selection, row_top_k, logit_top_k, seed=i)[0]
        for i, (sample, selection) in enumerate(zip(samples, SELECTIONS, strict=True))
    ]
    assert len({len(sample.input_ids) for sample in samples}) == 3
    alone = [collate([s], [h], [t]) for s, h, t in zip(samples, SELECTIONS, signals, strict=True)]
    return collate(samples, SELECTIONS, signals), alone


def test_a_batch_is_padded_on_the_right_and_taps_the_union_of_the_heads() -> None:
    batch, alone = mixed_batch()
    lengths = [part.input_ids.shape[1] for part in alone]
    assert batch.attention_mask.tolist() == [[1] * n + [0] * (max(lengths) - n) for n in lengths]
    assert batch.heads == HeadSelection({0: [0, 1, 2, 4], 1: [3, 5], 2: [0, 3, 5]})
    for i, part in enumerate(alone):
        assert torch.equal(batch.input_ids[i, : lengths[i]], part.input_ids[0])
        assert torch.equal(batch.labels[i, : lengths[i]], part.labels[0])
        assert (batch.labels[i, lengths[i] :] == -100).all()
        assert (batch.input_ids[i, lengths[i] :] == 0).all()


def test_a_layer_holds_each_samples_own_heads_and_no_others() -> None:
    """Selections: {0: [1, 4], 2: [0, 3, 5]} and so on; by hand, the pairs of a sample and a head."""
    batch, alone = mixed_batch()
    expected = {
        layer: [(i, head) for i, chosen in enumerate(SELECTIONS) for head in chosen.get(layer, ())]
        for layer in range(3)
    }
    for layer, teacher in batch.layers.items():
        pairs = teacher.pairs
        assert list(zip(pairs.samples.tolist(), pairs.heads.tolist(), strict=True)) == expected[layer]
        assert [batch.heads[layer][slot] for slot in pairs.slots] == pairs.heads.tolist()
        assert pairs.counts == tuple(len(chosen.get(layer, ())) for chosen in SELECTIONS)
        assert pairs.starts.tolist() == [0, *itertools.accumulate(pairs.counts)]
        for place, (i, head) in enumerate(expected[layer]):
            own = alone[i].layers[layer]
            found, k = teacher.rows.probabilities[0, place], own.rows.probabilities.shape[-1]
            assert torch.equal(found[: BUDGETS[i], :k], own.rows.probabilities[0, SELECTIONS[i][layer].index(head)])
            assert not found[:, k:].any()


def test_what_a_batch_holds_depends_on_the_number_of_heads_and_not_on_which() -> None:
    samples = make_samples(4, budget=5)
    same = [HeadSelection({0: [1, 4]})] * 4
    own = [
        HeadSelection({0: [0, 1]}),
        HeadSelection({0: [2, 3]}),
        HeadSelection({1: [2, 5]}),
        HeadSelection({2: [3, 4]}),
    ]

    def size(selections: list[HeadSelection]) -> int:
        signals = [make_signals([s], h, 99, 0)[0] for s, h in zip(samples, selections, strict=True)]
        return sum(
            teacher.rows.probabilities.numel() for teacher in collate(samples, selections, signals).layers.values()
        )

    assert size(same) == size(own) > 0


def test_the_weights_of_all_layers_sum_to_one_and_each_sample_has_an_equal_part() -> None:
    batch, _ = mixed_batch()
    per_sample = torch.zeros(3)
    for teacher in batch.layers.values():
        per_sample.index_add_(0, teacher.pairs.samples, teacher.weights[0].sum(dim=1))
    torch.testing.assert_close(per_sample, torch.full((3,), 1 / 3), rtol=1e-6, atol=0)
    # Sample 0: 2 layers, 2 heads in layer 0, 5 queries.
    first = batch.layers[0].weights[0, 0]
    torch.testing.assert_close(first, torch.zeros_like(first).index_fill_(0, torch.arange(5), 1 / (3 * 2 * 2 * 5)))


def attention_loss(model: Any, batch: ReplayBatch) -> torch.Tensor:
    def observe(layer: int, call: Any) -> torch.Tensor:
        teacher = batch.layers[layer]
        return call.pair_kl(teacher.pairs, teacher.rows, teacher.weights)

    with AttentionTap(model, batch.heads, batch.queries, observe=observe) as tap:
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        return torch.stack(list(tap.values.values())).sum()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("row_top_k", [99, 3])
def test_the_loss_of_a_mixed_batch_is_the_mean_of_each_samples_own(attention: str, row_top_k: int) -> None:
    model = tiny_llama(attention).requires_grad_(False)
    batch, alone = mixed_batch(row_top_k)
    losses = torch.stack([attention_loss(model, part) for part in alone])
    assert losses.min() > 0.1 and losses.max() > 1.1 * losses.min()
    torch.testing.assert_close(attention_loss(model, batch), losses.mean(), rtol=1e-5, atol=0)


def test_the_loss_of_one_sample_is_a_plain_mean_over_heads_queries_and_layers() -> None:
    model = tiny_llama("eager").requires_grad_(False)
    (sample,), selection = make_samples(1), SELECTION
    (signal,) = make_signals([sample])
    weights = model(input_ids=sample.input_ids[None], output_attentions=True).attentions
    layers = []
    for layer, heads in selection.items():
        kls = []
        for i, head in enumerate(heads):
            for j, query in enumerate(sample.queries.tolist()):
                teacher = signal.rows[layer].probabilities[i, j, : query + 1].double()
                student = weights[layer][0, head, query, : query + 1].double()
                kls.append((teacher * (teacher / student).log()).sum())
        layers.append(torch.stack(kls).mean())
    expected = torch.stack(layers).mean()
    loss = attention_loss(model, collate([sample], [selection], [signal]))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_logits_are_joined_in_order_and_dropped_when_a_sample_has_none() -> None:
    batch, alone = mixed_batch(logit_top_k=7)
    assert torch.equal(batch.logits.indices, torch.cat([part.logits.indices for part in alone]))
    assert torch.equal(batch.logits.remaining, torch.cat([part.logits.remaining for part in alone]))
    samples = make_samples(2)
    with_logits, without = make_signals(samples)[0], make_signals(samples, logit_top_k=0)[1]
    assert collate(samples, [SELECTION] * 2, [with_logits, without]).logits is None


def test_a_batch_moves_as_a_whole() -> None:
    batch, _ = mixed_batch()
    moved = batch.to(torch.device("meta"))
    tensors = [moved.input_ids, moved.attention_mask, moved.labels, moved.queries]
    tensors += [moved.logits.indices, moved.logits.probabilities, moved.logits.remaining]
    for teacher in moved.layers.values():
        tensors += [teacher.weights, teacher.rows.indices, teacher.rows.probabilities, teacher.rows.remaining]
        tensors += [teacher.pairs.samples, teacher.pairs.heads, teacher.pairs.slots, teacher.pairs.starts]
    assert all(tensor.device.type == "meta" for tensor in tensors) and len(tensors) == 31


def test_a_memory_on_disk_gives_the_same_batch_as_its_samples(tmp_path: Path) -> None:
    task, samples, signals = write(tmp_path)
    batch = ReplayMemory([task]).batch([(0, 2), (0, 0)], pad_token_id=9)
    expected = collate([samples[2], samples[0]], [SELECTION] * 2, [signals[2], signals[0]], 9)
    assert torch.equal(batch.input_ids, expected.input_ids) and (batch.input_ids == 9).any()
    for layer in SELECTION:
        assert torch.equal(batch.layers[layer].weights, expected.layers[layer].weights)


TAMPERED = {
    "token ids out of the vocabulary": ("input_ids", 3, 512),
    "negative token ids": ("input_ids", 0, -1),
    "labels out of the vocabulary": ("labels", -1, 512),
    "queries out of the sample": ("queries", 0, 30000),
    "keys out of the sample": ("rows.gaps", 0, 250),
    "shares above 1": ("rows.remaining", 0, 7.0),
    "no number": ("rows.remaining", 0, float("nan")),
    "answers out of the vocabulary": ("logits.gaps", 0, 30000),
}


@pytest.mark.parametrize("what", list(TAMPERED))
def test_numbers_out_of_bounds_are_refused_by_sample(what: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    name, place, value = TAMPERED[what]
    memory, _, _ = write(tmp_path)
    memory.check_values(VOCABULARY)
    path = tmp_path / "memory.safetensors"
    tensors = load_file(path)
    tensors[name][place] = value
    del memory
    save_file(tensors, path)
    with pytest.raises(MemoryFormatError, match=r"memory\.safetensors is damaged \(.* of sample \d+\)"):
        TaskMemory(tmp_path).check_values(VOCABULARY)
