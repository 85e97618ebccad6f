"""Mutate published models at random; loading one, and a forward pass, must end in an answer or in one clear line.

    OMP_NUM_THREADS=1 python tests/fuzz_published.py --count 2000

A case is a copy of a published model with one to three mutations: bits, lengths, files that are gone, swapped, replaced
by folders, links or pipes, JSON of another shape, safetensors with other headers, tensors or metadata, and whole models
of other specs. In half of the cases and more, an adversary has made all sums right again. No case may end in a
traceback, take over ten seconds, or raise this process's memory by more than a gibibyte; a refusal is one printable
line that names the folder; and where no sum was made right, an answer is the unharmed model's own. Prints JSON; exit
code 1 if anything was wrong.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conftest import without_pictures
from tiny import tiny_spec
from torch import Tensor

from asge_zoo.compiler.build import compile_spec
from asge_zoo.compiler.check import parts
from asge_zoo.engine.checkpoint import pack
from asge_zoo.engine.train import train
from asge_zoo.errors import ZooError
from asge_zoo.files import json_bytes, write_folder
from asge_zoo.hub.prepare import prepare
from asge_zoo.hub.published import load_published
from asge_zoo.spec import Spec, digest_of, load_spec

MODEL, CONFIG, MANIFEST = "model.safetensors", "config.json", "manifest.json"
SLOW = 10.0  # seconds
GIB = 2**30  # that a case may add to this process's memory
BASES = {
    "fusion": (),
    "best": ("prediction.kind=best",),
    "exit": ("prediction.kind=vote.early_exit", "prediction.threshold=0.3"),
}
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
ODD = (
    *(
        None,
        True,
        -1,
        0,
        1,
        7,
        0.5,
        1e308,
        1e-320,
        10**9,
        10**30,
        float("nan"),
        float("inf"),
        "",
        "../..",
        "/etc/passwd",
    ),
    *([], {}, [[[[]]]], [0] * 1000, {"kind": "x"}, "model.py", "\x00", "\x1b[2J\n", "\ud800", "ü" * 500, "a" * 100_000),
)
KINDS = {
    "data": ("digits", "mnist", "cifar10", "imagefolder", "imagenet", "cifar100", "../x", "os.system"),
    "backbone": ("vgg8", "vgg11", "timm", "__import__"),
    "pooling": ("rms", "avg", "max", "lp.pool", "gone.pool"),
    "norm": ("layer", "rms", "ff.group_norm"),
    "rule": ("asge", "bp", "ff.ff", "ff.cwc"),
    "prediction": ("fusion", "last", "best", "vote.weighted", "vote.early_exit", "ff.sum"),
}
HUGE = {
    "backbone.width": (64, 1e9, 1e-9, 63.99),
    "data.size": (1024, 10**9, 1, 16.5),
    "data.validation": (10**18, 1436),
    "rule.goodness.alpha": (1e9, 0, 1e308, 3.3),
    "train.seed": (10**40, 2**63, -1),
    "backbone.stem_stride": (4, 5),
}


# Models to mutate.


def publish(folder: Path, *overrides: str, evaluated: bool = False) -> Path:
    """Train the tiny spec, and lay what it learned down in `folder`, as `prepare` makes it; returns `folder`."""
    run = folder.with_name(f"{folder.name}-run")
    train(tiny_spec(*overrides), run_dir=run, device="cpu")
    write_folder(folder, prepare(run, "user/tiny", evaluated=evaluated, device="cpu"))
    return folder


def content_of(file: Path) -> bytes:
    """A file's bytes; OSError where it is a pipe or a device, which would keep its reader for ever."""
    if not file.is_file():
        raise FileNotFoundError(file)
    return file.read_bytes()


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header, and its data."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def joined(header: Any, data: bytes) -> bytes:
    """A safetensors file of that header and those data, whether they fit or not."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def fit(folder: Path, *, spec: bool = True, tensors: bool = True) -> None:
    """Make all sums right, as far as the files can be read: the manifest's, and the spec's and the tensors' own."""
    digest = None
    if spec:
        with contextlib.suppress(*UNREADABLE):
            config = json.loads(content_of(folder / CONFIG))
            digest = config["spec_sha256"] = digest_of(config["spec"])
            (folder / CONFIG).write_bytes(json_bytes(config))
    if tensors:
        with contextlib.suppress(*UNREADABLE):
            header, data = split(content_of(folder / MODEL))
            places = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
            sums = {name: hashlib.sha256(data[start:end]).hexdigest() for name, (start, end) in places.items()}
            header["__metadata__"]["sha256"] = json.dumps(sums)
            header["__metadata__"]["spec_sha256"] = digest or header["__metadata__"]["spec_sha256"]
            (folder / MODEL).write_bytes(joined(header, data))
    with contextlib.suppress(*UNREADABLE):
        manifest = json.loads(content_of(folder / MANIFEST))
        manifest["spec_sha256"] = digest or manifest["spec_sha256"]
        for name in manifest["sha256"]:
            if os.path.basename(name) == name and (folder / name).is_file():
                manifest["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        (folder / MANIFEST).write_bytes(json_bytes(manifest))


def forge(folder: Path, *, tensors: dict[str, Tensor] | None = None, **config: Any) -> None:
    """Put other tensors, or other fields of `config.json`, into a model, and make all sums right."""
    values = {**json.loads(content_of(folder / CONFIG)), **config}
    (folder / CONFIG).write_bytes(json_bytes(values))
    if tensors is not None:
        (folder / MODEL).write_bytes(pack(tensors, {"format": "pt", "spec_sha256": values["spec_sha256"]}))
    fit(folder)


def become(folder: Path, spec: Spec, units: int | None = None) -> None:
    """A model turns into one of another spec, untrained, whole in all but that; truncated to `units`."""
    graph, data = compile_spec(spec), parts(spec).data
    graph.truncate(units or len(graph.units))
    forge(
        folder,
        tensors=graph.state_dict(),
        spec=spec.resolved(),
        classes=list(data.info().classes),
        preprocessing=data.preprocessing().model_dump(mode="json"),
        units=len(graph.units),
    )


# Mutations: each takes a model's folder and a source of randomness.


def _file(folder: Path, draw: random.Random) -> Path:
    """A file of the model, one of those that matter more often than not."""
    names = (CONFIG, MODEL, MANIFEST) if draw.random() < 0.85 else os.listdir(folder)
    return draw.choice(sorted(folder / name for name in names if (folder / name).is_file()))


def flip_bits(folder: Path, draw: random.Random) -> None:
    file = _file(folder, draw)
    content = bytearray(file.read_bytes() or b"\0")
    end = min(len(content), draw.choice((len(content), 2000)))  # safetensors begin with their header
    for _ in range(draw.choice((1, 1, 1, 8))):
        content[draw.randrange(end)] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def cut(folder: Path, draw: random.Random) -> None:
    file = _file(folder, draw)
    content = file.read_bytes()
    file.write_bytes(content[: draw.randrange(len(content) + 1)])


def insert(folder: Path, draw: random.Random) -> None:
    file = _file(folder, draw)
    content = file.read_bytes()
    place = draw.randrange(len(content) + 1)
    file.write_bytes(content[:place] + draw.randbytes(draw.randrange(1, 64)) + content[place:])


def replace_by_noise(folder: Path, draw: random.Random) -> None:
    _file(folder, draw).write_bytes(draw.randbytes(draw.randrange(2000)))


def nest_file(folder: Path, draw: random.Random) -> None:
    depth = draw.choice((300, 900, 100_000))
    _file(folder, draw).write_text("[" * depth + draw.choice(("", "]" * depth)))


def swap(folder: Path, draw: random.Random) -> None:
    one, two = _file(folder, draw), _file(folder, draw)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def become_something_else(folder: Path, draw: random.Random) -> None:
    """A file is gone, or a folder, a link that goes nowhere, round or to another file, or a pipe."""
    path = _file(folder, draw)
    path.unlink()
    draw.choice(
        (
            lambda: None,
            path.mkdir,
            path.touch,
            lambda: path.symlink_to(path.name),
            lambda: path.symlink_to("nowhere"),
            lambda: path.symlink_to("/"),
            lambda: path.symlink_to(CONFIG),
            lambda: path.symlink_to("/dev/zero"),
            lambda: os.mkfifo(path),
        )
    )()


def add_a_file(folder: Path, draw: random.Random) -> None:
    name = draw.choice(
        ("pytorch_model.bin", "README.md.pkl", "sub/model.PY", "notes.txt", "README.md: x.so", "a\nb.sh")
    )
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"\x80\x04.")


def edit_the_card(folder: Path, draw: random.Random) -> None:
    (folder / "README.md").unlink()  # it may be a pipe
    (folder / "README.md").write_bytes(draw.choice((b"", b"# Mine\n", draw.randbytes(20_000_000))))


def change_json(folder: Path, draw: random.Random) -> None:
    """A value somewhere in a JSON file becomes an odd one, goes, or comes."""
    file = folder / draw.choice((CONFIG, CONFIG, CONFIG, MANIFEST, "metrics.json"))
    value = json.loads(content_of(file))
    _change(value, draw)
    file.write_bytes(json_bytes(value))


def _change(value: Any, draw: random.Random) -> None:
    places: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not places:
        return
    place, chance = draw.choice(places), draw.random()
    inner = value[place]
    if isinstance(inner, (dict, list)) and inner and chance < 0.8:
        _change(inner, draw)
    elif chance < 0.15:
        del value[place]
    elif chance < 0.3 and isinstance(value, dict):
        value[draw.choice(("more", "auto_map", "\x1b]0;x\n", "k" * 10_000, "__class__"))] = draw.choice(ODD)
    elif chance < 0.4:
        value[place] = _nested(draw.choice((100, 300, 600, 900)), inner)
    elif chance < 0.6 and type(inner) in (int, float):
        number: Any = inner
        value[place] = draw.choice((number + 1, number - 1, number * 2, number / 2, -number, number * 1e9, str(number)))
    else:
        value[place] = draw.choice(ODD)


def _nested(depth: int, value: Any) -> Any:
    for _ in range(depth):
        value = {"x": value}
    return value


def double_a_key(folder: Path, draw: random.Random) -> None:
    """JSON may say a thing twice; the last one counts."""
    text = content_of(folder / CONFIG).decode()
    key = draw.choice(("units", "spec_sha256", "classes", "spec", "preprocessing"))
    (folder / CONFIG).write_text(text.rstrip().removesuffix("}") + f', "{key}": {json.dumps(draw.choice(ODD))}}}\n')


def swap_a_kind(folder: Path, draw: random.Random) -> None:
    config = json.loads(content_of(folder / CONFIG))
    slot = draw.choice(sorted(KINDS))
    config["spec"][slot] = {"kind": draw.choice(KINDS[slot])}
    (folder / CONFIG).write_bytes(json_bytes(config))


def ask_for_much(folder: Path, draw: random.Random) -> None:
    """A shape or a number far beyond what the weights have."""
    config = json.loads(content_of(folder / CONFIG))
    for path in draw.sample(sorted(HUGE), draw.choice((1, 1, 2))):
        *way, last = path.split(".")
        node = config["spec"]
        for key in way:
            node = node[key]
        node[last] = draw.choice(HUGE[path])
        if path == "data.size" and type(node[last]) is int:
            config["preprocessing"] |= {"height": node[last], "width": node[last]}
    if draw.random() < 0.3:
        count = draw.choice((100, 100_000, 10**9))
        size = config["preprocessing"]["height"]
        config["spec"]["data"] = {"kind": "imagefolder", "classes": count, "size": size}
        config["classes"] = [str(label) for label in range(min(count, 100_000))]
        config["preprocessing"] |= {"channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / CONFIG).write_bytes(json_bytes(config))


def turn_into_another(folder: Path, draw: random.Random) -> None:
    """A whole model of another spec, untrained, truncated where it may not be, or not where it should."""
    spec = json.loads(content_of(folder / CONFIG))["spec"]
    slot = draw.choice(sorted(KINDS))
    spec[slot] = {"kind": draw.choice(KINDS[slot])}
    spec["backbone"] = draw.choice((spec["backbone"], {"kind": "vgg11", "width": 0.03}))
    with contextlib.suppress(ZooError):
        other = load_spec(spec)
        numbers = sum(tensor.numel() for tensor in compile_spec(other, device="meta").state_dict().values())
        if numbers < 5_000_000:
            become(folder, other, draw.choice((None, None, 1, 3, 6)))


def truncate(folder: Path, draw: random.Random) -> None:
    """Fewer units than the prediction runs, and no tensor of the others."""
    header, data = split(content_of(folder / MODEL))
    count = draw.randrange(1, 7)
    gone = [name for unit in range(count, 8) for name in (f"local.{unit}.", f"backbone.conv{unit + 1}.")]
    kept = {name: entry for name, entry in header.items() if not name.startswith(tuple(gone))}
    (folder / MODEL).write_bytes(_packed(kept, data))
    config = json.loads(content_of(folder / CONFIG))
    (folder / CONFIG).write_bytes(json_bytes({**config, "units": count}))


def _packed(header: dict[str, Any], data: bytes) -> bytes:
    """Those of the header's tensors, one behind another."""
    parts, at, entries = [], 0, {}
    for name, entry in header.items():
        if name == "__metadata__":
            entries[name] = entry
            continue
        start, end = entry["data_offsets"]
        parts.append(data[start:end])
        entries[name] = {**entry, "data_offsets": [at, at + end - start]}
        at += end - start
    return joined(entries, b"".join(parts))


def change_header(folder: Path, draw: random.Random) -> None:
    """A tensor's type, shape, place or name, or the metadata, become others; or the header's own length."""
    header, data = split(content_of(folder / MODEL))
    name = draw.choice(sorted(header))
    entry = header[name]
    types = ("F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2", "F4", "I64", "U64", "U8", "BOOL", "C64", "X", None, 3)
    sizes = ([], [0], [-1], [2**63], [2**32, 2**32], [1] * 5000, [entry.get("shape")], "x", None)
    places = ([0, 2**63], [-4, 4], [8, 4], [0, 0], [0, len(data)], [0], {}, [0.5, 8])
    kind = draw.choice(("dtype", "shape", "data_offsets", "name", "gone", "more", "metadata", "length", "odd"))
    if kind == "length":
        length = draw.choice((2**63, 2**64 - 1, 10**8, 2**32, 0, 1, len(data)))
        content = content_of(folder / MODEL)
        (folder / MODEL).write_bytes(length.to_bytes(8, "little") + content[8:])
        return
    if kind == "name":
        header[draw.choice(("head.unit", "../x", "\x1b[2J", "n" * 100_000, "backbone.conv1.weight"))] = header.pop(name)
    elif kind == "gone":
        del header[name]
    elif kind == "more":
        header["more"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}
    elif kind == "metadata":
        odd = draw.choice(
            (None, {}, {"format": "pt"}, {"sha256": "[" * 5000}, {"sha256": "{}", "spec_sha256": "x"}, [])
        )
        header["__metadata__"] = odd
    elif kind == "odd":
        header[name] = draw.choice(ODD)
    else:
        entry[kind] = draw.choice({"dtype": types, "shape": sizes, "data_offsets": places}[kind])
    (folder / MODEL).write_bytes(joined(header, data))


def change_numbers(folder: Path, draw: random.Random) -> None:
    """A tensor's numbers, whole ones among them, become huge, negative or none."""
    header, data = split(content_of(folder / MODEL))
    names = sorted(name for name in header if name != "__metadata__")
    name = draw.choice([*names, *["head.unit"] * ("head.unit" in header) * 20])
    start, end = header[name]["data_offsets"]
    filling = draw.choice((b"\xff", b"\x7f", b"\x00", b"\x00\x00\xc0\x7f", b"\xff\xff\x7f\x7f"))
    filled = (filling * (end - start))[: end - start]
    (folder / MODEL).write_bytes(joined(header, data[:start] + filled + data[end:]))


MUTATIONS: tuple[Callable[[Path, random.Random], None], ...] = (
    *(flip_bits, flip_bits, cut, insert, replace_by_noise, nest_file, swap, become_something_else, add_a_file),
    *(edit_the_card, change_json, change_json, change_json, change_json, double_a_key, swap_a_kind, ask_for_much),
    *(turn_into_another, truncate, change_header, change_header, change_header, change_numbers),
)


@dataclass
class FuzzReport:
    """What came of it.

    Attributes:
        cases: models mutated.
        forged: those of them whose sums were made right.
        loaded: that gave an answer.
        refused: by one line.
        slowest: seconds of the slowest case, and which it was.
        most_memory: MiB that a case added, at most, and which it was; 0 where the system does not tell.
        reasons: how often models were refused for what.
        problems: what was wrong.
    """

    cases: int = 0
    forged: int = 0
    loaded: int = 0
    refused: int = 0
    slowest: tuple[float, str] = (0.0, "")
    most_memory: tuple[int, str] = (0, "")
    reasons: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


class TookTooLong(BaseException):
    """A case hangs: no handler may catch it."""


class Fuzzer:
    """The models that are mutated, and what they answer."""

    def __init__(self, work: Path) -> None:
        self.work, self.report = work, FuzzReport()
        with without_pictures():
            self.bases = [publish(work / name, *overrides) for name, overrides in BASES.items()]
        self.bases.append(Path(shutil.copytree(self.bases[0], work / "photos")))
        become(self.bases[-1], load_spec(PHOTOS))
        self.right = [_answer(base) for base in self.bases]

    def case(self, number: int, draw: random.Random) -> None:
        """One model, mutated and loaded."""
        chosen = draw.randrange(len(self.bases))
        folder = self.work / "case"
        shutil.copytree(self.bases[chosen], folder)
        applied = []
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            mutation = draw.choice(MUTATIONS)
            with contextlib.suppress(*UNREADABLE), _alarm(SLOW):  # nothing is left to mutate
                mutation(folder, draw)
                applied.append(mutation.__name__)
        forged = draw.random() < 0.7
        if forged:
            fit(folder, spec=draw.random() < 0.9, tensors=draw.random() < 0.9)
        forged = forged or "turn_into_another" in applied
        self.report.cases += 1
        self.report.forged += forged
        what = f"case {number} ({self.bases[chosen].name}: {', '.join(applied)}{', sums made right' * forged})"
        before, started = _reset_peak(), time.perf_counter()
        try:
            with _alarm(3 * SLOW):
                answer = _answer(folder)
            self.report.loaded += 1
            if not forged and not torch.equal(answer, self.right[chosen]):
                self._note(what, "takes wrong weights as right")
        except ZooError as error:
            self._refused(what, folder, str(error))
        except (Exception, TookTooLong):
            self._note(what, traceback.format_exc())
        seconds, memory = time.perf_counter() - started, _peak() - before
        if seconds > SLOW or memory > GIB:
            self._note(what, f"took {seconds:.1f} s and {memory / GIB:.2f} GiB")
        self.report.slowest = max(self.report.slowest, (seconds, what))
        self.report.most_memory = max(self.report.most_memory, (memory >> 20, what))
        shutil.rmtree(folder)

    def _refused(self, what: str, folder: Path, message: str) -> None:
        self.report.refused += 1
        file, _, reason = message.removeprefix(f"{folder}/").partition(": ")
        self.report.reasons[f"{file}: {' '.join(reason.split()[:4])}"[:60]] += 1
        if not message.startswith(str(folder)) or not message.isprintable() or len(message) > 2000:
            self._note(what, f"said {message[:3000]!r}")

    def _note(self, what: str, problem: str) -> None:
        self.report.problems.append(f"{what}: {problem}")


# Pictures in colour, a network of timm's with its batch norms, and more classes.
PHOTOS: dict[str, Any] = {
    "name": "photos",
    "data": {"kind": "imagefolder", "classes": 12, "size": 32},
    "backbone": {"kind": "timm", "name": "resnet10t", "width": 0.1},
}


def _answer(folder: Path) -> Tensor:
    """What a model makes of two images."""
    model = load_published(folder)
    shape = (2, model.preprocessing.height, model.preprocessing.width, model.preprocessing.channels)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model.graph.classify(model.preprocessing.normalize(pixels))[0]


def _reset_peak() -> int:
    """The process's memory, in bytes, from which its peak is counted anew."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS:")


def _peak() -> int:
    return _memory("VmHWM:")


def _memory(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """What runs within ends with TookTooLong after so long."""

    def ring(*_: Any) -> None:
        raise TookTooLong(f"over {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fuzz(work: Path, *, first: int, count: int, seed: int) -> FuzzReport:
    """Mutate and load so many times; `work` is an empty folder."""
    fuzzer = Fuzzer(work)
    room = _memory("VmSize:") + 3 * GIB  # what asks for more is refused by the system, and no other process suffers
    resource.setrlimit(resource.RLIMIT_AS, (room, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for number in range(first, first + count):
        fuzzer.case(number, random.Random(seed * 1_000_003 + number))
    return fuzzer.report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="Number of the first case.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as work:
        report = fuzz(Path(work), first=options.first, count=options.count, seed=options.seed)
    print(json.dumps(vars(report), indent=2))
    return bool(report.problems)


if __name__ == "__main__":
    sys.exit(main())
