"""Statistics: accuracies with confidence intervals, and paired comparisons of models on the same questions."""
