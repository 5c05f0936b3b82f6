"""The machine and the terminal: threads, devices and precision, progress bars, files written whole."""
