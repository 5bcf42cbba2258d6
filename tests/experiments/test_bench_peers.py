"""What a published FSDP2 program holds: each of its documented pieces, in the bytes of a small model."""

from dataclasses import replace

import pytest

from experiments.bench.peers import GIB, WITH_ALL_TO_ALL, Fsdp2
from experiments.bench.plan_vs_published import grand_teton, held, models, runs
from ftrain import tree
from ftrain.modules import decoder
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.decoder import DecoderConfig

CFG = DecoderConfig(100, 32, layers=3, attention=AttentionConfig(32, heads=4, kv_heads=2, head_dim=8), d_hidden=64)
PROGRAM = Fsdp2(CFG, ranks=4, tokens=16, micro_batches=True)
ROOT = 2 * 100 * 32 + 32
START, END = PROGRAM.moments


def test_parameters_are_those_of_the_model():
    assert PROGRAM.parameters == sum(s.elements for s in tree.leaves(decoder.specs(CFG)))


def test_gradients_wait_beside_the_state_only_if_there_are_several_micro_batches():
    once = replace(PROGRAM, micro_batches=False).moments
    assert PROGRAM.moments[START] - once[START] == 4 * PROGRAM.parameters / 4
    assert PROGRAM.moments[END] == once[END]


def test_each_token_costs_the_residuals_of_all_layers_and_the_insides_of_one():
    more = replace(PROGRAM, tokens=17).moments
    inside = 2 * (4 * 32 + (32 + 2 * 16) + (32 + 16) + 32 + 4 * 64)
    assert more[START] - PROGRAM.moments[START] == 3 * 2 * 32 + inside
    assert more[END] == PROGRAM.moments[END]


def test_at_the_end_the_root_is_whole_in_parameters_gradients_and_messages():
    state = 16 * PROGRAM.parameters / 4
    assert PROGRAM.moments[END] == state + (2 + 2 + 4) * ROOT


def test_the_whole_device_holds_more_than_the_allocator_knows():
    whole = replace(PROGRAM, device=WITH_ALL_TO_ALL)
    assert whole.peak - PROGRAM.peak == WITH_ALL_TO_ALL.outside * GIB


def test_more_ranks_hold_less_of_everything_but_the_gathered():
    wide = replace(PROGRAM, ranks=10**9).moments[END]
    assert wide == pytest.approx(8 * ROOT, rel=1e-3)


@pytest.mark.parametrize("run", [r for r in runs() if not r.titan], ids=lambda r: r.name)
def test_memory_of_the_published_runs_is_within_ten_percent(run):
    assert held(run, None) / GIB == pytest.approx(run.memory, rel=0.1)


def test_the_cards_of_torchtitan_are_between_two_data_sheets():
    assert 835e12 < grand_teton().bf16 < 989e12
    assert models()["llama3-8b"].layers == 32
