"""What must be true of processes: workers, ranks and kills change no result, and a run ends in one line.

On two tasks of the miniature with hardly any training, as in test_experiments.py.
"""

import io
import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

import reproduce
import wemoe
from data import experiments
from data.files import alone
from data.miniature import suite as miniature
from data.test_experiments import HERE, run_small, small_miniature, without_timings  # noqa: F401 (one is a fixture)


@pytest.fixture
def small(tmp_path):
    return lambda *arguments, output="results": run_small(tmp_path / output, *arguments)


forked = pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has loaded everything already")


def in_fork(function, *arguments) -> BaseProcess:
    """A fork that runs a function, whose result is its exit status."""
    process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(function(*arguments)))
    process.start()
    return process


def ended(process: BaseProcess) -> int | None:
    """Its exit status, when it has one; None if it has none after five minutes."""
    process.join(300)
    return process.exitcode


def test_processes_that_do_not_meet_are_told_so(small, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert small("--methods", "individual")[0] == 2
    assert "error: WORLD_SIZE is set, but the processes do not meet (" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="workers that are not forked do not see the patched entropy")
def test_an_error_in_a_worker_is_reported_like_any_other(small, monkeypatch, capsys):
    small("--methods", "individual")
    monkeypatch.setattr(wemoe, "entropy", lambda logits: logits.sum(-1) * math.nan)
    assert small("--workers", "2", "--methods", "WEMoE", "WEMoE (1-layer)")[0] == 2
    assert "The entropy of task 'Signs' is nan at step 1 of 2" in capsys.readouterr().err


@forked
def test_two_processes_give_what_one_gives(small, tmp_path):
    """Each finds its place in the environment, as torchrun tells it; they share tasks, images and batches."""
    run = partial(small, "--methods", "Individual", "WEMoE", "--device", "cpu", "--steps", "4")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # which is free
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def process(number: str) -> int:
        os.environ.update(place, RANK=number, LOCAL_RANK=number)
        return run(output="two")[0]

    status, one = run(output="one")
    assert [ended(fork) for fork in [in_fork(process, number) for number in "01"]] == [status, 0]
    two = json.loads((tmp_path / "two/miniature/results.json").read_text())
    for ours, theirs in zip(two["methods"], one["methods"]):
        assert ours["accuracy"] == theirs["accuracy"]
    curves = [results["methods"][0]["adaptation"]["entropy"] for results in (one, two)]
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
    files = (next((tmp_path / run).rglob("adaptation.pt")) for run in ("one", "two"))
    routers = [torch.load(file, weights_only=True)["trained"] for file in files]
    for name, p in routers[0].items():
        torch.testing.assert_close(p, routers[1][name], atol=1e-4, rtol=1e-4)


def test_a_run_leaves_a_folder_to_the_run_that_has_it(small, tmp_path, capsys):
    (tmp_path / "results/miniature").mkdir(parents=True)
    with alone(tmp_path / "results/miniature"):
        assert small("--methods", "pre-trained")[0] == 2
    assert "another run is writing into" in capsys.readouterr().err
    assert small("--methods", "pre-trained")[1]


DEATHS = [  # at the end of a function or in the middle of what it writes, in the order in which a run comes there
    (miniature, "render", None),
    (torch.optim.AdamW, "step", None),
    (os, "fsync", None),
    (Path, "replace", None),
    (torch.optim.Adam, "step", None),
    (torch, "save", lambda _, path: path.write_bytes(b"PK")),
    (torch, "save", None),
    (Path, "write_text", lambda path, text: path.write_bytes(text.encode()[: len(text) // 2])),
    (Path, "write_text", None),
]


def dying(owner, name: str, half, run) -> None:
    """Run, and die when this function is called for the first time."""
    original = getattr(owner, name)

    def fatal(*args, **kwargs):
        (half or original)(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, fatal)
    run()


@forked
def test_killed_again_and_again_it_ends_with_the_same_results(small, tmp_path, monkeypatch):
    """Killed as it renders, fine-tunes, adapts, and writes: before, in the middle of it, and after."""
    methods = ["individual", "WEMoE", "Concrete Task Arithmetic"]
    run = partial(small, "--methods", *methods, "--tasks", "signs", "--steps", "3")
    silent = replace(reproduce.EXPERIMENTS["main"], show=lambda _: experiments.Shown())
    monkeypatch.setitem(reproduce.EXPERIMENTS, "main", silent)
    status, expected = run(output="whole")
    for place in DEATHS:
        assert ended(in_fork(dying, *place, run)) == -signal.SIGKILL, place
    again, results = run()
    assert again == status and without_timings(results) == without_timings(expected)
    assert not list(tmp_path.rglob("*.part"))


@forked
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_a_run_and_its_workers(number, small, tmp_path):
    def run() -> int:
        os.setsid()  # a process group of its own
        return small("--methods", "WEMoE", "E-WEMoE", "--steps", "9999", "--workers", "2")[0]

    process, adapting = in_fork(run), tmp_path / "results/miniature/cache"
    wait_until(lambda: any(adapting.glob("*wemoe*")))
    os.kill(process.pid, number)
    assert ended(process) == (-number if number == signal.SIGKILL else 130)
    wait_until(lambda: not group_exists(process.pid))
    assert small("--methods", "pre-trained")[0] in (0, 1)  # the folder is free again


def wait_until(condition) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("waited for a minute")


def group_exists(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_signal_while_libraries_load_ends_it_without_a_traceback():
    command = [sys.executable, "-X", "importtime", HERE / "reproduce.py"]  # says which modules are there
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert any("torch" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 or os.name == "nt"
    assert "interrupted" in error and "Traceback" not in error


def test_a_terminal_without_a_tick_gets_something_else(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    monkeypatch.setattr(reproduce, "run", lambda _: print("\u2713") or True)
    assert reproduce.main(["--output", str(tmp_path)]) == 0
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == b"?\n"
