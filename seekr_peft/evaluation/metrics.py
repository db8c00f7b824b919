"""Scores of one prediction against one answer, each from 0 to 1."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from ..errors import DataError, shown
from ..tasks.samples import suggestion

_LATIN = r"A-Za-z0-9\u00C0-\u024F"
_OPTION = re.compile(rf"(?<![{_LATIN}'\u2019])[A-H](?![{_LATIN}'\u2019])")
_LONE_LETTER = re.compile(r"[\s(\[*\"']*([a-h])[\s)\].:,*\"']*")

_LINE_BREAK = re.compile(r"\r\n|\r|\n")
_LAID_OUT = re.compile(r"\A\s|[\r\n]")

# Scripts written without spaces: every character is a word of its own there.
_UNSPACED = r"\u3040-\u30FF\u3400-\u4DBF\u4E00-\u9FFF\uF900-\uFAFF\u0E00-\u0EFF"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


def exact_match(prediction: str, answer: str) -> float:
    """1.0 when both are the same text, else 0.0.

    Case, surrounding and repeated whitespace and one trailing period do not count. In an answer with several lines or
    with indentation, such as code, the lines and their indentation do; repeated spaces within a line and empty lines
    between others still do not.
    """
    by_lines = bool(_LAID_OUT.search(answer.rstrip()))
    return float(_normalized(prediction, by_lines) == _normalized(answer, by_lines))


def option_letter(prediction: str, answer: str) -> float:
    """1.0 when the first option letter (A to H) of both is the same, else 0.0.

    A letter counts where it stands alone, as in 'B', '(B)', 'B.', 'Answer: B' or 'B' + newline +
    reasons; a small letter only when it is the whole first line. Text without a letter is wrong.
    """
    letter = _first_letter(prediction)
    return float(letter is not None and letter == _first_letter(answer))


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L F-measure of rouge_score, without stemming, on words of any script.

    ASCII text is split as rouge_score does. Other letters are kept (its own tokenizer drops them),
    Chinese, Japanese and Thai are split into characters, and a text without any word into its
    characters, so that code such as ')' can match.
    """
    return float(_rouge_scorer().score(answer, prediction)["rougeL"].fmeasure)


METRICS: dict[str, Callable[[str, str], float]] = {
    "accuracy": exact_match,
    "option_letter": option_letter,
    "rougeL": rouge_l,
}
"""The metrics by the name that a task gives."""


def score_predictions(metric: str, predictions: Sequence[str], answers: Sequence[str]) -> tuple[float, list[float]]:
    """Mean score and the score of each prediction, all from 0 to 1.

    Raises:
        DataError: an unknown metric, no predictions, or not as many as answers.
    """
    if metric not in METRICS:
        raise DataError(
            f"The metric {shown(metric)} is unknown; choose one of {', '.join(METRICS)}{suggestion(metric, METRICS)}."
        )
    if not predictions or len(predictions) != len(answers):
        raise DataError(
            f"There are {len(predictions)} predictions for {len(answers)} answers; a score needs "
            "one prediction an answer, and at least one."
        )
    pairs = zip(predictions, answers, strict=True)
    scores = [METRICS[metric](prediction, answer) for prediction, answer in pairs]
    return sum(scores) / len(scores), scores


class UnicodeTokenizer:
    """Lower-case words for rouge_score; its interface asks for one method, ``tokenize``."""

    def tokenize(self, text: str) -> list[str]:
        text = unicodedata.normalize("NFC", text).lower()
        return _WORD.findall(text) or [character for character in text if not character.isspace()]


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False, tokenizer=UnicodeTokenizer())


def _normalized(text: str, by_lines: bool) -> str:
    text = unicodedata.normalize("NFC", text).casefold()
    words = _lines(text) if by_lines else " ".join(text.split())
    # '.' alone keeps its period, so that an empty prediction never equals an answer.
    return words[:-1].rstrip() or words if words.endswith((".", "。")) else words


def _lines(text: str) -> str:
    """The lines that are not empty, each with its own indentation and one space between words; a first break stays."""
    lines = [line.rstrip() for line in _LINE_BREAK.split(text.rstrip())]
    kept = [line[: len(line) - len(line.lstrip())] + " ".join(line.split()) for line in lines if line]
    return "\n".join(kept if lines[0] else ["", *kept])


def _first_letter(text: str) -> str | None:
    found = _OPTION.search(text)
    if found:
        return found.group()
    first_line = text.strip().split("\n", 1)[0]
    lone = _LONE_LETTER.fullmatch(first_line)
    return lone.group(1).upper() if lone else None
