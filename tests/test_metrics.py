"""Metrics: what counts as the same answer, which letter is read, and words of any script."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from seekr_peft.errors import DataError
from seekr_peft.evaluation.metrics import METRICS, exact_match, option_letter, rouge_l, score_predictions
from seekr_peft.tasks import METRICS as METRIC_NAMES

ascii_text = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60)


def test_the_metrics_a_task_may_name_are_the_ones_defined():
    assert tuple(METRICS) == METRIC_NAMES


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


@given(st.text(max_size=40), st.text(max_size=40), st.sampled_from(list(METRICS)))
def test_every_score_lies_between_0_and_1(prediction, answer, metric):
    assert 0.0 <= METRICS[metric](prediction, answer) <= 1.0


@given(st.text(min_size=1, max_size=40).filter(str.strip), st.sampled_from(["accuracy", "rougeL"]))
def test_a_text_equals_itself(text, metric):
    assert METRICS[metric](text, text) == pytest.approx(1.0)


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
