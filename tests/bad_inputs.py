"""Bad inputs, each with the message that it must give: what is wrong, where, what was expected or what to do next.

A case makes the bad thing in a folder of its own and returns how it is asked for: the words of a command line, or the
variables of a notebook's parameters cell. `tests/test_bad_inputs.py` asks.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import shutil
import struct
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Asked = list[str] | dict[str, Any]
POCKET = Path(__file__).resolve().parent.parent / "data" / "pocket" / "model"
ROWS = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(12)]


@dataclass
class Place:
    """Where a case is made: an empty folder, and a trained run to copy from, of the pocket model."""

    folder: Path
    trained: Path
    closing: ExitStack = field(default_factory=ExitStack)

    @property
    def outputs(self) -> Path:
        return self.folder / "outputs"

    def run(self, name: str = "mine") -> Path:
        """A copy of the trained run, to be spoiled."""
        shutil.copytree(self.trained, self.outputs / name)
        stored = json.loads((self.outputs / name / "config.json").read_text())
        stored["config"] |= {"run_name": name, "output_dir": str(self.outputs)}
        (self.outputs / name / "config.json").write_text(json.dumps(stored))
        return self.outputs / name

    def model(self) -> Path:
        """A copy of the pocket model, to be spoiled."""
        return Path(shutil.copytree(POCKET, self.folder / "model"))

    def file(self, name: str, content: str | bytes = "") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return path


@dataclass(frozen=True)
class Case:
    """One bad input: its name, what makes it and says how it is asked for, the exit status, and the message."""

    name: str
    make: Callable[[Place], Asked]
    status: int
    message: str  # a regular expression
    not_as_root: bool = False  # root may read and write whatever the permissions say


def run_pocket(place: Place, *more: str) -> list[str]:
    return ["run", "--preset", "pocket", "--run-name", "new", "--output-dir", str(place.outputs), *more]


# ---------------------------------------------------------------------------------------------------- values


def value(name: str, given: str, message: str, label: str = "") -> Case:
    """`-p name=given` on the command line."""
    return Case(f"{name}={label or given}", lambda place: run_pocket(place, "-p", f"{name}={given}"), 2, message)


def parameter(name: str, given: Any, message: str, label: str = "") -> Case:
    """A variable of a notebook's parameters cell."""

    def make(place: Place) -> Asked:
        return {"preset": "pocket", "output_dir": str(place.outputs), name: given}

    return Case(f"notebook {name}={label or repr(given)}", make, 2, message)


VALUES = [
    value("steps", "many", r"steps: 'many' is not allowed.*integer.*optimizer steps"),
    value("steps", "0", r"steps: '0' is not allowed.*greater than or equal to 1"),
    value("steps", "-5", r"steps: '-5' is not allowed.*greater than or equal to 1"),
    value("steps", "1.5", r"steps: '1.5' is not allowed.*integer"),
    value("steps", "", r"steps: '' is not allowed.*integer", "empty"),
    value("steps", "none", r"steps: 'none' is not allowed.*integer"),
    value("steps", "1" + "0" * 30, r"steps: '10+' is not allowed.*less than or equal to 1000000000", "huge"),
    value("steps", "9" * 5000, r"steps: '9+… \(5,002 characters\) is not allowed.*integer", "5000 digits"),
    value("batch_size", "[1, 2]", r"batch_size: '\[1, 2\]' is not allowed.*integer"),
    value("batch_size", "0", r"batch_size: '0'.*greater than or equal to 1"),
    value("seed", "-1", r"seed: '-1' is not allowed.*greater than or equal to 0"),
    value("seed", "4294967296", r"seed: '4294967296' is not allowed.*less than 4294967296"),
    value("learning_rate", "nan", r"learning_rate: 'nan' is not allowed.*finite number.*peak learning rate"),
    value("learning_rate", "inf", r"learning_rate: 'inf' is not allowed.*finite number"),
    value("learning_rate", "-1e-4", r"learning_rate: '-1e-4' is not allowed.*greater than 0"),
    value("learning_rate", "2e-4,", r"learning_rate: '2e-4,' is not allowed.*number"),
    value("learning_rate", "5", r"learning_rate: '5' is not allowed.*less than 1"),
    value("head_learning_rate", "fast", r"head_learning_rate: 'fast' is not allowed.*number"),
    value("epochs", "0", r"epochs: '0' is not allowed.*greater than 0"),
    value("epochs", "1e300", r"epochs: '1e300' is not allowed.*less than or equal to 1000000"),
    value("lora_r", "0", r"lora_r: '0' is not allowed.*greater than or equal to 1"),
    value("lora_r", "100000", r"lora_r: '100000' is not allowed.*less than or equal to 1024"),
    value("lora_alpha", "1e300", r"lora_alpha: '1e300' is not allowed.*less than or equal to 1000000"),
    value("lora_dropout", "1", r"lora_dropout: '1' is not allowed.*less than 1"),
    value("rewordings", "-1", r"rewordings: '-1' is not allowed.*greater than or equal to 0"),
    value("rewordings", "1000", r"rewordings: '1000' is not allowed.*less than or equal to 100"),
    value("rewordings", "all", r"rewordings: 'all' is not allowed.*integer"),
    value("lora_targets", "", r"lora_targets: '' is not allowed.*attention-linear, or names of layers", "empty"),
    value("lora_targets", "q v", r"lora_targets: 'q v' is not allowed.*commas between"),
    value("lora_targets", "q_proj,lm_head", r"lora_targets: .*lm_head gets no LoRA; train_head trains it"),
    value("warmup_ratio", "1.5", r"warmup_ratio: '1.5' is not allowed.*less than 1"),
    value("weight_decay", "-0.1", r"weight_decay: '-0.1' is not allowed.*greater than or equal to 0"),
    value("max_grad_norm", "0", r"max_grad_norm: '0' is not allowed.*greater than 0"),
    value("max_seq_len", "8", r"max_seq_len: '8' is not allowed.*greater than or equal to 16"),
    value("held_out_rows", "0", r"held_out_rows: '0' is not allowed.*greater than or equal to 1"),
    value("train_rows", "-3", r"train_rows: '-3' is not allowed.*greater than or equal to 1"),
    value("score_rows", "all", r"score_rows: 'all' is not allowed.*integer"),
    value("probe_rows", "-1", r"probe_rows: '-1' is not allowed.*greater than or equal to 0.*forgetting"),
    value("packing", "perhaps", r"packing: 'perhaps' is not allowed.*boolean"),
    value("optimizer", "sgd", r"optimizer: 'sgd' is not allowed.*adamw_torch"),
    value("optimizer", "adamw8bit", r"optimizer: 'adamw8bit' is not allowed.*Did you mean adamw_8bit\?"),
    value("lr_scheduler", "cosin", r"lr_scheduler: 'cosin' is not allowed.*Did you mean cosine\?"),
    value("compute_dtype", "bf16", r"compute_dtype: 'bf16' is not allowed.*Did you mean bfloat16\?"),
    value("keep", "worst", r"keep: 'worst' is not allowed.*'best' or 'last'"),
    value(
        "attention_kernel", "flash", r"attention_kernel: 'flash' is not allowed.*'varlen', 'split', 'dense' or 'eager'"
    ),
    value("micro_batch_size", "3", r"micro_batch_size=3 does not divide batch_size=16; take a divisor"),
    value("instruction", "Answer briefly.", r"instruction: 'Answer briefly.' is not allowed.*\{question\} in it once"),
    value("instruction", "{question} {question}", r"instruction: .* is not allowed.*\{question\} in it once"),
    value("model", "", r"model: '' is not allowed.*at least 1 character", "empty"),
    value("dataset", "", r"dataset: '' is not allowed.*at least 1 character", "empty"),
    value("run_name", "a/b", r"run_name: 'a/b' is not allowed.*letters, digits"),
    value("run_name", "..", r"run_name: '\.\.' is not allowed.*letters, digits"),
    value("run_name", "my run", r"run_name: 'my run' is not allowed.*letters, digits"),
    value("run_name", ".hidden", r"run_name: '\.hidden' is not allowed.*the first of them a letter or digit"),
    value("run_name", "x" * 300, r"run_name: 'x+… \(302 characters\) is not allowed.*at most 100", "very long"),
    value("output_dir", "", r"output_dir: '' is not allowed.*at least 1 character", "empty"),
    value(
        "output_dir", "/" + "x" * 300, r"output_dir: '/x+' can be no folder \(.*too long\)\. Give another", "very long"
    ),
    value("output_dir", "s3://bucket/runs", r"output_dir: 's3://bucket/runs' is not allowed\. a URL is no folder"),
    value("output_dir", "gs:/bucket", r"output_dir: 'gs:/bucket' is not allowed\. a URL is no folder"),
    value("output_dir", "file:///tmp/runs", r"output_dir: 'file:///tmp/runs' is not allowed\. a URL is no folder"),
    value(
        "model",
        "https://huggingface.co/owner/name",
        r"model: 'https://.*name' is not allowed\. a URL is not fetched.*owner/name",
    ),
    value("model", "hf://owner/name", r"model: 'hf://owner/name' is not allowed\. a URL is not fetched.*hub id"),
    value(
        "dataset", "s3://bucket/rows.csv", r"dataset: 's3://.*csv' is not allowed\. a URL is not fetched.*download it"
    ),
    value("run_name", "caf\udce9", r"'run_name=caf\\udce9' is not UTF-8 text\. Set the terminal to UTF-8", "Latin-1"),
    value("dataset", "/tmp/caf\udce9.csv", r"'dataset=/tmp/caf\\udce9\.csv' is not UTF-8 text.*rename", "Latin-1"),
    value("learning_rte", "1e-4", r"learning_rte: no such parameter\. Did you mean learning_rate\?"),
    value("Steps", "5", r"Steps: no such parameter\. Did you mean steps\?"),
    value("zzz", "5", r"zzz: no such parameter\. `qlora presets --fields` lists them all"),
]

PARAMETERS = [
    parameter("steps", "ten", r"steps: 'ten' is not allowed.*integer"),
    parameter("steps", True, r"steps: True is not allowed.*expected a number or text, not true or false"),
    parameter("steps", [1, 2], r"steps: \[1, 2\] is not allowed.*integer"),
    parameter("steps", 2.5, r"steps: 2.5 is not allowed.*integer"),
    parameter("steps", 10**40, r"steps: 10+ is not allowed.*less than or equal to", "10**40"),
    parameter("packing", 1, r"packing: 1 is not allowed.*expected true or false"),
    parameter("learning_rate", float("nan"), r"learning_rate: nan is not allowed.*finite"),
    parameter("lora_dropout", float("inf"), r"lora_dropout: inf is not allowed.*finite"),
    parameter("model", 7, r"model: 7 is not allowed.*string.*hub id or local folder"),
    parameter("dataset", {"train": "rows.csv"}, r"dataset: \{'train': 'rows.csv'\} is not allowed.*string"),
    parameter("lora_targets", ["q", "v"], r"lora_targets: \['q', 'v'\] is not allowed.*string"),
    parameter("run_name", 7, r"run_name: 7 is not allowed.*string"),
    parameter("output_dir", 7, r"output_dir: 7 is not allowed.*string"),
    parameter("dataset", "s3:/bucket/x.csv", r"dataset: 's3:/bucket/x.csv' is not allowed\. a URL is not fetched"),
    parameter("output_dir", "s3://bucket", r"output_dir: 's3://bucket' is not allowed\. a URL is no folder"),
    parameter("dataset", "caf\ud800", r"dataset: 'caf\\ud800' is not allowed\. expected UTF-8 text", "half a letter"),
    parameter("preset", "lama2-7b", r"preset: 'lama2-7b' is not known; expected one of .*Did you mean llama2-7b\?"),
    parameter("preset", 7, r"preset: 7 is not known; expected one of pocket"),
    parameter("preset", ["pocket"], r"preset: \['pocket'\] is not known; expected one of pocket"),
    parameter("learning_rte", 1e-4, r"learning_rte: no such parameter\. Did you mean learning_rate\?.*another name"),
    parameter("epoch", 3, r"epoch: no such parameter\. Did you mean epochs\?"),
    Case(
        "notebook without preset, output_dir=7", lambda _: {"preset": None, "output_dir": 7}, 2, r"output_dir: 7 is not"
    ),
    Case("notebook without preset, run_name=../x", lambda _: {"run_name": "../x"}, 2, r"run_name: '\.\./x'.*letters"),
]


# ---------------------------------------------------------------------------------------------------- command line


def two_wrong(place: Place) -> Asked:
    return run_pocket(place, "-p", "steps=x", "-p", "lora_r=0")


def config_file(name: str, content: str | bytes, message: str) -> Case:
    def make(place: Place) -> Asked:
        path = place.file("config.json", content)
        return ["run", "--config", str(path), "--run-name", "new", "--output-dir", str(place.outputs)]

    return Case(f"--config: {name}", make, 2, message)


def said(*words: str, status: int = 2, name: str = "") -> Callable[[str], Case]:
    """Words of a command line, which need nothing made; the folder of runs is added."""

    def with_message(message: str) -> Case:
        make = lambda place: [*words, "--output-dir", str(place.outputs)]  # noqa: E731
        return Case(name or "qlora " + " ".join(words), make, status, message)

    return with_message


def with_run(*words: str) -> Callable[[Place], Asked]:
    """Words of a command line about the run `mine`, which is there."""

    def make(place: Place) -> Asked:
        place.run()
        return [*words, "--output-dir", str(place.outputs)]

    return make


def output_dir_is_a_file(place: Place) -> Asked:
    place.file("outputs", "not a folder")
    return run_pocket(place)


def run_dir_is_a_file(place: Place) -> Asked:
    place.file("outputs/new", "not a folder")
    return run_pocket(place)


def output_dir_is_below_a_file(place: Place) -> Asked:
    place.file("notes.txt", "text")
    return ["run", "--preset", "pocket", "--output-dir", str(place.folder / "notes.txt" / "runs")]


def output_dir_is_read_only(place: Place) -> Asked:
    place.outputs.mkdir()
    place.outputs.chmod(0o555)
    place.closing.callback(place.outputs.chmod, 0o755)
    return run_pocket(place)


def config_is_a_folder(place: Place) -> Asked:
    (place.folder / "config").mkdir()
    return ["run", "--config", str(place.folder / "config"), "--output-dir", str(place.outputs)]


def into_holds_something(place: Place) -> Asked:
    place.run()
    place.file("thesis/draft.tex", "years of work")
    return ["merge", "--run", "mine", "--output-dir", str(place.outputs), "--into", str(place.folder / "thesis"),
            "--force"]  # fmt: skip


def into_is_below_a_file(place: Place) -> Asked:
    place.run()
    path = place.file("notes.txt", "text")
    return ["merge", "--run", "mine", "--output-dir", str(place.outputs), "--into", str(path / "merged")]


def sweep_into_a_folder(place: Place) -> Asked:
    return ["sweep", "--output-dir", str(place.outputs), "--seeds", "2", "--out", str(place.folder)]


def sweep_of_a_damaged_list(place: Place) -> Asked:
    place.file("outputs/s/sweep.json", '{"config":')
    return ["sweep", "--output-dir", str(place.outputs), "--name", "s"]


def sweep_of_another_list(place: Place) -> Asked:
    place.file("outputs/s/sweep.json", '{"config": 1}')
    return ["sweep", "--output-dir", str(place.outputs), "--name", "s", "--seeds", "2"]


def sweep_file_without_tables(place: Place) -> Asked:
    return ["sweep", "--output-dir", str(place.outputs), "--sweep", str(place.file("s.toml", "rank = 4"))]


def sweep_file_that_is_no_text(place: Place) -> Asked:
    return ["sweep", "--output-dir", str(place.outputs), "--sweep", str(place.file("s.toml", b"\xff\xfe"))]


STORED = {"preset": "pocket", "model": "embedded:pocket/model", "dataset": "embedded:pocket"}

COMMAND_LINE = [
    Case("several wrong fields", two_wrong, 2, r"lora_r: '0' is not allowed.*\n?.*steps: 'x' is|steps.*\n.*lora_r"),
    Case("-p without =", lambda p: run_pocket(p, "-p", "steps"), 2, r"-p steps: expected NAME=VALUE, as in"),
    Case("-p without name", lambda p: run_pocket(p, "-p", "=5"), 2, r"-p =5: expected NAME=VALUE, as in"),
    *[
        Case(f"{command} --output-dir s3://", lambda _, words=words: [*words, "--output-dir", "s3://bucket"], 2,
             r"--output-dir: 's3://bucket' is a URL; expected a folder of this machine")
        for command, *words in (
            ("run", "run"), ("runs", "runs"), ("ask", "ask", "Why?", "--run", "a"), ("check", "check", "x")
        )
    ],
    *[
        said(*words, name=f"{words[0]}: {bad} is no UTF-8")(rf"'{bad}' is not UTF-8 text\. Set the terminal")
        for bad, words in (
            (r"caf\\udce9\?", ("ask", "caf\udce9?", "--run", "demo")),
            (r"r\\udcff", ("ask", "Why?", "--run", "r\udcff")),
            (r"\\udce9", ("check", "\udce9")), (r"o\\udc80", ("report", "--run", "o\udc80")),
        )
    ],
    said("run", "--preset", "poket")(r"preset: 'poket' is not known; expected one of .*Did you mean pocket\?"),
    said("run", "--preset", "pocket", "--from", "08")(r"--from: '08' is no notebook; expected one of 01_data"),
    said("run", "--preset", "pocket", "--from", "trainig")(r"--from: 'trainig' is no notebook; expected one of 01"),
    said("run", "--run-name", "new", "--from", "04", status=1)(r"config.json: no such run.*qlora run --run-name new"),
    said("run", "--preset", "pocket", "--config", "c.json")(r"--config and --preset: .*give one of them"),
    said("run", "--config", "c.json", "--from", "04")(r"--config and --from: .*give one of them"),
    said("run", "--config", "/no/such.json", status=1)(r"/no/such.json: no such file\. Expected the config"),
    Case("--config: a folder", config_is_a_folder, 2, r"config is a folder\. Expected the config\.json of a run"),
    config_file("no JSON", "{steps: 5}", r"config\.json: no valid JSON.*in line 1.*Restore"),
    config_file("not UTF-8", b"\xff\xfe{}", r"config\.json: no UTF-8 text.*byte 0.*Restore"),
    config_file("empty", "", r"config\.json: no valid JSON.*line 1"),
    config_file("another JSON", '{"a": 1}', r"config\.json: holds no config of a run\. Expected \{\"config\""),
    config_file("a list", "[1]", r"config\.json: holds no config of a run\. Expected \{\"config\""),
    config_file("a model's config.json", (POCKET / "config.json").read_text(),
                r"config\.json: holds no config of a run"),
    config_file("nested without end", "[" * 50_000, r"config\.json: holds no config of a run"),
    config_file("an unknown field", json.dumps({"config": {**STORED, "lora_rr": 4}}),
                r"config\.json: lora_rr: no such parameter\. Did you mean lora_r\?"),
    config_file("a wrong value", json.dumps({"config": {**STORED, "steps": "x"}}),
                r"config\.json: steps: 'x' is not allowed.*integer"),
    config_file("no model", json.dumps({"config": {"preset": "pocket", "dataset": "embedded:pocket"}}),
                r"config\.json: model: missing; expected hub id or local folder"),
    Case("output_dir is a file", output_dir_is_a_file, 2, r"output_dir: .*outputs is a file; expected a folder"),
    Case("the run directory is a file", run_dir_is_a_file, 2, r"output_dir: .*new is a file; expected a folder"),
    Case("output_dir below a file", output_dir_is_below_a_file, 2, r"output_dir: .*notes\.txt is a file; expected a"),
    Case("output_dir read-only", output_dir_is_read_only, 2, r"output_dir: .* may not be written into\. Give another",
         not_as_root=True),
    Case("no command", lambda _: [], 2, r"required: COMMAND.*`qlora --help` says"),
    Case("unknown command", lambda _: ["trian"], 2, r"invalid choice: 'trian' \(choose from.*run.*`qlora --help` says"),
    Case("unknown option", lambda _: ["run", "--steps", "5"], 2,
         r"unrecognized arguments: --steps 5\. `qlora.*--help`"),
    Case("option without value", lambda _: ["run", "--preset"], 2,
         r"--preset: expected one argument.*`qlora run --help`"),
    Case("ask without --run", lambda _: ["ask", "Why?"], 2, r"required: --run.*`qlora ask --help` says"),
    said("ask", "  ", "--run", "mine")(r"the question is empty; ask one, as in qlora ask"),
    said("compare", "--runs", "one")(r"runs: a comparison takes two or more; name them, as in"),
    Case("compare: a run twice", with_run("compare", "--runs", "mine", "mine"), 2,
         r"runs: mine is named twice.*others"),
    said("compare", "--runs", "a", "b", "--show", "-1")(r"show: -1 is not allowed; expected 0 or more"),
    said("compare", "--runs", "a", "b", "--show", "x")(r"--show: invalid int value: 'x'.*--help"),
    said("plan", "--gpu", "RTX9999")(r"--gpu RTX9999: not known\. Expected one of 3060, T4"),
    said("plan", "--preset", "lama2")(r"preset: 'lama2' is not known; expected one of.*Did you mean llama2-7b"),
    said("plan", "-p", "lora_rank=8")(r"lora_rank: no such parameter\. Did you mean lora_r\?"),
    said("plan", "--run", "none", status=1)(r"none/config\.json: no such run.*qlora run --run-name none"),
    said("plan", "-p", "model=./no/model", status=1)(r"model: \./no/model does not exist\. Expected a local folder"),
    Case("presets with an argument", lambda _: ["presets", "pocket"], 2, r"unrecognized arguments: pocket\. `qlora"),
    Case("merge: questions", with_run("merge", "--run", "mine", "--questions", "-1"), 2,
         r"questions: -1 is not allowed; expected 0 or more"),
    Case("merge: into a folder in use", into_holds_something, 2, r"into: .*thesis .*holds no merged model; nothing is"),
    Case("merge: into a folder below a file", into_is_below_a_file, 2,
         r"into: .*notes\.txt is a file|into: .*is there"),
    Case("merge: unknown base", with_run("merge", "--run", "mine", "--base", "best"), 2,
         r"--base: invalid choice: 'best'"),
    said("sweep")(r"nothing varies: give values, as in -p lora_r=4,16,64"),
    said("sweep", "--preset", "poket", "--seeds", "2")(r"preset: 'poket' is not known; .*Did you mean pocket\?"),
    said("sweep", "-p", "lora_targets=q,v")(r"Put each value that holds commas into double quotes: -p 'lora_targets"),
    said("sweep", "--name", "none", status=1)(r"none/sweep\.json: no such sweep\. To begin one: qlora sweep"),
    said("sweep", "--sweep", "ingredient")(r"ingredient\.toml: no such file or directory; expected a \.toml file"),
    Case("sweep: out is a folder", sweep_into_a_folder, 2, r"out: .* is a folder; expected the name of a JSON"),
    Case("sweep: a damaged list", sweep_of_a_damaged_list, 1, r"s/sweep\.json, line 1: damaged, no valid JSON"),
    Case("sweep: another list", sweep_of_another_list, 1, r"s/sweep\.json: damaged, expected config, variants, seeds"),
    Case("sweep: a file without tables", sweep_file_without_tables, 2, r"s\.toml: rank: expected tables of values, as"),
    Case("sweep: a file that is no text", sweep_file_that_is_no_text, 2, r"s\.toml: no TOML"),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- datasets


def data(name: str, file: str, content: str | bytes, message: str, *more: str, status: int = 1) -> Case:
    """A dataset of one file."""

    def make(place: Place) -> Asked:
        return run_pocket(place, "-p", f"dataset={place.file(file, content)}", *more)

    return Case(f"dataset: {name}", make, status, message)


def folder_of_data(name: str, files: dict[str, str | bytes], message: str) -> Case:
    """A dataset that is a folder of files."""

    def make(place: Place) -> Asked:
        (place.folder / "rows").mkdir()
        for file, content in files.items():
            place.file(f"rows/{file}", content)
        return run_pocket(place, "-p", f"dataset={place.folder / 'rows'}")

    return Case(f"dataset: {name}", make, 1, message)


def lines(*rows: Any) -> str:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"


def messages(*said: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    return bytes(file.getvalue())


def truncated_parquet(place: Place) -> Asked:
    return run_pocket(place, "-p", f"dataset={place.file('rows.parquet', parquet()[:-40])}")


def numbers_in_parquet(place: Place) -> Asked:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"question": [1, 2], "answer": [3.0, 4.0]}), place.folder / "n.parquet")
    return run_pocket(place, "-p", f"dataset={place.folder / 'n.parquet'}")


def folder_named_like_a_file(place: Place) -> Asked:
    (place.folder / "rows.csv").mkdir()
    return run_pocket(place, "-p", f"dataset={place.folder / 'rows.csv'}")


def folder_in_place_of_a_file(place: Place) -> Asked:
    (place.folder / "rows" / "train.csv").mkdir(parents=True)
    return run_pocket(place, "-p", f"dataset={place.folder / 'rows'}")


def pipe(place: Place) -> Asked:
    """Opened, it would wait for ever."""
    os.mkfifo(place.folder / "rows.csv")
    return run_pocket(place, "-p", f"dataset={place.folder / 'rows.csv'}")


def unreadable(place: Place) -> Asked:
    path = place.file("rows.jsonl", lines(*ROWS))
    path.chmod(0)
    place.closing.callback(path.chmod, 0o644)
    return run_pocket(place, "-p", f"dataset={path}")


def damaged_state(place: Place) -> Asked:
    import datasets

    path = place.folder / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    (path / "state.json").write_bytes((path / "state.json").read_bytes()[:20])
    return run_pocket(place, "-p", f"dataset={path}")


def truncated_arrow(place: Place) -> Asked:
    import datasets

    path = place.folder / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    (file,) = path.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:50])
    return run_pocket(place, "-p", f"dataset={path}")


CSV = "question,answer\n"
HEAD = r"dataset: .*{} leaves 0 rows to train on and 0 to hold out; expected at least one of each\. .*"


def left_out(file: str, reason: str) -> str:
    """The message for a dataset of which no row can be used."""
    return HEAD.format(file.replace(".", r"\.")) + reason


DATASETS = [
    value("dataset", "my_qustions.csv",
          r"dataset: my_qustions\.csv does not exist\. Expected a local path, or a hub id"),
    value("dataset", "./no/folder", r"dataset: \./no/folder does not exist\. Expected a local path"),
    value("dataset", "~nobody_here/rows.csv", r"dataset: ~nobody_here/rows\.csv does not exist"),
    value("dataset", "embedded:pockets", r"dataset: embedded:pockets does not exist"),
    value("dataset", "x" * 5000, r"dataset: x+… \(5,000 characters\) does not exist", "very long"),
    value("dataset", "owner/na me?",
          r"dataset: 'owner/na me\?' is neither a local path nor a hub id\. Expected owner/name"),
    Case("dataset: hub id without network", lambda p: run_pocket(p, "-p", "dataset=owner/absent"), 1,
         r"dataset: owner/absent could not be fetched from the hub.*Check the name and the network.*local file"),
    data("unknown suffix", "rows.txt", "q", r"dataset: .*rows\.txt has type \.txt; expected one of \.parquet"),
    data("a spreadsheet", "rows.xlsx", b"PK",
         r"rows\.xlsx has type \.xlsx; expected one of \.parquet.*export it as CSV \(UTF-8\)"),
    data("a spreadsheet named csv", "rows.csv", b"PK\x03\x04\xff",
         r"rows\.csv is a spreadsheet under another name.*export it as CSV \(UTF-8\)"),
    data("no suffix", "rows", "text", r"dataset: .*rows has type none; expected one of \.parquet"),
    data("empty jsonl", "rows.jsonl", "", r"dataset: .*rows\.jsonl holds no rows\. Expected one question"),
    data("blank jsonl", "rows.jsonl", "\n\n \n", r"dataset: .*rows\.jsonl holds no rows\. Expected one question"),
    data("empty csv", "rows.csv", "", r"dataset: .*rows\.csv holds no rows"),
    data("empty json", "rows.json", "", r"dataset: .*rows\.json is not valid JSON: .*line 1\. Expected \[\{"),
    data("empty parquet", "rows.parquet", "",
         r"dataset: .*rows\.parquet is not a readable parquet file.*Write it again"),
    data("csv header only", "rows.csv", CSV, r"dataset: .*rows\.csv holds no rows"),
    data("csv as parquet", "rows.parquet", CSV + "q,a\n", r"rows\.parquet is not a readable parquet file.*suffix"),
    Case("dataset: truncated parquet", truncated_parquet, 1, r"rows\.parquet is not a readable parquet file.*Write it"),
    Case("dataset: numbers in parquet", numbers_in_parquet, 1,
         left_out("n.parquet", r"n\.parquet row 0: answer is float, expected text")),
    data("json object without a list", "rows.json", '{"a": 1}', r"rows\.json holds no list of rows; expected \[\{"),
    data("json text", "rows.json", '"hello"', r"rows\.json holds no list of rows; expected \[\{"),
    data("json several lists", "rows.json", '{"train": [], "test": []}',
         r"rows\.json holds several lists \(train, test\); expected one\. Write a file for each"),
    data("json several lists named jsonl", "rows.jsonl", '{"train": [],\n "test": []}',
         r"^qlora: dataset: \S*jsonl holds several lists \(train, test\); expected one\. Write a file for each\.$"),
    data("json columns of different lengths", "rows.json", '{"question": ["q", "r"], "answer": ["a"]}',
         r"holds columns of different lengths \(question 2, answer 1\); expected one length, or \[\{"),
    data("json lists of cells", "rows.json", '[["q", "a"], ["r", "b"]]',
         left_out("rows.json", r'row 0: expected an object with named fields, found list; pandas .*orient="records"')),
    data("json objects by unknown names", "rows.json", '{"a": {"x": "q"}, "b": {"x": "a"}}',
         r'holds objects by name, not a list of rows; expected \[\{.*to_json\(orient="records"\)'),
    data("json written twice", "rows.json", json.dumps('[{"question": "q", "answer": "a"}]'),
         r"holds JSON inside of a text, as if it was written twice; expected \[\{"),
    data("json with a field twice", "rows.json", '[{"question": "q", "answer": "a", "answer": "b"}]',
         r"rows\.json: in one of its objects the field 'answer' is there twice; rename or remove one"),
    data("jsonl with a field twice", "rows.jsonl", '{"question": "q", "answer": "a", "answer": "b"}\n' * 2, left_out(
         "rows.jsonl", r"row 0: the field 'answer' is there twice; rename or remove one, and 1 more like it")),
    data("a broken array named jsonl", "rows.jsonl", '[\n {"question": "q"\n  "answer": "a"}\n]\n',
         r"rows\.jsonl is not valid JSON: Expecting ',' delimiter, line 3\. Expected \[\{"),
    data("one conversation", "rows.json", json.dumps(messages(("user", "q"), ("assistant", "a")), indent=1),
         r"rows\.json leaves 1 row to train on and 0 to hold out; expected.*Give more rows"),
    data("gzip named jsonl", "rows.jsonl", gzip.compress(b"{}"),
         r"is packed with gzip\. Unpack it in its folder, `gzip -dc rows\.jsonl > rows-unpacked\.jsonl`, and give"),
    data("gzip", "rows.csv.gz", gzip.compress(b"q"), r"is packed with gzip\. .*`gzip -dc rows\.csv\.gz > rows\.csv`"),
    data("a pointer", "rows.jsonl", "version https://git-lfs.github.com/spec/v1\noid",
         r"rows\.jsonl is a pointer of Git LFS.*`git lfs pull`"),
    data("json cut off", "rows.json", '[{"question": "q"', r"rows\.json is not valid JSON: .*line 1\. Expected"),
    data("json nested without end", "rows.json", "[" * 100_000, r"rows\.json is nested too deeply; expected"),
    data("json list of texts", "rows.json", '["a", "b"]',
         left_out("rows.json", r"rows\.json row 0: expected an object with named fields, found str")),
    data("nested garbage", "rows.json", '[{"messages": [[["x"]]]}, {"messages": {"a": []}}]',
         left_out("rows.json", r"row 0: messages\[0\] is list, expected role and content; .*row 1: messages is dict")),
    data("jsonl every line broken", "rows.jsonl", lines("{oops", "]", "nonsense"),
         left_out("rows.jsonl", r"Rows left out: 3 \(rows\.jsonl row 0: not valid JSON: .* at character")),
    data("jsonl nested without end", "rows.jsonl", "[" * 100_000 + "\n",
         left_out("rows.jsonl", r"rows\.jsonl row 0: JSON that cannot be read")),
    data("jsonl a number of 5000 digits", "rows.jsonl", '{"question": ' + "9" * 5000 + "}\n",
         left_out("rows.jsonl", r"rows\.jsonl row 0: JSON that cannot be read")),
    data("csv without known columns", "rows.csv", "a,b\n1,2\n",
         left_out("rows.csv", r"rows\.csv row 0: columns a, b: expected in the first line instruction/output \(or r")),
    data("csv without a header", "rows.csv", "What is a?,It is b.\nWhat is c?,It is d.\n", left_out(
         "rows.csv", r"row 0: the first line must name the columns, as in question,answer; it reads 'What is a\?', ")),
    data("csv with a blank first line", "rows.csv", "\n" + CSV + "q,a\n",
         left_out("rows.csv", r"row 0: the first line is blank; it must name the columns, as in question,answer")),
    data("csv with two spellings of a name", "rows.csv", "Question,Answer,ANSWER\nq,a,b\n",
         left_out("rows.csv", r"row 0: 'Answer' and 'ANSWER' both read as answer; rename or remove one")),
    data("csv only questions", "rows.csv", "question\nWhy?\n", left_out("rows.csv",
         r"columns question: expected in the first line instruction/output")),
    data("csv open quote", "rows.csv", CSV + 'q0,a0\n"q1,a1\nq2,a2\n',
         r"rows\.csv, after line 2: a quote is never closed"),
    data("csv too many fields", "rows.csv", CSV + "q,a,b\n",
         left_out("rows.csv", r"rows\.csv row 0: more fields than the header's 2")),
    data("csv with zero bytes", "rows.csv", CSV + "q\0,a\0\n",
         left_out("rows.csv", r"rows\.csv row 0: a zero byte before or in line 2; expected text")),
    data("csv with a column twice", "rows.csv", "question,answer,answer\nq,a,b\n",
         r"rows\.csv has two columns of the name 'answer'\. Rename or remove one"),
    data("csv with an exact and another spelling", "rows.csv", "question,Question,answer\nq,r,a\n",
         left_out("rows.csv", r"row 0: 'question' and 'Question' both read as question; rename or remove one")),
    data("csv quotes after backslashes", "rows.csv", CSV + '"a \\"b\\" c?",d\n' * 2, left_out("rows.csv",
         r"row 0: not valid CSV: ',' expected after '\"', line 2; a quote inside a cell is doubled \(\"\"\), and 1")),
    data("csv semicolons, commas in cells", "rows.csv", "question;answer\nWhy, then?;So, then.\n",
         left_out("rows.csv", r"one column, question;answer: its fields seem to lie between ';', expected commas")),
    data("csv semicolons, cells in quotes", "rows.csv", '"question";"answer"\n"Why, then?";"So, then."\n',
         left_out("rows.csv", r"its fields seem to lie between ';', expected commas")),
    data("csv tabs, commas in cells", "rows.csv", "question\tanswer\nWhy, then?\tSo, then.\n",
         left_out("rows.csv", r"its fields seem to lie between '\\t', expected commas")),
    data("csv semicolons", "rows.csv", "question;answer\nq;a\n",
         left_out("rows.csv", r"one column, question;answer: its fields seem to lie between ';', expected commas")),
    data("not UTF-8", "rows.csv", CSV.encode() + b"caf\xe9,a\n",
         r"rows\.csv is not UTF-8 text \(line 2\)\. Save it as UTF-8"),
    data("UTF-16", "rows.csv", (CSV + "q,a\n").encode("utf-16"),
         r"rows\.csv is not UTF-8 text \(line 1\)\. Save it as"),
    data("a BOM and nothing else", "rows.jsonl", b"\xef\xbb\xbf", r"rows\.jsonl holds no rows"),
    data("all answers blank", "rows.csv", CSV + "q0,\nq1, \n",
         left_out("rows.csv", r"rows\.csv row 0: every turn is blank \(the first has no answer\)")),
    data("all questions blank", "rows.csv", CSV + ",a\n ,b\n", left_out("rows.csv", r"the first has no question")),
    data("answers null", "rows.jsonl", lines({"question": "q", "answer": None}),
         left_out("rows.jsonl", r"rows\.jsonl row 0: no answered turn")),
    data("all rows too long", "rows.csv", CSV + "".join(f"{'why ' * 90}{n},a\n" for n in range(3)),
         left_out("rows.csv", r"row 0: no answer begins within max_seq_len=16 tokens.*larger max_seq_len"),
         "-p", "max_seq_len=16"),
    data("one row", "rows.csv", CSV + "q,a\n",
         r"leaves 1 row to train on and 0 to hold out; expected.*Give more rows"),
    data("one question in all rows", "rows.csv", CSV + "".join(f"q,a{n}\n" for n in range(5)),
         r"leaves 5 rows to train on and 0 to hold out.*All usable rows open with the same question: give rows"),
    data("one entity in all rows", "rows.csv", "entity," + CSV + "".join(f"e,q{n},a{n}\n" for n in range(5)),
         r"leaves 5 rows to train on and 0 to hold out.*or share, one with the next, a value of entity: .*=none"),
    data("a group_by that no row has", "rows.csv", "doc," + CSV + "".join(f"d{n},q{n},a{n}\n" for n in range(5)),
         r"no usable row of .* has a value in the column docs, which group_by names; its columns are doc, question",
         "-p", "group_by=docs"),
    data("all rows marked test", "rows.csv", "split," + CSV + "".join(f"test,q{n},a{n}\n" for n in range(5)),
         r"leaves 0 rows to train on and 5 to hold out.*The column split marks all usable rows as held out: mark some"),
    data("wrong roles", "rows.jsonl", lines(messages(("teacher", "q"), ("pupil", "a"))),
         left_out("rows.jsonl", r"row 0: messages\[0\] has role teacher, expected user or assistant")),
    data("no role", "rows.jsonl", lines({"messages": [{"content": "q"}]}),
         left_out("rows.jsonl", r"row 0: messages\[0\] has role None, expected user or assistant")),
    data("an odd weight", "rows.jsonl",
         lines({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.5}]}),
         left_out("rows.jsonl", r"row 0: messages\[1\] has weight '0.5', expected 0 or 1")),
    data("preferences", "rows.jsonl", lines({"prompt": "q", "chosen": "a", "rejected": "b"}),
         left_out("rows.jsonl", r"row 0: chosen holds one answer of a preference, not the answer to learn")),
    data("pictures", "rows.jsonl", lines({"question": "q", "answer": "a", "images": ["x.png"]}),
         left_out("rows.jsonl", r"row 0: images has a value; only text is read")),
    data("a part of a content that is no text", "rows.jsonl", lines(messages(("user", [{"type": "image_url"}]))),
         left_out("rows.jsonl", r"row 0: messages\[0\] has a part of type image_url; only text is read")),
    data("a context that is no text", "rows.jsonl", lines({"question": "q", "context": {"a": 1}, "answer": "a"}),
         left_out("rows.jsonl", r"row 0: context is dict, expected text")),
    data("two questions in a row", "rows.jsonl", lines(messages(("user", "q"), ("user", "r"), ("assistant", "a"))),
         left_out("rows.jsonl", r"row 0: two questions in a row: 'r'")),
    data("an answer without a question", "rows.jsonl", lines(messages(("assistant", "a"))),
         left_out("rows.jsonl", r"row 0: an answer without a question: 'a'")),
    data("numbers as content", "rows.jsonl", lines(messages(("user", 1), ("assistant", 2))),
         left_out("rows.jsonl", r"row 0: messages\[0\] has no text under content or value")),
    data("numbers as questions", "rows.jsonl", lines({"question": 1, "answer": 2}),
         left_out("rows.jsonl", r"row 0: question is int, expected text")),
    data("a prompt that holds more than the question", "rows.jsonl",
         lines({"question": "Who is it?", "prompt": "Ben waved. Who is it?", "answer": "Ben"}),
         left_out("rows.jsonl", r"row 0: prompt holds more than question; remove one")),
    data("json with a question beside its list of rows", "rows.json",
         '{"instruction": "Translate.", "examples": [{"input": "cat", "output": "chat"}]}',
         r"has 'instruction' beside its list of rows; write it into each row, as a column of its own\.$"),
    data("no messages", "rows.jsonl", lines({"messages": []}), left_out("rows.jsonl", r"row 0: no turn")),
    data("a lone surrogate", "rows.jsonl", '{"question": "q\\ud800", "answer": "a"}\n',
         left_out("rows.jsonl", r"row 0: half a character \(a lone surrogate\) after 'q'")),
    data("text of no known format", "rows.jsonl", lines({"text": "Once upon a time"}),
         left_out("rows.jsonl", r"row 0: text has neither \[INST\] … \[/INST\] nor ### Human")),
    data("text outside the chat format", "rows.jsonl", lines({"text": "Hello <s>[INST] q [/INST] a </s>"}),
         left_out("rows.jsonl", r"row 0: text outside \[INST\].*at character 0: 'Hello")),
    data("hundreds of columns", "rows.csv", ",".join(f"column{n}" for n in range(400)) + "\n" + "1," * 399 + "1\n",
         left_out("rows.csv", r"row 0: columns column0, column1,.*…")),
    folder_of_data("empty folder", {}, r"dataset: .*rows holds no \.parquet, \.jsonl, \.json, \.csv file and no saved"),
    folder_of_data("folder of hidden files", {"._train.csv": b"\x00\x05\x16\x07", ".rows.json": "["},
                   r"dataset: .*rows holds no \.parquet, \.jsonl, \.json, \.csv file and no saved"),
    folder_of_data("folder of packed files", {"train.csv.gz": gzip.compress(b"q")},
                   r"rows holds no \.parquet.* It holds train\.csv\.gz\. Unpack it in its folder, `gzip -dc train"),
    folder_of_data("a packed file beside others", {"train.jsonl": lines(*ROWS), "test.jsonl.gz": gzip.compress(b"q")},
                   r"test\.jsonl\.gz is packed, beside train\.jsonl, which is not\. Unpack it"),
    folder_of_data("folder of other files", {"a.txt": "x", "b.xlsx": "y"},
                   r"dataset: .*rows holds no \.parquet, \.jsonl"),
    folder_of_data("one bad file among good ones", {"a.jsonl": lines(*ROWS), "b.csv": b"\xff\xfe\x00"},
                   r"rows/b\.csv is not UTF-8 text \(line 1\)\. Save it as UTF-8"),
    folder_of_data("only held-out files", {"test.jsonl": lines(*ROWS)},
                   r"leaves 0 rows to train on and 12 to hold out; expected at least one of each\. Only files with"),
    folder_of_data("a dataset_dict.json that is nonsense", {"dataset_dict.json": "nonsense"},
                   r"dataset: .*rows could not be read as a saved dataset.*Save it again with save_to_disk"),
    Case("dataset: a folder named rows.csv", folder_named_like_a_file, 1,
         r"rows\.csv holds no \.parquet.*no saved dataset"),
    Case("dataset: a folder in place of a file", folder_in_place_of_a_file, 1,
         r"rows holds no \.parquet.*no saved dataset"),
    Case("dataset: a pipe", pipe, 1, r"rows\.csv .*expected|rows\.csv holds no"),
    Case("dataset: unreadable", unreadable, 1, r"dataset: .*rows\.jsonl could not be read \(.*ermission denied",
         not_as_root=True),
    Case("dataset: a state.json cut off", damaged_state, 1,
         r"saved could not be read as a saved dataset.*Save it again"),
    Case("dataset: an arrow file cut off", truncated_arrow, 1,
         r"saved could not be read as a saved dataset.*Save it again"),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- model folders


def model(name: str, spoil: Callable[[Path], object], message: str) -> Case:
    """The pocket model, spoiled."""

    def make(place: Place) -> Asked:
        folder = place.model()
        spoil(folder)
        return run_pocket(place, "-p", f"model={folder}")

    return Case(f"model: {name}", make, 1, message)


def of_experts(folder: Path) -> None:
    """A mixture of experts in place of the weights."""
    from transformers import AutoConfig, MixtralForCausalLM

    sizes = {"vocab_size": 2048, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}  # fmt: skip
    MixtralForCausalLM(AutoConfig.for_model("mixtral", **sizes)).save_pretrained(folder)


def wrote(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def removed(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


def set_in(name: str, **values: Any) -> Callable[[Path], object]:
    """Values of a JSON file replaced; None takes one away."""

    def spoil(folder: Path) -> None:
        stored = {**json.loads((folder / name).read_text()), **values}
        (folder / name).write_text(json.dumps({key: value for key, value in stored.items() if value is not None}))

    return spoil


def with_weights(
    change: Callable[[dict[str, Any]], object], file: str = "model.safetensors"
) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / file)
        change(weights)
        save_file(weights, folder / file, metadata={"format": "pt"})

    return spoil


def cut_off(name: str, left: int = 2000) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:left])


def only_pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def a_shard_missing(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def an_adapter(place: Place) -> Asked:
    return run_pocket(place, "-p", f"model={place.run() / 'adapter'}")


def model_is_a_file(place: Place) -> Asked:
    return run_pocket(place, "-p", f"model={place.file('model.gguf', b'GGUF')}")


def more_tokens(folder: Path) -> None:
    stored = json.loads((folder / "tokenizer.json").read_text())
    extra = {"id": 2048, "content": "<extra>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False}  # fmt: skip
    stored["added_tokens"].append(extra)
    (folder / "tokenizer.json").write_text(json.dumps(stored))


def an_adapter_beside(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')


def quantized_with(**described: Any) -> Callable[[Path], object]:
    return set_in("config.json", quantization_config=described)


ALREADY = (
    r"model: .*model is quantized already, with {}, which can be neither trained nor merged here\. Take the model from"
)


NORM, HEAD_WEIGHT = "model.norm.weight", "lm_head.weight"
AGAIN = r".*Copy or download the model again"

MODELS = [
    value("model", "./no/model",
          r"model: \./no/model does not exist\. Expected a local path, or a hub id like owner/name"),
    value("model", "packaged:smollm", r"model: packaged:smollm is not known; expected packaged:smollm2-135m-instruct"),
    value("model", "lama", r"model: lama does not exist\. Expected a local path, or a hub id"),
    value("model", "owner/na me", r"model: 'owner/na me' is neither a local path nor a hub id\. Expected owner/name"),
    Case("model: hub id without network", lambda p: run_pocket(p, "-p", "model=owner/absent"), 1,
         r"model: owner/absent could not be fetched.*Check the network, or give a local folder"),
    Case("model: a file", model_is_a_file, 1, r"model: .*model\.gguf is a file\. Expected a folder.*config\.json"),
    Case("model: an adapter", an_adapter, 1, r"model: .*adapter holds an adapter, not a base model\. Give the model"),
    model("an adapter beside it", an_adapter_beside,
          r"model: .*model holds an adapter beside the base model \(adapter_config\.json\), which .*Move that file"),
    model("GPTQ", quantized_with(quant_method="gptq", bits=4), ALREADY.format("GPTQ")),
    model("AWQ", quantized_with(quant_method="awq", bits=4), ALREADY.format("AWQ")),
    model("FP8", quantized_with(quant_method="fp8"), ALREADY.format("FP8")),
    model("compressed-tensors", quantized_with(quant_method="compressed-tensors"),
          ALREADY.format("compressed-tensors")),
    model("compressed-tensors, earlier", set_in("config.json", compression_config={"quant_method": "sparseml"}),
          ALREADY.format("sparseml")),
    model("8 bits", quantized_with(quant_method="bitsandbytes", load_in_8bit=True),
          ALREADY.format("bitsandbytes 8-bit")),
    model("MLX", set_in("config.json", quantization={"group_size": 64, "bits": 4}), ALREADY.format("MLX")),
    model("GPTQ of earlier tools", wrote("quantize_config.json", '{"bits": 4}'), ALREADY.format("GPTQ")),
    model("a quantization of no name", quantized_with(bits=2), ALREADY.format("an unknown method")),
    model("empty folder", emptied, r"model: .*model is empty\. Expected a folder" + AGAIN),
    model("no config.json", removed("config.json"), r"model/config\.json is missing\. Expected a folder" + AGAIN),
    model("config.json no JSON", wrote("config.json", "{'a': 1}"),
          r"config\.json is damaged: no valid JSON in line 1" + AGAIN),
    model("config.json not UTF-8", wrote("config.json", b"\xff\xfe"), r"config\.json is damaged: no JSON text" + AGAIN),
    model("config.json a list", wrote("config.json", "[]"),
          r"config\.json is damaged: expected an object.*found list" + AGAIN),
    model("config.json empty", wrote("config.json", ""), r"config\.json is damaged: no valid JSON" + AGAIN),
    model("config.json a pointer", wrote("config.json", "version https://git-lfs.github.com/spec/v1\n"),
          r"config\.json is a pointer of Git LFS.*`git lfs pull`"),
    model("unknown model_type", set_in("config.json", model_type="lama"),
          r"config\.json: model_type 'lama' is no language model.*Did you mean llama\?.*Take another model"),
    model("model_type of images", set_in("config.json", model_type="vit"),
          r"config\.json: model_type 'vit' is no language model.*Expected one like llama or t5"),
    model("no model_type", set_in("config.json", model_type=None),
          r"config\.json has no model_type\. Expected one, as"),
    model("wrong value in config.json", set_in("config.json", hidden_size="wide"),
          r"model: .*model could not be loaded \(.*hidden_size.*\)\. Expected config\.json"),
    model("no tokenizer", removed("tokenizer.json"),
          r"model: .*model holds no tokenizer\. Expected tokenizer\.json.*copy"),
    model("tokenizer.json damaged", wrote("tokenizer.json", '{"model":'),
          r"tokenizer\.json is damaged: no valid JSON" + AGAIN),
    model("tokenizer.json of nonsense", wrote("tokenizer.json", '{"a": 1}'),
          r"model: .*tokenizer.* could not be loaded.*Copy or download"),
    model("tokenizer_config.json damaged", wrote("tokenizer_config.json", "{"), r"tokenizer_config\.json is damaged"
          + AGAIN),
    model("no weights", removed("model.safetensors"),
          r"model: .*model holds no weights\. Expected model\.safetensors" + AGAIN),
    model("only .bin", only_pickled, r"model holds pickled weights \(\.bin\) only; expected \*\.safetensors\. Convert"),
    model("weights of 0 bytes", wrote("model.safetensors", ""), r"model\.safetensors is damaged.*0 bytes" + AGAIN),
    model("weights of nonsense", wrote("model.safetensors", b"\xff" * 100),
          r"model\.safetensors is damaged.*100 bytes" + AGAIN),
    model("weights without a header", wrote("model.safetensors", struct.pack("<Q", 2) + b"[]"),
          r"model\.safetensors is damaged.*; expected a header of safetensors and all weights that it lists" + AGAIN),
    model("weights cut off", cut_off("model.safetensors", 100_000),
          r"model\.safetensors is damaged or was cut off: it has 100,000 bytes; expected a header" + AGAIN),
    model("weights a pointer", wrote("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid"),
          r"model\.safetensors is a pointer of Git LFS.*`git lfs pull`"),
    model("a weight of another shape", with_weights(lambda w: w.update({NORM: w[NORM][:5].clone()})),
          r"the weight model\.norm\.weight has shape \(5,\), and its config\.json asks for \(192,\)" + AGAIN),
    model("a weight missing", with_weights(lambda w: w.pop(NORM)),
          r"model lacks the weight model\.norm\.weight, which its config\.json asks for" + AGAIN),
    model("weights of another model", set_in("config.json", num_hidden_layers=9),
          r"model lacks the weight model\.layers\.[4-8].* and \d+ more, which its config\.json asks for" + AGAIN),
    model("a shard missing", a_shard_missing,
          r"model-00002-of-00002\.safetensors is missing, and model\.safetensors\.index\.json lists it" + AGAIN),
    model("an index of nonsense", wrote("model.safetensors.index.json", "{}"),
          r"model\.safetensors\.index\.json has no weight_map" + AGAIN),
    model("a mixture of experts", of_experts,
          r"\d\d% of its layers' weights outside of linear layers \(model\.layers\.0\.mlp\.experts\.\w+, of shape "
          r".*belongs to a MixtralExperts\): they would be neither quantized nor trained nor merged\. Take a model"),
    model("more tokens than embeddings", more_tokens,
          r"the tokenizer of .*model has tokens up to number 2,048, and its config\.json a vocab_size of 2,048.*copy"),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- adapters


def spoiled(name: str, spoil: Callable[[Path], object], message: str, *words: str, status: int = 1) -> Case:
    """A trained run with something spoiled in its directory, and a command about it: by default a question."""

    def make(place: Place) -> Asked:
        spoil(place.run())
        asked = words or ("ask", "What is 3?", "--run", "mine")
        return [*asked, "--output-dir", str(place.outputs)]

    return Case(f"{' '.join(words[:2]) or 'ask'}: {name}", make, status, message)


def in_folder(folder: str, spoil: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda run: spoil(run / folder)


def config_with(**values: Any) -> Callable[[Path], object]:
    """The run's own config.json with other values."""

    def spoil(run: Path) -> None:
        stored = json.loads((run / "config.json").read_text())
        stored["config"] |= values
        (run / "config.json").write_text(json.dumps(stored))

    return spoil


def on_another_model(**changes: Any) -> Callable[[Path], object]:
    """The run now names another base model: like the pocket model, with random weights."""

    def spoil(run: Path) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = Path(shutil.copytree(POCKET, run.parent.parent / "other"))
        described = AutoConfig.from_pretrained(POCKET)
        for name, value in changes.items():
            setattr(described, name, value)
        torch.manual_seed(5)
        AutoModelForCausalLM.from_config(described).save_pretrained(folder)
        config_with(model=str(folder))(run)

    return spoil


def bit_flipped(name: str) -> Callable[[Path], object]:
    """One bit of the last weight is another one."""

    def spoil(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[-4] ^= 1
        (folder / name).write_bytes(content)

    return spoil


ADAPTER = "adapter_model.safetensors"
ANEW = r".*Train one with notebook 04"

ADAPTERS = [
    spoiled("no adapter", lambda run: shutil.rmtree(run / "adapter"),
            r"mine/adapter: missing\. Notebook 04_training writes"),
    spoiled("adapter empty", in_folder("adapter", emptied), r"adapter: .*adapter_config\.json is missing" + ANEW),
    spoiled("no adapter_config.json", in_folder("adapter", removed("adapter_config.json")),
            r"adapter: .*adapter_config\.json is missing" + ANEW),
    spoiled("no weights", in_folder("adapter", removed(ADAPTER)),
            r"adapter: .*adapter_model\.safetensors is missing" + ANEW),
    spoiled("adapter_config.json damaged", in_folder("adapter", wrote("adapter_config.json", "{")),
            r"adapter: .*adapter_config\.json is damaged: no valid JSON in line 1" + ANEW),
    spoiled("adapter_config.json a list", in_folder("adapter", wrote("adapter_config.json", "[]")),
            r"adapter: .*adapter_config\.json is damaged: expected an object" + ANEW),
    spoiled("adapter_config.json of nonsense", in_folder("adapter", wrote("adapter_config.json", '{"peft_type": "X"}')),
            r"adapter: .*adapter is damaged or does not fit this base model.*Train it again"),
    spoiled("weights of 0 bytes", in_folder("adapter", wrote(ADAPTER, "")),
            r"adapter_model\.safetensors is damaged" + ANEW),
    spoiled("weights cut off", in_folder("adapter", cut_off(ADAPTER, 100_000)),
            r"adapter_model\.safetensors is damaged or was cut off: it has 100,000 bytes; expected" + ANEW),
    spoiled("a bit of the weights flipped", in_folder("adapter", bit_flipped(ADAPTER)),
            r"adapter: .*adapter_model\.safetensors does not hold what its training has written\. Restore"),
    spoiled("base.json damaged", in_folder("adapter", wrote("base.json", "{")),
            r"adapter: .*base\.json is damaged; expected what tells the base model.*train the adapter again"),
    spoiled("another rank", in_folder("adapter", set_in("adapter_config.json", r=3)),
            r"adapter: .*adapter_config\.json says rank 3, which does not fit the weights beside it.* 16\b" + ANEW),
    spoiled("an adapter that lacks a weight", in_folder("adapter", with_weights(lambda w: w.pop(max(w)), ADAPTER)),
            r"adapter: .*adapter does not belong to this base model: it lacks .*Give the base model"),
    spoiled("other weights of the base", on_another_model(),
            r"adapter: .*was trained on .*and the base model here is .*other, another one \(\d+ of 256 weights"),
    spoiled("another vocabulary", on_another_model(vocab_size=4096),
            r"adapter: .*was trained on .*the base model here is .*other, another one \(vocabulary 2,048 and 4,096"),
    spoiled("another architecture", config_with(model="embedded:pocket-t5/model"),
            r"adapter: .*was trained on .*pocket/model, and the base model here is .*pocket-t5.*Give the base model"),
    spoiled("base model gone", config_with(model="/no/longer/here"),
            r"model: /no/longer/here does not exist\. Expected a"),
    spoiled("no adapter", lambda run: shutil.rmtree(run / "adapter"), r"adapter: .*holds no trained adapter.*--from 04",
            "merge", "--run", "mine"),
    spoiled("adapter cut off", in_folder("adapter", cut_off(ADAPTER, 100_000)),
            r"adapter_model\.safetensors is damaged or was cut off", "merge", "--run", "mine"),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- run directories


def missing_run(place: Place) -> Asked:
    return ["ask", "Why?", "--run", "none", "--output-dir", str(place.outputs)]


def run_is_a_file(place: Place) -> Asked:
    place.file("outputs/mine", "no run")
    return ["ask", "Why?", "--run", "mine", "--output-dir", str(place.outputs)]


def locked(place: Place) -> Asked:
    file = os.open(place.run() / ".run.lock", os.O_RDWR | os.O_CREAT)
    os.write(file, json.dumps({"pid": 4321, "doing": "qlora run", "since": 0}).encode())
    fcntl.flock(file, fcntl.LOCK_EX)
    place.closing.callback(os.close, file)
    return ["run", "--run-name", "mine", "--output-dir", str(place.outputs), "--from", "05"]


def bad_data_in_place_of_a_run(place: Place) -> Asked:
    """What is there must still be there."""
    place.run("new")
    return run_pocket(place, "--fresh", "-p", f"dataset={place.file('rows.csv', CSV)}")


def compared_with(name: str, spoil: Callable[[Path], object], message: str, *, status: int = 1) -> Case:
    def make(place: Place) -> Asked:
        place.run("good")
        spoil(place.run())
        return ["compare", "--runs", "good", "mine", "--output-dir", str(place.outputs)]

    return Case(f"compare: {name}", make, status, message)


def line_replaced(name: str, number: int, content: str) -> Callable[[Path], object]:
    def spoil(run: Path) -> None:
        found = (run / name).read_text().split("\n")
        found[number - 1] = content
        (run / name).write_text("\n".join(found))

    return spoil


FROM_05 = ("run", "--run-name", "mine", "--from", "05")
FROM_06 = ("run", "--run-name", "mine", "--from", "06")
FROM_04 = ("run", "--run-name", "mine", "--from", "04")

RUN_DIRECTORIES = [
    Case("ask: no such run", missing_run, 1, r"none/config\.json: no such run\. `qlora run --run-name none"),
    Case("ask: the run is a file", run_is_a_file, 2, r"mine is a file; expected a run directory"),
    Case("merge: no such run", lambda p: ["merge", "--run", "none", "--output-dir", str(p.outputs)], 1, r"no such run"),
    Case("compare: no such run", with_run("compare", "--runs", "mine", "none"), 1, r"none/config\.json: no such run"),
    Case("run: locked", locked, 1, r"mine: process 4321 \(qlora run, .*is at work in this run directory\. Wait until"),
    Case("run --fresh with bad data", bad_data_in_place_of_a_run, 1, r"dataset: .*rows\.csv holds no rows"),
    spoiled("config.json empty", wrote("config.json", ""), r"mine/config\.json: no valid JSON.*Restore", status=2),
    spoiled("config.json cut off", cut_off("config.json", 200), r"mine/config\.json: no valid JSON.*Restore", status=2),
    spoiled("config.json a list", wrote("config.json", "[]"),
            r"config\.json: holds no config of a run.*Restore", status=2),
    spoiled("config.json without config", wrote("config.json", '{"versions": {}}'),
            r"holds no config of a run", status=2),
    spoiled("config.json not UTF-8", wrote("config.json", b"\xff\xfe"),
            r"config\.json: no UTF-8 text.*Restore", status=2),
    spoiled("config.json with an unknown field", config_with(lora_rr=3),
            r"config\.json: lora_rr: no such parameter", status=2),
    spoiled("config.json with a wrong value", config_with(lora_r="x"), r"config\.json: lora_r: 'x' is not", status=2),
    spoiled("config.json cut off", cut_off("config.json", 200), r"config\.json: no valid JSON.*Restore",
            *FROM_05, status=2),
    spoiled("config.json cut off, go on", cut_off("config.json", 200), r"config\.json: no valid JSON.*Restore",
            "run", "--run-name", "mine", status=2),
    spoiled("another rank", lambda run: None,
            r"mine holds a run with other values \(lora_r: it has 16, asked for is 8\).*--fresh",
            *FROM_04, "-p", "lora_r=8", status=2),
    spoiled("another preset", lambda run: None, r"--preset: .*mine was begun with pocket\. Leave --preset away",
            *FROM_04, "--preset", "llama2-7b", status=2),
    spoiled("a value too late", lambda run: None,
            r"lora_r: the run has 16, and from 05_curves on nothing uses 8.*--from 04",
            *FROM_05, "-p", "lora_r=8", status=2),
    spoiled("history missing", removed("history.jsonl"), r"history\.jsonl: missing\. Notebook 04_training writes",
            *FROM_05),
    spoiled("history empty", wrote("history.jsonl", ""), r"history\.jsonl: damaged, it holds no line.*--from 04",
            *FROM_05),
    spoiled("history damaged", line_replaced("history.jsonl", 2, "{oops"),
            r"history\.jsonl, line 2: damaged, no valid JSON .*at character 2.*Restore.*--from 04", *FROM_05),
    spoiled("history a list", line_replaced("history.jsonl", 1, "[]"),
            r"history\.jsonl, line 1: damaged, expected an object.*found list", *FROM_05),
    spoiled("history without step", line_replaced("history.jsonl", 3, '{"loss": 1.0}'),
            r"history\.jsonl, line 3: damaged, expected step, a whole number", *FROM_05),
    spoiled("history with text", line_replaced("history.jsonl", 2, '{"step": 2, "loss": "low"}'),
            r"history\.jsonl, line 2: damaged, loss: expected a number, found str", *FROM_05),
    spoiled("history with another sample", line_replaced("history.jsonl", 2, '{"step": 2, "sample": ["q", "a"]}'),
            r"history\.jsonl, line 2: damaged, sample: expected an object with question, expected", *FROM_05),
    spoiled("data missing", lambda run: shutil.rmtree(run / "data"),
            r"train\.jsonl: missing\. Notebook 01_data writes", *FROM_06),
    spoiled("data damaged", line_replaced("data/train.jsonl", 2, "{oops"),
            r"data/train\.jsonl, line 2: damaged, no valid JSON.*--run-name mine .*--from 01 --fresh", *FROM_06),
    spoiled("data of another kind", line_replaced("data/train.jsonl", 1, '{"question": "q"}'),
            r"data/train\.jsonl, line 1: damaged, no row as notebook 01 writes it", *FROM_04),
    spoiled("data with numbers", line_replaced("data/held_out.jsonl", 1, '{"turns": [{"question": 1, "answer": 2}]}'),
            r"data/held_out\.jsonl, line 1: damaged, no row as notebook 01 writes it, with turns of text", *FROM_06),
    spoiled("data not UTF-8", wrote("data/train.jsonl", b"\xff\xfe\n"), r"train\.jsonl, line 1: damaged, no JSON",
            *FROM_06),
    spoiled("data report damaged", wrote("data/report.json", "[]"), r"report\.json: damaged, expected an object",
            *FROM_06),
    spoiled("adapter missing", lambda run: shutil.rmtree(run / "adapter"), r"adapter: missing\. Notebook 04_training",
            *FROM_06),
    spoiled("adapter cut off", in_folder("adapter", cut_off(ADAPTER)), r"adapter_model\.safetensors is damaged",
            *FROM_06),
    spoiled("metrics damaged", wrote("metrics.json", "{"), r"metrics\.json, line 1: damaged, no valid JSON", *FROM_06),
    spoiled("base model gone", config_with(model="/no/longer/here"), r"model: /no/longer/here does not exist",
            *FROM_06, status=2),
    spoiled("data damaged", line_replaced("data/held_out.jsonl", 1, "{oops"),
            r"held_out\.jsonl, line 1: damaged, no valid JSON.*Restore", "merge", "--run", "mine"),
    spoiled("metrics damaged", wrote("metrics.json", "[]"), r"metrics\.json: damaged, expected an object.*found list",
            "merge", "--run", "mine"),
    spoiled("metrics with a list", wrote("metrics.json", '{"train": [1]}'),
            r"metrics\.json: damaged, train: expected an object", "merge", "--run", "mine"),
    compared_with("no answers", removed("answers.jsonl"),
                  r"answers\.jsonl: missing, the run mine has no answers yet\. Ask"),
    compared_with("answers damaged", line_replaced("answers.jsonl", 2, "{oops"),
                  r"answers\.jsonl, line 2: damaged, no valid JSON.*--from 06"),
    compared_with("answers of another kind", line_replaced("answers.jsonl", 3, '{"text": "q"}'),
                  r"answers\.jsonl, line 3: no scored answer\. Ask again: qlora run --run-name mine .*--from 06"),
    compared_with("answers not scored", line_replaced("answers.jsonl", 1, json.dumps(
        {"text": "q", "history": 5, "expected": "a", "where": "w", "number": 0, "tags": {}, "tuned": 7})),
        r"answers\.jsonl, line 1: no scored answer\. Ask again"),
    compared_with("answers empty", wrote("answers.jsonl", ""), r"runs: no held-out question was put to all", status=2),
    compared_with("metrics damaged", wrote("metrics.json", "{oops"), r"metrics\.json, line 1: damaged, no valid JSON"),
    compared_with("metrics with text", wrote("metrics.json", '{"held_out": {"questions": "many"}}'),
                  r"metrics\.json: damaged, held_out, questions: expected a number, found str"),
    compared_with("config.json damaged", wrote("config.json", "{oops"), r"mine/config\.json, line 1: damaged"),
    compared_with("config.json without config", wrote("config.json", "{}"),
                  r"config\.json: damaged, expected the config"),
]  # fmt: skip

CASES = [
    *VALUES, *PARAMETERS, *COMMAND_LINE, *DATASETS, *MODELS, *ADAPTERS, *RUN_DIRECTORIES
]  # fmt: skip
