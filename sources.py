"""How do the files of the nine datasets (Table 1 of DeepSpeed-VisualChat) become conversations?

    record of a file ─► rounds ─► conversation ─► groups and blends of conversations (section 5.1)
          ├─ left out by the rules of its dataset: counted, with the reason
          └─ bad: an error that names it, or with --skip-bad a note

To add a dataset, write a function that takes a Reader and the dataset's paths and yields conversations, and give
it an entry at the end of SOURCES, and one in WHERE. `python sources.py FOLDER --size 7b` checks a data folder.
Side room of data.py.
"""
import argparse
import base64
import json
import os
import random
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from types import NoneType
from typing import BinaryIO

from tqdm import tqdm

from data import MAX_POSITIONS, Conversation, Encoded, ImageFile, Round, encode
from llama import Tokenizer
from mmca import IMAGE
from pixels import MAX_BYTES, load_pixels
from visualchat import IGNORE, REPOSITORIES
from vit import VisionConfig, VisionTransformer
from weights import find_weights, printable, read_json, replacing

MARK, SPARKLES_MARK = "<image>", "<Img><ImageHere></Img>"       # They stand for an image in a question.
MOST_IMAGES = 8                 # of a conversation in MIMIC-IT or Sparkles; the paper leaves out those with more
OF_PAIRS = ("CGD", "SD")        # parts of MIMIC-IT that ask for differences, so a record needs all its images
ABSENT = "an image is missing, or is a link that leads to nothing"


# ---- what all readers share ----

class LeftOut(Exception):
    """The rules of its dataset leave a record out; the message is the reason."""


@dataclass
class Reader:
    """Reads one dataset of a data folder, and notes what it leaves out."""
    name: str
    data: Path
    seed: int = 0
    skip_bad: bool = False      # A bad record is noted in `bad` and skipped; otherwise it raises ValueError.
    left_out: Counter = field(default_factory=Counter)          # how many records, by the reason
    incomplete: int = 0                                         # records that are kept without an absent image
    bad: list[str] = field(default_factory=list)                # what is wrong with each bad record

    def notes(self) -> list[str]:
        """What was left out, a line for each reason."""
        lines = [f"{self.name}: {n} records left out: {reason}" for reason, n in self.left_out.items()]
        kept = f"{self.name}: {self.incomplete} records kept without images that are missing"
        return lines + [kept] * (self.incomplete > 0)

    def each(self, file: Path, records: Iterable[tuple[str, object]], parse: Callable) -> Iterator[Conversation]:
        """The rounds that `parse` makes of each (key, record), as a conversation that is named by file and key."""
        for key, record in records:
            name = f"{file}, record {printable(str(key))[:80]}"
            try:
                conversation = Conversation(name, parse(record))
            except LeftOut as reason:
                self.left_out[str(reason)] += 1
            except ValueError as error:
                message = printable(f"{name}: {str(error)[:500]}")
                if not self.skip_bad:
                    raise ValueError(f"{message}. Correct it, or leave it out with --skip-bad") from error
                self.bad.append(message)
            else:
                yield conversation


JSON_TYPES = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number",
              bool: "true or false", NoneType: "null or absent"}
MEDIUM = re.compile("(image|img|picture|photo|video|vid|clip|frame|audio|sound|speech|voice|music|point_?cloud|"
                    "pdf|media)s?(_?(id|name|file|path|url)s?)?", re.IGNORECASE)


def take(record: object, name: str, *expected: type):
    """record[name], or None if that is expected and there is none; raises ValueError for any other type."""
    if not isinstance(record, dict):
        raise ValueError(f"found {JSON_TYPES[type(record)]}, expected an object with the field `{name}`")
    if type(found := record.get(name)) not in expected:
        raise ValueError(f"the field `{name}` is {JSON_TYPES[type(found)]}, expected "
                         f"{' or '.join(JSON_TYPES[each] for each in expected)}")
    return found


def take_texts(record: dict, name: str) -> list[str]:
    """record[name], a list of texts; raises ValueError for anything else."""
    items = {f"{name}[{i}]": item for i, item in enumerate(take(record, name, list))}
    return [take(items, key, str) for key in items]


def refuse_media(record: dict, images: str = ""):
    """Raises ValueError for a field with videos, sounds or images, but for `images` and what describes these."""
    for name, found in record.items():
        describes = record.get(images) and name.startswith(f"{images}_")        # such as image_id beside image
        if found and MEDIUM.fullmatch(name) and name != images and not describes:
            raise ValueError(f"the field `{name}` cannot be read: expected texts"
                             + (f", and images in the field `{images}`" if images else " only"))


def exchanges(record: dict, name: str, speaker: str, pair: list[str], images: str = "") -> list[tuple]:
    """The messages in record[name] as pairs of question and answer; `images` is a message's field of images.

    Raises ValueError unless the field `speaker` of the messages says the two names of `pair` in turn.
    """
    messages = take(record, name, list)
    speakers = [take(message, speaker, str) for message in messages]
    if not messages or speakers != pair * (len(messages) // 2):
        raise ValueError(f"the field `{speaker}` must alternate {', '.join(pair)}; found "
                         f"{', '.join(speakers) or 'none'}")
    for message in messages:
        refuse_media(message, images)
    return list(zip(messages[::2], messages[1::2]))


COUNTED: set[Path] = set()      # files that count as being there, although somebody may have lost them


@cache
def file_names(folder: Path) -> frozenset[str]:
    """Names of the files in a folder and of links to files, read once: to ask for each record would take long."""
    return frozenset(entry.name for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)
                     or entry.is_symlink() and os.path.isfile(entry.path)) | {
                         path.name for path in COUNTED if path.parent == folder}


def count_as_there(files: Iterable[Path]):
    """Let a run go on with the conversations that it began with; what is lost is noticed when it is opened."""
    COUNTED.update(files)
    file_names.cache_clear()


def inside(folder: Path, name: str) -> Path:
    """The file folder/name, which may be a link; raises ValueError for a name that leads out, or to nothing."""
    if name not in file_names(folder):
        if Path(name).anchor or ".." in Path(name).parts:
            raise ValueError(f"image {name!r} lies outside {folder}: a name must not begin with / or hold ..")
        if not os.path.isfile(folder / name):
            link = ", only a link that leads to nothing" if os.path.islink(folder / name) else ""
            raise ValueError(f"no image {name!r} in {folder}{link}")
    return folder / name


def tidy_round(images: Iterable[ImageFile], question: str, answer: str) -> Round:
    """A round without needless blanks; raises ValueError where a text is empty or no valid Unicode."""
    question, answer = " ".join(question.split()), answer.strip()
    if re.search("[\ud800-\udfff]", question + answer):
        raise ValueError(f"a question or answer holds half a character: {question[:60]!r}, {answer[:60]!r}")
    if not question or not answer:
        raise ValueError(f"an empty question or answer: {question[:60]!r}, {answer[:60]!r}")
    for mark in re.findall(r"^<(\w+)>|<(\w+)>$", question) + re.findall(r"^<(\w+)>|<(\w+)>$", answer):
        if MEDIUM.fullmatch("".join(mark)):
            raise ValueError(f"the mark <{''.join(mark)}> cannot be shown: {question[:60]!r}, {answer[:60]!r}")
    return Round(tuple(images), question, answer)


def show_first(images: Iterable[ImageFile], rounds: Iterable[Round]) -> list[Round]:
    """These rounds, with these images in the first of them and none in the others."""
    return [replace(round_, images=tuple(images) if i == 0 else ()) for i, round_ in enumerate(rounds)]


# ---- LLaVA-Instruct ----

def llava_rounds(record: dict, images: Path) -> list[Round]:
    """A LLaVA record as rounds. Each <image> mark shows the record's next image; a question loses its marks.

    `image` is one name or, as many projects extend the format, a list of names, or null. Raises ValueError.
    """
    messages = exchanges(record, "conversations", "from", ["human", "gpt"])
    refuse_media(record, "image")
    name = take(record, "image", str, list, NoneType)
    names = take_texts(record, "image") if isinstance(name, list) else [] if name is None else [name]
    texts = [(take(human, "value", str), take(gpt, "value", str)) for human, gpt in messages]
    marks = [question.count(MARK) for question, _ in texts]
    if sum(marks) != len(names):
        raise ValueError(f"{len(names)} images, but {sum(marks)} {MARK} marks")
    files = iter([inside(images, name) for name in names])
    return [tidy_round((next(files) for _ in range(n)), question.replace(MARK, " "), answer)
            for n, (question, answer) in zip(marks, texts)]


def llava(reader: Reader, files: list[Path], images: Path) -> Iterator[Conversation]:
    """A conversation for each record of LLaVA's files."""
    for file in files:
        records = ((f"{record['id']} (index {i})" if isinstance(record, dict) and "id" in record else i, record)
                   for i, record in enumerate(read_json(file, list)))      # an id can recur
        yield from reader.each(file, records, lambda record: llava_rounds(record, images))


def concatenated(reader: Reader, *paths: Path, most: int) -> Iterator[Conversation]:
    """LLaVA's conversations in random groups of 1 to `most`, each group one conversation (section 5.1.1).

    Every record is used exactly once. A record that shows several images stays alone.
    """
    *files, images = paths
    rng, single = random.Random(f"{reader.seed} {reader.name}"), []
    for conversation in llava(reader, files, images):
        if sum(len(round_.images) for round_ in conversation.rounds) > 1:
            yield conversation
        else:
            single.append(conversation)
    rng.shuffle(single)
    while single:
        n = rng.randint(1, most)
        group, single[-n:] = single[-n:], []
        yield Conversation(" + ".join(part.name for part in group), sum((part.rounds for part in group), []))


# ---- images that lie as base64 text in a JSON file, which may be larger than memory ----

HEAD_SIZE, READ_SIZE = 1 << 15, 1 << 16      # bytes that are read at once: to find a key, the end of a text
ENTRY = re.compile(rb'\s*(?P<opening>[{,])\s*"(?P<key>([^"]*[^"\\])?)"\s*:\s*"')      # what stands before a text


@dataclass(frozen=True)
class EncodedImage:
    """An image in a JSON file: its key there, and the first byte and the length of its base64 text."""
    file: Path
    key: str
    start: int
    length: int

    def read_bytes(self) -> bytes:
        if self.length > MAX_BYTES * 4 // 3:
            raise ValueError(f"{self} takes {self.length:,} bytes, expected an image of at most {MAX_BYTES:,}")
        with open(self.file, "rb") as file:
            file.seek(self.start)
            text = file.read(self.length)
        try:
            return base64.b64decode(json.loads(b'"%b"' % text), validate=True)     # JSON may write / as \/
        except ValueError as error:
            raise ValueError(f"{self} is no base64 text: {error}") from error

    def __str__(self) -> str:
        return f"{self.file}, {self.key}"


def find_quote(stream: BinaryIO, start: int) -> int:
    """Where the first quote from byte `start` on is; -1 where there is none."""
    stream.seek(start)
    while chunk := stream.read(READ_SIZE):
        if b'"' in chunk:
            return stream.tell() - len(chunk) + chunk.index(b'"')
    return -1


def scan(file: Path) -> Iterator[tuple[str, int, int]]:
    """(key, first byte, length) of every text in a JSON object of texts: {"key": "text", "key": "text"}.

    Raises ValueError for other JSON, and for an escaped quote, since neither keys nor base64 have quotes in them.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream, tqdm(total=size, desc=f"scanning {file.name}", unit="B", unit_scale=True,
                                          leave=False) as bar:
        def read(start: int, length: int) -> bytes:
            stream.seek(start)
            return stream.read(length)

        done, opening, closing = 0, b"{", b"{}"
        while (entry := ENTRY.match(read(done, HEAD_SIZE))) and entry["opening"] == opening:
            start = done + entry.end()
            end = find_quote(stream, start)
            if end < 0 or read(end - 1, 1) == b"\\":            # The text does not end, or has a quote in it.
                break
            try:
                key = json.loads(b'"%b"' % entry["key"])
            except ValueError as error:
                raise ValueError(f"{file}: the key at byte {done} is no JSON text: {error}") from error
            yield key, start, end - start
            done, opening, closing = end + 1, b",", b"}"
            bar.update(done - bar.n)
        rest = read(done, HEAD_SIZE)
        if done + len(rest) < size or b"".join(rest.split()) != closing:
            raise ValueError(f"{file} is no JSON object of base64 texts, or was cut off: unexpected "
                             f"{rest[:60]!r} at byte {done}")


def parquet_files(file: Path) -> list[Path]:
    """What newer releases hold in place of a JSON file: for SD.json, SD.parquet or the parts in SD_Images."""
    return sorted(found for pattern in (".parquet", "/*.parquet", "_[Ii]mages/*.parquet")
                  for found in file.parent.glob(file.stem + pattern))


def parquet_texts(file: Path) -> Iterator[tuple[str, str]]:
    """(key, base64 text) of the images in a parquet file, of which few are in memory at a time.

    One column holds the keys. The other is `base64`, texts, as Otter writes it, or `image`, bytes with their path,
    as on the hub. Raises ValueError for any other file, and where pyarrow is not installed.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"{file} can be read with pyarrow only: pip install pyarrow") from error
    try:
        # So pyarrow reads the file bit by bit. By itself it reads a whole row group, which is often all of it.
        with parquet.ParquetFile(file, buffer_size=READ_SIZE, pre_buffer=False) as opened:
            names = sorted(opened.schema_arrow.names, key=("base64", "image").__contains__)     # keys, images
            if len(names) != 2 or names[1] not in ("base64", "image"):
                raise ValueError(f"found the columns {', '.join(names)}, expected keys, and `base64` or `image`")
            for batch in opened.iter_batches(16, columns=names):
                for key, image in (row.values() for row in batch.select(names).to_pylist()):
                    if isinstance(image, dict):
                        image = image.get("bytes")
                    if isinstance(image, bytes):
                        image = base64.b64encode(image).decode()
                    if not isinstance(key, str) or not isinstance(image, str | None):
                        raise ValueError(f"found {key!r:.60} with {image!r:.60}, expected a text and an image")
                    if image:
                        yield key, image
    except (ArrowException, OSError, ValueError, KeyError, OverflowError) as error:
        raise ValueError(f"{file} is no parquet file of images: {error}") from error


def json_from_parquet(file: Path):
    """Write the JSON file for which there are only parquet files; raises as `parquet_texts` does, and OSError."""
    with replacing(file) as new, open(new, "w", encoding="utf-8") as out:
        before = "{"
        for found in parquet_files(file):
            for key, text in tqdm(parquet_texts(found), f"{found.name} to {file.name}", leave=False):
                out.write(f"{before}{json.dumps(key)}: {json.dumps(text)}")
                before = ",\n"
        out.write("}" if before != "{" else "{}")


def checksum(texts: dict) -> int:
    return zlib.crc32(json.dumps(texts).encode())


def encoded_images(file: Path) -> dict[str, EncodedImage]:
    """The images in a JSON object of base64 texts, by key; none of them is read.

    The file is scanned once; `<file>.index` beside it then says where each text lies. If there is no such file, it
    is made of parquet files.
    """
    if not file.exists():
        json_from_parquet(file)
    index, state = file.with_name(f"{file.name}.index"), [file.stat().st_size, file.stat().st_mtime_ns]
    try:
        found = read_json(index)
        if found["state"] == state and found["checksum"] == checksum(found["texts"]) and all(
                type(start) is type(length) is int and 0 <= start <= start + length <= state[0]
                for start, length in found["texts"].values()):
            return {key: EncodedImage(file, key, *place) for key, place in found["texts"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass                                                    # There is none yet, or it is damaged.
    places = {key: (start, length) for key, start, length in scan(file)}
    try:
        with replacing(index) as new:
            new.write_text(json.dumps({"state": state, "texts": places, "checksum": checksum(places)}))
    except OSError as error:                                    # A data folder may be read-only.
        print(f"{index} could not be written, so every start scans {file.name}: {error}", file=sys.stderr)
    return {key: EncodedImage(file, key, *place) for key, place in places.items()}


# ---- MIMIC-IT, and its blend with LLaVA ----

def related(single: dict[str, Conversation], records: dict[str, dict]) -> Iterable[list[Conversation]]:
    """Groups of instructions about the same images, in the file's order.

    Two are in the same group where either names the other in `rel_ins_ids`, or where a third one links them.
    """
    group = {key: {key} for key in single}
    for key, conversation in single.items():
        for other in records[key]["rel_ins_ids"]:
            if other in group and single[other].rounds[0].images == conversation.rounds[0].images:
                small, large = sorted((group[key], group[other]), key=len)
                large |= small
                group |= dict.fromkeys(small, large)
    found = {}
    for key, conversation in single.items():
        found.setdefault(id(group[key]), []).append(conversation)
    return found.values()


def mimicit(reader: Reader, instructions: Path, source: Path) -> Iterator[Conversation]:
    """Conversations of a part of MIMIC-IT: related instructions about the same images.

    source: COCO's folder for the part CGD, for the other parts a JSON file of base64 texts.
    """
    records = read_json(instructions).get("data")
    if not isinstance(records, dict):
        raise ValueError(f"{instructions} holds no instructions under `data`")
    images = ({f"CGD_IMG_{name[:-4]}": source / name for name in file_names(source) if name.endswith(".jpg")}
              if source.is_dir() else encoded_images(source))

    def parse(record: dict) -> list[Round]:
        """An instruction as one round; raises ValueError, and LeftOut where images that it needs are missing."""
        question, answer = take(record, "instruction", str), take(record, "answer", str)
        names, _ = take_texts(record, "image_ids"), take_texts(record, "rel_ins_ids")
        refuse_media(record, "image_ids")
        if not names:
            raise LeftOut("no image is named")
        found = [images[name] for name in names if name in images]
        if not found or len(found) < len(names) and instructions.name.startswith(OF_PAIRS):
            raise LeftOut(ABSENT)
        if len(found) > MOST_IMAGES:
            raise LeftOut(f"more than {MOST_IMAGES} images")
        reader.incomplete += len(found) < len(names)
        return [tidy_round(found, question.replace(MARK, " "), answer)]

    single = {key: conversation for key, record in records.items()
              for conversation in reader.each(instructions, [(key, record)], parse)}
    for first, *others in related(single, records):
        rounds = [conversation.rounds[0] for conversation in (first, *others)]
        yield Conversation(first.name, show_first(rounds[0].images, rounds))


def blend(reader: Reader, instructions: Path, images: Path, *files: Path) -> Iterator[Conversation]:
    """LLaVA's rounds about each image of a CGD conversation, then CGD's rounds about all (section 5.1.2).

    For each image in order come some of LLaVA's conversations about it: at least one, but perhaps none for the
    last image. Then come some of CGD's rounds, at least one. An image is shown in the first round about it.
    """
    rng, about = random.Random(f"{reader.seed} {reader.name}"), {}      # about[image]: conversations, as rounds
    for conversation in llava(reader, list(files), images):
        first, *others = conversation.rounds
        if len(first.images) == 1 and not any(round_.images for round_ in others):
            about.setdefault(first.images[0], []).append(conversation.rounds)
    for conversation in mimicit(reader, instructions, images):
        wanted = conversation.rounds[0].images
        if not all(image in about for image in wanted[:-1]):
            reader.left_out["an image that LLaVA does not talk about"] += 1
            continue
        rounds, not_shown = [], []
        for number, image in enumerate(wanted, 1):
            found = about.get(image, [])
            chosen = rng.sample(found, rng.randint(int(number < len(wanted)), len(found)))
            not_shown += [] if chosen else [image]
            rounds += show_first([image], sum(chosen, []))
        n = len(conversation.rounds)
        about_all = [conversation.rounds[i] for i in sorted(rng.sample(range(n), rng.randint(1, n)))]
        yield Conversation(conversation.name, rounds + show_first(not_shown, about_all))


# ---- Sparkles ----

# Sparkles' texts call an image IMAGE#<its id>. In each conversation, the names in one of these lists replace that.
TAGS = [[f"image {n}" for n in range(1, 9)],
        [f"image {letter}" for letter in "abcdefgh"], [f"image {letter}" for letter in "ABCDEFGH"],
        [f"the {n} image" for n in "first second third fourth fifth sixth seventh eighth".split()]]


LITERAL_BREAK = re.compile(r"(?<!\\)(\\r)?\\n")      # some line breaks in Sparkles are a backslash and an n


def sparkles_rounds(record: dict, images: Path, tags: list[str]) -> list[Round]:
    """A SparklesDialogue record as rounds that call the images by `tags`; raises ValueError and LeftOut.

    An image that is shown again keeps the name of its first showing, as in the release.
    """
    messages = exchanges(record, "dialogue", "role", ["user", "assistant"], "images")
    refuse_media(record)
    shown = [[str(take(image, "image_id", int, str)) for image in take(user, "images", list, NoneType) or []]
             for user, _ in messages]
    if len(sum(shown, [])) > MOST_IMAGES:
        raise LeftOut(f"more than {MOST_IMAGES} images")
    if not file_names(images).issuperset(f"{id}.jpg" for id in sum(shown, [])):
        raise LeftOut(ABSENT)
    tag_of, unused = {}, iter(tags)

    def tag(found: re.Match) -> str:
        """The name of an image, with a capital where a sentence begins."""
        if found[1] not in tag_of:
            raise LeftOut("the text names an image that is not shown before it")
        name, before = tag_of[found[1]], found.string[:found.start()].rstrip()
        return name if before and before[-1] not in ".?!" else name[0].upper() + name[1:]

    rounds = []
    for ids, pair in zip(shown, messages):
        for id, name in zip(ids, unused):
            tag_of.setdefault(id, name)
        texts = (LITERAL_BREAK.sub("\n", take(message, "content", str).replace(SPARKLES_MARK, ""))
                 for message in pair)
        rounds.append(tidy_round((images / f"{id}.jpg" for id in ids),
                                 *(re.sub(r"IMAGE#(\d+)", tag, text) for text in texts)))
    return rounds


def sparkles(reader: Reader, *paths: Path) -> Iterator[Conversation]:
    """Both parts of SparklesDialogue; each has a file and a folder of images."""
    rng = random.Random(f"{reader.seed} {reader.name}")
    for file, images in zip(paths[::2], paths[1::2]):
        yield from reader.each(file, enumerate(read_json(file, list)),
                               lambda record: sparkles_rounds(record, images, rng.choice(TAGS)))


# ---- all of them ----

COCO, CGD = "coco/train2017", "MIMIC-IT/CGD_instructions.json"
DETAIL, DIALOGUE = ("llava/detail_23k.json", "llava/complex_reasoning_77k.json"), "llava/conversation_58k.json"
SPARKLES = "SparklesDialogueCC and SparklesDialogueVG by way of github.com/HYPJUDY/Sparkles"
WHERE = {"coco": "the images of COCO's train2017 from cocodataset.org",
         "llava": "LLaVA-Instruct-150K from the Hugging Face hub: hf download liuhaotian/LLaVA-Instruct-150K "
                  "detail_23k.json complex_reasoning_77k.json conversation_58k.json --repo-type dataset "
                  "--local-dir {data}/llava",
         "MIMIC-IT": "MIMIC-IT from the Hugging Face hub, pufanyi/MIMICIT, where its terms must be accepted first",
         "SparklesDialogueCC": SPARKLES, "SparklesDialogueVG": SPARKLES}


def where_to_get(name: str, data: Path) -> str:
    """Where a file or folder of the data comes from, in words; its own name where nobody said it in WHERE."""
    return WHERE.get(name.split("/")[0], name).format(data=data)


@dataclass(frozen=True)
class Source:
    """A dataset: what converts it, how many samples the paper counts (Table 1), its files and folders."""
    convert: Callable[..., Iterator[Conversation]]              # takes a Reader and the paths of `files`
    in_paper: int                                               # for one that the paper lacks: its own count
    files: tuple[str, ...]
    most_images: int = MOST_IMAGES                              # of a conversation, in the official files

    def read(self, reader: Reader) -> Iterator[Conversation]:
        """Its conversations; raises FileNotFoundError that says where to get missing files."""
        if missing := [name for name in self.files
                       if not (reader.data / name).exists() and not parquet_files(reader.data / name)]:
            where = "; ".join(dict.fromkeys(where_to_get(name, reader.data) for name in missing))
            raise FileNotFoundError(f"no {', '.join(missing)} in {reader.data.absolute()}. Get {where}")
        return self.convert(reader, *(reader.data / name for name in self.files))


SOURCES = {
    "llava": Source(partial(concatenated, most=3), 49924, (*DETAIL, COCO), most_images=3),
    "llava_dial": Source(partial(concatenated, most=2), 37818, (DIALOGUE, COCO), most_images=2),
    "otter_mimicit_cgd": Source(mimicit, 70940, (CGD, COCO)),
    **{f"otter_mimicit_{name.lower()}": Source(mimicit, count, (f"MIMIC-IT/{name}_instructions.json",
                                                               f"MIMIC-IT/{name}.json"))
       for name, count in (("SD", 8006), ("SN", 487), ("TVC", 2), ("VST", 115))},
    "llava_otter_blend": Source(blend, 48869, (CGD, COCO, *DETAIL, DIALOGUE)),
    "sparkles_dialogue": Source(sparkles, 6520, tuple(
        f"{name}/{part}" for name in ("SparklesDialogueCC", "SparklesDialogueVG")
        for part in (f"annotations/{name}.json", "images"))),
}
PAPER = tuple(SOURCES)[:9]      # a tenth dataset stands behind them in SOURCES and joins no mixture of the paper
# `attention` and `single` are the same datasets, which the paper uses twice.
MIXTURES = {"attention": PAPER[:2], "single": PAPER[:2], "set1": PAPER[:8], "set2": PAPER}


def dataset_names(given: Iterable[str]) -> list[str]:
    """The datasets behind names of datasets and mixtures, each once; raises ValueError for an unknown name."""
    names = [name for each in given for name in MIXTURES.get(each, [each])]
    if unknown := [name for name in names if name not in SOURCES]:
        raise ValueError(f"no dataset {unknown[0]!r}; there are {', '.join(SOURCES)}, and the mixtures "
                         f"{', '.join(MIXTURES)}")
    return list(dict.fromkeys(names))


def read_datasets(data: Path, names: Iterable[str], seed: int = 0, skip_bad: bool = False,
                  tell: Callable[[str], None] = print) -> list[Conversation]:
    """All conversations of the named datasets or mixtures, the same for the same seed; tells what was left out.

    Raises ValueError for an unknown name and for a bad record, FileNotFoundError for missing files.
    """
    conversations = []
    for name in dataset_names(names):
        reader = Reader(name, data, seed, skip_bad)
        conversations += SOURCES[name].read(reader)
        for note in reader.notes():
            tell(note)
        if reader.bad:
            tell(f"{name}: {len(reader.bad)} bad records skipped, the first is {reader.bad[0]}")
    return conversations


def n_sharing(conversations: list[Conversation], others: list[Conversation]) -> int:
    """How many of the conversations show an image that one of the others shows, too.

    `data.split` draws conversations, as the paper does, and datasets share images. So what a model learned about
    an image in training can help it in validation; train.py says how often.
    """
    shown = [{image for round_ in each.rounds for image in round_.images} for each in conversations]
    elsewhere = {image for each in others for round_ in each.rounds for image in round_.images}
    return sum(not elsewhere.isdisjoint(images) for images in shown)


# ---- checking a data folder ----

def marked(encoded: Encoded, tokenizer: Tokenizer) -> str:
    """A conversation as text for readers: images by their files, what is learned in [[ ]]."""
    text, images = "", iter(encoded.images)
    for (kind, is_answer), run in groupby(zip(encoded.ids, encoded.kind, encoded.labels),
                                          key=lambda position: (position[1], position[2] != IGNORE)):
        ids = [position[0] for position in run]
        words = "<s>" * ids.count(tokenizer.bos) + tokenizer.decode(ids) + "</s>" * ids.count(tokenizer.eos)
        text += f"<{next(images)}>" if kind == IMAGE else f"[[{words}]]" if is_answer else words
    return text


def check_dataset(reader: Reader, tokenizer: Tokenizer, n_tokens: int, n_examples: int, open_images: bool) -> list:
    """A row of the table about one dataset; prints its examples and notes in `reader` what is wrong with it."""
    name, in_paper, lengths, n_images, opened = reader.name, SOURCES[reader.name].in_paper, [], [], set()
    print()
    try:
        conversations = list(SOURCES[name].read(reader))
    except (OSError, ValueError) as error:
        print(printable(f"{name}: {error}"))
        missing = isinstance(error, FileNotFoundError)
        reader.bad += [] if missing else [str(error)]
        return [name, in_paper, *["missing" if missing else "broken"] * 6]
    for i, conversation in enumerate(tqdm(conversations, name, leave=False)):
        encoded = encode(conversation.rounds, tokenizer, n_tokens, sys.maxsize)
        lengths.append(len(encoded.ids))
        n_images.append(len(encoded.images))
        if i < n_examples:
            tqdm.write(printable(f"{name}, {conversation.name}\n{marked(encoded, tokenizer)}\n"))
        try:
            encode(conversation.rounds, tokenizer, n_tokens)
            for image in {*encoded.images} - opened if open_images else ():
                opened.add(image)
                load_pixels(image, 14)
        except (ValueError, OSError) as error:
            reader.bad.append(f"{conversation.name}: {error}")
    for line in (*(f"{name}: bad record: {problem}" for problem in reader.bad), *reader.notes()):
        print(printable(line))
    each = f"{sum(n_images) / max(len(n_images), 1):.1f}, at most {max(n_images, default=0)}"
    return [name, in_paper, len(conversations), reader.left_out.total(), len(reader.bad), each,
            max(lengths, default=0), sum(length > MAX_POSITIONS for length in lengths)]


LEGEND = f"""paper: samples in its Table 1; left out: by the dataset's rules; bad: cannot be used; longest: in
positions; cut: samples longer than {MAX_POSITIONS}, which lose their last rounds.
The paper has few samples of otter_mimicit_sn and otter_mimicit_tvc, because most of their instructions name
images by other keys than the image files do. Of otter_mimicit_cgd and _sd, which compare, a sample needs all
its images; in the other parts images that are missing are dropped, as in the release.
MIMIC-IT (otter_mimicit_*, llava_otter_blend) is gated: accept its terms on its page of the Hugging Face hub,
pufanyi/MIMICIT, then `hf auth login`. The files of LLaVA and COCO are open to all."""


def main():
    """Print examples of each dataset, what is missing or wrong, and a table of all nine."""
    parser = argparse.ArgumentParser(description="Checks a data folder.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("data/tiny"))
    parser.add_argument("--size", default="tiny", choices=list(REPOSITORIES), help="whose tokenizer counts")
    parser.add_argument("--llama", default="", help="folder with tokenizer.model; looked for if not given")
    parser.add_argument("--images", action="store_true", help="open every image, which takes long")
    parser.add_argument("--examples", type=int, default=3, help="how many of each dataset to print")
    options = parser.parse_args()
    try:
        if not options.folder.is_dir():
            raise FileNotFoundError(f"no folder {options.folder.absolute()}")
        tokenizer = Tokenizer(options.llama or find_weights(REPOSITORIES[options.size][0]))
        vision = (VisionTransformer.from_pretrained(find_weights(REPOSITORIES["tiny"][1])).config
                  if options.size == "tiny" else VisionConfig())        # The real ViT need not be here yet.
        readers = [Reader(name, options.folder, skip_bad=True) for name in SOURCES]
        table = [("dataset", "paper", "samples", "left out", "bad", "images each", "longest", "cut"),
                 *(check_dataset(reader, tokenizer, vision.n_queries, options.examples, options.images)
                   for reader in readers)]
    except (OSError, ValueError) as error:
        sys.exit(printable(f"sources.py: {error}"))
    widths = [max(len(str(cell)) for cell in column) for column in zip(*table)]
    for row in table:
        print(*(str(cell).rjust(width) for cell, width in zip(row, widths)), sep="  ")
    print(LEGEND)
    if any(reader.bad for reader in readers):
        sys.exit("bad records or files: see above")


if __name__ == "__main__":
    main()
