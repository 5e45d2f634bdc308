"""Are the formulas of `minidino plan` right? FLOPs, memory and time of real steps beside them.

    python benchmarks/plan.py run        data/results/plan-cpu.json, or plan-cuda.json where there is a GPU
    python benchmarks/plan.py draw       the tables of the stored results

FLOPs are counted by torch.utils.flop_counter (attention by SDPA). Memory is the most that torch's allocator had handed
out: on a CPU as its profiler records it, on a GPU torch.cuda.max_memory_allocated. Crops are noise and their making is
not in it. On a CPU the time is that of the processor, so that other work on the machine counts little.
"""

import argparse
import json
import time
from typing import Any

import torch
from recipe import RESULTS, put, store
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from minidino.config import RunConfig, override, preset
from minidino.images.batches import Batch, collate
from minidino.images.masks import batch_masks
from minidino.learning.train import State, start, train
from minidino.memory import step_memory
from minidino.plan import plan_table, sizes_of
from minidino.runs import pick_device
from minidino.scaling import DEVICES, Device, matrix_tflops, step_flops

N_TIMED = 3  # steps; the fastest counts
ROWS = {  # preset and what is changed, so that it fits
    "cpu": [
        ("scenes-cpu", []),
        ("imagenette-cpu", []),
        ("imagenette-gpu", ["optim.batch_size=2"]),
        ("vits16-in1k", ["optim.batch_size=2", "heads.n_prototypes=8192"]),
        ("vits16-in1k", ["optim.batch_size=2", "heads.n_prototypes=32768", "loss.prototypes=chunked", "vit.depth=4"]),
        ("vitl16-short", ["optim.batch_size=2", "vit.depth=2", "heads.n_prototypes=8192"]),
        ("vitl14-lvd", ["optim.batch_size=2", "vit.depth=2", "heads.n_prototypes=8192"]),
    ],
    "cuda": [
        ("imagenette-gpu", []),
        ("imagenet100-gpu", ["optim.accumulate=2"]),
        ("vits16-in1k", ["optim.batch_size=128"]),
        ("vits16-in1k", ["optim.batch_size=256", "loss.prototypes=triton"]),
        ("vitl16-short", ["optim.batch_size=64", "run.precision=bf16"]),
        ("vitl14-lvd", ["optim.batch_size=32", "run.precision=bf16"]),
    ],
}


def _attention_flops(query, key, *_, **__):
    """Scores and mixing, of shapes."""
    batch, heads, n, d = query
    return 2 * 2 * batch * heads * n * key[2] * d


def _attention_backward_flops(grad, query, key, *_, **__):
    """The scores again, and four products of gradients."""
    return _attention_flops(query, key) * 5 // 2


FUSED = {  # torch has no entries for the fused kernel of the CPU
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def noise(config: RunConfig, device: torch.device) -> Batch:
    """A batch of the right sizes, with holes as they are."""
    g, c, n = torch.Generator().manual_seed(0), config.crops, config.optim.batch_size
    side = c.global_size // config.vit.patch_size
    masks = batch_masks(2 * n, (side, side), g, config.masks.probability, config.masks.ratio).view(2, n, -1)
    views = ((2, c.global_size), (c.n_local, c.local_size))
    crops = [torch.randn(k, n, 3, size, size, generator=g).to(device) for k, size in views]
    return collate(*crops, masks.to(device), torch.arange(n, device=device))


def learn(config: RunConfig, state: State, batch: Batch) -> None:
    """One step with iBOT, of which nothing is read."""
    state.step = config.run.steps - 2
    next(train(config, None, state, [batch]))
    state.optimizer.zero_grad(set_to_none=True)


def measure(name: str, changes: list[str], device: torch.device) -> dict[str, Any]:
    precision = ["run.precision=fp32"] if device.type == "cpu" else []
    config = override(preset(name), [*precision, *changes])
    state, batch = start(config, device), noise(config, device)
    learn(config, state, batch)
    s, n, masked = sizes_of(config, device.type), config.optim.batch_size, len(batch.mask_weights)
    parts = config.optim.accumulate
    row = {"preset": name, "changes": changes, "masked": masked, "bytes": _bytes(config, state, batch)}
    seconds = [_seconds(config, state, batch) for _ in range(N_TIMED)]
    countable = override(config, ["vit.attention=sdpa"] + ["loss.prototypes=chunked"] * (s.prototypes == "triton"))
    for block in state.student.backbone.blocks, state.teacher.backbone.blocks:
        for layer in block:
            layer.attn.impl = "sdpa"
    formula = step_flops(sizes_of(countable, device.type), n // parts, masked / parts, parts)
    made = step_flops(s, n // parts, masked / parts, parts)
    row |= {"formula_bytes": step_memory(s, n, masked, parts)["peak"], "seconds": seconds}
    row |= {"flops": _flops(countable, state, batch), "formula_flops": parts * formula["total"]}
    return row | {"tflops": parts * made["total"] / min(seconds) / 1e12}


def _bytes(config: RunConfig, state: State, batch: Batch) -> int:
    if batch.crops_global.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        learn(config, state, batch)
        return torch.cuda.max_memory_allocated()
    own = [*state.student.parameters(), *state.teacher.parameters(), *batch]
    own += [value for kept in state.optimizer.state.values() for value in kept.values()]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        learn(config, state, batch)
    events = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = sum(x.nbytes for x in own)
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _seconds(config: RunConfig, state: State, batch: Batch) -> float:
    cuda = batch.crops_global.is_cuda
    clock = time.perf_counter if cuda else time.process_time
    begun = clock()
    learn(config, state, batch)
    if cuda:
        torch.cuda.synchronize()
    return clock() - begun


def _flops(config: RunConfig, state: State, batch: Batch) -> int:
    with FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
        learn(config, state, batch)
    return counter.get_total_flops()


def run() -> None:
    device = pick_device()
    if device.type == "cpu":
        torch.set_num_threads(1)  # the time of several would add up
    rate = matrix_tflops() if device.type == "cpu" else DEVICES["h100-sxm"].tflops
    rows = []
    for name, changes in ROWS[device.type]:
        rows.append(measure(name, changes, device))
        print(json.dumps(rows[-1]), flush=True)
    store(f"plan-{device.type}", {"rate_tflops": rate, "rows": rows})


# ---------------------------------------------------------------- the tables


def tables() -> dict[str, str]:
    """All presets by formula, and real steps beside theirs."""
    stored = json.loads((RESULTS / "plan-cpu.json").read_text())
    e = stored["environment"]
    words = "a step of | TFLOP, formula | counted | MiB, formula | at most | TFLOP/s reached | of the rate"
    rows = [f"| {words} |", "|---" * 7 + "|"]
    for row in stored["rows"]:
        cells = (
            " ".join([f"`{row['preset']}`", *(f"`{change}`" for change in row["changes"])]),
            f"{row['formula_flops'] / 1e12:.5f}", f"{row['flops'] / 1e12:.5f}",
            f"{row['formula_bytes'] / 2**20:,.0f}", f"{row['bytes'] / 2**20:,.0f}",
            f"{row['tflops']:.4f}", f"{row['tflops'] / stored['rate_tflops']:.2f}",
        )  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    rows += ["", f"Float32 on {e['machine']}, one thread, in processor time, the fastest of {N_TIMED} steps; rate of a "
             f"matrix product {stored['rate_tflops']:.3f} TFLOP/s; torch {e['versions']['torch']}, {e['date'][:10]}, "
             f"commit {e['commit']}."]  # fmt: skip
    return {"plan": plan_table(Device(stored["rate_tflops"], 24), "fp32"), "plan-measured": "\n".join(rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "draw"))
    if parser.parse_args().what == "run":
        run()
    else:
        put(tables())


if __name__ == "__main__":
    main()
