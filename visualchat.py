"""The assembled model: frozen ViT ─► trained projection ─► among word embeddings ─► frozen LLaMA-2 with MMCA.

    ids      ###  Image  1  :   ·    ·    ·    ###  Question  :  …
    kind      T     T    T  T   I    I    I     T      T      T

A place with · has no token id: its embedding is a projected image token.

Trained are the projection and LLaMA's token embedding, and only they are saved (DeepSpeed-VisualChat, section 3).
Before: mmca.py, llama.py, vit.py. Next file: data.py, which makes ids, kind, labels and images.
"""
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from llama import Cache, Llama, check, read_file, read_json
from mmca import ATTENTION, IMAGE, TEXT
from vit import VisionTransformer

IGNORE = -100                   # the label of a position that is no part of an answer, so nobody scores it
TRAINED, CONFIG = "trained.safetensors", "config.json"      # what a training result consists of
HERE = Path(__file__).parent


def choose(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Ids (B) by logits (B, vocabulary): the likeliest at temperature 0, else drawn from the likeliest tokens that
    together have the chance top_p. temperature is not negative, top_p above 0 and at most 1.
    """
    if temperature < 1e-30:                             # in float32 as good as 0
        return logits.max(-1).indices                   # faster than argmax on a CPU
    logits = logits.float()
    scores = (logits - logits.amax(-1, keepdim=True)) / temperature         # at most 0: none becomes infinite
    chance, ids = scores.softmax(-1).sort(descending=True)
    chance = chance.masked_fill(chance.cumsum(-1) - chance > top_p, 0)              # the first one always stays
    return ids.gather(-1, chance.multinomial(1))[:, 0]


class VisualChat(nn.Module):
    """A ViT and a LLaMA, ready-made, and the linear projection between them."""

    def __init__(self, vit: VisionTransformer, llama: Llama):
        super().__init__()
        self.vit = vit
        self.llama = llama
        self.projection = nn.Linear(vit.config.output_dim, llama.config.hidden_size).to(llama.embed_tokens.weight)
        if not llama.embed_tokens.weight.is_meta:
            self.reset_projection()

    def reset_projection(self):
        """Random values for the projection, so large that image tokens start as large as words."""
        std = self.llama.embed_tokens.weight.float().std().item()   # the encoder ends in a LayerNorm: variance 1
        nn.init.normal_(self.projection.weight, std=std * self.vit.config.output_dim ** -0.5)
        nn.init.zeros_(self.projection.bias)

    def freeze(self) -> str:
        """Leave only the projection and the token embedding trainable; returns a line that says how much it is."""
        self.requires_grad_(False)
        self.projection.requires_grad_(True)
        self.llama.embed_tokens.requires_grad_(True)
        counts = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in self.parameters()]  # ZeRO-3: whole
        return (f"trainable {readable(sum(count for count, trains in counts if trains))} of "
                f"{readable(sum(count for count, _ in counts))}")

    def see(self, images: Tensor) -> Tensor:
        """Pixels (N, 3, h, w), or what the ViT once made of them (N, n_queries, output_dim), to image tokens."""
        images = images.to(self.vit.conv1.weight.dtype)
        return self.projection(images if images.ndim == 3 else self.vit(images))    # (N, n_queries, C)

    def splice(self, ids: Tensor, kind: Tensor, images: Tensor | None) -> Tensor:
        """Embeddings (B, T, C): words by ids (B, T); where kind (B, T) is IMAGE, the images in order, as in `see`.

        Raises ValueError unless the places for image tokens are as many as the images fill.
        """
        x = self.llama.embed_tokens(ids)
        places, n, count = kind == IMAGE, self.vit.config.n_queries, 0 if images is None else len(images)
        if (found := int(places.sum())) != count * n:
            raise ValueError(f"{found} places for image tokens, but {count} images of {n} tokens each")
        if count:
            x[places] = self.see(images).flatten(0, 1)      # row after row, left to right: image 1 comes first
        return x

    def score(self, ids: Tensor, kind: Tensor, labels: Tensor, images: Tensor,
              lengths: list[int] | None = None) -> tuple[Tensor, Tensor]:
        """For each answer token its loss in float32 and whether it is the likeliest, both (answer tokens).

        ids, kind, labels (B, T), labels IGNORE off the answers; images as in `see`; lengths as in `Llama.forward`.
        All answer tokens of a round being the likeliest is the same as greedy decoding giving that answer.
        """
        x = self.splice(ids, kind, images)
        if not len(images):     # see a blank: ZeRO-3 ranks gather weights together, so all run the same modules
            x = x + (0 * self.see(images.new_zeros(1, *images.shape[1:]))).sum()
        answer = torch.zeros_like(labels, dtype=torch.bool)
        answer[:, :-1] = labels[:, 1:] != IGNORE            # position t predicts t + 1
        return self.llama.lm_head(self.llama(x, kind, answer, lengths), labels[:, 1:][answer[:, :-1]])

    def forward(self, ids: Tensor, kind: Tensor, labels: Tensor, images: Tensor,
                lengths: list[int] | None = None) -> Tensor:
        """Mean loss over the answer tokens, a float32 scalar; zero where there are none. Shapes as in `score`."""
        loss, _ = self.score(ids, kind, labels, images, lengths)
        return loss.sum() / max(len(loss), 1)

    def image_kv(self, images: Tensor) -> Tensor:
        """Images, as in `see`, to the keys and values that LLaMA's layers get from them, as Llama.image_kv."""
        return self.llama.image_kv(self.see(images).flatten(0, 1))

    @torch.no_grad()
    def generate(self, ids: Tensor, kind: Tensor, images: Tensor | None, lengths: list[int] | None = None,
                 max_new_tokens: int = 512, cache: Cache | None = None, image_kv: Tensor | None = None,
                 temperature: float = 0.0, top_p: float = 1.0, keep: list | None = None) -> Iterator[Tensor]:
        """The next token of every conversation, again and again: yields ids (conversations), to the context's end
        or max_new_tokens.

        ids, kind (B, T) and lengths as in `score`, each conversation ending in text, and going on where the cache
        stands, if one is given; it then holds all but the last token that was yielded. image_kv, from that method,
        may stand for images; without it, an empty list `keep` collects it, as in `Llama.forward`. The caller
        decides when to stop: conversations end at different times, and under ZeRO-3 all ranks must end together.
        """
        lengths = lengths or [ids.shape[1]] * len(ids)
        ends = torch.tensor(lengths, device=ids.device).cumsum(0) - 1
        cache = cache or Cache(self.llama, len(lengths), max(lengths) + max_new_tokens)
        x = self.llama.embed_tokens(ids) if image_kv is not None else self.splice(ids, kind, images)
        read = torch.zeros_like(kind, dtype=torch.bool).flatten().index_fill(0, ends, True).view_as(kind)
        logits = self.llama.lm_head(self.llama(x, kind, read, lengths, cache, image_kv, keep))
        left = self.llama.config.max_position_embeddings - max(map(sum, cache.past))
        alone = len(lengths) == 1 and not hasattr(self.llama.norm.weight, "ds_id")          # and not under ZeRO-3
        for i in range(min(max_new_tokens, left)):
            if i and alone:
                logits = self.llama.step(token, cache)
            elif i:
                x = self.llama.embed_tokens(token)[None]                                # (1, conversations, C)
                text = torch.full_like(token, TEXT)[None]
                logits = self.llama.lm_head(self.llama(x, text, None, [1] * len(token), cache))
            token = choose(logits, temperature, top_p)                                  # (conversations)
            yield token


def whole_answers(labels: Tensor, right: Tensor) -> Tensor:
    """Which answers are right word for word (answers), from labels (B, T) and `right` (answer tokens) of score."""
    scored = labels != IGNORE
    before = F.pad(scored, (1, 0))[:, :-1]
    number = (scored & ~before).flatten().cumsum(0)[scored.flatten()] - 1      # which answer a token belongs to
    wrong = torch.zeros(int((scored & ~before).sum()), device=right.device).index_add(0, number, (~right).float())
    return wrong == 0


def readable(count: int) -> str:
    """A number of parameters as people write it: 16.8 M, 8.67 B."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"


# ---- from folders, and back to one ----

@dataclass(frozen=True)
class ModelConfig:
    """What it takes to put the frozen part together again."""
    size: str = "tiny"          # tiny, 7b, 13b or 70b
    attention: str = "mmca"     # mmca or causal
    llama: str = ""             # folder of the language model; empty: looked for where `find` says
    vit: str = ""               # folder of the visual encoder; empty: likewise


REPOSITORIES = {                # size: where LLaMA and the ViT are published
    "tiny": ("tiny/llama", "tiny/vit"),
    "7b": ("meta-llama/Llama-2-7b-hf", "Qwen/Qwen-VL"),
    "13b": ("meta-llama/Llama-2-13b-hf", "Qwen/Qwen-VL"),
    "70b": ("meta-llama/Llama-2-70b-hf", "Qwen/Qwen-VL"),
}


def find(repository: str) -> Path:
    """The folder with a repository's weights: `weights/<name>` here or beside this file, or the newest in Hugging
    Face's own cache.

    Raises FileNotFoundError that names the folders looked for and the command that fetches the weights.
    """
    name = repository if repository.startswith("tiny/") else Path(repository).name
    local, beside = Path("weights") / name, HERE / "weights" / name
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache/huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    cached = hub / f"models--{repository.replace('/', '--')}" / "snapshots"
    for folder in (local, beside, *sorted(cached.glob("*"), key=os.path.getmtime, reverse=True)):
        if (folder / CONFIG).exists():
            return folder
    twice = " --exclude '*.bin'" if "Llama" in repository else ""      # holds its weights in both formats
    how = ("python shapes.py --pretrain" if repository.startswith("tiny/") else
           f"hf download {repository}{twice} --local-dir {local}   (its license may have to be accepted first)")
    raise FileNotFoundError(f"no weights of {repository}: looked for {local.absolute()}, {beside} and {cached}. "
                            f"Get them with\n    {how}")


def towers(config: ModelConfig) -> tuple[Path, Path]:
    """The folders of LLaMA and ViT; raises ValueError for an unknown size and FileNotFoundError as `find` does."""
    if config.size not in REPOSITORIES:
        raise ValueError(f"no size {config.size!r}; there are {', '.join(REPOSITORIES)}")
    llama, vit = REPOSITORIES[config.size]
    return Path(config.llama or find(llama)), Path(config.vit or find(vit))


def build(config: ModelConfig, dtype=torch.float32, device="cpu") -> VisualChat:
    """The model with its pre-trained towers and a fresh projection; raises as `towers` and their loaders do."""
    if config.attention not in ATTENTION:
        raise ValueError(f"no attention {config.attention!r}; there are {', '.join(ATTENTION)}")
    llama, vit = towers(config)
    return VisualChat(VisionTransformer.from_pretrained(vit, dtype, device),
                      Llama.from_pretrained(llama, config.attention, dtype, device))


def save(folder: Path, trained: dict[str, Tensor], config: ModelConfig):
    """Write what was trained, by its name in VisualChat, and the configuration; a kill leaves no half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().cpu().contiguous() for name, t in trained.items()}, folder / f"{TRAINED}.new")
    (folder / f"{CONFIG}.new").write_text(json.dumps(asdict(config), indent=2) + "\n")
    for name in (CONFIG, TRAINED):
        os.replace(folder / f"{name}.new", folder / name)


def load_trained(model: VisualChat, tensors: dict[str, Tensor], source: Path):
    """Copy `tensors` over exactly the parameters that `freeze` leaves trainable; raises as `check` does."""
    model.freeze()
    trained = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    check(trained, tensors, source)
    for name, parameter in trained.items():
        parameter.copy_(tensors[name])


def load(folder: Path, dtype=torch.float32, device="cpu") -> tuple[VisualChat, ModelConfig]:
    """The model as it was saved: towers from their own folders, the trained tensors from this one.

    Raises FileNotFoundError for absent files and ValueError where names or shapes differ from what is trained.
    """
    for name in (TRAINED, CONFIG):
        if not (folder / name).exists():
            raise FileNotFoundError(f"no {folder / name}: not the folder of a training result, or its first epoch "
                                    "has not ended; `python train.py --size tiny` makes out/tiny")
    found = read_json(folder / CONFIG)
    if unknown := set(found) - {field.name for field in fields(ModelConfig)}:
        raise ValueError(f"{folder / CONFIG} has unknown settings: {', '.join(sorted(unknown))}")
    config = ModelConfig(**found)
    model = build(config, dtype, device)
    load_trained(model, read_file(folder / TRAINED), folder / TRAINED)
    return model, config
