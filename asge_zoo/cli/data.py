"""`asge-zoo data`."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from asge_zoo.cli import options
from asge_zoo.errors import DataError, Stopped

IMAGENET_CLASSES = 1000


@click.group("data")
def data() -> None:
    """Write image folders to FFCV's .beton files, and check those."""


@data.command("write")
@click.argument("kind", type=click.Choice(["imagenet", "imagefolder"]))
@click.option(
    "--from", "source", type=options.PATH, help="A folder of class folders; default <data-root>/imagenet/<split>."
)
@click.option("--to", "file", type=options.PATH, help="The file to write; default <data-root>/imagenet/<split>.beton.")
@click.option("--split", type=click.Choice(["train", "val"]), help="Which of ImageNet's folders; default train.")
@click.option("--max-resolution", type=int, default=500, help="Shrink to this longer side in pixels; default 500.")
@click.option("--compress-probability", type=float, default=0.5, help="Share stored as JPEG, not raw; default 0.5.")
@click.option("--quality", type=int, default=90, help="Of those JPEGs, 1 to 100; default 90.")
@click.option("--skip-unreadable", is_flag=True, help="Leave unreadable images out, in place of stopping at the first.")
@click.option("--workers", type=int, help="Processes that read and encode; default one for each usable CPU.")
@options.data_root
@options.as_json
def write(
    kind: str,
    source: Path | None,
    file: Path | None,
    split: str | None,
    max_resolution: int,
    compress_probability: float,
    quality: int,
    skip_unreadable: bool,
    workers: int | None,
    data_root: Path | None,
    as_json: bool,
) -> int:
    """Write a folder of class folders to a .beton file and its manifest: ImageNet, or any imagefolder.

    Default options are ffcv-imagenet's. The file is there when it is whole, and not before.
    """
    if kind == "imagefolder" and (source is None or file is None):
        raise click.UsageError("imagefolder needs --from and --to.")
    if kind == "imagefolder" and split is not None:
        raise click.UsageError("--split is ImageNet's; imagefolder takes what --from names.")
    from asge_zoo.data.base import data_root as root_of
    from asge_zoo.data.beton_writer import class_folders, write_beton
    from asge_zoo.engine.signals import StopSignals

    folder = root_of(data_root) / "imagenet"
    source, file = source or folder / (split or "train"), file or folder / f"{split or 'train'}.beton"
    if kind == "imagenet" and (count := len(class_folders(source))) != IMAGENET_CLASSES:
        raise DataError(
            f"{source}: has {count} class folders, and ImageNet {IMAGENET_CLASSES}; write other sets by "
            f"`asge-zoo data write imagefolder`"
        )
    try:
        with StopSignals(), _progress() as (on_progress, warn):
            written = write_beton(
                source,
                file,
                max_resolution=max_resolution,
                compress_probability=compress_probability,
                quality=quality,
                skip_unreadable=skip_unreadable,
                workers=workers,
                on_progress=on_progress,
                warn=warn,
            )
    except Stopped as stopped:
        print(f"asge-zoo: {stopped}; nothing is left behind", file=sys.stderr)
        return stopped.exit_code
    manifest = written.manifest
    if as_json:
        report = {"file": str(file), "count": manifest.count, "classes": len(manifest.classes)}
        print(json.dumps({**report, "skipped": written.skipped, "bytes": manifest.size, "sha256": manifest.sha256}))
    else:
        left_out = f", {len(written.skipped)} left out" if written.skipped else ""
        print(f"{file}: {manifest.count:,} images of {len(manifest.classes):,} classes{left_out}")
        print(f"{manifest.size / 1e6:,.1f} MB, sha256 {manifest.sha256}")
    return 0


@data.command("verify")
@click.argument("file", type=options.PATH)
@options.as_json
def verify(file: Path, as_json: bool) -> int:
    """Check FILE, a .beton, against its manifest: its size, its index, and every image's CRC.

    Exit code 1 if it is damaged.
    """
    from asge_zoo.data.beton import verify_beton

    if not file.is_file():
        raise DataError(f"{file}: no such file; name a .beton")
    with _progress() as (on_progress, _):
        problems = verify_beton(file, on_progress)
    if as_json:
        print(json.dumps({"file": str(file), "ok": not problems, "problems": problems}))
    else:
        for problem in problems:
            print(problem)
        print(f"{file}: {f'problems: {len(problems)}' if problems else 'whole'}")
    return 1 if problems else 0


@contextlib.contextmanager
def _progress() -> Iterator[tuple[Callable[[str, int, int], None], Callable[[str], None]]]:
    """A bar for what is under way, on stderr where that is a terminal; and what prints a warning there in any case."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(show_speed=True))
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks = {}

        def on_progress(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bar.add_task(step, total=total)
            bar.update(tasks[step], completed=done)

        yield on_progress, lambda line: console.print(f"asge-zoo: {line}", markup=False)
