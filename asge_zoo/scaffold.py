"""New plugin packages: a working component of one group, its entry point and its tests, made from `_templates/`."""

import io
import json
import keyword
import os
import re
import tempfile
import tokenize
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from asge_zoo.errors import PluginError
from asge_zoo.registry import near_miss

TEMPLATES = Path(__file__).with_name("_templates")
LONGEST_NAME = 40  # so that the lines that hold a name stay short


class Example(NamedTuple):
    """What a group's template computes, and the field of a spec that names it."""

    field: str
    summary: str


EXAMPLES = {
    "backbone": Example("backbone", "Convolutions of 3×3 that double their channels, each but the first pooled."),
    "rule": Example(
        "rule", "Cross-entropy with smoothed labels, on a fixed random projection of each unit's goodness."
    ),
    "goodness": Example("rule.goodness", "Mean over each channel of a power of the absolute activation."),
    "projection": Example(
        "rule.projection", "Random signs (Rademacher), divided by the root of the number of classes."
    ),
    "pooling": Example("pooling", "Mix of the maximum and the mean over non-overlapping windows."),
    "norm": Example("norm", "Division of each sample by its mean absolute value over (C, H, W)."),
    "prediction": Example("prediction", "One linear layer on the globally average-pooled outputs of the last units."),
    "dataset": Example("data", "scikit-learn's handwritten digits with two classes: even and odd, or small and large."),
}


def write_package(name: str, component: str, folder: Path) -> list[Path]:
    """Write a package with a working component to `folder / name`, whole or not at all.

    Args:
        name: of the distribution, such as `acme-my-pool`; gives the kind `acme.my_pool`, the module `acme_my_pool`
            and the class `MyPool`.
        component: one of `plugins.GROUPS`.
        folder: made if it is not there.

    Returns:
        The files written.

    Raises:
        PluginError: the name or the component is none that a plugin can have, the place is taken, or can't be
            written to.
    """
    if component not in EXAMPLES:
        raise PluginError(f"component {component[:60]!r}: unknown{near_miss(component, list(EXAMPLES))}")
    files = _files(name, component)
    target = folder / name
    try:
        if os.path.lexists(target) and not _is_empty_folder(target):
            raise PluginError(f"{target}: is there already, and not an empty folder; give another name or folder")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as temporary:
            built = Path(temporary, name)
            for path, text in files.items():
                (built / path).parent.mkdir(parents=True, exist_ok=True)
                (built / path).write_text(text, encoding="utf-8", newline="\n")
            os.rename(built, target)
    except OSError as error:
        raise PluginError(f"{target}: can't be written ({error.strerror or error}); give another folder") from error
    return [target / path for path in files]


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _files(name: str, component: str) -> dict[str, str]:
    """The package's files by their path in it.

    Raises:
        PluginError: no package with a prefix can have that name.
    """
    parts = _parts(name)
    module, kind = "_".join(parts).lower(), f"{parts[0]}.{'_'.join(parts[1:])}".lower()
    field, summary = EXAMPLES[component]
    values = {"name": name, "module": module, "kind": kind, "component": component, "field": field, "summary": summary}
    values |= {"cls": _class_name(parts, component), "spec": _spec_snippet(field, kind)}
    return {
        "pyproject.toml": _fill("pyproject.toml", values),
        "README.md": _fill("README.md", values),
        f"{module}/__init__.py": _fill(f"{component}/component.py", values),
        f"{module}/py.typed": "",
        f"tests/test_{module}.py": _fill("test_component.py", values),
        f"tests/test_{module}_values.py": _fill(f"{component}/test_values.py", values),
    }


def _fill(template: str, values: Mapping[str, str]) -> str:
    return Template((TEMPLATES / f"{template}.tmpl").read_text(encoding="utf-8")).substitute(values)


def _parts(name: str) -> list[str]:
    """The words of a distribution's name, the first of them its prefix."""
    shown = f"package name {name[:60]!r}"
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", name):
        raise PluginError(f"{shown}: no name of a distribution; write letters, digits and hyphens, as in acme-lp")
    if len(name) > LONGEST_NAME:
        raise PluginError(f"{shown}: longer than {LONGEST_NAME} characters; shorten it")
    if "-" not in name:
        raise PluginError(f"{shown}: has no prefix; write whose it is and a hyphen before it, as in acme-{name}")
    parts = re.split(r"[-_.]+", name)
    if parts[0][0].isdigit():
        raise PluginError(f"{shown}: begins with a digit, so no module can have it; begin with a letter")
    if [part.lower() for part in parts] == ["asge", "zoo"]:
        raise PluginError(f"{shown}: is asge-zoo's own; write another prefix, as in acme-zoo")
    return parts


def _class_name(parts: list[str], component: str) -> str:
    """All words but the prefix, capitalised; the prefix, too, where the code would not work without it."""
    templates = (f"{component}/component.py", f"{component}/test_values.py", "test_component.py")
    code = [_fill(template, defaultdict(lambda: "_")) for template in templates]
    tokens = [token for text in code for token in tokenize.generate_tokens(io.StringIO(text).readline)]
    words = ["".join(part[0].upper() + part[1:] for part in some) for some in (parts[1:], parts)]
    taken = {token.string for token in tokens if token.type == tokenize.NAME}
    return words[0] if words[0].isidentifier() and words[0] not in {*taken, *keyword.kwlist} else words[1]


def _spec_snippet(field: str, kind: str) -> str:
    """A whole spec that names the kind, a line a part."""
    part: dict[str, Any] = {"kind": kind}
    outer, _, inner = field.partition(".")
    parts = {
        "name": "trial",
        "data": {"kind": "digits"},
        "backbone": {"kind": "vgg8", "width": 0.25},
        outer: {"kind": "asge", inner: part} if inner else part,
    }
    return "{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in parts.items()) + "\n}"
