"""Talk to a trained model: several rounds, several images, answers as they are made.

    python chat.py examples/a.png examples/b.png                  asks for questions; images can join any round
    Chat.open("out/tiny").ask("Describe image 1.", "a.png")       from Python

A round costs only its own tokens, because a cache keeps the keys and values of earlier ones. Needs no deepspeed.
Before: visualchat.py, data.py. Side rooms: terminal.py (its lines), names.py (names of images), saved.py, album.py
(known images), short.py (7b on a laptop), cards.py (70b on cards), decode.py (--compile), page.py (--page).
"""
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)                # Ctrl-C during the imports ends without a word

import torch
from torch import Tensor

from album import Album, digest_of, fingerprint
from cards import cards, silence_followers
from data import Answered, Encoded, ImageFile, Round, encode_round
from decode import compile_step
from llama import Cache, Tokenizer
from mmca import IMAGE
from names import as_file, as_path, image_file
from page import draw_heatmap, write_page
from pixels import load_pixels
from short import load_short
from terminal import Terminal, converse, newest, read_options
from visualchat import ModelConfig, Sampling, VisualChat, towers
from weights import printable


# ---- a conversation ----

class ContextFull(ValueError):
    """A question does not fit into the context."""


def check_logits(logits: Tensor):
    """Raises ValueError where a model computes a NaN, or all the same, as after an overflow in RMSNorm."""
    if not logits.isfinite().all() or logits.amin() == logits.amax():
        raise ValueError("the model computes values that are no finite numbers, or all the same: are its weights "
                         "damaged?")


class Chat:
    """One conversation: its rounds, and a cache of keys and values, which may lag behind them.

    The next question brings what the cache lacks. So loading a conversation computes nothing, and a round is taken
    back by cutting the cache where the round begins.
    """

    def __init__(self, model: VisualChat, tokenizer: Tokenizer, album: Album | None = None,
                 step: Callable | None = None):
        self.model, self.tokenizer, self.album, self.step = model, tokenizer, album or Album(model), step
        self.sampling, self.max_new_tokens = Sampling(), 512
        self.forgets = False        # whether the oldest rounds are left out where the context is full
        self.rounds: list[Answered] = []
        self.left = Answered((), (), "")    # images of rounds that were left out; they stay
        self.cache = Cache(model.llama, 1, self.limit)
        self.unkept: list[str] = []     # digests of the newest images in the cache that are not in the album yet
        self.running = (piece for piece in ())                  # the last answer, which may be half read
        self.config: ModelConfig | None = None                  # of the training result that `open` loaded

    @classmethod
    def open(cls, folder: Path | str, attention: str | None = None, keep: Path | None = None,
             compiled: bool = False, int8: bool = False, devices: int | None = None) -> "Chat":
        """A conversation with a training result. attention: another form; keep: a folder for the Album.

        devices: so many cards (cards.py); by default one, or the CPU; int8: weights in 8 bits (short.py). Raises
        FileNotFoundError or ValueError where something is absent or unfit.
        """
        folder = Path(folder)
        model, config = load_short(folder, cards(devices), int8)
        wanted = attention or config.attention
        if wanted != config.attention and not {wanted, config.attention} <= {"mmca", "written"}:
            raise ValueError(f"{folder} was trained with {config.attention} attention, which --attention {wanted} "
                             "does not fit")
        if keep and wanted != "mmca":
            raise ValueError(f"--keep needs MMCA: with {wanted} attention an image's keys are made anew each time")
        if compiled and wanted == "written":
            raise ValueError("--compile has a form of attention of its own: leave out --attention written")
        model.llama.attention = wanted
        album = Album(model, keep and Path(keep, "int8" * int8, fingerprint(folder, config)))
        tokenizer = Tokenizer(towers(config)[0], model.llama.config.vocab_size)
        chat = cls(model, tokenizer, album, compile_step(model.llama) if compiled else None)
        chat.config = config
        return chat

    @property
    def limit(self) -> int:
        return self.model.llama.config.max_position_embeddings

    @property
    def images(self) -> list[ImageFile]:
        """All images that were shown, in the order of their numbers."""
        return [image for one in (self.left, *self.rounds) for image in one.images]

    @property
    def digests(self) -> list[str]:
        """And their digests."""
        return [digest for one in (self.left, *self.rounds) for digest in one.digests]

    def encoded(self, unanswered: Answered | None = None) -> Encoded:
        """Ids, kinds and labels of all rounds, and of one more that has no answer yet."""
        out = Encoded([], [], [], [])
        for one in (*self.rounds, *filter(None, [unanswered])):
            images = one.images if out.ids else self.left.images + one.images
            out += encode_round(Round(images, one.question), len(out.images), not out.ids, self.tokenizer,
                                self.model.vit.config.n_queries)
            if one is not unanswered:
                out.add_text([*one.ids, self.tokenizer.eos], is_answer=True)
        return out

    def answer_of(self, one: Answered) -> str:
        return self.tokenizer.decode(one.ids)

    def leave_out_oldest(self, new: Answered):
        """Leave out the oldest rounds where an answer to `new` has no room, so many that a quarter is free.

        To leave out one at a time would read nearly all anew with every question. Under MMCA the images, which
        stay, cost nothing more than their positions: their keys and values are known.
        """
        if len(self.encoded(new).ids) + min(self.max_new_tokens, self.limit // 4) <= self.limit:
            return
        while self.rounds and len(self.encoded(new).ids) > self.limit - self.limit // 4:
            oldest, *self.rounds = self.rounds
            self.left = Answered(self.left.images + oldest.images, self.left.digests + oldest.digests, "")
        self.cache.past = [()]

    def begin_round(self, new: Answered) -> Tensor:
        """Add a round that waits for its answer; returns the logits (1, vocabulary) of the first answer token.

        Raises ContextFull, and as `read_image` and `check_logits` do; then the conversation is as it was before.
        """
        model, device = self.model, self.model.projection.weight.device
        rounds, left, past = self.rounds, self.left, self.cache.past
        try:
            if self.forgets:
                self.leave_out_oldest(new)
            whole, fed = self.encoded(new), len(self.cache.past[0])
            if len(whole.ids) >= self.limit:
                raise ContextFull(f"{len(whole.ids)} positions exceed the {self.limit} of the context: /clear "
                                  "starts over, and --forget leaves out the oldest rounds")
            ids, kind = torch.tensor([whole.ids[fed:]], device=device), torch.tensor([whole.kind[fed:]])
            n_fed = whole.kind[:fed].count(IMAGE) // model.vit.config.n_queries
            files, digests = whole.images[n_fed:], [*self.digests, *new.digests][n_fed:]
            # Under causal attention an image's keys depend on what was before it; `written` reads no known ones.
            is_mmca = model.llama.attention == "mmca"
            image_kv = self.album.find_all(digests) if is_mmca else None
            if files and image_kv is None:
                images = torch.stack([load_pixels(file, model.vit.config.image_size) for file in files])
                tokens = model.image_tokens(images.to(device))          # (images, n_queries, C)
                logits = model.prefill(model.embed(ids, kind, tokens), kind, self.cache)
            else:
                logits = model.prefill(model.llama.embed_tokens(ids), kind, self.cache, image_kv=image_kv)
            check_logits(logits)
        except BaseException:                                   # Ctrl-C, too
            # What was left out comes back, but the cache may have lost it: then the next question reads it anew.
            self.cache.past = past if self.rounds is rounds else [()]
            self.rounds, self.left = rounds, left
            raise
        self.rounds, self.unkept = [*self.rounds, new], digests if is_mmca and image_kv is None else []
        return logits

    def keep_images(self):
        """Put the newest images into the album, if they are not there yet."""
        if self.unkept:
            tokens = len(self.unkept) * self.model.vit.config.n_queries
            self.album.add(self.unkept, self.cache.newest_images(tokens))
            self.unkept = []
        try:
            self.album.save()
        except OSError as error:                                # The conversation does not need what is kept.
            warnings.warn(str(error))

    def answer(self, logits: Tensor, one: Answered, started: float) -> Iterator[int]:
        """The ids of the answer. However it ends, with Ctrl-C, too, the round has all of them."""
        for token in self.model.generate(logits, self.cache, self.max_new_tokens, self.sampling, self.step):
            id = token.item()                                   # per token, the only wait for a card
            one.seconds = time.perf_counter() - started
            one.first_after = one.first_after or one.seconds
            if id == self.tokenizer.eos:
                one.has_ended = True
                return
            one.ids.append(id)
            yield id

    @torch.no_grad()
    def pieces(self, question: str, files: list[ImageFile]) -> Iterator[str]:
        """Begin a round, and yield its answer; whatever ends it, new images are kept."""
        started, question = time.perf_counter(), " ".join(question.split())     # no line breaks, as in training
        logits = self.begin_round(Answered(tuple(files), tuple(digest_of(file) for file in files), question))
        try:
            yield from self.tokenizer.pieces(self.answer(logits, self.rounds[-1], started))
        finally:
            self.keep_images()                                  # after the answer, which should not wait for it

    def stream(self, question: str, *images) -> Iterator[str]:
        """Show images (str, Path or PIL image), ask, and yield the answer piece by piece.

        Nothing is asked before the first piece is taken, and an answer that is not read to its end ends there.
        With that piece come FileNotFoundError or ValueError for an image that cannot be read, and ContextFull; the
        conversation is then as it was before.
        """
        self.running.close()
        self.running = self.pieces(question, [as_file(image) for image in images])
        return self.running

    def ask(self, question: str, *images) -> str:
        """The whole answer; everything else as in `stream`."""
        return "".join(self.stream(question, *images))

    def undo(self) -> Answered:
        """Take the last round back, with its images; raises ValueError where there is none."""
        self.running.close()
        if not self.rounds:
            raise ValueError("there is no round yet")
        *self.rounds, last = self.rounds
        self.cache.past = [self.cache.past[0][:len(self.encoded().ids)]]
        return last

    def clear(self):
        """Begin anew, without images."""
        self.running.close()
        self.rounds, self.left, self.cache.past = [], Answered((), (), ""), [()]


# ---- the program ----

def open_chat(options, say: Callable[[str], None]) -> Chat:
    """The conversation that the options ask for; says what was loaded."""
    folder = options.model or newest(Path("out"), say)
    chat = Chat.open(folder, options.attention, options.keep, options.compile, options.int8, options.devices)
    chat.sampling, chat.max_new_tokens, chat.forgets = options.sampling, options.max_new_tokens, options.forget
    say(f"{folder}: LLaMA-2 {chat.config.size}, {chat.model.llama.attention},{' 8 bits,' * options.int8} on "
        f"{chat.model.projection.weight.device.type}{f' ({options.devices})' if options.devices else ''}")
    if options.compile:
        say("the first answer without and the first one with an image wait for the compiler")
    if options.seed is not None:
        torch.manual_seed(options.seed)
    return chat


def main():
    """A bad setting or file ends the program with one line, whatever was asked before.

    Lines that come from a file or another program let it end with 1 if one of them was bad.
    """
    silence_followers()
    options = read_options(__doc__)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)               # the program that reads our answers may end first
    warnings.showwarning = lambda message, *_: print(printable(f"\nnote: {message}"), file=sys.stderr)
    sys.stdout.reconfigure(errors="backslashreplace")           # not every terminal knows every character
    good = True
    try:
        say = (lambda line: None) if options.quiet else print
        chat = open_chat(options, say)
        terminal = Terminal(chat, options.quiet, options.verbose)
        terminal.show([image_file(name) or as_path(name) for name in options.images])
        for line in options.question or ():
            terminal.say(f"> {line}")
            if not terminal.follow(line):
                break
        if not options.question:
            sys.stdin.reconfigure(errors="surrogateescape")     # nor does every file hold only such
            good = converse(terminal) or sys.stdin.isatty()
        for write, path in ((write_page, options.page), (draw_heatmap, options.heatmap)):
            if path:
                write(chat, path)
                say(f"saved: {path}")
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError):           # a rank that is silent may be the only one to know
            sys.stderr = sys.__stderr__
        sys.exit(f"chat.py: {printable(str(error))}")
    except RuntimeError as error:                               # PyTorch's error when a compiler fails
        if not options.compile:
            raise
        sys.exit(f"chat.py: {printable(str(error))}\nThis was with --compile; try without.")
    except KeyboardInterrupt:
        sys.exit(130)                                           # the exit status that shells give to Ctrl-C
    if not good:
        sys.exit(1)


if __name__ == "__main__":
    main()
