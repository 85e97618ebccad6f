"""The spec: one frozen tree that says everything about a run, in JSON.

`load_spec` reads a file, a shipped spec's name or a dict; what comes back is resolved: every default
written out. Its digest says which spec a checkpoint's weights belong to.
"""

import copy
import hashlib
import json
import textwrap
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from asge_zoo.errors import SpecError
from asge_zoo.registry import Component, Options, Origin, Slot, default_component, origins


class Checkpointing(Options):
    """When checkpoints are saved, beside each epoch that is the best so far and the last. May change on resume."""

    every_epochs: PositiveInt = Field(default=1, description="Save at the end of each so many epochs.")
    every_steps: PositiveInt | None = Field(default=None, description="Save after each so many steps of the run.")
    every_minutes: PositiveFloat | None = Field(default=None, description="Save once the last save is so long ago.")


class Train(Options):
    """How long, from which seed and in which arithmetic."""

    epochs: PositiveInt = Field(default=100, description="Passes over the training images.")
    seed: NonNegativeInt = Field(
        default=0, description="Of the first run; decides weights, projections, split, order and augmentation."
    )
    runs: PositiveInt = Field(default=1, description="Independent runs, with seeds seed, seed + 1, …")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="bfloat16: autocast; parameters, goodness, logits and losses stay float32."
    )
    compile: bool = Field(default=True, description="Whether the step runs through torch.compile.")
    deterministic: bool = Field(
        default=False, description="Only torch's deterministic algorithms; slower on a GPU, the CPU's are so anyway."
    )
    checkpoint: Checkpointing = Checkpointing()


class Spec(Options):
    """A whole experiment. Defaults are the paper's settings, and ours where it is silent."""

    schema_: str | None = Field(default=None, alias="$schema", exclude=True, description="For editors; not used.")
    schema_version: Literal[1] = 1
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Names the run directory.")
    data: Annotated[Component, Slot("dataset")]
    backbone: Annotated[Component, Slot("backbone")]
    pooling: Annotated[Component, Slot("pooling", "rms")] = default_component("pooling", "rms")
    norm: Annotated[Component, Slot("norm", "layer")] = default_component("norm", "layer")
    rule: Annotated[Component, Slot("rule", "asge")] = default_component("rule", "asge")
    prediction: Annotated[Component, Slot("prediction", "fusion")] = default_component("prediction", "fusion")
    optimizer: Annotated[Component, Slot("optimizer", "adamw")] = default_component("optimizer", "adamw")
    schedule: Annotated[Component, Slot("schedule", "cosine")] = default_component("schedule", "cosine")
    train: Train = Train()
    plugins: list[Origin] = Field(default=[], description="Filled in: where components that are not built in are from.")

    def resolved(self) -> dict[str, Any]:
        """The whole spec as JSON values, every default written out; `plugins` where there are any."""
        return self.model_dump(mode="json", exclude=None if self.plugins else {"plugins"})

    def digest(self) -> str:
        """sha256 (hex) of the resolved spec in canonical JSON, whatever versions its plugins have."""
        return digest_of(self.resolved())

    def for_seed(self, seed: int) -> "Spec":
        """The spec of one single run of this one, with that seed."""
        return self.model_copy(update={"train": self.train.model_copy(update={"seed": seed, "runs": 1})})

    def differences(self, other: "Spec") -> dict[str, tuple[Any, Any]]:
        """The fields that differ, by JSON path, with this spec's value and the other's (None where one has none)."""
        mine, others = _leaves(self.resolved(), ""), _leaves(other.resolved(), "")
        pairs = {path: (mine.get(path), others.get(path)) for path in {**mine, **others}}
        return {path: (one, two) for path, (one, two) in pairs.items() if one != two}


def digest_of(resolved: dict[str, Any]) -> str:
    """`Spec.digest` of a resolved spec's JSON values, which a later version may resolve otherwise."""
    values = {key: value for key, value in resolved.items() if key != "plugins"}
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _leaves(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    return {
        name: leaf
        for key, child in value.items()
        for name, leaf in _leaves(child, f"{path}.{key}" if path else key).items()
    }


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of specs, with every registered component; see `registry.load_plugins`."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Spec.model_json_schema(by_alias=True)}


def shipped_specs() -> dict[str, Path]:
    """The specs that come with the package, by name."""
    packaged = Path(str(resources.files("asge_zoo"))) / "_specs"
    folder = packaged if packaged.is_dir() else Path(__file__).parents[1] / "specs"
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def load_spec(source: str | Path | dict[str, Any], *, overrides: Iterable[str] = ()) -> Spec:
    """Read and validate a spec.

    Args:
        source: a JSON file, the name of a shipped spec (`vgg8_digits`), or the values themselves.
        overrides: `path.to.field=value`, applied in order before validation.

    Raises:
        SpecError: with the file and the JSON path of what is wrong.
    """
    where = "spec" if isinstance(source, dict) else str(source)
    raw = copy.deepcopy(source) if isinstance(source, dict) else _read(Path(source))
    if not isinstance(raw, dict):
        raise SpecError(f"{where}: a spec is a JSON object, and this is none; begin with {{")
    for override in overrides:
        apply_override(raw, override)
    try:
        spec = Spec.model_validate(raw, context={"plugins": raw.get("plugins")})
    except ValidationError as error:
        raise SpecError(f"{where}: {describe(error)}") from None
    return spec.model_copy(update={"plugins": origins(spec)})


def _read(path: Path) -> Any:
    if not path.is_file():
        shipped = shipped_specs()
        if str(path) not in shipped:
            raise SpecError(
                f"{path}: no such file, nor a shipped spec; `asge-zoo ls specs` lists those that come with the package"
            )
        path = shipped[str(path)]
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise SpecError(
            f"{path}: not valid JSON at line {error.lineno}, column {error.colno} ({error.msg}); mend it there"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(f"{path}: can't be read as a spec ({error})") from None


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one `path.to.field=value` in place; the value is JSON, or else a plain string.

    Another `kind` replaces the whole component: the options of the old kind do not carry over.

    Raises:
        SpecError: the override is malformed, or its path leads through something that is no object.
    """
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise SpecError(f"--set {override}: must read path.to.field=value, such as train.epochs=10")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # not JSON, or more than it can hold
        value = text
    node = raw
    for depth, key in enumerate(keys[:-1], start=1):
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise SpecError(f"--set {override}: {'.'.join(keys[:depth])} is not an object, so it has no fields")
    if keys[-1] == "kind" and node.get("kind", (default_kind(keys[0]) if len(keys) == 2 else None)) not in (
        None,
        value,
    ):
        node.clear()
    node[keys[-1]] = value


def default_kind(name: str) -> str | None:
    """The kind that stands where a spec names none in its field `name`; None where it must."""
    field = Spec.model_fields.get(name)
    slots = [mark for mark in field.metadata if isinstance(mark, Slot)] if field else []
    return slots[0].default if slots else None


REMEDIES = {"bool_type": "; write true or false", "float_type": "; write a JSON number, such as 0.001"}


def describe(error: ValidationError) -> str:
    """One line for the first thing that is wrong, with its JSON path, and how many more there are."""
    found = list(_flatten(error, ()))
    path, message = found[0]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{path or 'the top level'}: {message}{more}"


def _flatten(error: ValidationError, prefix: tuple[str | int, ...]) -> Iterable[tuple[str, str]]:
    for item in error.errors(include_url=False):
        context = item.get("ctx", {})
        inner = context.get("error")
        location = (*prefix, *item["loc"])
        if isinstance(inner, ValidationError):  # a component's own errors, nested by its slot
            yield from _flatten(inner, location)
            continue
        if "key" in context:
            location = (*location, context["key"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] not in ("missing", "unknown_key", "unknown_kind", "component", "plugin"):
            given = textwrap.shorten(json.dumps(item["input"], default=str), 60, placeholder=" …")
            message = f"{message[:1].lower()}{message[1:]}, got {given}{REMEDIES.get(item['type'], '')}"
        yield ".".join(map(str, location)), message
