"""SARI, which looks at what a simplified text keeps, adds and deletes of its source."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from .words import composed, split_by_spaces

_LONGEST_GRAM = 4

# The tokens of mteval-v13a, as sacrebleu has them: symbols apart, a period or comma apart unless between digits.
_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
_APART = (
    (re.compile(r"([{-~\[-` -&(-+:-@/])"), r" \1 "),
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def sari(prediction: str, answer: str, source: str) -> float:
    """(F1 of what was added + F1 of what was kept + precision of what was deleted) / 3, means over 1- to 4-grams.

    Xu et al. 2016 (aclanthology.org/Q16-1029), as the ``evaluate`` library and TRACE (20Minuten) compute it, there from
    0 to 100: lower case, tokens of mteval-v13a, 0/0 = 1, and the recall of what was kept over all occurrences. Chinese,
    Japanese and Thai are split into characters.

    By that definition the answer itself may score a little below 1 where a word is there several times, and an empty
    prediction above 0, since it deletes what the answer deletes too.

    Args:
        source: the text to simplify; in a task the prompt without its ``instruction``. TRACE's prompts have none apart,
            so that the source is the whole prompt, as in the benchmark.
    """
    return sari_of(source, prediction, [answer])


def sari_of(source: str, prediction: str, references: Sequence[str]) -> float:
    """``sari`` with several right simplifications."""
    ours, theirs, wanted = _tokens(source), _tokens(prediction), [_tokens(reference) for reference in references]
    total = 0.0
    for n in range(1, _LONGEST_GRAM + 1):
        total += _keep_add_delete(_grams(ours, n), _grams(theirs, n), [_grams(tokens, n) for tokens in wanted])
    return total / (3 * _LONGEST_GRAM)


def _keep_add_delete(source: Counter[str], prediction: Counter[str], references: list[Counter[str]]) -> float:
    """The sum of the three scores for the n-grams of one length."""
    wanted: Counter[str] = sum(references, Counter())
    # Counts of all references together against as many copies of the source and the prediction.
    source, prediction = (_times(grams, len(references)) for grams in (source, prediction))

    kept, to_keep = source & prediction, source & wanted
    kept_rightly = kept & wanted
    keep = _f1(_ratio(_shares(kept_rightly, kept), len(kept)), _ratio(kept_rightly.total(), to_keep.total()))

    added, to_add = set(prediction) - set(source), set(wanted) - set(source)
    add = _f1(_ratio(len(added & to_add), len(added)), _ratio(len(added & to_add), len(to_add)))

    deleted = source - prediction
    delete = _ratio(_shares(deleted - wanted, deleted), len(deleted))
    return keep + add + delete


def _times(grams: Counter[str], n: int) -> Counter[str]:
    return Counter({gram: n * count for gram, count in grams.items()})


def _shares(part: Counter[str], whole: Counter[str]) -> float:
    return sum(count / whole[gram] for gram, count in part.items())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _grams(tokens: Sequence[str], n: int) -> Counter[str]:
    return Counter(" ".join(tokens[start : start + n]) for start in range(len(tokens) - n + 1))


def _tokens(text: str) -> list[str]:
    text = _replaced(composed(text).lower().replace("-\n", "").replace("\n", " "), _ENTITIES)
    for pattern, spaced in _APART:
        text = pattern.sub(spaced, f" {text} ")
    return split_by_spaces(text)


def _replaced(text: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        text = text.replace(old, new)
    return text
