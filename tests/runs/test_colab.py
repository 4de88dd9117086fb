"""Colab and Kaggle, each simulated as an empty machine: its own packages, a notebook, and nothing of this project."""

from __future__ import annotations

import base64
import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import time
import zipfile
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

import qlora_utils
from qlora_utils import data
from qlora_utils.commands import run as runner
from qlora_utils.config import RunConfig
from qlora_utils.rows.files import read_source
from qlora_utils.runs import colab
from qlora_utils.runs.colab import MachineError
from qlora_utils.runs.directory import RunDirectory, require_adapter
from qlora_utils.runs.files import read_json, read_jsonl, write_json

NOTEBOOK = ROOT / "notebooks" / "01_data.ipynb"
ADDRESS = re.findall(r'^Repository = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[0]
TORCH = metadata.version("torch")
OURS = ("qlora_utils", "_editable_impl_qlora_utils")
# A person's own kernel would have it loaded; what Colab's has beside it no cell of ours asks for.
STAND_IN = """
import os
from pathlib import Path

def mount(mountpoint):
    drive = Path(os.environ["STAND_IN_DRIVE"])
    (drive / "MyDrive").mkdir(parents=True, exist_ok=True)
    with (drive / "mounts.txt").open("a") as log:
        log.write(mountpoint + "\\n")
    if not Path(mountpoint).exists():
        Path(mountpoint).symlink_to(drive)
"""


def set_up_cell(path=NOTEBOOK):
    return next(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")


@dataclass
class Machine:
    """A folder to work in, as `/content`, and a Python that has what this one has, without this project."""

    content: Path
    python: Path
    env: dict[str, str]

    @property
    def clone(self):
        return self.content / "qlora"

    @property
    def site(self):
        return next((self.python.parent.parent / "lib").glob("python*/site-packages"))

    def run(self, code, **env):
        """Run code as one cell of a new session."""
        return subprocess.run([self.python, "-c", code], cwd=self.content, env={**self.env, **env}, capture_output=True,
                              text=True, timeout=300)  # fmt: skip

    def install(self):
        """What the set-up cell does in the clone."""
        command = [self.python, "-m", "qlora_utils.runs.colab"]
        return subprocess.run(command, cwd=self.clone, env=self.env, capture_output=True, text=True, timeout=300)

    def set_up(self, *, colab=True, before="", after="", keep_in_drive=False, **env):
        """Run the set-up cell's own bytes in a new session."""
        cell = set_up_cell()
        if keep_in_drive:
            assert cell.count("KEEP_IN_DRIVE = False") == 1
            cell = cell.replace("KEEP_IN_DRIVE = False", "KEEP_IN_DRIVE = True")
        return self.run(f"{'import google.colab' if colab else ''}\n{before}\n{cell}\n{after}", **env)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The working tree as a repository with the tag of its version, at a `file://` address."""
    folder = tmp_path_factory.mktemp("served")
    git = lambda *args: subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout  # noqa: E731
    tree = folder / "tree"
    for name in git("ls-files", "-co", "--exclude-standard", "-z").split("\0"):
        if name and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    git("init", "-q", str(tree))
    git("-C", str(tree), "add", "-A", "-f")
    git("-C", str(tree), *identity, "commit", "-q", "-m", "as it is")
    git("-C", str(tree), "tag", f"v{qlora_utils.__version__}")
    git("clone", "-q", "--bare", str(tree), str(folder / "served.git"))
    return f"file://{folder / 'served.git'}"


def make_machine(folder, served):
    """A fresh machine. What it came with are links to this environment's packages, so that a test can replace some."""
    content, preinstalled = folder / "content", folder / "preinstalled"
    for made in (content, preinstalled, folder / "home"):
        made.mkdir(parents=True)
    for place in dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib")):
        for path in Path(place).iterdir():
            if not path.name.startswith(OURS) and path.suffix != ".pth":
                (preinstalled / path.name).symlink_to(path)
    package = folder / "stand_in" / "google" / "colab"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "drive.py").write_text(STAND_IN)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    kept = ("PATH", "LANG", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
    env = {name: value for name, value in os.environ.items()
           if name in kept or name.startswith("PIP_") or name.lower().endswith("_proxy")}  # fmt: skip
    env |= {
        "HOME": str(folder / "home"), "IPYTHONDIR": str(folder / "home" / "ipython"), "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "STAND_IN_DRIVE": str(folder / "drive of google"),
        # As a person would who has the repository somewhere else: the cell's own address leads there.
        "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{served}.insteadOf", "GIT_CONFIG_VALUE_0": ADDRESS,
    }  # fmt: skip
    if find_spec("hatchling"):
        env["PIP_NO_BUILD_ISOLATION"] = "0"  # pip's way to say true: build with what is here, without a network
    machine = Machine(content, folder / "venv" / "bin" / "python", env)
    (machine.site / "preinstalled.pth").write_text(f"{preinstalled}\n{folder / 'stand_in'}\n")
    startup = folder / "home" / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text("import google.colab\n")
    return machine


@pytest.fixture
def machine(tmp_path, served):
    return make_machine(tmp_path, served)


def preinstalled(machine, name, version):
    """Have the machine come with another version of a package, as far as pip can see."""
    folder = machine.site.parent.parent.parent.parent / "preinstalled"
    (link,) = folder.glob(f"{name}-*.dist-info")
    target = link.resolve()
    link.unlink()
    shutil.copytree(target, folder / f"{name}-{version}.dist-info")
    path = folder / f"{name}-{version}.dist-info" / "METADATA"
    path.write_text(re.sub(r"^Version: .*$", f"Version: {version}", path.read_text(), count=1, flags=re.MULTILINE))


def make_wheel(folder, name, version, *requires):
    """An empty package that pip can install."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{info}/METADATA": "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}",
                                       *(f"Requires-Dist: {other}" for other in requires)]) + "\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }  # fmt: skip
    digest = lambda text: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")  # noqa: E731
    lines = [f"{path},sha256={digest(text)},{len(text)}" for path, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,"]) + "\n"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


@pytest.mark.slow
def test_notebook_01_runs_on_a_colab_machine_that_has_nothing_else(machine):
    assert "No module named 'qlora_utils'" in machine.run("import qlora_utils").stderr
    shutil.copyfile(NOTEBOOK, machine.content / "notebook.ipynb")
    run = subprocess.run(
        [machine.python, "-m", "papermill", "--no-progress-bar", "notebook.ipynb", "executed.ipynb"],
        cwd=machine.content, env=machine.env, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    executed = nbformat.read(machine.content / "executed.ipynb", as_version=4)
    said = "".join(output.get("text", "") for output in executed.cells[2].outputs)
    assert f"installed: qlora-utils {qlora_utils.__version__}" in said
    assert f"torch {TORCH}" in said
    assert "KEEP_IN_DRIVE = True" in said
    assert (machine.clone / "outputs" / "demo" / "data" / "train.jsonl").is_file()
    # Nothing else was installed, torch least of all, and what runs is what was installed.
    new = {path.name for path in machine.site.glob("*.dist-info")}
    assert new == {f"qlora_utils-{qlora_utils.__version__}.dist-info"}

    # A second notebook in another session of the same machine: what is there is used, and nothing is fetched.
    again = machine.set_up(after="print(colab.__file__)", GIT_CONFIG_KEY_0="url.file:///nowhere.insteadOf")
    assert again.returncode == 0, again.stderr
    assert str(machine.site / "qlora_utils" / "runs" / "colab.py") in again.stdout


@pytest.mark.slow
def test_outputs_in_drive_outlive_the_machine(machine, tmp_path):
    """One machine leaves a run that began before Drive was asked for; another, empty one goes on with it."""
    drive = tmp_path / "drive of google"
    first = machine.set_up()
    assert first.returncode == 0, first.stderr
    (machine.clone / "outputs" / "begun" / "data").mkdir(parents=True)
    (machine.clone / "outputs" / "begun" / "data" / "train.jsonl").write_text("{}\n")

    write = "Path('../outputs/later').mkdir(); Path('../outputs/later/x').write_text('y')"
    kept = machine.set_up(keep_in_drive=True, after=write)
    assert kept.returncode == 1
    command = next(line for line in kept.stderr.splitlines() if line.startswith("!mv"))
    subprocess.run(["sh", "-c", command[1:]], check=True, capture_output=True)
    kept = machine.set_up(keep_in_drive=True, after=write)
    assert kept.returncode == 0, kept.stderr
    assert f"Outputs lie in your Google Drive, {machine.content / 'drive' / colab.IN_DRIVE}" in kept.stdout
    assert (drive / "mounts.txt").read_text() == f"{machine.content / 'drive'}\n" * 2
    shutil.rmtree(machine.clone)
    (machine.content / "drive").unlink()

    other = machine.set_up(keep_in_drive=True, after="print(*sorted(p.name for p in Path('../outputs').iterdir()))")
    assert other.returncode == 0, other.stderr
    assert other.stdout.splitlines()[-1] == "begun later"
    assert (drive / colab.IN_DRIVE / "begun" / "data" / "train.jsonl").read_text() == "{}\n"


@pytest.mark.slow
def test_kaggle_and_the_cell_run_twice_in_one_session(machine):
    again = f"{set_up_cell()}\nprint(Path.cwd())"
    kaggle = machine.set_up(colab=False, keep_in_drive=True, KAGGLE_KERNEL_RUN_TYPE="Interactive", after=again)
    assert kaggle.returncode == 0, kaggle.stderr
    assert f"Outputs lie in {machine.clone / 'outputs'}. Save Version keeps them" in kaggle.stdout
    assert "KEEP_IN_DRIVE is for Colab" in kaggle.stdout
    assert not (machine.clone / "outputs").exists()
    assert kaggle.stdout.rstrip().endswith(str(machine.clone / "notebooks"))
    assert not list(machine.clone.rglob("qlora"))


def test_a_machine_of_ones_own_is_left_alone(machine):
    """Neither cloned nor installed: the person's environment is theirs."""
    own = machine.set_up(colab=False)
    assert own.stderr.splitlines()[-1].startswith("ModuleNotFoundError: No module named 'qlora_utils'")
    assert not machine.clone.exists()


@pytest.mark.slow
def test_what_is_missing_is_installed_and_what_is_too_old_replaced(machine, tmp_path, served):
    """As on Colab: an older transformers, no papermill."""
    preinstalled(machine, "transformers", "5.9.0")
    for link in (tmp_path / "preinstalled").glob("papermill*"):
        link.unlink()
    wheels = tmp_path / "wheels"
    make_wheel(wheels, "transformers", "5.98")
    make_wheel(wheels, "papermill", "99")
    machine.env["PIP_FIND_LINKS"] = str(wheels)
    subprocess.run(["git", "clone", "-q", served, machine.clone], check=True, env=machine.env)
    run = machine.install()
    told = f"installed: papermill 99, qlora-utils {qlora_utils.__version__}\nreplaced: transformers 5.9.0 → 5.98\n"
    assert run.stdout == told, run.stderr
    assert machine.install().stdout == "\n"  # nothing to do


def test_a_machine_with_too_old_a_torch_is_told_so_and_left_as_it_is(machine):
    preinstalled(machine, "torch", "2.6.0+cu124")
    run = machine.set_up()
    assert run.returncode == 1
    assert "torch 2.6.0+cu124 came with this machine, and 2.8 or later is needed" in run.stderr
    assert "Runtime version, Latest" in run.stderr
    assert not list(machine.site.glob("*.dist-info"))


def test_a_clone_that_fails_says_what_to_do_and_can_be_tried_again(machine):
    run = machine.set_up(GIT_CONFIG_KEY_0="url.file:///nowhere.insteadOf")
    assert run.returncode == 1
    assert "'/nowhere' does not appear to be a git repository" in run.stderr
    assert "Is the internet on?" in run.stderr.splitlines()[-1]
    assert not machine.clone.exists()


def test_torch_stays_even_where_pip_would_replace_it_and_it_is_said_what_to_do(machine, tmp_path, served):
    """Something wants a torch that there is; pip would fetch it, and with it break whatever was built for the other."""
    newer = f"{TORCH.split('+')[0]}.post1"
    make_wheel(tmp_path / "wheels", "torch", newer)
    make_wheel(tmp_path / "wheels", "newest_thing", "1", f"torch>={newer}")
    machine.env["PIP_FIND_LINKS"] = str(tmp_path / "wheels")
    subprocess.run(["git", "clone", "-q", served, machine.clone], check=True, env=machine.env)
    path = machine.clone / "pyproject.toml"
    few = 'dependencies = ["torch>=2.8", "newest-thing"]\n'
    path.write_text(re.sub(r"^dependencies = \[\n.*?^\]\n", few, path.read_text(), flags=re.MULTILINE | re.DOTALL))
    run = machine.set_up()
    assert run.returncode == 1
    assert re.search(rf"The user requested \(constraint\) torch.*=={re.escape(TORCH)}", run.stderr)
    assert f"pip could not install {machine.clone}. Is there a network?" in run.stderr
    assert not list(machine.site.glob("*.dist-info"))


def test_a_package_loaded_before_pip_replaced_it_asks_for_a_restart(monkeypatch, tmp_path):
    """Of this process's own packages one is said to have been replaced a moment ago."""
    import tqdm

    monkeypatch.delitem(sys.modules, "papermill", raising=False)  # another test may have loaded it
    version = metadata.version("tqdm")
    record = {
        "at": time.time() + 1,
        "changed": {"tqdm": ["4.1", version], "numpy": [None, "1"], "papermill": ["1", "2"]},
    }
    assert colab._loaded_before(record) == []  # what is loaded is what is installed; papermill is not loaded
    monkeypatch.setattr(tqdm, "__version__", "4.1")
    assert colab._loaded_before(record) == ["tqdm 4.1"]
    assert colab._loaded_before({**record, "at": 0.0}) == []  # a session begun since cannot hold the old one

    (tmp_path / "notebooks").mkdir()
    (tmp_path / "qlora_utils").mkdir()
    (tmp_path / "qlora_utils" / "config.py").write_text("")
    write_json(tmp_path / colab.RECORD, record)
    monkeypatch.setattr("qlora_utils.locate.project_folder", lambda name: tmp_path / name)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    with pytest.raises(MachineError, match=r"tqdm 4\.1: loaded in this session before .* Restart the session"):
        colab.ready(f"v{qlora_utils.__version__}")
    with pytest.raises(MachineError, match=rf"This notebook is of v9\.9, .* remove {re.escape(str(tmp_path))}"):
        colab.ready("v9.9")


def test_on_ones_own_machine_versions_that_differ_are_told(monkeypatch):
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    assert colab.ready(f"v{qlora_utils.__version__}").startswith("python ")
    assert colab.ready("v9.9").startswith("This notebook is of v9.9")
    assert colab.ready(f"v{qlora_utils.__version__}", keep_in_drive=True).startswith("KEEP_IN_DRIVE is for Colab")


@pytest.fixture
def drive(monkeypatch, tmp_path):
    """Google Drive as a folder, and the clone's folder of run directories."""
    import types

    package, module = types.ModuleType("google.colab"), types.ModuleType("google.colab.drive")
    module.mount = lambda mountpoint: (Path(mountpoint) / "MyDrive").mkdir(parents=True, exist_ok=True)
    package.drive = module
    monkeypatch.setitem(sys.modules, "google.colab", package)
    monkeypatch.setitem(sys.modules, "google.colab.drive", module)
    return tmp_path / "content" / "drive", tmp_path / "content" / "qlora" / "outputs"


def test_a_drive_that_is_not_mounted_says_what_to_do(drive, monkeypatch):
    def refuse(mountpoint):
        raise ValueError("mount failed")

    monkeypatch.setattr(sys.modules["google.colab.drive"], "mount", refuse)
    with pytest.raises(MachineError, match=r"not mounted \(mount failed\)\. Run this again and allow access"):
        colab.keep_in_drive(drive[1])
    assert not drive[1].is_symlink()


def everything(folder):
    """Files below a folder and what is in them."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("before", ["nothing", "an empty folder", "a link", "a link that leads nowhere"])
def test_outputs_become_a_link_into_drive_where_nothing_lies(drive, tmp_path, before):
    mount, outputs = drive
    outputs.parent.mkdir(parents=True)
    if before == "an empty folder":
        outputs.mkdir()
    elif before != "nothing":
        outputs.symlink_to(tmp_path if before == "a link" else tmp_path / "nowhere")
    write_json(mount / colab.IN_DRIVE / "demo" / "config.json", {"from": "there"})
    for _ in range(2):  # twice is once
        assert colab.keep_in_drive(outputs) == mount / colab.IN_DRIVE
        assert outputs.is_symlink()
        assert read_json(outputs / "demo" / "config.json") == {"from": "there"}


def refused(outputs):
    """Have the folder refused; the command that the message gives."""
    before = everything(outputs)
    with pytest.raises(MachineError, match=r"hidden by a link into Drive\. Move it there") as told:
        colab.keep_in_drive(outputs)
    assert everything(outputs) == before and not outputs.is_symlink()
    first, command = str(told.value).splitlines()
    assert str(outputs) in first and command.startswith("!")
    return command[1:]


def test_what_lies_here_stays_and_the_command_moves_all_of_it(drive):
    mount, outputs = drive
    config = RunConfig.from_preset("pocket", output_dir=str(outputs))
    upload = data.save_upload("mine.csv", b"question,answer\nWhy?,So.\n", config)
    for name in (".memory.jsonl", "demo/config.json", "demo/.lock", ".prepared/x/rows.jsonl", "notes.txt"):
        (outputs / name).parent.mkdir(parents=True, exist_ok=True)
        (outputs / name).write_text(f"{name}\n")
    before = everything(outputs)
    subprocess.run(["sh", "-c", refused(outputs)], check=True)
    assert everything(colab.keep_in_drive(outputs)) == before == everything(mount / colab.IN_DRIVE)
    assert upload.read_bytes().endswith(b"Why?,So.\n")  # where the page said that it lies


def test_of_two_runs_with_one_name_neither_is_lost(drive):
    mount, outputs = drive
    for folder, text in ((outputs, "here"), (mount / colab.IN_DRIVE, "there")):
        write_json(folder / "demo" / "config.json", {"from": text})
    write_json(outputs / "other" / "config.json", {})
    subprocess.run(["sh", "-c", refused(outputs)], capture_output=True)
    refused(outputs)
    assert read_json(outputs / "demo" / "config.json") == {"from": "here"}
    assert read_json(mount / colab.IN_DRIVE / "demo" / "config.json") == {"from": "there"}
    (outputs / "demo").rename(outputs / "demo-2")
    subprocess.run(["sh", "-c", refused(outputs)], capture_output=True)
    assert colab.keep_in_drive(outputs) == mount / colab.IN_DRIVE
    assert sorted(path.name for path in outputs.iterdir()) == ["demo", "demo-2", "other"]


def test_where_no_link_can_be_made_it_is_said_what_to_do(drive, monkeypatch):
    outputs = drive[1]
    outputs.mkdir(parents=True)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "symlink_to", full)
        with pytest.raises(MachineError, match=r"could not be made a link .*No space left.*Make room .* run this cell"):
            colab.keep_in_drive(outputs)
    assert colab.keep_in_drive(outputs).is_dir()
    outputs.unlink()
    outputs.write_text("a file")
    with pytest.raises(MachineError, match="could not be made a link"):
        colab.keep_in_drive(outputs)
    assert outputs.read_text() == "a file"


def test_an_upload_is_found_by_the_next_machine_where_the_page_said_that_it_lies(drive, monkeypatch):
    """The next machine has its clone in the same place."""
    outputs = drive[1]
    (outputs.parent / "notebooks").mkdir(parents=True)
    monkeypatch.chdir(outputs.parent / "notebooks")
    config = RunConfig.from_preset("pocket", output_dir="../outputs")
    example = (ROOT / "data" / "examples" / "questions.csv").read_bytes()
    colab.keep_in_drive(outputs)
    upload = data.save_upload("mine.csv", example, config)

    outputs.unlink()  # the next machine
    colab.keep_in_drive(outputs)
    assert upload.is_file()
    monkeypatch.chdir(outputs.parent)  # as a notebook and as `qlora run` take it
    asked = runner.resolve(preset=None, run_name="mine", output_dir="outputs", parameters={"dataset": str(upload)},
                           start=None)[0]  # fmt: skip
    RunDirectory(asked.run_dir).begin(asked)
    again, _ = runner.resolve(preset=None, run_name="mine", output_dir="outputs", parameters={}, start=None)
    assert len(list(read_source(again.dataset)["train"])) >= 30


def test_what_is_missing_on_a_borrowed_machine_is_told_with_two_ways_to_get_it(drive, monkeypatch, tmp_path):
    """On Colab each notebook has a machine of its own, so that `run 01 first` alone would not help."""
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    run = RunDirectory(tmp_path / "mine")
    for missing in (run.data / "train.jsonl", run.history):
        with pytest.raises(
            FileNotFoundError, match=r"KEEP_IN_DRIVE = True .*qlora run --preset pocket --run-name mine"
        ):
            read_jsonl(missing)
    with pytest.raises(FileNotFoundError, match=r"Notebook 04_training writes it: run that first\. Colab gives"):
        require_adapter(run)
    monkeypatch.delitem(sys.modules, "google.colab")
    with pytest.raises(FileNotFoundError, match=r"run that first\.$"):
        require_adapter(run)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    with pytest.raises(FileNotFoundError, match=r"run that first\. Kaggle gives .* of its own: have this one run"):
        require_adapter(run)


def test_a_run_directory_on_a_mount_without_locks_permissions_or_flushed_folders(config, tokenizer, monkeypatch):
    """What FUSE mounts refuse, refused by the system calls: a run is prepared, locked and sealed all the same."""
    from qlora_utils import data
    from qlora_utils.loop import checkpoints
    from qlora_utils.runs import locks

    def refuse(error):
        def call(*args, **kwargs):
            raise OSError(error, os.strerror(error))

        return call

    sync = os.fsync

    def sync_files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOSYS))
    chmod = os.chmod

    def chmod_elsewhere(path, mode, **options):
        if Path(config.output_dir) in (Path(path), *Path(path).parents):
            raise OSError(errno.EPERM, "Operation not permitted")
        chmod(path, mode, **options)

    monkeypatch.setattr(os, "chmod", chmod_elsewhere)
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    monkeypatch.setattr(os, "fsync", sync_files_only)
    run = RunDirectory(config.run_dir)
    with locks.hold_lock(run.path / ".lock", "training"):
        run.begin(config)
        data.prepare(config, tokenizer).save(run)
        folder = run.checkpoints / "checkpoint-1"
        folder.mkdir(parents=True)
        (folder / "x").write_bytes(b"x")
        checkpoints.seal(folder, {"step": 1})
    assert len(data.Prepared.load(run).train) > 0
    assert read_json(folder / checkpoints.RECORD)["files"] == {"x": 1}
