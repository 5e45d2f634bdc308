"""SCALE = "gpu": the notebooks with that switch run on photographs, too, tried here with few small ones and a toy network.

What they claim is about drawn scenes and full runs; a toy only shows that every cell runs.
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
