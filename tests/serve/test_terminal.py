"""The terminal chat: as someone types it, as a script pipes it, and its parts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
from PIL import Image

from lavis.cli import main
from lavis.core.errors import ChatError
from lavis.core.paths import ASSETS_ROOT
from lavis.generation.pictures import open_picture
from lavis.serve.keyboard import completions, history_file, split_paths
from lavis.serve.screen import Screen, closed_length, harmless, preview
from lavis.serve.session import ChatSession
from lavis.serve.terminal import COMMANDS, TerminalChat
from lavis.serve.wording import WORDING, default_language

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ASSETS_ROOT / "shapes" / "pictures"
STARS, TRIANGLES = str(PICTURES / "green_stars.png"), str(PICTURES / "red_triangles.png")
MEANINGS = {command.names[0]: "" for command in COMMANDS}


def environment(folder, **more):
    quiet = {
        "LC_ALL": "C.UTF-8",
        "TERM": "xterm-256color",
        "COLORTERM": "",
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "OMP_NUM_THREADS": "1",
    }
    return {
        **os.environ,
        **quiet,
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder),
        "LAVIS_CACHE": str(folder / "cache"),
        **more,
    }


class Typist:
    """Types into `python *command` on a pseudo-terminal and reads what it shows, without colours."""

    def __init__(self, command, folder, **more):
        self.child = pexpect.spawn(
            sys.executable,
            command,
            env=environment(folder, **more),
            cwd=folder,
            dimensions=(40, 120),
            encoding="utf-8",
            timeout=60,
        )
        self.shown = ""

    def read(self, until):
        """Everything up to `until`; what was shown after it is for the next call."""
        while until not in self.shown:
            assert self.child.expect([r"[\s\S]+", pexpect.TIMEOUT]) == 0, f"no {until!r} in {self.shown!r}"
            self.shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.child.after).replace("\r", "")
        head, found, self.shown = self.shown.partition(until)
        return head + found

    def type(self, line, until):
        """Type a line; everything that is shown from then on up to `until`."""
        self.shown = ""
        self.child.send(line + "\r")
        return self.read(until)

    def ends(self):
        """The exit code."""
        self.child.expect(pexpect.EOF, timeout=60)
        self.child.close()
        return self.child.exitstatus


def test_a_conversation(tmp_path):
    typist = Typist([str(ROOT / "cli_demo.py"), "--model-type", "shapes"], tmp_path, COLORTERM="truecolor")
    assert "Loading" in typist.read("for none)> ")
    assert "there is no image file 'none.png'" in typist.type("none.png", "'none.png'.")
    assert "▀" in typist.type(f"'{STARS}'", "You> ")
    assert "green stars" in typist.type("What is in the picture?", "bottom.")
    assert "三个" in typist.type("图里有几个图形？", "三个")
    typist.type(":his", "  三个")
    typist.type(":lang zh", "现在使用中文")
    typist.type(":clh", "图片保留")
    typist.type("：his", "还没有对话")
    typist.type(":lang en", "I speak English")
    typist.type(":conf do_sample=true top_p=0.9", "top_p=0.9")
    typist.type(":conf top_q=1", "Did you mean 'top_p'")
    typist.type(":conf __import__('os').abort()", "write name=value")
    typist.type(":seed 7", "The seed is 7.")
    typist.type(":seed seven", "no whole number")
    typist.type(":hitsory", "Did you mean :history")
    typist.type("What colour are they?", "green")
    typist.type(":regen", "green")
    typist.type(":save talk.json", "questions: 1")
    assert "Taken back: What" in typist.type(":undo", "they?")
    typist.type(":undo", "nothing has been asked")
    typist.type(":load talk.json", "questions: 1, images: 1")
    typist.type(f":img {TRIANGLES}", "red_triangles.png, 64 x 64")
    typist.type(":img", "green_stars.png")
    typist.type(":reset-conf", "do_sample=false")
    typist.child.send("\x1b[200~How many\nshapes?\x1b[201~\r")  # a paste
    typist.type(":reset", "for none)> ")
    typist.child.sendeof()
    assert typist.ends() == 0
    assert json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["seed"] == 7
    assert "+How many\n+shapes?" in (tmp_path / "lavis" / "chat_history").read_text(encoding="utf-8")


def test_ctrl_c_stops_an_answer_and_nothing_reaches_the_terminals_controls(tmp_path):
    answer = "# Numbers\n\n\x1b]0;title\x07 <b> " + "on and on " * 200
    typist = Typist(
        [str(ROOT / "tests/serve/scripted_chat.py"), "--image", STARS], tmp_path, ANSWER=answer, PAUSE="0.05"
    )
    typist.read("You> ")
    for question in ("First?", "Second?"):
        shown = typist.type(question, "on and on")
        typist.child.sendintr()
        shown += typist.read("[stopped]")
        assert "\x1b]0;" not in shown and "<b>" in shown and "# Numbers" not in shown
    shown = typist.type(":his", "Second?")
    assert f"[{STARS}]" in shown and "First?" in shown and "on and on" in shown
    typist.read("on and on")
    typist.child.sendintr()  # at the prompt: an empty line
    typist.child.send("half a line")
    typist.child.sendintr()
    typist.type(":q", ":q")
    assert typist.ends() == 0


def test_piped_questions(tmp_path, engine):
    session = ChatSession(engine)
    session.attach(open_picture(TRIANGLES))
    expected = "".join(
        "".join(session.ask(question)) + "\n" for question in ("What is in the picture?", "图中有什么？")
    )
    lines = "What is in the picture?\n\n:his\n:conf top_p=7\n：lang zh\n图中有什么？\n:hlp\n:q\nHow many?\n"
    command = [sys.executable, str(ROOT / "cli_demo.py"), "--model-type", "shapes", "--image", TRIANGLES]
    done = subprocess.run(
        command, input=lines, env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.stdout == expected == "Two red triangles on the left.\n左边有两个红色的三角形。\n"
    assert done.returncode == 1
    assert "top_p=7.0: give 0.01 to 1" in done.stderr and "没有 :hlp" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "lavis").exists()


def test_one_question(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LAVIS_CACHE", str(tmp_path))
    flags = ["chat", "--question", "What is in the picture?", "--image", STARS]
    assert main([*flags, "--model-type", "shapes", "--max-new-tokens", "3", "--lang", "en"]) == 0
    out, err = capsys.readouterr()
    assert out == "Three green stars\n" and "cut at 3 tokens" in err
    assert main(flags) == 1
    assert "nothing says how images reach the LLM of qwen7b_chat" in capsys.readouterr().err
    assert main([*flags, "--max-new-tokens", "0"]) == 1
    assert main([*flags, "--image", "none.png"]) == 1


def test_the_smoke_test_of_a_model_does_nothing_when_imported(tmp_path):
    source = (ROOT / "test_model_chat.py").read_text(encoding="utf-8")
    exec(compile(source, "test_model_chat.py", "exec"), {"__name__": "test_model_chat"})
    assert sorted(p.stem for p in PICTURES.glob("*.png")) == [
        "black_circles",
        "blue_squares",
        "green_stars",
        "red_triangles",
    ]


@pytest.fixture
def terminal(engine, capsys):
    return TerminalChat(ChatSession(engine), Screen(interactive=False), "en")


def test_an_interrupted_regeneration_keeps_the_answer(terminal, monkeypatch):
    terminal.attach([open_picture(STARS)])
    assert terminal.handle("What is in the picture?")
    (turn,) = terminal.session.history

    def interrupted(reply, thinking):
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal.screen, "stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        terminal.handle(":regen")
    assert terminal.session.history == [turn] and not terminal.session.waiting


def test_half_a_character_is_no_traceback(terminal, capsys):
    assert terminal.handle("a\udcffb") and not terminal.handle(":img \udcff")
    assert terminal.handle(":his")


def test_help_names_every_command(terminal, capsys):
    for lang, words in WORDING.items():
        terminal.handle(f":lang {lang}")
        capsys.readouterr()
        assert terminal.handle(":help")
        shown = capsys.readouterr().err
        for command in COMMANDS:
            assert all(f":{name}" in shown for name in command.names) and words[f"help.{command.names[0]}"] in shown


def test_both_languages_say_the_same():
    fields = [{key: sorted(re.findall(r"{(\w+)", text)) for key, text in words.items()} for words in WORDING.values()]
    assert fields[0] == fields[1]
    assert {key for key in WORDING["en"] if key.startswith("help.")} == {
        f"help.{command.names[0]}" for command in COMMANDS
    }


def test_the_language_is_that_of_the_locale():
    assert default_language({"LANG": "zh_CN.UTF-8"}) == "zh"
    assert default_language({"LC_ALL": "en_GB.UTF-8", "LANG": "zh_CN.UTF-8"}) == "en"
    assert default_language({}) == "en"


def test_control_characters():
    assert harmless("a\x1b[31mb\x9b0m\r\n\tc\x07\u202ed\u4e2d") == "a[31mb0m\n\tcd\u4e2d"


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("", []),
        ("a.png b.png", ["a.png", "b.png"]),
        ("a.png, b.png，c.png", ["a.png", "b.png", "c.png"]),
        ("'my cat.png' my\\ dog.png", ["my cat.png", "my dog.png"]),
        ("a#1.png", ["a#1.png"]),
    ],
)
def test_paths(text, paths):
    assert split_paths(text) == paths


def test_paths_that_are_there_need_no_quotes(tmp_path):
    file = tmp_path / "it's a, cat.png"
    file.touch()
    assert split_paths(f" {file} ") == [str(file)]
    with pytest.raises(ChatError, match="quotation mark"):
        split_paths("it's.png")


def texts(line, **options):
    return [text for text, _, _ in completions(line, MEANINGS, **options)]


def test_completion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.png").touch()
    (tmp_path / "some").mkdir()
    (tmp_path / ".hidden").touch()
    assert texts(":re") == [":reset-conf", ":regen", ":reset"]
    assert texts(":se") == [":seed"] and texts("：im") == [":img "]
    assert texts(":conf top_p=1 te") == ["temperature="] and texts(":conf do_sample=t") == ["do_sample=true"]
    assert texts(":lang ") == ["en", "zh"]
    assert texts(":img ") == ["a\\ b.png", "some/"] == texts("", paths=True)
    assert list(completions(":img x.png, a\\ ", MEANINGS)) == [("a\\ b.png", 3, "")]
    assert texts("What about a") == [] == texts(":load none/")


def test_what_was_typed_is_kept_for_its_owner_alone(tmp_path):
    file = history_file({"XDG_CACHE_HOME": str(tmp_path)})
    assert file == tmp_path / "lavis" / "chat_history" and file.stat().st_mode & 0o777 == 0o600
    (tmp_path / "file").touch()
    assert history_file({"XDG_CACHE_HOME": str(tmp_path / "file")}) is None


def test_previews():
    image = Image.new("RGB", (60, 20), (200, 10, 30))
    blocks = preview(image, {"COLORTERM": "truecolor"}).split("\n")
    assert (
        len(blocks) == 7
        and blocks[0].count("▀") == 40
        and blocks[0].startswith("\x1b[38;2;200;10;30;48;2;200;10;30m")
        and blocks[0].endswith("\x1b[0m")
    )
    assert preview(image, {"TERM": "xterm-kitty"}).startswith("\x1b_Ga=T,f=100,c=40,q=2,m=0;")
    assert preview(image, {"TERM_PROGRAM": "iTerm.app"}).startswith("\x1b]1337;File=inline=1;width=40;")
    assert preview(image, {"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}) == "" == preview(image, {"TERM": "xterm"})
    tall = preview(Image.new("RGB", (1, 3000)), {"COLORTERM": "24bit"}).split("\n")
    assert len(tall) == 12


def test_a_large_picture_is_sent_to_kitty_in_chunks():
    image = Image.effect_noise((900, 600), 90).convert("RGB")
    chunks = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", preview(image, {"KITTY_WINDOW_ID": "1"}))
    assert len(chunks) > 1 and all(len(data) <= 4096 for _, data in chunks)
    assert [keys[-3:] for keys, _ in chunks] == ["m=1"] * (len(chunks) - 1) + ["m=0"]


def test_blocks_that_nothing_can_change():
    assert closed_length("one line") == 0 == closed_length("- a\n\n- b\n")
    assert closed_length("# Title\n\ntext") == len("# Title\n\n")
    code = "```python\na\n\nb\n"
    assert closed_length(f"text\u2028more\n{code}") == len("text\u2028more\n")
    assert closed_length(f"{code}```\n中") == len(f"{code}```\n")
