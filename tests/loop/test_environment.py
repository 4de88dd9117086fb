"""What other tools leave in the environment does not change a training unseen."""

from __future__ import annotations

import os

import pytest
import torch
from test_training import changed, losses, train

from qlora_utils import training
from qlora_utils.config import ConfigError
from qlora_utils.loop import environment
from qlora_utils.loop.trainer import training_arguments
from qlora_utils.models.resolution import resolve_auto

TORCHRUN = {
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29411", "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*environment.LAUNCHER, *environment._MPI_SIZES):
        monkeypatch.delenv(name, raising=False)


def given(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "variables",
    [{"WORLD_SIZE": "2"}, {"RANK": "1"}, {"LOCAL_RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "4"}, {"WORLD_SIZE": "two"},
     {"WORLD_SIZE": ""}, {"LOCAL_RANK": "0", "WORLD_SIZE": "1", "RANK": "0"}, {"LOCAL_RANK": "x"},
     {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
     {"MASTER_ADDR": "a", "WORLD_SIZE": "2"}],
    ids=str,
)  # fmt: skip
def test_half_a_launcher_is_one_clear_line(monkeypatch, variables):
    given(monkeypatch, variables)
    with pytest.raises(ConfigError, match=r"the environment has .*unset .*torchrun") as refused:
        environment.check_launcher()
    assert "\n" not in str(refused.value)
    for name, value in variables.items():
        assert f"{name}={value!r}" in str(refused.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU accelerate does not look at them")
@pytest.mark.parametrize("name", environment._MPI_SIZES)
def test_half_a_launch_by_mpi_is_one_clear_line_too(monkeypatch, name):
    given(monkeypatch, {name: "4"})
    with pytest.raises(ConfigError, match=f"{name}='4'"):
        environment.check_launcher()


@pytest.mark.parametrize(
    "variables",
    [{}, {"WORLD_SIZE": "1"}, {"RANK": "0"}, {"LOCAL_RANK": "-1"}, {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"},
     {"RANK": "0", "WORLD_SIZE": "1"}, {"PMI_SIZE": "1"}, TORCHRUN, {**TORCHRUN, "WORLD_SIZE": "8", "RANK": "7"},
     {**TORCHRUN, "WORLD_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "2"}],
    ids=str,
)  # fmt: skip
def test_a_whole_launcher_and_what_has_no_effect_go_on_working(monkeypatch, variables):
    given(monkeypatch, variables)
    environment.check_launcher()


@pytest.mark.parametrize("processes", ["0", "-1", "1"])
def test_no_process_is_one_process(config, run, monkeypatch, processes):
    given(monkeypatch, {"WORLD_SIZE": processes})
    environment.check_launcher()
    arguments = training_arguments(resolve_auto(config), run, 1)
    assert arguments.per_device_train_batch_size == config.batch_size


def test_a_training_under_half_a_launcher_is_refused_before_anything_is_touched(
    config, tuned_model, tokenizer, prepared, run, monkeypatch
):
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    given(monkeypatch, {"WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match="WORLD_SIZE='2'"):
        training.train(config, tuned_model, tokenizer, prepared, run)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "variables",
    [{"ACCELERATE_MIXED_PRECISION": "bf16"}, {"ACCELERATE_MIXED_PRECISION": "fp16"},
     {"ACCELERATE_DYNAMO_BACKEND": "inductor"}, {"ACCELERATE_USE_FSDP": "true"}, {"ACCELERATE_USE_DEEPSPEED": "true"},
     {"ACCELERATE_USE_MEGATRON_LM": "true"}, {"ACCELERATE_TORCH_DEVICE": "meta"},
     {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {"KUBEFLOW_TRAINER_SERVER_URL": "http://127.0.0.1:9"}],
    ids=lambda variables: next(iter(variables)),
)  # fmt: skip
def test_what_accelerate_reads_from_the_environment_does_not_override_the_config(
    config, tuned_model, tokenizer, prepared, run, monkeypatch, capsys, variables
):
    given(monkeypatch, variables)
    trainer = training.make_trainer(config, tuned_model, tokenizer, prepared, run)
    assert trainer.accelerator.mixed_precision == trainer.args.mixed_precision == "no"
    assert trainer.accelerator.state.dynamo_plugin.backend.value == "NO"
    assert trainer.accelerator.state.deepspeed_plugins is None
    assert str(trainer.accelerator.distributed_type.value) == "NO"
    assert trainer.accelerator.gradient_accumulation_steps == 1
    assert trainer.accelerator.device.type == next(tuned_model.parameters()).device.type
    assert trainer.args.report_to == []
    name, value = next(iter(variables.items()))
    assert f"ignored in the environment, since the config decides: {name}={value}" in capsys.readouterr().out
    assert os.environ[name] == value, "the environment is the user's"


def test_a_training_in_float32_is_one_whatever_the_environment_says(config, tokenizer, prepared, monkeypatch):
    once = changed(config, steps=2, batch_size=2, eval_rows=2)
    plain = train(once, tokenizer, prepared)[2]
    given(monkeypatch, {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_FSDP": "true"})
    assert losses(train(changed(once, run_name="again"), tokenizer, prepared)[2]) == losses(plain)


@pytest.mark.parametrize(
    ("name", "inexact", "exact"),
    [("NVIDIA_TF32_OVERRIDE", "1", "0"), ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1", "0"),
     ("ONEDNN_DEFAULT_FPMATH_MODE", "BF16", "STRICT"), ("DNNL_DEFAULT_FPMATH_MODE", "any", "strict")],
)  # fmt: skip
def test_float32_that_would_not_be_float32_is_refused(monkeypatch, name, inexact, exact):
    given(monkeypatch, {name: inexact})
    with pytest.raises(ConfigError, match=f"compute_dtype: float32 is asked for, and {name}={inexact}"):
        environment.check_precision("float32")
    environment.check_precision("bfloat16")
    for harmless in (exact, ""):
        given(monkeypatch, {name: harmless})
        environment.check_precision("float32")
