"""What must be true of the benchmark: all that is measured is reported and kept, and it is what it says."""

import json

import open_clip
import torch

from data import bench

TINY = dict(
    embed_dim=4,
    vision_cfg=dict(image_size=8, patch_size=4, width=8, layers=2, head_width=4),
    text_cfg=dict(context_length=5, vocab_size=20, width=8, heads=2, layers=1),
)


def test_bench_compares_ours_with_the_loop_and_the_dense_model(monkeypatch, tmp_path, capsys):
    """On a tiny tower, where bounds mean nothing."""
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: TINY)
    monkeypatch.setattr(bench, "seconds", lambda calls: {name: 1.0 for name, call in calls.items() if not call()})
    assert not bench.bench(["--tasks", "2", "--batch", "3", "2", "--device", "cpu", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "bench" / "results.json").read_text(encoding="utf-8"))
    assert len(results["rows"]) == 6 == capsys.readouterr().out.count("(at most")
    assert (tmp_path / "bench" / "time.png").exists()


def test_times_and_peaks_are_measured():
    assert 0 < bench.seconds({"one": lambda: torch.ones(1), "other": lambda: torch.ones(2**20)})["one"] < 1
    assert 2**23 <= bench.peak_bytes({"one": lambda: [torch.ones(2**20) + 1 for _ in "ab"][1]})["one"] < 2**24
