"""What the docs say is there: links, anchors, commands, options, targets, files, modules, variables."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import subprocess
import tomllib
import warnings
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from conftest import ROOT

import qlora_utils
from qlora_utils import cli
from qlora_utils.commands import sweep, sweep_search
from qlora_utils.commands.options import parse_parameters
from qlora_utils.config import RunConfig
from qlora_utils.presets import PRESETS
from qlora_utils.runs.directory import RunDirectory

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "NOTICE.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("[0-9]*.ipynb"))
MAKEFILE = (ROOT / "Makefile").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NAMES_FILES = r"(?:qlora_utils|tests|notebooks|data|docs|benchmarks|\.ci|\.github)/"
# Written by a run, or by whoever reads this.
NOT_OURS = {"data/train.jsonl", "data/held_out.jsonl", "data/rejected.jsonl", "data/report.json"}
PATTERNS = {"qlora_utils/room/name.py", "tests/room/test_name.py"}  # of files that somebody will add
OF_TORCH = {"found_inf"}
# Environment variables that no file of this repository names, since others read them.
OF_OTHERS = {"CUDA_VISIBLE_DEVICES", "PIP_EXTRA_INDEX_URL", "HF_TOKEN"}

PER_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
PER_TEXT = pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda path: str(path.relative_to(ROOT)))


def text_of(page):
    """A page's Markdown; of a notebook its text cells, with a blank line between them."""
    if page.suffix != ".ipynb":
        return page.read_text(encoding="utf-8")
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def blocks(text, languages=("bash",)):
    """Contents of the code blocks in one of these languages."""
    return [body for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if language in languages]


def without_blocks(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def inline(text):
    """What stands between single backticks; a line may break in between."""
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", without_blocks(text))]


def anchors(text):
    """The anchors that GitHub gives to the headings of a page."""
    found, seen = set(), {}
    for line in without_blocks(text).splitlines():
        if match := re.match(r"#{1,6} +(.+?) *#*$", line):
            title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", match[1]).replace("`", "")
            title = re.sub(r"[*_]{1,2}(\S.*?)[*_]{1,2}(?=\W|$)", r"\1", title)
            slug = re.sub(r"[^\w\- ]", "", title.lower().strip()).replace(" ", "-")
            number = seen.get(slug, -1) + 1
            seen[slug] = number
            found.add(f"{slug}-{number}" if number else slug)
    return found


def seen(text):
    """What a reader sees: without comments."""
    return re.sub(r"<!--.*?-->", "", text, flags=re.S)


def links(text):
    """Targets of links and pictures outside code."""
    bare = re.sub(r"(?<!`)`[^`]+`(?!`)", "code", without_blocks(seen(text)))
    return re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", bare)


def test_anchors_are_those_of_github():
    text = (
        "# What's `qlora run`?\n## A: b, c (d)\n## A: b, c (d)\n```bash\n# no heading\n```\n## *One* [two](x.md) 3 % \n"
    )
    assert anchors(text) == {"whats-qlora-run", "a-b-c-d", "a-b-c-d-1", "one-two-3-"}


@PER_TEXT
def test_every_link_leads_somewhere(page):
    for target in links(text_of(page)):
        parts = urlsplit(target)
        if parts.scheme:
            assert parts.scheme == "https", target
            assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc), target
            continue
        assert not parts.netloc and not parts.query, target
        there = page if not parts.path else (page.parent / unquote(parts.path)).resolve()
        assert there.is_relative_to(ROOT), f"{target} leads out of the repository"
        assert there.exists(), f"{target} is not there"
        if parts.fragment:
            assert parts.fragment in anchors(text_of(there)), f"{target}: no such heading"


@PER_PAGE
def test_pictures_have_a_text_and_are_ours(page):
    for alt, target in re.findall(r"!\[([^]]*)\]\(([^)\s]+)", seen(text_of(page))):
        assert len(alt) >= 10, f"{target}: what does it show?"
        path = (page.parent / target).resolve()
        assert urlsplit(target).netloc == "colab.research.google.com" or path.is_file() or "kaggle" in target, target
        if path.is_file():
            assert path.stat().st_size < 500_000


# ---------------------------------------------------------------------------------------------------- commands


def commands(text, program):
    """Every command of a program in code blocks and between backticks, as its words, comments taken off."""
    lines = [line for block in blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    found = []
    for code in [*lines, *inline(text)]:
        for part in re.split(r"&&|;|\|", code.split("  #")[0].split(" # ")[0]):
            words = part.strip().split(" ")
            if words[0].removeprefix(".venv/bin/").removeprefix("$(BIN)/") == program:
                found.append(part.strip())
    return found


def is_sketch(command):
    """Whether only the name of a command is meant, or something is left out."""
    return len(command.split()) <= 2 or "…" in command or "name=value" in command


PLACEHOLDERS = {"PRESET": "pocket", "owner/name": "owner/name"}


def words_of(command):
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command)]
    return [word.removeprefix(".venv/bin/") for word in words][1:]


def subcommands():
    parser = cli._parser()
    (choices,) = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return choices


def checked(command, capsys):
    """Parse a command as the program would; `-p` is held against the fields of RunConfig and the values they take."""
    try:
        options = cli._parser().parse_args(words_of(command))
    except SystemExit as left:
        assert left.code == 0, f"{command}: {capsys.readouterr().err}"
        return
    parameters = getattr(options, "parameters", [])
    if options.command is sweep.main:
        # Each value of a list, and each end of a range.
        texts = [(name, text) for name, values in sweep.read_values(parameters).items() for text in values]
        for name, text in texts:
            for value in text.split("..") if sweep_search.read_range(text) else [text]:
                RunConfig.from_preset(options.preset or "pocket", **{name: value})
        return
    given = parse_parameters(parameters)
    assert given.keys() <= RunConfig.model_fields.keys(), command
    RunConfig.from_preset(getattr(options, "preset", None) or "pocket", **given)
    for name in ("gpu",):
        if value := getattr(options, name, None):
            from qlora_utils.models.hardware import find_card

            find_card(value)


@PER_TEXT
def test_qlora_commands_are_such_that_the_program_takes(page, capsys):
    for command in commands(text_of(page), "qlora"):
        words = words_of(command)
        if not words or words[0].startswith("-"):
            continue
        assert words[0] in subcommands(), f"{command}: no such command"
        options = {name for action in subcommands()[words[0]]._actions for name in action.option_strings}
        for word in words[1:]:
            if word.startswith("-"):
                assert word.split("=")[0] in options, f"{command}: no option {word}"
        if not is_sketch(command):
            checked(command, capsys)


def test_the_readme_shows_every_command():
    shown = {words[0] for c in commands((ROOT / "README.md").read_text(), "qlora") if (words := words_of(c))}
    assert subcommands().keys() <= shown


@PER_TEXT
def test_parameters_between_backticks_are_fields_with_values_they_take(page):
    for code in inline(text_of(page)):
        for name, value in re.findall(r"(?:^|\s)-p (\w+)=(\S*)", code) if not code.startswith("qlora") else ():
            assert name in RunConfig.model_fields or (name, value) == ("name", "value"), code
            if name != "name" and "…" not in value and not value.startswith('"') and "PATH" not in value:
                RunConfig.from_preset("pocket", **{name: value})


@PER_TEXT
def test_options_between_backticks_belong_to_some_command(page):
    known = {name for parser in subcommands().values() for action in parser._actions for name in action.option_strings}
    benchmarks = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    for code in inline(text_of(page)):
        if code.startswith("--"):
            option = re.split(r"[ =]", code)[0]
            assert option in known or f'"{option}"' in benchmarks, f"{code}: no command has that"


def targets():
    return dict(re.findall(r"^([a-z0-9-]+):.*?## (.*)$", MAKEFILE, re.M))


@PER_TEXT
def test_make_targets_exist(page):
    for command in commands(text_of(page), "make"):
        for word in words_of(command):
            name = word.partition("=")[0]
            if "=" in word:  # a variable that the Makefile or a script of its reads
                scripts = MAKEFILE + (ROOT / ".ci" / "gpu-check").read_text()
                assert re.search(rf"\b{name}\b", scripts), f"{command}: nothing reads {name}"
            else:
                assert word in targets(), f"{command}: no such target"


def test_every_target_is_told_of():
    told = {word for page in PAGES for command in commands(text_of(page), "make") for word in words_of(command)}
    left_out = {"workflows"}  # a part of `make lint`
    assert targets().keys() - told - left_out == set()


def test_what_check_says_of_the_example_is_what_the_page_shows(tmp_path, capsys):
    (shown,) = blocks((ROOT / "docs" / "data.md").read_text(), ["text"])
    example = str(ROOT / "data" / "examples" / "questions.csv")
    assert cli.main(["check", example, "--output-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line for line in shown.splitlines() if line not in said] == []


def test_presets_are_told_of_with_what_they_take():
    table = (ROOT / "README.md").read_text().split("## What it takes", 1)[1].split("\n## ", 1)[0]
    for preset in PRESETS:
        assert f"| `{preset}` |" in table
        assert preset in (ROOT / "docs" / "models.md").read_text()


# ---------------------------------------------------------------------------------------------------- files and names


@PER_TEXT
def test_files_between_backticks_exist(page):
    for code in inline(text_of(page)):
        if re.fullmatch(NAMES_FILES + r"[\w./*-]*", code) and code not in NOT_OURS | PATTERNS:
            found = list(ROOT.glob(code)) if "*" in code else [ROOT / code] * (ROOT / code).exists()
            assert found, f"{code} is not there"


def test_the_map_names_every_room_and_every_module_at_the_top_and_no_other():
    readme = (ROOT / "README.md").read_text()
    section = readme.split("## The series", 1)[1].split("\n## ", 1)[0] + readme.split("## Map of the files", 1)[1]
    package = ROOT / "qlora_utils"
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"`(\w+\.py)`", section)) == modules
    rooms = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert set(re.findall(r"^\| `(\w+/)` \| [^|]+ \| `", section, re.M)) == rooms  # each with a sentence


def test_the_map_names_the_files_of_each_room():
    for room, files in re.findall(r"^\| `(\w+)/` \| [^|]+ \| (`[^|]+) \|$", (ROOT / "README.md").read_text(), re.M):
        there = {path.stem for path in (ROOT / "qlora_utils" / room).glob("*.py")} - {"__init__"}
        assert set(re.findall(r"`(\w+)`", files)) - {"auto"} == there, room


def test_the_readme_names_every_folder_and_page():
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    readme = (ROOT / "README.md").read_text()
    folders = {line.split("/")[0] for line in listed.stdout.splitlines() if "/" in line and not line.startswith(".")}
    for folder in folders:
        assert f"`{folder}/`" in readme
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in readme
    assert readme.count("\n") <= 250  # a front door


def test_all_that_a_run_leaves_is_told_of():
    page = (ROOT / "docs" / "run_directory.md").read_text()
    run = RunDirectory(Path("outputs/demo"))
    for name in (name for name, value in vars(RunDirectory).items() if isinstance(value, property)):
        path = getattr(run, name)
        if path.parent == run.path:
            assert f"`{path.name}" in page, f"{path.name} is not told of"


def test_what_lies_beside_the_runs_is_told_of(tmp_path):
    from qlora_utils import data
    from qlora_utils.models import memory as plan

    page = (ROOT / "docs" / "run_directory.md").read_text()
    config = RunConfig.from_preset("pocket", output_dir=str(tmp_path))
    data.save_upload("a.csv", b"question,answer\nwhy,so\n", config)
    plan.learn(config, 100)
    (tmp_path / ".prepared").mkdir()
    assert len(list(tmp_path.iterdir())) == 3
    for path in tmp_path.iterdir():
        assert f"`{path.name}{'' if path.is_file() else '/'}`" in page


def test_columns_of_the_history_are_told_of(tmp_path):
    """Those that are drawn, and all that `HistoryWriter` writes."""
    from made_runs import measured

    from qlora_utils.curves import COLUMNS
    from qlora_utils.loop.history import HistoryWriter

    section = (ROOT / "docs" / "run_directory.md").read_text().split("## history.jsonl", 1)[1].split("\n## ", 1)[0]
    at = SimpleNamespace(global_step=1, epoch=0.1, num_input_tokens_seen=1)
    writer = HistoryWriter(tmp_path / "history.jsonl")
    writer.on_log(None, at, None, logs={"loss": 1.0, "learning_rate": 0.1, "skipped_steps": 1})
    line = measured(RunDirectory(tmp_path), 1, 1.0, "answer")
    for name in {*writer.lines[0], *line, *line["sample"], *COLUMNS}:
        assert f"`{name}`" in section


def test_fields_of_a_preference_are_told_of():
    from qlora_utils.evaluation.generation import Sampling
    from qlora_utils.playground import Exchange, StreamedAnswer

    section = (ROOT / "docs" / "run_directory.md").read_text().split("## preferences.jsonl", 1)[1].split("\n## ", 1)[0]
    said = {model: StreamedAnswer() for model in ("base", "tuned")}
    one = Exchange(
        run="a", question="q", system="", history=(), left_out=0, prompt="", sampling=Sampling(), asked_at="",
        answers=said, preferred="base",
    )  # fmt: skip
    for name in one.preference():
        assert f"`{name}`" in section


@PER_TEXT
def test_fields_of_the_config_are_spelled_right(page):
    """Names with an underscore between backticks are those of something in the code."""
    sources = "".join(path.read_text() for folder in ("qlora_utils", "benchmarks", "tests", "data")
                      for path in (ROOT / folder).rglob("*.py"))  # fmt: skip
    code_cells = "".join("".join(cell["source"]) for path in NOTEBOOKS for cell in json.loads(path.read_text())["cells"]
                         if cell["cell_type"] == "code")  # fmt: skip
    known = sources + code_cells + (ROOT / "pyproject.toml").read_text()
    for code in inline(text_of(page)):
        if re.fullmatch(r"[a-z]+(_[a-z0-9]+)+", code) and code not in OF_TORCH:
            assert re.search(rf"\b{code}\b", known), f"{code}: named nowhere in the code"


@PER_TEXT
def test_environment_variables_are_read_by_something(page):
    scripts = MAKEFILE + "".join(
        path.read_text()
        for path in [
            *(ROOT / ".ci").glob("*-check"),
            *(ROOT / "qlora_utils").rglob("*.py"),
            *ROOT.glob("notebooks/*.ipynb"),
        ]
    )
    text = text_of(page)
    codes = [*inline(text), *(line for block in blocks(text) for line in block.splitlines())]
    for code in codes:
        for name in re.findall(r"(?:^|export |\s)([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+) ?=", code):
            assert name in OF_OTHERS or re.search(rf"\b{name}\b", scripts), f"{name}: nothing reads it"


@pytest.mark.parametrize("name", ["README.md", "docs/troubleshooting.md"])
def test_messages_of_the_program_are_quoted_as_they_are(name):
    """The symptoms of the first columns are searched for; what differs from case to case stands as …"""
    # Python's, the shell's, pip's, PyTorch's
    foreign = ("ensurepip is not available", "qlora: command not found", "nvidia-…",
               "no kernel image is available for execution on the device")  # fmt: skip
    sources = "".join(path.read_text() for path in (ROOT / "qlora_utils").rglob("*.py")) + MAKEFILE
    sources = " ".join(re.sub(r"\"\s*\n\s*[rf]*\"", "", sources).split())  # strings that go on in the next line
    tables = re.findall(r"^\| what you see \|.*?\n\n", (ROOT / name).read_text() + "\n", re.M | re.S)
    assert tables
    for row in re.findall(r"^\| (.*?) \|", "".join(tables), re.M):
        for message in re.findall(r"`([^`]+)`", row):
            for part in re.split(r"…|\(.*?\)", message) if message not in foreign else ():
                words = part.strip(" .:,")
                assert words in sources, f"{message}: no such message"


# ---------------------------------------------------------------------------------------------------- licence, citation


def test_the_licence_is_apache_2_and_said_everywhere():
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "Version 2.0, January 2004" in licence
    assert licence.rstrip().endswith("limitations under the License.")
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    for name in PYPROJECT["project"]["license-files"]:
        assert (ROOT / name).is_file()
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"] == "Apache-2.0"


def test_the_citation_is_of_this_version_and_address():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert str(citation["version"]) == qlora_utils.__version__
    assert citation["repository-code"] == PYPROJECT["project"]["urls"]["Repository"]


def test_the_changelog_knows_this_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert f"{qlora_utils.__version__}" in text
    kinds = re.findall(r"^### (.*)$", text, re.M)
    assert kinds and set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


# ---------------------------------------------------------------------------------------------------- the picture


def scores_in(picture):
    """The scores that `docs/result.py` put into the file beside what is drawn; None in a picture of before."""
    from PIL import Image

    with Image.open(picture) as image:
        described = image.info.get("Description")
    return described and json.loads(described)


def test_the_picture_shows_the_run_whose_result_is_stored():
    stored = ROOT / "benchmarks" / "results" / "demo.json"
    if not stored.is_file():
        pytest.skip("no run of the seven notebooks is stored")
    values = json.loads(stored.read_text())["values"]
    shown = scores_in(ROOT / "docs" / "result.png")
    assert shown == {name: values[f"pocket.seed0.{name}"] for name in shown}


def test_the_picture_is_drawn_from_a_run_whatever_its_texts(tmp_path, monkeypatch):
    def line(number, right, text):
        base, tuned = {"answer": "$", "exact_match": 0.0}, {"answer": "\\frac{ " + text, "exact_match": float(right)}
        asked = {"split": "held-out rows", "text": text, "expected": "$x^2$ \x1b[2J", "history": []}
        return {**asked, "tags": {"domain": f"{number}"}, "base": base, "tuned": tuned}

    lines = [line(number, number != 2, f"${number} & <b> _^$ \x00 " + "long " * 60) for number in range(5)]
    history = [
        {"step": step, "loss": 2.0 / (step + 1), "eval_loss": 1.0 / (step + 1), "eval_exact_match": step / 9}
        for step in range(9)
    ]
    for name, rows in (("answers", lines), ("history", history)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = {"exact_match": 0.8, "intervals": {"exact_match": [0.5, 0.9]}}
    metrics = {"base": scores, "tuned": scores, "train": {"kept_step": 8}, "held_out": {"questions": 5}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "config.json").write_text(json.dumps({"config": {"trace_rows": 3}}))
    spec = importlib.util.spec_from_file_location("result", ROOT / "docs" / "result.py")
    result = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(result)
    monkeypatch.setattr(result, "OUT", tmp_path / "result.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a glyph that is missing
        assert result.main([str(tmp_path)]) == 0
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    assert scores_in(tmp_path / "result.png") == {
        "questions": 5, "base.exact_match": 0.8, "tuned.exact_match": 0.8, "tuned.exact_match_low": 0.5,
        "tuned.exact_match_high": 0.9,
    }  # fmt: skip
    shown = [line["text"] for line in result.chosen(lines)]
    assert shown == [lines[0]["text"], lines[1]["text"], lines[3]["text"], lines[2]["text"]]  # the wrong one last
    assert result.main([]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/data.md"])
def test_a_plain_terminal_finds_the_commands_from_the_page_alone(page):
    """In a shell that knows of no environment: what the page says before its first `qlora` makes it known."""
    if not (ROOT / ".venv" / "bin" / "activate").is_file():
        pytest.skip("the environment of this test is not the one that make makes")
    lines = "\n".join(blocks(text_of(ROOT / page))).splitlines()
    before = lines[: next(number for number, line in enumerate(lines) if line.startswith("qlora "))]
    said = [line for line in before if line.startswith("source ")]
    check = next(line for line in lines if line.startswith("qlora check data/"))
    done = subprocess.run(
        ["bash", "-ec", "\n".join([*said, check])], cwd=ROOT, capture_output=True, text=True, check=False,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": os.environ.get("HOME", "/")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "This can be trained on" in done.stdout
