"""A notebook runs in JupyterLab in a browser, from its first cell to its last; the others by `python tests/lab.py`."""

from importlib.util import find_spec

import lab
import pytest

NEEDS = [name for name in ("playwright", "jupyterlab") if not find_spec(name)] + ["Chromium"] * (not lab.browser_path())


@pytest.mark.skipif(bool(NEEDS), reason=f"needs {', '.join(NEEDS)}")
def test_a_notebook_runs_in_jupyterlab(tmp_path):
    assert lab.run_all(["02_attention"], tmp_path) == {"02_attention": []}
    assert (tmp_path / "02_attention.png").stat().st_size > 10_000


@pytest.mark.parametrize("words, told", [("", "required: FOLDER"), ("new 99_none", "got 99_none"), ("new", "needs Chromium")])
def test_a_command_that_cannot_be_makes_no_folder(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lab, "find_spec", lambda name: True)
    monkeypatch.setattr(lab, "browser_path", lambda: None)
    monkeypatch.setattr("sys.argv", ["lab.py", *words.split()])
    with pytest.raises(SystemExit):
        lab.main()
    assert told in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_was_not_run_and_what_failed_is_told():
    good = {"source": ["x = 1"], "execution_count": 1, "outputs": [{"output_type": "stream", "text": ["ok"]}]}
    failed = {"source": ["1 / 0"], "execution_count": 2,
              "outputs": [{"output_type": "error", "ename": "ZeroDivisionError", "evalue": "division by zero"}]}  # fmt: skip
    assert lab.faults(good) == []
    assert lab.faults(good | {"execution_count": None}) == ["not run: x = 1"]
    assert lab.faults(failed) == ["ZeroDivisionError: division by zero in 1 / 0"]
