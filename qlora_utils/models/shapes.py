"""Count what a model is made of, and what a forward pass saves for the backward pass (notebook 03).

Weights are counted from the model itself, built by transformers on the meta device: shapes without memory or values.
"""

from __future__ import annotations

import copy
import functools
import inspect
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from qlora_utils.config import ModelError, RunConfig
from qlora_utils.locate import PACKAGED, PACKAGED_MODELS, first_line, is_path, locate, model_advice
from qlora_utils.models import files as model_files
from qlora_utils.models.files import Architecture

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

# The module that gives each token of the vocabulary its score.
HEAD = "lm_head"

# The sizes in the config.json of these models, so that a plan of the presets needs no network and no login.
LLAMA_2_7B: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_2_70B = {
    **LLAMA_2_7B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8,
}  # fmt: skip
FLAN_T5_LARGE: dict[str, Any] = {
    "model_type": "t5", "vocab_size": 32128, "d_model": 1024, "d_ff": 2816, "d_kv": 64, "num_layers": 24,
    "num_decoder_layers": 24, "num_heads": 16, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0,
    "is_encoder_decoder": True, "tie_word_embeddings": False,
}  # fmt: skip
SMOLLM2_135M: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
_QWEN3: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "bos_token_id": 151643,
    "eos_token_id": 151645, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3_1_7B = {
    **_QWEN3, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16
}  # fmt: skip
QWEN3_4B = {
    **_QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32
}  # fmt: skip
LLAMA_3_1_8B: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 5e5, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "tie_word_embeddings": False,
}  # fmt: skip
STORED = {
    "llama-2-7b-hf": LLAMA_2_7B, "llama-2-7b": LLAMA_2_7B, "llama-2-70b-hf": LLAMA_2_70B, "llama-2-70b": LLAMA_2_70B,
    "flan-t5-large": FLAN_T5_LARGE, "qwen3-1.7b": QWEN3_1_7B,
    "qwen3-4b": QWEN3_4B, "llama-3.1-8b-instruct": LLAMA_3_1_8B, "meta-llama-3.1-8b-instruct": LLAMA_3_1_8B,
    "smollm2-135m-instruct": SMOLLM2_135M,
}  # fmt: skip


@dataclass(frozen=True)
class Linears:
    """Represent all linear layers of one name and one size."""

    name: str
    inputs: int
    outputs: int
    count: int
    # layers that stay out of NF4, since their outputs grow large
    in_fp32: bool
    # layers of attention, self or cross
    in_attention: bool

    @property
    def parameters(self) -> int:
        """Count the weights of one of these layers."""
        return self.inputs * self.outputs


@dataclass(frozen=True, kw_only=True)
class Shape(ABC):
    """Hold what a plan needs to know about a model: sizes in numbers, not bytes.

    `small_parameters` are norms, biases and embeddings of positions; `linears` are all linear layers but the head.
    """

    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    head_size: int
    linears: tuple[Linears, ...]
    embedding_parameters: int
    head_parameters: int
    # tied to the embeddings: both are one tensor
    head_is_tied: bool
    small_parameters: int

    @property
    @abstractmethod
    def architecture(self) -> Architecture:
        """Return causal or encoder-decoder."""

    @property
    @abstractmethod
    def layers(self) -> int:
        """Return the number of layers in all stacks."""

    @property
    @abstractmethod
    def cached_values(self) -> int:
        """Return how many numbers generation caches for each token: its keys and values in all layers."""

    @abstractmethod
    def longest_example(self, config: RunConfig) -> int:
        """Count the tokens of the longest example that a run can have."""

    @abstractmethod
    def activations(self, config: RunConfig, wide: int) -> tuple[int, int]:
        """Return a layer's bytes per token: what autograd saves, and what lasts until the backward pass.

        Args:
            config: the run, resolved.
            wide: bytes of a hidden value.
        """

    def recomputed_at_once(self, config: RunConfig, wide: int) -> int:
        """Return the bytes per token that exist while a recomputed layer, or a part of it, is computed again.

        Args: see `activations`.
        """
        return self.activations(config, wide)[0]

    @property
    def parts_per_layer(self) -> int:
        """Return in how many parts a layer is recomputed (`recomputation.Recomputation`)."""
        return 1

    @property
    def padding(self) -> float:
        """Return how many tokens are computed for each token that is not padding."""
        return 1.0

    @property
    def layer_seconds(self) -> float:
        """Return roughly the seconds that a host needs to launch the kernels of one layer, forward and backward."""
        return 0.003

    @property
    def linear_parameters(self) -> int:
        """Count the weights that NF4 stores: those of all linear layers but the head and the layers in fp32."""
        return sum(linears.count * linears.parameters for linears in self.linears if not linears.in_fp32)

    @property
    def fp32_parameters(self) -> int:
        """Count the weights of the linear layers that stay in fp32."""
        return sum(linears.count * linears.parameters for linears in self.linears if linears.in_fp32)

    @property
    def largest_linear(self) -> int:
        """Count the weights of the largest layer that NF4 stores."""
        return max(linears.parameters for linears in self.linears if not linears.in_fp32)

    @property
    def quantized_layers(self) -> int:
        """Return how many layers NF4 stores."""
        return sum(linears.count for linears in self.linears if not linears.in_fp32)

    def adapted(self, config: RunConfig) -> list[Linears]:
        """List the layers that get an adapter."""
        # peft adapts layers by the last part of their name, in all blocks alike
        names = [name.strip() for name in config.lora_targets.split(",")]
        if names == ["attention-linear"]:
            return [linears for linears in self.linears if linears.in_attention]
        return [linears for linears in self.linears if names == ["all-linear"] or linears.name in names]

    def lora_parameters(self, config: RunConfig) -> int:
        """Count the weights of the adapters: the LoRA matrices, and with DoRA a magnitude for each output."""
        adapted = self.adapted(config)
        widths = sum(linears.count * (linears.inputs + linears.outputs) for linears in adapted)
        magnitudes = sum(linears.count * linears.outputs for linears in adapted) if config.dora else 0
        return config.lora_r * widths + magnitudes


@dataclass(frozen=True, kw_only=True)
class DecoderShape(Shape):
    """Hold the sizes of a causal language model."""

    decoder_layers: int
    kv_heads: int
    # queries and keys have norms of their own, as in Qwen 3 and Gemma 3
    has_qk_norms: bool
    # its layers have the code of Llama's
    is_like_llama: bool

    @property
    def architecture(self) -> Architecture:
        """Return causal."""
        return "causal"

    @property
    def layers(self) -> int:
        """Return the number of decoder layers."""
        return self.decoder_layers

    @property
    def cached_values(self) -> int:
        """Return how many numbers generation caches for each token: its keys and values in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size

    def longest_example(self, config: RunConfig) -> int:
        """Count the tokens of the longest conversation."""
        return config.max_seq_len

    def activations(self, config: RunConfig, wide: int) -> tuple[int, int]:
        """Return what one layer saves and what stays, as `Shape.activations` says, for layers like those of Llama."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        layer = wide * (
            4 * self.hidden  # the residual stream before each norm, and the norms' output
            + 4 * queries  # q, k, v and the output of attention: k and v are repeated for every head of q
            + 3 * self.intermediate  # gate, up and their product
        ) + 4 * (self.heads + 2)  # fmt: skip  # the softmax's sums, the norms' scales
        if self.has_qk_norms:
            # their inputs in fp32, and a scale for each head
            layer += 4 * (queries + keys + self.heads + self.kv_heads)
        # layers can differ from each other, so adapters count as their mean over all layers
        adapters = sum(linears.count * _adapter_activations(linears, config, wide) for linears in self.adapted(config))
        layer += adapters // self.layers
        if not config.liger:
            # two bytes more for each norm's input, in fp32; the gate after SiLU
            layer += 4 * self.hidden + wide * self.intermediate
        return layer, wide * self.hidden if config.gradient_checkpointing else layer

    def recomputed_at_once(self, config: RunConfig, wide: int) -> int:
        """Return the bytes per token of the larger part: the feed-forward, or attention; see `Shape`."""
        layer, _ = self.activations(config, wide)
        if not (config.offload_activations and self.is_like_llama):
            return layer
        # the residual stream before a norm, and the norm's output, belong to both
        attention = wide * (2 * self.hidden + 2 * (self.heads + self.kv_heads) * self.head_size)
        return max(attention, layer - attention)

    @property
    def parts_per_layer(self) -> int:
        """Return two for layers with the code of Llama's: attention and feed-forward."""
        return 2 if self.is_like_llama else 1


@dataclass(frozen=True, kw_only=True)
class T5Shape(Shape):
    """Hold the sizes of an encoder-decoder of the T5 kind.

    Half of a pass's tokens count as read and half as written: that takes the most memory.
    """

    encoder_layers: int
    decoder_layers: int

    @property
    def architecture(self) -> Architecture:
        """Return encoder-decoder."""
        return "encoder-decoder"

    @property
    def layers(self) -> int:
        """Return the number of layers in both stacks."""
        return self.encoder_layers + self.decoder_layers

    @property
    def gated(self) -> bool:
        """Return True where the feed-forward multiplies two projections, as T5 1.1 and Flan-T5 do."""
        return any(linears.name == "wi_0" for linears in self.linears)

    @property
    def cached_values(self) -> int:
        """Count a token's cached keys and values: of cross-attention if read, of self-attention if written."""
        return 2 * self.decoder_layers * self.heads * self.head_size

    def longest_example(self, config: RunConfig) -> int:
        """Count the tokens of the longest example, read and written."""
        return 2 * config.max_seq_len

    @property
    def padding(self) -> float:
        """Return the padding of Guanaco rows: steps of 16 in two passes are 45 % full (`packing.real_share`)."""
        return 2.2

    @property
    def layer_seconds(self) -> float:
        """Return what was measured with Flan-T5-Large: its norms and its GELU are many small kernels."""
        return 0.011

    def activations(self, config: RunConfig, wide: int) -> tuple[int, int]:
        """Return what one layer saves and what stays, in the mean of all layers and of tokens read and written."""
        inner = self.heads * self.head_size
        adapted = {linears.name: linears for linears in self.adapted(config)}

        def adapters(*names: str) -> int:
            return sum(_adapter_activations(adapted[name], config, wide) for name in names if name in adapted)

        # the norm's input and result, both also in fp32; the result after its weight; dropout's mask
        norm = (3 * wide + 8 + 1) * self.hidden
        # q, k, v and the output of attention, and the softmax's sums. Where padding is masked, each layer makes a
        # tensor of bias and mask for every pair of tokens.
        attention = norm + wide * 4 * inner + 4 * self.heads + adapters("q", "k", "v", "o")
        masked = self.heads * config.max_seq_len * wide
        across_read = wide * 2 * inner + adapters("k", "v")  # for a token that is read
        across_written = masked + norm + wide * 2 * inner + 4 * self.heads + adapters("q", "o")
        # gated: both projections, three steps in GELU and its result; ReLU: two. An adapted wo saves its input, too
        steps = (6 if self.gated else 2) + ("wo" in adapted)
        # + 1: dropout's mask
        forward = norm + (steps * wide + 1) * self.intermediate + adapters("wi", "wi_0", "wi_1", "wo")
        read = self.encoder_layers * (masked + attention + forward) + self.decoder_layers * across_read
        written = self.decoder_layers * (attention + across_written + forward)
        layer = (read + written) // (2 * self.layers)
        return layer, wide * self.hidden if config.gradient_checkpointing else layer


def _adapter_activations(linears: Linears, config: RunConfig, wide: int) -> int:
    """Return the bytes for each token that the adapter of one layer saves."""
    saved = wide * config.lora_r  # x Aᵀ
    if not config.fused_layers:  # peft: x in fp32, a copy of the base output, the output of the update
        saved += 4 * linears.inputs + wide * linears.outputs
    if config.lora_dropout:
        saved += (wide + 1) * linears.inputs
    return saved


# ---------------------------------------------------------------------------------------------------- counting


def known(source: str) -> dict[str, Any] | None:
    """Return the stored config of a preset's model or of a copy of it under another owner; None for other models."""
    # A copy, since transformers changes a config that it is given in place.
    if source in PACKAGED_MODELS:
        return copy.deepcopy(STORED[source.removeprefix(PACKAGED)])
    return None if is_path(source) else copy.deepcopy(STORED.get(source.lower().rpartition("/")[2]))


def read(source: str) -> Shape:
    """Count the sizes of a model from the config.json of its folder or hub id; those of the presets are stored here.

    Raises:
        ModelError: there is no config, or it describes a model that a plan cannot count.
    """
    return count_shape(_model_config(source), source)


@functools.cache
def architecture_of(source: str) -> Architecture:
    """Return the architecture of the model of a local folder or hub id: causal or encoder-decoder.

    It is read from config.json; no model is built for it.

    Raises:
        ModelError: there is no such model; says what to do next.
    """
    if stored := known(source):
        return "encoder-decoder" if stored.get("is_encoder_decoder") else "causal"
    return "encoder-decoder" if _model_config(source).is_encoder_decoder else "causal"


@functools.cache
def ties_head(source: str) -> bool:
    """Return True if the head of the model of a local folder or hub id is the matrix of its embeddings.

    It is read from config.json; no model is built for it. An encoder-decoder has a head of its own: see `count_shape`.

    Raises:
        ModelError: there is no such model; says what to do next.
    """
    model_config = _model_config(source)
    return bool(model_config.tie_word_embeddings) and not model_config.is_encoder_decoder


@functools.cache
def hidden_size(source: str) -> int:
    """Return the width of a model's hidden values; 0 where its config does not say it or cannot be read."""
    try:
        return int(getattr(_model_config(source).get_text_config(), "hidden_size", 0))
    except ModelError:
        return 0


def _model_config(source: str) -> PreTrainedConfig:
    """Return the config of a local folder or hub id, as transformers reads it.

    Raises:
        ModelError: there is no such model; says what to do next.
    """
    from transformers import AutoConfig

    if stored := known(source):
        return AutoConfig.for_model(**stored)
    model_files.check_description(locate(source))
    model_files.check_offers(locate(source))
    try:
        return AutoConfig.from_pretrained(locate(source), trust_remote_code=False)
    except Exception as error:  # the hub client raises a dozen unrelated kinds
        raise ModelError(model_advice(locate(source), error)) from error


def count_shape(model_config: PreTrainedConfig, source: str = "") -> Shape:
    """Count the sizes of a config's model, without memory for its weights.

    Args:
        model_config: as transformers reads it.
        source: where it comes from, for errors.

    Raises:
        ModelError: the model cannot be built, or has parts that a plan cannot count; names the first of them.
    """
    model = build_empty(model_config, source)
    # annotated Any: to the type checker torch's modules have no weight that is a tensor
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    linears, small_parameters = _count_layers(model, source)
    if head is None or not linears:
        _refuse(source, f"it has {len(linears)} linear layers and {head} as head", "layers and a head")
    counted: dict[str, Any] = {
        "vocabulary": head.weight.shape[0],
        "linears": linears,
        "embedding_parameters": embeddings.weight.numel(),
        "head_parameters": head.weight.numel(),
        # transformers calls every T5 tied, but loads a separate head where the weights have one
        "head_is_tied": head.weight is embeddings.weight and not model_config.is_encoder_decoder,
        "small_parameters": small_parameters,
    }
    # the formulas of activations also need attributes that most configs of transformers share
    try:
        if model_config.is_encoder_decoder:
            shape: Shape = T5Shape(
                hidden=model_config.d_model,
                encoder_layers=model_config.num_layers,
                decoder_layers=model_config.num_decoder_layers,
                intermediate=model_config.d_ff,
                heads=model_config.num_heads,
                head_size=model_config.d_kv,
                **counted,
            )
        else:
            heads = model_config.num_attention_heads
            shape = DecoderShape(
                hidden=model_config.hidden_size,
                decoder_layers=model_config.num_hidden_layers,
                intermediate=max(linear.inputs for linear in linears),
                heads=heads,
                kv_heads=getattr(model_config, "num_key_value_heads", None) or heads,
                head_size=getattr(model_config, "head_dim", None) or model_config.hidden_size // heads,
                has_qk_norms=any(path.endswith(".q_norm") for path, _ in model.named_modules()),
                is_like_llama=any(computes_as_llama(module) for module in model.modules()),
                **counted,
            )
    except AttributeError as error:
        _refuse(source, f"its config.json has no {error.name}", "a model like Llama or T5")
    except RuntimeError as error:  # transformers raises it for an attribute that has a value for each layer
        _refuse(source, first_line(error), "layers that are all alike")
    _check_layers(shape, source)
    return shape


def computes_as_llama(layer: Any) -> bool:
    """Return whether a layer's forward pass has the very code of Llama's, as in Mistral, Qwen 2 and Qwen 3."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    own, llama = (inspect.unwrap(kind.forward) for kind in (type(layer), LlamaDecoderLayer))
    if not inspect.isfunction(own):
        return False
    ours, theirs = own.__code__, llama.__code__
    return (ours.co_code, ours.co_names, ours.co_varnames) == (theirs.co_code, theirs.co_names, theirs.co_varnames)


def build_empty(model_config: PreTrainedConfig, source: str = "") -> PreTrainedModel:
    """Build a config's model on the meta device: all of its modules, no memory for weights.

    Raises:
        ModelError: transformers cannot build it.
    """
    import torch

    loader = model_files.choose_loader("encoder-decoder" if model_config.is_encoder_decoder else "causal")
    try:
        with torch.device("meta"), model_files.quietly():
            return loader.from_config(model_config, trust_remote_code=False)
    except Exception as error:  # transformers raises all kinds for odd values in a config.json
        raise ModelError(
            f"model: the config.json of {source or model_config.model_type} describes no model that can be built "
            f"({first_line(error)}). Copy or download the model again."
        ) from error


def _count_layers(model: PreTrainedModel, source: str) -> tuple[tuple[Linears, ...], int]:
    """Count the linear layers by name and size, and the weights of all that is small.

    Raises:
        ModelError: a weight lies neither in a linear layer nor in an embedding nor in a norm.
    """
    from torch import nn

    names_in_fp32 = getattr(model, "_keep_in_fp32_modules", None) or ()
    # Tied weights are one parameter in several modules: each counts once. Head and embeddings are counted apart.
    apart = (model.get_output_embeddings(), model.get_input_embeddings())
    seen = {id(module.weight) for module in apart if module is not None}
    layers: Counter[tuple[str, int, int, bool]] = Counter()
    small = 0
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            # bitsandbytes quantizes this very class, no class derived from it
            if name == "weight" and type(module) is nn.Linear:
                attends = is_in_attention(path)
                layers[path.rpartition(".")[2], module.in_features, module.out_features, attends] += 1
            elif _is_small(module, name):
                small += parameter.numel()
            else:
                found = f"{path}.{name}, of shape {tuple(parameter.shape)}, belongs to a {type(module).__name__}"
                _refuse(source, found, "linear layers, embeddings and norms alone, no experts, convolutions or images")
    # layers of one name differ in size where blocks differ
    linears = []
    for (name, inputs, outputs, attends), count in layers.items():
        linears.append(Linears(name, inputs, outputs, count, name in names_in_fp32, attends))
    return tuple(linears), small


def is_in_attention(path: str) -> bool:
    """Return True for a module within an attention block, by the names that models have for it.

    Args:
        path: of the module, as `layers.0.self_attn.q_proj` or `block.0.layer.1.EncDecAttention.q`.
    """
    block = path.lower().rpartition(".")[0]
    return "attn" in block or "attention" in block


# Share of the layers' weights that may lie where neither NF4 nor LoRA reaches: short convolutions, routers.
UNSEEN_SHARE = 0.05


@functools.cache
def refuse_unseen_weights(source: str) -> None:
    """Refuse a model of which a good part lies in no linear layer, as the experts of a mixture do.

    NF4 would not shrink these weights, no adapter would reach them, and no merge would find them.

    Args:
        source: local folder or hub id.

    Raises:
        ModelError: names the largest of these weights; or there is no such model.
    """
    from torch import nn

    model = build_empty(_model_config(source), source)
    apart = (model.get_output_embeddings(), model.get_input_embeddings())
    linear = unseen = 0
    largest: tuple[int, str] = (0, "")
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if module in apart or parameter.dim() < 2 or _is_small(module, name):
                continue
            if type(module) is nn.Linear:
                linear += parameter.numel()
                continue
            unseen += parameter.numel()
            found = f"{path}.{name}, of shape {tuple(parameter.shape)}, belongs to a {type(module).__name__}"
            largest = max(largest, (parameter.numel(), found), key=lambda pair: pair[0])
    if unseen > UNSEEN_SHARE * (linear + unseen):
        raise ModelError(
            f"model: {source} has {unseen / (linear + unseen):.0%} of its layers' weights outside of linear layers "
            f"({largest[1]}): they would be neither quantized nor trained nor merged. Take a model of linear layers, "
            "such as Llama, Qwen 3 or Gemma 3."
        )


def _is_small(module: nn.Module, name: str) -> bool:
    """Return True for a parameter of a norm, of an embedding of positions, or a bias of a linear layer."""
    from torch import nn

    if isinstance(module, nn.Linear):
        return name == "bias"
    return isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower()


def _check_layers(shape: Shape, source: str) -> None:
    """Refuse layers whose activations the formulas of `Shape.activations` do not count.

    Raises:
        ModelError: experts in a layer, attention or feed-forward of another kind.
    """
    names: Counter[str] = Counter()
    for linears in shape.linears:
        names[linears.name] += linears.count
    # the formulas for T5 add up its layers by name
    if isinstance(shape, T5Shape):
        if other := sorted(names.keys() - {"q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"}):
            _refuse(source, f"its layers hold a {other[0]}", "an encoder-decoder with the layers of T5")
        return
    # more layers of one name than blocks: they are experts, or the blocks are of another kind
    name, count = names.most_common(1)[0]
    if count > shape.layers:
        found = f"it has {count} linear layers named {name} in {shape.layers} blocks"
        _refuse(source, found, "at most one in each, since experts are not counted")
    # the output projection takes what all heads make; compressed attention has heads of other sizes
    queries = shape.heads * shape.head_size
    if all(linears.inputs != queries for linears in shape.linears):
        _refuse(source, f"no layer takes the {shape.heads} heads of {shape.head_size} values", "attention as in Llama")


def _refuse(source: str, found: str, expected: str) -> NoReturn:
    raise ModelError(
        f"model: {source or 'this config'} cannot be planned: {found}; expected {expected}. Plan another model, or run "
        "this one without a plan: what is open is then chosen for the least memory."
    )
