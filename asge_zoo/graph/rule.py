"""Learning rules: how a batch becomes gradients.

Shapes: B batch, C channels, H height, W width, N classes. Images are float, normalised.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad_and_value

from asge_zoo.graph.functional import full_precision
from asge_zoo.graph.unit import INPUT, Values
from asge_zoo.ops.goodness import MapShape
from asge_zoo.registry import Component

if TYPE_CHECKING:
    from asge_zoo.graph.local_graph import LocalGraph


class StepResult(NamedTuple):
    """What one training step found; nothing has been changed by it.

    Attributes:
        grads: a gradient for every trainable parameter, by its name in `named_parameters()`; of a graph's step, in its
            parameter's layout.
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


class UnitResult(NamedTuple):
    """What a layer-local step found of one unit.

    Attributes:
        grads: a gradient for every parameter of the unit, by name.
        loss: (), its local loss.
        logits: its logits (B, N), alone in a list; empty with candidate labels.
        kept: what the prediction keeps of it, alone in a list or none.
        made: its values that later units read, by name.
        buffers: new values of the buffers that it updates, by name.
    """

    grads: dict[str, Tensor]
    loss: Tensor
    logits: list[Tensor]
    kept: list[Tensor]
    made: dict[str, Tensor]
    buffers: dict[str, Tensor]


Result = TypeVar("Result", StepResult, UnitResult)


def replaced(result: Result, **fields: Any) -> Result:
    """`result._replace(**fields)`, for what is compiled: torch 2.11 can't trace that."""
    return type(result)(**{**result._asdict(), **fields})


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

    def goodness_layout(self, shape: MapShape, num_classes: int) -> tuple[int, int]:
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

    def unit_step(
        self, graph: "LocalGraph", index: int, own: Values, constants: Values, env: Values, labels: Tensor
    ) -> UnitResult:
        """Unit `index`'s part of a step: pure, traceable, nothing changed.

        Args:
            graph: the units, modules and prediction to use.
            index: the unit's place, from 0.
            own: the unit's parameters by name, which the loss is differentiated with respect to.
            constants: all other tensors that it uses, by name.
            env: the earlier values that it reads.
            labels: (B,), int64.
        """
        unit = graph.units[index]

        def objective(own: dict[str, Tensor]):
            updated = {name: constants[name].clone() for name in unit.buffers}
            after = unit.run(env, {**constants, **own, **updated})
            activation = after[unit.activation]
            with full_precision(activation):
                loss, logits = self.unit_loss(graph.bind_local(index, {**constants, **own}), activation, labels)
            made = {name: after[name] for name in unit.makes}
            return loss, ([] if logits is None else [logits], graph.keep(index, after), made, updated)

        grads, (loss, aux) = grad_and_value(objective, has_aux=True)(dict(own))
        return UnitResult(grads, loss, *aux)

    def step(self, graph: "LocalGraph", params: Values, state: Values, images: Tensor, labels: Tensor) -> StepResult:
        env: dict[str, Tensor] = {INPUT: images}
        found: list[UnitResult] = []
        for index, unit in enumerate(graph.units):
            result = graph.unit_step(index, params, state, env, labels)
            env = unit.leave({**env, **result.made})
            found.append(replaced(result, made={}))  # only what a later unit still reads is kept
        grads = {name: grad for result in found for name, grad in result.grads.items()}
        buffers = {name: value for result in found for name, value in result.buffers.items()}
        unit_logits = [logits for result in found for logits in result.logits]
        local = torch.stack([result.loss for result in found])
        if self.candidate_labels:
            return StepResult(grads, local, (), None, local.mean(), buffers)
        kept = [summary for result in found for summary in result.kept]
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
