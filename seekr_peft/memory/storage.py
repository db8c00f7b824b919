"""One task's replay samples and teacher signals as safetensors + JSON, memory-mapped on reading.

Format 3. All samples of a task are concatenated, with offsets (n_samples + 1,) int64 to cut them apart:

    input_ids, labels    int32 (tokens,)               token_offsets
    queries              int32 (queries,)              query_offsets
    rows.sizes           int16 | int32 (rows,)         rows of a sample: by layer, then selected head, then query
    rows.remaining       float16 | float32 (rows,)
    rows.gaps            uint8 (places,)               rows.gap_offsets      distances between a row's sorted keys
    rows.values          (entries,)                    rows.value_offsets    8-bit log-probabilities, or floats
    logits.*             the same six, a row for each answer token (answer_offsets); gaps int16

``codec`` says how a row is coded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import MemoryFormatError
from ..files.atomic import save_tensors, write_json
from ..heads import HeadSelection
from ..model.answers import count_answers
from ..sparse import SparseDistribution
from ..tasks.tokenize import IGNORED_LABEL
from .codec import PackedRows, StorageDtype, longest_gap, mass_bytes, pack, unpack, value_bytes
from .samples import ReplaySample

FORMAT = 3
WEIGHTS_FILE = "memory.safetensors"
HEADER_FILE = "memory.json"
_PARTS = ("sizes", "remaining", "gaps", "values", "gap_offsets", "value_offsets")
_OFFSETS = {
    "token_offsets": ("input_ids", "labels"),
    "query_offsets": ("queries",),
    "answer_offsets": ("logits.sizes", "logits.remaining"),
    **{f"{kind}.{part}_offsets": (f"{kind}.{part}s",) for kind in ("rows", "logits") for part in ("gap", "value")},
}
"""What each offsets cut apart."""
GAP_DTYPES = {"rows": torch.uint8, "logits": torch.int16}
"""Keys lie close together, tokens of a vocabulary do not."""


@dataclass(frozen=True)
class TeacherSignals:
    """What the teacher did on one replay sample: ``rows`` by layer, each (heads, n_queries, k) and without a batch
    axis, and ``logits`` at the positions that predict the answer tokens. Either may be empty or None."""

    rows: dict[int, SparseDistribution]
    logits: SparseDistribution | None


@dataclass(frozen=True)
class PackedSignals:
    """The same in the bytes that they take on disk: ``rows`` by layer, then selected head, then query."""

    rows: PackedRows | None
    logits: PackedRows | None

    @classmethod
    def of(cls, signals: TeacherSignals, selection: HeadSelection, storage_dtype: StorageDtype) -> PackedSignals:
        """Pack ``signals``, whose rows are those of the heads in ``selection``."""
        rows, logits = join_layers(signals.rows, selection), signals.logits
        return cls(
            None if rows is None else pack(rows, storage_dtype, GAP_DTYPES["rows"]),
            None if logits is None else pack(logits, storage_dtype, GAP_DTYPES["logits"]),
        )


@dataclass(frozen=True)
class TeacherQuality:
    """The teacher on its own replay samples: mean ``loss`` and ``answer_entropy``, nats per answer token."""

    loss: float
    answer_entropy: float
    worth_imitating: bool


def estimate_bytes(
    samples: Sequence[ReplaySample],
    n_heads: int,
    row_top_k: int,
    logit_top_k: int,
    vocabulary: int,
    storage_dtype: StorageDtype = "uint8",
) -> int:
    """Bytes that ``TaskMemory.write`` needs at most for these samples, before any teacher has run.

    Rows of a causal model; less where a few entries hold nearly all the mass.

    Args:
        n_heads: Selected heads over all layers; 0 without attention rows.
        row_top_k: Entries per row, on average over a sample's rows.
        logit_top_k: Entries per answer token, on average over a sample's; 0 without logits.
    """
    value, mass, size = value_bytes(storage_dtype), mass_bytes(storage_dtype), 2
    total = 24 * (len(samples) + 1) + 8 + 75 * 6
    for sample in samples:
        visible = sample.queries + 1
        n_rows = n_heads * len(visible)
        n_entries = min(n_rows * row_top_k, n_heads * int(visible.sum()))
        # Each entry has one place, and 255 keys passed over take one more.
        gaps = n_entries + n_heads * int((visible // (longest_gap(GAP_DTYPES["rows"]) + 1)).sum())
        answers = count_answers(sample.labels) if logit_top_k else 0
        total += len(sample.input_ids) * 8 + len(visible) * 4
        total += n_rows * (size + mass) + n_entries * value + gaps
        n_entries = min(logit_top_k, vocabulary)
        gaps = 2 * (n_entries + vocabulary // (longest_gap(GAP_DTYPES["logits"]) + 1))
        total += answers * (size + mass + n_entries * value + gaps)
    for present in (n_heads, logit_top_k):
        if present:
            total += 75 * len(_PARTS) + 2 * 8 * (len(samples) + 1)
    return total


class TaskMemory:
    """The replay samples of one finished task. Reading a sample touches only its own bytes of the file.

    Raises:
        MemoryFormatError: A file is missing, cut off or of another format.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.header = _read_header(self.directory / HEADER_FILE)
        self.name: str = self.header["task"]
        self.n_samples: int = self.header["n_samples"]
        self.selection = _read_selection(self.directory / HEADER_FILE, self.header.get("selection"))
        path = self.directory / WEIGHTS_FILE
        try:
            self._file: Any = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise MemoryFormatError(
                f"{path} cannot be read ({error}); the memory of task {self.name!r} is incomplete, so "
                f"run that task again."
            ) from error
        self._check_contents(path)

    def __len__(self) -> int:
        return self.n_samples

    @property
    def bytes(self) -> int:
        """Size of the file on disk."""
        return (self.directory / WEIGHTS_FILE).stat().st_size

    @property
    def quality(self) -> TeacherQuality | None:
        """The teacher's own loss and entropy, where a teacher was recorded."""
        teacher = self.header["teacher"]
        return None if teacher["loss"] is None else TeacherQuality(**teacher)

    def sample(self, index: int) -> ReplaySample:
        """The ``index``-th replay sample."""
        tokens, queries = self._span("token_offsets", index), self._span("query_offsets", index)
        return ReplaySample(
            self._read("input_ids", tokens).long(),
            self._read("labels", tokens).long(),
            self._read("queries", queries).long(),
        )

    def packed(self, index: int) -> PackedSignals:
        """What the teacher did on the ``index``-th sample, as it lies on disk; ``codec.unpack`` gives its rows."""
        rows = logits = None
        if self.selection:
            queries, n_heads = self._span("query_offsets", index), self.selection.n_heads
            rows = self._packed("rows", slice(queries.start * n_heads, queries.stop * n_heads), index)
        if "logits.values" in self._names:
            logits = self._packed("logits", self._span("answer_offsets", index), index)
        return PackedSignals(rows, logits)

    def check_values(self, vocabulary: int | None = None) -> None:
        """Look at every number: tokens within ``vocabulary`` (None: unknown), queries and keys within their sample,
        shares of 1. Decodes all of the memory.

        Raises:
            MemoryFormatError: Names the sample.
        """
        for index in range(self.n_samples):
            problem = self._problem(index, vocabulary or torch.iinfo(torch.int64).max)
            if problem:
                raise MemoryFormatError(
                    f"{self.directory / WEIGHTS_FILE} is damaged ({problem} of sample {index}); run that task again."
                )

    def _problem(self, index: int, vocabulary: int) -> str:
        """What is wrong with a sample; "" for nothing."""
        sample = self.sample(index)
        length, ids, labels, queries = len(sample.input_ids), sample.input_ids, sample.labels, sample.queries
        if bool(((ids < 0) | (ids >= vocabulary)).any()):
            return "token ids out of the vocabulary"
        if bool(((labels != IGNORED_LABEL) & ((labels < 0) | (labels >= vocabulary))).any()):
            return "labels out of the vocabulary"
        if bool(((queries < 0) | (queries >= length)).any()) or bool((queries.diff() <= 0).any()):
            return "queries out of the sample or out of order"
        try:
            packed = self.packed(index)
            rows = None if packed.rows is None else unpack(packed.rows)
            logits = None if packed.logits is None else unpack(packed.logits)
        except (RuntimeError, IndexError, ValueError) as error:
            return f"rows that do not decode, {' '.join(str(error).split())[:100]},"
        if rows is not None and not _are_shares(rows, queries.repeat(self.selection.n_heads)):
            return "attention rows that are none"
        if logits is not None and not _are_shares(logits, torch.full((len(logits.remaining),), vocabulary - 1)):
            return "answer distributions that are none"
        return ""

    @classmethod
    def write(
        cls,
        directory: Path,
        name: str,
        samples: Sequence[ReplaySample],
        signals: Sequence[PackedSignals] = (),
        selection: HeadSelection | None = None,
        quality: TeacherQuality | None = None,
        header: dict[str, Any] | None = None,
    ) -> TaskMemory:
        """Write ``memory.safetensors`` and ``memory.json`` into ``directory``; ``header`` adds further JSON fields.

        ``signals``: of each sample, or none at all.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = _join_samples(samples)
        tensors |= _join_packed("rows", [signal.rows for signal in signals if signal.rows is not None])
        tensors |= _join_packed("logits", [signal.logits for signal in signals if signal.logits is not None])
        save_tensors(tensors, directory / WEIGHTS_FILE)
        teacher = {"loss": None, "answer_entropy": None, "worth_imitating": None}
        if quality is not None:
            teacher = dict(vars(quality))
        document = {
            "format": FORMAT,
            "task": name,
            "n_samples": len(samples),
            "bytes": (directory / WEIGHTS_FILE).stat().st_size,
            "teacher": teacher,
            "selection": selection.to_json() if selection else None,
            **(header or {}),
        }
        write_json(directory / HEADER_FILE, document)
        return cls(directory)

    def _check_contents(self, path: Path) -> None:
        wanted = {"input_ids", "labels", "queries", "token_offsets", "query_offsets", "answer_offsets"}
        for kind, present in (("rows", bool(self.selection)), ("logits", "logits.values" in self._names)):
            wanted |= {f"{kind}.{part}" for part in _PARTS} if present else set()
        missing = sorted(wanted - self._names)
        if missing:
            raise MemoryFormatError(
                f"{path} has no tensor {missing[0]!r}; it is no replay memory, run that task again."
            )
        found = len(self._offsets["token_offsets"]) - 1
        if found != self.n_samples:
            raise MemoryFormatError(
                f"{path} holds {found} samples but {HEADER_FILE} says {self.n_samples}; the two files do not belong "
                f"together, run that task again."
            )
        for offsets, described in _OFFSETS.items():
            for name in described:
                if name in self._names:
                    self._check_offsets(path, offsets, name)
        if self.selection:
            n_rows = self._length("rows.sizes")
            wanted_rows = self._offsets["query_offsets"][-1] * self.selection.n_heads
            if n_rows != wanted_rows:
                raise MemoryFormatError(
                    f"{path} holds {n_rows} attention rows but the selection in {HEADER_FILE} asks for {wanted_rows}; "
                    f"the two files do not belong together, run that task again."
                )

    def _check_offsets(self, path: Path, offsets: str, name: str) -> None:
        bounds, length = self._offsets[offsets], self._length(name)
        rises = all(before <= after for before, after in pairwise(bounds))
        if len(bounds) != self.n_samples + 1 or bounds[0] != 0 or bounds[-1] != length or not rises:
            raise MemoryFormatError(
                f"{path} is damaged ({offsets!r} do not divide the {length} numbers of {name!r} among "
                f"{self.n_samples} samples); run that task again."
            )

    def _length(self, name: str) -> int:
        return int(self._file.get_slice(name).get_shape()[0])

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self._file.keys())

    @cached_property
    def _offsets(self) -> dict[str, list[int]]:
        names = [name for name in self._names if name.endswith("_offsets")]
        return {name: self._file.get_tensor(name).tolist() for name in names}

    def _span(self, offsets: str, index: int) -> slice:
        if not 0 <= index < self.n_samples:
            raise IndexError(f"task {self.name!r} has replay samples 0..{self.n_samples - 1}, got {index}.")
        bounds = self._offsets[offsets]
        return slice(bounds[index], bounds[index + 1])

    def _read(self, name: str, span: slice) -> Tensor:
        return self._file.get_slice(name)[span]

    def _packed(self, kind: str, rows: slice, index: int) -> PackedRows:
        return PackedRows(
            self._read(f"{kind}.sizes", rows),
            self._read(f"{kind}.gaps", self._span(f"{kind}.gap_offsets", index)),
            self._read(f"{kind}.values", self._span(f"{kind}.value_offsets", index)),
            self._read(f"{kind}.remaining", rows),
        )


def _join_samples(samples: Sequence[ReplaySample]) -> dict[str, Tensor]:
    return {
        "input_ids": torch.cat([sample.input_ids for sample in samples]).int(),
        "labels": torch.cat([sample.labels for sample in samples]).int(),
        "queries": torch.cat([sample.queries for sample in samples]).int(),
        "token_offsets": _offsets(len(sample.input_ids) for sample in samples),
        "query_offsets": _offsets(len(sample.queries) for sample in samples),
        "answer_offsets": _offsets(count_answers(sample.labels) for sample in samples),
    }


def _join_packed(kind: str, parts: list[PackedRows]) -> dict[str, Tensor]:
    if not parts:
        return {}
    return {
        f"{kind}.sizes": torch.cat([part.sizes for part in parts]),
        f"{kind}.remaining": torch.cat([part.remaining for part in parts]),
        f"{kind}.gaps": torch.cat([part.gaps for part in parts]),
        f"{kind}.values": torch.cat([part.values for part in parts]),
        f"{kind}.gap_offsets": _offsets(len(part.gaps) for part in parts),
        f"{kind}.value_offsets": _offsets(len(part.values) for part in parts),
    }


def _are_shares(rows: SparseDistribution, last: Tensor) -> bool:
    """Whether each row has indices up to ``last`` and shares of 1."""
    fits = bool((rows.indices <= last[:, None]).all()) and bool((rows.indices >= 0).all())
    shares = torch.cat([rows.probabilities, rows.remaining[:, None]], dim=-1)
    return fits and bool(((shares >= 0) & (shares <= 1.01)).all())


def join_layers(rows: dict[int, SparseDistribution], selection: HeadSelection) -> SparseDistribution | None:
    """One sample's rows of all layers behind one another, (rows, k): by layer, head, query; None without heads."""
    return SparseDistribution.join([rows[layer].reshape(-1) for layer in selection]) if selection else None


def _offsets(lengths: Any) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def _read_header(path: Path) -> dict[str, Any]:
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MemoryFormatError(f"{path} cannot be read ({error}); run that task again.") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else type(header).__name__
        raise MemoryFormatError(
            f"{path} has format {found!r}, this version reads format {FORMAT}; run that task again."
        )
    wanted: dict[str, type] = {"task": str, "n_samples": int, "teacher": dict}
    missing = [key for key, kind in wanted.items() if not isinstance(header.get(key), kind)]
    if missing or set(header["teacher"]) != {field.name for field in fields(TeacherQuality)}:
        name = missing[0] if missing else "teacher"
        raise MemoryFormatError(f"{path} has no {name!r}; it is no replay memory's header, run that task again.")
    return header


def _read_selection(path: Path, selection: Any) -> HeadSelection:
    try:
        return HeadSelection.from_json(selection or {})
    except (AttributeError, TypeError, ValueError) as error:
        raise MemoryFormatError(
            f"{path}: selection is {selection!r}, no heads by layer; run that task again."
        ) from error
