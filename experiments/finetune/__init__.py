"""`make finetune`: a pretrained chat model learns a small habit from a file, with LoRA, and PEFT gives its answers."""
