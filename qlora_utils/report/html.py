"""HTML that is safe by construction: what was built here is markup, and everything else becomes text."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from qlora_utils.style import in_page, on_terminal


class Html(str):
    """Markup that this module built. Any other value is escaped where it is put between tags."""

    __slots__ = ()


_VOID = {"br", "meta"}  # elements without an end


def text(value: Any) -> Html:
    """A value as text: escaped, and what would move a cursor or turn the direction of writing spelled out."""
    return Html(in_page(on_terminal(str(value))))


def join(parts: Iterable[Any], between: str = "") -> Html:
    """Parts one after the other: markup as it is, None left out, all else as text."""
    made = (part if isinstance(part, Html) else text(part) for part in parts if part is not None)
    return Html(text(between).join(made))


def element(tag: str, /, *content: Any, **attributes: Any) -> Html:
    """One element with its content.

    Args:
        tag: name of the element; one of ours, never from data.
        content: as `join` takes it.
        attributes: `class_` is class and `aria_label` aria-label; None and False are left out, True stands alone.
    """
    said = ""
    for attribute, value in attributes.items():
        if value is None or value is False:
            continue
        said += f" {attribute.rstrip('_').replace('_', '-')}"
        said += "" if value is True else f'="{text(value)}"'
    return Html(f"<{tag}{said}>" if tag in _VOID else f"<{tag}{said}>{join(content)}</{tag}>")


def paragraph(*content: Any) -> Html:
    """A paragraph."""
    return element("p", *content)


def listed(items: Iterable[Any], name: str = "ul", class_: str | None = None) -> Html:
    """A list, `ul` or `ol`."""
    return element(name, *(element("li", item) for item in items), class_=class_)


def table(caption: str, head: Sequence[Any], rows: Iterable[Sequence[Any]], *, numbers: Collection[int] = ()) -> Html:
    """A table whose first column names its rows; where it is too wide, it scrolls, by keyboard too.

    Args:
        caption: says what it shows; no two tables of a page have the same.
        head: a name for each column, the first one's too.
        rows: as many cells each.
        numbers: columns, from 0, that are set to the right.
    """
    kind = ["number" if index in numbers else None for index in range(len(head))]
    top = element("tr", *(element("th", title, scope="col", class_=kind[i]) for i, title in enumerate(head)))
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell, class_=kind[index]) for index, cell in enumerate(row[1:], start=1)),
        )
        for row in rows
    ]
    whole = element("table", element("caption", caption), element("thead", top), element("tbody", *body))
    return element("div", whole, class_="scroll", role="region", tabindex="0", aria_label=caption)


def figure(drawing: Html, caption: str) -> Html:
    """A drawing, which has a text alternative of its own, over what it shows."""
    return element("figure", drawing, element("figcaption", caption))


def folded(summary: str, *content: Any, open_: bool = False) -> Html:
    """What can be opened, and is open on paper."""
    return element("details", element("summary", summary), *content, open=open_)


def described(items: Mapping[str, Any], class_: str | None = None) -> Html:
    """Names with what belongs to them, side by side."""
    pairs = (element("div", element("dt", name), element("dd", value)) for name, value in items.items())
    return element("dl", *pairs, class_=class_)


def note(*content: Any) -> Html:
    """A remark that must not be passed over."""
    return element("p", *content, class_="note")


def document(title: str, heading: str, opening: Sequence[Html], sections: Mapping[str, tuple[str, Sequence[Html]]],
             closing: str) -> Html:  # fmt: skip
    """A whole page, which fetches nothing and runs nothing: its policy forbids both.

    Args:
        title: of the window.
        heading: the page's one `h1`.
        opening: stands under it.
        sections: id → heading and content, in order; the contents are made of these.
        closing: the last line.
    """
    links = [element("a", name, href=f"#{key}") for key, (name, _) in sections.items()]
    parts = [
        element("section", element("h2", name, id=key), *content, aria_labelledby=key)
        for key, (name, content) in sections.items()
    ]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", title),
        element("style", Html(_STYLE)),
    )
    body = element(
        "body",
        element("a", "Skip to the results", href="#results", class_="skip"),
        element("header", element("h1", heading), *opening),
        element("nav", element("h2", "Contents"), listed(links, "ol"), aria_label="Contents"),
        join([element("main", join(parts, "\n"), id="results", tabindex="-1")]),
        element("footer", paragraph(closing)),
    )
    return Html(f"<!doctype html>\n{element('html', head, body, lang='en')}\n")


_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """
:root {
  --paper: #ffffff; --ink: #1b1f24; --soft: #56606b; --rule: #d5dae0; --panel: #f5f7f9; --link: #0a58a8;
  --tuned: #0a58a8; --base: #6b5a2e; --third: #9c2f6b; --fourth: #1f6b4a; --warn: #9a5b00;
  --new: #d8f0df; --gone: #fbe0de;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    color-scheme: dark;
    --paper: #13171c; --ink: #e7eaee; --soft: #a8b2bd; --rule: #3a424b; --panel: #1c2229; --link: #8cc1ff;
    --tuned: #8cc1ff; --base: #d6c08a; --third: #f09ac6; --fourth: #8fd6b2; --warn: #f0b860;
    --new: #143a24; --gone: #4b2022;
  }
}
* { box-sizing: border-box }
html { scroll-padding-top: 1rem }
body {
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif; margin: 0 auto; max-width: 80rem;
  padding: 1.5rem 1rem 3rem; color: var(--ink); background: var(--paper);
}
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; overflow-wrap: anywhere }
h2 { font-size: 1.4rem; line-height: 1.25; margin: 0 0 .75rem }
h3 { font-size: 1.1rem; margin: 1.75rem 0 .5rem }
p, ul, ol { max-width: 46rem }
p { margin: 0 0 .9rem } li { margin: .25rem 0 }
a { color: var(--link) }
p, li, dd, td, th, summary, caption, figcaption { overflow-wrap: break-word }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .9em }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px }
.skip { position: absolute; left: -99rem } .skip:focus { position: static }
header .lead { font-size: 1.12rem }
section { padding-top: 1.5rem; margin-top: 2rem; border-top: 1px solid var(--rule) }
main > section:first-child { border-top: 0; margin-top: 0; padding-top: 0 }
main:focus { outline: 0 }
nav { margin: 2rem 0 } nav h2 { font-size: 1rem; margin: 0 0 .4rem }
nav ol { margin: 0; padding-left: 1.4rem } nav li { margin: .35rem 0 }
footer { margin-top: 3rem; border-top: 1px solid var(--rule); padding-top: 1rem; color: var(--soft) }
.note { border-left: .3rem solid var(--warn); background: var(--panel); padding: .6rem .9rem }
.caveats { border-left: .3rem solid var(--warn); background: var(--panel); padding: .8rem 1rem .8rem 1.2rem;
  max-width: 47rem; margin: 1.25rem 0 }
.caveats h2 { font-size: 1.05rem; margin: 0 } .caveats ul { margin: .3rem 0 0; padding-left: 1.2rem }
.key { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem; margin: 1.5rem 0 }
.key div { background: var(--panel); border: 1px solid var(--rule); border-radius: .5rem; padding: .7rem .9rem;
  display: flex; flex-direction: column }
.key dt { color: var(--soft); font-size: .9rem }
.key dd { margin: 0; font-size: 1.5rem; font-weight: 650; line-height: 1.25 }
.key dd small { display: block; font-size: .85rem; font-weight: 400; color: var(--soft); line-height: 1.4 }
.scroll { overflow-x: auto; margin: 1rem 0 1.5rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .95rem }
caption { text-align: left; font-weight: 600; padding: .3rem 0 .5rem }
th, td { text-align: left; vertical-align: top; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--rule) }
thead th { vertical-align: bottom; border-bottom: 2px solid var(--soft) }
tbody th { font-weight: 500 }
th.number, td.number { text-align: right; white-space: nowrap }
td small { color: var(--soft); white-space: nowrap; font-size: .85em }
thead th.number { white-space: normal; min-width: 6.5rem } tbody th { white-space: pre-line }
td { white-space: pre-line; min-width: 6rem } td.number { white-space: nowrap; min-width: 0 }
figure { margin: 1rem 0 1.75rem } figcaption { color: var(--soft); max-width: 42rem; font-size: .95rem }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 0 2rem }
svg { display: block; width: 100%; max-width: 42rem; height: auto; overflow: visible }
svg text { font-size: 13px; fill: var(--soft) } svg .strong { fill: var(--ink); font-weight: 600 }
svg .label { fill: var(--ink) }
svg .grid { stroke: var(--rule); stroke-width: 1 } svg .axis { stroke: var(--soft); stroke-width: 1 }
svg .rule { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 2 3 }
svg .over { fill: var(--warn); fill-opacity: .16 }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round }
svg .pale { fill: none; stroke-width: 1; stroke-opacity: .45 } svg .dashed { stroke-dasharray: 7 4 }
svg .s0 { stroke: var(--base) } svg .s1 { stroke: var(--tuned) }
svg .s2 { stroke: var(--third) } svg .s3 { stroke: var(--fourth) }
svg .hollow { fill: var(--paper); stroke-width: 2 } svg .whisker { stroke-width: 2 }
svg .f0 { fill: var(--base) } svg .f1 { fill: var(--tuned) } svg .f2 { fill: var(--third) }
svg .f3 { fill: var(--fourth) }
details { margin: .75rem 0 } summary { cursor: pointer; font-weight: 600; padding: .3rem 0 }
.answers { list-style: none; padding: 0; max-width: none }
.answers > li { border: 1px solid var(--rule); border-radius: .5rem; padding: .8rem 1rem; margin: .8rem 0 }
.asked { font-weight: 600; margin: 0 0 .2rem; white-space: pre-wrap; max-width: none }
.about { color: var(--soft); font-size: .9rem; margin: 0; max-width: none }
.answers dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: .7rem 1.5rem;
  margin: .7rem 0 0 }
.answers dt { font-size: .85rem; color: var(--soft) }
.answers dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere }
ins { background: var(--new); color: inherit; text-decoration: underline; text-underline-offset: .18em }
del { background: var(--gone); color: inherit; text-decoration: line-through }
ins::before, ins::after, del::before, del::after { clip-path: inset(50%); position: absolute; width: 1px; height: 1px;
  overflow: hidden; white-space: nowrap }
ins::before { content: " [not expected: " } del::before { content: " [missing: " }
ins::after, del::after { content: "] " }
.plain { margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none }
pre { background: var(--panel); border: 1px solid var(--rule); border-radius: .4rem; padding: .7rem .9rem;
  margin: 0 0 1rem; white-space: pre-wrap; overflow-wrap: anywhere }
.paper { display: none }
@media (max-width: 34rem) {
  svg text { font-size: 17px } .pair svg text { font-size: 14px } h1 { font-size: 1.6rem }
  td small { display: block }
}
@media screen and (min-width: 64rem) {
  body { display: grid; grid-template-columns: 13rem minmax(0, 1fr); column-gap: 3rem; padding-top: 2.5rem }
  header, footer, .skip { grid-column: 1 / -1 }
  nav { position: sticky; top: 1.5rem; align-self: start }
}
@media print {
  @page { margin: 16mm 14mm }
  html { font-size: 9.5pt } body { max-width: none; padding: 0 }
  nav, .skip { display: none }
  section { break-before: auto } h2, h3, caption, summary { break-after: avoid }
  figure, .answers > li, tr, .key div, .caveats, pre { break-inside: avoid }
  thead { display: table-header-group }
  .scroll { overflow: visible; break-inside: avoid }
  table { width: 100%; font-size: 8pt } th, td { padding-right: .3rem; overflow-wrap: anywhere }
  td.number, th.number, td small { white-space: normal }
  .key { grid-template-columns: repeat(4, 1fr) } .key dd { font-size: 13pt }
  .pair { grid-template-columns: 1fr 1fr } svg { max-width: 14cm }
  .answers dl { grid-template-columns: repeat(3, 1fr) }
  ins, del, .note, .caveats, .key div { print-color-adjust: exact; -webkit-print-color-adjust: exact }
  details::details-content { content-visibility: visible; block-size: auto }
}
@supports not selector(details::details-content) { @media print { .paper { display: block } } }
"""
