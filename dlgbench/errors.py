"""What goes wrong in ways a user can mend; each error is one sentence that names the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """The user asked for something that does not exist or cannot be read (exit code 2)."""


class Unsuitable(ValueError):
    """A case that cannot be run for a reason in its nature; it is skipped with this reason."""


class EnvironmentBroken(RuntimeError):
    """The installation cannot run reconstructions (exit code 4)."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """An error for a name that is not among ``known``, with its nearest neighbour."""
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    expected = f"one of {', '.join(choices)}" if choices else "none"
    return UsageError(f"unknown {kind} {name!r}: expected {expected}{hint}")
