"""What must be true of the miniature: its pictures, tokens and heads, its checkpoint and its corruptions."""

import hashlib

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from data.miniature import pretraining
from data.miniature.corruptions import CORRUPTIONS, corrupt
from data.miniature.tasks import (
    ALL_TASKS,
    CHECKPOINT,
    MORE_TASKS,
    TASKS,
    build_model,
    load_pretrained,
    normalise,
    render,
    tokenize,
    zero_shot_head,
)

few = settings(max_examples=10)
seeds, sides = st.integers(0, 2**16), st.integers(1, 12)
every_corruption = pytest.mark.parametrize("name", CORRUPTIONS)


def digest(*tensors: Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()[:16]


# ---- Pictures, tokens and heads --------------------------------------------------------------------------------------

DIGESTS = (
    "0295e0b8f6317a43 27299cd5ae159897 bda4b1310eb78e4f 40c2764e1ce09c86"
    " 4150a6f4246dd230 92b9e42d8672210c bb6e1adde1fb6619 082dbb6dbbef8348"
    " de359feaf510f44a a39a0297affe2f0a 91193af90dd5e5a1 db420e8111a5ff1c"
    " 054efff6e7e45a65 25a72a140b4f9f36 b8ceffb6f10a6008 726f390468d1891a"
)


@pytest.mark.parametrize("task, pinned", [*zip(ALL_TASKS, DIGESTS.split(), strict=True)])
def test_the_pictures_are_those_of_the_published_results(task, pinned):
    """Experts and results depend on every pixel: another digest means that all of them have to be made again."""
    assert digest(render(task, "train", 24, 0)[0], render(task, "test", 24, 1)[0]) == pinned


def test_the_tokens_are_those_of_the_checkpoint():
    """Its text tower depends on every word's number. Words never heard of share one, and every text ends in time."""
    texts = [text.format(name) for task in TASKS.values() for name in task.classes for text in task.templates]
    texts += [text for task in TASKS.values() for wordings in task.wordings.values() for text in wordings]
    assert digest(tokenize(texts)) == "2576ff8492ab11b4"
    end, stop = tokenize(texts).max().item(), tokenize("stop")[0, 0].item()
    assert tokenize("Stop, never-heard STOP!").tolist() == [[stop, 1, 1, stop, end] + [0] * 9]
    assert tokenize(["stop " * 20, ""]).tolist() == [[stop] * 13 + [end], [end] + [0] * 13]


@given(st.sampled_from(sorted(ALL_TASKS)), st.sampled_from(("train", "test", "web")), st.integers(1, 30), seeds)
@few
def test_images_depend_on_task_split_seed_and_place_alone(task, split, count, seed):
    images, labels = render(task, split, count, seed)
    assert images.shape == (count, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.tolist() == [i % len(ALL_TASKS[task].classes) for i in range(count)]
    assert torch.equal(render(task, split, count + 3, seed)[0][:count], images)
    assert not torch.equal(render(task, split, count, seed + 1)[0], images)


def test_the_shipped_checkpoint_is_a_small_half_precision_clip():
    assert {p.dtype for p in load_file(CHECKPOINT).values()} == {torch.float16}
    clip = load_pretrained()
    assert isinstance(clip, open_clip.CLIP) and not clip.training
    assert {p.dtype for p in clip.parameters()} == {torch.float32}


@pytest.mark.parametrize("task", ALL_TASKS)
@torch.no_grad()
def test_a_head_has_one_embedding_a_class_and_fits_the_pictures_in_part(task):
    """Normalised for each template, averaged, normalised, times the scale. Fine-tuning has something left to do."""
    clip, (_, _, templates, wordings) = load_pretrained(), ALL_TASKS[task]
    assert 8 <= len(wordings) <= 12 and (tokenize(list(wordings)) != 1).all()  # the text tower knows every word
    texts = [[template.format(name) for template in templates] for name in wordings]
    mean = torch.stack([F.normalize(clip.encode_text(tokenize(text)), dim=-1).mean(0) for text in texts])
    head = zero_shot_head(clip, task)
    torch.testing.assert_close(head, F.normalize(mean, dim=-1).T * clip.logit_scale.exp(), atol=1e-4, rtol=2e-5)
    images, labels = render(task, "test", 100, 0)
    right = (clip.encode_image(normalise(images), normalize=True) @ head).argmax(1) == labels
    assert 0.5 < right.float().mean() < 0.9


def test_pretraining_trains_both_towers_and_makes_the_same_again(monkeypatch):
    for name in ("STEPS", "TEXT_STEPS"):
        monkeypatch.setattr(pretraining, name, 2)
    monkeypatch.setattr(pretraining, "PER_CLASS", 1)
    one, other = pretraining.main(), pretraining.main()
    assert all(p.dtype == torch.float16 and torch.equal(p, other[name]) for name, p in one.items())
    torch.manual_seed(0)
    untrained = build_model().half().state_dict()
    assert one.keys() == untrained.keys() and len(TASKS) == len(MORE_TASKS) == 8
    assert not any(torch.equal(one[name], untrained[name]) for name in ("visual.proj", "text_projection"))


# ---- Corruptions -----------------------------------------------------------------------------------------------------


@every_corruption
@given(st.integers(1, 150), sides, sides, st.integers(1, 5), seeds)
@few
def test_a_picture_of_any_size_is_corrupted_alike_in_any_company(name, count, height, width, severity, seed):
    images = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (150, 3, height, width), np.uint8))
    before, spoiled = images.clone(), corrupt(images, name, severity, seed)
    assert spoiled.dtype == torch.uint8 and spoiled.shape == images.shape and torch.equal(images, before)
    assert torch.equal(spoiled[:count], corrupt(images[:count], name, severity, seed))


@every_corruption
def test_damage_grows_with_severity_and_differs_between_seeds_where_there_is_chance(name):
    pictures = torch.cat([render(task, "test", 4, 0)[0] for task in TASKS])
    spoiled = [corrupt(pictures, name, severity) for severity in range(1, 6)]
    means = [(one.double() - pictures).abs().mean().item() for one in spoiled]
    assert means == sorted(set(means)) and means[0] > 1  # of 255
    noise = ("motion_blur", "impulse_noise", "gaussian_noise", "spatter")
    assert torch.equal(spoiled[2], corrupt(pictures, name, 3, seed=1)) == (name not in noise)
