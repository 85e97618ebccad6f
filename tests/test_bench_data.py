"""`asge-zoo bench --data`: both loaders on the same pictures."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Said
from pictures import make_folder

Cli = Callable[..., Said]
needs_ffcv = pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="ffcv is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")


@needs_ffcv
def test_both_loaders_are_timed_at_every_size(cli: Cli, tmp_path: Path) -> None:
    make_folder(tmp_path / "pictures", classes=2, per_class=160)
    where = ["bench", "--data", tmp_path / "pictures", "--workers", "1", "--rounds", "2", "--device", "cpu"]
    said = cli(*where, "--size", "32", "--size", "48", "--json")
    assert (said.code, said.err) == (0, "")
    found = json.loads(said.out)
    assert list(found["sizes"]) == ["32", "48"]
    assert found["loaders"] == {name: found["sizes"]["32"][name] for name in ("ffcv", "torch")}
    assert (found["pictures"], found["workers"], found["rounds"]) == (320, 1, 2)
    assert found["versions"]["ffcv"] and found["cpus"] >= 1 and found["device"]
    for measured in found["sizes"].values():
        for name in ("ffcv", "torch"):
            pace = measured[name]
            assert 0 < pace["lowest"] <= pace["images_per_second"] <= pace["highest"]
        assert measured["ratio"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures"]


@needs_ffcv
def test_too_few_pictures_are_one_line(cli: Cli, tmp_path: Path) -> None:
    make_folder(tmp_path, classes=2, per_class=2)
    said = cli("bench", "--data", tmp_path)
    assert (said.code, said.out, len(said.err.splitlines())) == (2, "", 1)
    assert "has 4 pictures, and" in said.err


@needs_ffcv
def test_no_pictures_are_one_line(cli: Cli, tmp_path: Path) -> None:
    said = cli("bench", "--data", tmp_path / "nowhere")
    assert (said.code, said.out, len(said.err.splitlines())) == (2, "", 1)
    assert f"{tmp_path / 'nowhere'}: no such folder" in said.err


def test_it_wants_to_know_what_to_measure(cli: Cli) -> None:
    said = cli("bench")
    assert said.code == 2 and "--data" in said.err
