"""What each task minimises and measures: one file an objective, and the table of them."""
