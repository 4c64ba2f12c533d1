"""Claims about ready.py: what a machine has and lacks is said in lines, whatever lies in its folders."""
import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

import train
from llama import LLAMA_2, Llama
from ready import look_ahead
from recipe import Options, for_size
from sources import file_names
from training import ROOT
from vit import IN_CONFIG, PREFIX, VisionConfig, VisionTransformer
from weights import without_values

LLAMA, QWEN = Path("weights/Llama-2-7b-hf"), Path("weights/Qwen-VL")
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
DISK_USAGE = shutil.disk_usage
CARDS = [("Some GPU", 80 * 10 ** 9)] * 8


# ---- official folders in their true shapes, which take no room: their values are holes in the files ----

def write_shard(path: Path, shapes: dict[str, tuple], dtype: str):
    """A safetensors file with a true header, and nothing but a hole where the values should be."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                             # so that values lie where they can be mapped
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)


def write_folder(folder: Path, shapes: dict[str, tuple], config: dict, dtype: str, others: tuple[str, ...] = ()):
    """A folder of two shards; `others` are names in its index of tensors that lie in a third, absent shard."""
    folder.mkdir(parents=True)
    names = list(shapes)
    files = {FIRST: names[:len(names) // 2], SECOND: names[len(names) // 2:]}
    for file, part in files.items():
        write_shard(folder / file, {name: shapes[name] for name in part}, dtype)
    index = {name: file for file, part in files.items() for name in part}
    index |= dict.fromkeys(others, "model-of-words.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config))


def write_llama(folder: Path, size: str):
    with without_values():
        shapes = {name if name == "lm_head.weight" else f"model.{name}": t.shape
                  for name, t in Llama(LLAMA_2[size]).state_dict().items()}
    write_folder(folder, shapes, {"model_type": "llama"} | vars(LLAMA_2[size]), "F16")
    shutil.copy(ROOT / "weights/tiny/llama/tokenizer.model", folder)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder in which all is there for 7b."""
    folder = tmp_path_factory.mktemp("prepared")
    write_llama(folder / LLAMA, "7b")
    with without_values():
        vit = VisionTransformer(VisionConfig()).state_dict()
    shapes = {f"{PREFIX}{name}": t.shape for name, t in vit.items()}
    shapes[f"{PREFIX}proj"] = vit["attn_pool.attn.out_proj.weight"].shape       # which nobody reads
    write_folder(folder / QWEN, shapes, {"visual": {name: vars(VisionConfig())[name] for name in IN_CONFIG}},
                 "BF16", others=("transformer.wte.weight",))
    (folder / "data/coco/train2017").mkdir(parents=True)
    (folder / "data/coco/train2017/000000000009.jpg").touch()
    (folder / "data/llava").mkdir()
    for name in ("detail_23k", "complex_reasoning_77k", "conversation_58k"):
        (folder / f"data/llava/{name}.json").write_text("[]")
    return folder


@pytest.fixture
def machine(prepared, tmp_path, monkeypatch) -> Path:
    """A copy of it as working folder, on a machine with eight GPUs and much room."""
    for source in prepared.rglob("*"):
        to = tmp_path / source.relative_to(prepared)
        if source.is_dir():
            to.mkdir(parents=True, exist_ok=True)
        elif source.suffix == ".safetensors":
            os.link(source, to)                                 # Copying would fill the holes.
        else:
            shutil.copy(source, to)
    file_names.cache_clear()                                    # Folders of other tests have the same names.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("weights.HERE", tmp_path / "code")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("ready.free_cards", lambda: CARDS)
    monkeypatch.setattr("ready.check_machine", lambda options: None)
    monkeypatch.setattr("ready.shutil.disk_usage", room(10 ** 12))
    return tmp_path


@pytest.fixture
def no_towers(monkeypatch):
    """For what has nothing to do with weights: looking at them takes most of the time."""
    monkeypatch.setattr("ready.check_tower", lambda *_: ("ok", ""))


def room(free: int):
    return lambda path: namedtuple("Usage", "free")(free)


@pytest.fixture
def screen(capsys):
    """A function that looks; returns the exit status, the lines by what they are about, and all that was said."""
    def look(**given):
        status = look_ahead(for_size(Options(check_weights=True, **{"size": "7b"} | given)))
        said = capsys.readouterr().out
        lines = {line[12:31].strip(): (line[:12].strip(), " ".join(line[31:].split()))
                 for line in re.sub(r"\n {12}", " ", said).splitlines()
                 if not line.startswith(("get:", "training"))}
        assert status == int("training cannot start" in said)
        return status, lines, said
    return look


def states(lines: dict, *states: str) -> dict:
    """The lines that are not in one of these states, by default not ok."""
    return {name: text for name, (state, text) in lines.items() if state not in (states or ("ok",))}


# ---- what is said ----

def test_a_machine_that_has_all_can_start_and_no_value_is_read(machine, screen, monkeypatch):
    monkeypatch.setattr("weights.check_numbers", lambda *_: 1 / 0)
    status, lines, said = screen()
    assert status == 0 and not states(lines) and said.endswith("training can start\n")
    assert lines["LLaMA-2"][1] == f"{LLAMA}: 291 tensors, 13.48 GB in float16, weight files: 2"
    assert lines["ViT"][1].startswith(f"{QWEN}: ") and "GB in bfloat16, weight files: 2" in lines["ViT"][1]
    assert "1 files in data/coco/train2017" in lines["llava"][1] and "8: Some GPU" in lines["GPUs"][1]
    assert list(lines) == ["LLaMA-2", "ViT", "tokenizer", "llava", "llava_dial", "GPUs", "precision", "GPU memory",
                           "main memory", "/dev/shm", "disk"]


def test_without_a_gpu_the_rest_is_still_looked_at(machine, screen, monkeypatch):
    monkeypatch.setattr("ready.free_cards", lambda: [])
    status, lines, said = screen(gpus=4)
    assert status == 1 and list(states(lines)) == ["GPUs", "precision"] and lines["precision"][0] == "unknown"
    assert lines["GPUs"][0] == "missing" and "--gpus 4" in lines["GPUs"][1]
    assert "on each of 4" in lines["GPU memory"][1]
    assert said.endswith("training cannot start: GPUs\n")


def delete(*names: str):
    return lambda: [Path(name).unlink() for name in names]


def put(name: Path | str, content: bytes | str):
    """Another content for a file, which may be a link to that of other tests."""
    def write():
        Path(name).unlink(missing_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return write


def cut(name: Path, size: int):
    """A shard that ends too early."""
    def write():
        with open(name, "rb") as file:
            put(name, file.read(min(size, 10 ** 5)))()
        os.truncate(name, size)
    return write


def other_size():
    shutil.rmtree(LLAMA)
    write_llama(LLAMA, "13b")


def other_config():
    found = json.loads((LLAMA / "config.json").read_text())
    put(LLAMA / "config.json", json.dumps(found | vars(LLAMA_2["13b"])))()


def other_shape():
    with open(LLAMA / SECOND, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    shapes = {name: torch.Size(one["shape"]) for name, one in header.items()}
    shapes["model.norm.weight"] = torch.Size([7])
    delete(LLAMA / SECOND)()
    write_shard(LLAMA / SECOND, shapes, "F16")


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9976576152\n"
GET = "get: hf download meta-llama/Llama-2-7b-hf"
GET_VIT = "get: hf download Qwen/Qwen-VL"


# For each line some damages: what is done, the state that is said, words of the line, the command that helps.
DAMAGES = {
    "LLaMA-2": [
        (delete(LLAMA / SECOND), "missing", f"lacks 1 of the files that its index names, such as {SECOND}",
         f"{GET} {SECOND} --force-download --local-dir {LLAMA}"),
        (cut(LLAMA / FIRST, 10 ** 9), "wrong", f"{FIRST} is damaged", f"{GET} {FIRST} --force-download"),
        (put(LLAMA / FIRST, POINTER), "wrong", f"{FIRST} is a pointer of Git LFS, 135 bytes",
         f"{GET} {FIRST} --force-download"),
        (other_size, "wrong", "is of another --size: {.*'hidden_size': 5120.*}, expected {.*4096",
         f"{GET} --exclude '*.bin' --local-dir {LLAMA}"),
        (other_config, "wrong", "does not fit the model.*layers.32.input_layernorm", GET),
        (other_shape, "wrong", "norm.weight is \\(7,\\), expected \\(4096,\\)", GET),
        (put(LLAMA / "config.json", "{"), "wrong", "config.json is not valid JSON", GET)],
    "ViT": [
        (delete(QWEN / FIRST, QWEN / SECOND), "missing", f"lacks 2 .*{FIRST}, {SECOND}",
         f"{GET_VIT} {FIRST} {SECOND} --force-download --local-dir {QWEN}"),
        (cut(QWEN / SECOND, 60), "wrong", f"{SECOND} is damaged", f"{GET_VIT} {SECOND} --force-download"),
        (put(QWEN / FIRST, ""), "wrong", f"{FIRST} is damaged", f"{GET_VIT} {FIRST} --force-download"),
        (delete(QWEN / "config.json"), "missing", "config.json", f"{GET_VIT} --include '*.json'"),
        (put(QWEN / INDEX, '{"weight_map": {"transformer.visual.a": "../x"}}'), "wrong", "no file in its folder",
         f"{GET_VIT} --include '*.json'")],
    "tokenizer": [
        (put(LLAMA / "tokenizer.model", POINTER), "wrong", "is a pointer of Git LFS",
         f"{GET} tokenizer.model --force-download --local-dir {LLAMA}"),
        (put(LLAMA / "tokenizer.model", "x"), "wrong", "is no sentencepiece model", f"{GET} tokenizer.model"),
        (delete(LLAMA / "tokenizer.model"), "missing", "no file", f"{GET} tokenizer.model")],
    "llava": [
        (delete("data/llava/detail_23k.json"), "missing", "no llava/detail_23k.json",
         "hf download liuhaotian/LLaVA-Instruct-150K detail_23k.json complex_reasoning_77k.json "
         "conversation_58k.json --repo-type dataset --local-dir data/llava"),
        (delete("data/coco/train2017/000000000009.jpg"), "missing", "train2017 is empty",
         "get: the images of COCO's train2017 from cocodataset.org")],
    "llava_dial": [(put("data/llava/conversation_58k.json", POINTER), "wrong", "is a pointer of Git LFS", "")],
}


@pytest.mark.parametrize("n", range(7))
def test_what_is_absent_or_damaged_is_its_own_line_with_the_command_that_helps(machine, screen, n):
    chosen = {name: damages[n] for name, damages in DAMAGES.items() if n < len(damages)}
    for damage, *_ in chosen.values():
        damage()
    status, lines, all_said = screen()
    assert status == 1 and states(lines).keys() == chosen.keys() | ({"llava_dial"} if n == 1 else set())
    for name, (_, state, said, command) in chosen.items():
        assert lines[name][0] == state and re.search(said, lines[name][1]), lines[name]
        assert command in all_said


def test_without_any_weights_the_first_commands_are_named(machine, screen):
    shutil.rmtree("weights")
    status, lines, said = screen()
    assert status == 1 and states(lines).keys() == {"LLaMA-2", "ViT", "tokenizer"}
    assert lines["LLaMA-2"][0] == "missing" and "no weights of meta-llama/Llama-2-7b-hf: looked for" in said
    assert f"{GET} --exclude '*.bin' --local-dir {LLAMA}   (its license must be accepted first)\n" in said
    assert f"{GET_VIT} --include '*.json' --local-dir {QWEN}\n" in said
    assert screen(llama="elsewhere")[1]["LLaMA-2"][1].startswith("no elsewhere/config.json")


def test_files_in_the_cache_are_got_again_into_the_cache(machine, screen):
    snapshot = machine / "hf/hub/models--Qwen--Qwen-VL/snapshots/0"
    snapshot.parent.mkdir(parents=True)
    QWEN.rename(snapshot)
    assert screen()[0] == 0
    put(snapshot / FIRST, POINTER)()
    assert f"get: hf download Qwen/Qwen-VL {FIRST} --force-download\n" in screen()[2]


def test_without_permission_the_file_is_named_and_no_command_is_named(machine, screen):
    for file in (LLAMA / "config.json", LLAMA / "tokenizer.model", Path("data/llava/detail_23k.json")):
        file.chmod(0)
    Path("out").mkdir(mode=0o555)
    who = os.geteuid()
    if who == 0:                                                # root may read all: be nobody for a moment
        for parent in (machine, *machine.parents[:2]):
            parent.chmod(0o711)
        os.seteuid(65534)
    try:
        status, lines, said = screen()
    finally:
        os.seteuid(who)
    assert status == 1 and "get:" not in said
    assert {name: text for name, (state, text) in lines.items() if state == "wrong"}.keys() == {
        "LLaMA-2", "tokenizer", "llava", "disk"}
    assert all("Permission denied" in lines[name][1] for name in ("LLaMA-2", "tokenizer", "llava"))


@pytest.mark.parametrize("free, given, line", [
    (1e12, {"positions": 400_000}, ("GPU memory", "too little", "on each of 8 by the plan, 80.00 GB free: --rec")),
    (7e9, {}, ("disk", "too little", "7.10 GB at most in out/7b, 7.00 GB free: make room")),
    (7.2e9, {"workers": 16}, ("/dev/shm", "slow", "7.40 GB at most for --workers 16, 7.20 GB free: images")),
    (1e12, {"offload": "cpu"}, ("main memory", "too little", "19.12 GB for --offload")),
    (1e12, {"offload": "nvme", "nvme": "none"}, ("main memory", "missing", "none")),
    (1e12, {"zero": 1, "precision": "bf16"}, ("main memory", "too little", "108.08 GB for 8 ranks that load")),
    (1e12, {"batch": 100}, ("GPU memory", "wrong", "--batch 100 cannot be shared by 8 ranks")),
    (1e12, {"zero": 0}, ("GPU memory", "wrong", "take --zero 1")),
    (1e12, {"deepspeed_config": "own.json"}, ("GPU memory", "wrong", "own.json makes fp16 False")),
    (1e12, {"out": "data/llava/detail_23k.json"}, ("disk", "wrong", "is no folder to write into"))])
def test_what_is_too_little_or_contradicts_is_said(machine, no_towers, screen, monkeypatch, free, given, line):
    Path("own.json").write_text('{"fp16": {"enabled": false}}')
    monkeypatch.setattr("ready.shutil.disk_usage", DISK_USAGE if "nvme" in given else room(free))
    monkeypatch.setattr("ready.free_memory", lambda: 10 ** 10 if "offload" in given else 10 ** 11)
    status, lines, _ = screen(**given)
    name, state, said = line
    assert states(lines).keys() == {name} and status == (state != "slow")
    assert lines[name][0] == state and re.search(said, lines[name][1]), lines[name]


def test_a_small_dev_shm_alone_does_not_keep_training_from_starting(machine, no_towers, screen, monkeypatch):
    monkeypatch.setattr("ready.shutil.disk_usage",
                        lambda path: namedtuple("Usage", "free")(64e6 if path == Path("/dev/shm") else 1e12))
    status, lines, _ = screen()
    assert status == 0 and states(lines).keys() == {"/dev/shm"}
    assert not states(screen(workers=0)[1])


def test_the_free_memory_of_the_fullest_card_counts(machine, no_towers, screen, monkeypatch):
    monkeypatch.setattr("ready.free_cards", lambda: [*CARDS, ("Some GPU", 10 ** 9)])
    assert screen(batch=9)[1]["GPU memory"] == ("too little", "20.06 GB on each of 9 by the plan, 1.00 GB free: "
                                                "--recompute or fewer --positions need less; see --plan, with "
                                                "--gpus for several machines")


def test_a_driver_that_fails_is_a_line(machine, no_towers, screen, monkeypatch):
    monkeypatch.setattr("ready.free_cards", lambda: torch.zeros(2).view(3))
    status, lines, _ = screen()
    assert status == 1 and lines["driver of GPUs"][0] == "wrong" and lines["GPUs"][0] == "missing"


def test_a_run_in_the_way_is_named(machine, no_towers, screen):
    (machine / "out/7b/checkpoints/step-00000100").mkdir(parents=True)
    assert screen()[1]["disk"][0] == "wrong" and screen(resume=True)[0] == 0
    shutil.rmtree(machine / "out/7b/checkpoints")
    (machine / "out/7b/trained.safetensors").touch()
    assert screen()[1]["disk"][0] == "wrong" and screen(overwrite=True)[0] == 0


def test_however_a_file_is_damaged_there_is_a_line_and_no_traceback(tmp_path, screen, monkeypatch):
    shutil.copytree(ROOT / "weights/tiny", tmp_path / "weights/tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("weights.HERE", tmp_path / "code")
    for file in Path("weights/tiny").glob("[lv]*/*[!l]"):       # all but tokenizer.model
        whole = file.read_bytes()
        for content in (b"", b"[]", b"{}", b"\xff\xfe", whole[:len(whole) // 2], whole[:-2], b'{"weight_map": 1}'):
            put(file, content)()
            status, lines, _ = screen(size="tiny")
            tower = "LLaMA-2" if file.parent.name == "llama" else "ViT"
            assert status == 1 and lines[tower][0] in ("wrong", "missing"), (file, content[:20])
        put(file, whole)()
    assert screen(size="tiny")[0] == 0


def test_the_command_line_ends_with_the_status(machine, monkeypatch, capsys):
    for size, status in (("13b", 1), ("7b", 0)):
        monkeypatch.setattr(sys, "argv", ["train.py", "--size", size, "--check-weights"])
        with pytest.raises(SystemExit) as end:
            train.main()
        said = capsys.readouterr().out
        assert end.value.code == status and ("training can start" in said) == (status == 0)
        assert ("missing     sparkles_dialogue" in said) == (size == "13b")


def test_the_tiny_size_needs_nothing_but_this_repository(tmp_path, monkeypatch, screen):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ready.free_cards", lambda: [])
    status, lines, _ = screen(size="tiny")
    assert status == 0 and not states(lines) and lines["llava"][1] == "training draws data/tiny"


def test_readme_s_command_names_the_encoder_s_shards_alone(tmp_path):
    code = re.search(r"Qwen/Qwen-VL .*\n +\$\(python (.*)\)\n", (ROOT / "README.md").read_text())[1]
    folder = tmp_path / QWEN
    folder.mkdir(parents=True)
    weight_map = {"transformer.wte.weight": "pytorch_model-1.bin", f"{PREFIX}proj": "pytorch_model-3.bin",
                  f"{PREFIX}conv1.weight": "pytorch_model-2.bin", f"{PREFIX}ln_pre.bias": "pytorch_model-2.bin"}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    done = subprocess.run(["bash", "-c", f"{sys.executable} {code}"], cwd=tmp_path, check=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.stdout.split() == ["pytorch_model-2.bin", "pytorch_model-3.bin"]
