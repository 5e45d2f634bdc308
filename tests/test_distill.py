"""Distillation: a frozen teacher, unchanged terms, nothing hidden; several students; kills; what cannot be taught."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from minidino import stages
from minidino.cli import main
from minidino.config import PRESETS, difference, override, preset
from minidino.images.batches import batches
from minidino.learning.adapt import adapted
from minidino.learning.distill import distilled, fingerprint, frozen_teacher, imitating, network_of, student_vit
from minidino.learning.losses import sinkhorn_knopp, token_loss
from minidino.learning.objective import imitation_losses, student_losses, token_targets
from minidino.learning.teacher import Imitator, build_student
from minidino.learning.train import start, train
from minidino.model.vit import build_vit
from minidino.model.weights import export_weights
from minidino.runs import Run
from minidino.stages import adapt, distill, go_on, guard_of, open_world, pretrain, verdict

CPU = torch.device("cpu")
TINY = [
    "data.n_scenes=32", "data.n_test_scenes=16", "data.short_side=32", "crops.global_size=32", "crops.local_size=16",
    "vit.width=16", "vit.depth=2", "vit.heads=2", "heads.n_prototypes=16", "heads.hidden_dim=16",
    "heads.bottleneck_dim=8", "optim.batch_size=8", "run.device=cpu", "run.log_every=1", "run.steps=3",
]  # fmt: skip
SMALL, SMALLER = "vit_tiny,width=8,depth=2,heads=2", "vit_tiny,width=8,depth=1,heads=1"


def tiny(*changes):
    return override(preset("scenes-cpu"), [*TINY, *changes])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return open_world(tiny(), tmp_path_factory.mktemp("pixels"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, world):
    return pretrain(tiny(), tmp_path_factory.mktemp("runs") / "teacher", world)[0]


def told(run):
    """What a run measured, without the clock."""
    return [{key: value for key, value in record.items() if key != "seconds"} for record in run.records()]


def weights(run):
    return load_file(run.folder / "weights.safetensors") | load_file(run.folder / "heads.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ---------------------------------------------------------------- what is changed


def test_what_distillation_changes_and_nothing_else(teacher):
    config = override(teacher.config(), ["vit.drop_path_rate=0.3"])
    changed = {key: new for key, (_, new) in difference(config, distilled(config, "a-run", SMALL, 7)).items()}
    assert changed == {
        "vit.width": 8, "vit.drop_path_rate": 0.0, "loss.ibot_start_frac": 0.0, "loss.ibot_full_frac": 0.0,
        "distill.teacher": "a-run", "run.steps": 7,
    }  # fmt: skip


def test_a_student_is_told_by_its_name_and_what_differs():
    like = tiny("vit.num_register_tokens=4").vit
    small = student_vit("vit_small", like)
    assert (small.name, small.width, small.depth, small.heads) == ("vit_small", None, None, None)
    assert (small.patch_size, small.num_register_tokens) == (8, 4)
    assert student_vit("vit_tiny,depth=3", like).depth == 3
    for wrong in ("vit_huge", "vit_tiny,colour=3", "vit_tiny,width=", "vit_tiny,width=-8", "vit_tiny width=8"):
        with pytest.raises(ValueError, match="student: expected"):
            student_vit(wrong, like)


def test_all_patches_are_compared_and_none_is_hidden(teacher, world):
    """The loss by hand: every patch of both global crops, seen by the student, against the frozen heads."""
    config = override(distilled(teacher.config(), teacher.folder, SMALL, 2), ["run.precision=fp32"])
    state = start(config, CPU)
    state.frozen = frozen_teacher(config, CPU)
    batch = next(batches(config, world.train, CPU))
    assert batch.masks.all() and torch.allclose(batch.mask_weights, torch.full((2 * 8 * 16,), 1 / 16))
    student, net, temp = state.student, state.frozen.network, config.teacher
    with torch.no_grad():
        crops = batch.crops_global.flatten(0, 1)
        seen, known = student.backbone.forward_features(crops), net.backbone.forward_features(crops)
        targets = sinkhorn_knopp(net.ibot_head(known.x_norm_patchtokens).flatten(0, 1), temp.patch_temp)
        logits = student.ibot_head(seen.x_norm_patchtokens).flatten(0, 1)
        by_hand = -(targets * F.log_softmax(logits / config.loss.student_temp, -1)).sum(-1).mean()
    record = next(train(config, world.train, state))
    assert record["ibot"] == pytest.approx(config.loss.ibot * by_hand.item(), rel=1e-4)


def test_hidden_patches_would_give_another_loss(teacher, world):
    config = distilled(teacher.config(), teacher.folder, SMALL, 2)
    batch = next(batches(config, world.train, CPU))
    from minidino.learning.objective import make_targets, teacher_logits

    frozen, student = frozen_teacher(config, CPU), start(config, CPU).student
    with torch.no_grad():
        student.backbone.mask_token.normal_()
    targets, _ = make_targets(teacher_logits(frozen.network, batch), 0.04)
    weights = {"dino": 1.0, "ibot": 1.0, "koleo": 0.1}
    seen, hidden = (student_losses(student, batch, targets, weights, hide=hide)[0]["ibot"] for hide in (False, True))
    assert abs(seen - hidden) > 1e-4


# ---------------------------------------------------------------- who changes


def test_the_teacher_does_not_change_by_a_bit_and_the_student_is_saved_with_heads(teacher, world, tmp_path):
    before = {path.name: path.read_bytes() for path in teacher.folder.glob("*.safetensors")}
    hashed = fingerprint(network_of(teacher))
    (run,), _ = distill(teacher.folder, tmp_path / "student", [SMALL], 4, world=world)
    assert {path.name: path.read_bytes() for path in teacher.folder.glob("*.safetensors")} == before
    said = json.loads((run.folder / "teacher.json").read_text())
    assert said == {"teacher": str(teacher.folder), "sha256": hashed}
    assert fingerprint(network_of(teacher)) == hashed
    state = torch.load(run.saved()[-1][1], weights_only=True)
    average = {f"backbone.{k}" if f"backbone.{k}" in state["teacher"] else k: v for k, v in weights(run).items()}
    assert same(average, state["teacher"]) and not same(state["student"], state["teacher"])
    assert state["teacher"]["dino_head.last_layer.weight_v"].shape == (16, 8)


def test_a_fingerprint_sees_one_bit(teacher):
    network = network_of(teacher)
    before = fingerprint(network)
    with torch.no_grad():
        network.backbone.norm.bias[3] = torch.nextafter(network.backbone.norm.bias[3], torch.tensor(1.0))
    assert fingerprint(network) != before


def test_a_teacher_that_is_changed_meanwhile_is_noticed(teacher, world, tmp_path, monkeypatch):
    shutil.copytree(teacher.folder, tmp_path / "teacher")
    train = stages.train

    def spoiling(config, pixels, state, stream):
        yield from train(config, pixels, state, stream)
        state.frozen.network.backbone.norm.bias.add_(1e-6)

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="is not the one it began with"):
        patch.setattr(stages, "train", spoiling)
        distill(tmp_path / "teacher", tmp_path / "student", [SMALL], 2, world=world)
    assert not (tmp_path / "student" / "weights.safetensors").exists()
    other = pretrain(tiny("run.seed=5"), tmp_path / "other", world)[0]
    for name in ("weights.safetensors", "heads.safetensors"):
        shutil.copy(other.folder / name, tmp_path / "teacher" / name)
    with pytest.raises(ValueError, match="is not the one it began with"):
        pretrain(tiny(), tmp_path / "student", world, resume=True)


def test_tied_heads_are_taught_as_well(world, tmp_path):
    tied, _ = pretrain(tiny("heads.tied=true"), tmp_path / "tied", world)
    network = network_of(tied)
    assert network.ibot_head is network.dino_head
    (run,), _ = distill(tied.folder, tmp_path / "student", [SMALL], 2, world=world)
    assert not any(key.startswith("ibot_head") for key in load_file(run.folder / "heads.safetensors"))


# ---------------------------------------------------------------- several students, and kills


def test_students_that_share_a_teacher_learn_what_they_learn_alone(teacher, world, tmp_path, monkeypatch):
    asked = []
    look = stages.train.__globals__["teacher_logits"]
    monkeypatch.setitem(stages.train.__globals__, "teacher_logits", lambda *a, **k: asked.append(1) or look(*a, **k))
    both, _ = distill(teacher.folder, tmp_path / "both", [SMALL, SMALLER], 5, world=world)
    assert len(asked) == 5  # once a batch, not once a student
    for run, student in zip(both, (SMALL, SMALLER), strict=True):
        (alone,), _ = distill(teacher.folder, tmp_path / "alone" / student, [student], 5, world=world)
        assert told(run) == told(alone) and same(weights(run), weights(alone))
    assert both[0].folder.name == "vit_tiny-width=8-depth=2-heads=2"


@pytest.mark.parametrize("moment", range(6))
def test_students_killed_at_any_moment_go_on_as_if_nothing_had_happened(teacher, world, tmp_path, dying_at_save, moment):
    """Both are saved every second step; the kill comes between any two writes, so one may be a checkpoint ahead."""
    changes = ["run.checkpoint_every=2", f"run.keep_checkpoints={1 + moment % 2}"]
    whole, _ = distill(teacher.folder, tmp_path / "whole", [SMALL, SMALLER], 6, changes, world=world)
    with dying_at_save(moment):
        distill(teacher.folder, tmp_path / "cut", [SMALL, SMALLER], 6, changes, world=world)
    cut, _ = distill(teacher.folder, tmp_path / "cut", [SMALL, SMALLER], 6, changes, resume=True, world=world)
    for one, other in zip(whole, cut, strict=True):
        assert told(one) == told(other) and same(weights(one), weights(other))
    again, _ = distill(teacher.folder, tmp_path / "cut", [SMALL, SMALLER], 6, changes, resume=True, world=world)
    assert told(again[0]) == told(whole[0])


def test_a_student_goes_on_by_train_resume_as_well(teacher, world, tmp_path, monkeypatch):
    whole, _ = distill(teacher.folder, tmp_path / "whole", [SMALL], 4, ["run.checkpoint_every=1"], world=world)
    learn = stages.train

    def dying(*arguments):
        for record in learn(*arguments):
            yield record
            if record["step"] == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages, "train", dying)
        distill(teacher.folder, tmp_path / "cut", [SMALL], 4, ["run.checkpoint_every=1"], world=world)
    assert main(["train", "--resume", str(tmp_path / "cut")]) == 0
    cut = Run(tmp_path / "cut")
    assert told(whole[0]) == told(cut) and same(weights(whole[0]), weights(cut))


# ---------------------------------------------------------------- what cannot be taught


@pytest.mark.parametrize(
    "changes, words",
    [
        (["vit.patch_size=4"], r"vit.patch_size: expected 8, as the teacher .* has, got 4"),
        (["heads.n_prototypes=32"], r"heads.n_prototypes: expected 16, as the teacher .* has, got 32"),
        (["heads.ibot_n_prototypes=8"], r"heads.ibot_n_prototypes: expected None, as the teacher .* has, got 8"),
        (["heads.tied=true"], r"heads.tied: expected False, as the teacher .* has, got True"),
        (["crops.global_size=30"], "crops.global_size: expected a multiple of vit.patch_size 8 px, got 30 px"),
    ],
)
def test_a_student_that_does_not_fit_its_teacher_is_refused(teacher, world, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        distill(teacher.folder, tmp_path / "student", [SMALL], 2, changes, world=world)
    assert not (tmp_path / "student").exists()


def test_a_teacher_without_heads_or_end_is_refused(teacher, tmp_path, capsys):
    shutil.copytree(teacher.folder, tmp_path / "headless")
    (tmp_path / "headless" / "heads.safetensors").unlink()
    command = ["distill", str(tmp_path / "headless"), "--student", SMALL, "--steps", "2"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "no heads of prototypes" in said and "--features" in said
    (tmp_path / "headless" / "weights.safetensors").unlink()
    assert main(command) == 2
    assert "has no weights.safetensors: finish it with train --resume" in capsys.readouterr().err
    command[1] = str(tmp_path / "nothing")
    assert main(command) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_the_command_writes_a_run_beside_the_teacher(teacher, capsys):
    command = ["distill", str(teacher.folder), "--student", SMALL, "optim.base_lr=0.001", "--steps", "2"]
    assert main(command) == 0
    folder = teacher.folder.with_name("teacher-distilled")
    assert capsys.readouterr().out.strip() == str(folder)
    config = Run(folder).config()
    assert (config.vit.width, config.optim.base_lr, config.distill.teacher) == (8, 0.001, str(teacher.folder))
    assert main(command) == 2
    assert "holds a run" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert main([*command[:4], "--steps", "3", "--resume"]) == 2
    assert "begun with other settings: {'optim.base_lr': (0.001, 0.008), 'run.steps': (2, 3)}" in capsys.readouterr().err
    assert main([*command, "--out", str(folder.with_name("other")), "--data", "pictures"]) == 2
    assert "go with --features" in capsys.readouterr().err


# ---------------------------------------------------------------- imitation, for teachers without heads


def test_token_loss_by_hand():
    ours, theirs = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64)
    cosine = (ours * theirs).sum(-1) / ours.norm(dim=-1) / theirs.norm(dim=-1)
    gap = (ours - theirs).abs()
    smooth = torch.where(gap < 1, gap**2 / 2, gap - 0.5)
    by_hand = (1 - cosine).mean() + smooth.mean()
    assert token_loss(ours.float(), theirs.float()).item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert token_loss(ours.float(), ours.float()).item() == pytest.approx(0, abs=1e-6)
    doubled = token_loss(2 * theirs.float(), theirs.float())
    assert doubled > 0.1  # the right direction alone is not enough


def test_a_linear_map_of_the_teacher_itself_can_reach_zero(world):
    config = tiny("crops.n_local=0")
    backbone = build_student(config).backbone
    imitator = Imitator(backbone, 16)
    with torch.no_grad():
        for layer in (imitator.class_map, imitator.patch_map):
            layer.weight.copy_(torch.eye(16))
            layer.bias.zero_()
    batch = next(batches(config, world.train, CPU))
    losses, tokens = imitation_losses(imitator, batch, token_targets(backbone, batch))
    assert sum(losses.values()).item() == pytest.approx(0, abs=1e-5) and tokens.shape == (2, 8, 16)
    with torch.no_grad():
        backbone.norm.bias[0] += 0.5
    assert sum(imitation_losses(imitator, batch, token_targets(build_student(config).backbone, batch))[0].values()) > 0.1


@pytest.mark.parametrize("kind", ["hub", "timm"])
def test_weights_without_heads_are_imitated(world, tmp_path, kind, capsys):
    torch.manual_seed(0)
    vit = build_vit("vit_tiny", width=64, depth=1, heads=1, patch_size=4, img_size=32)
    path = export_weights(vit, tmp_path / "theirs.pth", kind)
    out = tmp_path / "student"
    command = ["distill", str(path), "--features", "--student", SMALL, "--steps", "30", "--out", str(out)]
    assert main([*command, *TINY[:5], *TINY[-4:-1]]) == 0
    assert (kind == "timm") == ("mask_token" in capsys.readouterr().err)
    run = Run(out)
    config, records = run.config(), run.records()
    assert (config.vit.patch_size, config.crops.n_local, config.distill.teacher_width) == (4, 0, 64)
    assert records[-1]["loss"] < 0.9 * records[0]["loss"] and "teacher_entropy" not in records[0]
    maps = {f"{kind}_map.{part}" for kind in ("class", "patch") for part in ("weight", "bias")}
    assert set(load_file(out / "heads.safetensors")) == maps
    assert main(["doctor", str(out)]) == 0
    assert main(["distill", str(out), "--student", SMALLER, "--steps", "2"]) == 2
    assert "no heads of prototypes" in capsys.readouterr().err


def test_a_run_can_be_imitated_too_and_its_patch_is_taken(teacher, world, tmp_path):
    config = imitating(tiny("vit.patch_size=16"), teacher.folder, SMALL, 3)
    assert (config.vit.patch_size, config.distill.teacher_width) == (8, 16)
    (run,), _ = distill(teacher.folder, tmp_path / "student", [SMALL], 3, imitate=tiny(), world=world)
    assert len(run.records()) == 3
    with pytest.raises(ValueError, match="vit.patch_size: expected 8, as the teacher .* has, got 4"):
        distill(teacher.folder, tmp_path / "other", [SMALL], 3, ["vit.patch_size=4"], imitate=tiny(), world=world)


# ---------------------------------------------------------------- going on from a backbone, with fresh heads


def test_heads_learn_alone_first(world):
    config = tiny("run.steps=4", "optim.freeze_backbone_frac=0.5", "optim.weight_decay=0.3")
    state = start(config, CPU)
    first = {key: value.clone() for key, value in state.student.state_dict().items()}
    changed = []
    for _ in train(config, world.train, state):
        moved = [key for key, value in state.student.state_dict().items() if not torch.equal(value, first[key])]
        changed.append((any(k.startswith("backbone.") for k in moved), any(k.startswith("dino_head.") for k in moved)))
    assert changed == [(False, True), (False, True), (True, True), (True, True)]


def test_going_on_begins_as_the_backbone_and_is_guarded(teacher, world, tmp_path):
    run, _ = go_on(teacher.folder / "weights.safetensors", tmp_path / "on", tiny("vit.width=48", "run.steps=2"), 1.0)
    assert run.config().vit.width == 16 and run.config().optim.freeze_backbone_frac == 1.0
    ours, theirs = load_file(run.folder / "weights.safetensors"), load_file(teacher.folder / "weights.safetensors")
    assert same(ours, theirs)  # the heads alone learned
    said = guard_of(run)
    assert said["before"] == said["after"] and said["verdict"] == "no difference beyond noise"


def test_a_degraded_backbone_is_not_called_an_improvement(teacher, tmp_path, capsys, monkeypatch):
    readings = iter([0.9, 0.3, 0.3])
    monkeypatch.setattr(stages.OnlineKnn, "__call__", lambda *_: next(readings))
    source, out = teacher.folder / "weights.safetensors", tmp_path / "on"
    assert main(["train", "--weights", str(source), "--out", str(out), "--heads-first", "0.5", *TINY]) == 1
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("k-NN 0.900 before, 0.300 after") and said.endswith(": worse")
    assert main(["train", "--resume", str(out)]) == 1  # and it stays so


@pytest.mark.parametrize(
    "before, after, word",
    [(0.5, 0.7, "better"), (0.7, 0.5, "worse"), (0.5, 0.51, "no difference beyond noise"), (None, 0.5, "not judged")],
)
def test_the_verdict_takes_two_standard_errors(before, after, word):
    assert verdict(before, after, 500)["verdict"] == word


def test_the_phase_at_a_higher_resolution_is_guarded_and_keeps_its_frozen_teacher(teacher, world, tmp_path):
    (small,), _ = distill(teacher.folder, tmp_path / "student", [SMALL], 2, world=world)
    run, _ = adapt(small.folder, tmp_path / "larger", 48, 2)
    assert {"before", "after", "verdict"} <= guard_of(run).keys()
    assert json.loads((run.folder / "teacher.json").read_text())["teacher"] == str(teacher.folder)
    assert guard_of(teacher) == {}


def test_a_student_and_a_higher_resolution_do_not_inherit_a_frozen_backbone():
    config = tiny("optim.freeze_backbone_frac=0.2")
    assert distilled(config, "teacher", SMALL, 3).optim.freeze_backbone_frac == 0
    assert adapted(config, 48, 3).optim.freeze_backbone_frac == 0


def test_a_teacher_with_patches_of_14_px_is_imitated_by_any_preset(tmp_path):
    vit = build_vit("vit_tiny", width=64, depth=1, heads=1, patch_size=14, img_size=56)
    weights = export_weights(vit, tmp_path / "theirs.pth", "hub")
    for name in PRESETS:
        config = imitating(preset(name), weights, SMALL, 3, ["crops.global_size=56"])
        assert (config.vit.patch_size, config.crops.global_size, config.crops.n_local) == (14, 56, 0)


def test_weights_with_patches_of_14_px_go_on_with_crops_that_fit_them_alone(tmp_path):
    vit = build_vit("vit_tiny", width=64, depth=1, heads=1, patch_size=14, img_size=28)
    weights = export_weights(vit, tmp_path / "theirs.safetensors", "hub")
    changes = [change for change in TINY if not change.startswith(("vit.", "crops."))]
    command = ["train", "--weights", str(weights), "--out", str(tmp_path / "run"), *changes, "crops.global_size=28"]
    assert main([*command, "crops.local_size=14"]) in (0, 1)  # 1: k-NN fell
    assert Run(tmp_path / "run").config().vit.patch_size == 14


def test_one_student_given_twice_is_refused(teacher, world, tmp_path):
    name, *words = SMALL.split(",")
    for again in (SMALL, ",".join([name, *reversed(words)])):
        with pytest.raises(ValueError, match="expected students of different sizes"):
            distill(teacher.folder, tmp_path / "twice", [SMALL, again], 2, world=world)


def test_several_students_keep_the_step_before_the_last(teacher, world, tmp_path):
    runs, _ = distill(teacher.folder, tmp_path / "two", [SMALL, SMALLER], 3, ["run.checkpoint_every=1",
                                                                            "run.keep_checkpoints=1"], world=world)  # fmt: skip
    assert [[step for step, _ in run.saved()] for run in runs] == [[2, 3], [2, 3]]


def test_a_run_whose_teacher_was_moved_says_how_to_go_on(teacher, world, tmp_path, capsys):
    place = tmp_path / "teacher"
    shutil.copytree(teacher.folder, place)
    distill(place, tmp_path / "student", [SMALL], 2, world=world)
    place = place.rename(tmp_path / "moved")
    assert main(["train", "--resume", str(tmp_path / "student")]) == 2
    assert "student back, or go on with minidino distill ITS-PLACE --resume, all else" in capsys.readouterr().err
    assert main(["distill", str(place), "--student", SMALL, "--steps", "2", "--out", str(tmp_path / "student"), "--resume"]) == 0
