"""Generate answers to questions with images, for the stages infer, evaluate and serve.

Read `answerer` first: it prepares questions and generates the answers of a batch. `question` has the data types, `sampling` chooses the next
token of each row, `text_reader` turns tokens into text, and `batch_progress` follows the rows of a batch while they are generated.
"""
