"""What surrounds every RPC: its access rule, its errors as statuses, its count and its time.

Handlers are wrapped once, when they are registered. A chain of `grpc.aio` interceptors costs more for each call, and
sees streams only from outside.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from moltbot_server.auth.keys import Authenticator
from moltbot_server.errors import InternalError, InvalidField, MoltBotError, NotServing, SlowConsumer, TurnFailed
from moltbot_server.metrics import Metrics
from moltbot_server.turns import Principal

log = logging.getLogger(__name__)

DOMAIN = "moltbot"

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_STATUS_KEY = "grpc-status-details-bin"
_PUSHBACK_KEY = "grpc-retry-pushback-ms"
_HANDOFF_KEY = "moltbot-handoff"
_TELLING = 1.0  # seconds for what a peer is told who has taken nothing for long
_TOLD = frozenset({_STATUS_KEY, _PUSHBACK_KEY, _HANDOFF_KEY})


class PassedOn(Exception):
    """A call that another core of ours has refused; its caller is told the same."""

    def __init__(self, problem: aio.AioRpcError) -> None:
        super().__init__(problem.details())
        self.problem = problem
        self.code = problem.code()
        self.message = problem.details() or ""
        told = problem.trailing_metadata() or ()
        self.trailers = tuple((key, value) for key, value in told if key in _TOLD)


class Call:
    """One RPC under way: who calls, when it arrived on `time.perf_counter`, and until when it may take."""

    __slots__ = ("arrived", "context", "principal")

    def __init__(self, context: Any, principal: Principal, arrived: float) -> None:
        self.context = context
        self.principal = principal
        self.arrived = arrived

    def deadline(self) -> float | None:
        """Return the caller's deadline on the event loop's clock, or None."""
        remaining = self.context.time_remaining()
        return None if remaining is None else asyncio.get_running_loop().time() + remaining


Unary = Callable[[Any, Any], Awaitable[Any]]
Gate = Callable[[Principal], MoltBotError | None]
"""Asked before a call is read: returns why it is refused whatever it says, if so."""


class Guard:
    """Wraps the handlers of a service."""

    def __init__(self, authenticator: Authenticator, metrics: Metrics) -> None:
        self._authenticator = authenticator
        self._metrics = metrics

    def wrap(self, method: str, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        """Return the handler with its rule, its errors and its metrics around it. `method` is the full name."""
        kinds = (
            ("unary_unary", grpc.unary_unary_rpc_method_handler),
            ("unary_stream", grpc.unary_stream_rpc_method_handler),
            ("stream_unary", grpc.stream_unary_rpc_method_handler),
            ("stream_stream", grpc.stream_stream_rpc_method_handler),
        )
        for name, make in kinds:
            behaviour = getattr(handler, name)
            if behaviour is not None:
                return make(
                    self._around(method, behaviour, one_request=name.startswith("unary")),
                    request_deserializer=_forgiving(handler.request_deserializer),
                    response_serializer=handler.response_serializer,
                )
        raise TypeError(f"{method} has no behaviour")

    def gate(self, method: str, gate: Gate) -> Callable[[Any], grpc.RpcMethodHandler[Any, Any] | None]:
        """Return what looks at a call's metadata and, where the gate refuses, returns a handler that does just that."""
        short = method.rpartition(".")[2]
        admit = self._authenticator.admit
        ended, errors = self._metrics.call_ended, self._metrics.errors

        def unread(metadata: Any) -> grpc.RpcMethodHandler[Any, Any] | None:
            try:
                refusal = gate(admit(method, _authorization(metadata)))
            except MoltBotError:
                return None
            if refusal is None:
                return None

            async def refuse(_requests: Any, context: Any) -> None:
                errors.add(refusal.reason)
                ended(short, refusal.status.name, 0.0)
                await _refuse(context, refusal)

            # Of what is said to be a stream no request is read beforehand.
            return grpc.stream_stream_rpc_method_handler(refuse)

        return unread

    def _around(self, method: str, behaviour: Unary, *, one_request: bool) -> Unary:
        short = method.rpartition(".")[2]
        admit = self._authenticator.admit
        ended, errors = self._metrics.call_ended, self._metrics.errors
        foreign = not method.startswith("/moltbot.")

        async def guarded(request: Any, context: Any) -> Any:
            arrived = time.perf_counter()
            status = "OK"
            try:
                principal = admit(method, _authorization(context.invocation_metadata()))
                request = _well_formed(request) if one_request else _Requests(request)
                return await behaviour(request, context if foreign else Call(context, principal, arrived))
            except asyncio.CancelledError:
                # The peer left or the server stops; swallowing this leaks the call's buffers in grpcio.
                status = "CANCELLED"
                raise
            except aio.InternalError as error:
                # The peer left while a write was under way; grpcio says so in this way.
                status = "CANCELLED"
                raise asyncio.CancelledError from error
            except SlowConsumer as error:
                errors.add(error.reason)
                status = error.status.name
                await _leave_behind(context, error)
            except MoltBotError as error:
                errors.add(error.reason)
                status = error.status.name
                await _refuse(context, error)
            except TurnFailed as error:
                status = error.status.name
                await _refuse(context, error)
            except PassedOn as told:
                status = told.code.name
                await _abort(context, told.code, told.message, told.trailers)
            except aio.AbortError:
                status = "ABORTED"
                raise
            except Exception:
                incident = secrets.token_hex(4)
                log.exception("an RPC failed", extra={"incident": incident, "method": short})
                errors.add(InternalError.reason)
                status = InternalError.status.name
                await _refuse(context, InternalError(f"something went wrong (incident {incident})"))
            finally:
                ended(short, status, time.perf_counter() - arrived)

        return guarded


async def _refuse(context: Any, error: MoltBotError | TurnFailed) -> None:
    if error.fields:
        trailers = _trailers(error)
    else:
        # Floods are refused with the same few words over and over.
        key = (error.reason, error.message, error.retry_after, getattr(error, "handed_over", False))
        trailers = _WRITTEN.get(key) or _keep(key, _trailers(error))
    await _abort(context, _CODES[int(error.status)], error.message, trailers)


async def _leave_behind(context: Any, error: SlowConsumer) -> None:
    """Refuse to go on, and wait no longer: what is told comes behind what the peer has not taken yet."""
    try:
        async with asyncio.timeout(_TELLING):
            await _refuse(context, error)
    except TimeoutError:
        raise asyncio.CancelledError from None


async def _abort(context: Any, code: grpc.StatusCode, message: str, trailers: _Trailers) -> None:
    try:
        await context.abort(code, message, trailers)
    except aio.InternalError as gone:
        # The call has ended already, by its deadline or because the peer left; nobody hears the refusal.
        raise asyncio.CancelledError from gone


_Trailers = tuple[tuple[str, str | bytes], ...]
_MOST_WRITTEN = 256
_Told: TypeAlias = "tuple[str, str, float | None, bool]"
_WRITTEN: dict[_Told, _Trailers] = {}


def _keep(key: _Told, trailers: _Trailers) -> _Trailers:
    if len(_WRITTEN) >= _MOST_WRITTEN:
        _WRITTEN.clear()
    _WRITTEN[key] = trailers
    return trailers


def _trailers(error: MoltBotError | TurnFailed) -> _Trailers:
    trailers: list[tuple[str, str | bytes]] = [(_STATUS_KEY, status_of(error).SerializeToString())]
    if error.retry_after is not None:
        trailers.append((_PUSHBACK_KEY, str(int(error.retry_after * 1000))))
    if isinstance(error, NotServing) and error.handed_over:
        # What was asked for goes on somewhere: whoever comes back finds it.
        trailers.append((_HANDOFF_KEY, "1"))
    return tuple(trailers)


class _Malformed:
    """Stands for a request whose bytes are no message: left to grpcio, it would be told as UNKNOWN."""


_MALFORMED = _Malformed()


def _forgiving(read: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if read is None:
        return None

    def read_or_mark(request: bytes) -> Any:
        try:
            return read(request)
        except DecodeError:
            return _MALFORMED

    return read_or_mark


def _well_formed(request: Any) -> Any:
    if request is _MALFORMED:
        raise InvalidField("request", "these bytes are no message of this method; texts must be UTF-8")
    return request


class _Requests:
    """The requests of a stream, each of them well formed."""

    __slots__ = ("_requests",)

    def __init__(self, requests: AsyncIterable[Any]) -> None:
        self._requests = aiter(requests)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        return _well_formed(await anext(self._requests))


def status_of(error: MoltBotError | TurnFailed) -> status_pb2.Status:
    """Return an error as `google.rpc.Status` with its details."""
    status = status_pb2.Status(code=int(error.status), message=error.message)
    details: list[Any] = [
        error_details_pb2.ErrorInfo(
            reason=error.reason, domain=DOMAIN, metadata={"retryable": "true" if error.retryable else "false"}
        )
    ]
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if error.fields:
        violations = [
            error_details_pb2.BadRequest.FieldViolation(field=field, description=problem)
            for field, problem in error.fields.items()
        ]
        details.append(error_details_pb2.BadRequest(field_violations=violations))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _authorization(metadata: Any) -> str | None:
    for key, value in metadata or ():
        if key == "authorization":
            return value if isinstance(value, str) else value.decode("latin-1")
    return None


_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Unread: TypeAlias = "Callable[[Any], _Handler | None]"


class _Methods(grpc.ServiceRpcHandler):
    """The methods of a service by their full names; `unread` may answer for one before its call is read."""

    def __init__(self, service: str, methods: Mapping[str, _Handler], unread: Mapping[str, _Unread]) -> None:
        self._service = service
        self._methods = methods
        self._unread = unread

    def service_name(self) -> str:
        return self._service

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> _Handler | None:
        unread = self._unread.get(handler_call_details.method)
        refusing = unread(handler_call_details.invocation_metadata) if unread else None
        return refusing or self._methods.get(handler_call_details.method)


class GuardedServer:
    """Stands in for the server while services register, so that no handler gets around the guard.

    `gates` are asked, by the full names of methods, before a call is read. It answers to the two methods that generated
    code calls. Handlers are handed on as generic ones only: registered ones cost newer releases of grpcio more for each
    call (docs/decisions/0002-grpcio-version.md).
    """

    def __init__(self, server: aio.Server, guard: Guard, gates: Mapping[str, Gate] | None = None) -> None:
        self._server = server
        self._guard = guard
        self._gates = gates or {}
        self.methods: list[str] = []

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Register a service's handlers, guarded."""
        guarded = []
        for handler in handlers:
            service = handler.service_name()  # type: ignore[attr-defined]
            methods = {
                name: self._guard.wrap(name, method)
                for name, method in handler._method_handlers.items()  # type: ignore[attr-defined]
            }
            self.methods.extend(methods)
            gates = {name: self._gates[name] for name in methods if name in self._gates}
            guarded.append(_Methods(service, methods, {n: self._guard.gate(n, gate) for n, gate in gates.items()}))
        self._server.add_generic_rpc_handlers(tuple(guarded))

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """Do nothing: the same handlers come as generic ones, and those are guarded."""
