"""MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100, read and downloaded by torchvision."""

import contextlib
import os
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import PositiveInt

from asge_zoo.data.augment import Augment
from asge_zoo.data.base import DatasetInfo, Images
from asge_zoo.data.memory import MemoryDataset
from asge_zoo.errors import DataError
from asge_zoo.registry import register


class TorchvisionSet(MemoryDataset):
    """A torchvision dataset. `torchvision_name` is its class there, `folder` where that keeps its files."""

    torchvision_name: ClassVar[str]
    folder: ClassVar[str]

    def found(self, root: Path) -> str | None:
        return str(root / self.folder) if (root / self.folder).is_dir() else None

    def read(self, root: Path) -> tuple[Images, Images]:
        if self.found(root) is None:
            self._download(root)
        try:
            return self._split(root, train=True), self._split(root, train=False)
        except Exception as error:  # whatever a damaged file makes torchvision raise
            raise DataError(
                f"{self.kind} in {root / self.folder} can't be read ({_one_line(error)}); remove that folder and "
                f"fetch the set again"
            ) from error

    def _split(self, root: Path, *, train: bool) -> Images:
        import torchvision.datasets

        stored: Any = getattr(torchvision.datasets, self.torchvision_name)(str(root), train=train)
        pixels = torch.from_numpy(np.asarray(stored.data))
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        return Images(pixels.contiguous(), torch.as_tensor(stored.targets, dtype=torch.int64))

    def _download(self, root: Path) -> None:
        """Fetch into a folder beside and rename, so that a broken download leaves nothing behind."""
        import torchvision.datasets

        created = [folder for folder in (root, *root.parents) if not folder.exists()]
        try:
            root.mkdir(parents=True, exist_ok=True)
            with (
                tempfile.TemporaryDirectory(dir=root, prefix=".download-") as folder,
                contextlib.redirect_stdout(sys.stderr),
            ):
                getattr(torchvision.datasets, self.torchvision_name)(folder, download=True)
                os.rename(Path(folder) / self.folder, root / self.folder)
        except Exception as error:  # network, disk: torchvision raises RuntimeError, URLError, OSError
            for folder in created:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise DataError(
                f"{self.kind} is not under {root} and can't be downloaded ({_one_line(error)}); put torchvision's "
                f"'{self.folder}' folder there, or name its parent with --data-root or ASGE_ZOO_DATA"
            ) from error


def _one_line(error: Exception) -> str:
    return textwrap.shorten(str(error), 160, placeholder=" …")


class GreySet(TorchvisionSet):
    """60,000 + 10,000 grey images of 28×28 pixels; 10,000 held out, as in the paper."""

    validation: PositiveInt = 10000
    class_names: ClassVar[tuple[str, ...]]
    mean: ClassVar[float]
    std: ClassVar[float]

    def stored_info(self) -> DatasetInfo:
        return DatasetInfo(self.class_names, 1, 28, 28, 60000, 10000, (self.mean,), (self.std,))


@register
class MNIST(GreySet):
    """Handwritten digits."""

    kind: Literal["mnist"] = "mnist"
    hub_id = "ylecun/mnist"
    torchvision_name = "MNIST"
    folder = "MNIST"
    class_names = tuple("0123456789")
    mean, std = 0.1307, 0.3081


@register
class FashionMNIST(GreySet):
    """Articles of clothing."""

    kind: Literal["fashion_mnist"] = "fashion_mnist"
    hub_id = "zalando-datasets/fashion_mnist"
    augment: Augment = Augment(flip=True)
    torchvision_name = "FashionMNIST"
    folder = "FashionMNIST"
    class_names = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )
    mean, std = 0.2860, 0.3530


class CIFAR(TorchvisionSet):
    """50,000 + 10,000 colour images of 32×32 pixels; 5,000 held out, as in the paper."""

    augment: Augment = Augment(crop_padding=4, flip=True)
    class_names: ClassVar[tuple[str, ...]]
    mean: ClassVar[tuple[float, float, float]]
    std: ClassVar[tuple[float, float, float]]

    def stored_info(self) -> DatasetInfo:
        return DatasetInfo(self.class_names, 3, 32, 32, 50000, 10000, self.mean, self.std)


@register
class CIFAR10(CIFAR):
    """Ten classes of animals and vehicles."""

    kind: Literal["cifar10"] = "cifar10"
    hub_id = "uoft-cs/cifar10"
    torchvision_name = "CIFAR10"
    folder = "cifar-10-batches-py"
    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@register
class CIFAR100(CIFAR):
    """A hundred classes, 600 images each."""

    kind: Literal["cifar100"] = "cifar100"
    hub_id = "uoft-cs/cifar100"
    torchvision_name = "CIFAR100"
    folder = "cifar-100-python"
    class_names = tuple(
        "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can "
        "castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin "
        "elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard "
        "lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear "
        "pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark "
        "shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone "
        "television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm".split()
    )
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
