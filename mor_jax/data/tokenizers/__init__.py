"""Tokenizers: bytes, Hugging Face tokenizer.json, SentencePiece, and training of BPE."""
