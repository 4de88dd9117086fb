"""Count how the library reads: python .ci/words.py [folder or files, by default qlora_utils]."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

paths = []
for name in sys.argv[1:] or ["qlora_utils"]:
    path = Path(name)
    paths += sorted(path.rglob("*.py")) if path.is_dir() else [path]

lines = comments = comprehensions = riddles = 0
for path in paths:
    text = path.read_text(encoding="utf-8")
    lines += text.count("\n")
    # a rule between sections says nothing
    comments += len(re.findall(r"^[ \t]*#(?! ?-{5})", text, re.M))
    for node in ast.walk(ast.parse(text)):
        comprehensions += isinstance(node, COMPREHENSIONS)
        if isinstance(node, DOCUMENTED) and re.match(r"(What|Whether|How|Which)\b", ast.get_docstring(node) or ""):
            riddles += 1
            print(f"{path}:{getattr(node, 'lineno', 1)}: {(ast.get_docstring(node) or '').splitlines()[0]}")

print(f"{len(paths)} files, {lines:,} lines")
print(f"docstrings that open with What, Whether, How or Which: {riddles}")
print(f"comprehensions per 1,000 lines: {1000 * comprehensions / lines:.1f}")
print(f"own-line comments: {100 * comments / lines:.1f} % of lines")
