"""Write the repository's address and the version wherever they stand; `make stamp REPO=owner/name`.

The address stands in `pyproject.toml`, the version in `qlora_utils/__init__.py`, the set-up cell in notebook 01. From
there they go to the badges and set-up cells of all notebooks, to `README.md` and to `CITATION.cff`. Twice is once.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

SITE = "https://github.com/"
OWNER_AND_NAME = r"[\w-]+/[\w.-]+?"
REPOSITORY = re.compile(rf'^Repository = "{SITE}({OWNER_AND_NAME})"$', re.MULTILINE)
COLAB = "https://colab.research.google.com/github/{repository}/blob/v{version}/{path}"
KAGGLE = f"https://kaggle.com/kernels/welcome?src={SITE}{{repository}}/blob/v{{version}}/{{path}}"
COLAB_BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
KAGGLE_BADGE = "https://kaggle.com/static/images/open-in-kaggle.svg"
BADGES = re.compile(r"^\[!\[Open in (?:Colab|Kaggle)\].*(?:\n\[!\[Open in (?:Colab|Kaggle)\].*)*$", re.MULTILINE)


def main(arguments: list[str]) -> int:
    """Stamp the checkout that this file lies in, and list what changed. Exit status 2 if the name cannot be one."""
    root = Path(__file__).resolve().parent.parent
    given = arguments[0].removeprefix(SITE).strip("/").removesuffix(".git") if arguments and arguments[0] else None
    if given is not None and not re.fullmatch(OWNER_AND_NAME, given):
        print(f"stamp: {given!r}: expected owner/name, as in make stamp REPO=ada/qlora-notebooks", file=sys.stderr)
        return 2
    changed = stamp(root, given)
    repository, version = address(root), version_of(root)
    print("\n".join(f"stamped {path.relative_to(root)}" for path in changed) or "everything is stamped")
    print(f"Badges and set-up cells fetch the tag: git tag v{version} && git push {SITE}{repository} v{version}")
    return 0


def stamp(root: Path, repository: str | None = None) -> list[Path]:
    """Stamp a checkout.

    Args:
        root: of the checkout.
        repository: `owner/name`; as `pyproject.toml` has it, where that is None.

    Returns:
        The files that changed.
    """
    old, version = address(root), version_of(root)
    new = repository or old
    notebooks = [
        path for path in sorted((root / "notebooks").rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts
    ]
    set_up = _set_up_cell(notebooks[0], new, version)
    stamped = {path: _notebook(path, path.relative_to(root).as_posix(), set_up, new, version) for path in notebooks}
    for path in (root / "README.md", root / "CITATION.cff"):
        if path.is_file():
            stamped[path] = _text(path.read_text(encoding="utf-8"), old, new, version)
            if path.suffix == ".cff":
                stamped[path] = re.sub(r"^version: .*$", f"version: {version}", stamped[path], flags=re.MULTILINE)
    # Last, so that after a crash the old name is still known.
    project = root / "pyproject.toml"
    stamped[project] = REPOSITORY.sub(f'Repository = "{SITE}{new}"', project.read_text(encoding="utf-8"))
    changed = [path for path, text in stamped.items() if text != path.read_text(encoding="utf-8")]
    for path in changed:
        path.write_text(stamped[path], encoding="utf-8", newline="\n")
    return changed


def address(root: Path) -> str:
    """`owner/name` of the repository, from `pyproject.toml`."""
    found = REPOSITORY.search((root / "pyproject.toml").read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f'{root / "pyproject.toml"}: no line Repository = "{SITE}owner/name".')
    return found[1]


def version_of(root: Path) -> str:
    """Read the version from `qlora_utils/__init__.py`."""
    text = (root / "qlora_utils" / "__init__.py").read_text(encoding="utf-8")
    return re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)[0]


def badges(path: str, repository: str, version: str) -> str:
    """Format the badges of a notebook, in Markdown."""
    where = {"repository": repository, "version": version, "path": path}
    colab, kaggle = COLAB.format(**where), KAGGLE.format(**where)
    return f"[![Open in Colab]({COLAB_BADGE})]({colab})\n[![Open in Kaggle]({KAGGLE_BADGE})]({kaggle})"


def _set_up_cell(path: Path, repository: str, version: str) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    source = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    line = f'REPOSITORY, VERSION = "{SITE}{repository}", "v{version}"'
    return re.sub(r"^REPOSITORY, VERSION = .*$", line, source, count=1, flags=re.MULTILINE)


def _notebook(path: Path, link: str, set_up: str, repository: str, version: str) -> str:
    """Return the notebook with its badges and its set-up cell; a solution may have neither."""
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for number, cell in enumerate(notebook["cells"]):
        source = "".join(cell["source"])
        if number == 0:
            source = BADGES.sub(badges(link, repository, version), source, count=1)
        elif cell["cell_type"] == "code" and source.startswith("# Set-up, the same"):
            source = set_up
        cell["source"] = source.splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def _text(text: str, old: str, new: str, version: str) -> str:
    """Markdown or YAML with the new name and version in its links to this repository."""
    text = re.sub(rf"(github(?:\.com)?/){re.escape(old)}(?![\w-])", rf"\g<1>{new}", text)
    return re.sub(rf"({re.escape(new)}/blob/)v\d[\w.+-]*", rf"\g<1>v{version}", text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
