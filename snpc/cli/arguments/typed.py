"""The command as it was typed, and other commands made of it: for advice that can be pasted into a shell."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import click

WORDS_KEY = "snpc.words"  # in click's ``Context.meta``: the words after the name of the command

OptionWords = tuple[str, ...]


@dataclass(frozen=True)
class TypedCommand:
    """``options``: each flag with its values."""

    name: str
    arguments: tuple[str, ...]
    options: tuple[OptionWords, ...]

    @classmethod
    def current(cls) -> TypedCommand:
        """The command that runs."""
        context = click.get_current_context()
        return cls.parse(str(context.info_name), context.command, context.meta.get(WORDS_KEY, ()))

    @classmethod
    def parse(cls, name: str, command: click.Command, words: Sequence[str]) -> TypedCommand:
        counts = value_counts(command)
        arguments: list[str] = []
        options: list[OptionWords] = []
        rest = list(words)
        while rest:
            word = rest.pop(0)
            flag, equals, value = word.partition("=")
            if flag in counts and equals and word.startswith("--"):
                options.append((flag, value))
            elif word in counts:
                options.append((word, *rest[: counts[word]]))
                del rest[: counts[word]]
            elif word[:2] in counts and not word.startswith("--") and len(word) > 2:
                options.append((word[:2], word[2:]))
            elif word != "--":
                arguments.append(word)
        return cls(name, tuple(arguments), tuple(options))

    def has(self, *flags: str) -> bool:
        return any(option[0] in flags for option in self.options)

    def without(self, *flags: str) -> TypedCommand:
        return replace(self, options=tuple(option for option in self.options if option[0] not in flags))

    def plus(self, *words: str) -> TypedCommand:
        """With one more option."""
        return replace(self, options=(*self.options, words))

    def of(self, name: str, *arguments: str, drop: Iterable[str] = ()) -> TypedCommand:
        """Another command with these arguments, and those of the options that it has too, without ``drop``."""
        context = click.get_current_context().find_root()
        assert isinstance(context.command, click.Group)
        other = context.command.get_command(context, name)
        assert other is not None
        known = set(value_counts(other)) - set(drop)
        kept = tuple(option for option in self.options if option[0] in known)
        return TypedCommand(name, arguments or self.arguments, kept)

    def text(self) -> str:
        """A line for the shell."""
        return shlex.join(["snpc", self.name, *self.arguments, *(word for option in self.options for word in option)])


def value_counts(command: click.Command) -> dict[str, int]:
    """Flag -> how many words follow it."""
    return {
        flag: 0 if parameter.is_flag else parameter.nargs
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for flag in (*parameter.opts, *parameter.secondary_opts)
    }
