"""Claims about pixels.py: images of every kind and mode, upright, scaled; large, damaged and hostile files."""
import io
import os
import signal
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import pixels
from pixels import normalized, read_image, to_pixels
from training import ROOT


class File:
    """Bytes that can be read like a file, as images in a JSON file can."""

    def __init__(self, content: bytes):
        self.content = content

    def read_bytes(self) -> bytes:
        return self.content


def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return File(file.getvalue())


def colour(image, format="PNG", **options):
    """The one colour of a flat image, after a round through a file."""
    opened = read_image(saved(image, format, **options))
    assert opened.mode == "RGB" and opened.size == image.size
    (_, found), = opened.getcolors()
    return found


def flat(mode, value):
    return Image.new(mode, (6, 4), value)


def test_pixels_of_a_flat_colour():
    pixels = to_pixels(flat("RGB", (255, 128, 0)))
    assert pixels.shape == (3, 448, 448) and pixels.dtype == torch.uint8
    x, = normalized(pixels[None])
    for channel, value in zip(x, ((1 - 0.48145466) / 0.26862954, (128 / 255 - 0.4578275) / 0.26130258,
                                  (0 - 0.40821073) / 0.27577711)):
        torch.testing.assert_close(channel, torch.full((448, 448), value))


@pytest.mark.parametrize("size", [(300, 20), (20, 300), (1, 1), (448, 448)])
def test_an_image_is_squeezed_not_cropped(size):
    ramp = np.linspace(0, 255, size[0]).astype(np.uint8)[None].repeat(size[1], 0)
    x = to_pixels(Image.fromarray(ramp).convert("RGB"), 56)
    assert x.shape == (3, 56, 56)
    assert size[0] == 1 or (x[0, :, 0].max() < 5 and x[0, :, -1].min() > 250)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(orientation):
    upright = np.array([[0, 50, 100], [150, 200, 250]], dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
              6: np.rot90(upright, 1), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = read_image(saved(Image.fromarray(np.ascontiguousarray(stored)), "JPEG", quality=100, exif=exif))
    np.testing.assert_allclose(np.asarray(opened)[..., 0], upright.astype(int), atol=3)


def palette():
    image = flat("P", 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    return image


@pytest.mark.parametrize("image, options, expected", [
    (flat("RGBA", (255, 0, 0, 0)), {}, (255, 255, 255)),
    (flat("RGBA", (255, 0, 0, 255)), {}, (255, 0, 0)),
    (flat("RGBA", (0, 0, 0, 51)), {}, (204, 204, 204)),
    (flat("RGB", (1, 2, 3)), {"transparency": (1, 2, 3)}, (255, 255, 255)),
    (palette(), {}, (10, 200, 30)),
    (palette(), {"transparency": 1}, (255, 255, 255)),
    (palette(), {"transparency": 0}, (10, 200, 30)),
    (flat("L", 77), {}, (77, 77, 77)),
    (flat("LA", (0, 51)), {}, (204, 204, 204)),
    (flat("1", 1), {}, (255, 255, 255)),
    (flat("1", 0), {}, (0, 0, 0))], ids=lambda x: getattr(x, "mode", None) or str(x).replace(" ", ""))
def test_transparency_lies_on_white_and_every_mode_becomes_rgb(image, options, expected):
    assert colour(image, **options) == expected


def png(depth: int, kind: int, row: bytes, clear: bytes = b"", size: tuple[int, int] = (4, 1)) -> File:
    """A PNG (kind 0: gray, 2: RGB, 6: RGBA) of one row, in which the value `clear` is transparent, or of zeros."""
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, 0)
    values = b"\0" + row if size == (4, 1) else bytes((4 * size[0] + 1) * size[1])
    return File(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + (chunk(b"tRNS", clear) if clear else b"")
                + chunk(b"IDAT", zlib.compress(values, 1)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("depth, kind, row, clear", [
    (1, 0, b"\x50", (1,)), (2, 0, b"\x11", (1,)), (4, 0, b"\x05\x05", (5,)), (8, 0, b"\0\x12\0\x12", (0x12,)),
    (16, 0, struct.pack(">HHHH", 0, 0x1212, 0, 0x1212), (0x1212,)),
    (16, 2, struct.pack(">12H", *[0] * 3, *[0x1212] * 3, *[0] * 3, *[0x1212] * 3), (0x1212,) * 3)])
def test_a_transparent_value_of_any_depth_lies_on_white(depth, kind, row, clear):
    found = np.asarray(read_image(png(depth, kind, row, struct.pack(f">{len(clear)}H", *clear))))
    assert found[0].tolist() == [[0] * 3, [255] * 3, [0] * 3, [255] * 3]


@pytest.mark.parametrize("mode", ["L", "I;16"])
def test_a_tiff_whose_white_is_0_is_no_negative(mode):
    white = Image.fromarray(np.zeros((2, 2), np.uint8 if mode == "L" else np.uint16))
    content = bytearray(saved(white, "TIFF").read_bytes())
    at = content.index(struct.pack("<HHI", 262, 3, 1)) + 8
    content[at] = 0                                             # PhotometricInterpretation: WhiteIsZero
    assert read_image(File(bytes(content))).getpixel((0, 0)) == (255, 255, 255)


def test_a_cmyk_jpeg_keeps_its_colour():
    found = colour(flat("CMYK", (0, 255, 255, 0)), "JPEG", quality=100)
    assert all(abs(a - b) < 4 for a, b in zip(found, (255, 0, 0)))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize("value, expected", [(0, 0), (100, 0), (32768, 127), (65535, 255)])
def test_sixteen_bits_are_scaled_to_eight(format, value, expected):
    image = Image.fromarray(np.full((4, 6), value, dtype=np.uint16))
    assert colour(image, format)[0] in (expected, expected + 1)


@pytest.mark.parametrize("format", ["GIF", "PNG"])
def test_an_animation_shows_its_first_frame(format):
    first, others = flat("RGB", (255, 0, 0)), [flat("RGB", (0, 0, 255)), flat("RGB", (0, 255, 0))]
    assert colour(first, format, save_all=True, append_images=others) == (255, 0, 0)


def test_a_truncated_image_is_an_error():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    whole = saved(noise, "JPEG").read_bytes()
    for length in (len(whole) // 2, 10, 0):
        with pytest.raises(ValueError, match="no readable image"):
            read_image(File(whole[:length]))


# ---- what strangers send ----

def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    file = tmp_path / "large.png"
    Image.new("L", (9000, 9000)).save(file)
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="large.png is no .*: it has 9000 x 9000 pixels, expected at most 80,000"):
        read_image(file)


@pytest.mark.parametrize("more", ["", "pixels.rgb = lambda *_: any(iter(int, 1)); "], ids=["memory", "time"])
def test_an_image_that_takes_much_is_refused(tmp_path, more):
    (tmp_path / "a.png").write_bytes(png(8, 6, b"", size=(6000, 6000)).content)
    # In a fresh process, because this one has memory from earlier tests that it could use again.
    code = ("import pixels; pixels.SECONDS, pixels.MEMORY = 1, 30_000_000; "
            f"{more}pixels.read_image(pixels.Path('a.png'))")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)
    assert "a.png takes more than 1 seconds or 30 MB to read, or crashes its reader: save it" in done.stderr


def test_an_image_shows_the_same_in_a_process_of_its_own(monkeypatch):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 4), dtype=np.uint8))
    file = saved(image, "PNG")
    here = read_image(file)
    monkeypatch.setattr(pixels, "is_small", lambda found: False)
    assert np.array_equal(read_image(file), here)
    with pytest.raises(ValueError, match="File object at .* is no readable image of a format in JPEG"):
        read_image(File(b"no image"))
    with ThreadPoolExecutor(8) as pool:
        assert all(np.array_equal(found, here) for found in pool.map(read_image, [file] * 50))
    monkeypatch.setattr(pixels, "rgb", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ValueError, match="crashes its reader"):
        read_image(file)


@pytest.mark.parametrize("mode, format", [("RGB", "PNG"), ("RGB", "JPEG"), ("P", "GIF"), ("RGBA", "PNG"),
                                          ("I;16", "PNG"), ("F", "TIFF"), ("1", "PNG")])
def test_a_large_image_is_reduced_and_shows_the_same(monkeypatch, tmp_path, mode, format):
    squares = np.kron(np.array([[0, 255], [255, 0]], dtype=np.uint8), np.ones((60, 90), dtype=np.uint8))
    image = Image.fromarray(squares).convert(mode if mode not in ("I;16", "F") else "L")
    if mode in ("I;16", "F"):
        image = Image.fromarray(squares.astype(np.uint16) * 257 if mode == "I;16" else squares / np.float32(255))
    image.save(tmp_path / "a", format)
    whole = to_pixels(read_image(tmp_path / "a"), 8).int()
    monkeypatch.setattr(pixels, "ENOUGH", 3000)
    found = read_image(tmp_path / "a")
    assert 1500 < found.width * found.height < 3300 and found.width / found.height == pytest.approx(1.5, rel=0.05)
    assert (to_pixels(found, 8).int() - whole).abs().float().mean() < 12


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_reduced_image_stands_upright(monkeypatch, tmp_path, format):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (120, 60)).save(tmp_path / "a", format, exif=exif)
    for enough in (10 ** 6, 1000):
        monkeypatch.setattr(pixels, "ENOUGH", enough)
        found = read_image(tmp_path / "a")
        assert found.height > found.width


def test_a_file_of_too_many_bytes_and_one_that_is_no_file_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "MAX_BYTES", 1000)
    (tmp_path / "a.png").write_bytes(bytes(1001))
    with pytest.raises(ValueError, match="a.png has more than 1,000 bytes"):
        read_image(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")                            # opening it would wait for ever
    for file in (tmp_path / "pipe.png", tmp_path, tmp_path / "none.png"):
        with pytest.raises(FileNotFoundError, match=f"no image {file}"):
            read_image(file)


def test_metadata_that_cannot_be_read_refuses_no_image():
    garbage = b"Exif\0\0" + b"II*\0" + struct.pack("<IH", 8, 1) + struct.pack("<HHII", 0x0112, 2, 2 ** 31, 2 ** 31)
    upright = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8)).convert("RGB")
    for format in ("JPEG", "PNG", "WEBP"):
        for exif in (garbage, b"Exif\0\0 no TIFF at all", b"\xff" * 40):
            assert read_image(saved(upright, format, exif=exif)).size == (8, 6)


def test_a_mistyped_exif_tag_leaves_the_orientation_readable():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "x"
    mistyped = exif.tobytes().replace(b"x\0", b"\xff\xfe")
    assert read_image(saved(flat("RGB", 0), "JPEG", exif=mistyped)).size == (4, 6)


@pytest.mark.parametrize("values, expected", [
    ([0, .5, 1], [0, 128, 255]), ([0, 100, 255], [0, 100, 255]), ([0, 32768, 65535], [0, 128, 255]),
    ([0, 5.1e5, 1e6], [0, 130, 255]), ([np.nan, .5, 1], [0, 128, 255]), ([-3, 100, np.inf], [0, 100, 0]),
    ([0, 0, 0], [0, 0, 0])])
def test_floats_are_scaled_by_the_least_usual_white_that_fits(values, expected):
    image = Image.fromarray(np.array([values], dtype=np.float32))
    assert np.asarray(read_image(saved(image, "TIFF")))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("values, expected", [([0, 100, 255], [0, 100, 255]), ([0, 32768, 65535], [0, 128, 255]),
                                              ([0, 10 ** 9, 2 * 10 ** 9], [0, 128, 255])])
def test_32_bit_integers_likewise(values, expected):
    image = Image.fromarray(np.array([values], dtype=np.int32))
    assert np.asarray(read_image(saved(image, "TIFF")))[0, :, 0].tolist() == expected


def test_a_float_map_of_netpbm_is_scaled_like_other_floats():
    for values, expected in (([0, 1], [0, 255]), ([0, 1e6], [0, 255])):
        found = read_image(File(b"Pf 2 1 -1\n" + struct.pack("<ff", *values)))
        assert np.asarray(found)[0, :, 0].tolist() == expected


def test_a_dark_16_bit_pgm_stays_dark():
    found = read_image(File(b"P5 2 1 65535\n" + struct.pack(">HH", 0, 200)))
    assert np.asarray(found)[0, :, 0].tolist() == [0, 1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_a_damaged_file_is_an_image_or_a_clear_error(format):
    rng = np.random.default_rng(1)
    noise = Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8))
    whole = saved(noise, format).read_bytes()
    for _ in range(150):
        damaged = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 400), rng.integers(1, 6)):
            damaged[place] = rng.integers(0, 256)
        if rng.random() < .3:
            damaged = damaged[:rng.integers(0, len(whole))]
        try:
            assert read_image(File(bytes(damaged))).mode == "RGB"
        except ValueError as error:
            assert "File object" in str(error)                  # its name
