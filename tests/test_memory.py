"""Replay memory: which samples and queries are kept, the file they are kept in, the order and the batches of replay."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.core_models import make_dataset, make_samples
from support.tiny_models import VOCABULARY, tiny_llama
from torch import Tensor

from seekr_peft.attention import AttentionTap, TeacherRows
from seekr_peft.attention.row_math import sparse_rows
from seekr_peft.config import SeekrConfig
from seekr_peft.errors import DataError, MemoryFormatError
from seekr_peft.heads import HeadSelection
from seekr_peft.losses import TeacherDistributions
from seekr_peft.memory import (
    PackedSignals,
    ReplayMemory,
    ReplaySample,
    TaskMemory,
    TeacherQuality,
    TeacherSignals,
    choose_queries,
    choose_samples,
    collate,
    draw_queries,
    estimate_bytes,
    replay_count,
)
from seekr_peft.memory.batch import ReplayBatch
from seekr_peft.memory.samples import select_first, select_random

SELECTION = HeadSelection({0: [1, 4], 2: [0, 3, 5]})


def make_signals(
    samples: list[ReplaySample],
    selection: HeadSelection = SELECTION,
    row_top_k: int = 99,
    logit_top_k: int = VOCABULARY,
    seed: int = 0,
) -> list[TeacherSignals]:
    """Random teachers: causal rows, so that trailing keys have probability 0, and peaked distributions."""
    generator = torch.Generator().manual_seed(seed)
    signals = []
    for sample in samples:
        length, n_queries = len(sample.input_ids), len(sample.queries)
        rows = {}
        for layer, heads in selection.items():
            logits = 2 * torch.randn(len(heads), n_queries, length, generator=generator)
            future = torch.arange(length) > sample.queries[:, None]
            rows[layer] = TeacherRows.from_dense(logits.masked_fill(future, float("-inf")).softmax(-1), row_top_k)
        n_answer = int((sample.labels[1:] != -100).sum())
        logits = 2 * torch.randn(n_answer, VOCABULARY, generator=generator)
        signals.append(
            TeacherSignals(rows, TeacherDistributions.from_logits(logits, logit_top_k) if logit_top_k else None)
        )
    return signals


def packed(signals: list[TeacherSignals], selection: HeadSelection, dtype: Any = "uint8") -> list[PackedSignals]:
    return [PackedSignals.of(signal, selection, dtype) for signal in signals]


def write(directory: Path, n: int = 4, dtype: str = "float32", **options: Any) -> tuple[TaskMemory, list, list]:
    samples = make_samples(n)
    signals = make_signals(samples, **options)
    quality = TeacherQuality(0.25, 0.5, True)
    memory = TaskMemory.write(directory, "task", samples, packed(signals, SELECTION, dtype), SELECTION, quality)
    return memory, samples, signals


# Which samples --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_train", "ratio", "kept"),
    [(600, 0.01, 6), (5000, 0.01, 50), (30, 0.01, 1), (1, 0.5, 1), (7, 1.0, 7), (10, 0.25, 2)],
)
def test_the_replay_ratio_is_rounded_and_keeps_at_least_one_sample(n_train: int, ratio: float, kept: int) -> None:
    assert replay_count(n_train, ratio) == kept


@given(st.integers(1, 10**5), st.floats(1e-6, 1.0))
def test_never_more_samples_are_kept_than_there_are(n_train: int, ratio: float) -> None:
    assert 1 <= replay_count(n_train, ratio) <= n_train


def test_the_random_choice_is_sorted_without_repeats_and_seeded() -> None:
    dataset = range(600)
    drawn = select_random(dataset, 40, seed=5)
    assert drawn == sorted(set(drawn)) and len(drawn) == 40 and drawn[0] >= 0 and drawn[-1] < 600
    assert drawn == select_random(dataset, 40, seed=5)
    assert len({tuple(select_random(dataset, 40, seed)) for seed in range(30)}) == 30


def test_the_random_choice_is_not_the_first_samples() -> None:
    assert select_first(range(600), 6, seed=5) == [0, 1, 2, 3, 4, 5]
    counts = Counter(index < 300 for seed in range(50) for index in select_random(range(600), 6, seed))
    assert 100 < counts[True] < 200


@given(st.integers(1, 300), st.one_of(st.none(), st.integers(1, 400)), st.integers(0, 10**6))
def test_queries_are_sorted_positions_of_the_sample_and_within_the_budget(
    length: int, budget: int | None, seed: int
) -> None:
    queries = draw_queries(length, budget, seed)
    assert len(queries) == (length if budget is None else min(length, budget))
    assert torch.equal(queries, queries.unique()) and queries[0] >= 0 and queries[-1] < length
    assert torch.equal(queries, draw_queries(length, budget, seed))


def test_chosen_samples_are_those_of_the_dataset_and_each_has_its_own_queries() -> None:
    dataset = [{"input_ids": [i] * 40, "labels": [-100] * 39 + [i]} for i in range(100)]
    samples = choose_samples(dataset, 0.1, query_budget=7, seed=3)
    assert [int(sample.input_ids[0]) for sample in samples] == select_random(dataset, 10, 3)
    assert all(len(sample.queries) == 7 and sample.labels[-1] == sample.input_ids[0] for sample in samples)
    assert len({tuple(sample.queries.tolist()) for sample in samples}) == 10
    again = choose_samples(dataset, 0.1, query_budget=7, seed=3)
    assert all(torch.equal(a.queries, b.queries) for a, b in zip(samples, again, strict=True))


@given(st.data())
def test_the_rows_that_the_answer_comes_from_are_drawn_before_any_other(data: st.DataObject) -> None:
    length = data.draw(st.integers(2, 60))
    budget, seed = data.draw(st.integers(1, 70)), data.draw(st.integers(0, 10**6))
    answered = data.draw(st.sets(st.integers(1, length - 1), min_size=1))
    labels = torch.tensor([5 if position in answered else -100 for position in range(length)])
    queries = choose_queries(labels, budget, seed, "answer")
    assert torch.equal(queries, queries.unique()) and len(queries) == min(budget, length)
    predicting = {position - 1 for position in answered}
    assert len(predicting & set(queries.tolist())) == min(budget, len(predicting))
    assert torch.equal(choose_queries(labels, budget, seed, "random"), draw_queries(length, budget, seed))


def test_which_rows_are_drawn_is_a_setting_of_the_samples() -> None:
    dataset = [{"input_ids": [1] * 40, "labels": [-100] * 37 + [1, 1, 1]} for _ in range(10)]
    chosen = choose_samples(dataset, 1.0, query_budget=5, seed=3, query_choice="answer")
    assert all({36, 37, 38} <= set(sample.queries.tolist()) and len(sample.queries) == 5 for sample in chosen)
    assert len({tuple(sample.queries.tolist()) for sample in chosen}) > 5


def test_padding_is_dropped_from_a_padded_dataset() -> None:
    item = {
        "input_ids": [0, 0, 5, 6, 7, 0],
        "labels": [-100, -100, -100, 6, 7, -100],
        "attention_mask": [0, 0, 1, 1, 1, 0],
    }
    (sample,) = choose_samples([item], 1.0, None, seed=0)
    assert sample.input_ids.tolist() == [5, 6, 7]
    assert sample.labels.tolist() == [-100, 6, 7]
    assert sample.queries.tolist() == [0, 1, 2]


def test_any_function_may_choose_the_samples() -> None:
    dataset = make_dataset(20)
    samples = choose_samples(dataset, 0.1, None, seed=0, selector=lambda data, count, seed: [len(data) - 1, 3][:count])
    assert [sample.input_ids.tolist() for sample in samples] == [dataset[19]["input_ids"], dataset[3]["input_ids"]]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "replay_from is empty"),
        (iter([]), "replay_from is a list_iterator, of which no samples can be drawn"),
        ([3, 4], "sample 0 of replay_from is a int; it must be a mapping"),
        ([{"prompt": "a", "answer": "b"}], r"has no 'input_ids' \(it has answer, prompt\)"),
        ([{"input_ids": [1, 2]}], "has no 'labels'"),
        (
            [{"input_ids": [1, 2], "labels": [-100, 2, 3]}],
            "sample 0 of replay_from has 2 input_ids and 3 labels; give one",
        ),
        (
            [{"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1]}],
            "sample 0 of replay_from has 2 input_ids and 1 attention_mask; give one for each token",
        ),
        ([{"input_ids": [1, 2, 3], "labels": [-100] * 3}], "sample 0 of replay_from has no answer token"),
        ([{"input_ids": [1, 2, 3], "labels": [1, -100, -100]}], "has no answer token"),
    ],
)
def test_a_dataset_that_cannot_be_replayed_is_refused(dataset: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        choose_samples(dataset, 0.5, None, seed=0)


# The file -------------------------------------------------------------------------------------------------------


def test_samples_of_different_length_come_back_as_they_were(tmp_path: Path) -> None:
    memory, samples, _ = write(tmp_path)
    assert len(memory) == 4 and len({len(sample.input_ids) for sample in samples}) > 1
    for i, sample in enumerate(samples):
        back = memory.sample(i)
        for name in ("input_ids", "labels", "queries"):
            assert torch.equal(getattr(back, name), getattr(sample, name)) and getattr(back, name).dtype == torch.int64


def dense(indices: Tensor, probabilities: Tensor, size: int) -> Tensor:
    """(..., size) rows, absent entries and everything else 0."""
    return torch.zeros(*indices.shape[:-1], size).scatter_add(-1, indices, probabilities.float())


def pairs(memory: TaskMemory, samples: list, signals: list) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Dense rows read and written, remaining mass read and written, of every layer and of the logits."""
    for i, (sample, signal) in enumerate(zip(samples, signals, strict=True)):
        back = memory.signals(i)
        assert set(back.rows) == {0, 2}
        length = len(sample.input_ids)
        both = [(back.rows[layer], signal.rows[layer], length) for layer in signal.rows]
        for found, stored, size in [*both, (back.logits, signal.logits, VOCABULARY)]:
            yield (
                dense(found.indices, found.probabilities, size),
                dense(stored.indices, stored.probabilities, size),
                found.remaining,
                stored.remaining.float(),
            )


def test_teachers_come_back_exactly_in_float32_when_k_covers_everything(tmp_path: Path) -> None:
    memory, samples, signals = write(tmp_path)
    assert memory.selection == SELECTION
    for found, stored, remaining, _ in pairs(memory, samples, signals):
        # A few units in the last place below 1: the masses are divided by their sum.
        torch.testing.assert_close(found, stored, rtol=0, atol=1e-6)
        assert not remaining.any()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("uint8", 0.05)])
def test_few_entries_in_few_bits_keep_their_values_and_a_mass_of_one(
    tmp_path: Path, dtype: str, tolerance: float
) -> None:
    memory, samples, signals = write(tmp_path, dtype=dtype, row_top_k=4, logit_top_k=6)
    most = 0.0
    for found, stored, remaining, stored_remaining in pairs(memory, samples, signals):
        torch.testing.assert_close(found, stored, rtol=tolerance, atol=1e-6)
        torch.testing.assert_close(remaining, stored_remaining, rtol=1e-3, atol=1e-3)
        mass = found.sum(-1) + remaining
        torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-6)
        most = max(most, float(remaining.max()))
    assert most > 0.1, "some mass must be left over, or nothing was cut"


def test_what_the_teacher_was_worth_and_further_fields_are_in_the_header(tmp_path: Path) -> None:
    samples = make_samples(2)
    quality = TeacherQuality(0.25, 0.5, True)
    memory = TaskMemory.write(tmp_path, "a", samples, quality=quality, header={"row_top_k": 64})
    assert memory.quality == quality
    header = json.loads((tmp_path / "memory.json").read_text())
    assert header["row_top_k"] == 64 and header["n_samples"] == 2 and header["selection"] is None
    assert header["bytes"] == memory.bytes == (tmp_path / "memory.safetensors").stat().st_size


def test_a_memory_without_teacher_has_samples_only(tmp_path: Path) -> None:
    memory = TaskMemory.write(tmp_path, "a", make_samples(2))
    assert memory.quality is None and memory.selection == HeadSelection({})
    assert memory.signals(1) == TeacherSignals({}, None)


def test_a_sample_that_does_not_exist_is_an_index_error(tmp_path: Path) -> None:
    memory, _, _ = write(tmp_path)
    for index in (-1, 4):
        with pytest.raises(IndexError, match=f"samples 0..3, got {index}"):
            memory.sample(index)


def test_reading_a_sample_of_a_large_file_reads_only_its_own_bytes(tmp_path: Path) -> None:
    # Large beside the 2 MB that the kernel may map at once for each of the five arrays that one sample touches.
    n, length, heads = 256, 256, 8
    labels = torch.full((length,), -100)
    labels[-1] = 1
    samples = [ReplaySample(torch.ones(length, dtype=torch.long), labels, torch.arange(length)) for _ in range(n)]
    row = TeacherRows.from_dense(torch.rand(heads, length, length).softmax(-1), 64)
    selection = HeadSelection({0: range(heads)})
    memory = TaskMemory.write(
        tmp_path, "a", samples, packed([TeacherSignals({0: row}, None)], selection) * n, selection
    )
    memory = TaskMemory(tmp_path)
    assert memory.bytes > 64e6
    before = resident_bytes()
    signals = memory.signals(n // 2)
    grown = resident_bytes() - before
    assert signals.rows[0].probabilities.shape == (heads, length, 64)
    assert grown < memory.bytes / 3, f"reading one sample of {n} grew the process by {grown / 1e6:.0f} MB"


def resident_bytes() -> int:
    """Resident memory of this process, file pages included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize(
    ("n", "row_top_k", "logit_top_k", "dtype"),
    [
        (1, 99, VOCABULARY, "float32"),
        (4, 4, 8, "float16"),
        (4, 4, 0, "uint8"),
        (16, 99, 8, "uint8"),
        (40, 6, VOCABULARY, "float32"),
    ],
)
def test_the_estimate_before_anything_is_computed_is_within_five_per_cent_and_never_too_small(
    tmp_path: Path, n: int, row_top_k: int, logit_top_k: int, dtype: str
) -> None:
    """Of rows as broad as they can be; ``row_top_k`` here is each row's own."""
    samples = make_samples(n)
    signals = make_signals(samples, row_top_k=99, logit_top_k=logit_top_k)
    if row_top_k < 99:
        dense = [{layer: rows.probabilities for layer, rows in signal.rows.items()} for signal in signals]
        signals = [replace(s, rows=sparse_rows(rows, row_top_k)) for s, rows in zip(signals, dense, strict=True)]
    memory = TaskMemory.write(tmp_path, "task", samples, packed(signals, SELECTION, dtype), SELECTION)
    estimate = estimate_bytes(samples, SELECTION.n_heads, row_top_k, logit_top_k, VOCABULARY, dtype)
    assert memory.bytes <= estimate <= 1.05 * memory.bytes


def test_the_estimate_holds_for_samples_alone(tmp_path: Path) -> None:
    samples = make_samples(6)
    memory = TaskMemory.write(tmp_path, "a", samples)
    assert abs(estimate_bytes(samples, 0, 64, 0, VOCABULARY) - memory.bytes) < 0.05 * memory.bytes


@pytest.mark.parametrize("vocabulary", [32_000, 152_000])
def test_a_sample_of_a_7b_model_takes_less_than_a_megabyte(vocabulary: int) -> None:
    """1024 tokens, 128 heads, 100 queries: 12,800 rows of 2 x 32 + 4 bytes at most, 10 answers of 3 x 1024 + 4."""
    labels = torch.full((1024,), -100)
    labels[-10:] = 1
    sample = ReplaySample(torch.ones(1024, dtype=torch.long), labels, draw_queries(1024, 100, seed=0))
    config = SeekrConfig()
    estimate = estimate_bytes([sample], 128, config.row_top_k, config.logit_top_k, vocabulary, config.storage_dtype)
    assert estimate == pytest.approx(12_800 * 68 + 1024 * 8 + 10 * (3 * 1024 + 4), rel=0.03)
    assert estimate < 1e6


@pytest.mark.parametrize("name", ["memory.safetensors", "memory.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(MemoryFormatError, match=name):
        TaskMemory(tmp_path)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("name", ["memory.safetensors", "memory.json"])
def test_a_file_that_is_cut_off_is_named(tmp_path: Path, name: str, kept: float) -> None:
    write(tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(kept * len(whole)) - 2 if kept > 0.9 else int(kept * len(whole))])
    with pytest.raises(MemoryFormatError, match=name):
        TaskMemory(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "memory.json has format 99, this version reads format 3"),
        ({"format": None}, "memory.json has format None"),
        ({"task": ...}, "memory.json has no 'task'"),
        ({"n_samples": ...}, "memory.json has no 'n_samples'"),
        ({"n_samples": 9}, "memory.safetensors holds 4 samples but memory.json says 9"),
        ({"teacher": None}, "memory.json has no 'teacher'"),
        ({"teacher": {}}, "memory.json has no 'teacher'"),
        ({"selection": "x"}, "memory.json: selection is 'x', no heads by layer"),
        ({"selection": {"0": [-1]}}, "memory.json: selection is {'0': .*no heads by layer"),
        ({"selection": {"1": [0]}}, r"memory.safetensors holds \d+ attention rows but the selection .* asks for \d+"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    write(tmp_path)
    path = tmp_path / "memory.json"
    header = {key: value for key, value in {**json.loads(path.read_text()), **change}.items() if value is not ...}
    path.write_text(json.dumps(header))
    with pytest.raises(MemoryFormatError, match=message):
        TaskMemory(tmp_path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("token_offsets", lambda offsets: offsets * 100),
        ("query_offsets", lambda offsets: offsets - 1),
        ("answer_offsets", lambda offsets: offsets[:-1]),
        ("rows.gap_offsets", lambda offsets: offsets.flip(0)),
        ("logits.value_offsets", lambda offsets: offsets[[0, 2, 1, 3, 4]]),
        ("labels", lambda labels: labels[:-1]),
        ("rows.values", lambda values: values[:-1]),
        ("logits.sizes", lambda sizes: sizes[:-1]),
    ],
)
def test_numbers_that_do_not_fit_their_offsets_are_refused(tmp_path: Path, name: str, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    write(tmp_path)
    tensors = load_file(tmp_path / "memory.safetensors")
    save_file({**tensors, name: change(tensors[name]).contiguous()}, tmp_path / "memory.safetensors")
    with pytest.raises(MemoryFormatError, match=r"memory\.safetensors is damaged \(.* do not divide the \d+ numbers"):
        TaskMemory(tmp_path)


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    write(tmp_path)
    save_file({"weight": torch.zeros(3)}, tmp_path / "memory.safetensors")
    with pytest.raises(MemoryFormatError, match="has no tensor 'answer_offsets'"):
        TaskMemory(tmp_path)


# The order ------------------------------------------------------------------------------------------------------


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


def drawn(memory: ReplayMemory, batch_size: int, n_batches: int, seed: int = 0) -> list[list[int]]:
    stream = memory.stream(batch_size, seed)
    return [next(stream).input_ids[:, 0].tolist() for _ in range(n_batches)]


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


# The batch ------------------------------------------------------------------------------------------------------

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


# Numbers that are none of ours ------------------------------------------------------------------------------------


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
