"""What all tests of data/ share: how long hypothesis searches, one thread, and the miniature made small."""

import json
import os

import datasets
import open_clip
import pytest
import torch
from hypothesis import settings
from matplotlib.figure import Figure

from data import run
from data.miniature import tasks
from data.suite import Training

settings.register_profile("default", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
torch.set_num_threads(1)  # small tensors gain nothing from more
datasets.disable_progress_bars()
SHIPPED = tasks.load_pretrained


def small_clip() -> open_clip.CLIP:
    """The shipped text tower beside a vision tower that is smaller, and untrained."""
    clip = SHIPPED()
    torch.manual_seed(0)
    clip.visual = open_clip.transformer.VisionTransformer(32, 8, 32, 2, 2, 4, output_dim=128)
    return clip.eval()


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Make the miniature small. Figures are made but not drawn, which would take most of the time."""
    patch.setattr(run, "sources", lambda: "")  # which may be edited while tests run
    patch.setattr(Figure, "savefig", lambda figure, path, **_: path.write_bytes(b""))
    patch.setattr(tasks, "load_pretrained", small_clip)
    patch.setattr(tasks, "TRAINING", Training(images=24, steps=10, lr=3e-3, batch_size=8, warmup=1))
    patch.setattr(tasks, "TEST_IMAGES", 24)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Runs reproduce.py with these arguments on two tasks with small models: exit status, results.json (or {})."""
    shrink(monkeypatch)

    import reproduce  # and all suites: not every test needs them

    def main(*arguments: str, output: str = "results") -> tuple[int, dict]:
        own = [] if "--tasks" in arguments else ["--tasks", "signs", "Digits"]
        given = ["--steps", "2", "--workers", "1", "--device", "cpu", "--output", str(tmp_path / output)]
        status = reproduce.main([*own, *given, *arguments])
        files = [path for path in (tmp_path / output).rglob("results.json") if "cache" not in path.parts]
        return status, json.loads(max(files, key=os.path.getmtime).read_text(encoding="utf-8")) if files else {}

    return main
