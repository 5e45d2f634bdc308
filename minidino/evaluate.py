"""`minidino probe`: one question about what a backbone knows, asked of it and of what it should beat.

    evaluate(source, task, data) -> results.json, figure.png, report.html and one row for a README, in a folder

    knn           class of a picture by a vote of its neighbours
    linear        the published grid of linear heads
    logreg        logistic regression, also on a few pictures of each class
    finetune      class of a picture by the network itself, trained on labels, beside a linear head on the frozen one
    robustness    logistic regression on corrupted pictures
    shift         the same on pictures of the same classes from elsewhere
    slices        the same on each slice of the pictures
    retrieval     other pictures of the same thing or place
    segmentation  class of every pixel, from one and from four blocks, and by neighbours alone
    depth         distance of every pixel, from one and from four blocks
    dpt           the same by a decoder of convolutions on four blocks, beside the linear head on them
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minidino import looking, pictures
from minidino.images.pixels import some
from minidino.probes.depth import linear_depth, predict_depth
from minidino.probes.dpt import dpt_depth
from minidino.probes.finetune import finetune
from minidino.probes.grid import linear_grid
from minidino.probes.knn import knn_accuracy
from minidino.probes.linear import linear_probe
from minidino.probes.logistic import logistic_regression, low_shot
from minidino.probes.propagation import knn_segmentation
from minidino.probes.retrieval import PROTOCOLS, leave_one_out, mean_average_precision, similarity
from minidino.probes.segmentation import linear_segmentation, predict
from minidino.questions import Answers, Dense, Grouped, Labelled, Landmarks, Size, open_question
from minidino.report import Section, write_report
from minidino.robust import ask_robustness, ask_shift, ask_slices, slice_rows, slice_words
from minidino.runs import alone_in, environment, expect_no_run, pick_device, write_atomically
from minidino.subjects import Subject, cache_in, subjects_of

Draw = Callable[[nn.Module, Tensor, np.ndarray], None]  # a head, maps of some pictures, which pictures
SHOTS = (1, 5, 10)  # labelled pictures of each class
SHOWN = 5  # pictures of a sheet
HEADS: dict[str, dict[str, Any]] = {  # few of the published steps, so at higher rates
    "segmentation": {"steps": 1000, "lr": 1e-2},
    "depth": {"steps": 600, "lr": 2e-2, "batch_norm": True},  # BatchNorm as in DINOv3
    "dpt": {"steps": 300, "channels": 32},  # an eighth of the published width
    "finetune": {"steps": 500},
}
VOTERS, VOTED = 5000, 40  # patches of the bank, and pictures, where neighbours name pixels


@dataclass(frozen=True)
class Task:
    """One question. data: as for `open_question`; score: the number that a table shows, `unit` what it is, `up` whether
    more is better; beside: what a report holds it against, in words, and where an answer has it."""

    ask: Callable[..., Answers]
    data: str
    score: str
    unit: str
    up: bool = True
    beside: tuple[str, str] | None = None


# ---------------------------------------------------------------- whole pictures


def ask_knn(subjects: Sequence[Subject], data: Labelled, folder: Path) -> Answers:
    """Top-1 of the vote of 10, 20, 100 and 200 neighbours, as far as there are so many; 20 count."""
    found = {}
    for subject in subjects:
        bank, labels, queries, truth = data.rows(subject)
        ks = [k for k in (10, 20, 100, 200) if k <= (labels >= 0).sum()] or [1]
        by_k = knn_accuracy(bank, labels, queries, truth, ks)
        k = 20 if 20 in by_k else ks[0]
        found[subject.name] = {"accuracy": by_k[k], "k": k, "by_k": by_k}
    _bars(found, data, folder, f"k-NN top-1, k = {k}")
    return found


def ask_linear(subjects: Sequence[Subject], data: Labelled, folder: Path) -> Answers:
    """Top-1 of the published grid of heads; of one head by SGD where there are no patches to average."""
    found = {}
    for subject in subjects:
        labels = data.train.pixels.labels, data.test.pixels.labels
        bank, queries = data.train.features(subject), data.test.features(subject)
        if "mean_patch" in bank:
            blocks = (1, 4) if bank["cls_blocks"].shape[1] >= 4 else (1,)
            found[subject.name] = linear_grid(bank, labels[0], queries, labels[1], blocks=blocks)
        else:
            found[subject.name] = linear_probe(*data.rows(subject), epochs=10)
    _bars(found, data, folder, "linear top-1")
    return found


def ask_logistic(subjects: Sequence[Subject], data: Labelled, folder: Path) -> Answers:
    """Top-1 of logistic regression with all labels, and with a few of each class."""
    found = {}
    for subject in subjects:
        rows = data.rows(subject)
        fewest = np.unique(rows[1][rows[1] >= 0], return_counts=True)[1].min()  # of the classes that occur
        few = low_shot(*rows, ns=[n for n in SHOTS if n <= fewest])
        found[subject.name] = logistic_regression(*rows) | {"low_shot": few}
        del found[subject.name]["model"]
    _bars(found, data, folder, "logistic regression, top-1")
    return found


def ask_finetune(subjects: Sequence[Subject], data: Labelled, folder: Path) -> Answers:
    """Of networks alone, the untrained one from scratch; each as it stands is asked for a linear head, too."""
    found, size = {}, data.train.size
    for subject in (subject for subject in subjects if subject.vit):
        answer = finetune(subject.vit, data.train.pixels, data.test.pixels, size, **HEADS["finetune"])
        linear = linear_probe(*data.rows(subject), epochs=10)
        found[subject.name] = {"accuracy": answer["accuracy"], "linear": linear["accuracy"]}
    _bars(found, data, folder, "fine-tuned top-1")
    return found


def _bars(found: Answers, data: Labelled, folder: Path, metric: str) -> None:
    """What was reached, with the standard error of a share."""
    n = int((data.test.pixels.labels >= 0).sum())
    bars = {name: (a["accuracy"], math.sqrt(a["accuracy"] * (1 - a["accuracy"]) / n)) for name, a in found.items()}
    pictures.baselines_bar(bars, folder / "figure.png", metric)


# ---------------------------------------------------------------- things and places


def ask_retrieval(subjects: Sequence[Subject], data: Grouped | Landmarks, folder: Path) -> Answers:
    """mAP with every picture of a group as a query, or by the protocols that have positives, with and without cutting
    queries out."""
    found: Answers = {}
    for subject in subjects:
        if isinstance(data, Grouped):
            answer = leave_one_out(data.tokens(subject), data.groups)
        else:
            answer = _by_protocol(subject, data)
        found[subject.name] = {key: value for key, value in answer.items() if key != "ap"}
    bars = {name: (answer["map"], 0.0) for name, answer in found.items()}
    pictures.baselines_bar(bars, folder / "figure.png", "mean average precision")
    return found


def _by_protocol(subject: Subject, data: Landmarks) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    bank = data.database.tokens(subject)
    for how, queries in data.queries.items():
        near = similarity(queries.tokens(subject), bank)
        for protocol, (positives, _) in PROTOCOLS.items():
            if protocol != "medium" and not any(getattr(query, name) for query in data.truth for name in positives):
                continue  # without hard entries there is easy and medium
            answer[f"{protocol}, {how} queries"] = mean_average_precision(near, data.truth, protocol)["map"]
    return answer | {"map": answer["medium, cropped queries"]}


# ---------------------------------------------------------------- pixels


def ask_segmentation(subjects: Sequence[Subject], data: Dense, folder: Path) -> Answers:
    """mIoU over pixels of a linear head, on the last block and on four; the vote of similar patches beside it."""
    classes, patch_size = data.pairs.classes, subjects[0].vit.patch_size
    train_masks, masks = data.train.targets, data.test.targets
    few = some(len(masks), VOTED)

    def fit(train: Tensor, test: Tensor, reading: str) -> dict[str, Any]:
        answer = linear_segmentation(
            train, train_masks, test, masks, len(classes), classes=classes, patch_size=patch_size,
            **HEADS["segmentation"],
        )  # fmt: skip
        if reading == "last":
            vote = knn_segmentation(
                train, train_masks, test[few], masks[few], len(classes), n_patches=VOTERS, patch_size=patch_size
            )
            answer["neighbours"] = vote | {"n_pictures": len(few)}
        return answer

    def draw(head: nn.Module, maps: Tensor, shown: np.ndarray) -> None:
        predicted = torch.cat(list(predict(head, maps, masks.shape[1:], patch_size)))
        looking.segmentation_sheet(data.test.images[shown], masks[shown], predicted, classes, folder / "figure.png")

    return _ask_pixels(subjects, data, ("last", "last4"), fit, draw)


def ask_depth(subjects: Sequence[Subject], data: Dense, folder: Path) -> Answers:
    """Errors of the distance, in m, of the linear heads lin1 and, with four blocks, lin4."""
    given, draw = _asking_depth(subjects, data, folder)

    def fit(train: Tensor, test: Tensor, reading: str) -> dict[str, Any]:
        answer = linear_depth(train, data.train.targets, test, data.test.targets, **given, **HEADS["depth"])
        return answer | ({"max_depth_m": given["max_depth"]} if reading == "lin1" else {})

    return _ask_pixels(subjects, data, ("lin1", "lin4") if subjects[0].vit.depth >= 4 else ("lin1",), fit, draw)


def ask_dpt(subjects: Sequence[Subject], data: Dense, folder: Path) -> Answers:
    """Of networks alone: what has no blocks has nothing that this decoder could read."""
    given, draw = _asking_depth(subjects, data, folder)

    def fit(train: Tensor, test: Tensor, reading: str) -> dict[str, Any]:
        targets = data.train.targets, test, data.test.targets
        linear = linear_depth(train, *targets, **given, **HEADS["depth"])
        answer = dpt_depth(train, *targets, **given, **HEADS["dpt"])
        del linear["head"]
        return answer | {"linear": linear, "max_depth_m": given["max_depth"]}

    return _ask_pixels([x for x in subjects if x.vit and not x.base], data, ("lin4",), fit, draw)


def _asking_depth(subjects: Sequence[Subject], data: Dense, folder: Path) -> tuple[dict[str, Any], Draw]:
    """What every head for distances is told, and how its answers are drawn."""
    patch_size, depth = subjects[0].vit.patch_size, data.test.targets
    farthest = float(max(10.0, math.ceil(data.train.targets.max())))  # 10 m, as published for rooms; scenes go further

    def draw(head: nn.Module, maps: Tensor, shown: np.ndarray) -> None:
        predicted = torch.cat(list(predict_depth(head, maps, depth.shape[1:], patch_size)))
        looking.depth_sheet(data.test.images[shown], depth[shown], predicted, folder / "figure.png")

    return {"max_depth": farthest, "patch_size": patch_size}, draw


def _ask_pixels(
    subjects: Sequence[Subject],
    data: Dense,
    readings: Sequence[str],
    fit: Callable[[Tensor, Tensor, str], dict[str, Any]],
    draw: Draw,
) -> Answers:
    """A head for each subject on the first reading; the first subject is read in every way, and its last head drawn."""
    found: Answers = {}
    for subject in subjects:
        for reading in readings if subject is subjects[0] else readings[:1]:
            train, test = data.maps(subject, reading)
            answer = fit(train, test, reading)
            head = answer.pop("head")
            if reading == readings[0]:
                found[subject.name] = answer
            else:
                found[subject.name]["four_blocks"] = answer
        if subject is subjects[0]:
            shown = some(len(test), SHOWN)
            draw(head, test[shown], shown)
    return found


# ---------------------------------------------------------------- the whole


TASKS = {
    "knn": Task(ask_knn, "labelled", "accuracy", "top-1"),
    "linear": Task(ask_linear, "labelled", "accuracy", "top-1"),
    "logreg": Task(ask_logistic, "labelled", "accuracy", "top-1"),
    "finetune": Task(ask_finetune, "labelled", "accuracy", "top-1", beside=("a linear head", "linear")),
    "robustness": Task(ask_robustness, "labelled", "accuracy", "top-1 under corruption"),
    "shift": Task(ask_shift, "labelled", "accuracy", "top-1 elsewhere", beside=("held out, the same classes", "held_out")),
    "slices": Task(ask_slices, "labelled", "worst", "top-1 of the worst slice", beside=("top-1 of all", "accuracy")),
    "retrieval": Task(ask_retrieval, "grouped", "map", "mAP"),
    "segmentation": Task(ask_segmentation, "segmentation", "miou", "mIoU"),
    "depth": Task(ask_depth, "depth", "rmse", "RMSE (m)", up=False),
    "dpt": Task(ask_dpt, "depth", "rmse", "RMSE (m)", up=False, beside=("a linear head", "linear")),
}


def evaluate(
    source: str | Path,
    task: str = "knn",
    data: str | None = None,
    size: Size | None = None,
    baselines: Sequence[str] = (),
    out: str | Path | None = None,
    truth: str | None = None,
    cache: str | Path = "runs/features",
    depth_unit: float | None = None,
    slices: str | None = None,
    shifted: Sequence[str] = (),
) -> dict[str, Any]:
    """Ask one question about frozen features, and write down the answer.

    Args:
        source: a run folder, or weights in any layout or by any name that `load_weights` reads.
        task: one of TASKS.
        data: pictures with what the task needs; None takes a run's own.
        size: px: the side of the evaluated square, or (height, width) for segmentation, depth and dpt. None: a run's
            global crop, 224 for weights; for these three the size of the pictures.
        baselines: "random" and "pixels": see `subjects_of`; "finetune" and "dpt" are asked of networks alone.
        out: folder of results.json, figure.png and report.html; None: runs/probe-DATA-TASK.
        truth: a JSON file of queries for retrieval (`read_ground_truth`); None: groups.csv or a folder for each thing.
        cache: where descriptions are kept, if it can be written; all tasks share them.
        depth_unit: metres per unit of the files of depth and dpt; None: millimetres for integers, metres for floats.
        slices: a CSV of what held-out pictures are, for slices (`read_slices`); None: they are cut by class alone.
        shifted: folders of pictures from elsewhere, for shift, with a folder for each of the same classes.
    Returns:
        What results.json holds: "answers" {subject: {...}}, "row" for a README, seconds, sizes, environment.
    Raises:
        FileExistsError: the folder holds a run, or what another network answered.
        BlockingIOError: another probe is at work there.
        ValueError: another task; pictures that lack labels, groups or pairs; weights without data; a size below 1 px; a
            network of other channels than three, which robustness and the tasks of pixels cannot ask; features that are
            not finite.
    """
    if task not in TASKS:
        raise ValueError(f"expected a task of {', '.join(TASKS)}, got {task!r}")
    question, begun = TASKS[task], time.perf_counter()
    given = {"truth": (truth, ("retrieval",)), "depth_unit": (depth_unit, ("depth", "dpt")), "slices": (slices, ("slices",)),
             "shifted": (shifted or None, ("shift",))}  # fmt: skip
    for name, (value, tasks) in given.items():
        if value is not None and task not in tasks:
            raise ValueError(f"{name} goes with {', '.join(tasks)}, not with {task}")
    subjects, config = subjects_of(source, baselines, dense=question.data in ("segmentation", "depth"))
    if data is None and config is None:
        raise ValueError(f"{source} is not a run folder: say which images to judge it on with --data")
    if question.data == "grouped" and data is None and config.data.source == "scenes":
        raise ValueError("drawn scenes are in no groups: say with --data which pictures show the same things")
    channels = subjects[0].vit.patch_embed.proj.in_channels
    if channels != 3 and (task == "robustness" or question.data in ("segmentation", "depth")):
        raise ValueError(f"{task} is asked with pictures of red, green and blue: {source} sees {channels} channels")
    store = cache_in(Path(cache))
    opened, about = open_question(question.data, data, size, truth, config, store, channels, depth_unit, slices, shifted)
    folder = Path(out or f"runs/probe-{about['data'].replace(' ', '-')}-{task}")
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        _expect_room(folder, source)
        answers = question.ask(subjects, opened, folder)
        found = {
            "task": task, **about, "answers": answers, "row": row(about["data"], task, answers),
            "report": str(folder / "report.html"), "seconds": round(time.perf_counter() - begun, 1), "source": str(source),
            "environment": environment(0, pick_device()),
        }  # fmt: skip
        write_atomically(folder / "results.json", json.dumps(_without_nan(found), indent=1, allow_nan=False).encode())
        _report(found, folder)
    return found


def _expect_room(folder: Path, source: str | Path) -> None:
    """Raise FileExistsError where results.json and report.html of something else would be lost."""
    expect_no_run(folder)
    path = folder / "results.json"
    try:
        said = json.loads(path.read_text())["source"] if path.exists() else str(source)
    except (ValueError, KeyError, TypeError):
        said = "something else"
    if Path(said).resolve() != Path(source).resolve():
        raise FileExistsError(f"{path} tells of {said}: choose another folder with --out, or remove this one")


def _without_nan(x: Any) -> Any:
    """What JSON can hold: null where there is no number, such as the IoU of a class that is nowhere."""
    if isinstance(x, dict):
        return {key: _without_nan(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_without_nan(value) for value in x]
    return None if isinstance(x, float) and math.isnan(x) else x


def row(data: str, task: str, answers: Answers) -> str:
    """One line of a Markdown table: | data | task | number | who: what, who: what |."""
    question = TASKS[task]
    cells = ", ".join(f"{name} {answer[question.score]:.3f}" for name, answer in answers.items())
    return f"| {data} | {task} | {question.unit} | {cells} |"


def _report(found: dict[str, Any], folder: Path) -> None:
    task = TASKS[found["task"]]
    who, first = next(iter(found["answers"].items()))
    numbers = [("features", task.unit), *((name, a[task.score]) for name, a in found["answers"].items())]
    if task.beside:
        words, key = task.beside
        values = [a[key] for a in found["answers"].values()]
        column = [words, *(x[task.score] if isinstance(x, dict) else x for x in values)]
        numbers = [(*row, cell) for row, cell in zip(numbers, column, strict=True)]
    size = " x ".join(map(str, np.atleast_1d(found["size_px"])))
    words = f"{found['data']}, {size} px, {'more' if task.up else 'less'} is better."
    sections = [Section(found["task"], words, folder / "figure.png", numbers)]
    if "table" in first and found["task"] == "segmentation":
        rows = [("class", "IoU"), *first["table"].items()]
        sections.append(Section("Class by class", f"Intersection over union: {who}.", table=rows))
    if found["task"] == "slices":
        sections.append(Section("Slice by slice", slice_words(first, who), table=slice_rows(first)))
    write_report(folder / "report.html", f"minidino probe: {found['data']}", sections)
