"""Kinds of values that settings have: how text, or what Python and TOML have for it, becomes one.

A kind knows nothing of settings or where they come from. It only says what it would
have allowed; whoever asked makes the error, since only he knows the setting's name.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
from collections.abc import Mapping
from typing import Any


class Kind:
    """How one kind of value is read, from text or from what Python and TOML have for it."""

    metavar = ""
    allowed = ""  # completes "must be ..."
    words: tuple[str, ...] = ()  # what a misspelt word is compared with

    def read(self, value: Any) -> Any:
        """The setting's value. Raises ValueError or TypeError if *value* is not of this kind."""
        raise NotImplementedError

    def show(self, value: Any) -> str:
        """A default, for people."""
        return str(value)


class Text(Kind):
    """Any text, or what *pattern* matches. Numbers and paths are taken for their text."""

    def __init__(self, metavar: str, allowed: str = "text", pattern: str = "(?s:.*)") -> None:
        self.metavar = metavar
        self.allowed = allowed
        self._pattern = re.compile(pattern)

    def read(self, value: Any) -> str:
        text = str(value) if type(value) is int else os.fspath(value)
        if not isinstance(text, str) or "\0" in text or not self._pattern.fullmatch(text):
            raise ValueError
        return text

    def show(self, value: Any) -> str:
        return value or "none"


class Application(Text):
    """`module:attribute`, or from Python the application itself."""

    def read(self, value: Any) -> Any:
        if callable(value):
            return value
        if not isinstance(value, str):
            raise TypeError
        return super().read(value)


class Picking(Text):
    """Who chooses the worker for a connection: a word, `module:function`, or from Python the function itself."""

    words = ("least_connections", "round_robin", "least_busy", "sticky:ip")

    def __init__(self) -> None:
        kinds = (*self.words, "sticky:header:NAME", "sticky:cookie:NAME", "MODULE:FUNCTION")
        name = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
        function = r"(?!sticky:)[^\s:]+:[^\s:]+"
        super().__init__(
            "PICK",
            "one of " + ", ".join(kinds),
            "|".join((*self.words, f"sticky:(header|cookie):{name}", function)),
        )

    def read(self, value: Any) -> Any:
        return value if callable(value) or hasattr(value, "choose") else super().read(value)


class Header(Text):
    """The value of a header, none for "off"."""

    def read(self, value: Any) -> str:
        return "" if value == "off" else super().read(value)


class Choice(Kind):
    """One of a few words."""

    def __init__(self, *words: str) -> None:
        self.words = words
        self.metavar = "|".join(words)
        self.allowed = "one of " + ", ".join(words)

    def read(self, value: Any) -> str:
        if value not in self.words:
            raise ValueError
        return str(value)


class Whole(Kind):
    """A whole number in a range, or the word that stands for one."""

    def __init__(self, least: int, most: int, *words: str) -> None:
        self.words = words
        self.metavar = "|".join(("N", *words))
        self.allowed = " or ".join((f"a whole number from {least} to {most}", *words))
        self._range = range(least, most + 1)

    def read(self, value: Any) -> int | str:
        if value in self.words:
            return str(value)
        number = _plain_int(value) if isinstance(value, str) else value
        if type(number) is not int or number not in self._range:
            raise ValueError
        return number


class Seconds(Kind):
    """A length of time; fractions are fine."""

    metavar = "SECONDS"
    allowed = "a number of seconds, 0 or more"

    def read(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise TypeError
        seconds = float(value)
        if not 0 <= seconds < math.inf:
            raise ValueError
        return seconds

    def show(self, value: Any) -> str:
        return f"{value:g} seconds"


_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


class Size(Kind):
    """A number of bytes; text may end in k, m or g, which count in 1024s."""

    metavar = "SIZE"

    def __init__(self, least: int) -> None:
        self.allowed = f"a number of bytes, {least} or more, such as 8190, 16k, 10m or 1g"
        self._least = least

    def read(self, value: Any) -> int:
        if isinstance(value, str):
            match = re.fullmatch(r"([0-9]+)([kmg]?)b?", value.strip().lower())
            if not match:
                raise ValueError
            value = int(match[1]) * _UNITS[match[2]]
        if type(value) is not int or value < self._least:
            raise ValueError
        return value

    def show(self, value: Any) -> str:
        return f"{value} bytes" if value else "0"


class Switch(Kind):
    """Yes or no."""

    words = ("yes", "no", "true", "false", "on", "off", "1", "0")
    allowed = "yes or no (true, false, on, off, 1 and 0 will do)"

    def read(self, value: Any) -> bool:
        return value if isinstance(value, bool) else self.words.index(value.lower()) % 2 == 0

    def show(self, value: Any) -> str:
        return "yes" if value else "no"


class Mode(Kind):
    """Permissions in octal. Text only: TOML's 400 is a decimal number, and would mean 0o620."""

    metavar = "OCTAL"
    allowed = "permissions in octal as text, such as '660'"

    def read(self, value: Any) -> int:
        if not isinstance(value, str) or not re.fullmatch("(0o)?[0-7]{1,4}", value) or int(value, 8) > 0o777:
            raise ValueError
        return int(value, 8)

    def show(self, value: Any) -> str:
        return "none" if value is None else f"{value:o}"


class Several(Kind):
    """Any number of values of one kind; a table of TOML or a dict counts as NAME=VALUE pairs."""

    def __init__(self, each: Kind) -> None:
        self.each = each
        self.metavar = each.metavar
        self.allowed = each.allowed

    def read(self, value: Any) -> tuple[Any, ...]:
        if isinstance(value, Mapping):
            value = [f"{name}={text}" for name, text in value.items()]
        elif not isinstance(value, (list, tuple)):
            value = [value]
        return tuple(self.each.read(item) for item in value)

    def show(self, value: Any) -> str:
        return ", ".join(value) or "none"


class Listed(Several):
    """`Several`, whose text may hold values between commas, as lists of addresses are written everywhere."""

    def __init__(self, each: Kind, metavar: str) -> None:
        super().__init__(each)
        self.metavar = metavar
        self.words = each.words

    def read(self, value: Any) -> tuple[Any, ...]:
        items = value if isinstance(value, (list, tuple)) else [value]
        return super().read([part.strip() for item in items for part in str(item).split(",") if part.strip()])


class Peer(Kind):
    """Who may be trusted: an address, a network, or a word for those that have none."""

    allowed = "addresses, networks such as 10.0.0.0/8, unix (whoever is on a unix socket) or * (everybody), with commas"
    words = ("unix", "*")

    def read(self, value: Any) -> str:
        if value not in self.words:
            ipaddress.ip_network(value)
        return str(value)


def _plain_int(text: str) -> int | None:
    """int() without the spellings that would surprise in a setting: 1_000, +5, other scripts' digits."""
    return int(text) if re.fullmatch("-?[0-9]{1,18}", text.strip()) else None
