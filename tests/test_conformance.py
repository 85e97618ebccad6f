"""The promises of components: the built-ins keep them, and what breaks one is told which."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import pytest
import torch
from conftest import Said
from pydantic import ConfigDict
from test_plugins import install
from torch import Tensor, nn

from asge_zoo.backbones.base import Backbone
from asge_zoo.backbones.vgg import VGG8
from asge_zoo.data.base import Batch, DatasetInfo, Images
from asge_zoo.data.digits import Digits
from asge_zoo.data.memory import MemoryLoader
from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.graph.prediction import Prediction
from asge_zoo.graph.rule import LayerLocalRule, StepResult
from asge_zoo.graph.unit import Unit, Values
from asge_zoo.ops.goodness import Goodness, MapShape
from asge_zoo.ops.norm import Norm
from asge_zoo.ops.pooling import Pooling
from asge_zoo.ops.projection import FixedLinear, Projection
from asge_zoo.ops.transfer import Transfer
from asge_zoo.plugins import GROUPS
from asge_zoo.predict.best import Best
from asge_zoo.predict.last import Last
from asge_zoo.ranks import ALONE, Shard
from asge_zoo.registry import Component, Options, components
from asge_zoo.rules.asge import ASGE
from asge_zoo.rules.bp import BP
from asge_zoo.testing import BrokenPromise, NotChecked, Promise, promises

pytestmark = pytest.mark.usefixtures("one_thread")

Cli = Callable[..., Said]


def built_ins() -> Iterator[Any]:
    """Every promise of every built-in component, the networks narrow."""
    for group in GROUPS:
        for kind, component in components(group).items():
            options = {"width": 0.05} if "width" in component.model_fields else {}
            for promise in promises(component, **options):
                slow = group in ("rule", "prediction") and promise.name == "traces as one graph"
                marks = [pytest.mark.compile] if slow else []
                yield pytest.param(promise, id=f"{group}:{kind} {promise}", marks=marks)


@pytest.mark.parametrize("promise", list(built_ins()))
def test_built_ins_keep_their_promises(promise: Promise) -> None:
    promise.check()


# Twins: one that is well made, and one that breaks a promise.


class Apart(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Average(Pooling):
    """The mean of a window."""

    kind: Literal["test.average"] = "test.average"
    api_version: ClassVar[int] = 1
    share: float = 1.0

    def build(self, kernel_size: int) -> nn.Module:
        return Apart(lambda x: self.share * nn.functional.avg_pool2d(x, kernel_size))


class Learned(Average):
    """The mean of a window, times what is learned."""

    def build(self, kernel_size: int) -> nn.Module:
        return Scaled(kernel_size)


class Scaled(nn.Module):
    """Average pooling times a parameter."""

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * nn.functional.avg_pool2d(x, self.kernel_size)


class RoundsUp(Average):
    """Pools what is left over, too."""

    def build(self, kernel_size: int) -> nn.Module:
        return nn.AvgPool2d(kernel_size, ceil_mode=True)


class Widens(Average):
    """Gives float32, whatever it gets."""

    def build(self, kernel_size: int) -> nn.Module:
        return Apart(lambda x: nn.functional.avg_pool2d(x.float(), kernel_size))


class Steep(Average):
    """A root whose slope at zero is infinite."""

    def build(self, kernel_size: int) -> nn.Module:
        return Apart(lambda x: nn.functional.avg_pool2d(x.square(), kernel_size).sqrt())


class Noisy(Average):
    """Noise that torch's seed knows nothing of."""

    def build(self, kernel_size: int) -> nn.Module:
        return Apart(lambda x: nn.functional.avg_pool2d(x, kernel_size) * (1 + random.random()))


class Branching(Average):
    """Looks at its input to say what it does."""

    def build(self, kernel_size: int) -> nn.Module:
        return Apart(lambda x: nn.functional.avg_pool2d(x, kernel_size) * (2 if x.mean().item() > 0 else 1))


class Ignoring(Average):
    """Takes options that it has not."""

    model_config = ConfigDict(extra="ignore")

    @classmethod
    def model_validate(cls, obj: Any, **given: Any) -> Any:
        return super().model_validate({key: obj[key] for key in obj if key in cls.model_fields}, **given)


class Lax(Average):
    """Takes numbers as text."""

    model_config = ConfigDict(strict=False)


class Anything(Average):
    """Takes whatever it is given."""

    more: Any = None


class Fluid(Average):
    """Its options can be changed."""

    model_config = ConfigDict(frozen=False)


class Elsewhere(Average):
    """An option that JSON can't hold."""

    where: Path = Path("there")


class Mute(Average):
    def build(self, kernel_size: int) -> nn.Module:
        return super().build(kernel_size)


class Ageless(Pooling):
    """For contracts that it doesn't say."""

    kind: Literal["test.ageless"] = "test.ageless"

    def build(self, kernel_size: int) -> nn.Module:
        return nn.AvgPool2d(kernel_size)


class Bare(Average):
    """A kind without a prefix."""

    kind: Literal["bare"] = "bare"  # pyright: ignore[reportIncompatibleVariableOverride]


class Scale(Norm):
    """Division by the largest activation of a sample."""

    kind: Literal["test.scale"] = "test.scale"
    api_version: ClassVar[int] = 1

    def build(self) -> nn.Module:
        return Apart(lambda x: x / (1 + x.amax((1, 2, 3), keepdim=True)))


class Mixes(Scale):
    """Division by the largest activation of the batch."""

    def build(self) -> nn.Module:
        return Apart(lambda x: x / (1 + x.amax()))


class Flattens(Scale):
    """Gives vectors."""

    def build(self) -> nn.Module:
        return nn.Flatten()


class Trains(Scale):
    """Parameters that nothing could train."""

    def build(self) -> nn.Module:
        return nn.PReLU()


class Forgets(Scale):
    """A running mean that is in no state dict."""

    def build(self) -> nn.Module:
        return Centre(persistent=False)


class Remembers(Scale):
    """A running mean."""

    def build(self) -> nn.Module:
        return Centre(persistent=True)


class Centre(nn.Module):
    """Subtracts a running mean."""

    centre: Tensor

    def __init__(self, *, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(()), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.centre.lerp_(x.detach().mean().to(self.centre.dtype), 0.1)
        return x - self.centre.to(x.dtype)


class Channels(Goodness):
    """The mean of each channel."""

    kind: Literal["test.channels"] = "test.channels"
    api_version: ClassVar[int] = 1

    def dim(self, shape: MapShape) -> int:
        return shape.channels

    def build(self, shape: MapShape) -> nn.Module:
        return Apart(lambda x: x.to(torch.promote_types(x.dtype, torch.float32)).mean((2, 3)))


class Half(Channels):
    """In the map's own precision."""

    def build(self, shape: MapShape) -> nn.Module:
        return Apart(lambda x: x.mean((2, 3)))


class Miscounts(Channels):
    """Longer than it is."""

    def dim(self, shape: MapShape) -> int:
        return shape.channels * 2


class Constant(Channels):
    """Teaches nothing."""

    def build(self, shape: MapShape) -> nn.Module:
        return Apart(lambda x: x.detach().float().mean((2, 3)))


class Uniform(Projection):
    """Entries from 0 to 1."""

    kind: Literal["test.uniform"] = "test.uniform"
    api_version: ClassVar[int] = 1

    def build(self, dim: int, num_classes: int, generator: torch.Generator) -> nn.Module:
        return FixedLinear(torch.rand(dim, num_classes, generator=generator), torch.zeros(num_classes))


class Global(Uniform):
    """Drawn from torch's own generator."""

    def build(self, dim: int, num_classes: int, generator: torch.Generator) -> nn.Module:
        return FixedLinear(torch.rand(dim, num_classes), torch.zeros(num_classes))


class Trainable(Uniform):
    """Drawn once, and trained."""

    def build(self, dim: int, num_classes: int, generator: torch.Generator) -> nn.Module:
        linear: Any = nn.utils.skip_init(nn.Linear, dim, num_classes, bias=False)
        with torch.no_grad():
            linear.weight.copy_(torch.rand(num_classes, dim, generator=generator))
        return linear


class Local(ASGE):
    """ASGE by another name."""

    kind: Literal["test.local"] = "test.local"  # pyright: ignore[reportIncompatibleVariableOverride]
    api_version: ClassVar[int] = 1


class Leaks(BP):
    """One loss for all units, called local."""

    kind: Literal["test.leaks"] = "test.leaks"  # pyright: ignore[reportIncompatibleVariableOverride]
    layer_local: ClassVar[bool] = True


class Skips(Local):
    """Leaves the first unit out."""

    def step(self, graph: LocalGraph, params: Values, state: Values, images: Tensor, labels: Tensor) -> StepResult:
        result = super().step(graph, params, state, images, labels)
        first = graph.units[0].parameters
        return result._replace(grads={name: grad for name, grad in result.grads.items() if name not in first})


class Counts(Local):
    """Changes the network while it learns."""

    def step(self, graph: LocalGraph, params: Values, state: Values, images: Tensor, labels: Tensor) -> StepResult:
        result = super().step(graph, params, state, images, labels)
        with torch.no_grad():
            cast(Tensor, state["local.0.projection.bias"]).add_(1)
        return result


class Linear(LayerLocalRule):
    """A trained linear classifier on each unit's mean activations."""

    kind: Literal["test.linear"] = "test.linear"
    api_version: ClassVar[int] = 1

    def build_unit(self, shape: MapShape, num_classes: int, generator: torch.Generator) -> nn.Module:
        linear = nn.utils.skip_init(nn.Linear, shape.channels, num_classes)
        for parameter in linear.parameters():
            nn.init.normal_(parameter, std=0.1, generator=generator)
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)

    def unit_loss(
        self, classify: Callable[[Tensor], Tensor], activation: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = classify(activation)
        return nn.functional.cross_entropy(logits, labels), logits


class Careless(Linear):
    """Classifiers that torch draws by itself."""

    def build_unit(self, shape: MapShape, num_classes: int, generator: torch.Generator) -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(shape.channels, num_classes))


class Mean(Prediction):
    """The mean of the units' logits."""

    kind: Literal["test.mean"] = "test.mean"
    api_version: ClassVar[int] = 1
    uses_unit_logits: ClassVar[bool] = True

    def build(self, units: Sequence[Unit], num_classes: int) -> nn.Module:
        return nn.Module()

    def keep(self, index: int, num_units: int, activation: Tensor, output: Tensor) -> Tensor | None:
        return None

    def logits(self, head: Callable[..., Tensor], kept: list[Tensor], unit_logits: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(unit_logits)).mean(0)


class Hurries(Mean):
    """Stops before the units that it needs."""

    def last_unit(self, head: nn.Module, num_units: int) -> int:
        return num_units // 2


class Wavers(Best):
    """Says that it changes whenever it is asked."""

    def select(self, head: nn.Module, accuracy: Sequence[float]) -> bool:
        return super().select(head, accuracy) or True


class Deaf(Last):
    """Its head's loss reaches only half of the logits."""

    def logits(self, head: Callable[..., Tensor], kept: list[Tensor], unit_logits: Sequence[Tensor]) -> Tensor:
        return super().logits(head, [kept[0].detach()], unit_logits)[:, :5]


class Pair(Backbone):
    """Two convolutions, the first one pooled."""

    kind: Literal["test.pair"] = "test.pair"
    api_version: ClassVar[int] = 1

    def build(self, in_channels: int, *, pooling: Pooling, norm: Norm) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(in_channels, 4, 3, padding=1),
            nn.ReLU(),
            Transfer(pooling=pooling.build(4), dropout=0, norm=norm.build()),
            nn.Conv2d(4, 6, 3, padding=1),
            nn.ReLU(),
            Transfer(pooling=None, dropout=0, norm=norm.build()),
        )

    def min_size(self) -> int:
        return 4


class Boasts(Pair):
    """Says that it takes smaller images than it does."""

    def min_size(self) -> int:
        return 3


class Own(Digits):
    """Digits by another name, read by a loader that may be spoilt."""

    kind: Literal["test.digits"] = "test.digits"  # pyright: ignore[reportIncompatibleVariableOverride]
    api_version: ClassVar[int] = 1
    spoilt: ClassVar[type[MemoryLoader]] = MemoryLoader

    def loader(self, root: Path, *, seed: int, device: torch.device, shard: Shard = ALONE) -> MemoryLoader:
        loader = super().loader(root, seed=seed, device=device, shard=shard)
        loader.__class__ = self.spoilt
        return loader


class Restarts(Own):
    """Begins every epoch at its beginning."""

    class spoilt(MemoryLoader):
        def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
            return islice(super().train_batches(epoch), self.steps() - start)


class Repeats(Own):
    """Every epoch in one order."""

    class spoilt(MemoryLoader):
        def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
            return super().train_batches(0, start)


class Drops(Own):
    """Leaves out what fills no batch."""

    class spoilt(MemoryLoader):
        EVAL_BATCH = 100

        def split_batches(self, split: str) -> Iterator[Batch]:
            return (batch for batch in super().split_batches(split) if len(batch[1]) == self.EVAL_BATCH)


class Rounds(Own):
    """Counts what fills no batch."""

    class spoilt(MemoryLoader):
        def steps(self) -> int:
            return super().steps() + 1


class Grey(Own):
    """Pixel values as they are."""

    def stored_info(self) -> DatasetInfo:
        return replace(super().stored_info(), mean=(0.0,), std=(1 / 255,))


class Nameless(Own):
    """Two classes of one name."""

    def stored_info(self) -> DatasetInfo:
        return replace(super().stored_info(), classes=tuple("0123456788"))


class Fewer(Own):
    """More labels than classes."""

    def stored_info(self) -> DatasetInfo:
        return replace(super().stored_info(), classes=tuple("01234567"))


TWINS: list[tuple[type[Component], type[Component], str, str]] = [  # wrong, well made, promise, what is seen
    (Bare, Average, "names its kind", "kind 'bare' has no prefix, as in 'acme.bare'"),
    (Mute, Average, "explains itself", "the class has no docstring"),
    (Ageless, Average, "names the contracts it was written for", "inherited from asge_zoo's contract"),
    (Ignoring, Average, "refuses unknown options", "no_such_option=1 is taken"),
    (Lax, Average, "refuses options of a wrong type", 'share="1" is taken for 1.0'),
    (Anything, Average, "refuses options of a wrong type", "more takes whatever it is given"),
    (Fluid, Average, "is frozen", "kind can be set"),
    (Elsewhere, Average, "survives JSON", "where"),
    (RoundsUp, Average, "pools whole windows", "kernel_size 2, map 3×4×7×5: the answer is 3×4×4×3 and not 3×4×3×2"),
    (Widens, Average, "keeps the dtype", "torch.bfloat16 becomes torch.float32"),
    (Steep, Average, "has a finite gradient", "the input gets nan or inf"),
    (Noisy, Average, "is deterministic under a seed", "answers differ in training mode"),
    (Branching, Average, "traces as one graph", "data-dependent"),
    (Flattens, Scale, "keeps the shape", "the answer is 2×192 and not 2×3×8×8"),
    (Mixes, Scale, "answers each sample by itself", "alone in its batch a sample gets another answer"),
    (Trains, Scale, "has nothing to train", "has trainable parameters (weight)"),
    (Forgets, Remembers, "keeps its state in its state dict", "it answers otherwise"),
    (Half, Channels, "is at least float32", "torch.bfloat16 becomes torch.bfloat16"),
    (Miscounts, Channels, "is as long as dim(shape)", "the answer is 3×4 and not 3×8; dim(shape) is 8"),
    (Constant, Channels, "has a finite gradient", "does not require grad"),
    (Global, Uniform, "draws from the generator alone", "torch's own generator was drawn from"),
    (Trainable, Uniform, "has nothing to train", "has trainable parameters (weight)"),
    (Leaks, BP, "is as local as it declares", "the gradient of backbone.conv7.weight changes with later parameters"),
    (Skips, Local, "learns in a network, in float32", "is trainable and gets no gradient"),
    (Counts, Local, "changes nothing in a step", "a step changed local.0.projection.bias"),
    (Careless, Linear, "draws from the generator alone", "depends on torch's own generator"),
    (Hurries, Mean, "answers as with all units run", "forward() and all_logits()[0] differ, with last_unit 3"),
    (Wavers, Best, "settles its choice", "select() says so again"),
    (Deaf, Last, "answers as with all units run", "logits are 8×5 and not 8×10"),
    (Boasts, Pair, "cuts into units from min_size() on", "does not take images of 1×3×3"),
    (Nameless, Own, "describes itself", "10 classes have 9 names"),
    (Fewer, Own, "gives what it describes", "classes: 8"),
    (Grey, Own, "normalises its images", "channel 0 has mean"),
    (Rounds, Own, "counts its steps", "steps() is 20, of 1257 images by 64"),
    (Restarts, Own, "goes on from any step", "train_batches(1, start=2) gives other batches"),
    (Repeats, Own, "orders by seed and epoch", "another epoch gives the same batches"),
    (Drops, Own, "splits as it says", "validation has 100 images and not 180"),
]


def promise_of(component: type[Component], name: str) -> Promise:
    """One of its promises."""
    return next(promise for promise in promises(component) if promise.name == name)


@pytest.mark.parametrize(
    ("wrong", "well_made", "name", "seen"), TWINS, ids=[f"{wrong.__name__}: {name}" for wrong, _, name, _ in TWINS]
)
def test_a_broken_promise_is_named(wrong: type[Component], well_made: type[Component], name: str, seen: str) -> None:
    promise_of(well_made, name).check()
    with pytest.raises(BrokenPromise) as caught:
        promise_of(wrong, name).check()
    message = str(caught.value)
    assert message.startswith(f"{name}: ") and seen in message
    assert message.endswith(f"; {promise_of(wrong, name).remedy}") and len(message.splitlines()) == 1


@pytest.mark.parametrize(
    "component", [Average, Learned, Scale, Channels, Uniform, Pair, Own], ids=lambda each: each.__name__
)
def test_what_is_well_made_breaks_nothing(component: type[Component]) -> None:
    for promise in promises(component):
        promise.check()


def test_options_within_options_are_checked() -> None:
    class Inner(Options):
        model_config = ConfigDict(frozen=False)
        factor: float = 1.0

    class Outer(Average):
        """Options in a group of their own."""

        inner: Inner = Inner()

    promise_of(Outer, "refuses unknown options").check()
    with pytest.raises(BrokenPromise, match="is frozen: inner.factor can be set"):
        promise_of(Outer, "is frozen").check()


def test_promises_are_of_the_options_given() -> None:
    for promise in promises(VGG8, width=0.05, dropout=0.5, bias=False):
        promise.check()
    with pytest.raises(BrokenPromise, match=r"^is frozen: VGG8 can't be made \(width: input should be greater than 0"):
        next(promise for promise in promises(VGG8, width=-1.0) if promise.name == "is frozen").check()


def test_what_raises_breaks_its_promise_in_one_line() -> None:
    class Fails(Average):
        """Can't be built."""

        def build(self, kernel_size: int) -> nn.Module:
            raise RuntimeError("first line\nsecond line")

    with pytest.raises(BrokenPromise, match="^pools whole windows: RuntimeError: first line; build"):
        promise_of(Fails, "pools whole windows").check()


def test_checks_leave_torchs_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    promise_of(Average, "is deterministic under a seed").check()
    assert torch.equal(torch.get_rng_state(), before)


def test_only_components_with_contracts_make_promises() -> None:
    with pytest.raises(TypeError, match="AdamW must derive from the contract of a backbone, rule"):
        promises(components("optimizer")["adamw"])


def test_a_dataset_that_is_not_here_is_not_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lost(Own):
        """Is nowhere."""

        def found(self, root: Path) -> str | None:
            return None

        def read(self, root: Path) -> tuple[Images, Images]:
            raise AssertionError("nothing is to be downloaded")

    monkeypatch.setenv("ASGE_ZOO_DATA", str(tmp_path))
    promise_of(Lost, "describes itself").check()
    with pytest.raises(NotChecked, match=f"test.digits is not under {tmp_path}; name the folder"):
        promise_of(Lost, "splits as it says").check()


# The command line.


def test_check_by_kind(cli: Cli) -> None:
    said = cli("plugins", "check", "projection:gaussian")
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert "ok          projection:gaussian draws from the generator alone" in lines
    assert lines[-1] == f"promises checked: {len(lines) - 1}, broken: 0"


def test_check_of_a_kind_in_two_groups_checks_both(cli: Cli) -> None:
    said = cli("plugins", "check", "rms", "--json")
    rows = json.loads(said.out)
    assert (said.code, {row["component"] for row in rows}) == (0, {"pooling", "norm"})
    assert all(row.keys() == {"kind", "component", "promise", "ok", "message"} for row in rows)
    assert all((row["kind"], row["ok"], row["message"]) == ("rms", True, None) for row in rows)


@pytest.mark.parametrize("name", ["acme.middle", "pooling:acme.middle", "acme-middle", "Acme_Middle"])
def test_check_of_an_installed_package(name: str, site: Path, cli: Cli) -> None:
    install(site, "acme-middle")
    rows = json.loads(cli("plugins", "check", name, "--json").out)
    assert {(row["component"], row["kind"], row["ok"]) for row in rows} == {("pooling", "acme.middle", True)}


def test_check_of_a_broken_promise_is_exit_code_1(site: Path, cli: Cli) -> None:
    install(site, "acme-middle")
    source = (site / "plugin_acme_middle.py").read_text()
    (site / "plugin_acme_middle.py").write_text(source.replace("MaxPool2d(kernel_size)", "Identity()"))
    said = cli("plugins", "check", "acme.middle")
    assert said.code == 1
    assert "broken      pooling:acme.middle pools whole windows: RuntimeError: " in said.out
    rows = json.loads(cli("plugins", "check", "acme.middle", "--json").out)
    assert {row["ok"] for row in rows if row["message"]} == {False}


def test_check_of_what_is_not_here_says_so(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASGE_ZOO_DATA", str(tmp_path))
    said = cli("plugins", "check", "mnist")
    assert said.code == 0
    assert f"not checked dataset:mnist splits as it says: mnist is not under {tmp_path}" in said.out


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("rmss", "no component or package 'rmss', did you mean 'rms'?"),
        ("pooling:rmss", "no component or package 'pooling:rmss', did you mean 'rms'?"),
        ("norm:max", "no component or package 'norm:max'"),
        ("colour:rms", "no component or package 'colour:rms'"),
        ("acme.midle", "did you mean 'acme.middle'?"),
        ("pytest", "no component or package 'pytest'"),
        ("", "no component or package ''"),
    ],
)
def test_check_of_an_unknown_name_is_one_line(name: str, hint: str, site: Path, cli: Cli) -> None:
    install(site, "acme-middle")
    said = cli("plugins", "check", name)
    assert (said.code, said.out, len(said.err.splitlines())) == (2, "", 1)
    assert hint in said.err


@pytest.mark.parametrize("name", ["acme.middle", "acme-middle"])
def test_check_of_what_can_not_be_imported_is_one_line(name: str, site: Path, cli: Cli) -> None:
    install(site, "acme-middle", source="raise RuntimeError('no such luck')\n")
    said = cli("plugins", "check", name)
    assert (said.code, said.out, len(said.err.splitlines())) == (2, "", 1)
    assert "can't be imported (RuntimeError: no such luck)" in said.err


def test_new_writes_a_package_and_says_how_to_go_on(cli: Cli, tmp_path: Path) -> None:
    said = cli("plugins", "new", "acme-middle", "--kind", "pooling", "--path", tmp_path)
    assert (said.code, said.err) == (0, "")
    *files, install_line, test_line = said.out.splitlines()
    folder = tmp_path / "acme-middle"
    assert sorted(map(Path, files)) == sorted(path for path in folder.rglob("*") if path.is_file())
    assert (install_line, test_line) == (f"next: pip install -e {folder}", f"      pytest {folder}")


def test_new_goes_here_if_it_is_not_told_where(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "next: pip install -e ./acme-middle\n" in cli("plugins", "new", "acme-middle", "--kind", "norm").out
    assert (tmp_path / "acme-middle" / "pyproject.toml").is_file()


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["acme-middle", "--kind", "colour"], "'colour' is not one of 'backbone', 'rule'"),
        (["acme-middle"], "Missing option '--kind'"),
        (["middle", "--kind", "norm"], "write whose it is and a hyphen before it, as in acme-middle"),
        (["acme-taken", "--kind", "norm"], "acme-taken: is there already"),
    ],
)
def test_new_refuses_in_one_line(
    arguments: list[str], hint: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme-taken").touch()
    said = cli("plugins", "new", *arguments)
    assert (said.code, said.out, len(said.err.splitlines())) == (2, "", 1)
    assert hint in said.err
