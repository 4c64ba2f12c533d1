r"""Claims about names.py: which words of a line are images, however written, and which numbers are none."""
import re
from pathlib import Path

import pytest
from PIL import Image

from names import absent, as_file, parse
from pixels import read_image


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with some images, two of them with names that need care, and other files."""
    for name in ("a.png", "b.JPG", "my cat.png", "photo(1).png", "it's.png", "scan", "(1).png",
                 "[cover].png"):
        Image.new("RGB", (4, 4), "red").save(tmp_path / name, "PNG")
    (tmp_path / "report.pdf").write_text("no image")
    (tmp_path / "LICENSE").write_text("no image")
    (tmp_path / "broken.png").write_text("no image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("line, files, question", [
    ("What's this?", [], "What's this?"),
    ("What changed from a.png to b.JPG?", ["a.png", "b.JPG"], "What changed from image 3 to image 4?"),
    ("Is this the same? a.png, b.JPG.", ["a.png", "b.JPG"], "Is this the same?"),
    ('"my cat.png" isn\'t it a cat?', ["my cat.png"], "isn't it a cat?"),
    ('Is "my cat.png" a cat?', ["my cat.png"], "Is image 3 a cat?"),
    ("Is it 'a.png', or (b.JPG)?", ["a.png", "b.JPG"], "Is it image 3, or image 4?"),
    ("is it ~red or ~nobody/x?", [], "is it ~red or ~nobody/x?"),
    ('What does "no entry" mean?', [], 'What does "no entry" mean?'),
    ("Is it 3.5 m, i.e. big? Don't know.", [], "Is it 3.5 m, i.e. big? Don't know."),
    ("a.png", ["a.png"], ""),
    # dropped from a file manager
    ("'my cat.png' What is it?", ["my cat.png"], "What is it?"),
    (r"my\ cat.png What is it?", ["my cat.png"], "What is it?"),
    ("my cat.png What is it?", ["my cat.png"], "What is it?"),
    ("What is my cat.png?", ["my cat.png"], "What is image 3?"),
    ("file://{here}/my%20cat.png What is it?", ["{here}/my cat.png"], "What is it?"),
    ("file:///a.png.", None, "no image"),
    ("~/a.png What is it?", ["{here}/a.png"], "What is it?"),
    ("./a.png What is it?", ["a.png"], "What is it?"),
    (r"photo\(1\).png What is it?", ["photo(1).png"], "What is it?"),
    ("photo(1).png: what is it?", ["photo(1).png"], "what is it?"),
    ('"it\'s.png" Is it red?', ["it's.png"], "Is it red?"),
    # written like code or a link
    ("[a.png] Describe it.", ["a.png"], "Describe it."), ("`a.png` Describe it.", ["a.png"], "Describe it."),
    ("<a.png> Describe it.", ["a.png"], "Describe it."),
    ("Describe “my cat.png”.", ["my cat.png"], "Describe image 3."),
    ("@a.png Describe it.", ["a.png"], "Describe it."), ("Describe ('a.png').", ["a.png"], "Describe image 3."),
    # no suffix, or that of no image
    ("scan What is it?", ["scan"], "What is it?"), ("./scan What is it?", ["scan"], "What is it?"),
    ("What does the LICENSE say?", [], "What does the LICENSE say?"),
    ("What does report.pdf say?", [], "What does report.pdf say?"),
    ("Is it red and/or blue?", [], "Is it red and/or blue?"), ("A ratio of 3/4?", [], "A ratio of 3/4?"),
    ("image 2?", [], "image 2?"),
    ("two\nlines,  a.png   and\nmore", ["a.png"], "two\nlines,  image 3   and\nmore"),
    # at the beginning of a sentence that goes on with it
    ("a.png and b.JPG: what changed?", ["a.png", "b.JPG"], "image 3 and image 4: what changed?"),
    ("a.png's shape?", ["a.png"], "image 3's shape?"), ("What color is a.png's shape?", ["a.png"],
                                                        "What color is image 3's shape?"),
    ("(1).png What is it?", ["(1).png"], "What is it?"),
    ("Is [cover].png red?", ["[cover].png"], "Is image 3 red?"),
    # twice, and known
    ("a.png a.png Compare a.png with b.JPG.", ["a.png", "b.JPG"],
     "image 3: Compare image 3 with image 4."),
])
def test_a_line_is_images_and_a_question(here, line, files, question):
    line = line.replace("{here}", str(here))
    if files is None:
        with pytest.raises(FileNotFoundError, match=question):
            parse(line, first=3)
    else:
        assert parse(line, first=3) == ([Path(file.replace("{here}", str(here))) for file in files], question)


@pytest.mark.parametrize("line", [
    "What is c.png ?", '"c d.jpg"', "sub/c.PNG", "photo.heic Describe it.", "Is [none.webp] red?",
    "~/none What is it?", "./none What is it?", "/none/there What is it?", "file:///none What is it?",
    "it\\ is.png ?", "x" * 5000 + ".png"])
def test_what_looks_like_an_image_and_is_absent_is_an_error_that_names_it(here, line):
    with pytest.raises(FileNotFoundError, match="no image .*(c.png|c d.jpg|c.PNG|heic|webp|none|is.png|xxx.png)"):
        parse(line, first=1)


@pytest.mark.parametrize("address", ["http://a.org/a.png", "https://a.org/image?id=3", "HTTPS://a.org",
                                     "ftp://a/b.jpg", "data:image/png;base64,AAAA", "s3://bucket/a.png"])
def test_an_address_is_refused_with_a_sentence(here, address):
    with pytest.raises(ValueError,
                       match=f"{re.escape(address)} is an address, .* save the image, and name its file"):
        parse(f"What is in {address} ?", first=1)


def test_an_image_that_was_shown_is_called_by_its_number_and_does_not_join_again(here):
    def known(path):
        return 2 if path.name == "a.png" else None

    assert parse("a.png What color is it?", 4, known) == ([], "image 2: What color is it?")
    assert parse("Is a.png like b.JPG?", 4, known) == ([Path("b.JPG")], "Is image 2 like image 4?")
    assert parse("Describe a.png.", 4, known) == ([], "Describe image 2.") and parse("a.png", 4, known) == ([], "")


def test_a_file_that_is_named_by_a_path_but_is_no_image_is_taken_for_one_so_that_reading_it_says_so(here):
    for line in ("broken.png ?", "./report.pdf ?", f"{here}/LICENSE ?"):
        assert len(parse(line, 1)[0]) == 1


@pytest.mark.parametrize("question, n_images, numbers", [
    ("What is in image 7?", 3, "7"), ("Do images 1, 2 and 9 differ?", 3, "9"), ("the 5th picture?", 3, "5"),
    ("the fourth photo", 3, "4"), ("image four", 3, "4"), ("Is pic #6 red?", 3, "6"), ("img 0", 3, "0"),
    ("From image 8 to image 9?", 3, "8 or 9"), ("the first and the fifth image", 3, "5"),
    ("Image no. 5", 3, "5"), ("PHOTO NUMBER 12", 3, "12"), ("image 1 or image 3?", 3, ""),
    ("Are there 7 shapes in image 2?", 3, ""), ("the first image", 1, ""), ("Is image 3 one of 12 photos?", 3, ""),
    ("What is it?", 1, ""), ("imagine 9 cats", 1, ""), (f"image {'9' * 5000}?", 1, "")])
def test_a_number_without_an_image_is_noted(question, n_images, numbers):
    note = absent(question, n_images)
    assert note.startswith(f"there is no image {numbers}: {n_images}") if numbers else note == ""


def test_a_question_without_any_image_is_noted():
    assert absent("Hello!", 0) == "no image is shown yet: name a file to show one"


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "YCbCr", "I", "F"])
def test_an_image_from_python_can_have_any_mode(mode):
    image = as_file(Image.new("RGB", (5, 4), "red").convert(mode))
    assert read_image(image).size == (5, 4) and str(image) == "an image without a file"


def test_an_image_from_python_stands_upright_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(as_file(Image.open(tmp_path / "a.jpg"))).size == (4, 8)
