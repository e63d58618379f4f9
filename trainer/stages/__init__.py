"""What a stage trains. A stage knows no loop, and the loop no stage."""
