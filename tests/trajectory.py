"""The first 50 steps of the preset `pocket`, as they are now: `python tests/trajectory.py` stores them anew.

`tests/test_training.py` compares with what is stored, so that no change of code or packages alters a training unseen.
Store them anew only for a change that is meant to alter it, and say so in CHANGELOG.md.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from qlora_utils import lora, quantization, training
from qlora_utils.config import RunConfig
from qlora_utils.data import load_tokenizer, prepare
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_jsonl, write_json
from qlora_utils.runs.provenance import provenance

STORED = Path(__file__).parent / "trajectory.json"
COLUMNS = ("loss", "grad_norm", "eval_loss")


def trajectory(folder):
    """Loss and gradient norm of 50 steps, and the held-out losses among them."""
    config = RunConfig.from_preset("pocket", output_dir=str(folder), steps=50, logging_steps=1, trace_rows=0)
    tokenizer = load_tokenizer(config)
    run = RunDirectory(config.run_dir)
    model = lora.attach(quantization.load(config), config)
    training.train(config, model, tokenizer, prepare(config, tokenizer), run)
    lines = read_jsonl(run.history)
    return {name: [line[name] for line in lines if name in line] for name in COLUMNS}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        made_with = provenance()
        del made_with["git_commit"]
        write_json(STORED, {**trajectory(scratch), **made_with})
