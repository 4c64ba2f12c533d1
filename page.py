"""Where did the model look? A conversation as a page with a heat map for every word, or one answer as an image.

Under MMCA each word has a softmax over image tokens of its own, the second one. It is seen in each layer, as the
mean of the heads, at the position that predicts the word. And each image token is what one query of the resampler
took from the image's patches. One carried through the other says how much a word took from each patch:

    word ── looks (image tokens) ──► image tokens ── patches (tokens, P) ──► a square of patches

Attention says where a layer read, not why an answer came about. In what follows `chat` is a chat.Chat; chat.py
imports this file, and not the other way round. Side room of chat.py.
"""
import base64
import html
import json
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from cards import n_ranks
from data import Encoded
from mmca import IMAGE, TEXT, Layout, masked_softmax
from pixels import load_pixels, read_image
from visualchat import CONFIG, IGNORE, VisualChat, encoder_in
from vit import HEAD_DIM, PoolAttention, VisionTransformer
from weights import read_json, replacing

LOOKING = ("mmca", "written")    # forms of attention that have a softmax over image tokens


# ---- what is looked at ----

@dataclass(frozen=True)
class Looks:
    """Of a conversation with I images of n tokens each, and A answer tokens, those of </s> among them."""
    # (layers, A, I, n) what each answer token takes from each image token; over I and n the sum is 1, or 0 before
    # the first image
    tokens: Tensor
    patches: Tensor                 # (I, n, P) what each image token took from each patch; over P the sum is 1


def can_show(folder: Path) -> bool:
    """Whether `looks_of` could show a training result; True where that cannot be read, which `load` then says."""
    try:
        found = read_json(folder / CONFIG)
        encoder = encoder_in(Path(found["vit"])) if found.get("vit") else VisionTransformer
    except (OSError, ValueError, TypeError):
        return True
    return found.get("attention") in LOOKING and encoder is VisionTransformer


def patches_of(model: VisualChat, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The image tokens (I, n, C) of pixels, and what each took from each patch, (I, n, P): the heads' mean."""
    found = []

    def note_patches(attention: PoolAttention, inputs: tuple[Tensor, Tensor, Tensor]):
        parts = zip(inputs[:2], attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3))
        q, k = (F.linear(*part).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2).float()       # (I, H, n or P, D)
                for part in parts)
        found.append((q @ k.mT * HEAD_DIM ** -0.5).softmax(-1).mean(1))

    handle = model.vit.attn_pool.attn.register_forward_pre_hook(note_patches)
    try:
        return model.image_tokens(pixels), found[0]
    finally:
        handle.remove()


@torch.no_grad()
def looks_of(model: VisualChat, encoded: Encoded) -> Looks:
    """Run a whole conversation through the model and note where its answer tokens look.

    Raises ValueError where there is no image, no MMCA or no resampler, and as `read_image` does.
    """
    has_looks = model.llama.attention in LOOKING and hasattr(model.vit, "attn_pool")
    if not encoded.images or not has_looks:
        raise ValueError("there is nothing to show: where a model looked is seen with an image, and with a model "
                         "that was trained with mmca and QWen-VL's encoder")
    if n_ranks() > 1:
        raise ValueError("a rank has a share of the heads alone: /save FILE.json, and /load it without ranks")
    device, vision = model.projection.weight.device, model.vit.config
    pixels = torch.stack([load_pixels(file, vision.image_size) for file in encoded.images]).to(device)
    tokens, patches = patches_of(model, pixels)
    ids, kind, labels = (torch.tensor(values, device=device) for values in
                         (encoded.ids, encoded.kind, encoded.labels))
    asking = (labels != IGNORE).nonzero()[:, 0] - 1                         # (A): position t predicts t + 1
    rows = (kind == TEXT).cumsum(0)[asking] - 1                             # their places among text tokens
    n_seen = (kind == IMAGE).cumsum(0)[asking]
    sees = torch.arange(int((kind == IMAGE).sum()), device=device) < n_seen[:, None]           # (A, I·n)
    found = []

    def note_looks(number: int, q: Tensor, k: Tensor, layout: Layout):
        q, k = q.to(device), k.to(device)                                       # layers may lie on other cards
        q, k = q[rows].float(), k[layout.n_text:].float()                       # (A, H, D), (I·n, H_kv, D)
        q = q.unflatten(1, (k.shape[1], -1)).transpose(0, 1).flatten(1, 2)      # (H_kv, A · H/H_kv, D)
        scores = (q @ k.permute(1, 2, 0) * q.shape[-1] ** -0.5).unflatten(1, (len(rows), -1))
        found.append(masked_softmax(scores, sees[:, None]).mean((0, 2)))        # the mean of all heads, (A, I·n)

    model.llama.watch = note_looks
    try:
        model.llama(model.embed(ids[None], kind[None], tokens), kind[None])
    finally:
        model.llama.watch = None
    return Looks(torch.stack(found).unflatten(2, (len(encoded.images), -1)).cpu(), patches.cpu())


def words_of(ids: list[int], tokenizer) -> list[tuple[str, list[int]]]:
    """An answer's words, each with the blanks before it and the places of its tokens."""
    words, places = [], []
    for place, piece in enumerate(tokenizer.pieces(ids)):
        places += [place] * (place < len(ids))                  # not for what there is of an incomplete character
        if piece and (not words or piece.startswith((" ", "\n")) and words[-1][0].strip()):
            words.append((piece, places))
        elif piece:
            words[-1] = (words[-1][0] + piece, words[-1][1] + places)
        places = [] if piece else places
    return words


def word_looks(chat, looks: Looks) -> list[list[tuple[str, Tensor]]]:
    """For each round of a chat the words of the answer, each with the mean of its tokens' looks (layers, I, n)."""
    start, found = 0, []
    for one in chat.rounds:
        found.append([(text, looks.tokens[:, [start + place for place in places]].mean(1))
                      for text, places in words_of(one.ids, chat.tokenizer)])
        start += len(one.ids) + 1                                               # </s> has a label, too
    return found


# ---- one answer as an image ----

def draw_heatmap(chat, path: Path, side: int = 320):
    """Draw the images, each with where the last answer looked: the mean of its words and of all layers.

    Raises as `looks_of` does, and OSError or ValueError where the file cannot be written.
    """
    encoded = chat.encoded()
    looks = looks_of(chat.model, encoded)
    words = word_looks(chat, looks)[-1]
    if not words:
        raise ValueError("there is nothing to show: the last answer has no words")
    share = torch.stack([look.mean(0) for _, look in words]).mean(0)            # (I, n)
    heat = torch.einsum("in,inp->ip", share, looks.patches)
    grid = round(heat.shape[1] ** 0.5)                                         # patches of a side
    sheet = Image.new("RGB", (len(encoded.images) * (side + 10) + 10, side + 70), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (file, values) in enumerate(zip(encoded.images, heat / heat.max()), 1):
        left, image = 10 + (number - 1) * (side + 10), read_image(file).resize((side, side))
        opacity = Image.fromarray((values.view(grid, grid) * 200).byte().numpy())
        image.paste((255, 80, 0), mask=opacity.resize((side, side), Image.Resampling.BICUBIC))
        sheet.paste(image, (left, 30))
        pen.text((left, 8), f"image {number}: {share[number - 1].sum():.0%} of the attention to images", "black",
                 font_size=14)
    text = f"{chat.rounds[-1].question}  {chat.answer_of(chat.rounds[-1])}".replace("\n", " ")
    pen.text((10, side + 40), text[:len(encoded.images) * side // 7], "black", font_size=14)
    with replacing(path) as unfinished:
        sheet.save(unfinished, Image.registered_extensions()[path.suffix.lower()])


# ---- a page ----

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>A conversation about images</title>
<style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; --line: #8886; --warm: #c40; }
body { max-width: 60rem; margin: 0 auto; padding: 0 1rem 4rem; }
#images { position: sticky; top: 0; z-index: 1; display: flex; gap: .7rem; overflow-x: auto; padding: .7rem 0;
  background: Canvas; border-bottom: 1px solid var(--line); }
figure { margin: 0; flex: 0 0 auto; width: min(14rem, 42vw); }
.frame { position: relative; aspect-ratio: 1; }
.frame img, .frame canvas { position: absolute; inset: 0; width: 100%; height: 100%; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; }
meter { width: 100%; }
.question { margin: 1.4rem 0 .2rem; font-weight: 600; white-space: pre-wrap; }
.answer { margin: 0; white-space: pre-wrap; }
.word { border-radius: .2rem; cursor: pointer; border-bottom: 1px dotted var(--line); }
.word:hover, .word:focus, .word.on { outline: 2px solid var(--warm); }
</style></head><body>
<h1>A conversation about images</h1>
<p>Move over a word of an answer, tap it, or go to it with Tab: orange shows where the model looked when it made
the word, and the bars how it shared its attention among the images that were shown by then.
<label>Layer <select id="layer">LAYERS</select></label></p>
<div id="images">IMAGES</div>
<main>ROUNDS</main>
<script type="application/json" id="data">DATA</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent);
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const weights = bytes(data.weights), patches = bytes(data.patches);
const [, words, images, n] = data.shape, P = data.grid ** 2;
const frames = [...document.querySelectorAll("figure")], layer = document.getElementById("layer");
let shown = null;

function heatOf(image, word) {          // what the word took from each patch of the image
  const heat = new Float32Array(P), w = ((+layer.value * words + word) * images + image) * n;
  for (let i = 0; i < n; i++)
    for (let p = 0, row = image * n + i; p < P; p++)
      heat[p] += weights[w + i] * patches[row * P + p] * data.scale[row];
  return heat;
}

function show(element) {
  if (!element) return;
  if (shown) shown.classList.remove("on");
  shown = element;
  element.classList.add("on");
  const word = +element.dataset.word, heats = frames.map((_, image) => heatOf(image, word));
  const most = Math.max(1e-9, ...heats.map(heat => Math.max(...heat)));
  frames.forEach((figure, image) => {
    const pen = figure.querySelector("canvas").getContext("2d");
    const pixels = pen.createImageData(data.grid, data.grid);
    heats[image].forEach((value, p) => pixels.data.set([255, 80, 0, 200 * value / most], 4 * p));
    pen.putImageData(pixels, 0, 0);
    const share = data.shares[(+layer.value * words + word) * images + image];
    figure.querySelector("meter").value = share;
    figure.querySelector("output").textContent = Math.round(100 * share) + " %";
  });
}

for (const word of document.querySelectorAll(".word"))
  for (const event of ["pointerenter", "focus", "click"]) word.addEventListener(event, () => show(word));
layer.addEventListener("change", () => shown && show(shown));
if (location.hash)                      // talk.html#3
  show(document.querySelector(`[data-word="${+location.hash.slice(1)}"]`));
document.addEventListener("keydown", event => {
  const all = [...document.querySelectorAll(".word")], step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (step && document.activeElement !== layer && all.length)
    all[shown ? (all.indexOf(shown) + step + all.length) % all.length : 0].focus();
});
</script></body></html>
"""


def image_url(file, side: int = 448) -> str:
    """An image as a data URL: written anew, so without what its file says about place and time."""
    image, out = read_image(file), BytesIO()
    image.thumbnail((side, side))
    image.save(out, "WEBP", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"


def to_bytes(values: Tensor) -> tuple[str, Tensor]:
    """Values ≥ 0 as base64 of bytes, each row of the last dimension scaled to 255, and the scales."""
    most = values.amax(-1, keepdim=True).clamp(min=1e-12)
    return base64.b64encode((values / most * 255).round().byte().numpy().tobytes()).decode(), most[..., 0]


def write_page(chat, path: Path):
    """Write the conversation as one HTML file that needs nothing else; raises as `looks_of` does, and OSError."""
    encoded = chat.encoded()
    looks = looks_of(chat.model, encoded)
    n_images, n_tokens, n_patches = looks.patches.shape
    rounds, weights, n_shown = [], [], len(chat.left.images)
    for one, words in zip(chat.rounds, word_looks(chat, looks)):
        spans = []
        for text, look in words:
            word = html.escape(text.lstrip())
            spans.append(f'{text[:len(text) - len(text.lstrip())]}<span class="word" tabindex="0" '
                         f'data-word="{len(weights)}">{word}</span>')
            weights.append(look)
        n_shown, n_new = n_shown + len(one.images), len(one.images)
        shown = ", ".join(f"image {n}" for n in range(n_shown - n_new + 1, n_shown + 1))
        shown = shown and f"<small>[{shown}]</small> "
        rounds.append(f'<p class="question">{shown}{html.escape(one.question)}</p>\n'
                      f'<p class="answer">{"".join(spans)}</p>')
    grid = round(n_patches ** 0.5)                                             # patches of a side
    figures = [f'<figure><div class="frame"><img src="{image_url(file)}" alt="image {number}">'
               f'<canvas width="{grid}" height="{grid}"></canvas></div><figcaption>image {number}: '
               f'{html.escape(Path(str(file)).name)} <output></output><meter></meter></figcaption></figure>'
               for number, file in enumerate(encoded.images, 1)]
    of_words = torch.stack(weights, dim=1) if weights else looks.tokens[:, :0]          # (layers, words, I, n)
    of_words = torch.cat((of_words.mean(0, keepdim=True), of_words))        # first the mean of all layers
    patches, scale = to_bytes(looks.patches)
    # One scale for all images of a word: the page compares them.
    data = dict(shape=of_words.shape, grid=grid, weights=to_bytes(of_words.flatten(2))[0], patches=patches,
                scale=scale.flatten().tolist(), shares=[round(x, 4) for x in of_words.sum(-1).flatten().tolist()])
    layers = ["mean of all", *range(1, len(of_words))]
    parts = {"LAYERS": "".join(f'<option value="{n}">{name}</option>' for n, name in enumerate(layers)),
             "IMAGES": "\n".join(figures), "ROUNDS": "\n".join(rounds),
             "DATA": json.dumps(data).replace("<", "\\u003c")}
    page = PAGE
    for mark, part in reversed(parts.items()):          # from the end on: what was put in stands behind the mark
        page = page.replace(mark, part, 1)
    with replacing(path) as unfinished:
        unfinished.write_text(page, "utf-8", "backslashreplace")
