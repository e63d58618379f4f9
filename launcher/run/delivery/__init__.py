"""Brings the image and the data of a run to its nodes.

Read `ship` first: one `docker save` here, streamed to every node that lacks the image. `broadcast` is the stream that it and the others use,
`peer_transfer` passes an image from node to node, `pull` and `remote_build` are the other values of cluster.delivery.kind, `sync` copies
the files of cluster.sync, and `node_image` says which image a node has. What runs on a node is in node_scripts/.
"""
