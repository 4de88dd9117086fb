"""Rebuild the base model of `pocket-t5`, an encoder-decoder trained on the pocket Llama's text.

It reads statements alone and never sees a question or an instruction. One of three objectives is
drawn for each text, since span corruption alone leaves a decoder that knows facts but can't state
them in sentences (docs/experiments.md):

- span corruption (Raffel et al., 2020, https://arxiv.org/abs/1910.10683): spans of a document are
  replaced by sentinels, and the decoder writes the missing spans;
- continuation: the encoder reads the first sentences of a document, and the decoder writes the
  others, at least two, so that the base model continues a text instead of answering;
- continuation of a text with gaps: the same with spans missing from the first sentences, so that the
  encoder doesn't always read the fact.

    python data/recipe_t5.py     # eight minutes on a GPU, hours on 2 cores (`make pocket-t5`)
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from recipe import DATA, Domain, bpe, cloze, learn, read_world, record, stories

from qlora_utils.tokens.formats import Encoded
from qlora_utils.tokens.packing import PairCollator

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, T5ForConditionalGeneration

MODEL = DATA / "pocket-t5" / "model"
SENTINELS = 32
# The largest number of tokens of an encoder's input, and of a decoder's output.
LONGEST = 96
# The objectives with their weights.
OBJECTIVES = {"span corruption": 1, "continuation": 1, "continuation with gaps": 1}
# Tokens in a span, on average.
MEAN_SPAN = 3
# Shares of a document's tokens that are missing; one of them is drawn.
SPAN_SHARES = (0.15, 0.3)
GAP_SHARE = 0.25

# The encoder's input and the decoder's output.
Pair = tuple[list[int], list[int]]

# ---------------------------------------------------------------------------------------------------- objectives


def corrupt(ids: Sequence[int], share: float, sentinels: Sequence[int], draw: random.Random) -> Pair:
    """Replace spans of about `MEAN_SPAN` tokens by sentinels; return the rest and the spans.

    Each span follows its sentinel in the second list.
    A test puts the spans back into their places and gets the document again.

    Args:
        ids: tokens of a document, at least one.
        share: of the tokens that are removed, rounded to whole tokens, at least one.
        sentinels: ids to use, the first for the first span.
        draw: decides where spans start and how long they are.
    """
    missing = max(1, round(len(ids) * share))
    spans = min(max(1, round(missing / MEAN_SPAN)), len(sentinels), missing)
    # Cut the missing tokens at random into spans of at least one token.
    ends = [*sorted(draw.sample(range(1, missing), spans - 1)), missing]
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    kept = len(ids) - missing
    # The number of remaining tokens before each span.
    before = sorted(draw.randint(0, kept) for _ in range(spans))
    # Walk over the document: copy what stays, and move each span behind its sentinel.
    source: list[int] = []
    target: list[int] = []
    place = used = 0
    for sentinel, size, until in zip(sentinels, sizes, before, strict=False):
        source += [*ids[place : place + until - used], sentinel]
        place += until - used
        used = until
        target += [sentinel, *ids[place : place + size]]
        place += size
    return source + list(ids[place:]), target


def pair(sentences: Sequence[str], tokenizer: PreTrainedTokenizerFast, draw: random.Random) -> Pair:
    """Turn one story into the encoder's input and the decoder's output, both ending with `</s>`."""

    def encode(part: Sequence[str]) -> list[int]:
        return tokenizer(" ".join(part), add_special_tokens=False)["input_ids"]

    objective = draw.choices(list(OBJECTIVES), list(OBJECTIVES.values()))[0]
    sentinels = sentinel_ids(tokenizer)
    # A continuation needs a sentence to read and two to write.
    if objective == "span corruption" or len(sentences) < 3:
        source, target = corrupt(encode(sentences), draw.choice(SPAN_SHARES), sentinels, draw)
    else:
        cut = draw.randint(1, len(sentences) - 2)
        source, target = encode(sentences[:cut]), encode(sentences[cut:])
        if objective == "continuation with gaps":
            source, _ = corrupt(source, GAP_SHARE, sentinels, draw)
    # Cut at the end, with room for `</s>`.
    eos = tokenizer.eos_token_id
    return [*source[: LONGEST - 1], eos], [*target[: LONGEST - 1], eos]


def batches(
    world: Sequence[Domain], tokenizer: PreTrainedTokenizerFast, *, rows: int, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield endless batches of `rows` pairs, padded to the longest.

    A batch holds `input_ids`, `attention_mask` and `labels`.
    """
    draw = random.Random(f"objectives {seed}")
    pairs = (pair(sentences, tokenizer, draw) for sentences in stories(world, seed))
    while True:
        yield collate(list(islice(pairs, rows)), tokenizer.pad_token_id)


def collate(pairs: Sequence[Pair], pad: int) -> dict[str, torch.Tensor]:
    """Collate pairs into the tensors of a T5, with the library's own `PairCollator`."""
    batch = PairCollator(pad)([Encoded(*pair) for pair in pairs])
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}


# ---------------------------------------------------------------------------------------------------- tokenizer, model


def train_tokenizer(world: Sequence[Domain]) -> PreTrainedTokenizerFast:
    """Train the pocket Llama's BPE with T5's tokens: `<pad>`, `</s>`, `<unk>`, sentinels."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = bpe(world, ["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[f"<extra_id_{number}>" for number in range(SENTINELS)],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def sentinel_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids of `<extra_id_0>` and the sentinels after it."""
    first = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    return list(range(first, first + SENTINELS))


def new_model(tokenizer: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
    """Build a T5 v1.1 (relative attention, gated GELU, untied head), small enough to commit.

    Transformers 5 ties the head of every new T5 to the embeddings, whatever the config says. With
    its default embeddings, of standard deviation 1, such a model starts at a loss of 70 and hardly
    learns. Here the head is untied and all weights are small, so that the loss starts at the
    logarithm of the vocabulary size.
    """
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=192,
        d_kv=48,
        d_ff=512,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "shared.weight":
                parameter.normal_(0, 0.1)
            elif parameter.dim() == 2 and "relative" not in name:
                parameter.normal_(0, 0.02)
    return model


def save(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model (bf16) and tokenizer; the head is untied in `config.json`, as in Flan-T5."""
    import torch

    model.config.tie_word_embeddings = False
    model.to(torch.device("cpu"), torch.bfloat16).save_pretrained(folder)  # type: ignore[call-arg,arg-type]
    tokenizer.save_pretrained(folder)


def recall(
    model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, gaps: Sequence[tuple[str, str]]
) -> float:
    """Return the cloze accuracy, with a sentinel in place of the fact.

    That is the share of facts of which every token is the likeliest next one.
    """
    import torch

    sentinel, eos = sentinel_ids(tokenizer)[0], tokenizer.eos_token_id

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    pairs = [([*encode(before), sentinel, *encode("."), eos], [sentinel, *encode(fact)]) for before, fact in gaps]
    known = 0
    for start in range(0, len(pairs), 256):
        members = pairs[start : start + 256]
        batch = {n: tensor.to(model.device) for n, tensor in collate(members, tokenizer.pad_token_id).items()}
        with torch.no_grad():
            said = model(**batch).logits.argmax(-1).tolist()
        known += sum(row[1 : len(fact)] == fact[1:] for row, (_, fact) in zip(said, members, strict=True))
    return known / len(pairs)


def pretrain(world: Sequence[Domain], *, steps: int, seed: int, folder: Path = MODEL) -> None:
    """Train the base model, and save it with its tokenizer and `pretraining.json` in a folder.

    Args:
        world: source of the statements.
        steps: optimizer steps of 128 stories. After a warm-up the learning rate falls linearly.
        seed: of the weights and of the order of the text.
        folder: to write into.
    """
    import torch

    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = train_tokenizer(world)
    model = new_model(tokenizer)
    model.to(device)  # type: ignore[arg-type]
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer):,} tokens, {steps} steps",
        flush=True,
    )
    # No weight decay for the scales of the norms.
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.95))
    gaps = cloze(world)
    stream = islice(batches(world, tokenizer, rows=128, seed=seed), steps)
    learned = learn(
        model, optimizer, stream, steps=steps, warm_up=300, least=0.02, recall=lambda: recall(model, tokenizer, gaps)
    )
    save(model, tokenizer, folder)
    # Measured once more, with the weights as they were rounded for saving.
    known = recall(model.float(), tokenizer, gaps)
    record(folder, world, model, tokenizer, {"seed": seed, "steps": steps, "recall": known, **learned})


def main() -> None:
    """Rebuild tokenizer and base model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=6000, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=MODEL, help="folder to write (default: data/pocket-t5/model)")
    arguments = parser.parse_args()
    pretrain(read_world(), steps=arguments.steps, seed=arguments.seed, folder=arguments.out)


if __name__ == "__main__":
    main()
