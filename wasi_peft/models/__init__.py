"""What any transformer is to this package: how it is called, what its blocks are."""
