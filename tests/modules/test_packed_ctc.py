"""The CTC loss of a pack is torch's of its recordings, with its gradient, on one device and on a mesh.

Legend: T tokens of a pack, B recordings, L frames, N tokens of a text, V vocabulary.
"""

import pytest
import torch
import torch.nn.functional as F

import ftrain
from ftrain.modules import packed_ctc, spec
from ftrain.modules.packed_ctc import RULES, Transcripts, collapsed, ctc_loss, lay
from ftrain.sharding import Mesh, Plan

V, BLANK = 11, 10


def recordings(packs=1, tokens=48):
    """Three recordings a pack, of which the second is of frames with other tokens between them."""
    places, texts = [], []
    for pack in range(packs):
        at = pack * tokens
        places += [range(at + 2, at + 14), range(at + 15, at + 39, 3), range(at + 40, at + 45)]
        texts += [[1, 1, 4, 2], [7, 3, 3], [pack]]
    return places, texts


def scores(tokens, dtype=torch.float64):
    return torch.randn(tokens, V, generator=torch.Generator().manual_seed(0), dtype=dtype).requires_grad_()


def of_torch(x_TV, places, texts):
    """The sum over recordings, and how many tokens are said."""
    found = [
        F.ctc_loss(
            x_TV[list(own)][:, None].log_softmax(-1),
            torch.tensor([text]),
            torch.tensor([len(own)]),
            torch.tensor([len(text)]),
            blank=BLANK,
            reduction="sum",
        )
        for own, text in zip(places, texts, strict=True)
    ]
    return torch.stack(found).sum(), sum(map(len, texts))


@pytest.mark.parametrize("room", [{}, {"rows": 5, "frames": 20, "length": 6}], ids=str)
def test_it_is_torchs_with_its_gradient(room):
    places, texts = recordings()
    ours, theirs = scores(48), scores(48)
    found = ctc_loss(ours, lay(places, texts, tokens=48, **room), blank=BLANK)
    total, count = of_torch(theirs, places, texts)
    torch.testing.assert_close(found.total, total, rtol=1e-12, atol=0)
    assert found.count == count
    found.total.backward()
    total.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-14)
    assert not ours.grad[46:].any()


def test_a_text_that_cannot_be_laid_counts_nothing():
    said = lay(*recordings(), tokens=48)
    short = Transcripts(said.place_BL.clone(), said.text_BN, said.length_B)
    short.place_BL[0, 4:] = 48  # 1 1 4 2 needs five frames
    x_TV = scores(48)
    found, others = ctc_loss(x_TV, short, blank=BLANK), of_torch(x_TV, *(x[1:] for x in recordings()))
    assert found.count == others[1]
    torch.testing.assert_close(found.total, others[0])
    found.total.backward()
    assert torch.isfinite(x_TV.grad).all()
    assert not x_TV.grad[2:14].any()


@pytest.mark.exhaustive
@pytest.mark.parametrize("mesh", [Mesh(shard=2, sequence=2, kind="virtual")], ids=str)
def test_ranks_share_packs(mesh):
    places, texts = recordings(packs=2)
    said, x_TV = lay(places, texts, tokens=96, rows=8), scores(96).detach()
    said = Transcripts(*(torch.cat([x[:3], x[6:7], x[3:6], x[7:]]) for x in said))  # four rows a pack

    def step(params, batch):
        def loss(params):
            return ctc_loss(batch["x"] * params["weight_V"], Transcripts(**batch["said"]), blank=BLANK)

        return ftrain.value_and_grad(loss)(params)

    batch, weight_V = {"x": x_TV, "said": said._asdict()}, torch.linspace(0.5, 1.5, V, dtype=torch.float64)
    plan = Plan(mesh, batch={f"said.{name}": rule for name, rule in RULES.items()})
    params = {"weight_V": weight_V}
    (one, grads), (many, others) = (
        step(params, batch),
        ftrain.jit(step, plan=plan, specs=spec.of(params))(params, batch),
    )
    torch.testing.assert_close(many, one, rtol=1e-10, atol=0)
    torch.testing.assert_close(others["weight_V"], grads["weight_V"], rtol=1e-10, atol=1e-12)


def test_frames_say_their_text():
    assert collapsed([3, 3, BLANK, 3, BLANK, BLANK, 1, 2, 2], blank=BLANK) == [3, 3, 1, 2]
    assert collapsed([], blank=BLANK) == []


@pytest.mark.parametrize(
    ("places", "texts", "message"),
    [
        ([range(4)], [[1, 1, 2, 3]], "recording 0: a text of 4 tokens needs 5 frames, and there are 4"),
        ([range(4), range(4)], [[1]], "2 recordings and 1 texts in 2 rows"),
        ([range(8, 12)], [[1]], "recording 0: its frames are at 8 to 11 of a pack of 10 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(places, texts, message):
    with pytest.raises(ValueError, match=message):
        lay(places, texts, tokens=10)
    with pytest.raises(ValueError, match="blank=11 is no token of a vocabulary of 11"):
        packed_ctc.ctc_loss(scores(48), lay(*recordings(), tokens=48), blank=11)
