"""Sequential fine-tuning: the lower bound."""

from typing import ClassVar

from .base import ContinualMethod


class Sequential(ContinualMethod):
    """Train the tasks one after another and do nothing about forgetting."""

    name: ClassVar[str] = "sequential"
