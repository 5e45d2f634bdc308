"""The main job on a handful of images: train, judge, draw, report, probe."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from minidino import tour as tour_module
from minidino.config import override, preset
from minidino.evaluate import evaluate
from minidino.images.pixels import some
from minidino.images.pools import Pool
from minidino.images.scenes import KINDS, MASK_CLASSES
from minidino.judge import BASELINES, judge, patch_truth, trained_backbone
from minidino.probes.patches import attention_to
from minidino.runs import Run, pick_device
from minidino.stages import open_world, pretrain
from minidino.tour import draw, expect_own, found_copies, look, report, shrink, tour

PICTURES = ("scenes", "crops", "curves", "pca", "attention", "neighbours", "knn", "sizes")
SMALL = ["data.n_scenes=150", "data.n_test_scenes=60", "run.steps=6", "run.log_every=1", "run.knn_every=3",
         "optim.batch_size=16", "run.device=cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tour") / "run"
    run, world = pretrain(override(preset("scenes-cpu"), SMALL), folder)
    results = judge(run, world)
    return run, world, results | {"sizes": shrink(run, world, results["knn_readings"]["trained"]["k=20"], print)}


def test_results_hold_every_baseline_and_both_nets(finished):
    _, _, results = finished
    json.dumps(results)
    assert set(results["knn"]) == {*BASELINES, "random_vit", "trained"}
    assert all(0 <= value <= 1 for value in results["knn"].values())
    assert set(results["knn_readings"]) == {*results["knn"], "trained, seen at 64 px"}  # 48 px are its crops
    assert results["knn"]["hog"] > 0.15  # a descriptor that knows outlines, even with 150 examples
    assert set(results["patches"]) >= {"position", "pixels + position", "random_vit", "trained", "trained + position"}
    assert results["training"]["images"] == 96 and results["n_test"] == 60


def test_a_network_of_half_the_width_is_taught_and_learns_alone(finished):
    run, _, results = finished
    sizes = results["sizes"]
    assert set(sizes) == {"teacher", "distilled", "alone"} and sizes["teacher"]["parameters"] == 215_424
    assert sizes["distilled"]["parameters"] == sizes["alone"]["parameters"] < 215_424 / 3
    taught, alone = (Run(run.folder / name).config() for name in ("distilled", "alone"))
    assert taught.distill.teacher == str(run.folder) and alone.distill.teacher == ""
    assert taught.run.steps == alone.run.steps == 1 and taught.vit.width == alone.vit.width == 32


def test_pictures_and_a_report_in_one_file(finished):
    run, world, results = finished
    draw(world, run.config(), run)
    results = results | {"attention": look(world.test_scenes, trained_backbone(run, pick_device("cpu")))}
    page = report(run, world, results).read_text()
    share = (world.test_scenes.masks >= MASK_CLASSES.index(KINDS[0])).mean()
    assert f"of the look is on things, which are {share:.0%} of the pixels" in page
    for name in PICTURES:
        assert np.asarray(Image.open(run.folder / f"{name}.png")).std() > 5
    assert page.count("data:image/png;base64") == len(PICTURES)
    assert "http" not in page and "random_vit" in page and "What this does not show" in page


def test_the_look_is_held_against_masks(finished):
    run, world, _ = finished
    nets, scenes = trained_backbone(run, pick_device("cpu")), world.test_scenes
    told = look(scenes, nets)
    maps = attention_to(nets, torch.from_numpy(scenes.images).permute(0, 3, 1, 2)).double()  # (60, h, 8, 8)
    per_pixel = maps.repeat_interleave(8, 2).repeat_interleave(8, 3)
    things = torch.from_numpy(scenes.masks >= 4)[:, None]
    mass = (per_pixel * things).sum((2, 3)) / per_pixel.sum((2, 3))
    assert told["on_things"] == pytest.approx(float(mass.mean())) and told["pixels"] == float(things.double().mean())


def test_a_tour_of_photographs_without_labels_judges_nothing(tmp_path, monkeypatch):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(40):
        noise = np.random.default_rng(i).integers(0, 256, (40, 56, 3), dtype=np.uint8)
        Image.fromarray(noise).save(flat / f"{i}.png")
    (flat / "broken.jpg").write_bytes(b"no picture")
    config = override(preset("imagenette-cpu"), [*SMALL, "data.short_side=48"])
    monkeypatch.setattr(tour_module, "preset", lambda name: preset(name) if name == "vitl14-lvd" else config)
    said = []
    results = tour(str(flat), minutes=0.01, out=str(tmp_path / "run"), say=said.append)
    assert "knn" not in results and results["n_test"] == 0 and results["n_train"] + 8 + 1 == 41
    assert "no labelled held-out images" in " ".join(said)
    assert (tmp_path / "run" / "report.html").exists()
    quarantined = [path.read_text() for path in (tmp_path / "run").rglob("quarantine.csv")]
    assert sum("broken.jpg" in text for text in quarantined) == 1


def test_a_tour_of_scenes_learns_from_what_curation_left(tmp_path, monkeypatch):
    config = override(preset("scenes-cpu"), SMALL)
    monkeypatch.setattr(tour_module, "preset", lambda name: preset(name) if name == "vitl14-lvd" else config)
    monkeypatch.setattr(tour_module, "COPY_STEPS", 2)
    results = tour(minutes=0.01, out=str(tmp_path / "run"), say=lambda words: None)
    found = results["curation"]
    assert found["funnel"]["files"] == 150 + 30 + 15 and results["n_train"] == found["funnel"]["without copies"]
    assert sum(planted for planted, _ in found["copies"].values()) == 30 and found["junk"][0] == 15
    assert found["copies"]["exact"] == [3, 3] == found["copies"]["other bytes"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Which pictures it learned from" in page and page.count("data:image/png;base64") == len(PICTURES) + 1
    world = open_world(Run(tmp_path / "run").config(), tmp_path / "run" / "pixels")  # what a resumed run opens
    assert len(world.lessons) == results["n_train"] and len(world.train) == 150
    shutil.rmtree(tmp_path / "run" / "curation")  # judging needs nothing of what was learned from
    monkeypatch.chdir(tmp_path)
    found = evaluate(tmp_path / "run", out=tmp_path / "probe", cache=tmp_path / "features")
    assert found["answers"]["trained"]["accuracy"] == results["knn_readings"]["trained"]["k=20"]


@pytest.mark.skipif(os.name != "posix", reason="needs locks of POSIX")
def test_a_second_tour_leaves_the_first_alone_while_it_judges(tmp_path, monkeypatch):
    config = override(preset("scenes-cpu"), SMALL)
    monkeypatch.setattr(tour_module, "preset", lambda name: preset(name) if name == "vitl14-lvd" else config)
    monkeypatch.setattr(tour_module, "COPY_STEPS", 2)
    judged = []

    def meanwhile(run, world):
        judged.append(run.begun())
        if len(judged) == 1:
            with pytest.raises(BlockingIOError, match="another process is at work in"):
                tour(minutes=0.01, out=str(run.folder), say=lambda words: None)
        assert run.begun() == judged[0]
        return judge(run, world)

    monkeypatch.setattr(tour_module, "judge", meanwhile)
    assert "knn" in tour(minutes=0.01, out=str(tmp_path / "run"), say=lambda words: None) and len(judged) == 1


def test_a_copy_is_found_when_it_is_not_kept_beside_its_original(tmp_path):
    pool = Pool(list("abcdefg"), [b""] * 7, ["own", "own", "cropped", "exact", "exact", "junk", "own"],
                np.array([0, 1, 0, 1, 1, 5, 6]), np.array([0, 1, 0, 1, 1, -1, 2]))  # fmt: skip
    rows = dict(a=0, b=1, c=1, d=0, e=1, f=1, g=0)
    (tmp_path / "manifest.csv").write_text("file,kept\n" + "".join(f"{name},{kept}\n" for name, kept in rows.items()))
    found = found_copies(pool, tmp_path / "manifest.csv")
    assert found == {"copies": {"cropped": [1, 1], "exact": [2, 1]}, "junk": [1, 1], "scenes_lost": 1}


def test_photographs_come_from_the_archives_as_they_are(shared_data, tmp_path):
    config = preset("imagenette-cpu")
    source = str(shared_data / "imagenette")
    world = open_world(replace(config, data=replace(config.data, source=source, short_side=16)), tmp_path)
    assert (len(world.train), len(world.test), len(world.train.classes)) == (9469, 3925, 10)
    assert sorted(set(world.test.labels.tolist())) == list(range(10))


def test_patch_truth_takes_the_commonest_class_and_the_harmonic_depth():
    masks = np.zeros((1, 4, 4), np.uint8)
    masks[0, :2, :2] = [[4, 4], [4, 1]]
    depth = np.full((1, 4, 4), 2.0, np.float32)
    depth[0, :2, :2] = [[1, 1], [4, 4]]
    classes, metres = patch_truth(masks, depth, 2)
    assert classes.tolist() == [[4, 0, 0, 0]]
    assert metres[0].tolist() == pytest.approx([1 / 0.625, 2, 2, 2])


def test_some_rows_are_spread_evenly():
    assert some(10, 3).tolist() == [0, 4, 9]
    assert some(3, 10).tolist() == [0, 1, 2]
    assert len(KINDS) == 10


def test_a_tour_does_not_take_the_place_of_another_commands_run(tmp_path):
    run = Run.create(tmp_path / "mine", preset("scenes-cpu"), pick_device("cpu"))
    path = run.folder / "environment.json"
    path.write_text(json.dumps({"command": ["minidino", "train", "--out", "mine"]}))
    with pytest.raises(FileExistsError, match="holds a run of minidino train"):
        tour(out=run.folder)
    path.write_text(json.dumps({"command": ["minidino", "tour"]}))
    expect_own(run.folder)
