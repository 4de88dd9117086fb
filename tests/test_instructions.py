from __future__ import annotations

import pytest
from conftest import SHARED
from hypothesis import given
from hypothesis import strategies as st

from qlora_utils import data, instructions
from qlora_utils.config import ConfigError, RunConfig
from qlora_utils.instructions import Instructions, instructions_of, read_instructions, source_text
from qlora_utils.packs import PairCollator, StepCollator
from qlora_utils.rows import Conversation, Turn

CONFIG = RunConfig.from_preset("pocket-t5")
T5 = pytest.mark.parametrize("preset", ["pocket-t5"], indirect=True, scope="session")
HISTORY = (Turn("What is the capital of Chile?", "It is Santiago."), Turn("And its currency?", "The peso."))
THREE = Conversation((*HISTORY, Turn("On which continent is it?", "South America.")))


def test_templates_are_data_several_and_the_first_is_fixed():
    known = read_instructions()
    assert len(known.templates) >= 4
    assert known.fixed == known.templates[0] == "Answer the question: {question}"
    assert all(template.count("{question}") == 1 for template in known.templates)


def test_a_template_without_a_question_is_refused(tmp_path, monkeypatch):
    (tmp_path / "instructions.toml").write_text('templates = ["Answer!"]\nearlier = "{question} {answer}"\n')
    monkeypatch.setattr(instructions, "project_folder", lambda name: tmp_path)
    with pytest.raises(ValueError, match=r"instructions\.toml: 'Answer!' must hold \{question\} once"):
        read_instructions.__wrapped__()
    with pytest.raises(ConfigError, match=r"instruction: 'Answer!' is not allowed.*\{question\}"):
        RunConfig.from_preset("pocket-t5", instruction="Answer!")


def test_earlier_turns_stand_before_the_instruction():
    text = source_text(HISTORY, "On which continent is it?", "Answer: {question} Now!", "{question} {answer}")
    assert text == (
        "What is the capital of Chile? It is Santiago. And its currency? The peso. "
        "Answer: On which continent is it? Now!"
    )


@given(st.text(), st.text(), st.text())
def test_what_people_write_is_never_filled_in(question, asked, answer):
    text = source_text([Turn(asked, answer)], question, "Q {question}", "{question}|{answer}")
    assert text == f"{asked}|{answer} Q {question}"
    hostile = source_text([Turn("{answer}", "{question}")], "{question} {0}", "Q {question}", "{question}|{answer}")
    assert hostile == "{answer}|{question} Q {question} {0}"


@T5
def test_a_conversation_is_one_example_for_each_answer(tokenizer):
    encoded = data.examples([THREE], tokenizer, CONFIG, training=False)
    assert len(encoded) == 3 == data.examples_of(THREE, CONFIG)
    for index, (example, turn) in enumerate(zip(encoded, THREE.turns, strict=True)):
        assert tokenizer.decode(example.labels) == f"{turn.answer}</s>"
        read = tokenizer.decode(example.input_ids)
        assert read.endswith(f"Answer the question: {turn.question}</s>")
        assert all(earlier.answer in read for earlier in THREE.turns[:index])
        assert turn.answer not in read
        assert example.input_ids == data.prompt(THREE.turns[:index], turn.question, tokenizer, CONFIG)  # trap 4, for T5


@T5
def test_training_varies_the_instruction_with_the_seed_and_measuring_does_not(tokenizer, prepared):
    def read(training, **changes):
        config = RunConfig.build({**CONFIG.model_dump(), **changes})
        return [example.input_ids for example in data.examples(prepared.train, tokenizer, config, training=training)]

    assert read(True) == read(True)
    assert read(True) != read(True, seed=1)
    assert read(False) == read(False, seed=1)
    used = {
        template
        for ids in read(True)
        for template in read_instructions().templates
        if template.split("{question}")[0] in tokenizer.decode(ids)
    }
    assert len(used) == len(read_instructions().templates)
    own = read(True, instruction="Tell me: {question}")
    assert own == read(False, instruction="Tell me: {question}")
    assert all("Tell me: " in tokenizer.decode(ids) for ids in own)


@T5
@pytest.mark.parametrize("limit", [16, 24, 40])
def test_what_is_too_long_loses_its_start_and_the_question_survives(tokenizer, limit):
    config = RunConfig.build({**CONFIG.model_dump(), "max_seq_len": limit})
    whole = data.prompt(HISTORY, "On which continent is it?", tokenizer, CONFIG)
    cut = data.prompt(HISTORY, "On which continent is it?", tokenizer, config)
    assert len(cut) == min(limit, len(whole))
    assert cut == whole[-len(cut) :]
    assert tokenizer.decode(cut).endswith("On which continent is it?</s>")
    long = Conversation((Turn("Why?", "Because " * 100),))
    (example,) = data.examples([long], tokenizer, config, training=True)
    assert len(example.labels) == limit
    assert tokenizer.eos_token_id not in example.labels  # cut off, it has not ended


@T5
def test_marks_spelled_by_an_author_close_nothing(tokenizer):
    hostile = Conversation((Turn("What does </s> mean? <extra_id_0>", "It is </s> <pad>."),))
    (example,) = data.examples([hostile], tokenizer, CONFIG, training=False)
    assert example.input_ids.count(tokenizer.eos_token_id) == 1 == example.labels.count(tokenizer.eos_token_id)
    assert example.labels[-1] == tokenizer.eos_token_id
    special = set(tokenizer.all_special_ids) - {tokenizer.eos_token_id}
    assert not special & {*example.input_ids, *example.labels}


@T5
def test_labels_are_masked_by_length_and_never_by_id(tokenizer):  # trap 5
    encoded = data.examples([THREE], tokenizer, CONFIG, training=False)
    batch = PairCollator(tokenizer.eos_token_id)(encoded)  # were `</s>` the padding, it would still carry loss
    for row, mask, labels, example in zip(
        *(batch[n] for n in ("input_ids", "attention_mask", "labels")), encoded, strict=True
    ):
        assert row[: len(example.input_ids)].tolist() == example.input_ids
        assert int(mask.sum()) == len(example.input_ids)
        assert labels.tolist() == example.labels + [data.IGNORED] * (labels.shape[0] - len(example.labels))
    assert len(batch["answer_positions"]) == sum(len(example.labels) for example in encoded)


@T5
def test_a_step_is_cut_into_groups_of_like_length(tokenizer, prepared):
    encoded = data.examples(prepared.train[:16], tokenizer, CONFIG, training=True)
    collator = PairCollator(tokenizer.pad_token_id)
    step = StepCollator(collator, tokens=200)(encoded)
    assert len(step["passes"]) > 2
    assert step["tokens"] == sum(collator.tokens(example) for example in encoded)
    assert step["answer_tokens"] == sum(len(one["answer_positions"]) for one in step["passes"])
    longest = [one["input_ids"].shape[1] + one["labels"].shape[1] for one in step["passes"]]
    assert longest[0] == max(longest)


@T5
def test_every_usable_row_is_kept_and_its_report_counts_examples(tokenizer, tmp_path):
    long = "word " * 400
    lines = ["question,answer", f"{long}?,yes", f"why?,{long}", "when?,now", "where?,here", " ,blank"]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    config = RunConfig.build({**CONFIG.model_dump(), "dataset": str(tmp_path / "rows.csv"), "max_seq_len": 64})
    prepared = data.prepare(config, tokenizer)
    assert len(prepared.train) + len(prepared.held_out) == 4
    assert prepared.report["truncated_share"] == pytest.approx(0.4)
    assert "tokens per example" in data.report_table(prepared.report)


@pytest.mark.real_data
@T5
def test_the_real_rows_become_pairs(tokenizer, real_rows):
    from qlora_utils.rows import parse_rows
    from qlora_utils.sources import Row

    assert SHARED.is_dir()
    conversations, _ = parse_rows([Row("x", n, {"text": text}) for n, text in enumerate(real_rows)])
    encoded = data.examples(conversations, tokenizer, CONFIG, training=True)
    assert len(encoded) == 1380
    assert max(len(example.input_ids) for example in encoded) == CONFIG.max_seq_len


def test_a_causal_model_knows_no_instruction():
    given = Instructions(("Say: {question}",), "{question} {answer}")
    assert instructions_of(RunConfig.from_preset("pocket-t5", instruction="Say: {question}")).fixed == given.fixed
    pocket = RunConfig.from_preset("pocket", instruction="Say: {question}")
    tokenizer = data.load_tokenizer(pocket)
    assert data.prompt([], "Why?", tokenizer, pocket) == data.encode_prompt([], "Why?", tokenizer)


@T5
@pytest.mark.parametrize("instruction", [None, "It's \\n {question}\n'Answer':"])
def test_as_a_chat_template_it_gives_the_same_tokens(tokenizer, instruction):
    config = RunConfig.build({**CONFIG.model_dump(), "instruction": instruction})
    messages = [
        {"role": role, "content": content}
        for turn in HISTORY
        for role, content in (("user", turn.question), ("assistant", turn.answer))
    ]
    messages.append({"role": "user", "content": "Why?"})
    for chat, history in ((messages, HISTORY), (messages[-1:], ())):
        ids = tokenizer.apply_chat_template(chat, chat_template=instructions.chat_template(config), return_dict=False)
        assert ids == data.prompt(history, "Why?", tokenizer, config)
