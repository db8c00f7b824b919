"""``SeekrConfig``: what it accepts, what it refuses and in which words, and the arithmetic of the budgets."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seekr_peft.config import SeekrConfig, budget_count
from seekr_peft.errors import ConfigError, SeekrError
from seekr_peft.methods.settings import EwcConfig, LwfConfig, OLoraConfig


def refusal(**settings: Any) -> list[str]:
    """The problems that ``settings`` are refused with."""
    with pytest.raises(ConfigError) as caught:
        SeekrConfig.from_mapping(settings)
    return caught.value.problems


def test_a_config_survives_json_both_ways(tmp_path: Path) -> None:
    config = SeekrConfig(
        replay_ratio=0.05,
        layer_budget=7,
        head_budget=None,
        query_budget=None,
        lambda2=1e3,
        replay_every=3,
        logits_distillation=False,
        storage_dtype="float32",
        seed=11,
    )
    assert config != SeekrConfig()
    config.save(tmp_path / "config.json")
    assert SeekrConfig.load(tmp_path / "config.json") == config
    assert SeekrConfig.from_mapping(json.loads(json.dumps(config.to_dict()))) == config
    assert len(config.to_dict()) == len(dataclasses.fields(SeekrConfig)) == 26


def test_the_paper_is_the_default_where_the_readme_does_not_say_otherwise() -> None:
    config = SeekrConfig()
    assert (config.replay_ratio, config.query_budget, config.lambda1) == (0.01, 100, 0.5)
    assert (config.norm, config.accumulate) == ("frobenius", "product_of_sums")
    assert budget_count(config.layer_budget, 32) == 24
    assert budget_count(config.head_budget, 1024) == 128


def test_a_config_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SeekrConfig().lambda1 = 7.0  # type: ignore[misc]


def test_an_unknown_key_is_refused_with_the_nearest_known_one() -> None:
    assert refusal(headbudget=3) == ["headbudget is an unknown key; did you mean head_budget?"]
    (far,) = refusal(zzz=1)
    assert far.startswith("zzz is an unknown key; known keys are seed, replay_step, ")


def test_a_setting_that_has_moved_is_refused_with_its_new_home() -> None:
    assert refusal(ewc_samples=3, lambda1=2) == [
        "ewc_samples is a setting of EwcConfig (in seekr_peft.methods.settings); pass that one.",
        "lambda1 must be in [0, 1], got 2.",
    ]
    homes = {kind.__name__: kind.setting_names() for kind in (LwfConfig, EwcConfig, OLoraConfig)}
    assert all(key in homes[home] for key, home in SeekrConfig.FORMER_KEYS.items())


def test_every_mistake_is_listed_at_once() -> None:
    problems = refusal(sead=1, replay_ratio=2.0, lambda1="half", norm="l1", replay_every=0, lambda2=-1)
    assert [problem.split()[0] for problem in problems] == [
        "sead", "replay_every", "replay_ratio", "lambda1", "lambda2", "norm",
    ]  # fmt: skip
    message = str(ConfigError(problems))
    assert message.count("\n") == 5
    assert "got 2.0" in message and "got 'half'" in message and "got 'l1'" in message and "got -1" in message


def test_a_config_error_is_a_value_error_and_one_of_ours() -> None:
    with pytest.raises(ValueError, match="replay_ratio must be in"):
        SeekrConfig(replay_ratio=0)
    assert issubclass(ConfigError, SeekrError)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("replay_ratio", 0.0, "in (0, 1]"),
        ("replay_ratio", 1.01, "in (0, 1]"),
        ("replay_ratio", math.nan, "in (0, 1]"),
        ("layer_budget", 0, "None, a count of at least 1, or a share in (0, 1]"),
        ("layer_budget", 0.0, "None, a count of at least 1, or a share in (0, 1]"),
        ("layer_budget", 2.5, "None, a count of at least 1, or a share in (0, 1]"),
        ("head_budget", -1, "None, a count of at least 1, or a share in (0, 1]"),
        ("head_budget", math.inf, "None, a count of at least 1, or a share in (0, 1]"),
        ("query_budget", 0, "None or at least 1"),
        ("lambda1", -0.1, "in [0, 1]"),
        ("lambda1", 1.5, "in [0, 1]"),
        ("lambda2", -1.0, "at least 0 and finite"),
        ("lambda2", math.inf, "at least 0 and finite"),
        ("replay_every", 0, "None or at least 1"),
        ("min_replay_passes", 0, "at least 1"),
        ("replay_batch_size", 0, "at least 1"),
        ("row_top_k", 0, "at least 1"),
        ("logit_top_k", -3, "at least 1"),
        ("teacher_loss_limit", 0.0, "above 0 and finite"),
        ("teacher_entropy_limit", -1.0, "above 0 and finite"),
        ("seed", -1, "at least 0"),
    ],
)
def test_each_bound_is_refused_with_its_rule_and_the_value(name: str, value: Any, rule: str) -> None:
    assert refusal(**{name: value}) == [f"{name} must be {rule}, got {value!r}."]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("replay_ratio", 1),
        ("layer_budget", 1),
        ("layer_budget", 1.0),
        ("head_budget", 128.0),
        ("query_budget", 1),
        ("lambda1", 0),
        ("lambda1", 1.0),
        ("lambda2", 0),
        ("seed", 0),
        ("replay_every", None),
    ],
)
def test_each_bound_itself_is_accepted(name: str, value: Any) -> None:
    assert SeekrConfig.from_mapping({name: value}).to_dict()[name] == value


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("seed", True, "a whole number"),
        ("lambda1", False, "a number"),
        ("query_budget", True, "a whole number or null"),
        ("query_budget", 2.5, "a whole number or null"),
        ("replay_ratio", None, "a number"),
        ("logits_distillation", 1, "true or false"),
        ("head_choice", "best", "one of importance, sensitivity, forgettability, random, all"),
        ("storage_dtype", ["float16"], "one of uint8, float16, float32"),
    ],
)
def test_a_value_of_another_type_is_refused_and_a_bool_is_no_number(name: str, value: Any, kind: str) -> None:
    assert refusal(**{name: value}) == [f"{name} must be {kind}, got {value!r}."]


@pytest.mark.parametrize("text", ["not json", "[1, 2]", "3"])
def test_a_file_that_holds_no_settings_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        SeekrConfig.load(path)
    with pytest.raises(ConfigError, match=r"missing\.json"):
        SeekrConfig.load(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("budget", "available", "count"),
    [
        (24, 32, 24),  # a count
        (0.75, 32, 24),  # the paper's count as a share
        (0.125, 1024, 128),
        (0.125, 12, 2),  # 1.5 rounds to the even neighbour
        (0.01, 12, 1),  # at least one
        (40, 32, 32),  # more than exist
        (1, 32, 1),  # one of them ...
        (1.0, 32, 32),  # ... and all of them
        (128.0, 1024, 128),  # a count that YAML read as a float
        (None, 7, 7),
    ],
)
def test_a_budget_is_a_count_or_a_share(budget: int | float | None, available: int, count: int) -> None:
    assert budget_count(budget, available) == count


@given(st.integers(1, 2000), st.one_of(st.none(), st.integers(1, 3000), st.floats(1e-6, 1.0)))
def test_a_budget_is_never_zero_and_never_more_than_there_is(available: int, budget: int | float | None) -> None:
    assert 1 <= budget_count(budget, available) <= available


def test_a_mistake_that_was_found_twice_is_said_once() -> None:
    assert ConfigError(["no such path", "no such key", "no such path"]).problems == ["no such path", "no such key"]


# Values from a file that nobody has looked at -----------------------------------------------------------------------


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(SeekrConfig)])
@pytest.mark.parametrize("value", ["x" * 90_000, [0] * 90_000, {"a": "y" * 9000}, "a\nb" * 90], ids=range(4))
def test_a_huge_value_is_repeated_in_at_most_200_characters(name: str, value: Any) -> None:
    (problem,) = refusal(**{name: value})
    assert problem.startswith(f"{name} must be ") and len(problem) < 400 and len(problem.splitlines()) == 1


def test_no_number_is_larger_than_libraries_take() -> None:
    numbers = {
        field.name: field.default for field in dataclasses.fields(SeekrConfig) if type(field.default) in (int, float)
    }
    assert len(numbers) >= 14
    for name in numbers:
        for value in (2**31, 10**5000, 1e300, float("inf"), float("nan")):
            (problem,) = refusal(**{name: value})
            assert problem.startswith(f"{name} must be ") and len(problem) < 300


def test_many_or_long_unknown_keys_are_told_in_short() -> None:
    (problem,) = refusal(**{"k" * 90_000: 1})
    assert (
        "kkk...kkk is an unknown key; known keys are seed, replay_step, " in problem.replace("k" * 35, "")
        and len(problem) < 900
    )
    found = refusal(**{f"key{n}": n for n in range(5000)})
    assert len(found) == 21 and found[-1] == "there are 4980 more unknown keys."


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "nothing", '{"lambda1": ' + "9" * 5000 + "}"])
def test_a_file_that_is_no_config_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        SeekrConfig.load(tmp_path / "config.json")
    (problem,) = caught.value.problems
    assert len(problem) < 500 and len(problem.splitlines()) == 1
