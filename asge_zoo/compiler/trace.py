"""Tracing a backbone with torch.fx, every value's shape known on the way, from the meta device.

So a backbone may branch on shapes; what it may not is branch on values. The size of a batch stays open.
"""

import copy
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.fx.proxy import TraceError

from asge_zoo.errors import SpecError
from asge_zoo.ops.transfer import Transfer

BATCH = 100_003  # images while tracing, which costs nothing: a size that nothing else has by chance
VALUE = "value"  # under which a node's meta has what it is, on the meta device
IS_BATCH = "is_batch"  # whether it is the size of a batch

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
FUNCTIONAL_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "pow", "matmul")
IN_PLACE = {getattr(operator, f"i{name}"): getattr(operator, name) for name in OPERATORS}


class ShapedProxy(fx.Proxy):
    """A value under trace that knows its sizes; the batch's is a value, too."""

    def __iter__(self) -> Iterator[Any]:
        value = self.node.meta[VALUE]
        if isinstance(value, (tuple, list)):
            return (cast(Any, self)[i] for i in range(len(value)))
        return super().__iter__()

    def __len__(self) -> int:
        value = self.node.meta[VALUE]
        return len(value) if isinstance(value, (tuple, list)) else super().__len__()

    @property
    def ndim(self) -> int:
        return self.node.meta[VALUE].ndim

    @property
    def shape(self) -> tuple[Any, ...]:
        return cast(UnitTracer, self.tracer).sizes(self)

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]


class UnitTracer(fx.Tracer):
    """Traces into whatever holds a convolution or a linear layer; everything else stays whole.

    So flags (training or not), asserts and buffer updates stay inside modules, and nothing is baked in.
    """

    proxy_buffer_attributes = True

    def __init__(self, module: nn.Module, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.twin = copy.deepcopy(module).to("meta")
        self.tensors = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
        self.batch: fx.Proxy | None = None
        self.computes = False  # a value, in which modules are called as ever

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        return root_fn, [self.root, self.create_proxy("placeholder", "images", (), {})]  # all else by its default

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        apart = (*CONVOLUTIONS, nn.Linear, Transfer)
        return isinstance(m, apart) or not any(isinstance(inner, apart) for inner in m.modules())

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self.computes else super().call_module(m, forward, args, kwargs)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **others: Any) -> fx.Node:
        target, kwargs = _out_of_place(kind, target, kwargs)
        node = super().create_node(kind, target, args, kwargs, *rest, **others)
        if kind != "output":
            node.meta[VALUE] = self._value(node)
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        proxy = ShapedProxy(node, self)
        if node.op == "placeholder":
            self.images = proxy
        return proxy

    def sizes(self, proxy: fx.Proxy) -> tuple[Any, ...]:
        """A value's shape, but for the size of the batch, which is traced."""
        shape = tuple(proxy.node.meta[VALUE].shape)
        if BATCH not in shape:
            return shape
        if self.batch is None:  # one for all, so that shapes can be compared
            self.batch = self.create_proxy("call_method", "size", (self.images, 0), {})
            self.batch.node.meta[IS_BATCH] = True
        return tuple(self.batch if size == BATCH else size for size in shape)

    def _value(self, node: fx.Node) -> Any:
        """What a node is, on the meta device."""
        args, kwargs = cast(Any, map_arg)((node.args, node.kwargs), lambda source: source.meta[VALUE])
        target = cast(Any, node.target)
        self.computes = True
        try:
            with torch.no_grad():
                if node.op == "placeholder":
                    return torch.empty(BATCH, *self.image_shape, device="meta")
                if node.op == "get_attr":
                    constant = target not in self.tensors  # which fx has put into the root itself
                    return operator.attrgetter(target)(self.root if constant else self.twin).to("meta")
                if node.op == "call_module":
                    return self.twin.get_submodule(target)(*args, **kwargs)
                function = operator.methodcaller(target, *args[1:], **kwargs) if node.op == "call_method" else None
                return function(args[0]) if function else target(*args, **kwargs)
        except (RuntimeError, ValueError, IndexError) as error:
            size, (reason, *_) = "×".join(map(str, self.image_shape)), str(error).splitlines() or ["no reason given"]
            raise SpecError(f"backbone: does not take images of {size} ({reason})") from error
        finally:
            self.computes = False


def _out_of_place(kind: str, target: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """An operation that leaves its arguments as they are: they may be another unit's."""
    name = target if kind == "call_method" else getattr(target, "__name__", "")
    if kind == "call_function":
        target = IN_PLACE.get(target, target)
    if name.endswith("_") and not name.endswith("__"):
        plain = name[:-1]
        target = plain if kind == "call_method" else getattr(torch, plain, getattr(F, plain, target))
    return target, {key: False if key == "inplace" else value for key, value in kwargs.items()}


def trace(module: nn.Module, image_shape: tuple[int, int, int]) -> fx.Graph:
    """The module's forward pass as a graph whose leaves are modules; each node's meta has its `VALUE`.

    Args:
        module: from images to one tensor. Its modules' `inplace` flags are switched off.
        image_shape: (C, H, W) of an image.

    Raises:
        SpecError: the module branches on data, does not take such images, or is otherwise not traceable.
    """
    for inner in module.modules():
        if getattr(inner, "inplace", False) is True:
            setattr(inner, "inplace", False)  # noqa: B010, a type checker knows no such attribute
    try:
        graph = UnitTracer(module, image_shape).trace(module)
    except SpecError:
        raise
    except Exception as error:  # whatever a forward pass raises that meets a proxy where it knows tensors
        reason = " ".join(str(error).split()) or type(error).__name__
        hint = "; a branch may depend on shapes, not on values" if isinstance(error, TraceError) else ""
        raise SpecError(f"backbone: can't be traced into units ({reason}){hint}") from error
    for node in list(graph.nodes):
        if node.target is operator.getitem and not isinstance(node.args[0].meta[VALUE], Tensor):
            node.args[0].append(node)  # parts of a tuple stand behind it: a unit passes on tensors, and no tuples
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    return graph


def is_convolution(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node is what a unit is built around: a convolution, or a linear layer on a map."""
    if node.op == "call_function":
        return node.target in FUNCTIONAL_CONVOLUTIONS
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    return isinstance(module, CONVOLUTIONS) or (isinstance(module, nn.Linear) and node.meta[VALUE].ndim == 4)


def multiply_accumulates(node: fx.Node, modules: Mapping[str, nn.Module]) -> int:
    """Multiply-accumulates of a convolution or linear layer per image; 0 for all else."""
    if node.op == "call_function" and node.target in FUNCTIONAL_CONVOLUTIONS:
        weight = cast(fx.Node, node.kwargs.get("weight") or node.args[1]).meta[VALUE]
    else:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            return 0
        weight = module.weight
    value: Tensor = node.meta[VALUE]
    return value[0].numel() * weight[0].numel()
