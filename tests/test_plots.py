"""Plots of synthetic records: what is drawn, from which files, and that nothing else matters."""

from __future__ import annotations

import io
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from dlgbench import plots
from dlgbench.case import Case
from dlgbench.records import Record
from dlgbench.registry import ATTACKS, DEFENSES, NETWORKS, Spec

pytestmark = pytest.mark.filterwarnings("error")
SIDE = 16
Pixels = npt.NDArray[np.uint8]


def record(
    network: str = "lenet_dlg",
    *,
    seed: int = 0,
    mse: list[float | None] | None = None,
    dataset: Spec | None = None,
    batch: int = 1,
    channels: int = 3,
    **values: Any,
) -> Record:
    """A trial of three iterates, exact in the end."""
    trace = [0.3, 0.1, 1e-5] if mse is None else mse
    case = Case(
        network=NETWORKS.spec(network), dataset=dataset or Spec("photos"), attack=ATTACKS.spec("dlg"),
        defense=DEFENSES.spec("none"), batch=batch, resolution=SIDE, preparation="fit", channels=channels,
        classes=10, steps=2, dtype="float32", image=0, seed=seed,
    )  # fmt: skip
    usual: dict[str, Any] = {
        "status": "done", "outcome": "exact", "relative": 1e-9, "history": {"mse": trace},
        "images": ({"psnr": 50.0, "mse": 1e-5, "outcome": "exact"},) * batch,
        "baselines": {"grey": [{"mse": 0.08}] * batch},
    }  # fmt: skip
    return Record(case=case, **(usual | values))


def broken(network: str = "lenet_dlg", *, seed: int = 9) -> Record:
    """A trial of which nothing came: no curve, no metrics, no pictures."""
    return record(network, seed=seed, status="error", outcome="failed", relative=None, history={}, images=(),
                  baselines={}, reason="RuntimeError: no")  # fmt: skip


def arrays(trial: Record, colour: int = 0) -> dict[str, npt.NDArray[Any]]:
    """Pictures of one flat colour each; no two frames, images or trials of other ``colour`` are alike."""
    shape = (trial.case.batch, SIDE, SIDE, trial.case.channels)
    shades = np.arange(5 * trial.case.batch, dtype=np.uint8).reshape(5, -1, 1, 1, 1) * 8 + colour + 20
    flat = np.broadcast_to(shades, (5, *shape)).copy()
    flat[..., 0] += 100  # in RGB: a colour that no text or line of the plot has
    return {"private": flat[:1], "reconstruction": flat[1:2], "evolution": flat[2:], "steps": np.arange(3)}


def keep(folder: Path, trial: Record, colour: int = 0) -> dict[str, npt.NDArray[Any]]:
    folder.mkdir(exist_ok=True)
    found = arrays(trial, colour)
    np.savez_compressed(folder / f"{trial.case.id}.npz", **found)  # type: ignore[arg-type]
    return found


def pixels(path: Path) -> Pixels:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert "Software" not in image.info
        return np.asarray(image.convert("RGB"))


def holds(path: Path, picture: npt.NDArray[Any]) -> int:
    """How many pixels of the plot have the colour of the flat ``picture``; a few may be of its letters."""
    colour = np.broadcast_to(picture, (*picture.shape[:-1], 3)).reshape(-1, 3)[0]
    return int((pixels(path) == colour).all(-1).sum())


def group(*trials: Record) -> plots.Group:
    (found,) = plots.grouped(trials)
    return found


def lines(figure: Figure) -> dict[str, npt.NDArray[Any]]:
    return {str(line.get_label()): np.asarray(line.get_ydata()) for line in figure.axes[-1].lines}


def texts(figure: Figure) -> str:
    legend = figure.axes[-1].get_legend()
    told = [text for axes in figure.axes for text in axes.texts] + (legend.get_texts() if legend else [])
    return "\n".join(text.get_text() for text in told)


@pytest.fixture
def many(tmp_path: Path) -> list[Record]:
    """Networks, statuses, sizes of batch and channels mixed, pictures of most in ``pictures``."""
    trials = [record(seed=seed, relative=10.0**-seed) for seed in range(8)]
    trials += [record("lenet_dlg:activation=relu", seed=1), record("lenet5", channels=1)]
    trials += [record("inception_v3", batch=2), record("lenet5", seed=1, channels=1, outcome="partial")]
    trials += [record(seed=8, status="diverged", outcome="failed", mse=[0.3, None])]
    for trial in trials:
        keep(tmp_path / "pictures", trial)
    return [*trials, broken(), broken("resnet18"), record("densenet121", status="skipped", outcome="failed")]


def test_every_plot_is_there_and_only_pngs(many: list[Record], tmp_path: Path) -> None:
    paths = plots.draw(many, tmp_path / "pictures", tmp_path / "out")
    drawn = ["lenet5", "lenet_dlg", "lenet_dlg-activation-relu", "inception_v3"]
    names = [f"mse_{name}.png" for name in drawn] + ["mse_all.png"]
    names += [f"evolution_{name}.png" for name in drawn] + ["gallery.png"]
    assert [path.name for path in paths] == names
    assert sorted((tmp_path / "out").iterdir()) == sorted(paths)
    assert {pixels(path).shape[1] for path in paths} == {1600}


def test_bytes_do_not_depend_on_order_time_or_settings(many: list[Record], tmp_path: Path) -> None:
    first = plots.draw(many, tmp_path / "pictures", tmp_path / "one")
    random.Random(1).shuffle(many)
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "savefig.dpi": 30}):
        second = plots.draw(many, tmp_path / "pictures", tmp_path / "two")
        assert matplotlib.rcParams["font.size"] == 30
    assert [path.name for path in first] == [path.name for path in second]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True))


def test_nothing_in_nothing_out(tmp_path: Path) -> None:
    assert plots.draw([], tmp_path, tmp_path / "out") == []
    assert plots.draw([record(status="skipped")], tmp_path, tmp_path / "out") == []


def test_only_failures_without_a_curve_are_still_in_the_gallery(tmp_path: Path) -> None:
    (path,) = plots.draw([broken()], tmp_path / "none", tmp_path / "out")
    assert path.name == "gallery.png"
    assert "error" in texts(plots.gallery([group(broken())], tmp_path))


def test_the_median_is_numpys_and_baseline_and_failures_are_told() -> None:
    traces = np.random.default_rng(0).uniform(1e-6, 0.5, (7, 3))
    trials = [record(seed=i, mse=list(trace), baselines={"grey": [{"mse": 0.01 * (i + 1)}]})
              for i, trace in enumerate(traces)]  # fmt: skip
    trials += [record(seed=7, outcome="failed", mse=[0.4, 0.4, 0.4], baselines={}), broken()]
    figure = plots.mse_plot(group(*trials))
    drawn = lines(figure)
    np.testing.assert_allclose(drawn["median of 8"], np.median([*traces, [0.4] * 3], axis=0))
    np.testing.assert_allclose(drawn["mid grey image"], 0.04)
    assert "failed: 2 of 9 (1 error)" in texts(figure)
    assert "trials: 9" in texts(figure)
    assert figure.axes[-1].get_yscale() == "log"


def test_failed_trials_are_muted_and_end_where_they_stopped() -> None:
    trials = [record(), record(seed=1, status="diverged", outcome="failed", mse=[0.4, 0.5])]
    by_colour = {str(line.get_color()): line for line in plots.mse_plot(group(*trials)).axes[-1].lines
                 if str(line.get_label()).startswith("_child") and line.get_linewidth() < 1}  # fmt: skip
    assert np.asarray(by_colour[plots.PALE].get_ydata()).tolist() == [0.4, 0.5]
    assert np.asarray(by_colour[plots.COLOURS[0]].get_ydata()).tolist() == [0.3, 0.1, 1e-5]


def test_a_trial_that_stopped_keeps_its_last_value_and_zero_is_drawn() -> None:
    traces: list[list[float | None]] = [[None, 0.2, None], [0.4, 0.0, 0.1, 0.3], [None]]
    found = plots.curves([record(seed=seed, mse=trace) for seed, trace in enumerate(traces)])
    np.testing.assert_array_equal(found, [[0.2, 0.2, 0.2, 0.2], [0.4, 1e-16, 0.1, 0.3]])


def test_all_networks_in_one_plot_with_quartiles() -> None:
    trials = [record(seed=i, mse=[0.5, 0.1 * 10.0**-i]) for i in range(5)]
    trials.append(record("lenet5", mse=[0.3] * 40))
    figure = plots.mse_all(plots.grouped(trials))
    drawn = lines(figure)
    assert [name.split("\n")[0] for name in drawn] == ["lenet5", "lenet_dlg"]  # from the worst to the best
    np.testing.assert_allclose(list(drawn.values())[1], [0.5, 1e-3])
    bands = [band.get_paths()[0].vertices for band in figure.axes[-1].collections]
    ends = np.asarray(bands[1])[:, 1]
    assert ends.min() == pytest.approx(1e-4)
    assert "n = 5" in texts(figure)
    assert figure.axes[-1].get_xscale() == "symlog"  # 1 step beside 39


@pytest.mark.parametrize("channels", [1, 3])
def test_the_strip_holds_every_frame_of_every_image(tmp_path: Path, channels: int) -> None:
    trial = record("inception_v3", batch=2, channels=channels)
    found = keep(tmp_path, trial)
    paths = {path.name: path for path in plots.draw([trial], tmp_path, tmp_path / "out")}
    strip, gallery = paths["evolution_inception_v3.png"], paths["gallery.png"]
    for name in ("private", "reconstruction", "evolution"):
        for frame in found[name]:
            assert all(holds(strip, image) >= 240 * 240 for image in frame)
    for name in ("private", "reconstruction"):
        first, second = (holds(gallery, image) for image in found[name][0])
        assert second < 100 * 100 <= first


def test_the_strip_is_chosen_by_objective_never_by_likeness(tmp_path: Path) -> None:
    likest = record(relative=1e-3, images=({"psnr": 90.0, "mse": 1e-9},))
    matched = record(seed=1, relative=1e-8, images=({"psnr": 5.0, "mse": 0.3},), outcome="failed")
    lost = record(seed=2, relative=1e-12)  # without pictures
    found = [keep(tmp_path, trial, colour)["private"][0, 0] for trial, colour in ((likest, 0), (matched, 4))]
    paths = {path.name: path for path in plots.draw([likest, matched, lost], tmp_path, tmp_path / "out")}
    strip = paths["evolution_lenet_dlg.png"]
    assert [holds(strip, private) > 0 for private in found] == [False, True]


def test_the_gallery_shows_the_first_trials_in_order_with_what_came_of_them(tmp_path: Path) -> None:
    trials = [record(seed=seed) for seed in range(1, 8)] + [broken(seed=0)]
    told = texts(plots.gallery([group(*reversed(trials))], tmp_path))
    assert "image 0, seed 0\nerror" in told
    assert "image 0, seed 5\n50.0 dB, exact" in told
    assert "seed 6" not in told
    assert "failed: 1 of 8" in told


def test_groups_differ_in_colour_and_are_told_apart_by_what_differs() -> None:
    folders = [Spec("folder", (("path", f"/data/{name}"),)) for name in ("a b", "a-b", "A B")]
    trials = [record("lenet5"), record("lenet5", batch=16), record("lenet5", batch=2), record("resnet18")]
    found = plots.grouped(trials + [record(dataset=folder) for folder in folders])
    assert [one.label for one in found] == [
        "lenet5, batch=1", "lenet5, batch=2", "lenet5, batch=16",
        *(f"lenet_dlg, dataset=folder:path=/data/{name}" for name in ("A B", "a b", "a-b")), "resnet18",
    ]  # fmt: skip
    assert len({one.slug for one in found}) == len({one.colour for one in found}) == len(found)
    assert all(set(one.slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.-") for one in found)


@pytest.mark.parametrize("name", [
    "$x$", "$", "$x" * 40, "y$" * 9,
    r"a\$b$", r"$\frac{$", "日本語 ß\u202e", "line\nbreak\x00", "\udcff", "é" * 3000,
])  # fmt: skip
def test_names_of_others_are_drawn_as_they_are(name: str, tmp_path: Path) -> None:
    folders = [Spec("folder", (("path", name + end),)) for end in ("", "2")]
    trials = [record(dataset=folder) for folder in folders]
    for trial in trials:
        keep(tmp_path / "pictures", trial)
    paths = plots.draw(trials, tmp_path / "pictures", tmp_path / "out")
    assert len(paths) == len({path.name for path in paths}) == 6
    assert max(len(path.name) for path in paths) < 120


def npz(change: dict[str, npt.NDArray[Any] | None]) -> Callable[[Record], bytes]:
    def build(trial: Record) -> bytes:
        file = io.BytesIO()
        parts = {name: part for name, part in (arrays(trial) | change).items() if part is not None}
        np.savez_compressed(file, **parts)  # type: ignore[arg-type]
        return file.getvalue()

    return build


def lying(trial: Record) -> bytes:
    """A sound header that announces far more than the file holds."""
    file, part = io.BytesIO(), io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 10**9)}
    np.lib.format.write_array_header_1_0(part, header)
    with zipfile.ZipFile(file, "w") as archive:
        for name in arrays(trial):
            archive.writestr(f"{name}.npy", part.getvalue())
    return file.getvalue()


@pytest.mark.parametrize("build", [
    lambda trial: b"", lambda trial: b"PK", lambda trial: npz({})(trial)[:-40], lying,
    npz({"private": None}), npz({"steps": np.array(3)}), npz({"steps": np.arange(2)}),
    npz({"steps": np.array([None] * 3)}), npz({"private": np.zeros((1, 1, 8, 8, 3), np.uint8)}),
    npz({"evolution": np.zeros((3, 1, SIDE, SIDE, 3))}), npz({"evolution": np.zeros(3 * 10**7, np.uint8)}),
    npz({"evolution": np.zeros((0, 1, SIDE, SIDE, 3), np.uint8), "steps": np.arange(0)}),
])  # fmt: skip
def test_damaged_pictures_are_passed_over(build: Callable[[Record], bytes], tmp_path: Path) -> None:
    trial, sound = record(relative=1e-12), record(seed=1, relative=1e-3)
    keep(tmp_path, sound)
    (tmp_path / f"{trial.case.id}.npz").write_bytes(build(trial))
    assert plots.read(trial, tmp_path) is None
    names = [path.name for path in plots.draw([trial, sound], tmp_path, tmp_path / "out")]
    assert "evolution_lenet_dlg.png" in names


@given(st.binary(max_size=40), st.integers(0, 127))
@settings(deadline=None)
@pytest.mark.filterwarnings("ignore:Reading `.npy`:UserWarning")  # `draw` ignores it, too
def test_any_header_is_read_or_passed_over(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int
) -> None:
    trial, folder = record(), tmp_path_factory.mktemp("noise")
    with zipfile.ZipFile(folder / f"{trial.case.id}.npz", "w") as archive:
        for name, part in arrays(trial).items():
            np.save(file := io.BytesIO(), part)
            content = file.getvalue()
            noisy = content[:at] + noise + content[at + len(noise) :]
            archive.writestr(f"{name}.npy", noisy if name == "private" else content)
    plots.read(trial, folder)
