"""Questions, and what an asker says to them whole; for tests of asking."""

from __future__ import annotations

from qlora_utils.evaluation.generation import Question, Sampling
from qlora_utils.rows.conversations import Turn

QUESTIONS = [
    Question("What is the capital of Japan?", "The capital of Japan is Tokyo."),
    Question("And its currency?", "The yen.", (Turn("What is the capital of Japan?", "It is Tokyo."),)),
    Question("Hi", "Ho"),
]
GREEDY = Sampling(max_new_tokens=12)


def said_by(asker, question, **options):
    """Whole answers by model."""
    said = {}
    for piece in asker.ask(question, **{"sampling": GREEDY, **options}):
        said[piece.model] = said.get(piece.model, "") + piece.text
    return said
