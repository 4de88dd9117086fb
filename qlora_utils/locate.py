"""Where models and data lie: a path, a hub id, or inside the project; and what to say where nothing does."""

from __future__ import annotations

from pathlib import Path

# Copies of gated weights, open to all, in the same files.
MIRRORS = {
    "meta-llama/Llama-2-7b-hf": "NousResearch/Llama-2-7b-hf",
    "meta-llama/Llama-2-7b-chat-hf": "NousResearch/Llama-2-7b-chat-hf",
}
EMBEDDED = "embedded:"  # prefix of a path inside the project's own data folder


def project_folder(name: str) -> Path:
    """`data` or `notebooks` of the checkout: the one this package lies in, or else the one we are working in.

    Raises:
        FileNotFoundError: neither is a checkout of this project.
    """
    package, here = Path(__file__).resolve().parent, Path.cwd()
    for checkout in (package.parent, here, *here.parents):
        if (checkout / "qlora_utils" / "config.py").is_file() and (checkout / name).is_dir():
            return checkout / name
    raise FileNotFoundError(
        f"{name}: not found. Work in a clone of the repository, or install from one: pip install -e ."
    )


def locate(source: str) -> str:
    """A model or dataset as loaders take it: `embedded:…` becomes a path in `data/`, all else stays as it is."""
    if source.startswith(EMBEDDED):
        return str(project_folder("data") / source.removeprefix(EMBEDDED))
    return source


def is_path(source: str, suffixes: tuple[str, ...] = ()) -> bool:
    """Whether a model or dataset can only be meant as a local path, not as a hub id, which is `owner/name`."""
    return source.startswith(("/", ".", "~", EMBEDDED)) or source.count("/") != 1 or source.lower().endswith(suffixes)


def is_there(source: str) -> bool:
    """Whether something lies at a path; what can be no path, with a zero byte in it or too long, is nowhere."""
    try:
        return Path(source).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # the last of `~nobody`
        return False


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with the next if it only announces that; or its kind if it has none."""
    first, *more = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{first} {more[0]}" if first.endswith(":") and more else first


def model_advice(source: str, error: Exception) -> str:
    """What went wrong when a model or its tokenizer was loaded, in one line, and the next step.

    Args:
        source: local folder or hub id, as `locate` gave it.
        error: what the loader or the hub client raised.
    """
    first = first_line(error)
    names = {type(e).__name__ for e in (error, error.__cause__, error.__context__) if e is not None}
    if "trust_remote_code" in str(error):
        return (
            f"model: {source} brings Python code of its own (auto_map in its config.json), which is never run here. "
            "Take a model that transformers knows by itself."
        )
    if Path(source).is_file():
        return f"model: {source} is a file. Expected a folder with config.json, tokenizer and *.safetensors."
    if Path(source).is_dir():
        if list(Path(source).glob("*.bin")) and not list(Path(source).glob("*.safetensors")):
            return f"model: {source} holds pickled weights (.bin) only; convert them to safetensors."
        return (
            f"model: {source} could not be loaded ({first}). Expected config.json, tokenizer and *.safetensors there."
        )
    if is_path(source):
        return f"model: {source} does not exist. Expected a local folder, or a hub id like owner/name."
    if "GatedRepoError" in names or "gated" in str(error).lower():
        return (
            f"model: {source} is gated. Accept its licence on its hub page, then log in with `hf auth login`; "
            f"or give a local folder or an open mirror of the weights: -p model={MIRRORS.get(source, '…')}"
        )
    if "RepositoryNotFoundError" in names:
        return f"model: {source} is not on the hub, or private. Check the name, or log in with `hf auth login`."
    return f"model: {source} could not be fetched ({first}). Check the network, or give a local folder: -p model=PATH"
