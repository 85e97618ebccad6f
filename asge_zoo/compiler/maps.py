"""The map that goodness reads of a unit, and which maps have their channels last, (B, H, W, C)."""

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from asge_zoo.compiler.nodes import learns
from asge_zoo.compiler.segments import Segment
from asge_zoo.compiler.trace import IS_BATCH, VALUE, is_convolution
from asge_zoo.ops.transfer import Transfer

TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


def channels_last(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> set[fx.Node]:
    """The values that are such maps. Convolutions give (B, C, H, W), linear layers on maps (B, H, W, C); what is turned
    by a permutation is so from there on, and all else is as what it is computed from."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        value = node.meta.get(VALUE)
        if not isinstance(value, Tensor) or value.ndim != 4:
            continue
        turned = _permutation(node)
        if turned in (TO_LAST, TO_FIRST):
            last = turned == TO_LAST
        elif is_convolution(node, modules):
            last = isinstance(modules.get(str(node.target)), nn.Linear)
        else:
            last = any(source in found for source in node.all_input_nodes)
        if last:
            found.add(node)
    return found


def _permutation(node: fx.Node) -> tuple[int, ...] | None:
    if node.target not in ("permute", torch.permute):
        return None
    dims = node.kwargs.get("dims") or (node.args[1] if len(node.args) == 2 else node.args[1:])
    return tuple(dim % 4 if isinstance(dim, int) else -1 for dim in dims) if isinstance(dims, (tuple, list)) else None


def last_of(part: Segment) -> fx.Node:
    """What leaves a unit last."""
    return next(node for node in reversed(part.nodes) if isinstance(node.meta[VALUE], Tensor))


def activation_of(part: Segment, modules: Mapping[str, nn.Module]) -> fx.Node:
    """What goodness reads: what enters the unit's transfer, or else what leaves the unit last, before it is pooled."""
    for node in reversed(part.nodes):
        if isinstance(modules.get(str(node.target)), Transfer) and node in part.dependent:
            return node.all_input_nodes[0]
    node = found = last_of(part)
    while not learns(node, modules):
        sources = [source for source in node.all_input_nodes if IS_BATCH not in source.meta]
        if len(sources) != 1 or sources[0] not in part.dependent or not _pools(sources[0], node, modules):
            break
        (node,) = sources
        found = node if isinstance(node.meta[VALUE], Tensor) and node.meta[VALUE].ndim == 4 else found
    return found


def _pools(source: fx.Node, node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether an operation makes a map smaller and no more: pools, flattens or splits it, or leaves it as it is."""
    before, after = source.meta[VALUE], node.meta[VALUE]
    if node.op == "call_module" and isinstance(modules[str(node.target)], (nn.Identity, nn.Dropout)):
        return True
    if isinstance(before, tuple) or isinstance(after, tuple):
        return True
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    flattens = after.ndim < before.ndim and after.numel() == before.numel()
    return flattens or (after.numel() < before.numel() and after.shape[:2] == before.shape[:2])
