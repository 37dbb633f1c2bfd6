"""Tokenizers of foreign models and of exports."""
