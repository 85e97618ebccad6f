"""Small folders of photo-like pictures: smooth, of varied sizes, different each."""

from pathlib import Path

import numpy as np
from PIL import Image


def make_picture(height: int, width: int, rng: np.random.Generator) -> Image.Image:
    """A random RGB picture: a few colours that flow into each other, and a little grain."""
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    grain = rng.normal(0, 3, smooth.shape)
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


def make_folder(
    root: Path, *, classes: int = 3, per_class: int = 4, sizes: tuple[int, int] = (40, 90), seed: int = 0
) -> Path:
    """Fill `root` with folders `n00000000`, `n00000001`, …, of pictures `img_000.JPEG`, …; returns `root`.

    Sides are `sizes[0]` to `sizes[1]` pixels, drawn for each picture; the same arguments give the same files.
    """
    rng = np.random.default_rng(seed)
    for label in range(classes):
        folder = root / f"n{label:08d}"
        folder.mkdir(parents=True)
        for number in range(per_class):
            height, width = (int(side) for side in rng.integers(sizes[0], sizes[1] + 1, 2))
            make_picture(height, width, rng).save(folder / f"img_{number:03d}.JPEG", quality=90)
    return root
