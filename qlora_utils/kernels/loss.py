"""Compute the loss of answers and its gradients without ever holding all logits (notebook 04).

Logits are 32,000 numbers for each token: in fp32 as many bytes as 15 layers of hidden states. Here
they exist for a few hundred answer tokens at a time, and never for tokens without a label (but in a captured pass,
where their number may not depend on the rows). The
gradient is computed from each chunk of logits at once. Liger Kernel does the same, for all tokens
(Hsu et al., 2024, https://arxiv.org/abs/2410.10989).

Most heads are one matrix product. Some models scale, cap or shift their logits; theirs are computed
by the model itself, chunk by chunk too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlora_utils.kernels.lora_layers import add_product
from qlora_utils.kernels.sharding import is_split
from qlora_utils.models.hardware import free_memory, is_out_of_memory
from qlora_utils.tokens.formats import IGNORED, Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Bytes of fp32 logits that exist at a time: what keeps a GPU busy, and on a CPU so many rows that the head and its
# gradient, which each chunk reads and writes whole, are not what it waits for.
CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**27}
# How far logits may lie from the head's product, as a share of the largest: 16-bit products round.
HEAD_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
# Rows of a model's own logits that are computed at a time at least: each time its whole forward pass is called.
LEAST_OWN_ROWS = 64


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    divisor: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """Return the summed cross-entropy of `softmax(hidden @ weight.T)` against `targets`, divided by `divisor`.

    Args:
        hidden: (tokens, hidden), in the precision of the products.
        weight: (vocabulary, hidden), in any precision; a frozen head gets no gradient. If it has the attribute
            `main_grad`, a tensor in fp32, its gradient is added there at once, and must not be scaled afterwards.
        targets: (tokens,) token ids; negative ones do not count.
        divisor: number, or tensor of one.

    Returns:
        The loss in nats, a scalar in fp32.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, divisor)  # type: ignore[no-any-return]


@torch.no_grad()
def token_losses(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each token in nats, (tokens,) in fp32.

    Args: see `linear_cross_entropy`.
    """
    head = weight.to(hidden.dtype)
    return _losses_by_chunk(hidden, targets, len(weight), lambda part: part @ head.T)


def _losses_by_chunk(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    vocabulary: int,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    at_least: int = 1,
) -> torch.Tensor:
    """Return the cross-entropy of each token in nats, (tokens,), with logits for one chunk at a time."""
    losses = [
        nn.functional.cross_entropy(logits_of(part).float(), target, reduction="none")
        for part, target in _chunks(hidden, targets, vocabulary, at_least)
    ]
    return torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.float32)


def _chunks(hidden: torch.Tensor, targets: torch.Tensor, vocabulary: int, at_least: int = 1) -> Any:
    """Yield hidden states and targets in pairs of parts of `at_least` rows, whose logits fit into `CHUNK_BYTES`."""
    rows = max(at_least, CHUNK_BYTES[hidden.device.type] // (4 * vocabulary))
    return zip(hidden.split(rows), targets.split(rows), strict=True)


class _LinearCrossEntropy(torch.autograd.Function):
    """Compute loss and gradients chunk by chunk in the forward pass; the backward pass scales them.

    The loss is a scalar, so the gradient that arrives in the backward pass is one factor for all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        divisor: torch.Tensor | float,
    ) -> torch.Tensor:
        """Return the loss, and save its gradients for the backward pass."""
        head = weight.to(hidden.dtype)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        main_grad = getattr(weight, "main_grad", None) if wants_weight else None
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        weight_grad = main_grad
        if wants_weight and main_grad is None:
            weight_grad = torch.zeros_like(weight, dtype=torch.float32)

        # Each token's share of the loss. fp16 cannot hold gradients that are divided by thousands of tokens: there the
        # backward pass divides.
        late_divisor = divisor if hidden.dtype is torch.float16 else None
        shares = (targets >= 0).float()
        if late_divisor is None:
            shares = shares / divisor
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        done = 0
        with torch.autocast(hidden.device.type, enabled=False):
            for part, target in _chunks(hidden, targets, len(weight)):
                rows = slice(done, done + len(part))
                done += len(part)
                # (chunk, vocabulary)
                log_p = torch.log_softmax((part @ head.T).float(), dim=-1)
                index = target.clamp(min=0).unsqueeze(-1)
                loss -= log_p.gather(-1, index).squeeze(-1) @ shares[rows]
                if not (wants_hidden or wants_weight):
                    continue
                # d loss / d logits = softmax - one_hot, times the share of the loss. It is computed in place, since a
                # copy would double the peak; in 16 bits it is multiplied and rounded in one go.
                minus_one = torch.full_like(index, -1, dtype=log_p.dtype)
                gradient = log_p.exp_().scatter_add_(-1, index, minus_one)
                rounded = gradient if hidden.dtype is gradient.dtype else torch.empty_like(gradient, dtype=hidden.dtype)
                gradient = torch.mul(gradient, shares[rows].unsqueeze(-1), out=rounded)
                if hidden_grad is not None:
                    torch.mm(gradient, head, out=hidden_grad[rows])
                if weight_grad is not None:
                    add_product(weight_grad, gradient.T, part)
        ctx.save_for_backward(hidden_grad, None if main_grad is not None else weight_grad)
        ctx.weight_dtype, ctx.late_divisor = weight.dtype, late_divisor
        return loss if late_divisor is None else loss / late_divisor

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the saved gradients, times the gradient of the loss."""
        hidden_grad, weight_grad = ctx.saved_tensors
        (scale,) = grad_outputs
        if ctx.late_divisor is not None:
            scale = scale / ctx.late_divisor
        if hidden_grad is not None:
            hidden_grad = hidden_grad * scale
        # The gradient of the head is large and belongs to nobody else: it is scaled in place.
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(scale).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None


# ---------------------------------------------------------------------------------------------------- in the model


def answer_states(model: PreTrainedModel, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the hidden states that predict a labelled token, and these tokens.

    Args:
        model: with its head, without peft's wrapping.
        batch: tensors from `packing`: `labels`, (batch, seq) or for an encoder-decoder (batch,
            answer), and the model's inputs. Without `answer_positions` the labelled tokens are searched for,
            which makes the CPU wait for a GPU. `targets`, (answers,), are the labelled tokens at these positions;
            without them they are looked up in the labels.

    Returns:
        Hidden states (answers, hidden) and token ids (answers,).
    """
    inputs = dict(batch)
    labels = inputs.pop("labels", None)
    positions, targets = inputs.pop("answer_positions", None), inputs.pop("targets", None)

    # The output of a causal model at one position predicts the token at the next, so the first
    # token is predicted by nothing. A decoder's input is already shifted (`decoder_inputs`).
    shift = 0 if model.config.is_encoder_decoder else 1
    if positions is None:
        marked = labels.clone()
        marked[:, :shift] = IGNORED
        positions = torch.nonzero(marked.flatten() != IGNORED).flatten() - shift

    # Only the states at these positions reach the head: it computes no logits for other tokens.
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = decoder_inputs(model, labels)
    hidden = last_hidden_state(model, inputs).flatten(0, 1)
    if targets is None:
        targets = labels.flatten().index_select(0, positions + shift)
    return hidden.index_select(0, positions), targets


def decoder_inputs(model: PreTrainedModel, labels: torch.Tensor) -> torch.Tensor:
    """Return the decoder's input (batch, answer): a start token, then the labels without the last.

    Args:
        model: an encoder-decoder.
        labels: (batch, answer); padding, marked by -100, becomes the padding token.
    """
    start = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
    before = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, model.config.pad_token_id)
    return torch.cat([start, before], dim=1)


def last_hidden_state(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Return the last hidden state (batch, seq, hidden), from which the logits are computed.

    For an encoder-decoder it is the decoder's.

    Args:
        model: with its head, without peft's wrapping.
        inputs: arguments of its forward pass; `decoder_input_ids` are taken out of them.
    """
    if not model.config.is_encoder_decoder:
        return model.base_model(**inputs, use_cache=False).last_hidden_state  # type: ignore[no-any-return]

    # Encoder and decoder are called one by one, because the whole model would compute all logits.
    decoder_ids = inputs.pop("decoder_input_ids")
    encoded = model.get_encoder()(**inputs).last_hidden_state
    return model.get_decoder()(  # type: ignore[no-any-return]
        input_ids=decoder_ids,
        encoder_hidden_states=encoded,
        encoder_attention_mask=inputs.get("attention_mask"),
        use_cache=False,
    ).last_hidden_state


def head_weight(model: PreTrainedModel) -> torch.Tensor:
    """Return the weight (vocabulary, hidden) of the head in use: trained, or the base model's."""
    head: Any = model.get_output_embeddings()
    # peft wraps a head that trains in full, and holds the trained copy beside the original.
    if hasattr(head, "modules_to_save"):
        trained = not head.disable_adapters and head.active_adapter in head.modules_to_save
        head = head.modules_to_save[head.active_adapter] if trained else head.original_module
    return head.weight


def own_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits (tokens, vocabulary) that a model itself computes from last hidden states.

    Its own forward pass runs, with the layers passed over, so that whatever it does besides the
    product with its head is done here too: scaling, caps, a bias.

    Args:
        model: with its head, without peft's wrapping.
        hidden: (tokens, hidden), from `last_hidden_state`.
    """
    from transformers.modeling_outputs import BaseModelOutput

    class Output(BaseModelOutput):
        """Hold hidden states, and None for all else that the layers of one model or another return."""

        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    output = Output(last_hidden_state=hidden.unsqueeze(0))
    # Neither the tokens nor the encoder's output are read: the layers that would read them do not run.
    tokens = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
    inputs: dict[str, Any] = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        inputs = {"encoder_outputs": output, "decoder_input_ids": tokens}
    layers: Any = model.get_decoder()
    replaced = layers.__dict__.get("forward")
    layers.forward = lambda *args, **options: output
    try:
        return model(**inputs, use_cache=False).logits[0]  # type: ignore[no-any-return]
    finally:
        del layers.forward
        if replaced is not None:
            layers.forward = replaced


def own_cross_entropy(model: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the summed cross-entropy of a model's own logits against `targets`, a scalar in fp32.

    The backward pass computes each chunk of logits again, so that they never exist all at once.

    Args:
        model: see `own_logits`.
        hidden: (tokens, hidden), from `last_hidden_state`.
        targets: (tokens,) token ids.
    """

    def chunk_loss(part: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(own_logits(model, part).float(), target, reduction="sum")

    # Nothing is drawn at random between hidden states and logits.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    total = hidden.sum() * 0.0
    for part, target in _chunks(hidden, targets, len(head_weight(model)), LEAST_OWN_ROWS):
        total = total + checkpoint(chunk_loss, part, target, **options)
    return total.float()


def use_chunked_loss(model: PreTrainedModel) -> None:
    """Make a model compute its loss from a chunk of logits at a time, and return no logits beside it.

    The loss is the mean over the labelled tokens or, with `answer_tokens=N`, their sum divided by
    N: all labelled tokens of the optimizer step. Without labels the model computes as before.

    Where the head is a matrix product, `linear_cross_entropy` computes loss and gradient in one go;
    elsewhere `own_cross_entropy` does.
    """
    is_product = head_is_a_product(model)
    original = model.forward

    # `wraps`, because generation reads the signature of `forward`.
    @functools.wraps(original)
    def forward(*args: Any, labels: Any = None, answer_tokens: Any = None, **options: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        if labels is None and options.get("targets") is None:
            options.pop("answer_positions", None)
            return original(*args, **options)

        # `answer_states` hands all inputs on to the layers, with a `use_cache` of its own.
        options.pop("use_cache", None)
        inputs = {name: value for name, value in options.items() if value is not None}
        inputs |= dict(zip(("input_ids", "attention_mask"), args, strict=False))
        hidden, targets = answer_states(model, {**inputs, "labels": labels})
        divisor = len(targets) if answer_tokens is None else answer_tokens

        if is_product:
            # T5 adds up its layers in fp32, also under autocast; the head's product is in 16 bits.
            if torch.is_autocast_enabled(hidden.device.type):
                hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
            loss = linear_cross_entropy(hidden, head_weight(model), targets, divisor)
        else:
            loss = own_cross_entropy(model, hidden, targets) / divisor
        return CausalLMOutputWithPast(loss=loss)

    model.forward = forward  # type: ignore[method-assign]


# Attribute of a model in which the answer of `head_is_a_product` is saved.
_IS_PRODUCT = "head_is_a_product"


@torch.no_grad()
def head_is_a_product(model: PreTrainedModel) -> bool:
    """Try whether a model's logits are its last hidden states times the head's weight, nothing more.

    The model's own logits are compared with the product for hidden states of eight tokens, for zeros
    (where any bias shows) and for the same states so long that the largest logit is 100 (where any cap
    shows, also in a model whose logits are small). It is tried once for each model.
    """
    saved = getattr(model, _IS_PRODUCT, None)
    if isinstance(saved, bool):
        return saved
    weight = head_weight(model)
    with evaluating(model):
        tokens = torch.arange(8, device=weight.device).unsqueeze(0) % len(weight)
        hidden, _ = answer_states(model, {"input_ids": tokens, "labels": tokens})
        product = hidden.to(weight.dtype) @ weight.T
        longer = hidden * (100 / product.float().abs().max().clamp(min=1e-6)).to(hidden.dtype)
        found = not own_logits(model, torch.zeros_like(hidden)).any()
        for states in (hidden, longer):
            logits, product = own_logits(model, states).float(), (states.to(weight.dtype) @ weight.T).float()
            found = found and relative_difference(logits, product) <= HEAD_TOLERANCES[weight.dtype]
    setattr(model, _IS_PRODUCT, found)
    return found


def relative_difference(values: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference between two tensors as a share of the largest expected magnitude."""
    scale = expected.float().abs().max().clamp(min=1e-12)
    return float((values.float() - expected.float()).abs().max() / scale)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch a model to evaluation mode, and afterwards each of its parts back to the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


# ---------------------------------------------------------------------------------------------------- measured


def response_loss(
    model: nn.Module,
    rows: Sequence[Encoded],
    collator: Any,
    *,
    batch_size: int,
) -> tuple[float, int]:
    """Return the mean negative log-likelihood of all labelled tokens in nats, and their number.

    Its `exp` is the perplexity. Without a labelled token it is NaN. Args: see `row_losses`.
    """
    losses, counts = row_losses(model, rows, collator, batch_size=batch_size)
    total = sum(counts)
    mean = sum(losses) / total if total else math.nan
    return mean, total


@torch.no_grad()
def row_losses(
    model: nn.Module,
    rows: Sequence[Encoded],
    collator: Any,
    *,
    batch_size: int,
) -> tuple[list[float], list[int]]:
    """Measure the loss of each row.

    Only sums are retained from batch to batch, so that memory does not grow with the number of
    rows, and logits exist for some answer tokens at a time. The model's mode is restored afterwards.

    Args:
        model: language model, or one wrapped by peft.
        rows: from `formats.Format.examples`.
        collator: from `packing.make_collator`.
        batch_size: rows per forward pass; fewer where memory runs out.

    Returns:
        For each row the summed negative log-likelihood of its labelled tokens in nats, and their
        number.
    """
    losses: list[float] = []
    counts: list[int] = []

    def measure(members: Sequence[Encoded], sizes: list[int]) -> list[float]:
        _, each = labelled_losses(model, members, collator)
        # Packed or padded, the answer tokens come row by row.
        sums = [part.sum() for part in each.double().split(sizes)]
        return [float(total) for total in torch.stack(sums)]

    with evaluating(model):
        while len(counts) < len(rows):
            members = rows[len(counts) : len(counts) + batch_size]
            sizes = [collator.answer_tokens(row) for row in members]
            try:
                losses += measure(members, sizes)
                counts += sizes
                continue
            except Exception as error:
                # Processes that share one model run the same number of passes.
                if not is_out_of_memory(error) or len(members) == 1 or is_split(model):
                    raise
            # Outside of `except`, because the error holds the tensors that must be freed.
            batch_size = len(members) // 2
            free_memory()
    return losses, counts


@torch.no_grad()
def answer_losses(model: nn.Module, row: Encoded, collator: Any) -> tuple[list[int], list[float]]:
    """Return the labelled tokens of one row, and the negative log-likelihood of each in nats.

    The model's mode is restored afterwards. Args: see `row_losses`.
    """
    with evaluating(model):
        targets, losses = labelled_losses(model, [row], collator)
        return targets.tolist(), losses.tolist()


def labelled_losses(
    model: nn.Module,
    rows: Sequence[Encoded],
    collator: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the labelled tokens (answers,) of a batch of rows, and the loss of each in nats."""
    plain: Any = model
    if hasattr(model, "peft_config"):
        plain = plain.get_base_model()
    device = next(model.parameters()).device
    batch = {name: _on(device, value) for name, value in collator(rows).items()}
    hidden, targets = answer_states(plain, batch)
    weight = head_weight(plain)
    if head_is_a_product(plain):
        return targets, token_losses(hidden, weight, targets)
    # Heads that do more than a product: the model itself computes the logits.
    logits_of = functools.partial(own_logits, plain)
    return targets, _losses_by_chunk(hidden, targets, len(weight), logits_of, LEAST_OWN_ROWS)


def _on(device: torch.device, value: Any) -> Any:
    """Return a value of a batch on the device, if it is a tensor, or else as it is."""
    return value.to(device) if isinstance(value, torch.Tensor) else value
