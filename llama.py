"""LLaMA-2 (arXiv 2307.09288), 7b, 13b and 70b: RMSNorm, RoPE, grouped-query attention, SwiGLU, key/value cache.

    x (L, C) ─┬─ input_layernorm ── self_attn ──┬─ + ─┬─ post_attention_layernorm ── mlp ──┬─ + ──► next layer
              └─────────────────────────────────┘     └────────────────────────────────────┘

Training, reading a prompt and making the next token all go through these layers. Two things differ from other
LLaMAs. It takes embeddings instead of token ids, because image tokens come from another tower. And all
conversations of a batch are one flat list of L tokens, text first, then image tokens (mmca.py), so that nothing
is padded. Every module has its name in the official checkpoint. Before: mmca.py. Next: vit.py.
"""
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmca import ATTENTION, IMAGE, TEXT, Layout, all_text, separate, written_attention
from weights import by_name, check_readable, load_strictly, read_json, read_tensors, sizes, without_values


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes, under the names of the official config.json."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int = 32000
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


LLAMA_2 = {
    "7b": LlamaConfig(4096, 11008, 32, 32, 32),
    "13b": LlamaConfig(5120, 13824, 40, 40, 40),
    "70b": LlamaConfig(8192, 28672, 80, 64, 8),
}
LOSS_CHUNK = 256                # so many answer tokens have logits at the same time


# ---- parts ----

class RMSNorm(nn.Module):
    """x / rms(x) · weight, with the mean of squares in float32: in float16 a square overflows above 255."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def rope_table(position: Tensor, head_dim: int, theta: float) -> Tensor:
    """RoPE's cos and sin for positions (L), as (2, L, 1, D) in float32; the first half of sin is negative.

    float16 would not do: it tells integers apart up to 2,048 only.
    """
    frequency = theta ** -(torch.arange(0, head_dim, 2, device=position.device).float() / head_dim)    # (D/2)
    angle = position[:, None, None].float() * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)))


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """RoPE for x (L, H, D) and rope (2, L, 1, D), in the split-half layout: channel i pairs with i + D/2."""
    first, second = x.chunk(2, dim=-1)
    return (x * rope[0] + torch.cat((second, first), dim=-1) * rope[1]).to(x.dtype)


class Cache:
    """Keys (after RoPE) and values of the tokens of some conversations, so that each token is computed only once.

    text[layer] (conversations, 2, H_kv, room, D) has room for `room` text tokens of each from the start; the room
    in image[layer] grows when it is full. past[row] has the kinds of the tokens that are in. It changes when all
    layers are done, so a pass that is interrupted does not count. To take tokens back, put an older `past` back.
    For passes without gradients.
    """

    def __init__(self, llama: "Llama", conversations: int, room: int):
        config, device = llama.config, llama.norm.weight.device
        likes = [layer.input_layernorm.weight for layer in llama.layers]    # Layers may lie on several cards.
        # Of several, decode.py multiplies the room that is not used with 0, so numbers must stand there.
        make = Tensor.new_zeros if conversations > 1 else Tensor.new_empty
        self.text, self.image = ([make(like, (conversations, 2, config.num_key_value_heads, n, config.head_dim))
                                  for like in likes] for n in (room, 0))
        self.past, self.room = [()] * conversations, room
        # The rotations of all positions; a token looks up its own.
        self.rope = rope_table(torch.arange(config.max_position_embeddings, device=device), config.head_dim,
                               config.rope_theta)

    def begin(self, layout: Layout):
        """Note how many tokens there are after this pass; raises ValueError where text has not enough room."""
        self.counts = [(segment.kind.count(TEXT), segment.kind.count(IMAGE)) for segment in layout.segments]
        if (most := max(n_text for n_text, _ in self.counts)) > self.room:
            raise ValueError(f"{most} text tokens, but the cache has room for {self.room}")

    def write_images(self, layer: int, row: int, kv: Tensor) -> Tensor:
        """Add kv (2, H_kv, tokens, D) of new image tokens to a conversation; returns that of all its images."""
        after = self.counts[row][1]
        if after > (room := self.image[layer].shape[3]):    # + 1: a part of it is then never the whole.
            self.image[layer] = F.pad(self.image[layer], (0, 0, 0, after + after // 2 + 1 - room))
        image = self.image[layer][row, :, :, :after]
        if kv.shape[2]:
            image[:, :, after - kv.shape[2]:] = kv
        return image

    def extend(self, layer: int, row: int, text: tuple[Tensor, Tensor], image: tuple[Tensor, Tensor]) -> tuple:
        """Add keys and values (1, H_kv, tokens, D) of new tokens to a conversation; returns those of all."""
        after = self.counts[row][0]
        kv = self.text[layer][row][:, None, :, :after]                          # (2, 1, H_kv, S, D)
        kv[:, :, :, after - text[0].shape[2]:] = torch.stack(text)
        return kv.unbind(), self.write_images(layer, row, torch.cat(image))[:, None].unbind()

    def newest_images(self, tokens: int) -> Tensor:
        """Keys before RoPE and values of the newest image tokens of a single conversation, for all layers:
        (layers, 2, H_kv, tokens, D).

        Under MMCA they depend on nothing but the image, so they serve in every conversation and at every position.
        """
        kinds = self.past[0]
        n_image, position = kinds.count(IMAGE), [i for i, kind in enumerate(kinds) if kind == IMAGE][-tokens:]
        cos, sin = self.rope[:, position, 0]                                    # (tokens, D)
        parts = (image[0][:, :, n_image - tokens:n_image].to(cos.device) for image in self.image)
        return torch.stack([torch.stack((rotate(k, (cos, -sin)), v)) for k, v in parts])    # -sin turns back

    def insert_images(self, image_kv: Tensor, layout: Layout) -> Layout:
        """Add images by the keys and values that `newest_images` gave; returns the layout of the text alone.

        RoPE turns their keys to their positions here, so the same image_kv serves at every position.
        """
        n_text, counts = layout.n_text, [segment.n_image for segment in layout.segments]
        rope = self.rope[:, layout.position[n_text:], 0]                        # (2, tokens, D)
        for layer, (k, v) in enumerate(image_kv):
            kv = torch.stack((rotate(k, rope), v))
            for row, part in enumerate(kv.split(counts, dim=2)):
                self.write_images(layer, row, part)
        return Layout(layout.index[:n_text], layout.position[:n_text],
                      [replace(segment, n_image=0) for segment in layout.segments])


@dataclass(frozen=True)
class Pass:
    """What all layers of one forward pass share."""
    n_queries: int                  # so many tokens, the first ones of x, attend to others
    rope: Tensor                    # (2, L, 1, D)
    attend: Callable                # a form of attention (mmca.py): (number of the layer, q, k, v) to (L, H, D)


class Attention(nn.Module):
    """Grouped-query attention: projections and RoPE here, the attention itself in mmca.py."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, shared: Pass, number: int, rows: Tensor | None) -> Tensor:
        """x (L, C) to (L, C), or to those rows of it."""
        n = shared.n_queries
        q, k, v = (projected.unflatten(-1, (-1, self.head_dim))                 # (L, H or H_kv, D)
                   for projected in (self.q_proj(x[:n]), self.k_proj(x), self.v_proj(x)))
        q, k = rotate(q, shared.rope[:, :n]), rotate(k, shared.rope)
        out = shared.attend(number, q, k, v).flatten(1)                         # (L, C)
        return self.o_proj(out if rows is None else out[rows])


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention, then MLP, each added to its input."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, shared: Pass, number: int, rows: Tensor | None = None) -> Tensor:
        """x (L, C) to (L, C), or in the last layer to the rows that the caller wants, (rows, C)."""
        attended = self.self_attn(self.input_layernorm(x), shared, number, rows)
        x = (x if rows is None else x[rows]) + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class AnswerLoss(torch.autograd.Function):
    """Cross-entropy behind a frozen matrix, LOSS_CHUNK tokens at a time, so that few logits exist at once.

    The gradient of `hidden` is made in the forward pass, while the logits are there, and kept instead of them.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Losses in float32 and whether the target is the likeliest token, both (A), from hidden (A, C)."""
        losses, right, gradients = [], [], []
        for rows, target in zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK)):
            logits = (rows @ weight.T).float()                                      # (LOSS_CHUNK, vocabulary)
            (best, likeliest), chances, at = logits.max(dim=-1), logits.softmax(dim=-1), target[:, None]
            # Cross-entropy is log Σ exp(logits) less the target's logit. The softmax, which the gradient needs,
            # tells that sum: it is best - log(chance of the best), and that chance is at least 1 / vocabulary.
            losses.append(best - chances.gather(1, likeliest[:, None])[:, 0].log() - logits.gather(1, at)[:, 0])
            right.append(likeliest == target)
            if ctx.needs_input_grad[0]:     # The gradient of a logit is its chance, at the target its chance - 1.
                chances.scatter_add_(1, at, torch.full_like(at, -1, dtype=chances.dtype))
                gradients.append(chances.to(weight.dtype) @ weight)
        ctx.save_for_backward(*gradients)
        right = torch.cat(right)
        ctx.mark_non_differentiable(right)
        return torch.cat(losses), right

    @staticmethod
    def backward(ctx, of_losses: Tensor, _) -> tuple[Tensor, None, None]:
        if ctx.needs_input_grad[1]:
            raise RuntimeError("lm_head is expected to be frozen: no gradient of its weights is made here")
        gradient = torch.cat(ctx.saved_tensors)
        return gradient * of_losses[:, None].to(gradient.dtype), None, None


class Head(nn.Linear):
    """`lm_head`: hidden states (A, C) to logits (A, vocabulary), or with targets (A) to AnswerLoss's two results.

    Both stand in one forward method, because under ZeRO-3 a module's weights are whole only while it runs.
    """

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return super().forward(hidden) if targets is None else AnswerLoss.apply(hidden, self.weight, targets)


# ---- the whole ----

def read_llama_config(path: Path) -> LlamaConfig:
    """The sizes in a config.json; raises ValueError where it describes something that is not a LLaMA-2."""
    if not path.exists():
        raise FileNotFoundError(f"no {path}: a LLaMA-2 folder has config.json, shards and tokenizer.model")
    found = read_json(path)
    rope = found.get("rope_parameters")                 # where transformers 5 writes rope_theta and rope_type
    found |= rope if isinstance(rope, dict) else {}
    for name, only in (("model_type", "llama"), ("hidden_act", "silu"), ("rope_scaling", None),
                       ("rope_type", "default"), ("tie_word_embeddings", False), ("attention_bias", False),
                       ("mlp_bias", False)):
        if found.get(name, only) != only:
            raise ValueError(f"{path}: {name} is {found[name]!r:.60}, a LLaMA-2 has {only!r}")
    found.setdefault("num_key_value_heads", found.get("num_attention_heads"))     # absent in old 7b and 13b files
    config = sizes(LlamaConfig, found, path)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if config.hidden_size % (2 * heads) or heads % kv_heads:
        raise ValueError(f"{path}: {heads} heads, {kv_heads} of keys and values, do not divide hidden_size "
                         f"{config.hidden_size} into parts of equal, even width")
    return config


class Llama(nn.Module):
    """The decoder. `embed_tokens` and `lm_head` are for the caller, before and after `forward`."""

    def __init__(self, config: LlamaConfig, attention: str = "mmca"):
        super().__init__()
        self.config = config
        self.attention = attention  # a name in mmca.py's ATTENTION
        self.recompute = False      # True: layers keep their input alone and compute again in the backward pass
        self.watch = None           # called in each layer with its number, q, k and the Layout, to look at them
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)

    def through_layers(self, x: Tensor, layout: Layout, rows: Tensor | None, cache: Cache | None) -> Tensor:
        """x (L, C), ordered as `layout` says, to hidden states after the last norm, (L, C) or these rows of it."""
        form = ATTENTION[self.attention]
        n_queries = len(x) if form is written_attention else layout.n_text      # the fast form asks for text alone
        rope = cache.rope[:, layout.position] if cache else rope_table(
            layout.position.to(x.device), self.config.head_dim, self.config.rope_theta)

        def attend(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.watch:
                self.watch(number, q, k, layout)
            return form(q, k, v, layout, cache and partial(cache.extend, number))

        shared = Pass(n_queries, rope, attend)
        for number, layer in enumerate(self.layers):
            wanted = rows if number == len(self.layers) - 1 else None
            if self.recompute and torch.is_grad_enabled() and cache is None:
                x = checkpoint(layer, x, shared, number, wanted, use_reentrant=False)
            else:
                x = layer(x, shared, number, wanted)
        if cache:
            cache.past = [segment.kind for segment in layout.segments]
        return self.norm(x)

    def forward(self, x: Tensor, kind: Tensor, read: Tensor | None = None, lengths: list[int] | None = None,
                cache: Cache | None = None, image_kv: Tensor | None = None) -> Tensor:
        """Embeddings x (B, T, C) and kind (B, T) to the hidden states, after the last norm, that the caller reads.

        They are those of the positions where read (B, T) is true, in order; by default of all that are computed.
        Each row is a conversation, or `lengths` are those of the conversations that lie in the rows one after the
        other. With a cache, they go on from what is in it. With image_kv, from `Cache.newest_images`, the images
        come from there and x is ignored where kind is IMAGE. If kind and read lie on the CPU, a card waits for
        nothing. Raises ValueError where the cache is full, or where image_kv and kind have different image tokens.
        """
        kind = all_text(kind) if self.attention == "causal" else kind
        layout = separate(kind, lengths, cache and cache.past)
        if cache:
            cache.begin(layout)
        if image_kv is not None:
            if image_kv.shape[3] != len(layout.index) - layout.n_text:
                raise ValueError(f"keys and values of {image_kv.shape[3]} image tokens, expected "
                                 f"{len(layout.index) - layout.n_text}")
            layout = cache.insert_images(image_kv, layout)
        rows = None                             # If all tokens are text, they already stand in order.
        if read is not None or len(layout.index) > layout.n_text:
            row = torch.full((kind.numel(),), -1, device=kind.device)           # of each position in the flat list
            row[layout.index] = torch.arange(len(layout.index), device=kind.device)
            rows = (row[read.flatten()] if read is not None else row[row >= 0]).to(x.device)
        return self.through_layers(x.flatten(0, 1).index_select(0, layout.index.to(x.device)), layout, rows, cache)

    @torch.no_grad()
    def next_logits(self, token: Tensor, cache: Cache) -> Tensor:
        """One more text token (conversations) for each conversation in a cache: the logits (conversations,
        vocabulary) of what follows it."""
        x = self.embed_tokens(token)[None]                                      # (1, conversations, C)
        kind = torch.full((1, len(token)), TEXT)
        return self.lm_head(self(x, kind, lengths=[1] * len(token), cache=cache))

    @classmethod
    def from_pretrained(cls, folder: Path | str, attention: str = "mmca", dtype=None,
                        device="cpu") -> "Llama":
        """A LLaMA-2 from an official `-hf` folder: config.json, safetensors (or pickled) shards with their index.

        Raises FileNotFoundError for absent files and ValueError for a model that is not a LLaMA-2 or does not fit.
        """
        folder = Path(folder)
        config = read_llama_config(folder / "config.json")
        with without_values():
            llama = cls(config, attention)
        load_strictly(llama, by_name(cls.tensors(folder), folder), folder, dtype, device)
        return llama

    @staticmethod
    def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
        """(name in this module, tensor) for all weights of an official folder, memory-mapped."""
        return ((name.removeprefix("model."), tensor) for name, tensor in read_tensors(folder, "")
                if not name.endswith("rotary_emb.inv_freq"))        # some official shards hold RoPE's frequencies


# ---- words ----

class Tokenizer:
    """LLaMA's sentencepiece model: text to ids and back. No text turns into the ids of BOS and EOS.

    rows: of the token embedding that it is for. Raises FileNotFoundError for no file and ValueError for a damaged
    one, or one that does not fit.
    """

    def __init__(self, folder: Path | str, rows: int | None = None):
        path = Path(folder) / "tokenizer.model"
        check_readable(path)
        try:
            self.model = SentencePieceProcessor(model_file=str(path))
            self.model.decode(list(range(self.model.vocab_size())))             # Each piece must be a text.
        except (RuntimeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no sentencepiece model, get it again: {error}") from error
        self.bos, self.eos = self.model.bos_id(), self.model.eos_id()
        if min(self.bos, self.eos) < 0 or (rows and self.model.vocab_size() > rows) or not self.model.encode("\n"):
            raise ValueError(f"{path} has {self.model.vocab_size()} pieces, BOS {self.bos} and EOS {self.eos}, "
                             f"expected at most {rows}, both, and line breaks: is it of another model?")

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text.encode(errors="replace").decode())    # a terminal's stray byte becomes "?"

    def decode(self, ids: list[int]) -> str:
        return self.model.decode([id for id in ids if id < self.model.vocab_size()])    # Embeddings may have more.

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids as they come, a piece for each: '' where a character, which can take several ids, is not
        complete. If the last one never is, what there is of it comes as one piece more."""
        known, text, shown = [], "", ""
        for id in ids:
            known.append(id)
            text = self.decode(known)
            is_whole = not text.endswith("\ufffd")
            yield text[len(shown):] if is_whole else ""
            shown = text if is_whole else shown
        if text != shown:
            yield text[len(shown):]
