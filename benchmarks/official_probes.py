"""The evaluation code and the heads that DINOv2's authors released, run beside ours on the same inputs.

    python benchmarks/official_probes.py run CHECKOUT      of facebookresearch/dinov2

How far apart are the numbers? In float32 on a CPU, with random weights, or with what the small trained network that comes
along says of drawn scenes. A difference of more than TOLERANCE, as a share of the largest number of the released code, is
an error. Results: data/results/official-probes.json.
"""

import argparse
import contextlib
import importlib.util
import io
import sys
import tempfile
from collections.abc import Iterator
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from recipe import ROOT, store
from released import borrow
from skimage import data
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from minidino.images.crops import normalise
from minidino.images.datasets import open_images
from minidino.images.pixels import load_pixels
from minidino.images.scenes import draw_scenes
from minidino.judge import trained_backbone
from minidino.model.released import RELEASED
from minidino.model.vit import VisionTransformer, build_vit
from minidino.probes import depth, knn, logistic, segmentation
from minidino.probes.dense import feature_maps, upsample
from minidino.probes.features import extract
from minidino.probes.grid import train_grid
from minidino.probes.heads import load_head
from minidino.probes.linear import PUBLISHED_LRS
from minidino.runs import Run

TOLERANCE = 1e-5
SMALL = ("dinov2_vits14", "dinov2_vits14_reg")  # that are run; of the others names and shapes are compared
SIZES = ((224, 224), (518, 518), (224, 448), (98, 70))  # px
D, KINDS = 12, 5  # channels and classes of small heads
Rows = Iterator[dict[str, Any]]


def compared(part: str, what: str, theirs: Any, ours: Any, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """A row: of two nests of numbers how many there are, the largest difference and the largest number of theirs."""
    a, b = list(_flat(theirs)), list(_flat(ours))
    if [x.shape for x in a] != [x.shape for x in b]:
        raise SystemExit(f"{part}, {what}: shapes {[tuple(x.shape) for x in a]} and {[tuple(x.shape) for x in b]}")
    a, b = (torch.cat([x.detach().double().flatten() for x in each]) for each in (a, b))
    row = {"part": part, "what": what, "n": len(a), "difference": (a - b).abs().max().item(),
           "scale": a.abs().max().item(), "tolerance": tolerance}  # fmt: skip
    print(f"{part:11} {what:86} {row['n']:>9,} {row['difference']:.1e} of {row['scale']:.3g}", flush=True)
    return row


def _flat(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor | float | int):
        yield torch.as_tensor(x)
    else:
        for part in x.values() if isinstance(x, dict) else x:
            yield from _flat(part)


# ---------------------------------------------------------------- the released code, with neither a GPU nor mmseg


class BaseDecodeHead(nn.Module):
    """For inputs that are concatenated."""

    input_transform, align_corners = "resize_concat", False

    def __init__(self, in_channels: list[int], channels: int, num_classes: int, in_index: list[int]):
        super().__init__()
        self.in_channels, self.channels, self.in_index = sum(in_channels), channels, in_index
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def cls_seg(self, x: Tensor) -> Tensor:
        return self.conv_seg(x)


REGISTRY = SimpleNamespace(register_module=lambda: lambda kind: kind)
STAND_INS = {  # of mmseg 0.27 registries, base classes and `resize`, by its copy; cuML's logistic regression by scikit-learn's
    "cuml.linear_model": {
        "LogisticRegression": lambda C, max_iter, **_: LogisticRegression(C=C, max_iter=20 * max_iter, tol=1e-9)},
    "mmseg.models": {"builder": SimpleNamespace(HEADS=REGISTRY, SEGMENTORS=REGISTRY)},
    "mmseg.models.builder": {"HEADS": REGISTRY, "SEGMENTORS": REGISTRY},
    "mmseg.models.decode_heads.decode_head": {"BaseDecodeHead": BaseDecodeHead},
    "mmseg.models.segmentors.base": {"BaseSegmentor": nn.Module},
    "mmseg.core": {"add_prefix": None},
    "mmseg.ops": {"resize": lambda *args, **options: import_module("dinov2.hub.depth.ops").resize(*args, **options)},
}  # fmt: skip


def file(name: str) -> ModuleType:
    """A file of the released code by itself, without what its package imports."""
    path = Path(import_module("dinov2").__file__).parent.joinpath(*name.split(".")).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(f"dinov2.{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def noisy(model: nn.Module) -> nn.Module:
    """The same, for evaluation, with every parameter large enough to matter."""
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name.endswith(("token", "tokens", "pos_embed")):
                x.normal_(std=0.5)
            elif x.ndim == 1:
                x.add_(0.1 * torch.randn_like(x))
    return model.eval()


@cache
def pair(name: str) -> tuple[nn.Module, VisionTransformer]:
    """Both backbones, with the same weights."""
    theirs, ours = noisy(getattr(import_module("dinov2.hub.backbones"), name)(pretrained=False)), build_vit(**RELEASED[name])
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours.eval()


# ---------------------------------------------------------------- pictures and backbones


def preprocessing() -> Rows:
    """Photographs of 1:1 and 2:3, whose sides stay whole numbers."""
    photographs = data.astronaut(), data.chelsea()[:, :450], data.coffee(), data.rocket()[:420, :630]
    transform = import_module("dinov2.data.transforms").make_classification_eval_transform(resize_size=224, crop_size=224)
    with tempfile.TemporaryDirectory() as folder:
        for i, photograph in enumerate(photographs):
            Image.fromarray(photograph).save(f"{folder}/{i}.png")
        ours = normalise(load_pixels(open_images(folder), 224, progress=False).squares(224))
    theirs = torch.stack([transform(Image.fromarray(photograph)) for photograph in photographs])
    yield compared("pictures", "shorter side to 224 px, the centre, normalised", theirs, ours, 0)


def backbones() -> Rows:
    hub, shapes = import_module("dinov2.hub.backbones"), ([], [])
    for name, sizes in RELEASED.items():
        with torch.device("meta"):
            theirs, ours = getattr(hub, name)(pretrained=False).state_dict(), build_vit(**sizes).state_dict()
        if list(theirs) != list(ours):
            raise SystemExit(f"{name}: other names than the released ones")
        for found, each in zip(shapes, (theirs, ours), strict=True):
            found += [n for x in each.values() for n in x.shape]
    yield compared("backbones", f"names and shapes of all {len(RELEASED)}", *shapes, 0)
    for name in SMALL:
        images = [torch.randn(1, 3, *size) for size in SIZES]
        masks = [torch.rand(1, h * w // 14**2) < 0.4 for h, w in SIZES]
        theirs, ours = ([each.forward_features(*x) for x in zip(images, masks, strict=True)] for each in pair(name))
        theirs = [[x for key, x in tokens.items() if key != "masks"] for tokens in theirs]
        what = f"masked tokens at {', '.join(f'{h} x {w}' for h, w in SIZES)} px"
        yield compared("backbones", f"{name}, {what}", theirs, [tokens[:-1] for tokens in ours])
        how = [(n, *map(bool, (i & 1, i & 2, i & 4))) for n in (1, 4, [2, 5, 8, 11], [11, 3]) for i in range(8)]
        layers = ([each.get_intermediate_layers(images[-1], *options) for options in how] for each in pair(name))
        yield compared("backbones", f"{name}, get_intermediate_layers in {len(how)} ways", *layers)


# ---------------------------------------------------------------- classes of pictures


@cache
@torch.no_grad()
def scenes() -> tuple[list[list[tuple[Tensor, Tensor]]], Tensor]:
    """Patch and class tokens of the last four blocks for 1,000 scenes, in batches of 250, and what they show."""
    drawn, vit = draw_scenes(1000, 48, seed=5), trained_backbone(Run(ROOT / "data/runs/scenes-cpu"), torch.device("cpu"))
    batches = normalise(torch.as_tensor(drawn.images).permute(0, 3, 1, 2)).split(250)
    return [list(vit.get_intermediate_layers(x, 4, return_class_token=True)) for x in batches], torch.as_tensor(drawn.labels)


def halves() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batches, y = scenes()
    x = torch.cat([tokens[-1][1] for tokens in batches])
    x = x / x.std()
    return x[:500], y[:500], x[500:], y[500:]


def nearest() -> Rows:
    theirs, metrics = import_module("dinov2.eval.knn"), import_module("dinov2.eval.metrics")
    (x, y, test_x, test_y), ks = halves(), [10, 20, 100, 200]
    n_classes, unit, test_unit = int(y.max()) + 1, F.normalize(x), F.normalize(test_x)
    modules = theirs.create_module_dict(
        module=partial(theirs.KnnModule, T=0.07, device="cpu", num_classes=n_classes), n_per_class_list=[-1, 20], n_tries=3,
        nb_knn=ks, train_features=unit, train_labels=y)  # fmt: skip
    votes, near = modules(test_unit), modules["full"]["1"].compute_neighbors(test_unit)[0]
    yield compared("k-NN", "similarities of the 200 nearest", near, knn.neighbours(x, test_x, 200)[0])
    full, named = votes["full"]["1"], [knn.knn_predict(x, y, test_x, k) for k in ks]
    yield compared("k-NN", f"classes named, k of {ks}", [full[k].argmax(1) for k in ks], named, 0)
    metric = metrics.build_topk_accuracy_metric(metrics.AccuracyAveraging.MEAN_ACCURACY, n_classes)
    accuracies = [metric(full[k], test_y)["top-1"] for k in ks]
    yield compared("k-NN", "accuracies", accuracies, knn.knn_accuracy(x, y, test_x, test_y, ks))
    few = [logistic.few_per_class(y, 20, seed) for seed in range(3)]
    drawn = [theirs.filter_train(theirs.create_class_indices_mapping(y), 20, seed) for seed in range(3)]
    yield compared("k-NN", "rows drawn, 20 of each class, three times", drawn, few, 0)
    seen = [vote.argmax(1) for found in votes["20 per class"].values() for vote in found.values()]
    named = [knn.knn_predict(x[rows], y[rows], test_x, k) for rows in few for k in votes["20 per class"]["0"]]
    yield compared("k-NN", "classes named from them", seen, named, 0)


@torch.enable_grad()
def linear() -> Rows:
    theirs, (batches, y) = import_module("dinov2.eval.linear"), scenes()
    labels, width = y.split(250), batches[0][0][1].shape[1]
    n_classes, steps, lrs = int(y.max()) + 1, 40, [10 * lr for lr in PUBLISHED_LRS]  # for so few steps
    order = [step % 3 for step in range(steps)]  # the fourth batch is held out
    features = [{"cls_blocks": torch.stack([cls for _, cls in tokens], 1), "mean_patch": tokens[-1][0].mean(1)}
                for tokens in batches]  # fmt: skip

    def trained(rates: list[float]) -> tuple[list[float], list[tuple[Tensor, Tensor]]]:
        """Held-out accuracies, weights and biases of our heads."""
        grid = train_grid([(features[i], labels[i]) for i in order], steps, n_classes, rates)
        ones = [n * width for n in (1, 1, 4, 4)]  # the column of the biases
        heads = [(w, at) for matrix, at in zip(grid.weights, ones, strict=True) for w in matrix.split(n_classes)]
        accuracies = [row["accuracy"] for row in grid.table(features[3], labels[3])]
        return accuracies, [(torch.cat([w[:, :at], w[:, at + 1 :]], 1), w[:, at]) for w, at in heads]

    heads, groups = theirs.setup_linear_classifiers(batches[0], [1, 4], lrs, 250, n_classes)
    groups = [{"params": list(group["params"]), "lr": group["lr"]} for group in groups]
    for group, first in zip(groups, trained([0.0] * len(lrs))[1], strict=True):  # our first weights
        for x, start in zip(group["params"], first, strict=True):
            x.data.copy_(start)
    search = torch.optim.SGD(groups, momentum=0.9, weight_decay=0)
    look, loaders = nn.Module(), [[(torch.full((250,), i), labels[i]) for i in rows] for rows in (order, [3])]
    look.forward = lambda rows: batches[int(rows[0])]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        best = theirs.eval_linear(
            feature_model=look, linear_classifiers=heads, train_data_loader=loaders[0], val_data_loader=loaders[1],
            metrics_file_path=f"{folder}/metrics", output_dir=folder, max_iter=steps, checkpoint_period=steps,
            running_checkpoint_period=steps, eval_period=0, training_num_classes=n_classes, optimizer=search,
            scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(search, steps, eta_min=0),
            metric_type=theirs.MetricType.MEAN_ACCURACY)[0]["best_classifier"]  # fmt: skip
    accuracies, mine = trained(lrs)
    yield compared("linear", f"weights of 52 heads after {steps} steps", [group["params"] for group in groups], mine)
    names, chosen = list(theirs.remove_ddp_wrapper(heads).classifiers_dict), accuracies.index(max(accuracies))
    yield compared("linear", "which head is the best", names.index(best["name"]), chosen, 0)
    yield compared("linear", "its accuracy", best["accuracy"], accuracies[chosen])


def logistic_regression() -> Rows:
    theirs, (x, y, test_x, test_y) = import_module("dinov2.eval.log_regression"), halves()
    yield compared("logistic", "values of C", (10**theirs.C_POWER_RANGE).tolist(), logistic.PUBLISHED_CS)
    theirs.C_POWER_RANGE = theirs.C_POWER_RANGE[10:32:3]  # scikit-learn takes its time
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    val, rows = order[:50], order[50:]
    best, c = theirs.sweep_C_values(
        train_features=x[rows], train_labels=y[rows], metric_type=theirs.MetricType.MEAN_ACCURACY,
        test_data_loader=DataLoader(TensorDataset(x[val], y[val]), batch_size=50), num_classes=int(y.max()) + 1)  # fmt: skip
    ours = logistic.logistic_regression(x, y, test_x, test_y, logistic.PUBLISHED_CS[10:32:3])
    mine = ours["best_c"], ours["table"][ours["best_c"]]
    yield compared("logistic", "C that is chosen, and its accuracy there", (c, best["top-1"]), mine)
    model = theirs.train_for_C(C=c, max_iter=1000, train_features=x, train_labels=y)
    probs = model(test_x, test_y)["preds"], ours["model"].logits(test_x).softmax(1)
    yield compared("logistic", "probabilities of the last model", *probs, 1e-4)  # where both stopped


# ---------------------------------------------------------------- classes and distances of pixels


def released_heads() -> Rows:
    """Whole models of the released hub beside our backbone and head, from pixels on."""
    classifiers, depthers = import_module("dinov2.hub.classifiers"), import_module("dinov2.hub.depthers")
    images = torch.randint(0, 256, (2, 3, 100, 150), dtype=torch.uint8)
    sizes = [images[:, :, :98, :140], images]  # the second gets a border
    for name, n in ((name, n) for name in SMALL for n in (1, 4)):
        model = getattr(classifiers, f"{name}_lc")(pretrained=False, layers=n).eval()
        model.backbone, ours = pair(name)
        x = extract(ours, sizes[0], blocks=n, progress=False)
        read = torch.cat([x["cls"] if n == 1 else x["cls_blocks"].flatten(1), x["mean_patch"]], 1)
        found = load_head(model.linear_head.state_dict())(read)
        yield compared("classes", f"{name}_lc, {n} block{'s' * (n > 1)}", model(normalise(sizes[0])), found)
    theirs, ours = pair(SMALL[0])
    for name, n, reading in (("ld", {"layers": 1}, "lin1"), ("ld", {"layers": 4}, "lin4"), ("dd", {}, "lin4")):
        model = getattr(depthers, f"dinov2_vits14_{name}")(pretrained=False, **n).eval()
        model.backbone.load_state_dict(theirs.state_dict())
        last = model.decode_head.conv_depth if name == "ld" else model.decode_head.conv_depth.head[4]
        last.bias.uniform_(0, 2)  # so that no ReLU hides what is before it
        far = model.decode_head.max_depth
        head = load_head({f"decode_head.{key}": x for key, x in model.decode_head.state_dict().items()}, max_depth=far)
        pairs = []
        for part in sizes:
            maps = feature_maps(ours, part, depth.taps(12, reading), norm=False, class_token=True, progress=False)
            about = [{"ori_shape": part.shape[2:], "flip": False}] * 2
            pairs.append((model.inference(normalise(part), about, True)[:, 0],
                          torch.cat(list(depth.predict_depth(head, maps, part.shape[2:])))))  # fmt: skip
        yield compared("distances", f"dinov2_vits14_{name} on {reading}, up to {far:.0f} m", *zip(*pairs, strict=True))
    with torch.device("meta"):
        models = [getattr(depthers, f"dinov2_vit{size}14_ld")(pretrained=False) for size in "sblg"]
    read = [model.backbone.forward.keywords["n"] for model in models]
    yield compared("distances", "blocks that are read", read, [depth.taps(len(m.backbone.blocks)) for m in models], 0)


@torch.enable_grad()
def heads_in_training() -> Rows:
    """Outputs, losses and gradients on random maps, in float64: at its kink a ReLU answers to the last bit of a number."""
    torch.set_default_dtype(torch.float64)
    for n in (1, 4):
        linear_head = file("eval.segmentation.models.decode_heads.linear_head")
        head = noisy(linear_head.BNHead(in_channels=[D] * n, channels=D * n, num_classes=KINDS, in_index=list(range(n))))
        maps = torch.randn(n, 2, D, 5, 7)
        ours = load_head(head.state_dict())(torch.cat(list(maps), 1))
        yield compared("classes", f"segmentation head on {n} block{'s' * (n > 1)}", head(list(maps)), ours)
    hub, loss = import_module("dinov2.hub.depth"), file("eval.depth.models.losses.sigloss").SigLoss(max_depth=10)
    linear = {"classify": True, "upsample": 4, "channels": 8 * D}
    dpt = {"embed_dims": D, "post_process_channels": [3, 6, 9, 12], "readout_type": "project", "channels": 32}
    for kind, options in (("BNHead", linear), ("DPTHead", dpt)):
        head = noisy(getattr(hub, kind)(in_channels=[D] * 4, max_depth=10.0, loss_decode=loss, **options)).train()
        ours = load_head(head.state_dict(), max_depth=10.0).train()
        tokens = [(torch.randn(3, D, 5, 7), torch.randn(3, D)) for _ in range(4)]
        truth = 12 * torch.rand(3, 1, 40, 50) - 2  # some unknown, some too far
        maps = torch.cat([x for p, c in tokens for x in (p, c[..., None, None].expand_as(p))], 1)
        said, seen = head(tokens, None), ours(maps)
        valid = (truth[:, 0] > 0) & (truth[:, 0] <= 10)
        a = head.losses(said, truth)["sigloss"]
        b = depth.silog_loss(upsample(seen[:, None], truth.shape[2:])[:, 0], truth[:, 0], valid)
        (a + b).backward()
        gradients = ([dict(each.named_parameters())[name].grad for name, _ in head.named_parameters()] for each in (head, ours))
        yield compared("distances", f"{kind} and its loss", [said, a], [seen[:, None], b])
        yield compared("distances", f"{kind}, gradients", *gradients)
    torch.set_default_dtype(torch.float32)


@torch.enable_grad()
def losses() -> Rows:
    kinds = file("eval.depth.models.losses.sigloss").SigLoss, file("eval.depth.models.losses.gradientloss").GradientLoss
    truth = (12 * torch.rand(20, 1, 37, 29) - 2).clamp_min(0)  # so many that each scale compares pictures, as released
    about = truth[:, 0], ((truth > 0) & (truth <= 10))[:, 0]
    cases = {
        "SigLoss": (kinds[0](max_depth=10), depth.silog_loss),
        "SigLoss, first steps": (kinds[0](max_depth=10, warm_up=True), partial(depth.silog_loss, warm_up=True)),
        "GradientLoss": (kinds[1](max_depth=10), partial(depth.gradient_loss, mode="released")),
    }
    for name, (theirs, ours) in cases.items():
        x = (10 * torch.rand(20, 1, 37, 29) + 0.01).requires_grad_()
        found = theirs(x, truth), ours(x[:, 0], *about)
        yield compared("distances", f"{name} and its gradient", *([loss, *torch.autograd.grad(loss, x)] for loss in found))


def windows() -> Rows:
    """Sliding windows and mirrors, which of the released code only the Mask2Former segmentor has."""
    segmentor = file("eval.segmentation_m2f.models.segmentors.encoder_decoder_mask2former").EncoderDecoderMask2Former
    look = nn.Conv2d(3, KINDS, 3, padding=1)
    for size, window, stride in (((40, 60), 32, 21), ((70, 33), 32, 32), ((33, 95), 64, 43)):
        config = SimpleNamespace(mode="slide", stride=(stride, stride), crop_size=(window, window))
        model = SimpleNamespace(test_cfg=config, num_classes=KINDS, align_corners=False)
        model.encode_decode = lambda x, _: look(x / 99)
        model.slide_inference = MethodType(segmentor.slide_inference, model)
        images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
        about = ({"ori_shape": size, "flip": flip, "flip_direction": "horizontal"} for flip in (False, True))
        seen = [segmentor.inference(model, x.float(), [a], True) for x, a in zip((images, images.flip(3)), about, strict=True)]
        ours = segmentation.predict_windows(lambda x: look(x / 99), images, window, stride, flip=True)
        what = f"{size[0]} x {size[1]} px through {window} px every {stride} px, and mirrored"
        yield compared("classes", what, (seen[0] + seen[1]) / 2, ours)


PARTS = (preprocessing, backbones, nearest, linear, logistic_regression, released_heads, heads_in_training, losses, windows)


@torch.no_grad()
def run(checkout: Path) -> None:
    commit = borrow(checkout, STAND_INS)
    sys.modules["dinov2.eval.depth.models.builder"] = SimpleNamespace(LOSSES=REGISTRY)
    torch.manual_seed(0)
    rows = [row for part in PARTS for row in part()]
    wrong = [row for row in rows if not row["difference"] <= row["tolerance"] * row["scale"]]
    if wrong:
        raise SystemExit("not the same:\n" + "\n".join(map(str, wrong)))
    print(store("official-probes", {"released": commit, "rows": rows}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run",))
    parser.add_argument("checkout", type=Path, help="of facebookresearch/dinov2")
    run(parser.parse_args().checkout)


if __name__ == "__main__":
    main()
