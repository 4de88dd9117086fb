"""QLoRA fine-tuning for question answering: the library behind the numbered notebooks.

One module per notebook, in the order of the data flow: `data`, `quantization`, `lora`, `training`, `curves`, `answers`,
`playground`. Below them nine rooms, of which the README has the map. Importing the package loads none of them; each
imports torch and its kin only when it is itself imported.
"""

import logging
import os

__version__ = "0.1.0"

# PyTorch's OpenMP threads spin while they wait for one another, 30 billion rounds if nobody says otherwise. Where
# anything else wants the cores too, they take from each other what they wait for: training was 4 to 30 times slower.
# After 1,000 rounds a thread sleeps. OpenMP reads this once, when torch is loaded, so it is set here, before that;
# child processes inherit it. Measured in docs/experiments.md.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"

# On some CPUs bitsandbytes logs, when first imported by whatever imports it, that an optional faster kernel cannot be
# fetched. It changes nothing for us and is no news to a reader.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in record.msg)
# The same of Liger Kernel, which lists each optional implementation that is made for other chips.
logging.getLogger("liger_kernel.backends.registry").addFilter(lambda record: "could not be imported" not in record.msg)
