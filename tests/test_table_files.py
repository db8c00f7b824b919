"""Files of rows: CSV, Parquet, folders of a recipe; and files that hold anything."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import stress.data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from stress.data import Case, look, mutations
from support.table_rows import ROWS, news, rows_of, written

from seekr_peft.config import SeekrConfig
from seekr_peft.errors import ConfigError, DataError, cut, listed
from seekr_peft.evaluation.general import find_general_tests, read_questions
from seekr_peft.tasks import Task, find_task_problems, read_tasks
from seekr_peft.tasks.table_files import named, read_text


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as error:
        Task.from_files("t", path)
    return str(error.value)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


# ------------------------------------------------------------------ CSV


def test_the_values_of_csv_are_text_as_it_is_written(tmp_path: Path) -> None:
    text = '\ufeffprompt,answer\r\n"two\r\nlines, ""said"" he",007\r\n\r\nb,1.0\r\nc,NA\r\nd,None\r\ne,1e3\r\n'
    task = Task.from_files("t", written(tmp_path / "a.CSV", text))
    assert list(task.train["prompt"]) == ['two\r\nlines, "said" he', "b", "c", "d", "e"]
    assert list(task.train["answer"]) == ["007", "1.0", "NA", "None", "1e3"]


def test_tabs_separate_tsv(tmp_path: Path) -> None:
    file = written(tmp_path / "a.tsv", "prompt\tanswer\np, q\ta\n")
    assert rows_of(Task.from_files("t", file).train) == [{"prompt": "p, q", "answer": "a"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt;answer\na;b\n", ": its header 'prompt;answer' has no comma between the columns but a semicolon"),
        ('"prompt";"answer"\n"a";"b"\n', """: its header '"prompt";"answer"' has no comma"""),
        ("prompt\tanswer\na\tb\n", ": its header 'prompt\\tanswer' has no comma between the columns but a tab"),
        ("prompt,label\na,b\n", ", line 2 has no key 'answer', the answer, but 'prompt', 'label'"),
        ("prompt,answer\n", " has no samples"),
        ("", " is empty; its first line must name the columns"),
        ("prompt,answer\na,b\nc\n", ", line 3 has 1 values for the 2 columns prompt, answer"),
        ("prompt,answer\na,b,c\n", ", line 2 has 3 values for the 2 columns prompt, answer"),
        ('prompt,answer\n"a\nb",c\n\nd,\n', ", line 5 has an empty 'answer'"),
        ('prompt,answer\na,b\n"c,d\n', ", line 3 is not CSV (unexpected end of data)"),
        ("prompt,answer,answer\na,b,c\n", ": the header names the column 'answer' more than once"),
        ("prompt,answer\na,b\nprompt,answer\nc,d\n", ", line 3 names the columns once more"),
        ("prompt,answer\nü,b\n".encode("latin-1"), " is not UTF-8 text (byte 14)"),
        ("prompt,answer\na,b\n".encode("utf-16"), " is not UTF-8 text (byte 0)"),
    ],
)
def test_bad_csv_is_refused_with_its_place(tmp_path: Path, text: str | bytes, message: str) -> None:
    file = written(tmp_path / "a.csv", text)
    assert refusal(file).startswith(f"{file}{message}".replace("\t", "\\t"))


def test_a_long_value_is_read_and_the_limit_of_others_is_left(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    file = written(tmp_path / "a.csv", f"prompt,answer\n{'x' * 300_000},b\n")
    assert len(Task.from_files("t", file).train["prompt"][0]) == 300_000
    assert csv.field_size_limit() == before


TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.strip)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
def test_every_text_comes_back_from_every_kind_of_file(tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in pairs]
    if {"prompt": "prompt", "answer": "answer"} in rows:
        return
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writerows([["prompt", "answer"], *pairs])
        written(tmp_path / f"a{suffix}", text.getvalue())
    write_parquet(tmp_path / "a.parquet", rows)
    written(tmp_path / "a.json", json.dumps(rows))
    written(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    tasks = [Task.from_files("t", tmp_path / f"a{end}") for end in (".jsonl", ".json", ".csv", ".tsv", ".parquet")]
    assert [rows_of(task.train) for task in tasks] == [rows] * 5
    assert len({task.fingerprint() for task in tasks}) == 1


# ------------------------------------------------------------------ Parquet


def test_labels_in_parquet_have_their_names(tmp_path: Path, capfd: Any) -> None:
    news(1, 0).to_parquet(str(tmp_path / "a.parquet"))
    task = Task.from_files("t", tmp_path / "a.parquet", prompt="text", answer="label")
    assert rows_of(task.train) == [{"prompt": "t0", "answer": "Sports"}, {"prompt": "t1", "answer": "World"}]


def test_bad_parquet_is_refused_with_its_place(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", [*ROWS, {"prompt": "p", "answer": None}])
    assert refusal(file) == f"{file}, row 3: 'answer' is None, not a string; fill it or remove the row."
    content = file.read_bytes()
    for damaged in (content[:-9], b"", b"prompt,answer\na,b\n", content[:4] + bytes(len(content) - 8) + content[-4:]):
        assert refusal(written(file, damaged)).startswith(f"{file} cannot be read as Parquet (")
    assert refusal(write_parquet(file, [{"prompt": "p"}])).startswith(f"{file}, row 0 has no key 'answer'")


# ------------------------------------------------------------------ folders of a recipe


@pytest.mark.parametrize("beside", ["a/{}", "a.{}"])
@pytest.mark.parametrize(("format", "suffix"), [("jsonl", "csv"), ("jsonl", "tsv"), ("csv", "tsv"), ("csv", "csv")])
def test_a_folder_may_hold_tables(tmp_path: Path, beside: str, format: str, suffix: str) -> None:
    text = "prompt,answer\np,007\n".replace(",", "\t" if suffix == "tsv" else ",")
    for split in ("train", "test"):
        written(tmp_path / beside.format(f"{split}.{suffix}"), text)
    (task,) = read_tasks(format, tmp_path)
    assert (task.name, rows_of(task.train), rows_of(task.test)) == ("a", *[[{"prompt": "p", "answer": "007"}]] * 2)


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_a_folder_may_hold_parquet(tmp_path: Path, format: str) -> None:
    write_parquet(tmp_path / "a" / "train.parquet", ROWS)
    write_parquet(tmp_path / "a.test.parquet", ROWS[:1])
    (task,) = read_tasks(format, tmp_path)
    assert (rows_of(task.train), rows_of(task.test)) == (ROWS, ROWS[:1])


def test_a_draw_of_csv_is_that_of_the_same_lines(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "answer": "x"} for n in range(50)]
    written(tmp_path / "csv" / "a.train.csv", "prompt,answer\n" + "".join(f"p{n},x\n" for n in range(50)))
    written(tmp_path / "jsonl" / "a.train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for folder, name in (("csv", "a.test.csv"), ("jsonl", "a.test.csv")):
        written(tmp_path / folder / name, "prompt,answer\np,x\n")
    both = read_tasks("mixed", tmp_path, ["csv/a"], max_train=7) + read_tasks("jsonl", tmp_path / "jsonl", max_train=7)
    assert len({task.fingerprint() for task in both}) == 1


@pytest.mark.parametrize("second", ["a/train.csv", "a/train.parquet", "a.train.jsonl"])
def test_two_files_for_one_split_are_refused(tmp_path: Path, second: str) -> None:
    for name in ("a/train.jsonl", "a/test.jsonl", second):
        written(tmp_path / name, "")
    (problem,) = find_task_problems("jsonl", tmp_path)
    assert problem.startswith("The task 'a' has its train samples more than once: ")
    assert f"'{tmp_path / second}'" in problem
    assert f"'{tmp_path / 'a/train.jsonl'}'" in problem


def test_a_general_test_may_be_a_table(tmp_path: Path) -> None:
    text = 'question,choice0,choice1,answer\n"How many, then?",one,two,1\n'
    written(tmp_path / "quiz/test.csv", text)
    (test,), problems = find_general_tests(["quiz"], tmp_path, None)
    assert (test.kind, problems) == ("choice", [])
    assert read_questions(test.path) == [{"question": "How many, then?", "choices": ["one", "two"], "answer": 1}]
    written(tmp_path / "quiz/test.jsonl", "")
    assert "'quiz' is there twice" in find_general_tests(["quiz"], tmp_path, None)[1][0]


# ------------------------------------------------------------------ any file at all


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "p", "prompt": "q", "answer": "a"}', ", line 2 has the key 'prompt' more than once in one object"),
        ('{"prompt": "p", "answer": {"x": 1, "x": 2}}', ", line 2, at ['answer'] has the key 'x' more than once"),
        ('{"prompt": ' + "[" * 100_000, ", line 2 is nested too deeply to be read"),
        ('{"prompt": "p", "answer": "a", "x": ' + "[" * 70 + "]" * 70 + "}", ", line 2 is nested more than 64 levels"),
        ('{"prompt": "p", "answer": ' + "7" * 5000 + "}", ", line 2 holds a number of too many digits"),
        ('{"prompt": "p", "answer": NaN}', ", line 2: 'answer' is nan, not a string"),
        ('{"prompt": "p", "answer": "a",}', ", line 2 is not JSON ("),
    ],
)
def test_json_that_cannot_be_meant_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    good = json.dumps(ROWS[0])
    file = written(tmp_path / "a.jsonl", f"{good}\n{text}\n")
    assert refusal(file).startswith(f"{file}{message}")
    assert len(refusal(file)) < 400
    if "line 2 is not JSON" in message or "line 2 is nested too" in message:
        return
    # The same row in a list.
    file = written(tmp_path / "a.json", f"[{good},\n{text}]")
    assert refusal(file).startswith(str(file))


def test_a_key_that_is_there_twice_is_refused_in_every_json_file(tmp_path: Path) -> None:
    for format, content in {
        "trace": '[{"prompt": "p", "answer": "a"}, {"prompt": "p", "answer": "a", "answer": "b"}]',
        "superni": '{"Definition": "d", "Instances": [], "Instances": [{"input": "x", "output": "y"}]}',
    }.items():
        for split in ("train", "test"):
            written(tmp_path / format / "t" / f"{split}.json", content)
        with pytest.raises(DataError, match=r"train\.json.* has the key '(answer|Instances)' more than once"):
            read_tasks(format, tmp_path / format)
    tools = '[{"name": "f", "name": "g"}]'
    with pytest.raises(DataError, match=r"'tools' is .*, not a list, nor JSON of one \(.*has the key 'name' more than"):
        Task.from_records("t", [{"prompt": [{"role": "user", "content": "hi"}], "answer": "a", "tools": tools}])


def test_a_label_that_is_there_twice_is_refused_with_its_file(tmp_path: Path) -> None:
    instances = json.dumps({"Definition": "d", "Instances": [{"input": "x", "output": "a"}]})
    for split in ("train", "test"):
        written(tmp_path / "t" / f"{split}.json", instances)
    for labels in ('["a", "b", "a"]', '["a", " "]'):
        written(tmp_path / "t" / "labels.json", labels)
        with pytest.raises(DataError, match=r"labels\.json: the label '(a| )' is empty or there twice"):
            read_tasks("long_sequence", tmp_path)


def test_a_second_key_among_many_is_found_at_once(tmp_path: Path) -> None:
    keys = ", ".join(f'"k{number}": 1' for number in range(60_000))
    assert "has the key 'k59999' more than once" in refusal(written(tmp_path / "a.jsonl", f'{{{keys}, "k59999": 1}}'))
    columns = ",".join(f"k{number}" for number in range(60_000))
    assert "the column 'k59999' more than once" in refusal(written(tmp_path / "a.csv", f"{columns},k59999\n"))


def test_a_file_of_settings_with_a_second_key_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "config.json", '{"lambda2": 1.0,\n"lambda2": 2.0}')
    with pytest.raises(ConfigError, match=r"config\.json .* has the key 'lambda2' more than once in one object"):
        SeekrConfig.load(file)
    with pytest.raises(ConfigError, match=r"config\.json .* is nested too deeply"):
        SeekrConfig.load(written(file, "[" * 100_000))


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "endless.jsonl").symlink_to("/dev/zero")
    for name, message in {
        "pipe.jsonl": "it is a pipe or a device, not a file",
        "endless.jsonl": "it is a pipe or a device, not a file",
        "folder.parquet": "it is a folder, not a file",
        "loop.csv": os.strerror(errno.ELOOP),
        "none.csv": os.strerror(errno.ENOENT),
        "a\0b": "no file has such a name",
        "x" * 300: os.strerror(errno.ENAMETOOLONG),
    }.items():
        assert f"cannot be read: {message}" in refusal(tmp_path / name)
    assert "is compressed or of a program of its own; unpack it" in refusal(tmp_path / "a.jsonl.gz")
    with pytest.raises(DataError, match=r"is given as .* not by its name; use Task\.from_records"):
        Task.from_files("t", ROWS)


def test_an_unreadable_file_or_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path / "a.train.csv", "prompt,answer\na,b\n")

    def closed(*args: Any, **keywords: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    # A mode of 0 does not keep root from reading.
    monkeypatch.setattr("builtins.open", closed)
    with pytest.raises(DataError, match=r"a\.train\.csv cannot be read: Permission denied"):
        read_text(file)
    monkeypatch.undo()
    monkeypatch.setattr(os, "listdir", closed)
    assert find_task_problems("jsonl", tmp_path) == [f"The folder '{tmp_path}' cannot be read: Permission denied."]


@pytest.mark.parametrize("path", ["x" * 300, "a\0b", "loop/b", "x" * 5000])
def test_a_path_that_no_folder_can_have_is_told(tmp_path: Path, path: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (problem,) = find_task_problems("jsonl", tmp_path / path)
    assert "is not there; the nearest folder that exists is" in problem
    assert len(problem) < 600


@pytest.mark.parametrize("name", ["x" * 201, "x" * 5000, "\x1b[31mt", "a\0b", "t\n"])
def test_a_name_that_no_folder_can_have_is_refused_in_bounds(tmp_path: Path, name: str) -> None:
    for refused in (lambda: Task.from_records(name, ROWS), lambda: read_tasks("jsonl", tmp_path, [name])):
        written(tmp_path / "t.train.jsonl", "")
        with pytest.raises(DataError) as error:
            refused()
        assert len(str(error.value)) < 600
        assert str(error.value).isprintable()


def test_a_message_names_a_long_path_in_bounds_and_a_list_by_its_first() -> None:
    assert named("a\nb\udcff") == "a\\nb\\udcff"
    assert named("x" * 999) == f"{'x' * 98}...{'x' * 98}"
    assert listed([]) == "none"
    assert listed(range(3)) == "0, 1, 2"
    assert listed(["abc"] * 9, 20) == "abc, abc, abc, abc and 5 more"
    assert listed(["x" * 999], 20) == "xxx...xxx"
    assert listed(["\x1b[31m", "a\nb"]) == "\\x1b[31m, a\\nb"
    assert cut("abcdefghij", 7) == "ab...ij"


# ------------------------------------------------------------------ all of it, damaged


@pytest.mark.parametrize("seed", [0, 1])
def test_damaged_files_are_read_or_refused_in_one_clear_line(tmp_path: Path, seed: int) -> None:
    bad, verdicts = [], Counter()
    for number, case in enumerate(mutations(seed, 90)):
        (tmp_path / str(number)).mkdir()
        verdict, said = look(case, tmp_path / str(number))
        verdicts[verdict] += 1
        bad += [f"{case.name}: {said}"] if verdict not in ("accepted", "refused") else []
    assert bad == []
    assert min(verdicts["accepted"], verdicts["refused"]) > 5


def _waiting(*_: Any) -> None:
    threading.Event().wait()


def _saying(error: type[Exception], text: str) -> Any:
    def read(case: Case, folder: Path) -> None:
        raise error(text.format(folder=folder))

    return read


@pytest.mark.parametrize(
    ("read", "verdict"),
    [
        (lambda *_: None, "accepted"),
        (_saying(DataError, "{folder}/t is broken."), "refused"),
        (_saying(DataError, "the task is broken."), "unclear"),
        (_saying(DataError, "{folder}/t is broken" + 700 * "."), "unclear"),
        (_saying(ValueError, "{folder}/t is broken."), "traceback"),
        (_saying(RecursionError, "{folder}/t is broken."), "traceback"),
        (_waiting, "traceback"),
    ],
    ids=["nothing", "clear", "nameless", "long", "other", "deep", "endless"],
)
def test_the_verdicts_tell_a_clear_line_from_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Any, verdict: str
) -> None:
    monkeypatch.setattr(stress.data, "_read", read)
    monkeypatch.setattr(stress.data, "SECONDS", 0.05)
    assert look(Case("", {}, {}, "t/train.jsonl"), tmp_path)[0] == verdict


def test_the_cases_are_those_of_the_seed() -> None:
    first, again, other = ([case.name for case in mutations(seed, 30)] for seed in (3, 3, 4))
    assert first == again != other
