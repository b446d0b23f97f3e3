"""Time and memory of functions, side by side: medians of interleaved runs, and peak memory in a process of its own."""

import ctypes
import gc
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def medians(functions: dict[str, Callable[[], object]], device: torch.device, seconds: float = 20) -> dict[str, float]:
    """Seconds that each function takes: the median of at least three runs, all functions taking turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()  # the first run allocates and chooses algorithms
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < 3 or (time.perf_counter() < end and len(next(iter(times.values()))) < 50):
        for name, function in functions.items():
            synchronise(device)
            start = time.perf_counter()
            function()
            synchronise(device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(function: Callable, *arguments) -> int:
    """Memory that a call takes beyond what is there before, in a fresh process: function(*arguments) -> the call.

    On a GPU what torch allocates, on Linux the process's resident memory, elsewhere its highest so far.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure_peak, (function, *arguments))


def measure_peak(function: Callable, *arguments) -> int:
    call, device = function(*arguments)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        call()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # bytes on macOS
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # freed memory goes back (glibc), lest the call find it there
    before = kilobytes(status, "VmRSS")
    clear.write_text("5")  # the highest so far is now
    call()
    return 1024 * (kilobytes(status, "VmHWM") - before)


def kilobytes(status: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))
