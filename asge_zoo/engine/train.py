"""The training loop, from a spec to a run directory.

    spec.json, environment.json   what was run, on what
    metrics.jsonl                 a line an epoch
    checkpoints/epoch-0007/       see `checkpoint`; `best` and `last` link to two of them
    curves.png, units.png         accuracy and loss by epoch; accuracy by unit
    result.json                   the test, when all is done

With several runs, each seed has such a directory of its own, `seed-0` and so on; beside them stand the `spec.json` of
them all and, when the last is done, their `result.json`.
"""

import contextlib
import json
import signal
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asge_zoo.compiler.build import compile_spec
from asge_zoo.data.base import Loader
from asge_zoo.data.base import data_root as find_data_root
from asge_zoo.engine.checkpoint import METRICS, SPEC
from asge_zoo.engine.device import deterministic, environment, pick_device
from asge_zoo.engine.keeper import CheckpointKeeper
from asge_zoo.engine.lock import locked
from asge_zoo.engine.parallel import check_alike, check_restart, open_loader
from asge_zoo.engine.progress import RunProgress
from asge_zoo.engine.result import RunResult, combine, test_best
from asge_zoo.engine.run_dir import (
    RESULT,
    STOPPED,
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
from asge_zoo.files import WriteError, append_line, json_bytes, write_file
from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.graph.reduction import reduction
from asge_zoo.ranks import Ranks, job, joined_ranks, lost_rank, restarts
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
    time_limit: float | None = None,
) -> RunResult:
    """Train by a spec, every run of it, and test each run's best checkpoint.

    SIGINT, SIGTERM and SIGUSR1 end it after the step under way, with a checkpoint saved; a second one ends it at once.
    Started by torchrun, it trains together with the other ranks; the first one writes.

    Args:
        spec: what to train.
        run_dir: where to write, a new directory; `runs/<name>` if not given.
        resume: go on from the newest whole checkpoint in `run_dir`, to the very weights that a run without a break
            comes to; from the start where nothing has been saved yet. Implied where torchrun restarts the ranks.
        device: a torch device; if not given, a CUDA GPU if there is one, each rank's own, else the CPU.
        data_root: where datasets lie; if not given, $ASGE_ZOO_DATA, else the user's cache.
        time_limit: minutes after which to save and stop; if not given, two before SLURM's end of the job.

    Raises:
        SpecError: the spec's parts do not fit together, it is not the one to resume by, there is no such device, or
            torch.compile does not work; or the ranks are not alike.
        DataError: the dataset is missing or unreadable.
        CheckpointError: the run directory is taken, in use or can't be written to, or no whole checkpoint is left.
        DivergenceError: losses or weights are no longer finite.
        Stopped: by a signal or the time limit.
    """
    chosen, root = pick_device(device), find_data_root(data_root)
    resume = resume or check_restart(run_dir)
    rng_devices = [chosen] if chosen.type == "cuda" else []
    with joined_ranks() as ranks:
        check_alike(ranks, spec)
        folder = ranks.share(choose_run_dir(spec, run_dir, resume=resume) if ranks.first else Path())
        go_on = f"go on with `{resume_command(folder, device, data_root)}`"
        try:
            with (
                torch.random.fork_rng(devices=rng_devices),  # the caller's generator stays as it was
                deterministic(spec.train.deterministic),
                StopSignals(ranks, None if time_limit is None else 60 * time_limit) as stop,
                locked(folder) if ranks.first else contextlib.nullcontext(),
            ):
                if ranks.first and not resume:
                    check_unused(folder)  # another process may have been there since
                if restarts() and (folder / STOPPED).exists():
                    raise Stopped(signal.SIGUSR1, "stopped before this restart, and not to be gone on with unasked")
                return Trainer(chosen, root, ranks, stop, resume).runs(spec, folder)
        except Stopped as stopped:
            if not (folder / SPEC).exists():
                raise
            if ranks.first:
                write_file(folder / STOPPED, f"{stopped.signal.name}\n".encode())
            raise Stopped(stopped.signal, f"{stopped}; {go_on}") from None
        except WriteError as error:
            rest = f", then {go_on}; checkpoints saved before are as they were" if (folder / SPEC).exists() else ""
            raise CheckpointError(
                f"{error.filename}: can't be written ({error.strerror}); {error.remedy}{rest}"
            ) from error


@dataclass(frozen=True)
class Trainer:
    """Trains the runs of a spec, one after the other.

    Attributes:
        device, root: where to compute, and where datasets lie.
        ranks: that train together.
        stop: what may end it before its time.
        resume: go on from what there is.
    """

    device: torch.device
    root: Path
    ranks: Ranks
    stop: StopSignals
    resume: bool

    def runs(self, spec: Spec, folder: Path) -> RunResult:
        """Every run of a spec; of several, each in a directory of its own."""
        if self.ranks.first:
            check_resumable(folder, spec)
        if spec.train.runs == 1:
            return self.single(spec, folder, self.resume)
        results = []
        for seed in range(spec.train.seed, spec.train.seed + spec.train.runs):
            own, one = folder / f"seed-{seed}", spec.for_seed(seed)
            with locked(own) if self.ranks.first else contextlib.nullcontext():
                if self.ranks.first:
                    check_resumable(own, one)
                begun = self.ranks.share(self.resume and (own / SPEC).exists())
                results.append(self.single(one, own, begun, on_start=lambda: write_spec(folder, spec)))
        result = combine(folder, results)
        if self.ranks.first:
            write_file(folder / RESULT, json_bytes(result.to_json()))
        return result

    def single(self, spec: Spec, folder: Path, resume: bool, on_start: Callable[[], None] = lambda: None) -> RunResult:
        """A single run; `on_start` is called once all that can be refused has been, before the first file."""
        started, ranks = time.perf_counter(), self.ranks
        graph = compile_spec(spec, device=self.device)
        loader = open_loader(spec, self.root, self.device, ranks)
        graph.reduction = reduction(ranks.shard, loader.batch_size)
        state = begin(spec, graph, loader.steps(), started, ranks)
        keeper = CheckpointKeeper(folder, spec.train.checkpoint, ranks)
        images = spec.train.epochs * loader.steps() * loader.batch_size
        with RunProgress(spec.name, images, silent=not ranks.first) as progress:
            if resume and not keeper.restore(state, progress.warn):
                progress.warn(f"{folder}: holds no checkpoint yet; starts from the beginning")
            if not state.finished:
                if spec.train.compile:
                    progress.say(f"{spec.name}: compiling the step, about half a minute if it is not cached")
                try_step(graph, loader)
            if ranks.first:
                on_start()
                start_run_dir(folder, spec, self._environment(spec, loader), state, progress.warn)
            if state.total_steps:
                keeper.keep(state, newer=True)
            progress.begin(state.total_steps * loader.batch_size)
            where = f"{self.device}" + (f" of {ranks.shard.world_size} ranks" if ranks.several else "")
            progress.say(
                f"{spec.name}: seed {spec.train.seed} on {where}, images from {loader.described}, writing to {folder}"
            )
            with self.stop.deferred(), keeper.naming_last_good():
                try:
                    fit(state, loader, keeper, self.stop, progress)
                except StopRequested as stopped:
                    keeper.save(state)
                    raise Stopped(stopped.signal, f"{stopped}, its state saved as {state.name}") from None
            return test_best(folder, state, loader)

    def _environment(self, spec: Spec, loader: Loader) -> dict[str, Any]:
        found = environment(self.device, self.root, spec.plugins)
        return {**found, "world_size": self.ranks.shard.world_size, "loader": loader.described, "job": job()}


def try_step(graph: LocalGraph, loader: Loader) -> None:
    """Run the training step once, on the first batch, which compiles it; changes nothing else.

    Raises:
        SpecError: torch's compiler does not work here, or the step has no deterministic algorithm.
    """
    graph.train()
    try:
        graph.step(*next(loader.train_batches(0)))
    except torch.OutOfMemoryError as error:
        raise SpecError(
            "data.batch_size: a step does not fit in the device's memory; lower it, or take more ranks"
        ) from error
    except Exception as error:  # whatever torch's compiler, or the C++ compiler behind it, raises
        if lost_rank(error):
            raise
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
        validation = select_and_validate(state.graph, loader, stop, state.ranks)
        best_before = state.best
        record = state.end_epoch(validation)
        if state.ranks.first:
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
            progress.advance(loader.batch_size)
            if state.step % SETTLE_EVERY == 0:
                state.check_losses()
            if keeper.due(state):
                keeper.save(state)
            stop.check()
        state.check_finite()


def train_step(state: TrainState, images: Tensor, labels: Tensor) -> None:
    """One step: local gradients, the optimizer, the schedule, running statistics."""
    rank = state.ranks.shard.rank
    own = (rank,) if rank else ()  # dropout, whose draws these are, differs from rank to rank
    torch.manual_seed(keyed_seed(state.spec.train.seed, "step", state.epoch, state.step, *own))
    result = state.graph.step(images, labels)
    state.update(result)
    state.meter.update(result, labels)
    state.step += 1


def select_and_validate(graph: LocalGraph, loader: Loader, stop: StopSignals, ranks: Ranks) -> Evaluation:
    """Validation accuracy, once the prediction has chosen (the best unit, say) by its alternatives' own."""
    measured, accuracy = evaluate_alternatives(graph, stop.watch(loader.split_batches("validation")), ranks)
    if graph.prediction.select(graph.head, accuracy):
        return evaluate(graph, stop.watch(loader.split_batches("validation")), ranks)
    return measured
