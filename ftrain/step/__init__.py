"""Jitted steps: the list of passes, what a compile yields, signatures, calls on one device and on meshes."""
