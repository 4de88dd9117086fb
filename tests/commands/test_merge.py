from __future__ import annotations

import pytest
from conftest import BOTH

from qlora_utils import cli, lora, quantization, training
from qlora_utils.commands import run as runner
from qlora_utils.config import RunConfig
from qlora_utils.models.shapes import architecture_of
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_json


@pytest.mark.slow
@BOTH
def test_a_trained_run_is_merged_and_checked_on_the_command_line(config, tokenizer, prepared, capsys):
    """A short training, merged; greedy answers of both models on questions that were never trained on."""
    longer = RunConfig.build({**config.model_dump(), "steps": 16, "eval_steps": 16, "max_new_tokens": 24})
    run = RunDirectory(longer.run_dir)
    prepared.save(run)
    training.train(longer, lora.attach(quantization.load(longer), longer), tokenizer, prepared, run)
    command = ["merge", "--run", longer.run_name, "--output-dir", longer.output_dir, "--questions", "10"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    record = read_json(run.merged / "merge.json")
    found = record["agreement"]
    assert found["questions"] == 10
    assert found["share"] >= 0.75  # untrained, hesitant answers turn on the last bit now and then
    assert found["loss_merged"] == pytest.approx(found["loss_unmerged"], rel=0.02)
    assert f"agreement with the unmerged model: {found['same']} of 10 held-out answers identical" in printed
    assert "adapter of step 16 merged into the dequantized weights" in printed
    assert (record["base"], record["dtype"], record["adapter_step"]) == ("quantized", "bfloat16", 16)
    assert {"torch", "peft", "bitsandbytes"} <= record["versions"].keys()

    assert cli.main(command) == 2
    assert "--force replaces it" in capsys.readouterr().err
    half = [*command, "--force", "--dtype", "float16", "--questions", "0"]
    if architecture_of(config.model) == "encoder-decoder":
        assert cli.main(half) == 2
        assert "take bfloat16" in capsys.readouterr().err
    else:
        assert cli.main(half) == 0
        assert "not compared" in capsys.readouterr().out
    elsewhere = run.path.parent / "elsewhere"
    by_path = ["merge", "--run", str(run.path), "--into", str(elsewhere), "--questions", "2"]
    assert cli.main([*by_path, "--base", "original"]) == 0
    assert "as they were before quantization" in capsys.readouterr().out
    assert read_json(elsewhere / "merge.json")["agreement"]["questions"] == 2

    runner._remove_earlier_run(run)  # a new run of this name replaces the model too
    assert not run.merged.exists()
    assert elsewhere.exists()
