"""The pipeline from a folder of files to its manifest, with descriptors that need no training."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minidino.curation import embeddings
from minidino.curation.embeddings import PARTS, Descriptors, embed, network, seen, thumbnails
from minidino.curation.pipeline import COLUMNS, Curation, Describer, picture_quality
from minidino.images.datasets import open_images
from minidino.images.pixels import Pixels, load_pixels
from minidino.images.scenes import draw_scenes


def coarse(images):
    """Grey on 6 x 6 places without its mean: near for the same picture, far for another."""
    gray = torch.nn.functional.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), 6).flatten(1)
    return gray - gray.mean(1, keepdim=True)


def colors(images):
    return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1) - 128


COPY = Describer("copy", coarse, 24, "coarse grey")
MEANING = Describer("semantic", colors, 24, "colours")


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """40 scenes, then copies of some of them, junk, and two pictures of the examination."""
    root = tmp_path_factory.mktemp("curation")
    scenes = [Image.fromarray(image) for image in draw_scenes(46, 48, 3).images]
    folders = {name: root / name for name in ("pool", "exam", "queries")}
    for folder in folders.values():
        folder.mkdir()
    for i, scene in enumerate(scenes[:40]):
        scene.save(folders["pool"] / f"{i:02d}.png")
    for i in range(4):
        scenes[i].save(folders["pool"] / f"same{i}.bmp")  # the same pixels in other bytes
        scenes[10 + i].resize((96, 96), Image.Resampling.BICUBIC).save(folders["pool"] / f"big{i}.png")
        scenes[20 + i].save(folders["pool"] / f"worse{i}.jpg", quality=20)
    for i, scene in enumerate(scenes[40:]):
        scene.save(folders["exam"] / f"{i}.png")
        scenes[30 + i].save(folders["queries"] / f"{i}.png")
    scenes[40].save(folders["pool"] / "leak.png")
    scenes[41].save(folders["pool"] / "leak.jpg", quality=30)
    (folders["pool"] / "notes.txt").write_text("no picture")
    (folders["pool"] / "cut.jpg").write_bytes((folders["pool"] / "worse0.jpg").read_bytes()[:200])
    return folders


def rows_of(manifest):
    with open(manifest, newline="") as file:
        return {row["file"]: row for row in csv.DictReader(file)}


def run_all(pool, out, copy=COPY, meaning=MEANING):
    curation = Curation(pool["pool"], out, short_side=48, say=lambda words: None)
    curation.drop_same()
    curation.drop_copies(copy, 0.9)
    curation.drop_leaks(pool["exam"], 0.9)
    curation.retrieve(pool["queries"], meaning, n=2)
    return curation, curation.write()


@pytest.fixture(scope="module")
def curated(pool, tmp_path_factory):
    curation, manifest = run_all(pool, tmp_path_factory.mktemp("out"))
    return curation, rows_of(manifest), manifest


# ------------------------------------------------------------------------------------------------ what became of each file


def test_every_file_has_one_row_and_one_reason(pool, curated):
    curation, rows, _ = curated
    assert sorted(rows) == sorted(os.listdir(pool["pool"])) and len(rows) == 56
    assert set(next(iter(rows.values()))) == set(COLUMNS) and all(row["reason"] for row in rows.values())
    kept = sum(row["kept"] == "1" for row in rows.values())
    assert kept == curation.kept.sum() == curation.funnel["retrieved"]
    assert list(curation.funnel.values()) == sorted(curation.funnel.values(), reverse=True)
    assert curation.funnel["files"] == 56 and curation.funnel["decoded"] == 54 and curation.funnel["distinct"] <= 50


def test_what_is_no_picture_is_quarantined_with_its_reason(curated):
    _, rows, _ = curated
    for name in ("notes.txt", "cut.jpg"):
        assert rows[name]["kept"] == "0" and rows[name]["reason"].startswith("quarantined: ")


def test_the_same_picture_in_other_bytes_is_named(curated):
    _, rows, _ = curated
    for i in range(4):
        assert rows[f"same{i}.bmp"]["reason"] == "same picture" and rows[f"same{i}.bmp"]["duplicate_of"] == f"0{i}.png"


def test_the_larger_copy_is_kept(curated):
    _, rows, _ = curated
    for i in range(4):
        small = rows[f"1{i}.png"]
        assert small["kept"] == "0" and small["duplicate_of"] == f"big{i}.png" and float(small["similarity"]) > 0.9


def test_pictures_of_the_examination_go_and_say_which(curated):
    _, rows, _ = curated
    for name, of in (("leak.png", "@exam/0.png"), ("leak.jpg", "@exam/1.png")):
        assert rows[name]["reason"] == "too close to exam" and rows[name]["duplicate_of"] == of


def test_what_is_like_a_query_is_kept_and_names_it(curated):
    _, rows, _ = curated
    for i in range(6):
        row = rows[f"3{i}.png"]
        assert row["kept"] == "1" and row["query"] == f"{i}.png" and row["similarity"] == "1.0000"
    assert 6 <= sum(row["reason"] == "like a query" for row in rows.values()) <= 12


def test_a_manifest_opens_as_the_pictures_that_were_kept(curated):
    curation, rows, manifest = curated
    images = open_images(manifest)
    assert images.files == [name for name in sorted(rows) if rows[name]["kept"] == "1"]
    assert len(load_pixels(images, 48, progress=False)) == len(images)


def test_a_manifest_that_went_through_a_spreadsheet_opens_or_says_why_not(curated, tmp_path):
    text, manifest = curated[2].read_bytes(), tmp_path / "manifest.csv"
    shutil.copy(curated[2].with_name("curation.json"), tmp_path)
    manifest.write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    assert open_images(manifest).files == open_images(curated[2]).files
    manifest.write_bytes(text.replace(b",", b";"))
    with pytest.raises(ValueError, match="expected columns file and kept, got .'file;kept;"):
        open_images(manifest)


def test_a_folder_may_be_called_like_a_manifest(tmp_path):
    assert open_images(folder_of(tmp_path / "x.csv", draw_scenes(2, 48, 0).images)).files == ["0.png", "1.png"]


def test_the_manifest_of_a_named_set_names_the_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = folder_of(tmp_path / "files", draw_scenes(3, 48, 0).images)
    shutil.make_archive(str(tmp_path / "cache" / "minidino" / "data" / "cifar10"), "zip", root)
    rows = short_run("cifar10", tmp_path / "out")
    monkeypatch.chdir(root)
    kept = [name for name, row in rows.items() if row["kept"] == "1"]
    assert open_images(tmp_path / "out" / "manifest.csv").files == kept


def test_a_manifest_alone_is_refused(curated, tmp_path):
    alone = tmp_path / "manifest.csv"
    alone.write_bytes(curated[2].read_bytes())
    with pytest.raises(FileNotFoundError, match="curation.json"):
        open_images(alone)


# ------------------------------------------------------------------------------------------------ killed and started again


class Killed(Exception):
    pass


def mortal(describer, calls):
    """A describer that dies at one of its calls."""
    left = [calls]

    def describe(images):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return describer.describe(images)

    return describer._replace(describe=describe)


@pytest.mark.parametrize(("copies", "meanings"), [(0, 9), (1, 9), (9, 0), (9, 1)])
def test_a_killed_run_ends_with_the_same_manifest(pool, curated, tmp_path, copies, meanings):
    with pytest.raises(Killed):
        run_all(pool, tmp_path, mortal(COPY, copies), mortal(MEANING, meanings))
    _, manifest = run_all(pool, tmp_path)
    assert manifest.read_bytes() == curated[2].read_bytes()


def test_stages_are_not_repeated_and_a_changed_setting_is(pool, tmp_path):
    run_all(pool, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "stages").glob("*.np[yz]")}
    run_all(pool, tmp_path, mortal(COPY, 0), mortal(MEANING, 0))  # nothing left to describe
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "stages").glob("*.np[yz]")} == before
    curation = Curation(pool["pool"], tmp_path, short_side=48, say=lambda words: None)
    curation.drop_same()
    curation.drop_copies(COPY, 0.99)
    assert (tmp_path / "stages" / "copies.npz").stat().st_mtime_ns > before["copies.npz"]


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
@pytest.mark.parametrize("damaged", ["stages/same.npz", "stages/copies.npz", "stages/hash.npy", "stages/copy.npy",
                                     "stages/hash.json", "pixels/pixels.json", "pixels/pixels.u8"])  # fmt: skip
def test_what_a_full_disk_cut_is_made_again(damaged, share, tmp_path):
    root = folder_of(tmp_path / "pool", draw_scenes(6, 48, 0).images)
    whole = short_run(root, tmp_path / "out")
    path = tmp_path / "out" / damaged
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert short_run(root, tmp_path / "out") == whole and path.read_bytes() == data


def test_a_quarantine_that_is_gone_is_written_again(tmp_path, recwarn):
    root = folder_of(tmp_path / "pool", draw_scenes(2, 48, 0).images)
    (root / "x.png").write_bytes(b"")
    whole, path = short_run(root, tmp_path / "out"), tmp_path / "out" / "pixels" / "quarantine.csv"
    for damage in (path.unlink, lambda: path.write_bytes(b"")):
        damage()
        assert short_run(root, tmp_path / "out") == whole and "x.png" in path.read_text()
    assert not recwarn.list  # the funnel and the manifest tell


def test_what_a_kill_left_half_written_goes_and_what_is_being_written_stays(tmp_path):
    root = folder_of(tmp_path / "pool", draw_scenes(2, 48, 0).images)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "pixels").mkdir()
    litter = [tmp_path / "pixels" / f".pixels.u8.{pid}.tmp" for pid in (gone.pid, os.getppid())]
    for path in litter:
        path.touch()
    load_pixels(open_images(root), 48, tmp_path / "pixels", progress=False)
    assert [path.exists() for path in litter] == [False, True]


def test_descriptors_go_on_where_they_were(tmp_path, monkeypatch):
    scenes = draw_scenes(50, 32, 0)
    pixels = Pixels.from_array(scenes.images, scenes.labels, ["thing"] * 10)
    path, settings = tmp_path / "x.npy", {"kind": "copy", "made_by": "coarse", "chunk": 8, "progress": False}
    with pytest.raises(Killed):
        embed(pixels, mortal(COPY, 3).describe, 24, path, **settings)
    found = embed(pixels, mortal(COPY, 4).describe, 24, path, **settings)  # 7 chunks in all
    whole = embed(pixels, coarse, 24, tmp_path / "y.npy", **settings)
    assert found.rows.dtype == np.float16 and (found.rows == whole.rows).all()
    again = embed(pixels, mortal(COPY, 0).describe, 24, path, **settings)
    assert (again.rows == whole.rows).all()
    other = embed(pixels.select(np.arange(20)), coarse, 24, path, **settings)  # other pictures: from the start
    assert other.rows.shape == (20, 36)
    with monkeypatch.context() as patch, pytest.raises(Killed):  # before the first note of another describer
        patch.setattr(embeddings, "write_atomically", lambda path, data: mortal(COPY, 0).describe(data))
        embed(pixels.select(np.arange(20)), lambda x: -coarse(x), 24, path, **settings | {"made_by": "x", "chunk": 20})
    again = embed(pixels.select(np.arange(20)), coarse, 24, path, **settings)
    assert (again.rows == other.rows).all() and (again.rows == whole.rows[:20]).all()


def test_copies_are_looked_for_inside_of_bars_and_nothing_else_is():
    scenes = draw_scenes(4, 48, 0)
    plain = Pixels.from_array(scenes.images, scenes.labels, ["thing"] * 10)
    on_film = Pixels.from_array(np.pad(scenes.images, ((0, 0), (9, 9), (0, 0), (0, 0))), scenes.labels, ["thing"] * 10)
    assert torch.equal(seen(on_film, 24, "copy"), plain.whole(24))
    assert torch.equal(seen(on_film, 24, "semantic"), on_film.whole(24))
    corner = Pixels.from_array(scenes.images[:, :36, :36], scenes.labels, ["thing"] * 10)
    assert torch.equal(seen(on_film, 24, "copy", PARTS[1]), corner.whole(24))


def test_what_was_cut_out_of_the_examination_goes_and_says_which(tmp_path):
    scenes = draw_scenes(30, 64, 5).images
    for name in ("pool", "exam"):
        (tmp_path / name).mkdir()
    for i in range(24):
        Image.fromarray(scenes[i]).save(tmp_path / "pool" / f"{i:02d}.png")
    for i in range(24, 30):
        Image.fromarray(scenes[i]).save(tmp_path / "exam" / f"{i}.png")
    cuts = {"corner": (0, 0, 47, 48), "middle": (7, 9, 56, 57), "end": (15, 16, 64, 64)}
    for i, (name, box) in enumerate(cuts.items()):
        Image.fromarray(scenes[24 + i]).crop(box).save(tmp_path / "pool" / f"{name}.png")
    curation = Curation(tmp_path / "pool", tmp_path / "out", short_side=64, say=lambda words: None, progress=False)
    curation.drop_same()
    curation.drop_copies(COPY, 0.95)
    curation.drop_leaks(tmp_path / "exam", 0.95)
    rows = rows_of(curation.write())
    gone = {name: row["duplicate_of"] for name, row in rows.items() if row["reason"] == "too close to exam"}
    assert gone == {"corner.png": "@exam/24.png", "middle.png": "@exam/25.png", "end.png": "@exam/26.png"}


def test_pictures_of_the_examination_that_protect_nothing_are_told(pool, tmp_path):
    exam = folder_of(tmp_path / "exam", draw_scenes(1, 48, 9).images)
    (exam / "labels.csv").write_text("0,cat")
    for name in ("1.heic", "2.jpg"):
        (exam / name).write_bytes(b"\xff\xd8 cut")
    said = []
    curation = Curation(pool["pool"], tmp_path / "out", short_side=48, say=said.append, progress=False)
    curation.drop_same()
    curation.drop_copies(COPY, 0.9)
    curation.drop_leaks(exam, 0.9)
    note = json.loads(curation.write().with_name("curation.json").read_bytes())
    (words,) = note["careful"]
    assert words.startswith("2 of 3 pictures of exam cannot be read and protect nothing: see ")
    assert f"careful: {words}" in said and "2.jpg" in Path(words.split("see ")[1]).read_text()


def test_pixels_can_be_asked_instead_of_a_threshold(pool, tmp_path):
    curation = Curation(pool["pool"], tmp_path, short_side=48, say=lambda words: None, progress=False)
    curation.drop_same()
    curation.drop_copies(COPY, threshold=None)
    curation.drop_leaks(pool["exam"], threshold=None)
    rows = rows_of(curation.write())
    for i in range(4):
        assert rows[f"1{i}.png"]["duplicate_of"] == f"big{i}.png"
        assert sorted(rows[name]["kept"] for name in (f"2{i}.png", f"worse{i}.jpg")) == ["0", "1"]
    for name, of in (("leak.png", "@exam/0.png"), ("leak.jpg", "@exam/1.png")):
        assert rows[name]["duplicate_of"] == of and float(rows[name]["similarity"]) > 0.7
    assert curation.kept.sum() == 40  # each scene once


def test_a_copy_goes_for_the_leak_in_its_group(pool, tmp_path, monkeypatch):
    curation = Curation(pool["pool"], tmp_path, short_side=48, say=lambda words: None, progress=False)
    curation.drop_same()
    curation.drop_copies(COPY, threshold=0.9)

    def only_one(pixels, *_):
        proof = np.array([0.9 if name == "10.png" else 0.0 for name in pixels.files])
        return proof, np.where(proof > 0, 3, 0)

    monkeypatch.setattr("minidino.curation.pipeline.proven_leaks", only_one)
    curation.drop_leaks(pool["exam"], threshold=None)
    rows = rows_of(curation.write())
    gone = {name for name, row in rows.items() if row["reason"] == "too close to exam"}
    assert gone == {"10.png", "big0.png"}
    assert all((rows[name]["duplicate_of"], rows[name]["similarity"]) == ("@exam/3.png", "0.9000") for name in gone)


# ------------------------------------------------------------------------------------------------ refusals and corners


def test_kinds_are_not_interchangeable(pool, tmp_path):
    with pytest.raises(ValueError, match="expected 'copy' descriptors, got 'semantic' ones made by colours"):
        Descriptors(np.zeros((2, 3)), "semantic", "colours").expect("copy")
    curation = Curation(pool["pool"], tmp_path, short_side=48, say=lambda words: None)
    curation.drop_same()
    with pytest.raises(ValueError, match="expected 'copy'"):
        curation.drop_copies(MEANING)


def test_a_describer_that_cannot_tell_pictures_apart_is_noticed(pool, tmp_path):
    said = []
    curation = Curation(pool["pool"], tmp_path, short_side=48, say=said.append)
    curation.drop_same()
    curation.drop_copies(Describer("copy", lambda images: torch.ones(len(images), 4), 24, "a blind one"))
    assert curation.kept.sum() == 1 and "a blind one cannot tell pictures apart" in said[-2]


def folder_of(root, pictures):
    root.mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(root / f"{i}.png")
    return root


def short_run(root, out):
    curation = Curation(root, out, short_side=48, say=lambda words: None)
    curation.drop_same()
    curation.drop_copies(COPY)
    return rows_of(curation.write())


def test_one_picture_and_a_folder_of_one_picture_many_times(tmp_path):
    scene = draw_scenes(1, 48, 0).images[0]
    assert [r["kept"] for r in short_run(folder_of(tmp_path / "one", [scene]), tmp_path / "a").values()] == ["1"]
    rows = short_run(folder_of(tmp_path / "same", [scene] * 9), tmp_path / "b")
    assert [row["kept"] for row in rows.values()] == ["1", *["0"] * 8]


def test_no_file_and_no_picture_are_said(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no files"):
        Curation(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "empty" / "a.txt").write_text("words")
    with pytest.raises(ValueError, match="none of the 1 files"):
        Curation(tmp_path / "empty", tmp_path / "out")


def test_budgets_are_met_exactly_or_refused(pool, tmp_path):
    curation = Curation(pool["pool"], tmp_path, short_side=48, say=lambda words: None)
    curation.drop_same()
    curation.drop_copies(COPY, 0.9)
    with pytest.raises(ValueError, match="budget of at most"):
        curation.balance(500, MEANING)
    curation.balance(17, MEANING)
    rows = rows_of(curation.write())
    assert sum(row["kept"] == "1" for row in rows.values()) == 17
    assert all(row["cluster"] for row in rows.values() if row["kept"] == "1")


def test_quality_counts_the_pixels_of_the_original_then_sharpness(tmp_path):
    scene = Image.fromarray(draw_scenes(1, 96, 0).images[0])
    (tmp_path / "q").mkdir()
    scene.save(tmp_path / "q" / "a.png")
    scene.resize((24, 24)).resize((96, 96)).save(tmp_path / "q" / "b.png")
    quality = picture_quality(load_pixels(open_images(tmp_path / "q"), 48, progress=False))
    assert (quality[:, 0] == 96 * 96).all() and quality[0, 1] > 1.2 * quality[1, 1]


def test_describers_look_at_each_picture_alone():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 5)).eval()
    images = torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(network(net, 4)(images), network(net)(images))
    assert (thumbnails(images).reshape(images.shape) == images).all()


def test_a_changed_picture_of_the_same_name_and_size_is_seen(tmp_path):
    scenes = draw_scenes(3, 48, 0).images
    root = folder_of(tmp_path / "changed", [scenes[0], scenes[0]])
    assert [row["reason"] for row in short_run(root, tmp_path / "out").values()] == ["distinct", "same picture"]
    Image.fromarray(scenes[2]).save(root / "1.png")
    assert all(row["reason"] != "same picture" for row in short_run(root, tmp_path / "out").values())
