"""What must be true of wemoe.py, of the miniature and of reproduce.py. Run with `pytest`; needs no network and no GPU.

Properties come first: hypothesis draws shapes, numbers of tasks, router depths and seeds. Float32 tolerances: weights
and activations are of order one and sums have some dozens of terms, so that rounding (6e-8 relative) stays below ATOL.
"""

import contextlib
import copy
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import datasets
import huggingface_hub
import numpy as np
import open_clip
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

import reproduce
import wemoe
from data import authors, bench, claims, clip, miniature, suite
from data.corruptions import CORRUPTIONS, corrupt
from data.moments import average_by, fisher_information, gram_matrices, least_squares, weigh_entries
from wemoe import Router, WEMoE, adapt, entropy, routing_weights, task_arithmetic, task_vector, upscale

ATOL = 2e-5
HERE = Path(__file__).parent

settings.register_profile("default", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
NIGHTLY = settings().max_examples == 1000

seeds = st.integers(0, 2**16)
task_numbers = st.integers(1, 4)
batch_sizes = st.integers(1, 4)
axes = st.lists(st.integers(1, 3), max_size=2)  # token or spatial axes


# ------------------------------------------------------------------------------------------
# Small modules, and the equation as a loop
# ------------------------------------------------------------------------------------------


class Gated(nn.Module):
    """An MLP as Llama's: down(silu(gate x) * up x)."""

    def __init__(self, size: int):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(size, size, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


MLPS = {
    "plain": lambda d: nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d)),
    "normed": lambda d: nn.Sequential(nn.Linear(d, d, bias=False), nn.LayerNorm(d), nn.ReLU(), nn.Linear(d, 3)),
    "gated": Gated,
    "linear": lambda d: nn.Linear(d, d + 1),
    "norm": nn.LayerNorm,
}
kinds = st.sampled_from(sorted(MLPS))


def randomised(module: nn.Module, scale: float = 0.5) -> nn.Module:
    """The module with normally distributed parameters, biases and norms included."""
    for p in module.parameters():
        nn.init.normal_(p, std=scale)
    return module


def family(kind: str, size: int, tasks: int, seed: int) -> tuple[nn.Module, list[nn.Module]]:
    """A "pre-trained" module and as many "fine-tuned" ones."""
    torch.manual_seed(seed)
    pretrained, *finetuned = (randomised(MLPS[kind](size)) for _ in range(tasks + 1))
    return pretrained, finetuned


class Fixed(nn.Module):
    """A router whose weights are given: (T,) for all samples, or (B, T)."""

    def __init__(self, lam: Tensor):
        super().__init__()
        self.lam = nn.Parameter(lam)

    def forward(self, x: Tensor) -> Tensor:
        return self.lam.expand(len(x), self.lam.shape[-1])


class Repeated(Fixed):
    """The same routing weights for all samples, but each with a copy of its own, as a router gives them."""

    def forward(self, x: Tensor) -> Tensor:
        return self.lam.repeat(len(x), 1)


def literal(pretrained: nn.Module, finetuned: list[nn.Module], lam: Tensor, x: Tensor) -> Tensor:
    """The equation, word by word: for every sample its own θ_0 + Σ_t λ_t τ_t, through which it runs alone."""
    named = {**dict(pretrained.named_parameters()), **dict(pretrained.named_buffers())}  # a tied one by one name
    theta_0 = {name: p.detach() for name, p in named.items() if p.is_floating_point()}
    thetas = [module.state_dict() for module in finetuned]
    outputs = []
    for b in range(len(x)):
        theta = {k: p + sum(lam[b, t] * (thetas[t][k] - p) for t in range(len(thetas))) for k, p in theta_0.items()}
        theta |= {name: theta[name].detach() for name, _ in pretrained.named_buffers() if name in theta}
        outputs.append(functional_call(copy.deepcopy(pretrained), theta, (x[b : b + 1],)))
    return torch.cat(outputs)


def close(a: Tensor, b: Tensor, atol: float = ATOL) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=ATOL)


# ------------------------------------------------------------------------------------------
# Task vectors
# ------------------------------------------------------------------------------------------


@given(kinds, task_numbers, seeds)
def test_one_whole_task_vector_gives_the_finetuned_model(kind, tasks, seed):
    pretrained, finetuned = family(kind, 4, tasks, seed)
    for model in finetuned:
        merged = task_arithmetic(pretrained, [task_vector(pretrained, model)], 1)
        assert merged.keys() == model.state_dict().keys()
        for name, p in model.state_dict().items():
            close(merged[name], p)


@given(kinds, task_numbers, st.floats(-2, 2), st.floats(-2, 2), seeds)
def test_task_arithmetic_is_linear_in_lambda_and_leaves_its_inputs_alone(kind, tasks, a, b, seed):
    pretrained, finetuned = family(kind, 4, tasks, seed)
    vectors = [task_vector(pretrained, model) for model in finetuned]
    before = copy.deepcopy((pretrained.state_dict(), vectors))
    merged = {lam: task_arithmetic(pretrained, vectors, lam) for lam in (a, b, (a + b) / 2)}
    for name in merged[a]:
        close((merged[a][name] + merged[b][name]) / 2, merged[(a + b) / 2][name], atol=1e-4)
        assert merged[a][name].data_ptr() != pretrained.state_dict()[name].data_ptr()
    torch.testing.assert_close((pretrained.state_dict(), vectors), before, rtol=0, atol=0)


@given(kinds, st.lists(st.floats(-1, 1), min_size=2, max_size=4), st.randoms(), seeds)
def test_order_of_tasks_does_not_matter_to_task_arithmetic(kind, scalings, random, seed):
    pretrained, finetuned = family(kind, 4, len(scalings), seed)
    pairs = [(lam, task_vector(pretrained, model)) for lam, model in zip(scalings, finetuned)]
    shuffled = random.sample(pairs, len(pairs))
    one, other = (task_arithmetic(pretrained, [tau for _, tau in p], [lam for lam, _ in p]) for p in (pairs, shuffled))
    for name in one:
        close(one[name], other[name])


def test_task_arithmetic_by_hand():
    vectors = [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 2.0])}]
    theta_0 = {"w": torch.tensor([10.0, 20.0]), "steps": torch.tensor(7)}
    assert task_arithmetic(theta_0, iter(vectors), 0.5)["w"].tolist() == [10.5, 21.0]
    assert task_arithmetic(theta_0, vectors, [3, -1])["w"].tolist() == [13.0, 18.0]
    assert task_arithmetic(theta_0, vectors)["steps"] == 7


def test_task_vectors_skip_counters_and_keep_the_pretrained_dtype():
    pretrained, finetuned = nn.BatchNorm1d(3), nn.BatchNorm1d(3).double()
    finetuned(torch.randn(8, 3).double())
    tau = task_vector(pretrained, finetuned)
    assert set(tau) == {"weight", "bias", "running_mean", "running_var"}
    assert {p.dtype for p in tau.values()} == {torch.float32}
    merged = task_arithmetic(pretrained, [tau], 1.0)
    assert merged["num_batches_tracked"] == 0
    close(merged["running_mean"], finetuned.running_mean.float())


def test_sums_of_bfloat16_models_are_accumulated_in_float32():
    theta_0 = {"w": torch.ones(1, dtype=torch.bfloat16)}
    tau = {"w": torch.full((1,), 2.0**-9, dtype=torch.bfloat16)}  # too small to move 1 in bfloat16, one at a time
    assert task_arithmetic(theta_0, [tau] * 8, 1.0)["w"].item() == 1 + 2**-6


# ------------------------------------------------------------------------------------------
# Merges that go entry by entry or matrix by matrix: TIES, EMR, Fisher merging, RegMean
# ------------------------------------------------------------------------------------------

SHAPES = {"block.weight": (3, 4), "block.bias": (3,), "scale": ()}
shares = st.sampled_from([0.03, 0.1, 0.5, 1.0])
dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])


def quarters(count: int, seed: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """Task vectors of small quarters, many of them equal, zero or opposite: no sum of them rounds."""
    torch.manual_seed(seed)
    return [{name: (torch.randint(-6, 7, shape) / 4).to(dtype) for name, shape in SHAPES.items()} for _ in range(count)]


def vector(*entries: float) -> dict[str, Tensor]:
    return {"w": torch.tensor(entries, dtype=torch.float32)}


def flat(tau: dict[str, Tensor]) -> list[float]:
    return torch.cat([entry.flatten() for entry in tau.values()]).tolist()


def same(a: object, b: object) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def linear_models(count: int, seed: int) -> tuple[list[nn.Module], list[Tensor]]:
    """Linear models in float64 and inputs for each; some have fewer inputs than features, one feature is always 0."""
    torch.manual_seed(seed)
    models = [nn.Linear(5, 3).double() for _ in range(count)]
    return models, [torch.randn(2 + 3 * t, 5).double().index_fill(1, torch.tensor(1), 0) for t in range(count)]


def merges(taus: list[dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """What every method makes of these, with some statistics of each of them."""
    fishers = [{"scale": tau["scale"].abs() + 1, "block.bias": tau["block.bias"] ** 2} for tau in taus]
    grams = [{"block.weight": tau["block.weight"].double().T @ tau["block.weight"].double()} for tau in taus]
    return {
        "ties": wemoe.ties(taus, 0.5),
        "emr": reproduce.emr(taus)[0],
        "fisher": average_by(fishers, taus, weigh_entries),
        "regmean": average_by(grams, taus, least_squares),
    }


@given(shares, dtypes, seeds)
def test_trim_keeps_the_largest_entries_of_all_tensors_and_their_ties(keep, dtype, seed):
    (tau,) = quarters(1, seed, dtype)
    entries, trimmed = flat(tau), wemoe.trim(tau, keep)
    threshold = sorted(map(abs, entries))[-max(1, round(keep * len(entries)))]
    assert flat(trimmed) == [e if abs(e) >= threshold else 0 for e in entries]


@given(task_numbers, shares, dtypes, seeds)
def test_ties_is_its_definition(tasks, keep, dtype, seed):
    taus, expected = quarters(tasks, seed, dtype), []
    for entries in zip(*(flat(wemoe.trim(tau, keep)) for tau in taus)):
        agreeing = [
            e for e in entries if e * sum(entries) > 0
        ]  # the sign of the larger total, as it is that of the sum
        expected.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    assert flat(wemoe.ties(iter(taus), keep)) == torch.tensor(expected, dtype=torch.float64).to(dtype).tolist()


@given(task_numbers, seeds)
def test_emr_is_its_definition_and_keeps_each_tasks_sum_of_magnitudes(tasks, seed):
    taus, expected = quarters(tasks, seed), []
    for entries in zip(*map(flat, taus)):
        expected.append(max((e for e in entries if e * sum(entries) > 0), key=abs, default=0.0))
    unified, masks, rescalers = reproduce.emr(taus)
    assert flat(unified) == expected
    for tau, mask, rescaler in zip(taus, masks, rescalers):
        assert flat(mask) == [e * u > 0 for e, u in zip(flat(tau), expected)]
        magnitudes = sum(map(abs, flat(tau))) if any(flat(mask)) else 0  # nothing may be left of a task
        assert sum(rescaler * abs(u) * m for u, m in zip(expected, flat(mask))) == pytest.approx(magnitudes)


@given(st.integers(2, 4), st.randoms(), dtypes, seeds)
def test_merging_leaves_its_inputs_alone_and_asks_for_no_order(tasks, random, dtype, seed):
    taus = quarters(tasks, seed, dtype)
    before, merged = copy.deepcopy(taus), merges(taus)
    torch.testing.assert_close(merges(random.sample(taus, tasks)), merged)
    for tau in merged.values():
        assert {name: (entry.shape, entry.dtype) for name, entry in tau.items()} == {
            name: (shape, dtype) for name, shape in SHAPES.items()
        }
        [entry.fill_(7) for entry in tau.values()]  # nor does a result share memory with them
    same(taus, before)


@given(task_numbers, dtypes, seeds)
def test_a_vector_that_is_alone_or_that_all_tasks_share_is_recovered(tasks, dtype, seed):
    (tau,) = quarters(1, seed, dtype)
    merged = merges([tau] * tasks)
    same(merged.pop("ties"), wemoe.trim(tau, 0.5))
    for name in merged:
        same(merged[name], tau)
    unified, masks, rescalers = reproduce.emr([tau] * tasks)
    assert rescalers == [float(any(flat(tau)))] * tasks
    same([{name: mask[name] * unified[name] for name in tau} for mask in masks], [tau] * tasks)


@pytest.mark.parametrize("classes, tolerance", [(3, 1e-12), (16, 1e-12), (20, 0.05)])
def test_fisher_information_is_the_loop_over_images_and_classes(classes, tolerance):
    """Beyond 16 classes it is an estimate: here a mean over 1000 images, 16 draws each."""
    torch.manual_seed(classes)
    tower = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    head, x = torch.randn(3, classes).double(), torch.randn(2, 4).double()
    expected = {name: torch.zeros_like(p) for name, p in tower.named_parameters()}
    for log_p in torch.log_softmax(tower(x) @ head, -1).flatten():
        for f, gradient in zip(expected.values(), torch.autograd.grad(log_p, tower.parameters(), retain_graph=True)):
            f += log_p.detach().exp() * gradient**2 / 2
    images = x if classes <= 16 else x.repeat(500, 1)
    with torch.no_grad():
        f = fisher_information(tower.requires_grad_(False), images, lambda features: features @ head)
    assert not any(p.requires_grad for p in tower.parameters())
    torch.testing.assert_close(f, expected, rtol=tolerance, atol=tolerance / 10)


@given(task_numbers, st.sampled_from([0.0, 0.5, 0.9, 1.0]), seeds)
def test_regmean_minimises_its_objective(tasks, alpha, seed):
    """Where the gradient of a convex function is zero, it is least. The feature that is always 0 is averaged."""
    models, inputs = linear_models(tasks, seed)
    states = [model.state_dict() for model in models]
    grams = [gram_matrices(model, x) for model, x in zip(models, inputs)]
    merged = average_by(grams, states, partial(least_squares, alpha=alpha))
    gradient = 0
    for state, x in zip(states, inputs):
        gram = x.T @ x / len(x)
        gram = alpha * gram + (1 - alpha) * gram.diag().diag()
        gradient = gradient + (merged["weight"] - state["weight"]) @ gram
    close(gradient, torch.zeros_like(gradient), atol=1e-7)
    mean = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
    close(merged["weight"][:, 1], mean["weight"][:, 1])
    close(merged["bias"], mean["bias"])


@pytest.mark.parametrize("training", [True, False])
def test_gram_matrices_cover_the_attention_of_open_clip(training):
    torch.manual_seed(0)
    block, x, inputs = open_clip.transformer.ResidualAttentionBlock(8, 2).train(training), torch.randn(70, 3, 8), {}
    for name, module in (("attn", block.attn), ("mlp.c_fc", block.mlp.c_fc), ("mlp.c_proj", block.mlp.c_proj)):
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
    block(x)
    h, linear = inputs["attn"], F.linear
    q, k, v = (h @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).reshape(70, 3, 3, 2, 4).permute(2, 0, 3, 1, 4)
    inputs["attn.out_proj"] = ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
    names = {f"{name}.weight": x.flatten(0, 1) for name, x in inputs.items() if name != "attn"}
    expected = {name: x.T @ x / len(x) for name, x in {"attn.in_proj_weight": h.flatten(0, 1), **names}.items()}
    grams = gram_matrices(block, x)
    assert grams.keys() == expected.keys() and F.linear is linear
    torch.testing.assert_close(grams, {name: expected[name].detach() for name in grams}, rtol=1e-4, atol=1e-5)


def test_merges_by_hand():
    tau = {"a": torch.tensor([[5.0, -1.0], [0.5, 2.0]]), "b": torch.tensor([-3.0, 0.1, 0.2, 0.0, 2.5, -0.3])}
    assert flat(wemoe.trim(tau, 0.3)) == [5, 0, 0, 0, -3, 0, 0, 0, 2.5, 0]
    same(wemoe.trim(vector(3, 4), 0.01), vector(0, 4))  # one at least
    same(wemoe.trim(vector(1, 4, -2, 3), 0.4), vector(0, 4, 0, 3))  # of 1.6 entries, two
    taus = [vector(4, -3, 0.5, 2, 1), vector(2, 5, 0.5, -2, 0), vector(-1, 1, 6, 0.5, -7)]
    # Two of five entries are kept, and what ties with them: (4, -3, 0, 0, 0), (2, 5, 0, -2, 0), (0, 0, 6, 0, -7).
    same(wemoe.ties(taus, 0.4), vector(3, 5, 6, -2, -7))
    # The sums are 5, 3, 7, 0.5 and -6: the mean of 4 and 2, of 5 and 1, of all three, of 2 and 0.5, and -7.
    same(wemoe.ties(taus, 1.0), vector(3, 3, 7 / 3, 1.25, -7))
    same(wemoe.ties([vector(2, 1), vector(-2, 1)], 1.0), vector(0, 1))  # no sign is elected
    unified, masks, rescalers = reproduce.emr([vector(4, -3, 1), vector(2, 5, -1)])  # sums 6, 2 and 0
    same(unified, vector(4, 5, 0))
    assert list(map(flat, masks)) == [[True, False, False], [True, True, False]] and rescalers == [8 / 4, 8 / 9]
    models = [vector(1, 2, 1), vector(3, 6, 2)]
    same(average_by([vector(1, 0, 0), vector(3, 0, 1e-30)], models, weigh_entries), vector(2.5, 4, 2))
    grams = torch.tensor([[[2.0, 1.0], [1.0, 2.0]], [[1.0, 0.0], [0.0, 1.0]]]).double()
    models = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]]]).double()
    for alpha, w in ((1.0, [5 / 8, 1 / 8]), (0.0, [2 / 3, 0.0])):  # [[3, α], [α, 3]] w = (2, α)
        close(least_squares(models, grams, alpha), torch.tensor([w]).double())


# ------------------------------------------------------------------------------------------
# The router and the WEMoE module
# ------------------------------------------------------------------------------------------


@given(st.integers(0, 2), st.integers(1, 6), task_numbers, batch_sizes, axes, st.floats(-1, 1), seeds)
def test_router_is_its_formula_averaged_over_tokens(depth, size, tasks, batch, tokens, init, seed):
    torch.manual_seed(seed)
    router = Router(size, tasks, depth, init)
    h = torch.randn(batch, *tokens, size)
    p = list(router.parameters())
    assert [tuple(q.shape) for q in p] == [
        [(tasks,)], [(tasks, size), (tasks,)], [(size, size), (size,), (tasks, size), (tasks,)]
    ][depth]  # fmt: skip
    assert torch.equal(p[-1], torch.full((tasks,), init))
    if depth == 2:
        assert not p[1].any()
    randomised(router)
    for b in range(batch):
        rows = h[b].reshape(-1, size)
        hidden = torch.relu(rows @ p[0].T + p[1]) if depth == 2 else rows
        lam = hidden @ p[-2].T + p[-1] if depth else p[0].expand(len(rows), -1)
        close(router(h)[b], lam.mean(0))


def test_routers_start_small():
    torch.manual_seed(0)
    weights = [p for p in Router(64, 64, 2).parameters() if p.dim() == 2]
    assert all(0.008 < w.std() < 0.012 for w in weights)


@given(kinds, task_numbers, batch_sizes, axes, st.integers(0, 2), seeds)
def test_output_and_gradients_are_the_equation_evaluated_sample_by_sample(kind, tasks, batch, tokens, depth, seed):
    pretrained, finetuned = family(kind, 4, tasks, seed)
    module = WEMoE(pretrained, finetuned, randomised(Router(4, tasks, depth), 0.3))
    x = torch.randn(batch, *tokens, 4, requires_grad=True)
    sources = [x, *module.router.parameters()]
    y, expected = module(x), literal(pretrained, finetuned, module.router(x), x)
    close(y, expected)
    direction = torch.randn_like(y)
    gradients = (torch.autograd.grad((out * direction).sum(), sources) for out in (y, expected))
    for ours, theirs in zip(*gradients):
        close(ours, theirs, atol=1e-3)  # sums of gradients over samples and tokens, of order ten


@given(kinds, task_numbers, batch_sizes, axes, st.floats(-1, 1), seeds)
def test_one_hot_zero_and_constant_routers(kind, tasks, batch, tokens, lam, seed):
    pretrained, finetuned = family(kind, 4, tasks, seed)
    x = torch.randn(batch, *tokens, 4)
    merged = task_arithmetic(pretrained, [task_vector(pretrained, model) for model in finetuned], lam)
    for rows in (1, batch):  # one set of weights that all samples share, or one for each
        eye, zeros, constant = torch.eye(tasks), torch.zeros(rows, tasks), torch.full((rows, tasks), lam)
        for t in range(tasks):
            close(WEMoE(pretrained, finetuned, Fixed(eye[t].repeat(rows, 1)))(x), finetuned[t](x))
        close(WEMoE(pretrained, finetuned, Fixed(zeros))(x), pretrained(x))
        close(WEMoE(pretrained, finetuned, Fixed(constant))(x), functional_call(pretrained, merged, (x,)))


@given(kinds, task_numbers, st.integers(2, 5), axes, st.randoms(), seeds)
def test_samples_do_not_depend_on_each_other(kind, tasks, batch, tokens, random, seed):
    pretrained, finetuned = family(kind, 4, tasks, seed)
    module = WEMoE(pretrained, finetuned, randomised(Router(4, tasks)))
    x, some = torch.randn(batch, *tokens, 4), random.sample(range(batch), random.randint(1, batch))
    close(module(x)[some], module(x[some]))


@given(kinds, st.integers(2, 4), batch_sizes, st.randoms(), seeds)
def test_order_of_tasks_does_not_matter_to_wemoe(kind, tasks, batch, random, seed):
    pretrained, finetuned = family(kind, 4, tasks, seed)
    x, lam, order = torch.randn(batch, 2, 4), torch.randn(batch, tasks), random.sample(range(tasks), tasks)
    one = WEMoE(pretrained, finetuned, Fixed(lam))
    other = WEMoE(pretrained, [finetuned[t] for t in order], Fixed(lam[:, order]))
    close(one(x), other(x))


@pytest.mark.parametrize("tile", [(1, 1, 1), (2, 7, 3), (3, 16, 2)])
def test_tiles_of_any_size_give_the_same(tile, monkeypatch):
    pretrained, finetuned = family("plain", 4, 3, 0)
    module, x = WEMoE(pretrained, finetuned, randomised(Router(4, 3))), torch.randn(3, 5, 4)
    results = []
    for size in ((99, 99, 99), tile):
        monkeypatch.setitem(wemoe._TILE, "cpu", size)
        y = module(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(module.router.parameters()))])
    for whole, tiled in zip(*results):
        close(whole, tiled, atol=1e-3)


@pytest.mark.skipif(torch.__version__ < (2, 6), reason="vmap takes no saved-tensor hooks before torch 2.6")
@pytest.mark.parametrize("kind", ["plain", "gated", "attention"])
def test_merged_weights_are_not_kept_for_the_backward_pass(kind):
    if kind == "attention":
        models = [nn.MultiheadAttention(32, 2, batch_first=True) for _ in range(3)]
    else:
        models = [MLPS[kind](32) for _ in range(3)]
    batch = 16
    module = WEMoE(models[0], models[1:], Router(32, 2))
    x = torch.randn(batch, 2, 32, requires_grad=True)
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = module(x, x, x, need_weights=False)[0] if kind == "attention" else module(x)
    fixed = {p.untyped_storage().data_ptr() for p in module.parameters()}
    merged = batch * sum(p.numel() * 4 for p in models[0].parameters())
    assert sum(size for address, size in kept.items() if address not in fixed) < merged / 2
    y.square().sum().backward()
    assert all(p.grad.any() for p in module.router.parameters())


@pytest.mark.parametrize("training", [True, False])
@given(batch=st.integers(1, 4).filter(lambda b: b != 3), seed=seeds)
def test_attention_with_its_further_arguments_and_outputs(training, batch, seed):
    torch.manual_seed(seed)
    models = [randomised(nn.MultiheadAttention(4, 2, batch_first=True), 0.3).train(training) for _ in range(3)]
    q, k = torch.randn(batch, 3, 4), torch.randn(batch, 5, 4)
    mask, padding = torch.ones(3, 5, dtype=torch.bool).triu(1), torch.zeros(batch, 5, dtype=torch.bool)
    padding[:, 4:] = True
    for t in (0, 1):
        module = WEMoE(models[0], models[1:], Repeated(torch.eye(2)[t])).train(training)
        ours, theirs = (m(q, k, value=k, attn_mask=mask, key_padding_mask=padding) for m in (module, models[1 + t]))
        close(ours[0], theirs[0])
        close(ours[1], theirs[1])
        assert module(q, k, k, need_weights=False)[1] is None


def test_an_argument_that_could_belong_to_the_samples_or_not_is_refused():
    models = [nn.MultiheadAttention(4, 2, batch_first=True) for _ in range(2)]
    module, x = WEMoE(models[0], models[1:], Router(4, 1)), torch.randn(3, 3, 4)
    with pytest.raises(ValueError, match=r"\(3, 3\) may belong to the samples"):
        module(x, x, x, attn_mask=torch.zeros(3, 3))
    assert wemoe._belongs_to_samples(torch.ones(4, 3), torch.ones(4, 3, 4))  # a mask of tokens
    with pytest.raises(ValueError, match=r"shape \(4,\) may belong to the samples"):
        wemoe._belongs_to_samples(torch.ones(4), torch.ones(4, 3, 4))  # as a scale of features would be


def test_the_input_may_be_given_by_name_and_outputs_may_be_nested():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, hidden_states, scale=1.0, bias=None):
            return {"out": self.fc(hidden_states) * scale + bias, "pair": (None, hidden_states.mean(-1)), "n": 3}

    models = [randomised(Block()) for _ in range(3)]
    module, x, bias = WEMoE(models[0], models[1:], Repeated(torch.eye(2)[1])), torch.randn(2, 3, 4), torch.randn(4)
    ours, theirs = (m(hidden_states=x, scale=2.0, bias=bias) for m in (module, models[2]))
    close(ours["out"], theirs["out"])
    close(ours["pair"][1], theirs["pair"][1])
    assert ours["pair"][0] is None and ours["n"] == 3


def test_functions_of_parameters_are_functions_of_merged_parameters():
    """Parameters are merged before anything is computed from them: parametrizations, low-rank adapters, w.T @ w."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 4))
            self.c, self.bent = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4)
            nn.utils.parametrize.register_parametrization(self.bent, "weight", nn.Tanh())

        def forward(self, x):
            assert self.a.shape == (4, 2) and self.a.dtype == x.dtype and self.a.device == x.device
            x = F.linear(x, self.a.mT, torch.ones(2)) @ self.b + F.linear(x, self.c, torch.ones(4))
            return self.bent(x @ (self.a @ self.b)) + torch.einsum("...i,ij->...j", x, self.b.T @ self.b)

    models = [randomised(Odd(), 0.5) for _ in range(3)]
    lam, x = torch.randn(3, 2), torch.randn(3, 5, 4)
    close(WEMoE(models[0], models[1:], Fixed(lam))(x), literal(models[0], models[1:], lam, x))


# ------------------------------------------------------------------------------------------
# Types, devices, copies
# ------------------------------------------------------------------------------------------


# How task vectors are stored: as they are, sparse, or as matrices of low rank.
FORMS = {"dense": {}, "sparse": {"keep": 0.4}, "low rank": {"rank": 2}}


@pytest.fixture(params=FORMS)
def form(request) -> dict:
    return FORMS[request.param]


@pytest.fixture
def module_and_input(form):
    pretrained, finetuned = family("plain", 8, 3, 0)
    return WEMoE(pretrained, finetuned, randomised(Router(8, 3), 0.2), **form), torch.randn(4, 5, 8)


def test_copies_and_saved_modules_are_equal(module_and_input, form):
    module, x = module_and_input
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    fresh = WEMoE(*family("plain", 8, 3, 1), Router(8, 3), **form)
    fresh.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False), fresh):
        assert torch.equal(other(x), module(x))
        assert [n for n, p in other.named_parameters() if p.requires_grad] == [
            n for n, p in module.named_parameters() if p.requires_grad
        ]  # fmt: skip


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_other_types(module_and_input, dtype, atol):
    module, x = module_and_input
    expected = module(x)
    converted = copy.deepcopy(module).to(dtype)
    y = converted(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, atol=atol, rtol=0.05)
    y.float().square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in converted.router.parameters())


@pytest.mark.parametrize("kind", ["plain", "normed", "gated"])
def test_bfloat16_autocast_gives_the_type_of_a_dense_module_and_nearly_the_same(kind, form):
    pretrained, finetuned = family(kind, 8, 2, 0)
    module = WEMoE(pretrained, finetuned, Repeated(torch.eye(2)[0]), **form)
    x = torch.randn(4, 5, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, dense = module(x), finetuned[0](x)
        loss = y.float().square().mean()
    assert y.dtype == dense.dtype
    torch.testing.assert_close(y.float(), module(x), atol=0.1, rtol=0.05)
    loss.backward()
    reference = torch.autograd.grad(module(x).square().mean(), module.router.lam)
    torch.testing.assert_close(module.router.lam.grad, reference[0], atol=0.05, rtol=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_what_the_cpu_gives(module_and_input):
    module, x = module_and_input
    torch.testing.assert_close(module.cuda()(x.cuda()).cpu(), module.cpu()(x), atol=1e-4, rtol=1e-4)


def test_the_wrapped_module_stays_in_reach_but_not_its_tensors(module_and_input):
    module, _ = module_and_input
    assert getattr(module, "0") is module.pretrained[0]
    linear = WEMoE(nn.Linear(4, 4), [nn.Linear(4, 4)], Router(4, 1))
    assert linear.in_features == 4
    for name, message in (("weight", "'weight' differs between samples"), ("nothing", "no attribute 'nothing'")):
        with pytest.raises(AttributeError, match=message):
            getattr(linear, name)


# ------------------------------------------------------------------------------------------
# Upscaling
# ------------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """Two blocks of attention and an MLP, with a head, like any vision transformer without the vision."""

    def __init__(self, size: int = 4):
        super().__init__()
        self.embed = nn.Linear(3, size)
        self.position = nn.Parameter(torch.randn(size))
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "norm": nn.LayerNorm(size),
                "attn": nn.MultiheadAttention(size, 2, batch_first=True),
                "mlp": nn.Sequential(nn.Linear(size, 6), nn.GELU(), nn.Linear(6, size)),
            }) for _ in range(2)
        )  # fmt: skip
        self.head = nn.Linear(size, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        for block in self.blocks:
            h = block["norm"](x)
            x = x + block["attn"](h, h, h, need_weights=False)[0]
            x = x + block["mlp"](x)
        return self.head(x.mean(1))


def set_routing(model: nn.Module, lam: Tensor) -> None:
    for module in model.modules():
        if isinstance(module, WEMoE):
            module.router = Repeated(lam)


@given(task_numbers, batch_sizes, st.integers(0, 2), seeds)
def test_models_that_differ_in_their_mlps_are_recovered_whole(tasks, batch, depth, seed):
    torch.manual_seed(seed)
    pretrained = Transformer()
    finetuned = [copy.deepcopy(pretrained) for _ in range(tasks)]
    for model in finetuned:
        for block in model.blocks:
            randomised(block["mlp"])
    model, x = upscale(pretrained, finetuned, router_depth=depth), torch.randn(batch, 3, 3)
    for t in range(tasks):
        set_routing(model, torch.eye(tasks)[t])
        close(model(x), finetuned[t](x))


def leaves(name: str, module: nn.Module) -> bool:
    """For `modules`: those that hold parameters themselves."""
    return any(True for _ in module.parameters(recurse=False))


def layers(count: int, seed: int = 0) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), Gated(6))
        for _ in range(count)
    ]


def test_any_models_are_recovered_when_every_module_with_parameters_is_routed():
    pretrained, *finetuned = layers(4)
    x = torch.randn(3, 2, 4)
    model = upscale(pretrained, finetuned, modules=leaves)
    assert sum(isinstance(module, WEMoE) for module in model.modules()) == 6
    for t in range(3):
        set_routing(model, torch.eye(3)[t])
        close(model(x), finetuned[t](x))
    transformers_ = [Transformer() for _ in range(3)]  # holds parameters itself: it is routed as a whole
    model, x = upscale(transformers_[0], transformers_[1:], modules=leaves, router_depth=0), torch.randn(2, 4, 3)
    assert isinstance(model, WEMoE)
    set_routing(model, torch.eye(2)[1])
    close(model(x), transformers_[2](x))


@given(st.floats(-1, 1), st.integers(0, 2), seeds)
def test_upscaled_models_start_from_task_arithmetic_and_everything_else_stays_there(lam, depth, seed):
    torch.manual_seed(seed)
    pretrained, *finetuned = (Transformer() for _ in range(3))
    merged = task_arithmetic(pretrained, [task_vector(pretrained, model) for model in finetuned], lam)
    before = copy.deepcopy([model.state_dict() for model in (pretrained, *finetuned)])
    model = upscale(pretrained, {"a": finetuned[0], "b": finetuned[1]}, init_lambda=lam, router_depth=depth)
    for name, p in model.named_parameters():
        if ".router." not in name and ".mlp." not in name:
            close(p, merged[name])
    set_routing(model, torch.full((2,), lam))
    x = torch.randn(2, 3, 3)
    close(model(x), functional_call(pretrained, merged, (x,)), atol=1e-4)
    after = [m.state_dict() for m in (pretrained, *finetuned)]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_only_routers_are_trainable_and_receive_gradients():
    pretrained, *finetuned = (Transformer() for _ in range(4))
    model = upscale(pretrained, finetuned)
    model(torch.randn(2, 3, 3)).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == (".router." in name)
        assert (p.grad is not None) == (".router." in name)
    routers = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in routers) == 2 * (4 * 4 + 4 + 4 * 3 + 3)
    mlp = sum(p.numel() for p in pretrained.blocks[0]["mlp"].parameters())
    total = sum(p.numel() for p in model.parameters())
    assert total == sum(p.numel() for p in pretrained.parameters()) + 2 * 3 * mlp + sum(p.numel() for p in routers)


@pytest.mark.parametrize("tasks, millions", list(enumerate([7.10, 7.11, 7.11, 7.12, 7.13, 7.14, 7.15, 7.16], 1)))
def test_number_of_trainable_parameters_is_the_published_one(tasks, millions):
    """ViT-B/32: 12 routers of D = 768. Published in shared/facts, after FusionBench's documentation."""
    assert round(12 * sum(p.numel() for p in Router(768, tasks).parameters()) / 1e6, 2) == millions


SIZES = dict(hidden_size=8, intermediate_size=16, num_attention_heads=2)


def hugging_face(model: str, config: str, **options) -> nn.Module:
    sizes = dict(num_hidden_layers=2, **SIZES)
    return getattr(transformers, model)(getattr(transformers, config)(**{**sizes, **options}))


VISION, TEXT = dict(image_size=8, patch_size=4), dict(vocab_size=20, max_position_embeddings=8)
IMAGES, TOKENS = torch.randn(2, 3, 8, 8), torch.randint(3, 19, (2, 5))
LIBRARIES = {  # a small model; its input; the names of its MLPs
    "open_clip": (
        lambda: open_clip.CLIP(4, dict(image_size=8, patch_size=4, width=8, layers=2, head_width=4),
                               dict(context_length=5, vocab_size=20, width=8, heads=2, layers=1)),
        lambda model: torch.cat([model.encode_image(IMAGES), model.encode_text(TOKENS)]),
        ["transformer.resblocks.0.mlp", "visual.transformer.resblocks.0.mlp", "visual.transformer.resblocks.1.mlp"],
    ),
    "timm": (
        lambda: timm.models.VisionTransformer(8, 4, embed_dim=8, depth=2, num_heads=2, num_classes=3),
        lambda model: model(IMAGES),
        ["blocks.0.mlp", "blocks.1.mlp"],
    ),
    "torchvision": (
        lambda: torchvision.models.VisionTransformer(8, 4, 2, 2, 8, 16),
        lambda model: model(IMAGES),
        ["encoder.layers.encoder_layer_0.mlp", "encoder.layers.encoder_layer_1.mlp"],
    ),
    "CLIP": (
        lambda: transformers.CLIPModel(transformers.CLIPConfig(
            text_config=dict(num_hidden_layers=1, **SIZES, **TEXT),
            vision_config=dict(num_hidden_layers=1, **SIZES, **VISION), projection_dim=4)),
        lambda model: model(input_ids=TOKENS, pixel_values=IMAGES).logits_per_image,
        ["text_model.encoder.layers.0.mlp", "vision_model.encoder.layers.0.mlp"],
    ),
    "ViT": (
        lambda: hugging_face("ViTModel", "ViTConfig", **VISION),
        lambda model: model(IMAGES).last_hidden_state,
        ["layers.0.mlp", "layers.1.mlp"],
    ),
    "T5": (
        lambda: hugging_face("T5ForConditionalGeneration", "T5Config", d_model=8, d_ff=16, d_kv=4,
                             num_hidden_layers=1, num_decoder_layers=1, num_heads=2, vocab_size=20,
                             feed_forward_proj="gated-gelu"),
        lambda model: model(input_ids=TOKENS, decoder_input_ids=TOKENS).logits,
        ["decoder.block.0.layer.2.DenseReluDense", "encoder.block.0.layer.1.DenseReluDense"],
    ),
    "Llama": (
        lambda: hugging_face("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2, **TEXT),
        lambda model: model(TOKENS).logits,
        ["model.layers.0.mlp", "model.layers.1.mlp"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("library", LIBRARIES)
def test_mlps_of_the_common_libraries_are_found_and_run(library):
    make, run, names = LIBRARIES[library]
    torch.manual_seed(0)
    pretrained = make().eval()
    finetuned = [copy.deepcopy(pretrained) for _ in range(2)]
    for model in finetuned:
        for name in names:
            randomised(model.get_submodule(name), 0.3)
    model = upscale(pretrained, finetuned)
    assert sorted(name for name, module in model.named_modules() if isinstance(module, WEMoE)) == names
    run(model).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    for t in (0, 1):
        set_routing(model, torch.eye(2)[t])
        with torch.no_grad():
            close(run(model), run(finetuned[t]), atol=1e-4)


@pytest.mark.parametrize(
    "library, modules, count",
    [("open_clip", r"attn$", 3), ("timm", r"\.attn$", 2), ("ViT", r"attention$", 2), ("CLIP", r"self_attn$", 2)]
    + [("Llama", r"self_attn$", 2), ("torchvision", r"self_attention$", 2), ("T5", r"SelfAttention$", 2)],
)
def test_attention_of_the_common_libraries_can_be_chosen(library, modules, count):
    make, run, _ = LIBRARIES[library]
    torch.manual_seed(0)
    pretrained = make().eval()
    finetuned = [copy.deepcopy(pretrained) for _ in range(2)]
    for model in finetuned:
        for name, module in model.named_modules():
            if re.search(modules, name):
                randomised(module, 0.3)
    model = upscale(pretrained, finetuned, modules=modules)
    assert sum(isinstance(module, WEMoE) for module in model.modules()) == count
    set_routing(model, torch.eye(2)[1])
    options = {"use_cache": False} if library in ("Llama", "T5") else {}
    with contextlib.suppress(AttributeError):
        model.config.use_cache = options.get("use_cache", True)
    close(run(model), run(finetuned[1]), atol=1e-4)


def test_a_module_that_a_model_uses_twice_is_routed_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Linear(4, 4)
            self.again = nn.ModuleDict({"mlp": self.mlp})

        def forward(self, x):
            return self.again["mlp"](self.mlp(x))

    pretrained, *finetuned = (Twice() for _ in range(3))
    model, x = upscale(pretrained, finetuned), torch.randn(2, 4)
    assert model.mlp is model.again["mlp"]
    set_routing(model, torch.eye(2)[0])
    close(model(x), finetuned[0](x))


def test_routing_weights_are_recorded_by_module_while_asked_for():
    model, x = upscale(Transformer(), [Transformer() for _ in range(3)]), torch.randn(2, 5, 3)
    with routing_weights(model) as weights:
        model(x)
        model(x[:1])
    assert {name: tuple(lam.shape) for name, lam in weights.items()} == {f"blocks.{i}.mlp": (1, 3) for i in (0, 1)}
    assert not any(lam.requires_grad for lam in weights.values())
    model(x)
    assert all(lam.shape == (1, 3) for lam in weights.values())


# ------------------------------------------------------------------------------------------
# Task vectors that take less memory: sparse ones, and matrices of low rank
# ------------------------------------------------------------------------------------------

forms = st.sampled_from([{"keep": 0.05}, {"keep": 0.4}, {"keep": 1.0}, {"rank": 1}, {"rank": 3}, {"rank": 99}])


def output_and_gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    """y, and the gradients of its sum with some weights in x and in all that is trainable."""
    x = x.clone().requires_grad_()
    y = module(x)
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)
    return [y, *torch.autograd.grad((y * weights).sum(), [x, *(p for p in module.parameters() if p.requires_grad)])]


def trained_to(pretrained: nn.Module, vectors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The fine-tuned models that have these task vectors, stacked as in WEMoE.task_vectors."""
    return [
        {name: p + vectors[name][t] for name, p in pretrained.state_dict().items()}
        for t in range(len(next(iter(vectors.values()))))
    ]


@given(kinds, task_numbers, batch_sizes, axes, forms, st.tuples(*[st.sampled_from([1, 3, 99])] * 3), seeds)
def test_every_form_is_the_dense_module_of_its_own_task_vectors(kind, tasks, batch, tokens, form, tile, seed):
    pretrained, finetuned = family(kind, 4, tasks, seed)
    router, x = randomised(Router(4, tasks)), torch.randn(batch, *tokens, 4)
    module = WEMoE(pretrained, finetuned, router, **form)
    dense = WEMoE(pretrained, trained_to(pretrained, module.task_vectors), router)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(wemoe._TILE, "cpu", tile)
        for ours, theirs in zip(output_and_gradients(module, x), output_and_gradients(dense, x), strict=True):
            close(ours, theirs, atol=1e-3)


@given(kinds, task_numbers, st.sampled_from([{"keep": 1.0}, {"rank": 4}, {"rank": 99}]), seeds)
def test_all_entries_and_the_full_rank_are_the_dense_module(kind, tasks, form, seed):
    pretrained, finetuned = family(kind, 4, tasks, seed)
    router, x = randomised(Router(4, tasks)), torch.randn(3, 2, 4)
    results = [output_and_gradients(WEMoE(pretrained, finetuned, router, **options), x) for options in (form, {})]
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs, atol=1e-3)


@given(kinds, task_numbers, st.floats(0.01, 1), seeds)
def test_the_largest_entries_of_each_tensor_and_task_are_kept(kind, tasks, keep, seed):
    pretrained, finetuned = family(kind, 4, tasks, seed)
    vectors = WEMoE(pretrained, finetuned, Router(4, tasks), keep=keep).task_vectors
    for t, model in enumerate(finetuned):
        tau = task_vector(pretrained, model)
        same({name: v[t] for name, v in vectors.items()}, {n: wemoe.trim({n: p}, keep)[n] for n, p in tau.items()})


@given(kinds, task_numbers, st.integers(1, 4), seeds)
def test_truncated_matrices_are_the_best_of_their_rank(kind, tasks, rank, seed):
    """Eckart and Young: what is left over has the other singular values, and no matrix of the rank leaves less."""
    pretrained, finetuned = family(kind, 4, tasks, seed)
    vectors = WEMoE(pretrained, finetuned, Router(4, tasks), rank=rank).task_vectors
    for t, model in enumerate(finetuned):
        for name, tau in task_vector(pretrained, model).items():
            if tau.dim() < 2:
                same(vectors[name][t], tau)
                continue
            left = torch.linalg.svdvals(tau)[rank:]
            close(torch.linalg.svdvals(tau - vectors[name][t])[: len(left)], left, atol=1e-4)
            assert torch.linalg.matrix_rank(vectors[name][t], rtol=1e-4) <= rank


@pytest.mark.parametrize("kind", ["plain", "normed", "gated"])
def test_gradients_of_every_form_against_finite_differences(form, kind):
    module = WEMoE(*family(kind, 4, 2, 0), Fixed(torch.zeros(3, 2)), **form).double()
    x, lam = torch.randn(3, 2, 4).double().requires_grad_(), torch.randn(3, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, lam: functional_call(module, {"router.lam": lam}, (x,)), (x, lam))


@pytest.mark.parametrize("tasks", [1, 3])
def test_sparse_and_low_rank_forms_really_take_less_memory(tasks):
    models = [nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(tasks + 1)]
    matrices, vectors = 64 * 128 + 128 * 32, 128 + 32

    def size(**form) -> int:
        module = WEMoE(models[0], models[1:], Fixed(torch.zeros(tasks)), **form)
        tensors = [*module.parameters(), *module.buffers()]
        total = reproduce.model_bytes(module)
        assert sum(t.untyped_storage().nbytes() for t in tensors) == total  # none is a part of a larger one
        return total - reproduce.model_bytes(models[0]) - 4 * tasks

    dense = 4 * tasks * (matrices + vectors)
    assert size() == dense
    assert size(keep=0.1) == pytest.approx(0.1 * 2 * dense, rel=0.01)  # a place, of 32 bits, for every value
    assert size(rank=3) == 4 * tasks * (3 * (64 + 128 + 128 + 32) + vectors)


def test_a_whole_transformer_with_one_router_or_many(form):
    """Routers with the same weights do what one shared router does; its gradient is the sum of theirs."""
    torch.manual_seed(0)
    pretrained, *finetuned = (randomised(Transformer(), 0.3) for _ in range(3))
    options, x = dict(modules=r"\.(mlp|attn)$", **form), torch.randn(3, 2, 3)
    one, many = (upscale(pretrained, finetuned, shared_router=s, **options) for s in (True, False))
    routed = [[m for m in model.modules() if isinstance(m, WEMoE)] for model in (one, many)]
    router = routed[0][0].router
    randomised(router)
    assert len(routed[0]) == len(routed[1]) == 4 and all(module.router is router for module in routed[0])
    assert {id(p) for p in one.parameters() if p.requires_grad} == {id(p) for p in router.parameters()}
    for module in routed[1]:
        module.router.load_state_dict(router.state_dict())
    (y, _, *shared), (expected, _, *separate) = (output_and_gradients(model, x) for model in (one, many))
    close(y, expected)
    for i, gradient in enumerate(shared):
        close(gradient, sum(separate[i :: len(shared)]), atol=1e-3)
    copied = copy.deepcopy(one)
    assert len({id(module.router) for module in copied.modules() if isinstance(module, WEMoE)}) == 1
    fresh = upscale(pretrained, finetuned, shared_router=True, **options)
    fresh.load_state_dict(one.state_dict())
    assert torch.equal(fresh(x), y) and torch.equal(copied(x), y)
    for name, module in one.named_modules():
        if isinstance(module, WEMoE):
            for model, state in zip(finetuned, trained_to(module.pretrained, module.task_vectors)):
                model.get_submodule(name).load_state_dict(state)
    dense = upscale(pretrained, finetuned, modules=options["modules"], shared_router=True)
    dense.blocks[0]["mlp"].router.load_state_dict(router.state_dict())
    close(dense(x), y)


def test_in_twelve_layers_a_shared_router_is_a_twelfth_of_what_is_trained():
    models = [timm.models.VisionTransformer(8, 4, embed_dim=8, depth=12, num_heads=2) for _ in range(2)]
    separate, shared = (upscale(models[0], models[1:], shared_router=s) for s in (False, True))
    sizes = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (separate, shared)]
    assert sizes[0] == 12 * sizes[1] == 12 * (8 * 8 + 8 + 8 + 1)


# ------------------------------------------------------------------------------------------
# Entropy and adaptation
# ------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 12), st.sampled_from([0.1, 1, 10, 1e3, 1e6]), seeds)
def test_entropy_and_its_gradient_against_float64(batch, classes, scale, seed):
    torch.manual_seed(seed)
    logits = (scale * torch.randn(batch, classes)).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    p = exact.softmax(-1)
    reference = -torch.special.xlogy(p, p).sum(-1)
    ours = entropy(logits)
    torch.testing.assert_close(ours.double(), reference, atol=1e-5, rtol=1e-5)
    ours.sum().backward()
    log_p = F.log_softmax(exact, -1)
    gradient = -p * (log_p + reference.unsqueeze(-1))  # dH/dz_i = -p_i (log p_i + H)
    torch.testing.assert_close(logits.grad.double(), gradient, atol=1e-5, rtol=1e-4)


def test_entropy_of_saturated_uniform_and_masked_logits():
    assert entropy(torch.tensor([[1e4, 0.0, -1e4]])).item() == 0
    assert entropy(torch.zeros(1, 7)).item() == pytest.approx(math.log(7))
    masked = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    entropy(masked).backward()
    assert entropy(masked).item() == pytest.approx(math.log(2))
    assert masked.grad.isfinite().all()
    assert entropy(torch.zeros(1, 4, dtype=torch.float16)).dtype == torch.float32


def small_problem(seed: int = 0, batches: int = 3):
    torch.manual_seed(seed)
    pretrained, *finetuned = (Transformer() for _ in range(3))
    model = upscale(pretrained, finetuned)
    loaders = {task: [torch.randn(4, 3, 3) for _ in range(batches)] for task in "ab"}
    heads = {"a": nn.Linear(5, 3).requires_grad_(False), "b": lambda features: 5 * features[:, :4]}
    return model, loaders, heads


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_adapt_lowers_the_entropy_and_touches_only_routers():
    model, loaders, heads = small_problem()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    seen = []
    history = adapt(model, loaders, heads, steps=30, lr=3e-2, on_step=lambda step, values: seen.append((step, values)))
    assert len(history) == 30 and sum(history[-3:]) < 0.8 * sum(history[:3])
    assert [step for step, _ in seen] == list(range(1, 31))
    assert [sum(values.values()) / 2 for _, values in seen] == pytest.approx(history)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_adapt_names_the_task_whose_batches_are_not_inputs_alone():
    model, loaders, heads = small_problem()
    labelled = [(x, torch.zeros(len(x))) for x in loaders["b"]]
    with pytest.raises(ValueError, match="The loader of task 'b' yields <class 'tuple'>"):
        adapt(model, {**loaders, "b": labelled}, heads, steps=1)


@pytest.mark.parametrize("diversity", [0.0, 0.5, 1.0])
def test_adapt_is_adam_on_the_sum_over_tasks_with_cosine_annealing(diversity):
    """H(mean of p) is the mean H(p) plus the mutual information, the mean divergence of p from its mean."""
    model, loaders, heads = small_problem()
    other, means = copy.deepcopy(model), []
    history = adapt(model, loaders, heads, steps=5, lr=1e-2, diversity=diversity)
    optimizer = torch.optim.Adam([p for p in other.parameters() if p.requires_grad])
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 + math.cos(math.pi * step / 5)) / 2
        optimizer.zero_grad()
        entropies = []
        for t in "ab":
            p = heads[t](other(loaders[t][step % 3])).double().softmax(-1)
            information = (p * (p / p.mean(0)).log()).sum(-1).mean()
            entropies.append(-(p * p.log()).sum(-1).mean())
            ((1 - diversity) * entropies[-1] - diversity * information).backward()
        optimizer.step()
        means.append(sum(entropies).item() / 2)
    assert history == pytest.approx(means, abs=1e-5)
    for ours, theirs in zip(trained(model).values(), trained(other).values()):
        close(ours, theirs, atol=1e-4)


def test_diversity_keeps_adaptation_from_one_answer_to_everything():
    """Logits (2 λ_1 + λ_2 x, -λ_2 x): the first vector favours a class, the second one tells x = 1 from x = -1."""
    zeros, x = {"weight": torch.zeros(2, 1), "bias": torch.zeros(2)}, torch.tensor([[1.0], [-1.0]] * 4)
    finetuned = [zeros | {"bias": torch.tensor([2.0, 0.0])}, zeros | {"weight": torch.tensor([[1.0], [-1.0]])}]
    linear, answers = nn.Linear(1, 2), {}
    linear.load_state_dict(zeros)
    for diversity in (0.0, 1.0):
        model = WEMoE(linear, finetuned, Router(1, 2, 0, 0.3))
        history = adapt(model, {"a": [x]}, {"a": nn.Identity()}, steps=200, lr=0.1, diversity=diversity)
        assert history[-1] < 0.05  # sure of its answers, in both cases
        answers[diversity] = model(x).argmax(-1).tolist()
    assert answers == {0.0: [0] * 8, 1.0: [0, 1] * 4}


def test_diversity_of_masked_classes_is_finite():
    model, loaders, heads = small_problem()
    masked = {
        task: lambda z, head=head: head(z).index_fill(-1, torch.tensor(0), -math.inf) for task, head in heads.items()
    }
    adapt(model, loaders, masked, steps=2, lr=1e-2, diversity=1.0)
    assert all(p.isfinite().all() for p in trained(model).values())


def test_adapt_is_reproducible_and_starts_short_loaders_again():
    results = []
    for repeat in (1, 1, 4):
        model, loaders, heads = small_problem()
        loaders = {task: batches * repeat for task, batches in loaders.items()}
        results.append((adapt(model, loaders, heads, steps=10, lr=1e-2), trained(model)))
    for other in results[1:]:
        assert other[0] == results[0][0]
        assert all(torch.equal(p, other[1][name]) for name, p in results[0][1].items())


def test_adapt_goes_on_where_it_was_interrupted():
    model, loaders, heads = small_problem()
    other = copy.deepcopy(model)
    history = adapt(model, loaders, heads, steps=8, lr=1e-2)
    optimizer = torch.optim.Adam([p for p in other.parameters() if p.requires_grad])

    class Stop(Exception):
        pass

    def stop(step: int, _: dict) -> None:
        if step == 5:
            raise Stop

    with pytest.raises(Stop):
        adapt(other, loaders, heads, steps=8, lr=1e-2, optimizer=optimizer, on_step=stop)
    rest = {task: batches[2:] + batches[:2] for task, batches in loaders.items()}  # 5 of 3 + 3 + 2 batches are used up
    assert adapt(other, rest, heads, steps=8, lr=1e-2, optimizer=optimizer, start=5) == history[5:]
    assert all(torch.equal(p, trained(other)[name]) for name, p in trained(model).items())


def test_adapt_refuses_a_non_finite_entropy_and_leaves_the_routers_as_they_were():
    model, loaders, heads = small_problem()
    loaders["b"][2][0, 0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="task 'b' is nan at step 3 of 4"):
        adapt(model, loaders, heads, steps=4, lr=1e-2)
    fresh, loaders, heads = small_problem()
    snapshots = []
    adapt(fresh, loaders, heads, steps=4, lr=1e-2, on_step=lambda step, _: snapshots.append(trained(fresh)))
    for name, p in trained(model).items():
        assert torch.equal(p, snapshots[1][name])
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------------------------
# AdaMerging, Concrete masks, ensembles, classifiers of tasks
# ------------------------------------------------------------------------------------------


def ada_merging(models: list[nn.Module], **options) -> wemoe.AdaMerging:
    return wemoe.AdaMerging(models[0], [task_vector(models[0], model) for model in models[1:]], **options)


@given(st.booleans(), task_numbers, st.floats(-1, 1), seeds)
def test_adamerging_starts_as_task_arithmetic_and_its_merge_is_what_it_computes(layer_wise, tasks, lam, seed):
    torch.manual_seed(seed)
    models = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)) for _ in range(tasks + 1)]
    for model in models:
        model(torch.randn(8, 3))  # running means: task vectors have them too
        model.eval()
    model, x = ada_merging(models, layer_wise=layer_wise, init_lambda=lam), torch.randn(5, 3)
    assert model.lam.shape == (8 if layer_wise else 1, tasks)
    merged = task_arithmetic(models[0], [task_vector(models[0], m) for m in models[1:]], lam)
    for name, p in model.merged().items():
        close(p, merged[name])
    model.lam.data.normal_()
    still = copy.deepcopy(models[0])
    still.load_state_dict({**still.state_dict(), **model.merged()})
    with torch.no_grad():  # gradients in running means are no business of torch's
        close(model(x), still(x))


@given(task_numbers, seeds)
def test_taskwise_adamerging_is_a_constant_router_for_the_whole_model(tasks, seed):
    torch.manual_seed(seed)
    models, x = [randomised(Transformer(), 0.3) for _ in range(tasks + 1)], torch.randn(2, 4, 3)
    merging = ada_merging(models, layer_wise=False)
    mixture = upscale(models[0], models[1:], router_depth=0, modules=lambda name, module: name == "")
    merging.lam.data.normal_()
    mixture.router.bias.data.copy_(merging.lam[0])
    (y, dx, dlam), theirs = (output_and_gradients(model, x) for model in (merging, mixture))
    for ours, other in zip((y, dx, dlam[0]), theirs, strict=True):
        close(ours, other, atol=1e-3)


@given(task_numbers, seeds)
def test_constant_routers_are_layerwise_adamerging_where_a_module_has_one_lambda(tasks, seed):
    models = layers(tasks + 1, seed)
    merging, mixture = ada_merging(models), upscale(models[0], models[1:], router_depth=0, modules=leaves)
    rows = [(0, 1), (2, 3), (4, 5), (6,), (7,), (8,)]  # the places of each module's parameters among all
    routers = [module.router for module in mixture.modules() if isinstance(module, WEMoE)]
    for router, places in zip(routers, rows, strict=True):
        router.bias.data.normal_()
        merging.lam.data[list(places)] = router.bias.data
    x = torch.linspace(-1, 1, 24).view(3, 2, 4)
    (y, dx, dlam), (expected, dx_, *dbias) = (output_and_gradients(model, x) for model in (merging, mixture))
    close(y, expected, atol=1e-4)
    close(dx, dx_, atol=1e-3)
    for places, gradient in zip(rows, dbias):
        close(dlam[list(places)].sum(0), gradient, atol=1e-3)


@pytest.mark.parametrize("merging", [ada_merging, partial(ada_merging, layer_wise=False), None])
def test_adapt_trains_lambda_or_the_mask_and_nothing_else(merging):
    _, loaders, heads = small_problem()
    models = [Transformer() for _ in range(3)]
    model = merging(models) if merging else concrete(models)
    assert {name.split(".")[0] for name in trained(model)} == ({"lam"} if merging else {"x"})
    before = copy.deepcopy(model.state_dict())
    history = adapt(model, loaders, heads, steps=30, lr=0.1)
    assert sum(history[-3:]) < sum(history[:3])
    changed = {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}
    assert changed and changed <= set(trained(model))


def concrete(models: list[nn.Module]) -> reproduce.ConcreteMask:
    return reproduce.ConcreteMask(models[0], [task_vector(models[0], model) for model in models[1:]])


def test_a_concrete_mask_starts_as_task_arithmetic_and_is_drawn_anew_in_training():
    models = layers(3)
    model, x = concrete(models), torch.randn(5, 4)
    merged = task_arithmetic(models[0], [task_vector(models[0], m) for m in models[1:]], 0.3)
    with torch.no_grad():
        for name, p in model.merged().items():
            close(p, merged[name])
        close(model(x), functional_call(models[0], merged, (x,)))
        for i, logits in enumerate(model.x):
            logits.normal_()
            mask = list(model.masks().values())[i]
            close(mask, torch.sigmoid(2 * logits) / torch.sigmoid(2 * logits).mean())
        assert torch.equal(model(x), model(x))
    draws = [model.masks() for _ in range(2)]
    for name in draws[0]:
        assert not torch.equal(draws[0][name], draws[1][name])
        for masks in draws:
            assert masks[name].min() >= 0 and masks[name].mean().item() == pytest.approx(1)
    assert not torch.equal(model(x), model(x))


def test_an_ensemble_averages_logits_and_a_model_alone_decides_as_before():
    torch.manual_seed(0)
    models, x, head = [nn.Linear(4, 6) for _ in range(3)], torch.randn(50, 4), torch.randn(6, 5)
    logits = [F.normalize(model(x), dim=-1) @ head for model in models]
    close(reproduce.Ensemble(models)(x) @ head / 3, sum(logits) / 3)
    assert torch.equal((reproduce.Ensemble(models[:1])(x) @ head).argmax(-1), (models[0](x) @ head).argmax(-1))


def test_a_classifier_of_tasks_gives_weights_that_sum_to_one():
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Flatten(), nn.Linear(12, 6)).requires_grad_(False)
    router, x = reproduce.TaskRouter(tower, 3), torch.randn(4, 3, 2, 2)
    lam = router(x)
    assert lam.shape == (4, 3) and (lam > 0).all() and lam.std(0).min() > 0
    close(lam.sum(1), torch.ones(4))
    close(router(x), router.classifier(6**0.5 * F.normalize(tower(x), dim=-1)).softmax(-1))
    assert set(trained(router)) == {"classifier.weight", "classifier.bias"}


# ------------------------------------------------------------------------------------------
# Errors name what is wrong
# ------------------------------------------------------------------------------------------


def linear_with(**entries: Tensor) -> dict[str, Tensor]:
    return {**nn.Linear(2, 2).state_dict(), **entries}


LINEAR = nn.Linear(2, 2)
ERRORS = {
    "'bias': in the pre-trained model, but not in the fine-tuned": lambda: task_vector(LINEAR, nn.Linear(2, 2, False)),
    "'more': in the fine-tuned model, but not in": lambda: task_vector(LINEAR, linear_with(more=torch.ones(1))),
    r"'weight' has shape \(2, 3\) in the fine-tuned model, but \(2, 2\)": lambda: task_vector(
        LINEAR, linear_with(weight=torch.ones(2, 3))
    ),
    "'bias' holds NaN or infinite values in the fine-tuned": lambda: task_vector(
        LINEAR, linear_with(bias=torch.tensor([0, math.nan]))
    ),
    "'weight' holds NaN or infinite values in the pre-trained": lambda: task_vector(
        linear_with(weight=torch.full((2, 2), math.inf)), LINEAR
    ),
    "2 scaling factors for 1 task vectors": lambda: task_arithmetic(LINEAR, [LINEAR.state_dict()], [0.1, 0.2]),
    "'more': in a task vector, but": lambda: task_arithmetic(LINEAR, [linear_with(more=torch.ones(1))]),
    "up to 1, got keep=0": lambda: wemoe.trim(vector(1.0), 0),
    "up to 1, got keep=nan": lambda: wemoe.ties([vector(1.0)], math.nan),
    "'b': in a task vector, but not in the first one": lambda: wemoe.ties(
        [vector(1.0), vector(1.0) | {"b": LINEAR.bias}]
    ),
    "depth 0, 1 or 2, not 3": lambda: Router(4, 2, depth=3),
    "at least one task": lambda: Router(4, 0),
    r"\(B, ..., 4\), got \(2, 3\)": lambda: Router(4, 2)(torch.ones(2, 3)),
    "0 fine-tuned modules": lambda: WEMoE(LINEAR, [], Router(2, 1)),
    "2 fine-tuned modules and a router with 3 outputs": lambda: WEMoE(LINEAR, [LINEAR] * 2, Router(2, 3)),
    r"weights of shape \(1, 3\) for an input \(1, 2\)": lambda: WEMoE(LINEAR, [LINEAR], Fixed(torch.ones(3)))(
        torch.ones(1, 2)
    ),
    "'bias': in the pre-trained": lambda: WEMoE(LINEAR, [nn.Linear(2, 2, False)], Router(2, 1)),
    "up to 1, got keep=1.5": lambda: WEMoE(LINEAR, [LINEAR], Router(2, 1), keep=1.5),
    "rank of at least 1, got rank=0": lambda: WEMoE(LINEAR, [LINEAR], Router(2, 1), rank=0),
    "not both: got keep=0.5 and rank=2": lambda: WEMoE(LINEAR, [LINEAR], Router(2, 1), keep=0.5, rank=2),
    "one hidden size, found 4 and, '1.blocks.0.mlp', 6": lambda: upscale(
        nn.Sequential(Transformer(4), Transformer(6)), [nn.Sequential(Transformer(4), Transformer(6))],
        modules=r"^0\.blocks\.0\.mlp$|^1\.blocks\.0\.mlp$", shared_router=True,
    ),
    "'weight': in .*, but not in a task vector": lambda: wemoe.AdaMerging(LINEAR, [{"bias": LINEAR.bias}]),
    "No MLP was found in Sequential.*among '0', '1'": lambda: upscale(
        nn.Sequential(LINEAR, nn.Linear(2, 2)), [nn.Sequential(LINEAR, LINEAR)]
    ),
    r"modules='mpl' selects no module.*'blocks\.0\.mlp'": lambda: upscale(
        Transformer(), [Transformer()], modules="mpl"
    ),
    "at least one fine-tuned model": lambda: upscale(Transformer(), []),
    "hidden size of 'conv'": lambda: upscale(*convolutions(), modules="conv"),
    "No head is given for 'b'; there are heads for 'a'": lambda: adapt(
        small_problem()[0], {"a": [], "b": []}, {"a": nn.Identity()}
    ),
    "loader of task 'a' yields no batch": lambda: adapt(small_problem()[0], {"a": []}, {"a": nn.Identity()}),
    "task 'a' yields no batch when started again": lambda: adapt(
        small_problem()[0], {"a": iter([torch.ones(1, 3, 3)])}, {"a": nn.Identity()}
    ),
    "no loaders": lambda: adapt(small_problem()[0], {}, {}),
    "no trainable parameters": lambda: adapt(Transformer().requires_grad_(False), {}, {}),
    "steps=0": lambda: adapt(small_problem()[0], {"a": []}, {"a": nn.Identity()}, steps=0),
    "lr=nan": lambda: adapt(small_problem()[0], {"a": []}, {"a": nn.Identity()}, lr=math.nan),
}  # fmt: skip


def convolutions() -> tuple[nn.Module, list[nn.Module]]:
    pretrained, *finetuned = (nn.ModuleDict({"conv": nn.Conv2d(1, 1, 3)}) for _ in range(2))
    return pretrained, finetuned


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_offender(message):
    with pytest.raises(ValueError, match=message):
        ERRORS[message]()


def test_parameters_that_are_not_the_routers_cannot_be_trained_silently():
    module = WEMoE(LINEAR, [nn.Linear(2, 2)], Router(2, 1))
    module.pretrained.requires_grad_(True)
    with pytest.raises(NotImplementedError, match="only the router is trainable"):
        module(torch.ones(2, 2))


# ------------------------------------------------------------------------------------------
# The miniature
# ------------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(miniature.TASKS)), st.sampled_from(miniature.SPLITS), st.integers(1, 30), seeds)
@settings(max_examples=10)
def test_images_depend_on_task_split_seed_and_place_alone(task, split, count, seed):
    images, labels = miniature.render(task, split, count, seed)
    assert images.shape == (count, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.tolist() == [i % len(miniature.TASKS[task].classes) for i in range(count)]
    again = miniature.render(task, split, count + 3, seed)[0]
    assert torch.equal(again[:count], images)
    assert not torch.equal(miniature.render(task, split, count, seed + 1)[0], images)


@pytest.mark.parametrize("task", miniature.TASKS)
def test_test_images_are_never_training_images(task):
    splits = [
        {image.numpy().tobytes() for image in miniature.render(task, s, 120, seed=0)[0]} for s in miniature.SPLITS
    ]
    assert all(len(split) == 120 for split in splits)
    assert not splits[0] & splits[1] and not splits[1] & splits[2]


def test_eight_tasks_of_eight_to_twelve_classes():
    assert len(miniature.TASKS) == 8
    assert all(8 <= len(set(task.classes)) <= 12 for task in miniature.TASKS.values())
    with pytest.raises(ValueError, match="Weather.*Scenes"):
        miniature.render("Weather", "test", 1, 0)
    with pytest.raises(ValueError, match="nights.*train"):
        miniature.render("Scenes", "nights", 1, 0)


def test_the_shipped_checkpoint_is_a_small_half_precision_clip():
    assert miniature.CHECKPOINT.stat().st_size < 16 * 2**20
    assert {p.dtype for p in load_file(miniature.CHECKPOINT).values()} == {torch.float16}
    clip = miniature.load_pretrained()
    assert isinstance(clip, open_clip.CLIP) and not clip.training
    task = miniature.TASKS["Signs"]
    head = miniature.zero_shot_head(clip, "Signs")
    with torch.no_grad():  # one embedding a class, normalised for each template, averaged, normalised, times the scale
        texts = [[template.format(name) for template in task.templates] for name in task.classes]
        mean = torch.stack([F.normalize(clip.encode_text(miniature.tokenize(t)), dim=-1).mean(0) for t in texts])
        close(head, F.normalize(mean, dim=-1).T * clip.logit_scale.exp(), atol=1e-4)


def test_pretraining_writes_a_checkpoint_that_can_be_read_again(tmp_path, monkeypatch):
    file = tmp_path / "clip.safetensors"
    arguments = ["data.miniature", "--steps", "2", "--text-steps", "2", "--per-class", "1", "--output", str(file)]
    states = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", arguments)
        miniature.main()
        states.append(load_file(file))
    monkeypatch.setattr(miniature, "CHECKPOINT", file)
    assert not torch.equal(miniature.load_pretrained().visual.proj, miniature.build_model().visual.proj)
    assert all(torch.equal(p, states[1][name]) for name, p in states[0].items())


# ------------------------------------------------------------------------------------------
# Corrupted images
# ------------------------------------------------------------------------------------------

NOISE = ("motion_blur", "impulse_noise", "gaussian_noise", "spatter")  # what draws random numbers
every_corruption = pytest.mark.parametrize("name", CORRUPTIONS)


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """Four test images of each of the eight tasks: uint8 (32, 3, 32, 32)."""
    return torch.cat([miniature.render(task, "test", 4, 0)[0] for task in miniature.TASKS])


def plain(value: int, *shape: int) -> Tensor:
    return torch.full(shape, value, dtype=torch.uint8)


@every_corruption
@given(st.integers(1, 150), st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), seeds)
@settings(max_examples=10)
def test_a_picture_of_any_size_is_corrupted_alike_in_any_company(name, count, height, width, severity, seed):
    images = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (150, 3, height, width), np.uint8))
    before, spoiled = images.clone(), corrupt(images, name, severity, seed)
    assert spoiled.dtype == torch.uint8 and spoiled.shape == images.shape and torch.equal(images, before)
    assert torch.equal(spoiled[:count], corrupt(images[:count], name, severity, seed))


@every_corruption
def test_chance_differs_between_images_and_seeds_where_there_is_any(name):
    """But for one image in a hundred: two motions may be so near that rounding makes them one."""
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 32, 32), np.uint8))
    spoiled = torch.cat([corrupt(image.expand(150, -1, -1, -1), name, 3, seed) for seed in (0, 1)])
    different = len(spoiled.unique(dim=0))
    assert different >= 297 if name in NOISE else different == 1


@every_corruption
def test_damage_grows_with_severity(name, pictures):
    spoiled = [corrupt(pictures, name, severity) for severity in range(1, 6)]
    means = [(images.float() - pictures.float()).abs().mean().item() for images in spoiled]
    assert means == sorted(set(means)) and means[0] > 1  # of 255


@pytest.mark.parametrize("name", ["motion_blur", "pixelate", "contrast"])
def test_what_has_no_detail_loses_none(name):
    images = torch.cat([plain(value, 1, 3, 9, 31) for value in (0, 77, 255)])
    assert torch.equal(corrupt(images, name), images)


@pytest.mark.parametrize("name", ["motion_blur", "pixelate", "spatter"])
def test_lengths_are_shares_of_the_picture(name, pictures):
    small, large = (pictures.repeat_interleave(k, 2).repeat_interleave(k, 3) for k in (2, 6))
    spoiled = F.avg_pool2d(corrupt(large, name).float(), 3)
    assert (spoiled - corrupt(small, name).float()).abs().mean() < 3.5  # of 255


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
    large = pictures[:4].repeat_interleave(2, 2).repeat_interleave(2, 3)
    blocks = large.float().reshape(4, 3, 8, 8, 8, 8).mean((3, 5))
    expected = blocks.repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert (corrupt(large, "pixelate").float() - expected).abs().max() <= 0.501


def test_spatter_covers_the_stated_share_and_leaves_the_rest():
    spoiled = corrupt(plain(255, 20, 3, 32, 32), "spatter")
    covered = (spoiled < 255).any(1)
    assert (covered.float().mean((1, 2)) - 0.5).abs().max() < 0.01  # thin edges may round away
    mud = (spoiled == torch.tensor([75, 50, 25])[:, None, None]).all(1)
    assert (mud.float().mean((1, 2)) > 0.2).all()


def test_contrast_keeps_the_mean_and_jpeg_is_pillows(pictures):
    before, after = pictures.double(), corrupt(pictures, "contrast").double()
    assert (after.mean((2, 3)) - before.mean((2, 3))).abs().max() < 0.5
    assert (after.std((2, 3)) - 0.1 * before.std((2, 3))).abs().max() < 0.3  # a rounding error's deviation
    for image, spoiled in zip(pictures, corrupt(pictures, "jpeg_compression")):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file := io.BytesIO(), "JPEG", quality=8)
        assert np.array_equal(np.asarray(Image.open(file)), spoiled.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    "images, name, severity, message",
    [
        (
            plain(0, 1, 3, 8, 8),
            "fog",
            5,
            "no corruption 'fog' of severity 5: corruptions are motion_blur, .* 1, 2, 3, 4",
        ),
        (plain(0, 1, 3, 8, 8), "contrast", 6, "no corruption 'contrast' of severity 6"),
        (
            torch.zeros(1, 3, 8, 8),
            "contrast",
            5,
            r"images are torch.float32 \(1, 3, 8, 8\), expected torch.uint8 \(N, 3",
        ),
        (plain(0, 1, 1, 8, 8), "contrast", 5, r"\(1, 1, 8, 8\), expected torch.uint8"),
    ],
)
def test_what_cannot_be_corrupted_is_refused(images, name, severity, message):
    with pytest.raises(ValueError, match=message):
        corrupt(images, name, severity)


# ------------------------------------------------------------------------------------------
# The paper's suite: its inputs, on files of the real formats and layouts made here
# ------------------------------------------------------------------------------------------

TINY = clip.Architecture("tiny", "tiny-quickgelu", "openai", "timm/tiny.openai", "tanganke/clip-tiny_{}")
TINY_VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32}
TINY_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory):
    """A small architecture that open_clip knows by name, with and without QuickGELU."""
    folder = tmp_path_factory.mktemp("configs")
    for name, quick in (("tiny-quickgelu", True), ("tiny-plain", False)):
        config = {"embed_dim": 48, "quick_gelu": quick, "vision_cfg": TINY_VISION, "text_cfg": TINY_TEXT}
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return folder


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return randomise(open_clip.create_model(TINY.model)).eval()


def randomise(module):
    """Different numbers in every entry, so that a mistaken mapping shows."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name != "logit_scale":
                p.uniform_(-0.1, 0.1).add_(p.ndim == 1 and name.endswith("weight"))
    return module


def hf_vision(**sizes):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(1)
    return randomise(CLIPVisionModel(CLIPVisionConfig(hidden_act="quick_gelu", **sizes))).eval()


def tiny_hugging_face():
    return hf_vision(
        hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )


def bare(state):
    return {name.removeprefix("vision_model."): value for name, value in state.items()}


# ------------------------------------------------------------------------------------------
# facts
# ------------------------------------------------------------------------------------------


def test_facts_are_those_of_the_paper():
    expected = {
        "SUN397": 397,
        "Cars": 196,
        "RESISC45": 45,
        "EuroSAT": 10,
        "SVHN": 10,
        "GTSRB": 43,
        "MNIST": 10,
        "DTD": 47,
    }
    assert {name: len(task.classes) for name, task in clip.TASKS.items()} == expected
    assert sum(task.images for task in clip.TASKS.values()) == 87433
    assert all("{}" in template for task in clip.TASKS.values() for template in task.templates)
    assert clip.TASKS["SVHN"].config == "cropped_digits" and clip.TASKS["Cars"].checkpoint_suffix == "stanford-cars"
    published = json.loads((Path(clip.__file__).parent / "published.json").read_text())
    assert published["tasks"] == list(clip.TASKS)
    for rows in published["main"].values():
        for row in rows:
            assert len(row["accuracy"]) == 8 and abs(np.mean(row["accuracy"]) - row["average"]) < 0.6, row


@pytest.mark.parametrize("name", clip.ARCHITECTURES)
def test_architectures_are_open_clips_own(name):
    arch = clip.architecture(name)
    tag = open_clip.get_pretrained_cfg(arch.model, arch.pretrained)
    assert (
        tag["hf_hub"] == f"{arch.repo}/" and tag["quick_gelu"] and open_clip.get_model_config(arch.model)["quick_gelu"]
    )
    assert clip.preprocessing(arch).input_size == (3, 224, 224)


def test_other_architectures():
    other = clip.architecture("ViT-B-16", "laion2b_s34b_b88k")
    assert (other.model, other.repo, other.experts) == ("ViT-B-16", "laion/CLIP-ViT-B-16-laion2B-s34B-b88K", None)
    siglip = clip.preprocessing(clip.architecture("ViT-B-16-SigLIP", "webli"))
    assert siglip.mean == (0.5, 0.5, 0.5) and siglip.resize_mode == "squash"
    with pytest.raises(clip.InputError, match="'nonsense' for 'ViT-B-16'.*openai"):
        clip.architecture("ViT-B-16", "nonsense")
    with pytest.raises(clip.InputError, match="--finetune"):
        clip.expert_repo(other, "DTD")


# ------------------------------------------------------------------------------------------
# pre-trained model
# ------------------------------------------------------------------------------------------


def test_load_pretrained_from_a_mirror(tmp_path, model):
    path = tmp_path / TINY.repo / "open_clip_model.safetensors"
    path.parent.mkdir(parents=True)
    save_file(model.state_dict(), path)
    loaded = clip.load_pretrained(TINY, tmp_path)
    assert not loaded.training and all(p.dtype == torch.float32 for p in loaded.parameters())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    x = torch.linspace(-4, 4, 99)
    for tower in (loaded.visual.transformer, loaded.transformer):
        for block in tower.resblocks:
            assert torch.allclose(block.mlp.gelu(x), x * torch.sigmoid(1.702 * x))
            assert not torch.allclose(block.mlp.gelu(x), F.gelu(x), atol=1e-3)


def test_load_pretrained_by_download(tmp_path, model, monkeypatch):
    """Without a mirror open_clip downloads by its tag; QuickGELU is forced where the tag needs it."""
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    tag = {"openai": {"hf_hub": "timm/tiny/", "quick_gelu": True, "mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0)}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-plain", tag)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(path))
    loaded = clip.load_pretrained(clip.architecture("tiny-plain", "openai"))
    assert isinstance(loaded.visual.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)
    assert loaded.visual.preprocess_cfg["mean"] == (0.1, 0.2, 0.3)

    def fail(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", fail)
    with pytest.raises(clip.InputError, match="tiny-plain from openai.*no route to host"):
        clip.load_pretrained(clip.architecture("tiny-plain", "openai"))


@pytest.mark.parametrize("damage", ["absent", "garbage", "shape", "nan", "missing"])
def test_load_pretrained_refuses(tmp_path, model, damage):
    path = tmp_path / TINY.repo / "open_clip_model.safetensors"
    path.parent.mkdir(parents=True)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if damage == "shape":
        state["visual.proj"] = torch.zeros(3, 3)
    elif damage == "nan":
        state["visual.proj"][0, 0] = float("nan")
    elif damage == "missing":
        del state["visual.proj"]
    if damage == "garbage":
        path.write_bytes(b"garbage")
    elif damage != "absent":
        save_file(state, path)
    with pytest.raises(
        clip.InputError, match="open_clip_model" if damage == "garbage" else "tiny.openai|visual.proj"
    ) as e:
        clip.load_pretrained(TINY, tmp_path)
    assert "\n" not in str(e.value)


# ------------------------------------------------------------------------------------------
# conversion
# ------------------------------------------------------------------------------------------


def same_features(hf, visual, tower):
    pooled = []
    visual.load_state_dict(tower, assign=True)
    visual.ln_post.register_forward_hook(lambda *call: pooled.append(call[2][:, 0]))
    x = torch.randn(2, 3, *visual.image_size)
    with torch.no_grad():
        expected, projected = hf(pixel_values=x).pooler_output, visual(x)
    assert expected.std() > 0.1  # features that differ among themselves
    torch.testing.assert_close(pooled[0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(projected, expected @ tower["proj"], atol=1e-5, rtol=1e-5)


def test_conversion_at_small_size(model):
    hf = tiny_hugging_face()
    visual = open_clip.create_model(TINY.model).visual
    projection = visual.proj.detach().clone()
    tower = clip.from_hugging_face(hf.state_dict(), visual, "file")
    assert list(tower) == list(visual.state_dict()) and torch.equal(tower["proj"], projection)
    tower["proj"] += 1  # a copy: the pre-trained tower stays as it was
    assert torch.equal(visual.proj, projection)
    tower["proj"] -= 1
    same_features(hf, visual.eval(), tower)


def test_conversion_at_the_size_of_b32():
    hf = hf_vision()  # CLIPVisionConfig's defaults are those of B/32
    assert sum(p.numel() for p in hf.parameters()) == 87_456_000
    with torch.device("meta"):
        visual = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32-quickgelu")).visual
    visual.proj = nn.Parameter(torch.randn(768, 512) / 30)
    same_features(hf, visual.eval(), clip.from_hugging_face(hf.state_dict(), visual, "file"))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_load_expert(tmp_path, model, file, prefix):
    state = {prefix + name: value for name, value in bare(tiny_hugging_face().state_dict()).items()}
    plain = clip.from_hugging_face(state, model.visual, "file")
    state[f"{prefix}embeddings.position_ids"] = torch.arange(17)[None]
    path = tmp_path / "tanganke/clip-tiny_stanford-cars" / file
    path.parent.mkdir(parents=True)
    state = {name: value.half() if "fc1" in name else value for name, value in state.items()}
    save_file(state, path) if file.endswith("safetensors") else torch.save(state, path)
    tower = clip.load_expert(TINY, "Cars", model.visual, tmp_path)
    assert tower.keys() == plain.keys()
    for name, value in tower.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, plain[name].half().float() if "c_fc" in name else plain[name]), name


def no_q(state):
    del state["encoder.layers.1.self_attn.q_proj.bias"]


def extra(state):
    state["text_model.embeddings"] = torch.zeros(3)


def misshapen(state):
    state["encoder.layers.0.self_attn.k_proj.weight"] = torch.zeros(64, 63)


def transposed(state):
    state["encoder.layers.0.mlp.fc1.weight"] = state["encoder.layers.0.mlp.fc1.weight"].T.contiguous()


def infinite(state):
    state["post_layernorm.bias"][3] = float("inf")


def mixed_prefixes(state):
    state["vision_model.post_layernorm.bias"] = state["post_layernorm.bias"].clone()


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (no_q, "lacks encoder.layers.1.self_attn.q_proj.bias"),
        (extra, "does not know: text_model.embeddings"),
        (misshapen, r"k_proj.weight has the shape \(64, 63\), the architecture needs \(64, 64\)"),
        (transposed, r"fc1.weight has the shape \(64, 256\)"),
        (infinite, "post_layernorm.bias has values that are not finite"),
        (mixed_prefixes, "lacks vision_model.embeddings.class_embedding, .* and 32 more"),
    ],
)
def test_load_expert_refuses(tmp_path, model, damage, sentence):
    state = {name: value.clone() for name, value in bare(tiny_hugging_face().state_dict()).items()}
    damage(state)
    path = tmp_path / "tanganke/clip-tiny_dtd/model.safetensors"
    path.parent.mkdir(parents=True)
    save_file(state, path)
    with pytest.raises(clip.InputError, match=f"model.safetensors.*{sentence}"):
        clip.load_expert(TINY, "DTD", model.visual, tmp_path)


def test_load_expert_refuses_unreadable_files(tmp_path, model):
    with pytest.raises(clip.InputError, match="no files in .*clip-tiny_dtd; `hf download"):
        clip.load_expert(TINY, "DTD", model.visual, tmp_path)
    folder = tmp_path / "tanganke/clip-tiny_dtd"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(clip.InputError, match="no model.safetensors or pytorch_model.bin; it has: config.json"):
        clip.load_expert(TINY, "DTD", model.visual, tmp_path)
    bad = folder / "pytorch_model.bin"
    marker = tmp_path / "marker"
    torch.save(Evil(marker), bad)
    with pytest.raises(clip.InputError, match="pytorch_model.bin is not a readable"):
        clip.load_expert(TINY, "DTD", model.visual, tmp_path)
    assert not marker.exists()
    torch.save([1, 2], bad)
    with pytest.raises(clip.InputError, match="should hold tensors by name"):
        clip.load_expert(TINY, "DTD", model.visual, tmp_path)


# ------------------------------------------------------------------------------------------
# the authors' pickles
# ------------------------------------------------------------------------------------------


class Evil:
    """Unpickled in the ordinary way, it creates a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class OldClasses:
    """The names that the authors' files use, importable while the files are written and gone afterwards."""

    def __enter__(self):
        self.package = types.ModuleType("src"), types.ModuleType("src.modeling")
        sys.modules["src"], sys.modules["src.modeling"] = self.package

        class ImageEncoder(nn.Module):
            pass

        class ClassificationHead(nn.Linear):
            pass

        class VisualTransformer(nn.Module):
            pass

        self.classes = ImageEncoder, ClassificationHead, VisualTransformer
        for cls, module in zip(self.classes, (self.package[1], self.package[1], open_clip.model)):
            cls.__module__, cls.__qualname__ = module.__name__, cls.__name__
            setattr(module, cls.__name__, cls)
        return self

    def __exit__(self, *_):
        del sys.modules["src"], sys.modules["src.modeling"], open_clip.model.VisualTransformer

    def encoder(self, clip_model):
        """ImageEncoder.model.visual, the two preprocessing pipelines beside it, without the text transformer."""
        visual = self.classes[2]()
        visual.__dict__.update(clip_model.visual.__dict__)
        inner = nn.Module()
        inner.visual, inner.token_embedding, inner.logit_scale = visual, nn.Embedding(5, 4), clip_model.logit_scale
        inner.register_buffer("attn_mask", torch.full((3, 3), -torch.inf), persistent=False)
        encoder = self.classes[0]()
        encoder.model, encoder.cache_dir = inner, None
        encoder.train_preprocess = open_clip.image_transform(32, is_train=True)
        encoder.val_preprocess = open_clip.image_transform(32, is_train=False)
        return encoder

    def head(self, weight, normalize=True, bias=0.0):
        head = self.classes[1](weight.shape[1], weight.shape[0])
        head.normalize, head.weight = normalize, nn.Parameter(weight.clone())
        head.bias = nn.Parameter(torch.full_like(head.bias, bias))
        return head


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def save(request):
    def write(thing, path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(thing, path, _use_new_zipfile_serialization=request.param)

    return write


def tower_like(seed):
    torch.manual_seed(seed)
    return randomise(open_clip.create_model(TINY.model))


def test_authors_experts(tmp_path, save):
    folder, weight = tmp_path / "tiny", torch.randn(10, 48)
    pretrained, finetuned = tower_like(2), tower_like(3)
    half = tower_like(4).half()
    with OldClasses() as old:
        save(old.encoder(pretrained), folder / "zeroshot.pt")
        save(old.encoder(finetuned), folder / "MNIST/finetuned.pt")
        save(old.encoder(half), folder / "SVHN/finetuned.pt")
        for task in ("MNIST", "SVHN"):
            save(old.head(weight), folder / f"head_{task}.pt")
    with pytest.raises((AttributeError, ModuleNotFoundError)):  # the complaint under every repository of this family
        torch.load(folder / "zeroshot.pt", weights_only=False)
    before = set(sys.modules)
    found = authors.load_authors_experts(TINY, tmp_path, ["MNIST", "SVHN"])
    assert not any(name.split(".")[0] == "src" for name in set(sys.modules) - before)
    assert not found.visual.training and isinstance(found.visual, open_clip.transformer.VisionTransformer)
    for tower, source in ((found.visual.state_dict(), pretrained), (found.experts["MNIST"], finetuned)):
        expected = source.visual.state_dict()
        assert tower.keys() == expected.keys() and all(torch.equal(tower[n], expected[n]) for n in expected)
    assert all(v.dtype == torch.float32 for v in found.experts["SVHN"].values())
    assert torch.equal(found.experts["SVHN"]["conv1.weight"], half.visual.conv1.weight.float())
    assert torch.equal(found.heads["MNIST"], weight.T)
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(found.visual(x), pretrained.visual(x), atol=1e-6)


def test_authors_files_refused(tmp_path, save, model):
    shapes = {name: value.shape for name, value in model.visual.state_dict().items()}
    path = tmp_path / "finetuned.pt"
    with pytest.raises(clip.InputError, match="finetuned.pt is not a module.*No such file"):
        authors.read_tower(path, shapes)
    with OldClasses() as old:
        other = tower_like(5)
        other.visual.ln_post.bias.data[0] = float("nan")
        save(old.encoder(other), path)
        with pytest.raises(clip.InputError, match="finetuned.pt: ln_post.bias has values that are not finite"):
            authors.read_tower(path, shapes)
        del other.visual.transformer.resblocks[1]
        save(old.encoder(other), path)
        with pytest.raises(clip.InputError, match="finetuned.pt lacks transformer.resblocks.1"):
            authors.read_tower(path, shapes)
        for head, sentence in (
            (old.head(torch.ones(9, 48)), r"weight has the shape \(9, 48\), the architecture needs \(10, 48\)"),
            (old.head(torch.ones(10, 48), bias=1.0), "no bias"),
            (old.head(torch.ones(10, 48), normalize=False), "should normalise"),
        ):
            save(head, path)
            with pytest.raises(clip.InputError, match=sentence):
                authors.read_head(path, "MNIST", 48)
    save({"a": 1}, path)
    with pytest.raises(clip.InputError, match="model.visual.*holds: nothing"):
        authors.read_tower(path, shapes)


def test_truncated_files_are_refused(tmp_path, save):
    path = tmp_path / "head.pt"
    with OldClasses() as old:
        save(old.head(torch.randn(10, 48)), path)
    whole = path.read_bytes()
    assert authors.read_head(path, "MNIST", 48).shape == (48, 10)

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, len(whole) - 1))
    def check(length):
        path.write_bytes(whole[:length])
        with pytest.raises(clip.InputError, match="head.pt"):
            authors.read_head(path, "MNIST", 48)

    check()


def test_malicious_pickles_execute_nothing(tmp_path, save):
    marker, path = tmp_path / "marker", tmp_path / "evil.pt"
    save(Evil(marker), path)
    torch.load(path, weights_only=False)
    assert marker.exists()  # so the file does work on the unwary
    marker.unlink()
    with pytest.raises(clip.InputError, match="model.visual"):
        authors.read_tower(path, {})
    visual = tower_like(6).visual
    with OldClasses() as old:  # hidden within a module that is otherwise in order
        encoder = old.encoder(SimpleNamespace(visual=visual, logit_scale=nn.Parameter(torch.zeros(()))))
        encoder.trap = Evil(marker)
        encoder.model.visual.conv1.trap = [Evil(marker), {Evil: Evil(marker)}]
        save(encoder, path)
    tower = authors.read_tower(path, {n: v.shape for n, v in visual.state_dict().items()})
    assert torch.equal(tower["conv1.weight"], visual.conv1.weight)
    assert not marker.exists()


@pytest.mark.parametrize(
    "body",
    [
        b"cos\nsystem\n(S'touch MARKER'\ntR.",
        b"cposix\nsystem\n(S'touch MARKER'\ntR.",
        b"(S'touch MARKER'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch MARKER'\no.",
        b'cbuiltins\neval\n(S\'__import__("os").system("touch MARKER")\'\ntR.',
        b"c__builtin__\ngetattr\n(c__builtin__\n__import__\n(S'os'\ntRS'system'\ntR(S'touch MARKER'\ntR.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch MARKER\x85R.",
        b"ctorch._utils\n_rebuild_tensor_v2\nN}S'__defaults__'\n(tsd\x86b.",  # state set on a function of the table
        b"ctorch\nload\n(S'MARKER'\ntR.",
        b"c__builtin__\nset\n(cos\nsystem\ntR.",
    ],
)
def test_hand_written_pickles_execute_nothing(tmp_path, body, monkeypatch):
    monkeypatch.chdir(tmp_path)
    original = torch._utils._rebuild_tensor_v2.__defaults__
    preamble = b"".join(pickle.dumps(part, protocol=2) for part in (0x1950A86A20F9469CFC6C, 1001, {}))
    for content in (body, preamble + body + pickle.dumps([])):
        Path("evil.pt").write_bytes(content)
        with pytest.raises(clip.InputError):
            authors.read_tower(Path("evil.pt"), {})
    assert os.listdir(".") == ["evil.pt"] and torch._utils._rebuild_tensor_v2.__defaults__ == original


# ------------------------------------------------------------------------------------------
# the images
# ------------------------------------------------------------------------------------------

MODES = ("RGB", "L", "LA", "P", "RGBA", "CMYK", "I;16", "1")


def picture(mode, width, height, seed=0, orientation=None):
    """An encoded image of the mode."""
    rng = np.random.default_rng(seed)
    rgb = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    sixteen = Image.fromarray(rng.integers(0, 65536, (height, width), np.uint16))
    image = sixteen if mode == "I;16" else rgb.convert(mode)
    file, exif = io.BytesIO(), Image.Exif()
    if orientation:
        exif[Image.ExifTags.Base.Orientation] = orientation
    image.save(file, "JPEG" if mode == "CMYK" or orientation else "PNG", exif=exif)
    return file.getvalue()


def write_parquet(path, images, labels, classes, image="image", label="label", dtype=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    features = {image: datasets.Image(), label: dtype or datasets.ClassLabel(names=list(classes))}
    table = {image: [data and {"bytes": data, "path": None} for data in images], label: labels}
    datasets.Dataset.from_dict(table, datasets.Features(features)).to_parquet(path)


def write_set(root, task, count=12, seed=0, split="test", shards=1, folder=None):
    spec = clip.TASKS[task]
    folder = folder or spec.config or "data"
    sizes = np.random.default_rng(seed).integers(20, 70, (count, 2)).tolist()
    images = [picture(MODES[i % len(MODES)], *sizes[i], seed=seed + i) for i in range(count)]
    labels = [i % len(spec.classes) for i in range(count)]
    for k in range(shards):
        part = slice(k * count // shards, (k + 1) * count // shards)
        path = root / spec.repo / folder / f"{split}-{k:05d}-of-{shards:05d}.parquet"
        write_parquet(path, images[part], labels[part], spec.classes)
    return images, labels


PREP = clip.PreprocessCfg(size=(32, 32))
EXPECTED = open_clip.image_transform(32, is_train=False)


def prepared(data):
    return EXPECTED(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(MODES), st.integers(1, 90), st.integers(1, 90), st.integers(0, 99), st.sampled_from([None, 3, 6])
)
def test_pixels_are_open_clips(mode, width, height, seed, orientation):
    data = picture(mode if orientation is None else "RGB", width, height, seed, orientation)
    transform = clip.Compose(clip.image_transform_v2(PREP, is_train=False).transforms[:-2])
    image = torch.frombuffer(bytearray(clip.pixels(transform, {"bytes": data})), dtype=torch.uint8).view(3, 32, 32)
    torch.testing.assert_close(clip.normalise(image), prepared(data), atol=1e-6, rtol=0)


def test_normalise_takes_the_models_own_mean():
    prep = clip.PreprocessCfg(size=(32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    image = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    for c in range(3):
        torch.testing.assert_close(clip.normalise(image, prep)[:, c], (image[:, c] / 255 - prep.mean[c]) / prep.std[c])


def test_image_set(tmp_path):
    """All modes and sizes, shards in order, the configuration's folder; the second time from the cache alone."""
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    images, labels = write_set(hub, "SVHN", 25, shards=3)
    write_set(hub, "SVHN", 4, seed=9, folder="full_numbers")
    write_set(hub, "SVHN", 5, seed=8, split="train")
    pixels, found = clip.image_set("SVHN", PREP, cache, hub)
    assert pixels.dtype == torch.uint8 and found.dtype == torch.int64 and found.tolist() == labels
    torch.testing.assert_close(clip.normalise(pixels), torch.stack(list(map(prepared, images))), atol=1e-6, rtol=0)
    assert len(clip.image_set("SVHN", PREP, cache, hub, split="train")[1]) == 5
    files = {path: path.stat().st_mtime_ns for path in cache.glob("*.npy")}
    assert len(files) == 2
    again, _ = clip.image_set("SVHN", PREP, cache, hub)
    again += 1  # private memory: the cache is not changed
    assert torch.equal(clip.image_set("SVHN", PREP, cache, hub)[0], pixels)
    assert {path: path.stat().st_mtime_ns for path in cache.glob("*.npy")} == files
    small = clip.PreprocessCfg(size=(16, 16))
    assert clip.image_set("SVHN", small, cache, hub)[0].shape == (25, 3, 16, 16)


def test_changed_and_second_mirrors_are_seen(tmp_path):
    cache, sets = tmp_path / "cache", []
    for hub, seed in ((tmp_path / "a", 0), (tmp_path / "a", 1), (tmp_path / "b", 2)):
        images, _ = write_set(hub, "EuroSAT", 6, seed=seed)
        pixels, _ = clip.image_set("EuroSAT", PREP, cache, hub)
        assert torch.allclose(clip.normalise(pixels[0]), prepared(images[0]), atol=1e-6)
        sets.append(pixels.clone())
    assert not torch.equal(sets[0], sets[1]) and not torch.equal(sets[1], sets[2])


def counted(monkeypatch, fail_at=None, error=KeyboardInterrupt):
    calls, original = [], clip.pixels

    def pixels(*args):
        calls.append(args)
        if len(calls) == fail_at:
            raise error
        return original(*args)

    monkeypatch.setattr(clip, "pixels", pixels)
    return calls


def test_limit_decodes_no_more_and_is_kept_apart(tmp_path, monkeypatch):
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    images, _ = write_set(hub, "MNIST", 20, folder="mnist", shards=2)
    calls = counted(monkeypatch)
    few, labels = clip.image_set("MNIST", PREP, cache, hub, limit=12)
    assert len(calls) == 12 and few.shape == (12, 3, 32, 32) and len(labels) == 12
    everything, all_labels = clip.image_set("MNIST", PREP, cache, hub)
    assert len(everything) == 20
    assert torch.equal(few, everything[:12]) and torch.equal(labels, all_labels[:12])
    spaced = {12: [0, 2, 3, 5, 7, 9, 10, 12, 14, 16, 17, 19], 3: [0, 10, 19], 1: [0], 20: range(20), 50: range(20)}
    for limit, places in spaced.items():
        some, labels_of_some = clip.image_set("MNIST", PREP, cache, hub, limit=limit, spaced=True)
        assert torch.equal(some, everything[list(places)]) and torch.equal(labels_of_some, all_labels[list(places)])
    with pytest.raises(clip.InputError, match="at least 1, not 0"):
        clip.image_set("MNIST", PREP, cache, hub, limit=0)


def test_interruption_leaves_nothing_behind(tmp_path, monkeypatch):
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    images, _ = write_set(hub, "DTD", 9)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counted(patch, fail_at=5)
        clip.image_set("DTD", PREP, cache, hub)
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]
    with monkeypatch.context() as patch:  # a run that was killed leaves an unfinished file, which is removed
        patch.setattr(clip.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(clip.InputError, match="cannot write .*killed"):
            clip.image_set("DTD", PREP, cache, hub)
    (unfinished,) = cache.glob("*.part")
    unfinished.write_bytes(b"half")
    pixels, _ = clip.image_set("DTD", PREP, cache, hub)
    torch.testing.assert_close(clip.normalise(pixels), torch.stack(list(map(prepared, images))), atol=1e-6, rtol=0)
    assert not list(cache.glob("*.part"))


def test_two_at_a_time_decode_once(tmp_path, monkeypatch):
    hub, cache, found = tmp_path / "hub", tmp_path / "cache", []
    write_set(hub, "DTD", 9)
    calls = counted(monkeypatch)
    run = [threading.Thread(target=lambda: found.append(clip.image_set("DTD", PREP, cache, hub))) for _ in range(3)]
    [thread.start() for thread in run]
    [thread.join() for thread in run]
    assert len(calls) == 9 and len(found) == 3 and torch.equal(found[0][0], found[2][0])


@pytest.mark.parametrize(
    "damage, sentence",
    [
        ("label", "EuroSAT, split test of tanganke/eurosat: image 3 has the label 12; 0 to 9 are known"),
        ("negative", "image 3 has the label -1;"),
        ("null", "image 3 has the label None;"),
        ("text", "image 0 has the label 'a';"),
        ("classes", r"has 3 classes \(a, b, c\), but tasks.json 10"),
        ("column", "has no column image; it has: img, label"),
        ("image", "EuroSAT, split test of tanganke/eurosat: image 4 cannot be decoded: cannot identify"),
        ("cut", "image 4 cannot be decoded: .*truncated"),
        ("none", "image 4 cannot be decoded"),
        ("parquet", "test-00000-of-00001.parquet is not a readable parquet file"),
        ("empty", "EuroSAT, split test of tanganke/eurosat has no images"),
        ("split", "data/eurosat|eurosat has no split 'test' in parquet files; it has: contrast, train"),
        (
            "shard",
            "should have all shards of the split 'test' in one folder, but has: data/test-00001-of-00003.parquet",
        ),
        ("versions", "but has: data/test-00000-of-00001.parquet, other/test-00000-of-00001.parquet"),
        ("absent", "no files in .*tanganke/eurosat; `hf download tanganke/eurosat"),
    ],
)
def test_unusable_data_sets_are_refused(tmp_path, damage, sentence):
    classes = clip.TASKS["EuroSAT"].classes
    folder = tmp_path / "tanganke/eurosat/data"
    path = folder / "test-00000-of-00001.parquet"
    images = [picture("RGB", 40, 30, seed) for seed in range(6)]
    labels, options = [0] * 6, {}
    if damage in ("label", "negative", "null"):
        labels[3] = {"label": 12, "negative": -1, "null": None}[damage]
        options = {"dtype": datasets.Value("int64")}
    elif damage == "text":
        labels, options = list("abcdef"), {"dtype": datasets.Value("string")}
    elif damage == "classes":
        classes = "abc"
    elif damage == "column":
        options = {"image": "img"}
    elif damage in ("image", "cut", "none"):
        images[4] = {"image": b"no image", "cut": images[4][:800], "none": None}[damage]
    elif damage == "empty":
        images, labels = [], []
    elif damage == "split":
        write_parquet(folder / "contrast-00000-of-00001.parquet", images, labels, classes)
        path = folder / "train-00000-of-00001.parquet"
    elif damage == "shard":
        path = folder / "test-00001-of-00003.parquet"
    elif damage == "versions":
        write_parquet(folder.parent / "other" / path.name, images, labels, classes)
    if damage != "absent":
        write_parquet(path, images, labels, classes, **options)
    if damage == "parquet":
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(clip.InputError, match=sentence) as e:
        clip.image_set("EuroSAT", PREP, tmp_path / "cache", tmp_path)
    assert "\n" not in str(e.value) and not list(tmp_path.glob("cache/*.npy"))


# ------------------------------------------------------------------------------------------
# the heads
# ------------------------------------------------------------------------------------------


def test_zero_shot_heads(tmp_path, model, monkeypatch):
    heads = clip.zero_shot_heads(model, TINY, tmp_path, ["EuroSAT", "MNIST"])
    assert heads["EuroSAT"].shape == (48, 10) and list(heads) == ["EuroSAT", "MNIST"]
    tokenizer, task = open_clip.get_tokenizer(TINY.model), clip.TASKS["EuroSAT"]
    with torch.no_grad():
        for k in (0, 7):
            texts = model.encode_text(tokenizer([t.format(task.classes[k]) for t in task.templates]))
            mean = F.normalize(F.normalize(texts, dim=-1).mean(0), dim=0)
            torch.testing.assert_close(heads["EuroSAT"][:, k], model.logit_scale.exp() * mean)
    monkeypatch.setattr(clip, "zero_shot_head", lambda *_: pytest.fail("the cached head should do"))
    again = clip.zero_shot_heads(model, TINY, tmp_path, ["EuroSAT"])
    assert torch.equal(again["EuroSAT"], heads["EuroSAT"])
    monkeypatch.undo()
    other = open_clip.create_model(TINY.model)
    other.load_state_dict(model.state_dict())
    other.text_projection.data[0, 0] += 1
    assert not torch.equal(clip.zero_shot_heads(other, TINY, tmp_path, ["EuroSAT"])["EuroSAT"], heads["EuroSAT"])
    monkeypatch.setitem(clip.TASKS, "EuroSAT", task._replace(templates=["{}"]))
    assert not torch.equal(clip.zero_shot_heads(model, TINY, tmp_path, ["EuroSAT"])["EuroSAT"], heads["EuroSAT"])


# ------------------------------------------------------------------------------------------
# the plan
# ------------------------------------------------------------------------------------------


def mirror(root, model, tasks=("EuroSAT", "SVHN"), count=8):
    """A whole mirror in the real layout, as `hf download --local-dir` makes it."""
    path = root / TINY.repo / "open_clip_model.safetensors"
    path.parent.mkdir(parents=True)
    save_file(model.state_dict(), path)
    for task in tasks:
        path = root / clip.expert_repo(TINY, task) / "model.safetensors"
        path.parent.mkdir(parents=True)
        save_file(dict(tiny_hugging_face().state_dict()), path)
        write_set(root, task, count)
        (root / clip.TASKS[task].repo / "README.md").write_text("---\n---\n")
    return root


class FakeHub:
    """huggingface_hub's metadata and downloads, served from a mirror."""

    def __init__(self, root, monkeypatch):
        self.root, self.downloaded = root, []
        monkeypatch.setattr(clip, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", self.look_up)

    def repo_info(self, name, repo_type, files_metadata):
        assert files_metadata and repo_type == ("dataset" if name in {t.repo for t in clip.TASKS.values()} else "model")
        files = [path for path in (self.root / name).rglob("*") if path.is_file()]
        siblings = [
            SimpleNamespace(rfilename=str(f.relative_to(self.root / name)), size=f.stat().st_size) for f in files
        ]
        splits = [{"name": "train", "num_examples": 1000}, {"name": "test", "num_examples": 50}]
        config = "cropped_digits" if "svhn" in name else "default"
        card = {
            "dataset_info": [{"config_name": "full_numbers", "splits": []}, {"config_name": config, "splits": splits}]
        }
        return SimpleNamespace(siblings=siblings, sha=f"commit of {name}", card_data=card)

    def download(self, name, file, repo_type, revision):
        assert revision == f"commit of {name}"
        self.downloaded.append((name, file))
        return str(self.root / name / file)

    def look_up(self, name, file, revision, repo_type):
        assert revision == f"commit of {name}"
        return str(self.root / name / file) if (name, file) in self.downloaded else None


def test_plan_from_the_hub(tmp_path, model, monkeypatch):
    root, cache = mirror(tmp_path / "hub", model), tmp_path / "cache"
    hub = FakeHub(root, monkeypatch)
    tasks, prep = ["EuroSAT", "SVHN"], clip.preprocessing(TINY)
    before = clip.plan(TINY, cache, tasks=tasks)
    assert not any(item.present for item in before) and not hub.downloaded
    files = {item.what: item.bytes for item in before if not item.what.endswith("decoded")}
    assert set(files) == {
        "timm/tiny.openai: open_clip_model.safetensors",
        "tanganke/clip-tiny_eurosat: model.safetensors",
        "tanganke/eurosat: data/test-00000-of-00001.parquet",
        "tanganke/clip-tiny_svhn: model.safetensors",
        "ufldl-stanford/svhn: cropped_digits/test-00000-of-00001.parquet",
    }
    for what, size in files.items():
        assert size == (root / what.replace(": ", "/")).stat().st_size > 0
    decoded = [item for item in before if item.what.endswith("decoded")]
    assert [item.bytes for item in decoded] == [50 * 3 * 32 * 32] * 2 and decoded[0].place == cache
    assert "to download" in clip.summary(before)
    clip.check_space(before)
    train = clip.plan(TINY, cache, tasks=["SVHN"], weights=False, experts=False, splits=["test"], limit=5)
    assert [item.bytes for item in train][1] == 5 * 3 * 32 * 32 and len(train) == 2

    clip.image_set("SVHN", prep, cache)
    clip.load_expert(TINY, "SVHN", model.visual)
    assert len(hub.downloaded) == 2
    after = {item.what: item for item in clip.plan(TINY, cache, tasks=tasks)}
    assert {what for what, item in after.items() if item.present} == {
        "tanganke/clip-tiny_svhn: model.safetensors",
        "ufldl-stanford/svhn: cropped_digits/test-00000-of-00001.parquet",
        "SVHN test images, decoded",
    }
    assert after["SVHN test images, decoded"].bytes == 8 * 3 * 32 * 32
    clip.load_expert(TINY, "SVHN", model.visual)
    assert len(hub.downloaded) == 2


def test_plan_from_a_mirror(tmp_path, model, monkeypatch):
    monkeypatch.setattr(clip, "HfApi", lambda: pytest.fail("a mirror needs no network"))
    root, cache = mirror(tmp_path / "hub", model), tmp_path / "cache"
    items = clip.plan(TINY, cache, root, tasks=["EuroSAT", "SVHN"])
    assert len(items) == 7 and [i.what for i in items if not i.present] == [
        f"{t} test images, decoded" for t in ("EuroSAT", "SVHN")
    ]
    (root / "tanganke/clip-tiny_svhn/model.safetensors").unlink()
    with pytest.raises(clip.InputError, match="clip-tiny_svhn"):
        clip.plan(TINY, cache, root, tasks=["EuroSAT", "SVHN"])
    assert len(clip.plan(TINY, cache, root, tasks=["SVHN"], experts=False)) == 3


def test_too_little_space_is_refused(tmp_path):
    free = clip.shutil.disk_usage(tmp_path).free
    items = [clip.Item(f"file {k}", free // 2 + 10**8, False, tmp_path / "not/yet/there") for k in range(2)]
    clip.check_space(items[:1])
    with pytest.raises(clip.InputError, match="GB free, but .* GB are needed there: .* to download"):
        clip.check_space(items)
    clip.check_space([items[0], items[1]._replace(present=True)])


def test_without_a_network(tmp_path, model, monkeypatch):
    class Unreachable:
        def repo_info(self, *_, **__):
            raise RuntimeError("Name or service\nnot known")

    def nothing(*_, **__):
        raise FileNotFoundError("nothing in the cache")

    monkeypatch.setattr(clip, "HfApi", Unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing)
    with pytest.raises(clip.InputError, match="cannot reach timm/tiny.openai.*Name or service not known.*--hub DIR"):
        clip.plan(TINY, tmp_path)
    root = mirror(tmp_path / "hub", model, ["EuroSAT"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(root / name))
    assert len(clip.image_set("EuroSAT", PREP, tmp_path / "cache")[0]) == 8  # downloaded by an earlier run


def test_a_failed_download_is_one_sentence(tmp_path, model, monkeypatch):
    hub = FakeHub(mirror(tmp_path / "hub", model, ["EuroSAT"]), monkeypatch)
    hub.download = None

    def broken(*_, **__):
        raise ConnectionError("reset\nby peer")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
    with pytest.raises(
        clip.InputError, match="cannot download model.safetensors of tanganke/clip-tiny_eurosat: reset by peer"
    ):
        clip.load_expert(TINY, "EuroSAT", model.visual)


def test_a_whole_mirror_end_to_end(tmp_path, model):
    """Everything that reproduce.py asks for, in one go."""
    root, cache = mirror(tmp_path / "hub", model, ["EuroSAT"]), tmp_path / "cache"
    pretrained = clip.load_pretrained(TINY, root)
    head = clip.zero_shot_heads(pretrained, TINY, cache, ["EuroSAT"])["EuroSAT"]
    images, labels = clip.image_set("EuroSAT", clip.preprocessing(TINY), cache, root)
    pretrained.visual.load_state_dict(clip.load_expert(TINY, "EuroSAT", pretrained.visual, root))
    with torch.no_grad():
        logits = F.normalize(pretrained.visual(clip.normalise(images)), dim=-1) @ head
    assert logits.shape == (8, 10) and logits.isfinite().all() and len(labels) == 8
    assert load_file(root / TINY.repo / "open_clip_model.safetensors")["logit_scale"].exp() == pytest.approx(1 / 0.07)


# ------------------------------------------------------------------------------------------
# reproduce.py from end to end, on two tasks, with hardly any training
# ------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A function that runs reproduce.py with these arguments, small, and returns exit status and results."""
    monkeypatch.setattr(suite, "MINIATURE_TRAINING", TRAINING)
    monkeypatch.setattr(suite, "TEST_IMAGES", 24)

    def run(*arguments: str, output: str = "results") -> tuple[int, dict]:
        tasks = [] if "--tasks" in arguments else ["--tasks", "signs", "Digits"]
        defaults = ["--steps", "2", "--workers", "1", "--output", str(tmp_path / output)]
        status = reproduce.main([*tasks, *defaults, *arguments])
        file = tmp_path / output / "miniature" / "results.json"
        return status, json.loads(file.read_text()) if file.exists() else {}

    return run


TRAINING = suite.Training(images=24, steps=2, batch_size=8)


def without_timings(results: dict) -> dict:
    return {**results, "methods": [{**method, "seconds": 0} for method in results["methods"]]}


def test_results_are_those_of_the_contract(small, tmp_path, capsys):
    status, results = small()  # all methods of the main experiment
    assert status == (0 if all(claim["holds"] for claim in results["claims"]) else 1)
    assert {"suite": "miniature", "seed": 0, "tasks": ["Signs", "Digits"]}.items() <= results.items()
    assert results["device"] in ("cpu", "cuda") and results["versions"]["torch"] == torch.__version__
    assert [method["name"] for method in results["methods"]] == reproduce.MAIN
    for method in results["methods"]:
        assert set(method["accuracy"]) == {"Signs", "Digits"}
        assert method["average"] == pytest.approx(sum(method["accuracy"].values()) / 2, abs=0.011)
    methods = {method["name"]: method for method in results["methods"]}
    assert methods["WEMoE"]["trainable_parameters"] == 4 * (192 * 192 + 192 + 192 * 2 + 2)
    assert methods["Individual"]["total_parameters"] == 2 * methods["Pre-trained"]["total_parameters"]
    assert [point["scaling"] for point in methods["Task Arithmetic"]["curve"]] == [0.1, 0.2, 0.3, 0.4, 0.6, 1]
    assert methods["Task Arithmetic"]["curve"][2]["average"] == pytest.approx(
        methods["Task Arithmetic"]["average"], abs=0.01
    )
    assert {"claim", "holds", "detail"} == set(results["claims"][0])
    folder = tmp_path / "results" / "miniature"
    assert {f"{name}.png" for name in ("accuracy", "adaptation", "routing", "scalings", "tasks")} == {
        f.name for f in folder.glob("*.png")
    }
    printed = capsys.readouterr().out
    assert (folder / "table.md").read_text() in printed
    assert all(claim["claim"] in printed for claim in results["claims"])


def test_interrupted_it_goes_on_and_ends_with_the_same_results(small, monkeypatch):
    small = partial(small, "--methods", "individual", "WEMoE", "E-WEMoE", "AdaMerging (layer-wise)")
    _, expected = small(output="whole")
    adapt_, calls = wemoe.adapt, []

    def interrupted(*args, **options):
        calls.append(options)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return adapt_(*args, **options)

    monkeypatch.setattr(wemoe, "adapt", interrupted)
    assert small() == (130, {})
    render = miniature.render
    monkeypatch.setattr(miniature, "render", lambda task, split, *rest, **options: (
        pytest.fail("experts were there already") if split == "train" else render(task, split, *rest, **options)
    ))  # fmt: skip
    _, results = small()
    assert len(calls) == 4  # of three adaptations the second was run twice
    assert without_timings(results) == without_timings(expected)
    monkeypatch.setattr(wemoe, "adapt", lambda *_: pytest.fail("everything was there already"))
    assert small()[1] == results


def test_two_workers_find_what_one_finds(small):
    methods = ["--methods", "regmean", "AdaMerging (task-wise)", "WEMoE", "WEMoE (rank 16)", "Individual"]
    runs = [small("--workers", workers, *methods, output=workers) for workers in "12"]
    assert without_timings(runs[0][1]) == without_timings(runs[1][1]) and runs[0][0] == runs[1][0]


@pytest.mark.skipif(sys.platform != "linux", reason="workers that are not forked do not see the patched entropy")
def test_an_error_in_a_worker_is_reported_like_any_other(small, monkeypatch, capsys):
    small("--methods", "individual")
    monkeypatch.setattr(wemoe, "entropy", lambda logits: logits.sum(-1) * math.nan)
    assert small("--workers", "2", "--methods", "WEMoE", "WEMoE (1-layer)")[0] == 2
    assert "The entropy of task 'Signs' is nan at step 1 of 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "experiment, methods, conditions",
    [
        ("generalization", ["Pre-trained", "RegMean", "Task Arithmetic"], 2),
        ("robustness", ["Task Arithmetic", "AdaMerging (layer-wise)"], 8),
        ("ablation", ["WEMoE", "WEMoE (rank 4)"], 1 + 3 + 1 + 4 + 4),
        ("collapse", ["Task Arithmetic", "WEMoE + diversity"], 2),
    ],
)
def test_experiments_from_end_to_end(experiment, methods, conditions, monkeypatch, tmp_path, capsys):
    """Every condition with every method: tables with the right tasks and averages, and figures."""
    monkeypatch.setattr(suite, "MINIATURE_TRAINING", TRAINING)
    monkeypatch.setattr(suite, "TEST_IMAGES", 12)
    chosen = reproduce.EXPERIMENTS[experiment]
    monkeypatch.setitem(reproduce.EXPERIMENTS, experiment, replace(chosen, seeds=min(2, chosen.seeds)))
    options = ["--steps", "2", "--workers", "1", "--output", str(tmp_path)]
    tasks = ["--tasks", "signs", "digits"] if experiment == "ablation" else []
    assert reproduce.main(["--experiment", experiment, "--methods", *methods, *options, *tasks]) in (0, 1)
    folder = tmp_path / "miniature" / experiment
    results = json.loads((folder / "results.json").read_text())
    assert results["experiment"] == experiment and len(results["conditions"]) == conditions
    table = (folder / "table.md").read_text()
    assert table in capsys.readouterr().out and (folder / f"{experiment}.png").exists()
    for condition in results["conditions"]:
        for name, entries in condition["methods"].items():
            assert len(entries) == min(2, chosen.seeds)
            for average, tasks in condition["columns"].items():
                values = [np.mean([entry["accuracy"][task] for task in tasks]) for entry in entries]
                assert f"{np.mean(values):.1f}" in table and average in table, (name, tasks)
    outcomes = [c["methods"].get(methods[-1], c["methods"].get("WEMoE"))[0] for c in results["conditions"]]
    outcomes = [dict(outcome, name="", seconds=0) for outcome in outcomes]
    assert any(outcome != outcomes[0] for outcome in outcomes)  # conditions make a difference
    if experiment == "generalization":
        assert results["conditions"][0]["columns"]["Unseen"] == ["Digits", "LandUse"]
    if experiment == "collapse":
        assert " ± " in table


def test_variants_of_a_suite():
    """Fewer experts, corrupted images of the same tasks, other settings; the suite itself stays as it is."""
    images = {task: miniature.render(task, "test", 4, seed=1) for task in ("Signs", "Digits")}
    whole = suite.Suite(
        *("name", 0, torch.device("cpu"), "float32", TRAINING, suite.MINIATURE_ADAPTATION, nn.Identity()),
        heads=dict.fromkeys(images), test=images, load=suite.miniature_images, normalise=nn.Identity(),
        experts=dict.fromkeys(images, nn.Identity()),
    )  # fmt: skip
    part = whole.variant(experts=("Digits",), split="contrast", lr=0.5)
    assert list(part.experts) == ["Digits"] and part.tasks == ["Signs", "Digits"] and part.adaptation.lr == 0.5
    assert not torch.equal(part.test["Signs"][0][:4], images["Signs"][0])
    assert torch.equal(part.test["Signs"][1][:4], images["Signs"][1])
    assert list(whole.experts) == ["Signs", "Digits"] and whole.adaptation == suite.MINIATURE_ADAPTATION


def entries(**accuracy: float) -> list[dict]:
    return [{"accuracy": accuracy}]


def test_claims_about_unseen_tasks_and_collapse():
    columns = {"without C": {"Seen": ["A", "B"], "Unseen": ["C"]}}
    measured = {"without C": {"WEMoE": entries(A=90, B=80, C=10), "RegMean": entries(A=89, B=79, C=99)}}
    assert [claim["holds"] for claim in claims.check_generalization(columns, measured)] == [True]
    measured["without C"]["RegMean"] = entries(A=95, B=79, C=9)
    assert [claim["holds"] for claim in claims.check_generalization(columns, measured)] == [False]

    columns, ta, cured = (
        dict.fromkeys(("clean", "noise"), {"Average": ["A", "B"]}),
        "Task Arithmetic",
        "WEMoE + diversity",
    )
    base = {
        "clean": {ta: entries(A=80, B=80), "WEMoE": entries(A=95, B=95), cured: entries(A=94, B=95.2)},
        "noise": {ta: entries(A=50, B=50), "WEMoE": entries(A=9, B=90), cured: entries(A=70, B=80)},
    }
    assert [claim["holds"] for claim in claims.check_collapse(columns, base)] == [True, True, True]
    for condition, method, accuracy, verdict in (
        ("noise", "WEMoE", entries(A=60, B=60), [False, True, True]),
        ("noise", "WEMoE + diversity", entries(A=40, B=90), [True, False, True]),
        ("clean", "WEMoE + diversity", entries(A=93, B=95), [True, True, False]),
    ):
        changed = {**base, condition: {**base[condition], method: accuracy}}
        assert [claim["holds"] for claim in claims.check_collapse(columns, changed)] == verdict
    del base["noise"]["WEMoE"]
    assert claims.check_collapse(columns, base) == []


def test_bench_measures_ours_the_loop_and_the_dense_model(monkeypatch, tmp_path, capsys):
    """On a tiny tower, where bounds mean nothing: what is timed is equal, everything is reported and kept."""
    tiny_clip = clip.ARCHITECTURES["ViT-B-32"]._replace(model=TINY.model)
    monkeypatch.setitem(clip.ARCHITECTURES, "ViT-B-32", tiny_clip)

    def once(calls, device):
        return {name: 1.0 for name, call in calls.items() if [call()]}

    monkeypatch.setattr(reproduce, "medians", once)
    monkeypatch.setattr(reproduce, "peak_bytes", lambda function, which, *rest: 1000 + which)
    options = ["--device", "cpu", "--output", str(tmp_path)]
    assert reproduce.main(["bench", "--tasks", "2", "--batch", "2", "3", *options]) == 1
    results = json.loads((tmp_path / "bench" / "results.json").read_text())
    assert len(results["rows"]) == 2 + 5 and (tmp_path / "bench" / "time.png").exists()
    assert (results["num_tasks"], list(results["batch"]), sorted(results["tasks"])) == (2, ["2", "3"], ["2", "20"])
    timed = [*results["batch"].values(), *results["tasks"].values()]
    assert all(seconds.keys() == {"dense", "ours", "loop"} for seconds in timed)  # what the plot shows
    said = capsys.readouterr().out
    assert (said.count("ours / dense"), said.count("loop / ours")) == (4, 1)
    for error, status in ((MemoryError, 2), (KeyboardInterrupt, 130)):
        monkeypatch.setattr(reproduce, "peak_bytes", mock.Mock(side_effect=error))
        assert reproduce.main(["bench", "--tasks", "2", "--batch", "2", *options]) == status
        assert len(json.loads((tmp_path / "bench" / "results.json").read_text())["rows"]) == 5  # measured before
    assert "goes on" not in capsys.readouterr().err
    monkeypatch.setattr(reproduce.PerSampleLoop, "forward", lambda self, x: x + 1)
    assert reproduce.main(["bench", *options]) == 2
    assert "differs from the loop" in capsys.readouterr().err


def allocate(count: int) -> tuple:
    return (lambda: torch.ones(count).sum()), torch.device("cpu")


def test_medians_and_peaks_are_measured():
    calls = {"one": lambda: None, "other": lambda: None}
    assert bench.medians(calls, torch.device("cpu"), seconds=0).keys() == calls.keys()
    assert 2**25 < bench.peak_bytes(allocate, 2**24) < 2**28  # 2**26 bytes, and what else torch takes


def test_the_seed_decides(small):
    names = ["--methods", "individual", "WEMoE"]
    runs = [without_timings(small(*names, "--seed", seed, output=folder)[1]) for seed, folder in ("1a", "1b", "2c")]
    assert runs[0] == runs[1]
    assert runs[0]["methods"] != runs[2]["methods"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tasks", "Weather"], "unknown task 'Weather': choose among 'Scenes', 'Cars'"),
        (["--methods", "TIE"], "unknown method 'TIE': choose among 'Weight Averaging', 'Task Arithmetic'"),
        (["--experiment", "none"], "unknown experiment 'none': choose among 'main', 'generalization'"),
        (["--experiment", "robustness", "--tasks", "Signs"], "--tasks is for the experiments main and ablation"),
        (["--steps", "0"], "--steps 0: a number from 1 to"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--seed", "-1"], "--seed -1: a number from 0 to"),
        (["--workers", "0"], "--workers 0: a number from 1 to"),
        (["ViT-B-32", "--workers", "2"], "--workers is for the miniature on a CPU; on several GPUs use torchrun"),
        (["--device", "tpu9"], "--device tpu9: not usable here"),
        (["ViT-Z"], "invalid choice: 'ViT-Z'"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--output", __file__], "is a file, a folder is needed"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, message, capsys):
    assert reproduce.main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_help_tells_the_choices(capsys):
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("miniature", "--tasks", "WEMoE (0-layer)", "Exit status"))


def fabricated(**average: float) -> dict[str, dict]:
    average = {"WEMoE": 86, "WEMoE (0-layer)": 86, "WEMoE (1-layer)": 86} | average
    methods = {
        name.replace("_", " "): {"average": value, "group": reproduce.METHODS[name.replace("_", " ")].group}
        for name, value in average.items()
    }
    methods["Task Arithmetic"]["curve"] = [{"average": methods["Task Arithmetic"]["average"] + 1}]
    methods["WEMoE"]["adaptation"] = {"entropy": [2.0] * 5 + [1.0] * 15, "accuracy": [60.0, 80.0]}
    return methods


PAPER = dict(Individual=90.3, Task_Arithmetic=68.0, WEMoE=89.2)  # the published averages for ViT-B/32


def test_claims_hold_where_the_paper_stands_and_fall_one_by_one():
    base = {**PAPER, "Pre-trained": 48.2, "Weight Averaging": 66.5}
    claims = reproduce.check_miniature(fabricated(**base))
    assert len(claims) == 7 and all(claim["holds"] for claim in claims)
    for change, fallen in [
        ({"Individual": 89.5}, {0}),
        ({"Weight Averaging": 83.0}, {1}),
        ({"Pre-trained": 67.0}, {2}),
        ({"Individual": 91.0, "WEMoE": 91.5}, {2}),
        ({"Weight Averaging": 84.5}, {1, 3}),
        ({"WEMoE": 85.0, "WEMoE (0-layer)": 84.0}, {4}),
        ({"WEMoE (0-layer)": 87.0}, {5}),
    ]:
        claims = reproduce.check_miniature(fabricated(**{**base, **change}))
        assert {i for i, claim in enumerate(claims) if not claim["holds"]} == fallen, change
    methods = fabricated(**base)
    methods["WEMoE"]["adaptation"]["accuracy"] = [60.0, 59.0]
    assert not reproduce.check_miniature(methods)[-1]["holds"]
    del methods["Individual"]
    assert [claim["claim"][:5] for claim in reproduce.check_miniature(methods)] == ["WEMoE", "Route", "As th"]


# ------------------------------------------------------------------------------------------
# reproduce.py on the paper's suite: a mirror in the real layout with a tiny CLIP in the place of ViT-B/32
# ------------------------------------------------------------------------------------------

SETTING_UP = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(HERE)!r})
import open_clip
import reproduce
from data import clip
open_clip.add_model_config(Path(sys.argv[1]))
clip.ARCHITECTURES["ViT-B-32"] = clip.Architecture(*json.loads(sys.argv[2]))
sys.exit(reproduce.main(sys.argv[3:]))
"""


@pytest.fixture
def paper(monkeypatch, tmp_path, model):
    """A function that runs `reproduce.py ViT-B-32 --hub MIRROR` and returns exit status and results."""
    monkeypatch.setitem(clip.ARCHITECTURES, "ViT-B-32", TINY._replace(name="ViT-B-32"))
    hub, two = tmp_path / "hub", ["EuroSAT", "SVHN"]
    file = hub / TINY.repo / "open_clip_model.safetensors"
    file.parent.mkdir(parents=True)
    save_file(model.state_dict(), file)
    for seed, task in enumerate(clip.TASKS):
        file = hub / clip.expert_repo(TINY, task) / "model.safetensors"
        file.parent.mkdir(parents=True)
        state = tiny_hugging_face().state_dict()
        torch.manual_seed(seed)
        state = {name: p + 0.05 * torch.randn_like(p) for name, p in state.items()}
        save_file(state, file)
        write_set(hub, task, count=18, seed=seed)

    def run(*arguments: str, output: str = "results", tasks=two, folder: str = "ViT-B-32") -> tuple[int, dict]:
        status = reproduce.main(run.arguments(*arguments, output=output, tasks=tasks))
        file = tmp_path / output / folder / "results.json"
        return status, json.loads(file.read_text()) if file.exists() else {}

    def arguments(*more: str, output: str = "results", tasks=two) -> list[str]:
        given = ["ViT-B-32", "--hub", str(hub), "--cache", str(tmp_path / "cache"), "--output", str(tmp_path / output)]
        return [*given, "--steps", "10", *(["--tasks", *tasks] if tasks else []), *more]

    run.arguments, run.hub = arguments, hub
    return run


def test_the_papers_suite_from_end_to_end(paper, tmp_path, capsys):
    status, results = paper("--methods", "pre-trained", "individual", "wemoe", tasks=None)
    assert status == 1  # random weights do not reach the published figures
    assert results["tasks"] == list(clip.TASKS) and len(results["methods"]) == 3
    claimed = [claim["claim"].split(" is within ")[0] for claim in results["claims"]]
    assert claimed == ["Pre-trained", "Individual", "WEMoE"]
    assert "0.8 points of the published average (hub)" in results["claims"][2]["claim"]
    printed = capsys.readouterr().out
    assert re.search(r"of decoded images to keep", printed)
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("|")]
    ours, theirs, difference = next(rows[i : i + 3] for i, row in enumerate(rows) if row[0].strip() == "Individual")
    published = "75.0 78.3 95.2 99.0 97.3 98.9 99.6 79.7 90.4"  # published.json, and the mean of the cells
    assert " ".join(cell.strip() for cell in theirs[:10]) == f"published (hub) {published}"
    for a, b, d in zip(ours[1:10], theirs[1:10], difference[1:10]):
        assert float(a) - float(b) == pytest.approx(float(d), abs=0.11)
    assert (tmp_path / "results/ViT-B-32/adaptation.png").exists()


def test_an_adaptation_goes_on_where_it_was_killed(paper, monkeypatch):
    paper = partial(paper, "--methods", "WEMoE (0-layer)", "WEMoE (1-layer)", "WEMoE")
    _, expected = paper(output="whole")
    entropy_, calls = wemoe.entropy, []

    def killed(logits):
        calls.append(1)
        if len(calls) == 15:  # in the eighth step of the first adaptation, for two tasks
            raise KeyboardInterrupt
        return entropy_(logits)

    monkeypatch.setattr(wemoe, "entropy", killed)
    assert paper() == (130, {})
    _, results = paper()
    assert len(calls) == 15 + 2 * (3 + 10 + 10)  # three steps of the first adaptation were left
    assert without_timings(results) == without_timings(expected)


def test_a_mask_that_was_killed_is_drawn_as_if_it_had_not_been(paper, monkeypatch):
    """What is random in an adaptation is kept with it: here the masks of Concrete, whose steps are twice as many."""
    paper = partial(paper, "--methods", "Concrete Task Arithmetic")
    _, expected = paper(output="whole")
    entropy_, calls = wemoe.entropy, []

    def killed(logits):
        calls.append(1)
        if len(calls) == 15:  # in the eighth step, for two tasks
            raise KeyboardInterrupt
        return entropy_(logits)

    monkeypatch.setattr(wemoe, "entropy", killed)
    assert paper() == (130, {})
    _, results = paper()
    assert len(calls) == 15 + 2 * 14  # six steps of twenty were kept
    assert without_timings(results) == without_timings(expected)


def test_other_experiments_on_the_papers_suite(paper, tmp_path):
    """Corrupted images are splits of the data sets, images that methods look at come from the train split."""
    for seed, task in enumerate(clip.TASKS):
        write_set(paper.hub, task, count=20, seed=50 + seed, split="train")
    names = ["Task Arithmetic", "RegMean", "WEMoE"]
    folder = "ViT-B-32/generalization"
    options = ["--experiment", "generalization", "--methods", *names, "--steps", "1"]
    status, results = paper(*options, tasks=None, folder=folder)
    assert status in (0, 1) and len(results["claims"]) == 2
    for condition, split in zip(results["conditions"], reproduce.PUBLISHED["generalization"]):
        assert condition["columns"] == {"Seen": split["seen"], "Unseen": split["unseen"]}
        assert [row["method"] for row in condition["published"]] == [row["method"] for row in split["rows"]]
    assert "  published (paper)" in (tmp_path / "results" / folder / "table.md").read_text()

    tasks = reproduce.PUBLISHED["robustness"]["tasks"]
    for seed, (task, corruption) in enumerate(itertools.product(tasks, CORRUPTIONS)):
        write_set(paper.hub, task, count=6, seed=seed, split=corruption)
    options = ["--experiment", "robustness", "--methods", "Task Arithmetic", "--limit", "4"]
    status, results = paper(*options, tasks=None, folder="ViT-B-32-first4/robustness")
    assert status == 0 and results["tasks"] == [task for task in clip.TASKS if task in tasks]
    assert len(results["conditions"]) == 8
    decoded = {tuple(file.name.split("-")[:3]) for file in (tmp_path / "cache").glob("*-first4-*.npy")}
    assert decoded == set(itertools.product(tasks, ["test", *CORRUPTIONS], ["first4"]))
    assert not any(condition["published"] for condition in results["conditions"])  # of four images each


def test_two_processes_give_what_one_gives(paper, tmp_path, tiny):
    names = ["--methods", "Individual", "WEMoE"]
    _, one = paper(*names, output="one")
    (tmp_path / "run.py").write_text(SETTING_UP)
    architecture = json.dumps(TINY._replace(name="ViT-B-32"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "run.py"), str(tiny), architecture]
    command += [*paper.arguments(*names, output="two"), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    file = tmp_path / "two" / "ViT-B-32" / "results.json"
    assert file.exists(), done.stderr
    two = json.loads(file.read_text())
    for ours, theirs in zip(two["methods"], one["methods"]):
        assert ours["accuracy"] == theirs["accuracy"]
    curves = [results["methods"][0]["adaptation"]["entropy"] for results in (one, two)]
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
    files = (next((tmp_path / run).rglob("adaptation.pt")) for run in ("one", "two"))
    routers = [torch.load(file, weights_only=True)["trained"] for file in files]
    for name, p in routers[0].items():
        close(p, routers[1][name], atol=1e-4)


def test_limited_results_stand_apart_and_claim_nothing(paper, capsys):
    status, results = paper("--limit", "5", "--methods", "pre-trained", folder="ViT-B-32-first5")
    assert status == 0 and results["settings"]["limit"] == 5 and not results["claims"] and not results["published"]
    assert "Only the first 5 images" in capsys.readouterr().out


def test_experts_of_the_authors(paper, tmp_path):
    folder = tmp_path / "authors" / "ViT-B-32"
    with OldClasses() as old:
        for seed, name in enumerate(["zeroshot.pt", "EuroSAT/finetuned.pt", "SVHN/finetuned.pt"]):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            torch.save(old.encoder(tower_like(seed)), folder / name)
        for task in ("EuroSAT", "SVHN"):
            torch.save(old.head(torch.randn(10, 48)), folder / f"head_{task}.pt")
    names = ["--methods", "individual", "wemoe", "wemoe (1-layer)"]
    status, results = paper("--experts", str(folder.parent), *names, folder="ViT-B-32-experts")
    assert status == 1
    assert {row["source"] for row in results["published"]} == {"paper"}
    assert len(results["claims"]) == 2  # the paper's rows have no individual models


def test_experts_fine_tuned_here(paper, monkeypatch):
    monkeypatch.setattr(suite, "PAPER_TRAINING", TRAINING)
    for seed, task in enumerate(("EuroSAT", "SVHN")):
        write_set(paper.hub, task, count=20, seed=50 + seed, split="train")
    status, results = paper("--finetune", "--methods", "individual", folder="ViT-B-32-finetune")
    assert status in (0, 1) and results["methods"][0]["name"] == "Individual"


def test_a_broken_file_is_named_and_nothing_done_is_lost(paper, tmp_path, capsys):
    paper("--methods", "pre-trained")
    file = paper.hub / clip.expert_repo(TINY, "SVHN") / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    capsys.readouterr()
    assert paper("--methods", "individual")[0] == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("reproduce.py: error: ") and str(file) in error
    file.write_bytes(whole)
    _, results = paper("--methods", "pre-trained", "individual")
    assert [method["name"] for method in results["methods"]] == ["Pre-trained", "Individual"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--limit", "5"], "--limit is for the paper's suites"),
        (["ViT-B-32", "--limit", "0"], "--limit 0: a number from 1"),
        (["ViT-B-32", "--arch", "RN50"], "--arch and --pretrained need --finetune"),
        (["ViT-B-32", "--finetune", "--experts", "x"], "choose one"),
        (["ViT-B-32", "--finetune", "--arch", "RN5000"], "RN5000"),
        (["ViT-B-32", "--hub", "/nowhere"], "/nowhere"),
        (["ViT-B-32", "--precision", "int4"], "invalid choice: 'int4'"),
    ],
)
def test_bad_arguments_of_the_papers_suite(arguments, message, capsys, tmp_path):
    assert reproduce.main([*arguments, "--output", str(tmp_path), "--cache", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------
# It does not break: bad input, hostile files, kills, numbers at their limits, and anything random
# ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model):
    """A folder with a mirror of two tasks and the results of one method."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(clip.ARCHITECTURES, "ViT-B-32", TINY._replace(name="ViT-B-32"))
        save_file(model.state_dict(), made(root / "hub" / TINY.repo / "open_clip_model.safetensors"))
        for seed, task in enumerate(("EuroSAT", "SVHN")):
            state = tiny_hugging_face().state_dict()
            torch.manual_seed(seed)
            state = {name: p + 0.05 * torch.randn_like(p) for name, p in state.items()}
            save_file(state, made(weights_of(root, task)))
            write_set(root / "hub", task, count=9, seed=seed)
        assert reproduce.main([*run_in(root), "--methods", "pre-trained"]) in (0, 1)
    return root


def made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def run_in(root: Path) -> list[str]:
    folders = ["--hub", str(root / "hub"), "--cache", str(root / "images"), "--output", str(root / "results")]
    return ["ViT-B-32", *folders, "--tasks", "EuroSAT", "SVHN", "--steps", "2"]


def weights_of(root: Path, task: str = "EuroSAT") -> Path:
    return root / "hub" / clip.expert_repo(TINY, task) / "model.safetensors"


def pretrained_of(root: Path) -> Path:
    return root / "hub" / TINY.repo / "open_clip_model.safetensors"


def images_of(root: Path) -> Path:
    return root / "hub" / clip.TASKS["SVHN"].repo / "cropped_digits" / "test-00000-of-00001.parquet"


def replaced(where, data: bytes):
    return lambda root: where(root).write_bytes(data)


def cut(where, share: float):
    return lambda root: where(root).write_bytes(where(root).read_bytes()[: int(where(root).stat().st_size * share)])


def entry(where, change):
    """Save the tensors again after `change` has had its way with them."""

    def damage(root: Path) -> None:
        state = load_file(where(root))
        change(state)
        save_file(state, where(root))

    return damage


def first_entry(function):
    def change(state: dict) -> None:
        name = next(name for name, p in state.items() if p.dim() == 2)
        state[name] = function(state[name])

    return change


def pickled(thing, where=weights_of):
    """The safetensors file gives way to what torch.save makes of `thing(root)`."""

    def damage(root: Path) -> None:
        names = {"model.safetensors": "pytorch_model.bin"}
        where(root).unlink()
        path = where(root).with_name(names.get(where(root).name, "open_clip_pytorch_model.bin"))
        torch.save(thing(root), path)

    return damage


def pretrained_as_expert(root: Path) -> None:
    state = {name.removeprefix("visual."): p for name, p in load_file(pretrained_of(root)).items() if "visual." in name}
    names = {name: clip.hugging_face_names(name) for name in state if name != "proj"}
    parts = {part: p for name in names for part, p in zip(names[name], state[name].chunk(len(names[name])))}
    save_file({name: p.contiguous() for name, p in parts.items()}, weights_of(root))


def data_set(images=None, labels=None, classes=None, **options):
    def damage(root: Path) -> None:
        spec, pictures = clip.TASKS["SVHN"], [picture("RGB", 40, 30, seed) for seed in range(9)]
        changed = images(pictures) if images else pictures
        write_parquet(images_of(root), changed, labels or [0] * len(changed), classes or spec.classes, **options)

    return damage


def at(index: int, data: bytes):
    return lambda pictures: [*pictures[:index], data, *pictures[index + 1 :]]


def bomb() -> bytes:
    file = io.BytesIO()
    Image.new("1", (20000, 20000)).save(file, "PNG")
    return file.getvalue()


def raising(owner, name: str, error: BaseException):
    """Let a function fail as it does where the machine is at its limits."""

    def damage(root: Path, monkeypatch) -> None:
        def fail(*_, **__):
            raise error

        monkeypatch.setattr(owner, name, fail)

    return damage


def with_arguments(*arguments: str):
    return lambda root: [argument.format(root=root) for argument in arguments]


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"  # noqa: E501
LYING = (2**40).to_bytes(8, "little") + b"{}" * 50
OUTSIDE = json.dumps({"a": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}).encode()
DAMAGE = {
    # Checkpoints: an expert's
    "no weights": (lambda root: weights_of(root).rename(root / "away"), "the mirror has no files in .*eurosat"),
    "other files only": (
        lambda root: weights_of(root).rename(weights_of(root).with_name("model.onnx")),
        "has no model.safetensors or pytorch_model.bin; it has: model.onnx",
    ),
    "no mirror": (with_arguments("--hub", "{root}/nowhere"), "the mirror has no files in .*nowhere"),
    "empty": (replaced(weights_of, b""), "model.safetensors is empty: download it again"),
    "zeros": (replaced(weights_of, bytes(5000)), "nothing but zeros: download it again"),
    "truncated": (cut(weights_of, 0.7), "model.safetensors is not a readable weight file"),
    "header cut": (replaced(weights_of, b"\1\0"), "model.safetensors is not a readable weight file"),
    "web page": (replaced(weights_of, b"\n<!DOCTYPE html><p>404 Not Found"), "is a web page, not weights"),
    "git-LFS pointer": (replaced(weights_of, LFS), "is a git-LFS pointer, not the file itself: `git lfs pull` gets it"),
    "lying header": (replaced(weights_of, LYING), "model.safetensors is not a readable weight file"),
    "offsets outside": (
        replaced(weights_of, len(OUTSIDE).to_bytes(8, "little") + OUTSIDE + bytes(40)),
        "model.safetensors is not a readable weight file",
    ),
    "other architecture": (entry(weights_of, first_entry(lambda p: torch.cat([p, p]))), "has the shape .* needs"),
    "entry too many": (entry(weights_of, lambda s: s.update(more=torch.ones(1))), "does not know: more"),
    "entry too few": (entry(weights_of, lambda s: s.pop(sorted(s)[0])), "model.safetensors lacks "),
    "NaN": (entry(weights_of, first_entry(lambda p: p * math.nan)), "values that are not finite"),
    "infinite": (entry(weights_of, first_entry(lambda p: p / 0)), "values that are not finite"),
    "integers": (entry(weights_of, first_entry(lambda p: p.to(torch.int8))), "has the dtype torch.int8; floating"),
    "pickle with code": (pickled(lambda root: Evil(root / "marker")), "never run, and model.safetensors is the safe"),
    "pickled list": (pickled(lambda root: [torch.ones(2)]), "should hold tensors by name"),
    "pickled web page": (
        lambda root: weights_of(root).rename(weights_of(root).with_name("pytorch_model.bin")).write_bytes(b"<html>"),
        "pytorch_model.bin is a web page",
    ),
    "same file twice": (
        lambda root: shutil.copy(weights_of(root, "SVHN"), weights_of(root)),
        "the expert of (SVHN|EuroSAT) is that of (SVHN|EuroSAT) once more",
    ),
    "pre-trained as expert": (pretrained_as_expert, "the expert of EuroSAT is the pre-trained model itself"),
    # Checkpoints: the pre-trained one
    "pre-trained absent": (lambda root: pretrained_of(root).unlink(), "the mirror has no files in .*tiny.openai"),
    "pre-trained empty": (replaced(pretrained_of, b""), "is empty: download it again"),
    "pre-trained pointer": (replaced(pretrained_of, LFS), "is a git-LFS pointer"),
    "pre-trained truncated": (cut(pretrained_of, 0.5), "cannot load the weights of tiny-quickgelu from"),
    "pre-trained other": (
        entry(pretrained_of, lambda s: s.update({"visual.proj": torch.ones(64, 9)})),
        "cannot load the weights of tiny-quickgelu from",
    ),
    "pre-trained NaN": (entry(pretrained_of, lambda s: s["visual.proj"].mul_(math.nan)), "not finite"),
    "pre-trained with code": (pickled(lambda root: Evil(root / "marker"), pretrained_of), "cannot load the weights"),
    # Data sets
    "no test split": (
        lambda root: images_of(root).rename(images_of(root).with_name("train-00000-of-00001.parquet")),
        "has no split 'test' in parquet files; it has: train",
    ),
    "no images": (data_set(lambda _: []), "SVHN, split test of .* has no images"),
    "no data set": (lambda root: images_of(root).unlink(), "the mirror has no files in .*svhn"),
    "data truncated": (cut(images_of, 0.5), "a parquet file cannot be read"),
    "data a web page": (replaced(images_of, b"<html>Too many requests</html>"), "a parquet file cannot be read"),
    "no image column": (data_set(image="picture"), "has no column image; it has: label, picture"),
    "corrupt JPEG": (data_set(at(4, b"\xff\xd8\xff\xe0 no more")), "image 4 cannot be decoded"),
    "no bytes": (data_set(at(8, b"")), "image 8 cannot be decoded"),
    "huge image": (data_set(at(2, bomb())), "image 2 cannot be decoded: Image size .* exceeds limit"),
    "label out of range": (
        data_set(labels=[0] * 8 + [10], dtype=datasets.Value("int64")),
        "image 8 has the label 10; 0 to 9 are known",
    ),
    "other classes": (data_set(classes=list("abc")), r"has 3 classes \(a, b, c\), but tasks.json 10"),
    # Arguments
    "unknown task": (with_arguments("--tasks", "Weather"), "unknown task 'Weather': choose among 'SUN397'"),
    "unknown method": (with_arguments("--methods", "TIE"), "unknown method 'TIE': choose among"),
    "unknown experiment": (with_arguments("--experiment", "x"), "unknown experiment 'x': choose among 'main'"),
    "unknown device": (with_arguments("--device", "tpu9"), "--device tpu9: not usable here .*'cpu' always is"),
    "meta device": (with_arguments("--device", "meta"), "--device meta: not usable here"),
    "empty device": (with_arguments("--device", ""), "--device : not usable here"),
    "zero steps": (with_arguments("--steps", "0"), "--steps 0: a number from 1 to"),
    "negative steps": (with_arguments("--steps", "-5"), "--steps -5: a number from 1 to"),
    "NaN steps": (with_arguments("--steps", "nan"), "--steps: invalid int value: 'nan'"),
    "huge steps": (with_arguments("--steps", "1" + "0" * 30), "--steps 10+: a number from 1 to 2147483647"),
    "negative seed": (with_arguments("--seed", "-1"), "--seed -1: a number from 0 to"),
    "zero limit": (with_arguments("--limit", "0"), "--limit 0: a number from 1 to"),
    "output a file": (with_arguments("--output", __file__), "test_wemoe.py: is a file, a folder is needed"),
    "output in a file": (with_arguments("--output", __file__ + "/x"), "Not a directory.*test_wemoe.py/x"),
    "images in a file": (with_arguments("--cache", __file__ + "/x"), "Not a directory.*test_wemoe.py"),
    # The machine, and numbers
    "output not writable": (
        raising(Path, "mkdir", PermissionError(13, "Permission denied", "results")),
        "Permission denied: 'results'",
    ),
    "disk full": (
        raising(os, "fsync", OSError(28, "No space left on device")),
        "cannot write .*No space left on device.*the same command goes on",
    ),
    "disk full, images": (
        lambda root, monkeypatch: (
            shutil.rmtree(root / "images") or raising(os, "fsync", OSError(28, "No space left"))(root, monkeypatch)
        ),
        "cannot write .*head-EuroSAT.*No space left.*--cache",
    ),
    "disk full, torch": (
        raising(torch, "save", RuntimeError("PytorchStreamWriter failed writing file data/0")),
        "cannot write .*failed writing file.*free some space",
    ),
    "GPU out of memory": (
        raising(reproduce, "evaluate", torch.OutOfMemoryError("Tried to allocate 2.00 GiB")),
        "out of memory; what is finished is kept.*--adapt-precision bfloat16.*Tried to allocate",
    ),
    "out of memory": (raising(reproduce, "evaluate", MemoryError()), "out of memory; what is finished is kept"),
    "no convergence": (
        raising(torch.linalg, "svd", torch.linalg.LinAlgError("svd: did not converge")),
        "a decomposition failed .*did not converge.*--methods leaves out",
    ),
    "no memory on a CPU": (
        raising(reproduce, "evaluate", RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 TB")),
        "out of memory; what is finished is kept.*you tried 1 TB",
    ),
    "worker killed": (
        raising(reproduce, "evaluate", BrokenProcessPool("A process was terminated abruptly")),
        "a worker was killed, perhaps for want of memory; the same command goes on",
    ),
    "entropy NaN": (
        lambda root, monkeypatch: monkeypatch.setattr(wemoe, "entropy", lambda logits: logits.sum(-1) * math.nan),
        "The entropy of task 'EuroSAT' is nan at step 1 of 2",
    ),
}
if not torch.cuda.is_available():
    DAMAGE["no GPU"] = with_arguments("--device", "cuda"), "--device cuda: not usable here"


def kept_file(pattern: str, data: bytes = b"{"):
    """A file that a run has kept is damaged afterwards."""

    def damage(root: Path) -> None:
        paths = [path for path in root.rglob("*") if re.search(pattern, str(path))]
        assert paths, pattern
        for path in paths:
            path.write_bytes(data)

    return damage


DAMAGE |= {
    "kept head": (
        kept_file(r"images/.*EuroSAT.*\.safetensors"),
        "is damaged .*: delete it, and the same command makes",
    ),
    "kept images": (kept_file(r"images/SVHN-test-.*\.npy$"), "is damaged .*: delete it, and the same command makes it"),
    "kept result": (
        lambda root: kept_file(r"cache/pre-trained-.*/result.json", b"{")(root) or ["--methods", "pre-trained"],
        "result.json is damaged .*: delete it, and the same command makes it again",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_bad_input_is_one_sentence_and_nothing_finished_is_lost(name, finished, tmp_path, monkeypatch, capfd):
    damage, sentence = DAMAGE[name]
    monkeypatch.setitem(clip.ARCHITECTURES, "ViT-B-32", TINY._replace(name="ViT-B-32"))
    root = tmp_path / "here"
    shutil.copytree(finished, root)
    given = damage(root, monkeypatch) if damage.__code__.co_argcount == 2 else damage(root)
    kept = {path: path.read_bytes() for path in (root / "results").rglob("*") if path.suffix in (".json", ".md")}
    assert len(kept) == 3
    more = given if isinstance(given, list) else []
    capfd.readouterr()
    methods = [] if "--experiment" in more else ["--methods", "individual", "WEMoE (rank 16)"]
    assert reproduce.main([*run_in(root), *methods, *more]) == 2
    printed = capfd.readouterr().err
    (line,) = [line for line in printed.splitlines() if "error" in line.lower()]
    assert re.match(f"reproduce.py: error: .*{sentence}", line), line
    assert "Traceback" not in printed and printed.splitlines()[-1] == line
    assert {path: path.read_bytes() for path in kept} == kept
    assert not (root / "marker").exists() and not list(root.rglob("*.part"))


def test_unusual_input_that_is_right_is_accepted(finished, tmp_path, monkeypatch):
    """Half-precision weights, images of one pixel, and fewer of them than a batch has."""
    monkeypatch.setitem(clip.ARCHITECTURES, "ViT-B-32", TINY._replace(name="ViT-B-32"))
    root = tmp_path / "here"
    shutil.copytree(finished, root)
    save_file({name: p.half() for name, p in load_file(weights_of(root)).items()}, weights_of(root))
    data_set(lambda pictures: [picture("RGB", 1, 1, 0), picture("L", 1, 300, 0), *pictures[:1]])(root)
    assert reproduce.main([*run_in(root), "--methods", "individual", "WEMoE", "WEMoE (rank 16)"]) == 1
    results = json.loads((root / "results/ViT-B-32/results.json").read_text())
    assert all(math.isfinite(value) for method in results["methods"] for value in method["accuracy"].values())


def test_a_run_leaves_a_folder_to_the_run_that_has_it(small, tmp_path, capsys):
    (tmp_path / "results/miniature").mkdir(parents=True)
    with suite.alone(tmp_path / "results/miniature"):
        assert small("--methods", "pre-trained")[0] == 2
    assert "another run is writing into" in capsys.readouterr().err
    assert small("--methods", "pre-trained")[1]


forked = pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has loaded everything already")


def in_fork(function, *arguments) -> int:
    """The process number of a fork that runs a function, quietly, in a process group of its own."""
    if pid := os.fork():
        return pid
    try:
        os.setsid()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        os._exit(function(*arguments))
    finally:
        os._exit(99)


def counting(fatal: int, log: Path, run) -> int:
    """Run, noting what happens: images rendered, steps taken, files half and wholly written. Dies at one of these."""
    events = []

    def tick(event: str) -> None:
        events.append(event)
        if len(events) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def ticking(owner, name: str, half=None) -> None:
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if half:
                half(original, *args, **kwargs)
                tick(f"half of {name}")
            result = original(*args, **kwargs)
            tick(f"{owner.__name__}.{name}")
            return result

        setattr(owner, name, wrapped)

    ticking(miniature, "render")
    ticking(torch.optim.AdamW, "step")
    ticking(torch.optim.Adam, "step")
    ticking(Path, "write_text", half=lambda write, path, text: write(path, text[: len(text) // 2]))
    ticking(torch, "save", half=lambda _, state, path: path.write_bytes(b"PK"))
    ticking(os, "fsync")
    ticking(Path, "replace")
    status = run()
    log.write_bytes(json.dumps(events).encode())
    return status


@forked
def test_killed_anywhere_and_started_again_it_ends_with_the_same_results(small, tmp_path, monkeypatch):
    """Killed as it renders, fine-tunes, adapts, draws masks, and writes: before, in the middle of it, and after."""
    run = partial(small, "--methods", "individual", "WEMoE", "Concrete Task Arithmetic", "--steps", "3")
    monkeypatch.setattr(reproduce, "draw", lambda *_: {})  # figures take half of the time
    wait = lambda pid: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])  # noqa: E731
    status = wait(in_fork(counting, 0, tmp_path / "log", lambda: run(output="whole")[0]))
    events, random = json.loads((tmp_path / "log").read_text()), np.random.default_rng(0)
    expected = without_timings(json.loads((tmp_path / "whole/miniature/results.json").read_text()))
    kinds = sorted(set(events))
    assert status in (0, 1) and len(kinds) == 9
    for kind in kinds:
        moments = [moment for moment, event in enumerate(events, 1) if event == kind]
        for fatal in random.permutation(moments)[: 10 if NIGHTLY else 2 if kind.startswith("half") else 1].tolist():
            here = partial(run, output=f"killed{fatal}")
            assert wait(in_fork(counting, fatal, tmp_path / "log", lambda here=here: here()[0])) == -signal.SIGKILL
            again, results = here()
            assert again == status and without_timings(results) == expected, (kind, fatal)
            assert not list((tmp_path / f"killed{fatal}").rglob("*.part"))


@forked
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_a_run_and_its_workers(number, small, tmp_path):
    pid = in_fork(lambda: small("--methods", "WEMoE", "E-WEMoE", "--steps", "9999", "--workers", "2")[0])
    adapting = tmp_path / "results/miniature/cache"
    wait_until(lambda: any(adapting.glob("*wemoe*")))
    os.kill(pid, number)
    ended = []
    wait_until(lambda: ended.append(os.waitpid(pid, os.WNOHANG)) or ended[-1][0])
    assert os.waitstatus_to_exitcode(ended[-1][1]) == (-9 if number == signal.SIGKILL else 130)
    wait_until(lambda: not group_exists(pid))
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
    process = subprocess.Popen([sys.executable, HERE / "reproduce.py"], stderr=subprocess.PIPE, text=True)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 or os.name == "nt"
    assert "interrupted" in (error := process.stderr.read()) and "Traceback" not in error


def test_deterministic_algorithms_raise_nothing_and_change_nothing(small):
    methods = ["--methods", "individual", "WEMoE", "WEMoE (rank 16)", "E-WEMoE", "AdaMerging (task-wise)"]
    _, expected = small(*methods, output="usual")
    torch.use_deterministic_algorithms(True)
    try:
        _, results = small(*methods, output="deterministic")
    finally:
        torch.use_deterministic_algorithms(False)
    assert without_timings(results) == without_timings(expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adaptation_in_half_precision_stays_finite_at_clips_logit_scale(dtype):
    """Features and logits in half precision, the scale 100, 397 classes, and features that settle every answer."""
    pretrained, finetuned = family("plain", 16, 3, 0)
    for certainty in (1e-3, 1.0, 100.0):
        model = upscale(nn.ModuleDict({"mlp": pretrained})["mlp"], finetuned, modules=lambda name, _: name == "")
        classes = 100 * certainty * F.normalize(torch.randn(16, 397), dim=0)
        heads = {"a": lambda z, classes=classes: F.normalize(z, dim=-1) @ classes.to(z.dtype)}
        before = copy.deepcopy(list(model.router.parameters()))
        with torch.autocast("cpu", dtype):
            history = adapt(model, {"a": [torch.randn(4, 3, 16).mul(30)[:, 0]]}, heads, steps=3, lr=1e-2)
        assert all(0 <= value <= math.log(397) + 1e-3 for value in history)
        assert all(p.isfinite().all() for p in model.router.parameters())
        assert any(not torch.equal(p, q) for p, q in zip(model.router.parameters(), before)) or certainty == 100
    for logits in (torch.full((2, 397), 6e4, dtype=dtype), torch.eye(397, dtype=dtype)[:2] * 6e4):
        logits.requires_grad_()
        entropy(logits).sum().backward()
        assert logits.grad.isfinite().all()


DEGENERATE = {
    "zero": lambda pretrained, _: copy.deepcopy(pretrained.state_dict()),
    "constant": lambda pretrained, _: {name: p + 0.5 for name, p in pretrained.state_dict().items()},
    "identical": lambda _, finetuned: finetuned.state_dict(),
    "tiny": lambda pretrained, _: {name: p * (1 + 1e-30) + 1e-42 for name, p in pretrained.state_dict().items()},
    "ill-conditioned": lambda pretrained, _: {
        n: p + torch.logspace(-37, 6, p.numel()).view_as(p) for n, p in pretrained.state_dict().items()
    },
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_task_vectors_give_finite_models(name):
    pretrained, (one,) = family("plain", 6, 1, 0)
    finetuned = [copy.deepcopy(one) for _ in range(3)]
    for module in finetuned:
        module.load_state_dict(DEGENERATE[name](pretrained, one))
    vectors = [task_vector(pretrained, module) for module in finetuned]
    unified, masks, rescalers = reproduce.emr(vectors)
    assert all(math.isfinite(value) for value in rescalers)
    for merged in (wemoe.ties(vectors), unified, wemoe.trim(vectors[0]), task_arithmetic(pretrained, vectors)):
        assert all(p.isfinite().all() for p in merged.values())
    if name in ("zero", "identical"):
        for entry, value in wemoe.ties(vectors, keep=1.0).items():
            close(value, vectors[0][entry])
    for form in ({}, {"keep": 0.3}, {"rank": 2}):
        module = WEMoE(pretrained, finetuned, Router(6, 3), **form)
        y = module(1e-3 * torch.randn(4, 2, 6))
        y.sum().backward()
        assert y.isfinite().all() and all(p.grad.isfinite().all() for p in module.router.parameters())


class Normed(nn.Module):
    """Batch normalisation, tied weights, a shared submodule, a frozen, an unused and an adapted parameter."""

    def __init__(self, size: int = 4):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(size, size), nn.Linear(size, size), nn.BatchNorm1d(size)
        self.down.weight = self.up.weight
        self.again = self.up
        self.a, self.b = nn.Parameter(torch.zeros(size, 2)), nn.Parameter(torch.zeros(2, size))  # as LoRA's
        self.unused = nn.Parameter(torch.zeros(3))
        self.up.bias.requires_grad_(False)
        self.register_buffer("position_ids", torch.arange(size))

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, self.position_ids]
        return self.down(self.again(self.norm(self.up(x)))) + x @ self.a @ self.b


@pytest.mark.parametrize("training", [True, False])
def test_norms_ties_shared_frozen_unused_and_adapted_parameters(training):
    torch.manual_seed(0)
    models = [randomised(Normed()) for _ in range(3)]
    for model in models:
        model.norm.running_var.uniform_(0.5, 2), model.norm.running_mean.normal_()
    x, lam = torch.randn(5, 4), torch.rand(5, 2) / 2  # merged variances stay positive
    module = WEMoE(models[0], models[1:], router := Fixed(lam)).train(training)
    assert module.training == training and not module.pretrained.norm.training
    y, expected = module(x), literal(models[0].eval(), models[1:], router.lam, x)
    close(y, expected, atol=1e-4)
    for ours, theirs in zip(torch.autograd.grad(y.sum(), router.lam), torch.autograd.grad(expected.sum(), router.lam)):
        close(ours, theirs, atol=1e-2)
    shared = WEMoE(models[0], models[1:], Fixed(lam[0])).train(training)  # one λ for all: merged once
    close(shared(x), literal(models[0], models[1:], lam[:1].expand(5, 2), x), atol=1e-4)
    shared(x).sum().backward()
    merging = wemoe.AdaMerging(models[0], [task_vector(models[0], m) for m in models[1:]]).train(training)
    before = copy.deepcopy(merging.state_dict())
    merging(x).square().sum().backward()
    assert merging.lam.grad.isfinite().all() and merging.lam.grad.any()
    if not training:
        torch.testing.assert_close(merging.state_dict(), before, rtol=0, atol=0)
        alone = copy.deepcopy(models[0])
        alone.load_state_dict({**alone.state_dict(), **merging.merged()})
        close(merging(x), alone.eval()(x))


def test_a_tie_that_fine_tuning_has_cut_is_refused():
    pretrained, other = Normed(), Normed()
    other.down.weight = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(ValueError, match="'up.weight' and 'down.weight': tied in the pre-trained model, but not in"):
        WEMoE(pretrained, [other], Router(4, 1))


def test_routing_weights_of_a_shared_router_are_those_of_each_module():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(3)]
    model = upscale(models[0], models[1:], modules="0|2", shared_router=True)
    randomised(router := model[0].router)
    x = torch.randn(5, 4)
    with routing_weights(model) as weights:
        model(x)
    close(weights["0"], router(x))
    close(weights["2"], router(model[1](model[0](x))))


def adaptable() -> tuple[nn.Module, dict, dict]:
    pretrained, finetuned = family("plain", 4, 2, 0)
    model = upscale(pretrained, finetuned, modules=lambda name, _: name == "")
    return model, {"a": [torch.randn(8, 4)]}, {"a": lambda z: z}


def test_adapt_forgets_gradients_from_before():
    models, loaders, heads = zip(*(adaptable() for _ in range(2)))
    (1000 * models[0](loaders[0]["a"][0]).sum()).backward()
    for model in models:
        adapt(model, loaders[0], heads[0], steps=2, lr=0.1)
        assert all(p.grad is None for p in model.parameters())
    for one, other in zip(*(model.state_dict().values() for model in models)):
        assert torch.equal(one, other)


def test_adapt_refuses_what_would_ruin_the_routers():
    model, loaders, _ = adaptable()
    before = copy.deepcopy(model.state_dict())
    bad = {"a": lambda z: z + 0 * (z - z.detach()).norm(dim=-1, keepdim=True).sqrt()}  # the gradient alone is NaN
    with pytest.raises(FloatingPointError, match="The gradient is nan at step 1 of 1"):
        adapt(model, loaders, bad, steps=1)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="float16, which is too narrow for Adam"):
        adapt(model.half(), loaders, bad, steps=1)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_an_empty_batch_stays_empty(depth):
    pretrained, finetuned = family("plain", 4, 2, 0)
    assert WEMoE(pretrained, finetuned, Router(4, 2, depth))(torch.randn(0, 3, 4)).shape == (0, 3, 4)


def test_state_that_is_no_tensor_is_kept():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"version": [1]}

        def set_extra_state(self, state):
            self.state = state

    models = [Extra(3, 3) for _ in range(2)]
    assert upscale(nn.Sequential(models[0], nn.Linear(3, 3)), [nn.Sequential(models[1], nn.Linear(3, 3))], modules="1")[
        0
    ].state == {"version": [1]}


def test_a_terminal_without_a_tick_gets_something_else(tmp_path):
    say = "import io, sys, reproduce; reproduce.run = lambda _: print('\u2713') or True; sys.exit(reproduce.main([]))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(HERE)}
    done = subprocess.run([sys.executable, "-c", say], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "?\n"), done.stderr


# Hypothesis draws modules as Transformers have them, 50 of each kind (HYPOTHESIS_PROFILE=nightly: 1,000).


class Drawn(nn.Module):
    """An MLP, gated or not, of one to three layers, with or without biases, norms inside, a residual connection."""

    def __init__(self, size: int, hidden: int, layers: int, gated: bool, bias: bool, norm, activation, residual: bool):
        super().__init__()
        sizes = [size] + [hidden] * (layers - 1) + [size]
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in itertools.pairwise(sizes))
        self.gates = nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in itertools.pairwise(sizes) if gated)
        self.norms = nn.ModuleList(norm(a) for a in sizes[:-1] if norm)
        self.activation, self.residual = activation, residual

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for i, layer in enumerate(self.layers):
            h = self.norms[i](h) if self.norms else h
            gate = torch.tanh(self.gates[i](h)) if self.gates else 1
            h = self.activation(layer(h)) * gate
        return h + x if self.residual else h


drawn = st.fixed_dictionaries(
    {
        "size": st.integers(1, 5),
        "hidden": st.integers(1, 7),
        "layers": st.integers(1, 3),
        "gated": st.booleans(),
        "bias": st.booleans(),
        "norm": st.sampled_from([None, nn.LayerNorm, nn.RMSNorm]),
        "activation": st.sampled_from([F.gelu, F.silu, F.relu, torch.tanh, nn.Identity(), F.softplus]),
        "residual": st.booleans(),
    }
)
fuzz = settings(max_examples=max(50, settings().max_examples), deadline=None, derandomize=not NIGHTLY)


@fuzz
@given(drawn, task_numbers, batch_sizes, st.lists(st.integers(1, 3), max_size=3), st.integers(0, 2), seeds)
def test_fuzzed_modules_obey_the_equation(spec, tasks, batch, tokens, depth, seed):
    torch.manual_seed(seed)
    pretrained, *finetuned = (randomised(Drawn(**spec)) for _ in range(tasks + 1))
    size = spec["size"]
    x = torch.randn(batch, *tokens, size, requires_grad=True)
    module = WEMoE(pretrained, finetuned, randomised(Router(size, tasks, depth), 0.3))
    y, expected = module(x), literal(pretrained, finetuned, module.router(x), x)
    close(y, expected, atol=1e-3)  # as the loop
    assert (y - module(x)).abs().max() < 1e-4  # twice the same
    direction, sources = torch.randn_like(y), [x, *module.router.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad((out * direction).sum(), sources) for out in (y, expected))):
        torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-2)
    eye = torch.eye(tasks)
    for t, model in enumerate(finetuned):  # one expert asked for by name answers alone
        close(WEMoE(pretrained, finetuned, Repeated(eye[t]))(x), model(x), atol=1e-3)
    close(WEMoE(pretrained, [pretrained] * tasks, module.router)(x), pretrained(x), atol=1e-3)  # nothing to add
    close(module(x[:1]), y[:1], atol=1e-3)  # whoever else is in the batch
    full = WEMoE(pretrained, finetuned, module.router, rank=99)
    close(full(x), y, atol=1e-2)


VALID = safetensors.torch.save({"a.weight": torch.ones(3, 5), "b": torch.arange(4), "c": torch.ones(2).half()})


@fuzz
@given(
    st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=6),
    st.none() | st.integers(0, len(VALID)),
    st.binary(max_size=20),
    st.sampled_from([None, 0, 7, 2**31, 2**63]),
)
def test_fuzzed_safetensors_load_or_are_refused(tmp_path_factory, changes, length, tail, header):
    data = bytearray(VALID)
    for place, byte in changes:
        data[place] = byte
    if header is not None:
        data[:8] = header.to_bytes(8, "little")
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(bytes(data[:length]) + tail)
    try:
        state = clip.read_weights(path)
    except clip.InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert sum(p.nbytes for p in state.values()) <= path.stat().st_size


# ------------------------------------------------------------------------------------------
# README
# ------------------------------------------------------------------------------------------


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)


def test_the_examples_in_readme_run_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the examples may write
    assert (examples := code_blocks("python"))
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})


def test_promises_name_tests_that_exist():
    named = set(re.findall(r"`(test_\w+)`", (HERE / "README.md").read_text()))
    assert len(named) > 12 and named <= globals().keys() and len(DAMAGE) > 60


def test_wemoe_needs_nothing_but_torch():
    imports = re.findall(r"^(?:import|from) (\w+)", (HERE / "wemoe.py").read_text(), re.MULTILINE)
    assert set(imports) - set(sys.stdlib_module_names) == {"torch"}
