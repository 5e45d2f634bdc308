"""Going on from weights: on larger crops, or with fresh heads.

The high-resolution phase is a short run on larger crops, from the weights that pretraining left.

    a finished run -> positions stretched to the new grid -> `train` with every schedule compressed

"Increasing image resolution is key to pixel-level downstream tasks", but the whole training at a high resolution is
"demanding": a short phase at its end is enough. Its code and its learning rate were not released.

A released backbone comes without heads, and the first gradients of fresh heads mean nothing. So they can learn alone for a
while, before the backbone goes on with them. (Small networks were none the better for it: benchmarks/distill.py heads.)

Source: DINOv2 paper, sections 4 and 6.6, appendix B.2 (518 px for 10k iterations).
"""

import math
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from minidino.config import RunConfig, difference
from minidino.learning.objective import Center
from minidino.learning.train import State, start
from minidino.model.vit import VisionTransformer, interpolate_pos_embed
from minidino.model.weights import load_weights

NETWORK = {"data.channels", *(f"vit.{name}" for name in (
    "name", "width", "depth", "heads", "patch_size", "num_register_tokens", "ffn"))}  # fmt: skip
POSITIONS, KERNEL = "backbone.pos_embed", "patch_embed.proj.weight"


def adapted(config: RunConfig, size: int, steps: int, fit_memory: bool = False) -> RunConfig:
    """The config of the phase: crops of `size` px for `steps` updates, half the base learning rate, all else as it was.

    Local crops and stored images grow with the global crops, to whole patches. iBOT is there from the first step: its
    late entry is for networks that start from nothing. With fit_memory a step has as many images as `fitting_batch`
    allows, and the learning rate follows the batch as ever.
    """
    crops, patch = config.crops, config.vit.patch_size

    def grown(side: int) -> int:
        return patch * math.ceil(side * size / crops.global_size / patch)

    larger = replace(
        config,
        data=replace(config.data, short_side=grown(config.data.short_side)),
        crops=replace(crops, global_size=size, local_size=grown(crops.local_size)),
        loss=replace(config.loss, ibot_start_frac=0.0, ibot_full_frac=0.0),
        optim=replace(config.optim, base_lr=config.optim.base_lr / 2, final_lr=0.0, freeze_backbone_frac=0.0),
        run=replace(config.run, steps=steps),
    )
    batch_size = fitting_batch(config, larger) if fit_memory else config.optim.batch_size
    optim = replace(larger.optim, batch_size=batch_size)
    return replace(larger, optim=replace(optim, final_lr=min(config.optim.final_lr, optim.lr)))


def expect_same_network(before: RunConfig, after: RunConfig) -> None:
    """Raise ValueError where the second config is of another network than the first: weights would not fit."""
    other = [key for key in difference(before, after) if key in NETWORK or key.startswith("heads.")]
    if other:
        raise ValueError(f"a run goes on with the network as it is, and cannot change {', '.join(other)}")


def fitting_batch(before: RunConfig, after: RunConfig) -> int:
    """How many images of `after` take the memory of a step of `before`: as many tokens, and whole parts of a batch.

    What is kept for the backward pass grows with the student's tokens alone, since attention keeps no squares.
    """
    share = tokens_per_image(before) / tokens_per_image(after)
    parts = before.optim.accumulate
    return max(int(before.optim.batch_size * share) // parts, 2) * parts


def tokens_per_image(config: RunConfig) -> int:
    """Tokens of the student's two global and all local crops: 914 with the published crops and patches of 14 px."""
    c, v = config.crops, config.vit
    return sum(n * ((side // v.patch_size) ** 2 + 1 + v.num_register_tokens)
               for n, side in ((2, c.global_size), (c.n_local, c.local_size)))  # fmt: skip


def start_adapted(config: RunConfig, device: torch.device, saved: dict[str, Any]) -> State:
    """Student, teacher and heads of a saved state, ready for the larger grid; optimizer and clock are fresh.

    Args:
        config: of the phase, from `adapted`.
        device: where it will run.
        saved: what `State.save` gave at the end of pretraining.
    """
    state, v = start(config, device), config.vit
    side = config.crops.global_size // v.patch_size
    for name in ("student", "teacher"):
        weights = dict(saved[name])
        weights[POSITIONS] = interpolate_pos_embed(
            weights[POSITIONS], (side, side), v.interpolate_offset, v.interpolate_antialias
        )
        getattr(state, name).load_state_dict(weights)
    state.center = None if saved["center"] is None else Center(*saved["center"])
    return state


def going_on(config: RunConfig, vit: VisionTransformer, heads_first: float) -> RunConfig:
    """The config of going on with a backbone: its sizes, and a share of the steps in which the heads learn alone."""
    first = vit.blocks[0]
    sizes = {"width": vit.width, "depth": vit.depth, "heads": vit.heads, "patch_size": vit.patch_size,
             "num_register_tokens": vit.num_register_tokens, "ffn": "swiglu" if hasattr(first.mlp, "w12") else "mlp",
             "interpolate_offset": vit.interpolate_offset, "interpolate_antialias": vit.interpolate_antialias,
             "layerscale": config.vit.layerscale or 1.0 if hasattr(first.ls1, "gamma") else 0.0}  # fmt: skip
    return replace(
        config,
        vit=replace(config.vit, **sizes),
        optim=replace(config.optim, freeze_backbone_frac=heads_first),
    )


def start_from(config: RunConfig, device: torch.device, vit: VisionTransformer) -> State:
    """A student and its average that begin as a given backbone, with fresh heads; it may have seen other channels."""
    state, weights = start(config, device), vit.state_dict()
    weights[KERNEL] = fit_channels(weights[KERNEL], config.data.channels)
    for network in (state.student, state.teacher):
        load_weights(network.backbone, weights)
    return state


def fit_channels(kernel: Float[Tensor, "D C P P"], channels: int) -> Float[Tensor, "D channels P P"]:
    """The kernel of patches for pictures of another number of channels, which answers about as strongly.

    One channel takes the sum of all; more take them in turn, weaker as they are more.

    Source: the way of timm's adapt_input_conv.
    """
    before = kernel.shape[1]
    if channels == 1:
        return kernel.sum(1, keepdim=True)
    return kernel[:, torch.arange(channels) % before] * (before / channels)
