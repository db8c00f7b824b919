"""Metrics that say right or wrong: the same text, the same option letter, the same number."""

from __future__ import annotations

import re

from .words import composed

_LATIN = r"A-Za-z0-9\u00C0-\u024F"
_OPTION = re.compile(rf"(?<![{_LATIN}'\u2019])[A-H](?![{_LATIN}'\u2019])")
_LONE_LETTER = re.compile(r"[\s(\[*\"']*([a-h])[\s)\].:,*\"']*")

_LINE_BREAK = re.compile(r"\r\n|\r|\n")
_LAID_OUT = re.compile(r"\A\s|[\r\n]")

_MINUS = "\u2212"
# A sign after a word, a number or a bracket subtracts; a comma is part of a number between groups of three digits.
_NUMBER = re.compile(
    rf"(?:(?<![\w)\].])[-+{_MINUS}])?"
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?<![\d.])(?=\.\d))(?:\.\d+)?"
    r"(?:[eE][-+]?\d{1,3}(?!\d))?"
)


def exact_match(prediction: str, answer: str) -> float:
    """1.0 when both are the same text, else 0.0.

    Case, surrounding and repeated whitespace and one trailing period do not count. In an answer with several lines or
    with indentation, such as code, the lines and their indentation do; repeated spaces within a line and empty lines
    between others still do not. An empty prediction is wrong.
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


def numeric_match(prediction: str, answer: str) -> float:
    """1.0 when the last number of both is the same, as GSM8K is scored, else 0.0.

    '#### 1,200', '$1200.00' and 'so it is 1.2e3.' are the same number; commas stand between thousands, so that '1,5' is
    a 1 and a 5, as '1/2' is a 1 and a 2. Digits of any script count. Numbers are compared exactly, not as floats. Text
    without a number is wrong.
    """
    number = _last_number(prediction)
    return float(number is not None and number == _last_number(answer))


def _normalized(text: str, by_lines: bool) -> str:
    text = composed(text).casefold()
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


def _last_number(text: str) -> object | None:
    from decimal import Decimal

    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace(_MINUS, "-")) if found else None
