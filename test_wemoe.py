"""What must be true of wemoe.py, in the order of the file: its specification. Needs no network and no GPU.

Properties come first: hypothesis draws shapes, numbers of tasks, router depths and seeds. Float32 tolerances: weights
and activations are of order one and sums have some dozens of terms, so that rounding (6e-8 relative) stays below ATOL.
"""

import copy
import functools
import io
import math
import os
import pickle
import re
import sys
from concurrent.futures import ThreadPoolExecutor
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

settings.register_profile("default", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

seeds = st.integers(0, 2**16)
task_numbers = st.integers(1, 4)
batch_sizes = st.integers(1, 4)
axes = st.lists(st.integers(1, 3), max_size=2)  # token or spatial axes


# ---- Small modules, and the equation as a loop -----------------------------------------------------------------------


class Gated(nn.Module):
    """An MLP as Llama's: down(silu(gate x) * up x)."""

    def __init__(self, size: int):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(size, size, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


MLPS = {
    "plain": lambda d: nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d)),
    "normed": lambda d: nn.Sequential(nn.Linear(d, d, bias=False), nn.LayerNorm(d), nn.ReLU(True), nn.Linear(d, d)),
    "gated": Gated,
    "linear": lambda d: nn.Linear(d, d),
    "norm": nn.LayerNorm,
}
kinds = st.sampled_from(sorted(MLPS))


def randomised(module: nn.Module, scale: float = 0.5) -> nn.Module:
    """The module with normally distributed parameters, biases and norms included."""
    for p in module.parameters():
        nn.init.normal_(p, std=scale)
    return module


def several(make, tasks: int = 2, seed: int = 0) -> tuple[nn.Module, list[nn.Module]]:
    """A "pre-trained" module and as many "fine-tuned" ones."""
    torch.manual_seed(seed)
    pretrained, *finetuned = (randomised(make()) for _ in range(tasks + 1))
    return pretrained, finetuned


def family(kind: str, size: int, tasks: int, seed: int = 0) -> tuple[nn.Module, list[nn.Module]]:
    return several(lambda: MLPS[kind](size), tasks, seed)


def varied(pretrained: nn.Module, chosen, tasks: int = 2) -> list[nn.Module]:
    """Fine-tuned models that differ from the pre-trained one in the modules with the chosen names."""
    finetuned = [copy.deepcopy(pretrained) for _ in range(tasks)]
    for model in finetuned:
        for name, module in model.named_modules():
            if chosen(name):
                randomised(module, 0.3)
    return finetuned


class Made(nn.Module):
    """Layers, parameters and buffers by name, and what a forward pass makes of them and its arguments."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.register_buffer(name, part) if type(part) is Tensor else setattr(self, name, part)

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


class Fixed(nn.Module):
    """A router whose weights are given: (T,) for all samples, or (B, T)."""

    def __init__(self, lam: Tensor):
        super().__init__()
        self.lam = nn.Parameter(lam)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.lam.expand(len(x), self.lam.shape[-1]).clone()  # not one λ for all, as that of Router(depth=0)


def expert(t: int, tasks: int = 2) -> Fixed:
    """The router that always asks for task t alone."""
    return Fixed(torch.eye(tasks)[t])


def routed(model: nn.Module) -> dict[str, WEMoE]:
    return {name: module for name, module in model.named_modules() if isinstance(module, WEMoE)}


def set_router(model: nn.Module, router: nn.Module) -> None:
    for module in routed(model).values():
        module.router = router


def literal(pretrained: nn.Module, finetuned: list[nn.Module], lam: Tensor, x: Tensor) -> Tensor:
    """The equation, word by word: for every sample its own θ_0 + Σ_t λ_t τ_t, through which it runs alone."""
    named = {**dict(pretrained.named_parameters()), **dict(pretrained.named_buffers())}  # a tied one by one name
    theta_0 = {name: p.detach() for name, p in named.items() if p.is_floating_point()}
    thetas = [module.state_dict() for module in finetuned]
    outputs = []
    for b in range(len(x)):
        theta = {k: p + sum(lam[b, t] * (thetas[t][k] - p) for t in range(len(thetas))) for k, p in theta_0.items()}
        theta |= {name: p.detach() for name, p in theta.items() if "running" in name}  # torch does not differentiate
        outputs.append(functional_call(copy.deepcopy(pretrained), theta, (x[b : b + 1],)))
    return torch.cat(outputs)


def close(a: object, b: object, atol: float = ATOL, rtol: float = ATOL) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


same = functools.partial(close, atol=0, rtol=0)


def gradients(y: Tensor, *sources: Tensor | nn.Module) -> list[Tensor]:
    """Those of a sum with fixed weights of what y holds, in tensors and in whatever a module trains."""
    tensors = [p for s in sources for p in (s.parameters() if isinstance(s, nn.Module) else [s]) if p.requires_grad]
    return list(torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), tensors))


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def fails(reason: str) -> pytest.MarkDecorator:
    """A defect that is known: the test says when it is gone."""
    return pytest.mark.xfail(strict=True, reason=reason)


@pytest.fixture(params=[None, MergedLayer], ids=["tiles", "samples"])
def layer(request):
    """What linear layers become; data/test_baselines.py runs the tests that ask for it with forms of its own, too."""
    return request.param


torch.set_num_threads(1)  # small tensors gain nothing from more, and forks do not survive them
torch.ones(1, requires_grad=True).sum().backward()  # nor do they survive an autograd engine that torch.compile starts
torch.manual_seed(0)
X, Y = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
LAM = torch.rand(3, 2) / 2  # merged variances stay positive


def test_wemoe_needs_nothing_but_torch():
    imports = re.findall(r"^(?:import|from) (\w+)", Path(wemoe.__file__).read_text(), re.MULTILINE)
    assert set(imports) - set(sys.stdlib_module_names) == {"torch"}


# ---- Task vectors ----------------------------------------------------------------------------------------------------


@given(kinds, st.lists(st.floats(-2, 2), min_size=1, max_size=4), seeds)
def test_task_arithmetic_is_its_formula_and_leaves_its_inputs_alone(kind, scaling, seed):
    pretrained, finetuned = family(kind, 4, len(scaling), seed)
    vectors = [task_vector(pretrained, model) for model in finetuned]
    before = copy.deepcopy((pretrained.state_dict(), vectors))
    merged = task_arithmetic(pretrained, vectors, scaling)
    for name, p in pretrained.state_dict().items():
        close(merged[name], p + sum(lam * (model.state_dict()[name] - p) for lam, model in zip(scaling, finetuned)))
        assert merged[name].data_ptr() != p.data_ptr()
    same((pretrained.state_dict(), vectors), before)


def test_task_arithmetic_by_hand():
    vectors = [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 2.0])}]
    theta_0 = {"w": torch.tensor([10.0, 20.0]), "steps": torch.tensor(7)}
    close(task_arithmetic(theta_0, vectors), {"w": torch.tensor([10.3, 20.6]), "steps": torch.tensor(7)})
    assert task_arithmetic(theta_0, iter(vectors), 0.5)["w"].tolist() == [10.5, 21.0]
    assert task_arithmetic(theta_0, dict(zip("ab", vectors)), torch.tensor([3, -1]))["w"].tolist() == [13.0, 18.0]


def test_task_vectors_skip_counters_and_what_is_equal_and_keep_the_pretrained_dtype():
    pretrained, finetuned = nn.BatchNorm1d(3), nn.BatchNorm1d(3).double()
    finetuned(torch.randn(8, 3).double())
    tau = task_vector(pretrained, finetuned)
    assert {name: p.dtype for name, p in tau.items()} == dict.fromkeys(
        ["weight", "bias", "running_mean", "running_var"], torch.float32
    )
    merged = task_arithmetic(pretrained, [tau], 1.0)
    assert merged["num_batches_tracked"] == 0
    close(merged["running_mean"], finetuned.running_mean.float())
    equal = {"ids": torch.arange(2), "mask": torch.ones(2, dtype=torch.bool)}
    assert list(task_vector(weights(**equal), weights(**equal | {"ids": torch.arange(2.0)}))) == ["w"]


def test_sums_of_bfloat16_models_are_accumulated_in_float32():
    theta_0 = {"w": torch.ones(1, dtype=torch.bfloat16)}
    tau = {"w": torch.full((1,), 2.0**-9, dtype=torch.bfloat16)}  # too small to move 1 in bfloat16, one at a time
    assert task_arithmetic(theta_0, [tau] * 8, 1.0)["w"].item() == 1 + 2**-6


# ---- The router ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2), st.integers(1, 6), task_numbers, batch_sizes, axes, st.floats(-1, 1), seeds)
def test_router_is_its_formula_averaged_over_tokens(depth, size, tasks, batch, tokens, init, seed):
    torch.manual_seed(seed)
    router, h = Router(size, tasks, depth, init), torch.randn(batch, *tokens, size)
    p = list(router.parameters())
    output, hidden_layer = [(tasks, size), (tasks,)], [(size, size), (size,)]
    assert [q.shape for q in p] == {0: output[1:], 1: output, 2: hidden_layer + output}[depth]
    assert torch.equal(p[-1], torch.full((tasks,), init))
    if depth == 2:
        assert not p[1].any()
    randomised(router)
    for b in range(batch):
        rows = h[b].reshape(-1, size)
        hidden = torch.relu(rows @ p[0].T + p[1]) if depth == 2 else rows
        lam = hidden @ p[-2].T + p[-1] if depth else p[0].expand(len(rows), -1)
        close(router(h)[b], lam.mean(0))


@given(st.integers(1, 2), batch_sizes, st.integers(1, 6), seeds)
def test_a_masked_router_sees_the_other_tokens_alone(depth, batch, tokens, seed):
    torch.manual_seed(seed)
    router, h = randomised(Router(3, 2, depth)), torch.randn(batch, tokens, 3)
    mask = torch.rand(batch, tokens) < 0.5
    mask[:, torch.randint(tokens, ())] = True
    lam = router(h.masked_fill(~mask[..., None], math.nan), mask=mask.long())
    close(lam, torch.cat([router(h[b : b + 1, mask[b]]) for b in range(batch)]))


def test_routers_start_small():
    torch.manual_seed(0)
    assert all(0.008 < w.std() < 0.012 for w in Router(64, 64, 2).parameters() if w.dim() == 2)


# ---- The routed module -----------------------------------------------------------------------------------------------


@given(
    st.lists(kinds, min_size=1, max_size=3),
    st.integers(1, 5),
    task_numbers,
    batch_sizes,
    axes,
    st.integers(0, 2),
    st.sampled_from([None, MergedLayer]),
    seeds,
)
def test_output_and_gradients_are_the_equation_evaluated_sample_by_sample(
    parts, size, tasks, batch, tokens, depth, layer, seed
):
    def make() -> nn.Module:
        modules = [MLPS[kind](size) for kind in parts]
        return nn.Sequential(*modules).double() if len(parts) > 1 else modules[0].double()

    pretrained, finetuned = several(make, tasks, seed)
    module = WEMoE(pretrained, finetuned, randomised(Router(size, tasks, depth).double(), 0.3), layer=layer)
    x = torch.randn(batch, *tokens, size).double().requires_grad_()
    y, expected = module(x), literal(pretrained, finetuned, module.router(x), x)
    close(y, expected)
    close(gradients(y, x, module.router), gradients(expected, x, module.router))
    same(module(x), y)


@given(kinds, task_numbers, batch_sizes, axes, st.floats(-1, 1), seeds)
def test_one_hot_zero_and_constant_routers(kind, tasks, batch, tokens, lam, seed):
    pretrained, finetuned = family(kind, 4, tasks, seed)
    x = torch.randn(batch, *tokens, 4)
    for t in range(tasks):
        close(WEMoE(pretrained, finetuned, expert(t, tasks))(x), finetuned[t](x))
    close(WEMoE(pretrained, finetuned, Fixed(torch.zeros(tasks)))(x), pretrained(x))
    merged = task_arithmetic(pretrained, [task_vector(pretrained, model) for model in finetuned], lam)
    close(WEMoE(pretrained, finetuned, Router(4, tasks, 0, lam))(x), functional_call(pretrained, merged, (x,)))


class Normed(nn.Module):
    """Batch normalisation, tied weights, a shared submodule, a frozen, an unused and an adapted parameter."""

    def __init__(self, size: int = 4):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(size, size), nn.Linear(size, size), nn.BatchNorm1d(size)
        self.down.weight = self.up.weight
        self.again = self.up
        self.a, self.b = nn.Parameter(torch.randn(size, 2)), nn.Parameter(torch.randn(2, size))  # as LoRA's
        self.unused = nn.Parameter(torch.zeros(3))
        self.up.bias.requires_grad_(False)
        self.register_buffer("position_ids", torch.arange(size))
        self.norm.running_var.uniform_(0.5, 2), self.norm.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, self.position_ids]
        return self.down(self.again(self.norm(self.up(x)))) + x @ self.a @ self.b


def tied() -> Made:
    module = Made(lambda self, x: self.b(torch.tanh(self.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    module.b.weight = module.a.weight
    return module


# Layers of every kind: those that hold weights by themselves, and those whose weights are computed.
LAYERS = {
    "tied": tied,
    "normed": Normed,
    "normed, evaluated": lambda: Normed().eval(),
    "a buffer that is trained": lambda: Made(
        lambda self, x: self.fc(x) * self.scale, fc=nn.Linear(4, 4), scale=torch.randn(4)
    ),
    "convolution": lambda: nn.Sequential(nn.Conv1d(5, 4, 3), nn.GroupNorm(2, 4), nn.Conv1d(4, 2, 1)),
    "activation": lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.RMSNorm(4)),
    "dropout that is off": lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(1.0).eval(), nn.LayerNorm(4)),
    "parametrised inside": lambda: Made(
        lambda self, x: self.bent(x) * self.scale,
        bent=nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        scale=nn.Parameter(torch.randn(4)),
    ),
    "weight_norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
    "orthogonal": lambda: nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))),
    "spectral_norm": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4))).eval(),  # by a hook
    "slashes": lambda: nn.ModuleDict({"mlp/x": nn.Linear(4, 4)})["mlp/x"],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_of_every_kind_are_merged_before_anything_is_computed_from_them(kind, layer):
    torch.manual_seed(0)
    pretrained, *finetuned = (LAYERS[kind]() for _ in range(3))
    for router in (Fixed(LAM.clone()), Router(4, 2, 0)):  # each sample its own λ; one for all, merged once
        module = WEMoE(pretrained, finetuned, router, layer=layer)
        before, modes = copy.deepcopy(module.state_dict()), [part.training for part in module.modules()]
        y, expected = module(X), literal(copy.deepcopy(pretrained).eval(), finetuned, router(X), X)
        close(y, expected, 1e-4)
        close(gradients(y, router), gradients(expected, router), 1e-2)
        same(module.state_dict(), before)  # no statistics of one sample
        assert [part.training for part in module.modules()] == modes
        assert module.training == module.pretrained.training == pretrained.training


def test_tiles_of_rows_and_samples_cover_everything():
    pretrained, *finetuned = (nn.Linear(100_000, 2).double() for _ in range(2))  # a tile holds one row, 16 samples
    module, x = WEMoE(pretrained, finetuned, Fixed(torch.rand(17, 1).double())), torch.randn(17, 1, 100_000).double()
    x.requires_grad_()
    y, expected = module(x), literal(pretrained, finetuned, module.router(x), x)
    close([y, *gradients(y, x, module)], [expected, *gradients(expected, x, module)])


@pytest.mark.parametrize("kind", ["plain", "gated", "attention"])
def test_merged_weights_are_not_kept_for_the_backward_pass(kind):
    makes = MLPS | {"attention": functools.partial(nn.MultiheadAttention, num_heads=2, batch_first=True)}
    models, x, kept = [makes[kind](32) for _ in range(3)], torch.randn(16, 2, 32, requires_grad=True), {}
    module = WEMoE(models[0], models[1:], Router(32, 2))

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = module(x, x, x)[0] if kind == "attention" else module(x)
    for p in module.parameters():
        kept.pop(p.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) < 16 * sum(p.nbytes for p in models[0].parameters()) / 2
    assert all(gradient.any() for gradient in gradients(y, module))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_attention_with_its_further_arguments_and_outputs(training, batch):
    pretrained, finetuned = several(lambda: nn.MultiheadAttention(4, 2, batch_first=True).train(training))
    q, k = torch.randn(batch, 3, 4), torch.randn(batch, 5, 4)
    mask, padding = torch.ones(3, 5, dtype=torch.bool).triu(1), torch.zeros(batch, 5, dtype=torch.bool)
    padding[:, 4:] = True
    module = WEMoE(pretrained, finetuned, expert(1))
    for grad in (True, False):  # without gradients, attention takes a shorter way
        with torch.set_grad_enabled(grad):
            close(*(m(q, k, value=k, attn_mask=mask, key_padding_mask=padding) for m in (module, finetuned[1])))
            assert module(q, k, k, need_weights=False)[1] is None


def test_the_input_may_be_given_by_name_and_outputs_may_be_nested(layer):
    def run(self, hidden_states, scale=1.0, bias=None):
        return {"out": self.fc(hidden_states) * scale + bias, "pair": (None, hidden_states.mean(-1)), "n": 3}

    pretrained, finetuned = several(lambda: Made(run, fc=nn.Linear(4, 4)))
    module = WEMoE(pretrained, finetuned, expert(1), layer=layer)
    close(*(m(hidden_states=X, scale=2.0, bias=torch.ones(4)) for m in (module, finetuned[1])))


def test_dropout_is_the_same_when_weights_are_merged_again():
    pretrained, finetuned = several(lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.LayerNorm(8)))
    module, found = WEMoE(pretrained, finetuned, Fixed(LAM.clone()), layer=MergedLayer), []
    for run in (module, lambda x: literal(pretrained, finetuned, module.router(x), x)):
        torch.manual_seed(1)
        y = run(X)
        torch.manual_seed(2)
        found.append([y, *gradients(y, module)])
    close(*found, atol=1e-3)


def selecting(self: Made, h: Tensor) -> Tensor:
    """A mixture of experts' way: some rows of some samples."""
    rows, chosen = h.flatten(0, 1), (h.flatten(0, 1)[:, 0] > 0).nonzero()[:, 0]
    return rows.index_add(0, chosen, self.fc(rows[chosen])).view_as(h)


UNUSUAL = {  # ways to use a layer `fc` that its merged form cannot follow
    "sees tokens, not samples": lambda self, h: self.fc(h.flatten(0, 1)).view_as(h),
    "is read, and does not run": lambda self, h: F.linear(h, self.fc.weight, self.fc.bias),
    "is read and runs, as in a tied autoencoder": lambda self, h: F.linear(self.fc(h), self.fc.weight.T),
    "sees some rows": selecting,
}


@pytest.mark.parametrize("use", UNUSUAL)
def test_a_module_that_is_not_made_of_layers_is_refused_or_right_and_runs_whole(use):
    pretrained, finetuned = several(lambda: Made(UNUSUAL[use], fc=nn.Linear(4, 4)))
    module = WEMoE(pretrained, finetuned, expert(1))
    try:
        y = module(X)
    except (ValueError, RuntimeError) as error:
        assert "layer=MergedLayer" in str(error)
    else:  # what is read from outside is NaN
        assert y.isnan().all() if "autoencoder" in use else torch.allclose(y, finetuned[1](X), atol=1e-4)
    assert module.pretrained.fc.weight.dtype == torch.float32
    close(WEMoE(pretrained, finetuned, expert(1), layer=MergedLayer)(X), finetuned[1](X), 1e-4)


def test_a_constant_router_merges_once_for_all_samples():
    ran = []
    make = lambda: Made(lambda self, x: ran.append(1) or x * self.w, w=nn.Parameter(torch.ones(4)))  # noqa: E731
    WEMoE(make(), [make(), make()], Router(4, 2, 0))(X)
    assert len(ran) == 1


# ---- Degenerate task vectors, types, copies --------------------------------------------------------------------------

DEGENERATE = {
    "zero": lambda p, q: p,
    "constant": lambda p, q: p + 0.5,
    "identical": lambda p, q: q,
    "tiny": lambda p, q: p * (1 + 1e-30) + 1e-42,
    "ill-conditioned": lambda p, q: p + torch.logspace(-37, 6, p.numel()).view_as(p),
}


def degenerate(name: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    pretrained, (one,) = family("plain", 6, 1)
    states = zip(pretrained.state_dict().items(), one.state_dict().values())
    return pretrained, [{key: DEGENERATE[name](p, q) for (key, p), q in states}] * 3


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_task_vectors_give_finite_models(name, layer):
    pretrained, finetuned = degenerate(name)
    vectors = [task_vector(pretrained, state) for state in finetuned]
    assert all(p.isfinite().all() for p in task_arithmetic(pretrained, vectors).values())
    module = WEMoE(pretrained, finetuned, Router(6, 3), layer=layer)
    y = module(1e-3 * torch.randn(4, 2, 6))
    assert all(result.isfinite().all() for result in (y, *gradients(y, module)))


@pytest.mark.parametrize("kind", ["plain", "normed", "gated"])
def test_gradients_against_finite_differences(layer, kind):
    module = WEMoE(*family(kind, 4, 2), Fixed(torch.zeros(3, 2)), layer=layer).double()
    x, lam = torch.randn(3, 2, 4).double().requires_grad_(), torch.randn(3, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, lam: functional_call(module, {"router.lam": lam}, (x,)), (x, lam))


def plain(layer=None, seed: int = 0) -> tuple[WEMoE, Tensor]:
    return WEMoE(*family("plain", 8, 3, seed), randomised(Router(8, 3), 0.2), layer=layer), torch.randn(4, 5, 8)


def test_copies_and_saved_modules_are_equal(layer):
    module, x = plain(layer)
    module(x).sum().backward()  # λ of a pass does not stay behind
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    fresh, _ = plain(layer, seed=1)
    fresh.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False), fresh):
        assert torch.equal(other(x), module(x))
        assert trained(other).keys() == {f"router.{name}" for name, _ in module.router.named_parameters()}


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("batch", [1, 4])
def test_other_types(layer, dtype, atol, batch):
    module, x = plain(layer)
    converted, x = copy.deepcopy(module).to(dtype), x[:batch]
    y = converted(x.to(dtype))
    assert y.dtype == dtype
    close(y.float(), module(x), atol, rtol=0.05)
    y.float().square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in converted.router.parameters())


@pytest.mark.parametrize("kind", ["plain", "normed", "gated"])
def test_bfloat16_autocast_gives_the_type_of_a_dense_module_and_nearly_the_same(kind, layer):
    pretrained, finetuned = family(kind, 8, 2)
    module, x = WEMoE(pretrained, finetuned, expert(0), layer=layer), torch.randn(4, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y, dense = module(x), finetuned[0](x)
    assert y.dtype == dense.dtype
    close(y.float(), module(x), 0.1, rtol=0.05)
    ours, theirs = (torch.autograd.grad(out.float().square().mean(), module.router.lam)[0] for out in (y, module(x)))
    close(ours, theirs, 0.05, rtol=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_what_the_cpu_gives(layer):
    module, x = plain(layer)
    close(module.cuda()(x.cuda()).cpu(), module.cpu()(x), 1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4)])
@pytest.mark.parametrize("kind", MLPS)
def test_no_samples_or_no_tokens_give_none(kind, shape, layer):
    pretrained, finetuned = family(kind, 4, 2)
    for router in (Router(4, 2, 0), Router(4, 2, 1), Router(4, 2), Fixed(LAM)):
        y = WEMoE(pretrained, finetuned, router, layer=layer)(torch.zeros(shape))
        assert y.shape == pretrained(torch.zeros(shape)).shape


def test_the_wrapped_module_stays_in_reach():
    module, _ = plain()
    assert getattr(module, "0") is module.pretrained[0] and isinstance(module.pretrained[0], nn.Linear)
    assert module.pretrained[0].weight.dtype == torch.float32  # as libraries ask
    assert wrapped(LINEAR4).in_features == 4


def test_a_router_may_return_its_own_parameter():
    router = Made(lambda self, x: self.lam, lam=nn.Parameter(LAM.clone()))
    one, other = (WEMoE(*family("plain", 4, 2), r) for r in (router, Fixed(LAM.clone())))
    close(one(X), other(X))
    close(gradients(one(X), one), gradients(other(X), other), 1e-3)
    with torch.no_grad():
        close(one(X), other(X))


# ---- In other people's hands: hooks, kept tensors, recomputation, compilers, replicas, threads -----------------------


class Keeping(nn.Module):
    """Two layers, the second one perhaps in a checkpoint; keeps what it has seen, as modules that are looked at do."""

    def __init__(self, reentrant: bool | None = None):
        super().__init__()
        self.a, self.b, self.norm, self.reentrant = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4), reentrant
        self.last, self.calls = None, 0
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("kept", None)

    def second(self, h: Tensor) -> Tensor:
        return self.norm(self.b(h))

    def forward(self, h: Tensor) -> Tensor:
        self.last = h = torch.tanh(self.a(h))
        self.calls, self.kept = self.calls + 1, h.detach()
        self.seen += len(h)
        return self.second(h) if self.reentrant is None else checkpoint(self.second, h, use_reentrant=self.reentrant)


def keeping(reentrant: bool | None = None, **options) -> WEMoE:
    return WEMoE(*several(lambda: Keeping(reentrant)), randomised(Router(4, 2), 0.3), **options)


def normed() -> WEMoE:
    return WEMoE(*family("normed", 4, 2), randomised(Router(4, 2), 0.3))


@pytest.mark.parametrize("place", ["0", "1"])
def test_hooks_see_what_those_of_a_dense_module_see_before_and_after_it_is_routed(place):
    pretrained, seen = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)), []
    pretrained.get_submodule(place).register_forward_hook(lambda *args: seen.append(args[-1]))
    module = WEMoE(pretrained, [copy.deepcopy(pretrained) for _ in range(2)], Router(4, 2))
    y = module(X)
    close(y, pretrained(X))  # nothing to add
    close(seen[0], seen[-1])
    y.sum().backward()
    assert len(seen) == 2
    after = module.pretrained.get_submodule(place)
    after.register_forward_pre_hook(lambda module, inputs: (0 * inputs[0],))
    after.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0]))
    close(module(X).sum(), module(Y).sum())
    module(X).sum().backward()
    assert seen[-1].shape == X.shape


def test_what_a_module_keeps_can_be_read_and_the_module_copied_afterwards():
    pretrained, finetuned = several(Keeping)
    module = WEMoE(pretrained, finetuned, Fixed(torch.zeros(2)))
    for once in (module, pretrained):
        once(Y), once(X)
    close(module.pretrained.kept, pretrained.kept)  # a buffer that was None
    assert module.last is module.pretrained.last and module.calls == 2 and module.pretrained.seen == 6
    close(module.last, pretrained.last)
    with torch.no_grad():
        y = module(X)  # nor can a dense module be copied with a tensor in it that has a gradient function
    assert torch.equal(copy.deepcopy(module)(X), y) and pickle.loads(pickle.dumps(module)).calls == 3


@fails("only the last sample's is kept")
def test_what_a_layer_with_weights_keeps_is_that_of_all_samples():
    make = lambda: Made(lambda self, h: vars(self).update(last=h) or h * self.w, w=nn.Parameter(torch.ones(4)))  # noqa: E731
    module = WEMoE(make(), [make(), make()], Router(4, 2))
    module(X)
    assert torch.equal(module.pretrained.last, X)


@pytest.mark.parametrize("outer", [None, True, False])
@pytest.mark.parametrize("inner", [None, False])
def test_recomputation_changes_no_gradient(inner, outer, layer):
    """In the module, around it, in both; and of two passes before one backward pass, each has its own λ."""
    plain, module, found = keeping(layer=layer), keeping(inner, layer=layer), []
    run = module if outer is None else functools.partial(checkpoint, module, use_reentrant=outer)
    for m, call in ((module, run), (plain, plain)):
        x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
        (call(x).square().sum() + call(y).sin().sum()).backward()
        found.append([x.grad, y.grad, *(p.grad for p in m.router.parameters())])
    close(*found, atol=1e-3)


@pytest.mark.parametrize("layer", [None, pytest.param(MergedLayer, marks=fails("recomputed with θ_0"))])
def test_reentrant_checkpoints_inside_are_refused(layer):
    with torch.no_grad():
        close(keeping(True, layer=layer)(X), keeping()(X))
    with pytest.raises((ValueError, RuntimeError), match="use_reentrant=False"):
        keeping(True, layer=layer)(X).sum().backward()


@pytest.mark.filterwarnings("ignore")
def test_compiled_it_gives_the_same():
    """By all of torch.compile but the generation of code, which needs a compiler."""
    module = normed()
    compiled = torch.compile(module, backend="aot_eager")
    for x in (X, Y):
        y, expected = compiled(x), module(x)
        close(y, expected)
        close(gradients(y, module), gradients(expected, module), 1e-3)
    torch._dynamo.reset()


def test_exported_it_gives_the_same():
    module = normed().eval()
    close(torch.export.export(module, (X,), strict=False).module()(Y), module(Y))


def replica(module: nn.Module) -> nn.Module:
    """As torch.nn.parallel.replicate makes them: parameters become plain tensors."""
    twin = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        twin._modules[name] = child and replica(child)
    for name, p in module._parameters.items():
        setattr(twin, name, p if p is None else p * 1)
    return twin


@pytest.mark.parametrize("replicate", [lambda module: module, replica])
@pytest.mark.parametrize("make", [normed, keeping])
def test_replicas_and_threads_keep_out_of_each_others_way(make, replicate):
    """nn.DataParallel gives each device a replica and a thread; a server's threads share one model."""
    module, inputs = make(), [torch.randn(1 + i % 3, 5, 4) for i in range(20)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda x: gradients(replicate(module)(x), module), inputs))
    close(found, [gradients(module(x), module) for x in inputs], 1e-3)


def test_distributed_data_parallel_adapts_alike(tmp_path):
    (model, loaders, heads), (other, *_) = small_problem(), small_problem()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        adapt(nn.parallel.DistributedDataParallel(model), loaders, heads, steps=3, lr=1e-2)
    finally:
        torch.distributed.destroy_process_group()
    adapt(other, loaders, heads, steps=3, lr=1e-2)
    close(trained(model), trained(other))


# ---- Upscaling -------------------------------------------------------------------------------------------------------


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


@given(st.floats(-1, 1), task_numbers, st.integers(0, 2), seeds)
def test_upscaled_models_start_from_task_arithmetic_and_everything_else_stays_there(lam, tasks, depth, seed):
    torch.manual_seed(seed)
    pretrained, *finetuned = (Transformer() for _ in range(tasks + 1))
    merged = task_arithmetic(pretrained, [task_vector(pretrained, model) for model in finetuned], lam)
    before = copy.deepcopy([model.state_dict() for model in (pretrained, *finetuned)])
    model = upscale(pretrained, dict(enumerate(finetuned)), init_lambda=lam, router_depth=depth)
    for name, p in model.named_parameters():
        assert p.requires_grad == (".router." in name)
        if ".router." not in name and ".mlp." not in name:
            close(p, merged[name])
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, pretrained, pretrained.blocks[0]["mlp"])]
    assert sizes[0] == sizes[1] + 2 * tasks * sizes[2] + sum(p.numel() for p in trained(model).values())
    for module in routed(model).values():
        assert module.router.depth == depth and (list(module.router.parameters())[-1] == lam).all()
    set_router(model, Fixed(torch.full((tasks,), lam)))
    x = torch.randn(2, 3, 3)
    close(model(x), functional_call(pretrained, merged, (x,)), 1e-4)
    same([m.state_dict() for m in (pretrained, *finetuned)], before)


def test_number_of_trainable_parameters_is_the_published_one():
    """ViT-B/32: 12 routers of D = 768. Published in shared/facts, after FusionBench's documentation."""
    for tasks, millions in enumerate([7.10, 7.11, 7.11, 7.12, 7.13, 7.14, 7.15, 7.16], 1):
        assert round(12 * sum(p.numel() for p in Router(768, tasks).parameters()) / 1e6, 2) == millions


def test_models_come_in_any_container_and_modules_are_chosen_by_any_predicate():
    pretrained, (a, b) = family("plain", 4, 2)
    named, outputs = {"a": a, "b": b}, []
    for models in ([a, b], iter([a, b]), named, nn.ModuleDict(named), [a.state_dict(), b.state_dict()]):
        torch.manual_seed(0)
        model = upscale(pretrained, models, modules=lambda _, module: isinstance(module, nn.Linear))
        outputs.append(model(X))
        set_router(model, expert(1))
        close(model(X), b(X))
    same(outputs[1:], outputs[:1] * 4)


SIZES = dict(hidden_size=8, intermediate_size=16, num_attention_heads=2)


def hugging_face(model: type[nn.Module], **options) -> nn.Module:
    sizes = dict(num_hidden_layers=2, bos_token_id=0, eos_token_id=19, **SIZES)
    return model(model.config_class(**{**sizes, **options})).eval()


VISION, TEXT = dict(image_size=8, patch_size=4), dict(vocab_size=20, max_position_embeddings=32)
IMAGES, TOKENS = torch.randn(2, 3, 8, 8), torch.randint(3, 19, (2, 5))
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
PADDED = dict(input_ids=TOKENS, attention_mask=MASK)
T5 = dict(d_model=8, d_ff=16, d_kv=4, num_heads=2, vocab_size=20, decoder_start_token_id=0)
BLOCKS = r"layer\.\d+\.(intermediate|output)$"
# A small model, a run of it, and choices of modules with their number, or with the names of what None finds.
LIBRARIES = {
    "open_clip": (
        lambda: open_clip.CLIP(4, dict(image_size=8, patch_size=4, width=8, layers=2, head_width=4),
                               dict(context_length=5, vocab_size=20, width=8, heads=2, layers=1)),
        lambda model: torch.cat([model.encode_image(IMAGES), model.encode_text(TOKENS)]),
        {None: ["transformer.resblocks.0.mlp", "visual.transformer.resblocks.0.mlp",
                "visual.transformer.resblocks.1.mlp"], r"(mlp|attn)$": 6, r"resblocks\.\d+$": 3},
    ),
    "timm": (
        lambda: timm.models.VisionTransformer(8, 4, embed_dim=8, depth=2, num_heads=2, num_classes=3),
        lambda model: model(IMAGES),
        {None: ["blocks.0.mlp", "blocks.1.mlp"], r"(mlp|\.attn)$": 4, r"blocks\.\d+$": 2},
    ),
    "torchvision": (
        lambda: torchvision.models.VisionTransformer(8, 4, 2, 2, 8, 16),
        lambda model: model(IMAGES),
        {None: ["encoder.layers.encoder_layer_0.mlp", "encoder.layers.encoder_layer_1.mlp"],
         r"(mlp|self_attention)$": 4, r"encoder_layer_\d+$": 2},
    ),
    "CLIP": (
        lambda: transformers.CLIPModel(transformers.CLIPConfig(
            text_config=dict(num_hidden_layers=1, bos_token_id=0, eos_token_id=19, **SIZES, **TEXT),
            vision_config=dict(num_hidden_layers=1, **SIZES, **VISION), projection_dim=4)),
        lambda model: model(**PADDED, pixel_values=IMAGES).logits_per_image,
        {None: ["text_model.encoder.layers.0.mlp", "vision_model.encoder.layers.0.mlp"],
         r"(mlp|self_attn)$": 4, r"layers\.\d+$": 2},
    ),
    "ViT": (
        lambda: hugging_face(transformers.ViTModel, **VISION),
        lambda model: model(IMAGES).last_hidden_state,
        {None: ["layers.0.mlp", "layers.1.mlp"], r"(mlp|attention)$": 4, r"layers\.\d+$": 2},
    ),
    "T5": (
        lambda: hugging_face(transformers.T5ForConditionalGeneration, **T5, num_hidden_layers=1, num_decoder_layers=1,
                             feed_forward_proj="gated-gelu"),
        lambda model: model(**PADDED, decoder_input_ids=TOKENS, use_cache=False).logits,
        {None: ["decoder.block.0.layer.2.DenseReluDense", "encoder.block.0.layer.1.DenseReluDense"],
         r"(DenseReluDense|Attention)$": 5, r"block\.\d+$": 2},
    ),
    "Llama": (
        lambda: hugging_face(transformers.LlamaForCausalLM, num_key_value_heads=2, **TEXT),
        lambda model: model(**PADDED, use_cache=False).logits,
        {None: ["model.layers.0.mlp", "model.layers.1.mlp"], r"(mlp|self_attn)$": 4, r"layers\.\d+$": 2},
    ),
    "BERT": (
        lambda: hugging_face(transformers.BertModel, **TEXT),
        lambda model: model(**PADDED).last_hidden_state,
        {BLOCKS: 4},
    ),
    "RoBERTa": (
        lambda: hugging_face(transformers.RobertaModel, **TEXT),
        lambda model: model(**PADDED).last_hidden_state,
        {BLOCKS: 4},
    ),
}  # fmt: skip


@pytest.mark.parametrize("library, modules", [(name, choice) for name in LIBRARIES for choice in LIBRARIES[name][2]])
def test_modules_of_the_common_libraries_are_found_and_recovered_by_one_hot_routers(library, modules):
    make, run, choices = LIBRARIES[library]
    found = choices[modules]
    torch.manual_seed(0)
    pretrained = randomised(make().eval())
    finetuned = varied(pretrained, found.__contains__ if modules is None else re.compile(modules).search)
    model = upscale(pretrained, finetuned, modules=modules)
    assert (sorted(routed(model)) if modules is None else len(routed(model))) == found
    run(model).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    before = run(pretrained)
    for t in (0, 1):
        set_router(model, expert(t))
        with torch.no_grad():
            close(run(model), run(finetuned[t]), 1e-4)
    close(run(model), run(finetuned[1]), 1e-4)
    assert not torch.allclose(run(model), before, atol=0.01)


def test_a_module_that_a_model_uses_twice_is_routed_once():
    def twice() -> Made:
        mlp = nn.Linear(4, 4)
        return Made(lambda self, x: self.again["mlp"](self.mlp(x)), mlp=mlp, again=nn.ModuleDict({"mlp": mlp}))

    pretrained, finetuned = several(twice)
    model = upscale(pretrained, finetuned)
    assert model.mlp is model.again["mlp"]
    set_router(model, expert(0))
    close(model(X), finetuned[0](X))


def test_state_that_is_no_tensor_is_kept():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"version": [1]}

        def set_extra_state(self, state):
            self.state = state

    models = [nn.Sequential(Extra(4, 4), nn.Linear(4, 4)) for _ in range(2)]
    assert upscale(models[0], models[1:], modules="1")[0].state == {"version": [1]}


# ---- Test-time adaptation --------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 12), st.sampled_from([0, 0.1, 1, 10, 1e3, 1e6]), seeds)
def test_entropy_and_its_gradient_against_float64(batch, classes, scale, seed):
    torch.manual_seed(seed)
    logits = (scale * torch.randn(batch, classes)).requires_grad_()
    exact = logits.detach().double()
    p, log_p = exact.softmax(-1), F.log_softmax(exact, -1)
    reference = -torch.special.xlogy(p, p).sum(-1)
    close(entropy(logits).double(), reference)
    gradient = -p * (log_p + reference.unsqueeze(-1))  # dH/dz_i = -p_i (log p_i + H)
    close(torch.autograd.grad(entropy(logits).sum(), logits)[0].double(), gradient, rtol=1e-4)
    information = (p * (log_p - p.mean(0).log())).nan_to_num(0).sum(-1).mean()  # the mean divergence from the mean
    close(negative_information(logits).double(), -information, 1e-4, rtol=1e-4)
    close(mean_entropy(logits).double(), reference.mean())


def test_entropy_of_half_precision_and_masked_logits():
    assert entropy(torch.zeros(1, 4, dtype=torch.float16)).dtype == torch.float32
    masked = torch.tensor([[0.0, 0.0, -math.inf], [1.0, 0.0, -math.inf]], requires_grad=True)
    assert entropy(masked)[0].item() == pytest.approx(math.log(2))
    for objective in (mean_entropy, negative_information):
        assert torch.autograd.grad(objective(masked), masked)[0].isfinite().all()


def small_problem():
    torch.manual_seed(0)
    pretrained, *finetuned = (Transformer() for _ in range(3))
    loaders = {task: [torch.randn(4, 3, 3) for _ in range(3)] for task in "ab"}
    heads = {"a": nn.Linear(5, 3).requires_grad_(False), "b": lambda features: 5 * features[:, :4]}
    return upscale(pretrained, finetuned), loaders, heads


def adam(model: nn.Module, lr: float = 1e-2) -> torch.optim.Adam:
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)


@pytest.mark.parametrize(
    "objective, groups, context",
    [
        (mean_entropy, False, torch.enable_grad),
        (mean_entropy, True, torch.no_grad),
        (negative_information, False, torch.inference_mode),
    ],
)
def test_adapt_is_adam_on_the_sum_over_tasks_with_cosine_annealing(objective, groups, context):
    """Short loaders start again, gradients may be off, and the groups of a given optimizer keep their own rates."""
    (model, loaders, heads), (other, *_) = small_problem(), small_problem()
    rates = [1e-2, 3e-3] if groups else [1e-2, 1e-2]

    def optimizer(model: nn.Module) -> torch.optim.Adam:
        routers = [block["mlp"].router for block in model.blocks]
        return torch.optim.Adam([{"params": router.parameters(), "lr": lr} for router, lr in zip(routers, rates)])

    ours, means, seen = optimizer(other), [], []
    for step in range(5):
        for group, lr in zip(ours.param_groups, rates):
            group["lr"] = lr * (1 + math.cos(math.pi * step / 5)) / 2
        ours.zero_grad()
        logits = {task: head(other(loaders[task][step % 3])) for task, head in heads.items()}
        sum(objective(z) for z in logits.values()).backward()
        ours.step()
        means.append((step + 1, {task: mean_entropy(z).item() for task, z in logits.items()}))

    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    (1000 * model(loaders["a"][0]).sum()).backward()  # gradients from before are forgotten
    options = {"optimizer": optimizer(model), "lr": 7.0} if groups else {"lr": 1e-2}
    with context():
        options |= {"objective": objective, "on_step": lambda *step: seen.append(step)}
        history = adapt(model, loaders, heads, steps=5, **options)
    close(seen, means)
    close(history, [sum(values.values()) / 2 for _, values in means])
    close(trained(model), trained(other), 1e-4)
    same({name: p for name, p in model.named_parameters() if name in frozen}, frozen)
    assert all(p.grad is None for p in model.parameters())


def test_information_keeps_adaptation_from_one_answer_to_everything():
    """Logits (2 λ_1 + λ_2 x, -λ_2 x): the first vector favours a class, the second one tells x = 1 from x = -1."""
    zeros, x = {"weight": torch.zeros(2, 1), "bias": torch.zeros(2)}, torch.tensor([[1.0], [-1.0]] * 4)
    finetuned = [zeros | {"bias": torch.tensor([2.0, 0.0])}, zeros | {"weight": torch.tensor([[1.0], [-1.0]])}]
    linear, answers = nn.Linear(1, 2), {}
    linear.load_state_dict(zeros)
    for objective in (mean_entropy, negative_information):
        model = WEMoE(linear, finetuned, Router(1, 2, 0, 0.3))
        history = adapt(model, {"a": [x]}, {"a": nn.Identity()}, steps=200, lr=0.1, objective=objective)
        assert history[-1] < 0.05 < history[0]  # sure of its answers, in both cases
        answers[objective] = model(x).argmax(-1).tolist()
    assert answers == {mean_entropy: [0] * 8, negative_information: [0, 1] * 4}


def test_adapt_goes_on_where_it_was_interrupted():
    (model, loaders, heads), (other, *_) = small_problem(), small_problem()
    history, optimizer = adapt(model, loaders, heads, steps=6, lr=1e-2), adam(other)

    def stop(step: int, _: dict) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapt(other, loaders, heads, steps=6, optimizer=optimizer, on_step=stop)
    rest = {task: batches[1:] + batches[:1] for task, batches in loaders.items()}  # 4 of 3 + 3 batches are used up
    resumed = adam(other, lr=7.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as from a file
    assert adapt(other, rest, heads, steps=6, optimizer=resumed, start=4) == history[4:]
    same(trained(model), trained(other))


def test_adapt_refuses_what_is_not_finite_and_leaves_the_routers_as_they_were():
    model, loaders, heads = small_problem()
    snapshots = [trained(model)]
    loaders["b"][2][0, 0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="task 'b' is nan at step 3 of 4"):
        adapt(model, loaders, heads, steps=4, lr=1e-2, on_step=lambda *_: snapshots.append(trained(model)))
    bad = {"a": lambda z: z + 0 * (z - z.detach()).norm(dim=-1, keepdim=True).sqrt()}  # the gradient alone is NaN
    with pytest.raises(FloatingPointError, match="The gradient is nan at step 1 of 1"):
        adapt(model, {"a": loaders["a"]}, bad, steps=1)
    same(trained(model), snapshots[-1])
    assert len(snapshots) == 3 and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("certainty", [1e-3, 1.0, 100.0])
def test_adaptation_in_half_precision_stays_finite_at_clips_logit_scale(certainty, dtype):
    """Features and logits in half precision, the scale 100, 397 classes, and features that settle every answer."""
    model = WEMoE(*family("plain", 16, 3), Router(16, 3))
    classes, before = 100 * certainty * F.normalize(torch.randn(16, 397), dim=0), trained(model)
    with torch.autocast("cpu", dtype):
        head = lambda z: F.normalize(z, dim=-1) @ classes.to(z.dtype)  # noqa: E731
        history = adapt(model, {"a": [30 * torch.randn(4, 16)]}, {"a": head}, steps=3, lr=1e-2)
    assert all(0 <= value <= math.log(397) + 1e-3 for value in history)
    assert all(p.isfinite().all() for p in trained(model).values())
    assert any(not torch.equal(p, before[name]) for name, p in trained(model).items()) or certainty == 100
    for logits in (torch.full((2, 397), 6e4, dtype=dtype), torch.eye(397, dtype=dtype)[:2] * 6e4):
        assert torch.autograd.grad(mean_entropy(logits.requires_grad_()), logits)[0].isfinite().all()


@pytest.mark.parametrize(
    "factor, more", [(1, {}), (3, {"scale": torch.tensor(3.0)}), (1, {"scale": None}), (2, {"loud": True})]
)
def test_batches_may_be_arguments_by_name_some_of_which_are_no_tensors(factor, more):
    def run(self, x: Tensor, scale: Tensor | None = None, loud: bool = False) -> Tensor:
        return self.mlp(x) * (1 if scale is None else scale) * (2 if loud else 1)

    one = upscale(*several(lambda: Made(run, mlp=nn.Linear(4, 4))))
    other = copy.deepcopy(one)
    by_name = adapt(one, {"a": [{"x": X, **more}]}, {"a": lambda z: z.mean(1)}, steps=2, lr=1e-2)
    assert by_name == adapt(other, {"a": [X]}, {"a": lambda z: factor * z.mean(1)}, steps=2, lr=1e-2)


# ---- Beside the paper's path: routing weights, constant routers merged for good --------------------------------------


def test_routing_weights_are_recorded_by_module_while_asked_for():
    models = [nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(3)]
    model = upscale(models[0], models[1:], modules="0|2")
    router = randomised(model[0].router)
    set_router(model, router)  # one for all, as E-WEMoE
    with routing_weights(model) as weights:
        model(Y), model(X[:1])
    model(X)
    close(weights, {"0": router(X[:1]).detach(), "2": router(model[1](model[0](X[:1]))).detach()})
    assert not any(lam.requires_grad for lam in weights.values())
    with frozen_routing(model) as weights:
        model(X)
        y = model(Y)
    close(weights["0"], router(X).detach())
    assert not torch.allclose(model(Y), y)
    for name, lam in weights.items():
        model[int(name)].router = Fixed(lam)
    close(model(Y), y)


@pytest.mark.parametrize("depth", [0, 2])
def test_a_hook_may_give_each_sample_another_routing_weight(depth):
    pretrained, finetuned = family("plain", 4, 2)
    module = WEMoE(pretrained, finetuned, Router(4, 2, depth))
    module.routing.register_forward_hook(lambda *_: LAM)
    close(module(X), literal(pretrained, finetuned, LAM, X), 1e-4)


@given(kinds, task_numbers, seeds)
def test_constant_routers_are_merged_for_good(kind, tasks, seed):
    pretrained, finetuned = family(kind, 4, tasks, seed)
    for part in pretrained.modules():
        part.register_forward_hook(lambda *_: None)
    module = WEMoE(pretrained, finetuned, randomised(Router(4, tasks, 0)))
    before, plain = copy.deepcopy(module.state_dict()), unload(module)
    assert [type(part) for part in plain.modules()] == [type(part) for part in pretrained.modules()]
    assert [len(part._forward_hooks) for part in plain.modules()] == [1 for _ in pretrained.modules()]
    close(plain(X), module(X), 1e-4)
    same(module.state_dict(), before)


@pytest.mark.parametrize("make", [Transformer, Normed, tied, LAYERS["parametrised inside"], LAYERS["weight_norm"]])
def test_models_of_any_layers_are_merged_for_good(make):
    torch.manual_seed(0)
    models, x = [make().eval() for _ in range(3)], torch.randn(2, 5, 3) if make is Transformer else X
    model = upscale(models[0], models[1:], router_depth=0, modules=lambda name, _: name == "" or "blocks" in name)
    plain = unload(model)
    close(plain(x), model(x), 1e-4)
    assert plain.state_dict().keys() == models[0].state_dict().keys()
    assert not any(isinstance(p, nn.Parameter) for p in plain.buffers())


# ---- Text: padding, masks, generation --------------------------------------------------------------------------------

TOWERS = {
    "BERT": (LIBRARIES["BERT"][0], BLOCKS),
    "RoBERTa": (LIBRARIES["RoBERTa"][0], BLOCKS),
    "T5": (lambda: hugging_face(transformers.T5EncoderModel, **T5), None),
    "CLIP": (lambda: hugging_face(transformers.CLIPTextModel, **TEXT), None),
}
DECODERS = {
    "Llama": (LIBRARIES["Llama"][0], None),
    "GPT-2": (lambda: hugging_face(transformers.GPT2LMHeadModel, vocab_size=20, n_positions=32), None),
    "T5": (LIBRARIES["T5"][0], None),
    "Llama's blocks": (LIBRARIES["Llama"][0], r"layers\.\d+$"),
    "Llama in a module": (
        lambda: Made(lambda self, ids: self.inner(ids).logits, inner=LIBRARIES["Llama"][0]()).eval(),
        None,
    ),
}


def routed_text(make, modules: str | None = None) -> nn.Module:
    pretrained, finetuned = several(make)
    model = upscale(pretrained, finetuned, modules=modules)
    for module in routed(model).values():
        randomised(module.router)
    return model


@pytest.mark.parametrize("tower", TOWERS)
def test_padding_changes_no_output(tower):
    model = routed_text(*TOWERS[tower])
    with torch.no_grad():
        blind = model(input_ids=TOKENS).last_hidden_state
        expected = model(input_ids=TOKENS[:1, :3], attention_mask=MASK[:1, :3]).last_hidden_state[0]
        for run in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            for padded in (run(**PADDED), run(TOKENS, MASK.bool())):
                close(padded.last_hidden_state[0, :3], expected, 1e-4)
        close(model(input_ids=TOKENS).last_hidden_state, blind)  # no mask stays behind
    assert not torch.allclose(blind[0, :3], expected, atol=1e-3)


def test_a_mask_is_taken_by_its_own_tower_alone():
    t5 = routed_text(LIBRARIES["T5"][0])
    other = torch.tensor([[1, 1, 0, 0, 0]] * 2)

    def weights(model: nn.Module, side: str, **batch) -> Tensor:
        with routing_weights(model) as found, torch.no_grad():
            model(**batch)
        return next(lam for name, lam in found.items() if name.startswith(side))

    hidden = t5.encoder(**PADDED)
    decoder = functools.partial(weights, t5, "decoder", decoder_input_ids=TOKENS, encoder_outputs=hidden)
    expected = decoder(attention_mask=MASK)  # what the decoder attends to, not what its routers average over
    assert not torch.allclose(decoder(attention_mask=MASK, decoder_attention_mask=other), expected)
    for module in t5.modules():
        module._forward_pre_hooks.clear()
    set_token_mask(t5, None)
    close(decoder(attention_mask=MASK), expected)
    clip = routed_text(LIBRARIES["CLIP"][0])
    images = torch.randn(2, 3, 8, 8)  # of 4 patches and a class token: 5 tokens, as the text
    same(*(weights(clip, "vision", input_ids=TOKENS, pixel_values=images, attention_mask=m) for m in (MASK, None)))


def test_a_mask_can_be_set_by_hand():
    module = WEMoE(*family("plain", 4, 2), randomised(Router(4, 2)))
    set_token_mask(module, torch.tensor([[1, 1, 1, 0, 0]] * 3))
    masked = module(X)
    close(copy.deepcopy(module)(X), masked)
    set_token_mask(module, None)
    close(masked[:, :3], module(X[:, :3]))


def test_a_mask_set_by_hand_holds_where_the_shape_of_the_models_own_does_not_say_so():
    model = routed_text(*TOWERS["BERT"])
    expected = model(**PADDED).last_hidden_state[0, :3]
    set_token_mask(model, MASK)
    additive = torch.where(MASK[:, None, None] == 1, 0.0, -math.inf)  # (B, 1, 1, N)
    close(model(input_ids=TOKENS, attention_mask=additive).last_hidden_state[0, :3], expected, 1e-4)


@fails("the mask belongs to the module, not to the pass")
def test_two_texts_at_once_keep_their_own_masks():
    model, ran = routed_text(*TOWERS["BERT"]), []
    expected = model(**PADDED).last_hidden_state

    def another(*_) -> None:  # as another thread might
        if not ran:
            ran.append(model(input_ids=TOKENS, attention_mask=MASK.flip(0)))

    model.embeddings.register_forward_pre_hook(another)
    close(model(**PADDED).last_hidden_state, expected)


@pytest.mark.parametrize("masks", [(MASK, MASK), pytest.param((MASK, MASK.flip(0)), marks=fails("the last one's"))])
def test_gradient_checkpointing_recomputes_with_the_mask_of_its_own_pass(masks):
    sure = dict(hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    model, found = routed_text(lambda: hugging_face(transformers.BertModel, **TEXT, **sure), BLOCKS).train(), []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        found.append(
            gradients(torch.cat([model(TOKENS, attention_mask=mask).last_hidden_state for mask in masks]), model)
        )
    close(*found, atol=1e-3)


@pytest.mark.parametrize("decoder", DECODERS)
def test_generation_is_the_same_with_and_without_a_cache_alone_and_in_a_padded_batch(decoder):
    whole = routed_text(*DECODERS[decoder])
    model = getattr(whole, "inner", whole)
    left = MASK if decoder == "T5" else MASK.flip(1)  # an encoder's padding is on the right
    ids, options = TOKENS * left + (1 - left), dict(max_new_tokens=6, do_sample=False, pad_token_id=1)
    generate = functools.partial(model.generate, ids, attention_mask=left, **options)
    expected = generate(use_cache=True)
    assert torch.equal(generate(use_cache=False), expected)
    assert torch.equal(generate(use_cache=True), expected)  # nothing stays frozen
    assert torch.equal(copy.deepcopy(model).generate(ids, attention_mask=left, **options), expected)
    for i in (0, 1):
        alone = model.generate(ids[i : i + 1, left[i] == 1], **options)[0]
        assert torch.equal(expected[i, -len(alone) :] if decoder != "T5" else expected[i, : len(alone)], alone)


# ---- What is refused, each in one sentence that says what to do ------------------------------------------------------


def weights(**changes) -> dict[str, Tensor]:
    return {"w": torch.ones(2, 2), "counter": torch.tensor(3), **changes}


def subtract(name: str, p: Tensor, q: Tensor) -> dict[str, Tensor]:
    return task_vector(weights(**{name: p}), weights(**{name: q}))


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: p for name, p in weights().items()}


def wrapped(make, tasks: int = 1, **options) -> WEMoE:
    return WEMoE(make(), [make() for _ in range(tasks)], Router(4, tasks), **options)


def modified(change) -> nn.Sequential:
    module = nn.Sequential(LINEAR4(), nn.Linear(4, 4))
    change(module)
    return module


def adapt_with(logits=lambda z: z.mean(1), change=lambda model: None, loader=(X,), **options) -> None:
    model = WEMoE(*family("plain", 4, 2), Router(4, 2))
    change(model)
    adapt(model, {"a": loader}, {"a": logits}, **{"steps": 2, **options})


LINEAR4, LINEAR, STATE = functools.partial(nn.Linear, 4, 4), nn.Linear(2, 2), nn.Linear(2, 2).state_dict()
CHECKPOINT, MLP = {"epoch": 3, "state_dict": weights()}, nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
NONE, ONE, SPARSE, FLOAT8 = torch.zeros(2), torch.ones(2), torch.eye(2).to_sparse(), torch.float8_e4m3fn
QUANTISED = [torch.quantize_per_tensor(q, 0.1, 0, torch.qint8) for q in (NONE, ONE)]
# Attention that takes (tokens, samples, D), as CLIP's text tower of old.
BLOCK = nn.ModuleDict({"block": nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "mlp": nn.Linear(4, 4)})})
ENCODER = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8), 1, enable_nested_tensor=False)
REFUSED = {  # what: (how, a part of the sentence)
    "an entry too few": (lambda: task_vector(LINEAR, nn.Linear(2, 2, False)), "'bias' is in the pre-trained model"),
    "an entry too many": (lambda: task_vector(STATE, STATE | {"more": ONE}), "'more' is in the fine-tuned"),
    "a shape": (lambda: task_vector(STATE, STATE | {"weight": torch.ones(2, 3)}), r"\(2, 3\) in the fine.*\(2, 2\)"),
    "NaN": (lambda: task_vector(STATE, STATE | {"bias": NONE / 0}), "'bias' .*in the fine-tuned"),
    "infinity": (lambda: task_vector(STATE | {"bias": ONE / 0}, STATE), "'bias' .* pre-trained"),
    "a checkpoint": (lambda: task_vector(CHECKPOINT, CHECKPOINT), "'state_dict' holds the weights of a checkpoint"),
    "a checkpoint of one side": (lambda: task_vector(LINEAR, {"model": STATE}), "'bias' is in the pre|'model' holds"),
    "a checkpoint, and a loss": (lambda: task_vector(*[{"model": STATE, "loss": ONE}] * 2), "'model' holds"),
    "a nested checkpoint": (lambda: task_vector(*[{"ckpt": {"model": STATE}, "ema": ONE}] * 2), "'ckpt' holds"),
    "a module in a checkpoint": (lambda: task_vector(*[{"model": LINEAR}] * 2), "no floating-point weights"),
    **{f"the prefix {p}": (lambda p=p: task_vector(prefixed(p), weights()), f"'{p}w' .* strip the prefix")
       for p in ("module.", "_orig_mod.", "model.", "base_model.model.")},
    "a prefix of the other": (lambda: task_vector(weights(), prefixed("module.")), "'module.w' .* strip the prefix"),
    **{f"{dtype}": (lambda dtype=dtype: subtract("q", NONE.to(dtype), ONE.to(dtype)), f"'q' .*{dtype}")
       for dtype in (torch.int8, torch.bool, torch.complex64, FLOAT8)},
    **{f"{dtype} of one alone": (lambda dtype=dtype: task_vector(weights(q=ONE.to(dtype)), weights()), "'q'")
       for dtype in (torch.int8, torch.complex64)},
    "uint8": (lambda: subtract("q", ONE, NONE.to(torch.uint8)), "'q'.*uint8"),
    "a complex number": (lambda: subtract("q", torch.tensor(0j), torch.tensor(1j)), "'q' .*complex64"),
    "qint8": (lambda: subtract("q", *QUANTISED), "'q' .*qint8"),
    "float8 alone": (lambda: task_vector(*[{"w": ONE.to(FLOAT8)}] * 2), "no floating-point"),
    "sparse": (lambda: subtract("q", SPARSE, SPARSE), "'q'"),
    "meta": (lambda: subtract("q", ONE, ONE.to("meta")), "'q' .*meta device"),
    "a model on meta": (lambda: wrapped(lambda: LINEAR4(device="meta")), "'bias' .*meta device"),
    "models of inference mode": (lambda: wrapped(torch.inference_mode()(LINEAR4)), "inference_mode"),
    **{f"the adapter's {name}": (lambda name=name: subtract(name, *[torch.ones(1, 4)] * 2), "low-rank")
       for name in ("q.lora_A.default.weight", "base_model.model.q.lora_A.weight", "q.lora_embedding_A.default",  # peft
                    "q.lora_a.weight", "lora_unet_q.lora_down.weight", "q.lora_B.weight", "q.lora_up.weight",
                    "q.lora.down.weight", "q.lora_linear_layer.down.weight", "q.hada_w1_a", "q.lokr_w1_a")},
    "another A": (lambda: subtract("A", torch.tensor(1.0), ONE), "'A' has shape"),
    "factors A and B": (lambda: task_vector(*[{"A": torch.ones(1, 4), "B": torch.ones(4, 1)}] * 2), "low-rank"),
    "a tie that was cut": (lambda: task_vector(tied(), tied().state_dict() | {"b.weight": torch.ones(4, 4)}),
                           "are tied in the pre-trained, not in the fine-tuned model"),
    "a factor for each": (lambda: task_arithmetic(LINEAR, [STATE], [0.1, 0.2]), "2 scaling factors for 1 task"),
    "another's vector": (lambda: task_arithmetic(LINEAR, [STATE | {"more": ONE}]), "'more' is in a task"),
    "depth": (lambda: Router(4, 2, depth=3), "depth=3"),
    "no tasks": (lambda: Router(4, 0), "num_tasks=0"),
    "a router's input": (lambda: Router(4, 2)(torch.ones(2, 3)), r"\(B, ..., 4\), got \(2, 3\)"),
    "no models": (lambda: WEMoE(LINEAR, [], Router(2, 1)), "0 fine-tuned modules"),
    "models and routing weights": (lambda: WEMoE(LINEAR, [LINEAR] * 2, Router(2, 3)), "2 fine-tuned .* 3 outputs"),
    "routing weights": (lambda: WEMoE(LINEAR, [LINEAR], Fixed(torch.ones(3)))(torch.ones(1, 2)), r"\(1, 3\).*\(1, 2\)"),
    "a sample's own tensor": (lambda: wrapped(LINEAR4).weight, "'weight' differs between samples"),
    "no such attribute": (lambda: wrapped(LINEAR4).nothing, "no attribute 'nothing'"),
    **{kind.__name__: (lambda kind=kind: wrapped(lambda: kind(4, 4)), rf"{kind.__name__}\) keeps its weights elsewhere")
       for kind in (nn.GRU, nn.LSTM, nn.RNN)},
    "weight_norm of old": (lambda: wrapped(lambda: nn.Sequential(nn.utils.weight_norm(LINEAR4()))), "'0' .* elsewhere"),
    "a forward that was replaced": (
        lambda: wrapped(lambda: modified(lambda m: setattr(m[0], "forward", print))), "'0'.* forward was replaced"),
    "a script": (lambda: wrapped(lambda: torch.jit.script(LINEAR4())), "forward was replaced"),
    "a trace": (lambda: wrapped(lambda: nn.Sequential(torch.jit.trace(LINEAR4(), X))), "'0'.* forward was replaced"),
    "compiled inside": (lambda: wrapped(lambda: nn.Sequential(torch.compile(LINEAR4()))),
                        "forward was replaced|strip the prefix"),
    **{f"a layer kept in {where}, {layer}": (
        lambda keep=keep, layer=layer: wrapped(lambda: modified(keep), layer=layer), "keeps modules or methods of its")
       for layer in (None, MergedLayer)
       for where, keep in (("a list", lambda m: setattr(m, "order", [m[0]])),
                           ("a method", lambda m: setattr(m, "run", m.forward)))},
    "an argument of samples or tokens": (
        lambda: wrapped(lambda: nn.MultiheadAttention(4, 2, batch_first=True), 2)(*[X[:, :3]] * 3, torch.zeros(3, 3)),
        r"\(3, 3\) may belong to the samples"),
    "an argument of samples or features": (
        lambda: wrapped(lambda: Made(lambda self, x, y: x * self.w * y, w=nn.Parameter(X[0, 0])))(X[0, :4], X[0, 0]),
        r"\(4,\) may belong to the samples"),
    "a trained base": (lambda: wrapped(LINEAR4).requires_grad_(True)(X), "only the router is trainable"),
    "sequence-first": (lambda: upscale(BLOCK, [BLOCK]), "'block.mlp'.*batch_first=False"),
    "sequence-first layers": (lambda: upscale(ENCODER, [ENCODER], modules="linear1"), "linear1'.*batch_first=False"),
    "sequence-first, itself": (lambda: wrapped(lambda: nn.MultiheadAttention(4, 2)), "batch_first=False"),
    "no MLP": (lambda: upscale(MLP, [MLP]), "No MLP was found in Sequential.*among '0', '1'"),
    "no such modules": (lambda: upscale(Transformer(), [Transformer()], modules="mpl"), r"'mpl'.*'blocks\.0\.mlp'"),
    "nothing to merge": (lambda: upscale(Transformer(), []), "at least one fine-tuned|0 fine-tuned"),
    "one model, not in a list": (lambda: upscale(MLP, MLP.state_dict(), modules="0"), "not one alone"),
    "a convolution's size": (lambda: upscale(*[nn.ModuleDict({"conv": nn.Conv2d(1, 1, 3)})] * 2, modules="conv"), "."),
    "no head": (lambda: adapt(small_problem()[0], {"a": [], "b": []}, {"a": nn.Identity()}), "heads for 'a'"),
    "no batch": (lambda: adapt_with(loader=[]), "loader of task 'a' yields no batch"),
    "an iterator": (lambda: adapt_with(loader=iter([X])), "task 'a' yields no batch when started again"),
    "labelled batches": (lambda: adapt_with(loader=[(X, X)]), "task 'a' yields .*tuple.*unlabelled"),
    "no loaders": (lambda: adapt(small_problem()[0], {}, {}), "there are no loaders"),
    "nothing to train": (lambda: adapt(Transformer().requires_grad_(False), {}, {}), "has nothing to train"),
    "no steps": (lambda: adapt_with(steps=0), "steps=0"),
    "steps that are done": (lambda: adapt_with(steps=2, start=2), "start=2"),
    **{f"rate {lr}": (lambda lr=lr: adapt_with(lr=lr), f"learning rate: {lr}|lr={lr}")
       for lr in (math.nan, 0.0, math.inf)},
    **{f"routers in {dtype}": (lambda dtype=dtype: adapt_with(change=lambda m: m.router.to(dtype)), "half precision")
       for dtype in (torch.float16, torch.bfloat16)},
    "inference mode": (
        lambda: adapt(torch.inference_mode()(wrapped)(LINEAR4), {"a": [X]}, {"a": nn.Identity()}), "inference_mode"),
    "another's optimizer": (lambda: adapt_with(optimizer=adam(nn.Linear(2, 2))), "optimizer holds none"),
    **{f"logits {shape}": (lambda shape=shape: adapt_with(lambda z: z.sum() + torch.ones(shape)), "Logits of 'a'")
       for shape in ((3,), (3, 1), (3, 2, 5, 2), ())},
    "a router that looks": (lambda: unload(wrapped(LINEAR4)), "Only routers of depth 0"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_sentence(what):
    how, sentence = REFUSED[what]
    with pytest.raises((ValueError, NotImplementedError, AttributeError), match=sentence) as refusal:
        how()
    message = str(refusal.value)
    assert "\n" not in message and len(message) < 600
