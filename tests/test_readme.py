"""What the README claims is what is stored."""

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BENCHMARKS = {
    "recipe": {"scenes", "ablations", "ladder", "photographs"},
    "copies": {"copies"},
    "growth": {"growth"},
    "curation": {"balance", "helps"},
    "attention": {"attention"},
    "prototypes": {"prototypes"},
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_tables_are_those_of_the_stored_results(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    tables = importlib.import_module(name).tables()
    assert set(tables) == BENCHMARKS[name]
    for mark, table in tables.items():
        stored = f"<!-- {mark} -->\n{table}\n<!-- /{mark} -->"
        assert stored in README, f"{mark}: run python benchmarks/{name}.py draw"


def test_every_file_of_the_map_exists_and_every_module_is_on_it():
    named = set(re.findall(r"\b(\w+\.py)\b", README))
    there = {path.name for path in (ROOT / "minidino").rglob("*.py")} - {"__init__.py"}
    assert there <= named, there - named
    assert named - there <= {"memcheck.py", *(f"{name}.py" for name in BENCHMARKS)}, named - there


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_the_trained_net_beats_every_baseline_by_three_sigma():
    knn = json.loads((ROOT / "data" / "results" / "recipe-scenes.json").read_text())["summary"]["knn"]
    trained = knn["trained"]
    assert trained["n"] == 3
    for name in ("pixels", "gray_pixels", "color_histogram", "random_vit"):
        assert trained["mean"] - knn[name]["mean"] > 0.25
    for name in set(knn) - {"trained"}:
        error = ((trained["sd"] ** 2 + knn[name]["sd"] ** 2) / 3) ** 0.5
        assert trained["mean"] - knn[name]["mean"] > 3 * error
