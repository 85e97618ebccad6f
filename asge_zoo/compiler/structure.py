"""Which units are alike: the same operations on the same shapes, names and values of tensors apart."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from asge_zoo.graph.unit import Attribute, Ref, Step, Unit

PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, type)
# What nn.Module keeps of its own beside what is compared by itself.
APART = {"_parameters", "_buffers", "_modules"}


def templates(
    units: Sequence[Unit], local: Sequence[nn.Module], kept: Sequence[Tensor | None], values: Mapping[str, Tensor]
) -> list[int]:
    """For each unit the index of the first one of its structure.

    Args:
        units: all of them.
        local: each one's local classifier.
        kept: what the prediction keeps of each, on the meta device.
        values: every value of the units, by name, on the meta device.
    """
    first: dict[Any, int] = {}
    return [
        first.setdefault(_structure(unit, classifier, summary, values), index)
        for index, (unit, classifier, summary) in enumerate(zip(units, local, kept, strict=True))
    ]


def _structure(unit: Unit, classifier: nn.Module, kept: Tensor | None, values: Mapping[str, Tensor]) -> Any:
    """Equal for units that one compiled step can run."""
    named = [*unit.reads, *(step.name for step in unit.steps), *unit.parameters, *unit.constants]
    places = {name: place for place, name in enumerate(named)}
    return (
        tuple(_layout(values[name]) for name in unit.reads),
        tuple(_operation(step, places) for step in unit.steps),
        tuple(places[name] for name in (*unit.buffers, unit.activation, unit.output, *unit.makes)),
        len(unit.parameters),
        _described(classifier),
        None if kept is None else _layout(kept),
    )


def _operation(step: Step, places: Mapping[str, int]) -> Any:
    call = _described(step.call) if isinstance(step.call, nn.Module) else step.call
    if isinstance(step.call, Attribute):
        call = _layout(getattr(step.call.owner, step.call.name))
    tensors = tuple((own, places[name]) for own, name in step.tensors)
    return call, _plain(step.args, places), _plain(step.kwargs, places), tensors


def _described(module: nn.Module) -> Any:
    """A module's class, attributes and tensors' layouts, and those of all within; values of tensors don't count."""
    own = {name: value for name, value in vars(module).items() if name not in APART}
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return (
        type(module),
        _plain(own, {}),
        tuple((name, *_layout(tensor)) for name, tensor in tensors),
        tuple((name, _described(inner)) for name, inner in module.named_children()),
    )


def _layout(tensor: Tensor) -> Any:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad


def _plain(value: Any, places: Mapping[str, int]) -> Any:
    """A value that is equal for equal options; what can't be compared is equal to itself alone."""
    if isinstance(value, Ref):
        return "value", places[value.name]
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, (tuple, list)):
        return type(value), tuple(_plain(item, places) for item in value)
    if isinstance(value, Mapping):
        return "mapping", tuple((key, _plain(item, places)) for key, item in value.items())
    if isinstance(value, (set, frozenset)):
        return "set", frozenset(value)
    if isinstance(value, slice):
        return "slice", _plain((value.start, value.stop, value.step), places)
    return "object", id(value)
