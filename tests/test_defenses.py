"""Every registered defence keeps its contract, and each is what it says."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.stats import kstest, laplace, norm
from torch import Tensor

from dlgbench.defenses import GradientDefense, make
from dlgbench.errors import UsageError
from dlgbench.registry import DEFENSES

ALL = list(DEFENSES.entries)
NAMES = [name for name in ALL if isinstance(make(name), GradientDefense)]
DTYPES = [torch.float32, torch.float64]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def defense(text: str) -> GradientDefense:
    made = make(text)
    assert isinstance(made, GradientDefense)
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
    assert str(DEFENSES.spec("noise")) == "noise:rounds=1,std=0.01"
    assert defense("noise") == defense("noise:std=0.01")


@pytest.mark.parametrize("std", ["0", "-0.1", "nan", "inf", "-inf", "1e400", "much", ""])
def test_a_bad_deviation_is_refused(std: str) -> None:
    with pytest.raises(UsageError, match="std") as caught:
        defense(f"noise:std={std}")
    assert "expected" in str(caught.value)


shared_values = arrays(
    np.float64,
    array_shapes(max_dims=4, max_side=6),
    elements=st.floats(-1e3, 1e3, allow_subnormal=False).map(lambda x: round(x, 6)),
)


def alone(text: str, values: np.ndarray) -> np.ndarray:
    """What is shared of a gradient of one tensor."""
    (shared,) = make(text)([torch.from_numpy(values.copy())], seeded(0))
    return shared.numpy()


@given(shared_values)
@settings(deadline=None)
@pytest.mark.parametrize("name", NAMES)
def test_any_finite_gradient_stays_finite_and_keeps_its_shape(name: str, values: np.ndarray) -> None:
    shared = alone(name, values)
    assert (shared.shape, shared.dtype) == (values.shape, values.dtype)
    assert np.isfinite(shared).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_list_is_shared_as_a_mapping_is(name: str) -> None:
    listed = make(name)(list(example().values()), seeded(3))
    named = make(name)(example(), seeded(3))
    assert isinstance(listed, list)
    assert all(torch.equal(a, b) for a, b in zip(listed, named.values(), strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_is_refused(name: str, value: float) -> None:
    broken = example()
    broken["head.bias"][3] = value
    with pytest.raises(UsageError, match=r"head.bias.*finite"):
        make(name)(broken, seeded(0))


@given(shared_values, st.floats(0, 0.99))
@settings(deadline=None)
def test_pruning_leaves_out_the_smallest(values: np.ndarray, share: float) -> None:
    shared = alone(f"prune:share={share}", values)
    assert ((shared == values) | (shared == 0)).all()
    order = np.sort(np.abs(values), axis=None)
    count = round(share * values.size)
    least = order[count - 1] if count else -1.0
    assert ((shared != 0) == ((np.abs(values) > least) & (values != 0))).all()


def test_topk_compares_all_tensors() -> None:
    small, large = torch.full((50,), 0.1), torch.arange(1.0, 51.0)
    shared = make("topk:share=0.8")([small, large], seeded(0))
    assert not shared[0].any()
    assert shared[1].nonzero().flatten().tolist() == list(range(30, 50))
    assert make("prune:share=0.8")([torch.arange(1.0, 11.0), large], seeded(0))[0].count_nonzero() == 2


@pytest.mark.parametrize("share", ["-0.1", "1", "nan"])
@pytest.mark.parametrize("name", ["prune", "topk"])
def test_a_share_that_is_none_is_refused(name: str, share: str) -> None:
    with pytest.raises(UsageError, match="share"):
        make(f"{name}:share={share}")


@given(shared_values)
@settings(deadline=None)
def test_half_precision_is_numpys(values: np.ndarray) -> None:
    np.testing.assert_array_equal(alone("fp16", values), values.astype(np.float16).astype(np.float64))


def test_half_precision_saturates_instead_of_overflowing() -> None:
    assert alone("fp16", np.array([1e6, -1e9])).tolist() == [65504, -65504]


@given(shared_values)
@settings(deadline=None)
def test_brain_floats_are_float32_without_its_last_sixteen_bits(values: np.ndarray) -> None:
    shared = alone("bf16", values)
    bits = shared.astype(np.float32).view(np.uint32)
    assert (bits & 0xFFFF == 0).all()
    assert (np.abs(shared - values) <= np.abs(values) * 2.0**-8 + 1e-30).all()


@given(shared_values)
@settings(deadline=None)
def test_int8_rounds_to_the_nearest_of_255_levels(values: np.ndarray) -> None:
    shared, spacing = alone("int8", values), np.abs(values).max() / 127
    assert (np.abs(shared - values) <= spacing / 2 * (1 + 1e-9)).all()
    if spacing:
        levels = shared / spacing
        np.testing.assert_allclose(levels, np.round(levels), atol=1e-9)


@given(shared_values)
@settings(deadline=None)
def test_signs_are_numpys(values: np.ndarray) -> None:
    np.testing.assert_array_equal(alone("sign", values), np.sign(values))


@pytest.mark.parametrize("bound", [0.5, 10.0, 1e3])
def test_clipping_is_torchs(bound: float) -> None:
    private = example(torch.float64)
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in private.values()]
    for parameter, gradient in zip(parameters, private.values(), strict=True):
        parameter.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_(parameters, bound)
    shared = make(f"clip:bound={bound}")(private, seeded(0))
    for parameter, gradient in zip(parameters, shared.values(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=0)  # torch adds 1e-6 to the norm


@pytest.mark.parametrize("scale", [1e-3, 0.5])
def test_laplace_noise_has_its_scale(scale: float) -> None:
    noise = alone(f"laplace:scale={scale}", np.zeros((300, 400))).ravel()
    assert kstest(noise, laplace(scale=scale).cdf).pvalue > 1e-3
    assert kstest(noise, laplace(scale=1.05 * scale).cdf).pvalue < 1e-3


def gradient_like() -> dict[str, Tensor]:
    """Tensors of different sizes and heavy tails, as gradients have."""
    generator = seeded(5)
    scales = {"a": 1e-2, "b": 1.0, "c": 10.0}
    return {
        name: scale * torch.randn(60, 70, generator=generator, dtype=torch.float64) ** 3
        for name, scale in scales.items()
    }


@pytest.mark.parametrize("name", ["none", "prune", "topk", "clip:bound=3", "clip:bound=1e9"])
def test_what_leaves_nothing_to_chance_is_foreseen(name: str) -> None:
    private, one = gradient_like(), defense(name)
    shared = one(private, seeded(0))
    expected = one.foreseen(private, shared)
    for key, gradient in shared.items():
        torch.testing.assert_close(expected[key], gradient, rtol=1e-12, atol=0)
        assert not one.doubt(shared, 1)[key].any()


@pytest.mark.parametrize("name", ["noise", "laplace", "fp16", "bf16", "int8"])
def test_the_doubt_is_as_large_as_what_chance_and_rounding_do(name: str) -> None:
    private, one = gradient_like(), defense(name)
    shared = one(private, seeded(0))
    expected, doubt = one.foreseen(private, shared), one.doubt(shared, 1)
    for key, gradient in shared.items():
        off = (expected[key] - gradient) / doubt[key]
        assert 0.8 < float(off.square().mean().sqrt()) < 1.2


@pytest.mark.parametrize("name", NAMES)
def test_foresight_can_be_differentiated(name: str) -> None:
    private, one = gradient_like(), defense(name)
    shared = one(private, seeded(0))
    ours = {key: (0.7 * gradient + 0.1).requires_grad_() for key, gradient in private.items()}
    total = torch.stack([value.square().sum() for value in one.foreseen(ours, shared).values()]).sum()
    slopes = torch.autograd.grad(total, list(ours.values()))
    assert all(slope.isfinite().all() for slope in slopes)
    assert any(slope.any() for slope in slopes)


def test_of_what_was_pruned_it_is_known_how_large_it_was_at_most() -> None:
    one, private = defense("prune:share=0.5"), {"a": torch.tensor([1.0, -4.0, 3.0, 2.0])}
    shared = one(private, seeded(0))
    assert shared["a"].tolist() == [0, -4, 3, 0]
    ours = {"a": torch.tensor([2.5, -1.0, 7.0, -5.0])}
    assert one.foreseen(ours, shared)["a"].tolist() == [0, -1, 7, -2]
