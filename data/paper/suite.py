"""The paper's suite: CLIP and the eight data sets; experts from the hub, from their authors' files, or fine-tuned."""

import argparse
import copy
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from data.files import InputError, fingerprint
from data.paper import hub, images
from data.paper.authors import load_authors_experts
from data.paper.published import adaptation_curves, eight_tasks
from data.processes import progress, say
from data.suite import Adaptation, Suite, Training, make_experts

TRAINING = Training(images=None, steps=4000, lr=1e-5, weight_decay=0, warmup=1)
ADAPTATION = Adaptation(steps=1000, lr=1e-4, lambda_lr=1e-3, lambda_steps=500, mask_lr=1e-3, mask_steps=2000)


def paper_suite(arguments: argparse.Namespace) -> Suite:
    arch = hub.architecture(arguments.arch or arguments.suite, arguments.pretrained)
    mirror, cache, limit, device = arguments.hub, arguments.cache, arguments.limit, torch.device(arguments.device)
    from_hub = arguments.experts is None and not arguments.finetune
    size = hub.plan(
        arch,
        cache,
        mirror,
        tasks=arguments.tasks,
        weights=arguments.experts is None,
        experts=from_hub,
        splits=("test", "train") if arguments.finetune else ("test", *arguments.splits),
        limit=limit,
    )
    say(f"{arch.name}: {hub.summary(size)}")
    hub.check_space(size, cache)
    experts, prep = {}, hub.preprocessing(arch)
    if arguments.experts is not None:
        tower, experts, heads = load_authors_experts(arch, arguments.experts, arguments.tasks)
    else:
        model = hub.load_pretrained(arch, mirror).to(device)
        heads = hub.zero_shot_heads(model, arch, cache, arguments.tasks)
        tower = model.visual.cpu()
        if from_hub:
            with progress(arguments.tasks, "Experts") as tasks:
                experts = {task: hub.load_expert(arch, task, tower, mirror) for task in tasks}
    if not any(name.endswith(".mlp") for name, _ in tower.named_modules()):
        raise InputError(f"the vision tower of {arch.name} has no MLPs to route: choose a transformer with --arch")
    test = {task: images.image_set(task, prep, cache, mirror, limit=limit) for task in arguments.tasks}
    notices = [images.notice(task, len(labels)) for task, (_, labels) in test.items()] if limit is None else []
    for notice in filter(None, notices):
        say(notice)
    suite = Suite(
        name=arguments.name,
        of_the_paper=True,
        seed=arguments.seed,
        device=device,
        precision=arguments.precision or ("bfloat16" if device.type == "cuda" else "float32"),
        adaptation=ADAPTATION.changed(arguments.steps, arguments.adapt_precision, arguments.settings),
        pretrained=tower.requires_grad_(False),
        heads={task: head.to(device) for task, head in heads.items()},
        test=test,
        load=lambda task, split, count: images.image_set(
            task, prep, cache, mirror, split, count or (None if split == "train" else limit), spaced=count is not None
        ),
        training=TRAINING,
        normalise=partial(images.normalise, prep=prep),
    )
    suite.claimable, suite.shortened = not any(notices), suite.adaptation.steps != ADAPTATION.steps
    if arguments.whole and arguments.pretrained == "openai" and not limit and not arguments.finetune:
        suite.source = "hub" if from_hub else "paper"
        suite.published = {row["method"]: row for row in eight_tasks(arch.name, suite.source)}
        curves = adaptation_curves(arch.name)
        suite.curve = next((c for c in curves if c["learning_rate"] == suite.adaptation.lr), None)
    if arguments.finetune:
        some = (part.numpy() for task in suite.tasks for part in suite.load(task, "train", 32))
        make_experts(suite, arguments.cached, arguments.workers, depends_on=fingerprint(*some))
    refuse_twins(tower.state_dict(), experts)
    for task, state in experts.items():
        suite.experts[task] = copy.deepcopy(tower)
        suite.experts[task].load_state_dict(state, assign=True)
    return suite


def refuse_twins(pretrained: dict[str, Tensor], experts: dict[str, dict[str, Tensor]]) -> None:
    """Raise InputError if an expert is the pre-trained model, or another expert: a file in the wrong place."""
    models = {"pretrained": pretrained, **experts}
    for (one, state), (other, again) in combinations(models.items(), 2):
        if all(torch.equal(entry, again[name]) for name, entry in state.items()):
            what = "the pre-trained model itself" if one == "pretrained" else f"that of {one} once more"
            raise InputError(f"the expert of {other} is {what}: a file was put in the wrong place")
