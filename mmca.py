"""Who attends to whom: multi-modal causal attention (MMCA), Figure 4 of DeepSpeed-VisualChat (arXiv 2309.14327).

An image token attends to itself alone. A text token attends to the text up to itself and, with a second softmax,
to the image tokens before it. So the 256 tokens of an image and the ten tokens of a question do not compete for
the weights of one softmax:

    MMCA(Q, K, V) = softmax(QKᵀ ⊙ M1) V + softmax(QKᵀ ⊙ M2) V

QKᵀ stands for the scores QKᵀ/√D. M1 and M2 are 1 where a query (row) may attend to a key (column). Where they are
0, the score counts as minus infinity, and a query that may attend to no key gets 0. `python mmca.py` prints
Figure 4. Next: llama.py.
"""
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

# The letters for shapes, in every file: B batch, T queries, S keys or positions of a row, H heads, H_kv heads of
# keys and values, D head width, C model width, I images, P patches, L tokens of a flat list, A answer tokens.

# `kind` (B, S) holds one of these per position and nothing else tells them apart. Our batches are packed and have
# no PAD; it is for callers with padded rows.
PAD, TEXT, IMAGE = 0, 1, 2


# ---- the formula ----

def matrix(kind: Tensor, n_past: int = 0) -> Tensor:
    """Figure 4's M (B, T, S) for kind (B, S): 1 where M1 lets a query attend to a key, 2 where M2 does, else 0.

    The queries are the last T = S - n_past positions. PAD attends to nothing, and nothing attends to it.
    """
    index = torch.arange(kind.shape[1], device=kind.device)
    earlier = index[n_past:, None] >= index                                 # (T, S), a position itself included
    itself = index[n_past:, None] == index
    query, key = kind[:, n_past:, None], kind[:, None, :]
    m1 = ((query == TEXT) & (key == TEXT) & earlier) | ((query == IMAGE) & itself)
    m2 = (query == TEXT) & (key == IMAGE) & earlier
    return m1.to(torch.int8) + 2 * m2.to(torch.int8)


def masked_softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    """Softmax over the allowed keys; a query with none gets zeros, where a plain softmax would be uniform.

    scores (..., T, S) in any float type, allowed (..., T, S) bool; returns float32 (..., T, S).
    """
    scores = scores.float().masked_fill(~allowed, torch.finfo(torch.float32).min)   # -inf would give NaN gradients
    return scores.softmax(dim=-1) * allowed


def scaled_scores(q: Tensor, k: Tensor) -> Tensor:
    """QKᵀ / √D in float32, (B, H_kv, H/H_kv, T, S): in grouped-query attention H/H_kv heads share their keys."""
    q = q.unflatten(1, (k.shape[1], -1)).float()                            # (B, H_kv, H/H_kv, T, D)
    return q @ k[:, :, None].float().mT * q.shape[-1] ** -0.5


def mmca(q: Tensor, k: Tensor, v: Tensor, kind: Tensor, n_past: int = 0) -> Tensor:
    """Multi-modal causal attention (Figure 4), with both softmaxes written out.

    q (B, H, T, D); k, v (B, H_kv, S, D), q and k after RoPE; kind (B, S). T = S - n_past: with a key/value cache
    only the new positions are queries. Returns (B, H, T, D) in the type of k; PAD rows are zero.
    """
    m = matrix(kind, n_past)[:, None, None]                                 # the same for all heads
    scores = scaled_scores(q, k)
    v = v[:, :, None].float()
    out = masked_softmax(scores, m == 1) @ v + masked_softmax(scores, m == 2) @ v
    return out.flatten(1, 2).to(k.dtype)                                    # (B, H, T, D)


# Why can a frozen LLaMA cope with rows whose weights sum to 2? Attention adds its output to the residual stream,
# and each part that reads the stream first divides it by its length (RMSNorm). So the second sum turns the stream
# towards what the image shows, and hardly changes the scale that LLaMA is used to. In the tiny model the stream
# after attention is 1.18 times as long as with the first softmax alone in the first layer, and 1.00 to 1.01 times
# in layers 2 to 5 of 6 (`python tests/bench.py two_softmaxes`; nobody has measured it at the real sizes).

def all_text(kind: Tensor) -> Tensor:
    """The kind under causal attention, the paper's baseline: image tokens count as text, so M2 is empty."""
    return kind.clamp(max=TEXT)


# ---- a batch, taken apart into text and images ----

@dataclass(frozen=True)
class Segment:
    """One conversation's part of a batch. For [text, image, image, text, text] it has 3 text, 2 image tokens and
    two runs of text: one token without image tokens before it, two with two of them: runs = [(1, 0), (2, 2)]."""
    n_text: int                     # new tokens
    n_image: int                    # new ones, too; 0 where they were added by Cache.insert_images (llama.py)
    runs: list[tuple[int, int]]     # (text tokens without an image between them, image tokens before them)
    kind: tuple[int, ...]           # of all tokens, first those that a key/value cache holds, then the new ones


@dataclass(frozen=True)
class Layout:
    """Where the L tokens of a batch stand in a flat list: first all text tokens, then all image tokens.

    For [text, image, text] and [text, image] one after the other: index [0, 2, 3, 1, 4], position [0, 2, 0, 1, 1],
    lengths [2, 1, 1, 1].
    """
    index: Tensor                   # (L) where in the flattened batch each token comes from
    position: Tensor                # (L) its place in its own conversation, from 0
    segments: list[Segment]         # one per conversation

    @cached_property
    def n_text(self) -> int:
        return sum(segment.n_text for segment in self.segments)

    @cached_property
    def lengths(self) -> list[int]:
        """How the flat list is cut: the text of each conversation, then the images of each conversation."""
        return [segment.n_text for segment in self.segments] + [segment.n_image for segment in self.segments]


def separate(kind: Tensor, lengths: list[int] | None = None, past: list[tuple[int, ...]] | None = None) -> Layout:
    """Take kind (B, T) apart into text and image tokens; PAD is left out, wherever it stands.

    lengths: of the conversations that lie one after the other in the flattened batch; by default each row is one.
    past: the kinds of the tokens that a key/value cache holds of each conversation.
    """
    lengths, kinds = lengths or [kind.shape[1]] * len(kind), kind.flatten().tolist()
    segments, start = [], 0
    indices, positions = {TEXT: [], IMAGE: []}, {TEXT: [], IMAGE: []}
    for length, before in zip(lengths, past or [()] * len(lengths)):
        new = [index for index in range(start, start + length) if kinds[index] != PAD]
        position, n_seen, runs, count = len(before), before.count(IMAGE), [], {TEXT: 0, IMAGE: 0}
        for its_kind, run in groupby(new, key=kinds.__getitem__):
            run = list(run)
            indices[its_kind] += run
            positions[its_kind] += range(position, position + len(run))
            position, count[its_kind] = position + len(run), count[its_kind] + len(run)
            if its_kind == TEXT:
                runs.append((len(run), n_seen))
            else:
                n_seen += len(run)
        segments.append(Segment(count[TEXT], count[IMAGE], runs, (*before, *(kinds[index] for index in new))))
        start += length
    index, position = (torch.tensor(values[TEXT] + values[IMAGE], device=kind.device, dtype=torch.long)
                       for values in (indices, positions))
    return Layout(index, position, segments)


def by_conversation(x: Tensor, lengths: list[int]) -> list[Tensor]:
    """A flat list (L, H, D), cut into pieces of these lengths: each (1, H, length, D)."""
    return list(x.transpose(0, 1)[None].split(lengths, dim=2))


def keys_and_values(k: Tensor, v: Tensor, layout: Layout, extend: Callable | None) -> list[tuple]:
    """From flat k and v, for each conversation (k, v) of its text and (k, v) of its images, (1, H_kv, tokens, D).

    extend(row of the conversation in a cache, (k, v) of text, (k, v) of images) adds them to it, and returns those
    of the past and the new ones (Cache.extend in llama.py).
    """
    pairs = list(zip(by_conversation(k, layout.lengths), by_conversation(v, layout.lengths)))
    both = list(zip(pairs[:len(layout.segments)], pairs[len(layout.segments):]))
    return [extend(row, text, image) for row, (text, image) in enumerate(both)] if extend else both


# ---- two forms of MMCA for a batch that was taken apart; llama.py can use either ----

def in_order(text: Tensor, image: Tensor, kind: Tensor) -> Tensor:
    """Text and image tokens of a conversation (1, H, tokens, D), put together as kind (S) says: (1, H, S, D)."""
    whole = text.new_empty(1, text.shape[1], len(kind), text.shape[3])
    whole[:, :, kind == TEXT], whole[:, :, kind == IMAGE] = text, image
    return whole


def written_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, extend: Callable | None = None) -> Tensor:
    """MMCA of every conversation by `mmca`, the formula as written, (L, H, D): slow, but easy to step through.

    q (L, H, D), k and v (L, H_kv, D), q and k after RoPE, ordered as `layout` says; extend: see `keys_and_values`.
    """
    queries, texts, images = by_conversation(q, layout.lengths), [], []
    for row, (text, image) in enumerate(keys_and_values(k, v, layout, extend)):
        segment = layout.segments[row]
        kind = torch.tensor(segment.kind, device=q.device)                                       # (S)
        n_past = len(kind) - segment.n_text - segment.n_image
        new = kind[n_past:]                                                                      # (T)
        query = in_order(queries[row], queries[row + len(layout.segments)], new)
        key, value = (in_order(*pair, kind) for pair in zip(text, image))
        out = mmca(query, key, value, kind[None], n_past)
        texts.append(out[:, :, new == TEXT])
        images.append(out[:, :, new == IMAGE])
    return torch.cat(texts + images, dim=2)[0].transpose(0, 1)


# The fast form computes the same with less work. An image token attends to one key, its own, and a softmax over
# one key is 1: its output is its own value, so it needs neither query nor scores. Text attends to text as in plain
# causal attention. All tokens of a run of text, between two images, attend to the same image tokens, so the second
# softmax needs no mask. PyTorch's fused kernel does both parts best, and M is never built.

def attend(q: Tensor, k: Tensor, v: Tensor, **mask) -> Tensor:
    """PyTorch's fused softmax(QKᵀ / √D) V, with scores in float32; H/H_kv heads share their keys.

    mask: attn_mask or is_causal, as PyTorch calls them; without one every query attends to every key.
    """
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **mask)


def attend_twice(q: Tensor, text: tuple[Tensor, Tensor], image: tuple[Tensor, Tensor], runs: list) -> Tensor:
    """Both softmaxes for the new text tokens of one conversation, (1, H, T, D).

    q (1, H, T, D); keys and values of text (1, H_kv, S, D) and of images (1, H_kv, tokens, D), those of a cache
    included; runs as in Segment.
    """
    new, n_past = q.shape[2], text[0].shape[2] - q.shape[2]
    # With a past, PyTorch's is_causal would align the triangle with the first key instead of the last one. A
    # single new token attends to all keys, which needs no mask.
    mask = q.new_ones(new, n_past + new, dtype=torch.bool).tril(n_past) if n_past and new > 1 else None
    out = attend(q, *text, attn_mask=mask, is_causal=not n_past)
    if not image[0].shape[2] or not new:
        return out
    parts = [attend(part, *(x[:, :, :n_seen] for x in image)) if n_seen else torch.zeros_like(part)
             for part, (_, n_seen) in zip(q.split([count for count, _ in runs], dim=2), runs)]
    return out + torch.cat(parts, dim=2)


def compact_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, extend: Callable | None = None) -> Tensor:
    """MMCA of every conversation by the fast form, (L, H, D).

    Everything is as in `written_attention`, but q (n_text, H, D) holds the queries of text tokens alone.
    """
    n_text = layout.n_text
    queries = by_conversation(q, [segment.n_text for segment in layout.segments])
    texts = [attend_twice(query, *pairs, segment.runs)[0].transpose(0, 1)
             for query, pairs, segment in zip(queries, keys_and_values(k, v, layout, extend), layout.segments)]
    if n_text == len(v):                                        # no new image
        return torch.cat(texts)
    # Each image token's output is its own value, which H/H_kv heads share.
    images = v[n_text:, :, None].expand(-1, -1, q.shape[1] // k.shape[1], -1).flatten(1, 2)
    return torch.cat((*texts, images))


# The names for --attention, and the form that llama.py takes for each; causal attention is the same form for
# another kind (`all_text`). A new attention gets its name and form here. decode.py has steps of its own that
# compute what `compact_attention` does, chat.py keeps images' keys under MMCA alone, and page.py shows the second
# softmax: what does not fit them overrides `Llama.through_layers`, which decode.py respects.
ATTENTION = {"mmca": compact_attention, "causal": compact_attention, "written": written_attention}


# ---- Figure 4, to look at ----

FIGURE_4 = ["User", ":", "<I-token1>", "<I-token2>", "<I-token3>", "Please", "describe", "the", "image", "."]
FIGURE_4_KIND = torch.tensor([[IMAGE if token.startswith("<I") else TEXT for token in FIGURE_4]])


def panels() -> dict[str, Tensor]:
    """The three matrices (10, 10) of Figure 4, by their names."""
    multi_modal = matrix(FIGURE_4_KIND)[0]
    cross = multi_modal * (FIGURE_4_KIND[0] == TEXT)[:, None]       # only text has queries
    return {"causal attention": matrix(all_text(FIGURE_4_KIND))[0], "causal and cross attention": cross,
            "multi-modal causal attention": multi_modal}


def matrix_text(m: Tensor, color: bool) -> str:
    """M (S, S) of the ten tokens as lines of text, one query per line; with color 1 is blue and 2 orange."""
    paint = ["{}", "\033[44;97m{}\033[0m", "\033[43;30m{}\033[0m"] if color else ["{}"] * 3
    return "\n".join(f"{token:>10}  " + "".join(paint[cell].format(f" {cell} ") for cell in row)
                     for token, row in zip(FIGURE_4, m.tolist()))


def draw_panels(path: str, cell: int = 40, margin: int = 110):
    """Write Figure 4 as an image; raises ValueError for a file type that Pillow does not know."""
    colors, side = {0: "white", 1: "#4C72B0", 2: "#DD8452"}, cell * len(FIGURE_4)
    image = Image.new("RGB", (margin + 3 * (side + cell), side + 50), "white")
    pen = ImageDraw.Draw(image)
    for number, (title, m) in enumerate(panels().items()):
        left = margin + number * (side + cell)
        pen.text((left + side / 2, 30), title, "black", anchor="mb", font_size=16)
        for i, (token, row) in enumerate(zip(FIGURE_4, m.tolist())):
            if number == 0:
                pen.text((margin - 8, 40 + (i + .5) * cell), token, "black", anchor="rm", font_size=16)
            for j, value in enumerate(row):
                corner = left + j * cell, 40 + i * cell
                pen.rectangle((*corner, corner[0] + cell, corner[1] + cell), colors[value], "#999999")
                pen.text((corner[0] + cell / 2, corner[1] + cell / 2), str(value), "white" if value else "#999999",
                         anchor="mm", font_size=16)
    image.save(path)


def main():
    """Print Figure 4, or draw it into a file; then run both forms of MMCA on its example."""
    if sys.argv[1:]:
        try:
            draw_panels(sys.argv[1])
        except (OSError, ValueError) as error:
            sys.exit(f"mmca.py: {error}; name an image file to write, such as figure4.png")
        print(f"wrote {sys.argv[1]}")
    else:
        for title, m in panels().items():
            print(f"{title}\n{matrix_text(m, color=sys.stdout.isatty())}\n")
        print("A row is a query, a column is a key. 1: first softmax (M1), over text, or an image token itself;"
              "\n2: second softmax (M2), over the image tokens before a text token, or separate cross attention.")
    layout = separate(FIGURE_4_KIND)
    q, k, v = torch.randn(3, len(FIGURE_4), 4, 16)                          # (L, H, D) each
    difference = compact_attention(q[:layout.n_text], k, v, layout) - written_attention(q, k, v, layout)
    print("The written and the fast form of MMCA agree on this example: with random queries, keys and values they "
          f"differ by at most {difference.abs().max():.0e}.")


if __name__ == "__main__":
    main()
