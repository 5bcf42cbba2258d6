"""Running a graph: as Python, through Inductor, as a CUDA graph, all ranks in lockstep."""
