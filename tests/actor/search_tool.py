"""Search tools for tests; the default retriever returns no passages."""

from __future__ import annotations

from collections.abc import Sequence

from actor.chat.chatml import ChatRendering
from actor.chat.rendering import Fidelity, ToolCall
from actor.tools.search import SearchOptions, SearchTool
from actor.tools.tool import Searcher, Services
from protocol.types import Passage

FUNCTION = "wikipedia_search"


class NoSearch:
    """Implements `Searcher`: returns no passages."""

    async def search(self, queries: Sequence[str], *, top_n: int, collection: str = "") -> list[list[Passage]]:
        return [[] for _ in queries]


def search_tool(searcher: Searcher | None = None, **options: object) -> SearchTool:
    """A search tool with `options`, validated as those of a `[[tool]]` section."""
    return SearchTool(SearchOptions.model_validate(options), services=Services(searcher=searcher or NoSearch()))


def chat_rendering(*, fidelity: Fidelity = "mended", top_n: int = 5) -> ChatRendering:
    """The chat texts of a workflow whose only tool is the search tool."""
    return ChatRendering(tools=[search_tool(top_n=top_n).schema], fidelity=fidelity)


def search_call(query: str, **arguments: object) -> ToolCall:
    """The call of the search tool that a rendering parses for `query`."""
    return ToolCall(FUNCTION, {"query": query, **arguments})
