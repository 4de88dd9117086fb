"""The chat models of the presets with two layers, random weights and their real tokenizers: from loading to merging.

What a model is, in everything but the number of layers and, where a test is not marked slow, the width: the size of
the vocabulary, heads shared by queries, norms of queries and keys, scaled rotation, a tied or a separate head.
"""

from __future__ import annotations

import json
import math
import shutil
import tarfile

import pytest
import torch
from conftest import SHARED
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from qlora_utils import lora, quantization, training
from qlora_utils.commands import merging
from qlora_utils.config import RunConfig
from qlora_utils.data import Prepared, load_tokenizer
from qlora_utils.evaluation.generation import Question, Sampling, answer_all
from qlora_utils.kernels import attention, self_test
from qlora_utils.kernels.loss import head_is_a_product
from qlora_utils.models import shapes
from qlora_utils.models.memory import predict
from qlora_utils.models.resolution import resolve_auto
from qlora_utils.rows.conversations import Conversation, Turn
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_json, read_jsonl
from qlora_utils.tokens.formats import IGNORED, format_of
from qlora_utils.tokens.packing import Collator

ARCHIVE = SHARED / "tokenizers" / "tokenizers.tar.xz"
# The tokenizer (of Llama 3 for Llama 3.1: the same but for the names of some reserved tokens), and the tokens that end
# an answer in the published generation_config.json.
MODELS = {"qwen3-1.7b": ("qwen3", [151645, 151643]), "llama3.1-8b": ("llama3", [128001, 128008, 128009])}
NARROW = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
          "head_dim": 64}  # fmt: skip
BOTH_MODELS = pytest.mark.parametrize("preset", MODELS)


def published(preset):
    """The config.json of a preset's model."""
    return shapes.known(RunConfig.from_preset(preset).model)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """Return a function that unpacks a real tokenizer by its name; skip where it is not at hand."""
    folder = tmp_path_factory.mktemp("chat tokenizers")

    def unpack(name):
        if not ARCHIVE.is_file():
            pytest.skip(f"{ARCHIVE.name}: not in {ARCHIVE.parent}")
        if not (folder / name).is_dir():
            with tarfile.open(ARCHIVE) as archive:
                archive.extractall(folder, [m for m in archive if m.name.split("/")[0] == name], filter="data")
        return folder / name

    return unpack


@pytest.fixture(scope="session")
def build(tmp_path_factory, tokenizer_folder):
    """Return a function that writes a model of two layers with its tokenizer, and returns the folder; each once."""
    built = {}

    def make(preset, *, weights=True, **sizes):
        key = preset, weights, tuple(sizes.items())
        if key in built:
            return built[key]
        tokenizer, ends = MODELS[preset]
        folder = tmp_path_factory.mktemp("model")
        shutil.copytree(tokenizer_folder(tokenizer), folder, dirs_exist_ok=True)
        (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "eos_token_id": ends}))
        torch.manual_seed(0)
        model_config = AutoConfig.for_model(**{**published(preset), **sizes, "num_hidden_layers": 2}, dtype="bfloat16")
        model_config.save_pretrained(folder)
        if weights:
            model = AutoModelForCausalLM.from_config(model_config, dtype=torch.bfloat16)
            model.generation_config.eos_token_id = ends
            model.save_pretrained(folder)
        built[key] = folder
        return folder

    return make


def short_run(preset, model, folder, **changes):
    """The preset's recipe, for a few steps of short conversations."""
    few = {
        "model": str(model), "output_dir": str(folder), "run_name": "r", "steps": 4, "batch_size": 2, "save_steps": 2,
        "eval_steps": 4, "logging_steps": 1, "score_rows": 3, "max_new_tokens": 4, "compute_dtype": "float32",
    }  # fmt: skip
    return RunConfig.from_preset(preset, **{**few, **changes})


def conversations():
    rows = []
    for number in range(8):
        turns = [Turn(f"What is {number} plus {number}?", f"It is {2 * number}.", "Be brief." * (number % 2))]
        if number % 2:
            turns.append(Turn("And that in words?", "A number, naïvely.\n"))
        rows.append(Conversation(tuple(turns)))
    return Prepared(rows[:5], rows[5:], [], {})


@pytest.mark.parametrize("preset", ["qwen3-1.7b", pytest.param("llama3.1-8b", marks=pytest.mark.slow)])
def test_answers_end_in_the_token_that_the_template_ends_them_with(preset, build, tmp_path):
    """And no model of these begins or pads with a token that is learned."""
    config = short_run(preset, build(preset, weights=False, **NARROW), tmp_path)
    tokenizer = load_tokenizer(config)
    form = format_of(tokenizer, config)
    end = tokenizer.convert_tokens_to_ids({"qwen3-1.7b": "<|im_end|>", "llama3.1-8b": "<|eot_id|>"}[preset])
    assert tokenizer.eos_token_id == end
    assert {end, *MODELS[preset][1]} >= {*form.ends} >= {end}
    for example in form.examples(conversations().train, training=True):
        learned = [label for label in example.labels if label != IGNORED]
        assert learned[-1] == end
        assert example.labels[0] == IGNORED
    if preset.startswith("qwen"):
        assert tokenizer.bos_token_id is None  # as all of Qwen, where Llama-2's format could not be written
        assert form.examples(conversations().train, training=True)[0].input_ids[0] != tokenizer.pad_token_id
    else:
        ids = form.examples(conversations().train, training=True)[0].input_ids
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


@BOTH_MODELS
def test_packs_are_computed_as_each_conversation_alone(preset):
    """In what is peculiar to them: norms of queries and keys, and rotation that is scaled beyond a length."""
    attention.register()
    torch.manual_seed(0)
    few = {"vocab_size": 96, "num_hidden_layers": 2, "initializer_range": 0.1, "pad_token_id": 0, "bos_token_id": 1,
           "eos_token_id": 2}  # fmt: skip
    model_config = AutoConfig.for_model(**{**published(preset), **NARROW, **few})
    if preset.startswith("llama"):
        # Short of the true 8,192, where the scaling begins: else these conversations would see nothing of it.
        model_config.rope_parameters["original_max_position_embeddings"] = 8
        assert model_config.rope_parameters["rope_type"] == "llama3"
    else:
        assert model_config.rope_parameters["rope_theta"] == 1e6
    model = AutoModelForCausalLM.from_config(model_config, attn_implementation=attention.SPLIT).eval()
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    assert {"q_norm", "k_norm"} <= names if preset.startswith("qwen") else "q_norm" not in names
    tried = self_test.check(model, Collator(0, packing=True))
    assert tried.fault() is None
    assert tried.across == tried.ahead == 0
    assert tried.together < 1e-4
    assert tried.head_is_a_product


def check_memory(config, base_model):
    """Weights are counted as they lie in memory, and the plan's parts are their bytes."""
    shape = shapes.read(config.model)
    quantized = [p for p in base_model.parameters() if quantization.is_quantized(p)]
    assert shape.quantized_layers == len(quantized) == 2 * 7
    assert shape.linear_parameters == sum(quantization.unquantized_shape(p).numel() for p in quantized)
    parts = predict(shape, resolve_auto(config).config).parts
    loaded = sum(quantization.stored_bytes(p) for p in base_model.parameters())
    assert parts["weights"] + parts["quantization constants"] + parts["head"] == pytest.approx(loaded, rel=0.01)
    assert shape.head_is_tied == (base_model.get_output_embeddings().weight is base_model.get_input_embeddings().weight)
    return shape


class CrashAt3(TrainerCallback):
    """Breaks a training off after its second step, as a lost machine would."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2:
            raise OSError("machine lost")


def train_in_two_parts(config, tokenizer, prepared, patch):
    """Train, lose the machine after step 2, and resume; return the model in the end."""
    make_trainer = training.make_trainer

    def with_a_crash(*arguments):
        trainer = make_trainer(*arguments)
        trainer.add_callback(CrashAt3())
        return trainer

    run = RunDirectory(config.run_dir)
    with patch.context() as broken, pytest.raises(OSError, match="machine lost"):
        broken.setattr(training, "make_trainer", with_a_crash)
        training.train(config, lora.attach(quantization.load(config), config), tokenizer, prepared, run)
    tuned_model = lora.attach(quantization.load(config), config)
    training.train(config, tuned_model, tokenizer, prepared, run)
    return tuned_model


def live(preset, model, folder, patch, **changes):
    """Load, attach, try, train, resume, ask and merge; return what was merged with its run."""
    config = short_run(preset, model, folder, **changes)
    tokenizer, prepared = load_tokenizer(config), conversations()
    run = RunDirectory(config.run_dir)
    run.begin(config)
    prepared.save(run)

    # Loaded and counted as planned, the head frozen.
    base_model = quantization.load(config)
    shape = check_memory(config, base_model)
    tuned_model = lora.attach(base_model, config)
    trained = {name: p.numel() for name, p in tuned_model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert sum(trained.values()) == shape.lora_parameters(config)

    # What is computed is what the model itself computes: packs, kernels and the loss of a frozen head.
    tried = training.check_model(config, tuned_model, tokenizer)
    assert tried.fault() is None and tried.head_is_a_product
    assert head_is_a_product(tuned_model.get_base_model())
    assert tried.across == tried.ahead == 0
    del base_model, tuned_model

    # It trains: an untrained model guesses any token, and one that was resumed has every step once.
    tuned_model = train_in_two_parts(config, tokenizer, prepared, patch)
    history = [line for line in read_jsonl(run.history) if "loss" in line]
    assert [line["step"] for line in history] == [1, 2, 3, 4]
    assert history[0]["loss"] == pytest.approx(math.log(shape.vocabulary), rel=0.1)

    # Base and tuned model answer, and the base is another.
    question = Question("What is 2 plus 2?", "It is 4.")
    (answer,) = answer_all(
        tuned_model, tokenizer, [question], config, sampling=Sampling(max_new_tokens=4), batch_size=1
    )
    assert isinstance(answer.text, str)
    with lora.base_alone(tuned_model):
        base_loss = training.held_out_loss(config, tuned_model, tokenizer, prepared)
    assert training.held_out_loss(config, tuned_model, tokenizer, prepared) < base_loss
    record = merging.merge(config, questions=2)
    return config, tokenizer, run, shape, tuned_model, record


@pytest.mark.slow
@BOTH_MODELS
def test_a_chat_model_lives_from_loading_to_merging(preset, build, tmp_path, monkeypatch):
    model = build(preset, **NARROW)
    faster = {"learning_rate": 0.01, "warmup_ratio": 0.0}  # so that four steps do something
    config, tokenizer, run, shape, tuned_model, record = live(preset, model, tmp_path, monkeypatch, **faster)
    expected = published(preset)
    tied = expected["tie_word_embeddings"]

    # Merged, it is a plain model of the same make: every weight once, and in both dialects of config.json.
    everything = shape.linear_parameters + shape.embedding_parameters + shape.small_parameters
    assert record["parameters"] == everything + (0 if tied else shape.head_parameters)
    assert record["agreement"]["loss_merged"] == pytest.approx(record["agreement"]["loss_unmerged"], rel=0.01)
    described = read_json(run.merged / "config.json")
    assert described["tie_word_embeddings"] == tied
    assert described["rope_theta"] == expected["rope_theta"]
    scaling = expected.get("rope_scaling") or {}
    assert {name: (described["rope_scaling"] or {}).get(name) for name in scaling} == scaling
    assert described["rope_parameters"]["rope_theta"] == expected["rope_theta"]
    assert {name: described["rope_parameters"][name] for name in scaling} == scaling

    # Every token that ends an answer of the base model ends one of the merged model.
    ends = read_json(run.merged / "generation_config.json")["eos_token_id"]
    assert ends[0] == tokenizer.eos_token_id and {*ends} == {*MODELS[preset][1]}

    # It computes what the unmerged model does, but for the rounding of its weights to bf16.
    merged = merging.load(run.merged).float()
    ids = torch.tensor([format_of(tokenizer, config).prompt((), "What is 3 plus 3?", "")])
    with torch.no_grad():
        unmerged, found = tuned_model(input_ids=ids).logits, merged(input_ids=ids).logits
    assert (unmerged - found).abs().max() < 0.05 * unmerged.abs().max()
    again = AutoTokenizer.from_pretrained(run.merged)
    messages = [{"role": "user", "content": "What is 3 plus 3?"}]
    options = {"tokenize": True, "add_generation_prompt": True, "return_dict": False, "enable_thinking": False}
    assert again.apply_chat_template(messages, **options) == ids[0].tolist()


# The larger one takes 8 GB and minutes on a CPU, where it was tried once.
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["qwen3-1.7b", pytest.param("llama3.1-8b", marks=pytest.mark.gpu)])
def test_a_chat_model_of_true_width_lives_from_loading_to_merging(preset, build, tmp_path, monkeypatch):
    config, _, run, shape, _, record = live(
        preset, build(preset), tmp_path, monkeypatch, learning_rate=1e-3, warmup_ratio=0.0, compute_dtype="bfloat16"
    )
    assert (config.lora_r, shape.hidden) == (16, published(preset)["hidden_size"])
    assert record["agreement"]["loss_merged"] == pytest.approx(record["agreement"]["loss_unmerged"], rel=0.02)
    assert not read_json(run.adapter / "adapter_config.json")["modules_to_save"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*:UserWarning")
def test_a_tied_head_that_trains_all_the_same_parts_from_the_embeddings(build, tmp_path):
    config = short_run("qwen3-1.7b", build("qwen3-1.7b", **NARROW), tmp_path, train_head=True, steps=1)
    tokenizer, prepared, run = load_tokenizer(config), conversations(), RunDirectory(config.run_dir)
    run.begin(config)
    prepared.save(run)
    base_model = quantization.load(config)
    assert "the matrix of embeddings" in base_model.resolved.reasons["train_head"]
    training.train(config, lora.attach(base_model, config), tokenizer, prepared, run)
    record = merging.merge(config, questions=0)
    shape = shapes.read(config.model)
    both = shape.embedding_parameters + shape.head_parameters
    assert record["parameters"] == shape.linear_parameters + shape.small_parameters + both
    assert not read_json(run.merged / "config.json")["tie_word_embeddings"]
