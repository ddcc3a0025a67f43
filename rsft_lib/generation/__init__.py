"""Answers of a model: held-out questions, inference engines, and the form and accuracy of what they write."""
