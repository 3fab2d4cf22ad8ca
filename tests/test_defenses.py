"""Every registered defence keeps its contract, and each is what it says."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest
import torch
from scipy.stats import kstest, norm
from torch import Tensor

from dlgbench.defenses import Defense
from dlgbench.errors import UsageError
from dlgbench.registry import DEFENSES

NAMES = list(DEFENSES.entries)
DTYPES = [torch.float32, torch.float64]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def defense(text: str) -> Defense:
    made: Defense = DEFENSES.make(DEFENSES.spec(text))
    return made


def example(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = seeded(1)
    shapes = {"conv.weight": (4, 3, 5, 5), "conv.bias": (4,), "head.weight": (10, 48), "head.bias": (10,)}
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_shapes_names_and_dtypes_are_kept(name: str, dtype: torch.dtype) -> None:
    private = example(dtype)
    shared = defense(name)(private, seeded(0))
    assert list(shared) == list(private)
    for key, tensor in private.items():
        assert (shared[key].shape, shared[key].dtype) == (tensor.shape, dtype)
        assert shared[key].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_the_private_gradient_is_not_touched(name: str) -> None:
    private = example()
    defense(name)(private, seeded(0))
    assert equal(private, example())


@pytest.mark.parametrize("name", NAMES)
def test_all_randomness_comes_from_the_generator(name: str) -> None:
    before = torch.get_rng_state()
    first, again = (defense(name)(example(), seeded(2)) for _ in range(2))
    assert equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", NAMES)
def test_a_defence_is_a_frozen_value(name: str) -> None:
    one, other = defense(name), defense(name)
    assert one == other
    option = fields(one)[0].name if fields(one) else "novelty"  # type: ignore[arg-type]
    with pytest.raises((FrozenInstanceError, TypeError)):
        setattr(one, option, 1)


def test_none_is_the_identity() -> None:
    assert equal(defense("none")(example(), seeded(0)), example())


def noise_of(std: float, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    private = {"a": torch.full((300, 200), 0.25, dtype=dtype), "b": torch.zeros(300, 200, dtype=dtype)}
    shared = defense(f"noise:std={std}")(private, seeded(seed))
    return {name: shared[name] - private[name] for name in private}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("std", [1e-3, 0.01, 2.0])
def test_noise_is_gaussian_with_its_deviation(std: float, dtype: torch.dtype) -> None:
    noise = torch.cat([tensor.flatten() for tensor in noise_of(std, dtype).values()]).double().numpy()
    assert noise.std() == pytest.approx(std, rel=0.01)  # of 120,000 samples: the standard error is 0.2 %
    assert abs(noise.mean()) < 4 * std / len(noise) ** 0.5
    assert kstest(noise, norm(scale=std).cdf).pvalue > 1e-3
    assert kstest(noise, norm(scale=1.03 * std).cdf).pvalue < 1e-3  # the test can tell 3 %


def test_noise_in_double_precision_is_not_rounded_to_single() -> None:
    noise = noise_of(1.0, torch.float64)["b"]
    assert (noise.float().double() != noise).double().mean() > 0.9


def test_every_tensor_and_every_seed_has_noise_of_its_own() -> None:
    noise, other = noise_of(1.0, torch.float32), noise_of(1.0, torch.float32, seed=1)
    for a, b in ((noise["a"], noise["b"]), (noise["a"], other["a"])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 4 / a.numel() ** 0.5


def test_noise_is_that_of_the_paper_by_default() -> None:
    assert str(DEFENSES.spec("noise")) == "noise:std=0.01"
    assert defense("noise") == defense("noise:0.01")


@pytest.mark.parametrize("std", ["0", "-0.1", "nan", "inf", "-inf", "1e400", "much", ""])
def test_a_bad_deviation_is_refused(std: str) -> None:
    with pytest.raises(UsageError, match="std") as caught:
        defense(f"noise:std={std}")
    assert "expected" in str(caught.value)
