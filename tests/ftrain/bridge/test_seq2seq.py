"""Encoder-decoders of transformers: a source and a text, packed or in rows, equal to the plain module.

Legend: S tokens of the sources in a pack, T tokens of the targets, B rows.
"""

from dataclasses import replace

import pytest
import torch

import ftrain
from ftrain.bridge import check, from_transformers
from ftrain.bridge.relative import _of_distances
from ftrain.sharding import BatchRows, Layout, Mesh, Plan

transformers = pytest.importorskip("transformers", minversion="5")

BART = {
    "vocab_size": 61, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64,
}  # fmt: skip


def t5(**options):
    sizes = {"vocab_size": 61, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return from_transformers(transformers.T5Config(**sizes, **options), task="seq2seq_lm")


def bart():
    return from_transformers(transformers.BartConfig(**BART), task="seq2seq_lm")


def marian():
    return from_transformers(transformers.MarianConfig(**BART, pad_token_id=0), task="seq2seq_lm")


def pack(sources=(13, 11), targets=(10, 14)):
    """Pairs of which the packs of sources and of targets are of one length: only ids tell them apart."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 61, (sum(targets),), generator=generator)
    return {
        "source": torch.randint(3, 61, (sum(sources),), generator=generator),
        "tokens": tokens,
        "labels": torch.where(torch.arange(len(tokens)) % 5 == 4, -100, tokens.roll(-1)),
        "segments": torch.arange(len(targets)).repeat_interleave(torch.tensor(targets)),
        "source_segments": torch.arange(len(sources)).repeat_interleave(torch.tensor(sources)),
    }


def rows():
    found = {name: x.view(2, 12) for name, x in pack().items() if "segments" not in name}
    return {**found, "source_mask": torch.arange(12) < torch.tensor([[12], [7]])}


def test_a_pack_of_pairs_is_the_plain_module_on_each():
    found = check(t5(), pack())
    assert found.equal, str(found)


def test_a_pack_of_pairs_on_data_ranks_that_hold_whole_pairs():
    batch = pack(sources=(12, 12), targets=(9, 9))
    plan = Plan(
        Mesh(shard=2, kind="virtual"), Layout(), batch=dict.fromkeys(("source", "source_segments"), BatchRows())
    )
    found = check(t5(), batch, plan=plan)
    assert found.equal, str(found)


@pytest.mark.parametrize("make", [t5, bart, marian])
def test_rows_that_are_filled_up(make):
    found = check(make(), rows())
    assert found.equal, str(found)


def test_a_source_of_sound():
    config = transformers.WhisperConfig(
        **BART, num_mel_bins=4, max_source_positions=10, max_target_positions=64, pad_token_id=0
    )
    batch = {"source": torch.randn(2, 4, 20), "tokens": rows()["tokens"], "labels": rows()["labels"]}
    found = check(from_transformers(config, task="seq2seq_lm"), batch)
    assert found.equal, str(found)


def test_places_read_from_the_start_of_a_pack_are_the_reason_for_rows():
    model = bart()
    assert not model.packs
    with pytest.raises(ValueError, match="several documents cannot share its tokens, as it cannot be traced on a pack"):
        model.loss(ftrain.init(model.specs, ftrain.key(0)), pack())


def test_numbers_added_to_scores_are_told_to_be_of_distances_or_not():
    apart = torch.arange(6)[:, None] - torch.arange(6)
    assert _of_distances(apart.abs().float().sqrt())
    assert _of_distances(apart.float() * 2 + 5 * torch.arange(6.0)[:, None])  # what a query's scores all get is nothing
    assert not _of_distances(torch.arange(6.0).square().expand(6, 6))
    assert not _of_distances(torch.arange(5.0).expand(6, 5))


def test_no_memory_of_scores():
    model = bart()
    params = ftrain.init(model.specs, ftrain.key(0))
    traced = ftrain.jit(lambda params, batch: ftrain.value_and_grad(model.loss)(params, batch))
    assert "[24, 61]" not in traced.lower(params, rows()).as_text()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"source_segments": None}, "the batch has 'segments' alone"),
        ({"source": torch.zeros(2, 3, dtype=torch.int64)}, r"tokens \[T\] are a pack, and the source has 2 dims"),
        ({"sauce": torch.zeros(2)}, "the batch has 'sauce', which the model does not read"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(change, says):
    model = t5()
    with pytest.raises(ValueError, match=says):
        model.loss(ftrain.init(model.specs, ftrain.key(0)), {**pack(), **change})


def test_a_sequence_axis_is_refused():
    with pytest.raises(ValueError, match="it reads a source, which the ranks of a sequence axis do not share"):
        check(t5(), pack(), plan=Plan(Mesh(sequence=2, kind="virtual"), Layout()))


def test_a_layer_that_is_converted_while_the_model_runs_is_named():
    sizes = {"vocab_size": 61, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "num_experts": 2}
    sparse = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_decoder_layers": 2}
    config = transformers.SwitchTransformersConfig(**sizes, **sparse)
    model = from_transformers(config, task="seq2seq_lm")
    step = ftrain.jit(lambda params, batch: model.loss(params, batch).value())
    with pytest.raises(ValueError, match=r"modeling_switch_transformers.py:\d+ .* converts a layer of its own"):
        step(ftrain.init(model.specs, ftrain.key(0)), rows())


def test_dropout_draws_from_a_key():
    model = t5(dropout_rate=0.3)
    params = ftrain.init(model.specs, ftrain.key(0))
    step = ftrain.jit(lambda params, batch, key: model.loss(params, batch, key).value())
    first, again, other = (float(step(params, pack(), ftrain.key(n))) for n in (1, 1, 2))
    assert first == again != other
    assert replace(model, name="x").packs
