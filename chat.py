"""Talk to a trained model in the terminal: several rounds, several images, answers as they are made.

    python chat.py examples/a.png examples/b.png                          asks for questions, round after round
    python chat.py examples/a.png --question "Describe image 1."          answers and ends

An image can join in any round: name its file in the question. A round costs only its own tokens, because a cache
keeps the keys and values of all earlier ones. Under MMCA an image has the same keys and values in every
conversation, so an image that was shown before need not be computed again. Needs no deepspeed. Before:
visualchat.py, data.py. Side rooms: album.py (images that were shown before), decode.py (--compile).
"""
import argparse
import contextlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from album import Album, digest_of, fingerprint
from data import Encoded, Round, encode_round
from decode import compile_step
from llama import Cache, Tokenizer
from mmca import ATTENTION, TEXT
from pixels import can_be_read, load_pixels, read_image
from visualchat import TRAINED, VisualChat, load, towers
from weights import find_weights, printable

with contextlib.suppress(ImportError):
    import readline                                             # line editing and history, where the system has it

HELP = "Ask about the images; name an image file to add it. /new starts over without any, /quit or Ctrl-D ends."


# ---- a conversation ----

def in_pieces(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of ids, as they come, in pieces of whole characters; a character can take several ids."""
    known, text, shown = [], "", ""
    for id in ids:
        known.append(id)
        text = tokenizer.decode(known)
        if not text.endswith("\ufffd"):                         # else the last character is still incomplete
            yield text[len(shown):]
            shown = text
    if text != shown:
        yield text[len(shown):]


class Chat:
    """One conversation: its ids and kinds so far, and the cache, which holds all of them but the last few."""

    def __init__(self, model: VisualChat, tokenizer: Tokenizer, album: Album | None = None,
                 temperature: float = 0.0, top_p: float = 1.0, step: Callable | None = None):
        self.model, self.tokenizer, self.album = model, tokenizer, album or Album(model)
        self.temperature, self.top_p, self.step = temperature, top_p, step      # as in VisualChat.generate
        self.ids, self.kind, self.n_images = [], [], 0
        self.cache = Cache(model.llama, 1, model.llama.config.max_position_embeddings)

    def again(self) -> "Chat":
        """A new conversation with the same model and album."""
        return Chat(self.model, self.tokenizer, self.album, self.temperature, self.top_p, self.step)

    def read(self, new: Encoded) -> Tensor:
        """Add a round that waits for its answer; returns the logits (1, vocabulary) of the first answer token.

        Raises ValueError where the context is full, and as `read_image` does; then nothing was added.
        """
        model, device, before = self.model, self.model.projection.weight.device, self.cache.past
        limit = model.llama.config.max_position_embeddings
        if len(self.ids) + len(new.ids) >= limit:
            raise ValueError(f"{len(self.ids)} positions and {len(new.ids)} more exceed {limit}: /new starts over")
        fed = len(before[0])                                    # the cache lacks the end of the last answer
        ids, kind = (torch.tensor([values[fed:]], device=device)
                     for values in (self.ids + new.ids, self.kind + new.kind))
        try:
            is_mmca, digests = model.llama.attention == "mmca", [digest_of(file) for file in new.images]
            # Under other forms of attention an image's keys depend on what was before it, so none is known.
            known = self.album.find_all(digests) if is_mmca else None
            if new.images and known is None:
                images = torch.stack([load_pixels(file, model.vit.config.image_size) for file in new.images])
                tokens = model.image_tokens(images.to(device))          # (images, n_queries, C)
                logits = model.prefill(model.embed(ids, kind, tokens), kind, self.cache)
                if is_mmca:
                    self.album.add(digests, self.cache.newest_images(tokens.shape[0] * tokens.shape[1]))
            else:
                logits = model.prefill(model.llama.embed_tokens(ids), kind, self.cache, image_kv=known)
            if not logits.isfinite().all():
                raise ValueError("the model computes values that are no finite numbers: are its weights damaged?")
        except BaseException:                                   # Ctrl-C, too
            self.cache.past = before
            raise
        self.ids, self.kind = self.ids + new.ids, self.kind + new.kind
        self.n_images += len(new.images)
        return logits

    def answer(self, logits: Tensor, max_new_tokens: int) -> Iterator[int]:
        """The ids of the answer. However it ends, with Ctrl-C, too, the conversation has all of them and </s>."""
        try:
            for token in self.model.generate(logits, self.cache, max_new_tokens, self.temperature, self.top_p,
                                             self.step):
                if token.item() == self.tokenizer.eos:
                    break
                self.ids.append(token.item())
                yield token.item()
        finally:
            self.ids.append(self.tokenizer.eos)
            self.kind += [TEXT] * (len(self.ids) - len(self.kind))

    @torch.no_grad()
    def ask(self, question: str, files: list[Path] = (), max_new_tokens: int = 512) -> Iterator[str]:
        """Show the images, ask, and yield the answer piece by piece.

        Raises FileNotFoundError or ValueError for an image that cannot be read and ValueError where the context is
        full; the conversation is then as it was before.
        """
        new = encode_round(Round(tuple(files), question), self.n_images, not self.ids, self.tokenizer,
                           self.model.vit.config.n_queries)
        logits = self.read(new)
        try:
            yield from in_pieces(self.answer(logits, max_new_tokens), self.tokenizer)
        finally:
            self.album.save()                                   # after the answer, which should not wait for it


# ---- the terminal ----

def newest(folder: Path) -> Path:
    """The newest training result under a folder. If there is none, says so and takes the one in weights/tiny."""
    results = sorted(folder.glob(f"*/{TRAINED}"), key=lambda path: path.stat().st_mtime)
    if results:
        return results[-1].parent
    print(f"{folder}/ holds no training result, so this is the tiny one that comes with the code")
    return find_weights("tiny/chat")


def parse(line: str, first: int) -> tuple[list[Path], str]:
    """A line as (image files that it names, the question); a name with spaces stands in double quotes.

    Within a sentence a name becomes "image 3", counting from `first`; before or after a sentence it is left out.
    Raises FileNotFoundError for a word that ends like an image file and is none.
    """
    known = Image.registered_extensions()
    files, words = [], []
    for word in re.findall(r'"[^"]*"|\S+', line):
        bare = word.strip("\"'()")
        name = bare.rstrip("?!.,;:'\")")
        if Path(name).suffix.lower() not in known:
            words.append(word)
        elif "\0" in name or not (path := Path(os.path.expanduser(name))).is_file():
            raise FileNotFoundError(f"no image {name}")
        else:
            if words and words[-1][-1] not in "?!.":
                words.append(f"image {first + len(files)}" + bare[len(name):].strip("'\")"))
            files.append(path)
    return files, " ".join(words)


def announce(files: list[Path], first: int) -> list[Path]:
    """Print the numbers that these images will have; raises as `read_image` does, before anything is printed."""
    for file in files:
        read_image(file)
    for number, file in enumerate(files, first):
        print(f"image {number}: {printable(str(file))}")
    return files


def answer_line(chat: Chat, line: str, waiting: list[Path]) -> list[Path]:
    """Print the answer to a line; returns the images that still wait for a question, none after an answer."""
    first = chat.n_images + len(waiting) + 1
    files, question = parse(line, first)
    waiting = waiting + announce(files, first)
    if not question:
        return waiting
    for piece in chat.ask(question, waiting):
        print(printable(piece), end="", flush=True)
    print()
    return []


def converse(chat: Chat, waiting: list[Path]) -> bool:
    """Read lines until they end; a bad line is explained and changes nothing. Returns whether all were good."""
    print(HELP)
    good = True
    while True:
        before = chat.n_images
        try:
            line = input("> ").strip()
            if line.lower() == "/quit":
                return good
            if line.lower() == "/new":
                chat, waiting = chat.again(), []
                print("a new conversation without images")
            elif line.startswith("/") and not Path(line.split()[0]).suffix:    # a path has a suffix
                print(HELP)
            elif line:
                waiting = answer_line(chat, line, waiting)
        except EOFError:
            print()
            return good
        except KeyboardInterrupt:                               # ends an answer, not the conversation
            print("\nstopped; /quit or Ctrl-D ends the conversation")
        except (OSError, ValueError) as error:
            print(printable(str(error)))
            good, waiting = False, [file for file in waiting if can_be_read(file)]  # else no later line would do
        if chat.n_images != before:                             # they joined, however the round ended
            waiting = []


def read_options() -> argparse.Namespace:
    """The options; a bad one ends the program with a line before anything is loaded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", type=Path, help="images to talk about from the first question on")
    parser.add_argument("--question", action="append", help="answer this and end; may be given several times")
    parser.add_argument("--model", type=Path, help="folder of a training result; default the newest under out/")
    parser.add_argument("--attention", choices=ATTENTION,
                        help="`written` for a model trained with mmca: the formula as it is written, slower")
    parser.add_argument("--keep", type=Path, help="folder that keeps the keys and values of each image")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest word; 1: by chance")
    parser.add_argument("--top-p", type=float, default=1.0,
                        help="with a temperature: draw from the likeliest words that together have this chance")
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile for decoding: the first answers wait for it, later ones are faster; "
                             "on a CPU the weights then take half as much memory again")
    options = parser.parse_args()
    if not 0 <= options.temperature < float("inf"):
        parser.error(f"--temperature {options.temperature}: expected a finite number, 0 or more")
    if not 0 < options.top_p <= 1:
        parser.error(f"--top-p {options.top_p}: expected more than 0 and at most 1")
    if options.top_p < 1 and not options.temperature:
        parser.error("--top-p does nothing without --temperature, such as --temperature 1")
    if options.question and not all(question.strip() for question in options.question):
        parser.error("--question: an empty one; expected a question, or the name of an image and a question")
    if options.keep and options.keep.exists() and not options.keep.is_dir():
        parser.error(f"--keep {options.keep}: expected a folder, or a name for one")
    options.device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    compiler = os.environ.get("CXX") or "g++"                   # torch.compile looks for it in this way
    if options.compile and options.device.type == "cpu" and not shutil.which(compiler):
        parser.error(f"--compile needs a C++ compiler: found no {compiler}; CXX can name another")
    return options


def open_chat(options: argparse.Namespace) -> Chat:
    """Load the model and begin a conversation; prints what was loaded."""
    folder = options.model or newest(Path("out"))
    model, config = load(folder, torch.float32 if options.device.type == "cpu" else torch.float16, options.device)
    wanted = options.attention or config.attention
    if wanted != config.attention and "causal" in (wanted, config.attention):
        raise ValueError(f"{folder} was trained with {config.attention} attention, which --attention "
                         f"{options.attention} does not fit")
    model.llama.attention = wanted
    if options.keep and wanted != "mmca":
        raise ValueError(f"--keep needs MMCA: under {wanted} attention an image's keys are made anew each time")
    if options.compile and wanted == "written":
        raise ValueError("--compile has a form of attention of its own: leave out --attention written")
    step = None
    if options.compile:
        step = compile_step(model.llama)
        print("the first answer without and the first one with an image wait for the compiler")
    print(f"{folder}: LLaMA-2 {config.size}, {wanted}, on {options.device.type}")
    album = Album(model, options.keep and options.keep / fingerprint(folder, config))
    tokenizer = Tokenizer(towers(config)[0], model.llama.config.vocab_size)
    return Chat(model, tokenizer, album, options.temperature, options.top_p, step)


def main():
    """A bad setting or file ends the program with one line, whatever was asked before.

    Lines that come from a file or another program let it end with 1 if one of them was bad.
    """
    options = read_options()
    sys.stdout.reconfigure(errors="backslashreplace")           # not every terminal knows every character
    try:
        chat = open_chat(options)
        waiting = announce(options.images, first=1)
        if not options.question:
            sys.stdin.reconfigure(errors="surrogateescape")     # nor does every file hold only such
            sys.exit(not converse(chat, waiting) and not sys.stdin.isatty())
        for line in options.question:
            print(f"> {line}")
            waiting = answer_line(chat, line, waiting)
    except (OSError, ValueError) as error:
        sys.exit(f"chat.py: {printable(str(error))}")
    except RuntimeError as error:                               # PyTorch's error when a compiler fails
        if not options.compile:
            raise
        sys.exit(f"chat.py: {printable(str(error))}\nThis was with --compile; try without.")
    except KeyboardInterrupt:
        sys.exit(130)                                           # the exit status that shells give to Ctrl-C


if __name__ == "__main__":
    main()
