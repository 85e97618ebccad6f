"""Backpropagation: the control that every layer-local rule is measured against."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor
from torch.func import grad_and_value

from asge_zoo.graph.functional import full_precision
from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.graph.rule import Rule, StepResult
from asge_zoo.graph.unit import Values
from asge_zoo.registry import register


@register
class BP(Rule):
    """One cross-entropy at the prediction's head, its gradient through every unit."""

    kind: Literal["bp"] = "bp"

    def step(self, graph: LocalGraph, params: Values, state: Values, images: Tensor, labels: Tensor) -> StepResult:
        def objective(params: Values):
            buffers = {name: state[name].clone() for unit in graph.units for name in unit.buffers}
            values = {**state, **params, **buffers}
            kept = [x for index, env in graph.walk(images, values=values) for x in graph.keep(index, env)]
            with full_precision(images):
                logits = graph.predict(values, kept, ())
                return F.cross_entropy(logits, labels), (logits, buffers)

        grads, (loss, (logits, buffers)) = grad_and_value(objective, has_aux=True)(params)
        return StepResult(grads, loss[None], (), logits, loss, buffers)
