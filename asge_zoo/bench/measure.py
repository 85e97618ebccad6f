"""Time and memory of functions that each do one step."""

import ctypes
import gc
import json
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], object]
Key = TypeVar("Key")
GPU_CALLS = 10


def seconds(run: Run, device: torch.device, calls: int = 1) -> float:
    """Wall time of a call, of so many in a row, the device's work included."""
    _wait(device)
    started = time.perf_counter()
    for _ in range(calls):
        run()
    _wait(device)
    return (time.perf_counter() - started) / calls


def step_seconds(run: Run, device: torch.device) -> float:
    """Seconds of a training step.

    On a GPU of `GPU_CALLS` in a row, as in training, where the host prepares a step while the GPU does the one before.
    """
    return seconds(run, device, GPU_CALLS if device.type == "cuda" else 1)


def rounds(timers: Mapping[Key, Callable[[], float]], count: int) -> dict[Key, list[float]]:
    """What each timer says in each of `count` rounds, by key; a round asks all in turn: what else runs meets all."""
    found: dict[Key, list[float]] = {key: [] for key in timers}
    for _ in range(count):
        for key, timer in timers.items():
            found[key].append(timer())
    return found


def peak_bytes(run: Run, device: torch.device) -> int:
    """The most bytes that a call holds at once beyond what was held before it.

    CUDA's own counter, or on the CPU the allocator's events as torch.profiler has them.
    """
    gc.collect()
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = peak = 0
    for size in _allocations(profiler):
        held += size
        peak = max(peak, held)
    return peak


def _allocations(profiler: profile) -> list[int]:
    """Bytes of each allocation, negative where they are freed, in order."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        trace = json.loads(file.read_text(encoding="utf-8"))
    events = [event for event in trace["traceEvents"] if event.get("name") == "[memory]"]
    return [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]


def process_peak_bytes(run: Run) -> int | None:
    """The most resident memory that the process has during a call beyond what it had before; None off Linux.

    A check of `peak_bytes` on the CPU, for what no profiler sees, such as a library's own scratch memory; an upper
    bound where the process keeps what it has freed (`process.keep_freed_memory`): new maps spread over its holes.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc may have kept what was freed
        reset.write_text("5")  # the peak becomes what is resident now
    except (OSError, AttributeError):
        return None
    before = _resident(status, "VmRSS")
    run()
    return _resident(status, "VmHWM") - before


def _resident(status: Path, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", status.read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
