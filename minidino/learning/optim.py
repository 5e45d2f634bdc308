"""What the optimizer is told: schedules as pure functions of the step, parameter groups, gradient clipping."""

import math
from collections.abc import Callable, Iterable
from typing import TypedDict

from torch import Tensor, nn

Schedule = Callable[[int], float]

TOKENS = ("cls_token", "mask_token", "register_tokens", "pos_embed")


def linear_schedule(start: float, end: float, warmup_steps: int) -> Schedule:
    """Rise (or fall) in a straight line, then stay: the teacher temperature.

        value(i) = start + (end - start) * i / (warmup_steps - 1)   for i < warmup_steps, then end

    Args:
        start: value at step 0.
        end: value at step warmup_steps - 1 and ever after.
        warmup_steps: length of the line, steps; 0 means `end` from the start, 1 gives `start` once, as numpy.linspace.
    Returns:
        A function of the step.
    Source: official dinov2/utils/utils.py CosineScheduler as dinov2/train/train.py uses it (b8931f7).
    """

    def value(step: int) -> float:
        if step >= warmup_steps:
            return end
        return start + (end - start) * step / max(warmup_steps - 1, 1)

    return value


def cosine_schedule(base: float, final: float, steps: int, warmup_steps: int = 0, start: float = 0.0) -> Schedule:
    """Warm up in a straight line, then follow half a cosine: learning rate, weight decay, teacher momentum.

        value(i) = final + (base - final) * (1 + cos(pi * (i - warmup_steps) / (steps - warmup_steps))) / 2

    Args:
        base: value at the end of the warm-up.
        final: value the cosine tends to, and the value at step `steps` and past it.
        steps: length of the whole schedule, warm-up included.
        warmup_steps: the line from `start` at step 0 to `base` at step warmup_steps - 1.
        start: value at step 0 when there is a warm-up. With 0 the first step changes nothing, as released.
    Returns:
        A function of the step.
    Raises:
        ValueError: the warm-up is longer than the whole.
    Source: DINOv2 paper, table 16; official dinov2/utils/utils.py CosineScheduler (b8931f7).
    """
    if not 0 <= warmup_steps <= steps:
        raise ValueError(f"expected 0 <= warmup_steps <= steps, got warmup_steps={warmup_steps}, steps={steps}")
    warmup = linear_schedule(start, base, warmup_steps)

    def value(step: int) -> float:
        if step >= steps:
            return final
        if step < warmup_steps:
            return warmup(step)
        done = (step - warmup_steps) / (steps - warmup_steps)
        return final + (base - final) * (1 + math.cos(math.pi * done)) / 2

    return value


def last_layer_lr(lr: Schedule, freeze_steps: int) -> Schedule:
    """Hold the prototypes still at the start: the learning rate with its first freeze_steps values made 0.

    Source: official dinov2/train/train.py build_schedulers (b8931f7).
    """
    return lambda step: 0.0 if step < freeze_steps else lr(step)


class ParameterGroup(TypedDict):
    """One optimizer group; `names` runs parallel to `params`. The loop scales lr and weight decay by the mults."""

    params: list[nn.Parameter]
    names: list[str]
    lr_mult: float
    wd_mult: float
    is_last_layer: bool


def parameter_groups(
    model: nn.Module, layerwise_decay: float = 1.0, patch_embed_lr_mult: float = 1.0, *, decay_tokens: bool = True
) -> list[ParameterGroup]:
    """Sort the trainable parameters of a ViT, or of a student with heads, into optimizer groups.

        lr_mult = layerwise_decay ** (depth + 1 - layer)
        layer   = 0 for embeddings and tokens, i + 1 for block i, depth + 1 for the final norm and the heads

    `patch_embed` is multiplied by patch_embed_lr_mult besides. wd_mult is 0 for biases, norms and LayerScale, else 1.

    Args:
        model: parameters with the official names; the prefix "backbone." is understood and optional.
        layerwise_decay: 0.9 in vitl16_short, 1.0 in vitl14 and vitg14.
        patch_embed_lr_mult: 0.2 in the published recipes.
        decay_tokens: weight decay on pos_embed and on class, mask and register tokens, as released; False is the way
            of timm and DINO.
    Returns:
        Groups in order of first appearance; each trainable parameter in exactly one, shared ones once.
    Source: official dinov2/utils/param_groups.py (b8931f7).
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    depth = _depth(name for name, _ in model.named_parameters())
    groups: dict[tuple[float, float, bool], ParameterGroup] = {}
    for name, parameter in named:
        lr_mult = layerwise_decay ** (depth + 1 - _layer(name, depth))
        lr_mult *= patch_embed_lr_mult if "patch_embed" in name else 1.0
        wd_mult = 1.0 if _is_decayed(name, decay_tokens) else 0.0
        key = (lr_mult, wd_mult, "last_layer" in name)
        empty = ParameterGroup(params=[], names=[], lr_mult=lr_mult, wd_mult=wd_mult, is_last_layer=key[2])
        group = groups.setdefault(key, empty)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def clip_gradients(modules: dict[str, nn.Module], max_norm: float, mode: str = "module") -> dict[str, Tensor]:
    """Shorten, in place, gradients that are too long.

    Args:
        modules: the parts of the student, as backbone, dino_head, ibot_head; a head that is tied may come twice.
        max_norm: the longest L2 norm allowed; 3.0 in the published recipes, math.inf only measures.
        mode: "module" clips each part by its own norm, as released; "global" clips all by their common norm.
    Returns:
        The norm before clipping, a scalar tensor, under each part's name; for "global" one, under "global".
    Raises:
        ValueError: another mode.
    Source: official dinov2/train/train.py do_train (b8931f7).
    """
    if mode not in ("module", "global"):
        raise ValueError(f"expected mode 'module' or 'global', got {mode!r}")
    parts = {name: list(module.parameters()) for name, module in modules.items()}
    if mode == "global":  # a dictionary keeps each shared parameter once, in order
        parts = {"global": list(dict.fromkeys(p for part in parts.values() for p in part))}
    return {name: nn.utils.clip_grad_norm_(part, max_norm) for name, part in parts.items()}


def _depth(names: Iterable[str]) -> int:
    """Number of blocks, read from the parameter names."""
    parts = (name.removeprefix("backbone.").split(".") for name in names)
    return max((int(part[1]) + 1 for part in parts if part[0] == "blocks"), default=0)


def _layer(name: str, depth: int) -> int:
    """Layer a parameter belongs to, from 0 (embeddings) to depth + 1 (final norm, heads)."""
    part = name.removeprefix("backbone.").split(".")
    if part[0] == "patch_embed" or part[0] in TOKENS:
        return 0
    return int(part[1]) + 1 if part[0] == "blocks" else depth + 1


def _is_decayed(name: str, decay_tokens: bool) -> bool:
    """Whether weight decay acts on a parameter, judged by its name alone."""
    if name.endswith(".bias") or "norm" in name or "gamma" in name:
        return False
    return decay_tokens or name.removeprefix("backbone.") not in TOKENS
