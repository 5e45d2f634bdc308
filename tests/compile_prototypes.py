"""Compile every tiling of the prototype kernels for a chip that need not be there, and print what each needs."""

import contextlib
import inspect
import io
import json
import re
import sys
from collections.abc import Iterator

import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minidino.kernels import prototypes as kernels
from minidino.kernels import sinkhorn
from minidino.kernels.tuning import Tiling

TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
WIDTHS = {256: 2, 384: 2, 512: 1}  # of a bottleneck: how many of its tilings; the last two share theirs
KERNELS = {
    "forward": kernels.forward_kernel, "student": kernels.student_kernel, "prototypes": kernels.prototypes_kernel,
}  # fmt: skip


def kind_of(name: str, dtype: str) -> str:
    """What Triton calls the type of an argument of this name."""
    if name in ("x", "w", "out"):
        return f"*{dtype}"
    if name in ("R", "K", "share"):
        return "i32"
    if name in ("cold", "sharpness", "floor"):
        return "fp32"
    return "constexpr" if name.isupper() or name in ("D0", "D1") else "*i64" if name == "index" else "*fp32"


def cases() -> Iterator[tuple[str, object, str, dict[str, int | str], Tiling]]:
    """Name, kernel, type, constants and tiling of everything that tuning may choose."""
    for dtype in (torch.bfloat16, torch.float32):
        for width, n in WIDTHS.items():
            whole, rest = kernels.pieces_of(width)
            constants = {"J": 2, "WIDTH": width, "D0": whole, "D1": rest, "PRECISION": "tf32"}
            for kind, kernel in KERNELS.items():
                for tiling in getattr(kernels.tilings_of(width, dtype), kind)[:n]:
                    yield f"{kind} {TYPES[dtype]} {width}", kernel, TYPES[dtype], constants, tiling
    for kernel, tilings in (
        (sinkhorn.row_sums_kernel, sinkhorn.ROW_SUMS),
        (sinkhorn.column_sums_kernel, sinkhorn.COLUMN_SUMS),
    ):
        for tiling in tilings:
            yield kernel.fn.__name__, kernel, "fp32", {}, tiling


def compile_all(chip: int, only: str = "") -> None:
    """One line for each: name, matrix instructions, bytes spilt, KiB of shared memory, registers."""
    for name, kernel, dtype, constants, tiling in cases():
        name = f"{name} {tuple(tiling)}"
        if only not in name:
            continue
        kinds = {argument: kind_of(argument, dtype) for argument in inspect.signature(kernel.fn).parameters}
        odd = ("R", "cold", "sharpness", "floor")
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, (argument, kind) in enumerate(kinds.items())
            if kind != "constexpr" and argument not in odd
        }
        sizes = constants | {"ROWS": tiling.rows, "COLUMNS": tiling.columns}
        with contextlib.redirect_stdout(io.StringIO()) as log:
            made = compile(ASTSource(kernel, kinds, sizes, aligned), GPUTarget("cuda", chip, 32),
                           {"num_warps": tiling.warps, "num_stages": tiling.stages})  # fmt: skip
        spilt = sum(map(int, re.findall(r"(\d+) bytes spill", log.getvalue())))
        used = max(map(int, re.findall(r"Used (\d+) registers", log.getvalue())), default=0)
        products = len(re.findall(r"\b(?:mma|wgmma|tcgen05)\.", made.asm["ptx"]))
        print(json.dumps([name, products, spilt, made.metadata.shared / 1024, used]), flush=True)


if __name__ == "__main__":
    compile_all(int(sys.argv[1]), *sys.argv[2:])
