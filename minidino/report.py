"""One page that says what a run did: a single HTML file with its pictures inside, which asks nobody for anything."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from minidino.runs import write_atomically

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --paper: #fff; --line: #d0d0d5; --soft: #6a6a70; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececee; --paper: #17171a; --line: #3c3c42; --soft: #a0a0a8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2rem; }
p { white-space: pre-line; overflow-wrap: anywhere; }
figure { margin: 1rem 0; } figcaption { color: var(--soft); font-size: 0.85rem; }
img { display: block; width: 100%; height: auto; background: #fff; border-radius: 4px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line); text-align: left; }
td.number { text-align: right; }
"""
PNG_START = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs parted by an empty line, and if wished a PNG and a table whose first row is the head."""

    heading: str
    text: str = ""
    figure: str | Path | None = None
    table: Sequence[Sequence[object]] | None = None


def write_report(path: str | Path, title: str, sections: Sequence[Section]) -> Path:
    """Write a page that can be mailed, opened without a network, and read on a phone.

    Args:
        path: the .html file; it appears only when complete, in a folder that is made where there is none.
        title: heading of the page.
        sections: in reading order; the alternative text of a figure is the heading of its section.
    Returns:
        The path.
    Raises:
        FileNotFoundError: a figure is not there.
        ValueError: a figure is not a PNG.
    """
    path = Path(path)
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(_section(section) for section in sections)
        + "\n</body>\n</html>\n"
    )
    write_atomically(path, page.encode("utf-8", errors="backslashreplace"))  # a name may be no UTF-8
    return path


def _section(section: Section) -> str:
    parts = [f"<section>\n<h2>{escape(section.heading)}</h2>"]
    parts += [f"<p>{escape(paragraph.strip())}</p>" for paragraph in section.text.split("\n\n") if paragraph.strip()]
    if section.table:
        parts.append(_table(section.table))
    if section.figure is not None:
        parts.append(_figure(Path(section.figure), section.heading))
    return "\n".join(parts) + "\n</section>"


def _table(rows: Sequence[Sequence[object]]) -> str:
    head = "".join(f"<th>{escape(str(cell))}</th>" for cell in rows[0])
    body = "\n".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows[1:])
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f'<td class="number">{value:{".4f" if abs(value) < 1 else ".4g"}}</td>'
    if isinstance(value, int) and not isinstance(value, bool):
        return f'<td class="number">{value}</td>'
    return f"<td>{escape(str(value))}</td>"


def _figure(path: Path, alt: str) -> str:
    data = path.read_bytes()
    if not data.startswith(PNG_START):
        raise ValueError(f"expected a PNG picture, got {path}, which does not begin like one")
    text = base64.b64encode(data).decode("ascii")
    return (
        f'<figure><img alt="{escape(alt)}" src="data:image/png;base64,{text}">'
        f"<figcaption>{escape(path.name)}</figcaption></figure>"
    )
