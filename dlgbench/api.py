"""Does this gradient leak my data?  The attacks on a model and a gradient of one's own, from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dlgbench import defenses, provenance, trial
from dlgbench.attacks.base import Attack, Task
from dlgbench.callbacks import Guard
from dlgbench.errors import UsageError
from dlgbench.leak import Leak
from dlgbench.metrics import assign, judged, trivial
from dlgbench.networks import Shape, adapted
from dlgbench.prepare import Network
from dlgbench.registry import ATTACKS

Gradient = Sequence[Tensor] | Mapping[str, Tensor]


class Found(NamedTuple):
    """What a gradient tells of the batch that it is of."""

    images: Tensor
    """Pixels in [0, 1], ``(image, channel, height, width)``, in any order."""
    labels: Tensor
    """Probabilities, ``(image, class)``."""
    relative: float
    """``|g - g*|^2 / |g*|^2`` there: small where the gradient is matched, which the images need not be."""

    def compared(self, private: Tensor) -> list[dict[str, float | str]]:
        """The metrics and the ``outcome`` of every image of ``private``, given in [0, 1].

        Each is held against another one of the found images, those of the least total MSE.
        """
        truth = private.to(self.images)
        return judged(self.images[assign(self.images, truth)], truth, trivial(truth))


def reconstruct(
    model: nn.Module,
    gradient: Gradient,
    shape: Shape,
    *,
    attack: str = "spectral",
    steps: int = 30,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    seed: int = 0,
    accelerator: str = "auto",
    seconds: float = float("inf"),
) -> Found:
    """Attack ``gradient``, which ``model`` gave for a batch of ``shape`` (image, channel, height, width).

    The gradient is of the batch's mean cross entropy, in the order of ``model.parameters()`` or by their
    names, and the model in the mode, train or eval, in which it was taken.  ``mean`` and ``std`` normalise
    pixels in [0, 1] before the model.  ``attack`` is a name with options, as ``dlgbench list`` tells them; it
    ends after ``steps`` or ``seconds``.  Raises UsageError where something does not fit.
    """
    network = adapted(model, shape, mean, std).to(trial.device_of(accelerator))
    leak = _leak(model, gradient, network, shape[0])
    classes = network.get_submodule(network.head).out_features
    assert isinstance(classes, int)
    if "trains" in ATTACKS.entry(ATTACKS.spec(attack).name).facts:
        raise UsageError(f"attack: expected one that attacks, got {attack!r}")
    generators = [torch.Generator().manual_seed(seed)]
    task = Task(*shape, classes, generators, defense=defenses.make("none"))
    made: Attack = ATTACKS.make(ATTACKS.spec(attack), network, task)
    provenance.exact_float32()
    trial.quieten()
    trainer = trial.trainer_on(accelerator, [Guard(1, seconds)])
    trainer.fit(made, trial.Frozen(leak, steps))
    found = made.result
    return Found(found.images[0].clamp(0, 1), found.labels[0], float(found.relative[0]))


def _leak(model: nn.Module, gradient: Gradient, network: Network, images: int) -> Leak:
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    given = dict(gradient if isinstance(gradient, Mapping) else zip(weights, gradient, strict=False))
    if given.keys() != weights.keys() or len(gradient) != len(weights):
        raise UsageError(f"expected a gradient for each of {len(weights)} parameters, got {len(gradient)}")
    for name, weight in weights.items():
        shape = getattr(given[name], "shape", None)  # what is not trained has the gradient None
        if shape != weight.shape:
            told = None if shape is None else tuple(shape)
            raise UsageError(f"gradient of {name}: expected the shape {tuple(weight.shape)}, got {told}")
    drawn = network.draw_masks(images, torch.Generator())
    state = {name: b for name, b in network.named_buffers() if name.startswith("body.") and name not in drawn}
    return Leak(
        {f"body.{name}": weight[None].to(network.mean) for name, weight in weights.items()},
        {name: buffer[None] for name, buffer in state.items()},
        {f"body.{name}": given[name].detach()[None].to(network.mean) for name in weights},
    )
