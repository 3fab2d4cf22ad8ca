"""Defences: what clients do to their gradients before they share them, one family a file."""

from __future__ import annotations

from dlgbench.defenses.base import Defense
from dlgbench.registry import DEFENSES

__all__ = ["Defense", "make"]


def make(text: str) -> Defense:
    """The defence that ``text`` names, such as ``prune:share=0.9``: call it with gradients and a generator.

    Raises UsageError where there is no such name, option or value.
    """
    defense: Defense = DEFENSES.make(DEFENSES.spec(text))
    return defense
