"""Slots that are filled again answer as `generate` does."""

from __future__ import annotations

import gc
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from qlora_utils import data, lora, quantization
from qlora_utils.config import RunConfig
from qlora_utils.evaluation import decoding, generation
from qlora_utils.evaluation.decoding import can_decode, choose_tokens, decode, seeded_noise
from qlora_utils.kernels import attention
from qlora_utils.kernels.lora_layers import keep_expanded
from qlora_utils.tokens.formats import format_of


@pytest.fixture
def adapted(tuned_model):
    """A tuned model whose adapter changes its answers, some of which end, and whose weights are in NF4 alone."""
    for module in tuned_model.modules():
        vars(module).pop("dequantized_weight", None)
    generator = torch.Generator(tuned_model.device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in tuned_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=generator)
    return tuned_model.eval()


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """The prompts of 200 questions, the longest first."""
    config = RunConfig.from_preset("pocket")
    form = format_of(tokenizer, config)
    questions = generation.questions_of(data.prepare(config, tokenizer).train, tokenizer, config, count=200)
    return sorted((form.prompt(q.history, q.text, q.system) for q in questions), key=len, reverse=True)


def generated(model, prompts, limit, ends, pad):
    """What `generate` answers to each prompt alone, up to the token that ends it."""
    options = GenerationConfig(max_new_tokens=limit, do_sample=False, eos_token_id=[*ends] or None, pad_token_id=pad)
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        with torch.no_grad():
            row = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=options)
        rows.append(row[0, len(prompt) :].tolist())
    return rows


def decoded(model, prompts, limits, ends, slots):
    """What slots answer, each prompt once."""
    rows = {}

    def keep(ended):
        assert not rows.keys() & ended.keys()
        rows.update(ended)

    decode(model, prompts, limits, slots=slots, ends=ends, on_answers=keep)
    return [rows[index] for index in range(len(prompts))]


def test_two_hundred_answers_are_those_of_generate(adapted, config, tokenizer, prompts, monkeypatch, capsys):
    """With fewer slots than questions, prompts read a few at a time, and keys read a few more at a time."""
    monkeypatch.setattr(decoding, "KEYS", 16)
    monkeypatch.setattr(decoding, "PROMPT_TOKENS", 300)
    form = format_of(tokenizer, config)
    sampling = generation.Sampling(max_new_tokens=24)
    expected = []
    for start in range(0, 200, 50):
        part = dict(enumerate(prompts[start : start + 50]))
        with torch.no_grad():
            generation._generate(adapted, form, part, sampling, 50, lambda rows: expected.extend(rows.values()))
    rows = decoded(adapted, prompts, [24] * 200, form.ends, 48)
    answers = [generation.decode_answer(row, form) for row in rows]
    assert answers == [generation.decode_answer(row, form) for row in expected]
    assert 20 < sum(answer.stopped for answer in answers) < 200
    assert "CUDA graph" not in capsys.readouterr().out


def test_each_answer_ends_at_its_own_limit_and_none_waits_for_another(adapted, tokenizer, prompts):
    """No token ends these answers; a long question comes after short ones, and limits differ."""
    asked = [prompts[-1], prompts[0], *prompts[-9:-2]]
    limits = [5, 1, 12, 3, 2, 9, 1, 4, 7]
    rows = decoded(adapted, asked, limits, (), 2)
    assert [len(row) for row in rows] == limits
    whole = generated(adapted, asked, 12, (), tokenizer.pad_token_id)
    assert rows == [row[:limit] for row, limit in zip(whole, limits, strict=True)]


def test_the_base_model_and_a_changed_adapter_answer_for_themselves(adapted, config, tokenizer, prompts):
    ends, pad, limits = format_of(tokenizer, config).ends, tokenizer.pad_token_id, [8] * 6
    tuned = decoded(adapted, prompts[:6], limits, ends, 4)
    with lora.base_alone(adapted):
        base = decoded(adapted, prompts[:6], limits, ends, 4)
        assert base == generated(adapted, prompts[:6], 8, ends, pad)
    assert base != tuned
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.neg_()
    changed = decoded(adapted, prompts[:6], limits, ends, 4)
    assert changed == generated(adapted, prompts[:6], 8, ends, pad) != tuned


def test_keys_and_values_are_freed_at_once(adapted, prompts, monkeypatch):
    """Not when the garbage collector next runs: by then a training may have run out of memory."""
    made = []

    class Watched(decoding._SlotLayer):
        def __init__(self, next_pass):
            super().__init__(next_pass)
            made.append(weakref.ref(self))

    monkeypatch.setattr(decoding, "_SlotLayer", Watched)
    gc.disable()
    try:
        decoded(adapted, prompts[:4], [3] * 4, (), 2)
        assert len(made) == adapted.config.num_hidden_layers
        assert [layer() for layer in made] == [None] * len(made)
    finally:
        gc.enable()


def test_weights_stay_dequantized_for_the_answers_alone_and_where_there_is_room(adapted):
    assert decoding._expandable(adapted, free=10**6) == []
    assert decoding._expandable(adapted.get_base_model().model.embed_tokens, free=10**12) == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "is_split", lambda model: True)
        assert decoding._expandable(adapted, free=10**12) == []
    layers = decoding._expandable(adapted, free=10**12)
    assert len(layers) == 7 * adapted.config.num_hidden_layers
    # What the run itself has saved stays.
    assert keep_expanded(adapted) == sum(layer.dequantized_weight.nbytes for layer in layers)
    assert decoding._expandable(adapted, free=10**12) == []


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.5, 0.6), (1.0, 0.05)])
def test_tokens_are_drawn_as_transformers_draws_them(temperature, top_p):
    torch.manual_seed(0)
    logits = torch.randn(1, 12) * 2
    scores = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits))
    expected = scores.softmax(-1)[0]
    drawn = choose_tokens(logits.expand(40_000, -1), temperature, top_p)
    shares = torch.bincount(drawn, minlength=12) / len(drawn)
    assert not shares[expected == 0].any()
    assert torch.allclose(shares, expected, atol=0.012)


def test_temperature_zero_takes_the_likeliest():
    logits = torch.randn(5, 30)
    assert torch.equal(choose_tokens(logits, 0.0, 0.1), logits.argmax(-1))


def test_only_plain_decoders_that_train_in_packs_are_decoded_in_slots(tuned_model):
    assert can_decode(tuned_model, packing=True)
    assert not can_decode(tuned_model, packing=False)
    plain = tuned_model.config
    others = [
        {"is_encoder_decoder": True},
        {"_attn_implementation": attention.DENSE},
        {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 8},
        {"rope_parameters": {**plain.rope_parameters, "rope_type": "dynamic", "factor": 2.0}},
    ]
    for changes in others:
        other = type(plain)(**{**plain.to_dict(), **changes})
        other._attn_implementation = changes.get("_attn_implementation", plain._attn_implementation)
        assert not can_decode(SimpleNamespace(config=other), packing=True), changes


class FakeGraph:
    """Records which steps would run in a CUDA graph, and runs them again when it is replayed."""

    made: tuple[FakeGraph, ...] = ()

    def __init__(self):
        self.steps, self.replays = [], 0
        FakeGraph.made += (self,)

    def replay(self):
        self.replays += 1
        for step in self.steps:
            step()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU records real graphs")
def test_steps_are_replayed_or_called_one_by_one(adapted, prompts, monkeypatch, capsys, fails):
    """As on a GPU: eight steps between two looks, one graph for each number of keys that are read."""
    expected = decoded(adapted, prompts[:5], [20] * 5, (), 3)
    original = decoding._Decoder._step
    recording = []

    class Recorder:
        def __init__(self, graph, **options):
            recording.append(graph)

        def __enter__(self):
            if fails:
                recording.pop()
                raise RuntimeError("operation not permitted when stream is capturing")

        def __exit__(self, *error):
            recording.pop()

    def step(decoder, read):
        if recording:
            recording[-1].steps.append(lambda: original(decoder, read))
        else:
            original(decoder, read)

    monkeypatch.setattr(FakeGraph, "made", ())
    monkeypatch.setattr(decoding, "KEYS", 32)
    monkeypatch.setattr(decoding._Decoder, "_step", step)
    monkeypatch.setattr(decoding._Decoder, "on_gpu", property(lambda _: True, lambda *_: None), raising=False)
    stand_ins = {"CUDAGraph": FakeGraph, "graph": Recorder, "graph_pool_handle": lambda: (0, 0),
                 "current_stream": lambda: None, "set_stream": lambda stream: None}  # fmt: skip
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(decoding, "_free_memory", lambda: 10**12)
    assert decoded(adapted, prompts[:5], [20] * 5, (), 3) == expected
    assert not any(hasattr(module, "dequantized_weight") for module in adapted.modules())
    replays = [graph.replays for graph in FakeGraph.made]
    if fails:
        assert replays == [0]
        assert capsys.readouterr().out.count("can't be recorded as a CUDA graph (operation not permitted") == 1
    else:
        assert len(replays) > 1
        assert min(replays) > 1


@pytest.mark.gpu
def test_on_a_gpu_slots_in_bf16_read_the_keys_that_a_mask_would_show():
    torch.manual_seed(0)
    slots, heads, key_heads, size, length = 5, 8, 4, 64, 40
    query = torch.randn(slots, heads, 1, size, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, slots, length, key_heads, size, device="cuda", dtype=torch.bfloat16).transpose(2, 3)
    used = torch.tensor([1, 40, 7, 25, 33], device="cuda", dtype=torch.int32)
    each = torch.arange(slots + 1, device="cuda", dtype=torch.int32)
    found = attention.attend_slots(query, key, value, scale=0.1, slots=(each, each * length, used))
    mask = (torch.arange(length, device="cuda") < used.unsqueeze(1))[:, None, None]
    repeated = [tensor.repeat_interleave(heads // key_heads, 1) for tensor in (key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.1)
    assert torch.allclose(found, expected.transpose(1, 2), atol=2e-2)


@pytest.mark.gpu
def test_on_a_gpu_answers_in_bf16_come_from_recorded_steps(tmp_path, tokenizer, prompts, capsys):
    """Ties differ in bf16, so that most answers and not all are those of `generate`."""
    given = {"output_dir": str(tmp_path), "run_name": "test", "compute_dtype": "bfloat16", "keep_expanded": False}
    config = RunConfig.from_preset("pocket", **given)
    model = lora.attach(quantization.load(config), config).eval()
    ends, pad = format_of(tokenizer, config).ends, tokenizer.pad_token_id
    rows = decoded(model, prompts[:40], [16] * 40, ends, 16)
    expected = generated(model, prompts[:40], 16, ends, pad)
    assert sum(row == other for row, other in zip(rows, expected, strict=True)) >= 30
    assert "CUDA graph" not in capsys.readouterr().out
    assert not any(hasattr(module, "dequantized_weight") for module in model.modules())


def test_seeded_noise_is_exponential_and_depends_on_seed_place_and_token_alone():
    seeds = torch.tensor([generation.seed_of_answer(0, number) for number in range(64)])
    noise = seeded_noise(seeds, torch.arange(64) % 8, 4096)
    assert noise.min() > 0 and noise.isfinite().all()
    # Mean and spread of the distribution are 1, and a tenth of it lies below -log(0.9).
    assert abs(noise.mean() - 1) < 0.01 and abs(noise.std() - 1) < 0.01
    assert abs((noise < -math.log(0.9)).float().mean() - 0.1) < 0.005
    # Neither answers nor places nor seeds are alike.
    rows = torch.cat(
        [noise, seeded_noise(seeds, torch.arange(64) % 8 + 8, 4096), seeded_noise(seeds + 2**32, seeds * 0, 4096)]
    )
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 0.1
    assert torch.equal(seeded_noise(seeds[5:6], torch.tensor([5]), 4096)[0], noise[5])


def test_seeds_draw_each_token_as_often_as_its_probability():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(20_000, 1)
    seeds = torch.tensor([generation.seed_of_answer(9, number) for number in range(20_000)])
    tokens = choose_tokens(logits, 0.7, 1.0, seeds=seeds, places=torch.zeros_like(seeds))
    drawn = torch.bincount(tokens, minlength=4) / 20_000
    torch.testing.assert_close(drawn, (logits[0] / 0.7).softmax(-1), atol=0.012, rtol=0)
