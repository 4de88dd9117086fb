"""QLoRA fine-tuning for question answering: the library behind the numbered notebooks.

One module per notebook, in the order of the data flow: `data`, `quantization`, `lora`, `training`, `curves`,
`answers`, `playground`. Shared by all: `config`, `run_directory`, `runner`, `report`, `cli`. Importing the package
loads none of them; each imports torch and its kin only when it is itself imported.
"""

__version__ = "0.1.0"
