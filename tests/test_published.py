"""Published models: truncated where they may be, and refused in one line whatever a stranger makes of their files."""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import Said, torch_threads, without_pictures
from fuzz_published import PHOTOS, become, fit, forge, joined, publish, split
from tiny import tiny_spec
from torch import Tensor

from asge_zoo.compiler.check import parts
from asge_zoo.engine.checkpoint import pack
from asge_zoo.engine.loading import find_checkpoint, load_checkpoint
from asge_zoo.errors import CheckpointError, SpecError, ZooError
from asge_zoo.evaluate import evaluate
from asge_zoo.files import json_bytes
from asge_zoo.hub.models import described, load_model
from asge_zoo.hub.published import FILES, MAX_JSON_BYTES, check_published, is_published, load_published
from asge_zoo.spec import Spec, load_spec

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {
    "fusion": (),
    "best": ("prediction.kind=best",),
    "exit": ("prediction.kind=vote.early_exit", "prediction.threshold=0.3"),
    "bp": ("rule.kind=bp", "prediction.kind=last"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A published model of each kind, measured; its run lies beside it. Not to be changed: take `copy`."""
    folder = tmp_path_factory.mktemp("models")
    with torch_threads(1):
        found = {"fusion": publish(folder / "fusion", evaluated=True)}
        with without_pictures():  # one model with them will do
            return found | {
                kind: publish(folder / kind, *KINDS[kind], evaluated=True) for kind in KINDS if kind != "fusion"
            }


@pytest.fixture
def copy(models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the fusion model, to damage."""
    return Path(shutil.copytree(models["fusion"], tmp_path / "copy"))


@pytest.fixture
def best(models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the truncated model, to damage."""
    return Path(shutil.copytree(models["best"], tmp_path / "best"))


@pytest.fixture
def little_memory() -> Iterator[None]:
    """The process may take two GiB more than it has: what asks for more fails, and no other process suffers."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def assert_refused(folder: Path, *words: str) -> None:
    """`load_published` refuses it in one printable line, which names the folder and holds these words."""
    with pytest.raises(ZooError) as caught:
        load_published(folder)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1500
    assert message.startswith(str(folder))
    for word in words:
        assert word in message, message


def config_of(folder: Path) -> dict[str, Any]:
    """What its `config.json` holds."""
    return json.loads((folder / "config.json").read_bytes())


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Its tensors."""
    return safetensors.torch.load_file(folder / "model.safetensors")


def some_images(spec: Spec, count: int = 8) -> Tensor:
    """Images as the spec's network takes them."""
    info = parts(spec).data.info()
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, info.channels, info.height, info.width, generator=generator)


# What is published is what was trained.


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_published_gives_the_runs_logits(kind: str, models: dict[str, Path]) -> None:
    """Bitwise, although the units are left out that the prediction does not run."""
    model = load_published(models[kind])
    full, spec = load_checkpoint(find_checkpoint(models[kind].with_name(f"{kind}-run")))
    images = some_images(spec, 64)
    with torch.inference_mode():
        for one, two in zip(model.graph.classify(images), full.classify(images), strict=True):
            assert torch.equal(one, two)
    assert model.spec == spec and not model.graph.training
    assert check_published(models[kind]) == []
    loader = model.dataset().loader(Path(), seed=spec.train.seed, device=torch.device("cpu"))
    found, said = evaluate(model.graph, loader.split_batches("test")), described("tiny", None, models[kind])
    assert said is not None and said["accuracy"] == found.accuracy
    assert said["units"] == config_of(models[kind])["units"] == len(model.graph.units)


def test_the_units_behind_the_chosen_one_are_left_out(models: dict[str, Path]) -> None:
    graph = load_published(models["best"]).graph
    metrics = json.loads((models["best"] / "metrics.json").read_bytes())
    full, _ = load_checkpoint(find_checkpoint(models["best"].with_name("best-run")))
    assert 1 <= len(graph.units) < metrics["trained_units"] == len(full.units) == 7
    assert metrics["units"] == [unit.name for unit in graph.units]
    kept, whole = weights_of(models["best"]), full.state_dict()
    assert kept.keys() < whole.keys()
    assert all(torch.equal(kept[name], whole[name]) for name in kept)
    left = [prefix for n in range(len(graph.units), 7) for prefix in (f"local.{n}.", f"backbone.conv{n + 1}.")]
    assert {name for name in whole if name.startswith(tuple(left))} == whole.keys() - kept.keys()


@pytest.mark.parametrize("change", ["a tensor more", "a tensor less", "a unit more", "a unit less"])
def test_a_truncated_model_is_loaded_strictly(change: str, best: Path) -> None:
    config, tensors = config_of(best), weights_of(best)
    if change == "a tensor more":
        forge(best, tensors={**tensors, "backbone.conv7.bias": torch.zeros(26)})
        assert_refused(best, "model.safetensors", "foreign tensor backbone.conv7.bias")
    elif change == "a tensor less":
        forge(best, tensors={name: x for name, x in tensors.items() if name != "backbone.conv1.bias"})
        assert_refused(best, "model.safetensors", "lacks tensor backbone.conv1.bias")
    else:
        forge(best, units=config["units"] + (1 if change == "a unit more" else -1))
        assert_refused(best, "model.safetensors", "lacks" if change == "a unit more" else "foreign")


@pytest.mark.parametrize("unit", [-1, 0, 6, 7, 2**40, -(2**63)])
def test_a_chosen_unit_that_is_not_the_last_one_here_is_refused(unit: int, best: Path) -> None:
    forge(best, tensors={**weights_of(best), "head.unit": torch.tensor([unit])})
    assert_refused(best, "config.json: units: ", "and the prediction runs")


def test_units_that_the_prediction_needs_must_be_here(copy: Path) -> None:
    """Where the weights are truncated likewise."""
    become(copy, tiny_spec(), units=4)
    assert_refused(copy, "config.json: units: 4, and the prediction runs 7")


def test_a_network_of_timms_for_pictures_in_colour_loads(copy: Path) -> None:
    """Its running statistics among the tensors."""
    spec = load_spec(PHOTOS)
    become(copy, spec)
    model = load_published(copy)
    assert model.classes == [str(label) for label in range(12)] and model.preprocessing.channels == 3
    with torch.inference_mode():
        assert model.graph(some_images(spec)).shape == (8, 12)


def test_other_data_must_fit_the_network(models: dict[str, Path]) -> None:
    model = load_published(models["fusion"])
    assert model.dataset() == parts(model.spec).data
    assert model.dataset('{"kind": "digits", "validation": 5}').validation == 5
    assert model.dataset('{"kind": "mnist", "size": 16}').kind == "mnist"
    for given, said in (
        ("mnist", r"has images \(1, 28, 28\), and this model takes \(1, 16, 16\)"),
        ('{"kind": "imagefolder"}', r"has images \(3, 224, 224\)"),
        ("digitz", "unknown dataset 'digitz', did you mean 'digits'"),
        ('{"kind": "digits"', "is no JSON"),
        ('{"a":' * 5000, "is no JSON"),
        ('{"kind": "digits", "size": 0}', "data.size"),
        ("", "unknown dataset"),
    ):
        with pytest.raises(SpecError, match=said):
            model.dataset(given)


def test_other_data_must_have_as_many_classes(copy: Path) -> None:
    become(copy, load_spec(PHOTOS))
    model = load_published(copy)
    assert model.dataset('{"kind": "imagefolder", "size": 32, "classes": 12, "folder": "mine"}').kind == "imagefolder"
    with pytest.raises(SpecError, match="imagefolder: has classes 10, and this model takes 12"):
        model.dataset('{"kind": "imagefolder", "size": 32}')


def test_it_is_described_by_its_files_alone(copy: Path) -> None:
    found = described("user/tiny", "c0ffee", copy)
    assert found is not None and (found["model"], found["revision"], found["spec"]) == ("user/tiny", "c0ffee", "tiny")
    assert found["dataset"] == "digits" and found["units"] == 7
    assert found["bytes"] == (copy / "model.safetensors").stat().st_size
    pooling = {**config_of(copy)["spec"], "pooling": {"kind": "gone.pool"}}
    forge(copy, spec=pooling)
    assert described("user/tiny", None, copy) == {
        **found,
        "revision": None,
        "spec_sha256": config_of(copy)["spec_sha256"],
        "bytes": (copy / "model.safetensors").stat().st_size,
    }
    forge(copy, library_name="timm")
    assert described("user/tiny", None, copy) is None


# What is damaged is found.


def flipped(content: bytes) -> Iterator[bytes]:
    """`content` with its first, its last, or one of some other bytes changed."""
    draw = random.Random(0)
    for position in [0, len(content) - 1, *(draw.randrange(len(content)) for _ in range(6))]:
        yield content[:position] + bytes([content[position] ^ draw.randrange(1, 256)]) + content[position + 1 :]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_found(name: str, copy: Path, cli: Callable[..., Said]) -> None:
    content = (copy / name).read_bytes()
    for damaged in flipped(content):
        (copy / name).write_bytes(damaged)
        assert check_published(copy)
        if name != "README.md":
            assert_refused(copy)
    said = cli("verify", copy)
    assert said.code == 1 and not said.err
    if name != "manifest.json":
        assert f"{copy / name}: its sha256 is not the manifest's\n" in said.out
    said = cli("eval", copy, "--device", "cpu")
    assert (said.code, said.err.count("\n")) == ((0, 0) if name == "README.md" else (2, 1))
    (copy / name).write_bytes(content)
    assert cli("verify", copy).code == 0


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", ["nothing", "one byte", "half", "all but one byte", "not even a file", "a pipe"])
def test_a_truncated_or_missing_file_is_found(kept: str, name: str, copy: Path, cli: Callable[..., Said]) -> None:
    content = (copy / name).read_bytes()
    if kept in ("not even a file", "a pipe"):
        (copy / name).unlink()
        if kept == "a pipe":
            os.mkfifo(copy / name)
    else:
        length = {"nothing": 0, "one byte": 1, "half": len(content) // 2, "all but one byte": len(content) - 1}[kept]
        (copy / name).write_bytes(content[:length])
    said = cli("verify", copy, "--json")
    assert said.code == 1 and str(copy / name) in json.loads(said.out)["problems"][0]
    if name == "README.md":
        load_published(copy)
    else:
        assert_refused(copy, name)


def test_an_edited_card_hides_nothing(copy: Path) -> None:
    (copy / "README.md").write_text("# My own words\n")
    assert load_published(copy).classes == list("0123456789")
    (copy / "README.md").write_bytes(b"x" * 17 * 2**20)
    load_published(copy)
    tensors = weights_of(copy)
    for damage, said in (
        (lambda: (copy / "curves.png").write_bytes(b""), "curves.png"),
        (lambda: tensors["head.linears.0.bias"].fill_(float("nan")), "head.linears.0.bias holds values that are not"),
        (lambda: (copy / "model.safetensors").write_bytes(b"x" * 100), "model.safetensors"),
        (lambda: (copy / "README.md.pkl").write_bytes(b""), "README.md.pkl: could be unpickled or run"),
        (lambda: (copy / "README.md: x.so").write_bytes(b""), "README.md: x.so: could be unpickled or run"),
    ):
        kept = {file.name: file.read_bytes() for file in copy.iterdir()}
        damage()
        if "linears" in said:
            (copy / "model.safetensors").write_bytes(pack(tensors, split(kept["model.safetensors"])[0]["__metadata__"]))
        if "curves" not in said:
            _fit_but_the_card(copy)
        assert_refused(copy, said)
        for file in list(copy.iterdir()):
            file.unlink()
        for name, content in kept.items():
            (copy / name).write_bytes(content)


def _fit_but_the_card(folder: Path) -> None:
    before = json.loads((folder / "manifest.json").read_bytes())["sha256"]["README.md"]
    fit(folder)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["sha256"]["README.md"] = before
    (folder / "manifest.json").write_bytes(json_bytes(manifest))


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "model.PKL", "deep/er/modeling_tiny.py", ".hidden/x.so", "weights.pt", "a\x1b[2J\nb.sh"],
)
def test_what_could_be_unpickled_or_run_is_refused(name: str, copy: Path) -> None:
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    (copy / name).write_bytes(b"")
    assert len(check_published(copy)) == 1
    assert_refused(copy, name if name.isprintable() else "b.sh", "could be unpickled or run")


def test_files_may_be_links(models: dict[str, Path], tmp_path: Path) -> None:
    """As they are in the Hub's cache; a link that leads elsewhere leads to other bytes."""
    folder = tmp_path / "links"
    folder.mkdir()
    for name in FILES:
        (folder / name).symlink_to(models["fusion"] / name)
    assert check_published(folder) == []
    load_published(folder)
    for name, target in (("config.json", "config.json"), ("model.safetensors", "/etc/passwd"), ("units.png", "gone")):
        (folder / name).unlink()
        (folder / name).symlink_to(target)
        assert_refused(folder, name)
        assert is_published(folder)
        (folder / name).unlink()
        (folder / name).symlink_to(models["fusion"] / name)
    (folder / "round").symlink_to(folder)
    load_published(folder)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "sub/x", "", "..", "n" * 5000, "a\x00b", "\ud800", "\x1b[2J\n"]
)
def test_a_manifest_that_lists_what_is_no_file_of_the_model(name: str, copy: Path) -> None:
    (copy.parent / "x").write_bytes(b"")
    manifest = json.loads((copy / "manifest.json").read_bytes())
    manifest["sha256"][name] = manifest["sha256"]["units.png"]
    (copy / "manifest.json").write_bytes(json_bytes(manifest))
    assert all(line.isprintable() for line in check_published(copy))
    with pytest.raises(CheckpointError) as caught:
        load_published(copy)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1500


# What an adversary has made whole again is refused for what it says.


def deep(depth: int) -> dict[str, Any]:
    """An object in an object, and so on."""
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"x": value}
    return value


def in_spec(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets a field of the spec."""

    def change(config: dict[str, Any]) -> None:
        *way, last = path.split(".")
        node = config["spec"]
        for key in way:
            node = node[key]
        node[last] = value

    return change


def in_config(**values: Any) -> Callable[[dict[str, Any]], None]:
    """Sets fields of the config itself."""
    return lambda config: config.update(values)


def images(**values: Any) -> Callable[[dict[str, Any]], None]:
    """Sets fields of the preprocessing."""
    return lambda config: config["preprocessing"].update(values)


def sized(side: int) -> Callable[[dict[str, Any]], None]:
    """Images of another size, in spec and preprocessing alike."""

    def change(config: dict[str, Any]) -> None:
        config["spec"]["data"]["size"] = side
        config["preprocessing"] |= {"height": side, "width": side}

    return change


def all_of(*changes: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """Makes them all."""

    def change(config: dict[str, Any]) -> None:
        for each in changes:
            each(config)

    return change


GONE = {"component": "pooling", "kind": "gone.pool", "distribution": "asge-zoo-gone", "version": "1.2"}
FOLDER = {"kind": "imagefolder", "size": 16}
CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], None], tuple[str, ...]]] = {
    "names code": (in_config(auto_map={"AutoModel": "model.py"}), ("auto_map: unknown key",)),
    "names code in the spec": (in_spec("backbone.code", "model.py"), ("spec: backbone.code: unknown key",)),
    "names code as a kind": (in_spec("backbone", {"kind": "os.system"}), ("unknown backbone 'os.system'",)),
    "a path out of the folder": (in_spec("data", {**FOLDER, "folder": "../../x"}), ("data.folder: must be a folder",)),
    "an absolute path": (in_spec("data", {**FOLDER, "folder": "/etc"}), ("data.folder: must be a folder",)),
    "a width beyond reason": (in_spec("backbone.width", 1e9), ("backbone.width", "less than or equal to 64")),
    "a width": (in_spec("backbone.width", 64), ("model.safetensors: tensor backbone.conv1.bias is",)),
    "classes beyond reason": (in_spec("data", {**FOLDER, "classes": 10**9}), ("data.classes",)),
    "classes": (in_spec("data", {**FOLDER, "classes": 100_000}), ("classes: names 10, and the spec has 100000",)),
    "many classes": (
        all_of(
            in_spec("data", {**FOLDER, "classes": 100_000}),
            in_config(classes=[f"{n:x}" for n in range(100_000)]),
            images(channels=3, mean=[0.5] * 3, std=[0.5] * 3),
        ),
        ("tensor backbone.conv1.weight is",),
    ),
    "a size beyond reason": (sized(10**9), ("preprocessing.height", "less than or equal to 1024")),
    "a size of the spec": (in_spec("data.size", 10**9), ("spec: data.size",)),
    "maps beyond reason": (
        all_of(in_spec("backbone.width", 0.5), sized(1024)),
        ("config.json: spec: makes a map of 134,217,728 numbers",),
    ),
    "a goodness without end": (
        all_of(in_spec("rule.goodness.alpha", 1e9), sized(1024)),
        ("tensor local.0.projection.weight is",),
    ),
    "too many units": (in_config(units=99), ("units: 99 of a network of 7",)),
    "no units": (in_config(units=0), ("units: input should be greater than 0",)),
    "too few units": (in_config(units=3), ("model.safetensors: has a foreign tensor backbone.conv4.bias",)),
    "too few classes": (in_config(classes=list("012345678")), ("classes: names 9, and the spec has 10",)),
    "control characters": (in_config(classes=[*"012345678", "9\x1b[2J"]), ("classes: names must be printable",)),
    "reversed text": (in_config(classes=[*"012345678", "\u202e9"]), ("classes: names must be printable",)),
    "other channels": (images(channels=3, mean=[0.5] * 3, std=[0.5] * 3), ("preprocessing: does not give",)),
    "too many means": (images(mean=[0.5, 0.5]), ("preprocessing: does not give",)),
    "no deviation": (images(std=[0.0]), ("preprocessing.std.0",)),
    "other sizes": (images(width=17), ("preprocessing: does not give the images of the spec's digits",)),
    "no crop": (images(crop=0), ("preprocessing.crop",)),
    "a plugin that is gone": (
        all_of(in_spec("pooling", {"kind": "gone.pool"}), in_spec("plugins", [GONE])),
        ("pooling.kind: unknown pooling 'gone.pool'", "pip install 'asge-zoo-gone==1.2'"),
    ),
    "a plugin with a shell in its name": (
        all_of(in_spec("pooling", {"kind": "gone.pool"}), in_spec("plugins", [{**GONE, "distribution": "a; rm -r /"}])),
        ("unknown pooling 'gone.pool'",),
    ),
    "a terminal's commands": (in_config(**{"\x1b[2J\n": 1}), ("unknown key",)),
    "a key without end": (in_spec("k" * 100_000, 1), ("spec: kkk",)),
    "parts that do not fit": (in_spec("data.size", 8), ("preprocessing: does not give",)),
    "images too small": (sized(8), ("spec: backbone.kind: vgg8 needs images of at least 16 pixels",)),
    "another library": (in_config(library_name="timm"), ("library_name",)),
    "a later format": (in_config(format_version=2), ("format_version",)),
    "no number": (images(crop=float("nan")), ("preprocessing.crop",)),
    "a spec that is none": (in_config(spec=[]), ("spec: input should be a valid dictionary",)),
    "some depth": (in_config(spec=deep(400)), ("config.json: ",)),
}


@pytest.mark.parametrize("what", CONFIGS)
@pytest.mark.usefixtures("little_memory")
def test_a_config_is_refused_that(what: str, copy: Path) -> None:
    change, words = CONFIGS[what]
    config = config_of(copy)
    change(config)
    forge(copy, **config)
    assert check_published(copy) == [], "the deeper check is the one to try"
    assert_refused(copy, *words)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"\xff\xfe", b'{"spec": ' * 100_000, b"[" * 1_500_000, b" " * (MAX_JSON_BYTES + 1)]
)
def test_a_config_that_is_no_object_is_refused(content: bytes, copy: Path, cli: Callable[..., Said]) -> None:
    (copy / "config.json").write_bytes(content)
    fit(copy)
    assert_refused(copy, "config.json: ")
    said = cli("predict", copy, copy / "curves.png", "--device", "cpu")
    assert said.code == 2 and said.err.count("\n") == 1 and not said.out


def test_the_spec_must_be_that_of_its_sum(copy: Path) -> None:
    config = config_of(copy)
    in_spec("train.seed", 5)(config)
    (copy / "config.json").write_bytes(json_bytes(config))
    fit(copy, spec=False)
    assert_refused(copy, "config.json: spec: is not the one of spec_sha256")


def test_the_weights_must_be_of_the_same_spec(models: dict[str, Path], tmp_path: Path) -> None:
    """Whole files, by their sums, of two models whose networks are of equal shape."""
    folder, other = (Path(shutil.copytree(models["fusion"], tmp_path / name)) for name in ("one", "other"))
    config = config_of(other)
    in_spec("rule.goodness.bins", "crop")(config)
    forge(other, **config)
    (folder / "config.json").write_bytes((other / "config.json").read_bytes())
    fit(folder, spec=False, tensors=False)
    assert_refused(folder, "model.safetensors: belongs to another spec than that of config.json")
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    fit(folder, spec=False, tensors=False)
    assert_refused(folder, "model.safetensors: belongs to another spec than its manifest's")


NAME = "backbone.conv2.weight"
WEIGHTS: dict[str, tuple[Callable[[Tensor], dict[str, Tensor | None]], str]] = {
    "foreign": (lambda x: {"more": x.clone()}, "has a foreign tensor more"),
    "foreign and odd": (lambda x: {"\x1b[2J\n" + "n" * 5000: x.clone()}, "has a foreign tensor"),
    "lacking": (lambda x: {NAME: None}, f"lacks tensor {NAME}"),
    "misshapen": (lambda x: {NAME: x.transpose(0, 1).contiguous()}, f"tensor {NAME} is torch.float32 "),
    "flat": (lambda x: {NAME: x.flatten()}, f"tensor {NAME} is torch.float32 "),
    "empty": (lambda x: {NAME: x[:0]}, f"tensor {NAME} is torch.float32 [0, "),
    "of two bytes": (lambda x: {NAME: x.bfloat16()}, f"tensor {NAME} is torch.bfloat16"),
    "of eight bytes": (lambda x: {NAME: x.double()}, f"tensor {NAME} is torch.float64"),
    "whole": (lambda x: {NAME: x.long()}, f"tensor {NAME} is torch.int64"),
    "of a byte": (lambda x: {NAME: x.to(torch.float8_e4m3fn)}, "holds tensors of a type that no model has"),
    "complex": (lambda x: {NAME: x.to(torch.complex64)}, f"tensor {NAME} is torch.complex64"),
    "infinite": (lambda x: {NAME: x.index_fill(0, torch.tensor(0), float("inf"))}, "values that are not finite"),
    "no number": (lambda x: {NAME: torch.full_like(x, float("nan"))}, "values that are not finite"),
}


@pytest.mark.parametrize("what", WEIGHTS)
def test_a_tensor_is_refused_that_is(what: str, copy: Path) -> None:
    change, said = WEIGHTS[what]
    tensors = weights_of(copy)
    changed = {**tensors, **change(tensors[NAME])}
    forge(copy, tensors={name: tensor for name, tensor in changed.items() if tensor is not None})
    assert_refused(copy, "model.safetensors: ", said)


@pytest.mark.parametrize(
    "metadata", [None, [], {}, {"format": "pt"}, {"spec_sha256": "0" * 64}, {"sha256": "{}"}, {"sha256": "[" * 5000}]
)
def test_other_metadata_is_refused(metadata: Any, copy: Path) -> None:
    header, data = split((copy / "model.safetensors").read_bytes())
    if isinstance(metadata, dict) and metadata:
        metadata = {**header["__metadata__"], **metadata} if "format" not in metadata else metadata
    (copy / "model.safetensors").write_bytes(joined({**header, "__metadata__": metadata}, data))
    fit(copy, tensors=False)
    assert_refused(copy, "model.safetensors: ")


@pytest.mark.parametrize("length", [0, 1, 2**24 + 1, 10**8, 2**32, 2**63, 2**64 - 1])
def test_a_header_of_another_length_is_refused(length: int, copy: Path) -> None:
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(length.to_bytes(8, "little") + content[8:])
    fit(copy, tensors=False)
    assert_refused(copy, "model.safetensors: ")


def test_damaged_json_is_no_description(copy: Path) -> None:
    for name, content in (
        ("config.json", b"[" * 100_000),
        ("config.json", b"{}"),
        ("metrics.json", b"[]"),
        ("metrics.json", b'{"test": {"accuracy": "high"}}'),
    ):
        before = (copy / name).read_bytes()
        (copy / name).write_bytes(content)
        assert described("user/tiny", None, copy) is None
        (copy / name).write_bytes(before)


def test_a_published_folder_is_told_from_a_checkpoint(models: dict[str, Path]) -> None:
    run = models["fusion"].with_name("fusion-run")
    assert is_published(models["fusion"])
    assert not any(is_published(folder) for folder in (run, find_checkpoint(run), run / "gone", Path("a\x00b")))
    full, truncated = (load_model(folder) for folder in (run, models["fusion"]))
    assert (full.classes, full.preprocessing, full.spec) == (
        *(truncated.classes, truncated.preprocessing),
        truncated.spec,
    )


def test_mutated_models_are_refused_or_right() -> None:
    """`fuzz_published.py` does thousands; in a process of its own, whose memory it measures."""
    script = Path(__file__).with_name("fuzz_published.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(script), "--count", "100", "--seed", "7"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert report["problems"] == [] and done.returncode == 0
    assert report["loaded"] > 5 and report["refused"] > 50 and report["forged"] > 40


def test_refusals_are_checkpoint_errors(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is missing; remove what is not the model's, or"):
        load_published(copy)
