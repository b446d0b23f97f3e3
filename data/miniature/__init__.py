"""Eight small tasks, drawn by a program, and a small CLIP that is pre-trained on pictures of their kind."""

from data.miniature.corruptions import CORRUPTIONS, corrupt  # noqa: F401
from data.miniature.tasks import (  # noqa: F401
    ALL_TASKS,
    CHECKPOINT,
    MORE_TASKS,
    SPLITS,
    TASKS,
    build_model,
    load_pretrained,
    normalise,
    render,
    tokenize,
    zero_shot_head,
)
