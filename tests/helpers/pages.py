"""HTML pages, parsed."""

from __future__ import annotations

import base64
from html.parser import HTMLParser


class Page(HTMLParser):
    """Tags, attributes and text of a page; complains where tags do not match."""

    VOID = ("meta", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.opened == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.opened.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.opened.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def images(self) -> list[tuple[str, bytes]]:
        """Media type and content of every picture."""
        found = []
        for tag, attributes in self.tags:
            if tag == "img":
                media_type, _, content = (attributes["src"] or "").removeprefix("data:").partition(";base64,")
                found.append((media_type, base64.b64decode(content, validate=True)))
        return found
