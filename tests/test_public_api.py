"""What users and scripts rely on: names, options, and what a command does not make them wait for."""

import ast
import subprocess
import sys
from pathlib import Path

import click
import pytest

import asge_zoo
from asge_zoo.cli.main import cli as group

# Changing a line here changes what users type: say so in the commit. Arguments are in capitals.
COMMAND_LINE = {
    "train": "SPEC --set --run-dir --resume --nproc --time-limit --data-root --device --json",
    "eval": "MODEL --revision --split --data --data-root --device --json",
    "predict": "MODEL PICTURES --revision --top-k --batch-size --device --json",
    "push": ("RUN REPO_ID --revision --private --create-pr --dry-run --no-eval --license --data-root --device --json"),
    "pull": "REPO_ID --revision --to --json",
    "compare": "RUNS --json",
    "validate": "SPEC --set --json",
    "explain": "SPEC --set --json",
    "schema": "--json",
    "ls": "WHAT --data-root --json",
    "export": "RUN --timm --model --data-root --device --json",
    "verify": "PATH --json",
    "bench": (
        "SPEC --data --startup --rounds --batch-size --precision --plot --size --workers --compress-probability --set "
        "--device --json"
    ),
    "doctor": "--data-root --json",
    "data write": (
        "KIND --from --to --split --max-resolution --compress-probability --quality --skip-unreadable --workers "
        "--data-root --json"
    ),
    "data verify": "FILE --json",
    "plugins check": "NAME --json",
    "plugins new": "NAME --kind --path",
}
HEAVY = {"torch", "torchvision", "timm", "numpy", "sklearn", "matplotlib", "huggingface_hub"}


def loaded_by(*arguments: str) -> set[str]:
    """The modules that `python <arguments>` imports."""
    done = subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip() for line in lines}


def test_all_is_sorted_and_whole() -> None:
    assert asge_zoo.__all__ == sorted(asge_zoo.__all__)
    assert set(asge_zoo.__all__) == set(asge_zoo._HOMES)


@pytest.mark.parametrize("name", asge_zoo.__all__)
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(asge_zoo, name)
    assert value.__name__ == name
    assert value.__module__ == asge_zoo._HOMES[name], "comes from the module that defines it"
    assert value.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = asge_zoo.nothing


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(asge_zoo.__file__).read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert {name: seen.get(name) for name in asge_zoo._HOMES} == asge_zoo._HOMES


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = loaded_by("-c", "import asge_zoo")
    assert "asge_zoo" in loaded
    assert not loaded & {*HEAVY, "pydantic"}


def test_help_loads_nothing_heavy() -> None:
    loaded = loaded_by("-m", "asge_zoo", "--help")
    assert "asge_zoo.cli.main" in loaded
    assert not loaded & {*HEAVY, "pydantic"}


@pytest.mark.parametrize("spec", ["vgg8_digits", "vgg8_cifar10"])
def test_validate_loads_only_what_the_spec_needs(spec: str) -> None:
    loaded = loaded_by("-m", "asge_zoo", "validate", spec)
    assert "asge_zoo.compiler.check" in loaded
    assert not loaded & {"torchvision", "timm", "matplotlib"}


def commands(group: click.Group, prefix: str = "") -> dict[str, click.Command]:
    """Every command by what is typed."""
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        inner = isinstance(command, click.Group)
        found |= commands(command, f"{prefix}{name} ") if inner else {f"{prefix}{name}": command}
    return found


def test_commands_and_their_options_are_frozen() -> None:
    found = {}
    for name, command in commands(group).items():
        words = []
        for parameter in command.params:
            option = isinstance(parameter, click.Option)
            words += [*parameter.opts, *parameter.secondary_opts] if option else [(parameter.name or "").upper()]
        found[name] = " ".join(words)
    assert found == COMMAND_LINE


@pytest.mark.parametrize("name", COMMAND_LINE)
def test_every_command_and_option_is_explained(name: str) -> None:
    command = commands(group)[name]
    assert command.help
    undescribed = [p.name for p in command.params if isinstance(p, click.Option) and not p.help]
    assert not undescribed


def test_version_is_the_packages() -> None:
    done = subprocess.run([sys.executable, "-m", "asge_zoo", "--version"], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, f"asge-zoo {asge_zoo.__version__}")
