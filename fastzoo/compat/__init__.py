"""Other libraries' names, argument order and units on fastzoo's operators, one file a library."""
