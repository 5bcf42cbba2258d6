"""Models that exist as pure functions: transformers', or any module of one's own."""

from typing import TYPE_CHECKING

from ftrain.lazy import lazy_names

if TYPE_CHECKING:
    from ftrain.bridge.checks import Checked, check
    from ftrain.bridge.diffusion import from_diffusers
    from ftrain.bridge.modules import from_module
    from ftrain.bridge.pretrained import from_transformers

__all__ = ["Checked", "check", "from_diffusers", "from_module", "from_transformers"]
__getattr__ = lazy_names(
    "ftrain.bridge",
    {
        "checks": ("Checked", "check"),
        "diffusion": ("from_diffusers",),
        "modules": ("from_module",),
        "pretrained": ("from_transformers",),
    },
)
