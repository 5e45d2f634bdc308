"""Do the kernels stay within their memory? Small runs of each under compute-sanitizer's memcheck, on a GPU.

    python benchmarks/memcheck.py run        needs NVIDIA's compute-sanitizer; data/results/memcheck.json

Every tensor is an allocation of its own, so that one number beyond its end is seen. Without a GPU a test asks the same of the
same runs in Triton's interpreter, which has no compiler between source and addresses.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from minidino.kernels.attention import packed_attention
from minidino.learning.prototypes import prototype_loss, sinkhorn_potentials
from minidino.runs import environment, write_atomically

RESULT = Path(__file__).resolve().parents[1] / "data" / "results" / "memcheck.json"
PACKS = ([1], [37, 50, 64, 1], [65, 257, 50, 37, 37], [3, 130, 197])
SIZES = ((1, 77, 32), (67, 517, 48), (67, 1031, 256), (130, 515, 384))  # rows, prototypes, bottleneck
MODES = ((torch.bfloat16, "high"), (torch.float32, "highest"), (torch.float32, "high"))  # the last in tf32


def attend(seqlens: list[int], dtype: torch.dtype, device: str, width: int = 64) -> None:
    """Forward and backward of a pack, q, k and v the thirds of one projection."""
    qkv = torch.randn(sum(seqlens), 3, 2, width, device=device, dtype=dtype, requires_grad=True)
    packed_attention(*qkv.unbind(1), seqlens).square().sum().backward()


def lose(rows: int, n_prototypes: int, width: int, dtype: torch.dtype, device: str, n_teachers: int = 1) -> None:
    """Sinkhorn, loss and both gradients."""
    x = torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True)
    w = torch.randn(n_prototypes, width, device=device, dtype=dtype, requires_grad=True)
    teacher = sinkhorn_potentials(torch.randn(rows, n_prototypes, device=device), 0.07, impl="triton")
    index = torch.arange(rows, device=device)[:, None].expand(rows, n_teachers)
    weight = torch.ones(rows, n_teachers, device=device)
    prototype_loss(x, w, teacher, index, weight, impl="triton").sum().backward()


def small_runs() -> None:
    for dtype, precision in MODES:
        torch.set_float32_matmul_precision(precision)
        for seqlens in PACKS:
            attend(seqlens, dtype, "cuda")
        for size in SIZES:
            lose(*size, dtype, "cuda")
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "small"), help="small: the runs alone, without the sanitizer")
    if parser.parse_args().what == "small":
        small_runs()
        return
    if not torch.cuda.is_available() or shutil.which("compute-sanitizer") is None:
        sys.exit("memcheck needs a CUDA GPU, and compute-sanitizer of NVIDIA's CUDA toolkit on the PATH")
    command = ["compute-sanitizer", "--tool", "memcheck", sys.executable, __file__, "small"]
    alone = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=alone)
    said = done.stdout + done.stderr
    errors = re.search(r"ERROR SUMMARY: (\d+) error", said)
    if done.returncode or not errors:
        sys.exit(f"the runs did not end well (code {done.returncode}):\n{said[-3000:]}")
    modes = [[str(dtype), precision] for dtype, precision in MODES]
    found = {"environment": environment(0, torch.device("cuda")), "errors": int(errors[1])}
    found |= {"packs": PACKS, "sizes": SIZES, "modes": modes}
    write_atomically(RESULT, json.dumps(found, indent=1).encode())
    print(errors[0], *re.findall(r"(?:Invalid|at) .*", said)[:8], sep="\n")


if __name__ == "__main__":
    main()
