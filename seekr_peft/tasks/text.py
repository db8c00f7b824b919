"""The text of a sample, its tokens, and the way back: one rule for what is trained, asked, written down and scored.

    text of a sample = head + lead + answer + ending

``head`` is what a model is asked, and is decided by the prompt alone. ``lead`` stands between it and the answer: a
space where neither brings whitespace, the whitespace at the prompt's end that a tokenizer joins to what follows, or
what a chat template writes there. ``ending`` is the template's; without one an answer ends with end-of-sequence.

The whole text is tokenised once and cut behind the head, so that its tokens are the text's own. Where a tokenizer
joins characters across that place, the answer's tokens are others, whose decoding still is the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ..errors import DataError, cut, shown
from ..types import Tokenizer
from .conversation import Conversation, Prompt, check_chat_template

_WHITESPACE_AT_END = re.compile(r"\s+$")
_SPACES_AT_END = re.compile(r"[^\S\r\n]+$")

# What may follow whitespace at the end of a prompt: a word, and lines that are indented. And at the end of what a chat
# template writes before an answer: a word, as a trainer that goes by the common tokens finds in most samples.
_AFTER_A_PROMPT = ("a", "    a", "\ta")
_AFTER_A_TEMPLATE = ("a", "the", "I")
# Characters before that whitespace, enough to see which a tokenizer joins there.
_END_OF_PROMPT = 8
# Texts after which another one is tokenised as in the middle of a text.
_ANCHORS = (".", "a", "\n", "0", "的")
# Tokens of a prompt that are decoded together with what follows it.
_CONTEXT = 16
# What a chat template is given to see what it writes around an answer; no template has it in its own words.
_PROBE_ANSWER = "Zq0"


@dataclass(frozen=True)
class Question:
    """A prompt as a model is asked; see the module for ``head``, ``lead`` and ``ending``.

    ``separates``: ``lead`` is a space that goes only between a prompt and an answer without whitespace of their own.
    ``conversation`` is None for plain text.
    """

    head: str
    lead: str
    ending: str = ""
    separates: bool = False
    conversation: Conversation | None = None

    def answer_in(self, text: str) -> str:
        """The answer in the ``text`` that follows the head: without what leads to it, and up to the ending."""
        ending = self.ending.strip() or self.ending
        return self._without_lead(text.split(ending, 1)[0] if ending else text).rstrip()

    def _without_lead(self, text: str) -> str:
        if self.lead.startswith(text):
            # Cut off within it, nothing was answered.
            return ""
        if not self.separates and text.startswith(self.lead):
            return text[len(self.lead) :]
        # Also a tokenizer's one space for whatever whitespace there was.
        return text[1:] if self.lead.isspace() and re.match(r" (?!\s)", text) else text


@dataclass(frozen=True)
class AnswerTokens:
    """Ids of an answer up to its end; ``own``: together with the prompt's they are those of the whole text."""

    ids: list[int]
    own: bool


class TextCodec:
    """From the texts of samples to token ids and back, for one tokenizer as it is now.

    ``ends`` are the ids at which an answer ends: end-of-sequence and, once a conversation was asked, the token that
    ends a turn in the chat template; ``endless_template`` says that it has none.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._moved: dict[tuple[str, tuple[str, ...]], int] = {}
        self.ends = {tokenizer.eos_token_id}
        self._turn_end: int | None = None
        self.endless_template = False

    @cached_property
    def front(self) -> list[int]:
        """The special tokens that the tokenizer puts in front of a text."""
        return _front_ids(self._tokenizer)

    @cached_property
    def _added(self) -> dict[int, str]:
        return {index: str(token) for index, token in self._tokenizer.added_tokens_decoder.items()}

    @cached_property
    def _added_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._added.values(), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    @cached_property
    def _anchors(self) -> dict[str, list[int]]:
        return dict(zip(_ANCHORS, self._ids(list(_ANCHORS)), strict=True))

    def questions(self, prompts: Sequence[Prompt], place: str = "prompt") -> list[Question]:
        """What a model is asked for each prompt.

        Raises:
            DataError: a conversation that the chat template refuses, or no chat template.
        """
        self._learn_ends([_end_of(prompt) for prompt in prompts if isinstance(prompt, str)], _AFTER_A_PROMPT)
        return [
            self._plain_question(prompt) if isinstance(prompt, str) else self._chat_question(prompt, f"{place} {index}")
            for index, prompt in enumerate(prompts)
        ]

    def prompt_ids(self, questions: Sequence[Question]) -> list[list[int]]:
        """Ids of each question, whole."""
        return self._with_front(questions, [question.head for question in questions])

    def count(self, question: Question, beginning: str) -> int:
        """Tokens of the question up to the end of ``beginning``, which is somewhere in it; 0 when it is not."""
        if beginning not in question.head:
            # The whitespace at its end may go with the answer.
            beginning = beginning.rstrip()
        place = question.head.find(beginning)
        if not beginning or place < 0:
            return 0
        return len(self._with_front([question], [question.head[: place + len(beginning)]])[0])

    def end_of(self, question: Question) -> int:
        """The id at which an answer to the question ends."""
        end = None if question.conversation is None else self._turn_end
        return self._tokenizer.eos_token_id if end is None else end

    def answers(
        self,
        questions: Sequence[Question],
        prompt_ids: Sequence[list[int]],
        answers: Sequence[str],
        place: str = "answer",
    ) -> list[AnswerTokens]:
        """Ids of each answer with its end, to follow the ids of its whole question.

        Raises:
            DataError: an answer with a token in it at which answers end.
        """
        tails = self.tails(questions, answers, place)
        texts = [question.head + tail for question, tail in zip(questions, tails, strict=True)]
        wholes = self._with_front(questions, texts)
        found = []
        for index, (question, own_prompt, whole, tail) in enumerate(
            zip(questions, prompt_ids, wholes, tails, strict=True)
        ):
            ids, own = self._cut(question, own_prompt, whole, tail)
            if question.conversation is None:
                self._refuse_end(ids, answers[index], f"{place} {index}")
                ids = [*ids, self._tokenizer.eos_token_id]
            found.append(AnswerTokens(ids, own))
        return found

    def tails(self, questions: Sequence[Question], answers: Sequence[str], place: str = "answer") -> list[str]:
        """What follows each question's head in the text of its sample, end-of-sequence aside; raises as ``answers``."""
        rows = enumerate(zip(questions, answers, strict=True))
        return [self._tail(question, answer, f"{place} {index}") for index, (question, answer) in rows]

    def written(self, question: Question, context: Sequence[int], ids: Sequence[int]) -> str:
        """The answer that a model wrote as ``ids`` after the ids ``context`` of the question.

        Up to its end, without what separates it from the prompt and without whitespace at its end; leading whitespace
        of its own and special tokens stay.
        """
        return question.answer_in(self._following(question, list(context), list(ids[: self.length(ids)])))

    def length(self, ids: Sequence[int]) -> int:
        """How many of an answer's ids come before its end."""
        return next((place for place, index in enumerate(ids) if index in self.ends), len(ids))

    def reference(self, question: Question, answer: str) -> str:
        """``answer`` as it is written when a model gives it; a template's changes to it are no part of that."""
        if question.conversation is not None:
            return answer
        return question.answer_in(_lead(question, answer) + answer)

    # ---------------------------------------------------------------- questions

    def _plain_question(self, prompt: str) -> Question:
        if not prompt[-1:].isspace():
            return Question(prompt, " ", separates=True)
        head, moved = self._parted(prompt, _AFTER_A_PROMPT)
        return Question(head, moved)

    def _chat_question(self, conversation: Conversation, place: str) -> Question:
        asked = self._rendered(conversation, None, place)
        answered = self._rendered(conversation, _PROBE_ANSWER, place)
        common = _common(asked, answered)
        lead, _, ending = answered[common:].partition(_PROBE_ANSWER)
        self._learn_ends([_end_of(asked[:common])], _AFTER_A_TEMPLATE)
        head, moved = self._parted(asked[:common], _AFTER_A_TEMPLATE)
        self._learn_turn_end(ending)
        return Question(head, moved + lead, ending, conversation=conversation)

    def _parted(self, text: str, continuations: tuple[str, ...]) -> tuple[str, str]:
        """What of a text is asked, and the whitespace at its end that goes with the answer."""
        cut = len(text) - self._moved[_end_of(text), continuations]
        return text[:cut], text[cut:]

    def _learn_ends(self, ends: Sequence[str], continuations: tuple[str, ...]) -> None:
        """Decide how much of the whitespace at each of these ends of prompts goes with the answer."""
        new = sorted(end for end in set(ends) if (end, continuations) not in self._moved)
        heads = {end: _heads(end, whole_first=continuations == _AFTER_A_TEMPLATE) for end in new}
        texts = [text for end in new for text in (*heads[end], *(end + more for more in continuations))]
        ids = dict(zip(texts, self._ids(texts), strict=True))
        for end in new:
            continued = [ids[end + more] for more in continuations]
            # The first whose tokens stay whatever follows, or nearly so.
            kept = max(heads[end], key=lambda head: sum(_starts(whole, ids[head]) for whole in continued))
            self._moved[end, continuations] = len(end) - len(kept)

    def _learn_turn_end(self, ending: str) -> None:
        ids = self._ids([ending])[0] if ending else []
        # Some tokenizers have added tokens of whitespace.
        end = next((index for index in ids if not self._added.get(index, " ").isspace()), None)
        self.endless_template = self.endless_template or end is None
        if end is not None:
            self._turn_end = end
            self.ends.add(end)

    def _rendered(self, conversation: Conversation, answer: str | None, place: str) -> str:
        """The conversation as text; with None up to where the answer begins."""
        messages = [dict(message) for message in conversation.messages]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        check_chat_template(self._tokenizer)
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tools=conversation.tools,
                tokenize=False,
                add_generation_prompt=answer is None,
                **(conversation.settings or {}),
            )
        except Exception as error:
            # Templates are programs, and refuse what they do not know in many ways.
            detail = cut(" ".join(str(error).split()))
            raise DataError(
                f"{place}: the tokenizer's chat template refuses the messages ({detail}); change them."
            ) from error

    # ------------------------------------------------------------------ answers

    def _tail(self, question: Question, answer: str, place: str) -> str:
        for end in map(self._tokenizer.convert_ids_to_tokens, sorted(self.ends)):
            if end in answer.rstrip():
                raise _ended_early(place, answer, end)
        if question.conversation is None:
            return (_lead(question, answer) + answer).rstrip()
        text = self._rendered(question.conversation, answer, place)
        if not text.startswith(question.head):
            raise DataError(
                f"{place}: the chat template writes another prompt for the answer {shown(answer, 60)}, so the prompt "
                f"that is asked would not be the one that is trained; use a template whose prompt is the same for all."
            )
        return text[len(question.head) :]

    def _refuse_end(self, ids: list[int], answer: str, place: str) -> None:
        if self._tokenizer.eos_token_id in ids:
            raise _ended_early(place, answer, self._tokenizer.eos_token)

    def _cut(self, question: Question, prompt: list[int], whole: list[int], tail: str) -> tuple[list[int], bool]:
        """Ids that follow ``prompt`` for the text ``tail``, and whether they are those of the whole text."""
        own = whole[len(prompt) :] if _starts(whole, prompt) else None
        answer = question.answer_in(tail)
        if own is not None and self.written(question, prompt, own) == answer:
            return own, True
        other = self._continued(tail)
        if own is None or (other != own and self.written(question, prompt, other) == answer):
            return other, False
        return own, True

    def _continued(self, text: str) -> list[int]:
        """Ids of ``text`` in the middle of another one: without the space that some tokenizers put in front."""
        ids_of = {token: index for index, token in self._added.items()}
        pieces = self._added_pattern.split(text) if ids_of else [text]
        return [index for piece in pieces if piece for index in self._piece(piece, ids_of.get(piece))]

    def _piece(self, text: str, token: int | None) -> list[int]:
        """Ids of a text without added tokens in it, or of such a token."""
        for anchor, before in self._anchors.items():
            whole = self._ids([anchor + text])[0] if token is None else [*before, token]
            ids = whole[len(before) :]
            if _starts(whole, before) and self._following(Question(anchor, ""), before, ids) == text:
                return ids
        # A token that is written with a space of its own is spelt.
        return self._ids([text])[0] if token is None else self._piece(text, None)

    # ------------------------------------------------------------- ids and back

    def _with_front(self, questions: Sequence[Question], texts: list[str]) -> list[list[int]]:
        # A chat template writes its own special tokens.
        fronts = [[] if question.conversation else self.front for question in questions]
        return [front + ids for front, ids in zip(fronts, self._ids(texts), strict=True)]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return plain_ids(self._tokenizer, texts)

    def _following(self, question: Question, context: list[int], ids: list[int]) -> str:
        """What ``ids`` add to the text of the question, of which ``context`` are the ids, or the last of them.

        Decoded together, because many tokenizers drop the space in front of the first token that they decode.
        """
        near = context[-_CONTEXT:]
        before = self._decoded(near)
        if "\ufffd" in before:
            # Cut within a character.
            near, before = context, self._decoded(context)
        both = self._decoded(near + ids)
        text = both[_common(before, both) :]
        last = self._tokenizer.added_tokens_decoder.get(near[-1]) if near else None
        if last is not None and last.rstrip:
            # The token stands for the whitespace behind it, so it is not decoded; a space after it is the answer's.
            return text
        if question.head[-1:].isspace() and not before.endswith(question.head[-1]):
            # A tokenizer of words: its decoding puts a space between any two, and no other whitespace.
            return text.removeprefix(" ")
        return text

    def _decoded(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def plain_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text without the tokenizer's own special tokens; those in the text are tokens all the same."""
    if not texts:
        return []
    # verbose=False: no "longer than the maximum" message about text that is shortened afterwards.
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def _front_ids(tokenizer: Tokenizer) -> list[int]:
    for probe in _ANCHORS:
        plain, whole = plain_ids(tokenizer, [probe])[0], list(tokenizer(probe)["input_ids"])
        places = [place for place in range(len(whole)) if plain and whole[place : place + len(plain)] == plain]
        if places:
            return whole[: places[0]]
    return [index for index in tokenizer("")["input_ids"] if index != tokenizer.eos_token_id]


def _lead(question: Question, answer: str) -> str:
    return "" if question.separates and answer[:1].isspace() else question.lead


def _end_of(prompt: str) -> str:
    """The whitespace at the end of a prompt, with a few characters before it."""
    bare = prompt.rstrip()
    return bare[-_END_OF_PROMPT:] + prompt[len(bare) :]


def _heads(end: str, whole_first: bool) -> list[str]:
    """What of a prompt's end may be asked, the usual first: without trailing spaces, as it is, without breaks too.

    Most tokenizers join a space to the word that follows, and some a break to the indentation. None is empty.
    """
    heads = [_SPACES_AT_END.sub("", end), end, _WHITESPACE_AT_END.sub("", end)]
    if whole_first:
        heads.insert(0, end)
    return [head for head in dict.fromkeys(heads) if head] or [end]


def _starts(ids: list[int], beginning: list[int]) -> bool:
    return ids[: len(beginning)] == beginning


def _common(text: str, other: str) -> int:
    """Characters that both begin with."""
    if other.startswith(text):
        return len(text)
    return next((place for place, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), len(other))


def _ended_early(place: str, answer: str, end: str) -> DataError:
    return DataError(
        f"{place}: the answer {shown(answer, 60)} holds {shown(end, 60)}, the token at which an answer ends, so what "
        f"follows could never be given; take it out (the end is put there by itself), or write it with others."
    )
