"""How a conversation is laid out as one text: by prefixes and suffixes, or by the model's own Jinja template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from moltbot_server.errors import InvalidField
from moltbot_server.models.markers import APART, CUT, MARKER
from moltbot_server.turns import Role, Value

_SAMPLES = tuple(f"\ue000{index}\ue001" for index in range(6))
"""Texts that no template holds, to see what it writes around messages."""


class Entry(Value, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What stands around a message of one role."""

    prefix: str = ""
    suffix: str = ""


class ChatTemplate(Value, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a conversation is laid out for the model: `bos`, then each message between its prefix and its suffix.

    `system_in_user`: a system message replaces the prefix of the user message after it, as Llama 2 wants it.
    `stop` lists what ends an answer.
    """

    user: Entry
    assistant: Entry
    system: Entry = Entry()
    bos: str = ""
    stop: tuple[str, ...] = ()
    system_in_user: bool = False


class Said(NamedTuple):
    """What is laid out: a role, and a text in which nothing reads as a marker."""

    role: Role
    text: str


class TemplateRefused(Exception):
    """A template cannot be used, or refuses a conversation; the text says why."""


class Render(Protocol):
    """A compiled template."""

    def __call__(self, messages: Sequence[Mapping[str, str]], *, opened: bool) -> str:
        """Return the text of a conversation, with the answer's beginning when it is `opened`.

        Raises:
            TemplateRefused: the template refuses the conversation, or cannot lay it out within its bounds.
        """


class Layout(Protocol):
    """How a model wants conversations."""

    @property
    def source(self) -> str:
        """All texts of the template, to find the markers that it names."""

    @property
    def around(self) -> Mapping[Role, Entry]:
        """What stands around a message in the midst of a conversation: what the message is counted with."""

    def prompt(self, turns: Sequence[Said]) -> str:
        """Return the text of a conversation up to where the answer begins.

        Raises:
            InvalidField: the template refuses this order of roles.
        """


class PrefixLayout:
    """Lays out by prefixes and suffixes.

    An answer without a prefix is a text of its own: what the model wrote after the question's suffix.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        entries = {Role.SYSTEM: template.system, Role.USER: template.user, Role.ASSISTANT: template.assistant}
        self.around: Mapping[Role, Entry] = entries
        self.source = "".join(
            (template.bos, *(entry.prefix + entry.suffix for entry in entries.values()), *template.stop)
        )

    def prompt(self, turns: Sequence[Said]) -> str:
        """Return the text of a conversation up to where the answer begins."""
        template = self._template
        parts = [template.bos]
        before: Role | None = None
        for role, text in turns:
            entry = self.around[role]
            joined = template.system_in_user and before is Role.SYSTEM and role is Role.USER
            begins = "" if joined else entry.prefix or (APART if role is Role.ASSISTANT else "")
            parts += (begins, text, entry.suffix)
            before = role
        parts.append(template.assistant.prefix)
        return "".join(parts)


class JinjaLayout:
    """Lays out by the model's own template.

    A template that knows no system message, or drops it, gets the text at the head of the first question.
    """

    def __init__(self, source: str, render: Render) -> None:
        """Try the template on small conversations.

        Raises:
            TemplateRefused: it lays out not even a question and an answer.
        """
        self.source = source
        self._render = render
        self._knows_system = self._tells((Role.SYSTEM, Role.USER))
        self.around: Mapping[Role, Entry] = self._look_around()

    def prompt(self, turns: Sequence[Said]) -> str:
        """Return the text of a conversation up to where the answer begins; see `Layout.prompt`."""
        if not self._knows_system:
            turns = _system_in_question(turns)
        try:
            return self._text(turns)
        except TemplateRefused:
            pass  # most refuse two messages of one role in a row; trimmed and brought conversations have them
        try:
            return self._text(_one_by_one(_system_in_question(turns)))
        except TemplateRefused as refusal:
            raise InvalidField("messages", f"the model's chat template refuses them: {refusal}") from None

    def _text(self, turns: Sequence[Said], *, opened: bool = True) -> str:
        return self._render([{"role": role.value, "content": text} for role, text in turns], opened=opened)

    def _tells(self, roles: Sequence[Role]) -> bool:
        turns = [Said(role, sample) for role, sample in zip(roles, _SAMPLES, strict=False)]
        try:
            text = self._text(turns)
        except TemplateRefused:
            return False
        return all(sample in text for _, sample in turns)

    def _look_around(self) -> dict[Role, Entry]:
        pair = (Role.USER, Role.ASSISTANT)
        turns = [Said(role, sample) for role, sample in zip(pair * 3, _SAMPLES, strict=True)]
        text = self._text(turns, opened=False)
        if not all(sample in text for sample in _SAMPLES):
            raise TemplateRefused("it leaves messages out")
        user = text.partition(_SAMPLES[3])[2].partition(_SAMPLES[4])[0]
        assistant = text.partition(_SAMPLES[4])[2].partition(_SAMPLES[5])[0]
        around = {Role.USER: Entry(prefix=user), Role.ASSISTANT: Entry(prefix=assistant)}
        if not self._knows_system:
            return around | {Role.SYSTEM: Entry(suffix="\n\n")}
        text = self._text([Said(Role.SYSTEM, _SAMPLES[0]), Said(Role.USER, _SAMPLES[1])], opened=False)
        return around | {Role.SYSTEM: Entry(prefix=text.partition(_SAMPLES[0])[0])}


def end_of_answer(render: Render, vocabulary: frozenset[str]) -> str:
    """Return the token that a template writes after an answer; empty when that is none.

    Raises:
        TemplateRefused: the template lays out not even a question and an answer.
    """
    question, answer = _SAMPLES[:2]
    turns = [{"role": Role.USER.value, "content": question}, {"role": Role.ASSISTANT.value, "content": answer}]
    first = MARKER.match(render(turns, opened=False).partition(answer)[2].lstrip())
    return first[0] if first and first[0] in vocabulary else ""


def _system_in_question(turns: Sequence[Said]) -> Sequence[Said]:
    system = [text for role, text in turns if role is Role.SYSTEM]
    if not system:
        return turns
    rest = [said for said in turns if said.role is not Role.SYSTEM]
    first = next((at for at, said in enumerate(rest) if said.role is Role.USER), None)
    text = "\n\n".join(system)
    if first is None:
        return [Said(Role.USER, text), *rest]
    return [*rest[:first], Said(Role.USER, f"{text}\n\n{rest[first].text}"), *rest[first + 1 :]]


def _one_by_one(turns: Sequence[Said]) -> Sequence[Said]:
    """Return a conversation that begins with a question and in which the roles take turns."""
    merged: list[Said] = []
    for said in turns:
        if merged and merged[-1].role is said.role:
            # The cut keeps a marker from arising where two texts meet.
            merged[-1] = Said(said.role, f"{merged[-1].text}{CUT}\n\n{said.text}")
        elif merged or said.role is Role.USER:
            merged.append(said)
    return merged
