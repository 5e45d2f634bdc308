"""Notebooks with other sizes than their own: photographs where SCALE = "gpu" says so, and fewer of everything.

What they claim is about full sizes; here every cell has to run, with small pictures, a toy network and few steps.
"""

import re
from pathlib import Path

import pytest
from PIL import Image

from minidino import config as configs
from minidino import notebook, pictures
from minidino.images.scenes import draw_scenes
from minidino.stages import pretrain

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
SWITCH = 'SCALE = "laptop"  # or "gpu"\n'
SWITCHED = [path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if SWITCH in "".join(notebook.code_of(path.read_text()))]
TOY = ["data.short_side=48", "crops.global_size=32", "crops.local_size=16", "crops.n_local=2", "vit.width=32",
       "vit.depth=4", "vit.heads=1", "vit.patch_size=8", "heads.n_prototypes=64", "heads.hidden_dim=32",
       "heads.bottleneck_dim=16", "optim.batch_size=16", "run.steps=12", "run.workers=0", "run.device=cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The preset imagenette-gpu, but for its sizes: a folder of 300 pictures of ten kinds, a network of four blocks."""
    root = tmp_path_factory.mktemp("photographs")
    for part, n, seed in (("train", 200, 0), ("val", 100, 1)):
        scenes = draw_scenes(n, 56, seed=seed)
        for row, (picture, kind) in enumerate(zip(scenes.images, scenes.labels, strict=True)):
            place = root / part / f"kind-{kind}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(place / f"{row}.png")
    return configs.override(configs.preset("imagenette-gpu"), [*TOY, f"data.source={root}"])


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """What `minidino train --preset imagenette-gpu` would have left."""
    return pretrain(toy, tmp_path_factory.mktemp("runs") / "imagenette-gpu")[0].folder


def test_three_notebooks_have_the_switch():
    assert [path.name[:2] for path in SWITCHED] == ["00", "08", "11"]


@pytest.mark.parametrize("path", SWITCHED, ids=lambda path: path.stem)
def test_every_cell_runs_on_photographs(path, toy, trained, monkeypatch, capsys):
    code = notebook.code_of(path.read_text())
    changes = {SWITCH: 'SCALE = "gpu"\n', "../runs/imagenette-gpu": str(trained), '"vit_tiny", 5000': '"vit_tiny,depth=2", 4'}
    for old, new in changes.items():
        code = [text.replace(old, new) for text in code]
    claims = []
    monkeypatch.chdir(NOTEBOOKS)
    monkeypatch.setattr(configs, "preset", {"imagenette-gpu": toy}.__getitem__)
    monkeypatch.setattr(notebook, "check", lambda claim, truth: claims.append(claim))
    monkeypatch.setattr(pictures, "DPI", pictures.DPI)  # notebooks set it
    space = {"__name__": "__main__"}
    for text in code:
        exec(compile(text, path.name, "exec"), space)
    assert space["SCALE"] == "gpu" and len(claims) > 5
    assert re.search(r"measured: [\d.]+ minutes", capsys.readouterr().out)


# ------------------------------------------------------------------------------------------- less, and once more

LESS = {
    "00_tour": {"run.steps=900": "run.steps=4", "n_scenes=4000": "n_scenes=200", "n_test_scenes=1000": "n_test_scenes=60"},
    "03_curation": {"draw_pool(1500": "draw_pool(360", "steps=200": "steps=4"},
    "05_student_and_teacher": {"STEPS = 150": "STEPS = 8", "data.n_scenes=1000": "data.n_scenes=64"},
    "11_distillation": {", 150\n": ", 3\n", "n_scenes=2400": "n_scenes=200", "n_test_scenes=600": "n_test_scenes=60"},
}


@pytest.mark.parametrize("name", LESS)
def test_every_cell_runs_twice_and_with_less(name, monkeypatch):
    """Who changes a number or runs a cell again loses nothing but what was claimed of the larger number."""
    code = notebook.code_of((NOTEBOOKS / f"{name}.ipynb").read_text())
    for old, new in LESS[name].items():
        assert any(old in text for text in code)
        code = [text.replace(old, new) for text in code]
    claims: list[tuple[str, bool]] = []
    monkeypatch.chdir(NOTEBOOKS)
    monkeypatch.setattr(notebook, "check", lambda claim, truth: claims.append((claim, bool(truth))))
    monkeypatch.setattr(pictures, "DPI", pictures.DPI)  # notebooks set it
    space = {"__name__": "__main__"}
    for text in code:
        said = []
        for _ in range(2):
            claims.clear()
            exec(compile(text, name, "exec"), space)
            said.append([claim for claim, truth in claims if truth])
        assert set(said[0]) <= set(said[1])
    assert "spent" in space
