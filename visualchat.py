"""The assembled model: frozen ViT ─► trained projection ─► between word embeddings ─► frozen LLaMA-2 with MMCA.

    ids      ###  Image  1  :   ·    ·    ·    ###  Question  :  …
    kind      T     T    T  T   I    I    I     T      T      T

A position with · has no token id. Its embedding is an image token: what the projection makes of one of the tokens
that the ViT gives for an image.

Trained are the projection and LLaMA's token embedding, and only they are saved (DeepSpeed-VisualChat, section 3).
Before: mmca.py, llama.py, vit.py. Next: data.py, which makes ids, kind, labels and images.
"""
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from llama import Cache, Llama
from mmca import ATTENTION, IMAGE
from pixels import normalized
from vit import VisionTransformer
from weights import check_numbers, check_tensors, find_weights, read_file, read_json, replacing

IGNORE = -100                   # the label of a position that is no part of an answer and has no loss
TRAINED, CONFIG = "trained.safetensors", "config.json"      # the two files of a training result
TEMPLATE = 2                    # counts the versions of the prompt template (encode_round in data.py)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. As it stands here: always the likeliest one."""
    temperature: float = 0.0            # 1: drawn by the model's own chances; 0: not drawn
    top_k: int = 0                      # drawn from so many of the likeliest; 0: from all
    top_p: float = 1.0                  # and from the likeliest of them that together have this chance
    repetition_penalty: float = 1.0     # above 1: a token that the answer has already becomes less likely

    def __post_init__(self):
        """Raises ValueError for numbers that cannot be."""
        if not (0 <= self.temperature < float("inf") and self.top_k >= 0 and 0 < self.top_p <= 1
                and 0 < self.repetition_penalty < float("inf")):
            raise ValueError(f"{self}: expected finite numbers, temperature and top_k 0 or more, top_p above 0 "
                             "and at most 1, repetition_penalty above 0")
        if (self.top_p < 1 or self.top_k) and not self.temperature:
            raise ValueError(f"{self}: top_k and top_p do nothing without a temperature, such as 1")


def choose(logits: Tensor, sampling: Sampling = Sampling(), said: list[Tensor] = ()) -> Tensor:
    """The next ids (B) from logits (B, vocabulary); said: the ids (B) of each step of the answer so far."""
    if said and sampling.repetition_penalty != 1:
        before = torch.stack(tuple(said), dim=1)
        old, penalty = logits.gather(1, before), sampling.repetition_penalty
        logits = logits.scatter(1, before, torch.where(old > 0, old / penalty, old * penalty))
    if sampling.temperature < 1e-30:                    # dividing by it would overflow float32
        return logits.max(-1).indices                   # on a CPU faster than argmax
    logits = logits.float()
    scaled = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature    # at most 0: none becomes infinite
    scaled, ids = scaled.sort(descending=True)
    chance = scaled[:, :sampling.top_k or None].softmax(-1)
    chance = chance.masked_fill(chance.cumsum(-1) - chance >= sampling.top_p, 0)    # the first one always stays
    return ids.gather(-1, chance.multinomial(1))[:, 0]


class VisualChat(nn.Module):
    """A ViT and a LLaMA, ready-made, and the linear projection between them."""

    def __init__(self, vit: VisionTransformer, llama: Llama):
        super().__init__()
        self.vit = vit
        self.llama = llama
        self.projection = nn.Linear(vit.config.output_dim, llama.config.hidden_size).to(llama.embed_tokens.weight)
        self.fresh = [self.projection]      # what no tower's files hold: it starts from first values, and trains
        if not llama.embed_tokens.weight.is_meta:
            self.reset(self.projection)

    def reset(self, module: nn.Module):
        """First values of a fresh module: the projection makes image tokens as large as word embeddings."""
        if module is not self.projection:
            return module.reset_parameters()
        std = self.llama.embed_tokens.weight.float().std().item()   # QWen-VL ends in a LayerNorm: variance near 1
        nn.init.normal_(module.weight, std=std * self.vit.config.output_dim ** -0.5)
        nn.init.zeros_(module.bias)

    def freeze(self):
        """Leave only what is fresh, and the token embedding, trainable (section 3 of the paper)."""
        self.requires_grad_(False)
        for module in (*self.fresh, self.llama.embed_tokens):
            module.requires_grad_(True)

    def image_tokens(self, images: Tensor) -> Tensor:
        """Pixels (I, 3, image_size, image_size) uint8 to image tokens (I, n_queries, C)."""
        return self.projection(self.vit(normalized(images, self.projection.weight.dtype)))

    def embed(self, ids: Tensor, kind: Tensor, image_tokens: Tensor) -> Tensor:
        """Embeddings (B, T, C): of words by ids (B, T), and image_tokens (I, n_queries, C) where kind is IMAGE.

        The first image fills the first IMAGE positions, from left to right and row after row. Raises ValueError
        where the images fill more or fewer positions than there are.
        """
        x, positions = self.llama.embed_tokens(ids), kind == IMAGE
        n_images, n_tokens = len(image_tokens), self.vit.config.n_queries
        if (found := int(positions.sum())) != n_images * n_tokens:
            raise ValueError(f"{found} positions for image tokens, but {n_images} images of {n_tokens} tokens")
        x[positions] = image_tokens.flatten(0, 1)
        return x

    def forward(self, ids: Tensor, kind: Tensor, labels: Tensor, lengths: list[int], images: Tensor | None = None,
                features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """For each answer token its loss in float32, and whether it is the likeliest token, both (A).

        ids, kind, labels (B, T), labels IGNORE off the answers; lengths as in `Llama.forward`; either images
        (I, 3, image_size, image_size) or the features (I, n_queries, output_dim) that the ViT once made of them.
        Greedy decoding gives an answer exactly when all of its tokens are the likeliest.
        """
        x = self.embed(ids, kind, self.image_tokens(images) if features is None
                       else self.projection(features.to(self.projection.weight.dtype)))
        answer = torch.zeros_like(labels, dtype=torch.bool)
        answer[:, :-1] = labels[:, 1:] != IGNORE            # position t predicts t + 1
        return self.llama.lm_head(self.llama(x, kind, answer, lengths), labels[:, 1:][answer[:, :-1]].to(x.device))

    @torch.no_grad()
    def prefill(self, x: Tensor, kind: Tensor, cache: Cache, lengths: list[int] | None = None,
                image_kv: Tensor | None = None) -> Tensor:
        """Read prompts: from embeddings x (B, T, C) to the logits (conversations, vocabulary) of what follows.

        Each conversation ends in text and goes on where the cache stands. Arguments as in `Llama.forward`.
        """
        ends = torch.tensor(lengths or [x.shape[1]] * len(x), device=kind.device).cumsum(0) - 1
        read = torch.zeros_like(kind, dtype=torch.bool).flatten().index_fill(0, ends, True).view_as(kind)
        return self.llama.lm_head(self.llama(x, kind, read, lengths, cache, image_kv))

    @torch.no_grad()
    def generate(self, logits: Tensor, cache: Cache, max_new_tokens: int = 512, sampling: Sampling = Sampling(),
                 step: Callable | None = None) -> Iterator[Tensor]:
        """Go on after `prefill`: yield the next token of every conversation, ids (conversations), again and again.

        It ends after max_new_tokens or at the end of LLaMA's context. The cache then holds all tokens but the last
        one. The caller decides when to stop earlier: conversations end at different times, and under ZeRO-3 all
        ranks must stop together. step: `Llama.next_logits`, or another form of it (decode.py).
        """
        left, said = self.llama.config.max_position_embeddings - max(map(len, cache.past)), []
        for remaining in range(min(max_new_tokens, left), 0, -1):
            said.append(choose(logits, sampling, said))
            yield said[-1]
            if remaining > 1:
                logits = (step or self.llama.next_logits)(said[-1], cache)


def whole_answers(labels: Tensor, right: Tensor) -> Tensor:
    """For each answer whether all its tokens are right, from labels (B, T) and the model's `right` (A)."""
    scored = labels != IGNORE
    first = scored & ~F.pad(scored, (1, 0))[:, :-1]                            # of each answer
    number = first.flatten().cumsum(0)[scored.flatten()] - 1                   # which answer a token belongs to
    wrong = torch.zeros(int(first.sum()), device=right.device)
    return wrong.index_add(0, number.to(right.device), (~right).float()) == 0


def readable(count: int) -> str:
    """A number of parameters as people write it, such as 16.8 M or 8.67 B."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"


# ---- from folders, and back to one ----

@dataclass(frozen=True)
class ModelConfig:
    """The frozen parts of the model, as config.json of a training result names them."""
    size: str = "tiny"          # tiny, 7b, 13b or 70b
    attention: str = "mmca"     # a name in mmca.py's ATTENTION
    llama: str = ""             # folder of the language model; if empty, `find_weights` looks for it
    vit: str = ""               # folder of the visual encoder; likewise
    variant: str = ""           # a name in VARIANTS


@dataclass(frozen=True)
class Variant:
    """A model that differs from the paper's. Programs that build on this one add theirs to VARIANTS."""
    change: Callable[[VisualChat], None] = lambda model: None       # while it may lie on the meta device
    ready: Callable[[VisualChat], None] = lambda model: None        # when a training result is in it


VARIANTS = {"": Variant()}
# Visual encoders, by the entry of their config.json that describes them. Each has a `config` with image_size,
# output_dim and n_queries, and `from_pretrained` and `tensors` as in vit.py.
ENCODERS = {"visual": VisionTransformer}
REPOSITORIES = {                # for each size where LLaMA and the ViT are published
    "tiny": ("tiny/llama", "tiny/vit"),
    "7b": ("meta-llama/Llama-2-7b-hf", "Qwen/Qwen-VL"),
    "13b": ("meta-llama/Llama-2-13b-hf", "Qwen/Qwen-VL"),
    "70b": ("meta-llama/Llama-2-70b-hf", "Qwen/Qwen-VL"),
}


def towers(config: ModelConfig) -> tuple[Path, Path]:
    """The folders of LLaMA and ViT; raises ValueError for an unknown size, FileNotFoundError for no weights."""
    if config.size not in REPOSITORIES:
        raise ValueError(f"no size {config.size!r}; there are {', '.join(REPOSITORIES)}")
    llama, vit = REPOSITORIES[config.size]
    return Path(config.llama or find_weights(llama)), Path(config.vit or find_weights(vit))


def encoder_in(folder: Path) -> type:
    """The class of the visual encoder in a folder: that of QWen-VL, unless its config.json names another one."""
    path = folder / CONFIG
    described = read_json(path) if path.is_file() else {}
    return next((encoder for entry, encoder in ENCODERS.items() if entry in described), VisionTransformer)


def build(config: ModelConfig, dtype=torch.float32, device="cpu") -> VisualChat:
    """The model with its pre-trained towers and a fresh projection; raises as `towers` and their loaders do."""
    if config.attention not in ATTENTION:
        raise ValueError(f"no attention {config.attention!r}; there are {', '.join(ATTENTION)}")
    llama, vit = towers(config)
    model = VisualChat(encoder_in(vit).from_pretrained(vit, dtype, device),
                       Llama.from_pretrained(llama, config.attention, dtype, device))
    VARIANTS[config.variant].change(model)
    return model


def save(folder: Path, trained: dict[str, Tensor], config: ModelConfig):
    """Write a training result: the trained tensors by their names in VisualChat, and the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    # By absolute paths the towers are found from any working folder.
    llama, vit = (path and str(Path(path).absolute()) for path in (config.llama, config.vit))
    config = replace(config, llama=llama, vit=vit)
    with replacing(folder / TRAINED) as weights, replacing(folder / CONFIG) as settings:
        save_file({name: t.detach().cpu().contiguous() for name, t in trained.items()}, weights)
        settings.write_text(json.dumps(asdict(config) | {"template": TEMPLATE}, indent=2) + "\n")


def load_trained(model: VisualChat, tensors: dict[str, Tensor], source: Path):
    """Copy `tensors` over all parameters that `freeze` leaves trainable; raises as `check_tensors` does."""
    model.freeze()
    trained = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    check_tensors(trained, tensors, source)
    for name, parameter in trained.items():
        parameter.copy_(tensors[name])
        check_numbers(name, parameter, source)


def load(folder: Path | str, dtype=torch.float32, device="cpu") -> tuple[VisualChat, ModelConfig]:
    """The model as it was saved: towers from their own folders, the trained tensors from this one.

    dtype None: towers as their files are, what trains in float32. Raises FileNotFoundError for absent files and
    ValueError where names or shapes differ from what is trained.
    """
    folder = Path(folder)
    for name in (TRAINED, CONFIG):
        if not (folder / name).exists():
            raise FileNotFoundError(f"no {folder / name}: not the folder of a training result, or its first epoch "
                                    "has not ended; `python train.py --size tiny` makes out/tiny")
    found = read_json(folder / CONFIG)
    if (template := found.pop("template", 1)) != TEMPLATE:
        raise ValueError(f"{folder / CONFIG} was trained with version {template!r:.40} of the prompt template, "
                         f"and this code has version {TEMPLATE}: train it again")
    if not isinstance(variant := found.get("variant", ""), str) or variant not in VARIANTS:
        raise ValueError(f"{folder / CONFIG}: this is variant {variant!r:.60} of the model: open it by the "
                         "program that trained it")
    known, default = {"size": REPOSITORIES, "attention": ATTENTION, "variant": VARIANTS}, asdict(ModelConfig())
    for name, value in found.items():
        if name not in default or not isinstance(value, str) or value not in known.get(name, [value]):
            raise ValueError(f"{folder / CONFIG}: unknown setting {name!r:.40}: {value!r:.60}; expected texts "
                             f"like {default}, sizes {', '.join(REPOSITORIES)}, attentions {', '.join(ATTENTION)}")
        if name not in known and value and not os.path.isfile(f"{value}/{CONFIG}"):
            raise FileNotFoundError(f"{folder / CONFIG}: {name} is {value!r:.400}, no folder of weights: mend it")
    config = ModelConfig(**found)
    model = build(config, dtype, device)
    for module in (*model.fresh, model.llama.embed_tokens):
        module.to(dtype or torch.float32)
    load_trained(model, read_file(folder / TRAINED), folder / TRAINED)
    VARIANTS[config.variant].ready(model)
    return model, config
