"""Which inputs of a sample reach the model: those that are carried, and a refusal of any other.

Collators, replay samples and scoring keep token ids, their mask and their labels. A sample that holds more for the
model, such as an image, would be trained without it and nobody would see that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ..errors import DataError, listed, shown

CARRIED = ("input_ids", "attention_mask", "labels")

_INPUT_NAME = re.compile(r"(pixel|image|video|audio)_|input_features|input_values|inputs_embeds")
"""How models call inputs beside token ids; an array of such a name is one, whatever model it is for."""
_MEDIA_NAMES = frozenset({"image", "images", "audio", "audios", "video", "videos"})
_SPLITS = {"train", "validation", "test"}
_FRAME_MODULES = ("pandas", "polars", "pyarrow")
_MEDIA_MODULES = ("PIL", "torchcodec", "datasets")
"""Where the classes of decoded images, sounds and films come from."""
_LAYOUT = ("position_ids", "seq_lengths", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""What a collator derives from how it laid the samples out; a replay batch has a layout of its own."""
_ADVICE = (
    "training, replay and scoring carry input_ids, attention_mask and labels alone, so it would be dropped; models "
    "that need it are not supported yet: where this one does not, remove it from the data set."
)


def why_no_rows(data: Any) -> str:
    """What ``data`` is and what to pass instead, where it holds no samples one by one; '' for what may hold them."""
    kind = type(data).__name__
    if isinstance(data, Mapping):
        names = listed(shown(name, 60) for name in data)
        if kind.endswith("DatasetDict") or _SPLITS & set(data):
            split = shown(next((name for name in data if name in _SPLITS), "train"), 60)
            return f"a {kind} with the splits {names}; pass one of them, as in dataset[{split}]."
        return (
            f"a {kind} with the keys {names}, not rows; pass a list of dicts, or datasets.Dataset.from_dict of columns."
        )
    if isinstance(data, str | bytes | os.PathLike):
        return f"{shown(data, 60)}, not rows; pass a list of dicts or a Dataset (Task.from_files reads files)."
    if type(data).__module__.split(".")[0] in _FRAME_MODULES:
        return (
            f"a {kind} of {type(data).__module__.split('.')[0]}, whose columns are no rows; pass its rows: "
            f"to_dict('records') of pandas, to_dicts() of polars, to_pylist() of pyarrow."
        )
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        return f"{shown(data, 60)}, not rows; pass a list of dicts or a Dataset."
    return ""


def check_sample(sample: Mapping[str, Any], place: str, parameters: Collection[str] = ()) -> None:
    """Refuse a tokenised sample that holds an input which is not carried, or several samples in one row.

    Args:
        sample: One item of a training set.
        place: Begins the message, such as "sample 3 of replay_from".
        parameters: Names that the model's forward takes: a column of such a name is an input.

    Raises:
        DataError: With the name of the column.
    """
    _check_layout(sample, place)
    for name, value in sample.items():
        if name not in (*CARRIED, *_LAYOUT) and value is not None:
            what = _input_kind(name, value, parameters)
            if what:
                raise DataError(f"{place} holds {shown(name, 60)}, {what}; {_ADVICE}")


def check_media(row: Mapping[str, Any], place: str) -> None:
    """Refuse a row of texts that holds an image, a sound or a film beside them.

    Raises:
        DataError: With the name of the column.
    """
    for name, value in row.items():
        if _is_media(name, value):
            raise DataError(f"{place} holds {shown(name, 60)}, an image, a sound or a film; {_ADVICE}")


def check_batch(batch: Mapping[str, Any], parameters: Collection[str]) -> None:
    """Refuse a collated batch with an input that replay samples could not carry.

    Raises:
        DataError: With the name of the input.
    """
    for name in batch:
        if name not in (*CARRIED, *_LAYOUT) and (name in parameters or _INPUT_NAME.match(name)):
            raise DataError(f"the collator's batch holds {shown(name, 60)}, an input of the model; {_ADVICE}")


def check_data_set(dataset: Any, name: str, parameters: Collection[str] = ()) -> None:
    """``check_sample`` of every row that can be looked at without work: rows of a list, columns of a ``Dataset``; the
    first one of anything else that has rows. What holds no rows, such as a ``DatasetDict``, is refused by name."""
    check_rows(dataset, name)
    columns = getattr(dataset, "column_names", None)
    if isinstance(dataset, (list, tuple)):
        rows: Any = enumerate(dataset)
    elif isinstance(columns, list) and hasattr(dataset, "select_columns"):
        rows = _rows_with_inputs(dataset, [column for column in columns if column not in CARRIED], parameters)
    elif hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset) > 0:
        rows = [(0, dataset[0])]
    else:
        rows = []
    for index, row in rows:
        check_sample(row, f"sample {index} of {name}", parameters)


def check_rows(dataset: Any, name: str) -> None:
    """Refuse what holds no samples one by one, such as a ``DatasetDict``; None passes.

    Raises:
        DataError: With what it is and what to pass.
    """
    why = "" if dataset is None else why_no_rows(dataset)
    if why:
        raise DataError(f"{name} is {why}")


def _rows_with_inputs(dataset: Any, columns: list[str], parameters: Collection[str]) -> Iterator[tuple[int, Any]]:
    """The first row of each column that may hold an input, and has one."""
    if len(dataset) == 0:
        return
    first = dataset.select_columns(columns)[0] if columns else {}
    yield 0, first
    for column in columns:
        suspicious = column in parameters or column in _MEDIA_NAMES or _INPUT_NAME.match(column)
        if suspicious and first[column] is None:
            values = dataset.select_columns([column])
            index = next((i for i, row in enumerate(values) if row[column] is not None), None)
            if index is not None:
                yield index, values[index]


def _check_layout(sample: Mapping[str, Any], place: str) -> None:
    """Of a row's samples and positions only the plain ones are kept: one sample, from position 0 on."""
    positions = sample.get("position_ids")
    plain, n_samples = True, len(_flat(sample.get("seq_lengths")))
    if positions is not None and _depth(positions) == 1:
        found = [place for place, real in zip(_flat(positions), _mask_of(sample, positions), strict=False) if real]
        plain = found == list(range(len(found)))
        n_samples = max(n_samples, sum(place == 0 for place in found))
    if n_samples > 1:
        raise DataError(
            f"{place} is a row of {n_samples} samples that were packed together, and they would attend to each other "
            f"in replay; pass the training set before it was packed (or leave replay_from out: the trainer knows it)."
        )
    if not plain or (positions is not None and _depth(positions) != 1):
        raise DataError(f"{place} holds 'position_ids' other than 0, 1, 2, ...; {_ADVICE}")


def _mask_of(sample: Mapping[str, Any], positions: Any) -> list[Any]:
    mask = sample.get("attention_mask")
    return [1] * len(_flat(positions)) if mask is None else list(_flat(mask))


def _input_kind(name: str, value: Any, parameters: Collection[str]) -> str:
    """What input a column is, in words; empty for one that is none, such as a text or a number."""
    if name in parameters:
        return "an input of the model"
    if _is_media(name, value):
        return "an image, a sound or a film"
    if _depth(value) >= 3 or (_depth(value) > 0 and _INPUT_NAME.match(name)):
        return "an array as the inputs of models are"
    return ""


def _is_media(name: Any, value: Any) -> bool:
    if name in _MEDIA_NAMES and value is not None and _size(value) > 0:
        return True
    if isinstance(value, Mapping):
        return any(_is_media(key, inner) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return any(_is_media("", inner) for inner in value)
    return isinstance(value, (bytes, bytearray)) or type(value).__module__.split(".")[0] in _MEDIA_MODULES


def _size(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 1


def _depth(value: Any) -> int:
    """Dimensions of an array of numbers, as a tensor or as nested lists; 0 for anything else."""
    if hasattr(value, "ndim"):
        return int(value.ndim)
    if isinstance(value, (list, tuple)) and value:
        inner = _depth(value[0])
        return 1 + inner if inner or isinstance(value[0], (int, float)) else 0
    return 0


def _flat(value: Any) -> list[Any]:
    """The entries of a one-dimensional array; empty for anything else."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return list(value) if isinstance(value, (list, tuple)) else []
