"""Define the options that several commands share, as parent parsers, and read their values."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from qlora_utils.config import ConfigError
from qlora_utils.locate import is_url


def common_options() -> argparse.ArgumentParser:
    """Make the parent parser of every command: `--debug`."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    return parent


def output_dir_options() -> argparse.ArgumentParser:
    """Make the parent parser of commands that look for runs: `--output-dir`."""
    parent = common_options()
    parent.add_argument(
        "--output-dir", type=_folder, default="outputs", help="folder of run directories (default: outputs)"
    )
    return parent


def _folder(named: str) -> str:
    """Return the folder that `--output-dir` names.

    Raises:
        ArgumentTypeError: it is a URL.
    """
    if is_url(named):
        raise argparse.ArgumentTypeError(f"{named[:80]!r} is a URL; expected a folder of this machine")
    return named


def run_options() -> argparse.ArgumentParser:
    """Make the parent parser of commands on an existing run: `--run` and `--output-dir`."""
    parent = output_dir_options()
    parent.add_argument("--run", required=True, help="name of the run, or path of its directory")
    return parent


def parameter_options() -> argparse.ArgumentParser:
    """Make the parent parser of commands that take `RunConfig` fields: `-p` and `--output-dir`."""
    parent = output_dir_options()
    parent.add_argument(
        "-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE", help="any RunConfig field"
    )
    return parent


def parse_parameters(pairs: Sequence[str]) -> dict[str, str]:
    """Read `NAME=VALUE` pairs into a mapping.

    Raises:
        ConfigError: a pair without `=`.
    """
    given = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"-p {pair}: expected NAME=VALUE, as in -p learning_rate=1e-4.")
        given[name.strip()] = value
    return given


def run_path(named: str, output_dir: str) -> Path:
    """Return the directory that `--run` names, by its path or by its name in `--output-dir`."""
    folder = Path(named)
    # Only a folder with a config is taken as a path: any folder here may have the name of a run.
    if (folder / "config.json").is_file():
        return folder.resolve()
    return Path(output_dir) / named
