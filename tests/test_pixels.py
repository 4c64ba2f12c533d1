"""Claims about pixels.py: images of every kind and mode, upright, scaled; large, damaged and hostile files."""
import io
import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image

import pixels
from pixels import normalized, read_image, to_pixels


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
    with pytest.raises(ValueError, match="large.png has 9000 x 9000 pixels, expected at most 80,000,000: make it"):
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
