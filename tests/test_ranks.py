"""Ranks: together they do what one does, evaluate every image once, and no one waits for a dead one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from kill_and_resume import contents, differences
from pictures import make_folder
from steps_on_ranks import take_steps
from torch import Tensor

from asge_zoo.data.digits import Digits
from asge_zoo.engine.parallel import check_restart
from asge_zoo.errors import CheckpointError
from asge_zoo.ranks import ALONE, Shard
from asge_zoo.spec import load_spec

BATCH = 12
VGG: dict[str, Any] = {
    "name": "vgg",
    "data": {"kind": "digits", "validation": 180, "batch_size": BATCH},
    "backbone": {"kind": "vgg11", "width": 0.0625},
    "train": {"compile": False},
}
RESNET = {**VGG, "backbone": {"kind": "timm", "name": "resnet18", "width": 0.125, "stem": "cifar", "norm": "spec"}}
BATCH_NORM = {**RESNET, "backbone": {**RESNET["backbone"], "norm": "keep"}}
BP = {**VGG, "rule": {"kind": "bp"}, "prediction": {"kind": "last"}}
SPECS = {"vgg11": VGG, "resnet18": RESNET, "bp": BP, "batch norm": BATCH_NORM}
COMPILED = {name: {**SPECS[name], "train": {"compile": True}} for name in ("vgg11", "resnet18")}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
QUIET = {**os.environ, "OMP_NUM_THREADS": "1"}
LIMIT = 60  # seconds in which any fault must have ended the job

States = list[dict[str, Tensor]]  # weights and running statistics, by rank

FIELDS = ("train.epochs=4", "train.compile=false", "data.validation=181", "backbone.width=0.0625")
SHORT = ("vgg8_digits", *(part for field in FIELDS for part in ("--set", field)))
STEPWISE = (*SHORT, "--set", "train.checkpoint.every_steps=10")


# Equality.


def on_ranks(world_size: int, specs: dict[str, Any], folder: Path, *options: str) -> dict[str, States]:
    """What thirty steps of each spec came to; in one job, as its start takes longer than they do."""
    script = str(Path(__file__).with_name("steps_on_ranks.py"))
    line = [*TORCHRUN, f"--nproc-per-node={world_size}", script, json.dumps(specs), str(folder), *options]
    given = [*line, "--steps=30", f"--batch-size={BATCH}"]
    subprocess.run(given, check=True, timeout=500, capture_output=True, env=QUIET)
    ranks = range(world_size)
    return {name: [safetensors.torch.load_file(folder / f"{name}.{rank}") for rank in ranks] for name in specs}


@pytest.fixture(scope="module")
def doubles(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, States]]:
    """In float64, eager, by number of ranks."""
    jobs = {2: SPECS, 3: {"vgg11": VGG}}
    return {ranks: on_ranks(ranks, jobs[ranks], tmp_path_factory.mktemp("states"), "--double") for ranks in jobs}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, States]:
    """In float32, compiled, on two ranks."""
    return on_ranks(2, COMPILED, tmp_path_factory.mktemp("states"))


def furthest(state: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of a tensor relative to its norm."""
    assert state.keys() == other.keys()
    floating = [name for name in state if state[name].is_floating_point()]
    return max(float((state[name] - other[name]).norm() / other[name].norm().clamp(min=1e-30)) for name in floating)


@pytest.mark.parametrize(("name", "world_size"), [("vgg11", 2), ("vgg11", 3), ("resnet18", 2), ("bp", 2)])
def test_ranks_equal_one_rank(name: str, world_size: int, doubles: dict[int, dict[str, States]]) -> None:
    """In float64, eager; the ranks themselves agree bitwise."""
    states = doubles[world_size][name]
    alone = take_steps(load_spec(SPECS[name]), steps=30, batch_size=BATCH, double=True, shards=[ALONE])
    assert furthest(states[0], alone) < 1e-10
    for state in states[1:]:
        assert all(torch.equal(state[name], states[0][name]) for name in state)


def test_batch_norm_stays_per_rank_and_running_statistics_are_their_mean(doubles: dict[int, dict[str, States]]) -> None:
    """Two ranks equal the mean over the same half batches in one process."""
    states = doubles[2]["batch norm"]
    halves = [Shard(0, 2), Shard(1, 2)]
    alone = take_steps(load_spec(BATCH_NORM), steps=30, batch_size=BATCH, double=True, shards=halves)
    assert furthest(states[0], alone) < 1e-10 and furthest(states[1], alone) < 1e-10
    assert any("running_mean" in name for name in alone)


@pytest.mark.compile
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_ranks_equal_one_rank(name: str, compiled: dict[str, States]) -> None:
    """In float32; the reduction is part of the graph: `fullgraph=True` would refuse to leave it out."""
    states = compiled[name]
    alone = take_steps(load_spec(COMPILED[name]), steps=30, batch_size=BATCH, double=False, shards=[ALONE])
    assert furthest(states[0], alone) < 1e-5 and furthest(states[1], states[0]) == 0


# Whole runs.


def train_line(run_dir: Path, *arguments: str) -> list[str]:
    """A command line that trains."""
    return [sys.executable, "-m", "asge_zoo", "train", *arguments, "--run-dir", str(run_dir)]


def ended(run_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A run from its start to its end."""
    return subprocess.run(train_line(run_dir, *arguments), capture_output=True, text=True, timeout=300, env=QUIET)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run on two ranks. Not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = ended(folder, *STEPWISE, "--nproc", "2")
    assert (done.returncode, done.stderr) == (0, "")
    return folder


@contextlib.contextmanager
def under_way(line: list[str], run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """A job whose first epoch is done; killed in the end, if it is still there."""
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=QUIET) as job:
        try:
            while not (run_dir / "metrics.jsonl").exists():
                assert job.poll() is None, job.stderr and job.stderr.read()
                time.sleep(0.05)
            yield job
        finally:
            job.kill()


def rank_of(job: subprocess.Popen[str], rank: int) -> int:
    """The process of a rank that a launcher started."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    return next(int(c) for c in children if f"\0RANK={rank}\0" in f"\0{Path(f'/proc/{c}/environ').read_text()}")


def assert_same_run(one: Path, other: Path) -> None:
    """Bitwise the same weights, moments, chosen checkpoint and metrics, times apart."""
    assert differences(contents(one), contents(other)) == []


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_image_counts_once(world_size: int, whole: Path, tmp_path: Path) -> None:
    """Neither 181 validation nor 360 test images fill equal shards for all of these."""
    done = ended(tmp_path / "run", *SHORT, "--nproc", str(world_size), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(record["train"]["count"], record["validation"]["count"]) for record in records] == [(1248, 181)] * 4
    expected = json.loads((whole / "result.json").read_text())
    found = json.loads(done.stdout)
    right = found["test_accuracy"] * 3.6  # of 360 images: whole, where none is missing or counted twice
    assert right == pytest.approx(round(right)) and abs(found["test_accuracy"] - expected["test_accuracy"]) < 1


def test_shards_hold_every_image_once() -> None:
    for world_size in (1, 2, 3, 7):
        shards = [Shard(rank, world_size) for rank in range(world_size)]
        loaders = [Digits().loader(Path(), seed=0, device=torch.device("cpu"), shard=shard) for shard in shards]
        for split, count in (("validation", 180), ("test", 360)):
            found = [sum(len(labels) for _, labels in loader.split_batches(split)) for loader in loaders]
            assert sum(found) == count and found == [shard.size(count) for shard in shards]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_job(rank: int, whole: Path, tmp_path: Path) -> None:
    """And the resumed run is exact; once is enough of that."""
    run_dir = tmp_path / "run"
    with under_way(train_line(run_dir, *STEPWISE, "--nproc", "2"), run_dir) as job:
        os.kill(rank_of(job, rank), signal.SIGKILL)
        out, err = job.communicate(timeout=LIMIT)
    said = f"asge-zoo: rank {rank} was killed by SIGKILL, perhaps for want of memory; go on with the same command and"
    assert (job.returncode, out) == (2, "") and err.startswith(said) and err.count("\n") == 1
    if rank == 0:
        assert ended(run_dir, *STEPWISE, "--nproc", "2", "--resume").returncode == 0
        assert_same_run(run_dir, whole)


def test_a_rank_ended_within_a_step_says_nothing() -> None:
    """Nor does torch, of collectives that nobody waits for any more."""
    code = """
import torch.distributed as dist
import torch.distributed._functional_collectives
from asge_zoo.cli.main import cli, main

@cli.command
def step():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    pending = torch.ops._c10d_functional.all_reduce(torch.ones(2), "sum", dist.group.WORLD.group_name)
    raise SystemExit(143)

main()
"""
    line = [sys.executable, "-c", code, "step"]
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "job"}
    done = subprocess.run(line, capture_output=True, text=True, timeout=LIMIT, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "")


def test_all_ranks_killed_during_a_checkpoint(whole: Path, tmp_path: Path) -> None:
    """The launcher first, so that nobody ends the ranks gently."""
    run_dir = tmp_path / "run"
    with under_way(train_line(run_dir, *STEPWISE, "--nproc", "2"), run_dir) as job:
        ranks = [rank_of(job, rank) for rank in (0, 1)]
        while not list((run_dir / "checkpoints").glob(".tmp-*")):
            time.sleep(0)
        job.kill()
        for process in ranks:
            os.kill(process, signal.SIGKILL)
    assert ended(run_dir, *STEPWISE, "--nproc", "2", "--resume").returncode == 0
    assert_same_run(run_dir, whole)


def test_torchrun_restarts_and_goes_on(whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    line = [*TORCHRUN, "--nproc-per-node=2", "--max-restarts=1", *train_line(run_dir, *STEPWISE)[1:]]
    with under_way(line, run_dir) as job:
        os.kill(rank_of(job, 1), signal.SIGKILL)
        _, err = job.communicate(timeout=2 * LIMIT)
    assert job.returncode == 0, err
    assert_same_run(run_dir, whole)


def test_a_restart_must_know_where_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not check_restart(None)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this")
    for job, resumed in (("this", True), ("another", False)):
        (tmp_path / "environment.json").write_text(json.dumps({"job": job}))
        assert check_restart(tmp_path) is resumed
    with pytest.raises(CheckpointError, match="--run-dir"):
        check_restart(None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_stops_all_ranks(number: signal.Signals, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with under_way(train_line(run_dir, *STEPWISE, "--nproc", "2"), run_dir) as job:
        job.send_signal(number)
        _, err = job.communicate(timeout=LIMIT)
    assert job.returncode == 128 + number
    assert err.startswith(f"asge-zoo: stopped by {number.name}, its state saved as epoch-") and err.count("\n") == 1
    assert err.endswith("--resume --nproc 2`\n")


def test_a_time_limit_saves_and_another_number_of_ranks_goes_on(whole: Path, tmp_path: Path) -> None:
    """Exactly as the same number would but for the order in which gradients are added."""
    run_dir = tmp_path / "run"
    done = ended(run_dir, *STEPWISE, "--nproc", "2", "--time-limit", "0")
    assert done.returncode == 138 and "its state saved as epoch-0000-step-000001" in done.stderr
    done = ended(run_dir, *STEPWISE, "--resume")
    assert done.returncode == 0 and "world_size than it began with" in done.stderr
    one, two = (safetensors.torch.load_file(folder / "last" / "model.safetensors") for folder in (run_dir, whole))
    assert furthest(one, two) < 1e-3


def test_a_restart_does_not_undo_a_stop(tmp_path: Path) -> None:
    line = [*TORCHRUN, "--nproc-per-node=2", "--max-restarts=1", *train_line(tmp_path / "run", *STEPWISE)[1:]]
    done = subprocess.run([*line, "--time-limit=0"], capture_output=True, text=True, timeout=LIMIT, env=QUIET)
    said = [line for line in done.stderr.splitlines() if line.startswith("asge-zoo:")]
    assert done.returncode == 1 and len(said) == 2, done.stderr
    assert said[1].startswith("asge-zoo: stopped before this restart") and (tmp_path / "run" / "stopped").exists()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["epoch-0000-step-000001"]


def test_a_rank_without_images_counts_for_nothing(tmp_path: Path) -> None:
    """Two images to validate on, three ranks: no; one to test on: yes."""
    make_folder(tmp_path / "images" / "train", classes=2, per_class=10, sizes=(20, 40))
    spec = {**VGG, "data": {"kind": "imagefolder", "folder": "images", "classes": 2, "size": 16, "loader": "torch"}}
    spec["data"] |= {"validation": 4, "test": 1, "batch_size": 4, "workers": 0}
    spec["train"] = {"compile": False, "epochs": 1}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    done = ended(tmp_path / "run", str(tmp_path / "spec.json"), "--data-root", str(tmp_path), "--nproc", "2", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["test_accuracy"] in (0.0, 100.0)


def test_ranks_that_read_other_images_are_refused(tmp_path: Path) -> None:
    for rank, per_class in enumerate((10, 12)):
        make_folder(tmp_path / str(rank) / "images" / "train", classes=2, per_class=per_class, sizes=(20, 40))
    fields = ("folder=images", "classes=2", "size=16", "loader=torch", "validation=4", "test=2", "batch_size=4")
    sets = [part for field in fields for part in ("--set", f"data.{field}")]
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys\nfrom asge_zoo.cli.main import run\n"
        f"line = ['train', 'vgg8_digits', '--set', 'data.kind=imagefolder', *{sets!r}]\n"
        f"line += ['--set', 'data.workers=0', '--run-dir', {str(tmp_path / 'run')!r}]\n"
        f"sys.exit(run([*line, '--data-root', os.path.join({str(tmp_path)!r}, os.environ['RANK'])]))\n"
    )
    done = subprocess.run(
        [*TORCHRUN, "--nproc-per-node=2", str(script)], capture_output=True, text=True, timeout=LIMIT, env=QUIET
    )
    said = [line for line in done.stderr.splitlines() if line.startswith("asge-zoo:")]
    assert len(said) == 1 and "24 images" in said[0] and "give all machines the same" in said[0], done.stderr


def test_slurm_says_when_its_time_ends(tmp_path: Path) -> None:
    environment = {**QUIET, "SLURM_JOB_END_TIME": str(int(time.time()) + 100)}  # less than the margin before it
    line = train_line(tmp_path / "run", *SHORT)
    done = subprocess.run(line, capture_output=True, text=True, timeout=LIMIT, env=environment)
    assert done.returncode == 138 and "its state saved as epoch-0000-step-000001" in done.stderr


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("train.epochz=1", "train.epochz: unknown key"),
        ("data.batch_size=1", "data.batch_size: 1 is fewer than the 2 ranks"),
        ("optimizer.lr=1e20", "is not finite in epoch 1"),
    ],
)
def test_what_is_wrong_is_said_once(overrides: str, said: str, tmp_path: Path) -> None:
    done = ended(tmp_path / "run", *SHORT, "--set", overrides, "--nproc", "2")
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_rank_alone_in_its_trouble_says_so(tmp_path: Path) -> None:
    """The second rank does not see the run directory of the first."""
    (tmp_path / "elsewhere").mkdir()
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys\nfrom asge_zoo.cli.main import run\n"
        f"os.chdir({str(tmp_path / 'elsewhere')!r} if os.environ['RANK'] == '1' else {str(tmp_path)!r})\n"
        f"sys.exit(run(['train', *{list(STEPWISE)!r}, '--run-dir', 'run', *sys.argv[1:]]))\n"
    )
    line = [*TORCHRUN, "--nproc-per-node=2", str(script), "--resume"]
    assert ended(tmp_path / "run", *STEPWISE, "--time-limit", "0").returncode == 138
    done = subprocess.run(line, capture_output=True, text=True, timeout=LIMIT, env=QUIET)
    said = [line for line in done.stderr.splitlines() if line.startswith("asge-zoo:")]
    assert done.returncode == 1 and len(said) == 1, done.stderr
    assert "rank 1 on " in said[0] and "is not seen by" in said[0]


def test_ranks_that_differ_are_refused(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys\nfrom asge_zoo.cli.main import run\n"
        f"line = ['train', *{list(SHORT)!r}, '--run-dir', {str(tmp_path / 'run')!r}]\n"
        "sys.exit(run([*line, '--set', 'train.seed=' + os.environ['RANK']]))\n"
    )
    done = subprocess.run(
        [*TORCHRUN, "--nproc-per-node=2", str(script)], capture_output=True, text=True, timeout=LIMIT, env=QUIET
    )
    said = [line for line in done.stderr.splitlines() if line.startswith("asge-zoo:")]
    assert len(said) == 1 and "rank 1 on " in said[0] and "install the same on all machines" in said[0]
    assert not (tmp_path / "run").exists()
