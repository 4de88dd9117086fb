"""What a training does on a disk that is too small, and on one that fills up; run by tests/loop/test_checkpoints.py.

Prints a JSON line: the errors, what lies there afterwards, and the losses of the training that went on elsewhere.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from test_training import train_again
from transformers import TrainerCallback

from qlora_utils import lora, quantization
from qlora_utils.config import RunConfig
from qlora_utils.data import Prepared, load_tokenizer
from qlora_utils.loop import checkpoints
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_jsonl

SMALL, LARGE = Path(sys.argv[1]), Path(sys.argv[2])


class FillAt(TrainerCallback):
    """Leaves a disk 64 kB after a step."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 5:
            (SMALL / "junk").write_bytes(b"x" * (shutil.disk_usage(SMALL).free - 2**16))


def train(config, *callbacks):
    model = lora.attach(quantization.load(config), config)
    train_again(config, model, load_tokenizer(config), ROWS, *callbacks)


def losses(run):
    return [[line.get("step"), line.get("loss"), line.get("eval_loss")] for line in read_jsonl(run.history)]


ROWS = Prepared.load(RunDirectory(LARGE / "rows"))
config = RunConfig.from_preset(
    "pocket", output_dir=str(SMALL), run_name="a", steps=8, batch_size=4, logging_steps=1, eval_steps=4, save_steps=2,
    save_total_limit=1, keep="last", eval_rows=4, trace_rows=0, lora_r=4, train_head=False,
)  # fmt: skip
found = {}
with pytest.raises(checkpoints.DiskError) as before:
    train(RunConfig.build({**config.model_dump(), "lora_r": 64, "save_total_limit": 9, "train_head": True}))
found["before"] = str(before.value)
with pytest.raises(checkpoints.DiskError) as during:
    train(config, FillAt())
found["during"] = str(during.value)
run = RunDirectory(config.run_dir)
newest = checkpoints.find_newest(run.checkpoints, report=lambda text: None)
found["newest_after"] = newest and newest.name
found["left"] = [str(p) for p in run.path.rglob(".*")]
shutil.copytree(run.path, LARGE / "a")
moved = RunConfig.build({**config.model_dump(), "output_dir": str(LARGE)})
train(moved)
found["resumed"] = losses(RunDirectory(moved.run_dir))
(SMALL / "junk").unlink()
train(config)
found["resumed in place"] = losses(run)
whole = RunConfig.build({**moved.model_dump(), "run_name": "whole"})
train(whole)
found["whole"] = losses(RunDirectory(whole.run_dir))
print(json.dumps(found))
