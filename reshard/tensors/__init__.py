"""Tensors as bytes: element types, headers, blocks, digests."""
