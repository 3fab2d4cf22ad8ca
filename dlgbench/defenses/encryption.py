"""Homomorphic encryption: the server adds what it cannot read."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from dlgbench.defenses.base import Client, Defense, Tensors, client_sums, finite, taken_apart, unflat
from dlgbench.prepare import Network
from dlgbench.registry import DEFENSES

DEGREE = 8192
"""Of the polynomials: with `MODULI`, 128 bits of security (Albrecht et al. 2018, "Homomorphic Encryption
Security Standard", table 1: at most 218 bits of modulus)."""
MODULI = [60, 40, 60]
SCALE = 2.0**40
SLOTS = DEGREE // 2
"""Numbers in one ciphertext."""


@DEFENSES.register("ckks", positive=("clients",))
@dataclass(frozen=True)
class CKKS(Defense):
    """Approximate arithmetic on ciphertexts (Cheon et al. 2017), summed over ``clients``, by TenSEAL.

    Whoever attacks sees ciphertexts, of which only shapes can be read: they are given as zeros.  Where
    ``key=attacker`` the attacker has the key, and with it the sum.
    """

    clients: int = 2
    key: Literal["clients", "attacker"] = "clients"

    def protect(self, network: Network, shape: tuple[int, ...]) -> Network:
        return taken_apart(network, shape)

    @property
    def least(self) -> int:
        return self.clients

    def refusal(self, trains: bool) -> str | None:
        missing = importlib.util.find_spec("tenseal") is None
        return 'it encrypts by TenSEAL: pip install "dlgbench[he]"' if missing else None

    def update(self, client: Client, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensors:
        total: list[Any] = []
        for one in client_sums(client, images, labels, self.clients):
            ciphertexts = encrypted(one)
            total = [a + b for a, b in zip(total, ciphertexts, strict=True)] if total else ciphertexts
        values = torch.tensor([value for part in total for value in part.decrypt()]).to(images)
        return finite(unflat(values / len(images), client.weights))

    def expected(self, client: Client, images: Tensor, labels: Tensor, shared: Tensors) -> Tensors:
        return client.gradient(images, labels)

    def observed(self, client: Client, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensors:
        if self.key == "attacker":
            return self.update(client, images, labels, generator)
        return {name: torch.zeros_like(weight) for name, weight in client.weights.items()}

    def size(self, shared: Tensors) -> int:
        """Of one client's ciphertexts."""
        count = sum(gradient.numel() for gradient in shared.values())
        return -(-count // SLOTS) * ciphertext_bytes()


def encrypted(values: Tensor) -> list[Any]:
    """Ciphertexts of `SLOTS` numbers each.  Their randomness is TenSEAL's own, and secure."""
    import tenseal

    return [tenseal.ckks_vector(_context(), part.tolist()) for part in torch.split(values.double(), SLOTS)]


@cache
def ciphertext_bytes() -> int:
    """The size of a full ciphertext, serialised."""
    (one,) = encrypted(torch.zeros(SLOTS))
    return len(one.serialize())


@cache
def _context() -> Any:
    import tenseal

    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS, poly_modulus_degree=DEGREE, coeff_mod_bit_sizes=MODULI
    )
    context.global_scale = SCALE
    return context
