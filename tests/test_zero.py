"""Claims about zero.py: one result on any number of ranks and any ZeRO stage, settings, loading, the plan."""
import csv
import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import zero
from llama import Layer, LlamaConfig, Pass, rope_table
from mmca import IMAGE, TEXT, compact_attention, separate
from recipe import Options, for_size
from tiny.pretrain import VIT
from training import SCRIPT, at_once, launch, losses
from zero import (DTYPES, check_machine, check_options, get_accelerator, memory, per_rank, plan_text,
                  published_sizes, settings_for)


def test_two_ranks_under_zero_3_have_the_losses_of_one_rank(world, reference):
    two = losses(world, "out/two", ranks=2)
    assert len(two) == len(reference) == 9
    assert two == pytest.approx(reference, abs=1e-3)
    logs = [list(csv.DictReader(open(world / out / "log.csv")))[-1] for out in ("out/two", "out/reference")]
    assert float(logs[0]["val_loss"]) == pytest.approx(float(logs[1]["val_loss"]), abs=1e-3)    # on all of them


def test_two_ranks_that_share_out_every_parameter_agree_too(world, reference, tmp_path):
    """By default ZeRO-3 leaves tensors of fewer than 100,000 values whole: nearly all of the tiny size."""
    (tmp_path / "all.json").write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    settings = ["--deepspeed-config", str(tmp_path / "all.json")]
    # Room for two or three conversations at a time: the ranks have different numbers of packed batches in a step.
    found = losses(world, "out/shared", *settings, "--positions", "400", ranks=2)
    assert found == pytest.approx(reference, abs=1e-3)


def test_stage_and_accumulation_do_not_change_the_losses(world, reference):
    others = [["--zero", "0"], ["--zero", "2"], ["--zero", "1", "--positions", "400"]]
    for found in at_once(*(partial(losses, world, f"out/other{i}", *given) for i, given in enumerate(others))):
        assert found == pytest.approx(reference, abs=1e-3)


def test_offload_and_monitor_change_no_loss(world, reference):
    options = ["--offload", "cpu", "--monitor", "csv_monitor", "--recompute"]
    assert losses(world, "out/offload", *options) == pytest.approx(reference, abs=1e-3)
    told, = (world / "out/offload/monitor").rglob("Train_loss.csv")
    values = [float(row[1]) for row in csv.reader(open(told)) if row[0].isdigit()]
    assert values == pytest.approx(reference, abs=1e-3)


NVME_HERE = """
import runpy, sys
import types
from pathlib import Path
import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.swap_tensor import partitioned_param_swapper

class Files:                                # in place of DeepSpeed's asynchronous reads, which want a compiler
    def __init__(self, **settings): self.running = 0
    def sync_pwrite(self, x, path, *at): Path(path).write_bytes(x.numpy().tobytes()); return 0
    def sync_pread(self, x, path, *at):
        x.copy_(torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=x.dtype)[:x.numel()]); return 0
    def async_pwrite(self, x, path, *at): self.running += 1; return self.sync_pwrite(x, path)
    def async_pread(self, x, path, *at): self.running += 1; return self.sync_pread(x, path)
    def wait(self): done, self.running = self.running, 0; return done
    def get_alignment(self): return 512
    def is_pinned(self, x): return True
    def new_cpu_locked_tensor(self, n, like): return torch.empty(n, dtype=like.dtype)
    def free_cpu_locked_tensor(self, x): return True

get_accelerator().get_op_builder("AsyncIOBuilder").load = lambda *_, **__: types.SimpleNamespace(aio_handle=Files)
deepspeed.ops.op_builder.AsyncIOBuilder.load = get_accelerator().get_op_builder("AsyncIOBuilder").load
partitioned_param_swapper.MIN_AIO_BYTES = 4096
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_weights_that_wait_on_a_drive_are_those_of_the_files(world, reference, tmp_path):
    (tmp_path / "small.json").write_text(json.dumps({
        "aio": {"block_size": 4096}, "zero_optimization": {"stage3_param_persistence_threshold": 10}}))
    code = NVME_HERE.replace("import runpy, sys", f"import runpy, sys; sys.argv[0] = {SCRIPT!r}")
    launch(world, sys.executable, "-c", code, "--offload", "nvme", "--nvme", str(tmp_path), "--epochs", "1",
           "--workers", "0", "--lr", "1e-4", "--out", "out/nvme",
           "--deepspeed-config", str(tmp_path / "small.json"))
    assert len(list(tmp_path.rglob("*param.tensor.swp"))) > 60
    rows = list(csv.DictReader(open(world / "out/nvme/log.csv")))
    assert [float(row["loss"]) for row in rows] == pytest.approx(reference, abs=1e-3)


def test_the_launcher_starts_without_compiler_ninja_or_mpi(world, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    launcher = shutil.which("deepspeed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name, script in (("python3", ""), ("deepspeed", f'"{launcher}"')):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {script} "$@"\n')
        (programs / name).chmod(0o755)
    (programs / "sh").symlink_to("/bin/sh")
    printed = launch(world, str(programs / "deepspeed"), SCRIPT, "--epochs", "1",
                     "--out", "out/bare", path=str(programs))
    assert "exact match" in printed and "trainable 0.1 M of 2.0 M" in printed


def test_the_settings_are_printed_and_fit_the_model(world):
    printed = launch(world, sys.executable, SCRIPT, "--show-config", "--size", "7b", "--offload", "cpu",
                     "--monitor", "csv_monitor")
    settings = json.loads(printed)
    zero = settings["zero_optimization"]
    waiting = {"device": "cpu", "pin_memory": True}
    assert zero["stage"] == 3 and zero["offload_param"] == zero["offload_optimizer"] == waiting
    assert zero["stage3_prefetch_bucket_size"] == 4 * 4096 ** 2 + 3 * 4096 * 11008 + 2 * 4096   # one layer
    assert zero["reduce_bucket_size"] == 32000 * 4096 + 4096 * 4096 + 4096           # all that trains
    assert settings["csv_monitor"] == {"enabled": True, "output_path": "out/7b/monitor/", "job_name": "7b"}
    assert not (world / "out/7b").exists()


def test_settings_of_ones_own_are_laid_over_but_not_over_what_flags_decide(monkeypatch, tmp_path):
    own = {"zero_optimization": {"stage3_prefetch_bucket_size": 7}, "wall_clock_breakdown": True}
    for given, refused in ((own, ""), ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps 4"),
                           ({"zero_optimization": {"stage": 1}}, "stage 1"),
                           ({"bf16": {"enabled": True}}, "bf16"),
                           ({"fp16": None}, "own.json: fp16 is None, expected"),
                           ({"zero_optimization": 5}, "own.json: zero_optimization is 5, expected a setting like"),
                           ({"gradient_clipping": {}}, "own.json: gradient_clipping is {}")):
        (tmp_path / "own.json").write_text(json.dumps(given))
        options = for_size(Options(deepspeed_config=str(tmp_path / "own.json"), precision="fp32"))
        if refused:
            with pytest.raises(ValueError, match=refused):
                settings_for(options, 2)
        else:
            found = settings_for(options, 2)
            assert found["zero_optimization"]["stage3_prefetch_bucket_size"] == 7 and found["wall_clock_breakdown"]
            assert found["zero_optimization"]["stage"] == 3


def test_the_plan_says_what_fits(world):
    printed = launch(world, sys.executable, SCRIPT, "--size", "70b", "--plan", "--gpus", "16", "--gpu-memory",
                     "80")
    rows = {line[:34].strip(): line[34:].split() for line in printed.splitlines() if line.startswith("ZeRO")}
    frozen = (68_976_648_192 - 32000 * 8192 + 1_918_833_408) * 2 / 1e9          # 141.3 GB in FP16
    assert float(rows["ZeRO-2"][0]) == round(frozen, 1) and rows["ZeRO-2"][-1] == "much"
    assert float(rows["ZeRO-3"][0]) == round(frozen / 16, 1) and rows["ZeRO-3 --recompute"][-1] == "fits"
    assert "200,412 conversations" in printed and "9,390 steps" in printed
    assert "/dev/shm of each machine: 2.47 GB at most for --workers 2" in printed   # 128 x 8 images of 448 x 448


@pytest.mark.parametrize("key_value_heads", [8, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_plan_counts_what_a_layer_keeps_for_the_backward_pass(precision, key_value_heads):
    length, dtype = 1024, DTYPES[precision]
    sizes = LlamaConfig(256, 704, 1, 8, key_value_heads, vocab_size=100)
    layer = Layer(sizes).to(dtype).requires_grad_(False)
    x = torch.randn(length, 256, dtype=dtype, requires_grad=True)
    layout = separate(torch.tensor([[TEXT] * 8 + [IMAGE] * 16 + [TEXT] * (length - 24)]))
    shared = Pass(layout.n_text, rope_table(layout.position, 32, 1e4),
                  lambda number, q, k, v: compact_attention(q, k, v, layout))
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), shared.rope)}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor          # held: no address serves twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x, shared, 0)
    found = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)
    options = Options(precision=precision, positions=length, zero=0)
    assert y.requires_grad
    # On a CPU, unlike on a GPU, norms keep their inputs in float32, whatever the precision is.
    norms = 2 * length * 256 * (4 - dtype.itemsize)
    assert memory(options, sizes, VIT, 1)["activations"] + norms == pytest.approx(found, rel=0.05)


def test_a_frozen_linear_layer_has_the_right_gradient_and_keeps_nothing_but_its_weight():
    x, towards = torch.randn(5, 8, requires_grad=True), torch.randn(5, 7)
    weight = torch.nn.Parameter(torch.randn(7, 8), requires_grad=False)
    expected, = torch.autograd.grad(torch.nn.functional.linear(x, weight), x, towards)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = zero.FrozenLinear.apply(x, weight)
    assert kept == [weight.data_ptr()]
    values = weight.data.clone()
    weight.data = torch.empty(0)            # DeepSpeed takes the values away, and brings them back elsewhere
    weight.data = values
    torch.testing.assert_close(torch.autograd.grad(out, x, towards)[0], expected)


def test_optimizer_and_batch_are_the_paper_s(monkeypatch, model):
    """Section 4.2.1: AdamW with betas (0.0, 0.95), no weight decay, gradients clipped at 1, a tenth of warm-up."""
    monkeypatch.setattr(zero.deepspeed, "initialize", lambda **given: (given,))
    monkeypatch.setattr(zero.dist, "get_world_size", lambda: 2)
    given = zero.engine_for(model, for_size(Options(size="7b", precision="fp32")), steps=100, universal=False)
    optimizer, schedule = given["optimizer"], given["lr_scheduler"]
    assert type(optimizer) is torch.optim.AdamW
    groups = [(group["betas"], group["weight_decay"], group["initial_lr"]) for group in optimizer.param_groups]
    assert groups == [((0.0, 0.95), 0.0, 1e-3)] * 2
    trains = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    assert trains == [{id(p) for p in model.projection.parameters()}, {id(model.llama.embed_tokens.weight)}]
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:10] == pytest.approx([1e-4 * n for n in range(1, 11)]) and max(rates) == pytest.approx(1e-3)
    assert rates[55] == pytest.approx(0.5e-3) and rates[99] < 1e-6
    assert given["config"]["gradient_clipping"] == 1.0
    assert given["config"]["train_micro_batch_size_per_gpu"] * 2 == 128
    assert given["config"]["gradient_accumulation_steps"] == 1


def test_ranks_share_the_batch_or_say_what_they_could():
    options = for_size(Options(batch=16))
    assert per_rank(options, 2) == settings_for(options, 2)["train_micro_batch_size_per_gpu"] == 8
    with pytest.raises(ValueError, match="--batch 16 cannot be shared by 3 ranks: take a multiple of 3"):
        per_rank(options, 3)


def test_fp16_is_refused_where_the_machine_lacks_it(monkeypatch):
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(ValueError, match="AVX512-FP16.*--precision fp32, or bf16"):
        check_machine(Options(precision="fp16"))


@pytest.mark.parametrize("asked, least", [
    (dict(offload="cpu", zero=0), "needs --zero 1"), (dict(offload="nvme", zero=2), "needs --zero 3"),
    (dict(precision="fp16", zero=0), "take --zero 1, 2 or 3")])
def test_what_deepspeed_cannot_do_is_refused(asked, least):
    with pytest.raises(ValueError, match=least):
        check_options(Options(**asked, batch=16), 1)


def test_the_plan_shows_the_settings_as_given_first_and_refuses_what_training_refuses():
    options = Options(size="7b", plan=True, recompute=True, zero=2, offload="cpu", gpus=4)
    lines = plan_text(for_size(options)).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("as given"))
    assert lines[first].startswith("as given: ZeRO-2 --recompute --offload cpu ") and "fp16" in lines[first - 1]
    end = lines[first - 1].index("total") + len("total")
    rows = [line for line in lines[first:first + 10] if "refused" not in line]
    assert len(rows) == 8 and all(line[end:] in ("  fits", "  too much") for line in rows)      # under their heads
    assert sum("refused: DeepSpeed 0.19 scales no loss in fp16 with --zero 0" in line for line in lines) == 2
    for asked, said in ((dict(zero=0), "scales no loss"), (dict(zero=2, offload="nvme"), "needs --zero 3"),
                        (dict(gpus=3), "cannot be shared by 3 ranks")):
        with pytest.raises(ValueError, match=said):
            plan_text(for_size(Options(size="7b", plan=True, **asked)))


def test_the_sizes_of_tiny_are_those_of_its_folders():
    llama, vit = published_sizes("tiny")
    assert (llama.vocab_size, llama.hidden_size, llama.num_hidden_layers) == (1021, 128, 6)
    assert (vit.n_queries, vit.output_dim, vit.image_size) == (4, 128, 64)
    assert published_sizes("tiny") is published_sizes("tiny")       # every step asks: the files are read once
