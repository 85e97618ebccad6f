"""LocalGraph: units in order, one pure training step, and inference that stops where it may.

Shapes: B batch, C channels, H height, W width, N classes. Images are float, normalised.
"""

from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from asge_zoo.graph.functional import bind, compiled, full_precision, laid_out_like
from asge_zoo.graph.layout import fastest_layout
from asge_zoo.graph.prediction import Prediction
from asge_zoo.graph.reduction import Reduction
from asge_zoo.graph.replay import Replay
from asge_zoo.graph.rule import LayerLocalRule, Rule, StepResult, UnitResult, replaced
from asge_zoo.graph.shared import SharedSteps
from asge_zoo.graph.unit import INPUT, Unit, Values


class LocalGraph(nn.Module):
    """A backbone as units, with its rule's local classifiers and its prediction's head.

    Made by `compile_spec`. Its state dict holds `backbone.*` (the backbone's own keys), `local.<unit>.*` (the rule's
    tensors, projections among them) and `head.*`.

    Args:
        templates: for each unit the first one of its structure, where the units' steps are compiled one by one and
            units of a structure share theirs; empty where the step is compiled as a whole.

    Attributes:
        layout: of the maps in a compiled step, and of the convolutions' weights with it.
        reduction: of gradients and running statistics over the ranks, where there are several; set it before the
            first step.
        cuda_graphs: whether a compiled step on a GPU is recorded as a CUDA graph, where there is one rank; set it
            before the first step.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        units: Sequence[Unit],
        local: Sequence[nn.Module],
        head: nn.Module,
        rule: Rule,
        prediction: Prediction,
        num_classes: int,
        precision: str,
        compile: bool,
        templates: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.units = tuple(units)
        self.local = nn.ModuleList(local)
        self.head = head
        self.rule = rule
        self.prediction = prediction
        self.num_classes = num_classes
        self.precision = precision
        self.head_parameters = tuple(f"head.{name}" for name, _ in head.named_parameters())
        self.compiled = compile
        self.templates = tuple(templates)
        self.layout = fastest_layout(backbone)
        if compile:  # else every step would turn them there and its gradients back
            convert_conv2d_weight_memory_format(backbone, self.layout)
            self._leave_contiguous([unit for unit in units if unit.height == unit.width == 1])
        self.reduction: Reduction | None = None
        self.cuda_graphs = True
        # a layer-local rule's step is made of this graph's `unit_step`, unless it writes its own
        self._reduces_by_unit = type(rule).step is LayerLocalRule.step
        self._steps: dict[bool, Callable[..., StepResult]] = {}  # in training mode and not: a recorded one has no other
        self._unit_step: Callable[..., UnitResult] | None = None

    def _leave_contiguous(self, units: Sequence[Unit]) -> None:
        """The weights of units on maps of one pixel, whose layout is nobody's: on a GPU torch's compiler (2.11) takes
        it from the weights, where cuDNN takes it from the maps, and their gradients' layouts would not agree."""
        for name in {name for unit in units for name in unit.parameters}:
            parameter = self.get_parameter(name)
            parameter.data = parameter.data.contiguous()

    # Building blocks for rules.

    def keep(self, index: int, env: Values) -> list[Tensor]:
        """What the prediction keeps of unit `index`, from the values after it: one tensor or none."""
        unit = self.units[index]
        kept = self.prediction.keep(index, len(self.units), env[unit.activation], env[unit.output])
        return [] if kept is None else [kept]

    def bind_local(self, index: int, values: Values) -> Callable[[Tensor], Tensor]:
        """Unit `index`'s local classifier as a function of its activation, with its tensors from `values`."""
        return bind(self.local[index], f"local.{index}.", values)

    def predict(self, values: Values, kept: list[Tensor], unit_logits: Sequence[Tensor]) -> Tensor:
        """The prediction's logits (B, N), with the head's tensors from `values`."""
        return self.prediction.logits(bind(self.head, "head.", values), kept, unit_logits)

    def unit_step(self, index: int, params: Values, state: Values, env: Values, labels: Tensor) -> UnitResult:
        """Unit `index`'s part of a layer-local rule's step; arguments as for `Rule.step`, `env` the earlier values."""
        unit = self.units[index]
        own = {name: params[name] for name in unit.parameters}
        constants = {name: state[name] for name in unit.constants}
        read = {name: env[name] for name in unit.reads}
        run = self.reduced_unit_step if self._unit_step is None else self._unit_step
        return run(index, own, constants, read, labels)

    def reduced_unit_step(self, index: int, own: Values, constants: Values, env: Values, labels: Tensor) -> UnitResult:
        """The rule's `unit_step`, and the ranks' reduction of what it found begun."""
        assert isinstance(self.rule, LayerLocalRule)
        found = self.rule.unit_step(self, index, own, constants, env, labels)
        found = replaced(found, grads=laid_out_like(own, found.grads))  # now: at the end, all would be there twice
        if self.reduction is None or not self._reduces_by_unit:
            return found
        return replaced(found, grads=self.reduction.start(found.grads), buffers=self.reduction.start(found.buffers))

    def _reduced(self, found: StepResult, reduction: Reduction) -> StepResult:
        """A step's result with all that is reduced over the ranks there."""
        begun = self._reduces_by_unit
        rest = {n: x for n, x in found.grads.items() if not begun or n in self.head_parameters}
        grads = {**found.grads, **reduction.start(rest)}
        buffers = found.buffers if begun else reduction.start(found.buffers)
        return replaced(found, grads=reduction.finish(grads), buffers=reduction.finish(buffers))

    # Training.

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """By name, what is trained, and all else: buffers and frozen parameters."""
        params: dict[str, Tensor] = {}
        fixed = dict(self.named_buffers())
        for name, tensor in self.named_parameters():
            (params if tensor.requires_grad else fixed)[name] = tensor
        return params, fixed

    def step_fn(self, params: Values, state: Values, images: Tensor, labels: Tensor) -> StepResult:
        """One training step as a pure function of parameters, buffers and a batch (see `Rule.step`)."""
        if self.compiled:
            images = images.contiguous(memory_format=self.layout)
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"):
            found = self.rule.step(self, params, state, images, labels)
            found = found if self.reduction is None else self._reduced(found, self.reduction)
        return replaced(found, grads=laid_out_like(params, found.grads))

    def step(self, images: Tensor, labels: Tensor) -> StepResult:
        """`step_fn`, compiled if the spec says so, on this module's own tensors. Changes nothing.

        On a GPU, compiled, it is replayed as a CUDA graph: what it returns is overwritten by the next step.
        Dropout, where the backbone has it, draws from torch's generator: seed that for equal steps.

        Args:
            images: (B, C, H, W), float, normalised.
            labels: (B,), int64.
        """
        if self.training not in self._steps:  # torch's compiler takes seconds to load: only who trains waits for it
            self._steps[self.training] = self._built_step()
        with torch.no_grad():  # gradients are taken inside, by torch.func; nothing else may track them
            return self._steps[self.training](*self.tensors(), images, labels)

    def _built_step(self) -> Callable[..., StepResult]:
        if not self.compiled:
            return self.step_fn
        step = self.step_fn
        if self.templates:
            self._unit_step = self._unit_step or SharedSteps(self, self.templates)
        else:
            step = compiled(cast(MethodType, step))
        on_gpu = next(self.parameters()).is_cuda
        return Replay(step) if on_gpu and self.cuda_graphs and self.reduction is None else step

    @property
    def compiled_graphs(self) -> int:
        """Graphs that torch's compiler makes of a step."""
        return max(1, len(set(self.templates))) if self.compiled else 0

    # Inference.

    def truncate(self, count: int) -> None:
        """Keep the first `count` units alone, and no tensor that only the others use; for inference."""
        kept = {name for unit in self.units[:count] for name in (*unit.parameters, *unit.constants)}
        for unit in self.units[count:]:
            for name in {*unit.parameters, *unit.constants} - kept:
                owner, _, own = name.rpartition(".")
                delattr(self.get_submodule(owner), own)
        self.units, self.templates = self.units[:count], self.templates[:count]
        self.local = self.local[:count]

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (B, N) for images (B, C, H, W); later units than the prediction needs don't run."""
        return self.classify(images)[0]

    def classify(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """`forward`'s logits (B, N), and how many units ran for each image, (B,), int64."""
        if self.prediction.exits_early:
            return self._infer_leaving(images)
        stop = self.prediction.last_unit(self.head, len(self.units))
        logits = self._infer(images, stop, local=self.prediction.uses_unit_logits)[0]
        return logits, torch.full((len(images),), stop + 1, device=images.device)

    def unit_logits(self, images: Tensor) -> list[Tensor]:
        """Each unit's own logits (B, N); empty for a rule without local classifiers."""
        return self.all_logits(images)[1]

    def all_logits(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The prediction's logits (B, N) and each unit's own, in one pass over all units."""
        return self._infer(images, len(self.units) - 1, local=len(self.local) > 0)

    def _infer(self, images: Tensor, stop: int, *, local: bool) -> tuple[Tensor, list[Tensor]]:
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"):
            kept, unit_logits = self.rule.infer(self, images, stop, local=local)
            with full_precision(images):
                return self.prediction.logits(self.head, kept, unit_logits), unit_logits

    def _infer_leaving(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As `classify`; an image leaves the batch once its depth is reached."""
        env: dict[str, Tensor] = {INPUT: images}
        rows, logits = torch.arange(len(images), device=images.device), images.new_empty(len(images), self.num_classes)
        depth = torch.empty_like(rows)
        kept, unit_logits = [], []
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"):
            for index, unit in enumerate(self.units):
                after = unit.run(env)
                with full_precision(images):
                    unit_logits.append(self.local[index](after[unit.activation]))
                    kept.extend(self.keep(index, after))
                    done = self.prediction.depth(self.head, unit_logits) <= index + 1
                    if index + 1 == len(self.units):
                        done = torch.ones_like(done)
                    answers = self.prediction.logits(self.head, kept, unit_logits)
                logits[rows[done]] = answers[done].to(logits.dtype)
                depth[rows[done]] = index + 1
                rows = rows[~done]
                if len(rows) == 0:
                    break
                kept, unit_logits = [x[~done] for x in kept], [x[~done] for x in unit_logits]
                env = {name: value[~done] for name, value in unit.leave(after).items()}
        return logits, depth

    def walk(
        self, images: Tensor, *, values: Values | None = None, stop: int | None = None
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Run the units in order up to index `stop`; yields (index, all values after that unit)."""
        env: dict[str, Tensor] = {INPUT: images}
        for index, unit in enumerate(self.units[: None if stop is None else stop + 1]):
            after = unit.run(env, values)
            yield index, after
            env = unit.leave(after)
