"""The accuracy matrix: figures worked by hand, laws, what it refuses, and its files."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from seekr_peft.errors import DataError
from seekr_peft.evaluation.matrix import FORMULAS, AccuracyMatrix

# Rows = task, columns = after training task:
#         a     b     c
#   a    0.9   0.95  0.6
#   b     -    0.8   0.7
#   c     -     -    0.5
# OP after c = (0.6 + 0.7 + 0.5) / 3 = 0.6
# BWT = ((0.6 - 0.9) + (0.7 - 0.8)) / 2 = -0.2, and divided by 3 = -0.4 / 3
# forgetting = ((0.95 - 0.6) + (0.8 - 0.7)) / 2 = 0.225
ROWS = [[0.9, 0.95, 0.6], [None, 0.8, 0.7], [None, None, 0.5]]

unit = st.floats(0, 1)


def matrix_of(rows: list[list[float | None]]) -> AccuracyMatrix:
    names = ["a", "b", "c", "d", "e", "f"][: len(rows)]
    return AccuracyMatrix.from_dict({"tasks": names, "scores": rows})


@st.composite
def full_rows(draw: st.DrawFn) -> list[list[float | None]]:
    size = draw(st.integers(2, 6))
    return [[draw(unit) if i <= j else None for j in range(size)] for i in range(size)]


def test_overall_performance_by_hand():
    assert matrix_of(ROWS).op() == pytest.approx(0.6)


def test_backward_transfer_by_hand():
    assert matrix_of(ROWS).bwt() == pytest.approx(-0.2)


def test_backward_transfer_divided_by_all_tasks_by_hand():
    assert matrix_of(ROWS).bwt_divided_by_all_tasks() == pytest.approx(-0.4 / 3)


def test_forgetting_by_hand_uses_the_best_earlier_score():
    assert matrix_of(ROWS).forgetting() == pytest.approx(0.225)


def test_figures_after_an_earlier_task():
    matrix = matrix_of(ROWS)
    assert matrix.op(after="b") == pytest.approx((0.95 + 0.8) / 2)
    assert matrix.bwt(after="b") == pytest.approx(0.05)
    assert matrix.forgetting(after="b") == pytest.approx(-0.05)


def test_scores_before_training_change_neither_figures_nor_scores():
    matrix = matrix_of(ROWS)
    matrix.record(after="a", on="c", score=1.0)
    assert (matrix.op(), matrix.bwt(), matrix.scores) == (
        matrix_of(ROWS).op(),
        matrix_of(ROWS).bwt(),
        ROWS,
    )


def test_one_trained_task_forgets_nothing():
    matrix = AccuracyMatrix(["a", "b"])
    matrix.record(after="a", on="a", score=0.9)
    assert (matrix.op(), matrix.bwt(), matrix.forgetting()) == (0.9, 0.0, 0.0)


def test_an_unfinished_column_is_not_the_last_one():
    matrix = matrix_of([[0.9, 0.7, 0.1], [None, 0.5, None], [None, None, None]])
    assert matrix.op() == pytest.approx(0.6)


@given(st.lists(unit, min_size=2, max_size=6))
def test_constant_rows_give_no_backward_transfer(accuracies):
    size = len(accuracies)
    rows = [[accuracies[i] if i <= j else None for j in range(size)] for i in range(size)]
    assert matrix_of(rows).bwt() == 0.0
    assert matrix_of(rows).forgetting() == 0.0


@given(full_rows())
def test_the_two_backward_transfers_differ_by_a_factor(rows):
    matrix, size = matrix_of(rows), len(rows)
    expected = matrix.bwt() * (size - 1) / size
    assert math.isclose(matrix.bwt_divided_by_all_tasks(), expected, abs_tol=1e-12)


@given(full_rows())
def test_forgetting_is_at_least_the_loss_since_training(rows):
    assert matrix_of(rows).forgetting() >= -matrix_of(rows).bwt() - 1e-12


@given(full_rows())
def test_overall_performance_lies_between_the_scores_of_the_last_column(rows):
    column = [row[-1] for row in rows]
    assert min(column) - 1e-12 <= matrix_of(rows).op() <= max(column) + 1e-12


@given(full_rows())
def test_dictionary_round_trip_is_exact(rows):
    text = json.dumps(matrix_of(rows).to_dict())
    assert AccuracyMatrix.from_dict(json.loads(text)).to_dict() == json.loads(text)


def test_retention_starts_at_the_tasks_own_training():
    assert matrix_of(ROWS).retention("b") == [("b", 0.8), ("c", 0.7)]


def test_score_reads_what_was_recorded():
    assert matrix_of(ROWS).score(after="b", on="a") == 0.95
    assert matrix_of(ROWS).score(after="a", on="b") is None


def test_a_later_record_replaces_an_earlier_one():
    matrix = matrix_of(ROWS)
    matrix.record(after="c", on="c", score=0.8)
    assert matrix.op() == pytest.approx(0.7)


@pytest.mark.parametrize("score", [-0.01, 1.01, math.nan, math.inf, None, "high", 90])
def test_bad_scores_are_refused(score):
    with pytest.raises(DataError, match="The score of task 'a' after 'b' is"):
        AccuracyMatrix(["a", "b"]).record(after="b", on="a", score=score)


def test_an_unknown_task_is_refused_with_a_suggestion():
    with pytest.raises(DataError, match=r"'FOCM' is not .* \(did you mean 'FOMC'\?\)"):
        AccuracyMatrix(["FOMC", "Py150"]).record(after="FOCM", on="Py150", score=0.5)


@pytest.mark.parametrize("names", [[], ["a", "a"], "ab", [""], [1]])
def test_bad_task_names_are_refused(names):
    with pytest.raises(DataError, match="task names"):
        AccuracyMatrix(names)


@pytest.mark.parametrize("figure", ["op", "bwt", "forgetting", "bwt_divided_by_all_tasks"])
def test_no_figure_without_a_complete_column(figure):
    with pytest.raises(DataError, match="no complete column"):
        getattr(AccuracyMatrix(["a", "b"]), figure)()


def test_an_incomplete_column_names_what_is_missing():
    matrix = matrix_of([[0.9, 0.7], [None, None]])
    with pytest.raises(DataError, match="After 'b' no score is recorded of b"):
        matrix.op(after="b")


def test_backward_transfer_needs_the_diagonal():
    matrix = matrix_of([[None, 0.7], [None, 0.5]])
    with pytest.raises(DataError, match="'a' right after its training is not recorded"):
        matrix.bwt()


def test_saved_json_has_the_promised_keys(tmp_path):
    matrix_of(ROWS).save(tmp_path)
    data = json.loads((tmp_path / "accuracy_matrix.json").read_text())
    assert data["tasks"] == ["a", "b", "c"]
    assert data["scores"] == ROWS
    assert (data["op"], data["bwt"]) == (pytest.approx(0.6), pytest.approx(-0.2))
    assert data["formulas"] == FORMULAS


def test_saved_csv_holds_the_scores_exactly(tmp_path):
    matrix_of([[1 / 3, 0.1], [None, 0.7]]).save(tmp_path)
    with open(tmp_path / "accuracy_matrix.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["task", "after a", "after b"],
        ["a", str(1 / 3), "0.1"],
        ["b", "", "0.7"],
    ]


def test_save_and_load_keep_the_scores_before_training(tmp_path):
    matrix = matrix_of(ROWS)
    matrix.record(after="a", on="c", score=0.25)
    matrix.save(tmp_path)
    assert AccuracyMatrix.load(tmp_path).score(after="a", on="c") == 0.25


def test_figures_that_are_not_to_be_had_yet_are_null(tmp_path):
    AccuracyMatrix(["a", "b"]).save(tmp_path)
    data = json.loads((tmp_path / "accuracy_matrix.json").read_text())
    assert (data["op"], data["bwt"], data["forgetting"]) == (None, None, None)


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    matrix_of(ROWS).save(tmp_path)
    before = (tmp_path / "accuracy_matrix.json").read_text()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        AccuracyMatrix(["a"]).save(tmp_path)
    assert (tmp_path / "accuracy_matrix.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "accuracy_matrix.csv",
        "accuracy_matrix.json",
    ]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"tasks": ["a"]}', '{"tasks": ["a"], "scores": [[0.5, 0.5]]}',
             '{"tasks": ["a"], "scores": [[7]]}', '{"tasks": ["a"], "scores": 3}']
)  # fmt: skip
def test_a_broken_file_is_refused_by_name(tmp_path, text):
    (tmp_path / "accuracy_matrix.json").write_text(text)
    with pytest.raises(DataError, match=r"accuracy_matrix\.json is not an accuracy matrix"):
        AccuracyMatrix.load(tmp_path)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"accuracy_matrix\.json cannot be read"):
        AccuracyMatrix.load(tmp_path)


def test_the_terminal_table_shows_percent():
    console = Console(width=160, file=io.StringIO())
    matrix = AccuracyMatrix.from_dict({"tasks": ["[b]a", "c"], "scores": [[0.456, 0.4], [None, 1]]})
    console.print(matrix.to_rich_table())
    text = console.file.getvalue()
    assert "[b]a" in text
    assert "45.6" in text
    assert re.search(r"OP +\S +45.6 \S +70.0 ", text)
    assert re.search(r"BWT +\S +0.0 \S +-5.6 ", text)


def test_the_matrix_needs_neither_torch_nor_transformers():
    code = "import seekr_peft.evaluation.matrix, sys;print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr
