"""Follow a column that marks each row as one to train on or to hold out, such as `split`."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qlora_utils.rows.files import HELD_OUT_WORDS
from qlora_utils.style import cut

# Columns whose truth marks a row, and what it says where it is true.
FLAGS: Mapping[str, Literal["train", "held_out"]] = {
    **dict.fromkeys(("is_train", "is_training", "in_train", "for_training"), "train"),
    **dict.fromkeys(("is_test", "is_testing", "in_test", "is_validation", "is_valid", "is_val", "is_dev"), "held_out"),
    **dict.fromkeys(
        ("is_eval", "held_out", "heldout", "holdout", "is_held_out", "is_heldout", "is_holdout"), "held_out"
    ),
}
# Columns that mean nothing else: other values in them are worth a word.
_PLAIN = ("split", "data_split", "dataset_split", "split_name", "splits", "partition", "fold")
# The columns that may mark rows; of several, the first that does is followed.
COLUMNS = (*_PLAIN, "subset", "set", "train_test", "train_test_split", "train_or_test", "usage", "phase", *FLAGS)
_HELD_OUT = {*HELD_OUT_WORDS, "tests", "testing", "tst", "evaluation", "development", "holdout"}
_TRAIN = {"train", "training", "trained", "trn"}
# `not train` does not say what the row is for.
_NEGATIONS = {"not", "non", "no", "never", "dont", "without", "except", "exclude", "excluded", "excluding"}
_TRUTHS = {"true": True, "yes": True, "y": True, "t": True, "1": True, "1.0": True,
           "false": False, "no": False, "n": False, "f": False, "0": False, "0.0": False}  # fmt: skip
# Values that are named as examples of those that mark nothing.
_EXAMPLES = 3

# `other` is a value that is neither, `blank` none at all.
Mark = Literal["train", "held_out", "other", "blank"]
_OPPOSITE: Mapping[str, Mark] = {"train": "held_out", "held_out": "train"}


def mark_of(value: Any, name: str = "split") -> Mark:
    """Return what the value of such a column says, by its words, as those of a file's name do.

    `train_sft` is `train`, `Test`, `TestSet` and `dev-other` are `held_out`, `non-train` is `other`.

    Args:
        value: of the column.
        name: one of `COLUMNS`; those of `FLAGS` are followed by their truth.
    """
    if value is None or (isinstance(value, str) and not value.strip()) or value != value:
        return "blank"
    if name in FLAGS:
        truth = _TRUTHS.get(str(value).strip().casefold())
        return "other" if truth is None else FLAGS[name] if truth else _OPPOSITE[FLAGS[name]]
    # A longer text is prose that may well mention a test.
    if not isinstance(value, str) or len(value) > 40:
        return "other"
    return _mark_of_text(value)


@functools.lru_cache(maxsize=1024)
def _mark_of_text(text: str) -> Mark:
    """Return the mark of a short text that is not blank."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text.strip()).casefold().replace("_", " ")
    joined = re.sub(r"\b(held|hold)[\s_-]*out", r"\1out", re.sub(r"n['’]t\b", " not", spaced))
    single = re.sub(r"\b(train|training|test|testing|dev|val|valid|validation|eval)(set|split|data)\b", r"\1", joined)
    words = set(re.split(r"[^a-z]+", single))
    if words & _NEGATIONS:
        return "other"
    if words & _TRAIN:
        return "train"
    return "held_out" if words & (_HELD_OUT | {"heldout", "holdout"}) else "other"


def mark_of_row(columns: Mapping[str, Any], name: str) -> Mark:
    """Return what the column `name` of a row says; of several flags, one that holds out is enough."""
    spellings = find_columns(tuple(columns))
    names = [name, *(flag for flag in spellings if name in FLAGS and flag in FLAGS)]
    marks = [mark_of(columns.get(spellings.get(one)), one) for one in names]  # type: ignore[arg-type]
    return "held_out" if "held_out" in marks else marks[0]


@dataclass
class ColumnMarks:
    """Count the marks in one column: rows of each mark, and some of the values that mark nothing."""

    counts: dict[Mark, int] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    def add(self, value: Any, mark: Mark) -> None:
        """Count the value of one row, and what it says."""
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
        self._found: list[tuple[str, ColumnMarks, Any]] = []

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
                self._found.append((name, self.marks.setdefault(name, ColumnMarks()), spelling))
        for name, marks, spelling in self._found if is_train else ():
            marks.add(columns[spelling], mark_of_row(columns, name))

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
            is_expected = name in _PLAIN or "train" in marks.counts or "held_out" in marks.counts
            if marks.others and is_expected:
                shown = ", ".join(repr(cut(value, 30)) for value in marks.others)
                text = f"values such as {shown}, which are neither train nor validation or test"
                return {"name": name, "followed": False, "marks": text}
        return None


# Most rows of a file have the same columns.
@functools.lru_cache(maxsize=256)
def find_columns(names: tuple[Any, ...]) -> Mapping[str, Any]:
    """Map each name of `COLUMNS` that is among the names of columns, in whatever spelling, to that spelling."""
    spellings = spell_names(names)
    return {name: spellings[name] for name in COLUMNS if name in spellings}


def spell_names(names: Iterable[Any]) -> dict[str, Any]:
    """Map the names of columns, in lower case and with underscores, to their spelling in the source.

    `Data Split`, `data-split` and `dataSplit` are `data_split`, unless there is a column of that name.
    """
    stripped = {name: str(name).strip().lstrip("\ufeff").strip() for name in names}
    spellings: dict[str, Any] = {}
    for name, text in stripped.items():
        spellings.setdefault(text.casefold(), name)
    for name, text in stripped.items():
        spellings.setdefault(re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[\s-]+", "_", text).casefold(), name)
    return spellings
