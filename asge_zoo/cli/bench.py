"""`asge-zoo bench`: a step by SPEC, loaders by --data, or commands by --startup."""

import json
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from asge_zoo.cli import options, tables

MIB = 2**20
# What each option is for; --rounds, --json and --device serve all that they can.
PURPOSES = {
    "SPEC": ("batch_size", "precision", "plot", "overrides"),
    "--data": ("sizes", "workers", "compress_probability"),
}


@click.command("bench")
@click.argument("spec", required=False)
@click.option(
    "--data",
    "folder",
    type=options.PATH,
    help="Compare the two loaders of pictures on this folder of class folders, of some hundred or thousand pictures.",
)
@click.option("--startup", is_flag=True, help="Measure how long commands take that train nothing.")
@click.option("--rounds", type=click.IntRange(1), default=7, help="Each measures everything once; default 7.")
@click.option("--batch-size", type=click.IntRange(1), help="SPEC: images in a step; default the spec's.")
@click.option(
    "--precision", type=click.Choice(["float32", "bfloat16"]), help="SPEC: arithmetic; default the spec's own."
)
@click.option("--plot", type=options.PATH, help="SPEC: write a bar chart to this PNG file.")
@click.option(
    "--size",
    "sizes",
    type=click.IntRange(8, 1024),
    multiple=True,
    default=(160, 224),
    help="--data: side of the crops, in pixels; repeatable; default 160 and 224.",
)
@click.option("--workers", type=click.IntRange(1), help="--data: of each loader; default 2, or one of one CPU.")
@click.option(
    "--compress-probability",
    type=click.FloatRange(0, 1),
    default=0.5,
    help="--data: share of the .beton's pictures that are JPEG, as for data write; default 0.5.",
)
@options.overrides
@options.device
@options.as_json
def bench(spec: str | None, folder: Path | None, startup: bool, as_json: bool, **how: Any) -> None:
    """Measure SPEC's training step beside backpropagation, a loop over layers and the bare convolution kernels.

    Each in every round, medians of the rounds; compilation starts from empty caches. Data is random, of the spec's
    shapes. On the CPU our own steps run in a process whose memory is set as train's is, and the others in an ordinary
    one. With --data the two loaders of pictures are compared, on a .beton in a temporary folder; with --startup
    commands are timed.
    """
    given = {"SPEC": spec is not None, "--data": folder is not None, "--startup": startup}
    if sum(given.values()) != 1:
        raise click.UsageError("give one of SPEC, --data FOLDER and --startup")
    _check_purposes(given)
    if spec is not None:
        found, table = _steps(spec, **how)
    elif folder is not None:
        found, table = _loaders(folder, **how)
    else:
        found, table = _startup(how["rounds"])
    if as_json:
        print(json.dumps(found))
    else:
        tables.console().print(table)


def _check_purposes(given: dict[str, bool]) -> None:
    context = click.get_current_context()
    for purpose, names in PURPOSES.items():
        for parameter in context.command.params:
            typed = parameter.name and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
            if typed and parameter.name in names and not given[purpose]:
                raise click.UsageError(f"{parameter.opts[0]} goes with {purpose}; leave it out")


def _steps(
    name: str,
    *,
    rounds: int,
    batch_size: int | None,
    precision: str | None,
    plot: Path | None,
    overrides: tuple[str, ...],
    device: str | None,
    **_: Any,
) -> tuple[dict[str, Any], Any]:
    from asge_zoo.bench.plots import plot_steps
    from asge_zoo.bench.steps import bench_spec
    from asge_zoo.engine.device import pick_device
    from asge_zoo.spec import load_spec

    own = {"data.batch_size": batch_size, "train.precision": precision}
    changes = [f"{path}={value}" for path, value in own.items() if value is not None]
    found = bench_spec(load_spec(name, overrides=[*overrides, *changes]), device=pick_device(device), count=rounds)
    if plot is not None:
        plot_steps(found, plot)
    table = tables.table(
        f"{found['spec']}, batch {found['batch_size']}, {found['precision']}, {rounds} rounds; {_where(found)}",
        (
            "",
            "ms",
            "lowest",
            "highest",
            "images/s",
            "of kernels",
            "of bp_compiled",
            "peak MiB",
            "compile s",
            "cached s",
        ),
    )
    for variant, measured in found["variants"].items():
        compiled = measured.get("compile_seconds") or {}
        table.add_row(
            variant,
            *(f"{measured[key]:.1f}" for key in ("ms", "lowest_ms", "highest_ms", "images_per_second")),
            *(f"{measured[key]:.2f}" for key in ("of_kernels", "of_bp_compiled")),
            f"{measured['peak_bytes'] / MIB:.1f}" if "peak_bytes" in measured else "-",
            *(f"{compiled[key]:.1f}" if compiled else "-" for key in ("cold", "warm")),
        )
    return found, table


def _loaders(
    folder: Path,
    *,
    rounds: int,
    sizes: tuple[int, ...],
    workers: int | None,
    compress_probability: float,
    device: str | None,
    **_: Any,
) -> tuple[dict[str, Any], Any]:
    from asge_zoo.bench.loaders import LOADERS, compare_loaders
    from asge_zoo.engine.device import pick_device
    from asge_zoo.ranks import usable_cpus

    found = compare_loaders(
        folder,
        sizes=sizes,
        workers=workers or min(2, usable_cpus()),
        rounds=rounds,
        device=pick_device(device),
        compress_probability=compress_probability,
    )
    table = tables.table(
        f"{found['pictures']} pictures, batches of {found['batch_size']}, {found['workers']} workers of each, "
        f"{rounds} rounds; {_where(found)}",
        ("", "", "images/s", "lowest", "highest", "ffcv is as fast"),
    )
    for size, measured in found["sizes"].items():
        for name in LOADERS:
            paces = (f"{measured[name][key]:.0f}" for key in ("images_per_second", "lowest", "highest"))
            table.add_row(f"{size} px", name, *paces, f"{measured['ratio']:.2f} times" if name == "ffcv" else "")
    return found, table


def _startup(rounds: int) -> tuple[dict[str, Any], Any]:
    from asge_zoo.bench.startup import bench_startup

    found = bench_startup(count=rounds)
    table = tables.table(f"{rounds} rounds; {_where(found)}", ("", "ms", "lowest", "highest"))
    for command, measured in found["commands"].items():
        table.add_row(command, *(f"{measured[key]:.0f}" for key in ("ms", "lowest_ms", "highest_ms")))
    return found, table


def _where(found: dict[str, Any]) -> str:
    return f"{found['device']}, {found['threads']} threads, torch {found['versions']['torch']}"
