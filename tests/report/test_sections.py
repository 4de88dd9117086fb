from __future__ import annotations

import html
import re
import shlex
import shutil

import pytest
from made_runs import PROBE, comparison, measured, told

from qlora_utils import cli
from qlora_utils.commands import run as runner
from qlora_utils.commands.options import parse_parameters
from qlora_utils.config import PLACE_FIELDS, RunConfig
from qlora_utils.report import render, sections
from qlora_utils.report.facts import gather
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_json, write_json, write_jsonl


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return told(tmp_path_factory.mktemp("outputs"), lora_r=4)


@pytest.fixture
def run(whole, tmp_path):
    return RunDirectory(shutil.copytree(whole.path, tmp_path / "told"))


MACROS = render.load_macros()


def markup(gather_values, run):
    return str(render.render_part(MACROS, gather_values, gather(run)))


def rows(said):
    """The cells of every row of the tables, without their markup."""
    return [
        [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)]
        for row in re.findall(r"<tr>(.*?)</tr>", said, re.DOTALL)
    ]


def test_scores_stand_beside_each_other_with_their_intervals_and_by_group(run):
    said, metrics = markup(sections.scores, run), read_json(run.metrics)
    table = {row[0]: row[1:] for row in rows(said)}
    low, high = metrics["tuned"]["intervals"]["exact_match"]
    assert table["exact match"][1] == f"0.900 [{low:.3f}, {high:.3f}]"
    assert table["perplexity"][0] == "17 [16.9, 17.1]"
    assert table["stops by itself"] == ["1.000", "1.000", "60 questions"]
    assert table["perplexity"][2] == "70 conversations"
    for split, group in metrics["groups"]["split"].items():
        assert table[split][0] == str(group["questions"])
        assert table[split][3].startswith(f"{group['tuned']['exact_match']:.3f} [")
    assert ">Shares from 0 to 1. exact match: base 0.000, tuned 0.900;" in said


def test_what_was_learned_and_forgotten_stands_first_with_what_cannot_be_told(run):
    run.add_metrics(probe=PROBE)
    said = html.unescape(markup(sections.verdict, run))
    assert re.findall("<h3>(.*?)</h3>", said) == ["Learned", "Forgotten", "Cannot tell"]
    assert "Exact match 0.000 → 0.900: +0.900 [" in said
    assert "perplexity went from 9.025 to 10.18: +12.7% [+10.5, +15]" in said
    assert "The tuned model has forgotten" in said
    assert ">Change of the loss on 40 general questions of 10 topics;" in said
    assert "perplexity on the probe 2.84%" in said


def test_what_cannot_be_judged_or_was_not_measured_is_said_without_a_picture(run):
    metrics = read_json(run.metrics)
    write_json(run.metrics, {**metrics, "probe": {"questions": 0, "unjudged": "The probe means nothing."}})
    said = markup(sections.verdict, run)
    assert "The probe means nothing." in said
    assert "<svg" not in said
    write_json(
        run.metrics, {name: section for name, section in metrics.items() if name not in ("differences", "probe")}
    )
    said = markup(sections.verdict, run)
    assert said.count("was not measured: an earlier version") == 3
    assert "<svg" not in said


def test_the_key_figures_are_those_of_the_adapter_that_was_kept(run):
    said = markup(sections.key_figures, run)
    found = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", said))
    assert found["exact match, tuned"].startswith("0.900<small>95 % interval 0.")
    assert found["held-out loss"] == "0.400<small>of the adapter kept, step 20; at the start 3.100</small>"
    assert found["peak memory"] == "800 MB<small>of the whole process, libraries included</small>"
    assert found["training time"].startswith("2 min")


def test_the_curves_have_what_was_measured_on_held_out_rows(run):
    said = markup(sections.training, run)
    by_step = {row[0]: row for row in rows(said)}
    assert by_step["20"][1:] == ["0.1500", f"{2 / 20**0.5:.4f}", "0.900"]
    assert "held-out loss falls from 3.100" in said
    assert "Exact match in training, on held-out questions goes from 0 at step 0 to 0.9" in said


@pytest.mark.parametrize("unit", ["conversation", "example"])
def test_the_caption_says_of_which_tokens_the_training_loss_is(run, unit):
    report, stored = run.data / "report.json", read_json(run.config)
    write_json(report, {**read_json(report), "unit": unit})
    for response_only in (True, False):
        write_json(run.config, {**stored, "config": {**stored["config"], "response_only": response_only}})
        said = markup(sections.training, run)
        everything = unit == "conversation" and not response_only  # an encoder-decoder writes answers alone
        assert ("held-out loss in nats per answer token, the training loss per token of question and answer" in
                said.replace("Held", "held")) == everything  # fmt: skip
        assert ("Loss in nats per answer token" in said) == (not everything)


def test_only_what_comes_after_a_lowest_point_is_shaded(run):
    for losses, shaded in (((3.0, 1.0, 4.0), True), ((3.0, 3.5, 4.0), False), ((3.0, 2.0, 1.0), False)):
        write_jsonl(run.history, [{"step": 5 * n, "eval_loss": loss} for n, loss in enumerate(losses)])
        said = markup(sections.training, run)
        assert (">overfitting</text>" in said, "Shaded: overfitting" in said) == (shaded, shaded)


def test_how_one_question_was_answered_on_the_way_is_told(run):
    said = markup(sections.training, run)
    assert rows(said)[-4:] == [
        ["0", "it is of", "✗ not yet"], ["5", "Town 5.", "✗ not yet"], ["10", "Town 10.", "✗ not yet"],
        ["15–20", "Town 7.", "✓ right"],
    ]  # fmt: skip
    assert "Asked 5 times while the model was trained; it gave 4 answers" in said
    run.history.unlink()
    for step in range(40):
        measured(run, step, 1.0, f"answer {step}")
    said = markup(sections.training, run)
    assert [row[1] for row in rows(said) if row[1].startswith("answer ")][::7] == ["answer 0", "answer 39"]
    assert "40 answers one after the other, of which 8 are shown" in said
    write_jsonl(run.history, [{"step": 1, "eval_loss": 1.0}])
    assert "One question" not in markup(sections.training, run)


def test_differences_from_the_preset_come_first_and_every_parameter_has_its_meaning(run):
    said = markup(sections.configuration, run)
    assert rows(said)[1] == ["lora_r", "4", "16", "rank of the update matrices"]
    assert said.index("What differs from the preset pocket") < said.index("All 6")
    assert ["seed", "0", "of data order, held-out choice, adapter initialisation, dropout"] in rows(said)
    assert ["train_head", "true", "train lm_head in full beside the adapter"] in rows(said)
    stored = read_json(run.config)
    write_json(run.config, {**stored, "config": {**stored["config"], "lora_r": 16, "of_another_version": 1}})
    assert "Every parameter is that of the preset pocket" in markup(sections.configuration, run)
    write_json(run.config, {**stored, "config": {**stored["config"], "preset": "gone"}})
    assert "The preset gone is not known" in markup(sections.configuration, run)


def test_the_limit_is_marked_where_lengths_are_what_it_limits(run):
    assert "max_seq_len 512</text>" in markup(sections.data, run)
    report = run.data / "report.json"
    write_json(report, {**read_json(report), "unit": "example"})
    said = markup(sections.data, run)  # lengths of what is read and written together, each of which is limited
    assert "max_seq_len 512</text>" not in said
    assert "tokens per example</text>" in said
    assert "read and written together" in said


def test_a_share_that_an_earlier_version_rounded_away_is_not_told_as_none(run):
    report = run.data / "report.json"
    write_json(report, {**read_json(report), "truncated_share": 0.0, "conversations": 20_101})
    assert ["cut at max_seq_len", "less than 0.1%"] in rows(markup(sections.data, run))


def test_a_run_can_be_repeated_as_the_page_says(run, monkeypatch):
    stored = read_json(run.config)
    write_json(run.config, {**stored, "git_commit": "abc123+"})
    said = markup(sections.repetition, run)
    first, second = (html.unescape(block) for block in re.findall(r"<pre>(.*?)</pre>", said, re.DOTALL))
    fetched, checked_out, _, command = first.splitlines()
    assert fetched.startswith("git clone https://github.com/")
    assert checked_out == "git checkout abc123"
    options = cli._parser().parse_args(shlex.split(command)[1:])
    config, _ = runner.resolve(
        preset=options.preset, run_name=options.run_name, output_dir=options.output_dir,
        parameters=parse_parameters(options.parameters), start=None,
    )  # fmt: skip
    assert config.run_name == "told-again"
    same = {*RunConfig.model_fields} - {*PLACE_FIELDS}
    assert config.model_dump(include=same) == RunConfig.from_file(run.config).model_dump(include=same)
    assert second == f"qlora run --config {run.config} --run-name told-again"
    assert "changes then that are in no commit" in said
    monkeypatch.chdir(run.path.parent)
    assert "--config told/config.json" in markup(sections.repetition, run)


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        (None, "of the whole process"),
        ({"name": "Tesla T4", "memory_bytes": 15_600_000_000}, "allocated on the GPU"),
        ({"name": "Unheard-of 9", "memory_bytes": 10**10}, "Unheard-of 9 is none of the GPUs"),
    ],
)
def test_memory_is_told_measured_and_planned_on_the_machine_it_ran_on(run, gpu, said):
    stored = read_json(run.config)
    write_json(run.config, {**stored, "hardware": {**stored["hardware"], "gpu": gpu}})
    memory = markup(sections.memory, run)
    assert "Measured: 800 MB at the peak" in memory
    assert said in memory
    if "Unheard-of" not in said:
        parts = {row[0]: row for row in rows(memory)}
        assert {"weights", "head", "adapters", "gradients", "optimizer", "activations", "at the peak"} <= parts.keys()
        shares = [float(row[3].removeprefix("less than ").rstrip("%")) for row in rows(memory)[1:-1]]
        assert sum(shares) == pytest.approx(100, abs=0.5)


def test_a_model_that_does_not_lie_here_is_not_fetched_for_a_plan(run, monkeypatch):
    from qlora_utils.models import shapes

    monkeypatch.setattr(shapes, "read", lambda _: pytest.fail("looked for the model"))
    stored = read_json(run.config)
    write_json(run.config, {**stored, "config": {**stored["config"], "model": "owner/some-model"}})
    assert "nothing is fetched for a report" in markup(sections.memory, run)


def test_curves_say_what_one_sees(run):
    said = markup(sections.training, run)
    assert "Training loss falls from 3.000 to 0.300; held-out loss falls from 3.100 to 0.447" in said
    assert said.count('<svg viewBox="0 0 388.8') == 1
    for name in ("Learning rate goes from 0.001 at step 1", "Gradient norm before clipping stays at 1 from step 1 to",
                 "Speed goes from 5,001 tokens per second at step 1 to 5,020", "Peak memory so far stays at 0.8 GB",
                 "Exact match in training, on held-out questions goes from 0"):  # fmt: skip
        assert re.search(f'<desc id="[^"]*">{name}', said)
    assert "adapter of step 20</text>" in said
    assert ["5", "0.6000", "0.8944", "0.900"] in rows(said)


def test_data_are_told_in_words_with_the_reasons_why_rows_were_left_out(run):
    said = markup(sections.data, run)
    assert ["no answer", "3"] in rows(said)
    assert "max_seq_len 512" in said  # the mark in the histogram, which reaches to 600
    assert ["scripts", "Latin 1,000 (99.7%), Thai 3 (0.3%)"] in rows(said)
    assert "What each column was read as" not in said  # a report of before names no columns
    report = run.data / "report.json"
    write_json(report, {**read_json(report), "columns": {"<b>q": {"question": 9}, "id": {"not read": 1003}}})
    said = rows(markup(sections.data, run))
    assert ["&lt;b&gt;q", "9", "question"] in said
    assert ["id", "1,003", "not read"] in said


def test_the_commonest_reasons_are_shown_and_the_rest_is_counted(run):
    lines = [f'{{"reason": "kind {n % 20}"}}\n' for n in range(100)]
    (run.data / "rejected.jsonl").write_text("".join(lines))
    assert "And 8 other reasons" in markup(sections.data, run)


def test_answers_stand_in_three_groups_with_their_differences_marked(run):
    said = markup(sections.answers, run)
    assert re.findall("<h3>(.*?)</h3>", said) == ["The largest gains", "The worst", "Drawn at random"]
    assert said.count("<li>") == 20
    worst = said[said.index("The worst") : said.index("Drawn at random")]
    assert worst.count("tuned: ✗ not exact") == 6
    assert re.search(r"is <ins>hamlet 7\.</ins> <del>town \d+\.</del>", worst)
    best = said[said.index("The largest gains") : said.index("The worst")]
    assert "<del>" not in best[best.index("tuned: ✓ exact") : best.index("</li>")]
    assert "Of all, 90.0% are exact" in said


def test_long_texts_are_cut_and_said_to_be():
    line = {"text": "q" * 2000, "expected": "a " * 1000, "base": {"answer": ""}, "tuned": {"answer": "b" * 5000}}
    said = str(MACROS.answer_card(sections.answer_card(line)))
    assert len(said) < 8000
    assert "(800 characters more)" in said
    assert "(nothing)" in MACROS.marked(sections.mark("", ""))


def test_other_runs_stand_beside_it(run):
    write_json(run.comparison, comparison(run, "x"))
    said = markup(sections.other_runs, run)
    assert "Out of date" in said
    assert "x 2 beside x: exact match 0.500 higher" in said
    assert ["x → x\nx", "x", "x", "✓ x", "✗ x"] in rows(said)
    assert ">Exact match, by split. x (1): x 0.500, x 2 0.500" in said
