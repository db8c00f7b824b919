"""Damaged data files of every format that a recipe can name, and what reading them comes to.

``mutations(seed, count)`` yields the cases, the same ones for the same seed; ``check_one(case, folder)`` writes one and
reads it as ``seekr-peft run`` does before it loads a model: the recipe's checks, the samples, their fingerprint.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seekr_peft.errors import SeekrError
from seekr_peft.evaluation.general import read_questions
from seekr_peft.recipe import general_tests, load_recipe
from seekr_peft.run.task_data import constant_answer_score, load_tasks

FORMATS = ("jsonl", "csv", "tsv", "parquet", "trace", "superni", "long_sequence", "mixed", "general")
"""``tsv`` is read as ``jsonl``, which takes all tables; ``general`` is a test of general ability beside good tasks."""

LONGEST_MESSAGE = 700
SECONDS = 20
"""A reading that takes longer hangs."""

_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f]")

Files = dict[str, bytes]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """Files below a folder, one of which is damaged, and the recipe's ``tasks`` section that reads them."""

    name: str
    files: Mapping[str, bytes]
    tasks: Mapping[str, Any]
    damaged: str
    """The file that a refusal must name; '' where it is not a file that is damaged."""
    general: bool = False
    place: Callable[[Path], None] | None = field(default=None, compare=False)
    """What to put in the place of the damaged file, where that is no file."""


def mutations(seed: int, count: int) -> Iterator[Case]:
    """``count`` cases, every format and every damage in turn, the rest of each drawn from ``seed``."""
    for index in range(count):
        rng = random.Random(f"{seed}/{index}")
        yield _case(rng, FORMATS[index % len(FORMATS)])


def check_one(case: Case, folder: Path) -> str:
    """What reading the case in the empty ``folder`` comes to: see ``look``, whose first value this is."""
    return look(case, folder)[0]


def look(case: Case, folder: Path) -> tuple[str, str]:
    """The verdict and what was said.

    "accepted", "refused" (a SeekrError of one bounded line that names what is damaged and has no control characters),
    "unclear" (a SeekrError of another kind) or "traceback" (any other error, or no end).
    """
    _write(case, folder)
    try:
        with _ending(SECONDS):
            _read(case, folder)
    except SeekrError as error:
        return ("refused" if _is_clear(str(error), case, folder) else "unclear"), str(error)
    except Exception:
        return "traceback", traceback.format_exc()
    return "accepted", ""


def _read(case: Case, folder: Path) -> None:
    recipe = load_recipe(
        {
            "model": {"name_or_path": "demo", "quantization": "none"},
            "tasks": {**case.tasks, "path": str(folder)},
            "evaluation": {"general": ["quiz"] if case.general else [], "general_path": str(folder)},
        }
    )
    for task in load_tasks(recipe):
        task.fingerprint()
        constant_answer_score(task)
    for test in general_tests(recipe):
        read_questions(test.path)


def _is_clear(message: str, case: Case, folder: Path) -> bool:
    lines = message.split("\n")
    bounded = all(len(line) <= LONGEST_MESSAGE and not _CONTROLS.search(line) for line in lines)
    # The other split's file, where a damaged one says of this that its answers are none.
    return bounded and any(case.damaged in line or folder.name in line for line in lines)


@contextmanager
def _ending(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not read within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _write(case: Case, folder: Path) -> None:
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    if case.place is not None:
        path = folder / case.damaged
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        case.place(path)


# ------------------------------------------------------------------ undamaged files


def _rows(rng: random.Random) -> Rows:
    rows: Rows = [
        {"prompt": f"What is {n}, “{n}”?\nAnswer:", "answer": f"number {n}"} for n in range(rng.randint(1, 5))
    ]
    return rows


def _chats(rng: random.Random) -> Rows:
    """Rows with all that a sample of messages may have."""
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?", "tool_calls": None}]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "number"}}}}]
    told = {"role": "assistant", "content": "four"}
    rows: Rows = [
        {"messages": [*asked, told], "tools": tools, "chat_template_kwargs": {"thinking": False}},
        {"prompt": asked, "completion": [told], "tools": json.dumps(tools)},
        {"prompt": "q", "answer": "a", "prompt_messages": json.dumps({"messages": asked, "tools": None})},
    ]
    return rng.sample(rows, rng.randint(1, 3))


def _json_lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _csv(rows: Rows, delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _parquet(rows: Rows) -> bytes:
    import pyarrow
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, write_page_checksum=True)
    return buffer.getvalue()


def _superni(rows: Rows) -> bytes:
    instances = [{"input": row["prompt"], "output": [row["answer"]]} for row in rows]
    return json.dumps({"Definition": ["Do it."], "Instances": instances}).encode()


def _questions(rows: Rows) -> bytes:
    return _json_lines([{"question": row["prompt"], "choices": ["a", row["answer"]], "answer": 1} for row in rows])


_WRITERS: dict[str, tuple[str, Callable[[Rows], bytes]]] = {
    "jsonl": (".jsonl", _json_lines),
    "csv": (".csv", _csv),
    "tsv": (".tsv", lambda rows: _csv(rows, "\t")),
    "parquet": (".parquet", _parquet),
    "trace": (".json", lambda rows: json.dumps(rows).encode()),
    "superni": (".json", _superni),
    "long_sequence": (".json", _superni),
}


def _undamaged(rng: random.Random, format: str) -> tuple[Files, dict[str, Any], list[str]]:
    """The files, the recipe's ``tasks``, and which of the files may be damaged."""
    if format == "general":
        files, tasks, _ = _undamaged(rng, "jsonl")
        return {**files, "quiz/test.jsonl": _questions(_rows(rng))}, {**tasks, "order": ["t"]}, ["quiz/test.jsonl"]
    if format == "mixed":
        inner = rng.choice(("jsonl", "trace", "long_sequence"))
        files, _, own = _undamaged(rng, inner)
        below = {f"{inner}/{name}": content for name, content in files.items()}
        return below, {"format": "mixed", "order": [f"{inner}/t"]}, [f"{inner}/{name}" for name in own]
    suffix, write = _WRITERS[format]
    chats = format in ("jsonl", "trace") and rng.random() < 0.4
    rows = _chats if chats else _rows
    files = {f"t/{split}{suffix}": write(rows(rng)) for split in ("train", "test")}
    if format == "long_sequence":
        files["t/labels.json"] = json.dumps([f"number {n}" for n in range(5)]).encode()
    return files, {"format": "jsonl" if format == "tsv" else format}, list(files)


# ------------------------------------------------------------------ damage


def _case(rng: random.Random, format: str) -> Case:
    files, tasks, names = _undamaged(rng, format)
    damaged = rng.choice(names)
    general, drawn = format == "general", rng.random()
    if drawn < 0.12:
        what, place = rng.choice(_PLACES)
        return Case(f"{format}: {damaged} is {what}", files, tasks, damaged, general, place)
    if drawn < 0.22:
        return _in_names(rng, format, files, tasks, general)
    damage = _in_bytes if drawn < 0.5 else _DAMAGES[damaged.rpartition(".")[2]]
    what, content = damage(rng, files[damaged])
    return Case(f"{format}: {damaged} {what}", {**files, damaged: content}, tasks, damaged, general)


def _in_bytes(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    at = rng.randrange(len(content))
    bit = content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    end = min(len(content), at + rng.randint(1, 40))
    text = content.decode("utf-8", "replace")
    what, damaged = rng.choice(
        [
            (f"cut at byte {at}", content[:at]),
            (f"with a flipped bit in byte {at}", bit),
            (f"with a flipped bit in byte {at}", bit),
            ("emptied", b""),
            ("of whitespace", b" \r\n\t \n"),
            (f"with NUL at byte {at}", content[:at] + b"\0" + content[at:]),
            (f"zeroed from byte {at}", content[:at] + bytes(len(content) - at)),
            ("with a BOM", b"\xef\xbb\xbf" + content),
            ("with two BOMs", b"\xef\xbb\xbf" * 2 + content),
            ("in UTF-16", text.encode("utf-16")),
            ("in UTF-16 without a mark", text.encode("utf-16-be")),
            ("in Latin-1", text.encode("latin-1", "replace") + b"\xe9"),
            (f"with ESC at byte {at}", content[:at] + b"\x1b[2J\x9b\x07" + content[at:]),
            (f"with half a character at byte {at}", content[:at] + b"\xed\xa0\xbd" + content[at:]),
            (f"with an escaped half character at byte {at}", content[:at] + b"\\ud83d" + content[at:]),
            ("with CRLF", content.replace(b"\n", b"\r\n")),
            ("with CR", content.replace(b"\n", b"\r")),
            ("with a trailing comma", content.rstrip() + b","),
            (f"without bytes {at} to {end}", content[:at] + content[end:]),
            (f"with bytes {at} to {end} twice", content[:end] + content[at:]),
            (f"with a megabyte at byte {at}", content[:at] + b"x" * 2**20 + content[at:]),
            ("of brackets", rng.choice((b"[", b'{"a":', b'[{"x":')) * 100_000),
            ("of another format", rng.choice((_json_lines, _csv, _parquet, _superni))(_rows(rng))),
            ("of random bytes", rng.randbytes(rng.randint(1, 3000))),
            ("twice", content + content),
        ]
    )
    return what, damaged


_LONG = "x" * 100_000
_STRANGE: tuple[str, ...] = (
    "null", "true", "0", "-1", "3.5", "NaN", "Infinity", "-Infinity", "1e999", "[]", "{}", "[[]]", '[{"a": 1}]', '""',
    '" "', '"\\u2028"', '"\\u0000"', '"\\u001b[31mred"', '"\\ud83d"', '["x", 1]', '{"role": "user"}', '[{"role": 1}]',
    '[{"role": "user", "content": null}]', '[{"role": "assistant", "content": "a", "x": NaN}]', '{"messages": 3}',
    '"{\\"messages\\": {}}"', '"{\\"messages\\": [], \\"tools\\": 1}"', "9" * 5000, "[" * 90 + "]" * 90,
    "[" * 900 + "]" * 900, "[" * 100_000, '{"a":' * 200 + "1" + "}" * 200, f'"{_LONG}"', f'{{"{_LONG}": 1}}',
    '{"a": 1, "a": 2}', f"[{', '.join(['1'] * 3000)}]",
)  # fmt: skip


def _in_json(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    """Another value, key or a second key somewhere in a JSON text."""
    text = content.decode()
    # Before a value, or a key that then gets another name.
    places = list(re.finditer(r'"(?:[^"\\]|\\.)*"|\b\d+\b|\bnull\b|\bfalse\b', text))
    found = rng.choice(places)
    is_key = text[found.end() :].lstrip().startswith(":")
    strange = rng.choice(_STRANGE)
    if not is_key:
        return f"with {strange[:30]} in place of {found[0][:30]}", _put(text, found, strange)
    if rng.random() < 0.3:
        return f"with {found[0][:30]} twice", _put(text, found, f"{found[0]}: {strange}, {found[0]}")
    if rng.random() < 0.5:
        return "with a key that nobody knows", _put(text, found, f'"un\\u001bknown": {strange}, {found[0]}')
    return f"without the key {found[0][:30]}", _put(text, found, '"other"')


def _put(text: str, found: re.Match[str], other: str) -> bytes:
    return (text[: found.start()] + other + text[found.end() :]).encode("utf-8", "surrogatepass")


def _in_csv(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    text = content.decode()
    header, _, rest = text.partition("\r\n")
    mark = "\t" if "\t" in header else ","
    what, damaged = rng.choice(
        [
            ("with semicolons", text.replace(mark, ";")),
            ("with quoted semicolons", f'"prompt";"answer"\n{rest}'),
            ("with bars", text.replace(mark, "|")),
            ("of its header alone", header),
            ("without a header", rest),
            ("with a column twice", f"{header}{mark}answer\n{rest}"),
            ("with other columns", f"text{mark}label\n{rest}"),
            ("with one column", f"prompt\n{rest}"),
            ("with a value too many", f"{text}a{mark}b{mark}c\n"),
            ("with a value too few", f"{text}a\n"),
            ("with an open quotation mark", f'{text}"a{mark}b\n'),
            ("with a quotation mark within", f'{text}"a" b{mark}c\n'),
            ("with empty values", f"{text}{mark}\n"),
            ("with an empty answer", f"{text}a{mark}\n"),
            ("with a blank answer", f"{text}a{mark}  \n"),
            ("with numbers and NA", f"{text}a{mark}007\nb{mark}NA\nc{mark}None\n"),
            ("with a megabyte in a value", f"{text}{'x' * 2**20}{mark}b\n"),
            ("with ten thousand columns", f"{mark.join(map(str, range(10_000)))}\n{rest}"),
            ("with a long name of a column", f"{_LONG}{mark}answer\n{rest}"),
            ("with ESC in the header", f"\x1b[31mprompt{mark}answer\n{rest}"),
            ("with a line before the header", f"sep={mark}\n{text}"),
        ]
    )
    return what, damaged.encode()


def _in_parquet(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    import datetime
    import decimal

    values: list[Any] = [
        3, -1, 3.5, float("nan"), None, b"\xff\xfe", True, [], ["a", "b"], {"a": 1}, [{"role": "user", "content": "q"}],
        [{"role": "assistant", "content": "a"}], "", "  ", "a\0b", "\x1b[31m", _LONG, datetime.datetime(2020, 1, 1),
        datetime.date(2020, 1, 1), decimal.Decimal("1.50"), {"role": ["user"], "content": ["q"]},
    ]  # fmt: skip
    column, value = (
        rng.choice(("prompt", "answer", "instruction", "other", "prompt_messages", "tools")),
        rng.choice(values),
    )
    rows = [{**row, column: value} for row in _rows(rng)]
    return rng.choice(
        [
            (f"with {str(value)[:30]!r} in {column}", _parquet(rows)),
            (f"with {str(value)[:30]!r} in {column}", _parquet(rows)),
            ("without rows", _rowless()),
            ("with a column twice", _rowless(["prompt", "answer", "answer"])),
            ("without its columns", _parquet([{"text": "a", "label": 1}])),
            ("without its end", content[:-8]),
            ("with a footer too long", content[:-8] + b"\xff\xff\xff\x7fPAR1"),
            ("with features that are none", _with_metadata(rng.choice((b"{", b"[]", b'{"info": 3}', b"\xff")))),
        ]
    )


_DAMAGES: dict[str, Callable[[random.Random, bytes], tuple[str, bytes]]] = {
    "json": _in_json,
    "jsonl": _in_json,
    "csv": _in_csv,
    "tsv": _in_csv,
    "parquet": _in_parquet,
}


def _rowless(columns: list[str] | None = None) -> bytes:
    import pyarrow
    from pyarrow import parquet

    names = columns or ["prompt", "answer"]
    buffer = io.BytesIO()
    arrays = [pyarrow.array(["a"] if columns else [], pyarrow.string()) for _ in names]
    parquet.write_table(pyarrow.Table.from_arrays(arrays, names=names), buffer)
    return buffer.getvalue()


def _with_metadata(text: bytes) -> bytes:
    """A file with something else where ``datasets`` keeps the features."""
    import pyarrow
    from pyarrow import parquet

    buffer = io.BytesIO()
    table = pyarrow.table({"prompt": ["a"], "answer": ["b"]}).replace_schema_metadata({"huggingface": text})
    parquet.write_table(table, buffer)
    return buffer.getvalue()


def _unreadable(path: Path) -> None:
    path.write_text("secret")
    path.chmod(0)


_PLACES: list[tuple[str, Callable[[Path], None]]] = [
    ("missing", lambda path: None),
    ("a folder", lambda path: path.mkdir()),
    ("a pipe", lambda path: os.mkfifo(path)),
    ("a link to itself", lambda path: path.symlink_to(path)),
    ("a link to nothing", lambda path: path.symlink_to("nowhere")),
    ("a link to a device without an end", lambda path: path.symlink_to("/dev/zero")),
    ("a link to its folder", lambda path: path.symlink_to(".")),
    ("unreadable", _unreadable),
]


def _in_names(rng: random.Random, format: str, files: Files, tasks: dict[str, Any], general: bool) -> Case:
    """A task's name in the recipe, the folder's on the disk, or a file for the same split in another format."""
    strange = ["x" * 300, "x" * 5000, "a\0b", "\x1b[31mt", "..", ".", "", "a/b", "a b", "t\n", "t\ud800", "é" * 120]
    name = rng.choice(strange)
    if rng.random() < 0.5 or format in ("mixed", "general"):
        order = [f"{rng.choice(('jsonl', 'csv', 'nope'))}/{name}"] if format == "mixed" else [name]
        return Case(f"{format}: the order names {name[:20]!r}", files, {**tasks, "order": order}, "", general)
    if rng.random() < 0.5:
        folder = rng.choice(["\x1b[31mt", "a b", "é", "t\n", "x" * 250, "-t"])
        moved = {path.replace("t/", f"{folder}/", 1): content for path, content in files.items()}
        return Case(f"{format}: the task's folder is {folder[:20]!r}", moved, tasks, "", general)
    first = next(iter(files))
    second = first.rpartition(".")[0] + (".csv" if not first.endswith(".csv") else ".tsv")
    return Case(f"{format}: {second} beside {first}", {**files, second: _csv(_rows(rng))}, tasks, "", general)
