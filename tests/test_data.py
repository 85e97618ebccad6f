"""Datasets: what is split, drawn and changed is a function of (seed, epoch, step), and broken files say so."""

import socket
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NoReturn

import pytest
import torch
import torchvision.datasets
from torch import Tensor

from asge_zoo.data.augment import Augment, augment_batch
from asge_zoo.data.base import Batch, DatasetInfo, Images, Loader, data_root
from asge_zoo.data.digits import Digits
from asge_zoo.data.memory import MemoryDataset, MemoryLoader
from asge_zoo.data.torchvision_sets import CIFAR10, MNIST, FashionMNIST, TorchvisionSet
from asge_zoo.errors import DataError, SpecError

CPU = torch.device("cpu")
NOWHERE = Path("/nowhere")  # for sets that read no files
TRAIN, TEST = 40, 12


def counts(loader: Loader) -> tuple[int, ...]:
    """How many validation and test images there are."""
    return tuple(sum(len(labels) for _, labels in loader.split_batches(split)) for split in ("validation", "test"))


class Numbered(MemoryDataset):
    """Random images whose labels number them: 0 to 39 to train on, 100 to 111 to test."""

    kind: Literal["test_numbered"] = "test_numbered"
    flat: bool = False  # the same image throughout: batches differ by what was drawn for them alone

    def stored_info(self) -> DatasetInfo:
        return DatasetInfo(("a", "b"), 2, 6, 5, TRAIN, TEST, mean=(0.4, 0.6), std=(0.2, 0.3))

    def read(self, root: Path) -> tuple[Images, Images]:
        pixels = torch.randint(1, 256, (TRAIN + TEST, 2, 6, 5), generator=seeded(0)).to(torch.uint8)
        if self.flat:
            pixels = pixels[:1].expand_as(pixels)
        return Images(pixels[:TRAIN], torch.arange(TRAIN)), Images(pixels[TRAIN:], torch.arange(TEST) + 100)

    def found(self, root: Path) -> str | None:
        return None


def seeded(seed: int) -> torch.Generator:
    """A generator for the tests' own numbers."""
    return torch.Generator().manual_seed(seed)


def numbered(*, seed: int = 0, augment: Augment | None = None) -> MemoryLoader:
    """30 training images in batches of 7, 10 for validation, 12 for the test."""
    dataset = Numbered(validation=10, batch_size=7, augment=augment or Augment())
    return dataset.loader(NOWHERE, seed=seed, device=CPU)


def labels_of(batches: list[Batch]) -> list[int]:
    """The labels of all batches, in order."""
    return [int(label) for _, labels in batches for label in labels]


def same(first: list[Batch], second: list[Batch]) -> bool:
    """Whether two lists of batches are bitwise equal."""
    return len(first) == len(second) and all(
        torch.equal(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True)
    )


# The split.


def trained_on(loader: MemoryLoader) -> set[int]:
    """Labels seen in enough epochs for every image to come up."""
    return {label for epoch in range(20) for label in labels_of(list(loader.train_batches(epoch)))}


def test_split_is_disjoint_and_whole() -> None:
    """Every training image is either trained on or validated on, none both; the test images are neither."""
    loader = numbered()
    validation, test = (labels_of(list(loader.split_batches(split))) for split in ("validation", "test"))
    assert len(validation) == len(set(validation)) == 10
    assert len(test) == len(set(test)) == TEST
    trained = trained_on(loader)
    assert trained.isdisjoint(validation) and trained.isdisjoint(test)
    assert trained | set(validation) == set(range(TRAIN))


def test_split_goes_by_seed() -> None:
    """The same seed splits alike, another differently, and always from the same test images in the same order."""
    first, again, other = (numbered(seed=seed) for seed in (0, 0, 1))
    validation = [set(labels_of(list(loader.split_batches("validation")))) for loader in (first, again, other)]
    assert validation[0] == validation[1] != validation[2]
    assert trained_on(other) == set(range(TRAIN)) - validation[2]
    assert same(list(first.split_batches("test")), list(other.split_batches("test")))


def test_split_is_in_order_and_not_augmented() -> None:
    """Validation and test images come as they are, whatever training does to its own."""
    plain, augmented = numbered(), numbered(augment=Augment(crop_padding=2, flip=True))
    for split in ("validation", "test"):
        assert same(list(plain.split_batches(split)), list(augmented.split_batches(split)))
    assert labels_of(list(plain.split_batches("test"))) == list(range(100, 100 + TEST))


def test_large_splits_come_whole() -> None:
    """More images than one evaluation batch holds, the last batch smaller."""
    loader = Digits(validation=600).loader(NOWHERE, seed=0, device=CPU)
    sizes = [len(labels) for _, labels in loader.split_batches("validation")]
    assert sum(sizes) == 600 and len(sizes) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"validation": TRAIN}, "data.validation: 40"), ({"validation": 30, "batch_size": 11}, "data.batch_size: 11")],
)
def test_nothing_left_to_train_on(options: dict[str, int], message: str) -> None:
    """The field to change is named."""
    with pytest.raises(SpecError, match=message):
        Numbered.model_validate(options).check()
    Numbered(validation=30, batch_size=10).check()


# Order and augmentation.

AUGMENTS = [pytest.param(Augment(), id="plain"), pytest.param(Augment(crop_padding=2, flip=True), id="augmented")]


@pytest.mark.parametrize("augment", AUGMENTS)
def test_batches_depend_on_seed_and_epoch_alone(augment: Augment) -> None:
    """Not on the loader, on epochs before, on other loops running, nor on torch's own random state."""
    loader = numbered(augment=augment)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    epochs = [list(loader.train_batches(epoch)) for epoch in range(3)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    fresh = numbered(augment=augment)
    assert same(list(fresh.train_batches(2)), epochs[2])  # epochs 0 and 1 skipped
    assert same(list(fresh.train_batches(0)), epochs[0])
    interleaved = list(zip(loader.train_batches(0), loader.train_batches(1), strict=True))
    assert same([pair[0] for pair in interleaved], epochs[0])
    assert same([pair[1] for pair in interleaved], epochs[1])


@pytest.mark.parametrize("augment", AUGMENTS)
def test_epochs_and_seeds_differ(augment: Augment) -> None:
    """An epoch is a new permutation, in full batches, another seed another one."""
    loader = numbered(augment=augment)
    epochs = [labels_of(list(loader.train_batches(epoch))) for epoch in range(3)]
    assert loader.steps() == 4 and loader.batch_size == 7
    assert all(len(epoch) == len(set(epoch)) == 28 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert labels_of(list(numbered(seed=1, augment=augment).train_batches(0))) != epochs[0]


def test_images_keep_their_labels() -> None:
    """Every image of a batch is its label's, normalised: (pixel / 255 − mean) / std, per channel, in float32."""
    loader, (train, test) = numbered(), Numbered().read(NOWHERE)
    stored = dict(zip((*train.labels.tolist(), *test.labels.tolist()), (*train.images, *test.images), strict=True))
    batches = [*loader.train_batches(0), *loader.split_batches("validation"), *loader.split_batches("test")]
    for images, labels in batches:
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        for image, label in zip(images, labels, strict=True):
            for channel, (mean, std) in enumerate([(0.4, 0.2), (0.6, 0.3)]):
                expected = (stored[int(label)][channel].double() / 255 - mean) / std
                torch.testing.assert_close(image[channel].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("augment", [Augment(crop_padding=2), Augment(flip=True)], ids=["crop", "flip"])
def test_augmentation_draws_anew_for_every_step(augment: Augment) -> None:
    """Every image of every step of every epoch has its own draw, and every seed has its own."""
    dataset = Numbered(flat=True, validation=10, batch_size=15, augment=augment)
    loaders = [dataset.loader(NOWHERE, seed=seed, device=CPU) for seed in (0, 1)]
    batches = [images for loader in loaders for epoch in range(3) for images, _ in loader.train_batches(epoch)]
    assert len(batches) == 12
    assert len({tuple(images.flatten().tolist()) for images in batches}) == 12
    assert all(len({tuple(image.flatten().tolist()) for image in images}) > 1 for images in batches)


def test_crops_are_padded_with_black() -> None:
    """Zero as a pixel, not after normalisation."""
    dataset = Numbered(validation=10, batch_size=15, augment=Augment(crop_padding=2))
    images, _ = next(iter(dataset.loader(NOWHERE, seed=0, device=CPU).train_batches(0)))
    darkest = images.amin((0, 2, 3))
    torch.testing.assert_close(darkest, torch.tensor([-0.4 / 0.2, -0.6 / 0.3]))


def window(image: Tensor, padding: int, top: int, left: int) -> Tensor:
    """What a crop at (top, left) of the zero-padded image (C, H, W) shows, pixel by pixel."""
    channels, height, width = image.shape
    cropped = torch.zeros_like(image)
    for channel in range(channels):
        for y in range(height):
            for x in range(width):
                source_y, source_x = y + top - padding, x + left - padding
                if 0 <= source_y < height and 0 <= source_x < width:
                    cropped[channel, y, x] = image[channel, source_y, source_x]
    return cropped


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("padding", "shape"), [(1, (2, 4, 3)), (2, (1, 5, 5))])
def test_random_crop_against_a_loop(padding: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Each image shows one window of its own padded self; all places come up about as often."""
    count, places = 1000, (2 * padding + 1) ** 2
    image = torch.arange(1, 1 + shape[0] * shape[1] * shape[2]).reshape(shape).to(dtype)
    copies = image.expand(count, *shape).clone()
    copies[1::2] += 100
    cropped = augment_batch(copies, Augment(crop_padding=padding), seeded(3), batch_size=count)
    assert (cropped.shape, cropped.dtype) == (copies.shape, dtype)
    drawn: Counter[tuple[int, int]] = Counter()
    windows = {
        (odd, top, left): window(image + 100 * odd, padding, top, left)
        for odd in (0, 1)
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    }
    for i, result in enumerate(cropped):
        fits = [key[1:] for key, expected in windows.items() if key[0] == i % 2 and torch.equal(result, expected)]
        assert len(fits) == 1, f"image {i} is no window of itself"
        drawn[fits[0]] += 1
    assert len(drawn) == places
    assert max(drawn.values()) < 2 * count / places and min(drawn.values()) > count / places / 2


def test_flip_is_a_mirror_half_of_the_time() -> None:
    """Left and right swapped, image by image, and nothing else."""
    images = torch.randint(256, (400, 2, 3, 4), generator=seeded(4)).to(torch.uint8)
    result = augment_batch(images, Augment(flip=True), seeded(5), batch_size=400)
    mirrored = images[:, :, :, [3, 2, 1, 0]]
    flipped = [torch.equal(after, mirror) for after, mirror in zip(result, mirrored, strict=True)]
    kept = [torch.equal(after, before) for after, before in zip(result, images, strict=True)]
    assert all(a != b for a, b in zip(flipped, kept, strict=True))
    assert 160 < sum(flipped) < 240


def test_no_augmentation_changes_nothing() -> None:
    """Neither images nor the generator."""
    images = torch.randint(256, (4, 1, 3, 3), generator=seeded(6)).to(torch.uint8)
    generator = seeded(7)
    assert torch.equal(augment_batch(images, Augment(), generator, batch_size=4), images)
    assert torch.equal(generator.get_state(), seeded(7).get_state())


# Real images.


def pixels_of(loader: MemoryLoader, info: DatasetInfo) -> Tensor:
    """All of an epoch's and the validation's pixels (n, C, H, W), in 0 to 1."""
    images = torch.cat([images for images, _ in (*loader.train_batches(0), *loader.split_batches("validation"))])
    return images * torch.tensor(info.std)[:, None, None] + torch.tensor(info.mean)[:, None, None]


@pytest.mark.parametrize("size", [None, 16, 28])
def test_digits_are_what_they_say(size: int | None) -> None:
    """Shapes and counts, ten classes in each part, and pixels in 0 to 1."""
    dataset = Digits(size=size)
    info, loader = dataset.info(), dataset.loader(NOWHERE, seed=0, device=CPU)
    side = size or 8
    assert (info.channels, info.height, info.width) == (1, side, side)
    assert (info.train_count, info.test_count, len(info.classes)) == (1437, 360, 10)
    assert counts(loader) == (
        180,
        360,
    )
    assert loader.steps() == (1437 - 180) // 64
    for batches in (loader.train_batches(0), loader.split_batches("validation"), loader.split_batches("test")):
        images, labels = next(iter(batches))
        assert images.shape[1:] == (1, side, side)
        assert set(labels.tolist()) == set(range(10))
    pixels = pixels_of(loader, info)
    assert pixels.min() > -1e-3 and pixels.max() < 1 + 1e-3 and pixels.max() > 0.99


def test_digits_mean_and_deviation() -> None:
    """The constants are those of the images at the default size."""
    dataset = Digits()
    info = dataset.info()
    pixels = pixels_of(dataset.loader(NOWHERE, seed=0, device=CPU), info)
    assert info.height == 16
    assert pixels.mean().item() == pytest.approx(info.mean[0], abs=0.02)
    assert pixels.std().item() == pytest.approx(info.std[0], abs=0.02)


def test_digits_test_images_are_always_the_same() -> None:
    """For every seed; and no test image is among those trained or validated on."""
    first, second = (Digits().loader(NOWHERE, seed=seed, device=CPU) for seed in (0, 1))
    assert same(list(first.split_batches("test")), list(second.split_batches("test")))
    train, test = Digits().read(NOWHERE)
    assert {tuple(image.flatten().tolist()) for image in train.images}.isdisjoint(
        tuple(image.flatten().tolist()) for image in test.images
    )


def test_resizing_keeps_the_picture() -> None:
    """A digit resized up and averaged down again is nearly itself, not mirrored, turned or moved."""
    small = Digits(size=None).loader(NOWHERE, seed=0, device=CPU)
    large = Digits(size=32).loader(NOWHERE, seed=0, device=CPU)
    (small_images, labels), (large_images, other) = (next(iter(each.split_batches("test"))) for each in (small, large))
    assert torch.equal(labels, other)
    back = torch.nn.functional.avg_pool2d(large_images, 4)
    assert torch.corrcoef(torch.stack([back.flatten(), small_images.flatten()]))[0, 1] > 0.95


STORED: list[Any] = [
    pytest.param(MNIST, [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949], id="mnist"),
    pytest.param(FashionMNIST, [6000] * 10, id="fashion_mnist"),
    pytest.param(CIFAR10, [5000] * 10, id="cifar10"),
]


@pytest.mark.parametrize(("kind", "by_class"), STORED)
def test_stored_sets(kind: type[TorchvisionSet], by_class: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts by class, shapes, and the constants for mean and deviation, of the files under ASGE_ZOO_DATA."""
    dataset, root = kind.model_validate({}), data_root()
    if dataset.found(root) is None:
        pytest.skip(f"no {dataset.folder} under {root}: set ASGE_ZOO_DATA to where it lies")
    no_network(monkeypatch)
    info = dataset.info()
    train, test = dataset.read(root)
    assert (train.images.shape, test.images.shape) == tuple(
        (count, info.channels, info.height, info.width) for count in (info.train_count, info.test_count)
    )
    assert (train.images.dtype, train.labels.dtype) == (torch.uint8, torch.int64)
    assert torch.bincount(train.labels).tolist() == by_class
    for channel in range(info.channels):
        pixels = train.images[:, channel].float() / 255
        assert pixels.mean().item() == pytest.approx(info.mean[channel], abs=0.001)
        assert pixels.std().item() == pytest.approx(info.std[channel], abs=0.001)
    loader = dataset.loader(root, seed=0, device=CPU)
    assert counts(loader) == (
        dataset.validation,
        info.test_count,
    )
    assert info.train_count and loader.steps() == (info.train_count - dataset.validation) // 128


def write_idx(path: Path, values: Tensor, *, claimed: int | None = None) -> None:
    """A file of bytes in MNIST's format, whose header may claim another number of entries than it holds."""
    sizes = [claimed or len(values), *values.shape[1:]]
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in sizes)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + values.to(torch.uint8).numpy().tobytes())


def write_mnist(root: Path, *, claimed: int | None = None) -> tuple[Tensor, Tensor]:
    """Five made-up images in MNIST's files, training and test the same."""
    images, labels = torch.arange(5 * 28 * 28).reshape(5, 28, 28) % 256, torch.tensor([3, 1, 4, 1, 5])
    for part in ("train", "t10k"):
        write_idx(root / "MNIST" / "raw" / f"{part}-images-idx3-ubyte", images, claimed=claimed)
        write_idx(root / "MNIST" / "raw" / f"{part}-labels-idx1-ubyte", labels, claimed=claimed)
    return images.to(torch.uint8), labels


def test_reads_what_the_files_hold(tmp_path: Path) -> None:
    """Pixel by pixel and label by label."""
    images, labels = write_mnist(tmp_path)
    for part in MNIST().read(tmp_path):
        assert torch.equal(part.images, images[:, None])
        assert torch.equal(part.labels, labels)


def test_colour_images_become_channels_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision holds CIFAR's images as (n, H, W, C)."""
    pixels = torch.arange(2 * 4 * 5 * 3, dtype=torch.uint8).reshape(2, 4, 5, 3)
    stored = SimpleNamespace(data=pixels.numpy(), targets=[7, 1])
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda root, train: stored)
    (tmp_path / "cifar-10-batches-py").mkdir()
    for part in CIFAR10().read(tmp_path):
        assert part.images.shape == (2, 3, 4, 5)
        assert all(part.images[1, c, y, x] == pixels[1, y, x, c] for c in range(3) for y in range(4) for x in range(5))
        assert part.labels.tolist() == [7, 1]


# What is missing or broken.


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every connection fails."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise OSError("no network here")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def one_line(error: pytest.ExceptionInfo[DataError]) -> str:
    """The error's message, which is a single line."""
    message = str(error.value)
    assert message and "\n" not in message
    return message


@pytest.mark.parametrize("kind", [MNIST, FashionMNIST, CIFAR10])
@pytest.mark.parametrize("exists", [True, False], ids=["empty root", "no root"])
def test_missing_set(
    kind: type[TorchvisionSet],
    exists: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """One line that says where it was looked for and how to name another place; nothing stays behind."""
    no_network(monkeypatch)
    root = tmp_path / "data"
    if exists:
        root.mkdir()
    dataset = kind.model_validate({})
    assert dataset.found(root) is None
    with pytest.raises(DataError) as error:
        dataset.loader(root, seed=0, device=CPU)
    message = one_line(error)
    for word in (dataset.kind, str(root), dataset.folder, "--data-root", "ASGE_ZOO_DATA"):
        assert word in message
    assert not root.exists() or not list(root.iterdir())
    assert capfd.readouterr().out == ""


def test_truncated_images(tmp_path: Path) -> None:
    """A file shorter than its header says."""
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError) as error:
        MNIST().read(tmp_path)
    assert str(tmp_path / "MNIST") in one_line(error)


@pytest.mark.parametrize("length", [0, 3, 10])
def test_truncated_header(length: int, tmp_path: Path) -> None:
    """A file that ends within its header."""
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError) as error:
        MNIST().read(tmp_path)
    one_line(error)


def test_too_few_images(tmp_path: Path) -> None:
    """Sound files of another set's size."""
    write_mnist(tmp_path)
    with pytest.raises(DataError, match="holds 5 images and 5 labels where 60000 belong") as error:
        MNIST().loader(tmp_path, seed=0, device=CPU)
    one_line(error)


def test_fewer_images_than_labels(tmp_path: Path) -> None:
    """As many labels as there should be, and too few images."""
    write_mnist(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    write_idx(raw / "train-labels-idx1-ubyte", torch.zeros(60000))
    write_idx(raw / "t10k-labels-idx1-ubyte", torch.zeros(10000))
    with pytest.raises(DataError) as error:
        MNIST().loader(tmp_path, seed=0, device=CPU)
    one_line(error)


@pytest.mark.parametrize("kept", [0, 1000], ids=["empty", "cut"])
def test_damaged_cifar(kept: int, tmp_path: Path) -> None:
    """An archive that fails its checksum is not unpickled."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"\x80" * kept)
    with pytest.raises(DataError) as error:
        CIFAR10().read(tmp_path)
    assert str(folder) in one_line(error)


def test_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given goes before the environment; a file is refused."""
    monkeypatch.setenv("ASGE_ZOO_DATA", str(tmp_path))
    assert data_root() == tmp_path
    assert data_root(tmp_path / "other") == tmp_path / "other"
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(DataError, match="not a directory"):
        data_root(file)
