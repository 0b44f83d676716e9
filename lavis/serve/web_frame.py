"""What the web page looks like, and what it may fetch: nothing from elsewhere."""

from __future__ import annotations

import re

import gradio as gr
from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

FONTS = ("system-ui", "Segoe UI", "Noto Sans", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif")
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-src 'none'; object-src 'none'; form-action"
    " 'self'"
)
FETCHED = re.compile(r"/(file[=/]\s*[a-z]+:|proxy=)", re.IGNORECASE)


def theme() -> gr.themes.Base:
    """Light or dark as the browser's system is."""
    theme = gr.themes.Default(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="lg",
        font=FONTS,
        font_mono=("ui-monospace", "Consolas", "monospace"),
    )
    return theme.set(checkbox_border_color="*neutral_400", checkbox_border_color_dark="*neutral_500")


class HereOnly:
    """Refuse what Gradio would fetch from elsewhere for whoever asks, and let no answer make a browser do so, such as
    through an image's address.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        if scope["type"] == "http" and FETCHED.search(scope["path"]):
            await PlainTextResponse("not served here", 403)(scope, receive, send)
        else:
            await self.app(scope, receive, send_with_policy)
