"""Fine-tune language models for question answering with QLoRA: the library behind the notebooks.

There is one module per notebook, in the order of the data flow: `data`, `quantization`, `lora`,
`training`, `curves`, `answers`, `playground`. Below them are nine packages; the README describes
each. Importing `qlora_utils` imports none of them, and not torch either.
"""

import logging
import os
import sys

__version__ = "0.1.0"

# PyTorch's OpenMP threads spin while they wait for one another, by default for 30 billion rounds.
# If other processes use the cores too, spinning threads keep the one they wait for from running:
# training was 4 to 30 times slower. With this setting a thread sleeps after 1,000 rounds. OpenMP
# reads it once, when torch is loaded, so it is set here, before that; child processes inherit it.
# Measured in docs/experiments.md.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"

# Blocks of GPU memory that grow fit whatever comes next: without this setting up to a fifth of what PyTorch reserves
# lies idle between tensors. It is read when the first tensor is made on a GPU, and known on Linux alone.
if sys.platform == "linux" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

# On some CPUs bitsandbytes logs at import that an optional faster kernel cannot be fetched. The
# results are the same, and a reader can't do anything about it.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in record.msg)
# Liger Kernel logs each optional implementation that is made for other chips.
logging.getLogger("liger_kernel.backends.registry").addFilter(lambda record: "could not be imported" not in record.msg)
