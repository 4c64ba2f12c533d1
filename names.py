r"""How do people name images? By file names in what they type, however they are written, and by numbers.

    "my cat.png" What is it?          my cat.png is shown, the question is: What is it?
    Is /tmp/a\ b.png like [c.png]?    both are shown, the question is: Is image 1 like image 2?
    What is in image 7?               there may be no image 7, which `absent` notes

What looks like an image and is none is an error and never becomes a part of the question: a model would invent an
answer. Side room of chat.py.
"""
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote

from PIL import Image

from data import ImageFile
from pixels import FORMATS, can_be_read

# A word, with escaped spaces, or a text in quotes with what is attached to it.
WORD = re.compile(r"""[(\[{<]*(?:"[^"]*"|'[^']*'(?!\w)|`[^`]*`|“[^”]*”)\S*|(?:\\.|\S)+""")
OPENING, CLOSING, MARKS = "\"'`([{<“‘@", "\"'`)]}>”’", "?!.,;:"
# Names that end like this are images: those that can be read, and others that people have, to say so.
SUFFIXES = {suffix for suffix, format in Image.registered_extensions().items() if format in FORMATS} | set(
    ".heic .heif .avif .svg .psd .ico .tga .eps .jp2 .jxl .raw .dng .cr2 .cr3 .nef .arw .orf .rw2".split())
MOST_WORDS = 8                      # of a file name with spaces that nobody put into quotes


# ---- files ----

def as_path(name: str) -> Path:
    """A file by its name: after ~ and file://, too, and with escaped characters where no file has it as it is."""
    if name.lower().startswith("file:/"):
        name = unquote(re.sub("^(?i:file)://(localhost)?(?=/)|^(?i:file):(?=/)", "", name))
    name = os.path.expanduser(name)
    return Path(name if os.path.isfile(name) else re.sub(r"\\(.)", r"\1", name))


def image_file(name: str) -> Path | None:
    """The image file that a word names, or None; raises FileNotFoundError where it looks like one, and is absent,
    and ValueError for an address on the web."""
    if re.match("(?i)(https?|ftp|s3|gs)://.|data:image/", name):
        raise ValueError(f"{name} is an address, and nothing is fetched here: save the image, and name its file")
    path = as_path(name)
    is_path = re.match(r"(?i)file:/|~/|\.\.?/", name) or (name.startswith("/") and "/" in name[1:])
    looks_like_one = path.suffix.lower() in SUFFIXES and path.stem
    if not os.path.isfile(path):
        if is_path or looks_like_one:
            raise FileNotFoundError(f"no image {name}")
        return None
    return path if is_path or looks_like_one or can_be_read(path) else None


def named(text: str) -> tuple[Path, str] | None:
    """The image file that a part of a line names, in whatever quotes and brackets, and the punctuation behind it.

    None where it names none; raises as `image_file` does.
    """
    opened = text.lstrip(OPENING)
    bare = opened.rstrip(CLOSING + MARKS)
    marks = "".join(char for char in opened[len(bare):] if char in MARKS)
    inner = text[1:-1] if text[:1] in OPENING else text         # its last characters may belong to the name
    if inner != bare and inner and os.path.isfile(as_path(inner)):
        return (path, "") if (path := image_file(inner)) else None
    return (path, marks) if bare and (path := image_file(bare)) else None


def parse(line: str, first: int, known: Callable[[Path], int | None] = lambda path: None
          ) -> tuple[list[Path], str]:
    """A line as (image files that join, the question).

    Within a sentence a name becomes "image 3", counting from `first`; before or after a sentence it is left out.
    known: the number of an image that was shown before; it does not join again. Raises as `image_file` does.
    """
    words, files, numbers, question, at, says_more = list(WORD.finditer(line)), [], {}, [], 0, False
    while at < len(words):
        # A name may have spaces that nobody marked: the longest run of words that is a file counts.
        runs = range(min(len(words), at + MOST_WORDS), at + 1, -1)
        parts = (line[words[at].start():words[end - 1].end()] for end in runs)
        end, part = next(((end, part) for end, part in zip(runs, parts)
                          if os.path.isfile(os.path.expanduser(part.rstrip(MARKS)))), (at + 1, words[at].group()))
        found, at = named(part), end
        if not found:
            says_more = True
            question.append(part)
            continue
        path, marks = found
        number = numbers.get(path) or known(path)
        if joins := number is None:
            number = first + len(files)
            files.append(path)
        numbers[path] = number
        if not joins or (question and question[-1][-1] not in "?!."):
            # A known image must be named: before a sentence, where it would be left out, too.
            question.append(f"image {number}{marks}" if question else f"image {number}{marks or ':'}")
    return files, " ".join(question) if says_more else ""


# ---- numbers ----

COUNTED = {word: n for n, both in enumerate((
    "one first", "two second", "three third", "four fourth", "five fifth", "six sixth", "seven seventh",
    "eight eighth", "nine ninth", "ten tenth"), 1) for word in both.split()}
AN_IMAGE = r"(?:images?|pictures?|photos?|photographs?|pics?|imgs?)"
CARDINAL = rf"(?:\d+|{'|'.join(list(COUNTED)[::2])})"
ORDINAL = rf"(?:\d+(?:st|nd|rd|th)|{'|'.join(list(COUNTED)[1::2])})"
NUMBERED = re.compile(                          # "images 1, 2 and 3", or "the first and the second image"
    rf"\b{AN_IMAGE}\s*(?:no\.?\s*|number\s*|#\s*)?"
    rf"({CARDINAL}(?:(?:\s*[,&]\s*(?:and\s+)?|\s+(?:and|or|to|with)\s+){CARDINAL})*)\b|"
    rf"\b({ORDINAL}(?:\s+(?:and|or)\s+(?:the\s+)?{ORDINAL})*)\s+{AN_IMAGE}\b", re.IGNORECASE)


def absent(question: str, n_images: int) -> str:
    """A note where a question is asked without an image, or about one whose number does not exist; else ''."""
    if not n_images:
        return "no image is shown yet: name a file to show one"
    found = [word for match in NUMBERED.finditer(question.lower())
             for word in re.findall(r"\d+|[a-z]+", match[1] or match[2])]
    numbers = {int(word) if word.isdigit() else COUNTED.get(word, 1) for word in found}
    wrong = sorted(number for number in numbers if not 1 <= number <= n_images)
    return (f"there is no image {' or '.join(map(str, wrong))}: {n_images} "
            f"{'is' if n_images == 1 else 'are'} shown") if wrong else ""


# ---- images from Python ----

@dataclass(frozen=True)
class InMemory:
    """An image that is no file, such as one that was drawn, as PNG."""
    content: bytes

    def read_bytes(self) -> bytes:
        return self.content

    def __str__(self) -> str:
        return "an image without a file"


def as_file(image) -> ImageFile:
    """An image that is named by a str or a Path, or a PIL image, as the other files want it."""
    if isinstance(image, Image.Image):
        image.save(content := BytesIO(), "PNG")
        return InMemory(content.getvalue())
    return Path(image) if isinstance(image, str) else image
