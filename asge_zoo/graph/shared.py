"""Compiled steps of single units, one for all units of a structure: a deep network compiles as fast as a short one."""

from collections.abc import Callable, Sequence
from types import MethodType
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from asge_zoo.graph.functional import own_code
from asge_zoo.graph.rule import UnitResult
from asge_zoo.graph.unit import Unit, Values

if TYPE_CHECKING:
    from asge_zoo.graph.local_graph import LocalGraph


class UnitStep:
    """One unit's step, as a function of tensors alone."""

    def __init__(self, graph: "LocalGraph", index: int) -> None:
        self.graph, self.index = graph, index

    def run(self, own: Values, constants: Values, env: Values, labels: Tensor) -> UnitResult:
        """See `LocalGraph.reduced_unit_step`."""
        return self.graph.reduced_unit_step(self.index, own, constants, env, labels)


class SharedSteps:
    """Runs any unit's step by the compiled one of its template, with the unit's own tensors under that one's names.

    Args:
        graph: the units, of a layer-local rule.
        templates: for each unit the first one of its structure: the same steps on the same shapes, names apart.
    """

    def __init__(self, graph: "LocalGraph", templates: Sequence[int]) -> None:
        self._templates = templates
        self._names = [
            dict(zip(_names(unit), _names(graph.units[template]), strict=True))
            for unit, template in zip(graph.units, templates, strict=True)
        ]
        self._steps: dict[int, Callable[..., UnitResult]] = {
            index: torch.compile(own_code(cast(MethodType, UnitStep(graph, index).run)), fullgraph=True)
            for index in set(templates)
        }

    def __call__(self, index: int, own: Values, constants: Values, env: Values, labels: Tensor) -> UnitResult:
        names = self._names[index]
        # Detached: a template's own tensors would be guarded as those of its modules, and other units' be refused.
        given = [{names[name]: x.detach() for name, x in values.items()} for values in (own, constants, env)]
        found = self._steps[self._templates[index]](*given, labels)
        back = {theirs: ours for ours, theirs in names.items()}
        grads, made, buffers = (
            {back[name]: x for name, x in values.items()} for values in (found.grads, found.made, found.buffers)
        )
        return found._replace(grads=grads, made=made, buffers=buffers)


def _names(unit: Unit) -> list[str]:
    """Of all tensors that enter or leave a unit's step, in an order that units of one structure share."""
    return [*unit.parameters, *unit.constants, *unit.reads, *unit.makes]
