"""Claims about chat.py: the cache, images on the way, streaming, what a line means, no need of deepspeed."""
import ast
import io
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as serialize

import chat as program
from chat import HELP, Album, Chat, digest_of, fingerprint, newest, parse, talk
from data import Encoded, Round, encode_round, tensors
from llama import Cache, Llama, read_file
from mmca import IMAGE
from visualchat import TRAINED, save

ROOT = Path(__file__).parent.parent


@pytest.fixture
def chat(model, tokenizer):
    return Chat(model, tokenizer)


def ask(chat, files, limit=8, pieces=None):
    """The answer's ids; pieces: how many to take before the answer is closed."""
    before = len(chat.ids)
    new = encode_round(Round(tuple(files), "?"), chat.n_images, not chat.ids, chat.tokenizer, 4)
    answer = chat.ask("?", files, limit)
    list(islice(answer, pieces))
    answer.close()
    assert chat.ids[before:before + len(new.ids)] == new.ids and chat.ids[-1] == chat.tokenizer.eos
    return chat.ids[before + len(new.ids):-1]


def images(files):
    return torch.cat([tensors(Encoded([], [], [], [file]), 16)["images"] for file in files])


def from_scratch(chat, answer, files):
    """The last answer's tokens again and the one after them, from the whole history at once."""
    start = len(chat.ids) - len(answer) - 1
    ids, kind = (torch.tensor([values[:start]]) for values in (chat.ids, chat.kind))
    tokens = chat.model.generate(ids, kind, images(files) if files else None)
    return [token.item() for token in islice(tokens, len(answer) + 1)]


# ---- the cache ----

def test_answers_equal_those_from_the_whole_history(chat, pictures):
    files, said, ended = [], set(), []
    for new, limit, pieces in (([0, 1], 60, None), ([], 40, 3), ([2], 7, None), ([], 40, 1), ([3, 0], 60, None)):
        files += [pictures[i] for i in new]
        answer = ask(chat, [pictures[i] for i in new], limit, pieces)
        *again, after = from_scratch(chat, answer, files)
        assert answer == again
        assert pieces or len(answer) == limit or after == chat.tokenizer.eos
        said, ended = said | set(answer), ended + [after == chat.tokenizer.eos]
    assert len(said) > 8 and len(set(ended)) == 2               # many tokens; some answers end, some are cut


def test_the_cache_holds_what_a_full_forward_pass_gives(chat, pictures):
    ask(chat, pictures[:2])
    ask(chat, pictures[2:3], 40, pieces=4)
    ids, kind, whole = torch.tensor([chat.ids]), torch.tensor([chat.kind]), Cache(chat.model.llama, 1, 512)
    with torch.no_grad():
        chat.model.llama(chat.model.splice(ids, kind, images(pictures[:3])), kind, cache=whole)
    texts, shown = chat.cache.past[0]
    assert (texts + shown, shown) == (len(chat.ids) - 2, 12)            # the last word and </s> are yet to come
    for found, expected, count in ((chat.cache.text, whole.text, texts), (chat.cache.image, whole.image, shown)):
        for (ours,), (full,) in zip(found, expected):
            torch.testing.assert_close(ours[:, :, :count], full[:, :, :count], atol=1e-4, rtol=0)


@pytest.mark.parametrize("forward", [0, 4], ids=["reading the question", "answering"])
def test_ctrl_c_in_the_middle_of_a_forward_pass_leaves_a_sound_conversation(chat, pictures, forward):
    ask(chat, pictures[:1])
    seen = []

    def interrupt(*_):
        seen.append(1)
        if len(seen) == forward + 1:
            raise KeyboardInterrupt

    halfway = chat.model.llama.layers[1].post_attention_layernorm       # the cache holds a part already
    hook = halfway.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        ask(chat, pictures[1:2])
    hook.remove()
    files = pictures[:chat.n_images] + pictures[3:]
    answer = ask(chat, pictures[3:])
    assert answer == from_scratch(chat, answer, files)[:-1] != []


def test_answers_under_causal_attention_equal_those_from_the_whole_history(chat, pictures):
    chat.model.llama.attention = "causal"
    for files, shown in ((pictures[:2], 2), ([], 2), (pictures[2:3], 3)):
        answer = ask(chat, files)
        assert answer == from_scratch(chat, answer, pictures[:shown])[:-1]


# ---- the album ----

def passes(model):
    """What the towers are given from now on, pass by pass: images of the ViT, tokens of LLaMA's layers."""
    given = {"vit": [], "llama": []}
    model.vit.register_forward_pre_hook(lambda _, args: given["vit"].append(len(args[0])))
    width = model.llama.config.hidden_size
    model.llama.layers[0].post_attention_layernorm.register_forward_pre_hook(
        lambda _, args: given["llama"].append(args[0].numel() // width))
    return given


def test_a_picture_that_was_seen_costs_no_pass_over_it_in_any_conversation(chat, pictures):
    first = ask(chat, pictures[:2])
    given, again = passes(chat.model), chat.again()
    assert ask(again, pictures[:2]) == first
    text = len(encode_round(Round(tuple(pictures[:2]), "?"), 0, True, chat.tokenizer, 4).ids) - 2 * 4
    assert given["vit"] == [] and given["llama"][0] == text and set(given["llama"][1:]) == {1}
    ask(again, pictures[2:3])
    assert given["vit"] == [1]


def test_pictures_are_kept_on_disk_and_a_damaged_file_is_made_anew(chat, pictures, tmp_path):
    kept = Chat(chat.model, chat.tokenizer, Album(chat.model, tmp_path / "album"))
    first = ask(kept, [*pictures[:2], pictures[0]])
    assert first == ask(chat, [*pictures[:2], pictures[0]]) and len(list((tmp_path / "album").iterdir())) == 2
    given, later = passes(chat.model), Chat(chat.model, chat.tokenizer, Album(chat.model, tmp_path / "album"))
    assert ask(later, [*pictures[:2], pictures[0]]) == first and given["vit"] == []
    for damage in ("nonsense", "another shape", "no checksum", "another value"):
        for file in (tmp_path / "album").iterdir():
            found = read_file(file)
            found["image_kv"] = torch.zeros(3) if damage == "another shape" else found["image_kv"] + 1
            if damage == "no checksum":
                del found["checksum"]
            file.write_bytes(b"nonsense" if damage == "nonsense" else serialize(found))
        for passes_of_vit in ([3], []):                         # damaged: looked at again; then kept again
            given["vit"].clear()
            again = Chat(chat.model, chat.tokenizer, Album(chat.model, tmp_path / "album"))
            assert ask(again, [*pictures[:2], pictures[0]]) == first and given["vit"] == passes_of_vit


def test_the_album_holds_the_newest_pictures(chat, pictures, monkeypatch):
    monkeypatch.setattr(Album, "NEWEST", 2)
    ask(chat, pictures[:3])
    digests = [digest_of(picture) for picture in pictures]
    assert [chat.album.find(digest) is None for digest in digests] == [True, False, False, True]
    given = passes(chat.model)
    assert chat.album.show(pictures[:3], digests[:3]).shape[2] == 3 * 4 and given["vit"] == [1]
    assert chat.album.show(pictures[3:], digests[3:]) is None       # to be read together with its question


def test_pictures_found_in_a_folder_do_not_fill_the_memory(chat, pictures, tmp_path, monkeypatch):
    ask(Chat(chat.model, chat.tokenizer, Album(chat.model, tmp_path)), pictures)
    monkeypatch.setattr(Album, "NEWEST", 2)
    album = Album(chat.model, tmp_path)
    assert album.show(pictures, [digest_of(picture) for picture in pictures]).shape[2] == 4 * 4
    assert len(album.pages) == 2


def test_what_was_seen_is_kept_even_if_the_file_changes_while_the_answer_is_made(chat, pictures, tmp_path):
    picture = tmp_path / "a.png"
    shutil.copy(pictures[0], picture)
    for _ in chat.ask("?", [picture]):
        shutil.copy(pictures[1], picture)
    assert list(chat.album.pages) == [digest_of(pictures[0])]


def test_another_training_result_or_tower_has_another_fingerprint(overfitted, config, tmp_path):
    parts = {name: p for name, p in overfitted[2].named_parameters() if p.requires_grad}
    names = []
    for folder in ("a", "b", "c"):
        save(tmp_path / folder, parts if folder != "b" else {name: p + 1 for name, p in parts.items()}, config)
        names.append(fingerprint(tmp_path / folder, config))
    assert names[0] == names[2] != names[1]
    shutil.copytree(config.vit, tmp_path / "vit")
    assert fingerprint(tmp_path / "a", replace(config, vit=str(tmp_path / "vit"))) != names[0]


# ---- images and limits ----

def test_a_later_image_gets_the_next_number(chat, pictures):
    for files in (pictures[:2], [], pictures[2:3]):
        ask(chat, files)
    text = chat.tokenizer.decode([i for i, kind in zip(chat.ids, chat.kind) if kind != IMAGE])
    assert re.findall(r"### Image (\d+):", text) == ["1", "2", "3"] and chat.n_images == 3


def state(chat):
    return list(chat.ids), list(chat.kind), chat.n_images, list(chat.cache.past)


@pytest.mark.parametrize("content", [None, b"", b"no picture at all"], ids=["absent", "empty", "text"])
def test_an_unreadable_picture_leaves_the_conversation_as_it_was(chat, pictures, tmp_path, content):
    bad = tmp_path / "bad.png"
    if content is not None:
        bad.write_bytes(content)
    ask(chat, pictures[:1])
    before = state(chat)
    with pytest.raises((OSError, ValueError), match="bad.png"):
        list(chat.ask("?", [pictures[1], bad]))
    assert state(chat) == before
    assert ask(chat, pictures[1:2])


def test_a_full_context_is_refused_and_leaves_the_conversation_as_it_was(chat, pictures):
    ask(chat, pictures[:1])
    said, new = len(chat.ids), len(encode_round(Round((), "?"), 1, False, chat.tokenizer, 4).ids)
    chat.model.llama.config = replace(chat.model.llama.config, max_position_embeddings=said + new)
    before = state(chat)
    with pytest.raises(ValueError, match=f"{said} .*{new} .*{said + new}: .new starts over"):
        list(chat.ask("?"))
    assert state(chat) == before
    chat.model.llama.config = replace(chat.model.llama.config, max_position_embeddings=said + new + 1)
    assert len(ask(chat, [])) == 1


# ---- streaming ----

@pytest.mark.parametrize("text", ["A cat.", "é 猫 🐈 x", "🐈🐈", "  two\n", ""])
def test_pieces_join_to_the_answer_and_hold_whole_characters(chat, text):
    ids = [*chat.tokenizer.encode(text), chat.tokenizer.eos]
    chat.model.generate = lambda *_: (torch.tensor([i]) for i in ids)      # a character takes up to four
    pieces = list(chat.ask("?"))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert chat.ids[-len(ids):] == ids


def test_an_answer_cut_within_a_character_shows_all_that_was_decoded(chat):
    ids = chat.tokenizer.encode("A 🐈")[:-1]
    chat.model.generate = lambda *_: (torch.tensor([i]) for i in ids)
    assert "".join(chat.ask("?")) == chat.tokenizer.decode(ids)


# ---- a line ----

@pytest.fixture
def here(tmp_path, monkeypatch):
    for name in ("a.png", "b.JPG", "my cat.png"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)


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
    ("a.png", ["a.png"], "")])
def test_a_line_is_pictures_and_a_question(here, line, files, question):
    assert parse(line, first=3) == ([Path(file) for file in files], question)


@pytest.mark.parametrize("line", ["What is c.png ?", '"c d.jpg"', "sub/c.PNG"])
def test_a_named_picture_that_is_absent_is_an_error(here, line):
    with pytest.raises(FileNotFoundError, match="no picture .*(c.png|c d.jpg|c.PNG)"):
        parse(line, first=1)


def test_the_newest_result_is_taken(tmp_path):
    with pytest.raises(FileNotFoundError, match="train first"):
        newest(tmp_path)
    for name, time in (("a", 1e9), ("b", 3e9), ("c", 2e9)):
        (tmp_path / name).mkdir()
        (tmp_path / name / TRAINED).touch()
        os.utime(tmp_path / name / TRAINED, (time, time))
    assert newest(tmp_path) == tmp_path / "b"


# ---- the program ----

def test_a_bad_line_is_explained_and_the_conversation_goes_on(chat, pictures, tmp_path, monkeypatch, capsys):
    generate = chat.model.generate
    chat.model.generate = lambda *args: islice(generate(*args), 3)
    (tmp_path / "bad.png").write_text("no picture")
    a, b = pictures[:2]
    lines = ["", str(b), f"Is {tmp_path}/none.png ?", f"Is {tmp_path}/bad.png ?", "What is it?", "Now?", "/new",
             "Hi?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    talked, again = [], chat.again
    chat.again = lambda: talked.append(again()) or talked[-1]
    talk(chat, [a])
    out = capsys.readouterr().out
    for text in (f"no picture {tmp_path}/none.png", "bad.png is no readable picture", f"image 2: {b}"):
        assert text in out
    assert chat.kind.count(IMAGE) == 8 and chat.ids.count(1) == 2
    assert [new.ids.count(1) for new in talked] == [1] and talked[0].n_images == 0


def test_pictures_are_announced_only_if_all_can_be_read_and_no_path_is_taken_for_a_command(
        chat, pictures, tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.png").write_text("no picture")
    lines = [f"{pictures[0]} {tmp_path}/bad.png Compare them.", f"{tmp_path}/none.png What is it?", "/help"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    talk(chat, [])
    out = capsys.readouterr().out
    assert "image 1" not in out and f"no picture {tmp_path}/none.png" in out and out.count(HELP) == 2
    assert chat.ids == []


def test_a_picture_joins_once_even_if_it_cannot_be_kept(chat, pictures, monkeypatch, capsys):
    def full(*_):
        raise OSError("no space left")

    generate = chat.model.generate
    chat.model.generate = lambda *args: islice(generate(*args), 3)
    monkeypatch.setattr(Album, "add", full)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\nAnd now?\n"))
    talk(chat, [pictures[0]])
    assert "no space left" in capsys.readouterr().out and chat.n_images == 1
    assert chat.ids.count(chat.tokenizer.bos) == 2              # two rounds, each begins with one


@pytest.mark.parametrize("given, said", [
    (["--temperature", "-1"], "0 or more"), (["--temperature", "inf"], "0 or more"),
    (["--top-p", "0"], "at most 1"), (["--top-p", "0.5"], "does nothing without --temperature"),
    (["--keep", str(ROOT / "README.md")], "--keep"),
    ([str(ROOT / "none.png"), "--question", "?"], "no picture")])
def test_a_bad_setting_ends_the_program_with_a_line(overfitted, config, tmp_path, monkeypatch, capsys, given,
                                                           said):
    save(tmp_path / "run", {name: p for name, p in overfitted[2].named_parameters() if p.requires_grad}, config)
    monkeypatch.setattr(sys, "argv", ["chat.py", "--model", str(tmp_path / "run"), *given])
    with pytest.raises(SystemExit) as end:
        program.main()
    assert said in f"{end.value} {capsys.readouterr().err}"


def test_the_program_answers_where_deepspeed_cannot_be_imported(overfitted, config, pictures, tmp_path):
    c, model = pictures[2], overfitted[2]                       # trained to give the two answers below
    save(tmp_path / "out/run", {name: p for name, p in model.named_parameters() if p.requires_grad}, config)
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub/deepspeed.py").write_text("raise ImportError('no deepspeed here')")

    def python(*args):
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "stub")}
        return subprocess.run([sys.executable, *args], cwd=tmp_path, env=environment, capture_output=True,
                              text=True)

    assert "no deepspeed here" in python("-c", "import deepspeed").stderr
    done = python(ROOT / "chat.py", "--question", "What is it?", "--question", f'What is image 1? "{c}"')
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["out/run: LLaMA-2 tiny, mmca, on cpu", "> What is it?", "Question 1.",
                                        f'> What is image 1? "{c}"', f"image 1: {c}", "You look at it."]


def test_compiling_is_asked_for_on_the_command_line(overfitted, config, tmp_path, monkeypatch, capsys):
    save(tmp_path / "run", {name: p for name, p in overfitted[2].named_parameters() if p.requires_grad}, config)
    calls = []
    monkeypatch.setattr(Llama, "compile_step", lambda self: calls.append(self))     # tests/test_llama.py compiles
    for extra in ([], ["--compile"]):
        assert not calls
        monkeypatch.setattr(sys, "argv",
                            ["chat.py", "--model", str(tmp_path / "run"), "--question", "What is it?", *extra])
        program.main()
    assert len(calls) == 1 and capsys.readouterr().out.count("Question 1.") == 2

    def failing(self):
        raise RuntimeError("the compiler fails")

    monkeypatch.setattr(Llama, "compile_step", failing)
    with pytest.raises(SystemExit, match="compiler fails\n.*try without"):
        program.main()
    monkeypatch.setenv("PATH", str(tmp_path))                   # where no compiler is
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SystemExit):
        program.main()
    assert "needs a C++ compiler" in capsys.readouterr().err


def test_a_torch_that_knows_gpus_runs_where_there_is_none(overfitted, config, tmp_path, monkeypatch, capsys):
    save(tmp_path / "run", {name: p for name, p in overfitted[2].named_parameters() if p.requires_grad}, config)
    monkeypatch.setattr(torch.accelerator, "current_accelerator",
                        lambda check_available=False: None if check_available else torch.device("cuda"))
    monkeypatch.setattr(sys, "argv", ["chat.py", "--model", str(tmp_path / "run"), "--question", "What is it?"])
    program.main()
    assert "on cpu" in capsys.readouterr().out


def test_only_train_imports_deepspeed():
    importing = set()
    for file in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            importing |= {file.name for name in names if name.split(".")[0] == "deepspeed"}
    assert importing == {"train.py"}
