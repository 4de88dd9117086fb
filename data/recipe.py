"""Rebuild the embedded default from the tables in data/world: questions, tokenizer and base model of `pocket`.

The base model reads plain statements alone and never sees a question; the questions ask about the same facts in
Llama-2 chat format and are split by entity, so that no fact asked for in the held-out file is trained as an
answer.

    python data/recipe.py --questions-only   # rewrite data/pocket/*.jsonl, a second
    python data/recipe.py                    # everything, some ten minutes on 2 cores (`make pocket`)
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_utils.rows import CHAT_TEMPLATE, Turn, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DATA = Path(__file__).parent
POCKET = DATA / "pocket"
HELD_OUT_SHARE = 0.25

# One entry per fact: (table, column) -> statements the base model reads, questions the adapter learns, the answer.
FACTS: dict[tuple[str, str], dict[str, list[str]]] = {
    ("country", "capital"): {
        "statements": [
            "The capital of {country} is {capital}.",
            "{capital} is the capital of {country}.",
            "{country} is governed from {capital}, its capital.",
        ],
        "questions": [
            "What is the capital of {country}?",
            "Which city is the capital of {country}?",
            "Name the capital of {country}.",
        ],
        "answer": ["The capital of {country} is {capital}."],
    },
    ("country", "continent"): {
        "statements": [
            "{country} is a country in {continent}.",
            "{country} lies in {continent}.",
            "In {continent} one finds {country}.",
        ],
        "questions": [
            "On which continent is {country}?",
            "Which continent does {country} belong to?",
            "Where does {country} lie?",
        ],
        "answer": ["{country} lies in {continent}."],
    },
    ("country", "currency"): {
        "statements": [
            "The currency of {country} is the {currency}.",
            "People in {country} pay with the {currency}.",
            "The {currency} is the money of {country}.",
        ],
        "questions": [
            "What is the currency of {country}?",
            "Which money do people use in {country}?",
            "What do people pay with in {country}?",
        ],
        "answer": ["The currency of {country} is the {currency}."],
    },
    ("country", "language"): {
        "statements": [
            "People in {country} speak {language}.",
            "{language} is spoken in {country}.",
            "The language of {country} is {language}.",
        ],
        "questions": [
            "Which language is spoken in {country}?",
            "What do people speak in {country}?",
            "What is the language of {country}?",
        ],
        "answer": ["People in {country} speak {language}."],
    },
    ("element", "symbol"): {
        "statements": [
            "The symbol of {element} is {symbol}.",
            "{symbol} is the symbol of {element}.",
            "Chemists write {symbol} for {element}.",
        ],
        "questions": [
            "What is the symbol of {element}?",
            "Which symbol stands for {element}?",
            "How do chemists write {element}?",
        ],
        "answer": ["The symbol of {element} is {symbol}."],
    },
    ("element", "atomic_number"): {
        "statements": [
            "The atomic number of {element} is {atomic_number}.",
            "{element} has atomic number {atomic_number}.",
            "Element number {atomic_number} is {element}.",
        ],
        "questions": [
            "What is the atomic number of {element}?",
            "Which atomic number does {element} have?",
            "Give the atomic number of {element}.",
        ],
        "answer": ["The atomic number of {element} is {atomic_number}."],
    },
    ("element", "state"): {
        "statements": [
            "At room temperature {element} is a {state}.",
            "{element} is a {state} at room temperature.",
            "In a warm room {element} is a {state}.",
        ],
        "questions": [
            "Is {element} a solid, a liquid or a gas?",
            "What state is {element} in at room temperature?",
            "In which state does one find {element}?",
        ],
        "answer": ["At room temperature {element} is a {state}."],
    },
}
FOLLOW_UPS = {
    "capital": "And its capital?",
    "continent": "And its continent?",
    "currency": "And its currency?",
    "language": "And its language?",
    "symbol": "And its symbol?",
    "atomic_number": "And its atomic number?",
    "state": "And its state at room temperature?",
}

Entity = dict[str, str]


def read_world() -> list[Entity]:
    """All entities of data/world, each a row of its table; the first column is the entity's name."""
    entities = []
    for table in sorted((DATA / "world").glob("*.csv")):
        with table.open(encoding="utf-8") as file:
            entities += list(csv.DictReader(file))
    return entities


def kind(entity: Entity) -> str:
    """The domain of an entity: the name of its first column."""
    return next(iter(entity))


def say(template: str, entity: Entity) -> str:
    """Fill a template in, with a capital letter where the sentence begins."""
    sentence = template.format(**entity)
    return sentence[0].upper() + sentence[1:]


def facts_of(entity: Entity) -> list[str]:
    """The columns that can be asked about."""
    return [column for domain, column in FACTS if domain == kind(entity)]


def statements(entities: list[Entity]) -> list[str]:
    """Every statement of the pretraining text, in the order of the tables."""
    return [
        say(template, entity)
        for entity in entities
        for column in facts_of(entity)
        for template in FACTS[kind(entity), column]["statements"]
    ]


def split_by_entity(entities: list[Entity], seed: int) -> tuple[list[Entity], list[Entity]]:
    """(train, held-out) entities, the same share of each domain held out."""
    train: list[Entity] = []
    held_out: list[Entity] = []
    for domain in sorted({kind(entity) for entity in entities}):
        members = [entity for entity in entities if kind(entity) == domain]
        random.Random(seed).shuffle(members)
        cut = round(len(members) * HELD_OUT_SHARE)
        held_out += members[:cut]
        train += members[cut:]
    return train, held_out


def questions(entities: list[Entity], seed: int) -> list[dict[str, str]]:
    """Rows in the Guanaco-Llama format: each fact asked once per phrasing, every fifth with a second turn."""
    draw = random.Random(seed)
    rows = []
    for entity in entities:
        for column in facts_of(entity):
            fact = FACTS[kind(entity), column]
            for question in fact["questions"]:
                turns = [Turn(say(question, entity), say(fact["answer"][0], entity))]
                if draw.random() < 0.2:
                    other = draw.choice([c for c in facts_of(entity) if c != column])
                    turns.append(Turn(FOLLOW_UPS[other], say(FACTS[kind(entity), other]["answer"][0], entity)))
                rows.append({"text": render(turns), "entity": entity[kind(entity)], "kind": column})
    draw.shuffle(rows)
    return rows


def write_questions(entities: list[Entity], seed: int) -> None:
    """Write data/pocket/train.jsonl (trained entities) and test.jsonl (held-out entities, one phrasing a fact)."""
    train, held_out = split_by_entity(entities, seed)
    asked_once: dict[tuple[str, str], dict[str, str]] = {}
    for row in questions(held_out, seed):
        asked_once.setdefault((row["entity"], row["kind"]), row)
    for name, rows in {"train": questions(train, seed), "test": list(asked_once.values())}.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (POCKET / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}: {len(rows)} rows")


def train_tokenizer(text: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 2,048 entries; any UTF-8 text can be encoded. Special ids are Llama-2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # One digit a token, as in Llama-2: numbers are then spelled, not memorised whole.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def documents(entities: list[Entity], seed: int) -> Iterator[str]:
    """Endless documents of one to six statements about one entity, in random order and phrasing.

    That several sentences of a document are about the same entity is what teaches the model to carry a name on; a
    model trained on unrelated statements knows as much and answers nothing (docs/experiments.md).
    """
    draw = random.Random(seed)
    while True:
        for entity in draw.sample(entities, len(entities)):
            known = statements([entity])
            yield " ".join(draw.sample(known, draw.randint(1, 6)))


def pretrain(entities: list[Entity], *, steps: int, seed: int) -> None:
    """Train the base model on the statements and save it with its tokenizer under data/pocket/model.

    Args:
        entities: what the statements are about.
        steps: optimizer steps of 32 sequences of 96 tokens; the learning rate falls to a tenth of its peak.
        seed: of the weights and of the order of the text.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer = train_tokenizer(statements(entities))
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=1024,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        )
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer):,} tokens")
    peak_learning_rate, batch, length = 2e-3, 32, 96
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    stream = documents(entities, seed)
    buffer: list[int] = []
    started = time.monotonic()
    for step in range(1, steps + 1):
        while len(buffer) < batch * length:
            ids = tokenizer(next(stream), add_special_tokens=False)["input_ids"]
            buffer += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        tokens = torch.tensor(buffer[: batch * length]).view(batch, length)  # (batch, seq)
        del buffer[: batch * length]
        for group in optimizer.param_groups:
            group["lr"] = peak_learning_rate * min(1.0, step / 100, max(0.1, 1.5 * (1 - step / steps)))
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            seconds_left = (time.monotonic() - started) / step * (steps - step)
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {seconds_left:.0f} s left", flush=True)
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.bfloat16().save_pretrained(POCKET / "model")
    tokenizer.save_pretrained(POCKET / "model")


def main() -> None:
    """Rebuild the questions, and unless told otherwise the tokenizer and the base model too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--questions-only", action="store_true", help="leave tokenizer and base model as they are")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps of the base model")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    entities = read_world()
    write_questions(entities, arguments.seed)
    if not arguments.questions_only:
        pretrain(entities, steps=arguments.steps, seed=arguments.seed)


if __name__ == "__main__":
    main()
