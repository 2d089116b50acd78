"""Weights of the family in and out: one file a foreign layout, and what they share.

weightfile   a stranger's file opened safely: names, types and shapes before any tensor
torchfile    the same for what torch.save wrote, looked through before torch may read it
rewriting    rules from foreign names to ours, what becomes of every tensor, the receipt
geometry     other picture sizes and text lengths; unilm's table of relative positions
vocabulary   rows of a word table in the order of our ids
layouts      the table of layouts: a line each
folder       the result as a run folder
cli          `vlbeit convert`
"""
