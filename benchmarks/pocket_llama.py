"""Build a pocket-sized Llama with a real tokenizer and random weights, to compare on without a GPU.

Its vocabulary is as large as the real model's, so its head and logits take an even larger share of
the work.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def build(tokenizer: str, folder: Path, *, hidden: int = 192, layers: int = 4, heads: int = 6, seed: int = 0) -> Path:
    """Write the model (fp32, safetensors) and its tokenizer into a folder, replacing files.

    Args:
        tokenizer: folder or hub id of the tokenizer, e.g. that of Llama-2.
        folder: to write into.
        hidden: size of the hidden states; the feed-forward layers are 8/3 of it wide.
        layers: number of blocks.
        heads: attention heads of each.
        seed: of the weights.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    known = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        vocab_size=len(known),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=4096,
        bos_token_id=known.bos_token_id,
        eos_token_id=known.eos_token_id,
        tie_word_embeddings=False,
    )
    # Random weights cost as much time as trained ones.
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    known.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", help="folder or hub id of the tokenizer")
    parser.add_argument("folder", type=Path, help="to write the model into")
    arguments = parser.parse_args()
    print(build(arguments.tokenizer, arguments.folder))
