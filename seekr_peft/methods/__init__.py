"""The methods, one file each behind ``ContinualMethod``, and the scores and the rhythm that they share.

A batch of new samples goes into a method's replay step, which answers with the loss terms of its replay memory; each
class is loaded on first use, so that the names in ``registry`` cost no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .registry import ENTRY_POINT_GROUP, OWN_METHODS, find_entry_point, method_names

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
        ConfigError: There is none, or the entry point is no ``ContinualMethod``.
    """
    from .base import ContinualMethod

    if name in OWN_METHODS:
        return getattr(import_module(f".{name}", __name__), OWN_METHODS[name])  # type: ignore[no-any-return]
    entry_point = find_entry_point(name)
    if entry_point is None:
        raise ConfigError(f"method {name!r} is unknown; choose one of {', '.join(method_names())}.")
    found = entry_point.load()
    if not (isinstance(found, type) and issubclass(found, ContinualMethod)):
        raise ConfigError(
            f"the entry point {name!r} of group {ENTRY_POINT_GROUP!r} is {entry_point.value}, no ContinualMethod; "
            f"fix the package that registers it."
        )
    return found


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
    "get_method",
    "method_names",
]
