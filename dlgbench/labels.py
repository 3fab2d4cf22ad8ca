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


def logits(indices: Tensor, classes: int) -> Tensor:
    """Logits ``(image, class)`` whose softmax is exactly one-hot at ``indices``, ``(image,)``."""
    return CERTAIN * (F.one_hot(indices, classes) - 1)


def recover(network: Network, leak: Leak, grey: Tensor) -> Tensor:
    """The labels of one case's private batch in ascending order, ``(image,)``.

    ``grey`` are images of the batch's shape without content.  For one image the label is the one
    entry of the bias' gradient that is negative, or where that tells nothing of the sums of the weight
    gradient's rows, where the features are not negative (iDLG, equation 6).  For several, the
    class that the batch still lacks most is taken, again and again, by its expected `counts`.
    """
    lacking = counts(network, leak, grey)
    found = []
    for _ in range(len(grey)):
        found.append(int(lacking.argmax()))
        lacking[found[-1]] -= 1
    return torch.tensor(sorted(found), device=grey.device)


def counts(network: Network, leak: Leak, grey: Tensor) -> Tensor:
    """How many images of each class one case's batch seems to hold, ``(class,)``, not yet whole numbers.

    ``B (p - mean gradient of the bias)`` with the mean prediction p: of the mean private feature,
    read off the rows of classes that are not in the batch (Ma et al. 2023, "Instance-wise Batch
    Label Restoration via Gradients", section 4), or where the bias tells nothing, because there is
    none or a defence has left its gradient out, of a grey image.
    """
    weight, bias = leak.weights[f"{network.head}.weight"], leak.weights.get(f"{network.head}.bias")
    rows = leak.gradients[f"{network.head}.weight"] / network.heads[0]
    slopes = torch.zeros_like(rows[:, 0]) if bias is None else leak.gradients[f"{network.head}.bias"]
    if slopes.any():
        slopes = slopes / network.heads[0]
        absent = slopes > 0
        feature = rows[absent].sum(0) / slopes[absent].sum()
    else:
        feature = inputs(network, leak.weights, leak.buffers, grey, [network.head])[network.head].mean(0)
        slopes = rows.sum(1) / feature.sum()
    predicted = F.linear(feature, weight, bias).softmax(0) if len(grey) > 1 else torch.zeros_like(slopes)
    return (len(grey) * (predicted - slopes)).nan_to_num()
