"""What the paper compares, as commands that train the tiny size several times and print a table."""
