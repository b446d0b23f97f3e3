"""What must be true of data/baselines.py: properties first, then examples by hand, then errors.

The small modules, and what is close, are those of test_wemoe.py.
"""

import copy
import itertools
import math
import re
from collections.abc import Callable, Iterator
from functools import partial

import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import test_wemoe
import wemoe
from data import baselines
from data.baselines import (
    AdaMerging,
    AdaRank,
    ConcreteMask,
    Ensemble,
    LowRankLinear,
    Mass,
    Smile,
    SparseLinear,
    average_by,
    average_over_batch,
    consensus,
    emr,
    fisher_information,
    fisher_merging,
    gram_matrices,
    iso_c,
    iso_cts,
    least_squares,
    regmean,
    regmean_plus_plus,
    share_router,
    tall_masks,
    ties,
    trim,
    trim_and_elect,
    tsv_merge,
    twin_merging,
    weigh_entries,
    wudi,
)
from data.suite import Adaptation, Suite, evaluate_task_free, routed
from test_wemoe import (
    DEGENERATE,
    MLPS,
    Fixed,
    Gated,
    Made,
    Normed,
    Transformer,
    axes,
    batch_sizes,
    close,
    degenerate,
    family,
    gradients,
    randomised,
    same,
    seeds,
    task_numbers,
    trained,
    varied,
)
from wemoe import Router, WEMoE, adapt, routing_weights, task_arithmetic, task_vector, upscale

properties = settings(max_examples=15, deadline=None, derandomize=True)
kinds = st.sampled_from(sorted(MLPS.keys() - {"norm"}))  # those of linear layers


def vectors_of(models: list[nn.Module]) -> list[dict[str, Tensor]]:
    return [task_vector(models[0], model) for model in models[1:]]


def whole(name: str, module: nn.Module) -> bool:
    """For `modules`: the model itself."""
    return name == ""


def leaves(name: str, module: nn.Module) -> bool:
    """For `modules`: those that hold parameters themselves."""
    return any(True for _ in module.parameters(recurse=False))


def output_and_gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    """y, and the gradients of its sum with some weights in x and in all that is trainable."""
    x = x.clone().requires_grad_()
    y = module(x)
    return [y, *gradients(y, x, module)]


# ---- One vector for all tasks: what is true of every rule, and what each rule is -------------------------------------

SHAPES = {"wide": (3, 4), "tall": (4, 3), "bias": (3,), "kernel": (2, 3, 2, 2), "scale": ()}
shares = st.sampled_from([0.03, 0.1, 0.5, 1.0])
dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])


def quarters(count: int, seed: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """Task vectors of small quarters, many of them equal, zero or opposite: no sum of them rounds."""
    torch.manual_seed(seed)
    return [{name: (torch.randint(-6, 7, shape) / 4).to(dtype) for name, shape in SHAPES.items()} for _ in range(count)]


def vector(*entries: float) -> dict[str, Tensor]:
    return {"w": torch.tensor(entries, dtype=torch.float32)}


def flat(tau: dict[str, Tensor]) -> list[float]:
    return torch.cat([entry.flatten() for entry in tau.values()]).tolist()


def by_fisher(taus: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Fisher merging of all but matrices, whose information is the square of what is merged, and more of numbers."""
    fishers = [{name: p**2 + (p.dim() == 0) for name, p in tau.items() if p.dim() != 2} for tau in taus]
    return average_by(fishers, taus, weigh_entries)


def by_gram(taus: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """RegMean, what is merged being its own input."""
    grams = [{name: p.double().T @ p.double() for name, p in tau.items() if p.dim() == 2} for tau in taus]
    return average_by(grams, taus, least_squares)


BY_MATRIX = {"TSV-M": tsv_merge, "Iso-C": iso_c, "Iso-CTS": iso_cts, "WUDI": partial(wudi, steps=20, lr=0.01)}
RULES = {
    "TIES": partial(ties, keep=0.5),
    "TIES (mean)": partial(ties, keep=0.5, merge="mean"),
    "EMR": lambda taus: emr(taus)[0],
    "TALL": lambda taus: tall_masks(taus)[0],
    "consensus": consensus,
    "Fisher": by_fisher,
    "RegMean": by_gram,
    **BY_MATRIX,
}


@pytest.mark.parametrize("rule", RULES)
@properties
@given(st.integers(1, 5), st.randoms(), dtypes, seeds)
def test_merging_leaves_its_inputs_alone_and_asks_for_no_order(rule, tasks, random, dtype, seed):
    taus = quarters(tasks, seed, dtype)
    if rule in BY_MATRIX:  # singular vectors that are well defined
        taus = [{name: torch.randn_like(p) for name, p in tau.items()} for tau in taus]
    before, merged = copy.deepcopy(taus), RULES[rule](taus)
    rounding = dict(atol=1e-3, rtol=1e-3) if rule in BY_MATRIX else {}
    torch.testing.assert_close(RULES[rule](random.sample(taus, tasks)), merged, **rounding)
    assert {name: (p.shape, p.dtype) for name, p in merged.items()} == {n: (s, dtype) for n, s in SHAPES.items()}
    if rule in BY_MATRIX:
        for name in ("bias", "kernel", "scale"):
            same(merged[name], torch.stack([tau[name] for tau in taus]).double().mean(0).to(dtype))
    [entry.fill_(7) for entry in merged.values()]  # nor does a result share memory with them
    same(taus, before)


@properties
@given(task_numbers, dtypes, seeds)
def test_a_vector_that_is_alone_or_that_all_tasks_share_is_recovered(tasks, dtype, seed):
    (tau,) = quarters(1, seed, dtype)
    trimmed = trim(tau, 0.5)
    expected = {
        "TIES": {name: tasks * entry for name, entry in trimmed.items()},
        "TIES (mean)": trimmed,
        "TALL": {name: tasks * entry for name, entry in tau.items()},
        "consensus": {name: tasks * entry * (tasks in (2, 3)) for name, entry in tau.items()},
    }
    for name in RULES.keys() - BY_MATRIX.keys():
        same(RULES[name]([tau] * tasks), expected.get(name, tau))
    for name in ("TSV-M", "WUDI"):
        torch.testing.assert_close(RULES[name]([tau]), tau)
    unified, masks, rescalers = emr([tau] * tasks)
    assert rescalers == [float(any(flat(tau)))] * tasks
    same([{name: mask[name] * unified[name] for name in tau} for mask in masks], [tau] * tasks)


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_task_vectors_give_finite_merges(name):
    pretrained, states = degenerate(name)
    vectors = [task_vector(pretrained, state) for state in states]
    assert all(math.isfinite(value) for value in emr(vectors)[2])
    merged = [rule(vectors) for rule in RULES.values()] + trim_and_elect(vectors)
    merged += [merging(pretrained, vectors).merged() for merging in (AdaMerging, ConcreteMask, AdaRank)]
    for tau in merged:
        assert all(p.isfinite().all() for p in tau.values())
    if name in ("zero", "identical"):
        close(ties(vectors, keep=1.0, merge="mean"), vectors[0])


@properties
@given(shares, dtypes, seeds)
def test_trim_keeps_the_largest_entries_of_all_tensors_and_their_ties(keep, dtype, seed):
    (tau,) = quarters(1, seed, dtype)
    entries = flat(tau)
    threshold = sorted(map(abs, entries))[-max(1, round(keep * len(entries)))]
    assert flat(trim(tau, keep)) == [e if abs(e) >= threshold else 0 for e in entries]


@properties
@given(task_numbers, shares, dtypes, seeds)
def test_ties_and_the_elected_vectors_are_their_definition(tasks, keep, dtype, seed):
    taus = quarters(tasks, seed, dtype)
    trimmed = list(zip(*(flat(trim(tau, keep)) for tau in taus)))
    # The sign of the larger total, as it is that of the sum.
    elected = [[e if e * sum(entries) > 0 else 0.0 for e in entries] for entries in trimmed]
    ours = trim_and_elect({str(t): tau for t, tau in enumerate(taus)}, keep)
    assert [flat(tau) for tau in ours] == [list(entries) for entries in zip(*elected)]
    sums = [sum(entries) for entries in elected]
    means = [sum(entries) / max(1, sum(e != 0 for e in entries)) for entries in elected]
    for merge, expected in (("sum", sums), ("mean", means)):
        assert flat(ties(taus, keep, merge)) == torch.tensor(expected, dtype=torch.float64).to(dtype).tolist()


@properties
@given(task_numbers, seeds)
def test_emr_is_its_definition_and_keeps_each_tasks_sum_of_magnitudes(tasks, seed):
    taus, expected = quarters(tasks, seed), []
    for entries in zip(*map(flat, taus)):
        expected.append(max((e for e in entries if e * sum(entries) > 0), key=abs, default=0.0))
    unified, masks, rescalers = emr(taus)
    assert flat(unified) == expected
    for tau, mask, rescaler in zip(taus, masks, rescalers):
        assert flat(mask) == [e * u > 0 for e, u in zip(flat(tau), expected)]
        magnitudes = sum(map(abs, flat(tau))) if any(flat(mask)) else 0  # nothing may be left of a task
        assert sum(rescaler * abs(u) * m for u, m in zip(expected, flat(mask))) == pytest.approx(magnitudes)


def test_entries_are_averaged_by_their_fisher_information_and_evenly_where_there_is_none():
    models = [vector(1, 2, 1), vector(3, 6, 2)]
    same(average_by([vector(1, 0, 0), vector(3, 0, 1e-30)], models, weigh_entries), vector(2.5, 4, 2))


@pytest.mark.parametrize("classes, tolerance", [(3, 1e-12), (16, 1e-12), (20, 0.05)])
def test_fisher_information_is_the_loop_over_inputs_and_classes(classes, tolerance):
    """Beyond 16 classes it is an estimate: here a mean over 1000 inputs, 16 draws each."""
    torch.manual_seed(classes)
    tower = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    head, x = torch.randn(3, classes).double(), torch.randn(2, 4).double()
    expected = {name: torch.zeros_like(p) for name, p in tower.named_parameters()}
    for log_p in torch.log_softmax(tower(x) @ head, -1).flatten():
        for f, gradient in zip(expected.values(), torch.autograd.grad(log_p, tower.parameters(), retain_graph=True)):
            f += log_p.detach().exp() * gradient**2 / 2
    x = x if classes <= 16 else x.repeat(500, 1)
    with torch.no_grad():
        f = fisher_information(tower.requires_grad_(False), x, lambda features: features @ head)
    assert not any(p.requires_grad for p in tower.parameters())
    torch.testing.assert_close(f, expected, rtol=tolerance, atol=tolerance / 10)


@properties
@given(task_numbers, st.sampled_from([0.0, 0.5, 0.9, 1.0]), seeds)
def test_regmean_minimises_its_objective(tasks, alpha, seed):
    """Where the gradient of a convex function is zero, it is least. The feature that is always 0 is averaged."""
    torch.manual_seed(seed)
    models = {t: nn.Linear(5, 3).double() for t in range(tasks)}  # some have fewer inputs than features
    inputs = {t: torch.randn(2 + 3 * t, 5).double().index_fill(1, torch.tensor(1), 0) for t in range(tasks)}
    merged, states = regmean(models, inputs, alpha), [model.state_dict() for model in models.values()]
    gradient = 0
    for state, x in zip(states, inputs.values()):
        gram = x.T @ x / len(x)
        gram = alpha * gram + (1 - alpha) * gram.diag().diag()
        gradient = gradient + (merged["weight"] - state["weight"]) @ gram
    close(gradient, torch.zeros_like(gradient), atol=1e-7)
    mean = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
    close(merged["weight"][:, 1], mean["weight"][:, 1])
    close(merged["bias"], mean["bias"])


@pytest.mark.parametrize("training", [True, False])
def test_gram_matrices_cover_the_attention_of_open_clip(training):
    torch.manual_seed(0)
    block, x, inputs = open_clip.transformer.ResidualAttentionBlock(8, 2).train(training), torch.randn(70, 3, 8), {}
    hooks = []
    for name, module in (("attn", block.attn), ("mlp.c_fc", block.mlp.c_fc), ("mlp.c_proj", block.mlp.c_proj)):
        hooks.append(module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0])))
    block(x)
    [hook.remove() for hook in hooks]
    h, linear = inputs["attn"], F.linear
    q, k, v = (h @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).reshape(70, 3, 3, 2, 4).permute(2, 0, 3, 1, 4)
    inputs["attn.out_proj"] = ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
    names = {f"{name}.weight": x.flatten(0, 1) for name, x in inputs.items() if name != "attn"}
    expected = {name: x.T @ x / len(x) for name, x in {"attn.in_proj_weight": h.flatten(0, 1), **names}.items()}
    grams = gram_matrices(block, x)
    assert grams.keys() == expected.keys() and F.linear is linear
    torch.testing.assert_close(grams, {name: expected[name].detach() for name in grams}, rtol=1e-4, atol=1e-5)


def text_model() -> Made:
    """Takes its inputs by name."""

    def run(self: Made, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.out(self.words(input_ids)) * attention_mask[..., None]
        return h.sum(1) / attention_mask.sum(1, keepdim=True)

    return randomised(Made(run, words=nn.Embedding(9, 4), out=nn.Linear(4, 3)))


def texts(count: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 9, (count, 5)), "attention_mask": torch.ones(count, 5, dtype=torch.long)}


def test_gram_matrices_do_not_depend_on_padding():
    torch.manual_seed(0)
    model, batch = text_model(), texts(3)
    padded = {name: F.pad(value, (0, 4)) for name, value in batch.items()}
    close(gram_matrices(model, padded), gram_matrices(model, batch))


def test_fisher_merging_and_regmean_go_by_the_statistics_of_each_task_for_texts_too():
    torch.manual_seed(0)
    finetuned, inputs = {task: text_model() for task in "ab"}, {task: texts(70) for task in "ab"}
    before, states = copy.deepcopy(finetuned), [model.state_dict() for model in finetuned.values()]
    heads = {"a": nn.Identity(), "b": lambda features: features[:, :2]}
    fishers = [fisher_information(finetuned[t], inputs[t], heads[t]) for t in "ab"]
    same(fisher_merging(finetuned, inputs, heads), average_by(fishers, states, weigh_entries))
    grams = [gram_matrices(finetuned[t], inputs[t]) for t in "ab"]
    assert grams[0].keys() == {"out.weight"}
    same(regmean(finetuned, inputs), average_by(grams, states, least_squares))
    for task in "ab":
        same(finetuned[task].state_dict(), before[task].state_dict())


def test_regmean_plus_plus_is_least_squares_on_what_the_merged_blocks_give():
    torch.manual_seed(0)
    models = {t: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double() for t in "ab"}
    inputs = {t: torch.randn(20, 4).double() for t in "ab"}
    merged = regmean_plus_plus(models, inputs, alpha=1.0, blocks=r"^\d$")
    x = inputs
    for block in "01":
        thetas = torch.stack([model.get_parameter(f"{block}.weight") for model in models.values()])
        bias = torch.stack([model.get_parameter(f"{block}.bias") for model in models.values()]).mean(0)
        weight = least_squares(thetas, torch.stack([x[t].T @ x[t] / 20 for t in "ab"]), alpha=1.0)
        close(merged[f"{block}.weight"], weight, atol=1e-6)
        same(merged[f"{block}.bias"], bias)
        x = {t: F.linear(x[t], weight, bias) for t in "ab"}
    close(regmean_plus_plus({"a": models["a"]}, {"a": inputs["a"]}, blocks=r"^\d$"), models["a"].state_dict())
    same(
        regmean_plus_plus(models, inputs, blocks="none")["0.weight"],
        (models["a"][0].weight + models["b"][0].weight) / 2,
    )


# ---- AdaMerging, Concrete masks, AdaRank -----------------------------------------------------------------------------


def merging(kind: type[AdaMerging], models: list[nn.Module], **options) -> AdaMerging:
    return kind(models[0], dict(enumerate(vectors_of(models))), **options)


ada_merging, concrete, ada_rank = (partial(merging, kind) for kind in (AdaMerging, ConcreteMask, AdaRank))
task_wise = partial(ada_merging, layer_wise=False)


def layers(count: int, seed: int = 0) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), Gated(6))
        for _ in range(count)
    ]


def floats(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """All but counters."""
    return {name: p for name, p in state.items() if p.is_floating_point()}


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def with_entries(model: nn.Module, entries: dict[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(model)
    model.load_state_dict({**model.state_dict(), **entries})
    return model


@pytest.mark.parametrize("merging", [ada_merging, task_wise, concrete, ada_rank])
@properties
@given(task_numbers, st.floats(0, 1), seeds)
def test_every_merging_starts_as_task_arithmetic(merging, tasks, lam, seed):
    torch.manual_seed(seed)
    models = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)) for _ in range(tasks + 1)]
    for model in models:
        model(torch.randn(8, 3))  # running means: task vectors have them too
    model = merging(models, **{"scaling" if merging is concrete else "init_lambda": lam})
    assert model.lam.shape == (8 if merging in (ada_merging, ada_rank) else 1, tasks)
    expected = task_arithmetic(models[0], vectors_of(models), lam)
    with torch.no_grad():
        merged = model.merged()
    assert expected.keys() - merged.keys() == {"1.num_batches_tracked"}
    close({**expected, **merged}, expected)


@pytest.mark.parametrize("training", [True, False])
def test_lambda_is_clamped_to_the_unit_interval_in_use(training):
    models, x = layers(3), torch.randn(5, 4)
    model = ada_merging(models).train(training)
    model.lam.data.uniform_(-2, 3)
    inside = ada_merging(models).train(training)
    inside.lam.data.copy_(model.lam.data.clamp(0, 1))
    same(model(x), inside(x))
    same(model.merged(), inside.merged())
    model(x).square().sum().backward()
    outside = (model.lam < 0) | (model.lam > 1)
    assert outside.any() and not model.lam.grad[outside].any() and model.lam.grad[~outside].all()
    free = task_wise(models, init_lambda=-0.5, clamp=False).train(training)
    close({**models[0].state_dict(), **free.merged()}, task_arithmetic(models[0], vectors_of(models), -0.5))


@pytest.mark.parametrize("layer_wise", [False, True])
@properties
@given(task_numbers, seeds)
def test_constant_routers_are_adamerging_of_the_whole_or_where_a_module_has_one_lambda(layer_wise, tasks, seed):
    models = layers(tasks + 1, seed)
    merging = ada_merging(models) if layer_wise else task_wise(models)
    mixture = upscale(models[0], models[1:], router_depth=0, modules=leaves if layer_wise else whole)
    # The places of each module's parameters among all.
    rows = [(0, 1), (2, 3), (4, 5), (6,), (7,), (8,)] if layer_wise else [(0,)]
    routers = [module.router for module in mixture.modules() if isinstance(module, WEMoE)]
    for router, places in zip(routers, rows, strict=True):
        router.bias.data.uniform_()
        merging.lam.data[list(places)] = router.bias.data
    x = torch.linspace(-1, 1, 24).view(3, 2, 4)
    (y, dx, dlam), (expected, dx_, *dbias) = (output_and_gradients(model, x) for model in (merging, mixture))
    close(y, expected, atol=1e-4)
    close(dx, dx_, atol=1e-3)
    for places, gradient in zip(rows, dbias, strict=True):
        close(dlam[list(places)].sum(0), gradient, atol=1e-3)


MODULES = {  # what reads its weights in a way of its own, and the shape of its inputs
    "tied, shared, frozen, unused; batch norm": (Normed, (5, 4)),
    "parametrised": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))), (5, 4)),
    "convolution": (lambda: nn.Conv1d(5, 2, 1), (3, 5, 4)),
    "fused": (lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0, batch_first=True), (3, 5, 4)),
    "named otherwise in the state dict": (lambda: nn.Sequential(checkpoint_wrapper(nn.Linear(4, 4))), (5, 4)),
}


@pytest.mark.parametrize("merging", [ada_merging, concrete, ada_rank])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_in_any_module_a_merging_is_its_merged_weights_and_changes_nothing(name, training, merging):
    make, shape = MODULES[name]
    torch.manual_seed(0)
    models, x = [randomised(make()).eval() for _ in range(3)], torch.randn(shape)
    vectors, theta_0 = vectors_of(models), models[0].state_dict()
    before, y = copy.deepcopy((theta_0, vectors)), models[0](x)
    learnable = trained(models[0]).keys()
    model = merging(models).train(training)
    for p in trained_parameters(model):
        p.data += torch.rand_like(p) - 0.5
    state = copy.deepcopy(model.state_dict())
    model(x).square().sum().backward()
    gradients = [p.grad for p in trained_parameters(model) if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)
    with torch.no_grad():
        merged = model.merged()
        expected = with_entries(models[0], merged).train(training)(x)
        close(model(x), expected)
        close(copy.deepcopy(model)(x), expected)
        for one, other in itertools.combinations(merged, 2):
            if theta_0[one].data_ptr() == theta_0[other].data_ptr():  # tied
                same(merged[one], merged[other])
        same(floats(model.state_dict()), floats(state))  # running statistics, too: those of a batch are used alone
        [p.fill_(7) for p in model.parameters()]
    same((theta_0, vectors), before)
    same(models[0](x), y)
    assert trained(models[0]).keys() == learnable


def checkpointed(self: Made, x: Tensor) -> Tensor:
    h = self.first(x)
    return self.second(h) if self.kind is None else checkpoint(self.second, h, use_reentrant=self.kind)


def tied_layers() -> Made:
    first, second = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    second[0].weight = first.weight
    return Made(checkpointed, first=first, second=second, kind=None)


@pytest.mark.parametrize("merging", [ada_merging, concrete])
@pytest.mark.parametrize("kind", [True, False])
def test_checkpoints_in_the_model_change_no_gradient(kind, merging):
    torch.manual_seed(0)
    models, x = [randomised(tied_layers()).eval() for _ in range(3)], torch.randn(5, 4)
    results = []
    for models[0].kind in (None, kind):
        model = merging(models)
        torch.manual_seed(1)  # of the mask
        y = model(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in trained_parameters(model) if p.grad is not None)])
    assert len(results[0]) > 1 and all(g.any() for g in results[0])
    close(*results, atol=1e-4)


@pytest.mark.parametrize("merging", [ada_merging, task_wise, concrete, ada_rank])
def test_adapt_trains_lambda_or_the_mask_and_nothing_else(merging):
    torch.manual_seed(0)
    models = [Transformer() for _ in range(3)]
    loaders = {task: [torch.randn(4, 3, 3) for _ in range(3)] for task in "ab"}
    heads = {"a": nn.Linear(5, 3).requires_grad_(False), "b": lambda features: 5 * features[:, :4]}
    model = merging(models)
    ours = trained(model)
    learned = {concrete: {"x"}, ada_rank: {"lam", "x"}}.get(merging, {"lam"})
    assert {name.split(".")[0] for name in ours} == learned
    before = {name: p.clone() for name, p in model.named_parameters()}
    history = adapt(model, loaders, heads, steps=30, lr=0.1)
    assert sum(history[-3:]) < sum(history[:3])
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and changed <= ours.keys()


def test_a_merging_in_another_type_or_of_another_seed_takes_the_state_of_the_first():
    models, x = layers(3), torch.randn(5, 4)
    model = ada_merging(models)
    model.lam.data.uniform_()
    fresh = ada_merging(layers(3, seed=1))
    fresh.load_state_dict(model.state_dict())
    same(fresh(x), model(x))
    y, merged = model(x), model.merged()
    close(copy.deepcopy(model).double()(x.double()).float(), y)
    with torch.autocast("cpu", torch.bfloat16):
        same(model.merged(), merged)
        torch.testing.assert_close(model(x).float(), y, atol=0.05, rtol=0.05)


def test_a_concrete_mask_has_a_mean_of_one_and_is_drawn_anew_in_training():
    models = layers(3)
    model, x = concrete(models), torch.randn(5, 4)
    with torch.no_grad():
        randomised(model.x, 1.0)
        masks, vectors = model.masks(), vectors_of(models)
        for mask, logits in zip(masks.values(), trained(model).values(), strict=True):
            close(mask, torch.sigmoid(2 * logits) / torch.sigmoid(2 * logits).mean())
        same(model(x), model(x))
        masked = [{name: masks[name] * entry for name, entry in tau.items()} for tau in vectors]
        close(model.merged(), task_arithmetic(models[0], masked, 0.3))
    draws = [model.masks() for _ in range(2)]
    for name in draws[0]:
        assert not torch.equal(draws[0][name], draws[1][name])
        for masks in draws:
            assert masks[name].min() >= 0 and masks[name].mean().item() == pytest.approx(1)
    assert not torch.equal(model(x), model(x))


def test_adarank_leaves_out_what_its_mask_does():
    models, x = layers(3), torch.randn(5, 4)
    model = ada_rank(models)
    masked = vectors_of(models)
    for name, i in model.entries.items():
        if str(i) in model.x:
            model.x[str(i)].data[:, 1:] = -1e-3  # but the first
            for tau in masked:
                u, s, v = torch.linalg.svd(tau[name], full_matrices=False)
                tau[name] = s[0] * u[:, :1] @ v[:1]
    model.lam.data.uniform_(-1, 3)  # not clamped
    with torch.no_grad():
        merged = model.merged()
        for row, name in enumerate(merged):
            tau = sum(lam * tau[name] for lam, tau in zip(model.lam[row], masked))
            close(merged[name], models[0].state_dict()[name] + tau)
        close(model(x), with_entries(models[0], merged)(x))
    model(x).square().sum().backward()
    assert all(p.grad.any() for p in trained_parameters(model))


# ---- Sparse and low-rank task vectors, E-WEMoE -----------------------------------------------------------------------

LAYERS = {"sparse": partial(SparseLinear, keep=0.4), "low rank": partial(LowRankLinear, rank=2)}
drawn_layers = st.sampled_from(
    [partial(SparseLinear, keep=k) for k in (0.05, 0.4, 1.0)] + [partial(LowRankLinear, rank=r) for r in (1, 3, 99)]
)


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]


# What must be true of any form of a linear layer, with these.
test_no_samples_or_no_tokens = test_wemoe.test_no_samples_or_no_tokens_give_none
test_what_is_done_to_a_module = test_wemoe.test_what_is_done_to_a_module_changes_no_output_and_no_gradient
test_other_types = test_wemoe.test_other_types
test_autocast = test_wemoe.test_bfloat16_autocast_gives_the_type_of_a_dense_module_and_nearly_the_same
test_degenerate_task_vectors = test_wemoe.test_degenerate_task_vectors_give_finite_models
test_on_a_gpu = test_wemoe.test_gpu_gives_what_the_cpu_gives


def linear_parts(module: nn.Module) -> dict[str, nn.Module]:
    return {n: part for n, part in module.pretrained.named_modules() if isinstance(part, wemoe.MergedLinear)}


@properties
@given(kinds, task_numbers, batch_sizes, axes, drawn_layers, st.sampled_from([1, 99, 9999]), seeds)
def test_every_form_is_the_dense_module_of_its_own_task_vectors(kind, tasks, batch, tokens, layer, tile, seed):
    pretrained, finetuned = family(kind, 4, tasks, seed)
    router, x = randomised(Router(4, tasks)), torch.randn(batch, *tokens, 4)
    module, dense = WEMoE(pretrained, finetuned, router, layer=layer), WEMoE(pretrained, finetuned, router)
    for name, part in linear_parts(module).items():
        linear_parts(dense)[name].tau(0).copy_(part.tau(0))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(wemoe._TILE, "cpu", tile)
        close(output_and_gradients(module, x), output_and_gradients(dense, x), atol=1e-3)


def stored_and_whole(kind: str, tasks: int, seed: int, layer: Callable) -> Iterator[tuple[Tensor, Tensor]]:
    """What the linear layers have of each task vector's matrix, and all of it."""
    pretrained, finetuned = family(kind, 4, tasks, seed)
    for name, part in linear_parts(WEMoE(pretrained, finetuned, Router(4, tasks), layer=layer)).items():
        for tau, model in zip(part.tau(0), finetuned):
            yield tau, (model.get_submodule(name).weight - pretrained.get_submodule(name).weight).detach()


@properties
@given(kinds, task_numbers, st.sampled_from([0.01, 0.3, 0.7, 1.0]), seeds)
def test_the_largest_entries_of_each_matrix_and_task_are_kept(kind, tasks, keep, seed):
    for sparse, tau in stored_and_whole(kind, tasks, seed, partial(SparseLinear, keep=keep)):
        same(sparse, trim({"": tau}, keep)[""])


@properties
@given(kinds, task_numbers, st.integers(1, 4), seeds)
def test_truncated_matrices_are_the_best_of_their_rank(kind, tasks, rank, seed):
    """Eckart and Young: what is left over has the other singular values, and no matrix of the rank leaves less."""
    for truncated, tau in stored_and_whole(kind, tasks, seed, partial(LowRankLinear, rank=rank)):
        left = torch.linalg.svdvals(tau)[rank:]
        close(torch.linalg.svdvals(tau - truncated)[: len(left)], left, atol=1e-4)
        assert torch.linalg.matrix_rank(truncated, rtol=1e-4) <= rank


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_low_rank_factors_are_never_multiplied_in_a_forward_pass(depth, batch, monkeypatch):
    pretrained, finetuned = family("plain", 4, 3, 0)
    x, options = torch.randn(batch, 5, 4), dict(modules=whole, router_depth=depth)
    model = upscale(pretrained, finetuned, layer=partial(LowRankLinear, rank=99), **options)
    dense = upscale(pretrained, finetuned, **options)
    dense.router.load_state_dict(randomised(model.router).state_dict())
    expected = output_and_gradients(dense, x)
    unloaded = wemoe.unload(model)(x) if depth == 0 else expected[0]

    def multiplied(self, i: int) -> Tensor:
        assert i == 1, "the factors of the matrix were multiplied"
        return wemoe.MergedLayer.tau(self, i)

    monkeypatch.setattr(LowRankLinear, "tau", multiplied)
    close(output_and_gradients(model, x), expected, atol=1e-4)
    close(unloaded, expected[0], atol=1e-4)


@pytest.mark.parametrize("tasks", [1, 3])
def test_sparse_and_low_rank_forms_really_take_less_memory(tasks):
    models = [nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(tasks + 1)]
    matrices, vectors = 64 * 128 + 128 * 32, 128 + 32

    def size(layer=None) -> int:
        module = WEMoE(models[0], models[1:], Fixed(torch.zeros(tasks)), layer=layer)
        tensors = [*module.parameters(), *module.buffers()]
        total = sum(t.nbytes for t in tensors)
        assert sum(t.untyped_storage().nbytes() for t in tensors) == total  # none is a part of a larger one
        return total - sum(p.nbytes for p in models[0].parameters()) - 4 * tasks

    assert size() == 4 * tasks * (matrices + vectors)
    sparse = 4 * tasks * (0.1 * 2 * matrices + vectors)  # a place, of 32 bits, for every value
    assert size(partial(SparseLinear, keep=0.1)) == pytest.approx(sparse, rel=0.01)
    low_rank = 4 * tasks * (3 * (64 + 128 + 128 + 32) + vectors)
    assert size(partial(LowRankLinear, rank=3)) == low_rank


def test_one_row_serves_all_samples():
    module = WEMoE(*family("linear", 4, 2, 0), randomised(Router(4, 2)), layer=LAYERS["low rank"])
    part, x, lam = module.pretrained, torch.randn(1, 3, 4), torch.randn(6, 2)
    close(part.for_each(lam, x), torch.cat([part.for_each(row[None], x) for row in lam]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("merging", [ada_merging, concrete])
def test_merging_on_a_gpu_gives_what_the_cpu_gives(merging):
    models, x = layers(3), torch.randn(5, 4)
    for model in (merging(models), merging([m.cuda() for m in models])):
        with torch.no_grad():
            torch.testing.assert_close(model.cuda()(x.cuda()).cpu(), model.cpu()(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [None, *LAYERS.values()])
def test_a_whole_transformer_with_one_router_or_many(layer):
    """Routers with the same weights do what one shared router does; its gradient is the sum of theirs."""
    torch.manual_seed(0)
    pretrained, *finetuned = (randomised(Transformer(), 0.3) for _ in range(3))
    options, x = dict(modules=r"\.(mlp|attn)$", layer=layer), torch.randn(3, 2, 3)
    one, many = share_router(upscale(pretrained, finetuned, **options)), upscale(pretrained, finetuned, **options)
    routed = [[m for m in model.modules() if isinstance(m, WEMoE)] for model in (one, many)]
    router = routed[0][0].router
    randomised(router)
    assert len(routed[0]) == len(routed[1]) == 4 and all(module.router is router for module in routed[0])
    assert set(map(id, trained_parameters(one))) == set(map(id, router.parameters()))
    for module in routed[1]:
        module.router.load_state_dict(router.state_dict())
    (y, _, *shared), (expected, _, *separate) = (output_and_gradients(model, x) for model in (one, many))
    close(y, expected)
    for i, gradient in enumerate(shared):
        close(gradient, sum(separate[i :: len(shared)]), atol=1e-3)
    copied = copy.deepcopy(one)
    assert len({id(module.router) for module in copied.modules() if isinstance(module, WEMoE)}) == 1
    fresh = share_router(upscale(pretrained, finetuned, **options))
    fresh.load_state_dict(one.state_dict())
    same(fresh(x), y)
    same(copied(x), y)


@properties
@given(st.sampled_from([0, 1, 2]), task_numbers, batch_sizes, seeds)
def test_averaged_over_the_batch_all_samples_have_the_mean_of_their_routing_weights(depth, tasks, batch, seed):
    """So a batch runs through one merged model, a sample alone runs as before, and the routers learn."""
    pretrained, finetuned = family("plain", 4, tasks, seed)
    x, single = torch.randn(batch, 3, 4), upscale(pretrained, finetuned, modules=whole, router_depth=depth)
    randomised(single.router)
    model = average_over_batch(copy.deepcopy(single))
    with routing_weights(single) as own, routing_weights(model) as shared:
        alone, y = single(x), model(x)
    lam = own[""].mean(0)
    close(shared[""], lam.expand(batch, -1))
    merged = task_arithmetic(pretrained, vectors_of([pretrained, *finetuned]), lam.tolist())
    close(y, with_entries(pretrained, merged)(x), atol=1e-4)
    close(torch.cat([model(sample) for sample in x.split(1)]), alone, atol=1e-4)
    y.square().sum().backward()
    assert [p.grad is not None for p in model.router.parameters()] == [True] * (2 * depth or 1)
    if depth == 0:  # nothing to average
        close(wemoe.unload(model)(x), y)


# ---- Twin-Merging, ensembles -----------------------------------------------------------------------------------------

OWN = r"\.(norm|attn|mlp)$"  # of the Transformer above, all but the ends


def fine_tuned_inside(tasks: int) -> tuple[nn.Module, dict[str, nn.Module], dict[str, Tensor]]:
    """Models that differ only in their blocks, and inputs that anyone can tell apart."""
    torch.manual_seed(0)
    pretrained = Transformer()
    finetuned = {str(t): model for t, model in enumerate(varied(pretrained, lambda name: name == "blocks", tasks))}
    return pretrained, finetuned, {task: torch.randn(8, 2, 3) + 9 * torch.eye(3)[t] for t, task in enumerate(finetuned)}


@pytest.mark.parametrize("rank", [1, 99])
def test_twin_merging_takes_what_is_an_inputs_own_and_at_full_rank_that_is_its_expert(rank):
    pretrained, finetuned, inputs = fine_tuned_inside(3)
    models = [pretrained, *finetuned.values()]
    before = copy.deepcopy(models)
    model = twin_merging(pretrained, finetuned, inputs, rank=rank, steps=100, modules=OWN)
    x = torch.cat(list(inputs.values()))
    labels = torch.arange(3).repeat_interleave(8)
    assert torch.equal(model.task_weights(x).argmax(-1), labels)
    shared = with_entries(pretrained, task_arithmetic(pretrained, vectors_of(models), 0.3))
    features = F.normalize(shared(x), dim=-1) * 5**0.5
    close(model.features(x), features)
    with routing_weights(model) as weights:
        y = model(x)
    assert len(weights) == 6
    for lam in weights.values():  # computed once
        close(lam, model.classifier(features).softmax(-1))
        close(lam.sum(1), torch.ones(len(x)))
    with model.routed_by(torch.zeros(1, 3)):
        close(model.model(x), shared(x), atol=1e-4)
    if rank == 99:
        with model.routed_by(torch.eye(3)[labels]):
            close(model.model(x), torch.cat([finetuned[t](inputs[t]) for t in inputs]), atol=1e-4)
    else:  # of the attention, too, only matrices of rank 1
        (tau, *_) = model.model.blocks[0]["attn"].pretrained.tau(0)
        assert torch.linalg.matrix_rank(tau, rtol=1e-4) == 1
    assert trained(model).keys() == {"classifier.weight", "classifier.bias"}
    same(copy.deepcopy(model)(x), y)
    same(torch.cat([model(part) for part in x.split(1)]).round(decimals=3), y.round(decimals=3))
    for dense, kept in zip(models, before):
        same(dense.state_dict(), kept.state_dict())
    with pytest.raises(ValueError, match="routers of depth 0"):
        wemoe.unload(model)
    with pytest.raises(RuntimeError, match="in a forward pass of the whole"):
        model.model(x)


@pytest.mark.parametrize("features", [None, lambda model, batch: model(**batch)[:, :2]])
def test_twin_merging_of_texts_with_features_of_ones_own(features):
    torch.manual_seed(0)
    pretrained, *finetuned = (text_model() for _ in range(3))
    finetuned, inputs = dict(zip("ab", finetuned)), {task: texts(4) for task in "ab"}
    model = twin_merging(pretrained, finetuned, inputs, modules="words|out", steps=1, rank=99, features=features)
    assert model.classifier.in_features == (3 if features is None else 2)
    with torch.no_grad():
        model.classifier.weight.zero_(), model.classifier.bias.copy_(torch.tensor([0.0, 1000.0]))
    assert model(**inputs["a"]).shape == (4, 3)
    close(model(**inputs["a"]), finetuned["b"](**inputs["a"]), atol=1e-4)
    with pytest.raises(TypeError, match="one input, or inputs by name"):
        model(inputs["a"]["input_ids"], attention_mask=inputs["a"]["attention_mask"])


def test_an_ensemble_averages_logits_and_a_model_alone_decides_as_before():
    torch.manual_seed(0)
    models, x, head = [nn.Linear(4, 6) for _ in range(3)], torch.randn(50, 4), torch.randn(6, 5)
    logits = [F.normalize(model(x), dim=-1) @ head for model in models]
    close(Ensemble(models)(x) @ head / 3, sum(logits) / 3)
    close(Ensemble(dict(zip("abc", models)))(x) @ head / 3, sum(logits) / 3)
    assert torch.equal((Ensemble(models[:1])(x) @ head).argmax(-1), (models[0](x) @ head).argmax(-1))


# ---- By singular values: TSV-M, Iso, WUDI ----------------------------------------------------------------------------


def matrices(count: int, seed: int, *shape: int) -> list[dict[str, Tensor]]:
    torch.manual_seed(seed)
    return [{"w": torch.randn(*shape).double()} for _ in range(count)]


@pytest.mark.parametrize("rule, atol", [(tsv_merge, 1e-9), (partial(wudi, steps=20), 3e-4)])
@properties
@given(st.integers(1, 4), seeds)
def test_tasks_that_share_no_direction_are_added_up(rule, atol, tasks, seed):
    """As ranks are at most r/T, nothing is lost. (Adam makes its steps of 1e-5 where the gradient is rounding, too.)"""
    (left, right), rank = (torch.linalg.qr(tau["w"]).Q for tau in matrices(2, seed, 8, 8)), 8 // tasks
    blocks = [slice(t * rank, (t + 1) * rank) for t in range(tasks)]
    taus = [{"w": left[:, block] @ torch.rand(rank).double().diag() @ right[:, block].T} for block in blocks]
    close(rule(taus)["w"], sum(tau["w"] for tau in taus), atol=atol)


@properties
@given(st.integers(2, 4), st.sampled_from([(8, 12), (12, 8)]), seeds)
def test_the_directions_of_tsv_merge_are_orthonormal_and_the_values_the_tasks_own(tasks, shape, seed):
    taus = matrices(tasks, seed, *shape)
    values = torch.cat([torch.linalg.svdvals(tau["w"])[: 8 // tasks] for tau in taus]).sort(descending=True).values
    close(torch.linalg.svdvals(tsv_merge(taus)["w"])[: len(values)], values, atol=1e-9)


@properties
@given(st.integers(1, 4), seeds)
def test_iso_keeps_directions_and_makes_all_singular_values_their_mean(tasks, seed):
    taus = matrices(tasks, seed, 10, 12)
    total = sum(tau["w"] for tau in taus)
    u, s, v = torch.linalg.svd(total, full_matrices=False)
    close(iso_c(taus)["w"], u @ v * s.mean(), atol=1e-9)
    close(iso_cts(taus, common=1.0), iso_c(taus), atol=1e-9)
    merged = iso_cts(taus, common=0.5)["w"]  # 5 of 10, or with 4 tasks 6: 10 - 4 · round(5 / 4)
    values, common = torch.linalg.svdvals(merged), 10 - tasks * round(5 / tasks)
    close(values, values.mean().expand(10), atol=1e-9)
    own = [torch.linalg.svdvals(tau["w"] - u[:, :common] @ u[:, :common].T @ tau["w"]) for tau in taus]
    close(values.mean(), torch.cat([s[:common], *(x[: round(5 / tasks)] for x in own)]).mean(), atol=1e-9)


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_wudi_descends_to_the_least_squares_solution(tasks):
    """Σ_t (τ - τ_t) G_t = 0 with G_t = τ_tᵀ τ_t / |τ_t|²: RegMean on the rows of the task vectors."""
    taus = torch.stack([tau["w"] for tau in matrices(tasks, 0, 6, 3)])
    grams = taus.mT @ taus / taus.square().sum((1, 2), keepdim=True)
    merged = wudi([{"w": tau} for tau in taus], steps=1500, lr=1e-2)["w"]
    close(merged, least_squares(taus, grams, alpha=1.0), atol=1e-3)


def test_tall_masks_and_their_consensus_by_hand():
    taus = [vector(4, 1, 0, 2), vector(1, 1, 3, -3)]  # the sum is 5, 2, 3, -1; without each 1, 1, 3, -3 and 4, 1, 0, 2
    unified, masks = tall_masks(taus, 0.5)
    same(unified, vector(5, 2, 3, -1))
    assert list(map(flat, masks)) == [[True, True, False, True], [False, True, True, True]]
    same(consensus(taus, 0.5), vector(0, 2, 0, -1))
    same(consensus(taus, 0.5, least=1), unified)


# ---- Routed without training: SMILE, MASS ----------------------------------------------------------------------------


def towers(tasks: int) -> tuple[nn.Module, list[nn.Module]]:
    """Vision transformers that differ in their linear layers only, attention's too."""
    torch.manual_seed(0)
    pretrained = open_clip.transformer.VisionTransformer(8, 4, 8, 3, 2, 2, output_dim=4).eval().requires_grad_(False)
    return pretrained, varied(pretrained, re.compile(r"resblocks.*(attn|mlp)$").search, tasks)


GATE = "transformer.resblocks.1.mlp.c_fc"
RECOVER = {
    "Twin-Merging": lambda model, experts, x: twin_merging(model, experts, dict.fromkeys(experts, x), steps=1, rank=99),
    "SMILE": lambda model, experts, x: Smile(model, experts, gate_rank=2, rank=99),
    "MASS": lambda model, experts, x: Mass(model, experts, GATE),
}


@pytest.mark.parametrize("name, copies", [("Twin-Merging", 1), ("SMILE", 1), ("SMILE", 3), ("MASS", 1)])
def test_an_expert_that_is_alone_or_that_all_tasks_share_is_recovered(name, copies):
    (pretrained, (expert,)), x = towers(1), torch.randn(5, 3, 8, 8)
    model = RECOVER[name](pretrained, {str(t): expert for t in range(copies)}, x)
    close(model(x), expert(x), atol=1e-4)
    close(model.task_weights(x).sum(1), torch.ones(5))
    assert name == "Twin-Merging" or not trained(model)


def test_in_smile_each_token_has_the_expert_in_whose_directions_it_lies():
    pretrained = nn.Linear(4, 2)
    experts = [copy.deepcopy(pretrained) for _ in range(2)]
    with torch.no_grad():
        for t, expert in enumerate(experts):
            expert.weight[:, 2 * t : 2 * t + 2] += torch.randn(2, 2)
            expert.bias += 1 + t
    tokens = torch.tensor([[1.0, 2, 0, 0.1], [0.1, 0, 1, 2]])  # of the first expert, and of the second
    model = Smile(pretrained, experts, gate_rank=2, rank=2)
    for x in (tokens, tokens.expand(3, 2, 4)):
        close(model(x)[..., 0, :], experts[0](tokens[0]).expand_as(model(x)[..., 0, :]))
        close(model(x)[..., 1, :], experts[1](tokens[1]).expand_as(model(x)[..., 1, :]))
    close(model.task_weights(tokens.expand(3, 2, 4)), torch.full((3, 2), 0.5))
    close(model.task_weights(tokens), torch.eye(2))  # a sample may be one token
    same(copy.deepcopy(model)(tokens), model(tokens))


def test_mass_runs_each_sample_through_tsv_merge_of_the_tasks_it_has_weights_for():
    (pretrained, finetuned), x = towers(4), torch.randn(9, 3, 8, 8)
    model, merge = Mass(pretrained, finetuned, GATE), tsv_merge(vectors_of([pretrained, *finetuned]))
    close(model.merged((0, 1, 2, 3)), task_arithmetic(pretrained, [merge], 1.0))
    weights = model.task_weights(x)
    kept = (weights > 0).sum(1)
    assert kept.min() >= 1 and kept.max() <= 3 and len(kept.unique()) > 1
    assert ((weights > 0.2) | (weights == 0) | (weights == weights.amax(1, keepdim=True))).all()
    for one, lam, y in zip(x.split(1), weights, model(x)):
        tasks = tuple(lam.nonzero().flatten().tolist())
        close(with_entries(pretrained, model.merged(tasks))(one)[0], y, atol=1e-4)
    assert len(model.kept) <= 6
    close(copy.deepcopy(model)(x), model(x))


def test_mass_prefers_the_task_in_whose_directions_a_token_lies():
    model = Mass(nn.Sequential(nn.Linear(4, 4)), [nn.Sequential(nn.Linear(4, 4)) for _ in range(2)], "0")
    inside = model.parts[0][2].detach()  # (T, 2, D)
    close(model.task_weights(inside[:, :1]).argmax(1), torch.arange(2))  # a token each, in the span of its task


# ---- Errors ----------------------------------------------------------------------------------------------------------


LINEAR = nn.Linear(2, 2)


def replaced() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].forward = lambda x: x
    return model


def two_sizes() -> nn.Module:
    model = nn.Sequential(Transformer(4), nn.Linear(5, 3), Transformer(6))
    return upscale(model, [copy.deepcopy(model)], modules=r"^0\.blocks\.0\.mlp$|^2\.blocks\.0\.mlp$")


def with_layer(layer: Callable) -> WEMoE:
    return WEMoE(LINEAR, [LINEAR], Router(2, 1), layer=layer)


ERRORS = {
    "up to 1, got keep=0": lambda: trim(vector(1.0), 0),
    "up to 1, got keep=nan": lambda: ties([vector(1.0)], math.nan),
    "'sum' or 'mean', not by 'max'": lambda: ties([vector(1.0)], merge="max"),
    "'b' is in a task vector alone": lambda: ties([vector(1.0), vector(1.0) | {"b": LINEAR.bias}]),
    r"'w' has shape \(2,\) in a task vector, but \(1,\)": lambda: emr([vector(1.0), vector(1.0, 2.0)]),
    "nothing to merge": lambda: ties([]),
    "models for .* but inputs or heads for": lambda: regmean_plus_plus({"a": LINEAR}, {}),
    "rank of at least 1, got rank=-1": lambda: Smile(LINEAR, [LINEAR], rank=-1),
    "nothing to merge: at least one": lambda: AdaMerging(LINEAR, []),
    "up to 1, got keep=1.5": lambda: with_layer(partial(SparseLinear, keep=1.5)),
    "rank of at least 1, got rank=0": lambda: with_layer(partial(LowRankLinear, rank=0)),
    r"one hidden size, found 4 \('0.blocks.0.mlp'\) and 6 \('2.blocks.0.mlp'\)": lambda: share_router(two_sizes()),
    "one hidden size, found no routed module": lambda: share_router(nn.Linear(2, 2)),
    "'weight' is in the pre-trained model alone": lambda: AdaMerging(LINEAR, [{"bias": LINEAR.bias}]),
    "'down.weight'.*tied in the pre-trained": lambda: AdaMerging(
        Normed(), [{**task_vector(Normed(), Normed()), "down.weight": torch.ones(4, 4)}]
    ),
    "can be unloaded, not a BatchRouter": lambda: wemoe.unload(
        average_over_batch(upscale(LINEAR, [LINEAR], modules=whole))
    ),
    "between 0 and 1 in AdaMerging, got init_lambda=1.5": lambda: AdaMerging(LINEAR, [], init_lambda=1.5),
    "'0' its forward was replaced": lambda: AdaMerging(replaced(), [task_vector(replaced(), replaced())]),
    r"models for \['a', 'b'\], but inputs or heads for \['a'\]": lambda: regmean(
        {"a": LINEAR, "b": LINEAR}, {"a": torch.ones(1, 2)}
    ),
    r"models for \['a'\], but inputs or heads for \['b'\]": lambda: fisher_merging(
        {"a": LINEAR}, {"a": torch.ones(1, 2)}, {"b": nn.Identity()}
    ),
    r"models for \['a'\], but inputs or heads for \[\]": lambda: twin_merging(LINEAR, {"a": LINEAR}, {}),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_what_is_wrong(message):
    with pytest.raises(ValueError, match=message):
        ERRORS[message]()


def test_baselines_needs_nothing_but_torch_and_wemoe():
    imported = {value.__name__.split(".")[0] for value in vars(baselines).values() if isinstance(value, type(math))}
    assert imported <= {"copy", "re", "torch", "wemoe"}


# ---- Where nobody tells the task of an image -------------------------------------------------------------------------


class Part(nn.Module):
    """Features that are what the input has beyond its first entries."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 2:]


class Answers(Part):
    """With routing weights, which are the first entries."""

    def task_weights(self, x: Tensor) -> Tensor:
        return x[:, :2]


def test_without_the_task_an_image_needs_the_right_head_and_the_right_class():
    """Heads see features 0 and 1, or 2 and 3. The first task's four images, then the second's two."""
    inputs = {
        "a": [[0.9, 0.1, 5, 0, 1, 0], [0.1, 0.9, 5, 0, 1, 0], [0.9, 0, 1, 0, 5, 0], [0.9, 0.1, 0, 5, 1, 0]],
        "b": [[0.1, 0.9, 1, 0, 0, 5], [0.9, 0, 1, 0, 0, 5]],
    }
    test = {task: (torch.tensor(x), torch.tensor([0] * 4 if task == "a" else [1] * 2)) for task, x in inputs.items()}
    heads = {"a": 20 * torch.eye(4)[:, :2], "b": 20 * torch.eye(4)[:, 2:]}
    options = dict(name="", seed=0, training=None, pretrained=None, load=None, normalise=lambda x: x)
    options["adaptation"] = Adaptation(*[1] * 6)
    suite = Suite(device=torch.device("cpu"), precision="float32", heads=heads, test=test, **options)
    suite.experts = {"a": Answers(), "b": Answers()}
    expected = {  # of the first task the third has the wrong head, the fourth the wrong class
        "entropy": {"a": 50.0, "b": 100.0},
        "routing": {"a": 50.0, "b": 50.0},  # and here the second has the wrong head
        "logit": {"a": 75.0, "b": 50.0},  # the other head's weight being zero, the third has the right one
    }
    assert evaluate_task_free(suite, Answers()) == expected
    apart = evaluate_task_free(suite, {task: Part() for task in "ab"})  # no routing
    assert apart == {"entropy": expected["entropy"], "logit": expected["entropy"]}
    model = upscale(nn.Sequential(nn.Linear(6, 4)), [nn.Sequential(nn.Linear(6, 4))] * 2, modules="0", router_depth=0)
    assert evaluate_task_free(suite, model).keys() == expected.keys()
    same(routed(model, test["a"][0])[1], torch.full((4, 2), 0.3))
