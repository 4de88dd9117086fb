"""Locate models and data: a path, a hub id, or inside the project; word the errors."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

# Open copies of gated weights, in the same files.
MIRRORS = {
    "meta-llama/Llama-2-7b-hf": "NousResearch/Llama-2-7b-hf",
    "meta-llama/Llama-2-7b-chat-hf": "NousResearch/Llama-2-7b-chat-hf",
}
# The prefix of a path inside the project's own data folder.
EMBEDDED = "embedded:"
# The prefix of a model whose weights a Python package brings, and all such models: models/packaged.py fetches them.
PACKAGED = "packaged:"
PACKAGED_MODELS = ("packaged:smollm2-135m-instruct",)
# The folder of runs as the notebooks name it, which lie beside it.
OUTPUTS_OF_NOTEBOOKS = "../outputs"
# A URL, also one that was a `Path` in between, which makes one slash of two.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
# What to do about a model whose tokenizer is a file of sentencepiece alone.
SENTENCEPIECE = (
    "To read it takes sentencepiece and protobuf: pip install sentencepiece protobuf. Or copy a tokenizer.json from "
    "where the model comes from."
)


def project_folder(name: str) -> Path:
    """Return the folder `data` or `notebooks` of the checkout.

    That is the checkout that holds this package, or else the one that holds the working directory.

    Raises:
        FileNotFoundError: neither is a checkout of this project.
    """
    # An installed package brings no notebooks, so a checkout around the working directory counts
    # too.
    package, working = Path(__file__).resolve().parent, Path.cwd()
    for checkout in (package.parent, working, *working.parents):
        if (checkout / "qlora_utils" / "config.py").is_file() and (checkout / name).is_dir():
            return checkout / name
    raise FileNotFoundError(
        f"{name}: not found. Work in a clone of the repository, or install from one: pip install -e ."
    )


def outputs_of_notebooks() -> str:
    """Return the folder of runs that the notebooks mean by `../outputs`: `outputs` in the checkout.

    A kernel need not work in the folder of its notebook: papermill's works where it was called.
    """
    working = Path.cwd()
    # A kernel that works beside its notebooks, also in a copy of them elsewhere, means its own `../outputs`.
    if (working / "01_data.ipynb").is_file() and working.name != "solutions":
        return OUTPUTS_OF_NOTEBOOKS
    for folder in (working, *working.parents):
        if (folder / "qlora_utils" / "config.py").is_file() and (folder / "notebooks").is_dir():
            checkout = folder
            break
    else:
        try:
            checkout = project_folder("notebooks").parent
        # Notebooks that were copied elsewhere lie beside outputs of their own.
        except FileNotFoundError:
            return OUTPUTS_OF_NOTEBOOKS
    folder = checkout / "outputs"
    return OUTPUTS_OF_NOTEBOOKS if (working / OUTPUTS_OF_NOTEBOOKS).resolve() == folder.resolve() else str(folder)


def is_url(text: str) -> bool:
    """Return True if a text is a URL, as `s3://bucket` or `file:///home`, and no path."""
    return _URL.match(text) is not None


def locate(source: str) -> str:
    """Return a model or dataset as loaders accept it.

    `embedded:…` becomes a path in `data/`, `packaged:…` one in `outputs/models/`, which need not exist yet, and
    `~/…` one in the home folder.
    """
    if source in PACKAGED_MODELS:
        return str(project_folder("data").parent / "outputs" / "models" / source.removeprefix(PACKAGED))
    if source.startswith(EMBEDDED):
        return str(project_folder("data") / source.removeprefix(EMBEDDED))
    if source.startswith("~"):
        # `~nobody`, a user that doesn't exist, stays as it is.
        with suppress(RuntimeError):
            return str(Path(source).expanduser())
    return source


def is_path(source: str, suffixes: tuple[str, ...] = ()) -> bool:
    """Return True if a model or dataset can only be a local path, and not a hub id `owner/name`."""
    local = source.startswith(("/", ".", "~", EMBEDDED, PACKAGED))
    return local or source.count("/") != 1 or source.lower().endswith(suffixes)


def path_exists(source: str) -> bool:
    """Return True if a file or folder exists at a path.

    An invalid path, too long or with a zero byte in it, does not exist.
    """
    try:
        return Path(source).expanduser().exists()
    # RuntimeError: `~nobody`, a user that doesn't exist.
    except (OSError, ValueError, RuntimeError):
        return False


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if the message is empty.

    If the first line ends with a colon, it only announces the next one, which is then appended.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if lines[0].endswith(":") and len(lines) > 1:
        return f"{lines[0]} {lines[1]}"
    return lines[0]


def model_advice(source: str, error: Exception) -> str:
    """Word in one line why a model or its tokenizer could not be loaded, and the next step.

    Args:
        source: local folder or hub id, as returned by `locate`.
        error: raised by the loader or the hub client.
    """
    first = first_line(error)
    # Types are compared by name, which needs no import. transformers often wraps the hub's errors.
    chain = (error, error.__cause__, error.__context__)
    names = {type(link).__name__ for link in chain}
    if "trust_remote_code" in str(error):
        return (
            f"model: {source} brings Python code of its own (auto_map in its config.json), which is never run here. "
            "Take a model that transformers knows by itself."
        )
    if "OutOfMemoryError" in names:
        return (
            f"model: {source} does not fit whole into this GPU. Several can split it, without notebooks: qlora run "
            "--only 01, then qlora train (docs/models.md); or take a smaller model. `qlora plan` shows what it takes."
        )
    if Path(source).is_file():
        return f"model: {source} is a file. Expected a folder with config.json, tokenizer and *.safetensors."
    if Path(source).is_dir():
        if list(Path(source).glob("*.bin")) and not list(Path(source).glob("*.safetensors")):
            return f"model: {source} holds pickled weights (.bin) only; convert them to safetensors."
        return (
            f"model: {source} could not be loaded ({first}). Expected config.json, tokenizer and *.safetensors there."
        )
    # From here on the source is a hub id, or a path with nothing there.
    if is_path(source):
        return f"model: {source} does not exist. Expected a local folder, or a hub id like owner/name."
    if "GatedRepoError" in names or "gated" in str(error).lower():
        return (
            f"model: {source} is gated. Accept its licence on its hub page, then log in with `hf auth login`; "
            f"or give a local folder or an open mirror of the weights: -p model={MIRRORS.get(source, '…')}"
        )
    # Without sentencepiece transformers falls back on tiktoken, and its error names that alone.
    if any(name in str(error).lower() for name in ("sentencepiece", "tiktoken")):
        return f"model: {source} has its tokenizer in tokenizer.model or spiece.model alone. {SENTENCEPIECE}"
    if "RepositoryNotFoundError" in names:
        return f"model: {source} is not on the hub, or private. Check the name, or log in with `hf auth login`."
    return f"model: {source} could not be fetched ({first}). Check the network, or give a local folder: -p model=PATH"
