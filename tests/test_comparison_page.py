"""The page of a comparison: its figures, its numbers, what is refused, and that it holds nothing but text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.comparison_fixture import ORDERS, build_comparison
from support.page_reader import PageReader
from support.run_directory_fixture import build_run, write_json

from seekr_peft.compare import figures as drawing
from seekr_peft.compare.page import GAP_FORMULA, write_comparison_page
from seekr_peft.compare.reading import distinct_names, load_comparison, mean_record
from seekr_peft.errors import RunError
from seekr_peft.report import figures, page, read_run

ATTACK = "<script>alert('x')</script>"
THREE: dict[str, dict[str, Any]] = {
    "seekr": {"method": "seekr", "settings": {"method.name": "seekr", "method.head_choice": "random"}, "gap": 0.83},
    "replay": {"method": "replay", "fall": 0.12},
    "sequential": {"method": "sequential", "fall": 0.3},
}
JOINT: dict[str, Any] = {"method": "multitask", "joint": True, "gap": 1.0}
ORDER_FIGURES = {f"{name}_order{order}" for name in ("matrices", "retention") for order in (1, 2)}


def budgets(*values: Any) -> dict[str, dict[str, Any]]:
    return {
        f"{value} heads": {"method": "seekr", "settings": {"method.head_budget": value}, "fall": 0.1 / (place + 1)}
        for place, value in enumerate(values)
    }


def drawn(out: Path) -> set[str]:
    return {path.stem for path in (out / "figures").glob("*.png")}


def content(out: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((out / "comparison.json").read_text())
    return read


def alternative(reader: PageReader, beginning: str) -> str:
    return next(text for text in reader.attributes("img", "alt") if text and text.startswith(beginning))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of three variants, one that learns all at once and one without runs; tests only read it."""
    variants = {**THREE, "multitask": JOINT, "derpp": {"method": "derpp", "runs": False}}
    out = build_comparison(tmp_path_factory.mktemp("full"), variants, general=True)
    assert write_comparison_page(out) == out / "comparison.html"
    return out


@pytest.fixture(scope="module")
def reader(full: Path) -> PageReader:
    return PageReader(full / "comparison.html")


# ---- figures


def test_every_figure_with_data_is_drawn(full: Path, reader: PageReader) -> None:
    assert drawn(full) == {"op_bwt", "differences", "cost", "depth", "general"} | ORDER_FIGURES
    assert len(reader.attributes("img", "src")) == 9
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in (full / "figures").iterdir())


def test_figures_without_data_are_left_out(tmp_path: Path) -> None:
    variants = {"replay": THREE["replay"], "multitask": JOINT}
    out = build_comparison(tmp_path, variants, baseline=None)
    text = PageReader(write_comparison_page(out)).text
    assert drawn(out) == {"op_bwt", "cost"} | ORDER_FIGURES
    assert "above baseline" not in text and "sign-flip" not in text


def test_one_pair_makes_no_figure_of_differences(tmp_path: Path) -> None:
    out = build_comparison(tmp_path, THREE, orders=ORDERS[:1], seeds=(0,))
    text = PageReader(write_comparison_page(out)).text
    assert "differences" not in drawn(out)
    assert "±" not in text.replace("Mean ± standard deviation", ""), "one run has no standard deviation"


def test_variants_that_learn_all_at_once_alone_have_no_figure_of_bwt(tmp_path: Path) -> None:
    out = build_comparison(tmp_path, {"multitask": JOINT}, baseline=None)
    write_comparison_page(out)
    assert "op_bwt" not in drawn(out)


def test_without_any_run_there_is_a_page_without_figures(tmp_path: Path) -> None:
    out = build_comparison(tmp_path, {"seekr": {"method": "seekr", "runs": False}}, baseline=None, curve="method.k")
    reader = PageReader(write_comparison_page(out))
    assert not drawn(out)
    assert "0 of 4 runs are finished" in reader.text


def test_figures_of_an_earlier_page_do_not_stay(tmp_path: Path) -> None:
    out = build_comparison(tmp_path, THREE)
    write_comparison_page(out)
    fewer = content(out)
    fewer |= {"variants": fewer["variants"][1:2], "orders": ORDERS[:1], "baseline": None}
    fewer["runs"] = [run for run in fewer["runs"] if (run["variant"], run["order"]) == ("replay", 1)]
    write_json(out / "comparison.json", fewer)
    write_comparison_page(out)
    assert drawn(tmp_path) == {"op_bwt", "cost", "matrices_order1", "retention_order1"}


def test_op_and_bwt_are_drawn_in_percent(full: Path) -> None:
    figure = drawing.draw_op_bwt(load_comparison(full))
    assert figure is not None
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    for row in content(full)["variants"][:3]:
        place = [100 * row["bwt"]["mean"]], [100 * row["op"]["mean"]]
        assert np.allclose([lines[row["label"]].get_xdata(), lines[row["label"]].get_ydata()], place)
    assert np.allclose(lines["multitask"].get_ydata(), 100 * content(full)["variants"][3]["op"]["mean"])
    dots = [line for line in figure.axes[0].get_lines() if len(line.get_xdata()) == 4]
    assert len(dots) == 3


def test_differences_are_those_of_the_pairs(full: Path) -> None:
    comparison, runs = load_comparison(full), content(full)["runs"]
    ops = {(run["variant"], run["order"], run["seed"]): run["op"] for run in runs}
    expected = [100 * (ops["seekr", order, seed] - ops["replay", order, seed]) for order in (1, 2) for seed in (0, 1)]
    figure = drawing.draw_differences(comparison)
    assert figure is not None
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["seekr", "sequential", "multitask"]
    assert np.allclose(axes.get_lines()[1].get_xdata(), expected)
    assert axes.texts[0].get_text() == f"+{np.mean(expected):.2f}"


def test_curve_has_its_points_in_order_and_levels_for_the_others(tmp_path: Path) -> None:
    variants = {**budgets(16, 1, 4, None), "replay": THREE["replay"], "multitask": JOINT}
    out = build_comparison(tmp_path, variants, curve="method.head_budget")
    comparison = load_comparison(out)
    lines, levels = drawing.curve_lines(comparison)
    assert {name: [value for value, _ in points] for name, points in lines.items()} == {"seekr": [1.0, 4.0, 16.0]}
    assert [variant.label for variant in levels] == ["None heads", "replay", "multitask"]
    figure = drawing.draw_curve(comparison)
    assert figure is not None
    op, bwt = figure.axes
    assert (op.get_xscale(), bwt.get_xscale()) == ("log", "log")
    means = {row["label"]: row for row in content(out)["variants"]}
    line = next(line for line in op.get_lines() if list(line.get_xdata()) == [1.0, 4.0, 16.0])
    assert np.allclose(line.get_ydata(), [100 * means[f"{value} heads"]["op"]["mean"] for value in (1, 4, 16)])
    assert len(bwt.get_lines()) == len(op.get_lines()) - 1, "no BWT level for the variant that learns all at once"
    reader = PageReader(write_comparison_page(out))
    assert "curve" in drawn(out)
    assert f"seekr at 4: OP {100 * means['4 heads']['op']['mean']:.2f}" in alternative(reader, "OP and BWT over the")


def test_curve_over_a_factor_of_eight_is_linear_and_other_settings_make_other_lines(tmp_path: Path) -> None:
    variants = budgets(1, 8)
    variants["1 random"] = {"method": "seekr", "settings": {"method.head_budget": 1, "method.head_choice": "random"}}
    comparison = load_comparison(build_comparison(tmp_path, variants, baseline="1 heads", curve="method.head_budget"))
    lines, levels = drawing.curve_lines(comparison)
    assert list(lines) == ["seekr", "seekr, method.head_choice=random"]
    assert [variant.label for variant in levels] == ["1 heads"]
    figure = drawing.draw_curve(comparison)
    assert figure is not None
    assert figure.axes[0].get_xscale() == "linear"


def test_the_matrices_of_an_order_are_the_mean_over_its_seeds(full: Path) -> None:
    (seekr, *_) = load_comparison(full).variants
    both = [read_run(full / "runs" / "variant0" / f"order2-seed{seed}") for seed in (0, 1)]
    scores = mean_record(seekr.records(2)).scores
    assert np.allclose(scores, (both[0].scores + both[1].scores) / 2, equal_nan=True)
    assert np.isnan(scores[1, 0])
    assert mean_record(both).tasks == ORDERS[1]


def test_means_of_general_ability_are_over_what_was_measured(full: Path) -> None:
    (seekr, *_) = load_comparison(full).variants
    records = seekr.records()
    mmlu = next(curve for curve in mean_record(records).general if curve.name == "mmlu")
    assert mmlu.values[3] == pytest.approx(np.mean([record.general[0].values[3] for record in records]))
    assert np.isnan(mmlu.values[2])


def test_at_most_eight_variants_share_a_figure_of_matrices(tmp_path: Path) -> None:
    variants = {**budgets(*range(1, 9)), "replay": THREE["replay"], **budgets(9)}
    out = build_comparison(tmp_path, variants, baseline=None, orders=ORDERS[:1], seeds=(0,))
    reader = PageReader(write_comparison_page(out))
    assert reader.text.count("Shown are the first 8 of 10 variants.") == 1
    assert reader.text.count("Shown are the first 8 of 9 variants.") == 1, "of the depth, only those that choose heads"
    words = alternative(reader, "Accuracy matrices of order 1")
    assert "8 heads:" in words and "replay:" not in words


def test_fourteen_variants_have_different_looks() -> None:
    looks = [figures.look(place) for place in range(14)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 14


def test_depth_is_relative_where_the_models_differ_in_layers(tmp_path: Path) -> None:
    out = build_comparison(tmp_path, {"small": THREE["seekr"], "large": THREE["seekr"]}, baseline=None)
    figure = drawing.draw_depth(load_comparison(out).variants)
    assert figure is not None
    assert list(figure.axes[0].get_lines()[0].get_xdata()) == [0, 1, 2, 3, 4, 5]
    assert sum(figure.axes[0].get_lines()[0].get_ydata()) == pytest.approx(100)
    for run in (out / "runs" / "variant1").iterdir():
        tasks = read_run(run).tasks
        build_run(run, tasks, shape=(11, 4), steps=2)
    figure = drawing.draw_depth(load_comparison(out).variants)
    assert figure is not None
    assert [line.get_xdata()[-1] for line in figure.axes[0].get_lines()] == [1.0, 1.0]


# ---- the page


def test_table_has_the_numbers_of_the_file(full: Path, reader: PageReader) -> None:
    seekr, replay, _, multitask, derpp = content(full)["variants"]

    def spread(value: dict[str, float], sign: str = "") -> str:
        return f"{100 * value['mean']:{sign}.2f} ± {100 * value['sd']:.2f}".replace("-", "−")

    scores = f"{spread(seekr['op'])} {spread(seekr['bwt'], '+')} {spread(seekr['learnt'])}"
    against = spread(seekr["against_baseline"], "+")
    row = f"seekr method.head_choice = random 4 of 4 {scores} {against} better in 4 of 4 p = 0.125 83"
    assert row in reader.text
    assert f"replay (baseline) 4 of 4 {spread(replay['op'])}" in reader.text
    assert f"multitask 4 of 4 {spread(multitask['op'])} – –" in reader.text
    assert derpp["op"] is None and "derpp 0 of 4 – – – – –" in reader.text


def test_page_says_what_was_run_and_what_is_missing(reader: PageReader) -> None:
    assert "Random heads seekr-peft compare recipe.yaml" in reader.text
    assert "Is random worth it? Not shown: <chance>." in reader.text
    assert "5 variants, 2 orders of the tasks, 2 seeds (0, 1): 16 of 20 runs are finished." in reader.text
    assert "Runs are missing: derpp has 0 of 4." in reader.text
    assert "The same for all base model data" in reader.text


def test_nothing_is_missing_when_all_runs_are_finished(tmp_path: Path) -> None:
    assert "Runs are missing" not in PageReader(write_comparison_page(build_comparison(tmp_path, THREE))).text


def test_footnotes_name_the_test_and_the_formulas(reader: PageReader) -> None:
    assert "exact paired sign-flip test. Differences are as likely up as down." in reader.text
    for formula in (page.OP_FORMULA, page.BWT_FORMULA, GAP_FORMULA):
        assert formula in reader.text


def test_a_small_p_is_not_shown_as_zero(tmp_path: Path) -> None:
    out = build_comparison(tmp_path, THREE)
    changed = content(out)
    changed["variants"][0]["against_baseline"]["p"] = 0.0004
    changed["variants"][2]["against_baseline"]["p"] = None
    write_json(out / "comparison.json", changed)
    text = PageReader(write_comparison_page(out)).text
    assert "better in 4 of 4 p < 0.001" in text
    assert text.count(" p = ") == 0


def test_every_run_is_listed(full: Path, reader: PageReader) -> None:
    for run in content(full)["runs"]:
        bwt = "–" if run["bwt"] is None else f"−{-100 * run['bwt']:.2f}"
        learnt = "–" if run["learnt"] is None else f"{100 * run['learnt']:.2f}"
        scores = f"{100 * run['op']:.2f} {bwt} {learnt}"
        assert f"{run['variant']} {run['order']} {run['seed']} {scores} 2 min 17 s {run['directory']}" in reader.text
    assert ("details", {}) in reader.tags


def test_every_picture_says_its_numbers_in_words(full: Path, reader: PageReader) -> None:
    seekr = content(full)["variants"][0]
    assert f"seekr OP {100 * seekr['op']['mean']:.2f} ± " in alternative(reader, "OP over BWT")
    mean = 100 * seekr["against_baseline"]["mean"]
    assert f"seekr +{mean:.2f} ± " in alternative(reader, "Paired differences")
    assert "seekr step (ms) 15.6 ms, peak memory of a step 65.0 MB" in alternative(reader, "Bars of the cost")
    assert re.search(r"seekr layer 0 \d+ %", alternative(reader, "Share of the selected heads"))
    assert "seekr: mmlu 40.0 % right at first" in alternative(reader, "One panel a test")
    assert "sequential: After task 3: OP " in alternative(reader, "Accuracy matrices of order 2")
    assert "seekr: Percent: sql from 88 to" in alternative(reader, "Order 2, one panel a task")


def test_page_is_self_contained(full: Path, reader: PageReader) -> None:
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "iframe", "object", "form"}
    assert all((source or "").startswith("data:image/png;base64,") for source in reader.attributes("img", "src"))
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", (full / "comparison.html").read_text())
    assert not re.search(r"https?://|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text


def test_ids_are_unique_and_labels_point_to_them(reader: PageReader) -> None:
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    labels = {attributes.get("aria-labelledby") for _, attributes in reader.tags} - {None}
    assert labels == set(ids)


def test_text_from_the_file_comes_out_escaped(tmp_path: Path) -> None:
    tasks = ["<script>a", "b"]
    variants = {ATTACK: {"method": "seekr", "settings": {ATTACK: ATTACK}}, f"{ATTACK}2": {"method": "replay"}}
    out = build_comparison(tmp_path, variants, orders=[tasks], baseline=f"{ATTACK}2", curve=ATTACK)
    changed = content(out)
    changed |= {"title": ATTACK, "command": ATTACK, "same": [ATTACK], "test": {"name": ATTACK, "assumption": ATTACK}}
    write_json(out / "comparison.json", changed)
    path = write_comparison_page(out)
    assert "script" not in {tag for tag, _ in PageReader(path).tags}
    assert "<script" not in path.read_text()
    assert path.read_text().count("&lt;script&gt;") > 10


def test_odd_and_long_labels_are_drawn_and_cut(tmp_path: Path) -> None:
    odd = "\x00\u202e\ud83d $x_1^{ 情感"
    variants = {odd: THREE["seekr"], "A" * 300: THREE["replay"], "A" * 299: THREE["sequential"]}
    text = PageReader(write_comparison_page(build_comparison(tmp_path, variants, baseline="A" * 300))).text
    assert "$x_1^{ 情感" in text
    assert "\u202e" not in text and "A" * 121 not in text


def test_names_that_become_the_same_are_numbered() -> None:
    assert distinct_names(["one", "two"], 10) == ["one", "two"]
    assert distinct_names(["a long one", "a long two"], 7) == ["1 a lo…", "2 a lo…"]


# ---- refusals


def refusal(out: Path) -> str:
    with pytest.raises(RunError) as caught:
        write_comparison_page(out)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    assert f"there is no {path}" in refusal(tmp_path)
    path.write_text('{"variants": [')
    assert f"{path} is not valid JSON" in refusal(tmp_path)
    for text in ("[]", "{}", "null"):
        path.write_text(text)
        assert f"{path} is not a comparison" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("keys", "value", "word"),
    [
        (("variants", 0, "op", "mean"), "0.9", "'0.9' is not a number"),
        (("variants", 0, "op", "mean"), float("nan"), "nan is not a number"),
        (("variants", 0, "gap_closed"), True, "True is not a number"),
        (("variants", 0, "cost"), {}, "step_seconds"),
        (("variants", 0, "label"), "replay", "two variants have the same label"),
        (("runs", 0, "variant"), "unknown", "'unknown'"),
        (("runs", 0, "order"), 3, "order 3 of 2"),
        (("runs", 0, "op"), None, "OP None"),
        (("orders",), None, "NoneType"),
        (("test",), {}, "'name'"),
    ],
)
def test_what_does_not_fit_the_format_is_named(tmp_path: Path, keys: tuple[Any, ...], value: Any, word: str) -> None:
    out = build_comparison(tmp_path, THREE, seeds=(0,))
    changed = content(out)
    place: Any = changed
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    write_json(out / "comparison.json", changed)
    message = refusal(out)
    assert f"{out / 'comparison.json'} is not a comparison" in message and word in message


def test_run_directory_that_is_missing_or_of_other_tasks_is_named(tmp_path: Path) -> None:
    out = build_comparison(tmp_path, THREE, seeds=(0,))
    changed = content(out)
    changed["orders"].reverse()
    write_json(out / "comparison.json", changed)
    assert str(out / "runs/variant0/order1-seed0") in refusal(out)
    changed["runs"][0]["directory"] = "runs/nowhere"
    write_json(out / "comparison.json", changed)
    assert f"there is no run directory at {out / 'runs/nowhere'}" in refusal(out)
