"""What is done to pictures that travel, and the net that knows them again."""

import csv
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn

from minidino.cli import main
from minidino.curate import curate, trained_describer
from minidino.images import attacks
from minidino.images.datasets import open_images
from minidino.images.pixels import Pixels
from minidino.images.scenes import draw_scenes
from minidino.learning import copies
from minidino.learning.copies import SHRINKAGE, CopyDescriptor, CopyNet, info_nce, train_copies


def some_crops(n=6, size=32, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------ attacks


@pytest.mark.parametrize("name", ["turn", "frame", "write", "noise", "compress"])
@pytest.mark.parametrize("size", [32, 43])
def test_an_attack_changes_every_row_and_nothing_else(name, size):
    crops = some_crops(size=size)
    before = crops.clone()
    changed = getattr(attacks, name)(crops, generator())
    assert (crops == before).all() and changed.shape == crops.shape and changed.isfinite().all()
    assert ((changed - crops).abs().amax((1, 2, 3)) > 0.01).all()


def test_attacks_take_their_shares_and_leave_the_rest():
    crops = some_crops(2000, 8)
    changed = attacks.attack(crops, generator())
    untouched = (changed == crops).all(3).all(2).all(1).float().mean()
    expected = np.prod([1 - share for share in attacks.SHARES.values()])
    assert abs(untouched - expected) < 4 * (expected * (1 - expected) / 2000) ** 0.5


def test_the_generator_decides_the_attacks():
    first, again, other = (attacks.attack(some_crops(), generator(seed)) for seed in (0, 0, 1))
    assert (first == again).all() and (first != other).any()


def test_a_frame_holds_the_picture_smaller():
    crops = torch.full((200, 3, 40, 40), 9.0)  # no other colour is as bright
    framed = attacks.frame(crops, generator())
    pasted = (framed > 8.9).all(1).all(2).all(1)  # another picture, which is as bright here, is the ground
    assert 0.35 < pasted.float().mean() < 0.65
    share = (framed[~pasted, 0] > 8.9).float().mean((1, 2)).sqrt()
    assert share.min() > 0.35 and share.max() < 0.95 and share.std() > 0.1


def test_compression_rounds_the_cosine_transform():
    crops = some_crops(1, 16)
    changed = attacks.compress(crops, generator())
    block = dctn(changed[0, 1, 8:, :8].double().numpy(), norm="ortho")
    step = (1 + np.arange(8)[:, None] + np.arange(8)) * (0.05 + 0.25 * torch.rand(1, generator=generator()).item())
    np.testing.assert_allclose(block / step, np.round(block / step), atol=1e-3)


def test_writing_is_there_in_many_forms():
    masks = attacks._writing(64)
    ink = masks.mean((1, 2, 3))
    assert (ink > 0).float().mean() > 0.95 and ink.max() < 0.6
    assert len({mask.numpy().tobytes() for mask in masks}) > 0.95 * len(masks)


# ------------------------------------------------------------------------------------------------ the net


def test_info_nce_is_the_mean_log_share_of_the_other_view():
    one, other = (torch.nn.functional.normalize(torch.randn(5, 4, dtype=torch.float64), dim=1) for _ in range(2))
    z, total = torch.cat([one, other]), 0.0
    for i in range(10):
        shares = [torch.exp(z[i] @ z[j] / 0.2) for j in range(10) if j != i]
        total -= torch.log(torch.exp(z[i] @ z[(i + 5) % 10] / 0.2) / sum(shares))
    torch.testing.assert_close(info_nce(one, other, 0.2), total / 10)


def test_the_net_gives_unit_rows_and_every_parameter_learns():
    net = CopyNet(width=8, dim=16)
    rows = net(some_crops(4, 40))
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(4))
    (rows * torch.randn(4, 16)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_light_and_tint_do_not_count():
    net, crops = CopyNet(width=8, dim=16).eval(), some_crops(4, 40)
    other = 2 * crops + torch.tensor([0.5, -1.0, 0.2])[:, None, None]
    assert (net(crops) * net(other)).sum(1).min() > 0.999 > (net(crops) @ net(crops).T)[0, 1]


def test_a_descriptor_is_white_on_its_pool_and_knows_no_left_and_right():
    descriptor, crops = CopyDescriptor(CopyNet(width=8, dim=16).eval()), some_crops(200, 32)
    torch.testing.assert_close(descriptor(crops), descriptor(crops.flip(3)))
    before = descriptor(crops)
    descriptor.whiten(before)
    white = (before - descriptor.mean) @ descriptor.whitening
    variance = torch.linalg.eigvalsh(before.T.cov())
    expected = torch.diag(variance / (variance + SHRINKAGE * variance.mean()))
    torch.testing.assert_close(white.T.cov(), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(descriptor(crops), torch.nn.functional.normalize(white, dim=1), atol=1e-4, rtol=0)
    strangers = [(z @ z.T).fill_diagonal_(0).abs().mean() for z in (before, descriptor(crops))]
    assert strangers[1] < strangers[0] / 2


def test_few_pictures_can_be_whitened():
    descriptor, crops = CopyDescriptor(CopyNet(width=8, dim=16).eval()), some_crops(2, 32)
    descriptor.whiten(descriptor(crops))
    torch.testing.assert_close(descriptor(crops).norm(dim=1), torch.ones(2))


def scenes_pixels(n=64, size=40):
    scenes = draw_scenes(n, size, 7)
    return Pixels.from_array(scenes.images, scenes.labels, [str(i) for i in range(10)])


def test_training_teaches_to_know_pictures_again(monkeypatch):
    """A tiny net in 80 steps: from gentle crops alone it learns to be better than a guess among 31 views."""
    monkeypatch.setattr("minidino.learning.copies.attack", lambda views, generator: views)
    monkeypatch.setitem(copies.COPY, "scale", (0.6, 1.0))
    torch.manual_seed(0)
    net, settings = CopyNet(width=8, dim=32), {"batch_size": 16, "size": 24, "lr": 1e-2, "temperature": 0.2}
    losses = [record["info_nce"] for record in train_copies(scenes_pixels(16), net, steps=80, **settings)]
    assert not net.training and np.mean(losses[:8]) > np.log(31) > np.mean(losses[-8:]) + 0.2


def test_no_picture_is_told_from_itself(monkeypatch):
    looked, seeds = [], copies.crop_seed
    monkeypatch.setattr(copies, "crop_seed", lambda seed, step, i: looked.append((step, i)) or seeds(seed, step, i))
    list(train_copies(scenes_pixels(11), CopyNet(width=4, dim=8), steps=4, batch_size=8, size=16))
    assert len(set(looked)) == len(looked)


def test_training_is_the_same_each_time_and_needs_two_pictures():
    def run():
        torch.manual_seed(0)
        net = CopyNet(width=4, dim=8)
        return [record["loss"] for record in train_copies(scenes_pixels(), net, steps=3, batch_size=16, size=16)]

    assert run() == run()
    with pytest.raises(ValueError, match="at least 2 pictures"):
        next(train_copies(scenes_pixels(1), CopyNet(4, 8)))


def test_pictures_that_are_all_flat_are_described_by_numbers(tmp_path):
    pixels = Pixels.from_array(np.stack([np.full((48, 48, 3), c, dtype=np.uint8) for c in (0, 90)]), [0, 0], ["flat"])
    describe = trained_describer(pixels, tmp_path, steps=1).describe
    assert describe(pixels.whole(64)).isfinite().all()


def test_a_describer_is_trained_once(tmp_path):
    first = trained_describer(scenes_pixels(), tmp_path, steps=2)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = trained_describer(scenes_pixels(), tmp_path, steps=2)
    assert first.made_by == again.made_by and first.kind == "copy"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written


# ------------------------------------------------------------------------------------------------ the whole stage


@pytest.fixture
def pool(tmp_path):
    folder = tmp_path / "pool"
    folder.mkdir()
    for i, image in enumerate(draw_scenes(30, 48, 3).images):
        Image.fromarray(image).save(folder / f"{i:02d}.png")
    Image.open(folder / "00.png").save(folder / "again.bmp")
    return folder


def test_the_stage_leaves_manifest_pictures_and_report(pool, tmp_path):
    manifest = curate(pool, tmp_path / "out", copy_steps=2)
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"manifest.csv", "curation.json", "funnel.png", "kept.png", "report.html"} <= made
    assert "again.bmp" not in open_images(manifest).files
    report = (tmp_path / "out" / "report.html").read_text()
    assert "same picture" in report and "pictures in a group" in report


class Grain(torch.nn.Module):
    """Two kinds of pictures: with grain and without."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        grainy = (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3)) > 0.5
        return self.scale * torch.stack([grainy, ~grainy], 1)


def test_a_given_model_sees_pictures_as_large_as_it_looks_at_them(tmp_path):
    (tmp_path / "pool").mkdir()
    grain = 60 * (np.indices((288, 288)).sum(0) % 2)[..., None]  # lost on 112 px
    for i, image in enumerate(draw_scenes(2, 288, 3).images):
        Image.fromarray((image // 2 + i * grain).astype(np.uint8)).save(tmp_path / "pool" / f"{i}.png")
    torch.jit.script(Grain()).save(str(tmp_path / "model.pt"))
    manifest = curate(tmp_path / "pool", tmp_path / "out", copies=tmp_path / "model.pt")
    assert open_images(manifest).files == ["0.png", "1.png"]


def test_names_may_be_anything_that_a_file_system_takes(pool, tmp_path, capsys):
    exam = tmp_path / "test$\\frac$\udcff"
    try:
        shutil.copytree(pool, exam)
    except OSError:
        pytest.skip("needs a file system that takes any bytes for a name")
    (exam / "cut.png").write_bytes(b"")
    shutil.copy(pool / "00.png", exam / "\udcfe.png")
    curate(exam, tmp_path / "out", protect=[exam], copy_steps=1)
    assert r"unlike test$\frac$\udcff: " in capsys.readouterr().out
    report = (tmp_path / "out" / "report.html").read_text()
    assert r"too close to test$\frac$\udcff" in report and "1 of 33 pictures of" in report


@pytest.mark.parametrize("share", [0, 0.5])
def test_weights_that_a_full_disk_cut_are_learned_again(pool, tmp_path, share):
    manifest = curate(pool, tmp_path / "out", copy_steps=1).read_bytes()
    (path,) = (tmp_path / "out").glob("copies-*.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert curate(pool, tmp_path / "out", copy_steps=1).read_bytes() == manifest
    assert len(path.read_bytes()) == len(data)


def test_two_at_once_do_not_spoil_each_other(pool, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "out").mkdir()
    handle = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)  # as another process that is at work
    with pytest.raises(BlockingIOError, match=f"another process is at work in {tmp_path / 'out'}"):
        curate(pool, tmp_path / "out", copy_steps=1)
    os.close(handle)
    assert curate(pool, tmp_path / "out", copy_steps=1).exists()


@pytest.mark.parametrize(("copies", "leaks", "kept"), [("0.9999", "0.9999", 30), ("-1", "0.9999", 1), ("0.9999", "-1", 0)])
def test_thresholds_are_those_that_were_asked_for(pool, tmp_path, copies, leaks, kept):
    (tmp_path / "exam").mkdir()
    Image.fromarray(draw_scenes(1, 48, 9).images[0]).save(tmp_path / "exam" / "0.png")
    main(["curate", str(pool), "--out", str(tmp_path / "out"), "--copy-steps", "2", "--protect", str(tmp_path / "exam"),
          "--copy-threshold", copies, "--leak-threshold", leaks])  # fmt: skip
    with open(tmp_path / "out" / "manifest.csv", newline="") as file:
        assert sum(row["kept"] == "1" for row in csv.DictReader(file)) == kept


@pytest.mark.parametrize(("asked", "words"), [
    ({"budget": 3}, "need --features"), ({"queries": "x"}, "need --features"),
    ({"queries": "x", "budget": 3}, "got both"),
])  # fmt: skip
def test_impossible_requests_are_refused_before_any_work(tmp_path, asked, words):
    with pytest.raises(ValueError, match=words):
        curate(tmp_path, tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_kept_weights_give_the_same_manifest_on_any_number_of_threads(pool, tmp_path):
    """Training itself may differ in its last bits; its result is kept in the folder."""
    import faiss

    manifests, threads_before = [], (torch.get_num_threads(), faiss.omp_get_max_threads())
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            faiss.omp_set_num_threads(threads)
            out = tmp_path / str(threads)
            out.mkdir()
            for weights in (tmp_path / "1").glob("copies-*.safetensors"):
                shutil.copy(weights, out)
            manifests.append(curate(pool, out, copy_steps=2).read_bytes())
    finally:
        torch.set_num_threads(threads_before[0])
        faiss.omp_set_num_threads(threads_before[1])
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize(("options", "words"), [
    ("size=128k", "No space left on device"),  # 207 kB of pixels
    ("size=512k", "No space left on device"),  # and the weights of the copy network
    ("ro", "Read-only file system"),
])  # fmt: skip
def test_a_disk_that_takes_nothing_is_one_line(pool, tmp_path, options, words):
    """On a file system of its own, mounted for one process."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    (tmp_path / "disk").mkdir()
    script = f'mount -t tmpfs -o {options} disk "$1" && exec "$2" -m minidino.cli curate "$3" --copy-steps 2 --out "$1/x"'
    command = ["unshare", "-rm", "sh", "-c", script, "sh", tmp_path / "disk", sys.executable, pool]
    ended = subprocess.run(command, capture_output=True, text=True)
    last = ended.stderr.splitlines()[-1]
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert last.startswith("minidino curate: ") and words in last and str(tmp_path / "disk" / "x") in last
