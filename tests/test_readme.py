"""What the README and docs/measured.md claim is what is stored."""

import importlib
import json
import re
from pathlib import Path

import pytest

from minidino.evaluate import TASKS

ROOT = Path(__file__).resolve().parents[1]
README, MEASURED = ((ROOT / name).read_text() for name in ("README.md", "docs/measured.md"))
BENCHMARKS = {
    "recipe": {"scenes", "ablations", "ladder", "photographs"},
    "copies": {"copies"},
    "growth": {"growth"},
    "curation": {"balance", "helps"},
    "attention": {"attention"},
    "prototypes": {"prototypes"},
    "probes": {"probes-scenes", "probes-photographs", "probes-decoders", "probes-finetuning"},
    "inside": {"inside", "inside-photographs"},
    "slices": {"slices"},
    "highres": {"highres"},
    "distill": {"distill"},
    "loader": {"loader"},
    "step": {"step"},
    "ablations": {"parts"},
    "compute": {"compute"},
    "batch_size": {"batch-size"},
    "margins": {"margins"},
    "plan": {"plan", "plan-measured"},
    "official_curation": {"official-curation", "official-curation-edges", "official-curation-seen"},
    "official": {"official-step", "official-switches", "official-data", "official-probes"},
    "official_protocols": {"official-protocols"},
    "official_dense": {"official-dense", "official-dense-changed"},
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_tables_are_those_of_the_stored_results(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    tables = importlib.import_module(name).tables()
    assert set(tables) == BENCHMARKS[name]
    for mark, table in tables.items():
        stored = f"<!-- {mark} -->\n{table}\n<!-- /{mark} -->"
        assert stored in README + MEASURED, f"{mark}: run python benchmarks/{name}.py draw"


def test_a_table_that_has_no_place_is_told(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    with pytest.raises(ValueError):
        importlib.import_module("recipe").put({"nowhere": ""})


def parts():
    """{anchor: text} of docs/measured.md, by its headings."""
    titles_and_texts = re.split(r"^## (.+)\n", MEASURED, flags=re.MULTILINE)[1:]
    return {title.lower().replace(" ", "-"): text for title, text in zip(titles_and_texts[::2], titles_and_texts[1::2], strict=True)}


def test_the_readme_leads_to_each_part_of_what_was_measured():
    assert set(re.findall(r"\(docs/measured.md#([\w-]+)\)", README)) == set(parts())


ANSWERS = re.findall(r"^\| \[.+\]\(docs/measured.md#([\w-]+)\) \| (.+) \|$", README, re.MULTILINE)


@pytest.mark.parametrize("anchor, answer", ANSWERS)
def test_a_short_answer_has_its_numbers_from_the_part_that_it_links(anchor, answer):
    numbers = re.compile(r"\d[\d.,]*\d|\d")
    assert set(numbers.findall(answer)) <= set(numbers.findall(parts()[anchor]))


def test_every_file_of_the_map_exists_and_every_module_is_on_it():
    named = set(re.findall(r"\b(\w+\.py)\b", README))
    there = {path.name for path in (ROOT / "minidino").rglob("*.py")} - {"__init__.py"}
    assert there <= named, there - named
    others = {"hubconf", "memcheck", "imagenette", "official_data", "official_probes", "official_clusters", "official_copies",
              "official_corruptions", "official_depth", "official_distill", *BENCHMARKS}  # fmt: skip
    assert named - there <= {f"{name}.py" for name in others}, named - there


LINKS = [(ROOT, link) for link in re.findall(r"\]\(([^)#]+)", README)] + [
    (ROOT / "docs", link) for link in re.findall(r"\]\(([^)#]+)", MEASURED)]  # fmt: skip


@pytest.mark.parametrize("folder, link", LINKS)
def test_links_lead_somewhere(folder, link):
    assert (folder / link).exists()


def test_the_trained_net_beats_every_baseline_by_three_sigma():
    knn = json.loads((ROOT / "data" / "results" / "recipe-scenes.json").read_text())["summary"]["knn"]
    trained = knn["trained"]
    assert trained["n"] == 3
    for name in ("pixels", "gray_pixels", "color_histogram", "random_vit"):
        assert trained["mean"] - knn[name]["mean"] > 0.25
    for name in set(knn) - {"trained"}:
        error = ((trained["sd"] ** 2 + knn[name]["sd"] ** 2) / 3) ** 0.5
        assert trained["mean"] - knn[name]["mean"] > 3 * error


def test_what_notebooks_claim_holds_with_other_seeds(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    margins = importlib.import_module("margins")
    found = json.loads(margins.PATH.read_text())
    assert found["seeds"] == 5
    assert set(found["notebooks"]) == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    for name, rows in found["notebooks"].items():
        cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        printed = re.findall(r"^ok   (.*)$", "".join("".join(output.get("text", "")) for output in outputs), re.MULTILINE)
        assert [row["claim"] for row in rows] == printed != [], f"run python benchmarks/margins.py run {name[:2]}"
        assert [row["claim"] for row in rows if not margins.is_safe(row)] == []


def clearly_more(some, others):
    """Of three pairs: is their mean difference above 0 by three standard errors?"""
    gains = [a - b for a, b in zip(some, others, strict=True)]
    mean = sum(gains) / 3
    return len(gains) == 3 and mean > 3 * (sum((gain - mean) ** 2 for gain in gains) / 2 / 3) ** 0.5


def test_distillation_and_the_phase_gain_what_the_readme_says():
    stored = {name: json.loads((ROOT / "data" / "results" / f"{name}-scenes.json").read_text())
              for name in ("distill", "highres")}  # fmt: skip
    for key in ("knn", "miou"):
        gain = stored["distill"]["distilled_minus_scratch"][key]
        assert gain["n"] == 3 and gain["mean"] > 3 * gain["sd"] / 3**0.5
    runs = stored["highres"]["runs"]
    for key in ("miou", "position miou"):
        assert clearly_more(*([run[key] for run in runs[name]] for name in ("adapted", "small")))
    for loss in (a["knn"] - b["knn"] for a, b in zip(runs["adapted"], runs["small"], strict=True)):
        assert loss > -0.02  # no loss of k-NN


def test_the_kernels_are_faster_where_the_readme_says_so():
    claims = json.loads((ROOT / "data" / "results" / "attention.json").read_text())["claims"]
    claims = [claim for claim in claims if claim["shape"] in ("S/16", "B/14", "L/14")]
    assert len(claims) == 6  # as launched, and on the device alone
    for claim in claims:
        assert claim["best_over_ours"] > 1.05 and claim["best_packed_over_ours"] > 1.2


def test_curation_helps_on_drawn_scenes_by_three_sigma():
    summary = json.loads((ROOT / "data" / "results" / "curation-helps.json").read_text())["pools"]["drawn"]["summary"]
    for better in ("balanced", "retrieved"):
        for probe in ("knn", "linear"):
            arms = summary[better][probe], summary["random"][probe]
            error = (sum(arm["sd"] ** 2 for arm in arms) / 3) ** 0.5
            assert arms[0]["mean"] - arms[1]["mean"] > 3 * error


def test_what_decoders_and_labels_add_is_beyond_three_sigma():
    stored = {name: json.loads((ROOT / "data" / "results" / f"probes-{name}.json").read_text())["asked"]
              for name in ("decoders", "finetuning")}  # fmt: skip
    who = "trained", "random ViT"
    trained, fresh = ([one["dpt"]["answers"][name] for one in stored["decoders"]["scenes"]] for name in who)
    for key in ("log10", "rmse"):
        assert clearly_more([x["linear"][key] for x in trained], [x[key] for x in trained])
        assert clearly_more([x[key] for x in fresh], [x[key] for x in trained])
    ours, scratch = ([one["answers"][name]["accuracy"] for one in stored["finetuning"]] for name in who)
    linear = [one["answers"]["trained"]["linear"] for one in stored["finetuning"]]
    assert clearly_more(ours, linear) and clearly_more(ours, scratch)


def test_what_is_said_of_small_batches_is_beyond_three_sigma():
    rows = json.loads((ROOT / "data" / "results" / "batch-size.json").read_text())["rows"]
    knn = {name: [run["knn"] for run in row["runs"]] for name, row in rows.items()}
    for more, less in (("16", "64"), ("32", "64"), ("64", "128"), ("64", "256"), ("256", "256-momentum"),
                       ("8", "8-momentum"), ("16-momentum", "16-queue"), ("64-parts", "64-apart")):  # fmt: skip
        assert clearly_more(knn[more], knn[less]), (more, less)
    for one, other in (("8", "64"), ("16", "16-momentum"), ("64", "64-parts"), ("32-long", "64-long")):
        assert not clearly_more(knn[one], knn[other]), (one, other)


def test_trained_patches_beat_what_else_knows_where_it_lies_by_three_sigma():
    patches = json.loads((ROOT / "data" / "results" / "probes-scenes.json").read_text())["patches"]
    ours = patches["trained + position"]
    for who in ("position", "pixels + position", "random_vit", "random_vit + position"):
        for key, sign in (("miou", 1), ("rmse", -1)):
            margin = sign * (ours[key]["mean"] - patches[who][key]["mean"])
            sigma = (ours[key]["sd"] ** 2 + patches[who][key]["sd"] ** 2) ** 0.5
            assert ours[key]["n"] == 3 and margin > 3 * sigma, (who, key)


def test_every_task_took_less_than_five_minutes_and_the_trained_net_is_first_but_for_turntables():
    for asked in json.loads((ROOT / "data" / "results" / "probes-photographs.json").read_text())["questions"]:
        scores = {who: answer[TASKS[asked["task"]].score] for who, answer in asked["answers"].items()}
        if asked["data"] == "coil-objects":
            assert scores.pop("colours") > scores["trained"]
        best = (max if TASKS[asked["task"]].up else min)(scores, key=scores.get)
        assert best.startswith("trained") and asked["seconds"] < 300, asked["task"]
