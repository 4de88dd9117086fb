"""What a model is made of, as its config.json says: weights by kind, and what a forward pass keeps (notebook 03)."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_utils.config import ModelError, RunConfig
from qlora_utils.locate import is_path, locate, model_advice
from qlora_utils.models import files as model_files
from qlora_utils.models.files import Architecture

HEAD = "lm_head"  # the module that gives each token of the vocabulary its score
Linears = Mapping[str, tuple[int, int]]  # name of a layer → (in, out)


@dataclass(frozen=True, kw_only=True)
class Shape(ABC):
    """What a plan needs to know of a model: sizes in numbers, not bytes."""

    hidden: int
    intermediate: int
    vocabulary: int

    @property
    @abstractmethod
    def architecture(self) -> Architecture:
        """Causal or encoder-decoder."""

    @property
    @abstractmethod
    def blocks(self) -> tuple[tuple[int, Linears], ...]:
        """(how many there are, their linear layers by name) for each kind of block; the head is in none."""

    @property
    @abstractmethod
    def layers(self) -> int:
        """Layers that a token may pass, of all stacks."""

    @property
    @abstractmethod
    def norm_parameters(self) -> int:
        """Weights of the norms, and whatever else is small."""

    @property
    @abstractmethod
    def cached(self) -> int:
        """Numbers that generation keeps for each token, its keys and values in all layers."""

    @abstractmethod
    def longest(self, config: RunConfig) -> int:
        """Tokens of the longest example that a run may have."""

    @property
    def padding(self) -> float:
        """How many tokens are computed for each that is no padding."""
        return 1.0

    @property
    def layer_seconds(self) -> float:
        """What a host needs, roughly, to start the kernels of one layer, forward and back."""
        return 0.003

    @abstractmethod
    def activations(self, config: RunConfig, wide: int) -> tuple[int, int]:
        """Bytes for each token: what autograd keeps in one layer, and what of it stays until the backward pass.

        Args:
            config: the run, resolved.
            wide: bytes of a hidden value.
        """

    @property
    def in_fp32(self) -> tuple[str, ...]:
        """Linear layers that stay out of NF4, in fp32."""
        return ()

    @property
    def linear_parameters(self) -> int:
        """Weights of all linear layers but the head and those `in_fp32`: what NF4 stores."""
        return self._count(lambda name: name not in self.in_fp32)

    @property
    def fp32_parameters(self) -> int:
        """Weights of the layers `in_fp32`."""
        return self._count(lambda name: name in self.in_fp32)

    def _count(self, chosen: Any) -> int:
        return sum(
            count * sum(inside * outside for name, (inside, outside) in linears.items() if chosen(name))
            for count, linears in self.blocks
        )

    @property
    def largest_linear(self) -> int:
        """Weights of the largest layer that NF4 stores."""
        return max(
            inside * outside
            for _, linears in self.blocks
            for name, (inside, outside) in linears.items()
            if name not in self.in_fp32
        )

    @property
    def quantized_layers(self) -> int:
        """How many layers NF4 stores."""
        return sum(count * sum(name not in self.in_fp32 for name in linears) for count, linears in self.blocks)

    def adapted(self, config: RunConfig) -> list[tuple[int, tuple[int, int]]]:
        """(how many there are, (in, out)) of the layers that get an adapter."""
        names = [name.strip() for name in config.lora_targets.split(",")]
        return [
            (count, size)
            for count, linears in self.blocks
            for name, size in linears.items()
            if names == ["all-linear"] or name in names
        ]

    def lora_parameters(self, config: RunConfig) -> int:
        """Weights of the LoRA matrices."""
        return config.lora_r * sum(count * (inside + outside) for count, (inside, outside) in self.adapted(config))

    @property
    def head_parameters(self) -> int:
        """Weights of the head, and of the embeddings."""
        return self.vocabulary * self.hidden


@dataclass(frozen=True, kw_only=True)
class LlamaShape(Shape):
    """A causal language model of the Llama kind."""

    decoder_layers: int
    heads: int
    kv_heads: int
    head_size: int

    @property
    def architecture(self) -> Architecture:
        """Causal."""
        return "causal"

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self.decoder_layers

    @property
    def blocks(self) -> tuple[tuple[int, Linears], ...]:
        """The layers of one decoder layer."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        linears = {
            "q_proj": (self.hidden, queries), "k_proj": (self.hidden, keys), "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden), "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate), "down_proj": (self.intermediate, self.hidden),
        }  # fmt: skip
        return ((self.layers, linears),)

    @property
    def norm_parameters(self) -> int:
        """Two norms in each layer, and the last."""
        return (2 * self.layers + 1) * self.hidden

    @property
    def cached(self) -> int:
        """Keys and values."""
        return 2 * self.layers * self.kv_heads * self.head_size

    def longest(self, config: RunConfig) -> int:
        """One conversation."""
        return config.max_seq_len

    def activations(self, config: RunConfig, wide: int) -> tuple[int, int]:
        """As `Shape.activations`."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        adapted = [size for _, size in self.adapted(config)]
        layer = wide * (
            4 * self.hidden  # the residual stream before each norm, and what the norms make of it
            + 2 * queries + 2 * keys  # q, k, v and what attention makes of them
            + 3 * self.intermediate  # gate, up and their product
            + len(adapted) * config.lora_r  # x Aᵀ
        ) + 4 * (self.heads + 2)  # fmt: skip  # the softmax's sums, the norms' scales
        layer += _adapter_activations(adapted, config, wide)
        if not config.liger:
            # the norms' input in fp32 and what they made of it before the weight; the gate after SiLU
            layer += 4 * self.hidden + wide * self.intermediate
        return layer, wide * self.hidden if config.gradient_checkpointing else layer


@dataclass(frozen=True, kw_only=True)
class T5Shape(Shape):
    """An encoder-decoder of the T5 kind. Passes are taken to be half read and half written, which is the most."""

    encoder_layers: int
    decoder_layers: int
    heads: int
    head_size: int
    gated: bool = True

    @property
    def architecture(self) -> Architecture:
        """Encoder-decoder."""
        return "encoder-decoder"

    @property
    def layers(self) -> int:
        """Layers of both stacks."""
        return self.encoder_layers + self.decoder_layers

    @property
    def in_fp32(self) -> tuple[str, ...]:
        """The second half of each feed-forward, whose outputs grow large."""
        return ("wo",)

    @property
    def blocks(self) -> tuple[tuple[int, Linears], ...]:
        """Attention to oneself in both stacks and to the encoder in the decoder; feed-forward in both."""
        inner = self.heads * self.head_size
        attention = {"q": (self.hidden, inner), "k": (self.hidden, inner), "v": (self.hidden, inner),
                     "o": (inner, self.hidden)}  # fmt: skip
        up = (self.hidden, self.intermediate)
        forward = {**({"wi_0": up, "wi_1": up} if self.gated else {"wi": up}), "wo": (self.intermediate, self.hidden)}
        return ((self.layers + self.decoder_layers, attention), (self.layers, forward))

    @property
    def norm_parameters(self) -> int:
        """Norms, two in an encoder layer, three in a decoder layer and the last of each; and biases of place."""
        norms = 2 * self.encoder_layers + 3 * self.decoder_layers + 2
        return norms * self.hidden + 2 * 32 * self.heads

    @property
    def cached(self) -> int:
        """Keys and values: of what is read for attention across, of what is written for attention to oneself."""
        return 2 * self.decoder_layers * self.heads * self.head_size

    def longest(self, config: RunConfig) -> int:
        """Read and written."""
        return 2 * config.max_seq_len

    @property
    def padding(self) -> float:
        """Guanaco rows, steps of 16 in two passes, are 45 % full (`packing.real_share`)."""
        return 2.2

    @property
    def layer_seconds(self) -> float:
        """Measured with Flan-T5-Large: its norms and its GELU are many small kernels."""
        return 0.011

    def activations(self, config: RunConfig, wide: int) -> tuple[int, int]:
        """As `Shape.activations`, in the mean of all layers and of tokens read and written."""
        inner = self.heads * self.head_size
        adapted = {name: size for _, linears in self.blocks for name, size in linears.items()}
        chosen = [name.strip() for name in config.lora_targets.split(",")]
        adapted = {n: size for n, size in adapted.items() if chosen == ["all-linear"] or n in chosen}

        def adapter(names: tuple[str, ...]) -> int:
            sizes = [adapted[name] for name in names if name in adapted]
            return wide * config.lora_r * len(sizes) + _adapter_activations(sizes, config, wide)

        # the norm's input, in fp32 too, what it made of it in fp32, before and after its weight; dropout's mask
        norm = (3 * wide + 8 + 1) * self.hidden
        # q, k, v and what attention makes of them, and the softmax's sums. Where padding is masked, each layer makes a
        # tensor of bias and mask for every pair of tokens.
        attention = norm + wide * 4 * inner + 4 * self.heads + adapter(("q", "k", "v", "o"))
        masked = self.heads * config.max_seq_len * wide
        across_read = wide * 2 * inner + adapter(("k", "v"))  # for a token that is read
        across_written = masked + norm + wide * 2 * inner + 4 * self.heads + adapter(("q", "o"))
        # both halves, the steps of GELU and their product, or ReLU's output; dropout's mask
        steps = (6 if self.gated else 2) + ("wo" in adapted)
        forward = norm + (steps * wide + 1) * self.intermediate + adapter(("wi", "wi_0", "wi_1", "wo"))
        read = self.encoder_layers * (masked + attention + forward) + self.decoder_layers * across_read
        written = self.decoder_layers * (attention + across_written + forward)
        layer = (read + written) // (2 * self.layers)
        return layer, wide * self.hidden if config.gradient_checkpointing else layer


def _adapter_activations(adapted: list[tuple[int, int]], config: RunConfig, wide: int) -> int:
    """Bytes for each token of what the adapters of one layer keep besides x Aᵀ."""
    inside = sum(size[0] for size in adapted)
    total = 0
    if not config.fused_layers:  # peft: x in fp32, a copy of the base output, the output of the update
        total += 4 * inside + wide * sum(size[1] for size in adapted)
    if config.lora_dropout:
        total += (wide + 1) * inside
    return total


LLAMA_2_7B = LlamaShape(
    hidden=4096, decoder_layers=32, intermediate=11008, heads=32, kv_heads=32, head_size=128, vocabulary=32000
)
FLAN_T5_LARGE = T5Shape(
    hidden=1024, encoder_layers=24, decoder_layers=24, intermediate=2816, heads=16, head_size=64, vocabulary=32128
)
# Of presets, so that a plan needs no network and no login.
KNOWN = {"llama-2-7b-hf": LLAMA_2_7B, "llama-2-7b": LLAMA_2_7B, "flan-t5-large": FLAN_T5_LARGE}


def of(model_config: Any) -> Shape:
    """The shape of a model, from its transformers config.

    Raises:
        ModelError: it is neither like Llama nor like T5.
    """
    try:
        if model_config.is_encoder_decoder:
            return T5Shape(
                hidden=model_config.d_model,
                encoder_layers=model_config.num_layers,
                decoder_layers=model_config.num_decoder_layers or model_config.num_layers,
                intermediate=model_config.d_ff,
                heads=model_config.num_heads,
                head_size=model_config.d_kv,
                vocabulary=model_config.vocab_size,
                gated=model_config.is_gated_act,
            )
        heads = model_config.num_attention_heads
        return LlamaShape(
            hidden=model_config.hidden_size,
            decoder_layers=model_config.num_hidden_layers,
            intermediate=model_config.intermediate_size,
            heads=heads,
            kv_heads=getattr(model_config, "num_key_value_heads", None) or heads,
            head_size=getattr(model_config, "head_dim", None) or model_config.hidden_size // heads,
            vocabulary=model_config.vocab_size,
        )
    except AttributeError as error:
        raise ModelError(
            f"model: its config.json has no {error.name}; a plan needs a model like Llama or T5."
        ) from None


def known(source: str) -> Shape | None:
    """The shape of a hub id that is one of the presets, or a copy of one under another owner."""
    return None if is_path(source) else KNOWN.get(source.lower().rpartition("/")[2])


def read(source: str) -> Shape:
    """The shape of a local folder or hub id, without its weights; those of the presets are known without a look.

    Raises:
        ModelError: there is no config, or none of a model like Llama or T5.
    """
    return known(source) or of(_model_config(source))


@functools.cache
def architecture_of(source: str) -> Architecture:
    """Whether the model of a local folder or hub id continues a text or writes an answer to one.

    Its own config.json says so; of the models of the presets it is known without a look.

    Raises:
        ModelError: there is no such model; says what to do next.
    """
    if shape := known(source):
        return shape.architecture
    return "encoder-decoder" if _model_config(source).is_encoder_decoder else "causal"


def _model_config(source: str) -> Any:
    """The config of a local folder or hub id, as transformers reads it.

    Raises:
        ModelError: there is no such model; says what to do next.
    """
    from transformers import AutoConfig

    model_files.check_description(locate(source))
    try:
        return AutoConfig.from_pretrained(locate(source), trust_remote_code=False)
    except Exception as error:  # the hub client raises a dozen unrelated kinds
        raise ModelError(model_advice(locate(source), error)) from error
