"""What the README claims is what is stored."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def recipe():
    spec = importlib.util.spec_from_file_location("recipe", ROOT / "benchmarks" / "recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_stored_results():
    tables = recipe().tables()
    assert set(tables) == {"scenes", "ablations", "ladder", "photographs"}
    for name, table in tables.items():
        stored = f"<!-- {name} -->\n{table}\n<!-- /{name} -->"
        assert stored in README, f"{name}: run python benchmarks/recipe.py draw"


def test_every_file_of_the_map_exists_and_every_module_is_on_it():
    named = set(re.findall(r"\b(\w+\.py)\b", README))
    there = {path.name for path in (ROOT / "minidino").rglob("*.py")} - {"__init__.py"}
    assert there <= named, there - named
    assert named - there <= {"recipe.py"}, named - there


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
