"""The configuration of a folder: read by transformers, after what it must not do was looked at."""

from pathlib import Path
from typing import Any

from ftrain.bridge.agreement import require_one_value, require_rows_for_tokens
from ftrain.files.outside import JSON_BYTES
from ftrain.hf.files import CONFIG, parse_json, read_member


def read_config(folder: Path, trust_remote_code: bool) -> Any:
    """The configuration of `folder` as transformers has it.

    ValueError for a folder whose own Python files would be run without `trust_remote_code`, for a model that this
    transformers does not know (with the version that wrote the folder), for two names of one entry that differ, and for
    a tokenizer with more ids than the table has rows.
    """
    import transformers

    found = parse_json(read_member(folder, CONFIG, limit=JSON_BYTES), str(folder / CONFIG))
    kind = found.get("model_type")
    known = kind in transformers.CONFIG_MAPPING
    if not known and "auto_map" in found and not trust_remote_code:
        raise ValueError(
            f"{folder}: a model of type {kind!r} is run by Python files of the folder (auto_map): read them, then pass "
            "trust_remote_code=True"
        )
    if not known and "auto_map" not in found:
        written = found.get("transformers_version")
        newer = f"it was written by transformers {written}; " if written else ""
        raise ValueError(
            f"{folder}: transformers {transformers.__version__} knows no model of type {kind!r}: {newer}install a "
            "version that knows it, or bridge a module of your own (ftrain.bridge.from_module)"
        )
    if isinstance(kind, str) and known:
        other_names = transformers.CONFIG_MAPPING[kind].attribute_map
        require_one_value(found, other_names, str(folder / CONFIG))
    require_rows_for_tokens(folder, found)
    return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code and not known)
