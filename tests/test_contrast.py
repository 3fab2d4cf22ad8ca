"""How much contrast images have: the guess, and what batch norm's epsilon tells."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dlgbench import contrast
from dlgbench.leak import Leak, stack
from dlgbench.prepare import Network
from dlgbench.victims import network_of, secret_of

from .clients import PHOTOS, case, leaked

MIDDLE = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(-1, 1, 1)


def noise(seed: int, cases: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(cases, 1, 3, 64, 64, generator=generator, dtype=torch.float64)


@given(st.integers(0, 2**31), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=3))
@settings(max_examples=20, deadline=None)
def test_each_case_fills_the_range_whatever_contrast_it_had(seed: int, had: list[float]) -> None:
    found = noise(seed, len(had))
    deviations = torch.tensor(had, dtype=torch.float64).view(-1, 1, 1, 1, 1) * found
    images = MIDDLE + contrast.widest(deviations, MIDDLE) * deviations
    torch.testing.assert_close(images, MIDDLE + contrast.widest(found, MIDDLE) * found)
    outside = ((images < 0) | (images > 1)).double().mean((1, 2, 3, 4))
    torch.testing.assert_close(outside, torch.full_like(outside, contrast.CLIPPED), atol=2e-4, rtol=0)


def test_where_nothing_deviates_there_is_nothing_to_multiply() -> None:
    deviations = noise(0, 2)
    deviations[0] = 0
    factor = contrast.widest(deviations, MIDDLE).flatten()
    assert float(factor[0]) == 1
    assert float(factor[1]) == pytest.approx(float(contrast.widest(deviations[1:], MIDDLE)))


def leaky(network: str, size: int, count: int = 2) -> tuple[Network, Leak, Tensor]:
    """A network, what clients with photos share, and these, ``(case, 1, 3, size, size)``."""
    cases = [case(network=network, resolution=size, image=i, dtype="float32") for i in range(count)]
    shared = stack([leaked(one) for one in cases])
    return network_of(cases[0]), shared, torch.cat([secret_of(one, PHOTOS).images for one in cases])


@pytest.mark.parametrize("network", ["resnet18", "mobilenet_v2"])
def test_the_gradient_tells_what_batch_norm_hides(network: str) -> None:
    victim, leak, photos = leaky(network, 64)
    told = contrast.told(victim, leak)
    assert told is not None
    pale = torch.stack([photos[0] - victim.mean, (photos[1] - victim.mean) / 2]) + victim.mean
    factors = told.factor(victim.normalise(pale)).flatten().tolist()
    assert factors == pytest.approx([1.0, 2.0], rel=0.02)


def test_it_does_so_exactly() -> None:
    """In float64 every channel's variance follows, and it is what a client shares that shares them."""
    one = case(network="resnet18:batchnorm=shared", resolution=64)
    shared = leaked(one)
    told = contrast.told(network_of(case(network="resnet18", resolution=64)), shared)
    assert told is not None
    found = told.through / told.along - told.epsilon
    torch.testing.assert_close(found, shared.buffers["body.bn1.batch_var"], rtol=1e-6, atol=0)


def test_what_is_not_found_or_not_there_does_not_mislead() -> None:
    victim, leak, photos = leaky("resnet18", 128, 1)
    told = contrast.told(victim, leak)
    assert told is not None
    blurred = F.avg_pool2d(F.pad(photos[0], (1,) * 4, mode="reflect"), 3, 1)[None]
    noisy = photos + 0.02 * torch.randn(photos.shape, generator=torch.Generator().manual_seed(0))
    for images in (blurred, noisy):
        assert float(told.factor(victim.normalise(images))) == pytest.approx(1.0, abs=0.05)


def test_outliers_beyond_black_and_white_do_not_count() -> None:
    victim, leak, photos = leaky("resnet18", 128, 1)
    told = contrast.told(victim, leak)
    some = torch.rand(photos.shape, generator=torch.Generator().manual_seed(0)) < 0.005
    spoilt = torch.where(some, victim.mean + 8 * (photos - victim.mean), photos)
    ours, theirs = (contrast.likely(each, victim, told, torch.tensor([True])) for each in (spoilt, photos))
    assert float((ours - theirs)[~some].abs().max()) < 0.02


@pytest.mark.parametrize("deviation", [1e-3, 1.0])
def test_a_gradient_that_tells_nothing_leaves_the_guess(deviation: float) -> None:
    victim, leak, photos = leaky("resnet18", 64)
    generator = torch.Generator().manual_seed(0)
    blurred = {
        n: g + deviation * torch.randn(g.shape, generator=generator) for n, g in leak.gradients.items()
    }
    told = contrast.told(victim, leak._replace(gradients=blurred))
    assert told is not None
    assert told.factor(victim.normalise(photos)).flatten().tolist() == pytest.approx([1.0, 1.0], rel=0.05)


def test_a_silent_gradient_and_a_grey_image_leave_it_too() -> None:
    victim, leak, photos = leaky("resnet18", 64, 1)
    silent = leak._replace(gradients={name: torch.zeros_like(g) for name, g in leak.gradients.items()})
    for some, images in ((silent, photos), (leak, victim.mean.expand_as(photos))):
        told = contrast.told(victim, some)
        assert told is not None
        assert float(told.factor(victim.normalise(images))) == 1.0


@pytest.mark.parametrize("network", ["lenet5", "resnet18:batchnorm=eval", "resnet18:batchnorm=shared"])
def test_where_no_norm_hides_it_nothing_is_read(network: str) -> None:
    victim, leak, _ = leaky(network, 64, 1)
    assert contrast.told(victim, leak) is None
