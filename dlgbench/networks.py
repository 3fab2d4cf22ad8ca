"""The networks under attack: one function each, taking pixels in [0, 1] to logits.

A factory receives the shape of the images, ``(image, channel, height, width)``, and the number of
classes.  Its weights are drawn from torch's default generator, which `build` seeds in a fork.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torchvision
from torch import nn

from dlgbench.batchnorm import BatchNorm2d, SharedBatchNorm2d
from dlgbench.convolution import suited
from dlgbench.errors import Unsuitable
from dlgbench.prepare import Network, initialise, probe, replace_activation, swap
from dlgbench.registry import NETWORKS, Spec
from dlgbench.stochastic import Dropout

Activation = Literal["sigmoid", "relu", "tanh", "softplus", "silu", "gelu"]
BatchNorm = Literal["train", "eval", "shared"]
"""``shared``: train mode, of a client that shares its batch's statistics with the gradient."""
DropoutMode = Literal["fresh", "known", "off"]
Shape = tuple[int, int, int, int]
Protect = Callable[[Network, Shape], Network]
NORMS: dict[str, Callable[[nn.BatchNorm2d], nn.Module]] = {
    "train": BatchNorm2d, "shared": SharedBatchNorm2d, "eval": nn.BatchNorm2d.eval,
}  # fmt: skip
"""In train mode batch statistics only: there are no running ones to update or to leak."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build(
    spec: Spec,
    shape: Shape,
    classes: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    protect: Protect = lambda network, shape: network,
) -> Network:
    """The network of ``spec`` as ``protect`` changes it, with weights that depend on ``seed`` alone.

    Raises `Unsuitable` where the network cannot take images of this shape.
    """
    with torch.random.fork_rng(devices=[]):  # torchvision's constructors take no generator
        torch.default_generator.manual_seed(seed)
        network: Network = protect(NETWORKS.make(spec, shape, classes), shape)
    return network.to(dtype).requires_grad_(False)


def check(spec: Spec, shape: Shape, classes: int, protect: Protect) -> None:
    """Raise what `build` would raise, without its memory and time."""
    with torch.device("meta"):
        protect(NETWORKS.make(spec, shape, classes), shape)


@NETWORKS.register(
    "lenet5", resolution=32, preparation="fit", batch=1, channels=None, classes=10, closure_seconds=0.003
)
def lenet5(
    shape: Shape, classes: int, *, activation: Activation = "sigmoid", init: str = "default"
) -> Network:
    """LeNet-5 (LeCun et al. 1998): 6 and 16 kernels of 5x5, average pooling, 120 and 84 units."""
    side = ((shape[-1] - 4) // 2 - 4) // 2
    if side < 1:
        raise Unsuitable(f"lenet5 needs images of at least 16 px, got {shape[-1]}")
    body = nn.Sequential(
        nn.Conv2d(shape[1], 6, 5), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(16 * side * side, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes),
    )  # fmt: skip
    return _small(body, shape, activation, init)


@NETWORKS.register(
    "lenet_dlg", resolution=32, preparation="fit", batch=1, channels=None, classes=100, closure_seconds=0.003
)
def lenet_dlg(
    shape: Shape, classes: int, *, activation: Activation = "sigmoid", init: str = "uniform:0.5"
) -> Network:
    """The "LeNet" of Zhu et al. 2019: three 5x5 convolutions of 12 channels and one linear layer."""
    side = -(-shape[-1] // 4)
    body = nn.Sequential(
        nn.Conv2d(shape[1], 12, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(12, 12, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(12, 12, 5, stride=1, padding=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(12 * side * side, classes),
    )  # fmt: skip
    return _small(body, shape, activation, init)


@NETWORKS.register(
    "resnet18", resolution=224, preparation="crop", batch=1, channels=3, classes=1000, closure_seconds=0.42
)
def resnet18(
    shape: Shape,
    classes: int,
    *,
    activation: Activation = "sigmoid",
    init: str = "default",
    batchnorm: BatchNorm = "train",
) -> Network:
    """ResNet-18 (He et al. 2016) of torchvision."""
    body = torchvision.models.resnet18(weights=None, num_classes=classes)
    return _torchvision("resnet18", body, shape, activation, init, batchnorm)


@NETWORKS.register(
    "densenet121", resolution=224, preparation="crop", batch=1, channels=3, classes=1000, closure_seconds=1.1
)
def densenet121(
    shape: Shape,
    classes: int,
    *,
    activation: Activation = "sigmoid",
    init: str = "default",
    batchnorm: BatchNorm = "train",
) -> Network:
    """DenseNet-121 (Huang et al. 2017) of torchvision."""
    body = torchvision.models.densenet121(weights=None, num_classes=classes)
    return _torchvision("densenet121", body, shape, activation, init, batchnorm)


@NETWORKS.register(
    "mobilenet_v2", resolution=224, preparation="crop", batch=1, channels=3, classes=1000, closure_seconds=1.0
)
def mobilenet_v2(
    shape: Shape,
    classes: int,
    *,
    activation: Activation = "sigmoid",
    init: str = "default",
    batchnorm: BatchNorm = "train",
    dropout: DropoutMode = "fresh",
) -> Network:
    """MobileNetV2 (Sandler et al. 2018) of torchvision, with ReLU for its ReLU6."""
    body = torchvision.models.mobilenet_v2(weights=None, num_classes=classes)
    swap(body, nn.ReLU6, lambda layer: nn.ReLU())
    return _torchvision("mobilenet_v2", body, shape, activation, init, batchnorm, dropout)


@NETWORKS.register(
    "inception_v3",
    resolution=299,
    preparation="rescale",
    batch=2,
    channels=3,
    classes=1000,
    closure_seconds=1.8,
)
def inception_v3(
    shape: Shape,
    classes: int,
    *,
    activation: Activation = "sigmoid",
    init: str = "default",
    batchnorm: BatchNorm = "train",
    dropout: DropoutMode = "fresh",
) -> Network:
    """Inception v3 (Szegedy et al. 2016) of torchvision; loss = main head + 0.4 auxiliary head."""
    # transform_input stays off: it is for weights ported from TensorFlow.  0.4 is the weight of
    # torchvision's reference training (references/classification/train.py).
    body = torchvision.models.inception_v3(weights=None, num_classes=classes, init_weights=True)
    return _torchvision("inception_v3", body, shape, activation, init, batchnorm, dropout, heads=(1.0, 0.4))


def _small(body: nn.Module, shape: Shape, activation: Activation, init: str) -> Network:
    network = Network(replace_activation(body, activation))
    initialise(network, init, activation)
    swap(network, nn.Conv2d, suited)
    probe(network, shape)
    return network


def _torchvision(
    name: str,
    body: nn.Module,
    shape: Shape,
    activation: Activation,
    init: str,
    batchnorm: BatchNorm,
    dropout: DropoutMode = "off",
    heads: tuple[float, ...] = (1.0,),
) -> Network:
    body = replace_activation(body.train(), activation)
    swap(body, nn.Dropout, lambda layer: nn.Identity() if dropout == "off" else Dropout(layer.p))
    swap(body, nn.BatchNorm2d, NORMS[batchnorm])
    network = Network(body, IMAGENET_MEAN, IMAGENET_STD, heads, mask_known=dropout == "known")
    initialise(network, init, activation)
    swap(network, nn.Conv2d, suited)
    try:
        probe(network, shape)
    except (RuntimeError, ValueError) as error:
        raise Unsuitable(
            f"{name} (batchnorm={batchnorm}) cannot take {shape[0]} image(s) of {shape[-1]} px: {error}"
        ) from error
    return network
