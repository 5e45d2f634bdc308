"""What the pages of the book are filled with, read when it is made, so that nothing is written twice.

A page says `{{ needs }}` or `{{ nb 07 }}`; FILL lists what there is.
"""

import ast
import json
import re
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from docstrings import documented, fields_of, sections

from minidino.config import RunConfig, flatten, preset
from minidino.plan import sizes_of
from minidino.scaling import N_GLOBAL, expected_masked

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "minidino"
SHORT = ("scenes-cpu", "imagenette-cpu")  # presets of which a table names the values
ROOMS = {  # folder: what it is for
    "": "The stages, and what all rooms use",
    "images": "Raw images in, batches out",
    "curation": "A raw pool in, chosen images out",
    "kernels": "Triton only",
    "model": "The network, and weights in and out",
    "learning": "Losses, teacher, optimizer, the loop",
    "probes": "Questions to frozen features",
}
SIZED = ("scenes-cpu", "vitl14-lvd")  # whose sizes stand beside the letters of shapes
LETTERS = {
    "B": "images of a batch",
    "G": "global crops of each image",
    "L": "local crops of each image",
    "V": "views of the student, G + L",
    "H": "height of a global crop, pixels",
    "W": "width of a global crop, pixels",
    "P": "side of a patch, pixels",
    "Hp": "rows of the patch grid, H / P",
    "Wp": "columns of the patch grid, W / P",
    "N": "patches of a crop, Hp times Wp",
    "R": "registers",
    "T": "tokens of a crop, 1 + R + N; or of a whole pack",
    "D": "width: numbers of a token",
    "h": "attention heads",
    "d": "numbers of a token that one head sees, D / h",
    "K": "prototypes",
    "M": "hidden patches of a batch, on average",
}
WORDS_A_MINUTE, LINES_A_MINUTE, MINUTES_AN_EXERCISE = 150, 10, 10


# ------------------------------------------------------------------------------------------------ notebooks


class Lesson(NamedTuple):
    number: str
    stem: str
    title: str  # without its number
    question: str
    needs: str
    time: str
    minutes: float  # of the machine
    in_class: int  # minutes, by a rule of thumb
    prose: str


@lru_cache(maxsize=None)
def lessons() -> dict[str, Lesson]:
    """{number: lesson} of the notebooks that are there, in their order."""
    return {path.name[:2]: _lesson(path) for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))}


def _lesson(path: Path) -> Lesson:
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text())["cells"]]
    head = cells[0][1]
    question, needs, time = (re.search(rf"\*\*{name}\.\*\* (.*)", head)[1] for name in ("Question", "Needs", "Time"))
    minutes = float(re.search(r"[\d.]+", time)[0])
    prose = "\n\n".join(text for kind, text in cells if kind == "markdown")
    lines = sum(len(text.splitlines()) for kind, text in cells if kind == "code")
    n_exercises = sum(len(re.findall(r"^exercise\(", text, re.MULTILINE)) for _, text in cells)
    reading = len(prose.split()) / WORDS_A_MINUTE + lines / LINES_A_MINUTE
    in_class = round((reading + minutes + n_exercises * MINUTES_AN_EXERCISE) / 5) * 5
    title = head.splitlines()[0].partition(" · ")[2]
    return Lesson(path.name[:2], path.stem, title, question, needs, time, minutes, in_class, prose)


def course() -> str:
    rows = [f"| {_link(one)} | {one.question} | {one.minutes:g} |" for one in lessons().values()]
    return "\n".join(["| notebook | question | minutes to run |", "|---|---|---|", *rows])


def needs() -> str:
    rows = [f"| {_link(one)} | {_cell(one.needs)} | {_cell(one.time)} |" for one in lessons().values()]
    return "\n".join(["| notebook | needs | time |", "|---|---|---|", *rows])


def nb(*numbers: str) -> str:
    """Links to notebooks; one that is not written yet is named only."""
    there = [f"[{n}](notebooks/{lessons()[n].stem}.ipynb)" if n in lessons() else n for n in numbers]
    if len(there) == 1:
        return f"notebook {there[0]}"
    return f"notebooks {', '.join(there[:-1])} and {there[-1]}"


def row(*numbers: str) -> str:
    """Three cells: the notebooks of these numbers that are there, their minutes to run and in class."""
    there = [lessons()[n] for n in numbers if n in lessons()]
    if not there:
        return "not written yet | | "
    minutes = sum(one.minutes for one in there), sum(one.in_class for one in there)
    return f"{', '.join(map(_link, there))} | {minutes[0]:g} | {minutes[1]}"


def minutes(kind: str) -> str:
    return f"{sum(one.minutes if kind == 'run' else one.in_class for one in lessons().values()):g}"


def rule() -> str:
    return (
        f"prose at {WORDS_A_MINUTE} words a minute, {LINES_A_MINUTE} lines of code a minute, the minutes to run, and "
        f"{MINUTES_AN_EXERCISE} minutes for each exercise."
    )


def count(what: str) -> str:
    return str({"notebooks": len(lessons()), "exercises": 3 * len(lessons())}[what])


def _link(one: Lesson) -> str:
    return f"[{one.number} {one.title}](notebooks/{one.stem}.ipynb)"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


# ------------------------------------------------------------------------------------------------ glossary


def letters() -> str:
    """The letters of shapes, and how large they are in the smallest and in the largest preset."""
    sizes = [_letters_of(name) for name in SIZED]
    rows = [f"| `{x}` | {told} | {' | '.join(f'{one[x]:,}' for one in sizes)} |" for x, told in LETTERS.items()]
    head = "| letter | what it counts | " + " | ".join(f"`{name}`" for name in SIZED) + " |"
    return "\n".join([head, "|---|---|---|---|", *rows])


def _letters_of(name: str) -> dict[str, int]:
    config = preset(name)
    one, n_images = sizes_of(config, "cpu"), config.optim.batch_size
    grid, masked = one.global_size // one.patch_size, (config.masks.probability, config.masks.ratio)
    found = {"B": n_images, "G": N_GLOBAL, "L": one.n_local, "V": N_GLOBAL + one.n_local, "H": one.global_size}
    found |= {"W": one.global_size, "P": one.patch_size, "Hp": grid, "Wp": grid, "N": one.n_patches, "R": one.registers}
    found |= {"T": 1 + one.registers + one.n_patches, "D": one.width, "h": one.heads, "d": one.width // one.heads}
    m = round(expected_masked(N_GLOBAL * n_images, one.n_patches, *masked))
    return found | {"K": one.dino.n_prototypes, "M": m}


def taught(pattern: str) -> str:
    """The three notebooks whose prose speaks of a term most, as links; a heading that does so counts five times."""
    words = re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE)
    counted = {}
    for number, one in lessons().items():
        headings = re.findall(r"^#.*", one.prose, re.MULTILINE)
        counted[number] = len(words.findall(one.prose)) + 4 * len(words.findall("\n".join(headings)))
    most = sorted((n for n in counted if counted[n]), key=lambda n: (-counted[n], n))[:3]
    return f"{nb(*most).capitalize()}. " if most else ""


# ------------------------------------------------------------------------------------------------ config and README


def switches() -> str:
    """The table of fidelity switches: the README's reasons beside what config.py says and sets."""
    table = readme("What is the same as DINOv2, and what is not")
    found = fields_of((PACKAGE / "config.py").read_text())
    known = {f"{field.name}.{one.name}": one for field in fields(RunConfig) for one in found.get(_kind(field), [])}
    lines, named = [], set()
    for line in re.findall(r"^\| (`.*) \|$", table, re.MULTILINE):
        names, values, why = line.split(" | ")
        mine = re.findall(r"`(\w+\.\w+)`", names)
        named |= set(mine)
        told = " ".join(filter(None, (known[name].comment for name in mine)))
        cells = "<br>".join(f"`{name}`" for name in mine), values, _cell(_prose(told)), _set(mine), why
        lines.append(f"| {' | '.join(cells)} |")
    missing = {name for name, one in known.items() if "released" in one.kind or one.kind == "Fidelity"} - named
    if missing or not lines:
        raise ValueError(f"the README has no reason for the switches {sorted(missing)}")
    head = "| field | values | what config.py says of it | set to | default, and why |"
    return "\n".join([head, "|---|---|---|---|---|", *lines])


def _kind(field) -> str:
    return getattr(field.type, "__name__", str(field.type))


def _set(names: list[str]) -> str:
    """The default of each field, and where a short preset has another value."""
    default, said = flatten(RunConfig()), []
    for name in names:
        others = [f"`{p}`: {flatten(preset(p))[name]}" for p in SHORT if flatten(preset(p))[name] != default[name]]
        said.append("; ".join([str(default[name]), *others]))
    return "<br>".join(said)


def readme(heading: str) -> str:
    """What the README says below a heading, with its links as they are from the page of the book."""
    text = (ROOT / "README.md").read_text()
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
    if not found:
        raise ValueError(f"the README has no part {heading!r}")
    return re.sub(r"<!-- /?\S+ -->\n", "", re.sub(r"\[([^]]+)\]\(#[^)]*\)", r"\1", found[1])).strip()


# ------------------------------------------------------------------------------------------------ the package


def modules() -> dict[str, Path]:
    """{minidino.learning.losses: its file, ...}, room by room."""
    paths = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    paths.sort(key=lambda path: (list(ROOMS).index(_room(path)), path.name))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def _room(path: Path) -> str:
    return "" if path.parent == PACKAGE else path.parent.name


def differs() -> str:
    """Every `Differs:` of a docstring, room by room."""
    out, room = [], None
    for module, path in modules().items():
        for name, node in documented(path.read_text()).items():
            text = sections(ast.get_docstring(node) or "")[1].get("Differs")
            if text:
                here = _room(path) or "minidino"
                out += [] if here == room else ["", f"### {here}", ""]
                room = here
                short = f"{module.removeprefix('minidino.')}.{name}"
                out.append(f"- {{py:obj}}`{short} <{module}.{name}>`: {_prose(' '.join(map(str.strip, text)))}")
    return "\n".join(out)


def _prose(text: str) -> str:
    """Plain text of a docstring or a comment as Markdown: only `code` is markup."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_\[\]<>])", r"\\\1", part) for part in parts)


def api_pages() -> dict[str, str]:
    """{file: text} of the reference: one page a module, and a list of all of them."""
    found, listed = {}, []
    for room, told in ROOMS.items():
        rows = []
        for name, path in modules().items():
            if _room(path) == room:
                first = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0].rstrip(".")
                rows.append(f"| [`{name.removeprefix('minidino.')}`]({name}.rst) | {_cell(_prose(first))} |")
                title = name.removeprefix("minidino.")
                found[f"{name}.rst"] = f"{title}\n{'=' * len(title)}\n\n.. automodule:: {name}\n"
        listed += [f"## {told}" if not room else f"## `{room}`: {told[0].lower()}{told[1:]}", ""]
        listed += ["| module | what it does |", "|---|---|", *rows, ""]
    names = "\n".join(name.removesuffix(".rst") for name in found)
    intro = (Path(__file__).parent / "api" / "index.md").read_text()
    found["index.md"] = intro.replace("{{ modules }}", "\n".join(listed)).replace("{{ names }}", names)
    return found


# ------------------------------------------------------------------------------------------------ filling in

FILL = {
    f.__name__: f
    for f in (course, needs, nb, row, minutes, count, rule, letters, taught, switches, readme, differs)
}  # a name in a page: what fills it


def filled(text: str) -> str:
    """A page with everything that is read at build time."""

    def one(match: re.Match) -> str:
        name, _, rest = match[1].partition(" ")
        return FILL[name](*([rest] if name in ("readme", "taught") else rest.split()))

    return re.sub(r"\{\{ (.+?) \}\}", one, text)
