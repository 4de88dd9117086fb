"""The loss of answers, from hidden states to gradients without ever holding all logits (notebook 04).

Logits are 32,000 numbers for each token, in fp32 as many bytes as 15 layers of hidden states. Here they exist for a few
hundred answer tokens at a time, and for tokens without a label never. The gradient is taken in the same breath, as in
Liger Kernel (Hsu et al., 2024, https://arxiv.org/abs/2410.10989), which computes logits for every token.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_utils.models.hardware import free_memory, is_out_of_memory
from qlora_utils.tokens.formats import IGNORED, Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_BYTES = {"cpu": 2**23, "cuda": 2**27}  # of fp32 logits held at a time: what a CPU's cache holds, what fills a GPU


def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The summed cross-entropy, in nats, of `softmax(hidden @ weight.T)` against `targets`, as a scalar in fp32.

    Args:
        hidden: (tokens, hidden), in the precision of the products.
        weight: (vocabulary, hidden), in any precision; of a frozen head no gradient is computed.
        targets: (tokens,) token ids.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets)  # type: ignore[no-any-return]


@torch.no_grad()
def token_losses(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The cross-entropy, in nats, of each token: shape (tokens,), fp32. Args as `linear_cross_entropy`."""
    head = weight.to(hidden.dtype)
    losses = [
        nn.functional.cross_entropy((part @ head.T).float(), target, reduction="none")
        for part, target in _chunks(hidden, targets, len(weight))
    ]
    return torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.float32)


def _chunks(hidden: torch.Tensor, targets: torch.Tensor, vocabulary: int) -> Any:
    rows = max(1, CHUNK_BYTES[hidden.device.type] // (4 * vocabulary))
    return zip(hidden.split(rows), targets.split(rows), strict=True)


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients chunk by chunk in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        head = weight.to(hidden.dtype)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        done = 0
        with torch.autocast(hidden.device.type, enabled=False):
            for part, target in _chunks(hidden, targets, len(weight)):
                log_p = torch.log_softmax((part @ head.T).float(), dim=-1)  # (chunk, vocabulary)
                index = target.unsqueeze(-1)
                loss -= log_p.gather(-1, index).sum()
                if not (wants_hidden or wants_weight):
                    continue
                # d loss / d logits = softmax - one_hot; between -1 and 1, so that fp16 holds it too
                gradient = log_p.exp_().scatter_add_(-1, index, torch.full_like(index, -1, dtype=log_p.dtype))
                gradient = gradient.to(hidden.dtype)
                if hidden_grad is not None:
                    torch.mm(gradient, head, out=hidden_grad[done : done + len(part)])
                if weight_grad is not None:
                    add_product(weight_grad, gradient.T, part)
                done += len(part)
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        (scale,) = grad_outputs
        return (
            None if hidden_grad is None else hidden_grad * scale,
            # nobody else holds it: scaled in place
            None if weight_grad is None else weight_grad.mul_(scale).to(ctx.weight_dtype),
            None,
        )


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """`total += left @ right`, `total` in fp32 and the factors in any precision, rounding nothing in between."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(left @ right)


# ---------------------------------------------------------------------------------------------------- in the model


def answer_states(model: PreTrainedModel, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states that predict a labelled token, (answers, hidden), and those tokens, (answers,).

    Args:
        model: with its head, without peft's wrapping.
        batch: from `packing`. Without `answer_positions` they are looked for, which makes a GPU wait.
    """
    inputs = dict(batch)
    labels = inputs.pop("labels")  # (batch, seq), or (batch, answer)
    positions = inputs.pop("answer_positions", None)
    later = 0 if model.config.is_encoder_decoder else 1  # a causal model's position predicts the token after it
    if positions is None:
        marked = labels.clone()
        marked[:, :later] = IGNORED  # nothing stands before it
        positions = torch.nonzero(marked.flatten() != IGNORED).flatten() - later
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = decoder_inputs(model, labels)
    hidden = last_hidden_state(model, inputs).flatten(0, 1)  # (batch · seq, hidden)
    return hidden.index_select(0, positions), labels.flatten().index_select(0, positions + later)


def decoder_inputs(model: PreTrainedModel, labels: torch.Tensor) -> torch.Tensor:
    """What the decoder has before it as it writes each of `labels` (batch, answer): a start token, and those before."""
    start = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
    before = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, model.config.pad_token_id)
    return torch.cat([start, before], dim=1)


def last_hidden_state(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """What the head is given, (batch, seq, hidden); of an encoder-decoder that of its decoder."""
    if not model.config.is_encoder_decoder:
        return model.base_model(**inputs, use_cache=False).last_hidden_state  # type: ignore[no-any-return]
    written = inputs.pop("decoder_input_ids")
    read = model.get_encoder()(**inputs).last_hidden_state
    mask = inputs.get("attention_mask")
    hidden: torch.Tensor = model.get_decoder()(
        input_ids=written, encoder_hidden_states=read, encoder_attention_mask=mask, use_cache=False
    ).last_hidden_state
    # T5 before v1.1 shares head and embeddings, and scales what it gives the head
    return hidden * model.config.d_model**-0.5 if getattr(model.config, "scale_decoder_outputs", False) else hidden


def head_weight(model: PreTrainedModel) -> torch.Tensor:
    """The weight (vocabulary, hidden) of the head in use: the trained copy, or the base model's own."""
    head: Any = model.get_output_embeddings()
    if hasattr(head, "modules_to_save"):  # peft's wrapper
        trained = not head.disable_adapters and head.active_adapter in head.modules_to_save
        head = head.modules_to_save[head.active_adapter] if trained else head.original_module
    return head.weight


def without_logits(model: PreTrainedModel) -> bool:
    """Make the model, when given labels, return the loss alone, by `linear_cross_entropy`; tell whether it could.

    The loss is the mean over the labelled tokens or, with `answer_tokens=N`, their sum divided by N: those of the
    whole optimizer step. Without labels the model stays as it is. A model whose head does more than a matrix product
    (a bias, a cap on logits) is found out by trying, and left alone.
    """
    if not _head_is_a_product(model):
        return False
    original = model.forward

    @functools.wraps(original)  # generation reads the signature
    def forward(*args: Any, labels: Any = None, answer_tokens: Any = None, **inputs: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        if labels is None:
            inputs.pop("answer_positions", None)
            return original(*args, **inputs)
        given = {name: value for name, value in inputs.items() if value is not None and name != "use_cache"}
        given |= dict(zip(("input_ids", "attention_mask"), args, strict=False))
        hidden, targets = answer_states(model, {**given, "labels": labels})
        if torch.is_autocast_enabled(hidden.device.type):  # T5 adds up its layers in fp32
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        loss = linear_cross_entropy(hidden, head_weight(model), targets)
        return CausalLMOutputWithPast(loss=loss / (len(targets) if answer_tokens is None else answer_tokens))

    model.forward = forward  # type: ignore[method-assign]
    return True


@torch.no_grad()
def _head_is_a_product(model: PreTrainedModel) -> bool:
    was_training = model.training
    model.eval()
    try:
        weight = head_weight(model)
        given: list[torch.Tensor] = []
        head: Any = model.get_output_embeddings()
        watching = head.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
        tokens = torch.arange(8, device=weight.device).unsqueeze(0)
        logits = model(input_ids=tokens, labels=tokens, use_cache=False).logits.float()
        watching.remove()
        (seen,) = given
        product = (seen.to(weight.dtype) @ weight.T).float()
        # and it is given what `answer_states` finds: some models scale it, or add to it, on the way
        hidden, _ = answer_states(model, {"input_ids": tokens, "labels": tokens})
        if not torch.allclose(hidden.float(), seen[0, : len(hidden)].float(), rtol=2e-2, atol=2e-2):
            return False
        return bool(torch.allclose(logits, product, rtol=2e-2, atol=2e-2 * float(logits.abs().max())))
    finally:
        model.train(was_training)


# ---------------------------------------------------------------------------------------------------- measured


def response_loss(model: nn.Module, rows: Sequence[Encoded], collator: Any, *, batch_size: int) -> tuple[float, int]:
    """Mean negative log-likelihood, in nats, of all labelled tokens, and their number. Its `exp` is the perplexity.

    Args and mode: as `row_losses`.
    """
    losses, counts = row_losses(model, rows, collator, batch_size=batch_size)
    total = sum(counts)
    return (sum(losses) / total if total else math.nan), total


@torch.no_grad()
def row_losses(
    model: nn.Module, rows: Sequence[Encoded], collator: Any, *, batch_size: int
) -> tuple[list[float], list[int]]:
    """For each row the summed negative log-likelihood of its labelled tokens, in nats, and their number.

    Only sums are kept from batch to batch, so memory does not grow with the number of rows, and logits exist for some
    answer tokens at a time. The model's mode is put back afterwards.

    Args:
        model: language model whose head is a matrix product, or one wrapped by peft.
        rows: from `formats.Format.examples`.
        collator: from `packing.make_collator`.
        batch_size: rows per forward pass; fewer where memory runs out.
    """
    was_training = model.training
    model.eval()
    plain: Any = model
    if hasattr(model, "peft_config"):
        plain = plain.get_base_model()
    device = next(model.parameters()).device
    losses: list[float] = []
    counts: list[int] = []

    def measure(members: Sequence[Encoded], sizes: list[int]) -> list[float]:
        batch = {name: _on(device, value) for name, value in collator(members).items()}
        hidden, targets = answer_states(plain, batch)
        each = token_losses(hidden, head_weight(plain), targets)
        # Packed or padded, the answers come row by row.
        return [float(part) for part in torch.stack([part.sum() for part in each.double().split(sizes)])]

    try:
        while len(counts) < len(rows):
            members = rows[len(counts) : len(counts) + batch_size]
            sizes = [collator.answer_tokens(row) for row in members]
            try:
                losses += measure(members, sizes)
                counts += sizes
                continue
            except Exception as error:
                if not is_out_of_memory(error) or len(members) == 1:
                    raise
            batch_size = len(members) // 2
            free_memory()
    finally:
        model.train(was_training)
    return losses, counts


@torch.no_grad()
def answer_losses(model: nn.Module, row: Encoded, collator: Any) -> tuple[list[int], list[float]]:
    """The labelled tokens of one row, and the negative log-likelihood of each, in nats. The model's mode is put back.

    Args: as `row_losses`, with one row.
    """
    was_training = model.training
    model.eval()
    plain: Any = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
    device = next(model.parameters()).device
    try:
        batch = {name: _on(device, value) for name, value in collator([row]).items()}
        hidden, targets = answer_states(plain, batch)
        return targets.tolist(), token_losses(hidden, head_weight(plain), targets).tolist()
    finally:
        model.train(was_training)


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
