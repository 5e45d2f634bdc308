"""Every exercise of every notebook is graded rightly: the truth passes, typical mistakes get the hint, a stub waits.

No notebook is run. Before an exercise's cell only those statements run that define what it needs, back to the imports.
"""

import ast
import dis
import inspect
import tempfile
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import pytest
from answers_later import MISTAKES, TRUTH

from minidino import pictures
from minidino.notebook import code_of

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
# These train for a minute or more: what training once led to stands in, for the truth and for both mistakes.
TRAINS = {
    "5c": (
        {"teacher_entropy": 0.00, "prototypes_used": 1.0, "rankme": 3.0},
        {"teacher_entropy": 0.00, "prototypes_used": 1.0, "rankme": 25.1},
        {"teacher_entropy": 3.19, "prototypes_used": 242.6, "rankme": 21.4},
    ),
    "7c": ({"teacher_entropy": 3.19}, {"teacher_entropy": 5.54}, {"teacher_entropy": 5.54}),
}

# ------------------------------------------------------------------------------------------- a notebook, backwards


class Exercise(NamedTuple):
    notebook: Path
    name: str
    hint: str
    stub: str  # name of the function that the learner writes
    before: list[ast.stmt]
    cell: list[ast.stmt]


def exercises_of(notebook: Path) -> list[Exercise]:
    """The exercises of a notebook, in order."""
    found, before = [], []
    for code in map(ast.parse, code_of(notebook.read_text())):
        for statement in code.body:
            if isinstance(statement, ast.Expr) and ast.unparse(statement).startswith("exercise("):
                call = statement.value
                hint = next((keyword.value.value for keyword in call.keywords if keyword.arg == "hint"), "")
                stub = next((function.name for function in code.body if is_stub(function)), "")
                found.append(Exercise(notebook, call.args[0].value, hint, stub, list(before), code.body))
        before += code.body
    return found


def is_stub(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.FunctionDef) and ast.unparse(statement.body) == "..."


def needed(before: list[ast.stmt], cell: list[ast.stmt], given: tuple[str, ...] = ()) -> list[ast.stmt]:
    """Of the statements before a cell those that define names it needs, or names that these need, and so on."""
    wanted, kept = set(), []
    for statement in reversed(before + cell):
        binds, reads = names_of(statement)
        if binds & wanted or statement in cell:
            wanted = (wanted - binds | reads) - set(given)
            kept.insert(0, statement)
    return kept


def names_of(statement: ast.stmt) -> tuple[set[str], set[str]]:
    """Names of the notebook that a statement binds, and those that it reads, in functions as well."""
    codes = [compile(ast.unparse(statement), "cell", "exec")]
    binds = {step.argval for step in dis.get_instructions(codes[0]) if step.opname == "STORE_NAME"}
    reads = set()
    for code in codes:
        reads |= {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_NAME", "LOAD_GLOBAL")}
        codes += [const for const in code.co_consts if isinstance(const, CodeType)]
    return binds, reads


def grade(task: Exercise, answer: Any = None, **given: Any) -> None:
    """Run the cell of an exercise, with an answer in place of the stub."""
    book = {"__name__": "__main__"} | given
    statements = needed(task.before, task.cell, tuple(given))
    if answer:
        wants_book = "book" in inspect.signature(answer).parameters  # it uses names of the notebook
        book[task.stub] = partial(answer, book) if wants_book else answer
        statements = [statement for statement in statements if not is_stub(statement)]
    exec(compile(ast.Module(statements, []), f"{task.notebook.stem}: {task.name}", "exec"), book)


def test_the_way_back_leads_past_what_is_not_needed():
    before = ast.parse("import os\na = 1\nb = a + 1\na = [b for b in 'xy']\nf = lambda y: a[y]\ntrain()\nc = f(0)").body

    def kept(cell, **given):
        return [ast.unparse(statement) for statement in needed(before, ast.parse(cell).body, tuple(given))]

    assert kept("g = lambda a: f(a)") == ["a = [b for b in 'xy']", "f = lambda y: a[y]", "g = lambda a: f(a)"]
    assert kept("f(b)", f=None) == ["a = 1", "b = a + 1", "f(b)"]


# ------------------------------------------------------------------------------------------------- the exercises

EXERCISES = [exercise for notebook in NOTEBOOKS for exercise in exercises_of(notebook)]
BY_NAME = pytest.mark.parametrize("task", EXERCISES, ids=lambda task: task.name)


@pytest.fixture(autouse=True)
def where_kernels_start(monkeypatch, tmp_path):
    monkeypatch.chdir(NOTEBOOKS[0].parent)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(pictures, "DPI", pictures.DPI)  # set-up cells change it


def learned(name: str, number: int) -> dict:
    """What stands in for the notebook's `learn`, where an exercise trains; the config is made as ever."""
    return {"learn": lambda config, **options: [TRAINS[name][number]]} if name in TRAINS else {}


@BY_NAME
def test_a_stub_waits(task, capsys):
    grade(task, **learned(task.name, 0))
    assert capsys.readouterr().out == f"--   {task.name}: not attempted yet\n"


@BY_NAME
def test_the_truth_passes(task, capsys):
    grade(task, TRUTH[task.name], **learned(task.name, 0))
    assert capsys.readouterr().out == f"ok   {task.name}\n"


@pytest.mark.parametrize("number", [1, 2])
@BY_NAME
def test_a_mistake_gets_the_hint(task, number, capsys):
    with pytest.raises(AssertionError) as told:
        grade(task, MISTAKES[task.name][number - 1], **learned(task.name, number))
    assert str(told.value).startswith(f"{task.name}, case ")
    assert task.hint and task.hint in str(told.value)
    assert capsys.readouterr().out == ""


def test_no_exercise_is_forgotten():
    names = [task.name for task in EXERCISES]
    assert len(names) == len(set(names)) == 3 * len(NOTEBOOKS)
    assert TRAINS.keys() < set(names) <= TRUTH.keys() == MISTAKES.keys()
    assert {len(mistakes) for mistakes in MISTAKES.values()} == {2}
