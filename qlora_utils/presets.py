"""Define the presets: complete sets of values, each tested as a whole."""

from __future__ import annotations

from typing import Any

# Common to both pocket presets: they train in minutes on two CPU cores, with the files of data/.
_POCKET = {
    "dataset": "embedded:pocket",
    "lora_r": 16,
    "lora_alpha": 16,
    "learning_rate": 1e-3,
    "head_learning_rate": 1e-4,
    "steps": 250,
    "batch_size": 16,
    "gradient_checkpointing": False,
    # The weights stay in NF4, and their dequantized numbers, 7 MB at most, are not computed anew for every product.
    "keep_expanded": True,
    "micro_batch_tokens": 1024,
    "optimizer": "adamw_torch",
    "eval_steps": 25,
    "eval_rows": 160,
    "trace_rows": 48,
    "max_new_tokens": 48,
    "answer_batch_size": 64,
}
# Common to the chat models of today, which differ in size alone; docs/models.md says where each value comes from.
_CHAT = {
    "dataset": "mlabonne/guanaco-llama2-1k",
    "held_out_rows": 50,
    "max_seq_len": 2048,
    "lora_r": 16,
    "lora_alpha": 32,
    # Their heads are tied to the embeddings, or larger than all adapters together.
    "train_head": False,
    "learning_rate": 2e-4,
    "head_learning_rate": 2e-5,
    "lr_scheduler": "cosine",
    "warmup_ratio": 0.03,
    "steps": 240,
    "batch_size": 8,
    "eval_steps": 40,
    "save_steps": 80,
    "score_rows": 50,
    "answer_batch_size": 64,
}
PRESETS: dict[str, dict[str, Any]] = {
    "pocket": {**_POCKET, "model": "embedded:pocket/model", "max_seq_len": 512},
    # From the well-known tutorial recipe; docs/models.md lists what differs.
    "llama2-7b": {
        "model": "meta-llama/Llama-2-7b-hf",
        "dataset": "mlabonne/guanaco-llama2-1k",
        "held_out_rows": 50,
        "max_seq_len": 2048,
        "lora_r": 64,
        "lora_alpha": 16,
        "learning_rate": 2e-4,
        "head_learning_rate": 2e-5,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.03,
        "weight_decay": 0.001,
        "max_grad_norm": 0.3,
        "steps": 250,
        "batch_size": 4,
        "score_rows": 50,
        "answer_batch_size": 64,
    },
    # The QLoRA paper's recipe for Guanaco 65B, with the head trained beside it; docs/models.md lists what differs. No
    # card below 80 GB holds it whole: `qlora plan --preset llama2-70b --gpu 3090 --gpus 4`.
    "llama2-70b": {
        "model": "meta-llama/Llama-2-70b-hf",
        "dataset": "mlabonne/guanaco-llama2-1k",
        "held_out_rows": 50,
        "max_seq_len": 2048,
        "lora_r": 64,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "learning_rate": 1e-4,
        "head_learning_rate": 1e-5,
        "lr_scheduler": "constant",
        "warmup_ratio": 0.0,
        "max_grad_norm": 0.3,
        "steps": 180,
        "batch_size": 16,
        "eval_steps": 30,
        "save_steps": 60,
        "score_rows": 50,
        "answer_batch_size": 16,
    },
    # Small, middle and large.
    "qwen3-1.7b": {**_CHAT, "model": "Qwen/Qwen3-1.7B"},
    "qwen3-4b": {**_CHAT, "model": "Qwen/Qwen3-4B"},
    "llama3.1-8b": {**_CHAT, "model": "meta-llama/Llama-3.1-8B-Instruct"},
    # A model that has read the world, on any machine: a package brings its weights. On two CPU cores it takes a
    # quarter of an hour, which decides steps, lengths and the number of questions; see docs/models.md.
    "smollm2": {
        "model": "packaged:smollm2-135m-instruct",
        "dataset": "embedded:pocket",
        "max_seq_len": 512,
        "lora_r": 16,
        "lora_alpha": 16,
        # The head is tied to the embeddings, and would be a fifth of the model to train.
        "train_head": False,
        "learning_rate": 1e-3,
        "steps": 200,
        "batch_size": 8,
        "gradient_checkpointing": False,
        "keep_expanded": True,
        "micro_batch_tokens": 1024,
        "eval_rows": 80,
        "trace_rows": 16,
        "score_rows": 100,
        "max_new_tokens": 48,
        "answer_batch_size": 64,
    },
    # The same text and the same questions, for an encoder-decoder.
    "pocket-t5": {**_POCKET, "model": "embedded:pocket-t5/model", "max_seq_len": 256, "packing": False},
    # The recipe from which the T5 part of this project was developed.
    "flan-t5-large": {
        "model": "google/flan-t5-large",
        "dataset": "mlabonne/guanaco-llama2-1k",
        "held_out_rows": 50,
        "max_seq_len": 512,
        "packing": False,
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "lora_targets": "q,v",
        "learning_rate": 8e-5,
        "lr_scheduler": "reduce_lr_on_plateau",
        "warmup_ratio": 0.0,
        "steps": 250,
        "batch_size": 16,
        "eval_steps": 25,
        "trace_rows": 16,
        "score_rows": 50,
        "answer_batch_size": 64,
    },
}
