"""Whether cores trust each other's certificates, and why not, in words for whoever runs them."""

from __future__ import annotations

import logging
import re

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

log = logging.getLogger(__name__)

_WITHIN = 5.0
_UNPROVED = re.compile(r"CERTIFICATE_VERIFY_FAILED(?:: (?P<why>[\w ]+))?")
_OTHER_NAME = re.compile(r"Hostname Verification|Peer name .* is not in peer certificate")
_NO_TLS = re.compile(r"WRONG_VERSION_NUMBER")


def distrust(problem: aio.AioRpcError) -> str:
    """Return why a call failed, if it is that the other end could not be trusted; else an empty text."""
    return _words(
        problem,
        unproved="by those of advertise_ca, or without it by those that gRPC brings{why}",
        other_name="that it advertises",
        no_tls=", and this core does (tls_cert)",
    )


def distrust_of_engine(problem: aio.AioRpcError, *, named: bool) -> str:
    """Return why a call to an engine failed and what to do, if it cannot be trusted; else an empty text.

    `named` tells whether `engine_ca` names the certificates that are to prove it.
    """
    by = "those in `engine_ca`" if named else "the system's"
    return _words(
        problem,
        unproved=f"by {by}{{why}}; name a file with the one that signed it in `engine_ca`",
        other_name="that `engine` has; correct that, or make a certificate for it",
        no_tls="; give it `tls_cert` and `tls_key` in its own workspace",
    )


def _words(problem: aio.AioRpcError, *, unproved: str, other_name: str, no_tls: str) -> str:
    """Return why the other end is not trusted, with how each of three reasons goes on; empty for any other."""
    told = problem.details() or ""
    if (found := _UNPROVED.search(told)) is not None:
        why = f" ({found['why']})" if found["why"] else ""
        return f"its certificate is not proved {unproved.format(why=why)}"
    if _OTHER_NAME.search(told):
        return f"its certificate does not hold the name {other_name}"
    return f"it does not speak TLS{no_tls}" if _NO_TLS.search(told) else ""


async def prove(bound: str, advertised: str, roots: bytes | None) -> None:
    """Warn where other cores set up like this one would not trust it: its own port is called as they would call it.

    `bound` is where it listens, `advertised` where others reach it, `roots` the certificates, PEM, that prove it.
    """
    name = advertised.rpartition(":")[0].strip("[]")
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.ssl_target_name_override", name))
    host, _, port = bound.rpartition(":")
    here = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    async with aio.secure_channel(f"{here}:{port}", grpc.ssl_channel_credentials(roots), options=options) as channel:
        try:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_WITHIN)
        except aio.AioRpcError as problem:
            if why := distrust(problem):
                log.warning(
                    "other cores will not trust this one, and cannot pass calls on to it",
                    extra={"advertised": advertised, "problem": why},
                )
