"""Between the core's values and the contract's messages, the other way round: where the core itself is the caller."""

from __future__ import annotations

from moltbot.v1 import inference_pb2, message_pb2, model_pb2

from moltbot_server.models.engine import Capabilities, Finished
from moltbot_server.rpc import convert
from moltbot_server.turns import (
    FinishReason,
    GenerationOptions,
    Message,
    Role,
    ToolCallPart,
    ToolChoice,
    ToolMode,
    Usage,
)

_ROLES = {role: message_pb2.Role.Value(f"ROLE_{role.value.upper()}") for role in Role}
_MODES = {mode: message_pb2.ToolMode.Value(f"TOOL_MODE_{mode.value.upper()}") for mode in ToolMode}
_REASONS = {message_pb2.FinishReason.Value(f"FINISH_REASON_{reason.value.upper()}"): reason for reason in FinishReason}


def message(value: Message) -> message_pb2.Message:
    """Return a message of a conversation as a model is to read it: without its name and its time."""
    return message_pb2.Message(role=_ROLES[value.role], parts=map(convert.part, value.parts))


def options(value: GenerationOptions) -> message_pb2.GenerationOptions:
    """Return how an answer is to be written; what is left to the model stays unset."""
    return message_pb2.GenerationOptions(
        max_output_tokens=value.max_output_tokens,
        temperature=value.temperature,
        top_p=value.top_p,
        top_k=value.top_k,
        stop=value.stop,
        repetition_penalty=value.repetition_penalty,
        seed=value.seed,
        tools=[
            message_pb2.Tool(
                name=tool.name, description=tool.description, parameters_json=tool.parameters_json, strict=tool.strict
            )
            for tool in value.tools
        ],
        tool_choice=None if value.tool_choice is None else _tool_choice(value.tool_choice),
    )


def _tool_choice(value: ToolChoice) -> message_pb2.ToolChoice:
    return message_pb2.ToolChoice(mode=_MODES[value.mode], tool=value.tool)


def finished(end: inference_pb2.GenerateFinished) -> Finished:
    """Return how a generation ended over there; a reason that is not known here is an ordinary end."""
    return Finished(
        finish_reason=_REASONS.get(end.finish_reason, FinishReason.STOP),
        usage=Usage(
            input_tokens=end.usage.input_tokens,
            output_tokens=end.usage.output_tokens,
            cached_input_tokens=end.usage.cached_input_tokens,
        ),
        queue=end.queue.ToNanoseconds() / 1e9,
        first_token=end.first_token.ToNanoseconds() / 1e9,
        generation=end.generation.ToNanoseconds() / 1e9,
        trimmed_messages=end.trimmed_messages,
        attachments=tuple(
            ToolCallPart(call_id=call.call_id, tool=call.tool, arguments_json=call.arguments_json)
            for call in end.tool_calls
        ),
    )


def capabilities(found: model_pb2.ModelCapabilities) -> Capabilities:
    """Return what a model over there says that it can do."""
    return Capabilities(**{field.name: getattr(found, field.name) for field in found.DESCRIPTOR.fields})
