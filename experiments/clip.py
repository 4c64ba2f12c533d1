"""CLIP's visual encoder (arXiv 2103.00020), which the paper compares with QWen-VL's and finds worse (section 4.3).

    224×224 image ─► 256 patches of 14×14 pixels, and a class token ─► 24 transformer layers ─► a token per patch

Every module has its name in the official files of ViT-L/14, under `vision_model.`; --vit then takes such a folder,
too. `python -m experiments.clip` pre-trains the tiny one anew. Before: vit.py, whose place it takes.
"""
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from experiments.outside import ROOT, Experiment
from tiny import pretrain
from tiny.world import write_json
from visualchat import ENCODERS, Variant
from vit import small_random
from weights import by_name, load_strictly, read_json, read_tensors, sizes, without_values

PREFIX, ENTRY = "vision_model.", "vision_config"        # of the tensors' names; what config.json has it under
FIXED = {"hidden_act": "quick_gelu", "num_channels": 3}     # what else config.json may say of it


@dataclass(frozen=True)
class ClipConfig:
    """Sizes, under the names of `vision_config` in the official config.json."""
    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_eps: float = 1e-5

    @property
    def n_queries(self) -> int:     # one for each patch
        return (self.image_size // self.patch_size) ** 2

    @property
    def output_dim(self) -> int:
        return self.hidden_size


# The tiny one is smaller than the QWen-like one of tiny/pretrain.py, and its images have half the side. Its four
# patches make the four tokens that the tiny LLaMA expects of an image.
TINY = ClipConfig(image_size=32, patch_size=16, hidden_size=64, intermediate_size=256, num_hidden_layers=4,
                  num_attention_heads=4)
STEPS = 6000            # After them, attributes read from 2,000 fresh images: shape 0.9715, the others 1.0000.


# ---- parts ----

class ClipEmbeddings(nn.Module):
    def __init__(self, config: ClipConfig):
        super().__init__()
        self.class_embedding = small_random(config.hidden_size)
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(1 + config.n_queries, config.hidden_size)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embedding(images).flatten(2).mT                # (I, P, C)
        x = torch.cat((self.class_embedding.expand(len(images), 1, -1), patches), dim=1)
        return x + self.position_embedding(torch.arange(x.shape[1], device=x.device))       # (I, 1 + P, C)


class ClipLayer(nn.Module):
    """The class token and every patch attend to all of them, then each passes through an MLP."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.heads, width, inner = config.num_attention_heads, config.hidden_size, config.intermediate_size
        self.layer_norm1 = nn.LayerNorm(width, config.layer_norm_eps)
        self.self_attn = nn.ModuleDict({f"{x}_proj": nn.Linear(width, width) for x in ("q", "k", "v", "out")})
        self.layer_norm2 = nn.LayerNorm(width, config.layer_norm_eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer_norm1(x)
        q, k, v = (self.self_attn[f"{name}_proj"](y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for name in "qkv")                                       # (I, H, 1 + P, D)
        x = x + self.self_attn["out_proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](y * torch.sigmoid(1.702 * y))            # "quick" GELU


# ---- the whole ----

def read_clip_config(path: Path) -> ClipConfig:
    """Sizes from config.json's `vision_config`; raises ValueError for those of another encoder."""
    if not isinstance(found := read_json(path).get(ENTRY), dict):
        raise ValueError(f"{path} has no `{ENTRY}` section: is this a CLIP folder?")
    if other := {name: found[name] for name, value in FIXED.items() if found.get(name, value) != value}:
        raise ValueError(f"{path} has {other!s:.120}, expected {FIXED} as in OpenAI's CLIP")
    config = sizes(ClipConfig, found, path)
    if config.image_size % config.patch_size or config.hidden_size % config.num_attention_heads:
        raise ValueError(f"{path}: expected whole patches and equal heads, found {config}")
    return config


class ClipVision(nn.Module):
    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = config
        self.embeddings = ClipEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)         # the official spelling
        layers = nn.ModuleList(ClipLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)       # see forward

    def forward(self, images: Tensor) -> Tensor:
        """Normalized pixels (I, 3, image_size, image_size) to features (I, n_queries, output_dim).

        They are the official `last_hidden_state`, as in the paper's released code, but without the class token,
        for which alone the last LayerNorm is: it is loaded and never used.
        """
        x = self.pre_layrnorm(self.embeddings(images))
        for layer in self.encoder["layers"]:
            x = layer(x)
        return x[:, 1:]

    @classmethod
    def from_pretrained(cls, folder: Path | str, dtype=None, device="cpu") -> "ClipVision":
        """From an official CLIP folder, without the text encoder; raises FileNotFoundError or ValueError."""
        folder = Path(folder)
        with without_values():
            vit = cls(read_clip_config(folder / "config.json"))
        load_strictly(vit, by_name(cls.tensors(folder), folder), folder, dtype, device)
        return vit

    @staticmethod
    def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
        """(name in this module, tensor); old files' `position_ids` are what `forward` counts itself."""
        return ((name.removeprefix(PREFIX), tensor) for name, tensor in read_tensors(folder, PREFIX)
                if name != f"{PREFIX}embeddings.position_ids")


ENCODERS[ENTRY] = ClipVision
# The variant changes nothing, since build looks into the folder, but it marks the results.
EXPERIMENTS = {"clip": Experiment("CLIP's visual encoder in place of QWen-VL's; by itself the tiny one", "4.3",
                                  Variant(), options=("--vit", str(ROOT / "weights/tiny/clip")))}


# ---- the tiny one ----

def write_clip(vit: ClipVision, folder: Path):
    """config.json with its `vision_config` section, and FP16 weights under CLIP's names."""
    write_json(folder / "config.json", {"model_type": "clip", ENTRY: FIXED | asdict(vit.config)})
    weights = {PREFIX + name: tensor.half() for name, tensor in vit.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def main():
    """Make the tiny encoder anew, by the pre-training of the tiny QWen-like one."""
    torch.manual_seed(0)                                        # for the first weights
    write_clip(pretrain.pretrain_vit(ClipVision(TINY), STEPS, "CLIP"), pretrain.WEIGHTS / "clip")


if __name__ == "__main__":
    main()
