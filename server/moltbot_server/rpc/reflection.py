"""Server reflection: lets grpcurl, ghz and their like learn the contract from a running core."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

SERVICE_NAME: str = reflection.SERVICE_NAME


class ReflectionService(reflection_pb2_grpc.ServerReflectionServicer):  # type: ignore[misc]  # grpcio ships no types
    """Answers what services there are and how they are described.

    grpcio's own servicer yields its answers; handlers behind our guard write theirs. It finds services and messages,
    but no methods, for which ghz asks: they are looked for as the service that has them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)
        self._answers = reflection.aio.ReflectionServicer(names).ServerReflectionInfo

    async def ServerReflectionInfo(self, request_iterator: AsyncIterator[Any], context: Any) -> None:
        """Answer each question of the stream."""
        asked: deque[Any] = deque()

        async def questions() -> AsyncIterator[Any]:
            async for question in request_iterator:
                asked.append(question)
                yield self._of_service(question)

        async with aclosing(self._answers(questions(), context)) as answers:
            async for answer in answers:
                answer.original_request.CopyFrom(asked.popleft())
                await context.write(answer)

    def _of_service(self, question: Any) -> Any:
        service, _, method = question.file_containing_symbol.rpartition(".")
        if service not in self._names or not _has(service, method):
            return question
        return reflection_pb2.ServerReflectionRequest(host=question.host, file_containing_symbol=service)


def _has(service: str, method: str) -> bool:
    return method in descriptor_pool.Default().FindServiceByName(service).methods_by_name
