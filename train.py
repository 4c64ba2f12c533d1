"""Training with DeepSpeed: the projection and the token embedding learn, everything else is frozen.

    deepspeed train.py --size tiny                     a laptop, minutes
    deepspeed train.py --size 7b --data /path/to/data  a GPU machine

out/<size>/ then holds trained.safetensors and config.json for chat.py, log.csv and loss.png to look at.
Before: data.py. Next: chat.py. Side rooms: recipe.py (the options), ready.py (is all there?), zero.py (DeepSpeed),
loader.py (who opens the images), checkpoint.py (--resume).
"""
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

# First of ours, because it sets what deepspeed must find in the environment when it is imported.
from zero import (DTYPES, build_model, check_machine, check_options, dist, engine_for, get_accelerator,
                  per_rank, settings_for, share_of_peak, start)

from album import KeptFeatures
from checkpoint import (Stop, draw_curve, has_ended, identity, image_names, is_lost_rank, latest, load_checkpoint,
                        only_run, read_log, remove_checkpoints, save_checkpoint, trained, write_log, writing)
from data import Conversations, order, split
from llama import Tokenizer
from loader import blank_batch, end_workers, failure_text, loader, workers_that_fit
from ready import look_ahead
from recipe import Options, command_line
from sources import count_as_there, n_sharing, read_datasets
from tiny.world import DATA, ensure
from visualchat import IGNORE, ModelConfig, VisualChat, save, towers, whole_answers
from weights import printable


# ---- data ----

def load_data(options: Options, config: ModelConfig, tokenizer: Tokenizer, model: VisualChat,
              say: Callable[[str], None]) -> tuple[Conversations, Conversations]:
    """For training and validation; raises ValueError for too few conversations, and as `read_datasets` does."""
    rank, ranks, device = dist.get_rank(), dist.get_world_size(), get_accelerator().current_device_name()
    conversations = read_datasets(Path(options.data), options.datasets, options.seed, options.skip_bad, say)
    features = None
    if options.cache_features:
        vit = type(model.vit).from_pretrained(          # The model's own ViT may be shared out among the ranks.
            towers(config)[1], DTYPES[options.precision], device)
        features = KeptFeatures(Path(options.cache_features), vit)
        images = list(dict.fromkeys(image for conversation in conversations for round_ in conversation.rounds
                                    for image in round_.images))
        features.fill(images[rank::ranks], vit, options.skip_bad)
        dist.barrier()
    limit = min(options.positions, model.llama.config.max_position_embeddings)
    train, held_out = (Conversations(part, tokenizer, model.vit.config, limit, options.skip_bad, features)
                       for part in split(conversations, options.seed))
    if len(train) < options.batch or len(held_out) < ranks:
        raise ValueError(f"{options.data} holds {len(train)} conversations for training and {len(held_out)} for "
                         f"validation, too few for --batch {options.batch} on {ranks} ranks")
    cut = sum(part.cut(range(rank, len(part), ranks)) for part in (train, held_out)).to(device)
    dist.all_reduce(cut)
    if cut.any():
        say("at {} positions {} conversations lose their last rounds, {} rounds in all; {} do not fit at all"
            .format(limit, *cut.tolist()))
    leak, cost = (n_sharing(a.conversations, b.conversations) for a, b in ((held_out, train), (train, held_out)))
    say(f"validation: {leak} of {len(held_out)} conversations show an image that training shows, too; to part the "
        f"images as well, training would lose {cost} of {len(train)}")
    return train, held_out


def join(batch: dict, other: dict) -> dict:
    """Two batches as one."""
    joined = {name: torch.cat((x, other[name].to(x)), dim=int(name in ("ids", "kind", "labels")))
              for name, x in batch.items() if name != "lengths"}
    return joined | {"lengths": batch["lengths"] + other["lengths"]}


def alike_on_all_ranks(batches: list[dict], blank: dict, engine) -> list[dict]:
    """The batches on the device, each with an image, and blank ones until all ranks have as many.

    Under ZeRO-3 the ranks gather the weights of a module together, so all must run the same modules equally often,
    the ViT, too. A batch without any image gets the blank conversation. How it is laid out stays on the CPU.
    """
    most = torch.tensor(len(batches), device=engine.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    images = "features" if "features" in blank else "images"
    batches = [batch if len(batch[images]) else join(batch, blank) for batch in batches]
    batches += [blank] * (int(most) - len(batches))
    return [{name: x if name in ("kind", "labels", "lengths") else x.to(engine.device, non_blocking=True)
             for name, x in batch.items()} for batch in batches]


# ---- a step, and a look at what was learned ----

def train_step(engine, batches: list[dict], blank: dict) -> tuple[float, int]:
    """One optimizer step on these batches; returns loss per answer token and positions read, over all ranks.

    Every answer token of the step weighs the same, wherever it lies; with the mean over ranks and batches, as in
    the released code, a token of a short answer would weigh more.
    """
    batches = alike_on_all_ranks(batches, blank, engine)
    totals = torch.tensor([sum(int((batch["labels"] != IGNORE).sum()) for batch in batches),
                           sum(batch["ids"].numel() for batch in batches)], device=engine.device)
    dist.all_reduce(totals)
    mean = torch.zeros((), device=engine.device)
    for i, batch in enumerate(batches, 1):
        engine.set_gradient_accumulation_boundary(i == len(batches))
        losses, _ = engine(**batch)
        loss = losses.sum() / totals[0].clamp(min=1)
        mean += loss.detach()
        engine.backward(loss * dist.get_world_size())           # DeepSpeed takes the mean over ranks
        try:
            engine.step()                                       # changes weights at the boundary alone
        except Exception as error:                              # DeepSpeed has no narrower one for this
            if "loss scale" not in str(error):
                raise
            raise ValueError("gradients overflow even at the least loss scale: try a lower --lr, or "
                             "--precision bf16, into another --out") from error
    dist.all_reduce(mean)
    return mean.item(), int(totals[1])


@torch.no_grad()
def evaluate(engine, held_out: Conversations, options: Options) -> tuple[float, float]:
    """Loss per answer token, and the share of answers that greedy decoding gives word for word, over all ranks."""
    engine.eval()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    totals, blank = torch.zeros(4, device=engine.device), blank_batch(held_out)
    stream = loader(held_out, range(rank, len(held_out), ranks), options)
    for _ in range(math.ceil(math.ceil(len(held_out) / ranks) / per_rank(options, ranks))):
        for batch in alike_on_all_ranks(next(stream, []), blank, engine):
            # Not model(**batch): DeepSpeed 0.19.8's hooks on a call run out of buffers with --offload nvme.
            losses, right = engine.module.forward(**batch)
            whole = whole_answers(batch["labels"], right)
            totals += torch.stack([losses.sum(), totals.new_tensor(len(losses)), whole.sum(),
                                   totals.new_tensor(len(whole))])
    dist.all_reduce(totals)
    engine.train()
    return (totals[0] / totals[1]).item(), (totals[2] / totals[3]).item()


# ---- what can be looked at ----

def update_bar(bar: tqdm, rows: list[dict], options: Options):
    """Show the last step in the progress bar; speeds are those of the last twenty, without padding."""
    last, recent = rows[-1], rows[-20:]
    figures = dict(loss=f"{last['loss']:.3f}", lr=f"{last['lr']:.1e}")
    if options.precision == "fp16":
        figures |= {"scale": f"{last['loss_scale']:.0f}", "skipped": last["skipped"]}
    if len(recent) > 1:
        seconds = max(recent[-1]["seconds"] - recent[0]["seconds"], 1e-3)
        speed = sum(row["positions"] for row in recent[1:]) / seconds
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        if share := share_of_peak(speed, options.size, card, dist.get_world_size()):
            figures["of peak"] = f"{share:.0%}"
        figures |= {"positions/s": round(speed), "samples/s": f"{options.batch * (len(recent) - 1) / seconds:.1f}"}
    bar.set_postfix(figures, refresh=False)
    bar.update()


# ---- the whole ----

def save_result(engine, options: Options, config: ModelConfig, rows: list[dict], is_best: bool):
    """Write what was trained so far and the curve; to best/, too, if it is that (section 4.3 compares both)."""
    parts, out = trained(engine), Path(options.out)
    if dist.get_rank() == 0:
        with writing(out):
            for folder in [out, out / "best"] if is_best else [out]:
                save(folder, parts, config)
            draw_curve(rows, out / "loss.png")


def end_epoch(engine, train: Conversations, held_out: Conversations, options: Options, rows: list[dict]) -> str:
    """Evaluate, note it in the last row and for monitors; returns what to say; raises as `checked_step` does."""
    loss, exact = evaluate(engine, held_out, options)
    if not math.isfinite(loss):
        raise ValueError(f"validation loss {loss} after step {rows[-1]['step']}: try a lower --lr, or another "
                         f"--precision than {options.precision}, into another --out")
    rows[-1] |= dict(val_loss=loss, exact_match=exact)
    engine.monitor.write_events([("Validation/loss", loss, engine.global_samples),
                                 ("Validation/exact_match", exact, engine.global_samples)])
    skipped = torch.tensor([*train.skipped, *held_out.skipped], dtype=torch.int32, device=engine.device)
    dist.all_reduce(skipped, dist.ReduceOp.MAX)                 # two ranks may have met the same one
    n = int(skipped.sum())
    return (f"epoch {rows[-1]['epoch']}: validation loss {loss:.4f}, exact match {exact:.1%} of the answers in "
            f"held-out conversations{f'; {n} conversations skipped since this start, named above' if n else ''}")


def checked_step(engine, batches: list[dict], blank: dict, options: Options, row: dict) -> dict:
    """A training step as a row of log.csv, which `row` begins; raises ValueError where the loss is no number."""
    lr = engine.get_lr()[0]
    loss, positions = train_step(engine, batches, blank)
    # In fp16 DeepSpeed skips a step whose gradients are not finite.
    norm = 0 if options.precision == "fp16" else engine.get_global_grad_norm() or 0
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise ValueError(f"loss {loss}, norm of gradients {norm} at step {row['step']}: try a lower --lr, or "
                         f"another --precision than {options.precision}, into another --out. If an image is the "
                         "cause, --cache-features names it")
    scale = float(getattr(engine.optimizer, "loss_scale", 1)) if engine.fp16_enabled() else 1.0
    row |= dict(loss=loss, lr=lr, positions=positions, seconds=0, loss_scale=scale, skipped=engine.skipped_steps,
                val_loss="", exact_match="")
    engine.monitor.write_events([(f"Train/{name}", row[name], engine.global_samples)
                                 for name in ("loss", "skipped")])
    return row


def fit(engine, train: Conversations, held_out: Conversations, options: Options, config: ModelConfig,
        progress: dict) -> bool:
    """Train to the end, from `progress` on; returns whether it got there, or was asked to stop."""
    rank, ranks, out = dist.get_rank(), dist.get_world_size(), Path(options.out)
    rows, blank = read_log(out / "log.csv", progress["step"]), blank_batch(train)
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    started = time.monotonic() - (rows[-1]["seconds"] if rows else 0)
    steps, per_step = len(train) // options.batch, per_rank(options, ranks)     # steps of an epoch

    def save_progress():
        with writing(out):
            if rank == 0:
                write_log(rows, out / "log.csv")
            save_checkpoint(engine, options, progress)

    with Stop() as stop, tqdm(total=steps * options.epochs, initial=progress["step"], disable=rank != 0) as bar:
        for epoch in range(progress["step"] // steps + 1, options.epochs + 1):
            done = progress["step"] - (epoch - 1) * steps       # of this epoch, before the run was interrupted
            indices = order(len(train), options.seed, epoch, rank, ranks)
            stream = loader(train, indices[done * per_step:steps * per_step], options)
            for step in range(done + 1, steps + 1):
                row = dict(step=progress["step"] + 1, epoch=epoch)
                rows.append(checked_step(engine, next(stream), blank, options, row))
                rows[-1]["seconds"] = round(time.monotonic() - started, 2)
                progress["step"] += 1
                update_bar(bar, rows, options)
                stopping = stop.agreed(engine)
                if step < steps and (stopping or step % options.save_steps == 0):
                    save_progress()
                    if stopping:
                        return False
            message = end_epoch(engine, train, held_out, options, rows)
            save_result(engine, options, config, rows, is_best=rows[-1]["val_loss"] < progress["best"])
            progress["best"] = min(progress["best"], rows[-1]["val_loss"])
            if rank == 0:
                bar.write(message)
            save_progress()
            if stop.agreed(engine):
                return False
    return True


def train_model(options: Options, progress: dict | None, say: Callable[[str], None]) -> bool:
    """From weights and data to a result; returns whether it got to the end, or was asked to stop."""
    rank, ranks, out, data = dist.get_rank(), dist.get_world_size(), Path(options.out), Path(options.data)
    if data == DATA and rank == 0:                              # nobody else's folder is drawn into
        ensure(data)
    dist.barrier()
    torch.manual_seed(options.seed)                             # for the first values of the projection
    config = ModelConfig(options.size, options.attention, options.llama, options.vit, options.variant)
    model = build_model(options, config)
    tokenizer = Tokenizer(towers(config)[0], model.llama.config.vocab_size)
    if progress and options.skip_bad:                           # what was lost since the start is skipped then
        count_as_there(data / name for name in progress.get("images", ()))
    train, held_out = load_data(options, config, tokenizer, model, say)
    options = workers_that_fit(workers_that_fit(options, train, say), held_out, say)
    all_steps = len(train) // options.batch * options.epochs
    engine = engine_for(model, options, all_steps, universal=bool(progress) and progress["ranks"] != ranks)
    conversations = [*train.conversations, *held_out.conversations]
    known = identity(conversations)
    if progress:
        if progress["data"] != known:
            raise ValueError(f"{out} was started on other conversations than {data} holds now, or on others of "
                             "them: go on with the data as it was, or start again, into another --out")
        load_checkpoint(engine, options, progress)
    if not fit(engine, train, held_out, options, config,
               progress or dict(step=0, best=math.inf, saved=[], data=known,
                                images=image_names(conversations, data))):
        say(f"stopped; the same command with --resume goes on from {out}")
        return False
    if rank == 0:
        remove_checkpoints(options)
    say(f"{out} holds the result; log.csv and loss.png show how it came about. Talk to it with\n"
        f"    python chat.py --model {out} examples/a.png examples/b.png")
    return True


def run(options: Options) -> bool:
    """Everything, in order; returns whether it got to the end, or was asked to stop.

    Raises ValueError or OSError where options, folders, weights or data do not fit.
    """
    rank, ranks, out = dist.get_rank(), dist.get_world_size(), Path(options.out)
    say = print if rank == 0 else lambda line: None
    check_options(options, ranks)
    check_machine(options)
    if options.show_config:
        say(json.dumps(settings_for(options, ranks), indent=2))
        return True
    with only_run(out) if rank == 0 else nullcontext():         # The launcher ends all ranks where one is refused.
        progress = latest(options, say)
        if has_ended(options):
            if options.resume:
                say(f"{out} holds a run that has ended")
                return True
            if not options.overwrite:
                raise ValueError(f"{out} holds the result of a run that has ended: take another --out, or replace "
                                 "it with --overwrite")
        if options.resume and not progress:
            say(f"{out} holds no checkpoint: the run starts at its beginning")
        return train_model(options, progress, say)


def main():
    """The command line; what does not fit ends it with one line. Exits with 130 where it was asked to stop."""
    options = command_line(__doc__)
    try:
        if options.plan or options.check_weights:               # nothing is trained
            sys.exit(look_ahead(options))
        start()
        ended = run(options)
    except (OSError, ValueError) as error:
        said = str(error).strip()
        if said.startswith("Caught"):                           # in a worker: leave its traceback out
            said = said.rpartition("ValueError: ")[2]
        sys.exit(printable(f"train.py: {said}"))
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker"):          # was killed; PyTorch says so wherever we are
            sys.exit(f"train.py: {failure_text(str(error))}")
        if not is_lost_rank(error):
            raise
        sys.exit(f"train.py: rank {dist.get_rank()} lost another rank, which was killed or does not answer: go on "
                 f"with --resume. {str(error).splitlines()[0]}")
    except KeyboardInterrupt:                                   # before or after the steps, where nothing is lost
        sys.exit(130)
    finally:
        end_workers()
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(0 if ended else 130)                               # 130: the exit status that shells give to Ctrl-C


if __name__ == "__main__":
    main()
