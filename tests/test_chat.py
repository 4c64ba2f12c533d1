"""Claims about chat.py: the cache, new images, streaming, what a line means, no need of deepspeed."""
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

import chat as program
from album import Album
from chat import HELP, Chat, converse, newest, parse
from data import Round, encode_round
from llama import Cache
from mmca import IMAGE, TEXT
from pixels import load_pixels
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


def embedded(chat, ids, kind, files):
    """Embeddings of a whole conversation with these images."""
    images = torch.stack([load_pixels(file, 16) for file in files] or [torch.zeros(3, 16, 16)])
    return chat.model.embed(ids, kind, chat.model.image_tokens(images)[:len(files)])


def from_scratch(chat, answer, files):
    """The last answer's tokens again and the one after them, from the whole history at once."""
    start, cache = len(chat.ids) - len(answer) - 1, Cache(chat.model.llama, 1, 512)
    ids, kind = (torch.tensor([values[:start]]) for values in (chat.ids, chat.kind))
    with torch.no_grad():
        logits = chat.model.prefill(embedded(chat, ids, kind, files), kind, cache)
    return [token.item() for token in islice(chat.model.generate(logits, cache), len(answer) + 1)]


# ---- the cache ----

def test_answers_equal_those_from_the_whole_history(chat, image_files):
    files, said, ended = [], set(), []
    for new, limit, pieces in (([0, 1], 60, None), ([], 40, 3), ([2], 7, None), ([], 40, 1), ([3, 0], 60, None)):
        files += [image_files[i] for i in new]
        answer = ask(chat, [image_files[i] for i in new], limit, pieces)
        *again, after = from_scratch(chat, answer, files)
        assert answer == again
        assert pieces or len(answer) == limit or after == chat.tokenizer.eos
        said, ended = said | set(answer), ended + [after == chat.tokenizer.eos]
    assert len(said) > 8 and len(set(ended)) == 2               # many tokens; some answers end, some are cut


def test_the_cache_holds_what_a_full_forward_pass_gives(chat, image_files):
    ask(chat, image_files[:2])
    ask(chat, image_files[2:3], 40, pieces=4)
    ids, kind, whole = torch.tensor([chat.ids]), torch.tensor([chat.kind]), Cache(chat.model.llama, 1, 512)
    with torch.no_grad():
        chat.model.llama(embedded(chat, ids, kind, image_files[:3]), kind, cache=whole)
    texts, shown = (chat.cache.past[0].count(its_kind) for its_kind in (TEXT, IMAGE))
    assert (texts + shown, shown) == (len(chat.ids) - 2, 12)            # the last word and </s> are yet to come
    for found, expected, count in ((chat.cache.text, whole.text, texts), (chat.cache.image, whole.image, shown)):
        for (ours,), (full,) in zip(found, expected):
            torch.testing.assert_close(ours[:, :, :count], full[:, :, :count], atol=1e-4, rtol=0)


@pytest.mark.parametrize("forward", [0, 4], ids=["reading the question", "answering"])
def test_ctrl_c_in_the_middle_of_a_forward_pass_leaves_a_sound_conversation(chat, image_files, forward):
    ask(chat, image_files[:1])
    seen = []

    def interrupt(*_):
        seen.append(1)
        if len(seen) == forward + 1:
            raise KeyboardInterrupt

    halfway = chat.model.llama.layers[1].post_attention_layernorm       # the cache holds a part already
    hook = halfway.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        ask(chat, image_files[1:2])
    hook.remove()
    files = image_files[:chat.n_images] + image_files[3:]
    answer = ask(chat, image_files[3:])
    assert answer == from_scratch(chat, answer, files)[:-1] != []


@pytest.mark.parametrize("attention", ["causal", "written"])
def test_answers_under_other_attention_equal_those_from_the_whole_history(chat, image_files, attention):
    chat.model.llama.attention = attention
    for files, shown in ((image_files[:2], 2), ([], 2), (image_files[2:3], 3)):
        answer = ask(chat, files)
        assert answer == from_scratch(chat, answer, image_files[:shown])[:-1]


# ---- images and limits ----

def test_a_later_image_gets_the_next_number(chat, image_files):
    for files in (image_files[:2], [], image_files[2:3]):
        ask(chat, files)
    text = chat.tokenizer.decode([i for i, kind in zip(chat.ids, chat.kind) if kind != IMAGE])
    assert re.findall(r"### Image (\d+):", text) == ["1", "2", "3"] and chat.n_images == 3


def state(chat):
    return list(chat.ids), list(chat.kind), chat.n_images, list(chat.cache.past)


@pytest.mark.parametrize("content", [None, b"", b"no image at all"], ids=["absent", "empty", "text"])
def test_an_unreadable_image_leaves_the_conversation_as_it_was(chat, image_files, tmp_path, content):
    bad = tmp_path / "bad.png"
    if content is not None:
        bad.write_bytes(content)
    ask(chat, image_files[:1])
    before = state(chat)
    with pytest.raises((OSError, ValueError), match="bad.png"):
        list(chat.ask("?", [image_files[1], bad]))
    assert state(chat) == before
    assert ask(chat, image_files[1:2])


def test_a_full_context_is_refused_and_leaves_the_conversation_as_it_was(chat, image_files):
    ask(chat, image_files[:1])
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
def test_a_line_is_images_and_a_question(here, line, files, question):
    assert parse(line, first=3) == ([Path(file) for file in files], question)


@pytest.mark.parametrize("line", ["What is c.png ?", '"c d.jpg"', "sub/c.PNG"])
def test_a_named_image_that_is_absent_is_an_error(here, line):
    with pytest.raises(FileNotFoundError, match="no image .*(c.png|c d.jpg|c.PNG)"):
        parse(line, first=1)


def test_the_newest_result_is_taken_or_the_one_that_comes_with_the_code(tmp_path, capsys):
    assert newest(tmp_path).absolute() == ROOT / "weights/tiny/chat"
    assert f"{tmp_path}/ holds no training result, so this is the tiny one" in capsys.readouterr().out
    for name, time in (("a", 1e9), ("b", 3e9), ("c", 2e9)):
        (tmp_path / name).mkdir()
        (tmp_path / name / TRAINED).touch()
        os.utime(tmp_path / name / TRAINED, (time, time))
    assert newest(tmp_path) == tmp_path / "b" and not capsys.readouterr().out


# ---- the program ----

def test_a_bad_line_is_explained_and_the_conversation_goes_on(chat, image_files, tmp_path, monkeypatch, capsys):
    generate = chat.model.generate
    chat.model.generate = lambda *args: islice(generate(*args), 3)
    (tmp_path / "bad.png").write_text("no image")
    a, b = image_files[:2]
    lines = ["", str(b), f"Is {tmp_path}/none.png ?", f"Is {tmp_path}/bad.png ?", "What is it?", "Now?", "/new",
             "Hi?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    begun, again = [], chat.again
    chat.again = lambda: begun.append(again()) or begun[-1]
    converse(chat, [a])
    out = capsys.readouterr().out
    for text in (f"no image {tmp_path}/none.png", "bad.png is no readable image", f"image 2: {b}",
                 "a new conversation without images"):
        assert text in out
    assert chat.kind.count(IMAGE) == 8 and chat.ids.count(1) == 2
    assert [new.ids.count(1) for new in begun] == [1] and begun[0].n_images == 0


def test_images_are_announced_only_if_all_can_be_read_and_no_path_is_taken_for_a_command(
        chat, image_files, tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.png").write_text("no image")
    lines = [f"{image_files[0]} {tmp_path}/bad.png Compare them.", f"{tmp_path}/none.png What is it?", "/help"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    converse(chat, [])
    out = capsys.readouterr().out
    assert "image 1" not in out and f"no image {tmp_path}/none.png" in out and out.count(HELP) == 2
    assert chat.ids == []


def test_an_image_joins_once_even_if_it_cannot_be_kept(chat, image_files, monkeypatch, capsys):
    def full(*_):
        raise OSError("no space left")

    generate = chat.model.generate
    chat.model.generate = lambda *args: islice(generate(*args), 3)
    monkeypatch.setattr(Album, "save", full)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\nAnd now?\n"))
    converse(chat, [image_files[0]])
    assert "no space left" in capsys.readouterr().out and chat.n_images == 1
    assert chat.ids.count(chat.tokenizer.bos) == 2              # two rounds, each begins with one


def test_a_waiting_image_that_is_gone_spoils_one_line_alone(chat, tmp_path, monkeypatch, capsys):
    generate = chat.model.generate
    chat.model.generate = lambda *args: islice(generate(*args), 3)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\nAnd now?\n"))
    assert not converse(chat, [tmp_path / "gone.png"])
    assert capsys.readouterr().out.count(f"no image {tmp_path}/gone.png") == 1
    assert chat.n_images == 0 and chat.ids.count(chat.tokenizer.bos) == 1


def test_no_name_and_no_answer_commands_the_terminal(chat, image_files, tmp_path, monkeypatch, capsys):
    strange = tmp_path / "a\x1b[2Jb.png"
    shutil.copy(image_files[0], strange)
    monkeypatch.setattr(chat, "ask", lambda *_: iter(["yes\n\x1b]0;", "title\x07 \x9b"]))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{strange} What is it?\n{tmp_path}/\x1b[1m.png ?\n"))
    converse(chat, [])
    out = capsys.readouterr().out
    assert "\\x1b[2J" in out and "\\x1b]0;title\\x07 \\x9b" in out and "no image" in out
    assert not {"\x1b", "\x07", "\x9b"} & set(out)


def test_numbers_that_are_none_end_a_round_with_a_sentence_and_not_with_noise(chat, monkeypatch):
    monkeypatch.setattr(type(chat.model), "prefill", lambda *_, **__: torch.full((1, 9), torch.nan))
    with pytest.raises(ValueError, match="values that are no finite numbers: are its weights damaged"):
        "".join(chat.ask("What is it?"))
    assert chat.ids == [] and not any(chat.cache.past)


@pytest.mark.parametrize("lines, status", [
    (b"What is it?\n", 0), (b"none.png ?\nWhat is it?\n", 1), (b"Is it \xff?\nWhat is it?\n", 0)])
def test_a_bad_line_from_another_program_shows_in_the_exit_status(overfitted, config, tmp_path, monkeypatch, lines,
                                                                  status):
    save(tmp_path / "run", {name: p for name, p in overfitted[2].named_parameters() if p.requires_grad}, config)
    monkeypatch.setattr(sys, "argv", ["chat.py", "--model", str(tmp_path / "run")])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    with pytest.raises(SystemExit) as end:
        program.main()
    assert int(end.value.code) == status and not sys.stdin.read()           # all lines were read


@pytest.mark.parametrize("given, said", [
    (["--temperature", "-1"], "0 or more"), (["--temperature", "inf"], "0 or more"),
    (["--top-p", "0"], "at most 1"), (["--top-p", "0.5"], "does nothing without --temperature"),
    (["--keep", str(ROOT / "README.md")], "--keep"), (["--question", " "], "--question: an empty one"),
    ([str(ROOT / "none.png"), "--question", "?"], "no image")])
def test_a_bad_setting_ends_the_program_with_a_line(overfitted, config, tmp_path, monkeypatch, capsys, given,
                                                           said):
    save(tmp_path / "run", {name: p for name, p in overfitted[2].named_parameters() if p.requires_grad}, config)
    monkeypatch.setattr(sys, "argv", ["chat.py", "--model", str(tmp_path / "run"), *given])
    with pytest.raises(SystemExit) as end:
        program.main()
    assert said in f"{end.value} {capsys.readouterr().err}"


def test_the_program_answers_where_deepspeed_cannot_be_imported(overfitted, config, image_files, tmp_path):
    c, model = image_files[2], overfitted[2]                       # trained to give the two answers below
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


def run_program(monkeypatch, folder, *options):
    monkeypatch.setattr(sys, "argv", ["chat.py", "--model", str(folder), "--question", "What is it?", *options])
    program.main()


def test_compiling_is_asked_for_on_the_command_line(overfitted, config, tmp_path, monkeypatch, capsys):
    save(tmp_path / "run", {name: p for name, p in overfitted[2].named_parameters() if p.requires_grad}, config)
    calls = []
    monkeypatch.setattr(program, "compile_step", lambda llama: calls.append(llama) or llama.next_logits)
    for extra in ([], ["--compile"]):                           # tests/test_decode.py compiles
        assert not calls
        run_program(monkeypatch, tmp_path / "run", *extra)
    assert len(calls) == 1 and capsys.readouterr().out.count("Question 1.") == 2

    def failing(llama):
        raise RuntimeError("the compiler fails")

    monkeypatch.setattr(program, "compile_step", failing)
    with pytest.raises(SystemExit, match="compiler fails\n.*try without"):
        run_program(monkeypatch, tmp_path / "run", "--compile")
    monkeypatch.setenv("PATH", str(tmp_path))                   # where no compiler is
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SystemExit):
        run_program(monkeypatch, tmp_path / "run", "--compile")
    assert "needs a C++ compiler" in capsys.readouterr().err


def test_a_result_of_mmca_can_be_run_through_the_written_formula_and_no_other(
        overfitted, config, tmp_path, monkeypatch, capsys):
    parts = {name: p for name, p in overfitted[2].named_parameters() if p.requires_grad}
    save(tmp_path / "mmca", parts, config)
    save(tmp_path / "causal", parts, replace(config, attention="causal"))
    run_program(monkeypatch, tmp_path / "mmca", "--attention", "written")
    assert "LLaMA-2 tiny, written, on cpu" in (out := capsys.readouterr().out) and "Question 1." in out
    for folder, attention in (("mmca", "causal"), ("causal", "written"), ("causal", "mmca")):
        said = f"trained with {folder} attention.*--attention {attention} does not fit"
        with pytest.raises(SystemExit, match=said):
            run_program(monkeypatch, tmp_path / folder, "--attention", attention)
    for options in (["--compile"], ["--keep", str(tmp_path / "kept")]):
        with pytest.raises(SystemExit) as end:
            run_program(monkeypatch, tmp_path / "mmca", "--attention", "written", *options)
        assert options[0] in f"{end.value} {capsys.readouterr().err}"


def test_the_program_starts_without_the_compiler(overfitted, config, tmp_path):
    """torch._dynamo and sympy would take a third of the start."""
    save(tmp_path / "run", {name: p for name, p in overfitted[2].named_parameters() if p.requires_grad}, config)
    arguments = ["chat.py", "--model", str(tmp_path / "run"), "--question", "What is it?"]
    code = (f"import sys; sys.argv = {arguments}\n"
            "import chat; chat.main()\n"
            "assert not {'torch._dynamo', 'torch._inductor', 'sympy'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_a_torch_that_knows_gpus_runs_where_there_is_none(overfitted, config, tmp_path, monkeypatch, capsys):
    save(tmp_path / "run", {name: p for name, p in overfitted[2].named_parameters() if p.requires_grad}, config)
    monkeypatch.setattr(torch.accelerator, "current_accelerator",
                        lambda check_available=False: None if check_available else torch.device("cuda"))
    monkeypatch.setattr(sys, "argv", ["chat.py", "--model", str(tmp_path / "run"), "--question", "What is it?"])
    program.main()
    assert "on cpu" in capsys.readouterr().out
