"""What must be true of the miniature: its pictures, tokens and heads, its pre-training and its corruptions."""

import hashlib
import io

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from data.miniature import (
    ALL_TASKS,
    CHECKPOINT,
    CORRUPTIONS,
    MORE_TASKS,
    SPLITS,
    TASKS,
    build_model,
    corrupt,
    load_pretrained,
    normalise,
    pretraining,
    render,
    tokenize,
    zero_shot_head,
)

few = settings(max_examples=10)
seeds, sides = st.integers(0, 2**16), st.integers(1, 12)
every_task = pytest.mark.parametrize("task", ALL_TASKS)
every_corruption = pytest.mark.parametrize("name", CORRUPTIONS)
NOISE = ("motion_blur", "impulse_noise", "gaussian_noise", "spatter")  # what draws random numbers


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """Four test images of each of the eight tasks: uint8 (32, 3, 32, 32)."""
    return torch.cat([render(task, "test", 4, 0)[0] for task in TASKS])


def plain(value: int, *shape: int) -> Tensor:
    return torch.full(shape, value, dtype=torch.uint8)


def random_images(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def enlarged(images: Tensor, times: int) -> Tensor:
    return images.repeat_interleave(times, 2).repeat_interleave(times, 3)


def difference(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() - b).abs()


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


@given(st.sampled_from(sorted(ALL_TASKS)), st.sampled_from(SPLITS), st.integers(1, 30), seeds)
@few
def test_images_depend_on_task_split_seed_and_place_alone(task, split, count, seed):
    images, labels = render(task, split, count, seed)
    assert images.shape == (count, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.tolist() == [i % len(ALL_TASKS[task].classes) for i in range(count)]
    assert torch.equal(render(task, split, count + 3, seed)[0][:count], images)
    assert not torch.equal(render(task, split, count, seed + 1)[0], images)


@every_task
def test_eight_tasks_and_eight_more_of_eight_to_twelve_classes_and_no_picture_twice(task):
    assert len(TASKS) == len(MORE_TASKS) == 8 and ALL_TASKS == TASKS | MORE_TASKS
    assert 8 <= len(ALL_TASKS[task].classes) <= 12
    assert (tokenize(ALL_TASKS[task].classes) != 1).all()  # the text tower knows every word
    images = torch.cat([render(task, split, 120, seed=0)[0] for split in SPLITS])
    assert len(images.unique(dim=0)) == len(images)


def test_the_shipped_checkpoint_is_a_small_half_precision_clip():
    assert CHECKPOINT.stat().st_size < 16 * 2**20
    assert {p.dtype for p in load_file(CHECKPOINT).values()} == {torch.float16}
    clip = load_pretrained()
    assert isinstance(clip, open_clip.CLIP) and not clip.training
    assert {p.dtype for p in clip.parameters()} == {torch.float32}


@every_task
@torch.no_grad()
def test_a_head_has_one_embedding_a_class_and_fits_the_pictures_in_part(task):
    """Normalised for each template, averaged, normalised, times the scale. Fine-tuning has something left to do."""
    clip, (_, _, templates, wordings) = load_pretrained(), ALL_TASKS[task]
    texts = [[template.format(name) for template in templates] for name in wordings]
    mean = torch.stack([F.normalize(clip.encode_text(tokenize(text)), dim=-1).mean(0) for text in texts])
    head = zero_shot_head(clip, task)
    torch.testing.assert_close(head, F.normalize(mean, dim=-1).T * clip.logit_scale.exp(), atol=1e-4, rtol=2e-5)
    images, labels = render(task, "test", 100, 0)
    right = (clip.encode_image(normalise(images), normalize=True) @ head).argmax(1) == labels
    assert 0.5 < right.float().mean() < 0.9


def test_pretraining_trains_both_towers_and_writes_the_same_checkpoint_again(tmp_path):
    file, states = tmp_path / "clip.safetensors", []
    for _ in range(2):
        pretraining.main(["--steps", "2", "--text-steps", "2", "--per-class", "1", "--output", str(file)])
        states.append(load_file(file))
    loaded = load_pretrained(file).state_dict()
    for name, p in states[0].items():
        assert p.dtype == torch.float16 and torch.equal(p, states[1][name]) and torch.equal(p.float(), loaded[name])
    torch.manual_seed(0)
    untrained = build_model().half().state_dict()
    assert not any(torch.equal(states[0][name], untrained[name]) for name in ("visual.proj", "text_projection"))


# ---- Corruptions -----------------------------------------------------------------------------------------------------


@every_corruption
@given(st.integers(1, 150), sides, sides, st.integers(1, 5), seeds)
@few
def test_a_picture_of_any_size_is_corrupted_alike_in_any_company(name, count, height, width, severity, seed):
    images = random_images(seed, 150, 3, height, width)
    before, spoiled = images.clone(), corrupt(images, name, severity, seed)
    assert spoiled.dtype == torch.uint8 and spoiled.shape == images.shape and torch.equal(images, before)
    assert torch.equal(spoiled[:count], corrupt(images[:count], name, severity, seed))


@every_corruption
def test_chance_differs_between_images_and_seeds_where_there_is_any(name):
    """But for one image in a hundred: two motions may be so near that rounding makes them one."""
    images = random_images(0, 1, 3, 32, 32).expand(150, -1, -1, -1)
    different = len(torch.cat([corrupt(images, name, 3, seed) for seed in (0, 1)]).unique(dim=0))
    assert different >= 297 if name in NOISE else different == 1


@every_corruption
def test_damage_grows_with_severity(name, pictures):
    means = [difference(corrupt(pictures, name, severity), pictures).mean().item() for severity in range(1, 6)]
    assert means == sorted(set(means)) and means[0] > 1  # of 255
    assert torch.equal(corrupt(pictures, name), corrupt(pictures, name, 5, 0))


@pytest.mark.parametrize("name", ["motion_blur", "pixelate", "contrast"])
def test_what_has_no_detail_loses_none(name):
    images = torch.cat([plain(value, 1, 3, 9, 31) for value in (0, 77, 255)])
    assert torch.equal(corrupt(images, name), images)


@pytest.mark.parametrize("name", ["motion_blur", "pixelate", "spatter"])
def test_lengths_are_shares_of_the_picture(name, pictures):
    small, large = (corrupt(enlarged(pictures, times), name) for times in (2, 6))
    assert difference(F.avg_pool2d(large.float(), 3), small).mean() < 3.5  # of 255


def test_motion_blur_smears_a_point_into_a_line_of_its_length():
    point = plain(0, 1, 3, 65, 65)
    point[..., 32, 32] = 255
    for seed in range(10):
        y, x = (corrupt(point, "motion_blur", 5, seed)[0, 0] > 0).nonzero().float().sub(32).T
        assert 65 / 8 - 1 <= torch.hypot(x, y).max() <= 65 / 8 + 1.5  # a quarter of the side in all
        assert torch.linalg.eigvalsh(torch.cov(torch.stack([x, y])))[0] < 1  # no wider than a pixel or two


def test_noises_have_the_stated_share_and_deviation():
    spoiled = corrupt(plain(100, 64, 3, 32, 32), "impulse_noise")
    for value, share in ((0, 0.15), (100, 0.7), (255, 0.15)):
        assert (spoiled == value).float().mean() == pytest.approx(share, abs=0.005)
    assert (spoiled == 100).all(1).float().mean() == pytest.approx(0.7**3, abs=0.01)  # each of three values draws
    noise = corrupt(plain(128, 64, 3, 32, 32), "gaussian_noise").float() - 128
    assert noise.mean().abs() < 1 and (noise.abs() < 255 * 0.3).float().mean() == pytest.approx(0.6827, abs=0.01)


def test_pixelate_gives_blocks_of_their_mean(pictures):
    large = enlarged(pictures, 2)
    assert difference(corrupt(large, "pixelate"), enlarged(F.avg_pool2d(large.float(), 8), 8)).max() <= 0.501


def test_spatter_covers_the_stated_share_and_leaves_the_rest():
    spoiled = corrupt(plain(255, 20, 3, 32, 32), "spatter")
    covered = (spoiled < 255).any(1)
    assert (covered.float().mean((1, 2)) - 0.5).abs().max() < 0.01  # thin edges may round away
    mud = (spoiled == torch.tensor([75, 50, 25])[:, None, None]).all(1)
    assert (mud.float().mean((1, 2)) > 0.2).all()


def test_contrast_keeps_the_mean_and_a_tenth_of_the_deviation(pictures):
    before, after = pictures.double(), corrupt(pictures, "contrast").double()
    assert difference(after.mean((2, 3)), before.mean((2, 3))).max() < 0.5
    assert difference(after.std((2, 3)), 0.1 * before.std((2, 3))).max() < 0.3  # a rounding error's deviation


def test_jpeg_is_pillows(pictures):
    for image, spoiled in zip(pictures, corrupt(pictures, "jpeg_compression")):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file := io.BytesIO(), "JPEG", quality=8)
        assert np.array_equal(np.asarray(Image.open(file)), spoiled.permute(1, 2, 0).numpy())


# ---- Bad input -------------------------------------------------------------------------------------------------------

BLACK = plain(0, 1, 3, 8, 8)
BAD_INPUTS = [
    (render, ("Weather", "test", 1, 0), "no images for task 'Weather', split 'test': tasks are Scenes, .*FalseColours"),
    (render, ("Scenes", "nights", 1, 0), "task 'Scenes', split 'nights': tasks are .*; splits train, test, web"),
    (corrupt, (BLACK, "fog"), "no corruption 'fog' of severity 5: corruptions are motion_blur, .* 1, 2, 3, 4, 5"),
    (corrupt, (BLACK, "contrast", 6), "no corruption 'contrast' of severity 6"),
    (corrupt, (BLACK.float(), "contrast"), r"images are torch.float32 \(1, 3, 8, 8\), expected torch.uint8 \(N, 3"),
    (corrupt, (BLACK[:, :1], "contrast"), r"\(1, 1, 8, 8\), expected torch.uint8"),
]


@pytest.mark.parametrize("function, arguments, message", BAD_INPUTS)
def test_errors_name_what_was_passed_and_what_would_do(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)
