"""The command line: help with an example, one line of words for what cannot be met, and the quick stages."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minidino.cli import main
from minidino.config import PRESETS, preset
from minidino.distributed import interrupted
from minidino.model.vit import build_vit
from minidino.model.weights import export_weights
from minidino.runs import Run

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["tour", "curate", "train", "adapt", "probe", "export", "plan", "bench", "doctor", "data list", "data get",
          "data check", "data"]  # fmt: skip


@pytest.fixture(autouse=True)
def away(tmp_path, monkeypatch):
    """In an empty folder, with a home of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_an_example(stage, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*stage.split(), "--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0 and "example:" in told
    assert f"minidino {stage}" in told.partition("example:")[2]


def test_help_lists_the_stages(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    assert all(stage.split()[0] in told for stage in STAGES)


@pytest.mark.parametrize("arguments", [[], ["fly"], ["data"], ["doctor"], ["train", "--speed", "9"]])
def test_what_argparse_refuses(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and "usage: minidino" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, words",
    [
        ("train --preset scenes-gpu", "no preset 'scenes-gpu'; there are: scenes-cpu"),
        ("train vit.dept=4", "got 'vit.dept=4'; keys are vit.name"),
        ("train vit.depth", "expected key=value, got 'vit.depth'"),
        ("train vit.depth=deep", "vit.depth: expected int"),
        ("train vit.heads=5", "width 64 is not a multiple of heads 5"),
        ("train run.device=tpu", "run.device: expected one of"),
        ("train data.source=nowhere", "nowhere"),
        ("train --resume nowhere", "nowhere is not a run folder"),
        ("train --resume nowhere vit.depth=4", "give --resume RUN alone"),
        ("train --resume nowhere --data photographs", "give --resume RUN alone"),
        ("train --data nowhere", "nowhere"),
        ("train --resume nowhere --preset imagenette-cpu", "give --resume RUN alone"),
        ("train --resume nowhere --heads-first 0.5", "give --resume RUN alone"),
        ("train --heads-first 0.5", "--heads-first goes with --weights"),
        ("train --out full", "full is not empty and not a run folder"),
        ("tour --data nowhere", "nowhere"),
        ("plan vits16", "no preset 'vits16'; there are: scenes-cpu"),
        ("plan vit.depth=4", "expected a preset first"),
        ("plan vits16-in1k --device abacus", "no device 'abacus'; there are: cpu"),
        ("plan vits16-in1k --utilisation 2", "expected utilisation in (0, 1]"),
        ("plan --price-per-hour 2", "--price-per-hour goes with a preset"),
        ("plan vits16-in1k --price-per-hour -1", "price per hour: expected a number >= 0, got -1.0"),
        ("curate full --copy-steps -1", "copy_steps: expected >= 0, got -1"),
        ("curate full --budget 0 --features full", "budget: expected >= 1, got 0"),
        ("curate full --neighbours 0", "neighbours: expected >= 1, got 0"),
        ("curate full --leak-threshold 7", "leak_threshold: expected a cosine from -1 to 1, got 7.0"),
        ("curate full --out full", "full is the pool"),
        ("curate full --budget 3 --features nowhere", "no weights at nowhere"),
        ("curate full --copies full/letter.txt", "copies: expected a TorchScript model"),
        ("plan vits16-in1k vit.dept=4", "got 'vit.dept=4'; keys are vit.name"),
        ("doctor nowhere", "nowhere is not a run folder"),
        ("data check nowhere", "nowhere"),
        ("data get mnist", "no set called 'mnist'; known: "),
    ],
)
def test_what_cannot_be_met_is_one_line(command, words, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    assert main(command.split()) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"minidino {command.split()[0]}: ") and words in told
    assert len(told.splitlines()) == 1 and "Traceback" not in told


def test_plan_of_one_and_of_all(capsys):
    asked = "plan vits16-in1k --gpus 8 --device h200 optim.accumulate=2 --price-per-hour 3 vit.depth=6"
    assert main(asked.split()) == 0
    told = capsys.readouterr().out
    assert told.startswith("vits16-in1k on 8 x h200, ddp\n") and "at 3 an hour" in told and "known" not in told
    assert main("plan --device h200 --gpus 1".split()) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("`")[1] for row in rows[2:]] == list(PRESETS) and all("1 x h200" in row for row in rows[2:])


def test_data_list(capsys):
    assert main(["data", "list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names[0] == "scenes" and "cifar10" in names


def test_data_check_accounts_for_every_file(tmp_path, capsys):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.full((9, 12, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:40])
    (folder / "letter.jpg").write_text("dear")
    assert main(["data", "check", str(folder), "--json", "check.json"]) == 0
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["decoded"] == 3 and found["decoded"] + len(found["quarantined"]) == 5
    assert {row["file"] for row in found["quarantined"]} == {"broken.png", "letter.jpg"}
    told = capsys.readouterr().out
    assert "3 decoded, 2 quarantined" in told
    assert all(row["file"] in told and row["reason"] in told for row in found["quarantined"])


def tiny_run(folder, losses):
    run = Run.create(folder, preset("scenes-cpu"), torch.device("cpu"))
    for step, loss in enumerate(losses):
        run.log({"step": 10 * step, "loss": loss, "dino": loss, "ibot": 0.0, "koleo": 0.1, "lr": 1e-3})
    return run


@pytest.mark.parametrize("last, word", [(3.0, "info"), (math.nan, "critical")])
def test_doctor_reads_a_run_folder(last, word, tmp_path, capsys):
    tiny_run(tmp_path / "run", [5.5, 5.0, 4.5, 4.0, 3.5, last])
    assert main(["doctor", "run"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"1. [{word}]") and "seen:" in told and "do:" in told


def test_doctor_of_a_run_that_has_just_begun(tmp_path, capsys):
    tiny_run(tmp_path / "run", [])
    assert main(["doctor", "run"]) == 2
    assert "expected at least one record of a run, got none" in capsys.readouterr().err


def test_train_prints_what_it_is_and_runs(capsys, monkeypatch):
    sizes = ["data.n_scenes=16", "data.n_test_scenes=8", "data.short_side=32", "crops.global_size=32",
             "crops.local_size=16", "vit.width=16", "vit.depth=1", "vit.heads=1", "optim.batch_size=4",
             "heads.hidden_dim=8", "heads.bottleneck_dim=8", "run.steps=2", "run.device=cpu",
             "run.precision=fp32"]  # fmt: skip
    assert main(["train", "--out", "run", *sizes]) == 0
    told = capsys.readouterr().out
    assert "vit.depth = 1  (published: None)" in told and "optim.batch_size = 4  (published: 3072)" in told
    assert "resolved: fp32 on cpu, lr 5.00e-04" in told  # 8e-3 * sqrt(4 / 1024)
    assert "attention sdpa, prototype loss reference" in told
    assert main(["train", "--out", "run", *sizes]) == 2  # an hour of training is not replaced without a word
    assert "run holds a run: go on with train --resume run" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("vit.attention", "loss.prototypes"):
        assert main(["train", "--out", "other", *sizes, f"{name}=triton"]) == 2
        assert "choose" in capsys.readouterr().err
    assert main(["doctor", "run"]) == 0


def test_a_process_that_torchrun_replaced_goes_on_with_its_own_run_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("minidino.distributed.restarted", lambda: True)
    there = Run.create(tmp_path / "run", preset("scenes-cpu"), torch.device("cpu"))
    assert interrupted(there.folder)  # the same command
    monkeypatch.setattr("sys.argv", ["minidino", "train", "--out", "run", "run.steps=50"])
    assert not interrupted(there.folder)
    assert main(["train", "--out", str(there.folder), "run.steps=50"]) == 2
    assert "holds a run" in capsys.readouterr().err


def test_no_command_writes_over_what_a_run_has_written(tmp_path, capsys):
    folder = tiny_run(tmp_path / "run", [5.0]).folder
    vit = build_vit("vit_tiny", width=64, depth=4, heads=2, patch_size=8, img_size=48)
    kept = export_weights(vit, folder / "weights.safetensors").read_bytes()
    for command in ("probe run --out run", "chain --out run", "curate pool --out run",
                    "export run --out run/weights.safetensors"):  # fmt: skip
        assert main(command.split()) == 2
        assert "choose another with --out" in capsys.readouterr().err
    assert (folder / "weights.safetensors").read_bytes() == kept
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "environment.json", "metrics.jsonl", "weights.safetensors"}  # fmt: skip
    assert main("export run --out other.pth --heads 4".split()) == 2
    assert "a run knows its heads" in capsys.readouterr().err


def test_a_backbone_that_is_given_cannot_be_another_one(tmp_path, capsys):
    vit = build_vit("vit_tiny", width=64, depth=4, heads=2, patch_size=8, img_size=48)
    export_weights(vit, tmp_path / "w.safetensors")
    assert main("train --weights w.safetensors --out run vit.width=128 vit.depth=4".split()) == 2
    assert "stays as it is, and cannot change vit.width\n" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert main("train --weights w.safetensors --out run vit.patch_size=16 crops.local_size=16".split()) == 2
    assert "cannot change vit.patch_size\n" in capsys.readouterr().err


def test_what_needs_a_finished_run_says_how_to_finish_it(tmp_path, capsys):
    tiny_run(tmp_path / "run", [5.0])
    for command in ("probe run", "export run --out other.pth"):
        assert main(command.split()) == 2
        assert "finish it with train --resume run" in capsys.readouterr().err


def test_a_warning_is_a_line_that_does_not_say_where_in_the_code(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "more.zip").write_bytes(b"PK")
    with warnings.catch_warnings(action="default"):
        main(["data", "check", "."])
    assert re.search(r"^minidino data: archives beside pictures stay closed, .*$", capsys.readouterr().err, re.MULTILINE)


def test_ctrl_c_is_a_line(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("minidino.tour.tour", interrupted)
    assert main(["tour"]) == 130
    assert capsys.readouterr().err == "minidino tour: interrupted; what is saved stays, and --help says how to go on\n"


def call(tmp_path, arguments, **options):
    """The command line as a shell calls it, with what it prints kept back until a buffer is full."""
    settings = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-m", "minidino.cli", *arguments]
    return subprocess.run(command, cwd=tmp_path, env=settings, text=True, timeout=120, check=False, **options)


@pytest.mark.skipif(os.name != "posix", reason="of pipes")
def test_who_reads_no_further_ends_it_without_a_word(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    ended = call(tmp_path, ["plan"], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_names_that_the_terminal_cannot_show_do_not_stop_a_check(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "\N{GRINNING FACE}.png").write_bytes(b"no picture")
    ended = call(tmp_path, ["data", "check", "pictures", "--json", "found.json"], capture_output=True)
    assert ended.returncode == 0 and r"'\U0001f600.png': " in ended.stdout
    (bad,) = json.loads((tmp_path / "found.json").read_text())["quarantined"]
    assert bad["file"] == "\N{GRINNING FACE}.png"


@pytest.mark.skipif(os.name != "posix", reason="of file numbers")
def test_a_closed_stderr_stops_nothing(tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "one.png")
    ended = call(tmp_path, ["data", "check", "pictures"], stdout=subprocess.PIPE, preexec_fn=lambda: os.close(2))
    assert ended.returncode == 0 and ended.stdout.startswith("1 decoded")


def test_a_run_may_be_named_by_a_dot(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tiny_run(tmp_path / "run", [5.0]).folder)
    for command in ("adapt . --size 48 --steps 1", "distill . --student vit_tiny --steps 1"):
        assert main(command.split()) == 2
        assert str(tmp_path / "run") in capsys.readouterr().err  # not an empty name


# ---------------------------------------------------------------- make

STUB = """#!/bin/sh
if [ "$2" = venv ]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; cp "$0" .venv/bin/minidino; fi
if [ "$2" = pip ]; then mkdir busy || echo two at once; sleep 0.2; rmdir busy; fi
printf '<%s>' "$@"
"""


def made(folder, *words):
    """What make says in a folder where a stub stands for Python."""
    if not shutil.which("make") or os.name != "posix":
        pytest.skip("needs make")
    stub = folder / "a python" / "stub"
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(0o755)
    (folder / "pyproject.toml").touch()
    command = ["make", "-f", ROOT / "Makefile", f"PYTHON={stub}", *words]
    env = {"PATH": os.environ["PATH"]}  # not what an outer make hands on
    done = subprocess.run(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return os.fsdecode(done.stdout)


@pytest.mark.parametrize("data", ["a folder/ü's", 'of "mine"', "`id`$HOME"])
def test_make_hands_names_of_pictures_on_as_they_are(data, tmp_path):
    assert f"<tour><--data><{data}><--minutes><2>" in made(tmp_path, "tour", f"DATA={data.replace('$', '$$')}", "MINUTES=2")


def test_make_sets_up_one_thing_after_the_other_whatever_it_may_do_at_once(tmp_path):
    said = made(tmp_path, "-j4", "test", "book")
    assert "two at once" not in said and "<book/bind.py>" in said
