"""All that training changes: what a step updates, what a checkpoint holds, and the way back from one."""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from asge_zoo.compiler.check import parts
from asge_zoo.engine.checkpoint import (
    MODEL,
    OPTIMIZER,
    STATE,
    Best,
    SavedState,
    checkpoint_name,
    read_records,
    read_state,
    write_checkpoint,
)
from asge_zoo.engine.meter import EpochRecord, Stopwatch, TrainMeter
from asge_zoo.errors import CheckpointError, DivergenceError
from asge_zoo.evaluate import Evaluation
from asge_zoo.graph.functional import in_layout_of
from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.graph.rule import StepResult
from asge_zoo.ranks import Ranks
from asge_zoo.spec import Spec


@dataclass
class TrainState:
    """A run under way.

    Attributes:
        spec: of this single run.
        steps_per_epoch: full training batches in an epoch.
        graph, optimizer, scheduler: as they are now.
        started: `time.perf_counter()` at the run's start, had it run without a break.
        ranks: that train it together.
        epoch: epochs done.
        step: steps done of the epoch under way.
        meter: of the epoch under way.
        records: of the epochs done.
        best: the best checkpoint so far.
        epoch_time: of training in the epoch under way.
    """

    spec: Spec
    steps_per_epoch: int
    graph: LocalGraph
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    started: float
    ranks: Ranks = field(default_factory=Ranks)
    epoch: int = 0
    step: int = 0
    meter: TrainMeter = field(init=False)
    records: list[EpochRecord] = field(default_factory=list)
    best: Best | None = None
    epoch_time: Stopwatch = field(default_factory=Stopwatch)

    def __post_init__(self) -> None:
        self.meter = TrainMeter(None, self.ranks)
        self.parameters, self.buffers = dict(self.graph.named_parameters()), dict(self.graph.named_buffers())

    @property
    def name(self) -> str:
        """That of its checkpoint."""
        return checkpoint_name(self.epoch, self.step)

    @property
    def total_steps(self) -> int:
        """Steps done, of all epochs."""
        return self.epoch * self.steps_per_epoch + self.step

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch >= self.spec.train.epochs

    def update(self, result: StepResult) -> None:
        """Change parameters and buffers by what a step found; no parameter keeps its gradient."""
        for name, gradient in result.grads.items():
            self.parameters[name].grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        for name, value in result.buffers.items():
            self.buffers[name].copy_(value)

    def end_epoch(self, validation: Evaluation) -> EpochRecord:
        """Close the epoch under way; settles whether it is the best so far.

        Raises:
            DivergenceError: a validation loss is not finite; names the unit.
        """
        names = ["the prediction", *(f"unit {unit.name}" for unit in self.graph.units)]
        for name, loss in zip(names, [validation.loss, *validation.unit_loss], strict=False):
            if not math.isfinite(loss):
                raise DivergenceError(f"the validation loss of {name} is not finite after epoch {self.epoch + 1}")
        train, seconds = self.meter.finish(), self.epoch_time.seconds
        self.epoch, self.step = self.epoch + 1, 0
        lr = float(self.scheduler.get_last_lr()[0])
        record = EpochRecord(self.epoch, train, validation, lr, seconds, train.count / seconds)
        self.records.append(record)
        if self.best is None or validation.accuracy > self.best.val_accuracy:
            self.best = Best(name=self.name, val_accuracy=validation.accuracy)
        self.epoch_time = Stopwatch()
        return record

    def check_losses(self) -> None:
        """Refuse to go on from a loss that is not finite; every rank must call it.

        Raises:
            DivergenceError: names the unit and the step.
        """
        self.meter.settle([unit.name for unit in self.graph.units], self.epoch + 1)

    def check_finite(self) -> None:
        """Refuse to go on, or to save, once losses or weights are not finite; every rank must call it.

        Raises:
            DivergenceError: names the unit and the step.
        """
        self.check_losses()
        units = self.graph.units
        owner = {name: unit.name for unit in units for name in (*unit.parameters, *unit.buffers)}
        for index, local in enumerate(self.graph.local):
            owner |= {f"local.{index}.{name}": units[index].name for name in local.state_dict()}
        for name, tensor in {**self.graph.state_dict(), **self._moments()}.items():
            if not tensor.isfinite().all():
                where = f"epoch {self.epoch + 1}, step {self.step}" if self.step else f"epoch {self.epoch}"
                whose = name.partition("|")[0]
                of = f"unit {owner[whose]}" if whose in owner else "the prediction"
                what = "weights" if whose == name else "moments"
                raise DivergenceError(f"the {what} of {of} are not finite after {where} ({name})")

    def save(self, folder: Path) -> None:
        """Write its checkpoint to `folder`, which must not exist."""
        write_checkpoint(
            folder,
            spec=self.spec,
            model=self.graph.state_dict(),
            optimizer=self._moments(),
            state=SavedState(
                epoch=self.epoch,
                step=self.step,
                best=self.best,
                meter=self.meter.sums,
                seconds=time.perf_counter() - self.started,
                epoch_seconds=self.epoch_time.seconds,
                optimizer=self.optimizer.state_dict()["param_groups"],
                schedule=self.scheduler.state_dict(),
            ),
            records=self.records,
        )

    def _moments(self) -> dict[str, Tensor]:
        """The optimizer's tensors, as `<parameter>|<name>`."""
        return {
            f"{name}|{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def misfits(self, folder: Path) -> list[str]:
        """What is wrong with a checkpoint, whose sums have been checked, for this network: one line, or none."""
        with safetensors.safe_open(folder / MODEL, framework="pt") as archive:
            shapes = {name: tuple(archive.get_slice(name).get_shape()) for name in archive.keys()}
        fits = shapes == {name: tuple(tensor.shape) for name, tensor in self.graph.state_dict().items()}
        return [] if fits else [f"{folder / MODEL}: does not fit its own spec"]

    def restore(self, folder: Path) -> None:
        """Become what a checkpoint holds, whose sums have been checked.

        Raises:
            CheckpointError: it does not fit its spec.
        """
        saved, records = read_state(folder), read_records(folder)
        accuracy = {checkpoint_name(record.epoch, 0): record.validation.accuracy for record in records}
        measured = 1 + len(self.graph.local) if saved.step else 0
        answered = 0 if self.graph.rule.candidate_labels else measured
        if (
            [record.epoch for record in records] != list(range(1, saved.epoch + 1))
            or saved.step > self.steps_per_epoch
            or saved.meter.batches != saved.step
            or saved.meter.images < saved.step
            or (len(saved.meter.right), len(saved.meter.loss)) != (answered, measured)
            or (saved.best is None and saved.step == 0)
            or (saved.best is not None and accuracy.get(saved.best.name) != saved.best.val_accuracy)
        ):
            raise CheckpointError(f"{folder / STATE}: does not fit its metrics or its dataset")
        try:
            self.graph.load_state_dict(safetensors.torch.load_file(folder / MODEL))
            self._restore_optimizer(saved.optimizer, safetensors.torch.load_file(folder / OPTIMIZER))
            self._restore_schedule(saved)
        except (RuntimeError, ValueError, OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{folder}: does not fit its own spec ({' '.join(str(error).split())})") from error
        self.epoch, self.step, self.best, self.records = saved.epoch, saved.step, saved.best, records
        self.meter = TrainMeter(saved.meter, self.ranks)
        self.epoch_time = Stopwatch(saved.epoch_seconds)
        self.started -= saved.seconds

    # What torch's own load_state_dict takes in silence is refused here: other settings, moments of another shape.

    def _restore_optimizer(self, groups: list[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
        fresh = json.loads(json.dumps(self.optimizer.state_dict()["param_groups"]))
        rates = [group.get("lr") for group in groups]
        if [{**group, "lr": None} for group in groups] != [{**group, "lr": None} for group in fresh] or not all(
            isinstance(rate, float) for rate in rates
        ):
            raise ValueError("other optimizer settings")
        shapes = {
            f"{name}|{key}": () if scalar else tuple(self.parameters[name].shape)
            for group in fresh
            for name in group["param_names"]
            for key, scalar in _kept_by_optimizer(self.spec).items()
        }
        if shapes != {name: tuple(tensor.shape) for name, tensor in tensors.items()}:
            raise ValueError("other optimizer tensors")
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("optimizer tensors that are not finite")
        names = [name for group in fresh for name in group["param_names"]]
        moments: dict[int, dict[str, Tensor]] = {index: {} for index in range(len(names))}
        for key, tensor in tensors.items():
            name, _, what = key.rpartition("|")
            moments[names.index(name)][what] = in_layout_of(self.parameters[name], tensor) if tensor.dim() else tensor
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def _restore_schedule(self, saved: SavedState) -> None:
        steps = saved.epoch * self.steps_per_epoch + saved.step
        there = {
            "last_epoch": steps,
            "_step_count": steps + 1,
            "_last_lr": [group["lr"] for group in saved.optimizer],
        }
        if saved.schedule != {**json.loads(json.dumps(self.scheduler.state_dict())), **there}:
            raise ValueError(f"other schedule settings, or not those after {steps} steps")
        self.scheduler.load_state_dict(saved.schedule)


def begin(
    spec: Spec, graph: LocalGraph, steps_per_epoch: int, started: float, ranks: Ranks | None = None
) -> TrainState:
    """A run before its first step, with the spec's optimizer, the head a group of its own, and its schedule."""
    named = list(graph.tensors()[0].items())
    head = set(graph.head_parameters)
    groups: list[dict[str, Any]] = [{"params": [item for item in named if item[0] not in head]}]
    if head:
        rate = {} if graph.prediction.head_lr is None else {"lr": graph.prediction.head_lr}
        groups.append({"params": [item for item in named if item[0] in head], **rate})
    optimizer = parts(spec).optimizer.build(groups)
    scheduler = parts(spec).schedule.build(optimizer, spec.train.epochs * steps_per_epoch)
    return TrainState(spec, steps_per_epoch, graph, optimizer, scheduler, started, ranks or Ranks())


def _kept_by_optimizer(spec: Spec) -> dict[str, bool]:
    """Names of the tensors that the spec's optimizer keeps for a parameter, and whether each is a scalar."""
    probe = torch.nn.Parameter(torch.zeros(2))
    probe.grad = torch.zeros(2)
    optimizer = parts(spec).optimizer.build([{"params": [("probe", probe)]}])
    optimizer.step()
    return {name: value.dim() == 0 for name, value in optimizer.state[probe].items()}
