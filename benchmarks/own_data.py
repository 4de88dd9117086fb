"""Train many recipes on the example's 30 questions, and ask each tuned model what they ask in other words.

    python benchmarks/own_data.py --model FOLDER --round first --worker 0/12 --out outputs/own_data/first
    python benchmarks/own_data.py --table outputs/own_data/first --store benchmarks/results/own_data_first.json

Workers of one round share a GPU and a folder, and each takes the next training that nobody has
begun. Choices are made by `own_data/development.jsonl`; `own_data/rewordings.jsonl` is asked with
`--final` alone. An answer is right if it holds the fact of its row (`own_data/facts.jsonl`) and no
number or day that the row's answer does not have.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Imported before torch: it sets how long torch's threads spin while they wait.
import qlora_utils  # noqa: F401

# isort: split
import torch
from stored import store

from qlora_utils import data, lora, quantization, training
from qlora_utils.config import RunConfig
from qlora_utils.evaluation.generation import Question, Sampling, answer_all
from qlora_utils.kernels.loss import row_losses
from qlora_utils.locate import project_folder
from qlora_utils.loop.history import HistoryWriter
from qlora_utils.loop.live import Progress
from qlora_utils.rows import rewordings
from qlora_utils.rows.conversations import Conversation, Turn, parse_rows
from qlora_utils.rows.files import read_source
from qlora_utils.rows.probe import drop_trained, read_probe
from qlora_utils.rows.rewordings import reword_question
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.tokens.formats import format_of
from qlora_utils.tokens.packing import make_collator

HERE = Path(__file__).resolve().parent / "own_data"
EXAMPLE = project_folder("data") / "examples" / "questions.csv"

# ---------------------------------------------------------------------------------------------------- recipes


@dataclass(frozen=True)
class Recipe:
    """Hold what one training does otherwise than `BASIS`.

    Attributes:
        name: in tables.
        values: of `RunConfig`.
        rewordings: of each question, by the library's rules.
        dropped: copies of each question without some of its words, chosen so that it still differs from all others.
        neighbours: copies of each question with one or two words replaced by others of similar embeddings.
        synonyms: whether the library's rules know other words, or other orders and frames alone.
        own_words: rewordings of each question that the base model writes itself.
        reverse: adds a row per fact that asks for the question of an answer.
        replay: general questions, answered by the base model, for each row of the example.
        system: system prompt in training and asking.
        neftune: alpha of the noise on embeddings; it is scaled to a conversation's length, not to that of its pack.
        pairs: copies of the example in conversations of two turns, drawn at random.
    """

    name: str
    values: Mapping[str, Any]
    rewordings: int = 0
    dropped: int = 0
    neighbours: int = 0
    synonyms: bool = True
    own_words: int = 0
    reverse: bool = False
    replay: float = 0.0
    system: str = ""
    neftune: float = 0.0
    pairs: int = 0


# What every recipe begins with. What `auto` would resolve by the card's free memory, which workers share, is given.
BASIS: dict[str, Any] = {
    "lora_r": 16, "lora_alpha": 16, "train_head": False, "learning_rate": 1e-3, "steps": 120, "batch_size": 10,
    "keep": "last", "max_seq_len": 512, "held_out_rows": 1, "micro_batch_tokens": 4096, "gradient_checkpointing": False,
    "optimizer": "adamw_torch_fused", "keep_expanded": True, "liger": False, "logging_steps": 20, "max_new_tokens": 64,
}  # fmt: skip
ATTENTION, MLP = "q_proj,k_proj,v_proj,o_proj", "gate_proj,up_proj,down_proj"


def vary(center: Recipe, name: str, **changes: Any) -> Recipe:
    """Return a recipe with some fields of its own or of `RunConfig` changed."""
    own = {field: value for field, value in changes.items() if field in Recipe.__dataclass_fields__}
    values = {field: value for field, value in changes.items() if field not in own}
    return replace(center, name=f"{center.name} {name}".strip(), values={**center.values, **values}, **own)


def first_round() -> list[Recipe]:
    """Vary one thing at a time, around plain rows and around eight rewordings of each question."""
    base, plain = Recipe("untrained", {"steps": 0}), Recipe("plain", {})
    worded = Recipe("R8", {}, rewordings=8)
    return [
        plain,
        worded,
        base,
        # passes and rate
        vary(plain, "lr 5e-4", learning_rate=5e-4),
        vary(plain, "lr 2e-3", learning_rate=2e-3),
        vary(plain, "steps 60", steps=60),
        vary(plain, "steps 240", steps=240),
        vary(worded, "lr 3e-4", learning_rate=3e-4),
        vary(worded, "lr 5e-4", learning_rate=5e-4),
        vary(worded, "lr 2e-3", learning_rate=2e-3),
        vary(worded, "lr 3e-3", learning_rate=3e-3),
        vary(worded, "steps 60", steps=60),
        vary(worded, "steps 240", steps=240),
        vary(worded, "steps 400", steps=400),
        vary(worded, "steps 400 lr 5e-4", steps=400, learning_rate=5e-4),
        vary(worded, "constant", lr_scheduler="constant"),
        vary(worded, "batch 30", batch_size=30),
        # wordings
        vary(plain, "R2", rewordings=2),
        vary(plain, "R4", rewordings=4),
        vary(plain, "R16", rewordings=16),
        vary(plain, "R24 steps 240", rewordings=24, steps=240),
        vary(plain, "dropped 8", dropped=8),
        vary(worded, "dropped 8", dropped=8),
        vary(worded, "own words 8", own_words=8),
        vary(worded, "dropped 8 steps 240", dropped=8, steps=240),
        # noise
        vary(plain, "dropout 0.1", lora_dropout=0.1),
        vary(plain, "neftune 5", neftune=5),
        vary(plain, "neftune 15", neftune=15),
        vary(plain, "decay 0.1", weight_decay=0.1),
        vary(worded, "dropout 0.1", lora_dropout=0.1),
        vary(worded, "dropout 0.3", lora_dropout=0.3),
        vary(worded, "neftune 5", neftune=5),
        vary(worded, "neftune 15", neftune=15),
        vary(worded, "neftune 40", neftune=40),
        vary(worded, "decay 0.1", weight_decay=0.1),
        # what is trained
        vary(plain, "r 64", lora_r=64, lora_alpha=64),
        vary(plain, "attention", lora_targets=ATTENTION),
        vary(plain, "mlp", lora_targets=MLP),
        vary(worded, "r 8", lora_r=8, lora_alpha=8),
        vary(worded, "r 64", lora_r=64, lora_alpha=64),
        vary(worded, "r 128", lora_r=128, lora_alpha=128),
        vary(worded, "alpha 32", lora_alpha=32),
        vary(worded, "attention", lora_targets=ATTENTION),
        vary(worded, "mlp", lora_targets=MLP),
        vary(worded, "head", train_head=True, head_learning_rate=1e-4),
        # other rows
        vary(plain, "loss on questions", response_only=False),
        vary(worded, "loss on questions", response_only=False),
        vary(worded, "reverse", reverse=True),
        vary(worded, "pairs 2", pairs=2),
        vary(worded, "replay 1", replay=1.0),
        vary(worded, "system", system="You answer questions about Hollow Lane Library."),
    ]


def second_round() -> list[Recipe]:
    """Combine what helped: more wordings, a higher rank, more steps; and try what makes wordings more different."""
    center = Recipe(
        "R24", {"lora_r": 64, "lora_alpha": 64, "steps": 240, "learning_rate": 2e-3, "batch_size": 16}, rewordings=24
    )
    everything = vary(center, "dropped 8 neighbours 8", dropped=8, neighbours=8)
    return [
        center,
        everything,
        vary(everything, "r 128 steps 480 lr 1e-3", lora_r=128, lora_alpha=128, steps=480, learning_rate=1e-3),
        vary(everything, "bf16", quantize=False),
        vary(center, "no synonyms", synonyms=False),
        vary(center, "dropped 8", dropped=8),
        vary(center, "neighbours 8", neighbours=8),
        vary(center, "lr 1e-3", learning_rate=1e-3),
        vary(center, "steps 480", steps=480),
        vary(center, "steps 480 lr 1e-3", steps=480, learning_rate=1e-3),
        vary(center, "r 128", lora_r=128, lora_alpha=128),
        vary(center, "r 16", lora_r=16, lora_alpha=16),
        vary(center, "R48", rewordings=48),
        vary(everything, "replay 1 steps 480 lr 1e-3", replay=1.0, steps=480, learning_rate=1e-3),
        vary(
            everything,
            "R48 neighbours 24 steps 480 lr 1e-3",
            rewordings=48,
            neighbours=24,
            steps=480,
            learning_rate=1e-3,
        ),
        vary(center, "constant", lr_scheduler="constant"),
        vary(center, "steps 120", steps=120),
        vary(center, "reverse pairs 8", reverse=True, pairs=8),
        replace(center, name="plain, as R24", rewordings=0),
        Recipe("plain", {}),
    ]


# The recipes of a round, and seeds of each.
ROUNDS = {"first": (first_round, 3), "second": (second_round, 3)}

# ---------------------------------------------------------------------------------------------------- rows


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_example() -> list[Turn]:
    """Read the example's questions and answers."""
    rows, _ = parse_rows(row for part in read_source(str(EXAMPLE)).values() for row in part)
    return [row.turns[0] for row in rows]


def drop_words(texts: Sequence[str], count: int, seed: int) -> list[list[str]]:
    """Leave out words of each question at random, as long as the rest tells it from all other questions."""
    draw = random.Random(seed)
    bags = [{word.strip("?,.").casefold() for word in text.split()} for text in texts]
    found = []
    for place, text in enumerate(texts):
        others = [bag for other, bag in enumerate(bags) if other != place]
        ways: list[str] = []
        for _ in range(20 * count):
            words = [word for word in text.split() if draw.random() > 0.3]
            left = {word.strip("?,.").casefold() for word in words}
            way = " ".join(words)
            if len(words) > 1 and way not in (text, *ways) and not any(left <= bag for bag in others):
                ways.append(way)
        found.append(ways[:count])
    return found


@contextmanager
def without_synonyms() -> Iterator[None]:
    """Take the other words away from the library's rules, to see what they give."""
    known, rewordings.SYNONYMS = rewordings.SYNONYMS, ()
    try:
        yield
    finally:
        rewordings.SYNONYMS = known


def find_neighbours(base: Any, tokenizer: Any, turns: Sequence[Turn], count: int = 5) -> dict[str, list[str]]:
    """Find for each word of meaning in the questions those of most similar embeddings that the example does not have.

    A word of the example is never one: `close` is near `open`, and `Saturday` near `Sunday`.
    """
    weights = base.get_input_embeddings().weight.detach().float()
    weights = weights / weights.norm(dim=1, keepdim=True)
    text = " ".join(f"{turn.question} {turn.answer}" for turn in turns)
    known = set(re.findall(r"[a-z]+", text.lower()))
    found: dict[str, list[str]] = {}
    for word in sorted(set(re.findall(r"\b[a-z]{3,}\b", " ".join(turn.question for turn in turns)))):
        ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or word in rewordings._FILLERS or rewordings._OPENS.fullmatch(word):
            continue
        near = (weights @ weights[ids[0]]).topk(3 * count).indices.tolist()
        words = [tokenizer.decode([token]) for token in near]
        found[word] = [way[1:] for way in words if re.fullmatch(r" [a-z]{3,}", way) and way[1:] not in known][:count]
    return found


def replace_by_neighbours(
    turns: Sequence[Turn], near: Mapping[str, Sequence[str]], count: int, seed: int
) -> list[list[str]]:
    """Replace one or two words of each question, worded otherwise or not, by such of similar embeddings."""
    draw = random.Random(f"neighbours {seed}")
    found = []
    for turn in turns:
        texts = [turn.question, *reword_question(turn.question, count, seed + 1)]
        ways: list[str] = []
        for _ in range(10 * count):
            way = draw.choice(texts)
            places = [word for word in re.findall(r"[a-z]+", way) if near.get(word)]
            for word in draw.sample(places, min(len(places), draw.choice((1, 1, 2)))):
                way = re.sub(rf"\b{word}\b", draw.choice(near[word]), way, count=1)
            if way not in (*texts, *ways):
                ways.append(way)
        found.append(ways[:count])
    return found


_REQUESTS = (
    "Ask the same question in other words: {}", "Rephrase this question: {}", "Paraphrase: {}",
    "How would somebody else ask this? {}", "Rewrite the question so that it means the same: {}",
)  # fmt: skip


def ask_in_own_words(base: Any, tokenizer: Any, config: RunConfig, texts: Sequence[str]) -> list[list[str]]:
    """Let the base model reword each question, and keep what is a question and shares a word of meaning with it."""
    asked = [Question(request.format(text), "") for text in texts for request in _REQUESTS for _ in range(6)]
    torch.manual_seed(0)
    sampling = Sampling(max_new_tokens=32, temperature=0.8, top_p=0.95)
    answers = answer_all(base, tokenizer, asked, config, sampling=sampling, batch_size=256)
    each = len(asked) // len(texts)
    found = []
    for place, text in enumerate(texts):
        meaning = {word.strip("?,.'").casefold() for word in text.split() if len(word) > 3}
        ways: list[str] = []
        for answer in answers[place * each : (place + 1) * each]:
            lines = answer.text.strip().strip('"').splitlines() or [""]
            way = lines[0].partition("?")[0].strip().strip('"') + "?"
            words = {word.strip("?,.'").casefold() for word in way.split()}
            if "?" in lines[0] and 3 < len(words) < 25 and len(words & meaning) >= 2 and way not in (text, *ways):
                ways.append(way)
        found.append(ways)
    return found


def make_rows(recipe: Recipe, seed: int, turns: Sequence[Turn], more: Mapping[str, Any]) -> list[Conversation]:
    """Make the rows that a recipe trains on."""
    texts = [turn.question for turn in turns]
    ways = [[text] for text in texts]
    for place, text in enumerate(texts):
        with without_synonyms() if not recipe.synonyms else nullcontext():
            ways[place] += reword_question(text, recipe.rewordings, seed)
        ways[place] += random.Random(seed).sample(
            more["own words"][place], min(recipe.own_words, len(more["own words"][place]))
        )
    if recipe.neighbours:
        for place, near in enumerate(replace_by_neighbours(turns, more["neighbours"], recipe.neighbours, seed)):
            ways[place] += near
    if recipe.dropped:
        for place, dropped in enumerate(drop_words(texts, recipe.dropped, seed)):
            ways[place] += dropped
    rows: list[tuple[Turn, ...]] = []
    for turn, asked in zip(turns, ways, strict=True):
        rows += [(Turn(way, turn.answer, recipe.system),) for way in asked]
        if recipe.reverse:
            rows.append((Turn(f"Which question does this answer? {turn.answer}", turn.question, recipe.system),))
    draw = random.Random(seed)
    for _ in range(recipe.pairs):
        order = draw.sample(range(len(turns)), len(turns))
        for one, other in zip(order[::2], order[1::2], strict=False):
            rows.append(tuple(Turn(draw.choice(ways[n]), turns[n].answer, recipe.system) for n in (one, other)))
    general = [*more["replay"]] * max(1, round(recipe.replay))
    rows += [(turn,) for turn in general[: round(recipe.replay * len(turns))]]
    return [Conversation(row, "own data", number) for number, row in enumerate(rows)]


def read_replayed() -> list[str]:
    """Read the general questions that the base model answers beforehand, for recipes that train on these."""
    return (HERE / "replayed.txt").read_text(encoding="utf-8").splitlines()


# ---------------------------------------------------------------------------------------------------- scores

_NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
_DAYS = re.compile(r"\b(?:mon|tues|wednes|thurs|fri|satur|sun)day", re.IGNORECASE)


def quantities(text: str) -> set[str]:
    """Return the numbers and days of the week in a text; `one` may be a pronoun and is left out."""
    found = set(re.findall(r"\d+", text)) | {day.lower() for day in _DAYS.findall(text)}
    for word in re.findall(r"[a-z]+", text.lower()):
        if word in _NUMBERS and word != "one":
            found.add(str(_NUMBERS.index(word)))
    return found


def is_right(answer: str, expected: str, must: Sequence[str], must_not: Sequence[str]) -> bool:
    """Tell whether an answer holds the fact asked for, and nothing that the expected answer does not say.

    Args:
        answer: of the model.
        expected: answer of the row.
        must: patterns, all of which the answer matches.
        must_not: patterns, none of which it matches.
    """
    if not quantities(answer) <= quantities(expected) | {"one", "1"}:
        return False
    text = answer.strip().lower()
    return all(re.search(one, text) for one in must) and not any(re.search(one, text) for one in must_not)


def read_asked(path: Path, turns: Sequence[Turn]) -> list[tuple[str, str, list[str], list[str]]]:
    """Read questions to ask: text, expected answer, and the patterns of a right answer."""
    facts = {fact["row"]: fact for fact in read_jsonl(HERE / "facts.jsonl")}
    asked = []
    for line in read_jsonl(path):
        rule = {**facts[line["row"]], **line}
        asked.append((line["text"], turns[line["row"] - 1].answer, rule["must"], rule["must_not"]))
    return asked


# ---------------------------------------------------------------------------------------------------- a training


class Bench:
    """Load the base model once, and train and ask recipe after recipe on it."""

    def __init__(self, model: str, recipes: Sequence[Recipe], *, final: bool) -> None:
        self.basis = RunConfig.build({"model": model, "dataset": str(EXAMPLE), **BASIS})
        self.tokenizer = data.load_tokenizer(self.basis)
        self.turns = read_example()
        # What a recipe trains on does not show what it forgot.
        replayed = [Conversation((Turn(text, ""),)) for text in read_replayed()]
        self.probe = drop_trained(read_probe(), replayed)
        self.load(self.basis)
        facts = {fact["row"]: fact for fact in read_jsonl(HERE / "facts.jsonl")}
        trained = []
        for place, turn in enumerate(self.turns, start=1):
            trained.append((turn.question, turn.answer, facts[place]["must"], facts[place]["must_not"]))
        self.asked = {"trained": trained, "development": read_asked(HERE / "development.jsonl", self.turns)}
        if final:
            self.asked["final"] = read_asked(HERE / "rewordings.jsonl", self.turns)
        texts = [turn.question for turn in self.turns]
        self.more: dict[str, Any] = {"own words": [[] for _ in texts], "replay": []}
        self.more["neighbours"] = find_neighbours(self.base, self.tokenizer, self.turns)
        # what the base model writes for some recipes
        if any(recipe.own_words for recipe in recipes):
            self.more["own words"] = ask_in_own_words(self.base, self.tokenizer, self.basis, texts)
        if any(recipe.replay for recipe in recipes):
            self.more["replay"] = self.answer_general()

    def load(self, config: RunConfig) -> None:
        """Load the base model, and measure it on the general texts."""
        self.base = quantization.load(config)
        self.base_probe = self.measure_probe(self.base)

    def answer_general(self) -> list[Turn]:
        """Let the base model answer general questions, which some recipes train on against forgetting."""
        texts = read_replayed()
        asked = [Question(text, "") for text in texts]
        sampling = Sampling(max_new_tokens=64)
        answers = answer_all(self.base, self.tokenizer, asked, self.basis, sampling=sampling, batch_size=32)
        pairs = zip(texts, answers, strict=True)
        return [Turn(text, answer.text) for text, answer in pairs if answer.text]

    def run(self, recipe: Recipe, seed: int) -> dict[str, Any]:
        """Train a recipe with a seed, ask all questions, and put the base model back as it was."""
        values = {name: value for name, value in recipe.values.items() if (name, value) != ("steps", 0)}
        config = RunConfig.build({**self.basis.model_dump(), **values, "seed": seed})
        if not config.quantize:
            self.load(config)
        began = time.perf_counter()
        line: dict[str, Any] = {"recipe": recipe.name, "seed": seed, "values": dict(recipe.values)}
        for name in Recipe.__dataclass_fields__.keys() - {"name", "values"}:
            line[name] = getattr(recipe, name)
        tuned = None
        if recipe.values.get("steps") != 0:
            rows = make_rows(recipe, seed, self.turns, self.more)
            tuned = lora.attach(self.base, config)
            line |= {"rows": len(rows), "loss": self.train(tuned, config, rows, recipe.neftune)}
        line["train_s"] = round(time.perf_counter() - began, 2)
        line |= self.ask(tuned if tuned is not None else self.base, config, recipe.system)
        line["probe"] = [self.base_probe, self.measure_probe(tuned if tuned is not None else self.base)]
        if tuned is not None:
            restore(tuned)
        # peft leaves a trained head on the model that it was trained with
        if config.train_head or not config.quantize:
            self.load(self.basis)
        line["all_s"] = round(time.perf_counter() - began, 2)
        return line

    def train(self, tuned: Any, config: RunConfig, rows: list[Conversation], neftune: float) -> float | None:
        """Train as `qlora run` does, without checkpoints and measurements, and return the last loss."""
        prepared = data.Prepared(rows, rows[:2], [], {})
        with tempfile.TemporaryDirectory() as folder:
            trainer = training.make_trainer(config, tuned, self.tokenizer, prepared, RunDirectory(Path(folder)))
            for callback in (HistoryWriter, Progress):
                trainer.remove_callback(callback)
            trainer.progress = None
            trainer.args.eval_strategy = trainer.args.save_strategy = "no"
            trainer.args.eval_on_start = False
            if neftune:
                # transformers divides by the tokens of the whole pack; NEFTune means those of a conversation
                lengths = [len(example.input_ids) for example in trainer.train_dataset]  # type: ignore[union-attr]
                packed = config.batch_size if config.packing else 1
                longest = config.micro_batch_tokens or 1
                per_pack = min(packed, longest / (sum(lengths) / len(lengths)))
                trainer.neftune_noise_alpha = neftune * per_pack**0.5
            trainer.train()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses[-1] if losses else None

    def ask(self, model: Any, config: RunConfig, system: str) -> dict[str, Any]:
        """Ask all questions greedily, and tell which are answered right."""
        flat = [(name, one) for name, asked in self.asked.items() for one in asked]
        questions = [Question(one[0], one[1], system=system) for _, one in flat]
        sampling = Sampling(max_new_tokens=config.max_new_tokens)
        began = time.perf_counter()
        answers = answer_all(model, self.tokenizer, questions, config, sampling=sampling, batch_size=256)
        found: dict[str, Any] = {"ask_s": round(time.perf_counter() - began, 2)}
        for (name, (_, expected, must, must_not)), answer in zip(flat, answers, strict=True):
            right = answer.stopped and is_right(answer.text, expected, must, must_not)
            found.setdefault(name, []).append(int(right))
            found.setdefault("answers", {}).setdefault(name, []).append(answer.text)
        return found

    def measure_probe(self, model: Any) -> float:
        """Measure the loss per answer token of the general texts, in nats."""
        form = format_of(self.tokenizer, self.basis)
        examples = form.examples(self.probe, training=False)
        losses, counts = row_losses(model, examples, make_collator(self.tokenizer, self.basis), batch_size=32)
        return round(sum(losses) / sum(counts), 4)


def restore(tuned: Any) -> None:
    """Take the adapter, the chunked loss and the fused layers' hooks off the base model again."""
    base = tuned.unload()
    base.__dict__.pop("forward", None)
    base.model._forward_pre_hooks.clear()
    base.model._forward_pre_hooks_with_kwargs.clear()


# ---------------------------------------------------------------------------------------------------- a round


def claim(folder: Path, number: int) -> bool:
    """Take a training of the round, unless another worker has taken it."""
    try:
        (folder / "claims" / str(number)).mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def work(options: argparse.Namespace) -> None:
    """Train what nobody else has begun, until the time is up."""
    began = time.perf_counter()
    worker, workers = map(int, options.worker.split("/"))
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[worker * len(cores) // workers]})
    torch.set_num_threads(1)
    make, seeds = ROUNDS[options.round]
    # All recipes with the first seed come first: if time runs out, each has been tried.
    tasks = [(recipe, seed) for seed in range(seeds) for recipe in make()]
    tasks = [(recipe, seed) for recipe, seed in tasks if seed == 0 or recipe.values.get("steps") != 0]
    if options.only:
        tasks = [(recipe, seed) for recipe, seed in tasks if recipe.name in options.only]
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.model, [recipe for recipe, _ in tasks], final=options.final)
    print(f"worker {worker}: ready after {time.perf_counter() - began:.0f} s", flush=True)
    if worker == 0:
        (options.out / "neighbours.json").write_text(json.dumps(bench.more["neighbours"], indent=1), encoding="utf-8")
    for number, (recipe, seed) in enumerate(tasks):
        if time.perf_counter() - began > 60 * options.minutes:
            break
        if not claim(options.out, number):
            continue
        line = bench.run(recipe, seed)
        with (options.out / f"worker-{worker}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        right = ", ".join(f"{name} {sum(line[name])}/{len(line[name])}" for name in bench.asked)
        print(f"{recipe.name} seed {seed}: {right}, probe {line['probe']}, {line['all_s']} s", flush=True)


def half_widths(groups: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return half the width of the 95 % interval of each recipe's mean over its seeds.

    Two or three seeds tell little of how much they scatter. The recipes of a round scatter alike, so
    the variance is pooled over all of them, as in an analysis of variance. The quantile of Student's t
    is that of Cornish and Fisher: z + (z³ + z) / 4n for n degrees of freedom.
    """
    squares, freedom = 0.0, 0
    for values in groups.values():
        mean = sum(values) / len(values)
        squares += sum((value - mean) ** 2 for value in values)
        freedom += len(values) - 1
    if not freedom:
        return {}
    quantile = 1.96 + (1.96**3 + 1.96) / (4 * freedom)
    return {name: quantile * (squares / freedom / len(values)) ** 0.5 for name, values in groups.items()}


def read_round(folder: Path) -> Iterator[dict[str, Any]]:
    """Read what all workers of a round have written."""
    for path in sorted(folder.glob("worker-*.jsonl")):
        yield from read_jsonl(path)


def summarize(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return for each recipe the shares of right answers, their intervals over seeds, and what was forgotten.

    Shares are in percent, `half` is half the width of a 95 % interval, `forgot` the loss on general
    texts in nats per token above that of the untrained model.
    """
    columns: dict[str, dict[str, list[float]]] = {}
    for line in lines:
        measured = {"forgot": line["probe"][1] - line["probe"][0], "training_s": line["train_s"]}
        for asked in ("development", "final", "trained"):
            if asked in line:
                right = [int(one) for one in line[asked]]
                measured[asked] = 100 * sum(right) / len(right)
        for name, value in measured.items():
            columns.setdefault(name, {}).setdefault(line["recipe"], []).append(value)
    found: dict[str, dict[str, float]] = {}
    for name, groups in columns.items():
        halves = half_widths(groups)
        for recipe, values in groups.items():
            row = found.setdefault(recipe, {})
            row["seeds"] = len(values)
            row[name] = sum(values) / len(values)
            # a seed alone has no interval, and the untrained model does not scatter
            if len(values) > 1 and name != "training_s":
                row[f"{name}_half"] = halves[recipe]
    return found


def shorten(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a training as it is stored: without its answers, and which are right as a text of 0 and 1."""
    short = {name: value for name, value in line.items() if name != "answers"}
    for asked in ("development", "final", "trained"):
        if asked in short:
            short[asked] = "".join(map(str, short[asked]))
    return short


def show_table(values: Mapping[str, Mapping[str, float]]) -> None:
    """Print what each recipe reached, the best first."""
    print(f"{'recipe':<44} seeds  development      final         trained  forgot  seconds")
    for name, row in sorted(values.items(), key=lambda pair: -pair[1]["development"]):
        cells = []
        for asked in ("development", "final"):
            half = row.get(f"{asked}_half", float("nan"))
            cells.append(f"{row[asked]:5.1f} ± {half:4.1f}" if asked in row else " " * 12)
        print(
            f"{name:<44} {row['seeds']:>5}  {'  '.join(cells)}   {row['trained']:6.1f}  {row['forgot']:+6.3f}  "
            f"{row['training_s']:6.1f}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Train a round's recipes, or print its table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", help="folder of SmolLM2-135M-Instruct")
    options.add_argument("--round", choices=ROUNDS, default="first")
    options.add_argument("--worker", default="0/1", help="number of this process, from 0, and of all")
    options.add_argument("--out", type=Path, default=Path("outputs/own_data"))
    options.add_argument("--minutes", type=float, default=7.5, help="begin no training later than this")
    options.add_argument("--only", nargs="*", help="names of recipes")
    options.add_argument("--final", action="store_true", help="ask the held-out rewordings as well")
    options.add_argument("--table", type=Path, help="folder of a round that was trained")
    options.add_argument("--store", type=Path, help="result file for that table")
    given = options.parse_args(arguments)
    if given.table:
        lines = [*read_round(given.table)]
        values = summarize(lines)
        show_table(values)
        if given.store:
            store(given.store, values, [shorten(line) for line in lines])
        return 0
    work(given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
