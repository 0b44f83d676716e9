"""Tokens to text while they come in."""

from __future__ import annotations

from typing import Any

_BROKEN = "\ufffd"
"""What a decoder writes for half a character."""


class TextStream:
    """Pieces of text whose concatenation is the stripped decoding of all ids, each given out as soon as nothing can
    change it.

    stop: texts that end it; from the first of them on nothing is given out.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.ids: list[int] = []
        self.text = ""
        """What has been given out."""
        self.stopped = False
        """Whether one of the `stop` texts came up."""
        self._decoded = ""
        # ids whose text is in _decoded: all up to _read; those from _before on are decoded again, as neighbours matter
        self._before = self._read = 0

    def add(self, token: int) -> str:
        """The text that `token` settles, perhaps none."""
        self.ids.append(token)
        known, more = self._decode(self._before, self._read), self._decode(self._before, None)
        if len(more) > len(known) and not more.endswith(_BROKEN):
            self._decoded += more[len(known) :]
            self._before, self._read = self._read, len(self.ids)
        return self._give(self._decoded.lstrip(), final=False)

    def finish(self) -> str:
        """The rest."""
        return self._give(self._decode(0, None).strip(), final=True)

    def _decode(self, start: int, end: int | None) -> str:
        return self.tokenizer.decode(self.ids[start:end], skip_special_tokens=True)

    def _give(self, text: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        ends = [at for s in self.stop if (at := text.find(s, max(0, len(self.text) - len(s)))) >= 0]
        if ends:
            self.stopped = True
            text = text[: min(ends)]
        elif not final:
            held = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
            text = text[: len(text) - held]
        text = text.rstrip()
        if not text.startswith(self.text):  # the decoder took something back
            return ""
        piece, self.text = text[len(self.text) :], text
        return piece
