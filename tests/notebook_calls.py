"""How many of a notebook's calls of library functions go to its own topic: `python tests/notebook_calls.py`.

Counted are calls by a name that the notebook imported from the library, `data.prepare(…)` or `RunDirectory(…)`, in all
cells but set-up and parameters; calls of what these returned, `run.save_figure(…)`, are not.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


@dataclass(frozen=True)
class Calls:
    """Import statements of the library in a notebook, and calls by the module that the name came from."""

    topic: str
    imports: int
    by_module: Counter[str]

    @property
    def share(self):
        """Of all calls those of the notebook's own topic."""
        return self.by_module[self.topic] / self.by_module.total()


def imported(tree):
    """Each name that a cell imports from the library, and the module that it stands for or comes from."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "qlora_utils":
            for alias in node.names:
                whole_module = node.module == "qlora_utils" or (node.module.count(".") == 1 and alias.name.islower())
                names[alias.asname or alias.name] = alias.name if whole_module else node.module.rpartition(".")[2]
    return names


def root_of(function):
    """The name that a call begins with: `data` of `data.Prepared.load(run)`."""
    while isinstance(function, ast.Attribute):
        function = function.value
    return function.id if isinstance(function, ast.Name) else None


def count(path):
    """Count the imports and calls of a notebook."""
    names, imports, calls = {}, 0, Counter()
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or "parameters" in cell["metadata"].get("tags", []):
            continue
        tree = ast.parse(source)
        names |= imported(tree)
        if source.startswith("# Set-up"):
            continue
        imports += sum(isinstance(node, ast.ImportFrom) and bool(imported(node)) for node in ast.walk(tree))
        roots = [root_of(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        calls.update(names[root] for root in roots if root in names)
    return Calls(path.stem.partition("_")[2], imports, calls)


if __name__ == "__main__":
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        found = count(notebook)
        others = ", ".join(f"{name} {number}" for name, number in found.by_module.most_common() if name != found.topic)
        calls = f"{found.share:4.0%} of {found.by_module.total()} calls"
        print(f"{notebook.stem:<17}{found.imports} imports, {calls}; {others}")
