"""One task's replay samples and teacher signals as safetensors + JSON, memory-mapped on reading.

Format 1. All samples of a task are concatenated, with offsets (n_samples + 1,) int64 to cut them apart:

    input_ids, labels       int32 (tokens,)                     token_offsets
    queries                 int32 (queries,)                    query_offsets
    rows.L.indices          int16 | int32 (queries, heads, k)   heads = those selected in layer L
    rows.L.probabilities    float16 | float32 (queries, heads, k)
    rows.L.remaining        float16 | float32 (queries, heads)
    logits.indices          int32 (answers, k)                  answer_offsets
    logits.probabilities    float16 | float32 (answers, k)
    logits.remaining        float16 | float32 (answers,)

May import ``samples``, ``heads``, ``attention``, ``losses`` and ``errors``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..attention.rows import TeacherRows
from ..errors import MemoryFormatError
from ..heads import HeadSelection
from ..losses import TeacherDistributions, answer_positions
from .samples import ReplaySample

FORMAT = 1
WEIGHTS_FILE = "memory.safetensors"
HEADER_FILE = "memory.json"
_PARTS = ("indices", "probabilities", "remaining")
_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class TeacherSignals:
    """What the teacher did on one replay sample: ``rows`` by layer, each (heads, n_queries, k) and without a batch
    axis, and ``logits`` at the positions that predict the answer tokens. Either may be empty or None."""

    rows: dict[int, TeacherRows]
    logits: TeacherDistributions | None


@dataclass(frozen=True)
class TeacherQuality:
    """The teacher on its own replay samples: mean ``loss`` and ``answer_entropy``, nats per answer token."""

    loss: float
    answer_entropy: float
    worth_imitating: bool


def count_answers(sample: ReplaySample) -> int:
    """Number of answer tokens that the sample predicts."""
    return len(answer_positions(sample.labels[None])[0])


def estimate_bytes(
    samples: Sequence[ReplaySample],
    n_heads: int,
    row_top_k: int,
    logit_top_k: int,
    vocabulary: int,
    storage_dtype: str = "float16",
    n_layers: int = 0,
) -> int:
    """Bytes that ``TaskMemory.write`` will need for these samples, before any teacher has run.

    Args:
        n_heads: Selected heads over all layers; 0 without attention rows.
        logit_top_k: 0 without logits.
        n_layers: Layers that hold selected heads; each has 3 tensors with a header entry of about 75 bytes.
    """
    longest = max(len(sample.input_ids) for sample in samples)
    tokens = sum(len(sample.input_ids) for sample in samples)
    queries = sum(len(sample.queries) for sample in samples)
    answers = sum(count_answers(sample) for sample in samples)
    probability = _DTYPES[storage_dtype].itemsize
    k_row, k_logit = min(row_top_k, longest), min(logit_top_k, vocabulary)
    index = _index_dtype(longest).itemsize
    rows = queries * n_heads * (k_row * (index + probability) + probability)
    logits = answers * (k_logit * (4 + probability) + probability) if logit_top_k else 0
    offsets = 3 * 8 * (len(samples) + 1)
    header = 8 + 75 * (6 + (3 if logit_top_k else 0) + 3 * n_layers)
    return tokens * 8 + queries * 4 + offsets + rows + logits + header


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
        selection = self.header.get("selection")
        self.selection = HeadSelection.from_json(selection) if selection else HeadSelection({})
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

    def signals(self, index: int) -> TeacherSignals:
        """What the teacher did on the ``index``-th sample; probabilities and remaining mass sum to 1, float32."""
        queries = self._span("query_offsets", index)
        rows = {layer: TeacherRows(*self._masses(f"rows.{layer}", queries)) for layer in self.selection}
        rows = {
            layer: TeacherRows(
                row.indices.transpose(0, 1), row.probabilities.transpose(0, 1), row.remaining.transpose(0, 1)
            )
            for layer, row in rows.items()
        }
        logits = None
        if "logits.indices" in self._names:
            span = self._span("answer_offsets", index)
            logits = TeacherDistributions(*self._masses("logits", span))
        return TeacherSignals(rows, logits)

    @classmethod
    def write(
        cls,
        directory: Path,
        name: str,
        samples: Sequence[ReplaySample],
        signals: Sequence[TeacherSignals] | None = None,
        selection: HeadSelection | None = None,
        quality: TeacherQuality | None = None,
        storage_dtype: str = "float16",
        header: dict[str, Any] | None = None,
    ) -> TaskMemory:
        """Write ``memory.safetensors`` and ``memory.json`` into ``directory``; ``header`` adds further JSON fields."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = _pack_samples(samples)
        if signals is not None:
            longest = max(len(sample.input_ids) for sample in samples)
            tensors |= _pack_signals(signals, selection or HeadSelection({}), longest, _DTYPES[storage_dtype])
        save_file(tensors, directory / WEIGHTS_FILE)
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
        (directory / HEADER_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        return cls(directory)

    def _check_contents(self, path: Path) -> None:
        wanted = {"input_ids", "labels", "queries", "token_offsets", "query_offsets", "answer_offsets"}
        wanted |= {f"rows.{layer}.{part}" for layer in self.selection for part in _PARTS}
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

    def _masses(self, name: str, span: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Indices, probabilities and remaining mass; renormalised, since 16-bit rounding leaves a sum of 1 +- 1e-3."""
        kept = self._read(f"{name}.probabilities", span).float()
        remaining = self._read(f"{name}.remaining", span).float()
        total = (kept.sum(dim=-1) + remaining).clamp_min(torch.finfo(torch.float32).tiny)
        indices = self._read(f"{name}.indices", span).long()
        return indices, kept / total[..., None], remaining / total


def _pack_samples(samples: Sequence[ReplaySample]) -> dict[str, Tensor]:
    return {
        "input_ids": torch.cat([sample.input_ids for sample in samples]).int(),
        "labels": torch.cat([sample.labels for sample in samples]).int(),
        "queries": torch.cat([sample.queries for sample in samples]).int(),
        "token_offsets": _offsets(len(sample.input_ids) for sample in samples),
        "query_offsets": _offsets(len(sample.queries) for sample in samples),
        "answer_offsets": _offsets(count_answers(sample) for sample in samples),
    }


def _pack_signals(
    signals: Sequence[TeacherSignals], selection: HeadSelection, longest: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for layer in selection:
        rows = [signal.rows[layer] for signal in signals]
        k = max(row.indices.shape[-1] for row in rows)
        tensors[f"rows.{layer}.indices"] = _stack([row.indices.transpose(0, 1) for row in rows], k).to(
            _index_dtype(longest)
        )
        tensors[f"rows.{layer}.probabilities"] = _stack([row.probabilities.transpose(0, 1) for row in rows], k).to(
            dtype
        )
        remaining = torch.cat([row.remaining.transpose(0, 1) for row in rows])
        tensors[f"rows.{layer}.remaining"] = remaining.to(dtype).contiguous()
    logits = [signal.logits for signal in signals if signal.logits is not None]
    if logits:
        tensors["logits.indices"] = torch.cat([part.indices for part in logits]).int()
        tensors["logits.probabilities"] = torch.cat([part.probabilities for part in logits]).to(dtype)
        tensors["logits.remaining"] = torch.cat([part.remaining for part in logits]).to(dtype)
    return tensors


def _stack(parts: list[Tensor], k: int) -> Tensor:
    """Concatenate (queries, heads, <= k) parts, padded with index 0 and probability 0 (an absent entry)."""
    padded = [torch.nn.functional.pad(part, (0, k - part.shape[-1])) for part in parts]
    return torch.cat(padded).contiguous()


def _offsets(lengths: Any) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def _index_dtype(longest: int) -> torch.dtype:
    return torch.int16 if longest <= torch.iinfo(torch.int16).max else torch.int32


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
    missing = [key for key in ("task", "n_samples", "teacher") if key not in header]
    if missing:
        raise MemoryFormatError(f"{path} has no {missing[0]!r}; it is no replay memory's header, run that task again.")
    return header
