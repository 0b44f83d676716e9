"""What is said about a recipe that does not fit the schema: each problem with its place, and a valid name near it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from lavis.config.compat import leaves, older_names
from lavis.config.layers import Layer, place
from lavis.config.typed import Problem
from lavis.core.errors import did_you_mean

_DOTTED = re.compile(r"\b[a-z_]\w*(?:\.\w+)+")
_SURE = 0.85
"""How like a name of another section has to be to be proposed: a slip of the finger, no more."""


def report(problems: Sequence[Problem], layers: Sequence[Layer], source: str) -> str:
    """The problems of a recipe of these layers, the schema's first, as one message."""
    return listed([_described(problem, layers) for problem in problems], source)


def listed(messages: Sequence[str], source: str) -> str:
    """One message of several."""
    if len(messages) == 1:
        return messages[0]
    return f"{source}: {len(messages)} problems\n" + "\n".join(f"  - {message}" for message in messages)


def with_older_names(message: str, layers: Sequence[Layer]) -> str:
    """`message`, which speaks of today's keys, with what they are called in the recipe where it has older names."""
    written = {key: place(key, layers)[0] for key in dict.fromkeys(_DOTTED.findall(message))}
    older = [f"{own} is called {key} now" for key, own in written.items() if own != key and own not in message]
    return f"{message} ({'; '.join(older)}.)" if older else message


def _described(problem: Problem, layers: Sequence[Layer]) -> str:
    key, at = place(problem.key, layers)
    renamed = f" ({key} is called {problem.key} now.)" if key != problem.key else ""
    end = "" if problem.message.endswith(("?", ".")) else "."
    return f"{key} ({at}): {problem.message}{end}{_nearest(problem, layers)}{renamed}"


def _nearest(problem: Problem, layers: Sequence[Layer]) -> str:
    """A hint for an unknown key: the key of this name elsewhere, else near names that are possible here, else all."""
    if problem.siblings is None:
        return ""
    section, _, name = problem.key.rpartition(".")
    elsewhere = _by_name(layers[0].plain)
    if name in elsewhere:
        return f" It belongs elsewhere: {' or '.join(elsewhere[name][:3])}."
    if beside := did_you_mean(name, [*problem.siblings, *older_names(section)]):
        return beside
    if slips := difflib.get_close_matches(name, elsewhere, n=1, cutoff=_SURE):
        return f" Did you mean {slips[0]!r} ({elsewhere[slips[0]][0]})?"
    return f" Known here: {', '.join(problem.siblings)}."


def _by_name(schema: Mapping[str, object]) -> dict[str, list[str]]:
    """Last part of a key to the dotted keys of the schema, and the older ones, that end in it."""
    result: dict[str, list[str]] = {}
    for key in [*(key for key, _ in leaves(schema)), *older_names()]:
        result.setdefault(key.rpartition(".")[2], []).append(key)
    return result
