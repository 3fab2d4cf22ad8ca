"""What follows from a gradient without any search: labels always, an image where layers can be inverted."""

from __future__ import annotations

import torch
from torch import Tensor

from dlgbench.attacks.base import LabelsFirst, Task
from dlgbench.leak import Leak
from dlgbench.peeling import peel
from dlgbench.registry import ATTACKS


@ATTACKS.register(
    "analytic",
    labels="recovered first, by counts",
    priors="smooth and pale where equations are missing",
    steps=1,
    ahead={"default": 0, "network=lenet_dlg": 500, "network.batchnorm=eval": 500},
    revision={
        "default": 2,
        "network.batchnorm=eval,channels=1,batch=1": 6,
        "network.batchnorm=eval": 4,
        "network=lenet_dlg,network.activation=relu,batch=1": 3,
        "network.activation=relu": 2,
        "network=lenet_dlg,network.activation=sigmoid": 2,
        "channels=1,batch=1": 4,
        "resolution=16,batch=1": 4,
    },
)
class Analytic(LabelsFirst):
    """Labels by counts, one image layer by layer in closed form (Zhu and Blaschko 2021, "R-GAP").

    On a residual network in eval mode its layers are read off the gradient, and the images are those that
    they are computed on.  Grey images where neither can be: then it shows what labels alone tell.
    """

    def start(self, task: Task, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Grey."""
        grey = torch.full((task.image, task.channel, task.height, task.width), 0.5)
        return grey, torch.zeros(task.image, task.classes)

    def pixels(self, dummies: Tensor) -> Tensor:
        """The dummies are pixels."""
        return dummies

    def look(self, leak: Leak) -> None:
        super().look(leak)
        for case, image in peel(self.network, leak, self.dummy_images.shape[1:], self.tell):
            self.dummy_images[case] = image

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One that evaluates the objective and stays where it is."""
        return torch.optim.SGD([self.dummy_images], lr=0.0)
