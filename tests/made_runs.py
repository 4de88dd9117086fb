"""Finished runs as the tests of the report have them: files as a run leaves them, and no model."""

from __future__ import annotations

import random
from types import SimpleNamespace

from qlora_utils.answers import group
from qlora_utils.config import RunConfig
from qlora_utils.evaluation.scores import exact_match, rouge_l, token_f1
from qlora_utils.evaluation.verdict import compare_held_out
from qlora_utils.loop.history import HistoryWriter
from qlora_utils.rows.conversations import batches
from qlora_utils.rows.judge import arrow_features
from qlora_utils.rows.statistics import REPORTED, measure, report_of
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import write_json, write_jsonl
from qlora_utils.tokens.formats import format_of

SCORES = {"exact_match": 0.5, "f1": 0.5, "rouge_l": 0.5, "perplexity": 3.0, "stopped": 1.0,
          "intervals": {name: [0.1, 3.2] for name in ("exact_match", "f1", "rouge_l", "perplexity")}}  # fmt: skip


def measured_table(columns):
    """The columns of `measure` as the Arrow table that `report_of` takes."""
    from datasets import Dataset, Features

    features = Features({name: arrow_features()[name] for name in REPORTED})
    return Dataset.from_dict({name: columns[name] for name in REPORTED}, features=features).data.table


def report_on(conversations, form):
    """The report on conversations at hand, as a preparation makes it of rows."""
    columns = {name: [] for name in REPORTED}
    for batch in batches(conversations):
        found = measure(batch, form)
        for name, values in columns.items():
            values.extend(found[name])
    return report_of(measured_table(columns), form)


def measured(run, step, loss, answer, *, epoch=0.0, right=False, text="Where is it?", exact=0.0):
    """The line of a measurement on held-out rows as `HistoryWriter` writes it."""
    sample = {"question": text, "expected": text, "answer": answer, "right": right}
    writer = HistoryWriter(run.history)
    logs = {"eval_loss": loss, "eval_exact_match": exact, "eval_sample": sample}
    writer.on_log(None, SimpleNamespace(global_step=step, epoch=epoch), None, logs=logs)
    return writer.lines[-1]


def finished(folder, tokenizer, text):
    config = RunConfig.from_preset("pocket", output_dir=str(folder), run_name="r")
    run = RunDirectory(config.run_dir)
    run.begin(config)
    train = {"steps": 2, "kept_step": 1, "kept_loss": 1.25, "first_loss": 3.0, "final_loss": 1.0, "tokens": 10,
             "tokens_per_s": 5.0, "wall_s": 2.0, "peak_memory_bytes": 10**9}  # fmt: skip
    paired = {"gained": 1, "lost": 0, "p_value": 1.0}
    groups = {"split": {text: {"questions": 1, "base": SCORES, "tuned": SCORES, "paired": paired}}}
    run.add_metrics(
        train=train, base=SCORES, tuned=SCORES, held_out={"rows": 1, "questions": 1}, paired=paired, groups=groups
    )
    for step, loss in ((0, 3.0), (2, 1.5)):
        measured(run, step, loss, text, text=text)
    line = {"split": text, "text": text, "expected": text, "base": {"answer": text}, "tuned": {"answer": text}}
    write_jsonl(run.answers, [{**line, "history": [{"question": f"before {text}", "answer": text}]}])
    write_json(run.data / "report.json", report_on([], format_of(tokenizer, RunConfig.from_preset("pocket"))))
    return run


def comparison(run, text):
    """What `compare` would say of a run of that name, and another of nearly the same name."""
    first = {"name": text, "preset": text, "asked": 1, "forgotten": text, "answers": str(run.path / "gone")}
    runs = [first, {**first, "name": f"{text} 2"}]
    names = [one["name"] for one in runs]
    scores = {name: {key: value for key, value in SCORES.items() if key != "perplexity"} for name in names}
    answers = {name: {"answer": text, "right": number == 0} for number, name in enumerate(names)}
    line = {"split": text, "text": text, "expected": text, "history": [{"question": text, "answer": text}]}
    pair = {"first": names[0], "second": names[1], "difference": 0.5, "interval": [0.1, 0.9], "gained": 1, "lost": 0,
            "p_value": 0.5, "p_holm": 0.5}  # fmt: skip
    return {
        "runs": runs,
        "differences": {text: dict.fromkeys(names, text)},
        "questions": {"shared": 1, "clusters": 1},
        "scores": scores,
        "splits": {text: {"questions": 1, "scores": scores}, f"{text} 2": {"questions": 1, "scores": scores}},
        "pairs": [pair],
        "disagreements": {"count": 1, "shown": [{**line, "answers": answers}]},
    }


def answered(number, right, split, kind):
    """A line of `answers.jsonl` as `answers.evaluate` writes it."""
    expected = f"The {kind} of country {number} is town {number}."
    given = {"base": "it is of town", "tuned": expected if right else f"The {kind} of country {number} is hamlet 7."}
    scored = {
        model: {"answer": answer, "stopped": True, "exact_match": exact_match(answer, expected),
                "f1": round(token_f1(answer, expected), 4), "rouge_l": round(rouge_l(answer, expected), 4)}
        for model, answer in given.items()
    }  # fmt: skip
    tags = {"entity": f"country {number // 2}", "domain": "countries", "kind": kind, "fact": f"town {number}"}
    history = [{"question": "Where is it?", "answer": "There.", "system": ""}] if number % 3 == 0 else []
    return {"split": split, "text": f"What is the {kind} of country {number}?", "expected": expected,
            "history": history, "where": "test.jsonl", "number": number, "tags": tags, "system": "", "guess": 0.0,
            **scored}  # fmt: skip


def told(folder, *, wrong=6, count=60, **changes):
    """A run that has everything a report tells of; `wrong` of its answers to held-out questions are not exact."""
    config = RunConfig.from_preset("pocket", output_dir=str(folder), run_name="told", **changes)
    run = RunDirectory(config.run_dir)
    run.record(config)
    order = random.Random(1).sample(range(count), count)
    lines = [
        answered(number, order[number] >= wrong, f"held-out {'entities' if number % 2 else 'phrasings'}", kind)
        for number, kind in zip(range(count), ["capital", "currency"] * count, strict=False)
    ]
    trained = [answered(100 + number, True, "training rows", "capital") for number in range(9)]
    write_jsonl(run.answers, [*lines, *trained])
    (whole,) = group([{**line, "split": "all"} for line in lines], "split").values()
    for model, value in (("base", 17.0), ("tuned", 1.2)):
        whole[model]["perplexity"] = value
        whole[model]["intervals"]["perplexity"] = [value - 0.1, value + 0.1]
    run.add_metrics(
        train={"steps": 20, "kept_step": 20, "kept_loss": 0.4, "first_loss": 3.0, "final_loss": 0.3, "tokens": 12345,
               "tokens_per_s": 5000.0, "wall_s": 130.0, "peak_memory_bytes": 8 * 10**8, "skipped_steps": 0},
        held_out={"rows": 70, "questions": count, "answer_tokens": 900, "chosen_on": False},
        **{name: whole[name] for name in ("base", "tuned", "paired")},
        differences=compare_held_out(lines, range(count), ([28.3] * 70, [1.8] * 70), [10] * 70, range(70)),
        probe={**PROBE, "difference": 0.004, "interval": [-0.02, 0.03]},
        groups={by: group(lines, by) for by in ("split", "kind")},
    )  # fmt: skip
    history = [measured(run, 0, 3.1, "it is of")]
    for step in range(1, 21):
        history.append(
            {"step": step, "epoch": step / 100, "loss": 3.0 / step, "lr": 1e-3 / step, "grad_norm": 1.0,
             "tokens": 600 * step, "tokens_per_s": 5000.0 + step, "peak_memory_bytes": 8 * 10**8}
        )  # fmt: skip
        if step % 5 == 0:
            line = {"epoch": step / 100, "right": step > 10, "exact": 0.9}
            history.append(measured(run, step, 2.0 / step**0.5, f"Town {7 if step > 10 else step}.", **line))
    write_jsonl(run.history, history)
    write_json(run.data / "report.json", {**DATA, "train": 900, "held_out": 100})
    write_jsonl(run.data / "rejected.jsonl", [{"where": "a.csv", "number": n, "reason": "no answer"} for n in range(3)])
    return run


# What a training made a model forget, of topics by which it is drawn.
PROBE = {
    "questions": 40, "answer_tokens": 800, "unspellable": 0, "trained": 0,
    "loss": {"base": 2.2, "tuned": 2.32, "guess": 6.2},
    "difference": 0.12, "interval": [0.1, 0.14], "detectable": 0.028,
    "topics": {f"topic {n}": {f"topic-{n}-{m}": 0.1 + 0.01 * m + 0.005 * n for m in range(4)} for n in range(10)},
}  # fmt: skip

DATA = {
    "conversations": 1003, "turns": 1500, "turns_per_conversation": {"1": 506, "2": 497}, "shapes": {"messages": 1003},
    "scripts": {"Latin": 1000, "Thai": 3}, "tokens": 54_000, "unit": "conversation",
    "token_length": {"mean": 54.0, "p5": 35.0, "p25": 38.0, "p50": 44.0, "p75": 73.0, "p95": 84.0, "p99": 94.0,
                     "longest": 600, "histogram": {"edges": [0.0, 300.0, 600.0], "counts": [1000, 3]}},
    "max_seq_len": 512, "truncated_share": 0.003, "unknown_share": 0.0, "batch_size": 16, "padding_share": 0.37,
    "exact_duplicates": 2, "normalised_duplicates": 4, "rows_with_blank_turn": 0, "rows_ending_unanswered": 1,
    "source": "rows.csv", "rejected": 3, "held_out_by": "set aside at random", "leakage": 0,
}  # fmt: skip
