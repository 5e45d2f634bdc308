"""Where class tokens look, and how long tokens are, in networks without and with registers.

    python benchmarks/inside.py scenes                      three networks of each kind, against masks of what is drawn
    python benchmarks/inside.py photographs --data PATH     the network of an hour on Imagenette: looks at streets of CamVid
    python benchmarks/inside.py draw                        the tables

The networks are those of benchmarks/probes.py; PATH holds camvid. Results: data/results/inside-*.json.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from probes import NETWORK, SEEDS, STEPS, _said, network
from recipe import RESULTS, made_on, put, spread, store
from torch import Tensor

from minidino.images.pairs import load_pairs, open_pairs
from minidino.images.scenes import KINDS, MASK_CLASSES, draw_scenes
from minidino.judge import random_backbone, trained_backbone
from minidino.model.vit import VisionTransformer
from minidino.probes.patches import attention_to, on_things, outliers, token_norms
from minidino.runs import Run, pick_device
from minidino.stages import open_world

SIZE, WORLD = 96, 1011  # px of scenes that no training has seen
STREET = (192, 256)  # px
N = 500  # scenes or streets to choose a head by, and at most as many to judge
REGISTERS = (0, 4)
STRIDE = 4  # of the held-out photographs of Imagenette one in so many
COLUMNS = ("mass", "jaccard", "jaccard_published", "longest", "outliers")
FIRST_THING = MASK_CLASSES.index(KINDS[0])
ON_STREETS = ("Car", "Pedestrian", "Bicyclist")

Images, Things = UInt8[Tensor, "n C H W"], Bool[Tensor, "n H W"]


def scenes() -> None:
    """Every subject on the same scenes, asked about the last block."""
    drawn = draw_scenes(2 * N, SIZE, WORLD)
    images, things = torch.from_numpy(drawn.images).permute(0, 3, 1, 2), torch.from_numpy(drawn.masks >= FIRST_THING)
    found = {name: [agreement(maps, things)] for name, maps in without_network(images, things)}
    for seed in SEEDS:
        for registers in REGISTERS:
            for name, net in nets_of(Run(network(seed, registers))).items():
                looks = [attention_to(net, images, block) for block in range(net.depth)]
                told = agreement(looks[-1], things) | lengths(net, images)
                told["mass_of_blocks"] = [on_things(maps, things).mass.mean().item() for maps in looks]
                found.setdefault(f"{name}, {registers} registers", []).append(told)
                print(name, registers, seed, told, flush=True)
    keep("scenes", things, found, steps=STEPS, size_px=SIZE)


def photographs(data: Path) -> None:
    """Looks at what moves in streets, which no training has seen; lengths of tokens of held-out pictures of Imagenette."""
    run = Run(NETWORK)
    pairs = open_pairs(data / "camvid", "segmentation")
    parts = [load_pairs(pairs, part, STREET) for part in ("train", "test")]
    images, targets = (torch.cat([getattr(part, name)[:N] for part in parts]) for name in ("images", "targets"))
    things = torch.isin(targets, torch.tensor([pairs.classes.index(name) for name in ON_STREETS], dtype=targets.dtype))
    n_chosen_on = len(parts[0].images[:N])
    held_out = open_world(run.config(), run.folder / "pixels").test
    indoors = held_out.select(np.arange(0, len(held_out), STRIDE)).squares(run.config().crops.global_size)
    found = {name: [agreement(maps, things, n_chosen_on)] for name, maps in without_network(images, things, n_chosen_on)}
    for name, net in nets_of(run).items():
        found[name] = [agreement(attention_to(net, images), things, n_chosen_on) | lengths(net, indoors)]
    keep("photographs", things, found, n_chosen_on, network=str(NETWORK), size_px=STREET, lengths_of=len(indoors))


def keep(name: str, things: Things, found: dict[str, list[dict]], n_chosen_on: int = N, **about: Any) -> None:
    judged = things[n_chosen_on:]
    counts = {"n_chosen_on": n_chosen_on, "n": len(judged), "share_of_pixels": judged.double().mean().item()}
    store(f"inside-{name}", {**about, **counts, "subjects": found})


def nets_of(run: Run) -> dict[str, VisionTransformer]:
    return {"trained": trained_backbone(run, pick_device()), "untrained": random_backbone(run.config(), pick_device())}


def without_network(
    images: Images, things: Things, n_chosen_on: int = N, patch: int = 8
) -> Iterator[tuple[str, Float[Tensor, "n 1 Hp Wp"]]]:
    """Two looks that nobody learned: at what has another colour than the picture, and where others have their things."""
    colours = F.avg_pool2d(images.double(), patch)
    yield "unlike the mean colour", (colours - colours.mean((2, 3), keepdim=True)).norm(dim=1, keepdim=True)
    there = F.avg_pool2d(things[:n_chosen_on, None].double(), patch).mean(0)
    yield "where others have things", there.expand(len(images), -1, -1, -1)


def agreement(maps: Float[Tensor, "n h Hp Wp"], things: Things, n_chosen_on: int = N) -> dict[str, float]:
    """Of the pictures after the first ones, which choose one head for all."""
    found = on_things(maps, things)
    mass, jaccard = found.mass[n_chosen_on:], found.jaccard[n_chosen_on:]
    head = found.jaccard[:n_chosen_on].mean(0).argmax()
    return {"mass": mass.mean().item(), "mass_of_head": mass[:, head].mean().item(),
            "jaccard": jaccard[:, head].mean().item(), "jaccard_published": jaccard.max(1).mean().item()}


def lengths(net: VisionTransformer, images: UInt8[Tensor, "n C S S"]) -> dict[str, float]:
    """How long the tokens are before the last norm, beside the median of the patches."""
    norms = token_norms(net, images)
    found, median = outliers(norms["patch"]), float(np.median(norms["patch"]))
    told = {"median": median, "longest": norms["patch"].max() / median, "threshold": found.threshold / median,
            "outliers": found.share, "cls": np.median(norms["cls"]) / median}  # fmt: skip
    if norms["registers"].size:
        told["registers"] = np.median(norms["registers"]) / median
    return {name: float(value) for name, value in told.items()}


# ---------------------------------------------------------------- the tables


def tables() -> dict[str, str]:
    drawn, streets = (json.loads((RESULTS / f"inside-{name}.json").read_text()) for name in ("scenes", "photographs"))
    words = (f"{drawn['n']} scenes of {drawn['size_px']} px, networks of {drawn['steps']} steps, last block, mean ± standard "
             f"deviation over {len(SEEDS)} seeds",
             f"{streets['n']} streets of {' x '.join(map(str, streets['size_px']))} px, one network; lengths: "
             f"{streets['lengths_of']} held-out pictures of Imagenette")  # fmt: skip
    return {"inside": _table(drawn, words[0]), "inside-photographs": _table(streets, words[1])}


def _table(found: dict[str, Any], words: str) -> str:
    lines = ["| who looks | share of the look on things | Jaccard: one head for all | the best head of each picture | "
             "longest patch token, in medians | patches by the rule of outliers |", "|---|---|---|---|---|---|"]  # fmt: skip
    for name, runs in found["subjects"].items():
        cells = (_said(spread([run[key] for run in runs])) if key in runs[0] else "" for key in COLUMNS)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"Things are {found['share_of_pixels']:.3f} of the pixels. {words}; the one head is chosen on "
              f"{found['n_chosen_on']} others. {made_on(found)}"]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("scenes", "photographs", "draw"))
    parser.add_argument("--data", type=Path, help="folder with camvid")
    options = parser.parse_args()
    if options.what == "photographs" and options.data is None:
        parser.error("photographs: expected --data PATH, the folder with camvid")
    {"scenes": scenes, "photographs": lambda: photographs(options.data), "draw": lambda: put(tables())}[options.what]()


if __name__ == "__main__":
    main()
