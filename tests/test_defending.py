"""Defences in an ordinary training run, against a bare loop that applies them by hand."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dlgbench.defenses import make
from dlgbench.defenses.lightning import DefendGradients
from dlgbench.errors import UsageError

Batch = tuple[Tensor, Tensor]
RATE = 0.1


class Regression(pl.LightningModule):
    """Two layers, of which the first is frozen."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.frozen, self.trained = nn.Linear(3, 4), nn.Linear(4, 2)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.frozen.requires_grad_(False)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        return F.mse_loss(self.trained(self.frozen(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), RATE)


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(5, 3, generator=generator), torch.randn(5, 2, generator=generator)) for _ in range(count)
    ]


def trained(some: Iterable[Batch], accumulate: int = 1, **options: object) -> Regression:
    module = Regression()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, accumulate_grad_batches=accumulate, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    trainer.fit(module, DataLoader(list(some), batch_size=None))  # type: ignore[arg-type]
    return module


def by_hand(some: list[Batch], defense: str, seed: int, accumulate: int = 1) -> Regression:
    module, defend, generator = Regression(), make(defense), torch.Generator().manual_seed(seed)
    weights = list(module.trained.parameters())
    for start in range(0, len(some), accumulate):
        loss = sum(module.training_step(batch, 0) for batch in some[start : start + accumulate]) / accumulate
        assert isinstance(loss, Tensor)
        for weight, shared in zip(
            weights, defend(torch.autograd.grad(loss, weights), generator), strict=True
        ):
            weight.data -= RATE * shared
    return module


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("defense", ["noise:std=0.1", "prune:share=0.5", "clip:bound=0.1", "sign"])
def test_a_training_run_meets_the_defence_once_a_step(defense: str, accumulate: int) -> None:
    ours = trained(batches(6), accumulate, callbacks=[DefendGradients(defense, seed=7)])
    theirs = by_hand(batches(6), defense, 7, accumulate)
    for mine, yours in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-5, atol=1e-6)
    plain = trained(batches(6), accumulate)
    assert not torch.allclose(plain.trained.weight, ours.trained.weight, atol=1e-3)
    assert torch.equal(plain.frozen.weight, ours.frozen.weight)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_a_gradient_of_nan_stops_the_run() -> None:
    broken = [(torch.full((5, 3), torch.nan), torch.zeros(5, 2))]
    with pytest.raises(UsageError, match=r"trained.weight.*finite"):
        trained(broken, callbacks=[DefendGradients("prune")])


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")
def test_a_step_that_overflowed_is_left_out_as_without_a_defence() -> None:
    overflow = (torch.full((5, 3), 1e38), torch.zeros(5, 2))
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))
    some = batches(3)
    ours = trained([overflow, *some], callbacks=[DefendGradients("noise:std=0.1", seed=7)], plugins=[scaled])
    theirs = trained(some, callbacks=[DefendGradients("noise:std=0.1", seed=7)])
    torch.testing.assert_close(ours.trained.weight, theirs.trained.weight, rtol=0.02, atol=0.02)


def test_the_draws_go_on_where_a_checkpoint_ended(tmp_path: Path) -> None:
    first, again = DefendGradients("noise", seed=1), DefendGradients("noise", seed=2)
    torch.rand(3, generator=first.generator)
    torch.save(first.state_dict(), tmp_path / "state")
    again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert torch.equal(torch.rand(5, generator=first.generator), torch.rand(5, generator=again.generator))
