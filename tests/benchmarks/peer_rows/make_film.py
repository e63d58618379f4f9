"""Run by the Python of an environment with PyAV: a film of four grey pictures, two a second, as an MP4 whatever its name ends with.

python make_film.py FILE
"""

import sys

import av
import numpy as np

with av.open(sys.argv[1], "w", format="mp4") as opened:
    stream = opened.add_stream("mpeg4", rate=2)
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
    for grey in (40, 90, 140, 190):
        frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), grey, dtype=np.uint8), format="rgb24")
        for packet in stream.encode(frame):
            opened.mux(packet)
    for packet in stream.encode():
        opened.mux(packet)
