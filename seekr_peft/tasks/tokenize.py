"""From text to token ids: a prompt and its answer, shortened to fit, and padded into batches.

The loss is on the answer tokens alone, so labels are -100 on the prompt. Imports only
`seekr_peft.errors`; torch inside functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from seekr_peft.errors import DataError

if TYPE_CHECKING:
    import torch

IGNORED_LABEL = -100
"""The label that cross-entropy skips."""

SMALLEST_MAX_LENGTH = 4


@dataclass(frozen=True)
class Encoded:
    """One sample as token ids; `input_ids` and `labels` have the same length.

    `labels` is -100 on the prompt and the token id on the answer and its end-of-sequence token;
    `cut` says whether tokens were dropped to fit.
    """

    input_ids: list[int]
    labels: list[int]
    cut: bool


def prepare_tokenizer(tokenizer: Any) -> Any:
    """Give the tokenizer a pad token when it has none, and return it.

    The pad token is then the end-of-sequence token: nothing is added to the vocabulary, so no
    embedding has to grow. Attention masks must therefore come from lengths, never from token ids.

    Raises:
        DataError: the tokenizer has no end-of-sequence token, with which an answer must end.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"The tokenizer {_name(tokenizer)} has no end-of-sequence token, with which every "
            "answer "
            "ends; set tokenizer.eos_token to a token of its vocabulary."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode(
    tokenizer: Any,
    prompt: str,
    answer: str,
    max_length: int,
    instruction: str | None = None,
    prompt_room: int | None = None,
) -> Encoded:
    """Token ids of a prompt and its answer, at most `max_length` of them.

    The prompt gets the special tokens that the tokenizer puts in front. The answer, stripped and
    set off by a space where the prompt does not end in whitespace, ends with end-of-sequence.
    What does not fit is dropped from the middle of the prompt (see `encode_prompt`); the answer
    loses its end only when it needs more than half of `max_length` and more than the prompt leaves.

    Args:
        instruction: the leading part of `prompt` that is kept; None or '' = none.
        prompt_room: tokens of the prompt at most, however short the answer is (see `prompt_room_of`).

    Raises:
        DataError: no end-of-sequence token, or a `max_length` below 4.
    """
    _check_max_length(max_length)
    prepare_tokenizer(tokenizer)
    whole = _prompt_ids(tokenizer, prompt)
    prompt_ids = _shorten(tokenizer, whole, prompt_room or max_length, instruction)
    answer_ids = _answer_ids(tokenizer, prompt, answer)
    cut = len(prompt_ids) < len(whole)
    if len(prompt_ids) + len(answer_ids) > max_length:
        cut = True
        answer_room = max(max_length // 2, max_length - len(prompt_ids))
        if len(answer_ids) > answer_room:
            answer_ids = [*answer_ids[: answer_room - 1], tokenizer.eos_token_id]
        prompt_ids = _shorten(tokenizer, whole, max_length - len(answer_ids), instruction)
    labels = [IGNORED_LABEL] * len(prompt_ids) + answer_ids
    return Encoded(prompt_ids + answer_ids, labels, cut)


def prompt_room_of(tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], max_length: int) -> int:
    """Tokens that every prompt of a task may have: what its longest answer leaves, at least 3/4 of `max_length`.

    Were each prompt cut to what its own answer leaves, the place where a prompt ends would tell the answer's length,
    and a model can learn the labels from that alone (agnews at 96 tokens: training loss 0.06, test accuracy below
    the majority class; docs/pitfalls.md).
    """
    pairs = zip(prompts, answers, strict=True)
    longest = max((len(_answer_ids(tokenizer, *pair)) for pair in pairs), default=0)
    return max_length - min(longest, max_length // 4)


def encode_prompt(tokenizer: Any, prompt: str, max_length: int, instruction: str | None = None) -> list[int]:
    """Token ids of a prompt to be answered, at most `max_length` of them.

    A prompt that does not fit keeps its instruction and then, of what follows, as much of the
    beginning as of the end: the middle of the input is dropped. Without an instruction that is the
    first and the last half. An instruction longer than three quarters of the room is cut itself,
    because the end of a prompt ('Answer:') asks the question.

    Raises:
        DataError: a `max_length` below 4.
    """
    _check_max_length(max_length)
    return _shorten(tokenizer, _prompt_ids(tokenizer, prompt), max_length, instruction)


@dataclass(frozen=True)
class AnswerCollator:
    """Pads samples (dicts with input_ids and, optionally, labels) to the longest of the batch.

    Other columns are ignored. Returns int64 tensors of shape (batch, longest): input_ids,
    attention_mask (1 on tokens, from the lengths, so a pad token equal to end-of-sequence is safe)
    and, when the samples have them, labels (-100 on the padding).
    """

    pad_token_id: int
    padding_side: str = "right"

    def __post_init__(self) -> None:
        if self.padding_side not in ("left", "right"):
            raise DataError(f"padding_side is {self.padding_side!r}; it must be 'left' or 'right'.")
        if self.pad_token_id is None:
            raise DataError("pad_token_id is None; call prepare_tokenizer(tokenizer) first.")

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        if not samples:
            raise DataError("A batch has no samples; the collator needs at least one.")
        ids = [list(sample["input_ids"]) for sample in samples]
        columns = {
            "input_ids": (ids, self.pad_token_id),
            "attention_mask": ([[1] * len(row) for row in ids], 0),
        }
        if "labels" in samples[0]:
            columns["labels"] = ([list(sample["labels"]) for sample in samples], IGNORED_LABEL)
        return {name: self._pad(rows, value) for name, (rows, value) in columns.items()}

    def _pad(self, rows: list[list[int]], value: int) -> torch.Tensor:
        import torch

        longest = max(len(row) for row in rows)
        padding = [[value] * (longest - len(row)) for row in rows]
        if self.padding_side == "left":
            padded = [pad + row for pad, row in zip(padding, rows, strict=True)]
        else:
            padded = [row + pad for pad, row in zip(padding, rows, strict=True)]
        return torch.tensor(padded, dtype=torch.long)


def _shorten(tokenizer: Any, ids: list[int], room: int, instruction: str | None) -> list[int]:
    """`ids` without its middle, so that `room` tokens remain."""
    if len(ids) <= room:
        return ids
    # Counted by tokenising the instruction alone: a token that spans its end is counted too.
    kept = len(_prompt_ids(tokenizer, instruction)) if instruction else 0
    kept = min(kept, room * 3 // 4)
    head = kept + (room - kept) // 2
    return ids[:head] + ids[len(ids) - (room - head) :]


def _answer_ids(tokenizer: Any, prompt: str, answer: str) -> list[int]:
    separator = "" if prompt[-1:].isspace() else " "
    return [*_ids(tokenizer, separator + answer.strip(), add_special_tokens=False), tokenizer.eos_token_id]


def _prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of `text` with the tokenizer's special tokens, but no end-of-sequence at its end."""
    ids = _ids(tokenizer, text, add_special_tokens=True)
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def _ids(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    # verbose=False: no "longer than the maximum" message about text that is shortened afterwards.
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
    return list(encoded["input_ids"])


def _check_max_length(max_length: int) -> None:
    if not isinstance(max_length, int) or max_length < SMALLEST_MAX_LENGTH:
        raise DataError(
            f"max_length is {max_length!r}; it must be a whole number of tokens, {SMALLEST_MAX_LENGTH} or more."
        )


def _name(tokenizer: Any) -> str:
    return repr(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
