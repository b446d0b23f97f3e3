"""Every method: its mathematics, and above it, as a decorator, its row in the tables.

To add one, write a function that makes of a suite (data/suite.py) one model for all tasks, or one for each; of a static
method, only the rule that makes one vector of all task vectors. Then tell test_methods.py what has to be true of it.

As in wemoe.py, θ_0 is the pre-trained model, τ_t = θ_t - θ_0 a task vector, λ a coefficient; B samples, T tasks, D
features, `...` any axes; state dicts go by name. Settings are the authors', but with the hub's experts those of
FusionBench (github.com/tanganke/fusion_bench at 54c9e8c), which made the hub's rows. Its models hold attention's q, k
and v in three matrices, open_clip's in one: for the hub's rows task vectors are `split` where each matrix counts.
"""

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

import wemoe
from data.run import STATIC, adapt, evaluate, fine_tune, progress, routing, sizes_of
from data.suite import Batch, Suite, run
from wemoe import MergedLinear, WEMoE, with_weights

State = dict[str, Tensor]
Result = nn.Module | Mapping[str, nn.Module] | tuple  # or with a record: what else there is to tell, for results.json

# What a method may need besides the experts (Table 7); and groups, in the order of the table, after STATIC.
TRAINING_IMAGES, VALIDATION, ADAPTATION = "labelled task data", "labelled validation data", "test-time adaptation"
SINCE, GIVEN = "static, newer than WEMoE", "given training images, or the task of every image"
LEARNED, ROUTED, REFERENCE = "learned without labels", "routed without training", "for reference"


@dataclass(frozen=True)
class Method:
    name: str
    group: str
    make: Callable[[Suite], Result]
    arxiv: str = ""  # the paper that defines it
    needs: tuple[str, ...] = ()
    seconds: int = 10  # about what it takes in the miniature, on one core of two
    main: bool = True  # a row of the main table, or of other experiments alone
    only: str = ""  # the settings with which it is offered, if not all


METHODS: dict[str, Method] = {}  # in the order of the main table


def method(group: str, name: str, arxiv: str = "", *, needs=(), seconds=10, main=True, only="", by=None, **options):
    """Above a function of a suite: its row. It is called with the options; what adapts, with its name as `label`, too.

    Or above any other function, if by(function, suite, **options) makes the model.
    """
    METHODS[name] = None  # its place: of several decorators the first is read first, and applied last
    options |= {"label": name} if group == LEARNED else {}

    def put(function: Callable) -> Callable:
        make = partial(by, function, **options) if by else partial(function, **options)
        METHODS[name] = Method(name, group, make, arxiv, tuple(needs), seconds, main, only)
        return function

    return put


def by_rule(rule: Callable, suite: Suite, scaling: float | Callable, options: Callable = None, tries=True) -> Result:
    """θ_0 + λ τ, τ being rule(task vectors, **options(suite)); if it `tries`, with accuracies at the suite's λ, too."""
    tau, curve = rule(task_vectors(suite, packed=not hub(suite)), **(options(suite) if options else {})), []
    for lam in progress(suite.scalings if tries else (), "Trying λ", unit="λ", delay=1):
        accuracy = evaluate(suite, merge(suite, [tau], lam))
        curve.append({"scaling": lam, "accuracy": accuracy, "average": fmean(accuracy.values())})
    return merge(suite, [tau], scaling(suite) if callable(scaling) else scaling), {"curve": curve} if curve else {}


static, since = partial(method, STATIC, by=by_rule), partial(method, SINCE, by=partial(by_rule, tries=False))
learned, given = partial(method, LEARNED, needs=[ADAPTATION]), partial(method, GIVEN, needs=[TRAINING_IMAGES])


def hub(suite: Suite) -> bool:
    return suite.settings == "hub"


def loaded(suite: Suite, state: Mapping[str, Tensor]) -> nn.Module:
    """The pre-trained model with these entries in the place of its own."""
    model = copy.deepcopy(suite.pretrained)
    model.load_state_dict({**model.state_dict(), **state})
    return model


def merge(suite: Suite, vectors: Iterable[State], scaling: float | list[float]) -> nn.Module:
    """θ_0 + Σ_t λ_t τ_t."""
    return loaded(suite, wemoe.task_arithmetic(suite.pretrained, map(pack, vectors), scaling))


def task_vectors(suite: Suite, packed: bool = True) -> list[State]:
    vectors = (wemoe.task_vector(suite.pretrained, expert) for expert in suite.experts.values())
    return list(vectors if packed else map(split, vectors))


def samples(suite: Suite, count: int = 256) -> Iterator[tuple[str, Batch, Tensor]]:
    """So many training inputs of each task: task, inputs, labels."""
    for task in suite.experts:
        rows, labels = suite.load(task, "train", count)
        yield task, suite.inputs(rows), labels.to(suite.device)


# Transformer blocks in open_clip, timm, torchvision and Hugging Face, and what is in them.
BLOCKS = r"(^|\.)(resblocks|blocks?|layers?|h)\.(\w+_)?\d+$"
IN_BLOCKS = BLOCKS[:-1] + r"\."


def split(tau: Mapping[str, Tensor]) -> State:
    """Attention's packed weights and biases (3 D, ...) as three entries (D, ...), with .q, .k and .v in their names."""
    packed = {name for name in tau if name.endswith(("in_proj_weight", "in_proj_bias"))}
    parts = {f"{name}.{which}": part for name in packed for which, part in zip("qkv", tau[name].chunk(3))}
    return {name: p for name, p in tau.items() if name not in packed} | parts


def pack(tau: Mapping[str, Tensor]) -> State:
    """Undo `split`: q, k and v as one tensor again. What is not split stays as it is."""
    thirds = [name.removesuffix(".q") for name in tau if name.endswith(".q")]
    whole = {name: p for name, p in tau.items() if not re.search(r"\.[qkv]$", name)}
    return whole | {name: torch.cat([tau[f"{name}.{which}"] for which in "qkv"]) for name in thirds}


@torch.no_grad()
def by_entry(vectors: list[State], rule: Callable[[Tensor], Tensor]) -> State:
    """What the rule makes of each entry of all vectors, (T, *shape) in float64: numbers in their dtype, or masks."""
    merged = {name: rule(torch.stack([tau[name] for tau in vectors]).double()) for name in vectors[0]}
    return {name: p.to(vectors[0][name]) if p.is_floating_point() else p for name, p in merged.items()}


def by_matrix(vectors: list[State], rule: Callable[[Tensor], Tensor]) -> State:
    """Matrices by the rule, (T, D_out, D_in) -> (D_out, D_in), all else by the mean."""
    return by_entry(vectors, lambda taus: rule(taus) if taus.dim() == 3 else taus.mean(0))


def triples(tau: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The first r singular triples of matrices: (..., D_out, r), (..., r), (..., r, D_in); unless given, r/T of all."""
    u, s, v = torch.linalg.svd(tau.to(torch.promote_types(tau.dtype, torch.float32)), full_matrices=False)
    r = max(1, s.shape[-1] // len(tau)) if rank is None else rank
    return tuple(part.to(tau.dtype).contiguous() for part in (u[..., :r], s[..., :r], v[..., :r, :]))


def orthogonal_sum(u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """Σ_t U_t S_t V_t with all U's columns made orthonormal, and all V's rows; (T, D_out, r), (T, r), (T, r, D_in)."""
    return polar(u.movedim(1, 0).flatten(1)) * s.flatten() @ polar(v.flatten(0, 1))


def polar(x: Tensor) -> Tensor:
    """The matrix with orthonormal columns (or rows, of which there are fewer) that is nearest to x (Procrustes)."""
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    return u @ v


# ---- Static: of WEMoE's time, and newer ------------------------------------------------------------------------------


@method(STATIC, "Weight Averaging", "2203.05482", seconds=3)
def weight_averaging(suite: Suite) -> Result:
    return merge(suite, task_vectors(suite), 1 / len(suite.experts))


@static("Task Arithmetic", "2212.04089", scaling=0.3, needs=[VALIDATION], seconds=25)
def added_up(vectors: list[State]) -> State:
    return by_entry(vectors, lambda taus: taus.sum(0))


def kept_share(suite: Suite) -> dict[str, float]:
    """TIES keeps 20 % of all entries; for the paper's rows, of the authors' image encoder, with unused parts of text.

    K = 20 in src/ties_merging_utils.py of github.com/EnnengYang/AdaMerging at cea1165, whose src/modeling.py leaves the
    text's embeddings, norm, projection and scale, where τ is 0: 25.8 % of B/32's tower, 25.9 of B/16 and 22.5 of L/14.
    """
    width = {"ViT-B-32": 512, "ViT-B-16": 512, "ViT-L-14": 768}.get(suite.name)
    unused = (49408 + 77 + 2 + width) * width + 1 if width and not hub(suite) else 0
    return {"keep": 0.2 * (1 + unused / sum(p.numel() for p in suite.pretrained.parameters()))}


@torch.no_grad()
def trim_and_elect(vectors: list[State], keep: float = 0.2) -> list[State]:
    """Of each τ_t the `keep` share of entries that are largest, and of these what has the sign of their sum over t."""
    trimmed = []
    for tau in vectors:
        magnitudes = torch.cat([entry.abs().flatten().float() for entry in tau.values()])
        threshold = magnitudes.kthvalue(len(magnitudes) - max(1, round(keep * len(magnitudes))) + 1).values
        trimmed.append({name: torch.where(entry.abs().float() >= threshold, entry, 0) for name, entry in tau.items()})
    signs = by_entry(trimmed, lambda taus: taus.sum(0).sign())
    return [{name: torch.where(e * signs[name] > 0, e, 0) for name, e in tau.items()} for tau in trimmed]


@static("TIES-Merging", "2306.01708", scaling=0.3, options=kept_share, needs=[VALIDATION], seconds=25)
def ties(vectors: list[State], keep: float = 0.2) -> State:
    """Σ_t of what `trim_and_elect` leaves: so the programs of WEMoE and AdaMerging ("dis-sum"), with λ = 0.3."""
    return added_up(trim_and_elect(vectors, keep))


@since("TSV-M", "2412.00081", scaling=1.0, seconds=6)
def tsv_merge(vectors: list[State]) -> State:
    """Of each task's matrix the first r/T singular triples, orthogonalised (Gargiulo et al.).

    Tasks whose matrices have a rank of at most r/T and share no direction are added up.
    """
    return by_matrix(vectors, lambda taus: orthogonal_sum(*triples(taus)))


@since("Iso-C", "2502.04959", scaling=lambda s: 1.5 if hub(s) else 1.0, seconds=4)
@since("Iso-CTS", "2502.04959", scaling=lambda s: 1.5 if hub(s) else 1.0, options=lambda _: {"common": 0.8}, seconds=6)
def iso(vectors: list[State], common: float = 1.0) -> State:
    """The sum of the tasks' matrices, each singular value being their mean (Marczak et al.).

    Iso-CTS keeps only this share of directions, which tasks have in `common`, and n of each task's own: the first of
    τ_t - U Uᵀ τ_t, U being what is common. All are made orthogonal. λ is 1.5 in the hub's rows, says
    docs/algorithms/isotropic_merging.md, and in the paper what is best on labelled images.
    """

    def rule(taus: Tensor) -> Tensor:
        u, s, v = torch.linalg.svd(taus.sum(0), full_matrices=False)
        n = round((len(s) - int(common * len(s))) / len(taus))
        c = len(s) - n * len(taus)
        own_u, own_s, own_v = triples(taus - u[:, :c] @ (u[:, :c].T @ taus), n) if n else ((), (), ())
        u, s, v = torch.cat([u[:, :c], *own_u], dim=1), torch.cat([s[:c], *own_s]), torch.cat([v[:c], *own_v])
        return s.mean() * polar(u) @ polar(v)

    return by_matrix(vectors, rule)


@since("WUDI", "2503.08099", scaling=1.0, options=lambda s: {"lr": s.training.lr, "as_hub": hub(s)}, seconds=21)
def wudi(vectors: list[State], steps: int = 300, lr: float = 1e-5, as_hub: bool = False) -> State:
    """min Σ_t |(τ - τ_t) τ_tᵀ|² / |τ_t|² for each matrix, by Adam from Σ_t τ_t (Cheng et al.).

    That is RegMean with the Gram matrix τ_tᵀ τ_t / |τ_t|² in place of that of the inputs, which rows of τ_t resemble.
    Steps are as long as in fine-tuning, which took 1e-5 for CLIP, too. In the authors' program (vit/wudi_main.py of
    github.com/nathanielyvo/WUDI-Merging at dc3cd12) all but matrices of attention and MLPs stays θ_0; the hub's row
    (config/method/wudi/wudi.yaml) has 100 steps more, takes all matrices, and averages all else.
    """

    def rule(taus: Tensor) -> Tensor:
        grams = taus.mT @ taus / taus.square().sum((1, 2), keepdim=True).clamp_min(torch.finfo(taus.dtype).tiny)
        total, target = grams.sum(0), (taus @ grams).sum(0)
        tau = nn.Parameter(taus.sum(0))
        optimizer = torch.optim.Adam([tau], lr)
        for _ in range(steps + 100 * as_hub):
            tau.grad = 2 * (tau @ total - target)
            optimizer.step()
        return tau.detach()

    tau = by_matrix(vectors, rule)
    merged = {name for name, p in tau.items() if as_hub or (p.dim() == 2 and re.search(IN_BLOCKS, name))}
    return {name: p if name in merged else torch.zeros_like(p) for name, p in tau.items()}


# ---- Given training images, or the task of every image ---------------------------------------------------------------


@given("Fisher Merging", "2111.09832", seconds=20)
def fisher_merging(suite: Suite, least: float = 1e-6) -> Result:
    """Σ_t F_t θ_t / Σ_t F_t, entry by entry, F_t being Fisher information divided by its norm (Matena and Raffel).

    Both with `least` added, of 256 samples a task, as in fusion_bench/method/fisher_merging, which has it from
    github.com/yule-BUAA/MergeLM; of 32 in the miniatures, for their time.
    """
    total, weights = {}, {}
    for task, x, _ in samples(suite, 32 if suite.name.startswith("miniature") else 256):
        expert = suite.experts[task]
        fisher = fisher_information(expert, x, suite.logits(task))
        norm = math.sqrt(sum(f.square().sum().item() for f in fisher.values()))
        for name, theta in expert.state_dict().items():
            weight = (fisher[name].double() + least) / (norm + least) if name in fisher else 1.0
            total[name] = total.get(name, 0) + weight * theta.double().cpu()
            weights[name] = weights.get(name, 0) + weight
    return loaded(suite, {name: theta / weights[name] for name, theta in total.items()})


def fisher_information(model: nn.Module, batch: Batch, logits: Callable[..., Tensor]) -> State:
    """Diagonal Fisher information by parameter name, without labels:

        F = 1/N Σ_n Σ_y p(y|x_n) (∂/∂θ log p(y|x_n))²,  p(·|x) = softmax(logits(model(x)))

    Of more than 16 classes, 16 are drawn from p instead of summing over all.
    """
    first = tree_leaves(batch)[0]
    model = copy.deepcopy(model).to(first.device).requires_grad_()
    fisher = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(len(first)):
        x = tree_map(lambda rows, n=n: rows[n : n + 1], batch)
        # The other implementations of attention would go through the classes one by one.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            log_p = F.log_softmax(logits(run(model, x)), dim=-1)[0]  # (C,)
        p, theta = log_p.detach().exp(), list(model.parameters())
        rows = p.sqrt().diag() if len(p) <= 16 else F.one_hot(torch.multinomial(p, 16, True), len(p)) / 4.0
        gradients = torch.autograd.grad(log_p, theta, rows, is_grads_batched=True, materialize_grads=True)
        for f, gradient in zip(fisher.values(), gradients):  # (16, *shape)
            f += gradient.square().sum(0) / len(first)
    return {name: f.cpu() for name, f in fisher.items()}


@given("RegMean", "2212.09849", seconds=12, blocks="^$")  # one block, the whole model
@given("RegMean++", "2508.03121", seconds=20, blocks=BLOCKS)
@torch.no_grad()
def regmean(suite: Suite, blocks: str, alpha: float = 0.95) -> Result:
    """Linear layers by least squares on their inputs, all else by the mean (Jin et al.).

    RegMean++ (Nguyen et al.) goes block by block, on the inputs that the merged blocks before give it; `blocks` finds
    their names. 256 inputs a task and α = 0.95 (config/method/regmean/clip_regmean.yaml, regmean_plusplus/).
    """
    inputs, states = [x for _, x, _ in samples(suite)], [expert.state_dict() for expert in suite.experts.values()]
    merged = by_entry(states, lambda thetas: thetas.mean(0))
    for name in [name for name, _ in suite.pretrained.named_modules() if re.search(blocks, name)]:
        own = [{n: p for n, p in state.items() if n.startswith(f"{name}." if name else "")} for state in states]
        hybrids = (loaded(suite, merged | theta) for theta in own)
        grams = [gram_matrices(hybrid, x, suite.statistics or run) for hybrid, x in zip(hybrids, inputs)]
        for matrix in own[0].keys() & grams[0].keys():
            thetas, of_tasks = (torch.stack([part[matrix] for part in parts]).double() for parts in (own, grams))
            merged[matrix] = least_squares(thetas, of_tasks, alpha).to(merged[matrix])
    return loaded(suite, merged)


def gram_matrices(model: nn.Module, batch: Batch, run: Callable = run) -> State:
    """XᵀX / N (D_in, D_in) by the name of each linear layer's matrix, attention's too, X (N, D_in) being its inputs.

    All tokens of an image are inputs, and those of a text that its `attention_mask` leaves.
    """
    model, sums = copy.deepcopy(model).to(tree_leaves(batch)[0].device), {}
    mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")

    def record(name: str, x: Tensor) -> None:
        x = x[mask != 0] if mask is not None and mask.shape == x.shape[:-1] else x.flatten(0, -2)
        total, count = sums.get(name, (0, 0))
        sums[name] = total + x.T @ x, count + len(x)

    def see(name: str, part: nn.Module, args: tuple) -> None:
        if isinstance(part, nn.Linear):
            return record(f"{name}.weight", args[0])
        x = args[0] if part.batch_first else args[0].transpose(0, 1)  # nn.MultiheadAttention, all in one
        record(f"{name}.in_proj_weight", x)
        q, k, v = F.linear(x, part.in_proj_weight, part.in_proj_bias).chunk(3, -1)  # (B, N, D)
        q, k, v = (p.unflatten(-1, (part.num_heads, -1)).transpose(1, 2) for p in (q, k, v))
        record(f"{name}.out_proj.weight", F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    for name, part in model.named_modules():
        if isinstance(part, nn.Linear | nn.MultiheadAttention):
            part.register_forward_pre_hook(partial(see, name))
    run(model, batch)
    return {name: (total / count).cpu() for name, (total, count) in sums.items()}


def least_squares(thetas: Tensor, grams: Tensor, alpha: float) -> Tensor:
    """Wᵀ = (Σ_t G_t)⁻¹ Σ_t G_t W_tᵀ, off-diagonal entries of G_t times `alpha`; (T, D_out, D_in), (T, D_in, D_in).

    With α = 1, W = argmin Σ_t |X_t (W - W_t)ᵀ|² / N_t. Where a feature is always 0, the mean is taken.
    """
    grams = alpha * grams + (1 - alpha) * grams.diagonal(dim1=1, dim2=2).diag_embed()
    total, mean = grams.sum(0), thetas.mean(0)
    total.diagonal().add_(total.diagonal().mean() * 1e-9 + torch.finfo(total.dtype).tiny)
    return mean + torch.linalg.solve(total, (grams @ (thetas - mean).mT).sum(0)).mT


@given("Self Positioning", "2410.15035", seconds=60)
def self_positioning(suite: Suite) -> Result:
    """θ_0 + s τ, τ being put together by `slerp`; weights, even at first, and s, 1 at first, are learned (Li et al.).

    On 256 labelled samples a task, with AdaMerging's steps, rate and batches. Neither program nor settings are public.
    """
    settings, model = suite.adaptation, AdaMerging(suite.pretrained, task_vectors(suite), clamp=False).to(suite.device)
    products = sum(tau.flatten(1) @ tau.flatten(1).T for tau in model.taus)  # <τ_s, τ_t>
    x, scale = products.new_zeros(len(products), requires_grad=True), products.new_ones((), requires_grad=True)
    data = {task: (inputs, labels) for task, inputs, labels in samples(suite) if task not in suite.unadapted}
    optimizer = torch.optim.Adam([x, scale], settings.lambda_lr)
    for _ in progress(range(settings.lambda_steps), "Self Positioning", unit="step"):
        optimizer.zero_grad()
        for task, pair in data.items():
            some = torch.randint(len(pair[1]), (settings.batch_size,), device=suite.device)
            inputs, labels = tree_map(lambda rows, some=some: rows[some], pair)
            merged = with_weights(model.model, model.merged(scale * slerp(x.softmax(0), products)[None]))
            F.cross_entropy(suite.logits(task)(run(merged, inputs)), labels).backward()
        optimizer.step()
    return merge(suite, task_vectors(suite), (scale * slerp(x.softmax(0), products)).tolist())


def slerp(weights: Tensor, products: Tensor) -> Tensor:
    """λ (T,) of v_T, where v_1 = τ_1 and v_t lies between v_{t-1} and τ_t, at w_t / Σ_{s≤t} w_s of their angle.

    At x of the angle Ω from a to b is (sin((1-x) Ω) a + sin(x Ω) b) / sin Ω; `products` are all <τ_s, τ_t> (T, T).
    """
    one_hot, tiny = torch.eye(len(weights)).to(products), torch.finfo(products.dtype).tiny
    lam = one_hot[0]
    for t in range(1, len(weights)):
        x = weights[t] / weights[: t + 1].sum()
        lengths = ((lam @ products @ lam) * products[t, t]).clamp_min(tiny).sqrt()
        angle = torch.acos((lam @ products[t] / lengths).clamp(-1 + 1e-6, 1 - 1e-6))
        lam = (torch.sin((1 - x) * angle) * lam + torch.sin(x * angle) * one_hot[t]) / torch.sin(angle)
    return lam


# ---- Learned without labels: λ, or a mask ----------------------------------------------------------------------------


class AdaMerging(nn.Module):
    """θ_0 + Σ_t λ_t τ_t, its λ trained by `wemoe.adapt`: one for each task, or for each tensor and task.

    AdaMerging (Yang et al.); on `trim_and_elect`ed task vectors, AdaMerging++. `lam` is (1, T) or, layer-wise,
    (tensors, T); in use it is clamped to [0, 1], as in its authors' program, unless `clamp` is False. `merged()` is
    what comes of it, as entries of a state dict. Task vectors may be `split`. A tensor of two names has one λ.
    """

    def __init__(self, pretrained: nn.Module, task_vectors: list[State], layer_wise=True, init_lambda=0.3, clamp=True):
        super().__init__()
        self.model, self.clamp, first = copy.deepcopy(pretrained).requires_grad_(False), clamp, {}
        named = *self.model.named_parameters(remove_duplicate=False), *self.model.named_buffers(remove_duplicate=False)
        if odd := pack(task_vectors[0]).keys() - dict(named).keys():
            raise ValueError(f"{min(odd)!r} is no tensor's path: unwrap the model, as from checkpoint_wrapper.")
        self.first = {name: first.setdefault(dict(named).get(name, name), name) for name in task_vectors[0]}
        self.names = list(first.values())  # of tensors with several names, the first
        taus = (torch.stack([tau[name] for tau in task_vectors]) for name in self.names)  # (T, *shape)
        self.taus = nn.ParameterList(taus).requires_grad_(False)
        shape = len(self.names) if layer_wise else 1, len(task_vectors)
        self.lam = nn.Parameter(torch.full(shape, float(init_lambda), device=self.taus[0].device))

    def delta(self, lam: Tensor, i: int) -> Tensor:
        """Σ_t λ_t τ_t of the i-th tensor, for λ (1, T) or (tensors, T)."""
        lam = lam[i if len(lam) > 1 else 0]
        lam = lam.clamp(0, 1) if self.clamp else lam
        return torch.tensordot(lam.to(self.taus[i]), self.taus[i], dims=1)

    def merged(self, lam: Tensor | None = None) -> State:
        """θ_0 + Σ_t λ_t τ_t, for `lam` unless another λ is given."""
        lam, theta_0 = self.lam if lam is None else lam, self.model.state_dict()
        with torch.autocast(lam.device.type, enabled=False):  # weights are merged in their own precision
            deltas = {name: self.delta(lam, i) for i, name in enumerate(self.names)}
        deltas = pack({name: deltas[first] for name, first in self.first.items()})
        return {name: theta_0[name] + delta for name, delta in deltas.items()}

    def forward(self, *args, **kwargs):
        return with_weights(self.model, self.merged())(*args, **kwargs)


def learn(suite: Suite, label: str, model: AdaMerging, **options) -> Result:
    """What is merged when λ or masks have been adapted, at a constant rate; `options` are those of adapt."""
    curve = adapt(suite, model.to(suite.device), label, anneal=False, **options)
    with torch.no_grad():
        return loaded(suite, model.merged()), {"adaptation": curve, "learned": sizes_of(model)[0]}


@learned("AdaMerging (task-wise)", "2310.02575", seconds=70, layer_wise=False)
@learned("AdaMerging (layer-wise)", "2310.02575", seconds=70)
@learned("AdaMerging++ (task-wise)", "2310.02575", seconds=70, layer_wise=False, plus_plus=True)
@learned("AdaMerging++ (layer-wise)", "2310.02575", seconds=70, plus_plus=True)
def ada_merging(suite: Suite, label: str, layer_wise: bool = True, plus_plus: bool = False) -> Result:
    """λ at a constant rate, on two batches of each task in a step, of which the hub's rows have one.

    src/main_layer_wise_adamerging.py of github.com/EnnengYang/AdaMerging at cea1165 leaves its loop over batches after
    the second. The hub's rows have as many steps as routers, and no clamp (config/method/adamerging/clip.yaml).
    """
    settings, vectors = suite.adaptation, task_vectors(suite, packed=not hub(suite))
    vectors = trim_and_elect(vectors, **kept_share(suite)) if plus_plus else vectors
    model = AdaMerging(suite.pretrained, vectors, layer_wise, settings.init_lambda, clamp=not hub(suite))
    steps, batches = (settings.steps, 1) if hub(suite) else (settings.lambda_steps, 2)
    return learn(suite, label, model, steps=steps, lr=settings.lambda_lr, batches=batches)


class ConcreteMask(AdaMerging):
    """θ_0 + m / mean(m) ∘ Σ_t λ τ_t: one mask m over the parameters, the mean taken in each tensor, λ constant.

    m = σ((x + ln u/(1-u)) / 0.5) with trainable logits x, 0 at first, and u uniform, drawn anew at every forward pass,
    is the Concrete relaxation of a binary mask (Tang et al., arXiv 2312.06173). Without gradients u = 1/2, where its
    authors draw for evaluation, too (run() in fusion_bench/method/concrete_subspace/clip_concrete_adamerging.py).
    """

    def __init__(self, pretrained: nn.Module, task_vectors: list[State], scaling: float = 0.3):
        super().__init__(pretrained, task_vectors, layer_wise=False, init_lambda=scaling)
        self.lam.requires_grad_(False)
        self.x = nn.ParameterList(torch.zeros_like(tau[0]) for tau in self.taus)

    def delta(self, lam: Tensor, i: int) -> Tensor:
        return self.mask(i) * super().delta(lam, i)

    def mask(self, i: int) -> Tensor:
        x = self.x[i]
        if torch.is_grad_enabled():
            x = x + torch.rand_like(x).clamp(1e-6, 1 - 1e-6).logit()
        mask = torch.sigmoid(x / 0.5)
        return mask / mask.mean()


@learned("Concrete Task Arithmetic", "2312.06173", seconds=40)
@learned("Concrete AdaMerging", "2312.06173", seconds=130, then_lambda=True)
def concrete(suite: Suite, label: str, then_lambda: bool = False) -> Result:
    """A mask; then, if so wanted, λ for the masked task vectors, 1000 steps where AdaMerging's have 500.

    The authors learn the mask for λ after one step of descent, which is left out here. In the hub's row mask and λ have
    as many steps as routers (config/method/concrete_subspace/clip_concrete_layer_wise_adamerging.yaml).
    """
    settings, model = suite.adaptation, ConcreteMask(suite.pretrained, task_vectors(suite))
    steps = settings.steps if then_lambda and hub(suite) else settings.mask_steps
    merged, record = learn(suite, f"{label}, mask", model, steps=steps, lr=settings.mask_lr)
    if not then_lambda:
        return merged, record
    with torch.no_grad():
        masks = {name: model.mask(i).cpu() for i, name in enumerate(model.names)}
    vectors = [{n: masks[model.first[n]] * entry for n, entry in tau.items()} for tau in task_vectors(suite)]
    vectors = list(map(split, vectors)) if hub(suite) else vectors
    model = AdaMerging(suite.pretrained, vectors, init_lambda=settings.init_lambda, clamp=not hub(suite))
    steps = settings.steps if hub(suite) else 2 * settings.lambda_steps
    merged, then = learn(suite, label, model, steps=steps, lr=settings.lambda_lr)
    return merged, then | {"learned": record["learned"] + then["learned"]}


class SparseLinear(MergedLinear):
    """Of each task's matrix only the `keep` share of entries, the largest in magnitude, with their places (E-WEMoE).

    `layer=partial(SparseLinear, keep=0.1)` for `wemoe.upscale`.
    """

    def __init__(self, linear: nn.Linear, task_vectors: list[State], keep: float):
        super().__init__(linear, task_vectors)
        dense, self.taus[0] = self.taus[0].detach(), nn.Parameter(self.taus[0].new_empty(0), requires_grad=False)
        self.shape, flat = dense.shape, dense.flatten(1)
        largest = flat.abs().topk(max(1, round(keep * flat.shape[1]))).indices  # (T, kept)
        mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, largest, True).view(self.shape)
        by_rows = mask.transpose(0, 1).flatten()  # (D_out · T · D_in): what a few rows need lies together
        self.register_buffer("index", by_rows.nonzero().flatten().int())
        self.values = nn.Parameter(dense.transpose(0, 1).flatten()[by_rows], requires_grad=False)

    def tau(self, name: str, rows: slice = slice(None)) -> Tensor:
        if name == "bias":
            return super().tau(name, rows)
        size = self.shape[0] * self.shape[2]  # of one row, all tasks
        ends = [end * size for end in rows.indices(self.shape[1])[:2]]
        start, stop = torch.searchsorted(self.index, self.index.new_tensor(ends)).tolist()
        tile = self.values.new_zeros(ends[1] - ends[0])
        tile.scatter_(0, self.index[start:stop].long() - ends[0], self.values[start:stop])
        return tile.view(-1, self.shape[0], self.shape[2]).transpose(0, 1)


class LowRankLinear(MergedLinear):
    """Each task's matrix truncated to rank r by its singular value decomposition, as two factors: τ_t ≈ U_t V_t.

    They are never multiplied: x (θ_0 + Σ_t λ_t U_t V_t)ᵀ = x θ_0ᵀ + Σ_t λ_t (x V_tᵀ) U_tᵀ, two thin products.
    `layer=partial(LowRankLinear, rank=16)` for `wemoe.upscale`.
    """

    def __init__(self, linear: nn.Linear, task_vectors: list[State], rank: int):
        super().__init__(linear, task_vectors)
        u, s, v = triples(self.taus[0].detach(), rank)
        self.taus[0] = nn.Parameter(s.new_empty(0), requires_grad=False)  # "weight", of which there are factors
        self.u = nn.Parameter((u * s[:, None]).movedim(1, 0).contiguous(), requires_grad=False)  # (D_out, T, r)
        self.v = nn.Parameter(v, requires_grad=False)  # (T, r, D_in)

    def tau(self, name: str, rows: slice = slice(None)) -> Tensor:
        return self.u[rows].movedim(1, 0) @ self.v if name == "weight" else super().tau(name, rows)

    def for_all(self, lam: Tensor, x: Tensor) -> Tensor:
        return self.for_each(lam[None], x)

    def for_each(self, lam: Tensor, x: Tensor) -> Tensor:
        x = x if len(lam) == 1 else x.expand(len(lam), *x.shape[1:])
        lam = lam.view(len(lam), *[1] * (x.dim() - 2), -1)  # (B, ..., T)
        h = F.linear(x, self.v.flatten(0, 1))  # (B, ..., T · r)
        h = h * lam.to(h).repeat_interleave(self.v.shape[1], -1)
        y = self.pretrained(x) + F.linear(h, self.u.flatten(1))
        return y if self.pretrained.bias is None else y + (lam @ self.tau("bias").to(lam)).to(y)


class BatchRouter(nn.Module):
    """A router's λ in the mean over the batch, for all its samples: (B, N, D) -> (1, T)."""

    def __init__(self, router: nn.Module):
        super().__init__()
        self.router = router

    def forward(self, h: Tensor) -> Tensor:
        return self.router(h).mean(0, keepdim=True)


def negative_information(logits: Tensor) -> Tensor:
    """Minus the mutual information of input and prediction, (B, C) -> nats: mean_b H(p_b) - H(mean_b p_b).

    To mean entropy alone, one confident answer to everything is as good as any; this asks for diverse ones, too, so
    most classes should appear in a batch (Bridle et al., NeurIPS 1991; Liang et al., arXiv 2002.08546).
    """
    log_sum = F.log_softmax(logits.float(), dim=-1).logsumexp(0)  # log Σ_b p_b: its softmax, in entropy, is mean_b p_b
    return wemoe.entropy(logits).mean() - wemoe.entropy(log_sum)


@learned("WEMoE (0-layer)", "2402.00433", seconds=50, router_depth=0)
@learned("WEMoE (1-layer)", "2402.00433", seconds=110, router_depth=1)
@learned("WEMoE", "2402.00433", seconds=110)
@learned("WEMoE (as the hub ran it)", "2402.00433", seconds=110, only="hub", as_hub=True)
@learned("WEMoE (rank 16)", seconds=70, layer=partial(LowRankLinear, rank=16))
@learned("E-WEMoE", "2410.21804", seconds=140, layer=partial(SparseLinear, keep=0.1), shared=True)
@learned("WEMoE + diversity", seconds=110, main=False, objective=negative_information)
@learned("WEMoE (1-layer, attention and MLP)", seconds=300, main=False, router_depth=1, modules=r"\.(attn|mlp)$")
@learned("WEMoE (1-layer, blocks)", seconds=300, main=False, router_depth=1, modules=BLOCKS)
@learned("WEMoE (TSV-M elsewhere)", seconds=120, main=False, elsewhere="TSV-M")
@learned("WEMoE (Iso-C elsewhere)", seconds=120, main=False, elsewhere="Iso-C")
@learned("WEMoE (WUDI elsewhere)", seconds=140, main=False, elsewhere="WUDI")
def mixture(suite: Suite, label: str, objective=wemoe.entropy, shared=False, elsewhere="", as_hub=False, **options):
    """WEMoE, adapted to the unlabelled test images; `options` are those of wemoe.upscale.

    `shared`: one router for all modules (E-WEMoE). `elsewhere`: the static method that merges what is not routed, in
    the place of task arithmetic. As the hub ran it, E-WEMoE too, a batch has one λ, the mean of its samples', and the
    rate is constant (batch_reduce in config/method/wemoe, no schedule in fusion_bench/method/we_moe/we_moe.py).
    """
    settings, as_hub = suite.adaptation, as_hub or (shared and hub(suite))
    model = wemoe.upscale(suite.pretrained, suite.experts, init_lambda=settings.init_lambda, **options)
    if elsewhere:
        model.load_state_dict(not_routed(suite, model, elsewhere), strict=False)
    routed = [module for module in model.modules() if isinstance(module, WEMoE)]
    for module in routed:
        module.router = routed[0].router if shared else module.router
    for module in routed if as_hub else ():
        module.router = BatchRouter(module.router)
    model, rate = suite.prepare(model).to(suite.device), {"lr": settings.lr, "anneal": not as_hub}
    curve = adapt(suite, model, label, steps=settings.steps, objective=objective, **rate)
    return model, {"adaptation": curve, **routing(suite, model)}


for rank in (1, 2, 4, 8, 32):
    learned(f"WEMoE (rank {rank})", seconds=70, main=False, layer=partial(LowRankLinear, rank=rank))(mixture)


@learned("WEMoE (0-layer, unloaded)", seconds=50, main=False)
def unloaded(suite: Suite, label: str) -> Result:
    """Constant routers, merged once and for all (Appendix B.3)."""
    model, record = mixture(suite, label, router_depth=0)
    return wemoe.unload(model), record


def not_routed(suite: Suite, model: nn.Module, name: str) -> State:
    """A static method's weights for what is not routed in the upscaled model, where names are the same."""
    merged, _ = METHODS[name].make(suite)
    return {name: p for name, p in merged.state_dict().items() if name in model.state_dict()}


@method(GIVEN, "Oracle routing", seconds=6, main=False)
@method(GIVEN, "Oracle routing (TSV-M elsewhere)", seconds=12, main=False, elsewhere="TSV-M")
def oracle_routing(suite: Suite, elsewhere: str = "Task Arithmetic") -> Result:
    """For each task its own expert's MLPs, and all else merged: what routers could reach that know the task."""
    merged = not_routed(suite, wemoe.upscale(suite.pretrained, suite.experts, router_depth=0), elsewhere)
    return {task: loaded(suite, {**expert.state_dict(), **merged}) for task, expert in suite.experts.items()}


class Ensemble(nn.Module):
    """The mean of the models' normalised features, that is, the mean of their logits."""

    def __init__(self, models: Iterable[nn.Module]):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, *args, **kwargs) -> Tensor:
        return sum(F.normalize(model(*args, **kwargs), dim=-1) for model in self.models)


method(REFERENCE, "Pre-trained", seconds=3)(attrgetter("pretrained"))
method(REFERENCE, "Simple Ensemble", seconds=25)(lambda suite: Ensemble(suite.experts.values()))


@method(REFERENCE, "Traditional MTL", needs=[TRAINING_IMAGES], seconds=50)
def multi_task_learning(suite: Suite) -> Result:
    """One model, fine-tuned on all tasks: as many steps as an expert, with half its batch size of every task."""
    half = replace(suite, training=replace(suite.training, batch_size=max(1, suite.training.batch_size // 2)))
    return fine_tune(half, list(suite.experts), "Traditional MTL")


method(REFERENCE, "Individual", seconds=4)(attrgetter("experts"))


@method(STATIC, "Task Arithmetic of two tasks", seconds=60, main=False)
@torch.no_grad()
def landscape(suite: Suite, points: int = 11, count: int = 128) -> Result:
    """The mean loss of two tasks' test images over (λ_1, λ_2) in [-1, 1]², on a grid of so many points a side."""
    vectors, grid = task_vectors(suite), [2 * i / (points - 1) - 1 for i in range(points)]

    def loss(*scaling: float) -> float:
        model, losses = merge(suite, vectors, scaling).to(suite.device), {}
        for task in suite.experts:
            images, labels = (part[:count].to(suite.device) for part in suite.test[task])
            losses[task] = F.cross_entropy(suite.logits(task)(model(suite.inputs(images))), labels).item()
        return round(fmean(losses.values()), 6)

    losses = [[loss(first, second) for second in grid] for first in grid]
    return merge(suite, vectors, 0.3), {"grid": grid, "loss": losses}  # losses[i][j] is at (grid[i], grid[j])
