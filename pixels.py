"""How does any image file become pixels, and none do harm? Formats, modes, sizes, damage.

    file ─► read_bytes ─► decoded (its first frame, upright) ─► as_rgb ─► to_pixels (a square, uint8)

Images come from strangers: what a file announces is read before it is decoded, and what is not surely harmless is
decoded in a process of its own, which is ended where it takes too much. Side room of vit.py, whose input
`normalized` makes of pixels.
"""
import math
import os
import resource
import warnings
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]      # CLIP's, over red, green, blue
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")       # none that starts another program
MAX_BYTES, MAX_PIXELS = 200_000_000, 80_000_000         # more is refused
ENOUGH = 2 ** 24                                        # images of more pixels are reduced to about so many
SECONDS, MEMORY = 5, 500_000_000                        # of computing, and bytes, that decoding a file may take
FORKING = Lock()
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}                          # for the values of EXIF's orientation
warnings.filterwarnings("ignore", module="PIL")         # of bad metadata: a bad orientation is ignored
Image.init()                    # Pillow reads its formats now, not in a child, where another thread may hold it up


def read_bytes(file) -> bytes:
    """The bytes of an image file; a Path may hold at most MAX_BYTES. Raises as `read_image` does."""
    if not isinstance(file, Path):
        return file.read_bytes()
    if not file.is_file():                                      # a pipe or a device might never end
        raise FileNotFoundError(f"no image {file}")
    with open(file, "rb") as opened:
        found = opened.read(MAX_BYTES + 1)
    if len(found) > MAX_BYTES:
        raise ValueError(f"{file} has more than {MAX_BYTES:,} bytes, expected an image of fewer")
    return found


def decoded(found: bytes) -> Image.Image:
    """The first frame of a file in its own mode, upright; of more than ENOUGH pixels, reduced. Raises anything."""
    with Image.open(BytesIO(found), formats=FORMATS) as image:
        announced = image.width * image.height                  # read first, which costs nothing
        most = MAX_PIXELS * 3 // 10 if image.format == "WEBP" else MAX_PIXELS       # its reader keeps copies
        if announced > most:
            raise ValueError(f"it has {image.width} x {image.height} pixels, expected at most {most:,}")
        if announced > ENOUGH:
            image.draft(None, (image.width // 2, image.height // 2))    # JPEG can be decoded to half
        image.load()
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:                                           # all kinds: bad EXIF, but a good image
        turn = None
    # Two things that Pillow leaves to us. In PNG the transparent value has as many bits as the file's values (see
    # its byte 24), but pixels come with 8.
    if image.format == "PNG" and isinstance(clear := image.info.get("transparency"), int | tuple):
        scale = {1: 255, 2: 85, 4: 17, 16: 1 / 256}.get(found[24], 1)
        if image.mode in ("L", "RGB"):
            image.info["transparency"] = (int(clear * scale) if isinstance(clear, int) else
                                          tuple(int(value * scale) for value in clear))
    image.info["white is 0"] = image.format == "TIFF" and image.tag_v2.get(262) == 0        # with 16 or 32 bits
    opened = image
    if (shrink := (ENOUGH / (image.width * image.height)) ** .5) < 1:
        # The nearest pixel, which needs no memory of its own in any mode; `to_pixels` takes means of what is left.
        image = image.resize((math.ceil(image.width * shrink), math.ceil(image.height * shrink)),
                             Image.Resampling.NEAREST)
    image = image if turn is None else image.transpose(turn)
    image.format = opened.format                                # copies lose it
    return image


def as_rgb(image: Image.Image) -> Image.Image:
    """Transparent parts on white, 16 and 32 bits scaled to 8."""
    if image.mode.startswith("I") or image.mode == "F":                     # 16 or 32 bits: bring to 0..255
        values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
        brightest = values.max(initial=0)
        # White is 65535 where the format says 16 bits, else the smallest usual white that no value exceeds.
        is_short = ";" in image.mode or (image.format == "PPM" and image.mode == "I")
        whites = [65535] if is_short else [1, 255, 65535, brightest]
        white = next(value for value in whites if brightest <= value and (value > 1 or image.mode == "F"))
        if image.info.get("white is 0"):
            values = white - values
        scaled = np.rint(values * (255 / white)).clip(0, 255).astype(np.uint8)
        scaled[values == image.info.get("transparency", np.nan)] = 255
        image = Image.fromarray(scaled)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def rgb(found: bytes, file) -> Image.Image:
    """The bytes of a file as an RGB image; raises ValueError that names it, and MemoryError."""
    try:
        return as_rgb(decoded(found))
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"{file} is no readable image of a format in {', '.join(FORMATS)}") from error
    except Exception as error:                                  # Pillow's readers raise all kinds for bad files
        raise ValueError(f"{file} is no readable image: {error or type(error).__name__}") from error


def is_small(found: bytes) -> bool:
    """Whether a file is of a usual format and so small that reading it cannot take much time or memory."""
    passes = found.count(b"\xff\xda") if found.startswith(b"\xff\xd8") else 1         # of a progressive JPEG
    if len(found) > 2 ** 20 or passes > 20 or not found.startswith((b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF")):
        return False
    try:
        with Image.open(BytesIO(found), formats=FORMATS) as image:
            return image.width * image.height <= 2 ** 22
    except Exception:
        return True                                             # `rgb` will say what is wrong


def in_child(read: Callable[[], Image.Image], sending: int):
    """The child's part of `apart`: bound this process, read, and send size and pixels, or what is wrong."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()   # address space so far
    for kind, most in ((resource.RLIMIT_AS, held + MEMORY), (resource.RLIMIT_CPU, SECONDS)):
        hard = resource.getrlimit(kind)[1]                      # somebody may have set a lower one
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    try:
        image = read()
        answer = b"%d %d\n" % image.size + image.tobytes()
    except ValueError as error:
        answer = b"\n" + str(error).encode(errors="backslashreplace")
    with open(sending, "wb") as pipe:
        pipe.write(answer)


def apart(read: Callable[[], Image.Image]) -> Image.Image:
    """What `read` returns or raises, in a child process that gets SECONDS of computing and MEMORY bytes more.

    No rule could foresee what all files make their readers take. Raises MemoryError where that is more, or where
    the reader crashes.
    """
    with FORKING:                                               # else another thread's child would hold our pipe
        receiving, sending = os.pipe()
        if not (child := os.fork()):
            try:
                os.close(receiving)
                in_child(read, sending)
                os._exit(0)
            finally:                                            # whatever happened, the child ends here
                os._exit(1)
        os.close(sending)
    try:
        with open(receiving, "rb") as pipe:
            size, _, answer = pipe.read().partition(b"\n")
    finally:
        _, failed = os.waitpid(child, 0)
    if failed:
        raise MemoryError
    if not size:
        raise ValueError(answer.decode())
    return Image.frombytes("RGB", tuple(map(int, size.split())), answer)


def read_image(file) -> Image.Image:
    """An RGB image: the first frame, upright as EXIF says, transparent parts on white, 16 and 32 bits scaled to 8.

    An image of more than ENOUGH pixels is reduced and one of more than MAX_PIXELS refused. What is not surely
    harmless is decoded in a child process, so that it takes at most SECONDS of computing and MEMORY bytes. file: a
    Path, or anything else with `read_bytes()` and a str() that names it, as sources.EncodedImage. Raises OSError
    where it cannot be opened, and ValueError that names it for a damaged, huge or other file.
    """
    found = read_bytes(file)
    try:
        return rgb(found, file) if is_small(found) else apart(partial(rgb, found, file))
    except MemoryError as error:
        raise ValueError(f"{file} takes more than {SECONDS} seconds or {MEMORY // 10 ** 6} MB to read, or crashes "
                         "its reader: save it anew, and smaller") from error


def can_be_read(file) -> bool:
    """Whether `read_image` raises nothing."""
    try:
        read_image(file)
    except (OSError, ValueError):
        return False
    return True


def to_pixels(image: Image.Image, size: int = 448) -> Tensor:
    """The image squeezed to a square, (3, size, size) uint8: a quarter of what the encoder's input takes."""
    square = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def load_pixels(file, size: int) -> Tensor:
    """Pixels (3, size, size) uint8 from a file; raises as `read_image` does."""
    return to_pixels(read_image(file), size)


def normalized(pixels: Tensor, dtype=torch.float32) -> Tensor:
    """The encoder's input: pixels (I, 3, size, size), normalized as CLIP does."""
    return ((pixels / 255 - MEAN.to(pixels.device)) / STD.to(pixels.device)).to(dtype)
