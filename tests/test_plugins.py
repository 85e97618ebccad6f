"""Plugins of installed packages: found by metadata, imported when they are named, one line where they fail."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Said
from tiny import TINY, tiny_spec

from asge_zoo import plugins, registry
from asge_zoo.compiler.build import compile_spec
from asge_zoo.engine.train import train
from asge_zoo.errors import SpecError
from asge_zoo.spec import json_schema, load_spec

pytestmark = pytest.mark.usefixtures("one_thread", "own_registry")

Cli = Callable[..., Said]
MODULE = '''
from typing import ClassVar, Literal

from torch import nn

from asge_zoo.ops.pooling import Pooling


class Middle(Pooling):
    """The mean of mean and maximum over the window."""

    kind: Literal["{kind}"] = "{kind}"
    api_version: ClassVar[int] = {api}
    share: float = 0.5

    def build(self, kernel_size: int) -> nn.Module:
        return MiddlePool(kernel_size, self.share)


class MiddlePool(nn.Module):
    def __init__(self, kernel_size, share):
        super().__init__()
        self.mean, self.max, self.share = nn.AvgPool2d(kernel_size), nn.MaxPool2d(kernel_size), share

    def forward(self, x):
        return self.share * self.mean(x) + (1 - self.share) * self.max(x)
'''


def install(
    site: Path,
    distribution: str,
    *,
    kind: str = "acme.middle",
    group: str = "pooling",
    source: str | None = None,
    claim: str | None = None,
    api: int = 1,
) -> None:
    """What an installer leaves of a package with one component."""
    module = f"plugin_{distribution.replace('-', '_')}"
    (site / f"{module}.py").write_text(MODULE.format(kind=kind, api=api) if source is None else source)
    info = site / f"{distribution.replace('-', '_')}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[asge_zoo.{group}]\n{claim or kind} = {module}:Middle\n")


RAISES = "raise RuntimeError('no such luck')\n"


def listed(cli: Cli) -> list[dict[str, Any]]:
    """What `ls plugins --json` gives of the packages made here; others may be installed."""
    said = cli("ls", "plugins", "--json")
    assert (said.code, said.err) == (0, "")
    return [row for row in json.loads(said.out) if row["distribution"].startswith("acme")]


def refused(*overrides: str) -> str:
    """Why a spec is refused."""
    with pytest.raises(SpecError) as caught:
        tiny_spec(*overrides)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# Found, named, used.


def test_a_plugin_works_in_a_spec(site: Path) -> None:
    assert "unknown pooling 'acme.middle'" in refused("pooling.kind=acme.middle")
    install(site, "acme-middle")
    spec = tiny_spec("pooling.kind=acme.middle", "pooling.share=0.25")
    assert spec.resolved()["pooling"] == {"kind": "acme.middle", "share": 0.25}
    graph = compile_spec(spec)
    assert sum(type(module).__name__ == "MiddlePool" for module in graph.modules()) == 4
    assert graph.step(torch.randn(4, 1, 16, 16), torch.arange(4)).losses.isfinite().all()
    assert "pooling.shar: unknown key, did you mean 'share'?" in refused("pooling.kind=acme.middle", "pooling.shar=1")
    assert "pooling.share: " in refused("pooling.kind=acme.middle", "pooling.share=much")


def test_a_plugin_is_listed_with_its_package(site: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert listed(cli) == []
    with monkeypatch.context() as switched:
        switched.setenv("ASGE_ZOO_PLUGINS", "none")
        assert cli("ls", "plugins").out == "no plugins are installed\n"
    install(site, "acme-middle")
    row = {"kind": "acme.middle", "component": "pooling", "distribution": "acme-middle", "version": "1.2"}
    assert listed(cli) == [{**row, "error": None}]
    assert "acme-middle" in cli("ls", "plugins").out


def test_a_near_miss_names_installed_plugins_without_importing_them(site: Path) -> None:
    install(site, "acme-middle", source=RAISES)
    assert "unknown pooling 'acme.midle', did you mean 'acme.middle'?" in refused("pooling.kind=acme.midle")


def test_the_schema_includes_plugins(site: Path, cli: Cli) -> None:
    install(site, "acme-middle")
    install(site, "acme-broken", kind="acme.broken", source=RAISES)
    assert "acme.middle" not in str(json_schema())
    said = cli("schema")
    assert "acme.middle" in json.dumps(json.loads(said.out)["properties"]["pooling"])
    assert "'acme.broken' of acme-broken 1.2: can't be imported" in said.err and len(said.err.splitlines()) == 1


def test_no_plugin_is_imported_that_is_not_named(site: Path, cli: Cli, tmp_path: Path) -> None:
    for group in plugins.GROUPS:
        install(site, f"acme-{group}", kind=f"acme.{group}", group=group, source=RAISES)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    for line in (("validate", tmp_path / "tiny.json"), ("ls", "components"), ("ls", "specs")):
        said = cli(*line)
        assert (said.code, said.err) == (0, "")
    assert not [name for name in sys.modules if name.startswith("plugin_acme")]


# Switched off.


@pytest.mark.parametrize(
    ("value", "kinds"),
    [
        ("none", []),
        ("acme-one", ["acme.one"]),
        (" Acme_Two ,", ["acme.two"]),
        ("acme-one,acme.two", ["acme.one", "acme.two"]),
        ("", ["acme.one", "acme.two"]),
        ("other", []),
    ],
)
def test_the_switch(value: str, kinds: list[str], site: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        install(site, f"acme-{name}", kind=f"acme.{name}")
    monkeypatch.setenv("ASGE_ZOO_PLUGINS", value)
    assert [row["kind"] for row in listed(cli)] == kinds
    assert [name for name in sys.modules if name.startswith("plugin_acme")] == [
        f"plugin_{k.replace('.', '_')}" for k in kinds
    ]


def test_a_plugin_that_is_switched_off_says_so(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "acme-middle", source=RAISES)
    monkeypatch.setenv("ASGE_ZOO_PLUGINS", "none")
    assert "$ASGE_ZOO_PLUGINS is 'none'" in refused("pooling.kind=acme.middle")


# Wrong.


def test_one_name_of_two_packages_is_refused_when_it_is_used(site: Path, cli: Cli) -> None:
    for distribution in ("acme-one", "acme-two"):
        install(site, distribution)
    tiny_spec()
    said = refused("pooling.kind=acme.middle")
    assert "pooling.kind: pooling 'acme.middle' is claimed by acme-one 1.2 and acme-two 1.2; uninstall all but" in said
    assert [("claimed by" in row["error"], row["distribution"]) for row in listed(cli)] == [
        (True, "acme-one"),
        (True, "acme-two"),
    ]
    assert not [name for name in sys.modules if name.startswith("plugin_acme")]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"source": RAISES}, "can't be imported (RuntimeError: no such luck)"),
        ({"source": "import sys\nsys.exit(3)\n"}, "can't be imported (SystemExit: 3)"),
        ({"source": "x = (\n"}, "can't be imported (SyntaxError"),
        ({"source": ""}, "can't be imported (AttributeError"),
        ({"source": "Middle = 3\n"}, "plugin_acme_middle:Middle is no component of that group"),
        ({"group": "norm"}, "plugin_acme_middle:Middle is no component of that group"),
        ({"claim": "acme.other"}, "its class gives its kind as 'acme.middle'"),
        ({"api": 2}, "Middle has api_version 2, and this asge-zoo has 1"),
        ({"kind": "middle"}, "a plugin's kind has a prefix, as in 'acme.middle'"),
        ({"kind": "middle", "claim": "acme.middle"}, "its class gives its kind as 'middle'"),
    ],
    ids=str,
)
def test_a_plugin_that_does_not_work_is_one_line(given: dict[str, Any], said: str, site: Path, cli: Cli) -> None:
    install(site, "acme-middle", **given)
    group, kind = given.get("group", "pooling"), given.get("claim", given.get("kind", "acme.middle"))
    tiny_spec()
    for line in (refused(f"{group}.kind={kind}"), listed(cli)[0]["error"]):
        assert f"{group} '{kind}' of acme-middle 1.2: {said}" in line
        assert "mend acme-middle, or install another version of it" in line


def test_a_broken_plugin_disturbs_no_other(site: Path, cli: Cli) -> None:
    install(site, "acme-broken", kind="acme.broken", source=RAISES)
    install(site, "acme-middle")
    assert [row["error"] is None for row in listed(cli)] == [False, True]
    assert compile_spec(tiny_spec("pooling.kind=acme.middle"))


def test_a_bare_name_can_not_be_taken(site: Path) -> None:
    """Built-ins stand before whatever claims their names."""
    install(site, "acme-rms", kind="rms", source=RAISES)
    assert type(tiny_spec("pooling.kind=rms").pooling).__module__ == "asge_zoo.ops.pooling"


# Recorded.


@pytest.mark.usefixtures("no_pictures")
def test_where_a_component_comes_from_is_recorded(site: Path, cli: Cli, tmp_path: Path) -> None:
    install(site, "acme-middle")
    spec, folder = tiny_spec("pooling.kind=acme.middle"), tmp_path / "run"
    record = {"component": "pooling", "kind": "acme.middle", "distribution": "acme-middle", "version": "1.2"}
    assert spec.resolved()["plugins"] == [record]
    train(spec, run_dir=folder, device="cpu")
    for file in (folder / "spec.json", folder / "best" / "spec.json"):
        assert json.loads(file.read_text())["plugins"] == [record]
        assert load_spec(file).digest() == spec.digest()
    assert json.loads((folder / "environment.json").read_text())["plugins"] == {"acme-middle": "1.2"}
    script = "import sys, asge_zoo; print(asge_zoo.load(sys.argv[1]).training)"
    elsewhere = [sys.executable, "-c", script, str(folder)]
    here = subprocess.run(elsewhere, capture_output=True, text=True, env={"PYTHONPATH": f"{site}:{Path.cwd()}"})
    assert here.stdout == "False\n", here.stderr


@pytest.mark.usefixtures("no_pictures")
def test_a_missing_plugin_is_named_with_its_package(
    site: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(site, "acme-middle")
    folder = tmp_path / "run"
    train(tiny_spec("pooling.kind=acme.middle"), run_dir=folder, device="cpu")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(site)])
    registry._components["pooling"].pop("acme.middle")
    for line in (("eval", folder), ("validate", folder / "spec.json"), ("train", folder / "spec.json")):
        said = cli(*line)
        assert (said.code, said.out, len(said.err.splitlines())) == (2, "", 1)
        assert "unknown pooling 'acme.middle'; it comes with acme-middle: pip install 'acme-middle==1.2'" in said.err
        assert "spec.json: pooling.kind: " in said.err
    assert cli("verify", folder).code == 0


def test_what_is_registered_by_hand_is_recorded_as_such(tmp_path: Path) -> None:
    scope: dict[str, Any] = {"__name__": "notebook"}
    exec(MODULE.format(kind="mine", api=1), scope)
    registry.register(scope["Middle"])
    spec = tiny_spec("pooling.kind=mine")
    assert [(origin.kind, origin.distribution, origin.version) for origin in spec.plugins] == [("mine", None, None)]
    registry._components["pooling"].pop("mine")
    with pytest.raises(SpecError, match="unknown pooling 'mine'; it is of no package: register it"):
        load_spec(spec.resolved())


@pytest.mark.parametrize(
    "plugins", [3, "x", [3], [{}], [{"component": "pooling", "kind": "acme.x"}], [{"component": "pooling", "kind": []}]]
)
def test_nonsense_under_plugins_is_bad_input(plugins: Any) -> None:
    for pooling in ("rms", "acme.x"):
        with pytest.raises(SpecError, match="plugins|pooling.kind: unknown"):
            load_spec({**TINY, "pooling": {"kind": pooling}, "plugins": plugins})


def test_a_recorded_name_can_not_smuggle_in_a_command() -> None:
    """What is said is typed by people."""
    origin = {"component": "pooling", "kind": "acme.x", "distribution": "x; curl evil", "version": "1"}
    with pytest.raises(SpecError) as caught:
        load_spec({**TINY, "pooling": {"kind": "acme.x"}, "plugins": [origin]})
    assert "pip install" not in str(caught.value)
