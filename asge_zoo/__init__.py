"""asge-zoo: convolutional networks trained without backpropagation, from a JSON spec.

Public names are imported on first use, so that `import asge_zoo` does not load torch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asge_zoo.compiler.build import compile_spec
    from asge_zoo.engine.result import RunResult
    from asge_zoo.engine.train import train
    from asge_zoo.graph.local_graph import LocalGraph
    from asge_zoo.graph.rule import StepResult
    from asge_zoo.hub.models import load
    from asge_zoo.hub.pull import pull
    from asge_zoo.hub.push import push
    from asge_zoo.spec import Spec, load_spec

_HOMES = {
    "LocalGraph": "asge_zoo.graph.local_graph",
    "RunResult": "asge_zoo.engine.result",
    "Spec": "asge_zoo.spec",
    "StepResult": "asge_zoo.graph.rule",
    "compile_spec": "asge_zoo.compiler.build",
    "load": "asge_zoo.hub.models",
    "load_spec": "asge_zoo.spec",
    "pull": "asge_zoo.hub.pull",
    "push": "asge_zoo.hub.push",
    "train": "asge_zoo.engine.train",
}

__all__ = [
    "LocalGraph",
    "RunResult",
    "Spec",
    "StepResult",
    "compile_spec",
    "load",
    "load_spec",
    "pull",
    "push",
    "train",
]

try:
    __version__ = version("asge-zoo")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'asge_zoo' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
