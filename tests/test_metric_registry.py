"""Metrics by name and as functions: registering one, what a task keeps of it, and what a bad one is told."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from support.small_run import read_json, read_lines, small_recipe
from support.tokenizer_zoo import byte_level

import seekr_peft.metrics.registry as registry
import seekr_peft.run.measuring as measuring_module
import seekr_peft.run.runner as run_module
from seekr_peft import Task, run_recipe
from seekr_peft.errors import DataError, RunError
from seekr_peft.evaluation.generation import find_unreachable
from seekr_peft.metrics import METRICS, exact_match, metric_name, metric_names, register_metric, score_predictions
from seekr_peft.report.reading import read_run
from seekr_peft.tasks import read_tasks

ROWS = [{"prompt": f"Say: {text}", "answer": text, "instruction": "Say: "} for text in ("red", "green", "blue")]


def first_letter(prediction: str, answer: str) -> float:
    return float(prediction[:1] == answer[:1])


def copied_share(prediction: str, answer: str, source: str) -> float:
    return float(prediction == source)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """What a test registers is gone after it."""
    before = dict(METRICS)
    yield
    METRICS.clear()
    METRICS.update(before)


def task_with(metric: Any, name: str = "t") -> Task:
    return Task.from_records(name, ROWS, ROWS, metric=metric)


# Names ------------------------------------------------------------------------------------------------------------


def test_the_names_that_a_task_may_give() -> None:
    assert list(METRICS) == ["accuracy", "option_letter", "rougeL", "f1", "numeric_match", "sari", "edit_similarity"]
    for name in metric_names():
        task = task_with(name)
        assert (task.metric, task.metric_name) == (name, name)
        assert 0 <= task.score(["red", "x", ""])[0] <= 1


def test_a_registered_function_has_its_name() -> None:
    assert register_metric("first")(first_letter) is first_letter
    assert metric_names()[-1] == "first"
    assert task_with("first").score(["rot", "gruen", "x"]) == (2 / 3, [1.0, 1.0, 0.0])
    assert metric_name(first_letter) == task_with(first_letter).metric_name == "first"
    assert metric_name(exact_match) == "accuracy"


def test_registering_twice() -> None:
    register_metric("first")(first_letter)
    register_metric("first")(first_letter)
    for name in ("first", "accuracy"):
        with pytest.raises(DataError, match=rf"^The metric '{name}' is already there; register yours under another"):
            register_metric(name)(lambda prediction, answer: 1.0)
    assert METRICS["accuracy"] is exact_match


@pytest.mark.parametrize(("name", "shown"), [("", "''"), (" ", "' '"), (None, "None"), (3, "3")])
def test_a_name_is_a_text(name: Any, shown: str) -> None:
    with pytest.raises(DataError) as error:
        register_metric(name)
    assert str(error.value) == f"The name of a metric is {shown}; it must be a text that is not empty."


def test_what_is_registered_is_a_function() -> None:
    with pytest.raises(DataError, match=r"^The metric 'half' is 0\.5, not a function of prediction and answer"):
        register_metric("half")(0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(("metric", "shown"), [("acuracy", "'acuracy'"), (None, "None"), (["f1"], "['f1']"), (3, "3")])
def test_an_unknown_metric_is_told_the_task_and_the_nearest(metric: Any, shown: str) -> None:
    with pytest.raises(DataError) as error:
        task_with(metric)
    message = str(error.value)
    assert message.startswith(f"Task 't': the metric {shown} is unknown; choose one of accuracy, option_letter, rougeL")
    assert ("did you mean 'accuracy'?" in message) == (metric == "acuracy")


# Other packages ---------------------------------------------------------------------------------------------------


@pytest.fixture
def entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"outside": "first_letter", "gone": "no_such_function", "number": "ROWS"}
    points = [EntryPoint(name, f"{__name__}:{value}", registry.ENTRY_POINT_GROUP) for name, value in values.items()]
    points.append(EntryPoint("lost", "no_such_package:metric", registry.ENTRY_POINT_GROUP))
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "seekr_peft.metrics" else [])


@pytest.mark.usefixtures("entry_points")
def test_a_metric_of_another_package() -> None:
    assert metric_names()[len(METRICS) :] == ["gone", "lost", "number", "outside"]
    assert task_with("outside").score(["r", "g", "b"])[0] == 1.0
    with pytest.raises(DataError, match="did you mean 'outside'"):
        task_with("outsid")
    with pytest.raises(DataError, match="'outside' is already there"):
        register_metric("outside")(first_letter)


@pytest.mark.usefixtures("entry_points")
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gone", r"'.*:no_such_function' cannot be loaded \(.*has no attribute 'no_such_function'\)"),
        ("lost", r"'no_such_package:metric' cannot be loaded \(No module named 'no_such_package'\)"),
        ("number", r"is \[\{.*, not a function"),
    ],
)
def test_a_broken_entry_point_is_one_sentence(name: str, why: str) -> None:
    with pytest.raises(DataError, match=rf"metric '{name}' .*{why}") as error:
        task_with(name)
    assert "\n" not in str(error.value)


def test_a_format_may_give_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from seekr_peft.tasks import FORMATS, readers

    for split in ("train", "test"):
        (tmp_path / f"t.{split}.jsonl").write_text('{"prompt": "p", "answer": "a"}\n')
    monkeypatch.setitem(
        readers.FORMATS, "jsonl", lambda name, files: (*FORMATS["csv"](name, files)[:1], first_letter, None)
    )
    (task,) = read_tasks("jsonl", tmp_path)
    assert (task.metric, task.metric_name) == (first_letter, "first_letter")


def test_an_answer_that_is_worth_less_than_1_itself_can_still_be_reached() -> None:
    tokenizer = byte_level()
    rows = [{"prompt": "red red red green", "answer": "red green"}]
    task = Task.from_records("t", rows, rows, metric="sari")
    # Of the three times that "red" is there the answer leaves out two, of which SARI takes one for wrong.
    assert task.score(["red green"])[0] == pytest.approx((1 + 1 + 1 / 2 + 3 + 3 + 3) / 12)
    assert find_unreachable(task, tokenizer) == []
    assert find_unreachable(task_with(lambda prediction, answer: 0.3), tokenizer) == []
    assert len(find_unreachable(task_with("numeric_match"), tokenizer)) == len(ROWS), "there is no number in them"


# Functions --------------------------------------------------------------------------------------------------------


def test_a_function_scores() -> None:
    assert task_with(first_letter).score(["rot", "x", "b"]) == (2 / 3, [1.0, 0.0, 1.0])
    assert score_predictions(first_letter, ["a"], ["ab"]) == (1.0, [1.0])


def test_source_is_the_prompt_without_its_instruction() -> None:
    assert task_with(copied_share).score(["red", "Say: green", "blue"]) == (2 / 3, [1.0, 0.0, 1.0])
    with pytest.raises(DataError, match="copied_share looks at the source of each answer; pass as many sources"):
        score_predictions(copied_share, ["a"], ["a"])


def test_a_conversation_is_a_source_as_it_reads() -> None:
    rows = [{"prompt": [{"role": "user", "content": "hello"}], "answer": "x"}]
    assert Task.from_records("t", rows, rows, metric=copied_share).score(["hello"])[0] == 1.0


class Strict:
    def __call__(self, prediction: str, answer: str) -> bool:
        return prediction == answer


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        (first_letter, "first_letter"),
        (lambda prediction, answer: 0.5, "<lambda>"),
        (functools.partial(copied_share, source="red"), "partial"),
        (Strict(), "Strict"),
    ],
    ids=["function", "lambda", "partial", "object"],
)
def test_the_name_that_is_kept_of_a_function(metric: Any, name: str) -> None:
    task = task_with(metric)
    assert task.metric is metric and task.metric_name == name
    assert task.as_chat().metric is metric


def test_the_fingerprint_knows_the_function_by_its_name() -> None:
    assert task_with(first_letter).fingerprint() == task_with(first_letter).fingerprint()
    assert task_with(first_letter).fingerprint() != task_with("accuracy").fingerprint()
    assert task_with(exact_match).fingerprint() == task_with("accuracy").fingerprint()


def test_a_function_that_is_called_as_another_metric_is_refused() -> None:
    def f1(prediction: str, answer: str) -> float:
        return 1.0

    with pytest.raises(DataError, match=r"^Task 't': the metric is a function called 'f1', which is the name of"):
        task_with(f1)


def test_numbers_of_other_libraries_are_numbers() -> None:
    for value in (True, 1, np.float32(1), np.bool_(True), torch.tensor(1.0), 1 + 1e-12):
        assert task_with(lambda prediction, answer, value=value: value).score(["", "", ""]) == (1.0, [1.0] * 3)
    assert task_with(lambda prediction, answer: -1e-12).score(["", "", ""])[1] == [0.0] * 3


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-0.1, "-0.1"),
        (1.5, "1.5"),
        (None, "None"),
        ("1.0", "'1.0'"),
        ([1.0], "[1.0]"),
        (10**400, "1000"),
        (torch.zeros(2), "tensor([0., 0.])"),
        (1j, "1j"),
    ],
    ids=["nan", "inf", "negative", "above", "none", "text", "list", "huge", "tensor", "complex"],
)
def test_what_is_no_score_is_one_sentence_with_task_and_sample(value: object, shown: str) -> None:
    def odd(prediction: str, answer: str) -> object:
        return value if answer == "green" else 1.0

    with pytest.raises(DataError) as error:
        task_with(odd).score(["x", "y" * 500, "z"])
    message = str(error.value)
    assert message.startswith(f"Task 't', test row 1: the metric odd gives {shown}")
    assert "the answer 'green'; let the function return a number from 0 to 1" in message
    assert len(message) < 400 and "\n" not in message


def test_percentages_are_told_what_to_do() -> None:
    with pytest.raises(DataError, match=r"gives 87\.5 .* from 0 to 1, as percentages divided by 100 are\.$"):
        task_with(lambda prediction, answer: 87.5).score(["", "", ""])


@pytest.mark.parametrize(
    ("error", "said"),
    [(ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"), (KeyError(), "KeyError")],
)
def test_a_function_that_raises_is_one_sentence_with_its_error_as_the_cause(error: Exception, said: str) -> None:
    def odd(prediction: str, answer: str) -> float:
        raise error

    with pytest.raises(DataError) as found:
        task_with(odd).score(["x", "y", "z"])
    assert str(found.value) == (
        f"Task 't', test row 0: the metric odd failed ({said}) for the prediction 'x' and the answer 'red'; mend the "
        f"function."
    )
    assert found.value.__cause__ is error


def test_a_function_of_other_arguments_is_told_at_once() -> None:
    with pytest.raises(DataError, match=r"row 0: the metric odd failed \(TypeError: .* takes "):

        def odd(prediction: str) -> float:
            return 1.0

        task_with(odd).score(["x", "y", "z"])


# On disk ----------------------------------------------------------------------------------------------------------


def test_a_run_keeps_the_functions_name_and_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = run_module.load_tasks
    metrics: list[Any] = [first_letter]

    def with_function(recipe: Any) -> list[Task]:
        return [Task(task.name, task.train, task.test, metric=metrics[0]) for task in load(recipe)]

    monkeypatch.setattr(run_module, "load_tasks", with_function)
    monkeypatch.setattr(run_module, "write_report", lambda directory: directory / "report.html")
    recipe = small_recipe(tmp_path / "run", n_tasks=2, method={"name": "sequential"})
    console = Console(file=io.StringIO(), width=200)

    class Killed(BaseException):
        pass

    evaluate = measuring_module.evaluate_task

    def dying(model: Any, tokenizer: Any, task: Task, **settings: Any) -> Any:
        if task.name == "last":
            raise Killed
        return evaluate(model, tokenizer, task, **settings)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(measuring_module, "evaluate_task", dying)
        run_recipe(recipe, console=console)
    metrics[0] = "accuracy"
    with pytest.raises(RunError, match="cannot go on: the data of task first and the data of task last changed"):
        run_recipe(recipe, console=console, resume=True)
    metrics[0] = first_letter
    directory = run_recipe(recipe, console=console, resume=True).directory
    assert [task["metric"] for task in read_json(directory / "tasks.json")] == ["first_letter"] * 2
    for line in read_lines(directory / "predictions" / "02-last" / "01-first.jsonl"):
        assert line["score"] == first_letter(line["prediction"], line["answer"])
    assert list(read_run(directory).tasks) == ["first", "last"]
