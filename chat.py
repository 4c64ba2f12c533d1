"""Talking to a trained model in the terminal: several rounds, several images, answers as they are made.

    python chat.py examples/a.png examples/b.png                          asks you, round after round
    python chat.py examples/a.png --question "Describe image 1."          answers and ends

A picture can join at any round: name its file in the question. /new starts over, /quit ends.

A round costs only its own tokens, because the keys and values of earlier ones are kept. Needs no deepspeed.
Before: visualchat.py, data.py, train.py.
"""
import argparse
import contextlib
import hashlib
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from data import Round, encode_round, tensors
from llama import Cache, Tokenizer, read_file
from mmca import TEXT
from visualchat import TRAINED, ModelConfig, VisualChat, load, towers
from vit import open_image, pixels

with contextlib.suppress(ImportError):
    import readline                                             # line editing and history, where the system has it

HELP = "Ask about the images; name a picture's file to add it. /new starts over without any, /quit or Ctrl-D ends."


def fingerprint(folder: Path, config: ModelConfig) -> str:
    """A name that changes with the training result in a folder, and with the weights that it was trained on."""
    digest = hashlib.sha256((folder / TRAINED).read_bytes())
    for file in (file for tower in towers(config) for file in sorted(tower.iterdir())):
        digest.update(f"{file.absolute()} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def digest_of(picture: Path) -> str:
    return hashlib.sha256(picture.read_bytes()).hexdigest()


def checksum(values: Tensor) -> int:
    return zlib.crc32(values.view(torch.uint8).numpy())


class Album:
    """Pictures as LLaMA's layers see them under MMCA, which is the same in all conversations and at all places.

    So ViT and LLaMA look at a picture once: the newest stay in memory, all of them in a folder, if one is given. A
    picture goes by a digest of its bytes. Raises OSError where there can be no such folder.
    """
    NEWEST = 16                     # at 7b one takes 134 MB

    def __init__(self, model: VisualChat, folder: Path | None = None):
        self.model, self.folder, self.pages = model, folder, {}
        if folder:
            folder.mkdir(parents=True, exist_ok=True)

    def remember(self, digest: str, image_kv: Tensor) -> Tensor:
        self.pages[digest] = image_kv
        self.pages = dict(list(self.pages.items())[-self.NEWEST:])
        return image_kv

    def find(self, digest: str) -> Tensor | None:
        """Keys and values as Llama.image_kv, (layers, 2, n_queries, H_kv, D); None for a picture that is new.

        So is one whose file holds something else: it is looked at, and kept, once more.
        """
        file = self.folder and self.folder / f"{digest}.safetensors"
        if digest in self.pages or not file or not file.is_file():
            return self.pages.get(digest)
        llama = self.model.llama.config
        expected = (llama.num_hidden_layers, 2, self.model.vit.config.n_queries, llama.num_key_value_heads,
                    llama.hidden_size // llama.num_attention_heads)
        try:
            found = read_file(file)
            sound = found["image_kv"].shape == expected and checksum(found["image_kv"]) == found["checksum"].item()
        except (ValueError, KeyError, RuntimeError):
            return None
        return self.remember(digest, found["image_kv"].to(self.model.projection.weight)) if sound else None

    def add(self, digest: str, image_kv: Tensor):
        """Keep what `find` then finds."""
        self.remember(digest, image_kv)
        if self.folder:
            unfinished = self.folder / f"{digest}.{os.getpid()}"
            image_kv = image_kv.cpu().contiguous()
            save_file({"image_kv": image_kv, "checksum": torch.tensor(checksum(image_kv))}, unfinished)
            os.replace(unfinished, self.folder / f"{digest}.safetensors")

    @torch.no_grad()
    def show(self, pictures: list[Path], digests: list[str]) -> Tensor | None:
        """Of pictures in this order, side by side in the third dimension; None if none of them was seen before.

        Then they are better read together with the question that brings them. Raises as open_image does.
        """
        pages = {digest: self.find(digest) for digest in digests}
        if all(page is None for page in pages.values()):
            return None
        for picture, digest in zip(pictures, digests):
            if pages[digest] is None:
                image = pixels(open_image(picture), self.model.vit.config.image_size)[None]
                pages[digest] = self.model.image_kv(image.to(self.model.projection.weight.device))
                self.add(digest, pages[digest])
        return torch.cat([pages[digest] for digest in digests], dim=2)


class Chat:
    """One conversation: the ids and kinds said so far, and the cache that covers all but the last few of them."""

    def __init__(self, model: VisualChat, tokenizer: Tokenizer, album: Album | None = None,
                 temperature: float = 0.0, top_p: float = 1.0):
        self.model, self.tokenizer, self.album = model, tokenizer, album or Album(model)
        self.temperature, self.top_p = temperature, top_p
        self.ids, self.kind, self.n_images = [], [], 0
        self.cache = Cache(model.llama, 1, model.llama.config.max_position_embeddings)

    def again(self) -> "Chat":
        """A new conversation with the same model and album."""
        return Chat(self.model, self.tokenizer, self.album, self.temperature, self.top_p)

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
        context_free = model.llama.attention == "mmca"          # else an image's keys depend on what is before it
        digests = [digest_of(file) for file in files]
        image_kv = self.album.show(files, digests) if context_free else None
        keep = [] if context_free and image_kv is None else None
        images = tensors(new, vision.image_size)["images"].to(device) if image_kv is None else None
        said, kinds, before = self.ids + new.ids, self.kind + new.kind, self.cache.past
        fed = sum(before[0])
        ids, kind = (torch.tensor([values[fed:]], device=device) for values in (said, kinds))
        heard, answer, text, shown = False, [], "", ""
        try:
            for token in model.generate(ids, kind, images, None, max_new_tokens, self.cache, image_kv,
                                        self.temperature, self.top_p, keep):
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
            if heard:       # the answer's end is not in the cache: it is fed with the next question
                self.ids = [*said, *answer, self.tokenizer.eos]
                self.kind = kinds + [TEXT] * (len(answer) + 1)
                self.n_images += len(files)
                if keep and files:                              # after the answer, which should not wait for it
                    for digest, page in zip(digests, torch.stack(keep).split(vision.n_queries, dim=2)):
                        self.album.add(digest, page)
            else:                                               # the question was not heard: nothing was said
                self.cache.past = before


def newest(folder: Path) -> Path:
    """The newest training result under a folder; raises FileNotFoundError that says how to make one."""
    results = sorted(folder.glob(f"*/{TRAINED}"), key=lambda path: path.stat().st_mtime)
    if not results:
        raise FileNotFoundError(f"no */{TRAINED} in {folder.absolute()}: train first, "
                                "`python train.py --size tiny` takes minutes")
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
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"no picture {file}")
        open_image(file)
    for i, file in enumerate(files, first):                     # none is announced unless all will be there
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
            if line.lower() == "/quit":
                return
            if line.lower() == "/new":
                chat, waiting = chat.again(), []
            elif line.startswith("/") and not Path(line.split()[0]).suffix:    # no picture, absent or not
                print(HELP)
            elif line:
                waiting = take_turn(chat, line, waiting)
        except EOFError:
            return print()
        except KeyboardInterrupt:                               # ends an answer, not the conversation
            print("\nstopped; /quit or Ctrl-D ends the conversation")
        except (OSError, ValueError) as error:
            print(error)
        if chat.n_images != before:                             # the waiting pictures are in, however it ended
            waiting = []


def main():
    """The command line; a bad setting or file ends it with one line, whatever was asked before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", type=Path, help="pictures to talk about from the first question on")
    parser.add_argument("--question", action="append", help="answer this and end; may be given several times")
    parser.add_argument("--model", type=Path, help="folder of a training result; default the newest under out/")
    parser.add_argument("--keep", type=Path, help="folder that keeps what LLaMA sees in each picture")
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
    if options.keep and options.keep.exists() and not options.keep.is_dir():
        parser.error(f"--keep {options.keep}: expected a folder, or a name for one")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    compiler = os.environ.get("CXX") or "g++"                   # as torch has it
    if options.compile and device.type == "cpu" and not shutil.which(compiler):
        parser.error(f"--compile needs a C++ compiler: found no {compiler}; CXX can name another")
    try:
        folder = options.model or newest(Path("out"))
        model, config = load(folder, torch.float32 if device.type == "cpu" else torch.float16, device)
        if options.keep and config.attention != "mmca":
            raise ValueError("--keep needs MMCA: under causal attention what LLaMA sees hangs on what was before")
        album = Album(model, options.keep and options.keep / fingerprint(folder, config))
        chat = Chat(model, Tokenizer(towers(config)[0]), album, options.temperature, options.top_p)
        if options.compile:
            model.llama.compile_step()
            print("the first answer without and the first one with a picture stop for a while to be compiled")
        print(f"{folder}: LLaMA-2 {config.size}, {config.attention}, on {device.type}")
        waiting = show(options.images, first=1)
        if not options.question:
            return talk(chat, waiting)
        for line in options.question:
            print(f"> {line}")
            waiting = take_turn(chat, line, waiting)
    except (OSError, ValueError) as error:
        sys.exit(f"chat.py: {error}")
    except RuntimeError as error:                               # also what torch says when a compiler fails
        if not options.compile:
            raise
        sys.exit(f"chat.py: {error}\nThis was with --compile; try without.")
    except KeyboardInterrupt:
        sys.exit(130)                                           # as shells have it


if __name__ == "__main__":
    main()
