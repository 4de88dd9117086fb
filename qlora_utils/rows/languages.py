"""Which languages conversations are in, and what each costs in tokens (notebook 01).

py3langid tells 140 languages by the short byte sequences that are typical of each, without a network: Lui and Baldwin,
langid.py, 2012, https://aclanthology.org/P12-3005/. What it is not sure of is called so.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_utils.rows.conversations import Conversation
from qlora_utils.style import BLUE, SKY, on_terminal, unframed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

SAMPLE = 2000  # conversations that are looked at: two seconds
SURE = 0.8  # probability; below, nothing is claimed
UNKNOWN = 0.05  # share of unknown tokens; with more, how much of a text a token holds says nothing
LEAST = 0.01  # share of a sample that a language needs to be named by itself
UNSURE, OTHERS = "unsure", "other languages"
NAMES = {
    "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "ca": "Catalan", "cs": "Czech", "da": "Danish", "de": "German",
    "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian", "eu": "Basque", "fa": "Persian", "fi": "Finnish",
    "fr": "French", "gl": "Galician", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian",
    "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "la": "Latin", "lt": "Lithuanian",
    "lv": "Latvian", "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian",
    "ru": "Russian", "sk": "Slovak", "sl": "Slovenian", "sr": "Serbian", "sv": "Swedish", "th": "Thai", "tr": "Turkish",
    "uk": "Ukrainian", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip


@dataclass(frozen=True)
class Language:
    """The conversations of a sample that are in one language: of each what is asked and answered, the format left out.

    `tokens`, `characters` and `unknown` have one number for each conversation.
    """

    name: str
    tokens: list[int]
    characters: list[int]
    unknown: list[int]  # of the tokens: each stands for a stretch of any length that the vocabulary cannot spell

    @property
    def characters_per_token(self) -> float | None:
        """How much of a text one token holds; None where too many are unknown to say."""
        if self.unknown_share > UNKNOWN:
            return None
        return sum(self.characters) / max(1, sum(self.tokens))

    @property
    def unknown_share(self) -> float:
        """Of all its tokens."""
        return sum(self.unknown) / max(1, sum(self.tokens))


def language(text: str) -> str:
    """The language of a text by its English name, or `unsure`. The first 2,000 characters tell."""
    code, probability = _identifier().classify(text[:2000])
    return NAMES.get(code, str(code)) if probability >= SURE else UNSURE


def by_language(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, sample: int = SAMPLE
) -> list[Language]:
    """A random sample of conversations by language, the commonest first.

    Questions and answers are judged together: alone, many are too short, or hold little but a name.
    Languages of less than a hundredth of the sample come together as `other languages`, then what is `unsure`.

    Args:
        conversations: to look at.
        tokenizer: that makes tokens of them; nothing is cut.
        seed: of the sample.
        sample: conversations in it, at most.
    """
    chosen = sorted(random.Random(seed).sample(range(len(conversations)), min(sample, len(conversations))))
    texts = [_said(conversations[number]) for number in chosen]
    options: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    encoded: Any = tokenizer(texts, **options)["input_ids"] if texts else []
    found: dict[str, Language] = {}
    unknown = tokenizer.unk_token_id  # None: it spells everything
    for text, ids in zip(texts, encoded, strict=True):
        name = language(text)
        into = found.setdefault(name, Language(name, [], [], []))
        into.tokens.append(len(ids))
        into.characters.append(len(text))
        into.unknown.append(0 if unknown is None else ids.count(unknown))
    unsure = [found.pop(UNSURE)] if UNSURE in found else []
    ranked = sorted(found.values(), key=lambda one: (-len(one.tokens), one.name))
    large = [one for one in ranked if len(one.tokens) >= LEAST * len(chosen)]
    small = ranked[len(large) :]
    return [*large, *([_together(small)] if small else []), *unsure]


def _together(small: Sequence[Language]) -> Language:
    parts = [[number for one in small for number in getattr(one, name)] for name in ("tokens", "characters", "unknown")]
    return Language(OTHERS, *parts)


def _said(conversation: Conversation) -> str:
    return " ".join(f"{turn.question} {turn.answer}" for turn in conversation.turns)


@functools.cache
def _identifier() -> Any:
    """The model of py3langid, read once: it takes a second."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language_table(found: Sequence[Language]) -> str:
    """Conversations, median of their tokens, and characters per token of each language, as lines of text.

    Where a tokenizer has no token for some of the text, the share of its tokens that do spell it stands beside.
    """
    import statistics

    whole = sum(len(one.tokens) for one in found)
    unknown = any(sum(one.unknown) for one in found)
    head = f"{'':<17}{'conversations':>20}{'median tokens':>15}{'characters/token':>18}"
    lines = [f"{head}{'spelled':>10}" if unknown else head]
    for one in found:
        count = f"{len(one.tokens):,} ({len(one.tokens) / whole:.0%})"
        middle = statistics.median(one.tokens)
        spelled = f"{_spelled(one):>10}" if unknown else ""
        lines.append(f"{on_terminal(one.name):<17}{count:>20}{middle:>15,.0f}{_held(one):>18}{spelled}")
    if any(one.characters_per_token is None for one in found):
        lines.append(
            "A language that is not spelled looks cheap: the tokenizer takes each stretch that it has\n"
            "no tokens for as one <unk>, and a model can neither read nor write it."
        )
    return "\n".join(lines)


def _held(one: Language) -> str:
    return "–" if one.characters_per_token is None else f"{one.characters_per_token:.1f}"


def _spelled(one: Language) -> str:
    """The share of tokens that are known, never rounded up to all."""
    return f"{min(1 - one.unknown_share, 0.99 if sum(one.unknown) else 1.0):.0%}"


def plot_languages(found: Sequence[Language], ax: Axes) -> Figure:
    """Tokens per conversation for each language: the middle half, 90 %, the median; on the right, what a token holds.

    Of a language that the tokenizer cannot spell, the share of tokens that are known stands there instead.

    Args:
        found: from `by_language`.
        ax: to draw on; its height should grow with the number of languages.
    """
    import numpy
    from matplotlib.ticker import LogLocator

    for place, one in enumerate(found):
        low, first, middle, third, high = numpy.percentile(one.tokens, (5, 25, 50, 75, 95))
        ax.plot([low, high], [place, place], color=SKY, linewidth=2, solid_capstyle="butt")
        ax.plot([first, third], [place, place], color=BLUE, linewidth=9, solid_capstyle="butt")
        ax.plot(middle, place, "o", color="white", markeredgecolor="black", markersize=7)
        beside = f"spelled: {_spelled(one)}" if one.characters_per_token is None else _held(one)
        ax.annotate(beside, (1.02, place), xycoords=("axes fraction", "data"), va="center")
    ax.annotate("characters\nper token", (1.0, 1.01), xycoords="axes fraction", fontsize="small")
    ax.set_yticks(range(len(found)), [f"{one.name} ({len(one.tokens):,})" for one in found])
    ax.set_ylim(len(found) - 0.5, -0.5)
    ax.set(xlabel="tokens of question and answer: median, middle half, 90 %")
    if ax.get_xlim()[1] > 10 * max(1.0, ax.get_xlim()[0]):  # of pocket questions a linear scale shows more
        ax.set(xscale="log", xlabel=f"{ax.get_xlabel()} (logarithmic)")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_minor_formatter("")
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set_title("What each language costs in tokens", loc="left")
    unframed(ax, grid="x")
    return ax.get_figure()  # type: ignore[return-value]
