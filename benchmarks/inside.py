"""Where class tokens look, and how long tokens are, in networks without and with registers.

    python benchmarks/inside.py scenes                      three networks of each kind, against masks of what is drawn
    python benchmarks/inside.py photographs                 lengths alone, of the network of an hour on Imagenette
    python benchmarks/inside.py draw                        the table

The networks are those of benchmarks/probes.py. Results: data/results/inside-*.json.
"""

import argparse
import json
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from probes import NETWORK, SEEDS, STEPS, network
from recipe import RESULTS, made_on, put, spread, store
from torch import Tensor

from minidino.images.scenes import KINDS, MASK_CLASSES, draw_scenes
from minidino.judge import random_backbone, trained_backbone
from minidino.model.vit import VisionTransformer
from minidino.probes.patches import attention_to, on_things, outliers, token_norms
from minidino.runs import Run, pick_device
from minidino.stages import open_world

SIZE, N, WORLD = 96, 500, 1011  # px, scenes to choose a head by and as many to judge, none seen in training
REGISTERS = (0, 4)
STRIDE = 4  # of the held-out photographs one in so many
COLUMNS = ("mass", "jaccard", "jaccard_published", "longest", "outliers")
FIRST_THING = MASK_CLASSES.index(KINDS[0])


def scenes() -> None:
    """Every subject on the same scenes, asked about the last block."""
    images, things = drawn()
    looks = dict(without_network(images, things))
    found = {name: [agreement(maps, things)] for name, maps in looks.items()}
    for seed in SEEDS:
        for registers in REGISTERS:
            run = Run(network(seed, registers))
            nets = {"trained": trained_backbone(run, pick_device()), "untrained": random_backbone(run.config(), pick_device())}
            for name, net in nets.items():
                told = agreement(attention_to(net, images), things) | lengths(net, images)
                told["mass_of_blocks"] = [on_things(attention_to(net, images, block), things).mass.mean().item()
                                          for block in range(net.depth)]  # fmt: skip
                found.setdefault(f"{name}, {registers} registers", []).append(told)
                print(name, registers, seed, told, flush=True)
    about = {"steps": STEPS, "size_px": SIZE, "n_chosen_on": N, "n": N, "share_of_pixels": things[N:].double().mean().item()}
    store("inside-scenes", {**about, "subjects": found})


def photographs() -> None:
    """Lengths of tokens on held-out pictures, of the trained network and of the same before its first step."""
    run = Run(NETWORK)
    config = run.config()
    held_out = open_world(config, run.folder / "pixels").test
    images = held_out.select(np.arange(0, len(held_out), STRIDE)).squares(config.crops.global_size)
    nets = {"trained": trained_backbone(run, pick_device()), "untrained": random_backbone(config, pick_device())}
    found = {name: lengths(net, images) for name, net in nets.items()}
    store("inside-photographs", {"size_px": images.shape[-1], "n": len(images), "subjects": found})


def drawn() -> tuple[UInt8[Tensor, "n C S S"], Bool[Tensor, "n S S"]]:
    """Scenes, and where each one's things are: all of them of one kind."""
    found = draw_scenes(2 * N, SIZE, WORLD)
    return torch.from_numpy(found.images).permute(0, 3, 1, 2), torch.from_numpy(found.masks >= FIRST_THING)


def without_network(
    images: UInt8[Tensor, "n C S S"], things: Bool[Tensor, "n S S"]
) -> Iterator[tuple[str, Float[Tensor, "n 1 Hp Wp"]]]:
    """Two looks that nobody learned: at what has another colour than the picture, and where things of other scenes are."""
    patch = Run(network(SEEDS[0])).config().vit.patch_size
    colours = F.avg_pool2d(images.double(), patch)
    yield "unlike the mean colour", (colours - colours.mean((2, 3), keepdim=True)).norm(dim=1, keepdim=True)
    there = F.avg_pool2d(things[:N, None].double(), patch).mean(0)
    yield "where others have things", there.expand(len(images), -1, -1, -1)


def agreement(maps: Float[Tensor, "n h Hp Wp"], things: Bool[Tensor, "n S S"]) -> dict[str, float]:
    """Of the second half of the scenes; the first chooses one head for all."""
    found = on_things(maps, things)
    head = found.jaccard[:N].mean(0).argmax()
    return {"mass": found.mass[N:].mean().item(), "mass_of_head": found.mass[N:, head].mean().item(),
            "jaccard": found.jaccard[N:, head].mean().item(), "jaccard_published": found.jaccard[N:].max(1).mean().item()}


def lengths(net: VisionTransformer, images: UInt8[Tensor, "n C S S"]) -> dict[str, float]:
    """How long the tokens are before the last norm, beside the median of the patches."""
    norms = token_norms(net, images)
    found, median = outliers(norms["patch"]), float(np.median(norms["patch"]))
    told = {"median": median, "longest": norms["patch"].max() / median, "threshold": found.threshold / median,
            "outliers": found.share, "cls": np.median(norms["cls"]) / median}  # fmt: skip
    if norms["registers"].size:
        told["registers"] = np.median(norms["registers"]) / median
    return {name: float(value) for name, value in told.items()}


# ---------------------------------------------------------------- the table


def tables() -> dict[str, str]:
    found = json.loads((RESULTS / "inside-scenes.json").read_text())
    lines = ["| who looks | share of the look on things | Jaccard: one head for all | the best head of each picture | "
             "longest patch token, in medians | patches by the rule of outliers |", "|---|---|---|---|---|---|"]  # fmt: skip
    for name, runs in found["subjects"].items():
        cells = (said([run[key] for run in runs]) if key in runs[0] else "" for key in COLUMNS)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"Things are {found['share_of_pixels']:.3f} of the pixels. {found['n']} scenes of {found['size_px']} px, "
              f"networks of {found['steps']} steps, last block, mean ± standard deviation over {len(SEEDS)} seeds; the one "
              f"head is chosen on {found['n_chosen_on']} other scenes. {made_on(found)}"]  # fmt: skip
    return {"inside": "\n".join(lines)}


def said(values: list[float]) -> str:
    value = spread(values)
    return f"{value['mean']:.3f} ± {value['sd']:.3f}" if value["sd"] > 5e-4 else f"{value['mean']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("scenes", "photographs", "draw"))
    {"scenes": scenes, "photographs": photographs, "draw": lambda: put(tables())}[parser.parse_args().what]()


if __name__ == "__main__":
    main()
