"""What a linear can be quantized as: the table of schemes, and tensors matched with it."""
