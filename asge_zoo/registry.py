"""Components by group and kind: what a spec may name.

A component is a frozen Pydantic model of its options, with a `kind`, whose methods build what the
group's contract asks for. Each group's contract is an abstract `Component` that sets `group`;
`register` files a final class under (group, kind). Built-ins and third parties use the same call.
"""

import difflib
import importlib
import pkgutil
from typing import Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import PydanticCustomError, core_schema

# The rooms whose modules register the built-ins of each group, imported on first use.
ROOMS = {
    "backbone": "asge_zoo.backbones",
    "rule": "asge_zoo.rules",
    "goodness": "asge_zoo.ops",
    "projection": "asge_zoo.ops",
    "pooling": "asge_zoo.ops",
    "norm": "asge_zoo.ops",
    "prediction": "asge_zoo.predict",
    "dataset": "asge_zoo.data",
    "optimizer": "asge_zoo.optim",
    "schedule": "asge_zoo.optim",
}

_components: dict[str, dict[str, type["Component"]]] = {group: {} for group in ROOMS}


def near_miss(word: str, known: list[str]) -> str:
    """`", did you mean 'x'?"` for the closest known word, else what there is to choose from."""
    close = difflib.get_close_matches(word, known, n=1)
    return f", did you mean '{close[0]}'?" if close else f"; choose from {', '.join(sorted(known))}"


class Options(BaseModel):
    """A frozen set of typed options; an unknown key is an error that names the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, value: Any) -> Any:
        if isinstance(value, dict):
            known = [field.alias or name for name, field in cls.model_fields.items()]
            for key in value:
                if key not in known:
                    hint = near_miss(str(key), known)
                    raise PydanticCustomError("unknown_key", "unknown key{hint}", {"key": key, "hint": hint})
        return value


class Component(Options):
    """What a spec names by `kind`. Its fields are its options, its methods its group's contract."""

    group: ClassVar[str]
    api_version: ClassVar[int] = 1

    kind: Any  # a Literal with itself as default, in every final class


ComponentType = TypeVar("ComponentType", bound=type[Component])


def register(component: ComponentType) -> ComponentType:
    """File a component class under its group and kind. Use as a decorator.

    Raises:
        TypeError: the class belongs to no group, or its `kind` has no default.
        ValueError: another class already has that kind.
    """
    group = getattr(component, "group", None)
    if group not in ROOMS:
        raise TypeError(f"{component.__qualname__} must derive from a contract, such as Pooling or Rule")
    kind = component.model_fields["kind"].default
    if not isinstance(kind, str):
        raise TypeError(f"{component.__qualname__} must give its kind: `kind: Literal['name'] = 'name'`")
    other = _components[group].setdefault(kind, component)
    if other is not component:
        raise ValueError(f"{group} '{kind}' is registered twice: {other.__qualname__}, {component.__qualname__}")
    return component


def components(group: str) -> dict[str, type[Component]]:
    """Every registered component of a group by kind, the built-ins imported first."""
    room = importlib.import_module(ROOMS[group])
    for module in pkgutil.iter_modules(room.__path__):
        importlib.import_module(f"{room.__name__}.{module.name}")
    return dict(sorted(_components[group].items()))


class Slot:
    """Marks a field that holds a component of one group: `Annotated[Pooling, Slot("pooling", "rms")]`.

    Args:
        group: the group whose registry names the kinds.
        default: the kind that stands where the object gives none; without it `kind` is required.
    """

    def __init__(self, group: str, default: str | None = None) -> None:
        self.group, self.default = group, default

    def resolve(self, value: Any) -> Component:
        """The component that `{"kind": …, options}` describes, validated by its own class."""
        if isinstance(value, Component) and value.group == self.group:
            return value
        if not isinstance(value, dict):
            raise PydanticCustomError("component", "must be an object with a 'kind'")
        known = components(self.group)
        kind = value.get("kind", self.default)
        if kind is None:
            raise PydanticCustomError("component", "needs a 'kind', one of {known}", {"known": ", ".join(known)})
        if not isinstance(kind, str) or kind not in known:
            hint = near_miss(str(kind), list(known))
            raise PydanticCustomError(
                "unknown_kind",
                "unknown {group} '{kind}'{hint}",
                {"group": self.group, "kind": str(kind)[:60], "hint": hint, "key": "kind"},
            )
        return known[kind].model_validate({**value, "kind": kind})

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.resolve,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda component: component.model_dump(mode="json")
            ),
        )

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        known = components(self.group)
        choices = []
        for kind, component in known.items():
            choice = handler(component.__pydantic_core_schema__)
            if kind != self.default:  # only the default kind may go unnamed
                described = handler.resolve_ref_schema(choice)
                described["required"] = sorted({*described.get("required", []), "kind"})
            choices.append(choice)
        return {"oneOf": choices, "description": f"One {self.group}: {', '.join(known)}."}


def default_component(group: str, kind: str) -> Any:
    """A Pydantic field whose default is the group's `kind` with its own defaults."""
    return Field(default_factory=lambda: components(group)[kind].model_validate({}))
