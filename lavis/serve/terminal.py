"""The conversation in the terminal: what is typed, or piped in, is a command or a question."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from textwrap import indent

from lavis.core.errors import ChatError, LavisError
from lavis.generation.pictures import Picture, open_picture
from lavis.serve.keyboard import COLONS, Keyboard, split_paths
from lavis.serve.screen import Screen
from lavis.serve.session import ChatSession, Reply
from lavis.serve.wording import WORDING


class TerminalChat:
    """A session at a screen, speaking `lang`."""

    def __init__(self, session: ChatSession, screen: Screen, lang: str) -> None:
        self.session, self.screen, self.lang = session, screen, lang
        self.first_settings = session.settings
        self.wants_images = False
        """Whether the next line names images."""

    def talk(self) -> None:
        """Converse with someone who types, until they end it."""
        chat = self.session.engine.chat
        keyboard = Keyboard()
        self.say("welcome", name=chat.name, device=chat.device, window=chat.window)
        self.wants_images = chat.sees and not self.session.pictures
        if not chat.sees:
            self.say("no_eyes")
        while True:
            try:
                meanings = {c.names[0]: self.text(f"help.{c.names[0]}") for c in COMMANDS}
                self.handle(
                    keyboard.ask(
                        self.text("ask_images" if self.wants_images else "you"), meanings, paths=self.wants_images
                    )
                )
            except KeyboardInterrupt:
                self.say("stopped")
            except EOFError:
                return

    def answer_lines(self, lines: Iterable[str]) -> int:
        """Answer piped lines; 1 if one of them was an error."""
        failed = 0
        try:
            for line in lines:
                failed |= not self.handle(line)
        except EOFError:
            pass
        return int(failed)

    def handle(self, line: str) -> bool:
        """Do what a line asks for. False if that was an error, which has been shown. Raises EOFError for `:exit`."""
        try:
            self._take(line.strip().encode(errors="replace").decode())  # half a character, typed or pasted, is no text
        except LavisError as error:
            self.screen.note(self.text("error", error=" ".join(str(error).splitlines())), style="red")
            return False
        return True

    def text(self, key: str, **values: object) -> str:
        """A message in the chosen language."""
        return WORDING[self.lang][key].format(**values)

    def say(self, key: str, **values: object) -> None:
        """Show a message."""
        self.screen.note(self.text(key, **values))

    def attach(self, pictures: Iterable[Picture]) -> None:
        """Show pictures to the model with the next question, and to the user now."""
        for picture in pictures:
            self.session.attach(picture)
            image = picture.image
            assert image is not None  # it has just been read
            self.say("attached", name=picture.name, width=image.width, height=image.height)
            self.screen.preview(image)

    def _take(self, line: str) -> None:
        if line[:1] in COLONS:
            self._command(line[1:])
            self.wants_images = self.wants_images and not self.session.pictures
        elif self.wants_images:
            self.attach([open_picture(path) for path in self._paths(line)])
            self.wants_images = False
        elif line:
            self._show(self.session.ask(line))

    def _command(self, line: str) -> None:
        name, _, argument = line.strip().partition(" ")
        known = {n: command for command in COMMANDS for n in command.names}
        if name not in known:
            near = difflib.get_close_matches(f":{name}", [f":{n}" for n in known], n=2)
            hint = self.text("near", names=", ".join(near)) if near else ""
            raise ChatError(self.text("unknown", name=f":{name}", hint=hint))
        known[name].run(self, argument.strip())

    def _show(self, reply: Reply) -> None:
        try:
            self.screen.stream(reply, self.text("thinking"))
        finally:
            reply.stop()  # also where Ctrl-C came before the first piece was asked for
        answer = reply.answer
        if answer.finish_reason == "length" and len(answer.ids) >= answer.settings.max_new_tokens:
            self.say("cut", tokens=len(answer.ids), more=4 * len(answer.ids))
        elif answer.finish_reason == "length":
            self.say("window", tokens=self.session.engine.chat.window)
        elif not reply.text:
            self.say("nothing")

    def _paths(self, text: str) -> list[str]:
        return split_paths(text, self.text("open_quote", text=text))

    def _path(self, text: str, example: str) -> str:
        paths = self._paths(text)
        if len(paths) != 1:
            raise ChatError(self.text("one_path", example=example))
        return paths[0]

    # ---- commands; each takes what follows its name

    def help(self, _: str) -> None:
        """List the commands."""
        heads = [", ".join(f":{name}" for name in c.names) + f" {c.argument}" for c in COMMANDS]
        width = max(map(len, heads))
        for head, command in zip(heads, COMMANDS, strict=True):
            self.screen.note(f"  {head:{width}}  {self.text('help.' + command.names[0])}", style="")
        self.say("keys")

    def exit(self, _: str) -> None:
        """End, as Ctrl-D."""
        raise EOFError

    def clear(self, _: str) -> None:
        """Empty the screen."""
        self.screen.clear()

    def clear_history(self, _: str) -> None:
        """Forget what was said."""
        self.session.clear_history()
        self.say("cleared")

    def history(self, _: str) -> None:
        """Show what was said."""
        if not self.session.history:
            self.say("no_history")
        for turn in self.session.history:
            for picture in turn.pictures:
                self.screen.note(f"  [{picture.name}]")
            self.screen.note(indent(self.text("you") + turn.question, "  "), style="green")
            self.screen.note(indent(turn.answer, "  "), style="")

    def seed(self, value: str) -> None:
        """Show or set the seed."""
        if value:
            if not value.isdecimal():
                raise ChatError(self.text("bad_seed", value=value))
            self.session.seed = int(value)
        self.say("seed", seed=self.session.seed)

    def conf(self, values: str) -> None:
        """Show or change settings."""
        if values:
            settings = self.session.settings or self.session.engine.chat.defaults
            self.session.settings = settings.with_text(values)
        self.screen.note(str(self.session.settings).replace("  ", "\n"), style="")

    def reset_conf(self, _: str) -> None:
        """Settings as at the start."""
        self.session.settings = self.first_settings
        self.conf("")

    def img(self, paths: str) -> None:
        """List the images, or attach more."""
        if paths:
            self.attach([open_picture(path) for path in self._paths(paths)])
        elif self.session.pictures:
            self.screen.note(
                "\n".join([self.text("images"), *(f"  {picture.name}" for picture in self.session.pictures)]), style=""
            )
        else:
            self.say("no_images")

    def regen(self, _: str) -> None:
        """Answer the last question again; the old answer stays if no new one comes."""
        self._show(self.session.regenerate())

    def undo(self, _: str) -> None:
        """Take back the last question."""
        self.say("undone", question=self.session.undo().question)

    def save(self, path: str) -> None:
        """Write the conversation."""
        file = self._path(path, ":save chat.json")
        self.session.save(file)
        self.say("saved", path=file, turns=len(self.session.history))

    def load(self, path: str) -> None:
        """Go on with a saved conversation."""
        file = self._path(path, ":load chat.json")
        self.session.load(file)
        self.say("loaded", path=file, turns=len(self.session.history), images=len(self.session.pictures))

    def language(self, lang: str) -> None:
        """Speak another language."""
        if lang not in WORDING:
            raise ChatError(self.text("bad_lang"))
        self.lang = lang
        self.say("lang")

    def reset(self, _: str) -> None:
        """Begin again."""
        self.session.reset()
        self.wants_images = self.screen.interactive and self.session.engine.chat.sees


@dataclass(frozen=True)
class Command:
    """names: the full one, then short ones; argument: what may follow, as `:help` shows it."""

    names: tuple[str, ...]
    argument: str
    run: Callable[[TerminalChat, str], None]


COMMANDS = (
    Command(("help", "h"), "", TerminalChat.help),
    Command(("exit", "quit", "q"), "", TerminalChat.exit),
    Command(("clear", "cl"), "", TerminalChat.clear),
    Command(("clear-history", "clh"), "", TerminalChat.clear_history),
    Command(("history", "his"), "", TerminalChat.history),
    Command(("seed",), "[N]", TerminalChat.seed),
    Command(("conf",), "[NAME=VALUE ...]", TerminalChat.conf),
    Command(("reset-conf",), "", TerminalChat.reset_conf),
    Command(("img",), "[PATH ...]", TerminalChat.img),
    Command(("regen",), "", TerminalChat.regen),
    Command(("undo",), "", TerminalChat.undo),
    Command(("save",), "FILE", TerminalChat.save),
    Command(("load",), "FILE", TerminalChat.load),
    Command(("lang",), "zh|en", TerminalChat.language),
    Command(("reset",), "", TerminalChat.reset),
)
