"""The tiny world: drawn images of one shape each, conversations about them, and the files of all nine datasets.

    Scene ("big", "red", "circle", "left") ─┬─► draw_scene ─► image file ─────────────┬─► record of a dataset
                                            └─► dialogue ───► questions and answers ──┘

It stands in for the real data. Its files have the formats of the real ones, so `--size tiny` runs the same code as
`--size 70b`. The same seed always draws the same files. Some pairs of color and shape never occur where train.py
learns, and the test set `unseen` shows only these; both towers saw them when they were pre-trained.
`python -m tiny.world` draws data/tiny and examples/ in under a minute. Before: sources.py, which reads such files,
and tiny/wording.py. Next: tiny/pretrain.py.
"""
import base64
import json
import math
import random
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import permutations, product
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

from sources import COCO, DETAIL, DIALOGUE, MARK, PAPER, SOURCES, SPARKLES_MARK
from tiny.wording import (ABOUT_ONE, ATTRIBUTES, COMPARING, GOODBYE, HELLO, LATEST, NO_IMAGE, NO_SUCH, NONE,
                          NOTHING, OUTSIDE, TOPICS, WELCOME, Ask, Wording, listed, name_of)
from weights import replacing

Scene = tuple[str, str, str, str]           # what an image shows: a value of each attribute, in their order
HELD_OUT = {("red", "star"), ("pink", "circle"), ("yellow", "square"),      # pairs that train.py never sees
            ("green", "triangle"), ("blue", "star"), ("purple", "circle")}
VALUES = [value for values in ATTRIBUTES.values() for value in values]
ALL_SCENES = frozenset(product(*ATTRIBUTES.values()))
UNSEEN = frozenset(scene for scene in ALL_SCENES if scene[1:3] in HELD_OUT)
SEEN = ALL_SCENES - UNSEEN
EXAMPLES = {"a.png": ("big", "red", "circle", "left"), "b.png": ("big", "blue", "circle", "left"),
            "c.png": ("small", "yellow", "star", "top")}
DATA, N_CONVERSATIONS = Path("data/tiny"), 1600             # in the file of llava_dial


# ---- images ----

RGB = {"red": (214, 40, 40), "pink": (242, 130, 180), "yellow": (250, 214, 30), "green": (46, 158, 75),
       "blue": (40, 92, 200), "purple": (128, 60, 170)}
CENTER = {"left": (.25, .5), "right": (.75, .5), "top": (.5, .25), "bottom": (.5, .75), "center": (.5, .5)}
# How far the corners of a shape lie from its center, once around. Those of a star are far, near, far, and so on.
CORNERS = {"circle": [1] * 60, "square": [1] * 4, "triangle": [1] * 3, "star": [1, .42] * 5}


def draw_scene(scene: Scene, rng: random.Random, side: int = 224) -> Image.Image:
    """An image of the scene, side × side. Light, place, radius, rotation and color vary a little each time."""
    size, color, shape, place = scene
    shade = Image.linear_gradient("L").resize((side, side)).transpose(rng.choice(list(Image.Transpose)))
    light = rng.randint(170, 245)
    image = Image.merge("RGB", [shade.point(lambda value: light - value // 6)] * 3)
    x, y = (side * (share + rng.uniform(-.04, .04)) for share in CENTER[place])
    radius = side * (rng.uniform(.18, .21) if size == "big" else rng.uniform(.08, .10))
    rotation = rng.uniform(-.2, .2) + (math.pi / 4 if shape == "square" else 0)
    angle = 2 * math.pi / len(CORNERS[shape])
    corners = [(x + radius * r * math.sin(rotation + i * angle), y - radius * r * math.cos(rotation + i * angle))
               for i, r in enumerate(CORNERS[shape])]
    mask = Image.new("L", (2 * side, 2 * side))             # drawn twice as big and then reduced: smooth edges
    ImageDraw.Draw(mask).polygon([(2 * x, 2 * y) for x, y in corners], 255)
    image.paste(tuple(min(255, value + rng.randint(-12, 12)) for value in RGB[color]), mask=mask.reduce(2))
    return image


def random_scene(rng: random.Random, earlier: list[Scene], allowed: frozenset[Scene]) -> Scene:
    """An allowed scene. If there are earlier ones, three in five copy one but draw one attribute anew."""
    while True:
        scene = tuple(rng.choice(values) for values in ATTRIBUTES.values())
        if earlier and rng.random() < .6:           # so that images to compare often differ in little
            copied, i = rng.choice(earlier), rng.randrange(4)
            scene = (*copied[:i], scene[i], *copied[i + 1:])
        if scene in allowed:
            return scene


# ---- questions and answers ----

DESCRIPTION = "A {} {} {} at the {}."


def questions(scenes: list[Scene]) -> Iterator[tuple[Ask, str]]:
    """All questions about images with these scenes that training and the exam draw from, with their answers."""
    for i, scene in enumerate(scenes):
        for attribute, value in zip(ATTRIBUTES, scene):
            yield Ask(attribute, (i,)), value
        yield Ask("describe", (i,)), DESCRIPTION.format(*scene)
        for value in VALUES:
            yield Ask("is", (i,), value), "yes" if value in scene else "no"
    for value in VALUES:
        having = [f"image {i}" for i, scene in enumerate(scenes, 1) if value in scene]
        yield Ask("any", about=value), "yes" if having else "no"
        yield Ask("which", about=value), listed(having) or NONE
    if 1 < len(scenes) < 4:                         # With more the answer would be long.
        yield Ask("all", tuple(range(len(scenes)))), " ".join(DESCRIPTION.format(*scene) for scene in scenes)
    for (i, a), (j, b) in permutations(enumerate(scenes), 2):
        differing = [attribute for attribute, x, y in zip(ATTRIBUTES, a, b) if x != y]
        for attribute in ATTRIBUTES:
            yield Ask("same", (i, j), attribute), "no" if attribute in differing else "yes"
        yield Ask("changed", (i, j)), listed([f"the {name}" for name in differing]) or NOTHING


def random_question(scenes: list[Scene], rng: random.Random, topics: Iterable[str] = ()) -> tuple[Ask, str]:
    """A random one of `questions`, of these topics if any are given. With several images three in five compare."""
    table = {}
    for ask, answer in questions(scenes):
        table.setdefault(ask.topic, {}).setdefault(answer, []).append(ask)
    compare = rng.random() < (.6 if len(scenes) > 1 else .15)
    topic = rng.choice([topic for topic in topics if topic in table] or
                       [topic for topic in table if (topic in COMPARING) == compare])
    answer = rng.choice(list(table[topic]))         # All answers are equally likely, so no guess is the best.
    return rng.choice(table[topic][answer]), answer


def beside(n_shown: int, rng: random.Random) -> tuple[str, Ask, str]:
    """(topic of the round, what is asked, answer) where it asks for what cannot be seen, or is small talk.

    Of an "absent" round, the topic of what is asked says which question it is.
    """
    topic = rng.choice(["hello", "thanks", "bye", *["outside"] * 2, *["absent"] * 5])
    if topic != "absent":
        return topic, Ask(topic, (rng.randrange(max(n_shown, 1)),)), dict(hello=HELLO, thanks=WELCOME, bye=GOODBYE,
                                                                          outside=OUTSIDE)[topic]
    # The next image that could be there, any other up to nine, a high one, and now and then "image 0".
    missing = rng.choice([n_shown, n_shown, rng.randrange(n_shown, 9), rng.randrange(n_shown, 9),
                          rng.randrange(n_shown, 9), rng.randrange(9, 30), -1])
    about = rng.choice([*ABOUT_ONE, "same", "changed"] if n_shown else [*ABOUT_ONE, *COMPARING])
    images = () if about in ("any", "which", "all") else (missing,)
    if about in ("same", "changed"):
        images = tuple(rng.sample([missing, rng.choice([i for i in range(9) if i != missing])], 2))
    value = rng.choice(list(ATTRIBUTES) if about == "same" else VALUES)
    again = len(images) == 1 and rng.random() < .15
    return topic, Ask(about, images, value, again), NO_SUCH if n_shown else NO_IMAGE


def is_clear(ask: Ask, n_shown: int, focus: int | None) -> bool:
    """Whether a question need not name its images, of n_shown so far.

    That is so for focus, the image that people talk about; for all images while there is no focus; and for both
    where two were shown.
    """
    if ask.topic == "all":
        return focus is None
    return not n_shown or ask.images == (focus,) or n_shown == 2 and set(ask.images) == {0, 1}


def names_of(ask: Ask, n_shown: int, alone: bool, rng: random.Random) -> list[str]:
    """Names of the images that a question is about; alone: the last one was shown alone, so it is "the image"."""
    if len(ask.images) == 1 and (alone and ask.images[0] == n_shown - 1 or not n_shown) and rng.random() < .4:
        return [rng.choice(LATEST)]
    return [name_of(image, image == n_shown - 1, rng) for image in ask.images]


def question_again(scenes: list[Scene], last: Ask | None, image: int) -> tuple[Ask, str]:
    """The last question, if it was about one image, asked again about this one, or else what it shows."""
    ask = replace(last, images=(image,)) if last else Ask("describe", (image,))
    return replace(ask, again=True), dict(questions(scenes))[replace(ask, again=False)]


def dialogue(n_images: int, n_rounds: int, rng: random.Random, allowed: frozenset[Scene],
             wording: Wording = Wording(), beside_share: float = .15) -> tuple[list[Scene], list]:
    """A conversation: its scenes, and its rounds as (scenes of new images, topic, question, answer).

    All images come by its middle. beside_share: the share of rounds that are not about what an image shows, and of
    conversations that begin with such rounds, before any image.
    """
    middle = n_rounds // 2
    first = rng.randint(1, middle) if rng.random() < beside_share else 0
    starts = [first] + [rng.choice([first, rng.randint(first, middle)]) for _ in range(n_images - 1)]
    scenes, rounds, alone, focus, last = [], [], False, None, None      # last: question, if about one image
    for i in range(n_rounds):
        new = []
        for _ in range(starts.count(i)):
            new.append(random_scene(rng, scenes + new, allowed))
        scenes += new
        if new:
            alone, focus = len(new) == 1, len(scenes) - 1 if len(new) == 1 else None
        if not scenes or rng.random() < beside_share:
            topic, ask, answer = beside(len(scenes), rng)
        else:
            ask, answer = random_question(scenes, rng)
            if rng.random() < .15 and (new or len(scenes) > 1):
                ask, answer = question_again(scenes, last, len(scenes) - 1 if new else rng.randrange(len(scenes)))
            topic = ask.topic
        names = names_of(ask, len(scenes), alone, rng)
        rounds.append((new, topic, wording.question(ask, names, is_clear(ask, len(scenes), focus), rng), answer))
        if topic in (*ABOUT_ONE, *COMPARING, "absent"):
            last = ask if topic in ABOUT_ONE else None
            focus = 0 if len(scenes) == 1 else last and last.images[0]
    return scenes, rounds


def different_questions(scenes: list[Scene], n: int, rng: random.Random) -> list[tuple[str, str]]:
    """n random (question, answer), no two with the same question; a single image is "the image".

    Sources join records about one image into a conversation, so nothing is asked that others would change.
    """
    found = {}
    while len(found) < n:
        ask, answer = random_question(scenes, rng, ABOUT_ONE if len(scenes) == 1 else ())
        names = [rng.choice(LATEST) if len(scenes) == 1 else name_of(i, False, rng) for i in ask.images]
        found[Wording().question(ask, names, is_clear(ask, len(scenes), 0 if len(scenes) == 1 else None),
                                 rng)] = answer
    return list(found.items())


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


@dataclass(frozen=True)
class Dialogues:
    """What the dialogues of a file are like; the first has counts[0] images, and so on, over and over."""
    n: int
    counts: tuple[int, ...] = (1, 2, 3)
    n_rounds: int = 6
    allowed: frozenset[Scene] = SEEN
    wording: Wording = Wording()


def write_llava_dial(folder: Path, dialogues: Dialogues, images: ImageFolder):
    """LLaVA's conversation_58k.json. The topics of a record's questions are noted in it, for the exam."""
    records = []
    for i in tqdm(range(dialogues.n), f"drawing {folder}", leave=False):
        scenes, rounds = dialogue(dialogues.counts[i % len(dialogues.counts)], dialogues.n_rounds, images.rng,
                                  dialogues.allowed, dialogues.wording)
        record = llava_record([images.add(scene) for scene in scenes],
                              [(len(new), question, answer) for new, _, question, answer in rounds])
        records.append(record | {"topics": [topic for _, topic, *_ in rounds]})
    write_json(folder / DIALOGUE, records)


def write_llava(folder: Path, n: int, images: ImageFolder) -> list[tuple[str, Scene]]:
    """LLaVA's other two files: n records of three rounds about one image; returns (name, scene) of all images."""
    records, shown = [], []
    for _ in tqdm(range(n), f"drawing {folder}", leave=False):
        scene = random_scene(images.rng, [scene for _, scene in shown[-1:]], SEEN)
        shown.append((images.add(scene), scene))
        rounds = different_questions([scene], 3, images.rng)
        records.append(llava_record([shown[-1][0]], [(int(i == 0), *pair) for i, pair in enumerate(rounds)]))
    for file, part in zip(DETAIL, (records[::2], records[1::2])):
        write_json(folder / file, part)
    return shown


def write_instructions(folder: Path, code: str, groups: list[list[tuple[str, Scene]]], rng: random.Random):
    """The instructions of MIMIC-IT's part `code`: three related ones about each group of images (name, scene)."""
    data = {}
    for i, group in enumerate(groups):
        keys = [f"{code}_INS_{3 * i + k:06d}" for k in range(3)]
        rounds = different_questions([scene for _, scene in group], 3, rng)
        for key, (question, answer) in zip(keys, rounds):
            data[key] = {"instruction": question, "answer": answer, "rel_ins_ids": [k for k in keys if k != key],
                         "image_ids": [f"{code}_IMG_{name}" for name, _ in group]}
    write_json(folder / f"MIMIC-IT/{code}_instructions.json", {"meta": {"version": "tiny"}, "data": data})


def write_mimicit(folder: Path, code: str, n: int, most_images: int, rng: random.Random):
    """A part of MIMIC-IT whose images are base64 text in a JSON file: n groups of 2 to most_images images."""
    groups, texts = [[] for _ in range(n)], {}
    for i, group in enumerate(groups):
        for _ in range(2 + i % (most_images - 1)):
            scene = random_scene(rng, [scene for _, scene in group], SEEN)
            file, name = BytesIO(), f"{len(texts):06d}"
            draw_scene(scene, rng).save(file, "JPEG", quality=90)
            group.append((name, scene))
            texts[f"{code}_IMG_{name}"] = base64.b64encode(file.getvalue()).decode()
    write_instructions(folder, code, groups, rng)
    write_json(folder / f"MIMIC-IT/{code}.json", texts)


def write_sparkles(folder: Path, name: str, n: int, rng: random.Random):
    """A part of SparklesDialogue: n conversations of two rounds, which add two images and then one."""
    images, conversations = ImageFolder(folder / name / "images", rng, digits=1), []
    for _ in range(n):
        scenes, shown, messages = [], [], []
        for n_new in (2, 1):
            for _ in range(n_new):
                scenes.append(random_scene(rng, scenes, SEEN))
                shown.append({"image_id": int(images.add(scenes[-1])), "caption": " ".join(scenes[-1])})
            # Not "which", because its answer names an image.
            ask, answer = random_question(scenes, rng, [topic for topic in TOPICS if topic != "which"])
            tags = [f"IMAGE#{shown[i]['image_id']}" for i in ask.images]
            question = Wording(plain=True).question(ask, tags, False, rng)
            messages += [{"role": "user", "content": question + SPARKLES_MARK * n_new, "images": shown[-n_new:]},
                         {"role": "assistant", "content": answer}]
        conversations.append({"dialogue": messages})
    write_json(folder / f"{name}/annotations/{name}.json", conversations)


# ---- the whole ----

# Each test set has dialogues of its own, about fresh drawings. data/tiny/tests/<name> holds it.
TESTS = {"seen": Dialogues(240), "unseen": Dialogues(240, allowed=UNSEEN),
         "wordings": Dialogues(160, wording=Wording(unseen=True)),
         "lower": Dialogues(160, wording=Wording(lower=True)),
         "long": Dialogues(160, (1, 2, 3, 4, 5, 6, 7, 8), 16)}


def write_world(folder: Path, n: int, seed: int):
    """All nine datasets, from seen scenes: n records each for llava and llava_dial, fewer for the others."""
    rng = random.Random(seed)
    images = ImageFolder(folder / COCO, rng)
    write_llava_dial(folder, Dialogues(n, (2, 3) * 6 + (4, 5, 6, 7, 8)), images)
    shown = write_llava(folder, n, images)
    write_instructions(folder, "CGD", [shown[i:i + 2] for i in range(0, n // 2, 2)], rng)   # about LLaVA's images
    for code, divisor, most_images in (("SD", 10, 2), ("SN", 50, 3), ("TVC", 50, 3), ("VST", 50, 3)):
        write_mimicit(folder, code, n // divisor, most_images, rng)
    for name in ("SparklesDialogueCC", "SparklesDialogueVG"):
        write_sparkles(folder, name, n // 20, rng)


def ensure(data: Path):
    """Draw a data folder, unless all files are there already, by whatever phrases they were made."""
    if not all((data / file).exists() for name in PAPER for file in SOURCES[name].files):      # no tenth dataset
        write_world(data, N_CONVERSATIONS, seed=0)


def ensure_tests(data: Path) -> list[Path]:
    """Draw the test sets of a data folder, unless they are there already; returns their folders."""
    folders = [data / "tests" / name for name in TESTS]
    for seed, (folder, dialogues) in enumerate(zip(folders, TESTS.values()), 1):
        if not (folder / DIALOGUE).exists():                    # It is written last.
            write_llava_dial(folder, dialogues, ImageFolder(folder / COCO, random.Random(seed)))
    return folders


def main():
    """Draw what is missing in data/tiny, and the images of examples/."""
    ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter).parse_args()
    ensure(DATA)
    ensure_tests(DATA)
    Path("examples").mkdir(exist_ok=True)
    for i, (name, scene) in enumerate(EXAMPLES.items()):
        draw_scene(scene, random.Random(i)).save(Path("examples") / name)


if __name__ == "__main__":
    main()
