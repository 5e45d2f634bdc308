"""Pictures with a target for each pixel: every layout is recognised, and what is wrong with a set is said."""

import zipfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from minidino import stages
from minidino.images import pairs as module
from minidino.images.pairs import load_pairs, open_pairs
from minidino.images.scenes import MASK_CLASSES, draw_scenes

H, W = 6, 8


@pytest.fixture
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def write(path, values, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values))
    if mode == "P":
        image = image.convert("L")
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    image.save(path)


def picture(size=(H, W)):
    return np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)


def mask(*values, size=(H, W)):
    return np.resize(np.array(values, dtype=np.uint8), size)


def a_pair(root, image, target, values, mode=None):
    write(root / image, picture())
    write(root / target, values, mode)


# ---------------------------------------------------------------- layouts


def camvid(root):
    for split in ("train", "val", "test"):
        a_pair(root, f"camvid/{split}/a.jpg", f"camvid/{split}annot/a.png", mask(0, 3, 10, 11))
    return {"splits": ["test", "train", "val"], "n": 11, "labels": [0, 3, 10, -1], "layout": "camvid"}


def voc(root):
    a_pair(root, "VOC2012/JPEGImages/a.jpg", "VOC2012/SegmentationClass/a.png", mask(0, 20, 255), "P")
    a_pair(root, "VOC2012/JPEGImages/b.jpg", "VOC2012/SegmentationClass/b.png", mask(0, 20, 255), "P")
    write(root / "VOC2012/JPEGImages/only_boxes.jpg", picture())
    lists = root / "VOC2012/ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for name, text in (("train", "a\n"), ("val", "b\n"), ("trainval", "a\nb\n"), ("test", "unpublished\n")):
        (lists / f"{name}.txt").write_text(text)
    return {"splits": ["train", "val"], "n": 21, "labels": [0, 20, -1], "layout": "voc"}


def pet(root):
    a_pair(root, "images/Cat_1.jpg", "annotations/trimaps/Cat_1.png", mask(1, 2, 3))
    a_pair(root, "images/dog_2.jpg", "annotations/trimaps/dog_2.png", mask(1, 2, 3))
    (root / "annotations/trimaps/._Cat_1.png").write_bytes(b"a resource fork, as in the published archive")
    (root / "annotations/trainval.txt").write_text("# image class species breed\nCat_1 1 1 1\n")
    (root / "annotations/test.txt").write_text("dog_2 2 2 1\n")
    return {"splits": ["train", "test"], "n": 2, "labels": [0, 1, -1], "layout": "pet"}


def ade20k(root):
    a_pair(root, "ade/images/training/a.jpg", "ade/annotations/training/a.png", mask(0, 1, 150))
    a_pair(root, "ade/images/validation/b.jpg", "ade/annotations/validation/b.png", mask(0, 1, 150))
    (root / "ade/objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n" + "".join(f"{i}\t0\t0\t0\t1\tthing{i}, alias\n" for i in range(1, 151))
    )
    return {"splits": ["train", "val"], "n": 150, "labels": [-1, 0, 149], "layout": "ade20k"}


def plain_splits_outside(root):
    for split in ("train", "test"):
        a_pair(root, f"{split}/images/deep/a.png", f"{split}/masks/deep/a.png", mask(0, 1, 4, 255))
    (root / "classes.txt").write_text("ground\nsky\nvoid\ntree\nhouse\n")
    return {"splits": ["test", "train"], "n": 4, "labels": [0, 1, 3, -1], "layout": "plain"}


def plain_splits_inside(root):
    for split in ("train", "validation"):
        a_pair(root, f"images/{split}/a.png", f"labels/{split}/a.png", mask(0, 2, 255))
    return {"splits": ["train", "val"], "n": 3, "labels": [0, 2, -1], "layout": "plain"}


def plain_lists(root):
    for name in ("a", "b"):
        a_pair(root, f"images/{name}.jpg", f"masks/{name}.png", mask(0, 255))
    (root / "train.txt").write_text("a.jpg\n")
    (root / "test.txt").write_text("images/b.jpg\n")
    return {"splits": ["train", "test"], "n": 2, "labels": [0, 1], "layout": "plain"}  # 255 alone with 0 is a class


def indexed(root):
    a_pair(root, "set/x/1.jpg", "set/y/2.png", mask(0, 1))
    (root / "set/index.csv").write_text("image,mask,split\nx/1.jpg,y/2.png,test\n")
    return {"splits": ["test"], "n": 2, "labels": [0, 1], "layout": "index"}


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize(
    "layout", [camvid, voc, pet, ade20k, plain_splits_outside, plain_splits_inside, plain_lists, indexed]
)
def test_a_layout_is_recognised(layout, packed, tmp_path, cache):
    root = tmp_path / "files"
    truth = layout(root)
    if packed:  # a folder that holds one archive and a card
        files = [f for f in root.rglob("*") if f.is_file()]
        (tmp_path / "packed").mkdir()
        (tmp_path / "packed/CARD.md").write_text("words")
        with zipfile.ZipFile(tmp_path / "packed/all.zip", "w") as archive:
            for f in files:
                archive.write(f, f.relative_to(root))
        root = tmp_path / "packed"
    pairs = open_pairs(root, cache_dir=cache)
    assert pairs.layout == truth["layout"] and pairs.splits.tolist() == truth["splits"]
    assert len(pairs.classes) == truth["n"] == len(pairs.values)
    assert pairs.held_out == ("test" if "test" in truth["splits"] else "val")
    images, targets, names, left_out = load_pairs(pairs, truth["splits"][0])
    assert images.shape == (1, 3, H, W) and names == [pairs.names[0]] and left_out == []
    assert np.array_equal(targets[0], np.resize(truth["labels"], (H, W)))


def test_names_of_classes_are_read_where_they_are_written(tmp_path, cache):
    ade20k(tmp_path / "ade")
    assert open_pairs(tmp_path / "ade", cache_dir=cache).classes[149] == "thing150"
    camvid(tmp_path / "cam")
    assert open_pairs(tmp_path / "cam", cache_dir=cache).classes[10] == "Bicyclist"
    rows = "index,name\n0,Sky\n3,Void\n10,Road\n11,Truck\n"
    (tmp_path / "cam/camvid/classes.csv").write_text(rows)
    pairs = open_pairs(tmp_path / "cam", cache_dir=cache)
    assert (pairs.classes, pairs.values, pairs.ignored) == (["Sky", "Road", "Truck"], {0: 0, 10: 1, 11: 2}, (3,))
    (tmp_path / "cam/camvid/classes.csv").write_text("number,word\n0,Sky\n")
    with pytest.raises(ValueError, match="expected columns index and name"):
        open_pairs(tmp_path / "cam", cache_dir=cache)


def millimetres(value=2000):
    depth = np.full((H, W), value, dtype=np.uint16)
    depth[0] = 0
    return depth


def test_depth_is_read_in_metres(tmp_path, cache):
    a_pair(tmp_path, "nyu/rgb/a.jpg", "nyu/depth/a.png", millimetres())
    loaded = load_pairs(open_pairs(tmp_path, "depth", cache_dir=cache), "train")
    assert loaded.targets.dtype.is_floating_point and loaded.targets.unique().tolist() == [0, 2]
    a_pair(tmp_path / "float", "rgb/a.jpg", "depth/a.tif", np.full((H, W), 3.5, dtype=np.float32))
    pairs = open_pairs(tmp_path / "float", "depth", cache_dir=cache)
    assert (load_pairs(pairs, "train").targets == 3.5).all()
    pairs = open_pairs(tmp_path / "nyu", "depth", cache_dir=cache, depth_unit_m=1 / 256)
    assert load_pairs(pairs, "train").targets.max() == 2000 / 256


@pytest.mark.parametrize("hole", [np.nan, np.inf, -np.inf, -1])
def test_a_hole_in_a_depth_map_is_unknown(hole, tmp_path, cache):
    depth = np.full((H, W), 3.5, dtype=np.float32)
    depth[0] = hole
    a_pair(tmp_path, "rgb/a.jpg", "depth/a.tif", depth)
    loaded = load_pairs(open_pairs(tmp_path, "depth", cache_dir=cache), "train")
    assert loaded.left_out == [] and np.array_equal(loaded.targets[0], np.where(depth == 3.5, depth, 0))


@pytest.mark.parametrize("value, unit", [(40, None), (2000, 1.0)])
def test_depth_in_another_unit_is_noticed(value, unit, tmp_path, cache):
    a_pair(tmp_path, "rgb/a.jpg", "depth/a.png", millimetres(value))
    pairs = open_pairs(tmp_path, "depth", cache_dir=cache, depth_unit_m=unit)
    with pytest.raises(ValueError, match="the median depth is .* pass depth_unit_m="):
        load_pairs(pairs, "train")


def test_eight_bits_of_depth_need_a_unit(tmp_path, cache):
    a_pair(tmp_path, "rgb/a.jpg", "depth/a.png", mask(100))
    with pytest.raises(ValueError, match="8 bits are too few"):
        load_pairs(open_pairs(tmp_path, "depth", cache_dir=cache), "train")
    pairs = open_pairs(tmp_path, "depth", cache_dir=cache, depth_unit_m=0.04)
    assert load_pairs(pairs, "train").targets.max() == 4


# ---------------------------------------------------------------- what is wrong with a set


def test_missing_partners_are_named(tmp_path, cache):
    a_pair(tmp_path, "images/a.jpg", "masks/a.png", mask(0, 1))
    for name in "bcde":
        write(tmp_path / f"images/{name}.jpg", picture())
    with pytest.raises(ValueError, match="4 files without their partner, such as images/b.jpg, images/c.jpg"):
        open_pairs(tmp_path, cache_dir=cache)
    (tmp_path / "train.txt").write_text("a\n")  # now it is said what belongs to the set
    assert open_pairs(tmp_path, cache_dir=cache).names == ["images/a.jpg"]
    write(tmp_path / "masks/z.png", mask(0))
    with pytest.raises(ValueError, match="1 files without their partner, such as masks/z.png"):
        open_pairs(tmp_path, cache_dir=cache)
    (tmp_path / "masks/z.png").unlink()
    (tmp_path / "train.txt").write_text("a\nq\n")
    with pytest.raises(ValueError, match="such as q"):
        open_pairs(tmp_path, cache_dir=cache)


def test_two_pictures_of_one_name_are_refused(tmp_path, cache):
    a_pair(tmp_path, "images/a.jpg", "masks/a.png", mask(0, 1))
    write(tmp_path / "images/a.png", picture())
    with pytest.raises(ValueError, match="images/a.jpg and images/a.png have one name"):
        open_pairs(tmp_path, cache_dir=cache)


def test_an_index_that_names_what_is_not_there_is_refused(tmp_path, cache):
    indexed(tmp_path)
    (tmp_path / "set/y/2.png").unlink()
    with pytest.raises(ValueError, match="such as set/y/2.png"):
        open_pairs(tmp_path, cache_dir=cache)


def test_an_index_with_an_empty_cell_is_refused(tmp_path, cache):
    indexed(tmp_path)
    (tmp_path / "set/index.csv").write_text("image,mask,split\nx/1.jpg,y/2.png,test\nx/1.jpg\n")
    with pytest.raises(ValueError, match="set/index.csv: line 3 lacks its image or its mask"):
        open_pairs(tmp_path, cache_dir=cache)


def test_no_pairs_at_all(tmp_path, cache):
    write(tmp_path / "cats/a.jpg", picture())
    with pytest.raises(ValueError, match="no pairs for segmentation among the 1 files .* images/ beside masks/"):
        open_pairs(tmp_path, cache_dir=cache)
    with pytest.raises(ValueError, match="images/ beside depth/"):
        open_pairs(tmp_path, "depth", cache_dir=cache)
    with pytest.raises(FileNotFoundError):
        open_pairs(tmp_path / "nowhere", cache_dir=cache)


@pytest.mark.parametrize("kind, options", [("normals", {}), ("depth", {"depth_unit_m": 0.0}), ("depth", {"seed": -1})])
def test_impossible_requests_are_refused(kind, options, cache):
    with pytest.raises(ValueError, match="expected"):
        open_pairs("scenes", kind, cache_dir=cache, **options)


def test_labels_out_of_range_are_named(tmp_path, cache):
    a_pair(tmp_path, "images/a.jpg", "masks/a.png", mask(0, 1, 7))
    (tmp_path / "classes.txt").write_text("ground\nsky\n")
    with pytest.raises(ValueError, match=r"images/a.jpg: labels \[7\] are out of range; the 2 classes"):
        load_pairs(open_pairs(tmp_path, cache_dir=cache), "train")


def test_numbers_that_cannot_be_classes_are_named(tmp_path, cache):
    a_pair(tmp_path, "images/a.jpg", "masks/a.png", mask(0, 1))
    a_pair(tmp_path, "images/b.jpg", "masks/b.tif", np.full((H, W), 0.5, dtype=np.float32))
    loaded = load_pairs(open_pairs(tmp_path, cache_dir=cache), "train")
    assert loaded.names == ["images/a.jpg"] and "expected integers" in loaded.left_out[0]["reason"]
    write(tmp_path / "masks/b.tif", np.full((H, W), 2**31 - 1, dtype=np.int32))
    with pytest.raises(ValueError, match="a mask holds 2,147,483,647: .* named in a classes.csv"):
        open_pairs(tmp_path, cache_dir=cache)
    (tmp_path / "masks/a.png").unlink()
    for name in "ab":
        write(tmp_path / f"masks/{name}.tif", np.full((H, W), -1, dtype=np.int32))
    with pytest.raises(ValueError, match=r"images/a.jpg: labels \[-1\] are out of range; the 0 classes"):
        load_pairs(open_pairs(tmp_path, cache_dir=cache), "train")


def test_a_turned_mask_lies_upon_its_turned_picture(tmp_path, cache):
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    for name, values in (("images/a.png", picture()), ("masks/a.png", mask(*range(48)))):
        write(tmp_path / name, values)
        Image.fromarray(values).save(tmp_path / name, exif=turned)
    loaded = load_pairs(open_pairs(tmp_path, cache_dir=cache), "train")
    assert loaded.images.shape == (1, 3, W, H) and np.array_equal(loaded.targets[0], np.rot90(mask(*range(48)), -1))


def test_another_size_is_fine_and_another_aspect_is_not(tmp_path, cache):
    write(tmp_path / "images/a.png", picture((12, 16)))
    write(tmp_path / "masks/a.png", np.arange(48, dtype=np.uint8).reshape(6, 8))
    loaded = load_pairs(open_pairs(tmp_path, cache_dir=cache), "train", size=(3, 4))
    assert loaded.images.shape == (1, 3, 3, 4)
    assert np.array_equal(loaded.targets[0], np.arange(48).reshape(6, 8)[1::2, 1::2])  # nearest, nothing mixed
    write(tmp_path / "masks/a.png", mask(0, 1, size=(8, 6)))
    with pytest.raises(ValueError, match="12 x 16 px and its target 8 x 6 px"):
        load_pairs(open_pairs(tmp_path, cache_dir=cache), "train", size=(3, 4))


def test_damaged_files_are_listed_and_the_rest_is_loaded(tmp_path, cache):
    for name in "abcde":
        a_pair(tmp_path, f"images/{name}.png", f"masks/{name}.png", mask(0, 1))
    whole = (tmp_path / "images/b.png").read_bytes()
    (tmp_path / "images/b.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "masks/c.png").write_bytes(b"no picture")
    write(tmp_path / "masks/d.png", picture())
    (tmp_path / "masks/e.png").unlink()
    write(tmp_path / "masks/e.jpg", mask(0, 1))
    loaded = load_pairs(open_pairs(tmp_path, cache_dir=cache), "train")
    assert loaded.names == ["images/a.png"] and len(loaded.images) == 1
    reasons = {row["file"][7]: row["reason"] for row in loaded.left_out}
    assert set(reasons) == set("bcde") and "damaged PNG" in reasons["b"] and "not an image" in reasons["c"]
    assert "one value for each pixel" in reasons["d"] and "JPEG blurs" in reasons["e"]
    (tmp_path / "images/a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of 5 pairs could be read; images/a.png: empty file"):
        load_pairs(open_pairs(tmp_path, cache_dir=cache), "train")


def test_pictures_of_several_sizes_need_one(tmp_path, cache):
    a_pair(tmp_path, "images/a.png", "masks/a.png", mask(0, 1))
    write(tmp_path / "images/b.png", picture((8, 6)))
    write(tmp_path / "masks/b.png", mask(0, 1, size=(8, 6)))
    pairs = open_pairs(tmp_path, cache_dir=cache)
    with pytest.raises(ValueError, match="2 sizes"):
        load_pairs(pairs, "train")
    assert load_pairs(pairs, "train", (4, 4)).targets.shape == (2, 4, 4)
    assert load_pairs(pairs.select([1]), "train").targets.shape == (1, 8, 6)
    with pytest.raises(ValueError, match=r"no split 'test'; splits found: \['train'\]"):
        load_pairs(pairs, "test")
    with pytest.raises(ValueError, match="size as"):
        load_pairs(pairs, "train", (0, 4))


# ---------------------------------------------------------------- drawn and real


def test_drawn_scenes_come_from_two_worlds():
    assert module.TEST_WORLD == stages.TEST_WORLD
    pairs = open_pairs("scenes", n_scenes=(4, 3), seed=2)
    assert pairs.classes == list(MASK_CLASSES) and Counter(pairs.splits) == {"train": 4, "test": 3}
    loaded, scenes = load_pairs(pairs.select([1, 5]), "test", (32, 32)), draw_scenes(2, 32, 2 + stages.TEST_WORLD)
    assert np.array_equal(loaded.images[0], scenes.images[1].transpose(2, 0, 1))
    assert np.array_equal(loaded.targets[0], scenes.masks[1])
    depth = load_pairs(open_pairs("scenes", "depth", n_scenes=(2, 1)), "train", (32, 32)).targets
    assert np.array_equal(depth, draw_scenes(2, 32).depth)
    with pytest.raises(ValueError, match="drawn scenes are square"):
        load_pairs(pairs, "train", (32, 48))


def test_camvid_as_it_is_shared(shared_data, cache):
    pairs = open_pairs(shared_data / "camvid", cache_dir=cache)
    assert Counter(pairs.splits) == {"train": 367, "val": 101, "test": 233} and pairs.ignored == (11,)
    loaded = load_pairs(pairs.select(np.arange(0, 701, 50)), "test", (90, 120))
    shares = np.bincount(loaded.targets.flatten() + 1, minlength=12) / loaded.targets.numel()
    assert pairs.classes[3] == "Road" and 0.15 < shares[4] < 0.45 and 0 < shares[0] < 0.15


def test_rgbd_indoor_as_it_is_shared(shared_data, cache):
    pairs = open_pairs(shared_data / "rgbd-indoor", "depth", cache_dir=cache)
    assert Counter(pairs.splits) == {"train": 165, "test": 122} and pairs.classes == []
    kitchen = pairs.select([i for i, name in enumerate(pairs.names) if name.endswith("redkitchen_000000.jpg")])
    depth = load_pairs(kitchen, "train").targets
    assert depth[depth > 0].median().item() == pytest.approx(1.878)
    assert (depth > 0).float().mean().item() == pytest.approx(0.7376, abs=1e-4)
    with pytest.raises(ValueError, match="no pairs for segmentation"):
        open_pairs(shared_data / "rgbd-indoor", cache_dir=cache)
