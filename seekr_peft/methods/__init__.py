"""The methods, one file each behind ``ContinualMethod``, and the scores and the rhythm that they share.

A batch of new samples goes into a method's replay step, which answers with the loss terms of its replay memory; each
class is loaded on first use, so that the names in ``registry`` and the configurations in ``settings`` cost no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..config import MethodConfig
from ..errors import ConfigError, SeekrError, cut
from .registry import ENTRY_POINT_GROUP, OWN_CONFIGS, OWN_METHODS, find_entry_point, method_names

if TYPE_CHECKING:
    from .base import ContinualMethod as ContinualMethod
    from .ewc import Ewc as Ewc
    from .lwf import Lwf as Lwf
    from .multitask import Multitask as Multitask
    from .olora import OLora as OLora
    from .replay import Replay as Replay
    from .replay_logits import ReplayLogits as ReplayLogits
    from .seekr import Seekr as Seekr
    from .sequential import Sequential as Sequential

_HOMES = {"ContinualMethod": "base"} | {class_name: module for module, class_name in OWN_METHODS.items()}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def get_method(name: str) -> type[ContinualMethod]:
    """The method of that name, the package's own or one that another package registers.

    Raises:
        ConfigError: There is none, or the entry point cannot be loaded or is no ``ContinualMethod``.
    """
    from .base import ContinualMethod

    if name in OWN_METHODS:
        return getattr(import_module(f".{name}", __name__), OWN_METHODS[name])  # type: ignore[no-any-return]
    entry_point = find_entry_point(name)
    if entry_point is None:
        raise ConfigError(f"method {name!r} is unknown; choose one of {', '.join(method_names())}.")
    try:
        found = entry_point.load()
    except Exception as error:
        # Another package's module may fail in any way.
        why = cut(" ".join(f"{type(error).__name__}: {error}".split()))
        raise ConfigError(
            f"method {name!r} of the entry point {entry_point.value} cannot be loaded ({why}); mend or remove the "
            f"package that registers it."
        ) from error
    if not (isinstance(found, type) and issubclass(found, ContinualMethod)):
        raise ConfigError(
            f"the entry point {name!r} of group {ENTRY_POINT_GROUP!r} is {entry_point.value}, no ContinualMethod; "
            f"fix the package that registers it."
        )
    return found


def find_config_class(name: str) -> type[MethodConfig]:
    """The class of that method's configuration; loads torch only for another package's method.

    Raises:
        ConfigError: As of ``get_method``, or that method's ``config_class`` is no ``MethodConfig``.
    """
    if name in OWN_CONFIGS:
        return OWN_CONFIGS[name]
    found = get_method(name).config_class
    if not (isinstance(found, type) and issubclass(found, MethodConfig)):
        raise ConfigError(
            f"the config_class of method {name!r} is {cut(repr(found))}, not a class that derives from "
            f"seekr_peft.config.MethodConfig; fix the package that registers it."
        )
    return found


def other_configs(keys: Iterable[str]) -> list[type[MethodConfig]]:
    """The configurations that one ``method`` section is shared with: those of the package's own methods, and where
    ``keys`` has one that none of them knows, those of other packages' methods."""
    own = list(dict.fromkeys(OWN_CONFIGS.values()))
    if all(any(key in each.setting_names() for each in own) for key in keys):
        return own
    return own + [each for name in method_names() if name not in OWN_CONFIGS for each in _config_if_any(name)]


def _config_if_any(name: str) -> list[type[MethodConfig]]:
    try:
        return [find_config_class(name)]
    except SeekrError:
        # It is told to whoever asks for that method.
        return []


__all__ = [
    "ContinualMethod",
    "Ewc",
    "Lwf",
    "Multitask",
    "OLora",
    "Replay",
    "ReplayLogits",
    "Seekr",
    "Sequential",
    "find_config_class",
    "get_method",
    "method_names",
    "other_configs",
]
