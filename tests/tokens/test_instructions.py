from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_utils.config import ConfigError, RunConfig
from qlora_utils.rows.conversations import Conversation, Turn
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.tokens import instructions
from qlora_utils.tokens.formats import format_of
from qlora_utils.tokens.instructions import known_instructions, read_instructions, source_text

CONFIG = RunConfig.from_preset("pocket-t5")
T5 = pytest.mark.parametrize("preset", ["pocket-t5"], indirect=True, scope="session")
HISTORY = (Turn("What is the capital of Chile?", "It is Santiago."), Turn("And its currency?", "The peso."))
THREE = Conversation((*HISTORY, Turn("On which continent is it?", "South America.")))


def test_templates_are_data_several_and_the_first_is_fixed():
    known = read_instructions(known_instructions())
    assert len(known.templates) >= 4
    assert known.fixed == known.templates[0] == "Answer the question: {question}"
    assert all(template.count("{question}") == 1 for template in known.templates)


def test_a_template_without_a_question_is_refused(tmp_path):
    path = tmp_path / "instructions.toml"
    path.write_text('templates = ["Answer!"]\nearlier = "{question} {answer}"\n')
    with pytest.raises(ValueError, match=r"instructions\.toml: 'Answer!' must hold \{question\} once"):
        read_instructions(path)
    with pytest.raises(ConfigError, match=r"instruction: 'Answer!' is not allowed.*\{question\}"):
        RunConfig.from_preset("pocket-t5", instruction="Answer!")


@pytest.mark.parametrize(
    "earlier", ["{answer} <- {question}", "Q: {question}", "{answer}", "{question} {answer} {answer}"]
)
def test_an_earlier_turn_needs_question_and_answer_in_this_order(tmp_path, earlier):
    path = tmp_path / "instructions.toml"
    path.write_text(f'templates = ["{{question}}"]\nearlier = "{earlier}"\n')
    with pytest.raises(ValueError, match=r"instructions\.toml: earlier, .* and after it \{answer\} once"):
        read_instructions(path)


def test_a_run_is_asked_as_it_was_trained_whatever_becomes_of_the_file(tmp_path, monkeypatch, tokenizer_t5):
    """`ask`, the playground, scores and the merged chat template all go by what the training left in its run."""
    config = RunConfig.build({**CONFIG.model_dump(), "output_dir": str(tmp_path)})
    form = format_of(tokenizer_t5, config)
    before = form.prompt([], "Why?")
    form.record(RunDirectory(config.run_dir))
    changed = tmp_path / "instructions.toml"
    changed.write_text('templates = ["Say: {question}"]\nearlier = "{question} {answer}"\n')
    monkeypatch.setattr(instructions, "known_instructions", lambda: changed)
    assert form.prompt([], "Why?") == before
    other = RunConfig.build({**config.model_dump(), "run_name": "other"})
    assert format_of(tokenizer_t5, other).prompt([], "Why?") != before


@pytest.fixture
def tokenizer_t5():
    from qlora_utils.data import load_tokenizer

    return load_tokenizer(CONFIG)


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
        assert ids == format_of(tokenizer, config).prompt(history, "Why?")
