"""Questions answered by the base and the tuned model, and what the answers are worth (notebook 06).

Exact match and token F1 follow SQuAD (Rajpurkar et al., 2016, https://arxiv.org/abs/1606.05250), ROUGE-L Lin, 2004.
"""

from __future__ import annotations

import math
import random
import re
import string
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from qlora_utils.config import RunConfig
from qlora_utils.data import Collator, encode, encode_prompt, words
from qlora_utils.lora import base_alone
from qlora_utils.report import score_text
from qlora_utils.rows import Conversation, Turn
from qlora_utils.run_directory import RunDirectory, write_jsonl
from qlora_utils.training import micro_batch_size, row_losses

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODELS = ("tuned", "base")
Asker = Callable[[str, str, "Sampling", threading.Event], Iterator[str]]
SCORES = ("exact_match", "f1", "rouge_l")
MAX_LOSS = 700.0  # nats per token; its exp is the largest perplexity that a float can hold


@dataclass(frozen=True)
class Question:
    """One held-out question: the turns before it, what is asked, and the answer that the row gives."""

    text: str
    expected: str
    history: tuple[Turn, ...] = ()
    where: str = ""
    number: int = 0
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """A model's answer and whether it ended by itself, with `</s>`, or was cut off."""

    text: str
    stopped: bool


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy: always the likeliest."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0

    def generation_config(self, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
        """The same for `generate`; whatever the model's own generation_config.json says is left aside."""
        choice = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            use_cache=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **(choice if self.temperature > 0 else {"do_sample": False}),
        )


# ---------------------------------------------------------------------------------------------------- answering


def questions_of(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> list[Question]:
    """Every turn as a question with the turns before it as context; at most `score_rows`, chosen by the run's seed.

    A question that with its context is longer than `max_seq_len` is not asked: nothing of that length was trained on.
    """
    questions = []
    for conversation in conversations:
        for index, turn in enumerate(conversation.turns):
            history = conversation.turns[:index]
            if len(encode_prompt(history, turn.question, tokenizer)) <= config.max_seq_len:
                source = (conversation.where, conversation.number, conversation.tags)
                questions.append(Question(turn.question, turn.answer, history, *source))
    if len(questions) <= config.score_rows:
        return questions
    chosen = sorted(random.Random(config.seed).sample(range(len(questions)), config.score_rows))
    return [questions[index] for index in chosen]


@torch.no_grad()
def answer_all(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    sampling: Sampling,
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Answer many questions in batches of similar length, padded on the left.

    Args:
        model: base or tuned; put in eval mode.
        tokenizer: of the base model.
        questions: answered in the order given.
        sampling: how tokens are chosen and how many at most.
        batch_size: questions at a time.
        on_batch: called with the number of questions just answered, for a progress bar.
    """
    model.eval()
    prompts = [encode_prompt(question.history, question.text, tokenizer) for question in questions]
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: dict[int, Answer] = {}
    device = next(model.parameters()).device
    for start in range(0, len(by_length), batch_size):
        members = by_length[start : start + batch_size]
        longest = len(prompts[members[-1]])
        ids = [[tokenizer.pad_token_id] * (longest - len(prompts[i])) + prompts[i] for i in members]
        mask = [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in members]
        generated: Any = model.generate(  # type: ignore[operator]
            input_ids=torch.tensor(ids, device=device),  # (batch, seq)
            attention_mask=torch.tensor(mask, device=device),
            generation_config=sampling.generation_config(tokenizer),
        )
        for index, row in zip(members, generated[:, longest:].tolist(), strict=True):
            answers[index] = _as_answer(row, tokenizer)
        if on_batch is not None:
            on_batch(len(members))
    return [answers[index] for index in range(len(questions))]


def _as_answer(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Answer:
    stopped = tokenizer.eos_token_id in ids
    kept = ids[: ids.index(tokenizer.eos_token_id)] if stopped else ids
    return Answer(str(tokenizer.decode(kept, skip_special_tokens=True)).strip(), stopped)


class _Stop(StoppingCriteria):
    """Ends generation when an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """True for every row once the event is set."""
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device, dtype=torch.bool)


def stream(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    *,
    history: Sequence[Turn] = (),
    sampling: Sampling | None = None,
    stop: threading.Event | None = None,
) -> Iterator[str]:
    """Answer one question piece by piece, as the tokens come; the pieces join to the answer of `answer_all`.

    Args:
        model: base or tuned; put in eval mode.
        tokenizer: of the base model.
        question: without any marks.
        history: earlier turns.
        sampling: greedy if not given.
        stop: set it to end the answer early.

    Raises:
        Exception: whatever generation raised, in the thread of the caller.
    """
    model.eval()
    stop = stop or threading.Event()
    abandoned = threading.Event()  # not `stop`, which is the caller's and may serve the next question too
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
    prompt = torch.tensor([encode_prompt(history, question, tokenizer)], device=next(model.parameters()).device)
    failures: list[BaseException] = []

    def generate() -> None:
        try:
            with torch.no_grad():
                model.generate(  # type: ignore[operator]
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=(sampling or Sampling()).generation_config(tokenizer),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([_Stop(stop), _Stop(abandoned)]),
                )
        except BaseException as error:  # re-raised below: a thread's own traceback reaches nobody
            failures.append(error)
            streamer.end()

    worker = threading.Thread(target=generate, daemon=True)
    worker.start()
    try:
        yield from without_margins(streamer)
    finally:
        abandoned.set()
        worker.join()
    if failures:
        raise failures[0]


def without_margins(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces without the white space before the first word and after the last, where the format puts some."""
    begun, held_back = False, ""
    for piece in pieces:
        text = held_back + piece if begun else piece.lstrip()
        shown = text.rstrip()
        begun, held_back = begun or bool(shown), text[len(shown) :]
        if shown:
            yield shown


def make_asker(tuned_model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> Asker:
    """A function `(question, model, sampling, stop) -> pieces of the answer`, `model` being `base` or `tuned`.

    Both are the one loaded model, so the function must not be called twice at a time.
    """

    def ask(question: str, model: str, sampling: Sampling, stop: threading.Event) -> Iterator[str]:
        if model == "base":
            with base_alone(tuned_model):
                yield from stream(tuned_model, tokenizer, question, sampling=sampling, stop=stop)
        else:
            yield from stream(tuned_model, tokenizer, question, sampling=sampling, stop=stop)

    return ask


# ---------------------------------------------------------------------------------------------------- scores


def normalise_answer(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no English articles, single spaces."""
    bare = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(answer: str, expected: str) -> float:
    """1 if both have the same normal form, else 0."""
    return float(normalise_answer(answer) == normalise_answer(expected))


def token_f1(answer: str, expected: str) -> float:
    """Harmonic mean of precision and recall over the words of both normal forms."""
    given, wanted = normalise_answer(answer).split(), normalise_answer(expected).split()
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


def rouge_l(answer: str, expected: str) -> float:
    """F-measure of the longest common subsequence of words. Words are of any script, lower-cased, not stemmed."""
    given, wanted = words(answer.lower()), words(expected.lower())
    if not given or not wanted:
        return float(given == wanted)
    previous = [0] * (len(wanted) + 1)
    for word in given:
        current = [0]
        for index, other in enumerate(wanted):
            current.append(previous[index] + 1 if word == other else max(previous[index + 1], current[index]))
        previous = current
    return 2 * previous[-1] / (len(given) + len(wanted))


def bootstrap_interval(
    statistic: Callable[[Any], Any], size: int, *, resamples: int = 2000, seed: int = 0
) -> list[float]:
    """95 % percentile bootstrap interval (Efron, 1979).

    Args:
        statistic: takes indices of shape (resamples, size) and returns one value per resample.
        size: rows to draw from.
        resamples: draws with replacement.
        seed: of the draws.
    """
    import numpy

    if not size:
        return []
    indices = numpy.random.default_rng(seed).integers(0, size, (resamples, size))
    low, high = numpy.percentile(statistic(indices), (2.5, 97.5))
    return [round(float(low), 4), round(float(high), 4)]


def score(answers: Sequence[Answer], questions: Sequence[Question]) -> list[dict[str, Any]]:
    """Each answer with its `exact_match`, `f1` and `rouge_l`, all in [0, 1]."""
    return [
        {
            "answer": answer.text,
            "stopped": answer.stopped,
            "exact_match": exact_match(answer.text, question.expected),
            "f1": round(token_f1(answer.text, question.expected), 4),
            "rouge_l": round(rouge_l(answer.text, question.expected), 4),
        }
        for answer, question in zip(answers, questions, strict=True)
    ]


def aggregate(scored: Sequence[Mapping[str, Any]], losses: Sequence[float], counts: Sequence[int]) -> dict[str, Any]:
    """The means of one model with their 95 % intervals, under `intervals`.

    Args:
        scored: from `score`.
        losses: summed loss of each held-out row, nats (`training.row_losses`).
        counts: answer tokens of each held-out row.

    Raises:
        FloatingPointError: the losses are not numbers, or beyond any use.
    """
    import numpy

    result: dict[str, Any] = {}
    intervals: dict[str, list[float]] = {}
    for name in SCORES:
        values = numpy.array([row[name] for row in scored])
        result[name] = round(float(values.mean()), 4)
        intervals[name] = bootstrap_interval(partial(_mean_of, values), len(values))
    loss, count = numpy.array(losses), numpy.array(counts)
    mean = float(loss.sum() / count.sum())
    if not mean < MAX_LOSS:
        raise FloatingPointError(
            f"the loss on held-out answers is {mean:.4g} nats per token: the weights are broken, by a training that "
            "diverged or a compute dtype too narrow. Train again with a lower learning_rate."
        )
    result["perplexity"] = round(math.exp(mean), 4)
    intervals["perplexity"] = bootstrap_interval(
        lambda chosen: numpy.exp(loss[chosen].sum(axis=1) / count[chosen].sum(axis=1)), len(loss)
    )
    result["stopped"] = round(sum(row["stopped"] for row in scored) / len(scored), 4)
    result["intervals"] = intervals
    return result


def evaluate(
    config: RunConfig,
    tuned_model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Sequence[Conversation],
    run: RunDirectory,
    *,
    on_batch: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Ask base and tuned model the held-out questions; write `answers.jsonl` and the scores in `metrics.json`.

    Both are the one loaded model: with the adapter disabled it is the base model again, original head included.

    Returns:
        The rows of `answers.jsonl`: `text` of the question, `history`, `expected`, and `base` and `tuned` with
        answer and scores.
    """
    questions = questions_of(held_out, tokenizer, config)
    rows = encode(held_out, tokenizer, max_seq_len=config.max_seq_len)
    collator = Collator(tokenizer.pad_token_id, config.packing)
    scored: dict[str, list[dict[str, Any]]] = {}
    sections: dict[str, dict[str, Any]] = {}
    counts: list[int] = []

    def measure(name: str) -> None:
        nonlocal counts
        answers = answer_all(
            tuned_model,
            tokenizer,
            questions,
            sampling=Sampling(max_new_tokens=config.max_new_tokens),
            batch_size=config.answer_batch_size,
            on_batch=on_batch,
        )
        scored[name] = score(answers, questions)
        losses, counts = row_losses(tuned_model, rows, collator, batch_size=micro_batch_size(config, rows))
        sections[name] = aggregate(scored[name], losses, counts)

    with base_alone(tuned_model):
        measure("base")
    measure("tuned")
    lines = [
        {**asdict(question), "base": base, "tuned": tuned}
        for question, base, tuned in zip(questions, scored["base"], scored["tuned"], strict=True)
    ]
    write_jsonl(run.answers, lines)
    run.record_answers(config)
    held = {"rows": len(held_out), "questions": len(questions), "answer_tokens": sum(counts)}
    run.add_metrics(held_out=held, **sections)
    return lines


def _mean_of(values: Any, chosen: Any) -> Any:
    """Mean of each resample; `chosen` holds indices of shape (resamples, size)."""
    return values[chosen].mean(axis=1)


def score_table(metrics: Mapping[str, Any]) -> str:
    """Base and tuned scores with their intervals as lines of text."""
    lines = [f"{'':<13}{'base':>26}{'tuned':>26}"]
    for name in (*SCORES, "perplexity"):
        cells = []
        for model in ("base", "tuned"):
            low, high = (score_text(name, bound) for bound in metrics[model]["intervals"][name])
            cells.append(f"{score_text(name, metrics[model][name])} [{low}, {high}]")
        lines.append(f"{name:<13}{cells[0]:>26}{cells[1]:>26}")
    lines.append(f"{'stopped':<13}{metrics['base']['stopped']:>26.3f}{metrics['tuned']['stopped']:>26.3f}")
    return "\n".join(lines)


def side_by_side(lines: Sequence[Mapping[str, Any]], count: int = 6, *, seed: int = 0, width: int = 160) -> str:
    """Some questions with the expected, the base and the tuned answer, long ones cut to `width` characters.

    A follow-up question stands under the turn before it; `✓` marks an exact match.
    """
    shown = random.Random(seed).sample(list(lines), min(count, len(lines)))

    def cut(text: str) -> str:
        flat = " ".join(text.split())
        return flat if len(flat) <= width else flat[: width - 1] + "…"

    blocks = []
    for line in shown:
        mark = "✓" if line["tuned"]["exact_match"] else " "
        before = [cut(f"{turn['question']} → {turn['answer']}") for turn in line["history"][-1:]]
        blocks.append(
            "".join(f"  before    {text}\n" for text in before)
            + f"  question  {cut(line['text'])}\n  expected  {cut(line['expected'])}\n"
            f"  base      {cut(line['base']['answer'])}\n{mark} tuned     {cut(line['tuned']['answer'])}"
        )
    return "\n\n".join(blocks)


def plot_scores(metrics: Mapping[str, Any], ax: Axes) -> Figure:
    """Base and tuned scores as bars with their 95 % intervals."""
    for offset, model in ((-0.2, "base"), (0.2, "tuned")):
        values = [metrics[model][name] for name in SCORES]
        bounds = [metrics[model]["intervals"][name] for name in SCORES]
        below = [max(0.0, value - low) for value, (low, _) in zip(values, bounds, strict=True)]
        above = [max(0.0, high - value) for value, (_, high) in zip(values, bounds, strict=True)]
        places = [index + offset for index in range(len(SCORES))]
        ax.bar(places, values, width=0.38, yerr=[below, above], capsize=4, label=model)
    ax.set_xticks(range(len(SCORES)), ["exact match", "token F1", "ROUGE-L"])
    ax.set(ylim=(0, 1.05), ylabel="share", title="Held-out questions, with 95 % intervals")
    ax.legend(frameon=False)
    return ax.get_figure()  # type: ignore[return-value]
