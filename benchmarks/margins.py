"""How safe is what the notebooks claim? Each is run with five seeds, and every check says by how much it holds.

    python benchmarks/margins.py run [--seeds 5] [NUMBER ...]     data/results/margins.json; the others keep their rows
    python benchmarks/margins.py draw                             the table of the stored result

A notebook's code runs as it stands but for its seeds, which all move by the same amount: `SEED = 0`, `manual_seed(0)`,
`default_rng(0)`, `seed=7`, "run.seed=7", and those of a preset. In `check("more than a tenth", gain > 0.10)` the margin
is gain - 0.10. A claim is safe when the mean margin of each of its comparisons is at least three times the standard
deviation over the seeds. Claims without a comparison of single numbers (tensors that are equal, bounds that hold by
construction) only have to hold.

Every notebook keeps the machine and the commit of its own runs, and is stored when it is done. One that fails is told, and
keeps the rows that it had.
"""

import argparse
import ast
import contextlib
import io
import json
import math
import operator
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from recipe import RESULTS, ROOT, made_on, put, spread, store
from tqdm import tqdm

from minidino import config as configs
from minidino import notebook
from minidino.runs import environment, pick_device

NOTEBOOKS, PATH = ROOT / "notebooks", RESULTS / "margins.json"
SAFE = 3  # standard deviations
APART = 1000  # between the seeds of two runs, more than a notebook uses
SEED_TEXT = re.compile(r"^((?:run|data)\.(?:scene_)?seed=)(\d+)$")
ORDER = {ast.Lt: "lt", ast.LtE: "le", ast.Gt: "gt", ast.GtE: "ge"}  # names in `operator`


class Moved(ast.NodeTransformer):
    """The same code with all its seeds moved, and with checks whose comparisons tell by how much they hold."""

    def __init__(self, by: int):
        self.by, self.checked = by, False

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        if isinstance(node.value, str):
            return ast.Constant(SEED_TEXT.sub(lambda m: f"{m[1]}{int(m[2]) + self.by}", node.value))
        return node

    def visit_Assign(self, node: ast.Assign) -> list[ast.stmt]:
        node = self.generic_visit(node)
        sets = any(isinstance(name, ast.Name) and name.id == "SEED" for name in ast.walk(node.targets[0]))
        return [node, *ast.parse(f"SEED += {self.by}" if sets else "").body]

    def visit_keyword(self, node: ast.keyword) -> ast.keyword:
        node = self.generic_visit(node)
        if node.arg == "seed" and isinstance(node.value, ast.Constant):
            node.value = _plus(node.value, self.by)
        return node

    def visit_Call(self, node: ast.Call) -> ast.Call:
        name = ast.unparse(node.func).rpartition(".")[2]
        outside, self.checked = self.checked, self.checked or name == "check"
        node = self.generic_visit(node)
        self.checked = outside
        if name in ("manual_seed", "default_rng") and isinstance(node.args[0], ast.Constant):
            node.args[0] = _plus(node.args[0], self.by)
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        node = self.generic_visit(node)
        if not self.checked or not all(type(op) in ORDER for op in node.ops):
            return node
        names = ast.List([ast.Constant(ORDER[type(op)]) for op in node.ops], ast.Load())
        return ast.Call(ast.Name("_compare", ast.Load()), [names, node.left, *node.comparators], [])


def _plus(node: ast.expr, by: int) -> ast.expr:
    return ast.BinOp(node, ast.Add(), ast.Constant(by))


class Claims:
    """What the checks of one run said: words, truth, the margin of each comparison."""

    def __init__(self):
        self.said: list[dict[str, Any]] = []
        self.margins: list[float] = []

    def compare(self, names: list[str], *values: Any) -> Any:
        """Do what the comparisons would, and note by how much each holds that is about single numbers."""
        truths = [getattr(operator, name)(*pair) for name, pair in zip(names, pairwise(values), strict=True)]
        for name, (left, right) in zip(names, pairwise(values), strict=True):
            with contextlib.suppress(TypeError, ValueError, RuntimeError):  # words, lists, more than one number
                self.margins.append(float(right - left if name in ("lt", "le") else left - right))
        return truths[0] if len(truths) == 1 else all(truths)

    def check(self, claim: str, truth: Any) -> None:
        self.said.append({"claim": claim, "holds": bool(truth), "margins": self.margins})
        self.margins = []


def claims_of(path: Path, seed: int) -> list[dict[str, Any]]:
    """Run a notebook with its seeds moved by `seed` steps, in its folder; every check is noted, none stops.

    For a process of its own: presets and checks are other ones afterwards.
    """
    claims, move, known = Claims(), Moved(seed * APART), configs.preset

    def reseeded(name: str) -> configs.RunConfig:
        config = known(name)
        moved = [f"run.seed={config.run.seed + seed * APART}", f"data.scene_seed={config.data.scene_seed + seed * APART}"]
        return configs.override(config, moved)

    configs.preset, notebook.check = reseeded, claims.check
    space, code = {"__name__": "__main__", "_compare": claims.compare}, notebook.code_of(path.read_text())
    os.chdir(path.parent)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for source in code:
            tree = ast.fix_missing_locations(move.visit(ast.parse(source)))
            exec(compile(tree, path.name, "exec"), space)
    return claims.said


def summary(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The claims of a notebook over its runs: does each always hold, and how far from not holding is it?"""
    rows = []
    for said in zip(*runs, strict=True):
        row = {"claim": said[0]["claim"], "holds": [each["holds"] for each in said]}
        found = [each["margins"] for each in said]
        if len({len(margins) for margins in found}) > 1:  # `any` and `all` look no further than they must
            found = [[min(margins, default=0.0)] for margins in found]
        by_chance = [spread(margins) for margins in zip(*found, strict=True) if len(set(margins)) > 1]
        if by_chance:
            row |= {"margins": found, "sigmas": min(margin["mean"] / margin["sd"] for margin in by_chance)}
        rows.append(row)
    return rows


def is_safe(row: dict[str, Any]) -> bool:
    return all(row["holds"]) and row.get("sigmas", math.inf) >= SAFE


def one(path: Path, seed: int) -> list[dict[str, Any]]:
    """`claims_of` in a process of its own. Raises RuntimeError with the last words of a notebook that fails."""
    command = [sys.executable, __file__, "one", str(path), "--seeds", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{path.name} failed with seed {seed}: {(done.stderr.splitlines() or ['no words'])[-1]}")
    return json.loads(done.stdout)


def run(numbers: list[str], seeds: int) -> list[str]:
    """Run notebooks and store each. Returns what went wrong, in words."""
    found = json.loads(PATH.read_text()) if PATH.exists() else {"notebooks": {}, "made": {}}
    rows, made, wrong = found["notebooks"], made_of(found), []
    here = environment(0, pick_device())  # before what is stored makes the tree another than the commit
    paths = [path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if not numbers or path.name[:2] in numbers]
    for path in tqdm(paths, unit="notebook"):
        try:
            rows[path.stem] = summary([one(path, seed) for seed in range(seeds)])
        except (RuntimeError, ValueError) as error:  # ValueError: another number of checks with another seed
            wrong.append(str(error))
            tqdm.write(wrong[-1])
            continue
        made[path.stem] = here
        for row in rows[path.stem]:
            if not is_safe(row):
                tqdm.write(f"{path.stem}: {row}")
        store(PATH.stem, {"seeds": min(seeds_of(rows), default=seeds), "made": dict(sorted(made.items())),
                          "notebooks": dict(sorted(rows.items()))})  # fmt: skip
    return wrong


def seeds_of(rows: dict[str, list[dict[str, Any]]]) -> list[int]:
    """With how many seeds notebooks were run, from few to many; each number once."""
    return sorted({len(row["holds"]) for claims in rows.values() for row in claims})


def made_of(found: dict[str, Any]) -> dict[str, Any]:
    """{notebook: what its rows depend on}; a result of the first form knows it of the notebooks of its last run alone."""
    if "made" in found:
        return found["made"]
    numbers = [word for word in found["environment"]["command"] if re.fullmatch(r"\d\d", word)]
    return {name: found["environment"] for name in found["notebooks"] if not numbers or name[:2] in numbers}


# ---------------------------------------------------------------- the tables


def tables() -> dict[str, str]:
    found = json.loads(PATH.read_text())
    lines = ["| notebook | claims | of them with chance | the closest, in standard deviations |", "|---|---|---|---|"]
    for name, rows in found["notebooks"].items():
        sigmas = [row["sigmas"] for row in rows if "sigmas" in row]
        lines.append(f"| {name} | {len(rows)} | {len(sigmas)} | {format(min(sigmas), '.1f') if sigmas else ''} |")
    many, made = seeds_of(found["notebooks"]), made_of(found)
    seeds = f"{many[0]} to {many[-1]}" if len(many) > 1 else many[0]
    where = dict.fromkeys(made_on({"environment": each}) for each in made.values())
    lost = len(found["notebooks"]) - len(made) if "made" in found else 0
    lines += ["", f"{seeds} seeds. {' '.join(where)}" + f" Of {lost} notebooks the commit was not kept." * (lost > 0)]
    return {"margins": "\n".join(lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "one", "draw"), help="one: the claims of one file with one seed, as JSON")
    parser.add_argument("notebooks", nargs="*", metavar="NUMBER", help="such as 05; all of them when none is named")
    parser.add_argument("--seeds", type=int, default=5, help="how many, at least 2; of `one`, which")
    options = parser.parse_args()
    there = [path.name[:2] for path in sorted(NOTEBOOKS.glob("*.ipynb"))]
    if unknown := [number for number in options.notebooks if options.what == "run" and number not in there]:
        parser.error(f"expected some of {', '.join(there)}; got {', '.join(unknown)}")
    if options.what == "run" and options.seeds < 2:
        parser.error(f"--seeds: expected at least 2, since a spread is asked for; got {options.seeds}")
    if options.what == "one" and (len(options.notebooks) != 1 or not (NOTEBOOKS / options.notebooks[0]).is_file()):
        parser.error("one: expected the name of one notebook's file, such as 05_student_and_teacher.ipynb")
    if options.what == "one":
        print(json.dumps(claims_of(NOTEBOOKS / options.notebooks[0], options.seeds)))
    elif options.what == "run":
        sys.exit(bool(run(options.notebooks, options.seeds)))
    else:
        put(tables())


if __name__ == "__main__":
    main()
