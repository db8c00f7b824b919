"""Which runs a comparison consists of: variants x orders x seeds."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, cut, shown
from ..methods import get_method
from ..methods.registry import method_names
from ..recipe.schema import CompareSection, Recipe, load_recipe, task_order

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
    section = recipe.compare
    variants = _variants(recipe, section, methods)
    own = task_order(recipe)
    chosen = _orders(own, section.orders if orders is None else orders)
    if not chosen:
        raise ConfigError("there is no order of the tasks; give one, or how many.")
    seeds = list(section.seeds if seeds is None else seeds)
    problems = [f"seed {shown(seed)} must be a whole number of at least 0." for seed in seeds if not _is_seed(seed)]
    if not seeds or len(set(seeds)) < len(seeds):
        problems.append(f"the seeds are {shown(seeds)}; give one or more different ones.")
    labels = [variant.label for variant in variants]
    if methods is None and section.baseline and section.baseline not in labels:
        problems.append(f"compare.baseline {shown(section.baseline)} is none of the variants {_labels(variants)}.")
    baseline = next((label for label in (section.baseline, "replay") if label in labels), None)
    if problems:
        raise ConfigError(problems)
    jobs = [
        _job(recipe, variant, number, order, own, seed)
        for number, order in enumerate(chosen, start=1)
        for seed in seeds
        for variant in variants
    ]
    return Plan(recipe, variants, chosen, seeds, baseline, jobs)


def _variants(recipe: Recipe, section: CompareSection, methods: Sequence[str] | None) -> list[Variant]:
    labels = list(methods or section.variants or DEFAULT_METHODS)
    known = method_names()
    problems = [
        f"{shown(label)} is neither a variant of the recipe ({cut(', '.join(section.variants)) or 'it has none'}) nor "
        f"a method ({', '.join(known)})."
        for label in labels
        if label not in section.variants and label not in known
    ]
    problems += [
        f"compare.variants: the label {shown(label)} must be one line without commas, which --methods takes apart, and "
        f"without blanks around it."
        for label in labels
        if "," in label or label != label.strip() or len(label.splitlines()) != 1
    ]
    if len(set(labels)) < len(labels):
        problems.append(f"the variants {cut(', '.join(labels))} name one twice; name each once.")
    if problems:
        raise ConfigError(problems)
    unclear = [
        f"compare.variants: {shown(label)} has the key {shown(key)}; write single keys of the recipe with dots, such "
        f"as method.head_choice."
        for label in labels
        for key in section.variants.get(label, {})
        if ("." not in key.strip(".") and key not in _SET_BY_THE_COMPARISON) or key.startswith("compare.")
    ]
    if unclear:
        raise ConfigError(unclear)
    taken = {
        f"compare.variants: {shown(label)} sets {cut(key)}, which the comparison sets itself; use compare.seeds, "
        f"compare.orders, or output_dir of the recipe."
        for label in labels
        for key in section.variants.get(label, {})
        if key in _SET_BY_THE_COMPARISON
    }
    if taken:
        raise ConfigError(sorted(taken))
    variants = []
    for label in labels:
        settings = dict(section.variants.get(label, {"method.name": label}))
        name = settings.get("method.name", recipe.method_name)
        # An unknown one is refused with the rest of its recipe.
        modes = get_method(name).adapter_modes if name in known else ()
        if modes and "adapter.mode" in settings and settings["adapter.mode"] not in modes:
            raise ConfigError(
                f"compare.variants: {shown(label)} sets adapter.mode {shown(settings['adapter.mode'])}, but method "
                f"{name!r} needs {' or '.join(modes)}; leave it out."
            )
        if modes and settings.get("adapter.mode", recipe.adapter.mode) not in modes:
            settings["adapter.mode"] = modes[0]
        variants.append(Variant(label, settings))
    # Where capital letters do not count in file names, they must not tell two folders apart.
    slugs = [variant.slug.casefold() for variant in variants]
    if len(set(slugs)) < len(slugs):
        raise ConfigError(f"the labels {_labels(variants)} give the same folder name twice; rename one.")
    return variants


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
            raise ConfigError(
                f"{shown(orders)} different orders of {len(own)} tasks are not to be had; ask for another number."
            )
        return found
    found = [list(order) for order in orders]
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


def _as_yaml(value: Any) -> str:
    # JSON is YAML, on one line.
    return json.dumps(value, ensure_ascii=False, default=str)


def _labels(variants: list[Variant]) -> str:
    return cut(", ".join(repr(variant.label) for variant in variants))


def _is_seed(seed: Any) -> bool:
    return isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0
