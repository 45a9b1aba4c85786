"""Accuracies with intervals, and paired comparisons of models on the same questions."""
