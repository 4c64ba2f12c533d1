"""Hostile inputs by the thousand: each must be read right, or be refused with a clear error.

    python tests/fuzz.py --minutes 20 --seed 0

Weights, configurations, images, annotations and what people type come from strangers. For each kind of input a
function here draws one from random numbers, writes it to a folder, reads it as the program does, and checks what
was read as far as it can be known. It may raise Refused alone: that stands for a ValueError or OSError that names
the file, or the folder of a model. Anything else is a fault, and printed with the seed that draws it again.
tests/test_fuzz.py draws a few of each kind.
"""
import argparse
import base64
import builtins
import contextlib
import copy
import io
import json
import multiprocessing
import random
import re
import resource
import struct
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from functools import cache
from itertools import count
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))                       # for `python tests/fuzz.py`

from chat import Chat                               # noqa: E402
from data import Conversation, encode               # noqa: E402
from llama import Cache, Llama, LlamaConfig, Tokenizer      # noqa: E402
from pixels import load_pixels, to_pixels           # noqa: E402
from sources import Reader, encoded_images, file_names, llava, marked, mimicit, sparkles    # noqa: E402
from terminal import Terminal, converse             # noqa: E402
from visualchat import load, towers                 # noqa: E402
from vit import IN_CONFIG, PREFIX, VisionConfig, VisionTransformer          # noqa: E402

WEIGHTS = ROOT / "weights/tiny"
LLAMA = LlamaConfig(16, 24, 2, 4, 2, vocab_size=20)
VIT = VisionConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2, mlp_width=32, output_dim=128,
                   n_queries=4, grid=2)
GOOD = "This one is good."                          # the text of a record that nothing was done to


class Refused(Exception):
    """A clear error: one that names the file or its folder."""


def attempt(file: Path, read: Callable):
    """What `read` returns; raises Refused where it raises a ValueError or OSError that names the file."""
    try:
        return read()
    except (ValueError, OSError) as error:
        assert file.name in str(error) and len(str(error)) < 3000, f"no clear error: {error!r:.500}"
        raise Refused from error


# ---- damage ----

def damaged(content: bytes, rng: random.Random) -> bytes:
    """Bytes with one to four changes: bits, cuts, copies, insertions."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, n = rng.randint(0, max(len(content) - 1, 0)), rng.choice([1, 1, 2, 4, 8, 100])
        change = rng.randrange(6)
        if change == 0:
            content[at:at + 1] = bytes(byte ^ 1 << rng.randrange(8) for byte in content[at:at + 1])
        elif change == 1:
            content[at:at + n] = bytes(rng.randrange(256) for _ in content[at:at + n])
        elif change == 2:
            content[at:at + n] = rng.choice([b"", b"\0" * n, b"\xff" * n])
        elif change == 3:
            content[at:at] = content[rng.randint(0, at):][:n]
        elif change == 4:
            content[at:at] = rng.choice([b"\\", b'"', b"{", b"\n", b"\x1b[2J", b"\0", b"9" * 20, b"e400", b"-"])
        else:
            del content[at:]
    return bytes(content)


ODD = [None, True, False, -1, 0, 1, 2, 3, 7, 64, 2 ** 31, 2 ** 63, 10 ** 30, 1.5, 1e30, float("inf"), float("nan"),
       [], {}, [[]], ["a"], [None], {"a": 1}, "", " ", "a", "x" * 5000, "human", "gpt", "user", "7.jpg", "<image>",
       "IMAGE#9", "\\n", "\x1b[31m", "\ud800", "\u202e", "a\0b", "../../secret.jpg", "/etc/passwd"]


def places(value, path=()):
    """The paths of all values inside a JSON value."""
    inside = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else {}
    for key, inner in inside.items():
        yield (*path, key)
        yield from places(inner, (*path, key))


def altered(value, rng: random.Random):
    """A JSON value with up to three changes: odd values, absent and double entries, other names."""
    value = json.loads(json.dumps(value))                       # no two parts of it are the same object
    for _ in range(rng.randint(1, 3)):
        if not (found := list(places(value))):
            return copy.deepcopy(rng.choice(ODD))
        *path, last = rng.choice(found)
        inside = value
        for key in path:
            inside = inside[key]
        change = rng.randrange(6)
        if change < 3:
            inside[last] = copy.deepcopy(rng.choice(ODD))
        elif change == 3:
            del inside[last]
        elif change == 4 and isinstance(inside, list):
            inside.insert(rng.randint(0, len(inside)), copy.deepcopy(inside[last]))
        elif isinstance(inside, dict):
            other = rng.choice([*inside, "video", "images", "image", "extra", last.upper(), ""])
            inside[last], inside[other] = inside.get(other), inside[last]
    return value


def write_damaged_json(file: Path, value, rng: random.Random):
    """The value as JSON; now and then the text is damaged, too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(value, indent=rng.choice([None, 1])).encode()
    file.write_bytes(damaged(content, rng) if rng.random() < .15 else content)


# ---- images ----

MODES = {"PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"], "JPEG": ["L", "RGB", "CMYK"], "GIF": ["L", "P"],
         "BMP": ["1", "L", "P", "RGB"], "TIFF": ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"],
         "WEBP": ["RGB", "RGBA"], "PPM": ["1", "L", "RGB", "I"]}


def image_bytes(rng: random.Random, format: str, mode: str, exif: bool = False, side: int = 24) -> bytes:
    """A random image as a file; exif: with an orientation, which may be damaged."""
    shape, random_ = (rng.randint(1, side), rng.randint(1, side)), np.random.default_rng(rng.randrange(2 ** 32))
    if mode in ("I;16", "I", "F"):
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        values = (random_.random(shape) * rng.choice([1, 255, 65535])).astype(kind)
        if mode == "F" and rng.random() < .3:
            values.flat[0] = rng.choice([np.nan, np.inf, -np.inf])
        image = Image.fromarray(values)
    else:
        image = Image.fromarray(random_.integers(0, 256, (*shape, 3), dtype=np.uint8)).convert(mode)
    file, more = io.BytesIO(), {}
    if exif:
        tags = Image.Exif()
        tags[0x0112] = rng.choice([1, 3, 6, 8, 0, 99])
        more["exif"] = tags.tobytes() if rng.random() < .5 else b"Exif\0\0" + damaged(tags.tobytes(), rng)
    image.save(file, format, **more)
    return file.getvalue()


def announcing(rng: random.Random) -> bytes:
    """A small PNG file that announces any number of pixels."""
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    header = struct.pack(">IIBBBBB", 2 ** rng.randint(0, 31), 2 ** rng.randint(0, 31), rng.choice([1, 8, 16]),
                         rng.choice([0, 2, 3, 4, 6]), 0, 0, rng.randint(0, 1))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(
        b"IEND", b"")


def images(rng: random.Random, folder: Path):
    """Image files: every format and mode, whole, damaged, or announcing much."""
    format = rng.choice(list(MODES))
    mode, file = rng.choice(MODES[format]), folder / f"photo{rng.choice(['.png', '.jpg', '.webp', '', '.txt'])}"
    exif = format in ("JPEG", "PNG", "WEBP") and rng.random() < .3
    whole = image_bytes(rng, format, mode, exif)
    content = whole if rng.random() < .2 else announcing(rng) if rng.random() < .1 else damaged(whole, rng)
    file.write_bytes(content)
    pixels = attempt(file, lambda: load_pixels(file, 16))
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.uint8
    if content == whole and mode in ("1", "L", "RGB", "CMYK") and not exif:
        assert torch.equal(pixels, to_pixels(Image.open(file).convert("RGB"), 16)), "not what the file shows"


# ---- annotations ----

@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(WEIGHTS / "llama")


@cache
def small_jpeg() -> bytes:
    return image_bytes(random.Random(0), "JPEG", "RGB", side=8)


def with_images(folder: Path, *names: str) -> Path:
    """A folder of small images of these names."""
    shown = folder / "shown"
    shown.mkdir()
    for name in names:
        (shown / name).write_bytes(small_jpeg())
    return shown


def strings(value) -> set[str]:
    """All texts in a JSON value, as readers leave them: without blanks around, Sparkles' with line breaks."""
    if isinstance(value, str):
        return {value.strip(), re.sub(r"(?<!\\)(\\r)?\\n", "\n", value).strip()}
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {text for each in inner for text in strings(each)}


def check_annotations(read: Callable, file: Path, records: Callable, good, by_round: bool = False):
    """Read annotations with --skip-bad and without, and check what came; raises Refused where a record is bad.

    Good records are kept, all others are counted, no text is invented, and what is kept can be learned from.
    read(reader) gives conversations, of one record or by_round of one record for each round; records: those in
    what JSON makes of the file; good: the record that nothing was done to.
    """
    try:
        written = records(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, LookupError, TypeError, AttributeError):
        written = None
    skipping, strict = Reader("dataset", file.parent, skip_bad=True), Reader("dataset", file.parent)
    found = attempt(file, lambda: list(read(skipping)))
    assert written is not None, "what is no list of records was read"
    rounds = [round_ for conversation in found for round_ in conversation.rounds]
    texts, answers = strings(written), [round_.answer for round_ in rounds]
    assert GOOD in answers or good not in written, "a good record was lost"
    # In Sparkles IMAGE#1 becomes a name like "image 1"; no other answer of ours has this word.
    assert all(answer in texts or "mage" in answer for answer in answers), "an answer was invented"
    assert all(image.parent.name == "shown" for round_ in rounds for image in round_.images), "outside"
    kept = len(rounds if by_round else found)
    assert kept + skipping.left_out.total() + len(skipping.bad) == len(written), "a record was not counted"
    for conversation in found:
        marked(encode(conversation.rounds, tokenizer(), 4, 10 ** 9), tokenizer())
    for line in (*skipping.bad, *skipping.notes(), *(conversation.name for conversation in found)):
        assert "\x1b" not in line and len(line) < 3000, "a line that is long or commands the terminal"
    if skipping.bad:
        attempt(file, lambda: list(read(strict)))
        raise AssertionError("a bad record was not refused")
    assert list(read(strict)) == found


def as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def llava_records(rng: random.Random, folder: Path):
    """LLaVA's records, of one image, of two, and of none."""
    shown, file = with_images(folder, "1.jpg", "2.jpg", "3.jpg"), folder / "records.json"
    names = rng.choice(["1.jpg", ["1.jpg", "2.jpg"], None])
    marks = [0, 0] if names is None else [1, len(as_list(names)) - 1]
    record = {"id": "7", "image": names, "conversations": [
        {"from": speaker, "value": text}
        for mark, question, answer in zip(marks, ["What is it?", "Where?"], ["A cat.", "Here."])
        for speaker, text in (("human", question + "\n<image>" * mark), ("gpt", answer))]}
    good = {"id": "8", "image": "3.jpg", "conversations": [{"from": "human", "value": "<image>\nIs it?"},
                                                           {"from": "gpt", "value": GOOD}]}
    write_damaged_json(file, [*as_list(altered([record] * rng.randint(1, 2), rng)), good], rng)
    check_annotations(lambda reader: llava(reader, [file], shown), file, list, good)


def instructions(rng: random.Random, folder: Path):
    """MIMIC-IT's instructions: those of CGD, which need all images, and of SN, which do not."""
    code = rng.choice(["CGD", "SN"])
    file, keys = folder / f"{code}_instructions.json", [f"{code}_INS_{n}" for n in range(4)]
    shown = with_images(folder, "1.jpg", "2.jpg")
    source = shown
    if code == "SN":
        source = shown / "SN.json"
        source.write_text(json.dumps({f"SN_IMG_{n}": base64.b64encode(small_jpeg()).decode() for n in (1, 2)}))
    data = {key: {"instruction": "What changed?", "answer": f"The cat {key}.", "image_ids": [f"{code}_IMG_1",
                                                                                             f"{code}_IMG_2"],
                  "rel_ins_ids": [other for other in keys[:3] if other != key]} for key in keys}
    good = {"instruction": "Is it?", "answer": GOOD, "image_ids": [f"{code}_IMG_2"], "rel_ins_ids": []}
    changed = altered({"meta": {"version": "1"}, "data": data}, rng)
    if isinstance(changed, dict) and isinstance(changed.get("data"), dict):
        changed["data"]["good"] = good
    write_damaged_json(file, changed, rng)

    def read(reader: Reader):
        for conversation in mimicit(reader, file, source):
            # Images in base64 have no path; the file that they lie in stands for them.
            yield Conversation(conversation.name, [
                replace(round_, images=tuple(getattr(image, "file", image) for image in round_.images))
                for round_ in conversation.rounds])

    check_annotations(read, file, lambda value: list(value["data"].values()), good, by_round=True)


def sparkles_records(rng: random.Random, folder: Path):
    """SparklesDialogue: two rounds, three images."""
    file, shown = folder / "records.json", with_images(folder, "1.jpg", "2.jpg", "3.jpg")
    shows = [[{"image_id": rng.choice([1, "1"]), "caption": "A cat."}, {"image_id": 2, "caption": "A dog."}],
             [{"image_id": 3, "caption": "A cow."}]]
    record = {"dialogue": [message for images, question in zip(shows, ("Is it IMAGE#1?", "IMAGE#3 or IMAGE#2?"))
                           for message in ({"role": "user", "images": images, "content": question},
                                           {"role": "assistant", "content": "It is\\nthis."})]}
    good = {"dialogue": [{"role": "user", "images": [{"image_id": 3}], "content": "Is it?"},
                         {"role": "assistant", "content": GOOD}]}
    write_damaged_json(file, [*as_list(altered([record] * rng.randint(1, 2), rng)), good], rng)
    check_annotations(lambda reader: sparkles(reader, file, shown), file, list, good)


def image_indices(rng: random.Random, folder: Path):
    """MIMIC-IT's files of images as base64 texts, and the index that is kept beside them."""
    file = folder / "SD.json"
    value = {rng.choice([f"SD_IMG_{n}", "é\u202e", "a b", "", f"SD_IMG_{n % 2}"]):
             base64.b64encode(rng.randbytes(rng.randint(0, 40))).decode() for n in range(rng.randint(0, 4))}
    if rng.random() < .3:
        value = altered(value, rng)
    content = json.dumps(value, indent=rng.choice([None, 1]), ensure_ascii=rng.random() < .5).encode(
        errors="surrogatepass")
    file.write_bytes(damaged(content, rng) if rng.random() < .6 else content)
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        written = None
    found = attempt(file, lambda: encoded_images(file))
    if rng.random() < .5 and (index := folder / "SD.json.index").exists():
        index.write_bytes(damaged(index.read_bytes(), rng))
        assert encoded_images(file) == found, "a damaged index was believed"
    assert written is None or found.keys() == written.keys(), "keys differ from those that JSON finds"
    for key, image in found.items():
        content = attempt(file, image.read_bytes)
        assert written is None or content == base64.b64decode(written[key], validate=True)


# ---- weights ----

def parsed(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, FP32 alone, read without the library."""
    content = file.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    return {name: np.frombuffer(content[start + one["data_offsets"][0]:start + one["data_offsets"][1]],
                                np.float32).reshape(one["shape"])
            for name, one in json.loads(content[8:start]).items() if name != "__metadata__"}


@cache
def llama_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name if name == "lm_head.weight" else f"model.{name}": t.detach()
            for name, t in Llama(LLAMA).state_dict().items()}


def write_config(folder: Path):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | asdict(LLAMA)))


def loaded_llama(folder: Path) -> Llama:
    """The folder's LLaMA, which must run; raises Refused."""
    llama = attempt(folder, lambda: Llama.from_pretrained(folder, dtype=torch.float32))
    logits = llama.next_logits(torch.tensor([3]), Cache(llama, 1, room=2))
    assert logits.shape == (1, LLAMA.vocab_size)
    return llama


def safetensors_files(rng: random.Random, folder: Path):
    """Weights in safetensors: damaged bytes, or a damaged header before sound values."""
    write_config(folder)
    file = folder / "model.safetensors"
    tensors = {name: t.clone() for name, t in llama_tensors().items()}
    if rng.random() < .2:
        name = rng.choice(list(tensors))
        tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = rng.choice([torch.nan, torch.inf, 1e38])
    save_file(tensors, file)
    content = file.read_bytes()
    if rng.random() < .4:
        end = 8 + struct.unpack("<Q", content[:8])[0]
        header = json.dumps(altered(json.loads(content[8:end]), rng)).encode()
        content = struct.pack("<Q", rng.choice([len(header)] * 5 + [0, 2 ** 62])) + header + content[end:]
    file.write_bytes(content if rng.random() < .3 else damaged(content, rng))
    llama, expected = loaded_llama(folder), parsed(file)
    for name, tensor in llama.state_dict().items():
        written = expected[name if name == "lm_head.weight" else f"model.{name}"]
        assert np.array_equal(tensor.numpy(), written), f"{name} is not what the file holds"
        assert np.isfinite(written).all(), f"{name} is no finite number"


PICKLES = [b"\x80\x02cos\nsystem\n(S'touch pwned'\ntR.", b"\x80\x02c__builtin__\nbytearray\n(I9999999999\ntR.",
           b"\x80\x02}(X\x01\x00\x00\x00aK\x01u.", b"\x80\x02]q\x00.", b"\x80\x04\x95" + b"\xff" * 8, b"",
           b"\x80\x02c__builtin__\neval\n(S'open(\"pwned\", \"w\")'\ntR.", b"(lp0\n" + b"(l" * 10000 + b"."]


def pickles(rng: random.Random, folder: Path):
    """Weights in PyTorch's format: damaged files, pickles that would run code or ask for memory, odd tensors."""
    write_config(folder)
    file = folder / "pytorch_model.bin"
    tensors = {name: t.clone() for name, t in llama_tensors().items()}
    if rng.random() < .3:
        name = rng.choice(list(tensors))
        odd = [tensors[name].to_sparse(), tensors[name].long(), tensors[name].to("meta"), None, 3, [1.0], "a",
               tensors[name][None], tensors[name].to(torch.complex64), tensors[name].flatten()[:1].expand(10 ** 9),
               torch.quantize_per_tensor(tensors[name], .1, 0, torch.qint8), tensors[name].bfloat16()]
        tensors[name] = rng.choice(odd)
    torch.save(rng.choice([tensors] * 6 + [list(tensors.values()), 7]), file,
               _use_new_zipfile_serialization=rng.random() < .9)
    if rng.random() < .5 and zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            parts = {part: archive.read(part) for part in archive.namelist()}
        part = rng.choice([next(name for name in parts if name.endswith("data.pkl")), rng.choice(list(parts))])
        parts[part] = rng.choice(PICKLES) if rng.random() < .3 else damaged(parts[part], rng)
        with zipfile.ZipFile(file, "w", rng.choice([zipfile.ZIP_STORED] * 3 + [zipfile.ZIP_DEFLATED])) as archive:
            for part, content in parts.items():
                archive.writestr(part, content)
    elif rng.random() < .7:
        file.write_bytes(rng.choice(PICKLES) if rng.random() < .1 else damaged(file.read_bytes(), rng))
    try:
        loaded_llama(folder)
    finally:
        assert not Path("pwned").exists() and not (folder / "pwned").exists(), "a pickle ran code"


def configs(rng: random.Random, folder: Path):
    """config.json of LLaMA, of QWen-VL and of a training result."""
    which, file = rng.choice(["llama", "vit", "result"]), folder / "config.json"
    if which == "llama":
        save_file(llama_tensors(), folder / "model.safetensors")
        write_damaged_json(file, altered({"model_type": "llama", "rms_norm_eps": 1e-5} | asdict(LLAMA), rng), rng)
        loaded_llama(folder)
    elif which == "vit":
        torch.manual_seed(0)
        save_file({PREFIX + name: t for name, t in VisionTransformer(VIT).state_dict().items()},
                  folder / "model.safetensors")
        visual = {name: getattr(VIT, name) for name in IN_CONFIG}
        write_damaged_json(file, altered({"visual": visual, "hidden_size": 16}, rng), rng)
        vit = attempt(folder, lambda: VisionTransformer.from_pretrained(folder))
        size = vit.config.image_size
        assert vit(torch.zeros(1, 3, size, size)).shape[0] == 1
    else:
        (folder / "trained.safetensors").write_bytes((WEIGHTS / "chat/trained.safetensors").read_bytes())
        told = json.loads((WEIGHTS / "chat/config.json").read_text())
        write_damaged_json(file, altered(told, rng), rng)
        attempt(folder, lambda: load(folder))


def tokenizers(rng: random.Random, folder: Path):
    """sentencepiece models: damaged, or of another model."""
    file, whole = folder / "tokenizer.model", (WEIGHTS / "llama/tokenizer.model").read_bytes()
    file.write_bytes(whole if rng.random() < .2 else damaged(whole, rng))
    rows = rng.choice([tokenizer().model.vocab_size(), 50, 32000])
    opened = attempt(file, lambda: Tokenizer(folder, rows))
    for text in ("### Image 1:", "What is it? é", ""):
        ids = opened.encode(text)
        assert all(0 <= id < rows for id in ids) and isinstance(opened.decode(ids), str)


# ---- chat ----

@cache
def chat() -> Chat:
    model, config = load(WEIGHTS / "chat")
    return Chat(model.eval(), Tokenizer(towers(config)[0]))


def typed(folder: Path, names: list[str], rng: random.Random) -> str:
    """A line of files, commands, questions and noise."""
    noise = ["/new", "/quit", "/help", "/undo", "/again", "/images", "/image", "/stats", "/load", "/save", "/x",
             "/", "//", '"', "'", "`", "[", "(", "“", "@", "\\", "\\ ", "~", "~nobody/a.png", "\ud800", "\x1b[2J",
             "file://", "image 7", "data:image/png;base64,A", "LICENSE", "./LICENSE",
             "\0.png", "\u202e", "é.png", "a" * 300 + ".png", "/" * 5000, "http://a.org/a.png", "file:///a.png",
             ".png", "..", "### Image 9:", "### Question:", "</s>", "<s>", "<image>", "\t", "😀", "?", ".",
             "image 0", "image 99", "What color is it?", "Describe image 1.", "x" * 3000, "red " * 400,
             "/dev/zero", "/dev/stdin.png", "%s{}"]
    return rng.choice([" ", " ", "  ", "", ", "]).join(
        rng.choice([str(folder / rng.choice(names)), f'"{folder / rng.choice(names)}"', rng.choice(noise)])
        for _ in range(rng.randint(1, 4)))


def chat_lines(rng: random.Random, folder: Path):
    """A line in a conversation; the next question is answered as if nothing had been."""
    names = ["good.png", "b c.png", "broken.png", "folder.png", "gone.png", "text.png", "\x1b[31m.png"]
    for name in ("good.png", "b c.png", "\x1b[31m.png"):
        (folder / name).write_bytes((ROOT / "examples/c.png").read_bytes())
    (folder / "broken.png").write_bytes(damaged((folder / "good.png").read_bytes()[:200], rng))
    (folder / "text.png").write_text("no image")
    (folder / "folder.png").mkdir()
    lines = iter([typed(folder, names, rng), "/new", f"{folder / 'good.png'} What color is it?"])
    output, asked = io.StringIO(), []

    def next_line(prompt: str) -> str:
        try:
            asked.append(next(lines))
        except StopIteration:
            raise EOFError from None
        return asked[-1]

    before, builtins.input = builtins.input, next_line
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            chat().clear()
            good = converse(Terminal(chat()))
    finally:
        builtins.input = before
    printed = output.getvalue()
    assert all(char.isprintable() or char == "\n" for char in printed), "a control character was printed"
    assert len(asked) < 3 or printed.rstrip("\n").endswith("\nyellow"), "the next question was not answered"
    if not good:
        raise Refused


# ---- the whole ----

KINDS = {"images": images, "LLaVA": llava_records, "MIMIC-IT": instructions, "Sparkles": sparkles_records,
         "image indices": image_indices, "safetensors": safetensors_files, ".bin": pickles, "config.json": configs,
         "tokenizer": tokenizers, "chat lines": chat_lines}


def outcome(kind: str, rng: random.Random) -> str:
    """What came of one input: "read", "refused", or what is wrong."""
    file_names.cache_clear()
    with (tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(),
          contextlib.redirect_stderr(io.StringIO())):           # progress bars
        warnings.simplefilter("ignore")
        try:
            KINDS[kind](rng, Path(folder))
        except Refused:
            return "refused"
        except Exception as error:                              # all kinds: this is what is looked for
            return f"{type(error).__name__}: {error}"
    return "read"


def outcomes(kind: str, seeds: list[str]) -> tuple[list[str], float, int]:
    """What came of the inputs of these seeds, the seconds of the slowest, and the peak in MB of this process or of
    the largest of its children, in which images are decoded."""
    torch.set_num_threads(1)
    found, slowest = [], 0.0
    for seed in seeds:
        start = time.monotonic()
        found.append(outcome(kind, random.Random(seed)))
        slowest = max(slowest, time.monotonic() - start)
    return found, slowest, max(resource.getrusage(who).ru_maxrss // 1024
                               for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def print_table(counts: dict[str, Counter], slowest: dict[str, float], peak: int):
    print(f"{'input':<14}{'tried':>8}{'read':>8}{'refused':>9}{'faults':>8}{'slowest, s':>12}")
    for kind, found in counts.items():
        print(f"{kind:<14}{found.total():>8}{found['read']:>8}{found['refused']:>9}{found['fault']:>8}"
              f"{slowest[kind]:>12.2f}")
    print(f"peak memory of a process that tried them: {peak} MB")


def main():
    """Draw inputs until the time is over; print each fault with its seed, and a table. Exits with 1 if there was a
    fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    end, counts, slowest, peak = time.monotonic() + 60 * options.minutes, {}, Counter(), 0
    batches = ((kind, [f"{options.seed} {kind} {i}" for i in range(first, first + 25)])
               for first in count(0, 25) for kind in options.kinds)
    pool, running = ProcessPoolExecutor(options.processes, get_context("spawn")), {}
    while running or time.monotonic() < end:
        while time.monotonic() < end and len(running) < options.processes + 1:
            kind, seeds = next(batches)
            running[pool.submit(outcomes, kind, seeds)] = kind, seeds
        done, _ = wait(running, timeout=300, return_when=FIRST_COMPLETED)
        if not done or any(isinstance(one.exception(), BrokenProcessPool) for one in done):
            for kind, seeds in running.values():                # A reader hangs, or took its process with it.
                print(f"fault: a process died or hung, perhaps at one of these: {seeds}", flush=True)
                counts.setdefault(kind, Counter())["fault"] += 1
            for process in multiprocessing.active_children():
                process.kill()
            pool, running, done = ProcessPoolExecutor(options.processes, get_context("spawn")), {}, []
        for one in done:
            kind, seeds = running.pop(one)
            found, seconds, megabytes = one.result()
            slowest[kind], peak = max(slowest[kind], seconds), max(peak, megabytes)
            counts.setdefault(kind, Counter()).update(
                each if each in ("read", "refused") else "fault" for each in found)
            for seed, each in zip(seeds, found):
                if each not in ("read", "refused"):
                    print(f"fault, random.Random({seed!r}): {each!r:.1000}", flush=True)
    pool.shutdown()
    print_table(counts, slowest, peak)
    sys.exit(any(found["fault"] for found in counts.values()))


if __name__ == "__main__":
    main()
