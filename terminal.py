"""What becomes of a line that is typed? Commands, images and questions; the keys; the options of chat.py.

    line ─► a command of COMMANDS            /undo takes the last round back
         ─► images (names.py) that wait      a.png
         ─► a question, with these images    What changed from image 1 to b.png?

A line that cannot be followed is explained on stderr and changes nothing; images that it announced still wait. In
what follows `chat` is a chat.Chat; chat.py imports this file, and not the other way round. Side room of chat.py.
"""
import argparse
import atexit
import contextlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from album import digest_of
from cards import is_follower, n_ranks, of_rank_0
from data import ImageFile
from mmca import ATTENTION
from names import absent, as_path, named, parse, words_in
from page import can_show, write_page
from pixels import can_be_read, read_image
from saved import load_conversation, save_conversation
from visualchat import TRAINED, Sampling
from weights import find_weights, printable

try:
    import readline                                             # line editing and history, where the system has it
except ImportError:
    readline = None


GREETING = "Ask about the images; name an image file to add it."
COMMANDS = {                                                    # the first name is that of a method, but /quit's
    ("/image",): "FILE…: show images", ("/images",): "which images are shown",
    ("/undo",): "take the last round back", ("/again",): "answer the last question again",
    ("/clear", "/new"): "start over, without images",
    ("/save",): "FILE.json: keep the conversation; FILE.html: a page that shows where each word looked",
    ("/load",): "FILE.json: go on with a conversation", ("/stats",): "speed, and how full the context is",
    ("/help",): "this list", ("/quit", "/exit", "/bye"): "end, as Ctrl-D does; Ctrl-C stops an answer"}


def newest(folder: Path, say: Callable[[str], None] = print) -> Path:
    """The newest training result under a folder. If there is none, says so and takes the one in weights/tiny."""
    results = sorted(folder.glob(f"*/{TRAINED}"), key=lambda path: path.stat().st_mtime)
    if results:
        return results[-1].parent
    say(f"{folder}/ holds no training result, so this is the tiny one that comes with the code")
    return find_weights("tiny/chat")


def figures(chat) -> str:
    """How long the last answer took, and how much of the context is used."""
    used = f"{len(chat.encoded().ids):,} of {chat.limit:,} positions used"
    if not chat.rounds or not chat.rounds[-1].seconds:
        return used
    last = chat.rounds[-1]
    n, seconds = len(last.ids) + last.has_ended - 1, last.seconds - last.first_after       # after the first token
    speed = f"{n / seconds:.1f} tokens/s, " if n and seconds else ""
    return f"first token after {last.first_after:.2f} s, {speed}{used}"


def file_in(text: str, suffixes: tuple[str, ...]) -> Path:
    """The file that a command names; raises ValueError where it does not end as expected."""
    path = as_path(text.strip("\"'`"))
    if path.suffix not in suffixes:
        raise ValueError(f"expected a name that ends in {' or '.join(suffixes)}, found {text or 'none'}")
    return path


class Terminal:
    """What becomes of a line: a command is followed, images are shown, a question is answered."""

    def __init__(self, chat, quiet: bool = False, verbose: bool = False):
        self.chat, self.quiet, self.verbose = chat, quiet, verbose
        self.waiting: list[ImageFile] = []                      # images that are shown with the next question

    def say(self, text: str):
        """Print what is no answer; with --quiet nothing."""
        if not self.quiet:
            print(printable(text), flush=True)

    def number_of(self, file: Path) -> int | None:
        """The number of an image that was shown already, by its content."""
        digest, known = digest_of(file), [*self.chat.digests, *map(digest_of, self.waiting)]
        return known.index(digest) + 1 if digest in known else None

    def show(self, files: list[Path]):
        """Announce images and let them wait for a question; raises as `read_image` does, and then shows none."""
        for file in files:
            read_image(file)
        for file in files:
            self.waiting.append(file)
            self.say(f"image {len(self.chat.images) + len(self.waiting)}: {file}")

    def ask(self, question: str, *images: ImageFile):
        """Print the answer, and notes on what a person should know about it."""
        left = self.chat.left
        for piece in self.chat.stream(question, *images):
            print(printable(piece), end="", flush=True)
        print()
        if self.chat.left is not left:
            self.say("note: the context was full, so the oldest rounds are left out; their images are still shown")
        if note := absent(question, len(self.chat.images)):
            self.say(f"note: {note}")
        last, most = self.chat.rounds[-1], self.chat.max_new_tokens
        if not last.has_ended:
            self.say("note: the answer is cut here: " + (
                "the context is full, /clear starts over" if len(last.ids) < most else
                f"it has {most} tokens, --max-new-tokens allows more"))
        if self.verbose:
            self.say(f"note: {figures(self.chat)}")

    def last(self):
        """The last round, or None."""
        return self.chat.rounds[-1] if self.chat.rounds else None

    def ask_with_waiting(self, question: str):
        """Ask with the images that wait; they wait no longer if the round began, however it ended."""
        before = self.last()
        try:
            self.ask(question, *self.waiting)
        finally:
            if self.last() is not before:
                self.waiting = []

    def drop_unreadable(self):
        """Images that wait and cannot be read any more wait no longer, or no later line would do."""
        if lost := [file for file in self.waiting if not can_be_read(file)]:
            self.waiting = [file for file in self.waiting if file not in lost]
            self.say(f"{', '.join(map(str, lost))} is not shown. Now there are:")
            self.images()

    # The commands; each gets what stands behind it in the line.

    def image(self, rest: str):
        for _, word in words_in(rest):
            if not named(word):
                raise FileNotFoundError(f"no image {word}")
        files, _ = parse(rest, 1, self.number_of)               # the number counts in a question alone
        if not rest:
            raise ValueError("no image is named: expected /image FILE")
        self.show(files)
        if not files:
            self.images()                                  # They were shown already.

    def images(self, rest: str = ""):
        shown = [*self.chat.images, *self.waiting]
        self.say("\n".join(f"image {n}: {file}" for n, file in enumerate(shown, 1)) or "no images")

    def undo(self, rest: str):
        if self.waiting:
            n = len(self.waiting)
            self.say(f"taken back: {n} image{'s' * (n > 1)} that waited for a question")
            self.waiting = []
        else:
            n = len(self.chat.images)
            taken = self.chat.undo()
            numbers = range(len(self.chat.images) + 1, n + 1)
            self.say(f"taken back: {', '.join((taken.question, *(f'image {number}' for number in numbers)))}")

    def again(self, rest: str):
        for file in self.chat.rounds[-1].images if self.chat.rounds else ():
            read_image(file)                                    # else the round could not be asked again
        taken = self.chat.undo()
        before = self.last()
        try:
            self.ask(taken.question, *taken.images)
        finally:
            if self.last() is before:                           # The round did not begin: put the old one back.
                self.chat.rounds.append(taken)

    def clear(self, rest: str):
        self.chat.clear()
        self.waiting = []
        self.say("a new conversation without images")

    def save(self, rest: str):
        path = file_in(rest, (".json", ".html"))
        (write_page if path.suffix == ".html" else save_conversation)(self.chat, path)
        self.say(f"saved: {path}")

    def load(self, rest: str):
        load_conversation(self.chat, file_in(rest, (".json",)))
        self.waiting = []
        for one in self.chat.rounds:
            self.say(f"> {one.question}\n{self.chat.answer_of(one)}")
        self.images()

    def stats(self, rest: str):
        self.say(figures(self.chat))

    def help(self, rest: str):
        self.say(f"{GREETING}\n" + "\n".join(
            f"  {' '.join(names):<20} {meaning}" for names, meaning in COMMANDS.items()))

    def follow(self, line: str) -> bool:
        """Do what a line says; returns False where it ends the conversation. Raises OSError and ValueError."""
        word, rest = (*line.strip().split(maxsplit=1), "", "")[:2]
        name = word.lower()
        if name in ("/quit", "/exit", "/bye") or line.strip().lower() in ("quit", "exit", ":q"):
            return False
        if names := next((names for names in COMMANDS if name in names), None):
            if rest and "FILE" not in COMMANDS[names]:
                raise ValueError(f"{name} takes nothing behind it, found {rest:.60}")
            getattr(self, names[0][1:])(rest)
        elif word.startswith("/") and "/" not in word[1:] and not Path(word).suffix and not os.path.isfile(word):
            raise ValueError(f"there is no command {word}; there are "
                             f"{' '.join(name for names in COMMANDS for name in names)}")
        elif word:
            first = len(self.chat.images) + len(self.waiting) + 1
            files, question = parse(line, first, self.number_of)
            self.show(files)
            if question:
                self.ask_with_waiting(question)
            elif not files:
                self.images()                              # only images that were shown already
        return True


# ---- lines and keys ----

def completions(text: str, line: str, quoted: bool = False) -> list[str]:
    """Commands, at the beginning of a line, and files, that begin like a text. quoted: it is behind a quote."""
    commands = [f"{name} " for names in COMMANDS for name in names if line == text and name.startswith(text)]
    folder, start = os.path.split(text)
    try:
        files = sorted(os.scandir(os.path.expanduser(folder) or "."), key=lambda file: file.name)
    except OSError:
        files = []
    return commands + [os.path.join(folder, file.name if quoted else file.name.replace(" ", "\\ ")) +
                       ("/" if file.is_dir() else "" if quoted else " ")
                       for file in files if file.name.startswith(start) and (start or file.name[0] != ".")]


def prepare_keys():
    """Tab completes, a pasted text is one line, and lines can be recalled, those of earlier starts, too."""
    if not readline or is_follower():
        return
    history = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "visualchat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    readline.set_history_length(1000)
    readline.set_completer_delims(" \t\n\"'`")
    found = []

    def complete(text: str, n: int) -> str | None:              # asked with n = 0, 1, … until there is no more
        if n == 0:
            line = readline.get_line_buffer()
            found[:] = completions(text, line, quoted=line[:readline.get_begidx()][-1:] in tuple("\"'`"))
        return found[n] if n < len(found) else None

    readline.set_completer(complete)
    for setting in ("tab: complete", "set enable-bracketed-paste on"):
        readline.parse_and_bind(setting)

    def keep():
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)

    atexit.register(keep)


def converse(terminal: Terminal) -> bool:
    """Read lines until they end; a bad line is explained and changes nothing. Returns whether all were good."""
    good, asks = True, sys.stdin.isatty()
    if asks:
        prepare_keys()
        terminal.say(f"{GREETING} /help lists what else there is.")
    while True:
        try:
            line = of_rank_0(lambda: input("> " if asks else ""))
            if not asks and line.strip():
                terminal.say(f"> {line}")
            if not terminal.follow(line):
                return good
        except EOFError:
            if asks:
                print()
            return good
        except KeyboardInterrupt:                               # clears a line or ends an answer, no more
            if not asks or n_ranks() > 1:                       # then the launcher ends all ranks
                raise
            print("\nstopped; /quit or Ctrl-D ends the conversation", file=sys.stderr)
        except (OSError, ValueError, torch.OutOfMemoryError) as error:
            if n_ranks() > 1 and isinstance(error, torch.OutOfMemoryError):
                raise                                           # perhaps of one rank, for which others would wait
            print(printable(str(error)), file=sys.stderr, flush=True)
            good = False
            terminal.drop_unreadable()


# ---- the options ----

def what_is_wrong(options: argparse.Namespace) -> str:
    """What cannot be meant, in a line, or ''."""
    if options.question and not all(question.strip() for question in options.question):
        return "--question: an empty one; expected a question, or the name of an image and a question"
    if options.keep and options.keep.exists() and not options.keep.is_dir():
        return f"--keep {options.keep}: expected a folder, or a name for one"
    if options.seed is not None and not 0 <= options.seed < 2 ** 63:
        return f"--seed {options.seed}: expected 0 or more, and no huge number"
    if options.page and options.page.suffix != ".html":
        return f"--page {options.page}: expected a name that ends in .html"
    if options.heatmap and options.heatmap.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        return f"--heatmap {options.heatmap}: expected a name that ends in .png, .jpg or .webp"
    for file in filter(None, (options.page, options.heatmap)):
        if not file.absolute().parent.is_dir():
            return f"{file}: there is no folder {file.parent}"
        if options.model and not can_show(options.model):
            return (f"{file}: where a model looked is seen with mmca and QWen-VL's encoder; {options.model} has "
                    "something else")
    if options.max_new_tokens < 1:
        return f"--max-new-tokens {options.max_new_tokens}: expected 1 or more"
    alone = ("devices", "int8", "compile", "keep", "page", "heatmap")
    if n_ranks() > 1 and (found := next((f"--{name}" for name in alone if getattr(options, name)), "")):
        return f"{found} is for one process: leave it out, or start chat.py with python"
    if options.compile and (options.devices or 1) > 1:
        return "--compile works on a single device: leave out --devices"
    compiler = os.environ.get("CXX") or "g++"                   # torch.compile looks for it in this way
    if options.compile and not torch.accelerator.is_available() and not shutil.which(compiler):
        return f"--compile needs a C++ compiler: found no {compiler}; CXX can name another"
    return ""


def read_options(description: str) -> argparse.Namespace:
    """The options; a bad one ends the program with a line before anything is loaded."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", nargs="*", help="images to talk about from the first question on")
    add("--question", action="append", help="answer this and end; may be given several times")
    add("--model", type=Path, help="folder of a training result; default the newest under out/")
    add("--attention", choices=ATTENTION,
        help="`written` for a model trained with mmca: the formula as it is written, slower")
    add("--keep", type=Path, help="folder that keeps the keys and values of each image")
    add("--temperature", type=float, default=0.0, help="0: the likeliest word; 1: by chance")
    add("--top-p", type=float, default=1.0,
        help="with a temperature: draw from the likeliest words that together have this chance")
    add("--top-k", type=int, default=0, help="with a temperature: draw from so many of the likeliest words")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: fewer repetitions within an answer")
    add("--max-new-tokens", type=int, default=512, help="where an answer is cut")
    add("--seed", type=int, help="with a temperature: the same seed, the same answers")
    add("--forget", action="store_true",
        help="when the context is full, leave out the oldest rounds, but not their images")
    add("--verbose", action="store_true", help="after each answer: speed, and how full the context is")
    add("--quiet", action="store_true", help="print answers alone, and errors")
    add("--page", type=Path, help="at the end write the conversation as a page, FILE.html, that shows where the "
                                  "model looked")
    add("--heatmap", type=Path, help="at the end draw where the last answer looked, as an image")
    add("--compile", action="store_true",
        help="torch.compile for decoding: the first answers wait for it, later ones are faster")
    add("--devices", type=int, help="so many cards share LLaMA's layers, for models that are too large for one")
    add("--int8", action="store_true",
        help="weights in 8 bits: half the memory, a little less exact; slower on a card, which widens them")
    add("--local_rank", type=int, help=argparse.SUPPRESS)      # which `deepspeed` adds
    options = parser.parse_args()
    try:
        options.sampling = Sampling(options.temperature, options.top_k, options.top_p, options.repetition_penalty)
    except ValueError as error:
        parser.error(str(error))
    if wrong := what_is_wrong(options):
        parser.error(wrong)
    return options
