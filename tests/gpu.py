"""Everything that needs a card, each check a process of its own: `python tests/bench.py gpu` runs them all.

    python tests/gpu.py equal             every form of attention and of decoding in 16 bits against float32
    python tests/gpu.py weights FOLDER    write official folders with random values: FP16 LLaMA, BF16 pickled ViT
    python tests/gpu.py read FOLDER       time to load them onto the device
    python tests/gpu.py train FOLDER      steps in DeepSpeed's hands: speed, and memory against --plan

--size 7b takes the real shapes, else they are small, so that all of it runs on a CPU, too. Not part of the test
suite; the figures that a card gave stand in results/gpu.md.
"""
import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

# First of ours, because it puts the project's root on the path.
from bench import DEVICE, DTYPES, PER_IMAGE, ROOT, finish, kinds, official_llama, rate

import torch
from torch import Tensor

import recipe
from data import collate, encode, to_tensors
from decode import compile_step, step_of_many
from llama import LLAMA_2, Cache, LlamaConfig, Tokenizer
from mmca import IMAGE, TEXT, compact_attention, mmca, separate, written_attention
from sources import COCO, DIALOGUE, Reader, llava
from tiny import world
from visualchat import IGNORE, VisualChat, build, load, towers, ModelConfig
from vit import IN_CONFIG, PREFIX, VisionConfig, VisionTransformer
from weights import replacing

RESULTS = ROOT / "results/gpu.md"
SMALL = LlamaConfig(128, 352, 2, 4, 2), VisionConfig(56, 14, 32, 2, 2, 64, 128, 4, 2)
REAL_TIME = 600                 # seconds for all checks together
SLOWER = 1 if DEVICE.type == "cuda" else 3      # times as long as on a card


# ---- are all forms equal? ----

def difference(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖, NaN where found has one."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return ((found - expected).norm() / expected.norm()).item()


def equal_attention(dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """(form, its difference to `mmca` in float32) for the heads of 7b and of 70b, over rounded inputs."""
    kind = kinds(1024, 2)
    layout = separate(kind)
    for size in ("7b", "70b"):
        heads, kv_heads = LLAMA_2[size].num_attention_heads, LLAMA_2[size].num_key_value_heads
        q, k, v = (torch.randn(1, n, 1024, 128).to(dtype) for n in (heads, kv_heads, kv_heads))
        # mmca computes in float32 whatever it is given, so on the CPU, which has no shorter float32, it is exact.
        expected = mmca(q.float(), k.float(), v.float(), kind)
        q, k, v = (x[0].transpose(0, 1)[layout.index].to(DEVICE) for x in (q, k, v))
        expected = expected[0].transpose(0, 1)[layout.index]
        yield f"{size}'s attention, written", difference(written_attention(q, k, v, layout), expected)
        yield (f"{size}'s attention, fast",
               difference(compact_attention(q[:layout.n_text], k, v, layout), expected))


def equal_gradients(dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """(what, difference to float32 on the CPU) for conversations of odd lengths, as training packs them."""
    runs = [(7, 1, 13, 2, 3), (41, 3, 1, 1, 58), (2, 1, 129), (77,)]        # text, images, text, …
    lengths = [sum(n * (PER_IMAGE if i % 2 else 1) for i, n in enumerate(one)) for one in runs]
    kind = torch.tensor([[of for one in runs for i, n in enumerate(one)
                          for of in ([IMAGE] * n * PER_IMAGE if i % 2 else [TEXT] * n)]])
    layout = separate(kind, lengths)
    for size in ("7b", "70b"):
        heads, kv_heads = LLAMA_2[size].num_attention_heads, LLAMA_2[size].num_key_value_heads
        given = [torch.randn(rows, n, 128).to(dtype) for rows, n in (
            (layout.n_text, heads), (kind.numel(), kv_heads), (kind.numel(), kv_heads), (kind.numel(), heads))]
        found = {}
        for where, type in (("cpu", torch.float32), (DEVICE, dtype)):
            *inputs, towards = (x.to(where, type) for x in given)
            inputs = [x.requires_grad_() for x in inputs]
            out = compact_attention(*inputs, layout)
            found[type] = [out, *torch.autograd.grad(out, inputs, towards)]
        names = "output", "gradient of q", "of k", "of v"
        for name, one, exact in zip(names, found[dtype], found[torch.float32]):
            yield f"{size}'s attention, odd lengths, {name}", difference(one, exact)


@torch.no_grad()
def logits_of(model: VisualChat, batch: dict, steps: dict, n: int = 16) -> dict[str, Tensor]:
    """For a conversation with images, the logits (n, vocabulary) of its last n text tokens, by each way."""
    device = model.llama.norm.weight.device
    ids, kind = (batch[name].to(device) for name in ("ids", "kind"))
    x, found = model.embed(ids, kind, model.image_tokens(batch["images"].to(device))), {}
    read = torch.zeros_like(kind, dtype=torch.bool)
    read[:, -n:] = True
    found["a whole pass"] = model.llama.lm_head(model.llama(x, kind, read))
    for name, step in steps.items():
        cache = Cache(model.llama, 1, ids.shape[1])
        found[name] = [model.prefill(x[:, :-n + 1], kind[:, :-n + 1], cache)]
        found[name] = torch.cat(found[name] + [step(token, cache) for token in ids[0, -n + 1:, None]])
    return found


def equal_model(dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """(way, difference of its logits to float64's on the CPU) for the shipped tiny model and a drawing."""
    (exact, config), (model, _) = (load(ROOT / "weights/tiny/chat", *where)
                                   for where in ((torch.float64, "cpu"), (dtype, DEVICE)))
    llama, vision = model.llama, model.vit.config
    tokenizer, test = Tokenizer(towers(config)[0]), world.ensure_tests(world.DATA)[0]
    conversation = max(llava(Reader(test.name, test), [test / DIALOGUE], test / COCO), key=lambda c: len(c.rounds))
    batch = collate([to_tensors(encode(conversation.rounds, tokenizer, vision.n_queries), vision.image_size)])
    expected = logits_of(exact, batch, {})["a whole pass"]
    steps = {"cached, a token at a time": llama.next_logits, "cached and compiled": compile_step(llama),
             "cached, with others": step_of_many(llama, torch.zeros(1, dtype=torch.bool))}
    for name, logits in logits_of(model, batch, steps).items():
        yield f"tiny model, {name}", difference(logits, expected)
    llama.attention = "written"
    yield "tiny model, --attention written", difference(logits_of(model, batch, {})["a whole pass"], expected)


def equal(options):
    """Print the differences; ends with an error where one is larger than this precision explains."""
    dtype = DTYPES[options.precision]
    # Rounding once costs up to half of eps, on the average less. The model rounds ten times in each layer. In
    # float32 the sums of its products are rounded to float32, too, whereas those of 16 bits are so much more exact:
    # on a CPU the plain pass was off by 5.9e-07 and the compiled one by 2.4e-07, where 4 * eps are 4.8e-07.
    of_model = 8 if dtype == torch.float32 else 4
    eps, failed = torch.finfo(dtype).eps, False
    torch.backends.cuda.enable_cudnn_sdp(options.cudnn)
    for factor, found in ((1, equal_attention(dtype)), (2, equal_gradients(dtype)), (of_model, equal_model(dtype))):
        for name, off in found:
            is_right = off <= factor * eps                             # False for NaN, too
            failed |= not is_right
            print(f"{options.precision}: {name}: {off:.1e}{'' if is_right else f', MORE than {factor * eps:.1e}'}")
    sys.exit(failed)


# ---- official folders of random values ----

def shapes(options) -> tuple[LlamaConfig, VisionConfig]:
    if options.size:
        return LLAMA_2[options.size], VisionConfig()
    return replace(SMALL[0], vocab_size=Tokenizer(towers(ModelConfig())[0]).model.vocab_size()), SMALL[1]


def weights(options):
    """Write FOLDER/llama and FOLDER/vit."""
    llama, vision = shapes(options)
    started = time.perf_counter()
    for name in ("llama", "vit"):
        (options.folder / name).mkdir(parents=True, exist_ok=True)
    official_llama(options.folder / "llama", llama, torch.float16)
    shutil.copy(towers(ModelConfig())[0] / "tokenizer.model", options.folder / "llama")
    with torch.device("meta"):
        vit = VisionTransformer(vision)
    tensors = {PREFIX + name: (torch.randn(t.shape, device=DEVICE) * t.shape[-1] ** -0.5 if t.ndim > 1 else
                               torch.full(t.shape, float(name.endswith("weight")))).to("cpu", torch.bfloat16)
               for name, t in vit.state_dict().items()}
    torch.save(tensors, options.folder / "vit/pytorch_model.bin")
    visual = {name: getattr(vision, name) for name in IN_CONFIG}
    (options.folder / "vit/config.json").write_text(json.dumps({"visual": visual}))
    print(f"wrote {size_of(options.folder) / 1e9:.2f} GB in {time.perf_counter() - started:.0f} s")


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for name in ("llama", "vit") for file in (folder / name).iterdir())


def model_config(options) -> ModelConfig:
    llama, vit = (str(options.folder / name) for name in ("llama", "vit"))
    return ModelConfig(options.size or "tiny", llama=llama, vit=vit)


def read(options):
    """Seconds from the folders to a model on the device, a second time, with the files in the system's memory."""
    for when in ("first", "second"):
        started = time.perf_counter()
        build(model_config(options), DTYPES[options.precision], DEVICE)
        finish()
        seconds = time.perf_counter() - started
        print(f"{when} time: {size_of(options.folder) / 1e9:.2f} GB in {seconds:.1f} s, "
              f"{size_of(options.folder) / seconds / 1e9:.2f} GB/s", flush=True)


# ---- training steps ----

def train(options, n_steps: int = 4):
    """Speed of steps of --rows conversations with two images each, and peak memory against the plan."""
    import train as program                                 # imports DeepSpeed, which the other checks need not
    import zero
    (llama, vision), length, rows, n_images = shapes(options), 1024, options.rows, 2
    zero.start()
    zero.published_sizes = lambda size: (llama, vision)
    config, on_gpu = model_config(options), DEVICE.type == "cuda"
    given = recipe.for_size(recipe.Options(
        size=config.size, precision=options.precision, batch=rows, positions=rows * length, zero=options.zero,
        recompute=options.recompute))
    model = zero.build_model(given, config)
    engine = zero.engine_for(model, given, 10, universal=False)
    kind = torch.full((1, rows, length), TEXT)
    for i in range(n_images):                                   # an image at the start and in the middle
        start = 8 + i * length // 2
        kind[:, :, start:start + vision.n_queries] = IMAGE
    labels = torch.randint(0, llama.vocab_size, kind.shape)
    labels[:, :, :length * 2 // 3] = IGNORE
    batch = dict(ids=torch.randint(0, llama.vocab_size, kind.shape), kind=kind, labels=labels)
    batch = {name: x.flatten(1) for name, x in batch.items()} | dict(
        lengths=[length] * rows, images=torch.randint(256, (rows * n_images, 3, *[vision.image_size] * 2)).byte())
    peaks, seconds = [], []
    for _ in range(n_steps):
        finish()
        started = time.perf_counter()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        loss, positions = program.train_step(engine, [batch], blank={})
        finish()
        seconds.append(time.perf_counter() - started)
        peaks.append(torch.cuda.max_memory_allocated() if on_gpu else 0)
    speed = positions / median(seconds[1:])
    needed = 4 * zero.counts(llama, vision)["layer"] * llama.num_hidden_layers * speed
    print(f"loss {loss:.3f}, loss scale {getattr(engine.optimizer, 'loss_scale', 1)}; seconds per step "
          f"{', '.join(f'{one:.2f}' for one in seconds)}; {speed:.0f} positions/s; LLaMA's matrices take "
          f"{needed / 1e12:.3f} TFLOP/s, {needed / rate(DTYPES[options.precision]):.2f} of what one large product "
          "reaches here", flush=True)
    if on_gpu:
        predicted = zero.memory(given, llama, vision, 1)
        print(", ".join(f"{name} {value / 1e9:.1f}" for name, value in predicted.items()), "GB")
        print(f"peak of each step {', '.join(f'{peak / 1e9:.1f}' for peak in peaks)} GB, predicted "
              f"{sum(predicted.values()) / 1e9:.1f}, ratio {sum(predicted.values()) / max(peaks):.2f}")
    if options.profile:
        print_profile(lambda: program.train_step(engine, [batch], blank={}))


def print_profile(action):
    """Where the time of an action goes: kernels by their time on the device, and what made the CPU wait for it."""
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (
        DEVICE.type == "cuda")
    with torch.profiler.profile(activities=activities) as profile:
        started = time.perf_counter()
        action()
        finish()
        seconds = time.perf_counter() - started
    events = profile.key_averages()
    on_device = lambda event: event.self_device_time_total if DEVICE.type == "cuda" else event.self_cpu_time_total
    own = [event for event in events if event.device_type == (
        torch.autograd.DeviceType.CUDA if DEVICE.type == "cuda" else torch.autograd.DeviceType.CPU)]
    busy = sum(map(on_device, own)) / 1e6
    print(f"under the profiler {seconds:.2f} s, of which the device is busy {busy:.2f} s")
    for event in sorted(own, key=on_device, reverse=True)[:14]:
        print(f"{on_device(event) / 1e3:9.1f} ms {event.count:6} times  {event.key[:80]}")
    for event in events:
        if event.key in ("aten::_local_scalar_dense", "aten::nonzero", "cudaStreamSynchronize", "cudaLaunchKernel",
                         "cudaEventSynchronize", "cudaMemcpyAsync", "cudaDeviceSynchronize", "cuLaunchKernelEx"):
            print(f"{event.key}: {event.count} times, {event.self_cpu_time_total / 1e3:.1f} ms")


# ---- all of it ----

@dataclass(frozen=True)
class Check:
    title: str
    command: str
    seconds: int                # the most it may take on a card; a CPU gets three times as long


def checks(options, folder: Path) -> list[Check]:
    """All of them, the most telling first; --dry: with small shapes."""
    real = not options.dry
    size, fp16, folder = (" --size 7b", " --precision fp16", str(folder)) if real else ("", "", str(folder))
    towers_there = f"--llama {folder}/llama --vit {folder}/vit"
    ask = 'python chat.py examples/a.png examples/b.png --question "Describe the images." --verbose'
    found = [
        Check("All forms are equal, FP16", f"python tests/gpu.py equal{fp16}", 90),
        Check("All forms are equal, BF16", "python tests/gpu.py equal --precision bf16", 90),
        Check("The same with cuDNN's attention", f"python tests/gpu.py equal{fp16} --cudnn", 90),
        Check("The tiny model answers", f"{ask} --model weights/tiny/chat", 60),
        Check("Write random weights", f"python tests/gpu.py weights {folder}{size}", 90),
        Check("Load them", f"python tests/gpu.py read {folder}{size}{fp16}", 60),
        Check("train.py at this size", f"deepspeed --num_gpus 1 train.py{size or ' --size tiny'} {towers_there} "
              f"--data {folder}/data --datasets single --batch 16 --epochs 1 --out {folder}/out --workers 0 && "
              f"cat {folder}/out/log.csv", 120),
        Check("chat.py with that result", f"{ask} --model {folder}/out --max-new-tokens 64", 60),
        Check("Steps under ZeRO-3", f"python tests/gpu.py train {folder}{size}{fp16} --profile", 90),
        Check("Sixteen conversations at a time, --recompute",
              f"python tests/gpu.py train {folder}{size}{fp16} --rows 16 --recompute", 90),
        Check("Steps under ZeRO-1", f"python tests/gpu.py train {folder}{size}{fp16} --zero 1 --profile", 90),
        Check("Decoding against transformers", f"python tests/bench.py decode{size or ' --dim 128'}{fp16}", 180),
        Check("A step against transformers", f"python tests/bench.py step{size or ' --dim 128'}{fp16}", 90),
        Check("Eight rounds with eight images", f"python tests/bench.py chat{size or ' --dim 128'}{fp16}", 150),
        Check("The tiny model trains", f"deepspeed --num_gpus 1 train.py --size tiny --out {folder}/tiny", 120),
        Check("Attention", f"python tests/bench.py attention{size}{fp16}", 90),
    ]
    return [check for check in found if not options.only or any(word in check.title for word in options.only)]


def run(check: Check, left: float) -> tuple[bool, str]:
    """Whether a check ended well, and what it printed."""
    started, limit = time.perf_counter(), min(check.seconds * SLOWER, left)
    process = subprocess.Popen(["bash", "-c", check.command], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, start_new_session=True)
    try:
        said, ended = process.communicate(timeout=limit)[0], process.returncode == 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, ended = process.communicate()[0], False
    # Of a progress bar only its last state, nothing of the launcher's log, and of a long error the end.
    lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in said.decode(errors="replace").split("\n")]
    lines = [line for line in lines if line and not line.startswith("[20")][-40:]
    return ended, "\n".join([*lines, f"({'' if ended else 'FAILED, '}{time.perf_counter() - started:.0f} s)"])


def header() -> str:
    card = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "no card: small shapes on a CPU"
    return (f"# What a card shows\n\nMade by `python tests/bench.py gpu`, a process for each check.\n\n"
            f"{card}, {os.cpu_count()} processor cores, PyTorch {torch.__version__}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["equal", "weights", "read", "train", "all"])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--size", choices=list(LLAMA_2))
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32")
    parser.add_argument("--zero", type=int, default=3)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--cudnn", action="store_true", help="in `equal`: with cuDNN's attention")
    parser.add_argument("--rows", type=int, default=4, help="in `train`: conversations at a time")
    parser.add_argument("--profile", action="store_true", help="in `train`: where the time of a step goes")
    options = parser.parse_args()
    torch.manual_seed(0)
    {"equal": equal, "weights": weights, "read": read, "train": train}[options.what](options)


def all_checks(options):
    """`python tests/bench.py gpu`: run the checks, and write down each as soon as it has ended."""
    if DEVICE.type != "cuda" and not options.dry:
        sys.exit("bench.py gpu: no card here; --dry does the same with small shapes on the CPU")
    sections, deadline, failed = [header()], time.monotonic() + REAL_TIME * SLOWER, []
    with tempfile.TemporaryDirectory() as folder:
        world.write_world(Path(folder) / "data", 44, seed=0)
        for check in checks(options, Path(folder)):
            ended, said = run(check, max(1, deadline - time.monotonic()))
            failed += [check.title] * (not ended)
            print(f"{check.title}\n{said}\n", flush=True)
            sections.append(f"## {check.title}\n\n```\n$ {check.command}\n{said}\n```\n".replace(folder, "FOLDER"))
            if not options.dry:
                RESULTS.parent.mkdir(exist_ok=True)
                with replacing(RESULTS) as new:
                    new.write_text("\n".join(sections))
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
