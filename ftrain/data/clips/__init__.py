"""Clips of videos for training: which frames, at which size, with which captions, and their cache of latents."""
