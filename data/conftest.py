"""What all tests of data/ share: how long hypothesis searches, one thread, and figures that nobody looks at."""

import os

import datasets
import pytest
import torch
from hypothesis import settings

from data import report

settings.register_profile("default", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
torch.set_num_threads(1)  # small tensors gain nothing from more, and forks do not survive them
datasets.disable_progress_bars()


@pytest.fixture(scope="session", autouse=True)
def undrawn():
    """Figures are made but not drawn, which would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "save", lambda figure, path: path.write_bytes(b""))
        yield
