"""A sparse mixture of experts that finds words, pictures and spoken words in long texts."""
