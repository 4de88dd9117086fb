"""Compare the numbers in tables of the docs with stored results.

A row of a table ends in a comment that names its numbers in the order in which they stand:

    | T4 | 10.5 GiB | 4,096 | <!-- plans.json llama2-7b.T4: peak_gib pass_tokens -->

that is file, beginning of the keys, colon, the rest of each key; groups with other beginnings or files follow after a
semicolon. The first column says what was measured, and its numbers are not compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# A number of its own: not a part of a name such as H200, fp16, 4-bit or A100-40.
NUMBER = re.compile(r"(?<![\w.,/-])[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\w]|[,.]\d|-[a-z])")
# What stands after a number: how its value is scaled to be printed, and what its key ends in.
UNITS = {"%": (100.0, ""), "min": (1 / 60, "_s"), "s": (1.0, "_s"), "GiB": (1.0, "_gib"), "GB": (1.0, "_gb")}


@dataclass(frozen=True)
class Row:
    """Hold a table row: the cells after the first, without code, and the comment that names its values."""

    line: str
    cells: str
    names: str

    def numbers(self) -> list[tuple[str, str]]:
        """Return each number as it is printed, with the unit after it, if one of `UNITS`."""
        found = []
        for match in NUMBER.finditer(self.cells):
            unit = re.match(r"\s*(%|(?:min|s|GiB|GB)\b)", self.cells[match.end() :])
            found.append((match[0], unit[1] if unit else ""))
        return found

    def keys(self) -> list[tuple[str, str]]:
        """Return file and key of each value that the comment names."""
        found, file = [], ""
        for group in filter(None, (part.strip() for part in self.names.split(";"))):
            head, _, rest = group.partition(":")
            *files, beginning = head.split()
            file = files[0] if files else file
            found += [(file, f"{beginning}.{name}") for name in rest.split()]
        return found


def rows_of(text: str) -> Iterator[Row]:
    """Yield the rows of all tables of a page, without their headings."""
    in_body = False
    for line in re.sub(r"^```.*?^```", "", text, flags=re.M | re.S).splitlines():
        if not line.startswith("|"):
            in_body = False
        elif re.fullmatch(r"[|\s:-]+", line):
            in_body = True
        elif in_body:
            names = " ; ".join(re.findall(r"<!--(.*?)-->", line))
            plain = re.sub(r"<!--.*?-->|`[^`]*`", "", line)
            plain = re.sub(r"\]\([^)]*\)", "]", plain)
            yield Row(line, plain.strip("| \n").partition("|")[2], names)


def text_of(page: Path) -> str:
    """Return the Markdown of a page or of a notebook's text cells."""
    if page.suffix != ".ipynb":
        return page.read_text(encoding="utf-8")
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def read_results(folder: Path) -> dict[str, dict[str, float]]:
    """Return the values of each result file by its name."""
    return {path.name: json.loads(path.read_text(encoding="utf-8"))["values"] for path in folder.glob("*.json")}


def is_rounded(printed: str, value: float) -> bool:
    """Say if a number is the value, rounded to as many decimals as it is printed with."""
    plain = printed.replace(",", "").replace("−", "-")
    decimals = len(plain.partition(".")[2])
    return abs(float(plain) - value) <= 0.5 * 10**-decimals + 1e-9 * max(1.0, abs(value))


def find_faults(text: str, results: Mapping[str, Mapping[str, float]]) -> list[str]:
    """List the rows whose numbers are not those of the values that they name."""
    faults = []
    for row in rows_of(text):
        numbers, keys = row.numbers(), row.keys()
        if not numbers and not keys:
            continue
        where = row.line[:60]
        if len(numbers) != len(keys):
            faults.append(f"{where} …: {len(numbers)} numbers ({numbers}), and the comment names {len(keys)} values")
            continue
        for (printed, unit), (file, key) in zip(numbers, keys, strict=True):
            value = results.get(file, {}).get(key)
            scale, ending = UNITS.get(unit, (1.0, ""))
            if value is None:
                faults.append(f"{where} …: {printed} is said to be {key} of {file}, which is not stored")
            elif not key.endswith(ending):
                faults.append(f"{where} …: {printed} {unit} is said to be {key} of {file}, which has another unit")
            elif not is_rounded(printed, value * scale):
                faults.append(f"{where} …: {printed} {unit} is said to be {key} of {file}, which is {value}")
    return faults
