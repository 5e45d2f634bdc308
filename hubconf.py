"""Backbones for torch.hub: the eight official ones, and those of one's own runs.

The official names give modules of this package, which code for the official ones can ask in the same words.

    torch.hub.load("path/of/this/checkout", "dinov2_vits14", source="local")
    torch.hub.load("path/of/this/checkout", "run", "runs/tour", source="local")
"""

dependencies = ["PIL", "jaxtyping", "numpy", "safetensors", "torch", "tqdm"]


def _official(name):
    def entry(pretrained=True, cache=None, **options):
        from minidino.model.released import RELEASED
        from minidino.model.vit import build_vit
        from minidino.model.weights import load_weights

        vit = build_vit(**{**RELEASED[name], **options})
        return (load_weights(vit, name, cache) if pretrained else vit).eval()

    entry.__name__ = name
    entry.__doc__ = f"""The official {name}, frozen features of images with sides in multiples of 14 px.

    Args:
        pretrained: with the released weights, downloaded once; without, drawn at random.
        cache: folder of the downloads; None is $XDG_CACHE_HOME/minidino/weights, or else ~/.cache/minidino/weights.
        options: of minidino.model.vit.build_vit.
    """
    return entry


dinov2_vits14, dinov2_vits14_reg = _official("dinov2_vits14"), _official("dinov2_vits14_reg")
dinov2_vitb14, dinov2_vitb14_reg = _official("dinov2_vitb14"), _official("dinov2_vitb14_reg")
dinov2_vitl14, dinov2_vitl14_reg = _official("dinov2_vitl14"), _official("dinov2_vitl14_reg")
dinov2_vitg14, dinov2_vitg14_reg = _official("dinov2_vitg14"), _official("dinov2_vitg14_reg")


def run(folder):
    """The EMA teacher's backbone of a finished run of this package."""
    from minidino.judge import trained_backbone
    from minidino.runs import Run, pick_device

    return trained_backbone(Run(folder), pick_device("cpu"))
