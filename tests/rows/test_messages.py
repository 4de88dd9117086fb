from __future__ import annotations

import pytest

from qlora_utils.rows.conversations import Turn, parse, usable
from qlora_utils.rows.messages import NOT_READ, WEIGHT, has_value, is_given
from qlora_utils.rows.readers import Row, UnusableRowError


def read(*messages, name="messages", **columns):
    return usable(parse(Row("r", 0, {name: list(messages), **columns})))


def user(content="q", **fields):
    return {"role": "user", "content": content, **fields}


def assistant(content="a", **fields):
    return {"role": "assistant", "content": content, **fields}


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize(
    "fields",
    [{"weight": 0}, {"weight": 0.0}, {"weight": False}, {"train": False}, {"training": False}, {"trainable": False},
     {"Weight": 0}, {"loss_mask": 0}, {"loss_weight": 0}, {"is_masked": True}, {"lossMask": 0},
     {"loss": 0}, {"masked": True}, {"mask": 1}, {"weight": 1, "train": False}],
)  # fmt: skip
def test_an_answer_of_weight_0_stays_in_the_conversation_and_is_only_shown(fields):
    found = read(user("q"), assistant("wrong", **fields), user("again"), assistant("right", weight=1))
    assert found.turns == (Turn("q", "wrong"), Turn("again", "right"))
    assert (found.shown, found.learned) == ((0,), [1])
    shared = read({"from": "human", "value": "q"}, {"from": "gpt", "value": "a", **fields}, user(), assistant())
    assert shared.shown == (0,)


@pytest.mark.parametrize(
    "fields", [{}, {"weight": 1}, {"weight": 1.0}, {"weight": None}, {"train": True}, {"masked": False}, {"loss": True}]
)
def test_an_answer_of_weight_1_or_none_is_learned(fields):
    assert read(user(weight=0), assistant(**fields)).shown == ()


@pytest.mark.parametrize("value", [0.5, 2, -1, "0", "yes", [0]])
def test_any_other_weight_is_refused(value):
    with pytest.raises(UnusableRowError, match=r"messages\[1\] has weight '.+', expected 0 or 1"):
        read(user(), assistant(weight=value))
    with pytest.raises(UnusableRowError, match="an answer is learned as a whole"):
        read(user(), assistant(train_detail=[{"begin_offset": 0, "end_offset": 1, "train": False}]))


def test_a_row_without_an_answer_to_learn_is_left_out():
    with pytest.raises(UnusableRowError, match="no answer is to be learned: each has weight 0"):
        read(user(), assistant(weight=0))
    with pytest.raises(UnusableRowError, match="each has weight 0"):
        read(user(), assistant(weight=0), user("r"), assistant(" "))  # the blank turn is dropped


def test_the_numbers_of_shown_answers_follow_when_blank_turns_are_dropped():
    found = read(user(" "), assistant(), user(), assistant("wrong", weight=0), user("r"), assistant("right"))
    assert (len(found.turns), found.shown) == (2, (0,))


# ------------------------------------------------------------------------------------------------ contents


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "What "}, {"type": "text", "text": "is it?"}],
        [{"type": "input_text", "text": "What is it?"}],
        [{"text": "What is it?"}],
        ["What is ", {"type": "text", "text": "it?", "image_url": None}],
        [{"type": None, "text": "What is it?", "image_url": None}],
    ],
)
def test_parts_of_text_are_joined(content):
    answered = assistant([{"type": "output_text", "text": "A thing."}])
    assert read(user(content), answered).turns == (Turn("What is it?", "A thing."),)
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert read(system, user(content), assistant()).turns[0].system == "Be brief."


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "a part of type image_url; only text is read"),
        ({"type": "input_audio", "input_audio": {"data": "x"}}, "a part of type input_audio; only"),
        ({"type": "image"}, "a part of type image;"),
        ({"type": "tool_use", "name": "f", "input": {}}, "a part of type tool_use;"),
        ({"type": "tool_result", "content": "4"}, "a part of type tool_result;"),
        ({"type": "thinking", "thinking": "hm"}, "a part of type thinking;"),
        ({"text": None, "image_url": "x"}, "a part of type image_url;"),
        ({"text": "q", "image": "y"}, "a part of type image;"),
        ({"type": "text", "text": "q", "image_url": {"url": "y"}}, "a part of type image_url;"),
        ({"type": "text"}, "a part of type text without text"),
        (7, "a part that is int"),
    ],
)
def test_other_parts_are_named_and_the_row_is_left_out(part, reason):
    with pytest.raises(UnusableRowError, match=r"messages\[0\] has " + reason):
        read(user([{"type": "text", "text": "q"}, part]), assistant())


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([user(), assistant(None, tool_calls=[{"id": "1"}])], r"messages\[1\] has tool_calls; calls of tools are not"),
        ([user(), assistant("a", function_call={"name": "f"})], r"messages\[1\] has function_call;"),
        ([user(), {"role": "tool", "content": "4"}], r"messages\[1\] has role tool, expected user or assistant"),
        *(
            ([user(**{name: ["x"]}), assistant()], rf"messages\[0\] has {name}; only text")
            for name in ("image_url", "imagePath", "image_base64", "attachments", "Images", "photo")
        ),
        *(
            ([user(), assistant(**{name: [{"name": "f"}]})], rf"messages\[1\] has {name}; calls of tools")
            for name in ("tools", "functions", "Tool_Calls", "toolCalls")
        ),
        ([user(images=["a.png"]), assistant()], r"messages\[0\] has images; only text is read"),
        ([user(None), assistant()], r"messages\[0\] has no text under content or value"),
    ],
)
def test_calls_and_pictures_of_a_message_are_refused(messages, reason):
    with pytest.raises(UnusableRowError, match=reason):
        read(*messages)
    assert read(user(images=[], name="Ann"), assistant(tool_calls=None, function_call={})).turns == (Turn("q", "a"),)


@pytest.mark.parametrize("role", ["Assistant", "GPT", "chatgpt", "bing", "bard"])
def test_roles_are_known_in_any_case_of_letters(role):
    messages = [{"role": "System", "content": "s"}, {"role": "User", "content": "q"}, {"role": role, "content": "a"}]
    assert read(*messages).turns == (Turn("q", "a", "s"),)


def test_a_list_of_texts_is_question_and_answer_in_turn():
    assert read("q", "a", "r", "b", name="conversations", source="x").turns == (Turn("q", "a"), Turn("r", "b"))
    with pytest.raises(UnusableRowError, match=r"conversations\[0\] is str, expected role and content"):
        read('{"role": "user", "content": "q"}', name="conversations")


def test_a_list_without_messages_beside_a_pair_says_nothing():
    assert read(question="q", answer="a").turns == (Turn("q", "a"),)  # `messages` is an empty list


def test_capybaras_pairs_are_turns_and_a_tag_of_that_name_is_none():
    talk = [{"input": "q", "output": "a"}, {"input": "r", "output": "b"}]
    assert read(*talk, name="conversation", source="x").turns == (Turn("q", "a"), Turn("r", "b"))
    tagged = parse(Row("r", 0, {"question": "q", "answer": "a", "conversation": "c7"}))
    assert tagged.tags == {"conversation": "c7"}


# ------------------------------------------------------------------------------------------------ system


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_prompt_comes_first_and_one_without_text_is_none(role):
    for content, system in (("Be brief.", "Be brief."), (None, ""), ("", ""), (" \n", "")):
        assert read({"role": role, "content": content}, user(), assistant()).turns == (Turn("q", "a", system),)
    late = {"role": role, "content": "now in German"}
    with pytest.raises(UnusableRowError, match=rf"messages\[2\] has role {role}, expected only before the first"):
        read(user(), assistant(), late, user(), assistant())
    nothing = {"role": role, "content": None}
    assert len(read(user(), assistant(), nothing, user("r"), assistant()).turns) == 2
    assert read(nothing, {"role": "developer", "content": "x"}, user(), assistant()).turns[0].system == "x"


# ------------------------------------------------------------------------------------------------ named


def test_fields_of_messages_are_named_with_what_they_were_read_as():
    roles = {}
    row = {"messages": [user(name="Ann"), assistant(reasoning_content="because", weight=1)]}
    parse(Row("r", 0, row), roles)
    assert roles == {"messages": "conversation", "messages[].name": NOT_READ, "messages[].reasoning_content": NOT_READ,
                     "messages[].weight": WEIGHT}  # fmt: skip


@pytest.mark.parametrize("value", [None, "", " \n", [], {}, [None, ""], {"text": None}, float("nan")])
def test_what_is_missing_has_no_value(value):
    assert not has_value(value)
    assert not is_given(value)


@pytest.mark.parametrize("value", [0, False, "0", "[]", [0], {"a": False}, 0.0])
def test_what_is_there_has_a_value(value):
    assert has_value(value)
    assert is_given(value) == (value != "[]")
