"""Train on several GPUs from a notebook or a command: start one process for each, watch and stop them (notebook 04).

`torchrun`, which `accelerate launch` calls too, starts the processes, each of which runs `qlora train`. What they write
is what a training in this process would have written; what ends one of them ends all, and is raised here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_utils.config import ConfigError, ModelError, RunConfig, as_given
from qlora_utils.locate import first_line
from qlora_utils.loop import processes
from qlora_utils.loop.checkpoints import DiskError
from qlora_utils.loop.interruptions import DivergedError, Interrupted, StopOnSignal
from qlora_utils.loop.live import LogView, Moment, View, view_here
from qlora_utils.models.hardware import OutOfMemoryError, free_memory
from qlora_utils.rows.files import DataError
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import DamagedError, read_jsonl, write_text
from qlora_utils.runs.locks import LockedError, end_with_parent

# What the processes printed, in the run directory, after an error that nobody foresaw.
OUTPUT = "processes.log"
# Where a process writes the error that ended it, for the one that started it.
ERROR_FILE = "QLORA_ERROR_FILE"
_ERRORS = {kind.__name__: kind for kind in (ConfigError, ModelError, DataError, DamagedError, DivergedError,
                                            OutOfMemoryError, DiskError, LockedError)}  # fmt: skip
# Seconds between two looks at the processes.
_REST_S = 0.2


def count_processes(config: RunConfig) -> int:
    """Return in how many processes a training is to run from here: one for each GPU, on a CPU one.

    In a process that a launcher has started it is one, also if that has started no other.

    Raises:
        ConfigError: `gpus` asks for more than are visible.
    """
    visible = torch.cuda.device_count()
    if processes.count() > 1 or torch.distributed.is_torchelastic_launched() or not visible:
        return 1
    if config.gpus is not None and config.gpus > visible:
        raise ConfigError(
            f"gpus: {config.gpus} are asked for, and this machine shows {visible}. Take -p gpus={visible}."
        )
    return config.gpus or visible


def train_in_processes(config: RunConfig, run: RunDirectory, number: int, steps: int) -> None:
    """Train a prepared run in processes of their own, show how far they are, and stop them when this one is stopped.

    Args:
        config: the run.
        run: the run directory.
        number: of processes.
        steps: of the whole training.

    Raises:
        Interrupted: the training was stopped, and has saved.
        KeyboardInterrupt: it was stopped before it had begun, or before it could save.
        RuntimeError: a process was killed, or failed outside of the training.
        Others: as `training.train`.
    """
    where = "GPUs" if torch.cuda.is_available() else "processes"
    print(f"training on {number} {where}, each with its share of {config.batch_size} examples a step; gpus=1: on one")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        with (scratch / "output").open("wb") as output:
            child = subprocess.Popen(
                _command(config, run, number),
                env=_environment(scratch),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            stopper = StopOnSignal()
            try:
                with stopper.handle_signals():
                    _watch(child, run, steps, stopper)
            finally:
                _kill(child)
        if child.returncode:
            raise _read_error(scratch, child.returncode, run, is_asked=stopper.received is not None)


def write_error(error: BaseException) -> None:
    """Leave the error that ends this process where `train_in_processes` finds it; the first of several counts."""
    path = os.environ.get(ERROR_FILE)
    if path is None:
        return
    said: dict[str, Any] = {"kind": type(error).__name__, "message": str(error) or type(error).__name__}
    if isinstance(error, Interrupted):
        said |= {"step": error.step, "steps": error.steps, "saved": error.saved}
        said["checkpoint"] = str(error.checkpoint) if error.checkpoint else None
    # A process that the end of another one ended comes second.
    try:
        with Path(path).open("x", encoding="utf-8") as file:
            json.dump(said, file)
    except FileExistsError:
        return


@contextmanager
def off_the_gpu(model: nn.Module) -> Iterator[None]:
    """Keep the weights of a model in main memory meanwhile, so that other processes can have those of the GPU."""
    weights = [weight for weight in (*model.parameters(), *model.buffers()) if weight.is_cuda]
    expanded = [layer for layer in model.modules() if hasattr(layer, "dequantized_weight")]
    places = [weight.device for weight in weights]
    for layer in expanded:
        del layer.dequantized_weight
    for weight in weights:
        _move(weight, torch.device("cpu"))
    free_memory()
    try:
        yield
    finally:
        for weight, place in zip(weights, places, strict=True):
            _move(weight, place)
        if expanded:
            from qlora_utils.kernels.lora_layers import keep_expanded

            keep_expanded(model)


def _move(weight: Any, place: torch.device) -> None:
    """Move a weight, and the constants by which it was quantized."""
    weight.data = weight.data.to(place)
    if (state := getattr(weight, "quant_state", None)) is not None:
        state.to(place)
    # bitsandbytes' 8-bit weights name their own numbers a second time.
    if getattr(weight, "CB", None) is not None:
        weight.CB = weight.data


def _command(config: RunConfig, run: RunDirectory, number: int) -> list[str]:
    """Return the command that trains in a number of processes of this machine."""
    command = [sys.executable, "-m", "qlora_utils.loop.launch", "--standalone", "--nproc_per_node", str(number)]
    command += ["-m", "qlora_utils.cli", "train", str(run.path.resolve())]
    stored = RunConfig.continue_run(run.path)
    changed = {name for name in RunConfig.model_fields if getattr(config, name) != getattr(stored, name)}
    # Steps that are given alone would take the place of epochs.
    if "steps" in changed:
        changed.add("epochs")
    for name in sorted(changed - {"run_name", "output_dir"}):
        command += ["-p", f"{name}={as_given(getattr(config, name))}"]
    return command


def _environment(scratch: Path) -> dict[str, str]:
    """Return the environment of the processes: this one's, without what a launcher may have left there."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    return {**kept, ERROR_FILE: str(scratch / "error.json")}


def _watch(child: subprocess.Popen[bytes], run: RunDirectory, steps: int, stopper: StopOnSignal) -> None:
    """Show the training until its processes have ended; hand on a request to stop."""
    began, wall = time.monotonic(), time.time()
    shown_at, known, is_asked = -1e9, 0, False
    lines: list[dict[str, Any]] = []
    size = 0
    view: View | None = None
    with _at_worst_unseen():
        view = view_here()
    while child.poll() is None:
        time.sleep(_REST_S)
        now = time.monotonic()
        if stopper.received is not None and not is_asked:
            is_asked = True
            _ask_to_stop(child, run)
        # A long history is read only when it has grown; one that is older belongs to an earlier training.
        grown = run.history.stat().st_size if run.history.is_file() else 0
        if grown != size:
            lines, size = _read_history(run.history, since=wall), grown
        measured = sum("eval_loss" in line for line in lines)
        if view is not None and now - shown_at >= (view.news_s if measured > known else view.every_s):
            with _at_worst_unseen():
                view.show(_moment(lines, steps, now - began))
            shown_at, known = now, measured
    lines = _read_history(run.history, since=wall)
    phase = "done" if child.returncode == 0 else "stopped" if stopper.received else "failed"
    if view is not None and (lines or not isinstance(view, LogView)):
        with _at_worst_unseen():
            view.close(_moment(lines, steps, time.monotonic() - began, phase))


@contextmanager
def _at_worst_unseen() -> Iterator[None]:
    """Warn of an error in showing a training: it must not end the training, which may take hours."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"the training goes on unseen: it cannot be shown ({first_line(error)})", stacklevel=3)


def _moment(lines: list[dict[str, Any]], steps: int, elapsed_s: float, phase: str = "training") -> Moment:
    """Return the state of the training that its history tells."""
    trained = [line for line in lines if "loss" in line]
    step = trained[-1]["step"] if trained else 0
    left_s = None
    # The speed is that of the latest steps; loading and compiling are over.
    if trained and phase == "training" and (speed := trained[-1].get("tokens_per_s")):
        left_s = trained[-1]["tokens"] / step / speed * (steps - step)
    peak = max((line.get("peak_memory_bytes") or 0 for line in trained), default=0)
    if not trained and phase == "training":
        phase = "measuring"
    return Moment(
        step=step, steps=steps, lines=lines, phase=phase, elapsed_s=elapsed_s, left_s=left_s, peak_memory_bytes=peak
    )


def _read_history(path: Path, *, since: float) -> list[dict[str, Any]]:
    """Return the whole lines of a history that another process is writing; none of one that is older."""
    try:
        return read_jsonl(path) if path.stat().st_mtime >= since else []
    # It is about to be written, or written over.
    except (FileNotFoundError, DamagedError):
        return []


def _ask_to_stop(child: subprocess.Popen[bytes], run: RunDirectory) -> None:
    """Ask the first process to stop, which tells the others.

    The launcher would kill all of them after half a minute. It is asked where the first process does not train yet.
    """
    import psutil

    try:
        first = int(json.loads((run.path / ".training.lock").read_text(encoding="utf-8"))["pid"])
        # The lock may be that of another training, for which these processes wait.
        if first in [process.pid for process in psutil.Process(child.pid).children(recursive=True)]:
            os.kill(first, signal.SIGTERM)
            return
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        pass
    child.terminate()


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End the launcher, which ends its processes, if this process leaves before they have ended."""
    if child.poll() is None:
        child.terminate()
        child.wait()


def _read_error(scratch: Path, status: int, run: RunDirectory, *, is_asked: bool = False) -> BaseException:
    """Return the error that ended the processes.

    Args:
        scratch: folder with what they have left.
        status: of the launcher.
        run: the run directory.
        is_asked: whether they were asked to stop.
    """
    try:
        said = json.loads((scratch / "error.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        said = {}
    kind, message = said.get("kind", ""), said.get("message", "")
    if kind == Interrupted.__name__:
        checkpoint = Path(said["checkpoint"]) if said["checkpoint"] else None
        return Interrupted(said["step"], said["steps"], checkpoint, saved=said["saved"])
    if kind in _ERRORS:
        return _ERRORS[kind](message)
    if is_asked:
        return KeyboardInterrupt(
            f"stopped, as asked, before the training in {run.path} could save; its earlier checkpoints, if there are "
            "any, are whole. Run the same again to go on."
        )
    # The launcher names the process that ended first, and how: what others say then is that they lost it, and one that
    # waits for it on a GPU is killed in the end.
    output = (scratch / "output").read_text(encoding="utf-8", errors="replace")
    first_failure = output.rpartition("Root Cause")[2]
    killed = [line.strip() for line in first_failure.splitlines() if "Signal " in line and "SIGTERM" not in line]
    reason = killed[-1] if killed else f"{kind}: {first_line(message)}" if kind else f"exit status {status}"
    # Tracebacks are of use to whoever mends it.
    write_text(run.path / OUTPUT, output)
    return RuntimeError(
        f"one of the processes that train in {run.path} has ended ({reason}), and with it all others; {OUTPUT} there "
        "holds what they printed. Run the same again to go on from the last checkpoint; -p gpus=1 trains on one GPU."
    )


def _launch() -> None:
    """Be `torchrun`, and end with the process that has started this one, however that ends (on Linux)."""
    from torch.distributed.run import main

    end_with_parent(signal.SIGTERM)
    main()


if __name__ == "__main__":
    _launch()
