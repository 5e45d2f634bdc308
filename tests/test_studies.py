"""The studies of benchmarks/ that take hours, at a size of seconds: they run, go on after a kill, and draw."""

import importlib
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minidino.config import override

ROOT = Path(__file__).resolve().parents[1]
TINY = ["data.n_scenes=60", "data.n_test_scenes=40", "vit.width=16", "vit.depth=1", "vit.heads=2", "optim.batch_size=8",
        "crops.global_size=16", "crops.local_size=8", "heads.n_prototypes=16", "heads.hidden_dim=16",
        "heads.bottleneck_dim=8"]  # fmt: skip


@pytest.fixture
def study(monkeypatch, tmp_path):
    """Import a file of benchmarks/; what it makes goes elsewhere."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(tmp_path)
    recipe = importlib.import_module("recipe")
    there = recipe.RESULTS
    monkeypatch.setattr(recipe, "RESULTS", tmp_path)

    def of(name):
        with monkeypatch.context() as for_once:  # what is imported keeps what it finds, beyond this test
            for_once.setattr(recipe, "RESULTS", there)
            return importlib.import_module(name)

    return of


def test_every_part_is_left_out_judged_and_drawn(study, monkeypatch, tmp_path):
    ablations = study("ablations")
    monkeypatch.setattr(ablations, "RESULTS", tmp_path)
    of = ablations.config_of
    monkeypatch.setattr(ablations, "config_of", lambda name, seed, steps=2: override(of(name, seed, 2), TINY))
    monkeypatch.setattr(ablations, "CHANGES", dict(list(ablations.CHANGES.items())[:3]))
    ablations.learn(2, [])
    before = [folder.stat().st_mtime_ns for folder in sorted(tmp_path.glob("runs/*/weights.safetensors"))]
    ablations.judge(2)
    found = json.loads((tmp_path / "ablations.json").read_text())
    assert list(found["rows"]) == ["the preset", "no KoLeo", "no iBOT"] and len(before) == 6
    assert [folder.stat().st_mtime_ns for folder in sorted(tmp_path.glob("runs/*/weights.safetensors"))] == before
    for row in found["rows"].values():
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        assert all(0 <= run["map"] <= 1 and 0 <= run["miou"] <= 1 and run["rmse"] > 0 for run in row["runs"])
    preset, without = (found["rows"][name]["runs"] for name in ("the preset", "no iBOT"))
    gains = np.array([one["miou"] - other["miou"] for one, other in zip(preset, without)])
    sign = found["signs"][1]
    assert (sign["change"], sign["reading"]) == ("no iBOT", "miou")
    assert sign["gain"] == pytest.approx(gains.mean()) and sign["standard_error"] == pytest.approx(gains.std(ddof=1) / 2**0.5)
    assert "| no KoLeo |" in ablations.tables()["parts"]
    drawn = ablations.picture(tmp_path / "ablations.png")
    assert set(drawn) == set(ablations.READINGS) and len(drawn["map"]) == 2 and (tmp_path / "ablations.png").exists()


def test_a_network_that_sees_nothing_finds_pictures_by_chance(study, monkeypatch):
    ablations = study("ablations")
    of = ablations.config_of
    monkeypatch.setattr(ablations, "config_of", lambda name, seed, steps=2: override(of(name, seed, 2), TINY))
    ablations.world.cache_clear()
    world, config = ablations.world(), ablations.config_of("the preset", 0)

    class Constant(torch.nn.Module):
        def forward(self, images):
            return torch.ones(len(images), 4)

    monkeypatch.setattr(ablations, "class_tokens", lambda *_: {"trained": (None, torch.ones(40, 4))})
    blind = ablations.found_again(Constant(), config, world)
    # all cosines are alike, so rows rank in their order: query i stands at place i
    ranks = np.arange(40)
    expected = np.mean([1.0, *(0.5 * (1 / (ranks[1:] + 1)))])
    assert blind == pytest.approx(expected)
    ablations.world.cache_clear()


def test_the_record_is_run_once_gone_on_with_and_drawn(study, tmp_path):
    imagenette = study("imagenette")
    generator = np.random.default_rng(0)
    for part, n in (("train", 12), ("val", 6)):
        for kind in ("n01", "n02"):
            (tmp_path / "photographs" / part / kind).mkdir(parents=True)
            for i in range(n):
                pixels = generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photographs" / part / kind / f"{i}.png")
    changes = [change for change in TINY if "scenes" not in change] + ["data.short_side=24", "run.log_every=1"]
    folder = tmp_path / "record"
    found = imagenette.record(str(tmp_path / "photographs"), 0.01, "imagenette-cpu", changes, folder)
    steps = found["config"]["run.steps"]
    assert found["curve"]["step"][-1] == steps - 1 and found["images_per_s"] > 0 and found["minutes"] > 0
    assert set(found["reached"]) == {"0.80", "0.85", "0.90"} and found["run"]["n_test"] == 12
    again = imagenette.record(str(tmp_path / "photographs"), 9, "imagenette-cpu", [], folder)
    assert again["config"] == found["config"] and again["curve"] == found["curve"]
    drawn = imagenette.picture(found, tmp_path / "record.png")
    assert drawn["knn"] == found["curve"]["knn"] and (tmp_path / "record.png").exists()


def test_a_goal_counts_from_when_it_is_first_reached(study):
    imagenette = study("imagenette")
    told = {"seconds": [60.0, 120.0, 180.0], "knn": [0.79, 0.86, 0.80]}
    assert imagenette.reached(told) == {"0.80": 2.0, "0.85": 2.0, "0.90": None}


def test_batches_of_all_sizes_are_learned_judged_and_drawn(study, monkeypatch, tmp_path):
    batch_size, compute = study("batch_size"), study("compute")
    monkeypatch.setattr(batch_size, "RESULTS", tmp_path)
    compute.world.cache_clear()
    tiny = [change for change in TINY if "batch_size" not in change]
    of, ours = batch_size.config_of, compute.config_of
    monkeypatch.setattr(compute, "config_of", lambda width, steps, seed: override(ours(width, steps, seed), TINY))
    monkeypatch.setattr(batch_size, "USUAL", 8)
    row = partial(batch_size.Row, images=16)
    monkeypatch.setattr(batch_size, "ROWS", {"64": row(8, batch_size.RATE), "16-queue": row(4, batch_size.QUEUED),
                                             "64-parts": row(8, batch_size.PARTS, ("optim.accumulate=2",)),
                                             "64-apart": row(8, batch_size.APART, ("optim.accumulate=2",))})  # fmt: skip
    monkeypatch.setattr(batch_size, "config_of", lambda name, seed: override(of(name, seed), tiny))
    batch_size.learn(2, [])
    batch_size.judge(2)
    found = json.loads((tmp_path / "batch-size.json").read_text())
    assert [(row["batch_size"], len(row["runs"])) for row in found["rows"].values()] == [(8, 2), (4, 2), (8, 2), (8, 2)]
    assert found["beside_batches_of_64"]["64"] == {"gain": 0.0, "standard_error": 0.0}
    assert found["rows"]["64-parts"]["mib"] < found["rows"]["64"]["mib"]
    whole, parts, apart = (batch_size.network(name, 0).records()[0]["koleo"] for name in ("64", "64-parts", "64-apart"))
    assert parts == pytest.approx(whole, rel=1e-4) and apart < 0.9 * whole  # fewer to be near to
    assert "| 16 | 4 | 4 | learning rate, momentum, a queue" in batch_size.tables()["batch-size"]
    compute.world.cache_clear()


def test_a_queue_balances_the_rows_of_the_steps_before_too(study):
    batch_size = study("batch_size")
    from minidino.learning import train
    from minidino.learning.losses import sinkhorn_knopp
    from minidino.learning.objective import TeacherLogits

    steps = [torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    plain = train.make_targets
    with batch_size.queued(9):
        told = [train.make_targets(TeacherLogits(step, None), (0.1, 0.2))[0].dino for step in steps]
    assert train.make_targets is plain
    torch.testing.assert_close(told[0], plain(TeacherLogits(steps[0], None), 0.1)[0].dino)
    rows = torch.cat([step.flatten(0, 1) for step in steps])[-15:]  # nine of the steps before, six of the last
    torch.testing.assert_close(told[3].flatten(0, 1), sinkhorn_knopp(rows, 0.1)[-6:])


@pytest.mark.parametrize("name, words, told", [
    ("copies", "run", "--data PATH"), ("probes", "photographs", "--data PATH"), ("probes", "decoders", "--data PATH"),
    ("distill", "photographs", "--data PATH"), ("recipe", "choices", "--data PATH"), ("recipe", "photographs", "--data PATH"),
    ("recipe", "report --seeds 0", "expected at least 1, got 0"),
    ("distill", "judge --seeds -1", "expected at least 1, got -1"),
    ("highres", "judge --seeds 0", "expected at least 1, got 0"), ("compute", "judge --seeds 0", "expected at least 1, got 0"),
    ("ablations", "judge --seeds 1", "at least 2"), ("batch_size", "judge --seeds 1", "at least 2"),
    ("ablations", "judge", "learn --seeds 3 comes first"), ("imagenette", "draw", "run comes first"),
])  # fmt: skip
def test_a_study_that_cannot_be_is_refused_and_stores_nothing(name, words, told, study, monkeypatch, tmp_path, capsys):
    module = study(name)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", [f"{name}.py", *words.split()])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert told in capsys.readouterr().err + str(ended.value.code) and not list(tmp_path.iterdir())


class Untrained:
    """Instead of processes that train: each run comes to nothing."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, _, jobs):
        return iter([{"knn": 0.1, "teacher_entropy": 1.0} for _ in jobs])


def test_a_study_goes_on_and_is_never_mixed_with_another(study, monkeypatch, tmp_path):
    recipe, rows = study("recipe"), {"the preset": (), "no iBOT": ("loss.ibot=0.0",)}
    monkeypatch.setattr(recipe, "ProcessPoolExecutor", Untrained)
    recipe.study("s", rows, 3, 500, "no iBOT")
    recipe.study("s", rows, 3, 500, None)
    kept = (tmp_path / "s.json").read_text()
    assert list(json.loads(kept)["rows"]) == list(rows)
    for seeds, steps, only, words in ((5, 500, None, "3 seeds of 500 steps, and 5 of 500"), (3, 20, None, "and 3 of 20"),
                                      (3, 500, "nothing", "a part of one of the preset, no iBOT; got 'nothing'")):  # fmt: skip
        with pytest.raises(SystemExit, match=words):
            recipe.study("s", rows, seeds, steps, only)
    assert (tmp_path / "s.json").read_text() == kept


def test_a_choice_for_other_seeds_is_not_taken_for_the_one_asked_for(study, monkeypatch, tmp_path):
    curation = study("curation")
    monkeypatch.setattr(curation, "WORK", tmp_path)
    found = {"arms": {"random": [["a"]] * 3}, "copy_steps": 600}
    (tmp_path / "x-chosen.json").write_text(json.dumps(found))
    raw = curation.Raw(Path("x.zip"), *[None] * (len(curation.Raw._fields) - 1))
    assert curation.choose(raw, 3, 1000, 600) == found
    for seeds, steps in ((5, 600), (3, 50)):
        with pytest.raises(SystemExit, match=f"'seeds': {seeds}, 'copy_steps': {steps}.* is asked for"):
            curation.choose(raw, seeds, 1000, steps)


def test_networks_that_were_trained_where_they_are_judged_have_a_table(study, monkeypatch, tmp_path):
    curation = study("curation")
    monkeypatch.setattr(curation, "RESULTS", tmp_path)
    for name in ("balance", "helps"):
        found = json.loads((ROOT / "data" / "results" / f"curation-{name}.json").read_text())
        for pool in found["pools"].values():
            pool["trained_on"] = None
        (tmp_path / f"curation-{name}.json").write_text(json.dumps(found))
    assert f"trained on {found['environment']['machine']}" in curation.tables()["helps"]
