"""Why a step is slow: its nodes timed one by one."""

from ftrain.profile.nodes import profile_nodes

__all__ = ["profile_nodes"]
