"""A step's launches on a GPU, recorded once and replayed, which costs the host next to nothing."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from asge_zoo.graph.rule import StepResult
from asge_zoo.graph.unit import Values

WARM_UP = 3  # calls before the recording: they compile, and let the libraries choose their kernels


class Replay:
    """A training step as a CUDA graph, recorded on its first call.

    What it returns is overwritten by its next call. For other shapes, or where a tensor has moved, it is recorded anew.
    Where a step can't be recorded, because a part of it waits for the GPU, it runs as it is, and a warning says so.

    Args:
        step: see `LocalGraph.step_fn`, compiled or not; its tensors are on a GPU.
    """

    def __init__(self, step: Callable[..., StepResult]) -> None:
        self._step = step
        self._recorded: tuple[Any, ...] | None = None
        self._replayed: tuple[torch.cuda.CUDAGraph, StepResult] | None = None

    def __call__(self, params: Values, state: Values, images: Tensor, labels: Tensor) -> StepResult:
        places = (x.data_ptr() for x in (*params.values(), *state.values()))
        found = (images.shape, images.dtype, labels.shape, *places)
        if found != self._recorded:
            self._record(params, state, images, labels)
            self._recorded = found
        if self._replayed is None:
            return self._step(params, state, images, labels)
        graph, result = self._replayed
        self._images.copy_(images)
        self._labels.copy_(labels)
        graph.replay()
        return result

    def _record(self, params: Values, state: Values, images: Tensor, labels: Tensor) -> None:
        self._replayed = None  # its memory is free for what comes
        self._images, self._labels = images.clone(), labels.clone()
        given = params, state, self._images, self._labels
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._step(*given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a loader's threads may allocate
                result = self._step(*given)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            warnings.warn(f"the step runs without a CUDA graph: {' '.join(str(error).split())}", stacklevel=2)
            return
        self._replayed = graph, result
