"""The methods, one file each behind ``ContinualMethod``. May import everything below it, never the trainer."""

from ..errors import ConfigError
from ..method_names import ENTRY_POINT_GROUP, find_entry_point, method_names
from .base import ContinualMethod
from .ewc import Ewc
from .lwf import Lwf
from .multitask import Multitask
from .olora import OLora
from .replay import Replay
from .replay_logits import ReplayLogits
from .seekr import Seekr
from .sequential import Sequential

METHODS: dict[str, type[ContinualMethod]] = {
    method.name: method for method in (Sequential, Replay, ReplayLogits, Seekr, Lwf, Ewc, OLora, Multitask)
}
"""The package's own methods; ``get_method`` finds installed ones as well."""


def get_method(name: str) -> type[ContinualMethod]:
    """The method of that name, the package's own or one that another package registers.

    Raises:
        ConfigError: There is none, or the entry point is no ``ContinualMethod``.
    """
    if name in METHODS:
        return METHODS[name]
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
    "METHODS",
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
