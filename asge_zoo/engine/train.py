"""The training loop, from a spec to a run directory.

    spec.json, environment.json   what was run, on what
    metrics.jsonl                 a line an epoch
    checkpoints/epoch-0007/       see `checkpoint`; `best` and `last` link to two of them
    curves.png, units.png         accuracy and loss by epoch; accuracy by unit
    result.json                   the test, when all is done

With several runs, each seed has such a directory of its own, `seed-0` and so on; beside them stand the `spec.json` of
them all and, when the last is done, their `result.json`.
"""

import json
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from asge_zoo.compiler.build import compile_spec
from asge_zoo.compiler.check import parts
from asge_zoo.data.base import Loader
from asge_zoo.data.base import data_root as find_data_root
from asge_zoo.engine.checkpoint import METRICS, SPEC
from asge_zoo.engine.device import deterministic, environment, pick_device
from asge_zoo.engine.keeper import CheckpointKeeper
from asge_zoo.engine.lock import locked
from asge_zoo.engine.progress import RunProgress
from asge_zoo.engine.result import RunResult, combine, test_best
from asge_zoo.engine.run_dir import (
    check_resumable,
    check_unused,
    choose_run_dir,
    resume_command,
    start_run_dir,
    write_spec,
)
from asge_zoo.engine.signals import StopRequested, StopSignals
from asge_zoo.engine.state import TrainState, begin
from asge_zoo.errors import CheckpointError, SpecError, Stopped
from asge_zoo.evaluate import Evaluation, evaluate, evaluate_alternatives
from asge_zoo.files import WriteError, append_line
from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.seeding import keyed_seed
from asge_zoo.spec import Spec

SETTLE_EVERY = 50  # steps between looks at whether the losses are finite, each of which waits for the device


def train(
    spec: Spec,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    device: str | None = None,
    data_root: str | Path | None = None,
) -> RunResult:
    """Train by a spec, every run of it, and test each run's best checkpoint.

    SIGINT and SIGTERM end it after the step under way, with a checkpoint saved; a second one ends it at once.

    Args:
        spec: what to train.
        run_dir: where to write, a new directory; `runs/<name>` if not given.
        resume: go on from the newest whole checkpoint in `run_dir`, to the very weights that a run without a break
            comes to; from the start where nothing has been saved yet.
        device: a torch device; if not given, a CUDA GPU if there is one, else the CPU.
        data_root: where datasets lie; if not given, $ASGE_ZOO_DATA, else the user's cache.

    Raises:
        SpecError: the spec's parts do not fit together, it is not the one to resume by, there is no such device, or
            torch.compile does not work.
        DataError: the dataset is missing or unreadable.
        CheckpointError: the run directory is taken, in use or can't be written to, or no whole checkpoint is left.
        DivergenceError: losses or weights are no longer finite.
        Stopped: by a signal.
    """
    chosen, root = pick_device(device), find_data_root(data_root)
    folder = choose_run_dir(spec, run_dir, resume=resume)
    rng_devices = [chosen] if chosen.type == "cuda" else []
    go_on = f"go on with `{resume_command(folder, device, data_root)}`"
    try:
        with (
            torch.random.fork_rng(devices=rng_devices),  # the caller's generator stays as it was
            deterministic(spec.train.deterministic),
            StopSignals() as stop,
            locked(folder),
        ):
            if not resume:
                check_unused(folder)  # another process may have been there since
            return _train_runs(spec, folder, chosen, root, stop, resume)
    except Stopped as stopped:
        if not (folder / SPEC).exists():
            raise
        raise Stopped(stopped.signal, f"{stopped}; {go_on}") from None
    except WriteError as error:
        rest = f", then {go_on}; checkpoints saved before are as they were" if (folder / SPEC).exists() else ""
        raise CheckpointError(f"{error.filename}: can't be written ({error.strerror}); {error.remedy}{rest}") from error


def _train_runs(
    spec: Spec, folder: Path, device: torch.device, root: Path, stop: StopSignals, resume: bool
) -> RunResult:
    check_resumable(folder, spec)
    if spec.train.runs == 1:
        return _train_seed(spec, folder, device, root, stop, resume)
    results = []
    for seed in range(spec.train.seed, spec.train.seed + spec.train.runs):
        own, single = folder / f"seed-{seed}", spec.for_seed(seed)
        with locked(own):
            check_resumable(own, single)
            begun = resume and (own / SPEC).exists()
            results.append(
                _train_seed(single, own, device, root, stop, begun, on_start=lambda: write_spec(folder, spec))
            )
    return combine(folder, results)


def _train_seed(
    spec: Spec,
    folder: Path,
    device: torch.device,
    root: Path,
    stop: StopSignals,
    resume: bool,
    on_start: Callable[[], None] = lambda: None,
) -> RunResult:
    """Train a single run; `on_start` is called once all that can be refused has been, before the first file."""
    started = time.perf_counter()
    graph = compile_spec(spec, device=device)
    loader = parts(spec).data.loader(root, seed=spec.train.seed, device=device)
    state = begin(spec, graph, loader.steps(), started)
    keeper = CheckpointKeeper(folder, spec.train.checkpoint)
    with RunProgress(spec.name, spec.train.epochs * loader.steps() * loader.batch_size) as progress:
        if resume and not keeper.restore(state, progress.warn):
            progress.warn(f"{folder}: holds no checkpoint yet; starts from the beginning")
        if not state.finished:
            if spec.train.compile:
                progress.say(f"{spec.name}: compiling the step, about half a minute if it is not cached")
            try_step(graph, loader)
        on_start()
        start_run_dir(folder, spec, environment(device, root, spec.plugins), state, progress.warn)
        if state.total_steps:
            keeper.keep(state, newer=True)
        progress.begin(state.total_steps * loader.batch_size)
        progress.say(f"{spec.name}: seed {spec.train.seed} on {device}, writing to {folder}")
        with stop.deferred(), keeper.naming_last_good():
            try:
                fit(state, loader, keeper, stop, progress)
            except StopRequested as stopped:
                keeper.save(state)
                raise Stopped(stopped.signal, f"{stopped}, its state saved as {state.name}") from None
        return test_best(folder, state, loader)


def try_step(graph: LocalGraph, loader: Loader) -> None:
    """Run the training step once, on the first batch, which compiles it; changes nothing else.

    Raises:
        SpecError: torch's compiler does not work here, or the step has no deterministic algorithm.
    """
    graph.train()
    try:
        graph.step(*next(loader.train_batches(0)))
    except Exception as error:  # whatever torch's compiler, or the C++ compiler behind it, raises
        reason = textwrap.shorten(str(error), 160, placeholder=" …")
        if "use_deterministic_algorithms" in str(error):
            raise SpecError(
                f"train.deterministic: part of the step has no deterministic algorithm here ({reason}); train with "
                f"--set train.deterministic=false"
            ) from error
        if not graph.compiled:
            raise
        raise SpecError(
            f"train.compile: torch.compile does not work here ({reason}); install a C++ compiler (g++), or train with "
            f"--set train.compile=false; `asge-zoo doctor` tells more"
        ) from error


def fit(state: TrainState, loader: Loader, keeper: CheckpointKeeper, stop: StopSignals, progress: RunProgress) -> None:
    """Train to the last epoch, from wherever `state` stands.

    Raises:
        DivergenceError: losses or weights are not finite.
        StopRequested: a signal waits; `state` is between two steps.
    """
    while not state.finished:
        train_epoch(state, loader, keeper, stop, progress)
        validation = select_and_validate(state.graph, loader, stop)
        best_before = state.best
        record = state.end_epoch(validation)
        append_line(keeper.folder / METRICS, json.dumps(asdict(record)))
        progress.epoch(record, state.spec.train.epochs)
        if keeper.due(state, improved=state.best is not best_before):
            keeper.save(state)
        stop.check()


def train_epoch(
    state: TrainState, loader: Loader, keeper: CheckpointKeeper, stop: StopSignals, progress: RunProgress
) -> None:
    """The steps that are left of the epoch under way; raises as `fit` does."""
    state.graph.train()
    with state.epoch_time.running():
        for images, labels in loader.train_batches(state.epoch, start=state.step):
            train_step(state, images, labels)
            progress.advance(len(labels))
            if state.step % SETTLE_EVERY == 0:
                state.check_losses()
            if keeper.due(state):
                keeper.save(state)
            stop.check()
        state.check_finite()


def train_step(state: TrainState, images: Tensor, labels: Tensor) -> None:
    """One step: local gradients, the optimizer, the schedule, running statistics."""
    torch.manual_seed(keyed_seed(state.spec.train.seed, "step", state.epoch, state.step))  # for dropout
    result = state.graph.step(images, labels)
    for name, gradient in result.grads.items():
        state.parameters[name].grad = gradient
    state.optimizer.step()
    state.scheduler.step()
    for name, value in result.buffers.items():
        state.buffers[name].copy_(value)
    state.meter.update(result, labels)
    state.step += 1


def select_and_validate(graph: LocalGraph, loader: Loader, stop: StopSignals) -> Evaluation:
    """Validation accuracy, once the prediction has chosen (the best unit, say) by its alternatives' own."""
    measured, accuracy = evaluate_alternatives(graph, stop.watch(loader.split_batches("validation")))
    if graph.prediction.select(graph.head, accuracy):
        return evaluate(graph, stop.watch(loader.split_batches("validation")))
    return measured
