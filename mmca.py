"""Who may look at whom: multi-modal causal attention (MMCA), Figure 4 of DeepSpeed-VisualChat (arXiv 2309.14327).

An image token looks at itself alone. A text token looks at the text before it and, with a softmax of its own,
at the image tokens before it, so that long images and short questions do not compete for one unit of attention:

    MMCA(Q, K, V) = softmax(QKᵀ ⊙ M1) V + softmax(QKᵀ ⊙ M2) V

M1 and M2 are 1 where a query (row) may look at a key (column), M1 at text or at itself, M2 from text to images. ⊙
hides: where they are 0 the score counts as minus infinity, and a query that may look at nothing gets 0. (The usual
factor 1/√D of the scores is left out here, not in the code.)
`python mmca.py` prints both as one matrix for the paper's own sentence, `python mmca.py figure4.png` draws it.
Next file: llama.py.

Shapes, in every file: B batch, T queries, S keys (S = past + T), H heads, H_kv heads of keys and values, D head
width, C model width. N images, P patches; once a batch is taken apart (`layout`), N is all of its tokens.
"""
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PAD, TEXT, IMAGE = 0, 1, 2      # `kind` (B, S) holds one of these per position: the only truth about modality

FIGURE_4 = ["User", ":", "<I-token1>", "<I-token2>", "<I-token3>", "Please", "describe", "the", "image", "."]


def matrix(kind: Tensor, past: int = 0) -> Tensor:
    """Figure 4's M (B, T, S) for kind (B, S): 1 where M1 lets a query look at a key, 2 where M2 does, else 0.

    The queries are the last T = S - past positions. PAD neither looks nor is looked at.
    """
    place = torch.arange(kind.shape[1], device=kind.device)
    earlier = place[past:, None] >= place                                   # (T, S), a position itself included
    itself = place[past:, None] == place
    query, key = kind[:, past:, None], kind[:, None, :]
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
    """QKᵀ / sqrt(D) in float32, (B, H_kv, H/H_kv, T, S): in grouped-query attention H/H_kv heads share keys."""
    q = q.unflatten(1, (k.shape[1], -1)).float()                            # (B, H_kv, H/H_kv, T, D)
    return q @ k[:, :, None].float().mT * q.shape[-1] ** -0.5


def mmca(q: Tensor, k: Tensor, v: Tensor, kind: Tensor, past: int = 0) -> Tensor:
    """Multi-modal causal attention, Figure 4, with both softmaxes written out.

    q (B, H, T, D); k, v (B, H_kv, S, D), q and k after RoPE; kind (B, S); T = S - past, so that with a KV cache
    only the new positions are queries. Returns (B, H, T, D) in v's type; PAD rows are zero.
    """
    m = matrix(kind, past)[:, None, None]                                   # one for all heads
    scores = scaled_scores(q, k)
    v = v[:, :, None].float()
    out = masked_softmax(scores, m == 1) @ v + masked_softmax(scores, m == 2) @ v
    return out.flatten(1, 2).to(k.dtype)                                    # (B, H, T, D)


def all_text(kind: Tensor) -> Tensor:
    """The kind of causal attention: image tokens count as text."""
    return kind.clamp(max=TEXT)


def causal(q: Tensor, k: Tensor, v: Tensor, kind: Tensor, past: int = 0) -> Tensor:
    """Causal attention, the paper's baseline: all tokens count as text, so M1 is all there is. Shapes as above."""
    return mmca(q, k, v, all_text(kind), past)


# ---- the same without needless work: what llama.py uses ----

# An image token looks at one key, its own, and a softmax over one key is 1: its output is its own value, whatever
# its query. So text and image tokens are taken apart: text looks at text alone, in its own order, which is plain
# causal attention; and each run of text between two images looks at all images before it, which needs no mask.
# Both are what torch's fused kernel does best, and M is never built.

@dataclass(frozen=True)
class Talk:
    """One conversation of a batch: how many text and how many image tokens it has, and who sees whom."""
    text: int
    image: int
    runs: list[tuple[int, int]]     # (text tokens in a row, image tokens that they see, the past's included)


@dataclass(frozen=True)
class Layout:
    """Where the N tokens of a batch stand once they are taken apart: all text first, then all image tokens."""
    place: Tensor                   # (N) where in the flattened batch a token comes from
    position: Tensor                # (N) its place in its own conversation, from 0
    talks: list[Talk]

    @property
    def n_text(self) -> int:
        return sum(talk.text for talk in self.talks)


def layout(kind: Tensor, lengths: list[int] | None = None, past: list[tuple[int, int]] | None = None) -> Layout:
    """Take kind (B, T) apart; PAD is left out, and may stand anywhere.

    lengths: of the conversations that lie one after the other in the flattened rows; by default each row is one.
    past: how many text and image tokens of each conversation came before, in a KV cache.
    """
    lengths, cells = lengths or [kind.shape[1]] * len(kind), kind.flatten().cpu()
    position, talks = [], []
    for cell, (texts, images) in zip(cells.split(lengths), past or [(0, 0)] * len(lengths)):
        seen = (cell == IMAGE).cumsum(0)[cell == TEXT] + images                 # by each text token
        values, counts = seen.unique_consecutive(return_counts=True)
        talks.append(Talk(len(seen), int((cell == IMAGE).sum()), list(zip(counts.tolist(), values.tolist()))))
        position.append((cell != PAD).cumsum(0) - 1 + texts + images)
    place = torch.cat(((cells == TEXT).nonzero(), (cells == IMAGE).nonzero()))[:, 0]
    return Layout(place.to(kind.device), torch.cat(position)[place].to(kind.device), talks)


def attend(q: Tensor, k: Tensor, v: Tensor, **mask) -> Tensor:
    """torch's fused softmax(QKᵀ / sqrt(D)) V, scores in float32; heads of a group share a key (GQA).

    mask: attn_mask or is_causal, as torch has them; without, every query looks at every key.
    """
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **mask)


def look_back(q: Tensor, text: tuple[Tensor, Tensor], image: tuple[Tensor, Tensor], runs: list) -> Tensor:
    """Both softmaxes for the text of one conversation.

    q (1, H, T, D) of the new text; keys and values of text (1, H_kv, S, D) and of image tokens (1, H_kv, I, D),
    the past included; runs as in Talk. Returns (1, H, T, D).
    """
    new, past = q.shape[2], text[0].shape[2] - q.shape[2]
    # With a past, is_causal would count from the wrong end; a single new token looks at all, which needs no mask.
    mask = q.new_ones(new, past + new, dtype=torch.bool).tril(past) if past and new > 1 else None
    out = attend(q, *text, attn_mask=mask, is_causal=not past)
    if not image[0].shape[2] or not new:
        return out
    parts = [attend(part, *(x[:, :, :seen] for x in image)) if seen else torch.zeros_like(part)
             for part, (_, seen) in zip(q.split([count for count, _ in runs], dim=2), runs)]
    return out + torch.cat(parts, dim=2)


def compact_mmca(q: Tensor, k: Tensor, v: Tensor, layout: Layout, extend: Callable | None = None) -> Tensor:
    """What `mmca` gives the text of all conversations, (n_text, H, D); image tokens get their own values.

    q (n_text, H, D) and k, v (N, H_kv, D) of the new tokens, q and k after RoPE, all as `layout` has them. extend:
    a KV cache's function from a conversation's number and its new keys and values, of text and of image tokens, to
    those of its past and the new ones, as Cache.extend in llama.py.
    """
    texts, images = [talk.text for talk in layout.talks], [talk.image for talk in layout.talks]
    q, k, v = (x.transpose(0, 1)[None].split(sizes, dim=2)                      # of (1, H, tokens, D)
               for x, sizes in ((q, texts), (k, texts + images), (v, texts + images)))
    out = []
    for row, (talk, query) in enumerate(zip(layout.talks, q)):
        text, image = ((k[i], v[i]) for i in (row, row + len(texts)))
        if extend:
            text, image = extend(row, text, image)
        out.append(look_back(query, text, image, talk.runs)[0].transpose(0, 1))
    return torch.cat(out)


ATTENTION = {"mmca": lambda kind: kind, "causal": all_text}     # name: the kind that it makes of each token's kind


# ---- Figure 4, to look at ----

def figure_4() -> Tensor:
    """M (10, 10) for the paper's ten tokens."""
    return matrix(torch.tensor([[IMAGE if token.startswith("<I") else TEXT for token in FIGURE_4]]))[0]


def show(m: Tensor, tokens: list[str], color: bool) -> str:
    """M (S, S) as lines of text, a query per line; blue 1, orange 2 where color is set."""
    paint = ["{}", "\033[44;97m{}\033[0m", "\033[43;30m{}\033[0m"] if color else ["{}"] * 3
    width = max(map(len, tokens))
    return "\n".join(f"{token:>{width}}  " + "".join(paint[cell].format(f" {cell} ") for cell in row)
                     for token, row in zip(tokens, m.tolist()))


def draw(m: Tensor, tokens: list[str], path: str, cell: int = 48, margin: int = 120):
    """Write M (S, S) as a picture; raises ValueError for a file type that Pillow does not know."""
    from PIL import Image, ImageDraw                                    # the attention itself needs torch alone
    colors = {0: "white", 1: "#4C72B0", 2: "#DD8452"}
    side = cell * len(tokens)
    picture = Image.new("RGB", (margin + side + 20, side + 20), "white")
    pen = ImageDraw.Draw(picture)
    for i, (token, row) in enumerate(zip(tokens, m.tolist())):
        top = 10 + i * cell
        pen.text((margin - 10, top + cell // 2), token, "black", anchor="rm", font_size=16)
        for j, value in enumerate(row):
            left = margin + j * cell
            pen.rectangle((left, top, left + cell, top + cell), colors[value], "#999999")
            pen.text((left + cell // 2, top + cell // 2), str(value), "white" if value else "#999999",
                     anchor="mm", font_size=18)
    picture.save(path)


def main():
    m = figure_4()
    if sys.argv[1:]:
        try:
            draw(m, FIGURE_4, sys.argv[1])
        except (OSError, ValueError) as error:
            sys.exit(f"mmca.py: {error}; name a picture to write, such as figure4.png")
        print(f"wrote {sys.argv[1]}")
    else:
        print(show(m, FIGURE_4, color=sys.stdout.isatty()))
        print("\na row is a query, a column a key; 1: softmax over M1 (text before, an image token itself)"
              "\n                                  2: softmax over M2 (text to the image tokens before)")


if __name__ == "__main__":
    main()
