"""Tiny random models of many families, with weights large enough for attention to matter, and small windows."""

from __future__ import annotations

import dataclasses
import functools
import random
import warnings

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import AutoModelForSeq2SeqLM as AutoSeq2Seq

from qlora_utils import cli, lora, quantization, training
from qlora_utils.config import ModelError, RunConfig
from qlora_utils.kernels import attention, loss, self_test
from qlora_utils.locate import locate
from qlora_utils.models.shapes import refuse_unseen_weights
from qlora_utils.tokens.packing import Collator, PairCollator

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
         "initializer_range": 0.1, "max_position_embeddings": 128}  # fmt: skip
WINDOW = {"sliding_window": 8}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
T5_SIZES = {"vocab_size": 96, "d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 2, "num_decoder_layers": 2,
            "num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0, "is_encoder_decoder": True}  # fmt: skip
BART_SIZES = {"vocab_size": 96, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 96,
              "decoder_ffn_dim": 96, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 1,
              "max_position_embeddings": 128, "decoder_start_token_id": 2}  # fmt: skip

RIGHT = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "mistral": WINDOW, "gemma": {}, "gemma3_text": MIXED, "phi3": WINDOW,
    "olmo2": {}, "olmo3": WINDOW, "smollm3": {}, "glm4": {}, "stablelm": {}, "starcoder2": WINDOW, "gpt_neox": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64}, "t5": {}, "mt5": {}, "umt5": {},
    "granite": {"logits_scaling": 8.0}, "cohere": {}, "cohere2": MIXED,
}  # fmt: skip
MORE_THAN_A_PRODUCT = ("t5", "umt5", "granite", "cohere", "cohere2")  # the first two are tied, and scale
REFUSED = {
    "bloom": ("a token sees later ones .*by 0\\.", "-p attention_kernel=eager -p packing=false"),
    "mpt": ("cannot compute a pass of two conversations", "-p attention_kernel=eager -p packing=false"),
    "codegen": ("a token sees later ones", "-p attention_kernel=eager"),
    "gemma2": ("softcap: this model's attention asks for it", "-p attention_kernel=eager"),
    "gpt_oss": ("s_aux: this model's attention asks for it", "-p attention_kernel=eager -p packing=false"),
    "lfm2": ("conversations in one pass see each other .*by 0\\.", "-p packing=false"),
    "mamba": ("conversations in one pass see each other", "-p packing=false"),
    "recurrent_gemma": ("conversations in one pass see each other", "-p packing=false"),
}  # fmt: skip
MORE = {
    "lfm2": {"layer_types": ["conv", "full_attention"]}, "gpt_oss": {**MIXED, **EXPERTS}, "gemma2": WINDOW,
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 8}, "mamba": {"state_size": 8},
    "mixtral": EXPERTS, "qwen3_moe": EXPERTS, "olmoe": EXPERTS,
}  # fmt: skip
OF_THEIR_OWN = {
    "bloom": {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.1},
    "mpt": {"vocab_size": 96, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "codegen": {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "initializer_range": 0.1},
    "gptj": {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "gpt2": {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4},
}  # fmt: skip


def config_of(family, **changes):
    if family in ("t5", "mt5", "umt5"):
        return AutoConfig.for_model(family, **{**T5_SIZES, **changes})
    if family == "bart":
        return AutoConfig.for_model(family, **{**BART_SIZES, **changes})
    sizes = OF_THEIR_OWN.get(family, {**SIZES, **RIGHT.get(family, {}), **MORE.get(family, {})})
    if family == "gpt_neox":
        del sizes["head_dim"]
    return AutoConfig.for_model(family, **{**sizes, **changes})


def build(family, kernel=attention.SPLIT, **changes):
    attention.register()
    torch.manual_seed(0)
    config = config_of(family, **changes)
    if config.is_encoder_decoder:
        return AutoSeq2Seq.from_config(config).eval()
    return AutoModelForCausalLM.from_config(config, attn_implementation=kernel).eval()


def collator_of(model, packing=True):
    return PairCollator(0) if model.config.is_encoder_decoder else Collator(0, packing)


@pytest.fixture(autouse=True)
def the_kernels_as_they_are():
    yield
    attention.register()


@pytest.mark.parametrize("family", RIGHT)
def test_a_family_that_is_right_passes_within_rounding(family):
    model = build(family)
    found = self_test.check(model, collator_of(model))
    assert found.tolerance == 1e-4
    assert max(found.alone, found.together, found.loss) < 1e-5
    assert found.across == found.ahead == 0
    assert found.head_is_a_product == (family not in MORE_THAN_A_PRODUCT)


@pytest.mark.parametrize(("kernel", "packing"), [
    (attention.DENSE, True), (attention.EAGER, True), (attention.VARLEN, True), (attention.SPLIT, False),
])  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_every_kernel_passes_packed_and_padded(family, kernel, packing):
    model = build(family, kernel)
    assert max(self_test.check(model, collator_of(model, packing)).alone, 1e-5) == 1e-5


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_is_not_what_it_is_taken_for_is_refused_with_what_was_measured_and_a_remedy(family):
    found, remedy = REFUSED[family]
    with pytest.raises(ModelError, match=rf"model: \w+: .*{found}.*\. With {remedy} it is right\.$"):
        self_test.check(build(family), Collator(0, packing=True))


@pytest.mark.parametrize("family", ["granite", "cohere", "cohere2", "umt5", "t5", "llama", "gpt_neox"])
def test_the_held_out_loss_is_that_of_the_models_own_logits(family, monkeypatch):
    """Granite's was 7.890 for 7.557 once: that of other logits than its own."""
    monkeypatch.setattr(loss, "CHUNK_BYTES", {"cpu": 4 * 96 * 5})
    monkeypatch.setattr(loss, "LEAST_OWN_ROWS", 1)
    model = build(family)
    examples = self_test._random_examples(model)
    measured, count = loss.response_loss(model, examples, collator_of(model), batch_size=2)
    own = []
    for example in examples:
        logits = self_test._plain_logits(model, example).detach()
        targets = torch.tensor(example.labels[-len(logits) :])
        own.append(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    assert measured == pytest.approx(sum(map(float, own)) / count, rel=1e-5)


# ---------------------------------------------------------------------------------------------- mutations


def one_conversation(*tensors, lengths, **options):
    """A kernel that takes a pack for one conversation."""
    return attention.split(*tensors, **{**options, "lengths": [sum(lengths)]})


def see_all(*tensors, lengths, **options):
    """A kernel without its causal mask."""
    attended = torch.nn.functional.scaled_dot_product_attention(*tensors, scale=options["scale"])
    return attended.transpose(1, 2)


def no_mask(**options):
    return None


def first_token_unseen(query, key, value, **options):
    """A kernel that is right but for the first token of a pack."""
    return attention.split(query, key, torch.cat([0 * value[:, :, :1], value[:, :, 1:]], dim=2), **options)


def wrong_scale(*tensors, scale, **options):
    return attention.split(*tensors, scale=1.01 * scale, **options)


@pytest.mark.parametrize(("family", "kernel", "mask", "found"), [
    ("llama", one_conversation, None, "conversations in one pass see each other"),
    ("llama", see_all, None, "a token sees later ones"),
    ("llama", first_token_unseen, None, "the attention kernel computes something else"),
    ("llama", wrong_scale, None, "the attention kernel computes something else"),
    ("mistral", attention.split, no_mask, "the attention kernel computes something else"),
    ("gemma3_text", attention.split, no_mask, "the attention kernel computes something else"),
    ("phi3", attention.split, no_mask, "the attention kernel computes something else"),
])  # fmt: skip
def test_a_faulty_kernel_is_found_at_one_part_in_ten_thousand(family, kernel, mask, found):
    """A dropped mask, an ignored window; also where a window is longer than any conversation here."""
    for window in (8, 4096):
        model = build(family, **({} if family == "llama" else {"sliding_window": window}))
        AttentionInterface.register(attention.SPLIT, functools.partial(attention._attend, kernel))
        if mask is not None:
            AttentionMaskInterface.register(attention.SPLIT, mask)
        with pytest.raises(ModelError, match=found):
            self_test.check(model, Collator(0, packing=True))
        attention.register()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("family", "kernel", "mask"),
    [("llama", one_conversation, None), ("llama", see_all, None), ("mistral", attention.split, no_mask),
     ("gemma3_text", attention.split, no_mask)],
)  # fmt: skip
def test_in_16_bits_what_is_right_passes_and_a_faulty_kernel_does_not(family, kernel, mask, dtype):
    model = build(family).to(dtype)
    found = self_test.check(model, Collator(0, packing=True))
    assert found.across == found.ahead == 0
    assert 1e-4 < found.alone < found.tolerance < 0.5
    AttentionInterface.register(attention.SPLIT, functools.partial(attention._attend, kernel))
    if mask is not None:
        AttentionMaskInterface.register(attention.SPLIT, mask)
    with pytest.raises(ModelError):
        self_test.check(model, Collator(0, packing=True))


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2"])
def test_a_sink_or_a_cap_that_is_swallowed_shows_in_the_logits_too(family, monkeypatch):
    monkeypatch.setattr(attention, "_NOT_COMPUTED", ())
    options = {"attn_logit_softcapping": 2.0} if family == "gemma2" else {}
    model = build(family, **options)
    AttentionMaskInterface.register(attention.SPLIT, no_mask)  # what sdpa would refuse by itself
    assert self_test.measure(model, Collator(0, packing=True)).alone > 1e-2


def test_a_pack_whose_positions_go_on_is_found():
    class Careless(Collator):
        def __call__(self, examples):
            batch = super().__call__(examples)
            return {**batch, "position_ids": torch.arange(batch["input_ids"].numel()).unsqueeze(0) ** 2 % 97}

    with pytest.raises(ModelError, match="logits differ"):
        self_test.check(build("llama"), Careless(0, packing=True))


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_whose_padding_is_seen_is_found(family):
    class Careless(PairCollator):
        def __call__(self, examples):
            batch = super().__call__(examples)
            return {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}

    model = build(family)
    assert self_test.check(model, PairCollator(0))
    with pytest.raises(ModelError, match=r"two conversations in one pass are not each alone .*Take another model"):
        self_test.check(model, Careless(0))


def test_a_head_that_is_mistaken_for_a_product_is_found():
    model = build("granite", logits_scaling=8.0)
    model.head_is_a_product = True
    with pytest.raises(ModelError, match="its loss does not follow from its last hidden states"):
        self_test.check(model, Collator(0, packing=True))


def test_logits_that_are_no_numbers_are_refused():
    model = build("llama")
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ModelError, match=r"infinite or NaN\. Its weights are damaged"):
        self_test.check(model, Collator(0, packing=True))


def test_an_overflow_in_fp16_is_called_one_and_another_precision_advised():
    """The model's own attention overflows: no kernel is at fault."""
    model = build("llama").to(torch.float16)
    model.model.norm.weight.data.fill_(6e4)
    with pytest.raises(ModelError, match=r"infinite or NaN\. In float16 it overflows: take -p compute_dtype=float32"):
        self_test.check(model, Collator(0, packing=True))
    model.model.norm.weight.data.fill_(1)
    assert self_test.check(model, Collator(0, packing=True))


@pytest.mark.parametrize("family", [*RIGHT, "bart"])
def test_embeddings_are_rounded_wherever_a_family_reads_them(family):
    """T5 and BART read them by modules of their encoder and decoder, and the tolerance was too small for them."""
    model = build(family)
    example = self_test._random_examples(model)[0]
    with torch.no_grad(), self_test._rounded_embeddings(model):
        rounded = self_test._plain_logits(model, example)
    with torch.no_grad():
        assert not torch.equal(rounded, self_test._plain_logits(model, example))


def test_a_deep_gated_t5_passes_in_bf16():
    model = build("t5", num_layers=12, num_decoder_layers=12, feed_forward_proj="gated-gelu").to(torch.bfloat16)
    found = self_test.check(model, PairCollator(0))
    assert found.rounding > 0.01
    assert found.tolerance == 2 * found.rounding


def test_what_rounding_moves_too_far_is_not_judged_but_sent_to_fp32(monkeypatch):
    """Else any fault of a kernel would pass as rounding."""
    model = build("llama").to(torch.bfloat16)
    right = self_test.measure(model, Collator(0, packing=True))
    assert dataclasses.replace(right, rounding=0.3, tolerance=0.5).fault().startswith("it is too sensitive to rounding")
    monkeypatch.setattr(self_test, "LARGEST_TOLERANCE", right.rounding)
    with pytest.raises(ModelError, match=r"too sensitive to rounding to be judged .*Take -p compute_dtype=float32\.$"):
        self_test.check(model, Collator(0, packing=True))
    assert self_test.measure(model, Collator(0, packing=True)).tolerance == right.rounding


# ---------------------------------------------------------------------------------------------- no trace


@pytest.mark.parametrize("kernel", [attention.split, one_conversation])
def test_nothing_is_left_behind_whether_it_passes_or_refuses(kernel):
    import numpy as np

    model = build("gemma3_text", sliding_window=4096, attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    described = model.config.to_dict()
    windows = [getattr(module, "sliding_window", None) for module in model.modules()]
    AttentionInterface.register(attention.SPLIT, functools.partial(attention._attend, kernel))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    weights = [parameter.clone() for parameter in model.parameters()]
    try:
        self_test.check(model, Collator(0, packing=True))
        assert kernel is attention.split
    except ModelError:
        assert kernel is one_conversation
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert [module.training for module in model.modules()] == modes
    assert model.config.to_dict() == described
    assert model.config._attn_implementation == attention.SPLIT
    assert [getattr(module, "sliding_window", None) for module in model.modules()] == windows
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(one, other) for one, other in zip(weights, model.parameters(), strict=True))
    assert "forward" not in model.model.__dict__


# ---------------------------------------------------------------------------------------------- before a training


def save(family, folder, **changes):
    """A folder with a tiny model of a family, as it would be downloaded."""
    preset = "pocket-t5" if config_of(family).is_encoder_decoder else "pocket"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build(family, "eager", vocab_size=2304, **changes).save_pretrained(folder)
    AutoTokenizer.from_pretrained(locate(f"embedded:{preset}/model")).save_pretrained(folder)
    return RunConfig.from_preset(preset, model=str(folder), compute_dtype="float32", output_dir=str(folder))


@pytest.mark.parametrize(("family", "found"), [
    ("mixtral", r"8\d% .*model\.layers\.0\.mlp\.experts\.\w+, of shape .* belongs to a MixtralExperts"),
    ("qwen3_moe", r"experts\.\w+, of shape .* belongs to a Qwen3MoeExperts"),
    ("olmoe", r"experts\.\w+, of shape .* belongs to a OlmoeExperts"),
    ("gpt_oss", r"experts\.\w+, of shape .* belongs to a GptOssExperts"),
    ("gpt2", r"100% .*of shape \(64, 256\), belongs to a Conv1D"),
])  # fmt: skip
def test_weights_that_nothing_here_reaches_are_refused_before_they_are_loaded(tmp_path, family, found):
    config_of(family).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"{found}.*neither quantized nor trained nor merged. Take a model of linear"):
        refuse_unseen_weights(str(tmp_path))


def test_a_mixture_is_refused_by_load_and_a_short_convolution_is_not(tmp_path):
    with pytest.raises(ModelError, match="MixtralExperts"):
        quantization.load(save("mixtral", tmp_path / "mixtral"))
    config_of("lfm2").save_pretrained(tmp_path / "lfm2")
    refuse_unseen_weights(str(tmp_path / "lfm2"))


def test_the_plan_of_mixtral_8x7b_is_refused_by_name(tmp_path, capsys):
    AutoConfig.for_model("mixtral").save_pretrained(tmp_path)
    status = cli.main(["plan", "--preset", "llama2-7b", "-p", f"model={tmp_path}", "--gpu", "T4"])
    out, err = capsys.readouterr()
    assert status == 1
    assert "MixtralExperts" in err or "Mixtral" in err
    assert "GiB" not in out


def test_a_model_with_attention_of_its_own_is_told_which_kernel_to_take(tmp_path):
    config = save("gptj", tmp_path)
    with pytest.raises(ModelError, match=r"computes attention by itself.*-p attention_kernel=eager"):
        quantization.load(config)
    changed = RunConfig.build({**config.model_dump(), "attention_kernel": "eager", "packing": False})
    model = lora.attach(quantization.load(changed), changed)
    assert self_test.check(model, Collator(0, packing=False)).together < 1e-4


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*:UserWarning")
def test_what_could_not_be_merged_is_refused_before_it_is_trained(tmp_path):
    config = save("bart", tmp_path)
    model = quantization.load(config)
    with pytest.raises(ModelError, match=r"lack model\.decoder\.embed_tokens\.weight.*-p train_head=false"):
        lora.attach(model, config)
    lora.attach(model, config.model_copy(update={"train_head": False}))


def test_a_head_that_nothing_would_train_is_refused(tmp_path):
    """peft takes names, and leaves a head of another name frozen without a word."""
    config = save("biogpt", tmp_path, hidden_size=64)
    model = quantization.load(config)
    with pytest.raises(ModelError, match=r"its head is named output_projection.*-p train_head=false"):
        lora.attach(model, config)


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*:UserWarning")
def test_a_training_is_refused_before_anything_is_replaced(config, prepared, tokenizer, run, base_model):
    tuned_model = lora.attach(base_model, config)
    assert training.check_model(config, tuned_model, tokenizer).alone < 1e-4
    run.history.write_text("an earlier training's\n")
    AttentionInterface.register(attention.SPLIT, functools.partial(attention._attend, one_conversation))
    with pytest.raises(ModelError, match="see each other"):
        training.train(config.model_copy(update={"fresh": True}), tuned_model, tokenizer, prepared, run)
    assert run.history.read_text() == "an earlier training's\n"


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3_text", "t5"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_rounding_passes_and_faults_do_not(family, dtype):
    if family == "t5" and dtype is torch.float16:
        pytest.skip("T5 leaves the range of fp16")
    model = build(family, attention.VARLEN).to("cuda", dtype)
    found = self_test.check(model, collator_of(model))
    assert found.across == found.ahead == 0
    if family == "t5":
        return
    kernels = {"llama": one_conversation, "qwen3": see_all}
    kernel = kernels.get(family, attention.varlen)
    AttentionInterface.register(attention.VARLEN, functools.partial(attention._attend, kernel))
    if family not in kernels:
        AttentionMaskInterface.register(attention.VARLEN, no_mask)
    with pytest.raises(ModelError):
        self_test.check(model, Collator(0, packing=True))
