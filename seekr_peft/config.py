"""The configurations of the methods: every knob with its unit and its bounds, validated when it is made.

``SeekrConfig`` is SEEKR's, and what it shares with other methods stands in the classes that it derives from;
``methods/settings.py`` has those of the methods that are not built on it.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, get_type_hints

from pydantic import TypeAdapter, ValidationError
from typing_extensions import Self, TypedDict

from .errors import ConfigError, cut
from .files.atomic import write_json
from .files.json_text import parse_json
from .validation import Budget, Count, Fraction, Positive, Seed, Share, Weight, problems, unknown_keys

Norm = Literal["frobenius", "mean_square"]
Accumulate = Literal["product_of_sums", "sum_of_products"]
ReplayStep = Literal["added", "separate"]
SampleSelection = Literal["random", "first"]
LayerChoice = Literal["anywhere", "thirds"]
QueryChoice = Literal["random", "answer"]
HeadChoice = Literal["importance", "sensitivity", "forgettability", "random", "all"]


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What every method's configuration has, and all that a method without knobs needs.

    A method names its own as ``config_class``: a frozen dataclass that derives from this class or from another
    method's, each field with a default and with its bounds as pydantic writes them::

        @dataclass(frozen=True)
        class MyConfig(ReplayConfig):
            strength: Annotated[float, Field(ge=0)] = 1.0

    Raises:
        ConfigError: One or more fields are out of range; every problem is listed.
    """

    seed: Seed = 0
    """Seed of all that the method draws: samples, query positions, the order of replay."""

    def __post_init__(self) -> None:
        found = _problems(type(self), {name: getattr(self, name) for name in self.setting_names()})
        if found:
            raise ConfigError(found)

    @classmethod
    def setting_names(cls) -> list[str]:
        """The names of its settings."""
        return [each.name for each in dataclasses.fields(cls)]

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], others: Iterable[type["MethodConfig"]] = ()) -> Self:
        """Build from a plain mapping; unknown keys are refused with the nearest known name.

        Args:
            others: Configurations of other methods, whose keys may be there as well: checked, and not used.

        Raises:
            ConfigError: Every problem is listed.
        """
        found = mapping_problems(mapping, cls, others)
        if found:
            raise ConfigError(found)
        return cls(**{key: value for key, value in mapping.items() if key in cls.setting_names()})

    @classmethod
    def of(cls, config: "MethodConfig | None") -> Self:
        """``config`` as one of this very class: of None the defaults, of one that has more what is needed here. A
        ``SeekrConfig`` is taken by every method, for what the two share.

        Raises:
            ConfigError: It is another method's.
        """
        if config is None or type(config) is cls:
            return config or cls()
        has = config.setting_names() if isinstance(config, MethodConfig) else []
        lacking = [name for name in cls.setting_names() if name not in has]
        if not has or (lacking and not isinstance(config, SeekrConfig)):
            raise ConfigError(
                f"config is a {type(config).__name__}, but the method needs a {cls.__name__}, which also has "
                f"{', '.join(lacking)}; pass one."
            )
        return cls(**{name: getattr(config, name) for name in cls.setting_names() if name in has})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON or YAML."""
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what ``save`` wrote; ConfigError when it is no JSON object."""
        try:
            mapping = parse_json(Path(path).read_text(encoding="utf-8"), "the text")
        except (OSError, ValueError) as error:
            why = cut(" ".join(str(error).split()))
            raise ConfigError(f"{path} cannot be read as JSON ({why}); {cls.__name__}.save writes it.") from error
        if not isinstance(mapping, dict):
            raise ConfigError(f"{path} holds a {type(mapping).__name__}; it must be an object of settings.")
        return cls.from_mapping({key: value for key, value in mapping.items() if key not in cls.FORMER_KEYS})

    FORMER_KEYS: ClassVar[Mapping[str, str]] = {}
    """Keys that earlier versions had and their files hold, to the configuration that has them now."""


@dataclass(frozen=True, kw_only=True)
class RhythmConfig(MethodConfig):
    """Of methods that use a second batch beside the new task's: when, and of how many samples."""

    replay_step: ReplayStep = "added"
    """"added": the replay loss joins the new task's optimiser step. "separate": an optimiser step of its own."""

    replay_every: Count | None = None
    """Optimiser steps of the new task from one replay batch to the next. None: from the ratio, but often enough that
    each replay sample is seen ``min_replay_passes`` times a task (method lwf: every step)."""

    replay_batch_size: Count = 8
    """Replay samples in one replay batch."""


@dataclass(frozen=True)
class ReplayConfig(RhythmConfig):
    """Of methods that keep samples of each task."""

    replay_ratio: Share = 0.01
    """Share of each task's training samples that is kept, in (0, 1]; at least one sample is kept. Paper: 0.01."""

    sample_selection: SampleSelection = "random"
    """Which training samples become replay samples: "random" (seeded, as in the paper) or the "first" ones (as in the
    released code). ``Seekr(select_samples=...)`` takes any function."""

    min_replay_passes: Count = 30
    """Times that each replay sample is seen while a task is trained, at least (unless ``replay_every`` is given)."""

    query_budget: Count | None = 100
    """Attention rows (query positions) per replay sample and head, drawn once. Paper: 100. None keeps all."""

    query_choice: QueryChoice = "random"
    """Which rows, where ``query_budget`` cannot take all: drawn at "random" (the paper), or first those that the
    "answer" tokens are predicted from."""


@dataclass(frozen=True)
class SeekrConfig(ReplayConfig):
    """Budgets, weights and rhythm of attention-guided replay.

    Paper symbols (SEEKR, arXiv 2411.06171): ``layer_budget`` is B_L, ``head_budget`` is B_H, ``query_budget`` is B_T,
    ``lambda1`` and ``lambda2`` are the weights of the replay step. Budgets above 1 are counts; a float in (0, 1] is a
    share of the model's layers or heads, so that one setting fits models of any depth. ``None`` means "no limit".

    Raises:
        ConfigError: One or more fields are out of range; every problem is listed.
    """

    layer_budget: Budget = 0.75
    """Layers whose heads may be distilled: a count, or a share in (0, 1]. Paper: 24 of 32."""

    head_budget: Budget = 0.125
    """Heads distilled, over all the kept layers together: a count, or a share in (0, 1]. Paper: 128 of 1024."""

    lambda1: Fraction = 0.5
    """Weight of the labels against the teacher's logits in the replay step, in [0, 1]. Paper: 0.5."""

    lambda2: Weight = 1.0
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

    row_top_k: Count = 32
    """Entries stored per attention row, at most and on average over a replay sample's rows: those that tell most of
    all rows together, so that sharp rows leave theirs to broad ones. The rest of a row is stored as one remaining
    mass. Nothing is left out when it covers every key."""

    logit_top_k: Count = 1024
    """Entries stored per teacher distribution over the vocabulary, on average over a replay sample's answer tokens,
    plus the remaining mass. A teacher that is sure needs few; ``kept_mass`` says how few. Nothing is left out when it
    covers the vocabulary."""

    kept_mass: Share = 0.995
    """Share of each attention row's and answer distribution's mass that is enough, in (0, 1]: where ``row_top_k`` or
    ``logit_top_k`` allow more entries than hold it, no more are stored."""

    storage_dtype: Literal["uint8", "float16", "float32"] = "uint8"
    """Type of the stored probabilities. uint8 holds their logarithms, to 2.4 % (1e-4 nats of KL); float32 is exact.
    From a ``lambda2`` of 100 on the rounding of uint8 is worth a warning: take float16."""

    teacher_loss_limit: Positive = 0.7
    """Nats per answer token; a teacher with a higher loss on its own replay samples is reported as a poor one."""

    teacher_entropy_limit: Positive = 1.0
    """Nats; a teacher with a higher mean answer entropy is reported as a poor one."""

    FORMER_KEYS: ClassVar[Mapping[str, str]] = {
        "lwf_lambda": "LwfConfig",
        "lwf_temperature": "LwfConfig",
        "ewc_lambda": "EwcConfig",
        "ewc_samples": "EwcConfig",
        "olora_lambda": "OLoraConfig",
    }

    def distilled_heads(self, n_layers: int, n_heads: int) -> int:
        """Heads that are distilled in a model of ``n_layers`` layers of ``n_heads``, at most."""
        if not self.attention_distillation:
            return 0
        if self.head_choice == "all":
            return n_layers * n_heads
        heads = budget_count(self.layer_budget, n_layers) * n_heads
        return heads if self.head_budget is None else min(heads, budget_count(self.head_budget, n_layers * n_heads))


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


def mapping_problems(
    mapping: Mapping[str, Any], kind: type[MethodConfig], others: Iterable[type[MethodConfig]] = ()
) -> list[str]:
    """What is wrong with ``mapping`` as the settings of ``kind``, one sentence each. Keys of ``others`` may be there as
    well: what one of them takes is fine."""
    others = list(others)
    known = list(dict.fromkeys(key for each in (kind, *others) for key in each.setting_names()))
    own = {key: mapping[key] for key in kind.setting_names() if key in mapping}
    moved = {key: home for key, home in kind.FORMER_KEYS.items() if key in mapping and key not in known}
    found = [
        f"{key} is a setting of {home} (in seekr_peft.methods.settings); pass that one." for key, home in moved.items()
    ]
    found += unknown_keys([key for key in mapping if key not in moved], known) + _problems(kind, own)
    for key in [key for key in mapping if key not in own]:
        told = [_problems(other, {key: mapping[key]}) for other in others if key in other.setting_names()]
        found += told[0] if told and [] not in told else []
    return found


def _problems(kind: type[MethodConfig], settings: Mapping[str, Any]) -> list[str]:
    hint, adapter = _validator(kind)  # type: ignore[arg-type]
    try:
        adapter.validate_python(settings, strict=True)
    except ValidationError as error:
        return problems(error, hint)
    return []


@cache
def _validator(kind: type[MethodConfig]) -> tuple[Any, TypeAdapter[Any]]:
    # Of some of the settings, and without making a configuration: whole numbers stay what they are, so that a stored
    # recipe is the same one.
    hints = get_type_hints(kind, include_extras=True)
    hint = TypedDict(kind.__name__, {key: hints[key] for key in kind.setting_names()}, total=False)  # type: ignore[misc]
    return hint, TypeAdapter(hint)
