"""Tokens to text while they come in."""

from __future__ import annotations

from typing import Any


class TextStream:
    """Pieces of text whose concatenation is the stripped decoding of all ids, each given out as soon as nothing can change it."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(s for s in stop if s)
        self.ids: list[int] = []
        self.text = ""
        """What has been given out."""
        self.stopped = False
        """Whether one of the `stop` texts came up; it is cut off and nothing follows."""

    def add(self, token: int) -> str:
        """The text that `token` settles, perhaps none."""
        self.ids.append(token)
        return self._give(final=False)

    def finish(self) -> str:
        """The rest."""
        return self._give(final=True)

    def _give(self, *, final: bool) -> str:
        if self.stopped:
            return ""
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True).strip()
        ends = [at for s in self.stop if (at := text.find(s)) >= 0]
        if ends:
            self.stopped, final = True, True
            text = text[: min(ends)].rstrip()
        if not final:
            text = text.rstrip("\ufffd")  # half a character
            held = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
            text = text[: len(text) - held].rstrip()
        if not text.startswith(self.text):  # a decoder that takes back what it said: wait for the end
            return text[len(self.text) :] if final else ""
        piece, self.text = text[len(self.text) :], text
        return piece
