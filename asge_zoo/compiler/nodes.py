"""What a traced operation has to do with the backbone's tensors, and the names that units know them by."""

from collections.abc import Mapping

from torch import Tensor, fx, nn

from asge_zoo.compiler.trace import IS_BATCH
from asge_zoo.errors import SpecError
from asge_zoo.graph.unit import INPUT

PREFIX = "backbone."
BATCH_SIZE = "batch.size"  # no name that fx gives


def value_name(node: fx.Node) -> str:
    """The name that units give a value."""
    if IS_BATCH in node.meta:
        return BATCH_SIZE
    return INPUT if node.op == "placeholder" else node.name


def tensors_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """A module's parameters and buffers, or a fetched one, by the graph's names."""
    if node.op == "get_attr":
        owner, name = owner_of(node, modules)
        return {f"{PREFIX}{node.target}": getattr(owner, name)}
    if node.op != "call_module":
        return {}
    module = modules[str(node.target)]
    return {f"{PREFIX}{node.target}.{name}": x for name, x in (*module.named_parameters(), *module.named_buffers())}


def owner_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> tuple[nn.Module, str]:
    """The module that holds a fetched tensor, and the tensor's name there."""
    path, _, name = str(node.target).rpartition(".")
    return modules[path], name


def learns(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether an operation has parameters to train, or is one."""
    if node.op == "get_attr":
        owner, name = owner_of(node, modules)
        if name not in {**owner._parameters, **owner._buffers}:
            raise SpecError(f"backbone: '{node.target}' is a tensor but no parameter or buffer; register it as one")
        return getattr(owner, name).requires_grad
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    return module is not None and any(parameter.requires_grad for parameter in module.parameters())
