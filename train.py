"""Training with DeepSpeed: the projection and the token embedding learn, everything else is frozen.

    deepspeed train.py --size tiny                     a laptop, minutes
    deepspeed train.py --size 7b --data /path/to/data  a GPU machine

out/<size>/ then holds trained.safetensors and config.json for chat.py, log.csv and loss.png to look at. The recipe
is the paper's (section 5). This file alone needs deepspeed. Before: data.py, shapes.py. Next file: chat.py.
"""
import argparse
import csv
import math
import os
import random
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")             # threads that spin while they wait slow others

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")   # meant for DeepSpeed
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")              # named, so that DeepSpeed does not search and warn

import deepspeed
import deepspeed.comm as dist
import deepspeed.ops
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger, safe_get_full_fp32_param

import shapes
from data import COCO, DIALOGUE, RECIPES, SOURCES, Conversations, Features, Reader, collate, encode, llava, order
from data import read, split, tensors
from llama import Tokenizer, read_json
from mmca import ATTENTION, PAD
from visualchat import IGNORE, REPOSITORIES, ModelConfig, VisualChat, build, save, towers, whole_answers


def option(default, help: str, choices: list | None = None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Options:
    """Everything that the command line sets; what is empty or 0 here is filled in by `for_size`."""
    # What is trained?
    size: str = option("tiny", "size of the language model", list(REPOSITORIES))
    attention: str = option("mmca", "who may look at whom", list(ATTENTION))
    llama: str = option("", "folder of the LLaMA-2 weights; looked for if not given")
    vit: str = option("", "folder of the QWen-VL weights; looked for if not given")
    # On what?
    data: str = option("", "data folder")
    datasets: tuple[str, ...] = option((), "datasets or mixtures of them; default: as the paper for this size",
                                       [*SOURCES, *RECIPES])
    skip_bad: bool = option(False, "leave out records that cannot be read, and say how many, instead of stopping")
    cache_features: str = option("", "folder that keeps what the ViT makes of each picture; it runs once")
    seed: int = option(0, "of the validation split, the order and the projection's first values")
    # How?
    epochs: int = option(0, "passes over the data")
    batch: int = option(0, "conversations per step, over all ranks")
    micro_batch: int = option(0, "conversations per rank at a time; default at most 16 for tiny, else at most 4")
    lr: float = option(0.0, "peak learning rate, reached after 10 percent of the steps; then a cosine to zero")
    workers: int = option(2, "processes per rank that open pictures")
    exam: int = option(240, "dialogues of each test set to answer after training the tiny size; 0: none")
    # Where?
    zero: int = option(3, "ZeRO stage: what the ranks share out among them", [0, 1, 2, 3])
    precision: str = option("", "default fp16 on a GPU, fp32 on a CPU", ["fp16", "bf16", "fp32"])
    deepspeed_config: str = option("", "JSON file laid over the settings that DeepSpeed gets from here")
    out: str = option("", "folder for the result; default out/<size>")
    local_rank: int = option(0, "set by the launcher")


# The paper's mixture for each size, and the epochs that it trains on each (section 5).
MIXTURE = {"tiny": "single", "7b": "attention", "13b": "set2", "70b": "set2"}
EPOCHS = {"attention": 5, "single": 10, "set1": 6, "set2": 6}


def for_size(options: Options) -> Options:
    """Options with their empty ones filled in, for the real sizes as the paper has them (section 5)."""
    datasets = options.datasets or (MIXTURE[options.size],)
    usual = (dict(data="data/tiny", epochs=4, batch=16, lr=2e-3) if options.size == "tiny" else
             dict(data="data", epochs=EPOCHS.get(datasets[0], 6), batch=128, lr=1e-3))
    usual |= dict(datasets=datasets, out=f"out/{options.size}",
                  precision="fp32" if get_accelerator().device_name() == "cpu" else "fp16")
    return replace(options, **{name: value for name, value in usual.items() if not getattr(options, name)})


def command_line() -> Options:
    """Options from the command line, a flag for each field."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Options):
        flags = dict.fromkeys((f"--{f.name.replace('_', '-')}", f"--{f.name}"))     # launcher: --local_rank
        kind = (dict(action="store_true") if f.default is False else
                dict(nargs="+", type=str) if isinstance(f.default, tuple) else dict(type=type(f.default)))
        parser.add_argument(*flags, default=f.default, help=f.metadata["help"], **kind,
                            **({"choices": f.metadata["choices"]} if f.metadata["choices"] else {}))
    return for_size(Options(**vars(parser.parse_args())))


# ---- DeepSpeed ----

def start():
    """Join the other ranks, with `deepspeed`, torchrun or plain python as launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))                             # a port that nobody uses, for a rank that is alone
        port = str(free.getsockname()[1])
    alone = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    for name, value in alone.items():
        os.environ.setdefault(name, value)                      # without them DeepSpeed would look for MPI
    logger.setLevel("WARNING")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled at the first start on a CPU
    deepspeed.init_distributed(verbose=False)
    if get_accelerator().device_name() != "cpu":
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    else:
        ranks = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", 1)))
        torch.set_num_threads(max(1, os.cpu_count() // ranks))  # more threads than cores make ranks wait


def check_precision(precision: str):
    """Raises ValueError where the machine cannot compute in this precision."""
    if precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise ValueError("fp16 needs a GPU, or a CPU with AVX512-FP16, which this one lacks: "
                         "take --precision fp32, or bf16 for half the memory")
    if precision == "bf16" and not get_accelerator().is_bf16_supported():
        raise ValueError("this machine cannot compute in bf16: take --precision fp16 or fp32")


def micro_batch(options: Options) -> int:
    """Conversations per rank at a time; raises ValueError where they do not make up the batch."""
    ranks, most = dist.get_world_size(), 16 if options.size == "tiny" else 4
    fitting = [n for n in range(1, options.batch // ranks + 1) if options.batch % (n * ranks) == 0]
    wanted = options.micro_batch or max((n for n in fitting if n <= most), default=0)
    if wanted not in fitting:
        can_be = ", ".join(map(str, fitting)) or "nothing, take another --batch"
        raise ValueError(f"--batch {options.batch} is no multiple of {ranks} ranks × {wanted or 1} conversations: "
                         f"--micro-batch can be {can_be}")
    return wanted


def settings_for(options: Options) -> dict:
    """DeepSpeed's settings, with those of --deepspeed-config laid over them."""
    settings = {
        "train_micro_batch_size_per_gpu": options.micro_batch,
        "gradient_accumulation_steps": options.batch // (options.micro_batch * dist.get_world_size()),
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": options.zero},
        "fp16": {"enabled": options.precision == "fp16"},       # with a dynamic loss scale
        "bf16": {"enabled": options.precision == "bf16"},
        "steps_per_print": 10 ** 9,                             # the progress bar says it
    }
    for name, value in (read_json(Path(options.deepspeed_config)) if options.deepspeed_config else {}).items():
        settings[name] = {**settings.get(name, {}), **value} if isinstance(value, dict) else value
    return settings


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak at a step: up in a straight line over a tenth of the steps, then down a cosine to zero."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def engine_for(model: VisualChat, options: Options, steps: int):
    """The model in DeepSpeed's hands, with the paper's AdamW over what is trainable."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], options.lr,
                                  betas=(0.0, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    if options.zero == 3:       # share out tensor by tensor now: initialize would first put all of it on every GPU
        deepspeed.zero.Init(module=model, config_dict_or_path=settings_for(options))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule,
                                      config=settings_for(options))
    return engine


def trained(engine) -> dict[str, Tensor]:
    """What was trained, whole and in float32, by name. All ranks must ask together."""
    found = {}
    for name, p in engine.module.named_parameters():
        if p.requires_grad:
            whole = safe_get_full_fp32_param(p)
            found[name] = (p if whole is None else whole).detach().float().cpu()    # stage 0 may keep no copy
    return found


# ---- the loop ----

def on_device(batch: dict[str, Tensor], engine) -> dict[str, Tensor]:
    return {name: tensor.to(engine.device) for name, tensor in batch.items()}


def train_step(engine, batches: Iterator[dict[str, Tensor]]) -> tuple[float, int]:
    """One optimizer step on the next batches; returns loss per answer token and positions read, over all ranks.

    Every answer token of the step weighs the same, wherever it lies; the mean over ranks and micro-batches that
    DeepSpeed takes would let a token of a short answer weigh more. So each micro-batch counts by its tokens.
    """
    accumulation = engine.gradient_accumulation_steps()
    group = [on_device(next(batches), engine) for _ in range(accumulation)]
    counts = [(batch["labels"] != IGNORE).sum() for batch in group]
    total = torch.stack([sum(counts), sum((batch["kind"] != PAD).sum() for batch in group)])
    dist.all_reduce(total)
    mean = torch.zeros((), device=engine.device)
    for batch, count in zip(group, counts):
        loss = engine(**batch) * count / total[0].clamp(min=1)
        mean += loss.detach()
        engine.backward(loss * dist.get_world_size() * accumulation)
        engine.step()
    dist.all_reduce(mean)
    return mean.item(), int(total[1])


@torch.no_grad()
def evaluate(engine, batches: DataLoader) -> tuple[float, float]:
    """Loss per answer token, and the share of answers that greedy decoding gives word for word, on all ranks."""
    engine.eval()
    sums = torch.zeros(4, device=engine.device)
    for batch in batches:
        batch = on_device(batch, engine)
        loss, right = engine.module.score(**batch)
        whole = whole_answers(batch["labels"], right)
        sums += torch.stack([loss.sum(), sums.new_tensor(len(loss)), whole.sum(), sums.new_tensor(len(whole))])
    dist.all_reduce(sums)
    engine.train()
    return (sums[0] / sums[1]).item(), (sums[2] / sums[3]).item()


# ---- the exam of the tiny world ----

def ask(engine, tokenizer: Tokenizer, conversations: list, way: str) -> Iterator[tuple[str, str, bool]]:
    """(images shown, topic, right word for word) for every question, asked in one of three ways.

    exact: after the true rounds before it; blind: the same, with a gray picture for every picture; alone: as the
    first question of a conversation that shows all its pictures at once. Answers are decoded greedily, 64 at a
    time, with the KV cache.
    """
    model, vision = engine.module, engine.module.vit.config
    questions = [(rounds, i) for rounds in conversations for i in range(len(rounds))]
    questions.sort(key=lambda question: len(question[0][question[1]].answer))   # short answers end together
    parts = [questions[i:i + 64] for i in range(0, len(questions), 64)]
    for part in tqdm(parts, "exam", leave=False, disable=dist.get_rank() != 0):
        prompts = [[*rounds[:i], replace(rounds[i], answer=None)] for rounds, i in part]
        if way == "alone":
            prompts = [[replace(turns[-1], images=sum((turn.images for turn in turns), ()))] for turns in prompts]
        rows = [tensors(encode(rounds, tokenizer, vision.n_queries), vision.image_size) for rounds in prompts]
        batch = on_device(collate(rows), engine)
        images = batch["images"] * (way != "blind")             # normalized, so zero is gray
        said, ended = [], False
        for token in model.generate(batch["ids"], batch["kind"], images, max_new_tokens=12):
            said.append(token)
            if (ended := ended | (token == tokenizer.eos)).all():
                break
        for (rounds, i), ids in zip(part, torch.stack(said, dim=1).tolist()):
            text = tokenizer.decode(ids[:ids.index(tokenizer.eos)] if tokenizer.eos in ids else ids)
            shown = sum(len(turn.images) for turn in rounds[:i + 1])
            yield "one" if shown == 1 else "several", shapes.topic_of(rounds[i].question), text == rounds[i].answer


def exam(engine, tokenizer: Tokenizer, data: Path, n: int) -> list[dict]:
    """Rows of eval.csv: exact match per topic and way of asking, in n dialogues of each test set of shapes.py."""
    engine.eval()
    rows = []
    for test in shapes.TESTS:
        told = [conversation.rounds for conversation in
                llava(Reader(test, data / test), [data / test / DIALOGUE], data / test / COCO)]
        conversations = random.Random(0).sample(told, min(n, len(told)))
        answers = {way: list(ask(engine, tokenizer, conversations, way)) for way in ("exact", "alone", "blind")}
        for images in ("one", "several"):
            for topic in ("all", *shapes.TOPICS):
                right = {way: [whole for shown, about, whole in given
                               if shown == images and topic in ("all", about)] for way, given in answers.items()}
                if n_asked := len(right["exact"]):
                    rows.append(dict(test=test, images=images, topic=topic, questions=n_asked,
                                     **{way: round(sum(whole) / n_asked, 4) for way, whole in right.items()}))
    return rows


# ---- what can be looked at ----

def draw_curve(rows: list[dict], path: Path, width: int = 900, height: int = 500):
    """The loss over the steps as a picture: training in blue, validation as orange dots."""
    losses = [(row["step"], row["loss"]) for row in rows]
    checks = [(row["step"], row["val_loss"]) for row in rows if row["val_loss"] != ""]
    top, last, left, below = max(loss for _, loss in losses + checks), losses[-1][0], 70, height - 50
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)

    def place(step, loss):
        return left + step / last * (width - left - 30), below - loss / top * (below - 30)

    for i in range(5):
        y = place(0, top * i / 4)[1]
        pen.line((left, y, width - 30, y), "#DDDDDD")
        pen.text((left - 8, y), f"{top * i / 4:.2f}", "black", anchor="rm", font_size=14)
        pen.text((place(last * i / 4, 0)[0], below + 10), f"{last * i // 4}", "black", anchor="mt", font_size=14)
    pen.text((width / 2, height - 8), "step", "black", anchor="mb", font_size=14)
    pen.line([place(*point) for point in losses], "#4C72B0", width=2)
    for point in checks:
        x, y = place(*point)
        pen.ellipse((x - 5, y - 5, x + 5, y + 5), "#DD8452")
    pen.text((width - 40, 12), "loss per answer token: training (line), validation (dots)", "black", anchor="rt",
             font_size=14)
    picture.save(path)


def write_csv(rows: list[dict], path: Path):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


# ---- the whole ----

def load_data(options: Options, tokenizer: Tokenizer, model: VisualChat) -> tuple[Conversations, Conversations]:
    """For training and for validation; raises ValueError where there are too few conversations, and as `read`."""
    rank, ranks, vit = dist.get_rank(), dist.get_world_size(), model.vit
    found = read(Path(options.data), options.datasets, options.seed, options.skip_bad,
                 tell=print if rank == 0 else lambda line: None)
    features = None
    if options.cache_features:
        features = Features(Path(options.cache_features), vit)
        pictures = list(dict.fromkeys(image for talk in found for turn in talk.rounds for image in turn.images))
        features.fill(pictures[rank::ranks], vit.to(get_accelerator().current_device_name()), options.skip_bad)
        dist.barrier()
    limit = model.llama.config.max_position_embeddings
    train, held_out = (Conversations(part, tokenizer, vit.config, limit, options.skip_bad, features)
                       for part in split(found, options.seed))
    if len(train) < options.batch or len(held_out) < ranks:
        raise ValueError(f"{options.data} holds {len(train)} conversations for training and {len(held_out)} for "
                         f"validation, too few for --batch {options.batch} on {ranks} ranks")
    return train, held_out


def loader(rows: Conversations, indices: list[int], options: Options) -> DataLoader:
    """Batches of these rows in this order, made by worker processes."""
    return DataLoader(rows, options.micro_batch, sampler=indices, num_workers=options.workers, collate_fn=collate)


def prepare(options: Options) -> tuple[VisualChat, ModelConfig, Tokenizer]:
    """The model, partly frozen, its configuration and its tokenizer; draws the tiny world if it is not there."""
    if Path(options.data) == shapes.DATA and dist.get_rank() == 0:      # nobody else's folder is drawn into
        shapes.ensure(Path(options.data))
    dist.barrier()
    torch.manual_seed(options.seed)
    config = ModelConfig(options.size, options.attention, options.llama, options.vit)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[options.precision]
    model = build(config, dtype)
    summary = model.freeze()
    if dist.get_rank() == 0:
        print(f"{summary}; {options.attention}, ZeRO-{options.zero}, {options.precision}, "
              f"{dist.get_world_size()} ranks with {options.micro_batch} conversations at a time")
    return model, config, Tokenizer(towers(config)[0])


def fit(engine, train: Conversations, held_out: Conversations, options: Options, config: ModelConfig):
    """Train for all epochs; after each one look at the held-out conversations and write the result.

    Raises ValueError where the loss is no number any more; what earlier epochs wrote stays.
    """
    rank, ranks, rows, started, out = dist.get_rank(), dist.get_world_size(), [], time.time(), Path(options.out)
    steps = len(train) // options.batch                         # what fills no batch is left for another epoch
    check = loader(held_out, order(len(held_out), options.seed, 0, rank, ranks), options)
    with tqdm(total=steps * options.epochs, disable=rank != 0) as bar:
        for epoch in range(1, options.epochs + 1):
            mine = order(len(train), options.seed, epoch, rank, ranks)[:steps * options.batch // ranks]
            stream = iter(loader(train, mine, options))
            for _ in range(steps):
                lr = engine.get_lr()[0]
                loss, positions = train_step(engine, stream)
                if not math.isfinite(loss):
                    raise ValueError(f"loss {loss} at step {len(rows) + 1}: try --precision bf16 or a lower --lr")
                rows.append(dict(step=len(rows) + 1, epoch=epoch, loss=loss, lr=lr, positions=positions,
                                 seconds=round(time.time() - started, 2), val_loss="", exact_match=""))
                bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", refresh=False)
                bar.update()
            rows[-1]["val_loss"], rows[-1]["exact_match"] = evaluate(engine, check)
            parts = trained(engine)
            skipped = torch.tensor(sum(train.skipped) + sum(held_out.skipped), device=engine.device)
            dist.all_reduce(skipped)
            if rank == 0:
                bar.write(f"epoch {epoch}: validation loss {rows[-1]['val_loss']:.4f}, exact match "
                          f"{rows[-1]['exact_match']:.1%} of the answers in held-out conversations"
                          + (f"; {skipped.item()} conversations skipped so far, named above" if skipped else ""))
                save(out, parts, config)
                write_csv(rows, out / "log.csv")
                draw_curve(rows, out / "loss.png")


def run(options: Options):
    """Everything, in order; raises ValueError or FileNotFoundError where options, weights or data do not fit."""
    check_precision(options.precision)
    options = replace(options, micro_batch=micro_batch(options))
    model, config, tokenizer = prepare(options)
    train, held_out = load_data(options, tokenizer, model)
    engine = engine_for(model, options, len(train) // options.batch * options.epochs)
    fit(engine, train, held_out, options, config)
    if options.exam and (Path(options.data) / shapes.TESTS[0]).exists():
        table = exam(engine, tokenizer, Path(options.data), options.exam)
        if dist.get_rank() == 0:
            write_csv(table, Path(options.out) / "eval.csv")
            print("fresh drawings, one or several images shown: share of answers right word for word,\n"
                  "asked after the true rounds before (exact), as a first question (alone), with every picture gray (blind)")
            for line in (table[0], *(row.values() for row in table)):
                print("  ".join(f"{value:<11}" for value in line))
    if dist.get_rank() == 0:
        print(f"{options.out} holds the result; log.csv and loss.png show how it came about. Talk to it with\n"
              f"    python chat.py --model {options.out} examples/a.png examples/b.png")


def main():
    options = command_line()
    start()
    try:
        run(options)
    except (OSError, ValueError) as error:
        message = str(error)
        if message.startswith("Caught"):                        # in a worker: leave its traceback out
            message = message.strip().rpartition("ValueError: ")[2]
        sys.exit(f"train.py: {message}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
