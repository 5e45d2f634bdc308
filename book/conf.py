"""How Sphinx makes the book. `make book` copies this file beside the sources it gathers, see bind.py."""

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from docutils import nodes
from sphinx import addnodes

HERE = Path(__file__).resolve().parent  # where bind.py has gathered all sources
sys.path.insert(0, str(HERE))

project = "minidino"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "docstrings"]
nb_execution_mode = "off"  # the kept outputs are shown; only `make notebooks` makes new ones
myst_heading_anchors = 3
suppress_warnings = ["ref.python"]  # two classes are called Pairs, and annotations name them without their module

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_mock_imports = [] if find_spec("triton") else ["triton"]  # Linux only
autodoc_inherit_docstrings = False
python_maximum_signature_line_length = 80
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "sphinx_book_theme"
html_title = "minidino"
html_static_path = ["static"]
html_css_files = ["book.css"]
html_show_sphinx = False
html_theme_options = {
    "home_page_in_toc": True,
    "navbar_persistent": [],  # the search box of the sidebar is enough
    "footer_content_items": ["extra-footer"],
    "extra_footer": "minidino, Apache-2.0. DINOv2 is the work of Oquab, Darcet, Moutakanni and others at Meta.",
    "use_fullscreen_button": False,
    "show_navbar_depth": 1,
    "collapse_navigation": True,  # the reference is long: other pages do not carry its list
    "show_toc_level": 2,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


def link_notebooks(app, doctree) -> None:
    """`07_pretraining.ipynb` in a text leads to that page."""
    for literal in list(doctree.findall(nodes.literal)):
        stem = re.fullmatch(r"(?:notebooks/)?(\d\d_\w+)\.ipynb", literal.astext())
        if stem and (HERE / "notebooks" / f"{stem[1]}.ipynb").exists():
            options = {"refdomain": "std", "reftype": "doc", "refexplicit": True, "reftarget": f"/notebooks/{stem[1]}"}
            literal.replace_self(addnodes.pending_xref("", literal.deepcopy(), refdoc=app.env.docname, **options))


def describe_pictures(app, doctree) -> None:
    """Pictures keep the words that the notebook has for those who cannot see them."""
    path = Path(app.env.doc2path(app.env.docname))
    if path.suffix == ".ipynb":
        outputs = [o for cell in json.loads(path.read_text())["cells"] for o in cell.get("outputs", [])]
        pictures = [o for o in outputs if "image/png" in o.get("data", {})]
        images = [image for image in doctree.findall(nodes.image) if "cell_output" in _classes_above(image)]
        for image, output in zip(images, pictures, strict=True):
            image["alt"] = output["metadata"].get("image/png", {}).get("alt", "")


def _classes_above(node: nodes.Node) -> set[str]:
    found: set[str] = set()
    while node := node.parent:
        found |= set(node.get("classes", []))
    return found


def setup(app) -> None:
    app.connect("doctree-read", link_notebooks)
    app.connect("doctree-read", describe_pictures)
