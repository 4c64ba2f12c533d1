"""LLaMA-2 (arXiv 2307.09288), 7b, 13b and 70b: RMSNorm, RoPE, grouped-query attention, SwiGLU.

    x (B, T, C) ─┬─ input_layernorm ── self_attn ──┬─ + ─┬─ post_attention_layernorm ── mlp ──┬─ + ──► next layer
                 └─────────────────────────────────┘     └────────────────────────────────────┘

It takes embeddings instead of token ids, because image tokens come from another tower, and it returns the hidden
states that somebody reads, because only answers need logits. In between, all conversations of a batch are one list
of tokens, text first, then image tokens (mmca.py). Every module has its name in the official checkpoint.
Before: mmca.py, with the attention and the letters for shapes; here also N all tokens of that list, M the image
tokens among them, R the rows that are read. Next: vit.py.
"""
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmca import ATTENTION, IMAGE, PAD, TEXT, Layout, attend, compact_mmca, layout


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


LLAMA_2 = {
    "7b": LlamaConfig(4096, 11008, 32, 32, 32),
    "13b": LlamaConfig(5120, 13824, 40, 40, 40),
    "70b": LlamaConfig(8192, 28672, 80, 64, 8),
}
CHUNK = 256                         # answer tokens whose logits exist at a time


# ---- parts ----

class RMSNorm(nn.Module):
    """x / rms(x) · weight, the mean of squares in float32: a square overflows float16 above 255."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def rope_table(position: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin (N, 1, D) in float32 for positions (N), the first half of sin negative as `rotate` wants it.

    Made in every forward pass, since packing and cache move positions (single steps look it up in a cache's table);
    in float32, since float16 tells integers apart only up to 2,048.
    """
    frequency = theta ** -(torch.arange(0, head_dim, 2, device=position.device).float() / head_dim)    # (D/2)
    angle = position[:, None, None].float() * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the split-half layout: channel i turns with channel i + D/2. x (N, H, D)."""
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


class Cache:
    """Keys (after RoPE) and values of some conversations, so that what was said is not computed again.

    text[layer][conversation] (2, H_kv, room, D) is laid out beforehand; image[layer][conversation] likewise, but
    when it is too small its room grows to twice what is needed. All tokens together can be no more than the model's
    positions, which the caller looks after. `number` and RoPE's `table` of all positions serve `Llama.step`.
    """

    def __init__(self, llama: "Llama", conversations: int, room: int):
        config, like = llama.config, llama.norm.weight
        heads, head_dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        self.text = [[like.new_empty(2, heads, room, head_dim) for _ in range(conversations)]
                     for _ in llama.layers]
        self.image = [[like.new_empty(2, heads, 0, head_dim)] * conversations for _ in llama.layers]
        self.past, self.room = [(0, 0)] * conversations, room           # text and image tokens that are in
        self.number = torch.arange(config.max_position_embeddings, device=like.device)
        self.table = rope_table(self.number, head_dim, config.rope_theta)

    def expect(self, texts: list[int]):
        """Raises ValueError where there is no room for so many more text tokens of each conversation."""
        if (most := max(before + new for (before, _), new in zip(self.past, texts))) > self.room:
            raise ValueError(f"{most} text tokens, but the cache has room for {self.room}")

    def extend(self, layer: int, row: int, text: tuple[Tensor, Tensor], image: tuple[Tensor, Tensor]):
        """Add the keys and values (1, H_kv, tokens, D) of new tokens; returns those of all, text and image.

        `past` grows when all layers are done, so a pass that was interrupted counts for nothing.
        """
        n_text, n_image = self.past[row]
        after = n_text + text[0].shape[2]
        kv = self.text[layer][row][:, None, :, :after]                          # (2, 1, H_kv, S, D)
        kv[:, :, :, n_text:] = torch.stack(text)
        seen, after = self.image[layer][row], n_image + image[0].shape[2]       # (2, H_kv, its room, D)
        if after > seen.shape[2]:               # twice, and 1: a full one would be compiled anew
            seen = self.image[layer][row] = F.pad(seen, (0, 0, 0, 2 * after + 1 - seen.shape[2]))
        seen[:, :, n_image:after] = torch.cat(image)
        return kv.unbind(), seen[:, None, :, :after].unbind()


@dataclass(frozen=True)
class Scene:
    """What all layers of one forward pass share."""
    layout: Layout
    cos: Tensor                     # (N, 1, D)
    sin: Tensor
    cache: Cache | None = None
    image_kv: Tensor | None = None  # (layers, 2, M, H_kv, D), see Llama.image_kv; then x holds the text alone
    keep: list[Tensor] | None = None    # collects (2, M, H_kv, D) of each layer, which together are an image_kv


class Attention(nn.Module):
    """Grouped-query attention around mmca.py's; with fewer key heads than heads, several share one."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        width, kv_width = config.hidden_size, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, scene: Scene, layer: int, read: Tensor | None) -> Tensor:
        n = scene.layout.n_text
        q, k, v = (proj(rows).unflatten(-1, (-1, self.head_dim))                          # (N, H or H_kv, D)
                   for proj, rows in ((self.q_proj, x[:n]), (self.k_proj, x), (self.v_proj, x)))
        own = v[n:].repeat_interleave(q.shape[1] // k.shape[1], dim=1)      # of image tokens; none with image_kv
        if scene.keep is not None:
            scene.keep.append(torch.stack((k[n:], v[n:])))                                # before RoPE
        if scene.image_kv is not None:
            k, v = (torch.cat(pair) for pair in zip((k, v), scene.image_kv[layer]))
        q, k = rotate(q, scene.cos[:n], scene.sin[:n]), rotate(k, scene.cos, scene.sin)
        extend = scene.cache and partial(scene.cache.extend, layer)
        out = torch.cat((compact_mmca(q, k, v, scene.layout, extend), own)).flatten(1)    # (N, C)
        return self.o_proj(out if read is None else out[read])


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
    """Attention, then MLP, each added to what it was given."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, scene: Scene, layer: int, read: Tensor | None = None) -> Tensor:
        """x (N, C) to (N, C), or to the rows that are read, where nobody needs the others any more."""
        attended = self.self_attn(self.input_layernorm(x), scene, layer, read)
        x = (x if read is None else x[read]) + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class Scores(torch.autograd.Function):
    """Cross-entropy behind a frozen matrix, CHUNK tokens at a time: no more logits than theirs ever exist.

    The gradient of `hidden` is made on the way, while the logits are there, and kept instead of them.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        losses, hits, gradients = [], [], []
        for rows, wanted in zip(hidden.split(CHUNK), target.split(CHUNK)):
            logits = (rows @ weight.T).float()                                  # (CHUNK, vocabulary)
            best, likeliest = logits.max(dim=-1)
            chance, at = logits.softmax(dim=-1), wanted[:, None]
            # log Σ exp(logits) = best - log chance(best), and that chance is never too small for its logarithm
            losses.append(best - chance.gather(1, likeliest[:, None])[:, 0].log() - logits.gather(1, at)[:, 0])
            hits.append(likeliest == wanted)
            if ctx.needs_input_grad[0]:
                chance.scatter_add_(1, at, torch.full_like(at, -1, dtype=chance.dtype))     # the logits' gradient
                gradients.append(chance.to(weight.dtype) @ weight)
        right = torch.cat(hits)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(right)
        return torch.cat(losses), right

    @staticmethod
    def backward(ctx, of_loss: Tensor, _) -> tuple[Tensor, None, None]:
        if ctx.needs_input_grad[1]:
            raise RuntimeError("lm_head is expected to be frozen: no gradient of its weights is made here")
        gradient = torch.cat(ctx.saved_tensors)
        return gradient * of_loss[:, None].to(gradient.dtype), None, None


class Head(nn.Linear):
    """`lm_head`: hidden states (R, C) to logits (R, vocabulary), or with target (R) to its losses and hits (R)."""

    def forward(self, hidden: Tensor, target: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if target is None:
            return super().forward(hidden)
        return Scores.apply(hidden, self.weight, target)


# ---- official folders ----

def read_json(path: Path, expected: type = dict):
    """The object (or the list, if that is expected) in a JSON file; raises ValueError that names the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, expected):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected a {expected.__name__}")
    return found


def shards(folder: Path, prefix: str) -> list[Path]:
    """The weight files of a Hugging Face folder that hold tensors starting with `prefix`, as its index names them.

    Raises FileNotFoundError where the folder holds no weights or lacks a shard that the index names.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if index.exists():
            if not isinstance(weight_map := read_json(index).get("weight_map"), dict):
                raise ValueError(f"{index} has no weight_map that names files: get it again")
            names = {str(shard) for name, shard in weight_map.items() if name.startswith(prefix)}
            if outside := [name for name in names if Path(name).name != name or name in ("", "..")]:
                raise ValueError(f"{index} names {outside[0]!r}, which is no file in its folder")
            if absent := sorted(name for name in names if not (folder / name).exists()):
                raise FileNotFoundError(f"{folder} lacks {', '.join(absent)}, which its index names: fetch them")
            return [folder / name for name in sorted(names)]
        if (folder / single).exists():
            return [folder / single]
    found = ", ".join(sorted(path.name for path in folder.glob("*"))[:8]) or "nothing"
    raise FileNotFoundError(f"{folder} holds no model.safetensors and no pytorch_model.bin, whole or with an "
                            f"index; found: {found}")


def read_file(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a file whose name starts with `prefix`, memory-mapped: bytes are read when they are copied.

    Raises ValueError where the file is damaged, or a pickle holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}
        pickled = torch.load(path, map_location="cpu", weights_only=True, mmap=True)    # a pickle could run code
        if not all(isinstance(tensor, Tensor) for tensor in pickled.values()):
            raise TypeError
        return {name: tensor for name, tensor in pickled.items() if name.startswith(prefix)}
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged or holds no tensors, get it again: {type(error).__name__}") from error


def read_tensors(folder: Path, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a folder, names with this prefix alone; one shard after the other; raises as they do."""
    for shard in shards(folder, prefix):
        yield from read_file(shard, prefix).items()


def check(expected: dict[str, Tensor], found: dict[str, Tensor], source: Path):
    """Raises ValueError that lists missing, unexpected and wrongly shaped tensors, if there are any."""
    wrong = [f"missing {name} {tuple(t.shape)}" for name, t in expected.items() if name not in found]
    wrong += [f"unexpected {name} {tuple(t.shape)}" for name, t in found.items() if name not in expected]
    wrong += [f"{name} is {tuple(found[name].shape)}, expected {tuple(t.shape)}"
              for name, t in expected.items() if name in found and found[name].shape != t.shape]
    if wrong:
        more = f" (and {len(wrong) - 6} more)" if len(wrong) > 6 else ""
        raise ValueError(f"{source} does not fit the model: {'; '.join(wrong[:6])}{more}. "
                         "Is it of another size, or damaged?")


def load_strictly(module: nn.Module, tensors: dict[str, Tensor], source: Path, dtype=None, device="cpu"):
    """Put `tensors` in place of the module's own, which may lie on the meta device; raises as `check` does.

    dtype None keeps the file's.
    """
    check(module.state_dict(), tensors, source)
    module.load_state_dict({name: t.to(device, dtype) for name, t in tensors.items()}, assign=True)


# ---- the whole ----

def read_config(path: Path) -> LlamaConfig:
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
            raise ValueError(f"{path}: {name} is {found[name]!r}, a LLaMA-2 has {only!r}")
    found.setdefault("num_key_value_heads", found.get("num_attention_heads"))     # absent in old 7b and 13b files
    sizes = {field.name: found[field.name] for field in fields(LlamaConfig) if field.name in found}
    if bad := [f"{name} {size!r}" for name, size in sizes.items() if type(size) not in (int, float) or size <= 0]:
        raise ValueError(f"{path} has {', '.join(bad)}, expected positive numbers")
    try:
        return LlamaConfig(**sizes)
    except TypeError as error:
        raise ValueError(f"{path} lacks a size: {error}") from error


# What `Llama.next_logits` needs beside the modules: the same for one token alone, in a form that compiles well.

def shortened(weight: Tensor) -> Tensor:
    """A float32 weight in 16 bits, if they hold its values, as those of the official files; else as it is."""
    if weight.dtype == torch.float32:
        for short in (weight.to(torch.float16), weight.to(torch.bfloat16)):
            if torch.equal(short.float(), weight):
                return short
    return weight


def matvec(linear: nn.Linear, x: Tensor) -> Tensor:
    """linear of one vector x (in), as mv, which reads memory faster than a product with a matrix of one row.

    Compiled, it reads linear.short, which Llama.compile_step adds. Of 16 bits that is best read in a loop of the
    compiler's own, which widens each value on its way; of 32, a library's product is faster than such a loop.
    """
    if not torch.compiler.is_compiling():
        return linear.weight.mv(x)
    if linear.short.dtype == torch.float32:
        row = x.as_strided((1, len(x)), (len(x), 1))            # the same as x[None], which would be copied
        return F.linear(row, linear.short)[0]
    return (linear.short * x.float()).sum(-1).to(x.dtype)


def glance(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """mmca.py's `attend` for one token: q (H, D), k and v (H_kv, S, D) to (H, D)."""
    if not torch.compiler.is_compiling():
        return attend(q[None, :, None], k[None], v[None])[0, :, 0]
    q = q.unflatten(0, (len(k), -1, 1)).float() * q.shape[-1] ** -0.5              # (H_kv, H/H_kv, 1, D), float32
    chance = (k[:, None] * q).sum(-1).softmax(-1)                                  # sums, because they fuse
    return (chance[..., None] * v[:, None]).sum(-2).flatten(0, 1).to(v.dtype)


class Llama(nn.Module):
    """The decoder. `embed_tokens` and `lm_head` are for the caller, before and after `forward`."""

    def __init__(self, config: LlamaConfig, attention: str = "mmca"):
        super().__init__()
        self.config = config
        self.attention = attention  # a name in mmca.py's ATTENTION
        self.recompute = False      # True: layers keep their input alone and compute again in the backward pass
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)

    def through_layers(self, x: Tensor, where: Layout, read: Tensor, cache: Cache | None = None,
                       image_kv: Tensor | None = None, keep: list[Tensor] | None = None) -> Tensor:
        """x (N, C) to hidden states (R, C) of the rows `read` (R)."""
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        scene = Scene(where, *rope_table(where.position, head_dim, self.config.rope_theta), cache, image_kv,
                      keep)
        for i, layer in enumerate(self.layers):
            rows = read if i == len(self.layers) - 1 else None
            if self.recompute and torch.is_grad_enabled() and cache is None:
                x = checkpoint(layer, x, scene, i, rows, use_reentrant=False)
            else:
                x = layer(x, scene, i, rows)
        if cache:
            cache.past = [(texts + talk.text, images + talk.image)
                          for (texts, images), talk in zip(cache.past, where.talks)]
        return self.norm(x)

    def forward(self, x: Tensor, kind: Tensor, read: Tensor | None = None, lengths: list[int] | None = None,
                cache: Cache | None = None, image_kv: Tensor | None = None,
                keep: list[Tensor] | None = None) -> Tensor:
        """Embeddings x (B, T, C) and kind (B, T) to hidden states (R, C) after the final norm.

        They are those of the R positions where read (B, T) is true, row after row; by default of all that x has a
        token for. Each row is a conversation, or `lengths` are those of the conversations that lie in the rows one
        after the other. With a cache they go on from what is in it.

        image_kv, from the method of that name, stands for the image tokens: x is not looked at where kind is
        IMAGE. Without it, `keep`, an empty list, collects what image_kv would be, a layer at a time:
        torch.stack(keep). Raises ValueError where the cache is full, or image_kv and the places for it differ in
        number.
        """
        kind = ATTENTION[self.attention](kind)
        where = layout(kind, lengths, cache and cache.past)
        if cache:
            cache.expect([talk.text for talk in where.talks])
        if image_kv is not None and image_kv.shape[2] != (places := len(where.place) - where.n_text):
            raise ValueError(f"keys and values of {image_kv.shape[2]} image tokens for {places} places")
        place = where.place if image_kv is None else where.place[:where.n_text]
        row = torch.empty(kind.numel(), dtype=torch.long, device=kind.device)   # where in the list a position is
        row[where.place] = torch.arange(len(where.place), device=kind.device)
        if read is None:
            read = kind != PAD if image_kv is None else kind == TEXT
        read = row[read.flatten()]                                          # from a mask to the numbers of rows
        return self.through_layers(x.flatten(0, 1).index_select(0, place), where, read, cache, image_kv, keep)

    def next_logits(self, token: Tensor, position: Tensor, table: tuple[Tensor, Tensor], texts: list[Tensor],
                    at: Tensor, images: list[Tensor], seen: Tensor) -> Tensor:
        """`step` without its bookkeeping: token (1) to logits (1, vocabulary); position (1) is its row in `table`.

        texts: a cache's room for keys and values of each layer (2, H_kv, room, D); at (S): the numbers of the
        places in use, the last one for the token. images, seen: likewise of image tokens, or no images (under
        causal attention there are none, since they count as text). All are tensors, so that torch.compile need not
        begin anew with every token.
        """
        cos, sin = (values[position, 0] for values in table)                                # (1, D)
        x = self.embed_tokens(token)[0]                                                     # (C)
        for i, (layer, text) in enumerate(zip(self.layers, texts)):
            attn, mlp, normed = layer.self_attn, layer.mlp, layer.input_layernorm(x)
            q, k, v = (matvec(proj, normed).view(-1, attn.head_dim)                         # (H or H_kv, D)
                       for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
            # All three in one tensor: else the compiler would rotate q again for every key that it meets.
            q, kv = torch.cat((rotate(torch.cat((q, k)), cos, sin), v)).split((len(q), 2 * len(k)))
            text.index_copy_(2, at[-1:], kv.unflatten(0, (2, -1))[:, :, None])
            out = glance(q, *text[:, :, :len(at)])                                  # the softmax over text
            if images:
                out = out + glance(q, *images[i][:, :, :len(seen)])                 # and the one over image tokens
            x = x + matvec(attn.o_proj, out.flatten())
            normed = layer.post_attention_layernorm(x)
            gated = F.silu(matvec(mlp.gate_proj, normed)) * matvec(mlp.up_proj, normed)
            x = x + matvec(mlp.down_proj, gated)
        return matvec(self.lm_head, self.norm(x))[None]

    def compile_step(self):
        """Let torch.compile make fewer, larger operations of `step`. From then on the modules must not change.

        That takes long at the first step without an image and at the first one with some. Where 16 bits hold
        float32 weights, they are kept that way, too, so that a step reads half as many bytes.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.short = shortened(module.weight.detach())
        compiled = torch.compile(self.next_logits, isolate_recompiles=True, options={
            "cpp_wrapper": self.norm.weight.device.type == "cpu",   # C++ between the operations, not slow Python
            # No looking at every step whether a module or the shape of a weight has changed since.
            "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe, "size_asserts": False})
        met = set()

        def next_logits(token, position, table, texts, at, images, seen):
            if bool(images) not in met:     # the first of its kind: say which sizes will change, or none may
                met.add(bool(images))
                changing = [(at, 0), (seen, 0)] if images else [(at, 0)]
                for tensor, dim in changing + [(image, 2) for image in images]:
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)
            return compiled(token, position, table, texts, at, images, seen)

        self.next_logits = next_logits

    @torch.no_grad()
    def step(self, token: Tensor, cache: Cache) -> Tensor:
        """The next text token (1) of the only conversation in a cache, to the logits (1, vocabulary) behind it.

        They are what embed_tokens, `forward` and lm_head give, in as few operations as possible: with a single
        token, starting a small operation takes longer than the operation. Weights are read past their modules, so
        they must be whole: not for ZeRO-3.
        """
        cache.expect([1])
        (n_text, n_image), number = cache.past[0], cache.number
        position = number[n_text + n_image:n_text + n_image + 1]
        texts, images = [rooms[0] for rooms in cache.text], [rooms[0] for rooms in cache.image if n_image]
        logits = self.next_logits(token, position, cache.table, texts, number[:n_text + 1],
                                  images, number[:n_image])
        cache.past = [(n_text + 1, n_image)]
        return logits

    @torch.no_grad()
    def image_kv(self, x: Tensor) -> Tensor:
        """Keys before RoPE and values of image tokens x (M, C) in all layers: (layers, 2, M, H_kv, D).

        Under MMCA they depend on nothing else, so they serve wherever and whenever the image is shown; under
        causal attention they depend on what came before, and ValueError is raised.
        """
        if self.attention != "mmca":
            raise ValueError(f"under {self.attention} attention an image's keys depend on what is before it")
        where, keep = layout(torch.full((1, len(x)), IMAGE, device=x.device)), []
        self.through_layers(x, where, where.place[:0], keep=keep)
        return torch.stack(keep)

    @classmethod
    def from_pretrained(cls, folder: Path | str, attention: str = "mmca", dtype=None,
                        device="cpu") -> "Llama":
        """A LLaMA-2 from an official `-hf` folder: config.json, safetensors (or pickled) shards with their index.

        Raises FileNotFoundError for absent files and ValueError for a model that is not a LLaMA-2 or does not fit.
        """
        folder = Path(folder)
        config = read_config(folder / "config.json")
        with torch.device("meta"):                              # no memory and no time spent on initial values
            llama = cls(config, attention)
        load_strictly(llama, dict(cls.tensors(folder)), folder, dtype, device)
        return llama

    @staticmethod
    def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
        """(name here, tensor) of an official folder, memory-mapped."""
        return ((name.removeprefix("model."), tensor) for name, tensor in read_tensors(folder, "")
                if not name.endswith("rotary_emb.inv_freq"))        # some official shards hold RoPE's own table


# ---- words ----

class Tokenizer:
    """LLaMA's sentencepiece model: text to ids and back. BOS and EOS are ids that no text turns into."""

    def __init__(self, folder: Path | str):
        path = Path(folder) / "tokenizer.model"
        if not path.exists():
            raise FileNotFoundError(f"no {path}: it comes with the LLaMA-2 weights")
        try:
            self.model = SentencePieceProcessor(model_file=str(path))
        except RuntimeError as error:
            raise ValueError(f"{path} is no sentencepiece model, get it again: {error}") from error
        self.bos, self.eos = self.model.bos_id(), self.model.eos_id()

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text.encode(errors="replace").decode())    # a terminal's stray byte becomes "?"

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)
