"""Which runs a comparison consists of: variants x orders x seeds."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, cut, shown
from ..methods import get_method
from ..methods.registry import method_names
from ..recipe import CompareSection, Recipe, load_recipe, task_order

DEFAULT_METHODS = ("sequential", "replay", "seekr")
_SET_BY_THE_COMPARISON = ("seed", "output_dir", "tasks.order", "tasks.epochs")


@dataclass(frozen=True, eq=False)
class Variant:
    """One row of the comparison: a ``label`` and the ``settings`` (dotted recipe keys) in which it differs."""

    label: str
    settings: dict[str, Any]

    @property
    def slug(self) -> str:
        """The label as a folder name."""
        return re.sub(r"[^\w.]+", "-", self.label).strip("-.") or "variant"


@dataclass(frozen=True)
class Job:
    """One run: ``order`` counts from 1; ``recipe`` is complete."""

    variant: Variant
    order: int
    seed: int
    recipe: Recipe

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.recipe.output_dir)

    @property
    def slug(self) -> str:
        """A name of its own for the run's log."""
        return f"{self.variant.slug}-order{self.order}-seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.variant.label}, order {self.order}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """All runs of a comparison, those of one order and seed together, so that pairs are complete early."""

    recipe: Recipe
    variants: list[Variant]
    orders: list[list[str]]
    seeds: list[int]
    baseline: str | None
    jobs: list[Job]

    @property
    def directory(self) -> Path:
        """Where everything is written."""
        return Path(self.recipe.output_dir)


def plan_comparison(
    source: str | Path | Mapping[str, Any] | Recipe,
    overrides: Sequence[str] = (),
    *,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    orders: int | Sequence[Sequence[str]] | None = None,
) -> Plan:
    """Every run's complete recipe, checked; reads no data and loads no model.

    Raises:
        ConfigError: An unknown variant, an order of other tasks, or a variant whose recipe has mistakes.
    """
    recipe = load_recipe(source, overrides)
    section, own, problems = recipe.compare, task_order(recipe), list[str]()
    with _collected(problems):
        variants = _variants(recipe, section, methods)
        baseline = _baseline(section, [variant.label for variant in variants], methods is None)
    with _collected(problems):
        chosen = _orders(own, section.orders if orders is None else orders)
    with _collected(problems):
        numbers = _seeds(section.seeds if seeds is None else seeds)
    if problems:
        raise ConfigError(problems)
    jobs = [
        _job(recipe, variant, number, order, own, seed)
        for number, order in enumerate(chosen, start=1)
        for seed in numbers
        for variant in variants
    ]
    return Plan(recipe, variants, chosen, numbers, baseline, jobs)


@contextmanager
def _collected(problems: list[str]) -> Iterator[None]:
    """What is wrong inside joins ``problems``, so that all of it is told at once."""
    try:
        yield
    except ConfigError as error:
        problems += error.problems


def _baseline(section: CompareSection, labels: list[str], of_the_recipe: bool) -> str | None:
    """The label that the others are compared with: the recipe's, or else "replay" where it runs. Who chooses other
    variants (``of_the_recipe`` is False) may leave the recipe's baseline out."""
    if of_the_recipe and section.baseline and section.baseline not in labels:
        known = cut(", ".join(map(repr, labels)))
        raise ConfigError(f"compare.baseline {shown(section.baseline)} must be one of the variants {known}.")
    return next((label for label in (section.baseline, "replay") if label in labels), None)


def _seeds(seeds: Sequence[int]) -> list[int]:
    problems = [f"seed {shown(seed)} must be a whole number of at least 0." for seed in seeds if not _is_seed(seed)]
    if not seeds or len(set(map(repr, seeds))) < len(seeds):
        problems.append(f"the seeds are {shown(list(seeds))}; give one or more different ones.")
    if problems:
        raise ConfigError(problems)
    return list(seeds)


def _variants(recipe: Recipe, section: CompareSection, methods: Sequence[str] | None) -> list[Variant]:
    """The variants by their labels; ConfigError with everything that is wrong with them."""
    labels = list(methods or section.variants or DEFAULT_METHODS)
    problems = [*_label_problems(labels, section), *_key_problems(labels, section), *_mode_problems(labels, recipe)]
    if problems:
        raise ConfigError(problems)
    variants = [Variant(label, _with_fitting_mode(_settings(label, section), recipe)) for label in labels]
    # Where capital letters do not count in file names, they must not tell two folders apart.
    slugs = [variant.slug.casefold() for variant in variants]
    if len(set(slugs)) < len(slugs):
        raise ConfigError(f"the labels {_labels(variants)} give the same folder name twice; rename one.")
    return variants


def _settings(label: str, section: CompareSection) -> dict[str, Any]:
    """What a variant sets: the label alone may name a method."""
    return dict(section.variants.get(label, {"method.name": label}))


def _label_problems(labels: list[str], section: CompareSection) -> Iterator[str]:
    known = method_names()
    for label in labels:
        if label not in section.variants and label not in known:
            yield (
                f"{shown(label)} is neither a variant of the recipe "
                f"({cut(', '.join(section.variants)) or 'it has none'}) nor a method ({', '.join(known)})."
            )
        if "," in label or label != label.strip() or len(label.splitlines()) != 1:
            yield (
                f"compare.variants: the label {shown(label)} must be one line without commas, which --methods takes "
                f"apart, and without blanks around it."
            )
    if len(set(labels)) < len(labels):
        yield f"the variants {cut(', '.join(labels))} name one twice; name each once."


def _key_problems(labels: list[str], section: CompareSection) -> Iterator[str]:
    for label in dict.fromkeys(labels):
        for key in section.variants.get(label, {}):
            if key in _SET_BY_THE_COMPARISON:
                yield (
                    f"compare.variants: {shown(label)} sets {cut(key)}, which the comparison sets itself; use "
                    f"compare.seeds, compare.orders, or output_dir of the recipe."
                )
            elif "." not in key.strip(".") or key.startswith("compare."):
                yield (
                    f"compare.variants: {shown(label)} has the key {shown(key)}; write single keys of the recipe with "
                    f"dots, such as method.head_choice."
                )


def _mode_problems(labels: list[str], recipe: Recipe) -> Iterator[str]:
    for label in dict.fromkeys(labels):
        settings = _settings(label, recipe.compare)
        modes = _modes_of(settings, recipe)
        if modes and "adapter.mode" in settings and settings["adapter.mode"] not in modes:
            yield (
                f"compare.variants: {shown(label)} sets adapter.mode {shown(settings['adapter.mode'])}, but method "
                f"{shown(_method_of(settings, recipe))} needs {' or '.join(modes)}; leave it out."
            )


def _with_fitting_mode(settings: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    modes = _modes_of(settings, recipe)
    if modes and settings.get("adapter.mode", recipe.adapter.mode) not in modes:
        return {**settings, "adapter.mode": modes[0]}
    return settings


def _method_of(settings: Mapping[str, Any], recipe: Recipe) -> Any:
    return settings.get("method.name", recipe.method_name)


def _modes_of(settings: Mapping[str, Any], recipe: Recipe) -> Sequence[str]:
    """The adapter modes that the variant's method works with; none where it is unknown, which its recipe's check
    tells."""
    name = _method_of(settings, recipe)
    return get_method(name).adapter_modes if name in method_names() else ()


def _orders(own: list[str], orders: int | Sequence[Sequence[str]]) -> list[list[str]]:
    """The orders themselves, or ``orders`` different ones: the recipe's own first, then seeded shuffles."""
    if isinstance(orders, int):
        found = [own]
        generator = random.Random(0)
        for _ in range(1000):
            if len(found) >= orders:
                break
            shuffled = generator.sample(own, len(own))
            if shuffled not in found:
                found.append(shuffled)
        if len(found) < orders or orders < 1:
            raise ConfigError(f"{len(own)} tasks do not have {shown(orders)} different orders; ask for another number.")
        return found
    found = [list(order) for order in orders]
    if not found:
        raise ConfigError("there is no order of the tasks; give one, or how many.")
    if len({tuple(order) for order in found}) < len(found):
        raise ConfigError(
            f"the orders {shown(found)} have one twice, whose runs would count as others; name each once."
        )
    wrong = [order for order in found if sorted(order) != sorted(own)]
    if wrong:
        raise ConfigError(
            f"the order {cut(', '.join(wrong[0]))} is not one of the recipe's tasks {cut(', '.join(own))}; "
            f"name each once."
        )
    return found


def _job(recipe: Recipe, variant: Variant, number: int, order: list[str], own: list[str], seed: int) -> Job:
    mapping = recipe.to_dict()
    mapping.pop("compare", None)
    mapping["tasks"]["order"] = order
    if recipe.tasks.epochs is not None:
        if len(recipe.tasks.epochs) != len(own):
            raise ConfigError(
                f"tasks.epochs has {len(recipe.tasks.epochs)} numbers for {len(own)} tasks; give one for each."
            )
        epochs = dict(zip(own, recipe.tasks.epochs, strict=True))
        mapping["tasks"]["epochs"] = [epochs[name] for name in order]
    # The run's seed is the method's, unless the recipe says otherwise.
    mapping["seed"] = seed
    runs = Path(recipe.compare.runs_dir or Path(recipe.output_dir) / "runs")
    mapping["output_dir"] = str(runs / variant.slug / f"order{number}-seed{seed}")
    settings = [
        f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" for key, value in variant.settings.items()
    ]
    try:
        return Job(variant, number, seed, load_recipe(mapping, settings))
    except ConfigError as error:
        raise ConfigError([f"variant {shown(variant.label)}: {problem}" for problem in error.problems]) from None


def _labels(variants: list[Variant]) -> str:
    return cut(", ".join(repr(variant.label) for variant in variants))


def _is_seed(seed: Any) -> bool:
    return isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0
