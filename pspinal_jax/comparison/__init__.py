"""Which head for this data: equal tuning, several seeds, one look at the test split; `door.compare` from Python."""
