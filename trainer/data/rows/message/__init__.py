"""The messages of a row: role, text, loss, reasoning and calls of tools, under all names that rows use.

Read `turn` first: it reads a list of messages. `role`, `loss_flag`, `reasoning` and `tool` read a part each, from tables of names. `turn_order`
puts messages in order where the user allows it.
"""
