"""A head of scores in a folder of Hugging Face's: a causal language model becomes one that classifies sequences."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ftrain.hf.files import read_json

CAUSAL, CLASSIFIER = "ForCausalLM", "ForSequenceClassification"
_ONE, _INDEX, _CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


def require_causal(folder: str | Path) -> None:
    """ValueError for a folder of another model than one of `add_score_head`, as far as its config.json tells."""
    where = Path(folder)
    named = read_json(where / _CONFIG if where.is_dir() else where).get("architectures") or []
    if named and not any(str(name).endswith((CAUSAL, "Model")) for name in named):
        raise ValueError(
            f"{folder}: a head of scores is written into the folder of a causal language model, and its config.json "
            f"names {', '.join(map(str, named))}: train an adapter (--lora.rank 16), beside which the head is a file"
        )


def add_score_head(folder: str | Path, weight_CD: Tensor, *, pad: int | None = None) -> None:
    """Write the weight `[C, D]` into the folder as `score.weight`, so that transformers loads it as
    `AutoModelForSequenceClassification`, which reads the last token of each row.

    `pad`: the id of padding, without which transformers takes rows one by one. ValueError for a folder that holds no
    causal language model with safetensors.
    """
    where = Path(folder)
    config = json.loads((where / _CONFIG).read_text())
    named = [name for name in config.get("architectures") or [] if name.endswith(CAUSAL)]
    if not named:
        raise ValueError(f"{where}: its config.json names {config.get('architectures')}, no model {CAUSAL}")
    weights = _weights_by_file(where)
    files = sorted(set(weights.values()))
    new = {old: f"model-{i:05d}-of-{len(files) + 1:05d}.safetensors" for i, old in enumerate(files, start=1)}
    head = f"model-{len(files) + 1:05d}-of-{len(files) + 1:05d}.safetensors"
    for old, name in new.items():
        (where / old).rename(where / name)
    save_file({"score.weight": weight_CD.detach().cpu().contiguous()}, where / head, metadata={"format": "pt"})
    by_name = {name: new[file] for name, file in weights.items()} | {"score.weight": head}
    (where / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": by_name}, indent=2))
    config["architectures"] = [named[0].replace(CAUSAL, CLASSIFIER)]
    config["id2label"] = {str(i): f"LABEL_{i}" for i in range(len(weight_CD))}
    config["label2id"] = {f"LABEL_{i}": i for i in range(len(weight_CD))}
    if pad is not None:
        config["pad_token_id"] = pad
    (where / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _weights_by_file(where: Path) -> dict[str, str]:
    if (where / _INDEX).is_file():
        found: dict[str, str] = json.loads((where / _INDEX).read_text())["weight_map"]
        return found
    if not (where / _ONE).is_file():
        raise ValueError(f"{where} holds neither {_ONE} nor {_INDEX}")
    with safe_open(where / _ONE, framework="pt") as file:
        return dict.fromkeys(file.keys(), _ONE)
