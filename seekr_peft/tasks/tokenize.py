"""From text to token ids: a prompt and its answer, shortened to fit, and padded into batches.

The loss is on the answer tokens alone, so labels are -100 on the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import DataError, shown
from ..types import Tokenizer
from .conversation import Prompt, tokenizer_name
from .inputs import check_sample
from .text import AnswerTokens, Question, TextCodec

if TYPE_CHECKING:
    import torch

IGNORED_LABEL = -100
"""The label that cross-entropy skips."""

SMALLEST_MAX_LENGTH = 4


@dataclass(frozen=True)
class Encoded:
    """One sample as token ids; ``input_ids`` and ``labels`` have the same length.

    ``labels`` is -100 on the prompt and the token id on the answer and its end-of-sequence token;
    ``cut`` says whether tokens were dropped to fit, ``own`` whether the tokens of prompt and answer were, before that,
    those that the tokenizer gives to their whole text.
    """

    input_ids: list[int]
    labels: list[int]
    cut: bool
    own: bool = True


def prepare_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """Give the tokenizer a pad token when it has none, and return it.

    The pad token is then the end-of-sequence token: nothing is added to the vocabulary, so no
    embedding has to grow. Attention masks must therefore come from lengths, never from token ids.

    Raises:
        DataError: the tokenizer has no end-of-sequence token, with which an answer must end.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"The tokenizer {tokenizer_name(tokenizer)} has no end-of-sequence token, with which every "
            "answer "
            "ends; set tokenizer.eos_token to a token of its vocabulary."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode(
    tokenizer: Tokenizer,
    prompt: Prompt,
    answer: str,
    max_length: int,
    instruction: str | None = None,
    prompt_room: int | None = None,
) -> Encoded:
    """Token ids of a prompt and its answer, at most ``max_length`` of them.

    The tokens are those of the whole text (see ``tasks.text``): the prompt after the special tokens that the tokenizer
    puts in front, the answer without whitespace at its end, a space between them where neither brings whitespace, and
    end-of-sequence. A conversation is written by the tokenizer's chat template instead, which puts all of these itself.
    What does not fit is dropped from the middle of the prompt (see ``encode_prompt``); the answer
    loses its end only when it needs more than half of ``max_length`` and more than the prompt leaves.

    Args:
        instruction: the leading part of ``prompt`` that is kept; None or '' = none.
        prompt_room: tokens of the prompt at most, however short the answer is (see ``prompt_room_of``).

    Raises:
        DataError: no end-of-sequence token, one within the answer, or a ``max_length`` below 4.
    """
    tokens = SampleTokens(tokenizer, [prompt], [answer])
    return tokens.encoded(max_length, prompt_room or max_length, [instruction])[0]


class SampleTokens:
    """The tokens of prompts and answers before they are shortened: ``encoded`` makes them fit.

    Args:
        place: begins the messages about a sample; its index follows.

    Raises:
        DataError: as ``encode``.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompts: Sequence[Prompt], answers: Sequence[str], place: str = "Sample"
    ) -> None:
        self.codec = TextCodec(prepare_tokenizer(tokenizer))
        self.questions = self.codec.questions(prompts, place)
        self.prompts = self.codec.prompt_ids(self.questions)
        self.answers = self.codec.answers(self.questions, self.prompts, answers, place)

    def room(self, max_length: int) -> int:
        """Tokens that every prompt may have; see ``prompt_room_of``."""
        longest = max((len(answer.ids) for answer in self.answers), default=0)
        return max_length - min(longest, max_length // 4)

    def encoded(self, max_length: int, room: int, instructions: Sequence[str | None]) -> list[Encoded]:
        """Each sample in at most ``max_length`` tokens, at most ``room`` of them the prompt's."""
        _check_max_length(max_length)
        rows = zip(self.questions, self.prompts, self.answers, instructions, strict=True)
        return [self._fitted(*row, max_length, room) for row in rows]

    def _fitted(
        self,
        question: Question,
        whole: list[int],
        answer: AnswerTokens,
        instruction: str | None,
        length: int,
        room: int,
    ) -> Encoded:
        answer_ids = answer.ids
        prompt_ids = shortened(self.codec, question, whole, room, instruction)
        cut = len(prompt_ids) < len(whole)
        if len(prompt_ids) + len(answer_ids) > length:
            cut = True
            answer_room = max(length // 2, length - len(prompt_ids))
            if len(answer_ids) > answer_room:
                answer_ids = [*answer_ids[: answer_room - 1], self.codec.end_of(question)]
            prompt_ids = shortened(self.codec, question, whole, length - len(answer_ids), instruction)
        labels = [IGNORED_LABEL] * len(prompt_ids) + answer_ids
        return Encoded(prompt_ids + answer_ids, labels, cut, answer.own)


def prompt_room_of(tokenizer: Tokenizer, prompts: Sequence[Prompt], answers: Sequence[str], max_length: int) -> int:
    """Tokens that every prompt of a task may have: what its longest answer leaves, at least 3/4 of ``max_length``.

    Were each prompt cut to what its own answer leaves, the place where a prompt ends would tell the answer's length,
    and a model can learn the labels from that alone (agnews at 96 tokens: training loss 0.06, test accuracy below
    the majority class; docs/pitfalls.md).
    """
    return SampleTokens(tokenizer, prompts, answers).room(max_length)


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, max_length: int, instruction: str | None = None) -> list[int]:
    """Token ids of a prompt to be answered, at most ``max_length``: those that ``encode`` puts before the answer.

    A prompt that does not fit keeps its instruction and then, of what follows, as much of the
    beginning as of the end: the middle of the input is dropped. Without an instruction that is the
    first and the last half. An instruction longer than three quarters of the room is cut itself,
    because the end of a prompt ('Answer:') asks the question.

    Raises:
        DataError: a ``max_length`` below 4.
    """
    _check_max_length(max_length)
    codec = TextCodec(tokenizer)
    questions = codec.questions([prompt])
    return shortened(codec, questions[0], codec.prompt_ids(questions)[0], max_length, instruction)


def shortened(
    codec: TextCodec, question: Question, ids: list[int], room: int, instruction: str | None = None
) -> list[int]:
    """``ids`` of a whole question without its middle, so that ``room`` tokens remain; see ``encode_prompt``."""
    if len(ids) <= room:
        return ids
    # Counted by tokenising the beginning alone: a token that spans its end is counted too.
    kept = min(codec.count(question, instruction or ""), room * 3 // 4)
    head = kept + (room - kept) // 2
    return ids[:head] + ids[len(ids) - (room - head) :]


@dataclass(frozen=True)
class AnswerCollator:
    """Pads samples (dicts with input_ids and, optionally, labels) to the longest of the batch.

    Padding that a sample brings along (0 in its attention_mask) is taken out first. Other columns are
    ignored, but not one that a model would look at, such as an image.
    Returns int64 tensors of shape (batch, longest): input_ids, attention_mask (1 on tokens, from the
    lengths, so a pad token equal to end-of-sequence is safe) and, when the samples have them, labels
    (-100 on the padding).

    Args:
        n_tokens: rows of the model's embeddings; a batch with a larger id is refused. None: not looked at.
        input_names: what the model's forward takes; a column of such a name is an input.

    Raises:
        DataError: an input that would be dropped, columns of different lengths, an id beyond ``n_tokens``.
    """

    pad_token_id: int
    padding_side: str = "right"
    n_tokens: int | None = None
    input_names: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.padding_side not in ("left", "right"):
            raise DataError(f"padding_side is {shown(self.padding_side)}; it must be 'left' or 'right'.")
        if self.pad_token_id is None:
            raise DataError("pad_token_id is None; call prepare_tokenizer(tokenizer) first.")

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        if not samples:
            raise DataError("A batch has no samples; the collator needs at least one.")
        for index, sample in enumerate(samples):
            check_sample(sample, f"sample {index} of a batch", self.input_names)
        ids = self._column(samples, "input_ids")
        columns = {
            "input_ids": (ids, self.pad_token_id),
            "attention_mask": ([[1] * len(row) for row in ids], 0),
        }
        if "labels" in samples[0]:
            columns["labels"] = (self._column(samples, "labels"), IGNORED_LABEL)
        return {name: self._pad(rows, value) for name, (rows, value) in columns.items()}

    def _column(self, samples: Sequence[Mapping[str, Any]], name: str) -> list[list[int]]:
        """The ids or labels of each sample, without padding of its own."""
        rows = []
        for index, sample in enumerate(samples):
            place, length = f"sample {index} of a batch", len(sample["input_ids"])
            for key in (name, "attention_mask"):
                if key in sample and len(sample[key]) != length:
                    raise DataError(f"{place} has {length} input_ids and {len(sample[key])} {key}; give one for each.")
            mask = sample.get("attention_mask", [1] * length)
            row = [int(number) for number, real in zip(sample[name], mask, strict=True) if real]
            self._check_ids(row, f"{place} has the number %d in its {name}")
            rows.append(row)
        return rows

    def _check_ids(self, ids: list[int], place: str) -> None:
        kept = [number for number in ids if number != IGNORED_LABEL]
        if kept and min(kept) < 0:
            raise DataError(f"{place % min(kept)}, which is no token id; use {IGNORED_LABEL} for what has no label.")
        if self.n_tokens is not None and kept and max(kept) >= self.n_tokens:
            raise DataError(
                f"{place % max(kept)}, but the model has {self.n_tokens} embeddings; call "
                f"model.resize_token_embeddings(len(tokenizer)) before get_peft_model."
            )

    def _pad(self, rows: list[list[int]], value: int) -> torch.Tensor:
        import torch

        longest = max(len(row) for row in rows)
        padding = [[value] * (longest - len(row)) for row in rows]
        if self.padding_side == "left":
            padded = [pad + row for pad, row in zip(padding, rows, strict=True)]
        else:
            padded = [row + pad for pad, row in zip(padding, rows, strict=True)]
        return torch.tensor(padded, dtype=torch.long)


def _check_max_length(max_length: Any) -> None:
    if not isinstance(max_length, int) or max_length < SMALLEST_MAX_LENGTH:
        raise DataError(
            f"max_length is {shown(max_length)}; it must be a whole number of tokens, {SMALLEST_MAX_LENGTH} or more."
        )
