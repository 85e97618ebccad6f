"""Cutting a traced backbone into units."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from asge_zoo.backbones.base import Cutting
from asge_zoo.compiler.segments import Segment, common_name, crossing, segments
from asge_zoo.compiler.trace import IS_BATCH, VALUE, multiply_accumulates, trace
from asge_zoo.errors import SpecError
from asge_zoo.graph.unit import INPUT, Attribute, Ref, Step, Unit
from asge_zoo.ops.transfer import Transfer

PREFIX = "backbone."
BY_CONVOLUTION = Cutting()
BATCH_SIZE = "batch.size"  # no name that fx gives


class Pieces(NamedTuple):
    """A backbone cut into units, and every value's shape, strides and dtype: tensors on the meta device, by name."""

    units: list[Unit]
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
    _check(graph, parts, modules)
    names = _unit_names(parts, cutting)
    values = {_value_name(node): node.meta[VALUE] for node in graph.nodes if VALUE in node.meta}
    units = []
    for index, name in enumerate(names):
        unit = _unit(index, name, parts, modules)
        units.append(_with_map(unit, parts[index], modules, values))
    return Pieces(units, values)


def _fetch_where_used(graph: fx.Graph) -> None:
    """Give each user of a parameter or buffer outside modules a fetch of its own, right before it."""
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        for user in list(node.users):
            with graph.inserting_before(user):
                own = graph.get_attr(str(node.target))
            own.meta = dict(node.meta)
            user.replace_input_with(node, own)
        graph.erase_node(node)


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


def _check(graph: fx.Graph, parts: list[Segment], modules: Mapping[str, nn.Module]) -> None:
    """Refuse what can't be cut, and what no unit could teach."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    answer = next(node for node in graph.nodes if node.op == "output").args[0]
    if len(inputs) != 1 or not isinstance(answer, fx.Node) or not isinstance(answer.meta[VALUE], Tensor):
        raise SpecError("backbone: must take images and nothing else, and give one tensor")
    if not parts or not parts[0].convolutions:
        raise SpecError("backbone: holds no convolution, so there is nothing to cut into units")
    taught: dict[str, Segment] = {}
    for index, part in enumerate(parts):
        _check_taught(part, modules, taught)
        passed = crossing(parts, index) if index else []
        if odd := [node for node in passed if not isinstance(node.meta[VALUE], Tensor)]:
            raise SpecError(
                f"backbone: '{odd[0].name}' is no tensor, and passes to unit '{part.convolutions[0]}' from the one "
                f"before; compute it where it is used"
            )


def _check_taught(part: Segment, modules: Mapping[str, nn.Module], taught: dict[str, Segment]) -> None:
    """Each parameter of the segment must lead to its goodness, and be no other's in `taught`, where it is noted."""
    learning = [node for node in part.nodes if _learns(node, modules)]
    if not part.convolutions:
        raise SpecError(
            f"backbone: '{learning[0].target}' learns behind the goodness of the last unit: nothing teaches it"
        )
    seen = {_activation(part, modules)}
    for node in reversed(part.nodes):
        if node in seen:
            seen.update(node.all_input_nodes)
    for node in learning:
        target = str(node.target)
        if node not in seen:
            raise SpecError(
                f"backbone: '{target}' does not lead to what goodness reads of unit '{part.convolutions[0]}', so "
                f"nothing teaches it; compute it later in the forward pass"
            )
        if taught.setdefault(target, part) is not part:
            raise SpecError(f"backbone: '{target}' is used twice, and a module can belong to one unit only")


def _learns(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether an operation has parameters, or is one."""
    if node.op == "get_attr":
        owner, name = _owner(node, modules)
        tensor = getattr(owner, name)
        if not isinstance(tensor, nn.Parameter) and name not in dict(owner.named_buffers(recurse=False)):
            raise SpecError(f"backbone: '{node.target}' is a tensor but no parameter or buffer; register it as one")
        return isinstance(tensor, nn.Parameter)
    return node.op == "call_module" and any(True for _ in modules[str(node.target)].parameters())


def _owner(node: fx.Node, modules: Mapping[str, nn.Module]) -> tuple[nn.Module, str]:
    """The module that holds a fetched tensor, and the tensor's name there."""
    path, _, name = str(node.target).rpartition(".")
    return modules[path], name


# A unit from its segment.


def _unit(index: int, name: str, parts: Sequence[Segment], modules: Mapping[str, nn.Module]) -> Unit:
    part = parts[index]
    own = set(part.nodes)
    sources = dict.fromkeys(source for node in part.nodes for source in node.all_input_nodes if source not in own)
    reads = [node for node in sources if IS_BATCH not in node.meta]
    needed_later = crossing(parts, index + 1) if index + 1 < len(parts) else []
    steps = [_step(node, modules) for node in part.nodes]
    if len(reads) < len(sources):
        steps.insert(0, Step(BATCH_SIZE, "size", (Ref(_value_name(reads[0])), 0)))
    called = [node for node in part.nodes if node.op == "call_module"]
    tensors = {name: tensor for node in part.nodes for name, tensor in _tensors(node, modules).items()}
    trained = {name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter) and tensor.requires_grad}
    buffers = {
        f"{PREFIX}{node.target}.{name}" for node in called for name, _ in modules[str(node.target)].named_buffers()
    }
    output = part.nodes[-1]
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
        output_shape=tuple(output.meta[VALUE].shape[1:]),
        input_numel=sum(node.meta[VALUE][0].numel() for node in reads),
        steps=tuple(steps),
        activation="",
        output=_value_name(output),
        reads=tuple(_value_name(node) for node in reads),
        makes=tuple(_value_name(node) for node in part.nodes if node in needed_later),
        keeps=tuple(_value_name(node) for node in needed_later),
    )


def _with_map(unit: Unit, part: Segment, modules: Mapping[str, nn.Module], values: dict[str, Tensor]) -> Unit:
    """The unit with the map that goodness reads, (B, C, H, W): brought into that form where it has another."""
    node = _activation(part, modules)
    value, name = node.meta[VALUE], _value_name(node)
    steps = unit.steps
    if value.ndim == 2:
        steps += (Step(f"{name}_map", "reshape", (Ref(name), -1, value.shape[1], 1, 1)),)
    elif value.ndim == 4 and _channels_last(node, modules):
        steps += (Step(f"{name}_map", "permute", (Ref(name), 0, 3, 1, 2)),)
    elif value.ndim != 4:
        raise SpecError(f"backbone: unit '{unit.name}' gives no map of features, but {value.ndim} dimensions")
    if len(steps) > len(unit.steps):
        value = values[steps[-1].name] = steps[-1]({name: value}, None)
    activation = steps[-1].name if len(steps) > len(unit.steps) else name
    channels, height, width = value.shape[1:]
    return replace(unit, steps=steps, activation=activation, channels=channels, height=height, width=width)


def _channels_last(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a map (B, H, W, C) comes out of a linear layer, shape kept since."""
    shape = node.meta[VALUE].shape
    while isinstance(node.meta[VALUE], Tensor) and node.meta[VALUE].shape == shape and node.all_input_nodes:
        if isinstance(modules.get(str(node.target)), nn.Linear):
            return True
        node = node.all_input_nodes[0]
    return False


def _activation(part: Segment, modules: Mapping[str, nn.Module]) -> fx.Node:
    """What goodness reads: what enters the unit's transfer, or else what leaves the unit last, before it is pooled."""
    for node in reversed(part.nodes):
        if isinstance(modules.get(str(node.target)), Transfer) and node in part.dependent:
            return node.all_input_nodes[0]
    node = found = part.nodes[-1]
    while not _learns(node, modules) and len(node.all_input_nodes) == 1:
        (source,) = node.all_input_nodes
        if source not in part.dependent or not _pools(source, node, modules):
            break
        node = source
        found = node if isinstance(node.meta[VALUE], Tensor) else found
    return found


def _pools(source: fx.Node, node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether an operation makes a map smaller and no more: pools, flattens or splits it, or leaves it as it is."""
    before, after = source.meta[VALUE], node.meta[VALUE]
    if node.op == "call_module" and isinstance(modules[str(node.target)], (nn.Identity, nn.Dropout)):
        return True
    if isinstance(before, tuple) or isinstance(after, tuple):
        return True
    if before.ndim != 4:
        return False
    flattens = after.ndim == 2 and after.numel() == before.numel()
    return flattens or (after.numel() < before.numel() and after.shape[:2] == before.shape[:2])


def _step(node: fx.Node, modules: Mapping[str, nn.Module]) -> Step:
    def reference(argument: Any) -> Any:
        return cast(Any, map_arg)(argument, lambda source: Ref(_value_name(source)))

    tensors = tuple((name[name.rindex(".") + 1 :], name) for name in _tensors(node, modules))
    args, kwargs = tuple(reference(node.args)), dict(reference(node.kwargs))
    if node.op == "get_attr":
        return Step(node.name, Attribute(*_owner(node, modules)), tensors=tensors)
    if node.op == "call_module":
        module, prefix = modules[str(node.target)], f"{PREFIX}{node.target}."
        return Step(node.name, module, args, kwargs, tuple((name.removeprefix(prefix), name) for _, name in tensors))
    return Step(node.name, cast(Any, node.target), args, kwargs)


def _tensors(node: fx.Node, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """A module's parameters and buffers, or a fetched one, by the graph's names."""
    if node.op == "get_attr":
        owner, name = _owner(node, modules)
        return {f"{PREFIX}{node.target}": getattr(owner, name)}
    if node.op != "call_module":
        return {}
    module = modules[str(node.target)]
    return {f"{PREFIX}{node.target}.{name}": x for name, x in (*module.named_parameters(), *module.named_buffers())}


def _value_name(node: fx.Node) -> str:
    if IS_BATCH in node.meta:
        return BATCH_SIZE
    return INPUT if node.op == "placeholder" else node.name
