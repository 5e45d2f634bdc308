"""The loop: one record a step, learning, what is left out, switches of the update, and a state that goes on."""

import io
import math
from itertools import islice

import numpy as np
import pytest
import torch

import minidino.learning.train as loop
from minidino.config import override, preset
from minidino.images.pixels import Pixels
from minidino.learning.objective import teacher_logits
from minidino.learning.train import PATIENCE, schedules, start, train

CPU = torch.device("cpu")
N_KINDS = 8
TINY = [
    "crops.global_size=32", "crops.local_size=16", "vit.width=16", "vit.depth=2", "vit.heads=2", "optim.batch_size=8",
    "heads.n_prototypes=32", "heads.hidden_dim=16", "heads.bottleneck_dim=8", "loss.ibot_start_frac=0",
    "loss.ibot_full_frac=0", "run.steps=40", "run.log_every=1", "run.precision=fp32",
]  # fmt: skip


def tiny(*changes):
    return override(preset("scenes-cpu"), [*TINY, *changes])


@pytest.fixture(scope="module")
def pixels():
    """64 plain pictures in the eight corners of the colour cube, with a little noise."""
    kinds = np.arange(64) % N_KINDS
    corners = 28 + 200 * ((kinds[:, None] >> np.arange(3)) & 1)
    noise = np.random.default_rng(0).integers(-25, 26, (64, 32, 32, 3))
    images = (corners[:, None, None, :] + noise).clip(0, 255).astype(np.uint8)
    return Pixels.from_array(images, kinds, [str(kind) for kind in range(N_KINDS)])


def run(config, pixels, n=None, state=None):
    """Records of the first n steps, and the state after them."""
    state = state or start(config, CPU)
    return list(islice(train(config, pixels, state), n)), state


def weights(network):
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def moved(before, network):
    return {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}


def without_seconds(records):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


# ---------------------------------------------------------------- records


def test_one_record_a_step(pixels):
    records, state = run(tiny("run.steps=7", "run.log_every=3"), pixels)
    assert [record["step"] for record in records] == list(range(7)) and state.step == 7
    assert [record["images"] for record in records] == [8 * n for n in range(1, 8)]
    assert ["loss" in record for record in records] == [True, False, False, True, False, False, True]
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds) and seconds[0] > 0
    read = records[0]
    assert read["loss"] == pytest.approx(read["dino"] + read["ibot"] + read["koleo"], rel=1e-5)
    vital = {"lr", "momentum", "teacher_temp", "teacher_entropy", "prototypes_used", "rankme", "feature_std"}
    assert vital | {"grad_norm_backbone", "grad_norm_dino_head", "grad_norm_ibot_head"} <= read.keys()
    assert all(isinstance(value, int | float) for value in read.values())


def test_the_loop_is_lazy_and_waits_for_its_watcher(pixels):
    state = start(tiny(), CPU)
    steps = train(tiny(), pixels, state)
    assert state.step == 0
    next(steps)
    assert state.step == 1


def test_it_learns_what_tells_pictures_apart(pixels):
    """Colour alone tells these pictures apart: DINO gets far below ln K while the prototypes stay in use.

    Eight kinds on 32 prototypes leave ln 4 at best; over five seeds the last readings are 1.8 with a spread of 0.15.
    """
    plain = ["crops.jitter_probability=0", "crops.grayscale_probability=0", "crops.solarize_probability=0"]
    sizes = ["vit.width=32", "heads.hidden_dim=32", "heads.bottleneck_dim=16", "optim.batch_size=16", "loss.ibot=1.0"]
    records, _ = run(tiny("run.steps=60", *plain, *sizes), pixels)
    last = {key: np.mean([record[key] for record in records[-20:]]) for key in ("dino", "ibot", "prototypes_used")}
    assert last["dino"] < math.log(32) - 1
    assert last["ibot"] < np.mean([record["ibot"] for record in records[:3]]) - 1
    assert last["prototypes_used"] > 16


def test_the_seed_decides_the_run(pixels):
    changes = ["vit.drop_path_rate=0.3", "run.precision=bf16"]
    first, state = run(tiny(*changes), pixels, 4)
    torch.manual_seed(1234)
    again, other = run(tiny(*changes), pixels, 4)
    assert without_seconds(first) == without_seconds(again)
    assert not moved(weights(state.student), other.student) and not moved(weights(state.teacher), other.teacher)
    different, _ = run(tiny(*changes, "run.seed=1"), pixels, 1)
    assert different[0]["loss"] != first[0]["loss"]


def test_schedules_of_a_run():
    config = tiny(
        "run.steps=100", "optim.warmup_frac=0.1", "optim.freeze_last_layer_frac=0.05", "teacher.warmup_frac=0.2",
        "teacher.warmup_temp=0.04", "teacher.temp=0.07", "loss.ibot_start_frac=0.4", "loss.ibot_full_frac=0.6",
        "optim.weight_decay=0.1", "optim.final_weight_decay=0.3", "teacher.momentum=0.9",
    )  # fmt: skip
    plan = schedules(config)
    lr = 8e-3 * math.sqrt(8 / 1024)
    assert plan["lr"](0) == pytest.approx(lr / 10) and plan["lr"](9) == pytest.approx(lr)
    assert plan["lr"](55) == pytest.approx((lr + 2e-5) / 2) and plan["lr"](100) == 2e-5
    assert [plan["last_layer_lr"](step) > 0 for step in (0, 4, 5)] == [False, False, True]
    assert plan["weight_decay"](50) == pytest.approx(0.2) and plan["momentum"](50) == pytest.approx(0.95)
    assert [plan["teacher_temp"](step) for step in (0, 19, 99)] == pytest.approx([0.04, 0.07, 0.07])
    ibot = [plan["ibot_weight"](step) for step in (0, 39, 40, 50, 60, 99)]
    assert ibot == pytest.approx([0, 0, 0, 0.15, 0.3, 0.3])
    assert schedules(override(config, ["optim.warmup_start=released"]))["lr"](0) == 0


# ---------------------------------------------------------------- what is not a number


def broken(steps):
    """The stream of batches, with pictures of NaN at some steps."""

    def stream(*arguments):
        for i, batch in enumerate(original(*arguments)):
            yield batch._replace(crops_global=batch.crops_global * math.nan) if i in steps else batch

    original = loop.batches
    return stream


def test_a_step_that_is_not_a_number_is_told_and_left_out(pixels, monkeypatch):
    monkeypatch.setattr(loop, "batches", broken({2, 3}))
    config, before = tiny("run.log_every=100", "loss.targets=centering"), None
    state = start(config, CPU)
    for record in islice(train(config, pixels, state), 5):
        if record["step"] == 1:
            before = weights(state.student), weights(state.teacher), state.center
        if record["step"] in (2, 3):  # told although it is not a step of readings
            assert math.isnan(record["loss"]) and record["lr"] > 0
            assert not moved(before[0], state.student) and not moved(before[1], state.teacher)
            assert state.center is before[2] and state.skipped == record["step"] - 1
    assert state.skipped == 0 and moved(before[0], state.student) and moved(before[1], state.teacher)
    assert all(p.isfinite().all() for p in state.student.parameters())


def test_gradients_that_are_not_numbers_are_left_out(pixels):
    config = tiny()
    state = start(config, CPU)
    hook = state.student.backbone.cls_token.register_hook(lambda gradient: gradient * math.inf)
    before, steps = weights(state.student), train(config, pixels, state)
    record = next(steps)
    assert math.isfinite(record["loss"]) and not math.isfinite(record["grad_norm_backbone"])
    assert not moved(before, state.student) and state.skipped == 1
    hook.remove()
    assert math.isfinite(next(steps)["grad_norm_backbone"])
    assert moved(before, state.student) and state.skipped == 0


def test_twenty_in_a_row_stop_the_run(pixels, monkeypatch):
    monkeypatch.setattr(loop, "batches", broken(set(range(3, 99))))
    config, seen = tiny(), []
    with pytest.raises(FloatingPointError, match=f"{PATIENCE} steps up to step {3 + PATIENCE - 1}"):
        for record in train(config, pixels, start(config, CPU)):
            seen.append(record["step"])
    assert seen == list(range(3 + PATIENCE - 1))


# ---------------------------------------------------------------- precision and stochastic depth


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_full(precision, pixels):
    full, _ = run(tiny(), pixels, 1)
    half, state = run(tiny(f"run.precision={precision}"), pixels, 1)
    for name in ("dino", "ibot", "koleo"):
        assert half[0][name] == pytest.approx(full[0][name], rel=0.05), name
        assert half[0][name] != full[0][name]  # it did run in another precision
    assert all(p.dtype == torch.float32 for p in state.student.parameters())  # master weights


@pytest.mark.parametrize("native", [True, False])
def test_auto_precision_is_bf16_only_where_the_cpu_multiplies_it_natively(native, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    state = start(tiny("run.precision=auto"), CPU)
    assert state.precision == ("bf16" if native else "fp32")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: not native)
    elsewhere = start(tiny("run.precision=auto"), CPU)
    elsewhere.load(state.save())  # a run that goes on on another machine
    assert elsewhere.precision == state.precision
    assert start(tiny("run.precision=fp16"), CPU).precision == "fp16"


def test_fp16_finds_a_scale_that_does_not_overflow(pixels):
    config = tiny("run.precision=fp16")
    records, state = run(config, pixels, 30)
    scale, norms = state.scaler.get_scale(), [record["grad_norm_backbone"] for record in records]
    overflowed = sum(not math.isfinite(norm) for norm in norms)
    assert scale == 65536 / 2**overflowed  # each overflow halves it
    assert all(map(math.isfinite, norms[-5:])) and all(p.isfinite().all() for p in state.student.parameters())
    fresh = start(config, CPU)
    fresh.load(state.save())
    assert fresh.scaler.get_scale() == scale


@pytest.mark.parametrize("drop_path", ["subset", "scale"])
def test_stochastic_depth_runs_and_is_drawn_anew_each_step(drop_path, pixels):
    config = tiny(f"vit.drop_path={drop_path}", "vit.drop_path_rate=0.5", "teacher.momentum=1.0")
    dropped, state = run(config, pixels, 3)
    plain, _ = run(tiny("teacher.momentum=1.0"), pixels, 3)
    assert all(a["dino"] != b["dino"] for a, b in zip(dropped, plain, strict=True))
    assert dropped[0]["teacher_entropy"] == plain[0]["teacher_entropy"]  # the teacher drops nothing
    assert all(math.isfinite(record["loss"]) for record in dropped)


# ---------------------------------------------------------------- switches of the update


def test_warmup_start_released_moves_nothing_but_the_center_at_first(pixels):
    """The learning rate is 0 at step 0, so is the weight decay that it multiplies."""
    changes = ["optim.warmup_frac=0.2", "loss.targets=centering"]
    config = tiny(*changes, "optim.warmup_start=released")
    state = start(config, CPU)
    before = weights(state.student)
    logits = teacher_logits(state.teacher, next(loop.batches(config, pixels, CPU)))
    steps = train(config, pixels, state)
    assert next(steps)["lr"] == 0
    assert not moved(before, state.student) and not moved(before, state.teacher)
    torch.testing.assert_close(state.center.dino, 0.1 * logits.dino.flatten(0, 1).mean(0, keepdim=True))
    torch.testing.assert_close(state.center.ibot, 0.1 * logits.ibot.mean(0, keepdim=True))
    next(steps)
    assert moved(before, state.student) and moved(before, state.teacher)
    _, fixed = run(tiny(*changes, "optim.warmup_start=fixed"), pixels, 1)
    assert moved(before, fixed.student)


def test_prototypes_stand_still_while_frozen(pixels):
    config = tiny("optim.freeze_last_layer_frac=0.05", "heads.weight_g=released")  # 2 of 40 steps
    state = start(config, CPU)
    before, steps = weights(state.student), train(config, pixels, state)
    last = {name for name in before if "last_layer" in name}
    assert len(last) == 4
    for step in range(3):
        next(steps)
        assert bool(moved(before, state.student) & last) == (step >= 2)
        assert "dino_head.mlp.0.weight" in moved(before, state.student)


def test_weight_g_paper_keeps_prototypes_at_length_one(pixels):
    _, paper = run(tiny("heads.weight_g=paper"), pixels, 3)
    _, released = run(tiny("heads.weight_g=released"), pixels, 3)
    assert (paper.student.dino_head.last_layer.weight_g == 1).all()
    assert (paper.teacher.dino_head.last_layer.weight_g == 1).all()
    assert (released.student.dino_head.last_layer.weight_g != 1).any()


@pytest.mark.parametrize("decay_tokens", [True, False])
def test_decay_tokens(decay_tokens):
    groups = start(tiny(f"optim.decay_tokens={decay_tokens}", "vit.num_register_tokens=2"), CPU).optimizer.param_groups
    decayed = {name: group["wd_mult"] for group in groups for name in group["names"]}
    for token in ("cls_token", "mask_token", "pos_embed", "register_tokens"):
        assert decayed[f"backbone.{token}"] == float(decay_tokens), token
    assert decayed["backbone.patch_embed.proj.weight"] == 1 and decayed["backbone.norm.weight"] == 0


def gradients(state):
    return {name: p.grad for name, p in state.student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("scope", ["module", "global"])
def test_clip_scope(scope, pixels):
    clip = 3.0
    (record,), state = run(tiny(f"optim.clip_scope={scope}", f"optim.clip={clip}"), pixels, 1)
    _, free = run(tiny("optim.clip=1e9"), pixels, 1)
    norms = {
        part: torch.stack([g.norm() for name, g in gradients(free).items() if name.startswith(part)]).norm().item()
        for part in ("backbone", "dino_head", "ibot_head")
    }
    assert min(norms.values()) < clip < max(norms.values())  # one part is long and one is short: the scopes differ
    if scope == "global":
        norms = {"global": math.hypot(*norms.values())}
    told = {key.removeprefix("grad_norm_"): value for key, value in record.items() if key.startswith("grad_norm_")}
    assert told == pytest.approx(norms, rel=1e-4)
    for name, g in gradients(state).items():
        norm = norms["global" if scope == "global" else name.partition(".")[0]]
        torch.testing.assert_close(g, gradients(free)[name] * min(1.0, clip / norm), rtol=1e-3, atol=1e-7, msg=name)


def test_learning_rate_and_decay_reach_the_optimizer(pixels):
    config = tiny("optim.layerwise_decay=0.5", "optim.patch_embed_lr_mult=0.2", "optim.weight_decay=0.1")
    (record,), state = run(config, pixels, 1)
    groups = {name: group for group in state.optimizer.param_groups for name in group["names"]}
    assert groups["backbone.norm.weight"]["lr"] == pytest.approx(record["lr"])
    assert groups["backbone.blocks.0.attn.qkv.weight"]["lr"] == pytest.approx(record["lr"] * 0.25)
    assert groups["backbone.patch_embed.proj.weight"]["lr"] == pytest.approx(record["lr"] * 0.125 * 0.2)
    assert groups["backbone.blocks.0.attn.qkv.weight"]["weight_decay"] == pytest.approx(0.1)
    assert groups["backbone.norm.weight"]["weight_decay"] == 0


def test_the_teacher_follows_by_the_momentum_of_the_step(pixels):
    state = start(tiny(), CPU)
    before = weights(state.teacher)
    record = next(train(tiny(), pixels, state))
    for name, p in state.teacher.named_parameters():
        m = record["momentum"]
        expected = m * before[name] + (1 - m) * state.student.get_parameter(name)
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("which", ["released", "paper"])
@pytest.mark.parametrize("targets", ["sinkhorn", "centering"])
def test_a_batch_in_parts_gives_the_same_update(targets, which, pixels):
    """Targets are balanced over the whole batch, the iBOT divisor counts its crops, KoLeo looks for neighbours in it."""
    changes = ["loss.koleo=1", "optim.clip=1e9", f"loss.targets={targets}", f"loss.ibot_divisor={which}",
               f"loss.koleo_views={which}"]  # fmt: skip
    (whole,), one = run(tiny(*changes), pixels, 1)
    for n_parts in (2, 4, 8):
        (told,), state = run(tiny(*changes, f"optim.accumulate={n_parts}"), pixels, 1)
        for name in ("loss", "dino", "ibot", "koleo", "rankme", "mean_cosine"):
            assert told[name] == pytest.approx(whole[name], rel=1e-4), name
        assert gradients(state).keys() == gradients(one).keys()
        for name, g in gradients(state).items():
            error = (g - gradients(one)[name]).norm()
            assert error <= 1e-4 * gradients(one)[name].norm() + 1e-6, name
        if targets == "centering":
            torch.testing.assert_close(state.center.ibot, one.center.ibot)


def test_the_first_look_at_the_parts_of_a_batch_drops_what_the_second_will(pixels, monkeypatch):
    looks = {"first_look": [], "student_losses": []}
    for name, told in looks.items():
        look = getattr(loop, name)
        monkeypatch.setattr(loop, name, lambda *a, look=look, told=told, **k: told.append(look(*a, **k)) or told[-1])
    run(tiny("vit.drop_path_rate=0.5", "optim.accumulate=2"), pixels, 2)
    assert len(looks["first_look"]) == 4
    for first, (_, second) in zip(looks["first_look"], looks["student_losses"], strict=True):
        torch.testing.assert_close(first.transpose(0, 1), second.detach())


def test_fidelity_switches_of_the_objective_reach_it(pixels):
    def first(*changes):
        return run(tiny("optim.warmup_frac=0.2", *changes), pixels, 1)[0][0]

    released = first("loss.ibot_divisor=released", "loss.koleo_views=released")
    paper = first("loss.ibot_divisor=paper", "loss.koleo_views=paper")
    assert paper["ibot"] == pytest.approx(2 * released["ibot"], rel=1e-5)  # 8 of 16 crops have holes
    assert 0.2 * released["koleo"] < paper["koleo"] < 0.8 * released["koleo"]
    fixed = first("crops.n_local=0", "loss.dino_divisor=fixed")
    assert first("crops.n_local=0", "loss.dino_divisor=released")["dino"] == pytest.approx(fixed["dino"] * 2 / 3)
    assert first("loss.targets=centering")["teacher_entropy"] != released["teacher_entropy"]
    cold, warm = (first(f"teacher.patch_temp={temp}") for temp in (0.01, 1.0))
    assert cold["dino"] == warm["dino"] and cold["ibot"] != warm["ibot"]
    assert first("loss.student_temp=1.0")["dino"] < released["dino"]


def test_a_late_ibot_starts_late(pixels):
    config = tiny("run.steps=10", "loss.ibot_start_frac=0.3", "loss.ibot_full_frac=0.5")
    state, mask_token = start(config, CPU), []
    for record in islice(train(config, pixels, state), 6):
        mask_token.append(state.student.backbone.mask_token.abs().max().item())
        assert (record["ibot"] > 0) == (record["step"] > 3)
    assert mask_token[:4] == [0] * 4 and mask_token[4] > 0


# ---------------------------------------------------------------- a state that goes on


@pytest.mark.parametrize(
    "changes",
    [[], ["loss.targets=centering", "run.precision=bf16"], ["vit.drop_path_rate=0.4", "heads.tied=True"]],
    ids=["sinkhorn", "centering in bf16", "drop path, tied"],
)
def test_a_saved_state_goes_on_to_the_bit(changes, pixels):
    config = tiny("run.steps=8", *changes)
    whole, end = run(config, pixels)
    _, middle = run(config, pixels, 5)
    file = io.BytesIO()
    torch.save(middle.save(), file)
    file.seek(0)
    state = start(override(config, ["run.seed=77"]), CPU)  # other weights, all of which must be replaced
    state.load(torch.load(file, weights_only=True))
    rest, _ = run(config, pixels, state=state)
    assert without_seconds(rest) == without_seconds(whole[5:])
    assert not moved(weights(end.student), state.student) and not moved(weights(end.teacher), state.teacher)
    assert (state.teacher.ibot_head is state.teacher.dino_head) == config.heads.tied


def test_blocks_that_are_computed_again_learn_the_same(pixels):
    """Also which crops stochastic depth drops; and autograd keeps less."""
    told, kept = [], []
    for recompute in ("false", "true"):
        config, sizes = tiny("vit.drop_path_rate=0.4", f"vit.recompute={recompute}", "vit.depth=4"), []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            records, state = run(config, pixels, 3)
        told.append((without_seconds(records), weights(state.student)))
        kept.append(sum(sizes))
    assert told[0][0] == told[1][0]
    torch.testing.assert_close(told[1][1], told[0][1], rtol=0, atol=0)
    assert kept[1] < 0.8 * kept[0]
