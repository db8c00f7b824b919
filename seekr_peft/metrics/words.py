"""What a word is in text of any script, for the metrics that compare words."""

from __future__ import annotations

import re
import unicodedata

# Scripts written without spaces: every character is a word of its own there.
UNSPACED = r"\u3040-\u30FF\u3400-\u4DBF\u4E00-\u9FFF\uF900-\uFAFF\u0E00-\u0EFF"
_UNSPACED_CHARACTER = re.compile(f"[{UNSPACED}]")
_WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")


def composed(text: str) -> str:
    """``text`` in one form, however its accents were composed (NFC)."""
    return unicodedata.normalize("NFC", text)


def words_in(text: str) -> list[str]:
    """The words in lower case, or, of a text without any, its characters, so that code such as ')' can match."""
    text = composed(text).lower()
    return _WORD.findall(text) or [character for character in text if not character.isspace()]


def split_by_spaces(text: str) -> list[str]:
    """What stands between spaces; of a script without spaces each character."""
    return _UNSPACED_CHARACTER.sub(r" \g<0> ", text).split()
