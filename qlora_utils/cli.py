"""Run the command line: `qlora` and the name of a command, each a file in `commands`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from qlora_utils import __version__
from qlora_utils.commands import (
    answer,
    ask,
    check,
    compare,
    merge,
    plan,
    playground,
    presets,
    report,
    run,
    runs,
    sweep,
    train,
)
from qlora_utils.config import ConfigError, is_text
from qlora_utils.style import cut, on_terminal


class _Parser(argparse.ArgumentParser):
    """Parse arguments, with errors of one line that name the help command."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with status 2."""
        self.exit(2, f"qlora: {message}. `{self.prog} --help` says what there is.\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 success, 1 failure, 2 wrong usage."""
    _write_any_text()
    words = sys.argv[1:] if arguments is None else arguments
    for word in words:
        if not is_text(word):
            print(f"qlora: '{cut(word, 80)}' is not UTF-8 text. {_ENCODING_ADVICE}", file=sys.stderr)
            return 2
    options = _parser().parse_args(words)
    # Progress bars of other libraries, here and in kernels, appear only after 3 seconds.
    os.environ.setdefault("TQDM_DELAY", "3")
    try:
        return options.command(options)
    # The reader closed the pipe, as `head` does. At exit Python would complain of it once more.
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (Exception, KeyboardInterrupt) as error:
        if options.debug:
            raise
        # The message may quote the output of a notebook, or a row.
        print(f"qlora: {on_terminal(_one_line(error))}", file=sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            return 128 + getattr(error, "number", signal.SIGINT)
        return 2 if isinstance(error, ConfigError) else 1


# What to do about a word of the command line that isn't UTF-8, be it a question, a name or a path.
_ENCODING_ADVICE = "Set the terminal to UTF-8 (export LANG=C.UTF-8) and type it again; rename a file of such a name."


def _write_any_text() -> None:
    r"""Let stdout spell out what its encoding lacks, as `\u2026`, instead of ending the command there."""
    for stream in (sys.stdout, sys.stderr):
        # A stream that a test or a notebook put there may know nothing of encodings.
        if getattr(stream, "errors", None) in ("strict", "surrogateescape") and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _one_line(error: BaseException) -> str:
    """Format an error for a terminal; name its type if the library doesn't raise it itself."""
    text = str(error).strip()
    if isinstance(error, KeyboardInterrupt):
        return text or "interrupted"
    # Python's own message would be `[Errno 2] …: 'path'`.
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {(error.strerror or type(error).__name__).lower()}"
    if isinstance(error, (RuntimeError, ValueError, OSError)) and text:
        return text
    return f"{type(error).__name__}: {text or 'no message'} (`--debug` shows where)"


def _parser() -> argparse.ArgumentParser:
    """Build the parser with all commands."""
    parser = _Parser(prog="qlora", description="QLoRA fine-tuning for question answering.")
    parser.set_defaults(debug=False)
    parser.add_argument("--version", action="version", version=f"qlora-utils {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    for command in (run, check, runs, report, presets, plan, ask, answer, playground, compare, merge, train, sweep):
        command.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
