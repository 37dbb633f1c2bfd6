"""Docstrings of this project as reStructuredText.

Docstrings are plain text: names in single backticks, fields as `name: what it is` with deeper lines
going on, commands and examples indented, `Raises:` as Google writes it. Sphinx reads
reStructuredText, in which `*args`, `x_` or a deeper line mean something else.
"""

import re

from sphinx.application import Sphinx

FIELD = re.compile(r"([`\w][\w.`*]*(?:, (?:and )?[`\w][\w.`*]*)*): (?=\S)")
ITEM = re.compile(r"(?:[-*]|\d+[.)]) ")
SECTION = re.compile(r"(Args|Raises|Returns|Yields|Example|Examples|Note|Attributes):$")


def escape(text: str) -> str:
    """`name` -> ``name``, and no other character has a meaning."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return re.sub(r"([\\*`|_])", r"\\\1", text)
    for i, part in enumerate(parts):
        if i % 2 == 0:
            parts[i] = re.sub(r"([\\*|_])", r"\\\1", part)
        elif part.strip():
            # A backtick beside a letter would not count as the end of a literal.
            parts[i] = f"\\ ``{part}``\\ "
    return "".join(parts)


def paragraphs(lines: list[str]) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            groups[-1].append(line.rstrip())
        elif groups[-1]:
            groups.append([])
    return [group for group in groups if group]


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def starts(group: list[str], pattern: re.Pattern) -> bool:
    """Whether a paragraph is a list: every line opens an item or is deeper than the first."""
    return bool(pattern.match(group[0].lstrip())) and all(
        pattern.match(line.lstrip()) or indent(line) > indent(group[0]) for line in group[1:]
    )


def items(group: list[str], pattern: re.Pattern) -> list[str]:
    """The lines of a list, each item joined to one line."""
    joined: list[str] = []
    for line in group:
        if indent(line) == indent(group[0]) and pattern.match(line.lstrip()):
            joined.append(line.strip())
        else:
            joined[-1] += " " + line.strip()
    return joined


def convert(lines: list[str]) -> list[str]:
    """A docstring's lines, without common indentation, as reStructuredText."""
    result: list[str] = []
    for group in paragraphs(lines):
        if SECTION.match(group[0]):
            body = [f"{' ' * indent(line)}{escape(line.strip())}" for line in group[1:]]
            result += [group[0], *body, ""]
        elif indent(group[0]) > 0:
            result += ["::", "", *(f"    {line}" for line in group), ""]
        elif starts(group, ITEM):
            for item in items(group, ITEM):
                mark = ITEM.match(item)
                assert mark is not None
                result += [f"- {escape(item[mark.end() :])}"]
            result.append("")
        elif starts(group, FIELD):
            for item in items(group, FIELD):
                name, _, text = item.partition(": ")
                result += [f"**{escape(name.replace('`', ''))}**", f"    {escape(text)}", ""]
        else:
            result += prose(group)
    return result


def prose(group: list[str]) -> list[str]:
    """A paragraph; deeper lines after its first are a block of their own, shown as they stand."""
    plain = next((i for i, line in enumerate(group) if indent(line) > 0), len(group))
    head = [escape(line) for line in group[:plain]]
    if plain == len(group):
        return [*head, ""]
    block = [f"    {line}" for line in group[plain:]]
    return [*head, "", "::", "", *block, ""]


def process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]):
    lines[:] = convert(lines)


def setup(app: Sphinx) -> dict:
    # Before napoleon, which turns `Raises:` into fields.
    app.connect("autodoc-process-docstring", process, priority=400)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
