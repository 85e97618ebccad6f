"""`bench SPEC`: a spec's step against what else there is, in one interleaved run."""

import contextlib
import statistics
import tempfile
from functools import partial
from typing import Any

import torch
from torch._inductor.utils import fresh_cache

from asge_zoo.bench.machine import machine
from asge_zoo.bench.measure import rounds
from asge_zoo.bench.share import Key, Share, own_process
from asge_zoo.compiler.check import check_spec
from asge_zoo.spec import Spec

AS_TRAINED = ("kernels", "asge_compiled", "asge_eager", "asge_closed_form")  # ours, and the floor that they stand on
WITHOUT_MEMORY = ("kernels", "asge_cuda_graphs", "bp_cuda_graphs")  # a graph holds its memory between steps


def bench_spec(spec: Spec, *, device: torch.device, count: int) -> dict[str, Any]:
    """Time and memory of every way to train a spec's network (see `variants`), as JSON values.

    On the CPU what is ours is timed in a process whose memory is set as `train` sets it, and so is the floor; what a
    user would pick instead, in this one, as it is. Memory is measured in this one.

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
        ZooError: the process of ours ended by itself.
    """
    check_spec(spec)
    share = Share(spec, device)
    with tempfile.TemporaryDirectory() as folder, fresh_cache(dir=folder):  # which keeps its own when interrupted
        times, compile_seconds = _timed(share, spec, count)
        fastest = {
            name: min(ways, key=lambda way: statistics.median(times[name, way]))
            for name, ways in share.variants.items()
        }
        own = {name: times[name, way] for name, way in fastest.items()}
        found: dict[str, Any] = {}
        for name, way in fastest.items():
            found[name] = _summary(own[name], share.batch_size)
            found[name] |= {f"of_{base}": _ratio(own[name], own[base]) for base in ("kernels", "bp_compiled")}
            if len(share.variants[name]) > 1:
                found[name]["chosen"] = way
            if name != "kernels":
                found[name]["compile_seconds"] = compile_seconds[name, way]
            if name not in WITHOUT_MEMORY:
                found[name] |= share.memory((name, way))
    return {
        "spec": spec.name,
        "variants": found,
        "batch_size": share.batch_size,
        "precision": spec.train.precision,
        "rounds": count,
        **machine(device),
    }


def _timed(share: Share, spec: Spec, count: int) -> tuple[dict[Key, list[float]], dict[Key, Any]]:
    """By variant and way: the seconds of a step in each round, and of its first."""
    keys = [(name, way) for name, ways in share.variants.items() for way in ways]
    apart = [key for key in keys if key[0] in AS_TRAINED and share.device.type == "cpu"]
    here = [key for key in keys if key not in apart]
    with own_process(spec, share.device) if apart else contextlib.nullcontext(share) as other:
        compile_seconds = other.warm_up(apart) | share.warm_up(here)
        owners = {key: other if key in apart else share for key in keys}
        timers = {key: partial(owner.step_seconds, key) for key, owner in owners.items()}
        return rounds(timers, count), compile_seconds


def _summary(times: list[float], batch_size: int) -> dict[str, Any]:
    median = statistics.median(times)
    return {
        "ms": 1000 * median,
        "lowest_ms": 1000 * min(times),
        "highest_ms": 1000 * max(times),
        "images_per_second": batch_size / median,
    }


def _ratio(times: list[float], others: list[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(mine / theirs for mine, theirs in zip(times, others, strict=True))
