"""What things cost, as ratios within one run. Not part of the test suite.

    python tests/bench.py images      memory: one picture out of a 2 GB JSON file of base64 texts
    python tests/bench.py features    time: a training step on kept features against one that runs the ViT
    python tests/bench.py loading     memory and time: two ZeRO-3 ranks load a random LLaMA of a billion parameters
    python tests/bench.py plan        memory of a training step of that model against what --plan predicts
"""
import argparse
import base64
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
from PIL import Image
from safetensors.torch import save_file

import shapes
from data import Conversations, Features, collate, open_picture, packed, read
from llama import Llama, LlamaConfig, Tokenizer, read_config
from mmca import IMAGE, TEXT
from visualchat import IGNORE, ModelConfig, build, towers


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


def billion(folder: Path) -> Path:
    """An official folder with random BF16 weights of a LLaMA of a billion parameters, in eight shards."""
    config = LlamaConfig(2048, 5632, 18, 16, 16)
    with torch.device("meta"):
        shapes_of = {name: t.shape for name, t in Llama(config).state_dict().items()}
    names = list(shapes_of)
    weight_map = {name if name.startswith("lm_head") else f"model.{name}":
                  f"model-{8 * i // len(names)}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(weight_map.values())):
        save_file({name: torch.randn(shapes_of[name.removeprefix("model.")], dtype=torch.bfloat16) * 0.02
                   for name, where in weight_map.items() if where == file}, folder / file)
    shapes.write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    shapes.write_json(folder / "config.json", {"model_type": "llama", **asdict(config)})
    return folder


def resident() -> tuple[float, float]:
    """This process's resident memory now and at its peak, in MB of 1,000,000 bytes."""
    found = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(found[name].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "VmHWM"))


def loading(step: str = ""):
    """Two ranks load; beside it `dd` reads the same files. With a step, each also trains once."""
    with tempfile.TemporaryDirectory() as folder:
        billion(Path(folder))
        files = sorted(Path(folder).glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        started = time.perf_counter()
        for file in files:
            subprocess.run(["dd", f"if={file}", "of=/dev/null", "bs=16M"], check=True, stderr=subprocess.DEVNULL)
        print(f"weights {size / 1e6:.0f} MB, dd {time.perf_counter() - started:.2f} s")
        ranks(folder, step)


def ranks(folder: Path | str, step: str):
    """Two processes that run `rank`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, "rank"]
    # Left to itself, glibc keeps blocks of up to 32 MB when they are freed, and here those would be gigabytes.
    subprocess.run([*command, "--file", str(folder), "--step", step], check=True,
                   env={"OMP_NUM_THREADS": "1", **os.environ, "MALLOC_MMAP_THRESHOLD_": str(2 ** 18)})


def plan():
    """The steps of a billion parameters, with and without recomputing, and of the tiny size in float32."""
    for step in ("whole", "recompute"):
        loading(step)
    ranks(towers(ModelConfig())[0], "tiny")


def rank(folder: Path, step: str):
    """One rank of `loading` or `plan`."""
    import train
    train.start()
    tiny, length, pictures = step == "tiny", 1024, 8
    config, llama = ModelConfig(llama=str(folder)), read_config(folder / "config.json")
    train.sizes = lambda size: (llama, shapes.VIT)
    rows = 16 if tiny else 1
    options = train.for_size(train.Options(precision="fp32" if tiny else "bf16", micro_batch=rows, batch=2 * rows,
                                           length=length, recompute=step == "recompute"))
    before = resident()[0]
    train.dist.barrier()
    started = time.perf_counter()
    model = train.build_shared_out(config, train.DTYPES[options.precision], train.settings_for(options, 2))
    seconds = time.perf_counter() - started
    print(f"rank {train.dist.get_rank()}: bare process {before:.0f} MB, peak while loading "
          f"{resident()[1]:.0f} MB, {seconds:.2f} s", flush=True)
    train.dist.barrier()
    if not step:
        return
    model.freeze()
    model.llama.recompute = options.recompute
    engine = train.engine_for(model, options, 10, universal=False)
    kind = torch.full((rows, length), TEXT)
    kind[:, 8:8 + pictures * shapes.VIT.n_queries] = IMAGE
    labels = torch.randint(0, llama.vocab_size, (rows, length))
    labels[:, :length * 2 // 3] = IGNORE
    batch = dict(ids=torch.randint(0, llama.vocab_size, (rows, length)), kind=kind, labels=labels,
                 images=torch.randn(rows * pictures, 3, shapes.VIT.image_size, shapes.VIT.image_size))
    for _ in range(2):
        train.train_step(engine, iter([batch]))
    predicted = train.memory(options, llama, shapes.VIT, 2)
    if train.dist.get_rank() == 0:
        print({name: round(value / 1e6) for name, value in predicted.items()})
        total, found = sum(predicted.values()) / 1e6, resident()[1] - before
        print(f"{step}: predicted {total:.0f} MB, measured {found:.0f} MB over the bare process, "
              f"ratio {total / found:.2f}", flush=True)
    train.dist.barrier()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["images", "features", "loading", "plan", "peak", "rank"])
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what == "peak":
        peak(options.step, options.file)
    elif options.what == "rank":
        rank(options.file, options.step)
    else:
        {"images": images, "features": features, "loading": loading, "plan": plan}[options.what]()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
