from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import BOTH, change_adapter, on_its_device, tensors
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from qlora_utils import cli, lora, quantization, training
from qlora_utils.commands import merging
from qlora_utils.commands.merging import Checkpoint, ModelAnswers, as_loaded, merged_weights
from qlora_utils.config import ConfigError, ModelError, RunConfig
from qlora_utils.evaluation.generation import Answer, Question
from qlora_utils.kernels.loss import decoder_inputs
from qlora_utils.locate import locate
from qlora_utils.models.shapes import architecture_of
from qlora_utils.rows.conversations import Turn, render
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_json
from qlora_utils.tokens.formats import encode, encode_prompt, format_of

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def tuned(config, tokenizer, prepared):
    """A function from changes of the config to a run with an adapter that says something, and its unmerged model."""

    def make(**changes):
        changed = RunConfig.build({**config.model_dump(), "score_rows": 8, **changes})
        run = RunDirectory(changed.run_dir)
        run.record(changed)
        prepared.save(run)
        model = lora.attach(quantization.load(changed), changed)
        change_adapter(model)
        training.save_adapter(model, tokenizer, run.adapter)
        return changed, model.eval()

    return make


@pytest.fixture
def batch(prepared, tokenizer, config, base_model):
    if architecture_of(config.model) == "causal":
        return {"input_ids": torch.tensor([encode(prepared.train[:1], tokenizer)[0].input_ids])}
    pairs = tensors(prepared.train[:2], tokenizer, config)
    decoder = decoder_inputs(base_model, pairs["labels"])
    return {"input_ids": pairs["input_ids"], "attention_mask": pairs["attention_mask"], "decoder_input_ids": decoder}


@torch.no_grad()
def logits(model, batch):
    return model(**on_its_device(model, batch)).logits.float().cpu()


def weights_in(folder):
    files = [load_file(path) for path in Path(folder).glob("*.safetensors")]
    return {name: weight for file in files for name, weight in file.items()}


VARIANTS = [
    {}, {"rslora": True}, {"dora": True}, {"train_head": False},
    {"lora_r": 4, "lora_alpha": 24}, {"quantize": False}, {"fused_layers": False},
]  # fmt: skip


@BOTH
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_merged_and_unmerged_give_the_same_logits(tuned, batch, variant):  # trap 10
    config, model = tuned(**variant)
    expected = logits(model, batch)
    with lora.base_alone(model):
        assert not torch.allclose(logits(model, batch), expected, atol=0.1)  # else merging nothing would do
    folder = RunDirectory(config.run_dir).merged
    merging.merge(config, dtype="float32", questions=0)
    plain = merging.load(folder)
    assert plain.dtype is torch.float32
    torch.testing.assert_close(logits(plain, batch), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", [{}, {"rslora": True}, {"dora": True}, {"train_head": False}], ids=str)
def test_into_weights_that_are_not_quantized_it_is_what_peft_merges(tuned, variant):
    _, model = tuned(quantize=False, fused_layers=False, **variant)
    made = {name: weight.make() for name, weight in merged_weights(model, torch.float32, as_loaded).items()}
    expected = model.merge_and_unload().state_dict()
    assert made.keys() == expected.keys()
    for name, weight in made.items():
        torch.testing.assert_close(weight, expected[name].cpu(), msg=name)


def test_a_run_without_its_rows_is_merged_if_no_question_is_asked(tuned):
    """Config and adapter are enough, as somebody keeps or sends them."""
    config, _ = tuned()
    run = RunDirectory(config.run_dir)
    shutil.rmtree(run.data)
    assert merging.merge(config, questions=0)["servers"] == []
    assert read_json(run.merged / merging.RECORD)["agreement"] is None


def test_weights_are_summed_in_fp32_and_rounded_once(tuned):
    config, model = tuned()
    merging.merge(config, questions=0)
    saved = weights_in(RunDirectory(config.run_dir).merged)
    layer = model.get_base_model().get_submodule(Q_PROJ.removesuffix(".weight"))
    exact = quantization.dequantize(layer.get_base_layer().weight).float() + layer.get_delta_weight("default")
    assert torch.equal(saved[Q_PROJ], exact.bfloat16().cpu())
    head = model.get_base_model().lm_head.modules_to_save["default"].weight
    assert torch.equal(saved["lm_head.weight"], head.bfloat16().cpu())
    assert not torch.equal(saved["lm_head.weight"], weights_in(locate(config.model))["lm_head.weight"])


def test_nothing_is_computed_before_its_turn(tuned):
    _, model = tuned()

    def source(name, parameter):
        raise AssertionError(name)

    planned = merged_weights(model, torch.bfloat16, source)
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(locate("embedded:pocket/model")))
    assert {name: weight.shape for name, weight in planned.items()} == {
        name: parameter.shape for name, parameter in plain.named_parameters()
    }
    planned["lm_head.weight"].make()  # the trained one needs no base weight
    with pytest.raises(AssertionError, match=Q_PROJ):
        planned[Q_PROJ].make()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_folder_holds_a_plain_16_bit_model(tuned, dtype):
    config, _ = tuned()
    record = merging.merge(config, dtype=dtype, questions=0)
    folder = RunDirectory(config.run_dir).merged
    stored = json.loads((folder / "config.json").read_text())
    assert not [name for name in stored if "quant" in name]
    assert (stored["dtype"], stored["use_cache"], stored["tie_word_embeddings"]) == (dtype, True, False)
    assert stored["architectures"] == ["LlamaForCausalLM"]
    greedy = GenerationConfig.from_pretrained(folder)
    assert (greedy.do_sample, greedy.bos_token_id, greedy.eos_token_id, greedy.pad_token_id) == (False, 1, 2, 0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is LlamaForCausalLM
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    saved = weights_in(folder)
    assert all(torch.equal(saved[name], parameter) for name, parameter in model.named_parameters())
    assert record["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert {path.suffix for path in folder.iterdir()} == {".json", ".jinja", ".safetensors"}
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.iterdir())


def test_a_large_model_is_written_in_shards(tuned, tmp_path):
    config, _ = tuned()
    merging.merge(config, questions=0)
    merging.merge(config, into=tmp_path / "shards", questions=0, max_shard_size="1MB")
    files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    whole, parts = weights_in(RunDirectory(config.run_dir).merged), weights_in(tmp_path / "shards")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    loaded = merging.load(tmp_path / "shards")
    assert all(torch.equal(whole[name], parameter.cpu()) for name, parameter in loaded.named_parameters())


def test_the_original_weights_may_be_merged_into(tuned, tmp_path):
    config, model = tuned(dora=True)
    into = {base: tmp_path / base for base in merging.BASES}
    records = {base: merging.merge(config, into=into[base], base=base, questions=0) for base in merging.BASES}
    assert {base: record["base"] for base, record in records.items()} == {base: base for base in merging.BASES}
    assert merging.BASES["original"] in merging.summary(records["original"], tmp_path)
    quantized, original = (weights_in(into[base]) for base in ("quantized", "original"))
    assert not torch.equal(quantized[Q_PROJ], original[Q_PROJ])
    for shared in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(quantized[shared], original[shared])
    published = weights_in(locate(config.model))
    layer = model.get_base_model().get_submodule(Q_PROJ.removesuffix(".weight"))
    moved = published[Q_PROJ].float() + layer.get_delta_weight("default").cpu()
    unit = moved / moved.norm(dim=1, keepdim=True)
    magnitude = layer.lora_magnitude_vector["default"].weight.detach().cpu()
    torch.testing.assert_close(original[Q_PROJ].float(), magnitude[:, None] * unit, rtol=2**-8, atol=0)


def test_what_loftq_began_with_is_not_added_to_weights_that_still_have_it():
    config = RunConfig.from_preset("pocket", lora_init="loftq")
    assert merging._choose_base(config, None) == "quantized"
    with pytest.raises(ConfigError, match="would count twice"):
        merging._choose_base(config, "original")


def test_a_run_without_quantization_has_one_base(tuned):
    config, _ = tuned(quantize=False)
    assert merging.merge(config, questions=0)["base"] == "original"
    with pytest.raises(ConfigError, match="has no quantized base model"):
        merging.merge(config, base="quantized", force=True)


@pytest.mark.parametrize("quantize", [True, False])
def test_a_base_whose_files_name_its_weights_otherwise_is_merged_into(
    config, tokenizer, tmp_path, monkeypatch, quantize
):
    """The head of GPT-NeoX is `embed_out` in files; both values of --base once named the other as the remedy."""
    model = small_model(tmp_path / "base", "gpt_neox", tokenizer, num_attention_heads=4, num_hidden_layers=1)
    changed = config.model_copy(
        update={"model": str(tmp_path / "base"), "quantize": quantize, "train_head": False, "fused_layers": False}
    )
    tuned_model = lora.attach(quantization.load(changed), changed)
    published = weights_in(tmp_path / "base")
    assert "embed_out.weight" in published
    source = merging._choose_source(tuned_model, changed, "original")
    (tmp_path / "merged").mkdir()
    merging.save(tuned_model, tmp_path / "merged", changed, source, dtype="float32")
    merged = weights_in(tmp_path / "merged")
    assert merged.keys() == published.keys()
    assert all(torch.equal(merged[name], published[name]) for name in published)
    # what neither files nor classes name: loaded weights are the original ones if nothing was quantized
    head = model.get_output_embeddings().weight
    monkeypatch.setattr(merging, "stored_weights", lambda kind, config: {})
    source = merging._choose_source(tuned_model, changed, "original")
    if quantize:
        with pytest.raises(ModelError, match=r"lm_head\.weight is missing.*--base quantized"):
            source("lm_head.weight", head)
    else:
        assert torch.equal(source("lm_head.weight", head), head)


@pytest.mark.parametrize("quantize", [True, False])
def test_a_base_that_is_stored_in_4_bits_is_merged_into_as_it_was_loaded(tuned, tokenizer, batch, tmp_path, quantize):
    from transformers import BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    four = AutoModelForCausalLM.from_pretrained(
        locate("embedded:pocket/model"), quantization_config=how, device_map="cpu"
    )
    four.save_pretrained(tmp_path / "stored")
    tokenizer.save_pretrained(tmp_path / "stored")
    config, model = tuned(model=str(tmp_path / "stored"), run_name="four", quantize=quantize)
    expected = logits(model, batch)
    with pytest.raises(ConfigError, match=r"base: .*stored is stored in bitsandbytes 4-bit \(nf4\).*--base quantized"):
        merging.merge(config, base="original", questions=0)
    for base in (None, "quantized"):
        record = merging.merge(config, base=base, dtype="float32", questions=0, force=True)
        assert record["base"] == "quantized"
        plain = merging.load(RunDirectory(config.run_dir).merged)
        torch.testing.assert_close(logits(plain, batch), expected, atol=2e-4, rtol=1e-4)
    assert "quantization_config" not in read_json(RunDirectory(config.run_dir).merged / "config.json")


def test_base_weights_are_found_in_the_hub_cache_and_missing_ones_named(tmp_path, monkeypatch):
    source = locate("embedded:pocket/model")
    cached = tmp_path / "models--some--one"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40)).parent.mkdir()
    (cached / "snapshots" / ("0" * 40)).symlink_to(source)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    base_weights = Checkpoint("some/one")
    assert torch.equal(base_weights(Q_PROJ, torch.empty(192, 192)), weights_in(source)[Q_PROJ])
    with pytest.raises(ModelError, match=r"other is missing in the files of some/one.*--base quantized"):
        base_weights("other", torch.empty(1))
    with pytest.raises(ModelError, match=r"has shape \(192, 192\).*expected shape \(1,\), not quantized"):
        base_weights(Q_PROJ, torch.empty(1))
    with pytest.raises(ModelError, match="not/there cannot be found"):
        Checkpoint("not/there")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"holds no model\.safetensors"):
        Checkpoint(str(tmp_path / "empty"))


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*:UserWarning")  # parting them is what is meant here
@pytest.mark.parametrize("train_head", [True, False])
def test_a_head_tied_to_the_embeddings_parts_from_them_only_if_it_was_trained(tuned, tokenizer, batch, train_head):
    folder = RunDirectory(tuned()[0].run_dir).path.parent / "tied"
    torch.manual_seed(0)
    small = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(small).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config, model = tuned(model=str(folder), run_name="tied-run", train_head=train_head)
    expected = logits(model, batch)
    merging.merge(config, dtype="float32", questions=0)
    merged = RunDirectory(config.run_dir).merged
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is not train_head
    assert ("lm_head.weight" in weights_in(merged)) is train_head
    plain = merging.load(merged)
    assert torch.equal(plain.lm_head.weight, plain.model.embed_tokens.weight) is not train_head
    torch.testing.assert_close(logits(plain, batch), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("preset", ["pocket-t5"], indirect=True, scope="session")
def test_a_merged_t5_keeps_a_head_of_its_own_and_says_so(tuned, batch, tokenizer):
    """Transformers takes every T5 for tied; older versions, and other tools, believe what config.json says."""
    config, model = tuned()
    merging.merge(config, dtype="float32", questions=2)
    folder = RunDirectory(config.run_dir).merged
    stored = json.loads((folder / "config.json").read_text())
    assert (stored["tie_word_embeddings"], stored["scale_decoder_outputs"]) == (False, False)
    assert stored["architectures"] == ["T5ForConditionalGeneration"]
    plain = merging.load(folder)
    assert not torch.equal(plain.lm_head.weight, plain.shared.weight)
    assert torch.equal(plain.encoder.embed_tokens.weight, plain.shared.weight)
    head = model.get_base_model().lm_head.modules_to_save["default"].weight
    assert torch.equal(plain.lm_head.weight.cpu(), head.cpu())
    record = read_json(folder / "merge.json")
    assert record["agreement"]["same"] == record["agreement"]["questions"] == 2
    again = AutoTokenizer.from_pretrained(folder)
    asked = again.apply_chat_template([{"role": "user", "content": "Why?"}], return_dict=False)
    assert asked == format_of(tokenizer, config).prompt([], "Why?")
    assert GenerationConfig.from_pretrained(folder).decoder_start_token_id == 0


# ------------------------------------------------------------------------------------------- tokenizer and template


def as_messages(history, question):
    said = [pair for turn in history for pair in (("user", turn.question), ("assistant", turn.answer))]
    return [{"role": role, "content": content} for role, content in [*said, ("user", question)]]


def check_template(folder, tokenizer):
    """What a server renders of a chat is what the adapter was trained on, token for token, with one `<s>` a turn."""
    again = AutoTokenizer.from_pretrained(folder)
    history = (Turn("What is the capital of Chile?", "Santiago."), Turn("And its currency?", "The peso."))
    for turns in ((), history):
        messages = as_messages(turns, "Who discovered Europa?")
        text = again.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == render(turns) + "<s>[INST] Who discovered Europa? [/INST]"
        ids = again.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == encode_prompt(turns, "Who discovered Europa?", tokenizer)
        assert ids.count(again.bos_token_id) == len(turns) + 1
    assert (again.pad_token_id, again.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_a_model_too_large_to_be_asked_is_kept_all_the_same(tuned, monkeypatch, capsys):
    config, _ = tuned()

    def too_large(folder):
        raise torch.cuda.OutOfMemoryError("no room")

    monkeypatch.setattr(merging, "load", too_large)
    record = merging.merge(config, questions=2)
    assert record["agreement"] is None
    assert list(RunDirectory(config.run_dir).merged.glob("*.safetensors"))
    assert "not compared" in capsys.readouterr().out


def test_tokenizer_and_chat_template_come_along(tuned, tokenizer):  # trap 4
    config, _ = tuned()
    merging.merge(config, questions=0)
    check_template(RunDirectory(config.run_dir).merged, tokenizer)


@pytest.mark.parametrize("own", [None, "{{ 'System: be brief. ' + messages[0]['content'] }}"])
def test_whatever_template_the_base_model_had_it_is_that_of_the_training(tokenizer, tmp_path, own):
    before = copy.deepcopy(tokenizer)
    before.chat_template = own
    merging.save_tokenizer(before, tmp_path, RunConfig.from_preset("pocket", chat_template="llama2"))
    assert before.chat_template == own
    check_template(tmp_path, tokenizer)


@pytest.mark.real_data
def test_the_real_tokenizer_gets_the_template_that_was_trained_with(llama_tokenizer, tmp_path):
    own = llama_tokenizer.chat_template
    merging.save_tokenizer(llama_tokenizer, tmp_path, RunConfig.from_preset("pocket"))
    assert llama_tokenizer.chat_template == own
    check_template(tmp_path, llama_tokenizer)


# ------------------------------------------------------------------------------------------- refusals


def test_nothing_is_replaced_that_was_not_meant(tuned, tmp_path):
    config, _ = tuned()
    folder = RunDirectory(config.run_dir).merged
    folder.mkdir()  # an empty one is in nobody's way
    merging.merge(config, questions=0)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(ConfigError, match=r"holds a merged model already\. --force replaces it"):
        merging.merge(config, questions=0)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert merging.merge(config, questions=0, force=True, dtype="float16")["dtype"] == "float16"
    assert read_json(folder / "merge.json")["dtype"] == "float16"
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "draft.tex").write_text("years of work")
    for taken in (tmp_path / "thesis", tmp_path / "thesis" / "draft.tex", RunDirectory(config.run_dir).adapter):
        with pytest.raises(ConfigError, match="holds no merged model; nothing is replaced"):
            merging.merge(config, into=taken, questions=0, force=True)
    assert (tmp_path / "thesis" / "draft.tex").read_text() == "years of work"


@pytest.mark.parametrize("wrong", [{"base": "best"}, {"questions": -1}])
def test_wrong_arguments_are_refused_before_anything_is_loaded(config, monkeypatch, wrong):
    monkeypatch.setattr(quantization, "load", lambda config: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match="is not allowed; expected"):
        merging.merge(config, **wrong)


def test_without_an_adapter_there_is_nothing_to_merge(config, run, monkeypatch, capsys):
    monkeypatch.setattr(quantization, "load", lambda config: pytest.fail("loaded"))
    with pytest.raises(ModelError, match=r"adapter holds no trained adapter.*qlora run --run-name test .*--from 04"):
        merging.merge(config)
    assert cli.main(["merge", "--run", str(run.path)]) == 1
    assert "holds no trained adapter" in capsys.readouterr().err
    assert cli.main(["merge", "--run", "nobody", "--output-dir", config.output_dir]) == 1
    assert "no such run" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "bfloat16"), (1e6, "float16")])
def test_values_that_cannot_be_held_leave_no_model_behind(tuned, tokenizer, value, dtype):
    config, model = tuned()
    run = RunDirectory(config.run_dir)
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight[3, 3] = value
    training.save_adapter(model, tokenizer, run.adapter)
    there = set(run.path.iterdir())
    with pytest.raises(ModelError, match=r"lm_head\.weight has values that torch\.\w+ cannot hold"):
        merging.merge(config, dtype=dtype, questions=0)
    assert set(run.path.iterdir()) == there


def test_a_check_that_fails_leaves_the_earlier_model(tuned, monkeypatch):
    config, _ = tuned()
    run = RunDirectory(config.run_dir)
    merging.merge(config, questions=0)
    before = set(run.path.iterdir()), (run.merged / "merge.json").read_text()

    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merging, "load", full)
    with pytest.raises(OSError, match="No space"):
        merging.merge(config, questions=2, force=True)
    assert (set(run.path.iterdir()), (run.merged / "merge.json").read_text()) == before


def test_files_that_do_not_fit_the_model_are_no_model(tuned):
    config, _ = tuned()
    merging.merge(config, questions=0)
    folder = RunDirectory(config.run_dir).merged
    kept = {name: weight for name, weight in weights_in(folder).items() if name != Q_PROJ}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"does not load as it was written.*q_proj"):
        merging.load(folder)


def small_model(folder, kind, tokenizer, **values):
    small = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**small, **values}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_what_cannot_be_merged_is_named_before_anything_is_asked_or_written(
    config, tokenizer, tmp_path, monkeypatch, kind
):
    """Conv1D is no linear layer; files hold experts one by one, and memory holds them joined."""
    from peft import LoraConfig, get_peft_model

    values = {"num_local_experts": 2} if kind == "mixtral" else {"n_embd": 64, "n_layer": 1, "n_head": 4}
    model = small_model(tmp_path / "base", kind, tokenizer, **values)
    targets = ["c_attn"] if kind == "gpt2" else ["q_proj"]
    tuned_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=targets))
    changed = config.model_copy(update={"model": str(tmp_path / "base")})
    named = r"c_attn is no linear layer but a Conv1D" if kind == "gpt2" else r"experts\.gate_up_proj, of shape"
    with pytest.raises(ModelError, match=rf"merge: .*{named}.*Use the adapter as it is: qlora ask"):
        merging.check_mergeable(tuned_model, changed)
    # `merge` asks this first.
    run = RunDirectory(config.run_dir)
    run.record(changed)
    monkeypatch.setattr(merging, "_check_adapter", lambda run: None)
    monkeypatch.setattr(quantization, "load", lambda config: None)
    monkeypatch.setattr(lora, "reload", lambda *arguments, **options: tuned_model)
    monkeypatch.setattr(merging, "ask", lambda *arguments: pytest.fail("asked"))
    monkeypatch.setattr(merging, "save", lambda *arguments, **options: pytest.fail("written"))
    with pytest.raises(ModelError, match="Use the adapter as it is"):
        merging.merge(changed, questions=0)
    assert not run.merged.exists()


def test_further_tokens_that_end_an_answer_are_taken_over(tokenizer, tmp_path):
    base = tmp_path / "base"
    small_model(base, "llama", tokenizer)
    stored = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps({**stored, "eos_token_id": [5, 2]}))
    merging.save_tokenizer(tokenizer, tmp_path, RunConfig.from_preset("pocket", model=str(base)))
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [2, 5]


# ------------------------------------------------------------------------------------------- the check


def test_agreement_counts_identical_answers_and_shows_some_that_differ():
    questions = [Question(f"q{i}", f"a{i}", (Turn("q", "a"),) if i == 2 else ()) for i in range(4)]
    unmerged = [Answer(f"a{i}", True) for i in range(4)]
    merged = [Answer("a0", True), *(Answer(f"b{i}", True) for i in (1, 2, 3))]
    found = merging.agreement(questions, ModelAnswers(unmerged, 0.5), ModelAnswers(merged, 0.25))
    assert (found["questions"], found["same"], found["share"]) == (4, 1, 0.25)
    assert (found["loss_unmerged"], found["loss_merged"]) == (0.5, 0.25)
    assert found["differing"] == [
        {"question": "q1", "expected": "a1", "unmerged": "a1", "merged": "b1"},
        {"before": "q → a", "question": "q2", "expected": "a2", "unmerged": "a2", "merged": "b2"},
    ]
    with pytest.raises(ModelError, match="nan merged"):
        merging.agreement(questions, ModelAnswers(unmerged, 0.5), ModelAnswers(merged, float("nan")))


def test_the_loss_is_that_of_the_answers_alone(tuned, tokenizer, prepared):
    """The same number as the held-out loss of a training, one question at a time."""
    config, model = tuned()
    rows = [row for row in prepared.held_out if len(row.turns) == 1][:4]
    questions = [Question(row.turns[0].question, row.turns[0].answer) for row in rows]
    loss = merging.answer_loss(model, tokenizer, questions, config)
    total = count = 0.0
    for encoded in encode(rows, tokenizer):
        batch = {"input_ids": torch.tensor([encoded.input_ids])}
        likely = logits(model, batch)[0].log_softmax(-1)
        for place, label in enumerate(encoded.labels):
            if label >= 0:
                total, count = total - float(likely[place - 1, label]), count + 1
    assert loss == pytest.approx(total / count, rel=1e-4)
    shorter = merging.answer_loss(model, tokenizer, questions, config.model_copy(update={"max_seq_len": 1}))
    assert shorter != pytest.approx(loss, rel=1e-3)  # the first token of each answer


@pytest.mark.gpu
def test_a_run_in_16_bit_on_a_gpu_is_merged_and_checked(tuned):
    config, _ = tuned(compute_dtype="auto")
    found = merging.merge(config, questions=8)["agreement"]
    assert found["questions"] == 8
    assert found["loss_merged"] == pytest.approx(found["loss_unmerged"], rel=0.02)
