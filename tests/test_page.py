"""Claims about page.py: looks are those of the formula, and the page shows them in a real browser."""
import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from io import BytesIO
from itertools import count
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from chat import Chat
from data import Encoded
from mmca import TEXT, matrix, masked_softmax
from page import draw_heatmap, image_url, looks_of, patches_of, word_looks, words_of, write_page
from pixels import load_pixels, normalized
from terminal import read_options
from training import ROOT
from visualchat import ENCODERS

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def chat(model, tokenizer, image_files):
    chat = Chat(model, tokenizer)
    chat.max_new_tokens = 12
    chat.ask("What is it?", *image_files[:2])
    chat.ask("And now?", image_files[2])
    return chat


# ---- what is looked at ----

def test_looks_are_the_second_softmax_of_the_formula_at_the_position_that_makes_the_word(chat):
    encoded, llama = chat.encoded(), chat.model.llama
    looks = looks_of(chat.model, encoded)
    kind = torch.tensor([encoded.kind])
    seen = {}
    llama.watch = lambda number, q, k, layout: seen.setdefault(number, (q, k, layout))
    with torch.no_grad():
        pixels = torch.stack([load_pixels(file, 16) for file in chat.images])
        x = chat.model.embed(torch.tensor([encoded.ids]), kind, chat.model.image_tokens(pixels))
        llama.attention = "written"                             # queries for all positions, in the layout's order
        llama(x, kind)
    llama.watch, llama.attention = None, "mmca"
    answers = [t - 1 for t, label in enumerate(encoded.labels) if label >= 0]
    for number, (q, k, layout) in seen.items():
        at = torch.empty(len(encoded.ids), dtype=torch.long)
        at[layout.index] = torch.arange(len(layout.index))
        # 4 heads of queries, 2 of keys
        q, k = q[at].transpose(0, 1), k[at].transpose(0, 1).repeat_interleave(2, dim=0)
        whole = masked_softmax(q @ k.mT * q.shape[-1] ** -0.5, matrix(kind)[0] == 2).mean(0)    # (S, S)
        expected = whole[answers][:, kind[0] != TEXT].unflatten(1, (3, 4))
        torch.testing.assert_close(looks.tokens[number], expected, atol=1e-5, rtol=0)
    sums = looks.tokens.sum((2, 3))
    torch.testing.assert_close(sums, torch.ones_like(sums))
    first = len(chat.rounds[0].ids) + 1
    assert not looks.tokens[:, :first, 2].any() and looks.tokens[:, first:, 2].any()        # it was not shown yet


def test_patches_are_the_weights_of_the_resampler(model, image_files):
    pixels = torch.stack([load_pixels(file, 16) for file in image_files])
    tokens, patches = patches_of(model, pixels)
    assert patches.shape == (4, 4, 4) and torch.equal(tokens, model.image_tokens(pixels))
    attention, given = torch.nn.MultiheadAttention(128, 1, batch_first=True), []
    pool = model.vit.attn_pool.attn
    attention.load_state_dict(pool.state_dict())
    handle = pool.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    model.vit(normalized(pixels))
    handle.remove()
    torch.testing.assert_close(patches, attention(*given[0])[1])
    assert not pool._forward_pre_hooks


def test_without_an_image_or_without_mmca_there_is_nothing_to_show(chat, model):
    with pytest.raises(ValueError, match="nothing to show: where a model looked"):
        looks_of(model, Encoded([1, 5], [TEXT, TEXT], [-100, 5], []))
    model.llama.attention = "causal"
    with pytest.raises(ValueError, match="trained with mmca"):
        looks_of(model, chat.encoded())
    assert model.llama.watch is None


@pytest.mark.parametrize("text", ["A cat.", "A big 🐈, isn't it?", "two\nlines", "é"])
def test_words_join_to_the_answer_and_share_its_tokens_among_them(tokenizer, text):
    ids = tokenizer.encode(text)
    words = words_of(ids, tokenizer)
    assert "".join(word for word, _ in words) == text
    assert sum((places for _, places in words), []) == [*range(len(ids))]
    assert len(words) == len(text.split())


# ---- the files ----

def test_a_heat_map_is_drawn_beside_each_image(chat, tmp_path):
    draw_heatmap(chat, tmp_path / "heat.png")
    image = Image.open(tmp_path / "heat.png").convert("RGB")
    assert image.width == 3 * 330 + 10 and len(image.getcolors(1 << 20)) > 1000
    chat.ask("And now?")
    chat.undo()
    draw_heatmap(chat, tmp_path / "again.jpg")
    assert Image.open(tmp_path / "again.jpg").format == "JPEG"


def test_an_image_in_a_page_has_nothing_but_its_pixels(tmp_path):
    about = PngInfo()
    about.add_text("Author", "somebody")
    Image.new("RGB", (600, 300), "red").save(tmp_path / "a.png", pnginfo=about,
                                             exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0")
    head, _, content = image_url(tmp_path / "a.png").partition(",")
    content = base64.b64decode(content)
    assert head == "data:image/webp;base64" and b"somebody" not in content and b"EXIF" not in content
    assert Image.open(BytesIO(content)).size == (448, 224)


def test_texts_and_names_are_escaped_and_nothing_comes_from_elsewhere(chat, image_files, tmp_path, monkeypatch):
    shutil.copy(image_files[0], strange := tmp_path / "<b>DATA ROUNDS.png")
    chat.ask("</script><script>alert(1)</script> ROUNDS", strange)
    write_page(chat, tmp_path / "talk.html")
    page = (tmp_path / "talk.html").read_text()
    assert page.count("<script") == 2 and "&lt;script&gt;alert(1)" in page and "<b>" not in page
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import|https?:", page)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    layers, words, images, n = data["shape"]
    assert (layers, images, n) == (3, 4, 4) and words == page.count('class="word"') > 0
    looks = word_looks(chat, looks_of(chat.model, chat.encoded()))
    expected = torch.stack([look for one in looks for _, look in one], dim=1).sum(-1)   # (layers, words, images)
    found = torch.tensor(data["shares"]).view(layers, words, images)
    torch.testing.assert_close(found[1:], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(found[0], expected.mean(0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention, vit, words, said", [
    ("mmca", "", "--page x.html", ""), ("written", "", "--heatmap x.png", ""), ("causal", "", "--quiet", ""),
    ("causal", "", "--page x.html", "where a model looked is seen with mmca"),
    ("mmca", "other", "--heatmap x.png", "and QWen-VL's encoder"), ("mmca", "", "--pag x.html", "unrecognized")])
def test_a_result_whose_looks_cannot_be_shown_is_refused_before_anything_is_answered(
        tmp_path, monkeypatch, capsys, attention, vit, words, said):
    monkeypatch.setitem(ENCODERS, "other", object)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"other": {}}')
    (tmp_path / "config.json").write_text(json.dumps({"attention": attention, "vit": vit and str(tmp_path / vit)}))
    monkeypatch.setattr(sys, "argv", ["chat.py", "--model", str(tmp_path), *words.split()])
    with pytest.raises(SystemExit) if said else contextlib.nullcontext():
        read_options("")
    assert said in capsys.readouterr().err


# ---- the page in a browser ----

class Browser:
    """Chromium, driven through pipes by its DevTools protocol."""

    def __init__(self, folder: Path):
        theirs, self.to = os.pipe()
        self.back, ours = os.pipe()
        command = (f'exec "$0" --headless --no-sandbox --disable-gpu --disable-quic --no-first-run '
                   f"--disable-background-networking --disable-component-update --disable-sync "
                   f'--remote-debugging-pipe --user-data-dir="$1" about:blank 3<&{theirs} 4>&{ours}')
        self.process = subprocess.Popen(["bash", "-c", command, BROWSER, str(folder)], pass_fds=(theirs, ours),
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs)
        os.close(ours)
        self.numbers, self.rest, self.events, self.session = count(1), b"", [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=900, height=900, deviceScaleFactor=1, mobile=False)

    def read(self) -> dict:
        while b"\0" not in self.rest:
            assert (chunk := os.read(self.back, 1 << 16)), "the browser ended"
            self.rest += chunk
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **params) -> dict:
        number, session = next(self.numbers), {"sessionId": self.session} if self.session else {}
        sent = {"id": number, "method": method, "params": params} | session
        os.write(self.to, json.dumps(sent).encode() + b"\0")
        while (message := self.read()).get("id") != number:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def open(self, file: Path):
        self.call("Page.navigate", url=file.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.read())

    def run(self, code: str):
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                      windowsVirtualKeyCode={"Tab": 9, "ArrowRight": 39}[key])

    def maps(self) -> list[str]:
        return self.run('[...document.querySelectorAll("canvas")].map(canvas => canvas.toDataURL())')

    def close(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def browser(tmp_path):
    if not BROWSER:
        pytest.skip("no Chromium is installed (in Debian: apt-get install chromium)")
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


def test_in_a_browser_hovering_and_focusing_a_word_show_where_it_looked(browser, tmp_path):
    chat = Chat.open(ROOT / "weights/tiny/chat")
    chat.ask("Describe image 1.", *(ROOT / f"examples/{name}.png" for name in "ab"))
    chat.ask("<script>document.title = 'taken over'</script> What changed from image 1 to image 2?")
    write_page(chat, tmp_path / "talk.html")
    browser.open(tmp_path / "talk.html")
    n_words = browser.run('document.querySelectorAll(".word").length')
    assert n_words == sum(len(words_of(one.ids, chat.tokenizer)) for one in chat.rounds)
    maps = [browser.maps()]
    place = browser.run('(r => [r.x + r.width / 2, r.y + r.height / 2])'
                        '(document.querySelector(".word").getBoundingClientRect())')
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])         # hover
    maps.append(browser.maps())
    for key in ("Tab", "Tab", "Tab", "ArrowRight"):             # from the list of layers to the first words
        browser.press(key)
        maps.append(browser.maps())
    layer = ('document.getElementById("layer").value = 2; '
             'document.getElementById("layer").dispatchEvent(new Event("change"))')
    browser.run(layer)
    maps.append(browser.maps())
    assert all(len(each) == 2 for each in maps)
    assert maps[0] != maps[1] != maps[4] != maps[5] != maps[6], "the maps did not change"
    shares = browser.run('[...document.querySelectorAll("output")].map(output => parseInt(output.textContent))')
    assert 99 <= sum(shares) <= 101
    assert browser.run("document.title") == "A conversation about images"
    assert browser.run('document.querySelectorAll("main script").length') == 0
    assert "<script>document.title" in browser.run('document.querySelector("main").innerText')
    asked = [event["params"]["request"]["url"] for event in browser.events
             if event.get("method") == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [(tmp_path / "talk.html").as_uri()]
    errors = [event for event in browser.events if event.get("method") == "Log.entryAdded"]
    assert not errors, errors
