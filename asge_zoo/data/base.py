"""The contract of a dataset, and the batches that training and evaluation draw from it."""

import os
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from asge_zoo.data.preprocessing import Preprocessing
from asge_zoo.errors import DataError, SpecError
from asge_zoo.ranks import ALONE, Shard
from asge_zoo.registry import Component


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a dataset without reading it.

    Attributes:
        classes: names, in the order of the labels.
        channels, height, width: of an image as the network gets it.
        train_count, test_count: images; validation images are among the first. None: known once they are read.
        mean, std: per channel, of pixel values in 0 to 1.
    """

    classes: tuple[str, ...]
    channels: int
    height: int
    width: int
    train_count: int | None
    test_count: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Images:
    """Images (n, C, H, W), uint8, and labels (n,), int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> "Images":
        """The images at `indices` (m,), in that order."""
        return Images(self.images[indices], self.labels[indices])

    def to(self, device: torch.device) -> "Images":
        """The same images on a device."""
        return Images(self.images.to(device), self.labels.to(device))


Batch = tuple[Tensor, Tensor]


class Loader(Protocol):
    """Batches of a split: images (B, C, H, W), float32, normalised, and labels (B,), on the device.

    Each of several ranks gets its part of every batch, and of every split, and no image is ever repeated.
    """

    @property
    def described(self) -> str:
        """What reads the images, for the log."""
        return "memory"

    @property
    def batch_size(self) -> int:
        """Images in a training batch, of all ranks together."""
        ...

    def steps(self) -> int:
        """Full training batches in an epoch; the images left over differ from epoch to epoch."""
        ...

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """An epoch's training batches, from step `start` on: by (seed, epoch), augmented by (seed, epoch, step)."""
        ...

    def split_batches(self, split: str) -> Iterator[Batch]:
        """All images of `validation` or `test`, in order, not augmented; the last batch may be smaller."""
        ...


class Dataset(Component):
    """Contract of a dataset: what it is, and how it is read."""

    group: ClassVar[str] = "dataset"
    hub_id: ClassVar[str | None] = None  # the dataset's own repository on the Hub, for model cards
    eval_crop: ClassVar[float] = 1.0  # see `Preprocessing.crop`

    validation: PositiveInt = Field(
        default=5000, description="Training images held out for selection; the test images never select anything."
    )
    batch_size: PositiveInt = Field(default=128, description="Images in a training step.")

    @abstractmethod
    def info(self) -> DatasetInfo:
        """What the dataset holds, without reading it."""

    def preprocessing(self) -> Preprocessing:
        """What makes a picture, of any size, such an image as evaluation has."""
        info = self.info()
        return Preprocessing(
            channels=info.channels,
            height=info.height,
            width=info.width,
            crop=self.eval_crop,
            mean=list(info.mean),
            std=list(info.std),
        )

    @abstractmethod
    def loader(self, root: Path, *, seed: int, device: torch.device, shard: Shard = ALONE) -> Loader:
        """Read the dataset from under `root`, split it by `seed`, and serve this rank's part.

        Raises:
            DataError: it is missing and can't be downloaded, or it can't be read.
        """

    @abstractmethod
    def found(self, root: Path) -> str | None:
        """Where under `root` the dataset lies, or None; reads no images."""

    def check(self) -> None:
        """Refuse sizes that leave nothing to train on.

        Raises:
            SpecError: with the field to change.
        """
        info = self.info()
        if info.train_count is not None:
            self.check_counts(info.train_count)

    def check_counts(self, train_count: int) -> None:
        """`check`, by a number of training images that may have been read."""
        left = train_count - self.validation
        if left < 1:
            raise SpecError(
                f"data.validation: {self.validation} of {train_count} training images leave none to train on; lower it"
            )
        if self.batch_size > left:
            raise SpecError(
                f"data.batch_size: {self.batch_size} is more than the {left} training images that {self.kind} has "
                f"beside {self.validation} for validation; lower it"
            )


def data_root(given: str | Path | None = None) -> Path:
    """Where datasets lie: `given`, else $ASGE_ZOO_DATA, else the user's cache.

    Raises:
        DataError: the place exists and is no directory.
    """
    cache = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "asge-zoo", "data")
    root = Path(os.path.expanduser(given or os.environ.get("ASGE_ZOO_DATA") or cache))
    if root.exists() and not root.is_dir():
        raise DataError(f"data root {root} is not a directory; give another with --data-root or ASGE_ZOO_DATA")
    return root
