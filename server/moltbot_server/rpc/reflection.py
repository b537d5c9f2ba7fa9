"""Server reflection: lets grpcurl and its like learn the contract from a running core."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

SERVICE_NAME: str = reflection.SERVICE_NAME


class ReflectionService(reflection_pb2_grpc.ServerReflectionServicer):  # type: ignore[misc]  # grpcio ships no types
    """Answers what services there are and how they are described.

    grpcio's own servicer yields its answers; handlers behind our guard write theirs.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._answers = reflection.aio.ReflectionServicer(names).ServerReflectionInfo

    async def ServerReflectionInfo(self, request_iterator: AsyncIterator[Any], context: Any) -> None:
        """Answer each question of the stream."""
        async with aclosing(self._answers(request_iterator, context)) as answers:
            async for answer in answers:
                await context.write(answer)
