"""How does any image file become pixels, and none do harm? Formats, modes, sizes, damage.

    file ─► read_bytes ─► decoded (its first frame, upright) ─► read_image (RGB) ─► to_pixels (a square, uint8)

Images come from strangers: what a file announces is read before it is decoded, and reading one never takes more
than 600 MB of memory. Side room of vit.py, whose input `normalized` makes of pixels.
"""
import math
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]      # CLIP's, over red, green, blue
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")       # none that starts another program
MAX_BYTES, MAX_PIXELS = 200_000_000, 80_000_000                     # more is refused
ENOUGH = 2 ** 24                                                     # of more pixels, so many are kept
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}                          # for the values of EXIF's orientation
warnings.filterwarnings("ignore", module="PIL")                 # of bad metadata, which nothing here reads


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


def decoded(file) -> Image.Image:
    """The first frame in the mode of the file, upright; of more than ENOUGH pixels, reduced. Raises as below."""
    found = read_bytes(file)
    try:
        with Image.open(BytesIO(found), formats=FORMATS) as image:
            announced = image.width * image.height              # read first, which costs nothing
            most = MAX_PIXELS * 2 // 5 if image.format == "WEBP" else MAX_PIXELS    # its reader keeps copies
            if announced <= most:
                if announced > ENOUGH:
                    image.draft(None, (image.width // 2, image.height // 2))    # JPEG can be decoded to half
                image.load()
    except UnidentifiedImageError as error:
        raise ValueError(f"{file} is no readable image of a format in {', '.join(FORMATS)}") from error
    except Exception as error:                                  # Pillow's readers raise all kinds for bad files
        raise ValueError(f"{file} is no readable image: {error}") from error
    if announced > most:
        raise ValueError(f"{file} has {image.width} x {image.height} pixels, expected at most {most:,}: make it "
                         "smaller")
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:                                           # all kinds, too: bad EXIF, but a good image
        turn = None
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
        image = Image.fromarray(np.rint(values * (255 / white)).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_image(file) -> Image.Image:
    """An RGB image: the first frame, upright as EXIF says, transparent parts on white, 16 and 32 bits scaled to 8.

    It takes at most 600 MB, so an image of more than ENOUGH pixels is reduced and one of more than MAX_PIXELS
    refused. file: a Path, or anything else with `read_bytes()` and a str() that names it, as sources.EncodedImage.
    Raises FileNotFoundError for no file and ValueError that names it for a damaged, huge or other file.
    """
    image = decoded(file)
    try:
        return as_rgb(image)
    except Exception as error:                                  # such as an assertion about a palette
        raise ValueError(f"{file} is no readable image: {type(error).__name__} {error}") from error


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
