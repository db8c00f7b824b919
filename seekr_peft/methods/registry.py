"""The methods by name: the package's own with their configurations, without torch, and those of other packages."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from ..config import MethodConfig, ReplayConfig, SeekrConfig
from .settings import EwcConfig, LwfConfig, OLoraConfig

ENTRY_POINT_GROUP = "seekr_peft.methods"
"""Other packages register a method here: ``[project.entry-points."seekr_peft.methods"] name = "module:Class"``."""

OWN_METHODS = {
    "sequential": "Sequential",
    "replay": "Replay",
    "replay_logits": "ReplayLogits",
    "seekr": "Seekr",
    "lwf": "Lwf",
    "ewc": "Ewc",
    "olora": "OLora",
    "multitask": "Multitask",
}
"""The package's own methods: each one's module here, which is its name in a recipe, and its class."""

OWN_CONFIGS: dict[str, type[MethodConfig]] = {
    "sequential": MethodConfig,
    "replay": ReplayConfig,
    "replay_logits": SeekrConfig,
    "seekr": SeekrConfig,
    "lwf": LwfConfig,
    "ewc": EwcConfig,
    "olora": OLoraConfig,
    "multitask": MethodConfig,
}
"""Each one's ``config_class``."""

ADAPTER_MODES = {"ewc": ("continue",), "olora": ("stack",)}
"""Of those methods that do not work with every one: the class's ``adapter_modes``."""


def method_names() -> list[str]:
    """The package's own methods, then those of other installed packages."""
    return [*OWN_METHODS, *sorted(point.name for point in entry_points(group=ENTRY_POINT_GROUP))]


def find_entry_point(name: str) -> EntryPoint | None:
    """The entry point of another package's method, or None."""
    return next((point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name == name), None)
