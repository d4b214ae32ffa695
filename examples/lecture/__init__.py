"""CS231n (2017), lecture 7, reproduced on the engine: one module per row, proven with numbers."""
