"""Texts in an upscaled model: routers that do not see padding, and keep a prompt's λ while an answer is generated.

    model = route_texts(wemoe.upscale(pretrained, experts))

To be copied beside wemoe.py. Masks and kept λ belong to a pass and its thread, never to the model.
"""

import inspect
from contextvars import ContextVar
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import wemoe

MASKS = "attention_mask", "pixel_attention_mask"


class Pass(saved_tensors_hooks):
    """A run of a module that reads: the mask (B, N) of its tokens, not 0 where there is one, or None; what it is in."""

    def __init__(self, module: nn.Module, mask: Tensor | None, outer: "Pass | None"):
        # What is saved for the backward pass knows the mask: there, activation checkpoints run the routers again.
        super().__init__(lambda saved: (mask, saved), _unpack)
        self.module, self.mask, self.outer = module, mask, outer


_reading: ContextVar[Pass | None] = ContextVar("reading", default=None)  # the innermost pass of this thread
_again: ContextVar[Tensor | None] = ContextVar("again", default=None)  # in a backward pass, that of the forward pass
_kept: ContextVar[dict | None] = ContextVar("kept", default=None)  # a WEMoE's `routing` -> λ, while texts are generated


def route_texts(model: nn.Module) -> nn.Module:
    """Give the routers of an upscaled model, in place, the mask that it is called with; let `generate` keep their λ.

    Routers have to be means over tokens, of which those count that the argument `attention_mask` or
    `pixel_attention_mask` (B, N) leaves. Where features are not (B, N, D) of the same B and N, as in a decoder beside
    an encoder, it is not used. Right, too: activation checkpoints inside the model, copies, replicas and threads. State
    dicts hold the same names as before.
    Raises ValueError if nothing is routed and, in a pass, for masks of another form and several texts in one row.
    """
    routed = {module for module in model.modules() if isinstance(module, wemoe.WEMoE)}
    if not routed:
        raise ValueError(f"A {type(model).__name__} without routed modules: give the upscaled model.")
    for router in {module.router for module in routed}:  # of which some may be shared
        router.register_forward_hook(_without_padding)
    for module in routed:
        module.routing.register_forward_hook(_as_for_the_prompt)
    for part in (part for part in model.modules() if part not in routed and routed.intersection(part.modules())):
        # A vision tower in a model of both has its own mask, or none.
        if inspect.signature(part.forward).parameters.keys() & {"input_ids", "pixel_values"}:
            part.register_forward_pre_hook(_begin, with_kwargs=True)
            part.register_forward_hook(_end, always_call=True)
        if hasattr(type(part), "generate"):
            part.generate = partial(_generate, part)
    return model


def _without_padding(router: nn.Module, args: tuple[Tensor], lam: Tensor) -> Tensor:
    """λ (B, T) of h (B, N, D) from each token as a sample of its own, in the mean over those that the mask leaves."""
    (h,), reading, backward = args, _reading.get(), torch._C._current_graph_task_id() != -1
    mask = reading.mask if reading else _again.get() if backward else None
    if mask is None or mask.shape != h.shape[:-1] or getattr(router, "depth", None) == 0:
        return lam
    kept = (mask != 0).to(h.device)
    of_tokens = router.forward(h.flatten(0, 1)[:, None]).unflatten(0, h.shape[:2])  # (B, N, T)
    return of_tokens.masked_fill(~kept[..., None], 0).sum(1) / kept.sum(1, keepdim=True).clamp_min(1)


def _as_for_the_prompt(routing: nn.Module, _, lam: Tensor) -> Tensor:
    kept = _kept.get()
    return lam if kept is None else kept.setdefault(routing, lam)


def _generate(model: nn.Module, *args, **kwargs):
    before = _kept.set({})
    try:
        return type(model).generate(model, *args, **kwargs)
    finally:
        _kept.reset(before)


def _begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
    given, outer = {**inspect.signature(module.forward).bind_partial(*args).arguments, **kwargs}, _reading.get()
    mask, places = next((given[m] for m in MASKS if given.get(m) is not None), None), given.get("position_ids")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        if outer is None:
            form = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"A mask of tokens is a tensor (B, N), not {form}: give the model the mask of padding.")
        mask = outer.mask  # of which the model has made it
    if isinstance(places, Tensor) and places.dim() == 2:
        kept = (torch.ones_like(places) if mask is None else mask[:, -places.shape[1] :]) != 0
        if ((places.diff() < 0) & kept[:, 1:] & kept[:, :-1]).any():  # but for padding, whose places say nothing
            raise ValueError("Several texts are packed in one row (position_ids begin again): give each its own row.")
    _reading.set(Pass(module, mask, outer))
    _reading.get().__enter__()


def _end(module: nn.Module, *_) -> None:
    reading = _reading.get()
    if reading is not None and reading.module is module:
        reading.__exit__()
        _reading.set(reading.outer)


def _unpack(saved: tuple[Tensor | None, Tensor]) -> Tensor:
    _again.set(saved[0])
    return saved[1]
