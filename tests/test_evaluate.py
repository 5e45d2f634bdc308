"""Every question that `minidino probe` asks, of a tiny run and of what nobody trained."""

import csv
import json
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from painted import BLUE, GREEN, RED, painted
from PIL import Image

from minidino import evaluate as evaluate_module
from minidino.cli import main
from minidino.config import override, preset
from minidino.evaluate import TASKS, evaluate
from minidino.images.scenes import MASK_CLASSES, draw_scenes
from minidino.model.vit import build_vit
from minidino.model.weights import export_weights
from minidino.probes.features import state_hash
from minidino.probes.grid import linear_grid
from minidino.probes.linear import linear_probe, patch_depth_probe, patch_probe
from minidino.probes.logistic import logistic_regression, low_shot
from minidino.probes.retrieval import leave_one_out
from minidino.questions import open_groups, open_landmarks, open_question
from minidino.stages import pretrain
from minidino.subjects import Cache, network, patch_pixels, placed, positions, subjects_of, thumbnail

SMALL = ["data.n_scenes=120", "data.n_test_scenes=60", "run.steps=3", "optim.batch_size=16", "run.device=cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    pretrain(override(preset("scenes-cpu"), SMALL), folder)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A few steps of the heads, a few penalties."""
    monkeypatch.setattr(evaluate_module, "HEADS", {
        "segmentation": {"steps": 20}, "depth": {"steps": 10}, "dpt": {"steps": 3, "channels": 4},
        "finetune": {"steps": 3},
    })  # fmt: skip
    monkeypatch.setattr(evaluate_module, "SHOTS", (1,))
    few = partial(evaluate_module.logistic_regression, cs=(0.01, 1.0))
    monkeypatch.setattr(evaluate_module, "logistic_regression", few)


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """Nine pictures: a pair, a triple and four of nothing else, one of them broken."""
    folder = tmp_path_factory.mktemp("things") / "set"
    folder.mkdir()
    scenes = draw_scenes(9, 48, 3).images
    groups = ["pair", "pair", "triple", "triple", "triple", "", "", "", ""]
    for i, image in enumerate(scenes):
        Image.fromarray(image).save(folder / f"{i}.png")
    (folder / "8.png").write_bytes(b"no picture")
    with open(folder / "groups.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file", "group"), *((f"{i}.png", name) for i, name in enumerate(groups))])
    return folder


@pytest.mark.parametrize("task", ["knn", "linear", "logreg", "segmentation", "depth"])
def test_every_question_is_asked_of_all_subjects_and_written_down(task, run, tmp_path):
    found = evaluate(run, task, baselines=("random", "pixels"), out=tmp_path / "out", cache=run.parent / "features")
    stored = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail)
    dense = task in ("segmentation", "depth")
    assert list(found["answers"]) == ["trained", "random ViT"] + (
        ["position", "pixels + position", "trained + position", "random ViT + position"] if dense else ["pixels", "colours"])  # fmt: skip
    score = TASKS[task].score
    assert all(np.isfinite(answer[score]) for answer in found["answers"].values())
    assert stored["answers"]["trained"][score] == found["answers"]["trained"][score]
    assert stored["row"].count("|") == 5 and f"trained {found['answers']['trained'][score]:.3f}" in stored["row"]
    assert found["report"] == str(tmp_path / "out" / "report.html")
    assert stored["environment"]["versions"]["torch"] and (stored["n_train"], stored["n_test"]) == (120, 60)
    assert np.asarray(Image.open(tmp_path / "out" / "figure.png")).std() > 5
    page = (tmp_path / "out" / "report.html").read_text()
    assert "data:image/png" in page and ("Intersection over union: trained." in page) == (task == "segmentation")


def test_a_decoder_is_asked_of_networks_alone_and_beside_a_linear_head(run, tmp_path):
    found = evaluate(run, "dpt", baselines=("random", "pixels"), out=tmp_path / "out", cache=run.parent / "features")
    assert list(found["answers"]) == ["trained", "random ViT"]
    four_blocks = evaluate(run, "depth", out=tmp_path / "linear", cache=run.parent / "features")
    for answer in found["answers"].values():
        assert np.isfinite(answer["rmse"]) and answer["rmse"] != answer["linear"]["rmse"]
    linear = four_blocks["answers"]["trained"]["four_blocks"]
    assert found["answers"]["trained"]["linear"]["rmse"] == linear["rmse"]
    page = Path(found["report"]).read_text()
    assert "a linear head" in page and f"{linear['rmse']:.4g}</td>" in page
    assert np.asarray(Image.open(tmp_path / "out" / "figure.png")).std() > 5


def test_networks_are_fine_tuned_beside_a_linear_head(run, tmp_path, monkeypatch):
    asked, real = [], evaluate_module.finetune

    def watched(vit, train, test, size, **how):
        answer = real(vit, train, test, size, **how)
        asked.append((state_hash(vit), len(train), len(test), size, answer["accuracy"]))
        return answer

    monkeypatch.setattr(evaluate_module, "finetune", watched)
    found = evaluate(run, "finetune", baselines=("random", "pixels"), out=tmp_path / "o", cache=run.parent / "features")
    subjects, config = subjects_of(run, ("random",), progress=False)
    assert list(found["answers"]) == ["trained", "random ViT"]
    for subject, (network, n_train, n_test, size, accuracy) in zip(subjects, asked, strict=True):
        answer = found["answers"][subject.name]
        assert network == state_hash(subject.vit) and accuracy == answer["accuracy"]
        assert (n_train, n_test, size) == (120, 60, config.crops.global_size)
        data, _ = open_question("labelled", None, None, None, config, Cache(run.parent / "features"))
        assert answer["linear"] == linear_probe(*data.rows(subject), epochs=10)["accuracy"]
    assert "a linear head" in Path(found["report"]).read_text()
    assert np.asarray(Image.open(tmp_path / "o" / "figure.png")).std() > 5


def test_few_shots_are_drawn_of_the_classes_that_occur(run, tmp_path):
    data = painted(tmp_path / "set", train_a=RED, train_c=BLUE, val_a=RED, val_b=GREEN, val_c=BLUE)
    found = evaluate(run, "logreg", data, out=tmp_path / "out", cache=tmp_path / "c")
    assert list(found["answers"]["trained"]["low_shot"]) == [1]


def test_the_number_of_voters_is_the_one_that_was_used(run, tmp_path, monkeypatch):
    said, draw = [], evaluate_module.pictures.baselines_bar
    monkeypatch.setattr(evaluate_module.pictures, "baselines_bar", lambda *told: said.append(told[2]) or draw(*told))
    data = painted(tmp_path / "set", train_a=RED, train_b=BLUE, val_a=RED, val_b=BLUE)
    found = evaluate(run, "knn", data, out=tmp_path / "out", cache=tmp_path / "c")
    assert found["answers"]["trained"]["k"] == 10 and said == ["k-NN top-1, k = 10"]


def test_retrieval_searches_among_all_others(run, things, tmp_path):
    found = evaluate(run, "retrieval", str(things), baselines=("pixels",), out=tmp_path / "out", cache=tmp_path / "c")
    assert found["answers"]["pixels"]["n_queries"] == 5 and found["n_test"] == 8  # the broken one is left out
    grouped = open_groups(str(things), 48, Cache(tmp_path / "c"))
    rows = thumbnail(grouped.pixels.whole(48))
    assert found["answers"]["pixels"]["map"] == pytest.approx(leave_one_out(rows, grouped.groups)["map"])


def test_retrieval_by_a_ground_truth_file_cuts_queries_out_or_not(run, things, tmp_path):
    gnd = [{"easy": [(i + 1) % 8], "hard": [(i + 2) % 8], "junk": [i], "bbx": [0, 0, 24, 24]} for i in range(6)]
    truth, names = tmp_path / "gnd.json", [str(i) for i in range(8)]
    truth.write_text(json.dumps({"gnd": gnd, "imlist": names, "qimlist": names[:6]}))
    found = evaluate(run, "retrieval", str(things), out=tmp_path / "out", truth=str(truth), cache=tmp_path / "c")
    answer = found["answers"]["trained"]
    assert len(answer) == 7 and answer["map"] == answer["medium, cropped queries"]
    assert answer["medium, cropped queries"] != answer["medium, whole queries"]
    easy = [{"easy": [1]}, {"easy": [3]}]
    truth.write_text(json.dumps({"gnd": easy, "imlist": names, "qimlist": ["0", "2"]}))
    found = evaluate(run, "retrieval", str(things), out=tmp_path / "out", truth=str(truth), cache=tmp_path / "c")
    answer = found["answers"]["trained"]
    assert set(answer) == {"map", *(f"{p}, {q} queries" for p in ("easy", "medium") for q in ("cropped", "whole"))}
    truth.write_text(json.dumps({"gnd": [{"easy": []}] * 2, "imlist": ["0"], "qimlist": ["0", "2"]}))
    with pytest.raises(ValueError, match="no query has a positive by protocol 'medium'"):
        evaluate(run, "retrieval", str(things), out=tmp_path / "out", truth=str(truth), cache=tmp_path / "c")
    truth.write_text(json.dumps({"gnd": gnd, "imlist": ["absent"] * 8, "qimlist": names[:6]}))
    with pytest.raises(ValueError, match="lacks 8 pictures of .* such as absent"):
        evaluate(run, "retrieval", str(things), out=tmp_path / "out", truth=str(truth), cache=tmp_path / "c")


def test_a_query_is_cut_out_of_a_picture_that_still_has_its_detail(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (180, 200, 3), dtype=np.uint8)
    (tmp_path / "set").mkdir()
    Image.fromarray(picture).save(tmp_path / "set" / "a.png")
    gnd = {"gnd": [{"easy": [0], "bbx": [40, 60, 88, 108]}], "imlist": ["a"], "qimlist": ["a"]}
    (tmp_path / "gnd.json").write_text(json.dumps(gnd))
    found = open_landmarks(str(tmp_path / "set"), str(tmp_path / "gnd.json"), 48, Cache(tmp_path / "c"))
    assert np.array_equal(found.queries["cropped"].pixels.image(0), picture[60:108, 40:88].transpose(2, 0, 1))
    assert np.array_equal(found.queries["whole"].pixels.image(0), found.database.pixels.image(0))  # 96 px high


def test_pictures_of_a_ground_truth_are_found_by_the_fullest_name(tmp_path):
    scenes = iter(draw_scenes(6, 48, 3).images)
    for name in ("a/1.png", "b/1.png", "view.0.png", "view.1.png", "b/x.png", "x.jpg"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(next(scenes)).save(tmp_path / "set" / name)

    def files(*names):
        gnd = {"gnd": [{"easy": [0]}], "imlist": list(names), "qimlist": ["view.0"]}
        (tmp_path / "gnd.json").write_text(json.dumps(gnd))
        found = open_landmarks(str(tmp_path / "set"), str(tmp_path / "gnd.json"), 48, Cache(tmp_path / "c"))
        assert found.queries["whole"].pixels.files == ["view.0.png"]
        return found.database.pixels.files

    assert files("b/1", "a/1.png", "view.1", "x", "b/x") == ["b/1.png", "a/1.png", "view.1.png", "x.jpg", "b/x.png"]
    assert files("other/view.1.jpeg") == ["view.1.png"]
    with pytest.raises(ValueError, match="^1 may be a/1.png or b/1.png"):
        files("1")
    with pytest.raises(ValueError, match="lacks 1 pictures of .* such as view"):
        files("view")


def test_descriptions_are_computed_once(run, tmp_path):
    calls = []
    subject = subjects_of(run)[0][0]
    cache, images = Cache(tmp_path), torch.zeros(2, 3, 48, 48, dtype=torch.uint8)
    for _ in range(2):
        found = cache.whole(subject, "two", 48, lambda: calls.append(1) or images)
    assert len(calls) == 1 and found["cls_blocks"].shape == (2, 4, 64) and found["mean_patch"].shape == (2, 64)
    first = cache.maps(subject, "two", images, "last")
    assert torch.equal(cache.maps(subject, "two", images, "last"), first) and first.shape == (2, 64, 6, 6)
    assert cache.maps(subject, "two", images, "lin4").shape == (2, 2 * 4 * 64, 6, 6)
    told = placed(subject)
    assert torch.equal(cache.maps(told, "two", images, "last"), told.maps(images, "last"))
    assert torch.equal(told.maps(images, "last")[:, :64], first) and told.maps(images, "last").shape[1] == 128


@pytest.mark.parametrize("untold", [{"heads": 4}, {"interpolate_offset": 0.0}, {"interpolate_antialias": True}])
def test_networks_of_the_same_tensors_that_see_otherwise_share_no_descriptions(untold, tmp_path):
    vits = [build_vit("vit_tiny", **{"width": 32, "heads": 2, "depth": 1, "patch_size": 8, "img_size": 32, **how})
            for how in ({}, untold)]  # fmt: skip
    vits[1].load_state_dict(vits[0].state_dict())
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    rows = [Cache(tmp_path).whole(network("net", vit.eval()), "two", 48, lambda: images)["cls_blocks"] for vit in vits]
    assert not np.allclose(*rows, atol=1e-6)


def test_weights_alone_are_judged_beside_the_same_network_untrained(run, tmp_path):
    torch.manual_seed(5)
    vit, again = (build_vit("vit_tiny", depth=1, patch_size=8, img_size=32, num_register_tokens=2) for _ in range(2))
    export_weights(vit, tmp_path / "w.safetensors")
    (trained, fresh), config = subjects_of(tmp_path / "w.safetensors", ["random"])
    assert config is None and fresh.vit.num_register_tokens == 2 and trained.made_by != fresh.made_by
    assert all(float(x.std()) == pytest.approx(float(again.state_dict()[name].std()), rel=0.2, abs=1e-3)
               for name, x in fresh.vit.state_dict().items() if x.numel() > 1000)  # fmt: skip
    assert all(torch.equal(x, vit.state_dict()[name]) for name, x in trained.vit.state_dict().items())
    data = str(tmp_path / "set")
    for split, start in (("train", 0), ("val", 6)):
        for i, image in enumerate(draw_scenes(6, 32, 1, start).images):
            (tmp_path / "set" / split / str(i % 2)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / "set" / split / str(i % 2) / f"{i}.png")
    found = evaluate(tmp_path / "w.safetensors", "knn", data, 32, ("random",), tmp_path / "out", cache=tmp_path / "c")
    assert set(found["answers"]) == {"trained", "random ViT"} and found["n_test"] == 6


def test_what_patches_know_without_a_network():
    images = torch.randint(0, 256, (2, 3, 12, 16), dtype=torch.uint8)
    where = positions(images, 8)
    assert where.shape == (2, 64, 2, 2)
    assert torch.equal(where[0], where[1]) and where[0, 0].eq(1).all()  # the first is constant
    flat = where[0].flatten(1).float().T
    assert torch.linalg.matrix_rank(flat) == 4  # four places, told apart
    found = patch_pixels(images, 8)
    assert found.shape == (2, 3 * 64 + 64, 2, 2)
    inside = found[0, 0].float() * 255  # red, upper left of each patch; two rows of zeros above the picture
    assert inside[1].tolist() == pytest.approx([images[0, 0, 6, 0].item(), images[0, 0, 6, 8].item()], abs=0.1)
    assert not inside[0].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_network_gets_no_score(value):
    x, y = torch.randn(40, 6), torch.arange(40) % 2
    x[:, 0] = 9 * y
    broken, depth = x.clone(), torch.rand(8, 5) + 1
    broken[3, 2] = value
    for train, test in ((broken, x), (x, broken)):
        rows, cut = (train, y, test, y), (train.view(8, 5, 6), test.view(8, 5, 6))
        blocks = [{"cls_blocks": part[:, None], "mean_patch": part} for part in (train, test)]
        for probe in (
            lambda: linear_probe(*rows, epochs=1),
            lambda: linear_grid(blocks[0], y, blocks[1], y, blocks=(1,), epochs=1),
            lambda: logistic_regression(*rows, cs=(1.0,)),
            lambda: low_shot(*rows, ns=(1,)),
            lambda: patch_probe(cut[0], y.view(8, 5), cut[1], y.view(8, 5), 2),
            lambda: patch_depth_probe(cut[0], depth, cut[1], depth),
        ):
            with pytest.raises(ValueError, match="the features hold NaN or infinity: the network that made them is"):
                probe()
    unknown = torch.where(torch.arange(40) == 3, -1, y)  # what does not count does no harm
    assert logistic_regression(broken, unknown, x, y, cs=(1.0,))["accuracy"] == 1


@pytest.mark.parametrize("task", ["linear", "robustness", "slices"])
def test_broken_weights_are_told_in_one_line(task, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vit = build_vit("vit_tiny", depth=1, patch_size=8, img_size=32)
    vit.norm.weight.data[3] = torch.nan
    export_weights(vit, tmp_path / "w.safetensors")
    data = painted(tmp_path / "set", 20, train_a=RED, train_b=BLUE, val_a=RED, val_b=BLUE)
    assert main(["probe", "w.safetensors", "--task", task, "--data", data, "--size", "32"]) == 2
    assert "minidino probe: the features hold NaN or infinity" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(task="taste"), "expected a task of knn, linear"),
        (dict(baselines=("oracle",)), "expected baselines random or pixels"),
        (dict(size=(32, 48)), "looked at in squares"),
        (dict(size=0), "a size of at least 1 px, got 0"),
        (dict(task="depth", size=(48, -48)), "a size of at least 1 px"),
        (dict(task="retrieval"), "drawn scenes are in no groups"),
        (dict(truth="queries.json"), "truth goes with retrieval, not with knn"),
        (dict(slices="slices.csv"), "slices goes with slices, not with knn"),
        (dict(task="slices", shifted=("elsewhere",)), "shifted goes with shift, not with slices"),
        (dict(task="shift"), "shift needs pictures from elsewhere"),
        (dict(task="segmentation", depth_unit=0.5), "depth_unit goes with depth, dpt, not with segmentation"),
    ],
)
def test_what_cannot_be_asked_is_told(options, words, run, tmp_path):
    with pytest.raises((ValueError, OSError), match=words):
        evaluate(run, **options, out=tmp_path / "out", cache=tmp_path / "c")


def test_the_answer_of_another_network_is_not_replaced(run, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"source": "runs/other", "answers": {}}))
    with pytest.raises(FileExistsError, match="tells of runs/other: choose another folder with --out"):
        evaluate(run, out=tmp_path, cache=run.parent / "features")
    (tmp_path / "results.json").write_text(json.dumps({"source": f"{run}/"}))
    assert evaluate(run, out=tmp_path, cache=run.parent / "features")["source"] == str(run)


def test_weights_need_data(tmp_path):
    export_weights(build_vit("vit_tiny", depth=1, patch_size=8, img_size=32), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="--data"):
        evaluate(tmp_path / "w.safetensors")


def test_a_groups_file_that_lies_is_refused(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    for text, words in (("file,name\na.png,x\n", "expected columns"), ("file,group\nb.png,x\n", "not there, such as b.png")):
        (tmp_path / "groups.csv").write_text(text)
        with pytest.raises(ValueError, match=words):
            open_groups(str(tmp_path), 32, Cache(tmp_path / "c"))
    (tmp_path / "groups.csv").unlink()
    with pytest.raises(ValueError, match="no groups.csv"):
        open_groups(str(tmp_path), 32, Cache(tmp_path / "c"))
    (tmp_path / "groups.csv").write_bytes("file,group\na.png,Café\n".encode("latin-1"))
    with pytest.raises(ValueError, match="^groups.csv: expected text in UTF-8"):
        open_groups(str(tmp_path), 32, Cache(tmp_path / "c"))


def test_every_groups_file_counts_and_a_mark_at_its_begin_does_not(tmp_path):
    for folder, text in (("a", "file,group\n1.png,cup\n2.png,\n"), ("b", "\ufefffile,group\n1.png,cup\n")):
        (tmp_path / folder).mkdir()
        for name in ("1.png", "2.png"):
            Image.new("RGB", (32, 32)).save(tmp_path / folder / name)
        (tmp_path / folder / "groups.csv").write_text(text, encoding="utf-8")
    found = open_groups(str(tmp_path), 32, Cache(tmp_path / "c"))
    assert (found.pixels.files, found.groups) == (["a/1.png", "a/2.png", "b/1.png"], ["cup", "", "cup"])
    (tmp_path / "groups.csv").write_text("file,group\nb/1.png,saucer\n")
    with pytest.raises(ValueError, match="b/1.png has another group in another groups.csv"):
        open_groups(str(tmp_path), 32, Cache(tmp_path / "c"))


def test_sets_whose_folders_share_a_name_share_no_pixels(tmp_path):
    places = ["first", "second"]
    with suppress(OSError):  # a file system that takes any bytes for a name
        (tmp_path / "third \udcff").mkdir()
        places.append("third \udcff")
    for i, place in enumerate(places):
        for j, image in enumerate(draw_scenes(4, 32, i).images):
            (tmp_path / place / "set" / str(j % 2)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / place / "set" / str(j % 2) / f"{j}.png")
        open_question("labelled", str(tmp_path / place / "set"), 32, None, None, Cache(tmp_path / "c"))
    assert len(list((tmp_path / "c").glob("pixels-set-*-*"))) == len(places)


def test_depth_in_another_unit_is_asked_for_by_its_unit(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for split, n in (("train", 4), ("val", 2)):
        for kind in ("images", "depth"):
            (tmp_path / "kitti" / kind / split).mkdir(parents=True)
        for i in range(n):
            picture = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / f"kitti/images/{split}/{i}.png")
            metres = generator.uniform(5, 60, (32, 32))
            Image.fromarray((256 * metres).astype(np.uint16)).save(tmp_path / f"kitti/depth/{split}/{i}.png")
    ask = ["probe", str(run), "--task", "depth", "--data", str(tmp_path / "kitti"), "--out", str(tmp_path / "out")]
    assert main([*ask, "--depth-unit", str(1 / 256)]) == 0
    answer = json.loads((tmp_path / "out" / "results.json").read_text())["answers"]["trained"]
    assert answer["max_depth_m"] == 60 and 5 < answer["constant"]["rmse"] < 30


def test_a_network_of_few_blocks_is_read_from_those_it_has():
    vit = build_vit("vit_tiny", depth=2, width=32, heads=2, patch_size=8, img_size=16).eval()
    subject = network("two blocks", vit)
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    assert subject.whole(images)["cls_blocks"].shape == (3, 2, 32)
    assert subject.maps(images, "last4").shape == (3, 64, 2, 2)
    assert len(MASK_CLASSES) == 14
