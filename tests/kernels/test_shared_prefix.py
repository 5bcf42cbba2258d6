"""Documents that share their beginnings: attention gives what it gives where the beginnings stand in full."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.kernels.attention import attention
from ftrain.kernels.documents import Documents
from ftrain.kernels.shared_prefix import reading_prefixes, shared_prefixes

G, K = 2, 4

# Of each question: tokens of it, of its answer, and of the other answer (0: there is none).
QUESTIONS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=4)


def laid_out(questions: list[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[list[int]]]:
    """Ids, prefixes, positions, and the places in the pack of each document's tokens, with those of its beginning."""
    ids, prefixes, positions, documents = [], [], [], []
    for question, answer, other in questions:
        start = len(ids)
        documents.append(list(range(start, start + question + answer)))
        ids += [len(documents)] * (question + answer)
        prefixes += [0] * (question + answer)
        positions += range(question + answer)
        if other:
            documents.append([*range(start, start + question), *range(len(ids), len(ids) + other)])
            ids += [len(documents)] * other
            prefixes += [question] + [0] * (other - 1)
            positions += range(question, question + other)
    return torch.tensor(ids), torch.tensor(prefixes), torch.tensor(positions), documents


def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: list[list[int]], **options) -> torch.Tensor:
    """Each document by itself, its beginning in full; the rows of a beginning are those of the first that has it."""
    found: dict[int, torch.Tensor] = {}
    for places in documents:
        for place, row in zip(places, attention(q[places], k[places], v[places], **options), strict=True):
            found.setdefault(place, row)
    return torch.stack([found[t] for t in range(len(q))])


@given(questions=QUESTIONS, told=st.booleans(), window=st.sampled_from([None, 3]))
@settings(deadline=None, max_examples=40)
def test_attention_and_its_gradients_are_those_of_whole_documents(questions, told: bool, window: int | None) -> None:
    ids_T, prefix_T, positions_T, documents = laid_out(questions)
    generator = torch.Generator().manual_seed(len(ids_T))
    q, k, v = (torch.randn(len(ids_T), G, K, generator=generator, dtype=torch.float64) for _ in range(3))
    for x in (q, k, v):
        x.requires_grad_()
    segments = Documents.of(ids_T) if told else ids_T
    shared = shared_prefixes(segments, prefix_T)
    torch.testing.assert_close(torch.arange(len(ids_T)) * 0 + shared.shift_T + _within(ids_T), positions_T)
    with reading_prefixes(shared):
        got = attention(q, k, v, segments_T=segments, window=window)
    want = whole(q, k, v, documents, window=window)
    torch.testing.assert_close(got, want)
    weight = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), (q, k, v)),
        torch.autograd.grad((want * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def _within(ids_T: torch.Tensor) -> torch.Tensor:
    _, counts = torch.unique_consecutive(ids_T, return_counts=True)
    return torch.cat([torch.arange(n) for n in counts.tolist()])


@pytest.mark.parametrize(
    "options", [{"causal": False}, {"kv_segments_S": torch.tensor([0, 0])}, {"segments_T": torch.tensor([0, 1])}]
)
def test_other_attention_is_refused(options) -> None:
    """Looking ahead; other keys; documents cut into chunks, as some layers do."""
    x, ids_T = torch.ones(2, G, K), torch.tensor([0, 0])
    shared = shared_prefixes(ids_T, torch.tensor([0, 0]))
    with reading_prefixes(shared), pytest.raises(ValueError, match="lay them out one by one"):
        attention(x, x, x, **{"segments_T": ids_T, **options})
