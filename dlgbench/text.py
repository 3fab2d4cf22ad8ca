"""Text from outside made safe for a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` with control characters and undecodable bytes spelled out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
