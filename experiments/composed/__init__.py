"""A foundation of choice with a tower of pictures, an encoder of sound and a tokenizer of pictures, each a part."""
