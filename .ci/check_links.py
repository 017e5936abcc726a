# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Checks the links of built HTML pages: each must lead to a file of the build, and to an anchor that
is there. Addresses on the network are not visited; ``--external`` lists them::

    python .ci/check_links.py docs/build
"""

import argparse
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ATTRIBUTES = {"a": "href", "link": "href", "img": "src", "script": "src", "source": "src", "object": "data"}


class Page(HTMLParser):
    """What a page refers to, and what can be referred to on it."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = [], {"", "top"}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        link = found.get(ATTRIBUTES.get(tag))
        if link is not None:
            self.links.append(link)


def check(root):
    """Returns the broken links, and the external ones with the pages that have them."""
    pages = {path.resolve(): Page(path) for path in sorted(root.rglob("*.html"))}
    broken, external = [], {}
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if parts.scheme not in ("data", "javascript"):
                    external.setdefault(link, set()).add(path.relative_to(root.resolve()))
                continue
            target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            if target.is_dir():
                target /= "index.html"
            # Beside what the build has made, nothing can be counted upon.
            if not target.is_file() or root.resolve() not in target.parents:
                broken.append(f"{path}: {link} leads to no file")
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                broken.append(f"{path}: {link} leads to no anchor")
    return len(pages), broken, external


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("root", type=Path, help="folder of the built pages")
    parser.add_argument("--external", action="store_true", help="list the addresses on the network")
    args = parser.parse_args()
    num_pages, broken, external = check(args.root)
    if args.external:
        for link, found in sorted(external.items()):
            shown = sorted(map(str, found))
            print(link, "<-", ", ".join(shown if len(shown) < 5 else [f"{len(shown)} pages"]))
    for text in broken:
        print(text)
    print(f"{num_pages} pages, {len(broken)} broken links")
    return 1 if broken or not num_pages else 0


if __name__ == "__main__":
    sys.exit(main())
