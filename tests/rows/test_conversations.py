from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from conftest import HOSTILE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_utils import data
from qlora_utils.config import RunConfig
from qlora_utils.rows import conversations as rows
from qlora_utils.rows.conversations import ENDS, Turn, UnusableRowError, defused, restored
from qlora_utils.rows.files import DataError, Row
from qlora_utils.tokens.formats import IGNORED, format_of


def row(**columns):
    return Row("test", 0, columns)


# ------------------------------------------------------------------------------------------------ row shapes


@pytest.mark.parametrize(
    ("columns", "shape"),
    [
        ({"text": "<s>[INST] q [/INST] a </s><s>[INST] q2 [/INST] a2 </s>"}, "llama-2 chat"),
        ({"text": "[INST] q [/INST] a [INST] q2 [/INST] a2"}, "llama-2 chat"),
        ({"text": "### Human: q### Assistant: a### Human: q2### Assistant: a2"}, "### Human / ### Assistant"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
                          {"role": "user", "content": "q2"}, {"role": "assistant", "content": "a2"}]},
            "messages",
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"},
                               {"from": "human", "value": "q2"}, {"from": "gpt", "value": "a2"}]},
            "conversations",
        ),
    ],
)  # fmt: skip
def test_shapes_of_two_turns(columns, shape):
    conversation = rows.parse(row(**columns))
    assert [(t.question.strip(), t.answer.strip()) for t in conversation.turns] == [("q", "a"), ("q2", "a2")]
    assert conversation.shape == shape


def test_instruction_with_input():
    conversation = rows.parse(row(instruction="Add.", input="1 and 2", output="3", source="book"))
    assert conversation.turns == (Turn("Add.\n\n1 and 2", "3"),)
    assert conversation.tags == {"source": "book"}


def test_a_system_message_belongs_to_the_first_turn():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a"}, {"role": "user", "content": "q2"},
                {"role": "assistant", "content": "a2"}]  # fmt: skip
    conversation = rows.parse(row(messages=messages))
    assert conversation.turns == (Turn("q", "a", "Be brief."), Turn("q2", "a2"))
    first = "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nq [/INST] a </s>"
    assert conversation.text == f"{first}<s>[INST] q2 [/INST] a2 </s>"
    assert rows.parse(row(text=conversation.text)).turns == conversation.turns
    with pytest.raises(UnusableRowError, match="lone surrogate"):
        rows.parse(row(messages=[{"role": "system", "content": "\ud83d"}, *messages[1:]]))


@pytest.mark.parametrize(
    "block", ["<<SYS>>Be brief.<</SYS>> ", " <<SYS>>\nBe brief.\n<</SYS>>\n", "<<SYS>>\nBe brief.<</SYS>>"]
)
def test_a_system_block_is_found_whatever_white_space_it_stands_in(block):
    text = f"<s>[INST] {block}q [/INST] a </s><s>[INST] <<SYS>> q2 [/INST] a2 </s>"
    assert rows.parse(row(text=text)).turns == (Turn("q", "a", "Be brief."), Turn("<<SYS>> q2", "a2"))


def test_the_mark_that_comes_first_says_what_shape_a_text_has():
    text = "### Human: What is [INST]?### Assistant: A mark."
    assert rows.parse(row(text=text)).turns == (Turn("What is [INST]?", "A mark."),)
    text = "<s>[INST] What is ### Human:? [/INST] A mark. </s>"
    assert rows.parse(row(text=text)).turns == (Turn("What is ### Human:?", "A mark."),)


@pytest.mark.parametrize(
    "columns",
    [
        {"text": "<s>[INST] q [/INST] a </s><s>[INST] q2 [/INST]"},
        {"text": "<s>[INST] q [/INST] a </s><s>[INST] q2"},
        {"text": "### Human: q### Assistant: a### Human: q2"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
                      {"role": "user", "content": "q2"}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
                      {"role": "user", "content": "q2"}, {"role": "assistant", "content": None}]},
    ],
)  # fmt: skip
def test_an_unanswered_last_question_keeps_the_answered_turns(columns):
    conversation = rows.parse(row(**columns))
    assert [(t.question.strip(), t.answer.strip()) for t in conversation.turns] == [("q", "a")]
    assert conversation.unanswered


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"text": "just prose"}, "neither"),
        ({"text": 7}, "text is int"),
        ({"text": None, "other": "x"}, "columns text, other"),
        ({"text": "<s>[INST] q [/INST]"}, "no answered turn"),
        ({"text": "before <s>[INST] q [/INST] a </s>"}, "text outside"),
        ({"messages": "q"}, "messages is str"),
        ({"messages": []}, "no turn"),
        ({"messages": [{"role": "tool", "content": "q"}]}, "role tool, expected user"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "an answer without a question"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "user", "content": "r"}]}, "two questions in a row"),
        ({}, "columns none: expected instruction/output"),
        ({"question": "half \ud83d", "answer": "a"}, "lone surrogate"),
        ({"question": "q", "answer": "a", "half \ud83d": "x"}, "lone surrogate"),
        ({"half \ud83d": "x"}, r"columns half \\ud83d: expected instruction"),
    ],
)
def test_an_unusable_row_has_a_reason(columns, reason):
    with pytest.raises(UnusableRowError, match=reason):
        rows.parse(row(**columns))


def test_other_columns_become_tags_of_the_row_or_of_its_turns():
    two = [{"role": role, "content": f"{role}{n}"} for n in "12" for role in ("user", "assistant")]
    found = rows.parse(row(messages=two, domain="d", kind=["k1", "k2"], three=["a", "b", "c"], number=3))
    assert found.tags == {"domain": "d", "kind": ["k1", "k2"]}
    assert found.tags_of(1) == {"domain": "d", "kind": "k2"}
    blank = [{**message, "content": " "} if message["content"] == "user1" else message for message in two]
    kept = rows.usable(rows.parse(row(messages=blank, kind=["k1", "k2"])))
    assert kept.tags_of(0) == {"kind": "k2"}  # a tag goes with its turn
    with pytest.raises(UnusableRowError, match="lone surrogate"):
        rows.parse(row(messages=two, kind=["k1", "half \ud83d"]))


def test_a_table_that_mixes_spellings_of_messages_is_read():
    filled = [{"role": None, "content": None, "from": "human", "value": "q"},
              {"role": None, "content": None, "from": "gpt", "value": "a"}]  # fmt: skip
    assert rows.parse(row(messages=filled)).turns == (Turn("q", "a"),)


# ------------------------------------------------------------------------------------------------ field names

SHAPES = [
    {"instruction": "q", "input": "c", "output": "a"},
    {"instruction": "q", "response": "a"},
    {"question": "q", "answer": "a"},
    {"prompt": "q", "response": "a"},
    {"prompt": "q", "completion": "a"},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"text": "<s>[INST] q [/INST] a </s>"},
]
SPELLED = st.tuples(
    st.sampled_from([str, str.upper, str.title, str.swapcase]),
    st.sampled_from(["", " ", "\t", "\ufeff", "\ufeff "]),
    st.sampled_from(["", " ", "\n", "\u00a0"]),
)


@given(st.sampled_from(SHAPES), st.sampled_from([{}, {"domain": "d", "kind": ["k"], "fact": "f"}]), st.data())
def test_case_and_space_make_no_other_field_of_a_name(shape, tags, drawn):
    def spelled(name):
        case, before, after = drawn.draw(SPELLED)
        return f"{before}{case(name)}{after}"

    columns = {**shape, **tags, "Source": "book"}
    other = {name if name == "Source" else spelled(name): value for name, value in columns.items()}
    assert rows.parse(row(**other)) == rows.parse(row(**columns))
    assert rows.parse(row(**other)).tags == {**tags, "Source": "book"}  # a name that means nothing here stays


@given(st.sampled_from(SHAPES), st.dictionaries(st.sampled_from(
    ["Question", "Answer", "TEXT", "Messages", " prompt", "Response", "OUTPUT", "Instruction"]
), st.text(min_size=1, max_size=3), max_size=4))  # fmt: skip
def test_a_row_of_exact_names_is_read_by_these_whatever_stands_beside_them(shape, beside):
    found = rows.parse(row(**beside, **shape))
    assert found.turns == rows.parse(row(**shape)).turns
    assert found.tags == beside


def test_of_two_spellings_the_exact_one_is_read_and_else_both_are_told():
    found = rows.parse(row(Question="q", Answer="b", answer="a", ANSWER="c"))
    assert found.turns == (Turn("q", "a"),)
    assert found.tags == {"Answer": "b", "ANSWER": "c"}
    for columns, told in (
        ({"question": "q", "Answer": "a", "ANSWER ": "b"}, r"'Answer' and 'ANSWER ' both read as answer"),
        ({"instruction": "q", "output": "a", "Input": "b", "INPUT": "c"}, "'Input' and 'INPUT' both read as input"),
        ({"question": "q", "answer": "a", "Kind": "b", "KIND": "c"}, "'Kind' and 'KIND' both read as kind"),
    ):
        with pytest.raises(UnusableRowError, match=told + "; rename or remove one"):
            rows.parse(row(**columns))


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ("question,Question,answer", "'question' and 'Question' both read as question"),
        ("Question,question ,answer", "'Question' and 'question ' both read as question"),
        ("question,answer,ANSWER", "'answer' and 'ANSWER' both read as answer"),
        ("question,answer,Input ,input", "'Input ' and 'input' both read as input"),
    ],
)
def test_two_spellings_in_a_table_are_told_even_if_one_is_exact(names, told):
    """In a table somebody has written both; which one is meant nobody can know."""
    columns = dict.fromkeys(names.split(","), "x")
    with pytest.raises(UnusableRowError, match=f"{told}; rename or remove one"):
        rows.parse(Row("rows.csv", 0, columns))
    more = dict.fromkeys(["question", "answer", "Notes", "notes"], "x")  # no names that are read
    assert rows.parse(Row("rows.csv", 0, more)).tags == {"Notes": "x", "notes": "x"}


def test_a_column_without_a_name_is_no_tag():
    assert rows.parse(row(**{"question": "q", "answer": "a", "": "b", " ": "c", "kind": "d"})).tags == {"kind": "d"}


def test_prose_under_text_does_not_hide_a_question_and_its_answer():
    columns = {"text": "A page of prose.", "Question": "q", "Answer": "a"}
    assert rows.parse(row(**columns)).turns == (Turn("q\n\nA page of prose.", "a"),)


def test_tags_that_scores_are_told_by_are_among_those_that_are_found():
    from qlora_utils.answers import GROUPS

    assert set(GROUPS) - {"turn"} <= set(rows.TAGS)


def test_what_is_expected_names_all_that_is_read():
    for where in ("questions.csv", "questions.jsonl"):
        with pytest.raises(UnusableRowError) as refused:
            rows.parse(Row(where, 0, {"head": "q", "tail": "a"}))
        told = f"{where} row 0: {refused.value}"
        for shape in SHAPES:
            is_list = isinstance(next(iter(shape.values())), list)
            for name in shape.keys() - {"input"}:
                assert (name in told) == (not is_list or where == "questions.jsonl")  # no cell of a CSV is a list
                assert len(shape) == 1 or name in told[:150]  # more is cut where it is shown


@pytest.mark.parametrize("name", ["What is it?", "It is 7.", "so and so and so on", "什么？", "x" * 50])
def test_a_csv_whose_first_line_is_a_row_is_told_to_name_its_columns(name):
    for where, told in (("rows.CSV", True), ("rows.jsonl", False)):
        with pytest.raises(UnusableRowError) as refused:
            rows.parse(Row(where, 0, {name: "q", "a": "a"}))
        assert str(refused.value).startswith("the first line must name the columns, as in question,answer") == told
    with pytest.raises(UnusableRowError, match=r"columns Frage, Antwort: expected in the first line instruction/"):
        rows.parse(Row("rows.csv", 0, {"Frage": "q", "Antwort": "a"}))


# ------------------------------------------------------------------------------------------------ hostile text


@given(st.lists(st.tuples(st.text() | HOSTILE, st.text() | HOSTILE), min_size=1, max_size=4), st.just("") | HOSTILE)
@settings(max_examples=500, deadline=None)
def test_parse_undoes_render_whatever_people_write(pairs, system):
    turns = tuple(Turn(*pair, "" if index else system) for index, pair in enumerate(pairs))
    text = rows.render(turns)
    for mark in ("<s>", "</s>", "[INST]", "[/INST]"):
        assert text.count(mark) == len(turns)  # of the format alone
    assert text.count("<<SYS>>") == text.count("<</SYS>>") == bool(system)
    assert rows.parse(row(text=text)).turns == turns
    assert rows.parse(row(text=text)).text == text


@given(HOSTILE)
def test_a_defused_text_spells_no_mark_and_comes_back(text):
    safe = defused(text, rows.MARKS + ENDS)
    assert not [mark for mark in rows.MARKS + ENDS if mark in safe]
    assert restored(safe) == text
    assert safe.replace(rows.JOINER, "") == text.replace(rows.JOINER, "")
    assert defused("Why?") == "Why?"


@pytest.mark.real_data
def test_parse_and_render_undo_each_other_on_the_real_rows(real_rows):
    assert len(real_rows) == 1000
    for text in real_rows:
        conversation = rows.parse(row(text=text))
        assert conversation.text == text
        assert rows.parse(row(text=conversation.text)).turns == conversation.turns
        assert not any(rows.JOINER in turn.question + turn.answer for turn in conversation.turns)


ROWS = 10_000
TEXT = st.one_of(
    st.sampled_from(["", " ", "\n", "Why?", "because", "\ud83d", "\u200f\u202eabc", "\x00\x1b[2J", "نعم", "答え"]),
    st.text(st.characters(exclude_categories=()), max_size=12),  # surrogates and control characters too
    HOSTILE,
)


@st.composite
def any_row(draw):
    """A row of some shape, and its texts as they went in: (system, [(question, answer), …], question left open)."""
    shape = draw(st.sampled_from(["text", "marks", "messages", "conversations", "question", "instruction"]))
    many = shape in ("text", "marks", "messages", "conversations")
    pairs = draw(st.lists(st.tuples(TEXT, TEXT), min_size=0 if many else 1, max_size=3 if many else 1))
    system = draw(st.just("") | TEXT) if shape in ("text", "messages", "conversations") else ""
    system = system if pairs else ""
    left = draw(st.none() | TEXT) if many else None
    if shape == "marks":  # this shape has no way to say that a mark is meant as text
        pairs = [tuple(part.replace("###", "").strip() for part in pair) for pair in pairs]
        left = left and left.replace("###", "")
        text = "".join(f"### Human: {q} ### Assistant: {a}" for q, a in pairs)
        return {"text": text + (f"### Human: {left}" if left is not None else "")}, (system, pairs, left)
    if shape == "text":
        text = rows.render(Turn(*pair, "" if index else system) for index, pair in enumerate(pairs))
        opened = "<s>" + defused(rows.prompt_text(left), ENDS) if left is not None else ""
        return {"text": text + opened}, (system, pairs, left)
    if shape in ("messages", "conversations"):
        role, content = ("role", "content") if shape == "messages" else ("from", "value")
        said = [("system", system)] if system else []
        said += [one for pair in pairs for one in zip(("user", "assistant"), pair, strict=True)]
        said += [("user", left)] if left is not None else []
        return {shape: [{role: who, content: what} for who, what in said]}, (system, pairs, left)
    if shape == "question":
        return dict(zip(("question", "answer"), pairs[0], strict=True)), (system, pairs, left)
    context = draw(TEXT)
    ((instruction, output),) = pairs
    asked = "\n\n".join(text for text in (instruction, context) if text.strip()) or instruction
    return {"instruction": instruction, "input": context, "output": output}, (system, [(asked, output)], left)


def reason_to_reject(system, pairs):
    """Why a row may be left out: half a character in it, or nothing that is asked and answered."""
    said = [system, *(part for pair in pairs for part in pair)] if pairs else []
    if any(0xD800 <= ord(character) <= 0xDFFF for text in said for character in text):
        return "lone surrogate"
    if not pairs:
        return r"no answered turn|no turn|neither \[INST\]"
    return None if any(q.strip() and a.strip() for q, a in pairs) else "every turn is blank"


@pytest.mark.slow
def test_ten_thousand_rows_of_anything_lose_no_answered_turn():
    """Read, written as JSON, and made into tokens for both architectures."""
    forms = []
    for preset in ("pocket", "pocket-t5"):
        config = RunConfig.from_preset(preset)
        forms.append(format_of(data.load_tokenizer(config), config))
    seen = 0

    @given(st.lists(any_row(), min_size=20, max_size=20))
    @settings(max_examples=ROWS // 20, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def check(batch):
        nonlocal seen
        kept = []
        for columns, (system, pairs, _) in batch:
            seen += 1
            expected = reason_to_reject(system, pairs)
            if expected:
                with pytest.raises(UnusableRowError, match=expected) as refused:
                    rows.usable(rows.parse(row(**columns)))
                str(refused.value).encode()
                continue
            conversation = rows.usable(rows.parse(row(**columns)))
            answered = [pair for pair in pairs if pair[0].strip() and pair[1].strip()]
            assert [(turn.question, turn.answer) for turn in conversation.turns] == answered
            assert json.loads(json.dumps(asdict(conversation), ensure_ascii=False).encode())["turns"][0]["answer"]
            kept.append(conversation)
        for form in forms:
            eos = form.tokenizer.eos_token_id
            examples = form.examples(kept, training=True)
            learned = [label for example in examples for label in example.labels if label != IGNORED]
            whole = form.config.max_seq_len > max((len(example.labels) for example in examples), default=0)
            assert not whole or learned.count(eos) == sum(len(conversation.turns) for conversation in kept)

    check()
    assert seen >= ROWS


def test_the_first_row_that_can_be_used_is_found():
    bad = Row("r", 0, None, "not valid JSON")
    good = Row("r", 1, {"question": "q", "answer": "a"})
    found, conversation = rows.first_readable({"held_out": [Row("h", 0, good.columns)], "train": [bad, good]})
    assert found is good
    assert conversation.turns == (Turn("q", "a"),)
    for source, reason in (({"train": [bad]}, "r row 0: not valid JSON"), ({"train": []}, "no rows")):
        with pytest.raises(DataError, match=reason):
            rows.first_readable(source)
