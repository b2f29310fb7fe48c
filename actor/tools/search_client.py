"""A client of the retriever. A failed search fails the trajectory; it is not shown to the policy."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from protocol.errors import ProtocolError, RemoteError
from protocol.framing import describe
from protocol.request_client import RequestClient
from protocol.search_messages import SearchReply, SearchRequest
from protocol.transport import Transport
from protocol.types import Passage

# A search without a reply is sent again after this time: the retriever may have been restarted.
RESEND_S = 2.0


class SearchFailed(RemoteError):
    """The retriever did not reply in time, or replied with an error or an invalid message."""


class SearchClient:
    """Runs concurrent searches over one connection. An async context manager, which does not close `transport`."""

    def __init__(
        self, *, transport: Transport, address: str, timeout_s: float = 30.0, resend_s: float = RESEND_S
    ) -> None:
        self._requests = RequestClient(transport.dealer(address))
        self._address = address
        self._timeout_s = timeout_s
        self._resend_s = resend_s

    async def __aenter__(self) -> SearchClient:
        await self._requests.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._requests.__aexit__(*error)

    async def search(self, queries: Sequence[str], *, top_n: int, collection: str = "") -> list[list[Passage]]:
        """Returns for each query its passages, best first, at most `top_n`. Raises: SearchFailed."""
        try:
            request = SearchRequest(
                request_id=self._requests.next_id(), queries=list(queries), top_n=top_n, collection=collection
            )
            reply, _ = await self._requests.request(
                request, SearchReply, timeout_s=self._timeout_s, resend_s=self._resend_s
            )
        except ValidationError as error:
            raise SearchFailed(f"search failed: {describe(error)}") from error
        except TimeoutError as error:
            raise SearchFailed(f"the retriever at {self._address} did not answer in {self._timeout_s:g} s") from error
        except (RemoteError, ProtocolError) as error:
            raise SearchFailed(f"search failed: {error}") from error
        if len(reply.results) != len(queries):
            raise SearchFailed(f"search failed: {len(queries)} queries got {len(reply.results)} results")
        return [[Passage(p.id, p.title, p.text, p.score) for p in found[:top_n]] for found in reply.results]
