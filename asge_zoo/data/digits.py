"""scikit-learn's handwritten digits: real images that need no download."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt

from asge_zoo.data.base import DatasetInfo, Images
from asge_zoo.data.memory import MemoryDataset
from asge_zoo.data.preprocessing import MAX_SIZE
from asge_zoo.errors import DataError
from asge_zoo.registry import register
from asge_zoo.seeding import keyed_generator

TEST_COUNT = 360


@register
class Digits(MemoryDataset):
    """1,797 grey digits of 8×8 pixels (UCI optdigits), upsampled; 360 of them, always the same, are the test."""

    kind: Literal["digits"] = "digits"
    validation: PositiveInt = 180
    batch_size: PositiveInt = Field(default=64, description="Images in a training step.")
    size: PositiveInt | None = Field(default=16, le=MAX_SIZE, description="Side, in pixels, to resize images to.")

    def stored_info(self) -> DatasetInfo:
        return DatasetInfo(
            classes=tuple("0123456789"),
            channels=1,
            height=8,
            width=8,
            train_count=1797 - TEST_COUNT,
            test_count=TEST_COUNT,
            mean=(0.305,),
            std=(0.319,),
        )

    def found(self, root: Path) -> str | None:
        try:
            import sklearn.datasets
        except ImportError:
            return None
        return f"scikit-learn {sklearn.__version__}"

    def read(self, root: Path) -> tuple[Images, Images]:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise DataError("digits come with scikit-learn, which is not installed: pip install scikit-learn") from None
        flat, target = load_digits(return_X_y=True)
        pixels = np.round(flat.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)  # stored as 0 to 16
        images = Images(torch.from_numpy(pixels), torch.from_numpy(target).long())
        order = torch.randperm(len(images), generator=keyed_generator(0, "digits test"))
        return images.take(order[TEST_COUNT:]), images.take(order[:TEST_COUNT])
