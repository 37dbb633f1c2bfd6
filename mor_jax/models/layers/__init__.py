"""Parts of a Llama layer: norms, MLP, embedding, rotary embedding, masks, token gathers."""
