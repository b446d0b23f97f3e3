"""What must be true of the benchmark: what is timed is equal, and all that is measured is reported and kept."""

import json
from functools import partial
from unittest import mock

import torch

import reproduce
from data import bench
from data.paper import hub
from data.paper.test_paper import TINY, tiny  # noqa: F401 (a fixture)


def test_bench_measures_ours_the_loop_and_the_dense_model(monkeypatch, tmp_path, capsys):
    """On a tiny tower, where bounds mean nothing: what is timed is equal, everything is reported and kept."""
    tiny_clip = hub.ARCHITECTURES["ViT-B-32"]._replace(model=TINY.model)
    monkeypatch.setitem(hub.ARCHITECTURES, "ViT-B-32", tiny_clip)

    def once(calls, device):
        return {name: 1.0 for name, call in calls.items() if [call()]}

    monkeypatch.setattr(bench, "medians", once)
    monkeypatch.setattr(bench, "peak_bytes", lambda function, which, *rest: 1000 + which)
    options = ["--device", "cpu", "--output", str(tmp_path)]
    assert reproduce.main(["bench", "--tasks", "2", "--batch", "2", "3", *options]) == 1
    results = json.loads((tmp_path / "bench" / "results.json").read_text())
    assert len(results["rows"]) == 2 + 6 and (tmp_path / "bench" / "time.png").exists()
    assert (results["num_tasks"], list(results["batch"]), sorted(results["tasks"])) == (2, ["2", "3"], ["2", "20"])
    timed = [*results["batch"].values(), *results["tasks"].values()]
    assert all(seconds.keys() == {"dense", "ours", "loop"} for seconds in timed)  # what the plot shows
    said = capsys.readouterr().out
    assert (said.count("ours / dense"), said.count("loop / ours")) == (4, 1)
    for error, status in ((MemoryError, 2), (KeyboardInterrupt, 130)):
        monkeypatch.setattr(bench, "peak_bytes", mock.Mock(side_effect=error))
        assert reproduce.main(["bench", "--tasks", "2", "--batch", "2", *options]) == status
        assert len(json.loads((tmp_path / "bench" / "results.json").read_text())["rows"]) == 6  # measured before
    assert "goes on" not in capsys.readouterr().err
    monkeypatch.setattr(bench.PerSampleLoop, "forward", lambda self, x: x + 1)
    assert reproduce.main(["bench", *options]) == 2
    assert "differs from the loop" in capsys.readouterr().err


def test_medians_and_peaks_are_measured():
    calls = {"one": lambda: None, "other": lambda: None}
    assert bench.medians(calls, torch.device("cpu"), seconds=0).keys() == calls.keys()
    ones = partial(torch.ones, 2**24), torch.device("cpu")
    assert 2**25 < bench.peak_bytes(tuple, ones) < 2**28  # 2**26 bytes, and what else torch takes
