"""From image files to tensors: find them, decode them, bring them to a network's resolution."""

from __future__ import annotations

import hashlib
import os
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dlgbench.errors import UsageError, unknown

if TYPE_CHECKING:
    import torch

PREPARATIONS = ("fit", "crop", "rescale")
MODES = {1: "L", 3: "RGB"}  # Pillow's name for a number of channels

# A closed list: Pillow's other readers are little tested, and one of them runs Ghostscript.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm")
MAX_PIXELS = 64 * 1024**2
_DAMAGED = (OSError, SyntaxError, ValueError, LookupError, EOFError, TypeError, ArithmeticError, struct.error)


@dataclass(frozen=True, eq=False)
class Files:
    """Images in files of their own; ``labels`` is empty where they carry no class."""

    paths: Sequence[Path]
    labels: Sequence[int] = ()
    classes: int | None = None
    channels: int = 3

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Image.Image:
        return read_image(self.paths[index]).convert(MODES[self.channels])

    def label(self, index: int) -> int | None:
        return self.labels[index] if self.labels else None


def read_image(path: Path) -> Image.Image:
    """Decode one file to an 8-bit image of mode "L" (grey sources) or "RGB" (all others).

    16-bit grey is scaled, transparency laid over white, an EXIF rotation applied, and of an animation
    the first frame taken.  Raises UsageError for a missing, empty, damaged or unknown file, for
    floating-point or 32-bit pixels, and from the header alone for more than ``MAX_PIXELS``.
    """
    try:
        _check_file(path)
        with warnings.catch_warnings(action="ignore"):  # our limit and errors replace Pillow's warnings
            return _decode(path)
    except UsageError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(path, "far more") from None
    except UnidentifiedImageError:
        raise _refused(path, "data in no such format", "convert the picture to PNG") from None
    except _DAMAGED as error:
        got = f"data that cannot be read ({error})"
        raise _refused(path, got, "copy the file again from its source") from None


def image_files(folder: Path, root: Path) -> list[Path]:
    """The images directly in ``folder``, in order of name, told by their ``SUFFIXES``.

    Hidden files are passed over.  Raises UsageError where ``folder`` cannot be read and where it holds
    a link that leads out of ``root``.
    """
    return [entry for entry in _entries(folder, root) if entry.suffix.lower() in SUFFIXES and entry.is_file()]


def class_folders(root: Path) -> Files:
    """The images of all subfolders of ``root`` that hold any; these are the classes, in order of name."""
    found = (image_files(entry, root) for entry in _entries(root, root) if entry.is_dir())
    classes = [paths for paths in found if paths]
    labels = [label for label, paths in enumerate(classes) for _ in paths]
    return Files([path for paths in classes for path in paths], labels, len(classes))


def digest(image: Image.Image) -> str:
    """16 hexadecimal digits that tell this picture from others."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()[:16]


def prepare(image: Image.Image, resolution: int, preparation: str, channels: int) -> torch.Tensor:
    """``image`` as a float32 tensor (channel, height, width) in [0, 1], both sides ``resolution`` pixels.

    ``fit`` takes the largest centred square.  ``crop`` takes the centred square that torchvision's
    evaluation sees, 224 of 256 parts of the shorter side.  ``rescale`` takes all and changes the
    proportions.  ``channels`` (1 or 3) converts between grey and colour.  Resampling is Pillow's
    bicubic with antialiasing: sharper than bilinear, with less ringing than Lanczos.  Raises
    UsageError for a preparation not among ``PREPARATIONS``.
    """
    import torch

    if preparation not in PREPARATIONS:
        raise unknown("preparation", preparation, PREPARATIONS)
    box = _box(image, resolution, preparation)
    # Equal to scaling and then cutting, but a sliver is never scaled to billions of pixels.
    square = image.convert(MODES[channels]).resize((resolution, resolution), Image.Resampling.BICUBIC, box)
    pixels = np.array(square, dtype=np.float32).reshape(resolution, resolution, channels) / 255
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _box(image: Image.Image, resolution: int, preparation: str) -> tuple[float, float, float, float]:
    if preparation == "rescale":
        return 0, 0, image.width, image.height
    side = float(min(image.size))
    if preparation == "crop":
        side *= resolution / round(resolution * 256 / 224)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return left, top, left + side, top + side


def _entries(folder: Path, root: Path) -> list[Path]:
    try:
        visible = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        got = error.strerror
        raise UsageError(f"{folder}: expected a folder of images, got {got!r}: correct the path") from None
    top = os.path.realpath(root)
    for entry in visible:
        if entry.is_symlink() and not Path(os.path.realpath(entry)).is_relative_to(top):
            raise UsageError(f"{entry}: expected no link out of {root}, got one: put a copy in its place")
    return visible


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise _refused(path, "no file there", "correct the path")
    if path.stat().st_size == 0:
        raise _refused(path, "an empty file", "copy the file again from its source")


def _decode(path: Path) -> Image.Image:
    with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise _too_large(path, f"{image.width}x{image.height}")
        if image.mode == "F":
            raise _refused(path, "floating-point pixels", "save it with 8 bits a channel")
        return _eight_bit(path, ImageOps.exif_transpose(image))


def _eight_bit(path: Path, image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_sixteen_bit(path, image)
    grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if grey else "RGB")


def _from_sixteen_bit(path: Path, image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise _refused(path, "32-bit pixels", "save it with 8 or 16 bits a channel")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _refused(path: Path, got: str, remedy: str) -> UsageError:
    return UsageError(f"{path}: expected a {', '.join(FORMATS)} image, got {got}: {remedy}")


def _too_large(path: Path, got: str) -> UsageError:
    limit = f"at most {MAX_PIXELS // 1024**2} megapixels"
    return UsageError(f"{path}: expected an image of {limit}, got {got}: scale it down first")
