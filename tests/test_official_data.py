"""benchmarks/official_data.py without the released code: torchvision's transforms stand in for it."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from torchvision.transforms import Compose

from minidino.images.crops import reference_view, released_laws
from minidino.images.pixels import Pixels
from minidino.images.scenes import draw_scenes


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    return importlib.import_module("official_data")


def stand_in(blur: str) -> SimpleNamespace:
    """What of the released code `crop_rows` asks for."""

    class Augmentation:
        def __init__(self, global_scale, local_scale, n_local, global_size, local_size):
            assert (global_scale, local_scale) == ((0.32, 1.0), (0.05, 0.32))
            views = [reference_view(law).transforms for law in released_laws(global_size, local_size, blur)]
            cuts, changes = [Compose(view[:2]) for view in views], [Compose(view[2:]) for view in views]
            self.geometric_augmentation_global, _, self.geometric_augmentation_local = cuts
            self.global_transfo1, self.global_transfo2, self.local_transfo = changes
            self.views = [*zip(cuts, changes), *zip(cuts[2:] * (n_local - 1), changes[2:] * (n_local - 1))]

        def __call__(self, image):
            return [change(cut(image)) for cut, change in self.views]

    crops = SimpleNamespace(global_crops_scale=(0.32, 1.0), local_crops_scale=(0.05, 0.32))
    return SimpleNamespace(config=lambda name: SimpleNamespace(crops=crops),
                           data=SimpleNamespace(DataAugmentationDINO=Augmentation))  # fmt: skip


@pytest.mark.parametrize("blur", ["released", "paper"])
def test_crops_of_one_law_agree_and_those_of_another_do_not(blur, study, monkeypatch):
    monkeypatch.setattr(study, "SIZES", {"n_local": 2, "global_size": 32, "local_size": 16})
    pixels = Pixels.from_array(draw_scenes(8, 48).images, [0] * 8, ["scene"])
    rows = list(study.crop_rows(stand_in(blur), pixels, 12))
    told = {(row["part"], row["what"]): row for row in rows}
    assert told["local", "area of the box"]["n"] == [192, 192] and told["global 2", "flip"]["n"] == [96, 96]
    assert {part for part, _ in told} == {"global 1", "global 2", "local", "pixels"}
    failed = study.failures(rows)
    if blur == "released":
        assert failed == [] and told["pixels", "readable reference with the same seed"]["largest"] == 0
        assert told["pixels", "released crops made by ours, with jitter: largest"]["largest"] > 0
    else:
        assert {("global 1", "blur"), ("global 2", "blur"), ("pixels", "readable reference with the same seed")} <= {*failed}
        assert not [part for part, _ in failed if part == "local"]


def test_what_differs_fails_and_so_does_what_is_no_number(study):
    same = study.drawn("masks", "same", np.arange(900) % 7, np.arange(900) % 7)
    rows = [
        same, study.drawn("masks", "share", np.arange(900) % 2 == 0, np.arange(900) % 3 == 0),
        study.drawn("masks", "kinds", (np.arange(900) % 6).astype(np.int16), (np.arange(900) % 7).astype(np.int16)),
        study.drawn("masks", "law", np.linspace(0, 1, 900), np.linspace(0, 1.2, 900)), same | {"what": "nan", "p": np.nan},
        study.same("lr", "within", 3, 1e-15, 1e-14), study.same("lr", "beyond", 3, 1e-13, 1e-14),
        study.same("lr", "no number", 3, np.nan, 1e-14),
    ]  # fmt: skip
    assert [what for _, what in study.failures(rows)] == ["share", "kinds", "law", "nan", "beyond", "no number"]
    assert rows[1]["z"] == pytest.approx((1 / 2 - 1 / 3) / np.sqrt((1 / 4 + 2 / 9) / 900))
