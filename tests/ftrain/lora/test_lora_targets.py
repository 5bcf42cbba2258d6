"""Which parameters targets name, how the factors lie, and what is refused by name."""

import pytest

from ftrain import lora
from ftrain.modules import decoder
from ftrain.modules.hf_names import decoder_names
from ftrain.modules.spec import ParamSpec, leaves_with_paths, of, zeros
from tests.helpers.adapted_models import bridged, native

CFG = decoder.preset("qwen3-moe-tiny")
SPECS = decoder.specs(CFG)


def paths(adapter):
    return [t.path for t in adapter.targets]


def test_globs_last_parts_and_names_of_hugging_face_name_the_same():
    by_glob = lora.add(SPECS, "layers.*.attention.w_q_DHK", rank=2)
    assert paths(by_glob) == ["layers.0.attention.w_q_DHK", "layers.1.attention.w_q_DHK"]
    assert paths(lora.add(SPECS, ["w_q_DHK"], rank=2)) == paths(by_glob)
    names = decoder_names(CFG)
    for target in ("q_proj", "self_attn.q_proj"):
        assert paths(lora.add(SPECS, [target], rank=2, names=names)) == paths(by_glob)
    assert paths(lora.add(SPECS, "**.w_q_*", rank=2, exclude=["layers.1.**"])) == paths(by_glob)[:1]
    assert paths(lora.add(SPECS, ["gate_proj"], rank=2, names=names)) == [f"layers.{i}.moe.w_gate_EDF" for i in (0, 1)]


def test_all_linear_leaves_out_heads_tables_and_routers():
    found = paths(lora.add(SPECS, "all-linear", rank=2))
    assert len(found) == 2 * 7
    assert not any("router" in p or "head" in p or "table" in p for p in found)
    moe = bridged("experts").adapter
    assert {p.rsplit(".", 2)[-2] for p in paths(moe)} == {"q_proj", "k_proj", "v_proj", "o_proj", "experts"}


def test_inputs_and_outputs_are_known_whichever_comes_first():
    first = {t.path: t.inputs_first for t in (*native("dense").adapter.targets, *bridged("gpt2").adapter.targets)}
    assert all(first.values())
    assert not any(t.inputs_first for t in (*bridged("llama").adapter.targets, *bridged("experts").adapter.targets))
    down = next(t for t in bridged("llama").adapter.targets if "down_proj" in t.path)
    assert (down.inputs, down.outputs) == (24, 16)
    shapes = {path.rsplit(".", 1)[-1]: s.shape for path, s in leaves_with_paths(bridged("experts").adapter.specs)
              if "gate_up" in path}  # fmt: skip
    assert shapes == {"A": (4, 16, 3), "B": (4, 3, 16)}
    table = lora.add(SPECS, ["embedding.table_VD"], rank=2).targets[0]
    assert (table.kind, table.inputs, table.outputs) == ("embedding", CFG.vocab, CFG.d_model)
    kernel = ParamSpec((8, 4, 3, 3), ("any",) * 4, zeros())
    convolution = lora.add({"conv": {"weight": kernel}}, ["conv"], rank=2).targets[0]
    assert (convolution.kind, convolution.inputs, convolution.outputs) == ("convolution", 36, 8)


def test_axes_of_deltas_are_those_of_the_sides():
    axes = {path.split(".", 2)[-1]: s.axes for path, s in leaves_with_paths(native("mixture").adapter.specs)}
    assert axes["attention.w_q_DHK_lora.A"] == ("embed", "rank")
    assert axes["attention.w_q_DHK_lora.B"][1] == "heads"
    assert axes["moe.w_down_EFD_lora.A"] == ("expert", "mlp", "rank")


def test_what_matched_is_told():
    table = lora.add(SPECS, "**.w_q_*", rank=2, alpha=4).table()
    assert "layers.0.attention.w_q_DHK  64x64  linear  2     2      256      **.w_q_*" in table
    assert table.endswith("2 parameters changed, 512 numbers trained of 157,056")


@pytest.mark.parametrize(
    ("targets", "options", "says"),
    [
        (["q_prj"], {"names": decoder_names(CFG)}, "'q_prj' matches nothing; nearest: 'q_proj'"),
        (["layers.*.attention.w_x"], {}, "matches nothing; nearest: 'layers"),
        (["norm.weight_D"], {}, "'norm.weight_D' of shape \\[64\\], which is no matrix"),
        (["**"], {"exclude": ["**"]}, "are none: give at least one matrix"),
        (["w_q_DHK"], {"rank": 0}, "rank=0 must be at least 1"),
        (["w_q_DHK"], {"alpha": 0.0}, "alpha=0.0 must be above 0"),
        (["w_q_DHK"], {"dropout": 1.0}, "dropout=1.0 must be in"),
        (["w_up_EDF"], {"dora": True}, "is of kind experts, for which DoRA is not defined here"),
        (["w_up_EDF"], {"dropout": 0.1}, "dropout must be 0 there"),
    ],
)
def test_what_cannot_be_is_refused_by_name(targets, options, says):
    with pytest.raises(ValueError, match=says):
        lora.add(SPECS, targets, **{"rank": 2, **options})


def test_a_model_of_plain_tensors_has_deltas_too():
    import torch

    specs = of({"first": {"weight": torch.zeros(5, 3), "bias": torch.zeros(5)}})
    target = lora.add(specs, "all-linear", rank=2).targets[0]
    assert (target.inputs, target.outputs) == (3, 5)
    assert lora.add(specs, "first.weight", rank=2, inputs_first=["first.weight"]).targets[0].inputs == 5
