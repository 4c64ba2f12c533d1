"""How is an image computed only once? What LLaMA's layers know of images, kept for later conversations.

Under MMCA an image token attends to itself alone. So the keys (before RoPE) and values that LLaMA's layers compute
for an image depend on nothing but the image: they are the same in every conversation and at every position. For an
image that is known, neither the ViT nor LLaMA runs. Side room of chat.py.
"""
import contextlib
import hashlib
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from visualchat import TRAINED, ModelConfig, VisualChat, towers
from vit import load_pixels
from weights import read_file, replacing


def fingerprint(folder: Path, config: ModelConfig) -> str:
    """A name that changes with the training result in a folder, and with the weights of its towers."""
    digest = hashlib.sha256(b"2" + (folder / TRAINED).read_bytes())     # count up when Album writes other tensors
    for file in (file for tower in towers(config) for file in sorted(tower.iterdir())):
        digest.update(f"{file.absolute()} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def checksum(values: Tensor) -> int:
    return zlib.crc32(values.view(torch.uint8).numpy())


class Album:
    """The newest images in memory, and all of them in a folder, if one is given.

    An image is known by a digest of its file's bytes. Raises OSError where the folder cannot be made.
    """
    NEWEST = 16                     # at 7b one image takes 134 MB

    def __init__(self, model: VisualChat, folder: Path | None = None):
        self.model, self.folder, self.known, self.unsaved = model, folder, {}, []
        if folder:
            folder.mkdir(parents=True, exist_ok=True)

    def remember(self, digest: str, image_kv: Tensor):
        self.known[digest] = image_kv
        self.known = dict(list(self.known.items())[-self.NEWEST:])

    def find(self, digest: str) -> Tensor | None:
        """An image's (layers, 2, H_kv, n_queries, D) from memory or the folder; None for one that is new.

        An image whose file is damaged or holds something else counts as new.
        """
        file = self.folder and self.folder / f"{digest}.safetensors"
        if digest not in self.known and file and file.is_file():
            llama = self.model.llama.config
            expected = (llama.num_hidden_layers, 2, llama.num_key_value_heads, self.model.vit.config.n_queries,
                        llama.head_dim)
            with contextlib.suppress(ValueError, KeyError, RuntimeError):
                found = read_file(file)
                if found["image_kv"].shape == expected and checksum(found["image_kv"]) == found["checksum"].item():
                    self.remember(digest, found["image_kv"].to(self.model.projection.weight))
        return self.known.get(digest)

    @torch.no_grad()
    def image_kv(self, files: list[Path]) -> Tensor | None:
        """Keys and values of these images, one after the other in dimension 3, as `Llama.image_kv` gives them.

        New images go through the ViT and LLaMA together. None for no files. Raises as `read_image` does.
        """
        digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        parts = {digest: self.find(digest) for digest in digests}
        if new := {digest: file for digest, file in zip(digests, files) if parts[digest] is None}:
            images = torch.stack([load_pixels(file, self.model.vit.config.image_size) for file in new.values()])
            tokens = self.model.image_tokens(images.to(self.model.projection.weight.device))
            all_new = self.model.llama.image_kv(tokens.flatten(0, 1))
            for digest, image_kv in zip(new, all_new.split(tokens.shape[1], dim=3)):
                parts[digest] = image_kv
                self.remember(digest, image_kv)
                self.unsaved.append((digest, image_kv))
        return torch.cat([parts[digest] for digest in digests], dim=3) if files else None

    def save(self):
        """Write the new images to the folder; raises OSError where that fails, and does not try them again."""
        unsaved, self.unsaved = self.unsaved, []
        for digest, image_kv in unsaved if self.folder else ():
            image_kv = image_kv.cpu().contiguous()
            with replacing(self.folder / f"{digest}.safetensors") as file:
                save_file({"image_kv": image_kv, "checksum": torch.tensor(checksum(image_kv))}, file)
