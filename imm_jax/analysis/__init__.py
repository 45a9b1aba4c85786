"""What a model's layers do for a data set, and how training changes them."""
