"""The code that others released, run on a CPU for the benchmarks beside it; none of its files is changed.

    git clone https://github.com/facebookresearch/dinov2 PATH && git -C PATH checkout b8931f7
    git clone https://github.com/facebookresearch/dinov3 PATH && git -C PATH checkout 6876159    for official_dense.py

Which other repositories, and at which commits, stands in official_curation.py and official_protocols.py.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from recipe import put
from torch import Tensor, nn


class Checkpointer:
    """For those of fvcore; does nothing."""

    def __init__(self, *_, **__): ...

    def resume_or_load(self, *_, **__) -> dict[str, Any]:
        return {}

    def step(self, iteration: int) -> None: ...


CHECKPOINTS = {"fvcore.common.checkpoint": {"Checkpointer": Checkpointer, "PeriodicCheckpointer": Checkpointer}}


def checked(checkout: Path, name: str, part: str, commit: str | None = None) -> str:
    """The commit of a checkout.

    Args:
        name: of the repository on GitHub.
        part: a folder in it.
        commit: at which it has to be; None: any.
    Raises:
        SystemExit: the folder is no such checkout, or at another commit.
    """
    if not (checkout / part).is_dir():
        raise SystemExit(f"{checkout} is no checkout of {name}: it has no {part}")
    found = subprocess.run(["git", "-C", checkout, "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True)
    at = found.stdout.strip()
    if commit and at != commit:
        raise SystemExit(f"{checkout}: expected {name} at {commit}, found {at or 'no commit'}; git -C {checkout} checkout {commit}")
    return at


def stand_in(stand_ins: dict[str, dict[str, Any]]) -> None:
    """Put modules in the place of what is not here: {module: its members}."""
    for name, members in stand_ins.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            module = sys.modules.setdefault(".".join(parts[:i]), ModuleType(parts[i - 1]))
        vars(module).update(members)


def on_cpu() -> None:
    """Make a group of one process, and give the CPU to whoever asks for a GPU."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    nn.Module.cuda = Tensor.cuda = lambda self, *_, **__: self
    torch.cuda.synchronize, torch.cuda.current_device = lambda: None, lambda: torch.device("cpu")


def borrow(checkout: Path, stand_ins: dict[str, dict[str, Any]], package: str = "dinov2") -> str:
    """Let `import dinov2` find a checkout, and run it without a GPU.

    Args:
        stand_ins: as for `stand_in`, besides fvcore's checkpoints, which do nothing.
        package: what is imported, of the repository of this name.
    Returns:
        The commit of the checkout.
    Raises:
        SystemExit: the folder is none.
    """
    commit = checked(checkout, f"facebookresearch/{package}", f"{package}/eval")
    stand_in(CHECKPOINTS | stand_ins)
    sys.path.append(str(checkout))
    on_cpu()
    return commit


def command_line(about: str, run: Callable[[Path], None], tables: Callable[[], dict[str, str]], what: str) -> None:
    """`run FOLDER` or `draw`.

    Args:
        about: the docstring of the benchmark.
        what: is to be in the folder.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "draw"))
    parser.add_argument("folder", type=Path, nargs="?", help=f"{what}, for run")
    options = parser.parse_args()
    if options.what == "draw":
        put(tables())
    elif options.folder is None:
        parser.error(f"run: expected a folder: {what}")
    else:
        run(options.folder.resolve())
