"""A part of ``make stress``: a few cases of each family, and that the harness tells what is wrong from what is not."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from stress.bench import DIFFERENT, IDENTICAL, REFUSED, TRACEBACK, UNNAMED, Outcome, contents, differences, refusal
from stress.families import FAMILIES, damages, worst
from stress.frame import Case, Counts, chosen, mutated, run_cases
from stress.process import End

# Python from 3.12 on; the forked processes do nothing that needs the threads of other tests.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
FEW = {"kills": 2, "damage": 5, "checkpoint-kills": 1, "checkpoint-damage": 1, "signals": 2, "disk": 2, "rights": 5,
       "repair": 1}  # fmt: skip


@pytest.mark.slow
def test_a_few_cases_of_each_family_end_well() -> None:
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    few = ",".join(f"{family}={count}" for family, count in FEW.items())
    done = subprocess.run(
        [sys.executable, "-m", "stress", "--only", few, "--seed", "1"], env=environment, capture_output=True, text=True
    )
    pattern = r"(\S+): (\d+) tried.* (\d+) refused by name, (\d+) tracebacks, (\d+) accepted and different"
    counts = {match[1]: [int(text) for text in match.groups()[1:]] for match in re.finditer(pattern, done.stdout)}
    assert {family: (numbers[0], *numbers[2:]) for family, numbers in counts.items()} == {
        family: (count, 0, 0) for family, count in FEW.items()
    }, done.stderr
    assert done.returncode == 0, done.stderr
    assert FEW.keys() == FAMILIES.keys()


# The harness itself -------------------------------------------------------------------------------------------------


def outcome_of(kind: str) -> Case:
    return Case(kind, lambda folder: Outcome(kind, "seen"))


def end_at_once(folder: Path) -> Outcome:
    os.kill(os.getpid(), signal.SIGKILL)
    return Outcome(IDENTICAL)


def fail(folder: Path) -> Outcome:
    raise ValueError("of the harness")


def test_every_case_is_counted_and_each_bad_one_told(tmp_path: Path) -> None:
    cases = [outcome_of(kind) for kind in (IDENTICAL, REFUSED, DIFFERENT, UNNAMED, IDENTICAL)]
    cases += [Case("ends at once", end_at_once), Case("fails", fail)]
    counts = run_cases("family", list(enumerate(cases)), tmp_path, 2, "again")
    assert str(counts) == (
        "family: 7 tried, 2 identical, 1 refused by name, 1 refused without a name, 2 tracebacks, "
        "1 accepted and different"
    )
    told = "\n".join(sorted(counts.failed))
    assert re.findall(r"again: again (\d)", told) == ["2", "3", "5", "6"]
    assert "ValueError: of the harness" in told and "the case did not end" in told
    assert list(tmp_path.iterdir()) == []


def test_cases_are_drawn_by_the_seed_alone_and_keep_their_numbers() -> None:
    cases = [outcome_of(str(number)) for number in range(50)]
    drawn = chosen(cases, 3, 5, set())
    assert drawn == chosen(cases, 3, 5, set()) != chosen(cases, 4, 5, set())
    assert [case.title for _, case in drawn] == [str(number) for number, _ in drawn] and len(drawn) == 5
    assert chosen(cases, 3, None, set()) == list(enumerate(cases)) == chosen(cases, 3, 50, set())
    assert chosen(cases, 3, 5, {7}) == [(7, cases[7])]


def test_the_verdicts_of_mutated_input_are_counted(tmp_path: Path) -> None:
    verdicts = ["accepted", "refused", "traceback: KeyError", "unclear", "unusable: x", "refused"]
    module = SimpleNamespace(
        mutations=lambda seed, count: iter(verdicts[:count]), check_one=lambda case, folder: str(case)
    )
    counts = run_cases("recipes", list(enumerate(mutated(module, 0, 6))), tmp_path, 2, "again")
    assert counts.kinds == {"accepted": 1, REFUSED: 2, TRACEBACK: 1, UNNAMED: 1, DIFFERENT: 1}
    assert len(counts.failed) == 3 and isinstance(counts, Counts)


def test_other_bytes_are_told_whatever_the_file(tmp_path: Path) -> None:
    for name in ("one", "other"):
        for file in ("a/b.safetensors", "metrics.jsonl", "costs.json", "recipe.yaml"):
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"seed: 1\n")
    one, other = tmp_path / "one", tmp_path / "other"
    (one / "recipe.yaml").write_text(f"output_dir: {one}\nseed: 1\n")
    (one / "costs.json").write_bytes(b"other seconds")
    assert differences(one, other) == [] and len(contents(one)) == 4
    (one / "a" / "b.safetensors").write_bytes(b"seed: 0\n")
    (one / "recipe.yaml").write_text(f"output_dir: {one}\nseed: 2\n")
    (other / "costs.json").unlink()
    (one / ".left.partial").touch()
    assert differences(one, other) == [".left.partial", "a/b.safetensors", "costs.json", "recipe.yaml"]


def test_every_damage_changes_the_file(tmp_path: Path) -> None:
    import random

    run = tmp_path / "run"
    for place in ("tasks/01-a/x.json", "tasks/02-b/x.json"):
        (run / place).parent.mkdir(parents=True)
        (run / place).write_bytes(place.encode())
    path, done = run / "tasks" / "01-a" / "x.json", damages(random.Random(0))
    for what, change in done.items():
        copy = tmp_path / what / "run"
        shutil.copytree(run, copy)
        change(copy / path.relative_to(run))
        assert contents_or_none(copy / path.relative_to(run)) != path.read_bytes(), what
    assert len(done) == 11


def contents_or_none(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def test_a_refusal_names_what_is_wrong() -> None:
    named = End(2, "", "seekr-peft: run/a.json is damaged.")
    assert refusal(named, "a.json").kind == REFUSED and refusal(named, "b.json").kind == UNNAMED
    assert refusal(End(2, "", "Usage: a.json"), "a.json").kind == UNNAMED
    assert not named.failed and End(1, "", "").failed and End(None, "", "").failed
    assert End(0, "", "Traceback (most recent call last)").failed
    assert worst([Outcome(IDENTICAL), Outcome(TRACEBACK), Outcome(REFUSED)]).kind == TRACEBACK
