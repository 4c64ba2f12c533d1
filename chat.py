"""Talking to a trained model in the terminal: several rounds, several images, answers as they are made.

    python chat.py examples/a.png examples/b.png                          asks you, round after round
    python chat.py examples/a.png --question "Describe image 1."          answers and ends

A picture can join at any round: write its file name into the question. A round costs only its own tokens, because the
keys and values of all earlier ones are kept. Needs no deepspeed. Before: visualchat.py and data.py, train.py.
"""
import argparse
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

HELP = "Ask about the images; name a picture's file to add it. /new starts over, /quit or Ctrl-D ends."


class Chat:
    """One conversation with a model; remembers the ids and kinds said so far, and the cache that covers most of them."""

    def __init__(self, model: VisualChat, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.ids, self.kind, self.n_images, self.cache, self.cached = [], [], 0, {}, 0

    def ask(self, question: str, files: list[Path] = (), max_new_tokens: int = 512) -> Iterator[str]:
        """Introduce the pictures, ask, and yield the answer piece by piece.

        Raises OSError for a picture that cannot be read and ValueError where the context is full; the conversation is
        then as it was before.
        """
        model, config = self.model, self.model.vit.config
        new = encode_round(Round(tuple(files), question), self.n_images, not self.ids, self.tokenizer, config.n_queries)
        limit = model.llama.config.max_position_embeddings
        if len(self.ids) + len(new.ids) >= limit:
            raise ValueError(f"{len(self.ids)} positions said and {len(new.ids)} to ask do not fit into {limit}: start over")
        device = model.projection.weight.device
        images = tensors(new, config.image_size)["images"].to(device)
        self.ids, self.kind, self.n_images = self.ids + new.ids, self.kind + new.kind, self.n_images + len(files)
        fed = torch.tensor([self.ids[self.cached:]], device=device)
        answer, shown = [], ""
        try:
            for token in model.generate(fed, torch.tensor([self.kind], device=device), images, max_new_tokens, self.cache):
                if token.item() == self.tokenizer.eos:
                    break
                answer.append(token.item())
                text = self.tokenizer.decode(answer)
                if not text.endswith("\ufffd"):                 # half a character: its other bytes are still to come
                    yield text[len(shown):]
                    shown = text
        finally:                                                # also after Ctrl-C: the answer ends where it was stopped
            self.ids += [*answer, self.tokenizer.eos]
            self.kind += [TEXT] * (len(answer) + 1)
            self.cached = next(iter(self.cache.values()))[0].shape[2] if self.cache else 0
            # what the cache does not cover yet, the end of this answer, is fed with the next question


def newest(folder: Path) -> Path:
    """The training result under a folder that was written last; raises FileNotFoundError that says how to make one."""
    results = sorted(folder.glob(f"*/{TRAINED}"), key=lambda path: path.stat().st_mtime)
    if not results:
        raise FileNotFoundError(f"no */{TRAINED} in {folder.absolute()}: train first, `deepspeed train.py --size tiny` "
                                "takes minutes")
    return results[-1].parent


def parse(line: str) -> tuple[list[Path], str]:
    """A line as (pictures named in it, the question that is left); a name with spaces stands in double quotes.

    Raises FileNotFoundError for a word that looks like a picture's name but is no file.
    """
    known = Image.registered_extensions()
    files, words = [], []
    for word in re.findall(r'"[^"]*"|\S+', line):
        path = Path(word.strip('"')).expanduser()
        if path.suffix.lower() not in known:
            words.append(word)
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"no picture {path}")
    return files, " ".join(words)


def show(files: list[Path], first: int) -> list[Path]:
    """Print the pictures with the numbers they will have; raises OSError for a file that is no readable picture."""
    for i, file in enumerate(files, first):
        open_image(file)
        print(f"image {i}: {file}")
    return files


def take_turn(chat: Chat, line: str, waiting: list[Path]) -> list[Path]:
    """Print the answer to a line; returns the pictures that still wait for a question, none after an answer."""
    files, question = parse(line)
    waiting = waiting + show(files, chat.n_images + len(waiting) + 1)
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
        try:
            line = input("> ").strip()
            if line == "/quit":
                return
            if line == "/new":
                chat, waiting = Chat(chat.model, chat.tokenizer), []
            elif line:
                waiting = take_turn(chat, line, waiting)
        except EOFError:
            return print()
        except KeyboardInterrupt:                               # ends an answer, not the conversation
            waiting = []
            print()
        except (OSError, ValueError) as error:
            print(error)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", type=Path, help="pictures to talk about from the first question on")
    parser.add_argument("--question", action="append", help="answer this and end; may be given several times")
    parser.add_argument("--model", type=Path, help="folder of a training result; default the newest under out/")
    options = parser.parse_args()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
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
