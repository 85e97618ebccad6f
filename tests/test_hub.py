"""Models go to the Hub and come back the same, by the command line alone."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import olah
import pytest
import torch
from conftest import Said, TrainedRun, torch_threads, without_pictures
from hub_cli import PROCESSES, User, all_bytes, model_files, new_hub, together
from hub_server import Hub, running
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image
from tiny import TINY

from asge_zoo import load
from asge_zoo.engine.run_dir import ENVIRONMENT
from asge_zoo.engine.train import train
from asge_zoo.hub.models import described, load_model
from asge_zoo.hub.published import FILES, check_published, hub_folder
from asge_zoo.spec import load_spec

pytestmark = pytest.mark.usefixtures("one_thread")

DIGIT = Path(__file__).with_name("digit.png")
RESNET = {"kind": "timm", "name": "resnet18", "cut": "conv", "width": 0.05, "stem": "cifar", "norm_weight": 0.2}
# What the tiny spec is changed to; "fusion" is the run that all tests share.
SPECS: dict[str, dict[str, Any]] = {
    "last": {"prediction": {"kind": "last", "lr": 0.005}},
    "best": {"prediction": {"kind": "best"}},
    "timm": {"backbone": RESNET},
    "plugin": {"pooling": {"kind": "lp.pool", "learnable": True}, "prediction": {"kind": "vote.weighted"}},
}
MODELS = ("fusion", *SPECS)
# Pushes of what has been pushed, or to where something is, or of what can't be.
PUSHES: dict[str, tuple[str, ...]] = {
    "again": ("fusion", "owner/fusion"),
    "to a branch": ("best", "owner/fusion", "--revision", "try/one", "--no-eval"),
    "to a private": ("best", "owner/secret", "--private", "--no-eval"),
    "to a public": ("best", "owner/last", "--private", "--no-eval"),
    "proposed": ("best", "owner/last", "--create-pr", "--no-eval"),
    "unfinished": ("unfinished", "owner/unfinished"),
}
# Runs that can't be pushed, and why.
UNFIT = {
    "better": ["7.22 % of 360 test images", "result.json says 7.42 %"],
    "unfinished": ["is not finished", "asge-zoo train --resume"],
    "fusion/best": ["is a checkpoint", "name the run directory"],
    "seeds": ["seed-"],
}


class Trip(NamedTuple):
    """What push and eval of a model reported, and where in the cache it lies."""

    pushed: dict[str, Any]
    folder: Path
    measured: dict[str, Any]


@pytest.fixture(scope="module")
def runs(trained: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished runs, and of some that are not."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(trained.folder, folder / "fusion", symlinks=True)
    with torch_threads(1), without_pictures():
        for name, changes in SPECS.items():
            train(load_spec({**TINY, "name": name, **changes}), run_dir=folder / name, device="cpu")
    for name in ("better", "unfinished", "seeds/seed-0"):
        shutil.copytree(folder / "last", folder / name, symlinks=True)
    result = json.loads((folder / "better" / "result.json").read_text())
    result["test_accuracy"] += 0.2
    (folder / "better" / "result.json").write_text(json.dumps(result))
    (folder / "unfinished" / "result.json").unlink()
    shutil.copy(folder / "last" / "spec.json", folder / "seeds" / "spec.json")
    return folder


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running(new_hub()) as hub:
        yield hub


@pytest.fixture(scope="module")
def owner(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> User:
    """Who pushes."""
    return User(hub.url, tmp_path_factory.mktemp("owner"))


@pytest.fixture(scope="module")
def reader(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> User:
    """Who pulls, without a token, into a cache that is empty at first."""
    return User(hub.url, tmp_path_factory.mktemp("reader"), token=None)


@pytest.fixture(scope="module")
def trips(runs: Path, owner: User, reader: User) -> dict[str, Trip]:
    """All models, to the Hub and back."""

    def travel(name: str) -> Trip:
        pushed = owner.json("push", runs / name, f"owner/{name}")
        cache = reader.place / "home" / "hub" / f"models--owner--{name}"
        folder = cache / "snapshots" / pushed["revision"]
        if name == "fusion":
            pulled = reader.json("pull", f"owner/{name}")
            assert pulled == {"path": str(folder), "revision": pushed["revision"]}
            return Trip(pushed, folder, reader.json("eval", pulled["path"]))
        return Trip(pushed, folder, reader.json("eval", f"owner/{name}"))  # which pulls it

    with ThreadPoolExecutor(PROCESSES) as pool:
        return dict(zip(MODELS, pool.map(travel, MODELS), strict=True))


@pytest.fixture(scope="module")
def push(trips: dict[str, Trip], runs: Path, owner: User) -> Iterator[Callable[[str], Said]]:
    """What one of `PUSHES` said; they are all under way from the first time on that one is asked for."""
    with ThreadPoolExecutor(PROCESSES) as pool:
        under_way: dict[str, Future[Said]] = {
            name: pool.submit(owner, "push", runs / run, *line, "--json") for name, (run, *line) in PUSHES.items()
        }
        yield lambda name: under_way[name].result()


def refused(said: Said, *words: str) -> bool:
    """Whether it is one line on stderr that holds these words, and exit code 2."""
    line = said.err.startswith("asge-zoo: ") and said.err.count("\n") == 1
    return (said.code, said.out) == (2, "") and line and all(word in said.err for word in words)


def downloads(hub: Hub, since: int, repo_id: str) -> list[str]:
    """The files that were fetched since, by what the Hub calls them."""
    kinds = ("/cdn/", f"/{repo_id}/resolve/")
    fetched = [each.path for each in hub.log[since:] if each.method == "GET" and each.sent]
    return [path for path in fetched if path.startswith(kinds)]


# There and back.


@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip(name: str, trips: dict[str, Trip], hub: Hub, runs: Path) -> None:
    pushed, folder, measured = trips[name]
    commit = hub.commits(f"owner/{name}")[0]
    assert pushed == {
        "repo_id": f"owner/{name}",
        "revision": commit,
        "url": f"{hub.url}/owner/{name}/commit/{commit}",
    }
    assert all_bytes(folder) == model_files(hub, f"owner/{name}")

    result = json.loads((runs / name / "result.json").read_text())
    there, here = load(folder), load(runs / name)
    assert (measured["accuracy"], measured["count"]) == (result["test_accuracy"], 360)
    assert measured["unit_accuracy"] == result["unit_test_accuracy"][: len(there.units)]
    data = load_model(runs / name).dataset()
    for images, _ in data.loader(Path(), seed=0, device=torch.device("cpu")).split_batches("test"):
        with torch.no_grad():
            assert torch.equal(there(images), here(images))


def test_a_best_prediction_is_cut_behind_its_unit(trips: dict[str, Trip], runs: Path) -> None:
    folder = trips["best"].folder
    whole, cut = load(runs / "best"), load(folder)
    chosen = int(whole.head.state_dict()["unit"])
    assert len(cut.units) == chosen + 1 < len(whole.units)
    assert json.loads((folder / "config.json").read_text())["units"] == chosen + 1
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (len(metrics["units"]), metrics["trained_units"]) == (chosen + 1, len(whole.units))
    assert f"{chosen + 1} units of the {len(whole.units)} it was trained with" in (folder / "README.md").read_text()


def test_a_plugins_model_without_the_plugin(trips: dict[str, Trip], reader: User) -> None:
    said = reader("pull", "owner/plugin", environment={"ASGE_ZOO_PLUGINS": "none"})
    assert refused(said, "unknown pooling 'lp.pool'; it comes with asge-zoo-lp-pool: pip install 'asge-zoo-lp-pool==")


# What is pushed where.


def test_the_same_again_makes_no_commit(push: Callable[[str], Said], trips: dict[str, Trip], hub: Hub) -> None:
    said = push("again")
    assert (said.code, json.loads(said.out)) == (0, trips["fusion"].pushed)
    assert len(hub.commits("owner/fusion")) == 2
    assert len([each for each in hub.log if each.path == "/api/models/owner/fusion/commit/main"]) == 1


def test_to_a_branch(push: Callable[[str], Said], trips: dict[str, Trip], hub: Hub) -> None:
    said = push("to a branch")
    commit = hub.commits("owner/fusion", "try/one")[0]
    assert (said.code, json.loads(said.out)["revision"]) == (0, commit)
    assert hub.commits("owner/fusion", "try/one")[1:] == [
        trips["fusion"].pushed["revision"],
        hub.commits("owner/fusion")[1],
    ]
    there = model_files(hub, "owner/fusion", "try/one")
    assert json.loads(there["config.json"])["spec"]["name"] == "best"
    assert there.keys() == set(FILES) - {"curves.png", "units.png"}, "pictures of another run's are left"


def test_to_a_private_repository(push: Callable[[str], Said], hub: Hub) -> None:
    assert push("to a private").code == 0
    assert hub.repositories["owner/secret"].private and len(hub.commits("owner/secret")) == 2
    assert refused(push("to a public"), "owner/last: exists and is public", "--private")
    assert not hub.repositories["owner/last"].private and len(hub.commits("owner/last")) == 2


def test_as_a_pull_request(push: Callable[[str], Said], trips: dict[str, Trip], hub: Hub) -> None:
    said = push("proposed")
    proposal = hub.commits("owner/last", "refs/pr/1")[0]
    assert json.loads(said.out) == {
        "repo_id": "owner/last",
        "revision": proposal,
        "url": f"{hub.url}/owner/last/discussions/1",
    }
    assert hub.commits("owner/last")[0] == trips["last"].pushed["revision"] != proposal
    assert json.loads(hub.files("owner/last", "refs/pr/1")["config.json"])["spec"]["name"] == "best"


def test_a_card_without_a_measurement_says_so(push: Callable[[str], Said], hub: Hub) -> None:
    assert push("to a private").code == 0
    files = hub.files("owner/secret")
    card = files["README.md"].decode()
    assert "**Not measured**" in card and "model-index" not in card
    assert json.loads(files["metrics.json"])["test"] is None


def test_a_dry_run_asks_nobody(runs: Path, tmp_path: Path, cli: Callable[..., Said]) -> None:
    line = ("push", runs / "best", "owner/dry", "--dry-run")
    with running(new_hub()) as hub:
        report = User(hub.url, tmp_path, token=None).json(*line, "--no-eval")
    assert hub.log == [] and hub.repositories == {}
    assert report.keys() == {"repo_id", "revision", "url", "files"}
    assert (report["repo_id"], report["revision"], report["url"]) == ("owner/dry", None, None)
    accuracy = json.loads((runs / "best" / "result.json").read_text())["test_accuracy"]
    said = cli(*line)
    assert f"{accuracy:.2f} % of 360 test images; nothing was pushed" in said.out and "owner/dry, main: " in said.out
    for name in ("model.safetensors", "config.json"):
        assert f"  {name}: {report['files'][name]:,} bytes\n" in said.out
    assert all(f"  {name}: " in said.out for name in report["files"])


@pytest.mark.parametrize("name", UNFIT)
def test_runs_that_are_not_pushed(name: str, runs: Path, cli: Callable[..., Said]) -> None:
    assert refused(cli("push", runs / name, "owner/unfit", "--dry-run"), str(runs / name), *UNFIT[name])


def test_nothing_is_created_for_a_run_that_is_not_pushed(push: Callable[[str], Said], hub: Hub) -> None:
    assert refused(push("unfinished"), *UNFIT["unfinished"])
    assert "owner/unfinished" not in hub.repositories


# What is pulled from where.


def test_by_branch_and_tag(push: Callable[[str], Said], trips: dict[str, Trip], hub: Hub, reader: User) -> None:
    commit = trips["fusion"].pushed["revision"]
    assert push("to a branch").code == 0
    hub.repositories["owner/fusion"].add_ref("tags", "v1", commit)
    before = len(hub.log)
    assert reader.json("pull", "owner/fusion", "--revision", "v1") == {
        "path": str(trips["fusion"].folder),
        "revision": commit,
    }
    assert downloads(hub, before, "owner/fusion") == [], "whole files in the cache are not fetched again"
    branch = reader.json("pull", "owner/fusion", "--revision", "try/one")
    assert branch["revision"] == hub.commits("owner/fusion", "try/one")[0]
    assert all_bytes(Path(branch["path"])) == model_files(hub, "owner/fusion", "try/one")


def test_by_commit(push: Callable[[str], Said], hub: Hub, tmp_path: Path) -> None:
    """That is no longer the newest."""
    assert push("to a private").code == 0
    first = hub.commits("owner/secret")[0]
    files = model_files(hub, "owner/secret")
    hub.put("owner/secret", {"README.md": b"# Another"})
    pulled = User(hub.url, tmp_path).json("pull", "owner/secret", "--revision", first)
    assert pulled["revision"] == first and all_bytes(Path(pulled["path"])) == files


def test_to_a_folder(trips: dict[str, Trip], hub: Hub, reader: User, cli: Callable[..., Said]) -> None:
    folder, commit = reader.folder("here") / "models" / "mine", trips["fusion"].pushed["revision"]
    assert reader.json("pull", "owner/fusion", "--to", "models/mine") == {"path": "models/mine", "revision": commit}
    files = all_bytes(folder)
    origin = json.loads(files["origin.json"])
    assert origin == {"repo_id": "owner/fusion", "revision": commit, "endpoint": hub.url}
    assert {**files, **model_files(hub, "owner/fusion")} == files
    assert files.keys() == {*FILES, "origin.json"}

    assert json.loads(cli("eval", folder, "--json", "--device", "cpu").out) == trips["fusion"].measured
    (seen,) = json.loads(cli("predict", folder, DIGIT, "--json", "--device", "cpu").out)
    assert seen.keys() == {"file", "label", "class", "probability", "exit_unit"}
    verified = json.loads(cli("verify", folder, "--json").out)
    assert verified == {"ok": True, "checkpoints": [str(folder)], "problems": []}
    assert refused(reader("pull", "owner/last", "--to", "models/mine"), "models/mine: exists already and is not empty")
    assert all_bytes(folder) == files


def test_without_the_hub(trips: dict[str, Trip], reader: User) -> None:
    gone = User("http://127.0.0.1:1", reader.place, token=None)
    offline, down = together(
        lambda: reader("pull", "owner/fusion", "--json", environment={"HF_HUB_OFFLINE": "1"}),
        lambda: gone("pull", "owner/fusion", "--json"),
    )
    for said, why in ((offline, "HF_HUB_OFFLINE is set"), (down, "the connection to http://127.0.0.1:1 failed")):
        assert (said.code, json.loads(said.out)["path"]) == (0, str(trips["fusion"].folder))
        assert said.err.startswith("asge-zoo: ") and said.err.count("\n") == 1
        assert why in said.err and "the copy in the cache is taken" in said.err


def test_a_flipped_bit_is_found_and_mended(trips: dict[str, Trip], hub: Hub, reader: User, tmp_path: Path) -> None:
    folder = trips["fusion"].folder
    copies = [User(hub.url, tmp_path / name, token=None) for name in ("online", "offline")]
    for copy in copies:
        shutil.copytree(reader.folder("home"), copy.place / "home", symlinks=True)
        for name in FILES if copy is copies[0] else ("config.json",):
            flip(copy.place / "home" / folder.relative_to(reader.folder("home")) / name)
    before = len(hub.log)
    online, offline = together(
        lambda: copies[0]("pull", "owner/fusion", "--json"),
        lambda: copies[1]("pull", "owner/fusion", environment={"HF_HUB_OFFLINE": "1"}),
    )
    assert online.code == 0 and online.err.count("\n") == 1 and "fetched again" in online.err
    assert all_bytes(Path(json.loads(online.out)["path"])) == model_files(hub, "owner/fusion")
    assert len(downloads(hub, before, "owner/fusion")) == len(FILES)
    assert (offline.code, offline.out) == (2, "")
    assert "config.json: its sha256 is not the manifest's" in offline.err.splitlines()[-1]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_any_file_is_named(name: str, trips: dict[str, Trip], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trips["fusion"].folder, tmp_path / "copy"))
    assert check_published(folder) == []
    flip(folder / name)
    assert len(check_published(folder)) == 1


def flip(file: Path) -> None:
    """Turn over a bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_from_a_server_that_is_not_ours(trips: dict[str, Trip], tmp_path: Path) -> None:
    folder = trips["fusion"].folder
    with olah.serving(folder, "owner/fusion") as url:
        pulled = User(url, tmp_path, token=None).json("pull", "owner/fusion")
    assert all_bytes(Path(pulled["path"])) == all_bytes(folder)


# What is said of it.


def test_the_card_says_what_was_measured(trips: dict[str, Trip]) -> None:
    folder = trips["fusion"].folder
    text = (folder / "README.md").read_text()
    metrics = json.loads((folder / "metrics.json").read_text())
    card = ModelCard(text)
    assert isinstance(card.data, ModelCardData)
    assert (card.data.library_name, card.data.pipeline_tag) == ("asge-zoo", "image-classification")
    assert card.data.license == "apache-2.0"
    assert card.data.eval_results is not None
    (found,) = card.data.eval_results
    test = metrics["test"]
    assert (found.metric_type, found.metric_value) == ("accuracy", test["accuracy"])
    assert test["accuracy"] == trips["fusion"].measured["accuracy"] and test["count"] == 360

    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    shown = dict(row for row in rows if row[1].endswith("%") or row[1].endswith("%**"))
    units = zip(metrics["units"], test["unit_accuracy"], strict=True)
    assert shown == {
        "**prediction** (`fusion`)": f"**{test['accuracy']:.2f} %**",
        "top 5": f"{test['top5']:.2f} %",
        **{f"unit {place}, `{name}`, alone": f"{value:.2f} %" for place, (name, value) in enumerate(units, 1)},
    }
    memory = metrics["memory"]
    assert [f"{memory['local_bytes']:,} bytes", f"{memory['backprop_bytes']:,} bytes"] in rows
    assert f"{metrics['parameters']:,} parameters in 7 units" in text
    assert f"{metrics['run']['val_accuracy']:.2f} % validation accuracy" in text
    spec = text.split("```json\n")[1].split("```")[0]
    assert load_spec(json.loads(spec)).digest() == trips["fusion"].measured["spec_sha256"]


def test_the_cards_pictures_are_there(trips: dict[str, Trip]) -> None:
    folder = trips["fusion"].folder
    text = (folder / "README.md").read_text()
    for name in ("curves.png", "units.png"):
        assert f"]({name})" in text
        with Image.open(folder / name) as picture:
            assert picture.format == "PNG"
            picture.load()
    assert "](" not in (trips["last"].folder / "README.md").read_text(), "its run has none"


def test_what_there_is(trips: dict[str, Trip], reader: User) -> None:
    rows = reader.json("ls", "models")
    index = json.loads((hub_folder() / "index.json").read_text())
    assert rows[: len(index)] == index
    assert "vgg8-mnist-quarter" in [row["model"] for row in index]
    cached = {(row["model"], row["revision"]): row["accuracy"] for row in rows[len(index) :]}
    for name, trip in trips.items():
        assert cached[f"owner/{name}", trip.pushed["revision"]] == trip.measured["accuracy"]


def test_what_there_is_names_a_digit(cli: Callable[..., Said]) -> None:
    (seen,) = json.loads(cli("predict", "vgg8-mnist-quarter", DIGIT, "--json", "--device", "cpu").out)
    assert (seen["label"], seen["class"]) == (7, "7")


def test_the_index_is_of_the_folders_beside_it() -> None:
    index = json.loads((hub_folder() / "index.json").read_text())
    folders = sorted(path for path in hub_folder().iterdir() if path.is_dir())
    assert index == [described(folder.name, None, folder) for folder in folders]


def test_the_package_says_what_it_was_trained_with(trips: dict[str, Trip], runs: Path) -> None:
    folder = trips["timm"].folder
    packages = json.loads((runs / "timm" / ENVIRONMENT).read_text())["packages"]
    assert json.loads((folder / "config.json").read_text())["versions"] == packages
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert json.loads((folder / "manifest.json").read_text())["sha256"]["model.safetensors"] == weights
