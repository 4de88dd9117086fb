from __future__ import annotations

import json

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_utils import data
from qlora_utils.config import RunConfig
from qlora_utils.rows import columns, lines
from qlora_utils.rows.check import format_rejected
from qlora_utils.rows.conversations import Rejected, Turn, parse, usable
from qlora_utils.rows.readers import DataError, Row, UnusableRowError

CASES = ROOT.parent / "shared" / "cases"
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
PAIR = {"question": "Which?", "answer": "B"}


def read(**row):
    return usable(parse(Row("r", 0, row)))


def roles_of(**row):
    roles = {}
    parse(Row("r", 0, row), roles)
    return roles


# ------------------------------------------------------------------------------------------------ the question


@pytest.mark.parametrize(
    ("row", "question"),
    [
        # Dolly, and others that bring a text to answer from
        ({"instruction": "When?", "context": "In 1940.", "response": "a", "category": "qa"}, "When?\n\nIn 1940."),
        ({"question": "When?", "context": "In 1940.", "answer": "a"}, "When?\n\nIn 1940."),
        ({"question": "When?", "Passage ": "In 1940.", "answer": "a"}, "When?\n\nIn 1940."),
        ({"question": "When?", "document": "Opened in 1940.", "answer": "a"}, "When?\n\nOpened in 1940."),
        ({"prompt": "When?", "context": ["In 1940.", "", "May."], "completion": "a"}, "When?\n\nIn 1940.\n\nMay."),
        ({"instruction": "When?", "input": "1940.", "context": "Here.", "output": "a"}, "When?\n\n1940.\n\nHere."),
        # none, or one that the question has already
        ({"instruction": "When?", "context": "", "response": "a"}, "When?"),
        ({"instruction": "When?", "context": None, "response": "a"}, "When?"),
        ({"question": "In 1940. When?", "context": "In 1940.", "answer": "a"}, "In 1940. When?"),
        ({"question": "When?", "document": "handbook.pdf", "answer": "a"}, "When?"),
        ({"question": "When?", "article": 7, "answer": "a"}, "When?"),
        # names of files, and missing texts in a list
        ({"question": "When?", "documents": ["a.pdf", "Opened in 1940."], "answer": "a"}, "When?\n\nOpened in 1940."),
        ({"question": "When?", "document": "Employee handbook.pdf", "answer": "a"}, "When?"),
        ({"question": "When?", "context": ["In 1940.", None], "answer": "a"}, "When?\n\nIn 1940."),
        # other names of texts, and other spellings
        *(({"question": "When?", name: "In 1940.", "answer": "a"}, "When?\n\nIn 1940.")
          for name in ("sql_context", "context_text", "passage_text", "article_text", "retrieved_context", "context_1",
                       "retrieved_documents", "dialogue", "transcript", "evidence", "source_text", "Source Text",
                       "retrievedContext", "Passage-Text")),
        *(({"question": "When?", name: "7", "answer": "a"}, "When?")
          for name in ("context_id", "document_title", "article_url", "reference", "passage_name")),
        # a text is more of the question, unless it renders the row or has the answer
        ({"instruction": "Sort it.", "text": "I loved it", "output": "a"}, "Sort it.\n\nI loved it"),
        ({"question": "Sort it.", "text": "a", "answer": "a"}, "Sort it."),
        ({"instruction": "Go.", "text": "### Instruction: Go. ### Response: a", "output": "a"}, "Go."),
        ({"instruction": "Go.", "text": "### Instruction: Go. ### Response:", "output": "a"}, "Go."),
        # an instruction that is blank or missing
        ({"instruction": float("nan"), "input": "When?", "output": "a"}, "When?"),
        ({"instruction": "", "input": "When?", "output": "a"}, "When?"),
        ({"instruction": " ", "input": "When?", "output": "a"}, "When?"),
        ({"instruction": None, "input": "When?", "output": "a"}, "When?"),
        ({"input": "When?", "output": "a"}, "When?"),
        ({"instruction": None, "context": "In 1940.", "question": "When?", "response": "a"}, "When?\n\nIn 1940."),
        # an instruction beside the question
        ({"instruction": "In a word.", "question": "When?", "answer": "a"}, "In a word.\n\nWhen?"),
        ({"instruction": "In a word.", "question": "When?", "output": "a"}, "In a word.\n\nWhen?"),
        ({"instruction": "In a word.", "prompt": "When?", "response": "a"}, "In a word.\n\nWhen?"),
        ({"instruction": "In a word.", "query": "When?", "response": "a"}, "In a word.\n\nWhen?"),
        ({"Instruction": "In a word.", "Question": "When?", "Answer": "a"}, "In a word.\n\nWhen?"),
        ({"instruction": "When?", "question": "When?", "answer": "a"}, "When?"),
        # a prompt that is a rendering of the question
        ({"instruction": "When?", "output": "a", "prompt": "### Instruction: When? ### Response:"}, "When?"),
        ({"question": "When?", "prompt": "When?", "answer": "a"}, "When?"),
        ({"instruction": "Sum", "input": "1, 2", "output": "a", "prompt": "Sum\n1, 2"}, "Sum\n\n1, 2"),
        *(({"context": "In 1940.", "question": "When?", "answers": answers}, "When?\n\nIn 1940.")
          for answers in ({"text": ["a", "b"], "answer_start": [3, 4]},
                          [{"text": "a", "answer_start": 3}, {"text": "b", "answer_start": 4}])),
        # SQuAD, OpenOrca, MetaMath
        ({"context": "In 1940.", "question": "When?", "answers": {"text": ["a", "a"], "answer_start": [3, 3]}},
         "When?\n\nIn 1940."),
        ({"system_prompt": "", "question": "When?", "response": "a"}, "When?"),
        ({"query": "When?", "response": "a", "original_question": "x", "type": "y"}, "When?"),
    ],
)  # fmt: skip
def test_all_that_is_asked_stands_in_the_question(row, question):
    assert [(turn.question, turn.answer) for turn in read(**row).turns] == [(question, "a")]


@pytest.mark.parametrize(
    ("options", "answer", "listed"),
    [
        (["red", "blue"], "blue", "A. red\nB. blue"),
        (["red", "blue"], "B", "A. red\nB. blue"),
        (["red", "blue"], "It is blue, since the sky is.", "A. red\nB. blue"),
        (["A) red", "B) blue"], "B", "A) red\nB) blue"),
        ({"A": "red", "B": "blue"}, "B", "A. red\nB. blue"),
        ({"text": ["red", "blue"], "label": ["1", "2"]}, "2", "1. red\n2. blue"),
        (["4", "8"], "8", "A. 4\nB. 8"),
        ([{"label": "A", "text": "red"}, {"label": "B", "text": "blue"}], "B", "A. red\nB. blue"),
        ([{"key": "1", "value": "red"}, {"key": "2", "value": "blue"}], "2", "1. red\n2. blue"),
        ("A) red B) blue", "B", "A) red B) blue"),
    ],
)
def test_options_stand_in_the_question(options, answer, listed):
    for name in ("options", "Choices", "answer_choices", "Answer Options", "candidates"):
        assert (
            read(**{"question": "Which?", name: options, "answer": answer}).turns[0].question == f"Which?\n\n{listed}"
        )
    assert read(question=f"Which?\n{listed}", options=options, answer=answer).turns[0].question == f"Which?\n{listed}"


@pytest.mark.parametrize("question", ["In 1234, how many?", "Is it 1, 2, 3 or 4?"])
def test_options_found_by_chance_or_without_their_labels_are_still_listed(question):
    found = read(question=question, choices=["1", "2", "3", "4"], answer="D")
    assert found.turns[0].question == f"{question}\n\nA. 1\nB. 2\nC. 3\nD. 4"
    assert read(question="Is a category a cat?", options="cat", answer="a").turns[0].question.endswith("a cat?")
    assert read(question="A category?", options="cat", answer="a").turns[0].question == "A category?\n\ncat"
    assert read(question="A category?", context="cat", answer="a").turns[0].question == "A category?\n\ncat"


@pytest.mark.parametrize("name", ["System Prompt", "systemPrompt", "system-prompt"])
def test_a_name_with_spaces_hyphens_or_capitals_is_read(name):
    assert read(**PAIR, **{name: "Be brief."}).turns[0].system == "Be brief."
    history = "chat" + name.removeprefix("system").removeprefix("System").replace("Prompt", "History")
    history = history.replace("prompt", "history")
    assert len(read(**PAIR, **{history: [["r", "b"]]}).turns) == 2


def test_a_whole_number_is_an_answer_as_in_a_csv():
    assert read(question="2 + 2?", answer=4).turns == (Turn("2 + 2?", "4"),)


def test_options_in_columns_of_their_own_stand_in_the_question():
    for names in ("AB", ("option_a", "option_b"), ("Choice A", "Choice B")):
        row = {**PAIR, names[0]: "red", names[1]: "blue"}
        assert read(**row).turns[0].question == "Which?\n\nA. red\nB. blue"
        assert roles_of(**row)[names[1]] == columns.PART
    assert read(**PAIR, B="a tag").tags == {"B": "a tag"}


@pytest.mark.parametrize(
    "row",
    [{"instruction": "In a word.", "response": "a", "system": "Be brief."},
     {"system_prompt": "Be brief.", "question": "q", "response": "a"},
     {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "Be brief."},
     {"messages": [{"role": "system", "content": "Be brief."}, *MESSAGES], "system": "Be brief. "},
     {"text": "<s>[INST] q [/INST] a </s>", "System": "Be brief."}],
)  # fmt: skip
def test_a_system_column_is_the_system_prompt(row):
    found = read(**row)
    assert found.turns[0].system == "Be brief."
    assert found.tags == {}
    assert read(**{**row, "history": []}).turns == found.turns


@pytest.mark.parametrize(
    "history", [[["r", "b"], ("s", "c")], [{"from": "human", "value": "r"}, {"from": "gpt", "value": "b"},
                                           {"role": "user", "content": "s"}, {"role": "assistant", "content": "c"}]]
)  # fmt: skip
def test_a_history_is_the_earlier_turns(history):
    found = read(instruction="q", output="a", history=history, system="Be brief.")
    assert found.turns == (Turn("r", "b", "Be brief."), Turn("s", "c"), Turn("q", "a"))
    assert found.learned == [0, 1, 2]


# ------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        # preferences: DPO of LLaMA-Factory, UltraFeedback, HH-RLHF, Orca's pairs
        ({"messages": MESSAGES, "chosen": {"from": "gpt", "value": "a"}, "rejected": {"value": "b"}}, "chosen holds"),
        ({"prompt": "q", "messages": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES, "score_chosen": 8}, "chosen"),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "preference"),
        ({"system": "", "question": "q", "chosen": "a", "rejected": "b"}, "preference"),
        ({**PAIR, "rejected_response": "b"}, "rejected_response holds one answer of a preference"),
        ({**PAIR, "Rejected": "b"}, "Rejected holds one answer of a preference"),
        # KTO
        ({"messages": MESSAGES, "label": False}, "label is false: an answer to avoid"),
        ({"prompt": "q", "completion": "a", "label": "False"}, "label is false"),
        ({**PAIR, "kto_tag": 0}, "kto_tag is false"),
        ({**PAIR, "is_correct": "0"}, "is_correct is false"),
        ({**PAIR, "chosen": False}, "chosen is false: an answer to avoid"),
        ({**PAIR, "rejected": True}, "rejected is true: an answer to avoid"),
        *(({**PAIR, name: False}, f"{name} is false: an answer to avoid")
          for name in ("is_preferred", "isPreferred", "kto_label", "thumbs_up", "accepted", "Is Correct")),
        *(({**PAIR, name: True}, f"{name} is true: an answer to avoid") for name in ("is_rejected", "thumbs_down")),
        *(({**PAIR, "label": value}, "label is false: an answer") for value in ("undesirable", "rejected")),
        *(({**PAIR, name: "x"}, f"{name} holds one answer of a preference")
          for name in ("negative_response", "rejected_1", "rejectedResponse", "Rejected Response 2")),
        ({**PAIR, "weight": 0}, "weight is 0: the row is not to be learned"),
        ({**PAIR, "weight": "0"}, "weight is 0"),
        ({**PAIR, "train": False}, "train is False: the row"),
        # pictures, sounds, films
        *(({"messages": MESSAGES, name: ["i/0.jpg"]}, f"{name} has a value; only text")
          for name in ("images", "image", "audios", "videos", "Image_Path", "image url", "image_1", "picture",
                       "image_base64", "image_name", "image_file_name", "imageUri", "image_data",
                       "photo", "screenshot", "imagePath")),
        ({**PAIR, "image": {"bytes": b"x", "path": None}}, "image has a value"),
        ({**PAIR, "image_id": 9}, "image_id has a value"),
        ({"messages": [{"role": "user", "content": "<image>what is it?"}, MESSAGES[1]]}, "a question is about <image>"),
        ({"question": "What is it?\n<image>", "answer": "a"}, "a question is about <image>"),
        ({"question": "<audio>\nWhat is said?", "answer": "a"}, "a question is about <audio>"),
        # tools
        ({"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools has a value; calls of tools are not read"),
        ({"conversations": MESSAGES, "tools": '[{"name": "f"}]'}, "tools has a value"),
        ({**PAIR, "functions": [{"name": "f"}]}, "functions has a value"),
        # what cannot be placed
        ({**PAIR, "context": {"title": ["x"], "sentences": [["y"]]}}, "context is dict, expected text"),
        ({**PAIR, "documents": [{"text": "x"}]}, "documents is list of dict, expected text"),
        ({"instruction": "q", "input": ["x", 1], "output": "a"}, "input is list of str and int, expected text"),
        ({"messages": MESSAGES, "context": "In 1940."}, "context beside messages: put it into the message"),
        ({"messages": MESSAGES, "instruction": "In a word."}, "instruction beside messages"),
        ({"messages": MESSAGES, "input": "In 1940."}, "input beside messages"),
        ({"question": "Who?", "prompt": "Ben waved. Who?", "answer": "a"}, "prompt holds more than question; remove"),
        ({"instruction": "Who?", "prompt": "Ben waved. Who?", "output": "a"}, "prompt holds more than instruction"),
        ({"question": "Who?", "query": "What else?", "answer": "a"}, "query beside question: which of them"),
        ({"messages": MESSAGES, "history": [["r", "b"]]}, "history beside messages"),
        ({"messages": MESSAGES, "options": ["x", "y"]}, "options beside messages"),
        ({"text": "<s>[INST] q [/INST] a </s>", "context": "In 1940."}, "context beside text"),
        ({**PAIR, "prompt": "Something else?"}, "prompt beside question: which of them is asked is not known"),
        ({**PAIR, "history": "r"}, "history is str, expected a list of pairs"),
        ({**PAIR, "history": [["r"]]}, "history is list of list, expected a list of pairs"),
        ({**PAIR, "system": ["Be brief."]}, "system is list, expected text"),
        ({"messages": [{"role": "system", "content": "x"}, *MESSAGES], "system": "y"}, "two system prompts that"),
        ({**PAIR, "system": "x", "system_prompt": "y"}, "two system prompts that differ"),
        ({"question": "q", "options": ["red", "blue"], "answer": "1"}, "options: the answer '1' names none of A, B"),
        ({"question": "q", "options": ["red", "blue"], "answer": "C"}, "options: the answer 'C' names none of A, B"),
        ({"question": "q", "choices": ["red", "blue"], "answer": 1}, "choices: the answer '1' names none of A, B"),
        ({"question": "q", "answer": 1.5}, "answer is float, expected text"),
        ({"question": "q", "options": [1, 2], "answer": "1"}, "options is list of int, expected a list of texts"),
        ({"question": "q", "answers": {"text": ["a", "b"]}}, "answers holds 2 different texts"),
        ({"question": "q", "context": "c", "answers": {"text": [], "answer_start": []}}, "no answered turn"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_the_reason(row, reason):
    with pytest.raises(UnusableRowError, match=reason) as refused:
        read(**row)
    assert len(f"rows.jsonl row 0: {refused.value}") <= 150  # more is cut where it is listed


@pytest.mark.parametrize(
    "beside",
    [{"images": []}, {"images": "[]"}, {"image": None}, {"tools": "[]"}, {"tools": "a hammer"}, {"rejected": None},
     {"chosen_score": 7}, {"rejected": False}, {"label": "sport"}, {"label": 0}, {"label": True}, {"weight": 0.5},
     {"weight": "3 kg"}, {"weight": 1}, {"prompt_id": "x"}, {"history": []}, {"options": []}, {"system": None},
     {"tools": ["hammer"]}, {"rejected": "False"}, {"chosen": True}, {"label": "b"}, {"document": "a b.pdf"},
     {"context": ""}, {"imagery": "x"}, {"functions": None}, {"train": "to Rome"}],
)  # fmt: skip
def test_what_changes_nothing_is_let_be(beside):
    assert read(**PAIR, **beside).turns == (Turn("Which?", "B"),)
    assert read(messages=MESSAGES, **beside).turns == (Turn("q", "a"),)


def test_a_text_beside_a_conversation_that_holds_it_is_a_copy():
    beside = {"context": "q", "instruction": " q", "prompt": "q", "input": "q", "question": "y"}
    assert read(messages=MESSAGES, **beside).turns == (Turn("q", "a"),)


def test_a_label_that_is_the_answer_is_a_class():
    assert read(question="Is it so?", answer="False", label="False").turns == (Turn("Is it so?", "False"),)


def test_tags_of_html_are_no_pictures():
    for question in ("Why is this silent?\n<video>\n<source src=x>\n</video>", "What does <image> do in SVG?"):
        assert read(question=question, answer="a").turns[0].question == question


FIELDS = st.sampled_from(["role", "content", "weight", "text", "label", "type", "input"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
    | st.sampled_from(["q", "A", "1", "<image>", "[]", "user", "assistant", "text"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
NAMES = st.sampled_from(["instruction", "question", "answer", "Answers", "input", "output", "prompt", "messages",
                         "text", "conversation", "Context", "documents", "options", "A", "B", "system", "history",
                         "label", "weight", "images", "chosen", "tools", "split", "id", "\x00", ""])  # fmt: skip


@given(st.dictionaries(NAMES, VALUES, max_size=5))
@settings(max_examples=500, deadline=None)
def test_whatever_stands_in_a_row_it_is_read_or_refused_and_its_columns_are_counted(row):
    roles = {}
    try:
        found = parse(Row("r", 0, row), roles)
        assert all(isinstance(text, str) for turn in found.turns for text in vars(turn).values())
        lines.format_line(found)
    except UnusableRowError as refused:
        str(refused).encode()
        roles = None
    counts = columns.count_columns([(row, roles)])
    assert {name for name in row if name.strip()} <= counts.keys()
    assert all(sum(by_role.values()) <= 1 for by_role in counts.values())
    json.dumps(counts).encode()


# ------------------------------------------------------------------------------------------------ the report


def prepared(folder, tokenizer, rows):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    config = RunConfig.from_preset("pocket", dataset=str(path), output_dir=str(folder / "outputs"))
    return data.prepare(config, tokenizer)


def test_every_column_is_named_with_its_rows_and_what_it_was_read_as(tmp_path, tokenizer):
    rows = []
    for n in range(10):
        note = "c" if n < 4 else ""
        rows.append({"instruction": f"i{n}", "context": note, "response": "r", "id": n, "kind": "k", "empty": None})
    rows += [{"Question": f"q{n}", "Answer": "a", "note": "x"} for n in range(5)]
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1, "name": "Ann"}]
    rows += [{"messages": talk, "images": ["x"] if n else []} for n in range(3)]
    report = prepared(tmp_path, tokenizer, rows).report
    assert columns.column_rows(report) == [
        ("instruction", 10, "question"), ("context", 4, "part of the question"), ("response", 10, "answer"),
        ("id", 10, "not read"), ("kind", 10, "tag: scored apart"), ("empty", 0, "no value in any row"),
        ("Question", 5, "question"), ("Answer", 5, "answer"), ("note", 5, "not read"),
        ("messages", 3, "conversation (1), left out with its row (2)"), ("images", 2, "left out with its row"),
        ("messages[].weight", 1, "weight: 0 is not learned"), ("messages[].name", 1, "not read"),
    ]  # fmt: skip
    table = data.columns_table(report)
    assert [*table.columns] == ["rows", "read as"]
    assert table.loc["context"].tolist() == [4, "part of the question"]
    assert columns.format_columns(report).splitlines()[2] == f"{'context':<17}     4  part of the question"
    assert columns.column_rows({}) == []  # a report of an earlier version


def test_rows_left_out_after_they_were_read_count_as_left_out(tmp_path, tokenizer):
    rows = [{"question": f"q{n}", "answer": "a"} for n in range(9)] + [{"question": "q", "answer": " "}]
    report = prepared(tmp_path, tokenizer, rows).report
    assert columns.column_rows(report)[0] == ("question", 10, "question (9), left out with its row (1)")


def test_a_report_does_not_grow_with_columns_that_each_row_has_for_itself(tmp_path, tokenizer):
    rows = [{"question": f"q{n}", "answer": "a", f"\x1b[2J{n}" + "x" * 999: "y"} for n in range(columns.LISTED + 50)]
    report = prepared(tmp_path, tokenizer, rows).report
    assert len(report["columns"]) == columns.LISTED
    assert report["columns"]["question"] == {"question": len(rows)}
    assert "\x1b" not in columns.format_columns(report)
    assert max(map(len, report["columns"])) <= 80


# ------------------------------------------------------------------------------------------------ the cases


@pytest.mark.skipif(not CASES.is_dir(), reason=f"{CASES} is not there")
@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("01_dolly_context", ["question: Using the note, when did ferry line 0 open? Ferry line 0 was opened in 1940",
                              "context 20 part of the question", "category 20 not read"]),
        ("04_empty_instruction", ["question: What does dose 0 do?", "instruction 0 no value in any row"]),
        ("06_weight_zero", ["answer: (not learned) wrong 0", "messages[].weight 20 weight: 0 is not learned"]),
        ("07_content_parts", ["question: q 0", "messages 20 conversation"]),
        ("50_system_kinds", ["10 × messages[2] has role system, expected only before the first question",
                             "10 rows left out", "messages[].reasoning_content 10 not read"]),
        ("60_preference_dpo", ["Rows left out: 30", "chosen holds one answer of a preference"]),
        ("61_kto_label", ["15 × label is false: an answer to avoid, not one to learn", "label 30 label: false is"]),
        ("62_images", ["Rows left out: 30", "images has a value; only text is read"]),
        ("66_instruction_and_question", ["question: Answer with one word. Colour of 0?", "instruction 20 part of the"]),
    ],
)  # fmt: skip
def test_a_case_that_went_wrong_is_read_or_refused(case, said, tmp_path):
    config = RunConfig.from_preset("pocket", output_dir=str(tmp_path))
    try:
        found = data.check(str(CASES / case), config)
        text = found.text
        assert text.index("read as") < text.index("train / held-out")  # before anything is trained
    except DataError as error:
        text = str(error)
    flat = " ".join(text.split())
    for line in said:
        assert line in flat


def test_reasons_that_name_other_roles_are_counted_apart():
    rejected = []
    for number, role in enumerate(("system", "tool", "tool", "function")):
        messages = [*MESSAGES, {"role": role, "content": "x"}]
        with pytest.raises(UnusableRowError) as refused:
            read(messages=messages)
        rejected.append(Rejected("r", number, str(refused.value)))
    told = format_rejected(rejected)
    for count, role in ((1, "system"), (2, "tool"), (1, "function")):
        assert f"{count} × messages[2] has role {role}" in told
