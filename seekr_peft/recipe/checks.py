"""The checks of a whole recipe, one function a question, each with the sentences that it finds.

They get the plain mapping, so that all problems are told together with those of the sections' types.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ..config import MethodConfig, mapping_problems
from ..errors import ConfigError, cut, shown
from ..files.paths import path_problem, reason
from ..methods import find_config_class, get_method, other_configs
from ..methods.registry import ADAPTER_MODES, OWN_METHODS, method_names
from ..model.plain_lora import why_refused
from ..validation import unknown_keys
from .library_fields import lora_settings, training_settings
from .scheduler import scheduler_problems
from .schema import DEMO, AdapterSection, Names
from .setting_rules import lora_problems, training_problems

Check = Callable[[dict[str, Any]], list[str]]

_PATHS = (
    ("", "output_dir"),
    ("model", "name_or_path"),
    ("tasks", "path"),
    ("evaluation", "general_path"),
    ("compare", "runs_dir"),
)
_ON_THE_HUB = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
_NAMES = TypeAdapter(Names)


def paths_in(mapping: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Each path of a recipe: the mapping that holds it, its key in there, and its whole key."""
    for section, key in _PATHS:
        values = mapping.get(section) if section else mapping
        if isinstance(values, dict) and isinstance(values.get(key), str):
            yield values, key, f"{section}.{key}".lstrip(".")


def _path_problems(mapping: dict[str, Any]) -> list[str]:
    found = [(where, values[key]) for values, key, where in paths_in(mapping)]
    told = [(where, path, path_problem(path)) for where, path in found]
    return [f"{where}: {shown(path)} {problem}; give another path." for where, path, problem in told if problem]


# The method ---------------------------------------------------------------------------------------------------------


def _method_name_problems(mapping: dict[str, Any]) -> list[str]:
    name, known = _method(mapping).get("name"), method_names()
    return [] if name in known else [f"method.name must be one of {', '.join(known)}, got {shown(name)}."]


def _adapter_mode_problems(mapping: dict[str, Any]) -> list[str]:
    """Whether the method means something in the adapter's mode."""
    name = str(_method(mapping).get("name"))
    mode, modes = _section(mapping, "adapter").get("mode", "stack"), _adapter_modes(name)
    if not modes or mode in modes:
        return []
    return [f"adapter.mode must be {' or '.join(modes)} for method {name}, got {shown(mode)}."]


def _adapter_modes(name: str) -> Sequence[str]:
    """Those that a method is limited to; () for any, and for an unknown method."""
    if name in OWN_METHODS or name not in method_names():
        return ADAPTER_MODES.get(name, ())
    return get_method(name).adapter_modes


def _method_setting_problems(mapping: dict[str, Any]) -> list[str]:
    """Against the configuration of the method, and of the other methods that may share the section."""
    settings = {key: value for key, value in _method(mapping).items() if key != "name"}
    name = _method(mapping).get("name")
    kind = find_config_class(str(name)) if name in method_names() else MethodConfig
    found = mapping_problems(settings, kind, other_configs(settings))
    return [f"method.{problem}".replace("did you mean ", "did you mean method.") for problem in found]


def _method(mapping: dict[str, Any]) -> dict[str, Any]:
    method = mapping.get("method", {"name": "seekr"})
    # Its type is told already.
    return method if isinstance(method, dict) else {"name": "seekr"}


# Training and adapter -----------------------------------------------------------------------------------------------


def _training_key_problems(mapping: dict[str, Any]) -> list[str]:
    return unknown_keys(_section(mapping, "training"), list(training_settings()), "training.")


def _training_value_problems(mapping: dict[str, Any]) -> list[str]:
    return training_problems(_section(mapping, "training"), training_settings())


def _scheduler_problems(mapping: dict[str, Any]) -> list[str]:
    return scheduler_problems(_section(mapping, "training"))


def _adapter_key_problems(mapping: dict[str, Any]) -> list[str]:
    return unknown_keys(_section(mapping, "adapter"), [*AdapterSection.model_fields, *lora_settings()], "adapter.")


def _adapter_value_problems(mapping: dict[str, Any]) -> list[str]:
    """Whether the adapter is a plain sum that the stack can add up, and then whether its values are of LoRA."""
    adapter, known = _section(mapping, "adapter"), lora_settings()
    refused = {key: _why_refused(key, adapter[key], known[key].default) for key in adapter if key in known}
    problems = [f"adapter.{key} is {shown(adapter[key])}, {why}" for key, why in refused.items() if why]
    return problems + lora_problems({key: value for key, value in adapter.items() if not refused.get(key)}, known)


def _why_refused(key: str, value: Any, default: Any) -> str | None:
    why = why_refused(key, value, default)
    if key == "task_type" and not why and value not in (None, "CAUSAL_LM"):
        return "but a run trains a causal language model; leave it out, which means CAUSAL_LM."
    return why


def _section(mapping: dict[str, Any], name: str) -> dict[str, Any]:
    section = mapping.get(name, {})
    # Its type is told already.
    return section if isinstance(section, dict) else {}


# Model, tasks and evaluation: what they name is there ---------------------------------------------------------------


def _model_problems(mapping: dict[str, Any]) -> list[str]:
    name = mapping["model"]["name_or_path"]
    shown_name = cut(name)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.exists(name)
    if not looks_local and "/" not in name and name != DEMO and get_close_matches(name, [DEMO]):
        return [f"model.name_or_path: {shown_name} is no folder and no owner/name on the hub; did you mean {DEMO}?"]
    if not looks_local and not _ON_THE_HUB.fullmatch(name):
        return [f"model.name_or_path: {shown(name)} is no folder and no owner/name on the hub; give one of them."]
    if name == DEMO or not looks_local:
        return []
    from ..model.base_files import check_base_files

    try:
        check_base_files(Path(name).expanduser(), name, mapping["model"].get("use_safetensors", True) is not False)
    except ConfigError as error:
        return error.problems
    return []


def _task_problems(mapping: dict[str, Any]) -> list[str]:
    tasks = mapping["tasks"]
    if not _are_tasks_named(tasks):
        return []
    # The general tests are looked for in the tasks' folder, too.
    return _task_folder_problems(tasks, bool(mapping.get("evaluation", {}).get("general")))


def _are_tasks_named(tasks: dict[str, Any]) -> bool:
    """Whether format and order have their types, of which the type's check tells."""
    order = tasks.get("order")
    return _are_names([tasks["format"]]) and (order is None or _are_names(order))


def _task_folder_problems(tasks: dict[str, Any], path_is_of_others: bool) -> list[str]:
    from ..tasks import FORMATS, MIXED, PACKAGED, find_task_problems

    path = str(tasks.get("path") or "")
    if tasks["format"] in (*FORMATS, MIXED) and not path:
        return [f"tasks.path is missing; format {shown(tasks['format'])} needs the folder of the tasks."]
    looked_at = "" if tasks["format"] in PACKAGED and path_is_of_others else path
    found = find_task_problems(tasks["format"], looked_at, tasks.get("order"))
    return [f"tasks: {problem.replace(path, cut(path)) if path else problem}" for problem in found]


def _epoch_problems(mapping: dict[str, Any]) -> list[str]:
    """Whether there is a number for each task, where the tasks are named."""
    tasks = mapping["tasks"]
    if not _are_tasks_named(tasks):
        return []
    order, epochs = tasks.get("order"), tasks.get("epochs")
    if not order:
        from ..tasks import PACKAGED

        order = list(PACKAGED[tasks["format"]].names) if tasks["format"] in PACKAGED else None
    if epochs is None or order is None or len(epochs) == len(order):
        return []
    return [f"tasks.epochs has {len(epochs)} numbers for {len(order)} tasks; give one for each."]


def _are_names(value: Any) -> bool:
    """Whether ``value`` is a list of names, and not a longer one than anybody has, of which the type's check tells."""
    try:
        _NAMES.validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _evaluation_problems(mapping: dict[str, Any]) -> list[str]:
    evaluation = mapping.get("evaluation", {})
    names = evaluation.get("general")
    if not names or not _are_names(names):
        return []
    from ..evaluation.general import find_general_tests

    _, problems = find_general_tests(names, evaluation.get("general_path"), mapping["tasks"].get("path"))
    folder = str(evaluation.get("general_path") or "")
    return [f"evaluation.general: {problem.replace(folder, cut(folder))}" for problem in problems]


# All of them --------------------------------------------------------------------------------------------------------


def _reading(check: Check) -> Check:
    """``check``, which looks at folders, with a sentence where one cannot be read."""

    def checked(mapping: dict[str, Any]) -> list[str]:
        if _path_problems(mapping):
            # They are told; nothing can be found there.
            return []
        try:
            return check(mapping)
        except OSError as error:
            return [f"{cut(str(error.filename))} cannot be read: {error.strerror or error}; give another path."]

    return checked


CHECKS_OF_VALUES: tuple[Check, ...] = (
    _method_name_problems,
    _adapter_mode_problems,
    _method_setting_problems,
    _training_key_problems,
    _training_value_problems,
    _scheduler_problems,
    _adapter_key_problems,
    _adapter_value_problems,
)
"""Those that look at nothing but the recipe itself."""
CHECKS: tuple[Check, ...] = (
    *CHECKS_OF_VALUES,
    _path_problems,
    *map(_reading, (_model_problems, _task_problems, _epoch_problems, _evaluation_problems)),
)
"""All of them; the last ones look whether files and folders are there."""


def run_checks(checks: Sequence[Check], mapping: dict[str, Any], has_types: bool) -> list[str]:
    """What ``checks`` find; ``has_types`` says whether every section has its type."""
    return [problem for check in checks for problem in _answer(check, mapping, has_types)]


def _answer(check: Check, mapping: dict[str, Any], has_types: bool) -> list[str]:
    try:
        return check(mapping)
    except ConfigError as error:
        return error.problems
    except (KeyError, TypeError, AttributeError):
        # A section of the wrong shape was already reported by its type; its further checks then have nothing to say.
        if has_types:
            raise
        return []
    except OSError as error:
        if has_types:
            raise
        return [f"{error.filename}: {reason(error)}; check that path."]
