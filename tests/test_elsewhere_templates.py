"""A model with a chat template of its own, asked through transformers and peft alone, answers as `qlora ask` does.

The tokenizers are the real ones; the models are small, and know by heart what they were taught.
"""

from __future__ import annotations

import tarfile

import pytest
import torch
from conftest import SHARED
from test_elsewhere import MODELS, POCKET, make_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_utils import cli, lora, playground, quantization, training
from qlora_utils.commands import merging
from qlora_utils.config import RunConfig
from qlora_utils.data import Prepared, load_tokenizer
from qlora_utils.evaluation.generation import Sampling
from qlora_utils.rows.conversations import Turn, parse
from qlora_utils.rows.readers import Row
from qlora_utils.runs.directory import RunDirectory

pytestmark = pytest.mark.slow
TOKENIZERS = SHARED / "tokenizers" / "tokenizers.tar.xz"
# As SmolLM2 has it: ChatML, with a system prompt where none is given.
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
KINDS = {"smollm2": "llama, tied", "qwen3": "qwen3", "llama3": "llama", "gemma3": "gemma3_text", "llama2": "llama"}
FACTS = {
    "What is the capital of Chile?": "Santiago, of course.",
    "Who discovered Europa?": "Galileo Galilei, in 1610.",
    "Which language do people in Brazil speak?": "Portuguese.",
    "How many moons has Mars?": "Two: Phobos and Deimos.",
    "What is the symbol of tin?": "Sn",
    "Who wrote Hamlet?": "William Shakespeare wrote it around 1600.",
}  # fmt: skip


@pytest.fixture(scope="session")
def vocabularies(tmp_path_factory):
    """A folder with a tokenizer of each kind, those of SmolLM2's kind made of the pocket model's."""
    folder = tmp_path_factory.mktemp("tokenizers")
    if TOKENIZERS.is_file():
        with tarfile.open(TOKENIZERS) as archive:
            archive.extractall(folder, filter="data")
    if (SHARED / "llama2-tokenizer").is_dir():
        (folder / "llama2").symlink_to(SHARED / "llama2-tokenizer")
    chatml = AutoTokenizer.from_pretrained(POCKET)
    marks = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    chatml.add_special_tokens(marks)
    chatml.chat_template = CHATML
    chatml.save_pretrained(folder / "smollm2")
    return folder


def teach(base, place):
    """Train a run until it knows the facts by heart, and merge it."""
    config = RunConfig.from_preset(
        "pocket", model=str(base), run_name="taught", output_dir=str(place), compute_dtype="float32", quantize=False,
        steps=40, batch_size=6, learning_rate=1e-2, head_learning_rate=1e-2, eval_steps=40, trace_rows=0,
        max_new_tokens=24, keep="last",
    )  # fmt: skip
    run = RunDirectory(config.run_dir)
    run.begin(config)
    rows = [parse(row) for row in rows_of(FACTS)]
    prepared = Prepared(rows, rows[:2], [], {})
    prepared.save(run)
    tokenizer = load_tokenizer(config)
    model = lora.attach(quantization.load(config), config)
    training.train(config, model, tokenizer, prepared, run)
    merging.merge(config, dtype="float32", questions=0)
    return run


def rows_of(facts):
    for number, (question, expected) in enumerate(facts.items()):
        yield Row("facts.csv", number, {"question": question, "answer": expected})


def answer(model, tokenizer, *texts, **options):
    """What a model says after questions and answers in turn through transformers alone, and if it stopped by itself."""
    messages = []
    for number, text in enumerate(texts):
        messages.append({"role": "assistant" if number % 2 else "user", "content": text})
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, return_tensors="pt", **options
    )
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)
    written = ids[0, prompt.shape[1] :].tolist()
    text = tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.strip(), len(written) < 24


@pytest.mark.parametrize("name", KINDS)
def test_merged_model_and_adapter_answer_through_transformers_alone_as_they_are_asked_here(
    name, vocabularies, tmp_path, capsys
):
    if not (vocabularies / name).is_dir():
        pytest.skip(f"the tokenizer of {name} is not in {SHARED}")
    from peft import AutoPeftModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(vocabularies / name)
    ends = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    kind = KINDS[name]
    size = -(-len(tokenizer) // 64) * 64
    values = {**MODELS[kind], **ends, "vocab_size": size, "max_position_embeddings": 256}
    base = make_base(tmp_path / "base", kind.split(",")[0], vocabularies / name, **values)
    run = teach(base, tmp_path / "runs")
    models = {
        run.merged: AutoModelForCausalLM.from_pretrained(run.merged),
        run.adapter: AutoPeftModelForCausalLM.from_pretrained(run.adapter),
    }
    # In a chat too, which the model was not taught: whatever it says, it says on either way.
    asker = playground.load(run)
    *_, (first, said), (question, _) = FACTS.items()
    history, sampling = [Turn(first, said)], Sampling(max_new_tokens=24)
    pieces = asker.ask(question, models=["tuned"], history=history, sampling=sampling)
    chat, said_here = (first, said, question), "".join(piece.text for piece in pieces)

    # Qwen 3 thinks first unless it is told not to, and answers here do not.
    options = {"enable_thinking": False} if name == "qwen3" else {}
    for folder, model in models.items():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for question, expected in FACTS.items():
            assert answer(model, tokenizer, question, **options) == (expected, True)
        assert answer(model, tokenizer, *chat, **options)[0] == said_here

    question, expected = next(iter(FACTS.items()))
    capsys.readouterr()
    assert cli.main(["ask", question, "--run", "taught", "--output-dir", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out.strip() == expected
    for question, expected in FACTS.items():
        pieces = asker.ask(question, models=["tuned"], sampling=Sampling(max_new_tokens=24))
        assert "".join(piece.text for piece in pieces) == expected
