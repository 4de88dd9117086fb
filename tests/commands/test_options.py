from __future__ import annotations

import argparse

import pytest

from qlora_utils import cli
from qlora_utils.commands import options
from qlora_utils.config import ConfigError


def test_a_preset_may_be_given_as_a_parameter(tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("question,answer\n" + "".join(f"Is {n} odd?,Perhaps.\n" for n in range(20)))
    place = ["--output-dir", str(tmp_path)]
    assert cli.main(["check", str(tmp_path / "rows.csv"), "-p", "preset=pocket-t5", *place]) == 0
    assert "pocket-t5" in capsys.readouterr().out
    assert cli.main(["plan", "-p", "preset=pocket", "--gpu", "T4"]) == 0
    assert capsys.readouterr().out.startswith("pocket on T4")


def test_parameters_are_names_and_values():
    assert options.parse_parameters(["a=1", " b =x=y", "c="]) == {"a": "1", "b": "x=y", "c": ""}
    for wrong in ("a", "=1", ""):
        with pytest.raises(ConfigError, match="expected NAME=VALUE"):
            options.parse_parameters([wrong])


def test_a_run_is_named_or_its_directory_given(tmp_path):
    assert options.run_path("mine", str(tmp_path)) == tmp_path / "mine"
    (tmp_path / "config.json").write_text("{}")
    assert options.run_path(str(tmp_path), "elsewhere") == tmp_path


def test_every_command_shows_the_traceback_if_asked():
    (commands,) = [a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction)]
    assert len(commands.choices) == 13
    assert all("--debug" in parser.format_help() for parser in commands.choices.values())
