"""Who may look at whom: multi-modal causal attention (MMCA), Figure 4 of DeepSpeed-VisualChat (arXiv 2309.14327).

An image token looks at itself alone. A text token looks at the text before it and, with a softmax of its own,
at the image tokens before it, so that long images and short questions do not compete for one unit of attention:

    MMCA(Q, K, V) = softmax(QKᵀ ⊙ M1) V + softmax(QKᵀ ⊙ M2) V

⊙ hides: where M is 0 the score counts as minus infinity, and a query that may look at nothing gets 0.
`python mmca.py` prints M for the paper's own sentence, `python mmca.py figure4.png` draws it. Next file: llama.py.

Shapes, in every file: B batch, T queries, S keys (S = past + T), H heads, D head width, C model width,
N images, P patches.
"""
import sys

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


# ---- the same without ever holding the scores ----

def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """softmax(QKᵀ ⊙ allowed) V by torch's fused kernel; a query without an allowed key gets zeros.

    q (B, H, T, D); k, v (B, H_kv, S, D); allowed (B, 1, T, S) bool; returns (B, H, T, D).
    """
    if (shared := q.shape[1] // k.shape[1]) > 1:
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    some = allowed.any(dim=-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed | ~some)    # all of a row masked would be NaN
    return out * some


def fused_mmca(q: Tensor, k: Tensor, v: Tensor, kind: Tensor, past: int = 0) -> Tensor:
    """What `mmca` gives, in less memory and time: the form that llama.py uses. Shapes as in `mmca`."""
    m = matrix(kind, past)[:, None]                                         # (B, 1, T, S)
    return attend(q, k, v, m == 1) + attend(q, k, v, m == 2)


def causal(q: Tensor, k: Tensor, v: Tensor, kind: Tensor, past: int = 0) -> Tensor:
    """Causal attention, one softmax for image and text alike: the paper's baseline. Shapes as in `mmca`."""
    place = torch.arange(kind.shape[1], device=kind.device)
    earlier = place[past:, None] >= place                                   # (T, S)
    allowed = earlier & (kind[:, past:, None] != PAD) & (kind[:, None, :] != PAD)
    return attend(q, k, v, allowed[:, None])


ATTENTION = {"mmca": fused_mmca, "causal": causal}


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
