"""The files in configs/ are what `accelerate launch` takes, and start as many processes as they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import get_free_port
from conftest import ROOT

FILES = sorted((ROOT / "configs").glob("*.yaml"))
PROCESSES = {"gpus_1": 1, "gpus_2": 2, "gpus_4": 4, "gpus_8": 8, "hosts_2x8": 16}
# A command that ends at once and loads no model; each process prints the line of the preset.
COMMAND = ["-m", "qlora_utils.cli", "presets"]
PRINTED = re.compile(r"^pocket ", re.M)


def launch(*words):
    """The command line of `accelerate launch`; torch's own messages about threads are left out."""
    return [sys.executable, "-m", "accelerate.commands.launch", *words, *COMMAND]


def test_there_is_a_file_for_each_number_of_gpus():
    assert {path.stem for path in FILES} == PROCESSES.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_loads_each_file(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == PROCESSES[path.stem]
    assert config.num_machines == (2 if path.stem == "hosts_2x8" else 1)
    kind = DistributedType.NO if path.stem == "gpus_1" else DistributedType.MULTI_GPU
    assert (config.distributed_type, config.use_cpu) == (kind, False)
    # Precision and the kind of parallel training are the run's own.
    assert config.mixed_precision is None
    assert config.fsdp_config == config.deepspeed_config == {}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_commands_in_each_file_are_such_that_accelerate_takes(path):
    found = [line.removeprefix("#   ") for line in path.read_text().splitlines() if line.startswith("#   ")]
    assert found
    for number, command in enumerate(found):
        assert command.startswith(f"accelerate launch --config_file configs/{path.name} ")
        words = command.split()[2:]
        words[1] = str(path)
        options, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
        assert (options.module, options.training_script) == (True, "qlora_utils.cli")
        # Without a launcher's processes a training would start its own, on all GPUs.
        alone = ["-p", "gpus=1"] if path.stem == "gpus_1" else []
        assert options.training_script_args == ["train", "NAME", *alone]
        assert options.num_processes == PROCESSES[path.stem]
        assert int(options.machine_rank) == number


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpus_1", "gpus_2"])
def test_a_file_starts_so_many_processes(name):
    command = launch("--config_file", str(ROOT / "configs" / f"{name}.yaml"))
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(PRINTED.findall(done.stdout)) == PROCESSES[name]


@pytest.mark.slow
def test_two_hosts_find_each_other():
    """Both are this machine, with one process each."""
    port = str(get_free_port())
    place = ["--config_file", str(ROOT / "configs" / "hosts_2x8.yaml"), "--num_processes", "2"]
    place += ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
    hosts = [
        subprocess.Popen(
            launch(*place, "--machine_rank", rank), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in ("1", "0")
    ]  # fmt: skip
    for host in hosts:
        printed, _ = host.communicate(timeout=300)
        assert host.returncode == 0, printed
        assert len(PRINTED.findall(printed)) == 1, printed
