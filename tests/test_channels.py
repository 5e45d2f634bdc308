"""Pictures of other than three channels, from the file to the judged network: grey ones, and arrays of numpy."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from minidino.config import override, preset
from minidino.evaluate import evaluate
from minidino.images.batches import crop_laws
from minidino.images.crops import mean_and_std, multi_crop, normalise
from minidino.images.datasets import open_images
from minidino.images.decode import BadImage, decode, decode_channels
from minidino.images.pixels import Pixels, load_pixels
from minidino.learning.adapt import fit_channels
from minidino.learning.teacher import build_student
from minidino.model.vit import build_vit
from minidino.model.weights import backbone_of, export_weights
from minidino.pictures import colors_last
from minidino.plan import sizes_of
from minidino.runs import Run
from minidino.scaling import parameters
from minidino.stages import adapt, distill, go_on, open_world, pretrain

COLOURLESS = ("crops.saturation=0", "crops.hue=0", "crops.grayscale_probability=0")
TINY = ("data.short_side=24", "crops.global_size=16", "crops.local_size=8", "vit.width=16", "vit.depth=1", "vit.heads=2",
        "optim.batch_size=8", "run.steps=4", "run.knn_every=2", "run.checkpoint_every=2", "heads.n_prototypes=16",
        "heads.hidden_dim=16", "heads.bottleneck_dim=8")  # fmt: skip


def array(channels, height=20, width=30, kind=np.uint8, seed=0):
    top = np.iinfo(kind).max
    return np.random.default_rng(seed).integers(0, top, (height, width, channels), kind, endpoint=True)


def npy(values, **options):
    file = io.BytesIO()
    np.save(file, values, **options)
    return file.getvalue()


def config_for(channels, source="", steps=4):
    return override(preset("scenes-cpu"), [*COLOURLESS, *TINY, f"data.channels={channels}", f"data.source={source}",
                                           f"run.steps={steps}"])  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of arrays with five channels, of which the fourth tells the class; one array is damaged, one has three."""
    root = tmp_path_factory.mktemp("arrays")
    for i in range(40):
        values = array(5, seed=i)
        values[..., 3] = 40 if i % 2 else 200
        place = root / ("odd" if i % 2 else "even")
        place.mkdir(exist_ok=True)
        np.save(place / f"{i:02d}.npy", values)
    (root / "even" / "cut.npy").write_bytes(npy(array(5))[:500])
    np.save(root / "odd" / "three.npy", array(3))
    return root


# ---------------------------------------------------------------- bytes


def test_arrays_are_read_as_they_are_and_16_bits_scaled():
    for channels in (1, 2, 4, 5):
        values = array(channels)
        np.testing.assert_array_equal(decode_channels(npy(values), channels), values)
        np.testing.assert_array_equal(decode_channels(npy(np.asfortranarray(values)), channels), values)
    deep = np.array([[0, 128, 129, 65535]], np.uint16)
    np.testing.assert_array_equal(decode_channels(npy(deep), 1)[0, :, 0], [0, 0, 1, 255])
    assert decode_channels(npy(array(4, kind=np.uint16)), 4).dtype == np.uint8


def test_an_array_of_three_channels_is_a_picture_and_a_picture_is_one_grey_channel():
    colours = array(3)
    np.testing.assert_array_equal(np.asarray(decode(npy(colours))), colours)
    file = io.BytesIO()
    Image.fromarray(colours).save(file, "PNG")
    grey = decode_channels(file.getvalue(), 1)
    np.testing.assert_array_equal(grey[..., 0], np.asarray(Image.fromarray(colours).convert("L")))
    with pytest.raises(BadImage, match=r"an array of numpy \(.npy\) with 4 channels is expected"):
        decode_channels(file.getvalue(), 4)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (npy(array(3)), r"expected an array \(H, W, 4\) of uint8 or uint16, got \(20, 30, 3\) of uint8"),
        (npy(array(4).astype(np.float32)), "got .* of float32"),
        (npy(np.zeros((4, 4), np.uint8)), r"got \(4, 4\)"),
        (npy(np.zeros((0, 4, 4), np.uint8)), "has no pixels"),
        (npy(np.array([{}], dtype=object), allow_pickle=True), "of object"),
        (npy(array(4))[:-1], "damaged array of numpy"),
        (b"\x93NUMPY\x01\x00", "no readable header"),
        (b"\x93NUMPY\x09\x09junk", "no readable header"),
        (b"hello", "not an image: text"),
    ],
)
def test_what_is_no_such_array_is_refused_with_its_reason(data, words):
    with pytest.raises(BadImage, match=words):
        decode_channels(data, 4)


def test_a_header_that_promises_too_much_is_refused_before_a_pixel_is_read():
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": (10**6, 10**6, 4), "fortran_order": False, "descr": "|u1"})
    with pytest.raises(BadImage, match="more than the limit"):
        decode_channels(file.getvalue(), 4)


# ---------------------------------------------------------------- pixels and crops


def test_channels_of_stored_pictures_are_resized_as_those_of_a_picture(tmp_path):
    colours = array(3)
    np.save(tmp_path / "a.npy", np.concatenate([colours, colours[..., :1]], 2))
    four = load_pixels(open_images(tmp_path), 16, channels=4, progress=False)
    (tmp_path / "a.npy").unlink()
    Image.fromarray(colours).save(tmp_path / "a.png")
    three = load_pixels(open_images(tmp_path), 16, progress=False)
    assert four.image(0).shape == (4, 16, 24)
    for way in (lambda x: x.squares(12), lambda x: x.whole(12), lambda x: x.whole(9, np.array([[2, 1, 20, 15]])),
                lambda x: x.batch([0])[0]):  # fmt: skip
        torch.testing.assert_close(way(four)[:, :3], way(three), rtol=0, atol=0)
        torch.testing.assert_close(way(four)[:, 3], way(three)[:, 0], rtol=0, atol=0)


def test_pixels_kept_on_disk_are_those_of_the_asked_channels(folder, tmp_path):
    images = open_images(folder)
    five = load_pixels(images, 24, tmp_path, progress=False, channels=5)
    assert five.channels == 5 and len(five) == 40
    quarantine = (tmp_path / "quarantine.csv").read_text()
    assert 'even/cut.npy,"damaged array' in quarantine and "odd/three.npy" in quarantine
    again = load_pixels(images, 24, tmp_path, progress=False, channels=5)
    assert again.fingerprint() == five.fingerprint()
    assert len(load_pixels(images, 24, tmp_path, progress=False)) == 1  # the only one with three


def test_without_operations_of_colour_three_of_four_channels_are_cropped_as_a_picture():
    laws = crop_laws(replace(preset("scenes-cpu").crops, saturation=0.0, hue=0.0, grayscale_probability=0.0, contrast=0.0,
                             blur="released", solarize_probability=0.5))  # fmt: skip
    four = torch.from_numpy(np.stack([array(4, seed=i) for i in range(3)])).permute(0, 3, 1, 2)
    sizes, seeds = torch.tensor([[20, 30]] * 3), [1, 2, 3]
    crops = [multi_crop(x, sizes, laws[:2], laws[2], 2, seeds) for x in (four, four[:, :3].contiguous())]
    for with_four, with_three in zip(*crops, strict=True):
        undone = [x * std + mean for x in (with_four, with_three) for mean, std in [mean_and_std(x.shape[2], "cpu")]]
        torch.testing.assert_close(undone[0][:, :, :3], undone[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_pictures_of_any_number_of_channels_are_cropped_and_jittered(channels):
    laws = crop_laws(replace(preset("scenes-cpu").crops, saturation=0.0, hue=0.0, blur="paper", contrast=0.4))
    images = torch.from_numpy(np.stack([array(channels, seed=i) for i in range(4)])).permute(0, 3, 1, 2)
    crops, local = multi_crop(images, torch.tensor([[20, 30]] * 4), laws[:2], laws[2], 3, [1, 2, 3, 4])
    assert crops.shape[2] == local.shape[2] == channels and crops.isfinite().all() and local.isfinite().all()
    assert -2 <= crops.min() and crops.max() <= 2  # a half, a quarter
    assert normalise(images).shape == images.shape


def test_colour_needs_red_green_and_blue():
    with pytest.raises(ValueError, match="crops.saturation: expected 0 where data.channels is not 3, got 0.2"):
        override(preset("imagenette-gpu"), "data.channels=4")
    with pytest.raises(ValueError, match="data.channels: expected 3 for drawn scenes, got 4"):
        override(preset("scenes-cpu"), [*COLOURLESS, "data.channels=4"])
    assert override(preset("imagenette-gpu"), [*COLOURLESS, "data.channels=4"]).data.channels == 4


def test_what_is_drawn_has_three_channels():
    shown = colors_last(torch.rand(2, 5, 6, 7))
    assert shown.shape == (2, 6, 7, 3)
    grey = colors_last(torch.rand(2, 1, 6, 7))
    assert grey.shape == (2, 6, 7, 3) and (grey[..., 0] == grey[..., 2]).all()


# ---------------------------------------------------------------- networks


def test_a_network_says_which_channels_it_expects():
    with pytest.raises(ValueError, match=r"expected images \(B, 4, H, W\), got \(2, 3, 16, 16\)"):
        build_vit("vit_tiny", width=16, depth=1, heads=2, patch_size=8, img_size=16, in_chans=4)(torch.zeros(2, 3, 16, 16))


def test_parameters_by_formula_are_those_of_the_network():
    config = config_for(5, "somewhere")
    counted = sum(p.numel() for p in build_student(config).backbone.parameters())
    assert parameters(sizes_of(config, "cpu"))["backbone"] == counted


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_a_fitted_kernel_answers_to_grey_pictures_as_before(channels):
    kernel = torch.randn(6, 1, 4, 4).expand(-1, 3, -1, -1)  # all channels alike
    x = torch.rand(2, 1, 8, 8)
    before, after = (torch.conv2d(x.expand(-1, k.shape[1], -1, -1), k) for k in (kernel, fit_channels(kernel, channels)))
    torch.testing.assert_close(after, before)
    if channels == 3:
        assert torch.equal(fit_channels(kernel, 3), kernel)


# ---------------------------------------------------------------- the whole way


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    config = config_for(5, folder, steps=30)
    return pretrain(config, tmp_path_factory.mktemp("run") / "five")


def test_a_folder_of_arrays_is_learned_from_and_bad_ones_are_listed(run):
    found, world = run
    assert world.train.channels == 5 and len(world.train) + len(world.test) == 40
    lists = "".join(path.read_text() for path in found.folder.glob("pixels/*/quarantine.csv"))
    assert "cut.npy" in lists and "three.npy" in lists
    assert [record["knn"] for record in found.records() if "knn" in record]


@pytest.mark.parametrize("task", ["knn", "linear", "retrieval"])
def test_such_a_network_is_probed_beside_what_needs_none(run, folder, tmp_path, task):
    found = evaluate(run[0].folder, task, str(folder), baselines=("pixels", "random"), out=tmp_path, cache=tmp_path / "c")
    assert set(found["answers"]) == {"trained", "random ViT", "pixels"}
    if task == "knn":  # the fourth channel tells the class
        assert found["answers"]["pixels"]["accuracy"] == 1.0


@pytest.mark.parametrize("task", ["robustness", "segmentation", "depth", "dpt"])
def test_tasks_of_colour_pictures_say_so(run, folder, tmp_path, task):
    with pytest.raises(ValueError, match="sees 5 channels"):
        evaluate(run[0].folder, task, str(folder), out=tmp_path, cache=tmp_path / "c")


def test_its_weights_alone_are_probed_and_exported(run, folder, tmp_path):
    weights = run[0].folder / "weights.safetensors"
    found = evaluate(weights, "knn", str(folder), 16, out=tmp_path, cache=tmp_path / "c")
    assert 0 <= found["answers"]["trained"]["accuracy"] <= 1
    vit = backbone_of(weights).eval()
    out = export_weights(vit, tmp_path / "hf", "huggingface")
    said = json.loads((out / "preprocessor_config.json").read_text())
    assert said["image_mean"] == [0.5] * 5 and said["image_std"] == [0.25] * 5 and not said["do_convert_rgb"]
    x = torch.randn(2, 5, 16, 16)
    torch.testing.assert_close(backbone_of(out).eval()(x), vit(x), atol=1e-5, rtol=1e-5)


def test_it_goes_on_at_a_higher_resolution_and_teaches(run, tmp_path):
    adapted, _ = adapt(run[0].folder, tmp_path / "larger", 24, 2)
    assert Run(adapted.folder).config().data.channels == 5
    (student,), _ = distill(run[0].folder, tmp_path / "small", ["vit_tiny,width=16,depth=1,heads=2"], 2)
    assert backbone_of(student.folder / "weights.safetensors").patch_embed.proj.in_channels == 5


def test_weights_of_colour_pictures_go_on_with_five_channels(folder, tmp_path):
    vit = build_vit("vit_tiny", width=16, depth=1, heads=2, patch_size=8, img_size=16)
    weights = export_weights(vit, tmp_path / "rgb.safetensors", "hub")
    found, world = go_on(weights, tmp_path / "five", config_for(5, folder))
    assert world.train.channels == 5
    assert backbone_of(found.folder / "weights.safetensors").patch_embed.proj.in_channels == 5


def test_pictures_of_other_channels_than_the_config_says_are_refused(folder, tmp_path):
    world = open_world(config_for(5, folder), tmp_path / "pixels")
    with pytest.raises(ValueError, match="data.channels: expected 5, as the pictures have, got 3"):
        pretrain(config_for(3, folder), tmp_path / "run", world)


def test_a_grey_picture_is_one_channel(tmp_path):
    for i in range(12):
        place = tmp_path / "grey" / str(i % 2)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array(3, seed=i)).save(place / f"{i}.png")
    run, world = pretrain(config_for(1, tmp_path / "grey"), tmp_path / "run")
    assert world.train.channels == 1 and world.train.image(0).shape == (1, 20, 30)
    assert backbone_of(run.folder / "weights.safetensors").patch_embed.proj.in_channels == 1
    assert Pixels.from_array(array(1)[None], [0], ["x"]).squares(8).shape == (1, 1, 8, 8)
