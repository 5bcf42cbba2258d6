import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.data.media.sizes import Multiples

sides = st.integers(1, 5000)


@settings(deadline=None)
@given(sides, sides, st.sampled_from([14, 28, 32]))
def test_multiples_are_those_of_qwens_processor(height, width, factor):
    theirs = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl").smart_resize
    rule = Multiples(factor, least_pixels=56 * 56, most_pixels=1003520)
    wanted = None
    try:
        wanted = theirs(height, width, factor=factor, min_pixels=56 * 56, max_pixels=1003520)
    except ValueError:
        with pytest.raises(ValueError, match="200 times the other"):
            rule.size(height, width)
        return
    assert rule.size(height, width) == tuple(wanted)
