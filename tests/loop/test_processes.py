from __future__ import annotations

import pytest
import torch

from qlora_utils.loop import processes


@pytest.fixture
def second_of_three(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")


def test_one_process_takes_everything_and_waits_for_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    assert (processes.count(), processes.rank(), processes.is_first()) == (1, 0, True)
    assert processes.gather(processes.share("abc")) == ["a", "b", "c"]
    processes.join()
    processes.wait()


def test_each_of_several_takes_one_in_so_many(second_of_three):
    assert (processes.count(), processes.rank(), processes.is_first()) == (3, 1, False)
    assert processes.share("abcdefg") == ["b", "e"]
    assert processes.share("a") == []


def test_what_is_no_number_is_left_to_the_check_of_the_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    monkeypatch.setenv("RANK", "")
    assert (processes.count(), processes.rank()) == (1, 0)


@pytest.mark.parametrize("number", [0, 1, 2, 3, 7, 9])
def test_what_was_shared_comes_back_in_order(second_of_three, monkeypatch, number):
    items = list(range(number))

    def all_gather_object(parts, own):
        parts[:] = [items[0::3], own, items[2::3]]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    assert processes.gather(processes.share(items)) == items
