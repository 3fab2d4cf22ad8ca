"""No test may reach the network, or take more than one thread; and what tests of trials share."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_address
from typing import Any

import matplotlib as mpl
import pytest
import torch
from hypothesis import settings

from dlgbench import trial
from dlgbench.attacks.base import Attack
from dlgbench.case import Case
from dlgbench.prepare import Network

settings.register_profile("repeatable", deadline=None, derandomize=True)  # whatever the machine is doing
settings.load_profile("repeatable")
os.environ["OMP_NUM_THREADS"] = "1"  # of every process that a test starts
torch.set_num_threads(1)  # and of pytest's own, one a core: rounding then depends less on the machine


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Fail at every attempt to connect to another machine, also where the code under test expects errors."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, _guarded(getattr(socket.socket, name)))
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What was compiled before the tests, or by them, is none of theirs, or of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", mpl.get_cachedir())  # the list of the fonts takes long
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def attacks(monkeypatch: pytest.MonkeyPatch) -> list[Attack]:
    """Every attack that a trial makes."""
    made: list[Attack] = []
    real = trial.attack_on

    def attack_on(cases: Sequence[Case], network: Network) -> Attack:
        made.append(real(cases, network))
        return made[-1]

    monkeypatch.setattr(trial, "attack_on", attack_on)
    return made


def _guarded(real: Callable[..., Any]) -> Callable[..., Any]:
    def connect(self: socket.socket, address: Any) -> Any:
        if self.family != socket.AF_UNIX and not _is_loopback(address):
            pytest.fail(f"a test tried to reach the network: {address}")  # no Exception: nothing swallows it
        return real(self, address)

    return connect


def _is_loopback(address: Any) -> bool:
    host = address[0]
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # another name
        return False
