from __future__ import annotations

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
    with pytest.raises(ConfigError, match=r"RTX: not known.*T4, L4, A10, A100-40, A100-80, H100, H200"):
        hardware.find_card("RTX")


class Properties:
    def __init__(self, name, memory, major, minor):
        self.name, self.total_memory, self.major, self.minor = name, memory, major, minor


@pytest.mark.parametrize(
    ("name", "memory", "capability", "alike"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2 * GIB, (9, 0), "H100"),
        ("NVIDIA A100-SXM4-40GB", 39.4 * GIB, (8, 0), "A100-40"),
        ("Tesla T4", 14.6 * GIB, (7, 5), "T4"),
        ("NVIDIA GeForce RTX 4090", 23.5 * GIB, (8, 9), "L4"),  # unknown: of its generation, and the nearest in memory
    ],
)
def test_this_card_is_recognised(monkeypatch, name, memory, capability, alike):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties(name, int(memory), *capability))
    card = hardware.this_card()
    assert (card.name, card.memory, card.capability) == (name, int(memory), capability)
    assert card.bandwidth in {c.bandwidth for c in CARDS.values() if c.capability[0] == capability[0]}
    if "RTX" not in name:
        assert card.matrix_rate == CARDS[alike].matrix_rate


@pytest.mark.gpu
def test_the_gpu_here_has_a_plan():
    card = hardware.this_card()
    assert card.memory == torch.cuda.get_device_properties(0).total_memory
