"""What must be true of wemoe.py, of the miniature and of reproduce.py. Run with `pytest`; needs no network and no GPU.

Properties come first: hypothesis draws shapes, numbers of tasks, router depths and seeds. Float32 tolerances: weights
and activations are of order one and sums have some dozens of terms, so that rounding (6e-8 relative) stays below ATOL.
"""

import contextlib
import copy
import io
import json
import math
import re
import sys
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
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

import reproduce
import wemoe
from data import miniature
from wemoe import Router, WEMoE, adapt, entropy, routing_weights, task_arithmetic, task_vector, upscale

ATOL = 2e-5
HERE = Path(__file__).parent

settings.register_profile("default", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("default")

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


def literal(pretrained: nn.Module, finetuned: list[nn.Module], lam: Tensor, x: Tensor) -> Tensor:
    """The equation, word by word: for every sample its own θ_0 + Σ_t λ_t τ_t, through which it runs alone."""
    theta_0, thetas = pretrained.state_dict(), [module.state_dict() for module in finetuned]
    outputs = []
    for b in range(len(x)):
        theta = {k: p + sum(lam[b, t] * (thetas[t][k] - p) for t in range(len(thetas))) for k, p in theta_0.items()}
        outputs.append(functional_call(pretrained, theta, (x[b : b + 1],)))
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
    for t in range(tasks):
        close(WEMoE(pretrained, finetuned, Fixed(torch.eye(tasks)[t]))(x), finetuned[t](x))
    close(WEMoE(pretrained, finetuned, Fixed(torch.zeros(tasks)))(x), pretrained(x))
    merged = task_arithmetic(pretrained, [task_vector(pretrained, model) for model in finetuned], lam)
    close(WEMoE(pretrained, finetuned, Fixed(torch.full((tasks,), lam)))(x), functional_call(pretrained, merged, (x,)))


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


@pytest.mark.parametrize("tile", [1, 7, 64])
def test_tiles_of_any_size_give_the_same(tile, monkeypatch):
    pretrained, finetuned = family("plain", 4, 3, 0)
    module, x = WEMoE(pretrained, finetuned, randomised(Router(4, 3))), torch.randn(3, 5, 4)
    results = []
    for size in (2**20, tile):
        monkeypatch.setitem(wemoe._TILE, "cpu", size)
        y = module(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(module.router.parameters()))])
    for whole, tiled in zip(*results):
        close(whole, tiled, atol=1e-3)


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
        module = WEMoE(models[0], models[1:], Fixed(torch.eye(2)[t])).train(training)
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
    module, x, bias = WEMoE(models[0], models[1:], Fixed(torch.eye(2)[1])), torch.randn(2, 3, 4), torch.randn(4)
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
            self.bent = nn.Linear(4, 4)
            nn.utils.parametrize.register_parametrization(self.bent, "weight", nn.Tanh())

        def forward(self, x):
            assert self.a.shape == (4, 2) and self.a.dtype == x.dtype and self.a.device == x.device
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
def test_bfloat16_autocast_gives_the_same_type_and_precision_as_the_dense_module(kind):
    pretrained, finetuned = family(kind, 8, 2, 0)
    module, x = WEMoE(pretrained, finetuned, Fixed(torch.eye(2)[0])), torch.randn(4, 5, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, dense = module(x), finetuned[0](x)
        loss = y.float().square().mean()
    assert y.dtype == dense.dtype
    torch.testing.assert_close(y.float(), finetuned[0](x), atol=0.1, rtol=0.05)
    loss.backward()
    reference = torch.autograd.grad(WEMoE(pretrained, finetuned, module.router)(x).square().mean(), module.router.lam)
    torch.testing.assert_close(module.router.lam.grad, reference[0], atol=0.05, rtol=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_what_the_cpu_gives(module_and_input):
    module, x = module_and_input
    torch.testing.assert_close(module.cuda()(x.cuda()).cpu(), module.cpu()(x), atol=1e-4, rtol=1e-4)


def test_the_wrapped_module_stays_in_reach_but_not_its_tensors(module_and_input):
    module, _ = module_and_input
    assert isinstance(module.get_submodule("pretrained.0"), nn.Linear) and len(list(module.children())) == 3
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
            module.router = Fixed(lam)


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


def test_any_models_are_recovered_when_every_module_with_parameters_is_routed():
    torch.manual_seed(0)
    pretrained, *finetuned = (
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), Gated(6))
        for _ in range(4)
    )
    x, leaves = torch.randn(3, 2, 4), lambda name, module: any(True for _ in module.parameters(recurse=False))
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


def test_adapt_is_adam_on_the_sum_over_tasks_with_cosine_annealing():
    model, loaders, heads = small_problem()
    other = copy.deepcopy(model)
    adapt(model, loaders, heads, steps=5, lr=1e-2)
    optimizer = torch.optim.Adam([p for p in other.parameters() if p.requires_grad])
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 + math.cos(math.pi * step / 5)) / 2
        optimizer.zero_grad()
        sum(entropy(heads[t](other(loaders[t][step % 3]))).mean() for t in "ab").backward()
        optimizer.step()
    for ours, theirs in zip(trained(model).values(), trained(other).values()):
        close(ours, theirs, atol=1e-4)


def test_adapt_is_reproducible_and_starts_short_loaders_again():
    results = []
    for repeat in (1, 1, 4):
        model, loaders, heads = small_problem()
        loaders = {task: batches * repeat for task, batches in loaders.items()}
        results.append((adapt(model, loaders, heads, steps=10, lr=1e-2), trained(model)))
    for other in results[1:]:
        assert other[0] == results[0][0]
        assert all(torch.equal(p, other[1][name]) for name, p in results[0][1].items())


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
    "depth 0, 1 or 2, not 3": lambda: Router(4, 2, depth=3),
    "at least one task": lambda: Router(4, 0),
    r"\(B, ..., 4\), got \(2, 3\)": lambda: Router(4, 2)(torch.ones(2, 3)),
    "0 fine-tuned modules": lambda: WEMoE(LINEAR, [], Router(2, 1)),
    "2 fine-tuned modules and a router with 3 outputs": lambda: WEMoE(LINEAR, [LINEAR] * 2, Router(2, 3)),
    r"weights of shape \(1, 3\) for an input \(1, 2\)": lambda: WEMoE(LINEAR, [LINEAR], Fixed(torch.ones(3)))(
        torch.ones(1, 2)
    ),
    "'bias': in the pre-trained": lambda: WEMoE(LINEAR, [nn.Linear(2, 2, False)], Router(2, 1)),
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
        module(torch.ones(1, 2))


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
    arguments = ["miniature.py", "--steps", "2", "--per-class", "1", "--output", str(file)]
    states = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", arguments)
        miniature.main()
        states.append(load_file(file))
    monkeypatch.setattr(miniature, "CHECKPOINT", file)
    assert not torch.equal(miniature.load_pretrained().visual.proj, miniature.build_model().visual.proj)
    assert all(torch.equal(p, states[1][name]) for name, p in states[0].items())


# ------------------------------------------------------------------------------------------
# reproduce.py from end to end, on two tasks, with hardly any training
# ------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A function that runs reproduce.py with these arguments, small, and returns exit status and results."""
    monkeypatch.setattr(reproduce, "Training", lambda: TRAINING)
    monkeypatch.setattr(reproduce, "TEST_IMAGES", 24)

    def run(*arguments: str, output: str = "results") -> tuple[int, dict]:
        tasks = [] if "--tasks" in arguments else ["--tasks", "signs", "Digits"]
        status = reproduce.main([*tasks, "--steps", "2", "--output", str(tmp_path / output), *arguments])
        file = tmp_path / output / "miniature" / "results.json"
        return status, json.loads(file.read_text()) if file.exists() else {}

    return run


TRAINING = reproduce.Training(images=24, steps=2, batch_size=8)


def without_timings(results: dict) -> dict:
    return {**results, "methods": [{**method, "seconds": 0} for method in results["methods"]]}


def test_results_are_those_of_the_contract(small, tmp_path, capsys):
    status, results = small()
    assert status == (0 if all(claim["holds"] for claim in results["claims"]) else 1)
    assert {"suite": "miniature", "seed": 0, "tasks": ["Signs", "Digits"]}.items() <= results.items()
    assert results["device"] in ("cpu", "cuda") and results["versions"]["torch"] == torch.__version__
    assert [method["name"] for method in results["methods"]] == list(reproduce.METHODS)
    for method in results["methods"]:
        assert set(method["accuracy"]) == {"Signs", "Digits"}
        assert method["average"] == pytest.approx(sum(method["accuracy"].values()) / 2, abs=0.011)
    methods = {method["name"]: method for method in results["methods"]}
    assert methods["WEMoE"]["trainable_parameters"] == 4 * (192 * 192 + 192 + 192 * 2 + 2)
    assert methods["Individual"]["total_parameters"] == 2 * methods["Pre-trained"]["total_parameters"]
    assert [point["scaling"] for point in methods["Task Arithmetic"]["curve"]] == [i / 10 for i in range(11)]
    assert methods["Task Arithmetic"]["curve"][0]["average"] == pytest.approx(
        methods["Pre-trained"]["average"], abs=0.01
    )
    assert {"claim", "holds", "detail"} == set(results["claims"][0])
    folder = tmp_path / "results" / "miniature"
    assert {"accuracy.png", "adaptation.png", "routing.png", "tasks.png"} == {f.name for f in folder.glob("*.png")}
    printed = capsys.readouterr().out
    assert (folder / "table.md").read_text() in printed
    assert all(claim["claim"] in printed for claim in results["claims"])


def test_interrupted_it_goes_on_and_ends_with_the_same_results(small, monkeypatch):
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


def test_the_seed_decides(small):
    names = ["--methods", "individual", "WEMoE"]
    runs = [without_timings(small(*names, "--seed", seed, output=folder)[1]) for seed, folder in ("1a", "1b", "2c")]
    assert runs[0] == runs[1]
    assert runs[0]["methods"] != runs[2]["methods"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tasks", "Weather"], "unknown task 'Weather': choose among 'Scenes', 'Cars'"),
        (["--methods", "TIE"], "unknown method 'TIE': choose among 'Pre-trained', 'Individual'"),
        (["--steps", "0"], "--steps 0: at least one"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--seed", "-1"], "--seed -1: a seed lies between 0 and"),
        (["--device", "tpu9"], "--device tpu9: not usable here"),
        (["ViT-Z"], "invalid choice: 'ViT-Z'"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--output", __file__], "Not a directory"),
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
    methods = {name.replace("_", " "): {"average": value} for name, value in average.items()}
    methods["Task Arithmetic"]["curve"] = [{"average": methods["Task Arithmetic"]["average"] + 1}]
    for name in ("WEMoE", "WEMoE (0-layer)", "WEMoE (1-layer)"):
        methods.setdefault(name, {"average": 86})
    methods["WEMoE"]["adaptation"] = {"entropy": [2.0] * 5 + [1.0] * 15, "accuracy": [60.0, 80.0]}
    return methods


PAPER = dict(Individual=90.3, Task_Arithmetic=68.0, WEMoE=89.2)  # the published averages for ViT-B/32


def test_claims_hold_where_the_paper_stands_and_fall_one_by_one():
    base = {**PAPER, "Pre-trained": 48.2, "Weight Averaging": 66.5}
    claims = reproduce.check_claims(fabricated(**base))
    assert len(claims) == 7 and all(claim["holds"] for claim in claims)
    for change, fallen in [
        ({"Individual": 89.0}, {0}),
        ({"Weight Averaging": 83.0}, {1}),
        ({"Pre-trained": 69.0}, {2}),
        ({"Weight Averaging": 84.5}, {1, 3}),
        ({"WEMoE": 85.0, "WEMoE (0-layer)": 84.0}, {4}),
        ({"WEMoE (0-layer)": 87.0}, {5}),
    ]:
        claims = reproduce.check_claims(fabricated(**{**base, **change}))
        assert {i for i, claim in enumerate(claims) if not claim["holds"]} == fallen, change
    methods = fabricated(**base)
    methods["WEMoE"]["adaptation"]["accuracy"] = [60.0, 59.0]
    assert not reproduce.check_claims(methods)[-1]["holds"]
    del methods["WEMoE"], methods["Individual"]
    assert len(reproduce.check_claims(methods)) == 1


# ------------------------------------------------------------------------------------------
# README
# ------------------------------------------------------------------------------------------


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)


def test_the_examples_in_readme_run_as_written():
    assert (examples := code_blocks("python"))
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})


def test_wemoe_needs_nothing_but_torch():
    imports = re.findall(r"^(?:import|from) (\w+)", (HERE / "wemoe.py").read_text(), re.MULTILINE)
    assert set(imports) - set(sys.stdlib_module_names) == {"torch"}
