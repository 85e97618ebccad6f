"""Pictures of a run, from its epochs' records."""

import io
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from asge_zoo.engine.meter import EpochRecord
from asge_zoo.files import write_file

SPLITS = {"train": "training", "validation": "validation"}


def plot_curves(records: list[EpochRecord], file: Path, *, title: str) -> None:
    """Accuracy and loss of the prediction by epoch, training and validation, where they were measured."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    epochs = [record.epoch for record in records]
    for axes, quantity, unit in zip(figure.subplots(1, 2), ("accuracy", "loss"), ("%", "nats"), strict=True):
        for split, label in SPLITS.items():
            values = [getattr(getattr(record, split), quantity) for record in records]
            if None not in values:
                axes.plot(epochs, values, marker=".", label=label)
        axes.set(xlabel="epoch", ylabel=f"{quantity} ({unit})")
        axes.grid(alpha=0.3)
        axes.legend()
    _save(figure, file, title)


def plot_units(record: EpochRecord, names: list[str], file: Path, *, title: str) -> None:
    """Accuracy of each unit's own logits after an epoch (the paper's Figure 3), where it was measured."""
    figure = Figure(figsize=(max(5.0, 0.45 * len(names)), 3.6), layout="constrained")
    axes = figure.subplots()
    for split, label in SPLITS.items():
        if accuracy := getattr(record, split).unit_accuracy:
            axes.plot(range(len(names)), accuracy, marker="o", label=label)
    axes.set(xlabel="unit", ylabel="accuracy (%)")
    axes.set_xticks(range(len(names)), names, rotation=90 if len(names) > 12 else 0)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, file, f"{title}, epoch {record.epoch}")


def _save(figure: Figure, file: Path, title: str) -> None:
    figure.suptitle(title)
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    write_file(file, content.getvalue())
