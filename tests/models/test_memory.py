from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_utils import lora, quantization, training
from qlora_utils.config import RunConfig
from qlora_utils.data import load_tokenizer
from qlora_utils.kernels import attention
from qlora_utils.kernels.loss import last_hidden_state
from qlora_utils.models import shapes
from qlora_utils.models.hardware import CARDS, GIB
from qlora_utils.models.memory import (
    EXCHANGE_BYTES,
    count_share,
    fit_text,
    plan_table,
    plot_plan,
    predict,
    trainable_text,
    usable_memory,
)
from qlora_utils.models.resolution import OPEN, plan_for, resolve_auto
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.tokens.formats import IGNORED, Encoded
from qlora_utils.tokens.packing import Collator

LARGE = RunConfig.from_preset("llama2-7b", liger=True)
LLAMA_2_7B = shapes.read(LARGE.model)
FLAN_T5_LARGE = shapes.read(RunConfig.from_preset("flan-t5-large").model)


def changed(config, **changes):
    return RunConfig.build({**config.model_dump(), **changes})


def test_the_shape_of_llama_2_7b_gives_its_known_numbers():
    assert LLAMA_2_7B.linear_parameters + 2 * LLAMA_2_7B.head_parameters + 65 * 4096 == 6_738_415_616
    assert LLAMA_2_7B.lora_parameters(LARGE) == 159_907_840
    assert LLAMA_2_7B.head_parameters == 131_072_000


@pytest.mark.parametrize("variant", [{}, {"dora": True}, {"lora_targets": "q_proj,down_proj"}], ids=str)
def test_the_shape_of_a_model_is_read_from_its_config(config, variant):
    config = changed(config, **variant)
    shape = shapes.read(config.model)
    model = quantization.load(config)
    parts = {part.part: part.parameters for part in quantization.memory_by_part(model)}
    assert shape.linear_parameters == parts["attention"] + parts["feed-forward"]
    assert shape.head_parameters == parts["head"] == parts["embeddings"]
    tuned_model = lora.attach(model, config)
    counted = sum(p.numel() for name, p in tuned_model.named_parameters() if "lora_" in name)
    assert shape.lora_parameters(config) == counted
    trained = sum(p.numel() for p in tuned_model.parameters() if p.requires_grad)
    assert f"trainable: {trained:,} parameters" in trainable_text(shape, config)


@pytest.mark.parametrize("changes", [{}, {"quant_type": "int8"}, {"quant_type": "fp4"}, {"quantize": False}], ids=str)
def test_weights_and_constants_are_those_that_lie_in_memory(config, changes):
    config = RunConfig.build({**config.model_dump(), **changes})
    predicted = predict(shapes.read(config.model), resolve_auto(config).config).parts
    model = quantization.load(config)
    loaded = sum(part.loaded for part in quantization.memory_by_part(model))
    assert predicted["weights"] + predicted["quantization constants"] + 4 * 2048 * 192 == pytest.approx(
        loaded, rel=0.05
    )


SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 8, "head_dim": 16,
         "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def saved_bytes(model_config, config, tokens):
    """The bytes that autograd saves in the layers of a model with adapters, for a pack of two conversations."""
    attention.register()
    base_model = AutoModelForCausalLM.from_config(model_config, attn_implementation=attention.SPLIT)
    tuned_model = lora.attach(base_model.requires_grad_(False), config).train()
    halves = [Encoded([5] * (tokens // 2), [IGNORED] + [5] * (tokens // 2 - 1))] * 2
    batch = Collator(0, packing=True)(halves)
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "answer_positions")}
    parameters = {p.untyped_storage().data_ptr() for p in tuned_model.parameters()}
    saved = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        last_hidden_state(tuned_model.get_base_model(), inputs)
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize(
    ("family", "kv_heads"), [("llama", 8), ("llama", 2), ("qwen2", 2), ("qwen3", 8), ("qwen3", 2), ("olmo2", 2)]
)
def test_what_a_layer_saves_is_what_the_plan_counts(config, family, kv_heads):
    """Also where queries share keys and values, and where both have norms of their own."""
    plain = changed(
        config, liger=False, train_head=False, gradient_checkpointing=False, keep_expanded=False, quantize=False,
        attention_kernel="split", optimizer="adamw_torch", micro_batch_tokens=256, lora_r=4,
    )  # fmt: skip
    sizes = {**SIZES, "num_key_value_heads": kv_heads}
    one, two = (AutoConfig.for_model(family, **sizes, num_hidden_layers=layers) for layers in (1, 2))
    tokens = 256
    measured = (saved_bytes(two, plain, tokens) - saved_bytes(one, plain, tokens)) / tokens
    assert shapes.count_shape(one).activations(plain, 4)[0] == pytest.approx(measured, rel=0.05)


# Peaks in GiB that PyTorch reported on an H100, forward and backward of one pack with nothing else there: no optimizer,
# no gradients of an earlier pass. (pack tokens, checkpointing, weights kept, Liger)
MEASURED = [
    ((1845, False, False, True), 13.45), ((4082, False, False, True), 22.46), ((1845, False, True, True), 25.52),
    ((4082, False, True, True), 34.53), ((7385, False, True, True), 47.73), ((8172, False, False, False), 48.08),
]  # fmt: skip


@pytest.mark.parametrize(("case", "peak"), MEASURED)
def test_the_prediction_is_within_a_tenth_of_what_was_measured(case, peak):
    tokens, checkpointing, kept, liger = case
    config = changed(
        LARGE, compute_dtype="bfloat16", attention_kernel="varlen", liger=liger, gradient_checkpointing=checkpointing,
        keep_expanded=kept, micro_batch_tokens=tokens, optimizer="adamw_8bit",
    )  # fmt: skip
    predicted = predict(LLAMA_2_7B, config, pass_tokens=tokens, passes=1)
    assert (predicted.peak - predicted.parts["optimizer"]) / GIB == pytest.approx(peak, rel=0.1)


# The same for Flan-T5-Large, whole trainings on the Guanaco rows, 16 answers in one pass, on an H200.
@pytest.mark.parametrize(("recomputed", "peak"), [(False, 45.75), (True, 4.76)])
def test_the_prediction_for_t5_is_within_a_tenth_of_what_was_measured(recomputed, peak):
    config = RunConfig.from_preset(
        "flan-t5-large", compute_dtype="bfloat16", attention_kernel="dense", liger=False, keep_expanded=True,
        optimizer="adamw_torch_fused", gradient_checkpointing=recomputed, micro_batch_tokens=16384,
    )  # fmt: skip
    assert predict(FLAN_T5_LARGE, config).peak / GIB == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_flan_t5_large_fits_every_card(card):
    flan = RunConfig.from_preset("flan-t5-large")
    resolved, memory = plan_for(flan, card, FLAN_T5_LARGE)
    assert memory.fits(card)
    assert resolved.config.compute_dtype == ("bfloat16" if card.bf16 else "float32")  # never float16
    assert resolved.config.attention_kernel == "dense"
    assert all(getattr(resolved.config, name) not in (None, "auto") for name in OPEN)


def test_the_head_and_checkpointing_cost_what_they_should():
    given = changed(LARGE, gradient_checkpointing=True, kept_layers=0, offload_activations=False)
    config = resolve_auto(given, CARDS["L4"], LLAMA_2_7B).config
    with_head, without = (predict(LLAMA_2_7B, changed(config, train_head=head)) for head in (True, False))
    # a copy in fp32 and its gradient, two moments in fp32 or in bytes
    moments = 8 if config.optimizer == "adamw_torch_fused" else 2
    assert with_head.parts["head"] - without.parts["head"] == 4 * LLAMA_2_7B.head_parameters
    # the loss adds its gradient to that of earlier passes; peft's own layers and fp16 cannot
    assert with_head.parts["gradients"] - without.parts["gradients"] == 4 * LLAMA_2_7B.head_parameters
    for twice in ({"fused_layers": False}, {"compute_dtype": "float16"}):
        pair = (predict(LLAMA_2_7B, changed(config, train_head=head, **twice)) for head in (True, False))
        sizes = [memory.parts["gradients"] for memory in pair]
        assert sizes[0] - sizes[1] == 2 * 4 * LLAMA_2_7B.head_parameters
    assert with_head.parts["optimizer"] - without.parts["optimizer"] == pytest.approx(
        moments * LLAMA_2_7B.head_parameters, rel=0.05
    )
    kept = predict(LLAMA_2_7B, changed(config, gradient_checkpointing=False))
    assert kept.parts["activations"] > 5 * with_head.parts["activations"]


def test_the_bars_of_the_preset_are_planned_for():
    """2,048-token packs with checkpointing: under 10 GiB with a frozen head, under 15 GiB with the trained one."""
    given = changed(LARGE, gradient_checkpointing=True, micro_batch_tokens=2048)
    tight = resolve_auto(given, CARDS["T4"], LLAMA_2_7B).config
    assert predict(LLAMA_2_7B, tight).peak < 15 * GIB
    assert predict(LLAMA_2_7B, changed(tight, train_head=False, optimizer="adamw_8bit")).peak < 10 * GIB


@pytest.fixture(scope="module")
def billion(tmp_path_factory, tokenizer):
    """A Llama of 0.7 billion parameters, random: memory does not ask what weights are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("billion")
    size = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 12, "num_attention_heads": 16}
    with torch.device("cuda"):
        LlamaForCausalLM(LlamaConfig(vocab_size=32000, **size)).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.gpu
@pytest.mark.parametrize("head", [True, False], ids=["head", "frozen"])
@pytest.mark.parametrize("checkpointing", [True, False], ids=["recomputed", "kept"])
@pytest.mark.parametrize("tokens", [1024, 2048, 4096])
def test_predictions_hold_on_this_gpu(tmp_path, billion, prepared, head, checkpointing, tokens):
    given = RunConfig.from_preset(
        "llama2-7b", model=str(billion), output_dir=str(tmp_path), run_name="plan", train_head=head, steps=2,
        gradient_checkpointing=checkpointing, micro_batch_tokens=tokens, max_seq_len=512, keep_expanded=False,
        batch_size=2 * tokens // 512, optimizer="adamw_8bit", eval_steps=100,
    )  # fmt: skip
    config = resolve_auto(given).config
    tuned_model = lora.attach(quantization.load(config), config)
    run = RunDirectory(tmp_path / "run")
    trainer = training.make_trainer(config, tuned_model, load_tokenizer(config), prepared, run)
    trainer.train_dataset = [Encoded([5] * 512, [IGNORED, *[5] * 511])] * (4 * tokens // 512)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    predicted = predict(shapes.read(str(billion)), config, pass_tokens=tokens)
    assert predicted.peak == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)


# ---------------------------------------------------------------------------------------------- several GPUs

LLAMA_2_70B = shapes.read("meta-llama/Llama-2-70b-hf")
SPLIT = RunConfig.from_preset(
    "llama2-70b", liger=True, shard=True, gpus=2, compute_dtype="bfloat16", attention_kernel="varlen",
    gradient_checkpointing=True, kept_layers=0, keep_expanded=False, offload_activations=False, cuda_graphs=False,
    optimizer="adamw_8bit", micro_batch_tokens=2048,
)  # fmt: skip


def test_the_shape_of_llama_2_70b_gives_its_known_numbers():
    # 80 layers: q and o of 8,192 x 8,192, k and v of 8 heads of 128, three of 8,192 x 28,672
    assert LLAMA_2_70B.linear_parameters == 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28_672)
    assert LLAMA_2_70B.linear_parameters + 2 * 32_000 * 8192 + 161 * 8192 == 68_976_648_192
    assert LLAMA_2_70B.lora_parameters(SPLIT) == 828_375_040


def test_a_split_model_holds_its_part_of_the_layers_and_all_else_whole():
    one, two = predict(LLAMA_2_70B, changed(SPLIT, gpus=1)), predict(LLAMA_2_70B, SPLIT)
    # 34,225,520,640 bytes of NF4 and 161 norms of 8,192 in bf16; embeddings of 32,000 x 8,192
    layers = 68_451_041_280 // 2 + 161 * 8192 * 2
    assert one.parts["weights"] == layers + 32_000 * 8192 * 2
    assert two.parts["weights"] == layers // 2 + 32_000 * 8192 * 2
    assert two.parts["gathered layers"] == 2 * (layers // 80)
    assert "gathered layers" not in one.parts
    for name in one.parts.keys() - {"weights"}:
        assert two.parts[name] == one.parts[name]
    # while a layer is computed again, two are whole
    assert one.peak - two.peak == layers // 2 - 2 * (layers // 80)


def test_copies_of_a_model_take_what_one_takes():
    whole = changed(SPLIT, shard=False)
    assert predict(LLAMA_2_70B, whole) == predict(LLAMA_2_70B, changed(whole, gpus=1))


@pytest.mark.parametrize("change", [{}, {"lora_r": 8, "train_head": False}, {"quantize": False}], ids=str)
def test_more_gpus_never_need_more_of_each(change):
    peaks = [predict(LLAMA_2_70B, changed(SPLIT, gpus=gpus, **change)).peak for gpus in (2, 3, 4, 5, 8, 16)]
    assert peaks == sorted(peaks, reverse=True)


def test_gpus_that_train_together_leave_room_for_their_exchange():
    alone, together = CARDS["L4"], replace(CARDS["L4"], gpus=2)
    assert usable_memory(alone) - usable_memory(together) == EXCHANGE_BYTES
    assert "room on 2xL4" in fit_text(predict(LLAMA_2_70B, SPLIT), together)


@pytest.mark.parametrize(
    ("conversations", "gpus", "share"), [(16, 2, 8), (16, 3, 6), (3, 8, 1), (1, 2, 1), (4, None, 4)]
)
def test_the_largest_share_of_a_step_is_planned_for(conversations, gpus, share):
    assert count_share(changed(SPLIT, batch_size=conversations, gpus=gpus)) == share


def test_a_split_plan_is_drawn_with_the_layers_that_are_gathered():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, ax = pyplot.subplots()
    plot_plan({"one": predict(LLAMA_2_70B, changed(SPLIT, gpus=1))}, ax)
    assert "gathered layers" not in ax.get_legend_handles_labels()[1]
    plot_plan({"two": predict(LLAMA_2_70B, SPLIT)}, ax)
    assert "gathered layers" in ax.get_legend_handles_labels()[1]
    assert "gathered layers" in plan_table(predict(LLAMA_2_70B, SPLIT)).index
    pyplot.close(figure)
