"""How DeepFloyd IF, PixArt-alpha and Open-Sora 1.0 clean a text before T5 reads it: in training and in drawing.

Their captions came from web pages: links, markup, file names, article numbers and words of shops say nothing about a
picture.
"""

import html
import re
from collections.abc import Iterable
from html.entities import html5
from html.parser import HTMLParser
from urllib.parse import unquote_plus

import ftfy

MOST = 2_000
"""Characters of a text that are cleaned and read: T5 reads some hundred tokens, and some rules take time that grows
with the square of the length."""
_ENDINGS = "(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
_HOST = r"[a-zA-Z0-9.-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_NOT_SHOWN = {"script", "style", "template"}
Rules = tuple[tuple[re.Pattern, str], ...]


def _rules(*pairs: tuple[str, str]) -> Rules:
    return tuple((re.compile(pattern), instead) for pattern, instead in pairs)


_LINKS = _rules(*((rf"\b(?:{scheme}:(?:/{{1,3}}|[a-zA-Z0-9%])|{_HOST})", "") for scheme in ("https?", "www")))
_MARKS = _rules(
    (r"@\w+", ""),  # names of users
    (r"[\u31c0-\u9fff]+", ""),  # Chinese characters, and what lies beside them
    (r"[-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
     r"\ufe31\ufe32\ufe58\ufe63\uff0d]+", "-"),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # addresses of computers
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#(?:\d{1,3}|\d{5,})\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.{_ENDINGS}", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[][#®•©™&@·º½¾¿¡§~)(}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)  # fmt: skip
_WORDS = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # article numbers: jc6640, jc6640vc, 6640vc231
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b{_ENDINGS}(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes, with a Latin or a Cyrillic x
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,:;-]", ""),
    (r"['_,:+-]$", ""),
    (r"^\.\S+$", ""),
)
_JOINING = re.compile("[-_]")


def clean_caption(text: str) -> str:
    """The text as T5 reads it, in lower case; empty where nothing in it is about a picture. Of a text of more than
    `MOST` characters, the rest is left out."""
    text = text[:MOST]
    for _ in range(2):  # as published: what the first time uncovers, the second one cleans
        text = _cleaned(text)
    return text


def lower_case(text: str) -> str:
    """What becomes of a text that is not cleaned."""
    return text.lower().strip()


def _cleaned(text: str) -> str:
    text = unquote_plus(text).strip().lower().replace("<person>", "person")
    text = _applied(_MARKS, _shown(_applied(_LINKS, text)))
    if len(_JOINING.findall(text)) > 3:  # this-is-my-cute-cat
        text = _JOINING.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return _applied(_WORDS, text).strip()


def _applied(rules: Iterable[tuple[re.Pattern, str]], text: str) -> str:
    for pattern, instead in rules:
        text = pattern.sub(instead, text)
    return text


def _shown(text: str) -> str:
    """What a browser would show of HTML."""
    page = _Page()
    page.feed(text)
    page.close()
    return "".join(page.shown)


class _Page(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=False)
        self.shown: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag, attrs):
        self.hidden += tag in _NOT_SHOWN

    def handle_endtag(self, tag):
        self.hidden -= bool(self.hidden) and tag in _NOT_SHOWN

    def handle_data(self, data):
        if not self.hidden:
            self.shown.append(data)

    def unknown_decl(self, data):
        if data.startswith("cdata["):
            self.handle_data(data.removeprefix("cdata["))

    def handle_charref(self, name):
        self.handle_data(html.unescape(f"&#{name};"))

    def handle_entityref(self, name):
        self.handle_data(html5.get(f"{name};", f"&{name}"))
