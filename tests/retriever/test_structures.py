from __future__ import annotations

import numpy as np

from retriever.encoders.base import normalise
from retriever.structures.flat import FlatIndex, search_exact
from retriever.structures.hnsw import HnswIndex, HnswOptions


def unit_vectors(num_rows: int, dimension: int = 24, seed: int = 0) -> np.ndarray:
    return normalise(np.random.default_rng(seed).standard_normal((num_rows, dimension)).astype(np.float32))


def test_exact_search_in_chunks_equals_sorting_everything() -> None:
    vectors, queries = unit_vectors(500), unit_vectors(7, seed=1)
    found = search_exact([vectors[:100], vectors[100:101], vectors[101:]], queries, 12)
    scores = queries @ vectors.T
    expected = np.argsort(-scores, axis=1)[:, :12]
    np.testing.assert_array_equal(found.rows, expected)
    np.testing.assert_allclose(found.scores, np.take_along_axis(scores, expected, axis=1), atol=1e-6)


def test_ties_go_to_the_lower_row_in_any_batch() -> None:
    vectors = np.repeat(unit_vectors(10), 30, axis=0)
    index = FlatIndex(dimension=24)
    index.allocate(300)
    index.add(vectors)
    queries = unit_vectors(33, seed=2)
    in_batch = index.search(queries, 20)
    alone = np.vstack([index.search(query[None], 20).rows for query in queries])
    np.testing.assert_array_equal(in_batch.rows, alone)
    np.testing.assert_array_equal(in_batch.rows % 30, np.tile(np.arange(20), (33, 1)))


def test_hnsw_agrees_with_exact_search_on_99_percent_of_rows() -> None:
    vectors, queries = unit_vectors(3000), unit_vectors(100, seed=3)
    index = HnswIndex(HnswOptions(), dimension=24)
    index.allocate(3000)
    for start in range(0, 3000, 1000):
        index.add(vectors[start : start + 1000])
    expected = search_exact([vectors], queries, 10).rows
    found = index.search(queries, 10)
    shared = [len(set(a) & set(b)) for a, b in zip(found.rows, expected, strict=True)]
    assert np.mean(shared) / 10 > 0.99
    assert (np.diff(found.scores, axis=1) <= 1e-5).all()


def test_k_may_exceed_the_number_of_rows_and_of_nodes_that_the_graph_reaches() -> None:
    options = HnswOptions(m=2, ef_construction=8, ef_search=1)
    vectors = np.repeat(unit_vectors(40), 20, axis=0)
    index = HnswIndex(options, dimension=24)
    index.allocate(800)
    index.add(vectors)
    found = index.search(unit_vectors(3, seed=4), 1000)
    assert found.rows.shape == (3, 800)
    assert all(set(rows) == set(range(800)) for rows in found.rows.tolist())
