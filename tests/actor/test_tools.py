"""The search tool: refused arguments, requests to the retriever, results."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from pydantic import ValidationError

from actor.tools.search import MAX_QUERY_CHARS, SearchOptions, SearchTool
from actor.tools.search_client import SearchClient, SearchFailed
from actor.tools.tool import Services, ToolContext
from protocol.errors import ConfigError
from protocol.types import Question
from tests.actor.conftest import ScriptedRetriever
from tests.actor.search_tool import FUNCTION, search_tool

CONTEXT = ToolContext(question=Question("q0", "who?", ()), episode_id="4.0.1")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({}, "query"),
        ({"query": None}, "query"),
        ({"query": ["a"]}, "query"),
        ({"query": " "}, "query"),
        ({"query": "\ud800"}, "query"),
        ({"query": "x" * (MAX_QUERY_CHARS + 1)}, f"at most {MAX_QUERY_CHARS} characters"),
        ({"query": "x", "top_n": 0}, "`top_n` must be an integer >= 1, got 0"),
        ({"query": "x", "top_n": True}, "`top_n` must be an integer >= 1, got True"),
        ({"query": "x", "top_n": 2.0}, "`top_n` must be an integer >= 1, got 2.0"),
        ({"query": "x", "top_n": "2"}, "`top_n` must be an integer >= 1, got '2'"),
    ],
)
async def test_bad_arguments_are_an_error_for_the_policy_and_nothing_is_searched(
    search: SearchClient, retriever: ScriptedRetriever, arguments: Mapping[str, object], word: str
) -> None:
    observation = await search_tool(search).call(arguments, CONTEXT)
    assert word in observation.error
    assert (observation.text, observation.passages) == ("", ())
    assert not retriever.requests


@pytest.mark.parametrize(
    ("options", "wanted", "expected"),
    [
        ({"top_n": 4}, None, 4),
        ({"top_n": 4}, 3, 3),
        ({"top_n": 4}, 999, 20),
        ({"top_n": 4, "max_top_n": 6}, 999, 6),
        ({"top_n": 30}, None, 30),
        ({"top_n": 30}, 999, 30),
    ],
)
async def test_top_n_has_a_default_and_a_maximum(
    search: SearchClient, retriever: ScriptedRetriever, options: Mapping[str, int], wanted: int | None, expected: int
) -> None:
    arguments = {"query": " a ", "top_n": wanted} if wanted is not None else {"query": " a "}
    observation = await search_tool(search, **options).call(arguments, CONTEXT)
    assert [passage.id for passage in observation.passages] == [f"d{k}" for k in range(expected)]
    assert (observation.text, observation.error) == ("", "")
    assert [(list(request.queries), request.top_n) for request in retriever.requests] == [(["a"], expected)]


@pytest.mark.parametrize(
    ("metadata", "expected"), [({}, "default"), ({"collection": "world-7"}, "world-7"), ({"hops": "2"}, "default")]
)
async def test_the_collection_of_the_question_overrides_the_collection_of_the_tool(
    search: SearchClient, retriever: ScriptedRetriever, metadata: dict[str, str], expected: str
) -> None:
    context = ToolContext(question=Question("q0", "who?", (), metadata), episode_id="")
    await search_tool(search, collection="default").call({"query": "a"}, context)
    assert [request.collection for request in retriever.requests] == [expected]


async def test_a_retriever_error_is_raised(search: SearchClient, retriever: ScriptedRetriever) -> None:
    retriever.error = "index is missing"
    with pytest.raises(SearchFailed, match="index is missing"):
        await search_tool(search).call({"query": "a"}, CONTEXT)


def test_the_schema_names_the_function_its_arguments_and_the_default() -> None:
    schema = search_tool(top_n=7).schema
    assert schema["name"] == FUNCTION
    assert schema["parameters"]["required"] == ["query"]
    assert schema["parameters"]["properties"]["top_n"]["default"] == 7
    renamed = search_tool(function_name="find", description="Finds films.").schema
    assert (renamed["name"], renamed["description"]) == ("find", "Finds films.")


def test_the_tool_needs_a_retriever() -> None:
    with pytest.raises(ConfigError, match=r"the tool search needs a retriever: set retriever\.indexes"):
        SearchTool(SearchOptions(), services=Services())


@pytest.mark.parametrize("top_n", [0, 101])
def test_the_configured_top_n_is_bounded(top_n: int) -> None:
    with pytest.raises(ValidationError, match="top_n"):
        SearchOptions(top_n=top_n)
