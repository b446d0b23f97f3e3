"""WEMoE: one multi-task model out of many fine-tuned ones, its MLP weights put together anew for every input.

A model fine-tuned on task t is the pre-trained model plus a *task vector*, τ_t = θ_t - θ_0. A merging method chooses
the coefficients λ in

    θ(x) = θ_0 + Σ_t λ_t(x) τ_t.

Weight averaging takes λ = 1/T, task arithmetic λ = 0.3. In a Weight-Ensembling Mixture of Experts (Tang et al., ICML
2024, arXiv 2402.00433) each MLP of a Transformer has a small *router*, which looks at the MLP's input and gives one λ
for each sample and task; everything else is merged by task arithmetic. The routers are trained without labels, by
minimising the entropy of what each task's classifier (its head) predicts:

    model = upscale(pretrained, {"cars": cars_model, "signs": signs_model})
    adapt(model, loaders={"cars": ..., "signs": ...}, heads={"cars": ..., "signs": ...})

Copy this file: it needs only torch, 2.4 or later. For an architecture that is new to you, run `verify` once. Where the
task of every input is known, load that task's own model instead; where the models were not fine-tuned from one
checkpoint, a sum of their weights means nothing.
Shapes: B samples, T tasks, N tokens, D hidden size, `...` any token or spatial axes. Equations are the paper's.
"""

import copy
import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

Model = nn.Module | Mapping[str, Tensor]  # a module or its state dict
Models = Iterable[Model] | Mapping[str, Model]  # in a list, or by task


def task_vector(pretrained: Model, finetuned: Model) -> dict[str, Tensor]:
    """τ = θ_t - θ_0 by name, of tensors of 16 to 64 bits, in the dtype and on the device of θ_0 (Eq. 1, Section 2.1).

    Raises ValueError, naming the entry, if the models differ in structure or cannot be subtracted.
    """
    pairs = _pairs(pretrained, finetuned).items()  # τ = 0 where they are equal, also infinite, as in a causal mask
    return {name: torch.where(q == p, 0, q - p).to(p.dtype) for name, (p, q) in pairs}


def task_arithmetic(pretrained: Model, task_vectors: Models, scaling: float | list[float] = 0.3) -> dict[str, Tensor]:
    """θ_0 + Σ_t λ_t τ_t as a new state dict (Section 3.1); `scaling` is λ, one number or one for each task.

    `task_vectors` may be a generator; with one λ for all, one is in memory at a time. Sums are in float32 or better.
    Raises ValueError if names, shapes or the number of λ differ, and for a sum that is not finite in the dtype of θ_0.
    """
    (theta_0,), vectors = _states([pretrained]), _states(task_vectors)
    lam = torch.as_tensor(scaling, dtype=torch.float64).tolist()  # one number, or a list
    if isinstance(lam, list) and len(vectors := list(vectors)) != len(lam):
        raise ValueError(f"There should be one λ for each of {len(vectors)} task vectors, got {len(lam)}.")
    weights = {name: p.detach() for name, p in theta_0.items() if _is_weight(p)}
    merged = {name: p.to(torch.promote_types(p.dtype, torch.float32), copy=True) for name, p in weights.items()}
    for tau, lam_t in zip(vectors, lam if isinstance(lam, list) else itertools.repeat(lam)):
        for p, entry in _pairs(merged, tau).values():
            p.add_(entry.to(p), alpha=lam_t)
    for name, p in weights.items():
        merged[name] = merged[name].to(p.dtype)
        if not (merged[name].isfinite() | (merged[name] == p)).all():
            raise ValueError(f"{name!r} would not be finite in {p.dtype}: a weight is not, or leaves its range.")
    return {name: merged[name] if name in merged else copy.deepcopy(p) for name, p in theta_0.items()}


class Router(nn.Module):
    """The routing weights λ of each sample: (B, N, D) -> (B, T), the mean over its tokens h of r(h) (Section 3.2).

    r(h) is W2 relu(W1 h + b1) + b2 at depth 2 (Eq. 3; W1 is (D, D)), W h + b at depth 1 (Eq. 8), b at depth 0 (Eq. 4):
    linear, neither a softmax nor clipped. As the last layer is linear, the mean is taken before it, which is faster.
    Weights start as normal(0, 0.01), the output bias as `init_lambda`, one number or one for each task. `parameters()`
    yields W1, b1, W2, b2 (or W, b; or b), in whose precision it runs, also under autocast.
    Raises ValueError for arguments that make no router and, unless its depth is 0, for inputs without tokens.
    """

    def __init__(self, hidden_size: int, num_tasks: int, depth: int = 2, init_lambda: float | list[float] = 0.3):
        super().__init__()
        start = torch.as_tensor(init_lambda, dtype=torch.float32).detach()
        if depth not in (0, 1, 2) or num_tasks < 1 or start.shape not in ((), (num_tasks,)):
            raise ValueError(f"No router has {depth=} (0, 1 or 2), {num_tasks=} and {init_lambda=} (one, or T).")
        self.hidden_size, self.num_tasks, self.depth = hidden_size, num_tasks, depth
        if depth == 0:
            self.bias = nn.Parameter(start.expand(num_tasks).clone())
            return
        hidden = [nn.Linear(hidden_size, hidden_size), nn.ReLU()] if depth == 2 else []
        self.layers = nn.Sequential(*hidden, nn.Linear(hidden_size, num_tasks))
        for linear in self.layers[::2]:  # not the ReLU
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)
        self.layers[-1].bias.data.copy_(start)

    def forward(self, h: Tensor) -> Tensor:
        if self.depth == 0:
            return self.bias.expand(len(h), -1)
        if h.dim() < 3 or h.shape[-1] != self.hidden_size:
            raise ValueError(f"A router of size {self.hidden_size} takes samples (B, N, D), not {tuple(h.shape)}.")
        with torch.autocast(h.device.type, enabled=False):
            tokens = h.flatten(1, -2).to(self.layers[-1].weight.dtype)  # (B, N, D)
            return self.layers[-1](self.layers[:-1](tokens).mean(1))  # at depth 1, layers[:-1] is empty


def with_weights(module: nn.Module, weights: Mapping[str, Tensor], path: str = "") -> nn.Module:
    """A copy of a module and its parts that shares all tensors but `weights`, which take the place of those named so.

    It stays as it is when a checkpoint recomputes in the backward pass. Buffers get no gradient, as batch norm asks.
    """
    used = object.__new__(type(module))  # what is set on it, λ or a cache, is not set on the module
    used.__dict__.update(module.__dict__, _compiled_call_impl=None)  # what was compiled is the original
    used.__dict__.update({n: weights[path + n] for n in module.__dict__ if path + n in weights})  # DataParallel's
    used._parameters = {n: weights.get(path + n, p) for n, p in module._parameters.items()}
    used._buffers = {n: b if b is None else weights.get(path + n, b).detach() for n, b in module._buffers.items()}
    parts = module._modules.items()
    used._modules = {n: None if part is None else with_weights(part, weights, f"{path}{n}.") for n, part in parts}
    return used


class _EachItsOwn(Tensor):
    """A weight read from outside; being a subclass, it turns off the fast path of nn.TransformerEncoderLayer."""


def _asked_of_pretrained(self: nn.Module, name: str):
    """What a routed module or a merged layer lacks is asked of the module in it, as mlp.c_fc.weight.dtype is.

    The numbers of a weight are NaN there: each sample has its own, and any would be wrong for some.
    """
    try:
        return nn.Module.__getattr__(self, name)
    except AttributeError:
        if name == "pretrained" or name.startswith("__"):
            raise
    value = getattr(self.pretrained, name)
    return value.new_full((), math.nan).expand_as(value).as_subclass(_EachItsOwn) if _is_weight(value) else value


class MergedLayer(nn.Module):
    """Any layer, with weights of its own for each sample: merge θ_0 + Σ_t λ_bt τ_t, run sample b, then the next one.

    `pretrained` holds θ_0; `lam` is set in the copy that a WEMoE module makes for one pass, never here. This loop over
    samples is the definition; MergedLinear, below, computes the same faster.
    """

    def __init__(self, pretrained: nn.Module, task_vectors: list[dict[str, Tensor]]):
        super().__init__()
        self.pretrained, self.names = pretrained.requires_grad_(False), list(task_vectors[0])
        taus = [torch.stack([tau[name] for tau in task_vectors]) for name in self.names]  # (T, *shape)
        self.taus = nn.ParameterList(nn.Parameter(tau, requires_grad=False) for tau in taus)
        self.lam = torch.empty(0, len(task_vectors))  # in a copy (B, T), or (1, T) for all samples

    __getattr__ = _asked_of_pretrained

    def tau(self, name: str, rows: slice = slice(None)) -> Tensor:
        """The task vectors of one tensor, or of these rows of it: (T, rows, ...)."""
        return self.taus[self.names.index(name)][:, rows]

    def weights(self, lam: Tensor) -> dict[str, Tensor]:
        """θ_0 + Σ_t λ_t τ_t by name, for λ (T,): merged in the precision of λ, returned in that of θ_0."""
        with torch.autocast(lam.device.type, enabled=False):
            theta_0 = {name: attrgetter(name)(self.pretrained) for name in self.names}
            tau = {name: torch.tensordot(lam, self.tau(name).to(lam.dtype), dims=1) for name in self.names}
            return {name: (p + tau[name]).to(p.dtype) for name, p in theta_0.items()}

    def forward(self, *args, **kwargs):
        if len(self.lam) == 1:  # one sample, or one λ for all
            return self.for_all(self.lam[0], *args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()]
        if len(self.lam) == 0 or not any(len(x) in (1, len(self.lam)) for x in tensors):  # or windows in the batch
            raise ValueError(f"λ of {len(self.lam)} samples: run in its WEMoE module, or split by layer=MergedLayer.")
        return self.for_each(self.lam, *args, **kwargs)

    def for_all(self, lam: Tensor, *args, **kwargs):
        """All samples through the weights merged with λ (T,)."""
        return with_weights(self.pretrained, self.weights(lam))(*args, **kwargs)

    def for_each(self, lam: Tensor, *args, **kwargs):
        """Sample b, alone, through the weights merged with λ_b, which are merged again in the backward pass."""
        outputs = []
        for b in range(len(lam)):
            one_args, one_kwargs = _sample(b, len(lam), (args, kwargs))
            outputs.append(checkpoint(self.for_all, lam[b], *one_args, use_reentrant=False, **one_kwargs))
        return tree_map(lambda *ys: torch.cat(ys) if isinstance(ys[0], Tensor) and ys[0].dim() else ys[0], *outputs)


class WEMoE(nn.Module):
    """A module whose weights depend on its input (Eq. 2): sample b runs through θ_0 + Σ_t λ_t(h_b) τ_t.

        h (B, N, D) ──► router ──► λ (B, T) ──► every layer: θ_0 + Σ_t λ_bt τ_t, weights for each sample
             └───────────────────────────────────► the module, made of these layers ──► its output

    `pretrained` is any module whose forward takes a tensor (B, ..., D) first, `finetuned` are T modules of the same
    structure or their state dicts, and `router` maps that input to λ (B, T), or (1, T) for all samples; where it has a
    `depth` of 0, λ is constant. Only the router is trainable. Attributes: `router`, and `pretrained`, now the module
    in which each nn.Linear is a `layer`, by default a MergedLinear, and any other part with weights of its own a
    MergedLayer. With `layer=MergedLayer` it becomes one as a whole, as is needed where it reshapes the batch (windows,
    experts). What a module stores on itself in `forward` is lost: it runs in a copy made for the pass.
    Raises ValueError if the modules differ in structure, and in a pass if λ is not (B, T) or (1, T).
    """

    def __init__(self, pretrained: nn.Module, finetuned: Models, router: nn.Module, *, layer: Callable | None = None):
        super().__init__()
        vectors = [task_vector(pretrained, state) for state in _states(finetuned)]

        def merged_layer(part: nn.Module, prefix: str) -> nn.Module | None:
            taus = [{k.removeprefix(prefix): v for k, v in tau.items() if k.startswith(prefix)} for tau in vectors]
            linear = type(part) is nn.Linear and not (part._forward_pre_hooks or part._forward_hooks)
            if linear or layer is MergedLayer or any("." not in name for name in taus[0]):  # weights of its own
                return ((layer or MergedLinear) if linear else MergedLayer)(part, taus)

        self.router, self.num_tasks = router, len(vectors)
        self.routing = nn.Identity()  # λ passes through it, where routing_weights sees it
        self.pretrained = _replace(copy.deepcopy(pretrained).requires_grad_(False), merged_layer)
        self.input_name = next(iter(inspect.signature(pretrained.forward).parameters), "")

    def forward(self, *args, **kwargs):
        h = args[0] if args else kwargs[self.input_name]  # (B, ..., D)
        lam = self.routing(self.router(h))  # (B, T), or (1, T) for all samples
        if lam.shape not in ((len(h), self.num_tasks), (1, self.num_tasks)):
            raise ValueError(f"λ is {tuple(lam.shape)} for an input {tuple(h.shape)} and {self.num_tasks} tasks.")
        used = with_weights(self.pretrained, {})  # a copy: λ belongs to this pass, its threads and recomputations
        for part in used.modules():
            if isinstance(part, MergedLayer):
                part.lam = lam[:1] if getattr(self.router, "depth", None) == 0 else lam  # equal rows: merge once
        return used(*args, **kwargs)

    __getattr__ = _asked_of_pretrained


MLP = r"(^|\.)(mlp|DenseReluDense)$"  # so it is called by open_clip, timm, torchvision and much of Hugging Face


def upscale(
    pretrained: nn.Module,
    finetuned: Models,
    *,
    init_lambda: float | list[float] = 0.3,
    router_depth: int = 2,
    modules: str | Callable[[str, nn.Module], bool] = MLP,
    layer: Callable | None = None,
) -> nn.Module:
    """One model for T tasks: selected modules become WEMoE modules, all else is merged by task arithmetic (Figure 1a).

    `finetuned` holds the T models or their state dicts, in a list or by task; they are not modified. `init_lambda` is λ
    of task arithmetic, and where routing weights start, one number or one for each task; `router_depth` is that of
    Router, `layer` that of WEMoE. `modules` says which to route: a regular expression to be found in a module's name,
    or a predicate (name, module) -> bool; of modules within one another, the outermost is routed.
    Raises ValueError if no module is selected, or if the models differ in structure or cannot be upscaled.
    """
    states = list(_states(finetuned))
    wanted = modules if callable(modules) else lambda name, _: re.search(modules, name)

    def routed(_, prefix: str) -> WEMoE | None:  # made of θ_0: the part in `upscaled` is merged already
        name = prefix[:-1]
        module, parent = pretrained.get_submodule(name), pretrained.get_submodule(name.rpartition(".")[0])
        weight = next(filter(_is_weight, module.state_dict().values()), None)
        if weight is None or not wanted(name, module):
            return None
        if any(isinstance(part, nn.MultiheadAttention) and not part.batch_first for part in parent.modules()):
            raise ValueError(f"Attention in or beside {name!r} has batch_first=False: λ would mix samples.")
        parts = [{k.removeprefix(prefix): p for k, p in state.items() if k.startswith(prefix)} for state in states]
        in_sizes = (getattr(part, "in_features", getattr(part, "nx", 0)) for part in module.modules())  # nx: GPT-2's
        router = Router(next(filter(None, in_sizes), (0, *weight.shape)[-1]), len(states), router_depth, init_lambda)
        router.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        return WEMoE(module, parts, router, layer=layer)

    upscaled = copy.deepcopy(pretrained).requires_grad_(False)
    vectors = (task_vector(pretrained, state) for state in states)
    upscaled.load_state_dict(task_arithmetic(pretrained, vectors, init_lambda))
    upscaled = _replace(upscaled, routed)
    if not any(isinstance(part, WEMoE) for part in upscaled.modules()):
        raise ValueError(f"{modules!r} selects no module with weights of {[*dict(pretrained.named_modules())][1:20]}.")
    return upscaled


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of softmax(logits) (Eq. 5), (..., C) -> (...), in nats; exact where the softmax is 0 or 1."""
    log_p = F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return -(log_p.exp() * log_p.clamp_min(-1e38)).sum(-1)  # 0 · -inf would be NaN


def adapt(
    model: nn.Module,
    loaders: Mapping[str, Iterable],
    heads: Mapping[str, Callable[..., Tensor]],
    *,
    steps: int = 1000,
    lr: float = 1e-4,
    objective: Callable[[Tensor], Tensor] = entropy,
    anneal: bool = True,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> list[float]:
    """Train the routers, in place and without labels, to make the model's predictions certain (Section 3.3).

    Each step takes one batch of every task and descends the sum over tasks of the objective by Adam, task by task, so
    that memory does not grow with their number.

    Args:
        model: an upscaled model, or one in DistributedDataParallel. What requires gradients in it is trained.
        loaders: task -> iterable of batches, started again when exhausted: the model's input, its arguments by name, or
            (input, labels), of which the labels are not looked at.
        heads: task -> callable from the model's output to logits (B, C); they are not trained.
        steps, lr: number of steps, and first learning rate (the paper's are 1000 and 1e-4, at 16 images a task).
        objective: what is minimised in the mean over a batch, a function of one task's logits (Eq. 6).
        anneal: whether a cosine takes the learning rate to zero, as the paper's does, or it is constant.
        on_step: called after each step with its number, from 1, and the mean entropy of every task.

    Returns the mean entropy over all tasks, in nats, at each step before its update. Raises ValueError for what cannot
    be trained; FloatingPointError, before the update, if an entropy or a gradient is not finite.
    """
    routers = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trainable = list(routers.values())
    if any(p.dtype.itemsize < 4 for p in trainable):
        raise ValueError("In half precision (bfloat16, float16) routers do not move: keep them in float32.")
    if not loaders or loaders.keys() - heads.keys():
        raise ValueError(f"Each task needs a loader and a head: got {sorted(loaders)} and {sorted(heads)}.")
    adam = torch.optim.Adam(trainable, lr)
    cosine = torch.optim.lr_scheduler.LambdaLR(adam, lambda k: (1 + math.cos(math.pi * k / steps)) / 2 if anneal else 1)
    # Not cycle(), which keeps all batches: a loader is started again when it is exhausted, at most once a step.
    batches = {task: itertools.chain.from_iterable(itertools.repeat(loaders[task], steps)) for task in loaders}
    history = []
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is in
        for step in range(1, steps + 1):
            adam.zero_grad()
            by_task = {}  # the mean entropy, whatever the objective is
            for task in loaders:
                batch = next(batches[task], None)
                if batch is None:
                    raise ValueError(f"The loader of {task!r} has no batches left: give a list or a DataLoader.")
                logits = heads[task](_run(model, batch))
                if logits.dim() != 2 or logits.shape[1] < 2:
                    raise ValueError(f"Logits of {task!r} should be (B, C) with C > 1, not {tuple(logits.shape)}.")
                loss = objective(logits).mean()
                if not loss.requires_grad:
                    raise ValueError(f"The loss of {task!r} gives no gradient: is its head, or a part, in no_grad?")
                loss.backward(inputs=trainable)  # and leave heads alone
                by_task[task] = entropy(logits.detach()).mean().item()
            if missing := [name for name, p in routers.items() if p.grad is None]:
                raise ValueError(f"{missing[0]!r} has no gradient: is its module not called, or in no_grad?")
            if not all(map(math.isfinite, by_task.values())) or not all(p.grad.isfinite().all() for p in trainable):
                raise FloatingPointError(f"An entropy or a gradient is not finite at step {step}: {by_task}.")
            adam.step()
            cosine.step()
            history.append(sum(by_task.values()) / len(by_task))
            if on_step is not None:
                on_step(step, by_task)
    adam.zero_grad()
    return history


# ======================================================================================================================
# The method ends here. Below: looking at λ, unloading, verifying; helpers of the method that do what they say; speed.


@contextmanager
def routing_weights(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the routing weights (B, T) of the last forward pass, for each WEMoE module of `model` by its name.

    `with routing_weights(model) as weights: model(images)`. RuntimeError at the end of the block if no router ran.
    """
    weights: dict[str, Tensor] = {}
    handles = [
        module.routing.register_forward_hook(lambda _, _in, lam, name=name: weights.update({name: lam.detach()}))
        for name, module in model.named_modules()
        if isinstance(module, WEMoE)
    ]
    try:
        yield weights
    finally:
        for handle in handles:
            handle.remove()
    if handles and not weights:
        raise RuntimeError("No router ran that could be recorded: is the model compiled? Record before it is.")


@torch.no_grad()
def unload(model: nn.Module) -> nn.Module:
    """A copy in which constant routers are merged once and for all (Appendix B.3); ValueError if depth is not 0."""

    def unloaded(module: nn.Module, prefix: str, lam: Tensor | None = None) -> nn.Module | None:
        if isinstance(module, WEMoE):
            if getattr(module.router, "depth", None) != 0:
                raise ValueError(f"The router of {prefix!r} looks at its input: only constant ones can be unloaded.")
            return _replace(module.pretrained, lambda part, at: unloaded(part, at, module.router.bias))
        if isinstance(module, MergedLayer):
            weights = {name: nn.Parameter(w, requires_grad=False) for name, w in module.weights(lam).items()}
            return with_weights(module.pretrained, weights)

    return _replace(copy.deepcopy(model), unloaded)


@torch.no_grad()
def verify(pretrained: nn.Module, finetuned: Models, batch, **options) -> None:
    """Prove on a batch of two samples or more that `upscale(pretrained, finetuned, **options)` is what it claims to be.

    (1) With λ one-hot, it is fine-tuned model t, for each t. (2) With random routers, each of them ran and gave one row
    of λ for each sample, and a sample's outputs are finite, and the same alone as in the batch. `batch` is the model's
    input, or its arguments by name; no other axis should have its size. Tolerance: sqrt(eps) times the largest output.
    Raises AssertionError, saying which part of the claim does not hold, and by how much.
    """

    def outputs(model: nn.Module, x, rows: int) -> Tensor:  # all numbers that it gives for each of these samples
        leaves = [leaf for leaf in tree_leaves(_run(model, x)) if _is_weight(leaf) and leaf.dim()]
        return torch.cat([leaf.reshape(rows, -1) for leaf in leaves if len(leaf) == rows], 1)

    def same(y: Tensor, target: Tensor, where: str) -> None:
        assert y.shape == target.shape, f"{where}, outputs are {tuple(y.shape)}, not {tuple(target.shape)}."
        off, most = (y - target).abs().max().item(), target.abs().max().item()
        assert off <= torch.finfo(y.dtype).eps ** 0.5 * most, f"{where}, outputs are off by {off:.2g}, of {most:.2g}."

    models = list(getattr(finetuned, "values", lambda: finetuned)())
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    count = len(next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)))
    for t, (model, state) in enumerate(zip(models, _states(models))):
        expert = copy.deepcopy(model if isinstance(model, nn.Module) else pretrained).eval()
        expert.load_state_dict(state)
        one_hot = {"init_lambda": [float(i == t) for i in range(len(models))], "router_depth": 0}
        upscaled = upscale(pretrained, models, **options | one_hot).eval()
        same(outputs(upscaled, batch, count), outputs(expert, batch, count), f"With λ = 1 for model {t} alone")
    upscaled = upscale(pretrained, models, **options).eval()
    generator = torch.Generator().manual_seed(0)
    for p in (p for p in upscaled.parameters() if p.requires_grad):
        p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)
    with routing_weights(upscaled) as weights:
        together = outputs(upscaled, batch, count)
        for name in (name for name, module in upscaled.named_modules() if isinstance(module, WEMoE)):
            rows = len(weights.get(name, ()))
            assert rows == count > 1, f"Router {name!r} gave {rows} rows of λ (0: it did not run) for {count} samples."
    for b in range(count):
        same(outputs(upscaled, _sample(b, count, batch), 1), together[b : b + 1], f"With random λ, sample {b} alone")


def _states(models: Models) -> Iterator[Mapping[str, Tensor]]:
    """The state dicts of models, or task vectors, that are given in a list or by task."""
    for model in models.values() if hasattr(models, "values") else models:
        if not isinstance(model, nn.Module | Mapping):
            raise ValueError(f"Models or their state dicts are needed, in a list or by task, got a {type(model)}.")
        yield model.state_dict() if isinstance(model, nn.Module) else model


def _is_weight(p: object) -> bool:
    return isinstance(p, Tensor) and p.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _pairs(pretrained: Model, other: Model) -> dict[str, tuple[Tensor, Tensor]]:
    """Two models' weights by name, on the device of the first. Raises ValueError for what cannot be merged."""
    (theta_0, theta_t), pairs = _states([pretrained, other]), {}
    for name in dict.fromkeys([*theta_0, *theta_t]):
        p, q = (state[name].detach() if isinstance(state.get(name), Tensor) else None for state in (theta_0, theta_t))
        both, num_floats = p is not None and q is not None, _is_weight(p) + _is_weight(q)
        alike = both and p.shape == q.shape
        if alike and num_floats == 2 and not re.search(r"(^|[._])(lora|hada|lokr)_", name):
            pairs[name] = p, q.to(p.device)
        elif (both or num_floats) and not (alike and (p.dim() == 0 or (p == q.to(p.device)).all())):  # counters differ
            one, two = ("missing" if x is None else f"{x.dtype} of shape {tuple(x.shape)}" for x in (p, q))
            raise ValueError(f"{name!r} is {one} in the pre-trained model, {two} in the other (a prefix? an adapter?).")
    if not pairs:
        raise ValueError(f"No tensors in floating point (16 to 64 bits), as a checkpoint has, in {[*theta_0][:5]}.")
    return pairs


def _run(model: nn.Module, batch):
    """What the model makes of a batch: its input, or its arguments by name, or either with labels, (input, labels)."""
    x, device = batch[0] if isinstance(batch, tuple | list) else batch, next(model.parameters()).device
    x = dict(x) if isinstance(x, Mapping) else x
    x = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, x)
    return model(**x) if isinstance(x, dict) else model(x)


def _replace(part: nn.Module, change: Callable[[nn.Module, str], nn.Module | None], prefix: str = "") -> nn.Module:
    """Put change(part, prefix) in a part's place, or, if it is None, go on inside; prefix is "" or ends in a dot."""
    if (new := change(part, prefix)) is not None:
        return new
    for name, child in part._modules.items():
        part._modules[name] = None if child is None else _replace(child, change, f"{prefix}{name}.")
    return part


def _sample(b: int, count: int, arguments):
    """What sample b of so many gets of arguments: its row of a tensor (B, ...), all of a number or a name."""
    if odd := [x for x in tree_leaves(arguments) if not isinstance(x, Tensor | bool | int | float | str | None)]:
        raise ValueError(f"A {type(odd[0])} cannot be split among samples: leave it out, as use_cache=False does.")
    return tree_map(lambda x: x[b : b + 1] if isinstance(x, Tensor) and x.dim() and len(x) == count else x, arguments)


# ---- What makes it fast: linear layers, merged and applied tile by tile ----------------------------------------------


class MergedLinear(MergedLayer):
    """A linear layer with weights of its own for each sample; see MergedLayer. It has first derivatives only."""

    def for_each(self, lam: Tensor, input: Tensor) -> Tensor:
        device, bias = input.device.type, self.pretrained.bias
        cast = torch.is_autocast_enabled(device) and input.dtype != torch.float64
        x = input.to(torch.get_autocast_dtype(device)) if cast else input
        with torch.autocast(device, enabled=False):
            tokens = x.expand(len(lam), *x.shape[1:]).reshape(len(lam), -1, x.shape[-1])  # (B, N, D_in)
            parts = zip(tokens.split(16), lam.split(16))  # so many samples are merged at a time
            y = torch.cat([_MergedProduct.apply(*part, self) for part in parts])
            if bias is not None:
                y = y + (bias + lam @ self.tau("bias").to(lam.dtype)).to(y.dtype)[:, None]  # (B, 1, D_out)
        return y.view(len(lam), *x.shape[1:-1], -1)


class _MergedProduct(torch.autograd.Function):
    """y_b = x_b W_b^T, W_b = θ_0 + Σ_t λ_bt τ_t: x (B, N, D_in), λ (B, T) -> y (B, N, D_out), with first derivatives.

    For some rows at a time, one matrix product merges and a batch of them applies; again in the backward pass, so that
    memory never holds B sets of weights.
    """

    @staticmethod
    def forward(ctx, x: Tensor, lam: Tensor, layer: MergedLinear) -> Tensor:
        ctx.save_for_backward(x, lam)
        ctx.layer = layer
        return torch.cat([x @ w.to(x.dtype).mT for _, w, _ in _tiles(lam, layer)], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        x, lam = ctx.saved_tensors
        dx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None  # not where nothing before it is trained
        dlam = torch.zeros_like(lam)
        for rows, w, tau in _tiles(lam, ctx.layer):
            if dx is not None:
                dx += dy[..., rows] @ w.to(x.dtype)
            dw = (dy[..., rows].mT @ x).to(lam.dtype)  # (B, rows, D_in)
            dlam += dw.flatten(1) @ tau.mT  # <dw_b, τ_t>
        return dx, dlam, None


def _tiles(lam: Tensor, layer: MergedLinear) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Parts of θ_0 + Σ_t λ_bt τ_t: which rows, w (B, rows, D_in), and τ (T, rows · D_in).

    Every tile overwrites the one before (memory that is new to the process is slow): use w before the next. For 16
    samples in float32 it has 6 MiB on a CPU, where it is to stay in the cache, and 256 MiB on a GPU.
    """
    lam, theta_0 = lam.detach(), layer.pretrained.weight.to(lam.dtype)
    height, width = theta_0.shape
    step = max(1, (128 * 768 if lam.device.type == "cpu" else 4096 * 1024) // width)
    memory = lam.new_empty(len(lam) * min(step, height) * width)
    for rows in (slice(i, i + step) for i in range(0, height, step)):
        flat, tau = theta_0[rows].flatten(), layer.tau("weight", rows).flatten(1).to(lam.dtype)
        w = memory[: len(lam) * len(flat)].view(len(lam), -1)
        yield rows, torch.addmm(flat, lam, tau, out=w).view(len(lam), -1, width), tau
