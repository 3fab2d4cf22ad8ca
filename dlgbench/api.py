"""Does this gradient leak my data?  The attacks on a model and a gradient of one's own, from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dlgbench import defenses, provenance, trial
from dlgbench.attacks.base import Attack, Task
from dlgbench.callbacks import Guard
from dlgbench.errors import UsageError
from dlgbench.leak import Leak, Tensors
from dlgbench.metrics import assign, judged, trivial
from dlgbench.models import adapted, unwrapped, withhold
from dlgbench.networks import Shape
from dlgbench.prepare import Network
from dlgbench.registry import ATTACKS

Gradient = Sequence[Tensor | None] | Mapping[str, Tensor | None]


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
    heads: Sequence[float] = (1.0,),
    seed: int = 0,
    accelerator: str = "auto",
    seconds: float = float("inf"),
) -> Found:
    """Attack ``gradient``, which ``model`` gave for a batch of ``shape`` (image, channel, height, width).

    The gradient is of the batch's mean cross entropy, in the order of ``model.parameters()`` or by their
    names, None or absent where none is shared, and the model in the mode in which it was taken.  Of one image
    ``spectral`` also takes a positive multiple of it: clipped, or old weights less new ones.  ``mean`` and
    ``std`` normalise pixels in [0, 1] before the model; ``heads`` are the weights of its heads' losses, where
    it gives several tensors of logits.  ``attack`` is a name with options, as ``dlgbench list`` tells them;
    it ends after ``steps`` or ``seconds``.  The model may be compiled, or in one that makes it parallel.
    Raises UsageError where something does not fit.
    """
    shared = _shared(model, gradient)
    network = adapted(unwrapped(model), shape, mean, std, heads)
    withhold(network, shared.keys())
    network = network.to(trial.device_of(accelerator))
    leak = _leak(network, shared, shape[0])
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
    with sdpa_kernel(SDPBackend.MATH):  # the only one whose derivative can be differentiated
        trainer.fit(made, trial.Frozen(leak, steps))
    found = made.result
    return Found(found.images[0].clamp(0, 1), found.labels[0], float(found.relative[0]))


def _shared(model: nn.Module, gradient: Gradient) -> Tensors:
    """The gradient's tensors by the names of the unwrapped parameters; without those that are None."""
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    if isinstance(gradient, Mapping):
        given, fits = dict(gradient), gradient.keys() <= shapes.keys()
    else:
        given, fits = dict(zip(shapes, gradient, strict=False)), len(gradient) == len(shapes)
    if not fits:
        raise UsageError(
            f"expected a gradient, or None, for each of {len(shapes)} parameters, got {len(gradient)}"
        )
    for name, tensor in given.items():
        if tensor is not None and tensor.shape != shapes[name]:
            expected, came = tuple(shapes[name]), tuple(tensor.shape)
            raise UsageError(f"gradient of {name}: expected the shape {expected}, got {came}")
    bare = dict(zip(shapes, dict(unwrapped(model).named_parameters()), strict=True))
    return {bare[name]: tensor.detach() for name, tensor in given.items() if tensor is not None}


def _leak(network: Network, shared: Tensors, images: int) -> Leak:
    drawn = network.draw_masks(images, torch.Generator())
    state = {name: b for name, b in network.named_buffers() if name.startswith("body.") and name not in drawn}
    weights = {name: weight.detach()[None] for name, weight in network.named_parameters()}
    gradients = {name: shared[name.removeprefix("body.")][None].to(network.mean) for name in weights}
    return Leak(weights, {name: buffer[None] for name, buffer in state.items()}, gradients)
