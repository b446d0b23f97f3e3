"""Second moments over training images, of gradients and of inputs, and the means of models that go by them.

That is, Fisher merging and RegMean.
"""

import copy
from collections.abc import Callable, Sequence
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import BaseTorchFunctionMode


def fisher_information(model: nn.Module, images: Tensor, logits: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Diagonal Fisher information by parameter name, without labels (Matena and Raffel, arXiv 2111.09832):

        F = 1/N Σ_n Σ_y p(y|x_n) (∂/∂θ log p(y|x_n))²,  p(·|x) = softmax(logits(model(x)))

    Of more than 16 classes, 16 are drawn from p instead of summing over all.
    """
    model = copy.deepcopy(model).requires_grad_()
    theta = list(model.parameters())
    total = [torch.zeros_like(p) for p in theta]
    for x in images.split(1):
        # The other implementations of attention would go through the classes one by one.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            log_p = F.log_softmax(logits(model(x)), dim=-1)[0]  # (C,)
        p = log_p.detach().exp()
        rows = p.sqrt().diag() if len(p) <= 16 else F.one_hot(torch.multinomial(p, 16, True), len(p)) / 4.0
        gradients = torch.autograd.grad(log_p, theta, rows, is_grads_batched=True, allow_unused=True)  # (16, *shape)
        for f, gradient in zip(total, gradients):
            if gradient is not None:
                f += gradient.square().sum(0) / len(images)
    return {name: f.cpu() for (name, _), f in zip(model.named_parameters(), total)}


@torch.no_grad()
def gram_matrices(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """XᵀX / N (D_in, D_in) by the name of each matrix in a linear layer, X (N, D_in) being its inputs, all tokens."""
    names, linear, sums = {p: name for name, p in model.named_parameters()}, F.linear, {}

    def recording(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight in names:
            x_rows = x.reshape(-1, x.shape[-1])
            total, count = sums.get(names[weight], (0, 0))
            sums[names[weight]] = total + x_rows.T @ x_rows, count + len(x_rows)
        return linear(x, weight, bias)

    # Under any mode, attention leaves its fused implementation, which does not call F.linear.
    with patch.object(F, "linear", recording), BaseTorchFunctionMode():
        for batch in images.split(64):
            model(batch)
    return {name: (total / count).cpu() for name, (total, count) in sums.items()}


def weigh_entries(thetas: Tensor, fishers: Tensor) -> Tensor:
    """Fisher merging: Σ_t F_t θ_t / Σ_t F_t, entry by entry; (T, ...), (T, ...) -> (...)."""
    total = fishers.sum(0)
    return torch.where(
        total > 0, (fishers * thetas).sum(0) / total.clamp_min(torch.finfo(total.dtype).tiny), thetas.mean(0)
    )


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
def average_by(
    statistics: Sequence[dict[str, Tensor]],
    models: Sequence[dict[str, Tensor]],
    rule: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """The mean of the models, entry by entry, but by `rule` (in float64) where there are statistics of the entry."""
    merged = {}
    for name, entry in models[0].items():
        thetas = torch.stack([model[name] for model in models]).double()
        known = name in statistics[0]
        mean = rule(thetas, torch.stack([s[name] for s in statistics]).double()) if known else thetas.mean(0)
        merged[name] = mean.to(entry.dtype)
    return merged
