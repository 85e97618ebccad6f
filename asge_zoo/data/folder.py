"""Datasets of one's own pictures: `train/` and `val/`, folders of class folders, or FFCV's files made of them."""

from abc import abstractmethod
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import AfterValidator, ConfigDict, Field, NonNegativeInt, PositiveInt
from pydantic_core import PydanticCustomError

from asge_zoo.data.base import Dataset, DatasetInfo
from asge_zoo.data.beton import import_ffcv
from asge_zoo.data.crops import EVAL_SHARE, ResizedCrop
from asge_zoo.data.ffcv_source import BetonSource
from asge_zoo.data.image_loader import Cropping, ImageLoader, ImageSource, Split
from asge_zoo.data.preprocessing import MAX_SIZE
from asge_zoo.data.torch_source import FolderSource
from asge_zoo.errors import DataError, SpecError
from asge_zoo.ranks import ALONE, Shard, local_world_size, usable_cpus
from asge_zoo.registry import register
from asge_zoo.seeding import keyed_generator


def _within_the_root(folder: str) -> str:
    path = PurePosixPath(folder)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise PydanticCustomError("folder", "must be a folder under the data root, without '..'")
    return folder


def _distinct(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise PydanticCustomError("classes", "names must be distinct")
    return names


Folder = Annotated[str, AfterValidator(_within_the_root)]
Count = Annotated[int, Field(ge=2, le=100_000)]
Names = Annotated[list[str], Field(min_length=2), AfterValidator(_distinct)]


class Library(NamedTuple):
    """What decodes.

    Attributes:
        name: ffcv or torch.
        suffix: of what it reads, behind `train` and `val`.
        source: opens that.
        why: it is not ffcv, where that was not asked for.
    """

    name: str
    suffix: str
    source: Callable[..., ImageSource]
    why: str = ""


FFCV = Library("ffcv", ".beton", BetonSource)
TORCH = Library("torch", "", FolderSource)


class FolderDataset(Dataset):
    """Pictures in class folders; `class_names` and `check_classes` are all there is to write."""

    model_config = ConfigDict(serialize_by_alias=True)  # `loader` is the contract's method, too

    eval_crop: ClassVar[float] = EVAL_SHARE
    mean: ClassVar[tuple[float, float, float]] = (0.485, 0.456, 0.406)  # ImageNet's
    std: ClassVar[tuple[float, float, float]] = (0.229, 0.224, 0.225)

    folder: Folder
    size: PositiveInt = Field(default=224, le=MAX_SIZE, description="Side, in pixels, that crops are resized to.")
    validation: PositiveInt = Field(
        default=10000, description="Training images held out for selection; the test images never select anything."
    )
    test: PositiveInt | None = Field(
        default=None,
        description="Training images set apart as the test, the same for every seed, where there is no val; null: val.",
    )
    augment: ResizedCrop = Field(default=ResizedCrop(), description="Random changes to training images.")
    loader_: Literal["auto", "ffcv", "torch"] = Field(
        default="auto",
        alias="loader",
        description="What decodes: ffcv (.beton files), torch (folders), or auto: ffcv where it and its files are.",
    )
    workers: NonNegativeInt | None = Field(
        default=None, le=256, description="Threads (ffcv) or processes (torch) that decode; null: this process's CPUs."
    )

    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """In the order of the labels."""

    @abstractmethod
    def check_classes(self, folders: tuple[str, ...]) -> None:
        """Refuse class folders, sorted, that are not those of `class_names`.

        Raises:
            SpecError, DataError: of one line.
        """

    def info(self) -> DatasetInfo:
        return DatasetInfo(
            classes=self.class_names(),
            channels=3,
            height=self.size,
            width=self.size,
            train_count=None,
            test_count=self.test,
            mean=self.mean,
            std=self.std,
        )

    def loader(self, root: Path, *, seed: int, device: torch.device, shard: Shard = ALONE) -> ImageLoader:
        """As `Dataset.loader`; `described` of what it gives says which library was chosen, and what it reads.

        Raises:
            DataError: pictures are missing, or the library that was asked for can't read them.
            SpecError: the spec's classes or counts are not the folder's.
        """
        library = self._library(root)
        open_source = partial(
            library.source,
            cropping=Cropping(self.size, seed, self.augment),
            workers=self.worker_count(),
            pinned=device.type == "cuda",
        )
        train = open_source(self._part(root, "train", library.suffix))
        self.check_classes(train.classes)
        samples = torch.arange(len(train.labels))
        if self.test is None:
            path = self._part(root, "val", library.suffix)
            if not path.exists():
                raise DataError(
                    f"{path}: is missing; add it, or have training images set apart as the test by data.test"
                )
            source = open_source(path)
            if source.classes != train.classes:
                raise DataError(f"{path}: its class folders are not those of train; make both hold the same")
            test = Split(source, torch.arange(len(source.labels)))
        else:
            if self.test >= len(samples):
                raise SpecError(f"data.test: {self.test} of {len(samples)} training images leave none; lower it")
            order = torch.randperm(len(samples), generator=keyed_generator(0, f"{self.kind} test"))
            test = Split(train, order[: self.test].sort().values)
            samples = order[self.test :].sort().values
        self.check_counts(len(samples))
        return ImageLoader(
            train=Split(train, samples),
            validation=self.validation,
            test=test,
            info=self.info(),
            batch_size=self.batch_size,
            augment=self.augment,
            seed=seed,
            device=device,
            shard=shard,
            described=f"{library.name} ({self.folder}/train{library.suffix}, {len(train.labels):,} images)"
            f"{library.why}",
        )

    def found(self, root: Path) -> str | None:
        here = any(self._part(root, "train", library.suffix).exists() for library in (FFCV, TORCH))
        return str(root / self.folder) if here else None

    def _part(self, root: Path, name: str, suffix: str) -> Path:
        return root / self.folder / f"{name}{suffix}"

    def worker_count(self) -> int:
        """Workers of this process: as given, or its share of the CPUs, where torchrun has started several of it."""
        return max(1, usable_cpus() // local_world_size()) if self.workers is None else self.workers

    def _library(self, root: Path) -> Library:
        """By `data.loader`, and for auto by what is here."""
        if self.loader_ == "torch":
            return TORCH
        needed = [self._part(root, name, FFCV.suffix) for name in (["train"] if self.test else ["train", "val"])]
        missing = [path for path in needed if not path.is_file()]
        if self.loader_ == "ffcv":
            if missing:
                raise DataError(
                    f"data.loader: ffcv needs {missing[0]}, which is not there; write it by `asge-zoo data write`, "
                    f"or set data.loader=torch to read the folders"
                )
            return FFCV
        if missing:
            return TORCH._replace(why=f"; for ffcv, {missing[0]} is missing")
        try:
            import_ffcv()
        except DataError as error:
            return TORCH._replace(why=f"; {error}")
        return FFCV


@register
class ImageFolder(FolderDataset):
    """Pictures of your own, RGB, any sizes: `train/` and `val/` with a folder for each class."""

    kind: Literal["imagefolder"] = "imagefolder"
    folder: Folder = Field(default="images", description="The folder of train and val, under the data root.")
    classes: Count | Names = Field(
        default=10, description="How many class folders there are, or names for them, in sorted order."
    )

    def class_names(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.classes))) if isinstance(self.classes, int) else tuple(self.classes)

    def check_classes(self, folders: tuple[str, ...]) -> None:
        names = self.class_names()
        if len(folders) != len(names):
            raise SpecError(
                f"data.classes: {self.folder} has {len(folders)} class folders and not {len(names)}; "
                f"set data.classes={len(folders)}"
            )
        if folders != names and set(folders) == set(names):
            raise SpecError("data.classes: labels go by the class folders' sorted names; sort data.classes likewise")


@register
class ImageNet(FolderDataset):
    """ImageNet (ILSVRC 2012), 1,000 classes: 1.28 million pictures; the 50,000 validation images are the test."""

    kind: Literal["imagenet"] = "imagenet"
    hub_id: ClassVar[str | None] = "ILSVRC/imagenet-1k"
    folder: Folder = Field(default="imagenet", description="The folder of train and val, under the data root.")
    batch_size: PositiveInt = Field(default=512, description="Images in a training step.")

    def class_names(self) -> tuple[str, ...]:
        return tuple(_imagenet_classes().values())

    def folder_names(self) -> tuple[str, ...]:
        """The class folders' names, WordNet ids, in the order of the labels."""
        return tuple(_imagenet_classes())

    def check_classes(self, folders: tuple[str, ...]) -> None:
        ids = self.folder_names()
        if folders != ids:
            odd = sorted(set(folders) ^ set(ids))[0]
            what = "has no" if odd in ids else "has a"
            raise DataError(
                f"{self.folder}: {what} class folder {odd}; ImageNet's are its 1,000 WordNet ids, n01440764 to "
                f"n15075141, and for other pictures there is data.kind=imagefolder"
            )


@cache
def _imagenet_classes() -> dict[str, str]:
    """Names by WordNet id, in the order of the labels."""
    from timm.data.imagenet_info import ImageNetInfo

    known = ImageNetInfo()
    ids = known.label_names()
    names = [known.label_name_to_description(each, detailed=False) for each in ids]
    # the bird and the machine are both called crane
    return {i: name if names.count(name) == 1 else f"{name} ({i})" for i, name in zip(ids, names, strict=True)}
