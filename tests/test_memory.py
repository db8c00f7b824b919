"""A task's memory on disk: what comes back, how much it takes, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.core_models import make_samples
from support.memories import SELECTION, make_signals, packed, pairs, write
from support.teachers import stored_signals
from support.tiny_models import VOCABULARY

from seekr_peft.config import SeekrConfig
from seekr_peft.errors import MemoryFormatError
from seekr_peft.heads import HeadSelection
from seekr_peft.memory import (
    ReplaySample,
    TaskMemory,
    TeacherQuality,
    TeacherSignals,
    draw_queries,
    estimate_bytes,
)
from seekr_peft.sparse import SparseDistribution, sparse_rows


def test_samples_of_different_length_come_back_as_they_were(tmp_path: Path) -> None:
    memory, samples, _ = write(tmp_path)
    assert len(memory) == 4 and len({len(sample.input_ids) for sample in samples}) > 1
    for i, sample in enumerate(samples):
        back = memory.sample(i)
        for name in ("input_ids", "labels", "queries"):
            assert torch.equal(getattr(back, name), getattr(sample, name)) and getattr(back, name).dtype == torch.int64


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
    assert stored_signals(memory, 1) == TeacherSignals({}, None)


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
    row = SparseDistribution.from_dense(torch.rand(heads, length, length).softmax(-1), 64)
    selection = HeadSelection({0: range(heads)})
    memory = TaskMemory.write(
        tmp_path, "a", samples, packed([TeacherSignals({0: row}, None)], selection) * n, selection
    )
    memory = TaskMemory(tmp_path)
    assert memory.bytes > 64e6
    before = resident_bytes()
    signals = stored_signals(memory, n // 2)
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
