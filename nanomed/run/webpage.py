"""What every page that is written has in common: one HTML file that needs nothing else.

No script, no font, no picture comes from elsewhere (a Content-Security-Policy forbids it), and every text is escaped.
How a page looks is its writer's: training/page.py draws a run's, evaluation/webpage.py a measurement's.
"""

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image


def escaped(value: object) -> str:
    """Any value as the text of an attribute: escaped, without control characters."""
    said = str(value).encode("utf-8", "replace").decode()
    return html.escape("".join(c for c in said if c >= " " or c in "\n\t"))


def text(value: object) -> str:
    """Any value as HTML: escaped, kept apart from its neighbours' writing direction."""
    return f"<bdi>{escaped(value)}</bdi>"


def bullets(lines: Sequence[str]) -> str:
    """A list; nothing of no lines."""
    return "<ul>" + "".join(f"<li>{text(line)}</li>" for line in lines) + "</ul>" if lines else ""


def thumbnail(picture: Image.Image, side: int, alt: str = "") -> str:
    """An <img> with the picture inside, at most `side` pixels long; a small one has the class "small"."""
    small, picture = max(picture.size) < side / 2, picture.copy()
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=92 if small else 82, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img{" class=small" if small else ""} alt="{escaped(alt)}" src="data:image/jpeg;base64,{data}">'


def page(title: str, lead: str, sections: Sequence[tuple[str, str]], style: str, head: str = "") -> str:
    """The whole file. Titles are texts; the bodies of `sections`, `style` and `head` are HTML and CSS of its writer."""
    body = "".join(f"<section><h2>{text(name)}</h2>{content}</section>\n" for name, content in sections if content)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{head}'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{text(title)}</h1>\n<p class="soft">{text(lead)}</p>\n{body}</main>\n</body>\n</html>\n'
    )
