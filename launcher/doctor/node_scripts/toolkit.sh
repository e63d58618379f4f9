# The programs of NVIDIA's container toolkit that are installed.
# shellcheck shell=sh
for name in nvidia-container-runtime-hook nvidia-container-runtime nvidia-ctk; do command -v "$name"; done
