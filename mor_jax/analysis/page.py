"""A text as one HTML file: tokens coloured by depth, with their numbers on hover.

The page needs no scripts and no other files, so it can be archived and sent.
"""

import dataclasses
import html
import unicodedata
from collections.abc import Mapping, Sequence

from mor_jax.plotting.plots import colour

_LOSSES = ("#f3f4f6", "#e3e9f7", "#c8d6f3", "#a6bdec", "#83a2e4", "#6489dc")
"""Colours of losses in steps of 1 nat; the last one also marks all higher losses."""

_STYLE = """
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #111827; background: #fff;
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.25rem; margin: 0 0 .25rem; }
p.about { color: #4b5563; margin: 0 0 1rem; }
label { margin-right: 1rem; cursor: pointer; }
.legend { display: none; margin: .75rem 0; }
.legend span { display: inline-block; padding: 0 .5rem; margin-right: .4rem; border-radius: 3px; }
.text { font: 14px/1.75 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.text + .text { border-top: 1px solid #e5e7eb; margin-top: .5rem; padding-top: .5rem; }
.text span { box-shadow: inset -1px 0 #fff; }
.text span:hover { outline: 2px solid #111827; }
i { color: #6b7280; font-style: normal; }
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Token:
    """One token of a page. text: as in `plots.text_pieces`. title: shown on hover.

    depths: by routing. loss: nats, None for the first token of a text.
    """

    text: str
    title: str
    depths: Mapping[str, int]
    loss: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """Contents of an HTML page. about: a line under the title.

    routings: name in records -> display name. rows: tokens of each connected text. recursions: of
    the model.
    """

    title: str
    about: str
    routings: Mapping[str, str]
    rows: Sequence[Sequence[Token]]
    recursions: int

    def html(self) -> str:
        """The HTML source of the page."""
        names = {f"depth, {label} routing": name for name, label in self.routings.items()}
        choices = {**names, "loss": "loss"}
        title = html.escape(self.title)
        parts = [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{_STYLE}{self._rules(choices.values())}</style>\n"
            f'</head>\n<body>\n<h1>{title}</h1>\n<p class="about">{html.escape(self.about)}</p>\n'
        ]
        for index, (label, name) in enumerate(choices.items()):
            checked = " checked" if index == 0 else ""
            parts.append(f'<input type="radio" name="by" id="by-{name}"{checked}>')
            parts.append(f'<label for="by-{name}">{html.escape(label)}</label>\n')
        parts += [self._legend(name) for name in choices.values()]
        parts.append("<main>\n")
        for row in self.rows:
            parts.append(f'<div class="text">{"".join(map(self._span, row))}</div>\n')
        parts.append("</main>\n</body>\n</html>\n")
        return "".join(parts)

    def _rules(self, names) -> str:
        """CSS rules: the colour of each class while a button is selected."""
        rules = []
        for name in names:
            on = f"#by-{name}:checked"
            rules.append(f"{on} ~ .legend.{name} {{ display: block; }}")
            values = range(len(_LOSSES)) if name == "loss" else range(self.recursions + 1)
            for value in values:
                shade = _LOSSES[value] if name == "loss" else colour(value)
                selector = f"{on} ~ main .{name}-{value}, .legend .{name}-{value}"
                rules.append(f"{selector} {{ background: {shade}; }}")
        return "\n".join(rules) + "\n"

    def _legend(self, name: str) -> str:
        if name == "loss":
            last = len(_LOSSES) - 1
            labels = [f"{k} to {k + 1} nats" for k in range(last)] + [f"{last} nats and more"]
            shown = range(len(_LOSSES))
        else:
            depths = [token.depths[name] for row in self.rows for token in row]
            counts = [depths.count(depth) for depth in range(self.recursions + 1)]
            shown = range(0 if counts[0] else 1, self.recursions + 1)
            each = [f"{count:,}, {count / max(len(depths), 1):.0%}" for count in counts]
            labels = [f"{d} recursion{'s' * (d != 1)} ({each[d]})" for d in range(len(counts))]
        spans = [f'<span class="{name}-{k}">{html.escape(labels[k])}</span>' for k in shown]
        return f'<div class="legend {name}">{"".join(spans)}</div>\n'

    def _span(self, token: Token) -> str:
        classes = [f"{name}-{token.depths[name]}" for name in self.routings]
        if token.loss is not None:
            classes.append(f"loss-{min(max(int(token.loss), 0), len(_LOSSES) - 1)}")
        title = html.escape(token.title, quote=True)
        return f'<span class="{" ".join(classes)}" title="{title}">{_shown(token.text)}</span>'


def _shown(text: str) -> str:
    """Escaped text with signs for invisible characters; a grey dot for a token without text."""
    if not text:
        return "<i>·</i>"
    return "".join(_letter(char) for char in text)


def _letter(char: str) -> str:
    if char == "\n":
        return "<i>↵</i>\n"
    if char == "\t":
        return "<i>→</i>\t"
    # Control characters and direction marks would affect the text after their token.
    if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn"):
        return f"<i>U+{ord(char):04X}</i>"
    return html.escape(char)
