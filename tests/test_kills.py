"""What a kill, a full disk or a second process at once leaves behind is never taken for the whole."""

import hashlib
import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tarfile
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minidino import stages
from minidino.cli import main
from minidino.config import override, preset
from minidino.curation.pipeline import Curation
from minidino.evaluate import TASKS, evaluate
from minidino.images import named
from minidino.images import pixels as pixels_module
from minidino.images.batches import batches
from minidino.images.datasets import open_images
from minidino.images.pixels import Pixels, load_pixels
from minidino.images.scenes import draw_scenes
from minidino.model import weights
from minidino.model.vit import build_vit
from minidino.model.weights import backbone_of, export_weights
from minidino.pictures import funnel
from minidino.probes import features
from minidino.runs import Run, write_atomically

ROOT = Path(__file__).resolve().parents[1]
TINY_RUN = ["data.n_scenes=8", "data.n_test_scenes=4", "data.short_side=16", "crops.global_size=16", "crops.local_size=8",
            "vit.width=32", "vit.depth=1", "vit.heads=1", "heads.n_prototypes=16", "heads.hidden_dim=16",
            "optim.batch_size=4", "run.steps=2", "run.device=cpu"]  # fmt: skip


class Killed(BaseException):
    """Nothing after it runs, as after a kill."""


def dying_at(patch, owner, name, file):
    """Let a function of files be killed where its last path is called so."""
    real = getattr(owner, name)

    def until(*paths, **options):
        if Path(paths[-1]).name == file:
            raise Killed
        return real(*paths, **options)

    patch.setattr(owner, name, until)


def tiny(heads=4):
    return build_vit("vit_tiny", width=64, depth=1, heads=heads, patch_size=4, img_size=8)


@contextmanager
def full_disk(n_bytes):
    """No file can be longer."""
    resource = pytest.importorskip("resource")  # not on Windows
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def pool_of(folder, n=4, seed=0):
    folder.mkdir(parents=True)
    for i, image in enumerate(draw_scenes(n, 24, seed).images):
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


# ---------------------------------------------------------------- named sets

CAT, LIST = "Abyssinian_1", "annotations/{}.txt"
PACKED = {  # name: {archive: files}
    "imagenette": {"imagenette2-160.tgz": [f"imagenette2-160/{split}/n01440764/a.JPEG" for split in ("train", "val")]},
    "pets": {"oxford-iiit-pet/images.tar.gz": [f"images/{CAT}.jpg"],
             "oxford-iiit-pet/annotations.tar.gz": ["annotations/README", *map(LIST.format, ("trainval", "test"))]},
}  # fmt: skip
UNPACKING = """
import os, signal, sys, tarfile
from pathlib import Path
from tests import test_kills
from minidino.images import named
real, last = tarfile.TarFile.makefile, sys.argv[3]
def until(archive, member, path):
    if member.name == last:
        os.kill(os.getpid(), signal.SIGKILL)
    real(archive, member, path)
tarfile.TarFile.makefile = until
test_kills.know(sys.argv[1], Path(sys.argv[2]), test_kills.pytest.MonkeyPatch())
named.download(sys.argv[1], sys.argv[2])
"""


def know(name, root, patch):
    """Let torchvision take the archives below root for the real ones."""
    datasets = pytest.importorskip("torchvision.datasets")
    sums = [("http://localhost/" + Path(file).name, hashlib.md5((root / file).read_bytes()).hexdigest()) for file in PACKED[name]]
    if name == "pets":
        patch.setattr(datasets.OxfordIIITPet, "_RESOURCES", sums)
    else:
        patch.setattr(datasets.Imagenette, "_ARCHIVES", {"160px": sums[0]})


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is posix")
@pytest.mark.parametrize("name, last", [("imagenette", PACKED["imagenette"]["imagenette2-160.tgz"][1]),
                                        ("pets", LIST.format("trainval"))])  # fmt: skip
def test_a_named_set_that_was_killed_while_it_is_unpacked_is_unpacked_anew(name, last, tmp_path, monkeypatch):
    for file, members in PACKED[name].items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        with tarfile.open(tmp_path / file, "w:gz") as archive:
            for member in members:
                data = f"{CAT} 1 1 1\n".encode() if "/t" in member else b"a picture"
                told = tarfile.TarInfo(member)
                told.size = len(data)
                archive.addfile(told, io.BytesIO(data))
    words = [sys.executable, "-c", UNPACKING, name, str(tmp_path), last]
    assert subprocess.run(words, cwd=ROOT).returncode == -signal.SIGKILL
    know(name, tmp_path, monkeypatch)
    monkeypatch.setattr(named, "IMAGENETTE", {"train": 1, "val": 1})
    with zipfile.ZipFile(named.download(name, tmp_path)) as archive:
        assert len(archive.namelist()) == 2
    assert not list(tmp_path.rglob(".*"))


def test_what_somebody_has_unpacked_in_part_is_named_and_left(tmp_path):
    pytest.importorskip("torchvision.datasets")
    (tmp_path / "imagenette2-160" / "train" / "n01440764").mkdir(parents=True)
    with pytest.raises(ValueError, match="imagenette cannot be read.*delete .*imagenette2-160 and run again"):
        named.download("imagenette", tmp_path)
    assert (tmp_path / "imagenette2-160").exists()


# ---------------------------------------------------------------- pixels


def test_two_processes_decode_the_same_pictures_at_once(tmp_path, monkeypatch):
    images, write = open_images(pool_of(tmp_path / "pool")), pixels_module.write_atomically

    def meanwhile(path, data):
        write(path, data)
        if path.name == "pixels.json":  # the other one is about to put its pixels.u8 in place
            path.unlink()

    monkeypatch.setattr(pixels_module, "write_atomically", meanwhile)
    found = load_pixels(images, 16, tmp_path / "pixels", progress=False)
    assert found.fingerprint() == load_pixels(images, 16, progress=False).fingerprint()


def test_a_quarantine_of_other_files_is_not_taken_for_that_of_these(tmp_path, monkeypatch):
    pool, out, quiet = pool_of(tmp_path / "pool"), tmp_path / "out", {"progress": False, "say": lambda words: None}
    (pool / "bad.jpg").write_bytes(b"no picture")
    Curation(pool, out, 16, **quiet)
    (pool / "bad.jpg").rename(tmp_path / "aside")
    (pool / "worse.jpg").write_bytes(b"no picture either")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dying_at(patch, Path, "unlink", "pixels.json")
        Curation(pool, out, 16, **quiet)
    (tmp_path / "aside").rename(pool / "bad.jpg")
    (pool / "worse.jpg").unlink()
    assert "bad.jpg,0,quarantined" in Curation(pool, out, 16, **quiet).write().read_text()


# ---------------------------------------------------------------- curation


def test_the_manifest_of_one_pool_never_stands_beside_the_note_of_another(tmp_path, monkeypatch):
    out, quiet = tmp_path / "out", {"progress": False, "say": lambda words: None}
    pools = [pool_of(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two"))]
    Curation(pools[0], out, 16, **quiet).write()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dying_at(patch, os, "replace", "manifest.csv")
        Curation(pools[1], out, 16, **quiet).write()
    assert str(pools[1]) in (out / "curation.json").read_text() and not (out / "manifest.csv").exists()


def test_what_killed_curations_left_half_written_goes(tmp_path, capsys):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    pool, out = pool_of(tmp_path / "pool"), tmp_path / "out"
    litter = [out / name for name in ("pixels/.pixels.json.tmp", "stages/.copies.npz.tmp", ".manifest.csv.tmp")]
    litter = [path.with_suffix(f".{gone.pid}.tmp") for path in litter]
    for path in litter:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert main(["curate", str(pool), "--out", str(out), "--copy-steps", "0"]) == 0
    assert not list(out.rglob("*.tmp"))


def test_a_figure_on_a_full_disk_is_told_by_file_and_leaves_nothing(tmp_path):
    with full_disk(2000), pytest.raises(OSError, match=r"\[Errno .*funnel\.png"):
        funnel({"files": 3, "decoded": 2}, tmp_path / "funnel.png")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- features


def test_two_processes_describe_the_same_pictures_at_once(tmp_path, monkeypatch):
    store, key, rows = features.FeatureStore(tmp_path), features.feature_key("w", "d", 8), torch.arange(6.0).view(2, 3)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)
        first = store.get(key, lambda: {"cls": rows})  # the other process, from its start to its end ...
    (made,) = tmp_path.glob("d-*/made.json")
    begun = made.stat().st_ino
    with monkeypatch.context() as patch:  # ... while this one, which found nothing, describes and then writes
        patch.setattr(features.FeatureStore, "_valid", staticmethod(later(features.FeatureStore._valid)))
        second = store.get(key, lambda: {"cls": rows})
    assert np.array_equal(first["cls"], rows) and np.array_equal(second["cls"], rows)
    assert made.stat().st_ino == begun and [path.name for path in tmp_path.iterdir()] == [made.parent.name]


def later(valid):
    """False the first time."""
    calls = []
    return lambda *of: bool(calls) and valid(*of) or calls.append(of) is not None


@pytest.mark.parametrize("value", [torch.zeros(0, 3), torch.tensor(2.0), torch.arange(12).view(3, 4).T, np.eye(3)[None]])
def test_features_are_saved_as_numpy_saves_them(value, tmp_path):
    np.save(tmp_path / "numpy.npy", np.ascontiguousarray(value) if np.ndim(value) else np.asarray(value))
    n_bytes = features._save(tmp_path / "ours.npy", np.asarray(value))
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()
    assert n_bytes == (tmp_path / "ours.npy").stat().st_size


@pytest.mark.parametrize("n_bytes", [100, 5000, 9000])
def test_features_on_a_full_disk_are_told_by_file_and_leave_nothing(n_bytes, tmp_path):
    store, arrays = features.FeatureStore(tmp_path), {"cls": torch.ones(1000), "mean_patch": torch.ones(2000)}
    with full_disk(n_bytes):
        if n_bytes < 9000:
            with pytest.raises(OSError, match=r"\[Errno .*(cls|mean_patch)\.npy"):
                store.get(features.feature_key("w", "d", 8), lambda: arrays)
            assert not list(tmp_path.iterdir())
        else:
            assert len(store.get(features.feature_key("w", "d", 8), lambda: arrays)["mean_patch"]) == 2000


def test_a_probe_where_nothing_can_be_written_keeps_its_descriptions_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    source = export_weights(tiny(), tmp_path / "vit.safetensors")
    (tmp_path / "runs").touch()  # no folder, as root can write into any
    for folder in "ab":
        pool_of(tmp_path / "pool" / folder, 10)
    assert main(["probe", str(source), "--data", "pool", "--size", "8", "--out", "out"]) == 0
    assert re.search("runs/features cannot be written, .* kept in .*home/minidino/features", capsys.readouterr().err)
    assert list((tmp_path / "home" / "minidino" / "features").glob("*/made.json"))


def test_features_among_archives_do_not_close_them(tmp_path, monkeypatch):
    (tmp_path / "sets").mkdir()
    with zipfile.ZipFile(tmp_path / "sets" / "set.zip", "w") as archive:
        for i, path in enumerate(sorted(pool_of(tmp_path / "pool", 20).iterdir())):
            archive.write(path, f"{'ab'[i % 2]}/{path.name}")
    source = export_weights(tiny(), tmp_path / "vit.safetensors")
    monkeypatch.chdir(tmp_path / "sets")
    for out in ("first", "second"):
        assert main(["probe", str(source), "--data", ".", "--size", "8", "--out", str(tmp_path / out)]) == 0
    first, second = (json.loads((tmp_path / out / "results.json").read_text()) for out in ("first", "second"))
    assert first["answers"] == second["answers"] and len(open_images(".")) == 20


@pytest.mark.skipif(os.name != "posix", reason="needs locks of POSIX")
def test_two_networks_at_once_do_not_answer_into_one_folder(tmp_path, monkeypatch):
    for folder in "ab":
        pool_of(tmp_path / "pool" / folder, 10)
    first, second = (export_weights(tiny(heads), tmp_path / f"{heads}.safetensors") for heads in (2, 4))
    given = {"data": str(tmp_path / "pool"), "size": 8, "out": tmp_path / "out", "cache": tmp_path / "features"}

    def meanwhile(*asked):
        monkeypatch.undo()
        with pytest.raises(BlockingIOError, match="another process is at work in .*out"):
            evaluate(second, **given)
        return TASKS["knn"].ask(*asked)

    monkeypatch.setitem(TASKS, "knn", replace(TASKS["knn"], ask=meanwhile))
    assert evaluate(first, **given)["source"] == str(first)


# ---------------------------------------------------------------- files


@pytest.mark.skipif(os.name != "posix", reason="asks for a process by its number")
def test_what_killed_writers_of_a_file_left_goes_with_its_next_write(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = [".w[1].pth.{}.tmp", ".w1.pth.{}.tmp"]
    dead, other = (tmp_path / name.format(gone.pid) for name in names)
    alive, number = tmp_path / names[0].format(os.getppid()), tmp_path / names[0].format("x")
    for path in (dead, other, alive, number):
        path.touch()
    write_atomically(tmp_path / "w[1].pth", b"")
    assert dead.exists()  # perhaps of another machine, which writes it right now
    for path in (dead, other, alive, number):
        os.utime(path, (0, 0))
    write_atomically(tmp_path / "w[1].pth", b"")
    assert [path.exists() for path in (dead, other, alive, number)] == [False, True, True, True]


@pytest.mark.skipif(os.name != "posix", reason="a umask is posix")
@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.txt"])
def test_whoever_may_read_files_of_the_user_may_read_ours(name, mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / name, b"") if name == "w.txt" else export_weights(tiny(), tmp_path / name, "hub")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode


def test_metrics_on_a_full_disk_are_told_by_file(tmp_path):
    with full_disk(10), pytest.raises(OSError, match=r"\[Errno .*metrics\.jsonl"):
        Run(tmp_path).log({"step": 0, "seconds": 1.0})


# ---------------------------------------------------------------- exports


@pytest.mark.parametrize("n_bytes", [100, 20_000, 200_000])
@pytest.mark.parametrize("layout, name, file", [("hub", "w.pth", "w.pth"), ("timm", "w.safetensors", "w.safetensors"),
                                                ("huggingface", "w", "model.safetensors")])  # fmt: skip
def test_an_export_to_a_full_disk_is_a_line_that_names_the_file(layout, name, file, n_bytes, tmp_path, capsys):
    source = export_weights(tiny(), tmp_path / "vit.safetensors")
    out = tmp_path / "out" / name
    with full_disk(n_bytes):
        assert main(["export", str(source), "--layout", layout, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert re.search(r"\[Errno|could not be written", said) and file in said and said.count("\n") == 1
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_the_weights_of_one_network_never_stand_beside_the_config_of_another(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    export_weights(tiny(heads=2), folder, "huggingface")
    with full_disk(20_000), pytest.raises(OSError, match=r"model\.safetensors"):
        export_weights(tiny(heads=4), folder, "huggingface")
    assert backbone_of(folder).heads == 2  # the older export is whole
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dying_at(patch, os, "replace", "config.json")
        export_weights(tiny(heads=4), folder, "huggingface")
    assert not (folder / "config.json").exists()
    export_weights(tiny(heads=4), folder, "huggingface")
    assert backbone_of(folder).heads == 4


def test_two_files_of_a_graph_are_of_one_network(tmp_path, monkeypatch):
    class Program:
        def save(self, path, external_data):
            path.with_name(f"{path.name}.data").write_bytes(b"new" * 100)
            path.write_bytes(b"new")

    path, data = tmp_path / "w.onnx", tmp_path / "w.onnx.data"
    monkeypatch.setattr(weights, "ONE_FILE", 0)
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: Program())
    for file in (path, data):
        file.write_bytes(b"old")
    with full_disk(200), pytest.raises(OSError, match=r"\[Errno"):
        export_weights(tiny(), path, "onnx")
    assert (path.read_bytes(), data.read_bytes()) == (b"old", b"old") and len(list(tmp_path.iterdir())) == 2
    for last in (data, path):
        path.write_bytes(b"old")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            dying_at(patch, os, "replace", last.name)
            export_weights(tiny(), path, "onnx")
        assert not path.exists()
    export_weights(tiny(), path, "onnx")
    assert path.read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("n_bytes, file", [(40_000, "step_"), (4_000, "safetensors|step_")])
def test_training_on_a_full_disk_ends_in_a_line_that_names_the_file(n_bytes, file, tmp_path, capsys):
    with full_disk(n_bytes):
        assert main(["train", "--out", str(tmp_path / "run"), *TINY_RUN]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("minidino train: ") and re.search(file, said) and not list(tmp_path.rglob("weights.safetensors"))


def test_a_step_that_takes_more_memory_than_there_is_ends_in_a_line_that_says_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stages, "train", lambda *args: iter(torch.empty(1 << 50)))
    assert main(["train", "--out", str(tmp_path / "run"), *TINY_RUN]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match("minidino train: .*memory.* optim.accumulate", said)


# ---------------------------------------------------------------- batches


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere shared memory is no file, whose size can be limited")
def test_workers_without_shared_memory_end_in_words():
    images = Pixels.from_array(np.zeros((64, 80, 80, 3), np.uint8), [0] * 64, ["one"])
    config = override(preset("scenes-cpu"), ["optim.batch_size=64", "run.workers=2", "run.steps=2"])
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("who waits for the workers waits for ever"))
    signal.alarm(60)
    try:
        with full_disk(1 << 16), pytest.raises(OSError, match="run.workers: one of 2 .*--shm-size.*torch_.*File too large"):
            list(batches(config, images, torch.device("cpu")))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
