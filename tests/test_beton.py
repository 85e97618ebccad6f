"""FFCV files: what is written is what is read, damage is found wherever it is, and what fails leaves nothing."""

import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pictures import make_folder, make_picture
from PIL import Image

from asge_zoo.cli.data import write as write_command
from asge_zoo.data import beton_writer, encoders
from asge_zoo.data.beton import Beton, Manifest, import_ffcv, manifest_path, open_beton, verify_beton
from asge_zoo.data.beton_writer import write_beton
from asge_zoo.errors import DataError

pytestmark = pytest.mark.skipif(find_spec("ffcv") is None, reason="ffcv is not installed (the extra `ffcv`)")

PAGE = 1 << 23


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five classes of 16 pictures: five chunks for the workers."""
    return make_folder(tmp_path_factory.mktemp("pictures"), classes=5, per_class=16)


@pytest.fixture(scope="module")
def written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those, written by two workers, larger ones shrunk to 80 pixels. Not to be changed."""
    file = tmp_path_factory.mktemp("written") / "a.beton"
    write_beton(folder, file, max_resolution=80, workers=2)
    return file


@pytest.fixture(scope="module")
def index(written: Path) -> Beton:
    """What lies where in it."""
    return open_beton(written)


@pytest.fixture
def quick_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that are forked from a process that has imported all, which takes spawned ones seconds each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ffcv.fields", "asge_zoo.data.encoders"])
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    file = tmp_path / "copy.beton"
    shutil.copy(written, file)
    shutil.copy(manifest_path(written), manifest_path(file))
    return file


@pytest.fixture
def target(tmp_path: Path, quick_workers: None) -> Iterator[Path]:
    """A file that is not going to be: neither it, nor anything else, nor a process may be left afterwards."""
    place = tmp_path / "place"
    shared = set(os.listdir("/dev/shm"))
    yield place / "failed.beton"
    assert not place.exists() or list(place.iterdir()) == []
    assert multiprocessing.active_children() == []
    assert not [name for name in set(os.listdir("/dev/shm")) - shared if name.startswith("psm_")]


def flip(file: Path, position: int, bit: int = 0) -> None:
    """Turn a bit of the byte at `position` over."""
    with open(file, "r+b") as stream:
        stream.seek(position)
        value = stream.read(1)[0] ^ (1 << bit)
        stream.seek(position)
        stream.write(bytes([value]))


def picture_of(file: Path) -> Image.Image:
    """A picture as Pillow reads it."""
    with Image.open(file) as picture:
        return picture.convert("RGB")


def pixels_of(file: Path) -> NDArray[np.uint8]:
    """Its pixels, (height, width, 3)."""
    return np.array(picture_of(file))


def stored(beton: Beton, number: int) -> bytes:
    """An image's bytes in the file."""
    start = int(beton.offsets[number])
    return beton.path.read_bytes()[start : start + int(beton.sizes[number])]


# What is written.


def test_the_index_is_the_folders(folder: Path, index: Beton) -> None:
    from torchvision.datasets import ImageFolder

    reference = ImageFolder(str(folder))
    assert index.classes == tuple(reference.classes)
    assert [(str(folder / name), int(label)) for name, label in zip(index.files, index.labels, strict=True)] == (
        reference.samples
    )
    sizes = np.array([picture_of(folder / name).size for name in index.files])
    shrunk = np.minimum(1, 80 / sizes.max(axis=1, keepdims=True))
    assert (np.stack([index.widths, index.heights], axis=1) == (shrunk * sizes).astype(int)).all()
    assert len(index) == 80
    assert {array.dtype.name for array in (index.labels, index.heights, index.widths, index.offsets, index.sizes)} == {
        "int64"
    }
    assert (index.jpeg.dtype, index.crc32.dtype) == (np.bool_, np.uint32)


def test_images_are_stored_raw_or_as_jpeg(folder: Path, index: Beton) -> None:
    assert 20 < index.jpeg.sum() < 60
    for number, name in enumerate(index.files):
        content = stored(index, number)
        assert zlib.crc32(content) == index.crc32[number]
        shape = (int(index.heights[number]), int(index.widths[number]), 3)
        original = pixels_of(folder / name)
        if index.jpeg[number]:
            image = np.array(Image.open(io.BytesIO(content)))
        else:
            image = np.frombuffer(content, np.uint8).reshape(shape)
            assert original.shape != shape or (image == original).all()
        assert image.shape == shape
        reference = np.array(Image.fromarray(original).resize((shape[1], shape[0]), Image.Resampling.BOX))
        assert np.abs(image.astype(float) - reference).mean() < 6


def test_ffcvs_own_loader_reads_it(folder: Path, index: Beton) -> None:
    decoders, basics = import_ffcv("ffcv.fields.rgb_image"), import_ffcv("ffcv.fields.basics")
    loader = import_ffcv("ffcv.loader")
    pipelines = {
        "image": [decoders.CenterCropRGBImageDecoder((32, 32), ratio=1)],
        "label": [basics.IntDecoder()],
    }
    order = loader.OrderOption.SEQUENTIAL
    batches = list(loader.Loader(str(index.path), 80, num_workers=1, order=order, pipelines=pipelines))
    images, labels = (np.array(part) for part in batches[0])
    assert (labels[:, 0] == index.labels).all()
    for name, image in zip(index.files, images, strict=True):
        picture = picture_of(folder / name)
        width, height = picture.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        square = picture.crop((left, top, left + side, top + side)).resize((32, 32), Image.Resampling.BOX)
        assert np.abs(image.astype(float) - np.array(square)).mean() < 10


def test_any_number_of_workers_writes_the_same_bytes(folder: Path, written: Path, tmp_path: Path) -> None:
    again = tmp_path / "b.beton"
    steps = []
    write_beton(folder, again, max_resolution=80, workers=1, on_progress=lambda *step: steps.append(step))
    assert again.read_bytes() == written.read_bytes()
    assert manifest_path(again).read_bytes() == manifest_path(written).read_bytes()
    assert steps[:80] == [("writing", done, 80) for done in range(1, 81)]
    assert steps[-1] == ("checking", again.stat().st_size, again.stat().st_size)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.beton", "b.beton.json"]


def test_odd_images(tmp_path: Path, quick_workers: None, cli: Callable[..., Any]) -> None:
    """Grey, palette and CMYK are made RGB; what can't be read is left out by name."""
    folder, file = tmp_path / "odd", tmp_path / "odd.beton"
    (folder / "a" / "deeper").mkdir(parents=True)
    picture = make_picture(50, 60, np.random.default_rng(0))
    picture.convert("L").save(folder / "a" / "grey.jpeg")
    picture.convert("P").save(folder / "a" / "palette.PNG")
    picture.convert("RGBA").save(folder / "a" / "see-through.webp", lossless=True)
    picture.convert("CMYK").save(folder / "a" / "deeper" / "cmyk.jpg")
    (folder / "a" / "notes.txt").write_text("no image")
    whole = (folder / "a" / "grey.jpeg").read_bytes()
    (folder / "a" / "cut.jpeg").write_bytes(whole[: len(whole) // 2])
    (folder / "a" / "text.jpeg").write_text("no image")
    Image.new("RGB", (4000, 1)).save(folder / "a" / "thin.png")
    line = ("data", "write", "imagefolder", "--from", folder, "--to", file, "--compress-probability", "0")
    said = cli(*line, "--skip-unreadable", "--workers", "1", "--json")
    assert said.code == 0, said
    beton = open_beton(file)
    assert json.loads(said.out) == {
        "file": str(file),
        "count": 4,
        "classes": 1,
        "skipped": ["a/cut.jpeg", "a/text.jpeg", "a/thin.png"],
        "bytes": file.stat().st_size,
        "sha256": Manifest.model_validate_json(manifest_path(file).read_bytes()).sha256,
    }
    lines = said.err.splitlines()
    assert len(lines) == 3 and all(line.startswith(f"asge-zoo: {folder}/a/") for line in lines), said.err
    assert "cut.jpeg: left out, can't be read" in lines[0]
    assert beton.files == ("a/grey.jpeg", "a/palette.PNG", "a/see-through.webp", "a/deeper/cmyk.jpg")
    assert not beton.jpeg.any()
    for number, name in enumerate(beton.files):
        assert stored(beton, number) == pixels_of(folder / name).tobytes()
    said = cli("data", "verify", file, "--json")
    assert (said.code, json.loads(said.out)) == (0, {"file": str(file), "ok": True, "problems": []})


def test_the_commands_defaults_are_the_writers() -> None:
    defaults = {parameter.name: parameter.default for parameter in write_command.params}
    names = {"max_resolution": beton_writer.MAX_RESOLUTION, "quality": beton_writer.QUALITY}
    assert names | {"compress_probability": beton_writer.COMPRESS_PROBABILITY} == {
        name: defaults[name] for name in (*names, "compress_probability")
    }


# What is refused.


def test_the_first_unreadable_image_stops_it(folder: Path, tmp_path: Path, target: Path) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    (broken / "n00000003" / "img_002.JPEG").write_bytes(b"\xff\xd8\xff")
    (broken / "n00000001" / "img_005.JPEG").write_bytes(b"")
    with pytest.raises(DataError, match=r"n00000001/img_005.JPEG: can't be read \(.*--skip-unreadable$"):
        write_beton(broken, target, workers=1)


def test_folders_that_are_none(tmp_path: Path, target: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder"):
        write_beton(tmp_path / "nowhere", target)
    flat = make_folder(tmp_path / "a", classes=1) / "n00000000"
    with pytest.raises(DataError, match="n00000000: has no class folders"):
        write_beton(flat, target)
    (tmp_path / "a" / "empty").mkdir()
    with pytest.raises(DataError, match="a/empty: has no images"):
        write_beton(tmp_path / "a", target)


@pytest.mark.parametrize(
    "option",
    [{"max_resolution": 0}, {"max_resolution": 5000}, {"compress_probability": 1.5}, {"quality": 0}, {"workers": 0}],
    ids=str,
)
def test_options_out_of_range(option: dict[str, Any], folder: Path, target: Path) -> None:
    (name,) = option
    with pytest.raises(DataError, match=f"{name.replace('_', '-')} is .*; give "):
        write_beton(folder, target, **option)


@pytest.mark.parametrize("name", ["a.beton", "a.beton.json"])
def test_what_exists_is_not_replaced(name: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(DataError, match=f"{name}: exists already"):
        write_beton(folder, tmp_path / "a.beton")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_imagenet_has_a_thousand_classes(folder: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    said = cli("data", "write", "imagenet", "--data-root", tmp_path)
    assert (said.code, said.out) == (2, "") and f"{tmp_path}/imagenet/train: no such folder" in said.err
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "imagenet" / "val").symlink_to(folder)
    said = cli("data", "write", "imagenet", "--split", "val", "--data-root", tmp_path)
    assert (said.code, said.out, len(said.err.splitlines())) == (2, "", 1)
    assert "val: has 5 class folders, and ImageNet 1000" in said.err and "data write imagefolder" in said.err
    assert cli("data", "write", "imagefolder", "--from", folder).code == 2


# What fails under way.


def work_that_raises(*arguments: Any) -> None:
    """A worker whose reading raises what no picture explains; spawned, it finds the module as it was."""

    def read(*_: Any) -> Any:
        raise RuntimeError("out of order")

    encoders.read_rgb = read
    encoders.work(*arguments)


def work_that_ends(*_: Any) -> None:
    """A worker that goes without a word."""
    os._exit(3)


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (work_that_raises, r"a worker failed \(RuntimeError: out of order\) on an image from .*img_000.JPEG on"),
        (work_that_ends, r"a worker died \(exit code 3\)"),
    ],
)
def test_a_worker_that_fails(
    work: Callable, words: str, folder: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoders, "work", work)
    with pytest.raises(DataError, match=words):
        write_beton(folder, target, workers=1)


def kill_workers() -> None:
    """As a system out of memory does it."""
    for process in multiprocessing.active_children():
        os.kill(process.pid or 0, signal.SIGKILL)


def test_a_worker_killed_at_work(folder: Path, target: Path) -> None:
    with pytest.raises(DataError, match=r"^a worker died \(killed by SIGKILL\)"):
        write_beton(folder, target, workers=1, on_progress=lambda *_: kill_workers())


def test_a_worker_killed_at_its_start(folder: Path, target: Path) -> None:
    def kill() -> None:
        while not multiprocessing.active_children():
            time.sleep(0.01)
        kill_workers()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(DataError, match=r"^a worker died \(killed by SIGKILL\)"):
        write_beton(folder, target, workers=1)
    killer.join()


def test_an_interrupt_leaves_nothing(folder: Path, target: Path) -> None:
    def interrupt(step: str, *_: int) -> None:
        if step == "checking":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_beton(folder, target, workers=1, on_progress=interrupt)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_to_all_processes_leave_nothing(number: int, code: int, folder: Path, target: Path) -> None:
    line = [sys.executable, "-m", "asge_zoo", "data", "write", "imagefolder", "--from", folder, "--to", target]
    process = subprocess.Popen(
        [*line, "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    temporary = target.with_name(f".tmp-{target.name}")
    deadline = time.monotonic() + 120
    while not temporary.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)  # workers are on their start
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, ""), err
    assert err == f"asge-zoo: stopped by {signal.Signals(number).name}; nothing is left behind\n"
    with pytest.raises(ProcessLookupError):  # nobody of its group is left
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.05)


@pytest.mark.parametrize("size", [1000, PAGE + 5000], ids=["descriptors", "page"])
def test_a_file_that_may_grow_no_further(size: int, folder: Path, target: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(DataError, match=r"failed.beton: can't be written \(File too large\); raise the file-size"):
            write_beton(folder, target, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_with_no_room_for_the_manifest(folder: Path, written: Path, target: Path) -> None:
    disk = target.parent
    disk.mkdir()
    blocks = -(-written.stat().st_size // 4096)
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={blocks * 4}k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("mounting file systems is not allowed here")
    try:
        with pytest.raises(DataError, match=r"can't be written \(No space left on device\); make room on the disk"):
            write_beton(folder, target, max_resolution=80, workers=1)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_second_writer_is_refused(folder: Path, target: Path) -> None:
    import fcntl

    target.parent.mkdir()
    temporary = target.with_name(f".tmp-{target.name}")
    with open(temporary, "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="is being written by another process"):
            write_beton(folder, target)
        assert temporary.exists()
    temporary.unlink()


# What is damaged.


def regions(beton: Beton) -> dict[str, tuple[int, int]]:
    """Where a file's parts lie: [start, end)."""
    types = import_ffcv("ffcv.types")
    size, count = beton.path.stat().st_size, len(beton)
    fields = types.HeaderType.itemsize + 2 * types.FieldDescType.itemsize
    return {
        "header": (0, types.HeaderType.itemsize),
        "field descriptors": (types.HeaderType.itemsize, fields),
        "metadata": (fields, fields + 24 * count),
        "padding": (fields + 24 * count, PAGE),
        "images": (int(beton.offsets[0]), int(beton.offsets[-1] + beton.sizes[-1])),
        "last page": (int(beton.offsets[-1] + beton.sizes[-1]), size - 24 * count),
        "allocation table": (size - 24 * count, size),
    }


@pytest.mark.parametrize("region", ["header", "field descriptors", "metadata", "allocation table"])
def test_a_flipped_byte_of_the_index(region: str, copy: Path, index: Beton) -> None:
    start, end = regions(index)[region]
    for position in (start, (start + end) // 2, end - 1):
        flip(copy, position)
        (problem,) = verify_beton(copy)
        assert "its header, field descriptors, metadata or allocation table are damaged" in problem
        with pytest.raises(DataError, match="copy.beton: its header, .* are damaged; `asge-zoo data verify"):
            open_beton(copy)
        flip(copy, position)
    assert verify_beton(copy) == []


def test_a_flipped_byte_of_an_image(copy: Path, index: Beton, cli: Callable[..., Any]) -> None:
    for number in (3, 70):
        flip(copy, int(index.offsets[number] + index.sizes[number] // 2))
    assert verify_beton(copy) == [
        f"image {number} ({index.files[number]}) is damaged: its CRC is another" for number in (3, 70)
    ]
    assert len(open_beton(copy)) == 80, "images are not read at opening"
    said = cli("data", "verify", copy)
    assert (said.code, said.err, said.out.splitlines()[-1]) == (1, "", f"{copy}: problems: 2")


@pytest.mark.parametrize("region", ["padding", "last page"])
def test_a_flipped_byte_where_nothing_is(region: str, copy: Path, index: Beton) -> None:
    start, end = regions(index)[region]
    for position in (start, end - 1):
        flip(copy, position)
        assert verify_beton(copy) == ["damaged between its images, where nothing is stored: its sha256 is another"]
        flip(copy, position)


def test_a_wrong_length(copy: Path, index: Beton) -> None:
    size = copy.stat().st_size
    with open(copy, "ab") as file:
        file.write(b"\0\0")
    assert verify_beton(copy) == [f"it has {size + 2} bytes, 2 too many"]
    for left in (size - 1, size - 24 * 40, int(index.offsets[5]), PAGE, 1000, 24, 0):
        os.truncate(copy, left)
        assert verify_beton(copy) == [f"truncated: it has {left} of its {size} bytes"]
        with pytest.raises(DataError, match=f"copy.beton: truncated: it has {left} of its {size} bytes; "):
            open_beton(copy)


def test_any_flipped_bit_is_found(copy: Path, index: Beton) -> None:
    rng = random.Random(0)
    places = [(0, copy.stat().st_size), *regions(index).values()]
    for start, end in places:
        for _ in range(40):
            position, bit = rng.randrange(start, end), rng.randrange(8)
            flip(copy, position, bit)
            assert verify_beton(copy), (position, bit)
            flip(copy, position, bit)
    manifest = manifest_path(copy)
    for _ in range(200):
        position, bit = rng.randrange(manifest.stat().st_size - 1), rng.randrange(8)
        flip(manifest, position, bit)
        (problem,) = verify_beton(copy)
        assert "copy.beton.json: damaged manifest (" in problem and len(problem.splitlines()) == 1
        flip(manifest, position, bit)
    assert verify_beton(copy) == []


@pytest.mark.parametrize(
    "change",
    [
        {"count": 79},
        {"files": []},
        {"files": ["/etc/passwd"] * 80},
        {"files": ["n00000000/../../secret.jpg"] * 80},
        {"files": ["elsewhere/a.jpg"] * 80},
        {"classes": ["b", "a"]},
        {"crc32": [-1] * 80},
        {"sha256": "0" * 63},
        {"quality": 95},
        {"version": 2},
        {"more": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_manifest_of_nonsense(change: dict[str, Any], copy: Path) -> None:
    manifest = manifest_path(copy)
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))
    with pytest.raises(DataError, match=r"copy.beton.json: damaged manifest \(.*\); put back a copy"):
        open_beton(copy)


def test_a_missing_manifest_or_file(copy: Path, cli: Callable[..., Any]) -> None:
    manifest_path(copy).unlink()
    (problem,) = verify_beton(copy)
    assert "its manifest copy.beton.json is missing, so it is unfinished" in problem
    assert cli("data", "verify", copy).code == 1
    copy.unlink()
    with pytest.raises(DataError, match="copy.beton: no such file"):
        open_beton(copy)
    said = cli("data", "verify", copy)
    assert (said.code, said.out, len(said.err.splitlines())) == (2, "", 1)


# FFCV itself.


def test_without_ffcv_damage_is_found_and_not_located(
    copy: Path, index: Beton, target: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "ffcv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ffcv", None)
    words = r"ffcv is not installed.*pip install 'asge-zoo\[ffcv\]'.*libturbojpeg0-dev"
    with pytest.raises(DataError, match=words):
        open_beton(copy)
    with pytest.raises(DataError, match=words):
        write_beton(folder, target)
    assert verify_beton(copy) == []
    flip(copy, int(index.offsets[3]))
    (problem,) = verify_beton(copy)
    assert problem.startswith("damaged: its sha256 is another") and "asge-zoo[ffcv]" in problem


def test_its_import_leaves_torchs_threads_alone_and_may_fail(tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs\\nanother NumPy')")
    code = (
        "import sys, torch\n"
        "from asge_zoo.data.beton import import_ffcv\n"
        "torch.set_num_threads(3)\n"
        "try:\n    import_ffcv()\nexcept Exception as error:\n    print(error)\n"
        "print(torch.get_num_threads())\n"
    )
    for path, said in ((tmp_path, ["ffcv can't be imported (Numba needs another NumPy)", "3"]), (None, ["3"])):
        environment = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
        )
        lines = done.stdout.splitlines()
        assert len(lines) == len(said), done
        assert all(line.startswith(start) for line, start in zip(lines, said, strict=True)), lines
