"""Any pile of files becomes pixels, labels and a quarantine; nothing is lost and nothing stops the run."""

import csv
import io
import os
import tarfile
import urllib.error
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minidino.curation.pipeline import Curation
from minidino.images import datasets, named
from minidino.images.datasets import check_images, folder_labels, open_images, write_quarantine
from minidino.images.pixels import Pixels, inside_bars, load_pixels

ODD_NAMES = Path(__file__).resolve().parents[2] / "shared" / "data" / "nasty" / "odd_names.tar"


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_zip(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_folder(root: Path, members: dict[str, bytes]) -> Path:
    for name, data in members.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


PNG = png(noise(6, 8))
CLASSES = {f"set/{s}/{c}/{i}.png": png(noise(6, 8, i)) for s in ("train", "valid") for c in "ab" for i in range(2)}


# ------------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize(
    "files, labels, splits",
    [
        (["1.jpg", "2.jpg"], [None, None], ["", ""]),
        (["a/1.jpg", "b/1.jpg", "README.md"], ["a", "b", None], ["", "", ""]),
        (["w/train/a/1.jpg", "w/train/b/1.jpg", "w/test/a/1.jpg", "w/test/b/2.jpg"], list("abab"),
         ["train", "train", "val", "val"]),
        (["train/a/1.jpg", "train/b/1.jpg", "test/1.jpg"], ["a", "b", None], ["train", "train", "val"]),
        (["train/a/images/1.jpg", "train/b/images/1.jpg"], ["a", "b"], ["train", "train"]),
        (["train/a/1.png", "train/b/1.png", "unlabeled/1.png"], ["a", "b", None], ["train"] * 3),
        (["cats/lion/1.jpg", "cats/lynx/1.jpg", "dogs/wolf/1.jpg"], ["lion", "lynx", "wolf"], [""] * 3),
        (["2023/01/1.jpg", "2023/02/1.jpg", "2024/01/1.jpg"], [None] * 3, [""] * 3),
        (["a/1.jpg", "b/c/1.jpg"], [None, None], ["", ""]),
        (["train/1.jpg", "trainannot/1.png", "val/2.jpg"], [None] * 3, ["train", "", "val"]),
        (["photos/1.jpg", "photos/2.jpg"], [None, None], ["", ""]),
        (["a/x", "b/y", "b/z.jpg", "a/q.jpg", "__MACOSX/a/._q.jpg"], ["a", "b", "b", "a", None], [""] * 5),
        (["boat/1.jpg", "train/1.jpg"], ["boat", "train"], ["", ""]),
    ],
)  # fmt: skip
def test_labels_follow_the_folders(files, labels, splits):
    assert folder_labels(files) == (labels, splits)


@pytest.mark.parametrize("kind", ["folder", "stored.zip", "deflate.zip", "x.tar", "x.tar.gz"])
def test_one_set_five_packings(kind, tmp_path):
    where, members = tmp_path / kind, dict(reversed(CLASSES.items()))
    if kind == "folder":
        write_folder(where, members)
    elif kind.endswith(".zip"):
        write_zip(where, members, zipfile.ZIP_DEFLATED if "deflate" in kind else zipfile.ZIP_STORED)
    else:
        write_tar(where, members, "w:gz" if kind.endswith("gz") else "w")
    images = open_images(where, tmp_path / "cache")
    assert images.files == sorted(CLASSES) and images.classes == ["a", "b"]
    for unpacked in (tmp_path / "cache").glob("*.tar"):
        unpacked.unlink()
        images = open_images(where, tmp_path / "cache")  # unpacks again
    assert images.labels.dtype == np.int64 and images.labels.tolist() == [0, 0, 1, 1] * 2
    assert images.splits.tolist() == ["train"] * 4 + ["val"] * 4
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(images.read, list(range(8)) * 5)) == [CLASSES[f] for f in images.files] * 5
    val = images.split("val").select([3, 0])
    assert val.labels.tolist() == [1, 0] and val.read(0) == CLASSES["set/valid/b/1.png"]
    with pytest.raises(ValueError, match="no split 'test'"):
        images.split("test")


def test_a_folder_of_archives_is_one_set(tmp_path):
    root = write_folder(tmp_path / "set", {"CARD.md": b"# about", "broken_val.zip": b"PK\x05\x06 no", "x.csv": b""})
    write_zip(root / "one_train.zip", {"s/a/0.png": PNG, "s/b/1.png": PNG})
    write_tar(root / "two_test.tar", {"s/a/0.png": PNG})
    images = open_images(root, tmp_path / "cache")
    told = dict(zip(images.files, zip(images.labels.tolist(), images.splits.tolist(), strict=True), strict=True))
    assert told["one_train.zip/s/a/0.png"] == (0, "train") and told["two_test.tar/s/a/0.png"] == (0, "val")
    checked = check_images(images, progress=False)
    reasons = {row["file"]: row["reason"] for row in checked["quarantined"]}
    assert checked["decoded"] == 3 and len(images) == 6
    assert "not a readable archive" in reasons["broken_val.zip/broken_val.zip"] and "text" in reasons["CARD.md"]


def test_shards_take_labels_from_cls_and_json(tmp_path):
    root = tmp_path / "shards"
    root.mkdir()
    write_tar(root / "000000.tar", {"k1.jpg": PNG, "k1.cls": b"10\n", "k2.png": PNG, "k2.json": b'{"label": 9}'})
    write_tar(root / "000001.tar", {"k3.jpg": PNG, "k3.json": b'{"caption": "x"}', "k4.jpg": PNG, "k4.json": b"{"})
    images = open_images(root, tmp_path / "cache")
    assert images.classes == ["9", "10"]
    told = {f: int(label) for f, label in zip(images.files, images.labels, strict=True) if f.endswith(("jpg", "png"))}
    assert told == {"k1.jpg": 1, "k2.png": 0, "k3.jpg": -1, "k4.jpg": -1}


@pytest.mark.skipif(not ODD_NAMES.exists(), reason="shared/data/nasty is not here")
def test_odd_names_survive(tmp_path):
    images = open_images(ODD_NAMES, tmp_path)
    again = open_images(ODD_NAMES, tmp_path)  # from the index
    checked = check_images(again, progress=False)
    assert images.files == again.files and checked == {"decoded": 28, "quarantined": []}
    assert {"odd_names/new\nline.jpg", "odd_names/back\\slash.jpg", "odd_names/.hidden.jpg"} <= set(images.files)


def test_quarantine_keeps_any_name(tmp_path):
    rows = [{"file": n, "reason": 'why, "so"'} for n in ("new\nline", "cr\r\nlf", "a,b;\"c'", "\udcff.jpg", "\u202ex")]
    write_quarantine(tmp_path / "q.csv", rows)
    with open(tmp_path / "q.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert list(csv.DictReader(file)) == rows


@pytest.mark.parametrize("name", [".DS_Store", "LICENSE", "SHA256SUMS", "train.idx"])
def test_what_lies_beside_archives_is_no_picture(name, tmp_path):
    root = write_folder(tmp_path / "set", {name: b"\0\1"})
    write_zip(root / "train.zip", {"a/0.png": PNG, "b/1.png": PNG})
    images = open_images(root, tmp_path / "c")
    assert len(images) == 3 and check_images(images, progress=False)["decoded"] == 2
    write_folder(root, {"picture.npy": b""})  # but an archive among pictures is only a file
    with pytest.warns(UserWarning, match="archives beside pictures stay closed, 'train.zip' for one of 1: to see into"):
        assert sorted(open_images(root, tmp_path / "c").files) == sorted([name, "picture.npy", "train.zip"])


def test_archives_in_sub_folders_are_opened_where_no_picture_lies_beside_them(tmp_path):
    root = write_folder(tmp_path / "set", {"README.md": b"# about", ".cache/train/x.json": b"{}", "train/0.idx": b"0 1"})
    (root / "val").mkdir()
    write_tar(root / "train" / "0.tar", {"k1.jpg": PNG, "k1.cls": b"cat", "k2.jpg": PNG, "k2.cls": b"dog"})
    write_tar(root / "val" / "0.tar", {"k1.jpg": PNG, "k1.cls": b"dog"})
    images = open_images(root, tmp_path / "c")
    assert images.classes == ["cat", "dog"] and check_images(images, progress=False)["decoded"] == 3
    told = {f: (label, s) for f, label, s in zip(images.files, images.labels.tolist(), images.splits.tolist()) if label >= 0}
    assert told == {"train/0.tar/k1.jpg": (0, "train"), "train/0.tar/k2.jpg": (1, "train"),
                    "val/0.tar/k1.jpg": (1, "val")}  # fmt: skip


def test_a_deeply_nested_json_is_no_label(tmp_path):
    shard = write_tar(tmp_path / "s.tar", {"a.png": PNG, "a.json": b"[" * 200_000})
    assert open_images(shard, tmp_path / "c").labels.tolist() == [-1, -1]


def test_what_could_not_be_read_is_tried_again(tmp_path, monkeypatch):
    shut, access, opened = set(), os.access, open

    def guarded(file, *args, **kwargs):
        if Path(file).name in shut:
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", guarded)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name not in shut and access(path, mode))
    plain = write_folder(tmp_path / "plain", {"1.png": PNG, "2.png": PNG})
    packed = write_folder(tmp_path / "packed", {})
    packed.mkdir()
    write_zip(packed / "1.zip", {"1.png": PNG})
    write_zip(packed / "2.zip", {"2.png": PNG})
    for root, name in ((plain, "2.png"), (packed, "2.zip")):
        out = tmp_path / f"{root.name} pixels"
        shut.add(name)
        assert len(load_pixels(open_images(root, tmp_path / "c"), 8, out, progress=False)) == 1
        shut.clear()
        assert len(load_pixels(open_images(root, tmp_path / "c"), 8, out, progress=False)) == 2


def test_missing_and_empty_say_so(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no files in"):
        open_images(tmp_path / "empty", tmp_path / "c")
    with pytest.raises(FileNotFoundError, match="cifar10"):
        open_images(tmp_path / "nowhere", tmp_path / "c")
    (tmp_path / "empty" / "loop").symlink_to(tmp_path / "empty")
    (tmp_path / "empty" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    images = open_images(tmp_path / "empty", tmp_path / "c")
    assert "No such file" in check_images(images, progress=False)["quarantined"][0]["reason"]
    with pytest.raises(ValueError, match="none of the .* could be decoded"):
        load_pixels(images, 8, progress=False)
    with pytest.raises(ValueError, match="nothing to load: 0 files"):
        load_pixels(images.select([]), 8)


def test_the_index_is_used_and_rebuilt(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "x", {"1.png": PNG})
    first = open_images(root, tmp_path / "c")
    builder = datasets._build_index
    monkeypatch.setattr(datasets, "_build_index", lambda *a: pytest.fail("the index was not used"))
    assert open_images(root, tmp_path / "c").places == first.places
    monkeypatch.setattr(datasets, "_build_index", builder)
    write_folder(root, {"0.png": PNG})
    assert open_images(root, tmp_path / "c").files == ["0.png", "1.png"]
    (index,) = (tmp_path / "c").iterdir()  # and no temporary file is left
    index.write_text(index.read_text()[:-30])  # a torn index is not believed
    assert open_images(root, tmp_path / "c").files == ["0.png", "1.png"]


def test_without_a_place_for_the_index_nothing_stops(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "x", {"1.png": PNG})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert open_images(root).files == ["1.png"] and len(list((tmp_path / "own" / "minidino").iterdir())) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "1.png"))  # no folder, so nothing can be written there
    assert open_images(root).files == ["1.png"]
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-this-name")  # no home, as for a number without an account
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert open_images(root).files == ["1.png"]
    monkeypatch.chdir(tmp_path)
    Path("x").rename("~nobody-of-this-name")
    assert open_images("~nobody-of-this-name").files == ["1.png"]
    assert open_images("~nobody-of-this-name", "~nobody-either").files == ["1.png"]


# ------------------------------------------------------------------------------------------------ pixels


def test_batch_pads_below_and_right():
    array = np.stack([noise(5, 7, i) for i in range(3)])
    pixels = Pixels.from_array(array, [2, 0, 1], ["a", "b", "c"])
    images, sizes = pixels.select([2, 0]).batch([1, 0, 1])
    assert torch.equal(images, torch.from_numpy(array[[0, 2, 0]]).permute(0, 3, 1, 2))
    assert sizes.tolist() == [[5, 7]] * 3 and sizes.dtype == torch.int64
    assert pixels.select(np.array([False, True, True])).labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match="uint8"):
        Pixels.from_array(array.astype(float), [0, 0, 0], ["a"])


@pytest.mark.parametrize("on_disk", [False, True])
def test_load_pixels_once(on_disk, tmp_path, monkeypatch):
    big = png(noise(40, 60))
    files = {"big.png": big, "notes.txt": b"no", "small.png": PNG, "wide.png": png(noise(10, 90))}
    images = open_images(write_folder(tmp_path / "x", files), tmp_path / "c")
    out = tmp_path / "out" if on_disk else None
    pixels = load_pixels(images, 20, out, progress=False)
    assert pixels.files == ["big.png", "small.png", "wide.png"]
    assert pixels.sizes.tolist() == [[20, 30], [6, 8], [10, 40]]
    batch, sizes = pixels.batch([0, 1, 2])
    assert batch.shape == (3, 3, 20, 40) and batch.dtype == torch.uint8
    reference = np.asarray(Image.open(io.BytesIO(big)).resize((30, 20), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(batch[0, :, :, :30], reference) and not batch[0, :, :, 30:].any()
    assert np.array_equal(batch[1, :, :6, :8], noise(6, 8).transpose(2, 0, 1)) and not batch[1, :, 6:].any()
    squares = pixels.squares(10)
    assert squares.shape == (3, 3, 10, 10) and np.array_equal(squares[2], pixels.image(2)[:, :, 15:25])
    if on_disk:
        with open(out / "quarantine.csv", newline="") as file:
            assert [row["file"] for row in csv.DictReader(file)] == ["notes.txt"]
        assert sorted(p.name for p in out.iterdir()) == ["pixels.json", "pixels.u8", "quarantine.csv"]
        with monkeypatch.context() as patch:
            patch.setattr(datasets, "decode", lambda data: pytest.fail("decoded again"))
            assert torch.equal(load_pixels(images, 20, out, progress=False).batch([0, 1, 2])[0], batch)
        assert load_pixels(images, 10, out, progress=False).sizes[0].tolist() == [10, 15]


def barred(left: int, top: int, right: int, bottom: int, colors=((0, 0, 0), (0, 0, 0))) -> np.ndarray:
    """Noise of 20 x 30 px between bars of these widths; the second colour is that of the right and lower ones."""
    picture = np.empty((20 + top + bottom, 30 + left + right, 3), dtype=np.uint8)
    picture[:], picture[top + 20 :], picture[:, left + 30 :] = colors[0], colors[1], colors[1]
    picture[top : top + 20, left : left + 30] = noise(20, 30)
    return picture


@pytest.mark.parametrize("quality", (None, 60))
@pytest.mark.parametrize("widths", ((0, 12, 0, 12), (11, 0, 17, 0), (13, 13, 13, 13), (0, 0, 0, 0)))
@pytest.mark.parametrize("color", ((0, 0, 0), (200, 30, 60), (255, 255, 255)))
def test_bars_of_one_colour_on_opposite_sides_are_seen(widths, color, quality):
    picture = Image.fromarray(barred(*widths, colors=(color, color)))
    if quality:
        picture.save(file := io.BytesIO(), "JPEG", quality=quality, subsampling=0)
        picture = Image.open(file)
    left, top = widths[:2]
    found = inside_bars(np.asarray(picture).transpose(2, 0, 1))
    slack = 8 if quality else 0  # the blocks of a JPEG carry the picture into the bars
    assert np.abs(found - (left, top, left + 30, top + 20)).max() <= slack
    assert (found[:2] > 0).tolist() == [left > 0, top > 0]


@pytest.mark.parametrize(
    "picture",
    (
        barred(0, 7, 0, 0),  # on one side only: sky
        barred(8, 0, 8, 0, ((0, 0, 0), (255, 255, 255))),
        np.full((9, 12, 3), 80, dtype=np.uint8),
        np.pad(noise(2, 40), ((20, 20), (0, 0), (0, 0))),  # a line on paper is more than the line
        noise(1, 1),
    ),
)
def test_what_is_no_bar_stays(picture):
    assert inside_bars(picture.transpose(2, 0, 1)).tolist() == [0, 0, picture.shape[1], picture.shape[0]]


def test_bars_around_a_picture_with_a_plain_background_leave_what_the_picture_alone_leaves():
    bird = np.full((3, 40, 40), 90, dtype=np.uint8)
    bird[:, 8:36, 12:30] = noise(28, 18).transpose(2, 0, 1)
    for widths in (((9, 9), (0, 0)), ((0, 0), (6, 4)), ((9, 9), (5, 5))):
        framed = np.pad(bird, ((0, 0), *widths))
        assert (inside_bars(framed) - inside_bars(bird)).reshape(2, 2).tolist() == [[widths[1][0], widths[0][0]]] * 2


def test_a_box_of_a_picture_is_squeezed_like_the_cut_out_picture():
    pixels = Pixels.from_array(np.stack([noise(24, 40, seed) for seed in range(3)]), [0, 0, 0], ["a"])
    boxes = np.array([[0, 0, 40, 24], [5, 2, 30, 20], [1, 3, 9, 23]])
    found = pixels.whole(16, boxes)
    assert torch.equal(found[0], pixels.whole(16)[0])
    for i, (left, top, right, bottom) in enumerate(boxes):
        alone = Pixels.from_array(noise(24, 40, i)[None, top:bottom, left:right], [0], ["a"])
        assert torch.equal(found[i], alone.whole(16)[0])


# ------------------------------------------------------------------------------------------------ named sets


@pytest.mark.parametrize("name", named.dataset_names())
def test_without_internet_the_error_says_which_file_to_put_where(name, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no internet")

    utils = pytest.importorskip("torchvision.datasets.utils")
    monkeypatch.setattr(utils, "_get_redirect_url", offline)
    monkeypatch.setattr(utils, "_urlretrieve", offline)
    with pytest.raises(ConnectionError) as caught:
        open_images(name, tmp_path / "c", data_root=tmp_path / "d")
    for file in named.DOWNLOADS[name]:
        assert str(tmp_path / "d" / file) in str(caught.value)
    assert "no internet" in str(caught.value) and not list((tmp_path / "d").glob("*.zip"))


def test_a_named_set_opens_like_any_other(tmp_path, monkeypatch):
    class Fake:
        def __init__(self, root, train, download):
            self.data, self.targets = np.stack([noise(4, 4, 2 * i + train) for i in range(2)]), [1, 0]
            self.classes = ["airplane", "bird"]

    monkeypatch.setattr(pytest.importorskip("torchvision.datasets"), "CIFAR10", Fake)
    images = open_images("cifar10", tmp_path / "c", data_root=tmp_path / "d")
    assert images.classes == ["airplane", "bird"] and sorted(images.splits) == ["train"] * 2 + ["val"] * 2
    train = images.split("train")
    assert np.array_equal(np.asarray(train.image(int(np.flatnonzero(train.labels == 1)[0]))), noise(4, 4, 1))


def test_pictures_without_channels_are_not_asked_for(tmp_path):
    with pytest.raises(ValueError, match="channels: expected at least 1, got 0"):
        check_images(open_images(write_folder(tmp_path, {"a.png": PNG})), channels=0)


def test_a_set_that_was_unpacked_in_part_is_not_taken_for_the_whole(tmp_path, monkeypatch):
    pytest.importorskip("torchvision.datasets")
    for split in ("train", "val"):
        write_folder(tmp_path / "imagenette2-160" / split / "n01440764", {"a.jpeg": png(noise(8, 8))})
    with pytest.raises(ValueError, match="imagenette2-160: expected .*9469.* got .*'train': 1.*delete this folder"):
        named.download("imagenette", tmp_path)
    assert not (tmp_path / "imagenette.zip").exists()
    monkeypatch.setattr(named, "IMAGENETTE", {"train": 1, "val": 1})
    assert sorted(open_images(named.download("imagenette", tmp_path)).splits) == ["train", "val"]


def test_what_this_package_wrote_among_the_pictures_is_none_of_them(tmp_path):
    for name in ("a.png", "b.png", "runs/tour/pca.png", "runs/tour/pixels/train/x.png", "out/walls.png", "probe/figure.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    for name in ("runs/tour/config.json", "runs/tour/environment.json", "out/curation.json", "out/manifest.csv",
                 "probe/results.json", "probe/report.html"):  # fmt: skip
        (tmp_path / name).write_text("{}")
    assert open_images(tmp_path).files == ["a.png", "b.png"]
    assert open_images(tmp_path / "runs" / "tour").files  # unless it is asked for


def test_a_curation_in_its_own_pool_is_no_part_of_it_however_far_it_came(tmp_path):
    pool = write_folder(tmp_path / "pool", {f"{i}.png": png(noise(20, 20, i)) for i in range(3)})
    curation = Curation(pool, pool / "out", short_side=16, progress=False, say=lambda words: None)
    assert open_images(pool, tmp_path / "c").files == ["0.png", "1.png", "2.png"]  # decoded
    curation.drop_same()
    (pool / "out" / "copies-1.safetensors").write_bytes(b"weights")
    (pool / "out" / "kept.png").write_bytes(PNG)
    assert open_images(pool, tmp_path / "c").files == ["0.png", "1.png", "2.png"]  # half-way
    write_folder(pool, {"runs/x/pixels/train/.pixels.u8.123.tmp": b"123", ".photo.1.tmp": PNG, ".photo.png": PNG})
    assert open_images(pool, tmp_path / "c").files == [".photo.png", "0.png", "1.png", "2.png"]  # while decoding
    with pytest.raises(ValueError, match="is the pool itself.*--out"):
        Curation(pool, tmp_path / "x" / ".." / "pool")

