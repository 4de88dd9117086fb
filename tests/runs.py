"""Finished runs as the tests of the report have them: files as a run leaves them, and no model."""

from __future__ import annotations

from qlora_utils.config import RunConfig
from qlora_utils.formats import format_of
from qlora_utils.measures import data_report
from qlora_utils.run_directory import RunDirectory, write_json, write_jsonl

SCORES = {"exact_match": 0.5, "f1": 0.5, "rouge_l": 0.5, "perplexity": 3.0, "stopped": 1.0,
          "intervals": {name: [0.1, 3.2] for name in ("exact_match", "f1", "rouge_l", "perplexity")}}  # fmt: skip


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
    write_jsonl(run.history, [{"step": 0, "eval_loss": 3.0}, {"step": 2, "eval_loss": 1.5}])
    line = {"split": text, "text": text, "expected": text, "base": {"answer": text}, "tuned": {"answer": text}}
    write_jsonl(run.answers, [{**line, "history": [{"question": f"before {text}", "answer": text}]}])
    write_json(run.data / "report.json", data_report([], format_of(tokenizer, RunConfig.from_preset("pocket"))))
    return run


def comparison(run, text):
    """What `compare` would say of a run of that name, and another of nearly the same name."""
    first = {"name": text, "preset": text, "asked": 1, "answers": str(run.path / "gone")}
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
