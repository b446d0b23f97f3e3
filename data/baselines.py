"""The methods that WEMoE is compared with, each a short function of what it needs.

The same notation as in wemoe.py: θ_0 is the pre-trained model, τ_t = θ_t - θ_0 a task vector, λ a coefficient; B
samples, T tasks, D features, `...` any axes. State dicts go by name. A batch is the model's input, or its inputs by
name (a text's input_ids and attention_mask).
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from operator import attrgetter
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import BaseTorchFunctionMode

import wemoe
from wemoe import MergedLayer, MergedLinear, WEMoE

State = dict[str, Tensor]
Vectors = Iterable[State] | Mapping[str, State]
Batch = Tensor | Mapping[str, Tensor]

# ---- Task vectors, trimmed, elected, unified -------------------------------------------------------------------------


@torch.no_grad()
def trim(tau: State, keep: float = 0.2) -> State:
    """The `keep` share of entries of τ, at least one, largest in magnitude over all its tensors; zero elsewhere."""
    magnitudes = torch.cat([entry.abs().flatten().float() for entry in tau.values()])
    threshold = magnitudes.kthvalue(len(magnitudes) - _share(keep, len(magnitudes)) + 1).values
    return {name: torch.where(entry.abs().float() >= threshold, entry, 0) for name, entry in tau.items()}


@torch.no_grad()
def trim_and_elect(task_vectors: Vectors, keep: float = 0.2) -> list[State]:
    """τ̂_t = trim(τ_t), where its sign is the elected one, γ = sgn(Σ_t τ̂_t), and zero elsewhere: TIES' first two steps.

    AdaMerging++ learns λ for these. Raises ValueError if the vectors differ in structure, and unless 0 < keep <= 1.
    """
    trimmed = [trim(tau, keep) for tau in _members(task_vectors)]
    signs = _by_entry(trimmed, lambda taus: taus.sum(0).sign())
    return [{name: torch.where(e * signs[name] > 0, e, 0) for name, e in tau.items()} for tau in trimmed]


def ties(task_vectors: Vectors, keep: float = 0.2, merge: str = "sum") -> State:
    """One vector for all tasks, of the entries that `trim_and_elect` leaves (TIES-Merging, arXiv 2306.01708).

    merge="sum" adds them up: so do the programs of the WEMoE paper and of AdaMerging ("dis-sum"), with λ = 0.3.
    merge="mean" takes the mean of those that are left: TIES' own paper, with λ = 1.
    Raises ValueError for another `merge`, if the vectors differ in structure, and unless 0 < keep <= 1.
    """
    rules = {"sum": lambda taus: taus.sum(0), "mean": lambda taus: taus.sum(0) / (taus != 0).sum(0).clamp_min(1)}
    if merge not in rules:
        raise ValueError(f"TIES merges by 'sum' or 'mean', not by {merge!r}.")
    return _by_entry(trim_and_elect(task_vectors, keep), rules[merge])


def emr(task_vectors: Vectors) -> tuple[State, list[State], list[float]]:
    """EMR-Merging's unified vector τ, masks M_t and rescalers λ_t (Huang et al., arXiv 2405.17461):

        γ = sgn(Σ_t τ_t),  τ = γ max_t |τ_t| over the t with sgn(τ_t) = γ,  M_t = (τ_t τ > 0),  λ_t = Σ|τ_t| / Σ|M_t τ|

    entry by entry, but the sums in λ_t are over all entries. The model of task t is θ_0 + λ_t M_t τ.
    """

    def rule(taus: Tensor) -> Tensor:
        sign = taus.sum(0).sign()
        return sign * (taus.abs() * (taus * sign > 0)).amax(0)

    vectors = _members(task_vectors)
    unified, rescalers = _by_entry(vectors, rule), []
    masks = [{name: tau[name] * entry.sign() > 0 for name, entry in unified.items()} for tau in vectors]
    for tau, mask in zip(vectors, masks):
        kept = _magnitude({name: mask[name] * entry for name, entry in unified.items()})
        rescalers.append(_magnitude(tau) / kept if kept else 0.0)
    return unified, masks, rescalers


def tall_masks(task_vectors: Vectors, threshold: float = 0.4) -> tuple[State, list[State]]:
    """The sum τ of the task vectors, and what each task needs of it, M_t = (|τ_t| > threshold |τ - τ_t|).

    The model of task t is θ_0 + M_t τ (TALL masks, Wang et al., arXiv 2405.07813; there the threshold,
    of 0.2 to 0.6, is chosen for each task on labelled images).
    """
    vectors = _members(task_vectors)
    needed = _by_entry(vectors, lambda taus: taus.abs() > threshold * (taus.sum(0) - taus).abs())
    masks = [{name: of_tasks[t] for name, of_tasks in needed.items()} for t in range(len(vectors))]
    return _by_entry(vectors, lambda taus: taus.sum(0)), masks


def consensus(task_vectors: Vectors, threshold: float = 0.4, least: int = 2) -> State:
    """The sum of the task vectors where `least` tasks or more need it, by `tall_masks`, zero elsewhere (2405.07813)."""
    unified, masks = tall_masks(task_vectors, threshold)
    return {n: torch.where(sum(m[n].int() for m in masks) >= least, tau, 0) for n, tau in unified.items()}


def _share(keep: float, count: int) -> int:
    """How many of so many entries are kept, at least one. Raises ValueError unless 0 < keep <= 1."""
    if not 0 < keep <= 1:
        raise ValueError(f"The share of entries to keep lies above 0 and up to 1, got {keep=}.")
    return max(1, round(keep * count))


def _members(vectors: Vectors) -> list[State]:
    members = list(vectors.values() if isinstance(vectors, Mapping) else vectors)
    if not members:
        raise ValueError("There is nothing to merge: at least one task vector is needed.")
    return members


def _magnitude(tau: State) -> float:
    return sum(entry.abs().sum(dtype=torch.float64).item() for entry in tau.values())


@torch.no_grad()
def _by_entry(task_vectors: Vectors, rule: Callable[[Tensor], Tensor]) -> State:
    """What the rule makes of each entry of all vectors, (T, *shape) in float64: numbers in their dtype, or masks.

    Raises ValueError, naming the entry, if the vectors differ in structure.
    """
    vectors, merged = _members(task_vectors), {}
    wemoe.task_arithmetic(vectors[0], vectors[1:])  # refuses what differs
    for name, entry in vectors[0].items():
        result = rule(torch.stack([tau[name] for tau in vectors]).double())
        merged[name] = result.to(entry.dtype) if result.is_floating_point() else result
    return merged


# ---- Matrices by their singular values, all else by the mean ---------------------------------------------------------

_svd = partial(torch.linalg.svd, full_matrices=False)  # (..., D_out, r), (..., r), (..., r, D_in)


def tsv_merge(task_vectors: Vectors) -> State:
    """TSV-M (Gargiulo et al., arXiv 2412.00081): of each task's matrix the first r/T singular triples, orthogonalised.

    θ_0 + α τ with α = 1. Tasks whose matrices have a rank of at most r/T and share no direction are added up.
    """
    return _by_matrix(task_vectors, lambda taus: _orthogonal_sum(*_first_triples(taus)))


def iso_c(task_vectors: Vectors) -> State:
    """Iso-C (Marczak et al., arXiv 2502.04959): the sum of the tasks' matrices, each singular value being their mean.

    θ_0 + α τ, in the paper with an α above 1 that is best on labelled images.
    """

    def rule(taus: Tensor) -> Tensor:
        u, s, v = _svd(taus.sum(0))
        return s.mean() * u @ v

    return _by_matrix(task_vectors, rule)


def iso_cts(task_vectors: Vectors, common: float = 0.8) -> State:
    """Iso-CTS (arXiv 2502.04959): of the sum of the matrices this share of directions, the rest the tasks' own.

    Each task gives the same number n of triples, the first of τ_t - U Uᵀ τ_t, U being what is common. Directions are
    made orthogonal, all singular values become their mean. α as in `iso_c`.
    """

    def rule(taus: Tensor) -> Tensor:
        u, s, v = _svd(taus.sum(0))
        n = round((len(s) - int(common * len(s))) / len(taus))
        c = len(s) - n * len(taus)
        own_u, own_s, own_v = _svd(taus - u[:, :c] @ (u[:, :c].T @ taus))
        u = torch.cat([u[:, :c], *own_u[..., :n]], dim=1)
        s = torch.cat([s[:c], *own_s[:, :n]])
        v = torch.cat([v[:c], *own_v[:, :n]])
        return s.mean() * _polar(u) @ _polar(v)

    return _by_matrix(task_vectors, rule)


def wudi(task_vectors: Vectors, steps: int = 300, lr: float = 1e-5) -> State:
    """WUDI (Cheng et al., arXiv 2503.08099): min Σ_t |(τ - τ_t) τ_tᵀ|² / |τ_t|² for each matrix, by Adam from Σ_t τ_t.

    That is RegMean with the Gram matrix τ_tᵀ τ_t / |τ_t|² in place of that of the inputs, which rows of τ_t resemble.
    Adam's steps are as long as `lr`, whatever the objective: the authors' 1e-5 is for CLIP's task vectors.
    """

    def rule(taus: Tensor) -> Tensor:
        grams = taus.mT @ taus / taus.square().sum((1, 2), keepdim=True).clamp_min(torch.finfo(taus.dtype).tiny)
        total, target = grams.sum(0), (taus @ grams).sum(0)
        tau = nn.Parameter(taus.sum(0))
        optimizer = torch.optim.Adam([tau], lr)
        for _ in range(steps):
            tau.grad = 2 * (tau @ total - target)
            optimizer.step()
        return tau.detach()

    return _by_matrix(task_vectors, rule)


def _by_matrix(task_vectors: Vectors, rule: Callable[[Tensor], Tensor]) -> State:
    """One vector for all tasks: matrices by `rule`, (T, D_out, D_in) -> (D_out, D_in), all else by the mean."""
    return _by_entry(task_vectors, lambda taus: rule(taus) if taus.dim() == 3 else taus.mean(0))


def _first_triples(taus: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first k = r/T singular triples of each task's matrix, at least one: (T, D_out, k), (T, k), (T, k, D_in)."""
    u, s, v = _svd(taus)
    k = max(1, s.shape[1] // len(taus))
    return u[..., :k], s[:, :k], v[:, :k]


def _orthogonal_sum(u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """Σ_t U_t S_t V_t with all U's columns made orthonormal, and all V's rows; (T, D_out, k), (T, k), (T, k, D_in)."""
    return _polar(u.movedim(1, 0).flatten(1)) * s.flatten() @ _polar(v.flatten(0, 1))


def _polar(x: Tensor) -> Tensor:
    """The matrix with orthonormal columns (or rows, of which there are fewer) that is nearest to x (Procrustes)."""
    u, _, v = _svd(x)
    return u @ v


# ---- Adapted without labels: λ, or a mask ----------------------------------------------------------------------------


class AdaMerging(MergedLayer):
    """θ_0 + Σ_t λ_t τ_t, its λ trained by `wemoe.adapt`: one for each task, or for each parameter and task.

    AdaMerging (Yang et al., arXiv 2310.02575); on `trim_and_elect`ed task vectors, AdaMerging++. `lam` is (1, T) or,
    layer-wise, (parameters, T); in use it is clamped to [0, 1], as in its authors' program, unless `clamp` is False.
    `merged()` is what comes of it, as entries of an ordinary state dict.
    Raises ValueError if a task vector does not fit θ_0, if a λ to be clamped starts outside [0, 1], or if a part cannot
    be merged.
    """

    def __init__(
        self,
        pretrained: nn.Module,
        task_vectors: Vectors,
        layer_wise: bool = True,
        init_lambda: float = 0.3,
        clamp: bool = True,
    ):
        if clamp and not 0 <= init_lambda <= 1:
            raise ValueError(f"λ lies between 0 and 1 in AdaMerging, got {init_lambda=}.")
        wemoe.check_mergeable(pretrained)
        vectors = _members(task_vectors)
        for tau in vectors:
            fitting = wemoe.task_vector(pretrained, tau)  # refuses what does not fit
        model = copy.deepcopy(pretrained).requires_grad_(False)
        theta_0 = {name: p for name, p in model.state_dict(keep_vars=True).items() if name in fitting}
        vectors = [{name: v[name].detach().to(p) for name, p in theta_0.items()} for v in vectors]
        super().__init__(model, [wemoe.by_path(model, v) for v in vectors])
        self.clamp = clamp
        index = {attrgetter(path)(model): i for path, i in self.names.items()}
        self.entries = {name: index[p] for name, p in theta_0.items()}  # of the state dict; a tied tensor has one λ
        shape = len(index) if layer_wise else 1, len(vectors)
        self.lam = nn.Parameter(torch.full(shape, float(init_lambda), device=self.tau(0).device))

    def delta(self, lam: Tensor, i: int) -> Tensor:
        lam = lam[i if len(lam) > 1 else 0]
        return super().delta(lam.clamp(0, 1) if self.clamp else lam, i)

    def merged(self) -> State:
        theta_0 = self.layer.state_dict()
        with torch.autocast(self.lam.device.type, enabled=False):
            return {name: theta_0[name] + self.delta(self.lam, i) for name, i in self.entries.items()}

    def forward(self, *args, **kwargs):
        return self.for_all(self.lam, *args, **kwargs)


class ConcreteMask(AdaMerging):
    """θ_0 + m / mean(m) ∘ Σ_t λ τ_t: one mask m over the parameters, the mean taken in each tensor, λ constant.

    m = σ((x + ln u/(1-u)) / 0.5) with trainable logits x, 0 at first, and u uniform, drawn anew at every forward
    pass, is the Concrete relaxation of a binary mask (Tang et al., arXiv 2312.06173); u = 1/2 without gradients.
    """

    def __init__(self, pretrained: nn.Module, task_vectors: Vectors, scaling: float = 0.3):
        super().__init__(pretrained, task_vectors, layer_wise=False, init_lambda=scaling)
        self.lam.requires_grad_(False)
        self.x = nn.ParameterList(torch.zeros_like(self.tau(i)[0]) for i in sorted(set(self.names.values())))

    def delta(self, lam: Tensor, i: int) -> Tensor:
        return self.mask(i) * super().delta(lam, i)

    def mask(self, i: int) -> Tensor:
        x = self.x[i]
        if torch.is_grad_enabled():
            x = x + torch.rand_like(x).clamp(1e-6, 1 - 1e-6).logit()
        mask = torch.sigmoid(x / 0.5)
        return mask / mask.mean()

    def masks(self) -> State:
        return {name: self.mask(i) for name, i in self.entries.items()}


class AdaRank(AdaMerging):
    """AdaMerging that learns, besides λ, which singular components of each task's matrices to keep (arXiv 2503.22178).

    A binary mask m = (σ(x / 10) > 1/2) with trainable x, 0.1 at first, and the gradient of the sigmoid; λ is not
    clamped. (This is the paper's TA + AdaRank; CART + AdaRank starts from the models' mean, with less than full rank.)
    """

    def __init__(self, pretrained: nn.Module, task_vectors: Vectors, init_lambda: float = 0.3):
        super().__init__(pretrained, task_vectors, init_lambda=init_lambda, clamp=False)
        self.x, self.factors = nn.ParameterDict(), nn.ParameterDict()
        for i in sorted(set(self.names.values())):
            if self.tau(i).dim() == 3:
                u, s, v = _svd(self._parameters.pop(f"tau_{i}").detach())
                self.x[str(i)] = torch.full_like(s, 0.1)  # (T, r): all kept at first
                self.factors[f"us_{i}"] = nn.Parameter((u * s[:, None]).movedim(1, 0).contiguous(), requires_grad=False)
                self.factors[f"v_{i}"] = nn.Parameter(v.contiguous(), requires_grad=False)

    def delta(self, lam: Tensor, i: int) -> Tensor:
        if str(i) not in self.x:
            return super().delta(lam, i)
        us, v = self.factors[f"us_{i}"], self.factors[f"v_{i}"]  # (D_out, T, r), (T, r, D_in)
        soft = torch.sigmoid(self.x[str(i)] / 10)
        mask = soft + ((soft > 0.5).to(soft) - soft).detach()  # the gradient is that of the sigmoid
        return (us * (lam[i][:, None] * mask).to(us)).flatten(1) @ v.flatten(0, 1)


# ---- WEMoE's relatives: other forms of τ, shared routers, a router that was told the tasks ---------------------------


class SparseLinear(MergedLinear):
    """Of each task's matrix only the `keep` share of entries, the largest in magnitude, with their places (E-WEMoE).

    `layer=partial(SparseLinear, keep=0.1)` for `wemoe.upscale`. Raises ValueError unless 0 < keep <= 1.
    """

    def __init__(self, linear: nn.Linear, vectors: Vectors, keep: float):
        super().__init__(linear, vectors)
        dense = self._parameters.pop("tau_0").detach()
        self.shape, flat = dense.shape, dense.flatten(1)
        kept = flat.abs().topk(_share(keep, flat.shape[1])).indices  # (T, kept)
        mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, kept, True).view(self.shape)
        by_rows = mask.transpose(0, 1).flatten()  # (D_out · T · D_in): what a few rows need lies together
        index = by_rows.nonzero().flatten()
        self.register_buffer("index", index.int() if len(by_rows) < 2**31 else index)
        self.values = nn.Parameter(dense.transpose(0, 1).flatten()[by_rows], requires_grad=False)

    def tau(self, i: int) -> Tensor:
        return self.tau_rows(slice(0, self.shape[1])) if i == 0 else super().tau(i)

    def tau_rows(self, rows: slice) -> Tensor:
        size = self.shape[0] * self.shape[2]  # of one row, all tasks
        ends = [rows.start * size, min(rows.stop, self.shape[1]) * size]
        start, stop = torch.searchsorted(self.index, self.index.new_tensor(ends)).tolist()
        tile = self.values.new_zeros(ends[1] - ends[0])
        tile.scatter_(0, self.index[start:stop].long() - ends[0], self.values[start:stop])
        return tile.view(-1, self.shape[0], self.shape[2]).transpose(0, 1)


class LowRankLinear(MergedLinear):
    """Each task's matrix truncated to rank r by its singular value decomposition, as two factors: τ_t ≈ U_t V_t.

    They are never multiplied: x (θ_0 + Σ_t λ_t U_t V_t)ᵀ = x θ_0ᵀ + Σ_t λ_t (x V_tᵀ) U_tᵀ, two thin products.
    `layer=partial(LowRankLinear, rank=16)` for `wemoe.upscale`. Raises ValueError for a rank below 1.
    """

    def __init__(self, linear: nn.Linear, vectors: Vectors, rank: int):
        super().__init__(linear, vectors)
        u, v = _factors(self._parameters.pop("tau_0").detach(), rank)
        self.u = nn.Parameter(u.movedim(1, 0).contiguous(), requires_grad=False)  # (D_out, T, r)
        self.v = nn.Parameter(v.contiguous(), requires_grad=False)  # (T, r, D_in)

    def tau(self, i: int) -> Tensor:
        return self.u.movedim(1, 0) @ self.v if i == 0 else super().tau(i)

    def for_all(self, lam: Tensor, x: Tensor) -> Tensor:
        return self.for_each(lam[None], x)

    def for_each(self, lam: Tensor, x: Tensor) -> Tensor:
        x = x if len(lam) == 1 else x.expand(len(lam), *x.shape[1:])
        lam = lam.view(len(lam), *[1] * (x.dim() - 2), -1)  # (B, ..., T)
        h = F.linear(x, self.v.flatten(0, 1))  # (B, ..., T · r)
        h = h * lam.to(h.dtype).repeat_interleave(self.v.shape[1], -1)
        weight, bias = self.layer.weight, self.layer.bias
        y = F.linear(x, weight, bias).add_(F.linear(h, self.u.flatten(1)))
        return y if bias is None else y.add_(lam.to(bias) @ super().tau(1))


def _factors(tau: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(..., D_out, r) and (..., r, D_in), whose product comes closest to τ (..., D_out, D_in)."""
    if rank < 1:
        raise ValueError(f"Task vectors have a rank of at least 1, got {rank=}.")
    u, s, v = torch.linalg.svd(tau.to(torch.promote_types(tau.dtype, torch.float32)), full_matrices=False)
    return (u * s[..., None, :])[..., :rank].to(tau.dtype), v[..., :rank, :].to(tau.dtype)


def share_router(model: nn.Module) -> nn.Module:
    """Let the first router of an upscaled model serve all its modules, each with its own input (E-WEMoE, 2410.21804).

    Raises ValueError if nothing is routed, or if the modules' hidden sizes differ.
    """
    routed = {name: module for name, module in model.named_modules() if isinstance(module, WEMoE)}
    sizes = {module.router.hidden_size: name for name, module in routed.items()}
    if len(sizes) != 1:
        found = " and ".join(f"{size} ({name!r})" for size, name in sizes.items()) or "no routed module"
        raise ValueError(f"Modules that share a router need one hidden size, found {found}.")
    (first, *_) = routed.values()
    for module in routed.values():
        module.router = first.router
    return model


def average_over_batch(model: nn.Module) -> nn.Module:
    """Let the routed modules of an upscaled model merge once for each batch, with the mean of its samples' λ.

    So the library FusionBench adapts and evaluates (its `batch_reduce`). What a sample comes to then depends on what it
    is batched with: the mean over images of one task tells the task better than one image does. Of a distributed
    model, each process averages over its own part of the batch. Constant routers stay as they are.
    """
    for module in model.modules():
        if isinstance(module, WEMoE) and getattr(module.router, "depth", None) != 0:
            module.router = BatchRouter(module.router)
    return model


class BatchRouter(nn.Module):
    """A router's λ in the mean over the batch, for all its samples: (B, ..., D) -> (1, T)."""

    def __init__(self, router: nn.Module):
        super().__init__()
        self.router, self.num_tasks = router, router.num_tasks

    def forward(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.router(h, mask).mean(0, keepdim=True)


class TwinMerging(nn.Module):
    """What all tasks share, plus what is each task's own in low rank (Lu et al., arXiv 2406.15479).

    θ(x) = θ_s + Σ_t λ_t(x) τ_t in the routed modules of `model`. λ(x) is the softmax of a linear `classifier` of tasks,
    once for an input, on the normalised features of the shared model, which is this model at λ = 0.
    """

    def __init__(self, model: nn.Module, num_tasks: int, features: Callable[[nn.Module, Batch], Tensor]):
        super().__init__()
        self.model, self.num_tasks, self.features_of = model.requires_grad_(False), num_tasks, features
        self.router, self.classifier = _Given(), nn.LazyLinear(num_tasks)
        for module in model.modules():
            if isinstance(module, WEMoE):
                module.router = self.router

    def features(self, batch: Batch) -> Tensor:
        with self.routed_by(torch.zeros(1, self.num_tasks, device=_device(batch))):
            features = F.normalize(self.features_of(self.model, batch).float(), dim=-1)  # (B, D)
        return features * features.shape[-1] ** 0.5

    def task_weights(self, batch: Batch) -> Tensor:
        return self.classifier(self.features(batch)).softmax(-1)  # (B, T)

    def forward(self, *args, **kwargs):
        if len(args) + bool(kwargs) != 1:
            raise TypeError("Twin-Merging takes one input, or inputs by name.")
        (batch,) = args or (kwargs,)
        with self.routed_by(self.task_weights(batch)):
            return run(self.model, batch)

    def routed_by(self, lam: Tensor) -> AbstractContextManager:
        """Meanwhile, λ (B, T), or (1, T) for all samples, is this in all routed modules."""
        return patch.object(self.router, "lam", lam)


class _Given(nn.Module):
    """A router that gives the λ (B, T), or (1, T) for all samples, which it was given for one forward pass."""

    lam: Tensor | None = None

    def forward(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.lam is None:
            raise RuntimeError("A module of Twin-Merging runs in a forward pass of the whole, which gives λ.")
        return self.lam


# Transformer blocks in open_clip, timm, torchvision and Hugging Face.
BLOCKS = r"(^|\.)(resblocks|blocks?|layers?|h)\.(\w+_)?\d+$"


def twin_merging(
    pretrained: nn.Module,
    finetuned: Mapping[str, nn.Module],
    inputs: Mapping[str, Batch],
    *,
    scaling: float = 0.3,
    rank: int = 16,
    steps: int = 300,
    lr: float = 1e-2,
    modules: str | Callable[[str, nn.Module], bool] = BLOCKS,
    features: Callable[[nn.Module, Batch], Tensor] | None = None,
) -> TwinMerging:
    """Twin-Merging, its classifier trained on a batch of inputs of each task, the task being their label.

    θ_s comes from task arithmetic, and τ_t = θ_t - θ_s with matrices of rank r. `modules` have a part of their own,
    selected as by wemoe.upscale; the rest is θ_s. `features(model, batch)` (B, D) is what the classifier sees: unless
    given, the model's output. All is done on the inputs' device. Raises ValueError if the tasks differ.
    """
    _check_tasks(finetuned, inputs)
    device = _device(next(iter(inputs.values())))
    shared = copy.deepcopy(pretrained).to(device)
    vectors = (wemoe.task_vector(shared, model) for model in finetuned.values())
    shared.load_state_dict(wemoe.task_arithmetic(shared, vectors, scaling))
    experts = []
    for model in finetuned.values():
        own = wemoe.task_vector(shared, model)
        # Those of attention, too, which has no other form than the dense one.
        own |= {name: torch.matmul(*_factors(tau, rank)) for name, tau in own.items() if tau.dim() == 2}
        experts.append(wemoe.task_arithmetic(shared, [own], 1.0))
    layer = partial(LowRankLinear, rank=rank)
    model = wemoe.upscale(shared, experts, init_lambda=0.0, router_depth=0, modules=modules, layer=layer)
    twin = TwinMerging(model, len(experts), features or run).to(device)
    with torch.no_grad():
        seen = [twin.features(inputs[task]) for task in finetuned]
    labels = torch.cat([torch.full((len(x),), task, device=device) for task, x in enumerate(seen)])
    seen = torch.cat(seen)
    twin.classifier(seen[:1])  # so that it has weights
    optimizer = torch.optim.Adam(twin.classifier.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.enable_grad():
            F.cross_entropy(twin.classifier(seen), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return twin


class Smile(nn.Module):
    """SMILE (Tang et al., arXiv 2408.10174): in every linear layer, every token has the expert that it is nearest to.

        y = W_0 x + b_0 + U_t S_t V_t x + b_t - b_0,  t = argmax_t |V_t x| over the first `gate_rank` rows of V_t

    with W_t - W_0 ≈ U_t S_t V_t of rank `rank`. Nothing is trained, and what is not linear is that of the pre-trained
    model. (Attention's packed query, key and value are one layer here.)
    """

    def __init__(self, pretrained: nn.Module, finetuned: wemoe.Models, gate_rank: int = 16, rank: int = 32):
        super().__init__()
        self.model, self.gate_rank = copy.deepcopy(pretrained).requires_grad_(False), gate_rank
        vectors = [wemoe.task_vector(pretrained, model) for model in _members(finetuned)]
        self.num_tasks, self.experts = len(vectors), nn.ModuleList()
        self.layers: dict[str, bool] = {}  # by the name of its matrix: whether its tokens are in the samples' order
        self.choices: dict[Tensor, Tensor] | None = None  # by matrix, (B, ..., T), while they are asked for
        for path, module in self.model.named_modules():
            kind = "in_proj_" if isinstance(module, nn.MultiheadAttention) else ""
            names = [f"{path}.{kind}{of}".lstrip(".") for of in ("weight", "bias")]
            if isinstance(module, nn.Linear | nn.MultiheadAttention) and names[0] in vectors[0]:
                tau, *biases = (torch.stack([v[name] for v in vectors]) for name in names if name in vectors[0])
                self.experts.append(nn.ParameterList([*_factors(tau, rank), *biases]).requires_grad_(False))
                self.layers[names[0]] = type(module) is nn.Linear  # attention puts its tokens in another order

    def forward(self, *args, **kwargs):
        experts = dict(zip(map(self.model.get_parameter, self.layers), self.experts))

        def routed(linear: Callable, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            y = linear(x, weight, bias)
            if weight not in experts:
                return y
            u, v, *biases = experts[weight]  # (T, D_out, r), (T, r, D_in), (T, D_out)
            h = linear(x, v.flatten(0, 1)).unflatten(-1, v.shape[:2])  # (..., T, r)
            energy = h[..., : self.gate_rank].square().sum(-1)
            choice = F.one_hot(energy.argmax(-1), self.num_tasks).to(h)  # (..., T)
            if self.choices is not None:
                self.choices[weight] = choice
            y = y + linear((h * choice[..., None]).flatten(-2), u.movedim(1, 0).flatten(1))
            return y + choice @ biases[0] if biases else y

        with _linear_by(routed):
            return self.model(*args, **kwargs)

    @torch.no_grad()
    def task_weights(self, batch: Batch) -> Tensor:
        """(B, T): how many of a sample's tokens have each expert, in the mean over layers."""
        with patch.object(self, "choices", {}) as choices:
            run(self, batch)
        of_layers = [choices[self.model.get_parameter(name)] for name, in_order in self.layers.items() if in_order]
        return sum(choice.reshape(len(choice), -1, self.num_tasks).mean(1) for choice in of_layers) / len(of_layers)


class Mass(nn.Module):
    """MASS (Crisostomi et al., arXiv 2504.05342): TSV-M of those experts alone that an input seems to need, untrained.

    In a first pass, through TSV-M of all, x is the first token at the input of the linear layer `layer`, whose matrices
    have the first r/T singular triples U_t, S_t, V_t. Weights are the softmax of -|x - V_tᵀ V_t x|, standardised over
    tasks, and 0 unless above `threshold` and among the `most` highest. The second pass is that of the tasks left.
    """

    def __init__(
        self, pretrained: nn.Module, finetuned: wemoe.Models, layer: str, threshold: float = 0.2, most: int = 3
    ):
        super().__init__()
        self.model, self.layer = copy.deepcopy(pretrained).requires_grad_(False), layer
        self.threshold, self.most, self.kept = threshold, most, {}
        vectors = [wemoe.task_vector(pretrained, model) for model in _members(finetuned)]
        self.num_tasks, self.names, self.parts = len(vectors), list(vectors[0]), nn.ParameterList()
        for name in self.names:
            taus = torch.stack([tau[name] for tau in vectors])
            parts = _first_triples(taus) if taus.dim() == 3 else [taus]
            self.parts.append(nn.ParameterList(p.contiguous() for p in parts).requires_grad_(False))

    def merged(self, tasks: tuple[int, ...]) -> State:
        """θ_0 + τ of these tasks; the last six merges are kept."""
        if tasks not in self.kept:
            theta_0 = self.model.state_dict()
            parts = [[p[list(tasks)] for p in parts] for parts in self.parts]
            taus = (_orthogonal_sum(*p) if len(p) == 3 else p[0].mean(0) for p in parts)
            self.kept = dict([*self.kept.items()][-5:])
            self.kept[tasks] = {name: theta_0[name] + tau for name, tau in zip(self.names, taus)}
        return self.kept[tasks]

    @torch.no_grad()
    def task_weights(self, batch: Tensor) -> Tensor:
        """(B, T), the weights of the tasks that are left, 0 for all others."""
        seen = []
        gate = self.model.get_submodule(self.layer).register_forward_pre_hook(lambda _, x: seen.append(x[0][:, 0]))
        functional_call(self.model, self.merged(tuple(range(self.num_tasks))), batch)
        gate.remove()
        v = self.parts[self.names.index(f"{self.layer}.weight")][2]  # (T, k, D)
        (x,) = seen  # (B, D)
        energy = x.square().sum(-1, keepdim=True) - torch.einsum("bd,tkd->btk", x, v).square().sum(-1)
        logits = -energy.clamp_min(0).sqrt()  # (B, T)
        spread = logits.std(1, keepdim=True, correction=min(1, self.num_tasks - 1)) + 1e-6
        weights = ((logits - logits.mean(1, keepdim=True)) / spread).softmax(-1)
        top = weights.topk(min(self.most, self.num_tasks)).values
        return weights * (weights >= top[:, -1:]) * ((weights > self.threshold) | (weights == top[:, :1]))

    @torch.no_grad()
    def forward(self, batch: Tensor) -> Tensor:
        groups, group = (self.task_weights(batch) > 0).unique(dim=0, return_inverse=True)
        choices = [tuple(row.nonzero().flatten().tolist()) for row in groups]
        outputs = [functional_call(self.model, self.merged(t), batch[group == i]) for i, t in enumerate(choices)]
        return torch.cat(outputs)[group.argsort(stable=True).argsort()]  # in the order of the batch again


class Ensemble(nn.Module):
    """The mean of the models' normalised features, that is, the mean of their logits."""

    def __init__(self, models: Iterable[nn.Module] | Mapping[str, nn.Module]):
        super().__init__()
        self.models = nn.ModuleList(_members(models))

    def forward(self, *args, **kwargs) -> Tensor:
        return sum(F.normalize(model(*args, **kwargs), dim=-1) for model in self.models)


# ---- Means of models by what inputs of their tasks say ---------------------------------------------------------------


def fisher_merging(
    finetuned: Mapping[str, nn.Module], inputs: Mapping[str, Batch], heads: Mapping[str, Callable[..., Tensor]]
) -> State:
    """Σ_t F_t θ_t / Σ_t F_t, entry by entry, F being diagonal Fisher information (arXiv 2111.09832)."""
    _check_tasks(finetuned, inputs, heads)
    fishers = [fisher_information(model, inputs[task], heads[task]) for task, model in finetuned.items()]
    return average_by(fishers, [model.state_dict() for model in finetuned.values()], weigh_entries)


def regmean(finetuned: Mapping[str, nn.Module], inputs: Mapping[str, Batch], alpha: float = 0.9) -> State:
    """RegMean (Jin et al., arXiv 2212.09849): linear layers by least squares on their inputs, all else by the mean."""
    return regmean_plus_plus(finetuned, inputs, alpha, blocks="^$")  # one block, the whole model


def regmean_plus_plus(
    finetuned: Mapping[str, nn.Module], inputs: Mapping[str, Batch], alpha: float = 0.95, blocks: str = BLOCKS
) -> State:
    """RegMean++ (Nguyen et al., arXiv 2508.03121): block by block, on the inputs that the merged blocks before give it.

    `blocks` is a regular expression for the names of the blocks; what is in none is averaged.
    """
    _check_tasks(finetuned, inputs)
    states = {task: model.state_dict() for task, model in finetuned.items()}
    merged = average_by([{}], list(states.values()), least_squares)
    hybrid = copy.deepcopy(next(iter(finetuned.values())))
    names = [name for name, _ in hybrid.named_modules() if re.search(blocks, name)]
    for block in [f"{name}." if name else "" for name in names]:
        own, grams = [], []
        for task, state in states.items():
            own.append({name: p for name, p in state.items() if name.startswith(block)})
            hybrid.load_state_dict(merged | own[-1])
            grams.append(gram_matrices(hybrid, inputs[task]))
        merged |= average_by(grams, own, partial(least_squares, alpha=alpha))
    return merged


def fisher_information(model: nn.Module, batch: Batch, logits: Callable[..., Tensor]) -> State:
    """Diagonal Fisher information by parameter name, without labels (Matena and Raffel, arXiv 2111.09832):

        F = 1/N Σ_n Σ_y p(y|x_n) (∂/∂θ log p(y|x_n))²,  p(·|x) = softmax(logits(model(x)))

    Of more than 16 classes, 16 are drawn from p instead of summing over all.
    """
    model = copy.deepcopy(model).to(_device(batch)).requires_grad_()
    theta, samples = list(model.parameters()), _split(batch, 1)
    total = [torch.zeros_like(p) for p in theta]
    for x in samples:
        # The other implementations of attention would go through the classes one by one.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            log_p = F.log_softmax(logits(run(model, x)), dim=-1)[0]  # (C,)
        p = log_p.detach().exp()
        rows = p.sqrt().diag() if len(p) <= 16 else F.one_hot(torch.multinomial(p, 16, True), len(p)) / 4.0
        gradients = torch.autograd.grad(log_p, theta, rows, is_grads_batched=True, materialize_grads=True)
        for f, gradient in zip(total, gradients):  # (16, *shape)
            f += gradient.square().sum(0) / len(samples)
    return {name: f.cpu() for (name, _), f in zip(model.named_parameters(), total)}


@torch.no_grad()
def gram_matrices(model: nn.Module, batch: Batch) -> State:
    """XᵀX / N (D_in, D_in) by the name of each matrix in a linear layer, X (N, D_in) being its inputs.

    All tokens of an image are inputs, and those of a text that its `attention_mask` leaves.
    """
    model = copy.deepcopy(model).to(_device(batch))
    names, sums, mask = {p: name for name, p in model.named_parameters()}, {}, None

    def recording(linear: Callable, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight in names:
            masked = mask is not None and mask.shape == x.shape[:-1]
            x_rows = x[mask != 0] if masked else x.reshape(-1, x.shape[-1])
            total, count = sums.get(names[weight], (0, 0))
            sums[names[weight]] = total + x_rows.T @ x_rows, count + len(x_rows)
        return linear(x, weight, bias)

    with _linear_by(recording):
        for part in _split(batch, 64):
            mask = None if isinstance(part, Tensor) else part.get("attention_mask")
            run(model, part)
    return {name: (total / count).cpu() for name, (total, count) in sums.items()}


@contextmanager
def _linear_by(function: Callable[..., Tensor]) -> Iterator[None]:
    """Meanwhile, function(F.linear, x, weight, bias) is what F.linear does, for attention, too."""
    # Under any mode, attention leaves its fused implementation, which does not call F.linear.
    with patch.object(F, "linear", partial(function, F.linear)), BaseTorchFunctionMode():
        yield


def weigh_entries(thetas: Tensor, fishers: Tensor) -> Tensor:
    """Fisher merging: Σ_t F_t θ_t / Σ_t F_t, entry by entry; (T, ...), (T, ...) -> (...)."""
    total = fishers.sum(0)
    return torch.where(total > 0, (fishers * thetas).sum(0) / total, thetas.mean(0))


def least_squares(thetas: Tensor, grams: Tensor, alpha: float = 0.9) -> Tensor:
    """RegMean (Jin et al., arXiv 2212.09849): Wᵀ = (Σ_t G_t)⁻¹ Σ_t G_t W_tᵀ, off-diagonal entries of G_t times `alpha`.

    (T, D_out, D_in), (T, D_in, D_in) -> (D_out, D_in). With alpha = 1, W = argmin Σ_t |X_t (W - W_t)ᵀ|² / N_t. Where a
    feature is always 0 anything would do, and the mean is taken.
    """
    grams = alpha * grams + (1 - alpha) * grams.diagonal(dim1=1, dim2=2).diag_embed()
    total, average = grams.sum(0), thetas.mean(0)
    ridge = total.diagonal().mean() * 1e-9 + torch.finfo(total.dtype).tiny
    total.diagonal().add_(ridge)
    return average + torch.linalg.solve(total, (grams @ (thetas - average).mT).sum(0)).mT


@torch.no_grad()
def average_by(statistics: list[State], models: list[State], rule: Callable[[Tensor, Tensor], Tensor]) -> State:
    """The mean of the models, entry by entry, but by `rule` (in float64) where there are statistics of the entry."""
    merged = {}
    for name, entry in models[0].items():
        thetas = torch.stack([model[name].cpu() for model in models]).double()
        known = name in statistics[0]
        mean = rule(thetas, torch.stack([s[name] for s in statistics]).double()) if known else thetas.mean(0)
        merged[name] = mean.to(entry.dtype)
    return merged


# ---- Batches: tensors, or tensors by name ----------------------------------------------------------------------------


def run(model: nn.Module, batch: Batch):
    """What the model makes of its input, or of its inputs by name."""
    return model(batch) if isinstance(batch, Tensor) else model(**batch)


def _split(batch: Batch, size: int) -> list[Batch]:
    if isinstance(batch, Tensor):
        return list(batch.split(size))
    return [dict(zip(batch, parts)) for parts in zip(*(x.split(size) for x in batch.values()))]


def _device(batch: Batch) -> torch.device:
    return batch.device if isinstance(batch, Tensor) else next(iter(batch.values())).device


def _check_tasks(finetuned: Mapping, *others: Mapping) -> None:
    for other in others:
        if other.keys() != finetuned.keys():
            raise ValueError(f"There are models for {sorted(finetuned)}, but inputs or heads for {sorted(other)}.")
