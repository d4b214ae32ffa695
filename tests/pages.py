"""HTML pages as tests look at them: what they link to, and how Chromium finds them."""
from __future__ import annotations

import functools
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


class Page(HTMLParser):
    """The tags of a page, its anchors, its images' attributes, and all that it links to."""

    def __init__(self, text):
        super().__init__()
        self.images, self.links, self.tags, self.ids = [], [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        if tag == "img":
            self.images.append(attrs)
        self.links += [attrs[key] for key in ("src", "href", "srcset") if attrs.get(key)]
        self.ids += [attrs["id"]] if "id" in attrs else []


@functools.cache
def read(file: Path) -> Page:
    return Page(file.read_text(encoding="utf-8"))


def broken_links(file: Path) -> list[str]:
    """Return the links of a page that lead to no file, an empty one, or no anchor in it."""
    broken = []
    for link in read(file).links:
        url = urlsplit(link)
        if url.scheme or url.netloc:
            continue
        target = file.parent / unquote(url.path) if url.path else file
        leads = target.is_file() and target.stat().st_size > 0
        if leads and url.fragment and target.suffix == ".html":
            leads = unquote(url.fragment) in read(target.resolve()).ids
        if not leads:
            broken.append(link)
    return broken


def in_chromium(url: str, profile: Path) -> str:
    """Return a page as headless Chromium has it in the end."""
    result = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={profile}", "--virtual-time-budget=20000",
         "--window-size=1400,900", "--dump-dom", url],
        capture_output=True, text=True, timeout=120, check=False,
    )
    assert result.returncode == 0, result.stderr[-500:]
    return result.stdout
