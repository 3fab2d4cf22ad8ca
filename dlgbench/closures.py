"""The objectives of many cases and their gradients in one call: batched, eager or compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from dlgbench.leak import Leak
from dlgbench.prefixes import prefixed

Objective = Callable[[Tensor, Tensor, Leak], Tensor]
"""Of one case: images ``(image, channel, height, width)``, labels' logits ``(image, class)`` → scalar."""
TOLERANCE = 0.01
"""The relative distance of compiled from eager values that is put down to rounding."""
WIDTH = {"cpu": 2, "cuda": 256}
"""How many cases of one or two images of 32 px a call takes, by device.  On a CPU core more gain little
(LeNet: 0.30, not 0.32 ms a case), and the fewer, the fewer calls are filled up with what nobody wants."""
EAGER = {"cpu": 16}
"""How many an eager call takes at least, where it takes several: they share what every operation costs
(LeNet: 1.4, not 3.1 ms a case)."""
READS = 8
"""What inductor makes of so many tensors it works out anew for all who need it, where by itself it keeps what
it makes of five: a DenseNet of 18 layers takes 127, not 142 MB, and no longer."""


class Miscompiled(RuntimeError):
    """Compiled code whose values are wrong."""


class Values(NamedTuple):
    """The objectives of some cases, ``(case,)``, and their gradients in the dummies, shaped like these."""

    objective: Tensor
    images: Tensor
    labels: Tensor


class Closure:
    """Evaluates ``objective`` and its gradient for many cases.

    It starts eager, with at most ``eager_width`` cases in one call.  After `load` it is compiled code,
    whose every call takes exactly ``width``: `rounded` says how many to give it.
    """

    def __init__(self, objective: Objective, width: int = 1, eager_width: int | None = None) -> None:
        self.width, self.eager_width = width, eager_width or width
        self._objective = objective
        self._compiled: Callable[[list[Tensor]], Sequence[Tensor]] | None = None
        self._split: tuple[Leak, list[Any]] | None = None

    @property
    def together(self) -> int:
        """How many cases one call takes."""
        return self.eager_width if self._compiled is None else self.width

    @property
    def facts(self) -> dict[str, Any]:
        """How it evaluates, for the records: results depend on it by rounding."""
        return {"closure": "compiled" if self._compiled else "eager", "closure_width": self.together}

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor, leak: Leak) -> Values:
        """All arguments have a leading ``case`` dimension; nothing of the result can be differentiated."""
        leaks = self._parts(leak, len(images))
        some = self.together
        calls = zip(torch.split(images, some), torch.split(labels, some), leaks, strict=True)
        parts = [self._call(*call) for call in calls]
        return Values(*map(torch.cat, zip(*parts, strict=True)))

    @property
    def threads(self) -> int:
        """For how many threads it is compiled on a CPU: the kernels of small networks end before a second
        has woken up."""
        return 1 if self.width > 1 else torch.get_num_threads()

    def rounded(self, cases: int) -> int:
        """How many cases to give a call of which ``cases`` are wanted."""
        return -(-cases // self.width) * self.width if self._compiled else cases

    def arranged(self, leak: Leak) -> Leak:
        """``leak`` in the order of memory that calls take: copies only what compiled code has in another."""
        return leak if self._compiled is None else self._ordered(leak)

    def trace(self, images: Tensor, labels: Tensor, leak: Leak) -> fx.GraphModule:
        """The evaluation of ``width`` cases such as these as one graph of all tensors in their order.

        Second derivatives included, it holds no autograd, and nothing that nobody uses.
        """
        shape = tree_flatten((images, labels, leak))[1]
        flat = self.flat(images, labels, leak)
        graph = make_fx(lambda *flat: self._eager(*tree_unflatten(list(flat), shape)))(*flat)
        graph.graph.eliminate_dead_code()
        prefixed(graph.graph)
        graph.recompile()
        return graph

    def compile(self, path: Path, images: Tensor, labels: Tensor, leak: Leak) -> None:
        """Compile for ``width`` cases such as these into the file ``path``; raises whatever goes wrong."""
        flat = self.flat(images, labels, leak)
        exported = torch.export.export(self.trace(images, labels, leak), tuple(flat))
        options = {"cpp.threads": self.threads, "realize_reads_threshold": READS}
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=options)

    @torch.no_grad()
    def load(self, path: Path, images: Tensor, labels: Tensor, leak: Leak) -> None:
        """Use what `compile` has left in ``path``; raises `Miscompiled` where it errs.

        It is asked twice: code that reads what nobody has written answers differently.
        """
        compiled = torch._inductor.aoti_load_package(str(path)).loader.boxed_run  # its own call reads the
        flat = self.flat(images, labels, leak)  # signature anew each time, a sixth of a LeNet's
        truth = self._eager(images, labels, leak)
        for ours in (compiled([*flat]), compiled([*flat])):
            for value, true in zip(ours, truth, strict=True):
                if not (value - true).norm() <= TOLERANCE * true.norm():
                    raise Miscompiled(f"{path.name}: its values are not those of the eager closure")
        self._compiled, self._split = compiled, None

    def flat(self, images: Tensor, labels: Tensor, leak: Leak) -> list[Tensor]:
        """All tensors in their order, each with the strides that compiled code takes for granted: it checks
        none, and reads other numbers, or past the end, where they differ."""
        return tree_flatten((images.contiguous(), labels.contiguous(), self._ordered(leak)))[0]

    def _parts(self, leak: Leak, cases: int) -> list[Any]:
        """What every call is given of the leak, made anew only where it is not that of the last time."""
        if self._split is None or self._split[0] is not leak:
            some = self.together
            leaks = [leak.rows(slice(i, i + some)) for i in range(0, cases, some)]
            compiled = self._compiled is not None
            self._split = leak, [tree_flatten(self._ordered(one))[0] for one in leaks] if compiled else leaks
        return self._split[1]

    def _call(self, images: Tensor, labels: Tensor, leak: Any) -> Sequence[Tensor]:
        if self._compiled is None:
            return self._eager(images, labels, leak)
        return self._compiled([images.contiguous(), labels.contiguous(), *leak])

    def _ordered(self, leak: Leak) -> Leak:
        """As code is compiled for it.  Eager, oneDNN's convolutions gain less by it than all else loses."""
        return leak.channels_last if self.width == 1 else leak.contiguous

    def _eager(self, images: Tensor, labels: Tensor, leak: Leak) -> tuple[Tensor, Tensor, Tensor]:
        if len(images) == 1:  # torch.func takes twice as long, and vmap makes grouped convolutions of all
            dummies = images[0].detach().requires_grad_(), labels[0].detach().requires_grad_()
            with torch.enable_grad():
                value = self._objective(*dummies, leak.row(0))
            image, label = torch.autograd.grad(value, dummies, materialize_grads=True)
            return value.detach()[None], image[None], label[None]
        both = torch.func.grad_and_value(self._objective, argnums=(0, 1))
        gradients, values = torch.func.vmap(both)(images, labels, leak)
        return values, *gradients


def width_for(pixels: int, device: torch.device) -> int:
    """How many cases one call takes whose private images have so many pixels together."""
    most = WIDTH.get(device.type, 1)
    return max(1, min(most, 2 * most * 32**2 // pixels))


def eager_width_for(pixels: int, device: torch.device) -> int:
    """How many cases an eager call takes at most, where a compiled one takes `width_for`."""
    width = width_for(pixels, device)
    return width if width == 1 else max(width, EAGER.get(device.type, 1))
