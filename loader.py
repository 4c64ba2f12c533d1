"""How do images reach the trainer, and nothing hangs? Worker processes open them, and one that fails is noticed.

    Conversations ─► workers open images and pack ─► memory that processes share ─► batches of a step

Side room of train.py.
"""
import math
import multiprocessing
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import deepspeed.comm as dist
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from data import Conversations, collate, pack
from mmca import IMAGE
from recipe import Options
from visualchat import IGNORE
from zero import per_rank


def ignore_signals(worker: int):
    """Launchers pass Ctrl-C and SIGTERM on to all processes; workers must go on until the last step is kept."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def shared_memory(options: Options, most: int, each: int) -> int:
    """Bytes that the batches which workers keep ready may take: `most` images a conversation, each so many bytes.

    All ranks of a machine share this memory, so it is all of a step's conversations that must fit.
    """
    return options.batch * most * each * options.workers * 2                    # PyTorch's workers prepare two


def workers_that_fit(options: Options, conversations: Conversations, say: Callable[[str], None]) -> Options:
    """The options, without workers where the batches they keep ready could fill the memory they share with us."""
    shared, features, size = Path("/dev/shm"), conversations.features, conversations.vision.image_size
    if not options.workers or not shared.is_dir():
        return options
    most = max(sum(len(round_.images) for round_ in one.rounds) for one in conversations.conversations)
    each = 2 * math.prod(features.shape) if features else 3 * size ** 2         # bytes of an image
    ready = shared_memory(options, most, each)
    if (free := shutil.disk_usage(shared).free) >= ready:
        return options
    say(f"{shared} has {free / 1e6:.1f} MB free, and --workers {options.workers} may need {ready / 1e6:.1f}: "
        "images are opened between the steps, as with --workers 0. In Docker, --shm-size makes it larger")
    return replace(options, workers=0)


def failure_text(reason: str) -> str:
    """What to say where workers fail: the first line of the reason, and what helps."""
    return (f"the processes that open images failed: {reason.splitlines()[0].strip(' .')}. If the memory that "
            "processes share, /dev/shm, is full, make it larger (in Docker with --shm-size), or take --workers 0")


def packed(examples: list[dict[str, Tensor]], positions: int) -> list[dict]:
    """`pack`; a worker process also brings the batches into the memory that processes share.

    Else PyTorch would do it in a thread, and where that memory is full, nobody would hear of it. Raises
    ValueError.
    """
    batches = pack(examples, positions)
    try:
        for x in (x for batch in batches for x in batch.values() if get_worker_info() and isinstance(x, Tensor)):
            x.share_memory_()
    except RuntimeError as error:
        raise ValueError(failure_text(str(error))) from error
    return batches


def loader(conversations: Conversations, indices: list[int], options: Options) -> Iterator[list[dict]]:
    """For each step this rank's packed batches of these conversations in this order, made by worker processes.

    Raises ValueError where these processes end or deliver nothing.
    """
    try:
        yield from DataLoader(conversations, per_rank(options, dist.get_world_size()), sampler=indices,
                              num_workers=options.workers, collate_fn=partial(packed, positions=options.positions),
                              worker_init_fn=ignore_signals, pin_memory=torch.cuda.is_available(),
                              timeout=600 if options.workers else 0)    # seconds, then a worker counts as lost
    except (ConnectionError, EOFError) as error:                # a worker was killed while it passed a batch on
        if not options.workers or "in DataLoader worker process" in str(error):     # what is opened fails so
            raise
        raise ValueError(failure_text(f"DataLoader worker is gone ({type(error).__name__})")) from error
    except RuntimeError as error:
        if "DataLoader" not in str(error) or str(error).startswith("Caught"):       # an error within a worker
            raise
        raise ValueError(failure_text(str(error))) from error


def blank_batch(conversations: Conversations) -> dict:
    """A batch of one conversation that is one blank image and nothing else, so it has no loss."""
    vision, features = conversations.vision, conversations.features
    n, shape = vision.n_queries, features.shape if features else (3, vision.image_size, vision.image_size)
    return collate([{"ids": torch.zeros(n, dtype=torch.long), "kind": torch.full((n,), IMAGE),
                     "labels": torch.full((n,), IGNORE),
                     **({"features": torch.zeros(1, *shape).half()} if features else
                        {"images": torch.zeros(1, *shape, dtype=torch.uint8)})}])


def end_workers():
    """At its exit Python ends what workers are left by SIGTERM, which ours ignore, and would wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)               # PyTorch would call their end an error
    for worker in multiprocessing.active_children():
        worker.kill()
