"""Time and memory of WEMoE beside the dense model and the loop over samples: `python reproduce.py bench`.

Times are medians of torch.utils.benchmark, memory is what torch allocates; weights are random. The loop is MergedLayer.
"""

import argparse
import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import open_clip
import torch
from pandas import DataFrame
from torch import Tensor, nn
from torch.utils.benchmark import Measurement, Timer

import wemoe
from data import figures
from data.paper.hub import ARCHITECTURES
from data.run import say


def bench(arguments: list[str]) -> bool:
    """Measure, and write results/bench. Returns whether every bound is kept."""
    parser = argparse.ArgumentParser(prog="reproduce.py bench", description=__doc__.split(":")[0])
    parser.add_argument("--arch", default="ViT-B-32", choices=ARCHITECTURES, help="default: %(default)s")
    parser.add_argument("--tasks", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--batch", type=int, nargs="+", help="default: 16 64, on a GPU 16 128")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("results"), help="a folder (default: %(default)s)")
    parsed = parser.parse_args(arguments)
    device, gpu, half = torch.device(parsed.device), parsed.device != "cpu", parsed.precision == "bfloat16"
    rows, machine = [], torch.cuda.get_device_name(device) if gpu else f"{torch.get_num_threads()} threads of a CPU"
    (folder := parsed.output / "bench").mkdir(parents=True, exist_ok=True)
    results = {**vars(parsed), "machine": machine, "rows": rows}

    def run(model: nn.Module, x: Tensor, step: bool) -> None:
        """A forward pass, or one task's part of a step of adaptation: forward, entropy, backward."""
        with torch.set_grad_enabled(step), torch.autocast(device.type, torch.bfloat16, half):
            loss = wemoe.entropy(100 * model(x)).mean()
        if step:
            loss.backward()
            model.zero_grad()

    def compare(what: str, bound: float, batch: int, measure: Callable, step: bool = False, **models: nn.Module):
        """A row: what the first model takes, divided by what the second one does."""
        x = torch.randn(batch, 3, *dense.image_size, device=device)
        found = measure({name: partial(run, model.to(device), x, step) for name, model in models.items()})
        (first, value), (second, other) = found.items()
        rows.append({"what": what, "batch": batch, "found": found, "ratio": value / other, "bound": bound})
        (folder / "results.json").write_text(json.dumps(results, default=str, indent=1), encoding="utf-8")
        text = f"{what}, B = {batch}: {first} / {second} = {value / other:.2f} (at most {bound})"
        say(f"{'✓' if value / other <= bound else '✗'} {text}")

    make = partial(towers, parsed.arch, parsed.tasks)
    (dense, ours), (least, *larger) = make(), sorted(parsed.batch or (16, 128 if gpu else 64))
    compare("loop", 0.1 if gpu else 0.4, least, seconds, ours=ours, loop=make(layer=wemoe.MergedLayer)[1])
    for batch in (least, *larger):
        compare("forward", 2.0 if gpu else 1.4, batch, seconds, ours=ours, dense=dense)
    compare("step", 2.0, least, seconds, step=True, ours=ours, dense=dense)
    compare("memory of a step", 1.5, least, peak_bytes, step=True, ours=ours, dense=dense)
    compare("20 tasks", 1.25, least, seconds, more=towers(parsed.arch, 20)[1], ours=ours)
    points = [{"panel": r["what"], "label": k, "x": r["batch"], "y": y} for r in rows for k, y in r["found"].items()]
    figures.lines(DataFrame(points).assign(published=False), "batch size", "").savefig(folder / "time.png", dpi=150)
    return all(row["ratio"] <= row["bound"] for row in rows)


@torch.no_grad()
def towers(arch: str, tasks: int, **options) -> tuple[nn.Module, nn.Module]:
    """A vision tower with random weights, and one that is upscaled from it and `tasks` others near it."""
    dense = open_clip.CLIP(**open_clip.get_model_config(f"{arch}-quickgelu")).visual.eval()
    finetuned = [copy.deepcopy(dense) for _ in range(tasks)]
    for p in (p for model in finetuned for p in model.parameters()):
        p.add_(torch.randn_like(p), alpha=1e-3)
    for name, p in dense.named_parameters():  # what a step is compared with: one weight's gradient in each MLP
        p.requires_grad_(name.endswith("mlp.c_fc.weight"))
    return dense, wemoe.upscale(dense, finetuned, **options)


def seconds(calls: dict[str, Callable]) -> dict[str, float]:
    """The median of three rounds, in which all calls take turns."""
    found, threads = {name: [] for name in calls}, torch.get_num_threads()
    for name, call in [*calls.items()] * 3:
        timer = Timer("call()", globals={"call": call}, num_threads=threads)
        found[name].append(timer.blocked_autorange(min_run_time=1))
    return {name: Measurement.merge(rounds)[0].median for name, rounds in found.items()}


def peak_bytes(calls: dict[str, Callable]) -> dict[str, int]:
    """The most that a call has in memory beyond what is there before: of all that it takes and gives back, in turn."""
    found = {}
    for name, call in calls.items():
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            call()
        taken = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        found[name] = int(torch.tensor(taken).cumsum(0).max())
    return found
