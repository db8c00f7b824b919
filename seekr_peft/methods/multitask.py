"""All tasks at once: the upper bound."""

from typing import ClassVar

from ..config import MethodConfig
from .base import ContinualMethod


class Multitask(ContinualMethod):
    """Train one adapter on the samples of all tasks together, for as many optimiser steps as the sequence has.

    Nothing is learnt in order, so nothing is forgotten: what a method in the sequence could reach at best.
    """

    name: ClassVar[str] = "multitask"
    config_class: ClassVar[type[MethodConfig]] = MethodConfig
    joint: ClassVar[bool] = True
