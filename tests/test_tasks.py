"""Tasks and their formats: what is read, what is refused and where it says so."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from seekr_peft.errors import DataError
from seekr_peft.tasks import Task, find_task_problems, read_tasks

SHARED = Path(os.environ.get("SEEKR_SHARED", Path(__file__).parents[1] / ".." / "shared"))
DATA = SHARED / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there (SEEKR_SHARED)")

ROWS = [{"prompt": f"p{index}", "answer": f"a{index}"} for index in range(3)]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({"</s>": 0, "?": 1, "p0": 2, "a0": 3}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="?")


def write_lines(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_json(path: Path, value: object) -> Path:
    return write_lines(path, json.dumps(value))


def superni(*instances: tuple[str, object], definition: tuple[str, ...] = ("Do it.\n",)) -> dict:
    rows = [{"input": text, "output": output} for text, output in instances]
    return {"Definition": list(definition), "Instances": rows}


# ------------------------------------------------------------------ Task


def test_records_become_columns():
    task = Task.from_records("t", ROWS, ROWS[:1], metric="rougeL", choices=["a", "b"])
    assert task.train["prompt"] == ["p0", "p1", "p2"]
    assert task.test["answer"] == ["a0"]
    assert (task.metric, task.choices, task.cut) == ("rougeL", ("a", "b"), None)


def test_an_instruction_column_is_there_only_when_a_row_has_one():
    rows = [{"prompt": "Sort: b", "answer": "b", "instruction": "Sort:"}, ROWS[0]]
    task = Task.from_records("t", rows, ROWS)
    assert task.train["instruction"] == ["Sort:", ""]
    assert "instruction" not in task.test.column_names


def test_keys_and_functions_name_the_texts():
    rows = [{"text": "good", "label": 1}]
    task = Task.from_records(
        "t",
        rows,
        rows,
        prompt=lambda row: f"Review: {row['text']}",
        answer=lambda row: ["no", "yes"][row["label"]],
    )
    assert task.train[0] == {"prompt": "Review: good", "answer": "yes"}


def test_a_dataset_keeps_only_the_named_columns():
    data = Dataset.from_dict({"question": ["q"], "reply": ["r"], "id": [7]})
    task = Task.from_dataset("t", data, data, prompt="question", answer="reply")
    assert task.train[0] == {"prompt": "q", "answer": "r"}


def test_json_lines_are_read(tmp_path):
    train = write_lines(tmp_path / "a.jsonl", {"q": "ü", "a": "x\u2028y"}, "", {"q": "2", "a": "y"})
    task = Task.from_jsonl("t", train, train, prompt="q", answer="a")
    assert task.train["prompt"] == ["ü", "2"]
    assert task.train["answer"] == ["x\u2028y", "y"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "é", "a\n", None])
def test_a_name_that_is_no_folder_name_is_refused(name):
    with pytest.raises(DataError, match="cannot be a folder name"):
        Task.from_records(name, ROWS, ROWS)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p"}, "Task 't', train row 1 has no key 'answer', the answer, but 'prompt'"),
        ({"prompt": "p", "anwser": "a"}, r"rename 'anwser' to 'answer'"),
        ({"prompt": "p", "answer": " "}, "train row 1 has an empty 'answer'"),
        ({"prompt": "", "answer": "a"}, "train row 1 has an empty 'prompt'"),
        ({"prompt": "p", "answer": 7}, "train row 1: 'answer' is 7, not a string"),
        ({"prompt": None, "answer": "a"}, "train row 1: 'prompt' is None, not a string"),
        (["p", "a"], "train row 1 is .* not an object"),
        ({"prompt": "p", "answer": "a", "instruction": "i"}, "does not begin with: 'i'"),
    ],
)
def test_a_bad_record_is_refused_with_its_place(row, message):
    with pytest.raises(DataError, match=message):
        Task.from_records("t", [ROWS[0], row], ROWS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"q": "p"', r"b\.jsonl, line 3 is not JSON"),
        ({"q": "p"}, r"b\.jsonl, line 3 has no key 'a', the answer, but 'q'"),
        ({"q": "p", "a": ""}, r"b\.jsonl, line 3 has an empty answer \(key 'a'\)"),
        ({"q": "p", "a": 1}, r"b\.jsonl, line 3: answer \(key 'a'\) is 1, not a string"),
    ],
)
def test_a_bad_line_is_refused_with_file_line_and_key(tmp_path, line, message):
    good = write_lines(tmp_path / "a.jsonl", {"q": "p", "a": "x"})
    bad = write_lines(tmp_path / "b.jsonl", {"q": "p", "a": "x"}, "", line)
    with pytest.raises(DataError, match=message):
        Task.from_jsonl("t", good, bad, prompt="q", answer="a")


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl cannot be read: No such file"):
        Task.from_jsonl("t", tmp_path / "none.jsonl", tmp_path / "none.jsonl")


def test_a_file_that_is_not_utf8_is_refused_by_name(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "ü"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl is not UTF-8"):
        Task.from_jsonl("t", tmp_path / "latin.jsonl", tmp_path / "latin.jsonl")


def test_an_empty_split_is_refused():
    with pytest.raises(DataError, match="'t' has no test samples"):
        Task.from_records("t", ROWS, [])


def test_a_dataset_without_the_columns_is_refused():
    data = Dataset.from_dict({"prompt": ["p"], "label": [1]})
    with pytest.raises(DataError, match="train has no column 'answer' but prompt, label"):
        Task("t", data, data)


def test_a_column_of_numbers_is_refused():
    data = Dataset.from_dict({"prompt": ["p"], "answer": [1]})
    with pytest.raises(DataError, match="'answer' of train holds int64, not text"):
        Task("t", data, data)


def test_rows_that_are_no_dataset_are_refused():
    with pytest.raises(DataError, match="train is a list, not a datasets"):
        Task("t", ROWS, ROWS)


def test_an_unknown_metric_is_refused_with_a_suggestion():
    with pytest.raises(DataError, match=r"did you mean 'accuracy'\?"):
        Task.from_records("t", ROWS, ROWS, metric="acuracy")


@pytest.mark.parametrize("choices", [[], ["a", "a"], [1], "ab", [" "]])
def test_bad_choices_are_refused(choices):
    with pytest.raises(DataError, match="has the choices"):
        Task.from_records("t", ROWS, ROWS, choices=choices)


def test_tokenised_training_samples_and_text_for_testing(tokenizer):
    task = Task.from_records("t", ROWS[:1], ROWS[:1]).tokenized(tokenizer)
    assert task.train[0] == {
        "prompt": "p0",
        "answer": "a0",
        "input_ids": [2, 3, 0],
        "attention_mask": [1, 1, 1],
        "labels": [-100, 3, 0],
    }
    assert task.test[0] == ROWS[0]


def test_a_task_without_a_test_set_is_tokenised(tokenizer):
    task = Task.from_records("t", ROWS[:1]).tokenized(tokenizer)
    assert task.train["input_ids"] == [[2, 3, 0]]
    assert task.test is None
    assert task.prompt_room(tokenizer, 64) == 62


def test_shortened_samples_are_counted_and_logged(tokenizer, caplog):
    rows = [{"prompt": "p0 " * 9, "answer": "a0"}, ROWS[0], {"prompt": "p0 " * 30, "answer": "a0"}]
    with caplog.at_level(logging.INFO):
        task = Task.from_records("t", rows, ROWS).tokenized(tokenizer, max_length=8)
    assert task.cut == 2
    assert [record.getMessage() for record in caplog.records] == [
        "Task 't': 2 of 3 training samples did not fit in 8 tokens and were shortened."
    ]
    assert max(map(len, task.train["input_ids"])) == 8


def test_truncation_uses_the_instruction(tokenizer):
    row = {"prompt": "p0 p0 p0 " + "x " * 40, "answer": "a0", "instruction": "p0 p0 p0"}
    task = Task.from_records("t", [row], [row]).tokenized(tokenizer, max_length=8)
    # 6 of the prompt: instruction, then 1 of the start and 2 of the end of the rest
    assert task.train[0]["input_ids"] == [2, 2, 2, 1, 1, 1, 3, 0]


# --------------------------------------------------------------- readers


def test_jsonl_in_folders_and_beside_each_other(tmp_path):
    for split in ("train", "test"):
        write_lines(tmp_path / "b" / f"{split}.jsonl", ROWS[0])
        write_lines(tmp_path / f"a.{split}.jsonl", ROWS[1])
    tasks = read_tasks("jsonl", tmp_path)
    assert [(task.name, task.train[0]["prompt"]) for task in tasks] == [("a", "p1"), ("b", "p0")]


def test_order_is_kept(tmp_path):
    for name in ("a", "b", "c"):
        for split in ("train", "test"):
            write_lines(tmp_path / f"{name}.{split}.jsonl", ROWS[0])
    assert [task.name for task in read_tasks("jsonl", tmp_path, ["c", "a"])] == ["c", "a"]


def test_trace_metrics_and_order(tmp_path):
    names = ["20Minuten", "C-STANCE", "NumGLUE-cm", "Py150", "Extra"]
    for name in names:
        for split in ("train", "test"):
            write_json(tmp_path / name / f"{split}.json", ROWS)
    tasks = read_tasks("trace", tmp_path)
    assert [(task.name, task.metric) for task in tasks] == [
        ("C-STANCE", "option_letter"),
        ("Py150", "edit_similarity"),
        ("NumGLUE-cm", "accuracy"),
        ("20Minuten", "sari"),
        ("Extra", "accuracy"),
    ]


def test_superni_prompt_and_first_output(tmp_path):
    data = superni((" word \n", [" one", "two"]), ("x", "three"))
    for split in ("train", "test"):
        write_json(tmp_path / "t" / f"{split}.json", data)
    (task,) = read_tasks("superni", tmp_path)
    assert task.metric == "rougeL"
    assert list(task.train) == [
        {"prompt": "Do it.\nword\nOutput:", "answer": "one", "instruction": "Do it.\n"},
        {"prompt": "Do it.\nx\nOutput:", "answer": "three", "instruction": "Do it.\n"},
    ]


def test_superni_leaves_out_empty_outputs_and_counts_them(tmp_path, caplog):
    for split in ("train", "test"):
        write_json(tmp_path / "t" / f"{split}.json", superni(("x", [""]), ("y", []), ("z", "a")))
    (task,) = read_tasks("superni", tmp_path)
    assert task.train["answer"] == ["a"]
    assert "left out 2 of 3 instances whose output is empty" in caplog.text


def long_sequence(folder: Path, labels: list, *instances: tuple[str, str], **keywords) -> None:
    write_json(folder / "labels.json", labels)
    for split in ("train", "test"):
        write_json(folder / f"{split}.json", superni(*instances, **keywords))


def test_long_sequence_prompt_lists_the_options(tmp_path):
    long_sequence(tmp_path / "t", ["good", "bad"], ("fine", "good"))
    (task,) = read_tasks("long_sequence", tmp_path)
    assert (task.metric, task.choices) == ("accuracy", ("good", "bad"))
    assert task.train[0] == {
        "prompt": "Do it.\nOption: good, bad\nfine\nAnswer:",
        "answer": "good",
        "instruction": "Do it.\nOption: good, bad\n",
    }


def test_long_sequence_without_a_definition(tmp_path):
    long_sequence(tmp_path / "t", ["A", "B"], ("Which?", "B"), definition=())
    (task,) = read_tasks("long_sequence", tmp_path)
    assert task.train[0]["prompt"] == "Option: A, B\nWhich?\nAnswer:"


def test_long_sequence_leaves_out_answers_that_are_no_label(tmp_path, caplog):
    long_sequence(tmp_path / "t", ["good", "bad"], ("fine", "good"), ("what", "-"))
    (task,) = read_tasks("long_sequence", tmp_path)
    assert task.train["answer"] == ["good"]
    assert "left out 1 of 2 instances whose output is none of good, bad" in caplog.text


def test_labels_that_fit_no_output_give_way_to_the_outputs(tmp_path, caplog):
    long_sequence(tmp_path / "t", ["False", "True"], ("x", "yes"), ("y", "no"), ("z", "yes"))
    (task,) = read_tasks("long_sequence", tmp_path)
    assert (task.choices, len(task.train)) == (("no", "yes"), 3)
    assert "lists False, True, but the outputs are no, yes" in caplog.text


def many_tasks(folder: Path) -> Path:
    for name in ("a", "b"):
        for split in ("train", "test"):
            rows = [{"prompt": f"{split}{index}", "answer": "x"} for index in range(50)]
            write_lines(folder / f"{name}.{split}.jsonl", *rows)
    return folder


def test_subsampling_does_not_depend_on_the_order(tmp_path):
    many_tasks(tmp_path)
    forward = read_tasks("jsonl", tmp_path, ["a", "b"], max_train=7, max_test=5)
    backward = read_tasks("jsonl", tmp_path, ["b", "a"], max_train=7, max_test=5)
    assert forward[0].train["prompt"] == backward[1].train["prompt"]
    assert forward[1].test["prompt"] == backward[0].test["prompt"]
    assert (len(forward[0].train), len(forward[0].test)) == (7, 5)


def test_subsampling_depends_on_the_seed_and_the_task(tmp_path):
    many_tasks(tmp_path)
    a, b = read_tasks("jsonl", tmp_path, max_train=7)
    (other_seed,) = read_tasks("jsonl", tmp_path, ["a"], max_train=7, seed=1)
    assert len({tuple(task.train["prompt"]) for task in (a, b, other_seed)}) == 3


def test_a_smaller_subsample_is_part_of_a_larger_one(tmp_path):
    many_tasks(tmp_path)
    (small,) = read_tasks("jsonl", tmp_path, ["a"], max_train=7)
    (large,) = read_tasks("jsonl", tmp_path, ["a"], max_train=20)
    assert set(small.train["prompt"]) < set(large.train["prompt"])


def test_a_limit_above_the_size_takes_all(tmp_path):
    many_tasks(tmp_path)
    assert len(read_tasks("jsonl", tmp_path, ["a"], max_train=1000)[0].train) == 50


def test_a_limit_of_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match="max_test is 0"):
        read_tasks("jsonl", many_tasks(tmp_path), max_test=0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"Instances": []}, r"train\.json has no key 'Definition'"),
        ([], r"train\.json has no key 'Definition'"),
        ({"Definition": 3, "Instances": []}, "'Definition' is '3', not a string"),
        ({"Definition": "d", "Instances": {}}, "'Instances' is a dict, not a list"),
        ({"Definition": "d", "Instances": []}, r"train\.json has no usable samples"),
        (superni(("x", "a"), ("y", 3)), "instance 1: 'output' is '3', a int, not a string"),
        (superni(("x", "a"), (" ", "a")), "instance 1 has an empty 'input'"),
        ({"Definition": "d", "Instances": [{"input": "x"}]}, "instance 0 has no key 'output'"),
    ],
)
def test_a_bad_superni_file_is_refused_with_its_place(tmp_path, value, message):
    write_json(tmp_path / "t" / "train.json", value)
    write_json(tmp_path / "t" / "test.json", superni(("x", "a")))
    with pytest.raises(DataError, match=message):
        read_tasks("superni", tmp_path)


CUT = "cut \ud83d emoji"
HALF = r".*at character 4 '\\ud83d', half of a surrogate pair, which is no character"


@pytest.mark.parametrize("key", ["prompt", "answer", "instruction"])
def test_half_a_character_in_a_record_or_a_line_is_refused_with_its_place(tmp_path, key):
    row = (
        {"prompt": CUT + "!", "answer": "a", "instruction": CUT} if key != "answer" else {"prompt": "p", "answer": CUT}
    )
    if key == "prompt":
        del row["instruction"]
    if key == "instruction":
        row["prompt"] = "p"
    with pytest.raises(DataError, match=f"Task 't', test row 1: '{key}'{HALF}"):
        Task.from_records("t", ROWS, [ROWS[0], row])
    file = write_lines(tmp_path / "t.train.jsonl", "", ROWS[0], row)
    write_lines(tmp_path / "t.test.jsonl", ROWS[0])
    for read in (lambda: Task.from_jsonl("t", file, file), lambda: read_tasks("jsonl", tmp_path)):
        with pytest.raises(DataError, match=rf"t\.train\.jsonl, line 3: '{key}'{HALF}"):
            read()


def test_a_whole_character_of_two_halves_is_read(tmp_path):
    file = write_lines(tmp_path / "t.jsonl", '{"prompt": "\\ud83d\\ude00", "answer": "a\\u0000"}')
    assert list(Task.from_jsonl("t", file, file).train) == [{"prompt": "😀", "answer": "a\0"}]


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([{"role": "user", "content": CUT}], "message 0 of 'prompt', 'content': a text"),
        ([{"role": "user", "content": "q"}, {"role": CUT, "content": "q"}], "message 1 of 'prompt', 'role': a text"),
        ([{"role": "user", "content": "q", "tool_calls": [{"name": CUT}]}], "'tool_calls', 'name': a text"),
        ([{"role": "user", "content": "q", CUT: 1}], "message 0 of 'prompt': a key"),
    ],
)
def test_half_a_character_in_messages_is_refused(messages, place):
    with pytest.raises(DataError, match=f"Task 't', train row 0: .*{place}{HALF}"):
        Task.from_records("t", [{"prompt": messages, "answer": "a"}], ROWS)


def test_half_a_character_in_the_last_message_or_in_tools_is_refused():
    asked = [{"role": "user", "content": "q"}]
    rows = [{"messages": [*asked, {"role": "assistant", "content": CUT}]}]
    with pytest.raises(DataError, match=f"train row 0: 'content' of 'answer'{HALF}"):
        Task.from_records("t", rows, ROWS)
    with pytest.raises(DataError, match=f"train row 0: 'tools', 'x': a text{HALF}"):
        Task.from_records("t", [{"prompt": asked, "answer": "a", "tools": [{"x": CUT}]}], ROWS)


@pytest.mark.parametrize(
    ("format", "value", "place"),
    [
        ("trace", [{"prompt": CUT, "answer": "a"}], ", row 0: 'prompt'"),
        ("superni", superni(("x", "a"), ("y", CUT)), ", instance 1: 'output'"),
        ("superni", superni(("x", "a"), definition=(CUT,)), ": 'Definition'"),
        ("long_sequence", superni((CUT, "a")), ", instance 0: 'input'"),
    ],
)
def test_half_a_character_is_refused_in_every_format(tmp_path, format, value, place):
    folder = tmp_path / format / "t"
    write_json(folder / "labels.json", ["a"])
    for split in ("train", "test"):
        write_json(folder / f"{split}.json", value)
    with pytest.raises(DataError, match=rf"train\.json{place}{HALF}"):
        read_tasks(format, tmp_path / format)
    with pytest.raises(DataError, match=rf"train\.json{place}{HALF}"):
        read_tasks("mixed", tmp_path, [f"{format}/t"])


def test_half_a_character_in_a_label_is_refused(tmp_path):
    long_sequence(tmp_path / "t", ["a", CUT], ("x", "a"))
    with pytest.raises(DataError, match=rf"labels\.json: the label {HALF}"):
        read_tasks("long_sequence", tmp_path)


def test_half_a_character_in_a_choice_is_refused():
    with pytest.raises(DataError, match=f"Task 't': the choice {HALF}"):
        Task.from_records("t", ROWS, ROWS, choices=["a", CUT])


def test_superni_keeps_the_indentation_of_code(tmp_path):
    outputs = [" one", "    return x\n", "\n  two "]
    for split in ("train", "test"):
        write_json(tmp_path / "t" / f"{split}.json", superni(*(("x", output) for output in outputs)))
    assert read_tasks("superni", tmp_path)[0].train["answer"] == ["one", "    return x", "\n  two"]


def test_labels_are_read_without_whitespace(tmp_path):
    long_sequence(tmp_path / "t", ["good", "bad"], ("fine", "  good\n"))
    assert read_tasks("long_sequence", tmp_path)[0].train["answer"] == ["good"]


def test_the_room_is_that_of_the_tokenizer_and_the_length_asked_for(tokenizer):
    task = Task.from_records("t", [{"prompt": "p0", "answer": "a0 a0 a0"}], ROWS)
    assert [task.prompt_room(tokenizer, length) for length in (64, 64, 32, 8)] == [60, 60, 28, 6]
    task.tokenized(tokenizer, 64)
    assert task.prompt_room(tokenizer, 64) == 60
    with_prefix = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"a": 0, "0": 1, "</s>": 2}, [])), eos_token="</s>"
    )
    assert task.prompt_room(with_prefix, 64) == 64 - 7


def test_a_bad_trace_row_is_refused_with_its_place(tmp_path):
    write_json(tmp_path / "t" / "train.json", [*ROWS, {"prompt": "p"}])
    write_json(tmp_path / "t" / "test.json", ROWS)
    with pytest.raises(DataError, match=r"train\.json, row 3 has no key 'answer'"):
        read_tasks("trace", tmp_path)


def test_broken_json_is_refused_with_its_line(tmp_path):
    write_lines(tmp_path / "t" / "train.json", "[", "{},", "{]")
    write_json(tmp_path / "t" / "test.json", ROWS)
    with pytest.raises(DataError, match=r"train\.json, line 3 is not JSON"):
        read_tasks("trace", tmp_path)


# -------------------------------------------------------------- problems


def test_good_tasks_have_no_problems(tmp_path):
    assert find_task_problems("jsonl", many_tasks(tmp_path), ["b"]) == []


def test_an_unknown_format_gets_a_suggestion(tmp_path):
    (problem,) = find_task_problems("Trace", tmp_path)
    assert problem.endswith("jsonl, csv, parquet, trace, superni, long_sequence, mixed, demo (did you mean 'trace'?).")


def test_a_path_that_is_not_there_names_the_nearest_folder(tmp_path):
    (problem,) = find_task_problems("jsonl", tmp_path / "dta" / "trace")
    assert f"the nearest folder that exists is '{tmp_path.resolve()}'" in problem


def test_a_path_that_is_a_file_is_told(tmp_path):
    (problem,) = find_task_problems("jsonl", write_lines(tmp_path / "a.train.jsonl", ROWS[0]))
    assert "is a file" in problem


def test_a_folder_without_tasks_names_the_expected_files(tmp_path):
    (problem,) = find_task_problems("superni", many_tasks(tmp_path))
    assert "holds no tasks of the format 'superni'" in problem
    assert "NAME/train.json" in problem


def test_all_wrong_names_are_told_at_once(tmp_path):
    for name in ("FOMC", "Py150"):
        for split in ("train", "test"):
            write_json(tmp_path / name / f"{split}.json", ROWS)
    problems = find_task_problems("trace", tmp_path, ["FOCM", "Py150", "Py150", "xyz"])
    assert len(problems) == 3
    assert "(did you mean 'FOMC'?)" in problems[0]
    assert "'Py150' is 2 times" in problems[1]
    assert "'xyz' is not in" in problems[2]


def test_missing_files_of_a_task_are_told(tmp_path):
    write_json(tmp_path / "t" / "train.json", superni(("x", "a")))
    problems = find_task_problems("long_sequence", tmp_path)
    assert "has no test samples" in problems[0]
    assert "labels.json' is not there" in problems[1]


def test_a_folder_name_that_cannot_be_a_task_is_told(tmp_path):
    for split in ("train", "test"):
        write_json(tmp_path / "my task" / f"{split}.json", ROWS)
    assert "'my task' cannot be a folder name" in find_task_problems("trace", tmp_path)[0]


def test_an_empty_order_is_told(tmp_path):
    assert "order of tasks is empty" in find_task_problems("jsonl", many_tasks(tmp_path), [])[0]


def test_reading_tells_every_problem(tmp_path):
    with pytest.raises(DataError, match=r"'x' is not in .*\n.*'y' is not in"):
        read_tasks("jsonl", many_tasks(tmp_path), ["x", "y"])


def test_looking_for_problems_loads_no_heavy_package(tmp_path):
    code = (
        "import sys; from seekr_peft.tasks.readers import find_task_problems;"
        f"find_task_problems('jsonl', {str(tmp_path)!r});"
        "print({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr


# -------------------------------------------------- the real benchmarks


@needs_data
def test_all_trace_tasks_are_read():
    tasks = read_tasks("trace", DATA / "trace", max_train=3, max_test=2)
    names = "C-STANCE FOMC MeetingBank Py150 ScienceQA NumGLUE-cm NumGLUE-ds 20Minuten"
    assert [task.name for task in tasks] == names.split()


@needs_data
def test_all_superni_tasks_are_read():
    tasks = read_tasks("superni", DATA / "superni", max_train=3)
    assert len(tasks) == 11
    assert all(task.train[0]["prompt"].endswith("\nOutput:") for task in tasks)


@needs_data
def test_all_long_sequence_tasks_are_read():
    tasks = {task.name: task for task in read_tasks("long_sequence", DATA / "long_sequence")}
    assert len(tasks) == 10
    assert len(tasks["mnli"].test) == 299  # one of 300 is labelled '-'
    assert tasks["qqp"].choices == ("no", "yes")


def test_mixed_takes_tasks_of_several_formats_in_the_given_order(tmp_path):
    long_sequence(tmp_path / "long_sequence" / "news", ["good", "bad"], ("fine", "good"))
    for split in ("train", "test"):
        write_json(tmp_path / "superni" / "t" / f"{split}.json", superni(("x", "three")))
    tasks = read_tasks("mixed", tmp_path, ["superni/t", "long_sequence/news"])
    assert [(task.name, task.metric, task.choices) for task in tasks] == [
        ("t", "rougeL", None),
        ("news", "accuracy", ("good", "bad")),
    ]


def test_mixed_names_every_entry_that_is_wrong(tmp_path):
    long_sequence(tmp_path / "long_sequence" / "news", ["good"], ("fine", "good"))
    problems = find_task_problems("mixed", tmp_path, ["news", "trace/FOMC", "long_sequence/news", "long_sequence/news"])
    assert "'news' must be named FORMAT/NAME" in problems[0]
    assert "trace" in problems[1]
    assert "'news' comes 2 times" in problems[-1]
    assert "needs an order" in find_task_problems("mixed", tmp_path)[0]
