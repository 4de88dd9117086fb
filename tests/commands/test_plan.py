from __future__ import annotations

import re

import pytest
import torch

from qlora_utils.cli import main
from qlora_utils.models.hardware import CARDS, GIB


def test_on_the_command_line(capsys):
    assert main(["plan"]) == 0
    table = capsys.readouterr().out
    if not torch.cuda.is_available():
        assert [line.split()[0] for line in table.splitlines()[4 : 4 + len(CARDS)]] == list(CARDS)
        assert (
            "\n\n2xT4: all 2 GPUs train, each with its share of a step; all else takes place on the first.\n" in table
        )
        assert "\n\nV100-16, P100, V100-32: it needs a PyTorch built for CUDA 12.6" in table
    assert main(["plan", "-p", "lora_r=256", "-p", "max_seq_len=8192"]) == 0
    if not torch.cuda.is_available():
        _, _, _, head, *lines = capsys.readouterr().out.splitlines()
        assert head.split()[0] == "GPU"
        table, after = lines[: len(CARDS)], lines[len(CARDS) :]
        small = [line.split()[0] for line in table if line.endswith("does not fit")]
        assert small == [name for name in CARDS if CARDS[name].memory < 15 * GIB]
        assert all(line.endswith("  fits") for line in table if line.split()[0] not in small)
        assert not after[0] and after[1].startswith("3060 has room for 10.5 GiB, and this takes 13.6 GiB at the least.")
        assert "\nT4 has room for 13.3 GiB, and this takes 14.1 GiB at the least. With a frozen head" in "\n".join(
            after
        )
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


def test_a_plan_for_several_gpus_is_one_for_each(capsys):
    assert main(["plan", "--preset", "llama2-70b", "--gpu", "A6000", "--gpus", "2"]) == 0
    printed = capsys.readouterr().out
    assert "llama2-70b on 2xA6000, on each: meta-llama/Llama-2-70b-hf" in printed
    assert re.search(r"shard +True +no GPU has room for the whole model", printed)
    assert re.search(r"gathered layers +0\.8", printed)
    assert re.search(r"room on 2xA6000: 44\.\d+ GiB each; the plan fits", printed)
    assert main(["plan", "--preset", "llama2-70b", "--gpu", "4090", "--gpus", "2", "-p", "liger=true"]) == 2
    refused = capsys.readouterr().err
    assert "2x4090 has room for 21.7 GiB on each, and this takes 34.6 GiB at the least. With -p train_head=f" in refused
    assert main(["plan", "--gpu", "T4", "--gpus", "0"]) == 2
    assert "gpus" in capsys.readouterr().err


def test_a_plan_for_one_gpu_says_nothing_of_several(capsys):
    assert main(["plan", "--gpu", "T4"]) == 0
    alone = capsys.readouterr().out
    assert main(["plan", "--gpu", "T4", "--gpus", "1"]) == 0
    assert capsys.readouterr().out == alone
    assert "shard" not in alone and "on each" not in alone


# Counted by hand: Llama-2-7b has 32 layers of 4,096 with a feed-forward of 11,008, and a vocabulary of 32,000.
@pytest.mark.parametrize(
    ("arguments", "trained"),
    [
        (["--preset", "llama2-7b"], ("290,979,840", "159,907,840", "131,072,000")),
        (["--preset", "llama2-7b", "-p", "train_head=false"], ("159,907,840", "the head is frozen")),
        (["--preset", "llama2-7b", "-p", "lora_r=8"], (f"{159_907_840 // 8 + 131_072_000:,}", "19,988,480")),
        (["--preset", "flan-t5-large"], ("35,258,368", "32,899,072")),
        (["--preset", "qwen3-1.7b"], ("17,432,576", "the head is frozen")),
        (["--preset", "qwen3-4b"], ("33,030,144", "the head is frozen")),
        (["--preset", "llama3.1-8b"], ("41,943,040", "the head is frozen")),
    ],
)
@pytest.mark.parametrize("gpu", [[], ["--gpu", "A100-40"]], ids=["all", "one"])
def test_a_plan_says_how_many_parameters_train(arguments, trained, gpu, capsys):
    assert main(["plan", *arguments, *gpu]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trainable: ")]
    assert all(number in line for number in trained)


@pytest.mark.parametrize("gpu", [[], ["--gpu", "RTX 3060"]], ids=["all", "one"])
def test_a_plan_says_what_training_a_tied_head_means(gpu, capsys):
    assert main(["plan", "--preset", "qwen3-4b", "-p", "train_head=true", *gpu]) == 0
    printed = capsys.readouterr().out
    head = "388,956,160 of the head, a copy of the embeddings, which -p train_head=false freezes\n"
    assert f"trainable: 421,986,304 parameters, 33,030,144 of adapters and {head}" in printed
    if gpu:
        assert re.search(r"train_head +True +as given, but its head is the matrix of embeddings", printed)


def test_where_a_frozen_head_would_fit_the_plan_says_so(capsys):
    assert main(["plan", "--preset", "llama3.1-8b", "-p", "train_head=true", "--gpu", "T4"]) == 2
    refused = capsys.readouterr().err
    assert "T4 has room for 13.3 GiB, and this takes 14.1 GiB at the least. With a frozen head (train_head" in refused
    assert refused.rstrip().endswith("GiB, which fits. `qlora plan` shows each part.")
    assert main(["plan", "--preset", "llama3.1-8b", "--gpu", "T4"]) == 0
