"""Losses of actor, critic and reward model: (loss, metrics) from tensors, a mask and the batch's denominator.

Every function is elementwise over tokens and then a weighted sum, so [B, T] and packed [N] tensors serve alike.
What a mean is taken over lives in two numbers that are made once per batch, see ``aggregation``: a weight per token
and a denominator. Hence the loss of a batch is the plain sum of the losses of its parts.
"""
