"""What pydantic finds wrong with settings, as our sentences: the key, the rule, the value.

Configurations of methods and the sections of a recipe are checked by pydantic against their annotations; ``problems``
words what it reports, from the same annotations. ``Count``, ``Share`` and the like are the bounds that most settings
have.
"""

import difflib
from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, BaseModel, Field, ValidationError
from pydantic_core import PydanticCustomError
from typing_extensions import is_typeddict

from .errors import cut, shown

LARGEST = 2**31 - 1
"""Counts and seeds are handed to libraries that keep them in 32 bits, and no weight of a loss is larger."""

Count = Annotated[int, Field(ge=1, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, le=LARGEST)]
Weight = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=LARGEST, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]

_BUDGET_RULE = "None, a count of at least 1, or a share in (0, 1]"


def _checked_budget(budget: int | float | None) -> int | float | None:
    if budget is None:
        return None
    is_count = budget >= 1 and (isinstance(budget, int) or budget.is_integer())
    is_share = isinstance(budget, float) and 0 < budget <= 1
    if not (is_count or is_share):
        raise broken_rule(_BUDGET_RULE)
    if budget > LARGEST:
        raise broken_rule(f"at most {LARGEST}")
    return budget


def broken_rule(rule: str) -> PydanticCustomError:
    """What a validator of a setting raises: ``KEY must be RULE, got VALUE``."""
    # Braces would be taken for placeholders.
    return PydanticCustomError("rule", "{rule}", {"rule": rule})


Budget = Annotated[int | float | None, AfterValidator(_checked_budget)]
"""Layers or heads: a count, a share in (0, 1], or None for all of them."""

_LONGEST_KEY = 80
_TOLD_KEYS = 20
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a mapping",
    NoneType: "null",
}
_BOUNDS = frozenset({"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"})


def unknown_key(key: str, known: list[str], prefix: str = "") -> str:
    """One sentence about an unknown key, with the nearest known one."""
    name = cut(str(key), _LONGEST_KEY)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys are {', '.join(known)}."
    return f"{prefix}{name} is an unknown key; {hint}"


def unknown_keys(keys: Iterable[str], known: list[str], prefix: str = "") -> list[str]:
    """A sentence about each of ``keys`` that is not ``known``; about many of them one for the rest."""
    unknown = [key for key in keys if key not in known]
    told = [unknown_key(key, known, prefix) for key in unknown[:_TOLD_KEYS]]
    rest = len(unknown) - len(told)
    return told + ([f"{prefix.replace('.', ': ')}there are {rest} more unknown keys."] if rest else [])


def problems(error: ValidationError, hint: Any) -> list[str]:
    """One sentence for each setting that is wrong.

    Args:
        hint: What was validated against: a model, a TypedDict, or another annotation.
    """
    found: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}
    for detail in error.errors(include_url=False):
        # A union reports each of its members, behind the same place.
        path, inner = _place(hint, detail["loc"])
        found.setdefault(path, (inner, []))[1].append(detail)
    # What is wrong inside of a value says more than that another member of the union would not have it at all.
    inside = {path[:length] for path in found for length in range(len(path))}
    told = {path: found[path] for path in found if path not in inside}
    return [_sentence(path, hint, inner, details) for path, (inner, details) in told.items()]


def _sentence(path: tuple[Any, ...], outer: Any, hint: Any, details: list[Any]) -> str:
    names = [cut(str(part), 60) for part in path]
    where, first = ".".join(names), details[0]
    if first["type"] == "extra_forbidden":
        section = _place(outer, path[:-1])[1]
        return unknown_key(path[-1], list(_fields(section)), "".join(f"{name}." for name in names[:-1]))
    if first["type"] == "missing":
        return f"{where} is missing; add it to the recipe."
    return f"{where} {_rule(hint, details)}, got {shown(first['input'])}."


def _rule(hint: Any, details: list[Any]) -> str:
    for detail in details:
        if detail["type"] == "rule":
            return f"must be {detail['msg']}"
        if detail["type"] in _BOUNDS:
            largest = detail["type"] == "less_than_equal" and detail["ctx"]["le"] == LARGEST
            return f"must be at most {LARGEST}" if largest else f"must be {_in_bounds(hint)}"
    for detail in details:
        context = detail.get("ctx", {})
        if detail["type"] in ("too_long", "string_too_long"):
            what = "entries" if detail["type"] == "too_long" else "characters"
            return f"must have at most {context['max_length']} {what}"
        if detail["type"] == "string_too_short":
            return "must not be empty"
        if not detail["type"].endswith("_type") and detail["type"] != "literal_error":
            # Of a validator that somebody else wrote.
            return f"is refused: {cut(detail['msg'].removeprefix('Value error, '))}"
    return f"must be {_of_type(hint)}"


# Annotations --------------------------------------------------------------------------------------------------------


def _place(hint: Any, location: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any]:
    """The keys and indices of ``location``, without what pydantic calls a union's members, and the annotation there."""
    path: list[Any] = []
    for part in location:
        inside = [found for member in _members(hint) for found in _inside(member, part)]
        if inside:
            hint = inside[0]
            path.append(part)
    return tuple(path), hint


def _inside(hint: Any, part: Any) -> list[Any]:
    """The annotation of what ``hint`` holds at ``part``, if it holds anything there."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is list and isinstance(part, int):
        return [arguments[0]]
    if origin is dict:
        return [arguments[1]]
    # An unknown key is a place as well.
    return [_fields(hint).get(part, Any)] if _has_fields(hint) else []


def _has_fields(hint: Any) -> bool:
    return isinstance(hint, type) and (issubclass(hint, BaseModel) or is_typeddict(hint))


def _fields(hint: Any) -> dict[str, Any]:
    names = hint.model_fields if issubclass(hint, BaseModel) else hint.__annotations__
    hints = get_type_hints(hint, include_extras=True)
    return {name: hints[name] for name in names}


def _members(hint: Any) -> list[Any]:
    """What a union allows, each without its bounds; of anything else, itself."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) not in (Union, UnionType):
        return [hint]
    return [member for each in get_args(hint) for member in _members(each)]


def _of_type(hint: Any) -> str:
    """The types that ``hint`` allows, in words."""
    return " or ".join(dict.fromkeys(_type_words(member) for member in _members(hint)))


def _type_words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        values = get_args(hint)
        return ("one of " if len(values) > 1 else "") + ", ".join(map(str, values))
    if _has_fields(hint):
        return _WORDS[dict]
    return _WORDS.get(get_origin(hint) or hint, str(hint))


def _in_bounds(hint: Any) -> str:
    """What ``hint`` allows, its numbers by their bounds: "None or at least 1"."""
    words = sorted(_bounded(hint), key=lambda word: (word != "None", word.startswith(("at", "above", "in"))))
    return ", ".join(words[:-1]) + (" or " if len(words) > 1 else "") + words[-1]


def _bounded(hint: Any, bounds: Mapping[str, Any] | None = None) -> list[str]:
    bounds = dict(bounds or {})
    while get_origin(hint) is Annotated:
        hint, *constraints = get_args(hint)
        bounds |= {name: value for each in constraints for name, value in _constraints(each)}
    if get_origin(hint) in (Union, UnionType):
        return [words for member in get_args(hint) for words in _bounded(member, bounds)]
    if hint is NoneType:
        return ["None"]
    return [_interval(bounds, hint is float)] if hint in (int, float) and bounds else [_type_words(hint)]


def _constraints(metadata: Any) -> list[tuple[str, Any]]:
    each = getattr(metadata, "metadata", [metadata])
    names = ("gt", "ge", "lt", "le")
    return [(name, getattr(one, name)) for one in each for name in names if getattr(one, name, None) is not None]


def _interval(bounds: Mapping[str, Any], is_float: bool) -> str:
    low, high = bounds.get("gt", bounds.get("ge")), bounds.get("lt", bounds.get("le"))
    if low is None:
        return f"{'below' if 'lt' in bounds else 'at most'} {_number(high)}"
    if high is None or high == LARGEST:
        return f"{'above' if 'gt' in bounds else 'at least'} {_number(low)}" + (" and finite" if is_float else "")
    return f"in {'(' if 'gt' in bounds else '['}{_number(low)}, {_number(high)}{')' if 'lt' in bounds else ']'}"


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else str(value)
