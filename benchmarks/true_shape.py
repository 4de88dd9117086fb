"""Build a model at its true shape with random weights, to measure speed and memory.

    python benchmarks/true_shape.py --like llama2-7b --tokenizer FOLDER --out outputs/llama2-7b
    python benchmarks/true_shape.py --like flan-t5-large --rows ROWS --out outputs/flan-t5-large
    python benchmarks/true_shape.py --like qwen3-4b --tokenizer FOLDER --out outputs/qwen3-4b

Then `presets.py`, `compare.py`, `memory.py` and `answering.py` take the folder as the model. The
answers of such a model mean nothing. Without `--tokenizer` a tokenizer like T5's is trained on the
rows. With `--nf4 FOLDER` the model is stored once more, quantized as all tools quantize it: a
quarter of the size, so that many short trainings need not read and quantize it each time.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Imported before torch: it sets how long torch's threads spin while they wait.
import qlora_utils  # noqa: F401

# isort: split
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    T5ForConditionalGeneration,
)

from qlora_utils import quantization
from qlora_utils.config import RunConfig
from qlora_utils.kernels import attention, sharding
from qlora_utils.models import shapes
from qlora_utils.models.resolution import Resolved
from qlora_utils.rows.conversations import parse_rows
from qlora_utils.rows.files import read_source


def decoder(preset: str, layers: int | None) -> Any:
    """Build the causal model of a preset."""
    described = shapes.known(RunConfig.from_preset(preset).model)
    assert described is not None
    if layers:
        described["num_hidden_layers"] = layers
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**described))


def flan_t5_large() -> Any:
    """Build Flan-T5-Large, 783,150,080 parameters, its head not tied to the embeddings."""
    config: Any = AutoConfig.for_model(**shapes.FLAN_T5_LARGE)
    model = T5ForConditionalGeneration(config)
    # transformers 5 ties the head of every new T5, whatever the config says.
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * model.config.d_model**-0.5)
    model.config.tie_word_embeddings = False
    return model


DECODERS = ("llama2-7b", "qwen3-1.7b", "qwen3-4b", "llama3.1-8b")


def tokenizer_of(rows: str) -> Any:
    """Train a Unigram tokenizer with T5's special tokens on the texts of the rows."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    conversations, _ = parse_rows(row for part in read_source(rows).values() for row in part)
    text = [said for c in conversations for turn in c.turns for said in (turn.question, turn.answer)]
    # A SentencePiece-like Unigram model, as T5's tokenizer is.
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=32000, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[f"<extra_id_{number}>" for number in range(100)],
        model_max_length=512,
    )


def build(preset: str, folder: Path, tokenizer: Path | str | Any, *, layers: int | None = None) -> int:
    """Write a model of true shape and its tokenizer, and return the number of its parameters.

    Args:
        preset: whose model it is like.
        folder: to write.
        tokenizer: or the folder of one.
        layers: fewer than the model has, for a decoder (None: all).
    """
    if isinstance(tokenizer, (str, Path)):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    # Created in bf16 on the device itself: in fp32 the 7 billion weights would take 27 GB.
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = decoder(preset, layers) if preset in DECODERS else flan_t5_large()
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder, max_shard_size="5GB")
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def load_split(described: Any, config: RunConfig) -> Any:
    """Draw the weights of a causal model layer by layer, and load this process's part of it in NF4.

    The weights follow from their names, so that all processes draw the same.

    Args:
        described: transformers' config of the model.
        config: the run, with nothing left open.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    dtype = getattr(torch, config.compute_dtype)

    def draw(name: str, parameter: torch.Tensor) -> torch.Tensor:
        if "norm" in name:
            return torch.ones(parameter.shape, device=device, dtype=dtype)
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        return torch.randn(parameter.shape, device=device, dtype=dtype, generator=generator).mul_(0.02)

    attention.register()
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=sharding.STORAGE,
    )
    kernel = quantization.KERNELS[config.attention_kernel]
    model = sharding.load_split(described, draw, dtype=dtype, quantization_config=nf4, attn_implementation=kernel)
    return quantization.prepare_loaded(model, Resolved(config, config, "causal", {}))


def store_nf4(source: Path, folder: Path) -> None:
    """Store a causal model once more, its linear layers but the head in double-quantized NF4."""
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, quantization_config=quantization, device_map={"": 0 if on_gpu else "cpu"}
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build a model and print its size."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--like", required=True, choices=[*DECODERS, "flan-t5-large"])
    options.add_argument("--tokenizer", help="folder of the real tokenizer")
    options.add_argument("--rows", help="or rows to train one on")
    options.add_argument("--out", required=True, type=Path, help="folder to write")
    options.add_argument("--nf4", type=Path, help="folder for the same model in NF4; causal models only")
    given = options.parse_args(arguments)
    if not (given.tokenizer or given.rows):
        options.error("give --tokenizer or --rows")
    tokenizer = given.tokenizer or tokenizer_of(given.rows)
    count = build(given.like, given.out, tokenizer)
    print(f"{given.out}: {count:,} parameters with random values")
    if given.nf4:
        store_nf4(given.out, given.nf4)
        print(f"{given.nf4}: the same in NF4")
    return 0


if __name__ == "__main__":
    sys.exit(main())
