"""The report: what is read from a run directory, what pages and terminal show, what is refused."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file
from support.page_reader import PageReader
from support.run_directory_fixture import build_run, operating_point, write_json

from seekr_peft.errors import RunError
from seekr_peft.report import figures, page, read_run, render_inspection, write_report

ATTACK = "<script>alert('x')</script>"
FOUR = ["C-STANCE", "FOMC", "MeetingBank", "Py150"]
TWELVE = [f"{number} of the tasks with really very long names" for number in range(101, 113)]
ALL_FIGURES = {"accuracy_matrix", "retention", "head_importance", "loss_terms", "memory"}


def inspected(run_directory: Path, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    render_inspection(run_directory, console)
    return console.export_text()


def with_general(run_directory: Path) -> Path:
    """Adds two tests of general ability, measured before the first of FOUR and after the first two."""
    content = {
        "tests": [
            {"name": "mmlu", "kind": "choice", "unit": "fraction right", "file": "mmlu/test.jsonl"},
            {"name": "story", "kind": "text", "unit": "nats per token", "file": "text/story.txt"},
        ],
        "after": ["", *FOUR[:2]],
        "values": {"mmlu": [0.25, 0.3, 0.2], "story": [3.0, None, 3.5]},
    }
    write_json(run_directory / "general.json", content)
    return run_directory


def refusal(run_directory: Path) -> str:
    with pytest.raises(RunError) as caught:
        read_run(run_directory)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three tasks with its report written; tests only read it."""
    run = build_run(tmp_path_factory.mktemp("three") / "run")
    write_report(run)
    return run


# ---- reading


def test_op_and_bwt_equal_the_plain_loops(three: Path) -> None:
    scores = json.loads((three / "accuracy_matrix.json").read_text())["scores"]
    run = read_run(three)
    assert (run.op, run.bwt) == pytest.approx(operating_point(scores, 3), abs=1e-12)


def test_op_and_bwt_of_a_stopped_run_cover_the_finished_tasks(tmp_path: Path) -> None:
    run = read_run(build_run(tmp_path / "run", FOUR, n_finished=2))
    first, second = run.scores[:2, 1]
    assert run.op == pytest.approx((first + second) / 2)
    assert run.bwt == pytest.approx(first - run.scores[0, 0])


def test_matrix_with_rows_for_the_finished_tasks_only_is_padded(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", FOUR, n_finished=2)
    path = run / "accuracy_matrix.json"
    write_json(path, {"tasks": FOUR[:2], "scores": [[0.9, 0.6], [None, 0.8]], "op": 0.7, "bwt": -0.3})
    record = read_run(run)
    assert record.scores.shape == (4, 4)
    assert (record.op, record.bwt) == pytest.approx((0.7, -0.3))


def test_bwt_is_none_when_only_the_last_column_was_measured(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", ["a", "b"])
    rows = {"tasks": ["a", "b"], "scores": [[None, 0.5], [None, 0.7]]}
    write_json(run / "accuracy_matrix.json", rows)
    record = read_run(run)
    assert record.op == pytest.approx(0.6)
    assert record.bwt is None


def test_steps_count_on_over_the_whole_sequence(three: Path) -> None:
    run = read_run(three)
    assert run.task_starts() == [0, 60, 120, 180]
    steps, values = run.loss_series("replay_loss")[2]
    assert steps[0] == 123
    assert steps[-1] == 180
    assert len(values) == 20


def test_a_task_begun_again_keeps_its_last_pass_only(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", ["a", "b"], steps=5)
    with (run / "metrics.jsonl").open("a") as file:
        for step in (1, 2, 3):
            line = {"task": "b", "task_index": 1, "step": step, "epoch": 0.1, "loss": 7.0}
            file.write(json.dumps(line) + "\n")
    steps, values = read_run(run).loss_series("loss")[1]
    assert steps.tolist() == [6, 7, 8]
    assert values.tolist() == [7.0, 7.0, 7.0]


def test_a_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", ["a"], steps=5)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"task": "a", "task_index": 0, "st')
    assert len(read_run(run).metrics) == 5


def test_last_selection_is_the_last_tasks(three: Path) -> None:
    heads = read_run(three).heads
    assert heads is not None
    assert heads.last_selected is not None
    task, selected = heads.last_selected
    assert task == 2
    assert selected.shape == (6, 8)
    assert selected.sum() == 6


def test_every_optional_file_may_be_missing(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", n_finished=3)
    for path in sorted(run.rglob("*"), reverse=True):
        if path.is_file() and path.name not in ("state.json", "accuracy_matrix.json"):
            path.unlink()
    assert write_report(run).is_file()
    assert {path.stem for path in (run / "figures").iterdir()} == {
        "accuracy_matrix",
        "retention",
    }


def test_a_run_before_its_first_finished_task_needs_no_matrix(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", FOUR, n_finished=0)
    (run / "accuracy_matrix.json").unlink()
    assert "0 of its 4 tasks" in PageReader(write_report(run)).text
    assert "0 of 4 tasks finished" in inspected(run)


def test_general_ability_is_read_up_to_its_last_measurement(tmp_path: Path) -> None:
    mmlu, text = read_run(with_general(build_run(tmp_path / "run", FOUR, n_finished=2))).general
    assert (mmlu.name, mmlu.kind, mmlu.values.tolist()) == ("mmlu", "choice", [0.25, 0.3, 0.2])
    assert mmlu.shown.tolist() == [25.0, 30.0, 20.0]
    assert mmlu.words() == "mmlu 25.0 % right at first, 20.0 % after task 2 (-5.0 points)"
    assert text.values[[0, 2]].tolist() == [3.0, 3.5] and np.isnan(text.values[1])
    assert text.words() == "story 3.000 nats per token at first, 3.500 after task 2 (+0.500)"


def test_general_ability_of_a_run_in_its_first_task_is_the_bases(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", FOUR, n_finished=0)
    tests = [{"name": "mmlu", "kind": "choice"}]
    for after, values, words in (
        ([""], [0.25], "mmlu 25.0 % right at first"),
        ([], [], "mmlu not measured"),
    ):
        write_json(run / "general.json", {"tests": tests, "after": after, "values": {"mmlu": values}})
        assert [curve.words() for curve in read_run(run).general] == [words]
        assert write_report(run).is_file()


# ---- refusals


def test_missing_directory_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in refusal(tmp_path / "nowhere")


def test_directory_without_state_is_not_a_run_directory(tmp_path: Path) -> None:
    assert "is not a run directory" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["state.json", "accuracy_matrix.json", "environment.json", "tasks/02-contracts/memory.json"],
)
def test_broken_json_is_named(tmp_path: Path, name: str) -> None:
    run = build_run(tmp_path / "run")
    (run / name).write_text('{"tasks": [')
    assert f"{run / name} is not valid JSON" in refusal(run)


def test_broken_metrics_line_is_named_with_its_number(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", ["a"], steps=3)
    path = run / "metrics.jsonl"
    path.write_text("{}}\n" + path.read_text())
    assert f"{path}, line 1 is not valid JSON" in refusal(run)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: [unclosed\nseed: 3", "recipe.yaml is not YAML: "),
        ("a: &a [*a]", "the alias *a stands for something that holds it"),
        ("[" * 100_000, "more than 20 levels"),
        ("seed: 1\nseed: 2", "the key seed is given twice, in line 1 and in line 2"),
    ],
    ids=lambda text: text[:20],
)
def test_broken_recipe_is_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    (run / "recipe.yaml").write_text(text)
    found = refusal(run)
    assert message in found and found.endswith("; correct it or remove it.") and len(found.splitlines()) == 1


def test_broken_importance_is_named(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    (run / "importance.safetensors").write_bytes(b"not a tensor")
    assert "importance.safetensors is not a safetensors file" in refusal(run)


def test_missing_matrix_of_a_finished_task_is_named(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    (run / "accuracy_matrix.json").unlink()
    assert f"{run / 'accuracy_matrix.json'} is missing" in refusal(run)


@pytest.mark.parametrize(
    "change",
    [{"after": ["", "x", "FOMC"]}, {"values": {"mmlu": [0.1, 0.2, 0.3]}}, {"tests": [{}]}, {"after": [""]}],
)
def test_general_ability_that_does_not_fit_the_run_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    path = with_general(build_run(tmp_path / "run", FOUR)) / "general.json"
    write_json(path, {**json.loads(path.read_text()), **change})
    assert f"{path} does not hold tests of general ability after these tasks" in refusal(path.parent)


@pytest.mark.parametrize("score", [54.99, -0.1, "0.9", True])
def test_score_that_is_no_fraction_is_refused_with_its_place(tmp_path: Path, score: object) -> None:
    run = build_run(tmp_path / "run", ["a", "b"])
    content = {"tasks": ["a", "b"], "scores": [[0.5, score], [None, 0.5]]}
    write_json(run / "accuracy_matrix.json", content)
    assert f"score {score!r} in row 0, column 1" in refusal(run)


def test_matrix_of_other_tasks_is_refused(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", ["a", "b"])
    write_json(run / "accuracy_matrix.json", {"tasks": ["b", "a"], "scores": [[0, 0], [0, 0]]})
    assert "come from different runs" in refusal(run)


def test_memory_without_its_size_is_refused(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    write_json(run / "tasks/01-tickets/memory.json", {"format": 1, "n_samples": 3})
    assert "01-tickets/memory.json is not a memory description" in refusal(run)


def test_place_that_cannot_be_written_is_named(three: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"report\.html' cannot be used \(Not a directory\)"):
        write_report(three, out=tmp_path / "file" / "report.html")


# ---- the page of one run


def test_report_and_all_figures_are_written(three: Path) -> None:
    assert {path.stem for path in (three / "figures").iterdir()} == ALL_FIGURES
    assert (three / "report.html").stat().st_size > 50_000
    assert not list(three.rglob("*.partial"))


def test_figures_are_png_files(three: Path) -> None:
    for path in (three / "figures").iterdir():
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_out_may_be_a_folder_or_a_file(three: Path, tmp_path: Path) -> None:
    assert write_report(three, out=tmp_path) == tmp_path / "report.html"
    assert write_report(three, out=tmp_path / "new" / "x.html") == tmp_path / "new" / "x.html"
    assert (tmp_path / "new" / "figures" / "memory.png").is_file()


def test_page_is_self_contained(three: Path) -> None:
    reader = PageReader(three / "report.html")
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "iframe", "object", "form"}
    sources = reader.attributes("img", "src")
    assert len(sources) == 5
    assert all(source and source.startswith("data:image/png;base64,") for source in sources)
    # The pictures themselves may hold any letters, so look at the page without them.
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", (three / "report.html").read_text())
    assert not re.search(r"https?://|url\(|@import", text)


def test_every_picture_has_an_alternative_text(three: Path) -> None:
    texts = PageReader(three / "report.html").attributes("img", "alt")
    assert all(text and len(text) > 40 for text in texts)
    assert any("tickets from 88 to 82" in (text or "") for text in texts)


def test_ids_are_unique_and_labels_point_to_them(three: Path) -> None:
    reader = PageReader(three / "report.html")
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    labels = [attributes.get("aria-labelledby") for _, attributes in reader.tags]
    assert len(ids) == len(set(ids))
    assert {label for label in labels if label} <= set(ids)


def test_headline_has_the_numbers_and_the_formulas(three: Path) -> None:
    run, text = read_run(three), PageReader(three / "report.html").text
    assert run.op is not None
    assert run.bwt is not None
    assert f"{100 * run.op:.2f} %" in text
    assert f"−{-100 * run.bwt:.2f} % points" in text
    assert page.OP_FORMULA in text
    assert page.BWT_FORMULA in text


def test_page_follows_the_colour_scheme(three: Path) -> None:
    assert "prefers-color-scheme: dark" in (three / "report.html").read_text()


def test_a_teacher_not_worth_imitating_is_warned_of(three: Path) -> None:
    text = PageReader(three / "report.html").text
    assert "the teacher of task 2, contracts, is not worth imitating (loss 1.110 nats" in text
    assert text.count("is not worth imitating") == 1


def test_memory_table_compares_the_estimate_with_the_bytes(three: Path) -> None:
    assert "1 tickets 6 41.0 kB 6.83 kB 7.33 kB 0.93" in PageReader(three / "report.html").text


def test_answers_show_the_forgotten_ones_first(three: Path) -> None:
    text = PageReader(three / "report.html").text
    forgotten = text.index("item 1 of task 1? Answer with one word. green green blue 1.00 → 0.00")
    assert forgotten < text.index("item 0 of task 1?")


def test_recipe_and_versions_are_listed(three: Path) -> None:
    text = PageReader(three / "report.html").text
    assert "method.replay_ratio 0.01" in text
    assert "versions.peft 0.21.2" in text


def test_text_from_files_comes_out_escaped(tmp_path: Path) -> None:
    recipe = {"method": {"name": ATTACK}, "model": {ATTACK: f'"{ATTACK}'}, "seed": 0}
    run = build_run(tmp_path / "run", [ATTACK.replace("/", ""), "b"], prediction=ATTACK, recipe=recipe)
    path = write_report(run)
    assert "script" not in {tag for tag, _ in PageReader(path).tags}
    assert "<script" not in path.read_text()
    assert path.read_text().count("&lt;script&gt;") >= 5


def test_lone_surrogate_in_a_prediction_does_not_stop_the_page(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", ["a", "b"], prediction="cut \ud83d here")
    assert r"cut \ud83d here" in PageReader(write_report(run)).text


def test_one_task_has_a_dash_for_bwt(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", ["only"], shape=(2, 4), steps=3)
    assert "BWT, backward transfer – " in PageReader(write_report(run)).text
    assert "BWT –" in inspected(run)


def test_stopped_run_says_how_far_it_came(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", FOUR, n_finished=2)
    text = PageReader(write_report(run)).text
    assert "finished 2 of its 4 tasks" in text
    assert "(K = 2)" in text


def test_general_ability_has_a_figure_a_panel_a_test_and_its_words(tmp_path: Path) -> None:
    run = with_general(build_run(tmp_path / "run", FOUR, steps=3))
    reader, words = PageReader(write_report(run)), [curve.words() for curve in read_run(run).general]
    assert (run / "figures" / "general.png").is_file()
    assert f"Drift of general ability over the tasks, one panel a test: {'; '.join(words)}." in reader.attributes(
        "img", "alt"
    )
    assert all(word in reader.text for word in words)
    figure = figures.draw_general({"seekr": read_run(run)})
    assert figure is not None
    mmlu, story = figure.axes
    assert [mmlu.get_ylabel(), story.get_ylabel()] == ["right (%)", "nats per token"]
    base, line = mmlu.get_lines()
    assert list(base.get_ydata()) == [25.0, 25.0]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 1, 2], [25.0, 30.0, 20.0])
    assert list(story.get_lines()[1].get_xdata()) == [0, 2], "a value that is missing has no point"


def test_sections_without_files_say_why(tmp_path: Path) -> None:
    text = PageReader(write_report(build_run(tmp_path / "run", method="sequential"))).text
    assert "Left out: this run keeps no replay memory" in text
    assert "Left out: the run directory has no importance.safetensors" in text
    assert "Left out: this run stores no teachers" in text
    assert "Left out: the recipe names no tests under evaluation.general" in text


def test_figure_of_an_earlier_report_does_not_stay(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", ["a", "b"], steps=3)
    write_report(run)
    (run / "importance.safetensors").unlink()
    write_report(run)
    assert not (run / "figures" / "head_importance.png").exists()


def test_twelve_long_names_and_many_heads(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", TWELVE, shape=(32, 32), steps=4)
    reader = PageReader(write_report(run))
    assert len(reader.attributes("img", "src")) == 5
    assert all(f"{number} {name}" in reader.text for number, name in enumerate(TWELVE, 1))
    assert "the 128 of 1024 heads" in reader.text


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_importance_of_nothing_is_left_out_with_a_reason(tmp_path: Path, value: float) -> None:
    run = build_run(tmp_path / "run", ["a"], steps=3)
    tensors = load_file(run / "importance.safetensors")
    tensors["importance"] = np.full((6, 8), value, dtype=np.float32)
    save_file(tensors, run / "importance.safetensors")
    assert "no head has an importance above zero" in PageReader(write_report(run)).text


def test_losses_that_are_not_finite_do_not_stop_the_page(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", ["a"], steps=0)
    lines = [
        json.dumps({"task": "a", "task_index": 0, "step": step, "loss": value}) + "\n"
        for step, value in enumerate([2.0, float("nan"), float("inf"), 1.0], 1)
    ]
    (run / "metrics.jsonl").write_text("".join(lines))
    assert write_report(run).is_file()
    (run / "metrics.jsonl").write_text(lines[1])
    assert write_report(run).is_file()


def test_names_the_font_lacks_and_dollar_signs_are_drawn_without_a_warning(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", ["情感分类", "from $5 to $10_{x"], steps=3)
    assert "情感分类" in PageReader(write_report(run)).text


# ---- figures


def test_callers_matplotlib_settings_are_left_alone(three: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    write_report(three)
    assert dict(matplotlib.rcParams) == before


def test_report_does_not_load_pyplot_or_torch(three: Path) -> None:
    code = (
        "import sys; from seekr_peft.report import write_report; write_report(sys.argv[1]);"
        "print(sorted({'torch', 'matplotlib.pyplot', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(three)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_running_mean_is_centred_and_cut_at_the_ends() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 9.0])
    assert figures.running_mean(values, 3).tolist() == [1.5, 1.5, 3.0, 6.5, 6.5]


def test_running_mean_of_unknown_values_is_unknown() -> None:
    assert np.isnan(figures.running_mean(np.array([np.nan, np.nan]), 3)).all()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.50 kB"), (999_600, "1.00 MB"), (52e6, "52.0 MB")],
)
def test_byte_text(count: float, text: str) -> None:
    assert figures.byte_text(count) == text


# ---- several runs in one figure


def test_the_matrices_of_several_runs_share_one_scale(tmp_path: Path) -> None:
    falls = {"sequential": 0.3, "seekr": 0.05}
    runs = {name: read_run(build_run(tmp_path / name, loss_per_task=fall, steps=3)) for name, fall in falls.items()}
    figure = figures.draw_matrices(runs)
    images = [image for axes in figure.axes for image in axes.get_images()]
    assert [image.get_clim() for image in images] == [(0, 100), (0, 100)]


def test_nine_runs_have_different_lines(tmp_path: Path) -> None:
    run = read_run(build_run(tmp_path / "run", ["a", "b"], steps=3))
    lines = figures.draw_retention({str(n): run for n in range(9)}).axes[0].get_lines()
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(looks) == 9


# ---- the terminal


def test_inspection_shows_teachers_memory_and_heads(three: Path) -> None:
    text = inspected(three)
    assert re.search(r"2 contracts +finished +7 +50\.0 kB +1\.110 +2\.200", text)
    assert "the teacher of 2 contracts is not worth imitating" in text
    assert re.search(r"all +6 +6 +6", text)


def test_inspection_shows_matrix_op_and_bwt(three: Path) -> None:
    run, text = read_run(three), inspected(three)
    assert run.op is not None
    assert run.bwt is not None
    cells = " +".join(f"{100 * score:.1f}" for score in run.scores[0])
    assert re.search(rf"1 tickets +{cells}", text)
    assert f"OP {100 * run.op:.2f} %" in text
    assert f"BWT {100 * run.bwt:+.2f}" in text


def test_inspection_of_twelve_tasks_fits_eighty_columns(tmp_path: Path) -> None:
    text = inspected(build_run(tmp_path / "run", TWELVE, steps=2))
    assert max(map(len, text.splitlines())) <= 80
    last = next(line for line in reversed(text.splitlines()) if line.startswith("12 112 of"))
    assert last.split()[-1].isdigit()


def test_inspection_does_not_read_names_as_markup(tmp_path: Path) -> None:
    assert "1 [red]a[bold]" in inspected(build_run(tmp_path / "run", ["[red]a[bold]"], steps=2))


def test_inspection_has_a_line_a_test_of_general_ability(tmp_path: Path) -> None:
    run = with_general(build_run(tmp_path / "run", FOUR, steps=2))
    for curve in read_run(run).general:
        assert curve.words() in inspected(run).splitlines()


def test_inspection_without_selection_says_so(tmp_path: Path) -> None:
    assert "No heads selected." in inspected(build_run(tmp_path / "run", method="replay", steps=2))
