"""Batches of images that are read from the disk as they are needed, whoever decodes them.

A source decodes, crops and resizes ahead of the training, on the host; all that decides what an image becomes (which
split, in which order, which crop, mirrored or not) is a function of (seed, epoch, sample), here and in `crops`.
"""

from collections.abc import Generator, Iterator
from contextlib import closing
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from asge_zoo.data.base import Batch, DatasetInfo, Loader
from asge_zoo.data.crops import Integers, ResizedCrop, center_boxes, flips, random_boxes
from asge_zoo.ranks import Shard
from asge_zoo.seeding import keyed_generator


class Request(NamedTuple):
    """A batch to decode.

    Attributes:
        samples: (b,), int64: the images' numbers in the source.
        epoch: whose random crops; None: the middle, for evaluation.
    """

    samples: Integers
    epoch: int | None


class Cropping(NamedTuple):
    """Which box of an image is shown, and the side, in pixels, that it is resized to."""

    size: int
    seed: int
    augment: ResizedCrop

    def boxes(self, samples: Integers, epoch: int | None, heights: Integers, widths: Integers) -> Integers:
        """(n, 4), int64: top, left, height, width, for images of the sizes `heights` and `widths` (n,)."""
        if epoch is None:
            return center_boxes(heights, widths)
        return random_boxes(self.seed, epoch, samples, heights, widths, self.augment)


class ImageSource(Protocol):
    """Images that are decoded on demand, cropped and resized to S×S pixels.

    Attributes:
        classes: names of the class folders, sorted.
        labels: (n,), int64: of each image, in the order of the files, the index of its folder.
    """

    classes: tuple[str, ...]
    labels: Tensor

    def batches(self, requests: Iterator[Request]) -> Generator[Tensor, None, None]:
        """The batches asked for, in order, each a new tensor (b, S, S, 3), uint8, RGB, on the host.

        Works ahead of what is taken; stops when it is closed.

        Raises:
            DataError: an image can't be decoded, and which; or a worker died.
        """
        ...


class Split(NamedTuple):
    """Some of a source's images: their numbers there, (n,), int64."""

    source: ImageSource
    samples: Tensor


class ImageLoader(Loader):
    """Splits, order, transfer, flips and normalisation, over sources that decode.

    Args:
        train: the images to train and to validate on.
        validation: how many of them are held out, by seed.
        test: the images to test on.
        info: of the dataset, for mean and standard deviation.
        batch_size: images in a training step, of all ranks together.
        augment: for flips; crops are the sources' matter.
        seed: the run's.
        device: where batches go.
        shard: this rank's part of every batch and split.
        described: which library reads what, for the log.
    """

    EVAL_BATCH = 250

    def __init__(
        self,
        *,
        train: Split,
        validation: int,
        test: Split,
        info: DatasetInfo,
        batch_size: int,
        augment: ResizedCrop,
        seed: int,
        device: torch.device,
        shard: Shard,
        described: str,
    ) -> None:
        self._described = described
        order = train.samples[torch.randperm(len(train.samples), generator=keyed_generator(seed, "validation"))]
        held_out, kept = order[:validation], order[validation:]
        self._train = Split(train.source, kept)
        self._splits = {"validation": Split(train.source, held_out), "test": test}
        self._batch_size, self._augment, self._seed = batch_size, augment, seed
        self._device, self._shard = device, shard
        self._mean = torch.tensor(info.mean, device=device)[:, None, None] * 255
        self._std = torch.tensor(info.std, device=device)[:, None, None] * 255
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def described(self) -> str:
        return self._described

    @property
    def batch_size(self) -> int:
        return self._batch_size

    def steps(self) -> int:
        return len(self._train.samples) // self._batch_size

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        count = len(self._train.samples)
        order = torch.randperm(count, generator=keyed_generator(self._seed, "order", epoch))
        ordered = self._train.samples[order[: self.steps() * self._batch_size]]
        batches = [self._shard.of(batch) for batch in ordered.split(self._batch_size)[start:]]
        return self._batches(self._train.source, batches, epoch)

    def split_batches(self, split: str) -> Iterator[Batch]:
        source, samples = self._splits[split]
        mine = self._shard.of(samples)
        return self._batches(source, list(mine.split(self.EVAL_BATCH)) if len(mine) else [], None)

    def _batches(self, source: ImageSource, batches: list[Tensor], epoch: int | None) -> Iterator[Batch]:
        requests = [Request(batch.numpy(), epoch) for batch in batches]
        with closing(source.batches(iter(requests))) as decoded:
            for request, pixels in zip(requests, decoded, strict=True):
                pixels, labels, mirrored = self._on_device(
                    pixels, source.labels[request.samples], self._mirrored(request)
                )
                _mirror(pixels, mirrored)
                yield self._normalized(pixels), labels

    def _mirrored(self, request: Request) -> Tensor:
        """Which rows of the batch are, (m,), int64."""
        if request.epoch is None or not self._augment.flip:
            return torch.empty(0, dtype=torch.int64)
        return torch.from_numpy(flips(self._seed, request.epoch, request.samples).nonzero()[0])

    def _on_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors on the device; the host waits for the copy alone and not for the steps that are under way."""
        if self._copies is None:
            return tuple(tensor.to(self._device) for tensor in tensors)
        with torch.cuda.stream(self._copies):
            copied = tuple(tensor.to(self._device, non_blocking=True) for tensor in tensors)
        self._copies.synchronize()
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._copies)
        for tensor in copied:
            tensor.record_stream(current)
        return copied

    def _normalized(self, pixels: Tensor) -> Tensor:
        """From (b, S, S, 3), uint8, to (b, 3, S, S), float32, contiguous."""
        images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return images.sub_(self._mean).div_(self._std)


def _mirror(pixels: Tensor, rows: Tensor) -> None:
    """Swap left and right, in place, in those rows of (b, S, S, 3); by the layout whose flip torch has vectorised."""
    mirrored = pixels.index_select(0, rows).permute(0, 3, 1, 2).flip(3).permute(0, 2, 3, 1)
    pixels.index_copy_(0, rows, mirrored)
