"""`make distill`: a small video model of moving digits, distilled to four steps, to one, and frame by frame."""
