"""What every Hugging Face export carries: the model in PyTorch, `modeling_mor.py`."""
