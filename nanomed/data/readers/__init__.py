"""One file a kind of data set: from what its makers hand out to a `Table` of rows (../table.py)."""
