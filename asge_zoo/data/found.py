"""Which datasets are here."""

from pathlib import Path
from typing import Any, cast

from asge_zoo.data.base import Dataset
from asge_zoo.registry import components


def datasets_found(root: Path) -> list[dict[str, Any]]:
    """Every registered dataset: its kind, classes, image shape and counts, and where it lies under `root` (or None)."""
    rows = []
    for kind, component in components("dataset").items():
        dataset = cast(Dataset, component.model_validate({}))
        info = dataset.info()
        rows.append(
            {
                "dataset": kind,
                "classes": len(info.classes),
                "image": f"{info.channels}×{info.height}×{info.width}",
                "train": info.train_count,
                "test": info.test_count,
                "found": dataset.found(root),
            }
        )
    return rows
