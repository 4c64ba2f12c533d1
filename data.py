"""From files to batches: a conversation is a list of rounds, a batch is ids, kind, labels and images.

    <s>{system} ### Image 1: <image> ### Question: {question} ### Answer: {answer}</s><s> ### Image 2: <image> …
                             IMAGE…                                       └── labels ─┘

One function, encode_round, makes this template (Figure 3 of the paper) for training and for chat. `<image>` turns
into as many positions of kind IMAGE as the encoder gives tokens, without token ids. Images are numbered through
the conversation. The template is plain text: the paper saw special tokens hurt (section 4.3).
Before: visualchat.py. Next file: shapes.py, a tiny world in these formats.
"""
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from llama import Tokenizer, read_json
from mmca import IMAGE, PAD, TEXT
from visualchat import IGNORE
from vit import VisionConfig, open_image, pixels

SYSTEM = "You look at images and answer questions about them."
MARK = "<image>"                # where an image stands in a LLaVA record
MAX_POSITIONS = 4096            # LLaMA-2's context, image tokens included
NOTHING = 0                     # the id that stands in `ids` where no token is: at image tokens and padding


@dataclass(frozen=True)
class Round:
    """One question and its answer; `images` are shown before the question. In chat the answer is yet to come."""
    images: tuple[Path, ...]
    question: str
    answer: str | None = None


# ---- the template ----

@dataclass
class Encoded:
    """Token ids, kinds and labels of equal length, and the files of the images that IMAGE positions stand for."""
    ids: list[int]
    kind: list[int]
    labels: list[int]
    images: list[Path]

    def add_text(self, ids: list[int], scored: bool = False):
        self.ids += ids
        self.kind += [TEXT] * len(ids)
        self.labels += ids if scored else [IGNORE] * len(ids)

    def add_image(self, file: Path, n_tokens: int):
        self.ids += [NOTHING] * n_tokens
        self.kind += [IMAGE] * n_tokens
        self.labels += [IGNORE] * n_tokens
        self.images.append(file)


def encode_round(turn: Round, n_before: int, first: bool, tokenizer: Tokenizer, n_tokens: int) -> Encoded:
    """One round of Figure 3's template, after n_before images; n_tokens places per image.

    Without an answer the round ends where the model has to go on. Only answer and </s> are labelled.
    """
    out = Encoded([], [], [], [])
    out.add_text([tokenizer.bos])
    text = [SYSTEM] if first else []
    for i, file in enumerate(turn.images, n_before + 1):
        out.add_text(tokenizer.encode("\n".join([*text, f"### Image {i}:"])))
        out.add_image(file, n_tokens)
        text = []
    out.add_text(tokenizer.encode("\n".join([*text, f"### Question: {turn.question}", "### Answer:"])))
    if turn.answer is not None:
        out.add_text([*tokenizer.encode(turn.answer), tokenizer.eos], scored=True)
    return out


def encode(rounds: list[Round], tokenizer: Tokenizer, n_tokens: int, limit: int = MAX_POSITIONS) -> Encoded:
    """A conversation of at most `limit` positions: whole rounds at its end are left out, never half an answer.

    Raises ValueError where not even the first round fits.
    """
    out = Encoded([], [], [], [])
    for turn in rounds:
        new = encode_round(turn, len(out.images), not out.ids, tokenizer, n_tokens)
        if len(out.ids) + len(new.ids) > limit:
            break
        out = Encoded(out.ids + new.ids, out.kind + new.kind, out.labels + new.labels, out.images + new.images)
    if not out.ids:
        raise ValueError(f"the first round alone takes {len(new.ids)} positions, {limit} are allowed: "
                         f"{len(rounds[0].images)} images and the question {rounds[0].question[:60]!r}")
    return out


# ---- the published datasets ----

def inside(folder: Path, name: str) -> Path:
    """folder/name; raises ValueError where the name, which an annotation file gives, leads out of the folder."""
    path = (folder / name).resolve()
    if folder.resolve() not in path.parents:
        raise ValueError(f"image {name!r} lies outside {folder}")
    return path


def llava_rounds(record: dict, images: Path) -> list[Round]:
    """A LLaVA record as rounds. Each <image> mark introduces the record's next image; a question loses its marks.

    `image` is one name or, as many projects extend the format, a list of names. Raises ValueError or KeyError that
    says what is wrong with the record.
    """
    names = record.get("image", [])
    files = [inside(images, name) for name in ([names] if isinstance(names, str) else names)]
    turns = record["conversations"]
    speakers = [turn["from"] for turn in turns]
    if not turns or speakers != ["human", "gpt"] * (len(turns) // 2):
        raise ValueError(f"speakers must alternate human, gpt; found {', '.join(speakers) or 'none'}")
    rounds = []
    for human, gpt in zip(turns[::2], turns[1::2]):
        count = human["value"].count(MARK)
        shown, files = tuple(files[:count]), files[count:]
        question = " ".join(human["value"].replace(MARK, " ").split())
        if len(shown) < count or not question or not gpt["value"].strip():
            raise ValueError(f"more {MARK} marks than images, or an empty question or answer, "
                             f"at {human['value'][:60]!r}")
        rounds.append(Round(shown, question, gpt["value"].strip()))
    if files:
        raise ValueError(f"{len(files)} images have no {MARK} mark in a question")
    return rounds


def read_llava(data: Path, names: list[str]) -> list[list[Round]]:
    """The conversations of LLaVA-Instruct files under data/llava, images in data/coco/train2017."""
    conversations = []
    for file in (data / "llava" / name for name in names):
        if not file.exists():
            raise FileNotFoundError(f"no {file.absolute()}: LLaVA-Instruct-150K is on the Hugging Face hub as "
                                    "liuhaotian/LLaVA-Instruct-150K, its pictures are COCO's train2017")
        for number, record in enumerate(read_json(file, list)):
            try:
                conversations.append(llava_rounds(record, data / "coco/train2017"))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                where = record.get("id", number) if isinstance(record, dict) else number
                raise ValueError(f"{file}, record {where}: {type(error).__name__}: {error}") from error
    return conversations


SOURCES: dict[str, Callable[[Path], list[list[Round]]]] = {
    "llava": lambda data: read_llava(data, ["detail_23k.json", "complex_reasoning_77k.json"]),
    "llava_dial": lambda data: read_llava(data, ["conversation_58k.json"]),
}


def read(data: Path, datasets: list[str]) -> list[list[Round]]:
    """All conversations of the named datasets, one after the other; raises ValueError for an unknown name."""
    if unknown := [name for name in datasets if name not in SOURCES]:
        raise ValueError(f"no dataset {unknown[0]!r}; there are {', '.join(SOURCES)}")
    return [rounds for name in datasets for rounds in SOURCES[name](data)]


def split(conversations: list, seed: int, share: float = 0.1) -> tuple[list, list]:
    """(train, validation): a share of the conversations, drawn by the seed, is kept for validation."""
    shuffled = random.Random(seed).sample(conversations, len(conversations))
    n = round(len(shuffled) * share)
    return shuffled[n:], shuffled[:n]


# ---- batches ----

def tensors(encoded: Encoded, image_size: int) -> dict[str, Tensor]:
    """ids, kind, labels (S) and images (N, 3, image_size, image_size), opened from their files."""
    images = [pixels(open_image(file), image_size) for file in encoded.images]
    return {**{name: torch.tensor(getattr(encoded, name)) for name in ("ids", "kind", "labels")},
            "images": torch.stack(images) if images else torch.empty(0, 3, image_size, image_size)}


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch: ids, kind, labels (B, S) padded to the longest row; images (N, 3, h, w) of all rows in order."""
    fill = {"ids": NOTHING, "kind": PAD, "labels": IGNORE}
    batch = {name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
             for name, value in fill.items()}
    return {**batch, "images": torch.cat([row["images"] for row in rows])}


class Conversations(Dataset):
    """Conversations as rows for `collate`; encoded, and their pictures opened, when asked for by a worker."""

    def __init__(self, conversations: list[list[Round]], tokenizer: Tokenizer, vision: VisionConfig,
                 limit: int = MAX_POSITIONS):
        self.conversations, self.tokenizer, self.vision, self.limit = conversations, tokenizer, vision, limit

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        encoded = encode(self.conversations[index], self.tokenizer, self.vision.n_queries, self.limit)
        return tensors(encoded, self.vision.image_size)
