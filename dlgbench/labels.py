"""The private labels, from the gradient of the last linear layer: before anything is optimised.

With cross entropy and one-hot labels, the gradient of that layer's bias is the batch's mean of
``p - y``, the predicted probabilities less the labels (Zhao, Mopuri, Bilen 2020, "iDLG", equation 3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dlgbench.leak import Leak, inputs
from dlgbench.prepare import Network

CERTAIN = 1e4
"""Logits of 0 and less this are exactly 1 and 0 after a softmax, in float32 and float64."""
LENGTHS = torch.logspace(-1.5, 0.2, 35)
"""What the norm of ``p - y``, meaned over a batch, may be: it is at most the root of 2."""
MARGIN = 0.1
"""Chosen on batches of 2 to 8 on both LeNets: with less, noise and ReLU pass for a factor."""
MULTIPLE = 0.02
"""How far, relatively, a class' factor may be from the others', and how far from 1 it has to be: in bfloat16
entries are rounded by up to 0.004."""
DISTURBED = 0.02
"""How much of its entries' magnitudes a sum over the classes may keep: rounded to int8 it is up to 0.009."""


def logits(indices: Tensor, classes: int) -> Tensor:
    """Logits ``(image, class)`` whose softmax is exactly one-hot at ``indices``, ``(image,)``."""
    return CERTAIN * (F.one_hot(indices, classes) - 1)


def recover(network: Network, leak: Leak, grey: Tensor) -> Tensor:
    """The labels of one case's private batch in ascending order, ``(image,)``.

    ``grey`` are images of the batch's shape without content.  For one image the label is the entry of
    the bias' gradient that is negative (iDLG, equation 3), for several the `counts` that explain it.
    """
    predicted, slopes = head(network, leak, grey)
    if len(grey) == 1:
        return slopes.argmin()[None]
    classes = torch.arange(len(slopes), device=grey.device)
    return classes.repeat_interleave(counts(predicted, slopes, len(grey)))


def counts(predicted: Tensor, slopes: Tensor, images: int) -> Tensor:
    """How many images of each class explain the bias' gradient as ``p - counts / images``, ``(class,)``.

    A defence that clips, like a client that takes several steps, multiplies the gradient by a factor: of
    the counts for any of `LENGTHS`, those with the highest cosine similarity are taken, unless those
    for the length that it has come within `MARGIN`.
    """
    factors = torch.cat((torch.ones(1).to(slopes), slopes.norm() / LENGTHS.to(slopes)))[:, None]
    found = _whole(images * (predicted - slopes / factors), images)
    cosine = F.cosine_similarity(predicted - found / images, slopes[None])
    best = int(cosine.argmax())
    return found[best if cosine[best] > cosine[0] + MARGIN else 0].long()


def factor(network: Network, leak: Leak) -> float:
    """By what the gradient of one image has been multiplied, as by clipping; 1 where nothing tells.

    Of every absent class the head's bias has the prediction as its gradient, and the prediction is that
    of the feature that the head's rows tell, which is the same whatever they were multiplied by.
    """
    weight, bias = (f"{network.head}.{name}" for name in ("weight", "bias"))
    if not {weight, bias} <= leak.gradients.keys() or len(leak.gradients[bias]) < 3:
        return 1.0
    slopes = leak.gradients[bias].double() / network.heads[0]
    absent = torch.arange(len(slopes), device=slopes.device) != slopes.argmin()
    feature = leak.gradients[weight].double()[absent].sum(0) / leak.gradients[bias].double()[absent].sum()
    predicted = F.linear(feature, leak.weights[weight].double(), leak.weights[bias].double()).softmax(0)
    ratios = (slopes / predicted)[absent]
    found = ratios.median()
    multiple = ((ratios - found).abs() < MULTIPLE * found).all()
    return float(found) if multiple and (found - 1).abs() > MULTIPLE else 1.0


def _whole(lacking: Tensor, images: int) -> Tensor:
    """The class that the batch still lacks most, again and again: ``(row, class)`` whole numbers."""
    found = torch.zeros_like(lacking)
    for _ in range(images):
        found += F.one_hot((lacking - found).argmax(1), lacking.shape[1])
    return found


def head(network: Network, leak: Leak, grey: Tensor) -> tuple[Tensor, Tensor]:
    """The head's mean prediction and its bias' mean gradient, both ``(class,)``.

    Over the classes the head's gradient sums to zero, whatever the images.  Where it does, the bias'
    gradient is what it is, and the prediction that of the mean private feature, read off the rows of
    classes that are not in the batch (Ma et al. 2023, "Instance-wise Batch Label Restoration via
    Gradients", section 4).  Where it does not, a defence has changed its entries, and where the bias'
    is missing, all of the gradient is projected onto what enters the head for a grey image.
    """
    state, told = leak.weights | leak.buffers, leak.gradients.get(f"{network.head}.bias")
    weight, bias = state[f"{network.head}.weight"], state.get(f"{network.head}.bias")
    rows = leak.gradients[f"{network.head}.weight"] / network.heads[0]
    slopes = torch.zeros_like(rows[:, 0]) if told is None else told / network.heads[0]
    feature = inputs(network, leak.weights, leak.buffers, grey, [network.head])[network.head].mean(0)
    if told is None and len(grey) == 1:
        feature = _only(rows, feature)
    if slopes.any() and rows.sum(0).norm() <= DISTURBED * rows.abs().sum(0).norm():
        absent = slopes > 0
        feature = torch.where(rows.any(0), rows[absent].sum(0) / slopes[absent].sum(), feature)
    else:
        slopes = (rows @ feature + slopes) / (feature.square().sum() + (told is not None))
    return F.linear(feature, weight, bias).softmax(0).nan_to_num(), slopes.nan_to_num()


def _only(rows: Tensor, like: Tensor) -> Tensor:
    """The direction of one image's feature, of which all rows are multiples, whatever its signs.

    Most of them are of absent classes, by p > 0; of two classes it is the one that is more ``like``.
    """
    along = rows.T @ (rows @ rows[rows.norm(dim=1).argmax()])
    most = (rows @ along).sign().sum().sign()
    return torch.where(most == 0, (along @ like).sign(), most) * along
