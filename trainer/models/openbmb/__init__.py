"""OpenBMB's models that transformers has no classes for: MiniCPM-V 2.6, MiniCPM-o 2.6, OmniLMM 12B and 3B (MiniCPM-V 1.0).

Our own modules with the published parameter names; code in a checkpoint is never run. Read `minicpm_v` first: the family of the two 2.6
models (network in `minicpm_network`, image slices in `slicer`). `omnilmm` and `omnilmm_3b` share `omnilmm_family`, `published`, `tower` and
`query_resampler`. `sentencepiece` reads a tokenizer.model without the sentencepiece package.
"""
