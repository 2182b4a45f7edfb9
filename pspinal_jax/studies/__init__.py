"""Studies of the heads: what the paper claims beside its accuracies, measured."""
