"""From conversations to batches: the prompt template, token ids with their kinds and labels, packed batches.

    <s>{system}↵### Image 1: · · ·↵### Question: {question}↵### Answer: {answer}</s><s>↵### Image 2: · · ·↵### …
                             IMAGE                                      └── labels ──┘

This is the template of Figure 3; ↵ is a line break, so every ### stands on a line of its own. encode_round makes
it, for training and for chat, and shows an example. An image becomes as many positions of kind IMAGE as the ViT
gives tokens, here three; they have no ids.
All markers, such as `### Question:`, are plain text: special tokens made the paper's model worse (section 4.3).
sources.py reads conversations from the nine datasets. Before: visualchat.py. Next: train.py.
"""
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing import Array
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from llama import Tokenizer
from mmca import IMAGE, TEXT
from pixels import load_pixels
from visualchat import IGNORE
from vit import VisionConfig
from weights import printable

SYSTEM = "You are a powerful vision-language assistant."        # the paper's (Figure 3)
MAX_POSITIONS = 4096            # LLaMA-2's context, image tokens included
NO_TOKEN = 0                    # stands in `ids` at image tokens, whose embeddings come from the ViT instead


# ---- what a conversation is ----

class ImageFile(Protocol):
    """Where an image lies: a Path, or sources.EncodedImage. Its str() names it in messages."""

    def read_bytes(self) -> bytes: ...


@dataclass(frozen=True)
class Round:
    """One question and its answer; `images` are shown before the question. In chat the answer is yet to come."""
    images: tuple[ImageFile, ...]
    question: str
    answer: str | None = None


@dataclass(frozen=True)
class Conversation:
    """Rounds that follow each other; the paper calls it a sample."""
    name: str                   # the file and the record in it, for messages
    rounds: list[Round]


@dataclass
class Answered:
    """A round of a chat, and the answer as the model gave it."""
    images: tuple[ImageFile, ...]
    digests: tuple[str, ...]    # of the images' bytes
    question: str
    ids: list[int] = field(default_factory=list)        # of the answer, without </s>
    has_ended: bool = False     # by </s>; else somebody stopped it, or it was cut
    first_after: float = 0.0    # seconds from the question to the first token
    seconds: float = 0.0        # and to the last one


# ---- the template ----

@dataclass
class Encoded:
    """Token ids, kinds and labels of equal length, and the images that fill the IMAGE positions, in order."""
    ids: list[int]
    kind: list[int]
    labels: list[int]
    images: list[ImageFile]

    def __add__(self, other: "Encoded") -> "Encoded":
        return Encoded(self.ids + other.ids, self.kind + other.kind, self.labels + other.labels,
                       self.images + other.images)

    def add_text(self, ids: list[int], is_answer: bool = False):
        self.ids += ids
        self.kind += [TEXT] * len(ids)
        self.labels += ids if is_answer else [IGNORE] * len(ids)

    def add_image(self, image: ImageFile, n_tokens: int):
        self.ids += [NO_TOKEN] * n_tokens
        self.kind += [IMAGE] * n_tokens
        self.labels += [IGNORE] * n_tokens
        self.images.append(image)


def line_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a line break and `text`. They are the same wherever the line stands in a conversation.

    sentencepiece puts a space before all that it encodes; what stands before the line break is left out here.
    """
    ids, line_break = tokenizer.encode(f"\n{text}"), tokenizer.encode("\n")[-1]
    return ids[ids.index(line_break):]


def encode_round(round_: Round, n_before: int, is_first: bool, tokenizer: Tokenizer, n_tokens: int) -> Encoded:
    """A round in Figure 3's template, after n_before images; each image takes n_tokens positions.

    For example Round((file,), "Which shape?", "star") after one image, with the tiny tokenizer and n_tokens = 3:

        token  <s>   ↵ ### Image  2  : · · ·   ↵ ### Question  : Which shape  ?   ↵ ### Answer  : star </s>
        ids      1 774   4   157 35 19 0 0 0 774   4      222 19   294   633 20 774   4     54 19  663    2
        kind     T   T   T     T  T  T I I I   T   T        T  T     T     T  T   T   T      T  T    T    T
        labels   -   -   -     -  -  - - - -   -   -        -  -     -     -  -   -   -      -  -  663    2

    T is TEXT, I is IMAGE, - is IGNORE. Only the answer and </s> have labels, which are their own ids: the model
    compares the logits of each position with the label of the next one. In chat the round has no answer yet; it
    then ends at the colon, and the model goes on from there.

    Every round starts with <s>, the tokenizer's BOS, because the paper's released code tokenizes each round by
    itself and then puts the rounds together. So a round in chat has the ids that the model was trained on. Whoever
    changes the template counts up TEMPLATE in visualchat.py, which refuses results of older ones.
    """
    out = Encoded([], [], [], [])
    out.add_text([tokenizer.bos, *(tokenizer.encode(SYSTEM) if is_first else [])])
    for number, image in enumerate(round_.images, n_before + 1):
        out.add_text(line_ids(f"### Image {number}:", tokenizer))
        out.add_image(image, n_tokens)
    out.add_text(line_ids(f"### Question: {round_.question}\n### Answer:", tokenizer))
    if round_.answer is not None:
        out.add_text([*tokenizer.encode(round_.answer), tokenizer.eos], is_answer=True)
    return out


def encode(rounds: list[Round], tokenizer: Tokenizer, n_tokens: int, limit: int = MAX_POSITIONS) -> Encoded:
    """A conversation of at most `limit` positions: whole rounds at its end are left out, never half an answer.

    Raises ValueError where there is no round, or not even the first one fits.
    """
    if not rounds:
        raise ValueError("a conversation without a round")
    out = Encoded([], [], [], [])
    for round_ in rounds:
        new = encode_round(round_, len(out.images), not out.ids, tokenizer, n_tokens)
        if len(out.ids) + len(new.ids) > limit:
            break
        out += new
    if not out.ids:
        raise ValueError(f"the first round alone takes {len(new.ids)} positions, --positions and LLaMA allow "
                         f"{limit}: {len(rounds[0].images)} images and the question {rounds[0].question[:60]!r}")
    return out


# ---- which conversations, in which order ----

def split(conversations: list, seed: int, share: float = 0.1) -> tuple[list, list]:
    """(train, validation): a share of the conversations, drawn by the seed, is for validation (section 4.2.1)."""
    shuffled = random.Random(seed).sample(conversations, len(conversations))
    n = round(len(shuffled) * share)
    return shuffled[n:], shuffled[:n]


def order(n: int, seed: int, epoch: int, rank: int = 0, ranks: int = 1) -> list[int]:
    """Which of n conversations a rank takes in an epoch, in order; a rest smaller than `ranks` is left out.

    The seed and the epoch shuffle them. However many ranks there are, together they take the same conversations at
    the same time. To go on in the middle of an epoch, leave out the beginning.
    """
    return random.Random(f"{seed} {epoch}").sample(range(n), n)[rank:n // ranks * ranks:ranks]


# ---- batches ----

def to_tensors(encoded: Encoded, image_size: int, features=None) -> dict[str, Tensor]:
    """An example: ids, kind, labels (S) and images (I, 3, image_size, image_size) uint8.

    With features, a KeptFeatures of album.py, what the ViT once made of the images takes their place: features (I,
    n_queries, output_dim) in FP16. Raises as `load_pixels` and `KeptFeatures.load` do.
    """
    example = {name: torch.tensor(getattr(encoded, name)) for name in ("ids", "kind", "labels")}
    if features:
        kept = [features.load(image) for image in encoded.images]
        return example | {"features": torch.stack(kept) if kept else torch.empty(0, *features.shape).half()}
    images = torch.empty(len(encoded.images), 3, image_size, image_size, dtype=torch.uint8)
    for i, image in enumerate(encoded.images):
        images[i] = load_pixels(image, image_size)
    return example | {"images": images}


def collate(examples: list[dict[str, Tensor]]) -> dict:
    """A batch: the examples that `to_tensors` made, one after the other, without padding.

    ids, kind, labels (1, S); images or features (I, …) of all examples in order; `lengths` tells them apart.
    """
    batch = {name: torch.cat([example[name] for example in examples]) for name in examples[0]}
    batch |= {name: batch[name][None] for name in ("ids", "kind", "labels")}
    return batch | {"lengths": [len(example["ids"]) for example in examples]}


def pack(examples: list[dict[str, Tensor]], positions: int) -> list[dict]:
    """Batches of at most so many positions: long examples first, each into the first batch that has room for it.

    An example that is longer is alone in its batch.
    """
    batches = []
    for example in sorted(examples, key=lambda example: -len(example["ids"])):
        fitting = (batch for batch in batches
                   if sum(len(other["ids"]) for other in (*batch, example)) <= positions)
        if (batch := next(fitting, None)) is None:
            batches.append(batch := [])
        batch.append(example)
    return [collate(batch) for batch in batches]


class Conversations(Dataset):
    """Conversations as examples for `collate`; they are encoded, and their images opened, when they are asked for.

    A conversation that cannot be used raises ValueError that names it; with skip_bad the next one takes its place.
    """

    def __init__(self, conversations: list[Conversation], tokenizer: Tokenizer, vision: VisionConfig,
                 limit: int = MAX_POSITIONS, skip_bad: bool = False, features=None):
        self.conversations, self.tokenizer, self.vision, self.limit = conversations, tokenizer, vision, limit
        self.skip_bad, self.features = skip_bad, features
        self.skipped = Array("b", len(conversations), lock=False)   # 1 where one was skipped, in whatever process

    def __len__(self) -> int:
        return len(self.conversations)

    def cut(self, indices: Iterable[int]) -> Tensor:
        """Of these conversations: how many lose their last rounds to the limit, how many rounds these are, and how
        many conversations do not fit at all, (3)."""
        found = torch.zeros(3, dtype=torch.long)
        for i in indices:
            rounds = self.conversations[i].rounds
            try:                                                # Every round starts with BOS and has no other one.
                ids = encode(rounds, self.tokenizer, self.vision.n_queries, self.limit).ids
                lost = len(rounds) - ids.count(self.tokenizer.bos)
                found += torch.tensor([lost > 0, lost, 0])
            except ValueError:
                found[2] += 1
        return found

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)                             # This ends a `for` loop over the examples.
        for i in (*range(index, len(self)), *range(index)):
            conversation = self.conversations[i]
            try:
                encoded = encode(conversation.rounds, self.tokenizer, self.vision.n_queries, self.limit)
                return to_tensors(encoded, self.vision.image_size, self.features)
            except (ValueError, OSError) as error:
                message = f"{conversation.name}: {error}"
                if not self.skip_bad:
                    raise ValueError(f"{message}. Correct it, or leave it out with --skip-bad") from error
                if not self.skipped[i]:
                    print(f"skipped {printable(message)}", file=sys.stderr)
                self.skipped[i] = 1
        raise ValueError("none of the conversations can be used")
