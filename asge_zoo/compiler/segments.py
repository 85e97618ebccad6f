"""Where a traced backbone is cut: which operations belong together and learn as one unit.

A unit opens at a convolution that depends on the open unit's convolution; one that does not (a
shortcut's projection) is parallel and joins it, and so does one that gates it (squeeze and excitation).
In or behind a `Transfer`, where the unit's goodness has been read, parameters belong to the next unit,
and so does all that follows them. All else belongs to the unit before it. Blocks and stages are such
units joined.
"""

import operator
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import fx, nn

from asge_zoo.backbones.base import Cutting
from asge_zoo.compiler.nodes import learns
from asge_zoo.compiler.trace import IS_BATCH, is_convolution
from asge_zoo.errors import SpecError
from asge_zoo.ops.transfer import Transfer

PRODUCTS = (operator.mul, torch.mul, torch.multiply, "mul", "multiply")


@dataclass
class Segment:
    """A unit in the making: its nodes, its convolutions' names, and what depends on the first of these."""

    nodes: list[fx.Node] = field(default_factory=list)
    convolutions: list[str] = field(default_factory=list)
    dependent: set[fx.Node] = field(default_factory=set)
    transferred: bool = False


def segments(graph: fx.Graph, modules: Mapping[str, nn.Module], cutting: Cutting) -> list[Segment]:
    """The graph's operations by unit, in order; what depends on no image must stand right before what uses it.

    Raises:
        SpecError: there are no blocks or stages to cut into.
    """
    single = _by_convolution(graph, modules)
    if cutting.by == "conv" or len(single) == 1:
        return single
    ends = None if cutting.by == "block" else _ends(single, cutting.stages)
    groups, place, last_cut = [[single[0]]], len(single[0].nodes), 0
    for index, segment in enumerate(single[1:], start=1):
        due = ends is None or any(last_cut < end <= place for end in ends)
        if due and len(crossing(single, index)) == 1:
            groups.append([])
            last_cut = place
        groups[-1].append(segment)
        place += len(segment.nodes)
    if len(groups) == 1:
        raise SpecError(f"backbone: has no {cutting.by}s, between which a single tensor passes; cut it by convolution")
    return [_joined(group) for group in groups]


def crossing(parts: Sequence[Segment], index: int) -> list[fx.Node]:
    """The values from before segment `index` that it or a later one reads."""
    later = {node for segment in parts[index:] for node in segment.nodes}
    read = {source: None for segment in parts[index:] for node in segment.nodes for source in node.all_input_nodes}
    return [source for source in read if source not in later and IS_BATCH not in source.meta]


def common_name(names: Sequence[str]) -> str:
    """What dotted names have in common: `layer1.0` of `layer1.0.conv1` and `layer1.0.conv2`; empty if nothing."""
    words = zip(*(name.split(".") for name in names), strict=False)
    return ".".join(word[0] for word in takewhile(lambda word: len(set(word)) == 1, words))


def convolution_name(node: fx.Node) -> str:
    """A convolution's own name, or that of its weight where it is a function."""
    if node.op == "call_module":
        return str(node.target)
    weight = node.kwargs.get("weight") or node.args[1]
    return str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else node.name


def _by_convolution(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> list[Segment]:
    found = [Segment()]
    free = free_of_images(graph)
    waiting: list[fx.Node] = []  # of these, what the next operation uses
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or IS_BATCH in node.meta:
            continue
        if node in free:
            waiting.append(node)
            continue
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        depends = any(source in found[-1].dependent for source in node.all_input_nodes)
        convolves = is_convolution(node, modules)
        behind = found[-1].transferred or isinstance(module, Transfer)
        opens = (convolves and not _gates(node, found[-1].dependent)) or (behind and learns(node, modules))
        if depends and opens:
            found.append(Segment())
            depends = False
        current = found[-1]
        current.nodes += [*waiting, node]
        waiting = []
        if convolves and not (depends and current.convolutions):
            current.convolutions.append(convolution_name(node))
        if depends or convolves:
            current.dependent.add(node)
        if depends and isinstance(module, Transfer):
            current.transferred = True
    return found


def free_of_images(graph: fx.Graph) -> set[fx.Node]:
    """The values that are parameters or buffers, or computed from such alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" or (node.op != "output" and sources and found.issuperset(sources)):
            found.add(node)
    return found


def _gates(convolution: fx.Node, dependent: Set[fx.Node]) -> bool:
    """Whether its result, through single users, multiplies a value of the open unit that it was computed from."""
    node = convolution
    while len(node.users) == 1:
        (user,) = node.users
        others = [source for source in user.all_input_nodes if source is not node and source in dependent]
        if user.target in PRODUCTS and any(_leads_to(source, convolution) for source in others):
            return True
        node = user
    return False


def _leads_to(source: fx.Node, node: fx.Node) -> bool:
    seen, waiting = {node}, [node]
    while waiting:
        fresh = set(waiting.pop().all_input_nodes) - seen
        seen |= fresh
        waiting += fresh
    return source in seen


def _ends(parts: Sequence[Segment], stages: Sequence[str]) -> list[int]:
    """Of each stage that is there, how many operations there are up to its last."""
    nodes = [node for segment in parts for node in segment.nodes]
    last = {stage: place for stage in stages for place, node in enumerate(nodes, start=1) if _within(node, stage)}
    return list(last.values())


def _within(node: fx.Node, name: str) -> bool:
    """Whether an operation is the submodule of that name, or in it."""
    paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return name in paths or (node.op == "call_module" and str(node.target) == name)


def _joined(group: Sequence[Segment]) -> Segment:
    return Segment(
        nodes=[node for segment in group for node in segment.nodes],
        convolutions=[name for segment in group for name in segment.convolutions],
        dependent=set().union(*(segment.dependent for segment in group)),
    )
