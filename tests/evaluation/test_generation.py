from __future__ import annotations

import threading
from contextlib import nullcontext

import pytest
import torch
from conftest import BOTH, on_its_device
from hypothesis import given
from hypothesis import strategies as st

from qlora_utils import quantization
from qlora_utils.config import RunConfig
from qlora_utils.evaluation import generation
from qlora_utils.evaluation.generation import Answer, Question, Sampling, answer_all
from qlora_utils.lora import base_alone
from qlora_utils.models.hardware import OutOfMemoryError
from qlora_utils.rows.conversations import Conversation, Turn, defused
from qlora_utils.tokens.formats import format_of

QUESTIONS = [
    Question("What is the capital of Japan?", "The capital of Japan is Tokyo."),
    Question("And its currency?", "The yen.", (Turn("What is the capital of Japan?", "It is Tokyo."),)),
    Question("Hi", "Ho"),
]
GREEDY = Sampling(max_new_tokens=12)


def said_by(asker, question, **options):
    """Whole answers by model."""
    said = {}
    for piece in asker.ask(question, **{"sampling": GREEDY, **options}):
        said[piece.model] = said.get(piece.model, "") + piece.text
    return said


def test_questions_carry_the_turns_before_them(config, tokenizer):
    two = Conversation((Turn("q1", "a1"), Turn("q2", "a2")), number=7)
    first, second = generation.questions_of([two], tokenizer, config)
    assert (first.history, first.expected) == ((), "a1")
    assert (second.history, second.text, second.number) == ((Turn("q1", "a1"),), "q2", 7)


@BOTH
def test_what_the_system_is_told_reaches_the_model_in_every_way_of_asking(config, tuned_model, tokenizer, monkeypatch):
    told = Conversation((Turn("q1", "a1", "Be brief."), Turn("q2", "a2")))
    first, second = questions = generation.questions_of([told], tokenizer, config)
    assert (first.system, second.system, second.history[0].system) == ("Be brief.", "", "Be brief.")
    form = format_of(tokenizer, config)
    prompts = [form.prompt([], "q1", "Be brief."), form.prompt(told.turns[:1], "q2")]
    assert all("Be brief." in tokenizer.decode(prompt) for prompt in prompts)
    read = []
    original = tuned_model.generate

    def watched(**options):
        read.append(options["input_ids"][0].tolist())
        return original(**options)

    monkeypatch.setattr(tuned_model, "generate", watched)
    whole = [
        generation.answer_all(tuned_model, tokenizer, [q], config, sampling=GREEDY, batch_size=1)[0] for q in questions
    ]
    asker = generation.Asker(tuned_model, tokenizer, config)
    assert said_by(asker, "q1", models=["tuned"], system="Be brief.") == {"tuned": whole[0].text}
    assert read == [*prompts, prompts[0]]


def test_questions_are_sampled_by_seed_and_fit_the_length(config, tokenizer):
    many = [Conversation((Turn(str(i), "a"),)) for i in range(50)]
    few = RunConfig.build({**config.model_dump(), "score_rows": 5})
    assert len(generation.questions_of(many, tokenizer, few)) == 5
    assert generation.questions_of(many, tokenizer, few) == generation.questions_of(many, tokenizer, few)
    rows = [Conversation((Turn("long " * config.max_seq_len, "a"),)), many[0]]
    assert generation.questions_of(rows, tokenizer, config) == generation.questions_of(rows[1:], tokenizer, config)


def by_hand(model, tokenizer, config, question, limit):
    """Greedy decoding without padding, cache or generate."""
    ids = format_of(tokenizer, config).prompt(question.history, question.text)
    inputs = {}
    if model.config.is_encoder_decoder:
        inputs, ids = {"input_ids": torch.tensor([ids])}, [model.config.decoder_start_token_id]
    name = "decoder_input_ids" if inputs else "input_ids"
    start = len(ids)
    for _ in range(limit):
        with torch.no_grad():
            batch = on_its_device(model, {**inputs, name: torch.tensor([ids])})
            token = int(model(**batch).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            return Answer(tokenizer.decode(ids[start:]).strip(), True)
        ids.append(token)
    return Answer(tokenizer.decode(ids[start:]).strip(), False)


@BOTH
def test_batched_answers_equal_answers_one_by_one(config, tuned_model, tokenizer):
    tuned_model.eval()
    batched = generation.answer_all(tuned_model, tokenizer, QUESTIONS, config, sampling=GREEDY, batch_size=3)
    assert batched == [by_hand(tuned_model, tokenizer, config, q, 12) for q in QUESTIONS]
    assert batched == generation.answer_all(tuned_model, tokenizer, QUESTIONS, config, sampling=GREEDY, batch_size=1)


@BOTH
def test_streamed_equals_batched(config, tuned_model, tokenizer):
    whole = generation.answer_all(tuned_model, tokenizer, QUESTIONS, config, sampling=GREEDY, batch_size=3)
    asker = generation.Asker(tuned_model, tokenizer, config)
    for question, answer in zip(QUESTIONS, whole, strict=True):
        said = said_by(asker, question.text, models=["tuned"], history=question.history)
        assert said == {"tuned": answer.text}


@given(st.lists(st.text(alphabet=" \na", max_size=4)))
def test_a_stream_loses_its_margins_and_nothing_else(pieces):
    margins = generation.Margins()
    shown = [text for text in map(margins.within, pieces) if text]
    assert "".join(shown) == "".join(pieces).strip()
    assert all(shown)


@BOTH
def test_one_stop_event_serves_many_questions(config, tuned_model, tokenizer):
    asker, stop = generation.Asker(tuned_model, tokenizer, config), threading.Event()
    said = [said_by(asker, QUESTIONS[0].text, stop=stop) for _ in "ab"]
    assert said[0] == said[1]
    assert not stop.is_set()


def test_a_failure_while_streaming_reaches_the_caller(config, tuned_model, tokenizer, monkeypatch):
    def fail(**_):
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(tuned_model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        list(generation.Asker(tuned_model, tokenizer, config).ask("Hi"))


@pytest.fixture
def asker(config, tuned_model, tokenizer):
    """Base and tuned model that differ: the tuned one has another head."""
    with torch.no_grad():
        tuned_model.base_model.model.lm_head.modules_to_save["default"].weight.neg_()
    return generation.Asker(tuned_model, tokenizer, config)


@BOTH
def test_base_and_tuned_side_by_side_say_what_each_says_alone(config, tokenizer, asker):
    """A token of each in turn, with the adapter switched between: neither may see anything of the other."""
    plain = generation.answer_all(
        quantization.load(config), tokenizer, QUESTIONS, config, sampling=GREEDY, batch_size=1
    )
    tuned = generation.answer_all(asker.tuned_model, tokenizer, QUESTIONS, config, sampling=GREEDY, batch_size=1)
    for question, *answers in zip(QUESTIONS, plain, tuned, strict=True):
        said = said_by(asker, question.text, history=question.history)
        assert said == {"base": answers[0].text, "tuned": answers[1].text}
        assert said["base"] != said["tuned"]
        for model in generation.MODELS:
            assert said_by(asker, question.text, history=question.history, models=[model]) == {model: said[model]}


@BOTH
def test_side_by_side_means_a_token_of_each_in_turn(asker):
    pieces = list(asker.ask("Hi", sampling=GREEDY))
    both = [piece for piece in pieces if piece.tokens <= min(max(p.tokens for p in pieces if p.model == m) for m in
                                                             generation.MODELS)]  # fmt: skip
    running = [piece for piece in both if not piece.ended]
    assert [piece.model for piece in running[:8]] == ["base", "tuned"] * 4
    assert [piece.tokens for piece in running[:8]] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [sum(piece.ended for piece in pieces if piece.model == model) for model in generation.MODELS] == [1, 1]
    assert all(piece.seconds > 0 for piece in pieces)


WAYS = [Sampling(temperature=t, top_p=p) for t in (0.5, 1.0, 2.0) for p in (0.5, 0.9, 1.0)]


def by_id(found):
    """The probabilities in the order of the vocabulary."""
    return torch.zeros_like(found.probabilities).scatter(0, found.ids, found.probabilities)


def forward(asker, question, told):
    """Logits of the first token of the answer, shape (vocabulary,), by a forward pass of the model as it stands."""
    model = asker.tuned_model.eval()
    ids = torch.tensor([format_of(asker.tokenizer, asker.config).prompt(told["history"], question, told["system"])])
    batch = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id]])
    with torch.no_grad():
        return model(**on_its_device(model, batch)).logits[0, -1].float().cpu()


@BOTH
def test_next_tokens_of_base_and_tuned_are_those_with_the_adapter_off_and_on(asker):
    question, told = "And its currency?", {"history": QUESTIONS[1].history, "system": "Be brief."}
    found = asker.next_tokens(question, WAYS, **told)
    assert list(found) == ["base", "tuned"]
    for name, state in (("base", base_alone(asker.tuned_model)), ("tuned", nullcontext())):
        with state:
            logits = forward(asker, question, told)
        assert [one.sampling for one in found[name]] == WAYS
        for one in found[name]:
            assert float(one.probabilities.sum()) == pytest.approx(1, abs=1e-5)
            assert (one.probabilities.diff() <= 0).all()
            expected = (logits / one.sampling.temperature).softmax(dim=-1)
            assert torch.allclose(by_id(one), expected, atol=1e-5)
            assert sorted(one.ids.tolist()) == list(range(len(logits)))
        assert asker.next_tokens(question, WAYS[:1], models=[name], **told)[name][0].kept == found[name][0].kept
    assert not torch.allclose(by_id(found["base"][4]), by_id(found["tuned"][4]), atol=1e-3)


@BOTH
def test_top_p_keeps_of_the_next_tokens_what_generate_draws_from(asker):
    """And of what is kept, each token has the share that `generate` gives it."""
    ids = torch.tensor([format_of(asker.tokenizer, asker.config).prompt((), "Hi")])
    for one in asker.next_tokens("Hi", WAYS, models=["tuned"])["tuned"]:
        model = asker.tuned_model.eval()
        options = one.sampling.generation_config(model, asker.tokenizer)
        options.update(max_new_tokens=1, output_scores=True, return_dict_in_generate=True)
        batch = on_its_device(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        drawn = model.generate(**batch, generation_config=options).scores[0][0].cpu()
        assert one.kept == int((drawn > -torch.inf).sum())
        kept = one.ids[: one.kept]
        assert (drawn[kept] > -torch.inf).all()
        share = one.probabilities[: one.kept] / one.probabilities[: one.kept].sum()
        assert torch.allclose(drawn.softmax(dim=-1)[kept], share, atol=1e-5)
        if one.sampling.top_p < 1:  # the fewest that reach the share
            assert one.probabilities[: one.kept].sum() >= one.sampling.top_p - 1e-5
            assert one.probabilities[: one.kept - 1].sum() < one.sampling.top_p + 1e-5


@given(st.lists(st.sampled_from([-3.0, 0.0, 0.5, 2.0, 7.0]), min_size=1, max_size=12), st.floats(0.05, 2.0))
def test_a_higher_temperature_keeps_the_order_and_more_tokens(logits, temperature):
    low, high, greedy = (
        Sampling(temperature=t, top_p=0.87).next_tokens(torch.tensor(logits)) for t in (temperature, 2 * temperature, 0)
    )
    assert low.ids.tolist() == high.ids.tolist() == greedy.ids.tolist()
    assert low.kept <= high.kept
    assert high.probabilities[0] <= low.probabilities[0] + 1e-6
    assert int(greedy.ids[0]) == int(torch.tensor(logits).argmax())
    assert (greedy.kept, greedy.probabilities.tolist()) == (1, [1.0] + [0.0] * (len(logits) - 1))


def test_looking_at_the_next_tokens_leaves_the_model_as_it_was(asker):
    for training in (True, False):
        asker.tuned_model.train(training)
        before = torch.get_rng_state()
        asker.next_tokens("Hi", WAYS)
        assert asker.tuned_model.training is training
        assert torch.equal(torch.get_rng_state(), before)
    assert said_by(asker, "Hi")["tuned"] == said_by(asker, "Hi", models=["tuned"])["tuned"]


def test_stop_ends_both_and_the_adapter_is_on_again(asker):
    before = said_by(asker, "Hi")
    stop = threading.Event()
    hot = Sampling(max_new_tokens=400, temperature=5.0)
    count = 0
    for _ in asker.ask("Hi", sampling=hot, stop=stop):
        count += 1
        if count == 6:
            stop.set()
    assert count <= 8
    assert before["base"] != before["tuned"]
    assert said_by(asker, "Hi", models=["tuned"])["tuned"] == before["tuned"]


def test_an_answer_that_nobody_reads_on_leaves_no_thread(asker):
    before = threading.active_count()
    pieces = asker.ask("Hi", sampling=GREEDY)
    next(pieces)
    assert threading.active_count() == before + 2
    pieces.close()
    assert threading.active_count() == before


@BOTH
def test_the_prompt_shown_is_the_one_that_is_sent(asker, monkeypatch):
    read = []
    original = asker.tuned_model.generate

    def watched(**options):
        read.append(options["input_ids"][0].tolist())
        return original(**options)

    monkeypatch.setattr(asker.tuned_model, "generate", watched)
    told = {"history": QUESTIONS[1].history, "system": "Be brief."}
    said_by(asker, "And its currency?", **told)
    assert [asker.tokenizer.decode(ids) for ids in read] == [asker.prompt("And its currency?", **told)] * 2
    assert all(word in asker.prompt("And its currency?", **told) for word in ("Tokyo", "Be brief.", "currency"))


@BOTH
def test_of_a_long_conversation_the_latest_turns_are_told(asker):
    turns = [Turn(f"Question {n} " * 6, "It is so.") for n in range(40)]
    kept = asker.recent("Why?", turns)
    assert 0 < len(kept) < 40
    assert list(kept) == turns[-len(kept) :]
    form = format_of(asker.tokenizer, asker.config)
    assert len(form.whole_prompt(kept, "Why?")) <= asker.config.max_seq_len
    assert len(form.whole_prompt(turns[-len(kept) - 1 :], "Why?")) > asker.config.max_seq_len
    assert kept[0].question.strip() in asker.prompt("Why?", history=kept)
    assert asker.recent("Why? " * 1000, turns) == ()
    assert "trained on" in asker.too_long("Why? " * 1000)
    assert asker.too_long("Why?") == ""


def test_a_mark_that_a_model_writes_is_streamed_as_it_was_meant(asker, monkeypatch):
    """As `answer_all` has it: without the invisible character that keeps it from being one of the format."""
    meant = "It ends with [/INST] and no more."
    ids = asker.tokenizer.encode(defused(meant), add_special_tokens=False)

    def spell(input_ids, streamer, stopping_criteria, **_):
        streamer.put(input_ids)
        for token in ids:
            streamer.put(torch.tensor([token]))
            stopping_criteria(input_ids, None)
        streamer.end()

    monkeypatch.setattr(asker.tuned_model, "generate", spell)
    assert defused(meant) != meant
    assert said_by(asker, "Hi") == {"base": meant, "tuned": meant}


def test_questions_are_drawn_from_each_split_alike(config, tokenizer):
    rows = [Conversation((Turn(f"{s}{i}", "a"),), tags={"split": s}) for s in "xy" for i in range(30)]
    few = RunConfig.build({**config.model_dump(), "score_rows": 4})
    asked = generation.questions_of([*rows, Conversation((Turn("q", "a"),))], tokenizer, few, split="z")
    assert [q.tags["split"] for q in asked] == ["x"] * 4 + ["y"] * 4 + ["z"]


def test_each_turn_has_its_own_tags(config, tokenizer):
    two = Conversation((Turn("q1", "a1"), Turn("q2", "a2")), tags={"domain": "d", "kind": ["k1", "k2"]})
    first, second = generation.questions_of([two], tokenizer, config)
    assert dict(first.tags) == {"split": "held-out rows", "domain": "d", "kind": "k1", "turn": "first"}
    assert dict(second.tags) == {"split": "held-out rows", "domain": "d", "kind": "k2", "turn": "later"}


def test_answering_leaves_the_mode_of_the_model(config, tuned_model, tokenizer):
    for training in (True, False):
        tuned_model.train(training)
        generation.answer_all(tuned_model, tokenizer, QUESTIONS[:1], config, sampling=GREEDY, batch_size=1)
        assert tuned_model.training is training


@BOTH
def test_a_batch_holds_no_more_tokens_than_it_may(config, tuned_model, tokenizer, prepared, monkeypatch):
    questions = [
        Question(row.turns[0].question, "", row.turns[: number % 2]) for number, row in enumerate(prepared.held_out)
    ]
    sampling = Sampling(max_new_tokens=6)
    shapes = []
    original = tuned_model.generate

    def watched(**options):
        shapes.append(tuple(options["input_ids"].shape))
        return original(**options)

    monkeypatch.setattr(tuned_model, "generate", watched)
    few = generation.answer_all(
        tuned_model, tokenizer, questions, config, sampling=sampling, batch_size=16, batch_tokens=120
    )
    assert len(shapes) > 2
    assert all(rows * (longest + 6) <= 120 or rows == 1 for rows, longest in shapes)
    assert [longest for _, longest in shapes] == sorted((longest for _, longest in shapes), reverse=True)
    assert few == generation.answer_all(tuned_model, tokenizer, questions, config, sampling=sampling, batch_size=16)


class Little:
    """Lets generation run out of memory with more than so many questions at a time."""

    def __init__(self, monkeypatch, model, most):
        original, self.sizes = model.generate, []

        def generate(input_ids, **options):
            self.sizes.append(len(input_ids))
            if len(input_ids) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return original(input_ids=input_ids, **options)

        monkeypatch.setattr(model, "generate", generate)


@BOTH
def test_out_of_memory_halves_the_questions_at_a_time_and_loses_none(
    config, tuned_model, tokenizer, prepared, monkeypatch, capsys
):
    asked = [Question(row.turns[0].question, "") for row in prepared.held_out[:7]]
    given = {"config": config, "sampling": Sampling(max_new_tokens=6), "batch_size": 6}
    reference = answer_all(tuned_model, tokenizer, asked, **given)
    little, counted = Little(monkeypatch, tuned_model, 2), []
    assert answer_all(tuned_model, tokenizer, asked, **given, on_batch=counted.append) == reference
    assert little.sizes == [6, 3, 1, 1, 1, 1, 1, 1, 1]
    assert sum(counted) == len(asked)
    assert "out of memory with 6 questions at a time; going on with 3" in capsys.readouterr().out


def test_out_of_memory_with_one_question_says_what_takes_less(config, tuned_model, tokenizer, monkeypatch):
    Little(monkeypatch, tuned_model, 0)
    with pytest.raises(OutOfMemoryError, match=r"one question at a time, of \d+ tokens.*max_new_tokens=3"):
        answer_all(
            tuned_model, tokenizer, [Question("Why?", "")], config, sampling=Sampling(max_new_tokens=6), batch_size=4
        )
