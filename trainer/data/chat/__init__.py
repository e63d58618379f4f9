"""Conversations to the text that a model reads, and to its token ids.

Read `segment` first: it divides the text into parts inside and outside the loss, with the chat template of conf/model. With the checkpoint's own
template `prefix` does the same: `saved_template` reads its files, `sandbox` runs it, `probe` finds out what it writes, `checkpoint_template` hands
conversations to it, and `template_choice` decides which of the two is used. `conversation` is for both. `segment_ids` makes the ids of each part.
"""
