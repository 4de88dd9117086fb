"""Keep variables of the environment from deciding what the config decides (notebook 04).

accelerate and transformers read many of them: those that `accelerate launch` sets, and those that a
launcher of several processes sets. One that was left in a shell would change a training unseen.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from qlora_utils.config import ConfigError

# A launcher as torchrun sets all of these for each process.
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Numbers of processes as MPI has them. Without a GPU accelerate takes them for a launcher's.
_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# With this set transformers reports to a server, though the arguments say that nothing is reported.
_REPORTS = "KUBEFLOW_TRAINER_SERVER_URL"
# Variables that make products in float32 less exact, with the values that do not. Libraries read
# them when they are loaded, so that they cannot be undone here.
_INEXACT = {
    "NVIDIA_TF32_OVERRIDE": ("0",),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": ("0",),
    "ONEDNN_DEFAULT_FPMATH_MODE": ("STRICT",),
    "DNNL_DEFAULT_FPMATH_MODE": ("STRICT",),
}


def check_launcher() -> None:
    """Check that variables of a launcher are either those of a whole launch or without effect.

    Raises:
        ConfigError: some are set and others missing, or one is no number; names all of them.
    """
    numbers = {name: whole_number(name) for name in (*LAUNCHER[:3], *_MPI_SIZES)}
    wrong = [name for name, number in numbers.items() if number is None and name in os.environ]
    several = [name for name in _MPI_SIZES if (numbers[name] or 0) > 1 and not torch.cuda.is_available()]
    rank, local_rank, processes = (numbers[name] for name in LAUNCHER[:3])

    # One process of one is what a training is anyway, and -1 the old word for "not launched".
    is_launched = (rank or 0) > 0 or (-1 if local_rank is None else local_rank) >= 0 or (processes or 1) > 1
    missing = [name for name in LAUNCHER if not os.environ.get(name)]
    is_whole = not missing and rank is not None and processes is not None and 0 <= rank < processes
    if not wrong and ((not is_launched and not several) or is_whole):
        return
    names = [name for name in (*LAUNCHER, *_MPI_SIZES) if name in os.environ]
    given = ", ".join(f"{name}={os.environ[name]!r}" for name in names)
    absent = f", without {', '.join(missing)}" if missing else ""
    raise ConfigError(
        f"the environment has {given}{absent}: not what a launcher of several processes sets. Unset what was left "
        f"there (unset {' '.join(names)}), or start with torchrun."
    )


def whole_number(name: str) -> int | None:
    """Return a variable as a whole number; None if it is not set, or is no number."""
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        return None


def check_precision(compute_dtype: str) -> None:
    """Check that float32, if that is asked for, is computed as float32.

    Raises:
        ConfigError: a variable makes such products less exact; names it.
    """
    if compute_dtype != "float32":
        return
    for name, exact in _INEXACT.items():
        value = os.environ.get(name, "")
        if value and value.upper() not in exact:
            raise ConfigError(
                f"compute_dtype: float32 is asked for, and {name}={value} in the environment makes products in float32 "
                f"less exact. Start again without it (unset {name}), or take another compute_dtype."
            )


@contextmanager
def ignore_overrides(report: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hide variables by which accelerate and transformers would override the config; restore them afterwards.

    Args:
        report: called with a line of text that names those that would have changed something.
    """
    names = [name for name in os.environ if name.startswith("ACCELERATE_") or name == _REPORTS]
    hidden = {name: os.environ.pop(name) for name in names}
    # `accelerate launch` sets some of them to what they are anyway.
    effective = [f"{name}={value}" for name, value in hidden.items() if value.lower() not in ("", "0", "no", "false")]
    if effective and report:
        report(f"ignored in the environment, since the config decides: {', '.join(sorted(effective))}")
    try:
        yield
    finally:
        os.environ.update(hidden)
