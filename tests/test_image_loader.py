"""Pictures read as they are needed: the same batches whatever decodes them, how many decode, and where it goes on."""

import importlib.util
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pictures import make_folder
from PIL import Image
from pydantic import ValidationError

from asge_zoo.data import folder as folder_module
from asge_zoo.data.base import Batch
from asge_zoo.data.beton import manifest_path, open_beton
from asge_zoo.data.beton_writer import write_beton
from asge_zoo.data.crops import ResizedCrop, center_boxes, flips, random_boxes
from asge_zoo.data.folder import ImageFolder, ImageNet
from asge_zoo.data.found import datasets_found
from asge_zoo.data.image_loader import ImageLoader
from asge_zoo.errors import DataError, SpecError
from asge_zoo.ranks import ALONE, Shard, usable_cpus
from asge_zoo.seeding import keyed_generator
from asge_zoo.testing import Promise, promises

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
FFCV = importlib.util.find_spec("ffcv") is not None
needs_ffcv = pytest.mark.skipif(not FFCV, reason="ffcv is not installed")
LOADERS = ["torch", pytest.param("ffcv", marks=needs_ffcv)]
OPTIONS = {"folder": "pics", "classes": 3, "size": 32, "validation": 6, "batch_size": 8}
TRAIN, TEST = 42, 12


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with the folders `pics/train` and `pics/val`, and, where ffcv is installed, files of them. As is."""
    root = tmp_path_factory.mktemp("root")
    for name, per_class in (("train", TRAIN // 3), ("val", TEST // 3)):
        source = make_folder(root / "pics" / name, per_class=per_class, seed=per_class)
        if FFCV:
            write_beton(source, root / "pics" / f"{name}.beton", workers=1)
    return root


@pytest.fixture
def own_root(root: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(root, tmp_path / "root")
    return tmp_path / "root"


def load(root: Path, loader: str = "torch", *, seed: int = 0, shard: Shard = ALONE, **options: Any) -> ImageLoader:
    """The loader of `pics`, one worker if not told otherwise."""
    dataset = ImageFolder.model_validate({**OPTIONS, "workers": 1, "loader": loader, **options})
    return dataset.loader(root, seed=seed, device=CPU, shard=shard)


def epoch_and_splits(loader: ImageLoader, epoch: int = 1) -> list[Batch]:
    """All it gives."""
    return [*loader.train_batches(epoch), *loader.split_batches("validation"), *loader.split_batches("test")]


def same(some: list[Batch], others: list[Batch]) -> bool:
    """Whether two lists of batches are bitwise equal."""
    return len(some) == len(others) and all(
        torch.equal(a, b) for one, other in zip(some, others, strict=True) for a, b in zip(one, other, strict=True)
    )


def one_line(error: pytest.ExceptionInfo[Any]) -> str:
    message = str(error.value)
    assert message and "\n" not in message
    return message


# The same batches.


@pytest.mark.parametrize("loader", LOADERS)
def test_any_number_of_workers_gives_the_same(root: Path, loader: str) -> None:
    expected = epoch_and_splits(load(root, loader))
    assert [len(labels) for _, labels in expected] == [8, 8, 8, 8, 6, 12]
    for workers in (0, 2, 4):
        assert same(epoch_and_splits(load(root, loader, workers=workers)), expected)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("loader", LOADERS)
def test_ranks_together_get_what_one_gets(root: Path, loader: str, world_size: int) -> None:
    whole = epoch_and_splits(load(root, loader))
    ranks = [epoch_and_splits(load(root, loader, shard=Shard(rank, world_size))) for rank in range(world_size)]
    for rank, parts in enumerate(ranks):
        assert same(parts, [(images[rank::world_size], labels[rank::world_size]) for images, labels in whole])


@pytest.mark.parametrize("loader", LOADERS)
def test_going_on_in_mid_epoch(root: Path, loader: str) -> None:
    through = list(load(root, loader).train_batches(2))
    for start in range(5):
        assert same(list(load(root, loader).train_batches(2, start=start)), through[start:])


@pytest.mark.parametrize("loader", LOADERS)
def test_batches_are_safe_to_keep(root: Path, loader: str) -> None:
    """Nothing that comes later writes into them, and no two share memory."""
    kept, copies = [], []
    for images, labels in load(root, loader, batch_size=2, workers=2).train_batches(0):
        kept.append((images, labels))
        copies.append((images.clone(), labels.clone()))
    assert same(kept, copies)
    assert len({images.untyped_storage().data_ptr() for images, _ in kept}) == len(kept)


@pytest.mark.parametrize("loader", LOADERS)
def test_epochs_at_once_are_those_one_by_one(root: Path, loader: str) -> None:
    """Nor does torch's own generator matter, which is left as it was."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    loaded = load(root, loader)
    pairs = list(zip(loaded.train_batches(0), loaded.train_batches(1), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    for epoch in (0, 1):
        assert same([pair[epoch] for pair in pairs], list(load(root, loader).train_batches(epoch)))


@needs_ffcv
def test_both_loaders_give_the_same_but_for_the_codec(root: Path) -> None:
    """The same labels in the same order; pixels, of 0 to 255, that differ by 2 on average and by 8 in every image."""
    std = torch.tensor(ImageFolder.std)[:, None, None] * 255
    for theirs, ours in zip(*(epoch_and_splits(load(root, loader)) for loader in ("torch", "ffcv")), strict=True):
        assert torch.equal(theirs[1], ours[1])
        difference = ((theirs[0] - ours[0]) * std).abs()
        assert difference.mean() < 2
        assert difference.mean((1, 2, 3)).max() < 8


def test_pictures_are_cropped_mirrored_and_normalised_as_keyed(root: Path) -> None:
    """Each image of an epoch, of the validation and of the test, made anew from its file."""
    loader = load(root, seed=4)
    files = {name: sorted((root / "pics" / name).glob("*/*")) for name in ("train", "val")}
    order = torch.randperm(TRAIN, generator=keyed_generator(4, "validation"))
    shuffled = order[6:][torch.randperm(TRAIN - 6, generator=keyed_generator(4, "order", 3))]
    wanted = {
        "train": (loader.train_batches(3), "train", shuffled[:32].tolist(), 3),
        "validation": (loader.split_batches("validation"), "train", order[:6].tolist(), None),
        "test": (loader.split_batches("test"), "val", list(range(TEST)), None),
    }
    for batches, name, samples, epoch in wanted.values():
        given = list(batches)
        images, labels = (torch.cat(each) for each in zip(*given, strict=True))
        assert labels.tolist() == [sample // (TRAIN // 3 if name == "train" else TEST // 3) for sample in samples]
        for sample, image in zip(samples, images, strict=True):
            with Image.open(files[name][sample]) as picture:
                size = np.array([picture.height]), np.array([picture.width])
                key = np.array([sample])
                boxes = center_boxes(*size) if epoch is None else random_boxes(4, epoch, key, *size, ResizedCrop())
                top, left, height, width = boxes[0].tolist()
                box = (left, top, left + width, top + height)
                pixels = np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR, box=box)) / 255
            if epoch is not None and flips(4, epoch, key)[0]:
                pixels = pixels[:, ::-1]
            expected = (pixels - np.array(ImageFolder.mean)) / np.array(ImageFolder.std)
            np.testing.assert_allclose(image.numpy(), expected.transpose(2, 0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loader", LOADERS)
def test_without_flips_nothing_is_mirrored(root: Path, loader: str) -> None:
    """And crops stay what they were."""
    plain, mirrored = (
        torch.cat([images for images, _ in load(root, loader, augment={"flip": flip}).train_batches(0)])
        for flip in (False, True)
    )
    flipped = [torch.equal(one, other.flip(2)) for one, other in zip(plain, mirrored, strict=True)]
    kept = [torch.equal(one, other) for one, other in zip(plain, mirrored, strict=True)]
    assert all(one != other for one, other in zip(flipped, kept, strict=True))
    assert 8 < sum(flipped) < 24


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("loader", LOADERS)
def test_on_a_gpu(root: Path, loader: str) -> None:
    dataset = ImageFolder.model_validate({**OPTIONS, "workers": 2, "loader": loader})
    there = epoch_and_splits(dataset.loader(root, seed=0, device=torch.device("cuda")))
    for (images, labels), (expected, on_cpu) in zip(there, epoch_and_splits(load(root, loader)), strict=True):
        assert images.device.type == labels.device.type == "cuda"
        assert torch.equal(labels.cpu(), on_cpu)
        torch.testing.assert_close(images.cpu(), expected)


def conformance() -> list[Any]:
    """Every promise of a dataset, of both loaders, but that means and deviations are as ImageNet's."""
    options = {**OPTIONS, "workers": 1}
    return [
        pytest.param(promise, id=f"{loader} {promise}", marks=needs_ffcv if loader == "ffcv" else [])
        for loader in ("torch", "ffcv")
        for promise in promises(ImageFolder, **options, loader=loader)
        if promise.name != "normalises its images"
    ]


@pytest.mark.parametrize("promise", conformance())
def test_promises(root: Path, promise: Promise, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASGE_ZOO_DATA", str(root))
    promise.check()


# Damage.


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"no picture"])
def test_a_damaged_picture_is_named(own_root: Path, workers: int, damage: Callable[[bytes], bytes]) -> None:
    file = own_root / "pics" / "val" / "n00000001" / "img_002.JPEG"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError) as error:
        list(load(own_root, workers=workers).split_batches("test"))
    assert one_line(error).startswith(f"{file}: can't be read as an image (")


@needs_ffcv
@pytest.mark.parametrize("sample", [0, 7, TEST - 1])
def test_a_flipped_byte_in_a_file_is_named(own_root: Path, sample: int) -> None:
    path = own_root / "pics" / "val.beton"
    beton = open_beton(path)
    with open(path, "r+b") as file:
        file.seek(int(beton.offsets[sample] + beton.sizes[sample] // 2))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(DataError) as error:
        list(load(own_root, "ffcv", workers=2).split_batches("test"))
    assert f"{path}: image {sample} ({beton.files[sample]}) is damaged" in one_line(error)


@needs_ffcv
def test_a_file_cut_short_while_it_is_read(own_root: Path) -> None:
    loader = load(own_root, "ffcv")
    os.truncate(own_root / "pics" / "val.beton", 1 << 12)
    with pytest.raises(DataError, match="image 0 .* is damaged"):
        list(loader.split_batches("test"))


@needs_ffcv
def test_what_the_decoder_refuses_is_named(root: Path) -> None:
    """A JPEG that was broken before it was summed."""
    loader = load(root, "ffcv")
    source: Any = loader._splits["test"].source
    source._library = SimpleNamespace(imdecode=lambda *_: -1, resize_crop=source._library.resize_crop)
    with pytest.raises(DataError, match=r"val.beton: image \d+ \(n0.*\) is damaged: it is no sound JPEG"):
        list(loader.split_batches("test"))


@needs_ffcv
def test_whatever_a_thread_raises_arrives(root: Path) -> None:
    loader = load(root, "ffcv", workers=2)
    source: Any = loader._splits["test"].source

    def fails(*_: Any) -> None:
        raise MemoryError("no more")

    source._library = SimpleNamespace(imdecode=fails, resize_crop=fails)
    with pytest.raises(MemoryError, match="no more"):
        list(loader.split_batches("test"))


def test_a_killed_worker_is_an_error_within_seconds(root: Path) -> None:
    batches = load(root, workers=2, batch_size=1).train_batches(0)
    next(batches)
    handler = signal.getsignal(signal.SIGCHLD)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid or 0, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(DataError) as error:
        list(batches)
    assert time.monotonic() - start < 20
    assert "died" in one_line(error) and "set data.workers to fewer than 2" in one_line(error)
    assert signal.getsignal(signal.SIGCHLD) is handler


# Threads and processes.


def test_workers_end_with_what_they_work_for(root: Path) -> None:
    """An epoch that is left in the middle leaves no process behind, by `close` or by being forgotten."""
    batches = load(root, workers=2).train_batches(0)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert not multiprocessing.active_children()
    assert len(list(islice(load(root, workers=2).train_batches(0), 1))) == 1
    assert not multiprocessing.active_children()


@needs_ffcv
def test_threads_end_with_their_loader(root: Path) -> None:
    before = threading.active_count()
    loader = load(root, "ffcv", workers=3)
    assert len(list(islice(loader.train_batches(0), 2))) == 2
    assert threading.active_count() > before
    del loader
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


@pytest.mark.parametrize("loader", LOADERS)
def test_many_loaders_leave_no_noise_and_torchs_threads_alone(root: Path, loader: str) -> None:
    """In a process of its own, which ends in the middle of an epoch."""
    script = f"""
        from pathlib import Path
        import torch
        torch.set_num_threads(3)
        from asge_zoo.data.folder import ImageFolder
        assert torch.get_num_threads() == 3
        options = {OPTIONS!r} | dict(loader={loader!r}, workers=2)
        for seed in range(8):
            dataset = ImageFolder.model_validate(options)
            loaded = dataset.loader(Path({str(root)!r}), seed=seed, device=torch.device("cpu"))
            batches = loaded.train_batches(0)
            next(batches)
        assert torch.get_num_threads() == 3
        kept = loaded.train_batches(1)
        next(kept)
        print("done")
    """
    command = [sys.executable, "-W", "default", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


# Which loader, and what for.


def test_auto_takes_ffcv_where_it_can(own_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if FFCV:
        assert load(own_root, "auto").described == "ffcv (pics/train.beton, 42 images)"

    def broken() -> None:
        raise DataError("ffcv can't be imported")

    for name in ("train", "val"):
        (own_root / "pics" / f"{name}.beton").touch()
    monkeypatch.setattr(folder_module, "import_ffcv", broken)
    assert load(own_root, "auto").described == "torch (pics/train, 42 images); ffcv can't be imported"
    (own_root / "pics" / "val.beton").unlink()
    missing = own_root / "pics" / "val.beton"
    assert load(own_root, "auto").described == f"torch (pics/train, 42 images); for ffcv, {missing} is missing"
    assert load(own_root, "torch").described == "torch (pics/train, 42 images)"


@needs_ffcv
def test_ffcv_that_is_asked_for_and_can_not_be_had(own_root: Path) -> None:
    manifest_path(own_root / "pics" / "val.beton").unlink()
    for loader in ("auto", "ffcv"):  # a file that is there and damaged is never passed over
        with pytest.raises(DataError, match="val.beton: its manifest") as error:
            load(own_root, loader)
        one_line(error)
    (own_root / "pics" / "val.beton").unlink()
    with pytest.raises(DataError, match="data.loader: ffcv needs .*val.beton.*asge-zoo data write") as error:
        load(own_root, "ffcv")
    one_line(error)
    assert load(own_root, "ffcv", test=5).described.startswith("ffcv")


def test_workers_are_this_processs_share_of_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    cpus = usable_cpus()
    assert ImageFolder().worker_count() == cpus
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(cpus))
    assert ImageFolder().worker_count() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(3 * cpus))
    assert ImageFolder().worker_count() == 1 and ImageFolder(workers=5).worker_count() == 5


def test_training_images_set_apart_as_the_test(own_root: Path) -> None:
    """The same for every seed, needing no val, and never trained or validated on."""
    shutil.rmtree(own_root / "pics" / "val")
    crop = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "flip": False}
    loaders = [load(own_root, seed=seed, test=10, validation=5, batch_size=9, augment=crop) for seed in (0, 1)]
    tests, held_out = ([list(each.split_batches(split)) for each in loaders] for split in ("test", "validation"))
    assert same(*tests) and not same(*held_out)
    assert [len(tests[0][0][1]), len(held_out[0][0][1]), loaders[0].steps()] == [10, 5, 3]
    sources = [
        set(loaders[0]._splits["test"].samples.tolist()),
        set(loaders[0]._splits["validation"].samples.tolist()),
        set(loaders[0]._train.samples.tolist()),
    ]
    assert set.union(*sources) == set(range(TRAIN)) and sum(map(len, sources)) == TRAIN


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 4}, "data.classes: pics has 3 class folders and not 4; set data.classes=3"),
        ({"classes": ["a", "b"]}, "pics has 3 class folders and not 2"),
        ({"classes": ["n00000001", "n00000000", "n00000002"]}, "sort data.classes likewise"),
        ({"validation": TRAIN}, "data.validation: 42 of 42 training images"),
        ({"batch_size": 37}, "data.batch_size: 37 is more than the 36"),
        ({"test": TRAIN}, "data.test: 42 of 42 training images"),
        ({"test": 36}, "data.validation: 6 of 6"),
    ],
)
def test_a_spec_that_does_not_fit_the_folder(root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(message)) as error:
        load(root, **options)
    one_line(error)


def test_names_of_classes(root: Path) -> None:
    assert ImageFolder.model_validate(OPTIONS).info().classes == ("0", "1", "2")
    named = ImageFolder.model_validate({**OPTIONS, "classes": ["ant", "bee", "cat"]})
    assert named.info().classes == ("ant", "bee", "cat")
    named.loader(root, seed=0, device=CPU)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda pics: shutil.rmtree(pics), "pics/train: "),
        (lambda pics: shutil.rmtree(pics / "val"), "pics/val: .*data.test"),
        (lambda pics: (pics / "val" / "n00000001").rename(pics / "val" / "other"), "val: its class folders are not"),
        (lambda pics: (pics / "train" / "empty").mkdir(), "pics/train: .*empty"),
    ],
)
def test_a_folder_that_is_not_as_it_should_be(own_root: Path, spoil: Callable[[Path], Any], message: str) -> None:
    spoil(own_root / "pics")
    with pytest.raises(DataError, match=message) as error:
        load(own_root)
    one_line(error)


@pytest.mark.parametrize("folder", ["", ".", "/abs", "../up", "a/../../b", 1])
def test_folders_outside_the_data_root_are_refused(folder: Any) -> None:
    with pytest.raises(ValidationError):
        ImageFolder.model_validate({**OPTIONS, "folder": folder})


@pytest.mark.parametrize("classes", [1, 0, ["one"], ["same", "same"], "3", 2.0])
def test_classes_that_mean_nothing_are_refused(classes: Any) -> None:
    with pytest.raises(ValidationError):
        ImageFolder.model_validate({**OPTIONS, "classes": classes})


def test_the_loader_is_a_field_of_the_spec() -> None:
    """Though its class has a method of that name."""
    dataset = ImageFolder.model_validate({**OPTIONS, "loader": "torch"})
    assert dataset.model_dump(mode="json")["loader"] == "torch"
    assert ImageFolder.model_validate(dataset.model_dump(mode="json")) == dataset
    assert ImageFolder.model_json_schema()["properties"]["loader"]["enum"] == ["auto", "ffcv", "torch"]


def test_found(root: Path, tmp_path: Path) -> None:
    dataset = ImageFolder.model_validate(OPTIONS)
    assert dataset.found(root) == str(root / "pics")
    assert dataset.found(tmp_path) is None
    rows = {row["dataset"]: row for row in datasets_found(root)}
    assert rows["imagefolder"]["found"] is rows["imagenet"]["found"] is None


def test_imagenet_is_a_folder_of_its_own_classes(own_root: Path) -> None:
    info = ImageNet().info()
    assert len(set(info.classes)) == 1000
    assert (info.classes[0], info.classes[134], info.classes[517]) == (
        "tench, Tinca tinca",
        "crane (n02012849)",
        "crane (n03126707)",
    )
    (own_root / "pics").rename(own_root / "imagenet")
    with pytest.raises(DataError, match="imagenet: has a class folder n00000000") as error:
        ImageNet(loader="torch").loader(own_root, seed=0, device=CPU)
    one_line(error)
