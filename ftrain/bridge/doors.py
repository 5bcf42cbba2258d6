"""The public registries of transformers: our attention, masks and experts under one name of ours."""

from ftrain.bridge.attention import NAME, attend, mask_of
from ftrain.bridge.experts import run_experts


def open_doors() -> None:
    """Register our functions with transformers, under `NAME`. Nothing changes for models that do not name it.

    ImportError, with what to install, without transformers 5.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        raise ImportError(
            "the bridge to transformers needs transformers>=5: pip install 'transformers>=5,<6'"
        ) from error
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask_of)
    ExpertsInterface.register(NAME, run_experts)
