"""What must be true of reproduce.py and of a run: processes, kills and the machine change no result, errors are lines.

On two tasks of the miniature with hardly any training (conftest.py).
"""

import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import reproduce
import wemoe
from data import experiments, run
from data.methods import ADAPTATION, METHODS
from data.miniature import tasks

HERE = Path(__file__).parents[1]
FEW = ["--steps", "4", "--methods", "individual", "WEMoE", "AdaMerging (layer-wise)", "Concrete Task Arithmetic"]


SMALL = """
import runpy
from pytest import MonkeyPatch
from data.conftest import shrink
shrink(MonkeyPatch())
runpy.run_path("reproduce.py", run_name="__main__")
"""


def started(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    """The program in a process group of its own, on two tasks with small models, as the fixture `small` has it."""
    given = [*("--tasks", "Signs", "Digits", "--device", "cpu", "--output", folder), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    options = {"cwd": HERE, "env": environment, "stderr": subprocess.PIPE, "start_new_session": True}
    return subprocess.Popen([sys.executable, "-c", SMALL, *map(str, given)], **options)


def untimed(results: dict) -> dict:
    return {**results, "methods": [{**m, "seconds": 0, "evaluation_seconds": 0} for m in results["methods"]]}


# ---- Results ---------------------------------------------------------------------------------------------------------


def test_results_are_those_of_the_contract(small, tmp_path, capsys):
    status, results = small()
    assert status == (0 if all(claim["holds"] for claim in results["claims"]) else 1)
    assert {"suite": "miniature", "seed": 0, "device": "cpu", "tasks": ["Signs", "Digits"]}.items() <= results.items()
    assert results["versions"]["torch"] == torch.__version__
    assert [m["name"] for m in results["methods"]] == [name for name in METHODS if name in experiments.STORY]
    for method in results["methods"]:
        assert (ADAPTATION in method["needs"]) == ("adaptation" in method)
        assert method["average"] == pytest.approx(sum(method["accuracy"].values()) / 2, abs=0.011)
        assert set(method["accuracy"]) == {"Signs", "Digits"}
    methods = {method["name"]: method for method in results["methods"]}
    assert methods["WEMoE"]["trainable_parameters"] == 2 * (32 * 32 + 32 + 32 * 2 + 2)  # two blocks of width 32
    assert methods["Individual"]["total_parameters"] == 2 * methods["Pre-trained"]["total_parameters"]
    assert methods["WEMoE"]["adaptation"]["steps"] == [0, 2]
    assert [point["scaling"] for point in methods["Task Arithmetic"]["curve"]] == [0.2, 0.3, 0.4]
    folder, printed = tmp_path / "results" / "miniature", capsys.readouterr().out
    assert {"accuracy.png", "adaptation.png", "routing.png", "tasks.png"} <= {file.name for file in folder.iterdir()}
    assert all(name in (folder / "table.md").read_text(encoding="utf-8") for name in experiments.STORY)
    assert all(claim["claim"] in " ".join(printed.split()) for claim in results["claims"])
    assert all(len(line) <= 100 or str(tmp_path) in line for line in printed.splitlines())


def test_what_the_miniature_merges_is_the_shipped_tower(small, monkeypatch):
    """Which the other tests replace: it knows most of the answers before any training."""
    monkeypatch.setattr(tasks, "load_pretrained", tasks.load_pretrained.__globals__["SHIPPED"])
    (method,) = small("--methods", "pre-trained")[1]["methods"]
    assert method["average"] > 50 and method["total_parameters"] > 10**6


def test_two_workers_give_what_one_gives_and_another_seed_something_else(small):
    _, one = small(*FEW, output="one")
    _, two = small(*FEW, "--workers", "2", output="two")
    _, other = small(*FEW, "--seed", "1", output="other")
    assert untimed(one) == untimed(two)
    curves = [next(m["adaptation"] for m in results["methods"] if m["name"] == "WEMoE") for results in (one, other)]
    assert curves[0] != curves[1]


def test_two_ranks_give_what_one_gives(small, tmp_path):
    """Each finds its place in the environment, as torchrun tells it; they share tasks, inputs and batches."""
    arguments = ["--methods", "Individual", "WEMoE", "--steps", "4"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # which is free

    ports = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [{**ports, "RANK": number, "LOCAL_RANK": number} for number in "01"]
    processes = [started(tmp_path / "two", *arguments, **rank) for rank in ranks]
    status, one = small(*arguments, output="one")
    assert [process.wait(300) for process in processes] == [status, 0]
    two = json.loads((tmp_path / "two/miniature/results.json").read_text(encoding="utf-8"))
    for ours, theirs in zip(one["methods"], two["methods"]):
        assert ours["accuracy"] == theirs["accuracy"]
        if "adaptation" in ours:
            assert ours["adaptation"]["entropy"] == pytest.approx(theirs["adaptation"]["entropy"], abs=1e-4)


# ---- What is kept, and interruptions ---------------------------------------------------------------------------------


def test_what_is_finished_is_kept_and_any_other_argument_runs_anew(small, capsys, monkeypatch):
    seen = []
    measured = wemoe.adapt
    monkeypatch.setattr(wemoe, "adapt", lambda *args, **options: seen.append(1) or measured(*args, **options))
    _, first = small("--methods", "WEMoE")
    assert "There from before" not in capsys.readouterr().out
    assert small("--methods", "WEMoE")[1] == first and len(seen) == 1
    assert "There from before (seed 0): WEMoE" in capsys.readouterr().out
    for count, more in enumerate((["--steps", "3"], ["--seed", "1"], ["--tasks", "Signs", "Cars"]), 2):
        small("--methods", "WEMoE", *more)
        assert len(seen) == count
    small("--methods", "WEMoE", "--experiment", "depths")  # of the same settings: from before
    assert len(seen) == 4
    images = tasks.miniature_suite
    moved = {"miniature": (lambda *args, **options: replace(images(*args, **options), origin="elsewhere"), tasks.TASKS)}
    with monkeypatch.context() as patch:
        patch.setattr(reproduce, "SUITES", moved)
        small("--methods", "WEMoE")
    assert len(seen) == 5
    monkeypatch.setattr(run, "sources", lambda: "edited")
    small("--methods", "WEMoE")
    assert len(seen) == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_and_its_workers_and_nothing_finished_is_lost(number, small, tmp_path, capfd):
    methods = ["--steps", "99999", "--methods", "individual", "pre-trained"]
    process = started(tmp_path / "results", *methods, "WEMoE")
    wait_until(lambda: len(list((tmp_path / "results/miniature/cache").glob("*.json"))) == 2)
    kill = os.killpg if number == signal.SIGINT else os.kill  # Ctrl-C reaches workers, too
    kill(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and b"interrupted" in error and b"Traceback" not in error
    wait_until(lambda: not group_exists(process.pid))
    small(*methods)
    assert "There from before (seed 0): Pre-trained, Individual" in capfd.readouterr().out


def wait_until(condition) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("waited for two minutes")


def group_exists(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


# ---- People's machines -----------------------------------------------------------------------------------------------


def test_no_home_no_locale_no_backend_and_no_time_zone(tmp_path):
    """A whole run without them, in a process of its own: matplotlib and the locale are read when Python starts."""
    odd = {"MPLBACKEND": "module://not.installed", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    odd |= {"TERM": "dumb", "TZ": "No/Where", "COLUMNS": "none", "HOME": "/nowhere"}
    command = [sys.executable, HERE / "reproduce.py", "--experiment", "parameters", "--output", tmp_path]
    done = subprocess.run(command, env={"PATH": os.environ["PATH"], **odd}, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert b"equal" in done.stdout and (tmp_path / "miniature/parameters/table.md").exists()


def test_a_terminal_without_a_tick_gets_something_else(monkeypatch, small):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert small("--methods", "individual", "--seeds", "2")[0] in (0, 1)  # with ± in its table
    sys.stdout.flush()
    assert b" ? 0" in sys.stdout.buffer.getvalue()


# ---- The command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["ViT-B-64"], "unknown suite 'ViT-B-64': choose among 'miniature', 'ViT-B-32'"),
        (["--experiment", "table99"], "unknown experiment 'table99': choose among 'main'"),
        (["--tasks", "Signs", "Sings"], "unknown task 'Sings': choose among 'Scenes'"),
        (["--methods", "WEMoE", "magic"], "unknown method 'magic': choose among 'Weight Averaging'"),
        (["--experiment", "depths", "--methods", "TIES-Merging"], "unknown method 'TIES-Merging': choose among"),
        (["--methods", "WEMoE (as the hub ran it)"], "unknown method 'WEMoE (as the hub ran it)'"),
        (["miniature-text", "--experiment", "robustness"], "robustness is about images"),
        (["--experiment", "robustness", "--tasks", "Cars"], "the experiment robustness has its own"),
        (["--limit", "3"], "--hub and --limit are for suites of real models"),
        (["roberta-glue", "--finetune"], "--experts, --finetune, --cache: for CLIP"),
        (["ViT-B-32", "--workers", "2"], "--workers: in miniature, on a CPU"),
        (["--device", "abacus"], "--device abacus: not usable here"),
        (["--output", __file__], "test_run.py"),
        (["--steps", "0"], "argument --steps: invalid positive value: '0'"),
        (["--precision", "int1"], "argument --precision: invalid choice: 'int1'"),
        (["ViT-B-32", "--finetune", "--experts", "."], "argument --experts: not allowed with argument --finetune"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, message, capsys):
    try:
        status = reproduce.main(arguments)
    except SystemExit as end:  # argparse's own
        status = end.code
    error = capsys.readouterr().err
    assert status == 2 and message in error.splitlines()[-1] and "Traceback" not in error


def test_an_error_in_a_worker_is_one_line_too(small, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "ADAPTATION", replace(tasks.ADAPTATION, lr=float("inf")))
    assert small("--workers", "2", "--methods", "WEMoE", "WEMoE (1-layer)")[0] == 2
    assert "not finite at step 2" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "number, name",
    [("Table 4", "generalization"), ("fig3", "vectors"), ("Figure 3", "vectors"), ("APPENDIX B.3", "unload")],
)
def test_experiments_go_by_the_papers_numbers_as_it_prints_them(number, name):
    assert reproduce.parse(["--experiment", number, "--device", "cpu"]).experiment == name


def test_names_are_found_whatever_their_case_and_listed(capsys):
    parsed = reproduce.parse(["MINIATURE", "--tasks", "digits", "CARS", "--methods", "all", "--device", "cpu"])
    assert parsed.tasks == ["Cars", "Digits"] and len(parsed.methods) > 20
    assert parsed.methods == [name for name in METHODS if name in parsed.methods]
    assert reproduce.main(["--experiment", "list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name}" in printed for name in experiments.EXPERIMENTS) and max(map(len, printed.splitlines())) <= 100


# ---- README ----------------------------------------------------------------------------------------------------------


def test_the_commands_in_the_readmes_are_understood(monkeypatch):
    """Each `python reproduce.py …` is parsed, and what .ci/run takes out of README is its test command."""
    files = [HERE / "README.md", *HERE.glob("data/**/README.md")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    commands = re.findall(r"python reproduce\.py ?((?:[\w./-]| (?! ))*)", text)
    assert len(commands) > 5
    for command in map(shlex.split, commands):
        if command[:1] != ["bench"] and not {"NAME", "DIR", "MIRROR"} & set(command):
            assert reproduce.parse([*command, "--device", "cpu"]).suite in reproduce.SUITES
    (pattern,) = re.findall(r"grep -m 1 '(.*?)' README.md", (HERE / ".ci/run").read_text(encoding="utf-8"))
    install = re.search(pattern, (HERE / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert install and "requirements.txt" in install.string


def test_the_examples_in_readme_run_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the examples may write
    examples = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})
