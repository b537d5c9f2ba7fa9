# ruff: noqa: RUF001 (the Chinese words are written as they are)
"""The page for an address that leads nowhere, for who opened it in a browser; all others get the error as JSON."""

import re

from aiohttp import web

from moltbot_adapters.http.errors import HttpError

_PAGE = """\
<!doctype html>
<html lang="{lang}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1, viewport-fit=cover">
<meta name="color-scheme" content="light dark">
<meta name="robots" content="noindex">
<title>{title} · MoltBot</title>
<link rel="icon" type="image/svg+xml" href="/static/favicon.svg">
<link rel="stylesheet" href="/static/tokens.css">
<link rel="stylesheet" href="/static/styles.css">
<script src="/static/theme.js"></script>
</head>
<body>
<main class="signin">
<div class="signin-card lost">
<img class="mark" src="/static/favicon.svg" alt="">
<h1>{title}</h1>
<p class="signin-lead">{lead}</p>
<a href="/" class="button primary">{back}</a>
</div>
</main>
</body>
</html>
"""
# Nothing of the request goes into a page, so each is written once.
_PAGES = {
    "en": _PAGE.format(
        lang="en",
        title="Page not found",
        lead="There is no page at this address. Perhaps it was mistyped.",
        back="Open the chat",
    ).encode(),
    "zh": _PAGE.format(
        lang="zh-CN",
        title="找不到页面",
        lead="这个地址没有页面，可能是输错了。",
        back="打开对话",
    ).encode(),
}
_QUALITY = re.compile(r"q=(0(?:\.\d{0,3})?|1(?:\.0{0,3})?)", re.IGNORECASE)


def page_for(request: web.Request, error: HttpError) -> web.Response | None:
    """Returns the page where a browser asked for what is not there, or None: then the error's own form is due."""
    api = request.path == "/v1" or request.path.startswith("/v1/")
    if (error.status, error.code) != (404, "not_found") or request.method not in ("GET", "HEAD") or api:
        return None
    if not _prefers_html(_weights(request, "Accept")):
        return None
    language = _language(_weights(request, "Accept-Language"))
    headers = {"Content-Language": language, "Vary": "Accept, Accept-Language"}
    return web.Response(status=404, body=_PAGES[language], content_type="text/html", charset="utf-8", headers=headers)


def _prefers_html(accepted: dict[str, float]) -> bool:
    def weight(kind: str) -> float:
        ranges = (kind, f"{kind.partition('/')[0]}/*", "*/*")
        return next((accepted[name] for name in ranges if name in accepted), 0.0)

    return weight("text/html") > weight("application/json")


def _language(accepted: dict[str, float]) -> str:
    for tag in sorted(accepted, key=lambda tag: -accepted[tag]):  # stable: of equals, the first named
        base = tag.partition("-")[0]
        if base in _PAGES and accepted[tag] > 0:
            return base
    return "en"


def _weights(request: web.Request, header: str) -> dict[str, float]:
    """What a header of preferences names, in lower case, with the weight of each. A weight that is none counts as 0."""
    weights: dict[str, float] = {}
    for item in ",".join(request.headers.getall(header, [])).split(","):
        name, *parameters = (part.strip().lower() for part in item.split(";"))
        said = next((part for part in parameters if part.startswith("q=")), "q=1")
        known = _QUALITY.fullmatch(said)
        weights.setdefault(name, float(known[1]) if known else 0.0)
    return weights
