"""New packages: for every group one that works as it is, is found, trains and passes its own tests; or nothing."""

import errno
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import tiny_spec

from asge_zoo import plugins, registry
from asge_zoo.compiler.build import compile_spec
from asge_zoo.compiler.check import parts
from asge_zoo.errors import PluginError
from asge_zoo.registry import ROOMS, components
from asge_zoo.scaffold import EXAMPLES, LONGEST_NAME, write_package
from asge_zoo.spec import load_spec

pytestmark = pytest.mark.usefixtures("one_thread")

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test loads is gone after it."""
    monkeypatch.setattr(registry, "_components", {group: components(group) for group in ROOMS})
    monkeypatch.setattr(registry, "_plugins", {})


@pytest.fixture
def own_modules() -> Iterator[None]:
    """What a test imports of packages that it wrote is gone after it."""
    yield
    for name in [name for name in sys.modules if name.startswith("acme_")]:
        del sys.modules[name]


def install(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an editable install leaves: the package's folder on the path, and its metadata beside it."""
    project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = package.parent / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [
        line
        for group, entries in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{kind} = {where}" for kind, where in entries.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.syspath_prepend(package)


def refused(name: str, component: str, folder: Path) -> str:
    """Why a package is not written: one line, and nothing in the folder has changed."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(PluginError) as caught:
        write_package(name, component, folder)
    assert sorted(folder.rglob("*")) == before
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# Written.


def test_there_is_an_example_of_every_group() -> None:
    assert tuple(EXAMPLES) == plugins.GROUPS


@pytest.mark.parametrize("component", plugins.GROUPS)
@pytest.mark.usefixtures("own_modules")
def test_a_package_works_as_it_is(component: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_package("acme-first-try", component, tmp_path)
    package = tmp_path / "acme-first-try"
    assert sorted(files) == sorted(path for path in package.rglob("*") if path.is_file())
    assert [path.name for path in tmp_path.iterdir()] == ["acme-first-try"]
    assert (package / "acme_first_try" / "py.typed") in files
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    assert (project["name"], project["version"], project["dependencies"]) == ("acme-first-try", "0.1.0", ["asge-zoo"])

    install(package, monkeypatch)
    found = plugins.find(component, "acme.first_try")
    assert found is not None and found.load().__name__ == "FirstTry"
    spec = tiny_spec(f"{EXAMPLES[component].field}.kind=acme.first_try")
    assert [(origin.component, origin.distribution) for origin in spec.plugins] == [(component, "acme-first-try")]
    loader = parts(spec).data.loader(tmp_path, seed=0, device=torch.device("cpu"))
    step = compile_spec(spec).step(*next(iter(loader.train_batches(0))))
    assert all(bool(tensor.isfinite().all()) for tensor in (step.losses, step.head_loss, *step.grads.values()))

    (snippet,) = re.findall(r"```json\n(.*?)```", (package / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    file = tmp_path / "snippet.json"
    file.write_text(snippet)
    assert [origin.kind for origin in load_spec(file).plugins] == ["acme.first_try"]


@pytest.mark.compile
def test_packages_pass_their_own_tests(tmp_path: Path) -> None:
    for component in plugins.GROUPS:
        write_package(f"acme-{component}-try", component, tmp_path)
    path = [REPOSITORY, *tmp_path.iterdir()]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", tmp_path, "."],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.fullmatch(r"\d+ passed in .*", done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["a-b", f"acme-{'x' * (LONGEST_NAME - 5)}", f"{'x' * (LONGEST_NAME - 2)}-y"])
def test_the_code_is_formatted(name: str, tmp_path: Path) -> None:
    pytest.importorskip("ruff")
    for component in plugins.GROUPS:
        write_package(name, component, tmp_path / component)
    for command in (["check", "--no-cache", "--select", "E,F,I,B,UP,C90"], ["format", "--no-cache", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "."]
        done = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "module", "kind", "class_name"),
    [
        ("acme-lp", "acme_lp", "acme.lp", "Lp"),
        ("acme-my-pool", "acme_my_pool", "acme.my_pool", "MyPool"),
        ("Acme-my_LP.pool", "acme_my_lp_pool", "acme.my_lp_pool", "MyLPPool"),
        ("acme-2d", "acme_2d", "acme.2d", "Acme2d"),
        ("acme-none", "acme_none", "acme.none", "AcmeNone"),
        ("acme-pooling", "acme_pooling", "acme.pooling", "AcmePooling"),
        ("acme-promise", "acme_promise", "acme.promise", "AcmePromise"),
    ],
)
def test_names(name: str, module: str, kind: str, class_name: str, tmp_path: Path) -> None:
    """The class has the prefix only where the code would not work without it."""
    write_package(name, "pooling", tmp_path)
    project = tomllib.loads((tmp_path / name / "pyproject.toml").read_text())["project"]
    assert project["entry-points"] == {"asge_zoo.pooling": {kind: f"{module}:{class_name}"}}
    source = (tmp_path / name / module / "__init__.py").read_text(encoding="utf-8")
    compile(source, module, "exec")
    assert f"class {class_name}(Pooling):" in source and f'kind: Literal["{kind}"] = "{kind}"' in source


def test_folders_are_made_and_an_empty_one_is_used(tmp_path: Path) -> None:
    target = tmp_path / "some" / "where" / "acme-lp"
    target.mkdir(parents=True)
    write_package("acme-lp", "norm", tmp_path / "some" / "where")
    write_package("acme-lp", "norm", tmp_path / "else" / "where")
    modes = {path.stat().st_mode for path in (target, target.parent, tmp_path / "else" / "where" / "acme-lp")}
    assert len(modes) == 1, "the package's folder has the rights that folders have here"


# Refused.


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "package name '': no name of a distribution; write letters, digits and hyphens, as in acme-lp"),
        ("acme-", "no name of a distribution"),
        ("acme-lp\n", "no name of a distribution"),
        ("../acme-lp", "no name of a distribution"),
        ("acme-ℓp", "no name of a distribution"),
        ("lp", "package name 'lp': has no prefix; write whose it is and a hyphen before it, as in acme-lp"),
        ("acme.lp", "has no prefix"),
        ("3com-lp", "begins with a digit"),
        ("ASGE-zoo", "is asge-zoo's own"),
        (f"acme-{'x' * LONGEST_NAME}", f"longer than {LONGEST_NAME} characters; shorten it"),
    ],
)
def test_a_name_that_can_not_be(name: str, said: str, tmp_path: Path) -> None:
    assert said in refused(name, "pooling", tmp_path)


@pytest.mark.parametrize(
    ("component", "said"),
    [
        ("poling", "component 'poling': unknown, did you mean 'pooling'?"),
        ("optimizer", "component 'optimizer': unknown; choose from backbone, dataset"),
        ("a\nb", "component 'a\\nb': unknown; choose from"),
    ],
)
def test_an_unknown_component(component: str, said: str, tmp_path: Path) -> None:
    assert said in refused("acme-lp", component, tmp_path)


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_a_place_that_is_taken(what: str, tmp_path: Path) -> None:
    target = tmp_path / "acme-lp"
    if what == "folder":
        target.mkdir()
        (target / "mine").write_text("mine")
    elif what == "file":
        target.write_text("mine")
    else:
        target.symlink_to("nowhere")
    said = refused("acme-lp", "pooling", tmp_path)
    assert said == f"{target}: is there already, and not an empty folder; give another name or folder"


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "acme-lp: can't be written (File exists); give another folder" in refused(
        "acme-lp", "pooling", tmp_path / "file"
    )


@pytest.mark.parametrize("at", range(6))
def test_a_full_disk_leaves_nothing(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = Path.write_text, iter(range(at, -1, -1))

    def write_text(*arguments, **options) -> int:
        if next(left) == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    monkeypatch.setattr(Path, "write_text", write_text)
    said = refused("acme-lp", "pooling", tmp_path)
    assert said == f"{tmp_path / 'acme-lp'}: can't be written (No space left on device); give another folder"
