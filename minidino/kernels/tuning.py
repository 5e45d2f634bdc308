"""How a kernel is cut and launched: tilings, parts, and the choice of the fastest on this device."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

MAX_SPLITS = 64  # parts of K, or of the rows, that are summed up afterwards


class Tiling(NamedTuple):
    """How the work of one shape class is cut; what tuning chooses among."""

    rows: int  # of a tile
    columns: int  # looked at in one turn
    warps: int
    stages: int = 1  # of loads under way at once


def dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Each as its kernel reads it: rows end to end."""
    return tuple(x.contiguous() for x in tensors)


def shares(n: int, block: int, tiles: int, device: torch.device) -> tuple[int, int]:
    """Into how many parts n is cut so that all processors have work, and numbers of a part, whole blocks."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    blocks = triton.cdiv(n, block)
    wanted = min(triton.cdiv(4 * processors, max(tiles, 1)), MAX_SPLITS, max(blocks, 1))
    share = triton.cdiv(blocks, wanted) * block
    return triton.cdiv(n, share) if n else 0, share


def launch_options(tiling: Tiling) -> dict[str, int]:
    """A tiling in the words of a kernel."""
    return {"ROWS": tiling.rows, "COLUMNS": tiling.columns, "num_warps": tiling.warps, "num_stages": tiling.stages}


def precision() -> str:
    """How float32 is multiplied, as `torch.set_float32_matmul_precision` allows."""
    return "tf32" if torch.get_float32_matmul_precision() != "highest" else "ieee"


def shape_class(x: Tensor) -> tuple:
    """Shapes whose sizes are alike to a power of two are tuned once."""
    return *(n.bit_length() for n in x.shape), x.dtype, x.device


FASTEST: dict[tuple, Tiling] = {}  # what was measured in this process


def fastest(key: tuple, tilings: Sequence[Tiling], launch: Callable[[Tiling], object], x: Tensor) -> Tiling:
    """The tiling that took least time on this device; the first where nothing can be measured."""
    if key not in FASTEST:
        if not x.is_cuda or torch.cuda.is_current_stream_capturing():
            return tilings[0]
        FASTEST[key] = min(tilings, key=lambda tiling: _milliseconds(launch, tiling))
    return FASTEST[key]


def _milliseconds(launch: Callable[[Tiling], object], tiling: Tiling) -> float:
    try:
        return triton.testing.do_bench(lambda: launch(tiling), warmup=5, rep=20)
    except triton.runtime.errors.OutOfResources:  # too wide for this chip
        return float("inf")
