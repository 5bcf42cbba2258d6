"""Plans: which layout a component has, and the table of what lies where."""

from typing import NamedTuple

import pytest
import torch

from ftrain.sharding import BatchRows, Hybrid, Layout, Mesh, Plan, Ring, TokenIndices, Tokens, Ulysses


class Spec(NamedTuple):
    shape: tuple
    axes: tuple
    dtype: torch.dtype = torch.float32


SPECS = {
    "encoder": {"w_DF": Spec((8, 4), ("embed", "mlp"))},
    "layers": [{"moe": {"w_EDF": Spec((4, 8, 6), ("expert", "embed", "mlp"))}, "norm_D": Spec((8,), ("embed",))}],
}
MESH = Mesh(2, 2, 2, 2, "virtual")


def test_the_most_specific_glob_wins():
    ring, local = Layout(sequence=Ring()), Layout(sequence=None)
    plan = Plan(MESH, components={"layers": local, "layers.*.moe": ring})
    assert plan.layout("layers.0.moe.w_EDF") is ring
    assert plan.layout("layers.0.norm_D") is local
    assert plan.layout("encoder.w_DF") is plan.default


def test_the_table_shows_shapes_and_bytes():
    table = Plan(MESH, components={"encoder": Layout(parameters=(), dtype="bfloat16")}).describe(SPECS).splitlines()
    assert [line.split("  ")[0] for line in table[1:]] == [
        "encoder.w_DF", "layers.0.moe.w_EDF", "layers.0.norm_D", "total"
    ]  # fmt: skip
    assert "copies over replicate+shard+sequence" in table[1]
    assert table[1].endswith(" 64")
    assert "dim 0 over expert (2), dim 1 over expert_shard (2), copies over replicate" in table[2]
    assert "[2, 4, 6]" in table[2]
    assert table[2].endswith("192")
    assert table[4].endswith(f"{64 + 192 + 8}")


def test_one_number_changes_fsdp_to_hsdp():
    fsdp = Plan(Mesh(1, 8, kind="virtual")).placements(SPECS)["encoder.w_DF"]
    hsdp = Plan(Mesh(2, 4, kind="virtual")).placements(SPECS)["encoder.w_DF"]
    assert (fsdp.splits[0].size, fsdp.copies) == (8, ())
    assert (hsdp.splits[0].size, hsdp.copies) == (4, ("replicate",))


def test_a_component_that_is_not_there_is_named():
    with pytest.raises(
        ValueError, match=r"Plan\(components=...\): 'layers.\*.mlp' matches nothing; nearest: 'layers.0"
    ):
        Plan(MESH, components={"layers.*.mlp": Layout()}).placements(SPECS)


def test_a_glob_as_a_keyword_is_told_where_to_go():
    with pytest.raises(ValueError, match=r"write Plan\(mesh, components=\{'encoders': Layout\(.*\)\}\)"):
        Plan(MESH, encoders=Layout())
    with pytest.raises(ValueError, match=r"Plan\(rules=3\): a plan takes mesh, default, components, batch, link"):
        Plan(MESH, rules=3)
    with pytest.raises(
        ValueError, match=r"the plan's layout of 'encoders' is 'replicated', not a ftrain.sharding.Layout"
    ):
        Plan(MESH, components={"encoders": "replicated"})


def test_a_parameter_that_cannot_be_divided_is_named():
    with pytest.raises(ValueError, match=r"layers.0.moe.w_EDF: 4 experts cannot be divided over expert=8"):
        Plan(Mesh(1, 8, 1, 8, "virtual")).placements(SPECS)


def test_rings_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match="components default and layers want rings of different sizes"):
        Plan(MESH, Layout(sequence=Ring()), components={"layers": Layout(sequence=Hybrid(2))})


def test_a_hybrid_that_does_not_divide_lists_what_does():
    with pytest.raises(ValueError, match=r"default: Hybrid\(ulysses=3\) does not divide sequence=4.*\[1, 2, 4\]"):
        Plan(Mesh(1, 1, 4, kind="virtual"), Layout(sequence=Hybrid(3)))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"parameters": ("expert",)}, "'expert' is not an axis that divides parameters"),
    ({"parameters": ("sequence", "shard")}, "name each axis once, in the order"),
    ({"expert_chunks": 0}, "expert_chunks=0"),
    ({"sequence": "ulysses"}, "sequence='ulysses'"),
])  # fmt: skip
def test_layouts_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        Layout(**arguments)


def test_the_order_of_tokens_follows_the_ring():
    assert Plan(MESH).order.zigzag is False
    assert Plan(Mesh(1, 1, 4), Layout(sequence=Hybrid(2))).order == (4, 2, True)
    assert Plan(Mesh(1, 1, 4), Layout(sequence=Ring(zigzag=False))).order == (4, 4, False)
    assert Plan(Mesh(1, 1, 4), Layout(sequence=Ulysses())).order == (4, 1, False)


def test_batch_rules_are_found_by_glob():
    plan = Plan(
        MESH, batch={"positions_*": Tokens(1), "**.index_n": TokenIndices(), "encoders.*.features": BatchRows()}
    )
    assert plan.batch_rule("positions_AT") == Tokens(1)
    assert plan.batch_rule("encoders.image.index_n") == TokenIndices()
    assert plan.batch_rule("encoders.image.features.segments_N.ids_T") == BatchRows()
    assert plan.batch_rule("tokens_T") == Tokens(0)


def test_a_star_is_one_part_and_all_below_it():
    plan = Plan(MESH, batch={"*": Tokens(1), "encoders.*.index_n": TokenIndices()})
    assert plan.batch_rule("labels") == plan.batch_rule("media.image.rows") == plan.batch_rule("") == Tokens(1)
    assert plan.batch_rule("encoders.image.index_n") == TokenIndices()


def test_batch_rules_that_tie_or_match_nothing_are_named():
    plan = Plan(MESH, batch={"image.**": Tokens(1), "**.rows": BatchRows()})
    with pytest.raises(ValueError, match=r"Plan\(batch=...\): 'image\.\*\*' and '\*\*\.rows' both match 'image\.rows'"):
        plan.batch_rule("image.rows")
    plan.require_batch(["image.pixels", "audio.rows"])
    with pytest.raises(ValueError, match=r"Plan\(batch=...\): '\*\*\.rows' matches nothing; nearest: 'image\.row'"):
        plan.require_batch(["image.row"])


def test_a_rule_of_leaves_that_a_batch_may_lack_need_not_match():
    media = {"media.*": BatchRows(optional=True), "media.index": TokenIndices(optional=True)}
    Plan(Mesh(shard=2, kind="virtual"), batch=media).require_batch(["tokens"])
