"""Plain files: written as a whole or not at all."""
