"""The stages of `experiments/bench/gpu.py`: what one GPU should tell when there are only minutes of it."""
