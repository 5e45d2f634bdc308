"""The watcher of a run: images are opened, `learning/train.py` learns, and what it tells is written down.

    open_world -> pretrain: metrics, checkpoints, online k-NN, weights -> adapt: the same at a higher resolution
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from minidino.config import RunConfig, override
from minidino.images.datasets import open_images
from minidino.images.pixels import Pixels, load_pixels
from minidino.images.scenes import KINDS, TEST_WORLD, Scenes, draw_scenes
from minidino.learning.adapt import adapted, start_adapted
from minidino.learning.train import State, start, train
from minidino.model.vit import VisionTransformer
from minidino.model.weights import save_backbone
from minidino.probes import features
from minidino.probes.knn import knn_accuracy
from minidino.runs import Run, atomic_path, give_back_memory, keep_freed_memory, pick_device

K = 20  # neighbours; "20 is usually working the best" [released]
ONLINE_BANK, ONLINE_QUERIES = 2000, 500  # the k-NN reading during training uses this many images


@dataclass(frozen=True)
class World:
    """Training images, and held-out images to judge with. Scenes also know masks and depth."""

    name: str
    train: Pixels
    test: Pixels | None  # None: no labels, nothing to judge with
    train_scenes: Scenes | None = None
    test_scenes: Scenes | None = None
    pool: Pixels | None = None  # learned from instead of `train`, which is then the labelled bank alone

    @property
    def lessons(self) -> Pixels:
        """What is learned from."""
        return self.train if self.pool is None else self.pool


def open_world(config: RunConfig, folder: Path) -> World:
    """The images of a config: drawn, or decoded once into `folder`.

    Photographs without a validation part are split 4 : 1 by their position in the sorted list.
    """
    data = config.data
    pool = load_pixels(open_images(data.pool), data.short_side, folder / "pool") if data.pool else None
    if data.source == "scenes":
        scenes = draw_scenes(data.n_scenes, data.short_side, data.scene_seed)
        test = draw_scenes(data.n_test_scenes, data.short_side, data.scene_seed + TEST_WORLD)
        pixels = [Pixels.from_array(s.images, s.labels, list(KINDS)) for s in (scenes, test)]
        return World("drawn scenes", *pixels, scenes, test, pool)
    images = open_images(data.source)
    parts = [np.flatnonzero(images.splits == name) for name in ("train", "val")]
    if not len(parts[0]):
        rows = np.setdiff1d(np.arange(len(images)), parts[1])
        parts = [rows, parts[1]] if len(parts[1]) else [rows[rows % 5 != 0], rows[rows % 5 == 0]]
    train_pixels, test_pixels = (
        load_pixels(images.select(rows), data.short_side, folder / name) if len(rows) else None
        for name, rows in zip(("train", "val"), parts, strict=True)
    )
    labelled = test_pixels is not None and (test_pixels.labels >= 0).any() and (train_pixels.labels >= 0).any()
    return World(images.name, train_pixels, test_pixels if labelled else None, pool=pool)


def pretrain(
    config: RunConfig, folder: Path, world: World | None = None, resume: bool = False, state: State | None = None
) -> tuple[Run, World]:
    """Run a config to its end in a run folder: metrics, checkpoints, online k-NN, weights.

    Args:
        config: ignored with resume: the folder knows its own.
        folder: the run folder.
        world: images that are open already.
        resume: go on from the newest checkpoint; what was measured after it is measured again, the same to the bit.
        state: start from this instead of fresh weights.
    """
    keep_freed_memory()
    run = Run(folder)
    config = run.config() if resume else config
    device = pick_device(config.run.device)
    first = None if state is None else state.save()
    state = state or start(config, device)  # an impossible config leaves the folder as it was
    if not resume:
        run = Run.create(folder, config, device, first)
    world = world or open_world(config, run.folder / "pixels")
    if resume and (saved := run.load(device)) is not None:
        state.load(saved[1])
    run.cut_records(state.step)
    watch = OnlineKnn(world, config.crops.global_size)
    total = config.run.steps * config.optim.batch_size
    with tqdm(total=total, initial=state.step * config.optim.batch_size, unit="images", desc="training") as bar:
        for record in train(config, world.lessons, state):
            done = state.step == config.run.steps
            if watch.ready and (state.step % config.run.knn_every == 0 or done):
                record["knn"] = watch(state.teacher.backbone)
                bar.set_postfix(knn=f"{record['knn']:.3f}", refresh=False)
            if len(record) > 3:
                run.log(record)
            if state.step % config.run.checkpoint_every == 0 or done:
                run.save(state.step, state.save(), config.run.keep_checkpoints)
            bar.update(config.optim.batch_size)
    finish(run, state)
    give_back_memory()
    return run, world


def adapt(source: Path, folder: Path, size: int, steps: int, changes: Sequence[str] = ()) -> tuple[Run, World]:
    """The high-resolution phase of a finished run, in a folder of its own; see `minidino.learning.adapt`.

    Args:
        source: the finished run.
        folder: of the new run; `pretrain(..., resume=True)` goes on with it after a kill.
        size: px of a global crop, a multiple of the patch.
        steps: updates.
        changes: "key=value" texts, on top of the config of the phase.
    Raises:
        ValueError: the source has not reached its last step, or the config is impossible.
    """
    config = override(adapted(Run(source).config(), size, steps), list(changes))
    device = pick_device(config.run.device)
    return pretrain(config, folder, state=start_adapted(config, device, last_state(Run(source), device)))


def last_state(run: Run, device: torch.device) -> dict[str, Any]:
    """The saved state at the end of a run. Raises ValueError when it has not come there."""
    step, saved = run.load(device) or (0, {})
    if step < run.config().run.steps:
        raise ValueError(f"{run.folder} is at step {step} of {run.config().run.steps}; finish it with train --resume")
    return saved


def finish(run: Run, state: State) -> None:
    """Write the EMA teacher: the backbone, and its heads for whoever wants to go on."""
    save_backbone(state.teacher.backbone, run.folder / "weights.safetensors")
    heads = {k: v.contiguous() for k, v in state.teacher.state_dict().items() if not k.startswith("backbone.")}
    if state.teacher.ibot_head is state.teacher.dino_head:
        heads = {k: v for k, v in heads.items() if not k.startswith("ibot_head.")}
    with atomic_path(run.folder / "heads.safetensors") as beside:
        save_file(heads, beside)


class OnlineKnn:
    """A quick k-NN reading on a few thousand images while a run learns."""

    def __init__(self, world: World, size: int):
        self.ready = world.test is not None
        if self.ready:
            bank = world.train.select(some(len(world.train), ONLINE_BANK))
            queries = world.test.select(some(len(world.test), ONLINE_QUERIES))
            self.labels = bank.labels, queries.labels
            self.images = bank.squares(size), queries.squares(size)

    def __call__(self, backbone: VisionTransformer) -> float:
        bank, queries = (features.extract(backbone, images, progress=False)["cls"] for images in self.images)
        k = min(K, len(bank))
        return knn_accuracy(bank, self.labels[0], queries, self.labels[1], (k,))[k]


def some(n: int, at_most: int) -> np.ndarray:
    """Evenly spread rows, so that sorted classes are all there."""
    return np.unique(np.linspace(0, n - 1, min(n, at_most)).astype(int))
