"""Pictures return the numbers they drew and leave a PNG that shows something; the report asks nobody for anything."""

import base64
import errno
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from minidino import pictures, report


def rng(seed=0):
    return np.random.default_rng(seed)


def images(n, size=16):
    return torch.from_numpy(rng(n).integers(0, 256, (n, 3, size, size), dtype=np.uint8))


def assert_shows_something(path):
    from PIL import Image

    pixels = np.asarray(Image.open(path).convert("RGB")).astype(float)
    assert pixels.shape[1] == pictures.WIDTH * pictures.DPI  # the one width
    assert pixels.std() > 10


def pixels_of(path, color):
    """How many pixels have exactly this colour."""
    from matplotlib.colors import to_rgb
    from PIL import Image

    wanted = np.round(np.array(to_rgb(color)) * 255)
    return int((np.asarray(Image.open(path).convert("RGB")) == wanted).all(-1).sum())


def test_severity_curves_draw_every_corruption_of_every_subject_in_its_colour(tmp_path):
    kinds = [f"kind_{i}" for i in range(7)]
    found = {"trained": {kind: [0.9, 0.8, 0.7] for kind in kinds}, "pixels": {kind: [0.3, 0.2, 0.1] for kind in kinds}}
    means = pictures.severity_curves(found, tmp_path / "curves.png")
    assert means == {"trained": pytest.approx(0.8), "pixels": pytest.approx(0.2)}
    assert_shows_something(tmp_path / "curves.png")
    assert min(pixels_of(tmp_path / "curves.png", pictures.COLORS[who]) for who in found) > 7 * 50


def test_networks_are_drawn_by_their_size_and_kind(tmp_path):
    from PIL import Image

    rows = {"large": ("teacher", 400, 0.7, 0.01), "small": ("student", 100, 0.6, 0.01), "alone": ("trained", 100, 0.4, 0.0)}
    found = pictures.against_parameters(rows, tmp_path / "sizes.png")
    assert found == {"large": (400, 0.7), "small": (100, 0.6), "alone": (100, 0.4)}
    assert min(pixels_of(tmp_path / "sizes.png", pictures.COLORS[row[0]]) for row in rows.values()) > 50
    said = Image.open(tmp_path / "sizes.png").info["Description"]
    assert said == "small: 60.0%, 4.0 times fewer parameters than large, 70.0%"


def test_crops_and_masks(tmp_path):
    masks = torch.zeros(2, 9, dtype=torch.bool)
    masks[1, :3] = True
    found = pictures.crops_and_masks(
        images(1)[0], torch.randn(2, 3, 12, 12), torch.randn(3, 3, 8, 8), masks, 4, tmp_path / "sub" / "crops.png"
    )
    assert found == {"masked_frac": [0.0, pytest.approx(1 / 3)], "n_global": 2, "n_local": 3}
    assert_shows_something(tmp_path / "sub" / "crops.png")


def test_training_curves_draw_every_key_on_one_clock(tmp_path):
    records = [{"step": i, "seconds": i / 2, "dino": 5.5 - 0.01 * i, "teacher_entropy": 5.0} for i in range(100)]
    records[10]["knn"], records[90]["knn"], records[5]["dino"] = 0.2, 0.6, None
    curves = pictures.training_curves(records, tmp_path / "curves.png", math.log(256))
    assert set(curves) == {"dino", "teacher_entropy", "knn"}
    np.testing.assert_allclose(curves["knn"], [[5.0, 45.0], [0.2, 0.6]])
    assert len(curves["dino"][0]) == 99 and curves["dino"][1][-1] == pytest.approx(4.51)
    assert_shows_something(tmp_path / "curves.png")
    assert pixels_of(tmp_path / "curves.png", pictures.COLORS["trained"]) > 20  # the dots of k-NN
    pictures.training_curves([{"step": 0, "seconds": 0.0, "loss": 1.0}])  # nothing to draw is no crash


def test_baselines_are_ranked_and_coloured_by_meaning(tmp_path):
    results = {"RGB pixels": (0.33, 0.0), "trained ViT": (0.66, 0.05), "random ViT": (0.16, 0.01)}
    found = pictures.baselines_bar(results, tmp_path / "bars.png")
    assert found["names"] == ["trained ViT", "RGB pixels", "random ViT"] and found["means"] == [0.66, 0.33, 0.16]
    assert found["sds"] == [0.05, 0.0, 0.01]
    drawn = [pixels_of(tmp_path / "bars.png", pictures.COLORS[name]) for name in ("trained", "pixels", "random")]
    assert drawn[0] > 1.5 * drawn[1] > 2 * drawn[2] > 0  # bars as long as the numbers


def test_scenes_sheet(tmp_path):
    masks = np.zeros((2, 8, 8), int)
    masks[:, 4:] = 1
    masks[0, 2:6, 2:6] = 13
    depth = np.where(masks == 0, 40.0, 3.0)
    depth[1, 7] = 2.0
    pictures_last = images(2, 8).permute(0, 2, 3, 1)  # channels last are understood
    found = pictures.scenes_sheet(pictures_last, masks, depth, ["snowman", "flag"], tmp_path / "scenes.png")
    assert found["classes_seen"] == [0, 1, 13] and found["depth_m"] == (2.0, 40.0)
    assert found["share"] == [56 / 128, 56 / 128, 16 / 128]
    assert_shows_something(tmp_path / "scenes.png")
    assert pixels_of(tmp_path / "scenes.png", pictures.SEGMENTS[13]) > 100


def test_a_title_is_a_sentence_about_the_numbers_and_goes_into_the_file(tmp_path):
    from PIL import Image

    pictures.funnel({"files": 200, "chosen": 50}, tmp_path / "funnel.png")
    assert Image.open(tmp_path / "funnel.png").info["Description"] == "50 of 200 files are left after 'chosen'"


def test_a_name_with_dollars_is_no_formula(tmp_path):
    from PIL import Image

    pictures.funnel({"files": 200, r"unlike a$\frac$b": 50}, tmp_path / "funnel.png")
    assert repr(r"unlike a$\frac$b") in Image.open(tmp_path / "funnel.png").info["Description"]


def test_the_grid_of_a_linear_probe_shows_its_best(tmp_path):
    table = {"1 block": {1e-3: 0.5, 1e-1: 0.25}, "4 blocks": {1e-3: 0.625, 1e-2: 0.75}}
    found = pictures.grid_heatmap(table, tmp_path / "grid.png")
    nan = math.nan
    np.testing.assert_array_equal(found["grid"], [[0.5, nan, 0.25], [0.625, 0.75, nan]])
    assert found["lrs"] == [1e-3, 1e-2, 1e-1] and found["best"] == ("4 blocks", 1e-2, 0.75)
    assert_shows_something(tmp_path / "grid.png")
    pictures.grid_heatmap({"one": {1.0: 0.5}})  # one cell is no crash
    with pytest.raises(ValueError, match="at least one row"):
        pictures.grid_heatmap({"1 block": {}})


def test_the_learning_rates_of_a_grid_can_be_read(monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: drawn.append(figure))
    monkeypatch.setattr(pictures, "DPI", 80)
    rates = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1]
    pictures.grid_heatmap({"4 blocks, mean patch": dict.fromkeys(rates, 0.5)})
    drawn[0].draw_without_rendering()
    labels = drawn[0].axes[0].get_xticklabels()
    assert [float(label.get_text()) for label in labels] == rates
    places = [label.get_window_extent() for label in labels]
    assert min(b.x0 - a.x1 for a, b in zip(places, places[1:])) > 4  # px between two


# ---------------------------------------------------------------- the report


class Page(HTMLParser):
    """Collects tags, attributes and text, as a browser would see them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def page(tmp_path):
    pictures.baselines_bar({"trained": (0.6, 0.1)}, tmp_path / "bar.png")
    sections = [
        report.Section("Does <it> learn?", "Yes & no.\n\nSecond <script>alert(1)</script> part.", tmp_path / "bar.png"),
        report.Section('A "quoted" table', table=[["name", "top-1 <%>"], ["<b>pixels</b>", 0.123456], ["n", 12], ["tiny", 3.678e-05]]),
    ]
    path = report.write_report(tmp_path / "report.html", "Run <1> & co", sections)
    assert path == tmp_path / "report.html" and sorted(p.name for p in tmp_path.iterdir()) == ["bar.png", "report.html"]
    return path.read_text(encoding="utf-8"), (tmp_path / "bar.png").read_bytes()


def test_report_is_self_contained(page):
    text, png = page
    parsed = Page(text)
    without_pictures = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    for word in ("http", "url(", "@import", "href", "<link", "<script", "file:"):
        assert word not in without_pictures.lower()
    sources = [value for _, name, value in parsed.attributes if name in ("src", "srcset", "data")]
    assert len(sources) == 1
    kind, data = sources[0].split(",")
    assert kind == "data:image/png;base64" and base64.b64decode(data) == png
    assert ("img", "alt", "Does <it> learn?") in parsed.attributes
    assert ("meta", "name", "viewport") in parsed.attributes and "prefers-color-scheme: dark" in text


def test_report_escapes_everything(page):
    text, _ = page
    parsed = Page(text)
    assert "script" not in parsed.tags and "it" not in parsed.tags and "b" not in parsed.tags
    for shown in ("Run <1> & co", "Does <it> learn?", "Second <script>alert(1)</script> part.", "top-1 <%>"):
        assert shown in parsed.text
    assert parsed.tags.count("p") == 2 and parsed.tags.count("tr") == 4
    assert "<b>pixels</b>" in parsed.text and "0.1235" in parsed.text and ("td", "class", "number") in parsed.attributes
    assert "0.0000" in parsed.text and "e-05" not in parsed.text


def test_a_report_on_a_full_disk_leaves_nothing_behind_and_names_itself(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError):
        report.write_report(tmp_path / "report.html", "t", [])
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert report.write_report(tmp_path / "new" / "report.html", "a name \udcff", []).exists()


def test_report_refuses_what_is_not_a_png(tmp_path):
    (tmp_path / "figure.png").write_text("<svg>")
    with pytest.raises(ValueError, match="expected a PNG"):
        report.write_report(tmp_path / "report.html", "t", [report.Section("s", figure=tmp_path / "figure.png")])
    assert not (tmp_path / "report.html").exists()
