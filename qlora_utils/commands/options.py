"""What the options of several commands have in common: parents of their parsers, and what is made of the values."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from qlora_utils.config import ConfigError


def _parent() -> argparse.ArgumentParser:
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    return parent


def plain() -> argparse.ArgumentParser:
    """Make the parent of every command."""
    return _parent()


def among_runs() -> argparse.ArgumentParser:
    """Make the parent of commands that look for runs: `--output-dir`."""
    parent = _parent()
    parent.add_argument("--output-dir", default="outputs", help="folder of run directories (default: outputs)")
    return parent


def of_a_run() -> argparse.ArgumentParser:
    """Make the parent of commands on a run that is there: `--run` and `--output-dir`."""
    parent = among_runs()
    parent.add_argument("--run", required=True, help="name of the run, or path of its directory")
    return parent


def with_parameters() -> argparse.ArgumentParser:
    """Make the parent of commands that take fields of `RunConfig`: `-p` and `--output-dir`."""
    parent = among_runs()
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
    """Return the run directory that `--run` means: a path to one, or the name of one in `--output-dir`."""
    folder = Path(named)
    return folder.resolve() if (folder / "config.json").is_file() else Path(output_dir) / named
