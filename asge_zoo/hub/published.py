"""A published model: a folder, as it lies on the Hub.

    model.safetensors   weights, heads, projections; each tensor's sha256 in the metadata
    config.json         the resolved spec, class names, preprocessing (`Config`)
    metrics.json        what was measured of these very bytes, and the run they are from
    README.md           the model card
    curves.png          accuracy and loss by epoch
    units.png           accuracy by unit, for rules whose units have logits of their own
    manifest.json       sha256 of each file above

There is no code in it, and nothing that could become some.
"""

import json
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors
import safetensors.torch
import torch
from pydantic import AfterValidator, Field, PositiveInt, ValidationError
from pydantic_core import PydanticCustomError
from torch import Tensor

from asge_zoo.compiler.build import compile_spec
from asge_zoo.compiler.check import parts
from asge_zoo.data.base import Dataset
from asge_zoo.data.preprocessing import Preprocessing
from asge_zoo.engine.checkpoint import MANIFEST, MODEL, check_files
from asge_zoo.engine.run_dir import CURVES, UNITS
from asge_zoo.errors import CheckpointError, SpecError
from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.registry import Options
from asge_zoo.spec import Spec, describe, digest_of, load_spec

CONFIG, METRICS, CARD = "config.json", "metrics.json", "README.md"
FILES = (MODEL, CONFIG, METRICS, CARD, CURVES, UNITS, MANIFEST)
NEEDED = (MODEL, CONFIG)
MAX_BYTES = 16 * 2**20  # of any file but the weights, and of the weights' header
MAX_JSON_BYTES = 2 * 2**20  # a hundred times a thousand classes'; a stranger's would take seconds and gigabytes
MAX_MAP = 2**24  # numbers in a unit's map of one image: VGG8's at 256 pixels; images cost a stranger no bytes
MAX_MESSAGE = 1000  # characters, of what a stranger's file makes us say

# What other libraries would unpickle or run; a model has none of it.
FOREIGN = (
    *(".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pt2", ".pth"),
    *(".dll", ".dylib", ".exe", ".ipynb", ".keras", ".h5", ".py", ".pyc", ".sh", ".so"),
)


def _printable(names: list[str]) -> list[str]:
    if not all(name.isprintable() for name in names):
        raise PydanticCustomError("classes", "names must be printable, without control characters")
    return names


class Config(Options):
    """What `config.json` holds.

    Attributes:
        format_version: of this folder's layout.
        spec: resolved, with the package and version of each component that is not built in.
        spec_sha256: see `Spec.digest`.
        classes: names, in the order of the labels.
        preprocessing: from a picture to an image.
        units: how many of the network's units are here; the prediction needs no others.
        versions: of the packages it was trained with.
    """

    format_version: Annotated[int, Field(ge=1, le=1)] = 1
    library_name: Literal["asge-zoo"] = "asge-zoo"
    spec: dict[str, Any]
    spec_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    classes: Annotated[list[str], AfterValidator(_printable)]
    preprocessing: Preprocessing
    units: PositiveInt
    versions: dict[str, str | None]


@dataclass(frozen=True)
class Model:
    """A trained graph, in evaluation mode, and what it takes to use it on pictures.

    Attributes:
        graph: on its device.
        spec: what it was trained by.
        classes: names, in the order of the logits.
        preprocessing: from a picture to an image.
    """

    graph: LocalGraph
    spec: Spec
    classes: list[str]
    preprocessing: Preprocessing

    def dataset(self, given: str | None = None) -> Dataset:
        """The spec's dataset, or another one whose images the graph can take.

        Args:
            given: a kind, or a JSON object as a spec's `data` is.

        Raises:
            SpecError: it is no dataset, or its images or classes are of another shape or number.
        """
        own = parts(self.spec).data
        if given is None:
            return own
        try:
            value = json.loads(given) if given.lstrip().startswith("{") else {"kind": given}
        except (ValueError, RecursionError) as error:
            raise SpecError(f"--data {given}: is no JSON ({error}); write a kind, or an object as in a spec") from None
        other = parts(load_spec({**self.spec.resolved(), "data": value})).data
        mine, its = own.info(), other.info()
        for what, one, two in (
            ("images", (mine.channels, mine.height, mine.width), (its.channels, its.height, its.width)),
            ("classes", len(mine.classes), len(its.classes)),
        ):
            if one != two:
                raise SpecError(f"--data {other.kind}: has {what} {two}, and this model takes {one}; give another")
        return other


def hub_folder() -> Path:
    """Where the card's template, the index and the models are that come with the package."""
    packaged = Path(str(resources.files("asge_zoo"))) / "_hub"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "hub"


def is_published(folder: Path) -> bool:
    """Whether a folder looks like a published model, be it a damaged one."""
    return any(os.path.lexists(folder / name) for name in (CONFIG, METRICS))


def foreign_files(names: list[str]) -> list[str]:
    """Those of a model's file names that could be unpickled or run."""
    return [name for name in names if name.lower().endswith(FOREIGN)]


def check_published(folder: Path) -> list[str]:
    """What is wrong with a published model's files, one line each.

    A card that was edited since is among it: the sums are those of what was pushed.
    """
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    if foreign := foreign_files(names):
        return [_legible(f"{folder / foreign[0]}: could be unpickled or run, so this is no model of asge-zoo's")]
    try:
        if large := [line for name in FILES for line in _too_large(folder / name)]:
            return large
        return [_legible(problem) for problem in check_files(folder, NEEDED)]
    except OSError as error:  # a file that may not be read, a name in the manifest that is too long for one
        return [f"{_legible(str(error.filename))}: can't be read ({error.strerror})"]
    except RuntimeError:  # torch's, of types that it can't compute with
        return [f"{folder / MODEL}: holds tensors of a type that no model has"]


def _too_large(file: Path) -> list[str]:
    """That reading it would take more memory or time than a model's does, if so; the weights may be of any size."""
    if file.name == CARD or not file.is_file():
        return []
    size, what = file.stat().st_size, "is"
    if file.name == MODEL:
        with open(file, "rb") as content:
            size, what = int.from_bytes(content.read(8), "little"), "has a header of"
    most = MAX_JSON_BYTES if file.suffix == ".json" else MAX_BYTES
    return [f"{file}: {what} more than {most:,} bytes, which no model's is"] if size > most else []


def _legible(message: str) -> str:
    """On one line, without control characters, and of no great length, whatever a stranger's file has in it."""
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in message[:MAX_MESSAGE])
    return line if len(message) <= MAX_MESSAGE else f"{line} …"


def _refusal(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{file}: {_legible(why)}")


def read_config(file: Path) -> tuple[Config, Spec]:
    """A published model's `config.json`, and the spec in it.

    Raises:
        CheckpointError: it is damaged, or its parts do not belong together, or a plugin that it needs is not here.
    """
    try:
        config = Config.model_validate(json.loads(file.read_bytes()))
        if digest_of(config.spec) != config.spec_sha256:
            raise _refusal(file, "spec: is not the one of spec_sha256; fetch it again")
        spec = load_spec(config.spec)
    except ValidationError as error:
        raise _refusal(file, describe(error)) from None
    except SpecError as error:
        raise _refusal(file, str(error)) from error
    except (OSError, ValueError, RecursionError) as error:
        raise _refusal(file, f"can't be read as JSON ({type(error).__name__}); fetch it again") from None
    data, given = parts(spec).data, config.preprocessing
    info = data.info()
    if len(config.classes) != len(info.classes):
        raise _refusal(file, f"classes: names {len(config.classes)}, and the spec has {len(info.classes)}")
    shape = (given.channels, given.height, given.width)
    if shape != (info.channels, info.height, info.width) or {len(given.mean), len(given.std)} != {info.channels}:
        raise _refusal(file, f"preprocessing: does not give the images of the spec's {data.kind}")
    return config, spec


def load_published(folder: Path, *, device: str | torch.device = "cpu") -> Model:
    """A published model, checked first: sums, then names, shapes and types, and only then is anything computed.

    Raises:
        CheckpointError: a file is missing, damaged or foreign, or does not fit the others.
    """
    config, spec = check_loadable(folder)
    graph = _built(folder / CONFIG, spec, device)
    graph.truncate(config.units)
    graph.load_state_dict(safetensors.torch.load_file(folder / MODEL))
    return Model(graph.eval(), spec, config.classes, config.preprocessing)


def check_loadable(folder: Path) -> tuple[Config, Spec]:
    """Refuse a folder that `load_published` would; builds shapes alone.

    Raises:
        CheckpointError: see `load_published`.
    """
    edited = [_legible(f"{folder / CARD}: {what}") for what in ("is missing", "its sha256 is not the manifest's")]
    if problems := [problem for problem in check_published(folder) if problem not in edited]:
        raise CheckpointError(f"{problems[0]}; remove what is not the model's, or fetch it again")
    config, spec = read_config(folder / CONFIG)
    with torch.device("meta"):  # heads and projections, too: no more memory is taken than the weights' own
        graph = _built(folder / CONFIG, spec, "meta")
    trained_units, largest = len(graph.units), max(unit.channels * unit.height * unit.width for unit in graph.units)
    if largest > MAX_MAP:
        raise _refusal(folder / CONFIG, f"spec: makes a map of {largest:,} numbers, and at most {MAX_MAP:,} may be")
    if config.units > trained_units:
        raise _refusal(folder / CONFIG, f"units: {config.units} of a network of {trained_units}")
    graph.truncate(config.units)
    head = _checked_head(folder / MODEL, graph, config)
    graph.head.load_state_dict(head, assign=True)
    needed = graph.prediction.last_unit(graph.head, trained_units) + 1
    if config.units != needed:
        raise _refusal(folder / CONFIG, f"units: {config.units}, and the prediction runs {needed}")
    return config, spec


def _built(file: Path, spec: Spec, device: str | torch.device) -> LocalGraph:
    try:
        return compile_spec(spec, device=device, modes=["evaluation"])  # it predicts: half the time
    except SpecError as error:
        raise _refusal(file, f"spec: {error}") from error
    except Exception as error:  # whatever a network that nobody has ever built makes torch or timm raise
        raise _refusal(file, f"spec: can't be built ({type(error).__name__})") from error


def _checked_head(file: Path, graph: LocalGraph, config: Config) -> dict[str, Tensor]:
    """The head's tensors, once all in the file are found to be the graph's, by name, type and shape, and finite.

    Raises:
        CheckpointError: they are not, or the file is of another spec.
    """
    expected = {name: (x.dtype, list(x.shape)) for name, x in graph.state_dict().items()}
    head = {}
    try:
        with safetensors.safe_open(file, framework="pt") as archive:
            if archive.metadata()["spec_sha256"] != config.spec_sha256:
                raise _refusal(file, f"belongs to another spec than that of {CONFIG}")
            names = archive.keys()
            if odd := sorted(expected.keys() ^ set(names)):
                what = "lacks" if odd[0] in expected else "has a foreign"
                raise _refusal(file, f"{what} tensor {odd[0]}, by the spec in {CONFIG}")
            for name in names:
                found = archive.get_tensor(name)
                if (found.dtype, list(found.shape)) != expected[name]:
                    dtype, shape = expected[name]
                    by_spec = f"by the spec in {CONFIG} {dtype} {shape}"
                    raise _refusal(file, f"tensor {name} is {found.dtype} {list(found.shape)}, and {by_spec}")
                if not found.isfinite().all():
                    raise _refusal(file, f"tensor {name} holds values that are not finite")
                if name.startswith("head."):
                    head[name.removeprefix("head.")] = found
    except (OSError, KeyError, TypeError, safetensors.SafetensorError) as error:  # where an edited card hid it before
        raise _refusal(file, f"can't be read as safetensors ({type(error).__name__})") from error
    return head
