"""Vision Transformer with the official DINOv2 parameter names, run over packed crops.

    images (B, 3, H, W) -> patches (B, N, D) -> [cls | registers | patches] (B, T, D) -> packed rows (sum of B*T, D)
    -> blocks -> norm -> Tokens

Crops of several sizes go through the blocks as rows of one matrix; only attention has to know where a crop ends.
"""

from collections.abc import Collection, Sequence
from operator import index
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minidino.model.attention import attention_weights, resolve
from minidino.model.layers import DROP_PATH, Block, Groups, seqlens_of

# name: width D, depth, heads h, published feed-forward
SIZES = {
    "vit_tiny": (192, 12, 3, "mlp"),  # not published by DINOv2; DeiT's
    "vit_small": (384, 12, 6, "mlp"),
    "vit_base": (768, 12, 12, "mlp"),
    "vit_large": (1024, 24, 16, "mlp"),  # the distilled one; the from-scratch ablations use swiglu
    "vit_giant2": (1536, 40, 24, "swiglu"),
}


class Tokens(NamedTuple):
    """What the backbone says of B images, by the official names; the x_norm_ ones are after the final norm.

    Code that was written for the official dictionary may ask for tokens["x_norm_clstoken"], too.
    """

    x_norm_clstoken: Tensor  # (B, D)
    x_norm_regtokens: Tensor  # (B, R, D)
    x_norm_patchtokens: Tensor  # (B, N, D)
    x_prenorm: Tensor  # (B, T, D), T = 1 + R + N
    masks: Tensor | None  # (B, N) as given

    def __getitem__(self, key):
        return self._asdict()[key] if isinstance(key, str) else tuple.__getitem__(self, key)


def build_vit(
    name: str,
    *,
    patch_size: int = 14,
    img_size: int = 518,
    num_register_tokens: int = 0,
    ffn: str | None = None,
    layerscale: float | None = 1.0,
    drop_path_rate: float = 0.0,
    interpolate_offset: float = 0.1,
    interpolate_antialias: bool = False,
    in_chans: int = 3,
    attention: str = "auto",
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    drop_path: str = "subset",
    init_std: float = 0.02,
    recompute: bool = False,
) -> "VisionTransformer":
    """Build a randomly initialised Vision Transformer of a published size.

    Args:
        name: "vit_tiny", "vit_small", "vit_base", "vit_large" or "vit_giant2".
        patch_size: pixels of a patch side, P.
        img_size: pixels of the square image whose patch grid the position embedding is stored for.
        num_register_tokens: R; 4 in the published register models.
        ffn: "mlp", "swiglu", or None for the published choice for that name.
        layerscale: start value of the residual gains; 1e-5 for training, None or 0 removes them.
        drop_path_rate: fraction of the residuals left out while training, the same in every block.
        interpolate_offset, interpolate_antialias: see `interpolate_pos_embed`; 0.1 and False for the published
            models without registers, 0.0 and True for those with.
        attention: "auto", "triton", "sdpa" or "reference"; see `minidino.model.attention.resolve`.
        width, depth, heads: replace those of the name, for models that fit a laptop.
        init_std: of the linear weights. 0.02 as published suits widths of 384 and more; a net 64 wide that starts so
            small passes hardly anything on, and learns late.
        drop_path: "subset" (skips the work that is dropped) or "scale" (the readable one).
        recompute: while training keep of each block its input alone, and compute the block again in the backward pass.
    Raises:
        ValueError: an unknown name or choice, sizes below 1 or that do not divide.
    Source: DINOv2 paper, table 17; official dinov2/hub/backbones.py (b8931f7).
    """
    if name not in SIZES:
        raise ValueError(f"unknown backbone {name!r}: expected one of {', '.join(SIZES)}")
    named_width, named_depth, named_heads, named_ffn = SIZES[name]
    return VisionTransformer(
        width=named_width if width is None else width,
        depth=named_depth if depth is None else depth,
        heads=named_heads if heads is None else heads,
        ffn=ffn or named_ffn,
        patch_size=patch_size,
        img_size=img_size,
        num_register_tokens=num_register_tokens,
        layerscale=layerscale,
        drop_path_rate=drop_path_rate,
        interpolate_offset=interpolate_offset,
        interpolate_antialias=interpolate_antialias,
        in_chans=in_chans,
        attention=attention,
        drop_path=drop_path,
        init_std=init_std,
        recompute=recompute,
    )


class PatchEmbed(nn.Module):
    """Cut an image into P x P patches and map each to D numbers, row by row."""

    def __init__(self, patch_size: int, in_chans: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        """One token for each patch, row by row; ValueError where channels or sides do not fit."""
        patch_size, channels = self.proj.stride[0], self.proj.in_channels
        if images.shape[1] != channels:
            raise ValueError(f"expected images (B, {channels}, H, W), got {tuple(images.shape)}")
        for side in images.shape[-2:]:
            if side % patch_size:
                raise ValueError(f"crop side {side} px is not a multiple of patch_size {patch_size} px")
        return self.proj(images).flatten(2).transpose(1, 2)  # (B, D, Hp, Wp) -> (B, N, D)


def interpolate_pos_embed(
    pos_embed: Float[Tensor, "1 S D"], grid: tuple[int, int], offset: float = 0.1, antialias: bool = False
) -> Float[Tensor, "1 S2 D"]:
    """Stretch a square position embedding over another patch grid; the first position (cls) is kept.

    Bicubic, in float32, from the stored M x M grid. An offset asks for the scale (Hp + offset) / M instead of the
    size Hp; the scale moves the sampling points, so the two differ slightly.

    Args:
        pos_embed: 1 + M*M positions.
        grid: (Hp, Wp) wanted. The stored grid itself is returned untouched.
        offset: patches added to each side before dividing; 0 asks by size.
    Source: official dinov2/models/vision_transformer.py (b8931f7), interpolate_pos_encoding.
    """
    side = int((pos_embed.shape[1] - 1) ** 0.5)
    if grid == (side, side):
        return pos_embed
    patches = pos_embed[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, M, M)
    if offset:
        target = {"scale_factor": ((grid[0] + offset) / side, (grid[1] + offset) / side)}
    else:
        target = {"size": grid}
    patches = F.interpolate(patches, mode="bicubic", antialias=antialias, **target)  # (1, D, Hp, Wp)
    if patches.shape[-2:] != grid:
        got = tuple(patches.shape[-2:])
        raise ValueError(f"interpolate_offset {offset} gives a grid of {got}, expected {grid}; use 0.0")
    return torch.cat([pos_embed[:, :1], patches.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)


class VisionTransformer(nn.Module):
    """The backbone; see `build_vit` for the arguments.

    Source: official dinov2/models/vision_transformer.py (b8931f7), DinoVisionTransformer.
    Differs: always packed, without xFormers; in every rate the two residuals of a block drop independently (the
        released code shares one draw module up to rate 0.1, and takes the subset above it). `forward_features` gives a
        named tuple, not a dict.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        ffn: str,
        patch_size: int,
        img_size: int,
        num_register_tokens: int,
        layerscale: float | None,
        drop_path_rate: float,
        interpolate_offset: float,
        interpolate_antialias: bool,
        in_chans: int,
        attention: str,
        drop_path: str,
        init_std: float,
        recompute: bool,
    ):
        super().__init__()
        _check_one_of("ffn", ffn, ("mlp", "swiglu"))
        _check_one_of("drop_path", drop_path, DROP_PATH)
        at_least_one = {"width": width, "depth": depth, "heads": heads, "in_chans": in_chans, "patch_size": patch_size,
                        "img_size": img_size}  # fmt: skip
        for size, value in at_least_one.items():
            if value < 1:
                raise ValueError(f"expected {size} of at least 1, got {value}")
        if num_register_tokens < 0:
            raise ValueError(f"expected num_register_tokens of at least 0, got {num_register_tokens}")
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        if img_size % patch_size:
            raise ValueError(f"img_size {img_size} px is not a multiple of patch_size {patch_size} px")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"expected drop_path_rate in [0, 1), got {drop_path_rate}")
        self.width, self.depth, self.heads, self.patch_size = width, depth, heads, patch_size
        self.embed_dim, self.n_blocks, self.num_heads = width, depth, heads  # for code that knows the official models
        self.num_register_tokens, self.recompute = num_register_tokens, recompute
        self.interpolate_offset, self.interpolate_antialias = interpolate_offset, interpolate_antialias
        resolve(attention, "cuda")  # is there such a thing? Which one runs, each call decides by its device

        self.patch_embed = PatchEmbed(patch_size, in_chans, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (img_size // patch_size) ** 2, width))
        if num_register_tokens:
            self.register_tokens = nn.Parameter(torch.empty(1, num_register_tokens, width))
        self.mask_token = nn.Parameter(torch.empty(1, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, ffn, layerscale, drop_path_rate, drop_path, attention) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.init_weights(init_std)

    def init_weights(self, init_std: float = 0.02) -> None:
        """Draw positions (std 0.02) and linear weights (init_std) from a normal cut at 2 in absolute value; the patch
        convolution keeps torch's default."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.num_register_tokens:
            nn.init.normal_(self.register_tokens, std=1e-6)
        nn.init.zeros_(self.mask_token)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=init_std)
                nn.init.zeros_(module.bias)

    def embed(self, images: Float[Tensor, "B C H W"], masks: Bool[Tensor, "B N"] | None) -> Float[Tensor, "B T D"]:
        """Tokens before the first block: [cls | registers | patches]; masked patches are the mask token."""
        patches = self.patch_embed(images)  # (B, N, D)
        if masks is not None:
            if masks.shape != patches.shape[:2] or masks.dtype != torch.bool:
                expected = f"expected masks (B, N) = {tuple(patches.shape[:2])} of bool"
                raise ValueError(f"{expected}, got {tuple(masks.shape)} of {masks.dtype}")
            patches = torch.where(masks[..., None], self.mask_token.to(patches.dtype), patches)
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        pos = interpolate_pos_embed(self.pos_embed, grid, self.interpolate_offset, self.interpolate_antialias)
        tokens = [(self.cls_token + pos[:, :1]).expand(len(images), -1, -1)]  # registers have no position
        if self.num_register_tokens:
            tokens.append(self.register_tokens.expand(len(images), -1, -1))
        return torch.cat([*tokens, patches + pos[:, 1:]], dim=1)  # (B, 1 + R + N, D)

    def forward_packed(self, images: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Tokens]:
        """Look at batches of several crop sizes in one pass; each crop attends to itself alone.

        Args:
            images: one (B_i, C, H_i, W_i) per group, normalised; sides are multiples of the patch size.
            masks: for each group (B_i, N_i) bool, True = hidden behind the mask token, or None.
        Returns:
            One Tokens per group; equal to `forward_features` of each group alone when nothing is dropped.
        Raises:
            ValueError: a side that is not a multiple of the patch size, no group, not one mask (or None) per group, or
                a mask of another shape or type.
        Source: official dinov2/layers/block.py (b8931f7), NestedTensorBlock.forward_nested.
        """
        x, groups = self._pack(images, masks)
        for block in self.blocks:
            again = self.recompute and self.training and torch.is_grad_enabled()
            x = checkpoint(block, x, groups, use_reentrant=False) if again else block(x, groups)
        return [
            Tokens(*self._split(normed), prenorm, mask)
            for normed, prenorm, mask in zip(_unpack(self.norm(x), groups), _unpack(x, groups), masks)
        ]

    def forward_features(self, images: Float[Tensor, "B C H W"], masks: Bool[Tensor, "B N"] | None = None) -> Tokens:
        """Look at one batch and return all its tokens; masked patches are seen as the mask token."""
        return self.forward_packed([images], [masks])[0]

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        """Describe each image by its normed class token."""
        return self.forward_features(images).x_norm_clstoken

    def get_intermediate_layers(
        self,
        images: Float[Tensor, "B C H W"],
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple:
        """Patch tokens as they leave several blocks.

        Args:
            n: the last n blocks, or block indices from 0; the answer is in ascending order whatever theirs.
            reshape: give (B, D, Hp, Wp) maps instead of (B, N, D).
            return_class_token: give (patches, class token (B, D)) pairs.
            norm: apply the one final norm to each of them.
        Raises:
            ValueError: a block that does not exist.
        Source: official dinov2/models/vision_transformer.py (b8931f7).
        """
        n = n.tolist() if hasattr(n, "tolist") else n  # numbers of numpy and torch
        wanted = {index(i) for i in (range(self.depth - n, self.depth) if isinstance(n, int) else n)}
        if not wanted or min(wanted) < 0 or max(wanted) >= self.depth:
            raise ValueError(f"expected blocks from 0 to {self.depth - 1}, got {sorted(wanted)}")
        x, groups = self._pack([images], [None])
        layers = []
        for i, block in enumerate(self.blocks[: max(wanted) + 1]):
            x = block(x, groups)
            if i in wanted:
                cls, _, patches = self._split(_unpack(self.norm(x) if norm else x, groups)[0])
                if reshape:
                    patches = patches.transpose(1, 2).unflatten(2, (images.shape[-2] // self.patch_size, -1))
                layers.append((patches, cls) if return_class_token else patches)
        return tuple(layers)

    def attention_maps(self, images: Float[Tensor, "B C H W"], block: int = -1) -> Float[Tensor, "B h T T"]:
        """Where each token looks in one block; rows are queries and sum to 1; order [cls | registers | patches]."""
        x, groups = self._pack([images], [None])
        last = self.blocks[block]
        for layer in self.blocks[: block % self.depth]:
            x = layer(x, groups)
        q, k, _ = last.attn.split_heads(last.norm1(x))
        return torch.stack(attention_weights(q, k, seqlens_of(groups)))

    def _pack(self, images: Sequence[Tensor], masks: Sequence[Tensor | None]) -> tuple[Tensor, Groups]:
        """Embed each group and lay all crops end to end: (sum of B*T, D)."""
        if len(images) == 0:
            raise ValueError("expected at least one group of images, got none")
        if len(images) != len(masks):
            raise ValueError(f"expected a mask or None per group, got {len(images)} groups, {len(masks)} masks")
        tokens = [self.embed(x, mask) for x, mask in zip(images, masks)]
        groups = [(x.shape[0], x.shape[1]) for x in tokens]
        rows = [x.flatten(0, 1) for x in tokens]
        return (rows[0] if len(rows) == 1 else torch.cat(rows)), groups

    def _split(self, x: Float[Tensor, "B T D"]) -> tuple[Tensor, Tensor, Tensor]:
        """Class token (B, D), registers (B, R, D), patches (B, N, D)."""
        n_registers = self.num_register_tokens
        cls, registers, patches = x.split([1, n_registers, x.shape[1] - 1 - n_registers], dim=1)
        return cls.squeeze(1), registers, patches


def _unpack(x: Float[Tensor, "T D"], groups: Groups) -> list[Tensor]:
    """The groups of a packed sequence, each (crops, tokens, D)."""
    return [part.unflatten(0, group) for part, group in zip(x.split([b * n for b, n in groups]), groups)]


def _check_one_of(field: str, value: str, choices: Collection[str]) -> None:
    """A text option is one of its choices."""
    if value not in choices:
        raise ValueError(f"unknown {field} {value!r}: expected one of {', '.join(choices)}")
