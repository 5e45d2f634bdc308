"""What a notebook claims is measured with other seeds, stored notebook by notebook, and never mixed up."""

import ast
import importlib
import json
import math
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GOOD = """import numpy as np
from minidino.notebook import check
x = np.random.default_rng(0).normal(size=100).mean()
check("near zero", abs(x) < 2.0)
check("between", -3 < x <= 3)"""


@pytest.fixture
def margins(monkeypatch, tmp_path):
    """benchmarks/margins.py, with a folder of notebooks and a place for results of its own."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    found = importlib.import_module("margins")
    monkeypatch.setattr(found, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(found, "PATH", tmp_path / "margins.json")
    monkeypatch.setattr(importlib.import_module("recipe"), "RESULTS", tmp_path)
    return found


def write(folder, name, source):
    (folder / f"{name}.ipynb").write_text(json.dumps({"cells": [{"cell_type": "code", "source": [source]}]}))


def quickly(path, seed):
    """What a process of its own would say of a notebook."""
    return [{"claim": "c", "holds": True, "margins": [10.0 + seed]}]


def moved(margins, source, by=1000):
    return ast.unparse(ast.fix_missing_locations(margins.Moved(by).visit(ast.parse(source))))


@pytest.mark.parametrize("before, after", [
    ("default_rng(7)", "default_rng(7 + 1000)"), ("torch.manual_seed(0)", "torch.manual_seed(0 + 1000)"),
    ("f(1, seed=3)", "f(1, seed=3 + 1000)"), ("SEED = 0", "SEED = 0\nSEED += 1000"), ("f(n=3)", "f(n=3)"),
    ("f('run.seed=7', 'data.scene_seed=1', 'x=7')", "f('run.seed=1007', 'data.scene_seed=1001', 'x=7')"),
    ("a < b", "a < b"), ("check('a', a < b)", "check('a', _compare(['lt'], a, b))"),
    ("check('a', a == b)", "check('a', a == b)"), ("check('a', x < y <= z)", "check('a', _compare(['lt', 'le'], x, y, z))"),
])  # fmt: skip
def test_seeds_move_and_checks_tell_by_how_much(before, after, margins):
    assert moved(margins, before) == after


def test_a_claim_is_safe_three_standard_deviations_from_not_holding(margins):
    def said(margin, holds=True):
        return [{"claim": "c", "holds": holds, "margins": [margin, 1.0]}]

    (row,) = margins.summary([said(2.0), said(4.0)])
    assert row["sigmas"] == pytest.approx(3 / 2**0.5) and not margins.is_safe(row)
    assert margins.is_safe(margins.summary([said(2.9), said(3.1)])[0])
    assert not margins.is_safe(margins.summary([said(2.9), said(3.1, holds=False)])[0])
    (row,) = margins.summary([said(2.0), said(2.0)])
    assert "sigmas" not in row and margins.is_safe(row)  # nothing is by chance


def test_a_notebook_that_fails_costs_no_other_its_rows_and_says_why(margins, tmp_path):
    write(tmp_path, "01_good", GOOD)
    write(tmp_path, "02_bad", "1 / 0")
    write(tmp_path, "03_good", GOOD)
    wrong = margins.run([], 2)
    assert wrong == ["02_bad.ipynb failed with seed 0: ZeroDivisionError: division by zero"]
    found = json.loads(margins.PATH.read_text())
    assert set(found["notebooks"]) == set(found["made"]) == {"01_good", "03_good"} and found["seeds"] == 2
    near, between = found["notebooks"]["01_good"]
    assert near["holds"] == [True] * 2 and near["margins"][0] != near["margins"][1]
    assert [len(each) for each in between["margins"]] == [2] * 2 and near["sigmas"] > 3
    write(tmp_path, "01_good", "raise SystemExit('no')")
    assert margins.run(["01"], 3) and json.loads(margins.PATH.read_text()) == found


def test_what_is_said_of_all_notebooks_is_true_of_each(margins, tmp_path, monkeypatch):
    monkeypatch.setattr(margins, "one", quickly)
    write(tmp_path, "01_one", GOOD)
    write(tmp_path, "02_two", GOOD)
    margins.run([], 3)
    assert "\n3 seeds. " in margins.tables()["margins"]
    stored = json.loads(margins.PATH.read_text())
    stored["made"]["01_one"]["commit"] = "aaaaaaa"
    margins.PATH.write_text(json.dumps(stored))
    margins.run(["02"], 2)
    found, told = json.loads(margins.PATH.read_text()), margins.tables()["margins"]
    assert found["seeds"] == 2 and found["made"]["01_one"]["commit"] == "aaaaaaa" and "\n2 to 3 seeds. " in told
    assert told.count("commit ") == 2 and "commit aaaaaaa." in told


def test_what_a_run_stores_does_not_make_its_own_commit_another(margins, tmp_path, monkeypatch):
    known = margins.environment
    monkeypatch.setattr(margins, "one", quickly)
    monkeypatch.setattr(margins, "environment", lambda *of: known(*of) | {"commit": f"a{'-dirty' * margins.PATH.exists()}"})
    write(tmp_path, "01_one", GOOD)
    write(tmp_path, "02_two", GOOD)
    margins.run([], 2)
    assert {made["commit"] for made in json.loads(margins.PATH.read_text())["made"].values()} == {"a"}


def test_the_first_form_of_the_result_is_read_and_only_what_is_known_of_it_is_kept(margins, tmp_path, monkeypatch):
    monkeypatch.setattr(margins, "one", quickly)
    for name in ("01_one", "02_two"):
        write(tmp_path, name, GOOD)
    margins.run([], 2)
    stored = json.loads(margins.PATH.read_text())
    made = stored.pop("made")["01_one"] | {"commit": "aaaaaaa", "command": ["margins.py", "run", "02"]}
    margins.PATH.write_text(json.dumps(stored | {"environment": made}))
    assert "\n2 seeds. " in margins.tables()["margins"] and "commit aaaaaaa." in margins.tables()["margins"]
    write(tmp_path, "03_three", GOOD)
    margins.run(["03"], 2)
    found = json.loads(margins.PATH.read_text())
    assert list(found["made"]) == ["02_two", "03_three"] and found["made"]["02_two"]["commit"] == "aaaaaaa"
    assert list(found["notebooks"]) == ["01_one", "02_two", "03_three"]
    assert "Of 1 notebooks the commit was not kept." in margins.tables()["margins"]


@pytest.mark.parametrize("words, told", [
    (["run", "--seeds", "1"], "expected at least 2, since a spread"), (["run", "99"], "expected some of 01; got 99"),
    (["one", "nothing.ipynb"], "the name of one notebook's file"),
])  # fmt: skip
def test_what_cannot_be_run_is_refused(words, told, margins, tmp_path, monkeypatch, capsys):
    write(tmp_path, "01_one", GOOD)
    monkeypatch.setattr("sys.argv", ["margins.py", *words])
    with pytest.raises(SystemExit) as ended:
        margins.main()
    assert ended.value.code == 2 and told in capsys.readouterr().err and not margins.PATH.exists()


def test_single_numbers_have_a_margin_and_the_rest_only_holds(margins):
    claims = margins.Claims()
    claims.check("a", claims.compare(["lt", "le"], 1, 2.5, 4))
    claims.check("b", claims.compare(["gt"], "b", "a"))
    claims.check("c", claims.compare(["ge"], 1.0, math.inf))
    assert [(row["holds"], row["margins"]) for row in claims.said] == [(True, [1.5, 1.5]), (True, []), (False, [-math.inf])]
