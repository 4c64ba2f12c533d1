"""From files to batches: nine datasets become conversations, a batch of them is ids, kind, labels and images.

    <s>{system} ### Image 1: <image> ### Question: {question} ### Answer: {answer}</s><s> ### Image 2: <image> …
                             IMAGE…                                       └── labels ─┘

One function, encode_round, makes this template (Figure 3 of the paper) for training and for chat; questions and
answers stand on lines of their own. `<image>` turns into as many positions of kind IMAGE as the encoder gives
tokens, without token ids. Images are numbered through the conversation. All is plain text: the paper saw special
tokens hurt (section 4.3).
`python data.py FOLDER --size 7b` checks a data folder. Before: visualchat.py. Next file: shapes.py, a tiny world.
"""
import argparse
import base64
import hashlib
import json
import os
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from io import BytesIO
from itertools import groupby
from multiprocessing import Array
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from llama import Tokenizer, read_file, read_json
from mmca import IMAGE, TEXT
from visualchat import IGNORE, REPOSITORIES, find
from vit import VisionConfig, VisionTransformer, open_image, pixels

SYSTEM = "You look at images and answer questions about them."
MARK, SPARKLES_MARK = "<image>", "<Img><ImageHere></Img>"       # where an image stands in LLaVA's, Sparkles' text
MOST_IMAGES = 8                 # in a conversation of MIMIC-IT or Sparkles: the paper leaves out longer ones
MAX_POSITIONS = 4096            # LLaMA-2's context, image tokens included
TAGS = [[f"image {n}" for n in range(1, 9)],                            # the ways in which texts call images
        [f"image {letter}" for letter in "abcdefgh"], [f"image {letter}" for letter in "ABCDEFGH"],
        [f"the {n} image" for n in "first second third fourth fifth sixth seventh eighth".split()]]
CHUNK = 1 << 24                 # bytes of a large file that are in memory at a time
NOTHING = 0                     # the id that stands in `ids` where no token is: at image tokens


# ---- what a conversation is ----

@dataclass(frozen=True)
class Packed:
    """A picture that lies in a JSON file as base64 text: its key there, the text's first byte and its length."""
    file: Path
    key: str
    start: int
    length: int

    def read_bytes(self) -> bytes:
        with open(self.file, "rb") as file:
            file.seek(self.start)
            text = file.read(self.length)
        try:
            return base64.b64decode(json.loads(b'"%b"' % text), validate=True)     # JSON may write / as \/
        except ValueError as error:
            raise ValueError(f"{self} is no base64 text: {error}") from error

    def __str__(self) -> str:
        return f"{self.file}, {self.key}"


Picture = Path | Packed


@dataclass(frozen=True)
class Round:
    """One question and its answer; `images` are shown before the question. In chat the answer is yet to come."""
    images: tuple[Picture, ...]
    question: str
    answer: str | None = None


@dataclass(frozen=True)
class Conversation:
    name: str                   # file and record, for messages
    rounds: list[Round]


# ---- the template ----

@dataclass
class Encoded:
    """Token ids, kinds and labels of equal length, and the files of the images that IMAGE positions stand for."""
    ids: list[int]
    kind: list[int]
    labels: list[int]
    images: list[Picture]

    def add_text(self, ids: list[int], scored: bool = False):
        self.ids += ids
        self.kind += [TEXT] * len(ids)
        self.labels += ids if scored else [IGNORE] * len(ids)

    def add_image(self, file: Picture, n_tokens: int):
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
        raise ValueError(f"the first round alone takes {len(new.ids)} positions, --positions and LLaMA allow "
                         f"{limit}: {len(rounds[0].images)} images and the question {rounds[0].question[:60]!r}")
    return out


# ---- what the nine readers share ----

class LeftOut(Exception):
    """A record that its dataset's own rules leave out; the message says so, with the reason."""


@cache
def listing(folder: Path) -> frozenset[str]:
    """Names of the plain files in a folder. Asked once: asking the disk for each of 200,000 records takes long."""
    return frozenset(entry.name for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False))


def inside(folder: Path, name: str) -> Path:
    """The file folder/name; raises ValueError where the name leads out of the folder, or to nothing."""
    if name not in listing(folder):
        path = (folder / name).resolve()
        if folder.resolve() not in path.parents:
            raise ValueError(f"image {name!r} lies outside {folder}")
        if not path.is_file():
            raise ValueError(f"no image {name!r} in {folder}")
    return folder / name


@dataclass
class Reader:
    """What a dataset is read from, and what was left out of it on the way."""
    name: str
    data: Path
    seed: int = 0
    skip_bad: bool = False
    left_out: Counter = field(default_factory=Counter)          # what its own rules did to records: how many
    bad: list[str] = field(default_factory=list)                # what was wrong with records that were skipped

    def files(self) -> list[Path]:
        """The dataset's files and folders; raises FileNotFoundError that says where to get missing ones."""
        names = SOURCES[self.name].files
        if missing := [name for name in names if not (self.data / name).exists()]:
            where = "; ".join(dict.fromkeys(WHERE[name.split("/")[0]] for name in missing))
            raise FileNotFoundError(f"no {', '.join(missing)} in {self.data.absolute()}. Get {where}")
        return [self.data / name for name in names]

    def each(self, file: Path, records: Iterable[tuple[str, object]], parse: Callable) -> Iterator[Conversation]:
        """What `parse` makes of each (key, record); raises ValueError that names a bad one, or skips it."""
        for key, record in records:
            name = f"{file}, record {key if str(key).isprintable() else ascii(key)}"
            try:
                conversation = Conversation(name, parse(record))
            except LeftOut as reason:
                self.left_out[str(reason)] += 1
            except (ValueError, KeyError, TypeError, AttributeError, OSError, RuntimeError) as error:
                message = f"{name}: {type(error).__name__}: {error}"
                if not self.skip_bad:
                    raise ValueError(f"{message}. Mend it, or leave such records out with --skip-bad") from error
                self.bad.append(message)
            else:
                yield conversation


def answered(images: Iterable[Picture], question: str, answer: str) -> Round:
    """A round with blanks tidied; raises ValueError where question or answer is empty or no valid Unicode."""
    question, answer = " ".join(question.split()), answer.strip()
    (question + answer).encode()
    if not question or not answer:
        raise ValueError(f"an empty question or answer: {question[:60]!r}, {answer[:60]!r}")
    return Round(tuple(images), question, answer)


# ---- LLaVA-Instruct ----

def llava_rounds(record: dict, images: Path) -> list[Round]:
    """A LLaVA record as rounds. Each <image> mark introduces the record's next image; a question loses its marks.

    `image` is one name or, as many projects extend the format, a list of names. Raises ValueError or KeyError that
    says what is wrong with the record.
    """
    names, turns = record.get("image", []), record["conversations"]
    names = [names] if isinstance(names, str) else list(names)
    speakers = [turn["from"] for turn in turns]
    if not turns or speakers != ["human", "gpt"] * (len(turns) // 2):
        raise ValueError(f"speakers must alternate human, gpt; found {', '.join(speakers) or 'none'}")
    marks = [human["value"].count(MARK) for human in turns[::2]]
    if sum(marks) != len(names):
        raise ValueError(f"{len(names)} images, but {sum(marks)} {MARK} marks")
    files = iter([inside(images, name) for name in names])
    return [answered((next(files) for _ in range(n)), human["value"].replace(MARK, " "), gpt["value"])
            for n, human, gpt in zip(marks, turns[::2], turns[1::2])]


def llava(reader: Reader, files: list[Path], images: Path) -> Iterator[Conversation]:
    """A conversation for each record of LLaVA's files."""
    for file in files:
        records = ((record.get("id", i) if isinstance(record, dict) else i, record)
                   for i, record in enumerate(read_json(file, list)))
        yield from reader.each(file, records, lambda record: llava_rounds(record, images))


def concatenated(reader: Reader, most: int) -> Iterator[Conversation]:
    """LLaVA's conversations in random groups of 1 to `most`, each group one conversation (section 4.2).

    Every record is used exactly once. Those that show several images already stay alone.
    """
    *files, images = reader.files()
    rng, pool = random.Random(f"{reader.seed} {reader.name}"), []
    for conversation in llava(reader, files, images):
        if sum(len(turn.images) for turn in conversation.rounds) > 1:
            yield conversation
        else:
            pool.append(conversation)
    rng.shuffle(pool)
    while pool:
        n = rng.randint(1, most)
        group, pool[-n:] = pool[-n:], []
        yield Conversation(" + ".join(part.name for part in group), sum((part.rounds for part in group), []))


# ---- MIMIC-IT ----

def scan(file: Path) -> Iterator[tuple[str, int, int]]:
    """(key, first byte, length) of every text in a JSON object of texts, which may be larger than memory.

    Such a file is quotes in turn: one opens a key, one closes it, one opens its text, one closes it. Raises
    ValueError for any other JSON, and for keys or texts with a quote in them, which neither ids nor base64 have.
    """
    broken = f"{file} is no JSON object of base64 texts, or was cut off: unexpected "
    between, part, text, start, offset = b"{", 0, b"", 0, 0

    def kept(text: bytes) -> bytes:
        """Of an image its end is enough; all else is short."""
        if part != 3 and len(text) > 10_000:
            raise ValueError(f"{broken}{text[:60]!r} before byte {offset}")
        return text[-1:] if part == 3 else text

    with open(file, "rb") as stream, tqdm(total=file.stat().st_size, desc=f"scanning {file.name}", unit="B",
                                          unit_scale=True, leave=False) as bar:
        while chunk := stream.read(CHUNK):
            begin = 0
            for quote in (match.start() for match in re.finditer(b'"', chunk)):
                text = kept(text + chunk[begin:quote])
                fits = (text.strip() == between, text[-1:] != b"\\", text.strip() == b":", text[-1:] != b"\\")
                if not fits[part]:
                    raise ValueError(f"{broken}{text[-60:]!r} before byte {offset + quote}")
                if part == 1:
                    key, between = json.loads(b'"%b"' % text), b","
                elif part == 3:
                    yield key, start, offset + quote - start
                begin = quote + 1
                part, text, start = (part + 1) % 4, b"", offset + begin
            text = kept(text + chunk[begin:])
            offset += len(chunk)
            bar.update(len(chunk))
    if part != 0 or b"".join(text.split()) != (b"}" if between == b"," else b"{}"):
        raise ValueError(f"{broken}{text[-60:]!r} at its end")


def packed(file: Path) -> dict[str, Packed]:
    """The pictures in a JSON object of base64 texts, by key; none of them is read.

    The file is scanned once; `<file>.index` beside it then says where each text lies.
    """
    index, size = file.with_name(f"{file.name}.index"), file.stat().st_size
    state = [size, file.stat().st_mtime_ns]
    try:
        found = read_json(index)
        images = {key: Packed(file, key, start, length) for key, (start, length) in found["texts"].items()}
        if found["state"] == state and all(0 <= p.start <= p.start + p.length <= size for p in images.values()):
            return images
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass                                                    # none yet, or damaged: it is only a shortcut
    images = {key: Packed(file, key, start, length) for key, start, length in scan(file)}
    try:
        with tempfile.NamedTemporaryFile("w", dir=index.parent, delete=False) as new:   # other ranks scan, too
            json.dump({"state": state, "texts": {key: [p.start, p.length] for key, p in images.items()}}, new)
        os.replace(new.name, index)
    except OSError as error:                                    # a data folder may be read-only
        print(f"{index} could not be written, so every start scans {file.name}: {error}", file=sys.stderr)
    return images


def mimicit(reader: Reader) -> Iterator[Conversation]:
    """Conversations of a part of MIMIC-IT: an instruction, and those related to it, about the same images."""
    file, source, *_ = reader.files()
    data = read_json(file).get("data")
    if not isinstance(data, dict):
        raise ValueError(f"{file} holds no instructions under `data`")
    pictures = ({f"CGD_IMG_{name[:-4]}": source / name for name in listing(source) if name.endswith(".jpg")}
                if source.is_dir() else packed(source))                     # CGD's pictures are COCO's

    def parsed(record: dict) -> list[Round]:
        """An instruction as one round; raises LeftOut and what `each` catches."""
        found = [pictures[name] for name in record["image_ids"] if name in pictures]
        if not found:
            raise LeftOut("left out: none of its images is there")
        if len(found) > MOST_IMAGES:
            raise LeftOut(f"left out: more than {MOST_IMAGES} images")
        if len(found) < len(record["image_ids"]):
            reader.left_out["kept without an image that is not there"] += 1
        if not all(isinstance(other, str) for other in record["rel_ins_ids"]):
            raise ValueError("rel_ins_ids is no list of names")
        return [answered(found, record["instruction"].replace(MARK, " "), record["answer"])]

    single = {key: talk for key, record in data.items() for talk in reader.each(file, [(key, record)], parsed)}
    waiting = dict(single)                                                  # those that no conversation has yet
    for key, talk in single.items():
        if waiting.pop(key, None):
            first = talk.rounds[0]
            related = [waiting.pop(other).rounds[0] for other in data[key]["rel_ins_ids"]
                       if other in waiting and waiting[other].rounds[0].images == first.images]
            yield Conversation(talk.name, [first, *(replace(turn, images=()) for turn in related)])


def blend(reader: Reader) -> Iterator[Conversation]:
    """LLaVA's talk about each image of a CGD conversation, then CGD's talk about both (section 4.2).

    For each image in turn a random number of LLaVA's conversations, none only for the last one; then at least one
    of CGD's rounds. An image is introduced where it is first talked about.
    """
    cgd, images, *files = reader.files()
    rng, talks = random.Random(f"{reader.seed} {reader.name}"), {}
    for conversation in llava(reader, files, images):
        first, *others = conversation.rounds
        if len(first.images) == 1 and not any(turn.images for turn in others):
            talks.setdefault(first.images[0], []).append(conversation.rounds)
    for conversation in mimicit(reader):
        shown = conversation.rounds[0].images
        if not all(image in talks for image in shown[:-1]):
            reader.left_out["left out: an image that LLaVA does not talk about"] += 1
            continue
        rounds, waiting = [], []
        for i, image in enumerate(shown, 1):
            talk = talks.get(image, [])
            chosen = rng.sample(talk, rng.randint(int(i < len(shown)), len(talk)))
            waiting += [] if chosen else [image]
            new = [turn for part in chosen for turn in part]
            rounds += [Round((image,) if i == 0 else (), turn.question, turn.answer) for i, turn in enumerate(new)]
        both = sorted(rng.sample(range(len(conversation.rounds)), rng.randint(1, len(conversation.rounds))))
        rounds += [Round(tuple(waiting) if i == both[0] else (), turn.question, turn.answer)
                   for i, turn in enumerate(conversation.rounds) if i in both]
        yield Conversation(conversation.name, rounds)


# ---- Sparkles ----

def sparkles_rounds(record: dict, images: Path, names: list[str]) -> list[Round]:
    """A SparklesDialogue record as rounds; IMAGE#<id> becomes the image's name in `names`.

    Raises ValueError or KeyError that says what is wrong with the record, LeftOut where it does not qualify.
    """
    messages = record["dialogue"]
    roles = [message["role"] for message in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"roles must alternate user, assistant; found {', '.join(roles) or 'none'}")
    ids = [str(image["image_id"]) for user in messages[::2] for image in user.get("images", [])]
    if len(ids) > MOST_IMAGES:
        raise LeftOut(f"left out: more than {MOST_IMAGES} images")
    if any(f"{id}.jpg" not in listing(images) for id in ids):
        raise LeftOut("left out: an image is missing")
    name_of = dict(zip(ids, names))

    def named(tag: re.Match) -> str:
        if tag[1] not in name_of:
            raise LeftOut("left out: the text names an image that is not shown")
        name, before = name_of[tag[1]], tag.string[:tag.start()].rstrip()
        return name if before and before[-1] not in ".?!" else name[0].upper() + name[1:]

    rounds = []
    for user, assistant in zip(messages[::2], messages[1::2]):
        question, answer = (re.sub(r"IMAGE#(\d+)", named, message["content"].replace(SPARKLES_MARK, ""))
                            for message in (user, assistant))
        files = (images / f"{image['image_id']}.jpg" for image in user.get("images", []))
        rounds.append(answered(files, question, answer))
    return rounds


def sparkles(reader: Reader) -> Iterator[Conversation]:
    """Both parts of SparklesDialogue; each conversation calls its images in one of the ways of TAGS."""
    rng, places = random.Random(f"{reader.seed} {reader.name}"), reader.files()
    for file, images in zip(places[::2], places[1::2]):
        yield from reader.each(file, enumerate(read_json(file, list)),
                               lambda record: sparkles_rounds(record, images, rng.choice(TAGS)))


# ---- all of them ----

@dataclass(frozen=True)
class Source:
    """A dataset: what reads it, how many samples the paper counts (Table 1), and its files and folders."""
    read: Callable[[Reader], Iterator[Conversation]]
    in_paper: int
    files: tuple[str, ...]


COCO, CGD = "coco/train2017", "MIMIC-IT/CGD_instructions.json"
DETAIL, DIALOGUE = ("llava/detail_23k.json", "llava/complex_reasoning_77k.json"), "llava/conversation_58k.json"
WHERE = {"coco": "the pictures of COCO's train2017 from cocodataset.org",
         "llava": "LLaVA-Instruct-150K from the Hugging Face hub, liuhaotian/LLaVA-Instruct-150K",
         "MIMIC-IT": "MIMIC-IT's JSON files, not the parquet ones, from the Hugging Face hub, pufanyi/MIMICIT",
         "SparklesDialogueCC": "SparklesDialogueCC and SparklesDialogueVG by way of github.com/HYPJUDY/Sparkles"}
WHERE["SparklesDialogueVG"] = WHERE["SparklesDialogueCC"]
SOURCES = {
    "llava": Source(lambda reader: concatenated(reader, 3), 49924, (*DETAIL, COCO)),
    "llava_dial": Source(lambda reader: concatenated(reader, 2), 37818, (DIALOGUE, COCO)),
    "otter_mimicit_cgd": Source(mimicit, 70940, (CGD, COCO)),
    **{f"otter_mimicit_{name.lower()}": Source(mimicit, count, (f"MIMIC-IT/{name}_instructions.json",
                                                               f"MIMIC-IT/{name}.json"))
       for name, count in (("SD", 8006), ("SN", 487), ("TVC", 2), ("VST", 115))},
    "llava_otter_blend": Source(blend, 48869, (CGD, COCO, *DETAIL, DIALOGUE)),
    "sparkles_dialogue": Source(sparkles, 6520, tuple(
        f"{name}/{part}" for name in ("SparklesDialogueCC", "SparklesDialogueVG")
        for part in (f"annotations/{name}.json", "images"))),
}
NAMES = tuple(SOURCES)
RECIPES = {"attention": NAMES[:2], "single": NAMES[:2], "set1": NAMES[:8], "set2": NAMES}  # the paper's mixtures


def read(data: Path, datasets: Iterable[str], seed: int = 0, skip_bad: bool = False,
         tell: Callable[[str], None] = print) -> list[Conversation]:
    """All conversations of the named datasets or recipes, the same for the same seed; tells what was left out.

    Raises ValueError for an unknown name and for a bad record, FileNotFoundError for missing files.
    """
    names = [name for given in datasets for name in RECIPES.get(given, [given])]
    if unknown := [name for name in names if name not in SOURCES]:
        raise ValueError(f"no dataset {unknown[0]!r}; there are {', '.join(SOURCES)}, and the mixtures "
                         f"{', '.join(RECIPES)}")
    conversations = []
    for name in dict.fromkeys(names):
        reader = Reader(name, data, seed, skip_bad)
        conversations += SOURCES[name].read(reader)
        for reason, count in reader.left_out.items():
            tell(f"{name}: {count} records {reason}")
        if reader.bad:
            tell(f"{name}: {len(reader.bad)} bad records skipped, the first is {reader.bad[0]}")
    return conversations


def split(conversations: list, seed: int, share: float = 0.1) -> tuple[list, list]:
    """(train, validation): a share of the conversations, drawn by the seed, is kept for validation."""
    shuffled = random.Random(seed).sample(conversations, len(conversations))
    n = round(len(shuffled) * share)
    return shuffled[n:], shuffled[:n]


def order(n: int, seed: int, epoch: int, rank: int = 0, ranks: int = 1) -> list[int]:
    """Which of n conversations a rank takes in an epoch, in order; what is left over for some ranks, none takes.

    However many ranks there are, they together take the same ones at the same time. To go on in the middle of an
    epoch, leave out the beginning.
    """
    return random.Random(f"{seed} {epoch}").sample(range(n), n)[rank:n // ranks * ranks:ranks]


# ---- batches ----

def open_picture(picture: Picture, image_size: int) -> Tensor:
    """The encoder's input (3, image_size, image_size); raises as open_image does, naming the picture."""
    return pixels(open_image(BytesIO(picture.read_bytes()), name=picture), image_size)


class Features:
    """What the frozen ViT makes of pictures, kept on disk, so that an epoch need not run it.

    One FP16 safetensors file per picture, named by the picture's bytes and the encoder's weights.
    """
    def __init__(self, folder: Path, vit: VisionTransformer):
        digest = hashlib.sha256(f"1 {vit.config}".encode())     # count up when pixels or open_image change
        for name, tensor in vit.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).cpu().numpy())
        self.folder, self.shape = folder / digest.hexdigest()[:16], (vit.config.n_queries, vit.config.output_dim)

    def file(self, picture: Picture) -> Path:
        return self.folder / f"{hashlib.sha256(picture.read_bytes()).hexdigest()}.safetensors"

    def load(self, picture: Picture) -> Tensor:
        """(n_queries, output_dim) in FP16; raises ValueError where there is no file or it holds anything else."""
        if not (file := self.file(picture)).exists():
            raise ValueError(f"no features were kept of {picture}: it could not be read")
        found = read_file(file)
        if set(found) != {"features"} or found["features"].shape != self.shape:
            raise ValueError(f"{file} holds no features {self.shape} of {picture}: delete it")
        return found["features"]

    @torch.no_grad()
    def fill(self, pictures: list[Picture], vit: VisionTransformer, skip_bad: bool = False, n: int = 16):
        """Run the ViT, n pictures at a time, on those that have no file yet; raises as open_picture does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        weight, size = vit.conv1.weight, vit.config.image_size

        def opened(picture: Picture) -> tuple[Path, Tensor] | None:
            try:
                file = self.file(picture)
                return None if file.exists() else (file, open_picture(picture, size))
            except (ValueError, OSError):
                if not skip_bad:                # who skips bad records finds no file for them later, and says so
                    raise
                return None

        with ThreadPoolExecutor(4) as pool:                     # a picture may take half a GB while it is opened
            for i in tqdm(range(0, len(pictures), n), "features", leave=False):
                if new := [found for found in pool.map(opened, pictures[i:i + n]) if found]:
                    features = vit(torch.stack([image for _, image in new]).to(weight)).half().cpu()
                    for (file, _), values in zip(new, features):
                        unfinished = file.with_suffix(f".{os.getpid()}")
                        save_file({"features": values.clone()}, unfinished)
                        os.replace(unfinished, file)


def tensors(encoded: Encoded, image_size: int, features: Features | None = None) -> dict[str, Tensor]:
    """ids, kind, labels (S) and images (N, 3, image_size, image_size), or what `features` keeps of them."""
    images = [features.load(picture) if features else open_picture(picture, image_size)
              for picture in encoded.images]
    empty = torch.empty(0, *(features.shape if features else (3, image_size, image_size)))
    return {**{name: torch.tensor(getattr(encoded, name)) for name in ("ids", "kind", "labels")},
            "images": torch.stack(images) if images else empty}


def collate(rows: list[dict[str, Tensor]]) -> dict:
    """A batch: conversations one after the other, without padding, in ids, kind, labels (1, S); `lengths` tells
    them apart; images (N, 3, h, w) of all in order.
    """
    batch = {name: torch.cat([row[name] for row in rows])[None] for name in ("ids", "kind", "labels")}
    images = torch.cat([row["images"] for row in rows])
    return {**batch, "images": images, "lengths": [len(row["ids"]) for row in rows]}


def pack(rows: list[dict[str, Tensor]], positions: int) -> list[dict]:
    """Batches of at most so many positions: long conversations first, each into the first batch with room for it.

    A conversation that is longer makes a batch of its own.
    """
    batches = []
    for row in sorted(rows, key=lambda row: -len(row["ids"])):
        fitting = (batch for batch in batches if sum(len(other["ids"]) for other in (*batch, row)) <= positions)
        if (batch := next(fitting, None)) is None:
            batches.append(batch := [])
        batch.append(row)
    return [collate(batch) for batch in batches]


class Conversations(Dataset):
    """Conversations as rows for `collate`; encoded, and their pictures opened, when asked for by a worker.

    A conversation that cannot be used raises ValueError that names it; with skip_bad the next one takes its place.
    """

    def __init__(self, conversations: list[Conversation], tokenizer: Tokenizer, vision: VisionConfig,
                 limit: int = MAX_POSITIONS, skip_bad: bool = False, features: Features | None = None):
        self.conversations, self.tokenizer, self.vision, self.limit = conversations, tokenizer, vision, limit
        self.skip_bad, self.features = skip_bad, features
        self.skipped = Array("b", len(conversations), lock=False)           # marks, in the memory of all workers

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)                             # ends `for row in rows`
        for i in (*range(index, len(self)), *range(index)):
            conversation = self.conversations[i]
            try:
                encoded = encode(conversation.rounds, self.tokenizer, self.vision.n_queries, self.limit)
                return tensors(encoded, self.vision.image_size, self.features)
            except (ValueError, OSError) as error:
                message = f"{conversation.name}: {error}"
                if not self.skip_bad:
                    raise ValueError(f"{message}. Mend it, or leave such records out with --skip-bad") from error
                if not self.skipped[i]:
                    print(f"skipped {printable(message)}", file=sys.stderr)
                self.skipped[i] = 1
        raise ValueError("none of the conversations can be used")


# ---- checking a data folder ----

def marked(encoded: Encoded, tokenizer: Tokenizer) -> str:
    """A conversation as the model gets it, images by their files; what is learned stands in [[ ]]."""
    text, images, special = "", iter(encoded.images), {tokenizer.bos: "<s>", tokenizer.eos: "</s>"}
    for (kind, scored), run in groupby(zip(encoded.kind, encoded.labels, encoded.ids),
                                       key=lambda position: (position[0], position[1] != IGNORE)):
        ids = [id for _, _, id in run]
        if kind == IMAGE:
            text += f"<{next(images)}>"                         # text stands between any two
        else:
            said = "".join(special.get(mark, tokenizer.decode(list(part)))
                           for mark, part in groupby(ids, lambda id: id if id in special else None))
            text += f"[[{said}]]" if scored else said
    return text


COLUMNS = ("dataset", "paper", "samples", "left out", "bad", "images each", "longest", "cut")


def printable(text: str) -> str:
    """The text without characters that would command the terminal."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


def say(text: str):
    print(printable(text))


def look(name: str, data: Path, tokenizer: Tokenizer, n_tokens: int, open_images: bool, examples: int) -> dict:
    """A row of the table about one dataset; prints its examples and what is wrong with it."""
    reader = Reader(name, data, skip_bad=True)
    row = dict(dataset=name, paper=SOURCES[name].in_paper, state="missing")
    try:
        conversations = list(SOURCES[name].read(reader))
    except (OSError, ValueError) as error:
        say(f"\n{name}: {error}")
        return row | ({} if isinstance(error, FileNotFoundError) else dict(state="broken"))
    longest = images = most = cut = 0
    opened = set()
    print()
    for i, conversation in enumerate(tqdm(conversations, name, leave=False)):
        pictures = [picture for turn in conversation.rounds for picture in turn.images]
        encoded = encode(conversation.rounds, tokenizer, n_tokens, sys.maxsize)
        longest, images = max(longest, len(encoded.ids)), images + len(pictures)
        most, cut = max(most, len(pictures)), cut + (len(encoded.ids) > MAX_POSITIONS)
        if i < examples:
            tqdm.write(printable(f"{name}, {conversation.name}\n{marked(encoded, tokenizer)}\n"))
        try:
            encode(conversation.rounds, tokenizer, n_tokens)
            for picture in {*pictures} - opened if open_images else ():
                opened.add(picture)
                open_picture(picture, 14)
        except (ValueError, OSError) as error:
            reader.bad.append(f"{conversation.name}: {error}")
    for problem in reader.bad:
        say(f"{name}: bad record: {problem}")
    for reason, count in reader.left_out.items():
        say(f"{name}: {count} records {reason}")
    n = len(conversations)
    left_out = sum(count for reason, count in reader.left_out.items() if reason.startswith("left out"))
    return row | {"samples": n, "left out": left_out, "bad": len(reader.bad),
                  "images each": f"{images / max(n, 1):.1f}, at most {most}", "longest": longest, "cut": cut}


def check():
    """Print examples of each dataset, what is missing or wrong, and a table of all nine."""
    parser = argparse.ArgumentParser(description="Checks a data folder.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("data/tiny"))
    parser.add_argument("--size", default="tiny", choices=list(REPOSITORIES), help="whose tokenizer counts")
    parser.add_argument("--llama", default="", help="folder with tokenizer.model; looked for if not given")
    parser.add_argument("--images", action="store_true", help="open every image, which takes long")
    parser.add_argument("--examples", type=int, default=3, help="how many of each dataset to print")
    options = parser.parse_args()
    if not options.folder.is_dir():
        raise FileNotFoundError(f"no folder {options.folder.absolute()}")
    tokenizer = Tokenizer(options.llama or find(REPOSITORIES[options.size][0]))
    vision = (VisionTransformer.from_pretrained(find(REPOSITORIES["tiny"][1])).config if options.size == "tiny"
              else VisionConfig())                              # the real ViT need not be here yet
    rows = [look(name, options.folder, tokenizer, vision.n_queries, options.images, options.examples)
            for name in SOURCES]
    table = [COLUMNS, *([str(row.get(name, row["state"])) for name in COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print(*map(str.rjust, line, widths), sep="  ")
    print("paper: samples in its Table 1; left out: by the dataset's rules; bad: cannot be used; longest: in "
          f"positions;\ncut: samples longer than {MAX_POSITIONS}, which lose their last rounds")
    if any(row.get("bad") or row["state"] == "broken" for row in rows):
        sys.exit("bad records or files: see above")


def main():
    try:
        check()
    except (OSError, ValueError) as error:
        sys.exit(f"data.py: {error}")


if __name__ == "__main__":
    main()
