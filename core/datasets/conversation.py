"""The canonical row, which is all that the trainer knows of a training file."""

from __future__ import annotations

from typing import Literal

import msgspec

Role = Literal["system", "user", "assistant"]


class Message(msgspec.Struct, frozen=True):
    role: Role
    content: str
    #: Whether the turn counts in the loss; only an assistant's can.
    train: bool


class Conversation(msgspec.Struct, frozen=True):
    messages: tuple[Message, ...]

    @property
    def characters(self) -> int:
        return sum([len(message.content) for message in self.messages])

    @property
    def trained_characters(self) -> int:
        return sum([len(message.content) for message in self.messages if message.train])
