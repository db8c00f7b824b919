"""Methods side by side: the plan, the checks that runs are comparable, the table, and that a stop loses nothing."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from support.small_run import TASKS, read_json, small_recipe

import seekr_peft.compare as compare_module
from seekr_peft.compare import FinishedRun, Variant, check_comparable, compare, plan_comparison
from seekr_peft.compare.answer import answer
from seekr_peft.compare.checks import what_is_the_same
from seekr_peft.compare.statistics import GRID, PairedDifference, Spread, sign_flip_p
from seekr_peft.errors import ConfigError, DivergenceError, RunError, RunInUseError
from seekr_peft.run.runner import run_recipe
from seekr_peft.run.task_costs import TaskCost

VARIANTS: dict[str, dict[str, Any]] = {
    "replay": {"method.name": "replay"},
    "random heads": {"method.head_choice": "random"},
    "all at once": {"method.name": "multitask"},
}


def recipe(output_dir: Path, **section: Any) -> dict[str, Any]:
    section = {"title": "A | try", "variants": VARIANTS, "seeds": [0, 1], "orders": 2, **section}
    return small_recipe(output_dir, compare=section)


def quietly(source: Any, *overrides: str, **options: Any) -> Any:
    return compare(source, overrides, console=Console(file=io.StringIO(), width=200), **options)


# The plan ---------------------------------------------------------------------------------------------------------


def test_a_plan_is_variants_by_orders_by_seeds_and_pairs_come_together(tmp_path: Path) -> None:
    plan = plan_comparison(recipe(tmp_path))
    assert [str(job) for job in plan.jobs[:4]] == [
        "replay, order 1, seed 0",
        "random heads, order 1, seed 0",
        "all at once, order 1, seed 0",
        "replay, order 1, seed 1",
    ]
    assert len(plan.jobs) == 3 * 2 * 2
    assert plan.orders[0] == TASKS and sorted(plan.orders[1]) == sorted(TASKS) and plan.orders[1] != TASKS
    job = plan.jobs[-2]
    assert (job.recipe.tasks.order, job.recipe.seed) == (plan.orders[1], 1)
    assert job.recipe.method["head_choice"] == "random" and job.recipe.method_config().seed == 1
    assert job.directory == tmp_path / "runs" / "random-heads" / "order2-seed1"
    assert plan.baseline == "replay"


def test_the_epochs_go_with_their_tasks(tmp_path: Path) -> None:
    source = recipe(tmp_path, orders=[TASKS, TASKS[::-1]])
    source["tasks"]["epochs"] = [1, 2, 3]
    plan = plan_comparison(source, seeds=[5])
    assert [job.recipe.tasks.epochs for job in plan.jobs[::3]] == [[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]


def test_names_of_methods_do_without_a_section_and_a_mode_that_a_method_needs_is_set(tmp_path: Path) -> None:
    plan = plan_comparison(small_recipe(tmp_path), methods=["replay", "ewc"], seeds=[3], orders=1)
    assert [variant.settings for variant in plan.variants] == [
        {"method.name": "replay"},
        {"method.name": "ewc", "adapter.mode": "continue"},
    ]
    assert [job.recipe.adapter.mode for job in plan.jobs] == ["stack", "continue"]
    defaults = plan_comparison(small_recipe(tmp_path))
    assert [variant.label for variant in defaults.variants] == ["sequential", "replay", "seekr"]
    assert defaults.seeds == [0, 1, 2] and len(defaults.orders) == 1


def test_comparisons_with_one_folder_of_runs_share_them(tmp_path: Path) -> None:
    plans = [plan_comparison(recipe(tmp_path / name, runs_dir=str(tmp_path / "runs"))) for name in ("a", "b")]
    assert [job.directory for job in plans[0].jobs] == [job.directory for job in plans[1].jobs]
    assert plans[0].directory != plans[1].directory


@pytest.mark.parametrize(
    ("section", "options", "message"),
    [
        ({}, {"methods": ["replay", "nothing"]}, "'nothing' is neither a variant of the recipe .* nor a method"),
        ({}, {"methods": ["replay", "replay"]}, "name one twice"),
        ({}, {"orders": [["first", "last"]]}, "the order first, last is not one of the recipe's tasks"),
        ({}, {"orders": 7}, "3 tasks do not have 7 different orders"),
        ({}, {"orders": []}, "there is no order"),
        ({}, {"seeds": [0, 0]}, r"the seeds are \[0, 0\]"),
        ({}, {"seeds": [-1]}, "seed -1 must be a whole number"),
        ({"baseline": "nothing"}, {}, "compare.baseline 'nothing' must be one of the variants"),
        ({"variants": {"a b": {}, "a-b": {}}}, {}, "the same folder name twice"),
        ({"variants": {"Seekr": {}, "seekr": {}}}, {}, "the same folder name twice"),
        ({"variants": {"a, b": {}}}, {}, "the label 'a, b' must be one line without commas"),
        ({"variants": {" a": {}}}, {}, "the label ' a' must be"),
        ({"variants": {"a": {"seed": 1}}}, {}, "'a' sets seed, which the comparison sets itself"),
        ({"variants": {"a": {"method": {"name": "ewc"}}}}, {}, "'a' has the key 'method'; write single keys"),
        ({"variants": {"a": {"compare.seeds": [1]}}}, {}, "'a' has the key 'compare.seeds'"),
        ({"variants": {"a": {"method.name": ["x"]}}}, {}, r"variant 'a': method.name must be one of .* got \['x'\]"),
        (
            {"variants": {"a": {"method.name": "ewc", "adapter.mode": "stack"}}},
            {},
            "'a' sets adapter.mode 'stack', but method 'ewc' needs continue",
        ),
        ({}, {"orders": [TASKS, TASKS]}, "have one twice"),
        ({"variants": {"a": {"method.lambda2": -1}}}, {}, "variant 'a': method.lambda2 must be at least 0"),
        ({"variants": {"a": {"method.lamda2": 1}}}, {}, "variant 'a': .*did you mean method.lambda2"),
        ({"seed": [1]}, {}, "compare.seed is an unknown key; did you mean compare.seeds"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(
    section: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        quietly(recipe(tmp_path / "out", **section), **options)
    assert not (tmp_path / "out").exists()


def test_all_mistakes_of_a_plan_are_told_at_once(tmp_path: Path) -> None:
    variants = {"a, b": {"seed": 1, "method": {}}, "c": {"method.name": "ewc", "adapter.mode": "stack"}}
    with pytest.raises(ConfigError) as caught:
        plan_comparison(recipe(tmp_path / "out", variants=variants), seeds=[-1], orders=7)
    found = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 6, found
    for part in (
        "one line without commas",
        "sets seed",
        "the key 'method'",
        "needs continue",
        "7 different",
        "seed -1",
    ):
        assert part in found


# Statistics -------------------------------------------------------------------------------------------------------


def test_the_test_counts_sign_patterns() -> None:
    """Differences 1, 2, 3: |sum| >= 6 for two of eight patterns; 1, 2, -3: every pattern has |sum| >= 0."""
    assert sign_flip_p([1, 2, 3]) == 0.25
    assert sign_flip_p([1, 2, -3]) == 1.0
    # |sum| >= 4 of 1, -1, 4: 4+1-1, 4-1+1, 4+1+1 and their negatives; 4-1-1 = 2 is below.
    assert sign_flip_p([1, -1, 4]) == 0.75
    assert sign_flip_p([0.1] * 6) == 2 / 64
    assert sign_flip_p([0.0, 0.0]) == 1.0
    # A pair without a difference says nothing, however many there are.
    assert sign_flip_p([0.1] * 4 + [0.0] * 40) == sign_flip_p([0.1] * 4) == 0.125


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=7))
def test_the_test_agrees_with_counting_in_whole_numbers(differences: list[int]) -> None:
    patterns = list(itertools.product((1, -1), repeat=len(differences)))
    sums = [abs(sum(s * d for s, d in zip(pattern, differences, strict=True))) for pattern in patterns]
    expected = sum(total >= abs(sum(differences)) for total in sums) / len(patterns)
    assert sign_flip_p([d / 7 for d in differences]) == pytest.approx(expected)


def test_many_pairs_are_counted_out_too() -> None:
    """Differences of one size: the number of pluses is binomial; 20 of 24 or more in either direction."""
    pairs = [0.1] * 20 + [-0.1] * 4
    expected = 2 * sum(math.comb(24, k) for k in range(20, 25)) / 2**24
    assert sign_flip_p(pairs) == pytest.approx(expected)
    # One pair far larger than all the others together decides alone: its sign is one of two.
    assert sign_flip_p([*pairs, -100.0]) == pytest.approx(1.0, abs=1e-3)
    assert sign_flip_p([0.3] * 64) == pytest.approx(2 / 2**64)


@given(st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=9))
def test_the_test_agrees_with_counting_the_patterns_of_any_numbers(differences: list[float]) -> None:
    patterns = list(itertools.product((1, -1), repeat=len([d for d in differences if d])))
    sizes = [abs(d) for d in differences if d]
    sums = [abs(math.fsum(s * d for s, d in zip(pattern, sizes, strict=True))) for pattern in patterns]
    observed, slack = abs(math.fsum(differences)), 2.1 / GRID * len(sizes) * sum(sizes)
    p = sign_flip_p(differences)
    assert sum(total >= observed + slack for total in sums) / len(sums) <= p + 1e-12
    assert p <= sum(total >= observed - slack for total in sums) / len(sums) + 1e-12


def test_means_and_spreads_by_hand() -> None:
    assert Spread.of([1.0, 2.0, 6.0]) == Spread(3.0, pytest.approx(7**0.5), 1.0, 6.0)
    assert Spread.of([4.0]).sd is None
    difference = PairedDifference.of([0.1, 0.3, -0.1])
    assert (difference.n, difference.wins, difference.p) == (3, 2, sign_flip_p([0.1, 0.3, -0.1]))
    assert difference.mean == pytest.approx(0.1) and difference.sd == pytest.approx(0.2)
    assert PairedDifference.of([0.1]).p is None
    # The same right answers added up in another order.
    rounding = PairedDifference.of([1e-17, 1e-17, 1e-17])
    assert (rounding.wins, rounding.p) == (0, 1.0)


# The whole --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three variants, two orders, two seeds; tests only read it."""
    directory = tmp_path_factory.mktemp("compare") / "out"
    return directory, quietly(recipe(directory))


@pytest.mark.slow
def test_the_table_has_the_figures_of_the_runs(compared: Any) -> None:
    directory, comparison = compared
    ops: dict[str, list[float]] = {}
    for run in comparison.runs:
        matrix = read_json(directory / run.directory / "accuracy_matrix.json")
        assert run.op == pytest.approx(statistics.fmean(row[-1] for row in matrix["scores"]))
        ops.setdefault(run.variant, []).append(run.op)
    assert {label: len(values) for label, values in ops.items()} == dict.fromkeys(VARIANTS, 4)
    for label, values in ops.items():
        found = comparison.variant(label)
        assert found.op.mean == pytest.approx(statistics.fmean(values))
        assert found.op.sd == pytest.approx(statistics.stdev(values))
    random = comparison.variant("random heads")
    pairs = [a - b for a, b in zip(ops["random heads"], ops["replay"], strict=True)]
    assert random.against_baseline.mean == pytest.approx(statistics.fmean(pairs), abs=1e-12)
    assert comparison.variant("replay").against_baseline is None
    joint = comparison.variant("all at once")
    assert joint.bwt is None and joint.learnt is None and joint.cost["n_steps"] == 18
    for label in VARIANTS:
        costs = [run.cost for run in comparison.runs if run.variant == label]
        cost = comparison.variant(label).cost
        assert cost["step_seconds"] == min(one["step_seconds"] for one in costs) > 0
        assert cost["kept_bytes"] == pytest.approx(statistics.fmean(one["kept_bytes"] for one in costs))
    gap = joint.op.mean - comparison.variant("replay").op.mean
    if gap > 0:
        assert joint.gap_closed == pytest.approx(1.0)
        assert random.gap_closed == pytest.approx((random.op.mean - comparison.variant("replay").op.mean) / gap)


@pytest.mark.slow
def test_the_files_say_the_same(compared: Any) -> None:
    directory, comparison = compared
    stored = read_json(directory / "comparison.json")
    assert stored == json.loads(json.dumps(comparison.to_dict()))
    assert comparison.subject == "random heads" and stored["answer"].startswith("Is random heads worth it? Not shown: ")
    assert stored["answer"] in (directory / "comparison.md").read_text()
    assert stored["same"] and "sign" in stored["test"]["assumption"]
    with (directory / "comparison.csv").open() as file:
        rows = {row["label"]: row for row in csv.DictReader(file)}
    assert float(rows["replay"]["op.mean"]) == comparison.variant("replay").op.mean
    assert json.loads(rows["random heads"]["settings"]) == VARIANTS["random heads"]
    with (directory / "runs.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 12
    text = (directory / "comparison.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| random heads"))
    spread = comparison.variant("random heads").op
    assert f"| 4 | {100 * spread.mean:.1f} ± {100 * spread.sd:.1f} |" in line
    assert "exact paired sign-flip test" in text and "gap closed" in text
    assert (directory / "comparison.html").is_file()


@pytest.mark.slow
def test_finished_runs_are_not_run_again_and_another_recipe_is_refused(
    compared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, comparison = compared
    monkeypatch.setattr(compare_module, "run_recipe", None)
    again = quietly(recipe(directory))
    assert again.runs == comparison.runs
    with pytest.raises(RunError, match=r"holds a finished run of another recipe \(training\.learning_rate was 0\.002"):
        quietly(recipe(directory), "training.learning_rate=1e-3")


@pytest.mark.slow
def test_stopped_in_the_middle_it_goes_on_to_the_same_result(
    compared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = compared
    calls = []

    def stop(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run_recipe(*args, **options)

    monkeypatch.setattr(compare_module, "run_recipe", stop)
    with pytest.raises(KeyboardInterrupt):
        quietly(recipe(tmp_path), orders=1)
    so_far = quietly(recipe(tmp_path), orders=1, run=False)
    assert [variant.n for variant in so_far.variants] == [1, 1, 0] and len(so_far.runs) == 2
    monkeypatch.setattr(compare_module, "run_recipe", run_recipe)
    finished = [(run.variant, run.order, run.seed, run.op) for run in quietly(recipe(tmp_path), orders=1).runs]
    assert finished == [(run.variant, run.order, run.seed, run.op) for run in whole.runs if run.order == 1]


@pytest.mark.slow
def test_a_run_that_another_process_works_on_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def run(source: Any, **options: Any) -> Any:
        if "all-at-once" in source.output_dir:
            tries.append(1)
            raise RunInUseError("in use")
        return run_recipe(source, **options)

    monkeypatch.setattr(compare_module, "run_recipe", run)
    comparison = quietly(recipe(tmp_path), seeds=[0], orders=1)
    assert [(variant.label, variant.n, variant.planned) for variant in comparison.variants] == [
        ("replay", 1, 1),
        ("random heads", 1, 1),
        ("all at once", 0, 1),
    ]
    assert comparison.variant("all at once").op is None and len(tries) == 2
    assert "| all at once | 0/1 |" in (tmp_path / "comparison.md").read_text()


@pytest.mark.slow
def test_a_run_that_diverges_does_not_keep_the_others_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def run(given: Any, **options: Any) -> Any:
        started.append(given.method_name)
        if len(started) == 1:
            raise DivergenceError("task 'last' diverged: the loss is nan.")
        return run_recipe(given, **options)

    monkeypatch.setattr(compare_module, "run_recipe", run)
    with pytest.raises(RunError, match="task 'last' diverged: the loss is nan"):
        quietly(recipe(tmp_path), methods=["sequential", "replay"], seeds=[0], orders=1)
    assert started == ["sequential", "replay"]


def test_what_another_process_has_finished_meanwhile_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes begin at once: the other one had the lock, and is done when this one comes back."""
    source, held = recipe(tmp_path), []

    def run(job: Any, **options: Any) -> Any:
        if not held:
            held.append(run_recipe(job, **options))
            raise RunInUseError("in use")
        return run_recipe(job, **options)

    monkeypatch.setattr(compare_module, "run_recipe", run)
    said = io.StringIO()
    console = Console(file=said, width=200)
    comparison = compare(source, methods=["replay"], seeds=[0], orders=1, console=console)
    assert comparison.variant("replay").n == 1 and "another process" not in said.getvalue()


@pytest.mark.slow
def test_a_mistake_that_shows_only_in_the_run_names_it_and_can_be_mended(tmp_path: Path) -> None:
    source = recipe(tmp_path, variants={"replay": {"method.name": "replay"}, "other": {"adapter.target_modules": "no"}})
    with pytest.raises(RunError, match=r"^other, order 1, seed 0: adapter: .*other-order1-seed0\.log\)$"):
        quietly(source, seeds=[0], orders=1)
    assert "| replay | 1 |" in (tmp_path / "comparison.md").read_text()
    source["compare"]["variants"]["other"] = {"adapter.target_modules": ["q_proj"]}
    # The same base, whichever of its layers have an adapter.
    assert [variant.n for variant in quietly(source, seeds=[0], orders=1).variants] == [1, 1]


@pytest.mark.slow
def test_tasks_of_several_formats_are_compared(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "data" / "jsonl" / name).mkdir(parents=True)
        for split in ("train", "test"):
            line = json.dumps({"prompt": f"word one {name} =", "answer": "apple"}) + "\n"
            (tmp_path / "data" / "jsonl" / name / f"{split}.jsonl").write_text(line * 8)
    source = recipe(tmp_path / "out", orders=1)
    source["tasks"] = {"format": "mixed", "path": str(tmp_path / "data"), "order": ["jsonl/a", "jsonl/b"]}
    comparison = quietly(source, methods=["replay"], seeds=[0])
    assert comparison.orders == [["a", "b"]] and comparison.variant("replay").n == 1
    assert (tmp_path / "out" / "comparison.html").is_file()


def test_an_output_dir_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"output_dir: .*file.* cannot be used \(Not a directory\)"):
        quietly(recipe(tmp_path / "file"))


def test_epochs_that_do_not_fit_the_tasks_of_the_folder_are_refused(tmp_path: Path) -> None:
    source = recipe(tmp_path)
    del source["tasks"]["order"]
    source["tasks"]["epochs"] = [1, 2]
    with pytest.raises(ConfigError, match=r"tasks\.epochs has 2 numbers for 4 tasks"):
        plan_comparison(source)


# The answer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("differences", "gap", "expected"),
    [
        (
            [0.2, 0.1, 0.15, 0.05, 0.1, 0.3],
            0.57,
            "Yes: it ends 15.0 OP above replay and is ahead in 6 of 6 pairs of runs (p = 0.031). It closes 57 % of the "
            "gap to training all tasks at once.",
        ),
        (
            [-0.2, -0.1, -0.15, -0.05, -0.1, -0.3],
            0.5,
            "No: it ends 15.0 OP below replay and is ahead in 0 of 6 pairs of runs (p = 0.031).",
        ),
        (
            [0.2, -0.1, 0.15, -0.05, 0.1, 0.3],
            0.5,
            "Not shown: it ends 10.0 OP above replay and is ahead in 4 of 6 pairs of runs (p = 0.219). That may be "
            "chance; more seeds or orders may tell.",
        ),
        (
            [0.2, 0.2, 0.2],
            None,
            "Not shown: it ends 20.0 OP above replay and is ahead in 3 of 3 pairs of runs (p = 0.250). 3 pairs cannot "
            "show it, it takes 6: give more --seeds, or --orders 2.",
        ),
        (
            [-0.01],
            None,
            "Not shown: it ends 1.0 OP below replay in the one pair of runs that there is. One pair cannot show it, it "
            "takes 6: give more --seeds, or --orders 2.",
        ),
        (
            [0.0] * 6,
            0.5,
            "Not shown: it ends level with replay and is ahead in 0 of 6 pairs of runs (p = 1.000, 6 alike). That may "
            "be chance; more seeds or orders may tell.",
        ),
        (
            [0.1, 0.1, 0.1, 0.1, 0.1, 0.0],
            None,
            "Not shown: it ends 8.3 OP above replay and is ahead in 5 of 6 pairs of runs (p = 0.062, 1 alike). 5 pairs "
            "cannot show it, it takes 6: give more --seeds, or --orders 2.",
        ),
        (
            [0.0001] * 7,
            None,
            "Not shown: it ends level with replay and is ahead in 7 of 7 pairs of runs (p = 0.016). That may be "
            "chance; more seeds or orders may tell.",
        ),
        (
            [0.1] * 12,
            None,
            "Yes: it ends 10.0 OP above replay and is ahead in 12 of 12 pairs of runs (p < 0.001).",
        ),
    ],
)
def test_the_answer_says_whether_it_is_worth_it(differences: list[float], gap: float | None, expected: str) -> None:
    assert answer("seekr", "replay", PairedDifference.of(differences), gap) == f"Is seekr worth it? {expected}"


@pytest.mark.parametrize(
    ("ratio", "more", "expected"),
    [
        (1.26, 3400, " A step took 1.3 times as long as one of replay. 3 kB more are kept on disk than by replay."),
        (None, -2.5e6, " 2.5 MB less are kept on disk than by replay."),
        (0.9, 40, " A step took 0.9 times as long as one of replay. As much is kept on disk as by replay."),
        (2.0, None, " A step took 2.0 times as long as one of replay."),
    ],
)
def test_the_answer_says_what_it_costs(ratio: float | None, more: float | None, expected: str) -> None:
    difference = PairedDifference.of([0.1] * 6)
    plain = answer("seekr", "replay", difference)
    assert answer("seekr", "replay", difference, None, ratio, more) == plain + expected


@pytest.mark.parametrize(
    ("variants", "baseline", "subject"),
    [
        (["random heads", "plain", "replay"], "replay", "plain"),
        (["random heads", "replay"], "replay", "random heads"),
        (["plain", "replay"], "plain", None),
        (["replay", "all at once"], "replay", None),
    ],
)
def test_the_answer_is_about_the_recipes_own_method(
    variants: list[str], baseline: str, subject: str | None, tmp_path: Path
) -> None:
    given = {**VARIANTS, "plain": {}}
    source = recipe(tmp_path, baseline=baseline, variants={name: given[name] for name in variants})
    comparison = quietly(source, run=False)
    assert comparison.subject == subject and comparison.answer() == ""


# Comparable -------------------------------------------------------------------------------------------------------


def fake_run(directory: Path, **changed: Any) -> Path:
    facts = {"base": "b", "fingerprint": "f", "n_steps": 6, "n_samples": 4, **changed}
    files = {
        "environment.json": {"base": facts["base"]},
        "tasks.json": [{"name": "first", "fingerprint": facts["fingerprint"]}],
        "costs.json": {"tasks": [TaskCost("first", facts["n_steps"]).to_json()]},
        "tasks/01-first/memory.json": {"task": "first", "n_samples": facts["n_samples"]},
    }
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"base": "other"}, "base model"),
        ({"fingerprint": "other"}, "data"),
        ({"n_steps": 7}, "optimiser steps"),
        ({"n_samples": 5}, "replay samples"),
    ],
)
def test_runs_that_differ_in_more_than_their_variants_are_refused(
    changed: dict[str, Any], what: str, tmp_path: Path
) -> None:
    runs = [FinishedRun(Variant(name, {}), 1, 0, fake_run(tmp_path / name)) for name in ("one", "two")]
    check_comparable(runs)
    fake_run(tmp_path / "two", **changed)
    with pytest.raises(RunError, match=f"two and .*one had other {what}"):
        check_comparable(runs)


def test_one_base_for_all_and_one_set_of_samples_for_each_seed(tmp_path: Path) -> None:
    variant = Variant("one", {})
    first = FinishedRun(variant, 1, 0, fake_run(tmp_path / "a"))
    check_comparable([first, FinishedRun(variant, 1, 1, fake_run(tmp_path / "b", fingerprint="drawn anew"))])
    with pytest.raises(RunError, match="had other data"):
        check_comparable([first, FinishedRun(variant, 2, 0, fake_run(tmp_path / "c", fingerprint="drawn anew"))])
    with pytest.raises(RunError, match="had other base model"):
        check_comparable([first, FinishedRun(variant, 2, 1, fake_run(tmp_path / "d", base="other"))])


def test_what_a_variant_names_may_differ_and_is_said(tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("one", {}, {}),
        ("ratio", {"method.replay_ratio": 0.5}, {"n_samples": 20}),
        ("base", {"model.name_or_path": "x"}, {"base": "other"}),
        ("steps", {"training.max_steps": 9}, {"n_steps": 9}),
        ("fewer", {"tasks.max_train": 9}, {"n_steps": 3, "fingerprint": "other", "n_samples": 2}),
    ]
    runs = [FinishedRun(Variant(name, keys), 1, 0, fake_run(tmp_path / name, **facts)) for name, keys, facts in cases]
    check_comparable(runs)
    same = what_is_the_same([run.variant for run in runs])
    assert same[0].endswith("but for base") and same[1].endswith("but for fewer")
    assert same[2].endswith("but for steps, fewer") and same[3].endswith("but for ratio, fewer")


BROKEN_COSTS = ["{", "[]", "{}", '{"tasks": []}', '{"tasks": [{"n_steps": 6}]}', '{"tasks": [6]}']
BROKEN_COSTS.append(json.dumps({"tasks": [{**TaskCost("first", 6).to_json(), "n_steps": None}]}))


@pytest.mark.parametrize("content", BROKEN_COSTS)
def test_costs_that_are_cut_off_or_of_another_version_are_one_sentence(content: str, tmp_path: Path) -> None:
    run = FinishedRun(Variant("one", {}), 1, 0, fake_run(tmp_path / "one"))
    (tmp_path / "one" / "costs.json").write_text(content)
    with pytest.raises(RunError, match=r"one/costs\.json cannot be read \(.+\); delete the run's folder"):
        check_comparable([run])
