"""A tiny world that stands in for the real one: drawn pictures, dialogues about them, a tokenizer, small towers.

Every file has the format of the real thing, so `--size tiny` runs the very code of `--size 70b`. A picture shows
one shape; a dialogue introduces one to three pictures over its rounds and asks about any of them.

    python shapes.py              draws data/tiny and examples/, in seconds
    python shapes.py --pretrain   makes weights/tiny anew: tokenizer, ViT and LLaMA

Before: data.py. Next file: train.py.
"""
import argparse
import base64
import json
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from io import BytesIO
from itertools import accumulate, combinations
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer
from torch import Tensor, nn
from tqdm import tqdm

from data import (COCO, DETAIL, DIALOGUE, MARK, SOURCES, SPARKLES_MARK, SYSTEM, TAGS, Encoded, Round, collate,
                  encode, tensors)
from llama import Llama, LlamaConfig, Tokenizer
from mmca import ATTENTION, IMAGE, TEXT
from vit import IN_CONFIG, PREFIX, VisionConfig, VisionTransformer, pixels
from visualchat import IGNORE, whole_answers

SIZES, COLORS = ["small", "big"], ["red", "pink", "yellow", "green", "blue", "purple"]
SHAPES, PLACES = ["circle", "square", "triangle", "star"], ["left", "right", "top", "bottom", "center"]
ATTRIBUTES = {"size": SIZES, "color": COLORS, "shape": SHAPES, "place": PLACES}
COMPARING = ("any", "which", "same", "changed")
TOPICS = (*ATTRIBUTES, "describe", *COMPARING)
WIDTHS = [len(values) for values in ATTRIBUTES.values()]
Scene = tuple[str, str, str, str]           # what a picture shows: ("big", "red", "star", "left")
HELD_OUT = {("red", "star"), ("pink", "circle"), ("yellow", "square"),    # pairs that visual tuning never sees
            ("green", "triangle"), ("blue", "star"), ("purple", "circle")}
EXAMPLES = {"a.png": ("big", "red", "circle", "left"), "b.png": ("big", "blue", "circle", "left"),
            "c.png": ("small", "yellow", "star", "top")}
WEIGHTS, DATA = Path("weights/tiny"), Path("data/tiny")
N_DIALOGUES, N_TEST, TESTS = 1600, 240, ("test_seen", "test_unseen")
# What `python shapes.py --pretrain` printed when it made weights/tiny, and its time, on one core:
# ViT, 12 minutes: attributes read from 2000 fresh pictures: size 1.0000, color 1.0000, shape 0.9975, place 1.0000.
# LLaMA, 43 minutes on two shared cores, 2000 fresh dialogues with written descriptions: one image 1.0000 right;
# several images 0.9942 with MMCA and 0.9939 with causal attention; weakest is "which" with 0.961 and 0.959.
STEPS = {"vit": 3000, "llama": 6000}

LLAMA = LlamaConfig(hidden_size=128, intermediate_size=336, num_hidden_layers=6, num_attention_heads=4,
                    num_key_value_heads=4, vocab_size=0, rope_theta=1000.0)
VIT = VisionConfig(image_size=64, patch_size=8, width=96, layers=4, heads=4, mlp_width=384, output_dim=128,
                   n_queries=4, grid=8)


# ---- pictures ----

RGB = {"red": (214, 40, 40), "pink": (242, 130, 180), "yellow": (250, 214, 30), "green": (46, 158, 75),
       "blue": (40, 92, 200), "purple": (128, 60, 170)}
SPOT = {"left": (.25, .5), "right": (.75, .5), "top": (.5, .25), "bottom": (.5, .75), "center": (.5, .5)}
CORNERS = {"circle": [1] * 60, "square": [1] * 4, "triangle": [1] * 3, "star": [1, .42] * 5}   # radii, once around


def draw(scene: Scene, rng: random.Random, side: int = 224) -> Image.Image:
    """A picture of the scene, never twice the same: light, place, radius, turn and hue vary a little."""
    size, color, shape, place = scene
    light, big = rng.randint(170, 245), 2 * side                            # drawn at twice the size: smooth edges
    shade = Image.linear_gradient("L").rotate(rng.choice([0, 90, 180, 270])).resize((big, big))
    picture = Image.merge("RGB", [shade.point(lambda value: light - value // 6)] * 3)
    x, y = (big * (share + rng.uniform(-.04, .04)) for share in SPOT[place])
    radius = big * (rng.uniform(.18, .21) if size == "big" else rng.uniform(.08, .10))
    turn = rng.uniform(-.2, .2) + (math.pi / 4 if shape == "square" else 0)
    angle = 2 * math.pi / len(CORNERS[shape])
    corners = [(x + radius * r * math.sin(turn + i * angle), y - radius * r * math.cos(turn + i * angle))
               for i, r in enumerate(CORNERS[shape])]
    ImageDraw.Draw(picture).polygon(corners, tuple(min(255, value + rng.randint(-12, 12)) for value in RGB[color]))
    return picture.resize((side, side), Image.Resampling.LANCZOS)


# ---- dialogues ----

def anything(scene: Scene) -> bool:
    return True


def seen(scene: Scene) -> bool:
    """Whether a scene may occur in visual tuning."""
    return (scene[1], scene[2]) not in HELD_OUT


def unseen(scene: Scene) -> bool:
    return not seen(scene)


def random_scene(rng: random.Random, before: list[Scene], allowed) -> Scene:
    """A scene; after another one it often differs from it in a single attribute, so that comparing is worth it."""
    while True:
        scene = tuple(rng.choice(values) for values in ATTRIBUTES.values())
        if before and rng.random() < .6:
            keep, new = rng.choice(before), rng.randrange(4)
            scene = (*keep[:new], scene[new], *keep[new + 1:])
        if allowed(scene):
            return scene


def questions(scenes: list[Scene], names: list[str]) -> Iterator[tuple[str, str, str]]:
    """Every (topic, question, answer) about images that are called by these names; comparisons for several."""
    for name, (size, color, shape, place) in zip(names, scenes):
        yield "size", f"What size is the shape in {name}?", size
        yield "color", f"What color is the shape in {name}?", color
        yield "shape", f"What shape is in {name}?", shape
        yield "place", f"Where is the shape in {name}?", place
        yield "describe", f"Describe {name}.", f"A {size} {color} {shape} at the {place}."
    if len(scenes) == 1:
        return
    phrases = {"size": "a {} shape", "color": "a {} shape", "shape": "a {}", "place": "a shape at the {}"}
    for about, value in ((about, value) for about, values in ATTRIBUTES.items() for value in values):
        having = [name for name, scene in zip(names, scenes) if value in scene]
        yield "any", f"Does any image show {phrases[about].format(value)}?", "yes" if having else "no"
        if len(having) == 1:
            yield "which", f"Which image shows {phrases[about].format(value)}?", having[0]
    for (one, a), (other, b) in combinations(zip(names, scenes), 2):
        differing = [about for about, x, y in zip(ATTRIBUTES, a, b) if x != y]
        for about in ATTRIBUTES:
            yield "same", f"Do {one} and {other} have the same {about}?", "no" if about in differing else "yes"
        if len(differing) == 1:
            yield "changed", f"What changed from {one} to {other}?", f"the {differing[0]}"


def question(scenes: list[Scene], names: list[str], rng: random.Random) -> tuple[str, str, str]:
    """One of `questions`: with several images three in five compare them; each answer to a topic is as likely."""
    table = {}
    for topic, text, answer in questions(scenes, names):
        table.setdefault(topic, {}).setdefault(answer, []).append(text)
    compare = len(scenes) > 1 and rng.random() < .6
    topic = rng.choice([topic for topic in table if (topic in COMPARING) == compare])
    answer = rng.choice(list(table[topic]))
    return topic, rng.choice(table[topic][answer]), answer


def different(scenes: list[Scene], names: list[str], n: int, rng: random.Random) -> list[tuple[str, str]]:
    """n different questions with their answers."""
    found = {}
    while len(found) < n:
        _, asked, answer = question(scenes, names, rng)
        found[asked] = answer
    return list(found.items())


def dialogue(n_images: int, n_rounds: int, rng: random.Random, allowed) -> tuple[list[Scene], list[tuple]]:
    """Scenes, and rounds of (scenes introduced, topic, question, answer); about half of the images come first.

    Most call the images "image 1" and so on, one in five in another of TAGS' ways. A question about the last image
    often says "the image" if that came alone.
    """
    names = TAGS[0] if rng.random() < .8 else rng.choice(TAGS[1:])
    starts = [0] + [rng.choice([0, rng.randrange(n_rounds // 2 + 1)]) for _ in range(n_images - 1)]
    scenes, rounds, alone = [], [], True
    for i in range(n_rounds):
        before = len(scenes)
        for _ in range(starts.count(i)):
            scenes.append(random_scene(rng, scenes, allowed))
        alone = len(scenes) - before == 1 or len(scenes) == before and alone
        topic, asked, answer = question(scenes, names, rng)
        if alone and topic not in COMPARING and rng.random() < .3:
            asked = asked.replace(names[len(scenes) - 1], "the image")
        rounds.append((scenes[before:], topic, asked, answer))
    return scenes, rounds


def topic_of(text: str) -> str:
    """The topic of a question, from its first words."""
    first, second = text.split()[:2]
    known = {"Describe": "describe", "Where": "place", "Which": "which", "Does": "any", "Do": "same"}
    return known.get(first, second)


# ---- a data folder ----

def write_json(path: Path, content):
    path.write_text(json.dumps(content, indent=1) + "\n")


class Pictures:
    """Draws scenes into a folder; the name of the n-th picture is its number."""

    def __init__(self, folder: Path, rng: random.Random, digits: int = 12):
        self.folder, self.rng, self.digits, self.count = folder, rng, digits, 0
        folder.mkdir(parents=True, exist_ok=True)

    def draw(self, scene: Scene) -> str:
        name = f"{self.count:0{self.digits}d}"
        draw(scene, self.rng).save(self.folder / f"{name}.jpg", quality=90)
        self.count += 1
        return name


def llava_record(images: list[str], rounds: list[tuple[int, str, str]]) -> dict:
    """A record in LLaVA's format, of rounds (images introduced, question, answer)."""
    turns = [{"from": speaker, "value": text} for n, asked, answer in rounds
             for speaker, text in (("human", asked + f"\n{MARK}" * n), ("gpt", answer))]
    files = [f"{image}.jpg" for image in images]
    return {"id": images[0], "image": files if len(files) > 1 else files[0], "conversations": turns}


def write_dialogues(folder: Path, n: int, pictures: Pictures, allowed, least_images: int):
    """LLaVA's conversation_58k.json, with n dialogues of six rounds about up to three pictures."""
    records = []
    for i in tqdm(range(n), f"drawing {folder}", leave=False):
        scenes, rounds = dialogue(least_images + i % (4 - least_images), 6, pictures.rng, allowed)
        records.append(llava_record([pictures.draw(scene) for scene in scenes],
                                    [(len(new), asked, answer) for new, _, asked, answer in rounds]))
    write_json(folder / DIALOGUE, records)


def write_llava(folder: Path, n: int, pictures: Pictures, allowed) -> list[tuple[str, Scene]]:
    """LLaVA's other two files, with n records of three rounds about one picture each; returns the pictures."""
    records, shown = [], []
    for _ in tqdm(range(n), f"drawing {folder}", leave=False):
        scene = random_scene(pictures.rng, [scene for _, scene in shown[-1:]], allowed)
        shown.append((pictures.draw(scene), scene))
        asked = different([scene], ["the image"], 3, pictures.rng)
        records.append(llava_record([shown[-1][0]], [(int(i == 0), *turn) for i, turn in enumerate(asked)]))
    for file, part in zip(DETAIL, (records[::2], records[1::2])):
        write_json(folder / file, part)
    return shown


def write_mimicit(folder: Path, code: str, samples: list[list[tuple[str, Scene]]], rng: random.Random):
    """The instructions of MIMIC-IT's part `code`, three related ones for each sample of (picture, scene)."""
    data = {}
    for i, sample in enumerate(samples):
        keys = [f"{code}_INS_{3 * i + k:06d}" for k in range(3)]
        for key, (text, answer) in zip(keys, different([scene for _, scene in sample], TAGS[0], 3, rng)):
            data[key] = {"instruction": text, "answer": answer, "rel_ins_ids": [k for k in keys if k != key],
                         "image_ids": [f"{code}_IMG_{picture}" for picture, _ in sample]}
    (folder / "MIMIC-IT").mkdir(exist_ok=True)
    write_json(folder / f"MIMIC-IT/{code}_instructions.json", {"meta": {"version": "tiny"}, "data": data})


def write_packed(folder: Path, code: str, n: int, most_images: int, pictures: Pictures, allowed):
    """A part of MIMIC-IT that brings its pictures along, as base64 text in a JSON file."""
    samples, texts = [], {}
    for i in range(n):
        samples.append([])
        for _ in range(2 + i % (most_images - 1)):
            scene = random_scene(pictures.rng, [scene for _, scene in samples[-1]], allowed)
            file = BytesIO()
            draw(scene, pictures.rng).save(file, "JPEG", quality=90)
            samples[-1].append((f"{len(texts):06d}", scene))
            texts[f"{code}_IMG_{len(texts):06d}"] = base64.b64encode(file.getvalue()).decode()
    write_mimicit(folder, code, samples, pictures.rng)
    write_json(folder / f"MIMIC-IT/{code}.json", texts)


def write_sparkles(folder: Path, name: str, n: int, rng: random.Random, allowed):
    """One part of SparklesDialogue: two rounds, the first about two pictures, with the second comes a third."""
    pictures, dialogues = Pictures(folder / name / "images", rng, digits=1), []
    for _ in range(n):
        scenes, images, messages = [], [], []
        for count in (2, 1):
            for _ in range(count):
                scenes.append(random_scene(rng, scenes, allowed))
                images.append({"image_id": int(pictures.draw(scenes[-1])), "caption": " ".join(scenes[-1])})
            topic = "which"
            while topic == "which":             # its answer is a name, which would start with a capital letter
                topic, asked, answer = question(scenes, [f"IMAGE#{image['image_id']}" for image in images], rng)
            messages += [{"role": "user", "content": asked + SPARKLES_MARK * count, "images": images[-count:]},
                         {"role": "assistant", "content": answer}]
        dialogues.append({"dialogue": messages})
    (folder / name / "annotations").mkdir(exist_ok=True)
    write_json(folder / f"{name}/annotations/{name}.json", dialogues)


def write_world(folder: Path, n: int, seed: int, allowed=seen):
    """All nine datasets, the first two with n records each, the others smaller; combinations as `allowed`."""
    pictures = Pictures(folder / COCO, random.Random(seed))
    (folder / "llava").mkdir(exist_ok=True)
    write_dialogues(folder, n, pictures, allowed, least_images=2)
    shown = write_llava(folder, n, pictures, allowed)
    write_mimicit(folder, "CGD", [shown[i:i + 2] for i in range(0, n // 2, 2)], pictures.rng)
    for code, share, most_images in (("SD", 10, 2), ("SN", 50, 3), ("TVC", 50, 3), ("VST", 50, 3)):
        write_packed(folder, code, n // share, most_images, pictures, allowed)
    for name in ("SparklesDialogueCC", "SparklesDialogueVG"):
        write_sparkles(folder, name, n // 20, pictures.rng, allowed)


# ---- tokenizer ----

def train_tokenizer(folder: Path) -> Tokenizer:
    """A sentencepiece model in LLaMA's format with a piece for every word of the world, bytes for all others.

    The words are given, not learned: a learned vocabulary makes "1:" and "1?" pieces of their own, and then the
    language model never finds out that both mean the first image.
    """
    rng = random.Random(0)
    lines = [SYSTEM]
    for count in [1, 2, 3] * 2000:
        _, rounds = dialogue(count, 3, rng, anything)
        lines += [f"### Image {count}:\n### Question: {asked}\n### Answer: {answer}"
                  for _, _, asked, answer in rounds]
    lines += [value for values in ATTRIBUTES.values() for value in values]
    text = "\n".join("▁" + line.replace(" ", "▁") for line in lines)         # sentencepiece writes ▁ for a space
    pieces = {"▁", *re.findall(r"▁?(?:[A-Za-z]+|\d|###|[^\w▁\s])", text)}
    folder.mkdir(parents=True, exist_ok=True)
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), user_defined_symbols=sorted(pieces),
        vocab_size=len(pieces) + 320, hard_vocab_limit=False, byte_fallback=True, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False)
    (folder / "tokenizer.vocab").unlink()
    return Tokenizer(folder)


# ---- pre-training the ViT: token i tells attribute i ----

def targets(scenes: list[Scene]) -> Tensor:
    """Attributes of scenes as numbers (N, 4)."""
    return torch.tensor([[values.index(value) for values, value in zip(ATTRIBUTES.values(), scene)]
                         for scene in scenes])


def drawn(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pixels (n, 3, image_size, image_size) of random scenes and their attributes (n, 4)."""
    rng = random.Random(seed)
    scenes = [random_scene(rng, [], anything) for _ in range(n)]
    pictures = [pixels(draw(scene, rng), VIT.image_size) for scene in tqdm(scenes, "drawing", leave=False)]
    return torch.stack(pictures), targets(scenes)


def fit(modules: list[nn.Module], loss_of: Callable[[int], Tensor], steps: int, lr: float, name: str):
    """AdamW on all parameters of the modules: 50 steps of warm-up; over the last 60 percent down to zero."""
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr, (0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, (steps - step) / (0.6 * steps), 1))
    for step in (bar := tqdm(range(steps), name)):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 19:
            bar.set_postfix(loss=f"{loss.item():.4f}")


def pretrain_vit(steps: int) -> VisionTransformer:
    """A ViT whose token i linearly gives attribute i away; the linear heads are dropped. Prints what they read."""
    vit, heads = VisionTransformer(VIT), nn.ModuleList(nn.Linear(VIT.output_dim, width) for width in WIDTHS)
    images, wanted = drawn(20000, seed=1)

    def loss_of(step: int) -> Tensor:
        rows = torch.randint(len(images), (64,))
        tokens = vit(images[rows]).unbind(1)                                # four of (64, output_dim)
        return sum(F.cross_entropy(head(token), target)
                   for head, token, target in zip(heads, tokens, wanted[rows].T))

    fit([vit, heads], loss_of, steps, lr=1e-3, name="ViT")
    images, wanted = drawn(2000, seed=2)
    with torch.no_grad():
        tokens = torch.cat([vit(part) for part in images.split(100)]).unbind(1)
        right = torch.stack([head(token).argmax(-1) for head, token in zip(heads, tokens)], 1) == wanted
    print("ViT, attributes read from 2000 fresh pictures:",
          *(f"{name} {share:.4f}" for name, share in zip(ATTRIBUTES, right.float().mean(0).tolist())),
          f"all four {right.all(1).float().mean():.4f}", sep="  ")
    return vit


# ---- pre-training LLaMA: four words in random order stand where image tokens will stand ----

# Heads that make the tower bind and compare early on, and are dropped afterwards. Without them, questions about
# several images stay at guessing for hundreds of steps. name: (layer they read after, sizes of what they tell)
HEADS = {"register": (1, [3, *WIDTHS]),     # first token after an image: its number and attributes
         "number": (2, WIDTHS),             # where a question names an image: its attributes
         "pair": (3, [2] * 4),              # where it names a second one: what the two images share
         "word": (3, [2] * 3)}              # an attribute in question or answer: which images have it


def called(pieces: list[str], i: int, shown: int) -> int | None:
    """The index of the image that a question names with piece i, as one of TAGS or "the image", the last one."""
    two_words = [piece.removeprefix("▁") for piece in pieces[i - 1:i + 1]]
    for names in TAGS:
        for index, name in enumerate(names[:shown]):
            if name.split()[:2] == two_words:
                return index
    return shown - 1 if two_words == ["the", "image"] else None


def probes(encoded: Encoded, scenes: list[Scene], tokenizer: Tokenizer) -> Iterator[tuple[str, int, list[int]]]:
    """Where in a dialogue which head is asked, and what it should tell."""
    pieces = [tokenizer.model.id_to_piece(id) for id in encoded.ids]
    numeric, shown, pair = targets(scenes).tolist(), 0, []
    for i, (piece, kind, label) in enumerate(zip(pieces, encoded.kind, encoded.labels)):
        word = piece.removeprefix("▁")
        if kind == TEXT and i and encoded.kind[i - 1] == IMAGE:
            yield "register", i, [shown, *numeric[shown]]
            shown += 1
        if piece == "<s>":
            pair = []
        elif label == IGNORE and (found := called(pieces, i, shown)) is not None:
            pair.append(numeric[found])
            yield "number", i, pair[-1]
            if len(pair) == 2:
                yield "pair", i, [int(a == b) for a, b in zip(*pair)]
        elif kind == TEXT and any(word in values for values in ATTRIBUTES.values()):
            yield "word", i, [int(word in scene) for scene in scenes[:shown]] + [0] * (3 - shown)


def text_batch(rng: random.Random, tokenizer: Tokenizer, most_images: int, n: int, n_rounds: int):
    """A batch of n dialogues with words for image tokens, its probes, and (topic, images shown) per question."""
    rows, asked, topics, before = [], [], [], 0
    for _ in range(n):
        scenes, rounds = dialogue(min(most_images, rng.choice([1, 2, 3, 3])), n_rounds, rng, anything)
        encoded = encode([Round(tuple(new), q, a) for new, _, q, a in rounds], tokenizer, len(ATTRIBUTES))
        asked += [(name, before + place, wanted) for name, place, wanted in probes(encoded, scenes, tokenizer)]
        before += len(encoded.ids)
        words = iter(tokenizer.encode(value)[0] for scene in scenes for value in rng.sample(scene, len(scene)))
        encoded.ids = [next(words) if kind == IMAGE else id for id, kind in zip(encoded.ids, encoded.kind)]
        encoded.images = []
        rows.append(tensors(encoded, VIT.image_size))
        shown = list(accumulate(len(new) for new, *_ in rounds))
        topics += [(topic, count) for (_, topic, *_), count in zip(rounds, shown)]
    return collate(rows), asked, topics


def predict(llama: Llama, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits and right ids of the answer tokens."""
    target = batch["labels"][:, 1:]
    read = F.pad(target != IGNORE, (0, 1))
    hidden = llama(llama.embed_tokens(batch["ids"]), batch["kind"], read, batch["lengths"])
    return llama.lm_head(hidden), target[target != IGNORE]


def head_loss(heads: nn.ModuleDict, states: dict[int, Tensor], kind: Tensor, asked: list) -> Tensor:
    """What the auxiliary heads miss, each kind of head with the same weight.

    states (N, C) after each layer, the text of kind (1, S) first (mmca.py), where all places that are asked lie.
    """
    total, text = 0, (kind[0] == TEXT).cumsum(0) - 1
    for name, (layer, widths) in HEADS.items():
        if found := [(place, wanted) for head, place, wanted in asked if head == name]:
            places, wanted = map(list, zip(*found))
            guesses = heads[name](states[layer][text[places]]).split(widths, dim=1)
            total += sum(map(F.cross_entropy, guesses, torch.tensor(wanted).T)) / len(widths)
    return total


@torch.no_grad()
def reading(llama: Llama, tokenizer: Tokenizer, n: int) -> dict[str, dict[str, list[bool]]]:
    """Which questions about n fresh written dialogues are answered word for word, by images shown and topic."""
    rng, table = random.Random(5), {"one": {}, "several": {}}
    for i in range(n // 50):
        batch, _, topics = text_batch(rng, tokenizer, 1 if i % 4 == 0 else 3, 50, n_rounds=6)
        logits, target = predict(llama, batch)
        whole = whole_answers(batch["labels"], logits.argmax(-1) == target).tolist()
        for (topic, shown), right in zip(topics, whole):
            table["one" if shown == 1 else "several"].setdefault(topic, []).append(right)
    return table


def report(name: str, table: dict[str, dict[str, list[bool]]]):
    """Print a table of `reading`, a line for one image and a line for several."""
    for images, topics in table.items():
        whole = sum(topics.values(), [])
        print(f"{name}, {images}: {sum(whole)} of {len(whole)} right, {sum(whole) / len(whole):.4f};",
              *(f"{topic} {sum(right) / len(right):.3f}" for topic, right in sorted(topics.items())), sep="  ")


def pretrain_llama(tokenizer: Tokenizer, steps: int) -> Llama:
    """A LLaMA that answers questions about written descriptions; half of the batches are MMCA, half causal."""
    sizes = replace(LLAMA, vocab_size=tokenizer.model.vocab_size())
    llama, rng, states = Llama(sizes), random.Random(3), {}
    for parameter in llama.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.5 * parameter.shape[1] ** -0.5)
    heads = nn.ModuleDict({name: nn.Linear(LLAMA.hidden_size, sum(widths)) for name, (_, widths) in HEADS.items()})
    hooks = [layer.register_forward_hook(lambda module, args, output, i=i: states.update({i: output}))
             for i, layer in enumerate(llama.layers)]

    def loss_of(step: int) -> Tensor:
        llama.attention = rng.choice(list(ATTENTION))
        batch, asked, _ = text_batch(rng, tokenizer, 1 if step < 100 else 3, n=16, n_rounds=8)
        return (F.cross_entropy(*predict(llama, batch))
                + head_loss(heads, states, ATTENTION[llama.attention](batch["kind"]), asked))

    fit([llama, heads], loss_of, steps, lr=2e-3, name="LLaMA")
    for hook in hooks:
        hook.remove()
    for name in ATTENTION:
        llama.attention = name
        report(f"LLaMA, {name}, written scenes", reading(llama, tokenizer, 2000))
    return llama


# ---- folders in the official formats ----

def write_llama(llama: Llama, folder: Path):
    """config.json and FP16 safetensors in two shards with their index, as LLaMA-2 is published."""
    weights = {name if name.startswith("lm_head") else f"model.{name}": tensor.half()
               for name, tensor in llama.state_dict().items()}
    weight_map = {name: f"model-0000{1 + 2 * i // len(weights)}-of-00002.safetensors"
                  for i, name in enumerate(weights)}
    for file in set(weight_map.values()):
        save_file({name: weights[name] for name, where in weight_map.items() if where == file}, folder / file,
                  metadata={"format": "pt"})
    size = {"total_size": sum(2 * tensor.numel() for tensor in weights.values())}
    write_json(folder / "model.safetensors.index.json", {"metadata": size, "weight_map": weight_map})
    fixed = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "bos_token_id": 1,
             "eos_token_id": 2, "tie_word_embeddings": False, "torch_dtype": "float16"}
    write_json(folder / "config.json", fixed | asdict(llama.config))


def write_vit(vit: VisionTransformer, folder: Path):
    """config.json with its `visual` section and FP16 safetensors under QWen-VL's names."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({PREFIX + name: t.half() for name, t in vit.state_dict().items()}, folder / "model.safetensors",
              metadata={"format": "pt"})
    sizes = {name: getattr(VIT, name) for name in IN_CONFIG}
    write_json(folder / "config.json", {"visual": {**sizes, "mlp_ratio": VIT.mlp_width / VIT.width}})


def pretrain(folder: Path, names: list[str]):
    """Make the towers of these names in a folder: vit, and llama with its tokenizer."""
    tokenizer = train_tokenizer(folder / "llama")
    for name in names:
        torch.manual_seed(0)
        if name == "vit":
            write_vit(pretrain_vit(STEPS[name]), folder / name)
        else:
            write_llama(pretrain_llama(tokenizer, STEPS[name]), folder / name)


def ensure(data: Path):
    """Draw the data folder, and the two test folders within it, unless they are there."""
    for name, seed, allowed in (("test_seen", 1, seen), ("test_unseen", 2, unseen)):
        folder = data / name
        if not (folder / DIALOGUE).exists():                    # written last
            pictures = Pictures(folder / COCO, random.Random(seed))
            (folder / "llava").mkdir(exist_ok=True)
            write_dialogues(folder, N_TEST, pictures, allowed, least_images=1)
    if not all((data / file).exists() for file in SOURCES["sparkles_dialogue"].files):     # written last
        write_world(data, N_DIALOGUES, seed=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrain", nargs="*", choices=list(STEPS), help="make these towers anew; default both")
    names = parser.parse_args().pretrain
    if names is not None:
        pretrain(WEIGHTS, names or list(STEPS))
    ensure(DATA)
    Path("examples").mkdir(exist_ok=True)
    for i, (name, scene) in enumerate(EXAMPLES.items()):
        draw(scene, random.Random(i)).save(Path("examples") / name)


if __name__ == "__main__":
    main()
