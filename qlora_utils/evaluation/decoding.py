"""Decode answers in slots: whenever an answer ends, its slot takes the next question (notebooks 04 and 06).

All slots advance by one token per step. On a GPU a step is recorded once as a CUDA graph and replayed, because calling
some thousand kernels from Python takes longer than running them. Keys and values lie in tensors of fixed size, in which
each slot has a length of its own.

Refilled slots: Yu et al., 2022, Orca, https://www.usenix.org/conference/osdi22/presentation/yu.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from qlora_utils.kernels import attention
from qlora_utils.kernels.cuda_graphs import capture
from qlora_utils.kernels.lora_layers import keep_expanded, quantized_layers
from qlora_utils.kernels.sharding import is_split
from qlora_utils.locate import first_line
from qlora_utils.models.hardware import graph_pool_bytes, is_out_of_memory

# Steps on a GPU between two looks at which answers have ended: at each the host waits for it.
STEPS = 8
# Tokens of prompts in one pass, at most, unless one prompt alone has more.
PROMPT_TOKENS = 4096
# Where attention reads masked keys too, it reads as many as the longest answer needs, rounded up to a multiple of this.
KEYS = 256
# Frequencies that depend on the longest sequence of a batch would make an answer depend on its neighbours.
_DYNAMIC_ROTATIONS = ("dynamic", "longrope")


def can_decode(model: Any, *, packing: bool) -> bool:
    """Return whether answers of a model can be decoded in slots; `generate` can answer with every other.

    It must train in packs, since prompts are read as a pack, and all its layers must have plain full attention.

    Args:
        model: base or tuned.
        packing: whether the run trains in packs.
    """
    config = model.config
    if (
        not packing
        or config.is_encoder_decoder
        or config._attn_implementation not in (attention.VARLEN, attention.SPLIT)
    ):
        return False
    rotation = str(getattr(config.get_text_config(decoder=True), "rope_parameters", None))
    if any(f"'{name}'" in rotation for name in _DYNAMIC_ROTATIONS):
        return False
    # What transformers itself would cache tells sliding windows, recurrent states and shared layers.
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


@dataclass
class _Pass:
    """Say where the keys and values of the next pass go, and how many each slot attends to.

    Attributes:
        slots: number of slots.
        length: of each slot, in tokens.
        rows: (tokens,), the slot of each token of the pass.
        places: (tokens,), its position in the slot.
        keys_read: how many keys of each slot are read; None: those of the pass itself.
    """

    slots: int
    length: int
    rows: torch.Tensor
    places: torch.Tensor
    keys_read: int | None = None


class _SlotLayer(DynamicLayer):
    """Hold one layer's keys and values, (slots, length, heads, size) each."""

    def __init__(self, next_pass: _Pass) -> None:
        super().__init__()
        # Not the cache itself: that would be a cycle, in which gigabytes wait for the garbage collector.
        self.next_pass = next_pass

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the keys and values (batch, heads, seq, size) of a pass, and return what its queries attend to."""
        now = self.next_pass
        flat = [states.transpose(1, 2).flatten(0, 1) for states in (key_states, value_states)]
        if self.keys is None:
            self.keys, self.values = (states.new_zeros(now.slots, now.length, *states.shape[1:]) for states in flat)
        assert self.values is not None
        self.keys[now.rows, now.places] = flat[0]
        self.values[now.rows, now.places] = flat[1]

        # Prompts attend to themselves alone, as a pack in training; a slot's next token to all before it.
        if now.keys_read is None:
            return key_states, value_states
        return self.keys[:, : now.keys_read].transpose(1, 2), self.values[:, : now.keys_read].transpose(1, 2)

    def get_seq_length(self) -> int:
        """Return 0: each slot has a length of its own, and every pass brings its positions and its mask."""
        return 0


def seeded_noise(seeds: torch.Tensor, places: torch.Tensor, count: int) -> torch.Tensor:
    """Return numbers of the exponential distribution that depend on nothing but a seed, a place and their index.

    A generator's next number depends on all that was drawn before, by other slots too. These are a hash of 32 bits,
    taken of each of the three in turn, so an answer is the same whatever is answered beside it. The hash:
    lowbias32 by Wellons, 2018, https://nullprogram.com/blog/2018/07/31/.

    Args:
        seeds: (slots,), of the answers.
        places: (slots,), number of the token in its answer.
        count: of numbers for each slot.

    Returns:
        (slots, count), fp32, positive.
    """
    mask = 0xFFFFFFFF

    def mix(values: torch.Tensor) -> torch.Tensor:
        values = values & mask
        values = ((values ^ (values >> 16)) * 0x7FEB352D) & mask
        values = ((values ^ (values >> 15)) * 0x846CA68B) & mask
        return values ^ (values >> 16)

    # One round after another: halves that are hashed apart and then joined would cancel where they are equal. Odd
    # constants between them, since the hash of zero is zero.
    row = mix(mix(mix((seeds >> 32) + 0x9E3779B9) ^ seeds) + 0x9E3779B9 * (places + 1)).unsqueeze(1)
    hashed = mix(row + 0x85EBCA6B * torch.arange(1, count + 1, device=seeds.device))
    # 23 bits and a half lie strictly between 0 and 1 in fp32: noise of zero would choose its token at any probability.
    uniform = ((hashed >> 9).float() + 0.5) * 2.0**-23
    return -uniform.log()


def choose_tokens(
    logits: torch.Tensor,
    temperature: float,
    top_p: float,
    *,
    seeds: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose the next token of each row: the likeliest at temperature 0, else drawn as `generate` draws it.

    Top-p: Holtzman et al., 2020, https://arxiv.org/abs/1904.09751.

    Args:
        logits: (slots, vocabulary).
        temperature: divides the logits.
        top_p: only the likeliest tokens that together have this probability are drawn from.
        seeds: (slots,), of the answers; None: torch's own generator draws for all of them.
        places: (slots,), number of the token in its answer; read with `seeds` alone.
    """
    scores = logits.float()
    if temperature == 0:
        return scores.argmax(-1)
    scores = scores / temperature
    if top_p < 1:
        ascending, tokens = scores.sort(-1)
        removed = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        removed[:, -1].zero_()
        scores = scores.masked_fill(removed.scatter(-1, tokens, removed), -torch.inf)
    # Dividing by exponential noise and taking the largest draws from the distribution; unlike multinomial(), it
    # never waits for the GPU.
    probabilities = scores.softmax(-1)
    if seeds is None or places is None:
        noise = torch.empty_like(probabilities).exponential_()
    else:
        noise = seeded_noise(seeds, places, probabilities.shape[-1])
    return (probabilities / noise).argmax(-1)


@torch.no_grad()
def decode(
    model: Any,
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    *,
    slots: int,
    ends: Sequence[int],
    on_answers: Callable[[dict[int, list[int]]], None],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
) -> None:
    """Answer prompts in slots.

    Args:
        model: in eval mode; `can_decode` is true for it.
        prompts: token ids, taken in this order. Give the longest first, so that too little memory shows at once.
        limits: tokens of each answer, at most.
        slots: answers decoded at a time.
        ends: tokens that end an answer.
        on_answers: called with the token ids of the answers that have just ended, by the prompt's index.
        temperature: see `choose_tokens`.
        top_p: see `choose_tokens`.
        seeds: of the answers, so that each is drawn the same whatever is answered beside it; None: torch's generator.
    """
    decoder = _Decoder(model, prompts, limits, slots, ends, temperature, top_p, seeds)
    waiting = deque(range(len(prompts)))
    try:
        while waiting or decoder.running:
            # A pass over one prompt takes about as long as one over several, so a few free slots wait for more.
            if len(decoder.free) > decoder.slots // 8:
                while waiting and decoder.free:
                    decoder.read_prompts(waiting)
            decoder.advance()
            ended = decoder.take_ended()
            if ended:
                on_answers(ended)
    finally:
        decoder.release()


class _Decoder:
    """Hold the slots, and all tensors that a step reads and writes: a recorded step knows them by their address."""

    def __init__(
        self,
        model: Any,
        prompts: Sequence[list[int]],
        limits: Sequence[int],
        slots: int,
        ends: Sequence[int],
        temperature: float,
        top_p: float,
        seeds: Sequence[int] | None = None,
    ) -> None:
        # Neither peft's wrapper nor an adapter's arguments are needed: the layers themselves were replaced.
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.device = model.device
        self.on_gpu = self.device.type == "cuda"
        self.prompts, self.limits = prompts, limits
        self.temperature, self.top_p, self.given_seeds = temperature, top_p, seeds
        self.slots = min(slots, len(prompts))
        self.free = list(range(self.slots))
        self.running: dict[int, int] = {}  # the prompt's index by slot
        # The mask of an attention kernel wants rows whose length is a multiple of 8.
        length = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
        length = -(-length // 8) * 8
        config = self.model.config.get_text_config(decoder=True)
        # One position more than the longest answer has: what ended slots go on to choose is written there.
        self.longest = max(limits)
        self.answers = self._integers(self.slots, self.longest + 1)
        self.counts, self.places, self.most, self.ids = (self._integers(self.slots) for _ in range(4))
        self.seeds = None if seeds is None else self._integers(self.slots)
        self.has_ended = torch.ones(self.slots, dtype=torch.bool, device=self.device)
        self.rows = torch.arange(self.slots, device=self.device)
        self.keys = torch.arange(length, device=self.device)
        self.next_pass = _Pass(self.slots, length, self.rows, self.places)
        layers = DynamicCache(config=config).layers
        self.cache = Cache(layers=[_SlotLayer(self.next_pass) for _ in layers])
        self.ends = torch.tensor([*ends], dtype=torch.long, device=self.device)
        # The keys that the longest running answer has at most, which the host counts for itself.
        self.reached = [0] * self.slots
        # FlashAttention reads no key that a mask would hide; every other kernel reads them all.
        self.skips = self.on_gpu and config._attn_implementation == attention.VARLEN
        each = torch.arange(self.slots + 1, dtype=torch.int32, device=self.device)
        self.starts = (each, each * length)
        # Steps recorded as CUDA graphs, by the keys that they read; they share their memory.
        self.graphs: dict[int, Any] = {}
        # A graph cannot gather the layers of a model that several processes split.
        self.records = self.on_gpu and not is_split(self.model)
        self.pool = torch.cuda.graph_pool_handle() if self.records else None
        self.expanded: list[Any] | None = None

    def _integers(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.long, device=self.device)

    def read_prompts(self, waiting: deque[int]) -> None:
        """Compute the keys and values of waiting prompts in free slots, and the first token of each answer."""
        entering: list[int] = []
        total = 0
        while waiting and len(entering) < len(self.free):
            total += len(self.prompts[waiting[0]])
            if entering and total > PROMPT_TOKENS:
                break
            entering.append(waiting.popleft())
        taken, self.free = self.free[: len(entering)], self.free[len(entering) :]
        self.running.update(zip(taken, entering, strict=True))

        # The prompts are read as one pack, in which each attends to itself alone: no token of it is padding.
        prompts = [self.prompts[index] for index in entering]
        lengths = tuple(map(len, prompts))
        rows = [[slot] * length for slot, length in zip(taken, lengths, strict=True)]
        pack = torch.tensor(
            [[*chain.from_iterable(part)] for part in (prompts, map(range, lengths), rows)], device=self.device
        )
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=self.device)
        self.next_pass.rows, self.next_pass.places, self.next_pass.keys_read = pack[2], pack[1], None
        logits = self.model(
            input_ids=pack[:1],
            position_ids=pack[1:2],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=starts[1:].long() - 1,
            lengths=lengths,
            starts=starts,
        ).logits[0]  # (prompts, vocabulary)

        slots = torch.tensor(taken, device=self.device)
        seeds = None
        if self.seeds is not None and self.given_seeds is not None:
            seeds = torch.tensor([self.given_seeds[index] for index in entering], device=self.device)
            self.seeds[slots] = seeds
        first = torch.zeros_like(slots)
        tokens = choose_tokens(logits, self.temperature, self.top_p, seeds=seeds, places=first)
        most = torch.tensor([self.limits[index] for index in entering], device=self.device)
        self.answers[slots, 0] = self.ids[slots] = tokens
        self.counts[slots], self.most[slots] = 1, most
        self.places[slots] = torch.tensor(lengths, device=self.device)
        self.has_ended[slots] = self._ends_answer(tokens) | (most <= 1)
        for slot, length in zip(taken, lengths, strict=True):
            self.reached[slot] = length
        # After the first prompts, when all keys and values have their memory. The products of a single slot read
        # weights in 4 bits as they are.
        if self.expanded is None:
            self.expanded = _expandable(self.model, _free_memory()) if self.on_gpu and self.slots > 1 else []
            if self.expanded:
                keep_expanded(self.model)

    def _ends_answer(self, tokens: torch.Tensor) -> torch.Tensor:
        return (tokens.unsqueeze(1) == self.ends).any(1)

    def advance(self) -> None:
        """Decode the next tokens of all slots."""
        steps = STEPS if self.on_gpu else 1
        self.reached = [reached + steps for reached in self.reached]
        needed = max(self.reached[slot] for slot in self.running)
        length = self.next_pass.length
        read = length if self.skips else min(-(-needed // KEYS) * KEYS, length)
        for _ in range(steps):
            if self.records and read not in self.graphs:
                self._record(read)
            elif read in self.graphs:
                self.graphs[read].replay()
            else:
                self._step(read)

    def _step(self, read: int) -> None:
        """Decode the next token of all slots, reading `read` keys of each."""
        self.next_pass.rows, self.next_pass.places, self.next_pass.keys_read = self.rows, self.places, read
        layer: Any = self.cache.layers[0]
        hidden = self.keys[:read] > self.places.unsqueeze(1)
        mask = torch.zeros(hidden.shape, dtype=layer.keys.dtype, device=self.device).masked_fill_(hidden, -torch.inf)
        logits = self.model(
            input_ids=self.ids.unsqueeze(1),
            position_ids=self.places.unsqueeze(1),
            attention_mask=mask[:, None, None],  # (slots, heads, queries, keys)
            past_key_values=self.cache,
            use_cache=True,
            **({"slots": (*self.starts, (self.places + 1).int())} if self.skips else {}),
        ).logits[:, -1]

        # A slot whose answer has ended goes on with the others, and what it chooses is written out of the way.
        tokens = choose_tokens(logits, self.temperature, self.top_p, seeds=self.seeds, places=self.counts)
        runs = ~self.has_ended
        self.answers[self.rows, self.counts.masked_fill(self.has_ended, self.longest)] = tokens
        self.counts += runs
        self.places += runs
        self.has_ended |= self._ends_answer(tokens) | (self.counts >= self.most)
        self.ids.copy_(tokens)

    def take_ended(self) -> dict[int, list[int]]:
        """Return the token ids of the answers that have ended, by the prompt's index, and free their slots."""
        has_ended = self.has_ended.tolist()
        slots = [slot for slot in self.running if has_ended[slot]]
        if not slots:
            return {}
        chosen = torch.tensor(slots, device=self.device)
        counts, rows = self.counts[chosen].tolist(), self.answers[chosen].tolist()
        ended = {}
        for slot, count, row in zip(slots, counts, rows, strict=True):
            ended[self.running.pop(slot)] = row[:count]
            self.free.append(slot)
            self.reached[slot] = 0
        # A free slot attends to its first key alone until a question enters it.
        self.places[chosen] = 0
        return ended

    def _record(self, read: int) -> None:
        """Take a step, which compiles what has to be compiled, and record the next as a CUDA graph.

        If that is not possible, as where a layer waits for the GPU, all later steps are called one by one.
        """
        self._step(read)
        try:
            self.graphs[read] = capture(lambda: self._step(read), self.pool)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self.records = False
            print(f"a decoding step can't be recorded as a CUDA graph ({first_line(error)}); going on without")

    def release(self) -> None:
        """Free the dequantized weights."""
        for layer in self.expanded or ():
            vars(layer).pop("dequantized_weight", None)


def _free_memory() -> int:
    """Return the bytes that tensors can still take on the GPU."""
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - graph_pool_bytes()
    return int(torch.cuda.mem_get_info()[0]) + unused


def _expandable(model: nn.Module, free: int) -> list[Any]:
    """Return the layers whose dequantized weights are worth saving, and take at most half of `free` bytes; else none.

    Otherwise every step dequantizes all weights again, which takes longer than the products with them. Of a model that
    several processes split none has whole weights to save.
    """
    layers = [] if is_split(model) else quantized_layers(model)
    # Without an adapter bitsandbytes computes the products, and reads nothing that is saved.
    is_fused = any(hasattr(module, "layer_group") for module in model.modules())
    size = 0
    for layer in layers:
        size += layer.in_features * layer.out_features * (layer.compute_dtype or torch.float32).itemsize
    if not is_fused or size > free / 2 or any(hasattr(layer, "dequantized_weight") for layer in layers):
        return []
    return layers
