"""Make the course a web page: gather the sources, let Sphinx make HTML of them, look at every link.

    python book/bind.py [--out build/book]

Nothing is executed: notebooks are shown as they are kept, docstrings as they stand.
"""

import argparse
import sys
from pathlib import Path

from links import faults
from pages import ROOT, api_pages, filled

HERE = Path(__file__).resolve().parent


def gather(sources: Path) -> None:
    """Write all that Sphinx reads; files that did not change keep their time, so the next build is short."""
    wanted = {path.relative_to(HERE): path.read_bytes() for path in HERE.rglob("*") if path.suffix in (".css", ".py")}
    wanted |= {Path(path.name): filled(path.read_text()).encode() for path in sorted(HERE.glob("*.md"))}
    for folder, pattern in (("notebooks", "*.ipynb"), ("docs", "*.png"), ("docs", "*.md")):
        wanted |= {path.relative_to(ROOT): path.read_bytes() for path in (ROOT / folder).glob(pattern)}
    wanted |= {Path("api") / name: text.encode() for name, text in api_pages().items()}
    for path in [path for path in sources.rglob("*") if path.is_file() and path.relative_to(sources) not in wanted]:
        path.unlink()
    for name, content in wanted.items():
        path = sources / name
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def bind(out: Path) -> list[str]:
    """Build the site. Returns what is wrong with it, in words; warnings of Sphinx end the build."""
    from sphinx.cmd.build import main as sphinx

    sources, cache = out.parent / f"{out.name}-sources", out.parent / f"{out.name}-cache"
    gather(sources)
    if sphinx(["-W", "--keep-going", "-q", "-b", "html", "-d", str(cache), str(sources), str(out)]):
        return ["Sphinx has warnings, see above"]
    return faults(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "book", help="folder of the site")
    out = parser.parse_args().out.resolve()
    found = bind(out)
    print("\n".join(found) or f"the book is in {out / 'index.html'}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
