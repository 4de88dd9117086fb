"""Count what the pocket questions ask for: sentences that the base model has read, and facts that are easily guessed.

    python benchmarks/questions.py

Nothing is trained, and nobody is asked.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from stored import RESULTS, store

from qlora_utils import answers, data
from qlora_utils.config import RunConfig
from qlora_utils.locate import project_folder
from qlora_utils.rows.conversations import Conversation


def expected_sentences(rows: Iterable[Conversation]) -> list[str]:
    """List the expected answer of every turn."""
    return [turn.answer for row in rows for turn in row.turns]


def guessed_right(rows: Iterable[Conversation], guesses: dict[str, str]) -> dict[str, list[bool]]:
    """Say for every turn if the commonest fact of its kind in training is the fact that it asks for.

    Returns:
        The turns of each group: all, each kind of test, first and later ones.
    """
    groups: dict[str, list[bool]] = {}
    for row in rows:
        for turn in range(len(row.turns)):
            tags = row.tags_of(turn)
            is_right = guesses.get(f"{tags['domain']}: {tags['kind']}") == tags["fact"]
            for name in ("all", tags["split"], "later" if turn else "first"):
                groups.setdefault(name, []).append(is_right)
    return groups


def count() -> dict[str, Any]:
    """Count over all held-out questions of `pocket`, and over each kind of test and turn."""
    # The recipe that made the questions lies in data/, which is no package.
    sys.path.insert(0, str(project_folder("data")))
    import recipe

    config = RunConfig.from_preset("pocket")
    tokenizer = data.load_tokenizer(config)
    prepared = data.prepare(config, tokenizer)
    read = set(recipe.all_statements(recipe.read_world()))
    expected = expected_sentences(prepared.held_out)
    guesses = answers.commonest_facts(prepared.train)
    guessed = {}
    for name, right in guessed_right(prepared.held_out, guesses).items():
        guessed[name] = {"questions": len(right), "guess": round(sum(right) / len(right), 4)}
    in_text = sum(sentence in read for sentence in expected)
    return {"expected": len(expected), "expected_in_text": in_text, **guessed}


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, and store the counts."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=RESULTS / "questions.json")
    given = options.parse_args(arguments)
    counts = count()
    store(given.out, {"pocket": counts}, [counts])
    return 0


if __name__ == "__main__":
    sys.exit(main())
