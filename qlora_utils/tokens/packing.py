"""Conversations laid end to end, or pairs padded: the passes of a step and their tensors (notebooks 01 and 04)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from qlora_utils.config import RunConfig
from qlora_utils.models.shapes import architecture_of
from qlora_utils.style import BLUE, PALE, SKY, unframed
from qlora_utils.tokens.formats import IGNORED, Encoded

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase


def pack_first_fit(lengths: Sequence[int], tokens: int, conversations: int | None = None) -> list[list[int]]:
    """Put conversations into as few packs as hold them, by first-fit decreasing; the longest pack comes first.

    Args:
        lengths: tokens of each conversation.
        tokens: that a pack may hold; a conversation longer than that gets a pack of its own.
        conversations: that a pack may hold (None: any number).

    Returns:
        The packs, each the indices of its conversations.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next(
            (
                number
                for number, free in enumerate(room)
                if lengths[index] <= free and (conversations is None or len(packs[number]) < conversations)
            ),
            None,
        )
        if place is None:
            packs.append([])
            room.append(max(tokens, lengths[index]))
            place = len(packs) - 1
        packs[place].append(index)
        room[place] -= lengths[index]
    return sorted(packs, key=lambda members: -sum(lengths[i] for i in members))


def make_collator(tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> Collator | PairCollator:
    """What makes tensors of the run's examples."""
    assert isinstance(tokenizer.pad_token_id, int)
    if architecture_of(config.model) == "encoder-decoder":
        return PairCollator(tokenizer.pad_token_id)
    return Collator(tokenizer.pad_token_id, config.packing)


@dataclass(frozen=True)
class Collator:
    """Makes the tensors of one forward pass out of encoded conversations.

    With `packing` they are laid end to end in one sequence of shape (1, tokens) whose `position_ids` start again at
    0 with each conversation; there is no padding and no mask: `lengths` and `starts` tell the attention kernel where
    each begins. Otherwise they are padded on the right to (batch, seq). Either way what carries no label is marked by
    length, never by the padding token's id.
    """

    pad_token_id: int
    packing: bool

    def tokens(self, example: Encoded) -> int:
        """Tokens of an example, as a pass is bounded by them."""
        return len(example.input_ids)

    def sizes(self, example: Encoded) -> tuple[int, ...]:
        """Its lengths as they are padded."""
        return (len(example.input_ids),)

    def answer_tokens(self, example: Encoded) -> int:
        """Tokens that carry loss. Nothing predicts the first."""
        return sum(label != IGNORED for label in example.labels[1:])

    def room(self, one: dict[str, Any]) -> int:
        """Tokens of a pass, padding included."""
        return int(one["input_ids"].numel())

    def text(self, one: dict[str, Any]) -> str:
        """What lies in a pass, in words."""
        rows, width = one["input_ids"].shape
        if self.packing:
            return f"{width} tokens, conversations of {list(one['lengths'])}"
        return f"{rows} × {width} tokens, {int(one['attention_mask'].sum()) / (rows * width):.0%} not padding"

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, Any]:
        """Tensors `input_ids` and `labels`, and with them either of two sets.

        Packed: `position_ids`, `starts` (int32: where each conversation begins, and the end) and the tuple `lengths`.
        Padded: `attention_mask`. In both, `answer_positions` are the places, counted through the whole batch, whose
        next token is labelled.
        """
        import torch

        labels = [(IGNORED, *e.labels[1:]) for e in examples]
        lengths = [len(e.input_ids) for e in examples]
        longest = max(lengths)
        if self.packing:
            tensors = {
                "input_ids": torch.tensor([[i for e in examples for i in e.input_ids]]),
                "labels": torch.tensor([[label for row in labels for label in row]]),
                "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
                "starts": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
            }
        else:
            tensors = {
                "input_ids": torch.tensor([_pad(e.input_ids, self.pad_token_id, longest) for e in examples]),
                "labels": torch.tensor([_pad([*row], IGNORED, longest) for row in labels]),
                "attention_mask": torch.tensor([_pad([1] * length, 0, longest) for length in lengths]),
            }
        labelled = torch.nonzero(tensors["labels"].flatten() != IGNORED).flatten()
        return {**tensors, "answer_positions": labelled - 1, **({"lengths": tuple(lengths)} if self.packing else {})}


@dataclass(frozen=True)
class PairCollator:
    """Makes the tensors of one forward pass of an encoder-decoder.

    What the encoder reads and what the decoder writes are both padded on the right, to the longest of each, and marked
    by length. Relative positions know nothing of packs, so there are none.
    """

    pad_token_id: int
    packing = False

    def tokens(self, example: Encoded) -> int:
        """Tokens of an example, read and written."""
        return len(example.input_ids) + len(example.labels)

    def sizes(self, example: Encoded) -> tuple[int, ...]:
        """Its lengths as they are padded: read, written."""
        return len(example.input_ids), len(example.labels)

    def answer_tokens(self, example: Encoded) -> int:
        """Tokens that carry loss: all that are written."""
        return len(example.labels)

    def room(self, one: dict[str, Any]) -> int:
        """Tokens of a pass, read and written, padding included."""
        return int(one["input_ids"].numel() + one["labels"].numel())

    def text(self, one: dict[str, Any]) -> str:
        """What lies in a pass, in words."""
        (rows, read), written = one["input_ids"].shape, one["labels"].shape[1]
        held = int(one["attention_mask"].sum()) + len(one["answer_positions"])
        share = held / (rows * (read + written))
        return f"{rows} × {read} tokens read, {rows} × {written} written, {share:.0%} not padding"

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, Any]:
        """`input_ids` and `attention_mask` (batch, seq), `labels` (batch, answer) and `answer_positions`.

        The last are the places, counted through all labels, that carry loss.
        """
        import torch

        read = max(len(e.input_ids) for e in examples)
        written = max(len(e.labels) for e in examples)
        labels = torch.tensor([_pad(e.labels, IGNORED, written) for e in examples])
        return {
            "input_ids": torch.tensor([_pad(e.input_ids, self.pad_token_id, read) for e in examples]),
            "attention_mask": torch.tensor([_pad([1] * len(e.input_ids), 0, read) for e in examples]),
            "labels": labels,
            "answer_positions": torch.nonzero(labels.flatten() != IGNORED).flatten(),
        }


def _pad(values: list[int], filler: int, length: int) -> list[int]:
    return values + [filler] * (length - len(values))


@dataclass
class StepCollator:
    """Makes the forward passes of one optimizer step out of its conversations.

    How a step is cut into passes changes memory and speed, and nothing else: the loss is summed over the answer tokens
    of the whole step.

    `tokens` and `conversations` bound one pass, as in `pack_first_fit`, or, where it is padded, as in `groups`. Both
    shrink where memory runs out (`halve`); the steps stay what they are.
    """

    collator: Collator | PairCollator
    tokens: int
    conversations: int | None = None

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, Any]:
        """`passes`: what `Collator` makes of each; `tokens` and `answer_tokens` of the step, padding left out.

        And the `examples` themselves, with the `bounds` by which they were cut, in case they must be cut smaller.
        """
        lengths = [self.collator.tokens(example) for example in examples]
        members = (
            pack_first_fit(lengths, self.tokens, self.conversations)
            if self.collator.packing
            else groups([self.collator.sizes(example) for example in examples], self.tokens, self.conversations)
        )
        passes = [self.collator([examples[index] for index in group]) for group in members]
        return {
            "passes": passes,
            "tokens": sum(lengths),
            "answer_tokens": sum(self.collator.answer_tokens(example) for example in examples),
            "examples": list(examples),
            "bounds": (self.tokens, self.conversations),
        }

    def halve(self, step: dict[str, Any]) -> bool:
        """Bound passes by half of what the largest of this step holds; False if each holds one example already."""
        sizes = [self.collator.room(one) for one in step["passes"]]
        if len(step["passes"]) >= len(step["examples"]):
            return False
        self.tokens = max(1, min(self.tokens, max(sizes)) // 2)
        if self.conversations is not None:
            self.conversations = max(1, self.conversations // 2)
        return True


class LikeLengths:
    """A sampler of rows: in random groups, within which rows of like length come one after another.

    As transformers groups them (`group_by_length`), but of one seed and epoch always the same, so that a resumed
    training goes on as it would have.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def __len__(self) -> int:
        """Rows of an epoch."""
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch, a resumed one too."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """The rows of an epoch, by their index."""
        import torch
        from transformers.trainer_pt_utils import get_length_grouped_indices

        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


def groups(sizes: Sequence[tuple[int, ...]], tokens: int, examples: int | None = None) -> list[list[int]]:
    """Put examples into passes that are padded: each begins with the largest left, and takes in what is most like it.

    Args:
        sizes: of each example, one length for each of its padded dimensions: (tokens,), or (read, written).
        tokens: that a pass may hold, padding included; an example larger than that gets a pass of its own.
        examples: that a pass may hold (None: any number).

    Returns:
        The passes, each the indices of its examples.
    """
    left = sorted(range(len(sizes)), key=lambda i: -sum(sizes[i]))
    passes = []
    while left:
        members = [left.pop(0)]
        widest = list(sizes[members[0]])
        while left and (examples is None or len(members) < examples):
            # what the pass would be as wide as, with each of those left; the narrowest, and of these the fullest
            wider = [[max(pair) for pair in zip(widest, sizes[index], strict=True)] for index in left]
            best = min(range(len(left)), key=lambda n: (sum(wider[n]), -sum(sizes[left[n]])))
            if sum(wider[best]) * (len(members) + 1) > tokens:
                break
            widest = wider[best]
            members.append(left.pop(best))
        passes.append(members)
    return passes


def real_share(sizes: Sequence[tuple[int, ...]], tokens: int, batch_size: int) -> float:
    """Share of padded passes that is no padding, steps of `batch_size` taken in order. Args as `groups`."""
    room = 0
    for start in range(0, len(sizes), batch_size):
        step = sizes[start : start + batch_size]
        for group in groups(step, tokens):
            room += len(group) * sum(map(max, zip(*(step[index] for index in group), strict=True)))
    return sum(map(sum, sizes)) / max(1, room)


def passes_text(step: dict[str, Any], collator: Collator | PairCollator) -> str:
    """The passes of a step, from `StepCollator`, as lines of text: what lies in each."""
    return "\n".join(f"pass {number}: {collator.text(one)}" for number, one in enumerate(step["passes"], start=1))


def plot_padding(examples: Sequence[Encoded], collator: Collator | PairCollator, axes: Sequence[Axes]) -> Figure:
    """What is computed of some examples: as one padded batch, and as they are laid out here, on the same scale.

    That is packed or, of an encoder-decoder, padded in groups of like length. Packs are drawn no longer than the batch.

    Args:
        examples: a dozen or two.
        collator: of the run.
        axes: two, which should share both scales.
    """
    sizes = [collator.sizes(example) for example in examples]
    whole = len(sizes) * sum(map(max, zip(*sizes, strict=True)))
    padded, like = padded_rows(sizes, whole), padded_rows(sizes, whole // 4)
    laid_out = packed_rows([sum(size) for size in sizes]) if collator.packing else like
    for rows, ax in zip((padded, laid_out), axes, strict=True):
        for place, row in enumerate(rows):
            left, real = 0, 0
            for length, filled in row:
                ax.barh(place, length, left=left, height=0.85, color=(BLUE, SKY)[real % 2] if filled else PALE)
                left, real = left + length, real + filled
        ax.set(xlabel="tokens (gray: padding)")
        unframed(ax)
    share = {name: 1 - real_share(sizes, room, len(sizes)) for name, room in (("all", whole), ("like", whole // 4))}
    axes[0].set_title(f"Padded: {share['all']:.0%} is padding", loc="left")
    axes[1].set_title("Packed: none is" if collator.packing else f"Like with like: {share['like']:.0%} is", loc="left")
    axes[0].set(ylabel="rows of the batch", yticks=[], ylim=(len(sizes) - 0.4, -0.6))
    return axes[0].get_figure()  # type: ignore[return-value]


def packed_rows(lengths: Sequence[int]) -> list[list[tuple[int, bool]]]:
    """Conversations laid end to end in packs as long as the longest: of each pack the lengths."""
    return [[(lengths[index], True) for index in pack] for pack in pack_first_fit(lengths, max(lengths))]


def padded_rows(sizes: Sequence[tuple[int, ...]], tokens: int) -> list[list[tuple[int, bool]]]:
    """Examples padded in `groups`: of each a length with True, what is real, and one with False, for each dimension."""
    rows = []
    for group in groups(sizes, tokens):
        widths = [max(lengths) for lengths in zip(*(sizes[index] for index in group), strict=True)]
        for index in group:
            pairs = zip(sizes[index], widths, strict=True)
            rows.append([part for real, width in pairs for part in ((real, True), (width - real, False))])
    return rows
