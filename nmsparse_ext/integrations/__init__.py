"""What other libraries have to be told about packed weights; one module each, imported when theirs is."""
