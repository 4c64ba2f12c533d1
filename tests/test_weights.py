"""Claims about weights.py: strict loading, no code from pickles, no file outside a folder, finding weights."""
import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoint import read_log
from conftest import tiny
from llama import Llama, Tokenizer
from weights import check_tensors, find_weights, printable, read_file, read_json, replacing


# ---- helpers ----

def test_a_file_is_replaced_in_one_step_or_not_at_all(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(file) as new:
        new.write_text("half")
        1 / 0
    assert file.read_text() == "old" and [*tmp_path.iterdir()] == [file]
    with replacing(file) as new:
        new.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new" and [*tmp_path.iterdir()] == [file]


def test_what_could_command_a_terminal_is_escaped():
    assert printable("é 猫\n\x1b[2J\r\x07\ud800") == "é 猫\n\\x1b[2J\\r\\x07\\ud800"


def test_modules_without_values_lie_on_the_meta_device_and_do_not_import_the_compiler():
    code = ("import sys; from llama import *; from vit import *; from weights import without_values\n"
            "with without_values(): towers = Llama(LLAMA_2['7b']), VisionTransformer(VisionConfig())\n"
            "assert all(p.is_meta for tower in towers for p in tower.parameters())\n"
            "assert not {'torch._dynamo', 'sympy'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True)


# ---- folders ----

def index(folder, *shards):
    weight_map = {f"tensor{i}": shard for i, shard in enumerate(shards)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("tensors, shape", [
    ({"model.layers.1.mlp.up_proj.weight": None}, r"missing layers.1.mlp.up_proj.weight \(80, 48\)"),
    ({"model.layers.1.extra": torch.zeros(2, 3)}, r"unexpected layers.1.extra \(2, 3\)"),
    ({"model.norm.weight": torch.zeros(7)}, r"norm.weight is \(7,\), expected \(48,\)")],
    ids=["missing", "unexpected", "wrong shape"])
def test_loading_is_strict(llama_folder, tensors, shape):
    path = llama_folder(tensors)
    with pytest.raises(ValueError, match=shape) as error:
        Llama.from_pretrained(path)
    assert str(path) in str(error.value)


def test_a_saved_rope_table_is_skipped(llama_folder):
    Llama.from_pretrained(llama_folder({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)}))


def test_weights_come_in_the_wanted_type(llama_folder):
    assert {p.dtype for p in Llama.from_pretrained(llama_folder()).parameters()} == {torch.float32}
    halved = Llama.from_pretrained(llama_folder(), dtype=torch.float16)
    assert {p.dtype for p in halved.parameters()} == {torch.float16}


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", ".."])
def test_an_index_cannot_name_a_file_outside_its_folder(llama_folder, shard):
    path = llama_folder()
    save_file({"lm_head.weight": torch.zeros(1)}, path.parent / "x.safetensors")
    index(path, shard)
    with pytest.raises(ValueError, match="no file in its folder"):
        Llama.from_pretrained(path)


def test_every_missing_shard_is_named(llama_folder):
    path = llama_folder()
    index(path, "model.safetensors", "model-2.safetensors", "model-3.safetensors")
    with pytest.raises(FileNotFoundError, match="model-2.safetensors, model-3.safetensors"):
        Llama.from_pretrained(path)


def test_an_index_without_a_table_is_refused(llama_folder):
    path = llama_folder()
    (path / "model.safetensors.index.json").write_text('{"weight_map": ["model.safetensors"]}')
    with pytest.raises(ValueError, match="no weight_map"):
        Llama.from_pretrained(path)


def test_a_pickle_of_something_else_is_refused(tmp_path):
    torch.save({"lm_head.weight": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds other things than dense tensors"):
        read_file(tmp_path / "pytorch_model.bin")


class Greedy:
    def __reduce__(self):
        return bytearray, (3 * 10 ** 9,)


def test_a_pickle_cannot_ask_for_memory(tmp_path):
    torch.save({"lm_head.weight": Greedy()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError,
                       match="model.bin is damaged, or holds other things than .* it names .*bytearray"):
        read_file(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_damaged_file_is_named_wherever_it_ends_and_whatever_byte_is_wrong(tmp_path, suffix):
    file = tmp_path / f"model{suffix}"
    tensors = {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(5)}
    (torch.save if suffix == ".bin" else save_file)(tensors, file)
    whole, rng = file.read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        if rng.random() < .5:
            damaged = damaged[:rng.randrange(len(whole))]
        else:
            damaged[rng.randrange(len(whole))] = rng.randrange(256)
        file.write_bytes(damaged)
        try:
            found = read_file(file)
        except ValueError as error:
            assert str(error).startswith(f"{file} is damaged")
        else:
            assert all(isinstance(tensor, torch.Tensor) for tensor in found.values())


@pytest.mark.parametrize("tensor, said", [
    (torch.zeros(2, 3, dtype=torch.int64), "torch.int64"), (torch.zeros(2, 3, dtype=torch.complex64), "complex"),
    (torch.zeros(2, 3).to_sparse(), "sparse"), (torch.zeros(2, 3, device="meta"), "on meta")],
    ids=["integers", "complex", "sparse", "meta"])
def test_only_dense_tensors_of_floats_are_weights(tensor, said):
    with pytest.raises(ValueError, match=f"a is .*{said}.*, expected dense floating-point values"):
        check_tensors({"a": torch.zeros(2, 3)}, {"a": tensor}, Path("here"))


def rezipped(file, **changes):
    """The zip file with other contents in place of some, as `torch.save` never writes it."""
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", changes.get("compression", zipfile.ZIP_STORED)) as archive:
        for name, content in [*parts.items(), *[(changes["again"], b"x") for _ in range("again" in changes)]]:
            archive.writestr(name, content[:changes["cut"]] if "cut" in changes and "/data/" in name else content)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("changes", [{"compression": zipfile.ZIP_DEFLATED}, {"again": "model/data/0"},
                                     {"again": "model/DATA.PKL"}, {"again": "model/sub/data.pkl"}, {"cut": 8}])
def test_a_pickle_s_values_are_those_that_lie_in_the_file_for_them(tmp_path, changes):
    file = tmp_path / "model.bin"
    torch.save({"a": torch.ones(100)}, file)
    assert read_file(file)["a"].sum() == 100
    rezipped(file, **changes)
    with pytest.raises(ValueError, match=f"{file} is damaged, or holds other things"):
        read_file(file)


@pytest.mark.parametrize("tensor, said", [(torch.ones(1).expand(2, 3), "a repeats its values"), (
    torch.zeros(2, 3).to(torch.float8_e4m3fn), "a is torch.float8.*, expected dense floating-point values")])
def test_views_that_repeat_a_value_and_8_bits_are_no_weights(tensor, said):
    with pytest.raises(ValueError, match=said):
        check_tensors({"a": torch.zeros(2, 3)}, {"a": tensor}, Path("here"))


def test_messages_stay_short_whatever_names_and_shapes_say():
    with pytest.raises(ValueError) as raised:
        check_tensors({"a": torch.zeros(1)}, {"x" * 10 ** 6: torch.zeros(1), "a": torch.zeros([1] * 60)},
                      Path("here"))
    assert len(str(raised.value)) < 1000


def test_a_name_in_two_shards_or_under_two_spellings_is_refused(llama_folder):
    path = llama_folder({"norm.weight": torch.ones(48)})        # beside model.norm.weight
    with pytest.raises(ValueError, match=f"{path} holds norm.weight twice"):
        Llama.from_pretrained(path)
    first, second = {"model.norm.weight": torch.ones(48)}, {"model.norm.weight": torch.zeros(48)}
    for name, tensors in (("1.safetensors", first), ("2.safetensors", second)):
        save_file(tensors, path / name)
    (path / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {"model.norm.weight": "1.safetensors", "x": "2.safetensors"}}))
    with pytest.raises(ValueError, match=f"{path} holds norm.weight twice"):
        Llama.from_pretrained(path)


def test_two_names_of_the_same_values_train_apart(llama_folder):
    path = llama_folder()
    tensors = {f"model.{name}" if name != "lm_head.weight" else name: t for name, t in tiny().state_dict().items()}
    torch.save(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    llama = Llama.from_pretrained(path)
    llama.embed_tokens.weight.data += 1
    torch.testing.assert_close(llama.lm_head.weight, tensors["model.embed_tokens.weight"])


def test_a_pipe_in_place_of_a_file_is_no_file(tmp_path):
    for name in ("config.json", "tokenizer.model", "log.csv"):
        os.mkfifo(tmp_path / name)                              # opening one would wait for ever
    for read in (lambda: read_json(tmp_path / "config.json"), lambda: Tokenizer(tmp_path)):
        with pytest.raises(FileNotFoundError, match=str(tmp_path)):
            read()
    assert read_log(tmp_path / "log.csv", 3) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(llama_folder, value):
    path = llama_folder({"model.norm.weight": torch.tensor([1.0] * 47 + [value])})
    with pytest.raises(ValueError, match=f"{path}: norm.weight holds values that are no finite numbers"):
        Llama.from_pretrained(path)


@pytest.mark.parametrize("absent", ["config.json", "model.safetensors"])
def test_absent_files_are_named(llama_folder, tmp_path, absent):
    (llama_folder() / absent).unlink()
    with pytest.raises(FileNotFoundError, match=absent):
        Llama.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Llama.from_pretrained(tmp_path / "nowhere")


class Evil:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_a_pickle_runs_no_code(llama_folder):
    path = llama_folder()
    marker = path / "ran"
    (path / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil(marker)}, path / "pytorch_model.bin")
    with pytest.raises(ValueError):
        Llama.from_pretrained(path)
    assert not marker.exists()
    torch.load(path / "pytorch_model.bin", weights_only=False)         # the pickle is live: here it runs
    assert marker.exists()


# ---- where weights lie ----

@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A working folder without weights, and the snapshots of Hugging Face's cache there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("weights.HERE", tmp_path / "code")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf/hub/models--Qwen--Qwen-VL/snapshots"


def test_absent_weights_are_named_with_the_command_that_gets_them(nowhere, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        find_weights("Qwen/Qwen-VL")
    command = "hf download Qwen/Qwen-VL --include '*.json' --local-dir weights/Qwen-VL"
    for text in (tmp_path / "weights/Qwen-VL", nowhere, command):
        assert str(text) in str(error.value)
    with pytest.raises(FileNotFoundError, match="python -m tiny.pretrain"):
        find_weights("tiny/llama")


def test_weights_beside_the_code_are_found_from_any_folder(nowhere, tmp_path):
    tower(tmp_path / "code/weights/tiny/llama")
    assert find_weights("tiny/llama") == tmp_path / "code/weights/tiny/llama"


def tower(folder: Path, *files: str):
    """A folder with empty files of these names, by default those of a tower."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in files or ("config.json", "model.safetensors"):
        (folder / name).write_text("{}" if name == "config.json" else "")


def test_the_newest_snapshot_is_found_and_a_local_folder_before_it(nowhere, tmp_path):
    for name, time in (("new", 2e9), ("old", 1e9)):
        tower(nowhere / name)
        os.utime(nowhere / name, (time, time))
    assert find_weights("Qwen/Qwen-VL") == nowhere / "new"
    tower(tmp_path / "weights/Qwen-VL")
    assert find_weights("Qwen/Qwen-VL").samefile(tmp_path / "weights/Qwen-VL")


def test_folders_that_lack_files_are_passed_over_and_named_if_there_is_no_other(nowhere, tmp_path):
    local = tmp_path / "weights/Qwen-VL"
    tower(local, "config.json")
    tower(nowhere / "new", "config.json")
    index(nowhere / "new", "model-1.safetensors", "model-2.safetensors")
    tower(nowhere / "new", "model-1.safetensors")
    with pytest.raises(FileNotFoundError, match=f"{local} is not complete; {nowhere}/new is not complete. Get"):
        find_weights("Qwen/Qwen-VL")
    tower(nowhere / "new", "model-2.safetensors")
    assert find_weights("Qwen/Qwen-VL") == nowhere / "new"


def test_of_a_qwen_vl_the_encoder_s_files_are_enough(nowhere):
    tower(nowhere / "one", "config.json", "model-2.safetensors")
    weight_map = {"transformer.wte.weight": "model-1.safetensors",
                  "transformer.visual.proj": "model-2.safetensors"}
    (nowhere / "one/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert find_weights("Qwen/Qwen-VL") == nowhere / "one"


@pytest.mark.parametrize("settings, cache", [
    ({"HF_HOME": "~/hf"}, "hf/hub"), ({"XDG_CACHE_HOME": "{home}/x"}, "x/huggingface/hub"),
    ({"HF_HUB_CACHE": "~/h"}, "h"), ({}, ".cache/huggingface/hub")])
def test_the_cache_lies_where_hugging_face_s_programs_put_it(nowhere, tmp_path, monkeypatch, settings, cache):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("HF_HOME", "XDG_CACHE_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value.format(home=tmp_path))
    tower(tmp_path / cache / "models--Qwen--Qwen-VL/snapshots/one")
    assert find_weights("Qwen/Qwen-VL") == tmp_path / cache / "models--Qwen--Qwen-VL/snapshots/one"


def test_a_llama_without_its_tokenizer_is_passed_over(nowhere, tmp_path):
    snapshots = nowhere.parents[1] / "models--meta-llama--Llama-2-7b-hf/snapshots"
    for name, time in (("new", 2e9), ("old", 1e9)):
        tower(snapshots / name)
        (snapshots / name / "config.json").write_text('{"model_type": "llama"}')
        os.utime(snapshots / name, (time, time))
    tower(snapshots / "old", "tokenizer.model")
    assert find_weights("meta-llama/Llama-2-7b-hf") == snapshots / "old"
