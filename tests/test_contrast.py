"""The guess of how much contrast images have."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlgbench import contrast

MIDDLE = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(-1, 1, 1)


def noise(seed: int, cases: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(cases, 1, 3, 64, 64, generator=generator, dtype=torch.float64)


@given(st.integers(0, 2**31), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=3))
@settings(max_examples=20, deadline=None)
def test_each_case_fills_the_range_whatever_contrast_it_had(seed: int, had: list[float]) -> None:
    found = noise(seed, len(had))
    deviations = torch.tensor(had, dtype=torch.float64).view(-1, 1, 1, 1, 1) * found
    images = MIDDLE + contrast.most(deviations, MIDDLE) * deviations
    torch.testing.assert_close(images, MIDDLE + contrast.most(found, MIDDLE) * found)
    outside = ((images < 0) | (images > 1)).double().mean((1, 2, 3, 4))
    torch.testing.assert_close(outside, torch.full_like(outside, contrast.CLIPPED), atol=2e-4, rtol=0)


def test_where_nothing_deviates_there_is_nothing_to_multiply() -> None:
    deviations = noise(0, 2)
    deviations[0] = 0
    factor = contrast.most(deviations, MIDDLE).flatten()
    assert float(factor[0]) == 1
    assert float(factor[1]) == pytest.approx(float(contrast.most(deviations[1:], MIDDLE)))
