"""Links from the pages to files and headings of this repository lead somewhere."""

import re
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("demo/*.md"), *ROOT.glob("docs/**/*.md")])


def parsed(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def links(page: Path) -> list[str]:
    """The targets of links and images that are no web addresses."""
    spans = [span for token in parsed(page) for span in token.children or ()]
    targets = [str(span.attrs.get("href", span.attrs.get("src", ""))) for span in spans]
    return [target for target in targets if target and not urlsplit(target).scheme]


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives the headings; the second of one name ends with -1."""
    tokens, seen, found = parsed(page), Counter[str](), set()
    for opening, heading in zip(tokens, tokens[1:], strict=False):
        if opening.type == "heading_open":
            text = "".join(span.content for span in heading.children or ())
            name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.add(f"{name}-{seen[name]}" if seen[name] else name)
            seen[name] += 1
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_to_a_heading_of_it(page):
    broken = []
    for link in links(page):
        path, _, anchor = unquote(link).partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert not broken, f"{page.relative_to(ROOT)} links to files or headings that do not exist: {', '.join(broken)}"
