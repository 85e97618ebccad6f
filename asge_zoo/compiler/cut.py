"""Cutting a traced backbone into units, one convolution each.

A unit opens at a convolution that depends on the open unit's convolution; one that does not (a
shortcut's projection) is parallel and joins it. In or behind a `Transfer`, where the unit's goodness has
been read, parameters belong to the next unit, and so does all that follows them. All else belongs to
the unit before it.
"""

import math
from dataclasses import dataclass, field
from typing import Any, cast

from torch import fx, nn
from torch.fx.node import map_arg

from asge_zoo.compiler.trace import ShapeRecorder, is_convolution, record_shapes, trace
from asge_zoo.errors import SpecError
from asge_zoo.graph.local_graph import INPUT
from asge_zoo.graph.unit import Ref, Step, Unit
from asge_zoo.ops.transfer import Transfer

PREFIX = "backbone."


@dataclass
class Segment:
    """A unit in the making: its nodes, and what depends on its convolution."""

    nodes: list[fx.Node] = field(default_factory=list)
    name: str | None = None
    dependent: set[fx.Node] = field(default_factory=set)
    transferred: bool = False


def cut(backbone: nn.Module, image_shape: tuple[int, int, int]) -> list[Unit]:
    """Cut a backbone into units, which know nothing yet of a rule: no goodness, no parameters but the backbone's.

    Args:
        backbone: from images (B, C, H, W) to a feature map.
        image_shape: (C, H, W) of an image.

    Raises:
        SpecError: it can't be traced, does not take such images, or holds no convolution.
    """
    graph = trace(backbone)
    modules = dict(backbone.named_modules())
    segments = _segments(graph, modules)
    _check(segments, modules)
    shapes = record_shapes(backbone, graph, image_shape)
    home = {node: -1 for node in graph.nodes if node.op == "placeholder"}
    home |= {node: index for index, segment in enumerate(segments) for node in segment.nodes}
    return [_unit(index, segment, home, modules, shapes) for index, segment in enumerate(segments)]


def _segments(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[Segment]:
    segments: list[Segment] = []
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if not segments:
            segments.append(Segment())
        module = modules[str(node.target)] if node.op == "call_module" else None
        depends = any(source in segments[-1].dependent for source in node.all_input_nodes)
        learns = module is not None and any(True for _ in module.parameters())
        behind = segments[-1].transferred or isinstance(module, Transfer)
        if depends and (is_convolution(module) or (behind and learns)):
            segments.append(Segment())
            depends = False
        current = segments[-1]
        current.nodes.append(node)
        if is_convolution(module) and current.name is None:
            current.name = str(node.target)
        if depends or is_convolution(module):
            current.dependent.add(node)
        if depends and isinstance(module, Transfer):
            current.transferred = True
    return segments


def _check(segments: list[Segment], modules: dict[str, nn.Module]) -> None:
    """Refuse what no unit could teach."""
    if not segments or segments[0].name is None:
        raise SpecError("backbone: holds no convolution, so there is nothing to cut into units")
    taught: set[str] = set()
    for segment in segments:
        learning = [
            node for node in _module_calls(segment) if any(True for _ in modules[str(node.target)].parameters())
        ]
        if segment.name is None:
            raise SpecError(
                f"backbone: '{learning[0].target}' learns behind the goodness of the last unit: nothing teaches it"
            )
        seen = {_activation(segment, modules)}
        for node in reversed(segment.nodes):
            if node in seen:
                seen.update(node.all_input_nodes)
        for node in learning:
            target = str(node.target)
            if node not in seen:
                raise SpecError(
                    f"backbone: '{target}' does not lead to what goodness reads of unit '{segment.name}', so nothing "
                    f"teaches it; compute it later in the forward pass"
                )
            if target in taught:
                raise SpecError(f"backbone: '{target}' is used twice, and a module can belong to one unit only")
            taught.add(target)


def _module_calls(segment: Segment) -> list[fx.Node]:
    return [node for node in segment.nodes if node.op == "call_module"]


def _unit(
    index: int,
    segment: Segment,
    home: dict[fx.Node, int],
    modules: dict[str, nn.Module],
    shapes: ShapeRecorder,
) -> Unit:
    own = set(segment.nodes)
    entering = {source for node in segment.nodes for source in node.all_input_nodes if source not in own}
    needed_later = [
        node for node, at in home.items() if at <= index and any(home.get(user, index) > index for user in node.users)
    ]
    called = [(str(node.target), modules[str(node.target)]) for node in _module_calls(segment)]
    parameters = [
        f"{PREFIX}{target}.{name}"
        for target, module in called
        for name, tensor in module.named_parameters()
        if tensor.requires_grad
    ]
    output = segment.nodes[-1]
    activation = _activation(segment, modules)
    channels, height, width = shapes.shapes[activation.name][1:]
    assert segment.name is not None
    return Unit(
        name=segment.name,
        channels=channels,
        height=height,
        width=width,
        partition=0,
        goodness_dim=0,
        steps=tuple(_step(node, modules) for node in segment.nodes),
        parameters=tuple(parameters),
        buffers=tuple(f"{PREFIX}{target}.{name}" for target, module in called for name, _ in module.named_buffers()),
        macs=sum(shapes.macs.get(node.name, 0) for node in segment.nodes),
        activation=activation.name,
        output=output.name,
        output_shape=shapes.shapes[output.name][1:],
        input_numel=sum(math.prod(shapes.shapes[source.name][1:]) for source in entering),
        keeps=tuple(_value_name(node) for node in needed_later),
    )


def _activation(segment: Segment, modules: dict[str, nn.Module]) -> fx.Node:
    """What goodness reads: what enters the unit's transfer, or else what leaves the unit last."""
    for node in _module_calls(segment):
        if isinstance(modules[str(node.target)], Transfer) and node in segment.dependent:
            return node.all_input_nodes[0]
    return segment.nodes[-1]


def _step(node: fx.Node, modules: dict[str, nn.Module]) -> Step:
    def reference(argument: Any) -> Any:
        return cast(Any, map_arg)(argument, lambda source: Ref(_value_name(source)))

    args, kwargs = reference(node.args), reference(node.kwargs)
    if node.op == "call_module":
        module = modules[str(node.target)]
        tensors = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
        names = tuple((name, f"{PREFIX}{node.target}.{name}") for name in tensors)
        return Step(node.name, module, tuple(args), dict(kwargs), names)
    if node.op == "call_method":
        method = str(node.target)
        return Step(node.name, lambda self, *a, **k: getattr(self, method)(*a, **k), tuple(args), dict(kwargs))
    if node.op == "call_function" and callable(node.target):
        return Step(node.name, node.target, tuple(args), dict(kwargs))
    raise SpecError(f"backbone: uses '{node.target}' outside a module, which can't belong to a unit")


def _value_name(node: fx.Node) -> str:
    return INPUT if node.op == "placeholder" else node.name
