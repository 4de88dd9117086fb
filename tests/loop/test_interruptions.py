from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qlora_utils.loop import interruptions
from qlora_utils.models.hardware import is_out_of_memory


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_memory_are_told_from_others(error, is_one):
    assert is_out_of_memory(error) == is_one


def test_what_really_runs_out_of_memory_is_seen():
    with pytest.raises(Exception) as caught:  # whichever kind torch takes
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_bad_steps_are_counted_and_a_few_in_a_row_are_too_many():
    watch = interruptions.DivergenceWatch()
    assert [watch.count_skipped() for _ in range(interruptions.BAD_STEPS - 1)] == [False] * (
        interruptions.BAD_STEPS - 1
    )
    watch.count_good()
    assert [watch.count_skipped() for _ in range(interruptions.BAD_STEPS)] == [False] * (
        interruptions.BAD_STEPS - 1
    ) + [True]
    assert watch.skipped == 2 * interruptions.BAD_STEPS - 1


def test_a_diverged_training_names_step_and_causes():
    text = str(
        interruptions.diverged_error(
            7, float("nan"), 3.0, learning_rate=0.1, dtype="float16", advice="Checkpoint 4 is whole."
        )
    )
    for part in ("nan", "step 7", "learning_rate too high (0.1)", "float16", "65,504", "Checkpoint 4 is whole."):
        assert part in text
    assert "float16" not in str(
        interruptions.diverged_error(7, 1.0, 3.0, learning_rate=0.1, dtype="bfloat16", advice="")
    )


def test_the_first_signal_asks_and_the_second_leaves_at_once():
    leave, control = interruptions.StopOnSignal(), SimpleNamespace(should_save=False, should_training_stop=False)
    before = signal.getsignal(signal.SIGTERM)
    with leave.handle_signals():
        leave.on_step_end(None, None, control)
        assert not control.should_training_stop
        os.kill(os.getpid(), signal.SIGTERM)
        leave.on_step_end(None, None, control)
        assert control.should_training_stop
        assert control.should_save
        with pytest.raises(KeyboardInterrupt, match="asked twice"):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with interruptions.StopOnSignal().handle_signals():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_in_another_thread_signals_are_left_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with interruptions.StopOnSignal().handle_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_an_interruption_has_fields_and_says_what_they_hold():
    saved = interruptions.Interrupted(40, 250, Path("c/checkpoint-40"), saved=True)
    assert (saved.step, saved.steps, saved.checkpoint, saved.saved) == (40, 250, Path("c/checkpoint-40"), True)
    assert str(saved) == (
        "stopped after step 40 of 250, as asked, and saved in c/checkpoint-40. Run the same again to go on."
    )
    lost = interruptions.Interrupted(40, 250, Path("c/checkpoint-25"), saved=False)
    assert "not saved; the last checkpoint is c/checkpoint-25" in str(lost)


@pytest.mark.parametrize("is_good", [True, False])
def test_a_verdict_is_known_at_once_where_nothing_computes_it_elsewhere(is_good):
    assert interruptions.Verdict(torch.tensor(is_good), 3, torch.zeros(()), 1.0).wait() is is_good


@pytest.mark.gpu
@pytest.mark.parametrize("is_good", [True, False])
def test_a_verdict_on_its_way_waits_for_nothing_that_was_launched_later(is_good):
    verdict = interruptions.Verdict(torch.tensor(is_good, device="cuda"), 3, torch.zeros(()), 1.0).on_its_way()
    large = torch.randn(8192, 8192, device="cuda")
    done = torch.cuda.Event()
    for _ in range(50):
        large = large @ large * 1e-4
    done.record()
    assert verdict.wait() is is_good
    assert not done.query()
