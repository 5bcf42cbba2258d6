"""Vision encoders of transformers: those of the most downloads, with a class for each picture, or features."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from experiments.bench.covering.case import Case
from experiments.bench.covering.rowwise import ROWS, Rows, pictures

_VIT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
_HEADS = {**_STAGES, "num_attention_heads": [1, 2, 2, 2]}
_SWIN = {
    "image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4,
}  # fmt: skip
_BIASED = {**_VIT, "use_relative_position_bias": True, "use_mask_token": False}


def cases() -> tuple[Case, ...]:
    """A row for each family, and one for the second task of some."""
    return tuple(Case("vision", name, row.build) for name, row in _rows().items())


def _rows() -> dict[str, Rows]:
    classes: dict[str, dict[str, Any]] = {
        "vit": _VIT,
        "deit": {**_VIT, "architectures": ["DeiTForImageClassification"]},
        "beit": _BIASED,
        "dinov2": _VIT,
        "dinov2_with_registers": _VIT,
        "vit_msn": _VIT,
        "ijepa": _VIT,
        "data2vec-vision": _BIASED,
        "swin": _SWIN,
        "swinv2": _SWIN,
        "convnext": _STAGES,
        "convnextv2": _STAGES,
        "resnet": {**_STAGES, "embedding_size": 8},
        "regnet": {**_STAGES, "embedding_size": 8, "groups_width": 8},
        "bit": {**_STAGES, "embedding_size": 8, "num_groups": 4},
        "mobilevit": {"hidden_sizes": [8, 12, 16], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16], "image_size": 32,
                      "num_attention_heads": 2},
        "mobilevitv2": {"base_attn_unit_dims": [8, 16, 24], "image_size": 32, "width_multiplier": 0.25,
                        "n_attn_blocks": [1, 1, 1]},  # an eighth and less of a picture must be two patches
        "mobilenet_v2": {"depth_multiplier": 0.25, "image_size": 32},
        "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "image_size": 32, "hidden_dim": 320},
        "pvt": {**_HEADS, "image_size": 32, "sequence_reduction_ratios": [4, 2, 1, 1]},
        "pvt_v2": {**_HEADS, "image_size": 32, "sr_ratios": [4, 2, 1, 1]},
        "segformer": {**_HEADS, "sr_ratios": [4, 2, 1, 1]},
        "hiera": {"embed_dim": 8, "image_size": [32, 32], "depths": [1, 1, 1], "num_heads": [1, 2, 2],
                  "num_query_pool": 2, "masked_unit_size": [4, 4], "masked_unit_attention": [True, True, False],
                  "patch_size": [7, 7]},
        "poolformer": _STAGES,
        "levit": {"hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
                  "key_dim": [8, 8, 8], "image_size": 64, "drop_path_rate": 0,
                  "architectures": ["LevitForImageClassification"]},
        "focalnet": {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "hidden_sizes": [8, 16],
                     "focal_levels": [2, 2], "focal_windows": [3, 3]},
        "cvt": {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 2], "depth": [1, 2, 3],
                "drop_path_rate": [0.0, 0.0, 0.0]},
    }  # fmt: skip
    sizes = {"levit": 64, "bit": 64, "mobilevitv2": 64}
    found = {
        kind: Rows(kind, "image_classification", partial(pictures, size=sizes.get(kind, 32)), options)
        for kind, options in classes.items()
    }
    features: dict[str, dict[str, Any]] = {
        "dinov3_vit": {**_VIT, "pos_embed_rescale": None},
        "dinov3_convnext": _STAGES,
        "clip_vision_model": _VIT,
        "siglip_vision_model": _VIT,
    }
    found |= {kind: Rows(kind, "features", pictures, options) for kind, options in features.items()}
    siglip2 = {name: value for name, value in _VIT.items() if name != "image_size"}
    found["siglip2_vision_model"] = Rows("siglip2_vision_model", "features", _patches, {**siglip2, "num_patches": 16})
    found["vit_mae"] = Rows("vit_mae", "features", _with_noise, _VIT)
    return found


def _patches(generator: torch.Generator) -> dict[str, Tensor]:
    """Pictures of two shapes as rows of patches, some of which are filling."""
    shapes = torch.tensor([[4, 4], [2, 6], [4, 3], [4, 4]])
    return {
        "pixel_values": torch.randn(ROWS, 16, 3 * 8 * 8, generator=generator),
        "pixel_attention_mask": (torch.arange(16) < shapes.prod(1, keepdim=True)).long(),
        "spatial_shapes": shapes,
    }


def _with_noise(generator: torch.Generator) -> dict[str, Tensor]:
    """Pictures, and the numbers by which a masked autoencoder chooses its patches."""
    return {**pictures(generator), "noise": torch.rand(ROWS, 16, generator=generator)}
