"""Rows of a task: with and without a test set, sets of splits, labels by their names, values that are no text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from datasets import Dataset, DatasetDict, IterableDatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from support.table_rows import ROWS, news, rows_of, written

from seekr_peft.errors import DataError
from seekr_peft.evaluation import evaluate_task
from seekr_peft.run.task_data import constant_answer_score
from seekr_peft.tasks import Task

# ------------------------------------------------------------------ a task without a test set


def test_a_task_without_a_test_set_can_be_made_in_every_way(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
    data = Dataset.from_list(ROWS)
    made = [
        Task.from_records("t", ROWS),
        Task.from_records("t", ROWS, None),
        Task.from_dataset("t", data),
        Task.from_files("t", file),
        Task.from_jsonl("t", file, None),
        Task("t", data),
    ]
    assert [task.test for task in made] == [None] * 6
    assert all(rows_of(task.train) == ROWS for task in made)
    assert len({task.fingerprint() for task in made}) == 1
    assert made[0].fingerprint() != Task.from_records("t", ROWS, ROWS).fingerprint()
    assert made[0].as_chat().test is None


def test_what_needs_test_samples_refuses_a_task_without_them() -> None:
    task = Task.from_records("t", ROWS)
    for use in (task.test_set, lambda: evaluate_task(None, None, task), lambda: constant_answer_score(task)):
        with pytest.raises(DataError, match="Task 't' has no test samples, so it can be trained but not evaluated"):
            use()


# ------------------------------------------------------------------ sets of splits, and what else is no rows


@pytest.mark.parametrize("kind", [DatasetDict, IterableDatasetDict, dict])
def test_a_set_of_splits_gives_train_and_test(kind: type) -> None:
    splits = {"train": Dataset.from_list(ROWS), "validation": Dataset.from_list(ROWS[1:])}
    if kind is IterableDatasetDict:
        splits = {name: split.to_iterable_dataset() for name, split in splits.items()}
    task = Task.from_dataset("t", kind(splits))
    assert (rows_of(task.train), rows_of(task.test)) == (ROWS, ROWS[1:])
    with_test = Task.from_dataset("t", kind({**splits, "test": Dataset.from_list(ROWS[:1])}))
    assert rows_of(with_test.test) == ROWS[:1]
    assert Task.from_dataset("t", kind({"train": splits["train"]})).test is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            DatasetDict(train=Dataset.from_list(ROWS)),
            r"a DatasetDict with the splits 'train'; pass .*dataset\['train'\]",
        ),
        ({"test": ROWS}, r"a dict with the splits 'test'; pass one of them, as in dataset\['test'\]"),
        ({"prompt": ["p"], "answer": ["a"]}, "a dict with the keys 'prompt', 'answer', not rows"),
        ("data/train.jsonl", "'data/train.jsonl', not rows; .*Task.from_files reads files"),
        (Path("train.csv"), r".*Path\('train.csv'\), not rows"),
        (pyarrow.table({"prompt": ["p"]}), r"a Table of pyarrow, whose columns are no rows; .*to_pylist\(\)"),
        (3, "3, not rows"),
    ],
)
def test_what_holds_no_rows_is_refused_by_what_it_is(rows: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"^Task 't', test is {message}"):
        Task.from_records("t", ROWS, rows)


def test_no_training_rows_are_refused() -> None:
    with pytest.raises(DataError, match="Task 't': train is None"):
        Task.from_records("t", None)
    with pytest.raises(DataError, match="Task 't': train is a DatasetDict"):
        Task("t", DatasetDict(train=Dataset.from_list(ROWS)))


# ------------------------------------------------------------------ labels and other values


@pytest.mark.parametrize("form", [None, "numpy", "torch", "stream"])
def test_the_number_of_a_label_is_its_name(form: str | None) -> None:
    data = news(1, 0, 1)
    data = data.to_iterable_dataset() if form == "stream" else data.with_format(form)
    task = Task.from_dataset("t", data, prompt="text", answer="label")
    assert list(task.train["answer"]) == ["Sports", "World", "Sports"]


def test_a_function_gets_the_number_of_a_label_as_it_is() -> None:
    task = Task.from_dataset("t", news(1, 0), prompt="text", answer=lambda row: ["no", "yes"][row["label"]])
    assert list(task.train["answer"]) == ["yes", "no"]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (-1, r"'label' is -1, which stands for no label; .*test=dataset\['validation'\]"),
        (None, "is None, not a string"),
    ],
)
def test_a_row_without_a_label_is_refused(label: int | None, message: str) -> None:
    with pytest.raises(DataError, match=f"Task 't', test row 1: .*{message}"):
        Task.from_dataset("t", news(0), news(1, label), prompt="text", answer="label")


def test_a_column_of_labels_as_it_is_names_what_takes_the_names() -> None:
    with pytest.raises(DataError, match=r"'answer' of train holds int64, not text; use Task.from_dataset, which takes"):
        Task("t", news(0).rename_columns({"text": "prompt", "label": "answer"}))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            3,
            r"is 3, not a string; convert it to text \(of a label, its name: answer=lambda row: names\[row",
        ),
        (np.int64(3), "is 3, not a string; convert it to text"),
        (float("nan"), "is nan, not a string; fill it or remove the row"),
        (None, "is None, not a string; fill it or remove the row"),
        (b"red", "is b'red', not a string; decode it"),
        (pyarrow.scalar(3), "is 3, not a string"),
    ],
)
def test_a_value_that_is_no_text_is_refused(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"train row 0: 'answer' {message}"):
        Task.from_records("t", [{"prompt": "p", "answer": value}])


@pytest.mark.parametrize(
    "value", [np.str_("red"), pyarrow.scalar("red"), pyarrow.scalar("red", pyarrow.large_string())]
)
def test_texts_of_other_packages_are_texts(value: Any) -> None:
    (answer,) = Task.from_records("t", [{"prompt": "p", "answer": value}]).train["answer"]
    assert (answer, type(answer)) == ("red", str)


MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "red"}]


@pytest.mark.parametrize(
    "messages",
    [
        MESSAGES,
        tuple(MESSAGES),
        np.array(MESSAGES),
        {"role": ["user", "assistant"], "content": ["q", "red"]},
        pyarrow.array([MESSAGES])[0],
    ],
    ids=["list", "tuple", "array", "columns", "scalar"],
)
def test_messages_are_found_in_every_kind_of_list(messages: Any) -> None:
    (row,) = Task.from_records("t", [{"messages": messages}]).train
    assert (row["prompt"], row["answer"]) == ("q", "red")
    assert json.loads(row["prompt_messages"])["messages"] == MESSAGES[:1]


def test_a_row_that_holds_itself_is_refused() -> None:
    own: list[Any] = []
    own.append(own)
    with pytest.raises(DataError, match="train row 0 is nested more than 64 levels deep"):
        Task.from_records("t", [{**ROWS[0], "more": own}])


@pytest.mark.parametrize(
    "text", ["hello", "3", "[]", "null", '{"messages": {}}', '{"messages": []}', '{"messages": [1]}']
)
def test_a_column_of_messages_that_holds_others_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="train row 0: the column 'prompt_messages' holds"):
        Task.from_records("t", [{**ROWS[0], "prompt_messages": text}])


VALUES = st.recursive(
    st.sampled_from(
        [None, True, 0, -1, 2.5, float("nan"), float("inf"), "", " ", "p", "\ud83d", "\x1b[31m", b"p", object()]
    )
    | st.sampled_from(
        [np.str_("p"), np.array(["p"]), np.float32(1), pyarrow.scalar("p"), 10**4000, {1, 2}, "p" * 10**5]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(
            st.sampled_from(["role", "content", "tool_calls", "a", 1, "\ud83d", "\x1b"]), inner, max_size=4
        )
        | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "p"]), "content": inner})
    ),
    max_leaves=6,
)
KEYS = ["prompt", "answer", "completion", "instruction", "messages", "tools", "chat_template_kwargs", "prompt_messages"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from([*KEYS, "other", 3]), VALUES, max_size=4), min_size=1, max_size=2))
def test_any_row_is_a_sample_or_refused_in_one_clear_line(rows: list[dict[Any, Any]]) -> None:
    made, said = made_or_said(rows)
    assert made is None or made.fingerprint() == Task.from_records("t", rows).fingerprint()
    assert made is not None or said.startswith("Task 't', train row ")
    assert len(said) < 700
    assert said.isprintable()


def made_or_said(rows: list[Any]) -> tuple[Task | None, str]:
    try:
        return Task.from_records("t", rows), ""
    except DataError as error:
        return None, str(error)


@pytest.mark.parametrize("key", KEYS)
def test_a_number_that_python_does_not_write_out_is_refused(key: str) -> None:
    endless = 10**5000
    for value in (endless, [{"role": "user", "content": "q", "x": endless}], [{endless: 1}], {"a": endless}):
        made, said = made_or_said([{"prompt": MESSAGES[:1], "answer": "a", key: value}])
        # A column that is not looked at may hold anything.
        assert made is not None or ("train row 0" in said and len(said) < 700)
