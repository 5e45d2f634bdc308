"""The grader grades rightly, and every notebook has its form: it was run, it is small, it says what it must."""

import json
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minidino.learning.losses import dino_loss, koleo_loss
from minidino.notebook import budget, check, click, code_of, exercise, show, slide

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
FIRST = ("**Question.**", "**Needs.**", "**Time.**")
LAST = ["The final picture", "Exercises", "What we saw", "What this does not show", "Where to go next"]
MOST_WORDS, MOST_LINES, MOST_SETUP_LINES, MOST_PICTURES, MOST_KB = 120, 15, 8, 6, 600
WIDEST = 128  # characters of a printed line, as in code
INSTALL = """try:
    import minidino
except ImportError:  # a machine without it, such as Colab: it is installed from the folder above
    %pip install --quiet .."""
ABSOLUTE = re.compile(r"(?<![\w.:/])/(?:work|home|root|tmp|var|opt|usr|Users)/|[A-Z]:\\\\")

# ------------------------------------------------------------------------------------------------ the helpers


def test_a_claim_is_printed_or_raised(capsys):
    check("water is wet", torch.tensor(True))
    assert capsys.readouterr().out == "ok   water is wet\n"
    with pytest.raises(AssertionError, match="^the moon is cheese$"):
        check("the moon is cheese", np.float64(0.1) > 0.2)
    assert capsys.readouterr().out == ""


def stub(x): ...


def right_koleo(x):
    x = torch.nn.functional.normalize(x, dim=1)
    return -torch.cdist(x, x).fill_diagonal_(torch.inf).min(dim=1).values.log().mean()


def koleo_that_sees_itself(x):
    x = torch.nn.functional.normalize(x, dim=1)
    return -(torch.cdist(x, x).min(dim=1).values + 1e-8).log().mean()


def koleo_that_forgets_the_length(x):
    return -torch.cdist(x, x).fill_diagonal_(torch.inf).min(dim=1).values.log().mean()


CASES = ((torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),), (torch.eye(4),))


@pytest.mark.parametrize("untouched", [stub, lambda x: ...])
def test_a_stub_is_not_attempted(untouched, capsys):
    exercise("6a", untouched, koleo_loss, *CASES)
    assert capsys.readouterr().out == "--   6a: not attempted yet\n"


def test_an_answer_that_is_not_returned_is_an_attempt(capsys):
    def prints(n):
        print(n)

    def asks_it():
        return prints(3)

    def asks_a_stub():
        return stub(3) and 3

    for attempt, case in ((prints, (3,)), (asks_it, ())):
        with pytest.raises(AssertionError, match="got:      None\n.*\n.*hint: .*\n.*is a `return` missing?"):
            exercise("0a", attempt, lambda *case: 3, case, hint="count them")
    assert capsys.readouterr().out == "3\n3\n"
    exercise("0c", asks_a_stub, lambda: 3, ())
    assert capsys.readouterr().out == "--   0c: not attempted yet\n"


def test_the_truth_is_right(capsys):
    exercise("6a", right_koleo, koleo_loss, *CASES)
    exercise("6b", koleo_loss, koleo_loss, *CASES)
    assert capsys.readouterr().out == "ok   6a\nok   6b\n"


@pytest.mark.parametrize("wrong", [koleo_that_sees_itself, koleo_that_forgets_the_length])
def test_typical_mistakes_are_noticed(wrong, capsys):
    with pytest.raises(AssertionError) as told:
        exercise("6a", wrong, koleo_loss, *CASES, hint="nobody is his own neighbour")
    got, expected = str(wrong(*CASES[0])), str(koleo_loss(*CASES[0]))
    for words in ("6a, case 1 of 2", f"got:      {got}", f"expected: {expected}", "nobody is his own neighbour"):
        assert words in str(told.value)
    assert capsys.readouterr().out == ""


def test_a_mistake_in_a_later_case_is_noticed():
    with pytest.raises(AssertionError, match="case 2 of 2"):
        exercise("1a", lambda n: n, lambda n: abs(n), (1,), (-1,))
    with pytest.raises(AssertionError, match="case 2 of 2"):  # an answer to the first case is an attempt
        exercise("1a", lambda n: n or None, lambda n: n, (1,), (0,))


@pytest.mark.parametrize(
    "got, expected, good",
    [
        (np.float32(0.3), 0.3, True),
        (torch.ones(2, requires_grad=True), [1.0, 1.0], True),
        ([torch.ones(2, requires_grad=True)] * 2, torch.ones(2, 2), True),
        (torch.ones(2, dtype=torch.bfloat16), torch.ones(2), True),
        (torch.ones(2, dtype=torch.bfloat16), torch.zeros(2), False),
        ((1, torch.tensor(2.0)), (1.0, 2), True),
        ("mask", "mask", True),
        (True, True, True),
        (torch.tensor(0.0), torch.tensor(1e-3), False),
        (torch.ones(1, 2), torch.ones(2), False),
        (float("nan"), 1.0, False),
        ((1, 2), (1, 2, 3), False),
        (86_580_480.0, 86_580_480, True),
        (86_580_481, 86_580_480, False),
        (torch.tensor([2**60 + 1]), [2**60], False),
        (torch.tensor([3.0001]), torch.tensor([3]), False),
        ("hole", "mask", False),
        ("1", 1, False),
        (["1", "2"], [1, 2], False),
        (np.array(["a", "b"]), np.ones(2), False),
        (0.5 + 1j, 0.5, False),
    ],
)
def test_close_means_shape_and_numbers(got, expected, good, capsys):
    if good:
        exercise("1b", lambda: got, lambda: expected, ())
        assert capsys.readouterr().out == "ok   1b\n"
    else:
        with pytest.raises(AssertionError, match="got"):
            exercise("1b", lambda: got, lambda: expected, ())


def test_an_attempt_cannot_spoil_the_case(capsys):
    exercise("1c", lambda x: x.mul_(2), lambda x: 2 * x, (torch.ones(3),))
    assert capsys.readouterr().out == "ok   1c\n"


def test_an_exercise_needs_a_case():
    with pytest.raises(ValueError, match="at least one"):
        exercise("1d", stub, stub)


def test_show_prints_the_source(capsys):
    show(dino_loss)
    text = capsys.readouterr().out
    assert "def dino_loss(" in text and "log_softmax" in text and "def ibot_loss(" not in text


def test_without_widgets_the_first_values_are_drawn(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert slide(lambda temp, n: (temp, n), temp=(0.1, 0.2), n=(3, 0)) == (0.1, 3)
    said = capsys.readouterr().out
    assert "%pip install 'minidino[interactive]'" in said and "reload the page" in said  # JupyterLab shows text till then


def test_sliders_choose_among_the_values(monkeypatch, capsys):
    drawn, slider = [], lambda options, style: list(options)  # it can stand on any of them
    widgets = SimpleNamespace(SelectionSlider=slider, interact=lambda f, **sliders: f(*(s[-1] for s in sliders.values())))
    monkeypatch.setitem(sys.modules, "ipywidgets", widgets)
    assert slide(lambda *chosen: drawn.append(chosen), temp=(0.1, 0.2), n=(3, 0)) is None
    assert drawn == [(0.2, 0)] and capsys.readouterr().out == ""


def test_a_true_slider_draws_again(monkeypatch):
    widgets, made, drawn = pytest.importorskip("ipywidgets", reason="needs the extra: interactive"), [], []
    true = widgets.SelectionSlider
    monkeypatch.setattr(widgets, "SelectionSlider", lambda **options: made.append(true(**options)) or made[-1])
    slide(lambda temp, n: drawn.append((temp, n)), temp=(0.1, 0.05, 0.2), n=(3, 0))
    made[0].value = 0.2
    assert [slider.description for slider in made] == ["temp", "n"] and drawn == [(0.1, 3), (0.2, 3)]
    assert {slider.style.description_width for slider in made} == {"initial"}  # long names are not cut off


def test_the_code_of_a_notebook_is_python_that_installs_nothing():
    book = good_book()
    code = code_of(json.dumps(book))
    assert len(code) == sum(cell["cell_type"] == "code" for cell in book["cells"]) and code[1] == "x = 1"
    exec(compile(code[0], "header", "exec"), space := {})
    assert space["minidino"].__name__ == "minidino"


@pytest.mark.parametrize("name, cells", [("02_attention", (1, 12)), ("12_kernels", (1, 2, 3, 5, 6))])
def test_without_triton_a_notebook_says_so(name, cells, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the notebooks set it, and here it is taken back
    monkeypatch.setitem(sys.modules, "triton", None)
    code, space = code_of((NOTEBOOKS[0].parent / f"{name}.ipynb").read_text()), {}
    for cell in cells:
        exec(code[cell], space)
    said = capsys.readouterr().out
    assert "no Triton here" in said and "three" not in said


def test_without_widgets_the_middle_is_drawn(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert click(lambda row, column: (row, column), np.zeros((5, 8, 3))) == (2, 4)
    said = capsys.readouterr().out
    assert "%pip install 'minidino[interactive]'" in said and "reload the page" in said


def test_a_true_mosaic_draws_what_was_clicked(monkeypatch):
    widgets, tiles, drawn = pytest.importorskip("ipywidgets", reason="needs the extra: interactive"), [], []
    true = widgets.Button
    monkeypatch.setattr(widgets, "Button", lambda **options: tiles.append(true(**options)) or tiles[-1])
    colors = np.zeros((2, 3, 3))
    colors[1, 0] = 1, 0.5, 0
    shown = click(lambda row, column: drawn.append((row, column)), colors)
    assert len(shown.children) == 2
    assert [tile.style.button_color for tile in tiles] == ["#000000"] * 3 + ["#ff8000"] + ["#000000"] * 2
    tiles[3].click()
    tiles[2].click()
    assert drawn == [(1, 1), (1, 0), (0, 2)]


def test_the_clock_is_read_at_the_end(capsys):
    spent = budget(2.5)
    spent()
    out = "planned: 2.5 minutes on two CPU cores\nplanned: 2.5 minutes; measured: 0.0 minutes\n"
    assert capsys.readouterr().out == out
    budget(1)
    assert capsys.readouterr().out == "planned: 1 minute on two CPU cores\n"


# ------------------------------------------------------------------------------------------------ the notebooks


def faults(text: str) -> list[str]:
    """Every rule of form that a notebook breaks, in words."""
    book = json.loads(text)
    prose = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "markdown"]
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    found = [f"{len(text) // 1000} kB"] if len(text) > 1000 * MOST_KB else []
    found += _faults_of_prose(prose) + [fault for cell in code for fault in _faults_of_code(cell)]
    outputs = [output for cell in code for output in cell["outputs"]]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    if not 1 <= pictures <= MOST_PICTURES:
        found.append(f"{pictures} pictures")
    n_exercises = sum(len(re.findall(r"^exercise\(", "".join(cell["source"]), re.MULTILINE)) for cell in code)
    if n_exercises != 3:
        found.append(f"{n_exercises} exercises")
    header, setup = [*("".join(cell["source"]) for cell in code), "", ""][:2]
    if header != INSTALL:
        found.append("does not begin with the install header")
    if len(setup.splitlines()) > MOST_SETUP_LINES:
        found.append("a long set-up")
    return found + [f"imported in vain: {name}" for name in _imported_in_vain("\n".join(code_of(text)[1:]))]


def _imported_in_vain(code: str) -> list[str]:
    """Names that code imports and never mentions again."""
    lines = re.findall(r"^ *(?:from [\w.]+ )?import ([\w., ]+)", code, re.MULTILINE)
    names = [name.split()[-1].split(".")[0] for line in lines for name in line.split(",")]
    return [name for name in names if len(re.findall(rf"\b{name}\b", code)) < 2]


def _faults_of_prose(prose: list[str]) -> list[str]:
    found = [f"long prose: {text[:40]}" for text in prose if len(text.split()) > MOST_WORDS]
    if not prose or not prose[0].startswith("# ") or any(part not in prose[0] for part in FIRST):
        found.append("no title, question, needs or time")
    headings = re.findall(r"^## (.*)$", "\n".join(prose), re.MULTILINE)
    if headings[:1] != ["Set-up"] or headings[-len(LAST) :] != LAST or len(headings) < len(LAST) + 3:
        found.append(f"parts: {headings}")
    saw = next((text for text in prose if text.startswith("## What we saw")), "")
    if len(re.findall(r"^\d\. ", saw, re.MULTILINE)) != 3:
        found.append("what we saw is not three sentences")
    return found


def _faults_of_code(cell: dict) -> list[str]:
    source = "".join(cell["source"])
    start = source[:40]
    found = [] if cell["execution_count"] else [f"not run: {start}"]
    if len(source.splitlines()) > MOST_LINES:
        found.append(f"long code: {start}")
    if "pip install" in source and source != INSTALL:
        found.append(f"installs: {start}")
    kinds = {output["output_type"] for output in cell["outputs"]}
    if "error" in kinds:
        found.append(f"failed: {start}")
    if any(output.get("name") == "stderr" for output in cell["outputs"]):
        found.append(f"stderr: {start}")
    lines = [line for output in cell["outputs"] for line in "".join(output.get("text", "")).splitlines()]
    found += [f"wide: {line[:40]}" for line in lines if len(line) > WIDEST]
    said = [{k: v for k, v in output.get("data", {}).items() if k != "image/png"} for output in cell["outputs"]]
    if ABSOLUTE.search(source + json.dumps(said) + "".join("".join(o.get("text", "")) for o in cell["outputs"])):
        found.append(f"absolute path: {start}")
    if any("widget" in key or "svg" in key for data in said for key in data):
        found.append(f"widget or SVG: {start}")
    if not set(cell["metadata"].get("tags", [])) <= {"nbval-ignore-output"}:
        found.append(f"tags: {start}")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_its_form(path):
    assert faults(path.read_text()) == []


def good_book() -> dict:
    def words(text):
        return {"cell_type": "markdown", "source": [text]}

    def code(source, **output):
        return {"cell_type": "code", "source": [source], "execution_count": 1, "metadata": {}, "outputs": [output]}

    picture = {"output_type": "display_data", "data": {"image/png": "AA/home/B"}}
    cells = [words("# T\n" + " ".join(FIRST)), words("## Set-up"), code(INSTALL, output_type="stream", text=[])]
    cells += [code("x = 1", output_type="stream", text=["1"])]
    cells += [words("## 1. Step"), code("draw()", **picture), words("## 2. Step")]
    cells += [words(f"## {name}" + "\n1. a\n2. b\n3. c" * (name == "What we saw")) for name in LAST]
    cells += [code("exercise('1a')", output_type="stream", text=["ok"]) for _ in range(3)]
    return {"cells": cells}


def spoil(index: int, **change):
    def do(book):
        book["cells"][index].update(change)

    return do


@pytest.mark.parametrize(
    "change, words",
    [
        (spoil(2, source=["import torch"]), "install header"),
        (spoil(3, execution_count=None), "not run"),
        (spoil(3, source=["x\n"] * 9), "a long set-up"),
        (spoil(5, source=["x\n"] * 16), "long code"),
        (spoil(5, source=["!pip install this"]), "installs"),
        (spoil(3, outputs=[{"output_type": "stream", "name": "stderr", "text": ["50%"]}]), "stderr"),
        (spoil(3, outputs=[{"output_type": "stream", "text": ["saved in /", "home/me"]}]), "absolute path"),
        (spoil(3, outputs=[{"output_type": "error", "ename": "ValueError"}]), "failed"),
        (spoil(3, outputs=[{"output_type": "display_data", "data": {"image/svg+xml": "<svg/>"}}]), "SVG"),
        (spoil(3, outputs=[{"output_type": "stream", "text": ["-" * 129]}]), "wide"),
        (spoil(3, source=["from math import pi, tau\npi"]), "imported in vain: tau"),
        (spoil(3, metadata={"tags": ["skip"]}), "tags"),
        (spoil(5, outputs=[]), "0 pictures"),
        (spoil(5, outputs=[{"output_type": "display_data", "data": {"image/png": "A"}}] * 7), "7 pictures"),
        (spoil(0, source=["# T"]), "no title"),
        (spoil(4, source=["word " * 121]), "long prose"),
        (spoil(8, source=["## Something else"]), "parts"),
        (spoil(9, source=["## What we saw\n1. a"]), "not three sentences"),
        (spoil(-1, source=["exercise_nothing()"]), "2 exercises"),
        (spoil(-1, more="x" * 600_000), " kB"),
    ],
)
def test_a_broken_form_is_noticed(change, words):
    book = good_book()
    assert faults(json.dumps(book)) == []
    change(book)
    assert any(words in fault for fault in faults(json.dumps(book)))
