"""Pictures on disk, of every kind, become the images that evaluation has, and get the model's own answers."""

import hashlib
import io
import json
import os
import random
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import Said, torch_threads
from pictures import make_folder, make_picture
from PIL import Image
from tiny import tiny_spec

from asge_zoo.compiler.build import compile_spec
from asge_zoo.compiler.check import parts
from asge_zoo.data.crops import ResizedCrop
from asge_zoo.data.digits import Digits
from asge_zoo.data.image_loader import Cropping, Request
from asge_zoo.data.preprocessing import Preprocessing
from asge_zoo.data.torch_source import FolderSource
from asge_zoo.engine.checkpoint import MODEL, SPEC, pack
from asge_zoo.errors import DataError
from asge_zoo.files import json_bytes, write_folder
from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.inference import Answer, classify_files, find_pictures
from asge_zoo.spec import Spec, load_spec

pytestmark = pytest.mark.usefixtures("one_thread")

GREY = Preprocessing(channels=1, height=8, width=8, crop=1.0, mean=[0.5], std=[0.25])
COLOUR = Preprocessing(channels=3, height=24, width=24, crop=0.875, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4])
EXIT = "prediction.kind=vote.early_exit"
KINDS = {
    "fusion": ("data.size=8", "backbone.kind=timm", "backbone.name=resnet10t", "backbone.stem=cifar"),
    "best": ("prediction.kind=best",),
    "exit": (EXIT,),
}


def untrained(*overrides: str) -> tuple[LocalGraph, Spec]:
    """A network as it is before its first step, which answers as well as any.

    Where it exits early, it does so at its first unit for half of the images: the threshold is set accordingly.
    """
    spec = tiny_spec(*overrides)
    with torch_threads(1):
        graph = compile_spec(spec).eval()
        if EXIT in overrides and not any(each.startswith("prediction.threshold") for each in overrides):
            images = next(parts(spec).data.loader(Path(), seed=0, device=torch.device("cpu")).split_batches("test"))[0]
            with torch.inference_mode():
                confidence = graph.unit_logits(images[:40])[0].softmax(1).amax(1).sort().values.tolist()
            return untrained(*overrides, f"prediction.threshold={sum(confidence[19:21]) / 2}")
        return graph, spec


def saved(folder: Path, graph: LocalGraph, spec: Spec) -> Path:
    """Its checkpoint, with no training state; returns `folder`."""
    files = {
        MODEL: pack(graph.state_dict(), {"format": "pt", "spec_sha256": spec.digest()}),
        SPEC: json_bytes(spec.resolved()),
    }
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    write_folder(folder, {**files, "manifest.json": json_bytes({"spec_sha256": spec.digest(), "sha256": sums})})
    return folder


@pytest.fixture(scope="module")
def fusion() -> tuple[LocalGraph, Spec]:
    """The tiny network."""
    return untrained()


@pytest.fixture(scope="module")
def model(fusion: tuple[LocalGraph, Spec], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its checkpoint."""
    return saved(tmp_path_factory.mktemp("model") / "model", *fusion)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of seven pictures, two of them in folders of their own, and a file that is none."""
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    for name in ("b.png", "a.jpg", "c.PNG", "d.webp", "e.bmp", "sub/z.png", "sub/er/f.ppm"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        make_picture(int(rng.integers(9, 40)), int(rng.integers(9, 40)), rng).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


IN_ORDER = ["a.jpg", "b.png", "c.PNG", "d.webp", "e.bmp", "sub/er/f.ppm", "sub/z.png"]


def answers(graph: LocalGraph, files: list[Path], preprocessing: Preprocessing, **options: int) -> list[Answer]:
    """All of them, at once."""
    return list(classify_files(graph, files, preprocessing, **options))


# From a picture to an image.


def test_a_picture_of_the_images_size_stays_as_it_is(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    grey, colour = (rng.integers(0, 256, (8, 8, *more), dtype=np.uint8) for more in ((), (3,)))
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(colour).save(tmp_path / "colour.png")
    whole = COLOUR.model_copy(update={"height": 8, "width": 8, "crop": 1.0})
    assert np.array_equal(GREY.read(tmp_path / "grey.png"), grey[:, :, None])
    assert np.array_equal(whole.read(tmp_path / "grey.png"), np.repeat(grey[:, :, None], 3, axis=2))
    assert np.array_equal(whole.read(tmp_path / "colour.png"), colour)
    luma = colour @ [0.299, 0.587, 0.114]
    assert np.abs(GREY.read(tmp_path / "colour.png")[:, :, 0] - luma).max() <= 1


def odd_pictures(grey: np.ndarray) -> dict[str, Image.Image]:
    """The same grey picture in other forms."""
    plain = Image.fromarray(grey)
    wide = grey.astype(np.uint16) * 257
    return {
        "rgb.png": plain.convert("RGB"),
        "rgba.png": plain.convert("RGBA"),
        "alpha.png": plain.convert("LA"),
        "palette.png": plain.convert("P"),
        "palette.gif": plain.convert("P"),
        "deep.png": Image.fromarray(wide),
        "deep.tif": Image.fromarray(wide),
        "deeper.tif": Image.fromarray(wide.astype(np.int32)),
        "plain.pgm": plain,
        "plain.tiff": plain,
    }


@pytest.mark.parametrize("name", odd_pictures(np.zeros((8, 8), np.uint8)))
def test_every_form_of_a_picture_gives_its_pixels(name: str, tmp_path: Path) -> None:
    grey = np.random.default_rng(1).integers(0, 256, (8, 8), dtype=np.uint8)
    odd_pictures(grey)[name].save(tmp_path / name)
    for preprocessing in (GREY, GREY.model_copy(update={"channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3})):
        pixels = preprocessing.read(tmp_path / name)
        assert pixels.dtype == np.uint8 and pixels.shape == (8, 8, preprocessing.channels)
        assert np.array_equal(pixels, np.repeat(grey[:, :, None], preprocessing.channels, axis=2))


def test_a_transparent_palette_and_one_of_two_colours_are_read(tmp_path: Path) -> None:
    palette = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("P")
    palette.save(tmp_path / "transparent.png", transparency=3)
    Image.fromarray(np.eye(8, dtype=bool)).save(tmp_path / "bits.png")
    assert GREY.read(tmp_path / "transparent.png").shape == (8, 8, 1)
    assert np.array_equal(GREY.read(tmp_path / "bits.png")[:, :, 0], np.eye(8, dtype=np.uint8) * 255)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 700), (1500, 1000), (23, 25)])
def test_pictures_of_any_size_give_the_square_in_the_middle(size: tuple[int, int], tmp_path: Path) -> None:
    """A picture that is white there, and a little beyond for the filter's sake, becomes white."""
    height, width = size
    side = max(1, round(min(size) * COLOUR.crop))
    top, left, border = (height - side) // 2, (width - side) // 2, 1 + side // 24
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[max(0, top - border) : top + side + border, max(0, left - border) : left + side + border] = 255
    Image.fromarray(pixels).save(tmp_path / "it.png")
    read = COLOUR.read(tmp_path / "it.png")
    assert read.shape == (24, 24, 3) and read.min() == 255


def test_pixels_are_normalised_channel_by_channel() -> None:
    pixels = torch.randint(0, 256, (2, 24, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = COLOUR.normalize(pixels)
    assert found.shape == (2, 3, 24, 24) and found.dtype == torch.float32
    for channel, (mean, std) in enumerate(zip(COLOUR.mean, COLOUR.std, strict=True)):
        expected = (pixels[..., channel].double() / 255 - mean) / std
        assert torch.allclose(found[:, channel].double(), expected, atol=1e-6)


def test_a_model_of_five_channels_takes_no_pictures(tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "it.png")
    five = GREY.model_copy(update={"channels": 5, "mean": [0.5] * 5, "std": [0.5] * 5})
    with pytest.raises(DataError, match="it.png: pictures are grey or RGB, and this model takes 5 channels"):
        five.read(tmp_path / "it.png")


def test_a_folder_models_pixels_are_those_of_the_torch_loader(tmp_path: Path) -> None:
    """Any sizes, by the loader that training's evaluation uses."""
    folder = make_folder(tmp_path / "train", classes=3, per_class=6, sizes=(20, 120))
    spec = load_spec({"name": "photos", "data": {"kind": "imagefolder", "size": 24}, "backbone": {"kind": "vgg8"}})
    source = FolderSource(folder, Cropping(24, 0, ResizedCrop()), workers=0, pinned=False)
    (loaded,) = source.batches(iter([Request(np.arange(18), None)]))
    files = find_pictures([str(folder)])
    read = np.stack([parts(spec).data.preprocessing().read(file) for file in files])
    assert len(files) == 18 and np.array_equal(read, loaded.numpy())


# Answers.


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The digits' first test images as they are stored, 8×8 pixels, as PNG."""
    folder = tmp_path_factory.mktemp("digits")
    _, test = Digits().read(Path())
    files = [folder / f"{number:03d}.png" for number in range(40)]
    for file, image in zip(files, test.images[:40], strict=True):
        Image.fromarray(image[0].numpy()).save(file)
    return files


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_models_own_evaluation(kind: str, digits: list[Path]) -> None:
    """Bitwise, where the pictures have the size of the dataset's images."""
    graph, spec = untrained(*KINDS[kind])
    data = parts(spec).data
    preprocessing = data.preprocessing()
    images = preprocessing.normalize(torch.from_numpy(np.stack([preprocessing.read(file) for file in digits])))
    assert images.is_contiguous()
    if preprocessing.height == 8:  # else the dataset resizes by torch, and pictures are resized by Pillow
        loaded = next(data.loader(Path(), seed=0, device=torch.device("cpu")).split_batches("test"))[0][:40]
        assert torch.equal(images, loaded)
    with torch.inference_mode():
        logits, depth = graph.classify(images)
    best = logits.softmax(1).topk(3)
    found = answers(graph, digits, preprocessing, top_k=3)
    assert [answer.file for answer in found] == digits
    assert [answer.labels for answer in found] == best.indices.tolist()
    assert [answer.probabilities for answer in found] == best.values.tolist()
    assert [answer.exit_unit for answer in found] == depth.tolist()
    if kind == "exit":
        assert len(set(depth.tolist())) > 1, "some leave early, some do not"


def test_the_chosen_unit_is_reported(digits: list[Path]) -> None:
    graph, spec = untrained(*KINDS["best"])
    graph.prediction.select(graph.head, [0.0, 1.0, 9.0, 1.0, 1.0, 1.0, 1.0])
    found = answers(graph, digits[:3], parts(spec).data.preprocessing())
    assert [answer.exit_unit for answer in found] == [3, 3, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_do_not_depend_on_the_batches(kind: str, digits: list[Path]) -> None:
    graph, spec = untrained(*KINDS[kind])
    preprocessing = parts(spec).data.preprocessing()
    once = answers(graph, digits, preprocessing, top_k=2, batch_size=64)
    for size in (1, 7, 40):
        again = answers(graph, digits, preprocessing, top_k=2, batch_size=size)
        assert [(a.file, a.labels, a.exit_unit) for a in again] == [(a.file, a.labels, a.exit_unit) for a in once]
        for one, two in zip(once, again, strict=True):
            assert one.probabilities == pytest.approx(two.probabilities, rel=1e-4)


def test_top_k_names_no_class_twice(fusion: tuple[LocalGraph, Spec], digits: list[Path]) -> None:
    graph, spec = fusion
    for answer in answers(graph, digits[:5], parts(spec).data.preprocessing(), top_k=99):
        assert sorted(answer.labels) == list(range(10))
        assert answer.probabilities == sorted(answer.probabilities, reverse=True)
        assert sum(answer.probabilities) == pytest.approx(1, abs=1e-5)


def test_no_more_is_decoded_than_is_needed(fusion: tuple[LocalGraph, Spec], digits: list[Path]) -> None:
    """Who stops taking answers stops the threads; what can't be read is met in its turn."""
    graph, spec = fusion
    preprocessing = parts(spec).data.preprocessing()
    files = [*digits[:8], *[digits[0].with_name("gone.png")] * 500]
    taken = classify_files(graph, files, preprocessing, batch_size=2)
    assert [next(taken).file for _ in range(8)] == digits[:8]
    with pytest.raises(DataError, match="gone.png: can't be read as an image"):
        next(taken)
    with closing(cast(Generator[Answer, None, None], classify_files(graph, files, preprocessing, batch_size=2))) as few:
        next(few)
    assert answers(graph, [], preprocessing) == []


# What is named.


def test_a_folder_means_its_pictures_at_any_depth(pictures: Path) -> None:
    assert find_pictures([str(pictures)]) == [pictures / name for name in IN_ORDER]
    named = [str(pictures / "sub"), str(pictures / "b.png"), str(pictures / "b.png")]
    assert find_pictures(named) == [pictures / name for name in (*IN_ORDER[5:], "b.png", "b.png")]
    assert find_pictures([str(pictures / "notes.txt")]) == [pictures / "notes.txt"], "who names a file means it"


def piped(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Stdin holds this."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def test_stdin_lists_files_and_folders(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = pictures / os.fsdecode(b"od\xffd \xe2\x80\xa8 name.png")  # of bytes that are no text, and a line separator
    (pictures / "a.jpg").rename(odd)
    piped(monkeypatch, b"\n".join((os.fsencode(odd), b"", b"-", os.fsencode(pictures / "sub"))) + b"\r\n")
    found = find_pictures([str(pictures / "b.png"), "-"])
    assert found == [pictures / "b.png", odd, pictures / "sub/er/f.ppm", pictures / "sub/z.png"]
    piped(monkeypatch, b"")
    assert find_pictures(["-"]) == []


# The command line.


def test_predict_reports_as_json(model: Path, pictures: Path, cli: Callable[..., Said]) -> None:
    said = cli("predict", model, pictures, "--json", "--device", "cpu")
    assert (said.code, said.err) == (0, "")
    rows = json.loads(said.out)
    assert [row["file"] for row in rows] == [str(pictures / name) for name in IN_ORDER]
    for row in rows:
        assert list(row) == ["file", "label", "class", "probability", "exit_unit"]
        assert row["class"] == str(row["label"]) and 0.1 <= row["probability"] <= 1 and row["exit_unit"] == 7
    for options in (("--batch-size", "1"), ("--batch-size", "3")):
        again = json.loads(cli("predict", model, pictures, "--json", "--device", "cpu", *options).out)
        assert [(row["file"], row["label"]) for row in again] == [(row["file"], row["label"]) for row in rows]
    top = json.loads(cli("predict", model, pictures, "--json", "--device", "cpu", "--top-k", "3").out)
    for row, more in zip(rows, top, strict=True):
        assert {key: more[key] for key in row} == row
        assert len(more["top"]) == 3 and more["top"][0] == {key: row[key] for key in ("label", "class", "probability")}


def test_predict_says_a_line_a_picture(model: Path, pictures: Path, cli: Callable[..., Said]) -> None:
    said = cli("predict", model, pictures / "b.png", pictures / "a.jpg", "--top-k", "2", "--device", "cpu")
    first, second = said.out.splitlines()
    assert said.code == 0 and first.startswith(f"{pictures / 'b.png'}: ") and second.startswith(f"{pictures / 'a.jpg'}")
    assert first.count(" %)") == 2 and first.endswith("; unit 7 of 7")


def test_predict_takes_names_from_stdin(
    model: Path, pictures: Path, cli: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    piped(monkeypatch, os.fsencode(f"{pictures / 'c.PNG'}\n{pictures / 'sub'}\n"))
    rows = json.loads(cli("predict", model, "-", "--json", "--device", "cpu").out)
    assert [row["file"] for row in rows] == [str(pictures / name) for name in ("c.PNG", *IN_ORDER[5:])]
    piped(monkeypatch, b"\n")
    said = cli("predict", model, "-", "--json", "--device", "cpu")
    assert (said.code, json.loads(said.out)) == (0, [])


def test_predict_reports_early_exits(digits: list[Path], tmp_path: Path, cli: Callable[..., Said]) -> None:
    graph, spec = untrained(*KINDS["exit"])
    folder = saved(tmp_path / "exit", graph, spec)
    rows = json.loads(cli("predict", folder, *digits, "--json", "--device", "cpu").out)
    found = answers(graph, digits, parts(spec).data.preprocessing())
    assert [row["exit_unit"] for row in rows] == [answer.exit_unit for answer in found]


def broken(kind: str, file: Path) -> None:
    """A file that is no picture, or no longer one."""
    rng = np.random.default_rng(0)
    make_picture(40, 40, rng).save(file)
    content = file.read_bytes()
    if kind == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif kind == "text":
        file.write_text("no picture")
    elif kind == "noise":
        file.write_bytes(content[:30] + random.Random(0).randbytes(400))
    elif kind == "empty":
        file.write_bytes(b"")
    else:
        size = (20_000).to_bytes(4, "big")  # an image of 400 million pixels in a few bytes
        file.write_bytes(content[:16] + size + size + content[24:])


@pytest.mark.parametrize("kind", ["cut", "text", "noise", "empty", "bomb"])
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_picture_that_cannot_be_read_is_named(
    kind: str, options: tuple[str, ...], model: Path, pictures: Path, cli: Callable[..., Said]
) -> None:
    broken(kind, pictures / "e.png")
    said = cli("predict", model, pictures, "--device", "cpu", *options)
    assert said.code == 2 and said.err.count("\n") == 1
    assert f"{pictures / 'e.png'}: can't be read as an image (" in said.err
    assert not said.out or not options


@pytest.mark.parametrize(
    ("given", "said_of_it"),
    [
        ("gone.png", "gone.png: no such file or folder; name a picture, a folder of them, or - for stdin's lines"),
        ("empty", "empty: holds no picture (.jpg, .jpeg, .png"),
        ("n" * 300, "File name too long"),
        ("a pipe", "a pipe: no such file or folder"),
    ],
)
def test_what_is_not_there_is_named(
    given: str, said_of_it: str, model: Path, pictures: Path, cli: Callable[..., Said]
) -> None:
    (pictures / "empty" / "er").mkdir(parents=True)
    os.mkfifo(pictures / "a pipe")
    said = cli("predict", model, pictures / "a.jpg", pictures / given, "--device", "cpu")
    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert said_of_it in said.err


@pytest.mark.parametrize("options", [("--top-k", "0"), ("--batch-size", "0"), ("--revision", "main")])
def test_options_that_make_no_sense_are_refused(
    options: tuple[Any, ...], model: Path, pictures: Path, cli: Callable[..., Said]
) -> None:
    said = cli("predict", model, pictures, "--device", "cpu", *options)
    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
