"""What L-BFGS remembers of many problems at once, and the directions that follow from it.

The compact representation of Byrd, Nocedal and Schnabel 1994, "Representations of quasi-Newton matrices
and their use in limited memory methods", theorem 2.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHRINK = 1e-5
"""Of steepest descent's step where it climbs, and did when it was ten thousand times shorter."""


Spans = list[tuple[slice, slice]]
"""Where consecutive rows are, among the rows asked for and among all."""


class History:
    """The last ``size`` pairs (s, y) of every row, and the product of H with a gradient.

    The pairs are a ring buffer, and so are the small matrices, in the same order of slots.  Instead
    of R (theorem 2.2) its inverse is kept: a new pair adds a column to it and the oldest leaves by
    its row and column, so no triangular system has to be solved.  Slots not yet used are zero, and
    those that no row uses yet are not read.
    """

    def __init__(self, size: int, tolerance: float, like: Tensor) -> None:
        rows, numbers = like.shape
        small = like.new_zeros((), dtype=torch.float64)
        self.size = size
        self.tolerance = tolerance
        self.used = 0  # slots, from the first on, that some row has used
        self.pairs = like.new_zeros(rows, size, 2, numbers)  # s and y
        self.inverse = small.new_zeros(rows, size, size)  # R^-1, transposed
        self.products = small.new_zeros(rows, size, 2)  # of every pair with the gradient seen last
        self.yy = small.new_zeros(rows, size, size)
        self.curvature = small.new_zeros(rows, size)  # the diagonal of R: s.y of every pair
        self.scale = small.new_ones(rows, 1)  # gamma: H's first guess is gamma times the identity
        self.slots = torch.zeros(rows, dtype=torch.long, device=like.device)  # where the next pair goes

    def directions(self, rows: Tensor, s: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
        """``-H gradient`` of ``rows``, ascending indices, after their new pairs; all ``(row, number)``."""
        sy, spans = (s * y).sum(1).double(), _spans(rows.tolist())
        new = (sy > self.tolerance).nonzero().squeeze(1)
        kept, slots = rows[new], self.slots[rows[new]]
        self.pairs[kept, slots] = torch.stack([s[new], y[new]], 1)
        self.used = max([self.used, *(slots + 1).tolist()])
        pairs = self.pairs[:, : self.used].flatten(1, 2)
        products = _times(gradient, pairs.mT, spans).double().view(len(rows), self.used, 2)
        if len(kept) > 0:
            self._extend(rows, new, spans, products, sy[new], (y[new] * y[new]).sum(1).double())
        self.products[rows, : self.used] = products
        scale = self.scale[rows]
        weights = self._weights(rows, spans, scale, *products.unbind(2)).flatten(1).to(gradient)
        return _times(weights, pairs, spans).addcmul_(scale.to(gradient), gradient, value=-1)

    def forget(self, row: int) -> None:
        """Drop the pairs of ``row`` but for the scale that they gave, or, if there are none, shrink that."""
        if not self.curvature[row].any():
            self.scale[row] *= SHRINK
        for part in (self.pairs, self.inverse, self.products, self.yy, self.curvature, self.slots):
            part[row] = 0

    def _extend(
        self, rows: Tensor, new: Tensor, spans: Spans, products: Tensor, sy: Tensor, yy: Tensor
    ) -> None:
        """Put the newest pairs, of ``rows[new]``, into the small matrices.

        ``products`` are those of all pairs with the gradients; less the last ones, those with y.
        """
        kept, used = rows[new], self.used
        slots = self.slots[kept]
        change = products - self.products[rows, :used]
        change[new, slots] = torch.stack([sy, yy], 1)
        self.inverse[kept, slots], self.inverse[kept, :, slots] = 0.0, 0.0  # the oldest pair leaves
        column = _times(change[..., 0], self.inverse[:, :used, :used], spans)[new] / -sy[:, None]
        column[range(len(new)), slots] = 1 / sy
        self.inverse[kept, slots, :used] = column
        self.yy[kept, slots, :used] = self.yy[kept, :used, slots] = change[new, :, 1]
        self.curvature[kept, slots] = sy
        self.scale[kept, 0] = sy / yy
        self.slots[kept] = (slots + 1) % self.size

    def _weights(self, rows: Tensor, spans: Spans, scale: Tensor, sg: Tensor, yg: Tensor) -> Tensor:
        """Of every s and y in the direction, ``(row, slot, 2)``: theorem 2.2, read from right to left.

        ``sg`` and ``yg`` are their products with the gradient.
        """
        inverse, yy = (matrix[:, : self.used, : self.used] for matrix in (self.inverse, self.yy))
        u = _times(sg, inverse, spans)
        v = _times(u, yy, spans).sub_(yg).mul_(scale).addcmul_(self.curvature[rows, : self.used], u)
        return torch.stack([-_times(v, inverse.mT, spans), scale * u], 2)


def _spans(rows: list[int]) -> Spans:
    """Consecutive ``rows``, as slices of themselves and of the whole."""
    starts = [i for i, row in enumerate(rows) if i == 0 or rows[i - 1] + 1 != row]
    ends = [*starts[1:], len(rows)]
    return [(slice(i, j), slice(rows[i], rows[i] + j - i)) for i, j in zip(starts, ends, strict=True)]


def _times(vectors: Tensor, matrices: Tensor, spans: Spans) -> Tensor:
    """A vector ``(i,)`` each times the matrix ``(i, j)`` of its row: views of the rows, no copies."""
    return torch.cat([torch.bmm(vectors[there, None], matrices[here])[:, 0] for there, here in spans])
