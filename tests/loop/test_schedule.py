"""The learning rate of every step: warm-up, one step alone, and a training that is continued."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import BOTH, BOTH_T5_SLOW
from test_training import CrashAt, changed, train
from transformers import get_scheduler

from qlora_utils import training
from qlora_utils.curves import read_history
from qlora_utils.loop import checkpoints, schedule
from qlora_utils.loop.trainer import StepTrainer, training_arguments
from qlora_utils.models.resolution import resolve_auto
from qlora_utils.report.facts import gather
from qlora_utils.report.sentences import caveats, course, summary
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_json, read_jsonl

CURVES = ("cosine", "linear", "constant", "constant_with_warmup")
PEAKS = (1e-3, 1e-4)  # of matrices and head


@pytest.fixture
def scheduled(config, run):
    """A training's optimizer of two groups and its schedule, as the Trainer makes them, for a number of steps."""

    def make(steps, **changes):
        variant = changed(config, steps=steps, **changes)
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in PEAKS]
        trainer = SimpleNamespace(
            config=variant, optimizer=torch.optim.AdamW(groups), lr_scheduler=None,
            args=training_arguments(resolve_auto(variant), run, 1),
        )  # fmt: skip
        StepTrainer.create_scheduler.__get__(_as_trainer(trainer))(steps)
        return trainer.optimizer, trainer.lr_scheduler

    return make


def _as_trainer(values):
    """A StepTrainer of nothing but these attributes."""
    trainer = StepTrainer.__new__(StepTrainer)
    trainer.__dict__ = values.__dict__
    return trainer


def take(optimizer, scheduler, steps):
    """The rates of both groups in each of these steps."""
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        if not isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            scheduler.step()
    return rates


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("steps", [1, 2, 33, 34, 100])
def test_no_step_is_a_warm_up_where_the_share_is_below_one(scheduled, name, steps):
    rates = [rate for rate, _ in take(*scheduled(steps, lr_scheduler=name, warmup_ratio=0.03), steps)]
    dead = [index for index, rate in enumerate(rates) if rate == 0]
    assert dead == ([0] if 0.03 * steps >= 1 else [])
    assert max(rates) == pytest.approx(PEAKS[0])


def test_every_schedule_of_the_config_is_tried_here(config):
    assert {*CURVES, schedule.PLATEAU} == set(type(config).model_fields["lr_scheduler"].annotation.__args__)


def test_a_constant_rate_has_the_warm_up_that_its_description_promises(scheduled):
    rates = [rate for rate, _ in take(*scheduled(20, lr_scheduler="constant", warmup_ratio=0.2), 20)]
    assert rates == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, *[1e-3] * 16])
    assert rates == [
        rate for rate, _ in take(*scheduled(20, lr_scheduler="constant_with_warmup", warmup_ratio=0.2), 20)
    ]
    assert {rate for rate, _ in take(*scheduled(20, lr_scheduler="constant", warmup_ratio=0.0), 20)} == {1e-3}


@pytest.mark.parametrize("name", [*CURVES, schedule.PLATEAU])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.2, 0.6])
@pytest.mark.parametrize(("first", "at", "then"), [(10, 10, 20), (10, 6, 20), (10, 10, 11), (10, 10, 500), (20, 5, 8)])
def test_a_continued_training_lies_on_the_new_schedule_from_its_first_step_on(
    config, scheduled, name, warmup, first, at, then
):
    """No dead step, no rate above the peak, no second warm-up, else what the new number of steps asks for."""
    values = {"lr_scheduler": name, "warmup_ratio": warmup}
    optimizer, scheduler = scheduled(first, **values)
    take(optimizer, scheduler, at)
    stored = optimizer.state_dict(), scheduler.state_dict()
    optimizer, scheduler = scheduled(then, **values)
    optimizer.load_state_dict(stored[0])
    scheduler.load_state_dict(stored[1])
    stored_config = changed(config, steps=first, **values)
    until_then = schedule.warmup_steps(scheduled(first, **values)[1])
    asked = schedule.warmup_steps(scheduler)
    schedule.keep_warmup(scheduler, until_then, stored_config, {"steps": first})
    schedule.follow_schedule(scheduler, optimizer)
    rates = take(optimizer, scheduler, then - at)
    if asked is not None and until_then <= at < asked:
        # The warm-up is over: the curve from here to the end, without a second one.
        assert schedule.warmup_steps(scheduler) == at
        assert rates[0] == pytest.approx(PEAKS)
        assert all(after <= before for before, after in pairwise(rate for rate, _ in rates))
    else:
        assert rates == take(*scheduled(then, **values), then)[at:]
    for group, peak in enumerate(PEAKS):
        assert all(0 < rate[group] <= peak for rate in rates)


@pytest.mark.parametrize("name", CURVES)
def test_resuming_an_unchanged_training_changes_no_bit_of_its_rates(scheduled, name):
    values = {"lr_scheduler": name, "warmup_ratio": 0.1}
    optimizer, scheduler = scheduled(30, **values)
    take(optimizer, scheduler, 7)
    stored = optimizer.state_dict(), scheduler.state_dict()
    again = scheduled(30, **values)
    again[0].load_state_dict(stored[0])
    again[1].load_state_dict(stored[1])
    before = [group["lr"] for group in again[0].param_groups]
    schedule.follow_schedule(again[1], again[0])
    assert [group["lr"] for group in again[0].param_groups] == before


@pytest.mark.parametrize("until_then", [0, None], ids=["recorded", "of an earlier version"])
def test_a_warm_up_that_is_over_stays_over_however_often_the_training_is_resumed(config, scheduled, until_then):
    """Ten steps of 0.03 have no warm-up, a thousand have one of 30."""
    values = {"lr_scheduler": "constant", "warmup_ratio": 0.03}
    optimizer, scheduler = scheduled(10, **values)
    take(optimizer, scheduler, 10)
    for stored_steps, before in ((10, {"steps": 10}), (1000, {}), (1000, {"learning_rate": 1e-3})):
        stored = optimizer.state_dict(), scheduler.state_dict()
        optimizer, scheduler = scheduled(1000, **values)
        optimizer.load_state_dict(stored[0])
        scheduler.load_state_dict(stored[1])
        schedule.keep_warmup(scheduler, until_then, changed(config, steps=stored_steps, **values), before)
        schedule.follow_schedule(scheduler, optimizer)
        until_then = schedule.warmup_steps(scheduler)
        assert until_then == 10
        assert take(optimizer, scheduler, 5) == [[*PEAKS]] * 5


def test_a_warm_up_that_goes_on_is_resumed_to_the_bit(config, scheduled):
    for values, before in (({"steps": 100}, {}), ({"steps": 50}, {"steps": 50})):
        _, scheduler = scheduled(100, warmup_ratio=0.2)
        scheduler.last_epoch = 7
        schedule.keep_warmup(scheduler, 20 if not before else 10, changed(config, warmup_ratio=0.2, **values), before)
        assert schedule.warmup_steps(scheduler) == 20


# ------------------------------------------------------------------------------------------------ in a training


def quick(config, **changes):
    """A training of small steps, which measures at its ends alone."""
    values = {"batch_size": 2, "train_rows": 64, "eval_steps": 100, "save_steps": 100, "eval_rows": 2}
    return changed(config, **{**values, **changes})


def rates_of(history):
    return [line["lr"] for line in history if "lr" in line]


@BOTH_T5_SLOW
def test_ten_steps_continued_to_twenty(config, tokenizer, prepared, scheduled, capsys):
    short = quick(config, steps=10, learning_rate=PEAKS[0], head_learning_rate=PEAKS[1])
    _, _, first = train(short, tokenizer, prepared)
    capsys.readouterr()
    _, run, history = train(changed(short, steps=20), tokenizer, prepared)
    rates, expected = rates_of(history), [rate for rate, _ in take(*scheduled(20), 20)]
    assert rates[:10] == rates_of(first)
    assert rates[10:] == expected[10:]
    assert min(rates[10:]) > 0
    drops = [after - before for before, after in pairwise(rates[10:])]
    assert max(drops) < 0, "a cosine falls from step to step"

    # the seam is said, and recorded wherever somebody looks for what this training was
    continued = [{"step": 10, "before": {"steps": 10}}]
    assert "continued from step 10, with steps=10 until then" in capsys.readouterr().out
    assert read_json(run.config)["continued"] == read_json(run.metrics)["train"]["continued"] == continued
    assert [line["step"] for line in history if line.get("continued_from") == 10] == [11]
    assert read_history(run) == history
    said = "The training was continued from step 10, with steps=10 until then."
    assert said in course(gather(run))
    assert said in summary(run)


def test_ten_steps_continued_to_many_have_no_second_warm_up(config, tokenizer, prepared):
    """Lost again after a later checkpoint, it goes on with the warm-up that was cut."""
    short = quick(config, steps=4, learning_rate=1e-3, lr_scheduler="constant", warmup_ratio=0.2)
    train(short, tokenizer, prepared)
    longer = changed(short, steps=40, save_steps=1)
    with pytest.raises(OSError, match="machine lost"):
        train(longer, tokenizer, prepared, CrashAt(6))
    run = RunDirectory(longer.run_dir)
    newest = checkpoints.find_newest(run.checkpoints)
    assert checkpoints.step_of(newest) > 4
    assert read_json(newest / "checkpoint.json")["warmup_steps"] == 4
    with pytest.raises(OSError, match="machine lost"):
        train(longer, tokenizer, prepared, CrashAt(7))
    assert rates_of(read_jsonl(run.history)) == [1e-3] * 7


@pytest.mark.slow
def test_an_unfinished_training_that_is_continued_says_so_once(config, tokenizer, prepared):
    """Stopped at step 4 of 6, continued to 9 and lost at step 6, then to its end: one seam, at step 4."""
    short = quick(config, steps=6, save_steps=2, learning_rate=1e-3, logging_steps=3)
    with pytest.raises(OSError, match="machine lost"):
        train(short, tokenizer, prepared, CrashAt(4))
    longer = changed(short, steps=9)
    with pytest.raises(OSError, match="machine lost"):
        train(longer, tokenizer, prepared, CrashAt(6))
    _, run, history = train(longer, tokenizer, prepared)
    assert read_json(run.config)["continued"] == [{"step": 4, "before": {"steps": 6}}]
    assert [(line["step"], line["continued_from"]) for line in history if "continued_from" in line] == [(6, 4)]
    assert all(rate > 0 for rate in rates_of(history))


@pytest.mark.slow
def test_more_epochs_are_more_steps_of_one_schedule(config, tokenizer, prepared, scheduled):
    once = quick(config, epochs=1, batch_size=32, learning_rate=PEAKS[0])
    _, run, _ = train(once, tokenizer, prepared)
    assert "continued" not in read_json(run.config)
    _, run, history = train(changed(once, epochs=2), tokenizer, prepared)
    assert rates_of(history)[2:] == [rate for rate, _ in take(*scheduled(4), 4)][2:]
    assert read_json(run.config)["continued"] == [{"step": 2, "before": {"epochs": 1.0}}]


@BOTH
def test_a_training_of_one_step_learns(config, tokenizer, prepared):
    model, run, history = train(quick(config, epochs=1, batch_size=64), tokenizer, prepared)
    assert rates_of(history) == [config.learning_rate]
    matrices = [weight for name, weight in model.named_parameters() if "lora_B" in name]
    assert all(weight.abs().max() > 0 for weight in matrices)
    assert read_json(run.metrics)["train"]["learned"] is True
    assert not [line for line in caveats(gather(run)) if "Nothing was learned" in line]


def test_a_training_without_any_rate_says_so(config, tokenizer, prepared, run, monkeypatch):
    """As a run of one step was, made with an earlier version."""
    monkeypatch.setattr(StepTrainer, "create_scheduler", _without_rate)
    _, run, _ = train(quick(config, steps=1), tokenizer, prepared)
    stored = read_json(run.metrics)["train"]
    assert stored["learned"] is False
    assert "nothing: no step had a learning rate above 0" in training.TrainingSummary(**stored).text()
    assert "Nothing was learned: no step had a learning rate above 0" in summary(run)
    assert "Nothing was learned" in caveats(gather(run))[0]


def _without_rate(self, num_training_steps, optimizer=None):
    self.lr_scheduler = get_scheduler("linear", optimizer or self.optimizer, num_training_steps, num_training_steps)
    return self.lr_scheduler
