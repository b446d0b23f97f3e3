"""What must be true of wemoe.py, in the order of the file: its specification. Needs no network and no GPU.

Properties come first: hypothesis draws shapes, numbers of tasks, router depths and seeds. Float32 tolerances: weights
and activations are of order one and sums have some dozens of terms, so that rounding (6e-8 relative) stays below ATOL.
"""

import copy
import functools
import io
import itertools
import math
import os
import re
import sys
import threading
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import wemoe
from wemoe import (
    MergedLayer,
    Router,
    WEMoE,
    adapt,
    entropy,
    frozen_routing,
    mean_entropy,
    negative_information,
    routing_weights,
    set_token_mask,
    task_arithmetic,
    task_vector,
    unload,
    upscale,
)

ATOL = 2e-5
HERE = Path(__file__).parent

settings.register_profile("default", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
NIGHTLY = settings().max_examples == 1000
torch.set_num_threads(1)  # small tensors gain nothing from more

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


@pytest.fixture
def module_and_input():
    pretrained, finetuned = family("plain", 8, 3, 0)
    return WEMoE(pretrained, finetuned, randomised(Router(8, 3), 0.2)), torch.randn(4, 5, 8)


def test_copies_and_saved_modules_are_equal(module_and_input):
    module, x = module_and_input
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    fresh = WEMoE(*family("plain", 8, 3, 1), Router(8, 3))
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
def test_bfloat16_autocast_gives_the_type_of_a_dense_module_and_nearly_the_same(kind):
    pretrained, finetuned = family(kind, 8, 2, 0)
    module = WEMoE(pretrained, finetuned, Repeated(torch.eye(2)[0]))
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
                             feed_forward_proj="gated-gelu", decoder_start_token_id=0),
        lambda model: model(input_ids=TOKENS, decoder_input_ids=TOKENS, use_cache=False).logits,
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


@pytest.mark.parametrize("objective", [mean_entropy, negative_information])
def test_adapt_is_adam_on_the_sum_over_tasks_with_cosine_annealing(objective):
    """Mutual information is the mean divergence of p from its mean."""
    model, loaders, heads = small_problem()
    other, means = copy.deepcopy(model), []
    history = adapt(model, loaders, heads, steps=5, lr=1e-2, objective=objective)
    optimizer = torch.optim.Adam([p for p in other.parameters() if p.requires_grad])
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 + math.cos(math.pi * step / 5)) / 2
        optimizer.zero_grad()
        entropies = []
        for t in "ab":
            p = heads[t](other(loaders[t][step % 3])).double().softmax(-1)
            information = (p * (p / p.mean(0)).log()).sum(-1).mean()
            entropies.append(-(p * p.log()).sum(-1).mean())
            (entropies[-1] if objective is mean_entropy else -information).backward()
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
    for objective in (mean_entropy, negative_information):
        model = WEMoE(linear, finetuned, Router(1, 2, 0, 0.3))
        history = adapt(model, {"a": [x]}, {"a": nn.Identity()}, steps=200, lr=0.1, objective=objective)
        assert history[-1] < 0.05  # sure of its answers, in both cases
        answers[objective] = model(x).argmax(-1).tolist()
    assert answers == {mean_entropy: [0] * 8, negative_information: [0, 1] * 4}


def test_diversity_of_masked_classes_is_finite():
    model, loaders, heads = small_problem()
    masked = {
        task: lambda z, head=head: head(z).index_fill(-1, torch.tensor(0), -math.inf) for task, head in heads.items()
    }
    adapt(model, loaders, masked, steps=2, lr=1e-2, objective=negative_information)
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
    optimizer = torch.optim.Adam([p for p in other.parameters() if p.requires_grad], lr=1e-2)

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
# Errors name what is wrong
# ------------------------------------------------------------------------------------------


def linear_with(**entries: Tensor) -> dict[str, Tensor]:
    return {**nn.Linear(2, 2).state_dict(), **entries}


LINEAR = nn.Linear(2, 2)
ERRORS = {
    "'bias' is in the pre-trained model alone": lambda: task_vector(LINEAR, nn.Linear(2, 2, False)),
    "'more' is in the fine-tuned model alone": lambda: task_vector(LINEAR, linear_with(more=torch.ones(1))),
    r"'weight' has shape \(2, 3\) in the fine-tuned model, but \(2, 2\)": lambda: task_vector(
        LINEAR, linear_with(weight=torch.ones(2, 3))
    ),
    "'bias' is NaN, infinite or on the meta device in the fine-tuned": lambda: task_vector(
        LINEAR, linear_with(bias=torch.tensor([0, math.nan]))
    ),
    "'weight' is NaN, infinite or on the meta device in the pre-trained": lambda: task_vector(
        linear_with(weight=torch.full((2, 2), math.inf)), LINEAR
    ),
    "2 scaling factors for 1 task vectors": lambda: task_arithmetic(LINEAR, [LINEAR.state_dict()], [0.1, 0.2]),
    "'more' is in a task vector alone": lambda: task_arithmetic(LINEAR, [linear_with(more=torch.ones(1))]),
    "depth 0, 1 or 2, .* not depth=3": lambda: Router(4, 2, depth=3),
    "tasks, .* num_tasks=0": lambda: Router(4, 0),
    r"\(B, ..., 4\), got \(2, 3\)": lambda: Router(4, 2)(torch.ones(2, 3)),
    "0 fine-tuned modules": lambda: WEMoE(LINEAR, [], Router(2, 1)),
    "2 fine-tuned modules for a router with 3 outputs": lambda: WEMoE(LINEAR, [LINEAR] * 2, Router(2, 3)),
    r"weights are \(1, 3\) for an input \(1, 2\)": lambda: WEMoE(LINEAR, [LINEAR], Fixed(torch.ones(3)))(
        torch.ones(1, 2)
    ),
    "'bias' is in the pre-trained": lambda: WEMoE(LINEAR, [nn.Linear(2, 2, False)], Router(2, 1)),
    "No MLP was found in Sequential.*among '0', '1'": lambda: upscale(
        nn.Sequential(LINEAR, nn.Linear(2, 2)), [nn.Sequential(LINEAR, LINEAR)]
    ),
    r"modules='mpl' selects no module.*'blocks\.0\.mlp'": lambda: upscale(
        Transformer(), [Transformer()], modules="mpl"
    ),
    "at least one fine-tuned model": lambda: upscale(Transformer(), []),
    "hidden size of 'conv'": lambda: upscale(*convolutions(), modules="conv"),
    "loaders for 'a', 'b', but heads for 'a'": lambda: adapt(
        small_problem()[0], {"a": [], "b": []}, {"a": nn.Identity()}
    ),
    "loader of task 'a' yields no batch": lambda: adapt(small_problem()[0], {"a": []}, {"a": nn.Identity()}),
    "task 'a' yields no batch when started again": lambda: adapt(
        small_problem()[0], {"a": iter([torch.ones(1, 3, 3)])}, {"a": nn.Identity()}
    ),
    "there are no loaders": lambda: adapt(small_problem()[0], {}, {}),
    "has nothing to train": lambda: adapt(Transformer().requires_grad_(False), {}, {}),
    "steps=0": lambda: adapt(small_problem()[0], {"a": []}, {"a": nn.Identity()}, steps=0),
    "Invalid learning rate: nan": lambda: adapt(small_problem()[0], {"a": []}, {"a": nn.Identity()}, lr=math.nan),
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
    assert all(p.isfinite().all() for p in task_arithmetic(pretrained, vectors).values())
    module = WEMoE(pretrained, finetuned, Router(6, 3))
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
    assert module.training == training and module.pretrained.norm.training == training
    y, expected = module(x), literal(models[0].eval(), models[1:], router.lam, x)
    close(y, expected, atol=1e-4)
    for ours, theirs in zip(torch.autograd.grad(y.sum(), router.lam), torch.autograd.grad(expected.sum(), router.lam)):
        close(ours, theirs, atol=1e-2)
    shared = WEMoE(models[0], models[1:], Fixed(lam[0])).train(training)  # one λ for all: merged once
    close(shared(x), literal(models[0], models[1:], lam[:1].expand(5, 2), x), atol=1e-4)
    shared(x).sum().backward()


def test_a_tie_that_fine_tuning_has_cut_is_refused():
    pretrained, other = Normed(), Normed()
    other.down.weight = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(ValueError, match="are tied in the pre-trained model, but not in the fine-tuned model"):
        WEMoE(pretrained, [other], Router(4, 1))


def test_routing_weights_of_a_shared_router_are_those_of_each_module():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(3)]
    model = upscale(models[0], models[1:], modules="0|2")
    model[2].router = router = randomised(model[0].router)
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
    with pytest.raises(ValueError, match="in half precision routers do not move"):
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
    word_by_word = WEMoE(pretrained, finetuned, module.router, layer=MergedLayer)  # the whole module, without tiles
    close(word_by_word(x), y, atol=1e-3)


# ------------------------------------------------------------------------------------------
# In other people's hands: hooks, kept tensors, recomputation, copies, replicas, compilers
# ------------------------------------------------------------------------------------------


class Keeping(nn.Module):
    """Two layers, the second one perhaps in a checkpoint; keeps what it has seen, as modules that are looked at do."""

    def __init__(self, reentrant: bool | None = None):
        super().__init__()
        self.a, self.b, self.reentrant, self.last = nn.Linear(4, 4), nn.Linear(4, 4), reentrant, None

    def forward(self, h: Tensor) -> Tensor:
        self.last = h = torch.tanh(self.a(h))
        return self.b(h) if self.reentrant is None else checkpoint(self.b, h, use_reentrant=self.reentrant)


def keeping(reentrant: bool | None = None) -> WEMoE:
    torch.manual_seed(0)
    models = [randomised(Keeping(reentrant)) for _ in range(3)]
    return WEMoE(models[0], models[1:], randomised(Router(4, 2), 0.3))


def gradients(module: nn.Module, loss: Tensor) -> list[Tensor]:
    module.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in module.parameters() if p.requires_grad]


X, Y = torch.randn(3, 5, 4), torch.randn(3, 5, 4)


def test_hooks_see_what_layers_of_a_dense_module_see():
    pretrained, seen = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)), []
    pretrained[0].register_forward_hook(lambda module, inputs, output: seen.append(output))  # before it is routed
    module = WEMoE(pretrained, [copy.deepcopy(pretrained) for _ in range(2)], Router(4, 2))
    module.pretrained[2].register_forward_hook(lambda module, inputs, output: seen.append(output))  # and after
    y = module(X)
    assert [tuple(output.shape) for output in seen] == [(3, 5, 4)] * 2 and torch.equal(seen[1], y)
    seen[0].mean().item()


def test_what_a_module_keeps_can_be_read_and_the_module_copied_afterwards():
    module = keeping()
    y = module(X)
    assert module.last is module.pretrained.last and torch.equal(
        module.pretrained.b.layer(X), module.pretrained.b.layer(X)
    )
    with torch.no_grad():
        module(X)
    assert torch.equal(copy.deepcopy(module)(X), y)


@pytest.mark.parametrize("outer", [None, True, False])
@pytest.mark.parametrize("inner", [None, False])
def test_recomputation_changes_no_gradient(inner, outer):
    plain, module, x = keeping(), keeping(inner), X.clone().requires_grad_()
    module.load_state_dict(plain.state_dict())
    run = module if outer is None else functools.partial(checkpoint, module, use_reentrant=outer)
    for ours, theirs in zip(gradients(module, run(x).square().sum()), gradients(plain, plain(x).square().sum())):
        close(ours, theirs, atol=1e-3)


def test_two_passes_before_one_backward_each_recompute_with_their_own_lambda():
    plain, module = keeping(), keeping(False)
    expected = gradients(plain, plain(X).square().sum() + plain(Y).sin().sum())
    for ours, theirs in zip(gradients(module, module(X).square().sum() + module(Y).sin().sum()), expected):
        close(ours, theirs, atol=1e-3)


def test_reentrant_checkpoints_inside_are_refused():
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        keeping(True)(X)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_it_gives_the_same(backend):
    module = keeping()
    close(torch.compile(module, backend=backend)(X), module(X))
    torch._dynamo.reset()


def test_exported_it_gives_the_same():
    model, images = upscale(Transformer(), [Transformer(), Transformer()]).eval(), torch.randn(2, 5, 3)
    close(torch.export.export(model, (images,), strict=False).module()(images), model(images))


def test_replicas_and_threads_do_not_share_lambda():
    """nn.DataParallel gives each device a replica and a thread; a server's threads share one model."""

    def replica(module: nn.Module) -> nn.Module:
        twin = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            twin._modules[name] = child and replica(child)
        for name, p in module._parameters.items():
            setattr(twin, name, p if p is None else p * 1)  # as a broadcast makes them
        return twin

    pretrained, finetuned = family("normed", 4, 2, 0)
    module = WEMoE(pretrained, finetuned, randomised(Router(4, 2)))
    inputs = [torch.randn(3, 5, 4) for _ in range(20)]
    expected = [module(x) for x in inputs]
    close(replica(module)(inputs[0]), expected[0])
    found: dict[int, Tensor] = {}

    def run(start: int) -> None:
        found.update({i: module(inputs[i]) for i in range(start, len(inputs), 4)})

    threads = [threading.Thread(target=run, args=(start,)) for start in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for i, y in enumerate(expected):
        close(found[i], y)


def test_distributed_data_parallel_adapts_alike(tmp_path):
    (model, loaders, heads), (other, *_) = small_problem(), small_problem()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        adapt(nn.parallel.DistributedDataParallel(model), loaders, heads, steps=3, lr=1e-2)
    finally:
        torch.distributed.destroy_process_group()
    adapt(other, loaders, heads, steps=3, lr=1e-2)
    for name, p in trained(model).items():
        close(p, trained(other)[name])


class Flattening(nn.Module):
    """Its layer sees tokens, not samples."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, h: Tensor) -> Tensor:
        return self.fc(h.flatten(0, 1)).view_as(h)


class Reading(Flattening):
    """It reads the weights of its layer, and does not run it."""

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.fc.weight, self.fc.bias)


@pytest.mark.parametrize("kind, error", [(Flattening, ValueError), (Reading, RuntimeError)])
def test_a_module_whose_layers_do_not_see_samples_is_refused_or_runs_whole(kind, error):
    models, lam = [randomised(kind()) for _ in range(3)], torch.randn(3, 2)
    with pytest.raises(error, match="layer=MergedLayer"):
        WEMoE(models[0], models[1:], Fixed(lam))(X)
    close(WEMoE(models[0], models[1:], Fixed(lam), layer=MergedLayer)(X), literal(models[0], models[1:], lam, X))


@given(kinds, task_numbers, seeds)
def test_constant_routers_are_merged_for_good(kind, tasks, seed):
    pretrained, finetuned = family(kind, 4, tasks, seed)
    module = WEMoE(pretrained, finetuned, randomised(Router(4, tasks, 0)))
    plain, x = unload(module), torch.randn(3, 2, 4)
    assert not any(isinstance(part, WEMoE | MergedLayer) for part in plain.modules())
    assert [type(part) for part in plain.modules()] == [type(part) for part in pretrained.modules()]
    close(plain(x), module(x), atol=1e-4)
    with pytest.raises(ValueError, match="Only routers of depth 0"):
        unload(WEMoE(pretrained, finetuned, Router(4, tasks, 1)))


# ------------------------------------------------------------------------------------------
# Text: padding, masks, generation
# ------------------------------------------------------------------------------------------

TOWERS = {
    "BERT": (lambda: hugging_face("BertModel", "BertConfig", **TEXT), r"layer\.\d+\.(intermediate|output)$"),
    "RoBERTa": (
        lambda: hugging_face("RobertaModel", "RobertaConfig", vocab_size=20, max_position_embeddings=20),
        r"layer\.\d+\.(intermediate|output)$",
    ),
    "T5": (lambda: hugging_face("T5EncoderModel", "T5Config", d_model=8, d_ff=16, d_kv=4, vocab_size=20), None),
    "CLIP": (lambda: hugging_face("CLIPTextModel", "CLIPTextConfig", **TEXT, eos_token_id=19), None),
}


def routed_text(make, modules: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    models = [randomised(make().eval(), 0.2) for _ in range(3)]
    model = upscale(models[0], models[1:], modules=modules).eval()
    for module in model.modules():
        if isinstance(module, WEMoE):
            randomised(module.router, 0.3)
    return model


@pytest.mark.parametrize("tower", TOWERS)
def test_padding_changes_no_output(tower):
    model = routed_text(*TOWERS[tower])
    ids, mask = torch.randint(3, 19, (2, 4)), torch.ones(2, 4, dtype=torch.long)
    padded, longer = F.pad(ids, (0, 3), value=1), F.pad(mask, (0, 3))
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
        for run in (model, copy.deepcopy(model)):
            close(run(input_ids=padded, attention_mask=longer).last_hidden_state[:, :4], expected, atol=1e-4)
            close(run(padded, longer).last_hidden_state[:, :4], expected, atol=1e-4)
        blind = model(input_ids=padded).last_hidden_state[:, :4]  # and no mask stays behind
    assert not torch.allclose(blind, expected, atol=1e-3)


def test_a_mask_is_taken_by_its_own_tower_alone():
    t5 = routed_text(LIBRARIES["T5"][0])
    ids, mask, other = TOKENS, torch.ones(2, 5, dtype=torch.long), torch.tensor([[1, 1, 1, 0, 0]] * 2)
    seen = {}
    for name, module in t5.named_modules():
        if isinstance(module, WEMoE):
            module.register_forward_hook(lambda m, *_, name=name: seen.update({name.split(".")[0]: m.mask}))
    t5(input_ids=ids, attention_mask=other, decoder_input_ids=ids, use_cache=False)
    assert torch.equal(seen["encoder"], other) and seen["decoder"] is None
    t5(input_ids=ids, attention_mask=other, decoder_input_ids=ids, decoder_attention_mask=mask, use_cache=False)
    assert torch.equal(seen["encoder"], other) and torch.equal(seen["decoder"], mask)
    clip = routed_text(LIBRARIES["CLIP"][0])
    clip(input_ids=ids, pixel_values=IMAGES, attention_mask=other)
    masks = {name.split("_")[0]: m.mask for name, m in clip.named_modules() if isinstance(m, WEMoE)}
    assert masks["vision"] is None and torch.equal(masks["text"], other)


def test_a_mask_can_be_set_by_hand():
    pretrained, finetuned = family("plain", 4, 2, 0)
    module = WEMoE(pretrained, finetuned, randomised(Router(4, 2)))
    set_token_mask(module, torch.tensor([[1, 1, 1, 0, 0]] * 3))
    masked = module(X)
    set_token_mask(module, None)
    close(masked[:, :3], module(X[:, :3]))


@pytest.mark.parametrize("model", ["Llama", "GPT-2", "T5"])
def test_with_and_without_a_cache_the_same_tokens_are_generated(model):
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=20, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    make = {
        "Llama": lambda: hugging_face("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2, vocab_size=20),
        "GPT-2": lambda: transformers.GPT2LMHeadModel(config),
        "T5": LIBRARIES["T5"][0],
    }[model]
    routed = routed_text(make)
    ids, mask = torch.randint(3, 19, (2, 5)), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])  # padded on the left
    options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=1)
    for decoder in (routed, copy.deepcopy(routed)):
        cached, plain = (decoder.generate(ids, use_cache=use, **options) for use in (True, False))
        assert torch.equal(cached, plain)
    with frozen_routing(routed) as kept:
        routed.generate(ids[:1], max_new_tokens=2, do_sample=False, pad_token_id=1)
    assert kept


def test_batches_may_be_arguments_by_name():
    model = routed_text(*TOWERS["BERT"])
    batch = {"input_ids": TOKENS, "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    heads = {"a": lambda out: out.last_hidden_state[:, 0, :3]}
    before = copy.deepcopy(trained(model))
    with torch.no_grad(), torch.inference_mode():
        adapt(model, {"a": [batch]}, heads, steps=3, lr=1e-2)
    assert any(not torch.equal(p, before[name]) for name, p in trained(model).items())


# ------------------------------------------------------------------------------------------
# What is refused, each in one sentence that says what to do
# ------------------------------------------------------------------------------------------


def plain(**changes) -> dict[str, Tensor]:
    return {"w": torch.ones(2, 2), "counter": torch.tensor(3), "mask": torch.ones(2, dtype=torch.bool), **changes}


def modified(change) -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    change(module)
    return module


def replace_forward(module: nn.Module) -> None:
    module[0].forward = lambda h: h


def adapt_with(logits=lambda z: z.mean(1), change=lambda model: None, **options) -> None:
    pretrained, finetuned = family("plain", 4, 2, 0)
    model = WEMoE(pretrained, finetuned, Router(4, 2))
    change(model)
    adapt(model, {"a": [X]}, {"a": logits}, steps=1, **options)


def inference_built() -> nn.Module:
    with torch.inference_mode():
        return upscale(nn.Sequential(nn.Linear(4, 4)), [nn.Sequential(nn.Linear(4, 4))], modules="0")


REFUSED = {
    "lie under|holds the weights": lambda: task_vector({"epoch": 3, "state_dict": plain()}, {"state_dict": plain()}),
    "'model' holds the weights of a checkpoint": lambda: task_vector({"model": plain()}, {"model": plain()}),
    "'module.w' .* strip the prefix": lambda: task_vector(plain(), {f"module.{k}": p for k, p in plain().items()}),
    "'_orig_mod.w' .* strip the prefix": lambda: task_vector({f"_orig_mod.{k}": p for k, p in plain().items()},
        plain()),
    "'w' differs and is torch.int8 and torch.int8": lambda: task_vector(
        plain(v=torch.ones(2), w=torch.ones(2, 2, dtype=torch.int8)),
        plain(v=torch.ones(2), w=torch.zeros(2, 2, dtype=torch.int8))
    ),
    "'w' differs and is torch.float32 and torch.uint8": lambda: task_vector(
        plain(v=torch.ones(2)), plain(v=torch.ones(2), w=torch.zeros(2, 2, dtype=torch.uint8))
    ),
    "'mask' differs and is torch.bool": lambda: task_vector(plain(), plain(mask=torch.zeros(2, dtype=torch.bool))),
    "'c' differs and is torch.complex64": lambda: task_vector(
        plain(c=torch.ones(2, dtype=torch.complex64)), plain(c=1j * torch.ones(2, dtype=torch.complex64))
    ),
    "'q' differs and is torch.qint8": lambda: task_vector(
        *(plain(q=torch.quantize_per_tensor(torch.full((2,), v), 0.1, 0, torch.qint8)) for v in (1.0, 2.0))
    ),
    "'w' differs and is torch.float8": lambda: task_vector(
        *(plain(v=torch.ones(2), w=torch.full((2, 2), v).to(torch.float8_e4m3fn)) for v in (1.0, 2.0))
    ),
    "no floating-point weights to merge": lambda: task_vector({"w": torch.ones(2).to(torch.float8_e4m3fn)}, {}),
    "'w' is NaN, infinite or on the meta device": lambda: task_vector(
        plain(w=torch.ones(2, 2, device="meta")), plain()
    ),
    **{
        f"{name.split('.')[0]}.* is a factor of a low-rank adapter": lambda name=name: task_vector(
            {name: torch.ones(1, 4)}, {name: torch.ones(1, 4)}
        )
        for name in ("lora_A.default.weight", "lora_a.weight", "lora_down.weight")
    },
    "'0'.* forward was replaced": lambda: WEMoE(modified(replace_forward), [modified(replace_forward)], Router(4, 1)),
    "'' .*forward was replaced|forward was replaced": lambda: WEMoE(
        torch.jit.script(nn.Linear(4, 4)), [nn.Linear(4, 4)], Router(4, 1)
    ),
    "compiled, traced": lambda: WEMoE(
        modified(lambda m: m.append(torch.compile(nn.Linear(4, 4)))), [modified(lambda m: None)], Router(4, 1)
    ),
    **{
        f"{kind.__name__}\\) keeps its weights elsewhere": lambda kind=kind: WEMoE(
            kind(4, 4), [kind(4, 4)], Router(4, 1)
        )
        for kind in (nn.GRU, nn.LSTM, nn.RNN)
    },
    "'0' \\(Linear\\) keeps its weights elsewhere": lambda: WEMoE(
        modified(lambda m: nn.utils.weight_norm(m[0])), [modified(lambda m: nn.utils.weight_norm(m[0]))], Router(4, 1)
    ),
    "half precision": lambda: adapt_with(change=lambda model: model.router.bfloat16()),
    "built in torch.inference_mode": lambda: adapt(inference_built(), {"a": [X]}, {"a": lambda z: z.mean(1)}),
    "holds none of what is trainable": lambda: adapt_with(optimizer=torch.optim.Adam(nn.Linear(2, 2).parameters())),
    r"not \(3, 1\)": lambda: adapt_with(lambda z: z.mean((1, 2))[:, None]),
    r"not \(3,\)": lambda: adapt_with(lambda z: z.mean((1, 2))),
    r"not \(3, 2, 5, 2\)": lambda: adapt_with(lambda z: z.reshape(3, 2, 5, 2)),
    "batch_first=False": lambda: upscale(sequence_first(), [sequence_first()], modules="mlp"),
    "unlabelled inputs": lambda: adapt(small_problem()[0], {"a": [(X, X)]}, {"a": nn.Identity()}),
}  # fmt: skip


def sequence_first() -> nn.Module:
    return nn.ModuleDict({"block": nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "mlp": nn.Linear(4, 4)})})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sentence", REFUSED)
def test_refused_in_one_sentence(sentence):
    with pytest.raises(ValueError, match=sentence) as refusal:
        REFUSED[sentence]()
    assert "\n" not in str(refusal.value)


def test_what_is_equal_or_a_counter_need_not_be_a_weight():
    tau = task_vector(plain(ids=torch.arange(2)), plain(counter=torch.tensor(9), ids=torch.arange(2.0)))
    assert list(tau) == ["w"]


def test_models_and_vectors_come_in_any_container():
    pretrained, (a, b) = family("plain", 4, 2, 0)
    tau = {"a": task_vector(pretrained, a), "b": task_vector(pretrained, b.state_dict())}
    merged = task_arithmetic(pretrained, list(tau.values()), [0.1, 0.2])
    for name, p in task_arithmetic(pretrained, tau, torch.tensor([0.1, 0.2])).items():
        close(p, merged[name])
    routers = []
    for models in ([a, b], {"a": a, "b": b}, nn.ModuleDict({"a": a, "b": b}), [a.state_dict(), b.state_dict()]):
        torch.manual_seed(0)
        routers.append(upscale(pretrained, models, modules="0|2"))
    for other in routers[1:]:
        assert torch.equal(other(X), routers[0](X))


def test_wemoe_needs_nothing_but_torch():
    imports = re.findall(r"^(?:import|from) (\w+)", (HERE / "wemoe.py").read_text(), re.MULTILINE)
    assert set(imports) - set(sys.stdlib_module_names) == {"torch"}
