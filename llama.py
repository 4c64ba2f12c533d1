"""LLaMA-2 (arXiv 2307.09288), 7b, 13b and 70b: RMSNorm, RoPE, grouped-query attention, SwiGLU.

    x (B, T, C) ─┬─ input_layernorm ── self_attn ──┬─ + ─┬─ post_attention_layernorm ── mlp ──┬─ + ──► next layer
                 └─────────────────────────────────┘     └────────────────────────────────────┘

It takes embeddings instead of token ids, because image tokens come from another tower, and it returns hidden
states, because only answers need logits. Every module has its name in the official checkpoint.
Before: mmca.py, with the attention and the letters for shapes. Next: vit.py.
"""
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmca import PAD, fused_mmca


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


# ---- parts ----

class RMSNorm(nn.Module):
    """x / rms(x) · weight, the mean of squares in float32: a square overflows float16 above 255."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return self.weight * (x32 * (x32.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype)


def rope_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, T, D/2) in float32 for positions (B, T).

    Made in every forward pass, since padding and cache move positions; in float32, since float16 tells integers
    apart only up to 2,048.
    """
    frequency = theta ** -(torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)   # (D/2)
    angle = positions[:, None, :, None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the split-half layout: channel i turns with channel i + D/2. x (B, H, T, D)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention around a function of mmca.py; with fewer key heads than heads, several share one."""

    def __init__(self, config: LlamaConfig, attention: Callable):
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        width, kv_width = config.hidden_size, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.attention = attention

    def forward(self, x: Tensor, kind: Tensor, cos: Tensor, sin: Tensor, cache: dict | None) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)             # (B, H or H_kv, T, D)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            if self in cache:
                k, v = (torch.cat(pair, dim=2) for pair in zip(cache[self], (k, v)))      # (B, H_kv, S, D)
            cache[self] = k, v
        out = self.attention(q, k, v, kind, past=k.shape[2] - x.shape[1])
        return self.o_proj(out.transpose(1, 2).flatten(2))                                # (B, T, C)


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
    def __init__(self, config: LlamaConfig, attention: Callable):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, attention)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, kind: Tensor, cos: Tensor, sin: Tensor, cache: dict | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), kind, cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


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
            weight_map = read_json(index).get("weight_map", {})
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

    Raises ValueError where the file is damaged or holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}
        pickled = torch.load(path, map_location="cpu", weights_only=True, mmap=True)    # a pickle could run code
        return {name: tensor for name, tensor in pickled.items() if name.startswith(prefix)}
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, AttributeError) as error:
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
    found |= found.get("rope_parameters") or {}         # where transformers 5 writes rope_theta and rope_type
    for name, only in (("model_type", "llama"), ("hidden_act", "silu"), ("rope_scaling", None),
                       ("rope_type", "default"), ("tie_word_embeddings", False), ("attention_bias", False),
                       ("mlp_bias", False)):
        if found.get(name, only) != only:
            raise ValueError(f"{path}: {name} is {found[name]!r}, a LLaMA-2 has {only!r}")
    found.setdefault("num_key_value_heads", found.get("num_attention_heads"))     # absent in old 7b and 13b files
    names = [field.name for field in fields(LlamaConfig)]
    try:
        return LlamaConfig(**{name: found[name] for name in names if name in found})
    except TypeError as error:
        raise ValueError(f"{path} lacks a size: {error}") from error


class Llama(nn.Module):
    """The decoder. `embed_tokens` and `lm_head` are for the caller, before and after `forward`."""

    def __init__(self, config: LlamaConfig, attention: Callable = fused_mmca):
        super().__init__()
        self.config = config
        self.recompute = False      # True: layers keep their input alone and compute again in the backward pass
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, attention) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x: Tensor, kind: Tensor, cache: dict | None = None) -> Tensor:
        """Embeddings x (B, T, C) and kind (B, S) to hidden states (B, T, C) after the final norm.

        A cache starts as an empty dict; it is filled with the keys and values of the positions seen so far, which
        make up the first S - T of kind. A position is counted without padding, so padding may stand anywhere.
        """
        positions = ((kind != PAD).cumsum(dim=1) - 1).clamp(min=0)[:, -x.shape[1]:]       # (B, T)
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        cos, sin = rope_table(positions, head_dim, self.config.rope_theta)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled() and cache is None:
                x = checkpoint(layer, x, kind, cos, sin, None, use_reentrant=False)
            else:
                x = layer(x, kind, cos, sin, cache)
        return self.norm(x)

    @classmethod
    def from_pretrained(cls, folder: Path | str, attention: Callable = fused_mmca, dtype=None,
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
        self.model = SentencePieceProcessor(model_file=str(path))
        self.bos, self.eos = self.model.bos_id(), self.model.eos_id()

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)
