"""Defences: what clients do to their gradients before they share them, one family a file."""

from __future__ import annotations

from dlgbench.defenses.base import Client, Defense, GradientDefense
from dlgbench.registry import DEFENSES

__all__ = ["Client", "Defense", "GradientDefense", "make"]


def make(text: str) -> Defense:
    """The defence that ``text`` names, such as ``prune:share=0.9``.

    Call it with gradients and a generator; where it is no `GradientDefense`, its `update` with a `Client`.

    Raises UsageError where there is no such name, option or value.
    """
    defense: Defense = DEFENSES.make(DEFENSES.spec(text))
    return defense
