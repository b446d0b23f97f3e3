"""What must be true of data/methods.py: of every method in the registry, then of each one's mathematics."""

import copy
import itertools
import math
from dataclasses import replace
from functools import partial

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import methods
from data.methods import METHODS, AdaMerging, ConcreteMask, LowRankLinear, SparseLinear
from data.suite import Adaptation, Suite, Training
from wemoe import Router, WEMoE, routing_weights, task_arithmetic, task_vector

CPU = torch.device("cpu")
close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-4)
same = partial(torch.testing.assert_close, atol=0, rtol=0)


def tower(seed: int = 0, layers: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    parts = open_clip.transformer.VisionTransformer(8, 4, 8, layers, 2, 2, output_dim=4)  # 4 patches, width 8, 2 heads
    return parts.eval().requires_grad_(False)


def fine_tuned(model: nn.Module, seed: int, where: str = "") -> nn.Module:
    """A copy in which entries of tensors are others, whose names have `where` in them."""
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    for name, p in model.named_parameters():
        p += 0.1 * torch.randn_like(p) * (where in name)
    return model


def images(task: str, split: str = "test", count: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(ord(task))
    rows = torch.randint(0, 100, (12, 3, 8, 8), generator=generator) + 50 * (ord(task) - ord("a"))
    return rows.byte()[:count], torch.arange(12)[:count] % 3


def suite_of(experts: dict[str, nn.Module], pretrained: nn.Module, **options) -> Suite:
    torch.manual_seed(0)
    adaptation = Adaptation(2, 1e-3, lambda_steps=3, lambda_lr=1e-3, mask_steps=4, mask_lr=1e-3, batch_size=4)
    known = dict(name="tiny", seed=0, device=CPU, precision="float32", training=Training(8, 2, 1e-2), load=images)
    known |= dict(adaptation=adaptation, normalise=lambda rows: rows / 255, test={t: images(t) for t in experts})
    known |= dict(heads={t: 3 * torch.randn(4, 3) for t in "abcd" if t in experts})
    return Suite(**known | options, pretrained=pretrained, experts=experts)


def tiny(tasks: str = "ab", where: str = "", **options) -> Suite:
    return suite_of({t: fine_tuned(tower(), ord(t), where) for t in tasks}, tower(), **options)


def made(name: str, suite: Suite) -> tuple[dict[str, nn.Module], dict]:
    """A model for each task, the same for all if there is one, and what else is told."""
    torch.manual_seed(0)
    result = METHODS[name].make(suite)
    model, record = result if isinstance(result, tuple) else (result, {})
    return {t: model if isinstance(model, nn.Module) else model[t] for t in suite.experts}, record


def outputs(models: dict[str, nn.Module]) -> dict[str, Tensor]:
    with torch.no_grad():
        return {task: model(images(task)[0] / 255) for task, model in models.items()}


def vectors_of(suite: Suite) -> list[dict[str, Tensor]]:
    return [task_vector(suite.pretrained, expert) for expert in suite.experts.values()]


def states(suite: Suite) -> list[dict[str, Tensor]]:
    return [model.state_dict() for model in (suite.pretrained, *suite.experts.values())]


# ---- Of every method -------------------------------------------------------------------------------------------------

# The order of tasks matters where something starts at random for each, or is put together one after the other.
ORDERED = [name for name, row in METHODS.items() if "WEMoE" in name and "0-layer" not in name]
ORDERED += ["Self Positioning", "Concrete Task Arithmetic", "Concrete AdaMerging", "Task Arithmetic of two tasks"]
# Of one task alone, that differs from θ_0 in MLPs, the expert is what they give.
ALONE = ["Weight Averaging", "TSV-M", "Fisher Merging", "RegMean", "RegMean++", "Oracle routing", "Individual"]


@pytest.mark.parametrize("settings", ["paper", "hub"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_leaves_its_inputs_alone_asks_for_no_order_and_is_finite(name, settings):
    suite = tiny("ab", settings=settings)
    before, grads = copy.deepcopy(states(suite)), [p.requires_grad for p in suite.pretrained.parameters()]
    models, record = made(name, suite)
    found = outputs(models)
    assert all(y.isfinite().all() for y in found.values())
    if METHODS[name].group == methods.LEARNED:
        assert record["adaptation"]["steps"][-1] > 0 and METHODS[name].needs == (methods.ADAPTATION,)
    if name not in ORDERED:
        turned = replace(suite, experts=dict(reversed(suite.experts.items())))
        close(outputs(made(name, turned)[0]), found, atol=1e-4, rtol=1e-3)
    same(states(suite), before)
    assert [p.requires_grad for p in suite.pretrained.parameters()] == grads


@pytest.mark.parametrize("name", ALONE)
def test_one_task_alone_is_recovered(name):
    suite = tiny("a", where=".mlp.")
    close(outputs(made(name, suite)[0]), outputs(dict(suite.experts)), atol=1e-4)


def test_rows_are_in_the_order_of_the_groups_and_complete():
    order = [methods.STATIC, methods.SINCE, methods.GIVEN, methods.LEARNED, methods.ROUTED, methods.REFERENCE]
    groups = [row.group for row in METHODS.values() if row.main]
    assert groups == sorted(groups, key=order.index)
    assert all(row.name == name and row.seconds > 0 for name, row in METHODS.items())
    assert [name for name, row in METHODS.items() if row.only] == ["WEMoE (as the hub ran it)"]
    names = list(METHODS)  # as decorators are read, not as they are applied
    assert names.index("WEMoE (0-layer)") < names.index("WEMoE (1-layer)") < names.index("WEMoE")


@pytest.mark.parametrize("name", ["Task Arithmetic", "TIES-Merging"])
def test_static_merges_of_its_time_are_tried_at_the_suites_scalings(name):
    suite = tiny(scalings=(0.0, 0.3))
    model, record = METHODS[name].make(suite)
    zero, own = ((point["scaling"], point["accuracy"]) for point in record["curve"])
    assert zero == (0.0, methods.evaluate(suite, suite.pretrained)) and own == (0.3, methods.evaluate(suite, model))


# ---- Settings: what is adapted, how long, and at what rate -----------------------------------------------------------

STEPS = {  # of the paper, where routers have 2, λ 3, masks 4 steps; and with the hub's settings
    "AdaMerging (layer-wise)": ([(3, 2)], [(2, 1)]),
    "AdaMerging++ (task-wise)": ([(3, 2)], [(2, 1)]),
    "Concrete Task Arithmetic": ([(4, 1)], [(4, 1)]),
    "Concrete AdaMerging": ([(4, 1), (6, 1)], [(2, 1), (2, 1)]),
}


@pytest.mark.parametrize("name", STEPS)
def test_lambda_and_masks_have_a_constant_rate_and_the_steps_and_batches_of_their_authors(name, monkeypatch):
    seen = []

    def adapt(suite, model, label, *, steps, lr, anneal=True, batches=1, **_):
        seen.append((steps, batches))
        as_hub = suite.settings == "hub" and type(model) is AdaMerging
        assert not anneal and model.clamp != as_hub
        assert len(model.names) == len(vectors_of(suite)[0]) + 4 * 2 * as_hub  # q, k and v apart
        return {}

    monkeypatch.setattr(methods, "adapt", adapt)
    for settings, expected in zip(("paper", "hub"), STEPS[name]):
        seen.clear()
        made(name, tiny(settings=settings))
        assert seen == expected


def test_wemoe_as_the_hub_ran_it_has_one_lambda_for_a_batch_and_a_constant_rate(monkeypatch):
    annealed = {}
    monkeypatch.setattr(methods, "adapt", lambda *args, **options: annealed.update({args[2]: options["anneal"]}))
    suite = tiny(settings="hub")
    for name in ("WEMoE", "WEMoE (as the hub ran it)", "E-WEMoE"):
        model = made(name, suite)[0]["a"]
        for p in (p for p in model.parameters() if p.requires_grad):
            p.data += torch.randn_like(p)
        with routing_weights(model) as weights:
            model(images("a")[0] / 255)
        assert {len(lam) for lam in weights.values()} == ({12} if name == "WEMoE" else {1})
    assert annealed == {"WEMoE": True, "WEMoE (as the hub ran it)": False, "E-WEMoE": False}


def test_e_wemoe_has_one_router_and_a_tenth_of_the_entries():
    model = made("E-WEMoE", tiny())[0]["a"]
    routed = [module for module in model.modules() if isinstance(module, WEMoE)]
    assert len(routed) == 2 and len({id(module.router) for module in routed}) == 1
    assert routed[0].pretrained.c_fc.values.numel() == 2 * round(0.1 * 8 * 16)


@pytest.mark.parametrize("name", ["TSV-M", "Iso-C", "WUDI"])
def test_what_is_not_routed_is_merged_by_another_method_and_the_rest_starts_the_same(name):
    suite = tiny("abc")
    names = f"WEMoE ({name} elsewhere)", "WEMoE", name
    model, plain, static = (made(which, suite)[0]["a"].state_dict() for which in names)
    elsewhere = [name for name in static if name in model]
    assert any("attn" in n for n in elsewhere) and not any("mlp" in n for n in elsewhere)
    same({n: model[n] for n in elsewhere}, {n: static[n] for n in elsewhere})
    same({n: p for n, p in model.items() if ".taus." in n}, {n: p for n, p in plain.items() if ".taus." in n})


def test_oracle_routing_has_the_experts_mlps_and_unloaded_what_they_say():
    suite = tiny()
    for task, model in made("Oracle routing", suite)[0].items():
        arithmetic = task_arithmetic(suite.pretrained, vectors_of(suite))
        for name, p in model.state_dict().items():
            close(p, suite.experts[task].state_dict()[name] if ".mlp." in name else arithmetic[name])
    plain, routed = (outputs(made(f"WEMoE (0-layer{how})", suite)[0]) for how in (", unloaded", ""))
    close(plain, routed)


# ---- One vector for all tasks ----------------------------------------------------------------------------------------


def vector(*entries: float) -> dict[str, Tensor]:
    return {"w": torch.tensor(entries, dtype=torch.float32)}


def matrices(count: int, *shape: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(*shape).double() for _ in range(count)]


def merged(rule, taus, **options) -> Tensor:
    """What a rule makes of matrices, which are in a block."""
    return rule([{"layers.0.w": tau} for tau in taus], **options)["layers.0.w"]


def test_split_and_packed_are_inverse_and_q_k_and_v_apart():
    (tau,) = vectors_of(tiny("a"))
    parts, name = methods.split(tau), "transformer.resblocks.1.attn.in_proj_weight"
    same(methods.pack(parts), tau)
    assert len(parts) == len(tau) + 2 * 2 * 2 and name not in parts
    same([parts[f"{name}.{which}"] for which in "qkv"], list(tau[name].chunk(3)))


@pytest.mark.parametrize("rule", ["TSV-M", "Iso-C", "WUDI"])
def test_matrices_of_attention_are_merged_one_by_one_for_the_hubs_rows_alone(rule):
    name = "transformer.resblocks.0.attn.in_proj_weight"
    for settings, packed in (("paper", True), ("hub", False)):
        suite = tiny("abc", settings=settings)
        taus = [tau[name] for tau in vectors_of(suite)]
        apply = {"TSV-M": methods.tsv_merge, "Iso-C": methods.iso}.get(rule)
        apply = apply or partial(methods.wudi, lr=suite.training.lr, as_hub=not packed)
        scaling = 1.5 if rule == "Iso-C" and not packed else 1.0
        parts = zip(*([tau] if packed else tau.chunk(3) for tau in taus))
        expected = scaling * torch.cat([merged(apply, part) for part in parts])
        close(made(rule, suite)[0]["a"].state_dict()[name] - suite.pretrained.state_dict()[name], expected)


@pytest.mark.parametrize(
    "arch, size, kept",
    [("ViT-B-32", 87_849_216, 0.2583), ("ViT-B-16", 86_192_640, 0.2594), ("ViT-L-14", 303_966_208, 0.2254)],
)
def test_ties_keeps_a_fifth_of_the_authors_whole_image_encoder(arch, size, kept):
    whole = nn.Linear(size, 1, bias=False, device="meta")
    suite = replace(tiny(), name=arch, pretrained=whole)
    assert methods.kept_share(suite)["keep"] == pytest.approx(kept, abs=5e-5)
    assert methods.kept_share(replace(suite, settings="hub"))["keep"] == 0.2
    assert methods.kept_share(replace(suite, name="miniature"))["keep"] == 0.2


def test_ties_by_hand():
    taus = [vector(4, -1, 3, 0.5, 2), vector(-3, -2, 1, 0.1, 2)]
    trimmed = [vector(4, 0, 3, 0, 2), vector(-3, -2, 0, 0, 2)]  # the three largest of five; of two threes both
    same(methods.trim_and_elect(taus, 0.6), [vector(4, 0, 3, 0, 2), vector(0, -2, 0, 0, 2)])
    same(methods.ties(taus, 0.6), vector(4, -2, 3, 0, 4))
    draw = [trimmed[0], vector(-4, 0, 0, 0, 0)]
    same(methods.trim_and_elect(draw, 1.0)[0], vector(0, 0, 3, 0, 2))


@pytest.mark.parametrize("rule, atol", [(methods.tsv_merge, 1e-9), (methods.wudi, 5e-3)])
@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_tasks_that_share_no_direction_are_added_up(rule, atol, tasks):
    (left, right), rank = (torch.linalg.qr(tau).Q for tau in matrices(2, 8, 8)), 8 // tasks
    blocks = [slice(t * rank, (t + 1) * rank) for t in range(tasks)]
    taus = [left[:, block] @ torch.rand(rank).double().diag() @ right[:, block].T for block in blocks]
    close(merged(rule, taus), sum(taus), atol=atol)


def test_the_directions_of_tsv_merge_are_orthonormal_and_the_values_the_tasks_own():
    taus = matrices(3, 8, 12)
    values = torch.cat([torch.linalg.svdvals(tau)[:2] for tau in taus]).sort(descending=True).values
    close(torch.linalg.svdvals(merged(methods.tsv_merge, taus))[:6], values)


@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_iso_keeps_directions_and_makes_all_singular_values_their_mean(tasks):
    taus = matrices(tasks, 10, 12)
    u, s, v = torch.linalg.svd(sum(taus), full_matrices=False)
    close(merged(methods.iso, taus), u @ v * s.mean())
    n = round(5 / tasks)  # of each task's own directions, where half of ten are to be common
    values, c = torch.linalg.svdvals(merged(methods.iso, taus, common=0.5)), 10 - tasks * n
    own = [torch.linalg.svdvals(tau - u[:, :c] @ u[:, :c].T @ tau)[:n] for tau in taus]
    close(values, torch.cat([s[:c], *own]).mean().expand(10))


def test_wudi_descends_to_least_squares_in_blocks_and_leaves_all_else():
    """Σ_t (τ - τ_t) G_t = 0 with G_t = τ_tᵀ τ_t / |τ_t|²: RegMean on the rows of the task vectors."""
    taus = torch.stack(matrices(3, 6, 3))
    grams = taus.mT @ taus / taus.square().sum((1, 2), keepdim=True)
    expected = methods.least_squares(taus, grams, alpha=1.0)
    vectors = [{"layers.0.w": tau, "proj": torch.eye(2) * t, "bias": torch.ones(3) * t} for t, tau in enumerate(taus)]
    for as_hub in (False, True):
        found = methods.wudi(vectors, steps=1500, lr=1e-2, as_hub=as_hub)
        close(found["layers.0.w"], expected, atol=1e-3)
        same(found["bias"], torch.ones(3) * as_hub)  # the mean of 0, 1 and 2
        assert bool(found["proj"].any()) == as_hub


@pytest.mark.parametrize("as_hub, steps", [(False, 300), (True, 400)])
def test_wudi_has_300_steps_of_its_learning_rate_and_the_hubs_row_400(as_hub, steps):
    found = merged(methods.wudi, [torch.eye(2)] * 2, lr=1e-4, as_hub=as_hub)  # from 2 to 1
    close(found.diagonal(), torch.full((2,), 2 - steps * 1e-4), atol=2e-3)


# ---- By what inputs of the tasks say ---------------------------------------------------------------------------------


def linears() -> Suite:
    """Two linear layers that see 4 numbers of each image."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False) for _ in range(3)]
    return suite_of(dict(zip("ab", models[1:])), models[0], normalise=lambda rows: rows.flatten(1)[:, :4] / 255)


@pytest.mark.parametrize("classes, tolerance", [(3, 1e-5), (20, 0.05)])
def test_fisher_information_is_the_loop_over_inputs_and_classes(classes, tolerance):
    """Beyond 16 classes it is an estimate: here a mean over 1000 inputs, 16 draws each."""
    torch.manual_seed(classes)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    head, x = torch.randn(3, classes), torch.randn(2, 4)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for log_p in torch.log_softmax(model(x) @ head, -1).flatten():
        for f, gradient in zip(expected.values(), torch.autograd.grad(log_p, model.parameters(), retain_graph=True)):
            f += log_p.detach().exp() * gradient**2 / 2
    found = methods.fisher_information(model, x if classes < 16 else x.repeat(500, 1), lambda y: y @ head)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance / 10)


def test_in_fisher_merging_a_task_of_large_information_has_no_more_say(monkeypatch):
    sizes = iter([1.0, 1e4])
    fisher = "fisher_information"
    monkeypatch.setattr(methods, fisher, lambda m, *_: dict.fromkeys(m.state_dict(), torch.tensor(next(sizes))))
    suite = linears()
    close(made("Fisher Merging", suite)[0]["a"].state_dict(), made("Weight Averaging", suite)[0]["a"].state_dict())


def test_regmean_minimises_its_objective_and_regmean_plus_plus_on_what_the_merged_blocks_give():
    """Where the gradient of a convex function is zero, it is least."""
    suite = linears()
    x = {task: suite.inputs(images(task)[0]) for task in "ab"}

    def gradient(merged: nn.Module, name: str, inputs: dict[str, Tensor]) -> Tensor:
        grams = {task: rows.T @ rows / len(rows) for task, rows in inputs.items()}
        grams = {task: 0.95 * gram + 0.05 * gram.diag().diag() for task, gram in grams.items()}
        weight = merged.get_parameter(f"{name}.weight")
        return sum((weight - suite.experts[task].get_parameter(f"{name}.weight")) @ grams[task] for task in "ab")

    merged = made("RegMean", suite)[0]["a"]
    close(gradient(merged, "0", x), torch.zeros(4, 4))
    close(gradient(merged, "1", {task: suite.experts[task][0](x[task]) for task in "ab"}), torch.zeros(4, 4))
    close(merged[1].bias, (suite.experts["a"][1].bias + suite.experts["b"][1].bias) / 2)
    merged = methods.regmean(suite, blocks=r"^\d$")
    close(gradient(merged, "0", x), torch.zeros(4, 4))
    close(gradient(merged, "1", {task: merged[0](x[task]) for task in "ab"}), torch.zeros(4, 4))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(8, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.out(input_ids).mean(1)


def test_gram_matrices_cover_attention_and_do_not_depend_on_padding():
    torch.manual_seed(0)
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), torch.randn(5, 3, 8)
    packed = x @ layer.self_attn.in_proj_weight.T + layer.self_attn.in_proj_bias
    q, k, v = packed.reshape(5, 3, 3, 2, 4).permute(2, 0, 3, 1, 4)
    inner = ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).reshape(15, 8)
    grams = methods.gram_matrices(layer, x)
    close(grams["self_attn.in_proj_weight"], x.flatten(0, 1).T @ x.flatten(0, 1) / 15)
    close(grams["self_attn.out_proj.weight"], inner.T @ inner / 15)
    assert len(grams) == 4
    grams = methods.gram_matrices(Words(), {"input_ids": x, "attention_mask": torch.tensor([[1, 1, 0]] * 5)})
    close(grams["out.weight"], x[:, :2].flatten(0, 1).T @ x[:, :2].flatten(0, 1) / 10)


def test_slerp_goes_along_the_arc_and_self_positioning_descends():
    close(methods.slerp(torch.tensor([0.5, 0.5]), 4 * torch.eye(2)), torch.full((2,), 0.5**0.5))
    lam = methods.slerp(torch.tensor([2 / 9, 4 / 9, 3 / 9]), torch.eye(3))  # two thirds of the angle, then a third
    close(lam, torch.tensor([math.cos(math.pi / 6) * 0.5, math.cos(math.pi / 6) ** 2, 0.5]))
    close(lam.norm(), torch.tensor(1.0))  # as long as what it is made of
    suite = tiny()
    lengths = (replace(suite.adaptation, lambda_steps=steps, lambda_lr=0.05) for steps in (0, 40))
    start, learned = (made("Self Positioning", replace(suite, adaptation=a))[0]["a"] for a in lengths)

    def loss(model: nn.Module) -> float:
        return sum(F.cross_entropy(suite.logits(t)(model(images(t)[0] / 255)), images(t)[1]).item() for t in "ab")

    assert loss(learned) < loss(start)


# ---- λ and masks -----------------------------------------------------------------------------------------------------


def test_ada_merging_starts_as_task_arithmetic_and_lambda_is_clamped_in_use():
    suite = tiny("abc")
    vectors, theta_0 = vectors_of(suite), suite.pretrained.state_dict()
    for layer_wise, kind in itertools.product([True, False], [AdaMerging, ConcreteMask]):
        model = kind(suite.pretrained, vectors, **{} if kind is ConcreteMask else {"layer_wise": layer_wise})
        with torch.no_grad():
            close(model.merged(), task_arithmetic(suite.pretrained, vectors))
    model = AdaMerging(suite.pretrained, list(map(methods.split, vectors)))
    model.lam.data.uniform_(-1, 2)
    model(images("a")[0] / 255).square().sum().backward()
    outside = (model.lam < 0) | (model.lam > 1)
    assert outside.any() and not model.lam.grad[outside].any() and model.lam.grad[~outside].any()
    name, lam = "transformer.resblocks.0.attn.in_proj_weight", model.lam.clamp(0, 1)
    thirds = zip(theta_0[name].chunk(3), zip(*(tau[name].chunk(3) for tau in vectors)), "qkv")
    rows = [p + sum(w * tau for w, tau in zip(lam[model.names.index(f"{name}.{x}")], taus)) for p, taus, x in thirds]
    close(model.merged()[name], torch.cat(rows))


def test_a_tensor_of_two_names_has_one_lambda_and_one_elsewhere_is_refused():
    models = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)]
    for model in models:
        model[1].weight = model[0].weight
    merging = AdaMerging(models[0], [task_vector(*models)])
    merging.lam.data.uniform_()
    assert merging.lam.shape == (3, 1)
    same(merging.merged()["0.weight"], merging.merged()["1.weight"])
    with pytest.raises(ValueError, match="'2.weight' is no tensor's path"):
        AdaMerging(models[0], [{"2.weight": torch.ones(4, 4)}])


def test_a_concrete_mask_has_a_mean_of_one_and_is_drawn_anew_in_training():
    suite = tiny()
    model, vectors = ConcreteMask(suite.pretrained, vectors_of(suite)), vectors_of(suite)
    with torch.no_grad():
        for x in model.x:
            x.normal_()
        masks = {name: torch.sigmoid(2 * x) / torch.sigmoid(2 * x).mean() for name, x in zip(model.names, model.x)}
        masked = [{name: masks[name] * entry for name, entry in tau.items()} for tau in vectors]
        close(model.merged(), task_arithmetic(suite.pretrained, masked))
    one, other = model.mask(3), model.mask(3)
    assert not torch.equal(one, other) and one.min() >= 0 and one.mean().item() == pytest.approx(1, abs=1e-4)


def test_negative_information_is_least_for_certain_and_diverse_answers():
    certain = 1000 * torch.eye(4)
    close(methods.negative_information(certain), torch.tensor(-math.log(4)))
    close(methods.negative_information(certain[:1].expand(4, 4)), torch.tensor(0.0))
    close(methods.negative_information(torch.zeros(4, 4)), torch.tensor(0.0))


# ---- Other forms of τ ------------------------------------------------------------------------------------------------


FORMS = partial(SparseLinear, keep=0.3), partial(LowRankLinear, rank=2), partial(LowRankLinear, rank=99)


@pytest.mark.parametrize("layer", FORMS)
@pytest.mark.parametrize("depth", [0, 2])
def test_every_form_is_the_dense_module_of_its_own_task_vectors(layer, depth):
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4, bias=False)) for _ in range(4)]
    x, results = torch.randn(5, 3, 4), []
    for kind in (layer, None):
        module = WEMoE(models[0], models[1:], Router(4, 3, depth), layer=kind)
        for p in module.router.parameters():
            p.data.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
        if kind is None:
            for dense, own in zip(module.pretrained[::2], results[0][0].pretrained[::2]):
                dense.taus[dense.names.index("weight")].copy_(own.tau("weight"))
        y = module(x)
        y.square().sum().backward()
        results.append([module, y, *(p.grad for p in module.router.parameters())])
    close(results[0][1:], results[1][1:], atol=1e-4)
    whole = torch.stack([(model[0].weight - models[0][0].weight).detach() for model in models[1:]])
    kept = results[0][0].pretrained[0].tau("weight")
    if "keep" in layer.keywords:  # the largest entries of each
        same(kept, whole * (whole.abs() >= whole.abs().flatten(1).topk(7).values[:, -1, None, None]))
    else:  # Eckart and Young: what is left over has the other singular values
        left = torch.linalg.svdvals(whole)[:, layer.keywords["rank"] :]
        close(torch.linalg.svdvals(whole - kept)[:, : left.shape[1]], left, atol=1e-4)


def test_low_rank_factors_are_never_multiplied_in_a_forward_pass(monkeypatch):
    models = [nn.Linear(4, 4, bias=False) for _ in range(3)]
    module = WEMoE(models[0], models[1:], Router(4, 2), layer=partial(LowRankLinear, rank=2))
    monkeypatch.delattr(LowRankLinear, "tau")  # what multiplies them
    assert module(torch.randn(5, 3, 4)).shape == (5, 3, 4)


def test_an_ensemble_averages_logits():
    models, x, head = [nn.Linear(4, 6) for _ in range(3)], torch.randn(5, 4), torch.randn(6, 5)
    logits = [F.normalize(model(x), dim=-1) @ head for model in models]
    close(methods.Ensemble(models)(x) @ head, sum(logits))
