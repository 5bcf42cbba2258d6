"""Math with hand-written forward and backward: one file per op. See ARCHITECTURE.md, "How a kernel is made"."""
