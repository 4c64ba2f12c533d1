"""Files that come from elsewhere: how are official weight folders found, read safely and checked?

    find_weights ─► shards that the index names ─► read_file, memory-mapped ─► check_tensors ─► module

Nothing that is read here can run code: pickles are opened with `weights_only=True`. Nothing is loaded by halves:
every name and every shape must fit, and every value be a number. The helpers at the top serve all other files.
Side room of llama.py and vit.py, which say what their folders hold.
"""
import json
import os
import pickletools
import shlex
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

HERE = Path(__file__).parent


# ---- helpers for all files ----

def printable(text: str) -> str:
    """The text with escapes in place of characters that could command the terminal; line breaks stay."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name to write to; if the block ends well, that file takes the place of `path` in one step.

    So a kill in the middle leaves the file that was there before, and no reader ever meets half a file. Raises
    FileNotFoundError where the folder is absent.
    """
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}, into which {path} should be written")
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_readable(path: Path):
    """Raises FileNotFoundError for no file, PermissionError, and ValueError for a pointer in place of the file."""
    if not path.is_file():                                      # a pipe might never end
        raise FileNotFoundError(f"no file {path}")
    with open(path, "rb") as file:
        if file.read(23) == b"version https://git-lfs":
            raise ValueError(f"{path} is a pointer of Git LFS, {path.stat().st_size} bytes in place of a file")


def read_json(path: Path, expected: type = dict):
    """The object in a JSON file, or the list where that is expected; raises ValueError that names the file."""
    check_readable(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, expected):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected a {expected.__name__}")
    return found


def sizes(config: type, found: dict, source: Path):
    """The dataclass `config`, whose fields are all int or float, from what a configuration says.

    Raises ValueError where a value is absent that has no default, or is none that a model could have: a whole
    number from 1 to 2²⁰, at most 1,000 layers, where the field is an int, else a number above 0, at most 10¹².
    """
    bad = []
    for field in fields(config):
        value, most = found.get(field.name), 1e12 if field.type is float else 2 ** 20
        most = 1000 if "layers" in field.name else most
        if field.name in found and not (type(value) in (int, field.type) and 0 < value <= most):
            bad.append(f"{field.name} {value!r:.60}")
    if bad:
        raise ValueError(f"{source} has {', '.join(bad)}, expected positive numbers, whole and not huge ones for "
                         "sizes")
    if absent := [field.name for field in fields(config) if field.name not in found and field.default is MISSING]:
        raise ValueError(f"{source} lacks {', '.join(absent)}")
    return config(**{field.name: field.type(found[field.name]) for field in fields(config) if field.name in found})


# ---- where weights lie ----

def needed_files(folder: Path, prefix: str) -> list[Path] | None:
    """The weight files for tensors whose names start with `prefix`, there or not, as a folder's index says.

    None where the folder has no weights and no index. Raises ValueError where the index names a file outside the
    folder.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if index.exists():
            if not isinstance(weight_map := read_json(index).get("weight_map"), dict):
                raise ValueError(f"{index} has no weight_map that names files: get it again")
            names = {str(shard) for name, shard in weight_map.items() if name.startswith(prefix)}
            if outside := [name for name in names if Path(name).name != name or name in ("", "..")]:
                raise ValueError(f"{index} names {outside[0]!r}, which is no file in its folder")
            return [folder / name for name in sorted(names)]
        if (folder / single).exists():
            return [folder / single]
    return None


def shards(folder: Path, prefix: str) -> list[Path]:
    """`needed_files`, which must all be there: raises FileNotFoundError, and ValueError as that one does."""
    if (needed := needed_files(folder, prefix)) is not None:
        if absent := [path.name for path in needed if not path.exists()]:
            raise FileNotFoundError(f"{folder} lacks {len(absent)} of the files that its index names, such as "
                                    f"{', '.join(absent[:4])[:400]}: fetch them")
        return needed
    found = ", ".join(sorted(path.name for path in folder.glob("*"))[:8]) or "nothing"
    raise FileNotFoundError(f"{folder} holds no model.safetensors and no pytorch_model.bin, whole or with an "
                            f"index; found: {found}")


def is_whole(folder: Path) -> bool:
    """Whether a folder holds a training result or a whole tower; of a Qwen-VL, the encoder's files are enough."""
    try:
        is_llama = read_json(folder / "config.json").get("model_type") == "llama"
        if is_llama and not (folder / "tokenizer.model").exists():
            return False
        return bool((folder / "trained.safetensors").exists() or shards(folder, "transformer.visual.") or
                    shards(folder, ""))
    except (OSError, ValueError):
        return False


def download(repository: str, folder: Path | None, names: Iterable[str] = ()) -> str:
    """The command that gets these files of a repository, or what is needed first, into a folder or the cache."""
    if repository.startswith("tiny/"):
        return "python train.py --size tiny" if repository == "tiny/chat" else "python -m tiny.pretrain"
    # Files that are there, but damaged, would not be fetched again without force. LLaMA's repositories hold the
    # weights in two formats, and one is enough. The index of a Qwen-VL says which of its shards are needed.
    which = (f"{shlex.join(names)} --force-download" if names else
             "--exclude '*.bin'" if "Llama" in repository else "--include '*.json'")
    return f"hf download {repository} {which}{f' --local-dir {shlex.quote(str(folder))}' if folder else ''}"


def local_folders(repository: str) -> tuple[Path, Path]:
    """Where its weights lie if not in a cache: in the working folder, or beside this file."""
    name = repository if repository.startswith("tiny/") else Path(repository).name
    return Path("weights") / name, HERE / "weights" / name


def find_weights(repository: str) -> Path:
    """The folder with the weights of a repository such as Qwen/Qwen-VL.

    It is `weights/<name>` in the working folder or beside this file, or else the newest snapshot in the cache of
    Hugging Face's programs; the first one that lacks no file. Raises FileNotFoundError with these folders and the
    command that gets the weights.
    """
    local, beside = local_folders(repository)
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    hub = os.environ.get("HF_HUB_CACHE") or f"{home}/hub"
    cached = Path(hub).expanduser() / f"models--{repository.replace('/', '--')}" / "snapshots"
    snapshots = (folder for folder in cached.glob("*") if folder.is_dir())
    folders = local, beside, *sorted(snapshots, key=os.path.getmtime, reverse=True)
    if whole := [folder for folder in folders if is_whole(folder)]:
        return whole[0]
    begun = "".join(f"; {folder.absolute()} is not complete" for folder in folders if folder.exists())
    then = ("   (its license must be accepted first)" if "Llama" in repository else
            "\n    python train.py --size 7b --check-weights   (names the shards to get)" if "Qwen" in repository
            else "")
    raise FileNotFoundError(f"no weights of {repository}: looked for {local.absolute()}, {beside} and {cached}"
                            f"{begun}. Get them with\n    {download(repository, local)}{then}")


# ---- reading and checking ----

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What `torch.save` writes of a table of tensors needs no other functions and classes than these.
IN_PICKLES = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter",
              "torch FloatStorage", "torch HalfStorage", "torch BFloat16Storage", "torch DoubleStorage",
              "torch LongStorage"}


def check_pickle(path: Path):
    """Raises ValueError where a pickle is more than a table of tensors.

    `weights_only=True` keeps a pickle from running code, but lets a few bytes ask for any amount of memory, as in
    bytearray(10 ** 10). So the names in it are checked first, and only then is it loaded.
    """
    with zipfile.ZipFile(path) as archive:
        files = archive.infolist()
        table, = (file for file in files if file.filename.lower().endswith("data.pkl"))  # in any case, as PyTorch
        if any(file.compress_type for file in files) or len({file.filename for file in files}) < len(files):
            raise ValueError("it is compressed, or has a file twice")
        for code, argument, _ in pickletools.genops(archive.read(table)):
            if code.name in ("INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4") or (
                    code.name == "GLOBAL" and argument not in IN_PICKLES):
                raise ValueError(f"it names {argument or code.name}")


def read_file(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a file whose names start with `prefix`, by name.

    They are memory-mapped: their bytes are read from the disk when somebody copies them. Raises ValueError where
    the file is damaged or a pickle holds anything but tensors, and as `check_readable` does.
    """
    check_readable(path)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}
        check_pickle(path)
        pickled = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not all(isinstance(tensor, Tensor) for tensor in pickled.values()):
            raise ValueError("not all of it is tensors")
        # A pickle may claim more values than its part of the file has; PyTorch would map what lies behind it.
        with zipfile.ZipFile(path) as archive:
            written = Counter(file.file_size for file in archive.infolist() if "/data/" in file.filename)
        storages = [t.untyped_storage() for t in pickled.values() if t.layout is torch.strided and not t.is_meta]
        if not Counter({one.data_ptr(): one.nbytes() for one in storages if one.nbytes()}.values()) <= written:
            raise ValueError("a tensor claims more or fewer values than are stored for it")
        return {name: tensor for name, tensor in pickled.items() if name.startswith(prefix)}
    except Exception as error:                      # damaged files make readers raise errors of all kinds
        if "Cannot allocate memory" in str(error):
            raise OSError(f"{path} is too large to be mapped into this machine's memory") from error
        reason = printable(f"{type(error).__name__} {error}".splitlines()[0][:200])
        raise ValueError(f"{path} is damaged, or holds other things than dense tensors of floating-point numbers: "
                         f"get it again. {reason}") from error


def read_tensors(folder: Path, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for all names in a folder that start with `prefix`; raises as `shards` and `read_file` do."""
    for shard in shards(folder, prefix):
        yield from read_file(shard, prefix).items()


def by_name(tensors: Iterable[tuple[str, Tensor]], source: Path) -> dict[str, Tensor]:
    """Tensors by name; raises ValueError for a name that comes twice, as from two shards."""
    found = {}
    for name, tensor in tensors:
        if name in found:
            raise ValueError(f"{source} holds {name!s:.80} twice: get it again")
        found[name] = tensor
    return found


def check_tensors(expected: dict[str, Tensor], found: dict[str, Tensor], source: Path):
    """Raises ValueError with the missing, unexpected and wrong tensors: of another shape, sparse, or no floats."""
    wrong = [f"missing {name} {tuple(t.shape)}" for name, t in expected.items() if name not in found]
    wrong += [f"unexpected {name!s:.80} {str(tuple(t.shape)):.80}" for name, t in found.items()
              if name not in expected]
    wrong += [f"{name} is {str(tuple(found[name].shape)):.80}, expected {tuple(t.shape)}"
              for name, t in expected.items() if name in found and found[name].shape != t.shape]
    wrong += [f"{name!s:.80} is {t.dtype}, {t.layout} on {t.device.type}, expected dense floating-point values"
              for name, t in found.items() if t.dtype not in FLOATS or t.layout is not torch.strided or t.is_meta]
    wrong += [f"{name!s:.80} repeats its values" for name, t in found.items()
              if t.layout is torch.strided and not t.is_meta and t.untyped_storage().nbytes() < t.nbytes]
    if wrong:
        more = f" (and {len(wrong) - 6} more)" if len(wrong) > 6 else ""
        raise ValueError(f"{source} does not fit the model: {'; '.join(wrong[:6])}{more}. "
                         "Is it of another size, or damaged?")


def check_numbers(name: str, tensor: Tensor, source: Path):
    """Raises ValueError where a tensor holds a NaN or an infinite value.

    A NaN anywhere makes both the least and the largest value NaN. `isfinite` would make several tensors of that
    size and take much longer.
    """
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        raise ValueError(f"{source}: {name} holds values that are no finite numbers, get it again")


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
    placed = {}
    for name, t in tqdm(tensors.items(), f"loading {source}", delay=1, leave=False, disable=None):
        placed[name] = t.to(device, dtype)      # a bar where it takes longer than a second
        if not placed[name].is_meta:
            check_numbers(name, placed[name], source)
    if len({t.data_ptr() for t in placed.values()}) < len(placed):      # Two names share values; one may train.
        placed = {name: t.clone() for name, t in placed.items()}
    module.load_state_dict(placed, assign=True)
