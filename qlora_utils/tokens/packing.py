"""Make tensors of examples: conversations packed end to end, or padded pairs (notebooks 01, 04)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from typing import TYPE_CHECKING, Any

from qlora_utils.config import RunConfig
from qlora_utils.models.shapes import architecture_of
from qlora_utils.style import BLUE, PALE, SKY, unframed
from qlora_utils.tokens.formats import IGNORED, Encoded

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase


# ---------------------------------------------------------------------------------- one pass


def make_collator(tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> Collator | PairCollator:
    """Return the collator for the run's architecture: it makes tensors of encoded examples."""
    # Loading the tokenizer has made sure of a padding token.
    assert isinstance(tokenizer.pad_token_id, int)
    if architecture_of(config.model) == "encoder-decoder":
        return PairCollator(tokenizer.pad_token_id)
    return Collator(tokenizer.pad_token_id, config.packing)


@dataclass(frozen=True)
class Collator:
    """Make the tensors of one forward pass of a causal model out of encoded conversations.

    With `packing` the conversations are laid end to end in one sequence of shape (1, tokens), whose
    `position_ids` begin again at 0 with each conversation. There is no padding and no mask:
    `lengths` and `starts` tell the attention kernel where each conversation begins. Otherwise they
    are padded on the right to (batch, seq).

    Padding is recognized by the lengths, never by the id of the padding token, which may also be a
    token of the text.
    """

    pad_token_id: int
    packing: bool

    def tokens(self, example: Encoded) -> int:
        """Return the tokens of an example that count against the bound of a pass."""
        return len(example.input_ids)

    def sizes(self, example: Encoded) -> tuple[int, ...]:
        """Return the length of each dimension that is padded: (tokens,)."""
        return (len(example.input_ids),)

    def answer_tokens(self, example: Encoded) -> int:
        """Return the number of tokens that carry loss: never the first, which nothing predicts."""
        return sum(label != IGNORED for label in example.labels[1:])

    def padded_tokens(self, batch: dict[str, Any]) -> int:
        """Return the tokens of a pass, padding included."""
        return int(batch["input_ids"].numel())

    def describe(self, batch: dict[str, Any]) -> str:
        """Describe the content of a pass in words."""
        rows, width = batch["input_ids"].shape
        if self.packing:
            return f"{width} tokens, conversations of {list(batch['lengths'])}"
        share = int(batch["attention_mask"].sum()) / (rows * width)
        return f"{rows} × {width} tokens, {share:.0%} not padding"

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, Any]:
        """Return the tensors of one pass.

        Returns:
            `input_ids` and `labels`, both (1, tokens) or (batch, seq), and `answer_positions`, the
            indices in the flattened batch whose next token carries loss. If packed, also
            `position_ids` (1, tokens), `starts` (int32: where each conversation begins, and the
            number of all tokens) and `lengths`, a tuple. If padded, also `attention_mask`.
        """
        import torch

        # Nothing predicts the first token of a conversation, least of all the one before it.
        labels = [[IGNORED, *example.labels[1:]] for example in examples]
        ids = [example.input_ids for example in examples]
        tensors = self._packed(ids, labels) if self.packing else self._padded(ids, labels)
        # The positions are found here, on the CPU: searching for them on a GPU would make it wait.
        # The output at one position predicts the token at the next.
        labelled = torch.nonzero(tensors["labels"].flatten() != IGNORED).flatten()
        batch: dict[str, Any] = {**tensors, "answer_positions": labelled - 1}
        if self.packing:
            batch["lengths"] = tuple(map(len, ids))
        return batch

    def _packed(self, ids: list[list[int]], labels: list[list[int]]) -> dict[str, torch.Tensor]:
        """Return conversations laid end to end."""
        import torch

        lengths = [len(row) for row in ids]
        positions = [torch.arange(length) for length in lengths]
        return {
            "input_ids": torch.tensor([list(chain.from_iterable(ids))]),
            "labels": torch.tensor([list(chain.from_iterable(labels))]),
            "position_ids": torch.cat(positions).unsqueeze(0),
            "starts": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        }

    def _padded(self, ids: list[list[int]], labels: list[list[int]]) -> dict[str, torch.Tensor]:
        """Return conversations padded on the right to the longest."""
        return {
            "input_ids": _padded_tensor(ids, self.pad_token_id),
            "labels": _padded_tensor(labels, IGNORED),
            "attention_mask": _padded_tensor([[1] * len(row) for row in ids], 0),
        }


# Tokens of padding that a pass gets at most where passes are padded to a few lengths.
LONGEST_PADDING = 512


def padded_length(tokens: int) -> int:
    """Return the tokens that a pass is padded to, where passes of one length are computed alike.

    It is the next multiple of an eighth of the next power of two, of at least 32 and at most `LONGEST_PADDING`. In
    steps of 16 Guanaco rows that is 3 % of padding; half of it in twice as many lengths, each to be captured, cost more
    than they save over 250 steps.
    """
    power = 1 << max(0, tokens - 1).bit_length()
    multiple = min(LONGEST_PADDING, max(32, power // 8))
    return -(-tokens // multiple) * multiple


def pad_pass(batch: Mapping[str, Any], length: int, conversations: int) -> dict[str, Any]:
    """Pad a packed pass, by one more conversation without labels.

    The shapes of all its tensors then follow from its length alone. Every number of the real conversations stays what
    it is, since each attends to itself only.

    Args:
        batch: tensors of the pass, from `Collator`, packed.
        length: tokens to pad it to.
        conversations: that a pass may hold at most.

    Returns:
        `input_ids` and `position_ids` (1, tokens); `starts` (conversations + 2), whose last entries are all the number
        of tokens; `answer_positions` and `targets` (tokens,), beyond the labelled ones any positions, and -100.
    """
    import torch
    from torch.nn.functional import pad

    ids, labels, positions = batch["input_ids"], batch["labels"], batch["answer_positions"]
    missing = length - ids.shape[1]
    starts, unlabelled = batch["starts"], length - len(positions)
    return {
        "input_ids": pad(ids, (0, missing)),
        "position_ids": torch.cat(
            [batch["position_ids"], torch.arange(missing, device=ids.device).unsqueeze(0)], dim=1
        ),
        "starts": pad(starts, (0, conversations + 2 - len(starts)), value=length),
        # All different: the gradient of one that was read many times would be added up one by one.
        "answer_positions": torch.cat([positions, torch.arange(unlabelled, device=ids.device)]),
        "targets": pad(labels.flatten()[positions + 1], (0, unlabelled), value=IGNORED),
    }


@dataclass(frozen=True)
class PairCollator:
    """Make the tensors of one forward pass of an encoder-decoder.

    The encoder's input and the decoder's labels are both padded on the right, to the longest of
    each. Padding is recognized by the lengths. There are no packs: T5's relative positions do not
    know where a conversation begins.
    """

    pad_token_id: int
    packing = False

    def tokens(self, example: Encoded) -> int:
        """Return the tokens of an example, encoder and decoder added."""
        return len(example.input_ids) + len(example.labels)

    def sizes(self, example: Encoded) -> tuple[int, ...]:
        """Return the length of each dimension that is padded: (encoder, decoder)."""
        return len(example.input_ids), len(example.labels)

    def answer_tokens(self, example: Encoded) -> int:
        """Return the number of tokens that carry loss: all that the decoder writes."""
        return len(example.labels)

    def padded_tokens(self, batch: dict[str, Any]) -> int:
        """Return the tokens of a pass, encoder and decoder added, padding included."""
        return int(batch["input_ids"].numel() + batch["labels"].numel())

    def describe(self, batch: dict[str, Any]) -> str:
        """Describe the content of a pass in words."""
        (rows, read), written = batch["input_ids"].shape, batch["labels"].shape[1]
        real = int(batch["attention_mask"].sum()) + len(batch["answer_positions"])
        share = real / (rows * (read + written))
        return f"{rows} × {read} tokens read, {rows} × {written} written, {share:.0%} not padding"

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, Any]:
        """Return the tensors of one pass.

        Returns:
            `input_ids` and `attention_mask` (batch, seq), `labels` (batch, answer), and
            `answer_positions`, the indices in the flattened labels that carry loss.
        """
        import torch

        ids = [example.input_ids for example in examples]
        labels = _padded_tensor([example.labels for example in examples], IGNORED)
        return {
            "input_ids": _padded_tensor(ids, self.pad_token_id),
            "attention_mask": _padded_tensor([[1] * len(row) for row in ids], 0),
            "labels": labels,
            "answer_positions": torch.nonzero(labels.flatten() != IGNORED).flatten(),
        }


def _padded_tensor(rows: Sequence[list[int]], filler: int) -> torch.Tensor:
    """Return rows as a tensor (batch, longest), filled up on the right."""
    import torch

    longest = max(map(len, rows))
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])


# ---------------------------------------------------------------------------------- the passes of a step


def pack_first_fit(
    lengths: Sequence[int],
    tokens: int,
    conversations: int | None = None,
) -> list[list[int]]:
    """Put conversations into few packs by first-fit decreasing; the longest pack comes first.

    The longest pack comes first so that a training that does not fit into memory fails at once.

    Args:
        lengths: tokens of each conversation.
        tokens: tokens that a pass may hold; a longer conversation gets a pack of its own.
        conversations: number of conversations that a pack may hold; None: any number.

    Returns:
        The packs, each a list of indices of conversations.
    """
    # `free` holds the tokens that are left in each pack. Long conversations come first, because
    # short ones fit into what these leave.
    packs: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        # The first pack that has tokens left for this conversation, or else a new one.
        for place, left in enumerate(free):
            if length <= left and (conversations is None or len(packs[place]) < conversations):
                break
        else:
            place = len(packs)
            packs.append([])
            free.append(max(tokens, length))
        packs[place].append(index)
        free[place] -= length
    return sorted(packs, key=lambda members: -sum(lengths[i] for i in members))


def group_by_size(
    sizes: Sequence[tuple[int, ...]],
    tokens: int,
    examples: int | None = None,
) -> list[list[int]]:
    """Put examples of similar size into passes that are padded.

    Each pass begins with the largest example left and takes in those most like it.

    Args:
        sizes: of each example, a length for each padded dimension: (tokens,) or (encoder, decoder).
        tokens: tokens that a pass may hold, padding included; a larger example gets a pass of its
            own.
        examples: number of examples that a pass may hold; None: any number.

    Returns:
        The passes, each a list of indices of examples.
    """
    # Quadratic in the number of examples, of which a step has few.
    left = sorted(range(len(sizes)), key=lambda i: -sum(sizes[i]))
    passes = []
    while left:
        members = [left.pop(0)]
        widths = list(sizes[members[0]])
        while left and (examples is None or len(members) < examples):
            # Take the example that widens the pass least, and of several the largest.
            wider = [_widen(widths, sizes[index]) for index in left]
            best = min(range(len(left)), key=lambda n: (sum(wider[n]), -sum(sizes[left[n]])))
            if sum(wider[best]) * (len(members) + 1) > tokens:
                break
            widths = wider[best]
            members.append(left.pop(best))
        passes.append(members)
    return passes


def _widen(widths: Sequence[int], size: tuple[int, ...]) -> list[int]:
    """Return the padded lengths of a pass after an example has joined it."""
    return [max(pair) for pair in zip(widths, size, strict=True)]


@dataclass
class StepCollator:
    """Make the forward passes of one optimizer step out of its conversations.

    The cut into passes changes memory and speed, and nothing else: the loss is summed over the
    answer tokens of the whole step.

    `tokens` and `conversations` bound one pass, as in `pack_first_fit` or, if it is padded, in
    `group_by_size`. Both shrink when memory runs out (`halve`); the steps remain the same.

    Of several `processes` each makes the passes of its own share: number `rank`, from 0. With `in_lockstep` all make as
    many passes as the one that has most.

    """

    collator: Collator | PairCollator
    tokens: int
    conversations: int | None = None
    rank: int = 0
    processes: int = 1
    in_lockstep: bool = False

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, Any]:
        """Cut a step into passes.

        Returns:
            `passes`: tensors of each pass of this process; `tokens` and `answer_tokens`: numbers of
            the whole step, without padding; `examples` and `bounds`: the examples and the bounds by
            which they were cut, in case they must be cut again; `taken`: how many of the examples
            are this process's; `idle`: how many passes, the last ones, count for nothing and are
            there for the lockstep alone.
        """
        lengths = [self.collator.tokens(example) for example in examples]
        shares = share_evenly(lengths, self.processes)
        taken = shares[self.rank]
        cut = self._cut(examples, taken)
        passes = [self.collator([examples[index] for index in indices]) for indices in cut]
        idle = 0
        if self.in_lockstep:
            idle = max(len(self._cut(examples, share)) for share in shares) - len(cut)
            # any small pass does: that of one example
            shortest = min(range(len(examples)), key=lambda index: lengths[index])
            passes += [self.collator([examples[shortest]])] * idle
        return {
            "passes": passes,
            "tokens": sum(lengths),
            "answer_tokens": sum(self.collator.answer_tokens(example) for example in examples),
            "examples": list(examples),
            "taken": len(taken),
            "idle": idle,
            "bounds": (self.tokens, self.conversations),
        }

    def _cut(self, examples: Sequence[Encoded], share: Sequence[int]) -> list[list[int]]:
        """Cut a share of a step, indices of examples, into passes."""
        # A pack is bounded by the sum of its lengths, a padded pass by its longest example.
        if self.collator.packing:
            lengths = [self.collator.tokens(examples[index]) for index in share]
            members = pack_first_fit(lengths, self.tokens, self.conversations)
        else:
            sizes = [self.collator.sizes(examples[index]) for index in share]
            members = group_by_size(sizes, self.tokens, self.conversations)
        return [[share[index] for index in indices] for indices in members]

    def halve(self, step: dict[str, Any]) -> bool:
        """Bound passes by half of the tokens in the largest pass of this step.

        Returns:
            Whether that was possible: not if each pass holds a single example already.
        """
        sizes = [self.collator.padded_tokens(batch) for batch in step["passes"]]
        if len(step["passes"]) >= step["taken"]:
            return False
        self.tokens = max(1, min(self.tokens, max(sizes)) // 2)
        if self.conversations is not None:
            self.conversations = max(1, self.conversations // 2)
        return True


def share_evenly(sizes: Sequence[int], processes: int) -> list[list[int]]:
    """Share the examples of a step so that all processes get about as many tokens.

    The longest come first, each to the process that has the fewest tokens until then. (Graham's rule: no share is
    larger than 4/3 of the best possible, https://doi.org/10.1137/0117039.)

    Args:
        sizes: tokens of each example.
        processes: to share among.

    Returns:
        The indices of each process, in the order of the step.
    """
    shares: list[list[int]] = [[] for _ in range(processes)]
    totals = [0] * processes
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        least = totals.index(min(totals))
        shares[least].append(index)
        totals[least] += sizes[index]
    return [sorted(indices) for indices in shares]


class RandomSampler:
    """Sample rows in random order, which depends on seed and epoch alone.

    It is the order of accelerate's `SeedableRandomSampler`, which the Trainer would use. Having it
    here tells afterwards which rows a training has read (`find_read`).
    """

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed, self.epoch = rows, seed, 0

    def __len__(self) -> int:
        """Return the number of rows in an epoch."""
        return self.rows

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; the Trainer calls this before each epoch, also when it resumes one."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Iterate over the rows of an epoch, by their index."""
        import torch

        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(torch.randperm(self.rows, generator=generator).tolist())


class LengthSampler:
    """Sample rows in random groups, within which rows of similar length follow each other.

    transformers groups rows in the same way (`group_by_length`). But this order depends on seed and
    epoch alone, so that a resumed training sees the rows that it would have seen uninterrupted.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def __len__(self) -> int:
        """Return the number of rows in an epoch."""
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; the Trainer calls this before each epoch, also when it resumes one."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Iterate over the rows of an epoch, by their index."""
        import torch
        from transformers.trainer_pt_utils import get_length_grouped_indices

        # A large factor, so that epoch 1 of seed 0 is not epoch 0 of seed 1.
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


def make_sampler(
    examples: Sequence[Encoded], collator: Collator | PairCollator, config: RunConfig, batch_size: int
) -> RandomSampler | LengthSampler:
    """Return the order in which a training reads its examples: random, or by `row_order` of like length.

    Args:
        examples: to train on.
        collator: of the run.
        config: the run.
        batch_size: examples of a step in one process.
    """
    if config.row_order == "random":
        return RandomSampler(len(examples), config.seed)
    lengths = [collator.tokens(example) for example in examples]
    return LengthSampler(lengths, batch_size, config.seed)


def find_read(sampler: RandomSampler | LengthSampler, examples: int) -> set[int]:
    """Return the indices of the examples that a training has read.

    Args:
        sampler: of the training, from `make_sampler`; its epoch is set to the first.
        examples: number that all steps together have read.
    """
    # The first epoch reads each example once, and the later ones read none that is new.
    sampler.set_epoch(0)
    return set(islice(sampler, examples))


# ---------------------------------------------------------------------------------- measured and drawn


def real_share(sizes: Sequence[tuple[int, ...]], tokens: int, batch_size: int) -> float:
    """Return the share of tokens in padded passes that are not padding.

    Args:
        sizes: see `group_by_size`.
        tokens: see `group_by_size`.
        batch_size: examples of a step; steps are taken in order.
    """
    computed = 0
    for start in range(0, len(sizes), batch_size):
        step = sizes[start : start + batch_size]
        for members in group_by_size(step, tokens):
            computed += len(members) * sum(_padded_widths(step, members))
    return sum(map(sum, sizes)) / max(1, computed)


def _padded_widths(sizes: Sequence[tuple[int, ...]], members: Sequence[int]) -> list[int]:
    """Return the padded lengths of a pass: in each dimension the longest of its members."""
    chosen = [sizes[index] for index in members]
    return [max(lengths) for lengths in zip(*chosen, strict=True)]


def format_passes(step: dict[str, Any], collator: Collator | PairCollator) -> str:
    """Describe the passes of a step from `StepCollator`, one line of text for each."""
    lines = [f"pass {n}: {collator.describe(batch)}" for n, batch in enumerate(step["passes"], start=1)]
    return "\n".join(lines)


def plot_padding(
    examples: Sequence[Encoded],
    collator: Collator | PairCollator,
    axes: Sequence[Axes],
) -> Figure:
    """Plot the tokens computed for some examples: in one padded batch, and as laid out here.

    Here they are packed or, of an encoder-decoder, padded in groups of similar size. Both are drawn
    on the same scale, and packs no longer than the batch.

    Args:
        examples: a dozen or two.
        collator: of the run.
        axes: two, which should share both scales.
    """
    # One batch of all examples, and groups of about a quarter of its tokens.
    sizes = [collator.sizes(example) for example in examples]
    batch_tokens = len(sizes) * sum(_padded_widths(sizes, range(len(sizes))))
    group_tokens = batch_tokens // 4
    rows_here = padded_rows(sizes, group_tokens)
    if collator.packing:
        rows_here = packed_rows([sum(size) for size in sizes])
    for rows, ax in zip((padded_rows(sizes, batch_tokens), rows_here), axes, strict=True):
        _draw_rows(rows, ax)

    # The titles say in numbers how much is padding.
    padding = 1 - real_share(sizes, batch_tokens, len(sizes))
    axes[0].set_title(f"Padded: {padding:.0%} is padding", loc="left")
    title = "Packed: none is"
    if not collator.packing:
        padding = 1 - real_share(sizes, group_tokens, len(sizes))
        title = f"Like with like: {padding:.0%} is"
    axes[1].set_title(title, loc="left")
    axes[0].set(ylabel="rows of the batch", yticks=[], ylim=(len(sizes) - 0.4, -0.6))
    return axes[0].get_figure()  # type: ignore[return-value]


def _draw_rows(rows: Sequence[Sequence[tuple[int, bool]]], ax: Axes) -> None:
    """Draw rows of tokens as bars, the real parts of a row in two alternating colours."""
    for place, row in enumerate(rows):
        left, real_parts = 0, 0
        for length, is_real in row:
            color = (BLUE, SKY)[real_parts % 2] if is_real else PALE
            ax.barh(place, length, left=left, height=0.85, color=color)
            left += length
            real_parts += is_real
    ax.set(xlabel="tokens (gray: padding)")
    unframed(ax)


def packed_rows(lengths: Sequence[int]) -> list[list[tuple[int, bool]]]:
    """Lay conversations end to end in packs as long as the longest of them.

    Returns:
        For each pack the parts of its row, as in `padded_rows`; none is padding.
    """
    rows = []
    for pack in pack_first_fit(lengths, max(lengths)):
        row = [(lengths[index], True) for index in pack]
        rows.append(row)
    return rows


def padded_rows(sizes: Sequence[tuple[int, ...]], tokens: int) -> list[list[tuple[int, bool]]]:
    """Pad examples in the groups of `group_by_size`.

    Returns:
        For each example the parts of its row, as (length, whether it is real): in each dimension
        the tokens of the example, then the padding.
    """
    rows = []
    for members in group_by_size(sizes, tokens):
        widths = _padded_widths(sizes, members)
        for index in members:
            row = []
            for real, width in zip(sizes[index], widths, strict=True):
                row += [(real, True), (width - real, False)]
            rows.append(row)
    return rows
