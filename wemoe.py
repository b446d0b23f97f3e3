"""WEMoE: one multi-task model out of many fine-tuned ones, its MLP weights put together anew for every input.

A model fine-tuned on task t is the pre-trained model plus a *task vector*, τ_t = θ_t - θ_0. Every merging method is
a choice of the coefficients λ in

    θ(x) = θ_0 + Σ_t λ_t(x) τ_t.

Weight averaging takes λ = 1/T, task arithmetic λ = 0.3. In a Weight-Ensembling Mixture of Experts (Tang et al., ICML
2024, arXiv 2402.00433) λ(x) is, for the MLPs of a Transformer, the output of a small *router* that looks at the input;
everything else is merged with task arithmetic. The routers are trained without labels, by minimising the entropy of
the predictions:

    model = upscale(pretrained, {"cars": cars_model, "signs": signs_model})
    adapt(model, loaders={"cars": ..., "signs": ...}, heads={"cars": ..., "signs": ...})

Read on from here: task vectors (and TIES), the router and the WEMoE module, upscaling (and AdaMerging), adaptation. The
file needs nothing but torch (2.4 or later); copy it. When *not* to use it: if the task of every input is known, load
that task's own model; if the models were not fine-tuned from one checkpoint, a linear combination of their weights
means nothing; and since routers average over all tokens, later ones and padding too, a routed decoder is not causal.

Shapes: B samples, T tasks, D hidden size, `...` any token or spatial axes.
"""

import copy
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten
from torch.utils.checkpoint import checkpoint

StateDict = Mapping[str, Tensor]

# ---- Task vectors ----------------------------------------------------------------------------------------------------


def task_vector(pretrained: nn.Module | StateDict, finetuned: nn.Module | StateDict) -> dict[str, Tensor]:
    """τ = θ_t - θ_0 by name, in the dtype and on the device of θ_0 (Ilharco et al., arXiv 2212.04089).

    Takes modules or state dicts. τ has an entry for each parameter and floating-point buffer; integers and booleans
    (counters, position ids) are skipped.
    Raises ValueError, naming the entry, if keys or shapes differ, if a value is NaN or infinite, or if the fine-tuned
    model has two values for what is one parameter with two names (tied) in the pre-trained one.
    """
    theta_0, theta_t = _floating_entries(pretrained), _floating_entries(finetuned)
    _check_structure(theta_0, theta_t, "the fine-tuned model")
    tau, names = {}, {}
    for name, origin in theta_0.items():
        for entry, which in ((origin, "pre-trained"), (theta_t[name], "fine-tuned")):
            if not entry.isfinite().all():
                raise ValueError(f"{name!r} holds NaN or infinite values in the {which} model.")
        tau[name] = (theta_t[name].detach().to(origin.device) - origin.detach()).to(origin.dtype)
        if not torch.equal(tau[name], tau[first := names.setdefault(id(origin), name)]):
            raise ValueError(f"{first!r} and {name!r}: tied in the pre-trained model, but not in the fine-tuned model.")
    return tau


def task_arithmetic(
    pretrained: nn.Module | StateDict,
    task_vectors: Iterable[StateDict],
    scaling: float | Sequence[float] = 0.3,
) -> dict[str, Tensor]:
    """θ_0 + Σ_t λ_t τ_t as a new state dict; `scaling` is λ, one number or one per task.

    `task_vectors` may be a generator, so that only one is in memory at a time. Sums are accumulated in float32 or
    better and returned in the dtype of θ_0; entries that task vectors skip are copied. The inputs are not modified.
    Raises ValueError if there is not one λ per task, or if keys or shapes of a task vector are not those of θ_0.
    """
    scalings = torch.as_tensor(scaling, dtype=torch.float64).tolist()  # a number, or a list of numbers
    if isinstance(scalings, float):
        scalings = itertools.repeat(scalings)
    elif len(scalings) != len(task_vectors := list(task_vectors)):
        raise ValueError(f"Got {len(scalings)} scaling factors for {len(task_vectors)} task vectors.")
    theta_0 = _floating_entries(pretrained)
    merged = {n: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for n, p in theta_0.items()}
    for tau, lam in zip(task_vectors, scalings):
        _check_structure(merged, tau, "a task vector")
        for name, total in merged.items():
            total.add_(tau[name].detach().to(total), alpha=lam)
    everything = pretrained.state_dict() if isinstance(pretrained, nn.Module) else pretrained
    return {name: (merged[name].to(p.dtype) if name in merged else copy.deepcopy(p)) for name, p in everything.items()}


@torch.no_grad()
def trim(tau: StateDict, keep: float = 0.2) -> dict[str, Tensor]:
    """The `keep` share of entries of τ, at least one, largest in magnitude over all its tensors; zero elsewhere."""
    magnitudes = torch.cat([entry.abs().flatten().float() for entry in tau.values()])
    threshold = magnitudes.kthvalue(len(magnitudes) - _share(keep, len(magnitudes)) + 1).values
    return {name: torch.where(entry.abs().float() >= threshold, entry, 0) for name, entry in tau.items()}


@torch.no_grad()
def ties(task_vectors: Iterable[StateDict], keep: float = 0.2) -> dict[str, Tensor]:
    """One vector for all tasks, for task_arithmetic(pretrained, [τ]) (TIES-Merging, Yadav et al., arXiv 2306.01708):

        τ̂_t = trim(τ_t),  γ = sgn(Σ_t τ̂_t),  τ = mean of the τ̂_t over the t with sgn(τ̂_t) = γ

    entry by entry, and 0 where γ = 0. Raises ValueError if the vectors differ in structure; and unless 0 < keep <= 1.
    """
    merged = {}
    for name, stacked in _stack([trim(tau, keep) for tau in task_vectors]).items():
        taus = stacked.double()  # (T, *shape)
        agree = taus * taus.sum(0).sign() > 0
        merged[name] = ((taus * agree).sum(0) / agree.sum(0).clamp_min(1)).to(stacked.dtype)
    return merged


def _share(keep: float, count: int) -> int:
    """How many of so many entries are kept. Raises ValueError unless 0 < keep <= 1."""
    if not 0 < keep <= 1:
        raise ValueError(f"The share of entries to keep lies above 0 and up to 1, got {keep=}.")
    return max(1, round(keep * count))


def _stack(task_vectors: Sequence[StateDict], origin: str = "the first one") -> dict[str, Tensor]:
    """Each entry's τ_t stacked along T: (T, *shape). Raises ValueError if they differ in structure."""
    for tau in task_vectors[1:]:
        _check_structure(task_vectors[0], tau, "a task vector", origin)
    return {name: torch.stack([tau[name] for tau in task_vectors]) for name in (task_vectors or [{}])[0]}


def _floating_entries(model: nn.Module | StateDict) -> dict[str, Tensor]:
    """The parameters and floating-point buffers of a module or state dict, by name; what a task vector is made of."""
    state = model.state_dict(keep_vars=True) if isinstance(model, nn.Module) else model
    return {name: entry for name, entry in state.items() if isinstance(entry, Tensor) and entry.is_floating_point()}


def _check_structure(theta_0: StateDict, other: StateDict, what: str, origin: str = "the pre-trained model") -> None:
    if missing := theta_0.keys() - other.keys():
        raise ValueError(f"{_quote(missing)}: in {origin}, but not in {what}.")
    if surplus := other.keys() - theta_0.keys():
        raise ValueError(f"{_quote(surplus)}: in {what}, but not in {origin}.")
    for name, p in theta_0.items():
        if p.shape != other[name].shape:
            found, wanted = tuple(other[name].shape), tuple(p.shape)
            raise ValueError(f"{name!r} has shape {found} in {what}, but {wanted} in {origin}.")


def _quote(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(map(repr, sorted(names)[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


# ---- The router and the Weight-Ensembling Mixture of Experts ---------------------------------------------------------


class Router(nn.Module):
    """r(h): (B, ..., D) -> (B, T), the routing weights λ of every token, averaged over the tokens (Figure 1b).

    depth 0: b;  depth 1: W h + b;  depth 2: W2 relu(W1 h + b1) + b2 with W1 of shape (D, D). The output is linear,
    neither a softmax nor clipped. Weights start as normal(0, 0.01) and the output bias as `init_lambda`: routing starts
    near task arithmetic. `parameters()` yields W1, b1, W2, b2 in this order (depth 1: W, b; depth 0: b).
    Raises ValueError for another depth and, unless it is 0, for inputs that are not (B, ..., D).
    """

    def __init__(self, hidden_size: int, num_tasks: int, depth: int = 2, init_lambda: float = 0.3):
        super().__init__()
        if depth not in (0, 1, 2):
            raise ValueError(f"A router has depth 0, 1 or 2, not {depth!r}.")
        if num_tasks < 1 or (depth > 0 and hidden_size < 1):
            raise ValueError(f"A router needs at least one task and one feature, got {num_tasks=} and {hidden_size=}.")
        self.hidden_size, self.num_tasks, self.depth = hidden_size, num_tasks, depth
        if depth == 0:
            self.bias = nn.Parameter(torch.full((num_tasks,), float(init_lambda)))
            return
        layers = [nn.Linear(hidden_size, hidden_size), nn.ReLU()] if depth == 2 else []
        self.layers = nn.Sequential(*layers, nn.Linear(hidden_size, num_tasks))
        for linear in self.layers[::2]:
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)
        nn.init.constant_(self.layers[-1].bias, init_lambda)

    def forward(self, h: Tensor) -> Tensor:
        if self.depth == 0:
            return self.bias.expand(len(h), -1)
        if h.dim() < 2 or h.shape[-1] != self.hidden_size:
            raise ValueError(f"The router takes inputs of shape (B, ..., {self.hidden_size}), got {tuple(h.shape)}.")
        hidden = self.layers[:-1](h).reshape(len(h), -1, self.hidden_size)  # (B, tokens, D)
        return self.layers[-1](hidden.mean(1))  # the mean over tokens first: the last layer is linear


class _Dense(nn.Module):
    """The task vectors of one parameter, stacked: τ (T, *shape). This is one *form* of them, two others follow."""

    def __init__(self, tau: Tensor):
        super().__init__()
        self.tau = nn.Parameter(tau, requires_grad=False)

    def dense(self) -> Tensor:  # (T, *shape)
        return self.tau

    def rows(self, rows: slice) -> Tensor:  # these rows of every task's matrix: (rows, T, D_in)
        return self.dense()[:, rows].transpose(0, 1)

    def linear(self, x: Tensor, lam: Tensor, theta: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., D_in) -> (..., D_out) by the matrix θ_0 + Σ_t λ_t τ_t, with λ (T,): one sample under torch.vmap."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return _MergedLinear.apply(x, lam.to(theta.dtype), theta, bias, self)


class _Sparse(_Dense):
    """Of each τ_t only the `keep` share of entries that are largest in magnitude, with their places (E-WEMoE)."""

    def __init__(self, tau: Tensor, keep: float):
        nn.Module.__init__(self)
        self.shape, flat = tau.shape, tau.flatten(1)
        kept = flat.abs().topk(_share(keep, flat.shape[1])).indices  # (T, kept)
        mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, kept, True).view(len(tau), tau.shape[1], -1)
        by_rows = mask.transpose(0, 1).flatten()  # (D_out · T · D_in): what a few rows need lies together
        self.register_buffer("index", by_rows.nonzero().flatten().int())
        self.values = nn.Parameter(tau.view(mask.shape).transpose(0, 1).flatten()[by_rows], requires_grad=False)

    def dense(self) -> Tensor:
        return self.rows(slice(0, self.shape[1])).transpose(0, 1).reshape(self.shape)

    def rows(self, rows: slice) -> Tensor:
        size = self.shape[0] * self.shape[2:].numel()  # of one row, all tasks
        ends = [rows.start * size, rows.stop * size]
        start, stop = torch.searchsorted(self.index, self.index.new_tensor(ends)).tolist()
        tile = self.values.new_zeros(ends[1] - ends[0])
        tile.scatter_(0, self.index[start:stop].long() - ends[0], self.values[start:stop])
        return tile.view(-1, self.shape[0], size // self.shape[0])


class _LowRank(_Dense):
    """Each matrix τ_t truncated to rank r by its singular value decomposition, as two factors: τ_t ≈ U_t V_t.

    Linear layers never multiply them: x (θ_0 + Σ_t λ_t U_t V_t)ᵀ = x θ_0ᵀ + Σ_t λ_t (x V_tᵀ) U_tᵀ, two thin products.
    """

    def __init__(self, tau: Tensor, rank: int):
        nn.Module.__init__(self)
        if rank < 1:
            raise ValueError(f"Task vectors have a rank of at least 1, got {rank=}.")
        u, s, v = torch.linalg.svd(tau.to(torch.promote_types(tau.dtype, torch.float32)), full_matrices=False)
        u, v = (u * s[:, None])[..., :rank].movedim(1, 0), v[:, :rank]  # from (T, D_out, k) and (T, k, D_in)
        self.u = nn.Parameter(u.to(tau.dtype).contiguous(), requires_grad=False)  # (D_out, T, r)
        self.v = nn.Parameter(v.to(tau.dtype).contiguous(), requires_grad=False)  # (T, r, D_in)

    def dense(self) -> Tensor:
        return self.u.movedim(1, 0) @ self.v

    def linear(self, x: Tensor, lam: Tensor, theta: Tensor, bias: Tensor | None) -> Tensor:
        h = F.linear(x, self.v.flatten(0, 1))  # (..., T · r)
        y = F.linear(h * lam.to(h.dtype).repeat_interleave(self.v.shape[1]), self.u.flatten(1))
        y = y.add_(F.linear(x, theta))
        return y if bias is None else y.add_(bias)


class WEMoE(nn.Module):
    """A module whose weights depend on its input: sample x_b runs through θ_0 + Σ_t λ_t(x_b) τ_t (Figure 1b).

        x (B, ..., D) ──► router ──► λ (B, T) ──► θ_0 + Σ_t λ_bt τ_t, a set of weights for every sample
              └────────────────────────────────────────► pretrained, with those weights ──► its output

    `pretrained` is any module whose first input is a tensor (B, ..., D), `finetuned` T modules of the same structure or
    their state dicts, `router` maps the first input to λ and alone is trainable.
    Attributes: `router`, `pretrained` (θ_0) and `task_vectors` (each parameter's τ stacked along T, by its name).
    Task vectors take less memory with `keep`, the share of entries of each tensor to keep (the largest, stored sparse),
    or with `rank`, to which their matrices are truncated (by SVD, stored as two factors).
    Further arguments: tensors whose first axis is B are split among the samples, everything else is shared by them.
    Raises ValueError if the modules differ in structure (naming the entry) or in number from the routing weights, or if
    `keep` or `rank` is out of range.
    """

    def __init__(
        self,
        pretrained: nn.Module,
        finetuned: Sequence[nn.Module | StateDict],
        router: nn.Module,
        *,
        keep: float | None = None,
        rank: int | None = None,
    ):
        super().__init__()
        if len(finetuned) < 1 or getattr(router, "num_tasks", len(finetuned)) != len(finetuned):
            outputs = getattr(router, "num_tasks", "any number of")
            raise ValueError(f"WEMoE got {len(finetuned)} fine-tuned modules and a router with {outputs} outputs.")
        if keep is not None and rank is not None:
            raise ValueError(f"Task vectors are sparse or of low rank, not both: got {keep=} and {rank=}.")
        self.router, self.num_tasks = router, len(finetuned)
        self.pretrained = copy.deepcopy(pretrained).requires_grad_(False)
        taus = _stack([task_vector(pretrained, module) for module in finetuned])  # each (T, *shape of θ_0)

        def form(tau: Tensor) -> _Dense:
            if keep is not None and tau.dim() > 1:
                return _Sparse(tau, keep)
            return _LowRank(tau, rank) if rank is not None and tau.dim() == 3 else _Dense(tau)

        # A ModuleDict takes neither dots nor its own attributes' names for keys: "c_fc.weight" becomes "/c_fc/weight".
        self.stacked = nn.ModuleDict({"/" + name.replace(".", "/"): form(tau) for name, tau in taus.items()})
        # Whether all parameters but vectors are the matrices of nn.Linear, which _MergedLinear never merges as a whole.
        linear = {f"{n}.weight".lstrip(".") for n, module in pretrained.named_modules() if type(module) is nn.Linear}
        self.only_linear = all(name in linear or tau.dim() <= 2 for name, tau in taus.items())

    @property
    def task_vectors(self) -> dict[str, Tensor]:
        return {name: form.dense() for name, form in self.forms.items()}

    @property
    def forms(self) -> dict[str, _Dense]:
        return {name[1:].replace("/", "."): form for name, form in self.stacked.items()}

    def forward(self, *args, **kwargs):
        x = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        if x is None:
            raise TypeError("A WEMoE module takes a tensor of shape (B, ..., D) as its first input.")
        if len(x) == 0:
            return self.pretrained(*args, **kwargs)  # no sample to merge for
        lam = self.router(x)
        if lam.shape != (len(x), self.num_tasks):
            raise ValueError(f"The router gave weights of shape {tuple(lam.shape)} for an input {tuple(x.shape)}.")
        if lam.stride(0) == 0 or len(lam) == 1:  # one λ, expanded to all samples, as a router of depth 0 does
            with _MergedParameters(self.pretrained, self.forms, lam[0]):
                return self.pretrained(*args, **kwargs)
        # For the backward pass, merged weights are not kept but merged again. _MergedLinear sees to that itself, other
        # modules run once more, in a checkpoint. (Before torch 2.6, vmap does not run in one: there they are kept.)
        if torch.is_grad_enabled() and not self.only_linear and torch.__version__ >= (2, 6):
            return checkpoint(self._run_each, lam, x, args, kwargs, use_reentrant=False)
        return self._run_each(lam, x, args, kwargs)

    def _run_each(self, lam: Tensor, x: Tensor, args: tuple, kwargs: dict):
        """Each sample is a batch of one with weights of its own; `torch.vmap` runs all of them at once."""
        split = tree_map(lambda leaf: 0 if _belongs_to_samples(leaf, x) else None, (args, kwargs))
        inputs = tree_map(lambda leaf: leaf.unsqueeze(1) if _belongs_to_samples(leaf, x) else leaf, (args, kwargs))
        output = None  # of one sample: its leaves and their structure, put aside since vmap returns tensors only

        def run_one(lam: Tensor, inputs: tuple) -> list[Tensor]:  # (T,), (1, ..., D)
            nonlocal output
            # The other implementations of attention would go through the samples one by one under vmap.
            with sdpa_kernel(SDPBackend.MATH), _MergedParameters(self.pretrained, self.forms, lam, True):
                output = tree_flatten(self.pretrained(*inputs[0], **inputs[1]))
            return [leaf for leaf in output[0] if isinstance(leaf, Tensor)]

        tensors = iter(torch.vmap(run_one, in_dims=(0, split), randomness="different")(lam, inputs))
        leaves, structure = output
        leaves = [next(tensors).flatten(0, 1) if isinstance(leaf, Tensor) else leaf for leaf in leaves]  # (B, 1, ...)
        return tree_unflatten(leaves, structure)

    def train(self, mode: bool = True) -> "WEMoE":
        """As usual, but that batch normalisation goes on with its merged statistics: each sample is a batch of one."""
        super().train(mode)
        for module in self.pretrained.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.eval()
        return self

    def __getattr__(self, name: str):
        """What else the wrapped module has stays in reach, except for its tensors: every sample has its own."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(super().__getattr__("pretrained"), name)
            if isinstance(value, Tensor):
                raise AttributeError(f"{name!r} differs between samples: route the module that reads it.") from None
            return value


def _belongs_to_samples(tensor: object, x: Tensor) -> bool:
    """Whether an argument is a tensor with one entry for each sample of the first input x (B, ..., D)."""
    if not isinstance(tensor, Tensor) or tensor.dim() == 0 or len(tensor) != len(x):
        return False
    # A mask (tokens, tokens) when B is the number of tokens, a vector (D,) when B = D: nobody could tell whose it is.
    if tensor.dim() < x.dim() and len(x) in x.shape[1 : None if tensor.dim() == 1 else -1]:
        raise ValueError(
            f"An argument of shape {tuple(tensor.shape)} may belong to the samples or to another axis of the input of "
            f"shape {tuple(x.shape)}: use another batch size, or give it as many axes as the input has."
        )
    return True


# What code asks of a parameter without needing its numbers: the merged one would give the same answer.
_METADATA = {getattr(Tensor, name).__get__ for name in ("device", "dtype", "is_cuda", "ndim", "shape")}


class _MergedParameters(TorchFunctionMode):
    """While active, in every torch function a parameter θ_0 of `module` stands for θ_0 + Σ_t λ_t τ_t.

    So any module, whatever its forward does, runs with merged weights. Unlike `torch.func.functional_call`, this merges
    a parameter only where it is used, and so can treat the large ones in another way: under `torch.vmap`, where λ (T,)
    is that of one sample among many (`batched`), F.linear never sees a merged matrix. _MergedLinear takes its place.
    """

    def __init__(self, module: nn.Module, forms: Mapping[str, _Dense], lam: Tensor, batched: bool = False):
        super().__init__()
        self.lam, self.batched = lam, batched
        # Functions are handed the tensors themselves, not their names.
        self.forms = {id(p): forms[name] for name, p in _floating_entries(module).items()}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _METADATA:
            return func(*args, **kwargs)
        if self.batched and func is F.linear and len(args) > 1 and args[1].dim() == 2 and id(args[1]) in self.forms:
            return self._linear(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, self._merge, (args, kwargs))
        return func(*args, **kwargs)

    def _merge(self, p: Tensor) -> Tensor:
        if id(p) not in self.forms:
            return p
        with torch.autocast(p.device.type, enabled=False):
            merged = p + torch.tensordot(self.lam.to(p.dtype), self.forms[id(p)].dense(), dims=1)
        return merged if isinstance(p, nn.Parameter) else merged.detach()  # no function differentiates a buffer

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.forms[id(weight)].linear(x, self.lam, weight, None if bias is None else self._merge(bias))


class _MergedLinear(torch.autograd.Function):
    """y_b = x_b W_b^T + bias_b with W_b = θ_0 + Σ_t λ_bt τ_t: x (B, N, D_in), λ (B, T), θ_0 (D_out, D_in), τ any form.

    Tile by tile, one batch of matrix products merges for many samples and another applies. The backward pass merges
    again, so that memory never holds B sets of weights. x, λ and the bias have gradients; θ_0 and τ are constants.
    """

    @staticmethod
    def forward(x: Tensor, lam: Tensor, theta: Tensor, bias: Tensor | None, form: _Dense) -> Tensor:
        bias = x.new_zeros(len(x), len(theta)) if bias is None else bias.to(x.dtype)
        y = bias[:, None].repeat(1, x.shape[1], 1)  # (B, N, D_out)
        for samples, rows, columns, w, _ in _merged_tiles(lam, theta, form):
            y[samples, :, rows] += x[samples, :, columns] @ w.to(x.dtype).mT
        return y

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, lam, theta, _, ctx.form = inputs
        if theta.requires_grad or any(p.requires_grad for p in ctx.form.parameters()):
            raise NotImplementedError("In a WEMoE module only the router is trainable: freeze everything else.")
        ctx.save_for_backward(x, lam, theta)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, lam, theta = ctx.saved_tensors
        dx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None  # not in the first routed module of a model
        dlam = torch.zeros_like(lam)
        with torch.autocast(x.device.type, enabled=False):
            for samples, rows, columns, w, tau in _merged_tiles(lam, theta, ctx.form):
                if dx is not None:
                    dx[samples, :, columns] += dy[samples, :, rows] @ w.to(x.dtype)
                dw = (dy[samples, :, rows].mT @ x[samples, :, columns]).to(lam.dtype)  # (samples, rows, columns)
                dlam[samples] += (dw.transpose(0, 1) @ tau.mT).sum(0)  # <dw_b, τ_t>
        return dx, dlam, None, dy.sum(1) if ctx.needs_input_grad[3] else None, None

    @staticmethod
    def vmap(info, in_dims, x: Tensor, lam: Tensor, theta: Tensor, bias: Tensor | None, form: _Dense):
        """What torch.vmap calls instead of running sample by sample: all x (B, ..., D_in) and λ (B, T), in one go."""

        def batched(tensor: Tensor, dim: int | None) -> Tensor:
            return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

        x, lam = batched(x, in_dims[0]), batched(lam, in_dims[1])
        bias = None if bias is None else batched(bias, in_dims[3])
        y = _MergedLinear.apply(x.reshape(len(x), -1, x.shape[-1]), lam, theta, bias, form)
        return y.view(*x.shape[:-1], len(theta)), 0


# How many samples, rows and columns a tile of merged weights has at most: 6 MiB in float32 on a CPU, where it is to
# stay in the cache, and 256 MiB on a GPU.
_TILE = {"cpu": (16, 128, 768), "cuda": (16, 4096, 1024)}


def _merged_tiles(lam: Tensor, theta: Tensor, form: _Dense) -> Iterator[tuple[slice, slice, slice, Tensor, Tensor]]:
    """Parts of θ_0 + Σ_t λ_bt τ_t: which samples, rows and columns, w (samples, rows, columns), τ (rows, T, columns).

    Every tile overwrites the one before: fresh memory is slow to come by.
    """
    tile, whole = _TILE.get(lam.device.type, _TILE["cuda"]), (len(lam), *theta.shape)
    memory = theta.new_empty(math.prod(map(min, tile, whole)))
    samples_of, rows_of, columns_of = map(_slices, whole, tile)
    for rows in rows_of:
        tau_rows = form.rows(rows)
        for columns in columns_of:
            theta_0, tau = theta[rows, None, columns], tau_rows[..., columns]  # (rows, 1 or T, columns)
            for samples in samples_of:
                lam_of_row = lam[samples].expand(len(tau), -1, -1)  # (rows, samples, T), the same for each row
                shape = len(tau), lam_of_row.shape[1], tau.shape[2]
                w = memory[: math.prod(shape)].view(shape)
                torch.baddbmm(theta_0, lam_of_row, tau, out=w)  # θ_0 + λ τ, row by row
                yield samples, rows, columns, w.transpose(0, 1), tau


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


@contextmanager
def routing_weights(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the routing weights (B, T) of the last forward pass, for each WEMoE module of `model` by its name.

    with routing_weights(model) as weights:
        model(images)
    weights["transformer.resblocks.0.mlp"]  # (B, T)
    """
    weights: dict[str, Tensor] = {}
    running = []  # the names of the WEMoE modules that have run, the last one last: modules may share a router
    routed = {name: module for name, module in model.named_modules() if isinstance(module, WEMoE)}
    hooks = [m.register_forward_pre_hook(lambda *_, name=name: running.append(name)) for name, m in routed.items()]

    def record(router: nn.Module, inputs: tuple, lam: Tensor) -> None:
        weights[running[-1]] = lam.detach()

    hooks += [router.register_forward_hook(record) for router in {module.router for module in routed.values()}]
    try:
        yield weights
    finally:
        for hook in hooks:
            hook.remove()


# ---- Upscaling -------------------------------------------------------------------------------------------------------

# What open_clip, timm, torchvision and Hugging Face call the MLP of a Transformer block.
_MLP = r"(^|\.)(mlp|DenseReluDense)$"


def upscale(
    pretrained: nn.Module,
    finetuned: Sequence[nn.Module] | Mapping[str, nn.Module],
    *,
    init_lambda: float = 0.3,
    router_depth: int = 2,
    modules: str | Callable[[str, nn.Module], bool] | None = None,
    shared_router: bool = False,
    keep: float | None = None,
    rank: int | None = None,
) -> nn.Module:
    """One model for T tasks: selected modules become WEMoE modules, all else is merged by task arithmetic (Figure 1a).

    `finetuned` holds the T models, in a list or by task name; neither they nor `pretrained` are modified. `init_lambda`
    is λ of task arithmetic, and where routing weights start; `router_depth` is that of `Router`. `modules` says which
    modules to route: None, the MLPs by the names that open_clip, timm, torchvision and Hugging Face transformers give
    them; a regular expression to be found in a module's name; or a predicate (name, module) -> bool. Of modules within
    one another, the outermost is routed. In the result, only the routers require gradients.
    `keep` and `rank` are those of `WEMoE`; with `shared_router`, one router serves all modules, each with its own input
    (E-WEMoE, Shen et al., arXiv 2410.21804, is shared_router=True and keep=0.1).
    Raises ValueError if no module is selected, if the models differ in structure, or if modules with different hidden
    sizes are to share a router.
    """
    models = list(finetuned.values()) if isinstance(finetuned, Mapping) else list(finetuned)
    if not models:
        raise ValueError("upscale needs at least one fine-tuned model, got none.")
    merged = task_arithmetic(pretrained, (task_vector(pretrained, model) for model in models), init_lambda)
    upscaled = copy.deepcopy(pretrained).requires_grad_(False)
    upscaled.load_state_dict(merged)
    routed: dict[nn.Module, WEMoE] = {}  # a module that the model holds under two names stays one module
    router = None
    for name in _selected(pretrained, modules):
        module = pretrained.get_submodule(name)
        if module not in routed:
            hidden_size = _hidden_size(name, module) if router_depth else 0
            if router is None or not shared_router:
                router = Router(hidden_size, len(models), router_depth, init_lambda)
                router.to(next(iter(_floating_entries(module).values())))  # its dtype and device
            if router.hidden_size != hidden_size:
                sizes = f"{router.hidden_size} and, {name!r}, {hidden_size}"
                raise ValueError(f"Modules that share a router need one hidden size, found {sizes}.")
            experts = [model.get_submodule(name) for model in models]
            routed[module] = WEMoE(module, experts, router, keep=keep, rank=rank)
        if name == "":
            return routed[module].train(pretrained.training)
        parent, _, child = name.rpartition(".")
        setattr(upscaled.get_submodule(parent), child, routed[module].train(module.training))
    return upscaled


class AdaMerging(nn.Module):
    """θ_0 + Σ_t λ_t τ_t, its λ trained by `adapt`: one for each task, or for each parameter and task.

    AdaMerging (Yang et al., arXiv 2310.02575); on trimmed task vectors, AdaMerging++. `lam` is (1, T) or, layer-wise,
    (parameters, T); `merged()` is what comes of it, as entries of an ordinary state dict.
    Raises ValueError if keys or shapes of a task vector are not those of θ_0.
    """

    def __init__(
        self,
        pretrained: nn.Module,
        task_vectors: Sequence[StateDict],
        layer_wise: bool = True,
        init_lambda: float = 0.3,
    ):
        super().__init__()
        self.pretrained = copy.deepcopy(pretrained).requires_grad_(False)
        stacked = _stack([theta_0 := _floating_entries(pretrained), *task_vectors], "the pre-trained model")
        self.names = list({id(p): name for name, p in theta_0.items()}.values())  # of a tied parameter, one
        taus = (stacked[name][1:].clone() for name in self.names)
        self.tau = nn.ParameterList(nn.Parameter(tau, requires_grad=False) for tau in taus)  # (T, *shape)
        rows = len(self.names) if layer_wise else 1
        self.lam = nn.Parameter(torch.full((rows, len(task_vectors)), float(init_lambda)))

    def merged(self) -> dict[str, Tensor]:
        theta_0 = _floating_entries(self.pretrained)
        merged = {}
        for name, lam, tau in zip(self.names, self.lam.expand(len(self.tau), -1), self.tau):
            total = (p := theta_0[name]) + torch.tensordot(lam.to(tau), tau, dims=1)
            merged[id(p)] = total if isinstance(p, nn.Parameter) else total.detach()  # no function differentiates these
        return {name: merged[id(p)] for name, p in theta_0.items()}

    def forward(self, *args, **kwargs):
        merged, modules = self.merged(), self.pretrained.named_modules()
        # One name for each place: functional_call does not put back well what a module with two names holds.
        places = (f"{name}.{entry}".lstrip(".") for name, m in modules for entry in (*m._parameters, *m._buffers))
        merged = {place: merged[place] for place in places if place in merged}
        return torch.func.functional_call(self.pretrained, merged, args, kwargs, tie_weights=False)


def _selected(model: nn.Module, modules: str | Callable[[str, nn.Module], bool] | None) -> list[str]:
    """Names of the modules to route: those that `modules` selects, hold weights, and lie in no other such module."""
    wanted = modules if callable(modules) else lambda name, _: re.search(_MLP if modules is None else modules, name)
    names: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):  # parents come before their children
        inside = any(outer == "" or name.startswith(outer + ".") for outer in names)
        if not inside and wanted(name, module) and _floating_entries(module):
            names.append(name)
    if not names:
        candidates = [name for name, module in model.named_modules() if name and _floating_entries(module)]
        what = "No MLP was found" if modules is None else f"modules={modules!r} selects no module with weights"
        raise ValueError(f"{what} in {type(model).__name__}; choose with modules= among {_quote(candidates, 20)}.")
    return names


def _hidden_size(name: str, module: nn.Module) -> int:
    """D, the last axis of the module's input, as told by the first matrix in it, or else by its first vector."""
    shapes = [p.shape for p in _floating_entries(module).values()]
    shape = next((shape for shape in shapes if len(shape) == 2), max(shapes, key=len))
    if len(shape) not in (1, 2):
        raise ValueError(
            f"Cannot tell the hidden size of {name!r} ({type(module).__name__}) from its weights: use router_depth=0, "
            "or build WEMoE(pretrained, finetuned, router) yourself."
        )
    return shape[-1]


# ---- Test-time adaptation --------------------------------------------------------------------------------------------


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of softmax(logits), (..., C) -> (...), in nats; exact where the softmax is 0 or 1."""
    log_p = F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)  # 0 log 0 = 0 for a logit of -inf


def _log_mean(logits: Tensor) -> Tensor:
    """The logarithm of the batch's mean prediction, (B, C) -> (C,), plus ln B, for which `entropy` does not care."""
    log_p = F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return log_p.clamp_min(torch.finfo(log_p.dtype).min).logsumexp(0)


def adapt(
    model: nn.Module,
    loaders: Mapping[str, Iterable[Tensor]],
    heads: Mapping[str, Callable[[Tensor], Tensor]],
    *,
    steps: int = 1000,
    lr: float = 1e-4,
    diversity: float = 0.0,
    optimizer: torch.optim.Optimizer | None = None,
    start: int = 0,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> list[float]:
    """Train the routers, in place and without labels, to minimise the entropy of the model's predictions.

    This is the paper's test-time adaptation. Each step takes one batch of every task and descends the sum over tasks
    of the mean entropy, with Adam and a learning rate that a cosine takes to zero; it back-propagates task by task, so
    that memory does not grow with their number.

    Args:
        model: an upscaled model, or one in DistributedDataParallel. What requires gradients in it is trained.
        loaders: task -> iterable of unlabelled input batches, started again when exhausted.
        heads: task -> callable from the model's output to logits (B, C), best frozen: they are not trained.
        steps, lr: number of steps and first learning rate (the paper's are 1000 and 1e-4, at 16 images of every task).
        diversity: how much the entropy of a batch's mean prediction counts against the mean entropy. At 0, the paper's
            objective, one confident answer to everything is as good as any; at 1 the objective is minus the mutual
            information of input and prediction (Bridle et al., NeurIPS 1991; Liang et al., arXiv 2002.08546).
        optimizer, start: to go on with an interrupted adaptation: its optimizer, and the number of steps done. The
            `loaders` are to yield what comes next.
        on_step: called after each step with its number, from 1, and the mean entropy of every task.

    Returns the mean entropy over all tasks, in nats, at each step before its update.
    Raises ValueError if a task has no head or no batch, if a batch is no tensor, if nothing is trainable, if it is in
    float16, or if `steps` or `lr` is out of range; FloatingPointError, naming task and step and leaving the model as it
    was before that step, if an entropy or the gradient is not finite.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("The model has no trainable parameters; adapt takes what upscale returns.")
    if any(p.dtype == torch.float16 for p in trainable):
        raise ValueError("What is trained is in float16, which is too narrow for Adam: use float32 and torch.autocast.")
    if headless := loaders.keys() - heads.keys():
        raise ValueError(f"No head is given for {_quote(headless)}; there are heads for {_quote(heads)}.")
    if not loaders:
        raise ValueError("adapt needs the batches of at least one task, got no loaders.")
    if not 0 <= start < steps or not 0 < lr < math.inf:
        raise ValueError(f"adapt needs steps to take and a positive learning rate, got {steps=}, {start=} and {lr=}.")
    batches = {task: _endless(task, loader) for task, loader in loaders.items()}
    optimizer = optimizer or torch.optim.Adam(trainable)
    last_task = list(loaders)[-1]
    history = []
    for step in range(start + 1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        optimizer.zero_grad()
        losses = {}
        for task in loaders:
            x = next(batches[task]).to(trainable[0].device)
            # In a distributed model, gradients are exchanged once a step.
            with nullcontext() if task == last_task else getattr(model, "no_sync", nullcontext)():
                logits = heads[task](model(x))
                loss = entropy(logits).mean()
                (loss - diversity * entropy(_log_mean(logits)) if diversity else loss).backward()
            losses[task] = loss.detach()
        norm = sum(p.grad.norm() for p in trainable if p.grad is not None)
        *values, norm = torch.stack([*losses.values(), norm]).tolist()
        for what, value in zip([*(f"entropy of task {task!r}" for task in losses), "gradient"], [*values, norm]):
            if not math.isfinite(value):
                optimizer.zero_grad()
                raise FloatingPointError(f"The {what} is {value} at step {step} of {steps}.")
        optimizer.step()
        history.append(sum(values) / len(values))
        if on_step is not None:
            on_step(step, dict(zip(losses, values)))
    optimizer.zero_grad()
    return history


def _endless(task: str, loader: Iterable[Tensor]) -> Iterator[Tensor]:
    for epoch in itertools.count(1):
        batch = None
        for batch in loader:
            if not isinstance(batch, Tensor):
                raise ValueError(f"The loader of task {task!r} yields {type(batch)}; tensors of inputs are needed.")
            yield batch
        if batch is None:
            again = "" if epoch == 1 else " when started again; pass a list or a DataLoader, not an iterator"
            raise ValueError(f"The loader of task {task!r} yields no batch{again}.")
