"""Small datasets: the whole set as one uint8 tensor on the device."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from asge_zoo.data.augment import Augment, augment_batch
from asge_zoo.data.base import Batch, Dataset, DatasetInfo, Images, Loader
from asge_zoo.data.preprocessing import MAX_SIZE
from asge_zoo.errors import DataError
from asge_zoo.ranks import ALONE, Shard
from asge_zoo.seeding import keyed_generator


class MemoryDataset(Dataset):
    """A dataset that fits in memory: `stored_info`, `read` and `found` are all there is to write."""

    size: PositiveInt | None = Field(
        default=None, le=MAX_SIZE, description="Side, in pixels, to resize images to; null: as they are."
    )
    augment: Augment = Field(default=Augment(), description="Random changes to training images.")

    @abstractmethod
    def stored_info(self) -> DatasetInfo:
        """`info`, for images as they are stored."""

    @abstractmethod
    def read(self, root: Path) -> tuple[Images, Images]:
        """Training and test images as stored, in a fixed order.

        Raises:
            DataError: they are missing or can't be read.
        """

    def info(self) -> DatasetInfo:
        stored = self.stored_info()
        height, width = (self.size, self.size) if self.size else (stored.height, stored.width)
        return replace(stored, height=height, width=width)

    def loader(self, root: Path, *, seed: int, device: torch.device, shard: Shard = ALONE) -> "MemoryLoader":
        info = self.info()
        train, test = (self._prepared(images, info) for images in self.read(root))
        for split, count in ((train, info.train_count), (test, info.test_count)):
            if not len(split.images) == len(split.labels) == count:
                raise DataError(
                    f"{self.kind} under {root} holds {len(split.images)} images and {len(split.labels)} labels where "
                    f"{count} belong; fetch it again"
                )
        order = torch.randperm(len(train), generator=keyed_generator(seed, "validation"))
        return MemoryLoader(
            train=train.take(order[self.validation :]).to(device),
            splits={
                "validation": train.take(shard.of(order[: self.validation])).to(device),
                "test": Images(shard.of(test.images), shard.of(test.labels)).to(device),
            },
            info=info,
            batch_size=self.batch_size,
            augment=self.augment,
            seed=seed,
            shard=shard,
        )

    def _prepared(self, stored: Images, info: DatasetInfo) -> Images:
        if stored.images.shape[2:] == (info.height, info.width):
            return stored
        size = (info.height, info.width)
        resized = [
            F.interpolate(some.float(), size, mode="bilinear", antialias=True).round().clamp(0, 255).to(torch.uint8)
            for some in stored.images.split(1000)  # so that only so many are ever float
        ]
        return Images(torch.cat(resized), stored.labels)


class MemoryLoader(Loader):
    """Batches from tensors that stay on the device; order and augmentation by (seed, epoch, step) alone."""

    EVAL_BATCH = 500

    def __init__(
        self,
        *,
        train: Images,
        splits: dict[str, Images],
        info: DatasetInfo,
        batch_size: int,
        augment: Augment,
        seed: int,
        shard: Shard,
    ) -> None:
        self._train, self._splits, self._augment, self._seed, self._shard = train, splits, augment, seed, shard
        self._batch_size = batch_size
        self._mean = torch.tensor(info.mean, device=train.images.device)[:, None, None] * 255
        self._std = torch.tensor(info.std, device=train.images.device)[:, None, None] * 255

    @property
    def batch_size(self) -> int:
        return self._batch_size

    def steps(self) -> int:
        return len(self._train) // self._batch_size

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = torch.randperm(len(self._train), generator=keyed_generator(self._seed, "order", epoch))
        order = order.to(self._train.images.device)
        for step in range(start, self.steps()):
            batch = order[step * self._batch_size : (step + 1) * self._batch_size]
            chosen = self._train.take(self._shard.of(batch))
            draws = keyed_generator(self._seed, "augment", epoch, step)
            augmented = augment_batch(
                chosen.images, self._augment, draws, batch_size=self._batch_size, shard=self._shard
            )
            yield self._normalize(augmented), chosen.labels

    def split_batches(self, split: str) -> Iterator[Batch]:
        images = self._splits[split]
        for start in range(0, len(images), self.EVAL_BATCH):
            stop = start + self.EVAL_BATCH
            yield self._normalize(images.images[start:stop]), images.labels[start:stop]

    def _normalize(self, images: Tensor) -> Tensor:
        return (images.to(torch.float32) - self._mean) / self._std
