"""Try a loaded model on two random conversations before it is trained (notebook 04).

Kernels, packs and the chunked loss take a model for a causal decoder whose attention is the usual one and whose
convolutions, states and masks end with each conversation. Whether a model is that, nobody can tell from its name: so it
is measured. All of it holds for an encoder-decoder too, with padded pairs in place of a pack.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from qlora_utils.config import ModelError
from qlora_utils.kernels.attention import EAGER
from qlora_utils.kernels.loss import (
    decoder_inputs,
    evaluating,
    head_is_a_product,
    head_weight,
    labelled_losses,
    relative_difference,
)
from qlora_utils.locate import first_line
from qlora_utils.models.hardware import is_out_of_memory
from qlora_utils.tokens.formats import Encoded
from qlora_utils.tokens.packing import Collator, PairCollator

# Tokens of the two conversations. A window is shortened to less, so that both reach past it.
LENGTHS = (23, 17)
WINDOW = 7
# How far logits may always lie from the model's own, as a share of the largest. Layers can make more of rounding: where
# embeddings that are rounded once more move the logits further, twice of that is allowed (benchmarks/self_test.py).
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# Beyond this share nobody can tell a faulty kernel from rounding any more.
LARGEST_TOLERANCE = 0.5
# How far logits may move where nothing may move them. Rounding has no part in it: the same products are computed twice.
STILL = 1e-4


@dataclass(frozen=True)
class SelfTest:
    """Hold what was measured: the largest differences between logits, as a share of the largest logit.

    Attributes:
        tolerance: what rounding may make of it, in the model's precision.
        rounding: what embeddings that are rounded once more make of it; not finite where the model overflows.
        alone: one conversation by the kernels, and by the model's own attention (`eager`).
        together: two conversations in one pass, and each by the model's own attention.
        across: the second conversation, when a token of the first changes.
        ahead: the tokens before the last, when that changes.
        loss: the loss of each token, in nats by the largest logit, and that of the model's own logits.
        head_is_a_product: whether the logits are the head's product, nothing more.
    """

    tolerance: float
    rounding: float
    alone: float
    together: float
    across: float
    ahead: float
    loss: float
    head_is_a_product: bool

    def fault(self) -> str | None:
        """Describe the first thing that is not as it must be, or return None."""
        if not math.isfinite(self.rounding):
            return "its own attention gives logits that are infinite or NaN"
        checks = (
            (self.ahead, STILL, "a token sees later ones (its own last token moved logits before it"),
            (self.across, STILL, "conversations in one pass see each other (a token of another one moved logits"),
            (self.rounding, LARGEST_TOLERANCE / 2, "it is too sensitive to rounding to be judged (logits differ"),
            (self.alone, self.tolerance, "the attention kernel computes something else than the model (logits differ"),
            (self.together, self.tolerance, "two conversations in one pass are not each alone (logits differ"),
            (self.loss, self.tolerance, "its loss does not follow from its last hidden states (losses differ"),
        )
        for measured, bound, words in checks:
            # `not <=`, because NaN is no number that would be within anything.
            if not measured <= bound:
                return f"{words} by {measured:.2g} of the largest, at most {bound:.0e} is rounding)"
        return None

    def text(self) -> str:
        """Format the measurements as lines of text."""
        head = (
            "a matrix product" if self.head_is_a_product else "more than a product: the model computes its own logits"
        )
        lines = {
            "each alone": f"{self.alone:.1e} from the model's own attention, rounding is up to {self.tolerance:.0e}",
            "two in one pass": f"{self.together:.1e}",
            "one moves the other": f"{self.across:.1e}",
            "last moves earlier": f"{self.ahead:.1e}",
            "loss": f"{self.loss:.1e}",
            "head": head,
        }
        return "\n".join(f"{name:<21}{value}" for name, value in lines.items())


def check(model: nn.Module, collator: Collator | PairCollator) -> SelfTest:
    """Measure a model by `measure`, and refuse one that is not what training takes it for.

    Raises:
        ModelError: what was measured, and a setting that was tried and is right, if there is one.
    """
    fault, measured = _try(model, collator)
    if measured is not None and fault is None:
        return measured
    remedy = measured and _advise_precision(measured, _precision(_plain(model)))
    raise ModelError(f"model: {type(_plain(model)).__name__}: {fault}. {remedy or _find_remedy(model, collator)}")


def _advise_precision(measured: SelfTest, dtype: torch.dtype) -> str | None:
    """Return what to do where the precision is at fault, None where it is not."""
    # an overflow is a matter of fp16's narrow range; in other precisions the weights themselves are damaged
    if not math.isfinite(measured.rounding):
        if dtype == torch.float16:
            return "In float16 it overflows: take -p compute_dtype=float32, or bfloat16."
        return "Its weights are damaged: take another model."
    # rounding less is all that helps
    if measured.rounding > LARGEST_TOLERANCE / 2 and dtype != torch.float32:
        return "Take -p compute_dtype=float32."
    return None


def _precision(model: Any) -> torch.dtype:
    """Return the precision that a model computes in: that of its embeddings."""
    return model.get_input_embeddings().weight.dtype  # type: ignore[no-any-return]


def _try(model: nn.Module, collator: Collator | PairCollator) -> tuple[str | None, SelfTest | None]:
    """Return the fault of a model, None if it has none, and what was measured."""
    try:
        measured = measure(model, collator)
    except Exception as error:  # models raise all kinds for arguments that they don't know
        if is_out_of_memory(error):
            raise
        return (
            f"it cannot compute a pass of two conversations ({type(error).__name__}: {first_line(error)[:200]})",
            None,
        )
    return measured.fault(), measured


def _find_remedy(model: nn.Module, collator: Collator | PairCollator) -> str:
    """Try other settings on a model that was refused, and advise the first that is right."""
    plain = _plain(model)
    settings: list[tuple[str, str, Any]] = []
    if isinstance(collator, Collator):
        kernel = plain.config._attn_implementation
        padded = replace(collator, packing=False)
        settings = [
            ("-p packing=false", kernel, padded),
            ("-p attention_kernel=eager", EAGER, collator),
            ("-p attention_kernel=eager -p packing=false", EAGER, padded),
        ]
    for words, kernel, other in settings:
        with _attention(plain, kernel):
            if _try(model, other)[0] is None:
                return f"With {words} it is right."
    return "Take another model."


@torch.no_grad()
def measure(model: nn.Module, collator: Collator | PairCollator) -> SelfTest:
    """Compare what training computes of two random conversations with the model's own forward pass.

    It takes some ten small passes, leaves no trace in the model, and draws no number from the random states.

    Args:
        model: language model with the kernels that will be used, or one wrapped by peft.
        collator: the one that will be used.
    """
    plain = _plain(model)
    first, second = _random_examples(plain)
    changed = _change_last(first)
    with evaluating(model), _short_windows(plain):
        # the model's own: one conversation, nothing but its tokens
        with _attention(plain, EAGER):
            expected = [_plain_logits(plain, example) for example in (first, second)]
            with _rounded_embeddings(plain):
                rounded = [_plain_logits(plain, example) for example in (first, second)]
        # by the kernels and the collator of the training
        alone = [_logits(plain, collator, [example])[0] for example in (first, second)]
        together = _logits(plain, collator, [first, second])
        moved = _logits(plain, collator, [changed, second])
        # the loss, of the very tokens
        targets, losses = labelled_losses(model, [first, second], collator)
        own = nn.functional.cross_entropy(torch.cat(together), targets, reduction="none")
        is_product = head_is_a_product(plain)

    scale = torch.cat(expected).abs().max().clamp(min=1e-12)
    noise = relative_difference(torch.cat(rounded), torch.cat(expected))
    return SelfTest(
        tolerance=min(LARGEST_TOLERANCE, max(TOLERANCES[_precision(plain)], 2 * noise)),
        rounding=noise,
        alone=relative_difference(torch.cat(alone), torch.cat(expected)),
        together=relative_difference(torch.cat(together), torch.cat(expected)),
        across=float((moved[1] - together[1]).abs().max() / scale),
        ahead=float((moved[0] - together[0])[:-1].abs().max() / scale),
        loss=float((losses - own).abs().max() / scale),
        head_is_a_product=is_product,
    )


def _plain(model: nn.Module) -> Any:
    """Return a model without peft's wrapping."""
    return model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]


def _random_examples(model: Any) -> list[Encoded]:
    """Return two conversations of random tokens, each of which carries loss, or two such pairs."""
    # a generator of its own leaves the random states as they are
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(len(head_weight(model)), model.get_input_embeddings().weight.shape[0])

    def draw(length: int) -> list[int]:
        return torch.randint(vocabulary, (length,), generator=generator).tolist()  # type: ignore[no-any-return]

    examples = []
    for length in LENGTHS:
        tokens = draw(length)
        # an encoder reads other tokens, and more of them, than the decoder writes
        read = draw(length + 5) if model.config.is_encoder_decoder else tokens
        examples.append(Encoded(read, tokens))
    return examples


def _change_last(example: Encoded) -> Encoded:
    """Return an example with another token in the last place that is read: the one after it is only predicted."""
    labels = list(example.labels)
    labels[-2] = labels[-2] - 1 if labels[-2] else 1
    is_causal = example.input_ids == example.labels
    return Encoded(labels if is_causal else example.input_ids, labels)


def _plain_logits(model: Any, example: Encoded) -> torch.Tensor:
    """Return the logits of a conversation, given to the model as anyone would, (labelled tokens, vocabulary)."""
    device = head_weight(model).device
    inputs = {"input_ids": torch.tensor([example.input_ids], device=device)}
    if not model.config.is_encoder_decoder:
        return model(**inputs, use_cache=False).logits[0, :-1].float()  # type: ignore[no-any-return]
    labels = torch.tensor([example.labels], device=device)
    inputs["decoder_input_ids"] = decoder_inputs(model, labels)
    return model(**inputs, use_cache=False).logits[0].float()  # type: ignore[no-any-return]


def _logits(model: Any, collator: Collator | PairCollator, examples: Sequence[Encoded]) -> list[torch.Tensor]:
    """Return the logits of each example in one pass, at its labelled tokens, as the collator lays them out."""
    device = head_weight(model).device
    batch: dict[str, Any] = {}
    for name, value in collator(examples).items():
        batch[name] = value.to(device) if isinstance(value, torch.Tensor) else value
    labels, positions = batch.pop("labels"), batch.pop("answer_positions")
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = decoder_inputs(model, labels)
    logits = model(**batch, use_cache=False).logits.flatten(0, 1).index_select(0, positions)
    # packed or padded, labelled tokens come example by example
    return list(logits.float().split([collator.answer_tokens(example) for example in examples]))


@contextmanager
def _rounded_embeddings(model: Any) -> Iterator[None]:
    """Move the embedding of every token by about the rounding of its precision."""
    generator = torch.Generator().manual_seed(0)

    def move(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(output.shape, generator=generator).to(output.device)
        return (output * (1 + torch.finfo(output.dtype).eps * drawn)).to(output.dtype)

    # encoder and decoder of T5 and BART each have a module of their own for the weight that they share
    embeddings = model.get_input_embeddings()
    readers = {embeddings}
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight is embeddings.weight:
            readers.add(module)
    hooks = [module.register_forward_hook(move) for module in readers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _attention(model: Any, kernel: str) -> Iterator[None]:
    """Switch a model to another attention kernel, and back afterwards."""
    # transformers' own switch leaves models alone that compute attention in code of their own; their masks depend on it
    with _changed(_configs(model), {"_attn_implementation": kernel}):
        yield


@contextmanager
def _short_windows(model: Any) -> Iterator[None]:
    """Shorten sliding windows to `WINDOW` tokens, so that short conversations reach past them.

    A window takes the same way through masks and kernels whatever its size is, and a conversation longer than 4,096
    tokens would take longer than a second.
    """
    shorter: dict[str, Any] = {"sliding_window": WINDOW, "attention_chunk_size": WINDOW}
    with _changed([*model.modules(), *_configs(model)], shorter):
        yield


def _configs(model: Any) -> list[Any]:
    """List the configs of a model and of its parts, each once."""
    found = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            found[id(config)] = config
    return list(found.values())


@contextmanager
def _changed(owners: Sequence[Any], values: dict[str, Any]) -> Iterator[None]:
    """Change attributes where they have a value: text, or a number that is larger than the new one."""
    changed = []
    for owner in owners:
        for name, value in values.items():
            before: Any = getattr(owner, name, None)
            if type(before) is type(value) and (isinstance(value, str) or before > value):
                changed.append((owner, name, before))
                setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, before in reversed(changed):
            setattr(owner, name, before)
