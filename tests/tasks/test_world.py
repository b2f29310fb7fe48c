"""The toy world, its questions and documents."""

import json
from collections import Counter
from pathlib import Path

from actor.tasks.toy.search import ExactSearch
from actor.tasks.toy.task import ToyOptions, ToyTask, documents, write_corpus
from actor.tasks.toy.world import AVOIDED_NAMES, KIND_SIZES, RELATIONS, SYLLABLES, make_world, relations_of


def test_a_world_has_the_stated_size_and_typed_facts():
    world = make_world(7)
    assert Counter(world.kinds.values()) == KIND_SIZES
    assert len(world.facts) == 2120
    for (subject, relation), fact in world.facts.items():
        assert (fact.subject, fact.relation) == (subject, relation)
        assert (world.kinds[fact.subject], world.kinds[fact.object]) == RELATIONS[relation]
        assert fact.subject != fact.object
        assert relation != "spouse" or world.facts[fact.object, relation].object == subject


def test_names_are_two_distinct_syllables_and_spell_no_word():
    assert len(SYLLABLES) == len(set(SYLLABLES)) == 60
    for name in make_world(3).kinds:
        assert name[:2] in SYLLABLES
        assert name[2:] in SYLLABLES
        assert name[:2] != name[2:]
        assert name not in AVOIDED_NAMES | {"none", "done"}


def test_equal_seeds_give_equal_worlds_and_other_seeds_other_worlds():
    assert make_world(1).facts == make_world(1).facts
    assert make_world(1).facts != make_world(2).facts


def test_every_kind_of_entity_has_at_least_two_relations():
    assert all(len(relations_of(kind)) >= 2 for kind in KIND_SIZES)


def test_questions_are_walks_that_depend_on_seed_and_cursor_only():
    options = ToyOptions(worlds=(1, 2, 3))
    task = ToyTask(options, split="train", seed=5)
    again = ToyTask(options, split="train", seed=5)
    other = ToyTask(options, split="train", seed=6)
    assert [world.seed for world in task.worlds] == [1, 2, 3]
    cursors = range(600)
    assert [task.question(c) for c in cursors] == [again.question(c) for c in reversed(cursors)][::-1]
    assert [task.question(c).text for c in cursors] != [other.question(c).text for c in cursors]
    hops = Counter(task.question(c).metadata["hops"] for c in cursors)
    assert all(150 < hops[str(h)] < 250 for h in (1, 2, 3))
    for cursor in range(60):
        question, (world, walk) = task.question(cursor), task.walk(cursor)
        assert world is task.worlds[cursor % 3]
        assert question.metadata["collection"] == world.collection
        assert question.answers == (walk.answer,)
        assert question.text == f"what is {walk.start} {' '.join(walk.relations)} ?"
        assert len(set(walk.relations)) == len(walk.relations)
        entity = walk.start
        for relation in walk.relations:
            entity = world.facts[entity, relation].object
        assert entity == walk.answer


def test_a_corpus_has_one_document_per_fact(tmp_path: Path):
    world = make_world(4)
    assert write_corpus(tmp_path / "deep" / "w.jsonl", world) == 2120
    rows = [json.loads(line) for line in (tmp_path / "deep" / "w.jsonl").read_text().splitlines()]
    assert {tuple(row) for row in rows} == {("id", "title", "text")}
    assert len({row["id"] for row in rows}) == 2120
    fact = next(iter(world.facts.values()))
    assert rows[0]["text"] == f"{fact.subject} {fact.relation} {fact.object} ."


def test_exact_search_finds_every_fact_by_subject_and_relation():
    world = make_world(5)
    search = ExactSearch(documents(world))
    for fact in world.facts.values():
        found = search.search(f"{fact.subject} {fact.relation}", top_n=3)
        assert len(found) == 3
        assert f"{fact.subject} {fact.relation} {fact.object} ." in {passage.text for passage in found}


def test_exact_search_returns_top_n_documents_for_unknown_words():
    assert len(ExactSearch(documents(make_world(5))).search("nothing known", top_n=3)) == 3
