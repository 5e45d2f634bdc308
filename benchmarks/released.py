"""The code that DINOv2's authors released, run on a CPU for the benchmarks beside it; none of its files is changed.

    git clone https://github.com/facebookresearch/dinov2 PATH && git -C PATH checkout b8931f7
    git clone https://github.com/facebookresearch/dinov3 PATH && git -C PATH checkout 6876159    for official_dense.py
"""

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Checkpointer:
    """For those of fvcore; does nothing."""

    def __init__(self, *_, **__): ...

    def resume_or_load(self, *_, **__) -> dict[str, Any]:
        return {}

    def step(self, iteration: int) -> None: ...


CHECKPOINTS = {"fvcore.common.checkpoint": {"Checkpointer": Checkpointer, "PeriodicCheckpointer": Checkpointer}}


def borrow(checkout: Path, stand_ins: dict[str, dict[str, Any]], package: str = "dinov2") -> str:
    """Let `import dinov2` find a checkout, in a group of one process, and give it the CPU where it asks for a GPU.

    Args:
        stand_ins: {module: its members} for what is not here, besides fvcore's checkpoints, which do nothing.
        package: what is imported, of the repository of this name.
    Returns:
        The commit of the checkout.
    Raises:
        SystemExit: the folder is none.
    """
    if not (checkout / package / "eval").is_dir():
        raise SystemExit(f"{checkout} is no checkout of facebookresearch/{package}: it has no {package}/eval")
    for name, members in (CHECKPOINTS | stand_ins).items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            module = sys.modules.setdefault(".".join(parts[:i]), ModuleType(parts[i - 1]))
        vars(module).update(members)
    sys.path.append(str(checkout))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    nn.Module.cuda = Tensor.cuda = lambda self, *_, **__: self
    torch.cuda.synchronize, torch.cuda.current_device = lambda: None, lambda: torch.device("cpu")
    commit = subprocess.run(["git", "-C", checkout, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return commit.stdout.strip()
