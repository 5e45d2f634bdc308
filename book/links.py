"""Does every link of a built site lead somewhere, does it load nothing from outside, has every picture words?

    python book/links.py [FOLDER]      build/book where none is named
"""

import re
import sys
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"link": "href"} | dict.fromkeys(("img", "script", "source", "iframe", "video", "audio"), "src")
FROM_SCRIPT = re.compile(r"""["']((?:https?:)?//[^"']+\.(?:m?js|css|json)\b[^"']*)["']""")
NOT_LOADED = {"canonical", "author", "license"}  # relations of <link> that no browser fetches


class Page(HTMLParser):
    """What a page links to, what it loads, which places it has, and its pictures without words."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.silent: list[str] = []
        self.in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.in_script = tag == "script"
        self.ids |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if given.get(LOADED.get(tag, "")) and given.get("rel") not in NOT_LOADED:
            self.loaded.append(given[LOADED[tag]])
        if tag == "img" and not (given.get("alt") or "").strip():
            self.silent.append(given.get("src") or "")

    def handle_endtag(self, tag: str) -> None:
        self.in_script = False

    def handle_data(self, data: str) -> None:
        if self.in_script:
            self.loaded += FROM_SCRIPT.findall(data)


@lru_cache(maxsize=None)
def page(path: Path) -> Page:
    return Page(path.read_text())


def faults(site: Path) -> list[str]:
    """Everything that is wrong with a site, in words."""
    found = [f"{path.relative_to(site)}: {fault}" for path in _pages(site) for fault in _of_page(path)]
    for path in sorted(site.rglob("*.css")):
        if "@import url(http" in (text := path.read_text()) or "url(http" in text or "url(//" in text:
            found.append(f"{path.relative_to(site)}: a style that loads from outside")
    return found if _pages(site) else ["there is no page"]


def _pages(site: Path) -> list[Path]:
    """All pages; what lies in _static are the theme's templates."""
    return sorted(path for path in site.rglob("*.html") if "_static" not in path.parts)


def _of_page(path: Path) -> list[str]:
    here = page(path)
    found = [f"a picture without words: {source}" for source in here.silent]
    for link in here.loaded + here.links:
        parts = urlsplit(link)
        if parts.scheme == "data" or (parts.scheme and link not in here.loaded):
            continue
        if parts.scheme or parts.netloc:
            found.append(f"loads from outside: {link}")
            continue
        target = path.parent / unquote(parts.path) if parts.path else path
        if target.is_dir():
            target = target / "index.html"
        if not target.exists():
            found.append(f"leads nowhere: {link}")
        elif parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in page(target.resolve()).ids:
            found.append(f"no such place: {link}")
    return found


if __name__ == "__main__":
    wrong = faults(Path(sys.argv[1] if len(sys.argv) > 1 else "build/book"))
    print("\n".join(wrong) or "every link leads somewhere")
    sys.exit(bool(wrong))
