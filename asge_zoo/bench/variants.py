"""The ways to train a spec's network that `bench` compares, each as a function that does one step.

A step is all that a batch costs: gradients, the optimizer's step (the spec's own, at its first learning rate), running
statistics. The kernels alone have no optimizer. Every variant has a network of its own and reads the same batch.
"""

from collections.abc import Callable
from types import MethodType
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from asge_zoo.bench.baselines import LayerLoop, backprop_step, classifier, loops_over
from asge_zoo.bench.closed_form import ClosedForm, has_closed_form
from asge_zoo.bench.kernels import bare_kernels, convolutions
from asge_zoo.bench.measure import Run
from asge_zoo.compiler.build import compile_spec
from asge_zoo.compiler.check import parts
from asge_zoo.engine.state import TrainState, begin
from asge_zoo.graph.functional import compiled, laid_out_like
from asge_zoo.graph.layout import fastest_layout
from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.spec import Spec

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Way(NamedTuple):
    """`make` builds all that a step needs and returns the step; a compiled one compiles on its first call."""

    make: Callable[[], Run]
    compiles: bool


Variant = dict[str, Way]  # by layout, or whatever it may be run in: the fastest counts


class Batch(NamedTuple):
    """Images (B, C, H, W), float32, and labels (B,), int64, on the device; random numbers."""

    images: Tensor
    labels: Tensor


def random_batch(spec: Spec, device: torch.device) -> Batch:
    """A batch of the spec's size and shapes."""
    data = parts(spec).data
    info = data.info()
    images = torch.randn(data.batch_size, info.channels, info.height, info.width, device=device)
    return Batch(images, torch.randint(len(info.classes), (data.batch_size,), device=device))


def variants(spec: Spec, batch: Batch) -> dict[str, Variant]:
    """What can be run of a spec, by name, the bare kernels first."""
    graph = compile_spec(spec, device="meta")
    network = graph.backbone
    found: dict[str, Variant] = {
        "kernels": kernels(spec, batch),
        "asge_compiled": {"": Way(lambda: asge(spec, batch, compile=True), True)},
        "asge_eager": {"": Way(lambda: asge(spec, batch, compile=False), False)},
        "bp_compiled": _layouts(network, lambda layout: backprop(spec, batch, layout, mode="default"), compiles=True),
        "bp_eager": _layouts(network, lambda layout: backprop(spec, batch, layout, mode=None), compiles=False),
    }
    if has_closed_form(graph):
        found["asge_closed_form"] = {"": Way(lambda: closed_form(spec, batch), True)}
    if loops_over(graph):
        found["layer_loop"] = _layouts(network, lambda layout: layer_loop(spec, batch, layout), compiles=False)
    if batch.images.is_cuda:
        found["bp_cuda_graphs"] = _layouts(
            network, lambda layout: backprop(spec, batch, layout, mode="reduce-overhead"), compiles=True
        )
        found["asge_cuda_graphs"] = {"": Way(lambda: asge(spec, batch, compile=True, cuda_graphs=True), True)}
    return found


def _layouts(network: nn.Module, make: Callable[[torch.memory_format], Run], *, compiles: bool) -> Variant:
    names = LAYOUTS if fastest_layout(network) is torch.channels_last else ("contiguous",)
    return {name: Way(lambda layout=LAYOUTS[name]: make(layout), compiles) for name in names}


def asge(spec: Spec, batch: Batch, *, compile: bool, cuda_graphs: bool = False) -> Run:
    """The step that `train` runs, whatever the spec's rule, its metrics left out; on a GPU that is by CUDA graphs."""
    state = _begin(spec, batch, compile=compile)
    state.graph.cuda_graphs = cuda_graphs
    return lambda: state.update(state.graph.step(*batch))


def closed_form(spec: Spec, batch: Batch) -> Run:
    """The units' gradients by equation 7, compiled as one graph, and the optimizer's step on them."""
    state = _begin(spec, batch, compile=True)  # for its weights' layout; its own step is never run
    gradients = compiled(cast(MethodType, ClosedForm(state.graph).gradients))

    @torch.no_grad()
    def run() -> None:
        found = gradients(*state.graph.tensors(), *batch)
        for name, gradient in laid_out_like(state.parameters, found).items():
            state.parameters[name].grad = gradient
        state.optimizer.step()
        state.optimizer.zero_grad()

    return run


def layer_loop(spec: Spec, batch: Batch, layout: torch.memory_format) -> Run:
    """See `LayerLoop`; eager, its images in that layout, which its maps take after."""
    loop = LayerLoop(_graph(spec, batch, compile=False), parts(spec).optimizer)
    images = batch.images.contiguous(memory_format=layout)

    def run() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=spec.train.precision == "bfloat16"):
            loop.step(images, batch.labels)

    return run


def backprop(spec: Spec, batch: Batch, layout: torch.memory_format, *, mode: str | None) -> Run:
    """See `backprop_step`; images and weights in that layout, the network compiled in that mode; None for eager."""
    network = classifier(parts(spec), batch.images.device, layout)
    optimizer = parts(spec).optimizer.build([{"params": list(network.parameters())}])
    images, bf16 = batch.images.contiguous(memory_format=layout), spec.train.precision == "bfloat16"
    forward = torch.compile(network, mode=mode) if mode else network
    return lambda: backprop_step(forward, optimizer, images, batch.labels, bf16=bf16)


def kernels(spec: Spec, batch: Batch) -> Variant:
    """The bare kernels in each layout, eager and compiled, on a GPU by a CUDA graph too: the fastest is the floor."""
    part, info = parts(spec), parts(spec).data.info()
    with torch.device("meta"):
        network: nn.Module = part.backbone.build(info.channels, pooling=part.pooling, norm=part.norm)
    found = convolutions(network, (info.channels, info.height, info.width), part.data.batch_size)
    dtype = torch.bfloat16 if spec.train.precision == "bfloat16" else torch.float32

    def make(layout: torch.memory_format, compile: bool) -> Run:
        run = bare_kernels(found, dtype, batch.images.device, layout)
        return torch.no_grad()(torch.compile(run, fullgraph=True) if compile else run)

    floors: Variant = {}
    for mode, compile in {"eager": False, "compiled": True}.items():
        ways = _layouts(network, lambda layout, compile=compile: make(layout, compile), compiles=compile)
        floors |= {f"{layout}, {mode}": way for layout, way in ways.items()}
    if batch.images.is_cuda:
        ways = _layouts(network, lambda layout: _recorded(make(layout, False)), compiles=False)
        floors |= {f"{layout}, CUDA graph": way for layout, way in ways.items()}
    return floors


def _recorded(run: Run) -> Run:
    """The same, its launches recorded."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()
    return lambda: (graph.replay(), kept)


def _begin(spec: Spec, batch: Batch, *, compile: bool) -> TrainState:
    return begin(spec, _graph(spec, batch, compile=compile), steps_per_epoch=1000, started=0.0)


def _graph(spec: Spec, batch: Batch, *, compile: bool) -> LocalGraph:
    train = spec.train.model_copy(update={"compile": compile})
    return compile_spec(spec.model_copy(update={"train": train}), device=batch.images.device).train()
