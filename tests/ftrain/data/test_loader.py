"""Every document exactly once an epoch, and the same batches for any ranks, workers and kill points."""

import json
from collections import Counter
from dataclasses import replace
from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.data.cost import Cost
from ftrain.data.documents import IGNORE, Document, Group
from ftrain.data.encoding_ahead import Workers, mean_tokens
from ftrain.data.loader import Loader
from ftrain.data.order import Order
from ftrain.data.packing import Packing
from ftrain.data.position import Position
from ftrain.data.rejects import BadRow, Rejects
from ftrain.data.sample import Place
from ftrain.data.samples import open_samples
from ftrain.kernels.documents import Documents


def document(name, length):
    """One whose tokens all are its name, so that a batch tells which documents it has."""
    labels = np.full(length, name)
    labels[-1] = IGNORE
    return Document(np.full(length, name), labels)


def encode(row):
    """A row is (name, lengths of its documents); a row of none is broken."""
    name, lengths = row
    if not lengths:
        raise BadRow(Place("rows", name), "no text", "it has no text")
    return Group(tuple(document(name, length) for length in lengths))


def sources_of(lengths):
    names = iter(range(1, 10**6))
    return [[(next(names), tuple(row)) for row in source] for source in lengths]


def names_in(batch):
    """The documents of a batch by name and length; padding has the name 0."""
    tokens, ids = batch["tokens"], batch["segments"].ids_T
    starts = torch.cat([torch.tensor([True]), ids[1:] != ids[:-1]]).nonzero().flatten().tolist()
    found = Counter()
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        assert len(tokens[start:end].unique()) == 1, "a document is cut or mixed with another"
        assert batch["positions"][start:end].tolist() == list(range(end - start))
        if tokens[start]:
            found[int(tokens[start]), end - start] += 1
    return found


def wanted(sources, epochs=1, longest=10**6):
    whole = Counter()
    for name, lengths in (row for source in sources for row in source):
        if sum(lengths) <= longest:
            for length in lengths:
                whole[name, length] += epochs
    return whole


def equal(a, b):
    return set(a) == set(b) and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else torch.equal(a[k].ids_T, b[k].ids_T) for k in a
    )


rows = st.lists(st.lists(st.integers(1, 40), min_size=0, max_size=2), min_size=1, max_size=30)


@st.composite
def runs(draw):
    sources = sources_of(draw(st.lists(rows, min_size=1, max_size=3)))
    sources[0].append((10**6, (7,)))  # at least one row that can be trained on
    ranks, micro_batches = draw(st.sampled_from([(1, 1), (2, 1), (1, 4), (2, 2), (4, 2)]))
    packing = Packing(
        draw(st.sampled_from([8, 32, 64])),
        ranks=ranks,
        micro_batches=micro_batches,
        cost=Cost(quadratic=draw(st.sampled_from([0.0, 0.2]))),
        held=draw(st.sampled_from([None, 1, 7, 40])),
        patience=draw(st.integers(0, 3)),
    )
    packing = replace(packing, buffer=packing.tokens * packing.packs * draw(st.integers(1, 3)))
    order = Order([len(s) for s in sources], key=draw(st.integers(0, 2**40)))
    end, epochs = draw(st.sampled_from(["carry", "pack"])), draw(st.integers(1, 3))
    workers = Workers(chunk=draw(st.sampled_from([1, 4, 32])))
    return sources, Loader(order, sources, encode, packing, rank=None, epochs=epochs, at_epoch_end=end, workers=workers)


@settings(max_examples=60, deadline=None)
@given(run=runs())
def test_every_document_comes_exactly_once_an_epoch(run):
    sources, loader = run
    found = sum((names_in(step.batch) for step in loader), Counter())
    assert found == wanted(sources, loader.epochs, loader.packing.tokens)


@settings(max_examples=30, deadline=None)
@given(run=runs())
def test_an_epoch_that_is_packed_alone_has_each_document_once(run):
    sources, loader = run
    loader = replace(loader, at_epoch_end="pack", epochs=2)
    by_epoch = [Counter(), Counter()]
    for step in loader:
        by_epoch[ceil(step.facts.epochs) - 1] += names_in(step.batch)
    assert by_epoch == [wanted(sources, 1, loader.packing.tokens)] * 2


@settings(max_examples=60, deadline=None)
@given(run=runs(), kill=st.integers(0, 12))
def test_a_run_goes_on_from_its_position_as_if_never_stopped(run, kill):
    _, loader = run
    steps = list(loader)
    kill = min(kill, len(steps))
    position = steps[kill - 1].position if kill else loader.start()
    saved = Position.of(position.tree(loader.packing.capacity))
    rest = list(loader.read(saved))
    assert [s.facts for s in rest] == [s.facts for s in steps[kill:]]
    assert all(equal(a.batch, b.batch) for a, b in zip(rest, steps[kill:], strict=True))


@settings(max_examples=40, deadline=None)
@given(run=runs(), data=st.data())
def test_the_documents_of_a_step_depend_on_neither_ranks_nor_micro_batches(run, data):
    _, loader = run
    packs = loader.packing.packs
    ranks = data.draw(st.sampled_from([r for r in (1, 2, 4, 8) if packs % r == 0]))
    other = replace(loader, packing=replace(loader.packing, ranks=ranks, micro_batches=packs // ranks))
    for a, b in zip(loader, other, strict=True):
        assert names_in(a.batch) == names_in(b.batch)


@settings(max_examples=40, deadline=None)
@given(run=runs(), kill=st.integers(0, 4), ranks=st.integers(1, 5))
def test_a_position_goes_on_with_another_number_of_ranks_and_each_document_still_comes_once(run, kill, ranks):
    sources, loader = run
    packing = replace(loader.packing, ranks=ranks, micro_batches=1, buffer=None, held=None)
    found, position = Counter(), loader.start()
    for _, step in zip(range(kill), loader, strict=False):
        found += names_in(step.batch)
        position = step.position
    for step in replace(loader, packing=packing).read(position):
        found += names_in(step.batch)
    assert found == wanted(sources, loader.epochs, loader.packing.tokens)


@settings(max_examples=30, deadline=None)
@given(run=runs())
def test_ranks_have_the_parts_of_the_whole_batch_one_after_the_other(run):
    _, loader = run
    by_rank = [list(replace(loader, rank=rank)) for rank in range(loader.packing.ranks)]
    for whole, *parts in zip(loader, *by_rank, strict=True):
        for name in ("tokens", "labels", "positions"):
            assert torch.equal(whole.batch[name], torch.cat([part.batch[name] for part in parts]))
        offsets = {part.batch["segments"].offsets_N.shape for part in parts}
        assert len(offsets) == 1, "ranks of one step trace one shape"
        assert len({part.facts for part in parts}) == 1


LENGTHS = [[[int(n)] for n in np.random.default_rng(0).integers(1, 60, 150)], [[9, 12]] * 40 + [[]] + [[99]]]


# Each worker is a process that imports torch first.
WORKERS = [Workers(threads=3, chunk=5), pytest.param(Workers(2, chunk=7), marks=pytest.mark.slow)]


@pytest.mark.parametrize("workers", WORKERS, ids=str)
def test_any_workers_give_the_same_batches_and_positions(workers):
    sources = sources_of(LENGTHS)
    order = Order([len(s) for s in sources], key=5, weights=[0.7, 0.3])
    alone = Loader(order, sources, encode, Packing(64, ranks=2, buffer=512), steps=12)
    others = replace(alone, workers=workers)
    steps = list(alone)
    for a, b in zip(steps, others, strict=True):
        assert equal(a.batch, b.batch)
        assert np.array_equal(a.position.held, b.position.held)
        assert a.facts == b.facts
    resumed = replace(others, workers=replace(workers, processes=min(1, workers.processes))).read(steps[6].position)
    assert equal(next(resumed).batch, steps[7].batch)
    resumed.close()


def loader_of(lengths, tokens=8, **options):
    sources = sources_of([lengths])
    packing = options.pop("packing", Packing(tokens))
    return Loader(Order([len(lengths)], key=0), sources, encode, packing, **{"rank": None, **options})


def test_a_long_document_is_rejected_counted_and_named():
    rejects = Rejects(limit=0.9)
    loader = loader_of([[3], [9], [4]], rejects=rejects)
    (step,) = loader
    assert (step.facts.rejected, step.facts.documents) == (1, 2)
    assert rejects.by_kind() == {"longer than a pack": 1}


def test_a_long_document_is_an_error_where_that_is_asked_for():
    with pytest.raises(ValueError, match="source 0, row 1: it has 9 tokens, and a pack 8: raise the tokens"):
        list(loader_of([[9]], packing=Packing(8, too_long="error")))


def test_a_group_is_never_cut_and_never_lies_in_two_packs():
    with pytest.raises(ValueError, match="9 tokens in 2 documents that belong together, and a pack 8"):
        list(loader_of([[4, 5]], packing=Packing(8, too_long="error", cut="split")))
    for step in loader_of([[3, 2]] * 7, packing=Packing(8, ranks=3)):
        for pack in step.batch["tokens"].reshape(3, 8):
            names, counts = pack[pack > 0].unique(return_counts=True)
            assert counts.tolist() == [5] * len(names)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=1), min_size=1, max_size=20),
    kill=st.integers(0, 5),
)
def test_documents_are_cut_where_that_is_asked_for_and_no_token_is_lost(lengths, kill):
    loader = loader_of(lengths, packing=Packing(16, ranks=2, cut="split", buffer=64))
    steps = list(loader)
    found = Counter()
    for step in steps:
        for (name, length), count in names_in(step.batch).items():
            found[name] += length * count
    assert found == {name: length for name, (length,) in loader.sources[0]}
    kill = min(kill, len(steps) - 1)
    rest = loader.read(steps[kill].position)
    assert all(equal(a.batch, b.batch) for a, b in zip(rest, steps[kill + 1 :], strict=True))


def test_a_piece_of_a_document_is_trained_to_go_on_with_the_next():
    row = Document(np.arange(5), np.array([1, 2, 3, 4, IGNORE]))
    loader = Loader(
        Order([1], key=0), [[Group((row,))]], lambda group: group, Packing(3, ranks=2, cut="split"), rank=None
    )
    (step,) = loader
    pairs = dict(zip(step.batch["tokens"].tolist(), step.batch["labels"].tolist(), strict=True))
    assert (pairs[2], pairs[4]) == (3, IGNORE)


def test_fewer_documents_than_ranks_leave_packs_of_padding():
    (step,) = loader_of([[3], [2]], packing=Packing(8, ranks=5))
    labels = step.batch["labels"].reshape(5, 8)
    assert ((labels != IGNORE).sum(1) > 0).sum() == 2
    assert (step.facts.tokens, step.facts.budget) == (5, 40)


def test_steps_go_on_over_epochs_however_small_the_data_is():
    steps = list(loader_of([[3]], steps=4))
    assert [s.facts.documents for s in steps] == [2, 2, 2, 2]
    assert [s.facts.epochs for s in steps] == [2, 4, 6, 8]
    assert [s.facts.documents for s in loader_of([[3]], steps=4, at_epoch_end="pack")] == [1, 1, 1, 1]


def test_data_of_which_nothing_can_be_trained_on_is_one_error():
    with pytest.raises(ValueError, match="none of 3 rows can be trained on; the last one: rows, row"):
        list(loader_of([[], [], []], steps=5))
    with pytest.raises(ValueError, match="source 0 has 0 rows"):
        loader_of([])


def test_a_position_of_other_data_or_another_budget_is_refused():
    loader = loader_of([[3], [4]])
    (step,) = loader
    with pytest.raises(ValueError, match="another order of documents"):
        next(loader_of([[3], [4], [5]]).read(step.position))
    with pytest.raises(ValueError, match="packs of 8 tokens, and these have 16"):
        next(loader_of([[3], [4]], tokens=16).read(step.position))


def test_a_document_that_waited_and_is_gone_is_an_error():
    loader = loader_of([[5]] * 20, packing=Packing(8, buffer=40))
    position = next(loader.read()).position
    gone = replace(loader, sources=[[(name, ()) for name, _ in loader.sources[0]]])
    with pytest.raises(ValueError, match="the data is not what it was"):
        next(gone.read(position))


def test_finish_sees_only_the_groups_of_this_process():
    seen = []
    loader = loader_of(
        [[4]] * 12, packing=Packing(8, ranks=2), rank=1, finish=lambda group: seen.append(group) or group
    )
    own = sum(sum(names_in(step.batch).values()) for step in loader)
    assert own == len(seen) == 6


def test_what_a_loader_is_asked_for_must_be_possible():
    with pytest.raises(ValueError, match="rank 2 of 2 ranks"):
        loader_of([[3]], packing=Packing(8, ranks=2), rank=2)
    with pytest.raises(ValueError, match=r"the sources have \(1,\) rows, and the order was made for \(2,\)"):
        Loader(Order([2], key=0), [[1]], encode, Packing(8))
    with pytest.raises(ValueError, match="a buffer of 9 tokens does not fill the 2 packs of 8"):
        Packing(8, ranks=2, buffer=9)
    with pytest.raises(ValueError, match="at_epoch_end='drop'"):
        loader_of([[3]], at_epoch_end="drop")


def words(sample):
    """Of a text, a document of the lengths of its words."""
    return encode((1, (len(sample.text.split()),)))


def test_a_file_is_read_packed_and_its_broken_rows_are_named(tmp_path):
    file = tmp_path / "texts.jsonl"
    texts = [json.dumps({"text": "one two three " * n}) for n in range(1, 30)]
    file.write_text("\n".join([*texts[:4], '{"text": "cut', *texts[4:]]))
    samples, rejects = open_samples(file), Rejects(limit=0.5)
    loader = Loader(Order([len(samples)], key=0), [samples], words, Packing(64), rejects=rejects)
    steps = list(loader)
    assert sum(step.facts.tokens for step in steps) == sum(3 * n for n in range(1, 22))
    assert steps[-1].facts.rejected == rejects.count == 9
    assert {(kind.kind, kind.count) for kind in rejects} == {("invalid JSON", 1), ("longer than a pack", 8)}
    (broken,) = (kind for kind in rejects if kind.kind == "invalid JSON")
    assert (broken.file, broken.rows) == (str(file), (5,))
    assert mean_tokens(samples, words) == pytest.approx(sum(3 * n for n in range(1, 30)) / 29)


def test_a_division_of_a_batch_that_would_cut_a_document_is_an_error():
    (step,) = loader_of([[6]], packing=Packing(8))
    with pytest.raises(ValueError, match="a document lies in two packs: it goes on over token 4"):
        Documents.of(step.batch["segments"].ids_T, packs=2)


@pytest.fixture(scope="module")
def waiting():
    """A run in which long documents wait for others like them."""
    rng = np.random.default_rng(2)
    lengths = np.where(rng.random(400) < 0.04, rng.integers(40, 65, 400), rng.integers(1, 12, 400))
    packing = Packing(64, ranks=4, cost=Cost(quadratic=0.2), buffer=1500, patience=4)
    loader = loader_of([[int(n)] for n in lengths], packing=packing)
    steps = list(loader)
    patient = list(replace(loader, packing=replace(packing, patience=50)))
    assert any(not equal(a.batch, b.batch) for a, b in zip(steps, patient, strict=False)), "patience runs out"
    return loader, steps


@pytest.mark.parametrize("kill", [1, 3, 5])
def test_documents_that_wait_for_their_like_wait_no_longer_after_a_resume(waiting, kill):
    loader, steps = waiting
    rest = loader.read(steps[kill].position)
    assert all(equal(a.batch, b.batch) for a, b in zip(rest, steps[kill + 1 :], strict=True))


@pytest.mark.parametrize("ranks", [1, 2])
def test_documents_wait_alike_for_any_number_of_ranks(waiting, ranks):
    loader, steps = waiting
    packing = replace(loader.packing, ranks=ranks, micro_batches=4 // ranks)
    for a, b in zip(replace(loader, packing=packing), steps, strict=True):
        assert names_in(a.batch) == names_in(b.batch)


def test_a_group_that_cannot_be_finished_is_left_out_and_counted():
    def finish(group):
        if group.documents[0].tokens[0] == 3:
            raise BadRow(Place("pictures", 3), "broken picture", "it is cut short")
        return group

    rejects = Rejects(limit=0.5)
    loader = loader_of([[4]] * 6, packing=Packing(8), finish=finish, rejects=rejects, workers=Workers(threads=2))
    found = sum((names_in(step.batch) for step in loader), Counter())
    assert found == {(name, 4): 1 for name in (1, 2, 4, 5, 6)}
    assert rejects.by_kind() == {"broken picture": 1}


def test_what_finish_raises_otherwise_goes_through():
    def finish(group):
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(loader_of([[4]], finish=finish))
