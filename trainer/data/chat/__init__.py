"""Conversations to the text that a model reads, and to its token ids.

Read `segment` first: it divides the text into parts inside and outside the loss. `segment_ids` makes the ids of each part.
"""
