from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.batch.packing import Pack, Share, pack, split
from protocol.errors import ConfigError
from tests.learner.forests import Ids, every_token, forests, grown
from tests.learner.properties import deterministic

SHARES = st.sampled_from([True, False, "auto"])
BLOCKS = st.sampled_from([1, 2, 8])


def num_prefixes(contexts: Sequence[Ids]) -> int:
    """Nodes of the trie, counted one by one."""
    return len({tuple(each[: end + 1]) for each in contexts for end in range(len(each))})


def visible(row: Pack, query: int) -> list[int]:
    return [key for key in range(row.num_unique_tokens) if key <= query < row.subtree_end[key]]


@deterministic
@given(contexts=forests(), share=SHARES, min_share=BLOCKS)
def test_every_token_sees_exactly_its_own_context_up_to_itself(
    contexts: list[Ids], share: Share, min_share: int
) -> None:
    row = pack(contexts, share=share, min_share=min_share)
    for number, context in enumerate(contexts):
        at = row.locate(np.full(len(context), number), np.arange(len(context)))
        assert (row.token_ids[at] == context).all()
        assert (row.depth[at] == np.arange(len(context))).all()
        for position, query in enumerate(at):
            assert visible(row, int(query)) == at[: position + 1].tolist()


@deterministic
@given(contexts=forests(), share=SHARES, min_share=BLOCKS)
def test_nodes_partition_the_row_and_do_not_branch(contexts: list[Ids], share: Share, min_share: int) -> None:
    row = pack(contexts, share=share, min_share=min_share)
    assert row.node_start.tolist() == [0, *row.node_end[:-1].tolist()]
    assert row.node_end[-1] == row.num_unique_tokens
    for start, end in zip(row.node_start, row.node_end, strict=True):
        assert (np.diff(row.depth[start:end]) == 1).all()
        assert len(set(row.subtree_end[start:end])) == 1


@deterministic
@given(contexts=forests())
def test_a_pack_with_min_share_1_is_the_prefix_trie(contexts: list[Ids]) -> None:
    row = pack(contexts, share=True, min_share=1)
    assert row.num_unique_tokens == num_prefixes(contexts)
    assert row.num_total_tokens == sum(map(len, contexts))
    assert pack(contexts, share=False).num_unique_tokens == row.num_total_tokens


@deterministic
@given(contexts=forests(), min_share=BLOCKS)
def test_block_sharing_adds_less_than_one_block_per_context(contexts: list[Ids], min_share: int) -> None:
    found = pack(contexts, share=True, min_share=min_share).num_unique_tokens
    assert num_prefixes(contexts) <= found <= num_prefixes(contexts) + (min_share - 1) * (len(contexts) - 1)


def test_only_prefixes_of_min_share_tokens_are_shared() -> None:
    rng = np.random.default_rng(0)
    prompt = np.arange(100)
    alike = [np.concatenate([prompt, [7, 8, number], rng.integers(0, 40, size=50)]) for number in range(4)]
    row = pack(alike, share=True)
    assert row.num_unique_tokens == 96 + 4 * (4 + 3 + 50)
    assert len(row.node_start) == 5


def test_a_context_that_continues_another_shares_it_whole() -> None:
    history = np.arange(30)
    row = pack([history[:11], history[:23], history], share=True)
    assert row.num_unique_tokens == 30
    assert row.node_start.tolist() == [0]


def test_auto_shares_if_it_saves_a_tenth_of_the_cost() -> None:
    rng = np.random.default_rng(0)
    for shared, is_shared in ((120, False), (800, True)):
        prefix = rng.integers(0, 9, size=shared)
        contexts = [np.concatenate([prefix, rng.integers(0, 9, size=1000)]) for _ in range(4)]
        row = pack(contexts)
        assert (row.num_unique_tokens < row.num_total_tokens) is is_shared


@deterministic
@given(contexts=forests(), min_share=BLOCKS)
def test_a_pair_is_scored_once_and_gathered_to_every_request(contexts: list[Ids], min_share: int) -> None:
    contexts = [np.append(each, 1) for each in contexts]
    row = pack([each[:-1] for each in contexts], share=True, min_share=min_share)
    context, position, token_id = every_token(contexts)
    placement = row.place(context, position, token_id)
    assert (placement.source[placement.gather] == row.locate(context, position - 1)).all()
    assert (placement.target[placement.gather] == token_id).all()
    pairs = list(zip(placement.source.tolist(), placement.target.tolist(), strict=True))
    assert len(pairs) == len(set(pairs)) == len(set(placement.gather.tolist()))
    if min_share == 1:
        assert len(pairs) == num_prefixes(contexts) - num_prefixes([each[:1] for each in contexts])


def test_no_contexts_give_one_token_and_no_scores() -> None:
    row = pack([])
    assert (row.token_ids.tolist(), row.num_total_tokens) == ([0], 0)
    none = np.zeros(0, dtype=np.int64)
    assert len(row.place(none, none, none).source) == 0


@deterministic
@given(contexts=forests(), budget=st.integers(1, 60), num_ranks=st.integers(1, 4), share=SHARES, min_share=BLOCKS)
def test_micro_batches_hold_each_context_once_within_the_budget(
    contexts: list[Ids], budget: int, num_ranks: int, share: Share, min_share: int
) -> None:
    ranks = split(contexts, budget=budget, num_ranks=num_ranks, share=share, min_share=min_share)
    assert len(ranks) == num_ranks
    assert len({len(each) for each in ranks}) == 1
    parts = [part for rank in ranks for part in rank]
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(contexts)))
    for part in parts:
        row = pack([contexts[c] for c in part], share=share, min_share=min_share)
        assert row.num_unique_tokens <= budget or len(part) == 1


def test_micro_batches_are_few_and_ranks_are_balanced() -> None:
    rng = np.random.default_rng(0)
    contexts = [each for _ in range(16) for each in grown(rng, num_contexts=8, stretches=(20, 90, 400))]
    alone = split(contexts, budget=4096)[0]
    unique = sum(pack([contexts[c] for c in part]).num_unique_tokens for part in alone)
    assert len(alone) <= unique // 4096 + 2
    ranks = split(contexts, budget=4096, num_ranks=4)
    assert len(ranks[0]) <= -(-len(alone) // 4) + 1
    sizes = [sum(pack([contexts[c] for c in part]).num_unique_tokens for part in rank) for rank in ranks]
    assert max(sizes) < 1.15 * min(sizes)


def test_contexts_with_a_common_prefix_stay_together() -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 99, size=100) for _ in range(6)]
    contexts = [np.concatenate([prompts[n % 6], rng.integers(0, 99, size=10)]) for n in range(48)]
    for part in split(contexts, budget=250)[0]:
        assert len({number % 6 for number in part}) == 1
        assert len(part) == 8


def test_arguments_below_one_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="budget must be >= 1, got 0"):
        split([np.arange(3)], budget=0)
    with pytest.raises(ConfigError, match="num_ranks must be >= 1, got 0"):
        split([np.arange(3)], budget=1, num_ranks=0)
    with pytest.raises(ConfigError, match="min_share must be >= 1, got 0"):
        pack([np.arange(3)], min_share=0)
