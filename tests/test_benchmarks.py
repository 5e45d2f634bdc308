"""The benchmarks of loader and step at toy sizes: everybody runs, and everybody computes the same."""

import importlib
import io
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"environment": {"machine": "M", "threads": 1, "date": "2026-01-01", "commit": "c", "versions": {"torch": "t"}}}


@pytest.fixture
def benchmark(monkeypatch):
    """Import a file of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_the_loader_is_measured_and_told(benchmark):
    loader, threads = benchmark("loader"), torch.get_num_threads()
    found = loader.measure(toy=True)
    assert torch.get_num_threads() == threads and "environment" not in found
    assert set(found["crops"]) == set(loader.CROPPERS) and set(found["decoding"]) == set(loader.DECODERS)
    for row in (*found["crops"].values(), *found["decoding"].values(), *found["loading"].values()):
        assert 0 < row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"] and row["per_s"] > 0
    assert found["crops"]["ours"]["first_is_faster"]["median"] == 1.0
    told = loader.table(json.loads(json.dumps(found | ENVIRONMENT)), {"ours_per_s": 1.5} | ENVIRONMENT)
    assert all(name in told for name in loader.CROPPERS) and "1.50 on 1 threads" in told


def test_everybody_cuts_the_same_number_of_the_same_crops(benchmark):
    loader = benchmark("loader")
    found = loader.pictures(None, toy=True)
    whole, small = loader.cropper("ours", found, toy=True)(0)
    assert whole.shape == (2, 4, 3, 32, 32) and small.shape == (2, 4, 3, 16, 16)
    for name in loader.CROPPERS[1:]:
        views = loader.cropper(name, found, toy=True)(0)
        assert [[tuple(view.shape) for view in one] for one in views] == [[(3, 32, 32)] * 2 + [(3, 16, 16)] * 2] * 4
        values = torch.cat([view.flatten() for one in views for view in one])
        assert values.dtype == torch.float32 and -2.2 < values.min() < 0 < values.max() < 2.7  # normalised


def test_photographs_are_taken_from_all_over_the_set(benchmark, tmp_path):
    loader = benchmark("loader")
    for i in range(9):
        pixels = np.full((60 + i, 80, 3), 25 * i, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.jpg", quality=95)
    found = loader.pictures(str(tmp_path), toy=True)
    assert [round(found.pixels.image(i).mean() / 25) for i in range(4)] == [0, 2, 4, 6]
    assert found.pixels.sizes.min(axis=1).tolist() == [48] * 4 and "80 x 60 px" in found.words
    decoded = loader.decoders(found)
    theirs = np.asarray(decoded["torchvision"](1)).transpose(1, 2, 0).astype(int)
    assert np.abs(theirs - np.asarray(decoded["PIL"](1))).max() <= 3
    assert np.array_equal(np.asarray(decoded["ours"](1)), np.asarray(Image.open(io.BytesIO(found.files[1]))))
    with pytest.raises(ValueError, match="at least 64 JPEG files, got 9"):
        loader.pictures(str(tmp_path))


def test_turns_rotate_and_the_first_round_only_warms_up(benchmark):
    calls = []
    works = {name: lambda k, name=name: calls.append((k, name)) for name in "abc"}
    found = benchmark("loader").in_turns(works, 3)
    order = ["".join(name for k, name in calls if k == i) for i in range(4)]
    assert order == ["abc", "bca", "cab", "abc"] and found["a"]["ratio"]["median"] == 1.0
    with pytest.raises(ValueError, match="quartiles of 2 turns; expected 3 or more"):
        benchmark("loader").in_turns(works, 2)


def test_the_step_is_measured_and_told(benchmark):
    step = benchmark("step")
    found = step.measure(toy=True)
    for loss in found["losses"].values():
        assert max(loss.values()) == pytest.approx(min(loss.values()), rel=1e-4, abs=1e-6)
    for row in found["drop_path"].values():
        parts = dict(row["parts_s"])
        assert sum(parts.values()) == pytest.approx(2 * parts.pop("whole")) and min(parts.values()) > 0
        assert 0 < row["mfu"] < 1
    told = step.table(json.loads(json.dumps(found)))
    assert all(who in told for who in step.WHO) and "mean nothing" in told


def test_gradients_and_teachers_stay_equal_over_steps(benchmark):
    step = benchmark("step")
    config = step.override(step.settings(toy=True, drop=0.0), ["masks.probability=1.0", "optim.warmup_frac=0.0"])
    batch, _ = step.one_batch(config, toy=True)
    ours, theirs = step.stepper("ours", config, batch), step.stepper("lightly", config, batch)
    for _ in range(3):
        ours.step()
        said = theirs.step()
    assert len(batch.mask_weights) > 4 and all(np.isfinite(value) for value in said.values())
    for mine, other in ((ours.state.student, theirs.student), (ours.state.teacher, theirs.teacher)):
        for name, layer in ((n, m) for n, m in mine.backbone.named_parameters() if "attn.qkv" in n or "fc1" in n):
            torch.testing.assert_close(layer, other["backbone"].vit.get_parameter(name), rtol=0, atol=2e-5)
        weight = other["dino_head"].layers[0].weight
        torch.testing.assert_close(mine.dino_head.mlp[0].weight, weight, rtol=0, atol=2e-5)
    assert (ours.state.student.dino_head.mlp[0].weight - ours.state.teacher.dino_head.mlp[0].weight).abs().max() > 1e-4


def test_clocks_are_taken_away_again(benchmark):
    step = benchmark("step")

    class Thing:
        def work(self):
            return 7

    thing, taken, backward = Thing(), {"work": 0.0, "back": 0.0}, torch.Tensor.backward
    with step.timed({"work": (thing, "work"), "back": (torch.Tensor, "backward")}, taken):
        assert thing.work() == 7 and torch.Tensor.backward is not backward
    assert taken["work"] > 0 and "work" not in vars(thing) and torch.Tensor.backward is backward


def test_operations_are_counted_as_torch_counts_them(benchmark):
    from torch.utils.flop_counter import FlopCounterMode

    step = benchmark("step")
    config = step.settings(toy=True, drop=0.0)
    batch, _ = step.one_batch(config, toy=True)
    plain = step.stepper("plain", step.override(config, ["vit.attention=reference"]), batch)
    with FlopCounterMode(display=False) as counter:
        plain.step()
    # positions are stretched by matrix products
    assert step.operations(config, batch) == pytest.approx(counter.get_total_flops(), rel=0.01)


def main_of(module, monkeypatch, tmp_path, words):
    """Run the command line of a benchmark; what it stores goes elsewhere."""
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results", raising=False)
    monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *words.split()])
    module.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU a whole run is stored")
def test_times_that_mean_nothing_are_not_left_among_the_results(benchmark, monkeypatch, tmp_path, capsys):
    attention, words = benchmark("attention"), "run --shapes S/16 --rivals reference"
    main_of(attention, monkeypatch, tmp_path, words)
    assert "not stored" in capsys.readouterr().out and not (tmp_path / "results").exists()
    main_of(attention, monkeypatch, tmp_path, f"{words} --out mine")
    stored = json.loads((tmp_path / "results" / "mine.json").read_text())
    assert stored["toy"] and [row["rival"] for row in stored["rows"]] == ["reference"]


def test_small_banks_do_not_replace_the_stored_result(benchmark, monkeypatch, tmp_path):
    growth, done = benchmark("growth"), []
    monkeypatch.setattr(growth, "SIZES", (3000, 6000))
    monkeypatch.setattr(growth, "get_context", lambda _: None)
    monkeypatch.setattr(growth, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(growth, "measured", lambda *_: {})
    monkeypatch.setattr(growth, "tables", dict)
    for name in ("store", "put", "draw"):
        monkeypatch.setattr(growth, name, lambda *_, name=name: done.append(name))
    main_of(growth, monkeypatch, tmp_path, "run --rows 3000")
    assert done == []
    main_of(growth, monkeypatch, tmp_path, "run --rows 6000")
    assert done == ["store"] * 4 + ["put", "draw"]
    with pytest.raises(SystemExit):
        main_of(growth, monkeypatch, tmp_path, "run --rows 5")


@pytest.mark.parametrize("name", ["loader", "step"])
def test_a_benchmark_says_in_a_line_what_it_lacks(name, benchmark, monkeypatch, tmp_path, capsys):
    module = benchmark(name)
    Image.new("RGB", (9, 9)).save(tmp_path / "a.jpg")
    for words in (f"run --toy --data {tmp_path}", f"run --toy --data {tmp_path / 'nothing'}"):
        with pytest.raises(SystemExit):
            main_of(module, monkeypatch, tmp_path, words)
        assert re.search(r"error: .*(expected at least 4 JPEG|no file or folder)", capsys.readouterr().err)
    for package in [found for found in sys.modules if found.startswith("lightly")] + ["lightly"]:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit):
        main_of(module, monkeypatch, tmp_path, "run --toy")
    assert "pip install -e '.[test]'" in capsys.readouterr().err


@pytest.mark.parametrize("ours, same", [(2.0, True), (2.00001, True), (2.001, False), (float("nan"), False), ([2.0, 2.0], False)])
def test_numbers_that_the_released_code_has_otherwise_are_an_error(ours, same, benchmark, monkeypatch, tmp_path):
    official, stored = benchmark("official_probes"), []
    monkeypatch.setattr(official, "borrow", lambda *_: "b8931f7")
    monkeypatch.setattr(official, "store", lambda name, found: stored.extend(found["rows"]))

    def part():
        yield official.compared("part", "what", [torch.ones(2, 3), {"a": 2.0}], [torch.ones(2, 3), {"a": ours}])

    monkeypatch.setattr(official, "PARTS", (part,))
    if same:
        official.run(tmp_path)
        assert [(row["n"], row["scale"]) for row in stored] == [(7, 2.0)]
    else:
        with pytest.raises(SystemExit, match="not the same|shapes"):
            official.run(tmp_path)
        assert stored == []


def test_a_folder_without_the_released_code_is_refused(benchmark, tmp_path):
    with pytest.raises(SystemExit, match="no checkout of facebookresearch/dinov2"):
        benchmark("official_probes").run(tmp_path)


def test_the_first_result_of_a_benchmark_does_not_make_the_commit_of_the_next_another(benchmark, monkeypatch, tmp_path):
    recipe = benchmark("recipe")
    recipe._commit.cache_clear()
    monkeypatch.setattr(recipe, "RESULTS", tmp_path)
    monkeypatch.setattr(recipe, "environment", lambda *of: {"commit": f"a{'-dirty' * any(tmp_path.iterdir())}"})
    paths = [recipe.store(name, {}) for name in ("one", "two")]
    assert [json.loads(path.read_text())["environment"]["commit"] for path in paths] == ["a", "a"]
    recipe._commit.cache_clear()
