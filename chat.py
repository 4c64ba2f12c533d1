"""Talking to a trained model in the terminal: several rounds, several images, answers as they are made.

    python chat.py examples/a.png examples/b.png                          asks you, round after round
    python chat.py examples/a.png --question "Describe image 1."          answers and ends

A picture can join at any round: name its file in the question. A round costs only its own tokens, because
the keys and values of earlier ones are kept. Needs no deepspeed. Before: visualchat.py, data.py, train.py.
"""
import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from data import Round, encode_round, tensors
from llama import Tokenizer
from mmca import TEXT
from visualchat import TRAINED, VisualChat, load, towers
from vit import open_image

with contextlib.suppress(ImportError):
    import readline                                             # line editing and history, where the system has it

HELP = "Ask about the images; name a picture's file to add it. /new starts over, /quit or Ctrl-D ends."


class Chat:
    """One conversation: the ids and kinds said so far, and the cache that covers all but the last few of them."""

    def __init__(self, model: VisualChat, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.ids, self.kind, self.n_images = [], [], 0
        self.cache, self.cached = {}, 0                         # keys and values, and of how many positions

    def ask(self, question: str, files: list[Path] = (), max_new_tokens: int = 512) -> Iterator[str]:
        """Introduce the pictures, ask, and yield the answer piece by piece.

        Raises FileNotFoundError or ValueError for a picture that cannot be read, ValueError where the context is
        full; the conversation is then as it was before.
        """
        model, vision, device = self.model, self.model.vit.config, self.model.projection.weight.device
        turn = Round(tuple(files), question)
        new = encode_round(turn, self.n_images, not self.ids, self.tokenizer, vision.n_queries)
        limit = model.llama.config.max_position_embeddings
        if len(self.ids) + len(new.ids) >= limit:
            raise ValueError(f"{len(self.ids)} positions and {len(new.ids)} more exceed {limit}: /new starts over")
        images = tensors(new, vision.image_size)["images"].to(device)
        said, kinds = self.ids + new.ids, self.kind + new.kind
        ids, kind = torch.tensor([said[self.cached:]], device=device), torch.tensor([kinds], device=device)
        heard, answer, text, shown = False, [], "", ""
        try:
            for token in model.generate(ids, kind, images, max_new_tokens, self.cache):
                heard = True
                if token.item() == self.tokenizer.eos:
                    break
                answer.append(token.item())
                text = self.tokenizer.decode(answer)
                if not text.endswith("\ufffd"):                 # half a character: its other bytes come next
                    yield text[len(shown):]
                    shown = text
            if text != shown:
                yield text[len(shown):]
        finally:                                                # after Ctrl-C, too: the answer ends where it is
            if heard:                                           # else the question was not heard, nothing is said
                self.ids = [*said, *answer, self.tokenizer.eos]
                self.kind = kinds + [TEXT] * (len(answer) + 1)
                self.n_images += len(files)
                self.cached = min((k.shape[2] for k, _ in self.cache.values()), default=0)
            # After Ctrl-C the first layers may be a step ahead of the others. In any case the cache lacks the
            # answer's end, which is fed with the next question.
            self.cache = {layer: (k[:, :, :self.cached], v[:, :, :self.cached])
                          for layer, (k, v) in self.cache.items()}


def newest(folder: Path) -> Path:
    """The newest training result under a folder; raises FileNotFoundError that says how to make one."""
    results = sorted(folder.glob(f"*/{TRAINED}"), key=lambda path: path.stat().st_mtime)
    if not results:
        raise FileNotFoundError(f"no */{TRAINED} in {folder.absolute()}: train first, "
                                "`deepspeed train.py --size tiny` takes minutes")
    return results[-1].parent


def parse(line: str, first: int) -> tuple[list[Path], str]:
    """A line as (pictures named in it, the question); a name with spaces stands in double quotes.

    Within a sentence a name becomes "image 3", counting from `first`; before or after one it is left out. Raises
    FileNotFoundError for a word that looks like a picture's name but is no file.
    """
    known = Image.registered_extensions()
    files, words = [], []
    for word in re.findall(r'"[^"]*"|\S+', line):
        bare = word.strip("\"'()")
        name = bare.rstrip("?!.,;:'\")")
        if Path(name).suffix.lower() not in known:
            words.append(word)
        elif not (path := Path(os.path.expanduser(name))).is_file():
            raise FileNotFoundError(f"no picture {path}")
        else:
            if words and words[-1][-1] not in "?!.":
                words.append(f"image {first + len(files)}" + bare[len(name):].strip("'\")"))
            files.append(path)
    return files, " ".join(words)


def show(files: list[Path], first: int) -> list[Path]:
    """Print the pictures with the numbers they will have; raises as open_image does for what is no picture."""
    for i, file in enumerate(files, first):
        open_image(file)
        print(f"image {i}: {file}")
    return files


def take_turn(chat: Chat, line: str, waiting: list[Path]) -> list[Path]:
    """Print the answer to a line; returns the pictures that still wait for a question, none after an answer."""
    first = chat.n_images + len(waiting) + 1
    files, question = parse(line, first)
    waiting = waiting + show(files, first)
    if not question:
        return waiting
    for piece in chat.ask(question, waiting):
        print(piece, end="", flush=True)
    print()
    return []


def talk(chat: Chat, waiting: list[Path]):
    """Read lines from the terminal until it ends; a bad line is explained and changes nothing."""
    print(HELP)
    while True:
        before = chat.n_images
        try:
            line = input("> ").strip()
            if line == "/quit":
                return
            if line == "/new":
                chat, waiting = Chat(chat.model, chat.tokenizer), []
            elif line.startswith("/") and not Path(line.split()[0]).exists():
                print(HELP)
            elif line:
                waiting = take_turn(chat, line, waiting)
        except EOFError:
            return print()
        except KeyboardInterrupt:                               # ends an answer, not the conversation
            print("\nstopped; /quit or Ctrl-D ends the conversation")
            waiting = waiting if chat.n_images == before else []        # not yet seen, or part of the cut answer
        except (OSError, ValueError) as error:
            print(error)


def main():
    """The command line; a bad setting or file ends it with one line, whatever was asked before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", type=Path, help="pictures to talk about from the first question on")
    parser.add_argument("--question", action="append", help="answer this and end; may be given several times")
    parser.add_argument("--model", type=Path, help="folder of a training result; default the newest under out/")
    options = parser.parse_args()
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        folder = options.model or newest(Path("out"))
        model, config = load(folder, torch.float32 if device.type == "cpu" else torch.float16, device)
        chat = Chat(model, Tokenizer(towers(config)[0]))
        print(f"{folder}: LLaMA-2 {config.size}, {config.attention}, on {device.type}")
        waiting = show(options.images, first=1)
        if not options.question:
            return talk(chat, waiting)
        for line in options.question:
            print(f"> {line}")
            waiting = take_turn(chat, line, waiting)
    except (OSError, ValueError) as error:
        sys.exit(f"chat.py: {error}")


if __name__ == "__main__":
    main()
