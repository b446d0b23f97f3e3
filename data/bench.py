"""Time and memory of WEMoE beside the dense model and the loop over samples: `python reproduce.py bench`.

Times are medians of interleaved runs; peak memory is that of a process of its own. Weights are random.
"""

import argparse
import copy
import ctypes
import gc
import json
import multiprocessing
import platform
import re
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import open_clip
import torch
from torch import Tensor, nn

import wemoe
from data import report
from data.baselines import LowRankLinear
from data.files import Parser, check_numbers, check_output, write
from data.paper.hub import ARCHITECTURES, preprocessing
from data.processes import choose_device, say
from data.suite import precision


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="reproduce.py bench",
        description="Time and memory of WEMoE beside the dense model and a loop over samples, with random weights.",
        epilog="Exit status: 0 if every bound is kept, 1 if one is not, 2 for a usage error or bad input.",
    )
    add = parser.add_argument
    add("--arch", default="ViT-B-32", choices=ARCHITECTURES, help="default: %(default)s")
    add("--tasks", type=int, default=8, metavar="T", help="default: %(default)s")
    add("--batch", type=int, nargs="+", metavar="B", help="default: 16 64, on a GPU 16 128")
    add("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    add("--precision", choices=("float32", "bfloat16", "tf32"), default="float32", help="default: %(default)s")
    add("--output", type=Path, default=Path("results"), help="a folder (default: %(default)s)")
    parsed = parser.parse_args(arguments)
    check_output(parsed.output)
    parsed.device = choose_device(parsed.device)
    check_numbers(parsed, {"tasks": 1, "batch": 1})
    parsed.batch = sorted({*(parsed.batch or (16, 64 if parsed.device == "cpu" else 128))})
    return parsed


def bench(arguments: list[str]) -> bool:
    """Measure, and write results/bench. Returns whether every bound is kept."""
    parsed = parse(arguments)
    arch, tasks, device, kind = parsed.arch, parsed.tasks, parsed.device, parsed.precision
    output, gpu = parsed.output / "bench", parsed.device != "cpu"
    torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
    machine = torch.cuda.get_device_name(device) if gpu else f"{cpu_name()}, {torch.get_num_threads()} threads"
    say(f"{arch}, {tasks} tasks, {kind}; {machine}")
    times = {"batch": {}, "step": {}, "tasks": {}}  # seconds of forward passes and steps by B, of forward passes by T
    results = {"arch": arch, "num_tasks": tasks, "machine": machine, "precision": kind, "rows": [], **times}

    def row(what: str, value: float, bound: float, most: bool = True) -> None:
        holds = value <= bound if most else value >= bound
        results["rows"].append({"what": what, "measured": round(value, 2), "bound": bound, "holds": holds})
        write(output / "results.json", lambda path: path.write_text(json.dumps(results, indent=1)))
        say(f"{'✓' if holds else '✗'} {what}: {value:.2f} ({'at most' if most else 'at least'} {bound})")

    def forwards(x: Tensor, **models: nn.Module) -> dict[str, float]:
        return medians({name: forward_of(model, x, kind) for name, model in models.items()}, x.device)

    dense, ours, loop = random_towers(arch, tasks, device)
    x = random_images(arch, 3, device)
    expected, found = (forward_of(model, x, "float32")() for model in (loop, ours))
    if (error := (expected - found).abs().max() / expected.abs().max()) > (1e-2 if kind == "tf32" else 1e-4):
        raise FloatingPointError(f"what is timed differs from the loop by {error:.1e} of the largest output")
    least = parsed.batch[0]
    for batch in parsed.batch:
        x = random_images(arch, batch, device)
        seconds = times["batch"][batch] = forwards(x, dense=dense, ours=ours, loop=loop)
        row(f"forward, B = {batch}: ours / dense", seconds["ours"] / seconds["dense"], 2.0 if gpu else 1.4)
        if gpu or batch == least:
            row(f"forward, B = {batch}: loop / ours", seconds["loop"] / seconds["ours"], 20 if gpu else 3.5, most=False)
            models = {"dense": dense, "ours": ours}
            seconds = times["step"][batch] = medians({k: step_of(m, x, kind) for k, m in models.items()}, x.device)
            row(f"adaptation step, B = {batch}: ours / dense", seconds["ours"] / seconds["dense"], 2.0)
    x = random_images(arch, least, device)
    times["tasks"][tasks] = times["batch"][least]
    for count in (2, 20):
        _, more, more_loop = random_towers(arch, count, device)
        seconds = forwards(x, dense=dense, ours=more, loop=more_loop, usual=ours)
        growth = seconds["ours"] / seconds.pop("usual")
        times["tasks"][count] = seconds
    row(f"forward, B = {len(x)}: 20 tasks / {tasks} tasks", growth, 1.25)
    del more, more_loop, loop
    _, low, _ = random_towers(arch, tasks, device, layer=partial(LowRankLinear, rank=16))
    seconds = results["rank 16"] = forwards(x, dense=dense, low=low)
    row(f"forward, B = {len(x)}: rank 16 / dense", seconds["low"] / seconds["dense"], 1.25)
    del low
    _, constant, _ = random_towers(arch, tasks, device, router_depth=0)
    seconds = results["unloaded"] = forwards(x, dense=dense, unloaded=wemoe.unload(constant))
    row(f"forward, B = {len(x)}: 0 layers, unloaded / dense", seconds["unloaded"] / seconds["dense"], 1.1)
    del constant, ours, dense
    peaks = [peak_bytes(step_alone, which, arch, tasks, len(x), device, kind) for which in (0, 1)]
    results["peak_bytes"] = dict(zip(("dense", "ours"), peaks))
    row(f"memory of a step, B = {len(x)}, beyond the model: ours / dense", peaks[1] / peaks[0], 1.5)
    figure = report.draw_times(times["batch"], dict(sorted(times["tasks"].items())))
    write(output / "time.png", partial(report.save, figure))
    say(f"Results and a plot are in {output}/.")
    return all(row["holds"] for row in results["rows"])


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.machine()


# ---- What is timed ---------------------------------------------------------------------------------------------------


class PerSampleLoop(nn.Module):
    """What a WEMoE module computes, word by word, and as the authors' library does: one sample after another, each
    through weights merged for it alone, one task vector after another."""

    def __init__(self, module: nn.Module, task_vectors: list[dict[str, Tensor]], router: nn.Module):
        super().__init__()
        self.module, self.task_vectors, self.router = module, task_vectors, router

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for sample, lam in zip(x, self.router(x)):
            theta = dict(self.module.named_parameters())
            for lam_t, tau in zip(lam, self.task_vectors):
                theta = {name: p + lam_t * tau[name] for name, p in theta.items()}
            outputs.append(torch.func.functional_call(self.module, theta, (sample[None],)))
        return torch.cat(outputs)


@torch.no_grad()
def random_towers(arch: str, tasks: int, device: str, **options) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A vision tower with random weights, one upscaled from it and `tasks` others near it, and the latter as a loop."""
    torch.manual_seed(0)
    dense = open_clip.CLIP(**open_clip.get_model_config(ARCHITECTURES[arch].model)).visual.eval().requires_grad_(False)
    finetuned = [copy.deepcopy(dense) for _ in range(tasks)]
    for p in (p for model in finetuned for p in model.parameters()):
        p.add_(torch.randn_like(p), alpha=1e-3)
    ours = wemoe.upscale(dense, finetuned, **options)
    routed = {name: module for name, module in ours.named_modules() if isinstance(module, wemoe.WEMoE)}
    loop = copy.deepcopy(ours, {id(p): p for p in [*ours.parameters(), *ours.buffers()]})  # shares the weights
    for name, module in routed.items():
        theta = dense.get_submodule(name)
        tau = [wemoe.task_vector(theta, model.get_submodule(name)) for model in finetuned]
        tau = [{entry: value.to(device) for entry, value in vector.items()} for vector in tau]
        for model in finetuned:
            model.set_submodule(name, nn.Identity())  # its memory is needed
        loop.set_submodule(name, PerSampleLoop(copy.deepcopy(theta), tau, module.router))
    for name, p in dense.named_parameters():  # what a step is compared with: one weight's gradient in each MLP
        p.requires_grad_(name.endswith("mlp.c_fc.weight"))
    return dense.to(device), ours.to(device), loop.to(device)


def random_images(arch: str, batch: int, device: str) -> Tensor:
    return torch.randn(batch, 3, *preprocessing(ARCHITECTURES[arch]).size, device=device)


def forward_of(model: nn.Module, x: Tensor, kind: str) -> Callable[[], Tensor]:
    return torch.no_grad()(precision(x.device, kind)(partial(model, x)))


def step_of(model: nn.Module, x: Tensor, kind: str) -> Callable[[], None]:
    """One task's part of a step of adaptation: forward, entropy, backward."""

    def step() -> None:
        with precision(x.device, kind):
            features = model(x)
        head = torch.linspace(-1, 1, 100 * features.shape[1], device=x.device).view(features.shape[1], 100)
        wemoe.mean_entropy(features.float() @ head).backward()
        model.zero_grad()

    return step


def step_alone(which: int, arch: str, tasks: int, batch: int, device: str, kind: str) -> tuple[Callable, torch.device]:
    """For a process of its own: a step of the dense model (0) or of ours (1), after a small one that warms up."""
    model, x = random_towers(arch, tasks, device)[which], random_images(arch, batch, device)
    step_of(model, x[:1], kind)()
    return step_of(model, x, kind), x.device


# ---- How it is measured ----------------------------------------------------------------------------------------------


def medians(functions: dict[str, Callable[[], object]], device: torch.device, seconds: float = 20) -> dict[str, float]:
    """Seconds that each function takes: the median of three to fifty runs, all functions taking turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    for function in functions.values():
        function()  # the first run allocates and chooses algorithms
    end = time.perf_counter() + seconds
    for run in range(50):
        if run >= 3 and time.perf_counter() > end:
            break
        for name, function in functions.items():
            wait()
            start = time.perf_counter()
            function()
            wait()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


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
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # freed memory goes back (glibc), lest the call find it there
    before, clear = resident_bytes("VmRSS"), Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # the highest so far is now
    call()
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the highest so far, in bytes on macOS
    return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))
