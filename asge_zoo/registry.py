"""Components by group and kind: what a spec may name.

A component is a frozen Pydantic model of its options, with a `kind`, whose methods build what the
group's contract asks for. Each group's contract is an abstract `Component` that sets `group`;
`register` files a final class under (group, kind). Built-ins and third parties use the same call; those of installed
packages (see `plugins`) are imported when a spec names their kind, or when all are asked for.
"""

import contextlib
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
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import PydanticCustomError, core_schema

from asge_zoo import plugins
from asge_zoo.errors import PluginError

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

API_VERSION = 1  # of the contracts; a component that was written for another one is refused

_components: dict[str, dict[str, type["Component"]]] = {group: {} for group in ROOMS}
_plugins: dict[type["Component"], plugins.Plugin] = {}  # what was loaded, and where from


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


class Origin(Options):
    """Where a component comes from that is not built in.

    Attributes:
        component: its group.
        kind: as the spec names it.
        distribution, version: of its package; None for one that was registered by hand.
    """

    component: str
    kind: str
    distribution: str | None = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    version: str | None = Field(pattern=r"^[A-Za-z0-9.!+_-]+$")

    @property
    def remedy(self) -> str:
        """What to do where it is not there."""
        if self.distribution is None:
            return "it is of no package: register it, by importing the module that defines it, before you load this"
        return f"it comes with {self.distribution}: pip install '{self.distribution}=={self.version}'"


class Component(Options):
    """What a spec names by `kind`. Its fields are its options, its methods its group's contract."""

    group: ClassVar[str]
    api_version: ClassVar[int] = API_VERSION

    kind: Any  # a Literal with itself as default, in every final class


ComponentType = TypeVar("ComponentType", bound=type[Component])


def register(component: ComponentType) -> ComponentType:
    """File a component class under its group and kind. Use as a decorator.

    Raises:
        TypeError: the class belongs to no group, its `kind` has no default, or it was written for other contracts.
        ValueError: another class already has that kind.
    """
    group = getattr(component, "group", None)
    if group not in ROOMS:
        raise TypeError(f"{component.__qualname__} must derive from a contract, such as Pooling or Rule")
    kind = component.model_fields["kind"].default
    if not isinstance(kind, str):
        raise TypeError(f"{component.__qualname__} must give its kind: `kind: Literal['name'] = 'name'`")
    if component.api_version != API_VERSION:
        raise TypeError(
            f"{component.__qualname__} has api_version {component.api_version}, and this asge-zoo has {API_VERSION}"
        )
    other = _components[group].setdefault(kind, component)
    if other is not component:
        raise ValueError(f"{group} '{kind}' is registered twice: {other.__qualname__}, {component.__qualname__}")
    return component


def components(group: str) -> dict[str, type[Component]]:
    """Every registered component of a group by kind, the built-ins imported first; of plugins those in use."""
    room = importlib.import_module(ROOMS[group])
    for module in pkgutil.iter_modules(room.__path__):
        importlib.import_module(f"{room.__name__}.{module.name}")
    return dict(sorted(_components[group].items()))


def find_component(group: str, kind: str) -> type[Component] | None:
    """The component of that kind, imported if an installed package provides it; None if there is none.

    Raises:
        PluginError: a package claims the kind and does not keep its word.
    """
    known = components(group)
    if kind in known:
        return known[kind]
    plugin = plugins.find(group, kind)
    return load_plugin(plugin) if plugin else None


def load_plugin(plugin: plugins.Plugin) -> type[Component]:
    """Import and register what an installed package provides.

    Raises:
        PluginError: it can't be imported, or is not what its entry point says.
    """
    found = plugin.load()
    if not (isinstance(found, type) and issubclass(found, Component) and found.group == plugin.component):
        raise plugin.wrong(f"{plugin.entry_point.value} is no component of that group")
    try:
        register(found)
    except (TypeError, ValueError) as error:
        raise plugin.wrong(str(error)) from error
    if (kind := found.model_fields["kind"].default) != plugin.kind:
        raise plugin.wrong(f"its class gives its kind as '{kind}'")
    _plugins[found] = plugin
    return found


def load_plugins() -> list[tuple[plugins.Plugin, PluginError | None]]:
    """Import every installed plugin; with each, what is wrong with it."""
    found = []
    for plugin in plugins.installed():
        try:
            claimed = plugins.find(plugin.component, plugin.kind)
            if claimed:
                load_plugin(claimed)
            found.append((plugin, None))
        except PluginError as error:
            found.append((plugin, error))
    return found


def origins(options: Options) -> list[Origin]:
    """Of every component within `options` that is not built in, where it comes from; in the order of the fields."""
    found = []
    for value in (getattr(options, name) for name in type(options).model_fields):
        if isinstance(value, Component) and not type(value).__module__.startswith("asge_zoo."):
            plugin = _plugins.get(type(value))
            package = (plugin.distribution, plugin.version) if plugin else (None, None)
            found.append(Origin(component=value.group, kind=value.kind, distribution=package[0], version=package[1]))
        if isinstance(value, Options):
            found += origins(value)
    return found


class Slot:
    """Marks a field that holds a component of one group: `Annotated[Pooling, Slot("pooling", "rms")]`.

    Args:
        group: the group whose registry names the kinds.
        default: the kind that stands where the object gives none; without it `kind` is required.
    """

    def __init__(self, group: str, default: str | None = None) -> None:
        self.group, self.default = group, default

    def resolve(self, value: Any, info: ValidationInfo) -> Component:
        """The component that `{"kind": …, options}` describes, validated by its own class.

        What `info.context` has under `plugins` (see `Spec.plugins`) tells where a kind that is not here came from.
        """
        if isinstance(value, Component) and value.group == self.group:
            return value
        if not isinstance(value, dict):
            raise PydanticCustomError("component", "must be an object with a 'kind'")
        kind = value.get("kind", self.default)
        if kind is None:
            known = ", ".join(components(self.group))
            raise PydanticCustomError("component", "needs a 'kind', one of {known}", {"known": known})
        try:
            component = find_component(self.group, kind) if isinstance(kind, str) else None
        except PluginError as error:
            raise PydanticCustomError("plugin", "{why}", {"why": str(error), "key": "kind"}) from error
        if component is None:
            remedy = self._remedy(str(kind), (info.context or {}).get("plugins"))
            raise PydanticCustomError(
                "unknown_kind",
                "unknown {group} '{kind}'{remedy}",
                {"group": self.group, "kind": str(kind)[:60], "remedy": remedy, "key": "kind"},
            )
        return component.model_validate({**value, "kind": kind}, context=info.context)

    def _remedy(self, kind: str, recorded: Any) -> str:
        for origin in recorded if isinstance(recorded, list) else ():
            if isinstance(origin, dict) and (origin.get("component"), origin.get("kind")) == (self.group, kind):
                with contextlib.suppress(ValidationError):
                    return f"; {Origin.model_validate(origin).remedy}"
        installed = [plugin.kind for plugin in plugins.installed() if plugin.component == self.group]
        return near_miss(kind, [*components(self.group), *installed]) + plugins.switch_note()

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.with_info_plain_validator_function(
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
