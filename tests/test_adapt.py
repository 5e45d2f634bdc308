"""The high-resolution phase: the same network on a finer grid, and a run that resumes like any other."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from minidino import stages
from minidino.cli import main
from minidino.config import difference, override, preset
from minidino.images.batches import make_batch
from minidino.learning.adapt import adapted, fitting_batch, start_adapted, tokens_per_image
from minidino.learning.train import start
from minidino.model.vit import interpolate_pos_embed
from minidino.runs import Run
from minidino.stages import adapt, last_state, open_world, pretrain

CPU = torch.device("cpu")
TINY = [
    "data.n_scenes=32", "data.n_test_scenes=16", "data.short_side=32", "crops.global_size=24", "crops.local_size=16",
    "vit.width=16", "vit.depth=2", "vit.heads=2", "heads.n_prototypes=16", "heads.hidden_dim=16",
    "heads.bottleneck_dim=8", "optim.batch_size=8", "run.device=cpu", "run.log_every=1", "run.steps=3",
]  # fmt: skip


def tiny(*changes):
    return override(preset("scenes-cpu"), [*TINY, *changes])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return pretrain(tiny("loss.targets=centering"), tmp_path_factory.mktemp("source") / "run")[0]


def test_what_the_phase_changes_and_nothing_else():
    config = tiny()
    changed = difference(config, adapted(config, 40, 7))
    assert {key: new for key, (_, new) in changed.items()} == {
        "data.short_side": 56, "crops.global_size": 40, "crops.local_size": 32, "loss.ibot_start_frac": 0.0,
        "loss.ibot_full_frac": 0.0, "optim.base_lr": config.optim.base_lr / 2, "run.steps": 7,
    }  # fmt: skip


def test_a_rate_that_hardly_falls_ends_where_the_halved_one_is_at_the_latest():
    config = tiny("optim.final_lr=6e-4")  # of 7e-4
    o = adapted(config, 40, 7).optim
    assert o.final_lr == o.lr == config.optim.lr / 2


def test_a_size_between_patches_is_refused():
    with pytest.raises(ValueError, match="crops.global_size.*multiple of vit.patch_size 8"):
        adapted(tiny(), 42, 7)


@pytest.mark.parametrize("flags", [["vit.interpolate_offset=0.1"], ["vit.interpolate_offset=0.0"]])
def test_the_adapted_network_begins_as_the_pretrained_one_seen_at_that_size(flags):
    config = tiny(*flags)
    before = start(config, CPU)
    with torch.no_grad():
        for weight in before.teacher.parameters():
            weight.add_(0.1 * torch.randn_like(weight))  # a teacher that differs from its student
    after = start_adapted(adapted(config, 48, 4), CPU, before.save())
    images = torch.randn(3, 3, 48, 48)
    for name in ("student", "teacher"):
        old, new = getattr(before, name), getattr(after, name)
        assert new.backbone.pos_embed.shape[1] == 37 and old.backbone.pos_embed.shape[1] == 10
        with torch.no_grad():
            seen = old.backbone.eval()(images)
            assert torch.allclose(new.backbone.eval()(images), seen, rtol=0, atol=1e-6)
        for key, weight in new.state_dict().items():
            assert key == "backbone.pos_embed" or torch.equal(weight, old.state_dict()[key])
    assert not torch.equal(after.student.backbone.pos_embed, after.teacher.backbone.pos_embed)
    assert (after.step, after.seconds) == (0, 0.0)


def test_the_same_size_leaves_positions_untouched():
    config = tiny()
    before = start(config, CPU)
    after = start_adapted(adapted(config, 24, 4), CPU, before.save())
    assert torch.equal(after.student.backbone.pos_embed, before.student.backbone.pos_embed)
    grown = interpolate_pos_embed(before.student.backbone.pos_embed, (6, 6))
    assert not torch.equal(grown[:, 1:10], before.student.backbone.pos_embed[:, 1:])


def test_the_centre_of_the_teacher_goes_along(finished):
    _, saved = finished.load(CPU)
    state = start_adapted(adapted(finished.config(), 48, 4), CPU, saved)
    assert saved["center"][1] is not None and state.center.ibot is saved["center"][1]  # iBOT had entered
    assert state.center.dino is saved["center"][0]


def test_a_phase_killed_before_its_first_checkpoint_goes_on_from_the_pretrained_weights(
    finished, tmp_path, monkeypatch
):
    whole, _ = adapt(finished.folder, tmp_path / "whole", 40, 4)
    train = stages.train

    def dying(*arguments):
        for record in train(*arguments):
            yield record
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages, "train", dying)
        adapt(finished.folder, tmp_path / "cut", 40, 4)
    cut = Run(tmp_path / "cut")
    assert [step for step, _ in cut.saved()] == [0]
    pretrain(cut.config(), cut.folder, resume=True)
    told = [[{k: v for k, v in r.items() if k != "seconds"} for r in run.records()] for run in (whole, cut)]
    assert told[0] == told[1] and len(told[0]) == 4
    weights = [load_file(run.folder / "weights.safetensors") for run in (whole, cut)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_run_that_has_not_ended_is_not_adapted(finished, tmp_path):
    config = tiny("run.steps=30", "run.checkpoint_every=30")
    Run.create(tmp_path / "run", config, CPU)
    with pytest.raises(ValueError, match="at step 0 of 30; finish it"):
        adapt(tmp_path / "run", tmp_path / "larger", 40, 4)
    assert not (tmp_path / "larger").exists()


def test_without_checkpoints_the_average_stands_for_the_student(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "kept", ignore=shutil.ignore_patterns("checkpoints"))
    state = last_state(Run(tmp_path / "kept"), CPU)
    for key, value in load_file(finished.folder / "weights.safetensors").items():
        assert torch.equal(state["student"][f"backbone.{key}"], value)
    run, _ = adapt(tmp_path / "kept", tmp_path / "larger", 32, 2)
    assert len(run.records()) == 2
    (tmp_path / "kept" / "heads.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no heads of prototypes"):
        adapt(tmp_path / "kept", tmp_path / "other", 32, 2)


def test_fewer_images_take_the_memory_of_before(monkeypatch):
    """Bytes that are kept for the backward pass, counted, at twice the size: within a tenth of what they were."""

    def kept(config):
        found = {}

        def keep(tensor):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        state = start(config, CPU)
        batch = make_batch(config, 0, torch.zeros(config.optim.batch_size, 3, 64, 64, dtype=torch.uint8),
                           torch.full((config.optim.batch_size, 2), 64), torch.arange(config.optim.batch_size))  # fmt: skip
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            crops = batch.crops_global.flatten(0, 1), batch.crops_local.flatten(0, 1)
            state.student.backbone.forward_packed(list(crops), [None, None])
        return sum(found.values())

    before = tiny("optim.batch_size=64", "crops.global_size=32", "vit.width=32", "vit.attention=sdpa")
    after, grown = adapted(before, 64, 4, fit_memory=True), adapted(before, 64, 4)
    assert tokens_per_image(before) == 2 * 17 + 2 * 5 and tokens_per_image(after) == 2 * 65 + 2 * 17
    assert after.optim.batch_size == fitting_batch(before, grown) == 64 * 44 // 164 and grown.optim.batch_size == 64
    assert kept(after) == pytest.approx(kept(before), rel=0.1)
    assert kept(grown) > 3 * kept(before)
    parts = adapted(override(before, ["optim.accumulate=4"]), 64, 4, fit_memory=True).optim
    assert parts.batch_size % 4 == 0 and parts.batch_size <= 17


def test_the_published_crops_have_the_published_tokens():
    assert tokens_per_image(preset("vitl14-lvd")) == 914 and tokens_per_image(preset("vitl16-short")) == 690


def test_the_command_writes_a_run_beside_the_source(finished, capsys):
    command = ["adapt", str(finished.folder), "--size", "32", "--steps", "2", "optim.base_lr=0.001"]
    assert main(command) == 0
    run = Run(finished.folder.with_name("run-32px"))
    config = run.config()
    assert (config.crops.global_size, config.optim.base_lr, len(run.records())) == (32, 0.001, 2)
    json.loads((run.folder / "environment.json").read_text())
    assert main(command) == 2
    assert "holds a run" in capsys.readouterr().err
    assert open_world(config, run.folder).train.squares(8).shape[0] == 32
    with pytest.raises(SystemExit):
        main([*command, "--base_lr=0.001"])
    assert "unrecognized arguments: --base_lr=0.001" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["vit.depth=3", "heads.n_prototypes=32", "vit.patch_size=4"])
def test_another_network_is_refused_in_words(finished, tmp_path, change):
    with pytest.raises(ValueError, match=f"cannot change {change.split('=')[0]}"):
        adapt(finished.folder, tmp_path / "other", 32, 2, [change])
