"""The search tool: passages from the retriever."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from actor.tools.tool import Observation, Services, Tool, ToolContext
from protocol.config_base import Options, Positive
from protocol.errors import ConfigError

MAX_QUERY_CHARS = 2_000


class SearchOptions(Options):
    """Options of the search tool."""

    function_name: str = Field(default="wikipedia_search", description="Name of the function that the policy calls.")
    description: str = Field(
        default="Finds the passages of Wikipedia that are closest to the query.",
        description="Description of the tool in the policy's prompt.",
    )
    top_n: Annotated[int, Field(ge=1, le=100)] = Field(
        default=5, description="Passages returned if the call has no `top_n`."
    )
    max_top_n: Positive = Field(default=20, description="Largest `top_n` of a call; larger values are lowered to it.")
    collection: str = Field(
        default="", description="Index to search; a question's metadata `collection` overrides it. Empty: the first."
    )


class SearchTool(Tool):
    """Searches the retriever. The retriever encodes and searches the queries of concurrent episodes in batches."""

    Options = SearchOptions
    options: SearchOptions

    def __init__(self, options: SearchOptions, *, services: Services) -> None:
        """Raises: ConfigError if the run has no retriever."""
        super().__init__(options, services=services)
        if services.searcher is None:
            raise ConfigError("the tool search needs a retriever: set retriever.indexes (or retriever.port)")
        self._searcher = services.searcher
        self.schema = search_schema(options)

    async def call(self, arguments: Mapping[str, Any], context: ToolContext) -> Observation:
        """Raises: SearchFailed if the retriever fails."""
        if error := _error_in(arguments):
            return Observation(error=error)
        wanted = arguments.get("top_n")
        top_n = self.options.top_n if wanted is None else min(wanted, max(self.options.max_top_n, self.options.top_n))
        collection = context.question.metadata.get("collection", self.options.collection)
        (passages,) = await self._searcher.search([arguments["query"].strip()], top_n=top_n, collection=collection)
        return Observation(passages=tuple(passages))


def search_schema(options: SearchOptions) -> dict[str, Any]:
    """The schema of a search tool with these options."""
    properties = {
        "query": {"type": "string", "description": "What to look up."},
        "top_n": {"type": "integer", "description": "How many passages to return.", "default": options.top_n},
    }
    return {
        "name": options.function_name,
        "description": options.description,
        "parameters": {"type": "object", "properties": properties, "required": ["query"]},
    }


def _error_in(arguments: Mapping[str, Any]) -> str:
    query, top_n = arguments.get("query"), arguments.get("top_n")
    if not isinstance(query, str) or not query.strip():
        return "`arguments` needs `query`, a text that is not empty"
    if len(query) > MAX_QUERY_CHARS or not _is_unicode(query):
        return f"`query` must be a text of at most {MAX_QUERY_CHARS} characters"
    if top_n is not None and (isinstance(top_n, bool) or not isinstance(top_n, int) or top_n < 1):
        return f"`top_n` must be an integer >= 1, got {top_n!r:.80}"
    return ""


def _is_unicode(text: str) -> bool:
    r"""False if the text has half of a surrogate pair (`\ud800`, from a JSON escape), which UTF-8 cannot encode."""
    return not any("\ud800" <= char <= "\udfff" for char in text)
