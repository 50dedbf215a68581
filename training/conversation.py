"""From a row of data to a conversation: LLaVA's format and that of messages, recognised by their fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sp_fast.errors import DataError
from sp_fast.llava_sp.processing import IMAGE_TOKEN

#: A path relative to the image folder, or an encoded image.
ImageSource = str | bytes
_LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_ROLES = {role: role for role in _LLAVA_ROLES.values()}


@dataclass(frozen=True)
class Message:
    """What one side says, with ``<image>`` where its images stand."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True)
class Conversation:
    """Messages of users and assistant in turn, after at most one of the system; the assistant has the last word."""

    id: str
    messages: tuple[Message, ...]
    images: tuple[ImageSource, ...]


def sample_id(row: object, where: str) -> str:
    """The row's ``id``, a string or whole number; its place where it has none that can be printed."""
    found = row.get("id") if isinstance(row, Mapping) else None
    if isinstance(found, int) and not isinstance(found, bool):
        return str(found)
    return found if isinstance(found, str) and found and found.isprintable() else where


def read_conversation(row: Mapping[str, Any], where: str) -> Conversation:
    """Of a row ``{conversations: [{from: human|gpt|system, value}], image?: path or list}`` as LLaVA's, or of
    ``{messages: [{role, content: text or [{type: image}, {type: text, text}]}], images?: [path | {path, bytes}]}``.
    Other fields are ignored; a field that is null is as good as absent.

    As in the official code a first message of LLaVA's format that is the assistant's is skipped, and the image of a
    message comes first, on a line of its own. Where a message has several images they stay where they are, because
    their order in the text means something; the official code would keep one. In messages, parts of type image come
    first, as in the chat templates.

    Raises:
        DataError: neither format, a field of another type, roles that do not take turns, or another number of
            ``<image>`` than images. The message does not name the sample: the caller knows it.
    """
    formats = [name for name in _READERS if row.get(name) is not None]
    if len(formats) != 1:
        raise DataError(f"it has {' and '.join(formats) or 'neither'}: a sample has one of {' or '.join(_READERS)}")
    messages = _READERS[formats[0]](_list(row[formats[0]], formats[0]))
    _check_turns(messages)
    images = _images(row)
    places = sum(message.text.count(IMAGE_TOKEN) for message in messages)
    if places != len(images):
        raise DataError(f"its text has {places} {IMAGE_TOKEN} and it has {len(images)} images: each needs its place")
    return Conversation(sample_id(row, where), messages, images)


def _llava(turns: list[Any]) -> tuple[Message, ...]:
    messages = [Message(_role(turn, "from", _LLAVA_ROLES), _image_first(_text(turn, "value"))) for turn in turns]
    start = 1 if messages and messages[0].role == "system" else 0
    if len(messages) > start and messages[start].role == "assistant":
        del messages[start]
    return tuple(messages)


def _image_first(text: str) -> str:
    if text.count(IMAGE_TOKEN) != 1:
        return text
    return f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()


def _messages(turns: list[Any]) -> tuple[Message, ...]:
    return tuple(Message(_role(turn, "role", _ROLES), _content(turn)) for turn in turns)


def _content(turn: Mapping[str, Any]) -> str:
    if not isinstance(turn.get("content"), list):
        return _text(turn, "content")
    parts = [_object(part, "a part of content") for part in turn["content"]]
    if unknown := [part.get("type") for part in parts if part.get("type") not in ("image", "text")]:
        raise DataError(f"a part of content is of type {_short(unknown[0])}: it can be image or text")
    places = sum(part["type"] == "image" for part in parts)
    return f"{IMAGE_TOKEN}\n" * places + "".join(_text(part, "text") for part in parts if part["type"] == "text")


_READERS = {"conversations": _llava, "messages": _messages}


def _images(row: Mapping[str, Any]) -> tuple[ImageSource, ...]:
    fields = [name for name in ("image", "images") if row.get(name) is not None]
    if len(fields) > 1:
        raise DataError("it has image and images: a sample has one of them")
    found = row[fields[0]] if fields else []
    return tuple(_source(source) for source in (found if isinstance(found, list) else [found]))


def _source(value: Any) -> ImageSource:
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if not isinstance(value, str | bytes):
        raise DataError(f"an image is {_short(value)}: give a path, or bytes")
    return value


def _check_turns(messages: tuple[Message, ...]) -> None:
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    for number, message in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if message.role != expected:
            raise DataError(f"a message of the {message.role} stands where one of the {expected} should")
    if len(turns) % 2 or not turns:
        raise DataError("it has no answer at its end: the assistant has the last word")


def _role(turn: Any, field: str, roles: Mapping[str, str]) -> Any:
    found = _object(turn, "a message").get(field)
    if not isinstance(found, str) or found not in roles:
        raise DataError(f"{field} of a message is {_short(found)}: it can be {', '.join(roles)}")
    return roles[found]


def _text(holder: Mapping[str, Any], field: str) -> str:
    found = holder.get(field)
    if not isinstance(found, str):
        raise DataError(f"{field} of a message is {_short(found)}: give text")
    if lone := re.search("[\ud800-\udfff]", found):
        raise DataError(f"{field} of a message has {lone[0]!a}, half of a character, at {lone.start()}")
    return found


def _object(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(f"{name} is {_short(value)}: give an object")
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{name} is {_short(value)}: give a list")
    return value


def _short(value: object) -> str:
    """For a message of one line."""
    found = ascii(value)
    return found if len(found) <= 60 else f"{found[:60]}..."
