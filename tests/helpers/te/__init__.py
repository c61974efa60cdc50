"""Transformer Engine's own Python on CPU, over an extension of plain torch, in a process of its own."""
