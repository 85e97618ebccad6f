"""`asge-zoo bench`."""

import json
from pathlib import Path

import click

from asge_zoo.cli import options


@click.command("bench")
@click.option(
    "--data",
    "folder",
    type=options.PATH,
    required=True,
    help="Compare the two loaders of pictures on this folder of class folders, of some hundred or thousand pictures.",
)
@click.option(
    "--size",
    "sizes",
    type=click.IntRange(8, 1024),
    multiple=True,
    default=(160, 224),
    help="Side of the crops, in pixels; repeatable; default 160 and 224.",
)
@click.option("--workers", type=click.IntRange(1), help="Of each loader; default 2, or one where there is one CPU.")
@click.option("--rounds", type=click.IntRange(1), default=5, help="Epochs of each loader at each size; default 5.")
@click.option(
    "--compress-probability",
    type=click.FloatRange(0, 1),
    default=0.5,
    help="Share of the .beton's pictures that are JPEG, as for data write; default 0.5.",
)
@options.device
@options.as_json
def bench(
    folder: Path,
    sizes: tuple[int, ...],
    workers: int | None,
    rounds: int,
    compress_probability: float,
    device: str | None,
    as_json: bool,
) -> None:
    """Measure how many images a second the ffcv and the torch loader give, side by side on the same pictures.

    A .beton of the pictures is written to a temporary folder first, and removed.
    """
    from asge_zoo.engine.device import pick_device
    from asge_zoo.ranks import usable_cpus
    from asge_zoo.report.bench_data import LOADERS, compare_loaders

    workers = workers or min(2, usable_cpus())
    found = compare_loaders(
        folder,
        sizes=sizes,
        workers=workers,
        rounds=rounds,
        device=pick_device(device),
        compress_probability=compress_probability,
    )
    if as_json:
        print(json.dumps(found))
        return
    print(
        f"{found['pictures']} pictures, batches of {found['batch_size']}, {workers} workers of each, {rounds} rounds; "
        f"{found['device']}, {found['cpus']} CPUs"
    )
    for size, measured in found["sizes"].items():
        for name in LOADERS:
            pace = measured[name]
            print(
                f"{size:>4} px  {name:<5} {pace['images_per_second']:7.0f} images/s  "
                f"({pace['lowest']:.0f} to {pace['highest']:.0f})"
            )
        print(f"{size:>4} px  ffcv is {measured['ratio']:.2f} times as fast")
