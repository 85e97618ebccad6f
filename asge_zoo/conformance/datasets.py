"""What datasets promise; those about images are checked where the files are, and nothing is downloaded."""

from itertools import islice

import torch
from torch import Tensor

from asge_zoo.conformance.common import Check, NotChecked, Subject, expect, size
from asge_zoo.data.base import Batch, Dataset, DatasetInfo, Loader, data_root

SPLITS = ("validation", "test")


def describes_itself(subject: Subject) -> None:
    info: DatasetInfo = subject.make().info()
    for what in ("channels", "height", "width", "train_count", "test_count"):
        count = getattr(info, what)
        unknown = count is None and what.endswith("count")
        expect(unknown or (type(count) is int and count > 0), f"{what} is {count!r}")
    distinct = len(set(info.classes)) == len(info.classes) > 1
    expect(distinct, f"{len(info.classes)} classes have {len(set(info.classes))} names")
    for what, values in (("mean", info.mean), ("std", info.std)):
        expect(len(values) == info.channels, f"{what} has {len(values)} values for {info.channels} channels")
    expect(all(value > 0 for value in info.std), f"std is {info.std}")
    subject.make().check()


def gives_what_it_describes(subject: Subject) -> None:
    loader, dataset = _read(subject)
    info = dataset.info()
    shape = (info.channels, info.height, info.width)
    expect(loader.batch_size == dataset.batch_size, f"batch_size is {loader.batch_size}, not {dataset.batch_size}")
    batches = {"train": next(iter(loader.train_batches(0))), **{s: next(iter(loader.split_batches(s))) for s in SPLITS}}
    for split, (images, labels) in batches.items():
        expect(images.shape[1:] == shape, f"{split} images are {size(images.shape[1:])} and not {size(shape)}")
        expect(images.dtype == torch.float32, f"{split} images are {images.dtype}")
        expect(labels.dtype == torch.int64, f"{split} labels are {labels.dtype}")
        expect(labels.shape == images.shape[:1], f"{split} labels are {size(labels.shape)} for {len(images)} images")
        within = bool(((labels >= 0) & (labels < len(info.classes))).all())
        expect(within, f"{split} labels are {int(labels.min())} to {int(labels.max())}, classes: {len(info.classes)}")
    trained = len(batches["train"][1])
    expect(trained == dataset.batch_size, f"a training batch has {trained} images and not {dataset.batch_size}")


def gives_normalised_images(subject: Subject) -> None:
    """Roughly: a resize or a crop may move them a little."""
    loader, _ = _read(subject)
    images = next(iter(loader.split_batches("validation")))[0]
    for channel in range(images.shape[1]):
        std, mean = (float(value) for value in torch.std_mean(images[:, channel]))
        expect(abs(mean) < 0.5 and 0.5 < std < 2, f"channel {channel} has mean {mean:.2f} and deviation {std:.2f}")


def counts_its_steps(subject: Subject) -> None:
    loader, dataset = _read(subject)
    steps, count = loader.steps(), dataset.info().train_count
    if count is not None:
        left = count - dataset.validation
        expect(steps == left // dataset.batch_size, f"steps() is {steps}, of {left} images by {dataset.batch_size}")
    given = sum(1 for _ in loader.train_batches(0, start=steps - 1))
    expect(given == 1, f"from the last step on there are {given} batches")


def goes_on_from_any_step(subject: Subject) -> None:
    loader, _ = _read(subject)
    start = min(2, loader.steps() - 1)
    through = list(islice(loader.train_batches(1), start + 2))[start:]
    again = list(islice(loader.train_batches(1, start=start), 2))
    expect(_same(through, again), f"train_batches(1, start={start}) gives other batches than train_batches(1) there")


def orders_by_seed_and_epoch(subject: Subject) -> None:
    one, other, reseeded = (_read(subject, seed)[0] for seed in (0, 0, 1))

    def first(loader: Loader, epoch: int) -> list[Batch]:
        return list(islice(loader.train_batches(epoch), 1))

    expect(_same(first(one, 0), first(other, 0)), "the same seed and epoch give other batches")
    expect(not _same(first(one, 0), first(one, 1)), "another epoch gives the same batches")
    expect(not _same(first(one, 0), first(reseeded, 0)), "another seed gives the same batches")


def splits_as_it_says(subject: Subject) -> None:
    (loader, dataset), (reseeded, _) = _read(subject), _read(subject, seed=1)
    for split, count in (("validation", dataset.validation), ("test", dataset.info().test_count)):
        given = sum(len(labels) for _, labels in loader.split_batches(split))
        expect(count is None or given == count, f"{split} has {given} images and not {count}")
        again = [list(islice(loader.split_batches(split), 1)) for _ in range(2)]
        expect(_same(*again), f"{split} gives other batches when it is read again")
    tests = [list(islice(each.split_batches("test"), 1)) for each in (loader, reseeded)]
    expect(_same(*tests), "another seed gives other test images")


def _read(subject: Subject, seed: int = 0) -> tuple[Loader, Dataset]:
    """A loader of the dataset, and the dataset.

    Raises:
        NotChecked: it is not under the data root.
    """
    dataset: Dataset = subject.make()
    root = data_root()
    if dataset.found(root) is None:
        raise NotChecked(f"{dataset.kind} is not under {root}; name the folder it is in with ASGE_ZOO_DATA")
    return dataset.loader(root, seed=seed, device=torch.device("cpu")), dataset


def _same(some: list[Batch], others: list[Batch]) -> bool:
    pairs: list[tuple[Tensor, Tensor]] = [
        pair for one, other in zip(some, others, strict=True) for pair in zip(one, other, strict=True)
    ]
    return all(torch.equal(one, other) for one, other in pairs)


CHECKS = (
    Check("describes itself", "mend info(), or the defaults of validation and batch_size", describes_itself),
    Check(
        "gives what it describes",
        "let the loader's batches be float32 (B, C, H, W) and int64 (B,), as info() says",
        gives_what_it_describes,
    ),
    Check(
        "normalises its images",
        "subtract info().mean and divide by info().std, of pixel values in 0 to 1",
        gives_normalised_images,
    ),
    Check("counts its steps", "let steps() be the full batches of what validation leaves", counts_its_steps),
    Check("goes on from any step", "draw by (seed, epoch, step) and skip `start` batches", goes_on_from_any_step),
    Check(
        "orders by seed and epoch",
        "shuffle by keyed_generator(seed, 'order', epoch) (see asge_zoo.seeding)",
        orders_by_seed_and_epoch,
    ),
    Check(
        "splits as it says",
        "hold out `validation` training images, and give all images of a split, in order, not augmented",
        splits_as_it_says,
    ),
)
