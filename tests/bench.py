"""What things cost, as ratios within one run. Not part of the test suite.

    python tests/bench.py images      memory: one picture out of a 2 GB JSON file of base64 texts
    python tests/bench.py features    time: a training step on kept features against one that runs the ViT
"""
import argparse
import base64
import resource
import subprocess
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
from PIL import Image

import shapes
from data import Conversations, Features, collate, open_picture, packed, read
from llama import Tokenizer
from visualchat import ModelConfig, build, towers


def images(gigabytes: float = 2):
    """Peak resident memory of building the index and, in a fresh process, of reading one picture with it."""
    buffer = BytesIO()
    Image.effect_noise((640, 480), 100).convert("RGB").save(buffer, "JPEG", quality=95)
    text = base64.b64encode(buffer.getvalue()).decode()
    count = round(gigabytes * 1e9 / len(text))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "SN.json"
        with open(file, "w") as stream:
            stream.write("{")
            for i in range(count):
                stream.write(f'{"," * (i > 0)} "SN_IMG_{i:08d}": "{text}"')
            stream.write("}")
        print(f"{count} pictures, {file.stat().st_size / 1e9:.2f} GB")
        for what in ("import", "index", "read"):
            command = [sys.executable, __file__, "peak", "--step", what, "--file", str(file)]
            subprocess.run(command, check=True)


def peak(step: str, file: Path):
    """Do one step and print this process's peak resident memory, in MB of 1,000,000 bytes, and the time taken."""
    started = time.perf_counter()
    if step != "import":
        found = packed(file)
    if step == "read":
        open_picture(list(found.values())[-1], 448)
    print(f"{step:6}  peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6:.0f} MB, "
          f"{time.perf_counter() - started:.2f} s")


def features():
    """Forward and backward of the tiny model over the same batches, with the ViT and with what it once made."""
    shapes.ensure(Path("data/tiny"))
    config = ModelConfig()
    model, tokenizer = build(config), Tokenizer(towers(config)[0])
    model.freeze()
    talks = read(Path("data/tiny"), ["set2"])[::8]
    with tempfile.TemporaryDirectory() as folder:
        kept = Features(Path(folder), model.vit)
        pictures = list(dict.fromkeys(image for talk in talks for turn in talk.rounds for image in turn.images))
        kept.fill(pictures, model.vit)
        seconds = {}
        for name, given in (("vit", None), ("kept", kept)):
            rows = Conversations(talks, tokenizer, model.vit.config, features=given)
            seconds[name] = []
            for i in range(0, min(len(rows), 320), 16):
                started = time.perf_counter()
                batch = collate([rows[k] for k in range(i, i + 16)])
                loaded = time.perf_counter()
                model(**batch).backward()
                seconds[name].append((loaded - started, time.perf_counter() - loaded))
    for i, part in enumerate(("opening the pictures", "forward and backward")):
        before, after = (median(times[i] for times in seconds[name]) for name in ("vit", "kept"))
        print(f"{part}: {1000 * before:.0f} ms with the ViT, {1000 * after:.0f} ms with kept features, "
              f"ratio {after / before:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["images", "features", "peak"])
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what == "peak":
        peak(options.step, options.file)
    else:
        {"images": images, "features": features}[options.what]()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
