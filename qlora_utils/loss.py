"""The loss of answers, from hidden states to gradients without ever holding all logits (notebook 04).

Logits are 32,000 numbers for each token, in fp32 as many bytes as 15 layers of hidden states. Here they exist for a few
hundred answer tokens at a time, and for tokens without a label never. The gradient is taken in the same breath, as in
Liger Kernel (Hsu et al., 2024, https://arxiv.org/abs/2410.10989), which computes logits for every token.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_utils.data import IGNORED

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


def answer_states(causal_lm: PreTrainedModel, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states that predict a labelled token, (answers, hidden), and those tokens, (answers,).

    Args:
        causal_lm: the model with the head, without peft's wrapping.
        batch: from `data.Collator`. Without `answer_positions` they are looked for, which makes a GPU wait.
    """
    inputs = dict(batch)
    labels = inputs.pop("labels").flatten()  # (batch · seq)
    positions = inputs.pop("answer_positions", None)
    if positions is None:
        marked = batch["labels"].clone()
        marked[:, 0] = IGNORED  # nothing stands before it
        positions = torch.nonzero(marked.flatten() != IGNORED).flatten() - 1
    hidden = causal_lm.base_model(**inputs, use_cache=False).last_hidden_state  # (batch, seq, hidden)
    # A position predicts the token after it.
    return hidden.flatten(0, 1).index_select(0, positions), labels.index_select(0, positions + 1)


def head_weight(causal_lm: PreTrainedModel) -> torch.Tensor:
    """The weight (vocabulary, hidden) of the head in use: the trained copy, or the base model's own."""
    head: Any = causal_lm.get_output_embeddings()
    if hasattr(head, "modules_to_save"):  # peft's wrapper
        trained = not head.disable_adapters and head.active_adapter in head.modules_to_save
        head = head.modules_to_save[head.active_adapter] if trained else head.original_module
    return head.weight


def without_logits(causal_lm: PreTrainedModel) -> bool:
    """Make the model, when given labels, return the loss alone, by `linear_cross_entropy`; tell whether it could.

    The loss is the mean over the labelled tokens or, with `answer_tokens=N`, their sum divided by N: those of the
    whole optimizer step. Without labels the model stays as it is. A model whose head does more than a matrix product
    (a bias, a cap on logits) is found out by trying, and left alone.
    """
    if not _head_is_a_product(causal_lm):
        return False
    original = causal_lm.forward

    @functools.wraps(original)  # generation reads the signature
    def forward(*args: Any, labels: Any = None, answer_tokens: Any = None, **inputs: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        if labels is None:
            inputs.pop("answer_positions", None)
            return original(*args, **inputs)
        given = {name: value for name, value in inputs.items() if value is not None and name != "use_cache"}
        given |= dict(zip(("input_ids", "attention_mask"), args, strict=False))
        hidden, targets = answer_states(causal_lm, {**given, "labels": labels})
        loss = linear_cross_entropy(hidden, head_weight(causal_lm), targets)
        return CausalLMOutputWithPast(loss=loss / (len(targets) if answer_tokens is None else answer_tokens))

    causal_lm.forward = forward  # type: ignore[method-assign]
    return True


@torch.no_grad()
def _head_is_a_product(causal_lm: PreTrainedModel) -> bool:
    was_training = causal_lm.training
    causal_lm.eval()
    try:
        weight = head_weight(causal_lm)
        tokens = torch.arange(8, device=weight.device).unsqueeze(0)
        logits = causal_lm(input_ids=tokens, use_cache=False).logits.float()
        hidden = causal_lm.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        product = (hidden.to(weight.dtype) @ weight.T).float()
        return bool(torch.allclose(logits, product, rtol=2e-2, atol=2e-2 * float(logits.abs().max())))
    finally:
        causal_lm.train(was_training)
