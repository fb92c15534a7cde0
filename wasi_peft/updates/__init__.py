"""Updates: which part of a form trains, and how. One file an update, one registry."""
