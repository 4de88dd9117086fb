"""Build a model at its true shape with random weights, to measure speed and memory.

    python benchmarks/true_shape.py --like llama2-7b --tokenizer FOLDER --out outputs/llama2-7b
    python benchmarks/true_shape.py --like flan-t5-large --rows ROWS --out outputs/flan-t5-large

Then `presets.py`, `compare.py`, `memory.py` and `answering.py` take the folder as the model. The
answers of such a model mean nothing. Without `--tokenizer` a tokenizer like T5's is trained on the
rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Imported before torch: it sets how long torch's threads spin while they wait.
import qlora_utils  # noqa: F401

# isort: split
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM, T5ForConditionalGeneration

from qlora_utils.models.shapes import FLAN_T5_LARGE, LLAMA_2_7B
from qlora_utils.rows.conversations import parse_rows
from qlora_utils.rows.files import read_source


def llama2_7b() -> Any:
    """Build Llama-2-7b, 6,738,415,616 parameters."""
    config: Any = AutoConfig.for_model(**LLAMA_2_7B)
    return LlamaForCausalLM(config)


def flan_t5_large() -> Any:
    """Build Flan-T5-Large, 783,150,080 parameters, its head not tied to the embeddings."""
    config: Any = AutoConfig.for_model(**FLAN_T5_LARGE)
    model = T5ForConditionalGeneration(config)
    # transformers 5 ties the head of every new T5, whatever the config says.
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * model.config.d_model**-0.5)
    model.config.tie_word_embeddings = False
    return model


MODELS = {"llama2-7b": llama2_7b, "flan-t5-large": flan_t5_large}


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Build a model and print its size."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--like", required=True, choices=MODELS)
    options.add_argument("--tokenizer", help="folder of the real tokenizer")
    options.add_argument("--rows", help="or rows to train one on")
    options.add_argument("--out", required=True, type=Path, help="folder to write")
    given = options.parse_args(arguments)
    if not (given.tokenizer or given.rows):
        options.error("give --tokenizer or --rows")
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer) if given.tokenizer else tokenizer_of(given.rows)
    torch.manual_seed(0)
    # Created in bf16 on the device itself: in fp32 the 7 billion weights would take 27 GB.
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = MODELS[given.like]()
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(given.out, max_shard_size="5GB")
    tokenizer.save_pretrained(given.out)
    print(f"{given.out}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer):,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
