"""Cutting a traced backbone into units."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, NamedTuple, cast

from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from asge_zoo.backbones.base import Cutting
from asge_zoo.compiler.maps import activation_of, channels_last, last_of
from asge_zoo.compiler.nodes import BATCH_SIZE, PREFIX, learns, owner_of, tensors_of, value_name
from asge_zoo.compiler.segments import Segment, common_name, crossing, free_of_images, segments
from asge_zoo.compiler.trace import BATCH, IS_BATCH, VALUE, multiply_accumulates, trace
from asge_zoo.errors import SpecError
from asge_zoo.graph.unit import Attribute, Ref, Step, Unit

BY_CONVOLUTION = Cutting()


class Pieces(NamedTuple):
    """A backbone cut into units.

    Attributes:
        units: in order.
        answer: the value that the backbone gives.
        values: every value's shape, strides and dtype, by name: tensors on the meta device.
    """

    units: list[Unit]
    answer: str
    values: dict[str, Tensor]


def cut(backbone: nn.Module, image_shape: tuple[int, int, int], cutting: Cutting = BY_CONVOLUTION) -> Pieces:
    """Cut a backbone into units, which know nothing yet of a rule: no goodness, no parameters but the backbone's.

    Args:
        backbone: from images (B, C, H, W) to a feature map, or to pooled features (B, C).
        image_shape: (C, H, W) of an image.
        cutting: where.

    Raises:
        SpecError: it can't be traced, does not take such images, or can't be cut so that all of it learns.
    """
    graph = trace(backbone, image_shape)
    modules = dict(backbone.named_modules())
    _fetch_where_used(graph)
    parts = segments(graph, modules, cutting)
    answer = _check(graph, parts, backbone, modules)
    values = {value_name(node): node.meta[VALUE] for node in graph.nodes if VALUE in node.meta}
    last = channels_last(graph, modules)
    units = [
        _with_maps(_unit(index, name, parts, modules), parts[index], modules, values, last)
        for index, name in enumerate(_unit_names(parts, cutting))
    ]
    return Pieces(units, value_name(answer), values)


def _fetch_where_used(graph: fx.Graph) -> None:
    """Give each user of a tensor of the backbone's a fetch of its own; put what depends on no image before its user."""
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        for user in list(node.users):
            with graph.inserting_before(user):
                own = graph.get_attr(str(node.target))
            own.meta = dict(node.meta)
            user.replace_input_with(node, own)
        graph.erase_node(node)
    free = free_of_images(graph)
    for node in reversed(list(graph.nodes)):  # which is changed on the way
        if node in free and len(node.users) == 1:
            next(iter(node.users)).prepend(node)


def _unit_names(parts: Sequence[Segment], cutting: Cutting) -> list[str]:
    """By its first convolution, or what its convolutions' names have in common, where no other unit's begin so."""
    if cutting.by == "conv":
        return [part.convolutions[0] for part in parts]
    found = []
    for part in parts:
        shared = common_name(part.convolutions)
        others = [name for other in parts if other is not part for name in other.convolutions]
        alone = shared and not any(name == shared or name.startswith(f"{shared}.") for name in others)
        found.append(shared if alone else part.convolutions[0])
    return found


# What is refused.


def _check(graph: fx.Graph, parts: list[Segment], backbone: nn.Module, modules: Mapping[str, nn.Module]) -> fx.Node:
    """Refuse what can't be cut, and what no unit could teach; gives the backbone's answer."""
    answer = next(node for node in graph.nodes if node.op == "output").args[0]
    if not isinstance(answer, fx.Node) or not isinstance(answer.meta[VALUE], Tensor):
        raise SpecError("backbone: must give one tensor")
    if not parts[0].convolutions:
        raise SpecError("backbone: holds no convolution, so there is nothing to cut into units")
    owners: dict[int, tuple[int, str]] = {}
    for index, part in enumerate(parts):
        _check_taught(part, modules)
        for name, tensor in _trained(part, modules).items():
            if owners.setdefault(id(tensor), (index, name)) != (index, name):
                name = name.removeprefix(PREFIX)
                raise SpecError(f"backbone: '{name}' is used twice, and a parameter can belong to one unit only")
        for node in crossing(parts, index) if index else ():
            value = node.meta[VALUE]
            if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != BATCH:
                raise SpecError(
                    f"backbone: '{node.name}', which has no image a row, passes to unit '{part.convolutions[0]}' from "
                    f"the one before; compute it where it is used"
                )
    for name, tensor in backbone.named_parameters():
        if tensor.requires_grad and id(tensor) not in owners:
            raise SpecError(f"backbone: '{name}' is a parameter that nothing uses; leave it out")
    return answer


def _check_taught(part: Segment, modules: Mapping[str, nn.Module]) -> None:
    """All parameters of the segment must lead to its goodness."""
    learning = [node for node in part.nodes if learns(node, modules)]
    if not part.convolutions:
        raise SpecError(
            f"backbone: '{learning[0].target}' learns behind the goodness of the last unit: nothing teaches it"
        )
    seen = {activation_of(part, modules)}
    for node in reversed(part.nodes):
        if node in seen:
            seen.update(node.all_input_nodes)
    for node in learning:
        if node not in seen:
            raise SpecError(
                f"backbone: '{node.target}' does not lead to what goodness reads of unit '{part.convolutions[0]}', so "
                f"nothing teaches it; cut it by blocks, or compute it later in the forward pass"
            )
        if isinstance(modules.get(str(node.target)), nn.Linear) and node.meta[VALUE].ndim == 3:
            raise SpecError(
                f"backbone: '{node.target}' is a linear layer on tokens, of which no unit can be made; take a "
                f"convolutional network"
            )


def _trained(part: Segment, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The segment's trainable parameters by the graph's names."""
    tensors = {name: tensor for node in part.nodes for name, tensor in tensors_of(node, modules).items()}
    return {name: x for name, x in tensors.items() if isinstance(x, nn.Parameter) and x.requires_grad}


# A unit from its segment.


def _unit(index: int, name: str, parts: Sequence[Segment], modules: Mapping[str, nn.Module]) -> Unit:
    part = parts[index]
    own = set(part.nodes)
    sources = dict.fromkeys(source for node in part.nodes for source in node.all_input_nodes if source not in own)
    reads = [node for node in sources if IS_BATCH not in node.meta]
    needed_later = crossing(parts, index + 1) if index + 1 < len(parts) else []
    steps = [_step(node, modules) for node in part.nodes]
    if len(reads) < len(sources):
        steps.insert(0, Step(BATCH_SIZE, "size", (Ref(value_name(reads[0])), 0)))
    called = [node for node in part.nodes if node.op == "call_module"]
    tensors = dict.fromkeys(name for node in part.nodes for name in tensors_of(node, modules))
    trained = _trained(part, modules)
    buffers = {
        f"{PREFIX}{node.target}.{name}" for node in called for name, _ in modules[str(node.target)].named_buffers()
    }
    return Unit(
        name=name,
        channels=0,
        height=0,
        width=0,
        partition=0,
        goodness_dim=0,
        parameters=tuple(name for name in tensors if name in trained),
        constants=tuple(name for name in tensors if name not in trained),
        buffers=tuple(name for name in tensors if name in buffers),
        macs=sum(multiply_accumulates(node, modules) for node in part.nodes),
        output_shape=(),
        input_numel=sum(node.meta[VALUE][0].numel() for node in reads),
        steps=tuple(steps),
        activation="",
        output="",
        reads=tuple(value_name(node) for node in reads),
        makes=tuple(value_name(node) for node in part.nodes if node in needed_later),
        keeps=tuple(value_name(node) for node in needed_later),
    )


def _with_maps(
    unit: Unit, part: Segment, modules: Mapping[str, nn.Module], values: dict[str, Tensor], last: Set[fx.Node]
) -> Unit:
    """The unit with what goodness reads, (B, C, H, W), and what leaves it last, brought into that form where needed."""
    steps = list(unit.steps)

    def channels_first(node: fx.Node) -> str:
        name = value_name(node)
        if node not in last:
            return name
        if (first := f"{name}.first") not in values:
            steps.append(Step(first, "permute", (Ref(name), 0, 3, 1, 2)))
            values[first] = values[name].permute(0, 3, 1, 2)
        return first

    output, activation = channels_first(last_of(part)), channels_first(activation_of(part, modules))
    if values[activation].ndim == 2:
        flat, activation = activation, f"{activation}.map"
        steps.append(Step(activation, "reshape", (Ref(flat), -1, values[flat].shape[1], 1, 1)))
        values[activation] = values[flat][:, :, None, None]
    if values[activation].ndim != 4:
        raise SpecError(f"backbone: unit '{unit.name}' gives no map, but {values[activation].ndim} dimensions")
    channels, height, width = values[activation].shape[1:]
    return replace(
        unit,
        steps=tuple(steps),
        activation=activation,
        output=output,
        output_shape=tuple(values[output].shape[1:]),
        channels=channels,
        height=height,
        width=width,
    )


def _step(node: fx.Node, modules: Mapping[str, nn.Module]) -> Step:
    def reference(argument: Any) -> Any:
        return cast(Any, map_arg)(argument, lambda source: Ref(value_name(source)))

    tensors = tuple((name[name.rindex(".") + 1 :], name) for name in tensors_of(node, modules))
    args, kwargs = tuple(reference(node.args)), dict(reference(node.kwargs))
    if node.op == "get_attr":
        return Step(node.name, Attribute(*owner_of(node, modules)), tensors=tensors)
    if node.op == "call_module":
        module, prefix = modules[str(node.target)], f"{PREFIX}{node.target}."
        return Step(node.name, module, args, kwargs, tuple((name.removeprefix(prefix), name) for _, name in tensors))
    return Step(node.name, cast(Any, node.target), args, kwargs)
