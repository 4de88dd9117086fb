from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from conftest import MARKUP
from made_runs import PROBE, comparison, finished, told

from qlora_utils.evaluation import compare
from qlora_utils.report import figures, render
from qlora_utils.report.facts import gather
from qlora_utils.report.sentences import summary
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_json, read_jsonl, write_json, write_jsonl

KEYS = ("results", "verdict", "scores", "beside", "answers", "training", "memory", "data", "configuration", "again")
ATTRIBUTES = {"aria-label", "aria-labelledby", "charset", "class", "content", "dir", "href", "http-equiv", "id", "lang",
              "name", "open", "role", "scope", "tabindex"} | {
    # of pictures
    "clip-path", "d", "fill", "height", "style", "transform", "viewbox", "width", "x", "y",
}  # fmt: skip


def test_the_page_is_self_contained_and_escapes_what_it_is_given(tmp_path, tokenizer):
    import matplotlib.pyplot as plt

    hostile = "<script>alert(1)</script>"
    run = finished(tmp_path, tokenizer, hostile)
    figure, _ = plt.subplots()
    run.save_figure(figure, "05_loss")
    plt.close(figure)
    render.write_report(run)
    page = run.report.read_text()
    assert hostile not in page
    assert page.count("&lt;script&gt;") >= 8
    assert "before &lt;script&gt;" in page
    assert not re.findall(r'(?:src|href)="(?!#)|url\((?!#)|@import|<script|javascript:', page)
    assert "<code>05_loss.png</code>" in page


@pytest.mark.slow
def test_whatever_is_planted_a_page_has_its_own_elements_and_attributes_only(tmp_path, tokenizer):
    """In questions, answers, the turns before, tags, names of runs and groups, parameters and the names of figures."""
    pages, texts = [], []
    for number, text in enumerate(["plain", *MARKUP, " ".join(MARKUP)]):
        run = finished(tmp_path / str(number), tokenizer, text)
        stored, metrics = read_json(run.config), read_json(run.metrics)
        stored["config"].update(run_name=text, model=text, dataset=text, instruction=text)
        stored["versions"][text] = text
        write_json(run.config, stored)
        write_json(run.metrics, {**metrics, "groups": {**metrics["groups"], text: metrics["groups"]["split"]}})
        run.figures.mkdir()
        (run.figures / f"{text.replace('/', ' ')}.png").write_bytes(b"")
        write_json(run.comparison, comparison(run, text))
        render.write_report(run)
        texts.append(run.report.read_text())
        pages.append(made_of(texts[-1]))
        tags = {tag for tag, _ in pages[-1]}
        assert not {"script", "iframe", "object", "embed", "form", "img", "image", "link"} & tags
        targets = set(re.findall(r' href="([^"]*)"', run.report.read_text()))
        assert {target for target in targets if not target.startswith("#figure-")} <= {f"#{key}" for key in KEYS}
        assert not set(run.report.read_text()) & {"\x1b", "\x07", "\r", "\x9b", "\u202e"}
        assert "\x1b" not in summary(run)
    assert {name for page in pages for _, names in page for name in names} <= ATTRIBUTES
    # How many ticks and lines of text a picture has goes by the length of its labels.
    assert {tag for page in pages for tag, _ in page} <= {tag for tag, _ in pages[0]} | {"tspan"}
    outside = [made_of(re.sub("(<svg[^>]*>).*?</svg>", r"\1</svg>", text, flags=re.DOTALL)) for text in texts]
    assert all(page == outside[0] for page in outside)


def made_of(page):
    """Every element of a page with the names of its attributes, in order."""
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, [name for name, _ in attributes]))
    parser.feed(page)
    return found


@pytest.mark.parametrize("text", MARKUP)
def test_a_comparison_on_the_terminal_has_nothing_that_it_would_obey(tmp_path, tokenizer, text):
    said = compare.summary(comparison(finished(tmp_path, tokenizer, text), text))
    assert not set(said) & {"\x1b", "\x07", "\r", "\x9b", "\u202e"}


def test_a_run_without_scores_has_a_page_too(tmp_path, tokenizer):
    run = finished(tmp_path, tokenizer, "x")
    metrics = read_json(run.metrics)
    write_json(run.metrics, {"train": metrics["train"]})
    run.answers.unlink()
    render.write_report(run)
    assert "Not measured yet" in run.report.read_text()
    assert "exact match" not in summary(run)


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([3.0, 2.0, 1.0], ""),
        ([3.0, 1.0, 1.5], "it was 1.000 at step 1: overfitting"),
        ([3.0, 1.0, 4.0], "it was 1.000 at step 1: overfitting"),
        ([3.0, 3.5, 4.0], "it rose from the start: the learning rate may be too high"),
    ],
)
def test_summary_warns_where_the_held_out_loss_calls_for_it(tmp_path, tokenizer, losses, said):
    run = finished(tmp_path, tokenizer, "x")
    write_jsonl(run.history, [{"step": step, "eval_loss": loss} for step, loss in enumerate(losses)])
    (line,) = [line for line in summary(run).split("\n") if line.startswith("held-out loss")]
    assert said in line
    assert (said == "") == line.endswith(f"{losses[-1]:.3f}")


def test_summary_tells_loss_and_scores(tmp_path, tokenizer):
    text = summary(finished(tmp_path, tokenizer, "x"))
    assert "training loss   3.000 → 1.000" in text
    assert "held-out loss   3.000 → 1.500" in text
    assert "exact match    0.500 → 0.500" in text
    assert "x (1)  0.500 → 0.500" in text
    assert "that of step 1, held-out loss 1.250, not the last" in text
    assert "chosen by these same rows" not in text
    assert "forgotten" not in text
    run = told(tmp_path / "judged")
    run.add_metrics(probe=PROBE)
    assert "forgotten: perplexity +12.7% [+10.5, +15] on 40 general questions" in summary(run)


@pytest.mark.parametrize("names", [["first_loss"], ["final_loss"], ["first_loss", "final_loss", "kept_loss"]])
def test_losses_that_were_no_numbers_are_told_as_none(tmp_path, tokenizer, names):
    run = finished(tmp_path, tokenizer, "x")
    metrics = read_json(run.metrics)
    write_json(run.metrics, {**metrics, "train": {**metrics["train"], **dict.fromkeys(names)}})
    told = summary(run)
    (line,) = [line for line in told.split("\n") if line.startswith("training loss")]
    assert line.split() == ["training", "loss", *("none" if n in names else v for n, v in
                            (("first_loss", "3.000"), ("", "→"), ("final_loss", "1.000")))]  # fmt: skip
    render.write_report(run)
    assert "cannot be told" not in run.report.read_text()


@pytest.mark.parametrize("name", ["\x1b[31mred", "half \udcff", "a\ntraining loss   9.000", "\u202eback"])
def test_names_of_files_and_folders_reach_the_terminal_as_text(tmp_path, tokenizer, name):
    run = RunDirectory(finished(tmp_path, tokenizer, "x").path.rename(tmp_path / name))
    (run.path / name).write_text("")
    told = summary(run)
    told.encode()
    assert not set(told) & {"\x1b", "\x07", "\r", "\x9b", "\u202e"}
    assert sum(line.startswith("training loss") for line in told.split("\n")) == 1


def test_scores_on_the_rows_that_chose_the_adapter_are_marked(tmp_path, tokenizer):
    run = finished(tmp_path, tokenizer, "x")
    run.add_metrics(held_out={"rows": 1, "questions": 1, "chosen_on": True})
    render.write_report(run)
    assert all("chosen by these same rows" in text for text in (summary(run), run.report.read_text()))


def test_a_run_of_an_earlier_version_can_still_be_told(tmp_path, tokenizer):
    run = finished(tmp_path, tokenizer, "x")
    metrics = read_json(run.metrics)
    train = {name: value for name, value in metrics["train"].items() if not name.startswith("kept")}
    write_json(run.metrics, {"train": train, **{name: metrics[name] for name in ("base", "tuned", "held_out")}})
    write_jsonl(run.answers, [{n: v for n, v in x.items() if n != "split"} for x in read_jsonl(run.answers)])
    render.write_report(run)
    assert "exact match" in summary(run)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return told(tmp_path_factory.mktemp("outputs"), count=9, wrong=3)


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures are plotted and not written: that takes most of the time, and the same whatever a run holds."""
    macros = render.load_macros()
    monkeypatch.setattr(figures, "as_svg", lambda *_, **__: "<svg></svg>")
    monkeypatch.setattr(render, "load_macros", lambda: macros)


@pytest.fixture
def copy(whole, tmp_path):
    return RunDirectory(shutil.copytree(whole.path, tmp_path / "told"))


def headings(run):
    render.write_report(run)
    return re.findall("<h2[^>]*>(.*?)</h2>", run.report.read_text())


def test_a_run_that_is_whole_is_told_whole(copy):
    assert headings(copy) == [
        "To keep in mind", "Contents", "Learned, forgotten, cannot tell", "Scores on held-out questions",
        "Answers side by side", "Training", "Memory", "Data", "Configuration", "How to repeat it",
    ]  # fmt: skip
    page = copy.report.read_text()
    assert "cannot be told" not in page
    assert 'class="note"' not in page
    assert len(page) < 300_000


FILES = ("metrics.json", "history.jsonl", "answers.jsonl", "data/report.json", "data/rejected.jsonl")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [None, b"", b"{oops", b"[]", b"{}", b"\xff\xfe\n", b'{"step": "x"}\n'])
def test_a_part_that_is_missing_or_damaged_is_told_and_the_rest_stands(undrawn, copy, name, content):
    before = headings(copy)
    path = copy.path / name
    path.unlink() if content is None else path.write_bytes(content)
    assert [heading for heading in headings(copy) if heading != "To keep in mind"] == before[1:]
    if name != "data/rejected.jsonl":
        assert 'class="note"' in copy.report.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "field", "untouched"),
    [
        ("metrics.json", "metrics", {"data", "configuration", "again"}),
        ("data/report.json", "data", {"scores", "answers", "training", "memory", "configuration", "again"}),
        ("config.json", "stored", {"scores", "answers", "training", "data"}),
    ],
)
def test_any_value_may_be_of_another_kind_or_gone(undrawn, copy, name, field, untouched):
    """What an earlier or later version left out, or wrote otherwise, takes away its own sections at most."""
    stored, facts = read_json(copy.path / name), gather(copy)
    places = [(key,) for key in stored if key != "config"]
    places += [(key, inner) for key, value in stored.items() if isinstance(value, dict) for inner in value]
    for number, place in enumerate(places):
        changed = json.loads(json.dumps(stored))
        within = changed[place[0]] if len(place) == 2 else changed
        value = ("x", ..., [], -1, None, {})[number % 6]
        if value is ...:
            del within[place[-1]]
        else:
            within[place[-1]] = value
        if len(place) == 1:
            write_json(copy.path / name, changed)
            altered = gather(copy)
        else:  # nothing looks at these before the sections do
            altered = replace(facts, **{field: changed})
        parts = render.render_page(altered).split("<section")
        assert len(parts) == 9, (place, value)
        failed = {re.search('aria-labelledby="(.*?)"', part)[1] for part in parts[1:] if "cannot be told" in part}
        assert not failed & untouched, (place, value)


@pytest.mark.parametrize("fault", [ValueError("a formula"), RuntimeError("no renderer"), TypeError("no number")])
def test_a_picture_that_cannot_be_drawn_takes_its_own_part_away(copy, monkeypatch, fault):
    def plot(*_, **__):
        raise fault

    monkeypatch.setattr(figures, "plot_losses", plot)
    page = render.render_page(gather(copy))
    (failed,) = [part for part in page.split("<section")[1:] if "cannot be told" in part]
    assert 'id="training"' in failed
    assert f"({type(fault).__name__}: {fault})" in failed


def test_the_same_run_gives_the_same_bytes_and_no_id_twice(copy):
    write_json(copy.comparison, comparison(copy, "x"))
    page = render.render_page(gather(copy))
    assert render.render_page(gather(copy)) == page
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids)) > 20
    referred = re.findall(r'(?:href="|url\()#([\w-]+)', page)
    labels = [name for names in re.findall(r' aria-labelledby="([^"]*)"', page) for name in names.split()]
    assert {*referred, *labels} <= {*ids}
    assert page.count("<svg") == page.count('role="img"') >= 10
    assert len(page) < 400_000


def test_a_training_of_many_steps_has_a_small_page_too(copy):
    lines = [{"step": step, "loss": 1 + 1 / step, "lr": 1 / step, "grad_norm": 1.0, "tokens_per_s": 100.0 + step % 7}
             for step in range(1, 30_001)]  # fmt: skip
    for line in lines[::100]:
        line |= {"eval_loss": 2.0 + 1 / line["step"], "eval_exact_match": 0.5}
    write_jsonl(copy.history, lines)
    assert len(render.render_page(gather(copy))) < 400_000


def test_words_that_differ_bring_two_elements_into_the_page_and_no_others(undrawn, tmp_path, tokenizer):
    """Where answers differ from what was expected its structure depends on them; what it is made of does not."""
    made = set()
    for number, (one, other) in enumerate(pairwise([*MARKUP, "plain words", "plain wolves"])):
        run = finished(tmp_path / str(number), tokenizer, one)
        (line,) = read_jsonl(run.answers)
        answers = {"base": {"answer": f"{one} {other}"}, "tuned": {"answer": f"so {other} {one} {other}"}}
        write_jsonl(run.answers, [{**line, "expected": f"{other} {one} now", **answers}])
        render.write_report(run)
        made |= {(tag, *names) for tag, names in made_of(run.report.read_text())}
    render.write_report(finished(tmp_path / "plain", tokenizer, "plain"))
    plain = {(tag, *names) for tag, names in made_of((tmp_path / "plain" / "r" / "report.html").read_text())}
    assert made - plain <= {("ins",), ("del",), ("em",), ("br",)}
    assert {("ins",), ("del",)} <= made
