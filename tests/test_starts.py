"""The beginning of a run: what a start that fails leaves behind, what is held out, who may learn where."""

import os
import subprocess
import warnings
from contextlib import ExitStack

import numpy as np
import pytest
from PIL import Image
from test_resume import CPU, TINY, tiny

from minidino import runs, stages
from minidino.cli import main
from minidino.images.scenes import draw_scenes
from minidino.judge import judge
from minidino.runs import Run, alone_in, write_atomically
from minidino.stages import pretrain


@pytest.mark.parametrize("change", ["data.source=/no/such/folder", "vit.heads=3"])
def test_a_start_that_fails_leaves_the_folder_free(tmp_path, change, capsys):
    command = ["train", "--out", str(tmp_path / "run"), *TINY, "run.steps=1"]
    assert main([*command, change]) == 2
    assert not (tmp_path / "run" / "config.json").exists()
    assert main(command) == 0, capsys.readouterr().err


@pytest.mark.parametrize("stop", ["config.json", "environment.json", "guard.json"])
def test_a_kill_before_the_folder_is_a_run_does_not_block_it(tmp_path, monkeypatch, stop):
    state = stages.start(tiny(), CPU)

    def die(path, data):
        if path.name == stop:
            raise KeyboardInterrupt
        write_atomically(path, data)

    monkeypatch.setattr(runs, "write_atomically", die)
    with pytest.raises(KeyboardInterrupt):
        Run.create(tmp_path / "run", tiny(), CPU, state.save(), {"guard.json": {}})
    monkeypatch.undo()
    assert not (tmp_path / "run" / "config.json").exists() and list((tmp_path / "run").rglob("*.pt"))
    Run.create(tmp_path / "run", tiny(), CPU, state.save(), {"guard.json": {}})
    assert Run(tmp_path / "run").config() == tiny() and (tmp_path / "run" / "environment.json").exists()


def test_checkpoints_of_a_run_that_lost_its_config_are_not_taken_for_a_beginning(tmp_path):
    run, _ = pretrain(tiny("run.steps=2"), tmp_path / "run")
    run.config_path.unlink()
    with pytest.raises(FileExistsError, match="not empty and not a run folder"):
        pretrain(tiny("run.steps=2"), tmp_path / "run")


@pytest.mark.skipif(os.name != "posix", reason="needs locks of POSIX")
def test_two_processes_cannot_learn_in_one_folder(tmp_path, capsys):
    run, world = pretrain(tiny("run.steps=2"), tmp_path / "run")
    with alone_in(run.folder):
        assert main(["train", "--resume", str(run.folder)]) == 2
        assert "another process is at work in" in capsys.readouterr().err
    assert main(["train", "--resume", str(run.folder)]) == 0


@pytest.mark.skipif(os.name != "posix", reason="asks for a process by its number")
def test_what_a_kill_left_half_written_goes_when_the_run_goes_on(tmp_path):
    run, _ = pretrain(tiny("run.steps=2"), tmp_path / "run")
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead, alive = (run.folder / f".weights.safetensors.{pid}.tmp" for pid in (ended.pid, os.getppid()))
    dead.touch(), alive.touch()
    assert main(["train", "--resume", str(run.folder)]) == 0
    assert (dead.exists(), alive.exists()) == (False, True)


@pytest.mark.skipif(os.name != "posix", reason="needs locks of POSIX")
@pytest.mark.parametrize("at_work", [True, False])
def test_a_run_that_began_while_another_opened_its_pictures_is_not_replaced(tmp_path, monkeypatch, at_work):
    steps, look = 3, stages.open_world

    def slowly(config, folder):
        if config.run.steps != steps:
            pretrain(tiny(f"run.steps={steps}"), tmp_path / "run")
            if at_work:
                still.enter_context(alone_in(tmp_path / "run"))
        return look(config, folder)

    monkeypatch.setattr(stages, "open_world", slowly)
    words = "another process is at work in" if at_work else "another process has begun a run in"
    with ExitStack() as still, pytest.raises(OSError, match=words):
        pretrain(tiny("run.steps=2"), tmp_path / "run")
    run = Run(tmp_path / "run")
    assert run.config().run.steps == steps and [record["step"] for record in run.records()] == [0, 1, 2]
    assert [step for step, _ in run.saved()] == [steps] and (run.folder / "weights.safetensors").exists()


def test_pictures_that_changed_since_the_start_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "photographs"
    folder.mkdir()
    for i, image in enumerate(draw_scenes(12, 32, seed=3).images):
        Image.fromarray(image).save(folder / f"{i:02}.png")
    run, _ = pretrain(tiny(f"data.source={folder}", "run.steps=2"), tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pretrain(tiny(), run.folder, resume=True)
    Image.fromarray(image).save(folder / "99.png")
    with pytest.warns(UserWarning, match="began with 9 pictures and goes on with 10"):
        pretrain(tiny(), run.folder, resume=True)


def test_fewer_steps_than_are_done_are_refused_in_words(tmp_path, capsys):
    run, _ = pretrain(tiny("run.steps=3"), tmp_path / "run")
    write_atomically(run.config_path, run.config_path.read_bytes().replace(b'"steps": 3', b'"steps": 2'))
    assert main(["train", "--resume", str(run.folder)]) == 2
    assert "run.steps: expected at least the 3 that are done, got 2" in capsys.readouterr().err


def test_an_empty_name_is_no_run_to_resume(capsys):
    assert main(["train", "--resume", ""]) == 2
    assert "give --resume RUN alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("splits", "train", "val"),
    [
        ([""] * 7, [1, 2, 3, 4, 6], [0, 5]),
        (["train"] * 7, [1, 2, 3, 4, 6], [0, 5]),
        (["val"] * 6, [1, 2, 3, 4], [0, 5]),
        ([""], [0], []),
        (["train", "val"], [0], [1]),
        (["", "val", "train", ""], [2], [1]),
        (["", "val", "", ""], [0, 2, 3], [1]),
    ],
)
def test_what_is_held_out_of_photographs(splits, train, val):
    parts = stages._parts(np.array(splits))
    assert [part.tolist() for part in parts] == [train, val]


def test_a_validation_part_that_cannot_be_read_does_not_stop_learning(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "photographs"
    for part in ("train", "val"):
        (folder / part / "a").mkdir(parents=True)
    for i, image in enumerate(draw_scenes(8, 32, seed=3).images):
        Image.fromarray(image).save(folder / "train" / "a" / f"{i}.png")
    (folder / "val" / "a" / "cut.png").write_bytes(b"\x89PNG")
    with pytest.warns(UserWarning, match="nothing to judge with: none of the 1 files"):
        run, world = pretrain(tiny(f"data.source={folder}", "run.steps=1"), tmp_path / "run")
    assert world.test is None and len(world.train) == 8 and len(run.records()) == 1
    assert "cut.png" in (tmp_path / "run" / "pixels" / "val" / "quarantine.csv").read_text()


def test_a_run_that_has_diverged_is_told_so_where_k_nn_is_read(tmp_path, capsys):
    wild = ["run.steps=4", "run.knn_every=2", "optim.base_lr=1e30", "optim.clip=inf", "run.precision=fp32"]
    assert main(["train", "--out", str(tmp_path / "run"), *TINY, *wild]) == 2
    assert "the run has diverged: see doctor" in capsys.readouterr().err


def test_k_nn_is_read_among_the_pictures_that_have_labels(tmp_path):
    """Five among pictures of no class, as in STL-10: there are not the voters for 20 votes."""
    generator, folder = np.random.default_rng(0), tmp_path / "set"
    for place, n in (("train/a", 3), ("train/b", 2), ("unlabeled", 30), ("val/a", 1), ("val/b", 1)):
        (folder / place).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / place / f"{i}.png")
    run, world = pretrain(tiny(f"data.source={folder}", "run.steps=1"), tmp_path / "run")
    assert (len(world.train), len(world.train.labelled()), len(world.test.labelled())) == (35, 5, 2)
    assert {run.records()[-1]["knn"], judge(run, world)["knn"]["trained"]} <= {0, 0.5, 1}
