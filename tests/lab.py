"""Notebooks as a student runs them: JupyterLab in a browser without a window, "Run All Cells", a screenshot of each.

    python tests/lab.py FOLDER [NAME ...]      such as 02_attention; screenshots and what went wrong end in FOLDER
"""

import argparse
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
MINUTES = 12  # a notebook may take


def browser_path() -> str | None:
    """Where a Chromium is; None where there is none."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextlib.contextmanager
def lab(folder: Path) -> Iterator[str]:
    """A JupyterLab server over a folder, until the block ends; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
               "--ServerApp.token=", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}"]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(120):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5):
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def run_all(names: list[str], out: Path) -> dict[str, list[str]]:
    """Run each notebook from its first to its last cell, in a copy of the folder; a screenshot of its end goes to `out`.

    Returns:
        What went wrong in each: cells that were not run, errors; nothing when all is well.
    """
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as place, sync_playwright() as play:
        root = Path(place)
        shutil.copytree(NOTEBOOKS, root / "notebooks")
        (root / "data").symlink_to(NOTEBOOKS.parent / "data")
        browser = play.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        with lab(root) as address:
            return {name: _run_one(browser, address, root / "notebooks" / f"{name}.ipynb", out) for name in names}


def _run_one(browser: Any, address: str, path: Path, out: Path) -> list[str]:
    book = json.loads(path.read_text())
    for cell in _code(book):
        cell |= {"outputs": [], "execution_count": None}
    path.write_text(json.dumps(book))
    page, before = browser.new_page(viewport={"width": 1280, "height": 1600}), len(_kernels(address))
    page.goto(f"{address}/lab/tree/notebooks/{path.name}?reset")  # and not what was open the last time
    page.get_by_text("| Idle").wait_for(timeout=120_000)
    for _ in range(240):  # until its own kernel waits for work; what is asked of it before is lost
        if (states := _kernels(address)) == ["idle"] * (before + 1):
            break
        time.sleep(0.5)
    else:
        raise TimeoutError(f"{path.name}: expected one more idle kernel, got {states}")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    end = time.monotonic() + 60 * MINUTES
    while time.monotonic() < end and any(cell["execution_count"] is None for cell in _code(book)):
        time.sleep(2)
        page.keyboard.press("Control+s")
        with contextlib.suppress(json.JSONDecodeError):  # half of it is written: look again
            book = json.loads(path.read_text())
    page.screenshot(path=str(out / f"{path.stem}.png"))
    page.close()
    return [fault for cell in _code(book) for fault in faults(cell)]


def _kernels(address: str) -> list[str]:
    """What each kernel of the server is doing."""
    with urllib.request.urlopen(f"{address}/api/kernels", timeout=5) as answer:
        return [kernel["execution_state"] for kernel in json.load(answer)]


def _code(book: dict) -> list[dict]:
    return [cell for cell in book["cells"] if cell["cell_type"] == "code"]


def faults(cell: dict) -> list[str]:
    start = "".join(cell["source"])[:60]
    missing = [] if cell["execution_count"] else [f"not run: {start}"]
    return missing + [f"{o['ename']}: {o['evalue']} in {start}" for o in cell["outputs"] if o["output_type"] == "error"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("names", nargs="*", metavar="NAME", help="without it all of them")
    options = parser.parse_args()
    there = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    if unknown := set(options.names) - set(there):
        parser.error(f"expected some of {', '.join(there)}; got {', '.join(sorted(unknown))}")
    needed = [name for name in ("playwright", "jupyterlab") if not find_spec(name)] + ["Chromium"] * (not browser_path())
    if needed:
        parser.error(f"needs {', '.join(needed)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    print(run_all(options.names or there, options.folder))


if __name__ == "__main__":
    main()
