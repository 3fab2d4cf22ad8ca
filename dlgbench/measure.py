"""Measurements of this package's engine beside a textbook loop, in one process, alternating."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dlgbench import trial
from dlgbench.attacks.base import Attack
from dlgbench.benchmarks.textbook import Textbook, model
from dlgbench.callbacks import Guard, Judge, Progress
from dlgbench.case import Case
from dlgbench.closures import width_for
from dlgbench.compiler import Compiler
from dlgbench.leak import Leak
from dlgbench.optim import LBFGS
from dlgbench.registry import ATTACKS, DATASETS, DEFENSES, NETWORKS
from dlgbench.victims import leak_of, network_of, secret_of

CPU = torch.device("cpu")
Row = dict[str, Any]
Table = list[Row]


def case(
    network: str, resolution: int | None = None, image: int = 0, seed: int = 0, steps: int = 300
) -> Case:
    """The study's case of a network, known dropout masks included, at its own or another resolution."""
    facts = NETWORKS.entry(network).facts
    spec = NETWORKS.spec(f"{network}:dropout=known" if network == "inception_v3" else network)
    return Case(
        network=spec, dataset=DATASETS.spec("photos"), attack=ATTACKS.spec("dlg"),
        defense=DEFENSES.spec("none"), batch=facts["batch"], resolution=resolution or facts["resolution"],
        preparation=facts["preparation"] or "fit", channels=3, classes=facts["classes"] or 100,
        steps=steps, dtype="float32", image=image, seed=seed,
    )  # fmt: skip


def prepared(cases: Sequence[Case]) -> tuple[Attack, Leak]:
    """The attack on some cases, and what leaked of them."""
    photos = DATASETS.make(cases[0].dataset, None)
    networks = [network_of(one) for one in cases]
    return trial.prepared(cases, networks, [secret_of(one, photos) for one in cases], CPU)


def textbook(one: Case) -> Textbook:
    """The same case, to be attacked from the same start, for the textbook loop."""
    network, secret = network_of(one), secret_of(one, DATASETS.make(one.dataset, None))
    leak = leak_of(one, network, secret)
    attack = trial.attack_on([one], network)
    body = model(one.network.name, list(network.parameters()))
    gradient = [leak.gradients[name][0] for name, _ in network.named_parameters()]
    return Textbook(body, gradient, attack.dummy_images.detach()[0], attack.dummy_labels.detach()[0])


def gemm_rate() -> float:
    """GFLOP/s of the best of several square float32 matrix products."""
    rates = []
    for side in (1024, 2048, 4096):
        a = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
        rates.append(2 * side**3 / min(alternating([partial(torch.mm, a, a)], 5)[0]) / 1e9)
    return max(rates)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use so many threads, as a run would that evaluates such a closure."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def alternating(functions: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Seconds of every call, after one of each to warm up, the functions in turn."""
    seconds: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, found in zip(functions, seconds, strict=True):
            started = time.perf_counter()
            function()
            if repeat:
                found.append(time.perf_counter() - started)
    return seconds


def closures(networks: Sequence[str], repeats: int, compiler: Compiler) -> Iterator[Row]:
    """One closure of every network, per case: the textbook's against ours."""
    return (_closure(network, repeats, compiler) for network in networks)


def _closure(network: str, repeats: int, compiler: Compiler) -> Row:
    width, attack, example = subject(network)
    book = textbook(case(network))
    with FlopCounterMode(display=False) as counter:
        book.closure()
    flops, eager = counter.get_total_flops(), attack.closure(*example)

    def call() -> object:
        with threads(attack.closure.threads):
            return attack.closure(*example)

    with threads(attack.closure.threads):
        rate = gemm_rate()
    (plain,) = alternating([call], repeats)
    figures = compiler.prepare(attack.closure, trial.identity(case(network)), example, 0)
    seconds = alternating([book.closure, call], repeats)
    theirs, ours = median(seconds[0]), median(seconds[1]) / width
    taken = figures.get("compile_seconds") or figures.get("compiled_earlier_in_seconds", float("nan"))
    compiled = attack.closure(*example)
    return {
        "network": network, "cases a call": width, "threads": attack.closure.threads,
        "textbook ms": 1e3 * theirs, "eager ms": 1e3 * median(plain) / width, "ours ms": 1e3 * ours,
        "ratio": median(a / b * width for a, b in zip(*seconds, strict=True)),
        "GFLOP": flops / 1e9, "GFLOP/s": flops / ours / 1e9, "of GEMM": flops / ours / 1e9 / rate,
        "GEMM GFLOP/s": rate, "compile s": taken, "repaid after": taken / (theirs - ours),
        "closure": attack.closure.facts["closure"], "differs by": _difference(compiled.images, eager.images),
    }  # fmt: skip


def subject(network: str) -> tuple[int, Attack, tuple[Tensor, Tensor, Leak]]:
    """As many of its cases as a call takes, under attack, and what their closure is called with."""
    one = case(network)
    width = width_for(one.batch * one.resolution**2, CPU)
    attack, leak = prepared([case(network, seed=seed) for seed in range(width)])
    return width, attack, attack.example(leak)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def shares(network: str, cases: int, steps: int, compiler: Compiler) -> Row:
    """Where a run's time goes: the closures, L-BFGS, and all the rest (Lightning, metrics, logging)."""
    batch = [case(network, image=i % 5, seed=i // 5, steps=steps) for i in range(cases)]
    attack, leak = prepared(batch)
    compiler.prepare(attack.closure, trial.identity(case(network)), attack.example(leak), 0)
    photos = DATASETS.make(batch[0].dataset, None)
    judge = Judge([secret_of(one, photos) for one in batch], steps)
    clock = _Clock(attack)
    callbacks = [judge, Guard(cases, float("inf")), Progress(judge, lambda *progress: None)]
    trainer = trial.trainer_on("cpu", callbacks)
    with threads(attack.closure.threads):
        started = time.perf_counter()
        trainer.fit(attack, trial.Frozen(attack.closure.arranged(leak), steps))
        total = time.perf_counter() - started
    optimiser = clock.seconds["step"] - clock.seconds["training_step"]
    return {
        "network": network, "cases": cases, "steps": steps, "seconds": total,
        "closures": clock.seconds["closure"] / total, "L-BFGS": optimiser / total,
        "rest": 1 - (clock.seconds["closure"] + optimiser) / total,
    }  # fmt: skip


class _Clock:
    """Adds up the seconds spent in an attack's closure, in all of its training steps, and in L-BFGS."""

    def __init__(self, attack: Attack) -> None:
        self.seconds = dict.fromkeys(("closure", "training_step", "step"), 0.0)
        configure = attack.configure_optimizers

        def optimizer() -> LBFGS:
            made = configure()
            assert isinstance(made, LBFGS)
            step = made.step
            made.step = self.timed(  # type: ignore[method-assign]
                lambda closure: step(self.timed(closure, "training_step")), "step"
            )
            return made

        attack.configure_optimizers = optimizer  # type: ignore[method-assign]
        attack.evaluate = self.timed(attack.evaluate, "closure")  # type: ignore[method-assign]

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[name] += time.perf_counter() - started

        return call
