"""What only a GPU can show: skipped where there is none. `tests/test_image_loader.py` has its own of the loaders."""

import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_spec

from asge_zoo.bench.variants import asge, random_batch
from asge_zoo.compiler.build import compile_spec
from asge_zoo.data.augment import Augment
from asge_zoo.data.base import DatasetInfo, Images
from asge_zoo.data.memory import MemoryLoader
from asge_zoo.engine.train import train
from asge_zoo.errors import Stopped
from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.ranks import ALONE
from asge_zoo.spec import Spec, load_spec

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
GPU = "cuda"


@pytest.fixture
def exact_float32() -> Iterator[None]:
    """Convolutions without TensorFloat-32, so that a GPU's sums can be held against a CPU's."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def quarter(*overrides: str) -> Spec:
    """VGG8 on CIFAR-10's shapes, at a quarter of its width."""
    return load_spec("vgg8_cifar10_quarter", overrides=["data.batch_size=32", *overrides])


def gradients(spec: Spec, device: str) -> dict[str, torch.Tensor]:
    """Of a batch that is the same on every device."""
    batch = random_batch(spec, torch.device("cpu"))
    graph = compile_spec(spec, device=device).train()
    found = graph.step(*(tensor.to(device) for tensor in batch)).grads
    return {name: gradient.cpu() for name, gradient in found.items()}


@pytest.mark.compile
@pytest.mark.parametrize("name", ["vgg8_cifar10_quarter", "vgg8_mnist_quarter", "resnet18_cifar10_quarter"])
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_the_compiled_step_is_the_cpus(exact_float32: None, name: str, precision: str, tolerance: float) -> None:
    """Gradients on the CPU against compiled ones on the GPU; MNIST's last map is one pixel, ResNets go by structure."""
    overrides = ["data.batch_size=32", f"train.precision={precision}"]
    torch.manual_seed(0)
    on_gpu = gradients(load_spec(name, overrides=overrides), GPU)
    torch.manual_seed(0)
    expected = gradients(
        load_spec(name, overrides=[*overrides, "train.compile=false", "train.precision=float32"]), "cpu"
    )
    assert on_gpu.keys() == expected.keys()
    worst = {name: (on_gpu[name] - expected[name]).norm() / expected[name].norm() for name in expected}
    assert max(worst.values()) < tolerance, {name: float(error) for name, error in worst.items() if error > tolerance}


def test_maps_keep_their_precision_under_autocast() -> None:
    graph = compile_spec(quarter("train.precision=bfloat16", "train.compile=false"), device=GPU)
    seen: list[torch.dtype] = []
    with torch.no_grad(), torch.autocast(GPU, torch.bfloat16):
        for index, env in graph.walk(torch.randn(2, 3, 32, 32, device=GPU)):
            seen += [env[graph.units[index].activation].dtype, env[graph.units[index].output].dtype]
    assert set(seen) == {torch.bfloat16}


@pytest.mark.compile
@pytest.mark.parametrize("name", ["vgg8_cifar10_quarter", "resnet18_cifar10_quarter"])
def test_cuda_graphs_learn_what_the_step_learns(exact_float32: None, name: str) -> None:
    """Three steps of each, by SGD, from the same weights; warnings are errors, such as that a step is not recorded."""
    spec = load_spec(name, overrides=["data.batch_size=32", "optimizer.kind=sgd"])
    batch = random_batch(spec, torch.device(GPU))
    after: list[dict[str, Any]] = []
    for made in (asge(spec, batch, compile=True, cuda_graphs=graphs) for graphs in (False, True)):
        for _ in range(3):
            made()
        after.append(_graph_of(made).state_dict())
    for tensor, one in after[0].items():
        assert torch.allclose(one, after[1][tensor], rtol=0, atol=1e-4), tensor


@pytest.mark.compile
def test_a_recorded_step_follows_its_tensors() -> None:
    """Other images, weights changed where they lie, weights that have moved, another batch size."""
    graphs = [compile_spec(quarter(), device=GPU).train() for _ in range(2)]
    graphs[1].cuda_graphs = False
    first, second = random_batch(quarter(), torch.device(GPU)), random_batch(quarter(), torch.device(GPU))

    def agree(images: torch.Tensor, labels: torch.Tensor) -> None:
        one, other = (graph.step(images, labels) for graph in graphs)
        for name, gradient in other.grads.items():
            torch.testing.assert_close(one.grads[name], gradient, rtol=1e-2, atol=1e-5)

    agree(*first)
    agree(*second)
    for graph in graphs:
        weight = graph.get_parameter("backbone.conv1.weight")
        weight.data.mul_(0.5)
    agree(*second)
    for graph in graphs:
        weight = graph.get_parameter("backbone.conv2.weight")
        weight.data = weight.data * 0.5
    agree(*second)
    agree(second.images[:16], second.labels[:16])


def _graph_of(run: Any) -> LocalGraph:
    return next(cell.cell_contents for cell in run.__closure__ if hasattr(cell.cell_contents, "graph")).graph


def test_batches_in_memory_are_the_cpus_and_do_not_wait_for_the_gpu() -> None:
    info = DatasetInfo(("a", "b"), 3, 8, 8, 64, 0, (0.5,) * 3, (0.25,) * 3)
    pixels, labels = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8), torch.arange(64) % 2

    def loader(device: str) -> MemoryLoader:
        return MemoryLoader(
            train=Images(pixels, labels).to(torch.device(device)),
            splits={},
            info=info,
            batch_size=16,
            augment=Augment(crop_padding=2, flip=True),
            seed=0,
            shard=ALONE,
        )

    batches = loader(GPU).train_batches(0)
    found = [next(batches)]  # the epoch's order is copied before the first
    torch.cuda.set_sync_debug_mode("error")
    try:
        found += list(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (images, labels), (expected, theirs) in zip(found, loader("cpu").train_batches(0), strict=True):
        assert torch.equal(labels.cpu(), theirs)
        torch.testing.assert_close(images.cpu(), expected)


@pytest.mark.compile
def test_a_deterministic_run_that_was_stopped_ends_with_the_same_weights(
    tmp_path: Path, at_step: Any, no_pictures: None
) -> None:
    spec = tiny_spec("train.compile=true", "train.deterministic=true", "train.epochs=2", "backbone.width=0.25")
    train(spec, run_dir=tmp_path / "whole", device=GPU)
    at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        train(spec, run_dir=tmp_path / "broken", device=GPU)
    train(spec, run_dir=tmp_path / "broken", resume=True, device=GPU)
    sums = {
        hashlib.sha256((tmp_path / run / "last" / "model.safetensors").read_bytes()).hexdigest()
        for run in ("whole", "broken")
    }
    assert len(sums) == 1
