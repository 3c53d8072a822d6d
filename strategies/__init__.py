"""Pure decisions of the server: numbers in, numbers out."""
