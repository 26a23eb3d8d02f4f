"""Examples to packed micro-batches: forest, loader."""
