"""The classroom helpers: claims that are checked, exercises that grade themselves, source, pictures to play with, clock.

    check("the student beats guessing", accuracy > 0.2)      ->  ok   the student beats guessing
    exercise("7b", my_koleo, koleo_loss, (x,), hint="...")   ->  --   7b: not attempted yet

For teachers, `python -m minidino.notebook handed-in/*.ipynb` lists what each exercise of executed notebooks came to.
"""

import copy
import inspect
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

RTOL, ATOL = 1e-4, 1e-6  # an answer may sum in another order, in float32
NOTHING = len((lambda: None).__code__.co_code)  # how long the code of a stub is


def check(claim: str, truth: Any) -> None:
    """Print a claim that holds.

    Raises:
        AssertionError: with the claim, when it does not.
    """
    if not bool(truth):
        raise AssertionError(claim)
    print(f"ok   {claim}")


def exercise(name: str, attempt: Callable, oracle: Callable, *cases: tuple, hint: str = "") -> None:
    """Grade an answer against the package's own function.

    Args:
        name: such as "7b".
        attempt: the learner's function; a stub (its body is `...`), or what asks one, counts as not attempted.
        oracle: what is right.
        cases: tuples of arguments; each goes to both, the attempt gets a copy that it may change.
        hint: shown when the answer is wrong.
    Raises:
        AssertionError: a wrong answer, with what came, what was expected and the hint.
        ValueError: no case: everything would be right.
    """
    if not cases:
        raise ValueError(f"{name}: expected at least one tuple of arguments, got none")
    for number, case in enumerate(cases, 1):
        got, expected = attempt(*copy.deepcopy(case)), oracle(*case)
        if number == 1 and (got is Ellipsis or got is None and _waits(attempt)):
            print(f"--   {name}: not attempted yet")
            return
        if got is None or not _close(got, expected):
            told = f"\n  hint:     {hint}" if hint else ""
            told += "\n  None:     is a `return` missing?" if got is None else ""
            answers = f"  got:      {_short(got)}\n  expected: {_short(expected)}"
            raise AssertionError(f"{name}, case {number} of {len(cases)}\n{answers}{told}")
    print(f"ok   {name}")


def grades(text: str) -> dict[str, str]:
    """Read what each exercise of an executed notebook came to.

    Args:
        text: of the notebook, executed with --allow-errors, so that a wrong answer does not hide those below it.
    Returns:
        {"7a": "ok", "7b": "--" (not attempted) or "failed: " and why}, in the order of the notebook.
    """
    found = {}
    for cell in json.loads(text)["cells"]:
        if cell["cell_type"] != "code":
            continue
        outputs = cell["outputs"]
        said = "".join("".join(output.get("text", "")) for output in outputs)
        wrong = [f"{output['ename']}: {output['evalue']}".splitlines()[0] for output in outputs if "ename" in output]
        for name in re.findall(r"^exercise\(\s*[\"'](\w+)", "".join(cell["source"]), re.MULTILINE):
            mark = re.search(rf"^(ok|--)   {name}\b", said, re.MULTILINE)
            found[name] = mark[1] if mark else f"failed: {(wrong or ['it was not run'])[0]}"
    return found


def code_of(text: str) -> list[str]:
    """The code cells of a notebook as Python, without what would install minidino.

    Args:
        text: of the notebook.
    Returns:
        The source of each cell, in order.
    """
    cells = json.loads(text)["cells"]
    return ["".join(cell["source"]).replace("%pip", "pass  #") for cell in cells if cell["cell_type"] == "code"]


def show(thing: Any) -> None:
    """Print the source of a function, class or module, as it runs."""
    print(inspect.getsource(thing).rstrip())


def slide(draw: Callable, **values: Sequence) -> Any:
    """Let sliders choose the arguments of a picture, and draw it again whenever one moves.

        slide(targets, teacher_temp=(0.02, 0.04, 0.1), n_iterations=(3, 0, 1))

    Not for stored outputs: call it while you look.

    Args:
        draw: what it returns is shown.
        values: what each slider goes through, in order; it begins at the first.
    Returns:
        None with ipywidgets. Without it, which is said, what `draw` returns for the first values.
    """
    widgets = _widgets()
    if widgets is None:
        return draw(**{name: options[0] for name, options in values.items()})
    whole = {"description_width": "initial"}  # of long names, too
    sliders = {name: widgets.SelectionSlider(options=options, style=whole) for name, options in values.items()}
    widgets.interact(draw, **sliders)
    return None


def click(draw: Callable[[int, int], Any], colors: Float[np.ndarray, "rows columns 3"]) -> Any:
    """Let a mosaic be clicked, and draw for the row and column of each click, beside it.

        click(alike, thumbnail)

    Not for stored outputs: call it while you look.

    Args:
        draw: gets a row and a column; what it returns is shown. It begins in the middle.
        colors: of the mosaic's tiles, in [0, 1].
    Returns:
        What to look at: mosaic and picture, or without ipywidgets, which is said, what `draw` returns for the middle.
    """
    rows, columns = colors.shape[:2]
    widgets, middle = _widgets(), (rows // 2, columns // 2)
    if widgets is None:
        return draw(*middle)
    names = {f"row {row}, column {column}": (row, column) for row, column in np.ndindex(rows, columns)}
    place = widgets.Dropdown(options=names, value=middle)  # also for those who use no mouse
    side, tiles = {"width": "22px", "height": "22px", "margin": "0", "padding": "0"}, []
    for name, at in names.items():
        color = "#" + "".join(f"{round(255 * float(part)):02x}" for part in colors[at])
        tiles.append(widgets.Button(style={"button_color": color}, layout=side, tooltip=name))
        tiles[-1].on_click(lambda _, at=at: setattr(place, "value", at))
    layout = {"grid_template_columns": f"repeat({columns}, 22px)", "min_width": "max-content"}
    drawn = widgets.interactive(lambda place: draw(*place), {"auto_display": True}, place=place)
    return widgets.HBox([widgets.GridBox(tiles, layout=layout), drawn])


def _widgets() -> Any:
    """The module ipywidgets, or None where it is not installed, which is said."""
    try:
        import ipywidgets
    except ImportError:
        print("knobs and tiles need ipywidgets: run %pip install 'minidino[interactive]' in a cell, then reload the page")
        return None
    return ipywidgets


def budget(minutes: float) -> Callable[[], None]:
    """Say how long a notebook takes, and start the clock.

    Returns:
        To be called at the end: says how long it took.
    """
    begun, planned = time.perf_counter(), f"planned: {minutes:g} minute{'s' * (minutes != 1)}"
    print(f"{planned} on two CPU cores")

    def spent() -> None:
        print(f"{planned}; measured: {(time.perf_counter() - begun) / 60:.1f} minutes")

    return spent


def _waits(attempt: Any) -> bool:
    """A function that does nothing yet, or that calls one."""
    code = getattr(attempt, "__code__", None)
    called = [getattr(attempt.__globals__.get(name), "__code__", None) for name in code.co_names] if code else []
    return any(each is not None and len(each.co_code) <= NOTHING for each in [code, *called])


def _close(got: Any, expected: Any) -> bool:
    """The same shape and the same numbers but for rounding; integers, words and the like must be equal."""
    if isinstance(expected, (tuple, list)) and isinstance(got, (tuple, list)):
        return len(got) == len(expected) and all(map(_close, got, expected))
    try:
        a, b = _numbers(got), _numbers(expected)
    except (TypeError, ValueError):
        return (got == expected) is True
    if b.dtype.kind in "biu":
        return np.array_equal(a, b)
    return a.shape == b.shape and np.allclose(a, b, RTOL, ATOL, equal_nan=True)


def _numbers(value: Any) -> np.ndarray:
    """Tensors, arrays, plain numbers and lists of them as an array: integers as they are, others as float64.

    Raises:
        TypeError, ValueError: words, complex numbers, rows of several lengths, and what else is no number.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()  # numpy has no bfloat16
    elif isinstance(value, (tuple, list)):
        value = [_numbers(each) for each in value]
    array = np.asarray(value)
    if array.dtype.kind in "USc":
        raise TypeError(f"expected real numbers, got {array.dtype}")
    return array if array.dtype.kind in "biu" else array.astype(np.float64)


def _short(value: Any) -> str:
    shape = f"shape {tuple(value.shape)}: " if getattr(value, "shape", ()) else ""
    words = " ".join(str(value).split())
    return shape + (words if len(words) <= 300 else words[:297] + "...")


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        print(path.name, *(f"  {name}  {mark}" for name, mark in grades(path.read_text()).items()), sep="\n")
