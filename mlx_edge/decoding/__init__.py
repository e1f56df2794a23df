"""One sequence: the readable loop that every faster engine must agree with."""
