from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT

from qlora_utils import cli
from qlora_utils import locate as place
from qlora_utils.locate import is_path, is_url, locate, model_advice, outputs_of_notebooks


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (type("GatedRepoError", (Exception,), {})("403"), "hf auth login"),
        (OSError("You are trying to access a gated repo."), "licence"),
        (type("RepositoryNotFoundError", (Exception,), {})("404"), "Check the name"),
        (OSError("We couldn't connect"), "give a local folder"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory."), "Several can split it"),
        (ValueError("`tiktoken` is required to read a `tiktoken` file."), "pip install sentencepiece protobuf"),
    ],
)
def test_a_model_out_of_reach_says_how_to_get_in(error, advice):
    assert advice in model_advice("meta-llama/Llama-2-7b-hf", error)


def test_what_can_only_be_a_path():
    for source in ("/a", "./a", "~/a", "name", "a/b/c", "embedded:pocket"):
        assert is_path(source)
    assert not is_path("owner/name")
    assert is_path("folder/rows.CSV", (".csv",))


def test_embedded_sources_lie_in_the_project():
    assert locate("embedded:pocket/model").endswith("data/pocket/model")
    assert locate("owner/name") == "owner/name"


@pytest.mark.parametrize(
    "url", ["s3://bucket/x", "gs://b", "file:///tmp", "https://a.b/c", "hf:/datasets/x", "az+x://y"]
)
def test_what_is_a_url(url):
    assert is_url(url)


@pytest.mark.parametrize(
    "path", ["outputs", "/s3:/x", "./s3://x", "~/a:/b", "C:/runs", "embedded:pocket/model", "a:b/c", ""]
)
def test_what_is_none(path):
    assert not is_url(path)


@pytest.mark.parametrize("working", [".", "notebooks", "notebooks/solutions", "docs", ".."])
def test_the_outputs_of_the_notebooks_are_those_of_the_checkout_wherever_a_kernel_works(working, monkeypatch):
    """papermill starts kernels where it was called: at the root, or beside the clone."""
    monkeypatch.chdir(ROOT / working)
    assert Path(outputs_of_notebooks()).resolve() == ROOT / "outputs"
    assert (outputs_of_notebooks() == "../outputs") == (working in ("notebooks", "docs"))


def test_a_checkout_around_the_kernel_counts_before_that_of_the_package(tmp_path, monkeypatch):
    for name in ("notebooks", "qlora_utils"):
        (tmp_path / "other" / name).mkdir(parents=True)
    (tmp_path / "other" / "qlora_utils" / "config.py").touch()
    monkeypatch.chdir(tmp_path / "other")
    assert outputs_of_notebooks() == str(tmp_path / "other" / "outputs")
    monkeypatch.chdir(tmp_path)
    assert outputs_of_notebooks() == str(ROOT / "outputs")
    # Notebooks that were copied elsewhere, with the package installed, write beside themselves.
    monkeypatch.setattr(place, "__file__", str(tmp_path / "site-packages" / "qlora_utils" / "locate.py"))
    assert outputs_of_notebooks() == "../outputs"


def test_notebooks_that_were_copied_elsewhere_write_beside_themselves(tmp_path, monkeypatch):
    """Also where the package is that of a checkout."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "01_data.ipynb").touch()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert outputs_of_notebooks() == "../outputs"


def test_a_path_in_the_home_folder_is_one_for_every_loader(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/models/mine") == str(tmp_path / "models" / "mine")
    assert locate("~nobody_here/mine") == "~nobody_here/mine"


def test_a_model_and_rows_in_the_home_folder_are_checked_and_planned_for(monkeypatch, tmp_path, capsys):
    shutil.copytree(locate("embedded:pocket/model"), tmp_path / "model")
    rows = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(12)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["check", "~/rows.json", "-p", "model=~/model"]) == 0
    assert "tokenizer of ~/model" in capsys.readouterr().out
    assert cli.main(["plan", "--preset", "pocket", "--gpu", "T4", "-p", "model=~/model"]) == 0
    assert "~/model" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"model", "rows.json", "outputs"}
