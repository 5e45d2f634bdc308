"""The losses over prototypes: full logits, compiled, in parts, and Triton's kernels; time and memory.

    python benchmarks/prototypes.py run [--shapes NAME ...]   every shape and dtype; toy sizes where there is no GPU
    python benchmarks/prototypes.py run --check               first hold the kernels to float64 on this GPU
    python benchmarks/prototypes.py draw                      the table of the stored result

Without a GPU, or with some of the shapes, nothing is stored. A step is targets of the teacher, loss, and both gradients,
as training does it.
Ceilings are measured in the same call: a large bf16 product and a large copy. The result
goes to data/results/prototypes.json with machine, versions, commit.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: kernels run step by step

import torch.nn.functional as F
from attention import extra_memory_mb
from torch import Tensor

from minidino.learning import losses
from minidino.learning import prototypes as fused
from minidino.runs import environment, pick_device, write_atomically

RESULT = Path(__file__).resolve().parents[1] / "data" / "results" / "prototypes.json"
SECONDS = 3.0  # of repeats at most, for one number
REPEATS = 20  # at least; three where there is no GPU
TEACHER_TEMP = 0.07
DTYPES = {"tf32": torch.float32, "bf16": torch.bfloat16}
IMPLS = ("reference", "compiled", "chunked", "triton")


class Shape(NamedTuple):
    """Of one loss on one GPU."""

    n_rows: int  # of the student
    n_prototypes: int
    width: int  # of the bottleneck
    n_teacher: int
    n_teachers: int  # of each student row


SHAPES = {
    "vitl14 DINO": Shape(320, 131_072, 384, 64, 2),
    "vitl14 iBOT": Shape(2458, 131_072, 256, 2458, 1),
    "vitl16-short DINO": Shape(320, 65_536, 256, 64, 2),
    "vitl16-short iBOT": Shape(1882, 65_536, 256, 1882, 1),
    "imagenette-gpu iBOT": Shape(7526, 4096, 256, 7526, 1),
    "scenes-cpu DINO": Shape(256, 256, 32, 128, 2),
}
SHOWN_SHAPES = ("vitl14 DINO", "vitl14 iBOT")
TOYS = {"toy DINO": Shape(10, 512, 24, 2, 2), "toy iBOT": Shape(24, 512, 16, 24, 1)}


class Inputs(NamedTuple):
    student: Tensor
    prototypes: Tensor
    logits: Tensor
    index: Tensor
    weight: Tensor


def draw_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
    """Unit vectors, prototypes as long, and teacher logits that are cosines."""
    g = torch.Generator(device).manual_seed(seed)
    rows, k, width, n, n_teachers = shape

    def unit(count: int) -> Tensor:
        return F.normalize(torch.randn(count, width, generator=g, device=device), dim=-1)

    student, prototypes = unit(rows).to(dtype).requires_grad_(), unit(k).to(dtype).requires_grad_()
    logits = unit(n) @ unit(k).T
    index = (torch.arange(rows, device=device)[:, None] + torch.arange(n_teachers, device=device)) % n
    return Inputs(student, prototypes, logits, index, torch.full((rows, n_teachers), 1 / rows, device=device))


def full_loss(student: Tensor, prototypes: Tensor, targets: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """As in the plain losses: all logits, and a sum over each column of teachers."""
    log_probs = F.log_softmax(F.linear(student, prototypes).float() / 0.1, dim=-1)
    columns = zip(index.unbind(1), weight.unbind(1))
    if len(targets) == len(student):  # iBOT: row by row
        return -(weight[:, 0] * (targets * log_probs).sum(-1)).sum()
    return -sum((w * (targets[rows] * log_probs).sum(-1)).sum() for rows, w in columns)


class Step(NamedTuple):
    """The pieces of one implementation."""

    targets: Callable[[Tensor], Any]
    loss: Callable[..., Tensor]


def steps(device: torch.device) -> dict[str, Step]:
    plain = Step(lambda logits: losses.sinkhorn_knopp(logits, TEACHER_TEMP), full_loss)
    found = {"reference": plain}
    if device.type == "cuda":
        compiled = torch.compile(lambda logits: losses.sinkhorn_knopp(logits, TEACHER_TEMP), dynamic=False)
        found["compiled"] = Step(compiled, torch.compile(full_loss, dynamic=False))
    for impl in ("chunked", "triton"):
        found[impl] = Step(
            lambda logits, impl=impl: fused.sinkhorn_potentials(logits, TEACHER_TEMP, impl=impl),
            lambda x, w, targets, index, weight, impl=impl: fused.prototype_loss(
                x, w, targets, index, weight, impl=impl
            ).sum(),
        )
    return found


# ---------------------------------------------------------------- measuring


def timed(function: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Milliseconds: median and quartiles; a cold cache before each repeat on a GPU."""
    function()
    if device.type != "cuda":
        times = torch.tensor([_seconds(function) * 1e3 for _ in range(3)])
    else:
        flush = torch.empty(2**28, dtype=torch.int8, device=device)
        times = torch.tensor(list(_events(function, flush)))
    low, median, high = times.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return {"median": median, "low": low, "high": high, "n": len(times)}


def _seconds(function: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def _events(function: Callable[[], Any], flush: Tensor) -> Iterator[float]:
    begun = time.perf_counter()
    for done in range(1000):
        spent = time.perf_counter() - begun
        if spent > SECONDS or done >= REPEATS and spent > SECONDS / 10:
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        first.record()
        function()
        last.record()
        last.synchronize()
        yield first.elapsed_time(last)


def ceilings(device: torch.device) -> dict[str, float]:
    """What this machine reaches with a large product and a large copy."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = timed(lambda: a @ b, device)["median"] / 1e3
    source = torch.empty(2**30 if device.type == "cuda" else 2**24, dtype=torch.int8, device=device)
    copied = timed(source.clone, device)["median"] / 1e3
    return {"product_tflops": 2 * size**3 / product / 1e12, "copy_tb_per_s": 2 * source.numel() / copied / 1e12}


def measure(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Every implementation on one shape: targets, forward, forward + backward, and the peak of a whole step."""
    x, w, logits, index, weight = draw_inputs(shape, dtype, device)
    rows: dict[str, Any] = {}
    for impl, step in steps(device).items():
        try:
            targets = step.targets(logits)

            def forward(step: Step = step, targets: Any = targets) -> Tensor:
                return step.loss(x, w, targets, index, weight)

            def both(forward: Callable[[], Tensor] = forward) -> tuple[Tensor, ...]:
                return torch.autograd.grad(forward(), (x, w))

            def whole(step: Step = step) -> tuple[Tensor, ...]:
                return torch.autograd.grad(step.loss(x, w, step.targets(logits), index, weight), (x, w))

            whole()  # compiles and tunes
            rows[impl] = {
                "targets_ms": timed(lambda step=step: step.targets(logits), device),
                "forward_ms": timed(forward, device),
                "both_ms": timed(both, device),
                "peak_mb": extra_memory_mb(whole, device),
            }
            del targets, forward, both, whole
        except torch.OutOfMemoryError as error:
            rows[impl] = {"error": str(error).splitlines()[0]}
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def fractions(shape: Shape, row: dict[str, Any], top: dict[str, float]) -> dict[str, float]:
    """What is reached of the ceilings if nothing were computed or read twice: 3 products, 7 looks at the logits."""
    n, k, b, n_teacher, _ = shape
    flops, bytes_ = 3 * 2 * n * k * b, 7 * 4 * n_teacher * k
    return {
        "product": flops / row["both_ms"]["median"] / 1e9 / top["product_tflops"],
        "copy": bytes_ / row["targets_ms"]["median"] / 1e9 / top["copy_tb_per_s"],
    }


# ---------------------------------------------------------------- checking


def check(device: torch.device) -> list[dict[str, Any]]:
    """Root-mean-square errors of losses and gradients against float64, in each dtype of this device."""
    dtypes = {"fp32": torch.float32, "fp16": torch.float16}
    if device.type == "cuda":
        dtypes |= {"tf32": torch.float32, "bf16": torch.bfloat16}
    rows = []
    for name, dtype in dtypes.items():
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        for shape in (Shape(67, 517, 48, 67, 1), Shape(41, 1031, 384, 8, 2), Shape(131, 300, 256, 131, 1)):
            x, w, logits, index, weight = draw_inputs(shape, dtype, device)
            exact = _answers(x.detach().double(), w.detach().double(), logits, index, weight, None)
            errors = {}
            for impl in ("reference", "chunked", "triton"):
                found = _answers(x, w, logits, index, weight, impl)
                errors[impl] = [(f.double() - e).square().mean().sqrt().item() for f, e in zip(found, exact)]
            good = all(mine <= 2 * limit for mine, limit in zip(errors["triton"], errors["reference"]))
            rows.append({"dtype": name, "shape": shape._asdict(), "good": good, **errors})
            print("ok  " if good else "FAIL", name, tuple(shape), errors, flush=True)
    return rows


def _answers(x: Tensor, w: Tensor, logits: Tensor, index: Tensor, weight: Tensor, impl: str | None) -> list[Tensor]:
    """Loss of each row and gradients; impl None: float64."""
    x, w = x.requires_grad_(), w.requires_grad_()
    if impl is None:
        q = ((logits.double() - logits.max()) / TEACHER_TEMP).exp()
        for _ in range(3):
            q = q / q.sum(0, keepdim=True)
            q = q / q.sum(1, keepdim=True)
        mixed = (weight.double()[..., None] * q[index]).sum(1)
        loss = -(mixed * F.log_softmax(F.linear(x, w) / 0.1, dim=-1)).sum(-1)
    else:
        targets = fused.sinkhorn_potentials(logits, TEACHER_TEMP, impl=impl)
        loss = fused.prototype_loss(x, w, targets, index, weight, impl=impl)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), (x, w))]


# ---------------------------------------------------------------- the whole


def run(names: list[str], checked: bool) -> None:
    device = pick_device()
    shapes = SHAPES if device.type == "cuda" else TOYS
    if device.type != "cuda":
        print("no CUDA GPU: toy sizes, kernels step by step in Triton's interpreter; these times say nothing of a GPU")
    unknown = set(names) - set(shapes)
    if unknown:
        raise SystemExit(f"no shapes {sorted(unknown)}; there are {', '.join(map(repr, shapes))}")
    checks = check(device) if checked else None
    torch.set_float32_matmul_precision("high")
    top, rows = ceilings(device), []
    print({name: round(value, 3) for name, value in top.items()}, flush=True)
    for name in names or shapes:
        for dtype in DTYPES if device.type == "cuda" else ("tf32",):
            torch._dynamo.reset()
            found = measure(shapes[name], DTYPES[dtype], device)
            for impl, row in found.items():
                row |= {"reached": fractions(shapes[name], row, top)} if "error" not in row else {}
                rows.append({"name": name, "dtype": dtype, "impl": impl, "shape": shapes[name]._asdict(), **row})
                print(_line(rows[-1]), flush=True)
    if device.type != "cuda" or names:
        return print("not stored")
    tilings = [[*map(str, key), tuple(tiling)] for key, tiling in _fastest().items()]
    stored = {"environment": environment(0, device), "ceilings": top, "check": checks, "rows": rows}
    stored["tilings"] = tilings
    write_atomically(RESULT, (json.dumps(stored, indent=1) + "\n").encode())


def _fastest() -> dict[tuple, Any]:
    from minidino.kernels.tuning import FASTEST

    return FASTEST


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| {row['name']} | {row['dtype']} | {row['impl']} | {row['error']} | | | | | |"
    times = [f"{row[key]['median']:.3f} ({row[key]['low']:.3f} to {row[key]['high']:.3f})"
             for key in ("targets_ms", "forward_ms", "both_ms")]  # fmt: skip
    peak = "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
    reached = " | ".join(f"{row['reached'][key]:.2f}" for key in ("product", "copy"))
    return f"| {row['name']} | {row['dtype']} | {row['impl']} | {' | '.join(times)} | {peak} | {reached} |"


def tables() -> dict[str, str]:
    """The table of docs/measured.md: the two published losses, in the dtypes that were measured."""
    stored = json.loads(RESULT.read_text())
    lines = ["| loss | dtype | computed by | targets, ms | loss and gradients, ms | peak, MiB |", "|---" * 6 + "|"]
    for row in stored["rows"]:
        if row["name"] in SHOWN_SHAPES and "error" not in row:
            cells = f"{row['targets_ms']['median']:.1f}", f"{row['both_ms']['median']:.1f}", f"{row['peak_mb']:,.0f}"
            lines.append(f"| {row['name']} | {row['dtype']} | {row['impl']} | {' | '.join(cells)} |")
    least = min(row["both_ms"]["n"] for row in stored["rows"] if "both_ms" in row)
    e, top = stored["environment"], stored["ceilings"]
    lines += ["", f"Medians of at least {least} repeats on {e['machine']}, which in the same run multiplied "
              f"{top['product_tflops']:,.0f} TFLOP/s and copied {top['copy_tb_per_s']:.2f} TB/s; torch "
              f"{e['versions']['torch']}, {e['date'][:10]}, commit {e['commit']}."]  # fmt: skip
    return {"prototypes": "\n".join(lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "draw"))
    parser.add_argument("--shapes", nargs="*", default=[], help=", ".join(map(repr, SHAPES)))
    parser.add_argument("--check", action="store_true", help="hold every implementation to float64 first")
    options = parser.parse_args()
    if options.what == "run":
        run(options.shapes, options.check)
    else:
        from recipe import put  # measuring needs none of it

        put(tables())


if __name__ == "__main__":
    main()
