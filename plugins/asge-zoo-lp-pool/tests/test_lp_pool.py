"""L_p pooling: its promises, its cases, its gradients, and p as something that is learned."""

import math

import pytest
import torch
import torch.nn.functional as F
from asge_zoo_lp_pool import LpPool, LpPool2d, lp_pool2d
from pydantic import ValidationError

from asge_zoo.compiler.build import compile_spec
from asge_zoo.ops.pooling import rms_pool2d
from asge_zoo.spec import load_spec
from asge_zoo.testing import Promise, promises

SPEC = {
    "name": "lp",
    "data": {"kind": "digits", "validation": 1000, "batch_size": 64},
    "backbone": {"kind": "vgg8", "width": 0.05},
    "train": {"epochs": 1, "compile": False},
}


@pytest.mark.parametrize("promise", promises(LpPool), ids=str)
def test_promise(promise: Promise) -> None:
    promise.check()


@pytest.mark.parametrize("promise", promises(LpPool, p=3.0, learnable=True), ids=str)
def test_promise_of_a_learned_p(promise: Promise) -> None:
    promise.check()


def a_map(*, negative: bool = False) -> torch.Tensor:
    """(2, 3, 7, 5), a window of it all zero."""
    x = torch.randn(2, 3, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x if negative else x.relu()
    x[0, 0, :2, :2] = 0
    return x


def of_order(p: float) -> torch.Tensor:
    return torch.tensor(p, dtype=torch.float64)


def test_rms_is_its_case_two() -> None:
    x = a_map(negative=True)
    torch.testing.assert_close(lp_pool2d(x, of_order(2), 2), rms_pool2d(x, 2))


def test_the_mean_is_its_case_one() -> None:
    torch.testing.assert_close(lp_pool2d(a_map(), of_order(1), 2), F.avg_pool2d(a_map(), 2))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_maximum_is_its_limit(scale: float) -> None:
    x = a_map() * scale
    torch.testing.assert_close(lp_pool2d(x, of_order(1e6), 2), F.max_pool2d(x, 2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 7.3])
def test_it_is_torchs_unnormalised_norm_over_the_windows_size(p: float) -> None:
    expected = F.lp_pool2d(a_map(), p, 2) / 4 ** (1 / p)
    torch.testing.assert_close(lp_pool2d(a_map(), of_order(p), 2), expected)


def test_gradients_of_the_map_and_of_p() -> None:
    x = (a_map() + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, p: lp_pool2d(x, p, 2), (x, of_order(2.5).requires_grad_()))


def test_gradients_at_an_empty_window_are_zero() -> None:
    x, p = torch.zeros(1, 1, 2, 2, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    lp_pool2d(x, p, 2).sum().backward()
    assert x.grad is not None and p.grad is not None
    assert not x.grad.any() and not p.grad.any()


@pytest.mark.parametrize("p", [1.001, 1.5, 2.0, 30.0, 1000.0])
@pytest.mark.parametrize("learnable", [False, True])
def test_p_starts_where_it_is_set(p: float, learnable: bool) -> None:
    assert math.isclose(LpPool2d(2, p, learnable=learnable).p.item(), p, rel_tol=1e-4)


def test_a_learned_p_is_trained_by_the_unit_that_reads_the_pooled_map() -> None:
    graph = compile_spec(load_spec({**SPEC, "pooling": {"kind": "lp.pool", "learnable": True}}))
    owners = {name: unit.name for unit in graph.units for name in unit.parameters if name.endswith("rho")}
    assert owners == {f"backbone.transfer{unit}.pooling.rho": f"conv{unit + 1}" for unit in (2, 4, 5, 6)}
    grads = graph.step(torch.randn(8, 1, 16, 16), torch.arange(8)).grads
    assert all(grads[name].isfinite() and grads[name] != 0 for name in owners)


def test_a_fixed_p_is_no_parameter() -> None:
    graph = compile_spec(load_spec({**SPEC, "pooling": {"kind": "lp.pool", "p": 3.0}}))
    assert not [name for name, _ in graph.named_parameters() if "rho" in name]
    assert len([name for name in graph.state_dict() if name.endswith("rho")]) == 4


@pytest.mark.parametrize("options", [{"p": 1.0}, {"p": -2.0}, {"p": "two"}, {"learnable": 1}])
def test_nonsense_is_refused(options: dict) -> None:
    with pytest.raises(ValidationError):
        LpPool.model_validate(options)
