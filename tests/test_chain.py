"""The chain: four stages by one command, which goes on after a kill and leaves finished stages alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minidino import chain
from minidino.chain import Chain, read_chain, run_chain
from minidino.cli import main
from minidino.runs import Run

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "data.n_scenes=40", "data.n_test_scenes=20", "data.short_side=32", "crops.global_size=32", "crops.local_size=16",
    "vit.width=16", "vit.depth=2", "vit.heads=2", "heads.n_prototypes=16", "heads.hidden_dim=16",
    "heads.bottleneck_dim=8", "optim.batch_size=8", "run.device=cpu", "run.log_every=1", "run.steps=3",
    "run.checkpoint_every=1",
)  # fmt: skip
SMALL, SMALLER = "vit_tiny,width=8,depth=2,heads=2", "vit_tiny,width=8,depth=1,heads=1"
PLAN = Chain(
    changes=TINY, adapt_size=48, adapt_steps=2, students=(SMALL, SMALLER), distill_steps=3, tasks=("knn",), baselines=()
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run_chain(PLAN, folder, say=lambda _: None)


def runs_in(folder):
    return sorted(path.parent for path in folder.rglob("heads.safetensors"))


def test_all_stages_are_there_with_heads_and_one_report(whole):
    folder, found = whole
    assert [str(place.relative_to(folder)) for place in runs_in(folder)] == [
        "adapt", f"distill/{SMALLER.replace(',', '-')}", f"distill/{SMALL.replace(',', '-')}", "pretrain"]  # fmt: skip
    assert set(found) == {"pretrained", "adapted", f"distilled {SMALL}", f"distilled {SMALLER}"}
    assert found["pretrained"]["size_px"] == 32 and found["adapted"]["size_px"] == 48
    assert found["adapted"]["parameters"] > found[f"distilled {SMALL}"]["parameters"]
    assert all(0 <= row["knn"]["trained"] <= 1 for row in found.values())
    assert json.loads((folder / "results.json").read_text()) == found
    page = (folder / "report.html").read_text()
    assert "Did the phase at 48 px help?" in page and SMALLER in page and "same hash before and after" in page
    assert read_chain(folder / "chain.json") == PLAN


def test_the_students_teacher_is_the_adapted_network(whole):
    folder, _ = whole
    config = Run(runs_in(folder)[1]).config()
    assert config.distill.teacher == str(folder / "adapt") and config.crops.global_size == 48


def test_what_is_finished_is_left_alone(whole, monkeypatch):
    folder, found = whole
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("step_*.pt")}
    monkeypatch.setattr(chain, "evaluate", lambda *_, **__: pytest.fail("asked again"))
    assert run_chain(PLAN, folder, say=lambda _: None) == found
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("step_*.pt")} == before


@pytest.mark.parametrize("moment", [1, 4, 6, 8, 11])
def test_a_chain_killed_in_any_stage_ends_the_same(whole, tmp_path, dying_at_save, moment):
    with dying_at_save(moment):
        run_chain(PLAN, tmp_path / "cut", say=lambda _: None)
    found = run_chain(PLAN, tmp_path / "cut", say=lambda _: None)
    assert {name: row["knn"] for name, row in found.items()} == {name: row["knn"] for name, row in whole[1].items()}
    for one, other in zip(runs_in(whole[0]), runs_in(tmp_path / "cut"), strict=True):
        left, right = (load_file(place / "weights.safetensors") for place in (one, other))
        assert all(torch.equal(left[key], right[key]) for key in left)


def test_a_chain_goes_on_where_it_was_moved_to(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "moved")
    students = runs_in(tmp_path / "moved" / "distill")
    (students[0] / "heads.safetensors").unlink()
    found = run_chain(PLAN, tmp_path / "moved", say=lambda _: None)
    assert {name: row["knn"] for name, row in found.items()} == {name: row["knn"] for name, row in whole[1].items()}
    heads = load_file(tmp_path / "moved" / "adapt" / "heads.safetensors")
    save_file({key: value + 1 for key, value in heads.items()}, tmp_path / "moved" / "adapt" / "heads.safetensors")
    (students[0] / "heads.safetensors").unlink()
    with pytest.raises(ValueError, match="is not the one it began with"):
        run_chain(PLAN, tmp_path / "moved", say=lambda _: None)


@pytest.mark.parametrize("left", ["adapt", "distill", "probe"])
def test_another_chain_takes_nothing_over_from_one_whose_other_stages_were_removed(whole, tmp_path, left):
    shutil.copytree(whole[0] / left, tmp_path / left)
    shutil.copy(whole[0] / "chain.json", tmp_path)
    with pytest.raises(ValueError, match="holds another chain"):
        run_chain(replace(PLAN, changes=(*TINY, "run.seed=7")), tmp_path, say=lambda _: None)
    assert not (tmp_path / "pretrain").exists() and read_chain(tmp_path / "chain.json") == PLAN


def test_another_chain_does_not_go_on_in_the_folder(whole):
    with pytest.raises(ValueError, match="holds another chain"):
        run_chain(Chain(), whole[0], say=lambda _: None)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"adapt_size": 50}, "crops.global_size: expected a multiple of vit.patch_size 8 px, got 50 px"),
        ({"students": ["vit_huge"]}, "student: expected one of vit_tiny"),
        ({"students": []}, "students, tasks: expected at least one of each"),
        ({"tasks": []}, "students, tasks: expected at least one of each"),
        ({"size": "64"}, r"chain.size: expected int \| None, got '64'"),
        ({"adapt_steps": 0}, "chain.adapt_steps: expected >= 1, got 0"),
        ({"baselines": ["guess"]}, "baselines: expected random or pixels, got guess"),
        ({"tasks": ["knn", "guess"]}, "tasks: expected some of knn, .*, got guess"),
        ({"distill_changes": ["vit.dept=3"]}, "keys are vit.name"),
        ({"students": [SMALL, SMALL]}, "students: expected different ones"),
        ({"students": [SMALL, "vit_tiny,heads=2,depth=2,width=8"]}, "students: expected different ones"),
        ({"size": 50}, "chain.size: expected a multiple of vit.patch_size 8 px, got 50 px"),
        ({"tasks": ["knn", "dpt"]}, "tasks: expected networks of 4 blocks or more for dpt, got 1"),
        ({"tasks": ["retrieval"]}, "tasks: expected pictures in groups for retrieval"),
        ({"size_px": 3}, "expected fields of adapt_changes, .*, got size_px"),
    ],
)
def test_an_impossible_chain_is_refused_before_it_begins(tmp_path, capsys, changes, words):
    (tmp_path / "plan.json").write_text(json.dumps({key: v for key, v in asdict(PLAN).items()} | changes))
    with pytest.raises(ValueError, match=words):
        read_chain(tmp_path / "plan.json")
    assert main(["chain", str(tmp_path / "plan.json"), "--out", str(tmp_path / "out")]) == 2
    assert "minidino chain:" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("text, words", [("[{}]", "got a list"), ("3", "got a int"), ('{"size": 3,}', "expected JSON")])
def test_what_is_no_chain_is_refused_by_the_name_of_its_file(tmp_path, text, words):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=f"plan.json: expected .*{words}|plan.json: {words}"):
        read_chain(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("{}", encoding="utf-8-sig")  # as an editor on Windows writes it
    assert read_chain(tmp_path / "plan.json") == Chain()


def test_a_chain_that_could_not_begin_can_be_mended_in_its_folder(tmp_path):
    for wrong in ("nowhere", "elsewhere"):  # and not that another chain is there
        with pytest.raises(FileNotFoundError, match=wrong):
            run_chain(replace(PLAN, changes=(*TINY, f"data.source={wrong}")), tmp_path, say=lambda _: None)


# ---------------------------------------------------------------- kill -9


def command_of(stage, source, out, plan):
    """The command of a stage, and the one that goes on with it after a kill."""
    begin = {
        "adapt": ["adapt", source, "--size", "48", "--steps", "30", "--out", out],
        "distill": ["distill", source, "--student", SMALL, "--student", SMALLER, "--steps", "30", "--out", out],
        "chain": ["chain", plan, "--out", out],
    }[stage]
    again = {"adapt": ["train", "--resume", out], "distill": [*begin, "--resume"], "chain": begin}[stage]
    return [[str(word) for word in words] for words in (begin, again)]


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is posix")
@pytest.mark.parametrize("stage", ["adapt", "distill", "chain"])
def test_a_stage_killed_by_the_system_goes_on_by_its_command(whole, tmp_path, stage):
    source, plan = whole[0] / "pretrain", tmp_path / "plan.json"
    plan.write_text(json.dumps(asdict(PLAN) | {"adapt_steps": 30}))
    begin, again = command_of(stage, source, tmp_path / "cut", plan)
    process = subprocess.Popen([sys.executable, "-m", "minidino.cli", *begin], stderr=subprocess.DEVNULL, cwd=ROOT)
    for _ in range(6000):
        if any(int(path.stem[-8:]) >= 4 for path in (tmp_path / "cut").rglob("step_*.pt")):
            break
        assert process.poll() is None, f"{stage} ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert main(again) == 0
    assert main(command_of(stage, source, tmp_path / "whole", plan)[0]) == 0
    pairs = list(zip(runs_in(tmp_path / "whole"), runs_in(tmp_path / "cut"), strict=True))
    assert len(pairs) == {"adapt": 1, "distill": 2, "chain": 4}[stage]
    for one, other in pairs:
        left, right = (load_file(place / "weights.safetensors") for place in (one, other))
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
