"""From a recipe's file to its mapping: what it extends, overrides, the environment's variables, and its way back."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from support.good_recipe import problems, recipe

from seekr_peft.compare import plan_comparison
from seekr_peft.errors import ConfigError
from seekr_peft.recipe import load_recipe, recipe_text

# Files, overrides, variables --------------------------------------------------------------------------------------


def test_a_saved_recipe_reads_back_the_same(tmp_path: Path) -> None:
    found = load_recipe(recipe(training={"learning_rate": 1e-4}, tasks={"format": "demo", "epochs": [1, 2, 3, 0.5]}))
    (tmp_path / "recipe.yaml").write_text(recipe_text(found), encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml") == found


def test_an_infinite_number_in_a_variant_is_stored_as_what_it_is(tmp_path: Path) -> None:
    found = load_recipe(recipe(compare={"variants": {"a": {"method.lambda2": math.inf}}}))
    (tmp_path / "recipe.yaml").write_text(recipe_text(found), encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml") == found
    with pytest.raises(ConfigError, match=r"variant 'a': method\.lambda2 must be a number, got 'Infinity'"):
        plan_comparison(found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: [", "is not YAML"),
        ("- a\n- b\n", "must be a mapping with the keys model, tasks, ..., got list"),
        ("", "must be a mapping with the keys model, tasks, ..., got NoneType"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_sentence(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    (found,) = problems(path)
    assert found.startswith(f"recipe {path} ") and message in found and "\n" not in found


def test_1e_4_is_a_number_in_a_file_and_in_an_override(tmp_path: Path) -> None:
    # YAML 1.1 reads both as text.
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {name_or_path: demo}\ntasks: {format: demo}\ntraining: {learning_rate: 1e-4}\n")
    assert load_recipe(path).training == {"learning_rate": 1e-4}
    assert load_recipe(path, ["training.learning_rate=2E-3"]).training == {"learning_rate": 2e-3}


def test_an_override_replaces_adds_and_makes_sections() -> None:
    source = recipe(training={"learning_rate": 0.1, "weight_decay": 0.5})
    overrides = ["training.learning_rate=0.2", "evaluation.batch_size=7", "tasks.order=[last, first]", "seed=3"]
    found = load_recipe(source, overrides)
    assert found.training == {"learning_rate": 0.2, "weight_decay": 0.5}
    assert found.evaluation.batch_size == 7
    assert found.tasks.order == ["last", "first"]
    assert found.seed == 3
    assert source["training"]["learning_rate"] == 0.1, "the caller's mapping was changed"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learningrate=1", "training.learningrate is an unknown key; did you mean training.learning_rate?"),
        ("trainin.learning_rate=1", "trainin is an unknown key; did you mean training?"),
        ("seed.value=1", "override 'seed.value=1': seed is 0, not a section."),
        ("seed", "override 'seed' must have the form section.key=value, as in training.learning_rate=1e-4."),
        ("training..x=1", "override 'training..x=1' must have the form section.key=value"),
        ("seed=[", "override 'seed=[': the value '[' is not YAML: "),
    ],
)
def test_an_override_that_fits_nothing_is_refused(override: str, message: str) -> None:
    (found,) = problems(recipe(seed=0), override)
    assert found.startswith(message)


def test_variables_are_filled_in_from_the_environment_or_their_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEEKR_TEST_SET", "there")
    monkeypatch.delenv("SEEKR_TEST_UNSET", raising=False)
    source = recipe(
        output_dir="runs/${SEEKR_TEST_SET:-default}/${SEEKR_TEST_UNSET:-other}",
        seed="${SEEKR_TEST_UNSET:-7}",
        training={"learning_rate": "${SEEKR_TEST_UNSET:-1e-4}"},
    )
    found = load_recipe(source)
    assert found.output_dir == "runs/there/other"
    assert found.seed == 7
    assert found.training == {"learning_rate": 1e-4}


def test_a_variable_that_is_not_set_and_has_no_default_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEEKR_TEST_UNSET", raising=False)
    (message,) = problems(recipe(output_dir="runs/${SEEKR_TEST_UNSET}"))
    assert message == (
        "output_dir: the environment variable SEEKR_TEST_UNSET is not set; set it, or write "
        "${SEEKR_TEST_UNSET:-default}."
    )


# A recipe that extends another ------------------------------------------------------------------------------------


def test_a_recipe_takes_over_what_it_does_not_say(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "model: {name_or_path: demo}\ntasks: {format: demo, order: [first, last], max_train: 7}\n"
        "training: {learning_rate: 1.0e-3, num_train_epochs: 2}\nseed: 3\n"
    )
    (tmp_path / "middle.yaml").write_text("extends: base.yaml\nseed: 4\ntraining: {num_train_epochs: 5}\n")
    (tmp_path / "own.yaml").write_text("extends: middle.yaml\ntasks: {order: [third]}\n")
    found = load_recipe(tmp_path / "own.yaml", ["tasks.max_test=2"])
    assert found.tasks.order == ["third"] and (found.tasks.max_train, found.tasks.max_test) == (7, 2)
    assert found.training == {"learning_rate": 1e-3, "num_train_epochs": 5} and found.seed == 4


def test_recipes_that_extend_each_other_or_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    assert re.search(r"extends is '[ab]\.yaml'; give another recipe's file name", problems(tmp_path / "a.yaml")[0])
    (tmp_path / "c.yaml").write_text("extends: nowhere.yaml\n")
    assert re.search(r"nowhere\.yaml cannot be read", problems(tmp_path / "c.yaml")[0])
    (tmp_path / "d.yaml").write_text("extends: 5\n")
    assert re.search("extends is 5", problems(tmp_path / "d.yaml")[0])
