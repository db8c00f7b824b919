"""Replay samples: which training samples are kept, and which of their query positions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import QueryChoice
from ..errors import DataError
from ..model.answers import answer_positions, count_answers
from ..tasks.inputs import check_sample
from ..tasks.tokenize import IGNORED_LABEL

SampleSelector = Callable[[Any, int, int], Sequence[int]]
"""``(dataset, count, seed) -> indices`` of the samples to keep."""


@dataclass(frozen=True)
class ReplaySample:
    """One kept training sample: ``input_ids`` and ``labels`` int64 (T,), ``queries`` int64 (n_queries,) sorted
    positions in 0..T-1, drawn once. No padding."""

    input_ids: Tensor
    labels: Tensor
    queries: Tensor


def check_token_ids(samples: Iterable[ReplaySample], embedding_rows: int) -> None:
    """Refuse samples whose tokens or labels a model of so many embeddings has no row for.

    Raises:
        DataError: One has.
    """
    for place, sample in enumerate(samples):
        for key, ids in (("input_ids", sample.input_ids), ("labels", sample.labels)):
            if len(ids) and int(ids.max()) >= embedding_rows:
                raise DataError(
                    f"replay sample {place} has token id {int(ids.max())} in its {key}, but the model has "
                    f"{embedding_rows} embeddings; call model.resize_token_embeddings(len(tokenizer)) before "
                    f"get_peft_model."
                )


def replay_count(n_train: int, replay_ratio: float) -> int:
    """Samples kept out of ``n_train``: the ratio rounded, at least 1."""
    return max(1, min(n_train, round(n_train * replay_ratio)))


def select_random(dataset: Any, count: int, seed: int) -> list[int]:
    """A seeded draw without replacement, in ascending order (the paper's choice)."""
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(len(dataset), generator=generator)[:count].tolist())


def select_first(dataset: Any, count: int, seed: int) -> list[int]:
    """The first samples (the released code's choice)."""
    return list(range(count))


SELECTORS: dict[str, SampleSelector] = {"random": select_random, "first": select_first}


def draw_queries(length: int, budget: int | None, seed: int, first: Tensor | None = None) -> Tensor:
    """``min(budget, length)`` query positions of a sample of ``length`` tokens, sorted, seeded; None takes all.

    ``first`` (positions, int64) are drawn before any other.
    """
    if budget is None or budget >= length:
        return torch.arange(length)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(length, generator=generator)
    if first is not None:
        ahead = torch.isin(drawn, first)
        drawn = torch.cat([drawn[ahead], drawn[~ahead]])
    return drawn[:budget].sort().values


def choose_queries(labels: Tensor, budget: int | None, seed: int, query_choice: QueryChoice) -> Tensor:
    """The query positions of a sample with ``labels`` (T,): ``draw_queries``, under "answer" first of those that
    predict the answer tokens."""
    first = answer_positions(labels[None]).position if query_choice == "answer" else None
    return draw_queries(len(labels), budget, seed, first)


def choose_samples(
    dataset: Any,
    replay_ratio: float,
    query_budget: int | None,
    seed: int,
    selector: SampleSelector = select_random,
    query_choice: QueryChoice = "random",
    input_names: Collection[str] = (),
) -> list[ReplaySample]:
    """Draw the replay samples of a task from its tokenised training set.

    Args:
        dataset: Sized and indexable; each item has ``input_ids`` and ``labels`` (answer tokens, and ``IGNORED_LABEL``
            elsewhere), without padding or with an ``attention_mask`` that marks it.
        input_names: What the model's forward takes; a sample's column of such a name cannot be left out.
        query_choice: "answer" draws the positions that predict the answer tokens before any other.

    Raises:
        DataError: The set is empty, is not tokenised, or a chosen sample has no answer token, is packed from several,
            or holds an input that would be dropped.
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DataError(
            f"replay_from is a {type(dataset).__name__}, of which no samples can be drawn; pass a list or a Dataset of "
            f"mappings with input_ids and labels, as task(name, replay_from=...)."
        )
    if len(dataset) == 0:
        raise DataError("replay_from is empty; a task needs at least one training sample.")
    count = replay_count(len(dataset), replay_ratio)
    indices = list(selector(dataset, count, seed))
    if not indices:
        raise DataError(f"select_samples chose none of {len(dataset)} samples; it must choose at least one.")
    samples = []
    for index in map(int, indices):
        item = dataset[index]
        _check_item(item, index, input_names)
        samples.append(_sample(item, index, query_budget, seed, query_choice))
    return samples


def _check_item(item: Any, index: int, input_names: Collection[str]) -> None:
    """DataError for what is no tokenised sample, or one that cannot be kept as it is."""
    if not isinstance(item, Mapping):
        raise DataError(
            f"sample {index} of replay_from is a {type(item).__name__}; it must be a mapping with input_ids and labels."
        )
    check_sample(item, f"sample {index} of replay_from", input_names)
    for key in ("input_ids", "labels"):
        if key not in item:
            raise DataError(
                f"sample {index} of replay_from has no {key!r} (it has {', '.join(sorted(item))}); tokenise the task "
                f"first: task.tokenized(tokenizer)."
            )


def _sample(
    item: Mapping[str, Any], index: int, query_budget: int | None, seed: int, query_choice: QueryChoice
) -> ReplaySample:
    input_ids, labels = torch.as_tensor(item["input_ids"]), torch.as_tensor(item["labels"])
    for key in ("labels", "attention_mask"):
        if key in item and len(item[key]) != len(input_ids):
            raise DataError(
                f"sample {index} of replay_from has {len(input_ids)} input_ids and {len(item[key])} {key}; give "
                f"one for each token."
            )
    if "attention_mask" in item:
        real = torch.as_tensor(item["attention_mask"]).bool()
        input_ids, labels = input_ids[real], labels[real]
    if not count_answers(labels):
        raise DataError(
            f"sample {index} of replay_from has no answer token (every label is {IGNORED_LABEL}), so there is nothing "
            f"to replay; raise max_length or drop the sample."
        )
    queries = choose_queries(labels, query_budget, _mixed(seed, index), query_choice)
    return ReplaySample(input_ids.long(), labels.long(), queries)


def _mixed(seed: int, index: int) -> int:
    return (seed * 1_000_003 + index * 7_919 + 17) % 2**31
