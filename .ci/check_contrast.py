# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Checks that text of built HTML pages stands out from its background, light and dark: by a ratio of 4.5, as the Web
Content Accessibility Guidelines ask for (level AA). Colours are read from the style sheets of the build::

    python .ci/check_contrast.py docs/build
"""

import argparse
import re
import sys
from pathlib import Path

LEAST = 4.5
#: Variables of the theme: text, and what it is written on.
PAIRS = [
    (text, ground)
    for ground in ("background-primary", "background-secondary", "sidebar-background")
    for text in ("foreground-primary", "foreground-secondary", "foreground-muted", "brand-content", "brand-primary")
]


def rules(css):
    """Selectors with their declarations; those of dark pages are said to be so."""
    css = re.sub(r"/\*.*?\*/", "", css, flags=re.S)
    for selector, body in re.findall(r"([^{}]+)\{([^{}]*)\}", css):
        pairs = (part.split(":", 1) for part in body.split(";") if ":" in part)
        yield selector.strip(), {key.strip(): value.strip() for key, value in pairs}


def rgb(color):
    """Of a literal, else None."""
    color = {"white": "#fff", "black": "#000"}.get(color.strip().lower(), color.strip())
    match = re.fullmatch(r"#([0-9a-fA-F]{3}|[0-9a-fA-F]{6})", color)
    if match is None:
        return None
    digits = match[1] if len(match[1]) == 6 else "".join(2 * digit for digit in match[1])
    return [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]


def luminance(color):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb(color)]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def variables(sheets):
    """Of the theme, on light and on dark pages."""
    light, dark = {}, {}
    for css in sheets:
        for selector, body in rules(css):
            found = {key[8:]: value for key, value in body.items() if key.startswith("--color-")}
            if "data-theme" in selector:
                dark.update(found)
            else:
                light.update({key: value for key, value in found.items() if key not in light})
    return light, {**light, **dark}


def value(colors, name):
    found = colors.get(name, "")
    while (match := re.fullmatch(r"var\(--color-([\w-]+)(?:,.*)?\)", found)) is not None:
        found = colors.get(match[1], "")
    return found if rgb(found or "none") else None


def check(root):
    """The texts that do not stand out, and how many were looked at."""
    static = root / "_static"
    pygments = (static / "pygments.css").read_text(encoding="utf-8")
    sheets = [path.read_text(encoding="utf-8") for path in [*static.glob("styles/furo*.css"), static / "custom.css"]]
    pages = [re.findall(r"<style>(.*?)</style>", (root / "index.html").read_text(encoding="utf-8"), re.S)]
    modes = dict(zip(("light", "dark"), variables([*sheets, *pages[0]])))
    found = []
    for mode, colors in modes.items():
        for text, ground in PAIRS:
            pair = value(colors, text), value(colors, ground)
            if None not in pair:
                found.append((f"{mode}: {text} on {ground}", *pair))
    grounds, tokens = {}, []
    for selector, body in rules(pygments):
        mode = "dark" if "data-theme" in selector or "prefers" in selector else "light"
        color, ground = body.get("color", ""), body.get("background-color", body.get("background", ""))
        if selector.endswith(".highlight") and rgb(ground):
            grounds[mode] = ground
        elif ".highlight ." in selector and rgb(color) and not selector.endswith(" .w"):  # white space
            tokens.append((mode, selector, color, ground if rgb(ground) else None))
    found += [(f"{mode}: {name}", color, own or grounds[mode]) for mode, name, color, own in tokens]
    wrong = [f"{name}: {a} on {b}, {contrast(a, b):.2f}" for name, a, b in found if contrast(a, b) < LEAST]
    # Notebooks: what nbsphinx colours without a thought of dark pages has to be overridden.
    own = (static / "custom.css").read_text(encoding="utf-8")
    for selector, body in rules((static / "nbsphinx-code-cells.css").read_text(encoding="utf-8")):
        for part in map(str.strip, selector.split(",")):
            literal = [key for key in ("color", "background") if rgb(body.get(key, ""))]
            if "div.rendered_html" in part and literal and f".content .nboutput {part}" not in own:
                wrong.append(f"custom.css does not override {literal} of '{part}'")
    return wrong, len(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("root", type=Path, help="folder of the built pages")
    wrong, number = check(parser.parse_args().root)
    print(*wrong, f"{number} pairs of colours, {len(wrong)} with too little contrast", sep="\n")
    return 1 if wrong or not number else 0


if __name__ == "__main__":
    sys.exit(main())
