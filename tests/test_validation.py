"""The sentences that errors of pydantic become: one a setting, with its whole key, the broken rule and the value."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from seekr_peft.validation import Budget, Count, Fraction, Positive, Share, broken_rule, problems


def _even(value: int) -> int:
    if value % 2:
        raise ValueError("must be even")
    return value


def _braces(value: str) -> str:
    raise broken_rule("a text in {braces}")


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    share: Share = 1.0
    weights: dict[str, Positive] = {}


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    needed: int
    inner: Inner = Inner()
    layers: list[Inner] = []
    budget: Budget = None
    count: Count | Literal["auto", "all"] | None = None
    names: list[Annotated[str, Field(min_length=1, max_length=3)]] | int = 0
    open_end: Annotated[float, Field(ge=-1.5, lt=2)] = 0.0
    most: Annotated[int, Field(lt=5)] = 0
    fraction: Fraction = 0.0
    even: Annotated[int, AfterValidator(_even)] = 0
    braces: Annotated[str, AfterValidator(_braces)] = ""


@pytest.mark.parametrize(
    ("settings", "sentences"),
    [
        ({"inner": {"share": 2}}, ["inner.share must be in (0, 1], got 2."]),
        ({"inner": {"weights": {"a": 0}}}, ["inner.weights.a must be above 0 and finite, got 0."]),
        ({"inner": {"weights": 3}}, ["inner.weights must be a mapping, got 3."]),
        ({"inner": {"shares": 1}}, ["inner.shares is an unknown key; did you mean inner.share?"]),
        ({"inner": 4}, ["inner must be a mapping, got 4."]),
        ({"layers": [{}, {"share": "all"}]}, ["layers.1.share must be a number, got 'all'."]),
        ({"layers": {}}, ["layers must be a list, got {}."]),
        ({"budget": 0.0}, ["budget must be None, a count of at least 1, or a share in (0, 1], got 0.0."]),
        ({"budget": "half"}, ["budget must be a whole number or a number or null, got 'half'."]),
        ({"count": 0}, ["count must be None, one of auto, all or at least 1, got 0."]),
        ({"count": "some"}, ["count must be a whole number or one of auto, all or null, got 'some'."]),
        (
            {"names": ["abcd", ""]},
            ["names.0 must have at most 3 characters, got 'abcd'.", "names.1 must not be empty, got ''."],
        ),
        ({"names": None}, ["names must be a list or a whole number, got None."]),
        ({"open_end": 2}, ["open_end must be in [-1.5, 2), got 2."]),
        ({"most": 5}, ["most must be below 5, got 5."]),
        ({"fraction": float("nan")}, ["fraction must be in [0, 1], got nan."]),
        ({"even": 3}, ["even is refused: must be even, got 3."]),
        ({"braces": "x"}, ["braces must be a text in {braces}, got 'x'."]),
        (
            {"needed": None, "most": True},
            ["needed must be a whole number, got None.", "most must be a whole number, got True."],
        ),
    ],
    ids=str,
)
def test_what_pydantic_finds_is_one_sentence_a_setting(settings: dict[str, Any], sentences: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"needed": 1, **settings})
    assert problems(caught.value, Outer) == sentences


def test_a_missing_key_is_told_and_a_plain_annotation_has_no_key() -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({})
    assert problems(caught.value, Outer) == ["needed is missing; add it to the recipe."]
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(list[Count]).validate_python([1, 0], strict=True)
    assert problems(caught.value, list[Count]) == ["1 must be at least 1, got 0."]
