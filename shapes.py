"""A tiny world that stands in for the real one: drawn pictures, dialogues about them, a tokenizer and two small towers.

Every file has the format of the real thing, so `--size tiny` runs the very code of `--size 70b`. A picture shows one
shape; a dialogue introduces one to three pictures over its rounds and asks about any of them.

    python shapes.py              draws data/tiny, in seconds
    python shapes.py --pretrain   makes weights/tiny anew: tokenizer, ViT and LLaMA, in minutes
"""
import argparse
import json
import math
import random
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer
from torch import Tensor, nn
from tqdm import tqdm

from data import MARK, SYSTEM, Encoded, Round, collate, encode
from llama import Llama, LlamaConfig, Tokenizer
from mmca import IMAGE, TEXT, causal, mmca
from vit import PREFIX, VisionConfig, VisionTransformer, pixels
from visualchat import IGNORE

SIZES, COLORS = ["small", "big"], ["red", "orange", "yellow", "green", "blue", "purple"]
SHAPES, PLACES = ["circle", "square", "triangle", "star"], ["left", "right", "top", "bottom", "center"]
ATTRIBUTES = {"size": SIZES, "color": COLORS, "shape": SHAPES, "place": PLACES}
WIDTHS = [len(values) for values in ATTRIBUTES.values()]
Scene = tuple[str, str, str, str]           # what a picture shows, an attribute each: ("big", "red", "star", "left")
HELD_OUT = {("red", "star"), ("orange", "circle"), ("yellow", "square"),    # pairs that visual tuning never sees
            ("green", "triangle"), ("blue", "star"), ("purple", "circle")}
WEIGHTS = Path("weights/tiny")

LLAMA = LlamaConfig(hidden_size=128, intermediate_size=336, num_hidden_layers=5, num_attention_heads=4,
                    num_key_value_heads=4, vocab_size=320, rope_theta=1000.0)
VIT = VisionConfig(image_size=64, patch_size=8, width=96, layers=4, heads=4, mlp_width=384, output_dim=128, n_queries=4,
                   grid=8)


# ---- pictures ----

RGB = {"red": (214, 40, 40), "orange": (244, 140, 6), "yellow": (250, 214, 30), "green": (46, 158, 75),
       "blue": (40, 92, 200), "purple": (128, 60, 170)}
SPOT = {"left": (.25, .5), "right": (.75, .5), "top": (.5, .25), "bottom": (.5, .75), "center": (.5, .5)}
CORNERS = {"circle": [1] * 60, "square": [1] * 4, "triangle": [1] * 3, "star": [1, .42] * 5}   # radii, once around


def draw(scene: Scene, rng: random.Random, side: int = 224) -> Image.Image:
    """A picture of the scene, never twice the same: light, place, radius, turn and hue vary a little."""
    size, color, shape, place = scene
    light, big = rng.randint(170, 245), 2 * side                            # drawn at twice the size: smooth edges
    shade = Image.linear_gradient("L").rotate(rng.choice([0, 90, 180, 270])).point(lambda value: light - value // 6)
    picture = Image.merge("RGB", [shade.resize((big, big))] * 3)
    x, y = (big * (share + rng.uniform(-.04, .04)) for share in SPOT[place])
    radius = big * (rng.uniform(.18, .21) if size == "big" else rng.uniform(.08, .10))
    turn = rng.uniform(-.2, .2) + (math.pi / 4 if shape == "square" else 0)
    angle = 2 * math.pi / len(CORNERS[shape])
    corners = [(x + radius * r * math.sin(turn + i * angle), y - radius * r * math.cos(turn + i * angle))
               for i, r in enumerate(CORNERS[shape])]
    ImageDraw.Draw(picture).polygon(corners, tuple(min(255, value + rng.randint(-12, 12)) for value in RGB[color]))
    return picture.resize((side, side), Image.Resampling.LANCZOS)


# ---- dialogues ----

def random_scene(rng: random.Random, before: list[Scene], allowed) -> Scene:
    """A scene; after another one it often differs from it in a single attribute, so that comparing is worth it."""
    while True:
        scene = tuple(rng.choice(values) for values in ATTRIBUTES.values())
        if before and rng.random() < .6:
            keep, new = rng.choice(before), rng.randrange(4)
            scene = (*keep[:new], scene[new], *keep[new + 1:])
        if allowed(scene):
            return scene


def one_image(scenes: list[Scene], rng: random.Random) -> tuple[str, str, str]:
    """(kind, question, answer) about one of the images shown so far."""
    i = rng.randrange(len(scenes))
    size, color, shape, place = scenes[i]
    return rng.choice([("size", f"What size is image {i + 1}?", size),
                       ("color", f"What color is image {i + 1}?", color),
                       ("shape", f"What shape is image {i + 1}?", shape),
                       ("place", f"Where is the shape in image {i + 1}?", place),
                       ("describe", f"Describe image {i + 1}.", f"A {size} {color} {shape} at the {place}.")])


def which(scenes: list[Scene], rng: random.Random) -> tuple[str, str, str] | None:
    """Which of the images has a value that exactly one of them has."""
    unique = [(i, value) for i, scene in enumerate(scenes) for value in scene
              if sum(value in other for other in scenes) == 1]
    if not unique:
        return None
    i, value = rng.choice(unique)
    return "which", f"Which image is {value}?", f"image {i + 1}"


def present(scenes: list[Scene], rng: random.Random) -> tuple[str, str, str]:
    """Whether any of the images has a value; yes as often as no."""
    values = rng.choice(list(ATTRIBUTES.values()))
    shown = {value for scene in scenes for value in scene}
    yes = rng.random() < .5
    wanted = [value for value in values if (value in shown) == yes] or values
    value = rng.choice(wanted)
    return "any", f"Is any image {value}?", "yes" if value in shown else "no"


def same(scenes: list[Scene], rng: random.Random) -> tuple[str, str, str]:
    """Whether two images agree in an attribute; yes as often as no where the scenes allow it."""
    pairs = [(i, j, a) for i in range(len(scenes)) for j in range(i + 1, len(scenes)) for a in range(4)]
    yes = rng.random() < .5
    wanted = [(i, j, a) for i, j, a in pairs if (scenes[i][a] == scenes[j][a]) == yes] or pairs
    i, j, a = rng.choice(wanted)
    return ("same", f"Do image {i + 1} and image {j + 1} have the same {list(ATTRIBUTES)[a]}?",
            "yes" if scenes[i][a] == scenes[j][a] else "no")


def changed(scenes: list[Scene], rng: random.Random) -> tuple[str, str, str] | None:
    """What differs between two images that differ in exactly one attribute."""
    pairs = [(i, j, [a for a in range(4) if scenes[i][a] != scenes[j][a]])
             for i in range(len(scenes)) for j in range(i + 1, len(scenes))]
    single = [pair for pair in pairs if len(pair[2]) == 1]
    if not single:
        return None
    i, j, (a,) = rng.choice(single)
    return "changed", f"What changed from image {i + 1} to image {j + 1}?", f"the {list(ATTRIBUTES)[a]}"


def question(scenes: list[Scene], rng: random.Random) -> tuple[str, str, str]:
    """(kind, question, answer) about the images shown so far; with several, three in five compare them."""
    if len(scenes) == 1 or rng.random() < .4:
        return one_image(scenes, rng)
    return rng.choice([which, present, same, changed])(scenes, rng) or question(scenes, rng)


def dialogue(n_images: int, n_rounds: int, rng: random.Random, allowed) -> tuple[list[Scene], list[tuple]]:
    """Scenes, and rounds of (scenes introduced, kind, question, answer); images come at rounds drawn at random."""
    starts = sorted([0] + [rng.randrange(n_rounds // 2 + 1) for _ in range(n_images - 1)])
    scenes, rounds = [], []
    for i in range(n_rounds):
        new = []
        for _ in range(starts.count(i)):
            new.append(random_scene(rng, scenes + new, allowed))
        scenes = scenes + new
        rounds.append((new, *question(scenes, rng)))
    return scenes, rounds


def kind_of(text: str) -> str:
    """The kind of a question, from its words."""
    for start, kind in (("Describe", "describe"), ("Where", "place"), ("Which", "which"), ("Is any", "any"),
                        ("Do image", "same"), ("What changed", "changed")):
        if text.startswith(start):
            return kind
    return text.split()[1]                  # What size, What color, What shape


# ---- a data folder ----

def seen(scene: Scene) -> bool:
    return (scene[1], scene[2]) not in HELD_OUT


def unseen(scene: Scene) -> bool:
    return not seen(scene)


def write_world(folder: Path, n_dialogues: int, seed: int, allowed=seen, n_rounds: int = 6):
    """Pictures as COCO's folder has them and dialogues as LLaVA's files have them; one, two or three images each."""
    rng = random.Random(seed)
    pictures = folder / "coco/train2017"
    pictures.mkdir(parents=True, exist_ok=True)
    files = {"detail_23k.json": [], "complex_reasoning_77k.json": [], "conversation_58k.json": []}
    for number in tqdm(range(n_dialogues), desc=f"drawing {folder}", leave=False):
        scenes, rounds = dialogue(1 + number % 3, n_rounds, rng, allowed)
        names = [f"{number:08d}{i:04d}.jpg" for i in range(len(scenes))]
        for name, scene in zip(names, scenes):
            draw(scene, rng).save(pictures / name, quality=90)
        turns = []
        for new, _, asked, answer in rounds:
            turns += [{"from": "human", "value": asked + f"\n{MARK}" * len(new)}, {"from": "gpt", "value": answer}]
        file = "conversation_58k.json" if len(names) > 1 else ("detail_23k.json", "complex_reasoning_77k.json")[number % 2]
        files[file].append({"id": f"{number:08d}", "image": names if len(names) > 1 else names[0], "conversations": turns})
    for name, records in files.items():
        path = folder / "llava" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(records, indent=1))


# ---- tokenizer ----

def train_tokenizer(folder: Path) -> Tokenizer:
    """A sentencepiece model in LLaMA's format with a piece for every word of the world, bytes for all others.

    The words are given, not learned: a learned vocabulary joins "1:" and "1?" to pieces of their own, and the language
    model then never finds out that both mean the first image.
    """
    rng = random.Random(0)
    lines = [SYSTEM]
    for count in [1, 2, 3] * 2000:
        _, asked, answer = question([random_scene(rng, [], lambda scene: True) for _ in range(count)], rng)
        lines.append(f"### Image {count}:\n### Question: {asked}\n### Answer: {answer}")
    lines += [value for values in ATTRIBUTES.values() for value in values]
    pieces = {piece for line in lines for piece in re.findall(r"▁?(?:[A-Za-z]+|\d|###|[^\w▁\s])", "▁" + line.replace(" ", "▁"))}
    folder.mkdir(parents=True, exist_ok=True)
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), user_defined_symbols=sorted(pieces),
        vocab_size=len(pieces) + 320, hard_vocab_limit=False, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2)
    (folder / "tokenizer.vocab").unlink()
    return Tokenizer(folder)


# ---- pre-training the ViT: token i tells attribute i ----

def targets(scenes: list[Scene]) -> Tensor:
    """Attributes of scenes as numbers (N, 4)."""
    return torch.tensor([[values.index(value) for values, value in zip(ATTRIBUTES.values(), scene)] for scene in scenes])


def drawn(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pixels (n, 3, image_size, image_size) of random scenes and their attributes (n, 4)."""
    rng = random.Random(seed)
    scenes = [random_scene(rng, [], lambda scene: True) for _ in range(n)]
    return torch.stack([pixels(draw(scene, rng), VIT.image_size) for scene in tqdm(scenes, "drawing", leave=False)]), targets(scenes)


def pretrain_vit(steps: int, batch: int = 64) -> VisionTransformer:
    """A ViT whose token i linearly gives attribute i away; the linear heads are dropped. Prints what they read."""
    vit, heads = VisionTransformer(VIT), nn.ModuleList(nn.Linear(VIT.output_dim, width) for width in WIDTHS)
    images, wanted = drawn(8000, seed=1)
    optimizer = torch.optim.AdamW([*vit.parameters(), *heads.parameters()], 2e-3, (0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    for step in (bar := tqdm(range(steps), "ViT")):
        rows = torch.randint(len(images), (batch,))
        loss = sum(F.cross_entropy(head(token), target) for head, token, target
                   in zip(heads, vit(images[rows]).unbind(1), wanted[rows].unbind(1)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vit.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    images, wanted = drawn(2000, seed=2)
    with torch.no_grad():
        tokens = torch.cat([vit(part) for part in images.split(100)]).unbind(1)
        right = torch.stack([head(token).argmax(-1) for head, token in zip(heads, tokens)], 1) == wanted
    print("ViT, attributes read from fresh pictures:", "  ".join(
        f"{name} {share:.4f}" for name, share in zip(ATTRIBUTES, right.float().mean(0).tolist())),
        f" all four {right.all(1).float().mean():.4f}")
    return vit


# ---- pre-training LLaMA: four words in random order stand where image tokens will stand ----

class Dialogues:
    """Batches of text-only dialogues, and where in them the auxiliary heads are asked what."""

    def __init__(self, tokenizer: Tokenizer, seed: int):
        self.tokenizer, self.rng = tokenizer, random.Random(seed)
        piece = tokenizer.model.piece_to_id
        self.image = piece("▁image")
        self.digits = {piece(f"▁{i}"): i - 1 for i in (1, 2, 3)}
        self.values = {piece(f"▁{value}"): value for values in ATTRIBUTES.values() for value in values}
        self.ids = {value: id for id, value in self.values.items()}

    def probes(self, encoded: Encoded, scenes: list[Scene]):
        """Rows (head, position, target) for one dialogue.

        register: the first token after an image tells its number and attributes; number: an image's number in a
        question tells its attributes; pair: the second number tells which attributes the two images share; word: an
        attribute in a question tells which of the images have it.
        """
        shown, numbers, numeric = 0, [], targets(scenes).tolist()
        for p, (id, kind, label) in enumerate(zip(encoded.ids, encoded.kind, encoded.labels)):
            if kind == TEXT and encoded.kind[p - 1] == IMAGE and p:
                yield "register", p, [shown, *numeric[shown]]
                shown += 1
            if id == self.tokenizer.bos:
                numbers = []
            elif label == IGNORE and id in self.digits and encoded.ids[p - 1] == self.image:
                numbers.append(numeric[self.digits[id]])
                yield "number", p, numbers[-1]
                if len(numbers) == 2:
                    yield "pair", p, [float(a == b) for a, b in zip(*numbers)]
            elif label == IGNORE and kind == TEXT and id in self.values:
                yield "word", p, [float(i < shown and self.values[id] in scenes[i]) if i < len(scenes) else 0. for i in range(3)]

    def batch(self, n: int, n_rounds: int, most_images: int):
        """ids, kind, labels (n, S), each dialogue's probes, and each question's (row, kind, images shown)."""
        rows, probes, asked = [], [], []
        for row in range(n):
            scenes, rounds = dialogue(self.rng.randint(1, most_images), n_rounds, self.rng, lambda scene: True)
            encoded = encode([Round(tuple(new), q, a) for new, _, q, a in rounds], self.tokenizer, 4)
            words = iter(self.ids[value] for scene in scenes for value in self.rng.sample(scene, 4))
            probes += [(name, row, p, target) for name, p, target in self.probes(encoded, scenes)]
            encoded.ids = [next(words) if kind == IMAGE else id for id, kind in zip(encoded.ids, encoded.kind)]
            rows.append({name: torch.tensor(getattr(encoded, name)) for name in ("ids", "kind", "labels")})
            shown = 0
            for new, kind, _, _ in rounds:
                shown += len(new)
                asked.append((row, kind, shown))
        return rows, probes, asked


HEADS = {"register": (1, 3 + sum(WIDTHS)), "number": (2, sum(WIDTHS)), "pair": (3, 4), "word": (3, 3)}   # layer, width


def auxiliary_loss(heads: nn.ModuleDict, states: list[Tensor], probes: list) -> Tensor:
    """What the heads miss at their places; states: the output (B, S, C) of every layer."""
    total = 0
    for name, (layer, _) in HEADS.items():
        asked = [probe[1:] for probe in probes if probe[0] == name]
        if not asked:
            continue
        rows, places, wanted = zip(*asked)
        guess, wanted = heads[name](states[layer][list(rows), list(places)]), torch.tensor(wanted)
        if name in ("pair", "word"):
            total = total + F.binary_cross_entropy_with_logits(guess, wanted)
        else:
            widths = ([3] if name == "register" else []) + WIDTHS
            total = total + sum(map(F.cross_entropy, guess.split(widths, 1), wanted.unbind(1))) / len(widths)
    return total


def batch_of(rows):
    return collate([{**row, "images": torch.empty(0, 3, 1, 1)} for row in rows])


def answers(llama, batch):
    hidden = llama(llama.embed_tokens(batch["ids"]), batch["kind"])[:, :-1]
    target = batch["labels"][:, 1:]
    logits = llama.lm_head(hidden[target != IGNORE])
    return logits, target


def read_score(llama, dialogues, n, n_rounds=6):
    from collections import defaultdict
    table = defaultdict(lambda: [0, 0])
    with torch.no_grad():
        for most in [1, 3]:
          for _ in range(n // 50):
            rows, _, asked = dialogues.batch(50, n_rounds, most)
            batch = batch_of(rows)
            logits, target = answers(llama, batch)
            good = torch.ones_like(target, dtype=torch.bool)
            good[target != IGNORE] = logits.argmax(-1) == target[target != IGNORE]
            starts = (target != IGNORE) & (F.pad(target, (1, 0))[:, :-1] .eq(IGNORE) | (torch.arange(target.shape[1]) == 0))
            number = (starts.flatten().cumsum(0) - 1)[(target != IGNORE).flatten()]
            right = torch.ones(len(asked)).index_reduce(0, number, good[target != IGNORE].float(), "amin")
            for (row, kind, shown), r in zip(asked, right.tolist()):
                key = ("one" if shown == 1 else "several", kind)
                table[key][0] += r; table[key][1] += 1
    for g in ("one", "several"):
        a = [(k[1], v) for k, v in sorted(table.items()) if k[0] == g]
        tot = sum(v[0] for _, v in a) / sum(v[1] for _, v in a)
        print(g, f"{tot:.3f}", "  ".join(f"{k} {v[0]/v[1]:.3f}({v[1]})" for k, v in a), flush=True)


def pretrain_llama(tokenizer, steps, batch=32, lr=2e-3, every=100, n_rounds=8):
    from dataclasses import replace
    import time
    llama = Llama(replace(LLAMA, vocab_size=tokenizer.model.vocab_size()))
    for p in llama.parameters():
        if p.ndim == 2: nn.init.normal_(p, std=0.02 if p.shape[0] > 1000 else p.shape[1] ** -0.5 * 0.5)
    nn.init.normal_(llama.embed_tokens.weight, std=0.1)
    print(sum(p.numel() for p in llama.parameters()))
    heads = nn.ModuleDict({name: nn.Linear(LLAMA.hidden_size, width) for name, (_, width) in HEADS.items()})
    states = {}
    for i, layer in enumerate(llama.layers):
        layer.register_forward_hook(lambda module, args, out, i=i: states.__setitem__(i, out))
    dialogues, fresh = Dialogues(tokenizer, 3), Dialogues(tokenizer, 4)
    optimizer = torch.optim.AdamW([*llama.parameters(), *heads.parameters()], lr, (0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 50, 1, (steps - s) / (0.4 * steps)))
    t0 = time.time(); mean = []
    for step in range(steps):
        most = 1 if step < 100 else 3
        rows, probes, _ = dialogues.batch(batch, n_rounds, most)
        attention = random.choice([mmca, causal])
        for layer in llama.layers:
            layer.self_attn.attention = attention
        b = batch_of(rows)
        logits, target = answers(llama, b)
        loss = F.cross_entropy(logits, target[target != IGNORE])
        aux = auxiliary_loss(heads, states, probes)
        optimizer.zero_grad(); (loss + aux).backward()
        nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step(); schedule.step()
        mean.append(loss.item())
        if step % every == every - 1:
            print(step + 1, f"{time.time()-t0:.0f}s loss {sum(mean[-50:])/len(mean[-50:]):.4f} aux {aux.item():.3f}", flush=True)
            for a in (mmca,):
                for layer in llama.layers: layer.self_attn.attention = a
                read_score(llama, fresh, 100)
    return llama
