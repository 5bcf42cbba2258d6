"""The bench of a step: both sides compute the same, in the dtype that was asked for."""

import pytest

from experiments.bench import step
from experiments.bench.step import Options, Part


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.exhaustive)])
def test_both_sides_make_the_same_losses(precision: str) -> None:
    options = Options(quick=True, rounds=1, compiled=False, only=("llama",), precision=precision)
    rows = {r.name: r for r in step.main(options)}
    share = rows["llama: memory, ftrain aten / transformers eager"]
    assert share.peer <= step.SAME_LOSS[precision]
    assert f", {precision}," in rows["llama: step, ftrain aten"].how


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "family"),
    [
        pytest.param("bridge-llama", "llama", marks=pytest.mark.exhaustive),
        ("bridge-moe", "qwen3-moe"),
    ],
)
def test_a_bridged_model_makes_the_losses_of_its_module(part: Part, family: str) -> None:
    rows = {r.name: r for r in step.main(Options(quick=True, rounds=1, only=(part,)))}
    for side in ("ftrain aten", "ftrain aten by layer"):
        memory = rows[f"bridged {family}: memory, {side} / transformers eager"]
        assert memory.peer <= step.SAME_LOSS["float32"]
    assert rows[f"bridged {family}: memory, ftrain aten / transformers eager"].goal == 0.7
    assert rows[f"bridged {family}: time, ftrain aten / transformers eager"].goal == 1.0


def test_auto_is_float32_on_a_cpu() -> None:
    assert step._precision(Options()).compute == "float32"
    assert step._precision(Options(device="cuda")).compute == "bfloat16"
