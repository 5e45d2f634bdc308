"""The tasks of `minidino probe` that ask where a classifier of frozen features fails, though it does well on average.

All fit logistic regression on the training pictures as they are; then it is judged on damaged pictures, on pictures from
elsewhere, and slice by slice.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minidino import pictures
from minidino.images.corruptions import CORRUPTIONS, corrupt, mean_corruption_error
from minidino.images.pixels import some
from minidino.probes.logistic import LogisticModel, logistic_regression
from minidino.probes.slices import SMALLEST, slice_accuracies, slice_gap
from minidino.questions import Answers, Described, Labelled
from minidino.subjects import Subject

N_CORRUPTED = 500  # held-out pictures that are corrupted, each in every way
SHOWN = 20  # slices of a figure, the worst and the best of each way to cut


def ask_robustness(subjects: Sequence[Subject], data: Labelled, folder: Path) -> Answers:
    """Top-1 on the same held-out pictures, clean and corrupted; the classifier has seen clean pictures alone."""
    known = data.test.pixels.labelled()
    clean = known.select(some(len(known), N_CORRUPTED))
    images, truth = clean.squares(data.test.size), torch.from_numpy(clean.labels)
    fitted = {subject.name: logistic_regression(*data.rows(subject))["model"] for subject in subjects}

    def share_right(subject: Subject, pictures: Tensor) -> float:
        seen = torch.as_tensor(subject.whole(pictures)["cls_blocks"])[:, -1]
        return float((fitted[subject.name].predict(seen) == truth).double().mean())

    found: Answers = {s.name: {"clean": share_right(s, images), "corrupted": {}} for s in subjects}
    for name in tqdm(CORRUPTIONS, unit="corruptions", leave=False):
        for severity in range(1, 6):
            changed = corrupt(images, name, severity, seed=0)
            for subject in subjects:
                found[subject.name]["corrupted"].setdefault(name, []).append(share_right(subject, changed))
    for answer in found.values():
        answer["accuracy"] = float(np.mean(list(answer["corrupted"].values())))
    errors = {who: {name: [1 - x for x in xs] for name, xs in a["corrupted"].items()} for who, a in found.items()}
    baseline = errors[subjects[-1].name]
    comparable = all(sum(xs) > 0 for xs in baseline.values())  # nothing is so and so many times as bad as no error
    for who, answer in found.items():  # each against the last baseline: 1 is as bad
        answer["mce"] = mean_corruption_error(errors[who], baseline)["mce"] if comparable else None
    pictures.severity_curves({name: a["corrupted"] for name, a in found.items()}, folder / "figure.png")
    return found


def ask_shift(subjects: Sequence[Subject], data: Labelled, folder: Path) -> Answers:
    """Top-1 on pictures of the same classes from elsewhere, such as ImageNet-A, -R or Sketch, beside held-out pictures of
    these classes; only classes that occur elsewhere can be named, as published for sets of some classes.

    Source: DINOv2 paper, table 6; official dinov2/eval/linear.py, LinearPostprocessor (class_mapping).
    """
    if not data.shifted:
        raise ValueError("shift needs pictures from elsewhere, a folder for each class: name them with --shifted")
    found: Answers = {}
    for subject in subjects:
        model, sets = logistic_regression(*data.rows(subject))["model"], {}
        for name, other in data.shifted.items():
            classes = torch.as_tensor(other.pixels.labelled().labels).unique()
            right, here = (_right(model, subject, pictures, classes) for pictures in (other, data.test))
            sets[name] = {"accuracy": right.mean(), "held_out": here.mean() if len(here) else math.nan,
                          "n": len(right), "n_held_out": len(here), "n_classes": len(classes)}  # fmt: skip
        found[subject.name] = {key: float(np.mean([x[key] for x in sets.values()])) for key in ("accuracy", "held_out")}
        found[subject.name]["sets"] = sets
    rows = {}
    for name in data.shifted:
        for words, key, n in ((name, "accuracy", "n"), (f"held out, classes of {name}", "held_out", "n_held_out")):
            rows[words] = {who: (a["sets"][name][key], a["sets"][name][n]) for who, a in found.items()}
    who, first = next(iter(found.items()))
    words = f"{who} reaches {first['accuracy']:.1%} elsewhere, {first['held_out']:.1%} on held-out pictures of the same classes"
    pictures.shares(rows, folder / "figure.png", words)
    return found


def ask_slices(subjects: Sequence[Subject], data: Labelled, folder: Path) -> Answers:
    """Top-1 on each slice of the held-out pictures: on each class, and on what a table says of them; the worst counts.

    Raises:
        ValueError: no slice has 20 pictures.
    Source: DINOv2 paper, section 8.1 and table 12 (incomes and regions of Dollar Street, after Goyal et al. 2022).
    Differs: the published protocol lets a thing of Dollar Street be any of several classes of ImageNet.
    """
    labelled = data.test.pixels.labels >= 0
    truth, classes = data.test.pixels.labels[labelled], np.array(data.test.pixels.classes)
    tables = {name: np.array(values)[labelled] for name, values in data.slices.items()}
    tables = {"class": classes[truth]} | {name: values for name, values in tables.items() if (values != "").any()}
    largest = max(np.unique(values[values != ""], return_counts=True)[1].max() for values in tables.values())
    if largest < SMALLEST:
        raise ValueError(f"expected a slice of {SMALLEST} held-out pictures or more, the largest has {largest}")
    found: Answers = {}
    for subject in subjects:
        model = logistic_regression(*data.rows(subject))["model"]
        right, cuts = _right(model, subject, data.test, torch.as_tensor(truth).unique()), {}
        for name, values in tables.items():
            within = None if name == "class" else truth
            cuts[name] = {"slices": slice_accuracies(right, values, truth)} | slice_gap(right, values, within)
        counted = [x["accuracy"] for cut in cuts.values() for x in cut["slices"].values() if x["n"] >= SMALLEST]
        found[subject.name] = {"accuracy": right.mean(), "worst": min(counted), "cuts": cuts}
    rows = {}
    for cut, told in found[subjects[0].name]["cuts"].items():
        values = list(told["slices"])
        for value in values if len(values) <= SHOWN else values[: SHOWN // 2] + values[-SHOWN // 2 :]:
            here = {who: answer["cuts"][cut]["slices"][value] for who, answer in found.items()}
            rows[f"{cut}: {value}"] = {who: (x["accuracy"], x["n"]) for who, x in here.items()}
    who, first = next(iter(found.items()))
    words = f"{who} reaches {first['accuracy']:.1%} on average, {first['worst']:.1%} on the worst slice"
    pictures.shares(rows, folder / "figure.png", words)
    return found


def slice_words(answer: dict[str, Any], who: str) -> str:
    """What the gaps of one subject are, for a report."""
    lines = [f"Top-1 of {who}, the worst first, with intervals of 95 %; by its classes: what a slice would come to if its "
             "pictures were named rightly as often as all of their classes."]  # fmt: skip
    for cut, told in answer["cuts"].items():
        if not math.isnan(told["gap"]):
            lines.append(f"{cut}: from the worst to the best it is {told['gap']:.3f}; between slices drawn by lot"
                         f"{'' if cut == 'class' else ', within classes,'} {told['by_lot']:.3f} on average, and as much or more "
                         f"with p = {told['p']:.3f}.")  # fmt: skip
    return "\n\n".join(lines)


def slice_rows(answer: dict[str, Any]) -> list[tuple[object, ...]]:
    """A table of all slices of one subject, for a report."""
    rows: list[tuple[object, ...]] = [("slice", "pictures", "top-1", "from", "to", "by its classes")]
    for cut, told in answer["cuts"].items():
        rows += [(f"{cut}: {value}", x["n"], x["accuracy"], x["low"], x["high"], x["by_classes"])
                 for value, x in told["slices"].items()]  # fmt: skip
    return rows


def _right(model: LogisticModel, subject: Subject, judged: Described, classes: Tensor) -> np.ndarray:
    """Of the pictures of some classes, whether each is named rightly when only these classes can be named."""
    labels = torch.as_tensor(judged.pixels.labels)
    rows = torch.isin(labels, classes)
    logits = model.logits(judged.tokens(subject)[rows])
    logits[:, ~torch.isin(model.classes, classes)] = -math.inf
    return (model.classes[logits.argmax(1)] == labels[rows]).numpy()
