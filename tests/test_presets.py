from __future__ import annotations

import pytest

from qlora_utils.config import RunConfig
from qlora_utils.presets import PRESETS
from qlora_utils.runs.directory import RunDirectory


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_and_round_trips(preset, tmp_path):
    config = RunConfig.from_preset(preset, output_dir=str(tmp_path), run_name="x")
    assert not config.differences()
    assert config.changes() == "nothing"
    changed = RunConfig.from_preset("pocket", steps=12, keep="last")
    assert changed.changes() == "steps 12 instead of 250, keep 'last' instead of 'best'"
    RunDirectory(config.run_dir).begin(config)
    assert RunConfig.continue_run(config.run_dir) == config


def test_llama2_follows_the_tutorial_recipe():
    config = RunConfig.from_preset("llama2-7b")
    assert (config.lora_r, config.lora_alpha, config.learning_rate, config.lr_scheduler) == (64, 16, 2e-4, "cosine")
    assert (config.steps, config.batch_size) == (250, 4)
