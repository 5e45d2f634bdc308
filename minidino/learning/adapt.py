"""The high-resolution phase: a short run on larger crops, from the weights that pretraining left.

    a finished run -> positions stretched to the new grid -> `train` with every schedule compressed

"Increasing image resolution is key to pixel-level downstream tasks", but the whole training at a high resolution is
"demanding": a short phase at its end is enough. Its code and its learning rate were not released.

Source: DINOv2 paper, sections 4 and 6.6, appendix B.2 (518 px for 10k iterations).
"""

import math
from dataclasses import replace
from typing import Any

import torch

from minidino.config import RunConfig
from minidino.learning.objective import Center
from minidino.learning.train import State, start
from minidino.model.vit import interpolate_pos_embed

POSITIONS = "backbone.pos_embed"


def adapted(config: RunConfig, size: int, steps: int) -> RunConfig:
    """The config of the phase: crops of `size` px for `steps` updates, half the base learning rate, all else as it was.

    Local crops and stored images grow with the global crops, to whole patches. iBOT is there from the first step: its
    late entry is for networks that start from nothing.
    """
    crops, patch = config.crops, config.vit.patch_size

    def grown(side: int) -> int:
        return patch * math.ceil(side * size / crops.global_size / patch)

    return replace(
        config,
        data=replace(config.data, short_side=grown(config.data.short_side)),
        crops=replace(crops, global_size=size, local_size=grown(crops.local_size)),
        loss=replace(config.loss, ibot_start_frac=0.0, ibot_full_frac=0.0),
        optim=replace(config.optim, base_lr=config.optim.base_lr / 2),
        run=replace(config.run, steps=steps),
    )


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
