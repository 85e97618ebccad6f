"""`bench SPEC`: a spec's step against what else there is, in one interleaved run."""

import statistics
from typing import Any

import torch
from torch._inductor.utils import clear_caches, fresh_cache

from asge_zoo.bench.machine import machine
from asge_zoo.bench.measure import Run, peak_bytes, process_peak_bytes, rounds, seconds
from asge_zoo.bench.variants import Batch, Variant, kernels, random_batch, variants
from asge_zoo.compiler.check import check_spec, parts
from asge_zoo.spec import Spec

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
        the caches on disk), None where nothing compiles. `kernels`, the floor, has no memory; its `chosen` is the
        fastest of the layouts and modes. And what it ran on.

    Raises:
        SpecError: the spec's parts do not fit together; names the field.
    """
    check_spec(spec)
    batch = random_batch(spec, device)
    steps, floors = variants(spec, batch), kernels(spec, batch)
    runs, compile_seconds = _compiled({**floors, **steps}, device)
    times = rounds(runs, count, device)
    chosen = min(floors, key=lambda name: statistics.median(times[name]))
    found = {"kernels": {**_summary(times, chosen, chosen, batch), "chosen": chosen}}
    for name in steps:
        memory = {"peak_bytes": peak_bytes(runs[name], device), "process_peak_bytes": _checked(runs[name], device)}
        found[name] = {**_summary(times, name, chosen, batch), **memory, "compile_seconds": compile_seconds[name]}
    return {
        "spec": spec.name,
        "variants": found,
        "batch_size": parts(spec).data.batch_size,
        "precision": spec.train.precision,
        "rounds": count,
        **machine(device),
    }


def _compiled(made: dict[str, Variant], device: torch.device) -> tuple[dict[str, Run], dict[str, Any]]:
    """Each variant's step, warm, and the seconds of its first call: with empty caches, then from the caches on disk."""
    compiling = [name for name, variant in made.items() if variant.compiles]
    with fresh_cache():
        cold = {name: seconds(made[name].make(), device) for name in compiling}
        torch._dynamo.reset()
        clear_caches()
        runs = {name: variant.make() for name, variant in made.items()}
        warm = {name: seconds(run, device) for name, run in runs.items()}
        rounds(runs, WARM_UP - 1, device)
    return runs, {name: {"cold": cold[name], "warm": warm[name]} if name in cold else None for name in made}


def _summary(times: dict[str, list[float]], name: str, floor: str, batch: Batch) -> dict[str, float]:
    own = times[name]
    median = statistics.median(own)
    return {
        "ms": 1000 * median,
        "lowest_ms": 1000 * min(own),
        "highest_ms": 1000 * max(own),
        "images_per_second": len(batch.labels) / median,
        "of_kernels": _ratio(own, times[floor]),
        "of_bp_compiled": _ratio(own, times["bp_compiled"]),
    }


def _ratio(times: list[float], others: list[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(mine / theirs for mine, theirs in zip(times, others, strict=True))


def _checked(run: Run, device: torch.device) -> int | None:
    return process_peak_bytes(run) if device.type == "cpu" else None
