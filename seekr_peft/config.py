"""``SeekrConfig``: every knob of the method, validated when it is made."""

import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .errors import ConfigError, cut, shown
from .files.json_text import parse_json

Norm = Literal["frobenius", "mean_square"]
Accumulate = Literal["product_of_sums", "sum_of_products"]
ReplayStep = Literal["added", "separate"]
SampleSelection = Literal["random", "first"]
LayerChoice = Literal["anywhere", "thirds"]
QueryChoice = Literal["random", "answer"]
HeadChoice = Literal["importance", "sensitivity", "forgettability", "random", "all"]

_LONGEST_KEY = 80
_TOLD_KEYS = 20
# Counts and seeds are handed to libraries that keep them in 32 bits, and no weight of a loss is larger.
_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class SeekrConfig:
    """Budgets, weights and rhythm of attention-guided replay.

    Paper symbols (SEEKR, arXiv 2411.06171): ``layer_budget`` is B_L, ``head_budget`` is B_H, ``query_budget`` is B_T,
    ``lambda1`` and ``lambda2`` are the weights of the replay step. Budgets above 1 are counts; a float in (0, 1] is a
    share of the model's layers or heads, so that one setting fits models of any depth. ``None`` means "no limit".

    Raises:
        ConfigError: One or more fields are out of range; every problem is listed.
    """

    replay_ratio: float = 0.01
    """Share of each task's training samples that is kept, in (0, 1]; at least one sample is kept. Paper: 0.01."""

    layer_budget: int | float | None = 0.75
    """Layers whose heads may be distilled: a count, or a share in (0, 1]. Paper: 24 of 32."""

    head_budget: int | float | None = 0.125
    """Heads distilled, over all the kept layers together: a count, or a share in (0, 1]. Paper: 128 of 1024."""

    query_budget: int | None = 100
    """Attention rows (query positions) per replay sample and head, drawn once. Paper: 100. None keeps all."""

    query_choice: QueryChoice = "random"
    """Which rows, where ``query_budget`` cannot take all: drawn at "random" (the paper), or first those that the
    "answer" tokens are predicted from."""

    lambda1: float = 0.5
    """Weight of the labels against the teacher's logits in the replay step, in [0, 1]. Paper: 0.5."""

    lambda2: float = 1.0
    """Weight of the attention loss (nats). Paper: 1e3 at a replay ratio of 1 %, 1e2 at 10 %, for training all the
    weights of a 7B model. With stacked adapters on small models 100 and more kept one task in some sequences from
    being learnt at all, and 1 was best over two orders and eight seeds (docs/experiments.md)."""

    head_choice: HeadChoice = "importance"
    """What ranks the heads: the paper's importance, one of its two factors, "random" (seeded), or "all" heads."""

    layer_choice: LayerChoice = "anywhere"
    """Where the layers of ``layer_budget`` are taken: "anywhere" (the paper), or equally from each third of the
    model's depth ("thirds")."""

    norm: Norm = "frobenius"
    """How a head's change and gradient are measured: the paper's Frobenius norm, or the mean square over the sample's
    queries and keys. The released code takes a mean square too, over the padded length, every query and the masked
    future keys (5 to 92 % of its sum): the two agree only where nothing is padded and few keys are masked."""

    accumulate: Accumulate = "product_of_sums"
    """Importance over tasks: (sum S) * (sum F) as in the paper, or sum (S * F), the released code's order."""

    sensitivity_queries: Literal["selected", "all"] = "all"
    """Attention rows that the sensitivity is summed over: every position's, as in the paper, or the drawn ones' alone.
    All of them cost nothing to speak of: x 1.03 of two forwards and a backward at T = 1024, as 100 drawn ones do."""

    attention_distillation: bool = True
    """Whether the attention loss is used at all; without it the method is replay with the teacher's logits."""

    logits_distillation: bool = True
    """Whether the teacher's logits are used; without them ``lambda1`` has no effect and the labels weigh 1."""

    replay_step: ReplayStep = "added"
    """"added": the replay loss joins the new task's optimiser step. "separate": an optimiser step of its own."""

    replay_every: int | None = None
    """Optimiser steps of the new task from one replay batch to the next. None: from the ratio, but often enough that
    each replay sample is seen ``min_replay_passes`` times a task."""

    min_replay_passes: int = 30
    """Times that each replay sample is seen while a task is trained, at least (unless ``replay_every`` is given)."""

    replay_batch_size: int = 8
    """Replay samples in one replay batch."""

    row_top_k: int = 32
    """Entries stored per attention row, at most and on average over a replay sample's rows: those that tell most of
    all rows together, so that sharp rows leave theirs to broad ones. The rest of a row is stored as one remaining
    mass. Nothing is left out when it covers every key."""

    logit_top_k: int = 1024
    """Entries stored per teacher distribution over the vocabulary, on average over a replay sample's answer tokens,
    plus the remaining mass. A teacher that is sure needs few; ``kept_mass`` says how few. Nothing is left out when it
    covers the vocabulary."""

    kept_mass: float = 0.995
    """Share of each attention row's and answer distribution's mass that is enough, in (0, 1]: where ``row_top_k`` or
    ``logit_top_k`` allow more entries than hold it, no more are stored."""

    storage_dtype: Literal["uint8", "float16", "float32"] = "uint8"
    """Type of the stored probabilities. uint8 holds their logarithms, to 2.4 % (1e-4 nats of KL); float32 is exact.
    From a ``lambda2`` of 100 on the rounding of uint8 is worth a warning: take float16."""

    lwf_lambda: float = 1.0
    """Method lwf: weight of the distillation on the new task's samples. Paper (arXiv 1606.09282): 1."""

    lwf_temperature: float = 2.0
    """Method lwf: temperature of that distillation. Paper: 2."""

    ewc_lambda: float = 1.0
    """Method ewc: weight of the penalty; each task's Fisher information is scaled to a mean of 1."""

    ewc_samples: int = 64
    """Method ewc: training samples that a task's Fisher information is estimated from."""

    olora_lambda: float = 0.5
    """Method olora: weight of the orthogonality penalty, as in the O-LoRA paper (arXiv 2310.14152)."""

    sample_selection: SampleSelection = "random"
    """Which training samples become replay samples: "random" (seeded, as in the paper) or the "first" ones (as in the
    released code). ``Seekr(select_samples=...)`` takes any function."""

    teacher_loss_limit: float = 0.7
    """Nats per answer token; a teacher with a higher loss on its own replay samples is reported as a poor one."""

    teacher_entropy_limit: float = 1.0
    """Nats; a teacher with a higher mean answer entropy is reported as a poor one."""

    seed: int = 0
    """Seed of the sample choice, the query positions and the order of replay."""

    def __post_init__(self) -> None:
        problems = self._problems()
        if problems:
            raise ConfigError(problems)

    def _problems(self) -> list[str]:
        hints = get_type_hints(type(self))
        problems = []
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if not _has_type(value, hints[name]):
                problems.append(f"{name} must be {_describe(hints[name])}, got {shown(value)}.")
            elif name in _BOUNDS and not _BOUNDS[name][1](value):
                problems.append(f"{name} must be {_BOUNDS[name][0]}, got {shown(value)}.")
            elif isinstance(value, int | float) and value > _LARGEST:
                problems.append(f"{name} must be at most {_LARGEST}, got {shown(value)}.")
        return problems

    @classmethod
    def from_mapping(cls, mapping: dict[str, Any]) -> "SeekrConfig":
        """Build from a plain mapping; unknown keys are refused with the nearest known name."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = unknown_keys(mapping, known)
        kept = {key: value for key, value in mapping.items() if key in known}
        try:
            config = cls(**kept)
        except ConfigError as error:
            raise ConfigError(unknown + error.problems) from None
        if unknown:
            raise ConfigError(unknown)
        return config

    def distilled_heads(self, n_layers: int, n_heads: int) -> int:
        """Heads that are distilled in a model of ``n_layers`` layers of ``n_heads``, at most."""
        if not self.attention_distillation:
            return 0
        if self.head_choice == "all":
            return n_layers * n_heads
        heads = budget_count(self.layer_budget, n_layers) * n_heads
        return heads if self.head_budget is None else min(heads, budget_count(self.head_budget, n_layers * n_heads))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON or YAML."""
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "SeekrConfig":
        """Read what ``save`` wrote; ConfigError when it is no JSON object."""
        try:
            mapping = parse_json(Path(path).read_text(encoding="utf-8"), "the text")
        except (OSError, ValueError) as error:
            why = cut(" ".join(str(error).split()))
            raise ConfigError(f"{path} cannot be read as JSON ({why}); SeekrConfig.save writes it.") from error
        if not isinstance(mapping, dict):
            raise ConfigError(f"{path} holds a {type(mapping).__name__}; it must be an object of settings.")
        return cls.from_mapping(mapping)


def budget_count(budget: int | float | None, available: int) -> int:
    """The number of layers or heads that ``budget`` means when ``available`` of them exist.

    A float in (0, 1] is a share, rounded to the nearest count and at least 1; an int is a count, at most
    ``available``; ``None`` is all of them.
    """
    if budget is None:
        return available
    if isinstance(budget, float) and budget <= 1:
        return max(1, round(budget * available))
    return min(int(budget), available)


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


def _is_budget(budget: int | float | None) -> bool:
    if budget is None:
        return True
    if isinstance(budget, float):
        return 0 < budget <= 1 or (budget > 1 and budget.is_integer())
    return budget >= 1


def _at_least_one(value: int | None) -> bool:
    return value is None or value >= 1


_BUDGET_RULE = "None, a count of at least 1, or a share in (0, 1]"
_BOUNDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "replay_ratio": ("in (0, 1]", lambda value: 0 < value <= 1),
    "layer_budget": (_BUDGET_RULE, _is_budget),
    "head_budget": (_BUDGET_RULE, _is_budget),
    "query_budget": ("None or at least 1", _at_least_one),
    "lambda1": ("in [0, 1]", lambda value: 0 <= value <= 1),
    "lambda2": ("at least 0 and finite", lambda value: 0 <= value < math.inf),
    "replay_every": ("None or at least 1", _at_least_one),
    "min_replay_passes": ("at least 1", _at_least_one),
    "replay_batch_size": ("at least 1", _at_least_one),
    "row_top_k": ("at least 1", _at_least_one),
    "logit_top_k": ("at least 1", _at_least_one),
    "kept_mass": ("in (0, 1]", lambda value: 0 < value <= 1),
    "lwf_lambda": ("at least 0 and finite", lambda value: 0 <= value < math.inf),
    "lwf_temperature": ("above 0 and finite", lambda value: 0 < value < math.inf),
    "ewc_lambda": ("at least 0 and finite", lambda value: 0 <= value < math.inf),
    "ewc_samples": ("at least 1", _at_least_one),
    "olora_lambda": ("at least 0 and finite", lambda value: 0 <= value < math.inf),
    "teacher_loss_limit": ("above 0 and finite", lambda value: 0 < value < math.inf),
    "teacher_entropy_limit": ("above 0 and finite", lambda value: 0 < value < math.inf),
    "seed": ("at least 0", lambda value: value >= 0),
}
"""Field to its rule in words and as a test of a value of the right type."""


def _has_type(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    options = get_args(hint) or (hint,)
    if isinstance(value, bool):
        return bool in options
    if isinstance(value, int):
        return int in options or float in options
    return isinstance(value, options)


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    names = {int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    return " or ".join(names.get(option, str(option)) for option in get_args(hint) or (hint,))
