from __future__ import annotations

import pytest
import torch

from qlora_utils.cli import main
from qlora_utils.models.hardware import CARDS


def test_on_the_command_line(capsys):
    assert main(["plan"]) == 0
    table = capsys.readouterr().out
    if not torch.cuda.is_available():
        assert [line.split()[0] for line in table.splitlines()[4:]] == list(CARDS)
    assert main(["plan", "-p", "lora_r=256", "-p", "max_seq_len=8192"]) == 0
    if not torch.cuda.is_available():
        _, _, _, head, small, *others, blank, why = capsys.readouterr().out.splitlines()
        assert head.split()[0] == "GPU"
        assert small.split()[0] == "T4" and small.endswith("does not fit")
        assert len(others) == len(CARDS) - 1 and all(line.endswith("  fits") for line in others)
        assert not blank and why.startswith("T4 has room for 13.3 GiB, and this takes 16.1 GiB at the least. Take")
    capsys.readouterr()
    assert main(["plan", "--gpu", "T4", "-p", "train_head=false"]) == 0
    printed = capsys.readouterr().out
    assert "gradient_checkpointing" in printed
    assert "at the peak" in printed
    assert printed.rstrip().endswith("fits")
    assert main(["plan", "--gpu", "T5"]) == 2
    assert "A100-40" in capsys.readouterr().err
    assert main(["plan", "--gpu", "T4", "-p", "max_seq_len=200000"]) == 2
    assert "Take shorter examples" in capsys.readouterr().err
    too_much = {"gradient_checkpointing": "false", "micro_batch_tokens": "8192", "keep_expanded": "true",
                "optimizer": "adamw_torch", "compute_dtype": "float16"}  # fmt: skip
    settings = [part for name in too_much for part in ("-p", f"{name}={too_much[name]}")]
    assert main(["plan", "--gpu", "T4", *settings]) == 2
    assert "gradient_checkpointing=true" in capsys.readouterr().err


# Counted by hand: Llama-2-7b has 32 layers of 4,096 with a feed-forward of 11,008, and a vocabulary of 32,000.
@pytest.mark.parametrize(
    ("arguments", "trained"),
    [
        (["--preset", "llama2-7b"], ("290,979,840", "159,907,840", "131,072,000")),
        (["--preset", "llama2-7b", "-p", "train_head=false"], ("159,907,840", "the head is frozen")),
        (["--preset", "llama2-7b", "-p", "lora_r=8"], (f"{159_907_840 // 8 + 131_072_000:,}", "19,988,480")),
        (["--preset", "flan-t5-large"], ("35,258,368", "32,899,072")),
    ],
)
@pytest.mark.parametrize("gpu", [[], ["--gpu", "A100-40"]], ids=["all", "one"])
def test_a_plan_says_how_many_parameters_train(arguments, trained, gpu, capsys):
    assert main(["plan", *arguments, *gpu]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trainable: ")]
    assert all(number in line for number in trained)
