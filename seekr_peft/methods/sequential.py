"""Sequential fine-tuning: the lower bound."""

from typing import ClassVar

from ..config import MethodConfig
from .base import ContinualMethod


class Sequential(ContinualMethod):
    """Train the tasks one after another and do nothing about forgetting."""

    name: ClassVar[str] = "sequential"
    config_class: ClassVar[type[MethodConfig]] = MethodConfig
