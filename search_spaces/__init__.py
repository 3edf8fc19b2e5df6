"""Search spaces: networks with choices in them, ready to search. One network per file, to be used or copied."""
