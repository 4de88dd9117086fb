from __future__ import annotations

import re

import pytest
import torch

from qlora_utils.config import ConfigError, RunConfig
from qlora_utils.models import hardware
from qlora_utils.models.hardware import CARDS, GIB

POCKET = RunConfig.from_preset("pocket")


@pytest.mark.parametrize(
    ("card", "dtype", "kernel"),
    [
        (None, "float32", "split"),
        ("T4", "float16", "split"),
        ("V100-16", "float16", "split"),
        ("P100", "float16", "split"),
        ("3060", "bfloat16", "varlen"),
        ("5090", "bfloat16", "varlen"),
        ("L4", "bfloat16", "varlen"),
        ("H200", "bfloat16", "varlen"),
    ],
)
def test_precision_and_kernel_follow_from_the_card_with_a_reason(card, dtype, kernel):
    if kernel == "varlen" and not hardware._torch_has_varlen():
        pytest.skip("this torch has no FlashAttention over packs")
    chosen = CARDS.get(card)
    assert hardware.precision(POCKET, chosen)[0] == dtype
    assert hardware.attention_kernel(POCKET, chosen)[0] == kernel
    assert all(len(why(POCKET, chosen)[1]) > 20 for why in (hardware.precision, hardware.attention_kernel))


@pytest.mark.parametrize(
    ("changes", "units", "dtype"),
    [
        ({}, True, "bfloat16"),
        ({}, False, "float32"),
        ({"compute_dtype": "float32"}, True, "float32"),
        ({"model": "embedded:pocket/model"}, True, "float32"),
    ],
    ids=["wide", "no units", "given", "narrow"],
)
def test_a_cpu_computes_wide_models_in_bf16_if_it_has_units_for_it(monkeypatch, changes, units, dtype):
    monkeypatch.setattr(hardware, "cpu_has_bf16_units", lambda: units)
    config = RunConfig.from_preset("smollm2", **changes)
    assert hardware.precision(config, None)[0] == dtype
    assert hardware.precision(config, None, "encoder-decoder")[0] == "float32"
    assert isinstance(hardware.cpu_has_bf16_units(), bool)


def test_what_is_given_is_kept():
    given = RunConfig.from_preset("pocket", compute_dtype="float32", attention_kernel="dense", liger=False)
    assert hardware.precision(given, CARDS["H100"]) == ("float32", "as given")
    assert hardware.attention_kernel(given, CARDS["H100"]) == ("dense", "as given")
    assert hardware.liger_kernels(given, CARDS["H100"]) == (False, "as given")


def test_liger_is_never_a_requirement(monkeypatch):
    monkeypatch.setattr(hardware, "find_spec", lambda name: None)
    wanted, why = hardware.liger_kernels(POCKET, CARDS["T4"])
    assert not wanted
    assert "pip install liger-kernel" in why
    assert hardware.attention_kernel(POCKET, CARDS["H100"])[0] == "split"  # a torch without the kernel


def test_cards_are_found_by_name_and_others_named():
    assert hardware.find_card("a100-80") is CARDS["A100-80"]
    written = {"RTX 3060": "3060", "NVIDIA GeForce RTX 4060 Ti": "4060-Ti", "rtx-a6000": "A6000", "2×T4": "2xT4",
               "2 x T4": "2xT4", "l40s": "L40S", "Tesla P100": "P100"}  # fmt: skip
    assert {name: hardware.find_card(name).name for name in written} == written
    with pytest.raises(ConfigError, match=rf"RTX: not known. Expected one of {', '.join(CARDS)}\."):
        hardware.find_card("RTX")


def test_liger_needs_what_triton_needs(monkeypatch):
    monkeypatch.setattr(hardware, "find_spec", lambda name: object())
    assert hardware.liger_kernels(POCKET, CARDS["V100-16"])[0]
    wanted, why = hardware.liger_kernels(POCKET, CARDS["P100"])
    assert not wanted and "7.0 or later, and P100 is older" in why


@pytest.mark.parametrize(
    ("card", "note"),
    [("P100", r"built for CUDA 12\.6"), ("V100-32", r"built for CUDA 12\.6"), ("5090", r"CUDA 12\.8 or later"),
     ("2xT4", "all 2 GPUs train")],
)  # fmt: skip
def test_what_to_know_before_a_run_is_noted(card, note):
    assert re.search(note, CARDS[card].note)


def test_most_cards_need_no_note():
    quiet = {"3060", "T4", "4060-Ti", "4080", "L4", "A10", "3090", "4090", "A100-40", "L40S", "A6000", "A100-80",
             "H100", "H200"}  # fmt: skip
    assert {name for name, card in CARDS.items() if not card.note} == quiet


class Properties:
    def __init__(self, name, memory, major, minor):
        self.name, self.total_memory, self.major, self.minor = name, memory, major, minor


@pytest.mark.parametrize(
    ("name", "memory", "capability", "alike"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2 * GIB, (9, 0), "H100"),
        ("NVIDIA A100-SXM4-40GB", 39.4 * GIB, (8, 0), "A100-40"),
        ("Tesla T4", 14.6 * GIB, (7, 5), "T4"),
        ("NVIDIA GeForce RTX 4090", 23.5 * GIB, (8, 9), "4090"),
        ("NVIDIA GeForce RTX 4060 Ti", 15.7 * GIB, (8, 9), "4060-Ti"),
        ("NVIDIA RTX A6000", 47.5 * GIB, (8, 6), "A6000"),
        ("NVIDIA L40S", 44.4 * GIB, (8, 9), "L40S"),
        ("Tesla V100-SXM2-32GB", 31.7 * GIB, (7, 0), "V100-32"),
        ("Tesla P100-PCIE-16GB", 15.9 * GIB, (6, 0), "P100"),
        ("NVIDIA GeForce RTX 5090", 31.4 * GIB, (12, 0), "5090"),
        ("NVIDIA RTX 4500 Ada", 23.5 * GIB, (8, 9), None),  # unknown: of its generation, and the nearest in memory
    ],
)
def test_this_card_is_recognised(monkeypatch, name, memory, capability, alike):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties(name, int(memory), *capability))
    card = hardware.this_card()
    assert (card.name, card.memory, card.capability) == (name, int(memory), capability)
    assert card.bandwidth in {c.bandwidth for c in CARDS.values() if c.capability[0] == capability[0]}
    if alike:
        assert card.matrix_rate == CARDS[alike].matrix_rate


def test_a_second_gpu_of_this_machine_is_noted(monkeypatch):  # trap 30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties("Tesla T4", 14 * GIB, 7, 5))
    assert (
        hardware.this_card().note
        == "all 2 GPUs train, each with its share of a step; all else takes place on the first"
    )


@pytest.mark.gpu
def test_the_gpu_here_has_a_plan():
    card = hardware.this_card()
    assert card.memory == torch.cuda.get_device_properties(0).total_memory


@pytest.mark.parametrize(("card", "changes", "why"), [
    ("H100", {}, None),
    ("T4", {}, "other shapes in each pass"),
    (None, {}, "no GPU"),
    ("H100", {"packing": False}, "not packed"),
    ("H100", {"lora_dropout": 0.1}, "dropout"),
    ("H100", {"fused_layers": False}, "peft's own layers"),
    ("H100", {"compute_dtype": "float32"}, "16-bit numbers only"),
    ("H100", {"cuda_graphs": False}, "as given"),
], ids=str)  # fmt: skip
def test_passes_are_captured_where_nothing_but_tensors_tells_one_from_another(card, changes, why, monkeypatch):
    monkeypatch.setattr(hardware, "_torch_has_varlen", lambda: True)
    config = POCKET.model_copy(update=changes)
    captured, reason = hardware.cuda_graphs(config, CARDS[card] if card else None)
    assert captured == (why is None)
    assert why is None or why in reason


def test_a_launched_process_counts_the_gpus_of_all(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties("Tesla T4", 14 * GIB, 7, 5))
    monkeypatch.setenv("WORLD_SIZE", "two")  # left by mistake: refused where a training begins
    assert hardware.this_card().gpus == 2
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert hardware.this_card().gpus == 2
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # torchrun has started this process, and no other
    assert hardware.this_card().gpus == 1
    monkeypatch.setenv("WORLD_SIZE", "4")  # two hosts
    card = hardware.this_card()
    assert (card.gpus, card.label) == (4, "4xTesla T4")
    assert hardware.use_gpus(card, POCKET.model_copy(update={"gpus": 1})) == hardware.Card(
        card.name, card.memory, card.capability, card.matrix_rate, card.bandwidth
    )
