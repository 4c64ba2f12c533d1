"""The tiny world: drawn images of one shape each, conversations about them, and the files of all nine datasets.

    Scene ("big", "red", "star", "left") ─┬─► draw_scene ─► image file ─────────────┬─► record of a dataset
                                          └─► dialogue ───► questions and answers ──┘

It stands in for the real data. Its files have the formats of the real ones, so `--size tiny` runs the same code as
`--size 70b`. The same seed always draws the same files. Some pairs of color and shape never occur in training, and
one of two test sets shows only these. `python -m tiny.world` draws data/tiny and examples/ in under a minute.
Before: sources.py, which reads such files. Next: tiny/pretrain.py.
"""
import base64
import json
import math
import random
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from io import BytesIO
from itertools import combinations, product
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

from sources import COCO, DETAIL, DIALOGUE, MARK, SOURCES, SPARKLES_MARK, TAGS
from weights import replacing

ATTRIBUTES = {"size": ["small", "big"], "color": ["red", "pink", "yellow", "green", "blue", "purple"],
              "shape": ["circle", "square", "triangle", "star"],
              "place": ["left", "right", "top", "bottom", "center"]}
COMPARING = ("any", "which", "same", "changed")             # topics of the questions that compare images
TOPICS = (*ATTRIBUTES, "describe", *COMPARING)
Scene = tuple[str, str, str, str]           # what an image shows: a value of each attribute, in their order
HELD_OUT = {("red", "star"), ("pink", "circle"), ("yellow", "square"),      # pairs that training never sees
            ("green", "triangle"), ("blue", "star"), ("purple", "circle")}
ALL_SCENES = set(product(*ATTRIBUTES.values()))
UNSEEN = {scene for scene in ALL_SCENES if scene[1:3] in HELD_OUT}
SEEN = ALL_SCENES - UNSEEN
EXAMPLES = {"a.png": ("big", "red", "circle", "left"), "b.png": ("big", "blue", "circle", "left"),
            "c.png": ("small", "yellow", "star", "top")}
DATA, TESTS = Path("data/tiny"), ("test_seen", "test_unseen")
N_CONVERSATIONS, N_TEST = 1600, 240         # in the file of llava_dial, and in each test set


# ---- images ----

RGB = {"red": (214, 40, 40), "pink": (242, 130, 180), "yellow": (250, 214, 30), "green": (46, 158, 75),
       "blue": (40, 92, 200), "purple": (128, 60, 170)}
CENTER = {"left": (.25, .5), "right": (.75, .5), "top": (.5, .25), "bottom": (.5, .75), "center": (.5, .5)}
# How far the corners of a shape lie from its center, once around. Those of a star are far, near, far, and so on.
CORNERS = {"circle": [1] * 60, "square": [1] * 4, "triangle": [1] * 3, "star": [1, .42] * 5}


def draw_scene(scene: Scene, rng: random.Random, side: int = 224) -> Image.Image:
    """An image of the scene, side × side. Light, place, radius, rotation and color vary a little each time."""
    size, color, shape, place = scene
    light, big = rng.randint(170, 245), 2 * side            # drawn twice as big and then reduced: smooth edges
    shade = Image.linear_gradient("L").rotate(rng.choice([0, 90, 180, 270])).resize((big, big))
    image = Image.merge("RGB", [shade.point(lambda value: light - value // 6)] * 3)
    x, y = (big * (share + rng.uniform(-.04, .04)) for share in CENTER[place])
    radius = big * (rng.uniform(.18, .21) if size == "big" else rng.uniform(.08, .10))
    rotation = rng.uniform(-.2, .2) + (math.pi / 4 if shape == "square" else 0)
    angle = 2 * math.pi / len(CORNERS[shape])
    corners = [(x + radius * r * math.sin(rotation + i * angle), y - radius * r * math.cos(rotation + i * angle))
               for i, r in enumerate(CORNERS[shape])]
    ImageDraw.Draw(image).polygon(corners, tuple(min(255, value + rng.randint(-12, 12)) for value in RGB[color]))
    return image.resize((side, side), Image.Resampling.LANCZOS)


def random_scene(rng: random.Random, earlier: list[Scene], allowed: set[Scene]) -> Scene:
    """An allowed scene. If there are earlier ones, three in five copy one but draw one attribute anew."""
    while True:
        scene = tuple(rng.choice(values) for values in ATTRIBUTES.values())
        if earlier and rng.random() < .6:           # so that images to compare often differ in little
            copied, i = rng.choice(earlier), rng.randrange(4)
            scene = (*copied[:i], scene[i], *copied[i + 1:])
        if scene in allowed:
            return scene


# ---- questions and answers ----

def questions(scenes: list[Scene], names: list[str]) -> Iterator[tuple[str, str, str]]:
    """Every (topic, question, answer) about images that are called `names`. Several images are also compared."""
    for name, (size, color, shape, place) in zip(names, scenes):
        yield "size", f"What size is the shape in {name}?", size
        yield "color", f"What color is the shape in {name}?", color
        yield "shape", f"What shape is in {name}?", shape
        yield "place", f"Where is the shape in {name}?", place
        yield "describe", f"Describe {name}.", f"A {size} {color} {shape} at the {place}."
    if len(scenes) == 1:
        return
    phrases = {"size": "a {} shape", "color": "a {} shape", "shape": "a {}", "place": "a shape at the {}"}
    for attribute, values in ATTRIBUTES.items():
        for value in values:
            phrase = phrases[attribute].format(value)
            having = [name for name, scene in zip(names, scenes) if value in scene]
            yield "any", f"Does any image show {phrase}?", "yes" if having else "no"
            if len(having) == 1:
                yield "which", f"Which image shows {phrase}?", having[0]
    for (one, a), (other, b) in combinations(zip(names, scenes), 2):
        differing = [attribute for attribute, x, y in zip(ATTRIBUTES, a, b) if x != y]
        for attribute in ATTRIBUTES:
            answer = "no" if attribute in differing else "yes"
            yield "same", f"Do {one} and {other} have the same {attribute}?", answer
        if len(differing) == 1:
            yield "changed", f"What changed from {one} to {other}?", f"the {differing[0]}"


def random_question(scenes: list[Scene], names: list[str], rng: random.Random) -> tuple[str, str, str]:
    """A random one of `questions`. If there are several images, three in five compare them."""
    table = {}
    for topic, question, answer in questions(scenes, names):
        table.setdefault(topic, {}).setdefault(answer, []).append(question)
    compare = len(scenes) > 1 and rng.random() < .6
    topic = rng.choice([topic for topic in table if (topic in COMPARING) == compare])
    answer = rng.choice(list(table[topic]))         # All answers are equally likely, so guessing does not help.
    return topic, rng.choice(table[topic][answer]), answer


def different_questions(scenes: list[Scene], names: list[str], n: int, rng: random.Random) -> list[tuple]:
    """n random (question, answer), no two with the same question."""
    found = {}
    while len(found) < n:
        _, question, answer = random_question(scenes, names, rng)
        found[question] = answer
    return list(found.items())


def dialogue(n_images: int, n_rounds: int, rng: random.Random, allowed: set[Scene]) -> tuple[list[Scene], list]:
    """A conversation: its scenes, and its rounds as (scenes of new images, topic, question, answer).

    All images come by its middle. If the latest one came alone, some questions call it "the image".
    """
    names = TAGS[0] if rng.random() < .8 else rng.choice(TAGS[1:])
    starts = [0] + [rng.choice([0, rng.randrange(n_rounds // 2 + 1)]) for _ in range(n_images - 1)]
    scenes, rounds, alone = [], [], False
    for i in range(n_rounds):
        before = len(scenes)
        for _ in range(starts.count(i)):
            scenes.append(random_scene(rng, scenes, allowed))
        new = scenes[before:]
        alone = len(new) == 1 if new else alone
        topic, question, answer = random_question(scenes, names, rng)
        if alone and topic not in COMPARING and rng.random() < .3:
            question = question.replace(names[len(scenes) - 1], "the image")
        rounds.append((new, topic, question, answer))
    return scenes, rounds


def topic_of(question: str) -> str:
    """The topic of a question, from its first words."""
    first, second = question.split()[:2]
    known = {"Describe": "describe", "Where": "place", "Which": "which", "Does": "any", "Do": "same"}
    return known.get(first, second)


# ---- the formats of the nine datasets ----

def write_json(path: Path, content):
    """Write a JSON file in one step, and make its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as new:
        new.write_text(json.dumps(content, indent=1) + "\n")


class ImageFolder:
    """A folder of drawn images. Their names are numbers, counted from 0."""

    def __init__(self, folder: Path, rng: random.Random, digits: int = 12):
        self.folder, self.rng, self.digits, self.count = folder, rng, digits, 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, scene: Scene) -> str:
        """Draw a scene into a new file; returns its name without `.jpg`."""
        name = f"{self.count:0{self.digits}d}"
        draw_scene(scene, self.rng).save(self.folder / f"{name}.jpg", quality=90)
        self.count += 1
        return name


def llava_record(names: list[str], rounds: list[tuple[int, str, str]]) -> dict:
    """A record in LLaVA's format, from names of images and rounds (how many images it adds, question, answer)."""
    messages = [{"from": speaker, "value": text} for n_new, question, answer in rounds
                for speaker, text in (("human", question + f"\n{MARK}" * n_new), ("gpt", answer))]
    files = [f"{name}.jpg" for name in names]
    return {"id": names[0], "image": files if len(files) > 1 else files[0], "conversations": messages}


def write_llava_dial(folder: Path, n: int, images: ImageFolder, allowed: set[Scene], least_images: int):
    """LLaVA's conversation_58k.json: n records of six rounds about up to three images."""
    records = []
    for i in tqdm(range(n), f"drawing {folder}", leave=False):
        scenes, rounds = dialogue(least_images + i % (4 - least_images), 6, images.rng, allowed)
        records.append(llava_record([images.add(scene) for scene in scenes],
                                    [(len(new), question, answer) for new, _, question, answer in rounds]))
    write_json(folder / DIALOGUE, records)


def write_llava(folder: Path, n: int, images: ImageFolder, allowed: set[Scene]) -> list[tuple[str, Scene]]:
    """LLaVA's other two files: n records of three rounds about one image; returns (name, scene) of all images."""
    records, shown = [], []
    for _ in tqdm(range(n), f"drawing {folder}", leave=False):
        scene = random_scene(images.rng, [scene for _, scene in shown[-1:]], allowed)
        shown.append((images.add(scene), scene))
        rounds = different_questions([scene], ["the image"], 3, images.rng)
        records.append(llava_record([shown[-1][0]], [(int(i == 0), *pair) for i, pair in enumerate(rounds)]))
    for file, part in zip(DETAIL, (records[::2], records[1::2])):
        write_json(folder / file, part)
    return shown


def write_instructions(folder: Path, code: str, groups: list[list[tuple[str, Scene]]], rng: random.Random):
    """The instructions of MIMIC-IT's part `code`: three related ones about each group of images (name, scene)."""
    data = {}
    for i, group in enumerate(groups):
        keys = [f"{code}_INS_{3 * i + k:06d}" for k in range(3)]
        rounds = different_questions([scene for _, scene in group], TAGS[0], 3, rng)
        for key, (question, answer) in zip(keys, rounds):
            data[key] = {"instruction": question, "answer": answer, "rel_ins_ids": [k for k in keys if k != key],
                         "image_ids": [f"{code}_IMG_{name}" for name, _ in group]}
    write_json(folder / f"MIMIC-IT/{code}_instructions.json", {"meta": {"version": "tiny"}, "data": data})


def write_mimicit(folder: Path, code: str, n: int, most_images: int, rng: random.Random, allowed: set[Scene]):
    """A part of MIMIC-IT whose images are base64 text in a JSON file: n groups of 2 to most_images images."""
    groups, texts = [[] for _ in range(n)], {}
    for i, group in enumerate(groups):
        for _ in range(2 + i % (most_images - 1)):
            scene = random_scene(rng, [scene for _, scene in group], allowed)
            file, name = BytesIO(), f"{len(texts):06d}"
            draw_scene(scene, rng).save(file, "JPEG", quality=90)
            group.append((name, scene))
            texts[f"{code}_IMG_{name}"] = base64.b64encode(file.getvalue()).decode()
    write_instructions(folder, code, groups, rng)
    write_json(folder / f"MIMIC-IT/{code}.json", texts)


def write_sparkles(folder: Path, name: str, n: int, rng: random.Random, allowed: set[Scene]):
    """A part of SparklesDialogue: n conversations of two rounds, which add two images and then one."""
    images, conversations = ImageFolder(folder / name / "images", rng, digits=1), []
    for _ in range(n):
        scenes, shown, messages = [], [], []
        for n_new in (2, 1):
            for _ in range(n_new):
                scenes.append(random_scene(rng, scenes, allowed))
                shown.append({"image_id": int(images.add(scenes[-1])), "caption": " ".join(scenes[-1])})
            tags, topic = [f"IMAGE#{image['image_id']}" for image in shown], "which"
            while topic == "which":         # Its answer is a name, which sources.py would begin with a capital.
                topic, question, answer = random_question(scenes, tags, rng)
            messages += [{"role": "user", "content": question + SPARKLES_MARK * n_new, "images": shown[-n_new:]},
                         {"role": "assistant", "content": answer}]
        conversations.append({"dialogue": messages})
    write_json(folder / f"{name}/annotations/{name}.json", conversations)


# ---- the whole ----

def write_world(folder: Path, n: int, seed: int, allowed: set[Scene] = SEEN):
    """All nine datasets, from allowed scenes: n records each for llava and llava_dial, fewer for the others."""
    rng = random.Random(seed)
    images = ImageFolder(folder / COCO, rng)
    write_llava_dial(folder, n, images, allowed, least_images=2)
    shown = write_llava(folder, n, images, allowed)
    write_instructions(folder, "CGD", [shown[i:i + 2] for i in range(0, n // 2, 2)], rng)   # about LLaVA's images
    for code, divisor, most_images in (("SD", 10, 2), ("SN", 50, 3), ("TVC", 50, 3), ("VST", 50, 3)):
        write_mimicit(folder, code, n // divisor, most_images, rng, allowed)
    for name in ("SparklesDialogueCC", "SparklesDialogueVG"):
        write_sparkles(folder, name, n // 20, rng, allowed)


def ensure(data: Path):
    """Draw a data folder and the two test sets inside it, unless they are there already."""
    for name, seed, allowed in zip(TESTS, (1, 2), (SEEN, UNSEEN)):
        folder = data / name
        if not (folder / DIALOGUE).exists():                    # It is written last.
            write_llava_dial(folder, N_TEST, ImageFolder(folder / COCO, random.Random(seed)), allowed, 1)
    if not all((data / file).exists() for file in SOURCES["sparkles_dialogue"].files):      # likewise
        write_world(data, N_CONVERSATIONS, seed=0)


def main():
    """Draw what is missing in data/tiny, and the images of examples/."""
    ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter).parse_args()
    ensure(DATA)
    Path("examples").mkdir(exist_ok=True)
    for i, (name, scene) in enumerate(EXAMPLES.items()):
        draw_scene(scene, random.Random(i)).save(Path("examples") / name)


if __name__ == "__main__":
    main()
