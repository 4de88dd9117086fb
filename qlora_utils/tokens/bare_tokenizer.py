"""The part of a tokenizer that many rows are encoded with, without transformers around it (below `formats`)."""

from __future__ import annotations

import json
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# What the formats look up by name.
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "bos_token_id", "eos_token_id", "unk_token_id",
          "pad_token_id", "all_special_tokens", "all_special_ids")  # fmt: skip


class BareTokenizer:
    """Gives the ids that a transformers tokenizer gives with `add_special_tokens=False`, in less time.

    It pickles to its serialised form and imports `tokenizers` alone, so that a process is quick to start with it.
    """

    def __init__(self, serialised: str, kind: str, special: dict[str, Any]) -> None:
        """Take over what a tokenizer is made of.

        Args:
            serialised: the backend as `tokenizers` writes it.
            kind: class of the tokenizer it was taken from.
            special: its special tokens and their ids, by attribute name.
        """
        self.serialised, self.kind, self.special = serialised, kind, special

    def __getstate__(self) -> dict[str, Any]:
        return {"serialised": self.serialised, "kind": self.kind, "special": self.special}

    def __getattr__(self, name: str) -> Any:
        if name != "special" and name in self.special:
            return self.special[name]
        raise AttributeError(f"{type(self).__name__} has no {name}")

    @cached_property
    def _backend(self) -> Tokenizer:
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.serialised)

    def __call__(
        self,
        text: str | list[str],
        *,
        add_special_tokens: bool = False,
        split_special_tokens: bool = False,
        verbose: bool = False,
    ) -> dict[str, Any]:
        """`{"input_ids": …}` of one text or of several, as of a transformers tokenizer called with these arguments."""
        if add_special_tokens:
            raise ValueError("add_special_tokens: only False is known here")
        self._backend.encode_special_tokens = split_special_tokens
        texts = [text] if isinstance(text, str) else text
        ids = [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}

    def convert_ids_to_tokens(self, token: int) -> str:
        """What a token is called."""
        return str(self._backend.id_to_token(token))

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[Any]:
        """The id of each token, that of `<unk>` where there is no such token."""
        ids = [self._backend.token_to_id(token) for token in tokens]
        return [self.special["unk_token_id"] if token is None else token for token in ids]

    @cached_property
    def spells_all(self) -> bool:
        """Whether there is no text in which it would find `<unk>`: what is in no token falls back on bytes that are."""
        from tokenizers import pre_tokenizers

        stored = json.loads(self.serialised)
        model, unknown = stored["model"], self.special["unk_token"]
        if unknown is None:
            return True
        if model["type"] != "BPE" or any(t["content"] == unknown and not t["special"] for t in stored["added_tokens"]):
            return False
        vocabulary = model["vocab"].keys()
        if model.get("byte_fallback") and vocabulary >= {f"<0x{byte:02X}>" for byte in range(256)}:
            return True
        steps = stored["pre_tokenizer"] or {}
        last = steps["pretokenizers"][-1] if steps.get("type") == "Sequence" else steps
        return last.get("type") == "ByteLevel" and vocabulary >= set(pre_tokenizers.ByteLevel.alphabet())


def bare(tokenizer: PreTrainedTokenizerBase) -> BareTokenizer | None:
    """The part of a tokenizer that makes ids; None where that is not all in its backend."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(tokenizer)
    plain = isinstance(tokenizer, PreTrainedTokenizerFast) and (
        kind.__call__ is PreTrainedTokenizerBase.__call__ and kind._encode_plus is PreTrainedTokenizerFast._encode_plus  # type: ignore[attr-defined]
    )
    if not plain:
        return None
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    backend.no_padding()  # left from an earlier call, as is truncation
    backend.no_truncation()
    special = {name: getattr(tokenizer, name) for name in _NAMES}
    return BareTokenizer(backend.to_str(), f"{kind.__module__}.{kind.__qualname__}", special)
