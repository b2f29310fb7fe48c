"""The run's search tool without a retriever process: for its schema in prompts, and for demonstrations."""

from __future__ import annotations

from collections.abc import Sequence

from actor.chat.chatml import ChatRendering
from actor.tools.search import SearchOptions, SearchTool
from actor.tools.tool import Searcher, Services
from protocol.config import Config
from protocol.extensions import options_of
from protocol.types import Passage


class _NoPassages:
    """Implements `Searcher`: finds nothing."""

    async def search(self, queries: Sequence[str], *, top_n: int, collection: str = "") -> list[list[Passage]]:
        return [[] for _ in queries]


def search_tool(top_n: int, searcher: Searcher | None = None) -> SearchTool:
    return SearchTool(SearchOptions(top_n=top_n), services=Services(searcher=searcher or _NoPassages()))


def chat_rendering(top_n: int) -> ChatRendering:
    """The workflow's texts; `top_n` is in the tool's schema, which the system message holds."""
    return ChatRendering(tools=[search_tool(top_n).schema])


def configured_top_n(config: Config) -> int:
    """`top_n` of the run's search tool."""
    (section,) = (tool for tool in config.tool if tool.use == "search")
    return options_of(SearchTool, section, key="tool", base_dir=config.run.base_dir).top_n
