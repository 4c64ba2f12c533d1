"""How is an image computed only once? What the towers make of images, kept for later.

    KeptFeatures   for training: what the frozen ViT makes of an image
    Album          for chat: the keys and values that LLaMA's layers make of its image tokens

Under MMCA an image token attends to itself alone. So the keys (before RoPE) and values of an image depend on
nothing but the image: they are the same in every conversation and at every position. For an image that is known,
neither the ViT nor LLaMA runs. Side room of train.py and chat.py.
"""
import contextlib
import hashlib
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from data import ImageFile
from pixels import load_pixels, normalized, read_bytes
from visualchat import TRAINED, ModelConfig, VisualChat, towers
from vit import VisionTransformer
from weights import FLOATS, read_file, replacing


def digest_of(image: ImageFile) -> str:
    """What an image is known by: its bytes, wherever it lies; raises as `read_bytes` does."""
    return hashlib.sha256(read_bytes(image)).hexdigest()


def write_tensor(file: Path, name: str, values: Tensor):
    """A safetensors file of one tensor and its checksum; raises OSError that names it."""
    values = values.cpu().contiguous()
    checksum = torch.tensor(zlib.crc32(values.view(torch.uint8).numpy()))
    try:
        with replacing(file) as unfinished:
            save_file({name: values, "checksum": checksum}, unfinished)
    except SafetensorError as error:
        raise OSError(f"could not write {file}: {error}") from error


def read_tensor(file: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    """What `write_tensor` wrote; raises ValueError where the file holds anything else."""
    try:
        found = read_file(file)
    except ValueError:
        found = {}
    if found.keys() != {name, "checksum"} or found[name].shape != shape or found[name].dtype not in FLOATS or (
            found["checksum"].numel() != 1) or (
            zlib.crc32(found[name].contiguous().view(torch.uint8).numpy()) != found["checksum"].item()):
        raise ValueError(f"{file} is damaged, or does not hold {name} {shape}: delete it")
    return found[name]


# ---- for training ----

class KeptFeatures:
    """What the frozen ViT makes of images, kept on disk, so that training need not run it again.

    Each image has one FP16 safetensors file, which is named by a digest of the image's bytes. It lies in a folder
    that is named by a digest of the ViT's weights. So changed images and other weights never get old features.
    """

    def __init__(self, folder: Path, vit: VisionTransformer):
        digest = hashlib.sha256(f"4 {vit.config}".encode())     # count up when load_pixels or the files change
        for name, tensor in vit.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).cpu().numpy())
        self.folder, self.shape = folder / digest.hexdigest()[:16], (vit.config.n_queries, vit.config.output_dim)

    def file(self, image: ImageFile) -> Path:
        return self.folder / f"{digest_of(image)}.safetensors"

    def load(self, image: ImageFile) -> Tensor:
        """(n_queries, output_dim) in FP16; raises ValueError where there is no file or it holds something else."""
        if not (file := self.file(image)).exists():
            raise ValueError(f"no features were kept of {image}: it, or what the ViT made of it, was bad")
        return read_tensor(file, "features", self.shape)

    @torch.no_grad()
    def fill(self, images: list[ImageFile], vit: VisionTransformer, skip_bad: bool = False):
        """Run the ViT on those that have no file yet, one at a time: in a batch the last bits differ from those
        of an image alone, so they would depend on what was there before.

        Raises ValueError for an image that cannot be read or overflows the ViT's type, unless skip_bad is set.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        weight, size = next(vit.parameters()), vit.config.image_size

        def opened(image: ImageFile) -> tuple[ImageFile, Path, Tensor] | None:
            try:
                file = self.file(image)
                return None if file.exists() else (image, file, load_pixels(image, size))
            except (ValueError, OSError) as error:
                if not skip_bad:
                    raise ValueError(f"{error}. Correct it, or leave out what shows it with --skip-bad") from error
                return None                     # `load` will find no file for this image and say so.

        with ThreadPoolExecutor(4) as pool:                     # An image may take half a GB while it is opened.
            for i in tqdm(range(0, len(images), 16), "features", leave=False):      # so few wait in memory
                for image, file, pixels in filter(None, pool.map(opened, images[i:i + 16])):
                    values = vit(normalized(pixels[None].to(weight.device), weight.dtype))[0].half().cpu()
                    if values.isfinite().all():
                        write_tensor(file, "features", values)
                    elif not skip_bad:
                        raise ValueError(f"the ViT makes values of {image} that are no finite numbers: try "
                                         "--precision bf16, or leave out what shows it with --skip-bad")


# ---- for chat ----

def fingerprint(folder: Path, config: ModelConfig) -> str:
    """A name that changes with the training result in a folder, and with the weights of its towers."""
    digest = hashlib.sha256(b"3" + (folder / TRAINED).read_bytes())     # count up, too, and with Album's files
    for file in (file for tower in towers(config) for file in sorted(tower.iterdir())):
        digest.update(f"{file.absolute()} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


class Album:
    """The images that were used last in memory, and all of them in a folder, if one is given.

    Chat computes all images of a round anew if one of them is unknown: one pass over all is simpler, and a round
    rarely mixes old and new ones. Raises OSError where the folder cannot be made.
    """
    NEWEST = 16                     # at 7b one image takes 134 MB in 16 bits

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
            with contextlib.suppress(ValueError):
                self.remember(digest, read_tensor(file, "image_kv", expected).to(self.model.projection.weight))
        if digest in self.known:
            self.remember(digest, self.known.pop(digest))       # it is the newest again
        return self.known.get(digest)

    def find_all(self, digests: list[str]) -> Tensor | None:
        """Keys and values of these images, one after the other in dimension 3; None unless all are known."""
        parts = [self.find(digest) for digest in digests]
        if not parts or any(part is None for part in parts):
            return None
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)         # `cat` would copy a single one

    def add(self, digests: list[str], image_kv: Tensor):
        """Remember images by their keys and values, one after the other in dimension 3."""
        for digest, part in zip(digests, image_kv.split(self.model.vit.config.n_queries, dim=3), strict=True):
            if self.find(digest) is None:
                self.remember(digest, part)
                self.unsaved.append((digest, part))

    def save(self):
        """Write the new images to the folder; raises OSError where that fails, and does not try them again."""
        unsaved, self.unsaved = self.unsaved, []
        for digest, image_kv in unsaved if self.folder else ():
            write_tensor(self.folder / f"{digest}.safetensors", "image_kv", image_kv)
