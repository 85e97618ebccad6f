"""LocalGraph: units in order, one pure training step, and inference that stops where it may.

Shapes: B batch, C channels, H height, W width, N classes. Images are float, normalised.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad_and_value

from asge_zoo.graph.functional import bind, full_precision, own_code
from asge_zoo.graph.prediction import Prediction
from asge_zoo.graph.unit import Unit, Values
from asge_zoo.ops.goodness import MapShape
from asge_zoo.registry import Component

INPUT = "input"


class StepResult(NamedTuple):
    """What one training step found; nothing has been changed by it.

    Attributes:
        grads: a gradient for every trainable parameter, by its name in `named_parameters()`.
        losses: (units,) local losses, or (1,) for a rule with one global loss.
        unit_logits: per unit (B, N); empty for a rule without local logits.
        logits: (B, N) of the prediction strategy; None for a rule with candidate labels.
        head_loss: () cross-entropy of the prediction's logits; without logits, the mean of `losses`.
        buffers: new values of the backbone's buffers that the step updates, by name.
    """

    grads: dict[str, Tensor]
    losses: Tensor
    unit_logits: tuple[Tensor, ...]
    logits: Tensor | None
    head_loss: Tensor
    buffers: dict[str, Tensor]


class Rule(Component):
    """Contract of a learning rule: how a batch becomes gradients.

    With `candidate_labels`, images go through the units with a label: class logits take a pass a candidate (see
    `infer`), steps have none, and only predictions on the units' own logits, with nothing to train, are served.
    """

    group: ClassVar[str] = "rule"
    layer_local: ClassVar[bool] = False
    candidate_labels: ClassVar[bool] = False

    def check(self, shapes: Sequence[MapShape], num_classes: int) -> None:
        """Raise a SpecError, which names the field and what to do, for activation maps that the rule can't train on."""

    def goodness_layout(self, shape: MapShape) -> tuple[int, int]:
        """(partition, goodness_dim) of a unit with that map; zeros for a rule without goodness."""
        return 0, 0

    def build_unit(self, shape: MapShape, num_classes: int, generator: torch.Generator) -> nn.Module | None:
        """A unit's local classifier, from its activation (B, C, H, W) to logits (B, N), or None."""
        return None

    def infer(
        self, graph: "LocalGraph", images: Tensor, stop: int, *, local: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What the prediction keeps of the units up to index `stop`, and, if `local`, their own logits, each (B, N)."""
        kept, unit_logits = [], []
        for index, env in graph.walk(images, stop=stop):
            with full_precision(activation := env[graph.units[index].activation]):
                if local:
                    unit_logits.append(graph.local[index](activation))
                kept.extend(graph.keep(index, env))
        return kept, unit_logits

    @abstractmethod
    def step(self, graph: "LocalGraph", params: Values, state: Values, images: Tensor, labels: Tensor) -> StepResult:
        """Gradients and losses of one batch: pure, traceable, nothing changed.

        Args:
            graph: the units, modules and prediction to use.
            params: every trainable parameter by name.
            state: every buffer, and every frozen parameter, by name.
            images: (B, C, H, W), float, normalised.
            labels: (B,), int64.
        """


class LayerLocalRule(Rule):
    """A rule by which each unit learns from its own loss; `build_unit` and `unit_loss` are all there is to write.

    The loss is differentiated with respect to the unit's own parameters alone, its inputs are constants:
    locality holds by construction. A unit's activations are dead before the next one's gradient is taken.
    """

    layer_local: ClassVar[bool] = True

    @abstractmethod
    def build_unit(self, shape: MapShape, num_classes: int, generator: torch.Generator) -> nn.Module:
        """A unit's local classifier, drawn from `generator`: from its activation (B, C, H, W) to logits (B, N).

        With `candidate_labels`, to the goodness (B,) of the label that came with the image.
        """

    @abstractmethod
    def unit_loss(
        self, classify: Callable[[Tensor], Tensor], activation: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """A unit's loss and logits.

        Args:
            classify: the unit's local classifier, bound to its tensors.
            activation: (B, C, H, W), what goodness reads.
            labels: (B,), int64.

        Returns:
            loss () and logits (B, N), which are None with `candidate_labels`.
        """

    def step(self, graph: "LocalGraph", params: Values, state: Values, images: Tensor, labels: Tensor) -> StepResult:
        env: dict[str, Tensor] = {INPUT: images}
        grads, losses, unit_logits, kept, buffers = {}, [], [], [], {}
        for index, unit in enumerate(graph.units):

            def objective(own: dict[str, Tensor], env=env, index=index, unit=unit):
                updated = {name: state[name].clone() for name in unit.buffers}
                after = unit.run(env, {**state, **own, **updated})
                activation = after[unit.activation]
                with full_precision(activation):
                    loss, logits = self.unit_loss(graph.bind_local(index, {**state, **own}), activation, labels)
                logits = [] if logits is None else [logits]
                return loss, (logits, graph.keep(index, after), unit.leave(after), updated)

            own = {name: params[name] for name in unit.parameters}
            gradient, (loss, aux) = grad_and_value(objective, has_aux=True)(own)
            logits, summary, env, updated = aux
            grads.update(gradient)
            buffers.update(updated)
            losses.append(loss)
            unit_logits.extend(logits)
            kept.extend(summary)
        local = torch.stack(losses)
        if self.candidate_labels:
            return StepResult(grads, local, (), None, local.mean(), buffers)
        head, head_loss, logits = self._head_step(graph, params, state, kept, unit_logits, labels)
        return StepResult({**grads, **head}, local, tuple(unit_logits), logits, head_loss, buffers)

    def _head_step(self, graph: "LocalGraph", params, state, kept, unit_logits, labels):
        """The head's loss trains the head only: what it reads are constants."""
        own = {name: params[name] for name in graph.head_parameters}

        def objective(own: dict[str, Tensor]):
            logits = graph.predict({**state, **own}, kept, unit_logits)
            return F.cross_entropy(logits, labels), logits

        with full_precision(labels):
            gradient, (loss, logits) = grad_and_value(objective, has_aux=True)(own) if own else ({}, objective(own))
        return gradient, loss, logits


class LocalGraph(nn.Module):
    """A backbone as units, with its rule's local classifiers and its prediction's head.

    Made by `compile_spec`. Its state dict holds `backbone.*` (the backbone's own keys), `local.<unit>.*` (the rule's
    tensors, projections among them) and `head.*`.
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
        self._step: Callable[..., StepResult] | None = None

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
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"):
            return self.rule.step(self, params, state, images, labels)

    def step(self, images: Tensor, labels: Tensor) -> StepResult:
        """`step_fn`, compiled if the spec says so, on this module's own tensors. Changes nothing.

        Dropout, where the backbone has it, draws from torch's generator: seed that for equal steps.

        Args:
            images: (B, C, H, W), float, normalised.
            labels: (B,), int64.
        """
        if self._step is None:  # torch's compiler takes seconds to load: only who trains waits for it
            self._step = (
                torch.compile(own_code(cast(MethodType, self.step_fn)), fullgraph=True)
                if self.compiled
                else self.step_fn
            )
        with torch.no_grad():  # gradients are taken inside, by torch.func; nothing else may track them
            return self._step(*self.tensors(), images, labels)

    # Inference.

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (B, N) for images (B, C, H, W); later units than the prediction needs don't run."""
        if self.prediction.exits_early:
            return self._infer_leaving(images)
        stop = self.prediction.last_unit(self.head, len(self.units))
        return self._infer(images, stop, local=self.prediction.uses_unit_logits)[0]

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

    def _infer_leaving(self, images: Tensor) -> Tensor:
        """Logits (B, N); an image leaves the batch once its depth is reached."""
        env: dict[str, Tensor] = {INPUT: images}
        rows, logits = torch.arange(len(images), device=images.device), images.new_empty(len(images), self.num_classes)
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
                rows = rows[~done]
                if len(rows) == 0:
                    break
                kept, unit_logits = [x[~done] for x in kept], [x[~done] for x in unit_logits]
                env = {name: value[~done] for name, value in unit.leave(after).items()}
        return logits

    def walk(
        self, images: Tensor, *, values: Values | None = None, stop: int | None = None
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Run the units in order up to index `stop`; yields (index, all values after that unit)."""
        env: dict[str, Tensor] = {INPUT: images}
        for index, unit in enumerate(self.units[: None if stop is None else stop + 1]):
            after = unit.run(env, values)
            yield index, after
            env = unit.leave(after)
