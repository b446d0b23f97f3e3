"""The specification of wemoe.py: what must be true of it, in its own order; last, what is refused. No network, no GPU.

Properties come first: hypothesis draws shapes, numbers of tasks, router depths and seeds. Float32 tolerances: weights
and activations are of order one and sums have some dozens of terms, so that rounding (6e-8 relative) stays below ATOL.
"""

import copy
import math
import os
import pickle
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import open_clip
import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import wemoe
from wemoe import MergedLayer, Router, WEMoE, adapt, entropy, routing_weights, task_arithmetic, task_vector, upscale

ATOL = 2e-5

settings.register_profile("default", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

seeds, sizes, depths = st.integers(0, 2**16), st.integers(1, 6), st.integers(0, 2)
task_numbers, batch_sizes = st.integers(1, 4), st.integers(1, 4)
axes = st.lists(st.integers(1, 3), min_size=1, max_size=2)  # token or spatial axes


# ---- Small modules, and the equation as a loop -----------------------------------------------------------------------

MLPS = {
    "plain": lambda d: nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d)),
    "normed": lambda d: nn.Sequential(nn.Linear(d, d, bias=False), nn.LayerNorm(d), nn.ReLU(True), nn.Linear(d, d)),
    "linear": lambda d: nn.Linear(d, d),
    "norm": nn.LayerNorm,
}
kinds = st.sampled_from(sorted(MLPS))


class Made(nn.Module):
    """Layers and parameters by name, and what a forward pass makes of them and its arguments."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


class Block(nn.Module):
    """Attention and an MLP, as in any transformer."""

    def __init__(self, size: int):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(size), MLPS["plain"](size)
        self.attn = nn.MultiheadAttention(size, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(x)


class Fixed(nn.Module):
    """A router whose weights are given: (T,) for all samples, or (B, T)."""

    def __init__(self, lam: Tensor):
        super().__init__()
        self.lam = nn.Parameter(lam)

    def forward(self, x: Tensor) -> Tensor:
        return self.lam if self.lam.dim() == 2 else self.lam.expand(len(x), -1)


def transformer() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), Block(4), Block(4), nn.Linear(4, 5))


def randomised(module: nn.Module, scale: float = 0.5) -> nn.Module:
    """The module with normally distributed parameters, biases and norms included, and statistics of batches."""
    for p in module.parameters():
        nn.init.normal_(p, std=scale)
    for statistics in (p for name, p in module.named_buffers() if "running" in name):
        nn.init.uniform_(statistics, 0.9, 1.1)
    return module


def several(make, tasks: int = 2, seed: int = 0) -> tuple[nn.Module, list[nn.Module]]:
    """A "pre-trained" module and as many "fine-tuned" ones."""
    torch.manual_seed(seed)
    pretrained, *finetuned = (randomised(make()) for _ in range(tasks + 1))
    return pretrained, finetuned


def family(kind: str, size: int, tasks: int, seed: int = 0) -> tuple[nn.Module, list[nn.Module]]:
    return several(lambda: MLPS[kind](size), tasks, seed)


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

    def named(module: nn.Module) -> dict[str, Tensor]:  # a tied one by one name
        tensors = *module.named_parameters(), *module.named_buffers()
        return {name: p.detach() for name, p in tensors if p.is_floating_point()}

    theta_0, thetas, outputs = named(pretrained), [named(module) for module in finetuned], []
    for b in range(len(x)):
        theta = {k: p + sum(lam[b, t] * (thetas[t][k] - p) for t in range(len(thetas))) for k, p in theta_0.items()}
        theta |= {name: p.detach() for name, p in theta.items() if "running" in name}  # torch does not differentiate
        outputs.append(functional_call(copy.deepcopy(pretrained), theta, (x[b : b + 1],)))
    return torch.cat(outputs)


def close(a: object, b: object, atol: float = ATOL, rtol: float = ATOL) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


same = partial(close, atol=0, rtol=0)


def gradients(y: Tensor, *sources: Tensor | nn.Module) -> list[Tensor]:
    """Those of a sum with fixed weights of what y holds, in tensors and in whatever a module trains."""
    tensors = [p for s in sources for p in (s.parameters() if isinstance(s, nn.Module) else [s]) if p.requires_grad]
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)
    return list(torch.autograd.grad((y * weights).sum(), tensors))


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(params=[None, MergedLayer], ids=["tiles", "samples"])
def layer(request):
    """What linear layers become; data/test_methods.py runs the tests that ask for it with forms of its own, too."""
    return request.param


torch.set_num_threads(1)  # small tensors gain nothing from more, and forks do not survive them,
torch.ones(1, requires_grad=True).sum().backward()  # nor an autograd engine that torch.compile starts
torch.manual_seed(0)
X, Y = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
LAM = torch.rand(3, 2) / 2  # merged variances stay positive
TOKENS = torch.randint(3, 19, (2, 5))
whole = lambda name, _: name == ""  # noqa: E731


def test_it_needs_nothing_but_torch_and_starts_as_the_paper_does():
    with open(wemoe.__file__, encoding="utf-8") as file:
        imports = re.findall(r"^(?:import|from) (\w+)", file.read(), re.MULTILINE)
    assert set(imports) - set(sys.stdlib_module_names) == {"torch"}
    assert task_arithmetic.__defaults__ == (0.3,) and Router.__init__.__defaults__ == (2, 0.3)
    assert upscale.__kwdefaults__ == dict(init_lambda=0.3, router_depth=2, modules=wemoe.MLP, layer=None)
    assert adapt.__kwdefaults__ == dict(steps=1000, lr=1e-4, objective=entropy, anneal=True, on_step=None)
    assert all(0.008 < w.std() < 0.012 for w in Router(64, 64).parameters() if w.dim() == 2)


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
    same(task_arithmetic(pretrained.state_dict(), dict(enumerate(vectors)), scaling), merged)


def test_sums_are_accumulated_in_float32_counters_skipped_and_what_is_equal_has_no_task_vector():
    theta_0 = {"w": torch.ones(1).bfloat16(), "mask": torch.full((2, 2), -math.inf).triu(1), "steps": torch.tensor(7)}
    theta_t = theta_0 | {"w": torch.tensor([1 + 2**-7], dtype=torch.float64), "steps": torch.tensor(8)}
    tau = task_vector(theta_0, theta_t)
    assert list(tau) == ["w", "mask"] and tau["w"].dtype == torch.bfloat16 and not tau["mask"].any()
    merged = task_arithmetic(theta_0, (tau for _ in range(8)), 0.25)  # in bfloat16, 1 + 0.25 τ = 1
    same(merged, theta_0 | {"w": theta_0["w"] + 2**-6})
    assert merged["steps"] is not theta_0["steps"]


# ---- The router ------------------------------------------------------------------------------------------------------


@given(depths, sizes, task_numbers, batch_sizes, axes, st.floats(-1, 1), st.booleans(), seeds)
def test_router_is_its_formula_averaged_over_tokens(depth, size, tasks, batch, tokens, init, each, seed):
    torch.manual_seed(seed)
    init = [init + t for t in range(tasks)] if each else init
    router, h = Router(size, tasks, depth, init), torch.randn(batch, *tokens, size)
    p = list(router.parameters())
    output, hidden_layer = [(tasks, size), (tasks,)], [(size, size), (size,)]
    assert [q.shape for q in p] == {0: output[1:], 1: output, 2: hidden_layer + output}[depth]
    close(p[-1].detach(), torch.tensor(init).expand(tasks))
    assert depth < 2 or not p[1].any()
    randomised(router)
    for b in range(batch):
        rows = h[b].reshape(-1, size)
        hidden = torch.relu(rows @ p[0].T + p[1]) if depth == 2 else rows
        lam = hidden @ p[-2].T + p[-1] if depth else p[0].expand(len(rows), -1)
        close(router(h).expand(batch, -1)[b], lam.mean(0))


# ---- The routed module: the equation ---------------------------------------------------------------------------------


@given(st.lists(kinds, min_size=1, max_size=3), sizes, task_numbers, batch_sizes, axes, depths, st.booleans(), seeds)
def test_outputs_and_gradients_are_the_equation_sample_by_sample(parts, size, tasks, batch, tokens, depth, each, seed):
    pretrained, finetuned = several(lambda: nn.Sequential(*(MLPS[kind](size) for kind in parts)).double(), tasks, seed)
    router = randomised(Router(size, tasks, depth).double(), 0.3)
    module = WEMoE(pretrained, finetuned, router, layer=MergedLayer if each else None)
    x = torch.randn(batch, *tokens, size).double().requires_grad_()
    y, expected = module(x), literal(pretrained, finetuned, router(x).expand(batch, -1), x)
    close(y, expected)
    close(gradients(y, x, router), gradients(expected, x, router))
    same(module(x), y)
    assert set(trained(module)) == {f"router.{name}" for name, _ in router.named_parameters()}


@given(kinds, task_numbers, batch_sizes, st.floats(-1, 1), st.booleans(), seeds)
def test_one_hot_zero_and_constant_routers_give_what_they_should(kind, tasks, batch, lam, each, seed):
    pretrained, finetuned = family(kind, 4, tasks, seed)
    x, route = torch.randn(batch, 3, 4), partial(WEMoE, pretrained, finetuned, layer=MergedLayer if each else None)
    for t in range(tasks):
        close(route(expert(t, tasks))(x), finetuned[t](x))
    close(route(Fixed(torch.zeros(tasks)))(x), pretrained(x))
    merged = task_arithmetic(pretrained, [task_vector(pretrained, model) for model in finetuned], lam)
    close(route(Router(4, tasks, 0, lam))(x), functional_call(pretrained, merged, (x,)))


def test_a_constant_router_merges_once_for_all_samples():
    ran, layer = [], Made(lambda self, x: ran.append(1) or x * self.w, w=nn.Parameter(torch.ones(4)))
    WEMoE(layer, [layer] * 2, Router(4, 2, 0))(X)
    assert len(ran) == 1


def tied() -> Made:
    module = Made(lambda self, x: self.b(torch.tanh(self.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    module.b.weight = module.a.weight
    return module


LAYERS = {  # of every kind: those that hold weights by themselves, and those whose weights are computed
    "tied": tied,
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(5).eval()),
    "convolution": lambda: nn.Sequential(nn.Conv1d(5, 4, 3), nn.GroupNorm(2, 4), nn.Conv1d(4, 2, 1)),
    "activation": lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.RMSNorm(4)),
    "one row for all samples": lambda: Made(lambda self, x: x + self.fc(torch.ones(1, 5, 4)), fc=nn.Linear(4, 4)),
    "parametrised": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
    "both": lambda: Made(lambda self, x: self.fc(x) * self.w, fc=nn.Linear(4, 4), w=nn.Parameter(torch.ones(4))),
    **{kind: partial(make, 4) for kind, make in MLPS.items()},
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_of_every_kind_are_merged_before_anything_is_computed_from_them(kind, layer):
    pretrained, finetuned = several(LAYERS[kind])
    for router in (Fixed(LAM.clone()), Router(4, 2, 0)):  # each sample its own λ; one for all, merged once
        module = WEMoE(pretrained, finetuned, router, layer=layer)
        before, modes = copy.deepcopy(module.state_dict()), [part.training for part in module.modules()]
        y, expected = module(X), literal(pretrained, finetuned, router(X).expand(3, -1), X)
        close(y, expected, 1e-4)
        close(gradients(y, router), gradients(expected, router), 1e-2)
        with torch.no_grad():
            close(module(X), y, 1e-4)
        same(module.state_dict(), before)
        assert [part.training for part in module.modules()] == modes
    dense = wemoe.unload(module)  # the constant one is merged for good
    close(dense(X), y, 1e-4)
    assert dense.state_dict().keys() == pretrained.state_dict().keys()
    assert [type(part) for part in dense.modules()] == [type(part) for part in pretrained.modules()]
    same(module.state_dict(), before)


def test_tiles_of_rows_and_samples_cover_everything():
    pretrained, *finetuned = (nn.Linear(100_000, 2).double() for _ in range(2))  # far more than a tile holds
    module = WEMoE(pretrained, finetuned, Fixed(torch.rand(17, 1).double()))
    x = torch.randn(17, 1, 100_000, dtype=torch.float64, requires_grad=True)
    y, expected = module(x), literal(pretrained, finetuned, module.router(x), x)
    close([y, *gradients(y, x, module)], [expected, *gradients(expected, x, module)])


def test_merged_weights_are_not_kept_for_the_backward_pass(layer):
    pretrained, finetuned = family("plain", 32, 2)
    module, kept = WEMoE(pretrained, finetuned, Router(32, 2), layer=layer), {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = module(torch.randn(16, 2, 32, requires_grad=True))
    for p in module.parameters():
        kept.pop(p.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) < 16 * sum(p.nbytes for p in pretrained.parameters()) / 2
    assert all(gradient.any() for gradient in gradients(y, module))


class Named(nn.Linear):
    def forward(self, hidden_states: Tensor, other: Tensor | None = None, scale: float = 1.0) -> dict:
        y = super().forward(hidden_states) * scale + (0 if other is None else other)
        return {"out": y, "pair": (None, y.mean(-1)), "n": 3}


def test_the_router_sees_the_first_parameter_of_forward_however_it_is_passed(layer):
    pretrained, finetuned = several(partial(Named, 4, 4))
    module = WEMoE(pretrained, finetuned, randomised(Router(4, 2)), layer=layer)
    results = module(X, Y, 2.0), module(X, scale=2.0, other=Y), module(other=Y, scale=2.0, hidden_states=X)
    module.router = Fixed(module.router(X).detach())
    close(results, (module(X, Y, 2.0),) * 3)


def test_hooks_see_what_those_of_a_dense_module_see():
    pretrained, finetuned = family("plain", 4, 2)
    for model in (pretrained, *finetuned):  # before it is routed
        model[2].register_forward_hook(lambda part, inputs, output: output.tanh())
    module, seen = WEMoE(pretrained, finetuned, expert(0)), []
    for part in (module, module.pretrained[0], finetuned[0], finetuned[0][0]):
        part.register_forward_hook(lambda part, inputs, output: seen.append(output))
    module(X), finetuned[0](X)
    close(seen[:2], seen[2:])
    module.pretrained[0].register_forward_pre_hook(lambda part, inputs: (0 * inputs[0],))
    close(module(X), finetuned[0](0 * X))


def test_the_wrapped_module_stays_in_reach_but_the_numbers_of_its_weights_do_not():
    module = WEMoE(*several(lambda: Made(None, fc=nn.Linear(4, 4, bias=False))), Router(4, 2))
    weight = module.fc.weight  # as libraries ask
    assert (weight.dtype, weight.device.type, weight.shape) == (torch.float32, "cpu", (4, 4))
    assert weight.isnan().all() and module.fc.bias is None
    with pytest.raises(AttributeError, match="nothing"):
        module.nothing  # noqa: B018
    module = WEMoE(*family("plain", 4, 2), Router(4, 2), layer=lambda *linear: MergedLayer(*linear))
    assert [type(part) for part in module.pretrained] == [MergedLayer, nn.GELU, MergedLayer]


# ---- Precision and devices -------------------------------------------------------------------------------------------


def plain(layer=None) -> tuple[WEMoE, Tensor]:
    return WEMoE(*family("plain", 8, 3), randomised(Router(8, 3), 0.2), layer=layer), torch.randn(4, 5, 8)


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_other_types(layer, dtype, atol):
    """Routers stay in float32, and weights are merged in the precision of λ, then rounded to their own."""
    (module, x), (pretrained, finetuned) = plain(layer), family("plain", 8, 3)
    models = [model.to(dtype) for model in (pretrained, *finetuned)]
    converted = upscale(models[0], models[1:], modules=whole, layer=layer)
    converted.router.load_state_dict(module.router.state_dict())
    y, lam = converted(x.to(dtype)), torch.rand(3, dtype=converted.router.layers[0].weight.dtype)
    assert y.dtype == dtype and lam.dtype == torch.promote_types(dtype, torch.float32)
    close(y.float(), module(x), atol, rtol=0.05)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients(y, converted))
    part = next(part for part in converted.modules() if isinstance(part, MergedLayer))
    for name, weight in part.weights(lam).items():
        theta_0, tau = part.pretrained.get_parameter(name), part.tau(name)
        same(weight, (theta_0.to(lam) + torch.tensordot(lam, tau.to(lam), dims=1)).to(dtype))


@pytest.mark.parametrize("kind", ["plain", "normed"])
def test_bfloat16_autocast_gives_the_type_of_a_dense_module_and_nearly_the_same(kind, layer):
    pretrained, finetuned = family(kind, 8, 2)
    module, x = WEMoE(pretrained, finetuned, expert(0), layer=layer), torch.randn(4, 5, 8)
    parts = [part for part in module.modules() if isinstance(part, MergedLayer)]
    weights = [part.weights(torch.tensor([0.3, 0.1])) for part in parts]
    with torch.autocast("cpu", torch.bfloat16):
        y, dense = module(x), finetuned[0](x)
        same([part.weights(torch.tensor([0.3, 0.1])) for part in parts], weights)  # merged in their own precision
        assert copy.deepcopy(module).double()(x.double()).dtype == torch.float64
    assert y.dtype == dense.dtype
    close(y.float(), module(x), 0.1, rtol=0.05)
    ours, theirs = (torch.autograd.grad(out.float().square().mean(), module.router.lam)[0] for out in (y, module(x)))
    close(ours, theirs, 0.05, rtol=0.1)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_autocast_does_not_round_the_routing_weights_and_five_steps_of_adam_are_seen(depth):
    model, x = upscale(*family("plain", 32, 2), modules=whole, router_depth=depth), torch.randn(8, 3, 32)
    with routing_weights(model) as exact:
        model(x)
    with torch.autocast("cpu", torch.bfloat16):
        with routing_weights(model) as found:
            before = model(x)
        adapt(model, {"a": [x]}, {"a": lambda z: z.mean(1)}, steps=5)
        assert not torch.equal(model(x), before)
    close(found, exact, 1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_what_the_cpu_gives(layer):
    module, x = plain(layer)
    expected, found = (
        [y := m(x.to(d)), *gradients(y, m)] for d in ("cpu", "cuda") for m in [copy.deepcopy(module).to(d)]
    )
    close([p.cpu() for p in found], expected, 1e-3, rtol=1e-3)


# ---- Upscaling -------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=3), st.booleans(), depths, seeds)
def test_upscaled_models_start_from_task_arithmetic_and_everything_else_stays_there(lam, each, depth, seed):
    tasks, lam = len(lam), lam if each else lam[0]
    pretrained, finetuned = several(transformer, tasks, seed)
    merged = task_arithmetic(pretrained, [task_vector(pretrained, model) for model in finetuned], lam)
    before = copy.deepcopy([model.state_dict() for model in (pretrained, *finetuned)])
    model = upscale(pretrained, finetuned, init_lambda=lam, router_depth=depth, modules="mlp")  # the outermost
    assert list(routed(model)) == ["1.mlp", "2.mlp"]
    for name, p in model.named_parameters():
        assert p.requires_grad == (".router." in name)
        if ".router." not in name and ".mlp." not in name:
            close(p.detach(), merged[name])
    for module in routed(model).values():
        close(list(module.router.parameters())[-1].detach(), torch.tensor(lam).expand(tasks))
    if depth == 0:
        close(model(X[..., :3]), functional_call(pretrained, merged, (X[..., :3],)), 1e-3, 1e-3)
        close(wemoe.unload(model).state_dict(), merged)
    same([m.state_dict() for m in (pretrained, *finetuned)], before)


def test_models_come_in_any_container_and_modules_are_chosen_by_any_predicate():
    pretrained, (a, b) = family("plain", 4, 2)
    for models in ([a, b], iter([a, b]), nn.ModuleDict({"a": a, "b": b}), {"a": a.state_dict(), "b": b.state_dict()}):
        model = upscale(pretrained, models, modules=lambda _, module: isinstance(module, nn.Linear))
        set_router(model, expert(1))
        close(model(X), b(X))
        assert list(routed(model)) == ["0", "2"]


# ---- verify: every library, and each of its sentences made to fail ---------------------------------------------------

SIZES = dict(hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2)
VISION, TEXT = dict(image_size=8, patch_size=4, **SIZES), dict(vocab_size=20, max_position_embeddings=32, **SIZES)
IMAGES = torch.randn(2, 3, 8, 8)
PADDED = dict(input_ids=TOKENS, attention_mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))


def hugging_face(name: str, **options) -> nn.Module:
    model = getattr(transformers, name)
    return model(model.config_class(bos_token_id=0, eos_token_id=19, **options))


LIBRARIES = {  # a small model, its input, and of how many modules a choice is; None is that of all MLPs
    "open_clip": (
        lambda: open_clip.CLIP(4, dict(image_size=8, patch_size=4, width=8, layers=2, head_width=4),
                               dict(context_length=5, vocab_size=20, width=8, heads=2, layers=1)).visual,
        IMAGES, {None: 2, r"(mlp|attn)$": 4, r"resblocks\.\d+$": 2}),
    "timm": (lambda: timm.models.VisionTransformer(8, 4, embed_dim=8, depth=2, num_heads=2, num_classes=3),
             IMAGES, {None: 2, r"(mlp|\.attn)$": 4, r"blocks\.\d+$": 2}),
    "torchvision": (lambda: torchvision.models.VisionTransformer(8, 4, 2, 2, 8, 16),
                    IMAGES, {None: 2, r"(mlp|self_attention)$": 4, r"encoder_layer_\d+$": 2}),
    "torch": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
              torch.randn(2, 5, 8), {r"layers\.\d+$": 2, r"linear\d$": 4}),  # with a fast path
    "ViT": (lambda: hugging_face("ViTModel", **VISION), dict(pixel_values=IMAGES),
            {None: 2, r"(mlp|attention)$": 4, r"layers\.\d+$": 2}),
    "BERT": (lambda: hugging_face("BertModel", **TEXT), PADDED,
             {r"layer\.\d+\.(intermediate|output)$": 4, r"attention$": 2, r"layer\.\d+$": 2}),
    "T5": (
        lambda: hugging_face("T5ForConditionalGeneration", d_model=8, d_ff=16, d_kv=4, num_heads=2, vocab_size=20,
                             num_layers=1, num_decoder_layers=1, feed_forward_proj="gated-gelu"),
        dict(decoder_input_ids=TOKENS, use_cache=False, **PADDED), {None: 2}),
    "Llama": (lambda: hugging_face("LlamaForCausalLM", num_key_value_heads=2, **TEXT), dict(use_cache=False, **PADDED),
              {None: 2, r"(mlp|self_attn)$": 4, r"layers\.\d+$": 2}),
    "LeViT": (lambda: timm.models.levit.Levit(32, embed_dim=(8,), key_dim=4, depth=(1,), num_heads=(2,)),
              torch.randn(2, 3, 32, 32), {None: 1, r"blocks\.0$": 1}),
    "Swin": (lambda: timm.models.SwinTransformer(32, 2, embed_dim=8, depths=(1,), num_heads=(2,), window_size=4),
             torch.randn(2, 3, 32, 32), {r"blocks\.0$": 1}),
}  # fmt: skip


@pytest.mark.parametrize("library, modules", [(name, choice) for name in LIBRARIES for choice in LIBRARIES[name][2]])
def test_the_common_libraries_are_verified(library, modules):
    make, batch, choices = LIBRARIES[library]
    pretrained, finetuned = several(lambda: make().eval())
    before = copy.deepcopy([model.state_dict() for model in (pretrained, *finetuned)])
    options = {"modules": modules} if modules else {}
    assert len(routed(upscale(pretrained, finetuned, **options))) == choices[modules]
    if library in ("LeViT", "Swin"):  # reshape the batch: tokens of all samples to batch norm, windows to attention
        with pytest.raises((AssertionError, ValueError)):
            wemoe.verify(pretrained, finetuned, batch, **options)
        options["layer"] = MergedLayer
    wemoe.verify(pretrained, finetuned, batch, **options)
    same([model.state_dict() for model in (pretrained, *finetuned)], before)


def parent(run=lambda self, x: self.mlp(x), change=lambda self: None, norm=None) -> Made:
    """A model whose MLP is routed, and which calls it as `run` does."""
    change(module := Made(run, mlp=MLPS["plain"](4), norm=norm))
    return module


NORM = nn.BatchNorm1d(5, affine=False, track_running_stats=False)
BROKEN = {  # what verify says of models that upscaling would get wrong
    "list": ("'mlp' gave 0 rows", lambda self, x: self.calls[0](x), lambda self: vars(self).update(calls=[self.mlp])),
    "method": ("gave 0 rows", lambda self, x: self.call(x), lambda self: vars(self).update(call=self.mlp.forward)),
    "not called": ("'mlp' gave 0 rows", lambda self, x: x),
    "forward replaced": (
        "model 0 alone, .* off by", lambda self, x: self.mlp(x),
        lambda self: vars(self.mlp).update(forward=lambda x, mlp=self.mlp: mlp[2](mlp[1](mlp[0](x)))),
    ),
    "weights read": ("model 0 alone, .* off by nan", lambda self, x: self.mlp(x) @ getattr(self.mlp, "0").weight.T),
    "tokens first": ("'mlp' gave 5 rows", lambda self, x: self.mlp(x.transpose(0, 1)).transpose(0, 1)),
    "samples in one row": ("'mlp' gave 1 rows", lambda self, x: self.mlp(x.view(1, 15, 4)).view(3, 5, 4)),
    "samples compared": ("sample 0 alone, .* off by", lambda self, x: self.mlp(x - x.mean(0))),
    "statistics of the batch": ("sample 0 alone, .* off by", lambda self, x: self.norm(self.mlp(x)), id, NORM),
    "not finite": ("off by nan", lambda self, x: self.mlp(x).sqrt()),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_upscaling_would_get_wrong_is_found(what):
    sentence, *how = BROKEN[what]
    with pytest.raises(AssertionError, match=sentence):
        wemoe.verify(*several(lambda: parent(*how)), X)


def test_another_function_and_a_variance_below_zero_are_found():
    models = [parent(lambda self, x, act=act: act(self.mlp(x))) for act in (F.relu, F.relu, F.gelu)]
    pretrained, finetuned = models[0], models[1:]
    wemoe.verify(pretrained, [finetuned[0], models[2].state_dict()], X)
    assert finetuned[0].training
    with pytest.raises(AssertionError, match="model 1 alone"):
        wemoe.verify(pretrained, finetuned, X)
    norms = [parent(lambda self, x: self.norm(self.mlp(x)), id, nn.BatchNorm1d(5)) for _ in range(9)]
    for model in norms[1:]:
        model.norm.running_var.fill_(0.3)
    with pytest.raises(AssertionError, match="sample 0 alone, .* off by nan"):  # of eight tasks, 1 - 8 · 0.3 · 0.7 < 0
        wemoe.verify(norms[0], norms[1:], X)


# ---- Test-time adaptation --------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(2, 12), st.sampled_from([0, 0.1, 1, 10, 1e3, 1e6]), st.integers(0, 3), seeds)
def test_entropy_and_its_gradient_against_float64(batch, classes, scale, masked, seed):
    torch.manual_seed(seed)
    logits = scale * torch.randn(batch, classes)
    logits[:, 1:][:, :masked] = -math.inf
    logits.requires_grad_()
    exact = logits.detach().double()
    p, log_p = exact.softmax(-1), F.log_softmax(exact, -1)
    reference = -torch.special.xlogy(p, p).sum(-1)
    close(entropy(logits).double(), reference)
    gradient = (-p * (log_p + reference.unsqueeze(-1))).nan_to_num(0)  # dH/dz_i = -p_i (log p_i + H)
    close(torch.autograd.grad(entropy(logits).sum(), logits)[0].double(), gradient, rtol=1e-4)
    assert entropy(logits.half()).dtype == torch.float32


def problem() -> tuple[nn.Module, dict, dict]:
    """A model of two tasks, loaders that end after three batches, and heads, one of which could be trained."""
    model, heads = upscale(*several(transformer)), {"a": nn.Linear(5, 3), "b": lambda z: 5 * z[:, :4]}
    set_router(model, randomised(Router(4, 2), 0.3))
    loaders = {task: [torch.randn(size, 2, 3) for _ in range(3)] for task, size in zip("ab", (4, 2))}
    return model, loaders, {task: lambda z, head=head: head(z.mean(1)) for task, head in heads.items()}


FORMS = {  # of a batch, and whether the rate is annealed, and the objective
    "inputs": (lambda x: x, True, entropy),
    "with labels": (lambda x: (x, torch.zeros(4)), True, lambda z: entropy(z).mean()),
    "by name": (lambda x: transformers.BatchEncoding({"input": x}), False, lambda z: z.square().mean()),
    "by name, with labels": (lambda x: [{"input": x}, "labels"], False, lambda z: z.square().mean(1)),
}


@pytest.mark.parametrize("form", FORMS)
def test_adapt_is_adam_on_the_sum_over_tasks_of_the_mean_of_the_objective(form):
    """Short loaders start again, gradients may be off, and heads are not trained."""
    (model, loaders, heads), (other, *_) = problem(), problem()
    batch, anneal, objective = FORMS[form]
    optimizer, means, seen = torch.optim.Adam(trained_parameters := [*other[1].mlp.router.parameters()]), [], []
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 1e-2 * ((1 + math.cos(math.pi * step / 5)) / 2 if anneal else 1)
        logits = {task: head(other(loaders[task][step % 3])) for task, head in heads.items()}
        gradient = torch.autograd.grad(sum(objective(z).mean() for z in logits.values()), trained_parameters)
        for p, grad in zip(trained_parameters, gradient):
            p.grad = grad
        optimizer.step()
        means.append((step + 1, {task: entropy(z).mean().item() for task, z in logits.items()}))

    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    model(loaders["a"][0]).sum().backward()  # gradients from before are forgotten
    given = {task: [batch(x) for x in batches] for task, batches in loaders.items()}
    options = dict(steps=5, lr=1e-2, objective=objective, anneal=anneal, on_step=lambda *step: seen.append(step))
    with torch.no_grad():
        history = adapt(model, given, heads, **options)
    close(seen, means)
    close(history, [sum(values.values()) / 2 for _, values in means])
    close(trained(model), trained(other), 1e-4)
    same({name: p for name, p in model.named_parameters() if name in before}, before)
    head = heads["a"].__defaults__[0]
    assert all(p.grad is None for p in (*model.parameters(), *head.parameters()))


def test_adapt_refuses_what_is_not_finite_and_leaves_the_routers_as_they_were():
    model, loaders, heads = problem()
    snapshots = [trained(model)]
    loaders["b"][2][0, 0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="at step 3"):
        adapt(model, loaders, heads, steps=4, lr=1e-2, on_step=lambda *_: snapshots.append(trained(model)))
    bad = {"a": lambda z: z[:, 0] + 0 * (z[:, 0] - z[:, 0].detach()).norm(dim=-1, keepdim=True).sqrt()}
    with pytest.raises(FloatingPointError, match="at step 1"):  # where the gradient alone is NaN
        adapt(model, {"a": loaders["a"]}, bad, steps=1)
    same(trained(model), snapshots[-1])
    assert len(snapshots) == 3


# ---- Looking at λ ----------------------------------------------------------------------------------------------------


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
    with pytest.raises(ZeroDivisionError), routing_weights(model):  # not hidden by "no router ran"
        1 / 0  # noqa: B018
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    with pytest.raises(RuntimeError, match="No router ran"), routing_weights(compiled):
        compiled(X)


# ---- Copies, files, recomputation, compilers, replicas, threads ------------------------------------------------------


def once(self, x: Tensor) -> Tensor:
    return self.b(torch.tanh(self.a(x)))


def recomputed(self, x: Tensor) -> Tensor:
    return checkpoint(lambda h: self.b(torch.tanh(h)), self.a(x), use_reentrant=False)


def pair(run=once, layer=None, seed: int = 0) -> WEMoE:
    make = lambda: Made(run, a=nn.Linear(4, 4), b=nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))  # noqa: E731
    return WEMoE(*several(make, 2, seed), randomised(Router(4, 2), 0.3), layer=layer)


def replica(module: nn.Module) -> nn.Module:
    """As torch.nn.parallel.replicate makes them: parameters become plain tensors."""
    twin = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        twin._modules[name] = child and replica(child)
    for name, p in module._parameters.items():
        setattr(twin, name, p if p is None else p * 1)
    return twin


DONE = {  # to a module: what then runs in its place
    "nothing": lambda module: module,
    "copied": copy.deepcopy,
    "saved": lambda module: pickle.loads(pickle.dumps(module)),
    "replicated": replica,
    "recomputed": lambda module: partial(checkpoint, module, use_reentrant=False),
    "a part compiled": lambda module: module.pretrained.compile(backend="eager") or module,
    "compiled": partial(torch.compile, backend="eager", fullgraph=True),
}


def two_passes(run, module: nn.Module) -> list[Tensor]:
    """Outputs, and gradients in inputs and in what is trained: of two passes before one backward pass."""
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    a, b = run(x), run(y)
    own = list(getattr(run, "parameters", list)())  # a replica has none, a checkpoint neither
    trained = (p for p in own or module.parameters() if p.requires_grad)
    return [a, b, *gradients(torch.cat([a, b.sin()]), x, y, *trained)]


@pytest.mark.parametrize("run", [once, recomputed])
@pytest.mark.parametrize("done", DONE)
def test_what_is_done_to_a_module_changes_no_output_and_no_gradient(done, run, layer):
    first, module = pair(layer=layer), pair(run, layer, seed=1)
    module.load_state_dict(first.state_dict())
    module(Y)  # λ of a pass does not stay behind
    close(two_passes(DONE[done](module), module), two_passes(first, first), 1e-4)


def test_a_merged_model_is_loaded_where_the_experts_are_not_and_exported():
    pretrained, finetuned = several(transformer)
    model, fresh = upscale(pretrained, finetuned), upscale(pretrained, [pretrained] * 2)
    fresh.load_state_dict(model.state_dict())
    same(fresh(X[..., :3]), model(X[..., :3]))
    close(torch.export.export(model, (X[..., :3],), strict=False).module()(Y[..., :3]), model(Y[..., :3]))


@pytest.mark.parametrize("replicate", [lambda module: module, replica])
def test_replicas_and_threads_keep_out_of_each_others_way(replicate):
    """nn.DataParallel gives each device a replica and a thread; a server's threads share one model."""
    module, inputs = pair(), [torch.randn(1 + i % 3, 5, 4) for i in range(20)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda x: gradients(replicate(module)(x), module), inputs))
    close(found, [gradients(module(x), module) for x in inputs], 1e-3)


def test_distributed_data_parallel_adapts_alike(tmp_path):
    (model, loaders, heads), (other, *_) = problem(), problem()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        adapt(nn.parallel.DistributedDataParallel(model, static_graph=True), loaders, heads, steps=3, lr=1e-2)
    finally:
        dist.destroy_process_group()
    adapt(other, loaders, heads, steps=3, lr=1e-2)
    close(trained(model), trained(other))


# ---- What is refused, each in one sentence that says what to do ------------------------------------------------------


def start(head=lambda z: z.mean(1), change=lambda model: None, loader=(X,), run=lambda self, x: self.mlp(x)) -> None:
    model = upscale(*several(lambda: parent(run)))
    change(model.mlp)
    adapt(model, {"a": loader}, {"a": head}, steps=2)


LINEAR, STATE, ONE = nn.Linear(2, 2), nn.Linear(2, 2).state_dict(), torch.ones(2)
LINEAR4, BIG = nn.Linear(4, 4), {"w": torch.full((2,), 6e4, dtype=torch.float16)}
MLP = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
TEXT_TOWER = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "mlp": nn.Linear(4, 4)})  # (tokens, samples, D)
REFUSED = [  # a part of the sentence, and what is called with which arguments
    ("'bias'", task_vector, LINEAR, nn.Linear(2, 2, False)),
    ("'more'", task_vector, STATE, STATE | {"more": ONE}),
    (r"'weight'.*\(2, .\).*\(2, .\)", task_vector, STATE, STATE | {"weight": torch.ones(2, 3)}),
    ("'state_dict'", task_vector, *[{"epoch": 3, "state_dict": STATE}] * 2),
    ("'module.w'.*prefix", task_vector, {"module.w": ONE}, {"w": ONE}),
    ("'q'.*int8", task_vector, {"w": ONE, "q": (0 * ONE).to(torch.int8)}, {"w": ONE, "q": ONE.to(torch.int8)}),
    ("state dicts are needed", task_vector, "a.pt", "b.pt"),
    ("lora", task_vector, *[{"q.lora_A.weight": torch.ones(1, 4), "q.lora_B.weight": torch.ones(4, 1)}] * 2),
    ("'w'.*finite", lambda: task_arithmetic(BIG, [task_vector(BIG, {"w": -BIG["w"]})])),
    ("'w'.*finite", task_arithmetic, BIG, [BIG], 1.0),
    ("'w'.*finite", lambda: task_arithmetic({"w": ONE / 0}, [task_vector({"w": ONE / 0}, {"w": ONE})])),
    ("λ", task_arithmetic, LINEAR, [STATE], [0.1, 0.2]),
    ("λ", task_arithmetic, LINEAR, [STATE] * 3, [0.1, 0.2]),
    ("depth=3", Router, 4, 2, 3),
    ("init_lambda=", Router, 4, 2, 0, [0.1, 0.2, 0.3]),
    (r"\(B, N, D\).*\(2, 5, 3\)", Router(4, 2), torch.ones(2, 5, 3)),
    (r"\(B, N, D\).*\(2, 4\)", Router(4, 2), torch.ones(2, 4)),  # a row for each token, it may be
    ("num_tasks=0", partial(upscale, modules="0"), MLP, []),
    (r"\(1, 3\)", lambda: WEMoE(LINEAR4, [LINEAR4], Fixed(torch.ones(3)))(X[:1])),
    ("in its WEMoE module", lambda: MergedLayer(LINEAR, [STATE])(ONE)),
    ("use_cache", lambda: WEMoE(LINEAR4, [LINEAR4] * 2, Fixed(LAM), layer=MergedLayer)(X, object())),
    ("batch_first", upscale, TEXT_TOWER, [TEXT_TOWER]),
    ("'mpl'", partial(upscale, modules="mpl"), MLP, [MLP]),
    ("'a'", lambda: adapt(problem()[0], {"a": [X[..., :3]]}, {"b": nn.Identity()})),
    ("'a'.*no batch", lambda: start(loader=[])),
    ("'a'.*no batch", lambda: start(loader=iter([X]))),  # when started again
    ("a loader and a head", lambda: adapt(problem()[0], {}, {})),
    *[("half precision", start, lambda z: z.mean(1), lambda mlp, dtype=dtype: mlp.router.to(dtype))
      for dtype in (torch.float16, torch.bfloat16)],
    *[("Logits of 'a'", start, lambda z, shape=shape: z.sum().expand(shape)) for shape in ((3,), (3, 1), (3, 2, 5))],
    ("no gradient", start, lambda z: z.mean(1).detach()),
    ("no gradient", partial(start, run=lambda self, x: x)),
    ("no gradient", partial(start, run=torch.no_grad()(lambda self, x: self.mlp(x)))),
    ("only constant", wemoe.unload, WEMoE(LINEAR, [LINEAR], Router(2, 1))),
]  # fmt: skip


@pytest.mark.parametrize("sentence, function, arguments", [(row[0], row[1], row[2:]) for row in REFUSED])
def test_refused_in_one_sentence(sentence, function, arguments):
    with pytest.raises((ValueError, RuntimeError), match=sentence) as refusal:
        function(*arguments)
    message = str(refusal.value)
    assert "\n" not in message and message.endswith((".", "?")) and len(message) < 400
