"""Folders of tiny Wan pipelines with random weights, as diffusers writes them, and folders of tiny films."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import ftrain
from ftrain.bridge.native_umt5 import native_umt5
from ftrain.bridge.native_wan import native_wan
from ftrain.bridge.native_wan_vae import native_wan_vae
from ftrain.modules.model import Model
from ftrain.modules.spec import Normal, map_with_paths
from tests.helpers import tiny_wan, tiny_wan_vae

UMT5: dict[str, Any] = {
    "architectures": ["UMT5EncoderModel"], "model_type": "umt5", "d_model": 12, "d_kv": 4, "d_ff": 16,
    "num_layers": 1, "num_heads": 2, "vocab_size": 260, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
WITH_FRAME = {**tiny_wan.TINY, "in_channels": 12}
"""As Wan 2.2's image to video has it: latents, a mask of four channels and latents of the first frame."""
WITH_ENCODER = {**WITH_FRAME, "image_dim": 10, "added_kv_proj_dim": 40}
"""As Wan 2.1's image to video has it: rows of an image encoder too."""
SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0, "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction", "use_flow_sigmas": True,
}  # fmt: skip


def write_pipeline(
    folder: Path,
    *,
    transformer: dict[str, Any] = tiny_wan.TINY,
    boundary: float | None = None,
    seed: int = 0,
    **more: Any,
) -> Path:
    """A pipeline's folder. `boundary`: of two experts. `more`: entries of `model_index.json`."""
    written = {
        "vae": native_wan_vae(tiny_wan_vae.TINY),
        "text_encoder": native_umt5(UMT5),
        "transformer": native_wan(transformer),
        **({} if boundary is None else {"transformer_2": native_wan(transformer)}),
    }
    for number, (name, model) in enumerate(written.items()):
        _save(model, folder / name, seed=10 * seed + number)
    _tokenizer().save_pretrained(folder / "tokenizer")
    if transformer.get("image_dim"):
        _write_image_encoder(folder)
        parts = {"image_encoder": "CLIPVisionModel", "image_processor": "CLIPImageProcessor"}
        more |= {name: ["transformers", kind] for name, kind in parts.items()}
    (folder / "scheduler").mkdir(parents=True)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULER))
    index: dict[str, Any] = {
        "_class_name": "WanImageToVideoPipeline" if transformer["in_channels"] > 4 else "WanPipeline",
        "transformer": ["diffusers", "WanTransformer3DModel"], "vae": ["diffusers", "AutoencoderKLWan"],
        "text_encoder": ["transformers", "UMT5EncoderModel"], "tokenizer": ["transformers", "T5TokenizerFast"],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "transformer_2": [None, None] if boundary is None else ["diffusers", "WanTransformer3DModel"],
        "boundary_ratio": boundary, **more,
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _save(model: Model, folder: Path, *, seed: int) -> None:
    """Every parameter random, norms about 1."""
    specs = map_with_paths(lambda _, spec: replace(spec, init=Normal(0.1)), model.specs)
    params = ftrain.init(specs, ftrain.key(seed))
    moved = map_with_paths(
        lambda path, p: p + float(("norm" in path and "bias" not in path) or "gamma" in path), params
    )
    assert model.save is not None
    model.save(moved, folder)


def _write_image_encoder(folder: Path) -> None:
    """Of CLIP, with 5 rows of 10 for a picture, of which the last layer but one is read."""
    import torch
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 10, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=28, patch_size=14)).save_pretrained(folder / "image_encoder")
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(folder / "image_processor")


def _tokenizer() -> Any:
    """Bytes, and an end behind each text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({"<pad>": 0, "</s>": 1} | {letter: i + 2 for i, letter in enumerate(letters)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>")


def write_film(
    file: Path, *, frames: int = 12, size: tuple[int, int] = (32, 48), rate: int = 16, seed: int = 0
) -> Path:
    """A film of a moving square, losslessly coded."""
    import av

    file.parent.mkdir(parents=True, exist_ok=True)
    height, width = size
    with av.open(str(file), "w", format="matroska") as container:
        stream: Any = container.add_stream("ffv1", rate=rate)
        stream.height, stream.width, stream.pix_fmt = height, width, "bgr0"
        for i in range(frames):
            array = np.full((height, width, 3), (40 * seed) % 255, np.uint8)
            at = (3 * i + 5 * seed) % (width - 8)
            array[4:12, at : at + 8] = (255, 200 - 20 * seed % 200, 10 * i % 255)
            for packet in stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return file


def write_films(folder: Path, count: int = 3, **how: Any) -> Path:
    """A folder of films with a .txt beside each."""
    for i in range(count):
        write_film(folder / f"film_{i}.mkv", seed=i, **how)
        (folder / f"film_{i}.txt").write_text(f"a square that moves, number {i}")
    return folder
