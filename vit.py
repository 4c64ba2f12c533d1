"""QWen-VL's visual encoder (arXiv 2308.12966): a ViT, then a resampler that sums up an image in a few tokens.

    448×448 image ─► 32×32 patches ─► 48 transformer layers ─► 256 queries attend to 1,024 patches ─► 256 tokens

Two things differ from the usual ViT: there is no class token, and q, k and v lie interleaved per head in one
matrix. Every module has its name in the official checkpoint, under `transformer.visual.`. Before: llama.py (the
letters for shapes are in mmca.py). Next: visualchat.py.
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weights import by_name, load_strictly, read_json, read_tensors, sizes, without_values

PREFIX = "transformer.visual."
EPS = 1e-6
HEAD_DIM = 128                  # of the resampler, at every size
IN_CONFIG = ("image_size", "patch_size", "width", "layers", "heads", "output_dim")   # what config.json names


@dataclass(frozen=True)
class VisionConfig:
    """Sizes, under the names of `visual` in the official config.json, or as the shapes of its tensors tell."""
    image_size: int = 448
    patch_size: int = 14
    width: int = 1664
    layers: int = 48
    heads: int = 16
    mlp_width: int = 8192
    output_dim: int = 4096
    n_queries: int = 256
    grid: int = 16                  # side of the square of learned positions, before it is resized to the patches


# ---- parts ----

def small_random(*shape: int) -> nn.Parameter:
    """A parameter with random first values, for the towers that tiny/pretrain.py makes."""
    return nn.Parameter(nn.init.normal_(torch.empty(*shape), std=0.02))


@cache
def stretching(old: int, new: int, device: torch.device) -> Tensor:
    """The matrix (new², old²) that stretches a square by bicubic interpolation.

    As a product it takes next to nothing; PyTorch's kernel for interpolating took 23 of the 320 ms that a card was
    busy with a training step of 7b (results/gpu.md).
    """
    squares = torch.eye(old ** 2).view(-1, 1, old, old)                     # each point alone
    return F.interpolate(squares, (new, new), mode="bicubic", align_corners=False).flatten(1).T.to(device)


def resized(grid: Tensor, patches: int) -> Tensor:
    """A square grid of learned positions (grid², C), stretched to (patches, C) by bicubic interpolation."""
    old, new = round(grid.shape[0] ** 0.5), round(patches ** 0.5)
    return grid if old == new else (stretching(old, new, grid.device) @ grid.float()).to(grid.dtype)


class VisionAttention(nn.Module):
    """Every patch attends to all patches."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.in_proj(x).unflatten(-1, (self.heads, 3, -1)).unbind(-2)       # each (I, P, H, D)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.out_proj(out.transpose(1, 2).flatten(2))                          # (I, P, C)


class VisionMLP(nn.Module):
    def __init__(self, width: int, mlp_width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, mlp_width)
        self.c_proj = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width, eps=EPS)
        self.attn = VisionAttention(config.width, config.heads)
        self.ln_2 = nn.LayerNorm(config.width, eps=EPS)
        self.mlp = VisionMLP(config.width, config.mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(config) for _ in range(config.layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


class PoolAttention(nn.Module):
    """PyTorch's MultiheadAttention, with its parameters' names and layout.

    PyTorch's own reads the weights of `out_proj` without calling that module; under ZeRO-3 a module's weights are
    whole only while it runs.
    """

    def __init__(self, width: int):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))   # [q; k; v]
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip((q, k, v), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3))
        q, k, v = (F.linear(*part).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)    # (I, H, n_queries or P, D)
                   for part in parts)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """Learned queries attend to all patches: P patches in, as many tokens as queries out."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.query = small_random(config.n_queries, config.output_dim)
        self.pos_embed = small_random(config.n_queries, config.output_dim)
        self.kv_proj = nn.Linear(config.width, config.output_dim, bias=False)
        self.attn = PoolAttention(config.output_dim)
        self.ln_q = nn.LayerNorm(config.output_dim, eps=EPS)
        self.ln_kv = nn.LayerNorm(config.output_dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_kv(self.kv_proj(x))                                     # (I, P, output_dim)
        q = (self.ln_q(self.query) + self.pos_embed).expand(x.shape[0], -1, -1)
        k = x + resized(self.pos_embed, x.shape[1])                         # the values get no positions
        return self.attn(q, k, x)                                           # (I, n_queries, output_dim)


# ---- the whole ----

def read_vision_config(path: Path, tensors: dict[str, Tensor]) -> VisionConfig:
    """Sizes from config.json's `visual`, and from the shapes of `tensors` where it is silent."""
    if not path.exists():
        raise FileNotFoundError(f"no {path}: a QWen-VL folder has config.json and its weight shards")
    visual = read_json(path).get("visual")
    if not isinstance(visual, dict):
        raise ValueError(f"{path} has no `visual` section: is this a QWen-VL folder?")
    try:
        found = {name: visual[name] for name in IN_CONFIG} | {
            "n_queries": tensors["attn_pool.query"].shape[0],
            "mlp_width": tensors["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "grid": round(tensors["positional_embedding"].shape[0] ** 0.5)}
    except (KeyError, IndexError) as error:
        raise ValueError(f"{path.parent} is no QWen-VL folder: {error} is missing in it") from error
    config = sizes(VisionConfig, found, path)
    if (config.image_size % config.patch_size or config.width % config.heads or config.output_dim % HEAD_DIM or
            config.n_queries != math.isqrt(config.n_queries) ** 2 or config.image_size > 4096):
        raise ValueError(f"{path} has sizes that do not fit each other: expected whole patches, equal heads, an "
                         f"output_dim that {HEAD_DIM} divides, a square of queries and images of at most 4,096 "
                         f"pixels a side; found {config}")
    return config


class VisionTransformer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv2d(3, config.width, config.patch_size, config.patch_size, bias=False)
        self.positional_embedding = small_random(config.grid ** 2, config.width)
        self.ln_pre = nn.LayerNorm(config.width, eps=EPS)
        self.transformer = Transformer(config)
        self.attn_pool = Resampler(config)
        self.ln_post = nn.LayerNorm(config.output_dim, eps=EPS)

    def forward(self, images: Tensor) -> Tensor:
        """Normalized pixels (I, 3, image_size, image_size) to features (I, n_queries, output_dim)."""
        x = self.conv1(images).flatten(2).mT                                # (I, P, C)
        x = self.ln_pre(x + resized(self.positional_embedding, x.shape[1]))
        return self.ln_post(self.attn_pool(self.transformer(x)))

    @classmethod
    def from_pretrained(cls, folder: Path | str, dtype=None, device="cpu") -> "VisionTransformer":
        """The encoder of an official QWen-VL folder, from its pickled shards or from safetensors.

        Only shards that the index names for `transformer.visual.` are opened. QWen-VL's last step, `proj`, is left
        out, as in DeepSpeed-VisualChat. Raises FileNotFoundError for absent files and ValueError for wrong ones.
        """
        folder = Path(folder)
        tensors = by_name(cls.tensors(folder), folder)
        with without_values():
            vit = cls(read_vision_config(folder / "config.json", tensors))
        load_strictly(vit, tensors, folder, dtype, device)
        return vit

    @staticmethod
    def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
        """(name in this module, tensor) for all of a QWen-VL folder's encoder but `proj`, memory-mapped."""
        return ((name.removeprefix(PREFIX), tensor) for name, tensor in read_tensors(folder, PREFIX)
                if name != f"{PREFIX}proj")
