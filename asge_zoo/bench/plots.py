"""Pictures of what was measured."""

import io
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from asge_zoo.files import write_file

MIB = 2**20


def plot_steps(found: dict[str, Any], file: Path) -> None:
    """Bars of what `bench_spec` found, as PNG: images per second with their spread, and peak memory."""
    variants = found["variants"]
    figure = Figure(figsize=(10, 0.5 * len(variants) + 1.4), layout="constrained")
    speed, memory = figure.subplots(1, 2, sharey=True)
    names = list(variants)
    paces = [variants[name]["images_per_second"] for name in names]
    size = found["batch_size"]
    bounds = [[1000 * size / variants[name][key] for name in names] for key in ("highest_ms", "lowest_ms")]
    spread = [[abs(bound - pace) for bound, pace in zip(side, paces, strict=True)] for side in bounds]
    bars = speed.barh(names, paces, xerr=spread, color=[_color(name) for name in names])
    speed.bar_label(bars, fmt="%.0f", padding=3, label_type="center", color="white")
    speed.set(xlabel="images per second")
    speed.invert_yaxis()
    held = [variants[name].get("peak_bytes", 0) / MIB for name in names]
    memory.bar_label(memory.barh(names, held, color=[_color(name) for name in names]), fmt="%.0f", padding=3)
    memory.set(xlabel="peak memory of a step beyond the resting state (MiB)")
    memory.margins(x=0.15)
    figure.suptitle(f"{found['spec']}, batch {size}, {found['precision']}, {found['device']}")
    save(figure, file)


def _color(name: str) -> str:
    return "tab:gray" if name == "kernels" else "tab:blue" if name.startswith("asge") else "tab:orange"


def save(figure: Figure, file: Path) -> None:
    """Write a figure as PNG, at once or not at all."""
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    write_file(file, content.getvalue())
