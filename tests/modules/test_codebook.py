"""Codebooks: averages are what their formula says, entries in use are counted, and both hold on a mesh."""

import torch

import ftrain
from ftrain.kernels.mean import Mean
from ftrain.modules import codebook
from ftrain.modules.codebook import Averages
from ftrain.sharding import BatchRows, Mesh, Plan


def books(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(seed))


def rows(seed: int = 1) -> torch.Tensor:
    return torch.randn(24, 3, generator=torch.Generator().manual_seed(seed))


def test_entries_follow_the_averages_of_the_rows_that_chose_them() -> None:
    start = Averages.of(books())
    found = codebook.quantize(rows(), books())
    after, new = codebook.follow(start, found, decay=0.75, smooth=0.0)
    for level in range(2):
        for k in range(5):
            mine = found.left_QRZ[level][found.codes_QR[level] == level * 5 + k]
            count, total = 0.75 + 0.25 * len(mine), 0.75 * books()[level, k] + 0.25 * mine.sum(0)
            torch.testing.assert_close(after.count_QK[level, k], torch.tensor(count))
            torch.testing.assert_close(new[level, k], total / count)


def test_averages_of_the_same_rows_become_their_centres() -> None:
    """Lloyd's algorithm: with nothing kept, each entry in use is the mean of its rows."""
    state, book = Averages.of(books()[:1]), books()[:1]
    for _ in range(10):
        state, book = codebook.follow(state, codebook.quantize(rows(), book), decay=0.0)
    found = codebook.quantize(rows(), book)
    for k in found.codes_QR.unique().tolist():
        centre = rows()[found.codes_QR[0] == k].mean(0)
        torch.testing.assert_close(book[0, k], centre, rtol=1e-3, atol=1e-3)
    _, unit = codebook.follow(state, found, unit=True)
    torch.testing.assert_close(unit.norm(dim=-1), torch.ones(1, 5))


def test_perplexity_is_the_number_of_entries_that_share_evenly() -> None:
    used = torch.tensor([[4.0, 4.0, 4.0, 4.0, 0.0], [7.0, 0.0, 0.0, 0.0, 0.0], [0.0] * 5])
    torch.testing.assert_close(codebook.perplexity(used), torch.tensor([4.0, 1.0, 1.0]))


def test_rows_of_all_ranks_move_a_codebook() -> None:
    """A step whose codebook follows averages is the same on a mesh, where each rank has a share of the rows."""

    def step(state: tuple[Averages, torch.Tensor], batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        averages, book = state

        def loss(scale: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]) -> tuple[Mean, object]:
            found = codebook.quantize(batch["rows"] * scale["w"], book)
            return Mean.of((found.entries_QRZ[-1] - batch["rows"] * scale["w"]).square().sum(1)), found

        (_, found), _ = ftrain.value_and_grad(loss, has_aux=True)({"w": torch.ones(3)}, batch)
        averages, book = codebook.follow(averages, found)
        return averages.count_QK, book

    state, batch = (Averages.of(books()), books()), {"rows": rows()}
    one = step(state, batch)
    plan = Plan(Mesh(shard=2, kind="virtual"), batch={"rows": BatchRows()})
    many = ftrain.jit(step, plan=plan, specs={})(state, batch)
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(b, a)
