"""ImageNet, from pictures to a tested checkpoint: written, verified, trained by both loaders, broken, gone on with.

The pictures are made here, one for each of ImageNet's classes.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import Said
from kill_and_resume import contents, differences
from pictures import make_folder

from asge_zoo.data.beton import open_beton
from asge_zoo.data.folder import ImageNet

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="needs ffcv: pip install 'asge-zoo[ffcv]'"),
]

Cli = Callable[..., Said]
FIELDS = ("data.size=16", "backbone.width=0.0625", "train.compile=false", "train.checkpoint.every_steps=5")
SAMPLE = ("vgg11_imagenet_sample", *(part for field in FIELDS for part in ("--set", field)))
FFCV = ("--set", "data.loader=ffcv")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with a picture of each of ImageNet's classes, and a .beton of them. Not to be changed."""
    root = tmp_path_factory.mktemp("data")
    train = make_folder(root / "imagenet_sample" / "train", classes=1000, per_class=1, sizes=(20, 40))
    made = sorted(train.iterdir())
    for folder, wordnet_id in zip(made, ImageNet().folder_names(), strict=True):
        folder.rename(train / wordnet_id)
    line = ["data", "write", "imagenet", "--from", str(train), "--to", f"{train}.beton", "--json"]
    done = subprocess.run([sys.executable, "-m", "asge_zoo", *line], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr, json.loads(done.stdout)["count"]) == (0, "", 1000)
    return root


@pytest.fixture
def own_root(root: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(root, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run by ffcv. Not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = subprocess.run(train_line(root, folder, *FFCV), capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def train_line(root: Path, run_dir: Path, *options: str) -> list[str]:
    """A command line that trains the sample's spec, made small."""
    line = ["train", *SAMPLE, "--data-root", str(root), "--run-dir", str(run_dir), *options]
    return [sys.executable, "-m", "asge_zoo", *line]


def test_a_written_file_is_whole(root: Path, cli: Cli) -> None:
    assert cli("data", "verify", root / "imagenet_sample" / "train.beton").code == 0


def test_both_loaders_train_to_the_end(root: Path, whole: Path, tmp_path: Path, cli: Cli) -> None:
    """And say which of them it was: ffcv where it can be, if nothing else is asked for."""
    said = cli(*train_line(root, tmp_path / "torch", "--set", "data.loader=torch")[3:])
    assert said.code == 0, said.err
    ffcv, torchs = "ffcv (imagenet_sample/train.beton, 1,000 images)", "torch (imagenet_sample/train, 1,000 images)"
    for folder, reader in ((whole, ffcv), (tmp_path / "torch", torchs)):
        assert json.loads((folder / "environment.json").read_text())["loader"].startswith(reader)
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [(each["train"]["count"], each["validation"]["count"]) for each in records] == [(800, 100)] * 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_damaged_picture_stops_it_and_the_mended_run_is_exact(
    ranks: int, own_root: Path, whole: Path, tmp_path: Path
) -> None:
    """On one rank bitwise; a second one changes the order in which gradients are added."""
    file, run_dir = own_root / "imagenet_sample" / "train.beton", tmp_path / "run"
    sound, index = file.read_bytes(), open_beton(file)
    sample = 123
    damaged = bytearray(sound)
    damaged[index.offsets[sample] + index.sizes[sample] // 2] ^= 1
    file.write_bytes(damaged)
    line = train_line(own_root, run_dir, *FFCV, "--nproc", str(ranks))
    started = time.monotonic()
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert index.files[sample] in done.stderr and time.monotonic() - started < 60
    file.write_bytes(sound)
    done = subprocess.run([*line, "--resume"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0
    if ranks == 1:
        assert differences(contents(run_dir), contents(whole)) == []


def test_killed_in_mid_epoch_it_goes_on_exactly_with_another_number_of_workers(
    root: Path, whole: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with subprocess.Popen(train_line(root, run_dir, *FFCV), stderr=subprocess.PIPE) as job:
        while not list(run_dir.glob("checkpoints/epoch-*-step-*")):
            assert job.poll() is None
            time.sleep(0.01)
        os.kill(job.pid, signal.SIGKILL)
    line = train_line(root, run_dir, *FFCV, "--resume", "--set", "data.workers=3")
    done = subprocess.run(line, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for name in ("last/model.safetensors", "last/optimizer.safetensors", "best/model.safetensors"):
        one, other = (safetensors.torch.load_file(folder / name) for folder in (run_dir, whole))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda sound: sound[: len(sound) // 2], "train.beton"),
        (lambda sound: bytes([sound[0] ^ 1]) + sound[1:], "train.beton"),
    ],
    ids=["cut short", "header"],
)
def test_a_file_that_is_not_whole_is_refused(
    damage: Callable[[bytes], bytes], said: str, own_root: Path, tmp_path: Path, cli: Cli
) -> None:
    file = own_root / "imagenet_sample" / "train.beton"
    file.write_bytes(damage(file.read_bytes()))
    refused: Any = cli(*train_line(own_root, tmp_path / "run", *FFCV)[3:])
    assert refused.code == 2 and said in refused.err and refused.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_picture_that_is_none_in_the_folder(own_root: Path, tmp_path: Path, cli: Cli) -> None:
    broken = next((own_root / "imagenet_sample" / "train").rglob("*.JPEG"))
    broken.write_bytes(broken.read_bytes()[:100])
    said = cli(*train_line(own_root, tmp_path / "run", "--set", "data.loader=torch")[3:])
    assert said.code == 2 and broken.name in said.err and said.err.count("\n") == 1
