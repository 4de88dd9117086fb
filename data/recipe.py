"""Rebuild the questions, tokenizer and base model of `pocket` from the tables in data/world.

The base model reads plain statements alone and never sees a question. The questions ask about the
same facts in Llama-2 chat format and are split by entity, so that no fact of a held-out question is
trained as an answer. Half of the held-out questions also use phrasings that training never uses.

    python data/recipe.py --questions-only   # rewrite data/pocket/*.jsonl, a second
    python data/recipe.py                    # everything, half an hour on 2 cores (`make pocket`)
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import random
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_utils.rows.conversations import CHAT_TEMPLATE, Turn, render
from qlora_utils.runs.provenance import hardware, versions

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

DATA = Path(__file__).parent
POCKET = DATA / "pocket"
# Share of the entities of each domain that are held out.
HELD_OUT_SHARE = 0.25
# Share of the conversations that have two turns.
TWO_TURN_SHARE = 0.4
# Share of the training questions that are typed in lower case, without a question mark.
HASTY_SHARE = 0.2
# Kinds of documents, with their shares.
SHAPES = {"facts": 0.5, "one fact in other words": 0.35, "one kind of fact": 0.15}
# Share of the entities that have a second document right after the first.
STAYING_SHARE = 0.4
# Share of the documents in which half of the sentences are in lower case.
HASTY_TEXT_SHARE = 0.5
TRAINED, ENTITIES, PHRASINGS = "trained entities", "held-out entities", "held-out phrasings"

# ---------------------------------------------------------------------------------------------------- the world


@dataclass(frozen=True)
class Kind:
    """Hold one kind of fact, a table's column, and its phrasings with `{column}` for a value."""

    name: str
    answer: str
    statements: list[str]
    questions: list[str]
    held_out_questions: list[str]
    follow_ups: list[str]
    held_out_follow_ups: list[str]


@dataclass(frozen=True)
class Entity:
    """Hold a row of a table: its name, and its values by column, the name included."""

    domain: str
    name: str
    values: dict[str, str]


@dataclass(frozen=True)
class Domain:
    """Hold one table of data/world with its phrasings."""

    name: str
    entities: list[Entity]
    kinds: list[Kind]


def read_world() -> list[Domain]:
    """Read every `<domain>.csv` of data/world with its `<domain>.toml`.

    The first column of a table names the entity.

    Raises:
        ValueError: table and phrasings do not fit together. The message names file, row or key, and
            what is expected.
    """
    domains = []
    for table in sorted((DATA / "world").glob("*.csv")):
        with table.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        words = table.with_suffix(".toml")
        if not words.is_file():
            raise ValueError(f"{table.name}: has no {words.name} beside it that puts its facts into words.")
        kinds = []
        for name, phrasings in tomllib.loads(words.read_text(encoding="utf-8")).items():
            expected = {field.name for field in fields(Kind)} - {"name"}
            if set(phrasings) != expected or not all(phrasings.values()):
                raise ValueError(f"{words.name} [{name}]: expected {', '.join(sorted(expected))}, none of them empty.")
            kinds.append(Kind(name, **phrasings))
        # Every fact has a phrasing, and every phrasing a fact.
        columns = [kind.name for kind in kinds]
        for number, row in enumerate(rows, start=2):
            if list(row)[1:] != columns or not all(row.values()):
                raise ValueError(
                    f"{table.name} line {number}: expected a name and a value each of {', '.join(columns)}."
                )
        domains.append(Domain(table.stem, [Entity(table.stem, next(iter(r.values())), r) for r in rows], kinds))
    return domains


def say(template: str, entity: Entity) -> str:
    """Fill in a template, and start the sentence with a capital letter."""
    sentence = template.format(**entity.values)
    return sentence[0].upper() + sentence[1:]


def hasty(sentence: str) -> str:
    """Return the sentence as if typed in haste: lower case, without the mark at its end."""
    return sentence.lower().rstrip(".?")


# ---------------------------------------------------------------------------------------------------- pretraining text


def statements(domain: Domain, entity: Entity) -> list[str]:
    """List all statements about one entity, in the order of the phrasings."""
    return [say(template, entity) for kind in domain.kinds for template in kind.statements]


def all_statements(world: Sequence[Domain]) -> list[str]:
    """List every statement of the pretraining text, in the order of the tables."""
    return [text for domain in world for entity in domain.entities for text in statements(domain, entity)]


def documents(world: Sequence[Domain], seed: int) -> Iterator[str]:
    """Yield endless documents, the text of the base models: joined sentences of `stories`."""
    return (" ".join(sentences) for sentences in stories(world, seed))


def stories(world: Sequence[Domain], seed: int) -> Iterator[list[str]]:
    """Yield endless lists of related statements: a model learns what appears together.

    Half of them state several facts of one entity, which teaches the model to carry a name from one
    sentence into the next. A third repeat a fact in other words, which teaches which words mean the
    same; this is what lets the tuned model distinguish questions. The rest state one kind of fact
    of several entities. An entity often has two documents in a row, so that a name is carried over
    `</s>`, as between the turns of a conversation. Some sentences are typed in haste, so that names
    are known in lower case too. The effect of each of these is measured in docs/experiments.md.
    """
    # One generator for everything: the same seed gives the same text, which a checksum tests.
    draw = random.Random(seed)
    everything = [(domain, entity) for domain in world for entity in domain.entities]
    while True:
        for domain, entity in draw.sample(everything, len(everything)):
            for _ in range(2 if draw.random() < STAYING_SHARE else 1):
                sentences = document(domain, entity, draw)
                if draw.random() < HASTY_TEXT_SHARE:
                    sentences = [hasty(text) + "." if draw.random() < 0.5 else text for text in sentences]
                yield sentences


def document(domain: Domain, entity: Entity, draw: random.Random) -> list[str]:
    """Draw the sentences of one document about an entity."""
    # Why there are three shapes: see `stories`.
    shape = draw.choices(list(SHAPES), list(SHAPES.values()))[0]
    if shape == "facts":
        return draw.sample(statements(domain, entity), draw.randint(1, 6))
    if shape == "one fact in other words":
        kinds = draw.sample(domain.kinds, draw.randint(1, 3))
        return [say(text, entity) for kind in kinds for text in draw.sample(kind.statements, draw.randint(2, 3))]
    kind = draw.choice(domain.kinds)
    others = draw.sample(domain.entities, draw.randint(1, 4))
    return [say(draw.choice(kind.statements), one) for one in (entity, *others)]


# ---------------------------------------------------------------------------------------------------- questions


def split_by_entity(domain: Domain, seed: int) -> tuple[list[Entity], list[Entity]]:
    """Split the entities of a domain into trained and held-out ones."""
    # A generator per domain: a change in one table leaves the split of the others alone.
    members = list(domain.entities)
    random.Random(f"{seed} {domain.name}").shuffle(members)
    cut = round(len(members) * HELD_OUT_SHARE)
    return members[cut:], members[:cut]


def conversation(
    domain: Domain, entity: Entity, kind: Kind, question: str, draw: random.Random, *, split: str
) -> dict[str, Any]:
    """Make a row in the Guanaco-Llama format, some with a second turn.

    `kind` and `fact` of the row have one text per turn.
    """
    asked = [(kind, say(question, entity))]
    # The follow-up question calls the entity "it", and asks for another kind of fact.
    others = [k for k in domain.kinds if k is not kind]
    if others and draw.random() < TWO_TURN_SHARE:
        other = draw.choice(others)
        asked.append((other, draw.choice(other.held_out_follow_ups if split == PHRASINGS else other.follow_ups)))
    if split == TRAINED and draw.random() < HASTY_SHARE:
        asked = [(kind, hasty(text)) for kind, text in asked]
    turns = [Turn(text, say(kind.answer, entity)) for kind, text in asked]
    return {
        "text": render(turns),
        "split": split,
        "domain": domain.name,
        "entity": entity.name,
        "kind": [kind.name for kind, _ in asked],
        "fact": [entity.values[kind.name] for kind, _ in asked],
    }


def questions(world: Sequence[Domain], seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Make the rows of training and test.

    Trained entities are asked for every fact in every training phrasing. Held-out entities are
    asked for every fact twice: in one training phrasing, and in one that is held out too.
    """
    draw = random.Random(seed)
    train, test = [], []
    for domain in world:
        trained, held_out = split_by_entity(domain, seed)
        for kind in domain.kinds:
            for entity in trained:
                train += [conversation(domain, entity, kind, text, draw, split=TRAINED) for text in kind.questions]
            for entity in held_out:
                for split, phrasings in ((ENTITIES, kind.questions), (PHRASINGS, kind.held_out_questions)):
                    test.append(conversation(domain, entity, kind, draw.choice(phrasings), draw, split=split))
    # Neighbouring rows would otherwise be about one entity.
    draw.shuffle(train)
    draw.shuffle(test)
    return train, test


def write_questions(world: Sequence[Domain], seed: int) -> None:
    """Write data/pocket/train.jsonl (trained entities) and test.jsonl (held-out entities)."""
    for name, rows in zip(("train", "test"), questions(world, seed), strict=True):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (POCKET / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}: {len(rows)} rows")


# ---------------------------------------------------------------------------------------------------- tokenizer, model


def bpe(world: Sequence[Domain], special_tokens: Sequence[str]) -> Tokenizer:
    """Train a byte-level BPE of 2,048 entries on the statements; it can encode any UTF-8 text.

    Args:
        world: source of the statements.
        special_tokens: these get the first ids.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # One token per digit, as in Llama-2, so that numbers are spelled and not memorized as a whole.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # A quarter of the statements also in lower case, as hasty questions spell them.
    text = all_statements(world)
    tokenizer.train_from_iterator([*text, *map(hasty, text[::4])], trainer)
    return tokenizer


def train_tokenizer(world: Sequence[Domain]) -> PreTrainedTokenizerFast:
    """Train `bpe` with Llama-2's special tokens and chat template."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=bpe(world, ["<unk>", "<s>", "</s>"]),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build a small Llama (RMSNorm, RoPE, SwiGLU, untied head) with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
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
    return LlamaForCausalLM(config)


def cloze(world: Sequence[Domain]) -> list[tuple[str, str]]:
    """Return for each fact the beginning of its statement, and the fact with the space before it.

    Raises:
        ValueError: an answer does not contain its fact.
    """
    gaps = []
    for domain in world:
        for kind in domain.kinds:
            before, found, _ = kind.answer.partition(f" {{{kind.name}}}")
            if not found:
                raise ValueError(f"{domain.name}.toml [{kind.name}]: the answer does not hold {{{kind.name}}}.")
            gaps += [(say(before, entity), f" {entity.values[kind.name]}") for entity in domain.entities]
    return gaps


def recall(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, gaps: Sequence[tuple[str, str]]) -> float:
    """Return the cloze accuracy: the share of facts whose every token is the likeliest next one."""
    import torch

    pairs = [
        (
            [tokenizer.bos_token_id, *tokenizer(before, add_special_tokens=False)["input_ids"]],
            tokenizer(fact, add_special_tokens=False)["input_ids"],
        )
        for before, fact in gaps
    ]
    known = 0
    for start in range(0, len(pairs), 64):
        members = pairs[start : start + 64]
        # Padded on the right, where a causal model's earlier positions don't see it.
        longest = max(len(before) + len(fact) for before, fact in members)
        ids = [before + fact + [tokenizer.pad_token_id] * (longest - len(before + fact)) for before, fact in members]
        with torch.no_grad():
            said = model(input_ids=torch.tensor(ids, device=model.device)).logits.argmax(-1).tolist()
        for row, (before, fact) in zip(said, members, strict=True):
            known += row[len(before) - 1 : len(before) + len(fact) - 1] == fact
    return known / len(pairs)


def batches(
    world: Sequence[Domain], tokenizer: PreTrainedTokenizerFast, *, rows: int, length: int, seed: int
) -> Iterator[torch.Tensor]:
    """Yield endless batches of documents laid end to end, shape `(rows, length)` tokens."""
    import torch

    stream, buffer = documents(world, seed), list[int]()
    while True:
        while len(buffer) < rows * length:
            ids = tokenizer(next(stream), add_special_tokens=False)["input_ids"]
            buffer += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        yield torch.tensor(buffer[: rows * length]).view(rows, length)
        del buffer[: rows * length]


def checksum(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def text_checksum(world: Sequence[Domain], seed: int) -> str:
    """Return the SHA-256 of all statements and of the first 2,000 documents of the text."""
    return checksum("\n".join([*all_statements(world), *islice(documents(world, seed), 2000)]))


def pretrain(world: Sequence[Domain], *, steps: int, seed: int) -> None:
    """Train the base model on the statements; save it and its tokenizer in data/pocket/model.

    `pretraining.json` beside them holds what a test compares: checksums of text and tokenizer,
    curve and recall.

    Args:
        world: source of the statements.
        steps: optimizer steps of 32 sequences of 96 tokens. After a warm-up the learning rate falls
            linearly to a tenth.
        seed: of the weights and of the order of the text.
    """
    import torch

    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = train_tokenizer(world)
    model = new_model(tokenizer)
    model.to(device)  # type: ignore[arg-type]
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer):,} tokens, {steps} steps",
        flush=True,
    )
    # A warm-up, then a linear decay (see `learn`); beta2 of 0.95 is usual in pretraining.
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    gaps = cloze(world)
    stream = (
        {"input_ids": tokens, "labels": tokens}
        for tokens in islice(batches(world, tokenizer, rows=32, length=96, seed=seed), steps)
    )
    learned = learn(
        model, optimizer, stream, steps=steps, warm_up=100, least=0.1, recall=lambda: recall(model, tokenizer, gaps)
    )
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.to(torch.device("cpu"), torch.bfloat16).save_pretrained(POCKET / "model")  # type: ignore[call-arg,arg-type]
    tokenizer.save_pretrained(POCKET / "model")
    # Measured once more, with the weights as they were rounded for saving.
    known = recall(model.float(), tokenizer, gaps)
    record(POCKET / "model", world, model, tokenizer, {"seed": seed, "steps": steps, "recall": known, **learned})


def learn(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    stream: Iterator[dict[str, torch.Tensor]],
    *,
    steps: int,
    warm_up: int,
    least: float,
    recall: Callable[[], float],
) -> dict[str, Any]:
    """Train a base model, and return the `curve` of its loss and recall, and the `seconds` it took.

    Args:
        model: on its device.
        optimizer: of its weights, with the peak learning rate.
        stream: `steps` batches.
        steps: the number of optimizer steps.
        warm_up: steps in which the learning rate climbs. It then stays until a third of all steps
            are done, and falls linearly.
        least: the final learning rate, as a share of the peak.
        recall: measured every 500 steps.
    """
    import torch

    peak = optimizer.param_groups[0]["lr"]
    curve: list[dict[str, float]] = []
    began = time.monotonic()
    for step, batch in enumerate(stream, start=1):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, step / warm_up, max(least, 1.5 * (1 - step / steps)))
        loss = model(**{name: tensor.to(model.device, non_blocking=True) for name, tensor in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps:
            # Recall takes longer than a step, so it is measured less often.
            line = {"step": step, "loss": round(loss.item(), 4)}
            if step % 500 == 0 or step == steps:
                line["recall"] = round(recall(), 4)
            curve.append(line)
            left = (time.monotonic() - began) / step * (steps - step)
            print(*(f"{name} {value}" for name, value in line.items()), f"{left:.0f} s left", sep="  ", flush=True)
    return {"seconds": round(time.monotonic() - began), "curve": curve}


def record(
    folder: Path,
    world: Sequence[Domain],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    learned: dict[str, Any],
) -> None:
    """Write `pretraining.json` beside a base model: values that a test compares, and its origin."""
    about = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "entities": sum(len(domain.entities) for domain in world),
        "facts": len(cloze(world)),
        "text_sha256": text_checksum(world, learned["seed"]),
        "tokenizer_sha256": checksum(tokenizer.backend_tokenizer.to_str()),
        "versions": versions(),
        "hardware": hardware(),
    }
    text = json.dumps({**about, **learned}, indent=1)
    (folder / "pretraining.json").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Rebuild the questions, and by default the tokenizer and the base model too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--questions-only", action="store_true", help="leave tokenizer and base model as they are")
    parser.add_argument("--steps", type=int, default=6000, help="optimizer steps of the base model")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    world = read_world()
    write_questions(world, arguments.seed)
    if not arguments.questions_only:
        pretrain(world, steps=arguments.steps, seed=arguments.seed)


if __name__ == "__main__":
    main()
