"""Break the library on purpose, one line at a time, and see whether a test notices.

    python tests/mutations.py            # all of them, some minutes on two cores
    python tests/mutations.py decay bias # those whose names contain one of these

Each mutation is a fault that a reader would not see in a loss curve. It is applied to a copy of the library, and the
tests that should notice run there; `tests/test_mutations.py` does the same for all. A mutation whose tests pass, or
whose line is no longer there, is a failure.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Pytest's exit status when tests ran and some of them failed; others mean that nothing was tested.
TESTS_FAILED = 1


@dataclass(frozen=True)
class Mutation:
    """Hold one fault: the text in `file` that is replaced, and the tests that should notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = [
    Mutation(
        "weight decay is never applied",
        "loop/trainer.py",
        '"weight_decay": self.args.weight_decay',
        '"weight_decay": 0.0',
        "tests/loop/test_trainer.py",
    ),
    Mutation(
        "the base layer's bias is dropped in the fused path",
        "kernels/lora_layers.py",
        "y.add_(base.bias)",
        "pass",
        "tests/kernels/test_lora_layers.py",
    ),
    Mutation(
        "gradients of A that are added in place lose LoRA's scale",
        "kernels/lora_layers.py",
        "lora_x, group.scale)\n        for total",
        "lora_x)\n        for total",
        "tests/kernels/test_gradients.py",
    ),
    Mutation(
        "gradients of the step before are never cleared",
        "kernels/gradients.py",
        "self.flat.zero_()",
        "pass",
        "tests/kernels/test_gradients.py",
    ),
    Mutation(
        "what fills a pass up belongs to its last conversation",
        "tokens/packing.py",
        "len(starts)), value=length)",
        "len(starts)), value=int(starts[-1]))",
        "tests/kernels/test_cuda_graphs.py",
    ),
    Mutation(
        "sliding windows are ignored in packs",
        "kernels/attention.py",
        " and not windowed",
        "",
        "tests/kernels/test_self_test.py",
    ),
    Mutation(
        "the speed is doubled",
        "loop/history.py",
        "(tokens - self.tokens_before) / seconds",
        "2 * (tokens - self.tokens_before) / seconds",
        "tests/loop/test_history.py",
    ),
    Mutation(
        "the head trains at the rate of the LoRA matrices",
        "loop/trainer.py",
        "config.head_learning_rate or config.learning_rate",
        "config.learning_rate",
        "tests/test_training.py -k own_learning_rate",
    ),
    Mutation(
        "passes without fused layers are not weighted by their answer tokens",
        "loop/passes.py",
        ".loss * (answered / answers)",
        ".loss",
        "tests/test_training.py -k faster_or_smaller",
    ),
    Mutation(
        "the checkpoint of the lowest held-out loss is pruned",
        "loop/checkpoints.py",
        "step_of(path) == best}",
        "False}",
        "tests/loop/test_checkpoints.py",
    ),
    Mutation(
        "the gradient of A lacks the scale alpha / rank",
        "kernels/lora_layers.py",
        "group.a[0].dtype, group.scale)",
        "group.a[0].dtype)",
        "tests/kernels/test_lora_layers.py",
    ),
    Mutation(
        "a model's own scale of attention scores is ignored in packs",
        "kernels/attention.py",
        "scale = query.shape[-1] ** -0.5 if scaling is None else scaling",
        "scale = query.shape[-1] ** -0.5",
        "tests/kernels/test_attention.py",
    ),
    Mutation(
        "the gradient of the head is not scaled by that of the loss",
        "kernels/loss.py",
        "weight_grad.mul_(scale)",
        "weight_grad",
        "tests/kernels/test_loss.py",
    ),
    Mutation(
        "token F1 counts a repeated word once",
        "evaluation/scores.py",
        "sum((Counter(given) & Counter(wanted)).values())",
        "len(set(given) & set(wanted))",
        "tests/evaluation/test_scores.py",
    ),
    Mutation(
        "McNemar's tail lacks its last term",
        "evaluation/scores.py",
        "range(min(gained, lost) + 1)",
        "range(min(gained, lost))",
        "tests/evaluation/test_scores.py",
    ),
    Mutation(
        "prompts of a batch are padded on the side of the answer",
        "evaluation/generation.py",
        'max(map(len, prompts.values())), "left"',
        'max(map(len, prompts.values())), "right"',
        "tests/evaluation/test_decoding.py",
    ),
    Mutation(
        "a slot attends to what an earlier answer left behind its own keys",
        "evaluation/decoding.py",
        "self.keys[:read] > self.places.unsqueeze(1)",
        "self.keys[:read] > self.places.max()",
        "tests/evaluation/test_decoding.py",
    ),
    Mutation(
        "the token that ends an answer carries no loss",
        "tokens/formats.py",
        "labels += [IGNORED] * len(answer) if index in conversation.shown else answer",
        "labels += [*answer[:-1], IGNORED]",
        "tests/tokens/test_formats.py",
    ),
    Mutation(
        "numbers are not split into digits in a packaged model",
        "models/packaged.py",
        "    split_digits(tokenizer)\n",
        "",
        "tests/models/test_packaged.py",
    ),
    Mutation(
        "a package's weights are read whatever their SHA-256",
        "models/packaged.py",
        "if digest.hexdigest() != package.sha256:",
        "if not digest.hexdigest():",
        "tests/models/test_packaged.py",
    ),
]


def copy_project(folder: Path) -> Path:
    """Copy library and tests into a folder, with links to what is only read, and return the copy's root.

    The copy lies beside a link to the real rows and tokenizers, as the project itself may.
    """
    root = folder / "project"
    root.mkdir()
    for path in ROOT.iterdir():
        if path.name in ("qlora_utils", "tests"):
            shutil.copytree(path, root / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.name not in (".git", "outputs"):
            (root / path.name).symlink_to(path)
    (root / "outputs").mkdir()
    if (ROOT.parent / "shared").exists():
        (folder / "shared").symlink_to(ROOT.parent / "shared")
    return root


def try_mutation(mutation: Mutation) -> str | None:
    """Return why a mutation was not caught, or None if a test failed on it."""
    with tempfile.TemporaryDirectory() as temporary:
        root = copy_project(Path(temporary))
        path = root / "qlora_utils" / mutation.file
        text = path.read_text()
        if text.count(mutation.old) != 1:
            return f"{mutation.file} holds {mutation.old!r} {text.count(mutation.old)} times; expected once"
        path.write_text(text.replace(mutation.old, mutation.new))

        # The tests of a suite that runs already, with workers, must not think that they are its part.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        options = ["-x", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", "not slow and not browser"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *mutation.tests.split()],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
        )
    if done.returncode == TESTS_FAILED:
        return None
    return f"pytest {mutation.tests} ended with {done.returncode}:\n{done.stdout[-1500:]}{done.stderr[-500:]}"


def main(parts: list[str]) -> int:
    """Try the mutations whose names contain one of the parts, or all; return the number not caught."""
    missed = 0
    for mutation in MUTATIONS:
        if parts and not any(part in mutation.name for part in parts):
            continue
        reason = try_mutation(mutation)
        missed += reason is not None
        print(f"{'caught' if reason is None else 'MISSED'}  {mutation.name}", flush=True)
        if reason:
            print(reason)
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
