"""Protocols that DINOv2's evaluation takes over from others: their code, run beside ours on the same inputs.

    python benchmarks/official_protocols.py run FOLDER     data/results/official-protocols.json
    python benchmarks/official_protocols.py draw           its table

FOLDER holds the clones that CLONES names; opencv-python-headless, wand with ImageMagick and setuptools<80 have to be there.
Revisited Oxford and Paris judge made-up rankings, DINO's scripts a network with random weights and features of drawn
scenes, ImageNet-C damages photographs. A difference of more than the tolerance of a row is an error, and so is a p-value
below ALPHA / number of tests.
"""

import argparse
import json
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from official import _parts, _stored, _table
from official_corruptions import EXACT, SIDE, corrupted, numbers, script
from official_data import ALPHA, listening
from official_probes import Rows, compared, halves, noisy
from PIL import Image
from recipe import store
from released import checked, command_line, on_cpu, stand_in
from skimage import data
from torch import Tensor

from minidino.images.crops import normalise
from minidino.images.pixels import Pixels
from minidino.images.scenes import draw_scenes
from minidino.model.vit import VisionTransformer, build_vit
from minidino.model.weights import load_weights
from minidino.probes import knn, propagation, retrieval
from minidino.probes.dense import upsample
from minidino.probes.patches import attended

CLONES = {  # folder: repository, a folder in it, commit
    "revisitop": ("filipradenovic/revisitop", "python", "be39832"),
    "dino": ("facebookresearch/dino", ".github", "7c446df"),
    "robustness": ("hendrycks/robustness", "ImageNet-C", "8190fe3"),
    "augmix": ("google-research/augmix", "third_party", "9b9824c"),
}


# ---------------------------------------------------------------- Revisited Oxford and Paris


def lists(draws: np.random.Generator, n: int) -> dict[str, Any]:
    """What one of n database pictures is to a query, and the box of the query; some lists are empty."""
    counts = draws.integers(0, 12, 3) * (draws.random(3) < 0.8)
    rows = np.split(draws.permutation(n)[: counts.sum()], counts.cumsum()[:-1])
    box = np.sort(draws.uniform(0, 120, (2, 2)), axis=0) + [[0, 0], [8, 8]]
    return dict(zip(("easy", "hard", "junk"), rows, strict=True), bbx=box.ravel().tolist())


def judged(near: Any, queries: list[retrieval.Query], protocol: str, ks: tuple[int, ...] = (1, 5, 10)) -> Tensor:
    """The mean, the average precision of each query, mean precisions at ks."""
    found = retrieval.mean_average_precision(near, queries, protocol, ks)
    return numbers(found["map"], found["ap"], list(found["precision"].values()))


def by_protocol(part: str, what: str, left: dict[str, Any], near: Any, queries: list[retrieval.Query], names: str) -> Rows:
    """Against what a script left behind."""
    for name in names.split():
        theirs = numbers(*(left[f"{x}{name[0].upper()}"] for x in ("map", "aps", "mpr")))
        yield compared(part, f"{what}, {name}: mAP, AP of each query, mP@k", theirs, judged(near, queries, name), EXACT)


def revisited(folder: Path) -> Rows:
    """The examples that come with the protocol, as they are, on 70 made-up queries in a database of 1,000."""
    code, draws, n = folder / "revisitop" / "python", np.random.default_rng(0), 1000
    sys.path.append(str(code))
    features = {"Q": draws.normal(size=(32, 70)), "X": draws.normal(size=(32, n))}
    gnd = [lists(draws, n) for _ in range(70)]
    for i, one in enumerate(gnd):
        for name, share in (("easy", 0.6), ("hard", 0.4), ("junk", 0.6)):
            features["X"][:, one[name]] += share * features["Q"][:, [i]]
    with tempfile.TemporaryDirectory() as there:
        names = {"imlist": [str(i) for i in range(n)], "qimlist": [str(i) for i in range(70)]}
        Path(f"{there}/gnd.json").write_text(json.dumps({"gnd": gnd} | names, default=lambda x: x.tolist()))
        queries = retrieval.read_ground_truth(f"{there}/gnd.json").queries
        pictures = draws.integers(0, 256, (70, 128, 128, 3), dtype=np.uint8)
        for i, picture in enumerate(pictures):
            Image.fromarray(picture).save(f"{there}/{i}.png")
        cfg = {"gnd": gnd, "nq": 70, "n": 0, "qim_fname": lambda _, i: f"{there}/{i}.png"}
        nothing = dict.fromkeys(("download_datasets", "download_features"), lambda _: None)
        stand_in({"download": nothing, "dataset": {"configdataset": lambda *_: cfg}})
        with patch("scipy.io.loadmat", lambda _: features):
            left = script(code / "example_evaluate.py")
        with listening(Image.Image, "crop") as cut:
            script(code / "example_process_images.py")
    near = (features["X"].T @ features["Q"]).T
    yield from by_protocol("landmarks", "70 queries", left, near, queries, "easy medium hard")
    compute_map, tied = import_module("evaluate").compute_map, near.round()
    ranks = np.argsort(-tied, axis=1, kind="stable").T
    theirs = numbers(*compute_map(ranks, [{"ok": x["easy"]} for x in gnd], [3, 5000])[:3])  # nothing is junk
    ours = judged(tied, [retrieval.Query(x["easy"].tolist()) for x in gnd], "easy", (3, 5000))
    yield compared("landmarks", "ties in order of their rows, no junk, k above the database", theirs, ours, EXACT)
    boxes = retrieval.query_pictures(Pixels.from_array(pictures, [0] * 70, ["a"]), queries)
    theirs = [torch.from_numpy(np.array(picture)) for _, _, picture in cut]
    ours = [torch.from_numpy(boxes.image(i).transpose(1, 2, 0)) for i in range(70)]
    yield compared("landmarks", "queries cut out at boxes of fractions of px", theirs, ours, 0)


# ---------------------------------------------------------------- DINO


def dino(folder: Path) -> Rows:
    """Tokens and attention, k-NN, retrieval from JPEG files, ranks of copies, labels that go from frame to frame."""
    theirs = noisy(import_module("vision_transformer").vit_tiny(16))
    weights = theirs.state_dict() | {"mask_token": torch.zeros(1, 192)}  # DINO has none
    ours = load_weights(build_vit("vit_tiny", patch_size=16, img_size=SIDE, layerscale=None), weights).eval()
    for size in ((224, 224), (96, 160), (320, 240)):
        x, what = torch.randn(2, 3, *size), f"at {size[0]} x {size[1]} px"
        layers = ours.get_intermediate_layers(x, 3, return_class_token=True)
        layers = [torch.cat([cls[:, None], patches], 1) for patches, cls in layers]
        yield compared("DINO", f"tokens of three blocks {what}", theirs.get_intermediate_layers(x, 3), layers)
    x, y, test_x, test_y = halves()
    units, asked = (F.normalize(x), y, F.normalize(test_x), test_y), [10, 20, 100, 200]
    classify = import_module("eval_knn").knn_classifier
    votes = [classify(*units, k, 0.07, num_classes=int(y.max()) + 1)[0] / 100 for k in asked]
    ours_too = list(knn.knn_accuracy(x, y, test_x, test_y, asked).values())
    yield compared("DINO", f"k-NN accuracy, k of {asked}", numbers(votes), numbers(ours_too), EXACT)
    near, same = retrieval.similarity(test_x, x), test_y[:, None] == y
    ranked = same.gather(1, near.argsort(dim=1, descending=True, stable=True))
    score = import_module("eval_copy_detection").score_ap_from_ranks_1
    theirs_ap = [score(row.nonzero()[:, 0].tolist(), int(row.sum())) for row in ranked]
    found = numbers(theirs_ap), numbers([retrieval.average_precision(row) for row in ranked])
    yield compared("DINO", "AP of copy detection", *found, EXACT)
    with tempfile.TemporaryDirectory() as there:
        torch.save(theirs.state_dict(), f"{there}/weights.pth")
        yield from from_files(folder / "dino", Path(there), ours)
    yield from video()


def from_files(code: Path, there: Path, ours: VisionTransformer) -> Rows:
    """Attention in one picture; then 32 drawn scenes, 160 x 224 px, of which twelve look for their kind among all."""
    network = "--arch", "vit_tiny", "--patch_size", "16", "--pretrained_weights", f"{there}/weights.pth"
    Image.fromarray(data.chelsea()).save(there / "cat.png")
    left = script(code / "visualize_attention.py", *network, "--image_size", "200", "300", "--image_path", f"{there}/cat.png",
                  "--output_dir", str(there), "--threshold", "0.6")  # fmt: skip
    maps = ours.attention_maps(left["img"])[0, :, 0, 1:].unflatten(1, (left["w_featmap"], left["h_featmap"]))
    seen = torch.from_numpy(left["attentions"][:, ::16, ::16])
    yield compared("DINO", f"attention of the class token, {seen.shape[1]} x {seen.shape[2]} patches", seen, maps)
    marked = attended(maps[None])[0]
    yield compared("DINO", "patches that hold 0.6 of it", numbers(left["th_attn"][:, ::16, ::16]), numbers(marked), EXACT)
    scenes, pictures = draw_scenes(32, 48, seed=7), there / "roxford5k" / "jpg"
    pictures.mkdir(parents=True)
    for i, image in enumerate(scenes.images):
        Image.fromarray(image).resize((SIDE, 160)).save(pictures / f"{i}.jpg", quality=95)
    alike = [[j for j in range(32) if scenes.labels[j] == scenes.labels[i] and j != i] for i in range(12)]
    gnd = [{"easy": found[::2], "hard": found[1::2], "junk": [i]} for i, found in enumerate(alike)]
    names = [str(i) for i in range(32)]
    about = {"gnd": [{key: np.array(x, int) for key, x in one.items()} for one in gnd], "imlist": names, "qimlist": names[:12]}
    (there / "roxford5k" / "gnd_roxford5k.pkl").touch()
    with patch("pickle.load", lambda _: about):
        options = "--data_path", str(there), "--use_cuda", "0", "--num_workers", "0"
        left = script(code / "eval_image_retrieval.py", *network, *options)
    seen = torch.stack([torch.from_numpy(np.array(Image.open(pictures / f"{i}.jpg"))).permute(2, 0, 1) for i in range(32)])
    rows = F.normalize(ours(normalise(seen)), dim=1)
    yield compared("DINO", "features of JPEG files", left["train_features"], rows)
    near, queries = retrieval.similarity(rows[:12], rows), [retrieval.Query(**one) for one in gnd]
    yield from by_protocol("DINO", "retrieval from files", left, near, queries, "medium hard")


def video() -> Rows:
    """One labelled frame and the next, with no limit to a neighbourhood; every patch is of one class."""
    code, (h, w), n_classes = import_module("eval_video_segmentation"), (15, 20), 4
    first, frame = torch.randn(2, h * w, 24).unbind()
    frame = 0.6 * frame + first.roll(3, 0)
    classes = F.interpolate(torch.randint(0, n_classes, (1, 1, 3, 4)).float(), (h, w))[0, 0].long()
    one_hot = F.one_hot(classes, n_classes).permute(2, 0, 1).float()[None]
    args = argparse.Namespace(size_mask_neighborhood=0, topk=5)
    with patch.object(code, "extract_feature", lambda *_, **__: (frame, h, w)):
        held = code.label_propagation(args, None, None, [first.T], [one_hot])[0]
    maps = [x.T.reshape(1, -1, h, w) for x in (first, frame)]
    masks = classes.repeat_interleave(8, 0).repeat_interleave(8, 1)[None]
    with listening(propagation, "_transfer") as heard:
        named = propagation.propagate_labels(maps[0], masks, maps[1], n_classes)
    yield compared("DINO", "video: what each patch holds", held, heard[0][2])
    large = upsample(held, masks.shape[1:])
    yield compared("DINO", "video: classes of pixels, without stretching", large.argmax(1), named, 0)
    stretched = code.norm_mask(large[0].clone()).argmax(0)
    yield {"part": "choices", "what": "video: share of pixels that stretching each class to 0 to 1 names otherwise",
           "value": (stretched != named[0]).double().mean().item()}  # fmt: skip


# ---------------------------------------------------------------- all of them


@torch.no_grad()
def run(folder: Path) -> None:
    commits = {name: checked(folder / name, *about) for name, about in CLONES.items()}
    torch.set_num_threads(1)
    on_cpu()
    np.in1d, Image.ANTIALIAS = np.isin, Image.Resampling.LANCZOS  # their names when that code was written
    sys.path.append(str(folder / "dino"))
    import_module("utils").init_distributed_mode = lambda _: None
    torch.manual_seed(0)
    rows = [row for part in (revisited, dino, corrupted) for row in part(folder)]
    p = ALPHA / sum("p" in row for row in rows)
    wrong = [row for row in rows if "difference" in row and not row["difference"] <= row["tolerance"] * row["scale"]]
    if wrong := wrong + [row for row in rows if not row.get("p", 1) >= p]:
        raise SystemExit("not the same:\n" + "\n".join(map(str, wrong)))
    versions = [import_module("wand.version").MAGICK_VERSION.split(" Q")[0], f"OpenCV {import_module('cv2').__version__}"]
    print(store("official-protocols", {"released": commits, "with": versions, "rows": rows}))


def tables() -> dict[str, str]:
    stored, rows = _stored("protocols"), []
    for part, found in _parts(stored).items():
        if some := [row for row in found if "difference" in row]:
            laws, largest = [row["p"] for row in found if "p" in row], max(row["difference"] / row["scale"] for row in some)
            drawn_too = [len(laws), f"{min(laws):.3f}"] if laws else ["", ""]
            rows.append([part, len(some), f"{sum(row['n'] for row in some):,}", f"{largest:.1e}", *drawn_too])
    heads = ["", "comparisons", "numbers", "largest difference, as a share of the largest number", "laws", "smallest p-value"]
    words = ", ".join([*(f"{CLONES[name][0]} at {commit}" for name, commit in stored["released"].items()), *stored["with"]])
    return {"official-protocols": _table(heads, rows, stored, words)}


if __name__ == "__main__":
    command_line(__doc__, run, tables, f"the clones {', '.join(CLONES)}")
