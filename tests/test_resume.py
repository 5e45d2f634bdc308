"""A run survives: kills at any moment, damaged disks, folders that are not its own."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from minidino import stages
from minidino.cli import main
from minidino.config import override, preset
from minidino.images.scenes import draw_scenes
from minidino.learning.teacher import build_backbone, build_student
from minidino.learning.train import start
from minidino.model.weights import load_weights
from minidino.runs import Run, pick_device, write_atomically
from minidino.stages import open_world, pretrain

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "data.n_scenes=48", "data.n_test_scenes=24", "data.short_side=32", "crops.global_size=32", "crops.local_size=16",
    "vit.width=16", "vit.depth=2", "vit.heads=2", "heads.n_prototypes=16", "heads.hidden_dim=16",
    "heads.bottleneck_dim=8", "optim.batch_size=8", "run.device=cpu", "run.log_every=1",
]  # fmt: skip


def tiny(*changes):
    return override(preset("scenes-cpu"), [*TINY, *changes])


# ---------------------------------------------------------------- kill -9

STEPS, EVERY = 60, 5
# everything that has a memory of its own: centers, stochastic depth, parts of a batch, half precision
CHAIN = [
    *TINY, f"run.steps={STEPS}", f"run.checkpoint_every={EVERY}", "run.knn_every=20", "loss.targets=centering",
    "vit.drop_path_rate=0.3", "optim.accumulate=2", "run.precision=bf16",
]  # fmt: skip
FORKED = multiprocessing.get_context("forkserver") if os.name == "posix" else None  # imports torch once for all


def die_saving(*arguments):
    """Be killed while the first checkpoint is half on the disk."""
    save = torch.save

    def half(state, path):
        save(state, path)
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half
    main(arguments)


def die_finishing(*arguments):
    """Be killed when the backbone is written and the heads are not."""
    stages.write_state = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    main(arguments)


def work(*arguments):
    sys.exit(main(arguments))


def fork(*arguments, target=work):
    process = FORKED.Process(target=target, args=("train", *map(str, arguments)))
    process.start()
    return process


def command(log, *arguments):
    words = [sys.executable, "-m", "minidino.cli", "train", *map(str, arguments)]
    with open(log, "w") as told:
        return subprocess.Popen(words, cwd=ROOT, stdout=told, stderr=told)


def kill_when(process, moment, delay=0.0):
    """SIGKILL as soon as moment() is true, and a little later; the process must still be running then."""
    deadline = time.monotonic() + 60
    while not moment():
        assert process.exitcode is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "nothing happened for a minute"
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def assert_equal_trees(a, b, where="state"):
    """Nested dictionaries, lists and tensors agree to the bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal_trees(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_equal_trees(*pair, f"{where}[{i}]")
    else:
        assert a == b, where


def metrics(folder):
    """Lines of metrics.jsonl as they stand, without the one number that is of the clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


@pytest.mark.skipif(FORKED is None, reason="needs SIGKILL and fork")
def test_ten_kills_change_nothing(tmp_path, monkeypatch):
    """Ten SIGKILLs along one run, at moments from a fixed seed; the result equals the undisturbed run's to the bit.

    The undisturbed run, one of the killed and the last are commands of their own; the others are forked from a
    process that has the imports behind it.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # sums in one order
    FORKED.set_forkserver_preload(["minidino.stages", "minidino.cli"])
    chance, run, calm = random.Random(7), tmp_path / "killed", tmp_path / "calm"

    def read_steps():
        return (run / "metrics.jsonl").read_bytes().count(b"\n") if (run / "metrics.jsonl").exists() else 0

    def half_written():
        return list(run.glob("checkpoints/.step_*.tmp"))

    def kill_at(step):
        """When this many steps are written down, or a little later."""
        kill_when(fork("--resume", run), lambda: read_steps() >= step, chance.uniform(0, 0.02))

    def kill_saving(step):
        """Caught in the act, or at this step where the disk was too fast."""
        kill_when(fork("--resume", run), lambda: half_written() or read_steps() >= step)

    undisturbed = command(tmp_path / "calm.log", "--out", calm, *CHAIN)
    kill_when(fork("--out", run, *CHAIN), (run / "config.json").exists, chance.uniform(0, 0.1))
    kill_at(chance.randint(1, EVERY - 1))
    kill_saving(9)
    kill_at(chance.randint(11, 20))
    dying = fork("--resume", run, target=die_saving)
    dying.join()
    assert dying.exitcode == -signal.SIGKILL and half_written()
    starting = command(tmp_path / "log", "--resume", run)
    time.sleep(chance.uniform(0.3, 1.5))
    starting.kill()
    assert starting.wait() == -signal.SIGKILL
    kill_at(chance.randint(26, 36))
    assert not half_written()  # swept up by the next checkpoint
    kill_saving(44)
    kill_at(chance.randint(46, 50))
    dying = fork("--resume", run, target=die_finishing)
    dying.join()
    assert dying.exitcode == -signal.SIGKILL
    assert (run / "weights.safetensors").exists() and not (run / "heads.safetensors").exists()

    assert command(tmp_path / "log", "--resume", run).wait() == 0, (tmp_path / "log").read_text()
    assert undisturbed.wait() == 0, (tmp_path / "calm.log").read_text()
    assert [record["step"] for record in metrics(run)] == list(range(STEPS))  # none lost, none twice
    assert metrics(run) == metrics(calm)
    assert sum("knn" in record for record in metrics(run)) == 3
    for name in ("weights.safetensors", "heads.safetensors", "config.json"):
        assert (run / name).read_bytes() == (calm / name).read_bytes(), name
    ends = [Run(folder).load(CPU) for folder in (run, calm)]
    assert [state.pop("seconds") > 0 for _, state in ends] == [True, True]  # the clock alone may differ
    assert ends[0][0] == STEPS
    assert_equal_trees(*ends)
    seconds = [record["seconds"] for record in Run(run).records()]
    assert seconds == sorted(seconds)  # it goes on where the killed process saved it


# ---------------------------------------------------------------- damaged checkpoints


@pytest.fixture
def saved(tmp_path):
    """A run with checkpoints of steps 5 and 10."""
    run = Run.create(tmp_path / "run", tiny(), CPU)
    for step in (5, 10):
        run.save(step, {"weight": torch.arange(4000.0) + step, "step": step}, keep=2)
    return run


def flip(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 16]) + data[len(data) // 2 + 1 :]


DAMAGES = {
    "cut in half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "another file": lambda data: b"not a checkpoint\n" * 100,
    "one bit in a weight": flip,  # torch.load itself would not notice
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(saved, damage):
    newest = saved.saved()[-1][1]
    newest.write_bytes(DAMAGES[damage](newest.read_bytes()))
    with pytest.warns(UserWarning, match="step_00000010.pt is damaged and passed over"):
        step, state = saved.load(CPU)
    assert step == 5 and torch.equal(state["weight"], torch.arange(4000.0) + 5)


def test_no_flipped_bit_gets_through(saved):
    """Wherever it falls: the checkpoint is refused, or the bit was one that nobody reads."""
    newest, chance = saved.saved()[-1][1], random.Random(0)
    whole = newest.read_bytes()
    refused = 0
    for _ in range(200):
        data = bytearray(whole)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        newest.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step, state = saved.load(CPU)
        assert step in (5, 10) and state["step"] == step
        assert torch.equal(state["weight"], torch.arange(4000.0) + step)
        refused += step == 5
    assert refused > 150


def test_when_all_are_damaged_nothing_is_started_over_in_silence(saved):
    for _, path in saved.saved():
        path.write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="all checkpoints in .* are damaged"):
        saved.load(CPU)


def test_a_damaged_checkpoint_does_not_push_out_whole_ones(saved):
    saved.saved()[-1][1].write_bytes(b"")
    saved.save(7, {"step": 7}, keep=1)
    with pytest.warns(UserWarning):
        assert saved.load(CPU)[0] == 7
    saved.save(10, {"step": 10}, keep=1)
    assert [step for step, _ in saved.saved()] == [10] and saved.load(CPU)[0] == 10


def test_the_newest_checkpoints_are_kept_and_litter_goes(saved):
    (saved.checkpoints / ".step_00000012.pt.4711.tmp").write_bytes(b"half")
    saved.save(15, {"step": 15}, keep=2)
    assert sorted(path.name for path in saved.checkpoints.iterdir()) == ["step_00000010.pt", "step_00000015.pt"]


# ---------------------------------------------------------------- the run folder


def test_a_finished_run_holds_what_it_promises(tmp_path):
    config = tiny("run.steps=6", "run.checkpoint_every=2", "run.knn_every=3", "run.log_every=4")
    run, world = pretrain(config, tmp_path / "run")
    assert run.config() == config and len(world.train) == 48
    told = json.loads((run.folder / "environment.json").read_text())
    assert told["device"] == "cpu" and told["seed"] == 0 and told["versions"]["torch"] == version("torch")
    assert [(r["step"], "loss" in r, "knn" in r) for r in run.records()] == [
        (0, True, False), (2, False, True), (4, True, False), (5, True, True),
    ]  # fmt: skip
    assert [step for step, _ in run.saved()] == [4, 6]
    teacher = {name: w for name, w in run.load(CPU)[1]["teacher"].items()}
    backbone = load_weights(build_backbone(config), run.folder / "weights.safetensors")
    for name, weight in backbone.state_dict().items():
        assert torch.equal(weight, teacher[f"backbone.{name}"]), name
    heads = load_file(run.folder / "heads.safetensors")
    assert heads.keys() == {name for name in teacher if not name.startswith("backbone.")}
    missing = build_student(config).load_state_dict(heads, strict=False)
    assert not missing.unexpected_keys and all(name.startswith("backbone.") for name in missing.missing_keys)
    before = {path.name: path.read_bytes() for path in run.folder.glob("*.safetensors")}
    pretrain(config, run.folder, resume=True)  # there is nothing left to do, and nothing changes
    assert before == {path.name: path.read_bytes() for path in run.folder.glob("*.safetensors")}
    assert len(run.records()) == 4


@pytest.mark.parametrize("change", [{"width": 24}, {"depth": 1}])
def test_a_config_that_was_edited_into_another_network_is_told_and_nothing_is_loaded(tmp_path, capsys, change):
    run, _ = pretrain(tiny("run.steps=1"), tmp_path / "run")
    said = json.loads(run.config_path.read_text())
    said["vit"] |= change
    run.config_path.write_text(json.dumps(said))
    assert main(["train", "--resume", str(run.folder)]) == 2
    assert "is of another network, it differs in backbone." in capsys.readouterr().err
    state = start(run.config(), CPU)
    before = {name: weight.clone() for name, weight in state.student.state_dict().items()}
    with pytest.raises(ValueError, match="of another network"):
        state.load(run.load(CPU)[1])
    assert_equal_trees(before, dict(state.student.state_dict()))


def test_tied_heads_are_written_once(tmp_path):
    run, _ = pretrain(tiny("run.steps=1", "heads.tied=True"), tmp_path / "run")
    assert {name.split(".")[0] for name in load_file(run.folder / "heads.safetensors")} == {"dino_head"}


def test_photographs_opened_before_the_run(tmp_path, monkeypatch):
    """Images may be decoded into the folder before the run is made there; a resumed run finds them again."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    scenes = draw_scenes(20, 40, seed=3)
    for i, image in enumerate(scenes.images):
        folder = tmp_path / "photographs" / f"kind{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:02}.png")
    config = tiny(f"data.source={tmp_path / 'photographs'}", "run.steps=4", "run.checkpoint_every=2")
    world = open_world(config, tmp_path / "run" / "pixels")
    assert (len(world.train), len(world.test)) == (16, 4)
    assert not set(world.train.files) & set(world.test.files)
    run, _ = pretrain(config, tmp_path / "run", world)
    assert 0 <= run.records()[-1]["knn"] <= 1
    run.saved()[-1][1].unlink()
    again, _ = pretrain(config, tmp_path / "run", resume=True)
    assert [record["step"] for record in again.records()] == [0, 1, 2, 3]


def test_a_new_run_replaces_an_old_one_and_nothing_else(tmp_path):
    run, world = pretrain(tiny("run.steps=2"), tmp_path / "run")
    (run.folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="width 16 is not a multiple of heads 3"):
        pretrain(tiny("vit.heads=3"), run.folder, world)
    assert len(run.records()) == 2  # an impossible config leaves the old run as it was
    Run.create(run.folder, tiny(), CPU)
    left = {path.name for path in run.folder.rglob("*") if path.is_file()}
    assert left == {"config.json", "environment.json", "notes.txt"}
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="letters is not empty and not a run folder"):
        Run.create(tmp_path / "letters", tiny(), CPU)
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["a.txt"]
    with pytest.raises(FileNotFoundError, match="no config.json"):
        pretrain(tiny(), tmp_path / "letters", resume=True)


def test_a_line_cut_in_half_is_forgotten(tmp_path):
    run = Run.create(tmp_path / "run", tiny(), CPU)
    assert run.records() == [] and run.load(CPU) is None
    for step in range(4):
        run.log({"step": step, "loss": 0.1 + step / 3})
    with open(run.metrics_path, "a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in run.records()] == [0, 1, 2, 3]
    run.cut_records(2)
    assert run.records() == [{"step": 0, "loss": 0.1}, {"step": 1, "loss": 0.1 + 1 / 3}]  # floats survive to the bit
    run.log({"step": 2})
    assert len(run.metrics_path.read_text().splitlines()) == 3


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    write_atomically(tmp_path / "file", b"old")
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "file", np.float64)
    assert (tmp_path / "file").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_device_that_is_not_there():
    assert pick_device("cpu") == CPU and pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match="run.device: expected one of .*'cpu'.*got 'tpu'"):
        pick_device("tpu")


def test_a_file_among_the_checkpoints_that_is_none_is_left_alone(saved):
    (saved.checkpoints / "step_best.pt").write_bytes(b"mine")
    saved.save(15, {"step": 15}, keep=1)
    assert [step for step, _ in saved.saved()] == [15] and (saved.checkpoints / "step_best.pt").exists()
