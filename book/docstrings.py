"""The house's docstrings for Sphinx: plain text with indented formulas, Args, Returns, Raises, Source, Differs.

Sphinx takes docstrings for reStructuredText, where `*rows` begins emphasis and a formula becomes a paragraph. So they
are read here, and handed on with everything quoted that is no markup.
"""

import ast
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Warns|Source|Differs):\s*(.*)$")
ENTRIES = ("Args", "Raises", "Warns")  # `name: what it is`, one a line, more lines deeper
CODE = re.compile(r"`([^`]+)`")
NO_TEXT = ("Alias for field number", "Built-in immutable sequence")  # what NamedTuple and tuple say of themselves


def sections(doc: str) -> tuple[list[str], dict[str, list[str]]]:
    """The lines before the first section, and the lines of each section, of a docstring that begins at the margin."""
    before: list[str] = []
    found: dict[str, list[str]] = {}
    lines = before
    for line in doc.splitlines():
        if match := SECTION.match(line):
            lines = found.setdefault(match[1], [])
            line = match[2]
        lines.append(line)
    below = {name: text if text[0] else dedent("\n".join(text[1:])).splitlines() for name, text in found.items()}
    return before, below


def to_rst(doc: str) -> list[str]:
    """A docstring of the house as lines of reStructuredText."""
    before, found = sections(doc)
    out = list(_blocks(before))
    for name, lines in found.items():
        out += ["", f":{name}:"]
        if name in ENTRIES:
            out += [f"   {line}" for entry in _entries(lines) for line in ("", f"- {entry}")]
        else:
            out.append(f"   {quoted(_joined(lines))}")
    return out + [""]


def quoted(text: str) -> str:
    """Plain text as reStructuredText that shows it as it is; `code` stays code."""
    parts = CODE.split(text)
    for i, part in enumerate(parts):
        parts[i] = f"\\ ``{part}``\\ " if i % 2 else re.sub(r"([\\*_|`<>\[\]])", r"\\\1", part)
    return "".join(parts).removeprefix("\\ ").removesuffix("\\ ").strip()


def _joined(lines: list[str]) -> str:
    return " ".join(line.strip() for line in lines if line.strip())


def _entries(lines: list[str]) -> Iterator[str]:
    """`name: text` of each argument, with the lines that belong to it."""
    entry: list[str] = []
    for line in [*lines, "end"]:
        if entry and not line.startswith(" ") and line.strip():
            name, colon, text = _joined(entry).partition(": ")
            yield f"``{name}``: {quoted(text)}" if colon and len(name) < 80 else quoted(_joined(entry))
            entry = []
        entry.append(line)


def _blocks(lines: list[str]) -> Iterator[str]:
    """Paragraphs and lists; what is indented is a formula or an example and stays line by line."""
    for kind, group in groupby(lines, lambda line: "code" if line.startswith("    ") else "text" if line else ""):
        if kind == "code":
            yield from ("", ".. code-block:: text", "", *group, "")
        elif kind == "text":
            for part in re.split(r"\n(?=- )", "\n".join(group)):
                mark = "- " if part.startswith("- ") else ""
                yield from ("", mark + quoted(_joined(part.removeprefix(mark).splitlines())))
        else:
            yield ""


# ------------------------------------------------------------------------------------------------ fields and signatures


class Field(NamedTuple):
    name: str
    kind: str  # the annotation, as written
    default: str  # as written; "" where there is none
    comment: str  # behind the field, or in the lines above it


@lru_cache(maxsize=None)
def fields_of(source: str) -> dict[str, list[Field]]:
    """{class: its annotated fields} of the text of a module, with the comments that Python throws away."""
    behind, above = {}, {}
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row = token.start[0]
            alone = not lines[row - 1][: token.start[1]].strip()
            (above if alone else behind)[row] = token.string.lstrip("# ")
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            rows = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            found[node.name] = [_field(item, behind, above) for item in rows]
    return found


def _field(item: ast.AnnAssign, behind: dict[int, str], above: dict[int, str]) -> Field:
    comments, row = [], item.lineno - 1
    while row in above:
        comments.insert(0, above[row])
        row -= 1
    comments += [behind[row] for row in range(item.lineno, item.end_lineno + 1) if row in behind]
    default = ast.unparse(item.value) if item.value else ""
    return Field(item.target.id, ast.unparse(item.annotation), default, " ".join(comments))


def _table(rows: list[Field]) -> list[str]:
    out = ["", ".. list-table::", "   :widths: auto", "   :header-rows: 1", ""]
    for row in [("field", "type", "default", ""), *rows]:
        name, kind, default, comment = row
        head = row == ("field", "type", "default", "")
        cells = [name, kind, default] if head else [f"``{cell}``" if cell else "" for cell in (name, kind, default)]
        cells.append(quoted(comment))
        out += [f"   {'*' if i == 0 else ' '} - {cell}" for i, cell in enumerate(cells)]
    return out + [""]


def _is_record(thing: object) -> bool:
    return inspect.isclass(thing) and (is_dataclass(thing) or hasattr(thing, "_fields"))


@lru_cache(maxsize=None)
def documented(source: str) -> dict[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """{Class.method: its node} of all classes and functions in the text of a module, the outer ones first."""
    found, open_ = {}, [("", node) for node in ast.parse(source).body]
    for above, node in open_:  # it grows
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found[above + node.name] = node
            open_ += [(f"{above}{node.name}.", inner) for inner in node.body]
    return found


def _signature(thing: object) -> tuple[str, str | None] | None:
    """Arguments and return as they are written: shapes stay shapes."""
    thing = inspect.unwrap(thing)
    module = inspect.getmodule(thing)
    nodes = documented(_text(module.__file__)) if module and getattr(module, "__file__", None) else {}
    name = getattr(thing, "__qualname__", "")
    node = nodes.get(f"{name}.__init__" if inspect.isclass(thing) else name)
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    arguments = node.args
    if arguments.args and arguments.args[0].arg in ("self", "cls"):
        arguments = ast.arguments(**{**dict(ast.iter_fields(arguments)), "args": arguments.args[1:]})
    return f"({ast.unparse(arguments)})", ast.unparse(node.returns) if node.returns else None


@lru_cache(maxsize=None)
def _text(path: str) -> str:
    return Path(path).read_text()


# ------------------------------------------------------------------------------------------------ what Sphinx asks


def as_written(name: str) -> str:
    """The docstring of a module, class or function by its full name, without the margin of the code around it.

    Sphinx takes away as much as all lines but the first have in common: that of a formula, where no other text follows.
    """
    parts = name.split(".")
    module = next((m for i in range(len(parts), 0, -1) if (m := ".".join(parts[:i])) in sys.modules), None)
    path = getattr(sys.modules.get(module), "__file__", None)
    if path is None:
        return ""
    inside = name.removeprefix(module).removeprefix(".")
    node = documented(_text(path)).get(inside) if inside else ast.parse(_text(path))
    text = (ast.get_docstring(node, clean=False) if node else None) or ""
    margin = " " * (node.col_offset + 4) if inside and node else ""
    return "\n".join(line.removeprefix(margin).rstrip() for line in text.splitlines()).strip()


def on_docstring(app, what, name, thing, options, lines) -> None:
    text = as_written(name) or "\n".join(lines)
    own = inspect.isclass(thing) and text.startswith(f"{thing.__name__}(")  # made up by dataclass
    lines[:] = [] if own or text.startswith(NO_TEXT) else to_rst(text)
    if _is_record(thing):
        rows = fields_of(_text(inspect.getmodule(thing).__file__)).get(thing.__name__, [])
        lines += _table(rows) if rows else []


def on_signature(app, what, name, thing, options, signature, returns):
    if _is_record(thing):
        return "", None
    return _signature(thing) if what in ("function", "method", "class") else None


def on_skip(app, what, name, thing, skip, options):
    """Fields stand in the table of their class."""
    doc = getattr(thing, "__doc__", None) or ""
    return True if doc.startswith(NO_TEXT) or type(thing).__name__ in ("_tuplegetter", "member_descriptor") else None


def setup(app) -> dict:
    app.connect("autodoc-process-docstring", on_docstring)
    app.connect("autodoc-process-signature", on_signature)
    app.connect("autodoc-skip-member", on_skip)
    return {"parallel_read_safe": True}
