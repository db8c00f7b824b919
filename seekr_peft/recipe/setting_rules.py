"""Which values the settings of TrainingArguments and LoraConfig may have: their annotations, and one table of bounds.

A setting has the type that the library's own source file gives it, or the narrower one of ``NARROWER``; then its
bounds. Every setting of the installed classes is bounded, a choice, a switch, free text (``FREE``) or refused, which a
test asks of each (transformers 5.23, PEFT 0.21).
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import cut, shown
from ..model.plain_lora import OFF, SOME_VALUES
from .annotations import Kind, choice, each, kind_of
from .library_fields import Setting, accelerator_settings

Bound = tuple[str, Callable[[Any], bool]]
"""A rule in words, after the type's, and as a test of a value of the right type."""

LARGEST_WHOLE = 2**31 - 1
_LARGEST_RANK = 16384
_LARGEST_ALPHA = 1_000_000
_LONGEST_PATTERN = 1000

SET_BY_THE_RUN = {
    "output_dir": "output_dir",
    "seed": "seed",
    "data_seed": "seed",
    "resume_from_checkpoint": "--resume",
    "use_cpu": "the environment variable CUDA_VISIBLE_DEVICES",
    "eval_strategy": "the evaluation section",
    "eval_on_start": "the evaluation section",
    "load_best_model_at_end": "the evaluation section",
    "enable_jit_checkpoint": "save_strategy",
    "save_only_model": "save_strategy no, since --resume needs the optimizer, or leave it out",
    "restore_callback_states_from_checkpoint": "save_strategy",
    "push_to_hub": "seekr-peft export",
}
"""Settings of TrainingArguments that a recipe says elsewhere, to where."""

SEVERAL_PROCESSES = frozenset(
    {
        "ddp_backend",
        "ddp_broadcast_buffers",
        "ddp_bucket_cap_mb",
        "ddp_find_unused_parameters",
        "ddp_static_graph",
        "ddp_timeout",
        "deepspeed",
        "fsdp",
        "fsdp_config",
        "local_rank",
        "parallelism_config",
    }
)
"""Settings of TrainingArguments for several processes, refused unless they are off: a run is one process."""

WRITTEN_BY_PEFT = {
    "auto_mapping": "leave it out",
    "base_model_name_or_path": "use model.name_or_path",
    "peft_version": "leave it out",
    "revision": "give a folder that holds this revision as model.name_or_path",
}
"""Settings of LoraConfig that PEFT writes into the adapter and a run never reads, to what to do instead."""

WITHOUT_EFFECT = frozenset({"corda_config", "eva_config", "loftq_config", "lora_ga_config", "runtime_config"})
"""Settings of LoraConfig for what is refused, such as ways of initialising; nothing may be said in them."""

NEVER_ON = OFF | WITHOUT_EFFECT
"""Settings of LoraConfig that are off, or refused."""

FREE = frozenset(
    {
        "hub_model_id",
        "hub_revision",
        "hub_token",
        "include_for_metrics",
        "label_names",
        "length_column_name",
        "megatron_core",
        "metric_for_best_model",
        "optim_target_modules",
        "project",
        "run_name",
        "trackio_bucket_id",
        "trackio_space_id",
        "trackio_static_space_id",
    }
)
"""Text, or lists of it, that is anybody's to choose."""


def above(low: float, most: float = LARGEST_WHOLE) -> tuple[Bound, ...]:
    """Numbers in (``low``, ``most``]."""
    return ((f"above {low}", lambda value: value > low), _at_most(most))


def at_least(low: float, most: float = LARGEST_WHOLE) -> tuple[Bound, ...]:
    """Numbers in [``low``, ``most``]."""
    return ((f"of at least {low}", lambda value: value >= low), _at_most(most))


def _at_most(most: float) -> Bound:
    return (f"of at most {most}", lambda value: value <= most)


def _whole_from_one(value: float) -> bool:
    return value < 1 or float(value).is_integer()


def is_pattern(text: str) -> bool:
    """Whether ``text`` is a regular expression, as PEFT takes names of modules for."""
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError, MemoryError):
        return False
    return 0 < len(text) <= _LONGEST_PATTERN


def _are_patterns(value: Any) -> bool:
    return all(map(is_pattern, [value] if isinstance(value, str) else list(value)))


_BETA: tuple[Bound, ...] = (("in [0, 1)", lambda value: 0 <= value < 1),)
_INTERVAL: tuple[Bound, ...] = (
    ("above 0, and whole from 1 on", lambda value: value > 0 and _whole_from_one(value)),
    _at_most(LARGEST_WHOLE),
)
_NAMES: Bound = ("that holds at least one name", lambda value: len(value) > 0)
_PATTERNS: Bound = ("that holds regular expressions", _are_patterns)
_INDICES: Bound = (
    "of at least 0",
    lambda value: (
        bool(value != []) and all(0 <= n <= LARGEST_WHOLE for n in (value if isinstance(value, list) else [value]))
    ),
)

TRAINING_BOUNDS: dict[str, tuple[Bound, ...]] = {
    "accelerator_config.gradient_accumulation_kwargs.num_steps": at_least(1, 1_000_000),
    "accelerator_config.use_configured_state": (("false, as nothing configures it", lambda value: not value),),
    "activation_checkpointing_kwargs.every_n_layers": at_least(1),
    "adam_beta1": _BETA,
    "adam_beta2": _BETA,
    "adam_epsilon": at_least(0, 1),
    "dataloader_num_workers": at_least(0, 256),
    "dataloader_prefetch_factor": at_least(1, 10_000),
    "eval_accumulation_steps": at_least(1),
    "eval_delay": at_least(0),
    "eval_steps": at_least(0),
    "gradient_accumulation_steps": at_least(1, 1_000_000),
    "gradient_checkpointing_kwargs.every_n_layers": at_least(1),
    "label_smoothing_factor": _BETA,
    "learning_rate": above(0, 1000),
    "lr_scheduler_kwargs": (
        (
            "without infinite numbers",
            lambda keywords: all(math.isfinite(value) for value in keywords.values() if isinstance(value, float)),
        ),
    ),
    "logging_steps": _INTERVAL,
    "max_grad_norm": at_least(0, 1e12),
    "max_steps": (("above 0, or -1 for whole epochs", lambda value: value == -1 or value > 0), _at_most(LARGEST_WHOLE)),
    "neftune_noise_alpha": at_least(0, 1_000_000),
    "num_train_epochs": above(0, 1_000_000),
    "optim_args": (("such as name=value,name=value", lambda text: all("=" in part for part in text.split(","))),),
    "per_device_eval_batch_size": at_least(1, 1_000_000),
    "per_device_train_batch_size": at_least(1, 1_000_000),
    "save_steps": _INTERVAL,
    "save_total_limit": at_least(1),
    "torch_empty_cache_steps": at_least(1),
    "warmup_ratio": (("in [0, 1]", lambda value: 0 <= value <= 1),),
    "warmup_steps": (
        ("of at least 0, and whole from 1 on", lambda value: value >= 0 and _whole_from_one(value)),
        _at_most(LARGEST_WHOLE),
    ),
    "weight_decay": at_least(0, 1000),
}

LORA_BOUNDS: dict[str, tuple[Bound, ...]] = {
    "alpha_pattern": (
        (f"above 0 and of at most {_LARGEST_ALPHA}", each(lambda alpha: 0 < alpha <= _LARGEST_ALPHA)),
        ("whose keys are regular expressions", _are_patterns),
    ),
    "exclude_modules": (_PATTERNS,),
    "layers_pattern": (_PATTERNS,),
    "layers_to_transform": (_INDICES,),
    "lora_alpha": above(0, _LARGEST_ALPHA),
    "lora_dropout": _BETA,
    "qalora_group_size": at_least(1),
    "r": at_least(1, _LARGEST_RANK),
    "rank_pattern": (
        (f"from 1 to {_LARGEST_RANK}", each(lambda rank: 1 <= rank <= _LARGEST_RANK)),
        ("whose keys are regular expressions", _are_patterns),
    ),
    "target_modules": (_NAMES, _PATTERNS),
}

_CHECKPOINTING = {
    "use_reentrant": Setting("bool", False),
    "every_n_layers": Setting("int", 1),
    "offload": Setting("bool", False),
    "preserve_rng_state": Setting("bool", True),
    "determinism_check": Setting("Literal['default', 'none']", "default"),
    "debug": Setting("bool", False),
    "early_stop": Setting("bool", True),
}
"""The keywords of ``activation_checkpointing_enable`` and of ``torch.utils.checkpoint``."""

NESTED: dict[str, Callable[[], dict[str, Setting]]] = {
    "activation_checkpointing_kwargs": lambda: _CHECKPOINTING,
    "gradient_checkpointing_kwargs": lambda: _CHECKPOINTING,
    "accelerator_config": accelerator_settings,
    "accelerator_config.gradient_accumulation_kwargs": lambda: {
        "num_steps": Setting("int | None", None),
        "sync_each_batch": Setting("bool", False),
    },
}
"""Settings that are mappings, to the settings in them."""

_LEVELS = "Literal['detail', 'debug', 'info', 'warning', 'error', 'critical', 'passive']"
NARROWER = {
    "accelerator_config": "dict | None",
    "activation_checkpointing_kwargs": "dict | None",
    "alpha_pattern": "dict[str, float] | None",
    "dataloader_multiprocessing_context": "Literal['fork', 'spawn', 'forkserver'] | None",
    "gradient_checkpointing_kwargs": "dict | None",
    "include_num_input_tokens_seen": "bool | Literal['all', 'non_padding', 'no']",
    "init_lora_weights": "bool | str",
    "log_level": _LEVELS,
    "log_level_replica": _LEVELS,
    "lora_alpha": "float",
    "exclude_modules": "str | list[str] | None",
    "layers_pattern": "str | list[str] | None",
    "layers_to_transform": "int | list[int] | None",
    "lr_scheduler_kwargs": "dict | None",
    "rank_pattern": "dict[str, int] | None",
    "save_strategy": "Literal['no', 'steps', 'epoch']",
    "target_modules": "str | list[str] | None",
    "torch_compile_mode": "Literal['default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs'] | None",
    "train_sampling_strategy": "Literal['random', 'sequential', 'group_by_length', 'batch_rebalance']",
}
"""Annotations in place of the libraries' own, which allow what fails later; for ``lora_alpha`` less than PEFT takes."""


def training_problems(training: Mapping[str, Any], fields: Mapping[str, Setting]) -> list[str]:
    """What is wrong with the known settings of TrainingArguments in ``training``, one sentence each."""
    problems = []
    for key in [key for key in training if key in fields]:
        value = training[key]
        if key in SET_BY_THE_RUN:
            problems.append(f"training.{key} is set by the run; use {SET_BY_THE_RUN[key]} instead.")
        elif key in SEVERAL_PROCESSES:
            if not _is_off(value, fields[key]):
                problems.append(
                    f"training.{key} is {shown(value)}, which is for several processes, but a run is one process on "
                    f"one device; leave it out."
                )
        else:
            problems += _value_problems("training.", key, value, fields[key].annotation, TRAINING_BOUNDS)
    return problems + [f"training: {problem}" for applies, problem in _TRAINING_TOGETHER if _applies(applies, training)]


def lora_problems(adapter: Mapping[str, Any], fields: Mapping[str, Setting]) -> list[str]:
    """What is wrong with the known settings of LoraConfig in ``adapter``, one sentence each, beside those that leave no
    plain B A."""
    problems = []
    for key in [key for key in adapter if key in fields and key not in OFF]:
        value = adapter[key]
        if key in WRITTEN_BY_PEFT:
            if value is not None:
                problems.append(f"adapter.{key} is {shown(value)}, which no run reads; {WRITTEN_BY_PEFT[key]}.")
        elif key in WITHOUT_EFFECT:
            if value not in (None, {}):
                problems.append(f"adapter.{key} is {shown(value)}, which has no effect here; leave it out.")
        elif key == "inference_mode":
            if value is not False:
                problems.append(f"adapter.{key} must be false, got {shown(value)}; the adapter is trained.")
        elif key not in SOME_VALUES or key == "init_lora_weights":
            problems += _value_problems("adapter.", key, value, fields[key].annotation, LORA_BOUNDS)
    return problems + [f"adapter: {problem}" for applies, problem in _LORA_TOGETHER if _applies(applies, adapter)]


def _value_problems(
    prefix: str, key: str, value: Any, annotation: str, bounds: Mapping[str, tuple[Bound, ...]]
) -> list[str]:
    """``key`` is dotted below ``prefix`` where it is in a mapping."""
    kind = kind_of(NARROWER[key]) if key in NARROWER else choice(key, value) or kind_of(annotation)
    rules = bounds.get(key, ())
    if not kind.holds(value):
        return [f"{prefix}{key} must be {_in_words(kind, rules)}, got {shown(value)}."]
    if value is None:
        return []
    broken = next((words for words, holds in rules if not holds(value)), None)
    if broken is not None:
        return [f"{prefix}{key} must be {f'{kind.words} {broken}'.strip()}, got {shown(value)}."]
    if key not in NESTED:
        return []
    known, problems = NESTED[key](), []
    for part, inner in value.items():
        if part not in known:
            problems.append(f"{prefix}{key} has the unknown key {cut(part, 60)}; known keys are {', '.join(known)}.")
        elif part == "use_reentrant" and inner:
            problems.append(
                f"{prefix}{key}: use_reentrant must be false, got {shown(inner)}; under reentrant checkpointing a "
                f"captured attention has no gradient."
            )
        else:
            problems += _value_problems(prefix, f"{key}.{part}", inner, known[part].annotation, bounds)
    return problems


def _in_words(kind: Kind, rules: tuple[Bound, ...]) -> str:
    return f"{kind.words} {rules[0][0]}" if rules else kind.words


def _is_off(value: Any, setting: Setting) -> bool:
    default = setting.default
    return kind_of(setting.annotation).holds(value) and (value is None or value is False or value == default)


# Settings that exclude or need each other ---------------------------------------------------------------------------


def _applies(applies: Callable[[Mapping[str, Any]], bool], settings: Mapping[str, Any]) -> bool:
    try:
        return applies(settings)
    except (TypeError, AttributeError):
        # Of a wrong type, which is told already.
        return False


def _names_one_pattern(adapter: Mapping[str, Any]) -> bool:
    return isinstance(adapter.get("target_modules", "all-linear"), str)


_TRAINING_TOGETHER: tuple[tuple[Callable[[Mapping[str, Any]], bool], str], ...] = (
    (lambda of: of.get("fp16") is True and of.get("bf16") is True, "fp16 and bf16 exclude each other; keep one."),
    (
        lambda of: of.get("fp16_full_eval") is True and of.get("bf16_full_eval") is True,
        "fp16_full_eval and bf16_full_eval exclude each other; keep one.",
    ),
    *(
        (
            lambda of, key=key: bool(of.get(key)) and of.get("dataloader_num_workers", 0) == 0,
            f"{key} needs dataloader_num_workers above 0; set it, or leave {key} out.",
        )
        for key in (
            "dataloader_prefetch_factor",
            "dataloader_persistent_workers",
            "dataloader_multiprocessing_context",
        )
    ),
)
_LORA_TOGETHER: tuple[tuple[Callable[[Mapping[str, Any]], bool], str], ...] = (
    *(
        (
            lambda of, key=key: of.get(key) is not None and _names_one_pattern(of),
            f"{key} needs a list of names as target_modules, not all-linear or a pattern; give the list.",
        )
        for key in ("layers_to_transform", "layers_pattern")
    ),
    (
        lambda of: bool(of.get("layers_pattern")) and of.get("layers_to_transform") is None,
        "layers_pattern needs layers_to_transform; set it, or leave layers_pattern out.",
    ),
)
