"""The watcher of runs: images are opened, `learning/train.py` learns, and what it tells is written down.

    open_world -> pretrain -> adapt: the same at a higher resolution -> distill: smaller students of what came out

Each stage leaves a run folder with metrics, checkpoints, weights and heads, and goes on after a kill.
"""

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import tee
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from minidino.config import RunConfig, difference, override
from minidino.distributed import first_goes_first, is_first, my_rows, wait, whole
from minidino.images.batches import batches
from minidino.images.datasets import open_images
from minidino.images.pixels import Pixels, load_pixels, some
from minidino.images.scenes import KINDS, TEST_WORLD, Scenes, draw_scenes
from minidino.learning.adapt import adapted, expect_same_network, going_on, start_adapted, start_from
from minidino.learning.distill import (
    distilled,
    expect_same_teacher,
    fingerprint,
    frozen_teacher,
    imitating,
    network_of,
    start_distilled,
    teacher_again,
)
from minidino.learning.teacher import Frozen, build_student
from minidino.learning.train import State, spread, start, train
from minidino.memory import enough_memory
from minidino.model.vit import VisionTransformer
from minidino.model.weights import backbone_of, export_weights, write_state
from minidino.probes import features
from minidino.probes.knn import knn_accuracy
from minidino.runs import Run, alone_in, give_back_memory, keep_freed_memory, pick_device, write_json

K = 20  # neighbours; "20 is usually working the best" [released]
ONLINE_BANK, ONLINE_QUERIES = 2000, 500  # the k-NN reading during training uses this many images
GUARD, TEACHER = "guard.json", "teacher.json"  # in run folders: was it worth it? who taught?


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

    Photographs without a training or a validation part are split 4 : 1 by their position in the sorted list.
    """
    data = config.data
    load = partial(load_pixels, short_side=data.short_side, channels=data.channels)
    pool = load(open_images(data.pool), folder=folder / "pool") if data.pool else None
    if data.source == "scenes":
        scenes = draw_scenes(data.n_scenes, data.short_side, data.scene_seed)
        test = draw_scenes(data.n_test_scenes, data.short_side, data.scene_seed + TEST_WORLD)
        pixels = [Pixels.from_array(s.images, s.labels, list(KINDS)) for s in (scenes, test)]
        return World("drawn scenes", *pixels, scenes, test, pool)
    images = open_images(data.source)
    train, val = _parts(images.splits)
    train_pixels, test_pixels = load(images.select(train), folder=folder / "train"), None
    try:
        test_pixels = load(images.select(val), folder=folder / "val") if len(val) else None
    except ValueError as error:  # not one decodes: that is no reason not to learn
        warnings.warn(f"nothing to judge with: {error}", stacklevel=2)
    labelled = test_pixels is not None and (test_pixels.labels >= 0).any() and (train_pixels.labels >= 0).any()
    return World(images.name, train_pixels, test_pixels if labelled else None, pool=pool)


def _parts(splits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which rows are learned from, and which are held out."""
    train, val = (np.flatnonzero(splits == name) for name in ("train", "val"))
    train = train if len(train) else np.flatnonzero(splits != "val")
    if len(train) and len(val):
        return train, val
    rows = train if len(train) else val
    held_out = (np.arange(len(rows)) % 5 == 0) & (len(rows) > 1)
    return rows[~held_out], rows[held_out]


@dataclass(frozen=True)
class Learner:
    """A run that learns, and the state it is in."""

    run: Run
    config: RunConfig
    state: State
    notes: dict[str, Any] = field(default_factory=dict)  # what its folder shall hold from the start
    begun: int | None = None  # when its folder became the run that this one replaces


def pretrain(
    config: RunConfig | None, folder: Path, world: World | None = None, resume: bool = False, state: State | None = None
) -> tuple[Run, World]:
    """Run a config to its end in a run folder: metrics, checkpoints, online k-NN, weights.

    Args:
        config: with resume None, since the folder knows its own.
        folder: the run folder.
        world: images that are open already.
        resume: go on from the newest checkpoint; what was measured after it is measured again, the same to the bit.
        state: start from this instead of fresh weights. Then guard.json says whether k-NN has gained by it.
    """
    keep_freed_memory()
    learner = reopen(folder) if resume else candidate(config, folder, state)
    world = world or _opened(learner.config, learner.run.folder)
    if not resume:
        enrol(learner)
    learn([learner], world)
    give_back_memory()
    return learner.run, world


def _opened(config: RunConfig, folder: Path) -> World:
    with first_goes_first():
        return open_world(config, folder / "pixels")


def candidate(config: RunConfig, folder: Path, state: State | None = None, frozen: Frozen | None = None) -> Learner:
    """Who is to begin in a folder, which stays as it was: a config that is impossible here leaves nothing behind."""
    run = Run(folder)
    run.expect_room()
    my_rows(config.optim.batch_size, config.optim.accumulate)
    device, notes, begun = pick_device(config.run.device), {}, run.begun()
    if config.distill.teacher:
        frozen = frozen or frozen_teacher(config, device)
        notes[TEACHER] = {"teacher": config.distill.teacher, "sha256": frozen.sha256}
    if state is None:
        return Learner(run, config, begin(config, device, frozen), notes, begun)
    state.frozen = frozen
    return Learner(run, config, state, notes | {GUARD: {}}, begun)


def enrol(learner: Learner) -> None:
    """Make a folder the run of its candidate."""
    config, first = learner.config, learner.state.save() if GUARD in learner.notes else None
    if is_first():
        with learner.run.taken(learner.begun):
            Run.create(learner.run.folder, config, pick_device(config.run.device), first, learner.notes)
    wait()


def begin(config: RunConfig, device: torch.device, frozen: Frozen | None) -> State:
    """The state before the first step, of pretraining or, with a teacher, of distillation."""
    return start(config, device) if frozen is None else start_distilled(config, device, frozen)


def reopen(folder: Path, at_most: int | None = None, frozen: Frozen | None = None) -> Learner:
    """A run as it was at its newest checkpoint, at step `at_most` or before, or at its start.

    Raises:
        FileNotFoundError: a distillation whose teacher has been moved; says how to go on.
        ValueError: a distillation whose teacher is another by now; a config of another network.
    """
    run = Run(folder)
    config = run.config()
    device = pick_device(config.run.device)
    if config.distill.teacher:
        frozen = teacher_again(run, device, frozen)
    state = begin(config, device, frozen)
    if (saved := run.load(device, at_most)) is not None:
        state.load(saved[1])
    return Learner(run, config, state)


def learn(learners: Sequence[Learner], world: World) -> None:
    """Take runs to their end, in step and on the same batches; what each measures goes to its folder."""
    with alone_in(*(learner.run.folder for learner in learners if is_first())), enough_memory():
        _learn(learners, world)


def _learn(learners: Sequence[Learner], world: World) -> None:
    config, step = learners[0].config, learners[0].state.step
    watch = OnlineKnn(world, config.crops.global_size)
    keep = max(config.run.keep_checkpoints, min(len(learners), 2))  # several may have reached different steps
    for learner in learners:
        spread(learner.config, learner.state)
        if is_first():
            learner.run.cut_records(step)
            learner.run.compare_pictures(world.lessons)
        weigh(learner, watch, "before")
    stream = batches(config, world.lessons, pick_device(config.run.device), step)
    learning = [
        train(learner.config, world.lessons, learner.state, shared)
        for learner, shared in zip(learners, tee(stream, len(learners)), strict=True)
    ]
    size = config.optim.batch_size
    with tqdm(total=config.run.steps * size, initial=step * size, unit="images", desc="training",
              disable=not is_first()) as bar:  # fmt: skip
        for records in zip(*learning, strict=True):
            for learner, record in zip(learners, records, strict=True):
                note(learner, record, watch, keep)
            bar.set_postfix({"knn": f"{records[0]['knn']:.3f}"} if "knn" in records[0] else None, refresh=False)
            bar.update(size)
    if (frozen := learners[0].state.frozen) is not None:
        expect_same_teacher(learners[0].run, fingerprint(frozen.network))
    for learner in learners:
        weigh(learner, watch, "after")
        finish(learner)


def note(learner: Learner, record: dict[str, Any], watch: "OnlineKnn", keep: int) -> None:
    """Write down what a step told, and save where it is time to; so many checkpoints are kept."""
    run, settings, state = learner.run, learner.config.run, learner.state
    done = state.step == settings.steps
    if watch.ready and (state.step % settings.knn_every == 0 or done):
        record["knn"] = state.ask_teacher(lambda network: watch(network.backbone))
    if len(record) > 3 and is_first():
        run.log(record)
    if state.step % settings.checkpoint_every == 0 or done:
        saved = state.save()
        if is_first():
            run.save(state.step, saved, keep)


def weigh(learner: Learner, watch: "OnlineKnn", when: str) -> None:
    """Keep the k-NN of a run that started from trained weights, "before" and "after", and say what it came to."""
    path = learner.run.folder / GUARD
    if not path.exists():
        return
    said = json.loads(path.read_text())
    if watch.ready and when not in said:
        said[when] = learner.state.ask_teacher(lambda network: watch(network.backbone))
    said |= verdict(said.get("before"), said.get("after"), watch.n_queries)
    wait()  # until all have read it
    if is_first():
        write_json(path, said)


def verdict(before: float | None, after: float | None, n: int) -> dict[str, Any]:
    """Whether a share of n queries has risen or fallen, by two standard errors of the difference."""
    if before is None or after is None:
        return {"verdict": "not judged"}
    error = math.sqrt((before * (1 - before) + after * (1 - after)) / n)
    gain = after - before
    word = "better" if gain > 2 * error else "worse" if gain < -2 * error else "no difference beyond noise"
    return {"standard_error": error, "verdict": word}


def guard_of(run: Run) -> dict[str, Any]:
    """{"before", "after", "standard_error", "verdict"} of a run that started from trained weights; {} of others."""
    path = run.folder / GUARD
    return json.loads(path.read_text()) if path.exists() else {}


def go_on(
    source: str | Path | VisionTransformer,
    folder: Path,
    config: RunConfig,
    heads_first: float = 0.2,
    world: World | None = None,
) -> tuple[Run, World]:
    """Train on from a backbone that came without heads, as the released ones do; `guard_of` says what it came to.

    Args:
        source: a backbone, or weights that `backbone_of` reads; the sizes are theirs.
        folder: of the new run.
        config: all else.
        heads_first: share of the steps in which the fresh heads learn alone.
        world: images that are open already.
    """
    vit = source if isinstance(source, VisionTransformer) else backbone_of(source)
    config = going_on(config, vit, heads_first)
    return pretrain(config, folder, world, state=start_from(config, pick_device(config.run.device), vit))


def adapt(
    source: Path, folder: Path, size: int, steps: int, changes: Sequence[str] = (), fit_memory: bool = False
) -> tuple[Run, World]:
    """The high-resolution phase of a finished run, in a folder of its own; see `minidino.learning.adapt`.

    Args:
        source: the finished run.
        folder: of the new run; `pretrain(..., resume=True)` goes on with it after a kill.
        size: px of a global crop, a multiple of the patch.
        steps: updates.
        changes: "key=value" texts, on top of the config of the phase.
        fit_memory: fewer images a step, as `adapt.fitting_batch` says.
    Raises:
        ValueError: the source has not reached its last step, or the config is impossible, or another network's.
    """
    plan = adapted(Run(source).config(), size, steps, fit_memory)
    config = override(plan, list(changes))
    expect_same_network(plan, config)
    device = pick_device(config.run.device)
    return pretrain(config, folder, state=start_adapted(config, device, last_state(Run(source), device)))


def distill(
    source: str | Path,
    folder: Path,
    students: Sequence[str],
    steps: int,
    changes: Sequence[str] = (),
    imitate: RunConfig | None = None,
    resume: bool = False,
    world: World | None = None,
) -> tuple[list[Run], World]:
    """Small students of one frozen teacher, which looks at each batch once for all; see `minidino.learning.distill`.

    Args:
        source: the teacher's finished run; to imitate, also weights.
        folder: of the student's run; of several, each has one in it, named as the student.
        students: sizes, such as "vit_small" or "vit_tiny,width=32,depth=4,heads=2".
        steps: updates.
        changes: "key=value" texts, on top of the config of the teacher's run.
        imitate: this config, and the teacher's tokens for targets; None is the paper's way, through its heads.
        resume: go on with what was begun, from the newest step in common; the teacher's folder may have been moved.
        world: images that are open already.
    Raises:
        FileNotFoundError, ValueError: the teacher cannot teach these students; says why. One student given twice.
    """
    keep_freed_memory()
    if imitate is None:
        plans = [distilled(Run(source).config(), source, student, steps) for student in students]
    else:
        plans = [imitating(imitate, source, student, steps, changes) for student in students]
    plans = [override(plan, list(changes)) for plan in plans]
    if len({plan.vit for plan in plans}) < len(plans):
        raise ValueError(f"expected students of different sizes, got {', '.join(students)}")
    folders = student_folders(folder, students)
    frozen = frozen_teacher(plans[0], pick_device(plans[0].run.device))

    world = world or _opened(plans[0], folder)
    begun = [resume and Run(place).config_path.exists() for place in folders]
    wait()

    def open_learner(plan: RunConfig, place: Path, begun: bool) -> Learner:
        if not begun:
            learner = candidate(plan, place, frozen=frozen)
            enrol(learner)
            return learner
        if changed := {k: v for k, v in difference(Run(place).config(), plan).items() if k != "distill.teacher"}:
            raise ValueError(f"{place} was begun with other settings: {changed}; give them again or choose another --out")
        return reopen(place, frozen=frozen)

    learners = [open_learner(*each) for each in zip(plans, folders, begun, strict=True)]
    while len(reached := {learner.state.step for learner in learners}) > 1:
        learners = [reopen(place, min(reached), frozen) for place in folders]
    learn(learners, world)
    give_back_memory()
    return [learner.run for learner in learners], world


def student_folders(folder: Path, students: Sequence[str]) -> list[Path]:
    """Where each student of a distillation lives: in the folder itself when it is the only one."""
    return [folder / student.replace(",", "-") for student in students] if len(students) > 1 else [folder]


def last_state(run: Run, device: torch.device) -> dict[str, Any]:
    """The saved state at the end of a run; where only its average is left, with heads, that stands for the student too.

    Raises:
        ValueError: the run has not come to its end.
        FileNotFoundError: there are no checkpoints any more, and no heads either.
    """
    step, saved = run.load(device) or (0, {})
    if step == run.config().run.steps:
        return saved
    if run.saved() or not (run.folder / "weights.safetensors").exists():
        raise ValueError(f"{run.folder} is at step {step} of {run.config().run.steps}; finish it with train --resume")
    average = network_of(run).to(device).state_dict()
    return {"student": average, "teacher": average, "center": None}


def finish(learner: Learner) -> None:
    """Write the EMA teacher: the backbone, and its heads for whoever wants to go on."""
    said, folder = whole(learner.state.teacher.state_dict()), learner.run.folder
    if is_first():
        network = build_student(learner.config)  # the teacher's own may be in parts
        network.load_state_dict(said)
        export_weights(network.backbone, folder / "weights.safetensors")
        heads = {k: v.contiguous() for k, v in network.state_dict().items() if not k.startswith("backbone.")}
        if "ibot_head" not in network.parts():  # tied
            heads = {k: v for k, v in heads.items() if not k.startswith("ibot_head.")}
        write_state(heads, folder / "heads.safetensors")
    wait()


class OnlineKnn:
    """A quick k-NN reading on a few thousand images while a run learns."""

    def __init__(self, world: World, size: int):
        self.ready, self.n_queries = world.test is not None, 0
        if self.ready:
            bank, queries = world.train.labelled(), world.test.labelled()
            bank, queries = bank.select(some(len(bank), ONLINE_BANK)), queries.select(some(len(queries), ONLINE_QUERIES))
            self.labels, self.n_queries = (bank.labels, queries.labels), len(queries)
            self.images = bank.squares(size), queries.squares(size)

    def __call__(self, backbone: VisionTransformer) -> float:
        bank, queries = (features.extract(backbone, images, progress=False)["cls"] for images in self.images)
        if not torch.cat([bank, queries]).isfinite().all():
            raise FloatingPointError("the network gives NaN or infinity, the run has diverged: see doctor")
        k = min(K, len(bank))
        return knn_accuracy(bank, self.labels[0], queries, self.labels[1], (k,))[k]
