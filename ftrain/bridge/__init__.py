"""Models that exist as pure functions: transformers', or any module of one's own."""

from typing import TYPE_CHECKING

from ftrain.lazy import lazy_names

if TYPE_CHECKING:
    from ftrain.bridge.checks import Checked, check
    from ftrain.bridge.diffusion import from_diffusers
    from ftrain.bridge.modules import from_module
    from ftrain.bridge.native_talking import load_player, open_talking, talking_config
    from ftrain.bridge.pretrained import from_transformers

__all__ = [
    "Checked",
    "check",
    "from_diffusers",
    "from_module",
    "from_transformers",
    "load_player",
    "open_talking",
    "talking_config",
]
__getattr__ = lazy_names(
    "ftrain.bridge",
    {
        "checks": ("Checked", "check"),
        "diffusion": ("from_diffusers",),
        "modules": ("from_module",),
        "native_talking": ("load_player", "open_talking", "talking_config"),
        "pretrained": ("from_transformers",),
    },
)
