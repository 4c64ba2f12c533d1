"""Files that come from elsewhere: how are official weight folders found, read safely and checked?

    find_weights ─► shards that the index names ─► read_file, memory-mapped ─► check_tensors ─► module

Nothing that is read here can run code: pickles are opened with `weights_only=True`. Nothing is loaded by halves:
every name and every shape must fit. The three helpers at the top serve all other files.
Side room of llama.py and vit.py, which say what their folders hold.
"""
import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

HERE = Path(__file__).parent


# ---- helpers for all files ----

def printable(text: str) -> str:
    """The text with escapes in place of characters that could command the terminal; line breaks stay."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name to write to; if the block ends well, that file takes the place of `path` in one step.

    So a kill in the middle leaves the file that was there before, and no reader ever meets half a file.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_json(path: Path, expected: type = dict):
    """The object in a JSON file, or the list where that is expected; raises ValueError that names the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, expected):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected a {expected.__name__}")
    return found


# ---- where weights lie ----

def find_weights(repository: str) -> Path:
    """The folder with the weights of a repository such as Qwen/Qwen-VL.

    It is `weights/<name>` in the working folder or beside this file, or else the newest snapshot in the cache of
    Hugging Face's programs. Raises FileNotFoundError with these folders and the command that gets the weights.
    """
    name = repository if repository.startswith("tiny/") else Path(repository).name
    local, beside = Path("weights") / name, HERE / "weights" / name
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache/huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    cached = hub / f"models--{repository.replace('/', '--')}" / "snapshots"
    for folder in (local, beside, *sorted(cached.glob("*"), key=os.path.getmtime, reverse=True)):
        if (folder / "config.json").exists():
            return folder
    # LLaMA's repositories hold the weights in two formats; one is enough.
    once = " --exclude '*.bin'" if "Llama" in repository else ""
    how = ("python -m tiny.pretrain" if repository.startswith("tiny/") else
           f"hf download {repository}{once} --local-dir {local}   (its license may have to be accepted first)")
    raise FileNotFoundError(f"no weights of {repository}: looked for {local.absolute()}, {beside} and {cached}. "
                            f"Get them with\n    {how}")


def shards(folder: Path, prefix: str) -> list[Path]:
    """The weight files of a folder that hold tensors whose names start with `prefix`, as the folder's index says.

    Raises FileNotFoundError where the folder holds no weights or lacks a file that the index names, and ValueError
    where the index names a file outside the folder.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if index.exists():
            if not isinstance(weight_map := read_json(index).get("weight_map"), dict):
                raise ValueError(f"{index} has no weight_map that names files: get it again")
            names = {str(shard) for name, shard in weight_map.items() if name.startswith(prefix)}
            if outside := [name for name in names if Path(name).name != name or name in ("", "..")]:
                raise ValueError(f"{index} names {outside[0]!r}, which is no file in its folder")
            if absent := sorted(name for name in names if not (folder / name).exists()):
                raise FileNotFoundError(f"{folder} lacks {', '.join(absent)}, which its index names: fetch them")
            return [folder / name for name in sorted(names)]
        if (folder / single).exists():
            return [folder / single]
    found = ", ".join(sorted(path.name for path in folder.glob("*"))[:8]) or "nothing"
    raise FileNotFoundError(f"{folder} holds no model.safetensors and no pytorch_model.bin, whole or with an "
                            f"index; found: {found}")


# ---- reading and checking ----

def read_file(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a file whose names start with `prefix`, by name.

    They are memory-mapped: their bytes are read from the disk when somebody copies them. Raises ValueError where
    the file is damaged or a pickle holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}
        pickled = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not all(isinstance(tensor, Tensor) for tensor in pickled.values()):
            raise TypeError
        return {name: tensor for name, tensor in pickled.items() if name.startswith(prefix)}
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged or holds no tensors, get it again: {type(error).__name__}") from error


def read_tensors(folder: Path, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for all names in a folder that start with `prefix`; raises as `shards` and `read_file` do."""
    for shard in shards(folder, prefix):
        yield from read_file(shard, prefix).items()


def check_tensors(expected: dict[str, Tensor], found: dict[str, Tensor], source: Path):
    """Raises ValueError with the missing, unexpected and wrongly shaped tensors, if there are any."""
    wrong = [f"missing {name} {tuple(t.shape)}" for name, t in expected.items() if name not in found]
    wrong += [f"unexpected {name} {tuple(t.shape)}" for name, t in found.items() if name not in expected]
    wrong += [f"{name} is {tuple(found[name].shape)}, expected {tuple(t.shape)}"
              for name, t in expected.items() if name in found and found[name].shape != t.shape]
    if wrong:
        more = f" (and {len(wrong) - 6} more)" if len(wrong) > 6 else ""
        raise ValueError(f"{source} does not fit the model: {'; '.join(wrong[:6])}{more}. "
                         "Is it of another size, or damaged?")


class SkipRandomValues(TorchFunctionMode):
    """PyTorch's hook into its own functions, here to leave out those that fill a new weight with random values."""
    FILLING = {Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.FILLING:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


@contextmanager
def without_values():
    """Modules that are built in this block have names and shapes, but no memory: they lie on the meta device.

    Their values come from files afterwards, so random first values would be useless; on the meta device they
    would also make PyTorch import its compiler, which takes a second.
    """
    with torch.device("meta"), SkipRandomValues():
        yield


def load_strictly(module: nn.Module, tensors: dict[str, Tensor], source: Path, dtype=None, device="cpu"):
    """Put `tensors` in place of a module's own, which may lie on the meta device; raises as `check_tensors` does.

    Without a dtype they keep the one of the file.
    """
    check_tensors(module.state_dict(), tensors, source)
    module.load_state_dict({name: t.to(device, dtype) for name, t in tensors.items()}, assign=True)
