"""Do words look at what they are about? The second softmax, measured on fresh drawings.

    python -m tiny.looking --model weights/tiny/chat --draw examples/looking.png

Three images are shown, then their colors, shapes and places are asked for. For the words of each right answer it
prints, layer by layer, how much of the attention to images goes to the image that was asked about (one third, if
nothing mattered), and how much of that falls into the box around its object, beside the box's share of the image.
Attention to an image token is carried to patches by the resampler's attention, as in page.py. Before: page.py.
"""
import random
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from chat import Chat
from page import looks_of, word_looks
from terminal import newest
from tiny.wording import ATTRIBUTES, Ask, Wording
from tiny.world import SEEN, draw_scene, random_scene
from weights import printable, replacing

ASKED = ("color", "shape", "place")
IMAGES, ASKED_EACH = 3, 4                   # of a conversation


def box_shares(image: Image.Image, side: int) -> Tensor:
    """Which share of each of side × side patches the box around the object covers, (P); all else is gray."""
    pixels = np.asarray(image, dtype=int)
    colored = pixels.max(2) - pixels.min(2) > 40
    rows, columns = colored.any(1).nonzero()[0], colored.any(0).nonzero()[0]
    box = np.zeros(colored.shape, np.float32)
    box[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1] = 1
    size = len(box) // side
    return torch.from_numpy(box).view(side, size, side, size).mean((1, 3)).flatten()


def measured(chat: Chat, n: int, seed: int) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """For n right answers: topic, share of the image asked about (layers), of the box in it (layers), its area.

    Raises ValueError where hardly any answer is right.
    """
    rng, found, tried = random.Random(seed), 0, 0
    while found < n:
        if (tried := tried + ASKED_EACH) > 10 * n + 100:
            raise ValueError(f"only {found} answers in {tried} are right: is it a result of the tiny world?")
        scenes = [random_scene(rng, [], SEEN) for _ in range(IMAGES)]
        images, asked = [draw_scene(scene, rng) for scene in scenes], []
        chat.clear()
        for i in range(ASKED_EACH):
            topic, image = rng.choice(ASKED), rng.randrange(IMAGES)
            question = Wording(plain=True).question(Ask(topic, (image,)), [f"image {image + 1}"], False, rng)
            answer = chat.ask(question, *(images if i == 0 else ()))
            asked.append((topic, image, answer == scenes[image][list(ATTRIBUTES).index(topic)]))
        looks = looks_of(chat.model, chat.encoded())
        side = round(looks.patches.shape[2] ** 0.5)
        for (topic, image, is_right), words in zip(asked, word_looks(chat, looks)):
            if is_right and found < n:
                found += 1
                look = torch.stack([look for _, look in words]).mean(0)         # (layers, I, n_queries)
                share, box = look[:, image].sum(-1), box_shares(images[image], side)
                heat = look[:, image] @ looks.patches[image]                    # (layers, P)
                yield topic, share, heat @ box / heat.sum(-1), box.mean().item()


def draw(lines: dict[str, list[float]], path: Path, height: int = 260):
    """Bars: for each topic a group per layer, share of the box; the gray line is its share of the area."""
    layers, most = len(next(iter(lines.values()))) - 1, max(map(max, lines.values()))
    image = Image.new("RGB", (60 + len(lines) * (layers * 40 + 40), height + 60), "white")
    pen = ImageDraw.Draw(image)
    pen.text((20, 6), "attention inside the object's box, by layer; gray: its share of the area", "black",
             font_size=14)
    for group, (topic, (area, *shares)) in enumerate(lines.items()):
        left = 40 + group * (layers * 40 + 40)
        for layer, share in enumerate(shares):
            top = height + 30 - share / most * (height - 20)
            pen.rectangle((left + layer * 40, top, left + layer * 40 + 30, height + 30), "#DD8452")
            pen.text((left + layer * 40 + 15, top - 3), f"{share:.0%}", "black", anchor="mb", font_size=12)
        level = height + 30 - area / most * (height - 20)
        pen.line((left - 5, level, left + layers * 40 - 5, level), "#777777", 2)
        pen.text((left + layers * 20, height + 36), topic, "black", anchor="ma", font_size=14)
    with replacing(path) as unfinished:
        image.save(unfinished, "PNG")


def main():
    """Print the shares as a table, and draw them; what cannot be read ends the program with one line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a training result; default the newest under out/")
    parser.add_argument("--answers", type=int, default=400, help="so many right answers, 50 or more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draw", type=Path, help="an image to draw")
    options = parser.parse_args()
    if options.answers < 50:                                # then each topic has some
        parser.error(f"--answers {options.answers}: expected 50 or more")
    try:
        chat = Chat.open(options.model or newest(Path("out")))
        found = list(tqdm(measured(chat, options.answers, options.seed), total=options.answers, leave=False))
        topics = {topic: [one for one in found if one[0] == topic] for topic in ASKED}
        layers, boxes = range(1, len(found[0][1]) + 1), {}
        print("percent of attention   answers  " + "".join(f"layer {layer}  " for layer in layers) + "if equal")
        for topic, ones in topics.items():
            share, box = (torch.stack([one[i] for one in ones]).mean(0).tolist() for i in (1, 2))
            boxes[topic] = [sum(one[3] for one in ones) / len(ones), *box]
            for what, values, equal in (("image asked about", share, 1 / IMAGES),
                                        ("box in it", box, boxes[topic][0])):
                print(f"{topic:<6} {what:<18}{len(ones):>5}  " + "".join(f"{100 * x:>7.1f}  " for x in values)
                      + f"{100 * equal:>8.1f}")
        if options.draw:
            draw(boxes, options.draw)
    except (OSError, ValueError) as error:
        sys.exit(f"tiny/looking.py: {printable(str(error))}")


if __name__ == "__main__":
    main()
