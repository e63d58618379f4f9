"""Tensors in files and in pieces: reading, writing, casting and quantizing weights without holding a whole model.

Read `stream` first: every tensor of a folder as a source, and files written piece by piece. `shard` is the same for training state. `naming`
maps names in files to names in memory, `paging` runs a model whose weights stay on disk, `cast_error` measures casts, `int8` quantizes, and
`fp32_exceptions` keeps some weights in float32.
"""
