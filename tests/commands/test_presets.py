from __future__ import annotations

import subprocess
import sys

from qlora_utils import cli
from qlora_utils.config import RunConfig


def test_presets_and_fields_are_listed(capsys):
    assert cli.main(["presets"]) == 0
    assert cli.main(["presets", "--fields"]) == 0
    out = capsys.readouterr().out
    assert "llama2-7b" in out
    assert all(name in out for name in RunConfig.model_fields)


def test_what_loads_in_a_moment_draws_no_bar():
    code = """if True:
        from qlora_utils import cli
        cli.main(["presets"])
        from tqdm.auto import tqdm  # as transformers does
        for _ in tqdm(range(100)): pass
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pocket" in done.stdout
    assert done.stderr == ""
