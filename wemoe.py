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

Copy this file: it needs only torch, 2.4 or later, and Python 3.10. When *not* to use it: if the task of every input is
known, load that task's own model; if the models were not fine-tuned from one checkpoint, a sum of their weights means
nothing.
Shapes: B samples, T tasks, N tokens, D hidden size, `...` any token or spatial axes. Equations are the paper's.

The first half of the file is the method. Of the second half, which can be left unread, it calls, besides helpers whose
names tell what they do:

    _matching_weights   both models' floating-point tensors by name, or a ValueError
    _check_…, check_…, _finite      refuse what cannot work, in one sentence
    _live_state, _members           a model's tensors, not copied, by name; models given in a list or by task
    _part               below a name, the part of a module, or the entries of a state dict or task vector
    by_path             a task vector by the paths of attributes, which are not always the names in a state dict
    _run_with           runs a shallow copy of a module (tensors are shared), whose merged layers hold λ
    _begin_pass         refuses what has not B samples; in this pass, batch norm uses its running statistics
    _with_weights       a shallow copy of a layer, with other tensors in it, as functional_call would see it
    _of_sample, _join   the arguments of sample b alone; one output of all samples
    _refuse             a hook: no part of a merged layer runs but in a copy, with merged weights
    _replace            puts change(part) in a part's place, outermost first; where it is None, goes on inside the part
    _swap_hooks         moves hooks from a layer to its wrapper, or back
    _reach_inside       finds in the wrapped module what the wrapper lacks
    MergedLinear        a subclass of MergedLayer and nn.Linear: the same result for linear layers, faster
"""

import copy
import functools
import inspect
import itertools
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

Model = nn.Module | Mapping[str, Tensor]  # a module or its state dict
Models = Iterable[Model] | Mapping[str, Model]  # in a list, or by task

# ---- Task vectors ----------------------------------------------------------------------------------------------------


def task_vector(pretrained: Model, finetuned: Model) -> dict[str, Tensor]:
    """τ = θ_t - θ_0 by name, in the dtype and on the device of θ_0 (Definition 2.1, Eq. 1).

    τ has an entry for each floating-point parameter and buffer of 16 to 64 bits; integers (counters, say) are skipped.
    Raises ValueError, naming the entry, if the models differ in structure or cannot be subtracted.
    """
    theta_0, theta_t = _matching_weights(pretrained, finetuned, "the fine-tuned model")  # detached, of the same names
    return {name: (theta_t[name].to(p.device) - p).to(p.dtype) for name, p in theta_0.items()}


def task_arithmetic(pretrained: Model, task_vectors: Models, scaling: float | list[float] = 0.3) -> dict[str, Tensor]:
    """θ_0 + Σ_t λ_t τ_t as a new state dict (Section 3.1); `scaling` is λ, one number or one for each task.

    `task_vectors` may be a generator: with one λ for all, only one is in memory at a time. Sums are accumulated in
    float32 or better and returned in the dtype of θ_0; what task vectors skip is copied. Inputs are not modified.
    Raises ValueError if there is not one finite λ for each task, for a model in the place of its task vector, and if a
    task vector's names or shapes are not those of θ_0.
    """
    vectors = _members(task_vectors)
    scalings = torch.as_tensor(scaling, dtype=torch.float64).tolist()  # a float, or a list of floats
    if isinstance(scalings, float):
        scalings = itertools.repeat(scalings)
    else:
        vectors = list(vectors)
        if len(vectors) != len(scalings):
            raise ValueError(f"Got {len(scalings)} scaling factors for {len(vectors)} task vectors.")
    theta_0 = _live_state(pretrained)
    merged = {name: p.detach().to(_at_least_float32(p), copy=True) for name, p in theta_0.items() if _is_weight(p)}
    for tau, lam in zip(vectors, scalings):
        _check_term(tau, lam)
        _, entries = _matching_weights(merged, tau, "a task vector")
        for name, entry in entries.items():
            merged[name].add_(entry.to(merged[name]), alpha=lam)
    return {name: merged[name].to(p.dtype) if name in merged else copy.deepcopy(p) for name, p in theta_0.items()}


# ---- The router ------------------------------------------------------------------------------------------------------


class Router(nn.Module):
    """The routing weights λ of each sample: (B, ..., D) -> (B, T), the mean over its tokens h of r(h) (Section 3.2).

    r(h) is W2 relu(W1 h + b1) + b2 at depth 2 (Eq. 3; W1 is (D, D)), W h + b at depth 1 (Eq. 8), b at depth 0 (Eq. 4).
    The output is linear, neither a softmax nor clipped; for speed, the mean is taken before the last layer, which makes
    no difference. Weights start as normal(0, 0.01) and the output bias as `init_lambda`: routing starts near task
    arithmetic. `parameters()` yields W1, b1, W2, b2 (or W, b; or b).
    With a `mask` (B, N), the mean is that of the tokens where it is not zero.
    Raises ValueError for arguments that make no router and, unless its depth is 0, for inputs that are not (B, ..., D)
    in floating point.
    """

    def __init__(self, hidden_size: int, num_tasks: int, depth: int = 2, init_lambda: float = 0.3):
        super().__init__()
        if depth not in (0, 1, 2) or num_tasks < 1 or (depth and hidden_size < 1) or not math.isfinite(init_lambda):
            found = f"{depth=}, {num_tasks=}, {hidden_size=}, {init_lambda=}"
            raise ValueError(f"A router has depth 0, 1 or 2, tasks, features and a finite start, not {found}.")
        self.hidden_size, self.num_tasks, self.depth = hidden_size, num_tasks, depth
        if depth == 0:
            self.bias = nn.Parameter(torch.full((num_tasks,), float(init_lambda)))
            return
        hidden = [nn.Linear(hidden_size, hidden_size), nn.ReLU()] if depth == 2 else []
        self.layers = nn.Sequential(*hidden, nn.Linear(hidden_size, num_tasks))
        for linear in self.layers[::2]:  # not the ReLU
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)
        nn.init.constant_(self.layers[-1].bias, init_lambda)

    def forward(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.depth == 0:
            return self.bias.expand(len(h), -1)
        if h.dim() < 2 or h.shape[-1] != self.hidden_size or not h.is_floating_point():
            found = f"{tuple(h.shape)} of {h.dtype}"
            raise ValueError(f"The router takes features (B, ..., {self.hidden_size}) in floating point, got {found}.")
        tokens = h[:, None] if h.dim() == 2 else h.flatten(1, -2)  # (B, N, D)
        hidden = self.layers[:-1](tokens.to(self.layers[-1].weight.dtype))  # at depth 1, layers[:-1] is empty
        mean = hidden.mean(1) if mask is None else _masked_mean(hidden, mask)
        return self.layers[-1](mean)


# ---- The merged layer and the routed module --------------------------------------------------------------------------


class MergedLayer(nn.Module):
    """Any layer, with weights of its own for each sample: merge θ_0 + Σ_t λ_bt τ_t, run sample b, then the next one.

    `layer` holds θ_0, `vectors` are its T task vectors. `lam` is set only in a copy that is made for one pass
    (_run_with), so that a forward pass that is run again in the backward pass (activation checkpointing) finds its own.
    This loop over samples is the definition; MergedLinear computes the same faster.
    """

    def __init__(self, layer: nn.Module, vectors: list[dict[str, Tensor]]):
        nn.Module.__init__(self)  # MergedLinear is an nn.Linear, too, whose own __init__ would make new weights
        self.layer, self.training = layer, layer.training
        self.lam: Tensor | None = None  # (B, T), or (1, T) for all samples; set in copies only
        self.names, taus = _stack(layer, vectors)  # name -> i, and tau_i is its τ (T, *shape); tied names share i
        for i, tau in enumerate(taus):  # not as buffers, which DistributedDataParallel would send around
            self.register_parameter(f"tau_{i}", nn.Parameter(tau, requires_grad=False))
        _swap_hooks(self)  # the layer's hooks are to run here, once, and see all samples
        for part in layer.modules():
            part.register_forward_pre_hook(_refuse)  # to run by itself, with θ_0

    def tau(self, i: int) -> Tensor:
        return getattr(self, f"tau_{i}")

    def delta(self, lam: Tensor, i: int) -> Tensor:
        """Σ_t λ_t τ_t of the i-th tensor, for λ (T,)."""
        return torch.tensordot(lam.to(self.tau(i)), self.tau(i), dims=1)

    def weights(self, lam: Tensor) -> dict[str, Tensor]:
        """θ_0 + Σ_t λ_t τ_t by name, for λ (T,)."""
        weights = {}
        with torch.autocast(lam.device.type, enabled=False):  # weights are merged in their own precision
            for name, i in self.names.items():
                theta_0 = operator.attrgetter(name)(self.layer)
                weights[name] = theta_0 + self.delta(lam, i).to(theta_0)
        return weights

    def forward(self, *args, **kwargs):
        _begin_pass(self, _first_tensor(args, kwargs))
        if len(self.lam) == 1:
            return self.for_all(self.lam[0], *args, **kwargs)
        return self.for_each(self.lam, *args, **kwargs)

    def for_all(self, lam: Tensor, *args, **kwargs):
        """All samples through the weights merged with λ (T,)."""
        return _with_weights(self.layer, self.weights(lam))(*args, **kwargs)

    def for_each(self, lam: Tensor, *args, **kwargs):
        """Sample b, alone, through the weights merged with λ_b."""
        outputs = []
        for b in range(len(lam)):
            one_args, one_kwargs = _of_sample(b, len(lam), args, kwargs)
            # Merged weights are not kept, but merged again in the backward pass.
            outputs.append(checkpoint(self.for_all, lam[b], *one_args, use_reentrant=False, **one_kwargs))
        return tree_map(_join, *outputs)

    def __getattr__(self, name: str):
        return _reach_inside(self, "layer", name)


class WEMoE(nn.Module):
    """A module whose weights depend on its input (Eq. 2): sample b runs through θ_0 + Σ_t λ_t(h_b) τ_t.

        h (B, ..., D) ──► router ──► λ (B, T) ──► every layer: θ_0 + Σ_t λ_bt τ_t, weights for each sample
              └────────────────────────────────────► the module, made of these layers ──► its output

    `pretrained` is any module whose first input is a tensor (B, ..., D); `finetuned` are T modules of the same
    structure, or their state dicts. `router` maps that input to λ (B, T), or (1, T) for all samples, and takes the
    keyword `mask` if set_token_mask is used; if it has a `depth` of 0, λ is constant. Only the router is trainable.
    In the module, each nn.Linear becomes a `layer`, by default a MergedLinear, and any other part with weights of its
    own a MergedLayer. With `layer=MergedLayer`, the whole module becomes one, as is needed where it reshapes the batch
    (windows, beams).
    Attributes: `router`, and `pretrained`, the module with merged layers (of θ_0 and all τ) in it.
    Raises ValueError if the modules differ in structure or in number from the routing weights, or if a module cannot
    run with weights from outside.
    """

    def __init__(self, pretrained: nn.Module, finetuned: Models, router: nn.Module, *, layer: Callable | None = None):
        super().__init__()
        check_mergeable(pretrained)
        _check_batch_first(pretrained)
        module = copy.deepcopy(pretrained).requires_grad_(False)
        vectors = [by_path(module, task_vector(pretrained, model)) for model in _members(finetuned)]
        self.num_tasks = getattr(router, "num_tasks", len(vectors))
        if len(vectors) == 0 or len(vectors) != self.num_tasks:
            raise ValueError(f"WEMoE got {len(vectors)} fine-tuned modules for a router with {self.num_tasks} outputs.")
        path_of = {part: path for path, part in module.named_modules()}

        def merged_layer(part: nn.Module) -> nn.Module | None:
            its_vectors = [_part(vector, path_of[part]) for vector in vectors]
            # Not where the weights are computed, from "weight_orig" say, or where there are more.
            if type(part) is nn.Linear and its_vectors[0].keys() in ({"weight"}, {"weight", "bias"}):
                return (layer or MergedLinear)(part, its_vectors)
            return MergedLayer(part, its_vectors) if _has_own_weights(part, its_vectors[0]) else None

        whole = layer is MergedLayer
        self.pretrained = MergedLayer(module, vectors) if whole else _replace(module, merged_layer)
        self.router = router
        self.training = pretrained.training
        self.routing = _Routing()  # returns its λ; hooks on it record λ, or replace it
        # Padding masks (B, N) of texts: what the model was called with, or else what set_token_mask was.
        self.attention_mask, self.mask = None, None

    def route(self, h: Tensor) -> Tensor:
        """λ (B, T) for the input (B, ..., D), or (1, T) where all samples share one, so that layers merge once."""
        if len(h) == 0:
            return h.new_zeros(1, self.num_tasks, dtype=torch.float32)  # no sample to merge for
        mask = _mask_of(self, h)  # None but for texts
        lam = self.router(h) if mask is None else self.router(h, mask=mask)
        constant = getattr(self.router, "depth", None) == 0
        lam = self.routing(lam[:1] if constant else lam, h)
        if lam.shape not in ((len(h), self.num_tasks), (1, self.num_tasks)):
            raise ValueError(f"The routing weights are {tuple(lam.shape)} for an input {tuple(h.shape)}.")
        return lam

    def forward(self, *args, **kwargs):
        lam = self.route(_first_tensor(args, kwargs))
        return _run_with(lam, self.pretrained, args, kwargs)

    def __getattr__(self, name: str):
        return _reach_inside(self, "pretrained", name)


# ---- Upscaling -------------------------------------------------------------------------------------------------------


def upscale(
    pretrained: nn.Module,
    finetuned: Models,
    *,
    init_lambda: float = 0.3,
    router_depth: int = 2,
    modules: str | Callable[[str, nn.Module], bool] | None = None,
    layer: Callable | None = None,
) -> nn.Module:
    """One model for T tasks: selected modules become WEMoE modules, all else is merged by task arithmetic (Figure 1a).

    `finetuned` holds the T models or their state dicts, in a list or by task; neither they nor `pretrained` are
    modified. `init_lambda` is λ of task arithmetic, and where routing weights start; `router_depth` is that of Router.
    `modules` says which to route: None, the MLPs by the names that open_clip, timm, torchvision and many models of
    Hugging Face give them; a regular expression to be found in a module's name; or a predicate (name, module) -> bool.
    Of modules within one another, the outermost is routed. `layer` is that of WEMoE. In the result, only routers
    require gradients. A text model's `attention_mask` reaches its routers, and its `generate` keeps the routing weights
    of the prompt.
    Raises ValueError if no module is selected, or if the models differ in structure or cannot be upscaled.
    """
    models = list(_members(finetuned))
    _check_copies(pretrained)
    if not models:
        raise ValueError("upscale needs at least one fine-tuned model, got none.")
    merged = task_arithmetic(pretrained, (task_vector(pretrained, model) for model in models), init_lambda)
    upscaled = copy.deepcopy(pretrained).requires_grad_(False)
    upscaled.load_state_dict(merged)  # all of it; what is routed is replaced below
    routed: dict[nn.Module, WEMoE] = {}  # a module of the copy -> what takes its place, once if it has two names
    for name in _selected(pretrained, modules):
        original, merged_copy = pretrained.get_submodule(name), upscaled.get_submodule(name)
        if merged_copy not in routed:
            hidden_size = _hidden_size(name, original) if router_depth else 0
            router = Router(hidden_size, len(models), router_depth, init_lambda)
            weight = next(p for p in _live_state(original).values() if _is_weight(p))
            router.to(weight.device, _at_least_float32(weight)).train(original.training)
            routed[merged_copy] = WEMoE(original, [_part(model, name) for model in models], router, layer=layer)
    upscaled = _replace(upscaled, routed.get)
    _prepare_for_text(upscaled)  # if it takes an attention_mask, or generates
    return upscaled


# ---- Test-time adaptation --------------------------------------------------------------------------------------------


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of softmax(logits) (Eq. 5), (..., C) -> (...), in nats; exact where the softmax is 0 or 1."""
    log_p = _log_softmax(logits)  # finite, in float32 or better
    return -(log_p.exp() * log_p).sum(-1)


def mean_entropy(logits: Tensor) -> Tensor:
    """The paper's objective (Eq. 6) for one task's batch: (B, C) -> the mean entropy of its predictions, in nats."""
    return entropy(logits).mean()


def negative_information(logits: Tensor) -> Tensor:
    """Minus the mutual information of input and prediction, (B, C) -> nats: mean_b H(p_b) - H(mean_b p_b).

    For mean entropy alone, one confident answer to everything is as good as any; this asks for diverse answers, too
    (Bridle et al., NeurIPS 1991; Liang et al., arXiv 2002.08546), and wants batches in which most classes appear.
    """
    log_sum = _log_softmax(logits).logsumexp(0)  # log Σ_b p_b, of which the softmax, in entropy, is mean_b p_b
    return mean_entropy(logits) - entropy(log_sum)


def adapt(
    model: nn.Module,
    loaders: Mapping[str, Iterable[Tensor | Mapping[str, Tensor]]],
    heads: Mapping[str, Callable[..., Tensor]],
    *,
    steps: int = 1000,
    lr: float = 1e-4,
    objective: Callable[[Tensor], Tensor] = mean_entropy,
    optimizer: torch.optim.Optimizer | None = None,
    start: int = 0,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> list[float]:
    """Train the routers, in place and without labels, to make the model's predictions certain (Section 3.3).

    Each step takes one batch of every task and descends the sum over tasks of the objective, with Adam and a learning
    rate that a cosine takes to zero; it back-propagates task by task, so that memory does not grow with their number.

    Args:
        model: an upscaled model, or one in DistributedDataParallel. What requires gradients in it is trained, in the
            mode (train or eval) in which it is.
        loaders: task -> iterable of unlabelled batches, started again when exhausted: the model's input, or its
            arguments by name, as a text's `input_ids` and `attention_mask`.
        heads: task -> callable from the model's output to logits (B, C), best frozen: they are not trained.
        steps, lr: number of steps in all, and first learning rate (the paper's are 1000 and 1e-4, at 16 images a task).
        objective: what is minimised, a function of one task's logits (B, C).
        optimizer, start: to resume: the optimizer, whose groups have learning rates of their own (`lr` is not used),
            and the number of steps done. The `loaders` are to yield what comes next.
        on_step: called after each step with its number, from 1, and the mean entropy of every task.

    Returns the mean entropy over all tasks, in nats, at each step before its update.
    Raises ValueError for what cannot be trained, run or continued; FloatingPointError, naming task and step and leaving
    what is trained as it was before that step, if an entropy or the gradient is not finite.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    held = [p for group in optimizer.param_groups for p in group["params"]] if optimizer else trainable
    _check_adapt(trainable, loaders, heads, held, steps, start, lr)
    optimizer = optimizer or torch.optim.Adam(trainable, lr)
    batches = {task: _endless(task, loader, trainable[0].device) for task, loader in loaders.items()}
    history = []
    last = list(loaders)[-1]  # after which a distributed model exchanges gradients, once a step
    no_sync = getattr(model, "no_sync", nullcontext)
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is in
        for step in range(start + 1, steps + 1):
            cosine = (1 + math.cos(math.pi * (step - 1) / steps)) / 2
            for group in optimizer.param_groups:
                first_lr = group.setdefault("initial_lr", group["lr"])  # saved with the optimizer, to resume
                group["lr"] = first_lr * cosine
            optimizer.zero_grad()
            model.zero_grad()  # also what the optimizer does not hold
            entropies: dict[str, Tensor] = {}  # reported, whatever the objective is
            for task in loaders:
                batch = next(batches[task])
                with nullcontext() if task == last else no_sync():
                    logits = heads[task](model(batch) if isinstance(batch, Tensor) else model(**batch))
                    _check_logits(task, logits)
                    objective(logits).backward()
                entropies[task] = mean_entropy(logits.detach())
            by_task = _finite(entropies, trainable, f"step {step} of {steps}")
            optimizer.step()
            history.append(sum(by_task.values()) / len(by_task))
            if on_step is not None:
                on_step(step, by_task)
    optimizer.zero_grad()
    model.zero_grad()
    return history


# ======================================================================================================================
# The method ends here. The rest can be left unread: routing weights to look at, or merged for good; copies for one
# forward pass; a linear layer that is fast; padding and generation of text; what is refused, with a sentence for each.

# ---- Looking at λ, and merging constant routers for good -------------------------------------------------------------


@contextmanager
def routing_weights(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the routing weights (B, T) of the last forward pass, for each WEMoE module of `model` by its name.

    with routing_weights(model) as weights:
        model(images)
    weights["transformer.resblocks.0.mlp"]  # (B, T)
    """
    weights: dict[str, Tensor] = {}

    def record(name: str, lam: Tensor) -> None:
        weights[name] = lam.detach()

    with _seeing(model, record):
        yield weights


def unload(model: nn.Module) -> nn.Module:
    """A copy in which constant routers (depth 0) are merged once and for all, at no additional cost (Appendix B.3).

    Raises ValueError if a router looks at its input.
    """

    @torch.no_grad()
    def unloaded(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, WEMoE):
            return None
        if getattr(module.router, "depth", None) != 0:
            what = f"a {type(module.router).__name__} that looks at its input"
            raise ValueError(f"Only routers of depth 0 can be unloaded, not {what}.")
        lam = module.router(torch.empty(1, 0))[0]  # (T,), whatever the input
        merged = [part for part in module.pretrained.modules() if isinstance(part, MergedLayer)]
        weights = [part.weights(lam) for part in merged]  # all before θ_0 is overwritten, which layers may share
        for part, weights_of_part in zip(merged, weights):
            for name, weight in weights_of_part.items():
                operator.attrgetter(name)(part.layer).copy_(weight)
            _swap_hooks(part)  # back to the layer
            for inner in part.layer.modules():
                _allow(inner)
        return _replace(module.pretrained, lambda part: part.layer if isinstance(part, MergedLayer) else None)

    return _replace(copy.deepcopy(model), unloaded)


# ---- One forward pass: where λ is, and merged weights ----------------------------------------------------------------


def _run_with(lam: Tensor, module: nn.Module, args: tuple, kwargs: dict):
    """Run a module, whose merged layers take λ (B, T), in a copy made for this pass.

    λ, and the weights that MergedLayer.for_all merges, are put in copies and never in the module itself. A checkpoint
    inside, which runs again in the backward pass, finds those of its own forward pass there, when others may have run
    since (and functional_call would have put back θ_0). Replicas and threads do not see one another's.
    """
    lam = lam if torch.is_grad_enabled() else lam.detach()  # _begin_pass asks whether it requires a gradient
    copies: dict[nn.Module, nn.Module] = {}  # each part of the module -> its copy
    used = _shallow_copy(module, copies)
    for part in copies.values():
        if isinstance(part, MergedLayer):
            vars(part).update(lam=lam, ran=False)  # λ may be a parameter, which setattr would register
    if not any(isinstance(part, MergedLayer) for part in copies):
        raise RuntimeError(f"No merged layer is left in a routed {type(module).__name__}: its layers were replaced.")
    output = used(*args, **kwargs)
    for part, used in copies.items():
        if not isinstance(part, MergedLayer):  # keep what it has stored on itself in this pass, as modules may do
            vars(part).update({name: value for name, value in vars(used).items() if name not in _STRUCTURE})
            part._buffers.update(used._buffers)
        elif not used.ran:
            what = f"A {type(part.layer).__name__} did not run in a routed {type(module).__name__}"
            raise RuntimeError(f"{what}: its weights were read, or not used. Route with layer=MergedLayer.")
    return output


def _begin_pass(layer: MergedLayer, x: Tensor) -> None:
    """Make a layer, in its copy for this pass, ready for x (B, ...). Raises an error if it cannot run with its λ."""
    if layer.lam is None:
        raise RuntimeError("A merged layer runs in the WEMoE module that it is a part of, not by itself.")
    if layer.lam.requires_grad and not torch.is_grad_enabled():
        raise RuntimeError("A merged layer ran without gradients, as in a checkpoint: give it use_reentrant=False.")
    if any(p.requires_grad for p in layer.parameters()):
        raise NotImplementedError("In a WEMoE module only the router is trainable: freeze everything else.")
    if len(layer.lam) > 1 and len(x) not in (1, len(layer.lam)):
        what = f"{type(layer.layer).__name__} got {tuple(x.shape)} for {len(layer.lam)} samples"
        raise ValueError(f"{what}: route the module that it is in with layer=MergedLayer.")
    if isinstance(layer.layer, nn.MultiheadAttention) and x.dim() == 2:  # one sample, to a dense layer
        raise ValueError(f"Attention takes (B, N, D) in a routed module, got {tuple(x.shape)}.")
    layer.ran = True  # _run_with asks
    for part in layer.layer.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.training = False  # one sample has no statistics: the merged ones serve
            if part.running_mean is None:
                raise ValueError("Batch norm without running statistics cannot be routed: it would mix samples.")


def _reach_inside(wrapper: nn.Module, inner: str, name: str):
    """An attribute that a WEMoE module or a merged layer lacks: that of the module in it, as mlp.fc1.weight.dtype."""
    try:
        return nn.Module.__getattr__(wrapper, name)
    except AttributeError:
        if name.startswith("__"):  # as the __deepcopy__ of a parametrised layer
            raise
        value = getattr(nn.Module.__getattr__(wrapper, inner), name)
    if isinstance(wrapper, WEMoE) and any(value is p for p in (*wrapper.parameters(), *wrapper.buffers())):
        raise AttributeError(f"{name!r} differs between samples: route the module that reads it.")
    if isinstance(wrapper, MergedLayer) and vars(wrapper).get("lam") is not None and _is_weight(value):
        # Each sample has its own: code may ask for their type or shape, but the numbers are NaN, which shows.
        return value.new_full((), math.nan).expand_as(value)
    return value


_STRUCTURE = "_modules", "_parameters", "_buffers", "training"  # a module's other attributes are what it stores


def _shallow_copy(module: nn.Module, copies: dict[nn.Module, nn.Module]) -> nn.Module:
    """A copy of the module with the same tensors and hooks in it; `copies` gets that of each part."""
    if module not in copies:
        copies[module] = used = object.__new__(type(module))
        # What is compiled in place is the original: the copy runs as it is written.
        used.__dict__ = {name: value for name, value in vars(module).items() if name != "_compiled_call_impl"}
        if "forward" in vars(used):  # and would run the original, with θ_0
            raise RuntimeError(f"The forward of a {type(module).__name__} in a routed module was replaced: undo that.")
        parts = module._modules.items()
        used._modules = {name: None if part is None else _shallow_copy(part, copies) for name, part in parts}
        used._parameters, used._buffers = module._parameters.copy(), module._buffers.copy()
    return copies[module]


def _with_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the module, in which tensors are replaced by these. What it stores is gone with it, caches, too."""
    copies: dict[nn.Module, nn.Module] = {}
    module = _shallow_copy(module, copies)
    for part in copies.values():
        part._forward_pre_hooks = part._forward_pre_hooks.copy()
        _allow(part)
        for name, value in vars(part).items():
            if name not in _STRUCTURE and type(value) in (dict, list, set):
                vars(part)[name] = copy.copy(value)
    for name, p in weights.items():
        path, _, entry = name.rpartition(".")
        part = module.get_submodule(path)
        vars(part).pop(entry, None)  # in a replica of DataParallel, tensors are plain attributes
        held = part._buffers if entry in part._buffers else part._parameters
        if held is part._buffers and isinstance(part, nn.modules.batchnorm._NormBase):
            p = p.detach()  # torch does not differentiate by running statistics
        held[entry] = p
    return module


def _refuse(part: nn.Module, _args: tuple) -> None:
    """A hook on all parts of a merged layer, whose own weights are θ_0; copies with merged weights are without it."""
    what = f"A {type(part).__name__} of a routed module ran by itself, without merged weights"
    raise RuntimeError(f"{what}: call the routed module, or route a part of it.")


def _allow(part: nn.Module) -> None:
    """Take that hook away again."""
    hooks = part._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _refuse]:
        del hooks[key]


def _replace(module: nn.Module, change: Callable, done: dict | None = None) -> nn.Module:
    """Replace a module and its parts, outermost first and in place, by what `change` makes of each; None keeps it."""
    done = {} if done is None else done  # a part that is held under two names stays one part
    if module not in done:
        done[module] = change(module)
        if done[module] is None:
            done[module] = module
            for name, part in module._modules.items():
                module._modules[name] = None if part is None else _replace(part, change, done)
    return done[module]


def _swap_hooks(merged: MergedLayer) -> None:
    """Exchange the hooks of a merged layer and of the layer in it, but for those that may compute its weights."""
    kinds = "forward|backward" if isinstance(merged, MergedLinear) else "forward_hook|backward"
    one, other = vars(merged), vars(merged.layer)
    for name in [name for name in one if "hook" in name and re.search(kinds, name)]:  # torch's dictionaries
        one[name], other[name] = other[name], one[name]


class _Routing(nn.Module):
    """λ (B, T) or (1, T) passes through it, where hooks see it, or give another."""

    def forward(self, lam: Tensor, h: Tensor) -> Tensor:
        return lam


@contextmanager
def _seeing(model: nn.Module, see: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Call `see` with each module's name and λ (B, T); what it returns, unless None, is taken in the place of λ."""

    def hook(name: str, _module: nn.Module, inputs: tuple, lam: Tensor) -> Tensor | None:
        return see(name, lam.expand(len(inputs[1]), -1))

    routed = [(name, module) for name, module in model.named_modules() if isinstance(module, WEMoE)]
    handles = [module.routing.register_forward_hook(functools.partial(hook, name)) for name, module in routed]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---- What makes it fast: linear layers, merged and applied tile by tile ----------------------------------------------


class MergedLinear(MergedLayer, nn.Linear):
    """A linear layer with weights of its own for each sample; to libraries, an nn.Linear. See MergedLayer.

    It has first derivatives only. Raises ValueError for an input of another type than its weights, but for autocast.
    """

    def __init__(self, linear: nn.Linear, vectors: list[dict[str, Tensor]]):
        # tau(0) is that of the matrix, tau(1) that of the bias, in whatever order the layer has them.
        super().__init__(linear, [dict(sorted(vector.items(), reverse=True)) for vector in vectors])

    def tau_rows(self, rows: slice) -> Tensor:
        """τ in these rows of the matrix: (T, rows, D_in)."""
        return self.tau(0)[:, rows]

    def for_each(self, lam: Tensor, input: Tensor) -> Tensor:
        device, theta_0, bias = input.device.type, self.layer.weight, self.layer.bias
        cast = torch.is_autocast_enabled(device) and input.is_floating_point() and input.dtype != torch.float64
        x = input.to(torch.get_autocast_dtype(device)) if cast else input
        if not cast and x.dtype != theta_0.dtype:
            raise ValueError(f"A linear layer of {theta_0.dtype} got an input of {x.dtype}.")
        with torch.autocast(device, enabled=False):
            lam, x = lam.to(theta_0), x.expand(len(lam), *x.shape[1:])
            bias = None if bias is None else bias + lam @ self.tau(1)  # (B, D_out)
            tokens = x[:, None] if x.dim() == 2 else x.flatten(1, -2)  # (B, N, D_in)
            y = _MergedProduct.apply(tokens, lam, theta_0, bias, self)
        return y.view(*x.shape[:-1], len(theta_0))


class _MergedProduct(torch.autograd.Function):
    """y_b = x_b W_b^T + bias_b, W_b = θ_0 + Σ_t λ_bt τ_t: x (B, N, D_in), λ (B, T), θ_0 (D_out, D_in), bias (B, D_out).

    For some rows of W_b and many samples at a time, one matrix product merges and a batch of them applies. The backward
    pass merges again, so that memory never holds B sets of weights. x, λ and the bias have first derivatives.
    """

    @staticmethod
    def forward(ctx, x: Tensor, lam: Tensor, theta: Tensor, bias: Tensor | None, layer: MergedLinear) -> Tensor:
        ctx.save_for_backward(x, lam, theta)
        ctx.layer = layer
        y = x.new_empty(*x.shape[:2], len(theta))  # (B, N, D_out)
        for samples, rows, w, _ in _tiles(lam, theta, layer):
            y[samples, :, rows] = x[samples] @ w.to(x.dtype).mT
        return y if bias is None else y.add_(bias[:, None])

    @staticmethod
    def backward(ctx, dy: Tensor):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("Second derivatives of merged linear layers: route with layer=MergedLayer.")
        x, lam, theta = ctx.saved_tensors
        dx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None  # not where nothing before it is trained
        dlam = torch.zeros_like(lam)
        for samples, rows, w, tau in _tiles(lam, theta, ctx.layer):
            if dx is not None:
                dx[samples] += dy[samples, :, rows] @ w.to(x.dtype)
            dw = (dy[samples, :, rows].mT @ x[samples]).to(lam.dtype)  # (samples, rows, D_in)
            dlam[samples] += dw.flatten(1) @ tau.mT  # <dw_b, τ_t>
        return dx, dlam, None, dy.sum(1) if ctx.needs_input_grad[3] else None, None


# How many numbers a tile of merged weights has at most, for so many samples: 6 MiB in float32 on a CPU, where it is to
# stay in the cache, and 256 MiB on a GPU.
_TILE, _SAMPLES = {"cpu": 16 * 128 * 768, "cuda": 16 * 4096 * 1024}, 16


def _tiles(lam: Tensor, theta: Tensor, layer: MergedLinear) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Parts of θ_0 + Σ_t λ_bt τ_t: which samples, which rows, w (samples, rows, D_in), and τ (T, rows · D_in).

    Every tile overwrites the one before (memory that is new to the process is slow): use w before the next.
    """
    lam, (height, width) = lam.detach(), theta.shape
    step = max(1, _TILE.get(lam.device.type, _TILE["cuda"]) // (_SAMPLES * width))
    memory = theta.new_empty(min(_SAMPLES, len(lam)) * min(step, height) * width)
    for rows in (slice(i, i + step) for i in range(0, height, step)):
        theta_0, tau = theta[rows].flatten(), layer.tau_rows(rows).flatten(1)
        for samples in (slice(i, i + _SAMPLES) for i in range(0, len(lam), _SAMPLES)):
            lam_of = lam[samples]
            w = memory[: len(lam_of) * len(theta_0)].view(len(lam_of), len(theta_0))
            torch.addmm(theta_0, lam_of, tau, out=w)
            yield samples, rows, w.view(len(lam_of), -1, width), tau


# ---- Text: padding and generation -----------------------------------------------------------------------------------


@contextmanager
def frozen_routing(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Keep the routing weights (B, T) of the first forward pass: a prompt's, while tokens are generated for it."""
    weights: dict[str, Tensor] = {}
    with _seeing(model, lambda name, lam: weights.setdefault(name, lam.detach())):
        yield weights


def set_token_mask(model: nn.Module, mask: Tensor | None) -> None:
    """From now on, routers whose input is (B, N, D) average over the tokens where `mask` (B, N) is not zero.

    So padding does not matter. Models that take an `attention_mask` do this by themselves. None ends it. The mask is
    the model's, not a pass's: finish one text's backward pass before the next where activations are checkpointed.
    Raises ValueError for a mask that is not (B, N); where the tokens are others than its own, it is not used.
    """
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise ValueError(f"A mask of tokens is a tensor (B, N), not {getattr(mask, 'shape', type(mask))}.")
    for module in model.modules():
        if isinstance(module, WEMoE):
            module.mask, module.attention_mask = mask, None


def _mask_of(module: WEMoE, h: Tensor) -> Tensor | None:
    """The mask (B, N) of the tokens h (B, N, D): what the model was given with its input, or else by set_token_mask."""
    for mask in (module.attention_mask, module.mask):
        # While tokens are generated with a cache, h has the last one only, and the mask has all.
        if mask is not None and mask.shape == h.shape[:-1]:
            return mask
    return None


def _masked_mean(h: Tensor, mask: Tensor) -> Tensor:
    """The mean over the tokens where the mask (B, N) is not zero, whatever the others hold: (B, N, D) -> (B, D)."""
    kept = mask.to(h.device) != 0
    return h.masked_fill(~kept[..., None], 0).sum(1) / kept.sum(1, keepdim=True).clamp_min(1)


def _prepare_for_text(model: nn.Module) -> None:
    """Let an `attention_mask` reach the routers, and `generate` keep the routing weights of the prompt."""
    for tower in model.modules():
        # With pixel_values, too: the vision tower of a model of both is to run without the mask of the texts.
        builtin = inspect.isbuiltin(tower.forward)  # which has no signature
        if not builtin and inspect.signature(tower.forward).parameters.keys() & {"input_ids", "pixel_values"}:
            tower.register_forward_pre_hook(_take_attention_mask, with_kwargs=True)
        if hasattr(type(tower), "generate"):
            tower.generate = functools.partial(_generate, tower)


def _take_attention_mask(tower: nn.Module, args: tuple, kwargs: dict) -> None:
    mask = inspect.signature(tower.forward).bind_partial(*args, **kwargs).arguments.get("attention_mask")
    for module in tower.modules():
        if isinstance(module, WEMoE):
            module.attention_mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _generate(model: nn.Module, *args, **kwargs):
    with frozen_routing(model):
        return type(model).generate(model, *args, **kwargs)


# ---- What is asked of models, modules and arguments, and what is refused ---------------------------------------------

# Two models that do not fit: _matching_weights. A module that cannot be merged: check_mergeable. A choice of modules:
# _selected. Arguments that cannot be split among samples: _of_sample. A pass that cannot run: _begin_pass, above. An
# adaptation that cannot start: _check_adapt.


def _members(models: Models) -> Iterable[Model]:
    models = models.values() if isinstance(models, Mapping | nn.ModuleDict) else models
    single = isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList)
    if single or (not isinstance(models, Iterator) and any(isinstance(model, Tensor) for model in models)):
        raise ValueError("Models or task vectors are given in a list or by task, not one alone.")
    return models


def _live_state(model: Model) -> dict[str, Tensor]:
    """A state dict in which a tied parameter is the same object under each of its names."""
    if not isinstance(model, nn.Module | Mapping):
        raise ValueError(f"A model or its state dict is needed, got {type(model).__name__}: load it first.")
    return dict(model.state_dict(keep_vars=True) if isinstance(model, nn.Module) else model)


def _part(model: Model, name: str) -> Model:
    if isinstance(model, nn.Module):
        return model.get_submodule(name)
    prefix = f"{name}." if name else ""
    return {key.removeprefix(prefix): p for key, p in model.items() if key.startswith(prefix)}


def by_path(module: nn.Module, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A task vector's entries by their tensors' attribute paths, which a state dict's hooks may name otherwise."""
    tau_of = {p: vector[name] for name, p in _live_state(module).items() if name in vector}
    named = *module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)
    return {path: tau_of[p] for path, p in named if p in tau_of}


def _stack(layer: nn.Module, vectors: list[dict[str, Tensor]]) -> tuple[dict[str, int], list[Tensor]]:
    """Task vectors as a list of τ (T, *shape), and which is whose by name; names of one tensor (tied ones) share it."""
    tensors = {name: operator.attrgetter(name)(layer) for name in vectors[0]}
    index = {p: i for i, p in enumerate(dict.fromkeys(tensors.values()))}  # dictionaries go by a tensor's identity
    names = {name: index[p] for name, p in tensors.items()}
    taus = {i: torch.stack([vector[name] for vector in vectors]) for name, i in names.items()}
    return names, list(taus.values())


def _at_least_float32(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _log_softmax(logits: Tensor) -> Tensor:
    log_p = F.log_softmax(logits, dim=-1, dtype=_at_least_float32(logits))
    return log_p.clamp_min(torch.finfo(log_p.dtype).min)  # 0 log 0 = 0, too, for a logit of -inf


def _check_term(tau: Model, lam: float) -> None:
    if not math.isfinite(lam) or (isinstance(tau, nn.Module) and not isinstance(tau, nn.ParameterDict)):
        raise ValueError(f"Task arithmetic takes task vectors and finite λ, got a {type(tau).__name__} and {lam}.")


def _is_weight(p: object) -> bool:
    return isinstance(p, Tensor) and p.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _matching_weights(pretrained: Model, other: Model, what: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two models' weights by their names. Raises ValueError, naming the entry, for what cannot be merged."""
    theta_0, theta_t = _live_state(pretrained), _live_state(other)
    both = {key: p for key, p in theta_0.items() if _is_weight(p) and _is_weight(theta_t.get(key))}
    first = {id(p): key for key, p in reversed(both.items())}  # the first name of each tensor, to find ties
    for key in sorted(theta_0.keys() | theta_t.keys()):
        wrong = _wrong(key, theta_0, theta_t, what, first)
        if wrong:
            raise ValueError(f"{key!r} {wrong}.")
    if not both:
        raise ValueError(f"There are no floating-point weights to merge in {_quote(theta_0)}: dequantise them.")
    return tuple({key: state[key].detach() for key in both} for state in (theta_0, theta_t))


def _wrong(key: str, theta_0: Mapping, theta_t: Mapping, what: str, first: Mapping[int, str]) -> str | None:
    """Why the entry cannot be merged, if so; `first` is a name of each weight that both models have."""
    p, q = theta_0.get(key), theta_t.get(key)
    if _holds_weights(p) or _holds_weights(q):  # as in {"state_dict": {"weight": …}, "epoch": 3}
        return "holds the weights of a checkpoint: pass these alone"
    if p is None or q is None:
        alone, where = (q, what) if p is None else (p, "the pre-trained model")
        like = next((k for k in (theta_0 if p is None else theta_t) if k.endswith(key) or key.endswith(k)), None)
        hint = f", {like!r} in the other: strip the prefix" if like else ""
        return None if _is_index(alone) else f"is in {where} alone{hint}"
    thin = isinstance(p, Tensor) and p.dim() == 2 and len(p) < p.shape[1]  # as the factor A of a bare {"A", "B"}
    if re.search(r"(^|[._])(lora|hada|lokr)[._]", key) or (key == "A" and thin):
        return "is a factor of a low-rank adapter, whose product is not linear: unload adapters first"
    if _is_weight(p) and _is_weight(q):
        if p.shape != q.shape:
            return f"has shape {tuple(q.shape)} in {what}, but {tuple(p.shape)} in the pre-trained model"
        for x, where in ((p, "the pre-trained model"), (q, what)):
            if x.is_meta or x.is_inference() or x.layout != torch.strided or not x.isfinite().all():
                return f"is NaN, infinite, sparse, made in torch.inference_mode or on the meta device in {where}"
        tied = first[id(p)]
        return None if torch.equal(q, theta_t[tied]) else f"and {tied!r} are tied in the pre-trained, not in {what}"
    if not isinstance(p, Tensor) or not isinstance(q, Tensor) or (p.dim() == q.dim() == 0 and _is_index(p)):
        return None  # counters may differ
    numbers = [(x.dequantize() if x.is_quantized else x).cpu().to(torch.complex128) for x in (p, q)]
    return None if torch.equal(*numbers) else f"differs and is {p.dtype} and {q.dtype}: dequantise it first"


def _holds_weights(x: object) -> bool:
    """Whether it is no tensor, but has tensors, arrays or modules in it."""
    leaves = tree_leaves(dict(x) if isinstance(x, Mapping) else x)
    found = any(isinstance(leaf, Tensor | nn.Module) or getattr(leaf, "ndim", 0) for leaf in leaves)
    return found and not isinstance(x, Tensor)


def _is_index(p: object) -> bool:  # position ids, counters, masks; or no tensor at all
    return not isinstance(p, Tensor) or p.dtype in (torch.int16, torch.int32, torch.int64, torch.bool)


def check_mergeable(module: nn.Module) -> None:
    """Raise ValueError, naming the part, for a module whose copy would not run with other weights than its own."""
    for name, part in module.named_modules():
        attributes = [value for key, value in vars(part).items() if key not in _STRUCTURE and "hook" not in key]
        leaves = tree_leaves(attributes)
        kept = [getattr(leaf, "__self__", leaf) for leaf in leaves]  # a method counts as its module
        kept += [cell.cell_contents for leaf in leaves for cell in getattr(leaf, "__closure__", None) or ()]
        tensors = [leaf for leaf in kept if isinstance(leaf, Tensor)]
        wrong = None
        if "forward" in vars(part) or isinstance(part, torch.jit.ScriptModule):
            wrong = "its forward was replaced (compiled, traced, offloaded): pass the model before"
        elif any(isinstance(leaf, nn.Module) for leaf in kept):
            wrong = "keeps modules or methods of its own in a list or an attribute: route its parts"
        elif any(isinstance(p, nn.Parameter) or not p.is_leaf for p in tensors):  # as GRU, or the old weight_norm
            wrong = f"({type(part).__name__}) keeps its weights elsewhere, too: choose other modules"
        if wrong:
            raise ValueError(f"{name!r} {wrong}.")


def _check_copies(model: nn.Module) -> None:
    """Raise ValueError, naming the part, if a copy of the model would run parts of the original, or is routed."""
    for name, part in model.named_modules():
        if isinstance(part, WEMoE | MergedLayer):
            raise ValueError(f"{name!r} is routed already: upscale the model before.")
        if inspect.isfunction(vars(part).get("forward")):
            raise ValueError(f"{name!r}: its forward was replaced by a function: pass the model before.")


def _has_own_weights(module: nn.Module, tau: Mapping[str, Tensor]) -> bool:
    """Whether it is merged as one: it holds weights, is computed from some, or has a table that is no sample's."""
    own_weights = any("." not in name for name in tau)
    tables = nn.Embedding | nn.ParameterList | nn.ParameterDict  # as the positions of T5's attention
    has_table = any(isinstance(child, tables) for child in module.children())
    return own_weights or has_table or hasattr(module, "parametrizations")


def _first_tensor(*arguments: object) -> Tensor:
    for leaf in tree_leaves(arguments):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf
    raise TypeError("A routed module takes a tensor (B, ..., D) as its first input: route the module around it.")


def _of_sample(b: int, batch: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """What sample b gets of the arguments: its row of each tensor (B, ...), all of anything else."""
    x = _first_tensor(args, kwargs)

    def of_sample(leaf: object) -> object:
        if not isinstance(leaf, Tensor | bool | int | float | str | None):
            what = f"A {type(leaf).__name__} cannot be split among samples that run one by one"
            raise ValueError(f"{what}: leave it out, as use_cache=False does.")
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or len(leaf) != batch:
            return leaf
        # Other axes of x that its first could be: a vector (D,) when B = D, a mask (N, N) when B = N.
        axes = x.shape[1:] if leaf.dim() == 1 else x.shape[1:-1]
        if leaf.dim() < x.dim() and batch in axes:
            what = f"An argument of shape {tuple(leaf.shape)} may belong to the samples or to another axis of the input"
            raise ValueError(f"{what} {tuple(x.shape)}: use another batch size.")
        return leaf[b : b + 1]

    return tree_map(of_sample, (args, kwargs))


def _join(*parts: object) -> object:
    """One output of all samples: tensors (1, ...) in a batch, or anything else that is the same for all of them."""
    first = parts[0]
    if isinstance(first, Tensor) and first.dim() > 0 and (len(first) == 1 or first.dim() < 3 or first.shape[1] != 1):
        return torch.cat(parts)
    if not isinstance(first, bool | int | float | str | None) or any(part != first for part in parts):
        what = f"a tensor {tuple(first.shape)}" if isinstance(first, Tensor) else f"a {type(first).__name__}"
        raise ValueError(f"Samples that run one by one have outputs (1, ...), not {what}: route a part of the module.")
    return first


# What open_clip, timm, torchvision and much of Hugging Face call the MLP of a Transformer block.
_MLP = r"(^|\.)(mlp|DenseReluDense)$"


def _selected(model: nn.Module, modules: str | Callable[[str, nn.Module], bool] | None) -> list[str]:
    """Names of the modules to route: those that `modules` selects, hold weights, and lie in no other such module."""
    pattern = _MLP if modules is None else modules
    wanted = pattern if callable(pattern) else lambda name, _: re.search(pattern, name)
    every = model.named_modules(remove_duplicate=False)
    named = {name: module for name, module in every if any(map(_is_weight, _live_state(module).values()))}
    names: list[str] = []
    for name, module in named.items():  # parents come before their children
        held = any(outer == "" or name.startswith(f"{outer}.") for outer in names)
        # A list of modules does not run, but those in it do.
        if wanted(name, module) and not held and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            names.append(name)
            if not _batch_first(name, named):
                what = f"{name!r} has attention with batch_first=False beside it"
                raise ValueError(f"{what}: λ would mix samples, use True.")
    if not names:
        what = "No MLP was found" if modules is None else f"modules={modules!r} selects no module with weights"
        among = _quote(filter(None, named), 20)
        raise ValueError(f"{what} in {type(model).__name__}; choose with modules= among {among}.")
    return names


def _check_batch_first(module: nn.Module) -> None:
    if not _batch_first("", {"": module}):
        raise ValueError("Attention with batch_first=False cannot be routed: λ would mix samples, use True.")


def _batch_first(name: str, named: Mapping[str, nn.Module]) -> bool:
    """Whether samples come first in the attention that is nearest: in the module, or in one of those around it."""
    attentions = [module for module in named[name].modules() if isinstance(module, nn.MultiheadAttention)]
    if attentions or not name:
        return all(module.batch_first for module in attentions)
    return _batch_first(name.rpartition(".")[0], named)


def _hidden_size(name: str, module: nn.Module) -> int:
    """D, the last axis of the module's input, as told by the first matrix in it, or else by its first vector."""
    shapes = [p.shape for p in _live_state(module).values() if _is_weight(p)]
    shape = next((shape for shape in shapes if len(shape) == 2), shapes[0])
    if len(shape) not in (1, 2):
        raise ValueError(f"The hidden size of {name!r} cannot be told from its weights: use router_depth=0, or WEMoE.")
    return next((m.nx for m in module.modules() if hasattr(m, "nx")), shape[-1])  # GPT-2's Conv1D is (D_in, D_out)


def _check_adapt(trainable: list, loaders: Mapping, heads: Mapping, held: list, steps: int, start: int, lr: float):
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in trainable)
    for found, problem in (
        (not trainable, "the model has nothing to train; give what upscale returns"),
        (half, "in half precision routers do not move: keep what is trained in float32, and use torch.autocast"),
        (any(p.is_inference() for p in trainable), "the model was built in torch.inference_mode: build it outside"),
        (set(held).isdisjoint(trainable), "the optimizer holds none of what is trainable in the model"),
        (any(isinstance(x, Tensor) for x in loaders.values()), "a tensor is no loader: give a list of batches, [x]"),
        (not loaders, "there are no loaders: the batches of at least one task are needed"),
        (loaders.keys() - heads.keys(), f"there are loaders for {_quote(loaders)}, but heads for {_quote(heads)}"),
        (not 0 <= start < steps or not 0 < lr < math.inf, f"there is nothing to do for {steps=}, {start=} and {lr=}"),
    ):
        if found:
            raise ValueError(f"adapt cannot start: {problem}.")


def _endless(task: str, loader: Iterable, device: torch.device) -> Iterator[Tensor | dict[str, Tensor]]:
    """The batches of a loader, again and again. Raises ValueError for what is no batch, and if there is none."""
    for epoch in itertools.count(1):
        batch = None
        for batch in loader:
            if not isinstance(batch, Tensor | Mapping):
                raise ValueError(f"The loader of task {task!r} yields {type(batch)}: unlabelled inputs are needed.")
            batch = batch if isinstance(batch, Tensor) else dict(batch)
            yield tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)
        if batch is None:
            again = "" if epoch == 1 else " when started again; pass a list or a DataLoader, not an iterator"
            raise ValueError(f"The loader of task {task!r} yields no batch{again}.")


def _check_logits(task: str, logits: Tensor) -> None:
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) == 0 or logits.shape[1] < 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"Logits of {task!r} should be (B, C) with B > 0 and C > 1, not {found}.")
    if not logits.requires_grad:
        raise ValueError(f"Logits of {task!r} do not depend on what is trained: is its head, or a part, in no_grad?")


def _finite(entropies: dict[str, Tensor], trainable: list, where: str) -> dict[str, float]:
    """The entropies as numbers. Raises FloatingPointError if one of them, or the gradient, is not finite."""
    norm = nn.utils.clip_grad_norm_(trainable, math.inf)  # to get it: nothing is clipped
    numbers = torch.stack([value.to(norm) for value in (*entropies.values(), norm)]).tolist()  # one wait for a GPU
    by_task = dict(zip(entropies, numbers))
    names = [*(f"entropy of task {task!r}" for task in entropies), "gradient"]
    for what, value in zip(names, numbers):
        if not math.isfinite(value):
            for p in trainable:
                p.grad = None
            raise FloatingPointError(f"The {what} is {value} at {where}.")
    return by_task


def _quote(names: Iterable[str], most: int = 8) -> str:
    names = sorted(names)
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
