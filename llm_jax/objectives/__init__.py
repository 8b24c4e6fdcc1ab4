"""Objectives: rows of tokens to a Batch, hidden states to losses."""
