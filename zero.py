"""How does 70b fit? DeepSpeed's settings, loading in parts, the optimizer, and a plan of what each GPU will hold.

ZeRO shares out among the ranks what each of them would otherwise hold as a copy: from stage 1 on the moments and
float32 masters of what trains, from stage 2 on its gradients, in stage 3 all weights, too, so that a layer is
gathered from all ranks just before it runs. Frozen weights have no gradients and no moments, so with ZeRO-3 70b's
weights and moments take little more than its own 141 GB, the ViT included, on all GPUs together. Besides, each
GPU keeps what the backward pass wants of its batch, which --recompute makes small. Side room of train.py.
"""
import os
import socket
import warnings
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")             # threads that spin while they wait slow others

import torch
from torch import Tensor, nn
from tqdm import tqdm

warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")   # meant for DeepSpeed
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")              # named, so that DeepSpeed does not search and warn

import deepspeed
import deepspeed.comm as dist
import deepspeed.ops
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger, set_z3_leaf_module

from llama import LLAMA_2, LOSS_CHUNK, Layer, LlamaConfig, read_llama_config
from recipe import Options, share_of_rate
from sources import SOURCES, dataset_names
from visualchat import ModelConfig, VisualChat, build, readable, towers
from vit import Block, VisionConfig, VisionTransformer, read_vision_config
from weights import check_numbers, read_json, without_values

BETAS = (0.0, 0.95)             # AdamW's, as in the paper
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


# ---- the machine ----

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
    try:
        deepspeed.init_distributed(verbose=False)
    except RuntimeError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise OSError(f"the ranks cannot meet at {where}: {str(error).splitlines()[0]}") from error
    if get_accelerator().device_name() != "cpu":
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
        torch.backends.cuda.enable_cudnn_sdp(False)             # its backward pass crashed at 7b: results/gpu.md
    else:
        ranks = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", 1)))
        torch.set_num_threads(max(1, os.cpu_count() // ranks))  # more threads than cores make ranks wait


def check_options(options: Options, ranks: int):
    """Raises ValueError for what DeepSpeed cannot do, on any machine."""
    least = {"": 0, "cpu": 1, "nvme": 3}[options.offload]
    if options.zero < least:
        raise ValueError(f"--offload {options.offload} needs --zero {least}{' or more' * (least < 3)}, "
                         f"found {options.zero}")
    if options.precision == "fp16" and options.zero == 0:
        raise ValueError("DeepSpeed 0.19 scales no loss in fp16 with --zero 0: take --zero 1, 2 or 3")
    per_rank(options, ranks)


def check_machine(options: Options):
    """Raises ValueError where this machine lacks what is asked for."""
    if options.precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise ValueError("fp16 needs a GPU, or a CPU with AVX512-FP16, which this one lacks: "
                         "take --precision fp32, or bf16 for half the memory")
    if options.precision == "bf16" and not get_accelerator().is_bf16_supported():
        raise ValueError("this machine cannot compute in bf16: take --precision fp16 or fp32")


def per_rank(options: Options, ranks: int) -> int:
    """Conversations per rank and step; raises ValueError where ranks cannot share the batch."""
    if options.batch % ranks:
        raise ValueError(f"--batch {options.batch} cannot be shared by {ranks} ranks: take a multiple of {ranks}")
    return options.batch // ranks


def batch_text(options: Options, ranks: int) -> str:
    """How a batch is divided, in words."""
    return (f"batch {options.batch} = {ranks} ranks x {per_rank(options, ranks)} conversations, packed into at "
            f"most {options.positions} positions at a time")


# ---- sizes and settings ----

@cache
def published_sizes(size: str) -> tuple[LlamaConfig, VisionConfig]:
    """The sizes of both towers; those of the tiny ones are read from their folders, once."""
    if size in LLAMA_2:
        return LLAMA_2[size], VisionConfig()
    llama, vit = towers(ModelConfig(size))
    return (read_llama_config(llama / "config.json"),
            read_vision_config(vit / "config.json", dict(VisionTransformer.tensors(vit))))


@cache
def counts(llama: LlamaConfig, vit: VisionConfig) -> dict[str, int]:
    """How many values a layer, the token embedding, the largest tensor, all trained and all frozen ones have."""
    with without_values():
        sizes = [[p.numel() for p in part.parameters()] for part in (Layer(llama), VisionTransformer(vit))]
    (layer, tower), embedding = map(sum, sizes), llama.vocab_size * llama.hidden_size
    return dict(layer=layer, embedding=embedding, largest=max(embedding, *sizes[0], *sizes[1]), vit=tower,
                trained=embedding + (vit.output_dim + 1) * llama.hidden_size,
                frozen=llama.num_hidden_layers * layer + embedding + llama.hidden_size + tower)


# What a card can do at most, in FP16 or BF16 operations per second without sparsity, by its maker's data sheet.
PEAK = {"H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12,
        "A100": 312e12, "V100": 125e12}


def share_of_peak(speed: float, size: str, card: str, ranks: int) -> float | None:
    """The share of what the cards can do that a speed in positions per second takes; None for an unknown card.

    Only the matrices of LLaMA's layers count: 2 operations per value forward, 2 backward, none for the gradients
    of frozen weights.
    """
    llama, vit = published_sizes(size)
    needed = 4 * counts(llama, vit)["layer"] * llama.num_hidden_layers * speed
    peaks = [peak for name, peak in PEAK.items() if name in card]
    return needed / (ranks * peaks[0]) if peaks else None


def zero_settings(options: Options, ranks: int) -> dict:
    """The part of DeepSpeed's settings that says what is shared out, and where it waits."""
    values = counts(*published_sizes(options.size))
    zero = {
        "stage": options.zero,
        # Gradients exist for what is trained alone, so one bucket holds all of the paper's model.
        "reduce_bucket_size": values["trained"],
        # The next layer is fetched while this one computes: so many values ahead, and as many again in use. The
        # released code's 0 turns that off. Nothing is kept from the forward pass for the backward pass, except the
        # last layer, which is needed again at once.
        "stage3_prefetch_bucket_size": values["layer"],
        "stage3_max_live_parameters": 2 * values["layer"] + values["embedding"],
        "stage3_max_reuse_distance": values["layer"],
        # Norms and biases are so small that asking for them takes longer than holding them.
        "stage3_param_persistence_threshold": 10 ** 5,
    }
    if options.offload:
        where = {"device": options.offload, "pin_memory": True}
        where |= {"nvme_path": options.nvme} if options.offload == "nvme" else {}
        zero |= {"offload_optimizer": where} | ({"offload_param": where} if options.zero == 3 else {})
        if options.offload == "nvme":       # room on the way to and from the drive for two layers and more
            zero["offload_param"] = {**where, "buffer_count": 20,
                                     "buffer_size": -(-values["largest"] // ranks) + 1024}
    return zero


def settings_for(options: Options, ranks: int) -> dict:
    """DeepSpeed's settings, --deepspeed-config laid over them; raises ValueError where it contradicts a flag."""
    own_share = per_rank(options, ranks)
    settings = {
        # All that a rank computes before a step. How many packed batches that takes differs from step to step, so
        # train_step tells DeepSpeed which one is the last.
        "train_micro_batch_size_per_gpu": own_share,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": zero_settings(options, ranks),
        # The loss scale starts at 65,536, doubles after 500 steps without overflow, and halves with an overflow,
        # except the first of such a stretch, which only skips its step.
        "fp16": {"enabled": options.precision == "fp16", "initial_scale_power": 16, "loss_scale_window": 500},
        "bf16": {"enabled": options.precision == "bf16"},
        "zero_force_ds_cpu_optimizer": False,                   # torch's AdamW serves offloaded masters, too
        "steps_per_print": 10 ** 9,                             # the progress bar says it
    }
    for name in options.monitor:
        own = ({"project": "visualchat"} if name == "wandb" else
               {"output_path": f"{options.out}/monitor/", "job_name": options.size})
        settings[name] = {"enabled": True, **own}
    for name, value in (read_json(Path(options.deepspeed_config)) if options.deepspeed_config else {}).items():
        if isinstance(value, dict) != isinstance(settings.get(name, value), dict):
            raise ValueError(f"{options.deepspeed_config}: {name} is {value!r:.60}, expected a setting like "
                             f"{settings[name]}")
        settings[name] = {**settings.get(name, {}), **value} if isinstance(value, dict) else value
    for name, found, expected in (
            ("gradient_accumulation_steps", settings["gradient_accumulation_steps"], 1),
            ("train_micro_batch_size_per_gpu", settings["train_micro_batch_size_per_gpu"], own_share),
            ("stage", settings["zero_optimization"]["stage"], options.zero),
            ("fp16", settings["fp16"]["enabled"], options.precision == "fp16"),
            ("bf16", settings["bf16"]["enabled"], options.precision == "bf16")):
        if found != expected:
            raise ValueError(f"{options.deepspeed_config} makes {name} {found}, the other options {expected}: say "
                             "it with --batch, --zero or --precision")
    return settings


# ---- the model and its optimizer in DeepSpeed's hands ----

class FrozenLinear(torch.autograd.Function):
    """xWᵀ for a frozen W, under ZeRO-3: keeps neither x, which only a gradient of W would need, nor W's values.

    It keeps the parameter, which DeepSpeed fills again in time for the backward pass. PyTorch's own linear layer
    would keep the values that were gathered, DeepSpeed's own keeps x.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        """x (L, in) and weight (out, in) to (L, out)."""
        ctx.save_for_backward(weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        weight, = ctx.saved_tensors
        return gradient @ weight, None


def for_zero_3(model: VisualChat):
    """What makes ZeRO-3 lighter and faster for this model, with the same results.

    The ViT needs no FrozenLinear: nothing is kept for a backward pass through a tower that learned nothing.
    """
    for linear in model.llama.layers.modules():
        if type(linear) is nn.Linear:           # not a subclass, which may do more
            linear.forward = partial(lambda linear, x: FrozenLinear.apply(x, linear.weight), linear)
    for module in model.modules():
        if type(module) in (Layer, Block):      # Gathered and given up as a whole: fewer of DeepSpeed's hooks run.
            set_z3_leaf_module(module, True)


def build_shared_out(config: ModelConfig, settings: dict) -> VisualChat:
    """The model for ZeRO-3, of which every rank only ever holds its own part.

    Names and shapes are checked on the meta device. Then every parameter is shared out, still empty, and each rank
    copies its own part of it out of the memory-mapped file, without a word to the others.
    """
    precision = next((name for name in ("fp16", "bf16") if settings[name]["enabled"]), "fp32")
    model = build(config, DTYPES[precision], device="meta")
    swapper = None              # DeepSpeed's access to an NVMe drive: one for all, as a new one clears the folder
    for module in reversed(list(model.modules())):              # parts before the whole
        module.to_empty(device=get_accelerator().current_device_name(), recurse=False)
        if any(True for _ in module.parameters(recurse=False)):
            # No dtype is given: DeepSpeed 0.19.8 would take BF16 for any on a CPU without AVX512-FP16, where it
            # takes the right one from the settings.
            sharing = deepspeed.zero.Init(module=module, config_dict_or_path=settings, param_swapper=swapper)
            swapper = getattr(sharing, "param_swapper", None)   # there is one for --offload nvme alone
    rank = dist.get_rank()
    for tower, folder in zip((model.llama, model.vit), towers(config)):
        parameters = dict(tower.named_parameters())
        for name, tensor in tqdm(tower.tensors(folder), f"loading {folder}", total=len(parameters), leave=False,
                                 disable=rank != 0):
            part = parameters[name].ds_tensor                   # this rank's part, a stretch of the flat tensor
            if part.final_location is not None:                 # It is on a drive: DeepSpeed must fetch it first.
                with deepspeed.zero.GatheredParameters([parameters[name]], modifier_rank=0):
                    if rank == 0:                               # zeros: as below
                        check_numbers(name, tensor, folder)
                        parameters[name].data.zero_()[:len(tensor)].copy_(tensor)
            else:
                own = tensor.flatten()[rank * part.numel():][:part.numel()]
                check_numbers(name, own.to(part.dtype), folder)
                part.data.flatten()[:len(own)].copy_(own)
                part.data.flatten()[len(own):].zero_()          # behind the file's: padding, or a variant's rows
    for module in model.fresh:
        with deepspeed.zero.GatheredParameters([model.llama.embed_tokens.weight, *module.parameters()],
                                               modifier_rank=0):
            model.reset(module)
    if swapper is None:                                         # The way from a drive knows single parts only.
        for_zero_3(model)
    return model


def build_model(options: Options, config: ModelConfig) -> VisualChat:
    """The model as --zero and --precision want it, partly frozen; prints how much of it trains."""
    ranks = dist.get_world_size()
    model = (build_shared_out(config, settings_for(options, ranks)) if options.zero == 3
             else build(config, DTYPES[options.precision]))
    model.llama.recompute = options.recompute
    model.freeze()
    if dist.get_rank() == 0:
        # Under ZeRO-3 a parameter's own size is 0, and ds_numel is that of the whole.
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
        print(f"trainable {readable(sum(size for size, trains in sizes if trains))} of "
              f"{readable(sum(size for size, _ in sizes))}; {options.attention}, ZeRO-{options.zero}, "
              f"{options.precision}, ranks: {ranks}\n{batch_text(options, ranks)}")
    return model


def engine_for(model: VisualChat, options: Options, steps: int, universal: bool):
    """The model in DeepSpeed's hands, with the paper's AdamW over what is trainable (section 4.2.1).

    universal: it will load a checkpoint that another number of ranks wrote.
    """
    fresh = [p for module in model.fresh for p in module.parameters()]
    optimizer = torch.optim.AdamW([dict(params=fresh, lr=options.lr),
                                   dict(params=[model.llama.embed_tokens.weight], lr=options.embedding_lr)],
                                  betas=BETAS, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_rate(step, steps))
    settings = settings_for(options, dist.get_world_size())
    settings["checkpoint"] = {**settings.get("checkpoint", {}), "load_universal": universal}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=settings)
    return engine


# ---- a plan, before anything is paid for ----

def memory(options: Options, llama: LlamaConfig, vit: VisionConfig, gpus: int) -> dict[str, float]:
    """Bytes that one of `gpus` GPUs holds at the height of a step, by what they are for.

    Frozen weights need no inputs for a gradient of theirs, so of each layer and position the backward pass wants
    only what the other operations need: both norms' inputs; q, k, v and two outputs of attention, one per softmax;
    SwiGLU's gate, its SiLU, and what that is multiplied with. With --offload nvme linear layers keep their inputs,
    too (see build_shared_out). All positions count as text here; image tokens need less.
    """
    values, width = counts(llama, vit), 4 if options.precision == "fp32" else 2
    weight_ranks, gradient_ranks, master_ranks = (gpus if options.zero >= stage else 1 for stage in (3, 2, 1))
    on_gpu = not (options.offload and options.zero == 3)
    key_values = 2 * llama.num_key_value_heads / llama.num_attention_heads
    position = width * ((5 + key_values) * llama.hidden_size + 3 * llama.intermediate_size)
    if options.offload == "nvme":
        position += width * (3 * llama.hidden_size + llama.intermediate_size)
    layer = options.positions * position
    inputs = options.positions * llama.hidden_size * width * llama.num_hidden_layers
    return {
        "frozen weights": width * values["frozen"] / weight_ranks * on_gpu,
        "trained weights": width * values["trained"] / weight_ranks * on_gpu,
        "masters, moments": 12 * values["trained"] / master_ranks * (not options.offload),
        "gradients": width * values["trained"] * (1 + 1 / gradient_ranks),       # a bucket, and what is kept of it
        # What may be live (see zero_settings), and lm_head, which is as large as the embedding, on top of it.
        "gathered": width * 2 * (values["layer"] + values["embedding"]) * (options.zero == 3),
        "activations": layer + inputs if options.recompute else layer * llama.num_hidden_layers,
        "logits": LOSS_CHUNK * llama.vocab_size * (2 * width + 8),          # two in float32, two in the precision
    }


def plan_row(options: Options, mark: str = "") -> tuple[str, str]:
    """A row of the plan's table: a name, and the figures, or why training refuses these settings."""
    offload = f" --offload {options.offload}" if options.offload else ""
    name = f"{mark}ZeRO-{options.zero}{' --recompute' * options.recompute}{offload}"
    try:
        check_options(options, options.gpus)
    except ValueError as error:
        return name, f"refused: {error}"
    parts = memory(options, *published_sizes(options.size), options.gpus)
    total = sum(parts.values()) / 1e9
    return name, "  ".join([*(f"{value / 1e9:{len(part)}.1f}" for part, value in parts.items()), f"{total:5.1f}",
                            "fits" if total < options.gpu_memory else "too much"])


def plan_text(options: Options) -> str:
    """What --plan prints: memory with the settings as given, then with others; steps and FLOPs.

    Raises ValueError where training refuses the settings as given.
    """
    check_options(options, options.gpus)
    llama, vit = published_sizes(options.size)
    values, given = counts(llama, vit), plan_row(options, "as given: ")
    others = [replace(options, zero=zero, offload=offload, recompute=again) for zero, offload, again in
              (*product(range(4), [""], [False, True]), (3, "cpu", True))]
    header = f"GB on each GPU, {options.precision}", "  ".join([*memory(options, llama, vit, 1), "total"])
    width = max(34, len(given[0]))
    lines = [f"{name:{width}}  {figures}" for name, figures in (header, given, *map(plan_row, others))]
    names = dataset_names(options.datasets)
    samples = sum(SOURCES[name].in_paper for name in names) * 9 // 10           # a tenth is for validation
    steps = samples // options.batch * options.epochs
    positions = steps * options.batch * options.length
    return "\n".join([
        f"{options.size}: {readable(values['trained'])} trained, {readable(values['frozen'])} frozen",
        batch_text(options, options.gpus), "", *lines, "",
        f"{', '.join(names)}:", f"{samples:,} conversations by the paper's count, {options.epochs} epochs: "
        f"{steps:,} steps of {options.batch} conversations with {options.length} positions (--length),",
        f"{positions:.2e} positions, {4 * (values['frozen'] - values['vit']) * positions:.2e} FLOPs in LLaMA's "
        "matrices, lm_head at all positions: per value and position 2 forward and 2 backward,",
        "since frozen weights get no gradient; with --recompute 2 more"])
