"""The rooms' order, held by reading every import: at the top, inside functions, and for type checkers only."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import asge_zoo

PACKAGE = Path(asge_zoo.__file__).parent
LONGEST = 300

# A module may import from its own room and from rooms to its left (here: further up), not from its neighbours in
# a line. A name is a folder or a module of the package; the longest that fits a module is its room.
ORDER = (
    ("errors", "seeding", "files", "process", "ranks"),
    ("plugins",),
    ("registry",),
    ("spec", "scaffold"),
    ("ops",),
    ("graph",),
    ("backbones", "rules", "predict", "data", "optim"),
    ("compiler",),
    ("evaluate", "inference"),
    ("engine",),
    ("export", "hub"),
    ("conformance",),
    ("testing",),
    ("report", "bench"),
    ("cli",),
    ("__init__", "__main__"),
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}


class Import(NamedTuple):
    """`from module import name`; `name` is None for `import module`. `loads`: it runs when its file is imported."""

    module: str
    name: str | None
    loads: bool


def imports_in(source: str) -> list[Import]:
    """Every import in a module's source."""
    return list(_imports(ast.parse(source), loads=True))


def _imports(node: ast.AST, *, loads: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, None, loads) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            module = "." * child.level + (child.module or "")
            yield from (Import(module, alias.name, loads) for alias in child.names)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _imports(child, loads=False)
        else:
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _imports(child, loads=loads and not function)


def module_name(file: Path) -> str:
    """`asge_zoo.ops.norm` for its file; a folder's `__init__` goes by that name."""
    return ".".join(["asge_zoo", *file.relative_to(PACKAGE).with_suffix("").parts])


SOURCES = {module_name(file): file.read_text(encoding="utf-8") for file in sorted(PACKAGE.rglob("*.py"))}
IMPORTS = {module: imports_in(source) for module, source in SOURCES.items()}


def imported_modules(module: str, *, loading_only: bool = False) -> set[str]:
    """The package's own modules that a module imports."""
    found = set()
    for entry in IMPORTS[module]:
        if entry.module.split(".")[0] == "asge_zoo" and (entry.loads or not loading_only):
            submodule = f"{entry.module}.{entry.name}"
            found.add(submodule if submodule in SOURCES else entry.module)
    return found


def room_of(module: str) -> str | None:
    """The room of the package's module: the longest name in `ORDER` that fits it."""
    name = module.removeprefix("asge_zoo").removeprefix(".") or "__init__"
    fitting = [room for room in RANK if name == room or name.startswith(f"{room}.")]
    return max(fitting, key=len, default=None)


def test_imports_in_sees_every_kind() -> None:
    source = (
        "import one.two\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n"
        "    from three import name\n"
        "class C:\n"
        "    import four\n"
        "    def method(self):\n"
        "        try:\n"
        "            from . import five\n"
        "        except ImportError:\n"
        "            pass\n"
    )
    assert imports_in(source) == [
        Import("one.two", None, True),
        Import("typing", "TYPE_CHECKING", True),
        Import("three", "name", False),
        Import("four", None, True),
        Import(".", "five", False),
    ]


def test_every_room_of_the_table_exists() -> None:
    for room in RANK:
        path = PACKAGE.joinpath(*room.split("."))
        assert path.is_dir() or path.with_suffix(".py").is_file(), room


@pytest.mark.parametrize("module", SOURCES)
def test_imports_run_one_way(module: str) -> None:
    room = room_of(module)
    assert room is not None, f"{module} has no place in the order of the rooms"
    for imported in sorted(imported_modules(module)):
        other = room_of(imported)
        assert other is not None, f"{module} imports {imported}, which has no place in the order of the rooms"
        assert other == room or RANK[other] < RANK[room], f"{module} ({room}) may not import {imported} ({other})"


def test_no_cycle_at_module_level() -> None:
    graph = {module: imported_modules(module, loading_only=True) & SOURCES.keys() for module in SOURCES}
    while leaves := [module for module, imported in graph.items() if not imported & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert not graph, f"these modules import each other: {sorted(graph)}"


@pytest.mark.parametrize("module", SOURCES)
def test_names_come_from_where_they_are_defined(module: str) -> None:
    """`from package import module` is fine, `from package import name` is not; nor is a relative import."""
    for entry in IMPORTS[module]:
        assert not entry.module.startswith("."), f"{module} has a relative import, of {entry.name}"
        if f"{entry.module}.__init__" in SOURCES:
            assert f"{entry.module}.{entry.name}" in SOURCES, f"{module} imports {entry.module} for {entry.name}"


@pytest.mark.parametrize("module", [name for name in SOURCES if name.endswith(".__init__") and name.count(".") > 1])
def test_a_rooms_init_holds_a_docstring_alone(module: str) -> None:
    body = ast.parse(SOURCES[module]).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)


@pytest.mark.parametrize("room", ["backbones", "rules"])
def test_siblings_do_not_import_each_other(room: str) -> None:
    """A family shares its contract (`base`) and nothing else."""
    prefix = f"asge_zoo.{room}."
    siblings = [module for module in SOURCES if module.startswith(prefix)]
    assert siblings
    for module in siblings:
        own = {imported for imported in imported_modules(module) if imported.startswith(prefix)}
        assert own <= {f"{prefix}base"}, f"{module} imports its siblings {sorted(own)}"


@pytest.mark.parametrize("module", SOURCES)
def test_files_are_short(module: str) -> None:
    assert len(SOURCES[module].splitlines()) <= LONGEST
