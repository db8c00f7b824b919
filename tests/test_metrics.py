"""Metrics: what counts as the same answer, which letter or number is read, and words of any script."""

from __future__ import annotations

import re
import string
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from seekr_peft.errors import DataError
from seekr_peft.metrics import (
    METRICS,
    edit_similarity,
    exact_match,
    numeric_match,
    option_letter,
    rouge_l,
    sari,
    score_predictions,
    token_f1,
)
from seekr_peft.metrics.simplification import sari_of

ascii_text = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60)


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [("Sports", "sports"), ("  World \n", "World"), ("no.", "No"), ("very  good", "very good")],
)
def test_exact_match_ignores_form(prediction, answer):
    assert exact_match(prediction, answer) == 1.0


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [("good", "very good"), ("", "."), ("11", "11.5"), ("Sports News", "Sports"), ("", "a")],
)
def test_exact_match_refuses_other_answers(prediction, answer):
    assert exact_match(prediction, answer) == 0.0


@pytest.mark.parametrize(
    "prediction",
    [
        "B",
        "B.",
        "(B)",
        "B\nbecause A is",
        "Answer: B",
        "b",
        " (b) ",
        "[B]",
        "选B。",
        '"B"',
        "**B**",
    ],
)
def test_the_option_letter_is_found(prediction):
    assert option_letter(prediction, "B\nBecause the moon is round.") == 1.0


@pytest.mark.parametrize(
    "prediction",
    ["", "A", "C. B", "Bold", "neutral", "a bird", "B's", "I think so", "be", "ÉB", "AB", "3B"],
)
def test_another_letter_or_none_is_wrong(prediction):
    assert option_letter(prediction, "B") == 0.0


def test_an_answer_without_a_letter_is_never_right():
    assert option_letter("none", "none") == 0.0


@given(ascii_text, ascii_text)
def test_rouge_on_ascii_words_is_that_of_the_package(prediction, answer):
    words = "w0rd "  # so that neither text is without a word
    theirs = RougeScorer(["rougeL"]).score(words + answer, words + prediction)["rougeL"].fmeasure
    assert rouge_l(words + prediction, words + answer) == pytest.approx(theirs)


def test_rouge_by_hand():
    # longest common subsequence "the cat mat" = 3; precision 3/3, recall 3/6
    assert rouge_l("the cat mat", "the cat sat on the mat") == pytest.approx(2 / 3)


def test_rouge_splits_chinese_into_characters():
    # of 支持 and 不支持 the common part has 2 characters: precision 2/2, recall 2/3
    assert rouge_l("支持", "不支持") == pytest.approx(0.8)


def test_rouge_keeps_umlauts():
    assert rouge_l("Grösse", "Größe") == 0.0
    assert rouge_l("Äpfel", "Öpfel") == 0.0
    assert rouge_l("schöne Äpfel", "schöne Birnen") == pytest.approx(0.5)


def test_rouge_does_not_depend_on_how_an_umlaut_is_composed():
    assert rouge_l("u\u0308ber", "über") == 1.0


def test_rouge_compares_characters_where_there_are_no_words():
    assert rouge_l(")", ") ") == 1.0
    assert rouge_l("x", ")") == 0.0


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40), st.sampled_from(list(METRICS)))
def test_every_score_lies_between_0_and_1(prediction, answer, source, metric):
    mean, scores = score_predictions(metric, [prediction], [answer], [source])
    assert [mean] == scores and 0.0 <= mean <= 1.0


@given(
    st.text(min_size=1, max_size=40).filter(str.strip), st.sampled_from(["accuracy", "rougeL", "f1", "edit_similarity"])
)
def test_a_text_equals_itself(text, metric):
    assert METRICS[metric](text, text) == pytest.approx(1.0)


WITHOUT_SOURCE = [name for name in METRICS if name != "sari"]


@given(st.text(min_size=1, max_size=40).filter(str.strip), st.sampled_from(WITHOUT_SOURCE))
def test_an_empty_prediction_is_worth_nothing(answer, metric):
    assert METRICS[metric]("", answer) == METRICS[metric](" \n", answer) == 0.0


@pytest.mark.parametrize("metric", WITHOUT_SOURCE)
def test_an_empty_answer_has_a_score(metric):
    assert METRICS[metric]("a 1", "") == 0.0


def test_mean_and_single_scores():
    assert score_predictions("accuracy", ["a", "b", "c", "d"], ["a", "b", "c", "x"]) == (
        0.75,
        [1.0, 1.0, 1.0, 0.0],
    )


def test_an_unknown_metric_is_refused_with_a_suggestion():
    with pytest.raises(DataError, match=r"'rougel' is unknown.*did you mean 'rougeL'"):
        score_predictions("rougel", ["a"], ["a"])


@pytest.mark.parametrize(("predictions", "answers"), [([], []), (["a"], ["a", "b"])])
def test_counts_must_agree(predictions, answers):
    with pytest.raises(DataError, match=rf"{len(predictions)} predictions for {len(answers)}"):
        score_predictions("accuracy", predictions, answers)


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("    return x", "    return x"),
        ("    return   x ", "    return x"),
        ("    RETURN x.\n", "    return x"),
        ("a\n  b", "a \n\n  b\n"),
        ("a\r\n  b", "a\n  b"),
        ("\n  a", "\n  a"),
        ("red", "red\n"),
        ("\tred", "red"),
    ],
)
def test_layout_that_does_not_matter(prediction, answer):
    assert exact_match(prediction, answer) == 1.0


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("return x", "    return x"),
        ("  return x", "    return x"),
        ("\treturn x", "    return x"),
        ("a\nb", "a\n  b"),
        ("a   b", "a\n  b"),
        ("a b", "a\nb"),
        ("  a", "\n  a"),
        ("", "  ."),
    ],
)
def test_indentation_and_lines_count_where_the_answer_has_them(prediction, answer):
    assert exact_match(prediction, answer) == 0.0


# ------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("She has 3 boxes of 6, so 18.", "3 * 6 = <<3*6=18>>18\n#### 18"),
        ("$1,234.50", "1234.5"),
        ("#### 1,200", "1.2e3"),
        ("x = -5", "\u22125"),
        ("10 - 5", "5"),
        ("3-5", "5"),
        ("(2)-7", "7"),
        ("+.5", "0.50"),
        ("４２", "42"),
        ("٤٢", "42"),
        ("5 m²", "5"),
        ("0.1", "0.10000000000000000000"),
        ("v1.2.3", "3"),
        ("12,3456", "3456"),
    ],
)
def test_the_same_number_at_the_end(prediction, answer):
    assert numeric_match(prediction, answer) == numeric_match(answer, prediction) == 1.0


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("18 of 20", "18"),
        ("", "1"),
        ("eighteen", "18"),
        ("none", "none"),
        ("5", "-5"),
        ("1,5", "1.5"),
        ("9007199254740993", "9007199254740992"),
        ("0.1", "0.10000000000000000001"),
    ],
)
def test_another_number_or_none_is_wrong(prediction, answer):
    assert numeric_match(prediction, answer) == 0.0


# ------------------------------------------------------------------ F1


def official_squad_f1(prediction: str, answer: str) -> float:
    """evaluate-v1.1.py of SQuAD, written out again."""

    def tokens(text: str) -> list[str]:
        text = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split()).split()

    ours, theirs = tokens(prediction), tokens(answer)
    same = sum((Counter(ours) & Counter(theirs)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)


@given(ascii_text, ascii_text)
def test_f1_on_ascii_is_that_of_squad(prediction, answer):
    prediction, answer = "w " + prediction, answer + " w"
    assert token_f1(prediction, answer) == pytest.approx(official_squad_f1(prediction, answer))


def test_f1_by_hand():
    # cat, sat against cat, ran, away: precision 1/2, recall 1/3
    assert token_f1("The cat sat.", "a cat ran away") == pytest.approx(0.4)
    # red, red, red against red, red, hat: precision 2/3, recall 2/3
    assert token_f1("red red red", "Red, red hat") == pytest.approx(2 / 3)


def test_f1_takes_chinese_apart_and_drops_its_punctuation():
    # of 支持 and 不支持 the common part has 2 characters: precision 2/2, recall 2/3
    assert token_f1("支持。", "不支持") == pytest.approx(0.8)
    assert token_f1("«Äpfel»", "äpfel") == token_f1("u\u0308ber", "Über") == 1.0


def test_f1_of_an_answer_without_words():
    assert token_f1("The", "the") == 1.0
    assert token_f1("a", "the") == token_f1("", "the") == token_f1("!", "?") == 0.0


# ------------------------------------------------------------------ edit similarity


def longest_common_subsequence(a: str, b: str) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        before = row
        row = [0]
        for place, y in enumerate(b):
            row.append(before[place] + 1 if x == y else max(before[place + 1], row[-1]))
    return row[-1]


@given(st.text("abc (é", min_size=1, max_size=12).filter(str.strip), st.text("abc (é", min_size=1, max_size=12))
def test_edit_similarity_counts_the_longest_common_subsequence(prediction, answer):
    expected = 2 * longest_common_subsequence(prediction, answer) / (len(prediction) + len(answer))
    assert edit_similarity(prediction, answer) == pytest.approx(expected)


def test_edit_similarity_by_the_example_of_fuzzywuzzy():
    # Its readme: fuzz.ratio("this is a test", "this is a test!") is 97; 14 of the 15 characters, 2 * 14 / 29.
    assert edit_similarity("this is a test", "this is a test!") == pytest.approx(28 / 29)


def test_placeholders_of_py150_are_read_as_what_they_stand_for():
    assert edit_similarity("f ( 'utf-8' , 0 , '' )", "f ( '<STR_LIT:utf-8>' , <NUM_LIT> , '<STR_LIT>' )") == 1.0
    assert edit_similarity("f ( 7 )", "f ( <NUM_LIT:7> )") == 1.0
    assert edit_similarity("<STR_LIT>", "<STR_LIT>") == 1.0


# ------------------------------------------------------------------ SARI

SPECIES = "About 95 species are currently accepted ."
REFERENCES = [
    "About 95 species are currently known .",
    "About 95 species are now accepted .",
    "95 species are now accepted .",
]


def test_sari_by_the_published_example():
    # The example of the ``evaluate`` library, whose sentences are those of the metric's authors.
    score = sari_of(SPECIES, "About 95 you now get in .", REFERENCES)
    assert 100 * score == pytest.approx(26.953601953601954, abs=1e-12)


def test_sari_by_hand():
    # From "a b c" to "a b", where "a c" is right.
    # 1: kept a of a, b (1/2) and of a, c (1/2): 1/2; nothing to add: 1; deleted c, wrongly: 0
    # 2: kept ab, wrongly, nothing to keep: 0 and 1, so 0; ac not added: 0; deleted bc, rightly: 1
    # 3: nothing to keep or to add: 1, 1; deleted abc, rightly: 1
    # 4: nothing: 1, 1, 1
    assert sari("a b", "a c", "a b c") == pytest.approx((1 / 2 + 1 + 0 + 0 + 0 + 1 + 3 + 3) / 12)


def test_sari_counts_occurrences():
    # From "a a b" to "a b", where "a a" is right.
    # 1: kept a once, b once; a rightly: precision (1 + 0) / 2, recall 1 / 2; nothing to add: 1; deleted one a, wrongly
    # 2: ab is kept, and not right: 0; nothing is added, nothing to add: 1; deleted aa, wrongly: 0
    # 3: nothing to keep or to add; aab deleted, rightly: 3; 4: nothing: 3
    assert sari("a b", "a a", "a a b") == pytest.approx((1 / 2 + 1 + 0 + 0 + 1 + 0 + 3 + 3) / 12)


def test_sari_knows_neither_case_nor_spaces_before_punctuation():
    assert sari("ABOUT 95 species, known.", "About 95 species , known .", "about 95 Species .") == 1.0
    assert sari("Größe &amp; Form", "größe & form", "Die Größe") == 1.0
    assert sari("1,000 ist gross", "1,000 ist gross", "1,000.5 ist sehr gross") == 1.0


def test_sari_of_an_empty_prediction_is_what_its_deletions_are_worth():
    # 1: nothing to keep: 1; new not added: 0; all rightly deleted: 1; 2 to 4: nothing to keep or add, all rightly gone
    assert sari("", "new", "old words here now") == pytest.approx((1 + 0 + 1 + 3 + 3 + 3) / 12)
    # 1: both words not kept: 0; 1; 2 of 4 rightly deleted; 2: not kept: 0; 1; 2 of 3; 3 and 4: nothing to keep or add
    assert sari("", "old words", "old words here now") == pytest.approx((0 + 1 + 1 / 2 + 0 + 1 + 2 / 3 + 3 + 3) / 12)


def test_sari_takes_chinese_apart():
    assert 0 < sari("我支持", "我不支持", "我完全不支持他") < 1
