"""Packed attention against what one would use instead: forward, forward + backward, memory, error.

    python benchmarks/attention.py run [--shapes S/16,B/14] [--rivals sdpa,triton] [--out NAME]
    python benchmarks/attention.py draw                the table of docs/measured.md and docs/attention.png from the stored result

Everybody starts from what a ViT has, the (T, 3, h, d) of its qkv projection, and ends with the packed (T, h, d); the
backward pass ends with the gradient of that same tensor. Each rival is held to the float64 reference before it is
timed, and what refuses to run is stored with its words.

Two times of each: `fwd_bwd`, as launched, in which a slow host counts where the device waits for it; and
`fwd_bwd_device`, with the host kept ahead, as it is in a network whose other layers keep the device busy. The L2 cache
is cleared before every repeat (as triton.testing.do_bench does), and medians come with their quartiles.

The result goes to data/results/attention.json with machine, versions and commit; that of a part of the shapes or rivals
only where --out names another place. Without a GPU the same runs at toy sizes, with Triton in its interpreter, and is
not stored either: those times mean nothing.
"""

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from attention_rivals import OURS, RIVALS, SHAPES, Pack, Rival, Shape
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from minidino.runs import environment, pick_device, write_atomically

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "data" / "results", ROOT / "docs"
TIMES = ("fwd", "fwd_bwd", "fwd_device", "fwd_bwd_device")
SHOWN = "fwd_bwd_device"  # in docs/measured.md
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 5e-3}  # relative; float32 multiplies in tf32
DRAWN = ("S/16", "B/14", "L/14", "g/14", "518 px")
CLAIMED = ("S/16", "B/14", "L/14")
WANTED = 1.0, 1.2  # times as fast as the best of all, and as the best that neither pads nor regroups


# -- measuring ---------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Until the call came back, and until the device was done."""
    synchronize(device)
    begun = time.perf_counter()
    work()
    returned = time.perf_counter() - begun
    synchronize(device)
    return returned, time.perf_counter() - begun


def timed(work: Callable[[], Any], device: torch.device, host_ahead: bool = False) -> dict[str, float]:
    """Quartiles in ms over 30 to 100 repeats, three on a CPU.

    Args:
        host_ahead: let the device sleep before each repeat until the host has surely launched all of it.
    """
    if device.type == "cpu":
        return quartiles(1e3 * seconds(work, device)[1] for _ in range(3))
    for _ in range(3):
        work()
    host_s, whole_s = seconds(work, device)
    repeats = min(max(int(0.1 / whole_s), 30), 100)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    cache = torch.empty(256 << 20, dtype=torch.uint8, device=device)  # several times an L2
    for first, last in events:
        cache.zero_()
        if host_ahead:
            torch.cuda._sleep(int(1.5 * host_s * 2e9))  # cycles at about 2 GHz
        first.record()
        work()
        last.record()
    synchronize(device)
    return quartiles(first.elapsed_time(last) for first, last in events)


def quartiles(times: Iterable[float]) -> dict[str, float]:
    times = torch.tensor(list(times), dtype=torch.float64)
    low, median, high = times.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return {"median": median, "low": low, "high": high, "repeats": len(times)}


def extra_memory_mb(work: Callable[[], Any], device: torch.device) -> float | None:
    """The most that is held at once beyond what was there before; None on a CPU."""
    if device.type == "cpu":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def relative_error(found: Tensor, truth: Tensor) -> float:
    if found.shape != truth.shape:
        raise ValueError(f"expected shape {tuple(truth.shape)}, got {tuple(found.shape)}")
    return float((found.detach().double() - truth).norm() / truth.norm())


def ceilings(device: torch.device) -> dict[str, Any]:
    """What this device multiplies, TFLOP/s by dtype, and copies, TB/s read + written, in this very run."""
    n, dtypes, length = (8192, TOLERANCE, 1 << 30) if device.type == "cuda" else (256, [torch.float32], 1 << 20)
    found: dict[str, Any] = {"matmul_side": n, "tflops": {}}
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        found["tflops"][str(dtype)] = 2 * n**3 / timed(partial(torch.mm, a, b), device)["median"] * 1e-9
    source = torch.zeros(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["tb_per_s"] = 2 * length / timed(lambda: target.copy_(source), device)["median"] * 1e-9
    return found


def floor(shape: Shape, found: dict[str, Any]) -> dict[str, float]:
    """The least time, ms: each pass takes at least its multiplications and at least its traffic.

        FLOPs    4 h d sum n^2 forward, 10 h d sum n^2 backward
        bytes    q, k, v, out once forward; q, k, v, out, grad read and dq, dk, dv written backward

    Source: FLOPs as counted in Dao 2023 (FlashAttention-2, arXiv 2307.08691), section 4.1.
    """
    pairs = shape.heads * shape.width * sum(n * n for n in shape.seqlens)
    each = shape.heads * shape.width * sum(shape.seqlens) * shape.dtype.itemsize
    flops, moved = {"fwd": 4 * pairs, "bwd": 10 * pairs}, {"fwd": 4 * each, "bwd": 8 * each}
    rate = found["tflops"][str(shape.dtype)]
    least = {way: max(flops[way] / rate, moved[way] / found["tb_per_s"]) * 1e-9 for way in flops}
    return {
        "flops_fwd": flops["fwd"], "flops_bwd": flops["bwd"], "bytes_fwd": moved["fwd"], "bytes_bwd": moved["bwd"],
        "fwd": least["fwd"], "fwd_bwd": least["fwd"] + least["bwd"],
    }  # fmt: skip


def compete(rival: Rival, pack: Pack, truth: tuple[Tensor, Tensor], least: dict[str, float]) -> dict[str, Any]:
    """Check one rival on this pack, then time it.

    Raises:
        ArithmeticError: its answer is wrong.
    """
    begun = time.perf_counter()
    attend = rival.prepare(pack)
    synchronize(pack.device)
    found: dict[str, Any] = {"prepare_s": time.perf_counter() - begun}

    def forward() -> Tensor:
        return attend(*pack.qkv.unbind(1))

    def both() -> tuple[Tensor, Tensor]:
        out = forward()
        return out, torch.autograd.grad(out, pack.qkv, pack.grad)[0]

    found["first_s"] = seconds(both, pack.device)[1]  # compiles, tunes
    out, grad = both()
    parts = [relative_error(a, b) for a, b in zip(grad.unbind(1), truth[1].unbind(1), strict=True)]
    found["error"] = {"out": relative_error(out, truth[0]), **dict(zip(("dq", "dk", "dv"), parts, strict=True))}
    limit = TOLERANCE[pack.shape.dtype]
    if not all(error <= limit for error in found["error"].values()):  # nor is a NaN
        raise ArithmeticError(f"wrong: relative errors {found['error']} are not all under {limit}")
    del out, grad
    found["memory_mb"] = extra_memory_mb(both, pack.device)
    for name in TIMES:
        work = both if "bwd" in name else forward
        found[name] = timed(work, pack.device, host_ahead=name.endswith("device"))
        found[name]["of_floor"] = least[name.removesuffix("_device")] / found[name]["median"]
    return found


def attempt(name: str, pack: Pack, truth: tuple[Tensor, Tensor], least: dict[str, float]) -> dict[str, Any]:
    """A row of the result, whatever happens: a rival that cannot run is stored with its reasons."""
    rival, row = RIVALS[name], {"shape": pack.shape.name, "rival": name, "regroups": RIVALS[name].regroups}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        try:
            with sdpa_kernel(rival.backend) if rival.backend else nullcontext():
                return row | compete(rival, pack, truth, least)
        except Exception as error:  # rivals come from many hands
            words = [f"{type(error).__name__}: {error}", *(str(one.message) for one in said)]
            return row | {"refused": "refused: " + " | ".join(" ".join(word.split())[:300] for word in words[:6])}


def line(row: dict[str, Any]) -> str:
    head = f"{row['shape']:10} {row['rival']:14} "
    if "refused" in row:
        return head + row["refused"][:110]
    fwd, both, ahead = (row[name]["median"] for name in ("fwd", "fwd_bwd", "fwd_bwd_device"))
    return (f"{head}fwd {fwd:8.3f}  fwd+bwd {both:8.3f}  device {ahead:8.3f} ms  {row['memory_mb'] or 0:6.0f} MiB  "
            f"error {max(row['error'].values()):.1e}  first {row['first_s']:.1f} s")  # fmt: skip


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times as fast ours is as the best of all, and as the best that needs neither padding nor regrouping."""
    found = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        for timing in ("fwd_bwd", "fwd_bwd_device"):
            times = {row["rival"]: row[timing]["median"] for row in rows if row["shape"] == shape and timing in row}
            times.pop("reference", None)  # the oracle, which nobody would pick for its speed
            ours, packed = times.pop(OURS, None), {name: ms for name, ms in times.items() if not RIVALS[name].regroups}
            claim = {"shape": shape, "timing": timing, "ours_ms": ours}
            for key, among in (("best", times), ("best_packed", packed)):
                best = min(among, key=among.get, default=None)
                ratio = among[best] / ours if ours and best else None
                claim |= {key: best, f"{key}_ms": among.get(best), f"{key}_over_ours": ratio}
            found.append(claim)
    return found


def verdict(claim: dict[str, Any]) -> str:
    ratios = claim["best_over_ours"], claim["best_packed_over_ours"]
    if None in ratios:
        return f"{claim['shape']:10} {claim['timing']:15} not decided: ours or every rival is missing"
    holds = "holds" if all(ratio >= wanted for ratio, wanted in zip(ratios, WANTED, strict=True)) else "FAILS"
    return (f"{claim['shape']:10} {claim['timing']:15} {ratios[0]:.2f} x {claim['best']} (best of all), "
            f"{ratios[1]:.2f} x {claim['best_packed']} (best packed): {holds}")  # fmt: skip


def versions() -> dict[str, str | None]:
    found = {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    for name in ("triton", "xformers", "flash-attn"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def run(shapes: list[str], rivals: list[str], out: str | None) -> None:
    """Every rival on every shape; with `out` the result is stored after each shape, so that none is lost."""
    device = pick_device()
    torch.set_float32_matmul_precision("high")  # float32 rows multiply in tf32, for everybody
    toy = device.type != "cuda"
    device = torch.device("cpu") if toy else device
    if toy:
        os.environ.setdefault("TRITON_INTERPRET", "1")
        print("no CUDA device: toy sizes, Triton in its interpreter; these times mean nothing", flush=True)
    about, found = environment(0, device), ceilings(device)
    about["versions"] |= versions()
    payload: dict[str, Any] = {"environment": about, "toy": toy, "ceilings": found, "floors": {}, "rows": []}
    print(json.dumps(found), flush=True)
    for name in shapes:
        shape = SHAPES[name].toy() if toy else SHAPES[name]
        pack, least = Pack(shape, device), floor(shape, found)
        truth = pack.truth()
        payload["floors"][name] = {"heads": shape.heads, "width": shape.width, "crops": shape.crops,
                                   "dtype": str(shape.dtype), "tokens": len(pack.qkv), **least}  # fmt: skip
        for rival in rivals:
            if rival == "reference" and not toy and name != "laptop":
                continue  # a loop over crops
            payload["rows"].append(attempt(rival, pack, truth, least))
            print(line(payload["rows"][-1]), flush=True)
        payload["claims"] = claims(payload["rows"])
        if out:
            write_atomically(RESULTS / f"{out}.json", (json.dumps(payload, indent=1) + "\n").encode())
        synchronize(device)  # raises where a rival has broken the device: nothing after that could be believed
    for claim in sorted(payload["claims"], key=lambda claim: claim["shape"] in CLAIMED):  # what is claimed comes last
        print(verdict(claim) + ("" if claim["shape"] in CLAIMED else " (not claimed)"))
    if not out:
        print("not stored: --out NAME would")


# -- the tables --------------------------------------------------------------------------------------------------------


def stored(name: str = "attention") -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def by_shape(found: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """{rival: {shape: row}} of what ran on at least one of the drawn shapes."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for row in found["rows"]:
        if SHOWN in row and row["shape"] in DRAWN:
            rows.setdefault(row["rival"], {})[row["shape"]] = row
    return rows


def tables(name: str = "attention") -> dict[str, str]:
    """The table of docs/measured.md: ms of forward + backward, the fastest of each shape bold."""
    found = stored(name)
    rows, shapes = by_shape(found), [shape for shape in DRAWN if shape in found["floors"]]
    best = {s: min((r[s][SHOWN]["median"] for r in rows.values() if s in r), default=None) for s in shapes}

    def cell(row: dict[str, Any] | None) -> str:
        if row is None:
            return "refused"
        ms = row[SHOWN]["median"]
        return f"**{ms:.2f}**" if ms == best[row["shape"]] else f"{ms:.2f}"

    lines = [f"| forward + backward, ms | pads or regroups | {' | '.join(shapes)} |", "|---" * (len(shapes) + 2) + "|"]
    for rival, row in rows.items():
        cells = " | ".join(cell(row.get(shape)) for shape in shapes)
        lines.append(f"| {rival} | {'yes' if RIVALS[rival].regroups else 'no'} | {cells} |")
    floors = " | ".join(f"{found['floors'][shape]['fwd_bwd']:.2f}" for shape in shapes)
    e, c = found["environment"], found["ceilings"]
    tflops = max(c["tflops"].values())
    lines += [f"| the least possible | | {floors} |", "", f"Medians on {e['machine']}, which in the same run "
              f"multiplied {tflops:,.0f} TFLOP/s and copied {c['tb_per_s']:.2f} TB/s; torch {e['versions']['torch']}, "
              f"triton {e['versions']['triton']}, {e['date'][:10]}, commit {e['commit']}."]  # fmt: skip
    return {"attention": "\n".join(lines)}


def title(found: dict[str, Any]) -> str:
    ratios = [1 / c["best_over_ours"] for c in found["claims"]
              if c["shape"] in DRAWN and c["timing"] == SHOWN and c["best_over_ours"]]  # fmt: skip
    if not ratios:
        return "Attention over packed crops costs more or less, by what computes it"
    return f"The kernels take {min(ratios):.2f} to {max(ratios):.2f} times as long as the best alternative"


def draw(name: str = "attention") -> None:
    """One panel a shape, one bar a rival with its quartiles, and a line at the least possible time."""
    from matplotlib.figure import Figure  # measuring needs none of these
    from matplotlib.patches import Patch

    from minidino.pictures import COLORS, DPI, WIDTH

    found = stored(name)
    rows, shapes = by_shape(found), [shape for shape in DRAWN if shape in found["floors"]]
    names = list(rows)[::-1]
    gray = COLORS["pixels"]
    looks = {True: {"facecolor": "white", "edgecolor": gray, "hatch": "////"}, False: {"color": gray}}
    figure = Figure(figsize=(WIDTH, 1.4 + 0.27 * len(names)), dpi=DPI, layout="constrained")
    for ax, shape in zip(figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0], shapes, strict=True):
        for y, rival in enumerate(names):
            if shape not in rows[rival]:
                ax.text(0, y, " refused", va="center", fontsize=7, color=gray)
                continue
            at = rows[rival][shape][SHOWN]
            look = {"color": COLORS["trained"]} if rival == OURS else looks[RIVALS[rival].regroups]
            spread = [[at["median"] - at["low"]], [at["high"] - at["median"]]]
            ax.barh(y, at["median"], xerr=spread, error_kw={"linewidth": 0.8}, **look)
            ax.text(at["high"], y, f" {at['median']:.2f}", va="center", fontsize=7)
        ax.axvline(found["floors"][shape]["fwd_bwd"], color=COLORS["limit"], linestyle=":", linewidth=1)
        ax.set(title=shape, xlabel="ms", xlim=(0, 1.3 * ax.get_xlim()[1]), yticks=range(len(names)), yticklabels=names)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{title(found)} (forward + backward, {found['environment']['machine']})", fontsize=11)
    handles = [Patch(color=COLORS["trained"], label="ours"), Patch(**looks[False], label="packed as it is"),
               Patch(**looks[True], label="pads or regroups"),
               Patch(facecolor="none", edgecolor=COLORS["limit"], linestyle=":", label="least possible")]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    DOCS.mkdir(exist_ok=True)
    figure.savefig(DOCS / f"{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "draw"))
    parser.add_argument("--shapes", default=",".join(SHAPES), help="of the batches, with commas between")
    parser.add_argument("--rivals", default=",".join(RIVALS), help="with commas between")
    parser.add_argument("--out", help="name of the result in data/results")
    options = parser.parse_args()
    if options.what == "run":
        chosen = [options.shapes.split(","), options.rivals.split(",")]
        for names, there in zip(chosen, (SHAPES, RIVALS), strict=True):
            if unknown := set(names) - set(there):
                parser.error(f"expected some of {', '.join(there)}; got {', '.join(unknown)}")
        whole = torch.cuda.is_available() and chosen == [list(SHAPES), list(RIVALS)]
        run(*chosen, options.out or ("attention" if whole else None))
        return
    from recipe import put

    put(tables())
    draw()


if __name__ == "__main__":
    main()
