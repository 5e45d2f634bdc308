"""Where a classifier of frozen features fails: damaged pictures, pictures from elsewhere, slices that an average hides."""

import json
import math
from functools import partial

import numpy as np
import pytest
from painted import BLUE, GREEN, RED, painted
from PIL import Image

from minidino import robust
from minidino.chain import Chain
from minidino.cli import main
from minidino.config import override, preset
from minidino.evaluate import evaluate
from minidino.probes.slices import slice_accuracies, slice_gap
from minidino.questions import read_slices
from minidino.stages import pretrain

SMALL = ["data.n_scenes=120", "data.n_test_scenes=60", "run.steps=3", "optim.batch_size=16", "run.device=cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robust") / "run"
    pretrain(override(preset("scenes-cpu"), SMALL), folder)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A few penalties."""
    monkeypatch.setattr(robust, "logistic_regression", partial(robust.logistic_regression, cs=(0.01, 1.0)))


def table(path, *rows):
    path.write_text("\n".join(",".join(row) for row in rows) + "\n")
    return str(path)


# ---------------------------------------------------------------- damaged pictures


def test_robustness_counts_every_corruption_and_compares_with_the_last_baseline(run, tmp_path):
    found = evaluate(run, "robustness", baselines=("pixels",), out=tmp_path, cache=run.parent / "features")
    answers = found["answers"]
    kinds = answers["trained"]["corrupted"]
    assert len(kinds) >= 10 and all(len(values) == 5 for values in kinds.values())
    assert answers["trained"]["accuracy"] == pytest.approx(np.mean(list(kinds.values())))
    assert answers["colours"]["mce"] == pytest.approx(1) and answers["trained"]["mce"] > 0


def test_a_baseline_without_an_error_leaves_no_mce(run, tmp_path, monkeypatch):
    data = painted(tmp_path / "set", train_a=RED, train_b=BLUE, val_a=RED, val_b=BLUE)
    Image.new("RGB", (32, 32), GREEN).save(tmp_path / "set" / "val" / "of-no-class", "png")  # does not count
    monkeypatch.setattr(robust, "CORRUPTIONS", {"contrast": None, "pixelate": None})
    monkeypatch.setattr(robust, "corrupt", lambda images, name, severity, seed: images)
    found = evaluate(run, "robustness", data, baselines=("pixels",), out=tmp_path / "out", cache=tmp_path / "c")
    assert found["answers"]["colours"]["accuracy"] == 1
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [answer["mce"] for answer in stored["answers"].values()] == [None] * 3


# ---------------------------------------------------------------- slices by themselves


def test_slices_are_counted_as_by_hand():
    right = np.array([1, 1, 1, 0, 1, 0, 0, 0, 1, 0], bool)
    slices = ["north"] * 4 + ["south"] * 4 + ["", "west"]
    labels = np.array([0, 0, 1, 1, 0, 1, 1, 1, 0, 1])
    found = slice_accuracies(right, slices, labels)
    assert list(found) == ["west", "south", "north"]  # the worst first; the picture of no slice is left out
    assert (found["north"]["n"], found["north"]["accuracy"]) == (4, 0.75)
    z, p, n = 1.959964, 0.75, 4  # Wilson 1927, equation 4
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert found["north"]["low"] == pytest.approx((middle - half) / (1 + z * z / n), abs=1e-6)
    assert found["north"]["high"] == pytest.approx((middle + half) / (1 + z * z / n), abs=1e-6)
    assert found["south"]["by_classes"] == pytest.approx((1 + 3 * 1 / 6) / 4)  # class 0: 3 of 3 right, class 1: 1 of 6
    assert found["west"]["by_classes"] == pytest.approx(1 / 6)


def test_a_slice_of_hard_classes_is_no_hard_slice():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 2000)
    slices = np.where(rng.random(2000) < 0.1 + 0.8 * labels, "dark", "light")  # class 1 is mostly dark
    right = rng.random(2000) < 0.9 - 0.5 * labels  # and hard; the light does not matter
    by_class, by_all = slice_gap(right, slices, labels), slice_gap(right, slices)
    assert by_class["gap"] == by_all["gap"] > 0.3
    assert by_all["p"] == 1 / 1001 and by_all["by_lot"] < 0.05  # as if slices differed
    assert by_class["p"] > 0.05 and by_class["by_lot"] == pytest.approx(by_class["gap"], abs=0.05)
    found = slice_accuracies(right, slices, labels)
    assert all(x["low"] < x["by_classes"] < x["high"] for x in found.values())
    hard = right & ~((slices == "dark") & (rng.random(2000) < 0.3))
    assert slice_gap(hard, slices, labels)["p"] == 1 / 1001


def test_gaps_that_mean_nothing_have_every_p():
    rng = np.random.default_rng(1)
    ps = []
    for i in range(150):
        labels, slices = rng.integers(0, 3, 300), rng.integers(0, 4, 300).astype(str)
        ps.append(slice_gap(rng.random(300) < 0.3 + 0.2 * labels, slices, labels, shuffles=99, seed=i)["p"])
    assert 0.4 < np.mean(ps) < 0.6 and np.mean(np.array(ps) <= 0.1) < 0.17 and np.mean(np.array(ps) <= 0.5) > 0.38


def test_small_slices_are_told_and_do_not_count():
    right = np.array([True] * 30 + [False] * 15 + [True] * 15 + [False] * 19)
    slices = ["a"] * 30 + ["b"] * 30 + ["c"] * 19
    assert slice_accuracies(right, slices, np.zeros(79))["c"]["accuracy"] == 0
    assert slice_gap(right, slices)["gap"] == 0.5
    lonely = slice_gap(right[:30], slices[:30])
    assert all(math.isnan(value) for value in lonely.values())
    with pytest.raises(ValueError, match="no picture has a slice"):
        slice_gap(right, [""] * 79)
    with pytest.raises(ValueError, match="as many slices and labels as answers, got 78, 79, 79"):
        slice_accuracies(right, slices[1:], np.zeros(79))


# ---------------------------------------------------------------- tables of slices


def test_a_table_names_files_as_people_do(tmp_path):
    path = table(tmp_path / "s.csv", ("region", "file", "income"), ("Asia", "val/a/0.png", "low"), ("Europe", "val/a/1", ""),
                 ("Africa", "2", "high"), ("Asia", "train/a/9.png", "low"), ("Asia",))  # fmt: skip
    found = read_slices(path, ["val/a/0.png", "val/a/1.png", "val/b/2.png", "val/b/3.png"])
    assert found == {"region": ["Asia", "Europe", "Africa", ""], "income": ["low", "", "high", ""]}


@pytest.mark.parametrize(
    "rows, words",
    [
        ([("file", "region"), ("9.png", "Asia")], "names none of the 2 held-out pictures, such as a/0.png"),
        ([("name", "region"), ("a/0.png", "Asia")], "expected a column file and at least one other"),
        ([("file",), ("a/0.png",)], "expected a column file and at least one other"),
        ([("file", "region")], "expected a column file and at least one other"),
        ([("file", "region"), ("a/0.png", "Asia"), ("0", "Africa")], "0 has two values of region, Asia and Africa"),
    ],
)
def test_tables_that_say_nothing_are_refused(tmp_path, rows, words):
    with pytest.raises(ValueError, match=words):
        read_slices(table(tmp_path / "s.csv", *rows), ["a/0.png", "a/1.png"])


def test_a_table_is_text(tmp_path):
    (tmp_path / "s.csv").write_bytes(b"file,region\na/0.png,\xff\xfe")
    with pytest.raises(ValueError, match="expected text in UTF-8"):
        read_slices(tmp_path / "s.csv", ["a/0.png"])


# ---------------------------------------------------------------- asked of a network


def test_slices_are_asked_of_every_subject(run, tmp_path):
    data = painted(tmp_path / "set", 24, train_a=RED, train_b=BLUE, val_a=RED, val_b=BLUE)
    odd = [(f"val/{name}/{i}.png", "odd" if i % 2 else "even", "") for name in "ab" for i in range(24)]
    told = table(tmp_path / "s.csv", ("file", "number", "unknown"), *odd)
    out = tmp_path / "out"
    found = evaluate(run, "slices", data, None, ("pixels",), out, cache=tmp_path / "c", slices=told)
    assert list(found["answers"]) == ["trained", "pixels", "colours"] and "of the worst slice" in found["row"]
    colours = found["answers"]["colours"]
    assert colours["worst"] == colours["accuracy"] == 1 and set(colours["cuts"]) == {"class", "number"}
    assert [x["n"] for x in colours["cuts"]["class"]["slices"].values()] == [24, 24]
    assert colours["cuts"]["number"]["gap"] == 0 and colours["cuts"]["number"]["p"] == 1
    trained = found["answers"]["trained"]
    worst = min(x["accuracy"] for cut in trained["cuts"].values() for x in cut["slices"].values())
    assert trained["worst"] == worst
    page = (out / "report.html").read_text()
    said = "number: odd", "class: a", "by its classes", "top-1 of all", "drawn by lot, within classes"
    assert all(words in page for words in said)
    assert np.asarray(Image.open(out / "figure.png")).std() > 5


def test_without_a_table_the_classes_are_the_slices(run, tmp_path):
    data = painted(tmp_path / "set", 20, train_a=RED, train_b=BLUE, val_a=RED, val_b=BLUE)
    for i in range(17):
        (tmp_path / "set" / "val" / "b" / f"{i}.png").unlink()
    found = evaluate(run, "slices", data, out=tmp_path / "out", cache=tmp_path / "c")
    cuts = found["answers"]["trained"]["cuts"]
    assert list(cuts) == ["class"] and {name: x["n"] for name, x in cuts["class"]["slices"].items()} == {"a": 20, "b": 3}
    stored = json.loads((tmp_path / "out" / "results.json").read_text())["answers"]["trained"]
    assert stored["worst"] == cuts["class"]["slices"]["a"]["accuracy"]
    assert stored["cuts"]["class"]["gap"] is None  # from what has three pictures nothing can be apart
    with pytest.raises(ValueError, match="expected a slice of 20 held-out pictures or more, the largest has"):
        evaluate(run, "slices", out=tmp_path / "few", cache=run.parent / "features")  # 60 scenes of ten kinds


def test_elsewhere_only_the_classes_of_elsewhere_can_be_named(run, tmp_path, capsys):
    data = painted(tmp_path / "set", train_a=RED, train_b=GREEN, train_c=BLUE, val_a=RED, val_b=GREEN, val_c=BLUE)
    swapped = painted(tmp_path / "swapped", 4, a=BLUE, c=RED)  # by colour all of it is wrong
    alone = painted(tmp_path / "alone", 4, a=BLUE, unheard=GREEN)  # nothing but a can be said
    with pytest.warns(UserWarning, match="4 of 8 pictures of .*alone are of no known class"):
        found = evaluate(run, "shift", data, None, ("pixels",), tmp_path / "out", cache=tmp_path / "c",
                         shifted=(swapped, alone))  # fmt: skip
    sets = found["answers"]["colours"]["sets"]
    assert sets["swapped"] == {"accuracy": 0, "held_out": 1, "n": 8, "n_held_out": 16, "n_classes": 2}
    assert sets["alone"] == {"accuracy": 1, "held_out": 1, "n": 4, "n_held_out": 8, "n_classes": 1}
    assert found["answers"]["colours"]["accuracy"] == 0.5 and found["answers"]["colours"]["held_out"] == 1
    assert "held out, the same classes" in (tmp_path / "out" / "report.html").read_text()
    assert np.asarray(Image.open(tmp_path / "out" / "figure.png")).std() > 5
    words = ["probe", str(run), "--task", "shift", "--data", data, "--out", str(tmp_path / "o2"), "--shifted"]
    assert main([*words, painted(tmp_path / "other", 2, x=RED, y=BLUE)]) == 2
    assert "has no pictures in folders of the classes a, b, c" in capsys.readouterr().err


def test_a_chain_has_nothing_from_elsewhere():
    assert Chain(tasks=("slices",)).tasks == ("slices",)
    with pytest.raises(ValueError, match="expected some of knn, .*slices.*, got shift"):
        Chain(tasks=("shift",))
