"""Metrics of how much two texts have in common: words, their longest common sequence, characters."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from functools import lru_cache
from typing import Any

from .words import composed, split_by_spaces, words_in

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_NAMED_LITERAL = re.compile(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", re.DOTALL)


def token_f1(prediction: str, answer: str) -> float:
    """The harmonic mean of precision and recall of the answer's words, as SQuAD 1.1 computes it.

    Case, punctuation (of any script) and the articles 'a', 'an' and 'the' do not count; how often a word is there
    does. Chinese, Japanese and Thai are split into characters. An empty prediction scores 0; an answer of nothing but
    articles and punctuation is matched by itself alone.
    """
    predicted, wanted = Counter(_squad_words(prediction)), Counter(_squad_words(answer))
    if not predicted or not wanted:
        return float(bool(prediction.strip()) and _bare(prediction) == _bare(answer))
    common = (predicted & wanted).total()
    return 2 * common / (predicted.total() + wanted.total())


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L F-measure of rouge_score, without stemming, on words of any script.

    ASCII text is split as rouge_score does. Other letters are kept (its own tokenizer drops them),
    Chinese, Japanese and Thai are split into characters, and a text without any word into its
    characters, so that code such as ')' can match. An empty prediction scores 0.
    """
    return float(_rouge_scorer().score(answer, prediction)["rougeL"].fmeasure)


def edit_similarity(prediction: str, answer: str) -> float:
    """2 M / T: of the T characters of both texts the share of those that the longest common subsequence M keeps.

    It is rapidfuzz's ``fuzz.ratio``, not rounded to a percent; CodeXGLUE and TRACE score Py150 by it. Case and
    whitespace count; the placeholders of Py150 are read as what they stand for (<STR_LIT:utf-8> is utf-8, <NUM_LIT> is
    0). An empty prediction scores 0.
    """
    from rapidfuzz.fuzz import ratio

    if not prediction.strip():
        return 0.0
    return float(ratio(_with_literals(prediction), _with_literals(answer))) / 100


class UnicodeTokenizer:
    """Lower-case words for rouge_score; its interface asks for one method, ``tokenize``."""

    def tokenize(self, text: str) -> list[str]:
        return words_in(text)


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False, tokenizer=UnicodeTokenizer())


def _squad_words(text: str) -> list[str]:
    bare = "".join(character for character in composed(text).lower() if not _is_punctuation(character))
    return split_by_spaces(_ARTICLE.sub(" ", bare))


def _is_punctuation(character: str) -> bool:
    # SQuAD's own are those of ASCII, symbols such as '$' among them.
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def _bare(text: str) -> list[str]:
    return composed(text).lower().split()


def _with_literals(text: str) -> str:
    text = text.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
    return composed(_NAMED_LITERAL.sub(r"\1", text))
