"""Commands: what they report, and that what is wrong is answered by one line, exit code 2 and nothing written."""

import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Said, TrainedRun
from tiny import TINY

from asge_zoo.cli import main
from asge_zoo.engine import train as engine
from asge_zoo.report import doctor
from asge_zoo.spec import json_schema, load_spec, shipped_specs

pytestmark = pytest.mark.usefixtures("one_thread")

Cli = Callable[..., Said]

# Overrides of a shipped spec, and what the line must say: the place and what to do.
BAD_SPECS = {
    "unknown key": (["train.epoch=3"], ["train.epoch", "did you mean 'epochs'?"]),
    "unknown key, nested": (["rule.goodness.alhpa=3"], ["rule.goodness.alhpa", "did you mean 'alpha'?"]),
    "wrong type": (["train.epochs=ten"], ["train.epochs", "valid integer", '"ten"']),
    "unknown kind": (["backbone.kind=vgg9"], ["backbone", "did you mean 'vgg8'?"]),
    "negative alpha": (["rule.goodness.alpha=-1"], ["rule.goodness.alpha", "greater than or equal to 0"]),
    "width 0": (["backbone.width=0"], ["backbone.width", "greater than 0"]),
    "batch too large": (["data.batch_size=5000"], ["data.batch_size", "1257 training images", "lower it"]),
    "validation too large": (["data.validation=1437"], ["data.validation", "none to train on", "lower it"]),
    "image too small": (["data.size=8"], ["at least 16 pixels", "set data.size"]),
    "best with bp": (["rule.kind=bp", "prediction.kind=best"], ["prediction.kind", "choose last or fusion"]),
    "no equals sign": (["train.epochs"], ["--set train.epochs", "path.to.field=value"]),
    "no path": (["=3"], ["--set =3", "path.to.field=value"]),
    "through a number": (["train.epochs.x=3"], ["--set train.epochs.x=3", "train.epochs is not an object"]),
}
# Files that are no spec.
BAD_FILES = {
    "malformed": (b'{\n  "name": "x",\n  "data": }', ["line 3, column 11"]),
    "empty": (b"", ["line 1, column 1"]),
    "no object": (b"[1, 2]", ["a spec is a JSON object"]),
    "not text": (b"\x89PNG\xff\xfe", ["can't be read as a spec"]),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; data would go beside it, and there is no network."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ASGE_ZOO_DATA", str(tmp_path / "data"))

    def unreachable(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    return folder


def assert_refused(said: Said, *words: str) -> None:
    """One line on stderr that holds these words, nothing on stdout, exit code 2."""
    assert said.code == 2
    assert said.out == ""
    assert said.err.startswith("asge-zoo: ") and said.err.endswith("\n")
    assert len(said.err.splitlines()) == 1
    assert "Traceback" not in said.err
    for word in words:
        assert word in said.err


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def set_flags(overrides: list[str]) -> list[str]:
    """`--set a --set b`."""
    return [word for override in overrides for word in ("--set", override)]


# What is refused.


@pytest.mark.parametrize("command", ["validate", "explain", "train"])
@pytest.mark.parametrize("case", BAD_SPECS)
def test_a_bad_spec(case: str, command: str, cli: Cli, here: Path) -> None:
    overrides, words = BAD_SPECS[case]
    assert_refused(cli(command, "vgg8_digits", *set_flags(overrides)), *words)
    assert list(here.parent.rglob("*")) == [here]


@pytest.mark.parametrize("command", ["validate", "explain", "train"])
@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file(case: str, command: str, cli: Cli, here: Path) -> None:
    content, words = BAD_FILES[case]
    file = here / "bad.json"
    file.write_bytes(content)
    assert_refused(cli(command, "bad.json"), "bad.json", *words)
    assert list(here.parent.rglob("*")) == [here, file]


def test_a_bad_spec_file_is_named_with_its_path(cli: Cli, here: Path) -> None:
    file = here / "mine.json"
    file.write_text(json.dumps({**TINY, "train": {"epoch": 3}}))
    assert_refused(cli("validate", file), f"{file}: train.epoch: unknown key, did you mean 'epochs'?")


def test_no_such_spec(cli: Cli, here: Path) -> None:
    assert_refused(cli("train", "vgg7_digits"), "vgg7_digits: no such file", "`asge-zoo ls specs`")


@pytest.mark.parametrize("data", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_data_that_is_missing_without_a_network(data: str, cli: Cli, here: Path) -> None:
    said = cli("train", "vgg8_digits", "--set", f"data.kind={data}", "--set", "backbone.width=0.01")
    assert_refused(said, f"{data} is not under", str(here.parent / "data"), "--data-root", "ASGE_ZOO_DATA")
    assert list(here.parent.rglob("*")) == [here]


@pytest.mark.parametrize("command", [["train", "vgg8_digits"], ["ls", "datasets"], ["doctor"]], ids=" ".join)
@pytest.mark.parametrize("by", ["option", "environment"])
def test_a_data_root_that_is_no_directory(
    command: list[str], by: str, cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = here / "data.txt"
    file.write_text("not a folder")
    monkeypatch.setenv("ASGE_ZOO_DATA", str(file if by == "environment" else here))
    said = cli(*command, *(["--data-root", str(file)] if by == "option" else []))
    assert_refused(said, str(file), "is not a directory", "--data-root", "ASGE_ZOO_DATA")
    assert contents(here.parent) == {"here/data.txt": b"not a folder"}


@pytest.mark.parametrize("command", ["eval", "verify"])
@pytest.mark.parametrize("what", ["file", "empty folder", "nothing"])
def test_what_is_no_checkpoint(what: str, command: str, cli: Cli, here: Path) -> None:
    path = here / "thing"
    if what == "file":
        path.write_bytes(b"\x80\x04 not a checkpoint")
    elif what == "empty folder":
        path.mkdir()
    said = cli(command, path)
    if what == "nothing":
        assert_refused(
            said, str(path), "no such file", "user/name on the Hub" if command == "eval" else "manifest.json"
        )
    else:
        assert_refused(said, str(path), "neither a checkpoint", "manifest.json")


@pytest.mark.parametrize("device", ["quantum", "cuda:99", "meta"])
@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_device_that_is_not_here(device: str, command: str, cli: Cli, here: Path, trained: TrainedRun) -> None:
    what = "vgg8_digits" if command == "train" else str(trained.folder)
    assert_refused(cli(command, what, "--device", device), f"--device {device}", "`asge-zoo doctor`")
    assert list(here.rglob("*")) == []


@pytest.mark.parametrize("what", ["full", "file", "under a file"])
def test_a_run_directory_that_can_not_be_used(what: str, cli: Cli, here: Path) -> None:
    (here / "full").mkdir()
    (here / "full" / "mine.txt").write_text("mine")
    (here / "file").write_text("mine")
    before = contents(here)
    run_dir = {"full": "full", "file": "file", "under a file": "file/run"}[what]
    spec = here.parent / "tiny.json"
    spec.write_text(json.dumps(TINY))
    assert_refused(cli("train", spec, "--run-dir", run_dir), run_dir, "--run-dir")
    assert contents(here) == before


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["trian", "vgg8_digits"], "trian"),
        (["train"], "SPEC"),
        (["validate", "vgg8_digits", "--wrong"], "--wrong"),
        (["validate", "vgg8_digits", "--set"], "--set"),
        (["validate", "vgg8_digits", "twice"], "twice"),
        (["ls"], "specs"),
        (["ls", "everything"], "datasets"),
        (["eval"], "MODEL"),
        (["eval", "runs", "--split", "train"], "validation"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_line_that_is_no_command(line: list[str], said: str, cli: Cli) -> None:
    assert_refused(cli(*line), said)


def test_no_command_shows_the_help(cli: Cli) -> None:
    said = cli()
    assert said.code == 2
    assert "Commands:" in said.err and "train" in said.err


def test_a_real_process_refuses_likewise(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"name": "x", }')
    done = subprocess.run(
        [sys.executable, "-m", "asge_zoo", "train", "bad.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert_refused(Said(done.returncode, done.stdout, done.stderr), "bad.json", "line 1, column")
    assert [file.name for file in tmp_path.iterdir()] == ["bad.json"]


def test_an_interrupt_is_130(cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "train", interrupted)
    said = cli("train", "vgg8_digits")
    assert (said.code, said.out, said.err.strip()) == (130, "", "asge-zoo: stopped by SIGINT")


def test_a_bug_is_no_bad_input(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    """Only errors that a user can act on become a line; a programming error keeps its traceback."""

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(engine, "train", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main.run(["train", "vgg8_digits"])


# What is reported.


def test_help_of_all_and_each(cli: Cli) -> None:
    for line in (["--help"], ["-h"], *([command, "--help"] for command in main.cli.commands)):
        said = cli(*line)
        assert (said.code, said.err) == (0, "")
        assert said.out.startswith("Usage: asge-zoo")


def test_train_ends_with_one_json_line(cli: Cli, here: Path) -> None:
    spec = here.parent / "tiny.json"
    spec.write_text(json.dumps(TINY))
    said = cli("train", spec, "--run-dir", "run", "--json")
    assert said.code == 0
    report = json.loads(said.out.splitlines()[-1])
    assert said.out.count("\n") == 1, "data alone goes to stdout"
    assert set(report) == {"run_dir", "test_accuracy", "val_accuracy", "epochs", "seconds", "unit_test_accuracy"}
    assert (report["run_dir"], report["epochs"], len(report["unit_test_accuracy"])) == ("run", 1, 7)
    assert report == json.loads((here / "run" / "result.json").read_text())
    assert said.err == "", "quiet where stderr is no terminal"


def test_train_tells_people_where_and_how_well(cli: Cli, here: Path) -> None:
    spec = here.parent / "tiny.json"
    spec.write_text(json.dumps({**TINY, "train": {**TINY["train"], "runs": 2}}))
    said = cli("train", spec)
    assert said.code == 0
    assert "test accuracy" in said.out and "±" in said.out and "(2 runs)" in said.out
    assert f"run directory: {Path('runs') / 'tiny'}" in said.out


def test_train_with_several_runs_reports_their_spread(cli: Cli, here: Path) -> None:
    spec = here.parent / "tiny.json"
    spec.write_text(json.dumps(TINY))
    said = cli("train", spec, "--set", "train.runs=2", "--json")
    report = json.loads(said.out)
    assert {"test_accuracy", "std", "runs"} <= set(report)
    assert len(report["runs"]) == 2


@pytest.mark.parametrize(("split", "count"), [("test", 360), ("validation", 180)])
def test_eval_json(split: str, count: int, cli: Cli, trained: TrainedRun) -> None:
    said = cli("eval", trained.folder, "--split", split, "--json", "--device", "cpu")
    assert (said.code, said.err) == (0, "")
    report = json.loads(said.out)
    assert {"accuracy", "top5", "count", "unit_accuracy"} <= set(report)
    assert report["count"] == count
    assert len(report["unit_accuracy"]) == 7
    assert report["accuracy"] <= report["top5"] <= 100
    expected = trained.result.test_accuracy if split == "test" else trained.result.val_accuracy
    assert report["accuracy"] == expected


def test_eval_tells_people(cli: Cli, trained: TrainedRun) -> None:
    said = cli("eval", trained.folder / "last")
    assert said.code == 0
    assert "% of 360 test images" in said.out
    assert "conv7: " in said.out


def test_validate(cli: Cli, here: Path) -> None:
    assert cli("validate", "vgg8_digits") == Said(0, "vgg8_digits: valid (vgg8_digits)\n", "")
    said = cli("validate", "vgg8_digits", "--set", "train.epochs=3", "--json")
    report = json.loads(said.out)
    spec = load_spec("vgg8_digits", overrides=["train.epochs=3"])
    assert (report["valid"], report["spec_sha256"], report["spec"]) == (True, spec.digest(), spec.resolved())
    assert list(here.iterdir()) == []


def test_schema(cli: Cli) -> None:
    said = cli("schema")
    assert (said.code, said.err) == (0, "")
    assert json.loads(said.out) == json_schema()


@pytest.mark.parametrize(
    ("what", "key", "some"),
    [
        ("specs", "spec", set(shipped_specs())),
        ("components", "kind", {"vgg8", "vgg11", "asge", "bp", "rms", "fusion", "last", "best", "digits", "adamw"}),
        ("datasets", "dataset", {"digits", "mnist", "fashion_mnist", "cifar10", "cifar100"}),
    ],
)
def test_ls(what: str, key: str, some: set[str], cli: Cli, here: Path) -> None:
    said = cli("ls", what, "--json")
    assert (said.code, said.err) == (0, "")
    rows = json.loads(said.out)
    assert some <= {row[key] for row in rows}
    table = cli("ls", what)
    assert table.code == 0
    assert all(name in table.out for name in some)


def test_ls_datasets_says_what_is_here(cli: Cli, here: Path) -> None:
    (here / "MNIST").mkdir()
    rows = {row["dataset"]: row for row in json.loads(cli("ls", "datasets", "--data-root", here, "--json").out)}
    assert rows["mnist"]["found"] == str(here / "MNIST")
    assert rows["cifar10"]["found"] is None
    assert rows["digits"]["found"]
    assert (rows["digits"]["train"], rows["digits"]["test"], rows["digits"]["classes"]) == (1437, 360, 10)


@pytest.fixture
def damaged(trained: TrainedRun, tmp_path: Path) -> Path:
    """A copy of a run with one byte of one checkpoint's weights changed."""
    copy = tmp_path / "damaged"
    shutil.copytree(trained.folder, copy, symlinks=True)
    weights = copy / "best" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    return copy


@pytest.mark.parametrize("part", ["", "best", "last"])
def test_verify_says_yes(part: str, cli: Cli, trained: TrainedRun) -> None:
    said = cli("verify", trained.folder / part, "--json")
    assert (said.code, said.err) == (0, "")
    report = json.loads(said.out)
    assert (report["ok"], report["problems"]) == (True, [])
    kept = len(list((trained.folder / "checkpoints").iterdir()))
    assert len(report["checkpoints"]) == (1 if part else kept)


def test_verify_says_no(cli: Cli, damaged: Path) -> None:
    said = cli("verify", damaged)
    assert (said.code, said.err) == (1, "")
    assert "model.safetensors: its sha256 is not the manifest's" in said.out
    assert said.out.endswith("problems: 1\n")
    report = json.loads(cli("verify", damaged, "--json").out)
    assert report["ok"] is False and len(report["problems"]) == 1


def test_eval_refuses_a_damaged_checkpoint(cli: Cli, damaged: Path) -> None:
    assert_refused(cli("eval", damaged), "model.safetensors", "sha256", "asge-zoo train --resume")


@pytest.mark.parametrize("works", [True, False])
def test_doctor(works: bool, cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = doctor.Check("torch.compile", "ok" if works else "fail", "tried", "" if works else "install g++")
    monkeypatch.setattr(doctor, "_compiler", lambda: finding)
    said = cli("doctor", "--json")
    assert (said.code, said.err) == (0 if works else 1, "")
    report = json.loads(said.out)
    checks = {check["name"]: check for check in report["checks"]}
    assert report["ok"] is works
    assert {"torch", "torchvision", "device cpu", "threads", "torch.compile", "data digits", "data mnist"} <= set(
        checks
    )
    assert checks["data digits"]["status"] == "ok" and checks["data mnist"]["status"] == "miss"
    assert all(check["remedy"] for check in report["checks"] if check["status"] != "ok")
    plain = cli("doctor")
    assert plain.code == said.code
    assert len(plain.out.splitlines()) == len(checks)


@pytest.mark.compile
def test_doctor_tries_the_compiler(cli: Cli, here: Path) -> None:
    said = cli("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(said.out)["checks"]}
    assert (checks["torch.compile"]["status"], said.code) == ("ok", 0), checks["torch.compile"]


# compare


def test_compare_puts_runs_side_by_side(cli: Cli, trained: TrainedRun, tmp_path: Path) -> None:
    untested = Path(shutil.copytree(trained.folder, tmp_path / "untested", symlinks=True))
    (untested / "result.json").unlink()
    tested, open_ = json.loads(cli("compare", trained.folder, untested, "--json").out)
    assert tested["unit_test_accuracy"] == trained.result.unit_test_accuracy
    assert (tested["test_accuracy"], tested["rule"]["kind"]) == (trained.result.test_accuracy, "asge")
    assert open_["test_accuracy"] is None and open_["unit_accuracy"] == tested["unit_accuracy"]
    assert tested["validation_accuracy"] == trained.result.val_accuracy
    lines = cli("compare", trained.folder, untested).out.splitlines()
    unit = next(line for line in lines if line.startswith("unit 7"))
    assert f"{tested['unit_test_accuracy'][6]:.2f} %" in unit and f"{open_['unit_accuracy'][6]:.2f} %" in unit


def test_compare_needs_no_plugin(cli: Cli, trained: TrainedRun, tmp_path: Path) -> None:
    """What a checkpoint came to is shown where it can't be loaded."""
    folder = Path(shutil.copytree(trained.folder, tmp_path / "run", symlinks=True))
    spec = json.loads((folder / "spec.json").read_text())
    (folder / "spec.json").write_text(json.dumps({**spec, "rule": {"kind": "acme.none"}}))
    said = cli("compare", folder)
    assert said.code == 0 and "acme.none" in said.out


@pytest.mark.parametrize(
    ("name", "content"), [("spec.json", None), ("spec.json", "[]"), ("metrics.jsonl", "{"), ("metrics.jsonl", "")]
)
def test_compare_refuses_what_is_no_run(
    name: str, content: str | None, cli: Cli, trained: TrainedRun, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trained.folder, tmp_path / "run", symlinks=True))
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    assert_refused(cli("compare", trained.folder, folder), str(folder))
