"""CA+CrA: causal attention over text, and cross attention from text to images in new blocks, as Flamingo has them.

    text x ─► layer ─► … ─► block ─► layer ─► … ─► block ─► layer        LLaMA's layers are for text alone
              image tokens ───┴───────────────────────┘

    x = x + tanh(gate_1) · attention(q from norm(x), k and v from norm(image tokens)) W_o
    x = x + tanh(gate_2) · MLP(norm(x))

It is the paper's other baseline (section 4.1), after Flamingo (arXiv 2204.14198) and Otter (arXiv 2305.03726).
Both gates start at 0: then the model is LLaMA on the text alone. A text token sees all images before it (in
Flamingo the last one). Positions count text alone, so the text between images must tell which is which, as it sees
the earlier ones only. Before: mmca.py, llama.py.
"""
import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from experiments.outside import Experiment
from llama import MLP, Attention, Cache, Llama, LlamaConfig, Pass, RMSNorm, rope_table
from mmca import TEXT, Layout, Segment, attend, by_conversation, compact_attention
from visualchat import Variant, VisualChat
from weights import without_values


# ---- a block ----

def places(n_layers: int) -> range:
    """The layers with a block before them: at 7b the 4th, 8th, …, 32nd, of the tiny six the 2nd, 4th, 6th."""
    every = 4 if n_layers >= 12 else 2
    return range(every - 1, n_layers, every)


class CrossAttention(Attention):
    """Text attends to the image tokens before it; the parameters are those of LLaMA's attention, without RoPE."""

    def forward(self, x: Tensor, images: Tensor, layout: Layout, write: Callable | None) -> Tensor:
        """Text x (n_text, C) and images (image tokens, C), ordered as `layout` says, to (n_text, C).

        A text token without an image before it gets zeros. write(number of the conversation, kv (2, H_kv, tokens,
        D)) adds to a cache and returns those of all images (Cache.write_images in llama.py).
        """
        q, k, v = (projected.unflatten(-1, (-1, self.head_dim))                 # (tokens, H or H_kv, D)
                   for projected in (self.q_proj(x), self.k_proj(images), self.v_proj(images)))
        queries = by_conversation(q, [segment.n_text for segment in layout.segments])
        keys, values = (by_conversation(part, [segment.n_image for segment in layout.segments]) for part in (k, v))
        # Under ZeRO-3 every trained parameter needs a gradient on all ranks, be it zero, also where no text of the
        # batch has an image before it. So q, k and v are part of the result in any case, by an empty stretch each.
        parts = [part[:0].flatten() for part in (q, k, v)]
        for number, segment in enumerate(layout.segments):
            kv = keys[number], values[number]                                   # (1, H_kv, tokens, D)
            if write:
                kv = write(number, torch.cat(kv))[:, None].unbind()
            runs = queries[number].split([n for n, _ in segment.runs], dim=2)   # (1, H, run, D) each
            for query, (_, n_seen) in zip(runs, segment.runs):
                out = attend(query, *(x[:, :, :n_seen] for x in kv)) if n_seen else torch.zeros_like(query)
                parts.append(out.transpose(1, 2).flatten())                     # (run · H · D)
        return self.o_proj(torch.cat(parts).view_as(x))


class CrossBlock(nn.Module):
    """Cross attention, then MLP, each added to its input through a gate. All text passes through both."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm, self.image_layernorm, self.post_attention_layernorm = (
            RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(3))
        self.cross_attn, self.mlp = CrossAttention(config), MLP(config)
        self.attention_gate, self.mlp_gate = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def reset_parameters(self):
        """First values: gates 0, norms 1, matrices such that their outputs are as large as their inputs."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.constant_(parameter, 0 if name.endswith("gate") else 1)
            else:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def forward(self, x: Tensor, images: Tensor, layout: Layout, write: Callable | None) -> Tensor:
        """Text x (n_text, C) to (n_text, C); the arguments are those of CrossAttention."""
        attended = self.cross_attn(self.input_layernorm(x), self.image_layernorm(images), layout, write)
        x = x + self.attention_gate.tanh() * attended
        return x + self.mlp_gate.tanh() * self.mlp(self.post_attention_layernorm(x))


# ---- LLaMA with blocks ----

def text_alone(layout: Layout) -> Layout:
    """The layout of the text, as if there were no images: positions count text alone."""
    segments, position = [], []
    for segment in layout.segments:
        n_new, n_all = segment.n_text, segment.kind.count(TEXT)
        segments.append(Segment(n_new, 0, [(n_new, 0)], (TEXT,) * n_all))
        position += range(n_all - n_new, n_all)
    return Layout(layout.index[:layout.n_text],
                  torch.tensor(position, device=layout.index.device, dtype=torch.long), segments)


class CrossLlama(Llama):
    """A Llama with blocks in `cross`, which `change` makes of a Llama. Everything outside the layers stays.

    `forward` gives hidden states of text alone. In a cache, text[layer] is as for other Llamas, and image[layer]
    has an image's keys and values of the block before that layer, and nothing where there is no block.
    """
    cross: nn.ModuleList

    def through_layers(self, x: Tensor, layout: Layout, rows: Tensor | None, cache: Cache | None) -> Tensor:
        """As in Llama; image tokens among the rows are left out. Raises ValueError for another --attention."""
        if self.attention != "cross":
            raise ValueError(f"cross attention in blocks of its own needs --attention cross, not {self.attention}")
        alone, blocks = text_alone(layout), dict(zip(places(len(self.layers)), self.cross))
        rope = (cache.rope[:, alone.position] if cache else
                rope_table(alone.position.to(x.device), self.config.head_dim, self.config.rope_theta))
        if cache:                       # the same memory, but for LLaMA's layers there are no images in it
            texts = copy.copy(cache)
            texts.begin(alone)

        def attend_to_text(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.watch:
                self.watch(number, q, k, alone)
            return compact_attention(q, k, v, alone, cache and partial(texts.extend, number))

        def run(module: nn.Module, x: Tensor, *arguments) -> Tensor:
            if self.recompute and torch.is_grad_enabled() and cache is None:
                return checkpoint(module, x, *arguments, use_reentrant=False)
            return module(x, *arguments)

        x, images = x.split([layout.n_text, len(x) - layout.n_text])
        rows = rows if rows is None else rows[rows < layout.n_text]
        shared = Pass(layout.n_text, rope, attend_to_text)
        for number, layer in enumerate(self.layers):
            if number in blocks:        # in every pass, also without images, since its MLP is for all text
                x = run(blocks[number], x, images, layout, cache and partial(cache.write_images, number))
            x = run(layer, x, shared, number, rows if number == len(self.layers) - 1 else None)
        if cache:
            cache.past = [segment.kind for segment in layout.segments]
        return self.norm(x)


def change(model: VisualChat):
    """Put blocks into the model's LLaMA, which is none other than before until their gates open."""
    llama, like = model.llama, model.llama.norm.weight
    with without_values():
        blocks = nn.ModuleList(CrossBlock(llama.config) for _ in places(len(llama.layers)))
    llama.__class__ = CrossLlama
    llama.cross = blocks.to(like.dtype).to_empty(device=like.device)
    model.fresh += llama.cross
    for block in llama.cross:
        block.reset_parameters()


EXPERIMENTS = {"cross": Experiment(
    "causal attention for text, cross attention to images in gated blocks (CA+CrA)", "4.1", Variant(change),
    attention="cross")}
