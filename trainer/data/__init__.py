"""From annotation files and image files to the tensors of a micro-batch."""
