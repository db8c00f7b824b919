"""Recipes that nobody would write: any value at any key, mutations, and files that would harm their reader."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.good_recipe import GOOD, problems, recipe

from seekr_peft import cli
from seekr_peft.errors import ConfigError
from seekr_peft.methods.registry import OWN_CONFIGS
from seekr_peft.recipe import Recipe, load_recipe, stored_recipe
from seekr_peft.recipe.library_fields import lora_settings, training_settings

# Hostile files, keys and values -------------------------------------------------------------------------------------


def every_key() -> list[tuple[str, ...]]:
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    inner = [(name, key) for name, kind in sections.items() for key in getattr(kind, "model_fields", ())]
    own = dict.fromkeys(key for kind in OWN_CONFIGS.values() for key in kind.setting_names())
    libraries = {"training": training_settings(), "adapter": lora_settings(), "method": own}
    named = [(section, key) for section, keys in libraries.items() for key in keys]
    return [*((name,) for name in sections), *inner, *named, ("method", "name")]


HUGE = (
    "x" * 30_000,
    "two words " * 3000,
    "a\nb" * 300,
    10**400,
    -(10**5000),
    [0] * 5000,
    ["y" * 5000] * 50,
    {f"k{n}": n for n in range(3000)},
    {"z" * 20_000: 1},
    {"a": {"b": ["c" * 9000]}},
    math.inf,
)


@pytest.mark.parametrize("value", HUGE, ids=range(len(HUGE)))
def test_a_huge_value_at_any_key_is_told_in_bounded_lines(value: Any) -> None:
    for place in every_key():
        mapping = recipe(method={"name": "seekr"})
        target = mapping if len(place) == 1 else mapping.setdefault(place[0], {})
        target[place[-1]] = value
        try:
            load_recipe(mapping)
        except ConfigError as error:
            for problem in error.problems:
                # 200 of the value, and all the names of a setting's choices.
                assert len(problem) < 3000 and len(problem.splitlines()) == 1, (place, len(problem))
                assert max(map(len, re.findall(r"x+|y+|z+|c+|0+|k+", problem)), default=0) <= 200, place


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    place=st.sampled_from(every_key()),
    value=st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(10**30), 10**30)
        | st.floats()
        | st.text(max_size=400).map(lambda text: text * 3),
        lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=30), inner, max_size=5),
        max_leaves=10,
    ),
)
def test_any_value_at_any_key_is_accepted_or_told_in_bounded_lines(place: tuple[str, ...], value: Any) -> None:
    mapping = recipe(method={"name": "seekr"})
    target = mapping if len(place) == 1 else mapping.setdefault(place[0], {})
    target[place[-1]] = value
    told: list[str] = []
    try:
        found = load_recipe(mapping)
        assert load_recipe(found) == found
    except ConfigError as error:
        told = error.problems or ["" * 3000]
    assert all(len(problem) < 3000 and len(problem.splitlines()) == 1 for problem in told)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_a_mutated_recipe_is_accepted_and_usable_or_refused(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from stress.recipes import check_one, mutations

    folder = tmp_path_factory.mktemp("recipe")
    for text in mutations(seed, 3):
        assert check_one(text, folder) in ("accepted", "refused"), text


def test_what_becomes_of_a_mutated_recipe_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stress import recipes

    assert len(set(recipes.mutations(0, 30))) > 25 and list(recipes.mutations(0, 5)) == list(recipes.mutations(0, 5))
    good = yaml.safe_dump(GOOD)
    assert recipes.check_one(good, tmp_path) == "accepted"
    assert recipes.check_one("seed: 1", tmp_path) == "refused"
    bad = yaml.safe_dump(recipe(training={"lr_scheduler_type": "cosine", "logging_steps": 2.5}))
    assert recipes.check_one(bad, tmp_path) == "refused"
    monkeypatch.setattr("seekr_peft.recipe.checks.training_problems", lambda training, fields: [])
    assert recipes.check_one(bad, tmp_path).startswith("unusable: ValueError")
    monkeypatch.setattr("seekr_peft.recipe.checks.training_problems", lambda training, fields: 1 / 0)
    assert recipes.check_one(bad, tmp_path).startswith("traceback: ZeroDivisionError")
    monkeypatch.setattr("seekr_peft.recipe.checks.training_problems", lambda training, fields: ["x" * 5000])
    assert recipes.check_one(bad, tmp_path).startswith("traceback: 'xxx")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nmodel: {name_or_path: demo}\nseed: 2\n", "the key seed is given twice, in line 1 and in line 3"),
        (
            "training: {weight_decay: 0,\n  weight_decay: 1}",
            "the key weight_decay is given twice, in line 1 and in line 2",
        ),
        ("[" * 100_000, "more than 20 levels"),
        ("a: &a [*a]", "stands for something that holds it"),
        ("seed: " + "9" * 5000, "a number has more than 100 characters"),
        ('output_dir: "a\\0b"', "holds control characters"),
        ("a: 1\n---\nb: 2", "expected a single document"),
    ],
)
def test_a_hostile_file_is_one_line_and_status_2(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["seekr-peft", "run", str(path), "--check"])
    with pytest.raises(SystemExit) as exited:
        cli.main()
    printed = capsys.readouterr()
    assert exited.value.code == 2 and printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith(f"seekr-peft: recipe {path} is not YAML: ") and message in line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=" + "[" * 100_000, "more than 20 levels"),
        ("seed=&a [*a]", "stands for something that holds it"),
        ("seed=" + "9" * 5000, "a number has more than 100 characters"),
        ("training={a: 1, a: 2}", "the key a is given twice"),
        ("seed=!!python/object/apply:os.getcwd []", "is not allowed"),
        ('output_dir="a\\0b"', "holds control characters"),
        ("a.b" * 50_000 + "=1", "must have the form section.key=value"),
        ("x" * 50_000, "must have the form section.key=value"),
        ("a\x1bb=1", "must have the form section.key=value"),
        ("seed." + "y" * 50_000 + "=1", "seed is 0, not a section"),
        ("output_dir=" + "x" * 300, "a name has more than 255 bytes"),
        ("model.name_or_path=~nobody/at/all", "has no config.json"),
        ("tasks.order=[" + "x, " * 3000 + "]", "tasks.order must have at most 1000 entries"),
    ],
    ids=lambda value: ascii(value[:40]),
)
def test_a_hostile_override_is_one_line(override: str, message: str) -> None:
    (found,) = problems(recipe(seed=0), override)
    assert message in found and len(found) < 900 and len(found.splitlines()) == 1


def test_a_path_that_no_file_can_have_is_named_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    long = str(tmp_path / ("ä" * 130))
    for place, path, why in (
        (("output_dir",), long, "a name has more than 255 bytes"),
        (("output_dir",), str(tmp_path / "loop"), "Too many levels of symbolic links"),
        (("output_dir",), "a/" * 3000, "File name too long"),
        (("model", "name_or_path"), long, "a name has more than 255 bytes"),
        (("tasks", "path"), str(tmp_path / "loop" / "x"), "Too many levels of symbolic links"),
        (("evaluation", "general_path"), long, "a name has more than 255 bytes"),
        (("compare", "runs_dir"), long, "a name has more than 255 bytes"),
    ):
        mapping = recipe()
        (mapping if len(place) == 1 else mapping.setdefault(place[0], {}))[place[-1]] = path
        found = problems(mapping)
        assert f"{'.'.join(place)}: " in found[0] and f"cannot be used ({why}); give another path." in found[0], found


def test_recipes_that_extend_each_other_without_end_are_refused(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
    assert "extends is '21.yaml'; give another" in problems(tmp_path / "0.yaml")[0]
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    (tmp_path / "a.yaml").write_text("extends: loop.yaml\n")
    assert "loop.yaml cannot be read: Too many levels of symbolic links" in problems(tmp_path / "a.yaml")[0]
    (tmp_path / "a.yaml").write_text(f"extends: {'x' * 300}.yaml\n")
    assert "cannot be read: File name too long" in problems(tmp_path / "a.yaml")[0]


def test_an_alias_is_a_value_of_its_own_that_an_override_changes_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "model: {name_or_path: demo}\ntasks: {format: demo}\n"
        "training: {gradient_checkpointing_kwargs: &k {every_n_layers: 1}, activation_checkpointing_kwargs: *k}\n"
    )
    found = load_recipe(path, ["training.gradient_checkpointing_kwargs.every_n_layers=2"])
    assert found.training["activation_checkpointing_kwargs"] == {"every_n_layers": 1}
    assert found.training["gradient_checkpointing_kwargs"] == {"every_n_layers": 2}


def test_a_mapping_that_no_recipe_needs_is_refused() -> None:
    endless: dict[str, Any] = {}
    endless["a"] = endless
    for value, message in (
        (endless, "holds more than 20 levels or 10000 values"),
        ({"a": [0] * 20_000}, "holds more than 20 levels or 10000 values"),
        ({1: 2}, "training: the key 1 is no plain text; write it in quotes."),
        ({"run_name": "a\0"}, "training.run_name: 'a\\x00' holds control characters; leave them out."),
        ({"run_name": Path("x")}, "is of the type PosixPath; give text, numbers, truth values, lists and mappings"),
    ):
        (found,) = problems(recipe(training=value))
        assert message in found


def test_many_mistakes_are_counted_and_soon_told() -> None:
    found = problems(recipe(training={f"k{n}": n for n in range(9000)}))
    assert len(found) == 21 and found[-1] == "training: there are 8980 more unknown keys."
    found = problems({**recipe(), **{f"k{n}": n for n in range(900)}})
    assert len(found) == 51 and found[-1] == "... and 850 more mistakes."


def test_a_stored_recipe_that_somebody_changed_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for text, message in (
        ("model: {name_or_path: demo}\ntasks: {format: demo}\nmethod: {}", "is no recipe: method.name must be one of"),
        (
            "model: {name_or_path: demo}\ntasks: {format: demo}\nmethod: {name: seekr, lambda1: 7}",
            "method.lambda1 must",
        ),
        ("a: &a [*a]", "is not YAML: the alias *a stands for"),
        ("model: 5", "is no recipe: model must be a mapping, got 5."),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            stored_recipe(path)
        assert message in caught.value.problems[0] and len(caught.value.problems) == 1


def test_a_variable_is_filled_in_whatever_its_length_and_dollars_without_an_end_are_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SEEKR_TEST_UNSET", raising=False)
    found = load_recipe(recipe(training={"run_name": f"${{SEEKR_TEST_UNSET:-{'x' * 3000}}}/${{"}))
    assert found.training["run_name"] == "x" * 3000 + "/${"
    endless = "${SEEKR_TEST_UNSET:-" * 20_000
    assert load_recipe(recipe(training={"run_name": endless})).training["run_name"] == endless
    monkeypatch.setenv("SEEKR_TEST_SET", "a\x1b[31m")
    assert problems(recipe(training={"run_name": "${SEEKR_TEST_SET}"})) == [
        "training.run_name: 'a\\x1b[31m' holds control characters; set its variables anew."
    ]
