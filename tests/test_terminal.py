"""Claims about terminal.py: what becomes of lines, commands and keys, in the process and in a real terminal."""
import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path

import pytest

from album import Album
from chat import Chat
from terminal import COMMANDS, Terminal, completions, converse, figures
from training import ROOT

SHIPPED = ROOT / "weights/tiny/chat"


@pytest.fixture
def chat(model, tokenizer):
    chat = Chat(model, tokenizer)
    chat.max_new_tokens = 3
    return chat


def lines_to(terminal, monkeypatch, *lines):
    """Type lines; returns whether all were good."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(map(str, lines)) + "\n"))
    return converse(terminal)


# ---- lines ----

def test_a_bad_line_is_explained_and_the_conversation_goes_on(chat, image_files, tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.png").write_text("no image")
    terminal = Terminal(chat)
    terminal.show([image_files[0]])
    lines = ["", image_files[1], f"Is {tmp_path}/none.png ?", f"Is {tmp_path}/bad.png ?", "What is it?", "Now?"]
    assert not lines_to(terminal, monkeypatch, *lines)
    out, err = capsys.readouterr()
    assert f"no image {tmp_path}/none.png" in err and "bad.png is no readable image" in err
    assert f"image 2: {image_files[1]}" in out
    assert [one.question for one in chat.rounds] == ["What is it?", "Now?"] and chat.images == image_files[:2]


def test_images_are_announced_only_if_all_can_be_read(chat, image_files, tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.png").write_text("no image")
    lines_to(Terminal(chat), monkeypatch, f"{image_files[0]} {tmp_path}/bad.png Compare them.")
    assert "image 1" not in capsys.readouterr().out and chat.rounds == []


def test_an_image_joins_once_even_if_it_cannot_be_kept(chat, image_files, monkeypatch, capsys):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(Album, "save", full)
    with pytest.warns(UserWarning, match="no space left"):
        assert lines_to(Terminal(chat), monkeypatch, f"{image_files[0]} What is it?", "And now?")
    assert chat.images == image_files[:1] and len(chat.rounds) == 2


def test_a_waiting_image_that_is_gone_spoils_one_line_alone(chat, image_files, tmp_path, monkeypatch, capsys):
    gone, terminal = tmp_path / "gone.png", Terminal(chat)
    shutil.copy(image_files[0], gone)
    terminal.show([gone])
    gone.unlink()
    assert not lines_to(terminal, monkeypatch, "What is it?", "And now?")
    assert capsys.readouterr().err.count(f"no image {gone}") == 1 and len(chat.rounds) == 1


def test_no_name_and_no_answer_commands_the_terminal(chat, image_files, tmp_path, monkeypatch, capsys):
    strange = tmp_path / "a\x1b[2Jb.png"
    shutil.copy(image_files[0], strange)
    answer_of = chat.answer_of
    monkeypatch.setattr(chat, "stream", lambda *_: iter(["yes\n\x1b]0;", "title\x07 \x9b"]))
    terminal = Terminal(chat)
    for line in (str(strange), f"{tmp_path}/\x1b[1m.png ?", "/load \x1b[1m.json", "/\x1b[1m"):
        lines_to(terminal, monkeypatch, line)
    with contextlib.suppress(IndexError):                       # there is no round, because `stream` is not real
        terminal.ask("?")
    assert answer_of is not None
    out = "".join(capsys.readouterr())
    assert "\\x1b[2J" in out and "\\x1b]0;title\\x07 \\x9b" in out and "no image" in out
    assert not {"\x1b", "\x07", "\x9b"} & set(out)


def test_an_image_that_was_shown_is_called_by_its_number_whatever_its_name(chat, image_files, tmp_path,
                                                                          monkeypatch, capsys):
    shutil.copy(image_files[0], tmp_path / "copy.png")
    lines_to(Terminal(chat), monkeypatch, f"{image_files[0]} {image_files[1]} What is it?",
             f"{tmp_path}/copy.png What is it?", image_files[1])
    assert [one.question for one in chat.rounds] == ["What is it?", "image 1: What is it?"]
    assert chat.images == image_files[:2]
    assert capsys.readouterr().out.count(f"image 2: {image_files[1]}") == 2         # when it joined and when asked


def test_a_question_about_no_image_and_a_cut_answer_are_noted(chat, image_files, monkeypatch, capsys):
    lines_to(Terminal(chat), monkeypatch, "What is it?", f"{image_files[0]} What is in image 2?")
    out = capsys.readouterr().out
    assert "note: no image is shown yet" in out and "note: there is no image 2: 1 is shown" in out
    assert out.count("note: the answer is cut here: it has 3 tokens, --max-new-tokens allows more") == 2


def test_quiet_prints_answers_alone_and_errors_on_stderr(chat, image_files, monkeypatch, capsys):
    lines_to(Terminal(chat, quiet=True, verbose=True), monkeypatch, f"{image_files[0]} What is in image 9?",
             "/images", "none.png", "/help")
    out, err = capsys.readouterr()
    assert out == chat.answer_of(chat.rounds[0]) + "\n" and err == "no image none.png: it does not exist\n"


def test_images_join_once_where_the_oldest_rounds_are_left_out(chat, image_files, monkeypatch, capsys):
    terminal, chat.forgets = Terminal(chat), True
    for _ in range(4):
        terminal.follow("What is it?")
    chat.model.llama.config = replace(chat.model.llama.config,
                                      max_position_embeddings=len(chat.encoded().ids) + 5)
    lines_to(terminal, monkeypatch, image_files[0], "Which is it?", "And now?")
    assert "note: the context was full, so the oldest rounds are left out; their" in capsys.readouterr().out
    assert chat.images == image_files[:1] and terminal.waiting == []


def test_a_round_that_cannot_be_answered_again_stays_and_waiting_images_wait(chat, image_files, tmp_path,
                                                                            monkeypatch, capsys):
    shutil.copy(image_files[0], gone := tmp_path / "gone.png")
    terminal = Terminal(chat)
    lines_to(terminal, monkeypatch, f"{gone} What is it?", image_files[1])
    said, _ = chat.answer_of(chat.rounds[0]), gone.unlink()
    lines_to(terminal, monkeypatch, "/again")
    assert f"no image {gone}" in capsys.readouterr().err and terminal.waiting == image_files[1:2]
    assert [chat.answer_of(one) for one in chat.rounds] == [said]
    lines_to(terminal, monkeypatch, "And now?", "/again")      # the image that is gone is in the cache
    assert [one.images for one in chat.rounds] == [(gone,), (image_files[1],)] and terminal.waiting == []


# ---- commands ----

def test_commands_do_what_help_says(chat, image_files, tmp_path, monkeypatch, capsys):
    terminal, (a, b, *_) = Terminal(chat), image_files
    said = []

    def follow(line):
        capsys.readouterr()
        assert terminal.follow(line)
        said.append(capsys.readouterr().out)
        return said[-1]

    assert follow("/images") == "no images\n" and follow(f"/image {a}") == f"image 1: {a}\n"
    follow(f"{b} Which is it?")
    assert follow("/images") == f"image 1: {a}\nimage 2: {b}\n"
    first = chat.answer_of(chat.rounds[0])
    assert follow("/again").startswith(first) and len(chat.rounds) == 1 and chat.images == [a, b]
    assert follow("/stats") == f"{figures(chat)}\n" and re.match(r"first token after \d+\.\d\d s", said[-1])
    follow("And now?")
    assert follow("/undo") == "taken back: And now?\n" and len(chat.rounds) == 1
    follow(f"{image_files[3]} Is it?")
    assert follow("/undo") == "taken back: Is it?, image 3\n" and chat.images == [a, b]
    assert follow(f"/save {tmp_path}/talk.json") == f"saved: {tmp_path}/talk.json\n"
    follow("/new")
    assert chat.rounds == [] and follow("/images") == "no images\n"
    assert follow(f"/load {tmp_path}/talk.json") == f"> Which is it?\n{first}\nimage 1: {a}\nimage 2: {b}\n"
    follow(str(image_files[2]))
    assert "1 image that waited" in follow("/undo") and len(chat.rounds) == 1
    for names in COMMANDS:
        assert all(name in follow("/HELP") for name in names)
    for line in ("/quit", "/exit now", "/bye bye", "quit", "EXIT", ":q"):
        assert not terminal.follow(line)
    follow("Quit or not?")                                      # a question that begins like a command
    assert len(chat.rounds) == 2


@pytest.mark.parametrize("line, said", [
    ("/colour", "there is no command /colour; there are /image /images /undo"),
    ("/save", "ends in .json or .html, found"), ("/save talk.txt", "found talk.txt"),
    ("/load none.json", "no file none.json"), ("/load a.html", "ends in .json"),
    ("/undo", "no round yet"), ("/again", "no round yet"), ("/image", "no image is named"),
    ("/image none.png", "no image none.png"), ("/image red", "no image red"),
    ("/clear my doubts", "takes nothing behind it, found my doubts"), ("/load\tnone.json", "no file none.json"),
    ("/save /none/there/talk.json", "there is no folder /none/there"), ("/save page.html", "nothing to show")])
def test_a_command_that_cannot_be_followed_says_so_and_changes_nothing(chat, monkeypatch, capsys, tmp_path,
                                                                       line, said):
    monkeypatch.chdir(tmp_path)
    assert not lines_to(Terminal(chat), monkeypatch, line)
    assert said in capsys.readouterr().err and chat.rounds == [] and not list(tmp_path.iterdir())


def test_tab_completes_commands_and_files(tmp_path, monkeypatch):
    for name in ("cat.png", "my cat.png", ".hidden.png"):
        (tmp_path / name).touch()
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    assert completions("/un", "/un") == ["/undo "] and completions("c", "Is c") == ["cat.png "]
    assert completions("my", 'Is "my', quoted=True) == ["my cat.png"]
    assert completions("my", "my") == ["my\\ cat.png "] and completions("im", "im") == ["images/"]
    assert completions("", "Is ") == ["cat.png ", "images/", "my\\ cat.png "]
    assert completions("/ima", "Is /ima") == [] and completions("none/x", "none/x") == []
    assert completions(f"{tmp_path}/c", "") == [f"{tmp_path}/cat.png "]


# ---- the real program in a terminal ----

class Session:
    """The program in a pseudo-terminal."""

    def __init__(self, folder: Path, *options: str):
        self.folder, (self.fd, theirs) = folder, pty.openpty()
        environment = os.environ | {"TERM": "xterm", "HOME": str(folder), "XDG_STATE_HOME": str(folder / "state"),
                                    "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, str(ROOT / "chat.py"), "--model", str(SHIPPED), *options],
                                        cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, env=environment,
                                        start_new_session=True,
                                        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(theirs)
        self.printed = ""

    def until(self, text: str, seconds: float = 60) -> str:
        """What is printed from now on until this text comes, without escape sequences."""
        start, deadline, found = len(self.printed), time.time() + seconds, ""
        while text not in found:
            ready, _, _ = select.select([self.fd], [], [], 1)
            self.printed += os.read(self.fd, 4096).decode(errors="replace") if ready else ""
            found = re.sub(r"\x1b\[\??[0-9;]*[a-zA-Z]|\r", "", self.printed[start:])
            assert time.time() < deadline, self.printed
        return found

    def type(self, line: str, until: str = "\n> ") -> str:
        """Type a line; returns what comes up to the next prompt."""
        os.write(self.fd, line.encode())
        return self.until(until)


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b", "c"):
        shutil.copy(ROOT / f"examples/{name}.png", tmp_path / f"{name}.png")
    shutil.copy(tmp_path / "c.png", tmp_path / "my star.png")
    shutil.copy(tmp_path / "c.png", tmp_path / "scan")
    return tmp_path


def test_five_rounds_in_a_real_terminal_are_those_of_a_cold_run(folder):
    terminal = Session(folder, "a.png")
    terminal.until("\n> ")
    first = terminal.type("Describe image 1.\n")
    assert "A big red circle at the left." in first
    assert "no image none.png" in terminal.type("Is none.png red?\n")
    assert "there is no command /colour" in terminal.type("/colour\n")
    assert "is an address" in terminal.type("https://a.org/a.png What is it?\n")
    terminal.type("What color is the shape?\n")
    assert "taken back: What color is the shape?" in terminal.type("/undo\n")
    assert "image 2: b.png" in terminal.type("What changed from image 1 to b.p\t?\n")       # Tab completes
    assert "A big" not in terminal.type("/again\n")
    assert "image 3: my star.png" in terminal.type("'my star.png' Describe the image.\n")
    assert "image 3: What shape is it?" not in terminal.type("scan What shape is it?\n")    # the same image again
    pasted = terminal.type("\x1b[200~Which image shows\na star\n?\x1b[201~\n")
    assert "image 3" in pasted
    assert "saved: talk.json" in terminal.type("/save talk.json\n")
    terminal.type("/clear\n")
    assert "A big red circle at the left." in terminal.type("/load talk.json\n", until="my star.png\n> ")
    os.write(terminal.fd, b"/quit\n")
    assert terminal.process.wait(timeout=60) == 0
    rounds = json.loads((folder / "talk.json").read_text())["rounds"]
    assert len(rounds) == 5 and [len(one["images"]) for one in rounds] == [1, 1, 1, 0, 0]
    assert rounds[4]["question"] == "Which image shows a star ?"
    cold, shown = Chat.open(SHIPPED), []
    for one in rounds:
        assert cold.ask(one["question"], *one["images"]) == one["answer"]
        shown += one["images"]
    assert [Path(image).name for image in shown] == ["a.png", "b.png", "my star.png"]


def test_in_a_real_terminal_an_image_joins_however_it_is_named(folder):
    terminal, star = Session(folder, "a.png"), str(folder / "my star.png")
    terminal.until("\n> ")
    terminal.type("Describe image 1.\n")                        # then a.png waits no longer
    for line in ("b.png", '"my star.png"', "'my star.png'", "my\\ star.png", "my star.png", f"'{star}'",
                 f"file://{star.replace(' ', '%20')}", "~/b.png", "./b.png", "[b.png]", "`b.png`", "(b.png)",
                 "scan", "/image b.png", '/image "my star.png" b.png'):
        assert "image 2: " in terminal.type(f"{line}\n"), line
        assert "taken back: " in terminal.type("/undo\n")
    for line in ("none.png", "b.heic", "~/none.png", "/image none.png", "file:///none.png"):
        assert "does not exist" in terminal.type(f"{line}\n"), line
    os.write(terminal.fd, b":q\n")
    assert terminal.process.wait(timeout=60) == 0


def test_ctrl_c_stops_an_answer_or_clears_a_line_and_ctrl_d_leaves(folder):
    terminal = Session(folder, "a.png", "--temperature", "5", "--seed", "5", "--max-new-tokens", "4000")
    terminal.until("\n> ")
    os.write(terminal.fd, b"Describe image 1.\n")
    terminal.until("1.\n")
    terminal.until(" ")                                         # It talks nonsense, about 170 tokens of it.
    os.write(terminal.fd, b"\x03")
    assert "stopped" in terminal.until("\n> ")
    for keys in (b"half a line", b"\x03"):                      # no faster than a person: readline takes a moment
        time.sleep(1)
        os.write(terminal.fd, keys)
    terminal.until("\n> ")
    assert "1 of" not in terminal.type("/undo\n") and "taken back: Describe image 1." in terminal.printed
    os.write(terminal.fd, b"\x04")
    assert terminal.process.wait(timeout=60) == 0


def test_lines_of_earlier_starts_can_be_recalled(folder):
    for keys in ("What color is it?\n", "\x1b[A\n"):            # the second time the arrow upwards
        terminal = Session(folder, "a.png")
        terminal.until("\n> ")
        assert "\nred" in terminal.type(keys)
        os.write(terminal.fd, b"\x04")
        assert terminal.process.wait(timeout=60) == 0


def test_a_reader_that_ends_first_is_no_error(folder):
    command = f"{sys.executable} {ROOT}/chat.py --model {SHIPPED} a.png --question 'Describe image 1.' "
    done = subprocess.run(["bash", "-c", f"{command * 2} 2>&1 >/dev/full | true; {command} | head -n 1"],
                          cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.stderr == "" and done.stdout.startswith(f"{SHIPPED}: LLaMA-2 tiny")
