"""What a graph costs: memory over time, FLOPs, bytes, microseconds, on the device at hand or on paper."""
