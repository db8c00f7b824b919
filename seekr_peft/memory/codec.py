"""Sparse distributions packed into few bytes: two for an entry of an attention row and three for one of the logits
in the default coding.

A row of a ``SparseDistribution`` is a handful of (index, probability) entries and one remaining mass. Rows differ in
their number of entries, so their entries lie behind one another in flat arrays. Pure tensor code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..sparse import SparseDistribution

StorageDtype = Literal["uint8", "float16", "float32"]

LOG_STEP = 12 / 255
"""Step of the 8-bit log-probabilities (nats): from 1 down to e^-12 = 6e-6; what is smaller joins the remaining mass.

Rounding costs a KL of about LOG_STEP^2 / 24 = 1e-4 nats, far below what the entries left out cost."""

_VALUES = {"uint8": torch.uint8, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class PackedRows:
    """``sizes`` int16 | int32 (rows,), places of ``gaps`` that each row takes; ``gaps`` uint8 | int16 (places,), the
    distances between a row's sorted indices; ``values`` (entries,), the probabilities in the storage dtype;
    ``remaining`` (rows,).

    The largest number of the gaps' type, 255 or 32,767, adds itself and is followed by more; a smaller one ends an
    entry."""

    sizes: Tensor
    gaps: Tensor
    values: Tensor
    remaining: Tensor

    def to(self, device: torch.device) -> PackedRows:
        """Move; a tenth of what the rows themselves take."""
        return PackedRows(*(part.to(device) for part in (self.sizes, self.gaps, self.values, self.remaining)))


def pack(rows: SparseDistribution, storage_dtype: StorageDtype, gap_dtype: torch.dtype) -> PackedRows:
    """Pack ``rows``, of any shape, one behind the other. ``gap_dtype``: uint8 where indices lie close together (keys),
    int16 where not (vocabularies)."""
    rows = rows.reshape(-1)
    kept, remaining = rows.probabilities.float(), rows.remaining.float()
    if storage_dtype == "uint8":
        dropped = (kept > 0) & (kept < math.exp(-255.5 * LOG_STEP))
        remaining = remaining + torch.where(dropped, kept, 0).sum(dim=-1)
        kept = torch.where(dropped, 0, kept)
    present = kept > 0
    # Absent entries sort behind every index, so that the present ones of a row stand side by side in order.
    order = torch.where(present, rows.indices, torch.iinfo(torch.int64).max).argsort(dim=-1)
    present, kept = present.gather(-1, order), kept.gather(-1, order)
    indices, counts = rows.indices.gather(-1, order)[present], present.sum(dim=-1)
    values = _encode_values(kept[present], storage_dtype)
    mass_dtype = torch.float32 if storage_dtype == "float32" else torch.float16
    gaps, sizes = _encode_gaps(indices, counts, gap_dtype)
    return PackedRows(_small(sizes), gaps, values, remaining.to(mass_dtype))


def unpack(packed: PackedRows) -> SparseDistribution:
    """The rows again, (rows, k) float32, entries in order of their index, padded with absent ones to the longest row.

    The probabilities are scaled so that they and the remaining mass sum to 1 again."""
    indices, counts = _decode_gaps(packed.gaps, packed.sizes.long())
    row = torch.repeat_interleave(counts, output_size=len(indices))
    starts = counts.cumsum(0) - counts
    column = torch.arange(len(indices), device=row.device) - starts[row]
    shape = (len(counts), max(1, int(counts.max()) if len(counts) else 1))
    padded_indices, kept = row.new_zeros(shape), packed.remaining.new_zeros(shape, dtype=torch.float32)
    padded_indices[row, column] = indices
    kept[row, column] = _decode_values(packed.values)
    remaining = packed.remaining.float()
    # Rounding moved the sum off 1; the remaining mass is the more exact of the two.
    total = kept.sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return SparseDistribution(padded_indices, kept * ((1 - remaining) / total)[:, None], remaining)


def value_bytes(storage_dtype: StorageDtype) -> int:
    """Bytes of one stored probability."""
    return _VALUES[storage_dtype].itemsize


def mass_bytes(storage_dtype: StorageDtype) -> int:
    """Bytes of one stored remaining mass."""
    return 4 if storage_dtype == "float32" else 2


def _encode_values(values: Tensor, storage_dtype: StorageDtype) -> Tensor:
    if storage_dtype == "uint8":
        return (-values.log() / LOG_STEP).round().clamp(0, 255).to(torch.uint8)
    return values.to(_VALUES[storage_dtype])


def _decode_values(values: Tensor) -> Tensor:
    return torch.exp(values.float() * -LOG_STEP) if values.dtype == torch.uint8 else values.float()


def longest_gap(gap_dtype: torch.dtype) -> int:
    """Indices passed over that take one more place."""
    return torch.iinfo(gap_dtype).max


def _encode_gaps(indices: Tensor, counts: Tensor, gap_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All gaps, and how many places each row takes."""
    if not len(indices):
        return torch.zeros(0, dtype=gap_dtype), torch.zeros_like(counts)
    gaps = indices.diff(prepend=indices.new_tensor([-1])) - 1
    firsts = (counts.cumsum(0) - counts)[counts > 0]
    gaps[firsts] = indices[firsts]
    more = longest_gap(gap_dtype)
    lengths = gaps // more + 1
    ends = lengths.cumsum(0)
    packed = torch.full((int(ends[-1]),), more, dtype=gap_dtype)
    packed[ends - 1] = (gaps % more).to(gap_dtype)
    return packed, torch.zeros_like(counts).index_add(0, torch.repeat_interleave(counts), lengths)


def _decode_gaps(gaps: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of all entries, and the number of entries of each row."""
    step, ends_entry = gaps.long(), gaps != longest_gap(gaps.dtype)
    walked = (step + ends_entry).cumsum(0)
    row = torch.repeat_interleave(sizes, output_size=len(gaps))
    before = torch.cat([walked.new_zeros(1), walked])[sizes.cumsum(0) - sizes]
    indices = (walked - before[row] - 1)[ends_entry]
    return indices, torch.zeros_like(sizes).index_add(0, row, ends_entry.long())


def _small(counts: Tensor) -> Tensor:
    largest = int(counts.max()) if len(counts) else 0
    return counts.to(torch.int16 if largest <= torch.iinfo(torch.int16).max else torch.int32)
