"""The methods, one file each behind ``ContinualMethod``. May import everything below it, never the trainer."""

from .base import ContinualMethod
from .replay import Replay
from .seekr import Seekr
from .sequential import Sequential

METHODS: dict[str, type[ContinualMethod]] = {method.name: method for method in (Sequential, Replay, Seekr)}

__all__ = ["METHODS", "ContinualMethod", "Replay", "Seekr", "Sequential"]
