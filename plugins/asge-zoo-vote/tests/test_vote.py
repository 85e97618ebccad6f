"""Votes and early exits: their promises, what they answer, and what they leave out."""

import json
from pathlib import Path

import pytest
import torch
from asge_zoo_vote import EarlyExit, FirstConfident, Vote, WeightedVote
from pydantic import ValidationError

from asge_zoo.compiler.build import compile_spec
from asge_zoo.engine.train import train
from asge_zoo.errors import SpecError
from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.spec import load_spec
from asge_zoo.testing import Promise, promises

SPEC = {
    "name": "vote",
    "data": {"kind": "digits", "validation": 1000, "batch_size": 64},
    "backbone": {"kind": "vgg8", "width": 0.05},
    "train": {"epochs": 1, "compile": False},
}


@pytest.mark.parametrize("promise", promises(Vote), ids=str)
def test_promise_of_vote(promise: Promise) -> None:
    promise.check()


@pytest.mark.parametrize("promise", promises(EarlyExit, threshold=0.2), ids=str)
def test_promise_of_early_exit(promise: Promise) -> None:
    promise.check()


def logits(*probabilities: list[float]) -> torch.Tensor:
    """(B, N) that a softmax makes these of."""
    return torch.tensor(probabilities).log()


UNITS = [logits([0.6, 0.4], [0.5, 0.5]), logits([0.2, 0.8], [0.9, 0.1]), logits([0.3, 0.7], [0.05, 0.95])]


def test_a_vote_is_weighted() -> None:
    vote = WeightedVote(3, hard=False)
    vote.weight.copy_(torch.tensor([0.5, 0.25, 0.25]))
    expected = torch.tensor([[0.425, 0.575], [0.4875, 0.5125]])
    torch.testing.assert_close(vote(UNITS).exp(), expected)


def test_a_hard_vote_is_for_one_class() -> None:
    vote = WeightedVote(3, hard=True)
    vote.weight.copy_(torch.tensor([0.5, 0.3, 0.2]))
    torch.testing.assert_close(vote(UNITS)[0].exp(), torch.tensor([0.5, 0.5]))
    assert vote([UNITS[1]]).isfinite().all(), "a class without a vote, too"


def test_weights_are_the_validation_accuracy() -> None:
    head = WeightedVote(2, hard=False)
    strategy = Vote()
    assert strategy.select(head, [90.0, 30.0])
    assert head.weight.tolist() == [0.75, 0.25]
    assert not strategy.select(head, [90.0, 30.0])
    assert strategy.select(head, [0.0, 0.0]) and head.weight.tolist() == [0.5, 0.5]


def test_the_first_confident_unit_answers() -> None:
    head = FirstConfident(0.75)
    assert head.depth(UNITS).tolist() == [2, 2]
    assert head.depth(UNITS[:1]).tolist() == [2, 2], "one more than are given"
    torch.testing.assert_close(head(UNITS), UNITS[1])
    never = FirstConfident(1.0)
    assert never.depth(UNITS).tolist() == [4, 4]
    torch.testing.assert_close(never(UNITS), UNITS[2])


def graph_of(threshold: float) -> LocalGraph:
    """An untrained network that exits early."""
    return compile_spec(load_spec({**SPEC, "prediction": {"kind": "vote.early_exit", "threshold": threshold}})).eval()


@pytest.mark.parametrize("threshold", [0.15, 0.2, 0.3, 1.0])
def test_images_that_leave_early_get_the_answer_of_the_whole_pass(threshold: float) -> None:
    graph, images = graph_of(threshold), torch.randn(32, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(graph(images), graph.all_logits(images)[0])


def test_later_units_do_not_run_for_images_that_have_left(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, images = graph_of(0.2), torch.randn(32, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    seen = []
    for local in graph.local:
        local.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    with torch.no_grad():
        depth = graph.prediction.depth(graph.head, graph.all_logits(images)[1])
        seen.clear()
        graph(images)
    assert seen == [int((depth > index).sum()) for index in range(len(seen))]
    assert seen[0] == 32 and seen[-1] < 32


@pytest.mark.parametrize("kind", ["vote.weighted", "vote.early_exit"])
def test_a_run(kind: str, tmp_path: Path) -> None:
    spec = load_spec({**SPEC, "prediction": {"kind": kind}})
    assert train(spec, run_dir=tmp_path, device="cpu").test_accuracy > 0
    validation = json.loads((tmp_path / "metrics.jsonl").read_text())["validation"]
    if kind == "vote.early_exit":
        assert 1 <= validation["mean_depth"] <= 7
    else:
        assert validation["mean_depth"] is None
    package = {"distribution": "asge-zoo-vote", "version": "0.1.0"}
    assert json.loads((tmp_path / "best" / "spec.json").read_text())["plugins"] == [
        {"component": "prediction", "kind": kind, **package}
    ]


def test_a_rule_without_unit_logits_can_not_serve_them() -> None:
    for kind in ("vote.weighted", "vote.early_exit"):
        with pytest.raises(SpecError, match="prediction.kind: .* reads the units' own logits, which rule 'bp' has not"):
            compile_spec(load_spec({**SPEC, "rule": {"kind": "bp"}, "prediction": {"kind": kind}}))


@pytest.mark.parametrize("options", [{"threshold": 0.0}, {"threshold": 1.1}, {"threshold": "high"}])
def test_nonsense_is_refused(options: dict) -> None:
    with pytest.raises(ValidationError):
        EarlyExit.model_validate(options)
