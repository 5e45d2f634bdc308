"""The book: made without the network, every link leads somewhere, every notebook, module and term is in it."""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import lab
import pytest

from minidino.notebook import grades

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LETTERS = "B G L V H W P Hp Wp N R T D h d K M".split()
TERMS = """prototype teacher student EMA Sinkhorn-Knopp KoLeo multi-crop register LayerScale SwiGLU k-NN mIoU collapse
    curation target temperature cross-entropy entropy probe token patch head backbone crop attention
    distillation""".split()
TERMS += ["DINO loss", "iBOT loss", "stochastic depth", "linear probe", "effective rank", "class token", "patch token"]
KNOWN = {"PyTorch", "GB", "macOS", "Windows"}  # words that a reader of the course brings along
SIDES = (390, 1280)  # px: a phone, a laptop
LOOKED_AT = ["index.html", "notebooks/07_pretraining.html", "glossary.html", "differences.html", "teacher.html"]
LOOKED_AT += ["api/minidino.learning.losses.html", "api/minidino.probes.segmentation.html"]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The whole site, made once."""
    out = tmp_path_factory.mktemp("bound") / "book"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "book" / "bind.py"), "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return out


@pytest.fixture
def book(monkeypatch):
    """A module of the folder `book` by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "book"))
    return importlib.import_module


class Text(HTMLParser):
    """What stands in the elements of one tag."""

    def __init__(self, html: str, tag: str):
        super().__init__()
        self.tag, self.depth, self.found = tag, 0, []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.depth += tag == self.tag
        self.found += [""] * (tag == self.tag)

    def handle_endtag(self, tag):
        self.depth -= tag == self.tag

    def handle_data(self, data):
        if self.depth:
            self.found[-1] += data


# ------------------------------------------------------------------------------------------------ the site


def test_every_link_and_picture_is_there_and_nothing_comes_from_outside(site, book):
    assert book("links").faults(site) == []
    assert len(list(site.rglob("*.html"))) > 80
    assert "MathJax" not in "".join(path.read_text() for path in site.rglob("*.html"))
    formulas = Text((site / "api" / "minidino.learning.doctor.html").read_text(), "pre").found
    assert any("perplexity = exp(" in formula for formula in formulas)


def test_every_notebook_and_module_has_a_page(site):
    assert {path.stem for path in (site / "notebooks").glob("*.html")} == {path.stem for path in NOTEBOOKS}
    modules = [path for path in (ROOT / "minidino").rglob("*.py") if path.name != "__init__.py"]
    wanted = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules}
    assert {path.stem for path in (site / "api").glob("minidino*.html")} == wanted


def test_notebooks_are_in_order_with_their_kept_outputs(site):
    pages = [site / "notebooks" / f"{path.stem}.html" for path in NOTEBOOKS]
    for page, after in zip(pages, pages[1:]):
        assert f'href="{after.name}"' in re.search(r'<a class="right-next".*?>', page.read_text(), re.DOTALL)[0]
        assert f'href="{page.name}"' in re.search(r'<a class="left-prev".*?>', after.read_text(), re.DOTALL)[0]
    for page, path in zip(pages, NOTEBOOKS, strict=True):
        outputs = [output for cell in json.loads(path.read_text())["cells"] for output in cell.get("outputs", [])]
        alts = [o["metadata"]["image/png"]["alt"] for o in outputs if "image/png" in o.get("data", {})]
        html = page.read_text()
        shown = re.findall(r'<img alt="([^"]*)" [^>]*_images/[0-9a-f]{64}', html)
        assert len(shown) == len(alts) > 0
        assert "not attempted yet" in html


def test_the_book_can_be_searched(site):
    index = (site / "searchindex.js").read_text()
    assert "sinkhorn" in index and all(path.stem in index for path in NOTEBOOKS)


def test_every_letter_and_term_is_in_the_glossary(site):
    html = (site / "glossary.html").read_text()
    terms = {text.strip().rstrip("#").strip() for text in Text(html, "dt").found}
    letters = re.findall(r"<tr[^>]*><td><p><code[^>]*><span[^>]*>(\w+)</span>", html)
    assert letters == LETTERS
    assert set(TERMS) <= terms, set(TERMS) - terms
    lower = {term.lower() for term in terms}
    for path in NOTEBOOKS:
        needs = re.search(r"\*\*Needs\.\*\* (.*)", "".join(json.loads(path.read_text())["cells"][0]["source"]))[1]
        needs = re.sub(r"`[^`]*`", "", needs)
        words = set(re.findall(r"(?<=[^.] )\b\w*[A-Z]\w*|(?<=\*)\w+(?=\*)|\btimm\b", needs)) - KNOWN
        missing = {word for word in words if not any(word.lower() in term.split() for term in lower)}
        assert not missing, f"{path.stem}: {missing}"


def test_every_term_says_where_it_is_taught(site):
    html = (site / "glossary.html").read_text()
    pairs = re.findall(r"<dt id=.*?</dt>\s*<dd>(.*?)</dd>", html, re.DOTALL)
    assert len(pairs) > 60 and all("href=" in text for text in pairs)


@pytest.mark.parametrize(
    "term, first",
    [("attention", "02"), ("packing", "02"), ("balanced choice", "03"), ("student", "05"), ("centring", "06"), ("head", "06")],
)
def test_a_term_leads_to_the_notebook_that_explains_it(term, first, book):
    body = re.search(rf"^{term}\n((?:  .*\n)+)", (ROOT / "book" / "glossary.md").read_text(), re.MULTILINE)[1]
    pages = book("pages")
    assert re.findall(r"\[(\d\d)\]", pages.filled(body))[0] == first


def test_the_teachers_page_has_every_notebook_in_a_week(site):
    tables = Text((site / "teacher.html").read_text(), "table").found
    for path in NOTEBOOKS:
        assert path.stem[:2] in re.findall(r"\b\d\d\b", tables[0]), "no week has this notebook"
    total = sum(map(float, re.findall(r"^([\d.]+) minutes?", tables[2], re.MULTILINE)))
    assert f"{total:g} minutes on two CPU cores" in re.sub(r"\s+", " ", (site / "teacher.html").read_text())


def test_differences_are_collected(site):
    html = (site / "differences.html").read_text()
    for words in ("loss.ibot_divisor", "losses.koleo_loss", "no rounding to 8 bits", "our teacher momentum"):
        assert words in html
    sources = [path.read_text() for path in (ROOT / "minidino").rglob("*.py")]
    n = sum(len(re.findall(r"^\s+Differs:", source, re.MULTILINE)) for source in sources)
    shown = html[html.index('id="what-docstrings-say"') : html.index('id="what-was-changed')]
    assert shown.count("<li>") == n > 30


def test_the_log_names_files_that_exist():
    text = (ROOT / "book" / "log.md").read_text()
    dates = re.findall(r"^## (\d{4}-\d\d-\d\d)$", text, re.MULTILINE)
    assert dates == sorted(dates, reverse=True) and len(dates) == len(re.findall("^## ", text, re.MULTILINE))
    for entry in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        files = re.findall(r"`(data/\S+)`", entry)
        assert all((ROOT / name).exists() for name in files), entry.splitlines()[0]
        assert files or "commit" in entry or "commits" in entry, entry.splitlines()[0]


# ------------------------------------------------------------------------------------------------ its parts


@pytest.mark.parametrize(
    "html, words",
    [
        ('<a href="gone.html">', "leads nowhere: gone.html"),
        ('<a href="other.html#gone">', "no such place: other.html#gone"),
        ('<img src="gone.png" alt="a cat">', "leads nowhere: gone.png"),
        ('<img src="cat.png">', "without words: cat.png"),
        ('<script src="https://cdn.example/x.js"></script>', "from outside: https://cdn.example/x.js"),
        ('<link rel="stylesheet" href="//cdn.example/x.css">', "from outside: //cdn.example/x.css"),
        ("<script>import('https://cdn.example/x.mjs')</script>", "from outside: https://cdn.example/x.mjs"),
    ],
)
def test_a_broken_page_is_noticed(html, words, tmp_path, book):
    (tmp_path / "other.html").write_text('<p id="here">')
    (tmp_path / "cat.png").touch()
    good = '<a href="other.html#here"> <a href="https://example.org"> <img src="cat.png" alt="a cat">'
    good += '<a href="#top"><p id="top">'
    (tmp_path / "page.html").write_text(good)
    assert book("links").faults(tmp_path) == []
    (tmp_path / "bad.html").write_text(html)
    found = book("links").faults(tmp_path)
    assert len(found) == 1 and words in found[0]


def test_docstrings_keep_formulas_and_stars(book):
    doc = """Spread *rows out.

        loss = -1/B  sum_i  log x_i

    Args:
        x: any `length`, also *rows
            of it.
        a, b: two.
    Returns:
        Scalar: nats.
    Differs: in float32.
    """
    to_rst = book("docstrings").to_rst
    assert "    y = x" in to_rst("All that follows is a formula.\n\n    y = x\n")
    lines = to_rst(inspect.cleandoc(doc))
    assert "    loss = -1/B  sum_i  log x_i" in lines and ".. code-block:: text" in lines
    text = "\n".join(lines)
    assert r"Spread \*rows out." in text and ":Differs:" in text and "- ``a, b``: two." in text
    assert "- ``x``: any \\ ``length``\\ , also \\*rows of it." in text


def test_a_docstring_keeps_the_indent_of_its_formula(book):
    as_written = book("docstrings").as_written
    importlib.import_module("minidino.learning.doctor")
    assert "\n\n    perplexity = exp(" in as_written("minidino.learning.doctor.prototypes_used")
    importlib.import_module("minidino.chain")
    assert "\n\n    chain.json + pictures" in as_written("minidino.chain")
    assert as_written("minidino.chain.nobody") == ""


def test_fields_have_their_comments(book):
    source = "class A:\n    x: int = 1  # px\n    # first\n    # second\n    y: 'B D'\n"
    fields = book("docstrings").fields_of(source)["A"]
    assert [tuple(field) for field in fields] == [("x", "int", "1", "px"), ("y", "'B D'", "", "first second")]


def test_exercises_of_a_handed_in_notebook_are_listed():
    def cell(name, *outputs):
        return {"cell_type": "code", "source": [f"exercise(\n    '{name}', f, g, (1,))"], "outputs": list(outputs)}

    right = {"output_type": "stream", "text": ["ok   1a\n"]}
    untouched = {"output_type": "stream", "text": ["noise\n", "--   1b: not attempted yet\n"]}
    wrong = {"output_type": "error", "ename": "AssertionError", "evalue": "1c, case 1 of 2\n  got: 3"}
    prose = {"cell_type": "markdown", "source": ["exercise('9z')"]}
    book = {"cells": [prose, cell("1a", right), cell("1b", untouched), cell("1c", wrong), cell("1d")]}
    assert grades(json.dumps(book)) == {
        "1a": "ok", "1b": "--", "1c": "failed: AssertionError: 1c, case 1 of 2", "1d": "failed: it was not run"
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ as a student sees it


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = lab.browser_path()
    if program is None:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.parametrize("width", SIDES)
@pytest.mark.parametrize("name", LOOKED_AT)
def test_nothing_has_to_be_scrolled_sideways(site, browser, name, width, tmp_path):
    asked: list[str] = []
    with browser.new_context(viewport={"width": width, "height": 800}) as context:
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto((site / name).as_uri())
        assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
        rims = "elements => elements.map(element => element.getBoundingClientRect().right)"
        assert max(page.eval_on_selector_all(".prev-next-area *", rims)) <= width  # what is beyond is cut off
        page.screenshot(path=tmp_path / f"{Path(name).stem}-{width}.png")
    assert asked and all(url.startswith(("file:", "data:")) for url in asked)


def test_a_word_is_found_without_a_server(site, browser):
    with browser.new_context() as context:
        page = context.new_page()
        page.goto((site / "search.html").as_uri() + "?q=sinkhorn")
        page.wait_for_selector("text=/found \\d+ page/", timeout=60_000)  # results come one by one
        found = page.eval_on_selector_all("ul.search li a", "links => links.map(link => link.textContent)")
    assert any("sinkhorn_knopp" in text for text in found) and any("07" in text for text in found)
