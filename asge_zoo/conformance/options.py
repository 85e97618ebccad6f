"""What every component's class and options promise."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from asge_zoo.conformance.common import Check, Subject, expect
from asge_zoo.registry import API_VERSION, Component

UNKNOWN = "no_such_option"
PROBES = ("1", 1, 1.5, True, [1], ["1"], {UNKNOWN: 1}, float("nan"))


def names_its_kind(subject: Subject) -> None:
    component = subject.component
    kind = component.model_fields["kind"].default
    expect(isinstance(kind, str) and bool(kind), f"kind is {kind!r}")
    expect(_package(component) == "asge_zoo" or "." in kind, f"kind '{kind}' has no prefix, as in 'acme.{kind}'")
    expect(_refuses(component, {**subject.options, "kind": f"{kind}x"}), f"it takes kind '{kind}x' for its own")


def explains_itself(subject: Subject) -> None:
    expect(bool((vars(subject.component).get("__doc__") or "").strip()), "the class has no docstring of its own")


def names_its_contracts(subject: Subject) -> None:
    component = subject.component
    own = [each for each in component.__mro__ if _package(each) == _package(component)]
    expect(any("api_version" in vars(each) for each in own), "api_version is inherited from asge_zoo's contract")
    expect(component.api_version == API_VERSION, f"api_version is {component.api_version!r}")


def refuses_unknown_keys(subject: Subject) -> None:
    for path, options in _nested(subject.make()):
        values = {name: getattr(options, name) for name in type(options).model_fields}
        expect(_refuses(type(options), {**values, UNKNOWN: 1}), f"{path}{UNKNOWN}=1 is taken")


def is_frozen(subject: Subject) -> None:
    for path, options in _nested(subject.make()):
        for name in type(options).model_fields:
            expect(_is_fixed(options, name), f"{path}{name} can be set on a made component")


def refuses_wrong_types(subject: Subject) -> None:
    names = [name for name in subject.component.model_fields if name != "kind"]
    for name in names:
        taken = [probe for probe in PROBES if not _refuses(subject.component, {**subject.options, name: probe})]
        expect(len(taken) < len(PROBES), f"{name} takes whatever it is given")
        for probe in taken:
            held = subject.component.model_validate({**subject.options, name: probe}).model_dump(mode="json")[name]
            expect(_same_value(probe, held), f"{name}={json.dumps(probe)} is taken for {json.dumps(held)}")


def survives_json(subject: Subject) -> None:
    made = subject.make()
    values = made.model_dump(mode="json")
    again = subject.component.model_validate(json.loads(json.dumps(values, allow_nan=False)))
    expect(again == made, f"{values} reads back as {again.model_dump(mode='json')}")


def _package(component: type) -> str:
    return component.__module__.split(".")[0]


def _refuses(options: type[BaseModel], values: Mapping[str, Any]) -> bool:
    try:
        options.model_validate(dict(values))
    except ValidationError:
        return True
    return False


def _is_fixed(options: BaseModel, name: str) -> bool:
    try:
        setattr(options, name, getattr(options, name))
    except ValidationError:
        return True
    return False


def _nested(options: BaseModel, path: str = "") -> Iterator[tuple[str, BaseModel]]:
    """A component and the groups of options within it (other components apart), with their paths."""
    yield path, options
    for name in type(options).model_fields:
        value = getattr(options, name)
        if isinstance(value, BaseModel) and not isinstance(value, Component):
            yield from _nested(value, f"{path}{name}.")


def _same_value(given: Any, held: Any) -> bool:
    """Whether the option holds what it was given; a whole number may become a float."""
    return held == given and (type(held) is type(given) or (type(given), type(held)) == (int, float))


CHECKS = (
    Check("names its kind", "write `kind: Literal['acme.name'] = 'acme.name'`, with a prefix of yours", names_its_kind),
    Check("explains itself", "say in a docstring of the class what it does; `asge-zoo ls` shows it", explains_itself),
    Check(
        "names the contracts it was written for",
        f"write `api_version: ClassVar[int] = {API_VERSION}` in the class",
        names_its_contracts,
    ),
    Check("refuses unknown options", "keep model_config's extra='forbid' (see registry.Options)", refuses_unknown_keys),
    Check("is frozen", "keep model_config's frozen=True (see registry.Options)", is_frozen),
    Check(
        "refuses options of a wrong type",
        "give the option a narrow type and keep model_config's strict=True (see registry.Options)",
        refuses_wrong_types,
    ),
    Check("survives JSON", "give options only types that JSON has, and constrain them alike", survives_json),
)
