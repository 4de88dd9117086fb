"""Word questions otherwise by rule, so that a model trained on few of them answers other wordings too (notebook 01).

The rules are for English. They are to change how something is asked and never what: numbers and names
stay as they are, and a word that carries meaning does or gives way to one that means the same. Rules
understand nothing: read what they make of your own questions. A question in another language, or one
that no rule fits, is left alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from qlora_utils.config import RunConfig
from qlora_utils.rows.conversations import Conversation

# Words that open an English question.
_ASKING = (
    "what", "when", "where", "who", "whom", "whose", "which", "why", "how", "for how long", "at what", "on which",
    "is", "are", "was", "were", "do", "does", "did", "can", "could", "may", "might", "must", "should", "will", "would",
    "has", "have", "had", "am",
)  # fmt: skip
_OPENS = re.compile(rf"(?:{'|'.join(_ASKING)})\b", re.IGNORECASE)
# Of these, other languages have some too: such a question has another English word as well.
_SHARED = frozenset({"is", "was", "will", "am", "are", "has", "had", "can"})
_ENGLISH = frozenset(
    {"the", "a", "an", "i", "you", "we", "they", "my", "your", "it", "there", "this", "of", "with", "to", "for", "if"}
)
# A long question, or one of several lines, is a text of its own, which frames and orders would not fit.
LONGEST_WORDS = 30
LONGEST_TOPIC = 6

# What surrounds a question, which itself stays whole.
_FRAMES = (
    "Hello! {Q}?", "Hi, {q}?", "Excuse me, {q}?", "Quick question: {q}?", "I have a question. {Q}?",
    "Can you tell me: {q}?", "Could you help me? {Q}?", "Please tell me: {q}?", "One thing I'd like to know: {q}?",
    "Sorry to bother you, {q}?", "{Q}, please?", "{Q}? Thanks!", "{Q}? I'm not sure.", "Do you happen to know: {q}?",
    "My friend asks: {q}?", "I was wondering, {q}?", "So, {q}?", "{Q}? Please let me know.", "{q}", "{q}?", "{Q}",
)  # fmt: skip
# What surrounds an indirect question, such as `when it opens`.
_INDIRECT_FRAMES = (
    "Can you tell me {q}?", "Could you tell me {q}, please?", "I'd like to know {q}.", "Please tell me {q}.",
    "Tell me {q}.", "I want to find out {q}.", "Do you know {q}?", "I wonder {q}.", "Let me know {q}.",
    "I need to know {q}.", "I'm not sure {q}.", "Would you explain {q}?", "My question is {q}.",
    "Nobody could tell me {q}.",
)  # fmt: skip
# What surrounds the thing that is asked for, such as `the fine for a late book`.
_TOPIC_FRAMES = (
    "Tell me {q}.", "I'm asking about {q}.", "I'd like to know {q}.", "What about {q}?", "{Q}?", "{q}", "{Q}, please.",
    "I have a question about {q}.", "Information about {q}, please.",
)  # fmt: skip

# Beginnings that ask the same.
_OPENINGS = (
    (r"for how long (may|can) i\b", ("how long can I", "for how long am I allowed to", "what is the longest I can")),
    (r"how long (may|can) i\b", ("for how long may I", "for how long am I allowed to", "what is the longest I can")),
    (r"how many things (may|can) i\b", ("what is the largest number of things I can",)),
    (r"how often (may|can) i\b", ("how many times can I", "how many times am I allowed to")),
    (r"how (do|can|may) i\b", ("how can I", "how do you", "what do I do to", "what is the way to", "how does one")),
    (r"what do i do\b", ("what should I do", "what happens", "what must I do", "what am I supposed to do")),
    (r"what do i need to\b", ("what do I have to", "what must I", "what should I")),
    (r"(may|can|could) i\b", ("am I allowed to", "is it possible to", "could I", "can I", "may I", "is it okay to")),
    (r"(may|can) we\b", ("are we allowed to", "is it possible to", "could we")),
    (r"is there a way to\b", ("is it possible to", "how can I")),
    (r"is there any\b", ("do you have any", "have you got any")),
    (r"is there\b", ("do you have", "have you got", "is there any chance of")),
    (r"are there\b", ("do you have", "have you got")),
    (r"who (may|can)\b", ("who is allowed to", "which people can", "who has the right to")),
    (r"where is\b", ("where do I find", "where can I find", "how do I get to", "where exactly is")),
    (r"what does it cost to\b", ("how much is it to", "how much does it cost to", "what do I pay to")),
    (r"how much does it cost to\b", ("what does it cost to", "what do I pay to")),
)  # fmt: skip
# Prices: `what does a card cost` and `how much is a card` ask the same.
_PRICE = re.compile(r"(?:what|how much) (?:does|do) (?P<thing>(?!it\b).+?) cost(?P<rest>\b.*)", re.IGNORECASE)
_PRICES = ("how much is {thing}{rest}", "what is the price of {thing}{rest}", "how much do I pay for {thing}{rest}",
           "how expensive is {thing}{rest}", "what do you charge for {thing}{rest}")  # fmt: skip

# Words of everyday life that mean the same in a question, whatever it is about.
SYNONYMS: tuple[tuple[str, ...], ...] = (
    ("close", "shut"), ("closes", "shuts"), ("closed", "shut"), ("begin", "start"), ("begins", "starts"),
    ("lose", "misplace", "mislay"), ("lost", "misplaced", "missing"), ("keep", "hold on to"),
    ("borrow", "take out", "take home", "check out"), ("borrowed", "taken out", "on loan"),
    ("renew", "extend", "prolong"), ("renewed", "extended", "prolonged"), ("reserve", "put on hold"),
    ("return", "bring back", "give back", "hand in", "take back"), ("bring", "take along"), ("loan", "borrowed item"),
    ("the fine", "the penalty", "the charge", "the fee"), ("fines", "penalties", "charges", "fees"),
    ("fee", "charge", "price"), ("film", "movie", "DVD"), ("films", "movies", "DVDs"),
    ("magazine", "journal", "periodical"), ("a book", "a volume"), ("books", "volumes"), ("newspaper", "paper"),
    ("children", "kids", "young people", "little ones"), ("child", "kid"), ("parents", "mum and dad"),
    ("wireless internet", "wifi", "WLAN", "internet access"), ("internet", "web"), ("computer", "PC"),
    ("computers", "PCs"), ("eat", "have a snack", "have some food"), ("quiet", "silent", "calm"),
    ("get into", "enter", "get inside", "access"),
    ("reach", "contact", "get in touch with", "get hold of"), ("become a member", "join", "sign up", "register"),
    ("print", "make printouts", "use a printer"), ("at a time", "at once", "at the same time", "in one go"),
    ("things", "items"), ("weekdays", "working days"), ("give", "pass on", "hand over"), ("buy", "purchase", "get"),
    ("telephone", "phone"), ("allowed", "permitted"), ("repair", "fix", "mend"), ("big", "large"),
    ("doctor", "physician"), ("car", "vehicle"), ("bill", "invoice"), ("parcel", "package"), ("holiday", "vacation"),
    ("holidays", "vacation"), ("cancel", "call off"), ("choose", "pick", "select"), ("receive", "get", "obtain"),
    ("delete", "erase", "remove"), ("sign up", "register", "enrol"), ("register", "sign up", "enrol"),
    ("mistake", "error"), ("photo", "picture"), ("teacher", "instructor"), ("customer", "client"),
    ("customers", "clients"), ("shop", "store"), ("delivery", "shipment"), ("discount", "reduction"),
    ("toilet", "bathroom", "restroom"), ("lift", "elevator"), ("rubbish", "trash", "garbage"),
    ("password", "passcode"), ("install", "set up"), ("documents", "papers"), ("visitors", "guests"),
    ("trip", "journey"), ("medicine", "medication"), ("illness", "disease"), ("broken", "damaged", "defective"),
    ("salary", "pay", "wages"), ("boss", "manager"),
)  # fmt: skip
# What a question must look like, so that a word of several meanings has in it the one that is meant above.
_MEANT = {
    "close": r"^(?!.*\b(?:how|so|too|very) close\b)(?!.*\bclose (?:to|by)\b)",
    "lose": r"\blose (?:a|an|the|my|your|our|it|them|mine|one)\b",
    "keep": r"\bhow long\b.*\bkeep\b",
    "borrow": r"^(?!.*\b(?:how much|money|loan|mortgage)\b)",
    "loan": r"\b(?:renew|extend|return) (?:a|the|my) loan\b",
    "return": r"\breturn (?:a|an|the|my|our|it|them|this|these|books?|items?|things)\b",
    "the fine": r"\bthe fine\b(?! (?:arts?|details?|print)\b)",
    "internet": r"^(?!.*\bthe internet\b)",
    "eat": r"^(?!what|which).*\b(?:i|we|you|people|to) eat(?:$| (?:at|during|here|in|inside|on|there|while)\b)",
    "get into": r"\bget into (?:a|my|the|your)\b",
    "reach": r"\bhow (?:can|do|may) i reach\b",
    "become a member": r"\bmember\b(?! of\b)",
    "print": r"\bprint(?:$| (?:at the|from|here|in the)\b)",
    "things": r"\bhow many things\b",
    "give": r"\bgive (?:my|our|the|these|those)\b",
    "bill": r"\bpa(?:id|y)\b|\bmy bill\b",
    "holiday": r"^(?!.*\b(?:bank|national|public|school) holiday)",
    "holidays": r"^(?!.*\b(?:bank|national|public|school) holiday)",
    "register": r"\b(?:and|i|or|to|we|you) register\b",
    "lift": r"\b(?:a|any|no|the) lift\b",
}

# A last part that can open the question as well: `on Sundays`, `if I lose mine`.
_CLAUSE = re.compile(r"(?P<head>.+?\S) (?P<clause>(?:if|when|while|before|after) \w+ .+)", re.IGNORECASE)
_PLACE = re.compile(
    r"(?P<head>.+ \S+) (?P<clause>(?:on|in|at|during|for) (?:(?:the|a|an|my|your) )?[\w'-]+)", re.IGNORECASE
)
# `log in online`, `turn on the light`, `good at chess`: there the first word belongs to the one before it.
_BINDS = re.compile(
    r".*\b(?:based|check|come|depends?|fill|get|go|good|hand|hang|hold|interested|known|log|look|looking|plug|put|sign|"
    r"switch|try|turn|used|working)",
    re.IGNORECASE,
)
# `do I need` in an indirect question is `I need`, and `can I` is `I can`.
_INVERTED = re.compile(
    r"(?:(?P<ask>(?:(?:for|at|on|in|to|by) )?(?:what|when|where|who|which|why|how)\b.*?) )?"
    r"(?P<verb>do|can|could|may|must|should|will|would|am|are|is|was|were|have|has) "
    r"(?P<subject>i|you|we|they|he|she|it|there)\b(?P<rest>.*)",
    re.IGNORECASE,
)
# `does the library open` in an indirect question is `the library opens`.
_DOES = re.compile(
    r"(?:(?P<ask>(?:(?:for|at|on|in|to|by) )?(?:what|when|where|who|which|why|how)\b.*?) )?does (?P<subject>.+?) "
    r"(?P<verb>open|close|shut|start|begin|end|finish|cost|take|last|need|mean|work|run|happen|come|go|leave|arrive|stop|"
    r"contain|include|cover|offer|provide|sell|accept|allow|charge|pay|support|require|use|live|weigh|measure|look|sound)"
    r"(?P<rest>\b.*)",
    re.IGNORECASE,
)
_THIRD_PERSON = re.compile(r"(?:s|sh|ch|x|z|o)$")
# `what is the fine for a late book` asks for `the fine for a late book`, `where is the desk` for
# `where the desk is`. Of `what is the desk called` the end belongs to what asks.
_TOPIC = re.compile(
    r"(?P<ask>what|who|where|when) (?P<verb>is|are) (?P<topic>(?:the|a|an|my|your|our|[A-Z]\S*) [^,]*|[A-Z]\S*)"
)
_OPEN_END = re.compile(
    r"\b(?:about|at|by|called|for|from|in|like|made|named|of|on|spoken|to|used|with|written)"
    r"(?:$| (?:for|from|in|like|of)\b)",
    re.IGNORECASE,
)
# Two questions in one, whose second part has an order of its own.
_TWO = re.compile(
    r"(?:,|\b(?:and|but|or)) (?:are|can|could|did|do|does|how|is|what|when|where|which|who|why|will|would)\b",
    re.IGNORECASE,
)
# `can you draw a map` is a request, which asks for no information.
_REQUEST = re.compile(r"(?:can|could|will|would) you\b", re.IGNORECASE)
# Words that say nothing about what is asked: keywords leave them out.
_FILLERS = frozenset(
    {
        "a", "an", "the", "is", "are", "was", "were", "do", "does", "did", "am", "be", "been", "i", "me", "my", "mine",
        "you", "your", "we", "our", "us", "it", "its", "there", "this", "that", "these", "those", "can", "could", "may",
        "might", "must", "should", "will", "would", "shall", "to", "of", "have", "has", "had", "any", "some", "please",
        "exactly",
    }
)  # fmt: skip


def training_rows(rows: Iterable[Conversation], config: RunConfig) -> Iterator[Conversation]:
    """Yield the rows to train on: those given, and after them each again in up to `config.rewordings` other wordings.

    Answers and system prompts stay as they are. In a conversation of several turns, each question is
    worded otherwise; one that no rule fits stays in all of them as it is. Rows that are measured or
    scored are never worded otherwise.
    """
    yield from rows
    # most runs have no rewordings, and their rows are read once
    if not config.rewordings:
        return
    for row in rows:
        ways = [reword_question(turn.question, config.rewordings, config.seed) for turn in row.turns]
        for number in range(max(map(len, ways), default=0)):
            turns = []
            for turn, others in zip(row.turns, ways, strict=True):
                turns.append(replace(turn, question=others[number]) if number < len(others) else turn)
            yield replace(row, turns=tuple(turns))


def reword_question(text: str, count: int, seed: int = 0) -> list[str]:
    """Word a question otherwise by rule, in up to `count` ways.

    The ways differ from each other and from the question, and depend on question, count and seed
    alone. They are of many kinds: another beginning, another order, indirect, keywords, in a frame.

    Args:
        text: an English question of one sentence; of any other text, nothing is made.
        count: ways to make, at most.
        seed: of the choice among all ways that the rules make.
    """
    question = " ".join(text.split()).rstrip("?. ")
    words = question.split()
    fits = bool(_OPENS.match(question)) and 2 <= len(words) <= LONGEST_WORDS and question.isprintable()
    if fits and words[0].casefold() in _SHARED:
        fits = not _ENGLISH.isdisjoint(word.casefold() for word in words[1:])
    # Several sentences or lines, quotations and code have an order of their own.
    if not fits or "\n" in text.strip() or re.search(r"[?!`\"{}]|\.\s", question):
        return []
    draw = random.Random(f"rewordings {seed} {question}")
    # of every two ways, one has other words as well, if there are any
    variants = _replace_words(question)
    draw.shuffle(variants)
    groups = []
    rules = (_openings, _orders, _indirect, _topics, _keywords, _framed)
    for rule in (_keywords, _framed) if _TWO.search(question) or _REQUEST.match(question) else rules:
        groups.append([*rule(question)])
        groups.append([way for variant in variants for way in rule(variant)])
    groups.append([f"{variant}?" for variant in variants])
    for group in groups:
        draw.shuffle(group)

    # Take one of each kind in turn, so that few ways are of many kinds.
    found: list[str] = []
    known = {_comparable(text)}
    while len(found) < count and any(groups):
        for group in groups:
            if not group or len(found) == count:
                continue
            way = _vary(group.pop(), draw)
            if (key := _comparable(way)) not in known:
                known.add(key)
                found.append(way)
    return found


def _comparable(text: str) -> str:
    """Return a text in a form in which two that tokenize alike but for outer spaces are the same."""
    return " ".join(text.split())


def _replace_words(question: str) -> list[str]:
    """Put words that mean the same in the place of one or of two words; names are never replaced."""
    places: list[tuple[str, tuple[str, ...]]] = []
    for word, *others in SYNONYMS:
        if re.search(_MEANT.get(word, ""), question, re.IGNORECASE):
            places.append((rf"\b{word}\b", tuple(others)))
    if SYNONYMS:
        places.append((r"(?<=\ba )late\b|(?<=\bthe )late\b|(?<=\bmy )late\b", ("overdue",)))
    once = [(pattern, way) for pattern, others in places for way in others if re.search(pattern, question)]
    found = [_replace_word(question, pattern, way) for pattern, way in once]
    for number, (pattern, way) in enumerate(once):
        for other, another in once[number + 1 :]:
            if other != pattern and re.search(other, changed := _replace_word(question, pattern, way)):
                found.append(_replace_word(changed, other, another))
    return list(dict.fromkeys(found))


def _replace_word(question: str, pattern: str, way: str) -> str:
    """Replace the first match of a pattern, and write `a` or `an` before it as its first letter asks."""
    changed = re.sub(rf"(\b[Aa]n? )?(?:{pattern})", lambda found: f"{found[1] or ''}\0{way}", question, count=1)
    article = "an" if way[0] in "aeio" else "a"
    return re.sub(r"\b([Aa])n? \0", lambda found: f"{found[1]}{article[1:]} ", changed).replace("\0", "")


def _framed(question: str) -> Iterator[str]:
    """Put the question into each frame."""
    for frame in _FRAMES:
        yield _fill(frame, question)


def _openings(question: str) -> Iterator[str]:
    """Begin the question with other words that ask the same."""
    if price := _PRICE.fullmatch(question):
        for form in _PRICES:
            yield _capital(form.format(thing=price["thing"], rest=price["rest"])) + "?"
        return
    for pattern, openings in _OPENINGS:
        if found := re.match(pattern, question, re.IGNORECASE):
            for opening in openings:
                changed = opening + question[found.end() :]
                if changed.casefold() != question.casefold():
                    yield _capital(changed) + "?"
            return


def _orders(question: str) -> Iterator[str]:
    """Put a last part such as `on Sundays` first."""
    for pattern in (_CLAUSE, _PLACE):
        if (found := pattern.fullmatch(question)) and len(found["head"].split()) > 2:
            head, clause = _small(found["head"].rstrip(",")), found["clause"]
            if pattern is _PLACE and _BINDS.fullmatch(head):
                return
            yield f"{_capital(clause)}, {head}?"
            yield f"{_capital(clause)}: {head}?"
            return


def _indirect(question: str) -> Iterator[str]:
    """Ask indirectly: `Can you tell me when it opens?`."""
    if found := _INVERTED.fullmatch(question):
        verb = "" if found["verb"].lower() == "do" else f"{found['verb'].lower()} "
        subject = "I" if found["subject"] in "iI" else found["subject"].lower()
        statement = f"{subject} {verb}{found['rest'].strip()}".strip()
    elif found := _DOES.fullmatch(question):
        ending = "es" if _THIRD_PERSON.search(found["verb"]) else "s"
        statement = f"{found['subject']} {found['verb'].lower()}{ending}{found['rest']}"
    else:
        return
    ask = _small(found["ask"]) if found["ask"] else "if"
    for frame in _INDIRECT_FRAMES:
        yield _fill(frame, f"{ask} {statement}")
    # `how I renew a loan` is `how to renew a loan` as well, and renewing is what somebody wants
    if ask == "how" and re.match(r"(?:I|you) ", statement) and found["verb"].lower() in ("do", "can", "may"):
        action = re.sub(r"^(?:I|you) (?:can |may )?", "", statement)
        for frame in ("How to {}?", "how to {}", "I'd like to {}. How does that work?", "I want to {}.", "Help me {}."):
            yield frame.format(action)


def _topics(question: str) -> Iterator[str]:
    """Name what is asked for: `Tell me the fine for a late book.`."""
    found = _TOPIC.fullmatch(_small(question))
    if not found or _OPEN_END.search(found["topic"]):
        return
    if found["ask"] == "what" and found["topic"].startswith(("the ", "my ", "your ", "our ")):
        for frame in _TOPIC_FRAMES:
            yield _fill(frame, found["topic"])
    # who asks what a winglet is cannot be told a winglet; a long one keeps its verb too far from `what`
    elif len(found["topic"].split()) <= LONGEST_TOPIC:
        for frame in _INDIRECT_FRAMES:
            yield _fill(frame, f"{found['ask']} {found['topic']} {found['verb']}")


def _keywords(question: str) -> Iterator[str]:
    """Leave out the words that say nothing about what is asked."""
    first, *others = question.split()
    words = [first] if first.casefold() not in _FILLERS else []
    for word in others:
        # `US` and the month of May are names
        is_name = word[0].isupper() and word.strip(",;:") != "I"
        if is_name or word.strip(",;:").casefold() not in _FILLERS:
            words.append(word)
    # in `what does a heart do` it is what is asked
    if others[-1:] == ["do"]:
        words.append("do")
    if not 2 <= len(words) < len(question.split()):
        return
    text = " ".join(words)
    yield _small(text)
    yield f"{_small(text)}?"
    # without the word that asks, the rest of it first
    if words[0].casefold() in {"what", "which"} and len(words) > 2:
        yield " ".join(words[1:])
    elif _OPENS.fullmatch(words[0]) and len(words) > 2:
        yield f"{' '.join(words[1:])}: {words[0].casefold()}?"


def _vary(text: str, draw: random.Random) -> str:
    """Change the look of a fifth of the texts: all in small letters, no mark at the end, a slip of the finger."""
    looks: tuple[Callable[[str], str], ...] = (str.lower, lambda t: t.rstrip("?."), lambda t: _mistype(t, draw))
    return draw.choice(looks)(text) if draw.random() < 0.2 else text


def _mistype(text: str, draw: random.Random) -> str:
    """Swap two inner letters of one long word in small letters; names and numbers stay."""
    words = text.split(" ")
    long = [place for place, word in enumerate(words) if len(word) > 6 and word.isalpha() and word.islower()]
    if not long:
        return text
    place = draw.choice(long)
    letter = draw.randrange(2, len(words[place]) - 2)
    word = words[place]
    words[place] = word[:letter] + word[letter + 1] + word[letter] + word[letter + 2 :]
    return " ".join(words)


def _fill(frame: str, text: str) -> str:
    """Put a text into a frame, `{Q}` with a capital at its start and `{q}` without."""
    return frame.replace("{Q}", _capital(text)).replace("{q}", _small(text))


def _capital(text: str) -> str:
    """Return a text that begins with a capital."""
    return text[:1].upper() + text[1:]


def _small(text: str) -> str:
    """Return a text whose first word is in small letters, if it is one that asks or fills."""
    first, space, rest = text.partition(" ")
    asks = _OPENS.fullmatch(re.sub(r"['’]s$", "", first))
    known = first.casefold() in _FILLERS or asks or first.casefold() in {"for", "at", "on", "in"}
    # `I` is never small, nor is a name
    return first.lower() + space + rest if known and first != "I" else text
