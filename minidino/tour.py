"""The main job, end to end: pictures in, a backbone that learned without labels, and an honest report.

    open_world -> (scenes: raw pool -> curate) -> pretrain -> judge -> distill -> draw -> report.html, results.json
"""

import csv
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minidino import looking, pictures
from minidino.config import RunConfig, difference, preset
from minidino.curate import curate
from minidino.images.batches import make_batch
from minidino.images.datasets import open_images
from minidino.images.pixels import load_pixels, some
from minidino.images.pools import Pool, make_pool, write_pool
from minidino.images.scenes import FIRST_KIND, KINDS, Scenes
from minidino.judge import class_tokens, judge, judge_knn, n_parameters, random_backbone, trained_backbone
from minidino.learning import doctor
from minidino.learning.train import start, train
from minidino.model.vit import VisionTransformer
from minidino.probes import features
from minidino.probes.knn import neighbours
from minidino.probes.patches import attention_to, on_things
from minidino.report import Section, write_report
from minidino.runs import Run, alone_in, keep_freed_memory, peak_memory_mb, pick_device, write_json
from minidino.stages import K, World, distill, open_world, pretrain

Say = Callable[[str], None]
TRIAL_STEPS, COLD_STEPS = 32, 4  # timed before a run; the first ones wake the machine up
COPIES, JUNK = 0.2, 0.1  # planted in the pool of drawn scenes, for each of them
LOOKED_AT = 500  # held-out scenes of which it is asked where the class token looks
COPY_STEPS = 100  # of the net that has to find the copies
SHARE = 6  # distillation takes so much fewer steps than training


def tour(data: str | None = None, minutes: float | None = None, out: str = "runs/tour", say: Say = print) -> dict:
    """Learn from drawn scenes, or from the pictures at `data`, in minutes; judge, draw and report.

    Args:
        data: folder, archive or name; None draws scenes.
        minutes: of training; None takes the preset's steps if they fit into 4 minutes, else as many as fit.
        out: the run folder.
        say: where the words go.
    Returns:
        What results.json holds.
    Raises:
        FileExistsError: the folder holds a run of another command.
        BlockingIOError: another tour is at work there.
    """
    folder, begun = Path(out), time.perf_counter()
    expect_own(folder)
    keep_freed_memory()
    config = preset("scenes-cpu" if data is None else "imagenette-cpu")
    if data is not None:
        config = replace(config, data=replace(config.data, source=str(data)))
    say(f"minidino tour: {'drawing scenes' if data is None else f'reading {data}'}")
    device = pick_device(config.run.device)
    world, curation = open_world(config, folder / "pixels"), None
    (folder / "pixels").mkdir(parents=True, exist_ok=True)
    with alone_in(folder / "pixels"):  # to the end; training locks the folder itself
        if data is None:
            config, world, curation = learn_from_a_pool(config, world, folder, say)
        say(f"{len(world.lessons)} training images, {len(world.test) if world.test else 'no labelled'} held-out images")
        config = fit_steps(config, world, device, minutes, say)
        say(f"training {config.run.steps} steps of {config.optim.batch_size} images on {device}, preset {config.preset}")
        run, world = pretrain(config, folder, world)
        say("judging: baselines, k-NN, linear and patch probes")
        results = judge(run, world) | ({"curation": curation} if curation else {})
        for name, value in sorted(results.get("knn", {}).items(), key=lambda item: item[1]):
            say(f"  k-NN {name:16} {value:.3f}")
        say(doctor.prescription([doctor.Finding(**finding) for finding in results["training"]["doctor"]]))
        if world.test_scenes is not None:
            results["attention"] = look(world.test_scenes, trained_backbone(run, device))
        if world.test is not None:
            results["sizes"] = shrink(run, world, results["knn_readings"]["trained"][f"k={K}"], say)
        draw(world, config, run)
        report(run, world, results)
        results |= {"minutes": round((time.perf_counter() - begun) / 60, 2), "peak_memory_mb": peak_memory_mb()}
        write_json(folder / "results.json", results)
        say(f"{folder / 'report.html'} and results.json are written; {results['minutes']} minutes, "
            f"{results['peak_memory_mb']} MiB at most")  # fmt: skip
    return results


def expect_own(folder: Path) -> None:
    """Raise FileExistsError where another command has its run: a tour begins anew, and would take that away."""
    path = folder / "environment.json"
    made_by = json.loads(path.read_text()).get("command", []) if path.exists() else []
    if other := {"train", "adapt", "distill", "chain"} & set(made_by[1:2]):
        raise FileExistsError(f"{folder} holds a run of minidino {other.pop()}; choose another with --out")


def learn_from_a_pool(
    config: RunConfig, world: World, folder: Path, say: Say
) -> tuple[RunConfig, World, dict[str, Any]]:
    """Hide the training scenes among copies and junk, let curation choose, and say what it found of what was planted."""
    begun = time.perf_counter()
    scenes = world.train_scenes
    pool = make_pool(scenes.images, scenes.labels, COPIES, JUNK, config.data.scene_seed)
    say(f"curating a raw pool: {len(scenes.images)} scenes, {pool.made.count('junk')} pieces of junk, "
        f"{len(pool.files) - len(scenes.images) - pool.made.count('junk')} copies")  # fmt: skip
    archive = write_pool(pool, folder / "curation" / "pool.zip")
    side = config.data.short_side
    manifest = curate(archive, folder / "curation", copy_steps=COPY_STEPS, seed=config.run.seed, short_side=side, say=say)
    config = replace(config, data=replace(config.data, pool=str(manifest)))
    world = replace(world, pool=load_pixels(open_images(manifest), side, folder / "pixels" / "pool"))
    funnel = json.loads(manifest.with_name("curation.json").read_text())["funnel"]
    told = {"funnel": funnel, **found_copies(pool, manifest), "seconds": round(time.perf_counter() - begun, 1)}
    return config, world, told


def found_copies(pool: Pool, manifest: Path) -> dict[str, Any]:
    """What curation did with a pool of which all is known.

    Returns:
        copies: {change: [planted, not kept beside its original]}; junk: [planted, left]; scenes_lost: how many are
        left in no copy at all.
    """
    with open(manifest, newline="") as file:
        kept_of = {row["file"]: row["kept"] == "1" for row in csv.DictReader(file)}
    kept = np.array([kept_of[name] for name in pool.names])
    left = np.bincount(pool.original, kept, len(kept))
    made, found = np.array(pool.made), ~(kept & kept[pool.original])
    changes = sorted(set(pool.made) - {"own", "junk"})
    copies = {change: [int((made == change).sum()), int(found[made == change].sum())] for change in changes}
    junk = [int((made == "junk").sum()), int(kept[made == "junk"].sum())]
    return {"copies": copies, "junk": junk, "scenes_lost": int((left[made == "own"] == 0).sum())}


def fit_steps(config: RunConfig, world: World, device: torch.device, minutes: float | None, say: Say) -> RunConfig:
    """Choose the number of steps that fit: a whole run of a few steps is timed and thrown away.

    Its schedule is the real one in small, so steps with and without iBOT count as often as they will. A tenth of the
    time is kept back for a machine that slows down.
    """
    trial = replace(config, run=replace(config.run, steps=TRIAL_STEPS))
    state = start(trial, device)
    seconds = [record["seconds"] for record in train(trial, world.lessons, state)]
    per_step = (seconds[-1] - seconds[COLD_STEPS - 1]) / (TRIAL_STEPS - COLD_STEPS)
    fitting = int(0.9 * 60 * (minutes or 4) / per_step)
    say(f"a step takes {per_step * 1000:.0f} ms here in {state.precision}: "
        f"{fitting} steps fit into {minutes or 4:g} minutes")  # fmt: skip
    steps = max(fitting if minutes else min(config.run.steps, fitting), 20)
    return replace(config, run=replace(config.run, steps=steps, knn_every=max(steps // 8, 1)))


def shrink(run: Run, world: World, reached: float, say: Say) -> dict[str, dict[str, Any]]:
    """A network of half the width, taught by the trained one and alone, on as many pictures each: what k-NN says.

    Args:
        run: the trained network.
        reached: its own k-NN.
    Returns:
        {name: {"parameters", "knn", "seconds"}}: of the teacher, of the student that it taught, of the one alone.
    """
    config, v = run.config(), run.config().vit
    steps = max(config.run.steps // SHARE, 1)
    student = f"{v.name},width={v.width // 2},depth={v.depth},heads={max(v.heads // 2, 1)}"
    say(f"distilling it into a network of half the width, and teaching the same without it, {steps} steps each")
    often = f"run.knn_every={steps}"
    (taught,), _ = distill(run.folder, run.folder / "distilled", [student], steps, [often], world=world)
    alone = replace(config, vit=taught.config().vit, run=taught.config().run)
    pretrain(alone, run.folder / "alone", world)
    runs = {"distilled": taught, "alone": Run(run.folder / "alone")}
    nets = {name: trained_backbone(each, pick_device(config.run.device)) for name, each in runs.items()}
    readings = judge_knn(world, class_tokens(world, config, nets).items())
    knn = {"teacher": reached} | {name: reading[f"k={K}"] for name, reading in readings.items()}
    found = {name: {"parameters": n_parameters(each.config()), "knn": knn[name],
                    "seconds": each.records()[-1]["seconds"]} for name, each in ({"teacher": run} | runs).items()}  # fmt: skip
    for name, row in found.items():
        say(f"  k-NN {name:16} {row['knn']:.3f} with {row['parameters']:,} parameters")
    return found


def look(scenes: Scenes, backbone: VisionTransformer) -> dict[str, float]:
    """How much of the class token's look, the last block's, is on things, and how much of the pixels they are."""
    images = torch.from_numpy(scenes.images[:LOOKED_AT]).permute(0, 3, 1, 2)
    things = scenes.masks[:LOOKED_AT] >= FIRST_KIND
    return {"on_things": float(on_things(attention_to(backbone, images), things).mass.mean()), "pixels": float(things.mean())}


def draw(world: World, config: RunConfig, run: Run) -> None:
    """All pictures of a finished run, as PNG in its folder."""
    folder, size, patch = run.folder, config.crops.global_size, config.vit.patch_size
    device = pick_device(config.run.device)
    untrained, trained = random_backbone(config, device), trained_backbone(run, device)
    if world.train_scenes is not None:
        s = world.train_scenes
        rows = [int(np.flatnonzero(s.labels == kind)[0]) for kind in range(len(KINDS))]
        pictures.scenes_sheet(s.images[rows], s.masks[rows], s.depth[rows], list(KINDS), folder / "scenes.png")
    index = torch.arange(2)
    images, sizes = world.lessons.batch(index.numpy())
    batch = make_batch(config, 0, images.to(device), sizes, index)
    first = batch.masks.any(-1).any(0).int().argmax()
    pictures.crops_and_masks(world.lessons.image(int(first)), batch.crops_global[:, first].cpu(),
                             batch.crops_local[:, first].cpu(), batch.masks[:, first].cpu(), patch,
                             folder / "crops.png")  # fmt: skip
    ln_k = float(np.log(config.heads.n_prototypes))
    pictures.training_curves(run.records(), folder / "curves.png", ln_k)
    shown = world.test or world.train
    shown = shown.select(some(len(shown), 8))
    stride = max(patch // 4, 1)
    wide = shown.squares(size + patch - stride)
    before, after = (features.dense_patches(v, wide, patch, stride) for v in (untrained, trained))
    grid = before.shape[1:3]
    looking.pca_before_after(wide, before.flatten(1, 2), after.flatten(1, 2), grid, folder / "pca.png")
    squares = shown.squares(2 * size)[:6]  # four times the patches: outlines are seen
    looking.attention_maps(squares, attention_to(trained, squares), folder / "attention.png")
    if world.test is not None:
        _draw_neighbours(world, size, trained, folder / "neighbours.png")


def _draw_neighbours(world: World, size: int, backbone: VisionTransformer, path: Path) -> None:
    bank = world.train.select(some(len(world.train), 4000))
    queries = world.test.select(some(len(world.test), 6))
    images = bank.squares(size), queries.squares(size)
    rows = [features.extract(backbone, part, progress=False)["cls"] for part in images]
    _, index = neighbours(*rows, 7)
    looking.neighbours_wall(images[1], images[0], index, queries.labels, bank.labels, path)


def report(run: Run, world: World, results: dict[str, Any]) -> Path:
    """report.html: what was done, what came out, and what it does not show."""
    config, folder, training = run.config(), run.folder, results["training"]
    machine = results["environment"]["machine"]
    sections = [
        Section("What happened", f"A Vision Transformer of {n_parameters(config):,} parameters learned from "
                f"{results['n_train']:,} images ({results['data']}) without a label, {training['images']:,} looks in "
                f"{training['seconds'] / 60:.1f} minutes on {machine}, by the full DINOv2 objective: DINO on class "
                "tokens, iBOT on hidden patches, KoLeo.")]  # fmt: skip
    if world.train_scenes is not None:
        sections.append(Section("The drawn scenes", "Image, mask and depth.", folder / "scenes.png"))
    if "curation" in results:
        found = results["curation"]
        rows = [("change", "planted", "found"), *((name, *n) for name, n in found["copies"].items())]
        sections.append(Section("Which pictures it learned from", "The scenes came as a raw pool, with copies and junk "
                        f"among them. Curation had to find the copies by itself; {found['scenes_lost']:,} scenes were "
                        f"lost as copies of another, and {found['junk'][1]:,} of {found['junk'][0]:,} pieces of junk "
                        "are left: to see that a page of text is no landscape takes a network that knows landscapes. "
                        "What was done with each file, and why, stands in curation/report.html and manifest.csv.",
                        folder / "curation" / "funnel.png", rows))  # fmt: skip
    sections.append(Section("What the student sees", "Global crops with holes, local crops.", folder / "crops.png"))
    doctor_says = " ".join(f"{f['title']}: {f['evidence']}" for f in training["doctor"])
    sections.append(Section("How it learned", f"The doctor: {doctor_says}", folder / "curves.png"))
    if world.test is not None:
        sections += _result_sections(results, folder)
    if "sizes" in results:
        sections.append(_sizes_section(results, folder))
    sections += [
        Section("Patch features before and after", "Three principal directions of the patch features as red, green and "
                "blue, over all images together: the picture of Figure 1 of the paper.", folder / "pca.png"),
        Section("Where the class token looks", "Attention of the last block, head by head, in pictures of twice the size."
                + _look_words(results), folder / "attention.png"),
    ]  # fmt: skip
    if world.test is not None:
        sections.append(Section("Nearest neighbours", "Held-out queries, and the bank.", folder / "neighbours.png"))
    changed = difference(config, preset("vitl14-lvd"))
    table = [("field", "here", "published")] + [(k, str(a), str(b)) for k, (a, b) in changed.items()]
    sections += [
        Section("What differs from the published recipe", "", table=table),
        Section("What this does not show", "One run, one seed: the spread over seeds stands in the README. A small "
                "net on small pictures says nothing about the paper's numbers; it shows that the objective learns."),
    ]  # fmt: skip
    return write_report(folder / "report.html", f"minidino tour: {results['data']}", sections)


def _look_words(results: dict[str, Any]) -> str:
    if "attention" not in results:
        return ""
    found = results["attention"]
    return (f" In held-out scenes {found['on_things']:.0%} of the look is on things, which are {found['pixels']:.0%} of the "
            "pixels; nobody told the network what a thing is.")  # fmt: skip


def _result_sections(results: dict[str, Any], folder: Path) -> list[Section]:
    n = results["n_test"]
    bars = {name: (value, (value * (1 - value) / n) ** 0.5) for name, value in results["knn"].items()}
    pictures.baselines_bar(bars, folder / "knn.png")
    rows = [("descriptor", "k-NN, k = 20", "k-NN, best of six")]
    rows += [(name, r[f"k={K}"], r["best"]) for name, r in results["knn_readings"].items()]
    linear = [("features", "linear probe", "sd over 3 seeds")]
    linear += [(name, r["mean"], r["sd"]) for name, r in results["linear"].items()]
    sections = [
        Section("Are the features any good?", f"Top-1 accuracy on {n:,} held-out images; the error bar is the standard "
                "error of a share. Every descriptor is given its best k and centring.", folder / "knn.png", rows),
        Section("A linear probe", "Thirteen learning rates, chosen on held-out training images.", table=linear),
    ]  # fmt: skip
    if "patches" in results:
        rows = [("patch features", "mIoU", "accuracy", "depth RMSE (m)", "log-depth RMSE")]
        rows += [(name, r["miou"], r["accuracy"], r["rmse"], r["log_rmse"]) for name, r in results["patches"].items()]
        words = "Linear probes on frozen patch tokens. Position alone is the baseline that counts for depth."
        sections.append(Section("What single patches know", words, table=rows))
    return sections


def _sizes_section(results: dict[str, Any], folder: Path) -> Section:
    sizes, n = results["sizes"], results["n_test"]
    kinds = {"teacher": "teacher", "distilled": "student", "alone": "trained"}
    errors = {name: (r["knn"] * (1 - r["knn"]) / n) ** 0.5 for name, r in sizes.items()}
    bars = {name: (kinds[name], r["parameters"], r["knn"], errors[name]) for name, r in sizes.items()}
    pictures.against_parameters(bars, folder / "sizes.png")
    rows = [("network", "parameters", "k-NN, k = 20", "minutes of training")]
    rows += [(name, f"{r['parameters']:,}", r["knn"], r["seconds"] / 60) for name, r in sizes.items()]
    return Section("A smaller network, taught by this one", "Half the width, a sixth of the steps: once with the trained "
                   "network for a frozen teacher, once alone. The error bar is the standard error of a share.",
                   folder / "sizes.png", rows)  # fmt: skip
