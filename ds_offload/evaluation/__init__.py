"""Evaluation: how far sparse decoding is from dense decoding of the same model, on texts and on tasks."""
