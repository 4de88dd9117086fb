from __future__ import annotations

import random

import matplotlib.pyplot as plt
import pytest
from conftest import MARKUP
from hypothesis import given
from hypothesis import strategies as st
from made_runs import PROBE

from qlora_utils.commands import run as runner
from qlora_utils.config import ConfigError, RunConfig
from qlora_utils.evaluation import compare, scores
from qlora_utils.report import render, sections
from qlora_utils.report.facts import gather
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import write_json, write_jsonl


def line(number, right, *, split="held-out rows", where="test.jsonl", text=None, history=(), answer=None, **tags):
    answer = answer or (f"a{number}" if right else "wrong")
    scored = {"answer": answer, "stopped": True, **dict.fromkeys(("exact_match", "f1", "rouge_l"), float(right))}
    return {"split": split, "text": text or f"q{number}", "expected": f"a{number}", "history": list(history),
            "where": where, "number": number, "tags": tags, "base": scored, "tuned": scored}  # fmt: skip


def made(folder, name, lines, *, trained=(), **changes):
    """A run directory with these answers to held-out questions and to `trained` ones, and no model."""
    config = RunConfig.from_preset("pocket", output_dir=str(folder), run_name=name, **changes)
    run = RunDirectory(config.run_dir)
    run.record(config)
    write_jsonl(run.answers, [*lines, *trained])
    run.add_metrics(train={"steps": 250, "kept_step": 200, "kept_loss": 0.5}, held_out={"questions": len(lines)})
    return run


def answered(seed, share, count=60, **tags):
    draw = random.Random(seed)
    return [line(n, draw.random() < share, split=f"split {n % 2}", **tags) for n in range(count)]


@pytest.fixture
def pair(tmp_path):
    return made(tmp_path, "one", answered(1, 0.9)), made(tmp_path, "two", answered(2, 0.6), lora_r=4)


def test_the_order_of_runs_swaps_the_sign_and_nothing_else(pair):
    there, back = compare.compare(pair), compare.compare(pair[::-1])
    (one,), (other,) = there["pairs"], back["pairs"]
    assert one["difference"] == -other["difference"] < 0
    assert one["interval"] == pytest.approx([-bound for bound in reversed(other["interval"])])
    assert (one["gained"], one["lost"]) == (other["lost"], other["gained"])
    assert one["p_value"] == other["p_value"] < 0.05
    assert there["scores"] == back["scores"]
    assert there["disagreements"]["count"] == back["disagreements"]["count"] == one["gained"] + one["lost"]


def test_questions_with_another_system_text_are_others(tmp_path):
    told = [{**line(n, True), "system": "Be brief."} for n in range(3)]
    earlier = [line(n, True) for n in range(3)]  # of an earlier version: the key is not there
    assert compare.shared([told, told]) == [(one, one) for one in told]
    assert compare.shared([told, earlier]) == []
    assert compare.shared([earlier, [{**one, "system": ""} for one in earlier]])


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
@pytest.mark.parametrize("text", MARKUP)
def test_names_of_splits_and_runs_are_no_formulas(tmp_path, text):
    runs = [
        made(tmp_path, name, [line(n, n % 2, split=f"{text} {n % 3}") for n in range(9)]) for name in ("one", "two")
    ]
    comparison = compare.compare(runs)
    comparison["runs"][0]["name"] = "one"
    figure, ax = plt.subplots()
    compare.plot(comparison, ax)
    figure.savefig(tmp_path / "figure.png")
    plt.close(figure)
    assert not set(compare.summary(comparison)) & {"\x1b", "\r", "\x9b"}


def test_a_run_beside_itself_differs_in_nothing(pair):
    same = compare.compare([pair[0], pair[0]])
    assert [run["name"] for run in same["runs"]] == ["one", "one (2)"]
    assert same["disagreements"] == {"count": 0, "shown": []}
    (found,) = same["pairs"]
    assert (found["difference"], found["p_value"], found["p_holm"]) == (0, 1, 1)
    assert found["interval"][0] < 0 < found["interval"][1]  # 60 questions cannot exclude a small difference
    assert same["differences"] == {}
    assert "right on the same questions" in compare.summary(same)


def test_intervals_hold_what_they_are_of(pair):
    found = compare.compare(pair)
    groups = [found["scores"], *(group["scores"] for group in found["splits"].values())]
    for section in (section for group in groups for section in group.values()):
        for name, (low, high) in section["intervals"].items():
            assert low <= section[name] <= high
    (two,) = found["pairs"]
    assert two["interval"][0] <= two["difference"] <= two["interval"][1]
    exact = [found["scores"][name]["exact_match"] for name in ("one", "two")]
    assert two["difference"] == pytest.approx(exact[1] - exact[0], abs=1e-4)
    assert sum(group["questions"] for group in found["splits"].values()) == found["questions"]["shared"] == 60


def test_questions_about_one_entity_make_the_interval_wider(tmp_path):
    """Ten entities, each asked ten times and all right or all wrong, tell as much as ten questions."""
    right = {"one": [n // 10 < 8 for n in range(100)], "two": [n // 10 in (0, 1, 2, 3, 9) for n in range(100)]}
    by_entity = [
        made(tmp_path / "by entity", name, [line(n, r, entity=f"e{n // 10}") for n, r in enumerate(rights)])
        for name, rights in right.items()
    ]
    apart = [made(tmp_path, name, [line(n, r) for n, r in enumerate(rights)]) for name, rights in right.items()]
    whole, single = compare.compare(by_entity), compare.compare(apart)
    (low, high), (single_low, single_high) = whole["pairs"][0]["interval"], single["pairs"][0]["interval"]
    assert high - low > 2 * (single_high - single_low)
    assert whole["pairs"][0]["p_value"] == single["pairs"][0]["p_value"] < 0.05
    assert "more than chance" in compare.pair_texts(single)[0]
    assert "may be chance" in compare.pair_texts(whole)[0]  # though p alone would call it shown
    assert "100 questions are about 10 entities" in compare.caveat(whole)
    assert compare.caveat(single) == ""


def test_only_held_out_questions_that_all_were_asked_count(tmp_path):
    """Training rows may call their split what they like; they come after the held-out ones."""
    trained = [line(n, True, split="trained entities") for n in range(90, 99)]
    runs = [
        made(tmp_path, "a", [line(n, True) for n in range(10)], trained=trained),
        made(tmp_path, "b", [line(n, False) for n in range(4, 20)], trained=trained),
        made(tmp_path, "c", [line(n, False) for n in reversed(range(6, 30))], trained=trained),
    ]
    found = compare.compare(runs)
    assert [(run["name"], run["asked"]) for run in found["runs"]] == [("a", 10), ("b", 16), ("c", 24)]
    assert found["questions"] == {"shared": 4, "clusters": 4}
    assert [one["text"] for one in found["disagreements"]["shown"]] == ["q6", "q7", "q8", "q9"]
    lost = {(one["first"], one["second"]): one["lost"] for one in found["pairs"]}
    assert lost == {("a", "b"): 4, ("a", "c"): 4, ("b", "c"): 0}
    assert "a 4 of 10, b 4 of 16, c 4 of 24" in compare.questions_text(found)


def test_without_metrics_training_rows_are_known_by_the_name_of_their_split(tmp_path):
    run = made(tmp_path, "a", [line(1, True)], trained=[line(2, True, split="training rows")])
    run.metrics.unlink()
    assert [one["number"] for one in compare.held_out(run)] == [1]


def test_a_question_is_its_text_its_history_and_what_was_expected():
    before = [{"question": "q", "answer": "a"}]
    asked = [line(1, True), line(2, True, history=before), line(3, True)]
    elsewhere = [line(1, True, where="/other/folder/renamed.csv"), line(2, True), {**line(3, True), "expected": "else"}]
    assert [tuple(one["number"] for one in together) for together in compare.shared([asked, elsewhere])] == [(1, 1)]


def test_a_question_that_stands_in_several_rows_counts_as_often_as_all_were_asked_it():
    def rows(*numbers, where="t"):
        return [{**line(0, True, text="again", where=where), "number": number} for number in numbers]

    def places(*asked):
        return [tuple(one["number"] for one in together) for together in compare.shared(asked)]

    assert places(rows(1, 2, 3), rows(3)) == [(3, 3)]  # the same row, not the first
    assert places(rows(3, 1), rows(1, 2, 3)) == [(3, 3), (1, 1)]
    assert places(rows(1, 2), rows(1, 5)) == [(1, 1), (2, 5)]  # another row, the same question
    assert places(rows(1, 2), rows(7, 8, 9, where="u"), rows(2)) == [(1, 7, 2)]
    assert places(rows(1), rows(1), rows()) == []


@given(st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=2, max_size=3))
def test_no_answer_is_used_twice(asked):
    runs = [[{**line(n, True, text=f"q{t}"), "expected": ""} for n, t in enumerate(texts)] for texts in asked]
    together = compare.shared(runs)
    assert len(together) == sum(min(texts.count(t) for texts in asked) for t in range(4))
    for index in range(len(runs)):
        assert len({id(row[index]) for row in together}) == len(together)
    assert all(len({one["text"] for one in row}) == 1 for row in together)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_between_no_correction_and_bonferroni(p_values):
    corrected = scores.holm(p_values)
    for p, after in zip(p_values, corrected, strict=True):
        assert p <= after <= min(1.0, len(p_values) * p)
        assert all(after <= b for a, b in zip(p_values, corrected, strict=True) if p <= a)
    assert scores.holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [([1, 0], [1, 0], (-0.8419, 0.8419)), ([0], [1], (-0.95, 1)), ([1] * 40, [0] * 40, (-1, -0.8238))],
)
def test_a_difference_without_spread_keeps_an_interval(before, after, expected):
    found = scores.difference_interval(before, after, range(len(before)))
    assert found == pytest.approx(expected, abs=1e-4)


def test_many_disagreements_are_counted_and_some_kept(tmp_path):
    runs = [made(tmp_path, name, [line(n, right) for n in range(1000)]) for name, right in (("a", True), ("b", False))]
    found = compare.compare(runs)["disagreements"]
    assert found["count"] == 1000
    kept = [int(one["text"][1:]) for one in found["shown"]]
    assert kept == list(range(0, 1000, 5)) and len(kept) == compare.SAVED_DISAGREEMENTS
    assert compare.sample_evenly([1, 2], 5) == [1, 2] and compare.sample_evenly([], 5) == []


def test_what_the_runs_are_and_in_what_they_differ(pair):
    found = compare.compare(pair)
    assert found["differences"] == {"lora_r": {"one": 16, "two": 4}}
    assert compare.facts(found) == {
        "preset": ["pocket", "pocket"], "lora_r": ["16", "4"], "adapter of step": ["200", "200"],
        "held-out loss": ["0.5000", "0.5000"],
    }  # fmt: skip
    assert "exact match, split 1 (30)" in compare.score_rows(found)


def test_what_each_run_forgot_is_a_row_and_runs_of_earlier_versions_have_a_dash(pair, tmp_path):
    older = made(tmp_path, "older", answered(1, 0.9))
    pair[0].add_metrics(probe=PROBE)
    pair[1].add_metrics(probe={"questions": 0, "unjudged": "The probe means nothing."})
    comparison = compare.compare([*pair, older])
    assert compare.facts(comparison)["forgotten: probe perplexity"] == ["+12.7% [+10.5, +15]", "not judged", "-"]
    assert "+12.7% [+10.5, +15]" in compare.summary(comparison)
    assert "forgotten: probe perplexity" not in compare.summary(compare.compare([older, older]))
    pair[0].add_metrics(probe={"interval": "wide"})
    with pytest.raises(ValueError, match=r"metrics.json: damaged, probe: expected a difference with its interval"):
        compare.compare(pair)


def test_runs_called_alike_are_told_apart(tmp_path):
    runs = [made(tmp_path / folder, "run", [line(1, True)]) for folder in ("x", "y")]
    assert [run["name"] for run in compare.compare(runs)["runs"]] == ["x/run", "y/run"]


def test_what_cannot_be_compared_says_what_to_do(tmp_path, pair):
    with pytest.raises(ConfigError, match="two or more"):
        compare.compare(pair[:1])
    with pytest.raises(ConfigError, match=r"put to all of one, far.*--run-name far .*score_rows=300 --from 06"):
        compare.compare([pair[0], made(tmp_path, "far", [line(n, True) for n in range(500, 510)])])
    with pytest.raises(FileNotFoundError, match="run --run-name none"):
        compare.compare([pair[0], RunDirectory(tmp_path / "none")])
    pair[1].answers.unlink()
    with pytest.raises(FileNotFoundError, match=r"no answers yet.*--run-name two .*--from 01"):
        compare.compare(pair)
    pair[1].adapter.mkdir()
    with pytest.raises(FileNotFoundError, match="--from 06"):
        compare.compare(pair)
    write_jsonl(pair[1].answers, [line(1, True), {"text": "q"}])
    with pytest.raises(ValueError, match="line 2: no scored answer"):
        compare.compare(pair)


# ---------------------------------------------------------------------------------------------------- shown


def test_several_pairs_are_corrected_and_said_so(tmp_path, pair):
    three = compare.compare([*pair, made(tmp_path, "three", answered(3, 0.3))])
    assert all("Holm's correction for 3 pairs" in text for text in compare.pair_texts(three))
    assert not any("Holm" in text for text in compare.pair_texts(compare.compare(pair)))


def test_hostile_text_is_shown_as_text(tmp_path):
    hostile = "<script>alert(1)</script> $\\frac$"
    kinds = {"split": hostile, "text": hostile, "history": [{"question": hostile, "answer": hostile}]}
    runs = [
        made(tmp_path, name, [line(1, right, answer=hostile, **kinds), line(2, True)], dataset=hostile[: 9 + right])
        for name, right in (("a", True), ("b", False))
    ]
    one = runs[0]
    write_json(one.comparison, compare.compare(runs))
    render.write_report(one)
    page = one.report.read_text()
    assert "<script>" not in page
    section = page[page.index('id="beside"') : page.index('id="answers"')]
    assert section.count("&lt;script&gt;") >= 7


def test_a_dot_for_each_run_and_split(pair):
    figure, ax = plt.subplots()
    compare.plot(compare.compare(pair), ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["split 0 (30)", "split 1 (30)", "all (60)"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["one", "two"]
    plt.close(figure)


def test_a_new_run_of_the_name_leaves_no_comparison(pair):
    write_json(pair[0].comparison, compare.compare(pair))
    runner._remove_earlier_run(pair[0])
    assert not pair[0].comparison.exists()


def test_a_comparison_knows_when_answers_have_changed(pair):
    found = compare.compare(pair)
    assert compare.outdated(found) == []
    write_jsonl(pair[1].answers, answered(3, 0.5))
    assert compare.outdated(found) == ["two"]
    write_json(pair[0].comparison, found)
    part = render.render_part(render.load_macros(), sections.other_runs, gather(pair[0]))
    assert "Out of date:</strong> two" in part
    pair[0].answers.unlink()
    assert compare.outdated(found) == ["one", "two"]


def test_runs_that_group_by_other_columns_are_compared_by_both(tmp_path):
    by_entity = made(tmp_path, "one", [line(n, n % 2, entity=f"e{n // 2}") for n in range(12)])
    by_topic = made(tmp_path, "two", [line(n, n % 3, topic=f"t{n // 3}") for n in range(12)], group_by="topic")
    for runs in ([by_entity, by_topic], [by_topic, by_entity]):
        # Entities 0 and 1 share topic 0: six questions are one cluster.
        assert compare.compare(runs)["questions"] == {"shared": 12, "clusters": 2}
    assert compare.compare([by_entity, by_entity])["questions"]["clusters"] == 6
