"""Follow a column that marks each row as one to train on or to hold out, such as `split`."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qlora_utils.rows.files import HELD_OUT_WORDS
from qlora_utils.style import cut

# The columns that may mark rows; of several, the first that does is followed.
COLUMNS = ("split", "data_split", "dataset_split", "partition", "subset", "set", "fold")
_HELD_OUT = {*HELD_OUT_WORDS, "tests", "testing", "evaluation", "development", "holdout"}
_TRAIN = {"train", "training", "trained", "trn"}
# Values that are named as examples of those that mark nothing.
_EXAMPLES = 3

# `other` is a value that is neither, `blank` none at all.
Mark = Literal["train", "held_out", "other", "blank"]


def mark_of(value: Any) -> Mark:
    """Return what the value of such a column says, by its words, as those of a file's name do.

    `train_sft` is `train`, `Test`, `validation_matched` and `dev-other` are `held_out`.
    """
    if value is None or (isinstance(value, str) and not value.strip()) or value != value:
        return "blank"
    # A longer text is prose that may well mention a test.
    if not isinstance(value, str) or len(value) > 40:
        return "other"
    return _mark_of_text(value)


@functools.lru_cache(maxsize=1024)
def _mark_of_text(text: str) -> Mark:
    """Return the mark of a short text that is not blank."""
    joined = re.sub(r"\b(held|hold)[\s_-]*out", r"\1out", text.strip().casefold().replace("_", " "))
    words = set(re.split(r"[^a-z]+", joined))
    if words & _TRAIN:
        return "train"
    return "held_out" if words & (_HELD_OUT | {"heldout", "holdout"}) else "other"


@dataclass
class ColumnMarks:
    """Count the marks in one column: rows of each mark, and some of the values that mark nothing."""

    counts: dict[Mark, int] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    def add(self, value: Any) -> None:
        """Count the value of one row."""
        mark = mark_of(value)
        self.counts[mark] = self.counts.get(mark, 0) + 1
        if mark == "other" and len(self.others) < _EXAMPLES and str(value)[:60] not in self.others:
            self.others.append(str(value)[:60])


class SplitColumns:
    """Find the column of a source that marks rows to train on and to hold out.

    Attributes:
        marks: of each column of `COLUMNS`, as rows to train on have it.
        names: of all columns, for error messages; at most about a hundred.
        has_held_out: whether files or splits are held out already, whatever their rows say.
    """

    def __init__(self) -> None:
        self.marks: dict[str, ColumnMarks] = {}
        self.names: dict[str, None] = {}
        self.has_held_out = False
        # The columns of the last row, and those of `COLUMNS` among them: most rows have the same.
        self._last: tuple[Any, ...] = ()
        self._found: list[tuple[ColumnMarks, Any]] = []

    def add(self, columns: Mapping[str, Any], *, is_train: bool) -> None:
        """Count the marks of a row.

        Args:
            columns: of the row.
            is_train: False if its file or split is held out.
        """
        if not is_train:
            self.has_held_out = True
        if (names := tuple(columns)) != self._last:
            self._last, self._found = names, []
            if len(self.names) < 100:
                self.names.update(dict.fromkeys(map(str, names)))
            for name, spelling in find_columns(names).items():
                self._found.append((self.marks.setdefault(name, ColumnMarks()), spelling))
        for marks, spelling in self._found if is_train else ():
            marks.add(columns[spelling])

    @property
    def followed(self) -> str | None:
        """Return the name of the column to follow, None if no column marks rows to hold out.

        In a column `split` one mark is enough, since a row marked `test` is never trained on. Other
        columns, such as `subset`, mostly mean something else: there rows to train on must be marked
        too, or all values must be marks. So it is where files are held out already.
        """
        for name in COLUMNS:
            counts = self.marks[name].counts if name in self.marks else {}
            is_sure = "train" in counts or "other" not in counts
            if "held_out" in counts and (is_sure or (name == "split" and not self.has_held_out)):
                return name
        return None

    def describe(self) -> dict[str, Any] | None:
        """Describe the column that is followed, or the first that is not and may be meant to be.

        Returns:
            The column's `name`, whether it is `followed`, and `marks`, what it says of how many
            rows. None where there is nothing to say.
        """
        if self.followed:
            counts = self.marks[self.followed].counts
            texts = [f"{counts.get('train', 0):,} rows to train on", f"{counts['held_out']:,} to hold out"]
            if "blank" in counts:
                texts.append(f"{counts['blank']:,} not marked, to train on")
            if "other" in counts:
                texts.append(f"{counts['other']:,} marked as neither, left out")
            return {"name": self.followed, "followed": True, "marks": ", ".join(texts)}
        for name in COLUMNS:
            marks = self.marks.get(name, ColumnMarks())
            # A subset is mostly that of a collection, and nobody expects it to be followed.
            is_expected = name not in ("subset", "set") or "train" in marks.counts or "held_out" in marks.counts
            if marks.others and is_expected:
                shown = ", ".join(repr(cut(value, 30)) for value in marks.others)
                text = f"values such as {shown}, which are neither train nor validation or test"
                return {"name": name, "followed": False, "marks": text}
        return None


# Most rows of a file have the same columns.
@functools.lru_cache(maxsize=256)
def find_columns(names: tuple[Any, ...]) -> Mapping[str, Any]:
    """Map each name of `COLUMNS` that is among the names of columns, in whatever case, to its spelling there."""
    spellings: dict[str, Any] = {}
    for name in names:
        spellings.setdefault(str(name).strip().lstrip("\ufeff").strip().casefold(), name)
    return {name: spellings[name] for name in COLUMNS if name in spellings}
