"""Evaluation: a model's answers to held-out samples, and their scores.

Read `evaluate` first. `text_metric` scores answers as text, `teacher_forcing` the tokens of given answers, `score_change` compares a
checkpoint with its base.
"""
