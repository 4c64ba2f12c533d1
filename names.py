r"""How do people name images? By file names in what they type, however they are written, and by numbers.

    "my cat.png" What is it?          my cat.png is shown, the question is: What is it?
    Is /tmp/a\ b.png like [c.png]?    both are shown, the question is: Is image 1 like image 2?
    What is in image 7?               there may be no image 7, which `absent` notes

What looks like an image and is none is an error and never becomes a part of the question: a model would invent an
answer. Side room of chat.py.
"""
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote

from PIL import Image, ImageOps

from data import ImageFile
from pixels import FORMATS, as_rgb, can_be_read

# A word, with escaped spaces, or a text in quotes with what is attached to it. The ' in isn't is no quote. Some
# programs write @ before the name of a file.
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
            what = "is a folder, and an image is expected" if os.path.isdir(path) else "does not exist"
            raise FileNotFoundError(f"no image {name}: it {what}")
        return None
    return path if is_path or looks_like_one or can_be_read(path) else None


def named(text: str) -> tuple[Path, str] | None:
    """The image file that a part of a line names, in whatever quotes and brackets, and what stands behind it:
    marks, or the 's of "a.png's".

    None where it names none; raises as `image_file` does.
    """
    for whole in (text, text[1:-1] if text[:1] in OPENING else ""):     # brackets may belong to the name
        if os.path.isfile(as_path(whole)) and (path := image_file(whole)):
            return path, ""
    opened = text.lstrip(OPENING)
    bare = opened.rstrip(CLOSING + MARKS)
    behind = "".join(char for char in opened[len(bare):] if char in MARKS)
    if owns := re.search("['’]s$", bare):
        bare, behind = bare[:owns.start()], owns[0] + behind
    return (path, behind) if bare and (path := image_file(bare)) else None


def words_in(line: str) -> Iterator[tuple[str, str]]:
    """(blanks before it, word) of a line. A name may have spaces that nobody marked: then the longest run of words
    that is a file is one word."""
    found, at, before = list(WORD.finditer(line)), 0, 0
    while at < len(found):
        start = found[at].start()
        ends = range(min(len(found), at + MOST_WORDS), at, -1)
        at = next((end for end in ends if os.path.isfile(as_path(line[start:found[end - 1].end()].rstrip(MARKS)))),
                  at + 1)
        yield line[before:start], line[start:found[at - 1].end()]
        before = found[at - 1].end()


def parse(line: str, first: int, known: Callable[[Path], int | None] = lambda path: None
          ) -> tuple[list[Path], str]:
    """A line as (image files that join, the question).

    Within a sentence a name becomes "image 3", counting from `first`; before or after a sentence it is left out.
    known: the number of an image that was shown before; it does not join again. Raises as `image_file` does.
    """
    words, files, numbers, question, says_more = list(words_in(line)), [], {}, "", False
    for i, (blanks, word) in enumerate(words):
        if not (found := named(word)):
            question, says_more = question + blanks * bool(question) + word, True
            continue
        path, behind = found
        number = numbers.get(path) or known(path)
        if joins := number is None:
            number = first + len(files)
            files.append(path)
        numbers[path] = number
        goes_on = i + 1 < len(words) and words[i + 1][1].lower() in ("and", "or", "vs", "vs.", "versus", "&")
        # A known image must be named: before a sentence, where another would be left out, too.
        is_owner = behind.startswith(("'", "’"))
        if not joins or goes_on or is_owner or question and question[-1] not in "?!.":
            behind = behind or ":" * (not question and not goes_on)
            question += blanks * bool(question) + f"image {number}{behind}"
    return files, question if says_more else ""


# ---- numbers ----

CARDINAL_WORDS = "one two three four five six seven eight nine ten".split()
ORDINAL_WORDS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
COUNTED = {word: n for words in (CARDINAL_WORDS, ORDINAL_WORDS) for n, word in enumerate(words, 1)}
AN_IMAGE = r"(?:images?|pictures?|photos?|photographs?|pics?|imgs?)"
CARDINAL = rf"(?:\d{{1,9}}|{'|'.join(CARDINAL_WORDS)})"
ORDINAL = rf"(?:\d{{1,9}}(?:st|nd|rd|th)|{'|'.join(ORDINAL_WORDS)})"
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
    numbers = {int(word) if word.isdigit() else COUNTED[word] for word in found
               if word.isdigit() or word in COUNTED}
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
    """An image that is named by a str or a Path, or a PIL image, as the other files want it; raises TypeError."""
    if isinstance(image, Image.Image):
        as_rgb(ImageOps.exif_transpose(image)).save(content := BytesIO(), "PNG")
        return InMemory(content.getvalue())
    if not hasattr(image, "read_bytes") and not isinstance(image, str):
        raise TypeError(f"an image is a name, a Path or a PIL image, found a {type(image).__name__}; several "
                        "images are given one after the other")
    return Path(image) if isinstance(image, str) else image
