"""How does a conversation outlive its program? A JSON file with its rounds; images by the names of their files.

In what follows `chat` is a chat.Chat; chat.py imports this file, and not the other way round. Side room of
chat.py.
"""
import base64
import binascii
import json
from pathlib import Path

from album import digest_of
from data import Answered
from names import InMemory
from pixels import read_image
from weights import read_json, replacing

DATA_URL = "data:image/png;base64,"         # before the content of an image that has no file


def save_conversation(chat, path: Path):
    """Write a conversation; raises OSError."""
    found = [{"images": [str(image.absolute()) if isinstance(image, Path) else
                         DATA_URL + base64.b64encode(image.read_bytes()).decode() for image in one.images],
              "digests": one.digests, "question": one.question, "answer": chat.answer_of(one), "ids": one.ids,
              "has_ended": one.has_ended} for one in (chat.left, *chat.rounds)]
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps({"left": found[0], "rounds": found[1:]}, indent=1) + "\n")


def are_ids_of(ids, answer: str, chat) -> bool:
    """Whether the chat's tokenizer makes this answer of these ids; another one may cut words otherwise."""
    rows = range(chat.model.llama.config.vocab_size)
    return (isinstance(ids, list) and all(type(id) is int and id in rows for id in ids)
            and chat.tokenizer.decode(ids) == answer)


def read_round(one: dict, chat) -> Answered:
    """A round that was saved; raises as `load_conversation`, and TypeError, LookupError and AttributeError."""
    images = tuple(InMemory(base64.b64decode(name.removeprefix(DATA_URL), validate=True))
                   if name.startswith(DATA_URL) else Path(name) for name in one["images"])
    texts = one["question"], one["answer"]
    if not all(isinstance(text, str) for text in texts) or len(images) != len(one["digests"]):
        raise TypeError("a question and an answer are texts, and each image has a digest")
    for image, digest in zip(images, one["digests"]):
        read_image(image)
        if digest_of(image) != digest:
            raise ValueError(f"{image} has changed since the conversation was saved")
    ids = one["ids"] if are_ids_of(one["ids"], one["answer"], chat) else chat.tokenizer.encode(one["answer"])
    return Answered(images, tuple(one["digests"]), one["question"], ids, one["has_ended"] is True)


def load_conversation(chat, path: Path):
    """Go on with a conversation that was saved, maybe with another model; the one so far is left.

    Raises FileNotFoundError or ValueError for what cannot be read; the conversation is then as it was before.
    """
    try:
        found = read_json(path)
        left, *rounds = (read_round(one, chat) for one in (found["left"], *found["rounds"]))
    except (TypeError, LookupError, AttributeError, binascii.Error) as error:
        reason = f"{error} is absent" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is no conversation that was saved here: {reason}") from error
    chat.clear()
    chat.rounds, chat.left = rounds, left                       # The next question reads all of it.
