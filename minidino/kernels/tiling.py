"""How a kernel's work is cut into tiles, and which way is fastest on this device."""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
import triton


class Tiling(NamedTuple):
    """How the work of one shape class is cut; what tuning chooses among."""

    rows: int  # of a tile
    columns: int  # looked at in one turn; 0: as many as rows, and only once
    warps: int
    stages: int = 1  # of loads under way at once


FASTEST: dict[Hashable, Tiling] = {}  # what was measured in this process


def fastest(
    shape_class: Hashable, tilings: Sequence[Tiling], device: torch.device, launch: Callable[[Tiling], object]
) -> Tiling:
    """The tiling that took least time, measured once for each shape class; the first where nothing can be measured.

    Args:
        shape_class: the kernel, its shapes and dtypes, as far as they matter for the choice.
    """
    key = shape_class, device
    if key not in FASTEST:
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return tilings[0]
        FASTEST[key] = min(tilings, key=lambda tiling: _milliseconds(launch, tiling))
    return FASTEST[key]


def _milliseconds(launch: Callable[[Tiling], object], tiling: Tiling) -> float:
    try:
        return triton.testing.do_bench(lambda: launch(tiling), warmup=5, rep=20)
    except triton.runtime.errors.OutOfResources:  # too wide for this chip
        return float("inf")


def precision() -> str:
    """How float32 is multiplied: as such, or as tf32 where `torch.set_float32_matmul_precision` allows it."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
