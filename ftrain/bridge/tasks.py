"""Which task a folder's model is for, where nobody says it: language alone, or with pictures and sound among it."""

from pathlib import Path

from ftrain.bridge.pretrained import Task
from ftrain.files.outside import read_json


def task_of(folder: str | Path, *, media: bool) -> Task:
    """ "image_text_to_text" for a model that reads media among its tokens, else "causal_lm".

    `media`: whether its media are going to be read. Some architectures are a language model too, as which documents
    can share a pack; they are that where no media are read. ValueError for a folder without a configuration.
    """
    from transformers.models.auto import modeling_auto as known

    try:
        config = read_json(Path(folder) / "config.json")
    except OSError as error:
        raise ValueError(f"{Path(folder) / 'config.json'} cannot be read: {error.strerror or error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    seeing = {**known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **known.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
    if kind not in seeing or (kind in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not media):
        return "causal_lm"
    return "image_text_to_text"
