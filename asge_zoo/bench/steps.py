"""`bench SPEC`: a spec's step against what else there is, in one interleaved run."""

import statistics
from typing import Any

import torch
from torch._inductor.utils import clear_caches, fresh_cache

from asge_zoo.bench.machine import machine
from asge_zoo.bench.measure import Run, peak_bytes, process_peak_bytes, rounds, seconds
from asge_zoo.bench.variants import Batch, Variant, random_batch, variants
from asge_zoo.compiler.check import check_spec, parts
from asge_zoo.spec import Spec

Key = tuple[str, str]  # a variant and the way that it is run
WITHOUT_MEMORY = ("kernels", "asge_cuda_graphs", "bp_cuda_graphs")  # a graph holds its memory between steps
WARM_UP = 2  # calls of each variant that are not timed, the first of which compiles


def bench_spec(spec: Spec, *, device: torch.device, count: int) -> dict[str, Any]:
    """Time and memory of every way to train a spec's network (see `variants`), as JSON values.

    Args:
        spec: whose network, batch size, precision and optimizer to take.
        device: where to run.
        count: rounds, each of which runs every variant once.

    Returns:
        `variants`: by name `ms` (the rounds' median), `lowest_ms`, `highest_ms`, `images_per_second`; `of_kernels` and
        `of_bp_compiled`, medians of the rounds' ratios of times; `peak_bytes` of a step beyond the resting state and
        `process_peak_bytes`, its check; `compile_seconds`, of the first step `cold` (nothing cached) and `warm` (from
        the caches on disk), None where nothing compiles; and where there are several ways to run it, in which layout
        for one, `chosen`, the fastest. `kernels`, the floor, has no memory, nor have CUDA graphs, which hold between
        steps what the same step without them takes. And what it ran on.

    Raises:
        SpecError: the spec's parts do not fit together; names the field.
    """
    check_spec(spec)
    batch = random_batch(spec, device)
    made = variants(spec, batch)
    runs, compile_seconds = _compiled(made, device)
    times = rounds(runs, count, device)
    fastest = {name: min(ways, key=lambda way: statistics.median(times[name, way])) for name, ways in made.items()}
    own = {name: times[name, way] for name, way in fastest.items()}
    found: dict[str, Any] = {}
    for name, way in fastest.items():
        found[name] = _summary(own[name], batch)
        found[name] |= {f"of_{base}": _ratio(own[name], own[base]) for base in ("kernels", "bp_compiled")}
        if len(made[name]) > 1:
            found[name]["chosen"] = way
        if name != "kernels":
            found[name]["compile_seconds"] = compile_seconds[name, way]
        if name not in WITHOUT_MEMORY:
            run = runs[name, way]
            found[name] |= {"peak_bytes": peak_bytes(run, device), "process_peak_bytes": _checked(run, device)}
    return {
        "spec": spec.name,
        "variants": found,
        "batch_size": parts(spec).data.batch_size,
        "precision": spec.train.precision,
        "rounds": count,
        **machine(device),
    }


def _compiled(made: dict[str, Variant], device: torch.device) -> tuple[dict[Key, Run], dict[Key, Any]]:
    """By variant and way: its step, warm, and the seconds of its first call, with empty caches and with the disk's."""
    ways = {(name, key): way for name, variant in made.items() for key, way in variant.items()}
    with fresh_cache():
        cold = {key: seconds(way.make(), device) for key, way in ways.items() if way.compiles}
        torch._dynamo.reset()
        clear_caches()
        runs = {key: way.make() for key, way in ways.items()}
        warm = {key: seconds(run, device) for key, run in runs.items()}
        rounds(runs, WARM_UP - 1, device)
    return runs, {key: {"cold": cold[key], "warm": warm[key]} if key in cold else None for key in ways}


def _summary(times: list[float], batch: Batch) -> dict[str, Any]:
    median = statistics.median(times)
    return {
        "ms": 1000 * median,
        "lowest_ms": 1000 * min(times),
        "highest_ms": 1000 * max(times),
        "images_per_second": len(batch.labels) / median,
    }


def _ratio(times: list[float], others: list[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(mine / theirs for mine, theirs in zip(times, others, strict=True))


def _checked(run: Run, device: torch.device) -> int | None:
    return process_peak_bytes(run) if device.type == "cpu" else None
